"""What fireq writes and computes, against other people's programs: transformers and compressed-tensors.

Needs torch, transformers, safetensors and compressed-tensors: scripts/test --interop makes an environment for it.
By hand:

    FIREQ=build/release/bin/fireq FIREQ_DATA=build/data PYTHON tests/interop/test_interop.py -v
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "apps"))

import export_models as em  # noqa: E402
import int4_models  # noqa: E402
import oracle  # noqa: E402
from harness import DATA, STORIES_15M, TINY, TestCase, edit_json, fireq, fireq_json, main  # noqa: E402

SERVE = ("--format", "compressed-tensors")
PLAIN = ("--format", "hf-dequantized")
FP = ("--activations", "fp", "--kv", "fp", "--qp", "fp")
CALIBRATE = ("--text", TINY, "--skip-chars", 300000, "--max-chars", 20000, "--samples", 8, "--length", 128)

torch.set_num_threads(2)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(folder, **kw):
    # eager: the other implementations of attention round in other places.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **kw).eval()


def nll_per_token(model, ids, length):
    """Over windows that each score their last length - 1 tokens, as fireq eval cuts ids without BOS."""
    total = count = 0
    with torch.no_grad():
        for window in oracle.windows(ids, length):
            window = torch.from_numpy(window.astype(np.int64))
            logits = model(window[None]).logits[0].double()
            total -= torch.log_softmax(logits[:-1], dim=-1)[torch.arange(length - 1), window[1:]].sum().item()
            count += length - 1
    return total / count


def bits(tensor):
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


class Interop(TestCase):
    def story_ids(self):
        path = self.shared / "stories.u32"
        text = Path(TINY).read_text()[50000:62000]
        ids = np.array(oracle.SentencePiece(STORIES_15M / "tokenizer.model").encode(text), "<u4")
        ids.tofile(path)
        return path, ids


class CompressedTensors(Interop):
    def check(self, source, out):
        """The package reads config.json and decompresses every linear to q * bf16(sigma * r), bit for bit."""
        model = oracle.Model(source)
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        parsed = QuantizationConfig.model_validate(config)
        self.assertEqual("compressed", parsed.quantization_status.value)
        scheme = parsed.config_groups["group_0"]
        self.assertEqual("pack-quantized", scheme.format)
        self.assertEqual((4, "int", True, "group", 128),
                         (scheme.weights.num_bits, scheme.weights.type, scheme.weights.symmetric,
                          scheme.weights.strategy, scheme.weights.group_size))
        tensors = {}
        for shard in sorted(out.glob("*.safetensors")):
            tensors |= load_file(shard)
        packed = [name for name in model.packed if name not in config["ignore"]]
        self.assertTrue(packed)
        expected = {}
        for name in packed:
            linear = model.packed[name]
            state = {part: tensors[f"{name}.{part}"] for part in PackedQuantizationCompressor.compression_param_names(scheme)}
            q, scale = em.integers(linear), em.round_product(em.E4M3[linear.sigma_bytes], linear.r[:, None])
            exact = (q * np.repeat(em.from_bits(scale), em.GROUP, axis=1)).astype(np.float32)  # 3 + 8 bits
            # In FP32 the product itself; in the stored type the product rounded to it.
            wide = dict(state, weight_scale=state["weight_scale"].float())
            found = PackedQuantizationCompressor.decompress(wide, scheme)["weight"]
            np.testing.assert_array_equal(exact, found.numpy(), name)
            found = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
            self.assertEqual(torch.bfloat16, found.dtype)
            expected[name] = em.bf16_bits(exact)
            # -0 and 0 are one value.
            np.testing.assert_array_equal(expected[name] & np.where(expected[name] == 0x8000, 0, 0xFFFF),
                                          bits(found) & np.where(bits(found) == 0x8000, 0, 0xFFFF), name)
        return config, expected

    def check_transformers(self, out, config, expected):
        """transformers finds the same linears quantised, the others plain, and decompresses to the same values."""
        model = load(out, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
        linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        self.assertEqual(set(expected) | set(config["ignore"]) - {"lm_head"}, set(linears))
        for name, values in expected.items():
            np.testing.assert_array_equal(em.from_bits(values), linears[name].weight.detach().float().numpy(), name)
        compressed = load(out)
        kept = {n for n, _ in compressed.named_buffers()} | {n for n, _ in compressed.named_parameters()}
        self.assertEqual({name + ".weight_packed" for name in expected}, {n for n in kept if n.endswith("weight_packed")})
        return model

    def test_seeded_random_model(self):
        model = em.random_llama(self.tmp / "model", 60)
        tokens = em.random_tokens(self.tmp / "ids.u32", 61, 2048, 384)
        for preset in ("rtn", "fast", "best"):
            with self.subTest(preset):
                source, out = self.tmp / preset, self.tmp / f"{preset}-vllm"
                text = () if preset == "rtn" else ("--tokens", tokens, "--samples", 6, "--length", 64)
                fireq("quantize", model, "-o", source, "--preset", preset, "--for", "vllm", *text, "--quiet")
                fireq("export", source, "-o", out, *SERVE, "--quiet", "--shard-size", "400kB")
                self.check_transformers(out, *self.check(source, out))

    def test_real_model_with_linears_that_do_not_fit(self):
        model = em.padded_stories(self.tmp / "model")
        source, out = self.tmp / "packed", self.tmp / "out"
        fireq("quantize", model, "-o", source, "--preset", "fast", "--for", "vllm", *CALIBRATE, "--quiet")
        fireq("export", source, "-o", out, *SERVE, "--quiet")
        config, expected = self.check(source, out)
        self.assertEqual((1 + 6 * 4, 6 * 3), (len(config["ignore"]), len(expected)))
        loaded = self.check_transformers(out, config, expected).float()
        # The package rounds no products and no activations: near our 4-bit weights, and still a storyteller.
        path, ids = self.story_ids()
        packed = fireq_json("eval", source, "--tokens", path, "--ctx", 256, *FP)["nll_per_token"]
        original = fireq_json("eval", STORIES_15M, "--tokens", path, "--ctx", 256)["nll_per_token"]
        found = nll_per_token(loaded, ids, 256)
        print(f"nll {original:.4f}, packed {packed:.4f}, compressed-tensors {found:.4f}", end=" ")
        self.assertLess(abs(found - packed), 0.3 * (packed - original))


class Import(Interop):
    """4-bit folders that the package writes, or reads, mean to fireq what they mean to the package, bit for bit."""

    def folders(self, name, fmt, parts_of):
        """A quantised folder and one of the package's own FP32 values. parts_of(rows, cols) -> (parts, values)."""
        model = self.shared / "plain"
        if not model.exists():
            em.random_llama(model, 90)
        plain = load_file(model / "model.safetensors")
        stored, values = {}, {}
        for tensor, weight in plain.items():
            module = tensor.removesuffix(".weight")
            if not module.endswith(oracle.LINEARS):
                stored[tensor] = values[tensor] = weight
                continue
            parts, values[tensor] = parts_of(*weight.shape)
            stored |= {f"{module}.{part}": t.contiguous() for part, t in parts.items()}
        quantised, dequantised = self.tmp / name, self.tmp / f"{name}-plain"
        for folder, content in ((quantised, stored), (dequantised, values)):
            folder.mkdir()
            (folder / "config.json").write_bytes((model / "config.json").read_bytes())
            save_file(content, folder / "model.safetensors")
        edit_json(quantised / "config.json", lambda c: c.update(quantization_config=fmt))
        return quantised, dequantised

    def check(self, quantised, dequantised):
        report = fireq_json("diff", dequantised, quantised)
        self.assertEqual(14, len(report["linears"]))
        self.assertEqual([], [x["name"] for x in report["linears"] if not x["equal"]])

    def test_written_by_compressed_tensors(self):
        generator = torch.Generator().manual_seed(91)
        for size in (32, 64, 128, None):
            for symmetric in (True, False):
                with self.subTest(size=size, symmetric=symmetric):
                    arguments = {"num_bits": 4, "type": "int", "symmetric": symmetric, "group_size": size,
                                 "strategy": "group" if size else "channel"}
                    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
                    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized",
                                                quantization_status="compressed")

                    def parts_of(rows, cols, scheme=scheme, size=size, symmetric=symmetric):
                        groups = cols // size if size else 1
                        state = {"weight": torch.randn(rows, cols, generator=generator) / cols**0.5,
                                 "weight_scale": torch.rand(rows, groups, generator=generator) / cols**0.5 / 3 + 1e-3}
                        if not symmetric:
                            state["weight_zero_point"] = torch.randint(-8, 8, (rows, groups), generator=generator, dtype=torch.int8)
                        state["weight_scale"] = state["weight_scale"].half()
                        parts = PackedQuantizationCompressor.compress(state, scheme)
                        # In FP32: the package rounds products to the type of the scale.
                        wide = dict(parts, weight_scale=parts["weight_scale"].float(), weight_shape=torch.Size((rows, cols)))
                        return parts, PackedQuantizationCompressor.decompress(wide, scheme)["weight"]

                    self.check(*self.folders(f"c{size}{symmetric}", config.model_dump(mode="json"), parts_of))

    def test_read_by_the_converter_of_autoawq_folders(self):
        rng = np.random.default_rng(92)
        for size in (32, 128):
            with self.subTest(size=size):
                fmt = int4_models.Format("awq", size, True, version="gemm")
                converter = AutoAWQConverter.from_autoawq_config(fmt.config())
                scheme = next(iter(converter.update_config(None).config_groups.values()))

                def parts_of(rows, cols, fmt=fmt, converter=converter, scheme=scheme):
                    stored, _ = fmt.store(rng, rows, cols)
                    parts = {part: torch.from_numpy(array.copy()) for part, (_, array) in stored.items()}
                    converted = converter.process({f"m.{part}": t.clone() for part, t in parts.items()})
                    state = {part.removeprefix("m."): t for part, t in converted.items()}
                    state |= {"weight_scale": state["weight_scale"].float(), "weight_shape": torch.Size((rows, cols))}
                    return parts, PackedQuantizationCompressor.decompress(state, scheme)["weight"]

                self.check(*self.folders(f"awq{size}", fmt.config(), parts_of))


