"""fireq calibrate: the statistics file read with h5py, its numbers recomputed, and merging."""
import json

import h5py
import numpy as np

import oracle
from harness import (INPUT, STORIES_15M, STORIES_260K, STORIES_260K_BF16, TINY, USAGE, TestCase, digest, fireq, flip, main,
                     refused)

LENGTH = 64


def text(begin, count):
    return TINY.read_bytes().decode()[begin:begin + count]


class Observed(oracle.Model):
    """The oracle with its linears' inputs and outputs kept."""

    def __init__(self, folder):
        super().__init__(folder)
        self.seen = {}

    def _apply(self, layer, name, x, fp8):
        y = super()._apply(layer, name, x, fp8)
        self.seen.setdefault((layer, name), []).append((x, y))
        return y


class Statistics(TestCase):
    def test_numbers_against_the_oracle(self):
        path = self.tmp / "stats.h5"
        (self.tmp / "text.txt").write_text(text(1000, 1500))
        fireq("calibrate", STORIES_260K, "--text", self.tmp / "text.txt", "--length", LENGTH, "--samples", 1000, "-o", path,
              "--bos", "head", "--quiet")
        model = Observed(STORIES_260K)
        tokenizer = oracle.SentencePiece(STORIES_260K / "tokenizer.model")
        windows = oracle.windows([1] + tokenizer.encode(text(1000, 1500)), LENGTH)
        for window in windows:
            model.logits(window)
        sources = {"attn_in": ("self_attn.q_proj", 0), "v": ("self_attn.v_proj", 1), "k_pre_rope": ("self_attn.k_proj", 1),
                   "o_in": ("self_attn.o_proj", 0), "mlp_in": ("mlp.gate_proj", 0), "down_in": ("mlp.down_proj", 0)}
        with h5py.File(path) as f:
            meta = f["meta"].attrs
            self.assertEqual(len(windows), meta["windows"])
            self.assertEqual(len(windows) * LENGTH, meta["tokens"])
            for layer in range(5):
                group = f[f"layers/{layer:03}"]
                for site, (linear, which) in sources.items():
                    x = np.concatenate([pair[which] for pair in model.seen[layer, linear]]).astype(np.float64)
                    got = {name: group[site][name][()] for name in group[site]}
                    self.assertEqual(len(x), got["count"].ravel()[0])
                    np.testing.assert_allclose(got["absmax"], np.abs(x).max(axis=0), rtol=1e-4, err_msg=site)
                    np.testing.assert_allclose(got["absmean"], np.abs(x).mean(axis=0), rtol=1e-4, err_msg=site)
                    np.testing.assert_allclose(got["sumsq"], (x**2).sum(axis=0), rtol=1e-4, err_msg=site)
                    self.assertEqual(x.size, got["histogram"].sum())
                key = np.concatenate([pair[1] for pair in model.seen[layer, "self_attn.k_proj"]]).reshape(-1, 4, 2, 4)
                radius = np.sqrt((key.astype(np.float64)**2).sum(axis=2)).max(axis=0)
                np.testing.assert_allclose(group["k_pair_radius"][:], radius, rtol=1e-4)

    def test_every_dataset_says_what_it_is(self):
        path = self.tmp / "stats.h5"
        fireq("calibrate", STORIES_260K, "--text", TINY, "--max-chars", 4000, "--length", LENGTH, "--samples", 4, "-o",
              path, "--quiet")
        silent = []
        with h5py.File(path) as f:
            self.assertIn("format version", {name.replace("_", " ") for name in f["meta"].attrs})
            f.visititems(lambda name, item: silent.append(name)
                         if isinstance(item, h5py.Dataset) and not item.attrs.get("description") else None)
        self.assertEqual([], silent)


