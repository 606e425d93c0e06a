"""fireq with --device cuda on a machine with a GPU: validate and eval of stories15M, against the CPU in the same run.

Run by scripts/gpu-check device; skipped without a GPU. FIREQ_DEVICE_REPORT=FILE keeps the figures as JSON.
"""
import json
import os
import shutil
import unittest

import numpy as np

import oracle
from harness import (DATA, ENVIRONMENT, STORIES_15M, TINY, TOLERANCE, TestCase, fireq, fireq_json, main, refused)

WINDOW, WINDOWS = 256, 24
# What is evaluated and what calibrates: apart in the text.
EVALUATE, CALIBRATE = (120_000, 40_000), (500_000, 20_000)
FOLDERS = {
    "rtn": ("--preset", "rtn"),
    "rtn-sm90": ("--preset", "rtn", "--layout", "sm90"),
    "paper": ("--preset", "paper"),          # per-tensor scales
    "fast-sm90": ("--preset", "fast", "--layout", "sm90"),  # normal-float levels
}
report = {}


class OnTheGpu(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        tokenizer = oracle.SentencePiece(STORIES_15M / "tokenizer.model")
        text = TINY.read_bytes().decode()
        cls.tokens = {}
        for name, (begin, count) in {"evaluate": EVALUATE, "calibrate": CALIBRATE}.items():
            ids = [1] + tokenizer.encode(text[begin:begin + count])
            cls.tokens[name] = cls.shared / f"{name}.u32"
            np.array(ids, "<u4").tofile(cls.tokens[name])
        probe = fireq("validate", cls.folder("rtn"), "--device", "cuda", "--quiet", code=None)
        if probe.code == ENVIRONMENT:
            raise unittest.SkipTest("no GPU: " + probe.err.strip())

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
                            self.assertTrue(any(route in k for k in c["kernels"]), f"{route}: {c['kernels']}")
                    worst.append(max(p["rel_error"] / p["limit"] for p in c["products"]))
                self.assertEqual(sorted(worst, reverse=True), worst, "worst first")
                errors = {m: max(p["rel_error"] for c in linears for p in c["products"] if p["tokens"] == m)
                          for m in (1, 7, 64, 333)}
                report.setdefault("validate", {})[name] = {
                    "linears": len(linears), "kernels": sorted({k for c in linears for k in c["kernels"]}),
                    "worst_error": errors}

    def test_seeds_give_other_activations(self):
        errors = [[p["rel_error"] for c in fireq_json("validate", self.folder("rtn"), "--device", "cuda", "--seed",
                                                      seed)["device"]["linears"] for p in c["products"]]
                  for seed in (0, 1)]
        self.assertNotEqual(*map(sorted, errors))

    def test_out_of_tolerance_fails(self):
        line = refused("validate", self.folder("rtn"), "--device", "cuda", "--max-device-error", 1e-4, "--quiet",
                       code=TOLERANCE, parts=["42 checks", "out of tolerance", "on the device"])
        self.assertIn("rtn", line)

    def test_perplexity_is_the_cpus(self):
        for name in FOLDERS:
            for kv in ("int4", "fp"):
                with self.subTest(name, kv=kv):
                    command = ("eval", self.folder(name), "--tokens", self.tokens["evaluate"], "--ctx", WINDOW,
                               "--bos", "none", "--kv", kv)
                    cpu = fireq_json(*command)
                    gpu = fireq_json(*command, "--device", "cuda")
                    self.assertEqual({"kind": "cpu"}, cpu["device"])
                    self.check_device(gpu["device"])
                    self.assertGreaterEqual(gpu["windows"], WINDOWS)
                    self.assertEqual(cpu["scored"], gpu["scored"])
                    self.assertEqual(cpu["precision"], gpu["precision"])
                    difference = abs(gpu["ppl"] / cpu["ppl"] - 1)
                    report.setdefault("eval", {})[f"{name}, {kv} cache"] = {
                        "cpu": cpu["ppl"], "cuda": gpu["ppl"], "difference": difference, "scored": cpu["scored"],
                        "cpu_seconds": cpu["seconds"], "cuda_seconds": gpu["seconds"]}
                    self.assertLess(difference, 1e-3)
                    # FP8 accumulation leaves its trace: equal to the last bit would mean that the CPU ran.
                    self.assertNotEqual(cpu["nll_per_token"], gpu["nll_per_token"])

    def test_two_runs_agree_to_the_bit(self):
        command = ("eval", self.folder("rtn"), "--tokens", self.tokens["evaluate"], "--ctx", WINDOW, "--bos", "none",
                   "--device", "cuda")
        first, second = (fireq_json(*command, "--threads", n) for n in (1, 3))
        self.assertEqual(first["nll_per_token"], second["nll_per_token"])

    def test_windows_alone_or_in_a_batch_agree(self):
        """M = 256 a launch against M = all rows: other kernels or tiles, the same perplexity to rounding."""
        ids = np.fromfile(self.tokens["evaluate"], "<u4")[:4 * WINDOW]
        alone = []
        for i in range(4):
            path = self.tmp / f"{i}.u32"
            ids[i * WINDOW:(i + 1) * WINDOW].tofile(path)
            alone.append(fireq_json("eval", self.folder("rtn"), "--tokens", path, "--ctx", WINDOW, "--bos", "none",
                                    "--device", "cuda")["nll_per_token"])
        path = self.tmp / "all.u32"
        ids.tofile(path)
        together = fireq_json("eval", self.folder("rtn"), "--tokens", path, "--ctx", WINDOW, "--bos", "none",
                              "--device", "cuda")
        self.assertEqual(4, together["windows"])
        self.assertAlmostEqual(np.mean(alone), together["nll_per_token"], delta=2e-3)

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
