"""The command line itself: help, versions, options that do not exist, folders that are not there."""
import json
import re
import shutil
import subprocess

from harness import (CALIBRATE_260K, DATA, ENVIRONMENT, GRIMM, INPUT, ROOT, STORIES_15M, STORIES_260K, TINY, USAGE,
                     TestCase, arguments, copy_model, environment, fireq, fireq_json, has_gpu, main, parse_json, refused)

SUBCOMMANDS = ("quantize", "calibrate", "eval", "inspect", "validate", "generate", "export", "doctor", "diff")


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
        for word, nearest in (("quantise", "quantize"), ("evaluate", "eval"), ("chat", "calibrate")):
            line = refused(word, STORIES_260K, "--text", TINY, code=USAGE, parts=[f"'{word}'", "did you mean", "--help"])
            for name in SUBCOMMANDS:
                self.assertIn(name, line)
            if word != "chat":
                self.assertIn(f"did you mean '{nearest}'", line)
        refused("eval", STORIES_260K, "--text", TINY, "--no-such-option", code=USAGE, parts=["--no-such-option"])

    def test_values_out_of_range_or_of_the_wrong_kind(self):
        evaluate = ("eval", STORIES_260K, "--text", TINY, "--max-chars", 5000)
        for extra, part in (
            (("--ctx", "many"), "ctx"), (("--ctx", "2.5"), "ctx"), (("--ctx", ""), "ctx"), (("--ctx", "0"), "ctx"), (("--ctx", "1"), "ctx"), (("--ctx", "-5"), "ctx"),
            (("--bos", "sometimes"), "bos"), (("--threads", "-1"), "threads"), (("--threads", "x"), "threads"),
            (("--max-chars", "1.5"), "max-chars"), (("--skip-chars", "99999999999999999999"), "skip-chars"),
            (("--kv", "int3"), "kv"), (("--activations", "int8"), "activations"),
        ):
            with self.subTest(extra):
                refused(*evaluate, *extra, code=USAGE, parts=[part])

    def test_numbers_that_would_wrap_around(self):
        """Every option that takes a whole number: refused with its name and the value as it was given."""
        seen = 0
        quantize = ("quantize", STORIES_260K, "-o", self.tmp / "out", "--text", TINY)
        for command in (quantize, ("calibrate", STORIES_260K, "-o", self.tmp / "x.h5", "--text", TINY),
                        ("eval", STORIES_260K, "--text", TINY), ("validate", STORIES_260K),
                        ("inspect", STORIES_260K), ("generate", STORIES_260K, "-p", "Once")):
            text = fireq(command[0], "--help").out
            options = re.findall(r"(--[a-z-]+) (?:UINT|INT|UINT:[^ ]*|INT:[^ ]*)\b", text)
            self.assertIn("--threads", options)
            for option in options:
                for value in ("-3", "99999999999999999999", "18446744073709551617", "0x10", "1e3"):
                    with self.subTest(command=command[0], option=option, value=value):
                        seen += 1
                        refused(*command, option, value, "--quiet", code=USAGE, parts=[option, f"'{value}'"])
        self.assertGreater(seen, 5 * 20)
        self.assertEqual([], list(self.tmp.iterdir()))

    def test_devices(self):
        """What --device refuses before it looks for a GPU, and what it says when there is none."""
        packed = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        evaluate = ("--text", TINY, "--max-chars", 3000, "--ctx", 64, "--quiet")
        for command in (("eval", packed, *evaluate), ("validate", packed, "--quiet")):
            refused(*command, "--device", "tpu", code=USAGE, parts=["--device", "tpu", "cpu", "cuda"])
        refused("eval", STORIES_260K, *evaluate, "--device", "cuda", code=USAGE,
                parts=["--device cuda", "stories260K", "FireQ folder", "fireq quantize"])
        refused("validate", STORIES_260K, "--device", "cuda", "--quiet", code=USAGE, parts=["FireQ folder"])
        refused("eval", packed, *evaluate, "--device", "cuda", "--activations", "fp", code=USAGE,
                parts=["--device cuda", "FP8", "--activations fp"])
        refused("eval", packed, *evaluate, "--device", "cuda", "--weights", "original", "--reference", STORIES_260K,
                code=USAGE, parts=["--device cuda", "packed", "--weights original"])
        self.assertEqual({"kind": "cpu"}, fireq_json("eval", packed, *evaluate, "--device", "cpu")["device"])
        self.assertEqual({"kind": "cpu"}, fireq_json("validate", packed)["device"])
        if has_gpu():
            self.skipTest("this machine has a GPU: scripts/gpu-check device covers it")
        for command in (("eval", packed, *evaluate), ("validate", packed, "--quiet")):
            refused(*command, "--device", "cuda", code=ENVIRONMENT, parts=["CUDA"])

    def test_leading_zeros_are_decimal(self):
        evaluate = ("eval", STORIES_260K, "--text", TINY, "--ctx", 64)
        self.assertEqual(fireq_json(*evaluate, "--max-chars", "1000")["tokens"],
                         fireq_json(*evaluate, "--max-chars", "01000")["tokens"])

    def test_context_over_the_models_is_a_warning(self):
        result = fireq("eval", STORIES_260K, "--text", TINY, "--max-chars", 3000, "--ctx", 513, "--quiet")
        self.assertRegex(result.err, r"^fireq: warning: .*513.*512.*\n$")

    def test_text_shorter_than_a_window(self):
        short = self.tmp / "short.txt"
        short.write_text("Once upon a time there was a cat.")
        for command, option in ((("eval", STORIES_260K, "--ctx", 128), "--ctx"),
                                (("calibrate", STORIES_260K, "--length", 128, "-o", self.tmp / "x.h5"), "--length"),
                                (("quantize", STORIES_260K, "--preset", "fast", "--length", 128, "-o", self.tmp / "out"), "--length")):
            for bos in ("head", "window", "none"):
                with self.subTest(command=command[0], bos=bos):
                    line = refused(*command, "--text", short, "--bos", bos, "--quiet", code=INPUT,
                                   parts=["short.txt", "shorter than one window", "128", option, "more text"])
                    # The largest window that it names is one that works.
                    have = int(re.search(r"found (\d+)", line)[1])
                    self.assertTrue(8 < have < 40, line)
                    again = [have if word == 128 else word for word in command]
                    fireq(*again, "--text", short, "--bos", bos, "--quiet")
                    for made in self.tmp.iterdir():
                        if made != short:
                            shutil.rmtree(made) if made.is_dir() else made.unlink()

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
        for text, part in (('{"preset": "rtn", "lambda2_k": 1}', "did you mean 'smoothing.lambda2_c'"),
                           ('{"preset": "rtn", "smoothing": {"lamda3": true}}', "did you mean 'smoothing.lambda3'"),
                           ('{"preset": "rtn", "kv": true}', "did you mean 'kv_cache'"),
                           ('{"preset": "rtn", "weight": {}}', "did you mean 'weights'"),
                           ('{"preset": "rtn", "weights": {"top_k": 2}}', "did you mean 'keys.top_k'"),
                           ('{"preset": "rtn", ', "recipe.json"),
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
    def test_quiet_says_nothing(self):
        packed = self.tmp / "packed"
        for command in (("eval", STORIES_260K, "--text", TINY, "--max-chars", 5000), ("inspect", STORIES_260K),
                        ("quantize", STORIES_260K, "-o", packed, "--preset", "rtn"),
                        ("calibrate", STORIES_260K, "-o", self.tmp / "x.h5", *CALIBRATE_260K),
                        ("validate", packed, "--reference", STORIES_260K)):
            with self.subTest(command[0]):
                result = fireq(*command, "--quiet")
                self.assertEqual(("", ""), (result.out, result.err))

    def test_progress_without_a_terminal_is_lines(self):
        """Work of some seconds: plain lines on stderr with the stage, how far it is and the time."""
        result = fireq("eval", STORIES_15M, "--text", TINY, "--max-chars", 40000, "--threads", 1)
        lines = result.err.splitlines()
        if result.seconds > 4:
            self.assertTrue(lines)
        for line in lines:
            self.assertRegex(line, r"^evaluate: \d+ of \d+ \(\d+ %\), .+")
        if lines:
            self.assertIn("(100 %)", lines[-1])

    def test_json_on_the_standard_output(self):
        """'-': one JSON value and nothing else, for every subcommand."""
        packed = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        text = ("--text", TINY, "--max-chars", 4000)
        for command, keys in (
            (("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "rtn"),
             {"out", "linears", "bytes_before", "bytes_after", "resumed_layers", "seconds", "warnings", "recipe"}),
            (("quantize", STORIES_260K, "-o", self.tmp / "dry", "--preset", "rtn", "--dry-run"),
             {"linears", "kept", "bytes_before", "bytes_after", "peak_memory", "largest_layer_fp32", "recipe"}),
            (("calibrate", STORIES_260K, "-o", self.tmp / "x.h5", *CALIBRATE_260K),
             {"out", "layers", "tokens", "windows", "model_fingerprint", "text_fingerprint", "seconds"}),
            (("eval", packed, *text, "--reference", STORIES_260K),
             {"ppl", "nll_per_token", "nll_stderr", "tokens", "windows", "scored", "bos", "seconds", "kl_mean", "kl_max",
              "top1_agree"}),
            (("inspect", packed), {"kind", "packed", "recipe"}),
            (("inspect", STORIES_260K), {"kind", "weights"}),
            (("inspect", self.tmp / "x.h5"), {"kind", "sites", "tokens", "windows"}),
            (("validate", packed, "--reference", STORIES_260K, *text),
             {"linears", "failures", "kl_mean", "kl_max", "top1_agree", "ppl", "scored"}),
            (("generate", packed, "-p", "Once", "-n", 4),
             {"text", "prompt_tokens", "new_tokens", "seconds", "tokens_per_second", "stopped_at"}),
        ):
            with self.subTest(command[:2]):
                result = fireq(*command, "--json", "-")
                value = json.loads(result.out)
                self.assertLessEqual(keys, set(value))
                self.assertEqual(value["warnings"], len(value["warning_lines"]))
                self.assertEqual(value["warnings"], result.err.count("fireq: warning: "))
                # The same keys in a file, which appears whole.
                path = self.tmp / "report.json"
                again = [self.tmp / "other" if word == self.tmp / "out" else word for word in command]
                again = [self.tmp / "y.h5" if word == self.tmp / "x.h5" and command[0] == "calibrate" else word
                         for word in again]
                fireq(*again, "--json", path, "--quiet")
                self.assertEqual(set(value), set(parse_json(path)))
                self.assertEqual([], [p.name for p in self.tmp.iterdir() if "report.json." in p.name])

    def test_standard_output_that_cannot_be_written(self):
        with open("/dev/full", "w") as full:
            for command in (("eval", STORIES_260K, "--text", TINY, "--max-chars", 3000), ("inspect", STORIES_260K),
                            ("generate", STORIES_260K, "-p", "Once", "-n", 4),
                            ("eval", STORIES_260K, "--text", TINY, "--max-chars", 3000, "--json", "-")):
                with self.subTest(command[0]):
                    done = subprocess.run(arguments(command), stdin=subprocess.DEVNULL, stdout=full,
                                          stderr=subprocess.PIPE, env=environment(), text=True)
                    self.assertEqual(ENVIRONMENT, done.returncode, done.stderr)
                    self.assertIn("standard output", done.stderr)
                    self.assertIn("No space left", done.stderr)

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
                         "6000", "--threads", "1", cwd=DATA)
        absolute = fireq("eval", STORIES_260K, "--text", TINY, "--max-chars", 6000, "--threads", 2)
        def numbers(text):
            return [n for line in text.splitlines() if "ppl" in line.lower() or "perplex" in line.lower()
                    for n in re.findall(r"\d+\.\d+", line)]
        self.assertTrue(numbers(relative.out))
        self.assertEqual(numbers(relative.out)[0], numbers(absolute.out)[0])


if __name__ == "__main__":
    main()
