/* Many rows of x: a packed GEMM. Panels of decoded weights, which stay in cache, times tiles of x, whose sums stay in
 * registers. */
#ifndef FP8CPU_LINEAR_PANEL_H
#define FP8CPU_LINEAR_PANEL_H

#include "linear_epilogue.h"
#include "linear_folding.h"
#include "linear_heights.h"

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

/* Scales of LANES rows of w, of which `present` are there, in both halves of a step. */
INLINE void scales_of_step(const fp8cpu_linear_args *a, int64_t n, int64_t step, int64_t present, vf *scales) {
    const int64_t first = step * STEP, second = smaller(first + STEP / 2, a->k - 1);
    scales[0] = scales[1] = splat(1);
    for (int r = 0; r < present; r++) {
        scales[0][r] = *w_scales_from(a, n + r, first);
        scales[1][r] = *w_scales_from(a, n + r, second);
    }
}

/* One step of LANES rows of w from n on, decoded into column `column` of a panel, [unit][TILE_COLS]. Rows behind the
 * last become zeros. */
INLINE void fill_panel_step(const linear_job *job, kind k, int64_t n, int64_t step, float *panel) {
    const fp8cpu_linear_args *a = job->args;
    const uint8_t *w = (const uint8_t *)a->w + n * a->k;
    const int64_t present = smaller(LANES, a->n - n);
    const int whole = (step + 1) * STEP <= a->k && present == LANES, units = units_of(k);
    const int scaled = k.blocked && !k.bf16, folded = k.bf16 && k.folded;
    vi rows[LANES];
    vf scales[2];
    if (whole) {
        UNROLL for (int r = 0; r < LANES; r++) rows[r] = load_bits(w + r * a->k + step * STEP);
    } else {
        for (int r = 0; r < LANES; r++) rows[r] = r < present ? load_step(w + r * a->k, step, a->k) : splat_bits(0);
    }
    if (scaled || folded) scales_of_step(a, n, step, present, scales);
    transpose(rows);
    UNROLL for (int group = 0; group < LANES; group++) {
        vf w[4];
        decode_columns(rows[group], k, w);
#if defined(__AVX512BW__)
        if (folded) UNROLL for (int i = 0; i < units; i++)
            w[i] = (vf)times_powers((__m512i)w[i], exponents_of(scales[2 * group / LANES]));
#endif
        UNROLL for (int i = 0; i < units; i++)
            store_floats(panel + (group * units + i) * TILE_COLS, scaled ? w[i] * scales[2 * group / LANES] : w[i]);
    }
}

/* Scales of what a microkernel multiplies: of TILE_COLS rows of w, and of its rows of x. */
typedef struct {
    const float *w, *x;
} tile_scales;

/* The microkernel: a tile of `height` rows of x (a constant) by TILE_COLS rows of w, over `count` units; scaled where
 * pairs are blocked, and added to sums where told. Meanwhile, the weights of the next panel are prefetched: TILE_COLS
 * rows from `next` on. */
