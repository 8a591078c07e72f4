/* Matrix products y = x w^T with FP8 weights as they lie in memory, [n, k]. Few rows of x: dot products, for which
 * codes become floats in registers, never in memory. Many rows: a packed GEMM, with panels of decoded weights that stay
 * in cache. */
#include "linear_dot.h"
#include "linear_panel.h"
#include "linear_stages.h"

/* The job with the weight that a task multiplies, and the task counted from that weight's first. */
static linear_job job_of_task(const linear_job *job, int64_t *task) {
    linear_job own = *job;
    int64_t w = 0;
    while (*task >= job->first_task[w + 1]) w++;
    own.args = job->weights + w;
    *task -= job->first_task[w];
    return own;
}

/* The four stages with `kind` a constant in each, so that the compiler leaves out what a kind does not need. */
#define STAGES(suffix, dot_rows, ...) STAGES_OF(suffix, dot_rows, pack_tile, panel_task, 0, __VA_ARGS__)
#define STAGES_OF(suffix, dot_rows, pack, multiply, tiles, ...)                                                                   \
    static void pack_dot_##suffix(void *job, int64_t task, int64_t thread) {                            \
        const linear_job *j = job;                                                                      \
        pack_steps(j, (kind)__VA_ARGS__, task, j->scratch + thread * j->scratch_size);                  \
    }                                                                                                   \
    static void dot_##suffix(void *job, int64_t task, int64_t thread) {                                 \
        const linear_job own = job_of_task(job, &task);                                                 \
        dot_task(&own, (kind)__VA_ARGS__, task, thread);                                                \
    }                                                                                                   \
    static void pack_panel_##suffix(void *job, int64_t task, int64_t thread) {                          \
        const linear_job *j = job;                                                                      \
        pack(j, (kind)__VA_ARGS__, task, j->scratch + thread * j->scratch_size);                        \
    }                                                                                                   \
    static void panel_##suffix(void *job, int64_t task, int64_t thread) {                               \
        const linear_job own = job_of_task(job, &task);                                                 \
        multiply(&own, (kind)__VA_ARGS__, task, thread);                                                \
    }                                                                                                   \
    static const linear_stages suffix = {pack_dot_##suffix, dot_##suffix, pack_panel_##suffix, panel_##suffix, \
                                         dot_rows, tiles};

STAGES(float_e4m3, DOT_ROWS, {0, 0, 0})
STAGES(float_e5m2, DOT_ROWS, {0, 0, 1})
STAGES(blocked_e4m3, DOT_ROWS, {0, 1, 0})
STAGES(blocked_e5m2, DOT_ROWS, {0, 1, 1})
#if defined(__AVX512BF16__)
STAGES(pairs_e4m3, DOT_ROWS_OF_PAIRS, {1, 0, 0})
STAGES(pairs_e5m2, DOT_ROWS_OF_PAIRS, {1, 0, 1})
#elif HAS_TILES
STAGES_OF(tiles_e4m3, DOT_ROWS_BEFORE_TILES, pack_x_tile, tile_task, 1, {0, 0, 0})
STAGES_OF(tiles_e5m2, DOT_ROWS_BEFORE_TILES, pack_x_tile, tile_task, 1, {0, 0, 1})
STAGES_OF(blocked_tiles_e4m3, DOT_ROWS_BEFORE_TILES, pack_x_tile, tile_task, 1, {0, 1, 0})
STAGES_OF(blocked_tiles_e5m2, DOT_ROWS_BEFORE_TILES, pack_x_tile, tile_task, 1, {0, 1, 1})
#endif

const linear_stages *FP8CPU_NAME(linear_stages)(const fp8cpu_linear_args *a) {
    const int e4m3 = a->w_format == FP8CPU_E4M3;
    const int fits_bfloat16 = a->x_scale || a->x_type == FP8CPU_BFLOAT16;
#if HAS_TILES
    if (fits_bfloat16 && a->block == SCALED_CODES) return e4m3 ? &blocked_tiles_e4m3 : &blocked_tiles_e5m2;
    if (fits_bfloat16 && !a->block) return e4m3 ? &tiles_e4m3 : &tiles_e5m2;
#endif
    if (a->block) return e4m3 ? &blocked_e4m3 : &blocked_e5m2;
#if defined(__AVX512BF16__)
    if (fits_bfloat16) return e4m3 ? &pairs_e4m3 : &pairs_e5m2;
#endif
    (void)fits_bfloat16;
    return e4m3 ? &float_e4m3 : &float_e5m2;
}

/* Whether both multiply the same packed x: then they are one job. */
static int shares_input(const fp8cpu_linear_args *a, const fp8cpu_linear_args *b) {
    if (a->x != b->x || a->m != b->m || a->k != b->k || !a->block != !b->block || a->w_format != b->w_format) return 0;
    if (!a->x_scale || !b->x_scale) return !a->x_scale && !b->x_scale;
    if (a->x_scale == b->x_scale && a->x_scale_step == b->x_scale_step) return 1;
    return !a->x_scale_step && !b->x_scale_step && *(const float *)a->x_scale == *(const float *)b->x_scale;
}

static void plan_tasks(linear_job *job, int few_rows) {
    int64_t n = 0;
    for (int64_t w = 0; w < job->count; w++) n += job->weights[w].n;
    job->task_cols = task_cols_for(n, job->args->threads, few_rows);
    for (int64_t w = 0; w < job->count; w++)
        job->first_task[w + 1] = job->first_task[w] + divide_up(job->weights[w].n, job->task_cols);
}

static int multiply(const fp8cpu_linear_args *a, int64_t count) {
    const linear_stages *run = FP8CPU_NAME(linear_stages)(a);
    const int few_rows = a->m <= run->dot_rows;
    linear_job job = {.args = a, .weights = a, .count = count, .steps = divide_up(a->k, STEP)};
    const int64_t padded_k = job.steps * STEP, pass = few_rows ? a->m : smaller(a->m, PASS_ROWS);
    plan_tasks(&job, few_rows);
    job.scratch_size = divide_up(scratch_size_for(run, &job, pass, few_rows), STEP) * STEP;
    job.x = aligned(packed_size_for(run, &job, pass, few_rows));
    job.scratch = aligned(job.scratch_size * a->threads);
    if (!job.x || !job.scratch) {
        free(job.x);
        free(job.scratch);
        return FP8CPU_NO_MEMORY;
    }
    for (; job.first_row < a->m; job.first_row += job.rows) {
        job.rows = smaller(pass, a->m - job.first_row);
        const int64_t threads = job.rows * padded_k < 1 << 14 ? 1 : a->threads;
        fp8cpu_parallel(few_rows ? run->pack_dot : run->pack_panel, &job, packs_for(run, &job, few_rows), threads);
        fp8cpu_parallel(few_rows ? run->dot : run->panel, &job, job.first_task[count], a->threads);
    }
    free(job.x);
    free(job.scratch);
    return FP8CPU_OK;
}

int FP8CPU_NAME(linear)(const fp8cpu_linear_args *args, int64_t count) {
    for (int64_t first = 0, next; first < count; first = next) {
        for (next = first + 1; next < count && next < first + MAX_WEIGHTS; next++)
            if (!shares_input(args + first, args + next)) break;
        if (args[first].m == 0) continue;
        const int status = multiply(args + first, next - first);
        if (status != FP8CPU_OK) return status;
    }
    return FP8CPU_OK;
}
