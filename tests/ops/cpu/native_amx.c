/* What `amx.h` makes of what processor and system answer: native_amx CPUID_EDX XCR0 ARCH_PRCTL prints whether tiles may be
 * used, twice, and how often the system was asked. */
#include <cpuid.h>
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static unsigned edx;
static unsigned long long states;
static long answer, asked;

static int told_cpuid(unsigned leaf, unsigned subleaf, unsigned *a, unsigned *b, unsigned *c, unsigned *d) {
    *a = *b = *c = 0;
    *d = edx;
    return leaf == 7 && subleaf == 0;
}
static unsigned long long told_states(unsigned number) { return number == 0 ? states : 0; }
static long told_syscall(long number, long request, long state) {
    if (number != SYS_arch_prctl || request != 0x1023 || state != 18) abort();
    asked++;
    return answer;
}

#define __get_cpuid_count told_cpuid
#undef _xgetbv
#define _xgetbv told_states
#define syscall told_syscall
#include "amx.h"

int main(int count, char **words) {
    if (count != 4) return 2;
    edx = (unsigned)strtoul(words[1], NULL, 0), states = strtoull(words[2], NULL, 0), answer = atol(words[3]);
    const int first = may_use_tiles(), second = may_use_tiles();
    printf("%d %d %ld\n", first, second, asked);
    return 0;
}
