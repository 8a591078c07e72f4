/* Products of rows, each with the weight of its own expert. */
#include "grouped_parts.h"

static void zero_rows_of_no_expert(const fp8cpu_grouped_args *a) {
    const int64_t *expert_of_row = (const int64_t *)a->expert_of_row, size = value_size(a->product.y_type);
    for (int64_t row = 0; row < a->product.m; row++)
        if (expert_of_row[row] < 0 || expert_of_row[row] >= a->experts)
            memset((char *)a->product.y + row * a->product.y_stride * size, 0, (size_t)(a->product.n * size));
}

int FP8CPU_NAME(grouped)(const fp8cpu_grouped_args *a) {
    const int64_t *expert_of_row = (const int64_t *)a->expert_of_row, m = a->product.m;
    const int64_t pass = 1 + MOST_FLOATS / (divide_up(a->product.k, STEP) * STEP);
    int64_t *first = malloc((size_t)(a->experts + 1 + smaller(pass, m)) * sizeof *first);
    int64_t *order = first + a->experts + 1;
    int status = first ? FP8CPU_OK : FP8CPU_NO_MEMORY;
    zero_rows_of_no_expert(a);
    for (int64_t start = 0; start < m && status == FP8CPU_OK; start += pass) {
        sort_by_expert(expert_of_row + start, smaller(pass, m - start), a->experts, first, order);
        for (int64_t i = 0; i < first[a->experts]; i++) order[i] += start;
        const linear_job like = {.x_rows = order, .y_rows = order};
        status = multiply_grouped(a, &like, first);
    }
    free(first);
    return status;
}
