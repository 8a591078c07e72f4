/* FP8 to bfloat16 by looking codes up in registers, where the processor permutes bytes: all codes at once (AVX-512 VBMI),
 * or halves of them (AVX2). Exact for every code, NaN and subnormals included, with none treated apart. */
#ifndef FP8CPU_LOOKUP_H
#define FP8CPU_LOOKUP_H

#include "vector.h"

/* bfloat16 bits of a magnitude m, 0 ... 127. */
#define E4M3_SUBNORMAL(m) \
    ((m) == 0 ? 0 : (m) == 1 ? 0x3B00 : (m) == 2 ? 0x3B80 : (m) == 3 ? 0x3BC0 : 0x3C00 + (((m) - 4) << 5))
#define E4M3_BITS(m) ((m) < 8 ? E4M3_SUBNORMAL(m) : (m) == 0x7F ? 0x7FC0 : ((m) << 4) + 0x3C00)
#define E5M2_SUBNORMAL(m) ((m) == 0 ? 0 : (m) == 1 ? 0x3780 : 0x3800 + (((m) - 2) << 6))
#define E5M2_BITS(m) ((m) < 4 ? E5M2_SUBNORMAL(m) : (m) < 0x7C ? ((m) << 5) + 0x3800 : 0x7F80 | ((m) & 3) << 5)

#define HIGH(bits) ((uint8_t)((bits) >> 8))
#define LOW(bits) ((uint8_t)(bits))
#define EACH_4(byte, of, m) byte(of(m)), byte(of((m) + 1)), byte(of((m) + 2)), byte(of((m) + 3))
#define EACH_16(byte, of, m) \
    EACH_4(byte, of, m), EACH_4(byte, of, (m) + 4), EACH_4(byte, of, (m) + 8), EACH_4(byte, of, (m) + 12)
#define EACH_64(byte, of, m) \
    EACH_16(byte, of, m), EACH_16(byte, of, (m) + 16), EACH_16(byte, of, (m) + 32), EACH_16(byte, of, (m) + 48)

#if defined(__AVX512VBMI__) || LANES == 8
#define HAS_LOOKUP 1
#endif

#if defined(__AVX512VBMI__)

static const vbytes HIGH_BYTES[2][2] = {{{EACH_64(HIGH, E4M3_BITS, 0)}, {EACH_64(HIGH, E4M3_BITS, 64)}},
                                        {{EACH_64(HIGH, E5M2_BITS, 0)}, {EACH_64(HIGH, E5M2_BITS, 64)}}};
static const vbytes LOW_BYTES[2][2] = {{{EACH_64(LOW, E4M3_BITS, 0)}, {EACH_64(LOW, E4M3_BITS, 64)}},
                                       {{EACH_64(LOW, E5M2_BITS, 0)}, {EACH_64(LOW, E5M2_BITS, 64)}}};

INLINE __m512i look_up(vi codes, const vbytes *table) { /* the sign bit of a code plays no part in its index */
    return _mm512_permutex2var_epi8((__m512i)table[0], (__m512i)codes, (__m512i)table[1]);
}

INLINE __m512i signed_high_bytes(vi codes, int e5m2) {
    const __m512i high = look_up(codes, HIGH_BYTES[e5m2]), signs = _mm512_set1_epi8((char)0x80);
    return _mm512_ternarylogic_epi32(high, (__m512i)codes, signs, 0xF8); /* high | (codes & signs) */
}

/* In 16-bit lanes: the value of the lane's low byte, or of its high byte. */
INLINE vi bfloat16_of_even_bytes(vi codes, int e5m2) {
    const __m512i high = _mm512_slli_epi16(signed_high_bytes(codes, e5m2), 8), low = look_up(codes, LOW_BYTES[e5m2]);
    return (vi)_mm512_ternarylogic_epi32(high, low, _mm512_set1_epi16(0x00FF), 0xF8);
}

INLINE vi bfloat16_of_odd_bytes(vi codes, int e5m2) {
    const __m512i high = signed_high_bytes(codes, e5m2), low = _mm512_srli_epi16(look_up(codes, LOW_BYTES[e5m2]), 8);
    return (vi)_mm512_ternarylogic_epi32(low, high, _mm512_set1_epi16((short)0xFF00), 0xF8);
}

typedef struct {
    __m512i high[2], low[2], signs;
} lookup;

INLINE lookup lookup_of(int e5m2) {
    return (lookup){{(__m512i)HIGH_BYTES[e5m2][0], (__m512i)HIGH_BYTES[e5m2][1]},
                    {(__m512i)LOW_BYTES[e5m2][0], (__m512i)LOW_BYTES[e5m2][1]},
                    _mm512_set1_epi8((char)0x80)};
}

/* The tables in registers, where the compiler would read them from memory again and again, not knowing that loads are
 * what a loop has least to spare of. */
INLINE lookup in_registers(lookup l) {
    __asm__("" : "+v"(l.high[0]), "+v"(l.high[1]), "+v"(l.low[0]), "+v"(l.low[1]), "+v"(l.signs));
    return l;
}

