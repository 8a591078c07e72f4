/* More than a few rows of x, where the processor multiplies tiles of bfloat16 (AMX): a panel of PANEL_ROWS rows of w is
 * decoded into the first-level cache, and all of x, packed, runs over it. */
#ifndef FP8CPU_LINEAR_TILES_H
#define FP8CPU_LINEAR_TILES_H

#include "linear_epilogue.h"
#include "linear_folding.h"
#include "tile_panels.h"

enum {
    PANEL_CODES = 512, /* along k in a panel, which is 32 KiB */
    PANEL_FLOATS = PANEL_ROWS * PANEL_CODES / 2,
    SCALE_FLOATS = PANEL_ROWS * PANEL_CODES / HALF, /* scales of a panel, where they change along k, at most */
    WORK_FLOATS = PANEL_FLOATS + SCALE_FLOATS + 4 * TILE_FLOATS,
};

INLINE int64_t tile_blocks(const linear_job *job) { return divide_up(job->args->k, TILE_CODES); }
INLINE int64_t x_tiles(int64_t rows) { return divide_up(rows, TILE_SIDE); }

/* Codes whose products share a scale, as far as a panel goes; halves are in order where there are no more in one. */
INLINE int64_t scaled_codes(const fp8cpu_linear_args *a) { return smaller(product_group(a), PANEL_CODES); }
INLINE int halves_in_order(const fp8cpu_linear_args *a, kind k) {
    return (k.blocked || k.folded) && product_group(a) < TILE_CODES;
}

/* Floats of `rows` packed rows of x, of their scales behind them, and of what a thread needs: outputs, sums, work. */
INLINE int64_t packed_values(const linear_job *job) {
    return x_tiles(job->rows) * TILE_SIDE * tile_blocks(job) * HALF;
}
INLINE int64_t packed_tile_floats(const linear_job *job) {
    if (!job->args->x_group) return packed_values(job);
    const int64_t groups = divide_up(tile_blocks(job) * TILE_CODES, scaled_codes(job->args));
    return packed_values(job) + groups * x_tiles(job->rows) * TILE_SIDE;
}
INLINE int64_t tile_scratch_floats(const linear_job *job, int64_t rows) {
    const int64_t row = tile_blocks(job) * TILE_CODES;
    const int64_t all = (2 * x_tiles(rows) * TILE_SIDE) * job->task_cols + WORK_FLOATS;
    return all > row ? all : row;
}

/* --- packing ------------------------------------------------------------------------------------------------------- */

/* Scales of a tile of x, [group along k][row of x]; those of rows behind the last are zeros. */
INLINE void pack_x_scales(const linear_job *job, int64_t first, int64_t height) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t group = scaled_codes(a), rows = x_tiles(job->rows) * TILE_SIDE;
    float *scales = job->x + packed_values(job) + first;
    for (int64_t i = 0; i < tile_blocks(job) * TILE_CODES; i += group, scales += rows)
        for (int64_t m = 0; m < TILE_SIDE; m++)
            scales[m] = m < height ? *x_scales_from(a, x_row(job, first + m), smaller(i, a->k - 1)) : 0.0f;
}

