/* Vectors of 32-bit lanes in the compiler's own notation, as wide as the processor of this variant has them, and the
 * conversions of number formats: all exact, for every code and every float. */
#ifndef FP8CPU_VECTOR_H
#define FP8CPU_VECTOR_H

#include <stdint.h>
#include <string.h>

#include "fp8cpu.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint8_t vbytes __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));
typedef uint8_t vquarter __attribute__((vector_size(LANES)));

INLINE vi splat_bits(int32_t bits) { return (vi){0} + bits; }

INLINE vf splat(float value) { /* as bits: 0 + value would be an addition, and lose the sign of -0 */
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (vf)splat_bits(bits);
}

/* Where mask (all ones or all zeros a lane) is set: a, else b. */
INLINE vi pick(vi mask, vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_ternarylogic_epi32((__m512i)mask, (__m512i)a, (__m512i)b, 0xCA);
#else
    return (mask & a) | (~mask & b);
#endif
}

INLINE vi smaller_of(vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
    return pick(a < b, a, b);
#endif
}

INLINE vi larger_of(vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return pick(a > b, a, b);
#endif
}

INLINE vi load_bits(const void *p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf load_floats(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_floats(float *p, vf v) { memcpy(p, &v, sizeof v); }

/* --- wider and narrower lanes -----------------------------------------------------------------------------------------
 * Compilers do it lane by lane where the intrinsics do it at once. Narrowing keeps low bits; what is above is zero. */

INLINE vi widen(vhalf v) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return (vi)__builtin_convertvector(v, vu);
#endif
}

INLINE vi widen_bytes(vquarter v) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32((__m128i)v);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadu_si64(&v));
#else
    return (vi)__builtin_convertvector(v, vu);
#endif
}

INLINE vhalf narrow(vi v) {
#if defined(__AVX512F__)
    return (vhalf)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
    const __m256i halves = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    return (vhalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
#else
    return __builtin_convertvector((vu)v, vhalf);
#endif
}

INLINE vquarter narrow_to_bytes(vi v) {
    vquarter bytes;
#if defined(__AVX512F__)
    bytes = (vquarter)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
    const __m128i halves = (__m128i)narrow(v), packed = _mm_packus_epi16(halves, halves);
    memcpy(&bytes, &packed, sizeof bytes);
#else
    bytes = __builtin_convertvector((vu)v, vquarter);
#endif
    return bytes;
}

/* --- FP8 to float32 ------------------------------------------------------------------------------------------------
 * A code in the top byte of a lane, shifted right arithmetically until its exponent's last bit is float32's, and masked,
 * is its value but for the exponent's bias. That holds for normal numbers; subnormals, zeros, NaN and Inf are
 * exceptional, and rare enough to be looked for and treated apart. */

typedef struct {
    int shift, mantissa; /* to float32's place; mantissa bits */
    int32_t mask, bias;
    int32_t min_normal, special; /* magnitudes below the first are subnormal, from the second on NaN or Inf */
    float subnormal_step;
    float magic; /* see `plus_magic` */
} fp8_format;

static const fp8_format E4M3 = {4, 3, (int32_t)0x87F00000, 120 << 23, 0x08, 0x7F, 0x1p-9f, 0x1p20f + 152 / 8};
static const fp8_format E5M2 = {3, 2, (int32_t)0x8FE00000, 112 << 23, 0x04, 0x7C, 0x1p-16f, 0x1p21f + 232 / 4};

INLINE vf decode_normal(vi code_in_top_byte, fp8_format format) {
    return (vf)(((code_in_top_byte >> format.shift) & format.mask) + format.bias);
}

INLINE vf decode_any(vi code_in_top_byte, fp8_format format) {
    const vi magnitude = (code_in_top_byte >> 24) & 0x7F, sign = code_in_top_byte & (int32_t)0x80000000;
    const vf subnormal = __builtin_convertvector(magnitude, vf) * format.subnormal_step;
    const vi normal = (magnitude << (23 - format.mantissa)) + format.bias;
    /* E5M2's Inf has no mantissa bits; its NaNs, and the one of E4M3, keep some. */
    const vi special = 0x7F800000 | ((magnitude - format.special) << (23 - format.mantissa));
    const vi nan = splat_bits(0x7FC00000);
    vi bits = pick(magnitude < format.min_normal, (vi)subnormal, normal);
    bits = pick(magnitude >= format.special, format.special == 0x7F ? nan : special, bits);
    return (vf)(bits | sign);
}

/* Doubled (which drops the sign) and moved so that subnormals wrap around, exceptional codes are the largest bytes. */
INLINE int any_exceptional(vi codes, fp8_format format) {
    const vbytes bytes = (vbytes)codes, moved = bytes + bytes - (uint8_t)(2 * format.min_normal);
    const uint8_t least = (uint8_t)(2 * format.special - 2 * format.min_normal);
#if defined(__AVX512BW__)
    return _mm512_cmpge_epu8_mask((__m512i)moved, _mm512_set1_epi8((char)least)) != 0;
#elif defined(__AVX2__)
    const __m256i at_least = _mm256_max_epu8((__m256i)moved, _mm256_set1_epi8((char)least));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(at_least, (__m256i)moved)) != 0;
#elif defined(__SSE2__)
    const __m128i at_least = _mm_max_epu8((__m128i)moved, _mm_set1_epi8((char)least));
    return _mm_movemask_epi8(_mm_cmpeq_epi8(at_least, (__m128i)moved)) != 0;
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return vmaxvq_u8((uint8x16_t)moved) >= least;
#else
    const vbytes found = (vbytes)(moved >= least);
    uint64_t halves[sizeof found / 8], any = 0;
    memcpy(halves, &found, sizeof found);
    for (unsigned i = 0; i < sizeof found / 8; i++) any |= halves[i];
    return any != 0;
#endif
}

