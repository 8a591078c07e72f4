/* The gradient of a matrix product with FP8 weights with respect to its input: y = g w, with w as it lies in memory,
 * [k, n], where k are the outputs of the product and n its inputs.
 *
 * A packed GEMM: chunks of some rows of w by the columns of a task are decoded into panels, which stay in cache, and
 * multiplied with tiles of g, whose sums stay in registers. Units are as in linear_job.h: floats, or pairs of bfloat16,
 * here of two rows of w. Scales of rows of w are multiplied into g, scales along its rows into what is decoded, and those
 * of square blocks, or of all, into sums. */
#include "linear_heights.h"
#include "linear_job.h"
#include "variant.h"

enum {
    CHUNK_UNITS = 128,  /* units along k that are decoded at a time; */
    BLOCK_UNITS = 64,   /* pairs whose sums are scaled by blocks: those of one block */
    MOST_COLS = 128,    /* columns of w that a task takes on, */
    LEAST_COLS = 64,    /* a whole number of steps */
    AHEAD = 16,         /* rows of w that are prefetched */
};

typedef struct {
    const fp8cpu_linear_gradient_args *args;
    int64_t first_row, rows; /* of g, in this pass */
    int64_t units, chunk;    /* along k, and those that are decoded at a time */
    int64_t task_cols;
    float *g;       /* packed: [chunk][tile][unit][row of the tile] */
    float *scratch; /* of each thread */
    int64_t scratch_size;
} gradient_job;

INLINE int64_t tiles_of(const gradient_job *job) { return divide_up(job->rows, TILE_ROWS); }
INLINE int64_t tile_start(const gradient_job *job, int64_t tile) { return tile * job->rows / tiles_of(job); }

/* --- packing g ---------------------------------------------------------------------------------------------------- */

/* Row m of g as floats, times the scales of the rows of w, with zeros up to a whole number of pairs of vectors. */
INLINE void read_gradient(const gradient_job *job, int64_t m, float *row) {
    const fp8cpu_linear_gradient_args *a = job->args;
    const char *g = (const char *)a->g + (job->first_row + m) * a->k * value_size(a->g_type);
    for (int64_t i = 0; i < divide_up(a->k, 2 * LANES) * 2 * LANES; i += LANES) {
        vf values = splat(0);
        if (i < a->k) {
            values = load_up_to(g + i * value_size(a->g_type), a->g_type, a->k - i);
            if (a->w_scale_step)
                values *= load_up_to((const float *)a->w_scale + i, FP8CPU_FLOAT32, a->k - i);
        }
        store_floats(row + i, values);
    }
}

INLINE void pack_gradient(const gradient_job *job, kind k, int64_t tile, float *row) {
    const int64_t first = tile_start(job, tile), height = tile_start(job, tile + 1) - first;
    for (int64_t m = 0; m < height; m++) {
        read_gradient(job, first + m, row);
#if defined(__AVX512BF16__)
        if (k.bf16)
            for (int64_t unit = 0; unit < job->units; unit += LANES)
                _mm512_storeu_si512(row + unit, neighbours(row + 2 * unit));
#endif
        (void)k;
        for (int64_t start = 0; start < job->units; start += job->chunk) {
            const int64_t count = smaller(job->chunk, job->units - start);
            float *g = job->g + start * job->rows + first * count + m;
            for (int64_t unit = 0; unit < count; unit++) g[unit * height] = row[start + unit];
        }
    }
}

/* --- decoding w --------------------------------------------------------------------------------------------------- */

/* Where column `col` of a task is in its panels and sums: floats are in the order of `decode_bytes`. */
INLINE int64_t place_of(int64_t col, kind k) {
    return k.bf16 ? col : col / STEP * STEP + col % 4 * LANES + col % STEP / 4;
}

#if defined(__AVX512BF16__)
/* Bytes of two rows as pairs, so that `bfloat16_of_halves` gives columns in order: of 16 bytes, the first half are those
 * of four columns from 0 on, the other of four from 16 on. */
INLINE __m512i interleaved(void) {
    uint8_t order[64];
    for (int i = 0; i < 64; i++) order[i] = (uint8_t)(i / 16 * 4 + i % 8 / 2 + i % 16 / 8 * 16 + i % 2 * 64);
    return _mm512_loadu_si512(order);
}

