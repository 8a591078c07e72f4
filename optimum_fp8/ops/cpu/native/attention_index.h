/* Indices of rows in the [batch, head, position] dimensions of attention's tensors, and what lies there. */
#ifndef FP8CPU_ATTENTION_INDEX_H
#define FP8CPU_ATTENTION_INDEX_H

#include "vector.h"

/* A row of queries, or a position of a key head. */
typedef struct {
    int64_t batch, head, position;
} index3;

/* All rows of queries are numbered [batch, heads, queries]. */
INLINE index3 index_of_row(const fp8cpu_attention_args *a, int64_t row) {
    const int64_t head = row / a->queries;
    return (index3){head / a->heads, head % a->heads, row % a->queries};
}

/* The first position of the key head that a row of queries attends to (grouped-query attention). */
INLINE index3 key_head_of(const fp8cpu_attention_args *a, index3 row) {
    return (index3){row.batch, row.head / (a->heads / a->key_heads), 0};
}

INLINE int64_t offset_of(const int64_t *stride, index3 at) {
    return at.batch * stride[0] + at.head * stride[1] + at.position * stride[2];
}

/* Scales by their addresses; 1 where there is none. */
INLINE float scale_at(int64_t scale, const int64_t *stride, index3 at) {
    return scale ? ((const float *)scale)[offset_of(stride, at)] : 1.0f;
}

INLINE float scale_per_tensor(int64_t scale) { return scale ? *(const float *)scale : 1.0f; }

#endif
