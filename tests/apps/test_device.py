"""fireq with --device cuda on a machine with a GPU: validate and eval of stories15M, against the CPU in the same run.

Run by scripts/gpu-check device; skipped without a GPU. FIREQ_DEVICE_REPORT=FILE keeps the figures as JSON.
"""
import json
import math
import multiprocessing
import os
import subprocess
import sys
import unittest

import numpy as np

import oracle
from harness import (ENVIRONMENT, ROOT, STORIES_15M, TINY, TOLERANCE, TestCase, fireq, fireq_json, main, parse_json,
                     refused)

WINDOW = 256
# Characters of the text that are evaluated, and those that calibrate. Many: another order of summation redraws a
# part of the rounding noise, and only its mean over many windows is small (docs/kernels/device.md).
EVALUATE, CALIBRATE = (0, 900_000), (910_000, 20_000)
FOLDERS = {
    "rtn": ("--preset", "rtn"),
    "rtn-sm90": ("--preset", "rtn", "--layout", "sm90"),
    "paper": ("--preset", "paper"),          # per-tensor scales
    "fast-sm90": ("--preset", "fast", "--layout", "sm90"),  # normal-float levels
}
report = {}


def encode(piece):
    return oracle.SentencePiece(STORIES_15M / "tokenizer.model").encode(piece)


def tokenize(text, path):
    """In pieces, at once: that words at their borders may be cut otherwise does not matter here."""
    pieces = [text[i:i + 20_000] for i in range(0, len(text), 20_000)]
    with multiprocessing.Pool() as pool:
        ids = [1] + [i for piece in pool.map(encode, pieces) for i in piece]
    np.array(ids, "<u4").tofile(path)


