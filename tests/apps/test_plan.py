"""quantize --target-size and --max-kl: the plan, what comes of it, and that it comes again."""
import json
import os
import shutil
import signal
import time

import export_models as em
from harness import (CALIBRATE_260K, STORIES_260K, USAGE, TestCase, fireq, fireq_json, main, refused, shards, start)


def size_of(folder):
    return sum(path.stat().st_size for path in shards(folder))


class Plan(TestCase):
    """A random Llama, whose widths are multiples of 128: 4 bits, FP8 and BF16 differ in size as they should."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = cls.shared / "random"
        em.random_llama(cls.model, 20, awkward=False)
        cls.text = ("--tokens", em.random_tokens(cls.shared / "ids.u32", 21, 2048, 384), "--samples", 6,
                    "--length", 64)

    def plan(self, *args, model=None, text=None, code=0):
        return fireq_json("quantize", model or self.model, "-o", self.tmp / "none", *args, "--dry-run",
                          *(self.text if text is None else text), code=code)

    def limits(self, *args):
        least = fireq_json("quantize", self.model, "-o", self.tmp / "none", *args, "--dry-run",
                           *(() if "rtn" in args else self.text))["bytes_after"]
        return least, size_of(self.model)

    def test_size_is_kept_and_used(self):
        least, most = self.limits("--preset", "rtn")
        last = None
        for share in (0.15, 0.5, 0.8):
            target = int(least + share * (most - least))
            out = self.tmp / f"out{share}"
            report = fireq_json("quantize", self.model, "-o", out, "--preset", "rtn", "--target-size", target,
                                *self.text)
            plan = report["plan"]
            self.assertLessEqual(size_of(out), target)
            # Nothing more would have fitted: each open step is wider than what is free.
            order = ("int4", "fp8", "original")
            steps = [u["bytes"][to] - u["bytes"][u["precision"]] for u in plan["units"]
                     for to in order[order.index(u["precision"]) + 1:]]
            self.assertLess(target - report["bytes_after"], min(steps) + 20000)
            self.assertEqual(report["bytes_after"], plan["bytes"])
            self.assertAlmostEqual(plan["kl"], plan["result_kl"], delta=1e-6)
            if last is not None:
                self.assertLess(plan["kl"], last)
            last = plan["kl"]
            dry = self.plan("--preset", "rtn", "--target-size", target)
            self.assertEqual(dry["recipe"], report["recipe"])
            self.assertEqual(dry["plan"]["units"], plan["units"])
            self.assertEqual(dry["bytes_after"], report["bytes_after"])

    def test_choices_follow_the_measurements(self):
        least, most = self.limits("--preset", "rtn")
        units = self.plan("--preset", "rtn", "--target-size", (least + most) // 2)["plan"]["units"]
        self.assertEqual(14, len(units))
        for unit in units:
            self.assertLess(unit["kl"]["fp8"], unit["kl"]["int4"])
            self.assertLess(unit["bytes"]["int4"], unit["bytes"]["fp8"])
            self.assertLess(unit["bytes"]["fp8"], unit["bytes"]["original"])
        # Of two linears of one size the one that keeps 4 bits is not the more sensitive.
        for a in units:
            for b in units:
                if a["bytes"] == b["bytes"] and a["precision"] == "int4" and b["precision"] != "int4":
                    self.assertLessEqual(a["kl"]["int4"] - a["kl"]["fp8"], b["kl"]["int4"])

    def test_measured_alone(self):
        """A unit's KL is that of a folder in which it alone is quantised."""
        least, most = self.limits("--preset", "rtn")
        plan = self.plan("--preset", "rtn", "--target-size", (least + most) // 2)["plan"]
        for index, precision in ((2, "int4"), (6, "fp8"), (11, "int4")):
            unit = plan["units"][index]
            path = self.tmp / "one.json"
            path.write_text(json.dumps({"preset": "rtn", "overrides": [
                {"match": "model.layers.*", "precision": "original"},
                {"match": unit["linears"][0], "precision": precision}]}))
            out = self.tmp / f"one{index}"
            fireq("quantize", self.model, "-o", out, "--recipe", path)
            # The plan's windows: the first 512 tokens of the six drawn are all 384 that there are.
            self.assertEqual(384, plan["tokens"])
            got = self.kl_on_calibration(out)
            # Beside it: bf16 outputs of the other layers' linears.
            self.assertAlmostEqual(unit["kl"][precision], got, delta=0.1 * got + 2e-5)

    def kl_on_calibration(self, out):
        """KL on the calibration windows, found as the result of a run that plans nothing more than `out`'s recipe."""
        recipe = json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]
        path = self.tmp / "again.json"
        path.write_text(json.dumps(recipe))
        report = fireq_json("quantize", self.model, "-o", self.tmp / "again", "--recipe", path, "--force",
                            "--target-size", "1GB", *self.text)
        self.assertEqual([], report["plan"]["units"])
        return report["plan"]["result_kl"]

    def test_kl_is_reached_and_no_more_than_that(self):
        plain = self.plan("--preset", "rtn", "--max-kl", 100)
        self.assertEqual(set(), {u["precision"] for u in plain["plan"]["units"]} - {"int4"})
        bytes_before, most = 0, plain["plan"]["kl"]
        for share in (1.0, 0.5, 0.2, 0.05):
            report = self.plan("--preset", "rtn", "--max-kl", share * most)
            self.assertLessEqual(report["plan"]["kl"], share * most)
            self.assertGreaterEqual(report["bytes_after"], bytes_before)
            bytes_before = report["bytes_after"]
        self.assertGreater(bytes_before, plain["bytes_after"])

    def test_impossible_goals_name_what_is_possible(self):
        line = refused("quantize", "-q", self.model, "-o", self.tmp / "out", "--preset", "rtn", "--target-size", "10kB",
                       *self.text, code=USAGE, parts=("not become as small", "embeddings"))
        least = int(line.split("--target-size of ")[1].split(" bytes")[0])
        self.plan("--preset", "rtn", "--target-size", least)
        refused("quantize", "-q", self.model, "-o", self.tmp / "out", "--preset", "rtn", "--target-size", least - 1,
                *self.text, code=USAGE, parts=(least,))
        line = refused("quantize", "-q", self.model, "-o", self.tmp / "out", "--preset", "rtn", "--max-kl", "1e-12",
                       *self.text, code=USAGE, parts=("KL does not become as small",))
        smallest = line.split("--max-kl of ")[1].split(" ")[0]
        self.plan("--preset", "rtn", "--max-kl", smallest)
        self.assert_nothing_published(self.tmp / "out")

    def test_needs_text_and_one_goal(self):
        refused("quantize", "-q", self.model, "-o", self.tmp / "out", "--preset", "rtn", "--max-kl", 1, code=USAGE,
                parts=("--text",))
        refused("quantize", "-q", self.model, "-o", self.tmp / "out", "--preset", "rtn", "--max-kl", 1, "--target-size",
                "1GB", *self.text, code=USAGE, parts=("excludes",))

    def test_what_the_recipe_says_stays(self):
        path = self.tmp / "recipe.json"
        path.write_text(json.dumps({"preset": "rtn", "ignore": ["*.0.mlp.*"], "overrides": [
            {"match": "*.1.*.q_proj", "precision": "int4"}]}))
        report = self.plan("--recipe", path, "--target-size", "100MB")
        fixed = {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")} | {"model.layers.1.self_attn.q_proj"}
        self.assertFalse(fixed & {n for u in report["plan"]["units"] for n in u["linears"]})
        precision = {line["name"]: line["precision"] for line in report["linears"]}
        self.assertEqual(["original"] * 3 + ["int4"], [precision[n] for n in sorted(fixed)])

    def test_for_vllm_what_is_fused_stays_together(self):
        least, most = self.limits("--preset", "fast", "--for", "vllm")
        report = self.plan("--preset", "fast", "--for", "vllm", "--target-size", (least + most) // 2)
        self.assertEqual([3, 1, 2, 1] * 2, [len(u["linears"]) for u in report["plan"]["units"]])
        self.assertEqual({"int4", "original"}, {u["precision"] for u in report["plan"]["units"]})

    def test_the_recorded_recipe_makes_the_same_folder_for_any_threads(self):
        for preset in ("fast", "best"):
            with self.subTest(preset):
                least, most = self.limits("--preset", preset)
                goal = ("--preset", preset, "--target-size", (2 * least + most) // 3, *self.text)
                one, three = self.tmp / f"one-{preset}", self.tmp / f"three-{preset}"
                fireq("quantize", self.model, "-o", one, *goal, "--threads", 1)
                fireq("quantize", self.model, "-o", three, *goal, "--threads", 3)
                self.assert_same_folder(one, three)
                recipe = json.loads((one / "config.json").read_text())["quantization_config"]["recipe"]
                self.assertTrue(recipe["overrides"])
                path = self.tmp / "recipe.json"
                path.write_text(json.dumps(recipe))
                again = self.tmp / f"again-{preset}"
                fireq("quantize", self.model, "-o", again, "--recipe", path, *self.text)
                (one / "precision_plan.json").unlink()  # nothing was measured again
                self.assert_same_folder(one, again)

    def test_narrow_rows_are_in_fp8_where_that_is_smaller(self):
        """64 columns are padded to 128 in 4 bits."""
        report = self.plan("--preset", "rtn", "--max-kl", 100, model=STORIES_260K, text=CALIBRATE_260K)
        for unit in report["plan"]["units"]:
            smaller = unit["bytes"]["fp8"] <= unit["bytes"]["int4"]
            self.assertEqual("fp8" if smaller else "int4", unit["precision"])
        self.assertIn("fp8", {u["precision"] for u in report["plan"]["units"]})

    def test_resume(self):
        least, most = self.limits("--preset", "fast")
        goal = ("--preset", "fast", "--target-size", (least + most) // 2, *self.text)
        whole, out = self.tmp / "whole", self.tmp / "out"
        fireq("quantize", self.model, "-o", whole, *goal)
        partial = self.tmp / "out.fireq-partial"
        resumed = 0
        for attempt in range(20):  # a kill can come before the first layer counts, or after the end
            files = 2 - attempt % 2
            shutil.rmtree(out, ignore_errors=True)
            process = start("quantize", self.model, "-o", out, *goal)
            while process.poll() is None and len(list(partial.glob("units/layer-*"))) < files:
                time.sleep(0.001)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if not partial.exists():
                continue
            resumed = fireq_json("quantize", self.model, "-o", out, *goal, "--resume")["resumed_layers"]
            self.assert_same_folder(whole, out)
            if resumed > 0:
                break
        self.assertGreater(resumed, 0)


if __name__ == "__main__":
    main()
