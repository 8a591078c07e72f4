/* Fuzzes the native kernels with buffers that end where their last element does, and compares every result with loops in
 * double precision. Run under sanitizers: one byte read or written too far ends it.
 *
 *     native_fuzz SECONDS SEED
 *
 * Prints the first disagreement and its seed (which alone repeats it: native_fuzz 0 SEED), and returns 1. */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "fp8cpu.h"

enum { BLOCK = 128 };

static uint64_t state, case_seed;
static const char *what = "";
static int failed;

#define FAIL(...)                                                        \
    do {                                                                 \
        printf("seed %llu: %s: ", (unsigned long long)case_seed, what);  \
        printf(__VA_ARGS__);                                             \
        printf("\n");                                                    \
        fflush(stdout);                                                  \
        failed = 1;                                                      \
        return;                                                          \
    } while (0)

/* --- random choices -------------------------------------------------------------------------------------------------- */

static uint64_t next_random(void) { /* splitmix64 */
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static int64_t below(int64_t limit) { return (int64_t)(next_random() % (uint64_t)limit); }
static int chance(int one_in) { return below(one_in) == 0; }
static double uniform(void) { return (double)(next_random() >> 11) * 0x1p-53 * 2 - 1; }

static int64_t size_up_to(int64_t limit) { /* often small, often beside a multiple of a vector */
    switch (below(4)) {
        case 0: return below(limit < 8 ? limit : 8);
        case 1: {
            const int64_t size = (1 + below(16)) * 16 - 1 + below(3);
            return size < limit ? size : below(limit);
        }
        default: return below(limit);
    }
}

/* Memory that ends with its last byte, and is no better aligned than elements of `align` bytes need. */
typedef struct {
    char *base, *data;
} buffer;

static buffer new_buffer(int64_t bytes, int64_t align) {
    const int64_t offset = below(4) * align;
    char *base = malloc((size_t)(offset + bytes) + (offset + bytes == 0));
    if (!base) abort();
    return (buffer){base, base + offset};
}

/* --- reference conversions of number formats ------------------------------------------------------------------------ */

static double value_of_code(uint8_t code, int64_t format) {
    const int mantissa_bits = format == FP8CPU_E4M3 ? 3 : 2, bias = format == FP8CPU_E4M3 ? 7 : 15;
    const int magnitude = code & 0x7F, exponent = magnitude >> mantissa_bits;
    const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
    double value = exponent ? ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
                            : ldexp(mantissa, 1 - bias - mantissa_bits);
    if (format == FP8CPU_E4M3 && magnitude == 0x7F) value = NAN;
    if (format == FP8CPU_E5M2 && exponent == 31) value = mantissa ? NAN : INFINITY;
    return code & 0x80 ? -value : value;
}

/* The nearest code; of two as near, the even one. Saturates. NaN: 0x7F. */
static uint8_t code_of_value(float value, double full_scale, int64_t format) {
    const double magnitude = fmin(fabs((double)value), full_scale);
    const uint8_t sign = signbit(value) ? 0x80 : 0;
    if (isnan(value)) return sign | 0x7F;
    int low = 0, high = format == FP8CPU_E4M3 ? 0x7E : 0x7B;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (value_of_code((uint8_t)middle, format) <= magnitude)
            low = middle;
        else
            high = middle;
    }
    const double under = magnitude - value_of_code((uint8_t)low, format);
    const double over = value_of_code((uint8_t)high, format) - magnitude;
    const int code = under < over ? low : over < under ? high : low & 1 ? high : low;
    return sign | (uint8_t)code;
}

static int64_t size_of(int64_t type) { return type == FP8CPU_FLOAT32 ? 4 : 2; }

