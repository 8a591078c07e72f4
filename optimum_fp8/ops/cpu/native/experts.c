/* Mixtures of gated experts: the product with gate and up, what lies between, the product with down, and the weighted sum
 * over the experts of each token. A row is a pair of a token and one of its experts; rows are sorted by expert. */
#include <math.h>

#include "functions.h"
#include "grouped_parts.h"

typedef struct {
    const fp8cpu_experts_args *args;
    int64_t first_token, tokens, type; /* of this pass; of what lies between the products */
    int64_t *first, *order, *expert_of_pair; /* as in sort_by_expert, of pairs in the order of the table */
    int64_t *token_of_row, *expert_of_row;
    int64_t *rows_of_token, *count_of_token; /* [tokens, chosen], by expert; how many there are */
    float *weights;                          /* of pairs: the router's */
    float *both, *scale, *out; /* [rows, 2 inner]; of what goes into down, one a row; [rows, hidden] */
} mixture;

/* --- rows ---------------------------------------------------------------------------------------------------------- */

/* Experts and weights of the pairs of a token. One that occurs twice is one pair, with the sum of the weights. */
static void read_pairs(const mixture *m, int64_t token) {
    const fp8cpu_experts_args *a = m->args;
    const int64_t size = value_size(a->router_type), from = (m->first_token + token) * a->chosen;
    const int64_t *table = (const int64_t *)a->table + from;
    int64_t *expert = m->expert_of_pair + token * a->chosen;
    float *weight = m->weights + token * a->chosen;
    for (int64_t i = 0; i < a->chosen; i++) {
        expert[i] = table[i] - a->experts_min;
        weight[i] = load_some((const char *)a->router + (from + i) * size, a->router_type, 1)[0];
        if (a->rounds) weight[i] = round_to(splat(weight[i]), FP8CPU_BFLOAT16)[0];
        for (int64_t j = 0; j < i; j++)
            if (expert[j] == expert[i]) {
                weight[j] += weight[i];
                expert[i] = -1;
                break;
            }
    }
    for (int64_t i = 0; i < a->chosen && a->rounds; i++) weight[i] = round_to(splat(weight[i]), FP8CPU_BFLOAT16)[0];
}

static void sort_rows(const mixture *m) {
    const fp8cpu_experts_args *a = m->args;
    for (int64_t token = 0; token < m->tokens; token++) read_pairs(m, token);
    sort_by_expert(m->expert_of_pair, m->tokens * a->chosen, a->experts, m->first, m->order);
    memset(m->count_of_token, 0, (size_t)m->tokens * sizeof(int64_t));
    for (int64_t row = 0; row < m->first[a->experts]; row++) {
        const int64_t token = m->order[row] / a->chosen;
        m->token_of_row[row] = m->first_token + token;
        m->expert_of_row[row] = m->expert_of_pair[m->order[row]];
        m->rows_of_token[token * a->chosen + m->count_of_token[token]++] = row;
    }
}

/* --- between the products ------------------------------------------------------------------------------------------- */

/* erf of |x| as 1 - polynomial(t) e^(-x^2), to 1.5e-7 (Abramowitz and Stegun, 7.1.26); here what is taken from 1. */
INLINE vf erfc_of_magnitude(vf magnitude) {
    const vf t = 1.0f / (1.0f + 0.3275911f * magnitude);
    vf sum = 1.061405429f * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    return sum * t * exp_of(-(magnitude * magnitude));
}

INLINE vf activate(vf x, int64_t activation) {
    const vf magnitude = (vf)((vi)x & 0x7FFFFFFF);
    if (activation == FP8CPU_RELU) return (vf)pick(x < 0.0f, splat_bits(0), (vi)x);
    if (activation == FP8CPU_GELU) {
        const vf rest = erfc_of_magnitude(magnitude * 0x1.6a09e6p-1f);
        return 0.5f * x * (vf)pick(x < 0.0f, (vi)rest, (vi)(2.0f - rest));
    }
    const vf power = exp_of(-magnitude);
    return x * (vf)pick(x < 0.0f, (vi)power, (vi)splat(1)) / (1.0f + power);
}

