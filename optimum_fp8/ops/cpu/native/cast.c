/* Casts to FP8 and back, and maxabs of what is cast: rows, cut into tiles, in parallel. */
#include <math.h>

#include "lookup.h"
#include "pairs.h"
#include "parallel.h"
#include "units.h"
#include "variant.h"

enum { TILE = 1 << 14 }; /* elements a task: long enough to be worth handing out, short enough to balance */

typedef struct {
    const fp8cpu_cast_args *args;
    int64_t tile_size, tiles; /* elements of a tile, and tiles of a row */
} cast_job;

typedef struct {
    int64_t row, start, count, offset; /* start in the row, offset in all elements */
} tile;

INLINE tile tile_of(const cast_job *job, int64_t task) {
    const int64_t row = task / job->tiles, start = task % job->tiles * job->tile_size, left = job->args->cols - start;
    return (tile){row, start, left < job->tile_size ? left : job->tile_size, row * job->args->cols + start};
}

INLINE const float *scale_of(const fp8cpu_cast_args *a, tile t) {
    const float *scale = (const float *)a->scale;
    if (!a->block) return scale + t.row * a->scale_step;
    return scale + t.row / a->block * ((a->cols + a->block - 1) / a->block) + t.start / a->block;
}

/* --- values to FP8 ------------------------------------------------------------------------------------------------ */

/* Magnitudes compare as integers. */
static float largest_lane(vi magnitudes) {
    int32_t largest = 0;
    for (int lane = 0; lane < LANES; lane++)
        if (magnitudes[lane] > largest) largest = magnitudes[lane];
    float value;
    memcpy(&value, &largest, sizeof value);
    return value;
}

