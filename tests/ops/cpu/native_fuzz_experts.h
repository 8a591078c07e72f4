/* Grouped products and mixtures of experts, fuzzed: each row against the product with its expert's weight in double
 * precision, and the steps of a mixture with how far each may be off. Part of native_fuzz.c, behind native_fuzz_linear.h. */

/* --- grouped products ---------------------------------------------------------------------------------------------- */

/* The operands of a row's product: those of all, moved to its expert's. */
static fp8cpu_linear_args of_expert(const fp8cpu_grouped_args *a, int64_t expert) {
    fp8cpu_linear_args own = a->product;
    own.w += expert * own.n * own.k;
    own.w_scale += 4 * expert * a->w_scale_size;
    if (own.bias) own.bias += expert * own.n * size_of(own.bias_type);
    if (own.x_scale && a->x_scale_expert) own.x_scale += 4 * expert;
    return own;
}

static void check_grouped(const fp8cpu_grouped_args *a) {
    const fp8cpu_linear_args *p = &a->product;
    for (int64_t m = 0; m < p->m && !failed; m++) {
        const int64_t expert = ((const int64_t *)a->expert_of_row)[m];
        if (expert >= 0 && expert < a->experts) {
            const fp8cpu_linear_args own = of_expert(a, expert);
            check_product(&own, m);
            continue;
        }
        for (int64_t n = 0; n < p->n; n++)
            if (value_at((const char *)p->y, m * p->y_stride + n, p->y_type) != 0)
                FAIL("y[%lld, %lld] is not 0, but no expert's", (long long)m, (long long)n);
    }
}

/* Numbers of experts, some of them none's, some experts' far more often. */
static buffer draw_experts(int64_t count, int64_t experts, int64_t first) {
    buffer b = new_buffer(8 * count, 8);
    const int64_t most = 1 + below(experts + 2);
    for (int64_t i = 0; i < count; i++) {
        const int64_t expert = first + below(most) - (chance(8) ? 1 : 0);
        memcpy(b.data + 8 * i, &expert, 8);
    }
    return b;
}

static void fuzz_grouped(int64_t variant) {
    fp8cpu_grouped_args a = {.product = {.variant = variant, .threads = 1 + below(3)}, .experts = 1 + below(6)};
    fp8cpu_linear_args *p = &a.product;
    const int many = chance(60), any_bits = chance(8), scaling = (int)below(4);
    p->m = many ? 505 + below(700) : below(80);
    p->n = many ? 1 + below(8) : 1 + size_up_to(70);
    p->k = 1 + size_up_to(many ? 60 : 300);
    p->x_type = p->y_type = below(3);
    p->x_stride = p->k + (chance(2) ? below(5) : 0);
    p->y_stride = p->n + (chance(2) ? below(5) : 0);
    p->w_format = below(2);
    p->full_scale = p->w_format == FP8CPU_E5M2 ? 57344.0 : chance(2) ? 448.0 : 240.0;
    p->w_scale_step = scaling == 1;
    p->w_scale_half = scaling == 3 ? 1 + below(p->n) : 0;
    const int64_t groups = scaling == 2 ? draw_groups(p) : 0, size = size_of(p->x_type);
    a.w_scale_size = scaling == 0 ? 1 : scaling == 1 ? p->n : scaling == 2 ? groups : 2;
    const int64_t x_count = p->m ? (p->m - 1) * p->x_stride + p->k : 0;
    const int64_t y_count = p->m ? (p->m - 1) * p->y_stride + p->n : 0, w_count = a.experts * p->n * p->k;
    buffer x = new_buffer(x_count * size, size), y = new_buffer(y_count * size, size), w = new_buffer(w_count, 1);
    buffer w_scale = new_buffer(4 * a.experts * a.w_scale_size, 4), experts = draw_experts(p->m, a.experts, 0);
    fill_values(x.data, x_count, p->x_type, any_bits);
    fill_codes((uint8_t *)w.data, w_count, p->w_format, !chance(8));
    fill_scales(w_scale.data, a.experts * a.w_scale_size, 1);
    memset(y.data, 0xFF, (size_t)(y_count * size));
    a.x_scale_expert = chance(3);
    const int64_t x_scales = a.x_scale_expert ? a.experts : draw_x_scales(p);
    buffer x_scale = new_buffer(4 * x_scales, 4);
    fill_scales(x_scale.data, x_scales, 1);
    p->bias_type = below(3);
    buffer bias = new_buffer(a.experts * p->n * size_of(p->bias_type), size_of(p->bias_type));
    fill_values(bias.data, a.experts * p->n, p->bias_type, 0);
    p->x = (int64_t)x.data, p->w = (int64_t)w.data, p->w_scale = (int64_t)w_scale.data, p->y = (int64_t)y.data;
    a.expert_of_row = (int64_t)experts.data;
    if (chance(2)) p->x_scale = (int64_t)x_scale.data;
    if (!p->x_scale) p->x_group = 0;
    if (chance(2)) p->bias = (int64_t)bias.data;
    p->round_before_bias = chance(2);
    const int status = fp8cpu_grouped(&a);
    if (status != FP8CPU_OK) FAIL("grouped answered %d", status);
    if (!any_bits) check_grouped(&a);
    free(x.base), free(y.base), free(w.base), free(w_scale.base), free(x_scale.base), free(bias.base), free(experts.base);
}

