/* The softmax of attention, in the order of the reference and rounded where it rounds. */
#include "softmax.h"

#include <math.h>

#include "attention.h"
#include "lanes.h"
#include "parallel.h"

static const float LEAST[] = {-0x1.fffffep127f, -0x1.fep127f, -65504.0f}; /* of each type, in its order */

score_row score_row_of(const fp8cpu_attention_args *a, int64_t number) {
    const place at = place_of(a, number), keys = keys_of(a, at);
    const float *of_keys = (const float *)a->k_scale, *of_values = (const float *)a->v_scale;
    const int64_t rounds_to = a->rounds_scores ? a->type : FP8CPU_FLOAT32;
    float sink = -INFINITY;
    if (a->sinks) {
        const char *p = (const char *)a->sinks + offset_of(a->sinks_stride, at) * value_size(a->sinks_type);
        sink = round_to(load_some(p, a->sinks_type, 1), rounds_to)[0];
    }
    return (score_row){
        .args = a,
        .of_query = scale_at(a->q_scale, a->q_scale_stride, at),
        .of_keys = of_keys ? of_keys + offset_of(a->k_scale_stride, keys) : NULL,
        .of_values = of_values && a->v_scale_stride[2] ? of_values + offset_of(a->v_scale_stride, keys) : NULL,
        .mask = a->mask ? (const char *)a->mask + offset_of(a->mask_stride, at) * a->mask_size : NULL,
        .sink = sink,
        .rounds_to = rounds_to,
    };
}

/* --- scores --------------------------------------------------------------------------------------------------------- */

INLINE vf some_bytes(const char *p, int64_t count) { /* as -1 where they are not 0 */
    vquarter bytes = {0};
    memcpy(&bytes, p, (size_t)smaller(count, LANES));
    return (vf)(widen_bytes(bytes) != 0);
}

INLINE vf scale_of_keys(const score_row *row, int64_t at, int64_t left) {
    return row->args->k_scale_stride[2] ? load_up_to(row->of_keys + at, FP8CPU_FLOAT32, left) : splat(*row->of_keys);
}

/* Products of codes, to scores: scaled, capped and masked. A step is skipped only where it changes nothing. */
INLINE vf score_of(const score_row *row, int64_t type, vf x, int64_t at, int64_t left) {
    const fp8cpu_attention_args *a = row->args;
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

INLINE float scores_in(const score_row *row, int64_t type, float *x, int64_t first, int64_t count) {
    const vf nothing = splat(-INFINITY);
    vf found = nothing;
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) {
        const vf score = score_of(row, type, load_floats(x + at), first + at, LANES);
        store_floats(x + at, score);
        found = larger_float(score, found);
    }
    if (at < count) {
        vf score = score_of(row, type, load_floats(x + at), first + at, count - at);
        for (int64_t lane = count - at; lane < LANES; lane++) score[lane] = nothing[0];
        store_floats(x + at, score);
        found = larger_float(score, found);
    }
    return largest_lane(found);
}

float make_scores(const score_row *row, float *x, int64_t first, int64_t count) {
    switch (row->rounds_to) {
        case FP8CPU_FLOAT32: return scores_in(row, FP8CPU_FLOAT32, x, first, count);
        case FP8CPU_BFLOAT16: return scores_in(row, FP8CPU_BFLOAT16, x, first, count);
        default: return scores_in(row, FP8CPU_FLOAT16, x, first, count);
    }
}

/* --- probabilities ---------------------------------------------------------------------------------------------------- */

INLINE void probabilities_in(const score_row *row, int64_t type, fp8_format format, float *x, int64_t first,
                             int64_t count, float sum) {
    const fp8cpu_attention_args *a = row->args;
    const vf reciprocal = splat(1.0f / single(a->p_scale));
    for (int64_t at = 0; at < count; at += LANES) {
        vf p = round_to(load_floats(x + at) / sum, type);
        if (a->p_scale) p = to_grid(p * reciprocal, (float)a->full_scale, format);
        if (row->of_values) p *= load_up_to(row->of_values + first + at, FP8CPU_FLOAT32, count - at);
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
    switch (row->rounds_to) {
        case FP8CPU_FLOAT32: PROBABILITIES(FP8CPU_FLOAT32);
        case FP8CPU_BFLOAT16: PROBABILITIES(FP8CPU_BFLOAT16);
        default: PROBABILITIES(FP8CPU_FLOAT16);
    }
#undef PROBABILITIES
}

/* --- whole rows ------------------------------------------------------------------------------------------------------- */

static void softmax_row(void *context, int64_t number, int64_t thread) {
    const fp8cpu_attention_args *a = context;
    const score_row row = score_row_of(a, number);
    float *x = (float *)a->scores + number * a->scores_stride;
    const float found = make_scores(&row, x, 0, a->keys), largest = found > row.sink ? found : row.sink;
    const float sum = sum_of_lanes(make_powers(x, x, a->keys, largest));
    (void)thread;
    make_probabilities(&row, x, 0, a->keys, sum + exp_of(splat(row.sink - largest))[0]);
}

int FP8CPU_NAME(softmax)(const fp8cpu_attention_args *a) {
    const int64_t rows = a->batch * a->heads * a->queries;
    fp8cpu_parallel(softmax_row, (void *)(uintptr_t)a, rows, rows * a->keys < 1 << 12 ? 1 : a->threads);
    return FP8CPU_OK;
}