static double value_at(const char *data, int64_t i, int64_t type) {
    uint16_t half;
    float value;
    uint32_t bits;
    if (type == FP8CPU_FLOAT32) {
        memcpy(&value, data + 4 * i, 4);
        return value;
    }
    memcpy(&half, data + 2 * i, 2);
    if (type == FP8CPU_BFLOAT16) {
        bits = (uint32_t)half << 16;
        memcpy(&value, &bits, 4);
        return value;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    double result = exponent == 31 ? (mantissa ? NAN : INFINITY)
                    : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                   : ldexp(mantissa, -24);
    return half & 0x8000 ? -result : result;
}

static int mantissa_bits_of(int64_t type) { return type == FP8CPU_FLOAT32 ? 23 : type == FP8CPU_BFLOAT16 ? 7 : 10; }

/* Distance between neighbours of `type` around |value|. */
static double step_at(double value, int64_t type) {
    const int lowest = type == FP8CPU_FLOAT16 ? -14 : -126;
    int exponent = lowest;
    if (value != 0) exponent = ilogb(value) > lowest ? ilogb(value) : lowest;
    return ldexp(1, exponent - mantissa_bits_of(type));
}

static double largest_of(int64_t type) {
    return type == FP8CPU_FLOAT16 ? 65504.0 : type == FP8CPU_BFLOAT16 ? 0x1.FEp127 : 0x1.FFFFFEp127;
}

/* --- random operands ---------------------------------------------------------------------------------------------------- */

/* Any bits at all, or moderate values (bfloat16 ones, whatever the type: exact, and cheap to make). */
static void fill_values(char *data, int64_t count, int64_t type, int any_bits) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t bits = next_random();
        if (!any_bits) {
            const float value = (float)(ldexp(uniform(), (int)below(6) - 3));
            uint32_t pattern;
            memcpy(&pattern, &value, 4);
            pattern &= 0xFFFF0000;
            bits = type == FP8CPU_FLOAT32 ? pattern : pattern >> 16;
            if (type == FP8CPU_FLOAT16) bits = (uint64_t)below(2) << 15 | (uint64_t)(11 + below(7)) << 10 | (bits & 1023);
        }
        memcpy(data + i * size_of(type), &bits, (size_t)size_of(type));
    }
}

static void fill_scales(char *data, int64_t count, int moderate) {
    for (int64_t i = 0; i < count; i++) {
        const float scale = (float)ldexp(1.5 + uniform() / 2, moderate ? (int)below(8) - 4 : (int)below(200) - 100);
        memcpy(data + 4 * i, &scale, 4);
    }
}

static void fill_codes(uint8_t *codes, int64_t count, int64_t format, int finite) {
    const int kind = (int)below(4);
    for (int64_t i = 0; i < count; i++) {
        codes[i] = (uint8_t)next_random();
        if (kind == 0) codes[i] &= 0x87; /* subnormal, or nearly */
        if (kind == 1) codes[i] = (codes[i] & 0x87) | 0x38;
        while (finite && !isfinite(value_of_code(codes[i], format))) codes[i] = (uint8_t)next_random();
    }
}

static float float_at(const char *data, int64_t i) {
    float value;
    memcpy(&value, data + 4 * i, 4);
    return value;
}

/* --- casts -------------------------------------------------------------------------------------------------------------- */

static float scale_for(const fp8cpu_cast_args *a, int64_t row, int64_t col) {
    const int64_t across = (a->cols + BLOCK - 1) / BLOCK;
    return float_at((const char *)a->scale, a->block ? row / BLOCK * across + col / BLOCK : row * a->scale_step);
}

static buffer draw_cast(fp8cpu_cast_args *a, int64_t variant) {
    const int layout = (int)below(3), large = chance(60);
    *a = (fp8cpu_cast_args){.variant = variant, .threads = 1 + below(2)};
    a->rows = layout == 0 ? 1 : size_up_to(layout == 2 ? 300 : 20);
    a->cols = large ? below(70000 / (a->rows + 1)) : size_up_to(600 / (1 + a->rows / 40));
    a->value_type = below(3);
    a->format = below(2);
    a->full_scale = a->format == FP8CPU_E5M2 ? 57344.0 : chance(2) ? 448.0 : 240.0;
    a->scale_step = layout == 1;
    a->block = layout == 2 ? BLOCK : 0;
    const int64_t down = (a->rows + BLOCK - 1) / BLOCK, across = (a->cols + BLOCK - 1) / BLOCK;
    const int64_t scales = layout == 0 ? 1 : layout == 1 ? a->rows : down * across;
    buffer scale = new_buffer(4 * scales, 4);
    fill_scales(scale.data, scales, chance(2));
    a->scale = (int64_t)scale.data;
    return scale;
}

