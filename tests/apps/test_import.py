"""4-bit folders of other programs as a source: each format written in numpy from its definition (int4_models.py), and compared
with the folder of the plain FP32 values that those bytes stand for."""
import json
import shutil

import numpy as np

from export_models import from_bits, integers, random_llama, random_tokens, round_product
from harness import DATA, INPUT, TestCase, edit_json, fireq, fireq_json, main, read_tensors, refused, write_safetensors
from int4_models import Format, scales_as
from oracle import E4M3, GROUP, LINEARS, Model

FORMATS = [Format("compressed-tensors", size, zeros, dtype) for size, zeros, dtype in
           ((32, False, "BF16"), (64, True, "F16"), (128, False, "F16"), (128, True, "BF16"), (-1, False, "F32"), (-1, True, "F16"))]
FORMATS += [Format("compressed-tensors", 64, True, "F16", True),
            Format("gptq", 128, False), Format("gptq", 32, True), Format("gptq", 64, True, "BF16", True), Format("gptq", -1, True),
            Format("gptq", 128, True, "F16", True, checkpoint_format="gptq_v2"), Format("gptq", 128, True, checkpoint_format="gptq"),
            Format("gptq", 64, False, checkpoint_format="gptq_v2"), Format("gptq", 64, True, format="gptq_v2"),
            Format("awq", 128, True), Format("awq", 32, True, "BF16"), Format("awq", -1, True), Format("awq", 128, False),
            Format("awq", 64, True, version="gemm", checkpoint_format="gemm", format="gemm")]


