/* Codes as attention multiplies them. A "unit" is what a lane holds at a time: a float, or a pair of bfloat16 where the
 * processor multiplies pairs and what they are multiplied with fits in bfloat16. In which order units hold the codes of
 * a step is up to what is least work; what is multiplied with them, or summed up, is laid out to match. */
#ifndef FP8CPU_ATTENTION_UNITS_H
#define FP8CPU_ATTENTION_UNITS_H

#include "units.h"

typedef struct {
    int pairs, e5m2;
} kind;

INLINE int units_of(kind k) { return k.pairs ? 2 : 4; }

/* The code that lane `lane` of float unit `unit` holds. Pair u is made of floats u and u + 2. */
INLINE int code_of(int unit, int lane) {
#if defined(__AVX512VBMI__)
    return lane / 4 * 16 + unit % 2 * 8 + lane % 4 * 2 + unit / 2;
#else
    return 4 * lane + unit;
#endif
}

/* A step of codes of which `left` are there, or more; zeros behind them. There is no call in it, which would cost all
 * vectors their registers, and no mask where none is needed: masked loads keep the processor from reading ahead. */
INLINE vi load_codes(const uint8_t *p, int64_t left) {
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

INLINE void decode_codes(vi codes, kind k, vf *units) {
#if defined(__AVX512VBMI__)
    vi pairs[2];
    bfloat16_of_halves(codes, lookup_of(k.e5m2), pairs);
    if (k.pairs) {
        UNROLL for (int i = 0; i < 2; i++) units[i] = (vf)pairs[i];
    } else {
        UNROLL for (int i = 0; i < 2; i++) units[i] = (vf)(pairs[i] << 16);
        UNROLL for (int i = 0; i < 2; i++) units[i + 2] = (vf)(pairs[i] & (int32_t)0xFFFF0000);
    }
#else
    decode_units(codes, k.e5m2, units);
#endif
}

INLINE vf multiply_add(vf sum, vf a, vf b, kind k) {
#if defined(__AVX512BF16__)
    if (k.pairs) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)k;
    return sum + a * b;
}

/* The same pointer, though the compiler does not know: what it points to is read again, as an operand, where it would
 * otherwise be kept, and registers run out. */
INLINE const float *again(const float *p) {
    __asm__("" : "+r"(p));
    return p;
}

#endif
