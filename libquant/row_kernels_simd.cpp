// The loops of row_kernels.hpp with Highway, compiled once per instruction set and picked at run time. Every
// function mirrors its plain twin lane by lane; ends that do not fill a vector go through the scalar code.
// The wrapper for an x86-64 without SSSE3 is the plain table itself.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "libquant/row_kernels_simd.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <cstring>

#include "libquant/float_bits.hpp"
#include "libquant/row_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace fireq::libquant::HWY_NAMESPACE {
#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || !HWY_ARCH_X86

const RowKernels* table() {
  return &plain_kernels();
}

#else

namespace hn = hwy::HWY_NAMESPACE;

// FP32 conversions work on 32-bit lanes, as integers; all values compared are below 2^31, so signed compares
// do.
using D32 = hn::ScalableTag<std::int32_t>;
using DF = hn::ScalableTag<float>;
using D16 = hn::Rebind<std::uint16_t, D32>;
using D8 = hn::Rebind<std::uint8_t, D32>;
using V32 = hn::Vec<D32>;
using VF = hn::Vec<DF>;

HWY_INLINE V32 set(std::uint32_t v) {
  return hn::Set(D32(), static_cast<std::int32_t>(v));
}
HWY_INLINE V32 as_bits(VF v) {
  return hn::BitCast(D32(), v);
}
HWY_INLINE VF as_float(V32 v) {
  return hn::BitCast(DF(), v);
}
template <int kBits>
HWY_INLINE V32 shift_right(V32 v) {  // logical
  const hn::RebindToUnsigned<D32> du;
  return hn::BitCast(D32(), hn::ShiftRight<kBits>(hn::BitCast(du, v)));
}

HWY_INLINE V32 to_e4m3(V32 u) {
  const V32 sign = hn::And(shift_right<24>(u), set(0x80));
  const V32 magnitude = hn::And(u, set(bits::kAbs));
  const V32 a = hn::Min(magnitude, set(0x43e00000U));
  const V32 odd = hn::And(shift_right<20>(a), set(1));
  const V32 normal = hn::Sub(shift_right<20>(hn::Add(a, hn::Add(set(0x7ffffU), odd))), set(120U << 3U));
  const V32 small = hn::Sub(as_bits(hn::Add(as_float(a), hn::Set(DF(), 0x1p14F))), set(0x46800000U));
  const V32 code = hn::Or(sign, hn::IfThenElse(hn::Lt(a, set(0x3c800000U)), small, normal));
  return hn::IfThenElse(hn::Gt(magnitude, set(bits::kInf)), set(0x7f), code);
}
HWY_INLINE VF from_e4m3(V32 byte) {
  const V32 sign = hn::ShiftLeft<24>(hn::And(byte, set(0x80)));
  const V32 m = hn::And(byte, set(0x7f));
  const V32 normal = hn::Add(hn::ShiftLeft<20>(m), set(120U << 23U));
  const V32 small = as_bits(hn::Mul(hn::ConvertTo(DF(), m), hn::Set(DF(), 0x1p-9F)));
  const V32 value = hn::IfThenElse(hn::Lt(m, set(8)), small, normal);
  return as_float(hn::Or(sign, hn::IfThenElse(hn::Eq(m, set(0x7f)), set(0x7fc00000U), value)));
}
HWY_INLINE V32 to_bf16(V32 u) {
  const V32 high = shift_right<16>(u);
  const V32 odd = hn::And(high, set(1));
  const V32 rounded = shift_right<16>(hn::Add(u, hn::Add(set(0x7fffU), odd)));
  const auto nan = hn::Gt(hn::And(u, set(bits::kAbs)), set(bits::kInf));
  return hn::IfThenElse(nan, hn::Or(high, set(0x40)), rounded);
}
HWY_INLINE V32 to_f16(V32 u) {
  const V32 sign = hn::And(shift_right<16>(u), set(0x8000U));
  const V32 a = hn::And(u, set(bits::kAbs));
  const V32 odd = hn::And(shift_right<13>(a), set(1));
  const V32 normal = hn::Sub(shift_right<13>(hn::Add(a, hn::Add(set(0xfffU), odd))), set(112U << 10U));
  const V32 small = hn::Sub(as_bits(hn::Add(as_float(a), hn::Set(DF(), 0.5F))), set(0x3f000000U));
  const V32 nan = hn::Or(set(0x7e00U), hn::And(shift_right<13>(a), set(0x3ffU)));
  V32 half = hn::IfThenElse(hn::Lt(a, set(0x38800000U)), small, normal);
  half = hn::IfThenElse(hn::Gt(a, set(0x477fefffU)), set(0x7c00U), half);
  half = hn::IfThenElse(hn::Gt(a, set(bits::kInf)), nan, half);
  return hn::Or(sign, half);
}
HWY_INLINE VF from_f16(V32 h) {
  const V32 sign = hn::ShiftLeft<16>(hn::And(h, set(0x8000U)));
  const V32 m = hn::And(h, set(0x7fffU));
  const V32 shifted = hn::ShiftLeft<13>(m);
  const V32 small = as_bits(hn::Mul(hn::ConvertTo(DF(), m), hn::Set(DF(), 0x1p-24F)));
  V32 value = hn::Add(shifted, set(112U << 23U));
  value = hn::IfThenElse(hn::Lt(m, set(0x400U)), small, value);
  value = hn::IfThenElse(hn::Gt(m, set(0x7bffU)), hn::Or(shifted, set(bits::kInf)), value);
  return as_float(hn::Or(sign, value));
}

