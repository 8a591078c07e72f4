/* What the stages of attention share. */
#ifndef FP8CPU_ATTENTION_H
#define FP8CPU_ATTENTION_H

#include "softmax.h"
#include "units.h"

enum {
    PIECE = 64,          /* positions whose keys and values stay in cache while all rows of queries pass, */
    LEAST_CHUNK = 64,    /* a task takes at least, */
    MOST_CHUNK = 2048,   /* and at most */
    FETCH_AHEAD = 7168,  /* bytes: rows are asked for before they are reached */
};

/* A row of queries: all of them are numbered [batch, heads, queries]. Or a position of a head of keys. */
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

/* Positions of one head of keys. */
typedef struct {
    int64_t head, count; /* heads are numbered [batch, key_heads] */
    place first;
} span;

/* What rows of values are multiplied with, for each row of queries; and what their sums so far are. */
typedef struct {
    const float *p;
    int64_t stride;
    const float *factors;
} weights;

typedef struct attention_job attention_job;

struct attention_job {
    const fp8cpu_attention_args *args;
    void (*dot)(const attention_job *job, const span *keys, float *out, int64_t out_stride);
    void (*add)(const attention_job *job, const span *values, weights w, float *sums);
    int two_passes;         /* probabilities are rounded */
    int64_t rows;           /* of queries that share one head of keys: (heads / key_heads) * queries */
    int64_t q_size, v_size; /* floats that a row of queries, or of sums, takes */
    int64_t k_ahead, v_ahead; /* bytes from a row of keys, or values, to the one to fetch */
    int64_t chunk, chunks;  /* positions a task takes, and how many such a head of keys has, */
    int64_t chunks_size;    /* up to whole vectors */
    score_row *score_rows;  /* [batch, key_heads, rows], which is [batch, heads, queries] too */
    float *q;               /* [batch, key_heads, rows, q_size], in units */
    float *largest, *total; /* [batch, key_heads, rows, chunks_size]: the largest score, and the sum of powers */
    float *sums;            /* [batch, key_heads, chunks, rows, v_size], in units */
    float *scratch;         /* [threads, scratch_size] */
    int64_t scratch_size;
};

/* Bytes from a row to the one to fetch: whole rows, as rows may lie far apart. */
INLINE int64_t ahead_of(int64_t stride) {
    const int64_t rows = FETCH_AHEAD / (stride > 0 ? stride : 1);
    return (rows < 4 ? 4 : rows > PIECE ? PIECE : rows) * stride;
}

#endif
