"""fireq validate and inspect: their numbers against numpy, exit codes, JSON."""
import shutil
import struct

import h5py
import numpy as np

import oracle
from harness import (CALIBRATE_260K, INPUT, STORIES_15M, STORIES_260K, STORIES_260K_BF16, TINY, TOLERANCE, USAGE, TestCase,
                     copy_model, fireq, fireq_json, location, main, parse_json, poke, read_tensors, refused, write_safetensors)


class Validate(TestCase):
    def test_errors_are_the_definitions(self):
        """Against numpy; without folds the reference is the checkpoint itself."""
        out = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        got = fireq_json("validate", out, "--reference", STORIES_260K)
        model, original = oracle.Model(out), read_tensors(STORIES_260K)
        self.assertEqual({*model.packed}, {entry["name"] for entry in got["linears"]})
        for entry in got["linears"]:
            packed = model.packed[entry["name"]]
            w = oracle.to_float(*original[entry["name"] + ".weight"]).astype(np.float64)
            difference = packed.weights() - w
            error = np.linalg.norm(difference) / np.linalg.norm(w)
            self.assertAlmostEqual(error, entry["rel_error"], delta=1e-6)
            self.assertAlmostEqual(-20 * np.log10(error), entry["snr_db"], delta=1e-4)
            worst = 0
            for begin in range(0, packed.cols, oracle.GROUP):
                part = slice(begin, min(begin + oracle.GROUP, packed.cols))
                norm = np.linalg.norm(w[:, part], axis=1)
                each = np.linalg.norm(difference[:, part], axis=1)[norm > 0] / norm[norm > 0]
                worst = max(worst, each.max(initial=0))
            self.assertAlmostEqual(worst, entry["worst_group"]["rel_error"], delta=1e-5)
            self.assertTrue(0 <= entry["product_rel_error"] < 1e-5, entry)

    def test_folded_reference(self):
        for preset in ("paper", "fast", "best"):
            out = self.quantised(preset, STORIES_260K, "--preset", preset, *CALIBRATE_260K)
            got = fireq_json("validate", out, "--reference", STORIES_260K)
            for entry in got["linears"]:
                self.assertLess(entry["rel_error"], 0.25, entry)

    def test_text(self):
        out = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        text = ("--text", TINY, "--max-chars", 20000)
        got = fireq_json("validate", out, "--reference", STORIES_260K, *text, "--max-tokens", 1024)
        self.assertTrue(512 < got["scored"] <= 1024)
        few = fireq_json("validate", out, "--reference", STORIES_260K, *text, "--max-tokens", 100)
        self.assertTrue(50 < few["scored"] <= 100)
        self.assertGreater(got["kl_mean"], 0)
        self.assertTrue(0 < got["top1_agree"] < 1)
        refused("validate", out, *text, "--quiet", code=USAGE, parts=["--reference"])
        refused("validate", out, "--reference", STORIES_260K, *text, "--max-kl", got["kl_mean"] / 100, "--quiet",
                code=TOLERANCE, parts=["KL"])

    def test_attribution(self):
        """Each cost is what eval finds for the same switches, and for a model in which only those weights are packed."""
        out = self.quantised("fast", STORIES_260K, "--preset", "fast", *CALIBRATE_260K)
        text = ("--text", TINY, "--skip-chars", 50000, "--max-chars", 2500, "--ctx", 128)
        reference = ("--reference", STORIES_260K)
        got = fireq_json("validate", out, *reference, *text, "--attribute")["attribution"]
        original = fireq_json("eval", STORIES_260K, *text)
        self.assertEqual((got["scored"], got["original_nll"]), (original["scored"], original["nll_per_token"]))

        def expect(cost, folder, *switches):
            found = fireq_json("eval", folder, *text, *reference, *switches)
            self.assertAlmostEqual(cost["kl"], found["kl_mean"], delta=2e-6, msg=(folder, switches))
            self.assertAlmostEqual(cost["delta_nll"], found["nll_per_token"] - original["nll_per_token"], delta=2e-6)

        full = {"--weights": "original", "--activations": "fp", "--k": "fp", "--v": "fp", "--qp": "fp"}
        own = {"--weights": "packed", "--activations": "fp8", "--k": "int4", "--v": "int4", "--qp": "fp8"}
        part = {p["part"]: p for p in got["parts"]}
        self.assertEqual(list(part), ["weights", "weights, products exact", "activations", "k", "v", "q and p"])
        expect(got["all"], out)
        for name, switch in {"weights": "--weights", "activations": "--activations", "k": "--k", "v": "--v", "q and p": "--qp"}.items():
            expect(part[name], out, *sum({**full, switch: own[switch]}.items(), ()))
            expect(part[name]["without"], out, *sum({**own, switch: full[switch]}.items(), ()))
        self.assertNotIn("without", part["weights, products exact"])

        # Without folds packed weights can be put into the original one by one.
        rtn = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        packed, tensors = oracle.Model(rtn).packed, read_tensors(STORIES_260K)
        got = fireq_json("validate", rtn, *reference, *text, "--attribute")["attribution"]
        self.assertEqual([entry["layer"] for entry in got["layers"]], [0, 1, 2, 3, 4])

        def with_packed(chosen, rounded=True):
            shutil.rmtree(self.tmp / "mixed", ignore_errors=True)
            mixed = copy_model(STORIES_260K, self.tmp / "mixed")
            values = {name: ("F32", oracle.to_float(*value)) for name, value in tensors.items()}
            for name, p in packed.items():
                if chosen(name):
                    values[name + ".weight"] = ("F32", p.weights(rounded).astype("<f4"))
            write_safetensors(mixed / "model.safetensors", values)
            return mixed

        for layer in (0, 3):
            expect(got["layers"][layer], with_packed(lambda name: f"layers.{layer}." in name))
        for i, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
            self.assertEqual(got["linears"][i]["part"], name)
            if name in ("v_proj", "down_proj"):
                expect(got["linears"][i], with_packed(lambda n: n.endswith(name)))
        expect(got["parts"][1], with_packed(lambda name: True, rounded=False))
        refused("validate", out, *reference, "--attribute", "--quiet", code=USAGE, parts=["--text"])

    def test_out_of_tolerance(self):
        name = "model.layers.2.self_attn.o_proj"
        out = copy_model(self.quantised("rtn", STORIES_260K, "--preset", "rtn"), self.tmp / "out")
        path, begin, end = location(out, name + ".weight_row_scale")
        scales = np.frombuffer(path.read_bytes()[begin:end], "<f4")
        poke(path, begin, (scales * 2).astype("<f4").tobytes())
        fireq("validate", out, "--quiet")  # no rule is broken
        report = self.tmp / "report.json"
        refused("validate", out, "--reference", STORIES_260K, "--quiet", "--json", report, code=TOLERANCE, parts=[name])
        self.assertTrue([f for f in parse_json(report)["failures"] if name in f])

    def test_another_model_is_no_reference(self):
        out = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        refused("validate", out, "--reference", STORIES_15M, "--quiet", code=None, parts=["stories15M"])
        refused("validate", out, "--reference", out, "--quiet", code=USAGE, parts=["original"])
        refused("validate", STORIES_260K, "--quiet", code=USAGE, parts=["FireQ"])
        # Folds would be derived from other weights: even a copy in BF16 is another model.
        refused("validate", out, "--reference", STORIES_260K_BF16, "--quiet", code=INPUT,
                parts=["another model", "stories260K-bf16", "fingerprint"])

    def test_table(self):
        out = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        text = fireq("validate", out, "--reference", STORIES_260K).out
        self.assertIn("model.layers.4.mlp.down_proj", text)
        self.assertIn("dB", text)


