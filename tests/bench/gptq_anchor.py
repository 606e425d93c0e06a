#!/usr/bin/env python3
"""The anchor of `best`: llm-compressor's GPTQ in its scheme W4AFP8, on the same calibration and evaluation tokens.

Both calibrate on the same token ids, and both results are evaluated by `fireq eval` on the same token ids: the packed folder
of `best`, and llm-compressor's weights written as a plain F32 folder, with `--activations fp8` (E4M3 and a scale per token,
which is what W4AFP8 does to its inputs). Before anything is compared the script checks that the ids are those that fireq
makes of the text, that a padded model is the unpadded one (below), that PyTorch and fireq give llm-compressor's weights the same
nll, and that its own forward pass with its own FP8 inputs gives that of fireq up to rounding noise.

`best` writes text of its own beside the tokens given; "best, given text alone" goes without, so that both sides have seen the
same tokens and no others. --recipes picks; --anchors takes llm-compressor's figures from an earlier --json of the same versions.

W4AFP8 has groups of 128 input channels and llm-compressor refuses widths that 128 does not divide (stories15M 288,
stories260K 64 and 172, SmolLM2 576). Two ways around that, both in the table:
  padded     the model with zero channels, heads and neurons added up to multiples of 128, norms rescaled: the same function.
             FireQ's own groups are cut the same way.
  group N    the scheme with a smaller group that divides the widths: finer scales than W4AFP8 has, in the anchor's favour.

    python3 -m venv venv && venv/bin/pip install llmcompressor==0.14.0.1 sentencepiece
    venv/bin/python tests/bench/gptq_anchor.py --fireq build/release/bin/fireq --data build/data [--smollm2 DIR] [--only MODEL]
                                                         [--recipes own given] [--anchors FILE] [--json FILE]
"""
import argparse
import importlib.metadata
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from accuracy_table import GRIMM, Runner, models
from compressed_tensors.quantization import QuantizationScheme, fake_quantize, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

GROUP = 128
GROUPS = {"stories15M": 96, "SmolLM2-135M-Instruct": 64}  # divide every width of the model
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
W4A8 = ["--activations", "fp8", "--kv", "fp", "--qp", "fp"]
RECIPES = {"own": ("best", {"preset": "best"}),
           "given": ("best, given text alone", {"preset": "best", "curvature": {"own_text": 0}})}


def option(arguments, name, default=None):
    return arguments[arguments.index(name) + 1] if name in arguments else default


def up(n, multiple):
    return -(-n // multiple) * multiple


def encoder(folder):
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    from sentencepiece import SentencePieceProcessor
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode


def token_ids(folder, arguments, limit=None):
    """The ids of a --text slice as fireq makes them; BOS once at the head unless the model has none."""
    text = Path(option(arguments, "--text")).read_text(encoding="utf-8")
    skip, most = (int(option(arguments, name, 0)) for name in ("--skip-chars", "--max-chars"))
    ids = encoder(folder)(text[skip:skip + most] if most else text[skip:])
    if option(arguments, "--bos", "head") == "head":
        ids = [json.loads((folder / "config.json").read_text())["bos_token_id"], *ids]
    return ids[:limit]


def write_ids(path, ids):
    path.write_bytes(struct.pack(f"<{len(ids)}I", *ids))
    return path


# --- the same model, wider ---------------------------------------------------------------------------------

def pad_plan(config):
    """config.json of the padded model."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    ratio = config["num_attention_heads"] // config["num_key_value_heads"]
    kv = next(n for n in range(config["num_key_value_heads"], 10_000) if n * ratio * head_dim % GROUP == 0)
    hidden = up(config["hidden_size"], math.lcm(GROUP, kv * ratio))  # transformers wants a multiple of the heads
    return dict(config, hidden_size=hidden, intermediate_size=up(config["intermediate_size"], GROUP), head_dim=head_dim,
                num_attention_heads=kv * ratio, num_key_value_heads=kv,
                rms_norm_eps=config["rms_norm_eps"] * config["hidden_size"] / hidden)


def padded_shape(name, config):
    h, m, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q), "gate_proj": (m, h), "up_proj": (m, h),
              "down_proj": (h, m), "embed_tokens": (config["vocab_size"], h), "lm_head": (config["vocab_size"], h)}
    for word, shape in shapes.items():
        if word in name:
            return shape
    return (h,)  # norms


def write_padded(folder, out):
    """Zero channels do not change sums; the mean of a norm has more of them, which its weight and eps undo."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    wide = pad_plan(config)
    (out / "config.json").write_text(json.dumps(dict(wide, torch_dtype="float32")))
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        tensor = torch.zeros(padded_shape(name, wide))
        value = value.float()
        if value.dim() == 1:
            value = value * math.sqrt(config["hidden_size"] / wide["hidden_size"])
        tensor[tuple(slice(n) for n in value.shape)] = value
        tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def write_plain(original, weights, out):
    """The original's folder in F32 with `weights` (possibly padded) in place of its linears'."""
    out.mkdir()
    for path in original.iterdir():
        if path.name.startswith(("tokenizer", "config.json")):
            shutil.copy(path, out / path.name)
    tensors = {}
    for name, value in load_file(original / "model.safetensors").items():
        tensors[name] = value.float()
        if name in weights:
            rest = weights[name].clone()
            tensors[name] = rest[tuple(slice(n) for n in value.shape)].clone()
            rest[tuple(slice(n) for n in value.shape)] = 0
            assert not rest.any(), f"{name}: what was padded is not zero"
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(dict(config, torch_dtype="float32")))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


