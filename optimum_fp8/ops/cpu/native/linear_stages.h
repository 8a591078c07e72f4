/* The stages of a matrix product by its kinds of operands, for those who run several products side by side. A product
 * packs x, then multiplies it, each in tasks: with dot products where x has few rows, else in panels, whose products are
 * those of vectors or of tiles. */
#ifndef FP8CPU_LINEAR_STAGES_H
#define FP8CPU_LINEAR_STAGES_H

#include "linear_job.h"
#include "variant.h"
#if HAS_TILES
#include "linear_tiles.h"
#endif

/* What rows of x become: floats; pairs of bfloat16, half as large; such pairs with their scales behind them, no larger
 * than floats; or, where rows are many, tiles of pairs. */
enum { AS_FLOATS, AS_PAIRS, AS_SCALED_PAIRS, AS_TILES };

typedef struct {
    fp8cpu_task pack_dot, dot, pack_panel, panel; /* of a linear_job */
    int64_t dot_rows; /* of x: more are multiplied in panels */
    int packed;       /* AS_FLOATS ... */
} linear_stages;

/* Those that are fastest for a job, of its args and rows. */
const linear_stages *FP8CPU_NAME(linear_stages)(const linear_job *);

/* Rows of w a task takes: so many that x is read seldom, so few that all threads are busy to the end. */
static inline int64_t task_cols_for(int64_t n, int64_t threads, int few_rows) {
    const int64_t least = few_rows ? LANES : TILE_COLS > 32 ? TILE_COLS : 32, most = few_rows ? 32 : TASK_COLS;
    int64_t cols = most;
    while (cols > least && n < cols * threads * 6) cols /= 2;
    return cols;
}

/* How many tasks pack x. */
static inline int64_t packs_for(const linear_stages *stages, const linear_job *job, int few_rows) {
    if (few_rows) return job->rows;
#if HAS_TILES
    if (stages->packed == AS_TILES) return x_tiles(job->rows);
#endif
    (void)stages;
    return parts_of(job, TILE_ROWS);
}

/* Floats that the rows of x are, packed. */
static inline int64_t packed_size_for(const linear_stages *stages, const linear_job *job, int few_rows) {
#if HAS_TILES
    if (stages->packed == AS_TILES && !few_rows) return packed_tile_floats(job);
#endif
    (void)few_rows;
    return job->rows * job->steps * STEP / (stages->packed == AS_PAIRS ? 2 : 1);
}

/* Floats that a thread needs for a product. */
static inline int64_t scratch_size_for(const linear_stages *stages, const linear_job *job, int few_rows) {
#if HAS_TILES
    if (stages->packed == AS_TILES && !few_rows) return tile_scratch_floats(job, job->rows);
#endif
    (void)stages;
    const int64_t sums = job->rows * job->task_cols;
    const int64_t more = few_rows ? sums * LANES : TILE_COLS * PANEL_UNITS;
    return sums + more > job->steps * STEP ? sums + more : job->steps * STEP;
}

#endif
