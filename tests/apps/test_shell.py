"""Completion scripts and the manual page: made by the command, understood by the shells and by man."""
import re
import shutil
import subprocess

from harness import USAGE, TestCase, fireq, main, refused


class Completion(TestCase):
    def script(self, shell):
        path = self.tmp / f"fireq.{shell}"
        path.write_text(fireq("completion", shell).out)
        return path

    def run_shell(self, *command):
        done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.tmp)
        self.assertEqual((done.returncode, done.stderr), (0, ""), command)
        return done.stdout.split()

    def commands(self):
        """Every subcommand -> the options at the heads of lines of its help."""
        names = re.findall(r"^  ([a-z]+) {2,}", fireq("--help").out.split("SUBCOMMANDS:")[-1], re.M)
        self.assertLessEqual({"quantize", "calibrate", "eval", "validate", "inspect", "export", "generate", "diff", "doctor"}, set(names))
        found = {name: set(re.findall(r"^ +(?:-\w,)? *(--[a-z0-9-]+)", fireq(name, "--help").out, re.M)) for name in names}
        self.assertLessEqual({"--no-measure", "--target-size", "--dry-run", "--help"}, found["quantize"])
        return found

    def test_bash(self):
        script = self.script("bash")
        (self.tmp / "a model").mkdir()

        def complete(*words):
            array = " ".join(f"'{w}'" for w in words)
            return self.run_shell("bash", "--norc", "-c", f"source {script}; COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; "
                                  "_fireq; printf '%s\\n' \"${COMPREPLY[@]}\"")

        self.assertEqual(complete("fireq", "qu"), ["quantize"])
        self.assertEqual(complete("fireq", "quantize", "--preset", ""), ["rtn", "paper", "fast", "best"])
        self.assertEqual(complete("fireq", "eval", "m", "--kv", "i"), ["int4"])
        self.assertEqual(set(complete("fireq", "validate", "--")) & {"--reference", "--json", "--preset"}, {"--reference", "--json"})
        self.assertEqual(complete("fireq", "eval", "a"), ["a", "model"])  # one folder with a space in its name
        for name, options in self.commands().items():
            self.assertEqual(options, {w for w in complete("fireq", name, "--") if w.startswith("--")}, name)
        self.assertEqual(set(self.commands()) | {"--help", "--version"}, set(complete("fireq", "")))

    def test_zsh(self):
        if not shutil.which("zsh"):
            self.skipTest("zsh was not found")
        script = self.script("zsh")
        self.run_shell("zsh", "-f", "-n", script)
        # Loaded as completion functions are, it must say nothing and define itself.
        folder = self.tmp / "functions"
        folder.mkdir()
        shutil.copy(script, folder / "_fireq")
        said = self.run_shell("zsh", "-f", "-c", f"fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -d {self.tmp}/dump; "
                              "print ${_comps[fireq]}")
        self.assertEqual(said, ["_fireq"])
        # What it would offer: _arguments takes each option as '--name[...' and each command's as a branch of a case.
        text = script.read_text()
        for name, options in self.commands().items():
            branch = re.search(rf"(?ms)^ *{name}\).*?;;", text)
            self.assertIsNotNone(branch, name)
            self.assertEqual(options, set(re.findall(r"(--[a-z0-9-]+)(?=[\[=:'\"{}*+])", branch.group())), name)

    def test_fish(self):
        if not shutil.which("fish"):
            self.skipTest("fish was not found")
        script = self.script("fish")

        def complete(line):
            text = self.run_shell("fish", "--no-config", "-c", f"source {script}; complete -C '{line}' | string split -f 1 \\t")
            return set(text)

        self.assertIn("quantize", complete("fireq "))
        self.assertEqual(complete("fireq quantize --preset "), {"rtn", "paper", "fast", "best"})
        for name, options in self.commands().items():
            self.assertEqual(options, {w for w in complete(f"fireq {name} --") if w.startswith("--")}, name)

    def test_unknown_shell(self):
        refused("completion", "tcsh", code=USAGE, parts=["tcsh", "bash"])

    def test_manual_page(self):
        page = fireq("manual").out
        for name, options in self.commands().items():
            section = page.split(f"fireq {name}", 1)[1]
            for option in options:
                self.assertIn(option.replace("-", "\\-"), section, name)
        if not shutil.which("man"):
            self.skipTest("man was not found")
        path = self.tmp / "fireq.1"
        path.write_text(page)
        done = subprocess.run(["man", "--warnings", "-l", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "100"})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("fireq eval out --text test.txt --kv fp", done.stdout)


if __name__ == "__main__":
    main()
