/* Many rows of x: a packed GEMM. Panels of decoded weights, which stay in cache, times tiles of x, whose sums stay in
 * registers. */
#ifndef FP8CPU_LINEAR_PANEL_H
#define FP8CPU_LINEAR_PANEL_H

#include "linear_epilogue.h"

/* units[i] holds byte i of every lane, or the pair of bytes i and i + 2. */
INLINE void decode_columns(vi codes, kind k, vf *units) {
#if defined(__AVX512VBMI__)
    if (k.bf16) {
        units[0] = (vf)bfloat16_of_even_bytes(codes, k.e5m2);
        units[1] = (vf)bfloat16_of_odd_bytes(codes, k.e5m2);
        return;
    }
#endif
    decode_bytes(codes, k.e5m2, units);
}

/* One step of LANES rows of w from n on, decoded into column `column` of a panel, [unit][TILE_COLS]. Rows behind the
 * last become zeros. */
INLINE void fill_panel_step(const linear_job *job, kind k, int64_t n, int64_t step, float *panel) {
    const fp8cpu_linear_args *a = job->args;
    const uint8_t *w = (const uint8_t *)a->w + n * a->k;
    const int64_t present = smaller(LANES, a->n - n);
    const int whole = (step + 1) * STEP <= a->k && present == LANES, units = units_of(k);
    vi rows[LANES];
    vf scale = splat(1);
    if (whole) {
        UNROLL for (int r = 0; r < LANES; r++) rows[r] = load_bits(w + r * a->k + step * STEP);
    } else {
        for (int r = 0; r < LANES; r++) rows[r] = r < present ? load_step(w + r * a->k, step, a->k) : splat_bits(0);
    }
    if (k.blocked)
        for (int r = 0; r < present; r++) scale[r] = block_scale(a, n + r, step * STEP);
    transpose(rows);
    UNROLL for (int group = 0; group < LANES; group++) {
        vf w[4];
        decode_columns(rows[group], k, w);
        UNROLL for (int i = 0; i < units; i++)
            store_floats(panel + (group * units + i) * TILE_COLS, k.blocked ? w[i] * scale : w[i]);
    }
}

/* The microkernel: a tile of `height` rows of x (a constant) by TILE_COLS rows of w, over `count` units; added to sums
 * where told. Meanwhile, the weights of the next panel are prefetched: TILE_COLS rows from `next` on. */
INLINE void panel_microkernel(kind k, int height, const float *x, const float *panel, int64_t count, int add,
                              float *sums, int64_t stride, const uint8_t *next, int64_t row_size) {
    vf tile[2 * TILE_ROWS];
    UNROLL for (int m = 0; m < 2 * height; m++) tile[m] = splat(0);
    for (int64_t unit = 0; unit < count; unit++, x += height, panel += TILE_COLS) {
        const vf left = load_floats(panel), right = load_floats(panel + LANES);
        if (next) __builtin_prefetch(next + unit / PREFETCHES * row_size + codes_of(unit % PREFETCHES, k) * TILE_COLS);
        UNROLL for (int m = 0; m < height; m++) {
            const vf values = splat(x[m]);
            tile[2 * m] = multiply_add(tile[2 * m], values, left, k);
            tile[2 * m + 1] = multiply_add(tile[2 * m + 1], values, right, k);
        }
    }
    UNROLL for (int m = 0; m < height; m++) {
        float *row = sums + m * stride;
        store_floats(row, add ? load_floats(row) + tile[2 * m] : tile[2 * m]);
        store_floats(row + LANES, add ? load_floats(row + LANES) + tile[2 * m + 1] : tile[2 * m + 1]);
    }
}

/* Never inlined: what else is in registers around it, above all the tables of a decoder, would crowd out sums. */
#define MICROKERNEL(name, ...)                                                                                    \
    static __attribute__((noinline)) void name(int64_t height, const float *x, const float *panel, int64_t count, \
                                               int add, float *sums, int64_t stride, const uint8_t *next,         \
                                               int64_t row_size) {                                                \
        switch (height) { HEIGHTS(__VA_ARGS__) }                                                                  \
    }
#define HEIGHT(rows, ...) \
    case rows: panel_microkernel((kind)__VA_ARGS__, rows, x, panel, count, add, sums, stride, next, row_size); break;
#define HEIGHTS_TO_6(...)                                                                                             \
    HEIGHT(1, __VA_ARGS__) HEIGHT(2, __VA_ARGS__) HEIGHT(3, __VA_ARGS__) HEIGHT(4, __VA_ARGS__)                       \
    HEIGHT(5, __VA_ARGS__) HEIGHT(6, __VA_ARGS__)
#if LANES == 16
#define HEIGHTS(...)                                                                                                  \
    HEIGHTS_TO_6(__VA_ARGS__) HEIGHT(7, __VA_ARGS__) HEIGHT(8, __VA_ARGS__) HEIGHT(9, __VA_ARGS__)                    \
    HEIGHT(10, __VA_ARGS__) HEIGHT(11, __VA_ARGS__) HEIGHT(12, __VA_ARGS__)
#else
#define HEIGHTS HEIGHTS_TO_6
#endif
MICROKERNEL(multiply_floats, {0, 0, 0})
#if defined(__AVX512BF16__)
MICROKERNEL(multiply_pairs, {1, 0, 0})
#else
#define multiply_pairs multiply_floats
#endif

INLINE void panel_task(const linear_job *job, kind k, int64_t task, int64_t thread) {
    const int64_t first = task * job->task_cols, cols = smaller(job->task_cols, job->args->n - first);
    const int64_t tiles = parts_of(job, TILE_ROWS), all_units = job->steps * STEP / 4 * units_of(k);
    const int64_t step_units = LANES * units_of(k), row_size = job->args->k;
    const uint8_t *w = (const uint8_t *)job->args->w;
    float *panel = job->scratch + thread * job->scratch_size, *sums = panel + TILE_COLS * PANEL_UNITS;
    for (int64_t start = 0; start < all_units; start += PANEL_UNITS) {
        const int64_t count = smaller(PANEL_UNITS, all_units - start);
        for (int64_t col = 0; col < cols; col += TILE_COLS) {
            for (int64_t unit = 0; unit < count; unit += step_units)
                for (int64_t half = 0; half < TILE_COLS; half += LANES)
                    fill_panel_step(job, k, first + col + half, (start + unit) / step_units,
                                    panel + unit * TILE_COLS + half);
            const uint8_t *next = col + TILE_COLS < cols ? w + (first + col + TILE_COLS) * row_size + codes_of(start, k)
                                                         : w + first * row_size + codes_of(start + PANEL_UNITS, k);
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t row = part_start(job, tile, TILE_ROWS), height = part_start(job, tile + 1, TILE_ROWS) - row;
                (k.bf16 ? multiply_pairs : multiply_floats)(
                    height, job->x + start * job->rows + row * count, panel, count, start > 0,
                    sums + row * job->task_cols + col, job->task_cols, tile ? NULL : next, row_size);
            }
        }
    }
    epilogue(job, k.blocked, sums, job->task_cols, first, cols);
}

#endif