/* maxabs = max(maxabs, value), atomically; bits of non-negative floats are ordered as integers. */
static void atomic_max(float *maxabs, float value) {
    int32_t bits, seen;
    memcpy(&bits, &value, sizeof bits);
    __atomic_load((int32_t *)maxabs, &seen, __ATOMIC_RELAXED);
    while (seen < bits &&
           !__atomic_compare_exchange((int32_t *)maxabs, &seen, &bits, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

INLINE void store_codes(uint8_t *y, vi codes, int64_t count) {
    const vquarter bytes = narrow_to_bytes(codes);
    if (count >= LANES)
        memcpy(y, &bytes, sizeof bytes);
    else
        memcpy(y, &bytes, (size_t)count);
}

/* The largest of some values: as they come, and of values of 16 bits in pairs. */
typedef struct {
    vi lanes;
    vpairs pairs;
} magnitudes;

INLINE float largest_of(magnitudes m, int64_t type) {
    vi lanes = m.lanes;
    if (type != FP8CPU_FLOAT32) {
        const vi even = (vi)m.pairs << 16, odd = (vi)m.pairs & (int32_t)0xFFFF0000;
        const vi halves = (vi)((vu)larger_of(even, odd) >> 16);
        lanes = larger_of(lanes, type == FP8CPU_BFLOAT16 ? halves << 16 : (vi)from_half(narrow(halves)));
    }
    return largest_lane(lanes);
}

/* Across the pages' borders, at which the processor's own prefetching ends. */
enum { PREFETCH_BYTES = 1 << 12 };

/* What can go in pairs, as far as it fills vectors; returns how many values that are. */
INLINE int64_t encode_in_pairs(const char *x, uint8_t *y, int64_t count, float reciprocal, float full_scale,
                               fp8_format format, int wants_codes, int wants_maxabs, magnitudes *largest) {
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        const vi pairs = load_bits(x + 2 * i);
        __builtin_prefetch(x + 2 * i + PREFETCH_BYTES);
        if (wants_maxabs) largest->pairs = larger_pairs(largest->pairs, magnitudes_of(pairs));
        if (wants_codes) {
            const vhalf codes = encode_pairs(pairs, splat(reciprocal), full_scale, format);
            memcpy(y + i, &codes, sizeof codes);
        }
    }
    return i;
}

/* The largest of those that are finite: looked for again, as it is rare that one is not. */
INLINE float largest_finite(const char *x, int64_t count, int64_t type) {
    vi largest = splat_bits(0);
    for (int64_t i = 0; i < count; i += LANES) {
        const vi magnitude = (vi)load_up_to(x + i * value_size(type), type, count - i) & 0x7FFFFFFF;
        largest = larger_of(magnitude & (magnitude < 0x7F800000), largest);
    }
    return largest_lane(largest);
}

INLINE void encode_range(const char *x, uint8_t *y, int64_t count, int64_t type, float reciprocal, float full_scale,
                         fp8_format format, int wants_codes, float *maxabs, int only_finite) {
    magnitudes largest = {splat_bits(0), splat_pairs(0)};
    int64_t i = 0;
    if (wants_codes ? type == FP8CPU_BFLOAT16 && reciprocal > 0 && reciprocal < INFINITY : type != FP8CPU_FLOAT32)
        i = encode_in_pairs(x, y, count, reciprocal, full_scale, format, wants_codes, maxabs != NULL, &largest);
    for (; i + LANES <= count; i += LANES) {
        const vf value = load_values(x + i * value_size(type), type);
        if (maxabs) largest.lanes = larger_of((vi)value & 0x7FFFFFFF, largest.lanes); /* NaN is above all */
        if (wants_codes) store_codes(y + i, encode(value * splat(reciprocal), full_scale, format), LANES);
    }
    if (i < count) {
        const vf value = load_some(x + i * value_size(type), type, count - i);
        if (maxabs) largest.lanes = larger_of((vi)value & 0x7FFFFFFF, largest.lanes);
        if (wants_codes) store_codes(y + i, encode(value * splat(reciprocal), full_scale, format), count - i);
    }
    if (!maxabs) return;
    const float found = largest_of(largest, type);
    atomic_max(maxabs, only_finite && !(found < INFINITY) ? largest_finite(x, count, type) : found);
}

/* Codes with a scale, the largest magnitude, or both: what is not wanted is NULL. */
static void encode_tile(const fp8cpu_cast_args *a, tile t, const float *scale, float *maxabs) {
    const int64_t type = a->value_type, count = t.count;
    const int only_finite = a->only_finite != 0;
    const char *x = (const char *)a->x + t.offset * value_size(type);
    uint8_t *y = (uint8_t *)a->y + t.offset;
    const float reciprocal = scale ? 1.0f / *scale : 1.0f, full_scale = (float)a->full_scale;
#define ENCODE(TYPE)                                                                                       \
    if (type == TYPE) {                                                                                    \
        if (!scale)                                                                                        \
            encode_range(x, y, count, TYPE, reciprocal, full_scale, E4M3, 0, maxabs, only_finite);         \
        else if (a->format == FP8CPU_E4M3)                                                                 \
            maxabs ? encode_range(x, y, count, TYPE, reciprocal, full_scale, E4M3, 1, maxabs, only_finite) \
                   : encode_range(x, y, count, TYPE, reciprocal, full_scale, E4M3, 1, NULL, 0);            \
        else                                                                                               \
            maxabs ? encode_range(x, y, count, TYPE, reciprocal, full_scale, E5M2, 1, maxabs, only_finite) \
                   : encode_range(x, y, count, TYPE, reciprocal, full_scale, E5M2, 1, NULL, 0);            \
    }
    ENCODE(FP8CPU_FLOAT32)
    ENCODE(FP8CPU_BFLOAT16)
    ENCODE(FP8CPU_FLOAT16)
}

static void encode_task(void *context, int64_t task, int64_t thread) {
    const cast_job *job = context;
    const fp8cpu_cast_args *a = job->args;
    const tile t = tile_of(job, task);
    (void)thread;
    encode_tile(a, t, a->y ? scale_of(a, t) : NULL, a->maxabs ? (float *)a->maxabs + t.row * a->maxabs_step : NULL);
}

/* Stores the scale of a row's range, found in the table by its bits in bfloat16. */
static void store_scale(const fp8cpu_cast_args *a, int64_t row) {
    const float range = ((const float *)a->maxabs)[row * a->maxabs_step];
    uint32_t bits = 0x7FC00000;
    if (range == range) memcpy(&bits, &range, sizeof bits);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16; /* to bfloat16 */
    if (a->only_finite && !bits && range > 0) bits = 1;
    ((float *)a->scale)[row * a->scale_step] = ((const float *)a->scale_of_range)[bits];
}

/* Dynamic quantization of a row: its range, its scale, and, while the row is in a cache, its codes. */
static void encode_row_task(void *context, int64_t row, int64_t thread) {
    const fp8cpu_cast_args *a = ((const cast_job *)context)->args;
    const tile whole = {row, 0, a->cols, row * a->cols};
    (void)thread;
    encode_tile(a, whole, NULL, (float *)a->maxabs + row);
    store_scale(a, row);
    if (a->y) encode_tile(a, whole, (const float *)a->scale + row, NULL);
}

/* --- FP8 to values ------------------------------------------------------------------------------------------------ */

INLINE vi load_codes(const uint8_t *x) {
    vquarter bytes;
    memcpy(&bytes, x, sizeof bytes);
    return widen_bytes(bytes) << 24;
}

#if defined(__AVX512BW__)
enum { MIN_TABLE_VALUES = 256 }; /* to be worth a table: it has 128 entries, which cost as much each */

/* Values of 16 bits by their codes' magnitudes, in registers: as many values as fill vectors. Returns how many. */
INLINE int64_t decode_by_table(const uint8_t *x, char *y, int64_t count, int64_t type, vf scale, fp8_format format) {
    uint16_t table[128];
    uint8_t codes[128];
    for (int code = 0; code < 128; code++) codes[code] = (uint8_t)code;
    for (int code = 0; code < 128; code += LANES)
        store_values((char *)(table + code), decode_any(load_codes(codes + code), format) * scale, type);
    const __m512i first = _mm512_loadu_si512(table), second = _mm512_loadu_si512(table + 32);
    const __m512i third = _mm512_loadu_si512(table + 64), fourth = _mm512_loadu_si512(table + 96);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(x + i)));
        __builtin_prefetch(x + i + PREFETCH_BYTES);
        const __m512i low = _mm512_permutex2var_epi16(first, code, second); /* by the last six bits */
        const __m512i high = _mm512_permutex2var_epi16(third, code, fourth);
        const __mmask32 is_high = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
        const __m512i value = _mm512_mask_mov_epi16(low, is_high, high), sign = _mm512_slli_epi16(code, 8);
        /* value ^ sign's first bit */
        _mm512_storeu_si512(y + 2 * i, _mm512_ternarylogic_epi32(value, sign, _mm512_set1_epi16((short)0x8000), 0x78));
    }
    return i;
}
#else
#if !defined(__AVX2__)
#define WHOLE(bits) ((uint16_t)(bits))
/* Zeros and eight bytes from `first` on, in turn: 16-bit lanes with a byte on top. */
#if defined(__clang__) || __GNUC__ >= 12
#define ON_TOP(bytes, ...) __builtin_shufflevector((vbytes){0}, bytes, __VA_ARGS__)
#else
#define ON_TOP(bytes, ...) __builtin_shuffle((vbytes){0}, bytes, (vbytes){__VA_ARGS__})
#endif
#define BYTES_ON_TOP(bytes, first)                                                                              \
    (vpairs) ON_TOP(bytes, 0, first, 1, first + 1, 2, first + 2, 3, first + 3, 4, first + 4, 5, first + 5, 6, \
                    first + 6, 7, first + 7)
