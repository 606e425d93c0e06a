"""What the presets cost on stories15M, as docs/results.md reports it: a guard against losing accuracy unnoticed."""
from harness import STORIES_15M, TINY, TestCase, fireq_json, main

EVALUATE = ("--text", TINY, "--skip-chars", 50000, "--max-chars", 40000, "--bos", "head", "--ctx", 256)
CALIBRATE = ("--text", TINY, "--skip-chars", 300000, "--max-chars", 60000, "--samples", 64, "--length", 256)


class Stories15M(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.original = fireq_json("eval", STORIES_15M, *EVALUATE)["nll_per_token"]

    def cost(self, name, *args):
        """Increase of nll per token with packed weights and FP8 activations, without the INT4 cache."""
        out = self.quantised(name, STORIES_15M, *args)
        nll = fireq_json("eval", out, *EVALUATE, "--kv", "fp")["nll_per_token"]
        print(f"{name}: {nll - self.original:+.4f}")
        return nll - self.original

    def test_rtn(self):
        self.assertAlmostEqual(self.cost("rtn", "--preset", "rtn"), 0.25, delta=0.03)

    def test_fast_with_integers(self):
        self.assertLess(self.cost("fast-int4", "--preset", "fast", "--levels", "int4", *CALIBRATE), 0.13)

    def test_fast_with_normal_levels(self):
        self.assertLess(self.cost("fast-normal", "--preset", "fast", "--levels", "normal", *CALIBRATE), 0.09)

    def test_best(self):
        self.assertLess(self.cost("best", "--preset", "best", *CALIBRATE), 0.04)


if __name__ == "__main__":
    main()
