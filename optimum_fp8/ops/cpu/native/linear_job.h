/* What all stages of a matrix product share: the job, how weights are decoded, and how x is packed.
 *
 * Weights are read as vectors of 4 LANES codes, one "step" along k. A "unit" is what one lane multiplies at a time: a
 * float, or a pair of bfloat16, where the processor multiplies pairs and x fits in bfloat16. A step has 4 units of
 * floats, or 2 of pairs. x is packed once a call to match the order in which codes become units.
 */
#ifndef FP8CPU_LINEAR_JOB_H
#define FP8CPU_LINEAR_JOB_H

#include "parallel.h"
#include "transpose.h"
#include "units.h"

enum {
    GROUP_ROWS = 8,                       /* rows of x that dot products are computed with at a time, */
    DOT_ROWS = GROUP_ROWS,                /* up to so many rows of x, weights are used as they are decoded; */
    DOT_ROWS_OF_PAIRS = 4 * GROUP_ROWS,   /* pairs are, again for each group, as decoding them costs so little; */
    DOT_ROWS_BEFORE_TILES = 4,            /* tiles are faster soon */
    GROUP_BYTES = 16 << 10,               /* in spans of k so short that they stay in the first-level cache */
    TILE_ROWS = LANES == 16 ? 12 : 6,     /* rows of x, and */
    TILE_COLS = 2 * LANES,                /* rows of w, whose sums are in registers at a time */
    PANEL_UNITS = 256,                    /* units along k in a panel: TILE_COLS floats each, 32 KiB at 16 lanes */
    PREFETCHES = PANEL_UNITS / TILE_COLS, /* units of a tile for each row of the next panel */
    TASK_COLS = 128,                      /* rows of w a task takes on */
    PASS_ROWS = 512,                      /* rows of x that are packed at a time */
};

typedef struct {
    int bf16;    /* units are pairs */
    int blocked; /* weights are scaled, by blocks, as they are decoded */
    int e5m2;
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

/* --- multiplying units -------------------------------------------------------------------------------------------- */

INLINE vf multiply_add(vf sum, vf a, vf b, kind k) {
#if defined(__AVX512BF16__)
    if (k.bf16) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)k;
    return sum + a * b;
}

/* Scales of blocks of w, from that of row n and column k on along k. */
INLINE const float *scales_from(const fp8cpu_linear_args *a, int64_t n, int64_t k) {
    return (const float *)a->w_scale + n / a->block * divide_up(a->k, a->block) + k / a->block;
}
INLINE float block_scale(const fp8cpu_linear_args *a, int64_t n, int64_t k) { return *scales_from(a, n, k); }

/* --- packing x ---------------------------------------------------------------------------------------------------- */

INLINE int64_t x_row(const linear_job *job, int64_t m) { return job->x_rows ? job->x_rows[m] : job->first_row + m; }
INLINE int64_t y_row(const linear_job *job, int64_t m) { return job->y_rows ? job->y_rows[m] : job->first_row + m; }

/* Row m of x as floats, on the FP8 grid where it has a scale, with zeros up to a whole number of steps. */
INLINE void read_row(const linear_job *job, kind k, int64_t m, float *row) {
    const fp8cpu_linear_args *a = job->args;
    if (job->make_row) {
        job->make_row(job, m, row);
        return;
    }
    const int64_t type = a->x_type, at = x_row(job, m);
    const char *x = (const char *)a->x + at * a->x_stride * value_size(type);
    const float *scale = (const float *)a->x_scale;
    const vf reciprocal = splat(scale ? 1.0f / scale[at * a->x_scale_step] : 1.0f);
    for (int64_t i = 0; i < job->steps * STEP; i += LANES) {
        vf values = splat(0);
        if (i + LANES <= a->k)
            values = load_values(x + i * value_size(type), type);
        else if (i < a->k)
            values = load_some(x + i * value_size(type), type, a->k - i);
        if (scale) values = to_grid(values * reciprocal, (float)a->full_scale, k.e5m2 ? E5M2 : E4M3);
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

/* For dot products: [group][step][row of the group][unit][lane], a unit's lanes in the order of `decode_units`. */
INLINE void pack_steps(const linear_job *job, kind k, int64_t m, float *row) {
    const int units = units_of(k);
    int64_t group = 0;
    while (part_start(job, group + 1, GROUP_ROWS) <= m) group++;
    const int64_t first = part_start(job, group, GROUP_ROWS), height = part_start(job, group + 1, GROUP_ROWS) - first;
    float *x = job->x + (first * job->steps + m - first) * units * LANES;
    read_row(job, k, m, row);
    for (int64_t step = 0; step < job->steps; step++, x += height * units * LANES, row += STEP) {
#if defined(__AVX512BF16__)
        if (k.bf16) {
            const __m512i first_half = neighbours(row), second_half = neighbours(row + STEP / 2);
            _mm512_storeu_si512(x, _mm512_shuffle_i64x2(first_half, second_half, 0x88));
            _mm512_storeu_si512(x + LANES, _mm512_shuffle_i64x2(first_half, second_half, 0xDD));
            continue;
        }
#endif
        UNROLL for (int i = 0; i < units; i++)
            for (int lane = 0; lane < LANES; lane++) x[i * LANES + lane] = row[code_of(i, lane)];
    }
}

/* For tiles: [panel along k][tile][unit along k][row of the tile]. */
INLINE void pack_tile(const linear_job *job, kind k, int64_t tile, float *row) {
    const int64_t first = part_start(job, tile, TILE_ROWS), height = part_start(job, tile + 1, TILE_ROWS) - first;
    const int64_t all_units = job->steps * STEP / 4 * units_of(k);
    for (int64_t m = 0; m < height; m++) {
        read_row(job, k, first + m, row);
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
