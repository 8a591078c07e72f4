/* The softmax of attention: from products of codes to probabilities, a row of queries at a time, in place. A row is
 * read three times and stays in cache: the rounding of probabilities to FP8 needs their final sum. */
#include <math.h>

#include "attention.h"
#include "functions.h"
#include "parallel.h"
#include "variant.h"

typedef struct {
    const fp8cpu_attention_args *args;
    float of_query;
    const float *of_keys;    /* scales of keys, one a position or one for all */
    int64_t of_keys_stride;  /* 1 or 0 */
    const char *mask;        /* of this row, or NULL */
    int64_t rounds_to;       /* the type that each step is rounded to */
} score_row;

INLINE vf some_bytes(const char *p, int64_t count) { /* as -1 where they are not 0 */
    vquarter bytes = {0};
    memcpy(&bytes, p, (size_t)smaller(count, LANES));
    return (vf)(widen_bytes(bytes) != 0);
}

INLINE vf scale_of_keys(const score_row *row, int64_t at, int64_t left) {
    return row->of_keys_stride ? load_up_to(row->of_keys + at, FP8CPU_FLOAT32, left) : splat(*row->of_keys);
}

static const float LEAST[] = {-0x1.fffffep127f, -0x1.fep127f, -65504.0f}; /* of each type, in its order */

/* Products of codes, to scores: scaled, capped and masked, in the order of the reference and rounded where it rounds.
 * A step is skipped only where it changes nothing. */
INLINE vf score_of(const score_row *row, vf x, int64_t at, int64_t left) {
    const fp8cpu_attention_args *a = row->args;
    const int64_t type = row->rounds_to;
    x = x * row->of_query;
    if (row->of_keys) x = x * scale_of_keys(row, at, left);
    x = round_to(round_to(x, type) * (float)a->scaling, type);
    if (a->softcap != 0) {
        x = round_to(x / (float)a->softcap, type);
        x = round_to(round_to(tanh_of(x), type) * (float)a->softcap, type);
    }
    if (!row->mask) return x;
    if (a->mask_type == FP8CPU_BOOLEAN)
        return (vf)pick((vi)some_bytes(row->mask + at, left), (vi)x, (vi)splat(LEAST[type]));
    const vf added = load_up_to(row->mask + at * value_size(a->mask_type), a->mask_type, left);
    return round_to(x + round_to(added, type), type);
}

static float largest_of(vf values) {
    float largest = values[0];
    for (int lane = 1; lane < LANES; lane++)
        if (values[lane] > largest) largest = values[lane];
    return largest;
}

static float sum_of(vf values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
}

/* Scores in place; the largest is returned. Lanes behind the last position become -Inf. */
INLINE float make_scores(const score_row *row, float *x, int64_t count, float largest) {
    const vf nothing = splat(-INFINITY);
    vf found = splat(largest);
    for (int64_t at = 0; at < count; at += LANES) {
        vf score = score_of(row, load_floats(x + at), at, count - at);
        if (count - at < LANES)
            for (int64_t lane = count - at; lane < LANES; lane++) score[lane] = nothing[0];
        found = (vf)pick(score > found, (vi)score, (vi)found);
        store_floats(x + at, score);
    }
    return largest_of(found);
}

INLINE float make_powers(float *x, int64_t count, float largest) {
    vf sums[2] = {splat(0), splat(0)};
    for (int64_t at = 0; at < count; at += LANES) {
        const vf power = exp_of(load_floats(x + at) - largest);
        sums[at / LANES % 2] += power;
        store_floats(x + at, power);
    }
    return sum_of(sums[0] + sums[1]);
}

/* Probabilities as they are multiplied with the codes of values: on the FP8 grid, without its scale. */
INLINE void make_probabilities(const fp8cpu_attention_args *a, float *x, float sum, int64_t rounds_to,
                               const float *of_values, int64_t of_values_stride, fp8_format format) {
    const vf reciprocal = splat(1.0f / single(a->p_scale));
    for (int64_t at = 0; at < a->keys; at += LANES) {
        vf p = round_to(load_floats(x + at) / sum, rounds_to);
        if (a->p_scale) p = to_grid(p * reciprocal, (float)a->full_scale, format);
        if (of_values_stride) p *= load_up_to(of_values + at, FP8CPU_FLOAT32, a->keys - at);
        store_floats(x + at, p);
    }
}

INLINE void softmax_row(const fp8cpu_attention_args *a, int64_t number, int64_t rounds_to) {
    const place at = place_of(a, number), keys = keys_of(a, at);
    const float *of_keys = (const float *)a->k_scale, *of_values = (const float *)a->v_scale;
    float *x = (float *)a->scores + number * a->scores_stride;
    const score_row row = {
        .args = a,
        .of_query = scale_at(a->q_scale, a->q_scale_stride, at),
        .of_keys = of_keys ? of_keys + offset_of(a->k_scale_stride, keys) : NULL,
        .of_keys_stride = a->k_scale_stride[2],
        .mask = a->mask ? (const char *)a->mask + offset_of(a->mask_stride, at) * a->mask_size : NULL,
        .rounds_to = rounds_to,
    };
    vf sink = splat(-INFINITY);
    if (a->sinks) {
        const char *p = (const char *)a->sinks + offset_of(a->sinks_stride, at) * value_size(a->sinks_type);
        sink = splat(round_to(load_some(p, a->sinks_type, 1), rounds_to)[0]);
    }
    const float largest = make_scores(&row, x, a->keys, sink[0]);
    float sum = make_powers(x, a->keys, largest);
    if (a->sinks) sum += exp_of(sink - largest)[0];
    of_values = of_values ? of_values + offset_of(a->v_scale_stride, keys) : NULL;
    if (a->format == FP8CPU_E4M3)
        make_probabilities(a, x, sum, rounds_to, of_values, a->v_scale_stride[2], E4M3);
    else
        make_probabilities(a, x, sum, rounds_to, of_values, a->v_scale_stride[2], E5M2);
}

static void softmax_task(void *context, int64_t task, int64_t thread) {
    const fp8cpu_attention_args *a = context;
    (void)thread;
    if (!a->rounds_scores || a->type == FP8CPU_FLOAT32)
        softmax_row(a, task, FP8CPU_FLOAT32);
    else if (a->type == FP8CPU_BFLOAT16)
        softmax_row(a, task, FP8CPU_BFLOAT16);
    else
        softmax_row(a, task, FP8CPU_FLOAT16);
}

int FP8CPU_NAME(softmax)(const fp8cpu_attention_args *a) {
    const int64_t rows = a->batch * a->heads * a->queries;
    fp8cpu_parallel(softmax_task, (void *)(uintptr_t)a, rows, rows * a->keys < 1 << 12 ? 1 : a->threads);
    return FP8CPU_OK;
}
