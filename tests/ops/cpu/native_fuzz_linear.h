/* Matrix products, fuzzed: random shapes, strides, scales and biases, against loops in double precision. Part of
 * native_fuzz.c, whose random operands and number formats it uses. */

typedef struct {
    double product, bound; /* of one element of y: before the bias, scaled, and what float32 sums may lose */
} dot;

static int64_t x_at(const fp8cpu_linear_args *a, int64_t m, int64_t k) {
    const int32_t *places = (const int32_t *)a->places;
    return places ? places[m] + places[a->m + k] : m * a->x_stride + k;
}

static int64_t y_at(const fp8cpu_linear_args *a, int64_t m, int64_t n) {
    const int32_t *places = (const int32_t *)a->places;
    return places ? places[a->m + a->k + m] + n * a->y_stride : m * a->y_stride + n;
}

static float group_scale(int64_t scales, int64_t row, int64_t k, int64_t size, int64_t group) {
    return float_at((const char *)scales, row * ((size + group - 1) / group) + k / group);
}

/* Scales of groups of w, and of blocks, draws how many values share one; returns how many scales there are. */
static int64_t draw_groups(fp8cpu_linear_args *a) {
    a->w_group = chance(2) ? 32 : BLOCK;
    a->w_group_rows = a->w_group == BLOCK && chance(2) ? BLOCK : 1;
    return (a->n + a->w_group_rows - 1) / a->w_group_rows * ((a->k + a->w_group - 1) / a->w_group);
}

/* How many scales x has: one, one a row, or one a group of a row. */
static int64_t draw_x_scales(fp8cpu_linear_args *a) {
    a->x_scale_step = chance(2);
    a->x_group = a->x_scale_step && chance(2) ? (chance(2) ? 32 : BLOCK) : 0;
    return a->x_group ? a->m * ((a->k + a->x_group - 1) / a->x_group) : a->x_scale_step ? a->m : 1;
}

static dot dot_of(const fp8cpu_linear_args *a, int64_t m, int64_t n) {
    const float of_row = a->x_scale && !a->x_group ? float_at((const char *)a->x_scale, m * a->x_scale_step) : 1.0f;
    const int64_t half = a->w_scale_half && n >= a->w_scale_half;
    const float of_w = a->w_group ? 1.0f : float_at((const char *)a->w_scale, n * a->w_scale_step + half);
    double sum = 0, magnitudes = 0, largest = 1; /* scales of groups */
    for (int64_t k = 0; k < a->k; k++) {
        double x = value_at((const char *)a->x, x_at(a, m, k), a->x_type);
        const float of_x = a->x_group ? group_scale(a->x_scale, m, k, a->k, a->x_group) : of_row;
        if (a->x_scale)
            x = value_of_code(code_of_value((float)x * (1.0f / of_x), a->full_scale, a->w_format), a->w_format);
        if (a->x_group) x = (float)x * of_x;
        double w = value_of_code(((const uint8_t *)a->w)[n * a->k + k], a->w_format);
        const float of_group = a->w_group ? group_scale(a->w_scale, n / a->w_group_rows, k, a->k, a->w_group) : 1.0f;
        if (a->w_group) w = (float)w * of_group;
        largest = fmax(largest, of_group * (a->x_group ? of_x : 1.0f));
        sum += x * w;
        magnitudes += fabs(x * w);
    }
    const double scale = of_row * of_w;
    /* The last term: where pairs of bfloat16 are multiplied, what is below the smallest normal number is lost. */
    return (dot){sum * scale, magnitudes * scale * (double)(a->k + 8) * 0x1p-24 + (double)(a->k + 8) * 0x1p-110 * scale * largest};
}

static void check_product(const fp8cpu_linear_args *a, int64_t m) {
    for (int64_t n = 0; n < a->n; n++) {
        const dot d = dot_of(a, m, n);
        const double got = value_at((const char *)a->y, y_at(a, m, n), a->y_type);
        double expected = d.product, bound = d.bound;
        if (a->bias) {
            const double bias = value_at((const char *)a->bias, n, a->bias_type);
            /* Gaudi's arithmetic rounds product and bias to the output's type before it adds them. */
            if (a->round_before_bias) {
                bound += step_at(fabs(d.product) + bound, a->y_type) / 2 + step_at(bias, a->y_type) / 2;
                bound += (fabs(d.product) + fabs(bias)) * 0x1p-22;
            }
            expected += bias;
            bound += fabs(expected) * 0x1p-23;
        }
        if (isnan(expected) ? !isnan(got) : isinf(expected) && got != expected)
            FAIL("y[%lld, %lld] is %g, not %g", (long long)m, (long long)n, got, expected);
        if (!isfinite(expected) || fabs(expected) + bound >= largest_of(a->y_type)) continue;
        bound += step_at(fabs(expected) + bound, a->y_type) / 2;
        if (!(fabs(got - expected) <= bound))
            FAIL("y[%lld, %lld] is %.9g, not %.9g +- %.3g, of %lld x %lld x %lld", (long long)m, (long long)n, got,
                 expected, bound, (long long)a->m, (long long)a->n, (long long)a->k);
    }
}

/* Where rows and columns lie in memory that holds them as they are, or transposed and cut into runs that lie in another
 * order. Of x values may be shared, as those of windows are. */
