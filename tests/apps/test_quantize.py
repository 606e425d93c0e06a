"""fireq quantize: what is in the folder it writes, against docs/checkpoint-format.md and docs/numerics.md."""
import json
import re

import h5py
import numpy as np

import oracle
from harness import (CALIBRATE_260K, INPUT, ROOT, STORIES_15M, STORIES_260K, STORIES_260K_BF16, TINY, USAGE, TestCase,
                     copy_model, digest, fireq, fireq_json, main, read_header, read_tensors, refused, shards,
                     write_safetensors)

COPIED = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
SITES = {"attn_in", "q", "k_pre_rope", "k_post_rope", "v", "o_in", "mlp_in", "down_in"}


class Folder(TestCase):
    """Every preset on every small model: names, dtypes, shapes, rules, and what is copied."""

    def check(self, source, out, calibrated, folded):
        config = json.loads((out / "config.json").read_text())
        quantization = config.pop("quantization_config")
        self.assertEqual(json.loads((source / "config.json").read_text()), config, "the source's config, untouched")
        self.assertEqual("fireq", quantization["quant_method"])
        self.assertEqual(1, quantization["format_version"])
        self.assertEqual(128, quantization["group_size"])
        self.assertEqual("row", quantization["layout"])
        self.assertEqual({"bits": 4, "scale": "e4m3", "granularity": "token_head"},
                         {k: quantization["kv_cache"][k] for k in ("bits", "scale", "granularity")})
        self.assertEqual({"dtype": "e4m3", "granularity": "token", "dynamic": True}, quantization["activations"])
        self.assertIsInstance(quantization["recipe"], dict)
        model = oracle.Model(out)  # checks each packed linear's dtypes, shapes and rules
        self.assertEqual(7 * model.config.layers, len(model.packed))

        before, after = read_tensors(source), read_tensors(out)
        linears = {name + ".weight" for name in model.packed}
        self.assertLessEqual(linears, set(before))
        parts = ("weight_codes", "weight_group_scale", "weight_row_scale", "weight_shape")
        expected = (set(before) - linears) | {f"{name}.{part}" for name in model.packed for part in parts}
        recipe = json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]
        s = {f"model.layers.{i}.self_attn.{name}" for i in range(model.config.layers)
             for name, used in (("k_post_rope_scale", recipe["keys"]["s"]), ("k_post_rope_shift", recipe["keys"]["centre"]),
                                ("k_rounding", recipe["keys"]["together"]), ("v_rounding", recipe["values"]["together"]))
             if used}
        self.assertEqual(expected | (s if calibrated else set()), set(after))
        for name in set(before) - linears:
            if folded and name.endswith("post_attention_layernorm.weight"):
                self.assertEqual("F32", after[name][0], name)
            else:
                self.assertEqual(before[name][0], after[name][0], name)
                self.assertEqual(before[name][1].tobytes(), after[name][1].tobytes(), name)

        files = {p.name for p in out.iterdir()}
        copied = {name for name in COPIED if (source / name).exists()}
        for name in copied:
            self.assertEqual((source / name).read_bytes(), (out / name).read_bytes(), name)
        weights = {p.name for p in shards(out)}
        self.assertEqual({"model.safetensors"}, weights)
        card = (out / "README.md").read_text()
        quantization = json.loads((out / "config.json").read_text())["quantization_config"]
        self.assertEqual(json.loads(re.search(r"```json\n(.*?)```", card, re.S)[1]), quantization["recipe"])
        self.assertIn(f"preset `{quantization['recipe']['preset']}`", card)
        own = {"config.json", "README.md"} | ({"calibration.h5"} if calibrated else set())
        self.assertEqual(copied | weights | own, files)
        self.assertEqual([], [p.name for p in out.parent.iterdir() if p.name.startswith(out.name + ".")])

        # No trace of where and when.
        for path in (out / "config.json", *shards(out)):
            text = path.read_text() if path.suffix == ".json" else json.dumps(read_header(path)[0])
            self.assertNotIn(str(out.parent), text, path)
            self.assertNotRegex(text, r"20[2-9]\d-[01]\d", path)
        return model, quantization

    def test_rtn(self):
        for source in (STORIES_260K, STORIES_260K_BF16, STORIES_15M):
            with self.subTest(source.name):
                out = self.quantised("rtn-" + source.name, source, "--preset", "rtn")
                _, quantization = self.check(source, out, calibrated=False, folded=False)
                self.assertEqual("int4", quantization["levels"])
                self.assertEqual("row", quantization["row_scale"])

    def test_paper(self):
        for source in (STORIES_260K, STORIES_260K_BF16):
            with self.subTest(source.name):
                out = self.quantised("paper-" + source.name, source, "--preset", "paper", *CALIBRATE_260K)
                model, quantization = self.check(source, out, calibrated=True, folded=True)
                self.assertEqual("int4", quantization["levels"])
                self.assertEqual("tensor", quantization["row_scale"])
                for packed in model.packed.values():
                    inverse = 1 / packed.r[0]
                    self.assertEqual(inverse, 2.0**round(np.log2(inverse)), "s is a power of two")
                    self.assertTrue(1 <= inverse <= 2**14)

    def test_fast(self):
        for source in (STORIES_260K, STORIES_260K_BF16):
            with self.subTest(source.name):
                out = self.quantised("fast-" + source.name, source, "--preset", "fast", *CALIBRATE_260K)
                _, quantization = self.check(source, out, calibrated=True, folded=True)
                self.assertEqual("row", quantization["row_scale"])
                self.assertEqual({"tokens": 8 * 128, "seed": 0},
                                 {k: quantization["calibration"][k] for k in ("tokens", "seed")})

    def test_calibration_file(self):
        out = self.quantised("paper-stories260K", STORIES_260K, "--preset", "paper", *CALIBRATE_260K)
        with h5py.File(out / "calibration.h5") as f:
            self.assertEqual(5, len(f["layers"]))
            self.assertLessEqual(SITES, set(f["layers/000"]))
            self.assertEqual((4, 4), f["layers/000/k_pair_radius"].shape)

    def test_sm90_layout_holds_the_same_model(self):
        row = self.quantised("rtn-stories260K", STORIES_260K, "--preset", "rtn")
        sm90 = self.quantised("sm90", STORIES_260K, "--preset", "rtn", "--layout", "sm90")
        tensors = read_tensors(sm90)
        self.assertEqual((1, 2, 8320), tensors["model.layers.0.mlp.down_proj.weight_tiles"][1].shape)
        self.assertFalse([name for name in tensors if name.endswith("weight_codes")])
        evaluate = ("--text", TINY, "--max-chars", 4000, "--ctx", 128)
        a, b = (fireq_json("eval", folder, *evaluate) for folder in (row, sm90))
        self.assertEqual(a["nll_per_token"], b["nll_per_token"])


