/* Flash decoding over an FP8 cache: attention of a few rows of queries, split along the positions of keys and values,
 * with an online softmax. It is bound by reading the cache, so each code is read once, for all heads of queries that
 * share it (grouped-query attention), and becomes a number in registers only. A task takes a split of a key head, tile
 * by tile:
 *
 * 1. scores of a tile: dot products of rows of queries with rows of keys, and what the softmax does to them;
 * 2. the online softmax: exp(score - running maximum), and accumulators, of rows of values times these exponentials;
 * 3. when all splits are done, they are combined: their accumulators are weighted, added up, scaled and rounded.
 *
 * Where probabilities are rounded, to FP8 or to the queries' type, the sum of exponentials must be known before. All
 * scores are kept then, and values are multiplied with probabilities in a second pass. */
#include "attention_job.h"

#include <math.h>

#include "attention_scores.h"
#include "attention_values.h"
#if ATTENDS_ON_TILES
#include "attention_tiles.h"
#endif
#include "functions.h"
#include "parallel.h"

/* --- kinds of codes ----------------------------------------------------------------------------------------------- */

/* The two products with `kind` a constant in each, so that the compiler leaves out what a kind does not need. */
#define DOT(suffix, multiply, ...)                                                                             \
    static void dot_##suffix(const attention_job *job, const key_range *keys, float *out, int64_t out_stride, \
                             float *work) {                                                                   \
        (void)work;                                                                                           \
        multiply(job, __VA_ARGS__);                                                                           \
    }
#define ADD(suffix, multiply, ...)                                                                               \
    static void add_##suffix(const attention_job *job, const key_range *values, attention_weights w, float *acc, \
                             float *work) {                                                                      \
        (void)work;                                                                                              \
        multiply(job, __VA_ARGS__);                                                                              \
    }

DOT(e4m3, dot_rows, (kind){0, 0}, keys, out, out_stride)
DOT(e5m2, dot_rows, (kind){0, 1}, keys, out, out_stride)
#if defined(__AVX512BF16__)
DOT(e4m3_pairs, dot_rows, (kind){1, 0}, keys, out, out_stride)
DOT(e5m2_pairs, dot_rows, (kind){1, 1}, keys, out, out_stride)
#endif
ADD(e4m3, add_rows, (kind){0, 0}, values, w, acc)
ADD(e5m2, add_rows, (kind){0, 1}, values, w, acc)
#if ATTENDS_ON_TILES
DOT(e4m3_tiles, dot_tiles, 0, keys, out, out_stride, work)
DOT(e5m2_tiles, dot_tiles, 1, keys, out, out_stride, work)
ADD(e4m3_tiles, add_tiles, 0, values, w, acc, work)
ADD(e5m2_tiles, add_tiles, 1, values, w, acc, work)
static void pack_tile_column(const attention_job *job, int64_t number) { pack_query_column(job, number); }
#endif

/* How the job's products are formed, and with that what rows of queries and accumulators look like. */
static void choose_kernels(attention_job *job) {
    const fp8cpu_attention_args *a = job->args;
    const int k_e5m2 = a->k_format == FP8CPU_E5M2, v_e5m2 = a->v_format == FP8CPU_E5M2;
    job->pack = pack_query;
    job->dot = k_e5m2 ? dot_e5m2 : dot_e4m3;
#if defined(__AVX512BF16__)
    if (uses_bf16_pairs(a)) job->dot = k_e5m2 ? dot_e5m2_pairs : dot_e4m3_pairs;
#endif
    job->add = v_e5m2 ? add_e5m2 : add_e4m3;
    job->row_room = job->rows;
    job->q_size = divide_up(a->key_dim, STEP) * (uses_bf16_pairs(a) ? STEP / 2 : STEP);
    job->v_size = divide_up(a->value_dim, STEP) * STEP;
#if ATTENDS_ON_TILES
    const int64_t least = HAS_TILES ? QUERY_ROWS_BEFORE_TILES : QUERY_ROWS_BEFORE_TILES_OF_PAIRS;
    if (job->rows < least || !queries_fit_bfloat16(a)) return;
    job->tiles = 1;
    job->pack = pack_tile_column;
    job->dot = k_e5m2 ? dot_e5m2_tiles : dot_e4m3_tiles;
    job->add = v_e5m2 ? add_e5m2_tiles : add_e4m3_tiles;
    job->row_room = divide_up(job->rows, TILE_SIDE) * TILE_SIDE;
    job->q_size = blocks_of(a->key_dim) * TILE_CODES / 2;
    job->v_size = divide_up(a->value_dim, TILE_SIDE) * TILE_SIDE;
#endif
}

