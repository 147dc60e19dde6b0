/* Products of packed rows with rows of weights, a tile of LAMINA_TILE_OUTS × LAMINA_TILE_ROWS sums at a time. */

enum {
    OUTS = LAMINA_TILE_OUTS,
    ROWS = LAMINA_TILE_ROWS,
    STEP_BYTES = 64, /* of a packed row, multiplied by one instruction: 32 numbers of 16 bits, or 16 floats */
    /* Distance and cache level of prefetched weights. Four rows are read at once, and the CPU's own prefetcher loses track of
       them. Weights are read once a pass, so fetching them past the caches (0) gains a few hundredths on AMD's CPUs. On Intel's,
       which alone have AMX, it takes more than twice as long as fetching them into the second level (2). */
#ifdef WITH_TILES
    AHEAD_BYTES = 8192,
    FETCHED = 2,
#else
    AHEAD_BYTES = 4096,
    FETCHED = 0,
#endif
};

INLINE int64_t step_bytes_of(const int dtype) { return dtype == LAMINA_INT8 ? STEP_BYTES / 2 : STEP_BYTES; }

INLINE int64_t steps_of(const int dtype, int64_t width) { return rounded_up(width, LAMINA_STEP) / (dtype == LAMINA_F32 ? 16 : 32); }

INLINE vec load_weights(const int dtype, const uint8_t *at) { return dtype == LAMINA_INT8 ? i16_of_i8(at) : load(at); }

INLINE vec multiply_add(const int dtype, vec sum, vec a, vec b)
{
    return dtype == LAMINA_INT8 ? dot_i16(sum, a, b) : dtype == LAMINA_BF16 ? dot_bf16(sum, a, b) : fma_f32(a, b, sum);
}

/* The hot loop: [row * OUTS + out] = products of `rows` packed rows with OUTS rows of weights, each sum in a register. The order
   of a sum depends on the number of steps alone, never on how many rows are multiplied together. */
INLINE vec tile(const int dtype, const int rows, const bool fetch, const uint8_t *const weights[OUTS], const uint8_t *x,
                int64_t row_bytes, int64_t steps)
{
    const int64_t step_bytes = step_bytes_of(dtype);
    vec sums[ROWS][OUTS];
    UNROLL
    for (int row = 0; row < rows; row++)
        UNROLL
        for (int out = 0; out < OUTS; out++)
            sums[row][out] = zeros();
    for (int64_t step = 0; step < steps; step++) {
        if (fetch)
            UNROLL
            for (int64_t line = 0; line < OUTS * step_bytes; line += 64)
                __builtin_prefetch(weights[0] + AHEAD_BYTES + step * OUTS * step_bytes + line, 0, FETCHED);
        vec values[ROWS];
        UNROLL
        for (int row = 0; row < rows; row++)
            values[row] = load(x + row * row_bytes + step * STEP_BYTES);
        UNROLL
        for (int out = 0; out < OUTS; out++) {
            vec of_out = load_weights(dtype, weights[out] + step * step_bytes);
            UNROLL
            for (int row = 0; row < rows; row++)
                sums[row][out] = multiply_add(dtype, sums[row][out], of_out, values[row]);
        }
    }
    if (dtype == LAMINA_INT8)
        UNROLL
        for (int row = 0; row < rows; row++)
            UNROLL
            for (int out = 0; out < OUTS; out++)
                sums[row][out] = f32_of_i32(sums[row][out]);
    return sum_tile(rows, sums);
}

/* The operands of a tile. */
typedef struct {
    const uint8_t *const *weights; /* [OUTS] rows of weights */
    const uint8_t *x;
    int64_t row_bytes;
    int64_t steps;
} Operands;

INLINE vec tile_of_rows(const int dtype, const int rows, bool fetch, const Operands *of)
{
    return fetch ? tile(dtype, rows, true, of->weights, of->x, of->row_bytes, of->steps)
                 : tile(dtype, rows, false, of->weights, of->x, of->row_bytes, of->steps);
}

INLINE vec tile_of_dtype(const int dtype, int64_t rows, bool fetch, const Operands *of)
{
    switch (rows) {
    case 1: return tile_of_rows(dtype, 1, fetch, of);
    case 2: return tile_of_rows(dtype, 2, fetch, of);
    case 3: return tile_of_rows(dtype, 3, fetch, of);
    default: return tile_of_rows(dtype, 4, fetch, of);
    }
}

/* One copy of each: inlined, they would take five times as long to compile. */
NOINLINE vec tile_of_bf16(int64_t rows, bool fetch, const Operands *of) { return tile_of_dtype(LAMINA_BF16, rows, fetch, of); }
NOINLINE vec tile_of_int8(int64_t rows, bool fetch, const Operands *of) { return tile_of_dtype(LAMINA_INT8, rows, fetch, of); }
NOINLINE vec tile_of_f32(int64_t rows, bool fetch, const Operands *of) { return tile_of_dtype(LAMINA_F32, rows, fetch, of); }

