/* Attention, fuzzed: random shapes, strides, scales and masks, against loops in double precision. Part of native_fuzz.c,
 * whose random operands and number formats it uses. */

static const double SCORES_MAY_DIFFER = 1e-4; /* float32 sums of products, and what exp makes of their errors */

typedef struct {
    buffer q, k, v, q_scale, k_scale, v_scale, p_scale, output_scale, mask, sinks, scores, y;
} operands;

/* Strides of [outer, middle, inner, last], with a gap behind some of them, or the outer two swapped; elements in all. */
static int64_t draw_strides(int64_t *stride, int64_t outer, int64_t middle, int64_t inner, int64_t last) {
    const int64_t gap = chance(3) ? below(5) : 0;
    if (chance(2)) { /* [outer, middle, inner, last] */
        stride[2] = last + gap;
        stride[1] = stride[2] * inner + gap;
    } else { /* [outer, inner, middle, last] */
        stride[1] = last + gap;
        stride[2] = stride[1] * middle + gap;
    }
    stride[0] = stride[1] * middle > stride[2] * inner ? stride[1] * middle : stride[2] * inner;
    return (outer - 1) * stride[0] + (middle - 1) * stride[1] + (inner - 1) * stride[2] + last;
}

/* A scale for all, for each head, or for each row. */
static buffer draw_scale(int64_t *where, int64_t *stride, int64_t batch, int64_t heads, int64_t rows) {
    const int kind = (int)below(3);
    stride[0] = kind == 2 ? heads * rows : 0;
    stride[1] = kind == 2 ? rows : kind;
    stride[2] = kind == 2;
    buffer scale = new_buffer(4 * (kind == 2 ? batch * heads * rows : kind ? heads : 1), 4);
    for (int64_t i = 0; i < (kind == 2 ? batch * heads * rows : kind ? heads : 1); i++) {
        const float value = (float)(0.01 + 0.01 * fabs(uniform()));
        memcpy(scale.data + 4 * i, &value, 4);
    }
    *where = (int64_t)scale.data;
    return scale;
}

static buffer draw_single(int64_t *where, float value) {
    buffer scale = new_buffer(4, 4);
    memcpy(scale.data, &value, 4);
    *where = (int64_t)scale.data;
    return scale;
}

static void draw_mask(fp8cpu_attention_args *a, operands *o) {
    const int64_t wide = a->keys + below(3), rows = chance(2) ? a->queries : 1;
    a->mask_type = chance(2) ? FP8CPU_BOOLEAN : below(3);
    a->mask_size = a->mask_type == FP8CPU_BOOLEAN ? 1 : size_of(a->mask_type);
    a->mask_stride[2] = rows > 1 ? wide : 0;
    o->mask = new_buffer(((rows - 1) * wide + a->keys) * a->mask_size, a->mask_size);
    for (int64_t i = 0; i < (rows - 1) * wide + a->keys; i++)
        if (a->mask_type == FP8CPU_BOOLEAN)
            o->mask.data[i] = (char)(i % wide == 0 || chance(2)); /* each row may attend to something */
        else
            fill_values(o->mask.data + i * a->mask_size, 1, a->mask_type, 0);
    a->mask = (int64_t)o->mask.data;
}

static void draw_attention(fp8cpu_attention_args *a, operands *o) {
    const int64_t long_cache = chance(20);
    a->batch = 1 + below(2), a->key_heads = 1 + below(3), a->heads = a->key_heads * (1 + below(5));
    a->queries = 1 + below(chance(4) ? chance(4) ? 40 : 9 : 2);
    a->keys = 1 + (long_cache ? below(2500) : size_up_to(200));
    a->key_dim = 1 + size_up_to(long_cache ? 20 : 140), a->value_dim = 1 + size_up_to(long_cache ? 20 : 140);
    a->type = below(3), a->format = below(2), a->k_format = below(2), a->v_format = below(2);
    a->full_scale = a->format == FP8CPU_E5M2 ? 57344.0 : 448.0;
    a->scaling = 0.02, a->softcap = chance(4) ? 5.0 : 0.0, a->rounds_scores = chance(4);
    a->rounds_probabilities = a->rounds_scores ? chance(2) : chance(8);
    const int64_t q = draw_strides(a->q_stride, a->batch, a->heads, a->queries, a->key_dim);
    const int64_t k = draw_strides(a->k_stride, a->batch, a->key_heads, a->keys, a->key_dim);
    const int64_t v = draw_strides(a->v_stride, a->batch, a->key_heads, a->keys, a->value_dim);
    o->q = new_buffer(q * size_of(a->type), size_of(a->type));
    o->k = new_buffer(k, 1), o->v = new_buffer(v, 1);
    fill_values(o->q.data, q, a->type, 0);
    fill_codes((uint8_t *)o->k.data, k, a->k_format, 1);
    fill_codes((uint8_t *)o->v.data, v, a->v_format, 1);
    for (int64_t i = 0; i < k; i++) o->k.data[i] &= (char)0xBF; /* below 2: so that scores stay moderate */
    for (int64_t i = 0; i < v; i++) o->v.data[i] &= (char)0xBF;
    o->k_scale = draw_scale(&a->k_scale, a->k_scale_stride, a->batch, a->key_heads, a->keys);
    o->v_scale = draw_scale(&a->v_scale, a->v_scale_stride, a->batch, a->key_heads, a->keys);
    if (chance(2)) o->q_scale = draw_scale(&a->q_scale, a->q_scale_stride, a->batch, a->heads, a->queries);
    if (chance(3)) o->p_scale = draw_single(&a->p_scale, 1.0f / 448);
    if (chance(4)) o->output_scale = draw_single(&a->output_scale, 0.001f);
    if (chance(2)) draw_mask(a, o);
    if (chance(4)) {
        a->sinks_type = below(3), a->sinks_stride[1] = 1;
        o->sinks = new_buffer(a->heads * size_of(a->sinks_type), size_of(a->sinks_type));
        fill_values(o->sinks.data, a->heads, a->sinks_type, 0);
        a->sinks = (int64_t)o->sinks.data;
    }
    a->scores_stride = (a->keys + 15) / 16 * 16;
    if (a->p_scale || a->rounds_scores || a->rounds_probabilities)
        o->scores = new_buffer(4 * a->batch * a->heads * a->queries * a->scores_stride, 4);
    a->scores = (int64_t)o->scores.data;
    const int64_t y = a->batch * a->queries * a->heads * a->value_dim * size_of(a->type);
    o->y = new_buffer(y, size_of(a->type));
    memset(o->y.data, 0xFF, (size_t)y);
    a->q = (int64_t)o->q.data, a->k = (int64_t)o->k.data, a->v = (int64_t)o->v.data, a->y = (int64_t)o->y.data;
}

