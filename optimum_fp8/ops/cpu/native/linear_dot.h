/* Few rows of x (GEMV and a little more): dot products, with weights used as they are decoded. */
#ifndef FP8CPU_LINEAR_DOT_H
#define FP8CPU_LINEAR_DOT_H

#include "linear_epilogue.h"
#include "zen4.h"

enum { MAX_SUMS = 16 }; /* in registers at a time */

/* Rows of x, and the span of k at hand. */
typedef struct {
    const float *x; /* from its first step on */
    int64_t x_step; /* floats from step to step */
    int64_t from, to;
} span;

/* What to prefetch while a tile is multiplied, a vector for each that is read. Tiles are too short for the processor to
 * see by itself that the next ones will be needed. On a Zen 4 they go to the second cache: with
 * two threads, 4096 x 14336 so took 2.0 ms instead of 2.5 for one row of x, and 2.2 instead of 2.7 for four. */
typedef struct {
    int64_t ahead, row, step; /* bytes from the first codes of the tile; from row to row, from step to step */
} prefetch;

INLINE void prefetch_codes(const uint8_t *p, int into_second) {
    if (into_second)
        __builtin_prefetch(p, 0, 2);
    else
        __builtin_prefetch(p);
}

INLINE decoder decoder_for(kind k) {
#if defined(__AVX512BF16__)
    if (k.bf16) return in_registers(decoder_of(k.e5m2));
#endif
    return decoder_of(k.e5m2);
}

INLINE void decode_step(vi codes, kind k, decoder d, vf *units) {
#if defined(__AVX512BF16__)
    if (k.bf16) {
        decode_pairs(codes, d, units);
        return;
    }
#endif
    (void)k;
    decode_units(codes, d, units);
}

/* An addition waits for the one before it to the same sum. Where sums are few, those of every other unit go apart,
 * `apart` sums further on; 0: they need not. */
INLINE int apart_for(kind k, int w_rows, int x_rows) { return k.bf16 || w_rows * x_rows > 2 ? 0 : w_rows * x_rows; }

/* One step of `w_rows` rows of w, one or two, times `x_rows` rows of x: each value of x is loaded once for both. */
INLINE void dot_step(const vi *codes, kind k, decoder d, const vf *scales, int w_rows, int x_rows, const float *x,
                     int apart, vf *sums) {
    const int units = units_of(k);
    vf w[2][4];
    UNROLL for (int r = 0; r < w_rows; r++) {
        decode_step(codes[r], k, d, w[r]);
        if (k.blocked && !k.bf16) UNROLL for (int i = 0; i < units; i++) w[r][i] *= scales[r];
    }
    if (k.blocked && k.bf16) {
        UNROLL for (int c = 0; c < x_rows; c++) {
            const float *row = x + c * vectors_of(k) * LANES;
            const vf of_x = load_floats(row + units * LANES);
            UNROLL for (int r = 0; r < w_rows; r++) {
                vf products = splat(0);
                UNROLL for (int i = 0; i < units; i++)
                    products = multiply_add(products, load_floats(row + i * LANES), w[r][i], k);
                sums[r * x_rows + c] += products * scales[r] * of_x;
            }
        }
        return;
    }
    UNROLL for (int i = 0; i < units; i++) UNROLL for (int c = 0; c < x_rows; c++) {
        const vf values = load_floats(x + (c * units + i) * LANES);
        UNROLL for (int r = 0; r < w_rows; r++) {
            vf *sum = sums + r * x_rows + c + i % 2 * apart;
            *sum = multiply_add(*sum, values, w[r][i], k);
        }
    }
}

/* Prefetches scales of groups of a row to come, as far as a span goes: a part of each row, which the processor does not see
 * coming. Scales of whole rows are read in order, and those of blocks again and again. */
INLINE void fetch_scales(const linear_job *job, int64_t n, span s) {
    enum { ROWS_AHEAD = 8, LINE = 64 };
    const fp8cpu_linear_args *a = job->args;
    if (a->w_group_rows > 1 || s.to - s.from == job->steps) return;
    const char *from = (const char *)w_scales_from(a, smaller(n + ROWS_AHEAD, a->n - 1), s.from * STEP);
    const int64_t bytes = group_at((s.to - s.from) * STEP, a->w_group) * (int64_t)sizeof(float);
    for (int64_t at = 0; at <= bytes; at += LINE) __builtin_prefetch(from + at);
}

