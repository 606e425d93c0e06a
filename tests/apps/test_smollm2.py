"""SmolLM2-135M-Instruct, a real chat model with hidden 576 (FIREQ_SMOLLM2_DIR; scripts/make_smollm2.py makes it)."""
import json
import os
import resource
import subprocess
import unittest
from pathlib import Path

from harness import DATA, WIKI, TestCase, arguments, environment, fireq, fireq_json, main

FOLDER = os.environ.get("FIREQ_SMOLLM2_DIR")


@unittest.skipUnless(FOLDER, "set FIREQ_SMOLLM2_DIR, or run scripts/test --smollm2")
class SmolLM2(TestCase):
    def test_golden_perplexity(self):
        golden = next(g for g in json.loads((DATA / "golden/golden.json").read_text()) if g["name"] == "smollm2_wiki")
        got = fireq_json("eval", FOLDER, "--text", WIKI, "--max-chars", golden["chars"], "--ctx", golden["ctx"])
        self.assertEqual((golden["bos"], golden["tokens"], golden["windows"], golden["scored"]),
                         (got["bos"], got["tokens"], got["windows"], got["scored"]))
        self.assertAlmostEqual(got["ppl"] / golden["ppl"], 1, delta=1e-4)

    def test_rtn_validates_and_chats(self):
        out = self.quantised("rtn", FOLDER, "--preset", "rtn")
        report = fireq_json("validate", out, "--reference", FOLDER)
        self.assertEqual(7 * 30, len(report["linears"]))
        self.assertFalse(report["failures"])
        answer = fireq_json("generate", out, "--chat", "-p", "What is the capital of France?", "-n", 24, "--temperature", 0)
        self.assertGreater(len(answer["text"]), 5)
        greeting = fireq_json("generate", FOLDER, "--chat", "-p", "What is the capital of France?", "-n", 24,
                              "--temperature", 0)
        self.assertIn("Paris", greeting["text"])

    def test_peak_memory(self):
        """At most twice the largest layer in FP32, the calibration activations and 200 MB (docs/architecture.md)."""
        out = self.tmp / "out"
        samples, length = 4, 512
        text = ("--text", WIKI, "--max-chars", 60000, "--samples", samples, "--length", length)
        plan = fireq_json("quantize", FOLDER, "-o", out, "--preset", "fast", "--dry-run", *text)
        config = json.loads((Path(FOLDER) / "config.json").read_text())
        hidden, ffn = config["hidden_size"], config["intermediate_size"]
        kv = config["num_key_value_heads"] * config["head_dim"]
        layer = 4 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn)
        activations = 4 * samples * length * hidden
        self.assertEqual(layer, plan["largest_layer_fp32"])
        self.assertEqual(activations, plan["calibration_bytes"])
        process = subprocess.Popen(arguments(("quantize", FOLDER, "-o", out, "--preset", "fast", "--quiet", *text)),
                                   stdin=subprocess.DEVNULL, env=environment())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.assertEqual(0, process.returncode)
        self.assertIsInstance(usage, resource.struct_rusage)
        peak = usage.ru_maxrss * 1024
        print(f"peak resident memory {peak / 1e6:.0f} MB")
        self.assertLessEqual(peak, 2 * layer + activations + 200_000_000)
        fireq("validate", out, "--quiet")


if __name__ == "__main__":
    main()
