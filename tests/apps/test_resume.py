"""Runs that are killed, interrupted, repeated or run twice at once: nothing half-written is ever loadable, and a resumed
run ends byte-identical to one that was left alone."""
import json
import random
import shutil
import signal
import subprocess
import time

from harness import (CALIBRATE_260K, ENVIRONMENT, INPUT, INTERRUPTED, STORIES_15M, STORIES_260K,
                     STORIES_260K_BF16, TINY, TUNE_260K, USAGE, TestCase, digest, fireq, flip, main, refused, start, stop_group)

CALIBRATE_15M = ("--text", TINY, "--skip-chars", 300000, "--max-chars", 12000, "--samples", 8, "--length", 128)


def has_work(partial):
    """Something is finished: statistics, or a layer."""
    try:
        return any(p.is_file() and p.suffix in (".h5", ".safetensors") for p in partial.rglob("*"))
    except FileNotFoundError:
        return False


class Killed(TestCase):
    lengths = {}  # folder -> seconds that its run took

    def partial(self, out):
        return out.with_name(out.name + ".fireq-partial")

    def kill_and_resume(self, seed, model, *args):
        """Kills after random times, again and again, until a resumed run comes through."""
        whole = self.shared / f"whole-{args[1]}-{model.name}"
        if whole not in self.lengths:
            self.lengths[whole] = fireq("quantize", model, "-o", whole, "--quiet", *args).seconds
        length = self.lengths[whole]
        rng = random.Random(seed)
        out = self.tmp / f"out{seed}"
        kills = 0
        mode = ()
        while not out.exists():
            process = start("quantize", model, "-o", out, "--quiet", *args, *mode)
            # Later kills come later, so that it ends.
            try:
                process.wait(timeout=rng.uniform(0, length * (0.5 + 0.3 * kills)))
            except subprocess.TimeoutExpired:
                stop_group(process)
                kills += 1
            _, err = process.communicate()
            self.assertIn(process.returncode, (0, -signal.SIGKILL), err.decode())
            if not out.exists() and self.partial(out).exists():
                self.assert_not_loadable(self.partial(out))
            if out.exists() and self.partial(out).exists():  # killed after the output was complete
                refused("quantize", model, "-o", out, "--quiet", "--resume", *args, code=USAGE, parts=[out, "--force"])
            mode = ("--resume",) if self.partial(out).exists() else ()
        self.assertFalse(self.partial(out).exists())
        self.assert_same_folder(whole, out)
        return kills

    def assert_not_loadable(self, folder):
        for command in (("validate", folder), ("eval", folder, "--text", TINY, "--max-chars", 3000)):
            refused(*command, "--quiet", code=None)

    def test_kill_at_random_moments(self):
        kills = sum(self.kill_and_resume(seed, STORIES_15M, "--preset", "fast", *CALIBRATE_15M) for seed in range(3))
        self.assertGreater(kills, 2, "the kills came too late to test anything")

    def test_kill_a_short_run(self):
        for seed in range(6):
            self.kill_and_resume(seed, STORIES_260K, "--preset", "paper", *CALIBRATE_260K)

    def test_kill_a_run_whose_layers_depend_on_one_another(self):
        """Preset best: each layer is rounded against what the layers before it, already packed, give."""
        kills = sum(self.kill_and_resume(seed, STORIES_260K, "--preset", "best", *CALIBRATE_260K)
                    for seed in range(21, 25))
        self.assertGreater(kills, 1, "the kills came too late to test anything")

    def test_kill_a_run_that_trains_levels(self):
        kills = self.kill_and_resume(31, STORIES_260K, "--levels", "trained", "--preset", "best", *CALIBRATE_260K)
        self.assertGreater(kills, 0, "the kills came too late to test anything")

    def test_kill_a_run_that_tunes_codes(self):
        """When all layers are rounded their codes are tuned together, which a resumed run begins anew."""
        args = (STORIES_260K, *TUNE_260K, "--preset", "best", "--quiet")
        whole, out = self.tmp / "whole", self.tmp / "out"
        fireq("quantize", *args, "-o", whole)
        process = start("quantize", *args, "-o", out)

        def units():
            return {p.stem for p in (self.partial(out) / "units").glob("*.safetensors")}
        while process.poll() is None and "layer-00004" not in units():
            time.sleep(0.005)
        time.sleep(0.02)
        stop_group(process)
        process.communicate()
        self.assertIn("layer-00004", units())
        self.assertNotIn("tuned-layer-00000", units(), "the kill came too late")
        fireq("quantize", *args, "-o", out, "--resume")
        self.assert_same_folder(whole, out)
        kills = sum(self.kill_and_resume(seed, STORIES_260K, *TUNE_260K, "--preset", "best") for seed in (41, 42))
        self.assertGreater(kills, 0, "the kills came too late to test anything")

    def test_resume_after_every_layer(self):
        """The partial folder as it was after each unit, resumed."""
        args = (STORIES_260K, "--preset", "paper", "--threads", 1, *CALIBRATE_260K)
        whole = self.tmp / "whole"
        fireq("quantize", *args, "-o", whole, "--quiet")
        snapshots = {}
        out = self.tmp / "out"
        for _ in range(40):
            process = start("quantize", *args, "-o", out, "--quiet", "--restart")
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if self.partial(out).exists():
                    try:
                        state = tuple(sorted(str(p.relative_to(out.parent)) for p in self.partial(out).rglob("*")))
                    except FileNotFoundError:
                        continue  # it was renamed in the midst
                    if state not in snapshots:
                        process.send_signal(signal.SIGSTOP)
                        copy = self.tmp / f"snapshot{len(snapshots)}"
                        try:
                            shutil.copytree(self.partial(out), copy)
                            snapshots[state] = copy
                        except (shutil.Error, FileNotFoundError):
                            shutil.rmtree(copy, ignore_errors=True)  # it was renamed in the midst
                        process.send_signal(signal.SIGCONT)
            process.communicate()
            self.assertEqual(0, process.returncode)
            shutil.rmtree(out)
            if len(snapshots) >= 8:
                break
        self.assertGreaterEqual(len(snapshots), 3)
        for i, copy in enumerate(snapshots.values()):
            resumed = self.tmp / f"resumed{i}"
            shutil.move(copy, self.partial(resumed))
            fireq("quantize", *args, "-o", resumed, "--resume", "--quiet")
            self.assert_same_folder(whole, resumed)