class Transformers(Interop):
    def test_dequantised_perplexity(self):
        path, ids = self.story_ids()
        for preset in ("rtn", "fast", "best"):
            source = self.tmp / preset
            fireq("quantize", STORIES_15M, "-o", source, "--preset", preset, *(CALIBRATE if preset != "rtn" else ()),
                  "--quiet")
            packed = fireq_json("eval", source, "--tokens", path, "--ctx", 256, "--weights", "packed", *FP)["ppl"]
            for dtype, tolerance in (("bf16", 2e-3), ("f16", 1e-3), ("f32", 1e-4)):
                with self.subTest(preset=preset, dtype=dtype):
                    out = self.tmp / f"{preset}-{dtype}"
                    fireq("export", source, "-o", out, *PLAIN, "--dtype", dtype, "--quiet")
                    model = load(out, dtype=torch.float32)
                    found = np.exp(nll_per_token(model, ids, 256))
                    print(f"{preset} {dtype}: {found / packed - 1:+.1e}", end="; ")
                    self.assertLess(abs(found / packed - 1), tolerance, (packed, found))
                    # Without a wish of the caller's it is the type of the linears.
                    wanted = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
                    self.assertEqual(wanted, load(out, dtype="auto").model.layers[0].mlp.up_proj.weight.dtype)
                    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
                    self.assertGreater(len(tokenizer("Once upon a time")["input_ids"]), 3)

    def test_families(self):
        """The models as they are, and dequantised in FP32."""
        for model in sorted((DATA / "tiny").iterdir()):
            with self.subTest(model.name):
                ids = np.fromfile(model / "ids.u32", "<u4")
                text = ("--tokens", model / "ids.u32", "--ctx", 80)
                if "fused" not in model.name:  # transformers' Llama has no fused linears
                    own = fireq_json("eval", model, *text)["nll_per_token"]
                    self.assertAlmostEqual(own, nll_per_token(load(model, dtype=torch.float32), ids, 80), delta=1e-4)
                source, out = self.tmp / (model.name + "-packed"), self.tmp / model.name
                fireq("quantize", model, "-o", source, "--preset", "fast", "--tokens", model / "ids.u32", "--samples", 2,
                      "--length", 64, "--quiet")
                fireq("export", source, "-o", out, *PLAIN, "--dtype", "f32", "--quiet")
                own = fireq_json("eval", source, *text, *FP)["nll_per_token"]
                self.assertAlmostEqual(own, nll_per_token(load(out, dtype=torch.float32), ids, 80), delta=1e-4)


if __name__ == "__main__":
    main()
