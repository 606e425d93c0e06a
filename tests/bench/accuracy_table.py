#!/usr/bin/env python3
"""Accuracy of the presets, from packed folders: quantise, then evaluate each part switched on in turn.

Prints Markdown tables (docs/results.md holds a run) and, with --json, every figure. Needs the fireq binary, the unpacked
test data and, for SmolLM2, its folder.

    accuracy_table.py --fireq build/release/bin/fireq --data build/data [--smollm2 DIR] [--only MODEL] [--match REGEX]
                      [--json FILE] [--work DIR]
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Evaluation and calibration slices, in code points; docs/results.md repeats them.
TINY = "text/tinystories_train_head_944k.txt"
GRIMM = "text/grimms_fairy_tales.txt"
WIKI = "text/wiki.test.raw"


def models(data, smollm2):
    yield {
        "name": "stories15M", "path": data / "models/stories15M",
        "eval": ["--text", data / TINY, "--skip-chars", 50000, "--max-chars", 40000, "--bos", "head", "--ctx", 256],
        "calib": ["--text", data / TINY, "--skip-chars", 300000, "--max-chars", 60000, "--samples", 64, "--length", 256],
        "other": ["--text", data / GRIMM, "--max-chars", 60000, "--samples", 64, "--length", 256],
    }
    yield {
        "name": "stories260K", "path": data / "models/stories260K",
        "eval": ["--text", data / TINY, "--skip-chars", 50000, "--max-chars", 40000, "--bos", "head", "--ctx", 512],
        "calib": ["--text", data / TINY, "--skip-chars", 300000, "--max-chars", 60000, "--samples", 32, "--length", 512],
        "other": ["--text", data / GRIMM, "--max-chars", 60000, "--samples", 32, "--length", 512],
    }
    if smollm2:
        yield {
            "name": "SmolLM2-135M-Instruct", "path": smollm2,
            "eval": ["--text", data / WIKI, "--max-chars", 19000, "--bos", "none", "--ctx", 1024],
            "calib": ["--text", data / WIKI, "--skip-chars", 400000, "--max-chars", 60000, "--samples", 10, "--length", 1024],
            "other": ["--text", data / GRIMM, "--max-chars", 60000, "--samples", 10, "--length", 1024],
        }


RECIPES = [  # name, recipe, which calibration
    ("rtn", {"preset": "rtn"}, "calib"),
    ("paper", {"preset": "paper"}, "calib"),
    ("fast, integers", {"preset": "fast", "weights": {"levels": "int4"}}, "calib"),
    ("fast", {"preset": "fast"}, "calib"),
    ("fast, calibrated on Grimm", {"preset": "fast"}, "other"),
    ("best", {"preset": "best"}, "calib"),
    ("best, calibrated on Grimm", {"preset": "best"}, "other"),
]
SWITCHES = [
    ("paper without N and S", {"preset": "paper", "keys": {"n": False, "s": False}}),
    ("paper without S", {"preset": "paper", "keys": {"s": False}}),
    ("paper without Λ2", {"preset": "paper", "smoothing": {"lambda2": False}}),
    ("paper without Λ3", {"preset": "paper", "smoothing": {"lambda3": False}}),
    ("paper with Λ1 per channel", {"preset": "paper", "smoothing": {"lambda1": "channel"}}),
    ("paper with Λ1 scalar 0.9", {"preset": "paper", "smoothing": {"lambda1": "scalar"}}),
    ("paper with row scales", {"preset": "paper", "weights": {"row_scale": "row"}}),
    ("fast without N and S", {"preset": "fast", "keys": {"n": False, "s": False}}),
    ("fast without S", {"preset": "fast", "keys": {"s": False}}),
    ("fast, exponents ½", {"preset": "fast", "keys": {"n_exponent": 0.5, "s_exponent": 0.5}}),
    ("fast without Λ2 and Λ3", {"preset": "fast", "smoothing": {"lambda2": False, "lambda3": False}}),
    ("fast, search not weighted", {"preset": "fast", "weights": {"weighted_search": False}}),
    ("fast, nearest value", {"preset": "fast", "weights": {"rounding": "value"}}),
]
PARTS = [
    ("W4", ["--activations", "fp", "--kv", "fp", "--qp", "fp"]),
    ("W4A8", ["--activations", "fp8", "--kv", "fp", "--qp", "fp"]),
    ("W4A8 KV4", []),
]
CACHE_PARTS = [
    ("W4A8 K4", ["--k", "int4", "--v", "fp", "--qp", "fp"]),
    ("W4A8 V4", ["--k", "fp", "--v", "int4", "--qp", "fp"]),
    ("W4A8 QP8", ["--kv", "fp"]),
]


class Runner:
    def __init__(self, fireq, work, threads):
        self.fireq, self.work, self.threads = fireq, Path(work), threads

    def __call__(self, *arguments):
        out = self.work / "out.json"
        command = [str(self.fireq), *map(str, arguments), "--quiet", "--threads", str(self.threads), "--json", str(out)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(out.read_text())

    def quantize(self, model, recipe, calibration):
        recipe_file = self.work / "recipe.json"
        recipe_file.write_text(json.dumps(recipe))
        folder = self.work / "packed"
        text = model[calibration] if recipe["preset"] != "rtn" else []
        result = self("quantize", model["path"], "-o", folder, "--recipe", recipe_file, "--force", "--restart", "--no-measure", *text)
        return folder, result


def row(run, model, folder, parts):
    cells = {}
    for name, options in parts:
        r = run("eval", folder, *model["eval"], *options, "--reference", model["path"])
        cells[name] = {"dnll": r["delta_nll"], "kl": r["kl_mean"], "ppl": r["ppl"], "top1": r["top1_agree"],
                       "dnll_stderr": r["delta_nll_stderr"], "kl_stderr": r["kl_stderr"]}
    return cells


def show(cells):
    """Standard errors in the last digits: +0.0371(21) is +0.0371 ± 0.0021."""
    return " | ".join(f"{c['dnll']:+.4f}({1e4 * c['dnll_stderr']:.0f}) / {c['kl']:.4f}({1e4 * c['kl_stderr']:.0f}) / "
                      f"{c['ppl']:.3f}" for c in cells.values())


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--fireq", type=Path, required=True)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--smollm2", type=Path)
    ap.add_argument("--only", help="name of one model")
    ap.add_argument("--match", default="", help="regular expression: only the recipes whose names it finds")
    ap.add_argument("--presets-only", action="store_true", help="leave the single switches out")
    ap.add_argument("--threads", type=int, default=0)
    ap.add_argument("--json", type=Path)
    ap.add_argument("--work", type=Path)
    args = ap.parse_args()
    everything = {}
    with tempfile.TemporaryDirectory() as tmp:
        run = Runner(args.fireq, args.work or tmp, args.threads)
        for model in models(args.data, args.smollm2):
            if args.only and args.only != model["name"]:
                continue
            base = run("eval", model["path"], *model["eval"])
            print(f"\n### {model['name']}: perplexity {base['ppl']:.4f}, nll {base['nll_per_token']:.5f} "
                  f"± {base['nll_stderr']:.5f}, {base['scored']} tokens scored\n")
            table = everything[model["name"]] = {"base": base, "rows": {}}
            print("| recipe | bytes | " + " | ".join(p for p, _ in PARTS) + " |\n|---" * 1 + "|---" * (len(PARTS) + 1) + "|")
            for name, recipe, calibration in RECIPES:
                if not re.search(args.match, name):
                    continue
                folder, q = run.quantize(model, recipe, calibration)
                cells = row(run, model, folder, PARTS)
                table["rows"][name] = {"bytes": q["bytes_after"], "cells": cells}
                print(f"| {name} | {q['bytes_after']:,} ({q['bytes_after'] / q['bytes_before']:.3f}) | {show(cells)} |", flush=True)
                if name == "fast":
                    extra = row(run, model, folder, CACHE_PARTS)
                    table["rows"][name]["cache"] = extra
                    for part, cell in extra.items():
                        print(f"| fast, {part} alone | | {show({part: cell})} | | |", flush=True)
            if args.presets_only:
                continue
            print("\n| one switch | " + " | ".join(p for p, _ in PARTS[1:]) + " |\n|---" + "|---" * len(PARTS[1:]) + "|")
            for name, recipe in SWITCHES:
                if not re.search(args.match, name):
                    continue
                folder, q = run.quantize(model, recipe, "calib")
                cells = row(run, model, folder, PARTS[1:])
                table["rows"][name] = {"bytes": q["bytes_after"], "cells": cells}
                print(f"| {name} | {show(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
