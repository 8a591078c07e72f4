/* What caches hold, as attention multiplies it: FP8 codes. A header that FP8CPU_ELEMENTS names takes this one's place, so
 * that the same attention is measured over another cache: `benchmarks/bf16_elements.h`. */
#ifdef FP8CPU_ELEMENTS
#include FP8CPU_ELEMENTS
#endif
#ifndef FP8CPU_ATTENTION_ELEMENTS_H
#define FP8CPU_ATTENTION_ELEMENTS_H

#include "units.h"

typedef uint8_t element;

/* Whether units are pairs of bfloat16, and which codes there are. */
typedef struct {
    int pairs, e5m2;
} kind;

/* The element of a step that lane `lane` of float unit `unit` holds. */
INLINE int element_of(int unit, int lane) { return code_of(unit, lane); }

INLINE void prefetch_step(const element *p) { __builtin_prefetch(p); }

/* A step of codes of which `left` are there, or more; zeros behind them. There is no call in it, which would cost all
 * vectors their registers, and no mask where none is needed: masked loads keep the processor from reading ahead. */
INLINE vi load_codes(const element *p, int64_t left) {
    if (left >= STEP) return load_bits(p);
#if defined(__AVX512BW__)
    return (vi)_mm512_maskz_loadu_epi8(~(__mmask64)0 >> (STEP - left), p);
#else
    uint8_t padded[STEP] = {0}, *to = padded;
    UNROLL for (int64_t part = STEP / 2; part > 0; part /= 2) if (left & part) {
        memcpy(to, p, (size_t)part);
        to += part, p += part;
    }
    return load_bits(padded);
#endif
}

/* The units of a step of which `left` elements are there, or more. */
INLINE void load_units(const element *p, int64_t left, kind k, vf *units) {
    const vi codes = load_codes(p, left);
#if defined(__AVX512BF16__)
    if (k.pairs) {
        decode_pairs(codes, decoder_of(k.e5m2), units);
        return;
    }
#endif
    decode_units(codes, decoder_of(k.e5m2), units);
}

#endif
