"""Choosing precisions: ignore lists, overrides, FP8 linears and tables, the recipe's schema, against numpy."""
import json
import shutil
import unittest

import numpy as np

import export_models as em
import oracle
from harness import (CALIBRATE_260K, INPUT, ROOT, STORIES_260K, STORIES_260K_BF16, TINY, USAGE, TestCase, fireq,
                     fireq_json, main, read_header, read_tensors, refused, shards, write_safetensors)

try:
    import jsonschema
except ImportError:
    jsonschema = None

LAYERS = 5
DELTA = 2e-3
TEXT = ("--text", TINY, "--skip-chars", 2000, "--max-chars", 3000, "--ctx", 128)


def names(layer):
    return [f"model.layers.{layer}.{name}" for name in oracle.LINEARS]


ALL = [name for i in range(LAYERS) for name in names(i)]


class Choosing(TestCase):
    def quantise(self, recipe, *args, model=STORIES_260K, name="out"):
        path = self.tmp / f"{name}.json"
        path.write_text(json.dumps(recipe))
        out = self.tmp / name
        return out, fireq_json("quantize", model, "-o", out, "--recipe", path, *args)

    def kinds(self, out):
        """{module: precision} from the tensors' names and dtypes alone."""
        tensors = read_tensors(out)
        kinds = {}
        for name in [*ALL, "model.embed_tokens", "lm_head"]:
            if name + ".weight_codes" in tensors:
                kinds[name] = "int4"
            elif name + ".weight" in tensors:
                kinds[name] = "fp8" if tensors[name + ".weight"][0] == "F8_E4M3" else "original"
        return kinds

    def check_scores(self, out):
        """eval against the oracle's forward pass, in FP and with FP8 inputs; generate and validate run."""
        model = oracle.Model(out)
        ids = [1] + oracle.SentencePiece(STORIES_260K / "tokenizer.model").encode(
            TINY.read_bytes().decode()[2000:5000])
        # With FP8 inputs another order of summation turns roundings over, to either side.
        for precision, args, delta in (({}, ("--activations", "fp"), 2e-6),
                                       ({"activations": "fp8"}, ("--activations", "fp8"), DELTA)):
            got = fireq_json("eval", out, *TEXT, "--kv", "fp", "--qp", "fp", *args)["nll_per_token"]
            self.assertAlmostEqual(oracle.nll(model, ids, 128, **precision), got, delta=delta)
        checks = {c["name"]: c for c in fireq_json("validate", out, "--reference", STORIES_260K)["linears"]}
        self.assertEqual(set(ALL), set(checks))
        fireq("generate", out, "-p", "Once", "-n", 4)
        fireq("inspect", out)
        return model, checks


class Ignore(Choosing):
    def test_globs_expressions_and_the_command_line(self):
        out = self.tmp / "out"
        report = fireq_json("quantize", STORIES_260K, "-o", out, "--preset", "rtn", "--ignore", "model.layers.0.*",
                            r"re:.*\.[34]\.mlp\.(up|down)_proj$", "lm_head")
        expected = names(0) + [n for n in ALL if n.split(".")[2] in "34" and n.endswith(("up_proj", "down_proj"))]
        kinds = self.kinds(out)
        self.assertEqual(set(expected), {n for n in ALL if kinds[n] == "original"})
        self.assertEqual((len(ALL) - len(expected), 0, len(expected)),
                         (report["linears"], report["fp8_linears"], report["plain_linears"]))
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        self.assertEqual(expected, config["ignore"])
        self.assertNotIn("fp8", config)
        before, after = read_tensors(STORIES_260K), read_tensors(out)
        for name in expected:
            np.testing.assert_array_equal(before[name + ".weight"][1], after[name + ".weight"][1])
        self.check_scores(out)
        # The recorded recipe makes the same folder.
        again, _ = self.quantise(config["recipe"], name="again")
        self.assert_same_folder(out, again)

    def test_folded_linears_are_rounded_to_their_own_type(self):
        out, _ = self.quantise({"preset": "fast", "ignore": ["*down_proj"]}, *CALIBRATE_260K,
                               model=STORIES_260K_BF16)
        tensors, before = read_tensors(out), read_tensors(STORIES_260K_BF16)
        changed = 0
        for name in (n for n in ALL if n.endswith("down_proj")):
            dtype, after = tensors[name + ".weight"]
            self.assertEqual(("BF16", before[name + ".weight"][1].shape), (dtype, after.shape))
            changed += np.count_nonzero(after != before[name + ".weight"][1])
        self.assertGreater(changed, 0)
        checks = fireq_json("validate", out, "--reference", STORIES_260K_BF16)["linears"]
        for check in checks:
            if check["name"].endswith("down_proj"):
                self.assertEqual("original", check["precision"])
                self.assertLess(0, check["rel_error"])
                self.assertLess(check["rel_error"], 2.0**-8)  # half a unit of bf16's 8 bits, at most
        # What was folded still cancels: the model is the better for its plain linears.
        rtn = self.quantised("rtn-fast", STORIES_260K_BF16, "--preset", "fast", *CALIBRATE_260K)
        kl = [fireq_json("eval", f, *TEXT, "--reference", STORIES_260K_BF16, "--kv", "fp")["kl_mean"]
              for f in (out, rtn)]
        self.assertLess(kl[0], kl[1])

    def test_inputs_of_plain_linears_are_not_fp8(self):
        """A model of plain linears alone differs from the original by bf16 roundings, not by FP8's."""
        out, _ = self.quantise({"preset": "rtn", "ignore": ["model.layers.*"]})
        args = (*TEXT, "--reference", STORIES_260K, "--kv", "fp", "--qp", "fp", "--activations", "fp8")
        plain, fp8 = (fireq_json("eval", folder, *args)["kl_mean"] for folder in (out, STORIES_260K))
        self.assertLess(0, plain)
        self.assertLess(10 * plain, fp8)

    def test_what_matches_nothing(self):
        refused("quantize", "-q", STORIES_260K, "-o", self.tmp / "out", "--preset", "rtn", "--ignore",
                "model.layers.0.mlp.dwn_proj", code=USAGE,
                parts=("matches no module", "nearest module is model.layers.0.mlp.down_proj"))
        refused("quantize", "-q", STORIES_260K, "-o", self.tmp / "out", "--preset", "rtn", "--ignore", "re:(",
                code=USAGE, parts=("re:(", "regular expression"))


