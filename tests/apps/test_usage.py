"""The command line itself: help, versions, options that do not exist, folders that are not there."""
import re

from harness import (DATA, GRIMM, INPUT, ROOT, STORIES_260K, TINY, USAGE, TestCase, copy_model, fireq, fireq_json,
                     main, refused)

SUBCOMMANDS = ("quantize", "calibrate", "eval", "inspect", "validate", "generate")


class Help(TestCase):
    def test_every_subcommand_has_help_with_examples(self):
        overview = fireq("--help").out
        for name in SUBCOMMANDS:
            with self.subTest(name):
                self.assertIn(name, overview)
                text = fireq(name, "--help").out
                self.assertRegex(text, rf"fireq {name} \S", "an example")
                for option in ("--json", "--threads", "--quiet", "--help"):
                    self.assertIn(option, text)

    def test_examples_of_the_readme_name_real_options(self):
        """Every long option of a fireq line in README.md is in that subcommand's help."""
        seen = 0
        for line in (ROOT / "README.md").read_text().splitlines():
            words = line.split("#")[0].split()
            if line.startswith("    fireq ") and words[1] in SUBCOMMANDS:
                text = fireq(words[1], "--help").out
                for option in re.findall(r"--[a-z-]+", " ".join(words[2:])):
                    seen += 1
                    self.assertRegex(text, re.escape(option) + r"\b", f"{option} of: {line.strip()}")
        self.assertGreater(seen, 15)

    def test_version_is_the_project_version(self):
        project = re.search(r"project\(fireq VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
        self.assertIn(project, fireq("--version").out)


class Usage(TestCase):
    def test_no_subcommand(self):
        refused(code=USAGE)

    def test_unknown_subcommand_and_option(self):
        refused("quantise", code=USAGE, parts=["quantise"])
        refused("eval", STORIES_260K, "--text", TINY, "--no-such-option", code=USAGE, parts=["--no-such-option"])

    def test_values_out_of_range_or_of_the_wrong_kind(self):
        evaluate = ("eval", STORIES_260K, "--text", TINY, "--max-chars", 5000)
        for extra, part in (
            (("--ctx", "many"), "ctx"), (("--ctx", "0"), "ctx"), (("--ctx", "1"), "ctx"), (("--ctx", "-5"), "ctx"),
            (("--bos", "sometimes"), "bos"), (("--threads", "-1"), "threads"), (("--threads", "x"), "threads"),
            (("--max-chars", "1.5"), "max-chars"), (("--skip-chars", "99999999999999999999"), "skip-chars"),
            (("--kv", "int3"), "kv"), (("--activations", "int8"), "activations"),
        ):
            with self.subTest(extra):
                refused(*evaluate, *extra, code=USAGE, parts=[part])

    def test_context_over_the_models_is_refused(self):
        refused("eval", STORIES_260K, "--text", TINY, "--ctx", 513, code=USAGE, parts=["513", "512"])

    def test_missing_arguments(self):
        refused("quantize", STORIES_260K, code=USAGE, parts=["-o"])
        refused("eval", STORIES_260K, code=USAGE, parts=["--text"])
        refused("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "paper", code=USAGE, parts=["text"])
        self.assert_nothing_published(self.tmp / "out")

    def test_folders_and_files_that_are_not_there(self):
        nowhere = self.tmp / "nowhere"
        refused("eval", nowhere, "--text", TINY, "--quiet", code=USAGE, parts=[nowhere])
        refused("eval", STORIES_260K, "--text", nowhere, "--quiet", code=None, parts=[nowhere])
        refused("quantize", nowhere, "-o", self.tmp / "out", "--preset", "rtn", "--quiet", code=USAGE, parts=[nowhere])
        refused("validate", nowhere, "--quiet", code=USAGE, parts=[nowhere])
        refused("inspect", nowhere, "--quiet", code=None, parts=[nowhere])
        self.assertEqual([], list(self.tmp.iterdir()))

    def test_unknown_preset_and_levels_name_the_known_ones(self):
        refused("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "rnt", "--quiet", code=USAGE,
                parts=["rnt", "rtn", "paper", "fast"])
        refused("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "rtn", "--levels", "nf4", "--quiet",
                code=None, parts=["nf4"])

    def test_preset_and_recipe_exclude_each_other(self):
        (self.tmp / "recipe.json").write_text('{"preset": "rtn"}\n')
        refused("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "rtn", "--recipe",
                self.tmp / "recipe.json", "--quiet", code=USAGE, parts=["recipe"])

    def test_unknown_recipe_key_names_the_nearest(self):
        for text, part in (('{"preset": "rtn", "lambda2_k": 1}', "lambda2_c"), ('{"preset": "rtn", ', "recipe.json"),
                           ('{"preset": "rtn", "lambda2": "yes"}', "lambda2"), ('[]', "recipe.json")):
            with self.subTest(text):
                (self.tmp / "recipe.json").write_text(text)
                refused("quantize", STORIES_260K, "-o", self.tmp / "out", "--recipe", self.tmp / "recipe.json",
                        "--quiet", code=None, parts=[part])
                self.assert_nothing_published(self.tmp / "out")

    def test_json_to_a_folder_that_is_not_there(self):
        refused("eval", STORIES_260K, "--text", TINY, "--max-chars", 5000, "--quiet", "--json",
                self.tmp / "none" / "report.json", code=None, parts=["report.json"])


class Output(TestCase):
    def test_quiet_says_nothing_on_stderr(self):
        result = fireq("eval", STORIES_260K, "--text", TINY, "--max-chars", 5000, "--quiet")
        self.assertEqual("", result.err)

    def test_no_control_characters_without_a_terminal(self):
        result = fireq("eval", STORIES_260K, "--text", TINY, "--max-chars", 5000)
        for text in (result.out, result.err):
            self.assertNotRegex(text, r"[\x00-\x08\x0b-\x1f]")

    def test_names_from_files_cannot_write_to_the_terminal(self):
        model = copy_model(STORIES_260K, self.tmp / "model")
        config = (model / "config.json").read_text().replace("LlamaForCausalLM", "Evil\\u001b[31m\\nName")
        (model / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "ev\\u001bil\\n"'))
        line = refused("eval", model, "--text", TINY, "--quiet", code=INPUT, parts=["config.json"])
        self.assertNotIn("\x1b", line)

    def test_paths_with_spaces_and_unicode(self):
        model = copy_model(STORIES_260K, self.tmp / "mödel with space")
        text = self.tmp / "täxt file.txt"
        text.write_bytes(GRIMM.read_bytes()[:20000])
        self.assertGreater(fireq_json("eval", model, "--text", text)["ppl"], 1)

    def test_same_answer_from_any_folder(self):
        relative = fireq("eval", "models/stories260K", "--text", "text/tinystories_train_head_944k.txt", "--max-chars",
                         "6000", "--quiet", "--threads", "1", cwd=DATA)
        absolute = fireq("eval", STORIES_260K, "--text", TINY, "--max-chars", 6000, "--quiet", "--threads", 2)
        def numbers(text):
            return [n for line in text.splitlines() if "ppl" in line.lower() or "perplex" in line.lower()
                    for n in re.findall(r"\d+\.\d+", line)]
        self.assertTrue(numbers(relative.out))
        self.assertEqual(numbers(relative.out)[0], numbers(absolute.out)[0])


if __name__ == "__main__":
    main()
