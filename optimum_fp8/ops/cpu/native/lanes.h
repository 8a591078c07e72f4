/* The lanes of a vector brought together: their largest, their sum, and the sums of several vectors in one. */
#ifndef FP8CPU_LANES_H
#define FP8CPU_LANES_H

#include "transpose.h"

#define OTHER_LANE(lane, size) ((lane) ^ (size))
#define SWAP(v, size) ((vf)SHUFFLE((vi)(v), (vi)(v), ALL_LANES(OTHER_LANE, size)))

/* b where a is NaN. */
INLINE vf larger_float(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return (vf)pick(a > b, (vi)a, (vi)b);
#endif
}

INLINE float largest_lane(vf v) {
#if LANES >= 16
    v = larger_float(v, SWAP(v, 8));
#endif
#if LANES >= 8
    v = larger_float(v, SWAP(v, 4));
#endif
    v = larger_float(v, SWAP(v, 2));
    return larger_float(v, SWAP(v, 1))[0];
}

INLINE float sum_of_lanes(vf v) {
#if LANES >= 16
    v += SWAP(v, 8);
#endif
#if LANES >= 8
    v += SWAP(v, 4);
#endif
    v += SWAP(v, 2);
    return (v + SWAP(v, 1))[0];
}

/* --- sums of several vectors ------------------------------------------------------------------------------------------
 * LANES vectors become one, whose lane i is the sum of the lanes of vector i, by adding halves of two vectors at a time:
 * level 0 takes vectors, level 1 what level 0 has made of two of them, and so on. The pieces that are brought together
 * are those which every processor moves in one instruction: lanes and pairs of lanes within 16 bytes, then 16 bytes. */

typedef int64_t vdouble __attribute__((vector_size(4 * LANES))); /* two lanes in one */

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE_DOUBLE(a, b, ...) __builtin_shufflevector((vdouble)(a), (vdouble)(b), __VA_ARGS__)
#else
#define SHUFFLE_DOUBLE(a, b, ...) __builtin_shuffle((vdouble)(a), (vdouble)(b), (vdouble){__VA_ARGS__})
#endif
#define LANE_IN_TURN(lane, high) (((lane) & ~3) + ((lane) >> 1 & 1) + 2 * (high) + ((lane) & 1) * LANES)
#define DOUBLE_IN_TURN(i, high) (((i) & ~1) + (high) + ((i) & 1) * (LANES / 2))
#define OF_HALVES(lane, high) (2 * ((lane) % (LANES / 2) & ~3) + ((lane) & 3) + 4 * (high) + (lane) / (LANES / 2) * LANES)
#if LANES == 16
#define ALL_DOUBLE(from, high) LANES_4(from, 0, high), LANES_4(from, 4, high)
#elif LANES == 8
#define ALL_DOUBLE(from, high) LANES_4(from, 0, high)
#else
#define ALL_DOUBLE(from, high) from(0, high), from(1, high)
#endif
#define ADD_BOTH(shuffle, a, b, all, from) ((vf)shuffle(a, b, all(from, 0)) + (vf)shuffle(a, b, all(from, 1)))

INLINE vf sum_two(vf a, vf b, int level) {
    if (level == 0) return ADD_BOTH(SHUFFLE, (vi)a, (vi)b, ALL_LANES, LANE_IN_TURN);
#if LANES > 4
    if (level > 1) return ADD_BOTH(SHUFFLE, (vi)a, (vi)b, ALL_LANES, OF_HALVES);
#endif
    return ADD_BOTH(SHUFFLE_DOUBLE, a, b, ALL_DOUBLE, DOUBLE_IN_TURN);
}

/* Of `count` vectors (2 or 4), the first at `level`. */
INLINE vf sum_some(const vf *vectors, int stride, int count, int level) {
    const vf first = sum_two(vectors[0], vectors[stride], level);
    if (count == 2) return first;
    return sum_two(first, sum_two(vectors[2 * stride], vectors[3 * stride], level), level + 1);
}

#endif
