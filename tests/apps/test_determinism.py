"""The same bytes for any number of threads; shard size moves file cuts only."""
import json

from harness import (CALIBRATE_260K, STORIES_15M, STORIES_260K, TINY, TUNE_260K, USAGE, TestCase, digest, fireq, fireq_json,
                     main, read_header, read_tensors, refused, shards)


class Threads(TestCase):
    def check(self, model, *args):
        folders = []
        for threads in (1, 2, 7):
            out = self.tmp / f"t{threads}"
            fireq("quantize", model, "-o", out, "--threads", threads, "--quiet", *args)
            folders.append(out)
        for other in folders[1:]:
            self.assert_same_folder(folders[0], other)
        return folders[0]

    def test_rtn(self):
        self.check(STORIES_15M, "--preset", "rtn")

    def test_paper(self):
        self.check(STORIES_260K, "--preset", "paper", *CALIBRATE_260K)

    def test_fast(self):
        self.check(STORIES_260K, "--preset", "fast", *CALIBRATE_260K)

    def test_fast_with_awkward_sizes(self):
        self.check(STORIES_15M, "--preset", "fast", "--text", TINY, "--max-chars", 8000, "--samples", 3, "--length", 131)

    def test_best(self):
        self.check(STORIES_260K, "--preset", "best", *CALIBRATE_260K)

    def test_tuned_codes(self):
        """And they are others than those of a run that does not tune."""
        tuned = self.check(STORIES_260K, "--preset", "best", *TUNE_260K)
        recipe = self.tmp / "recipe.json"
        recipe.write_text(json.dumps({"preset": "best", "curvature": {"tune_passes": 0}}))
        fireq("quantize", STORIES_260K, "-o", self.tmp / "rounded", "--recipe", recipe, "--quiet", *TUNE_260K)
        name = "model.safetensors"
        self.assertNotEqual((tuned / name).read_bytes(), (self.tmp / "rounded" / name).read_bytes())

    def test_trained_levels(self):
        folder = self.check(STORIES_260K, "--preset", "best", "--levels", "trained", *CALIBRATE_260K)
        fireq("validate", folder, "--quiet")

    def test_best_with_awkward_sizes(self):
        self.check(STORIES_15M, "--preset", "best", "--text", TINY, "--max-chars", 8000, "--samples", 3, "--length", 131)

    def test_statistics_file(self):
        files = []
        for threads in (1, 2, 7):
            path = self.tmp / f"{threads}.h5"
            fireq("calibrate", STORIES_260K, "-o", path, "--threads", threads, "--quiet", *CALIBRATE_260K)
            files.append(path.read_bytes())
        self.assertEqual(files[0], files[1])
        self.assertEqual(files[0], files[2])

    def test_a_second_run_and_another_seed(self):
        a = self.quantised("a", STORIES_260K, "--preset", "fast", *CALIBRATE_260K)
        b = self.quantised("b", STORIES_260K, "--preset", "fast", *CALIBRATE_260K)
        self.assert_same_folder(a, b)
        c = self.quantised("c", STORIES_260K, "--preset", "fast", *CALIBRATE_260K, "--seed", 1)
        self.assertNotEqual(digest(a)["model.safetensors"], digest(c)["model.safetensors"])


class Shards(TestCase):
    def test_shard_size_moves_file_cuts_only(self):
        one = self.quantised("one", STORIES_260K, "--preset", "paper", *CALIBRATE_260K)
        whole = read_tensors(one)
        largest = max(array.nbytes for _, array in whole.values())
        for size, unit in ((40_000, "B"), (40, "kB"), (100, "KiB"), (1, "B")):
            with self.subTest(size=size, unit=unit):
                out = self.tmp / f"{size}{unit}"
                fireq("quantize", STORIES_260K, "-o", out, "--preset", "paper", "--shard-size", f"{size}{unit}",
                      "--quiet", *CALIBRATE_260K)
                cut = read_tensors(out)
                self.assertEqual(sorted(whole), sorted(cut))
                for name, (dtype, array) in whole.items():
                    self.assertEqual((dtype, array.shape, array.tobytes()),
                                     (cut[name][0], cut[name][1].shape, cut[name][1].tobytes()), name)
                bytes_of = {"B": 1, "kB": 1000, "KiB": 1024}[unit] * size
                files = shards(out)
                self.assertGreater(len(files), 1)
                index = json.loads((out / "model.safetensors.index.json").read_text())
                self.assertEqual(sorted(whole), sorted(index["weight_map"]))
                self.assertEqual(sum(a.nbytes for _, a in whole.values()), index["metadata"]["total_size"])
                for i, path in enumerate(files):
                    self.assertEqual(f"model-{i + 1:05}-of-{len(files):05}.safetensors", path.name)
                    header, begin = read_header(path)
                    names = [n for n in header if n != "__metadata__"]
                    self.assertEqual({path.name}, {index["weight_map"][n] for n in names})
                    data = path.stat().st_size - begin
                    self.assertTrue(data <= bytes_of or len(names) == 1, (path.name, data, len(names)))
                    self.assertLessEqual(data, max(bytes_of, largest))
                same = {n: h for n, h in digest(out).items() if not n.startswith("model")}
                self.assertEqual({n: h for n, h in digest(one).items() if not n.startswith("model")}, same)

    def test_a_sharded_folder_evaluates_and_validates(self):
        one = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        cut = self.quantised("cut", STORIES_260K, "--preset", "rtn", "--shard-size", "64kB")
        evaluate = ("--text", TINY, "--max-chars", 3000, "--ctx", 128)
        self.assertEqual(fireq_json("eval", one, *evaluate)["nll_per_token"],
                         fireq_json("eval", cut, *evaluate)["nll_per_token"])
        fireq("validate", cut, "--reference", STORIES_260K, "--quiet")

    def test_sizes_that_are_refused(self):
        for size in ("0", "-1GB", "5 parsecs", "", "1e300GB", "nan"):
            with self.subTest(size):
                refused("quantize", STORIES_260K, "-o", self.tmp / "out", "--preset", "rtn", f"--shard-size={size}",
                        "--quiet", code=USAGE)
                self.assert_nothing_published(self.tmp / "out")


if __name__ == "__main__":
    main()