class Interrupted(TestCase):
    partial = Killed.partial

    def interrupt(self, how, out, *args):
        """Sends the signal once the first layer is done; returns (exit code, stderr)."""
        process = start("quantize", STORIES_15M, "-o", out, *args)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not has_work(self.partial(out)):
            time.sleep(0.002)
        process.send_signal(how)
        _, err = process.communicate(timeout=120)
        return process.returncode, err.decode()

    def test_ctrl_c_and_term_are_resumable(self):
        args = ("--preset", "fast", *CALIBRATE_15M)
        whole = self.quantised("whole", STORIES_15M, *args)
        for how in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(how):
                out = self.tmp / how.name
                code, err = self.interrupt(how, out, *args)
                self.assertEqual(INTERRUPTED, code, err)
                self.assertIn("--resume", err)
                self.assertEqual(1, len([line for line in err.splitlines() if "interrupted" in line]), err)
                self.assert_nothing_published(out)
                fireq("quantize", STORIES_15M, "-o", out, "--resume", "--quiet", *args)
                self.assert_same_folder(whole, out)

    def test_ctrl_c_during_eval(self):
        process = start("eval", STORIES_15M, "--text", TINY, "--max-chars", 400000)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        self.assertEqual(INTERRUPTED, process.returncode, err)


