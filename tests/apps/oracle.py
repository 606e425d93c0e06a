"""docs/numerics.md and docs/checkpoint-format.md once more, in numpy, from the text alone.

An independent reading of a checkpoint: decodes the packed codes from the files' bytes, tokenises with
tokenizer.model, runs the decoder with what is quantised on the way, and returns log-likelihoods. Slow and plain
on purpose. It knows the models of tests/data (Llama architecture, standard RoPE, no biases).
"""
import heapq
import json
import re
import struct
from pathlib import Path

import numpy as np

from harness import read_tensors

GROUP = 128
KEY_BLOCK = 128  # keys per block of P8
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


# --- number formats ----------------------------------------------------------------------------------------

def _e4m3_table():
    table = np.empty(256)
    for byte in range(256):
        exponent, fraction = byte >> 3 & 15, byte & 7
        value = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0**(exponent - 7)
        if byte & 127 == 127:
            value = np.nan
        table[byte] = -value if byte & 128 else value
    return table


E4M3 = _e4m3_table()
_POSITIVE = E4M3[:127]
# Halfway points between neighbours; a tie goes to the neighbour whose code is even.
_HALFWAY = (_POSITIVE[1:] + _POSITIVE[:-1]) / 2


def rn8(x):
    """Round to nearest E4M3, ties to even, saturating; the value, in float64."""
    x = np.asarray(x, np.float64)
    magnitude = np.abs(x)
    code = np.searchsorted(_HALFWAY, magnitude, side="left")  # a tie stays at the lower code
    tie = (code < 126) & (magnitude == _HALFWAY[np.minimum(code, 125)])
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    return np.copysign(_POSITIVE[code], x)


def bf16(x):
    """Round float32 to bfloat16, to nearest even; the value, in float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def to_float(dtype, array):
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32).reshape(array.shape)
    return array.astype(np.float32)


# --- a packed linear ---------------------------------------------------------------------------------------

def unpack_nibbles(packed):
    """U8 [N, Kp/2] -> codes [N, Kp]; element 2i in the low nibble of byte i."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes


