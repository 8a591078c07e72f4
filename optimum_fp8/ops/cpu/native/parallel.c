/* A parallel loop over tasks, with OpenMP's "guided" schedule, on an OpenMP runtime that is handed in at run time. */
#include "parallel.h"

#include <sched.h>

#include "fp8cpu.h"

/* The entry point of GNU's OpenMP runtime (LLVM's and Intel's have it too). It is handed to us at run time, so that we
 * share the runtime, and the sleeping threads, that torch brought along. */
typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

static gomp_parallel start_threads;

void fp8cpu_set_openmp(void *address) { start_threads = (gomp_parallel)address; }

typedef struct {
    fp8cpu_task run;
    int64_t count, next_task, done;
} stage;

typedef struct {
    stage *stages;
    void *context;
    int64_t count, threads, next_thread;
} work;

/* Claims a chunk of half a fair share of what is left: neighbouring tasks read neighbouring memory, which is
 * prefetched; and chunks that shrink towards the end let all threads finish together, whoever was held up. */
static int64_t claim_chunk(stage *s, int64_t threads, int64_t *first) {
    int64_t next = __atomic_load_n(&s->next_task, __ATOMIC_RELAXED), count;
    do {
        const int64_t left = s->count - next;
        if (left <= 0) return 0;
        count = left / (2 * threads);
        if (count < 1) count = 1;
    } while (!__atomic_compare_exchange_n(&s->next_task, &next, next + count, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    *first = next;
    return count;
}

/* Until all tasks are done; they have been claimed. Others are about to finish theirs, or wait for a processor. */
static void wait_for(stage *s) {
    enum { MANY = 1 << 12 };
    for (int64_t looks = 0; __atomic_load_n(&s->done, __ATOMIC_ACQUIRE) < s->count; looks++)
        if (looks > MANY) sched_yield();
}

static void run_chunks(void *data) {
    work *shared = data;
    const int64_t thread = __atomic_fetch_add(&shared->next_thread, 1, __ATOMIC_RELAXED);
    for (stage *s = shared->stages; s < shared->stages + shared->count; s++) {
        int64_t first, count;
        while ((count = claim_chunk(s, shared->threads, &first)) > 0) {
            for (int64_t task = first; task < first + count; task++) s->run(shared->context, task, thread);
            __atomic_fetch_add(&s->done, count, __ATOMIC_RELEASE);
        }
        if (s + 1 < shared->stages + shared->count) wait_for(s);
    }
}

static void run_stages(stage *stages, int64_t count, void *context, int64_t threads) {
    int64_t most = 1;
    for (int64_t i = 0; i < count; i++)
        if (stages[i].count > most) most = stages[i].count;
    if (threads > most) threads = most;
    work shared = {stages, context, count, threads < 1 ? 1 : threads, 0};
    if (threads > 1 && start_threads)
        start_threads(run_chunks, &shared, (unsigned)threads, 0);
    else
        run_chunks(&shared);
}

void fp8cpu_parallel(fp8cpu_task run, void *context, int64_t count, int64_t threads) {
    stage only = {run, count, 0, 0};
    run_stages(&only, 1, context, threads);
}

void fp8cpu_parallel_stages(const fp8cpu_task run[2], const int64_t count[2], void *context, int64_t threads) {
    stage both[2] = {{run[0], count[0], 0, 0}, {run[1], count[1], 0, 0}};
    run_stages(both, 2, context, threads);
}