// Unaligned 16-bit and 32-bit lanes are loaded as bytes: the address may be any.
template <class D>
HWY_INLINE hn::Vec<D> load_bytes(D d, const std::byte* p) {
  const hn::Repartition<std::uint8_t, D> d8;
  return hn::BitCast(d, hn::LoadU(d8, reinterpret_cast<const std::uint8_t*>(p)));
}
HWY_INLINE V32 load16(const std::byte* p) {
  return hn::PromoteTo(D32(), load_bytes(D16(), p));
}

void decode_e4m3_simd(const std::uint8_t* in, float* out, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(from_e4m3(hn::PromoteTo(D32(), hn::LoadU(D8(), in + i))), DF(), out + i);
  for (; i < n; ++i) out[i] = bits::f32_from_e4m3(in[i]);
}
void encode_e4m3_simd(const float* in, std::uint8_t* out, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::DemoteTo(D8(), to_e4m3(as_bits(hn::LoadU(DF(), in + i)))), D8(), out + i);
  }
  for (; i < n; ++i) out[i] = bits::e4m3_from_f32(in[i]);
}
void decode_bf16_simd(const std::byte* in, float* out, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(as_float(hn::ShiftLeft<16>(load16(in + 2 * i))), DF(), out + i);
  for (std::uint16_t h = 0; i < n; ++i) {
    std::memcpy(&h, in + 2 * i, sizeof(h));
    out[i] = bits::f32_from_bf16(h);
  }
}
void encode_bf16_simd(const float* in, std::uint16_t* out, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::DemoteTo(D16(), to_bf16(as_bits(hn::LoadU(DF(), in + i)))), D16(), out + i);
  }
  for (; i < n; ++i) out[i] = bits::bf16_from_f32(in[i]);
}
void decode_f16_simd(const std::byte* in, float* out, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(from_f16(load16(in + 2 * i)), DF(), out + i);
  for (std::uint16_t h = 0; i < n; ++i) {
    std::memcpy(&h, in + 2 * i, sizeof(h));
    out[i] = bits::f32_from_f16(h);
  }
}
void encode_f16_simd(const float* in, std::uint16_t* out, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::DemoteTo(D16(), to_f16(as_bits(hn::LoadU(DF(), in + i)))), D16(), out + i);
  }
  for (; i < n; ++i) out[i] = bits::f16_from_f32(in[i]);
}

// --- Rows of weights. Lane is int16_t or int32_t; at most 128 lanes, so that a group is a whole number of
// vectors. ---

template <typename Lane>
using RowTag = hn::CappedTag<Lane, kGroupSize>;
template <typename Lane>
using RowVec = hn::Vec<hn::CappedTag<Lane, kGroupSize> >;

template <typename Lane>
HWY_INLINE RowVec<Lane> magnitude_of(RowVec<Lane> x) {
  constexpr Lane kMagnitude = static_cast<Lane>(sizeof(Lane) == 2 ? 0x7fff : 0x7fffffff);
  return hn::And(x, hn::Set(RowTag<Lane>(), kMagnitude));
}

// The last, partial group of a row, zero padded.
struct Tail {
  alignas(64) std::byte bytes[kGroupSize * 4];
  Tail(const std::byte* from, std::size_t size) {
    std::memset(bytes, 0, sizeof(bytes));
    std::memcpy(bytes, from, size);
  }
};

template <typename Lane>
HWY_INLINE std::uint32_t group_absmax(const std::byte* group) {
  const RowTag<Lane> d;
  const std::size_t lanes = hn::Lanes(d);
  auto largest = hn::Zero(d);
  for (std::size_t i = 0; i < kGroupSize; i += lanes) {
    largest = hn::Max(largest, magnitude_of<Lane>(load_bytes(d, group + i * sizeof(Lane))));
  }
  return static_cast<std::uint32_t>(hn::GetLane(hn::MaxOfLanes(d, largest)));
}

