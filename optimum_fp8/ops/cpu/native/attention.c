/* Attention of a few rows of queries over keys and values that are FP8 codes, as they lie in a cache. It is bound by
 * reading the cache, so each code is read once, for all heads of queries that share it, and becomes a float in
 * registers only:
 *
 * 1. scores: dot products of rows of queries with rows of keys, chunk by chunk of positions;
 * 2. softmax.c: probabilities, row by row of queries;
 * 3. sums: rows of values times probabilities, chunk by chunk, in partial sums;
 * 4. output: partial sums added up, scaled and rounded.
 *
 * Scores of all positions are kept between the stages: rounding probabilities needs their final sum, and they are a
 * small part of what the cache is. */
#include "attention.h"
#include "parallel.h"
#include "transpose.h"
#include "variant.h"

enum {
    KEY_ROWS = LANES == 16 ? 4 : 2, /* rows of keys, and */
    QUERY_ROWS = 4,                 /* rows of queries whose dot products are in registers at a time */
    SUM_ROWS = LANES == 16 ? 6 : 2, /* rows of queries whose sums over one step of values are */
    PIECE = 64,                     /* positions whose values stay in cache while all rows of queries pass */
    LEAST_CHUNK = 64,               /* positions a task takes at least, */
    MOST_CHUNK = 1024,              /* and at most */
    FETCH_AHEAD = 8192,             /* bytes: rows are asked for before they are reached */
};

/* Bytes from a row to the one to fetch: whole rows, as rows may lie far apart. */
INLINE int64_t ahead_of(int64_t stride) {
    const int64_t rows = FETCH_AHEAD / (stride > 0 ? stride : 1);
    return (rows < 4 ? 4 : rows > PIECE ? PIECE : rows) * stride;
}

/* --- queries -------------------------------------------------------------------------------------------------------- */

/* A row of queries as floats, on the FP8 grid where it has a scale, in the order in which codes are decoded. */
static void lay_out_query(void *context, int64_t task, int64_t thread) {
    const attention_job *job = context;
    const fp8cpu_attention_args *a = job->args;
    const place at = place_of(a, task);
    const int64_t size = value_size(a->type);
    const char *q = (const char *)a->q + offset_of(a->q_stride, at) * size;
    const vf reciprocal = splat(1.0f / scale_at(a->q_scale, a->q_scale_stride, at));
    float *out = job->q + task * job->q_size, values[STEP];
    (void)thread;
    for (int64_t step = 0; step < job->q_size; step += STEP) {
        for (int64_t i = 0; i < STEP; i += LANES) {
            const int64_t left = a->key_dim - step - i;
            vf x = left > 0 ? load_up_to(q + (step + i) * size, a->type, left) : splat(0);
            if (a->q_scale) x = to_grid(x * reciprocal, (float)a->full_scale, format_of(a->format));
            store_floats(values + i, x);
        }
        for (int i = 0; i < 4; i++)
            for (int lane = 0; lane < LANES; lane++) out[step + i * LANES + lane] = values[4 * lane + i];
    }
}

/* --- scores --------------------------------------------------------------------------------------------------------- */

/* The chunk of a task: which head of keys, and which positions. */
typedef struct {
    int64_t head, first, count; /* heads are numbered [batch, key_heads] */
    place keys;
} chunk;

INLINE chunk chunk_of(const attention_job *job, int64_t task) {
    const int64_t head = task / job->chunks, first = task % job->chunks * job->chunk;
    const place keys = {head / job->args->key_heads, head % job->args->key_heads, first};
    return (chunk){head, first, smaller(job->chunk, job->args->keys - first), keys};
}

/* The same pointer, though the compiler does not know: what it points to is read again, as an operand, where it would
 * otherwise be kept, and registers run out. */
INLINE const float *again(const float *p) {
    __asm__("" : "+r"(p));
    return p;
}

INLINE void dot_rows(const attention_job *job, int e5m2, int k_rows, int q_rows, const uint8_t *k, const float *q,
                     float *out) {
    const fp8cpu_attention_args *a = job->args;
    const int64_t stride = a->k_stride[2], ahead = ahead_of(stride), q_size = job->q_size, dim = a->key_dim;
    vf sums[KEY_ROWS * QUERY_ROWS], units[4];
    UNROLL for (int i = 0; i < k_rows * q_rows; i++) sums[i] = splat(0);
    for (int64_t at = 0; at < q_size; at += STEP)
        UNROLL for (int r = 0; r < k_rows; r++) {
            __builtin_prefetch(k + r * stride + ahead + at);
            decode_units(load_step(k + r * stride, at / STEP, dim), e5m2, units);
            const float *from = again(q + at);
            UNROLL for (int i = 0; i < 4; i++) UNROLL for (int c = 0; c < q_rows; c++)
                sums[r * q_rows + c] += load_floats(from + c * q_size + i * LANES) * units[i];
        }
    UNROLL for (int c = 0; c < q_rows; c++) {
        const vf each = sum_each(sums + c, q_rows, k_rows);
        memcpy(out + c * a->scores_stride, &each, (size_t)k_rows * sizeof(float));
    }
}