class Packed:
    """The tensors of one quantised linear, checked against every rule of the format."""

    def __init__(self, tensors, name, rows, cols, levels, row_scale):
        padded = (cols + GROUP - 1) // GROUP * GROUP
        codes = tensors[name + ".weight_codes"]
        sigma = tensors[name + ".weight_group_scale"]
        r = tensors[name + ".weight_row_scale"]
        shape = tensors[name + ".weight_shape"]
        override = tensors.get(name + ".weight_levels")
        assert codes[0] == "U8" and codes[1].shape == (rows, padded // 2), (name, codes[0], codes[1].shape)
        assert sigma[0] == "F8_E4M3" and sigma[1].shape == (rows, padded // GROUP), (name, sigma[1].shape)
        assert r[0] == "F32" and r[1].shape == ((rows,) if row_scale == "row" else (1,)), (name, r[1].shape)
        assert shape[0] == "I64" and shape[1].tolist() == [rows, cols], (name, shape[1])
        self.name, self.rows, self.cols = name, rows, cols
        self.levels = np.asarray(override[1] if override else levels, np.float64)
        assert self.levels.shape == (8,) and np.all(np.isfinite(self.levels)) and self.levels[0] >= 0
        assert np.all(np.diff(self.levels) > 0) and self.levels[-1] <= 448
        self.codes = unpack_nibbles(codes[1])
        self.sigma_bytes = sigma[1]
        self.r = r[1].astype(np.float64)
        assert np.all((self.sigma_bytes >= 0x01) & (self.sigma_bytes <= 0x7E)), f"{name}: group scale"
        assert np.all(np.isfinite(self.r) & (self.r > 0)), f"{name}: row scale"
        assert not np.any(self.codes[:, cols:]), f"{name}: padding is code 0"
        if self.levels[0] == 0:
            assert not np.any(self.codes == 8), f"{name}: minus zero"

    def operands(self, rounded=True):
        """w8 [N, K] = +-RN8(level * sigma)."""
        sigma = np.repeat(E4M3[self.sigma_bytes], GROUP, axis=1)
        value = self.levels[self.codes & 7] * sigma
        if rounded:
            value = rn8(value)
        return np.where(self.codes & 8, -value, value)[:, :self.cols]

    def weights(self, rounded=True):
        return self.operands(rounded) * (self.r[:, None] if len(self.r) > 1 else self.r)


def fp8_matrix(tensors, name, rows, cols):
    """Operands and r of NAME.weight in FP8, checked against the format's rules."""
    (dtype, codes), (scale_dtype, scale) = tensors[name + ".weight"], tensors[name + ".weight_scale"]
    assert (dtype, codes.shape) == ("F8_E4M3", (rows, cols)), (name, dtype, codes.shape)
    assert (scale_dtype, scale.shape) == ("F32", (rows,)), (name, scale_dtype, scale.shape)
    assert not np.any(codes & 127 == 127), f"{name}: NaN"
    assert np.all(np.isfinite(scale) & (scale > 0)), f"{name}: row scale"
    return E4M3[codes].astype(np.float32), scale.astype(np.float32)


def quantise_fp8_rows(weight):
    """(operand values, r): one scale per row, 448 for its largest weight."""
    weight = np.asarray(weight, np.float32)
    r = np.maximum(np.abs(weight).max(axis=1), np.float32(2.0**-100)) / np.float32(448)
    return rn8(weight / r[:, None]).astype(np.float32), r


# --- models ------------------------------------------------------------------------------------------------

class Config:
    def __init__(self, folder):
        raw = json.loads((Path(folder) / "config.json").read_text())
        self.raw = raw
        self.hidden, self.ffn = raw["hidden_size"], raw["intermediate_size"]
        self.layers, self.heads = raw["num_hidden_layers"], raw["num_attention_heads"]
        self.kv_heads = raw.get("num_key_value_heads", self.heads)
        self.head_dim = raw.get("head_dim") or self.hidden // self.heads
        self.vocab, self.eps = raw["vocab_size"], raw["rms_norm_eps"]
        self.theta = raw.get("rope_theta", 10000.0)
        self.quantization = raw.get("quantization_config")

    def shape(self, linear):
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"q_proj": (q, self.hidden), "k_proj": (kv, self.hidden), "v_proj": (kv, self.hidden),
                "o_proj": (self.hidden, q), "gate_proj": (self.ffn, self.hidden), "up_proj": (self.ffn, self.hidden),
                "down_proj": (self.hidden, self.ffn)}[linear.split(".")[-1]]


class Model:
    """A Hugging Face or a FireQ folder. self.linear[layer][name] = (weight, r or 1)."""

    def __init__(self, folder):
        self.config = c = Config(folder)
        tensors = read_tensors(folder)
        self.tensors, self.packed = tensors, {}
        self.plain = set()  # linears of a FireQ folder in the source's type: inputs are not FP8
        quantization = c.quantization
        if quantization:
            levels = quantization["levels"]
            levels = list(range(8)) if levels == "int4" else levels
        self.linear = []
        self.norms = []
        self.s = []
        self.shift = []
        self.rounding = {"k": [], "v": []}
        for i in range(c.layers):
            prefix = f"model.layers.{i}."
            layer = {}
            for name in LINEARS:
                full = prefix + name
                if quantization and full in quantization.get("fp8", ()):
                    layer[name] = fp8_matrix(tensors, full, *c.shape(name))
                elif quantization and full not in quantization["ignore"]:
                    packed = Packed(tensors, full, *c.shape(name), levels, quantization["row_scale"])
                    self.packed[full] = packed
                    layer[name] = (packed.operands().astype(np.float32), packed.r.astype(np.float32))
                else:
                    layer[name] = (to_float(*tensors[full + ".weight"]), np.ones(1, np.float32))
                    assert layer[name][0].shape == c.shape(name)
                    if quantization:
                        self.plain.add((i, name))
            self.linear.append(layer)
            self.norms.append((to_float(*tensors[prefix + "input_layernorm.weight"]),
                               to_float(*tensors[prefix + "post_attention_layernorm.weight"])))
            s = tensors.get(prefix + "self_attn.k_post_rope_scale")
            if s:
                assert s[0] == "F32" and s[1].shape == (c.kv_heads, c.head_dim), (prefix, s[1].shape)
            shift = tensors.get(prefix + "self_attn.k_post_rope_shift")
            if shift:
                assert shift[0] == "F32" and shift[1].shape == (c.kv_heads, c.head_dim), (prefix, shift[1].shape)
            triangle = (c.kv_heads, c.head_dim * (c.head_dim + 1) // 2)
            for which, factors in self.rounding.items():
                rounding = tensors.get(f"{prefix}self_attn.{which}_rounding")
                if rounding:
                    assert rounding[0] == "BF16" and rounding[1].shape == triangle, (prefix, which, rounding[1].shape)
                factors.append(to_float(*rounding).astype(np.float32) if rounding else None)
            self.shift.append(shift[1].astype(np.float32) if shift else np.zeros((c.kv_heads, c.head_dim), np.float32))
            self.s.append(s[1].astype(np.float32) if s else np.ones((c.kv_heads, c.head_dim), np.float32))
        def table(name):
            if quantization and name in quantization.get("fp8", ()):
                operands, r = fp8_matrix(tensors, name, c.vocab, c.hidden)
                return operands * r[:, None]
            return to_float(*tensors[name + ".weight"])

        self.embedding = table("model.embed_tokens")
        self.head = table("lm_head") if "lm_head.weight" in tensors else self.embedding
        self.final_norm = to_float(*tensors["model.norm.weight"])

    def _apply(self, layer, name, x, fp8):
        weight, r = self.linear[layer][name]
        if not fp8:
            return (x @ weight.T) * r
        x = bf16(x)
        if (layer, name) in self.plain:
            return bf16(x @ weight.T)
        a = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(2.0**-20)) * np.float32(1 / 448)
        x8 = rn8(x / a).astype(np.float32)
        return bf16((a * r) * (x8 @ weight.T))

    def logits(self, ids, activations="fp", k="fp", v="fp", qp="fp", last=False):
        """[T, vocab] of one window ([1, vocab] with last). 'fp8' and 'int4' switch the quantisation of numerics.md on."""
        c = self.config
        fp8, length, group = activations == "fp8", len(ids), c.heads // c.kv_heads
        half = c.head_dim // 2
        angle = np.arange(length)[:, None] / c.theta ** (np.arange(half) / half)
        cos, sin = (f(angle).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))

        def norm(x, weight):
            return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(c.eps)) * weight

        def rope(x):
            first, second = x[..., :half], x[..., half:]
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

        def int4(x):
            """codes and sigma, per (token, head)."""
            sigma = np.maximum(rn8(np.abs(x).max(axis=-1, keepdims=True) / np.float32(7)), 2.0**-9)
            return np.clip(np.rint(x / sigma), -7, 7).astype(np.float32), sigma.astype(np.float32)

        def int4_together(x, factor, offsets):
            """The same, the codes of a (token, head) chosen together: channel by channel, under several sigmas."""
            codes, best, least = np.zeros_like(x), np.ones_like(x[..., :1]), np.full(x.shape[:-1], np.inf)
            base = np.maximum(rn8(np.abs(x).max(axis=-1, keepdims=True) / np.float32(7)), 2.0**-9)
            for offset in offsets:
                sigma = _POSITIVE[np.clip(np.searchsorted(_POSITIVE, base) + offset, 1, 126)].astype(np.float32)
                due, error, trial = np.zeros_like(x), np.zeros(x.shape[:-1]), np.zeros_like(x)
                start = 0
                for j in range(c.head_dim):
                    row = factor[:, start:start + c.head_dim - j]
                    start += c.head_dim - j
                    trial[..., j] = np.clip(np.rint((x[..., j] + due[..., j]) / sigma[..., 0]), -7, 7)
                    e = x[..., j] - trial[..., j] * sigma[..., 0]
                    error += row[:, 0].astype(np.float64) * (due[..., j] + e).astype(np.float64)**2
                    due[..., j + 1:] += e[..., None] * row[:, 1:]
                better = (error < least)[..., None]
                codes, best = np.where(better, trial, codes), np.where(better, sigma, best)
                least = np.minimum(error, least)
            return codes.astype(np.float32), best.astype(np.float32)

        hidden = self.embedding[ids]
        for i in range(c.layers):
            x = norm(hidden, self.norms[i][0])
            q, key, value = (self._apply(i, f"self_attn.{n}_proj", x, fp8).reshape(length, -1, c.head_dim)
                             for n in "qkv")
            q, key = rope(q), rope(key)
            key = (key - self.shift[i]) * self.s[i]
            q = q / np.repeat(self.s[i], group, axis=0)
            sigma_k = sigma_v = None
            if k == "int4":
                factor = self.rounding["k"][i]
                key, sigma_k = int4(key) if factor is None else int4_together(key, factor, (0, 1, -1, 2, 3))
            if v == "int4":
                factor = self.rounding["v"][i]
                value, sigma_v = int4(value) if factor is None else int4_together(value, factor, (0, 1, 2, 3))
            q_scale = np.ones((length, c.heads, 1), np.float32)
            if qp == "fp8":
                q_scale = np.maximum(np.abs(q).max(axis=-1, keepdims=True), np.float32(2.0**-20)) / np.float32(448)
                q = rn8(q / q_scale).astype(np.float32)
            out = np.empty((length, c.heads, c.head_dim), np.float32)
            for h in range(c.heads):
                g = h // group
                score = (q[:, h] @ key[:, g].T) * q_scale[:, h] / np.float32(np.sqrt(c.head_dim))
                if sigma_k is not None:
                    score = score * sigma_k[:, g, 0]
                score[np.triu_indices(length, 1)] = -np.inf
                sv = sigma_v[:, g, 0] if sigma_v is not None else np.ones(length, np.float32)
                out[:, h] = self._attend(score, sv, value[:, g], qp == "fp8")
            hidden = hidden + self._apply(i, "self_attn.o_proj", out.reshape(length, -1), fp8)
            x = norm(hidden, self.norms[i][1])
            gate = self._apply(i, "mlp.gate_proj", x, fp8)
            up = self._apply(i, "mlp.up_proj", x, fp8)
            hidden = hidden + self._apply(i, "mlp.down_proj", gate / (1 + np.exp(-gate)) * up, fp8)
        return norm(hidden[-1:] if last else hidden, self.final_norm) @ self.head.T

    @staticmethod
    def _attend(score, sigma_v, value, fp8):
        """Softmax and P.V over blocks of keys with a running maximum, P8 per block when fp8."""
        length = len(score)
        maximum = np.full((length, 1), -np.inf, np.float32)
        total = np.zeros((length, 1), np.float32)
        out = np.zeros((length, value.shape[1]), np.float32)
        for begin in range(0, length, KEY_BLOCK):
            block = score[:, begin:begin + KEY_BLOCK]
            sv = sigma_v[begin:begin + KEY_BLOCK]
            new = np.maximum(maximum, block.max(axis=1, keepdims=True))
            keep = np.where(np.isfinite(maximum), np.exp(maximum - new), 0).astype(np.float32)
            p = np.where(np.isfinite(block), np.exp(block - np.where(np.isfinite(new), new, 0)), 0)
            total = total * keep + p.sum(axis=1, keepdims=True)
            if fp8:
                # The largest sigma of the keys of the block that the query may see.
                seen = np.where(np.isfinite(block), sv, 0).max(axis=1, keepdims=True)
                seen = np.where(seen > 0, seen, 1)
                p = rn8(448 * p * sv / seen) * seen / 448
            else:
                p = p * sv
            out = out * keep + p.astype(np.float32) @ value[begin:begin + KEY_BLOCK]
            maximum = new
        return out / total

    def log_likelihoods(self, ids, **precision):
        """log p of ids[1:] given what precedes them, in float64."""
        logits = self.logits(ids, **precision).astype(np.float64)[:-1]
        top = logits.max(axis=1, keepdims=True)
        log_z = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        return logits[np.arange(len(logits)), ids[1:]] - log_z


