/* Tiles of 16 rows of 64 bytes, and their products: AMX's instructions, or the same in plain C, so that all code around
 * these eight operations runs, and is tested, on any processor. Where vectors of pairs are multiplied (AVX512_BF16), tiles
 * are lists of these, and one operation takes the place of all eight.
 *
 * A tile of sums is 16 x 16 floats. TILE_DOT(c, a, b) adds to c[m][n] the products of the 32 bfloat16 of row m of a with
 * those of column n of b, whose rows hold pairs: b[k / 2][n][k % 2]. Numbers of tiles are constants, 0 ... 7. */
#ifndef FP8CPU_TILES_H
#define FP8CPU_TILES_H

#include "vector.h"

enum { TILE_SIDE = 16, TILE_BYTES = 1024, TILE_FLOATS = 256 };

/* As a float; AMX takes numbers below the smallest normal one for zero. */
INLINE float bfloat16_value(uint16_t bits) {
    const uint32_t wide = (bits & 0x7F80) ? (uint32_t)bits << 16 : (uint32_t)(bits & 0x8000) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

#if defined(__AMX_BF16__)
#include <immintrin.h>

/* Other libraries in the same thread have settings of their own: ours are made for each task, and given back after it. */
INLINE void tiles_begin(void) {
    struct {
        uint8_t palette, start_row, unused[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } settings = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        settings.row_bytes[tile] = 64;
        settings.rows[tile] = TILE_SIDE;
    }
    _tile_loadconfig(&settings);
}
INLINE void tiles_end(void) { _tile_release(); }
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from) _tile_loadd(tile, from, 64)
#define TILE_STORE(tile, to) _tile_stored(tile, to, 64)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

#elif defined(__AVX512BF16__)

INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}

/* A tile of sums is 16 vectors here, and stays in registers over all of k. So this is one operation: products of `count`
 * tiles of a, `stride` values apart, with as many of b, one behind the other, are added up, to c or to 0. Not inlined, as
 * what else is in registers would crowd out sums. Each vdpbf16ps takes its pair of a from memory: on a Zen 4 that is as
 * fast as any other shape (12 rows and two vectors of b, say), one a cycle. */
static __attribute__((noinline)) void multiply_tiles(const uint16_t *a, int64_t stride, const float *b, int64_t count,
                                                     int add, float *c) {
    __m512 sums[TILE_SIDE];
    UNROLL for (int m = 0; m < TILE_SIDE; m++)
        sums[m] = add ? _mm512_loadu_ps(c + m * TILE_SIDE) : _mm512_setzero_ps();
    for (int64_t tile = 0; tile < count; tile++, a += stride)
        for (const uint16_t *left = a; left < a + 2 * TILE_SIDE; left += 2, b += TILE_SIDE) {
            const __m512bh right = (__m512bh)_mm512_loadu_ps(b);
            UNROLL for (int m = 0; m < TILE_SIDE; m++) {
                int32_t pair;
                memcpy(&pair, left + m * 2 * TILE_SIDE, sizeof pair);
                sums[m] = _mm512_dpbf16_ps(sums[m], (__m512bh)_mm512_set1_epi32(pair), right);
            }
        }
    UNROLL for (int m = 0; m < TILE_SIDE; m++) _mm512_storeu_ps(c + m * TILE_SIDE, sums[m]);
}

#else

static _Thread_local float tile_memory[8][TILE_FLOATS];

INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}
#define TILE_ZERO(tile) memset(tile_memory[tile], 0, TILE_BYTES)
#define TILE_LOAD(tile, from) memcpy(tile_memory[tile], from, TILE_BYTES)
#define TILE_STORE(tile, to) memcpy(to, tile_memory[tile], TILE_BYTES)
#define TILE_DOT(c, a, b) tile_dot(tile_memory[c], (const uint16_t *)tile_memory[a], (const uint16_t *)tile_memory[b])

static void tile_dot(float *c, const uint16_t *a, const uint16_t *b) {
    float right[2 * TILE_SIDE][TILE_SIDE];
    for (int k = 0; k < 2 * TILE_SIDE; k++)
        for (int n = 0; n < TILE_SIDE; n++) right[k][n] = bfloat16_value(b[k / 2 * 32 + 2 * n + k % 2]);
    for (int m = 0; m < TILE_SIDE; m++)
        for (int k = 0; k < 2 * TILE_SIDE; k++) {
            const float left = bfloat16_value(a[m * 32 + k]);
            for (int n = 0; n < TILE_SIDE; n++) c[m * TILE_SIDE + n] += left * right[k][n];
        }
}
#endif

#endif
