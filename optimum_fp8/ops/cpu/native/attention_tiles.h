/* Both products of attention where the processor multiplies tiles of bfloat16 (AMX), or pairs that tiles are made of, and
 * many rows of queries share a head of keys. Here "tile" is one of theirs; a range of positions is no more than TILE.
 *
 * 1. q k^T: keys are the left operand, as weights are of a linear layer (tile_panels.h), and queries, packed, the right.
 * 2. p v: weights are the left operand, and values the right, two positions at a time as pairs. A weight that does not
 *    fit in bfloat16 is several that add up to it: three hold all bits of a float. Or it is multiplied as a float, where
 *    that takes no longer. */
#ifndef FP8CPU_ATTENTION_TILES_H
#define FP8CPU_ATTENTION_TILES_H

#include "attention_scores.h"
#include "tile_panels.h"

enum {
    POSITION_HALVES = TILE / HALF,
    MOST_PARTS = 3, /* of a weight */
    WEIGHT_FLOATS = MOST_PARTS * POSITION_HALVES * PANEL_ROWS * HALF / 2, /* of PANEL_ROWS rows */
};

static const next_panel NO_NEXT_PANEL = {NULL, 0};

INLINE int64_t blocks_of(int64_t dim) { return divide_up(dim, TILE_CODES); }

/* Floats that a thread needs: a panel of keys and its products; or values, as they are and without Inf, and weights. */
INLINE int64_t tile_work_floats(const fp8cpu_attention_args *a) {
    const int64_t keys = PANEL_ROWS * blocks_of(a->key_dim) * TILE_CODES / 2 + 4 * TILE_FLOATS;
    const int64_t values = 2 * TILE * blocks_of(a->value_dim) * TILE_CODES / 2 + WEIGHT_FLOATS;
    return keys > values ? keys : values;
}

/* --- q k^T --------------------------------------------------------------------------------------------------------- */

/* A row of queries becomes a column of its tile: [batch, key_heads][tile of rows][half][pair][row][2]. The last row is
 * followed by zeros. */
INLINE void pack_query_column(const attention_job *job, int64_t number) {
    const int64_t row = number % job->rows, column = row % TILE_SIDE;
    float *to = job->q + (number / job->rows * job->row_room + row - column) * job->q_size + column;
    for (int64_t block = 0; block < blocks_of(job->args->key_dim); block++) {
        float values[TILE_CODES];
        uint16_t halves[2][HALF];
        for (int64_t i = 0; i < TILE_CODES; i += LANES)
            store_floats(values + i, query_values(job->args, number, block * TILE_CODES + i));
        pack_halves(values, 0, halves[0], halves[1]);
        for (int half = 0; half < 2; half++, to += TILE_FLOATS)
            for (int pair = 0; pair < TILE_SIDE; pair++) memcpy(to + pair * TILE_SIDE, halves[half] + 2 * pair, 4);
    }
    if (row + 1 < job->rows) return;
    to -= job->q_size * TILE_SIDE;
    for (int64_t behind = 1; behind < TILE_SIDE - column; behind++)
        for (int64_t i = 0; i < job->q_size; i++) to[i * TILE_SIDE + behind] = 0;
}

/* Products of the keys of a range with all rows of queries that share them. */
INLINE void dot_tiles(const attention_job *job, int e5m2, const key_range *keys, float *out, int64_t out_stride,
                      float *work) {
    const fp8cpu_attention_args *a = job->args;
    const int64_t blocks = blocks_of(a->key_dim), stride = a->k_stride[2];
    const uint8_t *codes = (const uint8_t *)a->k + offset_of(a->k_stride, keys->first);
    const float *q = job->q + keys->head * job->row_room * job->q_size;
    uint16_t *panel = (uint16_t *)work;
    float *products = work + PANEL_ROWS * blocks * TILE_CODES / 2;
    for (int64_t t = 0; t < keys->count; t += PANEL_ROWS) {
        const code_rows rows = {codes + t * stride, keys->count - t, a->key_dim, stride, job->k_prefetch};
        fill_tile_panel(rows, e5m2, 0, blocks, panel);
        for (int64_t row = 0; row < job->rows; row += 2 * TILE_SIDE) {
            const float *left = q + row * job->q_size, *right = left + TILE_SIDE * job->q_size;
            multiply_panel(panel, left, row + TILE_SIDE < job->rows ? right : NULL, 2 * blocks, 0, products,
                           2 * TILE_FLOATS, NO_NEXT_PANEL);
            for (int tile = 0; tile < 4; tile++) {
                const int64_t position = t + tile / 2 * TILE_SIDE, first = row + tile % 2 * TILE_SIDE;
                if (position < keys->count && first < job->rows)
                    transpose_tile(products + tile * TILE_FLOATS, out + first * out_stride + position, out_stride,
                                   smaller(TILE_SIDE, job->rows - first));
            }
        }
    }
}

