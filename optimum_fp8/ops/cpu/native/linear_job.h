/* What all stages of a matrix product share: the job, how weights are decoded, and how x is packed.
 *
 * Weights are read as vectors of 4 LANES codes, one "step" along k. A "unit" is what one lane multiplies at a time: a
 * float, or a pair of bfloat16, where the processor multiplies pairs and x fits in bfloat16. A step has 4 units of
 * floats, or 2 of pairs. x is packed once a call to match the order in which codes become units.
 */
#ifndef FP8CPU_LINEAR_JOB_H
#define FP8CPU_LINEAR_JOB_H

#include "crossover.h"
#include "parallel.h"
#include "transpose.h"
#include "units.h"

enum {
    GROUP_BYTES = 16 << 10,               /* of a group of rows of x: spans of k so short that they stay in L1 */
    TILE_ROWS = LANES == 16 ? 12 : 6,     /* rows of x, and */
    TILE_COLS = 2 * LANES,                /* rows of w, whose sums are in registers at a time */
    PANEL_UNITS = 256,                    /* units along k in a panel: TILE_COLS floats each, 32 KiB at 16 lanes */
    PREFETCHES = PANEL_UNITS / TILE_COLS, /* units of a tile for each row of the next panel */
    TASK_COLS = 128,                      /* rows of w a task takes on */
    PASS_ROWS = 512,                      /* rows of x that are packed at a time */
};

typedef struct {
    int bf16;    /* units are pairs */
    int blocked; /* scales of w change along k: floats are scaled as they are decoded, of pairs the products of each group,
                    as pairs are exact only without scales */
    int e5m2;
    int folded; /* scales along k are in the values of w and x (linear_folding.h) */
} kind;

enum { MAX_WEIGHTS = 8 };

typedef struct linear_job {
    const fp8cpu_linear_args *args;
    const fp8cpu_linear_args *weights; /* several products of the same x, one behind the other */
    int64_t count, first_task[MAX_WEIGHTS + 1];
    int64_t first_row, rows; /* of x, in this pass */
    const int64_t *x_rows, *y_rows; /* where these are in x and in y; NULL: one behind the other */
    /* NULL, or what makes a row of x instead of reading it: floats that are on the FP8 grid where x has a scale. */
    void (*make_row)(const struct linear_job *, int64_t m, float *row);
    const void *made_of; /* what it needs */
    int64_t steps; /* ceil(k / STEP) */
    int64_t task_cols;
    float *x;                /* packed: in units, in panels or in steps */
    float *scratch;
    int64_t scratch_size; /* floats a thread */
} linear_job;

INLINE int units_of(kind k) { return k.bf16 ? 2 : 4; }
INLINE int64_t codes_of(int64_t units, kind k) { return k.bf16 ? 2 * units : units; }
/* Vectors that a step of a row of x is, packed for dot products: units, and where products are scaled, x's scales. */
INLINE int vectors_of(kind k) { return units_of(k) + (k.bf16 && k.blocked); }

/* --- multiplying units -------------------------------------------------------------------------------------------- */

INLINE vf multiply_add(vf sum, vf a, vf b, kind k) {
#if defined(__AVX512BF16__)
    if (k.bf16) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)k;
    return sum + a * b;
}

/* --- scales along k ----------------------------------------------------------------------------------------------- */

/* Which group, of a power of two values, a value is in: a division would take longer than what it is for. */
INLINE int64_t group_at(int64_t at, int64_t group) { return at >> __builtin_ctzll((uint64_t)group); }

/* Scales of row n of w, and of row `row` of x, from that of column k on along k. */
INLINE const float *w_scales_from(const fp8cpu_linear_args *a, int64_t n, int64_t k) {
    const int64_t across = group_at(a->k + a->w_group - 1, a->w_group);
    return (const float *)a->w_scale + group_at(n, a->w_group_rows) * across + group_at(k, a->w_group);
}
INLINE const float *x_scales_from(const fp8cpu_linear_args *a, int64_t row, int64_t k) {
    return (const float *)a->x_scale + row * group_at(a->k + a->x_group - 1, a->x_group) + group_at(k, a->x_group);
}

