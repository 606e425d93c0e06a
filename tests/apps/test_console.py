"""What a terminal sees and what a pipe sees: colour, the progress bar, NO_COLOR; warnings summed up at the end."""
import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time

import export_models as em
from harness import (STORIES_15M, STORIES_260K, TINY, USAGE, TestCase, arguments, environment, fireq, fireq_json, main, read_tensors,
                     write_safetensors)

COLOUR = re.compile(rb"\x1b\[(\d+(;\d+)*)?m")
BAR = re.compile(rb"\revaluate +\[#*\.*\] +\d+ % +[^\n]*\x1b\[K")
ESCAPE = b"\x1b"


class Terminal:
    """fireq with stdout or stderr, or both, on pseudo-terminals of their own; the others are pipes."""

    def __init__(self, *args, terminals=("err",), env=None):
        self.seen, self._read, close = {"out": b"", "err": b""}, {}, []
        ends = {}
        for name in ("out", "err"):
            self._read[name], ends[name] = pty.openpty() if name in terminals else os.pipe()
            close.append(ends[name])
        base = {key: value for key, value in environment({"TERM": "xterm"}).items() if key != "NO_COLOR"}
        self.process = subprocess.Popen(arguments(args), stdin=subprocess.DEVNULL, stdout=ends["out"], stderr=ends["err"],
                                        env=base | (env or {}), start_new_session=True)
        for descriptor in close:
            os.close(descriptor)

    def wait(self, until=lambda seen: False, seconds=300):
        """Reads until both ends are closed, or until until(seen). Returns the exit code, None while it runs."""
        deadline = time.monotonic() + seconds
        while self._read and not until(self.seen):
            assert time.monotonic() < deadline, self.seen
            for descriptor in select.select(list(self._read.values()), [], [], 1)[0]:
                name = next(n for n, d in self._read.items() if d == descriptor)
                data = b""
                with contextlib.suppress(OSError):  # a terminal whose program has gone
                    data = os.read(descriptor, 65536)
                self.seen[name] += data
                if not data:
                    os.close(self._read.pop(name))
        return None if self._read else self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.wait()


