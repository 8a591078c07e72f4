/* More than a few rows of x, where the processor multiplies tiles of bfloat16 (AMX). Weights are the left operand, as a
 * tile of 16 rows of w, 32 values each, needs no rearranging: a panel of PANEL_ROWS rows is decoded into the first-level
 * cache, and all of x runs over it. x, packed in pairs of rows, is the right one; sums come out transposed.
 *
 * Exact where x fits in bfloat16: then products of values are exact in float32. */
#ifndef FP8CPU_LINEAR_TILES_H
#define FP8CPU_LINEAR_TILES_H

#include "linear_epilogue.h"
#include "tiles.h"

enum {
    TILE_CODES = 64,       /* codes decoded at a time: they become rows of two tiles, "halves" */
    HALF = TILE_CODES / 2, /* values of a row of a tile */
    PANEL_ROWS = 2 * TILE_SIDE,
    PANEL_CODES = 512, /* along k in a panel, which is 32 KiB */
    PANEL_FLOATS = PANEL_ROWS * PANEL_CODES / 2,
    SCALED_CODES = 128, /* side of the blocks that may have a scale of their own: a panel's rows are in one of them */
    WORK_FLOATS = PANEL_FLOATS + 4 * TILE_FLOATS,
};

INLINE int64_t tile_blocks(const linear_job *job) { return divide_up(job->args->k, TILE_CODES); }
INLINE int64_t x_tiles(int64_t rows) { return divide_up(rows, TILE_SIDE); }

/* Floats of memory for `rows` packed rows of x, and those that a thread needs: outputs, sums, a panel, products. */
INLINE int64_t packed_tile_floats(int64_t rows, int64_t k) {
    return x_tiles(rows) * TILE_SIDE * divide_up(k, TILE_CODES) * HALF;
}
INLINE int64_t tile_scratch_floats(const linear_job *job, int64_t rows) {
    const int64_t row = tile_blocks(job) * TILE_CODES;
    const int64_t all = (2 * x_tiles(rows) * TILE_SIDE) * job->task_cols + WORK_FLOATS;
    return all > row ? all : row;
}

/* --- codes and floats to halves ------------------------------------------------------------------------------------
 * A half holds eight neighbours of every 16: the first eight in half 0, the others in half 1. */

#if defined(__AVX512VBMI__)
INLINE void decode_halves(const uint8_t *codes, int e5m2, uint16_t *first, uint16_t *second) {
    vi halves[2];
    bfloat16_of_halves(load_bits(codes), lookup_of(e5m2), halves);
    memcpy(first, halves, sizeof *halves);
    memcpy(second, halves + 1, sizeof *halves);
}

/* Upper halves of floats that fit in bfloat16. */
INLINE __m512i upper_halves(const float *x) {
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(x), 16));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(x + LANES), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

INLINE void pack_halves(const float *x, uint16_t *first, uint16_t *second) {
    const __m512i low = upper_halves(x), high = upper_halves(x + HALF);
    _mm512_storeu_si512(first, _mm512_shuffle_i64x2(low, high, 0x88));
    _mm512_storeu_si512(second, _mm512_shuffle_i64x2(low, high, 0xDD));
}
#else
INLINE int half_of(int i) { return i / 8 % 2; }
INLINE int place_in_half(int i) { return i / 16 * 8 + i % 8; }

INLINE uint16_t bfloat16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

INLINE void pack_halves(const float *x, uint16_t *first, uint16_t *second) {
    for (int i = 0; i < TILE_CODES; i++) (half_of(i) ? second : first)[place_in_half(i)] = bfloat16_of(x[i]);
}

