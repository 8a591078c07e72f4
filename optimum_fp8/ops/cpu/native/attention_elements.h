/* What caches hold, as attention multiplies it: FP8 codes. A header that FP8CPU_ELEMENTS names takes this one's place, so
 * that the same attention is measured over another cache: `benchmarks/bf16_elements.h`. */
#ifdef FP8CPU_ELEMENTS
#include FP8CPU_ELEMENTS
#endif
#ifndef FP8CPU_ATTENTION_ELEMENTS_H
#define FP8CPU_ATTENTION_ELEMENTS_H

#include "units.h"
#include "zen4.h"

typedef uint8_t element;

/* Whether units are pairs of bfloat16, and which codes there are. */
typedef struct {
    int pairs, e5m2;
} kind;

/* The element of a step that lane `lane` of float unit `unit` holds. */
INLINE int element_of(int unit, int lane) { return code_of(unit, lane); }

INLINE void prefetch_step(const element *p) { __builtin_prefetch(p); }

/* Whether rows that are neighbours are prefetched. A Zen 4 reads them ahead by itself as fast as they are decoded;
 * prefetches get in its way: with 8192 tokens cached, 16 heads of queries on 8 of keys took 1.20 ms of one thread's CPU
 * time with them and 0.96 without, 16 on 16 1.68 and 1.42, 32 on 8 1.73 and 1.48. */
INLINE int prefetches_neighbours(void) { return !is_zen4(); }

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

INLINE decoder decoder_for(kind k) {
#if defined(__AVX512VBMI__)
    return in_registers(decoder_of(k.e5m2));
#else
    return decoder_of(k.e5m2);
#endif
}

/* The units of a step of which `left` elements are there, or more. */
INLINE void load_units(const element *p, int64_t left, kind k, decoder d, vf *units) {
    vi codes = load_codes(p, left);
#if defined(__AVX512VBMI__)
    __asm__("" : "+v"(codes)); /* else they are loaded again for each table */
#endif
#if defined(__AVX512BF16__)
    if (k.pairs) {
        decode_pairs(codes, d, units);
        return;
    }
#endif
    (void)k;
    decode_units(codes, d, units);
}

#endif
