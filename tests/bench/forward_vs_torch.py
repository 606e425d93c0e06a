#!/usr/bin/env python3
"""Tokens per second of `fireq eval` and of transformers with PyTorch, both in float32, on the same tokens.

Both compute the same thing: the negative log-likelihood of every token of every window. Loading and tokenising are
left out on both sides. PyTorch runs its fused attention (--eager: the plain one too, which is slower) on the batch of
windows that suits it best, tried first. Rounds are interleaved, so that a busy machine is busy for both. Three ratios,
over 1 where fireq is faster: of the medians, of the fastest rounds, and of the processor time of the medians, which
says most on a machine that others use as well. Both must find the same perplexity, or the comparison is refused.

Needs torch, transformers and tokenizers.

    forward_vs_torch.py --fireq build/release/bin/fireq --data build/data [--smollm2 DIR] [--rounds N] [--threads 1,2]
                        [--model NAME] [--windows N] [--eager] [--json FILE]
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

TOLERANCE = 1e-4  # of perplexity, relative


def workloads(data, smollm2):
    yield {"name": "stories15M", "path": data / "models/stories15M", "ctx": 256, "windows": 24,
           "text": data / "text/tinystories_train_head_944k.txt"}
    if smollm2:
        yield {"name": "SmolLM2-135M", "path": smollm2, "ctx": 1024, "windows": 2, "text": data / "text/wiki.test.raw"}


def tokens_of(work):
    tokenizer = Tokenizer.from_file(str(work["path"] / "tokenizer.json"))
    ids = tokenizer.encode(work["text"].read_text()[:100_000], add_special_tokens=False).ids
    return np.array(ids[: work["ctx"] * work["windows"]], dtype="<u4").reshape(work["windows"], work["ctx"])


class Torch:
    def __init__(self, work, ids, attention):
        self.ids = torch.from_numpy(ids.astype(np.int64))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            work["path"], dtype=torch.float32, attn_implementation=attention).eval()
        self.batch = 1

    def run(self, threads):
        """Seconds, processor seconds of all threads, perplexity."""
        torch.set_num_threads(threads)
        total = 0.0
        start, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for part in self.ids.split(self.batch):
                logits = self.model(part, use_cache=False).logits[:, :-1]
                total += torch.nn.functional.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), part[:, 1:].reshape(-1), reduction="sum").item()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        scored = self.ids.shape[0] * (self.ids.shape[1] - 1)
        return seconds, cpu, float(np.exp(total / scored))

    def choose_batch(self, threads):
        best = None
        for batch in (1, 2, 4, 8):
            if batch > len(self.ids):
                break
            self.batch = batch
            cpu = min(self.run(threads)[1] for _ in range(2))
            if best is None or cpu < best[0]:
                best = cpu, batch
        self.batch = best[1]


class Fireq:
    def __init__(self, binary, work, ids, folder):
        tokens = Path(folder) / "ids.u32"
        tokens.write_bytes(ids.tobytes())
        self.command = [str(binary), "eval", str(work["path"]), "--tokens", str(tokens), "--ctx", str(work["ctx"]),
                        "--bos", "none", "--quiet", "--json", "-"]

    def run(self, threads):
        done = subprocess.run(self.command + ["--threads", str(threads)], check=True, capture_output=True, text=True)
        result = json.loads(done.stdout)
        return result["seconds"], result["cpu_seconds"], result["ppl"]


def compare(work, args):
    ids = tokens_of(work)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runners = {"fireq": Fireq(args.fireq, work, ids, folder)}
        for attention in ("sdpa", "eager") if args.eager else ("sdpa",):
            runners[f"torch {attention}"] = Torch(work, ids, attention)
        for threads in args.threads:
            for runner in runners.values():
                runner.run(threads)  # warm
                if isinstance(runner, Torch):
                    runner.choose_batch(threads)
            seconds = {name: [] for name in runners}
            cpu = {name: [] for name in runners}
            ppl = {}
            for _ in range(args.rounds):
                for name, runner in runners.items():
                    took, busy, ppl[name] = runner.run(threads)
                    seconds[name].append(took)
                    cpu[name].append(busy)
            for name in runners:
                if abs(ppl[name] / ppl["fireq"] - 1) > TOLERANCE:
                    sys.exit(f"{work['name']}: {name} finds perplexity {ppl[name]}, fireq {ppl['fireq']}")
            row = {"model": work["name"], "threads": threads, "tokens": int(ids.size), "ctx": work["ctx"],
                   "seconds": seconds, "cpu_seconds": cpu}
            for name, runner in runners.items():
                row[f"{name} tokens/s"] = ids.size / statistics.median(seconds[name])
                if isinstance(runner, Torch):
                    row[f"{name} batch"] = runner.batch
            torches = [name for name in runners if name != "fireq"]

            def ratio(pick, values):
                return min(pick(values[n]) for n in torches) / pick(values["fireq"])

            row["ratio of medians"] = ratio(statistics.median, seconds)
            row["ratio of fastest"] = ratio(min, seconds)
            row["ratio of processor time"] = ratio(statistics.median, cpu)
            print(f"| {work['name']} | {threads} | {row['fireq tokens/s']:.0f} | "
                  + f"{max(row[f'{n} tokens/s'] for n in torches):.0f}"
                  + f" | {row['ratio of medians']:.2f} | {row['ratio of fastest']:.2f} "
                  f"| {row['ratio of processor time']:.2f} |", flush=True)
            rows.append(row)
    return rows


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fireq", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--model", help="only this one")
    parser.add_argument("--windows", type=int, help="of each model, in place of the usual number")
    parser.add_argument("--eager", action="store_true", help="PyTorch's plain attention too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=lambda s: [int(x) for x in s.split(",")], default=[1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"{processor()}; torch {torch.__version__}, transformers {transformers.__version__}; {args.rounds} rounds\n")
    print("| model | threads | fireq tokens/s | torch tokens/s | ratio of medians | of the fastest | of processor time |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for work in workloads(args.data, args.smollm2):
        work["windows"] = args.windows or work["windows"]
        if args.model in (None, work["name"]):
            rows += compare(work, args)
    if args.json:
        args.json.write_text(json.dumps({"processor": processor(), "torch": torch.__version__,
                                         "transformers": transformers.__version__, "rows": rows}, indent=1) + "\n")
    if not rows:
        sys.exit("no such model")


if __name__ == "__main__":
    main()