static void fill_places(fp8cpu_linear_args *a, int32_t *places) {
    int32_t *along = places + a->m, *of_y = along + a->k;
    const int transposed = chance(2), overlap = transposed && chance(2), cut = !overlap && chance(2);
    const int64_t run = 1 + below(14), runs = a->m / run;
    for (int64_t m = 0; m < a->m; m++) {
        const int64_t turned = cut && m < runs * run ? (runs - 1 - m / run) * run + m % run : m;
        places[m] = (int32_t)(transposed ? turned : m * a->x_stride);
    }
    for (int64_t k = 0; k < a->k; k++) along[k] = (int32_t)(transposed && !overlap ? k * a->m : a->k - 1 - k);
    a->y_stride = chance(2) ? 1 : a->m;
    for (int64_t m = 0; m < a->m; m++) of_y[m] = (int32_t)(a->y_stride == 1 ? (a->m - 1 - m) * a->n : a->m - 1 - m);
}

static void fill_powers(char *data, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float scale = (float)ldexp(1, (int)below(16) - 8);
        memcpy(data + 4 * i, &scale, 4);
    }
}

/* The same with scales by x's own ranges: memory is what counts, as other tests compare the results to the bit. */
static void fuzz_own_ranges(fp8cpu_linear_args a) {
    static float scale_of_range[1 << 15];
    if (a.places || a.x_stride != a.k) return;
    for (int range = 0; range < 1 << 15; range++) scale_of_range[range] = 1.0f + range % 7;
    if (a.x_group && a.k % a.x_group) a.x_group = 0;
    a.x_scale = 0, a.x_scale_of_range = (int64_t)scale_of_range;
    const int status = fp8cpu_linear(&a, 1);
    if (status != FP8CPU_OK) FAIL("linear answered %d", status);
}

static void fuzz_linear(int64_t variant) {
    static const int64_t edges[] = {1, 4, 5, 8, 9, 12, 13, 24, 25, 6, 7, 32, 33, 48, 65};
    fp8cpu_linear_args a = {.variant = variant, .threads = 1 + below(2)};
    const int many = chance(100), any_bits = chance(8);
    a.m = many ? 505 + below(30) : chance(2) ? edges[below(15)] : below(50);
    a.n = many ? 1 + below(40) : size_up_to(chance(8) ? 300 : 70);
    a.k = 1 + size_up_to(many ? 60 : chance(8) ? (a.m < 9 ? 4500 : 1100) : 300);
    a.x_type = below(3);
    a.y_type = a.x_type;
    a.x_stride = a.k + (chance(2) ? below(5) : 0);
    a.y_stride = a.n + (chance(2) ? below(5) : 0);
    a.w_format = below(2);
    a.full_scale = a.w_format == FP8CPU_E5M2 ? 57344.0 : chance(2) ? 448.0 : 240.0;
    const int scaling = (int)below(3), size = (int)size_of(a.x_type);
    a.w_scale_step = scaling == 1;
    const int64_t groups = scaling == 2 ? draw_groups(&a) : 0;
    a.w_scale_half = scaling == 0 && a.n && chance(2) ? 1 + below(a.n) : 0;
    const int64_t scales = scaling == 0 ? 1 + (a.w_scale_half > 0) : scaling == 1 ? a.n : groups;
    const int64_t x_count = a.m ? (a.m - 1) * a.x_stride + a.k : 0;
    const int64_t y_count = a.m && a.n ? (a.m - 1) * a.y_stride + a.n : 0;
    buffer x = new_buffer(x_count * size, size), y = new_buffer(y_count * size, size);
    buffer w = new_buffer(a.n * a.k, 1), w_scale = new_buffer(4 * scales, 4);
    fill_values(x.data, x_count, a.x_type, any_bits);
    fill_codes((uint8_t *)w.data, a.n * a.k, a.w_format, !chance(8));
    fill_scales(w_scale.data, scales, 1);
    const int powers = scaling == 2 && chance(2);
    if (powers) fill_powers(w_scale.data, scales);
    memset(y.data, 0xFF, (size_t)(y_count * size));
    const int64_t x_scales = draw_x_scales(&a);
    buffer x_scale = new_buffer(4 * x_scales, 4);
    fill_scales(x_scale.data, x_scales, 1);
    if (powers) fill_powers(x_scale.data, x_scales);
    a.bias_type = below(3);
    buffer bias = new_buffer(a.n * size_of(a.bias_type), size_of(a.bias_type));
    fill_values(bias.data, a.n, a.bias_type, 0);
    a.x = (int64_t)x.data, a.w = (int64_t)w.data, a.w_scale = (int64_t)w_scale.data, a.y = (int64_t)y.data;
    if (chance(2)) a.x_scale = (int64_t)x_scale.data;
    if (!a.x_scale) a.x_group = 0;
    if (chance(2)) a.bias = (int64_t)bias.data;
    a.round_before_bias = chance(2);
    buffer places = new_buffer(4 * (2 * a.m + a.k), 4);
    if (!a.w_group && !a.x_group && chance(3)) {
        fill_places(&a, (int32_t *)places.data);
        a.places = (int64_t)places.data;
        a.x_scale = 0;
    }
    const int status = fp8cpu_linear(&a, 1);
    if (status != FP8CPU_OK) FAIL("linear answered %d", status);
    /* Sums of arbitrary floats overflow in an order of their own: memory is what counts. */
    for (int64_t m = 0; m < a.m && !any_bits && !failed; m++) check_product(&a, m);
    if (chance(2)) fuzz_own_ranges(a);
    free(x.base), free(y.base), free(w.base), free(w_scale.base), free(x_scale.base), free(bias.base);
    free(places.base);
}
