/* Rows that are each multiplied with the weight of their expert. They are sorted by expert; those of an expert are a
 * part, a product of its own, or several where they are many. All parts' tasks are run side by side. */
#ifndef FP8CPU_GROUPED_PARTS_H
#define FP8CPU_GROUPED_PARTS_H

#include "linear_stages.h"

enum { MOST_FLOATS = 1 << 25 }; /* of working memory at a time: what takes more is done in several passes */

typedef struct {
    linear_job job;
    fp8cpu_linear_args args;
    const linear_stages *stages;
    int few_rows;
    int64_t first_pack, first_task; /* its tasks among those of all parts, */
    int64_t first_packed;           /* and its packed rows, in floats */
} part;

typedef struct {
    part *parts;
    int64_t count, packs, tasks, threads, packed_size;
    float *x, *scratch; /* packed rows of all parts; of all threads */
} grouped_product;

/* --- sorting ------------------------------------------------------------------------------------------------------- */

/* Row order[i] is the i-th by expert; those of expert e begin at first[e]. Rows of no expert are left out. */
static inline void sort_by_expert(const int64_t *expert_of_row, int64_t rows, int64_t experts, int64_t *first,
                                  int64_t *order) {
    memset(first, 0, (size_t)(experts + 1) * sizeof *first);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t expert = expert_of_row[row];
        if (expert >= 0 && expert < experts) first[expert]++;
    }
    for (int64_t expert = 0, sum = 0; expert <= experts; expert++) {
        const int64_t count = first[expert];
        first[expert] = sum;
        sum += count;
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t expert = expert_of_row[row];
        if (expert >= 0 && expert < experts) order[first[expert]++] = row;
    }
    for (int64_t expert = experts; expert > 0; expert--) first[expert] = first[expert - 1];
    first[0] = 0;
}

typedef struct {
    int64_t rows, expert;
} rows_of_expert;

static inline int fewer_rows(const void *one, const void *other) {
    const rows_of_expert *a = one, *b = other;
    if (a->rows != b->rows) return a->rows < b->rows ? -1 : 1;
    return a->expert < b->expert ? -1 : 1;
}

/* --- parts --------------------------------------------------------------------------------------------------------- */

/* A part of `rows` rows from `first_row` on. `like` says where rows are in x and y, or what makes them. */
static inline part part_of(const fp8cpu_grouped_args *a, const linear_job *like, int64_t expert, int64_t first_row,
                           int64_t rows) {
    part p = {.job = *like, .args = a->product};
    fp8cpu_linear_args *own = &p.args;
    own->w += expert * own->n * own->k;
    own->w_scale += expert * a->w_scale_size * (int64_t)sizeof(float);
    if (own->bias) own->bias += expert * own->n * value_size(own->bias_type);
    if (own->x_scale && a->x_scale_expert) own->x_scale += expert * (int64_t)sizeof(float);
    p.stages = FP8CPU_NAME(linear_stages)(own);
    p.few_rows = rows <= p.stages->dot_rows;
    p.job.first_row = first_row;
    p.job.rows = rows;
    if (like->x_rows) p.job.x_rows += first_row;
    if (like->y_rows) p.job.y_rows += first_row;
    p.job.steps = divide_up(own->k, STEP);
    return p;
}

/* The parts in ascending order of their rows. Threads claim many tasks at a time at first, few at the end: so they finish
 * together, however many rows an expert has. */
static inline void cut_into_parts(grouped_product *g, const fp8cpu_grouped_args *a, const linear_job *like,
                                  const int64_t *first, rows_of_expert *sorted) {
    int64_t active = 0;
    for (int64_t e = 0; e < a->experts; e++)
        if (first[e + 1] > first[e]) sorted[active++] = (rows_of_expert){first[e + 1] - first[e], e};
    qsort(sorted, (size_t)active, sizeof *sorted, fewer_rows);
    for (int64_t i = 0; i < active; i++)
        for (int64_t row = 0; row < sorted[i].rows; row += PASS_ROWS) {
            const int64_t expert = sorted[i].expert, rows = smaller(PASS_ROWS, sorted[i].rows - row);
            g->parts[g->count++] = part_of(a, like, expert, first[expert] + row, rows);
        }
}

