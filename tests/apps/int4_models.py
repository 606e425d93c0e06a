"""4-bit linears as compressed-tensors, GPTQ and AWQ store them, in numpy and from the definitions alone (docs/import.md)."""
import numpy as np

from export_models import bf16_bits, from_bits

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(values, order=range(8)):
    """Whole numbers 0 to 15, eight of the last axis in an int32, nibble i holding the element order[i]."""
    assert values.min() >= 0 and values.max() <= 15
    pad = -values.shape[-1] % 8
    values = np.concatenate([values, np.zeros((*values.shape[:-1], pad), np.int64)], axis=-1)
    eight = values.reshape(*values.shape[:-1], -1, 8).astype(np.uint32)
    words = np.zeros(eight.shape[:-1], np.uint32)
    for i, column in enumerate(order):
        words |= eight[..., column] << np.uint32(4 * i)
    return ("I32", words.view(np.int32))


def scales_as(dtype, scale):
    """(tensor, its values in FP32)."""
    if dtype == "F16":
        return ("F16", scale.astype(np.float16)), scale.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        return ("BF16", bf16_bits(scale)), from_bits(bf16_bits(scale))
    return ("F32", scale), scale


class Format:
    """One way to store a linear: tensors of (q, zero, scale, group of each column), and what config.json says."""

    def __init__(self, name, size, zeros, dtype="F16", order=False, **extra):
        self.name, self.size, self.zeros, self.dtype, self.order, self.extra = name, size, zeros, dtype, order, extra

    def __str__(self):
        return f"{self.name} {self.size} {'zeros' if self.zeros else 'symmetric'} {self.dtype} {self.order} {self.extra}"

    def config(self):
        if self.name == "compressed-tensors":
            weights = {"num_bits": 4, "type": "int", "symmetric": not self.zeros, "dynamic": False,
                       "strategy": "group" if self.size > 0 else "channel", "group_size": self.size if self.size > 0 else None,
                       "actorder": "group" if self.order else None}
            return {"quant_method": self.name, "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
                    "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}}
        if self.name == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": self.size, "zero_point": self.zeros, "version": "GEMM"} | self.extra
        return {"quant_method": "gptq", "bits": 4, "group_size": self.size, "desc_act": self.order, "sym": not self.zeros} | self.extra

    def store(self, rng, rows, cols):
        """(part -> tensor, FP32 weights)."""
        size = self.size if self.size > 0 else cols
        groups = -(-cols // size)
        q = rng.integers(0, 16, (rows, cols))
        zero = rng.integers(0, 16, (rows, groups)) if self.zeros else np.full((rows, groups), 8)
        group = np.arange(cols) // size
        if self.order:
            group = rng.permutation(group)
        tensor, scale = scales_as(self.dtype, (rng.uniform(0.2, 1.5, (rows, groups)) / np.sqrt(cols) / 5).astype(np.float32))
        weights = (q - zero[:, group]).astype(np.float32) * scale[:, group]
        transposed = (tensor[0], np.ascontiguousarray(tensor[1].T))
        if self.name == "compressed-tensors":
            parts = {"weight_packed": pack(q), "weight_scale": tensor, "weight_shape": ("I64", np.array([rows, cols], "<i8"))}
            if self.zeros:
                kind, words = pack(np.ascontiguousarray(zero.T))
                parts["weight_zero_point"] = (kind, np.ascontiguousarray(words.T))
            if self.order:
                parts["weight_g_idx"] = ("I32", group.astype(np.int32))
        elif self.name == "gptq":
            kind, words = pack(np.ascontiguousarray(q.T).T)
            kind_of_zeros, zeros = pack(np.ascontiguousarray(zero.T))
            if "v2" not in self.extra.get("checkpoint_format", self.extra.get("format", "gptq")):
                # The first convention: a word of zeros less 0x11111111, modulo 2^32. A zero of 0 borrows.
                zeros = ((zeros.astype(np.int64) - 0x11111111) % 2**32).astype(np.uint32).view(np.int32)
            parts = {"qweight": (kind, np.ascontiguousarray(words.T)), "scales": transposed,
                     "qzeros": (kind_of_zeros, zeros), "g_idx": ("I32", group.astype(np.int32))}
        else:
            parts = {"qweight": pack(np.ascontiguousarray(q.T), AWQ_ORDER), "scales": transposed,
                     "qzeros": pack(np.ascontiguousarray(zero.T), AWQ_ORDER)}
        return parts, weights