class Modes(TestCase):
    """What is refused, and what --resume, --restart and --force mean."""

    partial = Killed.partial

    def stopped(self, name, *args):
        """A partial folder with some layers done: a run that was interrupted."""
        out = self.tmp / name
        code, err = Interrupted.interrupt(self, signal.SIGINT, out, *args)
        self.assertEqual(INTERRUPTED, code, err)
        self.assertTrue(self.partial(out).exists(), err)
        return out

    def test_existing_output(self):
        out = self.tmp / "out"
        args = ("quantize", STORIES_260K, "-o", out, "--preset", "rtn", "--quiet")
        fireq(*args)
        before = digest(out)
        refused(*args, code=USAGE, parts=[out, "--force"])
        self.assertEqual(before, digest(out))
        fireq(*args, "--force", "--levels", "normal")
        self.assertNotEqual(before, digest(out))
        fireq(*args, "--force")
        self.assertEqual(before, digest(out))
        self.assertEqual([out], list(self.tmp.iterdir()))

    def test_refused_before_the_text_is_read(self):
        """An output that cannot be written is found out before minutes are spent on the text: here the text is not even there."""
        lost = ("--text", self.tmp / "no.txt")
        out = self.tmp / "out"
        refused("quantize", STORIES_15M, "-o", out, *lost, code=USAGE, parts=["no.txt"])
        out.mkdir()
        (out / "mine").write_text("mine")
        refused("quantize", STORIES_15M, "-o", out, *lost, code=USAGE, parts=["output exists", "--force"], absent=["no.txt"])
        refused("quantize", STORIES_15M, "-o", out, *lost, "--force", code=USAGE, parts=["no FireQ folder"], absent=["no.txt"])
        refused("quantize", STORIES_15M, "-o", STORIES_15M / "inside", *lost, code=USAGE, parts=["inside the input"], absent=["no.txt"])
        refused("quantize", STORIES_15M, "-o", out, *lost, "--dry-run", code=USAGE, parts=["no.txt"])  # writes nothing
        stopped = self.stopped("stopped", "--preset", "fast", *CALIBRATE_15M)
        before = digest(self.partial(stopped))
        refused("quantize", STORIES_15M, "-o", stopped, *lost, code=USAGE, parts=["unfinished output"], absent=["no.txt"])
        refused("quantize", STORIES_15M, "-o", stopped, "--resume", *lost, code=USAGE, parts=["no.txt"])
        self.assertEqual(before, digest(self.partial(stopped)))
        self.assertEqual(["mine"], [p.name for p in out.iterdir()])

    def test_existing_output_is_kept_until_the_new_one_is_whole(self):
        out = self.tmp / "out"
        fireq("quantize", STORIES_15M, "-o", out, "--preset", "rtn", "--quiet")
        before = digest(out)
        args = ("--preset", "fast", "--force", *CALIBRATE_15M)
        code, err = Interrupted.interrupt(self, signal.SIGINT, out, *args)
        self.assertEqual(INTERRUPTED, code, err)
        self.assertEqual(before, digest(out))
        fireq("quantize", STORIES_15M, "-o", out, "--resume", "--quiet", *args)
        self.assertNotEqual(before, digest(out))
        fireq("validate", out, "--quiet")

    def test_an_output_that_is_a_file_or_not_ours(self):
        out = self.tmp / "out"
        out.write_text("mine")
        refused("quantize", STORIES_260K, "-o", out, "--preset", "rtn", "--quiet", code=USAGE, parts=[out])
        self.assertEqual("mine", out.read_text())
        refused("quantize", STORIES_260K, "-o", self.tmp / "no" / "such" / "parent", "--preset", "rtn", "--quiet",
                code=USAGE, parts=["no/such", "does not exist"])

    def test_partial_folder_needs_a_decision(self):
        args = ("--preset", "fast", *CALIBRATE_15M)
        out = self.stopped("out", *args)
        before = digest(self.partial(out))
        line = refused("quantize", STORIES_15M, "-o", out, "--quiet", *args, code=USAGE, parts=["--resume", "--restart"])
        self.assertIn("fireq-partial", line)
        self.assertEqual(before, digest(self.partial(out)))
        fireq("quantize", STORIES_15M, "-o", out, "--restart", "--quiet", *args)
        self.assert_same_folder(self.quantised("whole", STORIES_15M, *args), out)
        refused("quantize", STORIES_15M, "-o", out, "--resume", "--restart", "--quiet", *args, code=USAGE)

    def test_resume_with_another_model_text_or_recipe(self):
        args = ("--preset", "fast", *CALIBRATE_15M)
        out = self.stopped("out", *args)
        before = digest(self.partial(out))
        other_text = [*CALIBRATE_15M]
        other_text[other_text.index("--skip-chars") + 1] = 310000
        for model, changed, word in (
            (STORIES_260K, ("--preset", "fast", *CALIBRATE_260K), "model"),
            (STORIES_15M, ("--preset", "fast", *other_text), "text"),
            (STORIES_15M, ("--preset", "paper", *CALIBRATE_15M), "recipe"),
            (STORIES_15M, ("--preset", "fast", *CALIBRATE_15M, "--levels", "int4"), "recipe"),
        ):
            with self.subTest(word=word, changed=changed):
                refused("quantize", model, "-o", out, "--resume", "--quiet", *changed, code=INPUT, parts=[word])
                self.assertEqual(before, digest(self.partial(out)))
        fireq("quantize", STORIES_15M, "-o", out, "--resume", "--quiet", *args)
        self.assert_same_folder(self.quantised("whole", STORIES_15M, *args), out)

    def test_resume_with_other_threads_and_shards(self):
        args = ("--preset", "fast", *CALIBRATE_15M)
        out = self.stopped("out", *args, "--threads", 1)
        fireq("quantize", STORIES_15M, "-o", out, "--resume", "--quiet", "--threads", 2, *args)
        self.assert_same_folder(self.quantised("whole", STORIES_15M, *args), out)

    def test_resume_with_nothing_to_resume(self):
        out = self.tmp / "out"
        fireq("quantize", STORIES_260K, "-o", out, "--preset", "rtn", "--resume", "--quiet")
        self.assert_same_folder(self.quantised("rtn", STORIES_260K, "--preset", "rtn"), out)

    def test_a_damaged_partial_never_becomes_a_wrong_folder(self):
        args = ("--preset", "fast", *CALIBRATE_15M)
        out = self.stopped("out", *args)
        keep = self.tmp / "keep"
        shutil.copytree(self.partial(out), keep)
        whole = self.quantised("whole", STORIES_15M, *args)
        rng = random.Random(11)
        files = [p for p in sorted(keep.rglob("*")) if p.is_file() and p.stat().st_size > 0]
        self.assertTrue(files)
        for path in files:
            for kind in ("flip", "cut", "empty"):
                with self.subTest(file=path.name, kind=kind):
                    for folder in (self.partial(out), out):
                        shutil.rmtree(folder, ignore_errors=True)
                    shutil.copytree(keep, self.partial(out))
                    victim = self.partial(out) / path.relative_to(keep)
                    if kind == "flip":
                        flip(victim, rng.randrange(victim.stat().st_size), rng.randrange(8))
                    else:
                        with open(victim, "r+b") as f:
                            f.truncate(victim.stat().st_size - 1 if kind == "cut" else 0)
                    result = fireq("quantize", STORIES_15M, "-o", out, "--resume", "--quiet", *args, code=None)
                    if result.code == 0:
                        self.assert_same_folder(whole, out)
                    else:
                        self.assertIn(result.code, (INPUT, ENVIRONMENT), result)
                        self.assert_nothing_published(out)

    def test_two_runs_into_one_folder(self):
        out = self.tmp / "out"
        args = ("--preset", "fast", *CALIBRATE_15M)
        first = start("quantize", STORIES_15M, "-o", out, "--quiet", *args)
        # The folder is made before the lock is taken, what it holds after: stopped between the two, the first run
        # would rightly lose to the second.
        while first.poll() is None and not (self.partial(out) / "units").exists():
            time.sleep(0.002)
        self.assertIsNone(first.poll(), "the first run ended too soon")
        first.send_signal(signal.SIGSTOP)
        try:
            for mode in ("--resume", "--restart"):
                refused("quantize", STORIES_15M, "-o", out, "--quiet", mode, *args, code=ENVIRONMENT, parts=["another"])
        finally:
            first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=300)
        self.assertEqual(0, first.returncode, err)
        self.assert_same_folder(self.quantised("whole", STORIES_15M, *args), out)

    def test_many_runs_at_once(self):
        """Started together: whoever wins publishes the right bytes, the others say why they do not."""
        out = self.tmp / "out"
        args = ("--preset", "paper", *CALIBRATE_260K)
        runs = [start("quantize", STORIES_260K, "-o", out, "--quiet", *args) for _ in range(6)]
        codes = [(run.communicate(timeout=120)[1], run.returncode)[1] for run in runs]
        self.assertIn(0, codes)
        self.assertLessEqual(set(codes), {0, USAGE, ENVIRONMENT}, codes)
        self.assertEqual(1, codes.count(0))
        self.assert_same_folder(self.quantised("paper", STORIES_260K, *args), out)

    def test_another_model_of_the_same_shape_is_another_model(self):
        out = self.tmp / "out"
        partial = self.partial(out)
        args = ("--preset", "paper", *CALIBRATE_260K)
        process = start("quantize", STORIES_260K, "-o", out, "--quiet", *args)
        while process.poll() is None and not has_work(partial):
            pass
        stop_group(process)
        process.communicate()
        if not partial.exists():
            self.skipTest("the run was over before it could be killed")
        refused("quantize", STORIES_260K_BF16, "-o", out, "--resume", "--quiet", *args, code=INPUT, parts=["model"])
        fireq("quantize", STORIES_260K, "-o", out, "--resume", "--quiet", *args)
        self.assert_same_folder(self.quantised("paper", STORIES_260K, *args), out)


class Json(TestCase):
    def test_a_resumed_run_says_so(self):
        out = self.tmp / "out"
        args = ("--preset", "fast", *CALIBRATE_15M)
        partial = out.with_name("out.fireq-partial")
        process = start("quantize", STORIES_15M, "-o", out, "--quiet", *args)
        while process.poll() is None and len(list(partial.rglob("*layer*")) if partial.exists() else []) < 3:
            time.sleep(0.001)
        stop_group(process)
        process.communicate()
        self.assertTrue(partial.exists())
        report = self.tmp / "report.json"
        fireq("quantize", STORIES_15M, "-o", out, "--resume", "--quiet", "--json", report, *args)
        self.assertGreater(json.loads(report.read_text())["resumed_layers"], 0)


if __name__ == "__main__":
    main()