#endif

/* Codes in bfloat16, in order; returns whether all of them are known to be normal numbers. */
INLINE int bfloat16_of(const uint8_t *x, int e5m2, vi *pairs) {
#if defined(__AVX2__)
    /* The middle quarters change places, so that pairs, which are in order within 16 bytes, are so altogether. */
    bfloat16_of_halves((vi)_mm256_permute4x64_epi64((__m256i)load_bits(x), 0xD8), lookup_of(e5m2), pairs);
    return 0;
#else
    const fp8_format format = e5m2 ? E5M2 : E4M3;
    const vi codes = load_bits(x);
    const int16_t bias = (int16_t)(format.bias >> 16), mask = (int16_t)(format.mask >> 16);
    if (any_exceptional(codes, format)) {
        static const uint16_t magnitudes[2][128] = {{EACH_64(WHOLE, E4M3_BITS, 0), EACH_64(WHOLE, E4M3_BITS, 64)},
                                                    {EACH_64(WHOLE, E5M2_BITS, 0), EACH_64(WHOLE, E5M2_BITS, 64)}};
        uint16_t values[STEP];
        UNROLL for (int j = 0; j < STEP; j++)
            values[j] = (uint16_t)(magnitudes[e5m2][x[j] & 0x7F] | (x[j] & 0x80) << 8);
        memcpy(pairs, values, sizeof values);
        return 0;
    }
    /* As `decode_normal`, in lanes of 16 bits. */
    pairs[0] = (vi)(((BYTES_ON_TOP((vbytes)codes, 16) >> format.shift) & mask) + bias);
    pairs[1] = (vi)(((BYTES_ON_TOP((vbytes)codes, 24) >> format.shift) & mask) + bias);
    return 1;
#endif
}

