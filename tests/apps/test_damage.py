"""Files that were cut, flipped, swapped or lost: refused by name, by every command that reads them."""
import json
import os
import random
import shutil
import struct

import numpy as np

from harness import (ENVIRONMENT, INPUT, STORIES_260K, TINY, TestCase, copy_model, edit_json, fireq, flip, location, main,
                     poke, read_header, read_tensors, refused, shards, write_safetensors)

EVALUATE = ("--text", TINY, "--max-chars", 3000, "--ctx", 128, "--quiet")


class Source(TestCase):
    """A damaged Hugging Face folder."""

    def setUp(self):
        super().setUp()
        self.model = copy_model(STORIES_260K, self.tmp / "model")
        self.weights = self.model / "model.safetensors"

    def check(self, *parts, code=INPUT):
        refused("eval", self.model, *EVALUATE, code=code, parts=parts)
        refused("quantize", self.model, "-o", self.tmp / "out", "--preset", "rtn", "--quiet", code=code, parts=parts)
        self.assert_nothing_published(self.tmp / "out")

    def header(self, change, pad=0):
        header, begin = read_header(self.weights)
        data = self.weights.read_bytes()[begin:]
        text = change(header)
        text = text if isinstance(text, str) else json.dumps(header)
        raw = text.encode() + b" " * pad
        self.weights.write_bytes(struct.pack("<Q", len(raw)) + raw + data)

    def test_truncated(self):
        whole = self.weights.read_bytes()
        for size in (0, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            with self.subTest(size):
                self.weights.write_bytes(whole[:size])
                self.check("model.safetensors")
        self.weights.write_bytes(whole + b"\0")
        self.check("model.safetensors")

    def test_header_length(self):
        for length in (0, 1, 2**63, 2**64 - 1, 100_000_001, self.weights.stat().st_size):
            with self.subTest(length):
                poke(self.weights, 0, struct.pack("<Q", length))
                self.check("model.safetensors", "header")

    def test_header_contents(self):
        name = "model.layers.0.mlp.up_proj.weight"

        def set_field(key, value):
            return lambda h: h[name].__setitem__(key, value)

        def twin(h):
            text = json.dumps(h)
            return text[:-1] + ', "\\u006dodel.layers.0.mlp.up_proj.weight": ' + json.dumps(h[name]) + "}"

        begin, end = read_header(self.weights)[0][name]["data_offsets"]
        keep = self.weights.read_bytes()
        for title, change in (
            ("dtype", set_field("dtype", "F17")), ("shape", set_field("shape", [172, 63])),
            ("shape", set_field("shape", [2**32, 2**32])), ("shape", set_field("shape", [-172, -64])),
            ("shape", set_field("shape", [172.5, 64])), ("offset", set_field("data_offsets", [begin + 2, end])),
            ("offset", set_field("data_offsets", [end, begin])), ("offset", set_field("data_offsets", [begin, 2**53 + 2])),
            ("offset", set_field("data_offsets", [begin])), ("twice", twin), ("json", lambda h: json.dumps(h)[:-1]),
            ("object", lambda h: "[]"), ("metadata", lambda h: h.__setitem__("__metadata__", {"a": 1})),
        ):
            with self.subTest(title=title, change=change):
                self.weights.write_bytes(keep)
                self.header(change)
                self.check("model.safetensors")

    def test_missing_and_extra_tensors(self):
        tensors = read_tensors(STORIES_260K)
        name = "model.layers.4.self_attn.v_proj.weight"
        write_safetensors(self.weights, {n: t for n, t in tensors.items() if n != name})
        self.check(name)
        wrong = dict(tensors)
        wrong[name] = ("F16", np.zeros((32, 65), np.float16))
        write_safetensors(self.weights, wrong)
        self.check(name, "[32, 64]", "[32, 65]")
        wrong[name] = ("I64", np.zeros((32, 64), np.int64))
        write_safetensors(self.weights, wrong)
        self.check(name, "I64")

    def test_index(self):
        tensors = list(read_tensors(STORIES_260K).items())
        half = len(tensors) // 2
        names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        index = self.model / "model.safetensors.index.json"

        def make():
            for path in self.model.glob("model*"):
                path.unlink()
            for file, part in zip(names, (tensors[:half], tensors[half:])):
                write_safetensors(self.model / file, dict(part))
            weight_map = {n: names[i >= half] for i, (n, _) in enumerate(tensors)}
            index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))

        make()
        fireq("eval", self.model, *EVALUATE)
        first, last = tensors[0][0], tensors[-1][0]
        for title, change in (
            ("lost shard", lambda: (self.model / names[1]).unlink()),
            ("wrong shard", lambda: edit_json(index, lambda j: j["weight_map"].__setitem__(first, names[1]))),
            ("escape", lambda: edit_json(index, lambda j: j["weight_map"].__setitem__(first, "../" + names[0]))),
            ("absolute", lambda: edit_json(index, lambda j: j["weight_map"].__setitem__(first, str(self.model / names[0])))),
            ("unlisted tensor", lambda: edit_json(index, lambda j: j["weight_map"].pop(last))),
            ("two places", lambda: write_safetensors(self.model / names[1], dict(tensors[half - 1:]))),
            ("no index", lambda: index.unlink()),
            ("cut index", lambda: index.write_text(index.read_text()[:-5])),
            ("half-downloaded", lambda: (self.model / names[1]).rename(self.model / (names[1] + ".incomplete"))),
        ):
            with self.subTest(title):
                make()
                change()
                self.check(self.model.name)
                for path in self.model.glob("*.incomplete"):
                    path.unlink()
        make()
        outside = self.tmp / "outside.safetensors"
        shutil.move(self.model / names[1], outside)
        (self.model / names[1]).symlink_to(outside)
        self.check(names[1])

    def test_config(self):
        path = self.model / "config.json"
        keep = path.read_bytes()
        for title, text in (("empty", b""), ("cut", keep[:-10]), ("list", b"[]"), ("utf", keep.replace(b"llama", b"\xff")),
                            ("twice", keep.replace(b"{", b'{"hidden_size": 64,', 1))):
            with self.subTest(title):
                path.write_bytes(text)
                self.check("config.json")
        path.unlink()
        self.check("config.json", code=None)

    def test_tokenizer(self):
        path = self.model / "tokenizer.model"
        keep = path.read_bytes()
        for text in (b"", keep[:-3], keep[:100], b"\xff" * 200):
            with self.subTest(len(text)):
                path.write_bytes(text)
                refused("eval", self.model, *EVALUATE, code=INPUT, parts=["tokenizer.model"])
        path.unlink()
        refused("eval", self.model, *EVALUATE, code=None, parts=["tokenizer"])

    def test_unreadable(self):
        """A folder where a file should be."""
        self.weights.unlink()
        self.weights.mkdir()
        self.check("model.safetensors", code=None)


