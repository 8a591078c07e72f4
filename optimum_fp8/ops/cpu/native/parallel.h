/* A parallel loop over tasks 0 ... count - 1 with dynamic scheduling: each thread takes the next ones that are free. */
#ifndef FP8CPU_PARALLEL_H
#define FP8CPU_PARALLEL_H

#include <stdint.h>

/* `thread` numbers the threads of this call, 0 ... threads - 1: use it to find scratch memory. */
typedef void (*fp8cpu_task)(void *context, int64_t task, int64_t thread);

void fp8cpu_parallel(fp8cpu_task run, void *context, int64_t count, int64_t threads);

/* Two such loops, the second when all of the first is done, by one set of threads: starting them and waiting for the
 * last costs once. Where the system gives a thread no processor, the others do its tasks meanwhile. */
void fp8cpu_parallel_stages(const fp8cpu_task run[2], const int64_t count[2], void *context, int64_t threads);

#endif
