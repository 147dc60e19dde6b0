/* Products with a matrix of any dtype. */

/* Sums of 16 outputs for some rows, by a matrix whose outputs are stored in groups. */
INLINE void sum_outputs(const Matrix *matrix, const Rows *x, int64_t first, int64_t rows, int64_t out, GroupSums *sums)
{
    if (matrix->dtype == LAMINA_Q4)
        sum_group(matrix, x, first, rows, out, sums);
    else if (matrix->dtype == LAMINA_BLOCKS)
        sum_blocks(matrix, x, first, rows, out, sums);
    else
        sum_float_blocks(matrix, x, first, rows, out, sums);
}

INLINE vec biases_of(const Matrix *matrix, int64_t out)
{
    return matrix->biases.bytes ? row_part(matrix->biases.data, out, matrix->outs) : zeros();
}

/* Stores a group's outputs to a row of y, and fetches the line of the next group for writing: rows are too far apart for the
   CPU's own prefetcher. `last` ends the outputs of this thread. Others write those beyond. */
INLINE void store_outputs(float *row, int64_t out, int64_t last, int64_t outs, vec numbers)
{
    if (out + LANES < last)
        __builtin_prefetch(row + out + LANES, 1, 2);
    store_row_part(row, out, outs, numbers);
}

static void multiply_groups(const Matrix *matrix, const Rows *x, int64_t first, int64_t last, bool add, float *y)
{
    GroupSums sums;
    begin_tiles();
    for (int64_t out = first; out < last; out += LANES)
        for (int64_t row = 0; row < x->rows; row += Q4_ROWS) {
            const int64_t rows = smaller(Q4_ROWS, x->rows - row);
            const vec biases = biases_of(matrix, out);
            sum_outputs(matrix, x, row, rows, out, &sums);
            for (int64_t i = 0; i < rows; i++) {
                float *to = y + (row + i) * matrix->outs;
                vec found = add_f32(load(sums.of[i]), biases);
                store_outputs(to, out, last, matrix->outs, add ? add_f32(row_part(to, out, matrix->outs), found) : found);
            }
        }
    end_tiles();
}

static void multiply_gated_groups(const Matrix *gate, const Matrix *up, const Rows *x, int64_t first, int64_t last, float *y)
{
    GroupSums of_gate, of_up;
    begin_tiles();
    for (int64_t out = first; out < last; out += LANES)
        for (int64_t row = 0; row < x->rows; row += Q4_ROWS) {
            const int64_t rows = smaller(Q4_ROWS, x->rows - row);
            const vec gate_biases = biases_of(gate, out), up_biases = biases_of(up, out);
            sum_outputs(gate, x, row, rows, out, &of_gate);
            sum_outputs(up, x, row, rows, out, &of_up);
            for (int64_t i = 0; i < rows; i++)
                store_outputs(y + (row + i) * gate->outs, out, last, gate->outs,
                              gated(add_f32(load(of_gate.of[i]), gate_biases), add_f32(load(of_up.of[i]), up_biases)));
        }
    end_tiles();
}

#ifdef WITH_TILES
#define MULTIPLY_NARROW multiply_by_tiles
#define MULTIPLY_GATED_NARROW multiply_gated_by_tiles
#else
#define MULTIPLY_NARROW multiply_by
#define MULTIPLY_GATED_NARROW multiply_gated_by
#endif

static void multiply(const Matrix *matrix, const Rows *x, int64_t first, int64_t last, bool add, float *y)
{
    if (matrix->dtype == LAMINA_Q4 || in_blocks(matrix->dtype))
        multiply_groups(matrix, x, first, last, add, y);
    else if (matrix->dtype == LAMINA_INT8)
        MULTIPLY_NARROW(LAMINA_INT8, matrix, x, first, last, add, y);
    else if (matrix->dtype == LAMINA_BF16)
        MULTIPLY_NARROW(LAMINA_BF16, matrix, x, first, last, add, y);
    else
        multiply_by(LAMINA_F32, matrix, x, first, last, add, y);
}

static void multiply_gated(const Matrix *gate, const Matrix *up, const Rows *x, int64_t first, int64_t last, float *y)
{
    if (gate->dtype == LAMINA_Q4 || in_blocks(gate->dtype))
        multiply_gated_groups(gate, up, x, first, last, y);
    else if (gate->dtype == LAMINA_INT8)
        MULTIPLY_GATED_NARROW(LAMINA_INT8, gate, up, x, first, last, y);
    else if (gate->dtype == LAMINA_BF16)
        MULTIPLY_GATED_NARROW(LAMINA_BF16, gate, up, x, first, last, y);
    else
        multiply_gated_by(LAMINA_F32, gate, up, x, first, last, y);
}

#undef MULTIPLY_NARROW
#undef MULTIPLY_GATED_NARROW
