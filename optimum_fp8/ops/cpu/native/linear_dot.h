/* Few rows of x: dot products, with weights used as they are decoded. */
#ifndef FP8CPU_LINEAR_DOT_H
#define FP8CPU_LINEAR_DOT_H

#include "linear_job.h"

/* One step of one row of w times all `x_rows` rows of x. */
INLINE void dot_step(vi codes, kind k, float scale, int x_rows, const float *x, vf *sums) {
    const int units = units_of(k);
    vf w[4];
    decode_step(codes, k, w);
    UNROLL for (int i = 0; i < units; i++) {
        if (k.blocked) w[i] *= scale;
        UNROLL for (int c = 0; c < x_rows; c++)
            sums[c] = multiply_add(sums[c], load_floats(x + (c * units + i) * LANES), w[i], k);
    }
}

/* `w_rows` rows of w from n on, times all `x_rows` rows of x, over steps `from` ... `to` - 1; added to sums. */
INLINE void dot_steps(const linear_job *job, kind k, int w_rows, int x_rows, int64_t n, int64_t from, int64_t to,
                      vf *sums) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t row_size = a->k, whole = smaller(to, row_size / STEP);
    const uint8_t *w = (const uint8_t *)a->w + n * row_size + from * STEP;
    const float *x = job->x + from * x_rows * units_of(k) * LANES;
    for (int64_t step = from; step < whole; step++, w += STEP, x += x_rows * units_of(k) * LANES)
        UNROLL for (int r = 0; r < w_rows; r++) {
            /* Rows, and more so spans, are too short for the processor to see that the next ones will be needed. */
            __builtin_prefetch(w + (r + (x_rows > 4 ? 4 : w_rows)) * row_size);
            dot_step(load_bits(w + r * row_size), k, k.blocked ? block_scale(a, n + r, step * STEP) : 1, x_rows, x,
                     sums + r * x_rows);
        }
    if (whole < to)
        UNROLL for (int r = 0; r < w_rows; r++)
            dot_step(load_step((const uint8_t *)a->w + (n + r) * row_size, whole, row_size), k,
                     k.blocked ? block_scale(a, n + r, whole * STEP) : 1, x_rows, x, sums + r * x_rows);
}

INLINE void store_sums(int w_rows, int x_rows, const vf *sums, float *out, int64_t stride) {
    UNROLL for (int c = 0; c < x_rows; c++) {
        const vf each = sum_each(sums + c, x_rows, w_rows);
        memcpy(out + c * stride, &each, (size_t)w_rows * sizeof(float));
    }
}

/* So few rows of x that they stay in cache: each row of w is done with at once. */
INLINE void dot_rows(const linear_job *job, kind k, int w_rows, int x_rows, int64_t n, float *out) {
    vf sums[4 * 4];
    UNROLL for (int i = 0; i < w_rows * x_rows; i++) sums[i] = splat(0);
    dot_steps(job, k, w_rows, x_rows, n, 0, job->steps, sums);
    store_sums(w_rows, x_rows, sums, out, job->task_cols);
}

INLINE void dot_cols(const linear_job *job, kind k, int x_rows, int64_t first, int64_t cols, float *out) {
    enum { W_ROWS = LANES == 16 ? 4 : 2 };
    int64_t i = 0;
    for (; i + W_ROWS <= cols; i += W_ROWS) dot_rows(job, k, W_ROWS, x_rows, first + i, out + i);
    for (; i < cols; i++) dot_rows(job, k, 1, x_rows, first + i, out + i);
}

/* More rows of x: all rows of w go through one span of k, for which x is in cache, before the next span is begun. */
INLINE void dot_spans(const linear_job *job, kind k, int x_rows, int64_t first, int64_t cols, float *out, vf *kept) {
    enum { W_ROWS = LANES == 16 ? 2 : 1 };
    for (int64_t i = 0; i < cols * x_rows; i++) kept[i] = splat(0);
    for (int64_t from = 0; from < job->steps; from += SPAN_STEPS) {
        const int64_t to = smaller(from + SPAN_STEPS, job->steps);
        for (int64_t i = 0; i < cols; i += W_ROWS) {
            vf sums[2 * DOT_ROWS];
            if (i + W_ROWS <= cols) {
                UNROLL for (int j = 0; j < W_ROWS * x_rows; j++) sums[j] = kept[i * x_rows + j];
                dot_steps(job, k, W_ROWS, x_rows, first + i, from, to, sums);
                UNROLL for (int j = 0; j < W_ROWS * x_rows; j++) kept[i * x_rows + j] = sums[j];
            } else {
                UNROLL for (int j = 0; j < x_rows; j++) sums[j] = kept[i * x_rows + j];
                dot_steps(job, k, 1, x_rows, first + i, from, to, sums);
                UNROLL for (int j = 0; j < x_rows; j++) kept[i * x_rows + j] = sums[j];
            }
        }
    }
    for (int64_t i = 0; i < cols; i++) store_sums(1, x_rows, kept + i * x_rows, out + i, job->task_cols);
}

INLINE void dot_task(const linear_job *job, kind k, int64_t task, int64_t thread) {
    const int64_t first = task * job->task_cols, cols = smaller(job->task_cols, job->args->n - first);
    float *sums = job->scratch + thread * job->scratch_size;
    vf *kept = (vf *)(sums + job->rows * job->task_cols);
    switch (job->rows) {
        case 1: dot_cols(job, k, 1, first, cols, sums); break;
        case 2: dot_cols(job, k, 2, first, cols, sums); break;
        case 3: dot_cols(job, k, 3, first, cols, sums); break;
        case 4: dot_cols(job, k, 4, first, cols, sums); break;
        case 5: dot_spans(job, k, 5, first, cols, sums, kept); break;
        case 6: dot_spans(job, k, 6, first, cols, sums, kept); break;
        case 7: dot_spans(job, k, 7, first, cols, sums, kept); break;
        default: dot_spans(job, k, 8, first, cols, sums, kept); break;
    }
    finish(job, k.blocked, sums, job->task_cols, first, cols);
}

#endif
