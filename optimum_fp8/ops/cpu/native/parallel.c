/* A parallel loop over tasks, with OpenMP's "guided" schedule, on an OpenMP runtime that is handed in at run time. */
#include "parallel.h"

#include "fp8cpu.h"

/* The entry point of GNU's OpenMP runtime (LLVM's and Intel's have it too). It is handed to us at run time, so that we
 * share the runtime, and the sleeping threads, that torch brought along. */
typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

static gomp_parallel start_threads;

void fp8cpu_set_openmp(void *address) { start_threads = (gomp_parallel)address; }

typedef struct {
    fp8cpu_task run;
    void *context;
    int64_t count, threads, next_task, next_thread;
} work;

/* Claims a chunk of half a fair share of what is left: neighbouring tasks read neighbouring memory, which is
 * prefetched; and chunks that shrink towards the end let all threads finish together, whoever was held up. */
static int64_t claim_chunk(work *shared, int64_t *first) {
    int64_t next = __atomic_load_n(&shared->next_task, __ATOMIC_RELAXED), count;
    do {
        const int64_t left = shared->count - next;
        if (left <= 0) return 0;
        count = left / (2 * shared->threads);
        if (count < 1) count = 1;
    } while (!__atomic_compare_exchange_n(&shared->next_task, &next, next + count, 0, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    *first = next;
    return count;
}

static void run_chunks(void *data) {
    work *shared = data;
    const int64_t thread = __atomic_fetch_add(&shared->next_thread, 1, __ATOMIC_RELAXED);
    int64_t first, count;
    while ((count = claim_chunk(shared, &first)) > 0)
        for (int64_t task = first; task < first + count; task++) shared->run(shared->context, task, thread);
}

void fp8cpu_parallel(fp8cpu_task run, void *context, int64_t count, int64_t threads) {
    if (threads > count) threads = count;
    work shared = {run, context, count, threads < 1 ? 1 : threads, 0, 0};
    if (threads > 1 && start_threads)
        start_threads(run_chunks, &shared, (unsigned)threads, 0);
    else
        run_chunks(&shared);
}