/* The scales of a row in the lanes that a step's codes are in: a group is two steps or more, one, or half of one, and the
 * first half of a step is in the first half of the lanes, in whichever order `decode_units` has them. */
INLINE vf scales_by_lane(const float *scales, int64_t group, int64_t step, int64_t size) {
    const float *first = scales + group_at(step * STEP, group);
    if (group >= STEP || step * STEP + group >= size) return splat(*first);
    vi is_first = splat_bits(0);
    UNROLL for (int lane = 0; lane < LANES / 2; lane++) is_first[lane] = -1;
    return (vf)pick(is_first, (vi)splat(first[0]), (vi)splat(first[1]));
}

/* Values along k whose products share a scale. */
INLINE int64_t product_group(const fp8cpu_linear_args *a) {
    return a->x_group && a->x_group < a->w_group ? a->x_group : a->w_group;
}

/* --- packing x ---------------------------------------------------------------------------------------------------- */

INLINE int64_t x_row(const linear_job *job, int64_t m) { return job->x_rows ? job->x_rows[m] : job->first_row + m; }
INLINE int64_t y_row(const linear_job *job, int64_t m) { return job->y_rows ? job->y_rows[m] : job->first_row + m; }

/* Where the rows of this pass begin in x, and in y, and how far on the values along k are. */
INLINE const int32_t *places_in_x(const linear_job *job) { return (const int32_t *)job->args->places + job->first_row; }
INLINE const int32_t *places_along_k(const linear_job *job) {
    return (const int32_t *)job->args->places + job->args->m;
}
INLINE const int32_t *places_in_y(const linear_job *job) {
    return places_along_k(job) + job->args->k + job->first_row;
}

/* A row of values that lie here and there: of a convolution, what a window reaches. */
static __attribute__((noinline)) void read_places(const linear_job *job, int64_t m, float *row) {
    const fp8cpu_linear_args *a = job->args;
    const int32_t *places = places_along_k(job);
    const char *x = (const char *)a->x + places_in_x(job)[m] * value_size(a->x_type);
    char near[LANES * sizeof(float)];
    for (int64_t i = 0; i < job->steps * STEP; i += LANES) {
        const int64_t count = smaller(LANES, a->k - i);
        memset(near, 0, sizeof near);
        if (a->x_type == FP8CPU_FLOAT32)
            for (int64_t j = 0; j < count; j++) memcpy(near + 4 * j, x + 4 * (int64_t)places[i + j], 4);
        else
            for (int64_t j = 0; j < count; j++) memcpy(near + 2 * j, x + 2 * (int64_t)places[i + j], 2);
        store_floats(row + i, load_values(near, a->x_type));
    }
}

/* NaN in the place of Inf, which a cast would saturate. */
INLINE vf only_finite(vf values) {
    const vi is_finite = ((vi)values & 0x7FFFFFFF) < 0x7F800000;
    return (vf)pick(is_finite, (vi)values, splat_bits(0x7FC00000));
}

/* Row m of x as floats, on the FP8 grid where it has a scale, with zeros up to a whole number of steps. Scales of groups
 * are multiplied in, but for pairs without, whose products will be. */
