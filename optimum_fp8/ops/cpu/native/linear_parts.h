/* Products side by side: of several inputs, or of one cut into rows. First all of them pack x, then all multiply, by
 * one set of threads: one by one, each would start them, and wait for the last of them, anew. */
#ifndef FP8CPU_LINEAR_PARTS_H
#define FP8CPU_LINEAR_PARTS_H

#include "linear_stages.h"

typedef struct {
    linear_job job;
    const linear_stages *stages;
    int few_rows;
    int64_t first_pack, first_task; /* its tasks among those of all parts, */
    int64_t first_packed;           /* and its packed rows, in floats */
} part;

typedef struct {
    part *parts;
    int64_t count, packs, tasks, threads, packed_size;
} side_by_side;

/* Where the tasks and packed rows of each part begin; returns how many floats a thread needs. */
static inline int64_t plan_parts(side_by_side *all) {
    int64_t n = 0, scratch_size = 0;
    for (int64_t i = 0; i < all->count; i++)
        for (int64_t w = 0; w < all->parts[i].job.count; w++) n += all->parts[i].job.weights[w].n;
    all->packs = all->tasks = all->packed_size = 0;
    for (int64_t i = 0; i < all->count; i++) {
        part *p = all->parts + i;
        linear_job *job = &p->job;
        job->task_cols = task_cols_for(n, all->threads, p->few_rows);
        job->first_task[0] = 0;
        for (int64_t w = 0; w < job->count; w++)
            job->first_task[w + 1] = job->first_task[w] + divide_up(job->weights[w].n, job->task_cols);
        p->first_packed = all->packed_size;
        all->packed_size += packed_size_for(p->stages, job, p->few_rows);
        p->first_pack = all->packs;
        p->first_task = all->tasks;
        all->packs += packs_for(p->stages, job, p->few_rows);
        all->tasks += job->first_task[job->count];
        const int64_t size = scratch_size_for(p->stages, job, p->few_rows);
        if (size > scratch_size) scratch_size = size;
    }
    return divide_up(scratch_size, STEP) * STEP;
}

/* The part that a task belongs to, of those that pack or those that multiply; the task becomes that part's own. */
static inline part *part_of_task(const side_by_side *all, int packs, int64_t *task) {
    int64_t low = 0, high = all->count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        const part *p = all->parts + middle;
        *((packs ? p->first_pack : p->first_task) <= *task ? &low : &high) = middle;
    }
    *task -= packs ? all->parts[low].first_pack : all->parts[low].first_task;
    return all->parts + low;
}

static void pack_rows_of_part(void *context, int64_t task, int64_t thread) {
    part *p = part_of_task(context, 1, &task);
    (p->few_rows ? p->stages->pack_dot : p->stages->pack_panel)(&p->job, task, thread);
}

static void multiply_part(void *context, int64_t task, int64_t thread) {
    part *p = part_of_task(context, 0, &task);
    (p->few_rows ? p->stages->dot : p->stages->panel)(&p->job, task, thread);
}

/* The products of all parts, of which none are left then. */
static inline int run_parts(side_by_side *all) {
    const fp8cpu_task run[] = {pack_rows_of_part, multiply_part};
    const int64_t scratch_size = plan_parts(all);
    float *x = aligned(all->packed_size), *scratch = aligned(scratch_size * all->threads);
    const int status = x && scratch ? FP8CPU_OK : FP8CPU_NO_MEMORY;
    for (int64_t i = 0; i < all->count && status == FP8CPU_OK; i++) {
        linear_job *job = &all->parts[i].job;
        job->x = x + all->parts[i].first_packed;
        job->scratch = scratch;
        job->scratch_size = scratch_size;
    }
    if (status == FP8CPU_OK)
        fp8cpu_parallel_stages(run, (const int64_t[]){all->packs, all->tasks}, all, all->threads);
    free(x);
    free(scratch);
    all->count = all->packed_size = 0;
    return status;
}

#endif
