"""fireq export: every tensor and key of what it writes, against numpy; what it refuses; how it writes."""
import json
import shutil
import subprocess
import sys

import numpy as np

import export_models as em
import oracle
from harness import (CALIBRATE_260K, DATA, ENVIRONMENT, INPUT, STORIES_15M, STORIES_260K, TINY, USAGE, TestCase,
                     arguments, copy_model, environment, fireq, fireq_json, main, parse_json, read_header, read_tensors,
                     refused, sanitized, shards, tmpfs, write_safetensors)

SERVE = ("--format", "compressed-tensors")
PLAIN = ("--format", "hf-dequantized")
FP = ("--weights", "packed", "--activations", "fp", "--kv", "fp", "--qp", "fp")


class Export(TestCase):
    @classmethod
    def random(cls, name="random", **kw):
        folder = cls.shared / name
        return folder if folder.exists() else em.random_llama(folder, 20, **kw)

    @classmethod
    def tokens(cls, vocab=384):
        path = cls.shared / f"ids-{vocab}.u32"
        return path if path.exists() else em.random_tokens(path, 21, 2048, vocab)

    @classmethod
    def calibration(cls, vocab=384):
        return ("--tokens", cls.tokens(vocab), "--samples", 6, "--length", 64)

    def export(self, source, *args, name="exported", **kw):
        out = self.tmp / name
        report = fireq_json("export", source, "-o", out, *args, **kw)
        return out, report