static int64_t at(const int64_t *stride, int64_t b, int64_t h, int64_t t) {
    return b * stride[0] + h * stride[1] + t * stride[2];
}

static double scale_of(int64_t scale, const int64_t *stride, int64_t b, int64_t h, int64_t t) {
    return scale ? float_at((const char *)scale, at(stride, b, h, t)) : 1.0;
}

static double score_of(const fp8cpu_attention_args *a, int64_t b, int64_t h, int64_t s, int64_t t) {
    const int64_t head = h / (a->heads / a->key_heads);
    const double of_q = scale_of(a->q_scale, a->q_scale_stride, b, h, s);
    const uint8_t *k = (const uint8_t *)a->k + at(a->k_stride, b, head, t);
    double sum = 0;
    for (int64_t d = 0; d < a->key_dim; d++) {
        double x = value_at((const char *)a->q, at(a->q_stride, b, h, s) + d, a->type);
        if (a->q_scale) x = value_of_code(code_of_value((float)x * (1.0f / (float)of_q), a->full_scale, a->format), a->format);
        sum += x * value_of_code(k[d], a->k_format);
    }
    sum *= of_q * scale_of(a->k_scale, a->k_scale_stride, b, head, t) * a->scaling;
    if (a->softcap != 0) sum = tanh(sum / a->softcap) * a->softcap;
    if (!a->mask) return sum;
    const char *mask = (const char *)a->mask;
    const int64_t i = at(a->mask_stride, b, h, s) + t;
    if (a->mask_type == FP8CPU_BOOLEAN) return mask[i] ? sum : -INFINITY;
    return sum + value_at(mask, i, a->mask_type);
}

/* A row of the output, where nothing is rounded between the products but the output itself. */
static void check_row(const fp8cpu_attention_args *a, int64_t b, int64_t h, int64_t s, double *p) {
    const int64_t head = h / (a->heads / a->key_heads);
    const char *y = (const char *)a->y;
    double most = -INFINITY, total = 0;
    if (a->sinks) most = value_at((const char *)a->sinks, h, a->sinks_type);
    if (a->sinks) total = 1;
    for (int64_t t = 0; t < a->keys; t++) {
        p[t] = score_of(a, b, h, s, t);
        if (p[t] > most) total *= exp(most - p[t]), most = p[t];
        total += exp(p[t] - most);
    }
    for (int64_t d = 0; d < a->value_dim; d++) {
        double expected = 0, magnitudes = 0;
        for (int64_t t = 0; t < a->keys; t++) {
            const uint8_t code = ((const uint8_t *)a->v)[at(a->v_stride, b, head, t) + d];
            const double scale = scale_of(a->v_scale, a->v_scale_stride, b, head, t);
            const double term = exp(p[t] - most) / total * value_of_code(code, a->v_format) * scale;
            expected += term, magnitudes += fabs(term);
        }
        const double got = value_at(y, ((b * a->queries + s) * a->heads + h) * a->value_dim + d, a->type);
        const double bound = magnitudes * SCORES_MAY_DIFFER + step_at(fabs(expected) + magnitudes * 1e-4, a->type) / 2;
        if (!(fabs(got - expected) <= bound))
            FAIL("y[%lld, %lld, %lld, %lld] is %.9g, not %.9g +- %.3g", (long long)b, (long long)s, (long long)h,
                 (long long)d, got, expected, bound);
    }
}

static void fuzz_attention(int64_t variant) {
    fp8cpu_attention_args a = {.variant = variant, .threads = 1 + below(2)};
    operands o = {0};
    draw_attention(&a, &o);
    if (fp8cpu_attention(&a) != FP8CPU_OK) FAIL("attention refused");
    double *p = malloc(sizeof(double) * (size_t)a.keys);
    if (!p) abort();
    const int rounds = (a.rounds_scores || a.rounds_probabilities) && a.type != FP8CPU_FLOAT32;
    const int exact = !a.p_scale && !a.output_scale && !rounds;
    for (int64_t b = 0; exact && b < a.batch; b++)
        for (int64_t h = 0; h < a.heads; h++)
            for (int64_t s = 0; s < a.queries && !failed; s++) check_row(&a, b, h, s, p);
    for (int64_t i = 0; !exact && i < a.batch * a.queries * a.heads * a.value_dim; i++)
        if (!isfinite(value_at((const char *)a.y, i, a.type))) FAIL("y[%lld] is not finite", (long long)i);
    buffer all[] = {o.q, o.k, o.v, o.q_scale, o.k_scale, o.v_scale, o.p_scale, o.output_scale, o.mask, o.sinks, o.scores, o.y};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i].base);
    free(p);
}
