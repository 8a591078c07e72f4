/* Attention of a few rows of queries over keys and values that are FP8 codes, as they lie in a cache. It is bound by
 * reading the cache, so each code is read once, for all heads of queries that share it, and becomes a number in
 * registers only. Positions are taken in chunks, by all threads, and a chunk in pieces:
 *
 * 1. scores of a piece: dot products of rows of queries with rows of keys, and what the softmax does to them;
 * 2. powers of scores, relative to the largest one so far, and sums of rows of values times powers;
 * 3. when all chunks are done, their sums are put into relation, added up, scaled and rounded.
 *
 * Where probabilities are rounded, to FP8 or to the queries' type, their final sum must be known before. All scores are
 * kept then, and values are multiplied with probabilities in a second pass. */
#include "attention.h"

#include <math.h>

#include "attention_scores.h"
#include "attention_values.h"
#include "functions.h"
#include "parallel.h"

/* --- kinds of codes ------------------------------------------------------------------------------------------------- */

/* The two products with `kind` a constant in each, so that the compiler leaves out what a kind does not need. */
#define DOT(suffix, ...)                                                                                    \
    static void dot_##suffix(const attention_job *job, const span *keys, float *out, int64_t out_stride) { \
        dot_rows(job, (kind)__VA_ARGS__, keys, out, out_stride);                                           \
    }
#define ADD(suffix, ...)                                                                                 \
    static void add_##suffix(const attention_job *job, const span *values, weights w, float *sums) {    \
        add_rows(job, (kind)__VA_ARGS__, values, w, sums);                                              \
    }

DOT(e4m3, {0, 0})
DOT(e5m2, {0, 1})
#if defined(__AVX512BF16__)
DOT(e4m3_pairs, {1, 0})
DOT(e5m2_pairs, {1, 1})
#endif
ADD(e4m3, {0, 0})
ADD(e5m2, {0, 1})

static void choose_kinds(attention_job *job) {
    const int k_e5m2 = job->args->k_format == FP8CPU_E5M2, v_e5m2 = job->args->v_format == FP8CPU_E5M2;
    job->dot = k_e5m2 ? dot_e5m2 : dot_e4m3;
#if defined(__AVX512BF16__)
    if (makes_pairs(job->args)) job->dot = k_e5m2 ? dot_e5m2_pairs : dot_e4m3_pairs;
#endif
    job->add = v_e5m2 ? add_e5m2 : add_e4m3;
}

/* --- stages --------------------------------------------------------------------------------------------------------- */

static void prepare_row(void *context, int64_t number, int64_t thread) {
    const attention_job *job = context;
    (void)thread;
    lay_out_query(job, number);
    job->score_rows[number] = score_row_of(job->args, number);
    for (int64_t c = 0; c < job->chunks_size; c++) { /* those behind the last chunk count for nothing */
        job->largest[number * job->chunks_size + c] = -INFINITY;
        job->total[number * job->chunks_size + c] = 0;
    }
}

INLINE span span_of(const attention_job *job, int64_t task) {
    const fp8cpu_attention_args *a = job->args;
    const int64_t head = task / job->chunks, first = task % job->chunks * job->chunk;
    return (span){head, smaller(job->chunk, a->keys - first), {head / a->key_heads, head % a->key_heads, first}};
}

INLINE span piece_of(span all, int64_t at) {
    all.count = smaller(PIECE, all.count - at);
    all.first.query += at;
    return all;
}

/* What a thread needs for a chunk. */
typedef struct {
    float *powers;            /* [rows, PIECE] */
    float *totals;            /* [rows, LANES]: sums of powers */
    float *largest, *factors; /* [rows] */
} workspace;

static int64_t workspace_size(int64_t rows) { return divide_up(rows * (PIECE + LANES + 2), LANES) * LANES; }

INLINE workspace workspace_of(const attention_job *job, int64_t thread) {
    float *room = job->scratch + thread * job->scratch_size, *totals = room + job->rows * PIECE;
    return (workspace){room, totals, totals + job->rows * LANES, totals + job->rows * (LANES + 1)};
}

static void multiply(float *x, const float *scales, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] *= scales[i];
}

/* Products of a piece to powers, relative to the largest score that a row has had; what was relative to a smaller one is
 * to be multiplied with a factor. */
