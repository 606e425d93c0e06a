"""docs/errors/: a page for every exit code that the program names, no other pages, and examples that it really prints."""
import re
import shutil
import signal
import subprocess
import time

from harness import (FIREQ, ROOT, STORIES_15M, STORIES_260K, TINY, TestCase, copy_model, environment, fireq, main, start)

PAGES = ROOT / "docs/errors"


def examples(page):
    """(command, line) of each pair of indented lines."""
    text = page.read_text()
    found = re.findall(r"^    \$ (.*)\n    (fireq: error: .*)$", text, re.M)
    assert len(found) == text.count("    $ "), f"{page.name}: a command without its line"
    return found


class Pages(TestCase):
    def codes(self):
        footer = fireq("--help").out.split("Exit codes:")[1]
        return {int(code): name for code, name in re.findall(r"(\d+) ([a-z ]+)", " ".join(footer.split()))}

    def test_a_page_for_every_code_and_no_other(self):
        codes = self.codes()
        header = (ROOT / "common/error.hpp").read_text()
        kinds = {int(code): name for name, code in re.findall(r"^  (\w+) = (\d+),?", header, re.M)}
        self.assertEqual(set(codes) - {0}, set(kinds))
        self.assertEqual(sorted(f"{code}-{name}.md" for code, name in kinds.items()), sorted(p.name for p in PAGES.iterdir()))
        table = (ROOT / "docs/errors.md").read_text()
        for code, name in kinds.items():
            self.assertIn(f"errors/{code}-{name}.md", table)
            text = (PAGES / f"{code}-{name}.md").read_text()
            self.assertTrue(text.startswith(f"# Exit code {code}: "))
            self.assertIn("**What to do.**", text)
            self.assertEqual(code == 5, not examples(PAGES / f"{code}-{name}.md"))

    def test_the_examples_are_what_the_program_prints(self):
        model = copy_model(STORIES_260K, self.tmp / "MODEL")
        fireq("quantize", model, "-o", self.tmp / "OUT", "--preset", "rtn", "--quiet")
        (self.tmp / "short.txt").write_text("Once upon a time.")
        half = copy_model(STORIES_260K, self.tmp / "HALF")
        (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:200000])
        seen = 0
        for page in sorted(PAGES.iterdir()):
            for command, line in examples(page):
                if page.name.startswith("130"):
                    continue
                with self.subTest(command):
                    seen += 1
                    done = subprocess.run(["bash", "-c", command], cwd=self.tmp, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                          env=environment({"PATH": f"{FIREQ.resolve().parent}:/usr/bin:/bin"}), text=True,
                                          stderr=subprocess.PIPE)
                    self.assertEqual(line + "\n", done.stderr)
                    self.assertEqual(int(page.name.split("-")[0]), done.returncode)
        self.assertGreaterEqual(seen, 7)

    def test_the_interrupted_one(self):
        (command, line), = examples(PAGES / "130-interrupted.md")
        (self.tmp / "MODEL").symlink_to(STORIES_15M.resolve())
        shutil.copy(TINY, self.tmp / "stories.txt")
        process = start(*command.split()[1:], "--quiet", cwd=self.tmp)
        end = time.monotonic() + 120
        while not (self.tmp / "BEST.fireq-partial").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
        self.assertEqual((130, line + "\n"), (process.returncode, said.decode()))
        self.assertFalse((self.tmp / "BEST").exists())


if __name__ == "__main__":
    main()
