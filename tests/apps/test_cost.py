"""What `fireq quantize` says of its cost: the default preset, expected and measured nll and KL, text unlike the model's."""
import json
import math
import re
import struct
from collections import Counter

import numpy as np

import oracle
from harness import (CALIBRATE_260K, ROOT, STORIES_260K, TINY, TUNE_260K, TestCase, fireq, fireq_json, main, read_tensors)

BOS = 1


def tokens(begin, count):
    """BOS and the ids of a slice of the stories, as --text gives them."""
    text = TINY.read_bytes().decode()[begin:begin + count]
    return [BOS] + oracle.SentencePiece(STORIES_260K / "tokenizer.model").encode(text)


def windows(ids, length):
    return [ids[i:i + length] for i in range(0, len(ids) - length + 1, length)]


def drawn(count, samples, seed):
    """docs/recipes.md: a partial Fisher-Yates shuffle by splitmix64."""
    mask, state = 2**64 - 1, seed
    order = list(range(count))
    for i in range(samples):
        n = count - i
        while True:
            state = (state + 0x9e3779b97f4a7c15) & mask
            z = state
            z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9 & mask
            z = (z ^ (z >> 27)) * 0x94d049bb133111eb & mask
            z ^= z >> 31
            if z < n * (mask // n):
                break
        j = i + z % n
        order[i], order[j] = order[j], order[i]
    return sorted(order[:samples])


class Cost(TestCase):
    def write_ids(self, ids):
        path = self.tmp / "ids.u32"
        path.write_bytes(struct.pack(f"<{len(ids)}I", *ids))
        return path

    def evaluated(self, packed, held_back):
        """fireq eval on the windows that a run must have measured on."""
        path = self.write_ids([t for w in held_back for t in w])
        return fireq_json("eval", packed, "--tokens", path, "--bos", "none", "--ctx", len(held_back[0]), "--reference", STORIES_260K)

    def quantize(self, name, *args):
        out = self.tmp / name
        return out, fireq_json("quantize", STORIES_260K, "-o", out, "--quiet", *args)

    def assert_measured(self, out, report, held_back):
        expected = self.evaluated(out, held_back)
        measured = report["measured"]
        self.assertGreater(measured["kl"], 0)
        self.assertEqual(expected["scored"], measured["tokens"])
        for ours, theirs in (("nll", "nll_per_token"), ("delta_nll", "delta_nll"), ("delta_nll_stderr", "delta_nll_stderr"),
                             ("kl", "kl_mean"), ("kl_stderr", "kl_stderr")):
            self.assertAlmostEqual(expected[theirs], measured[ours], delta=2e-6, msg=ours)
        recorded = json.loads((out / "config.json").read_text())["quantization_config"]["measured"]
        self.assertEqual({k: v for k, v in measured.items() if k != "seconds"}, recorded)
        self.assertIn(f"{measured['kl']:.4f}", (out / "README.md").read_text())
        self.assertIsNone(report["not_measured"])


class Measured(Cost):
    def test_on_windows_that_were_not_drawn(self):
        """48 of more windows: the three last of the others; on the whole folder's own precision."""
        all_windows = windows(tokens(300000, 20000), 64)
        self.assertGreater(len(all_windows), 60)
        text = ("--text", TINY, "--skip-chars", 300000, "--max-chars", 20000, "--samples", 48, "--length", 64, "--seed", 5)
        out, report = self.quantize("out", "--preset", "fast", *text)
        used = drawn(len(all_windows), 48, 5)
        rest = [w for i, w in enumerate(all_windows) if i not in used]
        self.assertGreater(len(rest), 3)
        self.assert_measured(out, report, rest[-3:])
        # Measuring changes nothing else; threads change nothing at all.
        plain, unmeasured = self.quantize("plain", "--preset", "fast", "--no-measure", *text)
        self.assertIsNone(unmeasured["measured"])
        self.assertEqual("--no-measure", unmeasured["not_measured"])
        left, right = read_tensors(out), read_tensors(plain)
        self.assertEqual(set(left), set(right))
        for name, (dtype, array) in left.items():
            self.assertEqual(dtype, right[name][0])
            np.testing.assert_array_equal(array.view(np.uint8), right[name][1].view(np.uint8), name)
        a, b = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (out, plain))
        self.assertEqual(dict(b, measured=a["measured"]), a)
        again, _ = self.quantize("again", "--preset", "fast", "--threads", 3, *text)
        self.assert_same_folder(out, again)

    def test_on_windows_taken_from_calibration(self):
        """All of 37 windows are asked for: the last two are held back; without measuring all are calibrated on."""
        ids = tokens(300000, 20000)[:37 * 64 + 20]
        text = ("--tokens", self.write_ids(ids), "--bos", "none", "--samples", 100, "--length", 64)
        out, report = self.quantize("out", "--preset", "fast", *text)
        calibrated = lambda folder: json.loads((folder / "config.json").read_text())["quantization_config"]["calibration"]["tokens"]
        self.assertEqual(35 * 64, calibrated(out))
        whole, _ = self.quantize("whole", "--preset", "fast", "--no-measure", *text)
        self.assertEqual(37 * 64, calibrated(whole))
        self.assert_measured(out, report, windows(ids, 64)[-2:])

    def test_text_too_short(self):
        ids = tokens(300000, 20000)[:7 * 64 + 63]
        text = ("--tokens", self.write_ids(ids), "--bos", "none", "--samples", 100, "--length", 64)
        out, report = self.quantize("out", "--preset", "fast", *text)
        self.assertIsNone(report["measured"])
        self.assertIn("too short", report["not_measured"])
        self.assertIn("not measured: the text is too short", fireq("quantize", STORIES_260K, "-o", self.tmp / "b", "--preset", "fast", *text).out)
        self.assertNotIn("measured", json.loads((out / "config.json").read_text())["quantization_config"])

    def test_a_recipe_without_calibration_is_measured_on_text(self):
        """rtn and fast on the same tokens: what they cost can be compared."""
        reports = {p: self.quantize(p, "--preset", p, *CALIBRATE_260K)[1] for p in ("rtn", "fast")}
        self.assertEqual(*(r["measured"]["tokens"] for r in reports.values()))
        self.assertGreater(reports["rtn"]["measured"]["kl"], reports["fast"]["measured"]["kl"])
        self.assertEqual("no text was given", self.quantize("none", "--preset", "rtn")[1]["not_measured"])

    def test_what_is_said(self):
        said = fireq("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "fast", *CALIBRATE_260K).out
        self.assertRegex(said, r"(?s)expected cost: nll \+.* what preset fast lost in \d runs on 3 models \(docs/results.md\).*"
                               r"measured cost: nll [+-][\d.]+ \+- [\d.]+ \(from [\d.]+\), KL [\d.]+ \+- [\d.]+ per token, on 127 tokens held "
                               r"back from calibration, in [\d.]+ s")


class Expected(Cost):
    def recorded(self, preset, with_cache):
        """(Δnll, KL) of each of the preset's rows in docs/results.md, and the number of models."""
        rows, models = [], set()
        for line in (ROOT / "docs/results.md").read_text().splitlines():
            if line.startswith("### "):
                model = line.split()[1]
            cells = [c.strip() for c in line.split("|")[1:-1]]
            if len(cells) == 5 and re.fullmatch(preset + "(, calibrated on .*)?", cells[0]):
                rows.append([float(re.sub(r"\(.*\)", "", number)) for number in cells[4 if with_cache else 3].split(" / ")[:2]])
                models.add(model)
        return rows, len(models)

    def test_is_what_results_md_says(self):
        stats = self.shared / "stats.h5"
        fireq("calibrate", STORIES_260K, "-o", stats, "--quiet", *CALIBRATE_260K)
        for preset in ("rtn", "paper", "fast", "best"):
            for cache in (True, False):
                with self.subTest(preset=preset, cache=cache):
                    (self.tmp / "recipe.json").write_text(json.dumps({"preset": preset, "kv_cache": cache}))
                    text = () if preset == "rtn" else CALIBRATE_260K
                    got = fireq_json("quantize", STORIES_260K, "-o", self.tmp / "out", "--recipe", self.tmp / "recipe.json", "--dry-run",
                                     "--quiet", *text)["expected"]
                    rows, models = self.recorded(preset, cache)
                    self.assertGreaterEqual(models, 3)
                    self.assertEqual((models, len(rows)), (got["models"], got["runs"]))
                    for column, key in enumerate(("delta_nll", "kl")):
                        values = [row[column] for row in rows]
                        self.assertEqual([min(values), max(values)], got[key])

    def test_nothing_is_claimed_for_other_recipes(self):
        (self.tmp / "recipe.json").write_text('{"preset": "rtn", "weights": {"search": [-1, 1]}}')
        args = ("quantize", STORIES_260K, "-o", self.tmp / "out", "--recipe", self.tmp / "recipe.json", "--dry-run")
        self.assertIsNone(fireq_json(*args, "--quiet")["expected"])
        self.assertIn("none is recorded for this recipe", fireq(*args).out)


class Default(Cost):
    def test_best_with_text_and_fast_with_statistics(self):
        stats = self.tmp / "stats.h5"
        fireq("calibrate", STORIES_260K, "-o", stats, "--quiet", *CALIBRATE_260K)
        for preset, source in (("best", CALIBRATE_260K), ("fast", ("--stats", stats))):
            with self.subTest(preset):
                explicit, _ = self.quantize("explicit-" + preset, "--preset", preset, *source)
                default, report = self.quantize("default-" + preset, *source)
                self.assertEqual(preset, report["recipe"]["preset"])
                self.assert_same_folder(explicit, default)


class Language(Cost):
    """The criterion of docs/recipes.md: nll against the entropy of the text's own token frequencies."""

    def calibrate(self, ids, length=128):
        path = self.write_ids(ids)
        result = fireq("calibrate", STORIES_260K, "-o", self.tmp / "s.h5", "--force", "--tokens", path, "--bos", "none", "--samples", 1000,
                       "--length", length, "--json", self.tmp / "r.json", "--quiet")
        return json.loads((self.tmp / "r.json").read_text())["text"], result.err

    def test_the_figures(self):
        ids = tokens(300000, 12000)[:40 * 100]
        fit, _ = self.calibrate(ids, 100)
        counts = np.array(list(Counter(ids).values())) / len(ids)
        self.assertAlmostEqual(-(counts * np.log(counts)).sum() + (len(counts) - 1) / (2 * len(ids)), fit["unigram"], delta=1e-9)
        pieces = [windows(ids, 100)[i * 40 // 10] for i in range(10)]
        path = self.write_ids([t for piece in pieces for t in piece])
        nll = fireq_json("eval", STORIES_260K, "--tokens", path, "--bos", "none", "--ctx", 100)["nll_per_token"]
        self.assertAlmostEqual(nll, fit["nll"], delta=1e-6)
        self.assertEqual(990, fit["tokens"])

    def test_own_domain(self):
        fit, said = self.calibrate(tokens(300000, 20000))
        self.assertFalse(fit["unlike"])
        self.assertLess(fit["nll"], 0.6 * fit["unigram"])
        self.assertNotIn("unlike", said)

    def test_shuffled_tokens(self):
        """The same tokens in another order: the same frequencies, no language."""
        ids = tokens(300000, 20000)
        shuffled = np.random.default_rng(9).permutation(ids).tolist()
        fit, said = self.calibrate(shuffled)
        self.assertTrue(fit["unlike"])
        self.assertRegex(said, r"warning: .*ids\.u32 looks unlike the model's language: its nll of [\d.]+ per token \(perplexity \d+\) is not below")

    def test_quantize_warns_too(self):
        code = ("--text", ROOT / "tests/apps/test_cost.py", "--samples", 8, "--length", 128)
        said = fireq("quantize", STORIES_260K, "-o", self.tmp / "a", "--preset", "fast", *code).err
        self.assertIn("test_cost.py looks unlike the model's language", said)
        report = fireq_json("quantize", STORIES_260K, "-o", self.tmp / "b", "--preset", "fast", *CALIBRATE_260K)
        self.assertFalse(report["text"]["unlike"])
        self.assertEqual(0, report["warnings"])
        self.assertLess(report["text"]["nll"], math.log(512))


class Time(TestCase):
    """The time that is expected: which stages, and that they follow the work. test_plan_stories15m.py compares it with a clock."""

    def expected(self, *args):
        """Seconds by stage, in order."""
        time = fireq_json("quantize", STORIES_260K, "-o", self.tmp / "out", "--dry-run", *args)["expected_time"]
        stages = {s["stage"]: s["seconds"] for s in time["stages"]}
        self.assertAlmostEqual(sum(stages.values()), time["seconds"])
        self.assertTrue(all(s > 0 for s in stages.values()), stages)
        self.assertLess(time["measured_in"], 30)
        return stages

    def test_stages(self):
        text = CALIBRATE_260K
        for stages, args in (
                (["quantize"], ("--preset", "rtn")),
                (["quantize", "measure"], ("--preset", "rtn", *text)),
                (["check text", "calibrate", "quantize"], ("--preset", "fast", "--no-measure", *text)),
                (["check text", "calibrate", "write text", "weigh outputs", "quantize", "measure"], text),
                (["check text", "calibrate", "write text", "weigh outputs", "quantize", "tune codes", "measure"], TUNE_260K),
                (["check text", "choose", "quantize", "measure"], ("--preset", "rtn", "--target-size", "10MB", *text)),
                (["check text", "calibrate", "choose", "quantize", "measure"], ("--preset", "fast", "--max-kl", 1, *text))):
            with self.subTest(args=args[:3]):
                self.assertEqual(stages, list(self.expected(*args)))

    def test_more_text_takes_longer(self):
        """32 times the text, of the same length of window; a machine that is busy now and then does not hide that."""
        text = ("--preset", "fast", "--text", TINY, "--length", 128, "--samples")
        few = min(self.expected(*text, 8)["calibrate"] for _ in range(4))  # being busy makes it no shorter
        self.assertGreater(self.expected(*text, 256)["calibrate"], 4 * few)

    def test_what_is_printed(self):
        said = fireq("quantize", STORIES_260K, "-o", self.tmp / "out", *CALIBRATE_260K).out
        self.assertRegex(said, r"(?m)^expected time: (less than|about) [^\n]* \(by the speed of the first layer, here and now\)$")
        report = fireq_json("quantize", STORIES_260K, "-o", self.tmp / "quiet", "--preset", "rtn", "--quiet")
        self.assertEqual(["quantize"], [s["stage"] for s in report["expected_time"]["stages"]])


if __name__ == "__main__":
    main()
