/* exp and tanh of vectors, to within a few roundings of float32; NaN stays NaN. */
#ifndef FP8CPU_FUNCTIONS_H
#define FP8CPU_FUNCTIONS_H

#include "vector.h"

#define MIN_POWER -87.3f /* e to it is about the smallest normal float */

/* e^x for x <= 0; 0 where that is no normal float. */
INLINE vf exp_of(vf x) {
    const vf shift = splat(0x1.8p23f); /* added to a float, it leaves no room for fractions: rounds to an integer */
#if defined(__AVX512F__)
    const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(MIN_POWER), _CMP_NLT_UQ);
    const vf bounded = (vf)_mm512_max_ps(_mm512_set1_ps(MIN_POWER), (__m512)x); /* of a NaN and a number: the second */
#else
    const vi is_nan = x != x, underflows = x < MIN_POWER;
    const vf bounded = (vf)pick(underflows, splat_bits(0), (vi)x);
#endif
    const vf moved = bounded * 0x1.715476p+0f + shift, whole = moved - shift;
    const vf rest = (bounded - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f; /* ln 2, in two parts */
    vf sum = splat(1.0f / 5040);
    sum = sum * rest + 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_scalef_ps(is_normal, (__m512)sum, (__m512)whole);
#else
    const vi exponent = ((vi)moved - (vi)shift) << 23;
    const vi result = pick(underflows, splat_bits(0), (vi)sum + exponent);
    return (vf)pick(is_nan, (vi)x, result);
#endif
}

INLINE vf tanh_of(vf x) {
    const vi sign = (vi)x & (int32_t)0x80000000;
    const vf size = (vf)((vi)x & 0x7FFFFFFF), square = x * x;
    const vf power = exp_of(-2.0f * size), far = (1.0f - power) / (1.0f + power);
    vf sum = splat(62.0f / 2835); /* near 0, where the difference above cancels */
    sum = sum * square - 17.0f / 315;
    sum = sum * square + 2.0f / 15;
    sum = sum * square - 1.0f / 3;
    const vf near = size + size * square * sum;
    return (vf)(pick(size < 0.25f, (vi)near, (vi)far) | sign);
}

#endif
