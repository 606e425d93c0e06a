"""A disk that fills up, in the midst of a run, on a small tmpfs (needs the right to mount)."""
from harness import (CALIBRATE_260K, ENVIRONMENT, STORIES_15M, STORIES_260K, TestCase, fireq, main, refused, tmpfs)


class DiskFull(TestCase):
    def test_enospc_then_resume(self):
        whole = self.quantised("whole", STORIES_15M, "--preset", "rtn")
        total = sum(p.stat().st_size for p in whole.iterdir())
        with tmpfs(total * 3, self.tmp / "disk") as disk:
            out = disk / "out"
            # Leave room for a share of the output only; free it afterwards and go on.
            for share in (0.02, 0.3, 0.7, 0.95, 1.1):
                with self.subTest(share):
                    ballast = disk / "ballast"
                    ballast.write_bytes(b"\0" * int(total * (3 - share)))
                    result = fireq("quantize", STORIES_15M, "-o", out, "--preset", "rtn", "--resume", "--quiet",
                                   code=None)
                    ballast.unlink()
                    if result.code != 0:
                        self.assertEqual(ENVIRONMENT, result.code, result)
                        lines = result.err.splitlines()
                        self.assertEqual(1, len(lines), result)
                        self.assertIn("No space left", lines[0])
                        self.assertIn(str(disk), lines[0])
                        self.assert_nothing_published(out)
            if not out.exists():
                fireq("quantize", STORIES_15M, "-o", out, "--preset", "rtn", "--resume", "--quiet")
            self.assert_same_folder(whole, out)

    def test_full_from_the_start(self):
        with tmpfs(1 << 20, self.tmp / "disk") as disk:
            ballast = disk / "ballast"
            try:
                ballast.write_bytes(b"\0" * (2 << 20))
            except OSError:
                pass
            refused("quantize", STORIES_260K, "-o", disk / "out", "--preset", "paper", "--quiet", *CALIBRATE_260K,
                    code=ENVIRONMENT, parts=["no space"])
            self.assert_nothing_published(disk / "out")

    def test_reports_and_statistics(self):
        with tmpfs(64 << 10, self.tmp / "disk") as disk:
            refused("calibrate", STORIES_260K, "-o", disk / "stats.h5", "--quiet", *CALIBRATE_260K, code=ENVIRONMENT,
                    parts=["stats.h5"])
            self.assertFalse((disk / "stats.h5").exists())
            self.assertEqual([], [p.name for p in disk.iterdir()], "no temporary file is left")


if __name__ == "__main__":
    main()
