/* Whether a process may use AMX's tiles. */
#ifndef FP8CPU_AMX_H
#define FP8CPU_AMX_H

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

__attribute__((target("xsave"))) static unsigned long long enabled_states(void) { return _xgetbv(0); }

/* Whether the processor has tiles of bfloat16, the system keeps their state, and lets this process use it. */
static int ask_for_tiles(void) {
    enum { BFLOAT16 = 1 << 22, TILE = 1 << 24, STATE = 3 << 17, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BFLOAT16 | TILE)) != (BFLOAT16 | TILE)) return 0;
    return (enabled_states() & STATE) == STATE && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* The answer: the system wants to be asked once. Children that are forked have the permission too. */
static int may_use_tiles(void) {
    static int known; /* 0: not asked yet */
    if (!known) known = ask_for_tiles() ? 1 : -1;
    return known > 0;
}

#endif