INLINE void dot_rows_of(const attention_job *job, int e5m2, int k_rows, int64_t q_rows, const uint8_t *k,
                        const float *q, float *out) {
    switch (q_rows) {
        case 1: dot_rows(job, e5m2, k_rows, 1, k, q, out); break;
        case 2: dot_rows(job, e5m2, k_rows, 2, k, q, out); break;
        case 3: dot_rows(job, e5m2, k_rows, 3, k, q, out); break;
        default: dot_rows(job, e5m2, k_rows, 4, k, q, out); break;
    }
}

INLINE void score_chunk(const attention_job *job, int e5m2, int64_t task) {
    const fp8cpu_attention_args *a = job->args;
    const chunk c = chunk_of(job, task);
    const uint8_t *k = (const uint8_t *)a->k + offset_of(a->k_stride, c.keys);
    const float *q = job->q + c.head * job->rows * job->q_size;
    float *out = (float *)a->scores + c.head * job->rows * a->scores_stride + c.first;
    for (int64_t t = 0; t < c.count;) {
        const int64_t taken = c.count - t >= KEY_ROWS ? KEY_ROWS : 1;
        for (int64_t row = 0, next; row < job->rows; row = next) { /* parts as even as can be */
            const int64_t parts = divide_up(job->rows - row, QUERY_ROWS);
            next = row + divide_up(job->rows - row, parts);
            const float *from = q + row * job->q_size;
            float *to = out + row * a->scores_stride + t;
            if (taken == KEY_ROWS)
                dot_rows_of(job, e5m2, KEY_ROWS, next - row, k + t * a->k_stride[2], from, to);
            else
                dot_rows_of(job, e5m2, 1, next - row, k + t * a->k_stride[2], from, to);
        }
        t += taken;
    }
}

static void score_task(void *job, int64_t task, int64_t thread) {
    (void)thread;
    if (((const attention_job *)job)->args->k_format == FP8CPU_E5M2)
        score_chunk(job, 1, task);
    else
        score_chunk(job, 0, task);
}

/* --- sums of values --------------------------------------------------------------------------------------------------- */

/* `steps` steps of `count` rows of values from v on, times `p_rows` rows of probabilities, added to sums. */
INLINE void add_values(const attention_job *job, int e5m2, int steps, int p_rows, const uint8_t *v, int64_t first_step,
                       int64_t count, const float *p, float *sums) {
    const fp8cpu_attention_args *a = job->args;
    const int64_t stride = a->v_stride[2], ahead = ahead_of(stride);
    vf kept[4 * SUM_ROWS], units[4];
    UNROLL for (int s = 0; s < steps; s++) UNROLL for (int c = 0; c < p_rows; c++) UNROLL for (int i = 0; i < 4; i++)
        kept[(s * p_rows + c) * 4 + i] = load_floats(sums + c * job->v_size + (first_step + s) * STEP + i * LANES);
    for (int64_t t = 0; t < count; t++, v += stride)
        UNROLL for (int s = 0; s < steps; s++) {
            __builtin_prefetch(v + ahead + (first_step + s) * STEP);
            decode_units(load_step(v, first_step + s, a->value_dim), e5m2, units);
            UNROLL for (int c = 0; c < p_rows; c++) UNROLL for (int i = 0; i < 4; i++)
                kept[(s * p_rows + c) * 4 + i] += splat(p[c * a->scores_stride + t]) * units[i];
        }
    UNROLL for (int s = 0; s < steps; s++) UNROLL for (int c = 0; c < p_rows; c++) UNROLL for (int i = 0; i < 4; i++)
        store_floats(sums + c * job->v_size + (first_step + s) * STEP + i * LANES, kept[(s * p_rows + c) * 4 + i]);
}