# --- the anchor --------------------------------------------------------------------------------------------

def compress(folder, windows, group):
    """llm-compressor's GPTQ with its own defaults. Returns the model, its linears' quantised weights, and seconds."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scheme = preset_name_to_scheme("W4AFP8", ["Linear"]).model_dump(exclude_unset=False)
    scheme["weights"]["group_size"] = group
    recipe = GPTQModifier(config_groups={"group_0": QuantizationScheme(**scheme)}, ignore=["lm_head"])
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    # oneshot() wants one even for data that are ids already; it has nothing to do.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), pad_token="<unk>")
    begin = time.monotonic()
    oneshot(model=model, dataset=data, processor=tokenizer, recipe=recipe, max_seq_length=len(windows[0]), num_calibration_samples=len(windows),
            shuffle_calibration_samples=False)
    seconds = time.monotonic() - begin
    weights = {}
    for name, module in model.named_modules():
        if name.endswith(LINEARS):
            args = module.quantization_scheme.weights
            assert (args.num_bits, args.group_size, args.symmetric, str(getattr(args.type, "value", args.type))) == (4, group, True, "int"), args
            weights[name + ".weight"] = fake_quantize(module.weight.data, module.weight_scale.data,
                                                      getattr(module, "weight_zero_point", None), args).cpu()
    assert len(weights) == 7 * model.config.num_hidden_layers, "linears are missing"
    return model, weights, seconds


@torch.no_grad()
def torch_nll(model, ids, ctx):
    """Mean nll over non-overlapping windows, each scoring its last ctx - 1 tokens, as fireq eval does."""
    total, scored = 0.0, 0
    for begin in range(0, len(ids) - ctx + 1, ctx):
        window = torch.tensor([ids[begin:begin + ctx]])
        logits = model(input_ids=window).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        scored += ctx - 1
    return total / scored


def near(what, a, b, tolerance):
    print(f"<!-- {what}: {a:.6f} and {b:.6f} -->")
    if not abs(a - b) <= tolerance:
        sys.exit(f"{what}: {a} and {b} differ by more than {tolerance}")


def show(row, bests):
    """bests: rows of `best`, compared with this one each; none in their own rows."""
    ratios = "; ".join(f"{best['dnll'] / row['dnll']:.2f} / {best['kl'] / row['kl']:.2f}" for best in bests)
    print(f"| {row['recipe']} | {row['calibration']} | {row['dnll']:+.4f} ± {row['dnll_stderr']:.4f} "
          f"| {row['kl']:.4f} ± {row['kl_stderr']:.4f} | {row['seconds']:.0f} | {ratios} |", flush=True)


def earlier_anchors(path, versions):
    """llm-compressor's rows of an earlier --json, by model, recipe and calibration."""
    if path is None:
        return {}
    earlier = json.loads(path.read_text())
    if earlier["versions"] != versions:
        sys.exit(f"{path}: made with {earlier['versions']}, here are {versions}: go without --anchors")
    return {(model, row["recipe"], row["calibration"]): row for model, rows in earlier["models"].items() for row in rows
            if row["recipe"].startswith("llm-compressor")}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--fireq", type=Path, required=True)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--smollm2", type=Path)
    ap.add_argument("--only", help="name of one model")
    ap.add_argument("--calibration", choices=["calib", "other"], nargs="+", default=["calib", "other"])
    ap.add_argument("--recipes", choices=RECIPES, nargs="*", default=list(RECIPES),
                    help="own: best as it is; given: without text of its own, the same tokens as the anchor; none: the anchor alone")
    ap.add_argument("--anchors", type=Path, help="an earlier --json: llm-compressor's figures that it has are not made again")
    ap.add_argument("--threads", type=int, default=0)
    ap.add_argument("--json", type=Path)
    args = ap.parse_args()
    versions = {p: importlib.metadata.version(p) for p in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
    print("<!-- " + ", ".join(f"{p} {v}" for p, v in versions.items()) + " -->")
    earlier = earlier_anchors(args.anchors, versions)
    everything = {"versions": versions, "models": {}}
    save = lambda: args.json and args.json.write_text(json.dumps(everything, indent=2) + "\n")
    for model in models(args.data, args.smollm2):
        if args.only and args.only != model["name"]:
            continue
        rows = everything["models"][model["name"]] = []
        with tempfile.TemporaryDirectory() as tmp:
            tmp = Path(tmp)
            run = Runner(args.fireq, tmp, args.threads)
            folder, ctx = Path(model["path"]), int(option(model["eval"], "--ctx"))
            ids = token_ids(folder, model["eval"])
            text = write_ids(tmp / "eval.u32", ids)
            evaluation = ["--tokens", text, "--bos", "none", "--ctx", ctx]
            base = run("eval", folder, *evaluation)
            near("ids: nll of fireq on the text, and on these ids", run("eval", folder, *model["eval"])["nll_per_token"],
                 base["nll_per_token"], 0)
            padded = write_padded(folder, tmp / "padded")
            near("padding: nll of the model, and of the padded one", base["nll_per_token"],
                 run("eval", padded, *evaluation)["nll_per_token"], 1e-4)

            def measure(tested, *options):
                r = run("eval", tested, *evaluation, *options, "--reference", folder)
                return {"dnll": r["delta_nll"], "dnll_stderr": r["delta_nll_stderr"], "kl": r["kl_mean"], "kl_stderr": r["kl_stderr"],
                        "nll": r["nll_per_token"]}

            print(f"\n### {model['name']}: nll {base['nll_per_token']:.5f}, {base['scored']} tokens scored\n\n"
                  "| | calibrated on | Δnll | KL | seconds | " + "; ".join(f"`{RECIPES[r][0]}`" for r in args.recipes) +
                  " / this: Δnll / KL |\n|---|---|---|---|---|---|", flush=True)
            for which in args.calibration:
                samples, length = (int(option(model[which], name)) for name in ("--samples", "--length"))
                source = list(model[which]) + ["--bos", option(model["eval"], "--bos")]
                calibration = token_ids(folder, source, samples * length)
                calibration = calibration[:len(calibration) // length * length]
                windows = [calibration[i:i + length] for i in range(0, len(calibration), length)]
                label = ("Grimm" if GRIMM in str(option(model[which], "--text")) else "in domain") + f", {len(windows)} × {length}"
                write_ids(tmp / "calib.u32", calibration)
                given = {"path": folder, "ids": ["--tokens", tmp / "calib.u32", "--bos", "none", "--samples", len(windows),
                                                 "--length", length]}
                bests = []
                for name, recipe in (RECIPES[r] for r in args.recipes):
                    packed, q = run.quantize(given, recipe, "ids")
                    bests.append({"recipe": name, "calibration": label, "seconds": q["seconds"], **measure(packed, *W4A8)})
                    show(bests[-1], [])
                rows += bests
                save()
                tried = [("padded", padded, GROUP)]
                if model["name"] in GROUPS:
                    tried.append((f"group {GROUPS[model['name']]}", folder, GROUPS[model["name"]]))
                for name, start, group in tried:
                    key = (model["name"], f"llm-compressor, {name}", label)
                    if key not in earlier:
                        compressed, weights, seconds = compress(start, windows, group)
                        shutil.rmtree(tmp / "plain", ignore_errors=True)
                        plain = write_plain(folder, weights, tmp / "plain")
                        cell = measure(plain, "--activations", "fp8")
                        near(f"{name}: nll of its weights without FP8 inputs, in PyTorch and in fireq",
                             torch_nll(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), ids, ctx),
                             run("eval", plain, *evaluation)["nll_per_token"], 1e-4)
                        # One rounds F32 to FP8, the other bf16, and by a scale that may differ in its last bit: two draws of the
                        # same rounding noise.
                        near(f"{name}: nll of llm-compressor's own forward pass, and of fireq", torch_nll(compressed, ids, ctx),
                             cell["nll"], 1e-2)
                        earlier[key] = {"recipe": key[1], "calibration": label, "seconds": seconds, **cell}
                    show(earlier[key], bests)
                    rows.append(earlier[key])
                    save()


if __name__ == "__main__":
    main()