/* What tiles need around them; nothing elsewhere. */
static int64_t work_size(const attention_job *job) {
#if ATTENDS_ON_TILES
    if (job->tiles) return tile_work_floats(job->args);
#endif
    return job->tiles;
}
static void begin_products(const attention_job *job) {
#if ATTENDS_ON_TILES
    if (job->tiles) tiles_begin();
#endif
    (void)job;
}
static void end_products(const attention_job *job) {
#if ATTENDS_ON_TILES
    if (job->tiles) tiles_end();
#endif
    (void)job;
}

/* --- first pass: scores and the online softmax -------------------------------------------------------------------- */

/* A row of queries packed, the constants of its scores, and its maxima and sums of exponentials at their start. */
static void prepare_row(void *context, int64_t number, int64_t thread) {
    const attention_job *job = context;
    (void)thread;
    job->pack(job, number);
    job->score_rows[number] = score_row_of(job->args, number);
    for (int64_t c = 0; c < job->splits_stride; c++) { /* those behind the last split count for nothing */
        job->max_score[number * job->splits_stride + c] = -INFINITY;
        job->exp_sum[number * job->splits_stride + c] = 0;
    }
}

/* The split that a task takes. */
INLINE key_range split_of(const attention_job *job, int64_t task) {
    const fp8cpu_attention_args *a = job->args;
    const int64_t head = task / job->splits, first = task % job->splits * job->split_size;
    const int64_t count = smaller(job->split_size, a->keys - first);
    return (key_range){head, count, {head / a->key_heads, head % a->key_heads, first}};
}

INLINE key_range tile_of(key_range split, int64_t at) {
    split.count = smaller(TILE, split.count - at);
    split.first.position += at;
    return split;
}

/* A thread's scratch for a split: the state of the online softmax. */
typedef struct {
    float *work;         /* what products need */
    float *exponentials; /* [row_room, TILE]: of scores, or probabilities; zeros behind them */
    float *exp_sums;     /* [rows, LANES]: running sums of exponentials */
    float *max_score;    /* [rows]: running maxima of scores */
    float *rescale;      /* [rows]: what accumulators are to be multiplied with, as the maximum has grown */
} workspace;

static int64_t workspace_size(const attention_job *job) {
    return work_size(job) + divide_up(job->row_room * TILE + job->rows * (LANES + 2), STEP) * STEP;
}

INLINE workspace workspace_of(const attention_job *job, int64_t thread) {
    float *work = job->scratch + thread * job->scratch_size, *memory = work + work_size(job);
    float *exp_sums = memory + job->row_room * TILE;
    return (workspace){work, memory, exp_sums, exp_sums + job->rows * LANES, exp_sums + job->rows * (LANES + 1)};
}

static void multiply(float *x, const float *scales, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] *= scales[i];
}

/* A step of the online softmax: products of a tile to exp(score - running maximum). Where a row's maximum grows, what
 * was relative to the smaller one is rescaled. */
static void online_softmax_step(const attention_job *job, const key_range *tile, float *x, int64_t stride,
                                workspace w) {
    for (int64_t row = 0; row < job->rows; row++) {
        const score_row *r = job->score_rows + tile->head * job->rows + row;
        const float found = make_scores(r, x + row * stride, tile->first.position, tile->count);
        float *exp_sum = w.exp_sums + row * LANES, max_score = w.max_score[row];
        w.rescale[row] = 1;
        if (found > max_score) { /* seldom, after a few tiles */
            w.rescale[row] = exp_of(splat(max_score - found))[0];
            w.max_score[row] = max_score = found;
        }
        if (max_score == -INFINITY) max_score = 0; /* nothing but masked scores: exponentials are 0 */
        const vf sum = exponentiate(x + row * stride, w.exponentials + row * TILE, tile->count, max_score);
        store_floats(exp_sum, load_floats(exp_sum) * w.rescale[row] + sum);
        if (r->v_scale) multiply(w.exponentials + row * TILE, r->v_scale + tile->first.position, tile->count);
    }
}

INLINE float *scores_of(const attention_job *job, const key_range *tile) {
    return (float *)job->args->scores + tile->head * job->rows * job->args->scores_stride + tile->first.position;
}