class CompressedTensors(Export):
    def check(self, source, out, plain=()):
        """The whole folder. Returns {linear: (integers, scale bits)}."""
        model, before = em.read_model(source)
        after = read_tensors(out)
        config = json.loads((out / "config.json").read_text())
        quantization = config.pop("quantization_config")
        self.assertEqual({**em.QUANTIZATION_CONFIG, "ignore": ["lm_head", *plain]}, quantization)
        original = json.loads((source / "config.json").read_text())
        del original["quantization_config"]
        self.assertEqual({**original, "torch_dtype": "bfloat16"}, config)

        found, expected = {}, set()
        for name, packed in model.packed.items():
            if name in plain:
                dtype, array = after[name + ".weight"]
                self.assertEqual("BF16", dtype)
                np.testing.assert_array_equal(em.bf16_bits(em.dequantised(packed)), array, name)
                expected.add(name + ".weight")
                continue
            dtype, words = after[name + ".weight_packed"]
            self.assertEqual(("I32", (packed.rows, packed.cols // 8)), (dtype, words.shape), name)
            q = em.unpack_int32(words)
            np.testing.assert_array_equal(em.integers(packed), q, name)
            dtype, scale = after[name + ".weight_scale"]
            self.assertEqual(("BF16", (packed.rows, packed.cols // 128)), (dtype, scale.shape), name)
            r = np.broadcast_to(packed.r, packed.rows)[:, None]
            np.testing.assert_array_equal(em.round_product(em.E4M3[packed.sigma_bytes], r), scale, name)
            dtype, shape = after[name + ".weight_shape"]
            self.assertEqual(("I64", [packed.rows, packed.cols]), (dtype, shape.tolist()), name)
            expected |= {f"{name}.weight_{part}" for part in ("packed", "scale", "shape")}
            found[name] = (q, scale)
        for name, (dtype, array) in before.items():
            if ".weight_" in name or name.endswith(("k_post_rope_scale", "k_post_rope_shift", "k_rounding", "v_rounding")):
                continue
            expected.add(name)
            self.assertEqual("BF16", after[name][0], name)
            np.testing.assert_array_equal(em.bf16_bits(oracle.to_float(dtype, array)), after[name][1], name)
        self.assertEqual(expected, set(after))
        return model, found

    def check_served(self, source, out, plain=()):
        """And what vLLM makes of it is what the FireQ folder multiplies."""
        model, found = self.check(source, out, plain)
        self.assertTrue(found)
        for name, (q, scale) in found.items():
            operands, channel = em.load_in_vllm(q, scale)
            packed = model.packed[name]
            np.testing.assert_array_equal(packed.operands(), operands, name)
            np.testing.assert_array_equal(packed.r.astype(np.float32), channel, name)
        return model

    def test_round_to_nearest(self):
        source = self.quantised("rtn", self.random(), "--preset", "rtn")
        out, report = self.export(source, *SERVE)
        model = self.check_served(source, out)
        self.assertEqual((14, [], []), (report["linears"], report["plain"], report["changed"]))
        self.assertEqual(["the INT4 KV cache: the format has none"], report["left_out"])
        # The awkward rows are there: scales down to the smallest subnormal, and r at its lower limit.
        sigma = np.concatenate([p.sigma_bytes.ravel() for p in model.packed.values()])
        self.assertEqual(1, sigma.min())
        self.assertTrue(any(np.any(p.r == np.float32(1 / 28672)) for p in model.packed.values()))

    def test_every_preset_for_vllm(self):
        """Quantised --for vllm: exports whole, nothing left out, no warning."""
        for preset in ("rtn", "paper", "fast", "best"):
            with self.subTest(preset):
                text = () if preset == "rtn" else self.calibration()
                source = self.quantised("vllm-" + preset, self.random(), "--preset", preset, "--for", "vllm", *text)
                out, report = self.export(source, *SERVE, name=preset)
                self.check_served(source, out)
                self.assertEqual(([], [], [], 0, 0),
                                 tuple(report[k] for k in ("plain", "changed", "left_out", "warnings", "max_rel_error")))
                recipe = json.loads((source / "config.json").read_text())["quantization_config"]["recipe"]
                self.assertEqual("vllm", recipe["for"])
                self.assertEqual(("int4", "row", False, False),
                                 (recipe["weights"]["levels"], recipe["weights"]["row_scale"], recipe["keys"]["s"],
                                  recipe["kv_cache"]))
                # The recorded recipe makes the same folder again.
                path = self.tmp / f"{preset}.json"
                path.write_text(json.dumps(recipe))
                fireq("quantize", self.random(), "-o", self.tmp / f"again-{preset}", "--recipe", path, *text, "--quiet")
                self.assert_same_folder(source, self.tmp / f"again-{preset}")

    def test_logits_follow(self):
        """The oracle's forward pass on what vLLM multiplies: norms rounded to BF16 are all that differs."""
        source = self.quantised("vllm-fast", self.random(), "--preset", "fast", "--for", "vllm", *self.calibration())
        out, _ = self.export(source, *SERVE)
        ours, theirs = oracle.Model(source), oracle.Model(source)
        tensors = read_tensors(out)
        for i in range(ours.config.layers):
            for name in oracle.LINEARS:
                full = f"model.layers.{i}.{name}"
                operands, channel = em.load_in_vllm(em.unpack_int32(tensors[full + ".weight_packed"][1]),
                                                    tensors[full + ".weight_scale"][1])
                theirs.linear[i][name] = (operands.astype(np.float32), channel)
        ids = np.fromfile(self.tokens(), "<u4")[:64]
        np.testing.assert_array_equal(ours.logits(ids, activations="fp8"), theirs.logits(ids, activations="fp8"))
        for i in range(ours.config.layers):
            theirs.norms[i] = tuple(em.from_bits(tensors[f"model.layers.{i}.{n}_layernorm.weight"][1])
                                    for n in ("input", "post_attention"))
        a, b = ours.logits(ids, activations="fp8"), theirs.logits(ids, activations="fp8")
        self.assertGreater(np.linalg.norm(a - b), 0)
        self.assertLess(np.linalg.norm(a - b), np.linalg.norm(a - ours.logits(ids)), "less than FP8 activations cost")

    def test_linears_that_do_not_fit(self):
        """A real model, of which only the MLP has multiples of 128."""
        model = em.padded_stories(self.tmp / "model")
        source = self.tmp / "packed"
        fireq("quantize", model, "-o", source, "--preset", "fast", "--for", "vllm", "--text", TINY, "--skip-chars", 300000, "--max-chars",
              20000, "--samples", 4, "--length", 128, "--quiet")
        out = self.tmp / "out"
        result = fireq("export", source, "-o", out, *SERVE)
        plain = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(6) for n in "qkvo"]
        self.assertRegex(result.err, r"fireq: warning: 24 linears .*model\.layers\.0\.self_attn\.q_proj.*128")
        self.check_served(source, out, plain)
        for path in model.iterdir():
            if path.name.startswith("tokenizer"):
                self.assertEqual(path.read_bytes(), (out / path.name).read_bytes())

    def test_what_vllm_fuses_stays_together(self):
        """kv rows of 64: q fits and is plain all the same, since vLLM holds q, k and v as one."""
        model = em.random_llama(self.tmp / "model", 30, kv_heads=1)
        source = self.tmp / "packed"
        fireq("quantize", model, "-o", source, "--preset", "rtn", "--quiet")
        out, report = self.export(source, *SERVE)
        plain = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkv"]
        self.assertEqual((plain, 8), (report["plain"], report["linears"]))
        self.check_served(source, out, plain)

    def test_biases_and_untied_heads(self):
        model = em.random_llama(self.tmp / "model", 31)
        tensors = read_tensors(model)
        rng = np.random.default_rng(32)
        for i in range(2):
            for n, rows in (("q", 256), ("k", 128), ("v", 128)):
                bias = rng.standard_normal(rows).astype(np.float32)
                tensors[f"model.layers.{i}.self_attn.{n}_proj.bias"] = ("F32", bias)
        tensors["lm_head.weight"] = ("F16", rng.standard_normal((384, 256)).astype(np.float16))
        write_safetensors(model / "model.safetensors", tensors)
        config = json.loads((model / "config.json").read_text())
        config.update(model_type="qwen2", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False)
        config["dtype"] = config.pop("torch_dtype")  # as transformers 5 writes it
        (model / "config.json").write_text(json.dumps(config))
        source = self.tmp / "packed"
        fireq("quantize", model, "-o", source, "--preset", "rtn", "--for", "vllm", "--quiet")
        out, _ = self.export(source, *SERVE)
        after = json.loads((out / "config.json").read_text())
        self.assertEqual("bfloat16", after["dtype"])
        self.assertNotIn("torch_dtype", after)
        tensors = read_tensors(out)
        self.assertEqual("BF16", tensors["lm_head.weight"][0])
        self.assertEqual("BF16", tensors["model.layers.1.self_attn.k_proj.bias"][0])
        self.assertEqual(2 * (2 + 7 * 3 + 3) + 3, len(tensors))

    def test_refuses_levels_that_are_no_integers(self):
        source = self.quantised("fast", self.random(), "--preset", "fast", *self.calibration())
        refused("export", source, "-o", self.tmp / "out", *SERVE, "--quiet", code=USAGE,
                parts=["integer levels", "expected levels int4", "found levels normal", "fireq quantize", "--for vllm"])
        refused("export", source, "-o", self.tmp / "out", *SERVE, "--requantize", "--quiet", code=USAGE,
                parts=["integer levels"])
        self.assertEqual([], list(self.tmp.iterdir()))

    def test_refuses_scales_that_vllm_changes(self):
        """Per-tensor scales, and searched ones: refused with the count; --requantize exports and measures."""
        recipe = self.tmp / "recipe.json"
        recipe.write_text('{"preset": "fast", "weights": {"levels": "int4"}, "keys": {"s": false}, "kv_cache": false}')
        for name, args in (("paper", ("--preset", "paper")), ("searched", ("--recipe", recipe))):
            with self.subTest(name):
                source = self.quantised(name, self.random(), *args, *self.calibration())
                model = oracle.Model(source)
                rows, changed = 0, {}
                for full, packed in model.packed.items():
                    scale = em.round_product(em.E4M3[packed.sigma_bytes],
                                             np.broadcast_to(packed.r, packed.rows)[:, None])
                    operands, channel = em.load_in_vllm(em.integers(packed), scale)
                    own = packed.operands() * np.broadcast_to(packed.r, packed.rows)[:, None]
                    theirs = operands * channel.astype(np.float64)[:, None]
                    differs = np.any(own != theirs, axis=1).sum()
                    if differs:
                        rows += differs
                        changed[full] = np.sqrt(((own - theirs) ** 2).sum() / (own**2).sum())
                self.assertGreater(rows, 100)
                refused("export", source, "-o", self.tmp / "no", *SERVE, "--quiet", code=USAGE,
                        parts=[f"{rows} other rows in {len(changed)} linears", next(iter(changed)), "--for vllm",
                               "--requantize"])
                self.assertFalse((self.tmp / "no").exists() or (self.tmp / "no.fireq-partial").exists())
                out, report = self.export(source, *SERVE, "--requantize", name=name)
                self.check(source, out)
                self.assertEqual(set(changed), {c["name"] for c in report["changed"]})
                for entry in report["changed"]:
                    self.assertAlmostEqual(changed[entry["name"]], entry["rel_error"], delta=1e-12)
                    self.assertTrue(0 < entry["rel_error"] < 0.1)
                self.assertEqual(rows, sum(c["rows"] for c in report["changed"]))

    def test_smoothing_after_rope_is_left_out_aloud(self):
        recipe = self.tmp / "recipe.json"
        recipe.write_text('{"preset": "rtn", "keys": {"n": true, "s": true}}')
        source = self.tmp / "packed"
        fireq("quantize", self.random(), "-o", source, "--recipe", recipe, *self.calibration(), "--quiet")
        result = fireq("export", source, "-o", self.tmp / "out", *SERVE, "--quiet")
        self.assertRegex(result.err, r"warning: not exported: k_post_rope_scale \(S\) of 2 layers")
        self.assertRegex(result.err, r"warning: not exported: the INT4 KV cache")
        self.check_served(source, self.tmp / "out")

    def test_refuses_a_model_without_one_fitting_linear(self):
        source = self.quantised("stories15M", STORIES_15M, "--preset", "rtn")
        refused("export", source, "-o", self.tmp / "out", *SERVE, "--quiet", code=USAGE,
                parts=[source, "multiples of 128", "q_proj [288, 288]", "gate_proj [768, 288]", "hf-dequantized"])
        self.assertEqual([], list(self.tmp.iterdir()))


class Dequantised(Export):
    def check(self, source, out, dtype):
        model, before = em.read_model(source)
        after = read_tensors(out)
        expected = {}
        for name, packed in model.packed.items():
            expected[name + ".weight"] = em.in_dtype(em.dequantised(packed), dtype)
        for name, (stored, array) in before.items():
            if ".weight_" in name or name.endswith(("k_post_rope_scale", "k_post_rope_shift", "k_rounding", "v_rounding")):
                continue
            expected[name] = (stored, array)  # as it is, folded norms in F32
        self.assertEqual(set(expected), set(after))
        for name, (stored, array) in expected.items():
            self.assertEqual(stored, after[name][0], name)
            self.assertEqual((array.shape, array.tobytes()), (after[name][1].shape, after[name][1].tobytes()), name)
        config = json.loads((source / "config.json").read_text())
        del config["quantization_config"]
        config["torch_dtype"] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype]
        self.assertEqual(config, json.loads((out / "config.json").read_text()))

    def test_values_of_every_preset_and_type(self):
        for preset in ("rtn", "paper", "fast"):
            text = () if preset == "rtn" else CALIBRATE_260K
            source = self.quantised(preset, STORIES_260K, "--preset", preset, *text)
            for dtype in ("bf16", "f16", "f32"):
                with self.subTest(preset=preset, dtype=dtype):
                    default = () if dtype == "bf16" else ("--dtype", dtype)
                    out, report = self.export(source, *PLAIN, *default, name=f"{preset}-{dtype}")
                    self.check(source, out, dtype)
                    self.assertEqual((35, [], [], 0), tuple(report[k] for k in ("linears", "plain", "changed", "warnings")))
                    self.assertEqual(preset != "rtn", any("k_post_rope_scale" in what for what in report["left_out"]))
                    files = {p.name for p in source.iterdir()} - {"calibration.h5", "README.md"} | {"fireq-export.json"}
                    self.assertEqual(files, {p.name for p in out.iterdir()})
                    for name in files - {"config.json", "model.safetensors", "fireq-export.json"}:
                        self.assertEqual((source / name).read_bytes(), (out / name).read_bytes(), name)

    def test_perplexity_is_that_of_the_packed_weights(self):
        """fireq reads the export as a plain model: S has cancelled, the norms are the folded ones. What is left is the
        rounding of the values to the type: 8 bits in BF16, 11 in F16."""
        text = ("--text", TINY, "--skip-chars", 50000, "--max-chars", 12000, "--ctx", 256)
        for preset in ("rtn", "fast"):
            source = self.quantised("15M-" + preset, STORIES_15M, "--preset", preset,
                                    *(() if preset == "rtn" else ("--text", TINY, "--skip-chars", 300000, "--max-chars",
                                                                  20000, "--samples", 8, "--length", 128)))
            packed = fireq_json("eval", source, *text, *FP)
            original = fireq_json("eval", STORIES_15M, *text)
            self.assertGreater(abs(packed["nll_per_token"] - original["nll_per_token"]), 0.02)
            for dtype, tolerance in (("bf16", 2e-3), ("f16", 2e-4), ("f32", 1e-5)):
                with self.subTest(preset=preset, dtype=dtype):
                    out, _ = self.export(source, *PLAIN, "--dtype", dtype, name=f"{preset}-{dtype}")
                    plain = fireq_json("eval", out, *text)
                    self.assertEqual("original", plain["precision"]["weights"])
                    self.assertLess(abs(plain["ppl"] / packed["ppl"] - 1), tolerance, (plain["ppl"], packed["ppl"]))

    def test_every_family(self):
        """Biases, QK-norm, fused sources, sliding windows, stored heads: the same logits as the packed folder."""
        for name in ("llama-bias-bf16", "llama-fused-bf16", "llama-tied-head-stored-bf16", "mistral-window-bf16",
                     "qwen2-window-f16", "qwen3-bf16", "llama-rope-llama3-bf16"):
            with self.subTest(name):
                model = DATA / "tiny" / name
                source = self.quantised(name, model, "--preset", "fast", "--tokens", model / "ids.u32", "--samples", 2,
                                        "--length", 64)
                out, _ = self.export(source, *PLAIN, "--dtype", "f32", name=name)
                text = ("--tokens", model / "ids.u32", "--ctx", 80)
                packed, plain = fireq_json("eval", source, *text, *FP), fireq_json("eval", out, *text)
                self.assertAlmostEqual(packed["nll_per_token"], plain["nll_per_token"], delta=2e-5)

    def test_a_value_out_of_range_is_refused(self):
        model = em.random_llama(self.tmp / "model", 40, awkward=False)
        tensors = {n: (d, a.copy()) for n, (d, a) in read_tensors(model).items()}
        tensors["model.layers.1.mlp.up_proj.weight"][1][7, 9] = em.bf16_bits(np.float32([1e5]))[0]
        write_safetensors(model / "model.safetensors", tensors)
        source = self.tmp / "packed"
        fireq("quantize", model, "-o", source, "--preset", "rtn", "--quiet")
        refused("export", source, "-o", self.tmp / "out", *PLAIN, "--dtype", "f16", "--quiet", code=INPUT,
                parts=[source, "model.layers.1.mlp.up_proj", "out of the range", "F16", "--dtype bf16"])
        self.assert_nothing_published(self.tmp / "out")
        fireq("export", source, "-o", self.tmp / "out", *PLAIN, "--restart", "--quiet")


class Writing(Export):
    def test_shards_threads_and_layouts_change_nothing(self):
        source = self.quantised("rtn", self.random(), "--preset", "rtn")
        tiles = self.quantised("sm90", self.random(), "--preset", "rtn", "--layout", "sm90")
        for form in (SERVE, PLAIN):
            with self.subTest(form):
                one, _ = self.export(source, *form, "--threads", 1, name="one" + form[1])
                two, _ = self.export(tiles, *form, "--threads", 2, name="two" + form[1])
                self.assert_same_folder(one, two)
                cut, _ = self.export(source, *form, "--shard-size", "300kB", name="cut" + form[1])
                self.assertGreater(len(shards(cut)), 2)
                index = json.loads((cut / "model.safetensors.index.json").read_text())
                places = {name: path.name for path in shards(cut) for name in read_header(path)[0]
                          if name != "__metadata__"}
                self.assertEqual(places, index["weight_map"])
                a, b = read_tensors(one), read_tensors(cut)
                self.assertEqual(set(a), set(b))
                for name, (dtype, array) in a.items():
                    self.assertEqual((dtype, array.tobytes()), (b[name][0], b[name][1].tobytes()), name)

    def test_existing_outputs(self):
        source = self.quantised("rtn", self.random(), "--preset", "rtn")
        out, _ = self.export(source, *SERVE)
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        refused("export", source, "-o", out, *PLAIN, "--quiet", code=USAGE, parts=[out, "exists", "--force"])
        self.assertEqual(before, {p.name: p.read_bytes() for p in out.iterdir()})
        fireq("export", source, "-o", out, *PLAIN, "--force", "--quiet")
        self.assertNotIn("quantization_config", json.loads((out / "config.json").read_text()))
        self.assertEqual([out.name], [p.name for p in self.tmp.iterdir()])
        # Somebody's model is not ours to replace; nor is the source.
        other = copy_model(STORIES_260K, self.tmp / "other")
        refused("export", source, "-o", other, *PLAIN, "--force", "--quiet", code=USAGE, parts=[other, "--force"])
        refused("export", source, "-o", source, *PLAIN, "--force", "--quiet", code=USAGE, parts=["is the input"])
        refused("export", source, "-o", source / "inside", *PLAIN, "--quiet", code=USAGE, parts=["inside"])
        refused("export", source, "-o", self.tmp / "no" / "out", *PLAIN, "--quiet", code=USAGE, parts=["does not exist"])

    def test_provenance(self):
        source = self.quantised("rtn", self.random(), "--preset", "rtn")
        out, report = self.export(source, *SERVE)
        record = parse_json(out / "fireq-export.json")
        quantization = json.loads((source / "config.json").read_text())["quantization_config"]
        self.assertEqual("compressed-tensors", record["format"])
        self.assertEqual(quantization["recipe"], record["recipe"])
        self.assertEqual(quantization["source"], record["source"])
        self.assertEqual(report["left_out"], record["left_out"])

    def test_a_full_disk_and_resume(self):
        source = self.quantised("vllm-rtn", self.random(), "--preset", "rtn", "--for", "vllm")
        whole, _ = self.export(source, *SERVE)
        with tmpfs("700k", self.tmp / "small") as small:
            refused("export", source, "-o", small / "out", *SERVE, "--quiet", code=ENVIRONMENT, parts=["space"])
            self.assert_nothing_published(small / "out")
            refused("export", source, "-o", small / "out", *SERVE, "--quiet", code=USAGE, parts=["--resume", "--restart"])
            subprocess.run(["mount", "-o", "remount,size=8M", str(small)], check=True)
            refused("export", source, "-o", small / "out", *PLAIN, "--resume", "--quiet", code=INPUT,
                    parts=["another recipe"])
            report = fireq_json("export", source, "-o", small / "out", *SERVE, "--resume")
            self.assertGreaterEqual(report["resumed_layers"], 1)
            self.assert_same_folder(whole, small / "out")
            self.assertEqual(["out"], [p.name for p in small.iterdir()])

    def test_memory_is_about_one_layer(self):
        """12 layers of 4.2 million weights: 0.1 GB as BF16, of which at most a few layers are in memory."""
        if sanitized():
            self.skipTest("memory says nothing under a sanitizer")
        model = em.random_llama(self.tmp / "model", 50, hidden=512, ffn=2048, heads=8, kv_heads=8, layers=12)
        fireq("quantize", model, "-o", self.tmp / "packed", "--preset", "rtn", "--quiet")
        shutil.rmtree(model)
        layer = 2 * (4 * 512 * 512 + 3 * 512 * 2048)
        for form in (PLAIN, SERVE):
            with self.subTest(form):
                out = self.tmp / ("out" + form[1])
                # From a small process: a child's peak begins with that of the process it was forked from.
                program = ("import resource, subprocess, sys\nsubprocess.run(sys.argv[1:], check=True)\n"
                           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
                command = arguments(("export", self.tmp / "packed", "-o", out, *form, "--quiet"))
                done = subprocess.run([sys.executable, "-c", program, *command], env=environment(), check=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                peak = int(done.stdout) * 1024
                written = sum(p.stat().st_size for p in shards(out))
                print(f"peak {peak / 1e6:.0f} MB for {written / 1e6:.0f} MB, a layer {layer / 1e6:.1f} MB", end=" ")
                self.assertLess(peak, 40e6 + 4 * layer)
                shutil.rmtree(out)


class Usage(Export):
    def test_arguments(self):
        source = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        out = ("-o", self.tmp / "out")
        refused("export", source, *out, "--quiet", code=USAGE, parts=["--format"])
        refused("export", source, *PLAIN, "--quiet", code=USAGE, parts=["-o"])
        refused("export", source, *out, "--format", "gguf", "--quiet", code=USAGE, parts=["gguf", "compressed-tensors"])
        refused("export", source, *out, *PLAIN, "--dtype", "f64", "--quiet", code=USAGE, parts=["--dtype", "f64"])
        refused("export", source, *out, *SERVE, "--dtype", "f32", "--quiet", code=USAGE, parts=["--dtype", "bf16", "f32"])
        refused("export", source, *out, *PLAIN, "--requantize", "--quiet", code=USAGE, parts=["--requantize"])
        refused("export", source, *out, *PLAIN, "--shard-size", "0", "--quiet", code=USAGE, parts=["size"])
        refused("export", source, *out, *PLAIN, "--resume", "--restart", "--quiet", code=USAGE, parts=["exclude"])
        refused("export", STORIES_260K, *out, *PLAIN, "--quiet", code=USAGE,
                parts=["not a FireQ folder", "fireq quantize"])
        refused("export", self.tmp / "nowhere", *out, *PLAIN, "--quiet", code=USAGE, parts=["nowhere"])
        self.assertEqual([], list(self.tmp.iterdir()))

    def test_recipes_for_vllm(self):
        """Keys that vLLM cannot run are refused by name; so are a preset's that a recipe contradicts."""
        path, out = self.tmp / "recipe.json", self.tmp / "out"
        for text, parts in (('{"preset": "fast", "weights": {"levels": "normal"}}', ["weights.levels", "int4", "normal"]),
                            ('{"preset": "fast", "weights": {"row_scale": "tensor"}}', ["weights.row_scale"]),
                            ('{"preset": "fast", "keys": {"s": true}}', ["keys.s"]),
                            ('{"preset": "best", "curvature": {"kv_stream": true}}', ["curvature.kv_stream"]),
                            ('{"kv_cache": true}', ["kv_cache"])):
            with self.subTest(text):
                path.write_text(text)
                refused("quantize", STORIES_260K, "-o", out, "--recipe", path, "--for", "vllm", *CALIBRATE_260K,
                        "--quiet", code=USAGE, parts=["recipe.json", "vLLM", *parts])
                path.write_text(text.replace("{", '{"for": "vllm", ', 1))
                refused("quantize", STORIES_260K, "-o", out, "--recipe", path, *CALIBRATE_260K, "--quiet", code=USAGE,
                        parts=["recipe.json", "vLLM", *parts])
        path.write_text('{"for": "llama.cpp"}')
        refused("quantize", STORIES_260K, "-o", out, "--recipe", path, "--quiet", code=USAGE, parts=["'for'", "vllm"])
        path.write_text('{"for": "fireq"}')
        refused("quantize", STORIES_260K, "-o", out, "--recipe", path, "--for", "vllm", "--quiet", code=USAGE,
                parts=["--for", "different"])
        refused("quantize", STORIES_260K, "-o", out, "--levels", "normal", "--for", "vllm", "--preset", "rtn", "--quiet",
                code=USAGE, parts=["weights.levels"])
        self.assertEqual([path], list(self.tmp.iterdir()))
        # N is folded into weights: vLLM runs it.
        path.write_text('{"preset": "rtn", "keys": {"n": true}}')
        fireq("quantize", STORIES_260K, "-o", out, "--recipe", path, "--for", "vllm", *CALIBRATE_260K, "--quiet")
        self.assertFalse([n for n in read_tensors(out) if "k_post_rope_scale" in n])


if __name__ == "__main__":
    main()