/* `w_rows` rows of w from n on, times `x_rows` rows of x, over a span; added to sums. */
INLINE void dot_steps(const linear_job *job, kind k, int w_rows, int x_rows, int64_t n, span s, prefetch f, vf *sums) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t size = a->k, whole = smaller(s.to, size / STEP);
    const int apart = apart_for(k, w_rows, x_rows);
    const int into_second = is_zen4();
    const int pair = k.bf16 && w_rows > 1 ? 2 : 1; /* floats of two rows would crowd out sums */
    const uint8_t *w = (const uint8_t *)a->w + n * size + s.from * STEP, *fetch = w + f.ahead;
    const float *x = s.x + s.from * s.x_step;
    const decoder d = decoder_for(k);
    const float *scale_rows[4];
    if (k.blocked) UNROLL for (int r = 0; r < w_rows; r++) {
        scale_rows[r] = w_scales_from(a, n + r, 0);
        fetch_scales(job, n + r, s);
    }
    vi codes[2];
    vf scales[2];
    int64_t step = s.from;
    for (; step < whole; step++, w += STEP, fetch += f.step, x += s.x_step)
        UNROLL for (int r = 0; r < w_rows; r += pair) {
            UNROLL for (int i = r; i < r + pair; i++) {
                prefetch_codes(fetch + i * f.row, into_second);
                codes[i - r] = load_bits(w + i * size);
                if (k.blocked) scales[i - r] = scales_by_lane(scale_rows[i], a->w_group, step, size);
            }
            dot_step(codes, k, d, scales, pair, x_rows, x, apart, sums + r * x_rows);
        }
    if (step < s.to)
        UNROLL for (int r = 0; r < w_rows; r++) {
            codes[0] = load_step((const uint8_t *)a->w + (n + r) * size, step, size);
            if (k.blocked) scales[0] = scales_by_lane(scale_rows[r], a->w_group, step, size);
            dot_step(codes, k, d, scales, 1, x_rows, x, apart, sums + r * x_rows);
        }
}

INLINE void store_sums(int w_rows, int x_rows, const vf *sums, float *out, int64_t stride) {
    UNROLL for (int c = 0; c < x_rows; c++) {
        const vf each = sum_each(sums + c, x_rows, w_rows);
        memcpy(out + c * stride, &each, (size_t)w_rows * sizeof(float));
    }
}

/* As dot_steps; sums are kept from span to span, and stored after the last. */
INLINE void dot_rows(const linear_job *job, kind k, int w_rows, int x_rows, int64_t n, span s, prefetch f, vf *kept,
                     float *out) {
    const int count = w_rows * x_rows, apart = apart_for(k, w_rows, x_rows);
    vf sums[MAX_SUMS];
    UNROLL for (int i = 0; i < count; i++) sums[i] = s.from ? kept[i] : splat(0);
    UNROLL for (int i = 0; i < apart; i++) sums[apart + i] = splat(0);
    dot_steps(job, k, w_rows, x_rows, n, s, f, sums);
    UNROLL for (int i = 0; i < apart; i++) sums[i] += sums[apart + i];
    if (s.to < job->steps)
        UNROLL for (int i = 0; i < count; i++) kept[i] = sums[i];
    else
        store_sums(w_rows, x_rows, sums, out, job->task_cols);
}

/* What a tile of weights prefetches. Groups pass over the same weights: each takes a part of the next span's. A single
 * group fetches rows to come along with its own; and where it reads rows from end to end, it is done so soon that memory
 * has to be read in order to keep up. */
INLINE prefetch prefetch_for(const linear_job *job, kind k, span s, int64_t cols, int w_rows, int64_t tile,
                             int64_t group) {
    const int64_t size = job->args->k, groups = parts_of(job, GROUP_ROWS);
    if (groups > 1) {
        const int64_t next = s.to < job->steps ? (s.to - s.from) * STEP : cols * size - s.from * STEP;
        return (prefetch){tile % groups == group ? next : 0, size, STEP};
    }
    if (job->rows <= 4 && s.to - s.from == job->steps) return (prefetch){4 * size, STEP, w_rows * STEP};
    return (prefetch){(k.bf16 ? 8 : 4) * size, size, STEP};
}

