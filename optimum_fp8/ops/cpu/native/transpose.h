/* LANES vectors of LANES 32-bit lanes, transposed in registers: off-diagonal blocks change places, at every scale. */
#ifndef FP8CPU_TRANSPOSE_H
#define FP8CPU_TRANSPOSE_H

#include "vector.h"

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

#define OF_FIRST(lane, size) ((lane) & (size) ? LANES + ((lane) ^ (size)) : (lane))
#define OF_SECOND(lane, size) ((lane) & (size) ? LANES + (lane) : ((lane) ^ (size)))
#define LANES_4(from, i, size) from(i, size), from(i + 1, size), from(i + 2, size), from(i + 3, size)
#if LANES == 16
#define ALL_LANES(from, size) \
    LANES_4(from, 0, size), LANES_4(from, 4, size), LANES_4(from, 8, size), LANES_4(from, 12, size)
#elif LANES == 8
#define ALL_LANES(from, size) LANES_4(from, 0, size), LANES_4(from, 4, size)
#else
#define ALL_LANES(from, size) LANES_4(from, 0, size)
#endif

#define SWAP_BLOCKS(rows, size)                                                            \
    UNROLL for (int i = 0; i < LANES; i++) if (!(i & (size))) {                            \
        const vi first = SHUFFLE(rows[i], rows[i + (size)], ALL_LANES(OF_FIRST, size));    \
        rows[i + (size)] = SHUFFLE(rows[i], rows[i + (size)], ALL_LANES(OF_SECOND, size)); \
        rows[i] = first;                                                                   \
    }

INLINE void transpose(vi *rows) {
    SWAP_BLOCKS(rows, 1)
    SWAP_BLOCKS(rows, 2)
#if LANES >= 8
    SWAP_BLOCKS(rows, 4)
#endif
#if LANES >= 16
    SWAP_BLOCKS(rows, 8)
#endif
}

/* Lane r of the result is the sum of all lanes of vector r, for `count` vectors: 1, 2 or 4. */
INLINE vf sum_each(const vf *vectors, int stride, int count) {
#define SUM_HALVES(a, b, size) \
    ((vf)SHUFFLE((vi)(a), (vi)(b), ALL_LANES(OF_FIRST, size)) + (vf)SHUFFLE((vi)(a), (vi)(b), ALL_LANES(OF_SECOND, size)))
    vf sum = SUM_HALVES(vectors[0], vectors[count > 1 ? stride : 0], 1);
    if (count > 2)
        sum = SUM_HALVES(sum, SUM_HALVES(vectors[2 * stride], vectors[3 * stride], 1), 2);
    else
        sum = SUM_HALVES(sum, sum, 2);
#if LANES >= 8
    sum = SUM_HALVES(sum, sum, 4);
#endif
#if LANES >= 16
    sum = SUM_HALVES(sum, sum, 8);
#endif
#undef SUM_HALVES
    return sum;
}

#endif
