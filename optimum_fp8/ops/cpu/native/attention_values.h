/* Products of probabilities and values, p v, added to accumulators. */
#ifndef FP8CPU_ATTENTION_VALUES_H
#define FP8CPU_ATTENTION_VALUES_H

#include "attention_job.h"
#include "attention_units.h"

enum { SUM_ROWS = LANES == 16 ? 6 : 2 }; /* rows of queries whose accumulators of one step are in registers */

/* `steps` steps of `count` rows of values from v on, of which `left` codes are there, times `p_rows` rows of weights,
 * added to accumulators that are in registers. */
INLINE void add_positions(const attention_job *job, kind k, int steps, int p_rows, const element *v, int64_t left,
                          int64_t count, attention_weights w, vf *acc) {
    const int64_t stride = job->args->v_stride[2], ahead = job->v_prefetch;
    const decoder d = decoder_for(k);
    vf units[4];
    for (int64_t t = 0; t < count; t++, v += stride)
        UNROLL for (int s = 0; s < steps; s++) {
            prefetch_step(v + ahead + s * STEP);
            load_units(v + s * STEP, left - s * STEP, k, d, units);
            UNROLL for (int c = 0; c < p_rows; c++) UNROLL for (int i = 0; i < 4; i++)
                acc[(s * p_rows + c) * 4 + i] += splat(w.p[c * w.stride + t]) * units[i];
        }
}

/* The same, from step `first` on, added to accumulators in memory, which are rescaled. */
INLINE void add_steps(const attention_job *job, kind k, int steps, int p_rows, const element *v, int64_t first,
                      int64_t count, attention_weights w, float *acc) {
    const int64_t left = job->args->value_dim - first * STEP;
    vf kept[4 * SUM_ROWS];
    v += first * STEP;
    acc += first * STEP;
    UNROLL for (int s = 0; s < steps; s++) UNROLL for (int c = 0; c < p_rows; c++) UNROLL for (int i = 0; i < 4; i++)
        kept[(s * p_rows + c) * 4 + i] = load_floats(acc + c * job->v_size + s * STEP + i * LANES) * w.rescale[c];
    if (left >= steps * STEP)
        add_positions(job, k, steps, p_rows, v, steps * STEP, count, w, kept);
    else
        add_positions(job, k, steps, p_rows, v, left, count, w, kept);
    UNROLL for (int s = 0; s < steps; s++) UNROLL for (int c = 0; c < p_rows; c++) UNROLL for (int i = 0; i < 4; i++)
        store_floats(acc + c * job->v_size + s * STEP + i * LANES, kept[(s * p_rows + c) * 4 + i]);
}

/* One or two steps of values, times rows of weights: as many of each as fit in registers. Returns how many steps. */
INLINE int64_t add_some(const attention_job *job, kind k, int64_t p_rows, const element *v, int64_t step, int64_t count,
                        attention_weights w, float *acc) {
#define ADD(steps, rows)                                        \
    {                                                           \
        add_steps(job, k, steps, rows, v, step, count, w, acc); \
        return steps;                                           \
    }
#if LANES == 16
    if ((step + 2) * STEP <= job->v_size) switch (p_rows) {
        case 1: ADD(2, 1)
        case 2: ADD(2, 2)
    }
#endif
    switch (p_rows) {
        case 1: ADD(1, 1)
#if LANES == 16
        case 2: ADD(1, 2)
        case 3: ADD(1, 3)
        case 4: ADD(1, 4)
        case 5: ADD(1, 5)
#endif
        default: ADD(1, SUM_ROWS)
    }
#undef ADD
}

/* All rows of queries that share these values, in parts as even as can be. */
INLINE void add_rows(const attention_job *job, kind k, const key_range *values, attention_weights w, float *acc) {
    const fp8cpu_attention_args *a = job->args;
    const element *v = (const element *)a->v + offset_of(a->v_stride, values->first);
    for (int64_t row = 0, next; row < job->rows; row = next) {
        next = row + divide_up(job->rows - row, divide_up(job->rows - row, SUM_ROWS));
        const attention_weights own = {w.p + row * w.stride, w.stride, w.rescale + row};
        for (int64_t step = 0; step * STEP < job->v_size;)
            step += add_some(job, k, next - row, v, step, values->count, own, acc + row * job->v_size);
    }
}

#endif