INLINE void read_row(const linear_job *job, kind k, int64_t m, float *row) {
    const fp8cpu_linear_args *a = job->args;
    if (job->make_row) {
        job->make_row(job, m, row);
        return;
    }
    if (a->places) {
        read_places(job, m, row);
        return;
    }
    const int64_t type = a->x_type, at = x_row(job, m);
    const char *x = (const char *)a->x + at * a->x_stride * value_size(type);
    const float *scale = (const float *)a->x_scale;
    vf reciprocal = splat(scale && !a->x_group ? 1.0f / scale[at * a->x_scale_step] : 1.0f);
    for (int64_t i = 0; i < job->steps * STEP; i += LANES) {
        vf values = splat(0);
        if (i < a->k) {
            const float of_group = a->x_group ? *x_scales_from(a, at, i) : 1.0f;
            if (a->x_group) reciprocal = splat(1.0f / of_group);
            values = load_up_to(x + i * value_size(type), type, a->k - i);
            if (a->x_scale_of_range) values = only_finite(values);
            if (scale) values = to_grid(values * reciprocal, (float)a->full_scale, k.e5m2 ? E5M2 : E4M3);
            if (a->x_group && (!k.bf16 || k.folded)) values *= of_group;
        }
        store_floats(row + i, values);
    }
}

/* Rows are cut into parts of at most `most`, as even as can be: how many there are, and where one begins. */
INLINE int64_t parts_of(const linear_job *job, int64_t most) { return divide_up(job->rows, most); }
INLINE int64_t part_start(const linear_job *job, int64_t part, int64_t most) {
    return part * job->rows / parts_of(job, most);
}

#if defined(__AVX512BF16__)
/* 32 floats that fit in bfloat16, as pairs of neighbours. */
INLINE __m512i neighbours(const float *row) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + LANES), _mm512_loadu_ps(row));
}
#endif

/* For dot products: [group][step][row of the group][unit][lane], a unit's lanes in the order of `decode_units`; behind
 * the units of pairs that are scaled, the scales. */
INLINE void pack_steps(const linear_job *job, kind k, int64_t m, float *row) {
    const int units = units_of(k), vectors = vectors_of(k);
#if defined(__AVX512BF16__)
    const fp8cpu_linear_args *a = job->args;
    const float *scales = a->x_group ? x_scales_from(a, x_row(job, m), 0) : NULL;
#endif
    int64_t group = 0;
    while (part_start(job, group + 1, GROUP_ROWS) <= m) group++;
    const int64_t first = part_start(job, group, GROUP_ROWS), height = part_start(job, group + 1, GROUP_ROWS) - first;
    float *x = job->x + (first * job->steps + m - first) * vectors * LANES;
    read_row(job, k, m, row);
    for (int64_t step = 0; step < job->steps; step++, x += height * vectors * LANES, row += STEP) {
#if defined(__AVX512BF16__)
        if (k.bf16) {
            const __m512i first_half = neighbours(row), second_half = neighbours(row + STEP / 2);
            _mm512_storeu_si512(x, _mm512_shuffle_i64x2(first_half, second_half, 0x88));
            _mm512_storeu_si512(x + LANES, _mm512_shuffle_i64x2(first_half, second_half, 0xDD));
            if (k.blocked)
                store_floats(x + units * LANES, scales ? scales_by_lane(scales, a->x_group, step, a->k) : splat(1));
            continue;
        }
#endif
        UNROLL for (int i = 0; i < units; i++)
            for (int lane = 0; lane < LANES; lane++) x[i * LANES + lane] = row[code_of(i, lane)];
    }
}

#if defined(__AVX512BF16__)
/* The rows of a tile, in runs of neighbours: a masked load of each fills its lanes. */
typedef struct {
    int64_t count, place[TILE_ROWS]; /* of lane 0, were it a neighbour too */
    __mmask16 lanes[TILE_ROWS];
} runs;

INLINE runs runs_of(const int32_t *places, int64_t rows) {
    runs found = {.count = 0};
    for (int64_t row = 0; row < rows; row++) {
        if (!row || places[row] != places[row - 1] + 1) found.place[found.count++] = places[row] - row;
        found.lanes[found.count - 1] |= (__mmask16)(1 << row);
    }
    return found;
}

