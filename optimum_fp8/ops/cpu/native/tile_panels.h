/* Rows of codes as panels of tiles, and their products with tiles of packed rows. A panel is the left operand: as a tile
 * of 16 rows, 32 values each, needs no rearranging, codes are decoded as they lie, into the first-level cache, and all
 * that is packed runs over them. What is packed, in pairs of rows, is the right one; sums come out transposed.
 *
 * Exact where what is packed fits in bfloat16: then products of values are exact in float32. */
#ifndef FP8CPU_TILE_PANELS_H
#define FP8CPU_TILE_PANELS_H

#include "tiles.h"
#include "transpose.h"
#include "units.h"

enum {
    TILE_CODES = 64,       /* codes decoded at a time: they become rows of two tiles, "halves" */
    HALF = TILE_CODES / 2, /* values of a row of a tile */
    PANEL_ROWS = 2 * TILE_SIDE,
};

/* --- codes and floats to halves ------------------------------------------------------------------------------------
 * A half holds eight neighbours of every 16, the first eight in half 0 and the others in half 1, which is least work; or,
 * where it has scales of its own, 32 neighbours: "in order". */

#if defined(__AVX512VBMI__)
INLINE void decode_halves(const uint8_t *codes, int e5m2, int in_order, uint16_t *first, uint16_t *second) {
    vi halves[2], loaded = load_bits(codes);
    if (in_order) loaded = (vi)_mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), (__m512i)loaded);
    bfloat16_of_halves(loaded, lookup_of(e5m2), halves);
    memcpy(first, halves, sizeof *halves);
    memcpy(second, halves + 1, sizeof *halves);
}

/* Upper halves of 32 floats. */
INLINE __m512i upper_halves(const float *x) {
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(x), 16));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(x + LANES), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
INLINE void store_upper_halves(const float *x, uint16_t *to) { _mm512_storeu_si512(to, upper_halves(x)); }

/* 64 floats that fit in bfloat16. */
INLINE void pack_halves(const float *x, int in_order, uint16_t *first, uint16_t *second) {
    const __m512i low = upper_halves(x), high = upper_halves(x + HALF);
    _mm512_storeu_si512(first, in_order ? low : _mm512_shuffle_i64x2(low, high, 0x88));
    _mm512_storeu_si512(second, in_order ? high : _mm512_shuffle_i64x2(low, high, 0xDD));
}

/* 64 codes of each of two rows, in pairs: [16 neighbours][one, other], for four tiles `stride` floats apart. Fours of
 * neighbours change places first, so that those of a tile, a quarter of each 16 bytes at the end, come from all of them. */
INLINE void decode_row_pairs(const uint8_t *one, const uint8_t *other, int e5m2, float *to, int64_t stride) {
    const __m512i fours = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i a = _mm512_permutexvar_epi32(fours, _mm512_loadu_si512(one));
    const __m512i b = _mm512_permutexvar_epi32(fours, _mm512_loadu_si512(other));
    vi pairs[4];
    bfloat16_of_halves((vi)_mm512_unpacklo_epi8(a, b), lookup_of(e5m2), pairs);
    bfloat16_of_halves((vi)_mm512_unpackhi_epi8(a, b), lookup_of(e5m2), pairs + 2);
    for (int i = 0; i < 4; i++) memcpy(to + i * stride, pairs + i, sizeof *pairs);
}
#else
INLINE int half_of(int i, int in_order) { return in_order ? i / HALF : i / 8 % 2; }
INLINE int place_in_half(int i, int in_order) { return in_order ? i % HALF : i / 16 * 8 + i % 8; }

INLINE uint16_t upper_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}
INLINE void store_upper_halves(const float *x, uint16_t *to) {
    for (int i = 0; i < HALF; i++) to[i] = upper_half(x[i]);
}

INLINE void pack_halves(const float *x, int in_order, uint16_t *first, uint16_t *second) {
    for (int i = 0; i < TILE_CODES; i++)
        (half_of(i, in_order) ? second : first)[place_in_half(i, in_order)] = upper_half(x[i]);
}

INLINE float value_of(uint8_t code, int e5m2) {
    return decode_any(splat_bits((int32_t)((uint32_t)code << 24)), e5m2 ? E5M2 : E4M3)[0];
}

INLINE void decode_halves(const uint8_t *codes, int e5m2, int in_order, uint16_t *first, uint16_t *second) {
    float values[TILE_CODES];
    for (int i = 0; i < TILE_CODES; i++) values[i] = value_of(codes[i], e5m2);
    pack_halves(values, in_order, first, second);
}

INLINE void decode_row_pairs(const uint8_t *one, const uint8_t *other, int e5m2, float *to, int64_t stride) {
    for (int i = 0; i < TILE_CODES; i++) {
        const uint16_t pair[2] = {upper_half(value_of(one[i], e5m2)), upper_half(value_of(other[i], e5m2))};
        memcpy(to + i / TILE_SIDE * stride + i % TILE_SIDE, pair, sizeof pair);
    }
}
#endif

