/* FP8 arithmetic on CPUs: a plain C interface, called through ctypes. No Python, no torch, no OpenMP at build time.
 *
 * Every argument travels in a struct of 8-byte members only, so that the caller can pack it without knowing the
 * compiler's layout. Pointers are to memory the caller keeps alive; nothing is kept after a call returns.
 */
#ifndef FP8CPU_H
#define FP8CPU_H

#include <stddef.h>
#include <stdint.h>

#define FP8CPU_ABI 12

enum { FP8CPU_FLOAT32 = 0, FP8CPU_BFLOAT16 = 1, FP8CPU_FLOAT16 = 2, FP8CPU_BOOLEAN = 3 };
enum { FP8CPU_E4M3 = 0, FP8CPU_E5M2 = 1 };
enum { FP8CPU_OK = 0, FP8CPU_NO_MEMORY = 1, FP8CPU_NO_VARIANT = 2 };

/* codes <-> values, `rows` x `cols`, both sides contiguous. scale[r * scale_step] is the scale of row r. */
typedef struct {
    int64_t variant, threads, rows, cols;
    int64_t x;          /* const float | bfloat16 | float16 *, or const uint8_t * when casting back */
    int64_t y;          /* uint8_t *, or the values when casting back; 0: only maxabs is wanted */
    int64_t value_type; /* FP8CPU_FLOAT32 ... */
    int64_t format;     /* FP8CPU_E4M3 ... */
    int64_t scale;      /* const float *; may be 0 for maxabs alone */
    int64_t scale_step; /* 0: one scale for all rows, 1: one a row */
    int64_t block;      /* 0, or the side of square blocks: scale is then [ceil(rows/block), ceil(cols/block)] */
    int64_t maxabs;     /* float * or 0: largest |x|, NaN if any x is; one for all rows, or one a row */
    int64_t maxabs_step;
    int64_t only_finite; /* maxabs is that of what is neither NaN nor Inf */
    int64_t scale_of_range; /* const float * or 0: scales are looked up here, by the bits of maxabs, and written; where
                               it is only_finite, what is no zero but in bfloat16 has the scale of the next range */
    double full_scale;
} fp8cpu_cast_args;

/* counts[b] += how many of `count` contiguous values have a magnitude whose float32 has the upper bits b: 8 of the
 * exponent, 4 of the mantissa. */
#define FP8CPU_BINS 4096
typedef struct {
    int64_t variant, threads, count;
    int64_t x, value_type;
    int64_t counts; /* int64_t * [FP8CPU_BINS] */
    int64_t maxabs; /* float *: max(*maxabs, largest |x|), NaN if any x is */
} fp8cpu_histogram_args;

/* y[m, n] = sum_k x[m, k] w[n, k] times scales, plus bias; float32 accumulation. First what is of a call, then what stays
 * from call to call. */
typedef struct {
    int64_t variant, threads, m;
    int64_t x, x_type, x_stride; /* [m, k]; stride between rows, in elements */
    int64_t x_scale;             /* const float *: x is rounded to the FP8 grid; 0: it is not */
    int64_t x_scale_step;        /* per tensor 0, per row of x 1 */
    int64_t x_group;             /* 0, or values along k that share a scale: x_scale is then [m, ceil(k/x_group)] */
    int64_t x_scale_of_range;    /* const float * or 0: as with fp8cpu_cast_args, x has the scales of its own ranges, of what
                                    is finite; the rest becomes NaN. x_scale is 0 then, x contiguous, the product alone */
    int64_t y, y_type, y_stride; /* [m, n] */
    int64_t places; /* 0, or const int32_t * [m], [k], [m]: x[m, k] lies at x + first[m] + second[k], in elements, and
                       y[m, n] at y + third[m] + n * y_stride; then x_stride is not read, and x_scale is 0 */

    int64_t n, k;
    int64_t w, w_format;       /* const uint8_t * [n, k], contiguous */
    int64_t w_scale;           /* const float * */
    int64_t w_scale_step;      /* per tensor 0, per row of w 1 */
    int64_t w_scale_half;      /* 0, or from which row of w on w_scale[1] takes the place of w_scale[0] */
    int64_t w_group;           /* 0, or values along k that share a scale, with those of so many rows of w: w_scale */
    int64_t w_group_rows;      /* is then [ceil(n/w_group_rows), ceil(k/w_group)]; groups are powers of two, from 32 on */
    int64_t bias, bias_type;   /* [n], or 0 */
    int64_t round_before_bias; /* Gaudi: product to y's dtype, then the bias is added in that dtype */
    double full_scale;
} fp8cpu_linear_args;

