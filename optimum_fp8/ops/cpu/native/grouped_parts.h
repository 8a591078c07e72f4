/* Rows that are each multiplied with the weight of their expert. They are sorted by expert; those of an expert are a
 * part, a product of its own, or several where they are many. All parts' tasks are run side by side. */
#ifndef FP8CPU_GROUPED_PARTS_H
#define FP8CPU_GROUPED_PARTS_H

#include "linear_parts.h"

enum { MOST_FLOATS = 1 << 25 }; /* of working memory at a time: what takes more is done in several passes */

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

/* A part of `rows` rows from `first_row` on; what it multiplies is written to `own`. `like` says where rows are in x and y,
 * or what makes them. */
static inline part part_of(const fp8cpu_grouped_args *a, const linear_job *like, int64_t expert, int64_t first_row,
                           int64_t rows, fp8cpu_linear_args *own) {
    part p = {.job = *like};
    *own = a->product;
    own->w += expert * own->n * own->k;
    own->w_scale += expert * a->w_scale_size * (int64_t)sizeof(float);
    if (own->bias) own->bias += expert * own->n * value_size(own->bias_type);
    if (own->x_scale && a->x_scale_expert) own->x_scale += expert * (int64_t)sizeof(float);
    p.job.args = p.job.weights = own;
    p.job.count = 1;
    p.job.first_row = first_row;
    p.job.rows = rows;
    if (like->x_rows) p.job.x_rows += first_row;
    if (like->y_rows) p.job.y_rows += first_row;
    p.job.steps = divide_up(own->k, STEP);
    p.stages = FP8CPU_NAME(linear_stages)(&p.job);
    p.few_rows = rows <= p.stages->dot_rows;
    return p;
}

/* The parts in ascending order of their rows. Threads claim many tasks at a time at first, few at the end: so they finish
 * together, however many rows an expert has. */
static inline void cut_into_parts(side_by_side *all, fp8cpu_linear_args *args, const fp8cpu_grouped_args *a,
                                  const linear_job *like, const int64_t *first, rows_of_expert *sorted) {
    int64_t active = 0;
    for (int64_t e = 0; e < a->experts; e++)
        if (first[e + 1] > first[e]) sorted[active++] = (rows_of_expert){first[e + 1] - first[e], e};
    qsort(sorted, (size_t)active, sizeof *sorted, fewer_rows);
    for (int64_t i = 0; i < active; i++)
        for (int64_t row = 0; row < sorted[i].rows; row += PASS_ROWS, all->count++) {
            const int64_t expert = sorted[i].expert, rows = smaller(PASS_ROWS, sorted[i].rows - row);
            all->parts[all->count] = part_of(a, like, expert, first[expert] + row, rows, args + all->count);
        }
}

/* The product of rows that are sorted by expert: those of expert e are first[e] ... first[e + 1] - 1. */
static inline int multiply_grouped(const fp8cpu_grouped_args *a, const linear_job *like, const int64_t *first) {
    const int64_t rows = first[a->experts], active = smaller(a->experts, rows), most = active + rows / PASS_ROWS;
    side_by_side all = {.threads = a->product.threads};
    int status = FP8CPU_NO_MEMORY;
    if (!rows) return FP8CPU_OK;
    all.parts = malloc((size_t)most * sizeof *all.parts);
    fp8cpu_linear_args *args = malloc((size_t)most * sizeof *args);
    rows_of_expert *sorted = malloc((size_t)active * sizeof *sorted);
    if (all.parts && args && sorted) {
        cut_into_parts(&all, args, a, like, first, sorted);
        status = run_parts(&all);
    }
    free(all.parts);
    free(args);
    free(sorted);
    return status;
}

#endif
