/* What the three stages of attention share. */
#ifndef FP8CPU_ATTENTION_H
#define FP8CPU_ATTENTION_H

#include "units.h"

typedef struct {
    const fp8cpu_attention_args *args;
    int64_t rows;           /* of queries that share one head of keys: (heads / key_heads) * queries */
    int64_t q_size, v_size; /* key_dim and value_dim, up to whole steps */
    int64_t chunk, chunks;  /* positions a task takes, and how many such a head of keys has */
    float *q;               /* [batch, key_heads, rows, q_size], in units */
    float *sums;            /* [batch, key_heads, chunks, rows, v_size], in units */
} attention_job;

/* A row of queries: all of them are numbered [batch, heads, queries], which is [batch, key_heads, rows] too. */
typedef struct {
    int64_t batch, head, query;
} place;

INLINE place place_of(const fp8cpu_attention_args *a, int64_t row) {
    const int64_t head = row / a->queries;
    return (place){head / a->heads, head % a->heads, row % a->queries};
}

INLINE int64_t offset_of(const int64_t *stride, place at) {
    return at.batch * stride[0] + at.head * stride[1] + at.query * stride[2];
}

INLINE float scale_at(int64_t scale, const int64_t *stride, place at) {
    return scale ? ((const float *)scale)[offset_of(stride, at)] : 1.0f;
}

INLINE float single(int64_t scale) { return scale ? *(const float *)scale : 1.0f; }

/* The head of keys that a head of queries uses. */
INLINE place keys_of(const fp8cpu_attention_args *a, place at) {
    return (place){at.batch, at.head / (a->heads / a->key_heads), 0};
}

INLINE fp8_format format_of(int64_t format) { return format == FP8CPU_E5M2 ? E5M2 : E4M3; }

#endif