/* --- p v ----------------------------------------------------------------------------------------------------------- */

/* How many bfloat16 a weight is. */
INLINE int64_t parts_of_weights(const fp8cpu_attention_args *a) {
    const int scaled = a->v_scale && a->v_scale_stride[2]; /* by what may be any float */
    if (scaled || (!a->p_scale && !a->rounds_probabilities) || (!a->p_scale && a->type == FP8CPU_FLOAT32)) return 3;
    return a->p_scale || a->type == FP8CPU_BFLOAT16 ? 1 : 2;
}

/* What is left of floats without their upper halves: nothing of NaN and Inf. */
INLINE void drop_upper_halves(float *x, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const vi bits = load_bits(x + i), upper = bits & (int32_t)0xFFFF0000;
        const vi finite = (bits & 0x7F800000) != 0x7F800000;
        store_floats(x + i, (vf)((vi)((vf)bits - (vf)upper) & finite));
    }
}

/* Up to PANEL_ROWS rows of weights of `count` positions: [part][half][tile][row][HALF]; zeros behind them. */
INLINE void pack_weights(attention_weights w, int64_t rows, int64_t count, int64_t parts, uint16_t *panel) {
    for (int64_t row = 0; row < PANEL_ROWS; row++) {
        uint16_t *to = panel + row * HALF;
        float left[TILE] = {0};
        if (row < rows) memcpy(left, w.p + row * w.stride, (size_t)count * sizeof *left);
        for (int64_t part = 0; part < parts; part++) {
            for (int half = 0; half < POSITION_HALVES; half++, to += PANEL_ROWS * HALF)
                store_upper_halves(left + half * HALF, to);
            if (part + 1 < parts) drop_upper_halves(left, TILE);
        }
    }
}

/* Values of a range as pairs of positions: [tile of columns][half][pair][column][2]; zeros behind them. */
INLINE void fill_values(const attention_job *job, int e5m2, const key_range *values, float *panel) {
    const fp8cpu_attention_args *a = job->args;
    const int64_t stride = a->v_stride[2], blocks = blocks_of(a->value_dim), each = POSITION_HALVES * TILE_FLOATS;
    const uint8_t *codes = (const uint8_t *)a->v + offset_of(a->v_stride, values->first);
    for (int64_t t = 0; t < TILE; t += 2, panel += TILE_SIDE)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t at = block * TILE_CODES, left = smaller(TILE_CODES, a->value_dim - at);
            uint8_t padded[2][TILE_CODES] = {{0}};
            const uint8_t *rows[2] = {padded[0], padded[1]};
            for (int i = 0; i < 2; i++) {
                const uint8_t *from = codes + (t + i) * stride + at;
                if (t + i >= values->count) continue;
                __builtin_prefetch(from + job->v_prefetch);
                if (left == TILE_CODES)
                    rows[i] = from;
                else
                    memcpy(padded[i], from, (size_t)left);
            }
            decode_row_pairs(rows[0], rows[1], e5m2, panel + block * TILE_CODES / TILE_SIDE * each, each);
        }
}

/* A copy of values with zeros for Inf and NaN; returns whether there are any. What a weight has beside its upper half is
 * often 0, which times Inf would be NaN; so only upper halves are multiplied with them. */
INLINE int copy_finite(const float *panel, int64_t floats, float *copy) {
    vi found = splat_bits(0);
    for (int64_t i = 0; i < floats; i += LANES) {
        const vi pairs = load_bits(panel + i);
        const vi low = (pairs & 0x7F80) == 0x7F80, high = (pairs & 0x7F800000) == 0x7F800000;
        const vi special = (low & 0xFFFF) | (high & (int32_t)0xFFFF0000), kept = pairs & ~special;
        memcpy(copy + i, &kept, sizeof kept);
        found |= special;
    }
    for (int lane = 0; lane < LANES; lane++)
        if (found[lane]) return 1;
    return 0;
}