/* One value of each row; most tiles have two runs at most. */
INLINE __m512i load_runs(const uint16_t *x, const runs *r) {
    __m256i values = _mm256_maskz_loadu_epi16(r->lanes[0], x + r->place[0]);
    values = _mm256_mask_loadu_epi16(values, r->lanes[1], x + r->place[1]);
    for (int64_t run = 2; run < r->count; run++)
        values = _mm256_mask_loadu_epi16(values, r->lanes[run], x + r->place[run]);
    return _mm512_castsi256_si512(values);
}

/* As pack_tile, of pairs that lie here and there in memory; those of all rows at once, as the rows of a convolution are
 * neighbours where its values along k are not. */
INLINE void pack_pairs_of_places(const linear_job *job, int64_t first, int64_t height) {
    const int64_t all_units = job->steps * STEP / 2, k = job->args->k;
    const uint16_t *from = (const uint16_t *)job->args->x;
    const int32_t *places = places_along_k(job);
    const runs r = runs_of(places_in_x(job) + first, height);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i alternating = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_or_si512(low, _mm512_set1_epi32(32)), 16));
    for (int64_t start = 0; start < all_units; start += PANEL_UNITS) {
        const int64_t count = smaller(PANEL_UNITS, all_units - start);
        float *x = job->x + start * job->rows + first * count;
        for (int64_t unit = 0; unit < count; unit++, x += height) {
            const int64_t i = (start + unit) / 2 * 4 + unit % 2;
            const __m512i none = _mm512_setzero_si512();
            const __m512i one = i < k ? load_runs(from + places[i], &r) : none;
            const __m512i other = i + 2 < k ? load_runs(from + places[i + 2], &r) : none;
            const __m512i pairs = _mm512_permutex2var_epi16(one, alternating, other);
            if ((count - unit) * height >= LANES)
                _mm512_storeu_si512(x, pairs); /* what is behind the rows is written next */
            else
                memcpy(x, &pairs, (size_t)height * sizeof(float));
        }
    }
}
#endif

/* Scales of x for tiles of pairs, [group along k][row of x], behind the units. */
INLINE float *packed_scales(const linear_job *job, kind k) {
    return job->x + job->rows * job->steps * LANES * units_of(k);
}

INLINE void pack_scales(const linear_job *job, kind k, int64_t m) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t group = product_group(a), at = x_row(job, m);
    float *scales = packed_scales(job, k) + m;
    for (int64_t i = 0; i < a->k; i += group, scales += job->rows) *scales = a->x_group ? *x_scales_from(a, at, i) : 1.0f;
}

/* For tiles: [panel along k][tile][unit along k][row of the tile]. */
INLINE void pack_tile(const linear_job *job, kind k, int64_t tile, float *row) {
    const int64_t first = part_start(job, tile, TILE_ROWS), height = part_start(job, tile + 1, TILE_ROWS) - first;
    const int64_t all_units = job->steps * STEP / 4 * units_of(k);
#if defined(__AVX512BF16__)
    if (k.bf16 && job->args->places && job->args->x_type == FP8CPU_BFLOAT16) {
        pack_pairs_of_places(job, first, height);
        return;
    }
#endif
    for (int64_t m = 0; m < height; m++) {
        read_row(job, k, first + m, row);
        if (k.bf16 && k.blocked) pack_scales(job, k, first + m);
#if defined(__AVX512BF16__)
        /* Of four neighbours the first and third are a pair, and the others: as fill_panel_step decodes them. */
        const __m512i mixed = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0F0E0B0A0D0C0908, 0x0706030205040100));
        if (k.bf16)
            for (int64_t unit = 0; unit < all_units; unit += LANES)
                _mm512_storeu_si512(row + unit, _mm512_shuffle_epi8(neighbours(row + 2 * unit), mixed));
#endif
        for (int64_t start = 0; start < all_units; start += PANEL_UNITS) {
            const int64_t count = smaller(PANEL_UNITS, all_units - start);
            float *x = job->x + start * job->rows + first * count + m;
            for (int64_t unit = 0; unit < count; unit++) x[unit * height] = row[start + unit];
        }
    }
}

#endif
