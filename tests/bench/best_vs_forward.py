#!/usr/bin/env python3
"""Time of `fireq quantize --preset best` against four FP32 forward passes over the same calibration tokens and the factorisations.

Rounds are interleaved. The forward pass is `fireq eval` of the original on just the calibration windows (loading is not in its
seconds, the output head is). The factorisations are those that `best` cannot do without: of each linear's inputs (q, k, v share
theirs, gate and up too) and, since outputs are weighed, of each linear's outputs; fireq_bench_curvature times one of each size.
Prints one table and the ratio of `best` to 4 forward passes plus factorisations, wanted: at most 1. Quantising is timed without
the measurement of its cost (--no-measure).

    best_vs_forward.py --fireq build/release/bin/fireq MODEL --text TEXT [--skip-chars N] [--samples 10] [--length 1024]
                       [--rounds 3] [--threads 0] [--json FILE]
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def factorisations(bench, config, threads):
    """(seconds, how many) of a whole model; sizes are timed once each."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = [hidden, q, hidden, ffn] + [q, kv, kv, hidden, ffn, ffn, hidden]  # inputs; outputs
    said = subprocess.run([bench, "--threads", str(threads), "--tokens", "512", *(f"64x{k}" for k in sorted(set(sizes)))], check=True,
                          stdout=subprocess.PIPE, text=True).stdout
    # "   64 x 576     moments wall, processor; target ...; factor wall, processor; ..."
    wall = {int(m[1]): float(m[2]) for m in re.finditer(r"^ *64 x (\d+) +(?:[\d.]+ +){4}([\d.]+) ", said, re.M)}
    return config["num_hidden_layers"] * sum(wall[size] for size in sizes), config["num_hidden_layers"] * len(sizes)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("--fireq", type=Path, required=True)
    ap.add_argument("--text", type=Path, required=True)
    ap.add_argument("--skip-chars", type=int, default=0)
    ap.add_argument("--samples", type=int, default=10)
    ap.add_argument("--length", type=int, default=1024)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=0)
    ap.add_argument("--json", type=Path)
    args = ap.parse_args()
    threads = args.threads or os.cpu_count()
    tokens = args.samples * args.length
    # Code points that hold enough tokens of any text, and no window to choose from: both commands take the first ones.
    text = ["--text", args.text, "--skip-chars", args.skip_chars, "--bos", "none"]
    with tempfile.TemporaryDirectory() as tmp:
        def run(*arguments):
            report = Path(tmp) / "report.json"
            subprocess.run([str(args.fireq), *map(str, arguments), "--quiet", "--threads", str(threads), "--json", str(report)], check=True)
            return json.loads(report.read_text())

        slice_ = text + ["--max-chars", 2 * tokens]
        windows = 0
        while (found := run("eval", args.model, *slice_, "--ctx", args.length)["windows"]) < args.samples:
            if found <= windows:
                sys.exit(f"{args.text} has only {found} windows after code point {args.skip_chars}")
            windows = found
            slice_[-1] = slice_[-1] * (args.samples + 1) // found + args.length
        windows = found
        rounds = []
        for _ in range(args.rounds):
            forward = run("eval", args.model, *slice_, "--ctx", args.length)
            best = run("quantize", args.model, "-o", Path(tmp) / "packed", "--preset", "best", *slice_, "--samples", windows, "--length",
                       args.length, "--force", "--restart", "--no-measure")
            rounds.append({"forward": forward["seconds"], "best": best["seconds"]})
    factors, count = factorisations(args.fireq.parent / "fireq_bench_curvature", json.loads((args.model / "config.json").read_text()), threads)
    forward, best = (statistics.median(r[key] for r in rounds) for key in ("forward", "best"))
    limit = 4 * forward + factors
    print(f"| {args.model.name}, {windows} windows of {args.length}, {threads} threads, medians of {args.rounds} | seconds |\n|---|---|")
    print(f"| FP32 forward | {forward:.2f} |\n| {count} factorisations | {factors:.2f} |\n| 4 × forward + factorisations | {limit:.2f} |")
    print(f"| best | {best:.2f} |\n| ratio (at most 1 wanted) | {best / limit:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"rounds": rounds, "factorisations": factors, "windows": windows, "ratio": best / limit}, indent=2) + "\n")


if __name__ == "__main__":
    main()