class Rounding(TestCase):
    """The codes themselves, against numpy."""

    def test_rtn_follows_the_definition(self):
        for source in (STORIES_260K, STORIES_15M):
            model = oracle.Model(self.quantised("rtn-" + source.name, source, "--preset", "rtn"))
            original = read_tensors(source)
            different = total = 0
            for name, packed in model.packed.items():
                weight = oracle.to_float(*original[name + ".weight"])
                codes, sigma, r = oracle.quantise_rtn_rows(weight)
                np.testing.assert_array_equal(packed.r, r, name)
                # A division in FP32 or in FP64 may fall on either side of a halfway point, rarely.
                same = sigma == oracle.E4M3[packed.sigma_bytes]
                self.assertGreater(same.mean(), 0.999, name)
                keep = np.repeat(same, oracle.GROUP, axis=1)
                different += (codes != packed.codes)[keep].sum()
                total += keep.sum()
            self.assertLess(different / total, 1e-4)

    def test_rtn_error_is_what_rounding_costs(self):
        model = oracle.Model(self.quantised("rtn-stories15M", STORIES_15M, "--preset", "rtn"))
        original = read_tensors(STORIES_15M)
        for name, packed in model.packed.items():
            w = oracle.to_float(*original[name + ".weight"]).astype(np.float64)
            mse = ((packed.weights() - w)**2).sum() / (w**2).sum()
            # numerics.md: 0.0141 for a Gaussian; trained weights differ a little.
            self.assertTrue(0.008 < mse < 0.03, (name, mse))

    def test_smoothing_does_not_change_the_function(self):
        """Folds undone in numpy: the packed weights stand near the original ones, channel by channel."""
        model = oracle.Model(self.quantised("fast-stories260K", STORIES_260K, "--preset", "fast", *CALIBRATE_260K))
        before, after = read_tensors(STORIES_260K), model.tensors
        for i in range(model.config.layers):
            prefix = f"model.layers.{i}."
            norm = prefix + "post_attention_layernorm.weight"
            lambda2 = oracle.to_float(*before[norm]) / oracle.to_float(*after[norm])
            gate = oracle.to_float(*before[prefix + "mlp.gate_proj.weight"]) * lambda2
            self.assert_close(model.packed[prefix + "mlp.gate_proj"].weights(), gate)
            down = oracle.to_float(*before[prefix + "mlp.down_proj.weight"])
            lambda3 = 0.015 / np.abs(down).mean(axis=0)
            lambda3 = np.clip(lambda3, np.median(lambda3) / 256, np.median(lambda3) * 256)
            up = oracle.to_float(*before[prefix + "mlp.up_proj.weight"]) * lambda2 / lambda3[:, None]
            self.assert_close(model.packed[prefix + "mlp.up_proj"].weights(), up)
            self.assert_close(model.packed[prefix + "mlp.down_proj"].weights(), down * lambda3)
            # Lambda 2's constant: each column of up and gate has mean magnitude 0.0096.
            both = np.abs(np.concatenate([before[prefix + f"mlp.{n}_proj.weight"][1] for n in ("gate", "up")]))
            np.testing.assert_allclose(lambda2, 0.0096 / both.astype(np.float64).mean(axis=0), rtol=2e-3)
            # Lambda 1: one for the columns of o that a channel of v feeds.
            c = model.config
            o = oracle.to_float(*before[prefix + "self_attn.o_proj.weight"])
            of_channel = np.abs(o).astype(np.float64).reshape(c.hidden, c.kv_heads, -1, c.head_dim).mean(axis=(0, 2))
            lambda1 = 0.0096 / of_channel
            columns = np.repeat(lambda1, c.heads // c.kv_heads, axis=0).reshape(-1)
            self.assert_close(model.packed[prefix + "self_attn.o_proj"].weights(), o * columns)
            v = oracle.to_float(*before[prefix + "self_attn.v_proj.weight"]) / lambda1.reshape(-1, 1)
            self.assert_close(model.packed[prefix + "self_attn.v_proj"].weights(), v)

    def assert_close(self, packed, reference):
        error = np.linalg.norm(packed - reference) / np.linalg.norm(reference)
        self.assertLess(error, 0.16)

    def test_n_and_s_from_the_statistics(self):
        out = self.quantised("paper-stories260K", STORIES_260K, "--preset", "paper", *CALIBRATE_260K)
        model, before = oracle.Model(out), read_tensors(STORIES_260K)
        c = model.config
        half = c.head_dim // 2
        with h5py.File(out / "calibration.h5") as f:
            for i in range(c.layers):
                radius = f[f"layers/{i:03}/k_pair_radius"][:]
                absmax = f[f"layers/{i:03}/k_post_rope/absmax"][:].reshape(c.kv_heads, c.head_dim)
                top_k = max(1, round(c.head_dim / 16))
                s = np.ones((c.kv_heads, c.head_dim))
                n = np.concatenate([8 / radius, 8 / radius], axis=1)
                for h in range(c.kv_heads):
                    top = np.argsort(-absmax[h], kind="stable")[:top_k]
                    touched = sorted({j for t in top for j in (t, (t + half) % c.head_dim)})
                    s[h, touched] = 8 / absmax[h, touched]
                    n[h, touched] = 1
                np.testing.assert_allclose(model.s[i], s, rtol=1e-6)
                key = oracle.to_float(*before[f"model.layers.{i}.self_attn.k_proj.weight"]) * n.reshape(-1, 1)
                query_n = np.repeat(n, c.heads // c.kv_heads, axis=0).reshape(-1, 1)
                query = oracle.to_float(*before[f"model.layers.{i}.self_attn.q_proj.weight"]) / query_n
                self.assert_close(model.packed[f"model.layers.{i}.self_attn.k_proj"].weights(), key)
                self.assert_close(model.packed[f"model.layers.{i}.self_attn.q_proj"].weights(), query)

    def test_levels_from_a_file_and_by_name(self):
        path = self.tmp / "levels.json"
        levels = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        path.write_text(json.dumps(levels))
        out = self.quantised("e2m1", STORIES_260K, "--preset", "rtn", "--levels", path)
        self.assertEqual(levels, json.loads((out / "config.json").read_text())["quantization_config"]["levels"])
        oracle.Model(out)
        normal = oracle.Model(self.quantised("normal", STORIES_260K, "--preset", "rtn", "--levels", "normal"))
        got = next(iter(normal.packed.values())).levels
        self.assertEqual(8, got[-1])
        self.assertGreater(got[0], 0)
        # Phi^-1 by the error function of numpy's own normal quantile is not there: check the definition backwards.
        from statistics import NormalDist
        expected = [NormalDist().inv_cdf(0.5 + (i + 0.5) / 7.5 * 0.4677) for i in range(8)]
        np.testing.assert_allclose(got, np.array(expected) / expected[-1] * 8, rtol=1e-6)

    def test_bad_levels_are_refused(self):
        for text in ("[0,1,2,3,4,5,6]", "[0,1,2,3,4,5,6,6]", "[-1,1,2,3,4,5,6,7]", "[0,1,2,3,4,5,6,449]", "{}", "[1,"):
            with self.subTest(text):
                (self.tmp / "levels.json").write_text(text)
                refused("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "rtn", "--levels",
                        self.tmp / "levels.json", "--quiet", code=None, parts=["levels"])
                self.assert_nothing_published(self.tmp / "out")


class Recipes(TestCase):
    def test_a_saved_recipe_gives_the_same_folder(self):
        out = self.quantised("paper", STORIES_260K, "--preset", "paper", *CALIBRATE_260K)
        recipe = json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]
        (self.tmp / "recipe.json").write_text(json.dumps(recipe))
        again = self.tmp / "again"
        fireq("quantize", STORIES_260K, "-o", again, "--recipe", self.tmp / "recipe.json", "--quiet", *CALIBRATE_260K)
        self.assert_same_folder(out, again)

    def test_every_key_of_a_recipe_is_in_the_manual(self):
        out = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        recipe = json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]
        manual = (ROOT / "docs/recipes.md").read_text()
        for key, value in recipe.items():
            for name in ([f"{key}.{k}" for k in value] if isinstance(value, dict) else [key]):
                self.assertIn(f"`{name}`", manual)

    def test_lambda1(self):
        recipe = self.tmp / "recipe.json"
        recipe.write_text('{"preset": "rtn", "smoothing": {"lambda1": "scalar"}}')
        out = self.tmp / "scalar"
        fireq("quantize", STORIES_260K, "-o", out, "--recipe", recipe, "--quiet")
        model, before = oracle.Model(out), read_tensors(STORIES_260K)
        for name, factor in (("v_proj", 0.9), ("o_proj", 1 / 0.9)):
            full = f"model.layers.2.self_attn.{name}"
            reference = oracle.to_float(*before[full + ".weight"]) * factor
            error = np.linalg.norm(model.packed[full].weights() - reference) / np.linalg.norm(reference)
            self.assertLess(error, 0.16)

    def test_statistics_instead_of_text(self):
        stats = self.tmp / "stats.h5"
        fireq("calibrate", STORIES_260K, "-o", stats, "--quiet", *CALIBRATE_260K)
        out = self.tmp / "out"
        fireq("quantize", STORIES_260K, "-o", out, "--preset", "paper", "--stats", stats, "--quiet")
        # Statistics hold no text to measure on.
        self.assert_same_folder(self.quantised("paper-unmeasured", STORIES_260K, "--preset", "paper", "--no-measure", *CALIBRATE_260K), out)
        before = digest(self.tmp)
        of_another = ("quantize", STORIES_260K_BF16, "-o", self.tmp / "other", "--preset", "paper", "--stats", stats, "--quiet")
        line = refused(*of_another, code=INPUT, parts=["stats.h5", "model"])
        self.assertEqual(line, refused(*of_another, "--dry-run", code=INPUT, parts=["stats.h5", "model"]))
        fireq("quantize", STORIES_260K, "-o", self.tmp / "other", "--preset", "paper", "--stats", stats, "--quiet", "--dry-run")
        self.assertEqual(before, digest(self.tmp))

    def test_text_of_the_models_own_is_on_the_card(self):
        row = re.compile(r"^\| rounded on text that the original wrote itself.* \| (.*) \|$", re.M)
        for own, expected in ((1, "8 windows of 128, 1024 tokens, 50.0 % of all"), (0.25, "2 windows of 128, 256 tokens, 20.0 % of all"),
                              (0, None)):
            with self.subTest(own):
                (self.tmp / "recipe.json").write_text(json.dumps({"preset": "best", "curvature": {"own_text": own, "passes": 0}}))
                out = self.tmp / f"own{own}"
                fireq("quantize", STORIES_260K, "-o", out, "--recipe", self.tmp / "recipe.json", "--quiet", "--no-measure",
                      *CALIBRATE_260K)
                self.assertEqual([expected] if expected else [], row.findall((out / "README.md").read_text()))


