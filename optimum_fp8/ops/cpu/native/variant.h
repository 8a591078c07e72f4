/* The kernels are compiled once for each kind of processor, with FP8CPU_VARIANT in their names. */
#ifndef FP8CPU_VARIANT_H
#define FP8CPU_VARIANT_H

#include "fp8cpu.h"

#ifndef FP8CPU_VARIANT
#define FP8CPU_VARIANT portable
#endif
#define FP8CPU_JOIN(name, variant) fp8cpu_##name##_##variant
#define FP8CPU_EXPAND(name, variant) FP8CPU_JOIN(name, variant)
#define FP8CPU_NAME(name) FP8CPU_EXPAND(name, FP8CPU_VARIANT)

int FP8CPU_NAME(encode)(const fp8cpu_cast_args *);
int FP8CPU_NAME(decode)(const fp8cpu_cast_args *);
int FP8CPU_NAME(histogram)(const fp8cpu_histogram_args *);
int FP8CPU_NAME(linear)(const fp8cpu_linear_args *, int64_t count);
int FP8CPU_NAME(grouped)(const fp8cpu_grouped_args *);
int FP8CPU_NAME(experts)(const fp8cpu_experts_args *);
int FP8CPU_NAME(attention)(const fp8cpu_attention_args *);
int FP8CPU_NAME(softmax)(const fp8cpu_attention_args *);
int FP8CPU_NAME(linear_gradient)(const fp8cpu_linear_gradient_args *);

#endif