class Inspect(TestCase):
    def test_packed_counts(self):
        out = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        got = fireq_json("inspect", out)
        model = oracle.Model(out)
        self.assertEqual("fireq", got["kind"])
        self.assertEqual("rtn", got["recipe"]["preset"])
        self.assertEqual(len(model.packed), len(got["packed"]))
        for entry in got["packed"]:
            packed = next(p for n, p in model.packed.items() if n.endswith(entry["name"]) and f".{entry['layer']}." in n)
            counts = np.bincount(packed.codes[:, :packed.cols].ravel() & 7, minlength=8)
            self.assertEqual(counts.tolist(), entry["magnitude_counts"])
            sigma = oracle.E4M3[packed.sigma_bytes]
            self.assertAlmostEqual(sigma.min(), entry["smallest_scale"], delta=1e-6)
            self.assertAlmostEqual(sigma.max(), entry["largest_scale"], delta=1e-4)
            self.assertAlmostEqual((sigma < 2**-6).mean(), entry["subnormal_scales"], delta=1e-9)

    def test_weights_of_a_model(self):
        got = fireq_json("inspect", STORIES_260K, "--layer", 3)
        tensors = read_tensors(STORIES_260K)
        self.assertEqual({3}, {entry["layer"] for entry in got["weights"]})
        self.assertEqual(7, len(got["weights"]))
        for entry in got["weights"]:
            name = next(n for n in tensors if n.startswith("model.layers.3.") and entry["site"].split(".")[-1] in n)
            w = tensors[name][1].astype(np.float64)
            self.assertAlmostEqual(np.abs(w).max(), entry["absmax"], delta=1e-6)
            rms = np.sqrt((w**2).mean())
            self.assertAlmostEqual(rms, entry["rms"], delta=1e-5 * rms)
            self.assertAlmostEqual(np.abs(w).max() / rms, entry["max_over_rms"], delta=1e-3)
            columns = np.abs(w).max(axis=0)
            top = entry["outliers"][0]
            self.assertAlmostEqual(columns.max(), top["absmax"], delta=1e-6)
            self.assertAlmostEqual(columns.max(), columns[top["channel"]], delta=1e-6)

    def test_statistics(self):
        stats = self.tmp / "stats.h5"
        fireq("calibrate", STORIES_260K, "-o", stats, "--quiet", *CALIBRATE_260K)
        got = fireq_json("inspect", stats)
        self.assertEqual(8 * 128, got["tokens"])
        with h5py.File(stats) as f:
            for entry in got["sites"]:
                group = f[f"layers/{entry['layer']:03}"]
                if entry["site"] in group:
                    self.assertAlmostEqual(group[entry["site"]]["absmax"][:].max(), entry["absmax"], delta=1e-5)
        names = {entry["site"] for entry in got["sites"]}
        self.assertLessEqual({"attn_in", "k_post_rope", "k_after_n", "k_after_n_s", "v", "down_in"}, names)
        text = fireq("inspect", stats, "--layer", 1).out
        self.assertRegex(text, r"\n +1 +k_after_n ")
        self.assertNotRegex(text, r"\n +2 +k_after_n ")

    def test_keys_after_smoothing(self):
        """With alpha = beta = 8 no smoothed key channel exceeds 8 on the calibration tokens."""
        out = self.quantised("paper", STORIES_260K, "--preset", "paper", *CALIBRATE_260K)
        sites = fireq_json("inspect", out)["sites"]
        for entry in sites:
            if entry["site"] == "k_after_n_s":
                self.assertLessEqual(entry["absmax"], 8 * (1 + 1e-5))

    def test_layers_that_are_not_there(self):
        refused("inspect", STORIES_260K, "--layer", 5, "--quiet", code=USAGE, parts=["5"])
        refused("inspect", STORIES_260K, "--layer", -1, "--quiet", code=USAGE)

    def test_files_that_are_not_statistics(self):
        (self.tmp / "x.h5").write_bytes(struct.pack("<Q", 7) * 100)
        refused("inspect", self.tmp / "x.h5", "--quiet", code=None, parts=["x.h5"])


if __name__ == "__main__":
    main()