def windows(ids, length):
    """Non-overlapping; a final partial one is dropped."""
    return [np.asarray(ids[i:i + length]) for i in range(0, len(ids) - length + 1, length)]


def nll(model, ids, length, **precision):
    """Mean negative log-likelihood over windows that each score their last length - 1 tokens."""
    return -np.concatenate([model.log_likelihoods(w, **precision) for w in windows(ids, length)]).mean()


# --- quantiser: round to nearest with row scales, as numerics.md defines it ----------------------------------

def quantise_rtn_rows(weight):
    """(codes [N, Kp], sigma values [N, groups], r [N]) of integer levels, row scales, rounding to the value."""
    weight = np.asarray(weight, np.float64)
    rows, cols = weight.shape
    groups = -(-cols // GROUP)
    padded = np.zeros((rows, groups * GROUP))
    padded[:, :cols] = weight
    padded = padded.reshape(rows, groups, GROUP)
    amax = np.abs(padded).max(axis=2)
    # 56 r is at least amax / 7: one division, exact where the quotient is a bf16 number itself.
    least = np.maximum(amax.max(axis=1) / 7, 56 / 28672)
    r = np.array([_round_up_bf16(value) / 56 for value in least])
    # 56 r is a bf16 number; r itself is stored in FP32.
    r = r.astype(np.float32).astype(np.float64)
    scaled = padded / r[:, None, None]
    sigma = np.minimum(np.maximum(rn8(amax / r[:, None] / 7), 2.0**-9), 56)
    q = np.clip(np.rint(scaled / sigma[:, :, None]), -7, 7).astype(int)
    codes = np.where(q < 0, 8 - q, q)
    return codes.reshape(rows, -1), sigma, r


def _round_up_bf16(value):
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    floor = bits & 0xFFFF0000
    candidate = struct.unpack("<f", struct.pack("<I", floor))[0]
    return candidate if candidate >= value else struct.unpack("<f", struct.pack("<I", floor + 0x10000))[0]


# --- tokenizer.model (SentencePiece BPE) ---------------------------------------------------------------------

def _protobuf(blob):
    """(field, value) of one message: varints, 32-bit words and byte strings."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = blob[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(blob):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        elif kind == 2:
            size = varint()
            yield key >> 3, blob[at:at + size]
            at += size
        else:
            size = {1: 8, 5: 4}[kind]
            yield key >> 3, blob[at:at + size]
            at += size


class SentencePiece:
    """Byte-pair merges by score, with byte fallback and a space put in front."""

    def __init__(self, path):
        self.pieces, self.collapse = [], False
        for field, value in _protobuf(Path(path).read_bytes()):
            if field == 1:
                piece = dict(_protobuf(value))
                self.pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0], piece.get(3, 1)))
            elif field == 3:  # the normaliser's settings: remove extra whitespace
                self.collapse = dict(_protobuf(value)).get(4, 1) == 1
        self.ids = {piece: (i, score) for i, (piece, score, kind) in enumerate(self.pieces) if kind in (1, 4)}
        self.bytes = {piece: i for i, (piece, _, kind) in enumerate(self.pieces) if kind == 6}

    def encode(self, text):
        if self.collapse:
            text = re.sub(" +", " ", text).strip(" ")
        symbols = list("\u2581" + text.replace(" ", "\u2581"))
        after, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
        heap = []

        def offer(left):
            right = after[left]
            if right < len(symbols):
                joined = symbols[left] + symbols[right]
                if joined in self.ids:
                    heapq.heappush(heap, (-self.ids[joined][1], left, right, joined))

        for i in range(len(symbols) - 1):
            offer(i)
        while heap:
            _, left, right, joined = heapq.heappop(heap)
            if symbols[left] is None or symbols[right] is None or after[left] != right or \
                    symbols[left] + symbols[right] != joined:
                continue
            symbols[left], symbols[right] = joined, None
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            offer(left)
            if before[left] >= 0:
                offer(before[left])
        ids = []
        for symbol in symbols:
            if symbol is None:
                continue
            if symbol in self.ids:
                ids.append(self.ids[symbol][0])
            else:
                ids += [self.bytes[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return ids
