/* Codes in steps of 4 LANES: the four bytes of lane l are codes 4 l ... 4 l + 3, and byte i of all lanes becomes a vector
 * without moving anything between lanes; what is multiplied with them is laid out to match. */
#ifndef FP8CPU_UNITS_H
#define FP8CPU_UNITS_H

#include <stdlib.h>

#include "lookup.h"

enum { STEP = 4 * LANES };

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline void *aligned(int64_t floats) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, (size_t)(floats > 0 ? floats : 1) * sizeof(float)) ? NULL : memory;
}

INLINE vi load_step(const uint8_t *row, int64_t step, int64_t size) {
    const int64_t at = step * STEP;
    if (at + STEP <= size) return load_bits(row + at);
    uint8_t padded[STEP] = {0};
    memcpy(padded, row + at, (size_t)(size - at));
    return load_bits(padded);
}

/* units[i] holds the values of byte i of every lane. */
INLINE void decode_units(vi codes, int e5m2, vf *units) {
#if defined(__AVX512VBMI__)
    const vi low = bfloat16_of_even_bytes(codes, e5m2), high = bfloat16_of_odd_bytes(codes, e5m2);
    units[0] = (vf)(low << 16);
    units[1] = (vf)(high << 16);
    units[2] = (vf)(low & (int32_t)0xFFFF0000);
    units[3] = (vf)(high & (int32_t)0xFFFF0000);
#else
    const fp8_format format = e5m2 ? E5M2 : E4M3;
    const int exceptional = any_exceptional(codes, format);
    UNROLL for (int i = 0; i < 4; i++) {
        const vi on_top = (vi)((vu)codes << (24 - 8 * i));
        units[i] = __builtin_expect(exceptional, 0) ? decode_any(on_top, format) : decode_normal(on_top, format);
    }
#endif
}

#endif
