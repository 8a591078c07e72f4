/* Products of queries and keys, q k^T: dot products of rows of queries with rows of keys. */
#ifndef FP8CPU_ATTENTION_SCORES_H
#define FP8CPU_ATTENTION_SCORES_H

#include "attention_job.h"
#include "attention_units.h"
#include "lanes.h"

enum {
    KEY_ROWS = LANES == 16 ? 4 : 2, /* rows of keys, and */
    QUERY_ROWS = 4,                 /* rows of queries whose dot products are in registers at a time */
    KEY_BLOCKS = LANES / KEY_ROWS,  /* so that products of LANES rows of keys become a vector */
};

INLINE int queries_fit_bfloat16(const fp8cpu_attention_args *a) { return a->q_scale || a->type == FP8CPU_BFLOAT16; }

INLINE int uses_bf16_pairs(const fp8cpu_attention_args *a) {
#if defined(__AVX512BF16__)
    return queries_fit_bfloat16(a);
#else
    (void)a;
    return 0;
#endif
}

/* LANES columns of a row of queries, on the FP8 grid where it has a scale; zeros behind the last. */
INLINE vf query_values(const fp8cpu_attention_args *a, int64_t number, int64_t column) {
    const index3 at = index_of_row(a, number);
    const char *q = (const char *)a->q + (offset_of(a->q_stride, at) + column) * value_size(a->type);
    const int64_t left = a->key_dim - column;
    const vf x = left > 0 ? load_up_to(q, a->type, left) : splat(0);
    if (!a->q_scale) return x;
    return to_grid(x * (1.0f / scale_at(a->q_scale, a->q_scale_stride, at)), (float)a->full_scale, format_of(a->format));
}

/* Packs a row of queries in the order of units. Rows that share their keys lie side by side:
 * [batch, key_heads][step][unit][row][lane]. */
static void pack_query(const attention_job *job, int64_t number) {
    const fp8cpu_attention_args *a = job->args;
    const int pairs = uses_bf16_pairs(a), units = pairs ? 2 : 4;
    float *out = job->q + number / job->rows * job->rows * job->q_size + number % job->rows * LANES;
    for (int64_t step = 0; step < a->key_dim; step += STEP) {
        uint32_t values[STEP];
        for (int64_t i = 0; i < STEP; i += LANES) {
            const vf x = query_values(a, number, step + i);
            memcpy(values + i, &x, sizeof x);
        }
        for (int i = 0; i < units; i++, out += job->rows * LANES)
            for (int lane = 0; lane < LANES; lane++) {
                uint32_t unit = values[element_of(i, lane)];
                if (pairs) unit = unit >> 16 | (values[element_of(i + 2, lane)] & 0xFFFF0000);
                memcpy(out + lane, &unit, sizeof unit);
            }
    }
}

/* A step of KEY_ROWS rows of keys, of which `left` codes are there, times `q_rows` rows of queries. */
INLINE void dot_step(const attention_job *job, kind k, decoder d, int q_rows, const element **row, int64_t at,
                     int64_t left, const float *q, vf *sums) {
    vf unit[4];
    UNROLL for (int r = 0; r < KEY_ROWS; r++) {
        prefetch_step(row[r] + job->k_prefetch + at);
        load_units(row[r] + at, left, k, d, unit);
        const float *from = optimizer_barrier(q);
        UNROLL for (int i = 0; i < units_of(k); i++, from += job->rows * LANES) UNROLL for (int c = 0; c < q_rows; c++)
            sums[r * q_rows + c] = multiply_add_at(sums[r * q_rows + c], unit[i], from + c * LANES, k);
    }
}

/* The microkernel: LANES rows of keys, of which `count` are there, times `q_rows` rows of queries. */
INLINE void dot_microkernel(const attention_job *job, kind k, int q_rows, const element *keys, int64_t count,
                            const float *q, float *out, int64_t out_stride) {
    const int64_t dim = job->args->key_dim, stride = job->args->k_stride[2], q_step = units_of(k) * job->rows * LANES;
    const decoder d = decoder_for(k);
    vf blocks[QUERY_ROWS][KEY_BLOCKS];
    for (int b = 0; b < KEY_BLOCKS; b++) {
        const element *row[KEY_ROWS];
        const float *from = q;
        int64_t at = 0;
        vf sums[KEY_ROWS * QUERY_ROWS];
        UNROLL for (int r = 0; r < KEY_ROWS; r++) row[r] = keys + smaller(b * KEY_ROWS + r, count - 1) * stride;
        UNROLL for (int i = 0; i < KEY_ROWS * q_rows; i++) sums[i] = splat(0);
        for (; at + STEP <= dim; at += STEP, from += q_step) dot_step(job, k, d, q_rows, row, at, STEP, from, sums);
        if (at < dim) dot_step(job, k, d, q_rows, row, at, dim - at, from, sums);
        UNROLL for (int c = 0; c < q_rows; c++) blocks[c][b] = sum_some(sums + c, q_rows, KEY_ROWS, 0);
    }
    UNROLL for (int c = 0; c < q_rows; c++)
        store_floats(out + c * out_stride, sum_some(blocks[c], 1, KEY_BLOCKS, KEY_ROWS / 2));
}

/* All rows of queries that share these keys, in parts as even as can be. */
INLINE void dot_rows(const attention_job *job, kind k, const key_range *keys, float *out, int64_t out_stride) {
    const fp8cpu_attention_args *a = job->args;
    const element *codes = (const element *)a->k + offset_of(a->k_stride, keys->first);
    for (int64_t t = 0; t < keys->count; t += LANES, codes += LANES * a->k_stride[2], out += LANES)
        for (int64_t row = 0, next; row < job->rows; row = next) {
            next = row + divide_up(job->rows - row, divide_up(job->rows - row, QUERY_ROWS));
            const float *q = job->q + keys->head * job->rows * job->q_size + row * LANES;
            float *to = out + row * out_stride;
            switch (next - row) {
                case 1: dot_microkernel(job, k, 1, codes, keys->count - t, q, to, out_stride); break;
                case 2: dot_microkernel(job, k, 2, codes, keys->count - t, q, to, out_stride); break;
                case 3: dot_microkernel(job, k, 3, codes, keys->count - t, q, to, out_stride); break;
                default: dot_microkernel(job, k, 4, codes, keys->count - t, q, to, out_stride); break;
            }
        }
}

#endif
