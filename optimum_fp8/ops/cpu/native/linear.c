/* y = x w^T with FP8 weights as they lie in memory, [n, k]: codes become floats in registers, never in memory (few rows
 * of x), or in panels that stay in cache (many rows).
 *
 * Weights are read as vectors of 4 LANES codes, one "step" along k. The four bytes of lane l are k = 4 l ... 4 l + 3 of
 * the step; taking byte i of all lanes gives a vector without moving anything between lanes. x is laid out once a call
 * to match. A "unit" is what one lane multiplies at a time: a float, or a pair of bfloat16 (bytes i and i + 2), where
 * the processor multiplies pairs and x fits in bfloat16.
 */
#include "parallel.h"
#include "transpose.h"
#include "units.h"
#include "variant.h"

enum {
    DOT_ROWS = 8,                         /* up to so many rows of x, weights are used as they are decoded, */
    SPAN_STEPS = 8,                       /* in spans of k so short that x stays in the first-level cache */
    TILE_ROWS = LANES == 16 ? 12 : 6,     /* rows of x, and */
    TILE_COLS = 2 * LANES,                /* rows of w, whose sums are in registers at a time */
    PANEL_UNITS = 256,                    /* units along k in a panel: TILE_COLS floats each, 32 KiB at 16 lanes */
    FETCHES = PANEL_UNITS / TILE_COLS,    /* units of a tile for each row of the next panel */
    TASK_COLS = 128,                      /* rows of w a task takes on */
    PASS_ROWS = 512,                      /* rows of x that are laid out at a time */
};

typedef struct {
    int bf16;    /* units are pairs */
    int blocked; /* weights are scaled, by blocks, as they are decoded */
    int e5m2;
} kind;

enum { MOST_PARTS = 8 };

typedef struct {
    const fp8cpu_linear_args *args;
    const fp8cpu_linear_args *parts; /* several weights that are multiplied with the same x, one behind the other */
    int64_t count, first_task[MOST_PARTS + 1];
    int64_t first_row, rows; /* of x, in this pass */
    int64_t steps;           /* ceil(k / STEP) */
    int64_t task_cols;
    float *x;                /* laid out in units, in panels or in steps */
    float *scratch;
    int64_t scratch_size; /* floats a thread */
} linear_job;

INLINE int units_of(kind k) { return k.bf16 ? 2 : 4; }
INLINE int64_t codes_of(int64_t units, kind k) { return k.bf16 ? 2 * units : units; }

/* --- decoding and multiplying units --------------------------------------------------------------------------------- */

/* The units of one step of a row: units[i] holds byte i of every lane, or the pair of bytes i and i + 2. */
INLINE void decode_step(vi codes, kind k, vf *units) {
#if defined(__AVX512VBMI__)
    if (k.bf16) {
        units[0] = (vf)bfloat16_of_even_bytes(codes, k.e5m2);
        units[1] = (vf)bfloat16_of_odd_bytes(codes, k.e5m2);
        return;
    }
#endif
    decode_units(codes, k.e5m2, units);
}

INLINE vf multiply_add(vf sum, vf a, vf b, kind k) {
#if defined(__AVX512BF16__)
    if (k.bf16) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)k;
    return sum + a * b;
}

INLINE float block_scale(const fp8cpu_linear_args *a, int64_t n, int64_t k) {
    return ((const float *)a->w_scale)[n / a->block * divide_up(a->k, a->block) + k / a->block];
}

/* --- laying out x --------------------------------------------------------------------------------------------------- */

/* Row m of x as floats, on the FP8 grid where it has a scale, with zeros up to a whole number of steps. */
INLINE void read_row(const linear_job *job, kind k, int64_t m, float *row) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t type = a->x_type;
    const char *x = (const char *)a->x + (job->first_row + m) * a->x_stride * value_size(type);
    const float *scale = (const float *)a->x_scale;
    const vf reciprocal = splat(scale ? 1.0f / scale[(job->first_row + m) * a->x_scale_step] : 1.0f);
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

