/* Whether the processor is a Zen 4, whose own prefetching wants other help than that of the others measured. */
#ifndef FP8CPU_ZEN4_H
#define FP8CPU_ZEN4_H

#include "vector.h"

/* It has BF16, and not VP2INTERSECT, which Zen 5 has as well. Intel's processors are not given pairs of bfloat16. */
INLINE int is_zen4(void) {
#if defined(__AVX512BF16__)
    return !__builtin_cpu_supports("avx512vp2intersect");
#else
    return 0;
#endif
}

#endif