/* Rows 2 unit and 2 unit + 1 of w, columns `first` to `first + cols`, for `count` units from `start` on. */
static __attribute__((noinline)) void fill_pairs(const gradient_job *job, int e5m2, int64_t start, int64_t count,
                                                 int64_t first, int64_t cols, float *panels) {
    const fp8cpu_linear_gradient_args *a = job->args;
    const __m512i order = interleaved();
    const lookup tables = in_registers(lookup_of(e5m2));
    for (int64_t unit = 0; unit < count; unit++) {
        const int64_t row = 2 * (start + unit);
        const uint8_t *w = (const uint8_t *)a->w + row * a->n + first;
        const int has_second = row + 1 < a->k;
        for (int64_t col = 0; col < cols; col += TILE_COLS) {
            const __mmask32 present = cols - col >= TILE_COLS ? ~0u : (1u << (cols - col)) - 1;
            const __m256i none = _mm256_setzero_si256();
            const __m256i one = _mm256_mask_loadu_epi8(none, present, w + col);
            const __m256i other = _mm256_mask_loadu_epi8(none, has_second ? present : 0, w + col + a->n);
            if (!(col % 64)) {
                __builtin_prefetch(w + col + AHEAD * a->n);
                __builtin_prefetch(w + col + (AHEAD + 1) * a->n);
            }
            const __m512i codes =
                _mm512_permutex2var_epi8(_mm512_castsi256_si512(one), order, _mm512_castsi256_si512(other));
            vi pairs[2];
            bfloat16_of_halves((vi)codes, tables, pairs);
            float *panel = panels + (col * CHUNK_UNITS) + unit * TILE_COLS;
            store_floats(panel, (vf)pairs[0]);
            store_floats(panel + LANES, (vf)pairs[1]);
        }
    }
}
#endif

/* The same of floats, a row of w a unit; times the scales that change along it. */
INLINE void fill_floats(const gradient_job *job, kind k, int64_t start, int64_t count, int64_t first, int64_t cols,
                        float *panels) {
    const fp8cpu_linear_gradient_args *a = job->args;
    for (int64_t unit = 0; unit < count; unit++) {
        const int64_t row = start + unit;
        const uint8_t *w = (const uint8_t *)a->w + row * a->n;
        const float *scales = (const float *)a->w_scale;
        if (k.blocked)
            scales += group_at(row, a->w_group_rows) * group_at(a->n + a->w_group - 1, a->w_group);
        for (int64_t col = 0; col < cols; col += STEP) {
            const int64_t step = (first + col) / STEP;
            vf values[4], scale = splat(1);
            __builtin_prefetch(w + first + col + AHEAD * a->n);
            decode_bytes(load_step(w, step, a->n), k.e5m2, values);
            if (k.blocked) scale = scales_by_lane(scales, a->w_group, step, a->n);
            float *panel = panels + col * CHUNK_UNITS + unit * TILE_COLS;
            UNROLL for (int i = 0; i < 4; i++)
                store_floats(panel + i / 2 * CHUNK_UNITS * TILE_COLS + i % 2 * LANES,
                             k.blocked ? values[i] * scale : values[i]);
        }
    }
}

/* --- multiplying -------------------------------------------------------------------------------------------------- */

INLINE void gradient_microkernel(kind k, int height, const float *g, const float *panel, int64_t count, float scale,
                                 int add, float *sums, int64_t stride) {
    vf tile[2 * TILE_ROWS];
    UNROLL for (int m = 0; m < 2 * height; m++) tile[m] = splat(0);
    for (int64_t unit = 0; unit < count; unit++, g += height, panel += TILE_COLS) {
        const vf left = load_floats(panel), right = load_floats(panel + LANES);
        UNROLL for (int m = 0; m < height; m++) {
            const vf values = splat(g[m]);
            tile[2 * m] = multiply_add(tile[2 * m], values, left, k);
            tile[2 * m + 1] = multiply_add(tile[2 * m + 1], values, right, k);
        }
    }
    UNROLL for (int m = 0; m < height; m++) UNROLL for (int half = 0; half < 2; half++) {
        float *sum = sums + m * stride + half * LANES;
        const vf products = k.blocked && k.bf16 ? tile[2 * m + half] * scale : tile[2 * m + half];
        store_floats(sum, add ? load_floats(sum) + products : products);
    }
}

