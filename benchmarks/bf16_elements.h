/* Attention over a cache in bfloat16, to measure that over FP8 codes beside: this takes the place of what
 * `attention_elements.h` says of codes, and all else is compiled as it is (`bf16_cache.py`). */
#ifndef FP8CPU_ATTENTION_ELEMENTS_H
#define FP8CPU_ATTENTION_ELEMENTS_H

#include "units.h"

#undef ATTENDS_ON_TILES /* tiles are made of codes */

typedef uint16_t element;

typedef struct {
    int pairs, e5m2; /* the second means nothing here */
} kind;

/* Pairs are read as they lie in memory. Pair u is made of floats u and u + 2. */
INLINE int element_of(int unit, int lane) { return unit % 2 * 2 * LANES + 2 * lane + unit / 2; }

/* Into the second cache: on the Zen 4 that was measured, one thread so read at 79 to 91 % of bandwidth, and into the first
 * one at 51 to 73 %. A step is two cache lines where vectors are as long as one. */
INLINE void prefetch_step(const element *p) {
    __builtin_prefetch(p, 0, 2);
    if (sizeof(element) * STEP > 64) __builtin_prefetch(p + 32, 0, 2);
}

INLINE int prefetches_neighbours(void) { return 1; }

INLINE decoder decoder_for(kind k) { return decoder_of(k.e5m2); } /* not used: there is nothing to decode */

INLINE vi load_pairs(const element *p, int64_t left) {
    if (left >= 2 * LANES) return load_bits(p);
#if defined(__AVX512BW__)
    return (vi)_mm512_maskz_loadu_epi16(left > 0 ? ~(__mmask32)0 >> (2 * LANES - left) : 0, p);
#else
    element padded[2 * LANES] = {0};
    for (int64_t i = 0; i < left; i++) padded[i] = p[i];
    return load_bits(padded);
#endif
}

INLINE void load_units(const element *p, int64_t left, kind k, decoder d, vf *units) {
    (void)d;
    vi pairs[2];
    UNROLL for (int i = 0; i < 2; i++) pairs[i] = load_pairs(p + i * 2 * LANES, left - i * 2 * LANES);
    UNROLL for (int i = 0; i < 2; i++) {
        units[i] = k.pairs ? (vf)pairs[i] : (vf)(pairs[i] << 16);
        if (!k.pairs) units[i + 2] = (vf)(pairs[i] & (int32_t)0xFFFF0000);
    }
}

#endif