class Import(TestCase):
    def plain_model(self):
        folder = self.shared / "random"
        if not folder.exists():
            random_llama(folder, 70)
        return folder

    def untied_model(self):
        """The same with a head of its own."""
        folder = self.shared / "untied"
        if not folder.exists():
            shutil.copytree(self.plain_model(), folder)
            edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=False))
            tensors = read_tensors(folder)
            dtype, embedding = tensors["model.embed_tokens.weight"]
            tensors["lm_head.weight"] = (dtype, np.ascontiguousarray(np.random.default_rng(74).permutation(embedding)))
            write_safetensors(folder / "model.safetensors", tensors)
        return folder

    def tokens(self, vocab=384):
        return random_tokens(self.tmp / "ids.u32", 71, 600, vocab)

    def make(self, name, fmt, seed, keep=("model.layers.1.mlp.down_proj",), model=None, head=False):
        """(quantised folder, plain FP32 folder); the modules in `keep` stay plain in both. head: the lm_head is quantised too."""
        rng = np.random.default_rng(seed)
        quantised, plain = self.tmp / name, self.tmp / (name + "-plain")
        model = model or self.plain_model()
        tensors = read_tensors(model)
        stored, floats = {}, {}
        for tensor, (dtype, array) in tensors.items():
            module = tensor.removesuffix(".weight")
            if not module.endswith((*LINEARS, "lm_head") if head else LINEARS) or module in keep:
                stored[tensor] = floats[tensor] = (dtype, array)
                continue
            parts, weights = fmt.store(rng, *array.shape)
            stored |= {f"{module}.{part}": value for part, value in parts.items()}
            floats[tensor] = ("F32", weights)
        for folder, content in ((quantised, stored), (plain, floats)):
            folder.mkdir()
            shutil.copy(model / "config.json", folder)
            write_safetensors(folder / "model.safetensors", content)
        edit_json(quantised / "config.json", lambda c: c.update(quantization_config=fmt.config()))
        return quantised, plain

    def evaluate(self, folder, *args, vocab=384):
        return fireq_json("eval", folder, "--tokens", self.tokens(vocab), "--ctx", 100, *args)

    def check_alike(self, quantised, plain, **kw):
        """The same nll of every window, and no weight that differs."""
        a, b = self.evaluate(quantised, **kw), self.evaluate(plain, **kw)
        self.assertEqual(b["window_nll"], a["window_nll"])
        self.assertGreater(a["windows"], 4)
        report = fireq_json("diff", plain, quantised)
        self.assertEqual([], [x["name"] for x in report["linears"] if not x["equal"]])
        self.assertEqual([], report["tensors"])

    def test_every_format(self):
        for seed, fmt in enumerate(FORMATS):
            with self.subTest(str(fmt)):
                quantised, plain = self.make(f"m{seed}", fmt, seed)
                self.check_alike(quantised, plain)
                shutil.rmtree(plain)
                shutil.rmtree(quantised)

    def test_words_that_are_not_full(self):
        """Sizes that are no multiples of 8: compressed-tensors pads words; AWQ has none along K, GPTQ along both."""
        odd = random_llama(self.tmp / "odd", 72, hidden=36, ffn=53, heads=3, kv_heads=1, head_dim=6, awkward=False)
        for seed, (size, zeros) in enumerate(((32, True), (-1, False), (16, False), (-1, True))):
            with self.subTest(size=size, zeros=zeros):
                self.check_alike(*self.make(f"c{seed}", Format("compressed-tensors", size, zeros), seed, model=odd))
        wide = random_llama(self.tmp / "wide", 73, hidden=40, ffn=56, heads=4, kv_heads=4, head_dim=8, awkward=False)
        self.check_alike(*self.make("a", Format("awq", 32, True), 7, model=wide))  # 40 and 56: a last group of 8, of 24
        self.check_alike(*self.make("g", Format("gptq", 32, True), 8, model=wide))
        for fmt in (Format("awq", 8, True), Format("gptq", 8, True)):
            name = f"{fmt.name}-claims"
            quantised, _ = self.make(name, Format("compressed-tensors", -1, False), 9, model=odd)
            edit_json(quantised / "config.json", lambda c, fmt=fmt: c.update(quantization_config=fmt.config()))
            rename = {"weight_packed": "qweight", "weight_scale": "scales"}
            tensors = {f"{module}.{rename.get(part, part)}": t for (module, _, part), t in
                       ((n.rpartition("."), t) for n, t in read_tensors(quantised).items())}
            write_safetensors(quantised / "model.safetensors", tensors)
            self.refuse(quantised, ["multiples of 8", "self_attn.q_proj", "[18, 36]"])

    def test_biases(self):
        """Biases lie beside the packed parts as they lie beside weights."""
        model = DATA / "tiny/qwen2-tied-bf16"
        for seed, fmt in enumerate((Format("gptq", 16, True), Format("awq", 8, True), Format("compressed-tensors", 32, True))):
            with self.subTest(str(fmt)):
                self.assertIn("model.layers.0.self_attn.q_proj.bias", read_tensors(model))
                self.check_alike(*self.make(fmt.name, fmt, seed, model=model), vocab=80)

    def test_every_command(self):
        """quantize makes the same tensors of both; calibrate, inspect, validate and eval take one as a reference."""
        quantised, plain = self.make("gptq", Format("gptq", 128, True, "F16", True), 80)
        text = ("--tokens", self.tokens(), "--samples", 4, "--length", 64)
        for preset in ("rtn", "fast", "best"):
            with self.subTest(preset):
                a, b = self.tmp / f"{preset}-a", self.tmp / f"{preset}-b"
                extra = () if preset == "rtn" else text
                plan = fireq_json("quantize", quantised, "-o", a, "--preset", preset, *extra, "--dry-run")
                said = fireq("quantize", quantised, "-o", a, "--preset", preset, *extra, "--quiet").err
                self.assertIn("was quantised by gptq to 4 bits", said)
                fireq("quantize", plain, "-o", b, "--preset", preset, *extra, "--quiet")
                x, y = read_tensors(a), read_tensors(b)
                self.assertEqual(sorted(x), sorted(y))
                for name in x:
                    self.assertEqual(x[name][0], y[name][0], name)
                    np.testing.assert_array_equal(x[name][1], y[name][1], name)
                self.assertEqual(sum(t.nbytes for _, t in x.values()), plan["bytes_after"])
                self.assertEqual(sum(t.nbytes for _, t in read_tensors(quantised).values()), plan["bytes_before"])
                config = json.loads((a / "config.json").read_text())["quantization_config"]
                self.assertEqual("fireq", config["quant_method"])
        checks = [fireq_json("validate", self.tmp / f"fast-{side}", "--reference", source)["linears"]
                  for side, source in (("a", quantised), ("b", plain))]
        self.assertEqual(*checks)
        packed = self.tmp / "fast-a"
        results = [self.evaluate(packed, "--reference", quantised), self.evaluate(self.tmp / "fast-b", "--reference", plain)]
        self.assertEqual(*[[r[k] for k in ("kl_mean", "kl_max", "window_nll")] for r in results])
        a, b = fireq_json("inspect", plain), fireq_json("inspect", quantised)
        self.assertEqual(a["weights"], b["weights"])
        self.assertEqual({"method": "gptq", "group_size": 128}, b["imported"])
        self.assertNotIn("imported", a)
        fireq("calibrate", quantised, "-o", self.tmp / "stats.h5", *text, "--quiet")
        fireq("quantize", quantised, "-o", self.tmp / "from-stats", "--stats", self.tmp / "stats.h5", "--quiet")
        x, y = read_tensors(self.tmp / "from-stats"), read_tensors(packed)
        self.assertTrue(all(np.array_equal(x[n][1], y[n][1]) for n in y))

    def test_our_own_export(self):
        """quantize, export, and read the export as a source: q * bf16(sigma * r) bit for bit, near the folder's own values."""
        packed, out, plain = self.tmp / "packed", self.tmp / "export", self.tmp / "plain"
        fireq("quantize", self.plain_model(), "-o", packed, "--preset", "rtn", "--for", "vllm", "--quiet")
        fireq("export", packed, "-o", out, "--format", "compressed-tensors", "--quiet")
        plain.mkdir()
        content = {n: t for n, t in read_tensors(out).items() if "proj." not in n}
        for name, linear in Model(packed).packed.items():
            scale = from_bits(round_product(E4M3[linear.sigma_bytes], linear.r[:, None]))
            content[name + ".weight"] = ("F32", (integers(linear) * np.repeat(scale, GROUP, axis=1)).astype(np.float32))
        write_safetensors(plain / "model.safetensors", content)
        shutil.copy(self.plain_model() / "config.json", plain)
        a, b = self.evaluate(out), self.evaluate(plain)
        self.assertEqual(b["window_nll"], a["window_nll"])
        # The folder's own products carry one rounding more, to FP8.
        own = self.evaluate(packed, "--activations", "fp", "--kv", "fp", "--qp", "fp")
        original = self.evaluate(self.plain_model())
        print(f"nll {original['nll_per_token']:.4f}, packed {own['nll_per_token']:.4f}, export {a['nll_per_token']:.4f}", end=" ")
        report = fireq_json("diff", packed, out)
        self.assertLess(report["linears"][0]["relative"], 0.035)  # half a step of FP8's 3 fraction bits is 1/32 at most
        self.assertGreater(report["linears"][0]["relative"], 0)

    def test_linears_that_stay_as_they_are(self):
        """A quantised linear that the recipe leaves alone is written in the type of its scales, rounded once to it."""
        for seed, dtype in ((85, "F16"), (86, "BF16"), (87, "F32")):
            with self.subTest(dtype):
                quantised, plain = self.make(dtype, Format("awq", 64, True, dtype), seed)
                out = self.tmp / f"out-{dtype}"
                keep = ("--preset", "rtn", "--ignore", "*.o_proj", "--quiet")
                plan = fireq_json("quantize", quantised, "-o", out, *keep, "--dry-run")
                fireq("quantize", quantised, "-o", out, *keep)
                tensors, original = read_tensors(out), read_tensors(plain)
                for layer in range(2):
                    name = f"model.layers.{layer}.self_attn.o_proj.weight"
                    expected, _ = scales_as(dtype, original[name][1])
                    self.assertEqual(expected[0], tensors[name][0])
                    np.testing.assert_array_equal(expected[1], tensors[name][1])
                self.assertEqual(sum(t.nbytes for _, t in tensors.values()), plan["bytes_after"])

    def test_older_config_files(self):
        """From before quantization_config: a file of its own beside config.json, AutoAWQ's with keys of its own."""
        for seed, fmt, file, names in ((90, Format("gptq", 128, True), "quantize_config.json", {}),
                                       (93, Format("awq", 64, True), "quant_config.json",
                                        {"bits": "w_bit", "group_size": "q_group_size"})):
            with self.subTest(file):
                quantised, plain = self.make(f"old-{fmt.name}", fmt, seed)
                config = json.loads((quantised / "config.json").read_text())
                own = config.pop("quantization_config")
                del own["quant_method"]
                (quantised / "config.json").write_text(json.dumps(config))
                (quantised / file).write_text(json.dumps({names.get(key, key): value for key, value in own.items()}))
                self.assertEqual(self.evaluate(plain)["window_nll"], self.evaluate(quantised)["window_nll"])
                out = self.tmp / f"out-{fmt.name}"
                fireq("quantize", quantised, "-o", out, "--preset", "rtn", "--quiet")
                self.assertFalse((out / file).exists())

    def test_symmetric_models_with_the_wrong_label(self):
        """Zeros of 8 in a folder that says "gptq", where 7 would be right: the zero of a symmetric model is 8 anyway."""
        quantised, plain = self.make("label", Format("gptq", 64, False, checkpoint_format="gptq_v2"), 91)
        edit_json(quantised / "config.json", lambda c: c["quantization_config"].update(checkpoint_format="gptq"))
        self.assertEqual(self.evaluate(plain)["window_nll"], self.evaluate(quantised)["window_nll"])
        quantised, _ = self.make("wrong", Format("gptq", 64, True), 92)
        edit_json(quantised / "config.json", lambda c: c["quantization_config"].update(sym=True))
        self.refuse(quantised, ["qzeros", "symmetric", "sym: false"])

    def refuse(self, folder, parts):
        refused("eval", folder, "--tokens", self.tokens(), "--ctx", 100, "--quiet", code=INPUT, parts=parts)

    def test_configs_that_are_not_read(self):
        gptq, awq, compressed = Format("gptq", 128, False), Format("awq", 128, True), Format("compressed-tensors", 128, False)
        changes = {
            gptq: (({"bits": 8}, ["bits", "8", "expected 4"]), ({"bits": 3}, ["bits", "3"]), ({"bits": None}, ["bits", "missing"]),
                   ({"bits": "4"}, ["bits"]), ({"checkpoint_format": "marlin"}, ["checkpoint_format", "gptq_v2"]),
                   ({"format": "bitblas"}, ["format", "gptq_v2"]), ({"is_marlin_format": True}, ["is_marlin_format"]),
                   ({"pack_dtype": "int8"}, ["pack_dtype", "int32"]), ({"group_size": 0}, ["group_size"]),
                   ({"group_size": "128"}, ["group_size"]), ({"desc_act": 1}, ["desc_act"]),
                   ({"quant_method": "bitsandbytes"}, ["quant_method", "gptq", "awq", "original model"])),
            awq: (({"bits": 8}, ["bits", "8"]), ({"version": "gemv"}, ["version", "gemm"]),
                  ({"checkpoint_format": "gemv_fast"}, ["checkpoint_format", "gemm"]), ({"format": "llm-awq"}, ["format", "gemm"])),
            compressed: (({"format": "float-quantized"}, ["format", "pack-quantized"]), ({"config_groups": {}}, ["config_groups"]),
                         ({"config_groups": []}, ["config_groups"]),
                         ({"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config"]),
                         ({"transform_config": [1]}, ["transform_config"]),
                         ({"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config"]))}
        for fmt, list_of_changes in changes.items():
            quantised, _ = self.make(fmt.name, fmt, 1)
            keep = (quantised / "config.json").read_text()
            for change, parts in list_of_changes:
                with self.subTest(change):
                    edit_json(quantised / "config.json", lambda c, change=change: c["quantization_config"].update(change))
                    self.refuse(quantised, ["config.json", *parts])
                    (quantised / "config.json").write_text(keep)
        for change in ({"num_bits": 8}, {"type": "float"}, {"strategy": "tensor_group"}, {"group_size": None}, {"group_size": -1}):
            with self.subTest(change):
                edit_json(quantised / "config.json",
                          lambda c, change=change: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(change))
                self.refuse(quantised, ["config.json", f"weights.{next(iter(change))}"])
                (quantised / "config.json").write_text(keep)
        with self.subTest("two schemes"):
            def another(config):
                groups = config["quantization_config"]["config_groups"]
                groups["group_1"] = json.loads(json.dumps(groups["group_0"]))
                groups["group_1"]["weights"]["group_size"] = 64
            edit_json(quantised / "config.json", another)
            self.refuse(quantised, ["config_groups.group_1", "one scheme"])

    def test_damaged_tensors(self):
        module = "model.layers.0.mlp.up_proj"
        awkward = {"missing": None, "shape": lambda t: (t[0], t[1].reshape(1, -1)), "type": lambda t: ("F32", t[1].astype(np.float32))}
        for fmt, parts in ((Format("gptq", 64, True, "F16", True), ("qweight", "scales", "qzeros", "g_idx")),
                           (Format("awq", 64, True), ("qweight", "scales", "qzeros")),
                           (Format("compressed-tensors", 64, True, "F16", True),
                            ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"))):
            quantised, _ = self.make(fmt.name, fmt, 2)
            tensors = read_tensors(quantised)
            for part in parts:
                for kind, change in awkward.items():
                    # Scales may be F32. weight_shape is not needed, and says the same in any shape.
                    if (part, kind) in (("scales", "type"), ("weight_scale", "type"), ("weight_shape", "missing"), ("weight_shape", "shape")):
                        continue
                    with self.subTest(format=fmt.name, part=part, kind=kind):
                        name = f"{module}.{part}"
                        damaged = {n: t for n, t in tensors.items() if n != name}
                        if change:
                            damaged[name] = change(tensors[name])
                        write_safetensors(quantised / "model.safetensors", damaged)
                        self.refuse(quantised, [f"{module}.{part}"])
            wrong = []
            if fmt.order:
                index = next(p for p in parts if "g_idx" in p)
                bad = tensors[f"{module}.{index}"][1].copy()
                bad[17] = 4
                wrong.append((index, ("I32", bad), ["found 4 at index 17", "0 to 3"]))
                bad = bad.copy()
                bad[17] = -1
                wrong.append((index, ("I32", bad), ["found -1 at index 17"]))
            scale = next(p for p in parts if "scale" in p)
            bad = tensors[f"{module}.{scale}"][1].copy()
            bad[1, 1] = np.nan
            wrong.append((scale, ("F16", bad), ["NaN at [1, 1]"]))
            if fmt.name == "compressed-tensors":
                wrong.append(("weight_shape", ("I64", np.array([384, 255], "<i8")), ["[384, 255]", "[384, 256]"]))
            for part, tensor, said in wrong:
                with self.subTest(format=fmt.name, part=part, said=said):
                    write_safetensors(quantised / "model.safetensors", tensors | {f"{module}.{part}": tensor})
                    self.refuse(quantised, [module, part, *said])

    def test_a_quantised_head(self):
        """Read as the linears are, whatever the format; written as it was dequantised, or in FP8."""
        for seed, fmt in enumerate((Format("gptq", 64, True, "F16", True), Format("awq", 32, True, "BF16"),
                                    Format("compressed-tensors", 128, True), Format("gptq", -1, False))):
            with self.subTest(str(fmt)):
                quantised, plain = self.make(f"head{seed}", fmt, seed, model=self.untied_model(), head=True)
                self.assertNotIn("lm_head.weight", read_tensors(quantised))
                a, b = self.evaluate(quantised), self.evaluate(plain)
                self.assertEqual(b["window_nll"], a["window_nll"])
                for name, recipe in (("plain", {"preset": "rtn"}), ("fp8", {"preset": "rtn", "head": "fp8"})):
                    path = self.tmp / "recipe.json"
                    path.write_text(json.dumps(recipe))
                    outs = [self.tmp / f"{side}-{name}-{seed}" for side in ("a", "b")]
                    plan = fireq_json("quantize", quantised, "-o", outs[0], "--recipe", path, "--dry-run")
                    for source, out in zip((quantised, plain), outs):
                        fireq("quantize", source, "-o", out, "--recipe", path, "--quiet")
                    x, y = (read_tensors(out) for out in outs)
                    self.assertEqual(sorted(x), sorted(y))
                    self.assertEqual(sum(t.nbytes for _, t in x.values()), plan["bytes_after"])
                    expected = y["lm_head.weight"]
                    if name == "plain":  # once more rounded: to the type of the scales
                        expected, _ = scales_as(fmt.dtype, expected[1])
                    self.assertEqual(expected[0], x["lm_head.weight"][0])
                    np.testing.assert_array_equal(expected[1], x["lm_head.weight"][1])
                    if name == "fp8":
                        np.testing.assert_array_equal(y["lm_head.weight_scale"][1], x["lm_head.weight_scale"][1])
                    fireq("validate", outs[0], "--quiet")

    def test_another_group_size_and_a_damaged_head(self):
        quantised, _ = self.make("size", Format("gptq", 64, True), 3, model=self.untied_model())
        edit_json(quantised / "config.json", lambda c: c["quantization_config"].update(group_size=128))
        self.refuse(quantised, ["scales", "[2, 256]", "[4, 256]"])
        edit_json(quantised / "config.json", lambda c: c["quantization_config"].update(group_size=64))
        tensors = read_tensors(quantised)
        parts, _ = Format("gptq", 64, True).store(np.random.default_rng(4), 384, 256)
        del tensors["lm_head.weight"], parts["scales"]
        write_safetensors(quantised / "model.safetensors", tensors | {f"lm_head.{p}": t for p, t in parts.items()})
        self.refuse(quantised, ["lm_head.scales", "missing", "[4, 384]"])


if __name__ == "__main__":
    main()
