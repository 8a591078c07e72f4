/* Codes as attention multiplies them. A "unit" is what a lane holds at a time: a float, or a pair of bfloat16 where the
 * processor multiplies pairs and what they are multiplied with fits in bfloat16. In which order units hold the codes of
 * a step is up to what is least work; what is multiplied with them, or summed up, is laid out to match. */
#ifndef FP8CPU_ATTENTION_UNITS_H
#define FP8CPU_ATTENTION_UNITS_H

#include "attention_elements.h"

INLINE int units_of(kind k) { return k.pairs ? 2 : 4; }

INLINE vf multiply_add(vf sum, vf a, vf b, kind k) {
#if defined(__AVX512BF16__)
    if (k.pairs) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)k;
    return sum + a * b;
}

/* sum + a * what p points to. With the few registers of AVX2, GCC would load it first, and spill sums. */
INLINE vf multiply_add_at(vf sum, vf a, const float *p, kind k) {
#if LANES == 8
    typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
    (void)k;
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "m"(*(const unaligned *)p));
    return sum;
#else
    return multiply_add(sum, a, load_floats(p), k);
#endif
}

/* The same pointer, hidden from the optimizer: what it points to is read again, as an operand, where it would otherwise
 * be kept, and registers run out. */
INLINE const float *optimizer_barrier(const float *p) {
    __asm__("" : "+r"(p));
    return p;
}

#endif