INLINE void panel_microkernel(kind k, int height, const float *x, const float *panel, int64_t count, tile_scales scales,
                              int add, float *sums, int64_t stride, const uint8_t *next, int64_t row_size) {
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
    if (k.blocked) UNROLL for (int m = 0; m < height; m++) {
        tile[2 * m] *= load_floats(scales.w) * scales.x[m];
        tile[2 * m + 1] *= load_floats(scales.w + LANES) * scales.x[m];
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
                                               tile_scales scales, int add, float *sums, int64_t stride,          \
                                               const uint8_t *next, int64_t row_size) {                           \
        switch (height) { HEIGHTS(__VA_ARGS__) }                                                                  \
    }
#define HEIGHT(rows, ...) \
    case rows:                                                                                                    \
        panel_microkernel((kind)__VA_ARGS__, rows, x, panel, count, scales, add, sums, stride, next, row_size);   \
        break;
MICROKERNEL(multiply_floats, {0, 0, 0, 0})
#if defined(__AVX512BF16__)
MICROKERNEL(multiply_pairs, {1, 0, 0, 0})
MICROKERNEL(multiply_scaled_pairs, {1, 1, 0, 0})
#else
#define multiply_pairs multiply_floats
#define multiply_scaled_pairs multiply_floats
#endif

/* Scales of TILE_COLS rows of w from n on, for each group that is scaled of those in `count` units: [group][TILE_COLS]. */
static inline void scales_of_panel(const fp8cpu_linear_args *a, int64_t n, int64_t start, int64_t count, float *scales) {
    const int64_t group = product_group(a), end = smaller(codes_of(start + count, (kind){1, 1, 0, 0}), a->k);
    for (int64_t i = codes_of(start, (kind){1, 1, 0, 0}); i < end; i += group)
        for (int64_t col = 0; col < TILE_COLS; col++) *scales++ = *w_scales_from(a, smaller(n + col, a->n - 1), i);
}

/* `count` units of a panel, from `start` on along k, times tile `tile` of x: all at once, or a group of pairs at a time. */
INLINE void multiply_tile(const linear_job *job, kind k, int64_t tile, const float *panel, int64_t start, int64_t count,
                          const float *scales, float *sums, const uint8_t *next) {
    const int64_t row = part_start(job, tile, TILE_ROWS), height = part_start(job, tile + 1, TILE_ROWS) - row;
    const int64_t size = job->args->k;
    const float *x = job->x + start * job->rows + row * count;
    if (!(k.bf16 && k.blocked)) {
        (k.bf16 ? multiply_pairs : multiply_floats)(height, x, panel, count, (tile_scales){NULL, NULL}, start > 0, sums,
                                                    job->task_cols, next, size);
        return;
    }
    const int64_t group = product_group(job->args) / 2;
    tile_scales at = {scales, packed_scales(job, k) + start / group * job->rows + row};
    for (int64_t unit = 0; unit < count && codes_of(start + unit, k) < size; unit += group) {
        multiply_scaled_pairs(height, x + unit * height, panel + unit * TILE_COLS, smaller(group, count - unit), at,
                              start + unit > 0, sums, job->task_cols, next ? next + unit / PREFETCHES * size : NULL, size);
        at.w += TILE_COLS;
        at.x += job->rows;
    }
}

INLINE void panel_task(const linear_job *job, kind k, int64_t task, int64_t thread) {
    const int64_t first = task * job->task_cols, cols = smaller(job->task_cols, job->args->n - first);
    const int64_t tiles = parts_of(job, TILE_ROWS), all_units = job->steps * STEP / 4 * units_of(k);
    const int64_t step_units = LANES * units_of(k), row_size = job->args->k;
    const uint8_t *w = (const uint8_t *)job->args->w;
    float *panel = job->scratch + thread * job->scratch_size, *sums = panel + TILE_COLS * PANEL_UNITS;
    float scales[TILE_COLS * PANEL_UNITS / 16]; /* of pairs: there are 16 or more in a group */
    for (int64_t start = 0; start < all_units; start += PANEL_UNITS) {
        const int64_t count = smaller(PANEL_UNITS, all_units - start);
        for (int64_t col = 0; col < cols; col += TILE_COLS) {
            for (int64_t unit = 0; unit < count; unit += step_units)
                for (int64_t half = 0; half < TILE_COLS; half += LANES)
                    fill_panel_step(job, k, first + col + half, (start + unit) / step_units,
                                    panel + unit * TILE_COLS + half);
            const uint8_t *next = col + TILE_COLS < cols ? w + (first + col + TILE_COLS) * row_size + codes_of(start, k)
                                                         : w + first * row_size + codes_of(start + PANEL_UNITS, k);
            if (k.bf16 && k.blocked) scales_of_panel(job->args, first + col, start, count, scales);
            for (int64_t tile = 0; tile < tiles; tile++)
                multiply_tile(job, k, tile, panel, start, count, scales,
                              sums + part_start(job, tile, TILE_ROWS) * job->task_cols + col, tile ? NULL : next);
        }
    }
    epilogue(job, k.blocked || k.folded, sums, job->task_cols, first, cols);
}

#endif