/* Row m of what goes into down, on the FP8 grid where it is rounded; its scale is written where it follows from it. */
static void make_middle_row(const linear_job *job, int64_t m, float *row) {
    const mixture *mix = job->made_of;
    const fp8cpu_experts_args *a = mix->args;
    const int64_t size = value_size(mix->type), at = job->first_row + m;
    const char *gate = (const char *)mix->both + at * 2 * a->inner * size, *up = gate + a->inner * size;
    const vf full_scale = splat((float)a->full_scale);
    vi largest = splat_bits(0);
    for (int64_t i = 0; i < job->steps * STEP; i += LANES) {
        vf value = splat(0);
        if (i < a->inner) {
            value = activate(load_up_to(gate + i * size, mix->type, a->inner - i), a->activation);
            value = round_to(value, mix->type) * load_up_to(up + i * size, mix->type, a->inner - i);
            value = round_to(value, mix->type);
        }
        largest = larger_of(largest, (vi)value & 0x7FFFFFFF); /* NaN is larger than all numbers */
        store_floats(row + i, value);
    }
    if (!a->x_scale) return;
    int32_t bits = 0;
    float maxabs, scale;
    for (int lane = 0; lane < LANES; lane++) bits = largest[lane] > bits ? largest[lane] : bits;
    memcpy(&maxabs, &bits, sizeof maxabs);
    scale = a->middle_scale ? *(const float *)job->args->x_scale : (maxabs + 1e-8f) / full_scale[0];
    if (!a->middle_scale) mix->scale[at] = scale;
    const vf reciprocal = splat(1.0f / scale);
    for (int64_t i = 0; i < job->steps * STEP; i += LANES)
        store_floats(row + i, to_grid(load_floats(row + i) * reciprocal, full_scale[0],
                                      a->w_format == FP8CPU_E4M3 ? E4M3 : E5M2));
}

/* --- the sum over experts ------------------------------------------------------------------------------------------- */

/* Experts are summed up in groups. */
INLINE int64_t group_of_row(const mixture *m, int64_t row) { return m->expert_of_row[row] / m->args->at_a_time; }

static void combine_token(void *context, int64_t token, int64_t thread) {
    const mixture *m = context;
    const fp8cpu_experts_args *a = m->args;
    const int64_t *rows = m->rows_of_token + token * a->chosen, count = m->count_of_token[token];
    const int64_t size = value_size(m->type), at = (m->first_token + token) * a->hidden;
    char *y = (char *)a->y + at * value_size(a->x_type);
    (void)thread;
    for (int64_t i = 0; i < a->hidden; i += LANES) {
        const int64_t left = a->hidden - i;
        vf total = splat(0), some = splat(0);
        for (int64_t r = 0; r < count; r++) {
            const char *out = (const char *)m->out + (rows[r] * a->hidden + i) * size;
            const vf value = load_up_to(out, m->type, left) * m->weights[m->order[rows[r]]];
            if (a->rounds && r && group_of_row(m, rows[r]) > group_of_row(m, rows[r - 1])) {
                total = round_to(total + some, m->type);
                some = splat(0);
            }
            some = round_to(some + round_to(value, m->type), m->type);
        }
        total = round_to(total + some, m->type);
        if (left >= LANES)
            store_values(y + i * value_size(a->x_type), total, a->x_type);
        else
            store_some(y + i * value_size(a->x_type), total, a->x_type, left);
    }
}

/* --- launch --------------------------------------------------------------------------------------------------------- */

static fp8cpu_grouped_args of_gate_up(const mixture *m) {
    const fp8cpu_experts_args *a = m->args;
    const fp8cpu_linear_args product = {
        .variant = a->variant, .threads = a->threads, .x = a->x, .x_type = a->x_type, .x_stride = a->hidden,
        .x_scale = a->x_scale, .x_scale_step = a->x_scale_step,
        .y = (int64_t)m->both, .y_type = m->type, .y_stride = 2 * a->inner, .n = 2 * a->inner, .k = a->hidden,
        .w = a->gate_up, .w_format = a->w_format, .w_scale = a->gate_up_scale, .w_scale_step = a->gate_up_scales > 2,
        .w_scale_half = a->gate_up_scales == 2 ? a->inner : 0, .full_scale = a->full_scale};
    return (fp8cpu_grouped_args){product, a->experts, 0, a->gate_up_scales, 0};
}