static void soften(const attention_job *job, const span *piece, float *x, int64_t stride, workspace w) {
    for (int64_t row = 0; row < job->rows; row++) {
        const score_row *r = job->score_rows + piece->head * job->rows + row;
        const float found = make_scores(r, x + row * stride, piece->first.query, piece->count);
        float *total = w.totals + row * LANES, largest = w.largest[row];
        w.factors[row] = 1;
        if (found > largest) { /* seldom, after a few pieces */
            w.factors[row] = exp_of(splat(largest - found))[0];
            w.largest[row] = largest = found;
        }
        if (largest == -INFINITY) largest = 0; /* nothing but masked scores: powers are 0 */
        const vf sum = make_powers(x + row * stride, w.powers + row * PIECE, piece->count, largest);
        store_floats(total, load_floats(total) * w.factors[row] + sum);
        if (r->of_values) multiply(w.powers + row * PIECE, r->of_values + piece->first.query, piece->count);
    }
}

INLINE float *scores_of(const attention_job *job, const span *piece) {
    return (float *)job->args->scores + piece->head * job->rows * job->args->scores_stride + piece->first.query;
}

/* The first pass over a chunk, and the only one where probabilities are not rounded. */
static void attend(void *context, int64_t task, int64_t thread) {
    const attention_job *job = context;
    const span all = span_of(job, task);
    const workspace w = workspace_of(job, thread);
    float *sums = job->sums + task * job->rows * job->v_size;
    memset(sums, 0, (size_t)(job->rows * job->v_size) * sizeof(float));
    memset(w.totals, 0, (size_t)(job->rows * LANES) * sizeof(float));
    for (int64_t row = 0; row < job->rows; row++) w.largest[row] = -INFINITY;
    for (int64_t at = 0; at < all.count; at += PIECE) {
        const span piece = piece_of(all, at);
        float *x = job->two_passes ? scores_of(job, &piece) : w.powers;
        const int64_t stride = job->two_passes ? job->args->scores_stride : PIECE;
        job->dot(job, &piece, x, stride);
        soften(job, &piece, x, stride, w);
        if (!job->two_passes) job->add(job, &piece, (weights){w.powers, PIECE, w.factors}, sums);
    }
    for (int64_t row = 0; row < job->rows; row++) {
        const int64_t at = (all.head * job->rows + row) * job->chunks_size + task % job->chunks;
        job->largest[at] = w.largest[row];
        job->total[at] = sum_of_lanes(load_floats(w.totals + row * LANES));
    }
}

/* The largest score of a row and the sum of its powers; `largest` becomes the weight of each chunk's sums. */
static void settle_row(void *context, int64_t number, int64_t thread) {
    const attention_job *job = context;
    score_row *row = job->score_rows + number;
    float *largest = job->largest + number * job->chunks_size, *total = job->total + number * job->chunks_size;
    vf most = splat(row->sink), sum = splat(0);
    (void)thread;
    for (int64_t c = 0; c < job->chunks_size; c += LANES) most = larger_float(load_floats(largest + c), most);
    row->largest = largest_lane(most);
    for (int64_t c = 0; c < job->chunks_size; c += LANES) {
        const vf weight = exp_of(load_floats(largest + c) - row->largest);
        store_floats(largest + c, weight);
        sum += weight * load_floats(total + c);
    }
    row->total = sum_of_lanes(sum) + exp_of(splat(row->sink - row->largest))[0];
    for (int64_t c = 0; c < job->chunks; c++) largest[c] = job->two_passes ? 1 : largest[c] / row->total;
}

/* The second pass over a chunk. */
static void weigh(void *context, int64_t task, int64_t thread) {
    const attention_job *job = context;
    const span all = span_of(job, task);
    const workspace w = workspace_of(job, thread);
    for (int64_t row = 0; row < job->rows; row++) w.factors[row] = 1;
    for (int64_t at = 0; at < all.count; at += PIECE) {
        const span piece = piece_of(all, at);
        for (int64_t row = 0; row < job->rows; row++) {
            const score_row *r = job->score_rows + piece.head * job->rows + row;
            float *p = w.powers + row * PIECE;
            make_powers(scores_of(job, &piece) + row * job->args->scores_stride, p, piece.count, r->largest);
            make_probabilities(r, p, piece.first.query, piece.count, r->total);
        }
        job->add(job, &piece, (weights){w.powers, PIECE, w.factors}, job->sums + task * job->rows * job->v_size);
    }
}