class DryRun(TestCase):
    def test_writes_nothing_and_tells_the_truth(self):
        args = (STORIES_260K, "-o", self.tmp / "out", "--preset", "paper", *CALIBRATE_260K)
        plan = fireq_json("quantize", *args, "--dry-run")
        self.assertEqual([], list(self.tmp.iterdir()))
        text = fireq("quantize", *args, "--dry-run").out
        self.assertEqual([], list(self.tmp.iterdir()))
        for word in ("model.layers.0-4.self_attn.q_proj", "embed_tokens", "peak memory", "not quantised"):
            self.assertIn(word, text)
        self.assertLess(text.count("\n"), 25)  # layers that are alike share a line
        mixed = fireq("quantize", *args, "--dry-run", "--ignore", "model.layers.2.*o_proj", "model.layers.4.*o_proj").out
        for layers, precision in (("0-1,3", "int4"), ("2,4", "original")):
            self.assertRegex(mixed, rf"(?m)^model\.layers\.{layers}\.self_attn\.o_proj +64 x 64 +{precision} ")
        fireq("quantize", *args, "--quiet")
        real = sum(array.nbytes for _, array in read_tensors(self.tmp / "out").values())
        self.assertEqual(real, plan["bytes_after"])
        before = sum(array.nbytes for _, array in read_tensors(STORIES_260K).values())
        self.assertEqual(before, plan["bytes_before"])
        kept = {entry["name"] for entry in plan["kept"]}
        linears = {entry["name"] + ".weight" for entry in plan["linears"]}
        self.assertEqual(set(read_tensors(STORIES_260K)), kept | linears)

    def test_dry_run_beside_an_existing_output(self):
        out = self.tmp / "out"
        fireq("quantize", STORIES_260K, "-o", out, "--preset", "rtn", "--quiet")
        before = digest(self.tmp)
        fireq("quantize", STORIES_260K, "-o", out, "--preset", "rtn", "--dry-run", "--force", "--quiet")
        self.assertEqual(before, digest(self.tmp))