/* [tile of 16 rows of x][half along k][pair][row of x][2]; rows behind the last are zeros. */
INLINE void pack_x_tile(const linear_job *job, kind k, int64_t tile, float *row) {
    const int64_t blocks = tile_blocks(job), read = job->steps * STEP, size = blocks * TILE_CODES;
    const int64_t first = tile * TILE_SIDE, height = smaller(TILE_SIDE, job->rows - first);
    const int in_order = halves_in_order(job->args, k);
    const kind of_rows = {1, k.blocked, k.e5m2, k.folded}; /* as pairs are: scales are multiplied in later, or folded */
    float *x = job->x + tile * 2 * blocks * TILE_FLOATS, turned[TILE_FLOATS];
    if (k.blocked && job->args->x_group) pack_x_scales(job, first, height);
    for (int64_t m = 0; m < TILE_SIDE; m++) {
        if (m < height) read_row(job, of_rows, first + m, row);
        if (m == 0) memset(row + read, 0, (size_t)(size - read) * sizeof *row);
        if (m == height) memset(row, 0, (size_t)size * sizeof *row);
        for (int64_t block = 0; block < blocks; block++) {
            float *half = x + 2 * block * TILE_FLOATS + m * TILE_SIDE;
            pack_halves(row + block * TILE_CODES, in_order, (uint16_t *)half, (uint16_t *)(half + TILE_FLOATS));
        }
    }
    for (int64_t half = 0; half < 2 * blocks; half++) {
        memcpy(turned, x + half * TILE_FLOATS, TILE_BYTES);
        transpose_tile(turned, x + half * TILE_FLOATS, TILE_SIDE, TILE_SIDE);
    }
}

/* Scales of a panel of w from row n and column k on, [group along k][row of w]. */
INLINE void scales_of_tile_panel(const fp8cpu_linear_args *a, int64_t n, int64_t k, int64_t codes, float *scales) {
    for (int64_t i = k; i < k + codes; i += scaled_codes(a))
        for (int64_t r = 0; r < PANEL_ROWS; r++)
            *scales++ = *w_scales_from(a, smaller(n + r, a->n - 1), smaller(i, a->k - 1));
}

#if defined(__AVX512VBMI__)
INLINE void scale_half(uint16_t *half, float scale) {
    _mm512_storeu_si512(half, times_powers(_mm512_loadu_si512(half), exponents_of(splat(scale))));
}
#else
INLINE void scale_half(uint16_t *half, float scale) {
    for (int i = 0; i < HALF; i++) half[i] = upper_half(bfloat16_value(half[i]) * scale);
}
#endif

/* Scales of a panel, [group along k][row of w], folded into it. */
INLINE void fold_into_panel(const float *scales, int64_t codes, int64_t halves, uint16_t *panel) {
    for (int64_t half = 0; half < halves; half++)
        for (int64_t r = 0; r < PANEL_ROWS; r++, panel += HALF)
            scale_half(panel, scales[half * HALF / codes * PANEL_ROWS + r]);
}

/* --- multiplying --------------------------------------------------------------------------------------------------- */

/* What the products of each `codes` codes are multiplied with: scales of the rows of a panel, and those of a tile of x,
 * of groups `x_stride` floats apart, or NULL. */
typedef struct {
    const float *w, *x;
    int64_t codes, x_stride;
} panel_scales;

/* A tile of products, [row of w][row of x], times scales, to a tile of sums. */
INLINE void add_scaled(const float *product, const float *w, const float *x, int add, float *sum) {
    for (int at = 0; at < TILE_SIDE; at += LANES) {
        const vf of_x = x ? load_floats(x + at) : splat(1);
        for (int row = 0; row < TILE_SIDE; row++) {
            const vf scaled = load_floats(product + row * TILE_SIDE + at) * (of_x * w[row]);
            float *to = sum + row * TILE_SIDE + at;
            store_floats(to, add ? load_floats(to) + scaled : scaled);
        }
    }
}

/* multiply_panel where scales change along k: the products of each group are scaled before they are added up. */
INLINE void multiply_scaled_panel(const uint16_t *panel, const float *left, const float *right, int64_t halves, int add,
                                  float *sums, int64_t stride, next_panel next, panel_scales s, float *products) {
    const int64_t each = s.codes / HALF;
    for (int64_t half = 0; half < halves; half += each, add = 1) {
        const float *x = left + half * TILE_FLOATS, *other = right ? right + half * TILE_FLOATS : NULL;
        multiply_panel(panel + half * PANEL_ROWS * HALF, x, other, smaller(each, halves - half), 0, products,
                       2 * TILE_FLOATS, half ? (next_panel){NULL, 0} : next);
        for (int tile = 0; tile < (right ? 4 : 2); tile++)
            add_scaled(products + tile % 2 * 2 * TILE_FLOATS + tile / 2 * TILE_FLOATS, s.w + tile % 2 * TILE_SIDE,
                       s.x ? s.x + tile / 2 * TILE_SIDE : NULL, add,
                       sums + tile % 2 * stride + tile / 2 * TILE_FLOATS);
        s.w += PANEL_ROWS;
        if (s.x) s.x += s.x_stride;
    }
}