/* --- mixtures -------------------------------------------------------------------------------------------------------- */

typedef struct {
    double value, off; /* a step's result, and how far the kernel's may be from it */
} estimate;

/* Rounded to bfloat16, where a mixture rounds its steps; float32's own rounding is in what follows. */
static estimate rounded(const fp8cpu_experts_args *a, estimate x) {
    x.off += fabs(x.value) * 0x1p-23;
    if (a->rounds) x.off += step_at(fabs(x.value) + x.off, FP8CPU_BFLOAT16) / 2;
    return x;
}

static estimate times(estimate a, estimate b) {
    return (estimate){a.value * b.value, fabs(a.value) * b.off + fabs(b.value) * a.off + a.off * b.off};
}

static estimate activated(const fp8cpu_experts_args *a, estimate x) {
    const double v = x.value;
    const double act = a->activation == FP8CPU_RELU   ? fmax(v, 0)
                       : a->activation == FP8CPU_GELU ? v / 2 * (1 + erf(v / sqrt(2)))
                                                      : v / (1 + exp(-v));
    return (estimate){act, 1.2 * x.off + 1e-6 * fabs(v) + 0x1p-120};
}

static double rounded_to_codes(const fp8cpu_experts_args *a, double x) {
    return value_of_code(code_of_value((float)x, a->full_scale, a->w_format), a->w_format);
}

/* What goes into down for a token of an expert: on the FP8 grid, with its scale multiplied in, where it is rounded. */
static void middle_of(const fp8cpu_experts_args *a, const fp8cpu_linear_args *gate_up, int64_t expert, int64_t token,
                      estimate *middle) {
    double low = 0, high = 0;
    for (int64_t i = 0; i < a->inner; i++) {
        const dot g = dot_of(gate_up, token, i), u = dot_of(gate_up, token, a->inner + i);
        const estimate gate = rounded(a, (estimate){g.product, g.bound}), up = rounded(a, (estimate){u.product, u.bound});
        middle[i] = rounded(a, times(rounded(a, activated(a, gate)), up));
        low = fmax(low, fabs(middle[i].value) - middle[i].off);
        high = fmax(high, fabs(middle[i].value) + middle[i].off);
    }
    if (!a->x_scale) return;
    low = (low + 1e-8) / a->full_scale * (1 - 0x1p-21), high = (high + 1e-8) / a->full_scale * (1 + 0x1p-21);
    if (a->middle_scale) low = high = float_at((const char *)a->middle_scale, expert);
    for (int64_t i = 0; i < a->inner; i++) {
        const double size = fabs(middle[i].value), off = middle[i].off + size * 0x1p-21;
        const double least = size > off ? rounded_to_codes(a, (size - off) / high) * low
                                        : -rounded_to_codes(a, (off - size) / low) * high;
        const double most = rounded_to_codes(a, (size + off) / low) * high;
        middle[i] = (estimate){copysign(1, middle[i].value) * (least + most) / 2, (most - least) / 2};
    }
}

/* What an expert contributes to a token, for each output; added to `sums`. */
static void add_expert(const fp8cpu_experts_args *a, int64_t expert, int64_t token, estimate weight, estimate *middle,
                       estimate *sums) {
    const fp8cpu_linear_args gate_up = {
        .x = a->x, .x_type = a->x_type, .x_stride = a->hidden, .x_scale = a->x_scale, .x_scale_step = a->x_scale_step,
        .n = 2 * a->inner, .k = a->hidden, .w = a->gate_up + expert * 2 * a->inner * a->hidden, .w_format = a->w_format,
        .w_scale = a->gate_up_scale + 4 * expert * a->gate_up_scales, .w_scale_step = a->gate_up_scales > 2,
        .w_scale_half = a->gate_up_scales == 2 ? a->inner : 0, .full_scale = a->full_scale};
    middle_of(a, &gate_up, expert, token, middle);
    for (int64_t n = 0; n < a->hidden; n++) {
        const uint8_t *w = (const uint8_t *)a->down + (expert * a->hidden + n) * a->inner;
        const int64_t own = expert * a->down_scales + (a->down_scales > 1 ? n : 0);
        const double scale = float_at((const char *)a->down_scale, own);
        estimate sum = {0, (double)(a->inner + 8) * 0x1p-110};
        for (int64_t i = 0; i < a->inner; i++) {
            const double code = value_of_code(w[i], a->w_format);
            sum.value += middle[i].value * code;
            sum.off += fabs(code) * (middle[i].off + fabs(middle[i].value) * (double)(a->inner + 8) * 0x1p-24);
        }
        const estimate out = rounded(a, (estimate){sum.value * scale, sum.off * scale});
        const estimate part = rounded(a, times(out, weight));
        sums[n] = rounded(a, (estimate){sums[n].value + part.value, sums[n].off + part.off});
    }
}