INLINE void decode_halves(const uint8_t *codes, int e5m2, uint16_t *first, uint16_t *second) {
    float values[TILE_CODES];
    for (int i = 0; i < TILE_CODES; i++)
        values[i] = decode_any(splat_bits(codes[i] << 24), e5m2 ? E5M2 : E4M3)[0];
    pack_halves(values, first, second);
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

/* --- packing ------------------------------------------------------------------------------------------------------- */

/* [tile of 16 rows of x][half along k][pair][row of x][2]; rows behind the last are zeros. */
INLINE void pack_x_tile(const linear_job *job, kind k, int64_t tile, float *row) {
    const int64_t blocks = tile_blocks(job), read = job->steps * STEP, size = blocks * TILE_CODES;
    const int64_t first = tile * TILE_SIDE, height = smaller(TILE_SIDE, job->rows - first);
    float *x = job->x + tile * 2 * blocks * TILE_FLOATS, turned[TILE_FLOATS];
    for (int64_t m = 0; m < TILE_SIDE; m++) {
        if (m < height) read_row(job, k, first + m, row);
        if (m == 0) memset(row + read, 0, (size_t)(size - read) * sizeof *row);
        if (m == height) memset(row, 0, (size_t)size * sizeof *row);
        for (int64_t block = 0; block < blocks; block++) {
            float *half = x + 2 * block * TILE_FLOATS + m * TILE_SIDE;
            pack_halves(row + block * TILE_CODES, (uint16_t *)half, (uint16_t *)(half + TILE_FLOATS));
        }
    }
    for (int64_t half = 0; half < 2 * blocks; half++) {
        memcpy(turned, x + half * TILE_FLOATS, TILE_BYTES);
        transpose_tile(turned, x + half * TILE_FLOATS, TILE_SIDE, TILE_SIDE);
    }
}

/* PANEL_ROWS rows of w from n on, `blocks` blocks of codes from `block` on: [half along k][tile][row][HALF]. Rows behind
 * the last become zeros. */
INLINE void fill_tile_panel(const fp8cpu_linear_args *a, int e5m2, int64_t n, int64_t block, int64_t blocks,
                            uint16_t *panel) {
    const int64_t present = smaller(PANEL_ROWS, a->n - n), whole = smaller(blocks, a->k / TILE_CODES - block);
    for (int64_t r = 0; r < PANEL_ROWS; r++) {
        const uint8_t *codes = (const uint8_t *)a->w + (n + r) * a->k + block * TILE_CODES;
        uint16_t *to = panel + (r / TILE_SIDE * TILE_SIDE + r % TILE_SIDE) * HALF;
        for (int64_t b = 0; b < blocks; b++, codes += TILE_CODES, to += 2 * PANEL_ROWS * HALF) {
            uint8_t padded[TILE_CODES] = {0};
            if (r < present && b >= whole) memcpy(padded, codes, (size_t)(a->k - (block + b) * TILE_CODES));
            decode_halves(r < present && b < whole ? codes : padded, e5m2, to, to + PANEL_ROWS * HALF);
        }
    }
}

/* --- multiplying --------------------------------------------------------------------------------------------------- */

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

/* A panel times two tiles of x, or one where the second is NULL. sums: of [tile of x][tile of the panel], the tiles of the
 * panel `stride` floats apart. */
INLINE void multiply_panel(const uint16_t *panel, const float *left, const float *right, int64_t halves, int add,
                           float *sums, int64_t stride, next_panel next) {
    float *const at[4] = {sums, sums + stride, sums + TILE_FLOATS, sums + stride + TILE_FLOATS};
    if (add) {
        TILE_LOAD(0, at[0]);
        TILE_LOAD(1, at[1]);
        if (right) TILE_LOAD(2, at[2]);
        if (right) TILE_LOAD(3, at[3]);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (int64_t half = 0; half < halves; half++, panel += PANEL_ROWS * HALF) {
        TILE_LOAD(4, panel);
        TILE_LOAD(5, panel + TILE_SIDE * HALF);
        TILE_LOAD(6, left + half * TILE_FLOATS);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 5, 6);
        prefetch_part(next, half, halves);
        if (!right) continue;
        TILE_LOAD(7, right + half * TILE_FLOATS);
        TILE_DOT(2, 4, 7);
        TILE_DOT(3, 5, 7);
    }
    TILE_STORE(0, at[0]);
    TILE_STORE(1, at[1]);
    if (right) TILE_STORE(2, at[2]);
    if (right) TILE_STORE(3, at[3]);
}

/* The same where each SCALED_CODES codes have a scale: products are scaled before they are added up. */
INLINE void multiply_scaled_panel(const uint16_t *panel, const float *left, const float *right, int64_t halves, int add,
                                  float *sums, int64_t stride, next_panel next, const float *scales, float *products) {
    enum { HALVES = SCALED_CODES / HALF };
    for (int64_t half = 0; half < halves; half += HALVES, add = 1, scales++) {
        const float *x = left + half * TILE_FLOATS, *other = right ? right + half * TILE_FLOATS : NULL;
        multiply_panel(panel + half * PANEL_ROWS * HALF, x, other, smaller(HALVES, halves - half), 0, products,
                       2 * TILE_FLOATS, half ? (next_panel){NULL, 0} : next);
        for (int tile = 0; tile < (right ? 4 : 2); tile++) {
            float *sum = sums + tile % 2 * stride + tile / 2 * TILE_FLOATS;
            const float *product = products + tile % 2 * 2 * TILE_FLOATS + tile / 2 * TILE_FLOATS;
            for (int i = 0; i < TILE_FLOATS; i += LANES) {
                const vf scaled = load_floats(product + i) * *scales;
                store_floats(sum + i, add ? load_floats(sum + i) + scaled : scaled);
            }
        }
    }
}

INLINE void tile_task(const linear_job *job, kind k, int64_t task, int64_t thread) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t first = task * job->task_cols, cols = smaller(job->task_cols, a->n - first);
    const int64_t tiles = x_tiles(job->rows), blocks = tile_blocks(job), stride = tiles * TILE_FLOATS;
    float *out = job->scratch + thread * job->scratch_size, *sums = out + tiles * TILE_SIDE * job->task_cols;
    float *products = sums + tiles * TILE_SIDE * job->task_cols;
    uint16_t *panel = (uint16_t *)(products + 4 * TILE_FLOATS);
    tiles_begin();
    for (int64_t block = 0; block < blocks; block += PANEL_CODES / TILE_CODES) {
        const int64_t some = smaller(PANEL_CODES / TILE_CODES, blocks - block);
        for (int64_t col = 0; col < cols; col += PANEL_ROWS) {
            fill_tile_panel(a, k.e5m2, first + col, block, some, panel);
            const int more = col + PANEL_ROWS < cols && first + col + 2 * PANEL_ROWS <= a->n;
            const uint8_t *w = (const uint8_t *)a->w + (first + col + PANEL_ROWS) * a->k + block * TILE_CODES;
            for (int64_t tile = 0; tile < tiles; tile += 2) {
                const float *left = job->x + 2 * (tile * blocks + block) * TILE_FLOATS;
                const float *right = tile + 1 < tiles ? left + 2 * blocks * TILE_FLOATS : NULL;
                float *sum = sums + col / TILE_SIDE * stride + tile * TILE_FLOATS;
                const next_panel next = {more && !tile ? w : NULL, a->k};
                if (k.blocked)
                    multiply_scaled_panel(panel, left, right, 2 * some, block > 0, sum, stride, next,
                                          w_scales_from(a, first + col, block * TILE_CODES), products);
                else
                    multiply_panel(panel, left, right, 2 * some, block > 0, sum, stride, next);
            }
        }
    }
    tiles_end();
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t col = 0; col < cols; col += TILE_SIDE)
            transpose_tile(sums + col / TILE_SIDE * stride + tile * TILE_FLOATS,
                           out + tile * TILE_SIDE * job->task_cols + col, job->task_cols, TILE_SIDE);
    epilogue(job, k.blocked, out, job->task_cols, first, cols);
}

#endif