/* Rows of w that are multiplied at a time, so that their sums with `x_rows` rows of x stay in registers. */
INLINE int w_rows_for(kind k, int64_t x_rows) {
    return (LANES < 16 ? 2 : k.bf16 ? 2 : 4) / (x_rows > 4 && !k.bf16 ? 2 : 1);
}

/* `cols` rows of w from `first` on, times group `group` of `x_rows` rows of x, over a span. */
INLINE void dot_group(const linear_job *job, kind k, int x_rows, int64_t group, int64_t first, int64_t cols, span s,
                      vf *kept, float *out) {
    const int w_rows = w_rows_for(k, x_rows);
    s.x_step = x_rows * vectors_of(k) * LANES;
    for (int64_t i = 0; i + w_rows <= cols; i += w_rows)
        dot_rows(job, k, w_rows, x_rows, first + i, s, prefetch_for(job, k, s, cols, w_rows, i / w_rows, group),
                 kept + i * x_rows, out + i);
}

/* The rows of w that `dot_group` leaves: seldom more than none, and not worth code for each kind and number of rows of x.
 * Apart from it, as tables and sums have few enough registers. */
static __attribute__((noinline)) void dot_rest(const linear_job *job, kind k, int64_t x_rows, int64_t first,
                                               int64_t cols, span s, vf *kept, float *out) {
    s.x_step = x_rows * vectors_of(k) * LANES;
    for (int64_t i = cols - cols % w_rows_for(k, x_rows); i < cols; i++)
        for (int64_t c = 0; c < x_rows; c++) {
            span row = s;
            row.x += c * vectors_of(k) * LANES;
            dot_rows(job, k, 1, 1, first + i, row, (prefetch){0, 0, STEP}, kept + i * x_rows + c,
                     out + c * job->task_cols + i);
        }
}

/* Steps of a span, all as even as can be. A single row of x is used once for each row of w, and read in order. */
INLINE int64_t span_of(const linear_job *job, kind k, int64_t x_rows) {
    if (job->rows == 1) return job->steps;
    const int64_t most = GROUP_BYTES / (x_rows * vectors_of(k) * LANES * (int64_t)sizeof(float));
    return divide_up(job->steps, divide_up(job->steps, most));
}

INLINE void dot_task(const linear_job *job, kind k, int64_t task, int64_t thread) {
    const int64_t first = task * job->task_cols, cols = smaller(job->task_cols, job->args->n - first);
    const int64_t groups = parts_of(job, GROUP_ROWS), steps = span_of(job, k, divide_up(job->rows, groups));
    float *sums = job->scratch + thread * job->scratch_size;
    vf *kept = (vf *)(sums + job->rows * job->task_cols);
    for (span s = {.from = 0}; s.from < job->steps; s.from = s.to) {
        s.to = smaller(s.from + steps, job->steps);
        for (int64_t group = 0; group < groups; group++) {
            const int64_t start = part_start(job, group, GROUP_ROWS);
            const int64_t x_rows = part_start(job, group + 1, GROUP_ROWS) - start;
            vf *group_kept = kept + start * cols;
            float *out = sums + start * job->task_cols;
            s.x = job->x + start * job->steps * vectors_of(k) * LANES;
#define GROUP_OF(rows)                                                            \
    case rows:                                                                    \
        dot_group(job, k, rows, group, first, cols, s, group_kept, out);          \
        break;
            switch (x_rows) {
                GROUP_OF(1) GROUP_OF(2) GROUP_OF(3) GROUP_OF(4) GROUP_OF(5) GROUP_OF(6) GROUP_OF(7) GROUP_OF(8)
            }
#undef GROUP_OF
            dot_rest(job, k, x_rows, first, cols, s, group_kept, out);
        }
    }
    epilogue(job, k.blocked, sums, job->task_cols, first, cols);
}

#endif