/* y[m, n] = sum_k g[m, k] w[k, n] times scales; float32 accumulation, rounded once; zero where x[m, n] saturates. All is
 * contiguous: k are the outputs of the product whose gradient this is, n its inputs. */
typedef struct {
    int64_t variant, threads, m, n, k;
    int64_t g, g_type;        /* [m, k] */
    int64_t w, w_format;      /* const uint8_t * [k, n] */
    int64_t w_scale;          /* const float * */
    int64_t w_scale_step;     /* per tensor 0, per row of w 1 */
    int64_t w_group;          /* 0, or values of a row that share a scale, with those of so many rows: w_scale is then */
    int64_t w_group_rows;     /* [ceil(k/w_group_rows), ceil(n/w_group)]; groups are powers of two, from 32 on */
    int64_t x, x_type;        /* [m, n], where |x / x_scale| may be above full_scale; 0: nowhere */
    int64_t x_scale;          /* const float *, one for all */
    int64_t y;                /* [m, n], of g's type */
    double full_scale;
} fp8cpu_linear_gradient_args;

/* As fp8cpu_linear_args, but every row of x has a weight of its own: that of its expert. Rows of other experts than
 * 0 ... experts - 1 become zeros. w is [experts, n, k], bias [experts, n]. */
typedef struct {
    fp8cpu_linear_args product; /* of all rows, with the first expert's weight, scales and bias */
    int64_t experts;
    int64_t expert_of_row;  /* const int64_t * [m] */
    int64_t w_scale_size;   /* floats of one expert */
    int64_t x_scale_expert; /* 1: x_scale is [experts] */
} fp8cpu_grouped_args;

enum { FP8CPU_SILU = 0, FP8CPU_GELU = 1, FP8CPU_RELU = 2 };

/* y[t] = sum over the experts of token t, in ascending order, of router * down(act(gate(x[t])) * up(x[t])). Gate is the
 * upper half of gate_up. All is float32 between the products, or rounded to bfloat16 after each step. */
typedef struct {
    int64_t variant, threads, tokens, chosen, experts, hidden, inner;
    int64_t x, x_type;             /* [tokens, hidden], contiguous; y's type too */
    int64_t x_scale, x_scale_step; /* const float *, one for all 0, one a token 1; 0: nothing is rounded to FP8 */
    int64_t table;                 /* const int64_t * [tokens, chosen]; experts that are not here contribute nothing */
    int64_t experts_min;           /* the number in the table that stands for the first expert */
    int64_t router, router_type;   /* [tokens, chosen] */
    int64_t y;                     /* [tokens, hidden], contiguous */

    int64_t gate_up, down, w_format;       /* const uint8_t *, [experts, 2 inner, hidden] and [experts, hidden, inner] */
    int64_t gate_up_scale, gate_up_scales; /* const float *, and how many an expert has: 1, 2 or 2 inner */
    int64_t down_scale, down_scales;       /* 1 or hidden */
    int64_t middle_scale;                  /* const float * [experts]; 0: each row of what goes into down has its own */
    int64_t activation;                    /* FP8CPU_SILU ... */
    int64_t rounds, at_a_time; /* 1: to bfloat16 after each step, experts summed up so many at a time; 0: all float32 */
    double full_scale;
} fp8cpu_experts_args;

/* y = softmax(softcap(q k^T scaling) + mask) v, keys and values in codes; float32 accumulation. Strides are in elements,
 * of [batch, head, position]; the last dimension is contiguous. A scale's stride is 0 where it is shared. */
