/* The phases of latent attention (`Latent` in `native.h`) before and after attention itself, which has one key head: the key is the rotated
   part and then the latent, and the value is the latent. A head's matrix for keys is applied to its query instead, and its matrix for
   values to what the query attends to. Part of `forward.c`. */

static const Latent *latent_of(const Layer *layer)
{
    return layer->latent.bytes ? layer->latent.data : NULL;
}

/* Multiplies numbers of one head in up to FEW_ROWS rows, `stride` floats apart, by the head's own matrix: y [rows, outs]. */
static float *multiply_head(const Forward *forward, const Matrix *matrix, const float *x, int64_t stride, int64_t rows,
                            const Worker *worker)
{
    const Task task = {.level = forward->level, .matrix = matrix, .x = x, .x_stride = stride, .rows = rows};
    const Rows packed = pack_alone(&task, worker);
    float *y = (float *)(worker->scratch + matrix_scratch_bytes(matrix->width, packed.row_bytes));
    forward->level->multiply(matrix, &packed, 0, matrix->outs, false, y);
    return y;
}

/* Key and value of a row, before the rotation. */
static void place_latent(const Forward *forward, const Latent *latent, const float *down, float *heads)
{
    const Group *group = forward->group;
    float *key = heads + group->heads * group->head_dim, *value = key + group->head_dim;
    const float *numbers = down + latent->down.outs - latent->rank - latent->rope;
    forward->level->normalize(&latent->norm, 0, numbers, (float)latent->eps, latent->rank, value);
    memset(value + latent->rank, 0, (size_t)latent->rope * sizeof *value);
    memcpy(key, numbers + latent->rank, (size_t)latent->rope * sizeof *key);
    memcpy(key + latent->rope, value, (size_t)latent->rank * sizeof *key);
}

/* Computes queries, keys and values of all rows. */
static void project_latent(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Latent *latent = latent_of(layer);
    const Group *group = forward->group;
    const int64_t query_size = latent->nope + latent->rope, row_size = row_heads(group, layer) * group->head_dim;
    const bool from_latent = latent->queries.weights.bytes;
    const int64_t stride = from_latent ? group->heads * query_size : latent->down.outs;
    const float *queries = from_latent ? forward->at.queries : forward->at.down;
    multiply(forward, &latent->down, forward->hidden, &layer->before_attention, forward->at.down, SET, worker, phase + PACK_QKV);
    if (from_latent) {
        const Task task = {.level = forward->level, .matrix = &latent->queries, .x = forward->at.down, .x_stride = latent->down.outs,
                           .norm = &latent->query_norm, .eps = (float)latent->eps, .rows = forward->rows, .y = forward->at.queries};
        run_product(&task, &forward->at, worker, phase + PACK_QUERIES);
    }
    const int64_t blocks = (forward->rows + FEW_ROWS - 1) / FEW_ROWS;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase + ABSORB, group->heads + 1, blocks)) >= 0; done++) {
        const int64_t head = piece / blocks, first = piece % blocks * FEW_ROWS, rows = smaller(FEW_ROWS, forward->rows - first);
        const float *own = queries + first * stride + head * query_size, *absorbed = NULL;
        if (head < group->heads)
            absorbed = multiply_head(forward, (const Matrix *)latent->absorb.data + head, own, stride, rows, worker);
        for (int64_t row = 0; row < rows; row++) {
            float *heads = forward->at.heads + (first + row) * row_size, *query = heads + head * group->head_dim;
            if (!absorbed) {
                place_latent(forward, latent, forward->at.down + (first + row) * latent->down.outs, heads);
                continue;
            }
            memcpy(query, own + row * stride + latent->nope, (size_t)latent->rope * sizeof *query);
            memcpy(query + latent->rope, absorbed + row * latent->rank, (size_t)latent->rank * sizeof *query);
        }
    }
    finish_phase(worker, phase + ABSORB, done, (group->heads + 1) * blocks);
}

/* Computes each head's values from the latents that its queries attended to. */
static void expand_values(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Latent *latent = latent_of(layer);
    const Group *group = forward->group;
    const int64_t blocks = (forward->rows + FEW_ROWS - 1) / FEW_ROWS, attended = group->heads * group->head_dim;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase + EXPAND, group->heads, blocks)) >= 0; done++) {
        const int64_t head = piece / blocks, first = piece % blocks * FEW_ROWS, rows = smaller(FEW_ROWS, forward->rows - first);
        const float *x = forward->at.attended + first * attended + head * group->head_dim;
        const float *values = multiply_head(forward, (const Matrix *)latent->expand.data + head, x, attended, rows, worker);
        for (int64_t row = 0; row < rows; row++)
            memcpy(forward->at.values + ((first + row) * group->heads + head) * latent->value_size, values + row * latent->value_size,
                   (size_t)latent->value_size * sizeof *values);
    }
    finish_phase(worker, phase + EXPAND, done, group->heads * blocks);
}
