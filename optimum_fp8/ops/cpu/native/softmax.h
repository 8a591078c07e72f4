/* The softmax of attention, from products q k^T to probabilities: a row of queries at a time, some positions at a time,
 * in place. */
#ifndef FP8CPU_SOFTMAX_H
#define FP8CPU_SOFTMAX_H

#include "functions.h"
#include "units.h"
#include "variant.h"

/* A row of queries: the constants of its scores, and what its softmax is normalized with. */
typedef struct {
    const fp8cpu_attention_args *args;
    float q_scale;
    const float *k_scale, *v_scale; /* one a position or one for all; v_scale: NULL unless one a position */
    const char *mask;               /* of this row, or NULL */
    float sink;                     /* a score without a value; -Inf where there is none */
    int64_t rounds_to;              /* the type that each step to its scores is rounded to */
    float max_score, exp_sum;       /* of all its scores, once they are known */
} score_row;

#define score_row_of FP8CPU_NAME(score_row_of)
#define make_scores FP8CPU_NAME(make_scores)
#define make_probabilities FP8CPU_NAME(make_probabilities)

/* All rows are numbered [batch, heads, queries]. */
score_row score_row_of(const fp8cpu_attention_args *a, int64_t number);

/* `count` products, of positions from `first` on, to scores; the largest is returned, or -Inf. Lanes behind the last
 * position become -Inf. */
float make_scores(const score_row *row, float *x, int64_t first, int64_t count);

/* exp(score - max_score) of each score; their sum, spread over lanes, is returned. */
INLINE vf exponentiate(const float *scores, float *exponentials, int64_t count, float max_score) {
    vf sum = splat(0);
    for (int64_t at = 0; at < count; at += LANES) {
        const vf exponential = exp_of(load_floats(scores + at) - max_score);
        store_floats(exponentials + at, exponential);
        sum += exponential;
    }
    return sum;
}

/* Exponentials, divided by their sum, to probabilities as they are multiplied with the codes of values: on the FP8
 * grid, without its scale. */
void make_probabilities(const score_row *row, float *x, int64_t first, int64_t count, float sum);

#endif