INLINE vec tile_of(const int dtype, int64_t rows, bool fetch, const Operands *of)
{
    return dtype == LAMINA_BF16   ? tile_of_bf16(rows, fetch, of)
           : dtype == LAMINA_INT8 ? tile_of_int8(rows, fetch, of)
                                  : tile_of_f32(rows, fetch, of);
}

/* OUTS outputs of a matrix. Past its end the last output is repeated, and not stored. */
typedef struct {
    const uint8_t *weights[OUTS];
    vec scales, biases; /* [row * OUTS + out] */
} Outputs;

INLINE vec numbers_of_outputs(const Memory *numbers, int64_t first, int64_t count)
{
    float whole[OUTS] = {0};
    if (!numbers->bytes)
        return zeros();
    const float *from = (const float *)numbers->data + first;
    if (count >= OUTS)
        return every_4_f32(from);
    for (int64_t out = 0; out < count; out++)
        whole[out] = from[out];
    return every_4_f32(whole);
}

INLINE void take_outputs(const int dtype, const Matrix *matrix, int64_t first, int64_t steps, Outputs *outputs)
{
    const uint8_t *weights = matrix->weights.data;
    UNROLL
    for (int out = 0; out < OUTS; out++)
        outputs->weights[out] = weights + smaller(first + out, matrix->outs - 1) * steps * step_bytes_of(dtype);
    outputs->biases = numbers_of_outputs(&matrix->biases, first, matrix->outs - first);
    if (dtype == LAMINA_INT8)
        outputs->scales = numbers_of_outputs(&matrix->scales, first, matrix->outs - first);
}

/* A tile of x Wᵀ + b. */
INLINE vec product(const int dtype, const Outputs *outputs, const Rows *x, int64_t row, int64_t steps)
{
    const Operands operands = {outputs->weights, x->data + row * x->row_bytes, x->row_bytes, steps};
    vec sums = tile_of(dtype, smaller(ROWS, x->rows - row), row == 0, &operands);
    if (dtype != LAMINA_INT8)
        return add_f32(sums, outputs->biases);
    return fma_f32(mul_f32(sums, load(x->scales + row * OUTS)), outputs->scales, outputs->biases);
}

/* Stores the rows and outputs of a tile that exist to y [rows, outs]. */
INLINE void store_tile(vec numbers, int64_t rows, int64_t count, int64_t outs, bool add, float *y)
{
    float lanes[ROWS * OUTS];
    store(lanes, numbers);
    for (int64_t row = 0; row < rows; row++)
        if (count >= OUTS)
            for (int out = 0; out < OUTS; out++)
                y[row * outs + out] = lanes[row * OUTS + out] + (add ? y[row * outs + out] : 0.0f);
        else
            for (int64_t out = 0; out < count; out++)
                y[row * outs + out] = lanes[row * OUTS + out] + (add ? y[row * outs + out] : 0.0f);
}

INLINE void multiply_by(const int dtype, const Matrix *matrix, const Rows *x, int64_t first, int64_t last, bool add, float *y)
{
    const int64_t steps = steps_of(dtype, matrix->width);
    for (int64_t out = first; out < last; out += OUTS) {
        Outputs outputs;
        take_outputs(dtype, matrix, out, steps, &outputs);
        for (int64_t row = 0; row < x->rows; row += ROWS) {
            vec numbers = product(dtype, &outputs, x, row, steps);
            store_tile(numbers, smaller(ROWS, x->rows - row), last - out, matrix->outs, add, y + row * matrix->outs + out);
        }
    }
}

/* silu(gate) * up */
INLINE vec gated(vec gate, vec up)
{
    return mul_f32(silu_of(gate), up);
}

INLINE void multiply_gated_by(const int dtype, const Matrix *gate, const Matrix *up, const Rows *x, int64_t first, int64_t last,
                              float *y)
{
    const int64_t steps = steps_of(dtype, gate->width);
    for (int64_t out = first; out < last; out += OUTS) {
        Outputs of_gate, of_up;
        take_outputs(dtype, gate, out, steps, &of_gate);
        take_outputs(dtype, up, out, steps, &of_up);
        for (int64_t row = 0; row < x->rows; row += ROWS) {
            vec gates = product(dtype, &of_gate, x, row, steps), ups = product(dtype, &of_up, x, row, steps);
            store_tile(gated(gates, ups), smaller(ROWS, x->rows - row), last - out, gate->outs, false,
                       y + row * gate->outs + out);
        }
    }
}
