/* Matrix products y = x w^T with FP8 weights as they lie in memory, [n, k]. Few rows of x: dot products, for which
 * codes become floats in registers, never in memory. Many rows: a packed GEMM, with panels of decoded weights that stay
 * in cache. */
#include "linear_dot.h"
#include "linear_panel.h"
#include "linear_parts.h"

/* The job with the weight that a task multiplies, and the task counted from that weight's first. */
static linear_job job_of_task(const linear_job *job, int64_t *task) {
    linear_job own = *job;
    int64_t w = 0;
    while (*task >= job->first_task[w + 1]) w++;
    own.args = job->weights + w;
    *task -= job->first_task[w];
    return own;
}

/* The four stages with `kind` a constant in each, so that the compiler leaves out what a kind does not need: two for few
 * rows of x, two for many. */
#define TASK(name, work, ...)                                                          \
    static void name(void *job, int64_t task, int64_t thread) {                        \
        const linear_job *j = job;                                                     \
        work(j, (kind)__VA_ARGS__, task, j->scratch + thread * j->scratch_size);       \
    }
#define TASK_OF_WEIGHT(name, work, ...)                                                \
    static void name(void *job, int64_t task, int64_t thread) {                        \
        const linear_job own = job_of_task(job, &task);                                \
        work(&own, (kind)__VA_ARGS__, task, thread);                                   \
    }
