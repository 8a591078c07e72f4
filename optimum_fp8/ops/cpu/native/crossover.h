/* Which way a native product takes, by how many rows share its codes: what is faster, not what exists.
 *
 * Measured on a Zen 5 as CPU time of one thread, with cold weights of 2048 x 2048, beside other programs (python -m
 * benchmarks.cpu_linear --single-thread --blocks). Where it says "counted", no processor with AMX was at hand: in cycles of
 * a core, of which a product of two tiles takes 16. */
#ifndef FP8CPU_CROSSOVER_H
#define FP8CPU_CROSSOVER_H

enum {
    GROUP_ROWS = 8, /* rows of x that dot products are computed with at a time, */
    /* Up to so many rows of x, weights are used as they are decoded; more are multiplied in panels. At 8 rows, dot products of
     * floats (avx512vbmi) take 0.78 ms, as long as torch's of bfloat16, and those of pairs 0.31. */
    DOT_ROWS = GROUP_ROWS,
    DOT_ROWS_OF_PAIRS = 4 * GROUP_ROWS, /* pairs are decoded again for each group, as it costs so little */
    /* Tiles take as long for 16 rows as for one. Emerald Rapids: for 4 rows dot products ran at 1.75 to 1.89 times bf16's
     * speed, for 8 at 1.2, and tiles at 1.1 to 1.5. */
    DOT_ROWS_BEFORE_TILES = 4,
    /* From so many rows of x on it pays to look whether scales along k are powers of two, which then are folded in:
     * of groups of 32, 48 rows take 1.6 ms instead of 1.9, and 512 take 11.4 instead of 15.5. */
    FOLDED_ROWS = 48,
    /* Rows of queries that share a head of keys. Counted, for 512 codes: a product of tiles takes 16, one with values up
     * to three times that, and decoding 56; dot products of floats, 16 for each row. */
    QUERY_ROWS_BEFORE_TILES = 6,
    /* The same where tiles are made of pairs. Zen 4, 4096 positions, beside dot products, which decode codes again for each
     * few rows, but into registers: tiles ran at 0.90 times their speed for 16 rows, at 0.79 for 24, which take two tiles,
     * 1.01 for 32, 1.05 for 48, 1.08 for 64 and 1.12 for 128; with rounded probabilities at 0.98 for 24, 1.18 for 32. */
    QUERY_ROWS_BEFORE_TILES_OF_PAIRS = 32,
};

#endif