static void check_maxabs(const fp8cpu_cast_args *a, const char *found) {
    for (int64_t row = 0; row < a->rows; row++) {
        double largest = 0;
        const int64_t first = a->maxabs_step ? row : 0, last = a->maxabs_step ? row : a->rows - 1;
        for (int64_t i = first * a->cols; i < (last + 1) * a->cols; i++) {
            const double value = fabs(value_at((const char *)a->x, i, a->value_type));
            if (isnan(value) || value > largest) largest = value;
            if (isnan(value)) break;
        }
        const double answer = float_at(found, row * a->maxabs_step);
        if (isnan(largest) ? !isnan(answer) : answer != largest)
            FAIL("maxabs of row %lld is %g, not %g", (long long)row, answer, largest);
    }
}

/* Some scale for every range; those that the kernel has written must be those of the ranges that it found. */
static float scale_of_range[1 << 15];

static void check_scales(const fp8cpu_cast_args *a) {
    for (int64_t row = 0; row < (a->scale_step ? a->rows : 1); row++) {
        const float range = float_at((const char *)a->maxabs, row);
        uint32_t bits;
        memcpy(&bits, &range, 4);
        bits = isnan(range) ? 0x7FC0 : (bits >> 16) + ((bits & 0xFFFF) + (bits >> 16 & 1) > 0x8000);
        const float scale = float_at((const char *)a->scale, row), expected = scale_of_range[bits];
        if (scale != expected) FAIL("row %lld of range %g has scale %g, not %g", (long long)row, range, scale, expected);
    }
}

static void fuzz_encode(int64_t variant) {
    fp8cpu_cast_args a;
    buffer scale = draw_cast(&a, variant);
    const int64_t count = a.rows * a.cols, size = size_of(a.value_type);
    buffer x = new_buffer(count * size, size), y = new_buffer(count, 1);
    fill_values(x.data, count, a.value_type, chance(2));
    a.x = (int64_t)x.data;
    const int by_range = a.rows && !a.block && (a.scale_step || a.rows == 1) && chance(2);
    a.maxabs_step = by_range ? a.scale_step : chance(2);
    buffer maxabs = new_buffer(4 * (a.maxabs_step ? a.rows : 1), 4);
    memset(maxabs.data, 0, (size_t)(4 * (a.maxabs_step ? a.rows : 1)));
    const int wants_maxabs = by_range || chance(2), wants_codes = !wants_maxabs || chance(2);
    if (by_range) a.scale_of_range = (int64_t)scale_of_range;
    if (wants_maxabs) a.maxabs = (int64_t)maxabs.data;
    if (wants_codes) a.y = (int64_t)y.data;
    if (!wants_codes && !by_range && chance(2)) a.scale = 0;
    if (fp8cpu_encode(&a) != FP8CPU_OK) FAIL("encode refused");
    for (int64_t i = 0; wants_codes && i < count; i++) {
        const float value = (float)value_at(x.data, i, a.value_type);
        const float scaled = value * (1.0f / scale_for(&a, i / a.cols, i % a.cols));
        const uint8_t expected = code_of_value(scaled, a.full_scale, a.format), code = (uint8_t)y.data[i];
        if (code != expected && !(isnan(scaled) && (code & 0x7F) == 0x7F))
            FAIL("%a became code %02x, not %02x, at %lld of %lld x %lld", scaled, code, expected, (long long)i,
                 (long long)a.rows, (long long)a.cols);
    }
    if (wants_maxabs) check_maxabs(&a, maxabs.data);
    if (by_range) check_scales(&a);
    free(scale.base), free(x.base), free(y.base), free(maxabs.base);
}

static void fuzz_decode(int64_t variant) {
    fp8cpu_cast_args a;
    buffer scale = draw_cast(&a, variant);
    const int64_t count = a.rows * a.cols, size = size_of(a.value_type);
    buffer x = new_buffer(count, 1), y = new_buffer(count * size, size);
    fill_codes((uint8_t *)x.data, count, a.format, 0);
    a.x = (int64_t)x.data;
    a.y = (int64_t)y.data;
    if (fp8cpu_decode(&a) != FP8CPU_OK) FAIL("decode refused");
    for (int64_t i = 0; i < count; i++) {
        const uint8_t code = (uint8_t)x.data[i];
        const double value = (float)value_of_code(code, a.format) * scale_for(&a, i / a.cols, i % a.cols); /* in float32 */
        const double got = value_at(y.data, i, a.value_type), largest = largest_of(a.value_type);
        const double half = step_at(fmin(fabs(value), largest), a.value_type) / 2;
        const int overflows = fabs(value) >= largest + half;
        const int fits = isnan(value) ? isnan(got) : overflows ? got == copysign(INFINITY, value) : fabs(got - value) <= half;
        if (!fits || (!isnan(value) && signbit(got) != signbit(value)))
            FAIL("code %02x became %a, not %a, in type %lld", code, got, value, (long long)a.value_type);
    }
    free(scale.base), free(x.base), free(y.base);
}