class Console(TestCase):
    def run_in(self, *args, **kw):
        terminal = Terminal(*args, **kw)
        return terminal.wait(), terminal.seen["out"], terminal.seen["err"]

    WARNS = ("eval", STORIES_260K, "--text", TINY, "--max-chars", 3000, "--ctx", 513)
    REFUSED = ("eval", STORIES_260K, "--text", "/nowhere/text.txt")

    def test_colour_only_on_a_terminal(self):
        code, out, err = self.run_in(*self.WARNS)
        self.assertEqual(0, code)
        self.assertRegex(err, rb"fireq: \x1b\[33mwarning:\x1b\[0m ")
        self.assertRegex(err, rb"fireq: \x1b\[33m1 warning\x1b\[0m: ")
        self.assertNotIn(ESCAPE, out)  # stdout is a pipe
        code, _, err = self.run_in(*self.REFUSED)
        self.assertEqual(USAGE, code)
        self.assertRegex(err, rb"fireq: \x1b\[31merror:\x1b\[0m ")
        # stderr alone is no terminal: nothing of a colour there.
        for command in (self.WARNS, self.REFUSED):
            _, out, err = self.run_in(*command, terminals=("out",))
            self.assertIn(b"fireq: ", err)
            self.assertNotIn(ESCAPE, out + err)
        # The other way round: doctor's verdicts are on stdout.
        _, out, err = self.run_in("doctor", terminals=("out",))
        self.assertRegex(out, COLOUR)
        self.assertNotIn(ESCAPE, err)
        _, out, _ = self.run_in("doctor", terminals=("err",))
        self.assertGreater(len(out), 100)
        self.assertNotIn(ESCAPE, out)

    def test_no_color_and_dumb_terminals(self):
        for env, colours in (({"NO_COLOR": "1"}, False), ({"NO_COLOR": "0"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)):
            with self.subTest(env):
                code, _, err = self.run_in(*self.WARNS, env=env)
                self.assertEqual(0, code)
                self.assertIn(b"warning:", err)
                self.assertEqual(colours, COLOUR.search(err) is not None, err)
                _, out, _ = self.run_in("doctor", env=env, terminals=("out", "err"))
                self.assertEqual(colours, COLOUR.search(out) is not None, out)

    def long(self, **kw):
        """Work that lasts until it is stopped: everything read until a bar or a line of progress is there."""
        terminal = Terminal("eval", STORIES_15M, "--text", TINY, "--ctx", 128, "--threads", 1, **kw)
        terminal.wait(lambda seen: seen["err"].count(b"%") >= 1)
        code = terminal.stop()
        self.assertEqual(130, code, terminal.seen)
        return terminal.seen["err"]

    def test_the_bar_only_on_a_terminal(self):
        err = self.long()
        self.assertRegex(err, BAR)
        self.assertRegex(err, rb"\d (s|min) left\x1b\[K")
        plain = self.long(terminals=())
        self.assertNotIn(ESCAPE, plain)
        self.assertNotIn(b"\r", plain)
        self.assertRegex(plain, rb"(?m)^evaluate: \d+ of \d+ \(\d+ %\), .*\d (s|min) left$")

    def test_the_bar_without_colour(self):
        err = self.long(env={"NO_COLOR": "1"})
        self.assertRegex(err, BAR)
        self.assertNotRegex(err, COLOUR)
        dumb = self.long(env={"TERM": "dumb"})
        self.assertNotIn(ESCAPE, dumb)
        self.assertRegex(dumb, rb"(?m)^evaluate: \d+ of \d+ \(\d+ %\), .*\d (s|min) left\r?$")

    def test_quiet_draws_nothing(self):
        code, out, err = self.run_in(*self.WARNS, "--quiet", terminals=("out", "err"))
        self.assertEqual((0, b""), (code, out))
        self.assertRegex(err, rb"^fireq: [^\n]*warning:[^\n]*\n$")


class Warnings(TestCase):
    """Each is a line when it comes; all are summed up in the last line, and are in --json."""

    def exported(self):
        """(model's folder, arguments of an export that warns three times)."""
        model, packed = self.tmp / "model", self.tmp / "packed"
        em.random_llama(model, 41, awkward=False, ffn=320)
        path = self.tmp / "recipe.json"
        path.write_text('{"preset": "rtn", "keys": {"n": true, "s": true}, "kv_cache": true}')
        tokens = em.random_tokens(self.tmp / "ids.u32", 42, 600, 384)
        fireq("quantize", model, "-o", packed, "--recipe", path, "--tokens", tokens, "--samples", 4, "--length", 64, "--quiet")
        return ("export", packed, "-o", self.tmp / "out", "--format", "compressed-tensors", "--requantize")

    def test_summed_up_at_the_end(self):
        command = self.exported()
        result = fireq(*command)
        lines = result.err.splitlines()
        single = [line.removeprefix("fireq: warning: ") for line in lines if line.startswith("fireq: warning: ")]
        self.assertGreaterEqual(len(single), 3, result)
        last = re.fullmatch(r"fireq: (\d+) warnings: (.*)", lines[-1])
        self.assertEqual(len(single), int(last.group(1)))
        for text in single[:3]:
            self.assertIn(text[:60], last.group(2))
        self.assertEqual(len(lines), len(single) + 1)
        shutil.rmtree(self.tmp / "out")
        report = fireq_json(*command)
        self.assertEqual((len(single), single), (report["warnings"], report["warning_lines"]))
        shutil.rmtree(self.tmp / "out")
        self.assertEqual(len(single), len(fireq(*command, "--quiet").err.splitlines()))

    def test_many_are_counted(self):
        """A per-tensor scale cuts large weights off: a warning for each linear."""
        model = self.tmp / "large"
        em.random_llama(model, 43, awkward=False, layers=1)
        tensors = read_tensors(model)
        for name, (_, bits) in list(tensors.items()):
            if "proj" in name:
                large = em.from_bits(bits).copy()
                large[0, 0] = 1000
                tensors[name] = ("BF16", em.bf16_bits(large))
        write_safetensors(model / "model.safetensors", tensors)
        path = self.tmp / "recipe.json"
        path.write_text('{"preset": "rtn", "weights": {"row_scale": "tensor"}}')
        result = fireq("quantize", model, "-o", self.tmp / "out", "--recipe", path)
        self.assertRegex(result.err.splitlines()[-1], r"^fireq: 7 warnings: .*; .*; .*; and 4 more$")

    def test_names_from_files_and_long_ones(self):
        """A hostile name is shown as escapes; the sum cuts between characters of UTF-8, not within one."""
        model = self.tmp / "model"
        em.random_llama(model, 44, awkward=False, layers=1)
        tensors = read_tensors(model)
        for name in ("\x1b[31m", "é" * 40):
            tensors[f"model.layers.0.{name}.rotary_emb.inv_freq"] = tensors["model.norm.weight"]
        write_safetensors(model / "model.safetensors", tensors)
        result = fireq("quantize", model, "-o", self.tmp / "out", "--preset", "rtn")
        self.assertNotIn("\x1b", result.err)
        self.assertIn("model.layers.0.\\x1b[31m.rotary_emb.inv_freq: dropped", result.err)
        self.assertRegex(result.err.splitlines()[-1], r"^fireq: 2 warnings: .*model\.layers\.0\.é+\.\.\..*$")
        self.assertNotIn("\ufffd", result.err)

    def test_none_and_after_an_error(self):
        quiet = fireq("eval", STORIES_260K, "--text", TINY, "--max-chars", 3000)
        self.assertNotIn("warning", quiet.err)
        report = fireq_json("eval", STORIES_260K, "--text", TINY, "--max-chars", 3000)
        self.assertEqual((0, []), (report["warnings"], report["warning_lines"]))
        # The error stays the last line.
        failed = fireq("calibrate", STORIES_260K, "-o", self.tmp / "no/where.h5", "--text", TINY, "--max-chars", 3000, "--length", 100000,
                       code=None)
        self.assertIn("warning:", failed.err)
        self.assertNotEqual(0, failed.code)
        self.assertRegex(failed.err.splitlines()[-1], "^fireq: error: ")


if __name__ == "__main__":
    main()