template <typename Lane>
void group_absmax_simd(const std::byte* row, std::size_t n, std::uint32_t* out) {
  constexpr std::size_t kBytes = kGroupSize * sizeof(Lane);
  for (; n >= kGroupSize; n -= kGroupSize, row += kBytes) *out++ = group_absmax<Lane>(row);
  if (n > 0) *out = group_absmax<Lane>(Tail(row, n * sizeof(Lane)).bytes);
}

// FP32: counts the thresholds passed.
HWY_INLINE void encode_group(const float* /*type only*/, const std::byte* group, const GroupTable& table,
                             std::uint8_t* out) {
  using D = RowTag<std::int32_t>;
  using V = hn::Vec<D>;
  const D d;
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<std::uint8_t, D> d8;
  const auto below = [&](std::size_t j) {  // x >= t is x > t - 1
    return hn::Set(d, static_cast<std::int32_t>(table.threshold[j] - 1));
  };
  const V b0 = below(0), b1 = below(1), b2 = below(2), b3 = below(3), b4 = below(4), b5 = below(5),
          b6 = below(6), b7 = below(7);
  // The number passed is also one more than the last one passed; masked moves make that the cheaper form on
  // AVX-512.
  const auto step = [&](V index, V x, V b, [[maybe_unused]] std::int32_t passed) {
#if HWY_TARGET <= HWY_AVX3
    return hn::IfThenElse(hn::Gt(x, b), hn::Set(d, passed), index);
#else
    return hn::Sub(index, hn::VecFromMask(d, hn::Gt(x, b)));
#endif
  };
  alignas(64) std::uint8_t one_each[kGroupSize];  // one code a byte
  for (std::size_t i = 0; i < kGroupSize; i += hn::Lanes(d)) {
    const V x = load_bytes(d, group + i * 4);
    const V m = hn::And(x, set(bits::kAbs));
    V index = hn::Zero(d);
    index = step(index, m, b0, 1);
    index = step(index, m, b1, 2);
    index = step(index, m, b2, 3);
    index = step(index, m, b3, 4);
    index = step(index, m, b4, 5);
    index = step(index, m, b5, 6);
    index = step(index, m, b6, 7);
    const V top = hn::BitCast(d, hn::ShiftRight<28>(hn::BitCast(du, x)));
    const V code = hn::Or(index, hn::And(top, hn::IfThenElseZero(hn::Gt(m, b7), set(8))));
    hn::StoreU(hn::DemoteTo(d8, code), d8, one_each + i);
  }
  using D16Row = RowTag<std::int16_t>;
  const D16Row d16;
  const hn::RebindToUnsigned<D16Row> du16;
  const hn::Rebind<std::uint8_t, D16Row> db;
  for (std::size_t i = 0; i < kGroupSize / 2; i += hn::Lanes(d16)) {
    const auto pair =
        hn::BitCast(du16, load_bytes(d16, reinterpret_cast<const std::byte*>(one_each) + 2 * i));
    const auto byte = hn::And(hn::Or(pair, hn::ShiftRight<4>(pair)), hn::Set(du16, std::uint16_t{0xff}));
    hn::StoreU(hn::DemoteTo(db, hn::BitCast(d16, byte)), db, out + i);
  }
}