static void check_token(const fp8cpu_experts_args *a, int64_t token, estimate *middle, estimate *sums) {
    const int64_t *table = (const int64_t *)a->table + token * a->chosen;
    memset(sums, 0, (size_t)a->hidden * sizeof *sums);
    for (int64_t expert = 0; expert < a->experts; expert++) {
        estimate weight = {0, 0};
        int found = 0;
        for (int64_t i = 0; i < a->chosen; i++) {
            if (table[i] - a->experts_min != expert) continue;
            const estimate own = {value_at((const char *)a->router, token * a->chosen + i, a->router_type), 0};
            weight = rounded(a, (estimate){weight.value + own.value, weight.off + rounded(a, own).off});
            found = 1;
        }
        if (found) add_expert(a, expert, token, weight, middle, sums);
        if (a->rounds && (expert + 1) % a->at_a_time == 0) /* a sum of sums is rounded once more */
            for (int64_t n = 0; n < a->hidden; n++)
                sums[n].off += 2 * step_at(fabs(sums[n].value) + sums[n].off, FP8CPU_BFLOAT16);
    }
    for (int64_t n = 0; n < a->hidden; n++) {
        const double got = value_at((const char *)a->y, token * a->hidden + n, a->x_type);
        const double most = fabs(sums[n].value) + sums[n].off;
        if (!(most < largest_of(a->x_type))) continue;
        const double off = sums[n].off + (double)a->chosen * most * 0x1p-22 + step_at(most, a->x_type);
        if (!(fabs(got - sums[n].value) <= off))
            FAIL("y[%lld, %lld] is %.9g, not %.9g +- %.3g", (long long)token, (long long)n, got, sums[n].value, off);
    }
}

static void fuzz_experts(int64_t variant) {
    fp8cpu_experts_args a = {.variant = variant, .threads = 1 + below(3), .tokens = chance(30) ? 150 : below(24)};
    const int any_bits = chance(8), rounded_input = !chance(3);
    a.chosen = 1 + below(4), a.experts = 1 + below(6), a.hidden = 1 + size_up_to(80), a.inner = 1 + size_up_to(50);
    a.x_type = below(3), a.router_type = below(3), a.w_format = below(2), a.experts_min = below(3);
    a.full_scale = a.w_format == FP8CPU_E5M2 ? 57344.0 : chance(2) ? 448.0 : 240.0;
    a.x_scale_step = chance(2), a.activation = below(3), a.rounds = chance(2), a.at_a_time = a.rounds ? 1 + below(4) : 0;
    a.gate_up_scales = chance(3) ? 1 : chance(2) ? 2 : 2 * a.inner;
    a.down_scales = chance(2) ? 1 : a.hidden;
    const int64_t pairs = a.tokens * a.chosen, size = size_of(a.x_type), all = a.tokens * a.hidden;
    const int64_t x_scales = a.x_scale_step ? a.tokens : 1, codes = a.experts * a.inner * a.hidden;
    buffer x = new_buffer(all * size, size), y = new_buffer(all * size, size), x_scale = new_buffer(4 * x_scales, 4);
    buffer table = draw_experts(pairs, a.experts, a.experts_min);
    buffer router = new_buffer(pairs * size_of(a.router_type), size_of(a.router_type));
    buffer gate_up = new_buffer(2 * codes, 1), down = new_buffer(codes, 1), middle_scale = new_buffer(4 * a.experts, 4);
    buffer gate_up_scale = new_buffer(4 * a.experts * a.gate_up_scales, 4);
    buffer down_scale = new_buffer(4 * a.experts * a.down_scales, 4);
    fill_values(x.data, all, a.x_type, any_bits), fill_values(router.data, pairs, a.router_type, 0);
    fill_codes((uint8_t *)gate_up.data, 2 * codes, a.w_format, 1);
    fill_codes((uint8_t *)down.data, codes, a.w_format, 1);
    fill_scales(x_scale.data, x_scales, 1), fill_scales(middle_scale.data, a.experts, 1);
    fill_scales(gate_up_scale.data, a.experts * a.gate_up_scales, 1);
    fill_scales(down_scale.data, a.experts * a.down_scales, 1);
    memset(y.data, 0xFF, (size_t)(all * size));
    a.x = (int64_t)x.data, a.table = (int64_t)table.data, a.router = (int64_t)router.data, a.y = (int64_t)y.data;
    a.gate_up = (int64_t)gate_up.data, a.down = (int64_t)down.data;
    a.gate_up_scale = (int64_t)gate_up_scale.data, a.down_scale = (int64_t)down_scale.data;
    if (rounded_input) a.x_scale = (int64_t)x_scale.data;
    if (rounded_input && chance(2)) a.middle_scale = (int64_t)middle_scale.data;
    const int status = fp8cpu_experts(&a);
    if (status != FP8CPU_OK) FAIL("experts answered %d", status);
    static estimate middle[64], sums[96];
    for (int64_t token = 0; token < a.tokens && !any_bits && !failed; token++) check_token(&a, token, middle, sums);
    free(x.base), free(y.base), free(table.base), free(router.base), free(x_scale.base), free(gate_up.base);
    free(down.base), free(middle_scale.base), free(gate_up_scale.base), free(down_scale.base);
}
