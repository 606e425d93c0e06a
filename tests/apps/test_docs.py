"""The commands in README.md and docs/ do what the page says: they run."""
import re
import shlex
import shutil
import subprocess

from harness import (DATA, ENVIRONMENT, FIREQ, GRIMM, ROOT, STORIES_260K, TINY, TOLERANCE, USAGE, WIKI, TestCase, copy_model,
                     edit_json, environment, main)


def commands(page, first):
    """Indented lines that begin with one of the words `first`, without their comments."""
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("    ") and line.split()[:1] and line.split()[0] in first:
            yield re.split(r"  +#| #", line.strip())[0].strip()


class Docs(TestCase):
    def shell(self, command, cwd):
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=cwd, env=environment({"PATH": f"{FIREQ.resolve().parent}:/usr/bin:/bin"}),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        return done.returncode, done.stdout

    def test_the_first_ten_minutes(self):
        """In order, in a folder that looks like a clone after the quickstart."""
        (self.tmp / "build").mkdir()
        (self.tmp / "build/data").symlink_to(DATA.resolve())
        script = "\n".join(commands("docs/first-ten-minutes.md", ("export", "mkdir", "ln", "fireq")))
        self.assertGreater(script.count("fireq "), 10)
        if "without: HTML report" in self.shell("fireq --version", self.tmp)[1]:
            script = re.sub(r"^fireq inspect .*--html.*$", "true", script, flags=re.M)
        code, said = self.shell(script, self.tmp)
        self.assertEqual(code, 0, said[-3000:])
        for name in ("stats.h5", "packed/config.json", "plain/config.json", "cost.json"):
            self.assertTrue((self.tmp / "build/tour" / name).exists(), name)

    def test_every_other_command(self):
        """README.md and the pages, with MODEL, OUT and the texts that they speak of; outputs may exist already."""
        model = copy_model(STORIES_260K, self.tmp / "MODEL")
        edit_json(model / "config.json", lambda c: c.update(max_position_embeddings=4096))  # as long as the pages' windows
        short = self.tmp / "calibration.txt"
        short.write_text(TINY.read_text()[:60000])
        for name, source in (("a.txt", TINY), ("b.txt", GRIMM), ("wiki.test.raw", WIKI), ("test.txt", WIKI)):
            (self.tmp / name).write_text(source.read_text()[:60000])
        (self.tmp / "questions.jsonl").write_text('{"query": "Once upon a", "choices": ["time", "cat"], "gold": 0}')
        (self.tmp / "recipe.json").write_text('{"preset": "rtn"}')
        pages = ["README.md"] + sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md") if p.name != "first-ten-minutes.md")
        self.shell("fireq quantize MODEL -o OUT2 --preset rtn", self.tmp)  # the other of the two that are compared
        seen = 0
        for page in pages:
            for line in commands(page, ("fireq",)):
                words = shlex.split(line)
                if len(words) < 2 or words[1] == "error:" or any(w in ("…", "...") for w in words):
                    continue
                if words[1] == "quantize":
                    line += " --force"  # a page shows several ways to the same OUT
                    if "--resume" not in words:
                        line += " --restart"
                    if "--text" in words and "--samples" not in words:
                        line += " --samples 2"  # the best preset, the default with text, takes its time
                if words[1] == "export":
                    shutil.rmtree(self.tmp / words[words.index("-o") + 1], ignore_errors=True)
                if words[1] == "inspect" and words[2].endswith(".h5") and not (self.tmp / words[2]).exists():
                    self.shell(f"fireq calibrate MODEL --text a.txt -o {words[2]}", self.tmp)
                with self.subTest(page=page, line=line):
                    seen += 1
                    code, said = self.shell(line, self.tmp)
                    if "--chat" in words:  # the model has no template, and says so
                        self.assertIn("chat", said)
                    elif "--device" in words and code == ENVIRONMENT:  # no GPU, or a build without CUDA
                        self.assertRegex(said, "CUDA|GPU")
                    elif "compressed-tensors" in words and code == USAGE:  # none of the small model's linears fits
                        self.assertIn("multiples of 128", said)
                    elif "--exit-code" in words:  # OUT and OUT2 differ
                        self.assertEqual(code, TOLERANCE, said[-2000:])
                    elif "no HTML report" not in said:
                        self.assertEqual(code, 0, said[-2000:])
        self.assertGreater(seen, 20)


if __name__ == "__main__":
    main()
