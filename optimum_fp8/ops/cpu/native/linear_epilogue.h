/* What all products end with: sums times scales, plus bias, rounded to the output's type. */
#ifndef FP8CPU_LINEAR_EPILOGUE_H
#define FP8CPU_LINEAR_EPILOGUE_H

#include "linear_job.h"

/* Scales of LANES rows of w, of which `count` are there, from n on. */
INLINE vf w_scales(const fp8cpu_linear_args *a, int64_t n, int64_t count) {
    const float *scale = (const float *)a->w_scale;
    if (a->w_scale_step) return load_up_to(scale + n, FP8CPU_FLOAT32, count);
    if (!a->w_scale_half || n + LANES <= a->w_scale_half) return splat(scale[0]);
    vf mixed = splat(scale[1]);
    for (int lane = 0; n + lane < a->w_scale_half; lane++) mixed[lane] = scale[0];
    return mixed;
}

/* LANES sums of row m, or the `left` that there are, from n on: times scales, plus bias. */
INLINE vf finished(const linear_job *job, int blocked, const float *sums, int64_t m, int64_t n, int64_t left) {
    const fp8cpu_linear_args *a = job->args;
    const float *x_scale = (const float *)a->x_scale;
    vf scale = splat(x_scale && !a->x_group ? x_scale[x_row(job, m) * a->x_scale_step] : 1.0f);
    if (!blocked) scale *= w_scales(a, n, left);
    vf value = load_floats(sums) * scale;
    if (a->bias) {
        vf bias = load_up_to((const char *)a->bias + n * value_size(a->bias_type), a->bias_type, left);
        if (a->round_before_bias) {
            value = round_to(value, a->y_type);
            bias = round_to(bias, a->y_type);
        }
        value += bias;
    }
    return value;
}

/* The epilogue of a y whose rows lie where `places` says: in blocks, which turn rows into columns. */
static __attribute__((noinline)) void scatter(const linear_job *job, const float *sums, int64_t stride, int64_t first,
                                              int64_t cols) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t size = value_size(a->y_type);
    char block[LANES][LANES * sizeof(float)];
    for (int64_t m = 0; m < job->rows; m += LANES)
        for (int64_t i = 0; i < cols; i += LANES) {
            const int64_t rows = smaller(LANES, job->rows - m), left = smaller(LANES, cols - i);
            const int32_t *places = places_in_y(job) + m;
            for (int64_t r = 0; r < rows; r++)
                store_values(block[r], finished(job, 0, sums + (m + r) * stride + i, m + r, first + i, left), a->y_type);
            for (int64_t c = 0; c < left; c++) {
                char *y = (char *)a->y + (first + i + c) * a->y_stride * size;
                if (size == 2)
                    for (int64_t r = 0; r < rows; r++) memcpy(y + 2 * (int64_t)places[r], block[r] + 2 * c, 2);
                else
                    for (int64_t r = 0; r < rows; r++) memcpy(y + 4 * (int64_t)places[r], block[r] + 4 * c, 4);
            }
        }
}

/* sums[m][n - first] to outputs: times scales, plus bias, rounded; for `cols` rows of w from `first` on. */
static void epilogue(const linear_job *job, int blocked, const float *sums, int64_t stride, int64_t first,
                     int64_t cols) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t type = a->y_type, size = value_size(type);
    if (a->places && a->y_stride != 1) {
        scatter(job, sums, stride, first, cols);
        return;
    }
    for (int64_t m = 0; m < job->rows; m++) {
        const int64_t row = a->places ? places_in_y(job)[m] : y_row(job, m) * a->y_stride;
        char *y = (char *)a->y + (row + first) * size;
        for (int64_t i = 0; i < cols; i += LANES) {
            const int64_t left = cols - i;
            const vf value = finished(job, blocked, sums + m * stride + i, m, first + i, left);
            if (left >= LANES)
                store_values(y + i * size, value, type);
            else
                store_some(y + i * size, value, type, left);
        }
    }
}

#endif