/* In 16-bit lanes, in order within 16 bytes of codes: the first eight of each in pairs[0], the others in pairs[1]. */
INLINE void bfloat16_of_halves(vi codes, lookup l, vi *pairs) {
    const __m512i magnitudes = _mm512_permutex2var_epi8(l.high[0], (__m512i)codes, l.high[1]);
    const __m512i high = _mm512_ternarylogic_epi32(magnitudes, (__m512i)codes, l.signs, 0xF8);
    const __m512i low = _mm512_permutex2var_epi8(l.low[0], (__m512i)codes, l.low[1]);
    pairs[0] = (vi)_mm512_unpacklo_epi8(low, high);
    pairs[1] = (vi)_mm512_unpackhi_epi8(low, high);
}

#elif LANES == 8

/* Of normal numbers, the high byte depends on a code's high half (and E5M2's, on one bit more), and the low byte on its
 * low half. An exceptional code is brought, by its distance from the smallest of them (the NaN or Inf before 0), below
 * 16, and others above 127, where the processor looks up zeros: the difference to what a normal number would be. */
#define E4M3_NORMAL(m) (((m) << 4) + 0x3C00)
#define E5M2_NORMAL(m) (((m) << 5) + 0x3800)
#define E4M3_SIGNED(h) (((h) & 8) << 12 | E4M3_NORMAL(((h) & 7) << 4))
#define E5M2_SIGNED(h) (((h) & 8) << 12 | E5M2_NORMAL(((h) & 7) << 4))
#define E4M3_DIFFERENCE(i) (E4M3_BITS(((i) - 1) & 0x7F) ^ E4M3_NORMAL(((i) - 1) & 0x7F))
#define E5M2_DIFFERENCE(i) (E5M2_BITS(((i) - 4) & 0x7F) ^ E5M2_NORMAL(((i) - 4) & 0x7F))
#define TABLE(byte, of) {EACH_16(byte, of, 0), EACH_16(byte, of, 0)} /* the processor takes each half from its own */

typedef struct {
    vbytes high, high_difference, low_difference;
    int e5m2;
} lookup;

INLINE lookup lookup_of(int e5m2) {
    static const vbytes tables[2][3] = {
        {TABLE(HIGH, E4M3_SIGNED), TABLE(HIGH, E4M3_DIFFERENCE), TABLE(LOW, E4M3_DIFFERENCE)},
        {TABLE(HIGH, E5M2_SIGNED), TABLE(HIGH, E5M2_DIFFERENCE), TABLE(LOW, E5M2_DIFFERENCE)},
    };
    return (lookup){tables[e5m2][0], tables[e5m2][1], tables[e5m2][2], e5m2};
}

INLINE vbytes look_up(vbytes table, vbytes index) { return (vbytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }

/* The high bytes of values, and the low ones. */
INLINE void bytes_of(vi codes, lookup l, __m256i *high, __m256i *low) {
    const vbytes index = (((vbytes)codes + (uint8_t)(l.e5m2 ? 4 : 1)) & 0x7F) + 0x70;
    const vbytes of_high = look_up(l.high, (vbytes)_mm256_srli_epi16((__m256i)codes, 4) & 0x0F);
    const vbytes of_both = (vbytes)_mm256_srli_epi16((__m256i)codes, 3) & (uint8_t)(l.e5m2 ? 1 : 0);
    const __m256i of_low = _mm256_slli_epi16((__m256i)((vbytes)codes & (uint8_t)(l.e5m2 ? 0x07 : 0x0F)), l.e5m2 ? 5 : 4);
    *high = (__m256i)(of_high ^ of_both ^ look_up(l.high_difference, index));
    *low = (__m256i)((vbytes)of_low ^ look_up(l.low_difference, index));
}

/* In 16-bit lanes: the value of the lane's low byte, or of its high byte. */
INLINE vi bfloat16_of_even_bytes(vi codes, int e5m2) {
    __m256i high, low;
    bytes_of(codes, lookup_of(e5m2), &high, &low);
    return (vi)_mm256_slli_epi16(high, 8) | ((vi)low & 0x00FF00FF);
}

INLINE vi bfloat16_of_odd_bytes(vi codes, int e5m2) {
    __m256i high, low;
    bytes_of(codes, lookup_of(e5m2), &high, &low);
    return ((vi)high & (int32_t)0xFF00FF00) | (vi)_mm256_srli_epi16(low, 8);
}

/* In 16-bit lanes, in order within 16 bytes of codes: the first eight of each in pairs[0], the others in pairs[1]. */
INLINE void bfloat16_of_halves(vi codes, lookup l, vi *pairs) {
    __m256i high, low;
    bytes_of(codes, l, &high, &low);
    pairs[0] = (vi)_mm256_unpacklo_epi8(low, high);
    pairs[1] = (vi)_mm256_unpackhi_epi8(low, high);
}

#endif
#endif