#include "native_fuzz_linear.h"
#include "native_fuzz_experts.h"
#include "native_fuzz_attention.h"

/* --- threads, and the fuzzer's loop -------------------------------------------------------------------------------- */

typedef struct {
    void (*run)(void *);
    void *data;
} start;

static void *on_thread(void *argument) {
    const start *s = argument;
    s->run(s->data);
    return NULL;
}
static void fuzz_histogram(int64_t variant) {
    static int64_t counts[FP8CPU_BINS], expected[FP8CPU_BINS];
    const int64_t type = below(3), size = size_of(type), count = chance(4) ? below(100000) : size_up_to(3000);
    buffer x = new_buffer(count * size, size);
    float maxabs = 0;
    double largest = 0;
    fill_values(x.data, count, type, chance(2));
    memset(counts, 0, sizeof counts), memset(expected, 0, sizeof expected);
    for (int64_t i = 0; i < count; i++) {
        const float value = (float)value_at(x.data, i, type);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        expected[!isfinite(value) ? 0xFF0 : (bits & 0x7FFFFFFF) >> 19]++;
        if (isnan(value) || fabs((double)value) > largest) largest = fabs((double)value);
    }
    const fp8cpu_histogram_args a = {variant, 1 + below(3), count, (int64_t)x.data, type, (int64_t)counts, (int64_t)&maxabs};
    if (fp8cpu_histogram(&a) != FP8CPU_OK) FAIL("histogram refused");
    for (int bin = 0xFF1; bin < FP8CPU_BINS; bin++) counts[0xFF0] += counts[bin], counts[bin] = 0; /* any NaN will do */
    for (int bin = 0; bin < FP8CPU_BINS; bin++)
        if (counts[bin] != expected[bin])
            FAIL("%lld values in bin %d, not %lld", (long long)counts[bin], bin, (long long)expected[bin]);
    if (maxabs != largest && !(isnan(maxabs) && isnan(largest))) FAIL("maxabs is %g, not %g", maxabs, largest);
    free(x.base);
}

/* What GOMP_parallel does, on threads of our own, which sanitizers understand. */
static void in_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags) {
    pthread_t others[16];
    start s = {run, data};
    (void)flags;
    for (unsigned i = 1; i < threads; i++)
        if (pthread_create(&others[i], NULL, on_thread, &s)) abort();
    run(data);
    for (unsigned i = 1; i < threads; i++) pthread_join(others[i], NULL);
}

static void fuzz(uint64_t seed) {
    static void (*const operations[])(int64_t) = {fuzz_encode,  fuzz_decode,    fuzz_linear,   fuzz_linear,
                                                  fuzz_grouped, fuzz_attention, fuzz_histogram, fuzz_experts};
    static const char *const names[] = {"encode",  "decode",    "linear",    "linear",
                                        "grouped", "attention", "histogram", "experts"};
    static char name[64];
    case_seed = state = seed;
    int64_t variants = 0, operation;
    while (fp8cpu_variant((int)variants)) variants++;
    int64_t variant = below(variants);
    while (!fp8cpu_runs((int)variant)) variant = (variant + 1) % variants;
    fp8cpu_set_openmp(chance(8) ? (void *)in_parallel : NULL);
    operation = below(8);
    snprintf(name, sizeof name, "%s on %s", names[operation], fp8cpu_variant((int)variant));
    what = name;
    operations[operation](variant);
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    const double seconds = atof(arguments[1]);
    uint64_t seed = strtoull(arguments[2], NULL, 10), cases = 0;
    const time_t end = time(NULL) + (time_t)seconds;
    fill_scales((char *)scale_of_range, sizeof scale_of_range / sizeof scale_of_range[0], 1);
    printf("first seed %llu\n", (unsigned long long)seed);
    fflush(stdout);
    do {
        fuzz(seed++);
        cases++;
    } while (!failed && time(NULL) < end);
    printf("%llu cases, last seed %llu\n", (unsigned long long)cases, (unsigned long long)seed - 1);
    return failed;
}
