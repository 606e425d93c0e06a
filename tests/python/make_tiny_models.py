#!/usr/bin/env python3
"""Make the tiny random models of tests/data/tiny-models.tar.xz, and what transformers computes on them.

Every family and feature that the forward pass reads has a model small enough to commit: random weights from a
fixed seed, scaled so that the logits spread by 1 to 3 and an error anywhere in a layer shows in them. Next to
each checkpoint lie ids.u32 (little-endian token ids), logits.f32 (float32 [tokens, vocab]) and tiny.json (nll per
token and perplexity of the one window), computed by transformers in float32 with eager attention from the stored
weights.

Needs torch, transformers, safetensors and numpy.

    make_tiny_models.py OUT_DIR                    # writes OUT_DIR/tiny/<name>/...
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=2020-01-01T00:00Z -C OUT_DIR -cf - tiny | xz -9 > tiny-models.tar.xz
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

# 160 tokens: attention crosses a block of 128 keys, and a window of 24 leaves the first block behind.
TOKENS = 160
BASE = dict(vocab_size=80, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=512, rms_norm_eps=1e-5,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)

# name: (class prefix, storage dtype, overrides of BASE, extra). `config` in extra holds keys as older
# transformers wrote them, in place of rope_parameters.
MODELS = {
    "llama-mha-tied-f32": ("Llama", "float32", dict(num_key_value_heads=4, tie_word_embeddings=True), {}),
    "llama-gqa-untied-f16": ("Llama", "float16", dict(), {}),
    "llama-bias-bf16": ("Llama", "bfloat16", dict(attention_bias=True, mlp_bias=True), {}),
    "llama-mqa-sharded-bf16": ("Llama", "bfloat16", dict(num_key_value_heads=1, num_hidden_layers=3), dict(shards=3)),
    "llama-rope-llama3-bf16": ("Llama", "bfloat16", dict(rope={"rope_theta": 5000.0, **LLAMA3}), {}),
    "llama-rope-llama3-old-keys-f16": ("Llama", "float16", dict(rope={"rope_theta": 5000.0, **LLAMA3}), dict(old_rope=True)),
    "llama-rope-linear-f16": ("Llama", "float16", dict(rope={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}), dict(old_rope=True)),
    "llama-head-dim-bf16": ("Llama", "bfloat16", dict(head_dim=20), {}),
    "llama-tied-head-stored-bf16": ("Llama", "bfloat16", dict(tie_word_embeddings=True), dict(stray_head=True)),
    "llama-fused-bf16": ("Llama", "bfloat16", dict(), dict(fused=True)),
    "mistral-window-bf16": ("Mistral", "bfloat16", dict(sliding_window=24), {}),
    "mistral-full-f32": ("Mistral", "float32", dict(sliding_window=None), {}),
    "qwen2-tied-bf16": ("Qwen2", "bfloat16", dict(tie_word_embeddings=True, rope={"rope_theta": 1000000.0, "rope_type": "default"}), {}),
    "qwen2-window-f16": ("Qwen2", "float16", dict(use_sliding_window=True, sliding_window=24, max_window_layers=1, num_hidden_layers=3), {}),
    "qwen3-bf16": ("Qwen3", "bfloat16", dict(head_dim=16, rope={"rope_theta": 1000000.0, "rope_type": "default"}), dict(old_rope=True)),
    "qwen3-tied-f32": ("Qwen3", "float32", dict(head_dim=12, tie_word_embeddings=True, attention_bias=True), {}),
}


def randomise(model, generator):
    """Weights that make every part of a layer matter."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            normal = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.3 * normal)
            elif name.endswith("bias"):
                p.copy_(0.4 * normal)
            elif "embed_tokens" in name:
                p.copy_(0.35 * normal)
            elif "lm_head" in name:
                p.copy_(2.0 * normal / p.shape[1] ** 0.5)
            elif "q_proj" in name or "k_proj" in name:
                p.copy_(1.5 * normal / p.shape[1] ** 0.5)
            else:
                p.copy_(normal / p.shape[1] ** 0.5)