/* A row of the output: the sums of all chunks added up, out of units, times scales, rounded. */
static void finish_row(void *context, int64_t number, int64_t thread) {
    const attention_job *job = context;
    const fp8cpu_attention_args *a = job->args;
    const place at = place_of(a, number), keys = keys_of(a, at);
    const int64_t head = number / job->rows, row = number % job->rows, size = value_size(a->type);
    const float *sums = job->sums + (head * job->chunks * job->rows + row) * job->v_size;
    const float *of_chunks = job->largest + number * job->chunks_size;
    const float of_values = a->v_scale_stride[2] ? 1.0f : scale_at(a->v_scale, a->v_scale_stride, keys);
    const float of_output = single(a->output_scale), of_probabilities = single(a->p_scale);
    char *y = (char *)a->y + ((at.batch * a->queries + at.query) * a->heads + at.head) * a->value_dim * size;
    if (!job->two_passes) settle_row(context, number, thread);
    for (int64_t step = 0; step < job->v_size; step += STEP) {
        float values[STEP];
        for (int i = 0; i < 4; i++) {
            vf sum = splat(0);
            for (int64_t c = 0; c < job->chunks; c++)
                sum += load_floats(sums + c * job->rows * job->v_size + step + i * LANES) * of_chunks[c];
            sum = sum * of_probabilities * of_values;
            if (a->output_scale)
                sum = to_grid(sum * (1.0f / of_output), (float)a->full_scale, format_of(a->format)) * of_output;
            for (int lane = 0; lane < LANES; lane++) values[code_of(i, lane)] = sum[lane];
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

static attention_job job_for(const fp8cpu_attention_args *a) {
    attention_job job = {.args = a, .rows = a->heads / a->key_heads * a->queries, .chunk = chunk_for(a)};
    choose_kinds(&job);
    job.two_passes = a->p_scale || a->rounds_scores;
    job.q_size = divide_up(a->key_dim, STEP) * (makes_pairs(a) ? STEP / 2 : STEP);
    job.v_size = divide_up(a->value_dim, STEP) * STEP;
    job.k_ahead = ahead_of(a->k_stride[2]);
    job.v_ahead = ahead_of(a->v_stride[2]);
    job.chunks = divide_up(a->keys, job.chunk);
    job.chunks_size = divide_up(job.chunks, LANES) * LANES;
    job.scratch_size = workspace_size(job.rows);
    return job;
}

/* Everything in one piece of memory: returned, or NULL. */
static float *allocate(attention_job *job, int64_t all_rows) {
    const int64_t of_rows = divide_up(all_rows * (int64_t)sizeof(score_row), STEP) * LANES, of_q = all_rows * job->q_size;
    const int64_t of_chunks = all_rows * job->chunks_size, of_sums = all_rows * job->chunks * job->v_size;
    float *room = aligned(of_rows + of_q + 2 * of_chunks + of_sums + job->args->threads * job->scratch_size);
    if (!room) return NULL;
    job->score_rows = (score_row *)room;
    job->q = room + of_rows;
    job->largest = job->q + of_q;
    job->total = job->largest + of_chunks;
    job->sums = job->total + of_chunks;
    job->scratch = job->sums + of_sums;
    return room;
}

int FP8CPU_NAME(attention)(const fp8cpu_attention_args *a) {
    const int64_t tasks_of_all = a->batch * a->key_heads, all_rows = a->batch * a->heads * a->queries;
    if (all_rows == 0 || a->value_dim == 0) return FP8CPU_OK;
    attention_job job = job_for(a);
    float *room = allocate(&job, all_rows);
    if (!room) return FP8CPU_NO_MEMORY;
    /* Waking threads takes longer than a few thousand operations. */
    const int64_t tasks = tasks_of_all * job.chunks, codes = tasks_of_all * a->keys * (a->key_dim + a->value_dim);
    const int64_t threads = codes < 1 << 16 ? 1 : a->threads;
    const int64_t few = all_rows * job.q_size < 1 << 15 ? 1 : a->threads;
    fp8cpu_parallel(prepare_row, &job, all_rows, few);
    fp8cpu_parallel(attend, &job, tasks, threads);
    if (job.two_passes) {
        fp8cpu_parallel(settle_row, &job, all_rows, few);
        fp8cpu_parallel(weigh, &job, tasks, threads);
    }
    fp8cpu_parallel(finish_row, &job, all_rows, all_rows * job.chunks * job.v_size < 1 << 16 ? 1 : a->threads);
    free(room);
    return FP8CPU_OK;
}
