#!/usr/bin/env python3
"""How well models predict texts of their language and others: what `fireq calibrate` makes of each (docs/recipes.md has a run).

Texts are those of the test data, this repository's code, and made ones: shuffled tokens and words, random words, letters and
base64, a column of numbers, one sentence again and again. --text NAME=FILE adds others.

    text_fit.py --fireq build/release/bin/fireq --data build/data [--smollm2 DIR] [--text German=FILE ...]

Needs the packages tokenizers and sentencepiece.
"""
import argparse
import base64
import json
import random
import re
import struct
import subprocess
import tempfile
from pathlib import Path

from accuracy_table import GRIMM, TINY, WIKI

ROOT = Path(__file__).resolve().parents[2]
CHARS = 60000


def encoder(folder):
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    from sentencepiece import SentencePieceProcessor
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode


def texts(data, more):
    draw = random.Random(1)
    read = lambda name, skip: (data / name).read_text(encoding="utf-8")[skip:skip + CHARS]
    stories, grimm, wiki = read(TINY, 300000), read(GRIMM, 5000), read(WIKI, 400000)
    words = sorted(set(re.findall("[a-z]+", (stories + grimm + wiki).lower())))
    shuffled = wiki.split()
    draw.shuffle(shuffled)
    yield "TinyStories", stories
    yield "Grimm's tales", grimm
    yield "WikiText", wiki
    yield "C++ (calib/*.cpp)", "".join(p.read_text() for p in sorted((ROOT / "calib").glob("*.cpp")))[:CHARS]
    for name, path in more:
        yield name, "\n".join(line for line in path.read_text(errors="ignore").splitlines() if not line.startswith(("#", ".")))
    yield "random words", " ".join(draw.choice(words) for _ in range(10000))
    yield "WikiText, words shuffled", " ".join(shuffled)
    yield "random letters", "".join(draw.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in range(CHARS))
    yield "base64 of random bytes", base64.b64encode(draw.randbytes(CHARS // 2)).decode()
    yield "numbers", "\n".join(",".join(f"{draw.random():.4f}" for _ in range(8)) for _ in range(1200))
    yield "one sentence, repeated", "The quick brown fox jumps over the lazy dog. " * 1200


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--fireq", type=Path, required=True)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--smollm2", type=Path)
    ap.add_argument("--text", nargs="+", default=[], metavar="NAME=FILE")
    ap.add_argument("--only", help="name of one model")
    ap.add_argument("--samples", type=int, default=32)
    ap.add_argument("--length", type=int, default=256)
    ap.add_argument("--threads", type=int, default=0)
    args = ap.parse_args()
    more = [(pair.split("=", 1)[0], Path(pair.split("=", 1)[1])) for pair in args.text]
    models = {"stories260K": args.data / "models/stories260K", "stories15M": args.data / "models/stories15M"}
    if args.smollm2:
        models["SmolLM2-135M"] = args.smollm2
    if args.only:
        models = {args.only: models[args.only]}
    rows = {}
    with tempfile.TemporaryDirectory() as tmp:
        ids_file, report = Path(tmp) / "ids.u32", Path(tmp) / "report.json"

        def fit(folder, ids):
            ids_file.write_bytes(struct.pack(f"<{len(ids)}I", *ids))
            done = subprocess.run([str(args.fireq), "calibrate", str(folder), "--tokens", str(ids_file), "--bos", "none", "--samples",
                                   str(args.samples), "--length", str(args.length), "-o", f"{tmp}/s.h5", "--force", "--quiet", "--threads",
                                   str(args.threads), "--json", str(report)], stderr=subprocess.PIPE, text=True)
            if done.returncode != 0:
                raise SystemExit(done.stderr)
            text = json.loads(report.read_text())["text"]
            assert text["unlike"] == ("looks unlike the model's language" in done.stderr)
            ratio = f"{text['nll'] / text['unigram']:.2f}"
            return f"{text['nll']:.2f} / {text['unigram']:.2f} = " + (f"**{ratio}**" if text["unlike"] else ratio)

        for model, folder in models.items():
            encode = encoder(folder)
            for name, text in texts(args.data, more):
                ids = encode(text)
                rows.setdefault(name, {})[model] = fit(folder, ids)
                if name in ("TinyStories", "WikiText"):
                    random.Random(2).shuffle(ids)
                    rows.setdefault(name + ", tokens shuffled", {})[model] = fit(folder, ids)
    print("| text | " + " | ".join(models) + " |\n|---" + "|---" * len(models) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells[m] for m in models) + " |")


if __name__ == "__main__":
    main()