/* Unit i of the four floats at `group`. */
INLINE float unit_of(const float *group, int i, kind k) {
    if (!k.bf16) return group[i];
    uint32_t low, high;
    memcpy(&low, group + i, 4);
    memcpy(&high, group + i + 2, 4);
    const uint32_t pair = low >> 16 | (high & 0xFFFF0000);
    float unit;
    memcpy(&unit, &pair, 4);
    return unit;
}

/* For dot products: [step][row][unit][lane]. */
INLINE void lay_out_steps(const linear_job *job, kind k, int64_t m, float *row) {
    const int units = units_of(k);
    float *x = job->x + m * units * LANES;
    read_row(job, k, m, row);
    for (int64_t step = 0; step < job->steps; step++, x += job->rows * units * LANES)
        UNROLL for (int i = 0; i < units; i++)
            for (int lane = 0; lane < LANES; lane++) x[i * LANES + lane] = unit_of(row + step * STEP + 4 * lane, i, k);
}

/* The rows of a pass are cut into tiles as even as can be: how many there are, and where one begins. */
INLINE int64_t tiles_of(const linear_job *job) { return divide_up(job->rows, TILE_ROWS); }
INLINE int64_t tile_start(const linear_job *job, int64_t tile) { return tile * job->rows / tiles_of(job); }

/* For tiles: [panel along k][tile][unit along k][row of the tile]. */
INLINE void lay_out_tile(const linear_job *job, kind k, int64_t tile, float *row) {
    const int64_t first = tile_start(job, tile), height = tile_start(job, tile + 1) - first;
    const int64_t all_units = job->steps * STEP / 4 * units_of(k);
    for (int64_t m = 0; m < height; m++) {
        read_row(job, k, first + m, row);
        for (int64_t panel = 0; panel * PANEL_UNITS < all_units; panel++) {
            const int64_t start = panel * PANEL_UNITS, count = smaller(PANEL_UNITS, all_units - start);
            float *x = job->x + start * job->rows + first * count + m;
            for (int64_t unit = 0; unit < count; unit++) {
                const int64_t at = start + unit, units = units_of(k);
                x[unit * height] = unit_of(row + at / units * 4, (int)(at % units), k);
            }
        }
    }
}

/* --- from sums to the output ---------------------------------------------------------------------------------------- */

/* sums[m][n - first]: times scales, plus bias, rounded; for `cols` rows of w from `first` on. */
static void finish(const linear_job *job, int blocked, const float *sums, int64_t stride, int64_t first, int64_t cols) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t type = a->x_type, size = value_size(type), bias_type = a->bias_type;
    const float *w_scale = (const float *)a->w_scale, *x_scale = (const float *)a->x_scale;
    for (int64_t m = 0; m < job->rows; m++) {
        const int64_t row = job->first_row + m;
        const float of_x = x_scale ? x_scale[row * a->x_scale_step] : 1.0f;
        char *y = (char *)a->y + (row * a->y_stride + first) * size;
        for (int64_t i = 0; i < cols; i += LANES) {
            const int64_t n = first + i, left = cols - i;
            vf scale = splat(of_x);
            if (!blocked) scale *= a->w_scale_step ? load_up_to(w_scale + n, FP8CPU_FLOAT32, left) : splat(*w_scale);
            vf value = load_floats(sums + m * stride + i) * scale;
            if (a->bias) {
                vf bias = load_up_to((const char *)a->bias + n * value_size(bias_type), bias_type, left);
                if (a->round_before_bias) {
                    value = round_to(value, type);
                    bias = round_to(bias, type);
                }
                value += bias;
            }
            if (left >= LANES)
                store_values(y + i * size, value, type);
            else
                store_some(y + i * size, value, type, left);
        }
    }
}

/* --- few rows of x: dot products ------------------------------------------------------------------------------------ */

/* One step of one row of w times all `x_rows` rows of x. */
INLINE void dot_step(vi codes, kind k, float scale, int x_rows, const float *x, vf *sums) {
    const int units = units_of(k);
    vf w[4];
    decode_step(codes, k, w);
    UNROLL for (int i = 0; i < units; i++) {
        if (k.blocked) w[i] *= scale;
        UNROLL for (int c = 0; c < x_rows; c++)
            sums[c] = multiply_add(sums[c], load_floats(x + (c * units + i) * LANES), w[i], k);
    }
}