class OnTheGpu(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        probe = fireq("validate", cls.folder("rtn"), "--device", "cuda", "--quiet", code=None)
        if probe.code == ENVIRONMENT:
            raise unittest.SkipTest("no GPU: " + probe.err.strip())
        text = TINY.read_bytes().decode()
        cls.tokens = {}
        for name, (begin, count) in {"evaluate": EVALUATE, "calibrate": CALIBRATE}.items():
            cls.tokens[name] = cls.shared / f"{name}.u32"
            tokenize(text[begin:begin + count], cls.tokens[name])
        ids = np.fromfile(cls.tokens["evaluate"], "<u4")[:4 * WINDOW]
        cls.tokens["few"] = cls.shared / "few.u32"
        ids.tofile(cls.tokens["few"])

    @classmethod
    def folder(cls, name):
        options = FOLDERS[name]
        if "rtn" not in options:
            options = (*options, "--tokens", cls.tokens["calibrate"], "--samples", 8, "--length", WINDOW)
        return cls.quantised(name, STORIES_15M, *options)

    def check_device(self, device):
        self.assertEqual("cuda", device["kind"])
        self.assertTrue(device["name"])
        report["device"] = {k: v for k, v in device.items() if k != "linears"}

    def test_every_linear_validates(self):
        for name in FOLDERS:
            with self.subTest(name):
                got = fireq_json("validate", self.folder(name), "--device", "cuda")
                self.check_device(got["device"])
                self.assertEqual([], got["failures"])
                linears = got["device"]["linears"]
                self.assertEqual(42, len({c["name"] for c in linears}))
                self.assertEqual(sorted(c["name"] for c in got["linears"]), sorted(c["name"] for c in linears))
                worst = []
                for c in linears:
                    for key in ("wrong_tile_bytes", "wrong_unpacked_bytes", "wrong_operands", "wrong_token_values",
                                "unwritten_outputs", "outputs_that_vary"):
                        self.assertEqual(0, c[key], f"{c['name']}: {key}")
                    self.assertEqual([1, 7, 64, 333] * 2, [p["tokens"] for p in c["products"]])
                    for p in c["products"]:
                        # bf16 outputs cannot be nearer than this to the exact product, nor far off.
                        self.assertGreater(p["rel_error"], 5e-4, c["name"])
                        self.assertLess(p["rel_error"], p["limit"], c["name"])
                    if got["device"]["compute_capability"] == 90:
                        for route in ("decode", "prefill", "portable", "dequantised"):
                            self.assertTrue(any(route in o["kernel"] for o in c["operands"]), route)
                    worst.append(max(p["rel_error"] / p["limit"] for p in c["products"]))
                self.assertEqual(sorted(worst, reverse=True), worst, "worst first")
                errors = {m: max(p["rel_error"] for c in linears for p in c["products"] if p["tokens"] == m)
                          for m in (1, 7, 64, 333)}
                report.setdefault("validate", {})[name] = {
                    "linears": len(linears), "kernels": sorted({o["kernel"] for c in linears for o in c["operands"]}),
                    "worst_error": errors}

    def test_a_layer_of_llama3_8b(self):
        """Matrices that need every multiprocessor, and a long K."""
        model, out = self.tmp / "model", self.tmp / "out"
        subprocess.run([sys.executable, ROOT / "scripts/make_random_model.py", "--shape", "llama3-8b", "--layers", "1",
                        "--vocab", "2000", "--seed", "1", "-o", model], check=True, capture_output=True)
        fireq("quantize", model, "-o", out, "--preset", "rtn", "--layout", "sm90", "--quiet")
        path = self.tmp / "report.json"
        fireq("validate", out, "--device", "cuda", "--quiet", "--json", path, code=None)
        got = parse_json(path)
        report["llama3-8b layer"] = {
            c["name"]: {"operands": c["operands"], "failures": c["failures"],
                        "worst_error": max(p["rel_error"] or math.inf for p in c["products"])}
            for c in got["device"]["linears"]}
        self.assertEqual(7, len(got["device"]["linears"]))
        self.assertEqual([], got["failures"])

    def test_seeds_give_other_activations(self):
        errors = [[p["rel_error"] for c in fireq_json("validate", self.folder("rtn"), "--device", "cuda", "--seed",
                                                      seed)["device"]["linears"] for p in c["products"]]
                  for seed in (0, 1)]
        self.assertNotEqual(*map(sorted, errors))

    def test_out_of_tolerance_fails(self):
        line = refused("validate", self.folder("rtn"), "--device", "cuda", "--max-device-error", 1e-4, "--quiet",
                       code=TOLERANCE, parts=["42 checks", "out of tolerance", "on the device"])
        self.assertIn("rtn", line)

    def evaluate(self, folder, tokens, *args):
        return fireq_json("eval", self.folder(folder), "--tokens", self.tokens[tokens], "--ctx", WINDOW, "--bos",
                          "none", *args)

    def test_perplexity_is_the_cpus(self):
        """To 1e-3, or to the noise that any other order of summation makes, where that is more."""
        differences = {}
        for name in ("rtn", "paper", "fast-sm90"):
            for kv in ("int4", "fp"):
                with self.subTest(name, kv=kv):
                    cpu = self.evaluate(name, "evaluate", "--kv", kv)
                    gpu = self.evaluate(name, "evaluate", "--kv", kv, "--device", "cuda")
                    self.assertEqual({"kind": "cpu"}, cpu["device"])
                    self.check_device(gpu["device"])
                    self.assertEqual(cpu["scored"], gpu["scored"])
                    self.assertEqual(cpu["precision"], gpu["precision"])
                    change = np.array(gpu["window_nll"]) - np.array(cpu["window_nll"])
                    noise = change.std(ddof=1) / math.sqrt(len(change))
                    difference = gpu["ppl"] / cpu["ppl"] - 1
                    report.setdefault("eval", {})[f"{name}, {kv} cache"] = {
                        "cpu": cpu["ppl"], "cuda": gpu["ppl"], "difference": difference, "standard_error": noise,
                        "scored": cpu["scored"], "cpu_seconds": cpu["seconds"], "cuda_seconds": gpu["seconds"]}
                    self.assertLess(noise, 1e-3, "too few windows to tell")
                    self.assertLess(abs(difference), max(1e-3, 3 * noise))
                    differences.setdefault(kv, []).append(difference)
                    # Other sums leave their trace: equal to the last bit would mean that the CPU ran.
                    self.assertNotEqual(cpu["nll_per_token"], gpu["nll_per_token"])
        # Noise of the folders is independent, a defect's bias would not be.
        report["mean_difference"] = {kv: float(np.mean(d)) for kv, d in differences.items()}
        for kv, mean in report["mean_difference"].items():
            self.assertLess(abs(mean), 1e-3, kv)

    def test_both_layouts_are_the_same_bits(self):
        got = [self.evaluate(name, "few", "--device", "cuda")["nll_per_token"] for name in ("rtn", "rtn-sm90")]
        self.assertEqual(*got)

    def test_threads_do_not_matter(self):
        got = [self.evaluate("rtn", "few", "--device", "cuda", "--threads", n)["nll_per_token"] for n in (1, 3)]
        self.assertEqual(*got)

    def test_windows_alone_or_in_a_batch_agree(self):
        """M = 256 a launch against M = all rows: perhaps other kernels or tiles, the same perplexity to noise."""
        ids = np.fromfile(self.tokens["few"], "<u4")
        together = self.evaluate("fast-sm90", "few", "--device", "cuda")["window_nll"]
        self.assertEqual(4, len(together))
        for i in range(4):
            self.tokens[i] = self.tmp / f"{i}.u32"
            ids[i * WINDOW:(i + 1) * WINDOW].tofile(self.tokens[i])
            alone = self.evaluate("fast-sm90", i, "--device", "cuda")["nll_per_token"]
            self.assertAlmostEqual(alone, together[i], delta=0.1)

    @classmethod
    def tearDownClass(cls):
        path = os.environ.get("FIREQ_DEVICE_REPORT")
        if path and report:
            with open(path, "w") as f:
                json.dump(report, f, indent=1)
                f.write("\n")
        super().tearDownClass()


if __name__ == "__main__":
    main()