/* The exponent of a power of two by which every code's value can be multiplied in bfloat16, exactly; 0 for others. */
INLINE int exponent_of(float scale) {
    enum { MOST = 100 };
    int32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    const int exponent = (bits >> 23) - 127;
    return (bits & 0x7FFFFF) == 0 && exponent >= -MOST && exponent <= MOST ? exponent : 0;
}

/* bfloat16 times a power of two, whose exponent stands in `exponents` where theirs do; NaN becomes bfloat16's own. */
INLINE vi times_power_of_two(vi pairs, vpairs exponents) {
    const vpairs sizes = magnitudes_of(pairs), is_number = (sizes > 0) & (sizes < 0x7F80), is_nan = sizes > 0x7F80;
    return (vi)((((vpairs)pairs + (exponents & is_number)) & ~(is_nan & 0x003F)) | (is_nan & 0x0040));
}

/* As many values as fill steps; returns how many. */
INLINE int64_t decode_steps(const uint8_t *x, char *y, int64_t count, int64_t type, vf scale, int e5m2) {
    const int64_t size = value_size(type);
    const int exponent = exponent_of(scale[0]);
    const vpairs exponents = splat_pairs((int16_t)(exponent << 7));
    const int by_exponent = type == FP8CPU_BFLOAT16 && (exponent != 0 || scale[0] == 1);
    const int unchanged = by_exponent && exponent == 0 && !e5m2; /* E4M3's NaN is bfloat16's own already */
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        vi pairs[2];
        vhalf halves[4];
        __builtin_prefetch(x + i + PREFETCH_BYTES);
        const int normal = bfloat16_of(x + i, e5m2, pairs);
        if (unchanged) {
            memcpy(y + i * size, pairs, sizeof pairs);
            continue;
        }
        if (by_exponent && normal) {
            const vpairs values[2] = {(vpairs)pairs[0] + exponents, (vpairs)pairs[1] + exponents};
            memcpy(y + i * size, values, sizeof values);
            continue;
        }
        if (by_exponent) {
            const vi values[2] = {times_power_of_two(pairs[0], exponents), times_power_of_two(pairs[1], exponents)};
            memcpy(y + i * size, values, sizeof values);
            continue;
        }
        memcpy(halves, pairs, sizeof halves);
        UNROLL for (int j = 0; j < 4; j++)
            store_values(y + (i + j * LANES) * size, (vf)(widen(halves[j]) << 16) * scale, type);
    }
    return i;
}
#endif

INLINE void decode_range(const uint8_t *x, char *y, int64_t count, int64_t type, vf scale, fp8_format format) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    if (type != FP8CPU_FLOAT32 && count >= MIN_TABLE_VALUES) i = decode_by_table(x, y, count, type, scale, format);
#else
    i = decode_steps(x, y, count, type, scale, format.mantissa == 2);
#endif
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
    const tile t = tile_of(job, task);
    const int64_t count = t.count;
    const uint8_t *x = (const uint8_t *)a->x + t.offset;
    char *y = (char *)a->y + t.offset * value_size(a->value_type);
    const vf scale = splat(*scale_of(a, t));
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

/* --- launch ------------------------------------------------------------------------------------------------------- */

enum { WHOLE_ROWS = 0 };

static void run(fp8cpu_task task, const fp8cpu_cast_args *args, int64_t tile_size) {
    const int64_t tiles = tile_size == WHOLE_ROWS ? 1 : (args->cols + tile_size - 1) / tile_size;
    const int64_t elements = args->rows * args->cols;
    cast_job job = {args, tile_size, tiles};
    /* Waking threads takes longer than casting a few thousand elements. */
    fp8cpu_parallel(task, &job, args->rows * tiles, elements < TILE ? 1 : args->threads);
}

/* Dynamic quantization with one range for all: two passes over memory. */
static void encode_by_one_range(const fp8cpu_cast_args *args) {
    fp8cpu_cast_args ranges = *args, codes = *args;
    ranges.y = codes.maxabs = 0;
    run(encode_task, &ranges, TILE);
    store_scale(args, 0);
    if (args->y) run(encode_task, &codes, TILE);
}

int FP8CPU_NAME(encode)(const fp8cpu_cast_args *args) {
    if (!args->scale_of_range)
        run(encode_task, args, args->block ? args->block : TILE);
    else if (args->rows == 1)
        encode_by_one_range(args);
    else
        run(encode_row_task, args, WHOLE_ROWS);
    return FP8CPU_OK;
}

int FP8CPU_NAME(decode)(const fp8cpu_cast_args *args) {
    run(decode_task, args, args->block ? args->block : TILE);
    return FP8CPU_OK;
}
