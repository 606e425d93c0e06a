"""fireq generate: greedy continuation against the oracle, seeds, limits, stopping."""
import numpy as np

import oracle
from harness import (CALIBRATE_260K, INPUT, STORIES_15M, STORIES_260K, USAGE, TestCase, fireq, fireq_json, main, refused)

PROMPT = "Once upon a time"


class Generate(TestCase):
    def greedy(self, folder, count, margin, **precision):
        """The oracle's greedy ids after PROMPT, cut where the best two tokens are closer than `margin`."""
        model = oracle.Model(folder)
        tokenizer = oracle.SentencePiece(folder / "tokenizer.model")
        ids = [1] + tokenizer.encode(PROMPT)
        begin = len(ids)
        for _ in range(count):
            logits = model.logits(np.array(ids), last=True, **precision)[-1]
            second, first = np.partition(logits, -2)[-2:]
            if first - second < margin:
                break
            ids.append(int(logits.argmax()))
        pieces = [tokenizer.pieces[i][0] for i in ids[begin:]]
        return "".join(pieces).replace("\u2581", " ").replace("<0x0A>", "\n")

    def check(self, folder, margin, **precision):
        expected = self.greedy(folder, 40, margin, **precision)
        got = fireq_json("generate", folder, "-p", PROMPT, "-n", 40, "--temperature", 0)
        self.assertGreater(len(expected), 20, "the oracle was never sure")
        self.assertEqual(expected, got["text"][:len(expected)])

    def test_greedy_original(self):
        self.check(STORIES_260K, 1e-3)
        self.check(STORIES_15M, 1e-3)

    def test_greedy_packed_with_the_int4_cache(self):
        out = self.quantised("fast", STORIES_260K, "--preset", "fast", *CALIBRATE_260K)
        self.check(out, 0.1, activations="fp8", k="int4", v="int4", qp="fp8")

    def test_output_is_the_prompt_and_the_text(self):
        report = fireq_json("generate", STORIES_260K, "-p", PROMPT, "-n", 30, "--temperature", 0)
        result = fireq("generate", STORIES_260K, "-p", PROMPT, "-n", 30, "--temperature", 0)
        self.assertEqual(PROMPT + report["text"] + "\n", result.out)
        self.assertIn("tokens/s", result.err)
        self.assertEqual(30, report["new_tokens"])
        quiet = fireq("generate", STORIES_260K, "-p", PROMPT, "-n", 30, "--temperature", 0, "--quiet")
        self.assertEqual((result.out, ""), (quiet.out, quiet.err))

    def test_seeds(self):
        def text(seed, *args):
            return fireq_json("generate", STORIES_260K, "-p", PROMPT, "-n", 60, "--temperature", 1, "--seed", seed,
                              *args)["text"]
        self.assertEqual(text(1), text(1, "--threads", 1))
        self.assertEqual(text(1, "--threads", 2), text(1, "--threads", 7))
        self.assertGreater(len({text(seed) for seed in range(4)}), 2)

    def test_top_p_of_nearly_nothing_is_greedy(self):
        greedy = fireq_json("generate", STORIES_260K, "-p", PROMPT, "-n", 40, "--temperature", 0)["text"]
        nearly = fireq_json("generate", STORIES_260K, "-p", PROMPT, "-n", 40, "--temperature", 1, "--top-p", 1e-6)["text"]
        self.assertEqual(greedy, nearly)

    def test_stops(self):
        story = fireq_json("generate", STORIES_15M, "-p", PROMPT, "-n", 10000, "--temperature", 0)
        self.assertIn(story["stopped_at"], ("eos", "context"))
        self.assertLessEqual(story["prompt_tokens"] + story["new_tokens"], 257)
        self.assertEqual("length", fireq_json("generate", STORIES_260K, "-p", PROMPT, "-n", 3)["stopped_at"])

    def test_prompt_from_a_file_and_unicode(self):
        (self.tmp / "prompt.txt").write_text(PROMPT)
        a = fireq_json("generate", STORIES_260K, "--prompt-file", self.tmp / "prompt.txt", "-n", 10, "--temperature", 0)
        b = fireq_json("generate", STORIES_260K, "-p", PROMPT, "-n", 10, "--temperature", 0)
        self.assertEqual(a["text"], b["text"])
        fireq("generate", STORIES_260K, "-p", "naïve 日本 🙂", "-n", 5, "--quiet")
        (self.tmp / "bad.txt").write_bytes(b"Once \xff")
        refused("generate", STORIES_260K, "--prompt-file", self.tmp / "bad.txt", "-n", 5, "--quiet", code=INPUT,
                parts=["bad.txt", "5"])

    def test_refusals(self):
        for args, parts in ((("-n", 5), ["prompt"]), (("-p", "x", "-n", 0), ["-n"]), (("-p", "x", "-n", -1), ["-n"]),
                            (("-p", "x", "--temperature", -1), ["temperature"]), (("-p", "x", "--top-p", 0), ["top-p"]),
                            (("-p", "x", "--top-p", 1.5), ["top-p"]), (("-p", "x", "--temperature", "nan"), ["temperature"]),
                            (("-p", "x", "--chat"), ["chat"])):
            with self.subTest(args):
                refused("generate", STORIES_260K, *args, "--quiet", code=USAGE, parts=parts)

    def test_prompt_longer_than_the_context(self):
        refused("generate", STORIES_260K, "-p", "word " * 2000, "-n", 5, "--quiet", code=None, parts=["512"])


if __name__ == "__main__":
    main()