/* 16 rows of 16 floats (or pairs), transposed into rows `stride` floats apart, of which `count` are wanted. */
INLINE void transpose_tile(const float *from, float *to, int64_t stride, int64_t count) {
#if LANES == TILE_SIDE
    vi rows[LANES];
    UNROLL for (int i = 0; i < LANES; i++) rows[i] = load_bits(from + i * TILE_SIDE);
    transpose(rows);
    for (int64_t i = 0; i < count; i++) memcpy(to + i * stride, rows + i, sizeof *rows);
#else
    for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < TILE_SIDE; j++) memcpy(to + i * stride + j, from + j * TILE_SIDE + i, sizeof *to);
#endif
}

/* --- panels -------------------------------------------------------------------------------------------------------- */

/* `count` rows of `size` codes, `stride` bytes apart; what lies `ahead` bytes further is prefetched, where that is not 0. */
typedef struct {
    const uint8_t *codes;
    int64_t count, size, stride, ahead;
} code_rows;

/* Up to PANEL_ROWS rows, `blocks` blocks of codes: [half along k][tile][row][HALF]. Rows behind the last become zeros. */
INLINE void fill_tile_panel(code_rows rows, int e5m2, int in_order, int64_t blocks, uint16_t *panel) {
    const int64_t present = smaller(PANEL_ROWS, rows.count), whole = smaller(blocks, rows.size / TILE_CODES);
    for (int64_t r = 0; r < PANEL_ROWS; r++) {
        const uint8_t *codes = rows.codes + r * rows.stride;
        uint16_t *to = panel + r * HALF;
        for (int64_t b = 0; b < blocks; b++, codes += TILE_CODES, to += 2 * PANEL_ROWS * HALF) {
            uint8_t padded[TILE_CODES] = {0};
            if (r < present && b >= whole) memcpy(padded, codes, (size_t)(rows.size - b * TILE_CODES));
            if (r < present && rows.ahead) __builtin_prefetch(codes + rows.ahead);
            decode_halves(r < present && b < whole ? codes : padded, e5m2, in_order, to, to + PANEL_ROWS * HALF);
        }
    }
}

/* The next panel's codes: `rows` rows, `size` bytes apart. */
typedef struct {
    const uint8_t *codes;
    int64_t size;
} next_panel;

INLINE void prefetch_part(next_panel next, int64_t half, int64_t halves) {
    if (!next.codes) return;
    const int64_t from = half * PANEL_ROWS / halves, to = (half + 1) * PANEL_ROWS / halves;
    for (int64_t row = from; row < to; row++)
        for (int64_t at = 0; at < halves * HALF; at += 64) __builtin_prefetch(next.codes + row * next.size + at);
}

/* A panel, of two tiles or of the first of them, times two packed tiles, or one where the second is NULL. The panel may
 * be several, one behind the other, whose products are added up. sums: of [packed tile][tile of the panel], the tiles of
 * the panel `stride` floats apart. */
INLINE void multiply_panels(const uint16_t *panel, int64_t panels, int both, const float *left, const float *right,
                            int64_t halves, int add, float *sums, int64_t stride, next_panel next) {
#if defined(__AVX512BF16__)
    for (int tile = 0; tile < (right ? 2 : 1); tile++)
        for (int of_panel = 0; of_panel < (both ? 2 : 1); of_panel++)
            for (int64_t each = 0; each < panels; each++)
                multiply_tiles(panel + each * halves * PANEL_ROWS * HALF + of_panel * TILE_SIDE * HALF, PANEL_ROWS * HALF,
                               tile ? right : left, halves, add || each, sums + of_panel * stride + tile * TILE_FLOATS);
    prefetch_part(next, 0, 1);
#else
    float *const at[4] = {sums, sums + stride, sums + TILE_FLOATS, sums + stride + TILE_FLOATS};
    if (add) {
        TILE_LOAD(0, at[0]);
        if (both) TILE_LOAD(1, at[1]);
        if (right) TILE_LOAD(2, at[2]);
        if (both && right) TILE_LOAD(3, at[3]);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (int64_t each = 0; each < panels; each++)
        for (int64_t half = 0; half < halves; half++, panel += PANEL_ROWS * HALF) {
            TILE_LOAD(4, panel);
            if (both) TILE_LOAD(5, panel + TILE_SIDE * HALF);
            TILE_LOAD(6, left + half * TILE_FLOATS);
            TILE_DOT(0, 4, 6);
            if (both) TILE_DOT(1, 5, 6);
            prefetch_part(next, half, halves);
            if (!right) continue;
            TILE_LOAD(7, right + half * TILE_FLOATS);
            TILE_DOT(2, 4, 7);
            if (both) TILE_DOT(3, 5, 7);
        }
    TILE_STORE(0, at[0]);
    if (both) TILE_STORE(1, at[1]);
    if (right) TILE_STORE(2, at[2]);
    if (both && right) TILE_STORE(3, at[3]);
#endif
}

INLINE void multiply_panel(const uint16_t *panel, const float *left, const float *right, int64_t halves, int add,
                           float *sums, int64_t stride, next_panel next) {
    multiply_panels(panel, 1, 1, left, right, halves, add, sums, stride, next);
}

#endif