#define DOT_TASKS(suffix, ...)                          \
    TASK(pack_dot_##suffix, pack_steps, __VA_ARGS__)    \
    TASK_OF_WEIGHT(dot_##suffix, dot_task, __VA_ARGS__)
#define PANEL_TASKS(suffix, pack, multiply, ...)       \
    TASK(pack_panel_##suffix, pack, __VA_ARGS__)       \
    TASK_OF_WEIGHT(panel_##suffix, multiply, __VA_ARGS__)
#define STAGES_OF(suffix, few, dot_rows, packed) \
    static const linear_stages suffix = {pack_dot_##few, dot_##few, pack_panel_##suffix, panel_##suffix, dot_rows, packed};

#define STAGES(suffix, dot_rows, packed, ...)                 \
    DOT_TASKS(suffix, __VA_ARGS__)                            \
    PANEL_TASKS(suffix, pack_tile, panel_task, __VA_ARGS__)   \
    STAGES_OF(suffix, suffix, dot_rows, packed)
#define TILE_STAGES(suffix, few, ...)                         \
    PANEL_TASKS(suffix, pack_x_tile, tile_task, __VA_ARGS__)  \
    STAGES_OF(suffix, few, DOT_ROWS_BEFORE_TILES, AS_TILES)

STAGES(float_e4m3, DOT_ROWS, AS_FLOATS, {0, 0, 0, 0})
STAGES(float_e5m2, DOT_ROWS, AS_FLOATS, {0, 0, 1, 0})
STAGES(blocked_e4m3, DOT_ROWS, AS_FLOATS, {0, 1, 0, 0})
STAGES(blocked_e5m2, DOT_ROWS, AS_FLOATS, {0, 1, 1, 0})
#if defined(__AVX512BF16__)
STAGES(pairs_e4m3, DOT_ROWS_OF_PAIRS, AS_PAIRS, {1, 0, 0, 0})
STAGES(pairs_e5m2, DOT_ROWS_OF_PAIRS, AS_PAIRS, {1, 0, 1, 0})
STAGES(blocked_pairs_e4m3, DOT_ROWS_OF_PAIRS, AS_SCALED_PAIRS, {1, 1, 0, 0})
STAGES(blocked_pairs_e5m2, DOT_ROWS_OF_PAIRS, AS_SCALED_PAIRS, {1, 1, 1, 0})
PANEL_TASKS(folded_pairs_e4m3, pack_tile, panel_task, {1, 0, 0, 1})
PANEL_TASKS(folded_pairs_e5m2, pack_tile, panel_task, {1, 0, 1, 1})
STAGES_OF(folded_pairs_e4m3, blocked_pairs_e4m3, DOT_ROWS_OF_PAIRS, AS_PAIRS)
STAGES_OF(folded_pairs_e5m2, blocked_pairs_e5m2, DOT_ROWS_OF_PAIRS, AS_PAIRS)
#elif HAS_TILES
TILE_STAGES(tiles_e4m3, float_e4m3, {0, 0, 0, 0})
TILE_STAGES(tiles_e5m2, float_e5m2, {0, 0, 1, 0})
TILE_STAGES(blocked_tiles_e4m3, blocked_e4m3, {0, 1, 0, 0})
TILE_STAGES(blocked_tiles_e5m2, blocked_e5m2, {0, 1, 1, 0})
TILE_STAGES(folded_tiles_e4m3, blocked_e4m3, {0, 0, 0, 1})
TILE_STAGES(folded_tiles_e5m2, blocked_e5m2, {0, 0, 1, 1})
#endif

const linear_stages *FP8CPU_NAME(linear_stages)(const linear_job *job) {
    const fp8cpu_linear_args *a = job->args;
    const int e4m3 = a->w_format == FP8CPU_E4M3;
#if HAS_TILES || defined(__AVX512BF16__)
    const int fits_bfloat16 = a->x_scale || a->x_type == FP8CPU_BFLOAT16;
    const int one_scale = !a->x_group && !a->w_group; /* for all that a sum adds up */
    const int folded = fits_bfloat16 && a->w_group && job->rows >= FOLDED_ROWS && folds_scales(job);
#endif
#if HAS_TILES
    if (folded) return e4m3 ? &folded_tiles_e4m3 : &folded_tiles_e5m2;
    if (fits_bfloat16 && a->w_group) return e4m3 ? &blocked_tiles_e4m3 : &blocked_tiles_e5m2;
    if (fits_bfloat16 && one_scale) return e4m3 ? &tiles_e4m3 : &tiles_e5m2;
#elif defined(__AVX512BF16__)
    if (folded) return e4m3 ? &folded_pairs_e4m3 : &folded_pairs_e5m2;
    if (fits_bfloat16 && a->w_group) return e4m3 ? &blocked_pairs_e4m3 : &blocked_pairs_e5m2;
    if (fits_bfloat16 && one_scale) return e4m3 ? &pairs_e4m3 : &pairs_e5m2;
#endif
    if (a->w_group) return e4m3 ? &blocked_e4m3 : &blocked_e5m2;
    return e4m3 ? &float_e4m3 : &float_e5m2;
}

static const linear_stages *stages_for(const fp8cpu_linear_args *a) {
    const linear_job job = {.args = a, .rows = a->m};
    return FP8CPU_NAME(linear_stages)(&job);
}

/* Whether both multiply the same packed x: then they are one job. */
static int shares_input(const fp8cpu_linear_args *a, const fp8cpu_linear_args *b) {
    if (a->x != b->x || a->places != b->places || a->m != b->m || a->k != b->k || a->w_group != b->w_group || a->x_group != b->x_group || a->w_format != b->w_format) return 0;
    if (a->w_group && stages_for(a) != stages_for(b)) return 0;
    if (!a->x_scale || !b->x_scale) return !a->x_scale && !b->x_scale;
    if (a->x_scale == b->x_scale && a->x_scale_step == b->x_scale_step) return 1;
    return !a->x_scale_step && !b->x_scale_step && *(const float *)a->x_scale == *(const float *)b->x_scale;
}

/* Products are run side by side as long as there are not too many of them, nor of their packed rows. */
enum { MAX_PARTS = 64, PACKED_FLOATS = 1 << 22 };

/* The parts of `count` products of the same x, PASS_ROWS rows each at most, are added to those that are there, which are
 * run before they become too many. */
static int add_parts(side_by_side *all, const fp8cpu_linear_args *a, int64_t count) {
    const linear_stages *stages = stages_for(a);
    const int few_rows = a->m <= stages->dot_rows;
    int status = FP8CPU_OK;
    for (int64_t row = 0; row < a->m && status == FP8CPU_OK; row += PASS_ROWS) {
        const linear_job job = {.args = a, .weights = a, .count = count, .steps = divide_up(a->k, STEP),
                                .first_row = row, .rows = smaller(PASS_ROWS, a->m - row)};
        const int64_t size = packed_size_for(stages, &job, few_rows);
        if (all->count == MAX_PARTS || (all->count && all->packed_size + size > PACKED_FLOATS)) status = run_parts(all);
        all->parts[all->count++] = (part){.job = job, .stages = stages, .few_rows = few_rows};
        all->packed_size += size;
    }
    return status;
}

int FP8CPU_NAME(linear)(const fp8cpu_linear_args *args, int64_t count) {
    part parts[MAX_PARTS];
    side_by_side all = {.parts = parts, .threads = args->threads};
    int status = FP8CPU_OK;
    for (int64_t first = 0, next; first < count && status == FP8CPU_OK; first = next) {
        for (next = first + 1; next < count && next < first + MAX_WEIGHTS; next++)
            if (!shares_input(args + first, args + next)) break;
        status = add_parts(&all, args + first, next - first);
    }
    return status == FP8CPU_OK ? run_parts(&all) : status;
}
