"""Models for the tests of fireq export, and what an export must hold, in numpy and from the definition alone.

Shared with the interop tests, which read the same folders with other people's packages.
"""
import json
import shutil
from pathlib import Path

import numpy as np

from harness import STORIES_15M, read_tensors, write_safetensors
from oracle import E4M3, GROUP, LINEARS, Model, bf16, rn8, to_float

# What docs/checkpoint-format.md, "Export", says of config.json; only `ignore` differs between models.
QUANTIZATION_CONFIG = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "format": "pack-quantized",
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
                    "dynamic": False, "actorder": None},
        "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
        "output_activations": None}}}


# --- models ------------------------------------------------------------------------------------------------

def bf16_bits(values):
    """float32 -> BF16 bits, to nearest even."""
    return (bf16(values).view(np.uint32) >> 16).astype(np.uint16)


def random_llama(folder, seed, hidden=256, ffn=384, heads=4, kv_heads=2, head_dim=64, layers=2, vocab=384,
                 awkward=True):
    """A seeded random Llama in BF16, tied embeddings. `awkward`: rows and groups that try the scales' limits."""
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
              "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True, "hidden_act": "silu",
              "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
              "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {"model.embed_tokens.weight": rng.standard_normal((vocab, hidden)).astype(np.float32),
               "model.norm.weight": 1 + 0.1 * rng.standard_normal(hidden).astype(np.float32)}
    shapes = {"q_proj": (heads * head_dim, hidden), "k_proj": (kv_heads * head_dim, hidden),
              "v_proj": (kv_heads * head_dim, hidden), "o_proj": (hidden, heads * head_dim),
              "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = 1 + 0.1 * rng.standard_normal(hidden).astype(np.float32)
        for name in LINEARS:
            rows, cols = shapes[name.split(".")[-1]]
            w = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
            w *= np.exp2(rng.integers(-3, 3, (rows, 1))).astype(np.float32)
            if awkward:
                w[0] = 0
                w[1] *= np.float32(2.0**-24)       # r at its lower limit
                w[2, :GROUP] = 0                   # a group of zeros
                w[3, :GROUP] *= np.float32(2.0**-12)  # a scale that falls under 2^-9 of the row's largest
                w[4, cols - 1] = 40                # one huge weight
                w[5] = np.float32(0.03125)         # all alike
            tensors[f"model.layers.{i}.{name}.weight"] = w
    write_safetensors(folder / "model.safetensors", {n: ("BF16", bf16_bits(v)) for n, v in tensors.items()})
    return folder


def padded_stories(folder, hidden=384):
    """stories15M in hidden channels that stay zero beside its own 288: the same function, to rounding, in which
    gate, up and down are multiples of 128 while q, k, v and o (288) are not."""
    folder = Path(folder)
    folder.mkdir()
    tensors, padded = read_tensors(STORIES_15M), {}
    own = 288
    for name, (dtype, array) in tensors.items():
        w = to_float(dtype, array)
        if name.endswith("norm.weight"):
            # The mean of squares is over more channels, all new ones zero.
            w = np.concatenate([w * np.float32(np.sqrt(own / hidden)), np.ones(hidden - own, np.float32)])
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            w = np.concatenate([w, np.zeros((hidden - own, w.shape[1]), np.float32)])
        else:
            w = np.concatenate([w, np.zeros((w.shape[0], hidden - own), np.float32)], axis=1)
        padded[name] = ("F32", np.ascontiguousarray(w))
    write_safetensors(folder / "model.safetensors", padded)
    config = json.loads((STORIES_15M / "config.json").read_text())
    config.update(hidden_size=hidden, head_dim=48, rms_norm_eps=config["rms_norm_eps"] * own / hidden,
                  torch_dtype="float32")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in STORIES_15M.iterdir():
        if path.name.startswith("tokenizer"):
            shutil.copy(path, folder / path.name)
    return folder


def random_tokens(path, seed, count, vocab):
    """Little-endian uint32 ids, for --tokens."""
    np.random.default_rng(seed).integers(3, vocab, count).astype("<u4").tofile(path)
    return path


# --- what must be in an export -----------------------------------------------------------------------------

def round_product(sigma, r):
    """bf16(sigma * r), the exact product rounded once; BF16 bits. float64 holds the product exactly."""
    bits = (np.asarray(sigma, np.float64) * np.asarray(r, np.float64)).view(np.uint64)
    # A bfloat16 keeps 7 of a double's 52 fraction bits; exponents stay far from the limits here.
    drop = np.uint64(45)
    half = (np.uint64(1) << (drop - np.uint64(1))) - np.uint64(1)
    bits = (bits + half + (bits >> drop & np.uint64(1))) >> drop << drop
    return bf16_bits(bits.view(np.float64).astype(np.float32))


def from_bits(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def integers(packed):
    """The signed integers of an oracle.Packed, [N, K]."""
    assert np.array_equal(packed.levels, np.arange(8)), "integer levels"
    magnitude = (packed.codes & 7).astype(np.int64)
    return np.where(packed.codes & 8, -magnitude, magnitude)[:, :packed.cols]


def unpack_int32(words):
    """int32 [N, K/8] -> integers [N, K]: element i of a run of 8 in bits 4i, less 8."""
    words = np.ascontiguousarray(words).view(np.uint32)
    nibbles = words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & np.uint32(15)
    return nibbles.reshape(words.shape[0], -1).astype(np.int64) - 8


def load_in_vllm(q, scale_bits):
    """(operands [N, K], channel scales [N]) that vLLM multiplies, by the definition of its load conversion."""
    scale = from_bits(scale_bits)
    channel = np.maximum(scale.max(axis=1, keepdims=True) / np.float32(448), np.float32(1 / (448 * 512)))
    code = rn8(rn8(scale / channel).astype(np.float32) / np.float32(8))
    operands = rn8(q * np.repeat(code, GROUP, axis=1))
    return operands, (channel * np.float32(8))[:, 0]


def dequantised(packed):
    """FP32(r * RN8(level * sigma))."""
    return (packed.operands() * np.broadcast_to(packed.r, packed.rows)[:, None]).astype(np.float32)


def in_dtype(values, dtype):
    """float32 -> (safetensors dtype, array) as read_tensors gives it."""
    return {"bf16": lambda: ("BF16", bf16_bits(values)), "f16": lambda: ("F16", values.astype(np.float16)),
            "f32": lambda: ("F32", values)}[dtype]()


def read_model(folder):
    """oracle.Model and the folder's raw tensors."""
    return Model(folder), read_tensors(folder)


__all__ = ["E4M3", "GROUP", "QUANTIZATION_CONFIG", "bf16_bits", "dequantised", "from_bits", "in_dtype", "integers",
           "load_in_vllm", "padded_stories", "random_llama", "random_tokens", "read_model", "round_product",
           "unpack_int32"]
