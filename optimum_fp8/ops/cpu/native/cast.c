/* Casts to FP8 and back, and the largest magnitude of what is cast, row by row in parallel. */
#include <math.h>

#include "parallel.h"
#include "variant.h"
#include "vector.h"

enum { CHUNK = 1 << 14 }; /* elements a task: long enough to be worth handing out, short enough to balance */

typedef struct {
    const fp8cpu_cast_args *args;
    int64_t chunk, chunks; /* elements a row is cut into, and how many such */
} cast_job;

typedef struct {
    int64_t row, start, count, at; /* at: of all elements */
} piece;

INLINE piece piece_of(const cast_job *job, int64_t task) {
    const int64_t row = task / job->chunks, start = task % job->chunks * job->chunk, left = job->args->cols - start;
    return (piece){row, start, left < job->chunk ? left : job->chunk, row * job->args->cols + start};
}

INLINE float scale_of(const fp8cpu_cast_args *a, piece p) {
    const float *scale = (const float *)a->scale;
    if (!a->block) return scale[p.row * a->scale_step];
    return scale[p.row / a->block * ((a->cols + a->block - 1) / a->block) + p.start / a->block];
}

/* Magnitudes compare as integers. */
static float largest_lane(vi magnitudes) {
    int32_t largest = 0;
    for (int lane = 0; lane < LANES; lane++)
        if (magnitudes[lane] > largest) largest = magnitudes[lane];
    float value;
    memcpy(&value, &largest, sizeof value);
    return value;
}

/* maxabs = max(maxabs, value) among threads; bits of non-negative floats are ordered as integers. */
static void raise_to(float *maxabs, float value) {
    int32_t bits, seen;
    memcpy(&bits, &value, sizeof bits);
    __atomic_load((int32_t *)maxabs, &seen, __ATOMIC_RELAXED);
    while (seen < bits &&
           !__atomic_compare_exchange((int32_t *)maxabs, &seen, &bits, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

INLINE void store_codes(uint8_t *y, vi codes) {
    const vquarter bytes = narrow_to_bytes(codes);
    memcpy(y, &bytes, sizeof bytes);
}

INLINE void encode_range(const char *x, uint8_t *y, int64_t count, int64_t type, vf reciprocal, float full_scale,
                         fp8_format format, int wants_codes, float *maxabs) {
    vi largest = splat_bits(0);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vf value = load_values(x + i * value_size(type), type);
        if (maxabs) largest = larger_of((vi)value & 0x7FFFFFFF, largest); /* NaN is above all */
        if (wants_codes) store_codes(y + i, encode(value * reciprocal, full_scale, format));
    }
    if (i < count) {
        const vf value = load_some(x + i * value_size(type), type, count - i);
        if (maxabs) largest = larger_of((vi)value & 0x7FFFFFFF, largest); /* NaN is above all */
        if (wants_codes) {
            uint8_t codes[LANES];
            store_codes(codes, encode(value * reciprocal, full_scale, format));
            memcpy(y + i, codes, (size_t)(count - i));
        }
    }
    if (maxabs) raise_to(maxabs, largest_lane(largest));
}

static void encode_task(void *context, int64_t task, int64_t thread) {
    const cast_job *job = context;
    const fp8cpu_cast_args *a = job->args;
    const piece p = piece_of(job, task);
    const int64_t type = a->value_type, count = p.count;
    const char *x = (const char *)a->x + p.at * value_size(type);
    uint8_t *y = (uint8_t *)a->y + p.at;
    float *maxabs = a->maxabs ? (float *)a->maxabs + p.row * a->maxabs_step : NULL;
    const vf reciprocal = splat(a->y ? 1.0f / scale_of(a, p) : 1.0f);
    const float full_scale = (float)a->full_scale;
    (void)thread;
#define ENCODE(TYPE)                                                                                    \
    if (type == TYPE) {                                                                                 \
        if (!a->y)                                                                                      \
            encode_range(x, y, count, TYPE, reciprocal, full_scale, E4M3, 0, maxabs);                   \
        else if (a->format == FP8CPU_E4M3)                                                              \
            maxabs ? encode_range(x, y, count, TYPE, reciprocal, full_scale, E4M3, 1, maxabs)           \
                   : encode_range(x, y, count, TYPE, reciprocal, full_scale, E4M3, 1, NULL);            \
        else                                                                                            \
            maxabs ? encode_range(x, y, count, TYPE, reciprocal, full_scale, E5M2, 1, maxabs)           \
                   : encode_range(x, y, count, TYPE, reciprocal, full_scale, E5M2, 1, NULL);            \
    }
    ENCODE(FP8CPU_FLOAT32)
    ENCODE(FP8CPU_BFLOAT16)
    ENCODE(FP8CPU_FLOAT16)
}

INLINE vi load_codes(const uint8_t *x) {
    vquarter bytes;
    memcpy(&bytes, x, sizeof bytes);
    return widen_bytes(bytes) << 24;
}

INLINE void decode_range(const uint8_t *x, char *y, int64_t count, int64_t type, vf scale, fp8_format format) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store_values(y + i * value_size(type), decode_any(load_codes(x + i), format) * scale, type);
    if (i < count) {
        uint8_t codes[LANES] = {0};
        memcpy(codes, x + i, (size_t)(count - i));
        store_some(y + i * value_size(type), decode_any(load_codes(codes), format) * scale, type, count - i);
    }
}

static void decode_task(void *context, int64_t task, int64_t thread) {
    const cast_job *job = context;
    const fp8cpu_cast_args *a = job->args;
    const piece p = piece_of(job, task);
    const int64_t count = p.count;
    const uint8_t *x = (const uint8_t *)a->x + p.at;
    char *y = (char *)a->y + p.at * value_size(a->value_type);
    const vf scale = splat(scale_of(a, p));
    (void)thread;
#define DECODE(TYPE)                                         \
    if (a->value_type == TYPE) {                             \
        if (a->format == FP8CPU_E4M3)                        \
            decode_range(x, y, count, TYPE, scale, E4M3);    \
        else                                                 \
            decode_range(x, y, count, TYPE, scale, E5M2);    \
    }
    DECODE(FP8CPU_FLOAT32)
    DECODE(FP8CPU_BFLOAT16)
    DECODE(FP8CPU_FLOAT16)
}

static int run(fp8cpu_task task, const fp8cpu_cast_args *args) {
    const int64_t chunk = args->block ? args->block : CHUNK;
    cast_job job = {args, chunk, (args->cols + chunk - 1) / chunk};
    const int64_t count = args->rows * job.chunks, elements = args->rows * args->cols;
    /* Waking threads takes longer than casting a few thousand elements. */
    fp8cpu_parallel(task, &job, count, elements < CHUNK ? 1 : args->threads);
    return FP8CPU_OK;
}

int FP8CPU_NAME(encode)(const fp8cpu_cast_args *args) { return run(encode_task, args); }
int FP8CPU_NAME(decode)(const fp8cpu_cast_args *args) { return run(decode_task, args); }