class Fp8(Choosing):
    def test_linears_and_tables_are_what_numpy_makes(self):
        out, report = self.quantise({"preset": "rtn", "embeddings": "fp8", "overrides": [
            {"match": "model.layers.1.*", "precision": "fp8"}, {"match": "*up_proj", "precision": "original"},
            {"match": "*.2.*.[kv]_proj", "weights": {"levels": "normal", "rounding": "product"}}]})
        kinds = self.kinds(out)
        fp8 = [n for n in names(1) if not n.endswith("up_proj")]
        self.assertEqual(set(fp8) | {"model.embed_tokens"}, {n for n, k in kinds.items() if k == "fp8"})
        self.assertEqual({n for n in ALL if n.endswith("up_proj")}, {n for n, k in kinds.items() if k == "original"})
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        self.assertEqual([*fp8, "model.embed_tokens"], config["fp8"])
        before, after = read_tensors(STORIES_260K), read_tensors(out)
        for name in [*fp8, "model.embed_tokens"]:
            weight = oracle.to_float(*before[name + ".weight"])
            operands, r = oracle.quantise_fp8_rows(weight)
            np.testing.assert_array_equal(r, after[name + ".weight_scale"][1])
            np.testing.assert_array_equal(operands, oracle.E4M3[after[name + ".weight"][1]])
        own_levels = {n[:-len(".weight_levels")] for n in after if n.endswith(".weight_levels")}
        self.assertEqual({"model.layers.2.self_attn.k_proj", "model.layers.2.self_attn.v_proj"}, own_levels)
        model, checks = self.check_scores(out)
        for name in fp8:
            self.assertEqual("fp8", checks[name]["precision"])
            layer, linear = int(name.split(".")[2]), ".".join(name.split(".")[3:])
            operands, r = model.linear[layer][linear]
            weight = oracle.to_float(*before[name + ".weight"]).astype(np.float64)
            error = np.linalg.norm(operands.astype(np.float64) * r[:, None] - weight) / np.linalg.norm(weight)
            self.assertAlmostEqual(error, checks[name]["rel_error"], delta=1e-6)
        # Sizes, as planned and as they are.
        dry = fireq_json("quantize", STORIES_260K, "-o", self.tmp / "none", "--recipe", self.tmp / "out.json",
                         "--dry-run")
        data = sum(a.nbytes for _, a in after.values())
        self.assertEqual((data, data), (report["bytes_after"], dry["bytes_after"]))

    def test_a_head_of_its_own(self):
        model = self.tmp / "untied"
        em.random_llama(model, 5)
        config = json.loads((model / "config.json").read_text())
        tensors = read_tensors(model)
        head = np.random.default_rng(7).standard_normal((config["vocab_size"], config["hidden_size"]))
        config["tie_word_embeddings"] = False
        (model / "config.json").write_text(json.dumps(config))
        for path in shards(model):
            path.unlink()
        write_safetensors(model / "model.safetensors", {**tensors, "lm_head.weight": ("F32", head.astype("<f4"))})
        out, _ = self.quantise({"preset": "rtn", "head": "fp8"}, model=model)
        after = read_tensors(out)
        operands, r = oracle.quantise_fp8_rows(head.astype(np.float32))
        np.testing.assert_array_equal(operands, oracle.E4M3[after["lm_head.weight"][1]])
        np.testing.assert_array_equal(r, after["lm_head.weight_scale"][1])
        self.assertEqual("BF16", after["model.embed_tokens.weight"][0])
        ids = em.random_tokens(self.tmp / "ids.u32", 3, 512, config["vocab_size"])
        got = fireq_json("eval", out, "--tokens", ids, "--ctx", 128, "--kv", "fp", "--qp", "fp", "--activations", "fp")
        tokens = np.fromfile(ids, "<u4").astype(np.int64)
        if got["tokens"] != len(tokens):
            tokens = np.concatenate([[1], tokens])
        self.assertAlmostEqual(oracle.nll(oracle.Model(out), tokens, 128), got["nll_per_token"], delta=2e-4)

    def test_a_tied_head_follows_its_embedding(self):
        path = self.tmp / "head.json"
        path.write_text('{"preset": "rtn", "head": "fp8"}')
        refused("quantize", "-q", STORIES_260K, "-o", self.tmp / "out", "--recipe", path, code=USAGE,
                parts=("embedding", "the head follows"))

    def test_exports(self):
        out, _ = self.quantise({"preset": "rtn", "embeddings": "fp8", "overrides": [
            {"match": "*down_proj", "precision": "fp8"}, {"match": "model.layers.0.mlp.*", "precision": "original"}]})
        exported = self.tmp / "plain"
        report = fireq_json("export", out, "-o", exported, "--format", "hf-dequantized", "--dtype", "f32")
        self.assertTrue(any("FP8 weights of 5 modules" in what for what in report["left_out"]))
        model, plain = oracle.Model(out), read_tensors(exported)
        self.assertFalse([n for n in plain if n.endswith("weight_scale")])
        for i in range(LAYERS):
            for name in oracle.LINEARS:
                weight, r = model.linear[i][name]
                expected = weight * (r[:, None] if len(r) > 1 else r)
                np.testing.assert_allclose(plain[f"model.layers.{i}.{name}.weight"][1], expected, rtol=2e-7)
        np.testing.assert_array_equal(plain["model.embed_tokens.weight"][1], model.embedding)
        parts = ("--weights", "packed", "--activations", "fp", "--kv", "fp", "--qp", "fp")
        a = fireq_json("eval", out, *TEXT, *parts)["nll_per_token"]
        b = fireq_json("eval", exported, *TEXT)["nll_per_token"]
        self.assertAlmostEqual(a, b, delta=1e-5)

    def test_export_for_vllm_writes_fp8_plain(self):
        source = self.tmp / "random"
        em.random_llama(source, 20)
        out, _ = self.quantise({"preset": "rtn", "for": "vllm", "embeddings": "fp8", "overrides": [
            {"match": "*0.mlp.down_proj", "precision": "fp8"}]}, model=source)
        exported = self.tmp / "served"
        result = fireq("export", out, "-o", exported, "--format", "compressed-tensors")
        self.assertIn("FP8 weights of 2 modules", result.err)
        tensors = read_tensors(exported)
        name = "model.layers.0.mlp.down_proj"
        config = json.loads((exported / "config.json").read_text())["quantization_config"]
        self.assertEqual(["lm_head", name], config["ignore"])
        original = read_tensors(out)
        for module in (name, "model.embed_tokens"):
            values = oracle.E4M3[original[module + ".weight"][1]].astype(np.float32) \
                * original[module + ".weight_scale"][1][:, None]
            self.assertEqual("BF16", tensors[module + ".weight"][0])
            np.testing.assert_array_equal(oracle.bf16(values), oracle.to_float(*tensors[module + ".weight"]))

    def test_rounding_under_curvature(self):
        recipe = {"preset": "best", "overrides": [{"match": "*.1.mlp.*", "precision": "fp8"},
                                                  {"match": "*.2.self_attn.[qo]_proj", "precision": "original"},
                                                  {"match": "*.3.*", "weights": {"levels": "int4"}}]}
        out, _ = self.quantise(recipe, *CALIBRATE_260K, "--threads", 1)
        kinds = self.kinds(out)
        self.assertEqual({n for n in names(1) if ".mlp." in n}, {n for n, k in kinds.items() if k == "fp8"})
        again, _ = self.quantise(recipe, *CALIBRATE_260K, "--threads", 3, name="again")
        self.assert_same_folder(out, again)
        plain = self.quantised("best", STORIES_260K, "--preset", "best", *CALIBRATE_260K)
        kl = [fireq_json("eval", f, *TEXT, "--reference", STORIES_260K, "--kv", "fp")["kl_mean"] for f in (out, plain)]
        self.assertLess(kl[0], kl[1])
        self.check_scores(out)

    def test_damage(self):
        out, _ = self.quantise({"preset": "rtn", "overrides": [{"match": "*0.mlp.up_proj", "precision": "fp8"}]})
        name = "model.layers.0.mlp.up_proj"
        path = shards(out)[0]
        header, begin = read_header(path)

        def damage(tensor, offset, value, *parts):
            copy = self.tmp / "damaged"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(out, copy)
            with open(copy / path.name, "r+b") as f:
                f.seek(begin + header[tensor]["data_offsets"][0] + offset)
                f.write(value)
            refused("validate", "-q", copy, code=INPUT, parts=parts)

        damage(name + ".weight", 64 + 3, b"\x7f", name, "NaN at [1, 3]")
        damage(name + ".weight_scale", 8, b"\0\0\0\0", name, "row scale", "row 2")
        damage(name + ".weight_scale", 100 * 4, np.float32(np.nan).tobytes(), name, "row scale", "row 100")