/* `w_rows` rows of w from n on, times all `x_rows` rows of x, over steps `from` ... `to` - 1; added to sums. */
INLINE void dot_steps(const linear_job *job, kind k, int w_rows, int x_rows, int64_t n, int64_t from, int64_t to,
                      vf *sums) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t row_size = a->k, whole = smaller(to, row_size / STEP);
    const uint8_t *w = (const uint8_t *)a->w + n * row_size + from * STEP;
    const float *x = job->x + from * x_rows * units_of(k) * LANES;
    for (int64_t step = from; step < whole; step++, w += STEP, x += x_rows * units_of(k) * LANES)
        UNROLL for (int r = 0; r < w_rows; r++) {
            /* Rows, and more so spans, are too short for the processor to see that the next ones will be needed. */
            __builtin_prefetch(w + (r + (x_rows > 4 ? 4 : w_rows)) * row_size);
            dot_step(load_bits(w + r * row_size), k, k.blocked ? block_scale(a, n + r, step * STEP) : 1, x_rows, x,
                     sums + r * x_rows);
        }
    if (whole < to)
        UNROLL for (int r = 0; r < w_rows; r++)
            dot_step(load_step((const uint8_t *)a->w + (n + r) * row_size, whole, row_size), k,
                     k.blocked ? block_scale(a, n + r, whole * STEP) : 1, x_rows, x, sums + r * x_rows);
}

INLINE void store_sums(int w_rows, int x_rows, const vf *sums, float *out, int64_t stride) {
    UNROLL for (int c = 0; c < x_rows; c++) {
        const vf each = sum_each(sums + c, x_rows, w_rows);
        memcpy(out + c * stride, &each, (size_t)w_rows * sizeof(float));
    }
}

/* So few rows of x that they stay in cache: each row of w is done with at once. */
INLINE void dot_rows(const linear_job *job, kind k, int w_rows, int x_rows, int64_t n, float *out) {
    vf sums[4 * 4];
    UNROLL for (int i = 0; i < w_rows * x_rows; i++) sums[i] = splat(0);
    dot_steps(job, k, w_rows, x_rows, n, 0, job->steps, sums);
    store_sums(w_rows, x_rows, sums, out, job->task_cols);
}

INLINE void dot_cols(const linear_job *job, kind k, int x_rows, int64_t first, int64_t cols, float *out) {
    enum { W_ROWS = LANES == 16 ? 4 : 2 };
    int64_t i = 0;
    for (; i + W_ROWS <= cols; i += W_ROWS) dot_rows(job, k, W_ROWS, x_rows, first + i, out + i);
    for (; i < cols; i++) dot_rows(job, k, 1, x_rows, first + i, out + i);
}

/* More rows of x: all rows of w go through one span of k, for which x is in cache, before the next span is begun. */
INLINE void dot_spans(const linear_job *job, kind k, int x_rows, int64_t first, int64_t cols, float *out, vf *kept) {
    enum { W_ROWS = LANES == 16 ? 2 : 1 };
    for (int64_t i = 0; i < cols * x_rows; i++) kept[i] = splat(0);
    for (int64_t from = 0; from < job->steps; from += SPAN_STEPS) {
        const int64_t to = smaller(from + SPAN_STEPS, job->steps);
        for (int64_t i = 0; i < cols; i += W_ROWS) {
            vf sums[2 * DOT_ROWS];
            if (i + W_ROWS <= cols) {
                UNROLL for (int j = 0; j < W_ROWS * x_rows; j++) sums[j] = kept[i * x_rows + j];
                dot_steps(job, k, W_ROWS, x_rows, first + i, from, to, sums);
                UNROLL for (int j = 0; j < W_ROWS * x_rows; j++) kept[i * x_rows + j] = sums[j];
            } else {
                UNROLL for (int j = 0; j < x_rows; j++) sums[j] = kept[i * x_rows + j];
                dot_steps(job, k, 1, x_rows, first + i, from, to, sums);
                UNROLL for (int j = 0; j < x_rows; j++) kept[i * x_rows + j] = sums[j];
            }
        }
    }
    for (int64_t i = 0; i < cols; i++) store_sums(1, x_rows, kept + i * x_rows, out + i, job->task_cols);
}