class Inputs(TestCase):
    def test_output_is_the_input_or_inside_it(self):
        model = copy_model(STORIES_260K, self.tmp / "model")
        before = digest(model)
        (self.tmp / "link").symlink_to(model)
        for out in (model, model / "out", self.tmp / "link", self.tmp / "link" / "out", model / ".." / "model"):
            for force in ((), ("--force",)):
                with self.subTest(out=out, force=force):
                    refused("quantize", model, "-o", out, "--preset", "rtn", "--quiet", *force, code=USAGE)
                    self.assertEqual(before, digest(model))

    def test_a_fireq_folder_is_not_quantised_again(self):
        packed = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        for dry in ((), ("--dry-run",)):
            refused("quantize", packed, "-o", self.tmp / "out", "--preset", "rtn", "--quiet", *dry, code=USAGE, parts=["already"])
        self.assertEqual([], list(self.tmp.iterdir()))

    def test_nan_and_infinity_are_named(self):
        model = copy_model(STORIES_260K, self.tmp / "model")
        name = "model.layers.3.mlp.up_proj.weight"
        for value, word in ((np.nan, "nan"), (np.inf, "inf"), (-np.inf, "inf")):
            with self.subTest(value):
                tensors = {n: (d, a.copy()) for n, (d, a) in read_tensors(STORIES_260K).items()}
                tensors[name][1][17, 5] = value
                write_safetensors(model / "model.safetensors", tensors)
                line = refused("quantize", model, "-o", self.tmp / "out", "--preset", "rtn", "--quiet", code=INPUT,
                               parts=[name, word])
                self.assertRegex(line, r"17\D+5\b")
                self.assert_nothing_published(self.tmp / "out")
                fireq("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "rtn", "--restart", "--quiet")
                self.assert_same_folder(self.quantised("rtn", STORIES_260K, "--preset", "rtn"), self.tmp / "out")
                fireq("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "rtn", "--force", "--quiet")
                for path in sorted((self.tmp / "out").iterdir()):
                    path.unlink()
                (self.tmp / "out").rmdir()

    def test_bf16_and_f32_sources_agree(self):
        """The same values in another dtype give the same codes."""
        model = copy_model(STORIES_260K_BF16, self.tmp / "f32")
        tensors = {n: ("F32", oracle.to_float(d, a)) for n, (d, a) in read_tensors(STORIES_260K_BF16).items()}
        write_safetensors(model / "model.safetensors", tensors)
        out = self.tmp / "out"
        fireq("quantize", model, "-o", out, "--preset", "rtn", "--quiet")
        a = read_tensors(self.quantised("bf16", STORIES_260K_BF16, "--preset", "rtn"))
        b = read_tensors(out)
        for name in a:
            if re.search(r"weight_(codes|group_scale|row_scale|shape)$", name):
                self.assertEqual(a[name][1].tobytes(), b[name][1].tobytes(), name)

    def test_zero_rows_and_huge_outliers(self):
        model = copy_model(STORIES_260K, self.tmp / "model")
        tensors = {n: (d, a.copy()) for n, (d, a) in read_tensors(STORIES_260K).items()}
        weight = tensors["model.layers.1.self_attn.v_proj.weight"][1]
        weight[3] = 0
        weight[4, 7] = 60000
        tensors["model.layers.1.self_attn.o_proj.weight"][1][:] = 0
        write_safetensors(model / "model.safetensors", tensors)
        for preset, extra in (("rtn", ()), ("paper", CALIBRATE_260K), ("fast", CALIBRATE_260K)):
            with self.subTest(preset):
                fireq("quantize", model, "-o", self.tmp / preset, "--preset", preset, "--quiet", *extra)
                packed = oracle.Model(self.tmp / preset).packed
                v = packed["model.layers.1.self_attn.v_proj"].weights()
                if preset == "paper":  # one scale for the tensor, at most 1: a product saturates at 448
                    self.assertEqual(448, v[4, 7])
                else:
                    self.assertAlmostEqual(v[4, 7], 60000, delta=60000 * 0.07)
                if preset != "fast":
                    self.assertFalse(v[3].any())
                    self.assertFalse(packed["model.layers.1.self_attn.o_proj"].weights().any())


if __name__ == "__main__":
    main()