#define GRADIENT_MICROKERNEL(name, ...)                                                                             \
    static __attribute__((noinline)) void name(int64_t height, const float *g, const float *panel, int64_t count,  \
                                               float scale, int add, float *sums, int64_t stride) {                \
        switch (height) { HEIGHTS(__VA_ARGS__) }                                                                    \
    }
#define HEIGHT(rows, ...)                                                                         \
    case rows:                                                                                    \
        gradient_microkernel((kind)__VA_ARGS__, rows, g, panel, count, scale, add, sums, stride); \
        break;
GRADIENT_MICROKERNEL(sum_floats, {0, 0, 0, 0})
#if defined(__AVX512BF16__)
GRADIENT_MICROKERNEL(sum_pairs, {1, 0, 0, 0})
GRADIENT_MICROKERNEL(sum_scaled_pairs, {1, 1, 0, 0})
#else
#define sum_pairs sum_floats
#define sum_scaled_pairs sum_floats
#endif

/* sums[m][place of n - first] to outputs: times the scale of all, zero where x saturated, rounded. */
static void finish_gradient(const gradient_job *job, kind k, const float *sums, int64_t first, int64_t cols) {
    const fp8cpu_linear_gradient_args *a = job->args;
    const float all = a->w_scale_step || k.blocked ? 1.0f : *(const float *)a->w_scale;
    const vf reciprocal = splat(a->x ? 1.0f / *(const float *)a->x_scale : 0.0f), limit = splat((float)a->full_scale);
    float ordered[MOST_COLS];
    for (int64_t m = 0; m < job->rows; m++, sums += job->task_cols) {
        const int64_t at = (job->first_row + m) * a->n + first;
        for (int64_t col = 0; col < cols; col++) ordered[col] = sums[place_of(col, k)];
        for (int64_t col = 0; col < cols; col += LANES) {
            const int64_t left = cols - col;
            vf value = load_up_to(ordered + col, FP8CPU_FLOAT32, left) * all;
            if (a->x) {
                const vf x = load_up_to((const char *)a->x + (at + col) * value_size(a->x_type), a->x_type, left);
                const vf size = (vf)((vi)(x * reciprocal) & 0x7FFFFFFF);
                value = (vf)pick((vi)(size > limit), splat_bits(0), (vi)value);
            }
            char *y = (char *)a->y + (at + col) * value_size(a->g_type);
            if (left >= LANES)
                store_values(y, value, a->g_type);
            else
                store_some(y, value, a->g_type, left);
        }
    }
}

INLINE void gradient_task(const gradient_job *job, kind k, int64_t task, int64_t thread) {
    const fp8cpu_linear_gradient_args *a = job->args;
    const int64_t first = task * job->task_cols, cols = smaller(job->task_cols, a->n - first);
    float *panels = job->scratch + thread * job->scratch_size, *sums = panels + MOST_COLS * CHUNK_UNITS;
    for (int64_t start = 0; start < job->units; start += job->chunk) {
        const int64_t count = smaller(job->chunk, job->units - start);
        float scale = 1;
#if defined(__AVX512BF16__)
        if (k.bf16) fill_pairs(job, k.e5m2, start, count, first, cols, panels);
        if (k.bf16 && k.blocked)
            scale = ((const float *)a->w_scale)[group_at(codes_of(start, k), a->w_group_rows) *
                                                    group_at(a->n + a->w_group - 1, a->w_group) +
                                                group_at(first, a->w_group)];
#endif
        if (!k.bf16) fill_floats(job, k, start, count, first, cols, panels);
        for (int64_t col = 0; col < (k.bf16 ? cols : divide_up(cols, STEP) * STEP); col += TILE_COLS)
            for (int64_t tile = 0; tile < tiles_of(job); tile++) {
                const int64_t row = tile_start(job, tile), height = tile_start(job, tile + 1) - row;
                (k.bf16 ? k.blocked ? sum_scaled_pairs : sum_pairs : sum_floats)(
                    height, job->g + start * job->rows + row * count, panels + col * CHUNK_UNITS, count, scale, start > 0,
                    sums + row * job->task_cols + col, job->task_cols);
            }
    }
    finish_gradient(job, k, sums, first, cols);
}