/* --- float32 to FP8 ------------------------------------------------------------------------------------------------
 * Round to nearest even by adding a magic number, clamped to +-full_scale; NaN stays NaN.
 *
 * Floats without sign are ordered as the integers that their bits are. Beside 2^(23 - mantissa bits) times its own power
 * of two (for subnormals: the smallest normal's), float32 has as many bits left for a float as FP8 has: the addition
 * rounds it. Of the sum, the last bits count FP8 steps above that power of two's 0, and the exponent, moved to them,
 * counts the steps below. What is to be taken off, because exponents start elsewhere, is 0 in the last byte: `magic` is
 * that little more than a power of two. */

INLINE vf power_of_two(vf magnitude, fp8_format format) {
    const int32_t smallest_normal = (format.min_normal << (23 - format.mantissa)) + format.bias;
    return (vf)(larger_of((vi)magnitude, splat_bits(smallest_normal)) & 0x7F800000);
}

INLINE vf plus_magic(vf magnitude, fp8_format format) {
    return magnitude + power_of_two(magnitude, format) * format.magic;
}

/* Codes come out in the low byte of each lane. */
INLINE vi encode(vf x, float full_scale, fp8_format format) {
    const vi magnitude = (vi)x & 0x7FFFFFFF, is_nan = magnitude > 0x7F800000;
    const vi sum = smaller_of((vi)plus_magic((vf)magnitude, format), (vi)plus_magic(splat(full_scale), format));
    const vi code = (sum + (sum >> (23 - format.mantissa))) | is_nan;
    return pick(splat_bits(0x7F), code, (vi)((vu)(vi)x >> 24)); /* with x's sign */
}

/* A float rounded to the FP8 grid. */
INLINE vf to_grid(vf x, float full_scale, fp8_format format) {
    const vi magnitude = (vi)x & 0x7FFFFFFF, is_nan = magnitude > 0x7F800000;
    const vf clamped = (vf)smaller_of(magnitude, (vi)splat(full_scale));
    const vf rounded = plus_magic(clamped, format) - power_of_two(clamped, format) * format.magic;
    return (vf)(pick(splat_bits(0x7FFFFFFF), (vi)rounded, (vi)x) | is_nan);
}

/* --- bfloat16 and float16 ------------------------------------------------------------------------------------------ */

INLINE vf from_half(vhalf v) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)v);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return vcvt_f32_f16((float16x4_t)v);
#else
    const vi bits = widen(v), sign = (bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
    const vi normal = (magnitude << 13) + (112 << 23), special = (magnitude << 13) + (224 << 23);
    const vi subnormal = (vi)(__builtin_convertvector(magnitude, vf) * 0x1p-24f);
    return (vf)(pick(magnitude < 0x400, subnormal, pick(magnitude >= 0x7C00, special, normal)) | sign);
#endif
}

INLINE vhalf to_half(vf x) {
#if defined(__AVX512F__)
    return (vhalf)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (vhalf)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vhalf)vcvt_f16_f32(x);
#else
    const vi bits = (vi)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    const vi normal = ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
    const vi subnormal = (vi)((vf)magnitude + 0.5f) - (vi)splat(0.5f);
    vi half = pick(magnitude < (113 << 23), subnormal, normal);
    half = pick(magnitude >= 0x477FF000, splat_bits(0x7C00), half);
    return narrow(pick(magnitude > 0x7F800000, splat_bits(0x7E00), half) | sign);
#endif
}

INLINE vhalf to_bfloat16(vf x) {
    const vi bits = (vi)x, magnitude = bits & 0x7FFFFFFF;
    const vi rounded = (vi)((vu)(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    return narrow(pick(magnitude > 0x7F800000, splat_bits(0x7FC0) | ((bits >> 16) & 0x8000), rounded));
}

/* --- LANES values of any dtype ------------------------------------------------------------------------------------- */

INLINE int64_t value_size(int64_t type) { return type == FP8CPU_FLOAT32 ? 4 : 2; }

INLINE vf load_values(const void *p, int64_t type) {
    vhalf half;
    if (type == FP8CPU_FLOAT32) return load_floats(p);
    memcpy(&half, p, sizeof half);
    return type == FP8CPU_BFLOAT16 ? (vf)(widen(half) << 16) : from_half(half);
}

INLINE void store_values(void *p, vf x, int64_t type) {
    vhalf half;
    if (type == FP8CPU_FLOAT32) {
        store_floats(p, x);
        return;
    }
    half = type == FP8CPU_BFLOAT16 ? to_bfloat16(x) : to_half(x);
    memcpy(p, &half, sizeof half);
}

/* As above, for the fewer than LANES values at the end of a row; lanes behind them are zero. */
INLINE vf load_some(const void *p, int64_t type, int64_t count) {
    float padded[LANES] = {0};
    memcpy(padded, p, (size_t)(count * value_size(type)));
    return load_values(padded, type);
}

INLINE void store_some(void *p, vf x, int64_t type, int64_t count) {
    float padded[LANES];
    store_values(padded, x, type);
    memcpy(p, padded, (size_t)(count * value_size(type)));
}

INLINE vf load_up_to(const void *p, int64_t type, int64_t count) {
    return count >= LANES ? load_values(p, type) : load_some(p, type, count);
}

INLINE vf round_to(vf x, int64_t type) {
    char memory[sizeof x];
    store_values(memory, x, type);
    return load_values(memory, type);
}

#endif