/* Where the tasks and packed rows of each part begin; returns how many floats a thread needs. */
static inline int64_t plan_parts(grouped_product *g, int64_t n) {
    int64_t scratch_size = 0;
    for (int64_t i = 0; i < g->count; i++) {
        part *p = g->parts + i;
        linear_job *job = &p->job;
        job->args = job->weights = &p->args;
        job->count = 1;
        job->task_cols = task_cols_for(n * g->count, g->threads, p->few_rows);
        job->first_task[1] = divide_up(n, job->task_cols);
        p->first_packed = g->packed_size;
        g->packed_size += packed_size_for(p->stages, job, job->rows, p->few_rows);
        p->first_pack = g->packs;
        p->first_task = g->tasks;
        g->packs += packs_for(p->stages, job, p->few_rows);
        g->tasks += job->first_task[1];
        const int64_t size = scratch_size_for(p->stages, job, job->rows, p->few_rows);
        if (size > scratch_size) scratch_size = size;
    }
    return divide_up(scratch_size, STEP) * STEP;
}

/* --- running ------------------------------------------------------------------------------------------------------- */

/* The part that a task belongs to, of those that pack or those that multiply; the task becomes that part's own. */
static inline part *part_of_task(const grouped_product *g, int packs, int64_t *task) {
    int64_t low = 0, high = g->count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        const part *p = g->parts + middle;
        *((packs ? p->first_pack : p->first_task) <= *task ? &low : &high) = middle;
    }
    *task -= packs ? g->parts[low].first_pack : g->parts[low].first_task;
    return g->parts + low;
}

static void pack_rows_of_part(void *context, int64_t task, int64_t thread) {
    part *p = part_of_task(context, 1, &task);
    (p->few_rows ? p->stages->pack_dot : p->stages->pack_panel)(&p->job, task, thread);
}

static void multiply_part(void *context, int64_t task, int64_t thread) {
    part *p = part_of_task(context, 0, &task);
    (p->few_rows ? p->stages->dot : p->stages->panel)(&p->job, task, thread);
}

/* The product of rows that are sorted by expert: those of expert e are first[e] ... first[e + 1] - 1. */
static inline int multiply_grouped(const fp8cpu_grouped_args *a, const linear_job *like, const int64_t *first) {
    const int64_t rows = first[a->experts], active = smaller(a->experts, rows);
    grouped_product g = {.threads = a->product.threads < 1 ? 1 : a->product.threads};
    if (!rows) return FP8CPU_OK;
    g.parts = malloc((size_t)(active + rows / PASS_ROWS) * sizeof *g.parts);
    rows_of_expert *sorted = malloc((size_t)active * sizeof *sorted);
    if (g.parts && sorted) {
        cut_into_parts(&g, a, like, first, sorted);
        const int64_t size = plan_parts(&g, a->product.n);
        g.x = aligned(g.packed_size);
        g.scratch = aligned(size * g.threads);
        for (int64_t i = 0; i < g.count && g.x; i++) {
            g.parts[i].job.x = g.x + g.parts[i].first_packed;
            g.parts[i].job.scratch = g.scratch;
            g.parts[i].job.scratch_size = size;
        }
    }
    const int status = g.x && g.scratch ? FP8CPU_OK : FP8CPU_NO_MEMORY;
    if (status == FP8CPU_OK) {
        fp8cpu_parallel(pack_rows_of_part, &g, g.packs, g.packed_size < 1 << 14 ? 1 : g.threads);
        fp8cpu_parallel(multiply_part, &g, g.tasks, g.threads);
    }
    free(g.parts);
    free(sorted);
    free(g.x);
    free(g.scratch);
    return status;
}

#endif