static fp8cpu_grouped_args of_down(const mixture *m) {
    const fp8cpu_experts_args *a = m->args;
    const fp8cpu_linear_args product = {
        .variant = a->variant, .threads = a->threads, .x_type = m->type,
        .x_scale = !a->x_scale ? 0 : a->middle_scale ? a->middle_scale : (int64_t)m->scale,
        .x_scale_step = !a->middle_scale,
        .y = (int64_t)m->out, .y_type = m->type, .y_stride = a->hidden, .n = a->hidden, .k = a->inner,
        .w = a->down, .w_format = a->w_format, .w_scale = a->down_scale, .w_scale_step = a->down_scales > 1,
        .full_scale = a->full_scale};
    return (fp8cpu_grouped_args){product, a->experts, 0, a->down_scales, a->middle_scale != 0};
}

/* All that a pass of `tokens` tokens needs, in one allocation: returned, or NULL. */
static void *allocate(mixture *m, int64_t tokens) {
    const fp8cpu_experts_args *a = m->args;
    const int64_t pairs = tokens * a->chosen, numbers = a->experts + 1 + 5 * pairs + tokens;
    const int64_t floats = 2 * pairs + pairs * (2 * a->inner + a->hidden);
    int64_t *memory = malloc((size_t)numbers * sizeof(int64_t) + (size_t)floats * sizeof(float));
    if (!memory) return NULL;
    m->first = memory;
    m->count_of_token = m->first + a->experts + 1;
    m->order = m->count_of_token + tokens;
    m->expert_of_pair = m->order + pairs;
    m->token_of_row = m->expert_of_pair + pairs;
    m->expert_of_row = m->token_of_row + pairs;
    m->rows_of_token = m->expert_of_row + pairs;
    m->weights = (float *)(m->rows_of_token + pairs);
    m->scale = m->weights + pairs;
    m->both = m->scale + pairs;
    m->out = m->both + pairs * 2 * a->inner;
    return memory;
}

static int run_pass(mixture *m) {
    const fp8cpu_experts_args *a = m->args;
    const fp8cpu_grouped_args gate_up = of_gate_up(m), down = of_down(m);
    sort_rows(m);
    const linear_job from_x = {.x_rows = m->token_of_row};
    const linear_job from_both = {.make_row = make_middle_row, .made_of = m};
    int status = multiply_grouped(&gate_up, &from_x, m->first);
    if (status == FP8CPU_OK) status = multiply_grouped(&down, &from_both, m->first);
    if (status == FP8CPU_OK)
        fp8cpu_parallel(combine_token, m, m->tokens, m->first[a->experts] * a->hidden < 1 << 14 ? 1 : a->threads);
    return status;
}

int FP8CPU_NAME(experts)(const fp8cpu_experts_args *a) {
    const int64_t packed = divide_up(a->hidden, STEP) * STEP + divide_up(a->inner, STEP) * STEP;
    const int64_t pass = 1 + MOST_FLOATS / (a->chosen * (packed + 2 * a->inner + a->hidden) + 1);
    mixture m = {.args = a, .type = a->rounds ? FP8CPU_BFLOAT16 : FP8CPU_FLOAT32};
    if (a->tokens == 0) return FP8CPU_OK;
    void *memory = allocate(&m, smaller(pass, a->tokens));
    int status = memory ? FP8CPU_OK : FP8CPU_NO_MEMORY;
    for (; m.first_token < a->tokens && status == FP8CPU_OK; m.first_token += pass) {
        m.tokens = smaller(pass, a->tokens - m.first_token);
        status = run_pass(&m);
    }
    free(memory);
    return status;
}
