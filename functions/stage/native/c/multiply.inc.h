/* A matrix of whatever dtype. */

static void multiply(const Matrix *matrix, const Rows *x, int64_t first, int64_t last, bool add, float *y)
{
    if (matrix->dtype == LAMINA_Q4)
        multiply_q4(matrix, x, first, last, add, y);
    else if (matrix->dtype == LAMINA_INT8)
        multiply_by(LAMINA_INT8, matrix, x, first, last, add, y);
    else if (matrix->dtype == LAMINA_BF16)
        multiply_by(LAMINA_BF16, matrix, x, first, last, add, y);
    else
        multiply_by(LAMINA_F32, matrix, x, first, last, add, y);
}

static void multiply_gated(const Matrix *gate, const Matrix *up, const Rows *x, int64_t first, int64_t last, float *y)
{
    if (gate->dtype == LAMINA_Q4)
        multiply_gated_q4(gate, up, x, first, last, y);
    else if (gate->dtype == LAMINA_INT8)
        multiply_gated_by(LAMINA_INT8, gate, up, x, first, last, y);
    else if (gate->dtype == LAMINA_BF16)
        multiply_gated_by(LAMINA_BF16, gate, up, x, first, last, y);
    else
        multiply_gated_by(LAMINA_F32, gate, up, x, first, last, y);
}
