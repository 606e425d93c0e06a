"""What the presets cost on stories15M, as docs/results.md reports it: a guard against losing accuracy unnoticed."""
import json

import numpy as np

from harness import DATA, GRIMM, STORIES_15M, STORIES_260K, TINY, TestCase, fireq, fireq_json, main

EVALUATE = ("--text", TINY, "--skip-chars", 50000, "--max-chars", 40000, "--bos", "head", "--ctx", 256)
CALIBRATE = ("--text", TINY, "--skip-chars", 300000, "--max-chars", 60000, "--samples", 64, "--length", 256,
             "--no-measure")  # which would hold some of these windows back


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


class OwnText(TestCase):
    """A little text of another kind: what the model writes itself makes up for much of what is lacking."""

    def test_best_with_little_text(self):
        kl = {}
        for share in (0, 1):
            recipe = self.tmp / f"{share}.json"
            recipe.write_text(json.dumps({"preset": "best", "curvature": {"own_text": share}}))
            out = self.quantised(f"own-{share}", STORIES_260K, "--recipe", recipe, "--text", GRIMM, "--max-chars", 60000,
                                 "--samples", 8, "--length", 256, "--no-measure")
            kl[share] = fireq_json("eval", out, "--text", TINY, "--skip-chars", 50000, "--max-chars", 20000, "--ctx", 256,
                                   "--kv", "fp", "--reference", STORIES_260K)["kl_mean"]
        print(kl)
        self.assertLess(kl[1], 0.92 * kl[0])


class Families(TestCase):
    """Every family and feature that is read, in models of random weights: what a better preset is for holds on each."""

    def test_presets_on_every_family(self):
        rng = np.random.default_rng(31)
        files = [self.shared / "calibrate.u32", self.shared / "evaluate.u32"]
        for path, count in zip(files, (6000, 4096)):
            rng.integers(0, 80, count).astype("<u4").tofile(path)
        models = sorted((DATA / "tiny").iterdir())
        self.assertGreaterEqual(len(models), 16)
        for model in models:
            kl = {}
            for preset in ("paper", "fast", "best"):
                out = self.quantised(f"{model.name}-{preset}", model, "--preset", preset, "--tokens", files[0],
                                     "--samples", 10, "--length", 256, "--no-measure")
                for cache in ("fp", "int4"):
                    report = fireq_json("eval", out, "--tokens", files[1], "--ctx", 256, "--kv", cache, "--reference", model)
                    kl[preset, cache] = report["kl_mean"]
                fireq("validate", out, "--reference", model, "--quiet")
            with self.subTest(model.name):
                print(model.name, {f"{p} {c}": round(v, 4) for (p, c), v in kl.items()})
                for cache in ("fp", "int4"):
                    self.assertLess(kl["fast", cache], 0.95 * kl["paper", cache])
                    self.assertLess(kl["best", cache], 0.8 * kl["fast", cache])


if __name__ == "__main__":
    main()
