"""quantize --target-size on a trained model: what is added in size takes KL away, on other text, too."""
import os
import subprocess

from harness import STORIES_15M, TINY, TestCase, arguments, environment, fireq_json, main, parse_json, sanitized, shards

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

    def test_memory_of_choosing(self):
        """What --dry-run says is enough, and not many times what is used."""
        goal = ("quantize", STORIES_15M, "-o", self.tmp / "out", "--preset", "rtn", "--target-size", "25MB", "--dry-run", *TEXT)
        process = subprocess.Popen(arguments((*goal, "--json", self.tmp / "plan.json")), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), text=True)
        with process.stdout:
            said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.assertEqual(0, process.returncode)
        plan = parse_json(self.tmp / "plan.json")["plan"]
        self.assertIn("choosing precisions: peak memory at most", said)
        if not sanitized():
            peak = usage.ru_maxrss * 1024
            print(f"peak {peak / 1e6:.0f} MB of {plan['peak_memory'] / 1e6:.0f} MB", end=" ")
            self.assertLess(peak, plan["peak_memory"])
            self.assertLess(plan["peak_memory"], 3 * peak)

    def test_time(self):
        """What is expected before, against the clock: other work on the machine moves both, not always together."""
        best = ("--preset", "best", "--text", TINY, "--skip-chars", 300000, "--samples", 16, "--length", 256)
        for args, seconds_of in ((best, lambda r: r["seconds"]),
                                 (("--preset", "rtn", "--target-size", "25MB", "--dry-run", *TEXT), lambda r: r["plan"]["seconds"])):
            report = fireq_json("quantize", STORIES_15M, "-o", self.tmp / "timed", *args)
            took, expected = seconds_of(report), report["expected_time"]["seconds"]
            print(f"expected {expected:.1f} s, took {took:.1f} s", end="; ")
            if not sanitized():  # they slow our own loops down and not those of BLAS
                self.assertLess(took / 4, expected)
                self.assertLess(expected, 4 * took)


if __name__ == "__main__":
    main()
