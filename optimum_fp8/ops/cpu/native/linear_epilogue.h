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

/* sums[m][n - first] to outputs: times scales, plus bias, rounded; for `cols` rows of w from `first` on. */
static void epilogue(const linear_job *job, int blocked, const float *sums, int64_t stride, int64_t first,
                     int64_t cols) {
    const fp8cpu_linear_args *a = job->args;
    const int64_t type = a->y_type, size = value_size(type), bias_type = a->bias_type;
    const float *x_scale = (const float *)a->x_scale;
    for (int64_t m = 0; m < job->rows; m++) {
        const float of_x = x_scale ? x_scale[x_row(job, m) * a->x_scale_step] : 1.0f;
        char *y = (char *)a->y + (y_row(job, m) * a->y_stride + first) * size;
        for (int64_t i = 0; i < cols; i += LANES) {
            const int64_t n = first + i, left = cols - i;
            vf scale = splat(of_x);
            if (!blocked) scale *= w_scales(a, n, left);
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

#endif
