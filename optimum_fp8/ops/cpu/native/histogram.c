/* How many values have each magnitude, by the upper bits of its float32, and the largest magnitude in the same pass. */
#include "lanes.h"
#include "pairs.h"
#include "parallel.h"
#include "variant.h"

enum {
    BINS = FP8CPU_BINS,
    DROP = 31 - 12,      /* bits of a float32's magnitude that do not count: BINS is 2^12 */
    DROP_16 = DROP - 16, /* the same of a bfloat16 */
    TABLES = 4,          /* neighbours are often alike: each counts in a table of its own, and waits for no other */
    LEAST = 1 << 14,     /* values a task: clearing and adding up its tables must not count */
    MOST = 1 << 20,
};

typedef struct {
    const fp8cpu_histogram_args *args;
    int64_t size; /* values of a task */
} histogram_job;

typedef struct {
    uint32_t counts[TABLES][BINS];
} tables;

INLINE void count_16(tables *t, vpairs bins) {
    uint16_t bin[2 * LANES];
    memcpy(bin, &bins, sizeof bin);
    UNROLL for (int i = 0; i < 2 * LANES; i++) t->counts[i % TABLES][bin[i]]++;
}

INLINE void count_32(tables *t, vi bins, int64_t count) {
    uint32_t bin[LANES];
    memcpy(bin, &bins, sizeof bin);
    if (count >= LANES)
        UNROLL for (int i = 0; i < LANES; i++) t->counts[i % TABLES][bin[i]]++;
    else
        for (int i = 0; i < count; i++) t->counts[i % TABLES][bin[i]]++;
}

/* Counts `count` values; returns the bits of the largest magnitude as float32. */
INLINE int32_t count_range(tables *t, const char *x, int64_t count, int64_t type) {
    vi largest = splat_bits(0);
    int64_t i = 0;
    if (type == FP8CPU_BFLOAT16) {
        vpairs pairs = splat_pairs(0);
        for (; i + 2 * LANES <= count; i += 2 * LANES) {
            const vpairs magnitudes = magnitudes_of(load_bits(x + 2 * i));
            pairs = larger_pairs(pairs, magnitudes);
            count_16(t, magnitudes >> DROP_16);
        }
        largest = larger_of((vi)pairs << 16, (vi)pairs & (int32_t)0xFFFF0000);
    }
    for (; i < count; i += LANES) {
        const vi magnitudes = (vi)load_up_to(x + i * value_size(type), type, count - i) & 0x7FFFFFFF;
        largest = larger_of(largest, magnitudes);
        count_32(t, magnitudes >> DROP, count - i);
    }
    int32_t found = 0;
    for (int lane = 0; lane < LANES; lane++)
        if (largest[lane] > found) found = largest[lane];
    return found;
}

static void histogram_task(void *context, int64_t task, int64_t thread) {
    const histogram_job *job = context;
    const fp8cpu_histogram_args *a = job->args;
    const int64_t start = task * job->size, left = a->count - start, count = left < job->size ? left : job->size;
    const char *x = (const char *)a->x + start * value_size(a->value_type);
    int64_t *counts = (int64_t *)a->counts;
    int32_t *maxabs = (int32_t *)a->maxabs, found = 0; /* bits of floats that are not negative are ordered as integers */
    tables t;
    memset(&t, 0, sizeof t);
    (void)thread;
#define COUNT(TYPE) \
    if (a->value_type == TYPE) found = count_range(&t, x, count, TYPE);
    COUNT(FP8CPU_FLOAT32)
    COUNT(FP8CPU_BFLOAT16)
    COUNT(FP8CPU_FLOAT16)
    for (int bin = 0; bin < BINS; bin++) {
        int64_t sum = 0;
        for (int i = 0; i < TABLES; i++) sum += t.counts[i][bin];
        if (sum) __atomic_fetch_add(counts + bin, sum, __ATOMIC_RELAXED);
    }
    int32_t seen = __atomic_load_n(maxabs, __ATOMIC_RELAXED);
    while (seen < found &&
           !__atomic_compare_exchange_n(maxabs, &seen, found, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

int FP8CPU_NAME(histogram)(const fp8cpu_histogram_args *args) {
    const int64_t threads = args->threads < 1 ? 1 : args->threads, share = (args->count + threads - 1) / threads;
    histogram_job job = {args, share < LEAST ? LEAST : share > MOST ? MOST : share};
    fp8cpu_parallel(histogram_task, &job, (args->count + job.size - 1) / job.size, threads);
    return FP8CPU_OK;
}
