"""quantize --target-size on a trained model: what is added in size takes KL away, on other text, too."""
from harness import STORIES_15M, TINY, TestCase, fireq_json, main, shards

TEXT = ("--text", TINY, "--skip-chars", 300000, "--max-chars", 40000, "--samples", 8, "--length", 256)
OTHER = ("--text", TINY, "--skip-chars", 50000, "--max-chars", 8000, "--ctx", 256)


class Plan(TestCase):
    def test_kl_falls_with_size(self):
        kl = []
        for megabytes in (23, 25, 28):
            out = self.tmp / str(megabytes)
            report = fireq_json("quantize", STORIES_15M, "-o", out, "--preset", "rtn", "--target-size",
                                f"{megabytes}MB", *TEXT)
            self.assertLessEqual(sum(path.stat().st_size for path in shards(out)), megabytes * 1e6)
            self.assertGreater(report["bytes_after"], (megabytes - 0.5) * 1e6)
            other = fireq_json("eval", out, *OTHER, "--reference", STORIES_15M, "--kv", "fp", "--qp", "fp")["kl_mean"]
            kl.append((report["plan"]["result_kl"], other))
        for less, more in zip(kl, kl[1:]):
            self.assertLess(more[0], 0.7 * less[0])
            self.assertLess(more[1], 0.7 * less[1])


if __name__ == "__main__":
    main()