/* All of x over a panel of `some` blocks from `block` on, of rows from n on. */
INLINE void multiply_all(const linear_job *job, kind k, uint16_t *panel, int64_t n, int64_t block, int64_t some,
                         float *sums, next_panel next, float *products, float *scales) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t tiles = x_tiles(job->rows), blocks = tile_blocks(job), stride = tiles * TILE_FLOATS;
    panel_scales s = {scales, NULL, TILE_CODES, tiles * TILE_SIDE};
    if (k.blocked || k.folded) {
        s.codes = scaled_codes(a);
        scales_of_tile_panel(a, n, block * TILE_CODES, some * TILE_CODES, scales);
        if (k.folded) fold_into_panel(scales, s.codes, 2 * some, panel);
        if (k.blocked && a->x_group) s.x = job->x + packed_values(job) + block * TILE_CODES / s.codes * s.x_stride;
    }
    for (int64_t tile = 0; tile < tiles; tile += 2, next.codes = NULL) {
        const float *left = job->x + 2 * (tile * blocks + block) * TILE_FLOATS;
        const float *right = tile + 1 < tiles ? left + 2 * blocks * TILE_FLOATS : NULL;
        float *sum = sums + tile * TILE_FLOATS;
        if (k.blocked)
            multiply_scaled_panel(panel, left, right, 2 * some, block > 0, sum, stride, next, s, products);
        else
            multiply_panel(panel, left, right, 2 * some, block > 0, sum, stride, next);
        if (s.x) s.x += 2 * TILE_SIDE;
    }
}

INLINE void tile_task(const linear_job *job, kind k, int64_t task, int64_t thread) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t first = task * job->task_cols, cols = smaller(job->task_cols, a->n - first);
    const int64_t tiles = x_tiles(job->rows), blocks = tile_blocks(job), stride = tiles * TILE_FLOATS;
    float *out = job->scratch + thread * job->scratch_size, *sums = out + tiles * TILE_SIDE * job->task_cols;
    float *products = sums + tiles * TILE_SIDE * job->task_cols, *scales = products + 4 * TILE_FLOATS;
    uint16_t *panel = (uint16_t *)(scales + SCALE_FLOATS);
    tiles_begin();
    for (int64_t block = 0; block < blocks; block += PANEL_CODES / TILE_CODES) {
        const int64_t some = smaller(PANEL_CODES / TILE_CODES, blocks - block), at = block * TILE_CODES;
        for (int64_t col = 0; col < cols; col += PANEL_ROWS) {
            const uint8_t *w = (const uint8_t *)a->w + (first + col) * a->k + at;
            const code_rows rows = {w, a->n - first - col, a->k - at, a->k, 0};
            fill_tile_panel(rows, k.e5m2, halves_in_order(a, k), some, panel);
            const int more = col + PANEL_ROWS < cols && first + col + 2 * PANEL_ROWS <= a->n;
            const next_panel next = {more ? w + PANEL_ROWS * a->k : NULL, a->k};
            multiply_all(job, k, panel, first + col, block, some, sums + col / TILE_SIDE * stride, next, products, scales);
        }
    }
    tiles_end();
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t col = 0; col < cols; col += TILE_SIDE)
            transpose_tile(sums + col / TILE_SIDE * stride + tile * TILE_FLOATS,
                           out + tile * TILE_SIDE * job->task_cols + col, job->task_cols, TILE_SIDE);
    epilogue(job, k.blocked || k.folded, out, job->task_cols, first, cols);
}

#endif
