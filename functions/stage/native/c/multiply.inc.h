/* Products with a matrix of any dtype. */

#ifdef WITH_TILES
#define MULTIPLY_NARROW multiply_by_tiles
#define MULTIPLY_GATED_NARROW multiply_gated_by_tiles
#else
#define MULTIPLY_NARROW multiply_by
#define MULTIPLY_GATED_NARROW multiply_gated_by
#endif

static void multiply(const Matrix *matrix, const Rows *x, int64_t first, int64_t last, bool add, float *y)
{
    if (matrix->dtype == LAMINA_Q4)
        multiply_q4(matrix, x, first, last, add, y);
    else if (matrix->dtype == LAMINA_INT8)
        MULTIPLY_NARROW(LAMINA_INT8, matrix, x, first, last, add, y);
    else if (matrix->dtype == LAMINA_BF16)
        MULTIPLY_NARROW(LAMINA_BF16, matrix, x, first, last, add, y);
    else
        multiply_by(LAMINA_F32, matrix, x, first, last, add, y);
}

static void multiply_gated(const Matrix *gate, const Matrix *up, const Rows *x, int64_t first, int64_t last, float *y)
{
    if (gate->dtype == LAMINA_Q4)
        multiply_gated_q4(gate, up, x, first, last, y);
    else if (gate->dtype == LAMINA_INT8)
        MULTIPLY_GATED_NARROW(LAMINA_INT8, gate, up, x, first, last, y);
    else if (gate->dtype == LAMINA_BF16)
        MULTIPLY_GATED_NARROW(LAMINA_BF16, gate, up, x, first, last, y);
    else
        multiply_gated_by(LAMINA_F32, gate, up, x, first, last, y);
}

#undef MULTIPLY_NARROW
#undef MULTIPLY_GATED_NARROW
