/* What all stages of attention share: the job, and the ranges of positions that it is cut into. */
#ifndef FP8CPU_ATTENTION_JOB_H
#define FP8CPU_ATTENTION_JOB_H

#include "attention_elements.h"
#include "attention_index.h"
#include "crossover.h"
#include "softmax.h"

/* Flash decoding: positions are cut into splits, one a task, and splits into tiles. */
enum {
    TILE = 64,             /* positions whose keys and values stay in cache while all rows of queries pass */
    MIN_SPLIT = 64,        /* positions a task takes at least, */
    MAX_SPLIT = 2048,      /* and at most */
    PREFETCH_BYTES = 7168, /* how far ahead rows are prefetched */
};

INLINE fp8_format format_of(int64_t format) { return format == FP8CPU_E5M2 ? E5M2 : E4M3; }

/* A range of positions of one key head: a split, or a tile of it. */
typedef struct {
    int64_t head, count; /* heads are numbered [batch, key_heads] */
    index3 first;
} key_range;

/* Attention weights, for a tile's rows of values: probabilities, or the exponentials of scores. */
typedef struct {
    const float *p;
    int64_t stride;
    const float *rescale; /* what the accumulators so far are multiplied with, one a row */
} attention_weights;

typedef struct attention_job attention_job;

struct attention_job {
    const fp8cpu_attention_args *args;
    void (*pack)(const attention_job *job, int64_t number); /* a row of queries */
    void (*dot)(const attention_job *job, const key_range *keys, float *out, int64_t out_stride, float *work);
    void (*add)(const attention_job *job, const key_range *values, attention_weights w, float *acc, float *work);
    int tiles;                      /* they multiply tiles, and `work` is what these need */
    int two_passes;                 /* probabilities are rounded */
    int64_t rows;                   /* of queries that share one key head: (heads / key_heads) * queries, */
    int64_t row_room;               /* up to whole tiles */
    int64_t q_size, v_size;         /* floats that a row of queries, or of accumulators, takes */
    int64_t k_prefetch, v_prefetch; /* from a row of keys, or values, to the one to prefetch */
    int64_t split_size, splits;     /* positions of a split, and splits of a key head, */
    int64_t splits_stride;          /* up to whole vectors */
    score_row *score_rows;          /* [batch, key_heads, rows], which is [batch, heads, queries] too */
    float *q;                       /* [batch, key_heads, row_room, q_size], in units or tiles */
    float *max_score, *exp_sum;     /* [batch, key_heads, rows, splits_stride]: of each split's scores */
    float *acc;                     /* accumulators, [batch, key_heads, splits, row_room, v_size], likewise */
    float *scratch;                 /* [threads, scratch_size] */
    int64_t scratch_size;
};

/* Elements from a row to the one to prefetch: whole rows, as rows may lie far apart; 0, which prefetches what is read at
 * once, where the processor is to do without. */
INLINE int64_t prefetch_distance(int64_t stride, int64_t size) {
    const int64_t rows = PREFETCH_BYTES / (int64_t)sizeof(element) / (stride > 0 ? stride : 1);
    if (stride == size && !prefetches_neighbours()) return 0;
    return (rows < 4 ? 4 : rows > TILE ? TILE : rows) * stride;
}

#endif