INLINE void dot_task(const linear_job *job, kind k, int64_t task, int64_t thread) {
    const int64_t first = task * job->task_cols, cols = smaller(job->task_cols, job->args->n - first);
    float *sums = job->scratch + thread * job->scratch_size;
    vf *kept = (vf *)(sums + job->rows * job->task_cols);
    switch (job->rows) {
        case 1: dot_cols(job, k, 1, first, cols, sums); break;
        case 2: dot_cols(job, k, 2, first, cols, sums); break;
        case 3: dot_cols(job, k, 3, first, cols, sums); break;
        case 4: dot_cols(job, k, 4, first, cols, sums); break;
        case 5: dot_spans(job, k, 5, first, cols, sums, kept); break;
        case 6: dot_spans(job, k, 6, first, cols, sums, kept); break;
        case 7: dot_spans(job, k, 7, first, cols, sums, kept); break;
        default: dot_spans(job, k, 8, first, cols, sums, kept); break;
    }
    finish(job, k.blocked, sums, job->task_cols, first, cols);
}

/* --- many rows of x: panels of decoded weights, tiles of sums --------------------------------------------------------- */

/* One step of LANES rows of w from n on, decoded into column `column` of a panel, [unit][TILE_COLS]. Rows behind the
 * last become zeros. */
INLINE void fill_panel_step(const linear_job *job, kind k, int64_t n, int64_t step, float *panel) {
    const fp8cpu_linear_args *a = job->args;
    const uint8_t *w = (const uint8_t *)a->w + n * a->k;
    const int64_t present = smaller(LANES, a->n - n);
    const int whole = (step + 1) * STEP <= a->k && present == LANES, units = units_of(k);
    vi rows[LANES];
    vf scale = splat(1);
    if (whole) {
        UNROLL for (int r = 0; r < LANES; r++) rows[r] = load_bits(w + r * a->k + step * STEP);
    } else {
        for (int r = 0; r < LANES; r++) rows[r] = r < present ? load_step(w + r * a->k, step, a->k) : splat_bits(0);
    }
    if (k.blocked)
        for (int r = 0; r < present; r++) scale[r] = block_scale(a, n + r, step * STEP);
    transpose(rows);
    UNROLL for (int group = 0; group < LANES; group++) {
        vf w[4];
        decode_step(rows[group], k, w);
        UNROLL for (int i = 0; i < units; i++)
            store_floats(panel + (group * units + i) * TILE_COLS, k.blocked ? w[i] * scale : w[i]);
    }
}

/* A tile of `height` rows of x (a constant) by TILE_COLS rows of w, over `count` units; added to sums where told.
 * Meanwhile, the weights of the next panel are fetched: TILE_COLS rows from `next` on. */
INLINE void multiply_tile(kind k, int height, const float *x, const float *panel, int64_t count, int add, float *sums,
                          int64_t stride, const uint8_t *next, int64_t row_size) {
    vf tile[2 * TILE_ROWS];
    UNROLL for (int m = 0; m < 2 * height; m++) tile[m] = splat(0);
    for (int64_t unit = 0; unit < count; unit++, x += height, panel += TILE_COLS) {
        const vf left = load_floats(panel), right = load_floats(panel + LANES);
        if (next) __builtin_prefetch(next + unit / FETCHES * row_size + codes_of(unit % FETCHES, k) * TILE_COLS);
        UNROLL for (int m = 0; m < height; m++) {
            const vf values = splat(x[m]);
            tile[2 * m] = multiply_add(tile[2 * m], values, left, k);
            tile[2 * m + 1] = multiply_add(tile[2 * m + 1], values, right, k);
        }
    }
    UNROLL for (int m = 0; m < height; m++) {
        float *row = sums + m * stride;
        store_floats(row, add ? load_floats(row) + tile[2 * m] : tile[2 * m]);
        store_floats(row + LANES, add ? load_floats(row + LANES) + tile[2 * m + 1] : tile[2 * m + 1]);
    }
}