/* --- the two stages, with `kind` a constant in each ----------------------------------------------------------------- */

#define STAGES(suffix, ...)                                                                 \
    static void pack_##suffix(void *context, int64_t task, int64_t thread) {               \
        const gradient_job *job = context;                                                  \
        pack_gradient(job, (kind)__VA_ARGS__, task, job->scratch + thread * job->scratch_size); \
    }                                                                                       \
    static void multiply_##suffix(void *context, int64_t task, int64_t thread) {           \
        gradient_task(context, (kind)__VA_ARGS__, task, thread);                            \
    }
#define BOTH(suffix) {pack_##suffix, multiply_##suffix}

STAGES(floats_e4m3, {0, 0, 0, 0})
STAGES(floats_e5m2, {0, 0, 1, 0})
STAGES(blocked_e4m3, {0, 1, 0, 0})
STAGES(blocked_e5m2, {0, 1, 1, 0})
static const fp8cpu_task of_floats[2][2][2] = {{BOTH(floats_e4m3), BOTH(floats_e5m2)},
                                               {BOTH(blocked_e4m3), BOTH(blocked_e5m2)}};
#if defined(__AVX512BF16__)
STAGES(pairs_e4m3, {1, 0, 0, 0})
STAGES(pairs_e5m2, {1, 0, 1, 0})
STAGES(blocked_pairs_e4m3, {1, 1, 0, 0})
STAGES(blocked_pairs_e5m2, {1, 1, 1, 0})
static const fp8cpu_task of_pairs[2][2][2] = {{BOTH(pairs_e4m3), BOTH(pairs_e5m2)},
                                              {BOTH(blocked_pairs_e4m3), BOTH(blocked_pairs_e5m2)}};

/* Whether g, times the scales of the rows of w, fits in bfloat16: times powers of two. */
static int fits_bfloat16(const fp8cpu_linear_gradient_args *a) {
    const uint32_t *scales = (const uint32_t *)a->w_scale;
    if (a->g_type != FP8CPU_BFLOAT16) return 0;
    for (int64_t row = 0; a->w_scale_step && row < a->k; row++)
        if (scales[row] & 0x007FFFFF) return 0;
    return !a->w_group || (a->w_group == a->w_group_rows && a->w_group == 2 * BLOCK_UNITS);
}
#else
static int fits_bfloat16(const fp8cpu_linear_gradient_args *a) { return (void)a, 0; }
#define of_pairs of_floats
#endif

int FP8CPU_NAME(linear_gradient)(const fp8cpu_linear_gradient_args *a) {
    const int pairs = fits_bfloat16(a), blocked = a->w_group > 0;
    const fp8cpu_task *run = (pairs ? of_pairs : of_floats)[blocked][a->w_format == FP8CPU_E5M2];
    const int64_t units = pairs ? divide_up(a->k, 2) : a->k, most_rows = smaller(PASS_ROWS, a->m);
    const int64_t cols = a->n >= MOST_COLS * a->threads * 4 ? MOST_COLS : LEAST_COLS;
    const int64_t row_size = divide_up(a->k, 2 * LANES) * 2 * LANES, size = MOST_COLS * CHUNK_UNITS + most_rows * cols;
    gradient_job job = {.args = a, .units = units, .task_cols = cols,
                        .chunk = pairs && blocked ? BLOCK_UNITS : CHUNK_UNITS,
                        .scratch_size = divide_up(size > row_size ? size : row_size, STEP) * STEP};
    if (!a->m || !a->n) return FP8CPU_OK;
    job.g = aligned(units * most_rows);
    job.scratch = aligned(job.scratch_size * a->threads);
    const int status = job.g && job.scratch ? FP8CPU_OK : FP8CPU_NO_MEMORY;
    for (int64_t row = 0; row < a->m && status == FP8CPU_OK; row += PASS_ROWS) {
        job.first_row = row;
        job.rows = smaller(PASS_ROWS, a->m - row);
        fp8cpu_parallel_stages(run, (const int64_t[]){tiles_of(&job), divide_up(a->n, cols)}, &job, a->threads);
    }
    free(job.g);
    free(job.scratch);
    return status;
}