class Packed(TestCase):
    """A damaged FireQ folder."""

    def setUp(self):
        super().setUp()
        made = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        self.model = copy_model(made, self.tmp / "packed")

    def check(self, *parts, code=INPUT):
        refused("validate", self.model, "--quiet", code=code, parts=parts)

    def check_loading(self, *parts, code=INPUT):
        self.check(*parts, code=code)
        refused("eval", self.model, *EVALUATE, code=code, parts=parts)
        refused("generate", self.model, "-p", "Once", "-n", 4, "--quiet", code=code, parts=parts)

    def test_truncated_shard(self):
        path = shards(self.model)[0]
        whole = path.read_bytes()
        for size in (0, 8, len(whole) // 2, len(whole) - 1):
            with self.subTest(size):
                path.write_bytes(whole[:size])
                self.check_loading("model.safetensors")

    def test_lost_shard(self):
        cut = copy_model(self.quantised("cut", STORIES_260K, "--preset", "rtn", "--shard-size", "64kB"), self.tmp / "cut")
        lost = shards(cut)[1]
        lost.unlink()
        refused("validate", cut, "--quiet", code=INPUT, parts=[lost.name])

    def test_every_bit_of_the_header_matters(self):
        """A flipped bit in the header is refused, or leaves a header that means the same."""
        path = shards(self.model)[0]
        whole = path.read_bytes()
        _, begin = read_header(path)
        rng = random.Random(3)
        for _ in range(60):
            byte, bit = rng.randrange(begin), rng.randrange(8)
            path.write_bytes(whole)
            flip(path, byte, bit)
            result = fireq("validate", self.model, "--quiet", code=None)
            if result.code == 0:
                # Only a bit of a blank may be without meaning.
                self.assertIn(whole[byte:byte + 1], (b" ", b"\n"), f"byte {byte} bit {bit}")
            else:
                self.assertEqual(INPUT, result.code, result)

    def test_flipped_bits_that_break_a_rule(self):
        name = "model.layers.2.mlp.down_proj"  # K = 172: 84 columns of padding
        row_bytes = 128
        cases = []
        codes = location(self.model, name + ".weight_codes")
        cases.append(("padding", codes[0], codes[1] + 172 // 2, 0x10))
        cases.append(("padding", codes[0], codes[1] + row_bytes * 5 - 1, 0x01))
        scale = location(self.model, name + ".weight_group_scale")
        cases.append(("scale", scale[0], scale[1] + 7, 0x80))
        for title, path, byte, mask in cases:
            with self.subTest(title=title, byte=byte):
                keep = path.read_bytes()
                poke(path, byte, bytes([keep[byte] ^ mask]))
                self.check(name, title)
                path.write_bytes(keep)

    def test_values_that_no_writer_makes(self):
        name = "model.layers.1.self_attn.q_proj"
        for tensor, value, part in (
            ("weight_codes", b"\x08", "code"), ("weight_codes", b"\x80", "code"),
            ("weight_group_scale", b"\x00", "scale"), ("weight_group_scale", b"\x7f", "scale"),
            ("weight_group_scale", b"\xff", "scale"), ("weight_group_scale", b"\x81", "scale"),
            ("weight_row_scale", struct.pack("<f", float("nan")), "scale"),
            ("weight_row_scale", struct.pack("<f", float("inf")), "scale"),
            ("weight_row_scale", struct.pack("<f", -1.0), "scale"),
            ("weight_row_scale", struct.pack("<f", 0.0), "scale"),
            ("weight_shape", struct.pack("<q", 65), "shape"), ("weight_shape", struct.pack("<q", -1), "shape"),
        ):
            with self.subTest(tensor=tensor, value=value):
                path, begin, _ = location(self.model, f"{name}.{tensor}")
                keep = path.read_bytes()
                poke(path, begin, value)
                self.check(name, part)
                refused("eval", self.model, *EVALUATE, code=INPUT, parts=[name])
                path.write_bytes(keep)

    def test_random_bits_in_the_data_never_crash(self):
        path = shards(self.model)[0]
        whole = path.read_bytes()
        _, begin = read_header(path)
        rng = random.Random(5)
        for _ in range(30):
            path.write_bytes(whole)
            for _ in range(rng.choice((1, 100))):
                flip(path, rng.randrange(begin, len(whole)), rng.randrange(8))
            result = fireq("validate", self.model, "--quiet", code=None)
            self.assertIn(result.code, (0, INPUT), result)
            result = fireq("eval", self.model, *EVALUATE, code=None)
            self.assertIn(result.code, (0, INPUT), result)

    def test_quantization_config(self):
        path = self.model / "config.json"
        keep = path.read_text()
        for key, value, part in (
            ("format_version", 2, "format_version"), ("format_version", "1", "format_version"),
            ("layout", "sm100", "sm100"), ("layout", None, "layout"), ("levels", "nf4", "nf4"),
            ("levels", [0, 1, 2, 3, 4, 5, 6], "levels"), ("levels", [0, 1, 2, 3, 4, 5, 7, 6], "levels"),
            ("levels", [0, 1, 2, 3, 4, 5, 6, 449], "levels"), ("group_size", 64, "group_size"),
            ("group_size", -128, "group_size"), ("row_scale", "column", "column"), ("row_scale", "tensor", "weight_row_scale"),
            ("layout", "sm90", "weight_tiles"),
        ):
            with self.subTest(key=key, value=value):
                edit_json(path, lambda j: j["quantization_config"].__setitem__(key, value))
                self.check_loading(part)
                path.write_text(keep)
        for key in ("format_version", "levels", "layout", "group_size", "row_scale"):
            with self.subTest(lost=key):
                edit_json(path, lambda j: j["quantization_config"].pop(key))
                self.check_loading(key)
                path.write_text(keep)

    def test_other_quantisation_methods_are_refused_by_name(self):
        edit_json(self.model / "config.json", lambda j: j["quantization_config"].__setitem__("quant_method", "bitsandbytes"))
        refused("eval", self.model, *EVALUATE, code=INPUT, parts=["bitsandbytes", "gptq"])
        edit_json(self.model / "config.json", lambda j: j["quantization_config"].__setitem__("quant_method", "gptq"))
        refused("eval", self.model, *EVALUATE, code=INPUT, parts=["quantization_config.bits", "missing"])

    def test_shape_against_the_config(self):
        edit_json(self.model / "config.json", lambda j: j.__setitem__("intermediate_size", 300))
        self.check_loading("mlp.")

    def test_lost_and_foreign_tensors(self):
        tensors = read_tensors(self.model)
        path = shards(self.model)[0]
        name = "model.layers.0.self_attn.k_proj.weight_group_scale"
        write_safetensors(path, {n: t for n, t in tensors.items() if n != name})
        self.check_loading(name)
        write_safetensors(path, {**tensors, "model.layers.0.self_attn.k_proj.weight": tensors[name]})
        self.check("model.layers.0.self_attn.k_proj.weight")


class Environment(TestCase):
    def test_read_only_output(self):
        """A file where the folder's parent should be (root may write anywhere else)."""
        (self.tmp / "file").write_text("")
        refused("quantize", STORIES_260K, "-o", self.tmp / "file" / "out", "--preset", "rtn", "--quiet", code=None,
                parts=["file"])

    def test_output_folder_without_the_right_to_write(self):
        nobody = 65534 if os.geteuid() == 0 else None
        closed = self.tmp / "closed"
        closed.mkdir()
        closed.chmod(0o555)
        self.tmp.chmod(0o755)
        self.addCleanup(closed.chmod, 0o755)
        if nobody and fireq("inspect", STORIES_260K, "--quiet", code=None, user=nobody).code != 0:
            self.skipTest("another user cannot read the test data here, and root may write anywhere")
        for command, made in ((("quantize", STORIES_260K, "-o", closed / "out", "--preset", "rtn"), "out"),
                              (("calibrate", STORIES_260K, "-o", closed / "x.h5", *EVALUATE[:4]), "x.h5"),
                              (("inspect", STORIES_260K, "--json", closed / "r.json"), "r.json")):
            with self.subTest(command[0]):
                refused(*command, "--quiet", code=ENVIRONMENT, parts=[closed / made, "Permission denied"], user=nobody)
                self.assertEqual([], list(closed.iterdir()))

    def test_output_to_a_full_device(self):
        line = refused("eval", STORIES_260K, *EVALUATE, "--json", "/dev/full/x", code=None)
        self.assertIn("/dev/full", line)

    def test_closed_pipe(self):
        """A reader that goes away is an error of the environment, not a crash."""
        import subprocess
        from harness import arguments, environment
        process = subprocess.Popen(arguments(("eval", STORIES_260K, "--text", TINY, "--max-chars", 3000)),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        self.assertIn(process.wait(), (0, ENVIRONMENT), err)


if __name__ == "__main__":
    main()
