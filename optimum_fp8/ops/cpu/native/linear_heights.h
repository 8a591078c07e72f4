/* Rows of x that a microkernel may have, as constants: who includes this defines HEIGHT(rows, ...), a case of a switch. */
#ifndef FP8CPU_LINEAR_HEIGHTS_H
#define FP8CPU_LINEAR_HEIGHTS_H

#include "vector.h"

#define HEIGHTS_TO_6(...)                                                                       \
    HEIGHT(1, __VA_ARGS__) HEIGHT(2, __VA_ARGS__) HEIGHT(3, __VA_ARGS__) HEIGHT(4, __VA_ARGS__) \
    HEIGHT(5, __VA_ARGS__) HEIGHT(6, __VA_ARGS__)
#if LANES == 16
#define HEIGHTS(...)                                                                               \
    HEIGHTS_TO_6(__VA_ARGS__) HEIGHT(7, __VA_ARGS__) HEIGHT(8, __VA_ARGS__) HEIGHT(9, __VA_ARGS__) \
    HEIGHT(10, __VA_ARGS__) HEIGHT(11, __VA_ARGS__) HEIGHT(12, __VA_ARGS__)
#else
#define HEIGHTS HEIGHTS_TO_6
#endif

#endif
