/* The softmax of attention, in the order of the reference and rounded where it rounds. */
#include "softmax.h"

#include <math.h>

#include "attention_index.h"
#include "lanes.h"
#include "parallel.h"

static const float LOWEST[] = {-0x1.fffffep127f, -0x1.fep127f, -65504.0f}; /* finite value of each type, in its order */

score_row score_row_of(const fp8cpu_attention_args *a, int64_t number) {
    const index3 at = index_of_row(a, number), keys = key_head_of(a, at);
    const float *k_scale = (const float *)a->k_scale, *v_scale = (const float *)a->v_scale;
    const int64_t rounds_to = a->rounds_scores ? a->type : FP8CPU_FLOAT32;
    float sink = -INFINITY;
    if (a->sinks) {
        const char *p = (const char *)a->sinks + offset_of(a->sinks_stride, at) * value_size(a->sinks_type);
        sink = round_to(load_some(p, a->sinks_type, 1), rounds_to)[0];
    }
    return (score_row){
        .args = a,
        .q_scale = scale_at(a->q_scale, a->q_scale_stride, at),
        .k_scale = k_scale ? k_scale + offset_of(a->k_scale_stride, keys) : NULL,
        .v_scale = v_scale && a->v_scale_stride[2] ? v_scale + offset_of(a->v_scale_stride, keys) : NULL,
        .mask = a->mask ? (const char *)a->mask + offset_of(a->mask_stride, at) * a->mask_size : NULL,
        .sink = sink,
        .rounds_to = rounds_to,
    };
}

/* --- scores ------------------------------------------------------------------------------------------------------- */

/* Each step is a loop of its own, and is skipped only where it changes nothing. */

INLINE void scale_scores(const score_row *row, int64_t type, float *x, int64_t first, int64_t count) {
    const fp8cpu_attention_args *a = row->args;
    const vf q_scale = splat(row->q_scale), scaling = splat((float)a->scaling);
    const int per_position = row->k_scale && a->k_scale_stride[2];
    const vf shared = splat(row->k_scale && !per_position ? *row->k_scale : 1);
    for (int64_t at = 0; at < count; at += LANES) {
        const vf k_scale = per_position ? load_up_to(row->k_scale + first + at, FP8CPU_FLOAT32, count - at) : shared;
        const vf product = load_floats(x + at) * (q_scale * k_scale);
        store_floats(x + at, round_to(round_to(product, type) * scaling, type));
    }
}

INLINE void cap_scores(float softcap, int64_t type, float *x, int64_t count) {
    for (int64_t at = 0; at < count; at += LANES) {
        const vf part = round_to(tanh_of(round_to(load_floats(x + at) / softcap, type)), type);
        store_floats(x + at, round_to(part * softcap, type));
    }
}

INLINE vf load_boolean_mask(const char *p, int64_t count) { /* as -1 where they are not 0 */
    vquarter bytes = {0};
    memcpy(&bytes, p, (size_t)smaller(count, LANES));
    return (vf)(widen_bytes(bytes) != 0);
}

INLINE void mask_scores(const score_row *row, int64_t type, float *x, int64_t first, int64_t count) {
    const int64_t mask_type = row->args->mask_type;
    const char *mask = row->mask + first * row->args->mask_size;
    for (int64_t at = 0; at < count; at += LANES) {
        vf score = load_floats(x + at);
        if (mask_type == FP8CPU_BOOLEAN) {
            score = (vf)pick((vi)load_boolean_mask(mask + at, count - at), (vi)score, (vi)splat(LOWEST[type]));
        } else {
            const vf added = load_up_to(mask + at * value_size(mask_type), mask_type, count - at);
            score = round_to(score + round_to(added, type), type);
        }
        store_floats(x + at, score);
    }
}

INLINE float largest_of(float *x, int64_t count) {
    vf found = splat(-INFINITY);
    for (int64_t at = count; at % LANES; at++) x[at] = -INFINITY;
    for (int64_t at = 0; at < count; at += LANES) found = larger_float(load_floats(x + at), found);
    return largest_lane(found);
}

INLINE float scores_in(const score_row *row, int64_t type, float *x, int64_t first, int64_t count) {
    scale_scores(row, type, x, first, count);
    if (row->args->softcap != 0) cap_scores((float)row->args->softcap, type, x, count);
    if (row->mask) mask_scores(row, type, x, first, count);
    return largest_of(x, count);
}

float make_scores(const score_row *row, float *x, int64_t first, int64_t count) {
    switch (row->rounds_to) {
        case FP8CPU_FLOAT32: return scores_in(row, FP8CPU_FLOAT32, x, first, count);
        case FP8CPU_BFLOAT16: return scores_in(row, FP8CPU_BFLOAT16, x, first, count);
        default: return scores_in(row, FP8CPU_FLOAT16, x, first, count);
    }
}

/* --- probabilities ------------------------------------------------------------------------------------------------ */

INLINE void probabilities_in(const score_row *row, int64_t type, fp8_format format, float *x, int64_t first,
                             int64_t count, float sum) {
    const fp8cpu_attention_args *a = row->args;
    const vf reciprocal = splat(1.0f / scale_per_tensor(a->p_scale));
    for (int64_t at = 0; at < count; at += LANES) {
        vf p = round_to(load_floats(x + at) / sum, type);
        if (a->p_scale) p = to_grid(p * reciprocal, (float)a->full_scale, format);
        if (row->v_scale) p *= load_up_to(row->v_scale + first + at, FP8CPU_FLOAT32, count - at);
        store_floats(x + at, p);
    }
}

void make_probabilities(const score_row *row, float *x, int64_t first, int64_t count, float sum) {
#define PROBABILITIES(type)                                              \
    if (row->args->format == FP8CPU_E4M3)                                \
        probabilities_in(row, type, E4M3, x, first, count, sum);         \
    else                                                                 \
        probabilities_in(row, type, E5M2, x, first, count, sum);         \
    break
    switch (row->args->rounds_probabilities ? row->args->type : FP8CPU_FLOAT32) {
        case FP8CPU_FLOAT32: PROBABILITIES(FP8CPU_FLOAT32);
        case FP8CPU_BFLOAT16: PROBABILITIES(FP8CPU_BFLOAT16);
        default: PROBABILITIES(FP8CPU_FLOAT16);
    }
#undef PROBABILITIES
}

/* --- whole rows --------------------------------------------------------------------------------------------------- */

static void softmax_row(void *context, int64_t number, int64_t thread) {
    const fp8cpu_attention_args *a = context;
    const score_row row = score_row_of(a, number);
    float *x = (float *)a->scores + number * a->scores_stride;
    const float found = make_scores(&row, x, 0, a->keys), max_score = found > row.sink ? found : row.sink;
    const float sum = sum_of_lanes(exponentiate(x, x, a->keys, max_score));
    (void)thread;
    make_probabilities(&row, x, 0, a->keys, sum + exp_of(splat(row.sink - max_score))[0]);
}

int FP8CPU_NAME(softmax)(const fp8cpu_attention_args *a) {
    const int64_t rows = a->batch * a->heads * a->queries;
    fp8cpu_parallel(softmax_row, (void *)(uintptr_t)a, rows, rows * a->keys < 1 << 12 ? 1 : a->threads);
    return FP8CPU_OK;
}