/* The first pass over a split, and the only one where probabilities are not rounded. */
static void first_pass(void *context, int64_t task, int64_t thread) {
    const attention_job *job = context;
    const key_range split = split_of(job, task);
    const workspace w = workspace_of(job, thread);
    float *acc = job->acc + task * job->row_room * job->v_size;
    memset(acc, 0, (size_t)(job->row_room * job->v_size) * sizeof(float));
    memset(w.exp_sums, 0, (size_t)(job->rows * LANES) * sizeof(float));
    if (job->tiles) memset(w.exponentials, 0, (size_t)(job->row_room * TILE) * sizeof(float));
    for (int64_t row = 0; row < job->rows; row++) w.max_score[row] = -INFINITY;
    begin_products(job);
    for (int64_t at = 0; at < split.count; at += TILE) {
        const key_range tile = tile_of(split, at);
        float *x = job->two_passes ? scores_of(job, &tile) : w.exponentials;
        const int64_t stride = job->two_passes ? job->args->scores_stride : TILE;
        job->dot(job, &tile, x, stride, w.work);
        online_softmax_step(job, &tile, x, stride, w);
        if (!job->two_passes) job->add(job, &tile, (attention_weights){w.exponentials, TILE, w.rescale}, acc, w.work);
    }
    end_products(job);
    for (int64_t row = 0; row < job->rows; row++) {
        const int64_t at = (split.head * job->rows + row) * job->splits_stride + task % job->splits;
        job->max_score[at] = w.max_score[row];
        job->exp_sum[at] = sum_of_lanes(load_floats(w.exp_sums + row * LANES));
    }
}

/* --- combining splits, and the second pass ------------------------------------------------------------------------ */

/* Combines the splits of a row: the maximum of its scores and the sum of its exponentials over all of them. Each
 * split's maximum is replaced by the weight of its accumulators. */
static void combine_row(void *context, int64_t number, int64_t thread) {
    const attention_job *job = context;
    score_row *row = job->score_rows + number;
    float *max_score = job->max_score + number * job->splits_stride;
    const float *exp_sum = job->exp_sum + number * job->splits_stride;
    vf most = splat(row->sink), sum = splat(0);
    (void)thread;
    for (int64_t c = 0; c < job->splits_stride; c += LANES) most = larger_float(load_floats(max_score + c), most);
    row->max_score = largest_lane(most);
    for (int64_t c = 0; c < job->splits_stride; c += LANES) {
        const vf weight = exp_of(load_floats(max_score + c) - row->max_score);
        store_floats(max_score + c, weight);
        sum += weight * load_floats(exp_sum + c);
    }
    row->exp_sum = sum_of_lanes(sum) + exp_of(splat(row->sink - row->max_score))[0];
    for (int64_t c = 0; c < job->splits; c++) max_score[c] = job->two_passes ? 1 : max_score[c] / row->exp_sum;
}

/* The second pass over a split, where probabilities are rounded: values times probabilities. */
static void second_pass(void *context, int64_t task, int64_t thread) {
    const attention_job *job = context;
    const key_range split = split_of(job, task);
    const workspace w = workspace_of(job, thread);
    for (int64_t row = 0; row < job->rows; row++) w.rescale[row] = 1;
    begin_products(job);
    for (int64_t at = 0; at < split.count; at += TILE) {
        const key_range tile = tile_of(split, at);
        for (int64_t row = 0; row < job->rows; row++) {
            const score_row *r = job->score_rows + tile.head * job->rows + row;
            float *p = w.exponentials + row * TILE;
            exponentiate(scores_of(job, &tile) + row * job->args->scores_stride, p, tile.count, r->max_score);
            make_probabilities(r, p, tile.first.position, tile.count, r->exp_sum);
        }
        job->add(job, &tile, (attention_weights){w.exponentials, TILE, w.rescale},
                 job->acc + task * job->row_room * job->v_size, w.work);
    }
    end_products(job);
}

/* Where accumulators of LANES columns of a row of queries are, of its first split: in units, or in tiles. */
INLINE const float *accumulators_at(const attention_job *job, int64_t number, int64_t column) {
    const int64_t head = number / job->rows, row = number % job->rows;
    const float *acc = job->acc + head * job->splits * job->row_room * job->v_size;
    if (!job->tiles) return acc + row * job->v_size + column;
    const int64_t tile = row / 16 * job->v_size / 16 + column / 16; /* of 16 x 16 */
    return acc + tile * 256 + row % 16 * 16 + column % 16;
}

