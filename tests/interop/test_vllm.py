"""Exports, read by vLLM's own load conversion: its functions, taken from the source in its wheel and run on the CPU.

vLLM as a whole does not run without a Hopper GPU: its only kernel for W4AFP8 (CutlassW4A8LinearKernel) refuses every other platform,
so that a build for CPUs would not help. What it does to a checkpoint before the kernel is PyTorch, though, and needs no more than

    pip download --no-deps vllm==0.33.0
    FIREQ=build/release/bin/fireq FIREQ_DATA=build/data FIREQ_VLLM_WHEEL=vllm-0.33.0-….whl PYTHON tests/interop/test_vllm.py -v

with a Python that has torch. Without FIREQ_VLLM_WHEEL the tests are skipped.
"""
import __future__

import ast
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "apps"))

import export_models as em  # noqa: E402
import oracle  # noqa: E402
from harness import TINY, TestCase, fireq, main, read_tensors  # noqa: E402

LAYERS = "vllm/model_executor/layers/quantization/"
PER_TOKEN = "per token"


class VllmSource:
    def __init__(self, wheel):
        self.wheel = zipfile.ZipFile(wheel)

    def function(self, path, name, names):
        """A function or method of a file, without its assertions that tensors are on a GPU; `names`: what its module would have."""
        tree = ast.parse(self.wheel.read(LAYERS + path))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
        assert len(found) == 1, f"{name}: {len(found)} in {path}"
        body = found[0].body
        kept = [s for s in body if not (isinstance(s, ast.Assert) and "is_cuda" in ast.unparse(s.test))]
        found[0].body, found[0].decorator_list = kept, []
        module = ast.Module([found[0]], [])
        exec(compile(module, path, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True), names)
        return names[name]

    def load_conversion(self):
        """(scales in BF16 -> FP8 scales and channel scales, packed words -> signed nibbles in place)."""
        utils, names = "utils/quant_utils.py", {"torch": torch}
        broadcast = self.function(utils, "group_broadcast", dict(names))
        quantise = self.function("input_quant_fp8.py", "forward_native", dict(
            names, F=torch.nn.functional, GroupShape=SimpleNamespace(PER_TOKEN=PER_TOKEN), group_broadcast=broadcast,
            _FP8_DTYPE=torch.float8_e4m3fn, _FP8_MIN=-448.0, _FP8_MAX=448.0, _FP8_MIN_SCALING_FACTOR=1 / (448.0 * 512.0)))
        per_token = SimpleNamespace(is_group_quant=False, static=False, group_shape=PER_TOKEN, num_token_padding=None)
        scales = self.function(utils, "convert_bf16_scales_to_fp8", dict(names))
        nibbles = self.function(utils, "convert_packed_uint4b8_to_signed_int4_inplace", dict(names))
        return lambda x: scales(lambda y: quantise(per_token, y), x), nibbles


class Vllm(TestCase):
    def setUp(self):
        super().setUp()
        wheel = os.environ.get("FIREQ_VLLM_WHEEL")
        if not wheel:
            self.skipTest("FIREQ_VLLM_WHEEL names no wheel of vLLM")
        self.scales, self.nibbles = VllmSource(wheel).load_conversion()

    def check(self, source, out):
        """The folder's group scales, row scales and integers, bit for bit."""
        packed, tensors = oracle.Model(source).packed, read_tensors(out)
        seen = 0
        for name, linear in packed.items():
            if name + ".weight_packed" not in tensors:
                continue
            seen += 1
            bits = np.ascontiguousarray(tensors[name + ".weight_scale"][1])
            group, channel = self.scales(torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16))
            np.testing.assert_array_equal(linear.sigma_bytes, group.view(torch.uint8).numpy(), name)
            np.testing.assert_array_equal(linear.r, channel.numpy().reshape(-1), name)
            words = self.nibbles(torch.from_numpy(np.ascontiguousarray(tensors[name + ".weight_packed"][1]).copy())).numpy().view(np.uint32)
            four = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & np.uint32(15)).reshape(words.shape[0], -1).astype(np.int64)
            np.testing.assert_array_equal(em.integers(linear), np.where(four > 7, four - 16, four), name)
        self.assertGreater(seen, 0)
        print(f"{seen} linears", end=" ")

    def test_seeded_random_model(self):
        model = em.random_llama(self.tmp / "model", 62)
        tokens = em.random_tokens(self.tmp / "ids.u32", 63, 2048, 384)
        for preset in ("rtn", "paper", "fast", "best"):
            with self.subTest(preset):
                source, out = self.tmp / preset, self.tmp / f"{preset}-vllm"
                text = () if preset == "rtn" else ("--tokens", tokens, "--samples", 6, "--length", 64)
                fireq("quantize", model, "-o", source, "--preset", preset, "--for", "vllm", *text, "--quiet")
                fireq("export", source, "-o", out, "--format", "compressed-tensors", "--quiet")
                self.check(source, out)

    def test_real_model(self):
        model, source, out = em.padded_stories(self.tmp / "model"), self.tmp / "packed", self.tmp / "out"
        fireq("quantize", model, "-o", source, "--preset", "best", "--for", "vllm", "--text", TINY, "--skip-chars", 300000, "--max-chars", 20000,
              "--samples", 8, "--length", 128, "--quiet")
        fireq("export", source, "-o", out, "--format", "compressed-tensors", "--quiet")
        self.check(source, out)


if __name__ == "__main__":
    main()
