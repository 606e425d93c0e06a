#!/usr/bin/env python3
"""Writes a random model of a real model's size: a Hugging Face folder in BF16 for benches and checks, to be quantised.

    scripts/make_random_model.py --shape llama3-8b --seed 1 -o MODEL
    scripts/make_random_model.py --shape llama3-8b --layers 2 --vocab 32000 -o MODEL     # a slice of it
    fireq quantize MODEL -o OUT --preset rtn

Weights are normal with a standard deviation of 1/sqrt(columns); one input channel in 100 is 8 times as wide, as real models'
outlier channels are. There is no tokenizer (fireq eval takes --tokens). The same shape and seed give the same bytes for any
number of processes. Needs numpy. One shard per layer.
"""
import argparse
import json
import multiprocessing
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

# hidden, ffn, layers, heads, KV heads, vocabulary, RoPE theta
SHAPES = {
    "tiny": (96, 160, 2, 6, 2, 300, 10000.0),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, 10000.0),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000, 10000.0),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256, 500000.0),
    "llama3-70b": (8192, 28672, 80, 64, 8, 128256, 500000.0),
}


def config_of(args):
    hidden, ffn, layers, heads, kv_heads, vocab, theta = SHAPES[args.shape]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": args.layers or layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads, "vocab_size": args.vocab or vocab, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": theta, "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }


def shard_tensors(config, shard):
    """Names and shapes: shard 0 is what stands around the layers, shard i the layer i - 1."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    if shard == 0:
        return {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden],
                "model.norm.weight": [hidden]}
    shapes = {"self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden], "self_attn.v_proj": [kv, hidden],
              "self_attn.o_proj": [hidden, hidden], "mlp.gate_proj": [ffn, hidden], "mlp.up_proj": [ffn, hidden],
              "mlp.down_proj": [hidden, ffn], "input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
    return {f"model.layers.{shard - 1}.{name}.weight": shape for name, shape in shapes.items()}


def bf16(values):
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def blocks(name, shape, seed):
    """A tensor's values, some rows at a time; each tensor has a stream of its own."""
    random = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])))
    if len(shape) == 1:
        yield 1 + 0.1 * random.standard_normal(shape, "f4")
        return
    rows, cols = shape
    width = np.full(cols, cols**-0.5, "f4")
    width[random.permutation(cols)[:max(1, cols // 100)]] *= 8
    for begin in range(0, rows, 256):
        yield random.standard_normal((min(256, rows - begin), cols), "f4") * width


def write_shard(task):
    path, tensors, seed = task
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            for values in blocks(name, shape, seed):
                file.write(bf16(values).tobytes())
    return offset


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected a number of at least 1")
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--layers", type=positive, help="instead of the shape's")
    parser.add_argument("--vocab", type=positive, help="instead of the shape's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=positive, help="default: one a processor")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write; must not exist")
    args = parser.parse_args()
    config = config_of(args)
    if args.seed < 0:
        parser.error("--seed must not be negative")
    if args.out.exists():
        parser.error(f"{args.out} exists")
    args.out.mkdir(parents=True)
    count = config["num_hidden_layers"] + 1
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    shards = [shard_tensors(config, i) for i in range(count)]
    with multiprocessing.Pool(args.processes) as pool:
        sizes = pool.map(write_shard, [(args.out / name, shard, args.seed) for name, shard in zip(names, shards)],
                         chunksize=1)
    index = {"metadata": {"total_size": sum(sizes)},
             "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard}}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{args.out}: {args.shape}, {config['num_hidden_layers']} layers, {sum(sizes) / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
