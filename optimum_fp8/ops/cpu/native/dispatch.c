/* The exported functions, dispatched at run time: each calls the variant the caller chose. */
#include <stdlib.h>

#include "fp8cpu.h"
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#ifdef FP8CPU_AMX
#include "amx.h"
#endif

#define DECLARE(variant)                                        \
    int fp8cpu_encode_##variant(const fp8cpu_cast_args *);      \
    int fp8cpu_decode_##variant(const fp8cpu_cast_args *);      \
    int fp8cpu_histogram_##variant(const fp8cpu_histogram_args *); \
    int fp8cpu_linear_##variant(const fp8cpu_linear_args *, int64_t count); \
    int fp8cpu_grouped_##variant(const fp8cpu_grouped_args *); \
    int fp8cpu_experts_##variant(const fp8cpu_experts_args *); \
    int fp8cpu_attention_##variant(const fp8cpu_attention_args *); \
    int fp8cpu_softmax_##variant(const fp8cpu_attention_args *);        \
    int fp8cpu_linear_gradient_##variant(const fp8cpu_linear_gradient_args *);
#define KERNELS(variant)                                                                        \
    {fp8cpu_encode_##variant, fp8cpu_decode_##variant, fp8cpu_histogram_##variant, fp8cpu_linear_##variant, \
     fp8cpu_grouped_##variant, fp8cpu_experts_##variant, fp8cpu_attention_##variant, fp8cpu_softmax_##variant, \
     fp8cpu_linear_gradient_##variant}

/* Variants with tiles share casts, which multiply nothing, and gradients with another one. */
#define DECLARE_PRODUCTS(variant)                                           \
    int fp8cpu_linear_##variant(const fp8cpu_linear_args *, int64_t count); \
    int fp8cpu_grouped_##variant(const fp8cpu_grouped_args *);              \
    int fp8cpu_experts_##variant(const fp8cpu_experts_args *);              \
    int fp8cpu_attention_##variant(const fp8cpu_attention_args *);          \
    int fp8cpu_softmax_##variant(const fp8cpu_attention_args *);
#define PRODUCTS(variant, casts)                                                                                 \
    {fp8cpu_encode_##casts, fp8cpu_decode_##casts, fp8cpu_histogram_##casts, fp8cpu_linear_##variant,            \
     fp8cpu_grouped_##variant, fp8cpu_experts_##variant, fp8cpu_attention_##variant, fp8cpu_softmax_##variant,   \
     fp8cpu_linear_gradient_##casts}

DECLARE(portable)
DECLARE_PRODUCTS(tiles)
static int always(void) { return 1; }

#ifdef FP8CPU_X86
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512vbmi)
DECLARE(avx512bf16)
#ifdef FP8CPU_AMX
DECLARE_PRODUCTS(avx512amx)
#endif

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static int has_avx512vbmi(void) { return has_avx512() && __builtin_cpu_supports("avx512vbmi"); }
static int has_avx512bf16(void) { return has_avx512vbmi() && __builtin_cpu_supports("avx512bf16"); }

#ifdef FP8CPU_AMX
static int has_avx512amx(void) { return has_avx512vbmi() && may_use_tiles(); }
#endif
#endif

static const struct {
    const char *name;
    int (*runs)(void);
    fp8cpu_kernels kernels;
} variants[] = {
#ifdef FP8CPU_AMX
    {"avx512amx", has_avx512amx, PRODUCTS(avx512amx, avx512vbmi)},
#endif
#ifdef FP8CPU_X86
    {"avx512bf16", has_avx512bf16, KERNELS(avx512bf16)},
    {"avx512vbmi", has_avx512vbmi, KERNELS(avx512vbmi)},
    {"avx512", has_avx512, KERNELS(avx512)},
    {"avx2", has_avx2, KERNELS(avx2)},
#endif
    {"portable", always, KERNELS(portable)},
    {"tiles", always, PRODUCTS(tiles, portable)}, /* for tests */
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

int fp8cpu_abi(void) { return FP8CPU_ABI; }

const char *fp8cpu_variant(int index) { return index >= 0 && index < VARIANTS ? variants[index].name : NULL; }

int fp8cpu_runs(int index) { return index >= 0 && index < VARIANTS && variants[index].runs(); }

/* The first that runs. But where vdpbf16ps is issued at a quarter of the rate of a float32 multiply-add, as on the Intel
 * processors measured, pairs multiply half as much as floats do. */
int fp8cpu_best(void) {
    int index = 0;
    for (; !fp8cpu_runs(index); index++) continue;
#ifdef FP8CPU_X86
    if (variants[index].runs == has_avx512bf16 && !__builtin_cpu_is("amd")) index++;
#endif
    return index;
}

#define DISPATCH(operation)                                                       \
    if (args->variant < 0 || args->variant >= VARIANTS) return FP8CPU_NO_VARIANT; \
    return variants[args->variant].kernels.operation(args);

/* Codes are read from end to end with every token: huge pages, where the system gives them, spare the look-ups. Asked
 * for before the memory is first written to, they also spare most of its page faults. */
static void ask_for_huge_pages(int64_t memory, int64_t size) {
#if defined(__linux__)
    enum { HUGE = 2 << 20 };
    const int64_t first = (memory + HUGE - 1) / HUGE * HUGE, last = (memory + size) / HUGE * HUGE;
    if (first < last) madvise((void *)first, (size_t)(last - first), MADV_HUGEPAGE);
#else
    (void)memory, (void)size;
#endif
}

int fp8cpu_encode(const fp8cpu_cast_args *args) {
    if (args->y) ask_for_huge_pages(args->y, args->rows * args->cols);
    DISPATCH(encode)
}
int fp8cpu_decode(const fp8cpu_cast_args *args) { DISPATCH(decode) }
int fp8cpu_histogram(const fp8cpu_histogram_args *args) { DISPATCH(histogram) }
/* A product of an x that is scaled by its own ranges: first its scales, then itself. */
static int linear_by_own_ranges(const fp8cpu_kernels *kernels, const fp8cpu_linear_args *args) {
    const int64_t values = args->m * args->k;
    const int64_t count = args->x_group ? values / args->x_group : args->x_scale_step ? args->m : 1;
    if (!values) return kernels->linear(args, 1);
    float *scales = calloc((size_t)count, sizeof *scales); /* the ranges, until they are looked up */
    if (!scales) return FP8CPU_NO_MEMORY;
    const fp8cpu_cast_args ranges = {.variant = args->variant, .threads = args->threads, .rows = count,
                                     .cols = values / count, .x = args->x, .value_type = args->x_type,
                                     .scale = (int64_t)scales, .scale_step = 1, .maxabs = (int64_t)scales,
                                     .maxabs_step = 1, .only_finite = 1, .scale_of_range = args->x_scale_of_range};
    fp8cpu_linear_args product = *args;
    product.x_scale = (int64_t)scales;
    int status = kernels->encode(&ranges);
    if (status == FP8CPU_OK) status = kernels->linear(&product, 1);
    free(scales);
    return status;
}

int fp8cpu_linear(const fp8cpu_linear_args *args, int64_t count) {
    if (args->variant < 0 || args->variant >= VARIANTS) return FP8CPU_NO_VARIANT;
    const fp8cpu_kernels *kernels = &variants[args->variant].kernels;
    return args->x_scale_of_range ? linear_by_own_ranges(kernels, args) : kernels->linear(args, count);
}
int fp8cpu_linear_gradient(const fp8cpu_linear_gradient_args *args) { DISPATCH(linear_gradient) }
int fp8cpu_grouped(const fp8cpu_grouped_args *args) {
    if (args->product.variant < 0 || args->product.variant >= VARIANTS) return FP8CPU_NO_VARIANT;
    return variants[args->product.variant].kernels.grouped(args);
}
int fp8cpu_experts(const fp8cpu_experts_args *args) { DISPATCH(experts) }
int fp8cpu_attention(const fp8cpu_attention_args *args) { DISPATCH(attention) }
int fp8cpu_softmax(const fp8cpu_attention_args *args) { DISPATCH(softmax) }

/* --- reading memory ------------------------------------------------------------------------------------------------ */

enum { READ_CHUNK = 1 << 20 };

typedef struct {
    const char *bytes;
    int64_t count, found;
} read_job;

static void read_task(void *context, int64_t task, int64_t thread) {
    read_job *job = context;
    const int64_t start = task * READ_CHUNK;
    const int64_t count = job->count - start < READ_CHUNK ? job->count - start : READ_CHUNK;
    const int64_t *words = (const int64_t *)(job->bytes + start);
    int64_t sums[16] = {0};
    (void)thread;
    for (int64_t i = 0; i + 16 <= count / 8; i += 16) {
        __builtin_prefetch(words + i + 512); /* across pages, where the processor's own prefetching ends */
        __builtin_prefetch(words + i + 520);
        for (int j = 0; j < 16; j++) sums[j] ^= words[i + j];
    }
    for (int j = 1; j < 16; j++) sums[0] ^= sums[j];
    __atomic_fetch_xor(&job->found, sums[0], __ATOMIC_RELAXED);
}

int64_t fp8cpu_read(const void *bytes, int64_t count, int64_t threads) {
    read_job job = {bytes, count, 0};
    fp8cpu_parallel(read_task, &job, (count + READ_CHUNK - 1) / READ_CHUNK, threads);
    return job.found;
}
