"""fireq eval: the perplexities of golden.json, and the keys of the report."""
import json
import math

from harness import DATA, TestCase, fireq_json, main

KEYS = {"ppl", "nll_per_token", "nll_stderr", "tokens", "windows", "scored", "bos", "seconds", "cpu_seconds"}
GOLDEN = {g["name"]: g for g in json.loads((DATA / "golden/golden.json").read_text())}


class Golden(TestCase):
    """Hugging Face transformers in FP32."""

    def check(self, name):
        golden = GOLDEN[name]
        got = fireq_json("eval", DATA / "models" / golden["model"], "--text", DATA / "text" / golden["text"],
                         "--max-chars", golden["chars"], "--ctx", golden["ctx"], "--bos", golden["bos"])
        self.assertLessEqual(KEYS, set(got))
        for key in ("tokens", "windows", "scored"):
            self.assertEqual(golden[key], got[key], key)
        self.assertEqual(golden["bos"], got["bos"])
        self.assertAlmostEqual(got["ppl"] / golden["ppl"], 1, delta=1e-4)
        self.assertAlmostEqual(got["nll_per_token"], golden["nll_per_token"], delta=1e-4)
        self.assertAlmostEqual(got["ppl"], math.exp(got["nll_per_token"]), delta=1e-9 * got["ppl"])

    def test_stories260K(self):
        self.check("stories260K_tinystories")

    def test_stories260K_bf16(self):
        self.check("stories260K-bf16_tinystories")

    def test_stories15M(self):
        self.check("stories15M_grimm")


if __name__ == "__main__":
    main()