def fuse(tensors):
    out = {}
    for name, t in tensors.items():
        if name.endswith("q_proj.weight"):
            base = name[: -len("q_proj.weight")]
            out[base + "qkv_proj.weight"] = torch.cat([tensors[base + f"{x}_proj.weight"] for x in "qkv"])
        elif name.endswith("gate_proj.weight"):
            base = name[: -len("gate_proj.weight")]
            out[base + "gate_up_proj.weight"] = torch.cat([tensors[base + f"{x}_proj.weight"] for x in ("gate", "up")])
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            out[name] = t
    return out


def write_checkpoint(folder, tensors, shards):
    meta = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=meta)
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]  # neighbours in different shards
        save_file({n: tensors[n] for n in part}, folder / file, metadata=meta)
        weight_map.update({n: file for n in part})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def config_json(config, family, dtype, extra):
    keys = config.to_dict()
    for key in ("transformers_version", "_name_or_path", "dtype", "use_cache", "initializer_range",
                "attention_dropout", "id2label", "label2id", "chunk_size_feed_forward", "is_encoder_decoder",
                "output_attentions", "output_hidden_states", "return_dict", "problem_type", "pretraining_tp"):
        keys.pop(key, None)
    keys["architectures"] = [f"{family}ForCausalLM"]
    keys["torch_dtype"] = dtype
    if extra.get("old_rope"):
        rope = dict(keys.pop("rope_parameters"))
        keys["rope_theta"] = rope.pop("rope_theta")
        keys["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return {k: v for k, v in sorted(keys.items()) if v is not None or k == "rope_scaling"}


def make(folder, name, seed):
    family, dtype, overrides, extra = MODELS[name]
    settings = {**BASE, **overrides}
    rope = settings.pop("rope", None)
    config = getattr(transformers, f"{family}Config")(**settings)
    if rope is not None:
        config.rope_parameters = rope
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    storage = getattr(torch, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(storage).float())

    tensors = {n: p.detach().to(storage).contiguous().clone() for n, p in model.named_parameters()}
    if extra.get("stray_head"):  # says that it is tied, yet holds another head: transformers 5 then uses that
        head = (2 * torch.randn(config.vocab_size, config.hidden_size, generator=generator) / config.hidden_size ** 0.5).to(storage)
        tensors["lm_head.weight"] = head
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(head.float())
    if extra.get("fused"):
        tensors = fuse(tensors)
    folder.mkdir(parents=True)
    write_checkpoint(folder, tensors, extra.get("shards", 1))
    (folder / "config.json").write_text(json.dumps(config_json(config, family, dtype, extra), indent=1) + "\n")

    ids = torch.randint(0, config.vocab_size, (TOKENS,), generator=generator)
    with torch.inference_mode():
        logits = model(ids[None]).logits[0].float()
    if not extra.get("fused"):  # transformers reads the folder as we wrote it
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.inference_mode():
            difference = (again.eval()(ids[None]).logits[0] - logits).abs().max().item()
        assert difference < 1e-5, (name, difference)
    spread = logits.std().item()
    assert 0.8 < spread < 4, (name, spread)
    nll = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:]).item()
    ids.numpy().astype("<u4").tofile(folder / "ids.u32")
    logits.numpy().astype("<f4").tofile(folder / "logits.f32")
    result = {"name": name, "tokens": TOKENS, "nll_per_token": nll, "ppl": float(np.exp(nll)), "logits_std": spread,
              "logits_shape": list(logits.shape), "transformers": transformers.__version__}
    (folder / "tiny.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name:34s} logits std {spread:.2f}  nll {nll:.4f}  {sum(f.stat().st_size for f in folder.iterdir())} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if (args.out / "tiny").exists():
        sys.exit(f"{args.out / 'tiny'} exists")
    torch.set_num_threads(1)
    for seed, name in enumerate(MODELS):
        make(args.out / "tiny" / name, name, seed)


if __name__ == "__main__":
    main()
