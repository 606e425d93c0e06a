#!/usr/bin/env python3
"""How much calibration text a recipe wants: accuracy against the number of calibration tokens, in domain and out of it.

Quantises a model with growing numbers of windows, evaluates the packed folders, and prints a Markdown table
(docs/recipes.md holds a run). In-domain text is what accuracy_table.py calibrates on, longer; "mixed" draws half of the
windows' text from each.

    calibration_curve.py --fireq build/release/bin/fireq --data build/data --model stories15M [--preset best]
"""
import argparse
import tempfile
from pathlib import Path

from accuracy_table import GRIMM, PARTS, TINY, WIKI, Runner, models, row, show

PROSE = {"stories15M": TINY, "stories260K": TINY, "SmolLM2-135M-Instruct": WIKI}
FIRST = {TINY: 300000, WIKI: 400000}  # code points in front of it are for evaluation


def write_text(path, sources, tokens):
    """About 6 code points a token of each source, so that every window can be drawn without repeats."""
    with open(path, "w", encoding="utf-8") as out:
        for source, skip in sources:
            text = source.read_text(encoding="utf-8")[skip:]
            out.write(text[:6 * tokens // len(sources) + 20000])
            out.write("\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--fireq", type=Path, required=True)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--smollm2", type=Path)
    ap.add_argument("--model", required=True)
    ap.add_argument("--preset", default="best")
    ap.add_argument("--length", type=int, default=256)
    ap.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072])
    ap.add_argument("--domain", choices=["in domain", "Grimm", "mixed"], nargs="+", default=["in domain", "Grimm", "mixed"])
    ap.add_argument("--threads", type=int, default=0)
    args = ap.parse_args()
    model = next(m for m in models(args.data, args.smollm2) if m["name"] == args.model)
    prose = PROSE[model["name"]]
    domains = {"in domain": [(args.data / prose, FIRST[prose])], "Grimm": [(args.data / GRIMM, 0)],
               "mixed": [(args.data / prose, FIRST[prose]), (args.data / GRIMM, 0)]}
    with tempfile.TemporaryDirectory() as tmp:
        run = Runner(args.fireq, tmp, args.threads)
        print("| text | tokens | seconds | " + " | ".join(p for p, _ in PARTS) + " |\n" + "|---" * (3 + len(PARTS)) + "|")
        for domain in args.domain:
            for tokens in args.tokens:
                text = Path(tmp) / "text.txt"
                write_text(text, domains[domain], tokens)
                model["curve"] = ["--text", text, "--samples", max(1, tokens // args.length), "--length", args.length]
                folder, q = run.quantize(model, {"preset": args.preset}, "curve")
                cells = row(run, model, folder, PARTS)
                print(f"| {domain} | {tokens}{' (warned)' if q['warnings'] else ''} | {q['seconds']:.0f} | {show(cells)} |", flush=True)


if __name__ == "__main__":
    main()
