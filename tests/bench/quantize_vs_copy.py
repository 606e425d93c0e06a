#!/usr/bin/env python3
"""Time of `fireq quantize --preset rtn` against a plain copy of the same folder, warm cache, interleaved rounds.

The copy is `cp -r MODEL DIR && sync`: both read every byte of the model and leave durable files. Prints one table and,
with --json, every round. The target is a ratio of medians of at most 2.

    quantize_vs_copy.py --fireq build/release/bin/fireq MODEL [--rounds 5] [--threads 0] [--work DIR] [--json FILE]
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(action):
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("--fireq", type=Path, required=True)
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--threads", type=int, default=0)
    ap.add_argument("--work", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    ap.add_argument("--json", type=Path)
    args = ap.parse_args()
    size = sum(f.stat().st_size for f in args.model.rglob("*") if f.is_file())
    rounds = []
    with tempfile.TemporaryDirectory(dir=args.work) as tmp:
        copy, packed, report = Path(tmp) / "copy", Path(tmp) / "packed", Path(tmp) / "report.json"

        def copy_folder():
            subprocess.run(["cp", "-r", args.model, copy], check=True)
            os.sync()

        def quantize():
            # It publishes with fsync of every file and folder: nothing is left for a sync to do.
            subprocess.run([args.fireq, "quantize", args.model, "-o", packed, "--preset", "rtn", "--quiet",
                            "--threads", str(args.threads), "--json", report], check=True)

        os.sync()
        copy_folder()  # warms the cache
        shutil.rmtree(copy)
        for _ in range(args.rounds):
            os.sync()
            c = timed(copy_folder)
            shutil.rmtree(copy)
            os.sync()
            q = timed(quantize)
            bytes_after = json.loads(report.read_text())["bytes_after"]
            shutil.rmtree(packed)
            rounds.append({"copy_seconds": c, "quantize_seconds": q})
    c = statistics.median(r["copy_seconds"] for r in rounds)
    q = statistics.median(r["quantize_seconds"] for r in rounds)
    print(f"{args.model.name}: {size / 1e6:.1f} MB, quantised {bytes_after / 1e6:.1f} MB, medians of {args.rounds} rounds")
    print(f"  cp -r and sync     {c:7.3f} s  {size / c / 1e9:6.2f} GB/s")
    print(f"  quantize, rtn      {q:7.3f} s  {size / q / 1e9:6.2f} GB/s")
    print(f"  quantize / copy    {q / c:7.2f}    (at most 2 wanted)")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model.name, "bytes": size, "rounds": rounds, "ratio": q / c},
                                        indent=2) + "\n")
    return 0 if q <= 2 * c else 1


if __name__ == "__main__":
    sys.exit(main())