// F16 and BF16, four vectors at a time. The index is found by halving: thresholds 3, then 1 or 5, then one of
// 0, 2, 4, 6 by a byte shuffle of all eight. p holds the shuffle's byte pair (2j, 2j + 1) for lane j, so its
// low byte is twice the index before the last step.
HWY_INLINE void encode_group(const std::uint16_t* /*type only*/, const std::byte* group,
                             const GroupTable& table, std::uint8_t* out) {
  using D = RowTag<std::int16_t>;
  using V = hn::Vec<D>;
  const D d;
  const hn::RebindToUnsigned<D> du;
  const hn::RepartitionToWide<D> d32;
  const hn::RebindToUnsigned<decltype(d32)> du32;
  const hn::Repartition<std::uint8_t, D> d8;
  constexpr std::size_t kLanes = hn::MaxLanes(D());
  constexpr std::size_t kBlocks = kLanes / 8;  // of 128 bits

  // x >= t is x > t - 1
  const V all =
      hn::Sub(hn::BitCast(d, hn::LoadDup128(du, table.threshold16.data())), hn::Set(d, std::int16_t{1}));
  const V b1 = hn::Broadcast<1>(all), b3 = hn::Broadcast<3>(all), b5 = hn::Broadcast<5>(all),
          b7 = hn::Broadcast<7>(all);
  const auto constant = [&](int v) { return hn::Set(d, static_cast<std::int16_t>(v)); };
  // Twice the code: sign in bit 4, index in bits 1..3.
  const auto encode = [&](const std::byte* from) {
    const V x = load_bytes(d, from);
    const V m = hn::And(x, constant(0x7fff));
    const auto upper = hn::Gt(m, b3);
    const auto second = hn::Gt(m, hn::IfThenElse(upper, b5, b1));
    const V p = hn::Or(constant(0x0100), hn::Or(hn::IfThenElseZero(upper, constant(0x0808)),
                                                hn::IfThenElseZero(second, constant(0x0404))));
    const auto last = hn::Gt(m, hn::TableLookupBytes(all, p));
    const V sign = hn::BitCast(d, hn::ShiftRight<11>(hn::BitCast(du, x)));
    const V kept = hn::And(sign, hn::IfThenElseZero(hn::Gt(m, b7), constant(0x10)));
    return hn::Or(hn::Or(hn::And(p, constant(0x0c)), hn::IfThenElseZero(last, constant(0x02))), kept);
  };
  // Four vectors share lanes: bytes of a 32-bit lane are the pairs of vectors 0, 1, 2, 3. A shuffle in blocks
  // and one of 32-bit lanes bring each vector's bytes together.
  alignas(16) static constexpr std::uint8_t kGather[16] = {0, 4, 8,  12, 1, 5, 9,  13,
                                                           2, 6, 10, 14, 3, 7, 11, 15};
  const auto gather = hn::LoadDup128(d8, kGather);
  alignas(64) std::int32_t order[kLanes / 2];
  for (std::size_t i = 0; i < kLanes / 2; ++i)
    order[i] = static_cast<std::int32_t>(i % kBlocks * 4 + i / kBlocks);
  const auto in_order = hn::SetTableIndices(d32, order);

  const auto join = [&](V a, V b) {  // 32-bit lanes: twice (pair of a | pair of b << 8) in the low 17 bits
    const auto both = hn::BitCast(du32, hn::Or(a, hn::ShiftLeft<8>(b)));
    return hn::Or(both, hn::ShiftRight<12>(both));
  };
  constexpr std::size_t kBytes = kLanes * 2;
  for (std::size_t i = 0; i < kGroupSize; i += 4 * kLanes, group += 4 * kBytes, out += kBytes) {
    const auto low = join(encode(group), encode(group + kBytes));
    const auto high = join(encode(group + 2 * kBytes), encode(group + 3 * kBytes));
    const auto mask = hn::Set(du32, 0xffffU);
    const auto joined =
        hn::Or(hn::And(hn::ShiftRight<1>(low), mask), hn::AndNot(mask, hn::ShiftLeft<15>(high)));
    const auto gathered = hn::BitCast(d32, hn::TableLookupBytes(hn::BitCast(d8, joined), gather));
    hn::StoreU(hn::BitCast(d8, hn::TableLookupLanes(gathered, in_order)), d8, out);
  }
}

template <typename Element>  // std::uint16_t or float
void encode_row_simd(const std::byte* row, const std::byte* next, std::size_t n,
                     const GroupTable* const* tables, std::uint8_t* out) {
  constexpr std::size_t kBytes = kGroupSize * sizeof(Element);
  for (; n >= kGroupSize; n -= kGroupSize, row += kBytes, next += kBytes, out += kGroupSize / 2) {
    for (std::size_t line = 0; line < kBytes; line += 64) __builtin_prefetch(next + line);
    encode_group(static_cast<const Element*>(nullptr), row, **tables++, out);
  }
  if (n > 0)
    encode_group(static_cast<const Element*>(nullptr), Tail(row, n * sizeof(Element)).bytes, **tables,
                 out);  // zeros make code 0
}

