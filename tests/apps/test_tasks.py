"""fireq eval --tasks: likelihoods against a forward pass in numpy, the file's forms, and what is refused."""
import json
import random
import subprocess
import sys

import numpy as np

import oracle
from harness import (CALIBRATE_260K, INPUT, ROOT, STORIES_260K, TINY, USAGE, TestCase, fireq_json, main, refused)


class Tasks(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tokenizer = oracle.SentencePiece(STORIES_260K / "tokenizer.model")
        cls.model = oracle.Model(STORIES_260K)

    def file(self, *items, name="tasks.jsonl"):
        path = self.tmp / name
        path.write_text("".join(json.dumps(i) + "\n" for i in items))
        return path

    def score(self, context, choice, bos=True, limit=10**9):
        """(log-likelihood, written greedily) of `choice` behind `context`."""
        before = self.tokenizer.encode(context.rstrip())
        ids = self.tokenizer.encode(context + choice)
        scored = len(ids) - len(before)
        ids = ([1] if bos else []) + ids
        ids = ids[-limit:]
        scored = min(scored, len(ids) - 1)
        logits = self.model.logits(np.asarray(ids)).astype(np.float64)[-scored - 1:-1]
        logs = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) - logits.max(axis=1, keepdims=True)
        target = ids[-scored:]
        return logs[np.arange(scored), target].sum(), bool(np.all(logits.argmax(axis=1) == target))

    def items(self, count):
        words = TINY.read_text()[50000:70000].split()
        draw = random.Random(5)
        for i in range(count):
            piece = words[40 * i:40 * i + draw.randrange(8, 30)]
            wrong = [" ".join(draw.sample(words, draw.randrange(1, 5))) for _ in range(2)]
            endings = [" ".join(piece[-3:]), *wrong]
            order = draw.sample(range(3), 3)
            yield " ".join(piece[:-3]), [endings[j] for j in order], order.index(0)

    def test_choices(self):
        listed = list(self.items(25))
        got = fireq_json("eval", STORIES_260K, "--tasks", self.file(*({"query": q, "choices": c, "gold": g} for q, c, g in listed)))
        (got,) = got["tasks"]
        right = normed = nll = 0
        for query, choices, gold in listed:
            scores = np.array([self.score(query, " " + c)[0] for c in choices])
            right += scores.argmax() == gold
            normed += (scores / [len(c) for c in choices]).argmax() == gold
            nll -= scores[gold]
        self.assertEqual((got["items"], got["acc"], got["acc_norm"]), (25, right / 25, normed / 25))
        self.assertAlmostEqual(got["gold_nll"], nll / 25, delta=1e-4)
        self.assertAlmostEqual(got["acc_stderr"], np.sqrt(right / 25 * (1 - right / 25) / 24), delta=1e-9)
        self.assertGreater(right, 8)  # chance

    def test_last_words(self):
        texts = [" ".join([q, *c[g].split()]) for q, c, g in self.items(30)]
        (got,) = fireq_json("eval", STORIES_260K, "--tasks", self.file(*({"text": t + "\n"} for t in texts)))["tasks"]
        scores = [self.score(*(lambda head, word: (head, " " + word))(*t.rsplit(" ", 1))) for t in texts]
        self.assertEqual(got["acc"], sum(greedy for _, greedy in scores) / 30)
        self.assertAlmostEqual(got["gold_nll"], -sum(s for s, _ in scores) / 30, delta=1e-4)
        self.assertNotIn("acc_norm", got)

    def test_forms_of_one_item(self):
        """Keys of several data sets: the same question, the same answer."""
        q, c = "Once upon a time there was a", ["little girl", "xylophone tax"]
        forms = [{"query": q, "choices": c, "gold": 0}, {"ctx": q, "endings": c, "label": "0"}, {"question": q, "options": c, "answer": "A"},
                 {"context": q + " ", "choices": c, "gold": 0}, {"input": q, "choices": [" " + x for x in c], "gold": 0, "more": [1]},
                 {"question": q, "choices": {"text": c, "label": ["1", "2"]}, "answerKey": "1"}]
        results = [fireq_json("eval", STORIES_260K, "--tasks", self.file(form))["tasks"][0] for form in forms]
        self.assertEqual(results[0]["acc"], 1)
        self.assertAlmostEqual(results[0]["gold_nll"], -self.score(q, " " + c[0])[0], delta=1e-4)
        for r in results[1:]:
            self.assertEqual({**r, "task": ""}, {**results[0], "task": ""})

    def test_bos_and_context(self):
        q, c = " ".join(TINY.read_text()[1000:2000].split()), ["the end", "a dog"]
        path = self.file({"query": q, "choices": c, "gold": 1})
        (got,) = fireq_json("eval", STORIES_260K, "--tasks", path, "--bos", "none", "--ctx", 64)["tasks"]
        self.assertAlmostEqual(got["gold_nll"], -self.score(q, " " + c[1], bos=False, limit=64)[0], delta=1e-4)

    def test_a_packed_folder_and_several_files(self):
        out = self.quantised("fast", STORIES_260K, "--preset", "fast", *CALIBRATE_260K)
        a, b = (self.tmp / f"{kind}.jsonl" for kind in ("choice", "last-word"))
        for path in (a, b):
            subprocess.run([sys.executable, ROOT / "scripts/make_tasks.py", TINY, "-o", path, "--kind", path.stem, "--count", "60"],
                           check=True, stdout=subprocess.DEVNULL)
        got = fireq_json("eval", out, "--tasks", a, b, "--reference", STORIES_260K)
        self.assertEqual([t["task"] for t in got["tasks"]], [str(a), str(b)])
        alone = fireq_json("eval", STORIES_260K, "--tasks", a, b)["tasks"]
        for task, own in zip(got["tasks"], alone):
            self.assertEqual(task["reference"]["acc"], own["acc"])
            self.assertNotEqual(task["gold_nll"], own["gold_nll"])
            self.assertTrue(0.5 < task["same_choice"] <= 1, task)
        self.assertGreater(alone[0]["acc"], 0.5)  # true endings are likelier than strange ones
        one, two = (fireq_json("eval", out, "--tasks", a, "--threads", n)["tasks"] for n in (1, 2))
        self.assertEqual(one, two)

    def test_refusals(self):
        good = {"query": "a", "choices": ["b", "c"], "gold": 0}
        for line, parts in (("nonsense", ["line 2", "JSON"]), ('{"query": "a"}', ["line 2", "choices"]), ('{"choices": ["a", "b"]}', ["line 2", "query"]),
                            ('{"query": "a", "choices": ["b", "c"]}', ["gold"]), ('{"query": "a", "choices": ["b", "c"], "gold": 2}', ["below 2"]),
                            ('{"query": "a", "choices": ["b", "c"], "gold": -1}', ["below 2"]), ('{"query": "a", "choices": ["b"], "gold": 0}', ["two"]),
                            ('{"query": "a", "choices": ["b", ""], "gold": 0}', ["empty"]), ('{"query": 3, "choices": ["b", "c"], "gold": 0}', ["string"]),
                            ('{"text": "a word"}', ["mixed"]), ('{"query": "a", "choices": ["b", "c"], "gold": "Z"}', ["letter"])):
            path = self.file(good)
            path.write_text(path.read_text() + line + "\n")
            refused("eval", STORIES_260K, "--tasks", path, "--quiet", code=INPUT, parts=["tasks.jsonl", *parts])
        refused("eval", STORIES_260K, "--tasks", self.file({"text": "alone"}), "--quiet", code=INPUT, parts=["line 1", "two words"])
        refused("eval", STORIES_260K, "--tasks", self.file(), "--quiet", code=INPUT, parts=["no item"])
        refused("eval", STORIES_260K, "--tasks", self.tmp / "none.jsonl", "--quiet", code=INPUT, parts=["none.jsonl"])
        refused("eval", STORIES_260K, "--tasks", self.file(good), "--text", TINY, "--quiet", code=USAGE, parts=["--tasks"])


if __name__ == "__main__":
    main()
