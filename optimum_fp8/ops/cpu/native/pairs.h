/* Values of 16 bits, 2 LANES at a time: a 32-bit lane holds a pair. */
#ifndef FP8CPU_PAIRS_H
#define FP8CPU_PAIRS_H

#include "vector.h"

typedef int16_t vpairs __attribute__((vector_size(4 * LANES)));

INLINE vpairs splat_pairs(int16_t bits) { return (vpairs){0} + bits; }

INLINE vpairs larger_pairs(vpairs a, vpairs b) {
#if defined(__AVX512BW__)
    return (vpairs)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vpairs)_mm256_max_epi16((__m256i)a, (__m256i)b);
#else
    return (vpairs)pick((vi)(a > b), (vi)a, (vi)b);
#endif
}

INLINE vpairs smaller_pairs(vpairs a, vpairs b) {
#if defined(__AVX512BW__)
    return (vpairs)_mm512_min_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vpairs)_mm256_min_epi16((__m256i)a, (__m256i)b);
#else
    return (vpairs)pick((vi)(a < b), (vi)a, (vi)b);
#endif
}

/* The low bytes, which are all there is in v. */
INLINE vhalf narrow_pairs(vpairs v) {
#if defined(__AVX512BW__)
    return (vhalf)_mm512_cvtepi16_epi8((__m512i)v);
#elif defined(__AVX2__)
    const __m256i bytes = _mm256_packus_epi16((__m256i)v, (__m256i)v);
    return (vhalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(bytes, 0x08));
#else
    typedef uint8_t bytes __attribute__((vector_size(2 * LANES)));
    return (vhalf)__builtin_convertvector(v, bytes);
#endif
}

INLINE vpairs magnitudes_of(vi x) { return (vpairs)(x & 0x7FFF7FFF); }

/* The codes of bfloat16 values times a finite, positive factor: as `encode` has them, but the sums are cut in halves,
 * so that exponents and steps go on as pairs. */
INLINE vhalf encode_pairs(vi x, vf factor, float full_scale, fp8_format format) {
    const int drop = 23 - format.mantissa, high_half = (int32_t)0xFFFF0000;
    const vi magnitudes = (vi)magnitudes_of(x);
    const vi even = (vi)plus_magic((vf)(magnitudes << 16) * factor, format);
    const vi odd = (vi)plus_magic((vf)(magnitudes & high_half) * factor, format);
    const int32_t most = ((vi)plus_magic(splat(full_scale), format))[0];
    const vpairs exponents = (vpairs)pick(splat_bits(high_half), odd, (vi)((vu)even >> 16));
    const vpairs steps = (vpairs)pick(splat_bits(high_half), odd << 16, even);
    const vpairs limit = splat_pairs((int16_t)((most >> drop) + most));
    const vpairs codes = smaller_pairs((exponents >> (drop - 16)) + steps, limit);
    const vpairs is_nan = ((vpairs)magnitudes + 0x7F) >> 15; /* what is above Inf becomes negative */
    const vi kept = splat_bits(0x007F007F), signs = (vi)((vpairs)x >> 8) & 0x00800080;
    return narrow_pairs((vpairs)(((vi)(codes | is_nan) & kept) | signs));
}

#endif