/* A row of the output: the accumulators of all splits, weighted and added up, out of units, times scales, rounded. */
static void output_row(void *context, int64_t number, int64_t thread) {
    const attention_job *job = context;
    const fp8cpu_attention_args *a = job->args;
    const index3 at = index_of_row(a, number), keys = key_head_of(a, at);
    const int64_t size = value_size(a->type);
    const float *split_weights = job->max_score + number * job->splits_stride;
    const float v_scale = a->v_scale_stride[2] ? 1.0f : scale_at(a->v_scale, a->v_scale_stride, keys);
    const float output_scale = scale_per_tensor(a->output_scale), p_scale = scale_per_tensor(a->p_scale);
    char *y = (char *)a->y + ((at.batch * a->queries + at.position) * a->heads + at.head) * a->value_dim * size;
    if (!job->two_passes) combine_row(context, number, thread);
    for (int64_t step = 0; step < job->v_size; step += STEP) {
        float values[STEP];
        for (int i = 0; i < 4 && step + i * LANES < job->v_size; i++) {
            const float *acc = accumulators_at(job, number, step + i * LANES);
            vf sum = splat(0);
            for (int64_t c = 0; c < job->splits; c++)
                sum += load_floats(acc + c * job->row_room * job->v_size) * split_weights[c];
            sum = sum * (p_scale * v_scale);
            if (a->output_scale)
                sum = to_grid(sum * (1.0f / output_scale), (float)a->full_scale, format_of(a->format)) * output_scale;
            for (int lane = 0; lane < LANES; lane++)
                values[job->tiles ? i * LANES + lane : element_of(i, lane)] = sum[lane];
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

/* --- launch ------------------------------------------------------------------------------------------------------- */

/* Positions of a split: so few that all threads are busy to the end, so many that memory is read in long runs; and where
 * rows of queries are many, that what splits cost, which are their accumulators, are few. */
static int64_t split_size_for(const attention_job *job) {
    const fp8cpu_attention_args *a = job->args;
    const int64_t tasks = a->threads * (job->tiles && job->rows > TILE ? 4 : 16);
    const int64_t fair = divide_up(a->batch * a->key_heads * a->keys, tasks);
    const int64_t bounded = fair < MIN_SPLIT ? MIN_SPLIT : smaller(fair, MAX_SPLIT);
    return divide_up(bounded, TILE) * TILE;
}

static attention_job job_for(const fp8cpu_attention_args *a) {
    attention_job job = {.args = a, .rows = a->heads / a->key_heads * a->queries};
    choose_kernels(&job);
    job.split_size = split_size_for(&job);
    job.two_passes = a->p_scale || a->rounds_scores || a->rounds_probabilities;
    job.k_prefetch = prefetch_distance(a->k_stride[2], a->key_dim);
    job.v_prefetch = prefetch_distance(a->v_stride[2], a->value_dim);
    job.splits = divide_up(a->keys, job.split_size);
    job.splits_stride = divide_up(job.splits, LANES) * LANES;
    job.scratch_size = workspace_size(&job);
    return job;
}

/* All that the job points to, in one allocation: returned, or NULL. */
static float *allocate(attention_job *job, int64_t all_rows) {
    const int64_t room = job->args->batch * job->args->key_heads * job->row_room;
    const int64_t row_floats = divide_up(all_rows * (int64_t)sizeof(score_row), STEP) * LANES;
    const int64_t q_floats = room * job->q_size, split_floats = divide_up(all_rows * job->splits_stride, STEP) * STEP;
    const int64_t acc_floats = room * job->splits * job->v_size;
    const int64_t shared_floats = row_floats + q_floats + 2 * split_floats + acc_floats;
    float *memory = aligned(shared_floats + job->args->threads * job->scratch_size);
    if (!memory) return NULL;
    job->score_rows = (score_row *)memory;
    job->q = memory + row_floats;
    job->max_score = job->q + q_floats;
    job->exp_sum = job->max_score + split_floats;
    job->acc = job->exp_sum + split_floats;
    job->scratch = job->acc + acc_floats;
    return memory;
}

int FP8CPU_NAME(attention)(const fp8cpu_attention_args *a) {
    const int64_t key_heads = a->batch * a->key_heads, all_rows = a->batch * a->heads * a->queries;
    if (all_rows == 0 || a->value_dim == 0) return FP8CPU_OK;
    attention_job job = job_for(a);
    float *memory = allocate(&job, all_rows);
    if (!memory) return FP8CPU_NO_MEMORY;
    /* Waking threads takes longer than a few thousand operations. */
    const int64_t tasks = key_heads * job.splits, codes = key_heads * a->keys * (a->key_dim + a->value_dim);
    const int64_t threads = codes < 1 << 16 ? 1 : a->threads;
    const int64_t row_threads = all_rows * job.q_size < 1 << 15 ? 1 : a->threads;
    fp8cpu_parallel(prepare_row, &job, all_rows, row_threads);
    fp8cpu_parallel(first_pass, &job, tasks, threads);
    if (job.two_passes) {
        fp8cpu_parallel(combine_row, &job, all_rows, row_threads);
        fp8cpu_parallel(second_pass, &job, tasks, threads);
    }
    fp8cpu_parallel(output_row, &job, all_rows, all_rows * job.splits * job.v_size < 1 << 16 ? 1 : a->threads);
    free(memory);
    return FP8CPU_OK;
}