INLINE void multiply_tile_of(kind k, int64_t height, const float *x, const float *panel, int64_t count, int add,
                             float *sums, int64_t stride, const uint8_t *next, int64_t row_size) {
#define HEIGHT(rows) case rows: multiply_tile(k, rows, x, panel, count, add, sums, stride, next, row_size); break;
    switch (height) {
        HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4) HEIGHT(5) HEIGHT(6)
#if LANES == 16
        HEIGHT(7) HEIGHT(8) HEIGHT(9) HEIGHT(10) HEIGHT(11) HEIGHT(12)
#endif
    }
#undef HEIGHT
}

INLINE void panel_task(const linear_job *job, kind k, int64_t task, int64_t thread) {
    const int64_t first = task * job->task_cols, cols = smaller(job->task_cols, job->args->n - first);
    const int64_t tiles = tiles_of(job), all_units = job->steps * STEP / 4 * units_of(k);
    const int64_t step_units = LANES * units_of(k), row_size = job->args->k;
    const uint8_t *w = (const uint8_t *)job->args->w;
    float *panel = job->scratch + thread * job->scratch_size, *sums = panel + TILE_COLS * PANEL_UNITS;
    for (int64_t start = 0; start < all_units; start += PANEL_UNITS) {
        const int64_t count = smaller(PANEL_UNITS, all_units - start);
        for (int64_t col = 0; col < cols; col += TILE_COLS) {
            for (int64_t unit = 0; unit < count; unit += step_units)
                for (int64_t half = 0; half < TILE_COLS; half += LANES)
                    fill_panel_step(job, k, first + col + half, (start + unit) / step_units,
                                    panel + unit * TILE_COLS + half);
            const uint8_t *next = col + TILE_COLS < cols ? w + (first + col + TILE_COLS) * row_size + codes_of(start, k)
                                                         : w + first * row_size + codes_of(start + PANEL_UNITS, k);
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t row = tile_start(job, tile), height = tile_start(job, tile + 1) - row;
                multiply_tile_of(k, height, job->x + start * job->rows + row * count, panel, count, start > 0,
                                 sums + row * job->task_cols + col, job->task_cols, tile ? NULL : next, row_size);
            }
        }
    }
    finish(job, k.blocked, sums, job->task_cols, first, cols);
}

/* --- the whole --------------------------------------------------------------------------------------------------------- */

typedef struct {
    fp8cpu_task lay_out_dot, dot, lay_out_panel, panel;
} stages;

/* The job with the weight that a task is about, and the task counted from that weight's first. */
static linear_job part_of(const linear_job *job, int64_t *task) {
    linear_job part = *job;
    int64_t p = 0;
    while (*task >= job->first_task[p + 1]) p++;
    part.args = job->parts + p;
    *task -= job->first_task[p];
    return part;
}

