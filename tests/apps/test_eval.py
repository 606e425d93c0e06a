"""fireq eval: windows and BOS, every switch against the oracle, references, bad texts."""
import json
import math

import numpy as np

import oracle
from harness import (CALIBRATE_260K, DATA, GRIMM, INPUT, STORIES_15M, STORIES_260K, STORIES_260K_BF16, TINY, USAGE,
                     TestCase, copy_model, edit_json, fireq_json, main, read_tensors, refused, write_safetensors)

LENGTH = 256


def tiny(begin, count):
    return TINY.read_bytes().decode()[begin:begin + count]


class Windows(TestCase):
    """Windows, scores and BOS, recomputed from the text with the oracle's tokenizer and forward pass."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = oracle.Model(STORIES_260K)
        cls.tokenizer = oracle.SentencePiece(STORIES_260K / "tokenizer.model")

    def evaluate(self, *args, length=LENGTH, chars=4000):
        return fireq_json("eval", STORIES_260K, "--text", TINY, "--skip-chars", 1234, "--max-chars", chars,
                          "--ctx", length, *args)

    def check(self, got, ids, scores, windows):
        self.assertEqual(windows, got["windows"])
        self.assertEqual(len(scores), got["scored"])
        self.assertAlmostEqual(got["nll_per_token"], -scores.mean(), delta=2e-6)
        self.assertAlmostEqual(got["nll_stderr"], scores.std(ddof=1) / math.sqrt(len(scores)),
                               delta=1e-3 * got["nll_stderr"])
        np.testing.assert_allclose(got["window_nll"], -scores.reshape(windows, -1).mean(axis=1), rtol=0, atol=2e-5)

    def scores(self, windows):
        return np.concatenate([self.model.log_likelihoods(w) for w in windows])

    def test_bos_at_the_head(self):
        ids = [1] + self.tokenizer.encode(tiny(1234, 4000))
        windows = oracle.windows(ids, LENGTH)
        got = self.evaluate("--bos", "head")
        self.check(got, ids, self.scores(windows), len(windows))
        self.assertEqual(len(ids), got["tokens"])
        self.assertEqual(got["ppl"], self.evaluate()["ppl"], "head is this checkpoint's default")

    def test_no_bos(self):
        windows = oracle.windows(self.tokenizer.encode(tiny(1234, 4000)), LENGTH)
        got = self.evaluate("--bos", "none")
        self.check(got, None, self.scores(windows), len(windows))

    def test_bos_in_each_window(self):
        ids = self.tokenizer.encode(tiny(1234, 4000))
        windows = [np.concatenate([[1], w]) for w in oracle.windows(ids, LENGTH - 1)]
        got = self.evaluate("--bos", "window")
        self.check(got, None, self.scores(windows), len(windows))

    def test_shortest_window_and_exact_fit(self):
        ids = [1] + self.tokenizer.encode(tiny(1234, 300))
        for length in (2, 3, len(ids) - 1, len(ids)):
            with self.subTest(length):
                windows = oracle.windows(ids, length)
                got = self.evaluate("--bos", "head", length=length, chars=300)
                self.check(got, ids, self.scores(windows), len(windows))
        refused("eval", STORIES_260K, "--text", TINY, "--skip-chars", 1234, "--max-chars", 300, "--ctx", len(ids) + 1,
                "--bos", "head", "--quiet", code=INPUT, parts=[len(ids) + 1, len(ids)])

    def test_token_file_gives_what_the_text_gives(self):
        ids = self.tokenizer.encode(tiny(1234, 4000))
        path = self.tmp / "ids.u32"
        np.array(ids, "<u4").tofile(path)
        tokens = fireq_json("eval", STORIES_260K, "--tokens", path, "--ctx", LENGTH, "--bos", "head")
        text = self.evaluate("--bos", "head")
        self.assertEqual({**text, "seconds": 0, "cpu_seconds": 0}, {**tokens, "seconds": 0, "cpu_seconds": 0})

    def test_bad_token_files(self):
        path = self.tmp / "ids.u32"
        ids = np.full(600, 7, "<u4")
        ids[321] = 512  # the vocabulary has 512
        ids.tofile(path)
        refused("eval", STORIES_260K, "--tokens", path, "--quiet", code=INPUT, parts=["ids.u32", 321, 512])
        path.write_bytes(b"\1\0\0\0" * 600 + b"\1\0\0")
        refused("eval", STORIES_260K, "--tokens", path, "--quiet", code=INPUT, parts=["ids.u32"])
        path.write_bytes(b"")
        refused("eval", STORIES_260K, "--tokens", path, "--quiet", code=INPUT, parts=["ids.u32"])

    def test_any_thread_count(self):
        got = [self.evaluate("--threads", n) for n in (1, 2, 7)]
        for other in got[1:]:
            self.assertEqual({**got[0], "seconds": 0, "cpu_seconds": 0}, {**other, "seconds": 0, "cpu_seconds": 0})


class Switches(TestCase):
    """Each part of the quantisation, alone and together, from the packed bytes, against the oracle."""

    CHARS = 6000
    # Summation order moves a few activations across a rounding boundary; bf16 outputs make that visible.
    DELTA = 4e-3

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        tokenizer = oracle.SentencePiece(STORIES_260K / "tokenizer.model")
        cls.ids = [1] + tokenizer.encode(tiny(50000, cls.CHARS))

    def evaluate(self, folder, *args):
        return fireq_json("eval", folder, "--text", TINY, "--skip-chars", 50000, "--max-chars", self.CHARS, "--ctx",
                          LENGTH, "--bos", "head", *args)["nll_per_token"]

    def check(self, folder, default):
        model = oracle.Model(folder)
        off = dict(activations="fp", k="fp", v="fp", qp="fp")
        plain = oracle.nll(model, self.ids, LENGTH, **off)
        options = ("--activations", "fp", "--kv", "fp", "--qp", "fp")
        # Without rounding on the way nothing but the order of sums differs.
        self.assertAlmostEqual(self.evaluate(folder, *options), plain, delta=2e-5)
        for on, switch in ((dict(activations="fp8"), ("--activations", "fp8", "--kv", "fp", "--qp", "fp")),
                           (dict(k="int4"), ("--activations", "fp", "--k", "int4", "--v", "fp", "--qp", "fp")),
                           (dict(v="int4"), ("--activations", "fp", "--k", "fp", "--v", "int4", "--qp", "fp")),
                           (dict(k="int4", v="int4"), ("--activations", "fp", "--kv", "int4", "--qp", "fp")),
                           (dict(qp="fp8"), ("--activations", "fp", "--kv", "fp", "--qp", "fp8")),
                           (default, ())):
            with self.subTest(folder=folder.name, on=on):
                expected = oracle.nll(model, self.ids, LENGTH, **{**off, **on})
                got = self.evaluate(folder, *switch)
                self.assertAlmostEqual(got, expected, delta=self.DELTA)
                self.assertNotEqual(got, self.evaluate(folder, *options), "the switch does something")

    def test_packed_folder(self):
        everything = dict(activations="fp8", k="int4", v="int4", qp="fp8")
        self.check(self.quantised("rtn", STORIES_260K, "--preset", "rtn"), everything)
        self.check(self.quantised("paper", STORIES_260K, "--preset", "paper", *CALIBRATE_260K), everything)
        self.check(self.quantised("fast", STORIES_260K_BF16, "--preset", "fast", *CALIBRATE_260K), everything)

    def test_original_folder_is_plain_unless_told(self):
        model = oracle.Model(STORIES_260K)
        self.assertAlmostEqual(self.evaluate(STORIES_260K), oracle.nll(model, self.ids, LENGTH), delta=2e-6)
        expected = oracle.nll(model, self.ids, LENGTH, activations="fp8")
        self.assertAlmostEqual(self.evaluate(STORIES_260K, "--activations", "fp8"), expected, delta=self.DELTA)

    def test_original_weights_of_a_packed_folder(self):
        packed = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        refused("eval", packed, "--text", TINY, "--max-chars", 5000, "--weights", "original", "--quiet", code=USAGE,
                parts=["original"])


class Reference(TestCase):
    def test_kl_and_top1_against_the_oracle(self):
        packed = self.quantised("rtn", STORIES_260K, "--preset", "rtn")
        got = fireq_json("eval", packed, "--reference", STORIES_260K, "--text", TINY, "--max-chars", 3000, "--ctx", 128,
                         "--bos", "head", "--activations", "fp", "--kv", "fp", "--qp", "fp")
        ids = [1] + oracle.SentencePiece(STORIES_260K / "tokenizer.model").encode(tiny(0, 3000))
        p, q = oracle.Model(STORIES_260K), oracle.Model(packed)
        kl, same, delta = [], [], []
        for window in oracle.windows(ids, 128):
            lp, lq = (m.logits(window)[:-1].astype(np.float64) for m in (p, q))
            lp -= np.log(np.exp(lp).sum(axis=1, keepdims=True))
            lq -= np.log(np.exp(lq).sum(axis=1, keepdims=True))
            kl.append((np.exp(lp) * (lp - lq)).sum(axis=1))
            same.append(lp.argmax(axis=1) == lq.argmax(axis=1))
            target = np.arange(len(lp)), np.asarray(window[1:])
            delta.append(lp[target] - lq[target])
        kl, same, delta = np.concatenate(kl), np.concatenate(same), np.concatenate(delta)
        self.assertAlmostEqual(got["kl_mean"], kl.mean(), delta=1e-4 * kl.mean() + 1e-6)
        self.assertAlmostEqual(got["kl_max"], kl.max(), delta=1e-3 * kl.max())
        self.assertAlmostEqual(got["top1_agree"], same.mean(), delta=2 / len(same))
        self.assertAlmostEqual(got["delta_nll"], delta.mean(), delta=2e-5)
        for key, values in (("delta_nll_stderr", delta), ("kl_stderr", kl)):
            self.assertAlmostEqual(got[key], values.std(ddof=1) / len(values) ** 0.5, delta=1e-3 * got[key], msg=key)

    def test_a_model_against_itself(self):
        got = fireq_json("eval", STORIES_260K, "--reference", STORIES_260K, "--text", TINY, "--max-chars", 3000)
        self.assertLess(abs(got["kl_mean"]), 1e-9)
        self.assertEqual((0, 0), (got["delta_nll"], got["delta_nll_stderr"]))
        self.assertEqual(1, got["top1_agree"])

    def test_a_reference_with_another_vocabulary_is_refused(self):
        refused("eval", STORIES_260K, "--reference", STORIES_15M, "--text", TINY, "--max-chars", 3000, "--quiet",
                code=INPUT, parts=["stories15M", "not the same model"])
        # All sizes but the vocabulary's the same.
        other = copy_model(STORIES_260K, self.tmp / "other")
        tensors = {n: (d, a.copy()) for n, (d, a) in read_tensors(STORIES_260K).items()}
        dtype, embedding = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = (dtype, embedding[:500])
        write_safetensors(other / "model.safetensors", tensors)
        edit_json(other / "config.json", lambda j: j.__setitem__("vocab_size", 500))
        refused("eval", STORIES_260K, "--reference", other, "--text", TINY, "--max-chars", 3000, "--quiet",
                code=INPUT, parts=["other", "512", "500"])


class Texts(TestCase):
    def evaluate(self, *args):
        return fireq_json("eval", STORIES_260K, "--ctx", 64, "--bos", "head", *args)

    def write(self, name, data):
        path = self.tmp / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def same(self, a, b):
        self.assertEqual({**a, "seconds": 0, "cpu_seconds": 0}, {**b, "seconds": 0, "cpu_seconds": 0})

    def test_characters_are_code_points(self):
        text = "é" * 37 + "日本語🙂" * 5 + tiny(0, 3000)
        whole = self.write("whole.txt", text)
        cut = self.write("cut.txt", text[40:1040])
        self.same(self.evaluate("--text", whole, "--skip-chars", 40, "--max-chars", 1000), self.evaluate("--text", cut))

    def test_several_files_are_joined_with_a_newline(self):
        a, b = tiny(0, 700), tiny(5000, 800)
        joined = self.write("joined.txt", a + "\n" + b)
        self.same(self.evaluate("--text", self.write("a.txt", a), self.write("b.txt", b)),
                  self.evaluate("--text", joined))

    def test_jsonl_and_folders(self):
        a, b, c = tiny(0, 700), tiny(5000, 800), tiny(9000, 300)
        folder = self.tmp / "texts"
        (folder / "deeper").mkdir(parents=True)
        (folder / "1.txt").write_text(a)
        (folder / "2.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate((b, c))))
        (folder / "deeper" / "ignored.bin").write_bytes(b"\xff\xfe")
        joined = self.write("joined.txt", "\n".join((a, b, c)))
        self.same(self.evaluate("--text", folder), self.evaluate("--text", joined))
        refused("eval", STORIES_260K, "--text", self.write("bad.jsonl", json.dumps({"body": a}) + "\n"), "--quiet",
                code=INPUT, parts=["bad.jsonl", "text"])
        refused("eval", STORIES_260K, "--text", self.write("broken.jsonl", '{"text": "a"}\n{"text": '), "--quiet",
                code=INPUT, parts=["broken.jsonl"])

    def test_crlf_is_text_like_any_other(self):
        got = self.evaluate("--text", self.write("crlf.txt", tiny(0, 3000).replace("\n", "\r\n")))
        self.assertTrue(math.isfinite(got["ppl"]))

    def test_texts_that_are_refused(self):
        for name, data, parts in (
            ("empty.txt", b"", ["empty.txt"]),
            ("latin1.txt", "Öl ".encode("latin-1") * 500, ["latin1.txt", "UTF-8", "offset 0"]),
            ("cut.txt", tiny(0, 3000).encode() + b"\xe2\x82", ["cut.txt", "UTF-8", "offset"]),
            ("surrogate.txt", b"abc \xed\xa0\x80", ["surrogate.txt", "UTF-8", "offset 4"]),
            ("overlong.txt", b"abc \xc0\xaf", ["overlong.txt", "UTF-8", "offset 4"]),
            ("short.txt", b"too short", ["64"]),
        ):
            with self.subTest(name):
                refused("eval", STORIES_260K, "--text", self.write(name, data), "--ctx", 64, "--quiet", code=INPUT,
                        parts=parts)

    def test_skipping_past_the_end(self):
        refused("eval", STORIES_260K, "--text", GRIMM, "--skip-chars", 10**9, "--quiet", code=None, parts=["skip"])


class Models(TestCase):
    def test_unknown_architectures_are_refused_by_name(self):
        for change, part in (
            (dict(model_type="mixtral", architectures=["MixtralForCausalLM"]), "mixtral"),
            (dict(hidden_act="relu2"), "relu2"),
            (dict(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "longrope"),
            (dict(num_attention_heads=7), "num_attention_heads"),
            (dict(num_key_value_heads=3), "num_key_value_heads"),
            (dict(hidden_size=-64), "hidden_size"),
            (dict(num_hidden_layers=6), "model.layers.5"),
            (dict(intermediate_size=176), "mlp"),
        ):
            with self.subTest(part):
                model = copy_model(STORIES_260K, self.tmp / part)
                config = json.loads((model / "config.json").read_text())
                config.update(change)
                (model / "config.json").write_text(json.dumps(config))
                refused("eval", model, "--text", TINY, "--max-chars", 3000, "--quiet", code=INPUT, parts=[part])


if __name__ == "__main__":
    main()