typedef struct {
    int64_t variant, threads;
    int64_t batch, heads, key_heads, queries, keys, key_dim, value_dim;
    int64_t type, format;             /* of q, y; of what is rounded to FP8 here */
    int64_t q, q_stride[3];           /* [batch, heads, queries, key_dim] */
    int64_t k, k_format, k_stride[3]; /* const uint8_t * [batch, key_heads, keys, key_dim] */
    int64_t v, v_format, v_stride[3]; /* const uint8_t * [batch, key_heads, keys, value_dim] */
    int64_t q_scale, q_scale_stride[3];        /* const float *: q is rounded to the FP8 grid; 0: it is not */
    int64_t k_scale, k_scale_stride[3];        /* const float *, the last stride 0 or 1; 0: none */
    int64_t v_scale, v_scale_stride[3];
    int64_t p_scale, output_scale;             /* const float *: what is rounded to the FP8 grid with it; 0: it is not */
    int64_t mask, mask_type, mask_size, mask_stride[3]; /* [batch, heads, queries, keys], mask_size bytes an element; or 0 */
    int64_t sinks, sinks_type, sinks_stride[3];         /* [batch, heads, queries], or 0 */
    int64_t scores, scores_stride; /* float * [batch * heads * queries, stride]: scratch, whole vectors a row; attention
                                      needs it where it rounds probabilities, or scores */
    int64_t y;                     /* [batch, queries, heads, value_dim], contiguous */
    int64_t rounds_scores;         /* each step from products to scores is rounded to q's type, */
    int64_t rounds_probabilities;  /* and their softmax, before it is to FP8 */
    double full_scale, scaling, softcap;
} fp8cpu_attention_args;

typedef struct {
    int (*encode)(const fp8cpu_cast_args *);
    int (*decode)(const fp8cpu_cast_args *);
    int (*histogram)(const fp8cpu_histogram_args *);
    int (*linear)(const fp8cpu_linear_args *, int64_t count);
    int (*grouped)(const fp8cpu_grouped_args *);
    int (*experts)(const fp8cpu_experts_args *);
    int (*attention)(const fp8cpu_attention_args *);
    int (*softmax)(const fp8cpu_attention_args *);
    int (*linear_gradient)(const fp8cpu_linear_gradient_args *);
} fp8cpu_kernels;

#if defined(_WIN32)
#define FP8CPU_EXPORT __declspec(dllexport)
#else
#define FP8CPU_EXPORT __attribute__((visibility("default")))
#endif

FP8CPU_EXPORT int fp8cpu_abi(void);
/* Names of the variants built in, best first, NULL behind the last; whether this processor can run one. */
FP8CPU_EXPORT const char *fp8cpu_variant(int index);
FP8CPU_EXPORT int fp8cpu_runs(int index);
/* The variant to use where none is asked for. */
FP8CPU_EXPORT int fp8cpu_best(void);
/* The OpenMP runtime to run on: the address of its GOMP_parallel; NULL runs everything on the calling thread. */
FP8CPU_EXPORT void fp8cpu_set_openmp(void *gomp_parallel);
FP8CPU_EXPORT int fp8cpu_encode(const fp8cpu_cast_args *);
FP8CPU_EXPORT int fp8cpu_decode(const fp8cpu_cast_args *);
FP8CPU_EXPORT int fp8cpu_histogram(const fp8cpu_histogram_args *);
/* `count` products; neighbours with the same x share the work of laying it out, and one set of threads. */
FP8CPU_EXPORT int fp8cpu_linear(const fp8cpu_linear_args *, int64_t count);
FP8CPU_EXPORT int fp8cpu_linear_gradient(const fp8cpu_linear_gradient_args *);
FP8CPU_EXPORT int fp8cpu_grouped(const fp8cpu_grouped_args *);
FP8CPU_EXPORT int fp8cpu_experts(const fp8cpu_experts_args *);
FP8CPU_EXPORT int fp8cpu_attention(const fp8cpu_attention_args *);
/* Attention's softmax alone, in place: `scores` from products q k^T to probabilities that v is multiplied with. */
FP8CPU_EXPORT int fp8cpu_softmax(const fp8cpu_attention_args *);
/* Reads every byte once, as fast as it can (to measure memory bandwidth); returns their xor in 8-byte words. */
FP8CPU_EXPORT int64_t fp8cpu_read(const void *bytes, int64_t count, int64_t threads);

#endif