# What the program takes and refuses; the schema must say the same.
VALID = [
    {}, {"preset": "best"}, {"ignore": []}, {"ignore": ["*down_proj", "re:.*up"]}, {"overrides": []},
    {"overrides": [{"match": "*", "weights": {"search": [-3, 0]}}]},
    {"overrides": [{"match": "lm_head", "precision": "original"}]}, {"embeddings": "fp8"}, {"kv_cache": False},
    {"weights": {"levels": [0, 1, 2, 3, 4, 5, 6, 7.5]}}, {"weights": {"search": [-7, 2.0]}},
    {"keys": {"top_k": 4.0}}, {"for": "vllm"}, {"smoothing": {"lambda1": "scalar", "lambda1_c": 1}},
    {"curvature": {"damping": 0.5, "passes": 0}},
]
INVALID = [
    {"prest": "best"}, {"preset": "bst"}, {"ignore": "x"}, {"ignore": [1]}, {"ignore": [""]},
    {"overrides": [{}]}, {"overrides": [{"match": "*", "precision": "int8"}]}, {"overrides": {}},
    {"overrides": [{"match": "*", "weights": {"row_scale": "row"}}]}, {"overrides": [{"match": "*", "colour": 1}]},
    {"overrides": [{"match": "*", "weights": {"levels": "int5"}}]}, {"embeddings": "int4"}, {"head": True},
    {"weights": {"levels": [0, 1, 2]}}, {"weights": {"search": [1, 2]}}, {"weights": {"search": [-1.5, 2]}},
    {"weights": []}, {"weights": {"searc": [-1, 2]}}, {"keys": {"top_k": -1}}, {"keys": {"top_k": 1.5}},
    {"keys": {"alpha": 1e9}}, {"kv_cache": 1}, {"curvature": {"damping": 0}}, {"curvature": {"passes": 101}},
    {"smoothing": {"lambda1": "on"}}, [], {"for": "tgi"},
]


class Schema(Choosing):
    @staticmethod
    def text(recipe):
        needs = isinstance(recipe, dict) and recipe.get("preset") == "best"
        return () if not needs else CALIBRATE_260K

    @unittest.skipIf(jsonschema is None, "python3-jsonschema is not installed")
    def test_the_schema_says_what_the_program_says(self):
        schema = json.loads((ROOT / "docs/recipe.schema.json").read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        for recipes, code in ((VALID, 0), (INVALID, USAGE)):
            for recipe in recipes:
                with self.subTest(recipe):
                    self.assertEqual(code == 0, validator.is_valid(recipe))
                    args = [*self.text(recipe)]
                    path = self.tmp / "recipe.json"
                    path.write_text(json.dumps(recipe))
                    fireq("quantize", STORIES_260K, "-o", self.tmp / "none", "--recipe", path, "--dry-run", *args,
                          code=code)
        resolved = self.quantised("schema", STORIES_260K, "--preset", "rtn", "--ignore", "*.0.*")
        recipe = json.loads((resolved / "config.json").read_text())["quantization_config"]["recipe"]
        self.assertEqual([], list(validator.iter_errors(recipe)))


if __name__ == "__main__":
    main()