class Merge(TestCase):
    def calibrate(self, name, *args):
        path = self.shared / name
        if not path.exists():
            fireq("calibrate", STORIES_260K, "-o", path, "--quiet", "--bos", "none", "--length", LENGTH, "--samples", 1000,
                  *args)
        return path

    def parts(self):
        """Token files, so that the windows of the halves are exactly those of the whole."""
        ids = oracle.SentencePiece(STORIES_260K / "tokenizer.model").encode(text(0, 6000))
        ids = np.array(ids[:30 * LENGTH], "<u4")
        files = []
        for name, part in (("whole", ids), ("a", ids[:7 * LENGTH]), ("b", ids[7 * LENGTH:8 * LENGTH]), ("c", ids[8 * LENGTH:])):
            path = self.shared / f"{name}.u32"
            part.tofile(path)
            files.append(self.calibrate(f"{name}.h5", "--tokens", path))
        return files

    def merge(self, name, *files):
        out = self.tmp / name
        fireq("calibrate", "--merge", *files, "-o", out, "--quiet")
        return out

    def read(self, path):
        with h5py.File(path) as f:
            values = {}
            f.visititems(lambda name, item: values.__setitem__(name, item[()]) if isinstance(item, h5py.Dataset) else None)
            return values, dict(f["meta"].attrs)

    def test_parts_merge_to_the_whole(self):
        whole, a, b, c = self.parts()
        expected, meta = self.read(whole)
        got, merged_meta = self.read(self.merge("merged.h5", a, b, c))
        self.assertEqual(sorted(expected), sorted(got))
        self.assertEqual(meta["tokens"], merged_meta["tokens"])
        self.assertEqual(meta["windows"], merged_meta["windows"])
        gains = [self.read(part)[0] for part in (a, b, c)]
        for name in expected:
            if name.endswith("k_centre_gain"):  # of each part's own sample
                np.testing.assert_allclose(got[name], sum(part[name] for part in gains), rtol=1e-12, err_msg=name)
            elif name.endswith(("absmax", "histogram", "count", "k_pair_radius")):
                np.testing.assert_array_equal(expected[name], got[name], name)
            else:
                scale = np.abs(expected[name]).max()
                np.testing.assert_allclose(got[name], expected[name], rtol=1e-12, atol=1e-12 * scale, err_msg=name)

    def test_order_does_not_matter(self):
        _, a, b, c = self.parts()
        one, meta_one = self.read(self.merge("abc.h5", a, b, c))
        other, meta_other = self.read(self.merge("cab.h5", c, a, b))
        two_steps, meta_steps = self.read(self.merge("a_bc.h5", a, self.merge("bc.h5", b, c)))
        self.assertEqual(meta_one["text_fingerprint"], meta_other["text_fingerprint"])
        self.assertEqual(meta_one["text_fingerprint"], meta_steps["text_fingerprint"])
        for name in one:
            scale = np.abs(one[name]).max()
            for values in (other, two_steps):
                np.testing.assert_allclose(values[name], one[name], rtol=1e-12, atol=1e-12 * scale, err_msg=name)

    def test_merged_statistics_quantise(self):
        _, a, b, c = self.parts()
        merged = self.merge("merged.h5", a, b, c)
        fireq("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "fast", "--stats", merged, "--quiet")
        calibration = json.loads((self.tmp / "out/config.json").read_text())["quantization_config"]["calibration"]
        self.assertEqual(30 * LENGTH, calibration["tokens"])

    def test_refusals(self):
        _, a, _, _ = self.parts()
        other = self.shared / "other.h5"
        if not other.exists():
            fireq("calibrate", STORIES_260K_BF16, "--text", TINY, "--max-chars", 3000, "--length", LENGTH, "-o", other,
                  "--quiet")
        for files, code, parts in (((a, other), INPUT, ["other.h5", "model"]), ((a,), USAGE, ["two"]),
                                   ((a, self.tmp / "none.h5"), None, ["none.h5"]), ((a, TINY), INPUT, [TINY.name])):
            with self.subTest(files):
                refused("calibrate", "--merge", *files, "-o", self.tmp / "out.h5", "--quiet", code=code, parts=parts)
                self.assertFalse((self.tmp / "out.h5").exists())

    def test_damaged_files(self):
        _, a, b, _ = self.parts()
        whole = a.read_bytes()
        bad = self.tmp / "bad.h5"
        for size in (0, 100, len(whole) // 2, len(whole) - 1):
            with self.subTest(size):
                bad.write_bytes(whole[:size])
                result = fireq("inspect", bad, "--quiet", code=None)
                self.assertNotEqual(0, result.code, result)
                self.assertIn("bad.h5", result.err)
        rng = np.random.default_rng(7)
        for _ in range(25):
            bad.write_bytes(whole)
            for _ in range(3):
                flip(bad, int(rng.integers(len(whole))), int(rng.integers(8)))
            result = fireq("calibrate", "--merge", bad, b, "-o", self.tmp / "out.h5", "--force", "--quiet", code=None)
            self.assertIn(result.code, (0, INPUT), result)

    def test_output(self):
        _, a, b, _ = self.parts()
        before = digest(self.shared)
        refused("calibrate", "--merge", a, b, "-o", a, "--quiet", code=USAGE, parts=["a.h5", "--force"])
        refused("calibrate", STORIES_15M, "-o", self.tmp / "x.h5", "--quiet", code=USAGE, parts=["--text"])
        refused("calibrate", "-o", self.tmp / "x.h5", "--quiet", code=USAGE, parts=["model"])
        self.assertEqual(before, digest(self.shared))
        self.assertEqual([], list(self.tmp.iterdir()))

    def test_a_packed_model_is_refused(self):
        packed = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        refused("calibrate", packed, "--text", TINY, "-o", self.tmp / "x.h5", "--quiet", code=USAGE, parts=["original"])


if __name__ == "__main__":
    main()