/* The four stages with `kind` a constant in each, so that the compiler leaves out what a kind does not need. */
#define STAGES(suffix, ...)                                                                                     \
    static void lay_out_dot_##suffix(void *job, int64_t task, int64_t thread) {                                 \
        const linear_job *j = job;                                                                              \
        lay_out_steps(j, (kind)__VA_ARGS__, task, j->scratch + thread * j->scratch_size);                       \
    }                                                                                                           \
    static void dot_##suffix(void *job, int64_t task, int64_t thread) {                                         \
        const linear_job part = part_of(job, &task);                                                            \
        dot_task(&part, (kind)__VA_ARGS__, task, thread);                                                       \
    }                                                                                                           \
    static void lay_out_panel_##suffix(void *job, int64_t task, int64_t thread) {                               \
        const linear_job *j = job;                                                                              \
        lay_out_tile(j, (kind)__VA_ARGS__, task, j->scratch + thread * j->scratch_size);                        \
    }                                                                                                           \
    static void panel_##suffix(void *job, int64_t task, int64_t thread) {                                       \
        const linear_job part = part_of(job, &task);                                                            \
        panel_task(&part, (kind)__VA_ARGS__, task, thread);                                                     \
    }                                                                                                           \
    static const stages suffix = {lay_out_dot_##suffix, dot_##suffix, lay_out_panel_##suffix, panel_##suffix};

STAGES(float_e4m3, {0, 0, 0})
STAGES(float_e5m2, {0, 0, 1})
STAGES(blocked_e4m3, {0, 1, 0})
STAGES(blocked_e5m2, {0, 1, 1})
#if defined(__AVX512BF16__)
STAGES(pairs_e4m3, {1, 0, 0})
STAGES(pairs_e5m2, {1, 0, 1})
#endif

static const stages *stages_for(const fp8cpu_linear_args *a) {
    const int e4m3 = a->w_format == FP8CPU_E4M3;
    if (a->block) return e4m3 ? &blocked_e4m3 : &blocked_e5m2;
#if defined(__AVX512BF16__)
    if (a->x_scale || a->x_type == FP8CPU_BFLOAT16) return e4m3 ? &pairs_e4m3 : &pairs_e5m2;
#endif
    return e4m3 ? &float_e4m3 : &float_e5m2;
}

/* Rows of w a task takes: so many that x is read seldom, so few that all threads are busy to the end. */
static int64_t task_cols_for(int64_t n, int64_t threads, int few_rows) {
    const int64_t least = few_rows ? LANES : TILE_COLS, most = few_rows ? 32 : TASK_COLS;
    int64_t cols = most;
    while (cols > least && n < cols * threads * 6) cols /= 2;
    return cols;
}

/* Whether x is laid out alike for both: then the second can go along with the first. */
static int goes_along(const fp8cpu_linear_args *a, const fp8cpu_linear_args *b) {
    if (a->x != b->x || a->m != b->m || a->k != b->k || !a->block != !b->block || a->w_format != b->w_format) return 0;
    if (!a->x_scale || !b->x_scale) return !a->x_scale && !b->x_scale;
    if (a->x_scale == b->x_scale && a->x_scale_step == b->x_scale_step) return 1;
    return !a->x_scale_step && !b->x_scale_step && *(const float *)a->x_scale == *(const float *)b->x_scale;
}

static void plan_tasks(linear_job *job, int few_rows) {
    int64_t n = 0;
    for (int64_t part = 0; part < job->count; part++) n += job->parts[part].n;
    job->task_cols = task_cols_for(n, job->args->threads, few_rows);
    for (int64_t part = 0; part < job->count; part++)
        job->first_task[part + 1] = job->first_task[part] + divide_up(job->parts[part].n, job->task_cols);
}

static int multiply(const fp8cpu_linear_args *a, int64_t count) {
    const int few_rows = a->m <= DOT_ROWS;
    const stages *run = stages_for(a);
    linear_job job = {.args = a, .parts = a, .count = count, .steps = divide_up(a->k, STEP)};
    const int64_t padded_k = job.steps * STEP, pass = few_rows ? a->m : smaller(a->m, PASS_ROWS);
    plan_tasks(&job, few_rows);
    const int64_t sums = pass * job.task_cols, more = few_rows ? sums * LANES : TILE_COLS * PANEL_UNITS;
    job.scratch_size = sums + more > padded_k ? sums + more : padded_k;
    job.x = aligned(pass * padded_k);
    job.scratch = aligned(job.scratch_size * a->threads);
    if (!job.x || !job.scratch) {
        free(job.x);
        free(job.scratch);
        return FP8CPU_NO_MEMORY;
    }
    for (; job.first_row < a->m; job.first_row += job.rows) {
        job.rows = smaller(pass, a->m - job.first_row);
        const int64_t threads = job.rows * padded_k < 1 << 14 ? 1 : a->threads;
        fp8cpu_parallel(few_rows ? run->lay_out_dot : run->lay_out_panel, &job, few_rows ? job.rows : tiles_of(&job),
                        threads);
        fp8cpu_parallel(few_rows ? run->dot : run->panel, &job, job.first_task[count], a->threads);
    }
    free(job.x);
    free(job.scratch);
    return FP8CPU_OK;
}

int FP8CPU_NAME(linear)(const fp8cpu_linear_args *args, int64_t count) {
    for (int64_t first = 0, next; first < count; first = next) {
        for (next = first + 1; next < count && next < first + MOST_PARTS; next++)
            if (!goes_along(args + first, args + next)) break;
        if (args[first].m == 0) continue;
        const int status = multiply(args + first, next - first);
        if (status != FP8CPU_OK) return status;
    }
    return FP8CPU_OK;
}