/* One or two steps of values, times rows of probabilities: as many of each as fit in registers. */
INLINE int64_t add_some(const attention_job *job, int e5m2, int64_t p_rows, const uint8_t *v, int64_t step,
                        int64_t count, const float *p, float *sums) {
#define ADD(steps, rows)                                                          \
    {                                                                             \
        add_values(job, e5m2, steps, rows, v, step, count, p, sums);              \
        return steps;                                                             \
    }
#if LANES == 16
    if ((step + 2) * STEP <= job->v_size) switch (p_rows) {
        case 1: ADD(2, 1)
        case 2: ADD(2, 2)
        case 3: ADD(2, 3)
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

INLINE void sum_chunk(const attention_job *job, int e5m2, int64_t task) {
    const fp8cpu_attention_args *a = job->args;
    const chunk c = chunk_of(job, task);
    const uint8_t *v = (const uint8_t *)a->v + offset_of(a->v_stride, c.keys);
    const float *p = (const float *)a->scores + c.head * job->rows * a->scores_stride + c.first;
    float *sums = job->sums + task * job->rows * job->v_size;
    memset(sums, 0, (size_t)(job->rows * job->v_size) * sizeof(float));
    for (int64_t t = 0; t < c.count; t += PIECE) {
        const int64_t count = smaller(PIECE, c.count - t);
        for (int64_t row = 0, next; row < job->rows; row = next) {
            const int64_t parts = divide_up(job->rows - row, SUM_ROWS);
            next = row + divide_up(job->rows - row, parts);
            for (int64_t step = 0; step * STEP < job->v_size;)
                step += add_some(job, e5m2, next - row, v + t * a->v_stride[2], step, count,
                                 p + row * a->scores_stride + t, sums + row * job->v_size);
        }
    }
}

static void sum_task(void *job, int64_t task, int64_t thread) {
    (void)thread;
    if (((const attention_job *)job)->args->v_format == FP8CPU_E5M2)
        sum_chunk(job, 1, task);
    else
        sum_chunk(job, 0, task);
}

/* --- output --------------------------------------------------------------------------------------------------------- */

/* A row of the output: the partial sums of all chunks, out of units, times scales, rounded. */
static void finish_row(void *context, int64_t number, int64_t thread) {
    const attention_job *job = context;
    const fp8cpu_attention_args *a = job->args;
    const place at = place_of(a, number), keys = keys_of(a, at);
    const int64_t head = number / job->rows, row = number % job->rows, size = value_size(a->type);
    const float *sums = job->sums + (head * job->chunks * job->rows + row) * job->v_size;
    const float of_values = a->v_scale_stride[2] ? 1.0f : scale_at(a->v_scale, a->v_scale_stride, keys);
    const float of_output = single(a->output_scale), of_probabilities = single(a->p_scale);
    char *y = (char *)a->y + ((at.batch * a->queries + at.query) * a->heads + at.head) * a->value_dim * size;
    (void)thread;
    for (int64_t step = 0; step < job->v_size; step += STEP) {
        float values[STEP];
        for (int i = 0; i < 4; i++) {
            vf sum = splat(0);
            for (int64_t c = 0; c < job->chunks; c++)
                sum += load_floats(sums + c * job->rows * job->v_size + step + i * LANES);
            sum = sum * of_probabilities * of_values;
            if (a->output_scale)
                sum = to_grid(sum * (1.0f / of_output), (float)a->full_scale, format_of(a->format)) * of_output;
            for (int lane = 0; lane < LANES; lane++) values[4 * lane + i] = sum[lane];
        }
        for (int64_t i = 0; i < STEP && step + i < a->value_dim; i += LANES) {
            const int64_t left = a->value_dim - step - i;
            if (left >= LANES)
                store_values(y + (step + i) * size, load_floats(values + i), a->type);
            else
                store_some(y + (step + i) * size, load_floats(values + i), a->type, left);
        }
    }
}

/* --- the whole ------------------------------------------------------------------------------------------------------- */

/* Positions a task takes: so few that all threads are busy to the end, so many that memory is read in long pieces. */
static int64_t chunk_for(const fp8cpu_attention_args *a) {
    const int64_t fair = divide_up(a->batch * a->key_heads * a->keys, a->threads * 16);
    const int64_t bounded = fair < LEAST_CHUNK ? LEAST_CHUNK : smaller(fair, MOST_CHUNK);
    return divide_up(bounded, PIECE) * PIECE;
}

int FP8CPU_NAME(attention)(const fp8cpu_attention_args *a) {
    const int64_t heads = a->batch * a->key_heads, all_rows = a->batch * a->heads * a->queries;
    if (all_rows == 0 || a->value_dim == 0) return FP8CPU_OK;
    attention_job job = {.args = a, .rows = a->heads / a->key_heads * a->queries, .chunk = chunk_for(a)};
    job.q_size = divide_up(a->key_dim, STEP) * STEP;
    job.v_size = divide_up(a->value_dim, STEP) * STEP;
    job.chunks = divide_up(a->keys, job.chunk);
    job.q = aligned(all_rows * job.q_size);
    job.sums = aligned(all_rows * job.chunks * job.v_size);
    if (!job.q || !job.sums) {
        free(job.q);
        free(job.sums);
        return FP8CPU_NO_MEMORY;
    }
    /* Waking threads takes longer than multiplying a few thousand codes. */
    const int64_t threads = heads * a->keys * (a->key_dim + a->value_dim) < 1 << 16 ? 1 : a->threads;
    fp8cpu_parallel(lay_out_query, &job, all_rows, all_rows * job.q_size < 1 << 15 ? 1 : a->threads);
    fp8cpu_parallel(score_task, &job, heads * job.chunks, threads);
    FP8CPU_NAME(softmax)(a);
    fp8cpu_parallel(sum_task, &job, heads * job.chunks, threads);
    fp8cpu_parallel(finish_row, &job, all_rows, all_rows * job.chunks * job.v_size < 1 << 15 ? 1 : a->threads);
    free(job.q);
    free(job.sums);
    return FP8CPU_OK;
}
