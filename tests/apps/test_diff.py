"""fireq diff: every figure computed again in numpy, naively, from the bytes of both folders."""
import numpy as np

from export_models import dequantised, random_llama, random_tokens
from harness import (CALIBRATE_260K, DATA, INPUT, STORIES_15M, STORIES_260K, USAGE, TestCase, copy_model, edit_json, fireq,
                     fireq_json, main, poke, location, read_tensors, refused)
from oracle import LINEARS, Model, to_float


def weights_of(folder):
    """name -> float64 matrices of the linears and vectors of the norms."""
    tensors, model = read_tensors(folder), Model(folder)
    out = {n: to_float(*t).astype(np.float64) for n, t in tensors.items() if n.endswith("norm.weight")}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        out[name] = to_float(*tensors[name]).astype(np.float64)
    for name, packed in model.packed.items():
        out[name + ".weight"] = dequantised(packed).astype(np.float64)
    return out


def relative(a, b):
    return np.linalg.norm(b - a) / np.linalg.norm(a)


def products(w, layer, config):
    """Each product as whole matrices of the folder's own folds."""
    prefix = f"model.layers.{layer}."
    q, k, v, o, gate, up, down = (w[prefix + n + ".weight"] for n in LINEARS)
    attn, mlp = w[prefix + "input_layernorm.weight"], w[prefix + "post_attention_layernorm.weight"]
    heads, kv_heads, d = config.heads, config.kv_heads, config.head_dim
    group = heads // kv_heads
    q_norm, k_norm = (w.get(prefix + f"self_attn.{x}_norm.weight", np.ones(d)) for x in "qk")
    q, k = q * np.tile(q_norm, heads)[:, None] * attn, k * np.tile(k_norm, kv_heads)[:, None] * attn
    pairs, outputs = [], []
    for h in range(heads):
        g = h // group
        for j in range(d // 2):
            a, b = [h * d + j, h * d + j + d // 2], [g * d + j, g * d + j + d // 2]
            pairs.append(q[a].T @ k[b])
        outputs.append(o[:, h * d:(h + 1) * d] @ v[g * d:(g + 1) * d] * attn)
    channels = np.einsum("ic,cj->cij", down, up * mlp)
    return {"q k": np.array(pairs), "v o": np.array(outputs), "gate": gate * mlp, "up down": channels}


class Diff(TestCase):
    def check(self, a, b):
        report = fireq_json("diff", a, b)
        left, right, config = weights_of(a), weights_of(b), Model(a).config
        layers = config.layers
        self.assertEqual(7 * layers, len(report["linears"]))
        for linear in report["linears"]:
            x, y = left[linear["name"] + ".weight"], right[linear["name"] + ".weight"]
            self.assertEqual(x.shape, (linear["rows"], linear["cols"]))
            np.testing.assert_allclose(linear["relative"], relative(x, y), rtol=1e-9, err_msg=linear["name"])
            self.assertEqual(np.array_equal(x, y), linear["equal"])
        found = {(p["layer"], p["name"]): p["relative"] for p in report["products"]}
        self.assertEqual(4 * layers, len(found))
        for layer in range(layers):
            x, y = products(left, layer, config), products(right, layer, config)
            for name in x:
                np.testing.assert_allclose(found[layer, name], relative(x[name], y[name]), rtol=1e-5, atol=1e-7, err_msg=name)
        for key in ("linears", "products"):
            figures = [row["relative"] for row in report[key]]
            self.assertEqual(sorted(figures, reverse=True), figures)
        return report

    def test_original_against_packed(self):
        rtn = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        report = self.check(STORIES_260K, rtn)
        self.assertTrue(report["same_folds"] and report["differ"])
        self.assertEqual([], report["tensors"])
        # What validate says of the same folder.
        for linear in fireq_json("validate", rtn, "--reference", STORIES_260K)["linears"]:
            mine = next(x for x in report["linears"] if x["name"] == linear["name"])
            self.assertAlmostEqual(linear["rel_error"], mine["relative"], delta=1e-6)
        size = sum(t.nbytes for _, t in read_tensors(rtn).values())
        self.assertEqual(size, sum(report["bytes"]["b"].values()))

    def test_folds_that_differ(self):
        """Weights are far apart, what they compute is not: products see through Λ, N, rotations."""
        fast = self.quantised("fast", STORIES_260K, "--preset", "fast", *CALIBRATE_260K)
        best = self.quantised("best", STORIES_260K, "--preset", "best", *CALIBRATE_260K)
        report = self.check(STORIES_260K, fast)
        self.assertFalse(report["same_folds"])
        self.assertGreater(report["linears"][0]["relative"], 0.5)
        self.assertLess(max(p["relative"] for p in report["products"]), 0.25)
        report = self.check(fast, best)
        self.assertFalse(report["same_folds"])
        recipe = {r["key"]: (r["a"], r["b"]) for r in report["recipe"]}
        self.assertEqual(("fast", "best"), recipe["preset"])
        self.assertEqual((False, True), recipe["values.rotate"])
        self.assertNotIn("weights.levels", recipe)
        self.assertEqual([], [t for t in report["tensors"] if t["a"] is None])
        self.assertIn("folds differ", fireq("diff", fast, best).out)

    def test_a_folder_and_itself(self):
        fast = self.quantised("fast", STORIES_260K, "--preset", "fast", *CALIBRATE_260K)
        report = fireq_json("diff", fast, fast, "--exit-code")
        self.assertFalse(report["differ"])
        self.assertTrue(report["same_folds"] and all(x["equal"] for x in report["linears"]))
        self.assertEqual({0}, {p["relative"] for p in report["products"]})
        self.assertIn("no difference", fireq("diff", fast, fast, "--exit-code").out)

    def test_exit_code_and_one_changed_weight(self):
        model = copy_model(STORIES_260K, self.tmp / "changed")
        path, begin, _ = location(model, "model.layers.2.mlp.up_proj.weight")
        dtype = read_tensors(model)["model.layers.2.mlp.up_proj.weight"][0]
        poke(path, begin, {"F32": b"\0\0\xc0\x3f", "F16": b"\0\x3e", "BF16": b"\xc0\x3f"}[dtype])  # 1.5
        result = fireq("diff", STORIES_260K, model, "--exit-code", "--quiet", code=1)
        self.assertEqual(("", ""), (result.out, result.err))
        fireq("diff", STORIES_260K, model, "--quiet")
        report = self.check(STORIES_260K, model)
        self.assertEqual(["model.layers.2.mlp.up_proj"], [x["name"] for x in report["linears"] if not x["equal"]])
        self.assertEqual([(2, "up down")], [(p["layer"], p["name"]) for p in report["products"] if p["relative"] > 0])
        # Another key of config.json alone is a difference too.
        other = copy_model(STORIES_260K, self.tmp / "key")
        edit_json(other / "config.json", lambda c: c.update(rms_norm_eps=3e-5))
        report = fireq_json("diff", STORIES_260K, other, "--exit-code", code=1)
        self.assertEqual(["rms_norm_eps"], [m["key"] for m in report["metadata"]])

    def test_other_families(self):
        """Norms on queries and keys, biases, fused tensors; the same bytes for any number of threads."""
        for model in sorted((DATA / "tiny").iterdir()):
            with self.subTest(model.name):
                out = self.tmp / model.name
                fireq("quantize", model, "-o", out, "--preset", "fast", "--tokens", model / "ids.u32", "--samples", 2, "--length", 64,
                      "--quiet")
                report = fireq_json("diff", model, out)
                self.assertEqual(report, fireq_json("diff", model, out, "--threads", 3))
                self.assertLess(max(p["relative"] for p in report["products"]), 0.4)
                if not any("qkv_proj" in n for n in read_tensors(model)):
                    self.check(model, out)

    def test_refusals(self):
        refused("diff", STORIES_260K, STORIES_15M, "--quiet", code=INPUT, parts=["stories15M", "layers", "5", "6"])
        refused("diff", STORIES_260K, self.tmp / "nowhere", "--quiet", code=USAGE, parts=["nowhere"])
        refused("diff", STORIES_260K, "--quiet", code=USAGE, parts=["b"])


if __name__ == "__main__":
    main()
