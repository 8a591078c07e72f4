/* Scales along k that are powers of two, as MXFP8's are, folded into values: codes times them are bfloat16 still, but for
 * their ends, so a product is one of bfloat16 without scales; nothing has to be done for each group. */
#ifndef FP8CPU_LINEAR_FOLDING_H
#define FP8CPU_LINEAR_FOLDING_H

#include "linear_job.h"

/* Whether all are, from 2^-63 to 2^64: so far from the ends that codes times them lose nothing. */
static inline int are_powers_of_two(const float *scales, int64_t count) {
    enum { SOME = 1024 };
    for (int64_t first = 0; first < count; first += SOME) {
        uint32_t found = 0;
        for (int64_t i = first; i < smaller(first + SOME, count); i++) {
            uint32_t bits;
            memcpy(&bits, scales + i, sizeof bits);
            found |= (bits - (64u << 23)) & ~(0x7Fu << 23); /* sign, mantissa, and an exponent of more than 7 bits */
        }
        if (found) return 0;
    }
    return 1;
}

/* Whether the job's scales along k can be folded in. Looking takes less than the product, where rows are many. */
static inline int folds_scales(const linear_job *job) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t groups_of_rows = group_at(a->n + a->w_group_rows - 1, a->w_group_rows);
    if (!are_powers_of_two((const float *)a->w_scale, groups_of_rows * group_at(a->k + a->w_group - 1, a->w_group)))
        return 0;
    for (int64_t m = 0; a->x_group && m < job->rows; m++)
        if (!are_powers_of_two(x_scales_from(a, x_row(job, m), 0), group_at(a->k + a->x_group - 1, a->x_group))) return 0;
    return 1;
}

#if defined(__AVX512BW__)
/* A power of two as what is added to the bits of bfloat16, in both halves of a lane. */
INLINE __m512i exponents_of(vf scale) {
    const vi exponent = ((vi)scale >> 16) - 0x3F80;
    return (__m512i)((exponent & 0xFFFF) | exponent << 16);
}

/* bfloat16 times powers of two; zeros, NaN and Inf stay. */
INLINE __m512i times_powers(__m512i values, __m512i exponents) {
    const __m512i magnitudes = _mm512_and_si512(values, _mm512_set1_epi16(0x7FFF));
    const __m512i before = _mm512_sub_epi16(magnitudes, _mm512_set1_epi16(1)); /* of 0: the largest there is */
    const __mmask32 numbers = _mm512_cmplt_epu16_mask(before, _mm512_set1_epi16(0x7F7F));
    return _mm512_mask_add_epi16(values, numbers, values, exponents);
}
#endif

#endif
