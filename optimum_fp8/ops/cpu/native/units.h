/* Codes in steps of 4 LANES, which become four vectors of floats, or two of pairs of bfloat16. None moves farther than is
 * cheap, within its lane or its 16 bytes: what is multiplied with them is laid out to match. */
#ifndef FP8CPU_UNITS_H
#define FP8CPU_UNITS_H

#include <stdlib.h>

#include "lookup.h"

enum { STEP = 4 * LANES };

/* Whether products of tiles are compiled: AMX's, or the same in plain C; and in attention, by pairs of bfloat16. */
#if defined(__AMX_BF16__) || defined(FP8CPU_PLAIN_TILES)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif
#if HAS_TILES || defined(__AVX512BF16__)
#define ATTENDS_ON_TILES 1
#endif

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
INLINE void decode_bytes(vi codes, int e5m2, vf *units) {
#if HAS_LOOKUP
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

/* The values of a step in whichever order is least work. Pair u is made of floats u and u + 2. */
#if HAS_LOOKUP
typedef lookup decoder;
INLINE decoder decoder_of(int e5m2) { return lookup_of(e5m2); }

INLINE void decode_pairs(vi codes, decoder d, vf *pairs) {
    vi halves[2];
    bfloat16_of_halves(codes, d, halves);
    UNROLL for (int i = 0; i < 2; i++) pairs[i] = (vf)halves[i];
}

INLINE void decode_units(vi codes, decoder d, vf *units) {
    vf pairs[2];
    decode_pairs(codes, d, pairs);
    UNROLL for (int i = 0; i < 2; i++) units[i] = (vf)((vi)pairs[i] << 16);
    UNROLL for (int i = 0; i < 2; i++) units[i + 2] = (vf)((vi)pairs[i] & (int32_t)0xFFFF0000);
}

/* The code that lane `lane` of float unit `unit` holds. */
INLINE int code_of(int unit, int lane) { return lane / 4 * 16 + unit % 2 * 8 + lane % 4 * 2 + unit / 2; }
#else
typedef int decoder;
INLINE decoder decoder_of(int e5m2) { return e5m2; }
INLINE void decode_units(vi codes, decoder e5m2, vf *units) { decode_bytes(codes, e5m2, units); }
INLINE int code_of(int unit, int lane) { return 4 * lane + unit; }
#endif

#endif