INLINE void rescale_rows(const float *rescale, int64_t rows, int64_t v_size, float *acc) {
    for (int64_t row = 0; row < rows; row++) {
        if (rescale[row] == 1.0f) continue;
        float *to = acc + row / TILE_SIDE * TILE_SIDE * v_size + row % TILE_SIDE * TILE_SIDE;
        for (int64_t tile = 0; tile < v_size / TILE_SIDE; tile++, to += TILE_FLOATS)
            for (int i = 0; i < TILE_SIDE; i += LANES) store_floats(to + i, load_floats(to + i) * rescale[row]);
    }
}

#if defined(__AVX512BF16__)
/* TILE_SIDE rows of weights as floats times `pairs` pairs of values, added to a tile of sums; see multiply_tiles. */
static __attribute__((noinline)) void multiply_floats(const float *weights, const float *values, int64_t pairs,
                                                      float *sums) {
    vf kept[TILE_SIDE];
    UNROLL for (int row = 0; row < TILE_SIDE; row++) kept[row] = load_floats(sums + row * LANES);
    for (int64_t pair = 0; pair < pairs; pair++, weights += 2, values += LANES) {
        const vi both = load_bits(values);
        const vf even = (vf)(both << 16), odd = (vf)(both & (int32_t)0xFFFF0000);
        UNROLL for (int row = 0; row < TILE_SIDE; row++) kept[row] += weights[row * TILE] * even;
        UNROLL for (int row = 0; row < TILE_SIDE; row++) kept[row] += weights[row * TILE + 1] * odd;
    }
    UNROLL for (int row = 0; row < TILE_SIDE; row++) store_floats(sums + row * LANES, kept[row]);
}

/* Pairs of values times rows of weights as floats, which takes as long as it would with two parts of weights. */
INLINE void add_by_floats(const attention_job *job, const float *values, int64_t pairs, attention_weights w, float *acc) {
    for (int64_t row = 0; row < job->rows; row += TILE_SIDE, w.p += TILE_SIDE * w.stride, w.rescale += TILE_SIDE) {
        const float *from = values;
        float *sums = acc + row * job->v_size;
        rescale_rows(w.rescale, smaller(TILE_SIDE, job->rows - row), job->v_size, sums);
        for (int64_t column = 0; column < job->v_size; column += TILE_SIDE) {
            multiply_floats(w.p, from, pairs, sums);
            from += POSITION_HALVES * TILE_FLOATS;
            sums += TILE_FLOATS;
        }
    }
}
#endif

/* Values of a range times all rows of weights, added to accumulators: [tile of rows][tile of columns][row][column]. */
INLINE void add_tiles(const attention_job *job, int e5m2, const key_range *values, attention_weights w, float *acc,
                      float *work) {
    const int64_t columns = divide_up(job->args->value_dim, TILE_SIDE), each = POSITION_HALVES * TILE_FLOATS;
    const int64_t parts = parts_of_weights(job->args), stride = TILE_SIDE * job->v_size;
    const int64_t floats = TILE * blocks_of(job->args->value_dim) * TILE_CODES / 2;
    float *panel = work, *finite = panel + floats;
    uint16_t *weights = (uint16_t *)(finite + floats), *lower = weights + POSITION_HALVES * PANEL_ROWS * HALF;
    fill_values(job, e5m2, values, panel);
#if defined(__AVX512BF16__)
    if (parts > 1) {
        add_by_floats(job, panel, divide_up(values->count, 2), w, acc);
        return;
    }
#endif
    const int special = e5m2 && parts > 1 && copy_finite(panel, floats, finite);
    for (int64_t row = 0; row < job->rows; row += PANEL_ROWS, w.p += PANEL_ROWS * w.stride, w.rescale += PANEL_ROWS) {
        const int64_t left = smaller(PANEL_ROWS, job->rows - row);
        const int both = left > TILE_SIDE;
        rescale_rows(w.rescale, left, job->v_size, acc + row * job->v_size);
        pack_weights(w, left, values->count, parts, weights);
        for (int64_t column = 0; column < columns; column += 2) {
            const int64_t at = column * each, next = column + 1 < columns ? each : 0;
            float *sums = acc + row * job->v_size + column * TILE_FLOATS;
            multiply_panels(weights, special ? 1 : parts, both, panel + at, next ? panel + at + next : NULL,
                            POSITION_HALVES, 1, sums, stride, NO_NEXT_PANEL);
            if (special)
                multiply_panels(lower, parts - 1, both, finite + at, next ? finite + at + next : NULL, POSITION_HALVES,
                                1, sums, stride, NO_NEXT_PANEL);
        }
    }
}

#endif
