#!/usr/bin/env python3
"""Zero-shot tasks out of any text, for `fireq eval --tasks`: no download.

    make_tasks.py TEXT -o last-words.jsonl --kind last-word [--count 500] [--words 40] [--seed 0]
    make_tasks.py TEXT -o endings.jsonl --kind choice [--choices 4]

last-word: passages of about that many words, cut after a word; the last one is to be written (as LAMBADA asks).
choice: the same passages, and beside the true last words those of other passages of the text, in random order.
Take a text that was not used to calibrate. The same arguments give the same file.
"""
import argparse
import json
import random
import re
from pathlib import Path


def passages(text, words):
    """Runs of `words` words from sentence beginnings, without overlap; the last word has four letters or more."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    current = []
    for sentence in sentences:
        current += sentence.split()
        while len(current) >= words:
            end = words
            while end < len(current) and not re.fullmatch(r"[A-Za-z]{4,}[.,!?]?", current[end - 1]):
                end += 1
            piece, current = current[:end], []
            if re.fullmatch(r"[A-Za-z]{4,}[.,!?]?", piece[-1]):
                yield piece[:-1] + [piece[-1].rstrip(".,!?")]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("text", type=Path)
    ap.add_argument("-o", "--out", type=Path, required=True)
    ap.add_argument("--kind", choices=("last-word", "choice"), required=True)
    ap.add_argument("--count", type=int, default=500)
    ap.add_argument("--words", type=int, default=40)
    ap.add_argument("--choices", type=int, default=4)
    ap.add_argument("--ending", type=int, default=4, help="words of a choice")
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    found = list(passages(args.text.read_text(encoding="utf-8"), args.words))
    draw = random.Random(args.seed)
    draw.shuffle(found)
    if len(found) < max(args.choices, 1):
        ap.error(f"{args.text} has {len(found)} passages of {args.words} words only")
    with open(args.out, "w", encoding="utf-8") as out:
        for i, piece in enumerate(found[:args.count]):
            if args.kind == "last-word":
                item = {"text": " ".join(piece)}
            else:
                others = draw.sample([p for j, p in enumerate(found) if j != i], args.choices - 1)
                endings = [" ".join(p[-args.ending:]) for p in [piece, *others]]
                order = list(range(args.choices))
                draw.shuffle(order)
                item = {"query": " ".join(piece[:-args.ending]), "choices": [endings[j] for j in order], "gold": order.index(0)}
            out.write(json.dumps(item, ensure_ascii=False) + "\n")
    print(f"{args.out}: {min(args.count, len(found))} items")


if __name__ == "__main__":
    main()