void search_errors_simd(const float* magnitude, const float* weight, const GroupTable* const* tables,
                        std::size_t n, float* errors) {
  const hn::CappedTag<float, 16> d;
  using V = hn::Vec<decltype(d)>;
  const std::size_t lanes = hn::Lanes(d);
  for (std::size_t c = 0; c < n; ++c) {
    const GroupTable& table = *tables[c];
    const auto threshold = [&](std::size_t j) {
      return hn::Set(d, std::bit_cast<float>(table.threshold[j]));
    };
    const auto level = [&](std::size_t j) { return hn::Set(d, table.value[j]); };
    const V t1 = threshold(0), t2 = threshold(1), t3 = threshold(2), t4 = threshold(3), t5 = threshold(4),
            t6 = threshold(5), t7 = threshold(6);
    const V v0 = level(0), v1 = level(1), v2 = level(2), v3 = level(3), v4 = level(4), v5 = level(5),
            v6 = level(6), v7 = level(7);
    std::array<float, 16> partial;
    for (std::size_t part = 0; part < 16; part += lanes) {
      V sum = hn::Zero(d);
      for (std::size_t k = part; k < kGroupSize; k += 16) {
        const V m = hn::LoadU(d, magnitude + k);
        V value = hn::IfThenElse(hn::Ge(m, t1), v1, v0);
        value = hn::IfThenElse(hn::Ge(m, t2), v2, value);
        value = hn::IfThenElse(hn::Ge(m, t3), v3, value);
        value = hn::IfThenElse(hn::Ge(m, t4), v4, value);
        value = hn::IfThenElse(hn::Ge(m, t5), v5, value);
        value = hn::IfThenElse(hn::Ge(m, t6), v6, value);
        value = hn::IfThenElse(hn::Ge(m, t7), v7, value);
        const V error = hn::Sub(m, value);
        sum = hn::Add(sum, hn::Mul(hn::LoadU(d, weight + k), hn::Mul(error, error)));
      }
      hn::StoreU(sum, d, partial.data() + part);
    }
    errors[c] = fold_partials(partial);
  }
}

void divide_to_e4m3_simd(const float* x, float a, std::uint8_t* out, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  const VF divisor = hn::Set(DF(), a);
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VF quotient = hn::Div(hn::LoadU(DF(), x + i), divisor);
    hn::StoreU(hn::DemoteTo(D8(), to_e4m3(as_bits(quotient))), D8(), out + i);
  }
  for (; i < n; ++i) out[i] = bits::e4m3_from_f32(x[i] / a);
}
void divide_round_e4m3_simd(float* x, float a, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  const VF divisor = hn::Set(DF(), a);
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(from_e4m3(to_e4m3(as_bits(hn::Div(hn::LoadU(DF(), x + i), divisor)))), DF(), x + i);
  }
  for (; i < n; ++i) x[i] = bits::f32_from_e4m3(bits::e4m3_from_f32(x[i] / a));
}
void round_bf16_simd(const float* in, float* out, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(as_float(hn::ShiftLeft<16>(to_bf16(as_bits(hn::LoadU(DF(), in + i))))), DF(), out + i);
  }
  for (; i < n; ++i) out[i] = bits::f32_from_bf16(bits::bf16_from_f32(in[i]));
}
std::uint32_t absmax32_simd(const float* x, std::size_t n) {
  const std::size_t lanes = hn::Lanes(D32());
  V32 largest = hn::Zero(D32());
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes)
    largest = hn::Max(largest, hn::And(as_bits(hn::LoadU(DF(), x + i)), set(bits::kAbs)));
  auto result = static_cast<std::uint32_t>(hn::GetLane(hn::MaxOfLanes(D32(), largest)));
  for (; i < n; ++i) {
    const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x[i]) & bits::kAbs;
    if (magnitude > result) result = magnitude;
  }
  return result;
}

const RowKernels* table() {
  static const RowKernels kTable{hwy::TargetName(HWY_TARGET),
                                 decode_e4m3_simd,
                                 encode_e4m3_simd,
                                 decode_bf16_simd,
                                 encode_bf16_simd,
                                 decode_f16_simd,
                                 encode_f16_simd,
                                 group_absmax_simd<std::int16_t>,
                                 group_absmax_simd<std::int32_t>,
                                 encode_row_simd<std::uint16_t>,
                                 encode_row_simd<float>,
                                 search_errors_simd,
                                 divide_to_e4m3_simd,
                                 divide_round_e4m3_simd,
                                 round_bf16_simd,
                                 absmax32_simd};
  return &kTable;
}

#endif
}  // namespace fireq::libquant::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fireq::libquant {

HWY_EXPORT(table);

namespace {
std::atomic<const RowKernels*> chosen{nullptr};
}

const RowKernels& kernels() noexcept {
  const RowKernels* const set = chosen.load(std::memory_order_relaxed);
  return set != nullptr ? *set : *HWY_DYNAMIC_DISPATCH(table)();
}

void use_kernels(const RowKernels* table) noexcept {
  chosen.store(table, std::memory_order_relaxed);
}

std::vector<const RowKernels*> available_kernels() {
  std::vector<const RowKernels*> tables{&plain_kernels()};
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    const RowKernels* const found = HWY_DYNAMIC_DISPATCH(table)();
    if (found != tables[0]) tables.push_back(found);
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return tables;
}

}  // namespace fireq::libquant
#endif
