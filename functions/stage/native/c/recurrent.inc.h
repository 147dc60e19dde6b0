/* Recurrent mixers: rows of one sequence change its state one after the other, so bits do not depend on how they are cut into passes.
   Channels of the convolution, and columns of the heads' matrices, depend on no others: they are pieces of work. */

/* What a pass keeps of a draft token for this mixer, or NULL. */
INLINE float *kept_of(const Mixing *mixing, int64_t row)
{
    const int64_t position = mixing->position + row;
    if (!mixing->kept || position < mixing->kept_from)
        return NULL;
    return mixing->kept + (position - mixing->kept_from) * mixing->kept_values + mixing->mixer->kept_at;
}

/* Copies a part of the states that begins at `at` if a copy of them is wanted after this row. */
INLINE void copy_states(const Mixing *mixing, int64_t row, int64_t at, int64_t count)
{
    for (int64_t copy = 0; copy < mixing->num_copies; copy++)
        if (mixing->copied_at[copy] == mixing->position + row + 1)
            memcpy(mixing->copies + copy * mixing->state_values + at, mixing->states + at, (size_t)count * sizeof(float));
}

/* Channels [first, last): the tail has the inputs before a row, the oldest first. */
static void convolve(const Mixing *mixing, int64_t first, int64_t last)
{
    const Recurrent *mixer = mixing->mixer;
    const int64_t channels = mixer->channels, before = mixer->taps - 1;
    const bool is_short = mixer->kind == LAMINA_CONVOLUTION;
    const float *kernel = mixer->kernel.data, *biases = mixer->kernel_biases.data;
    float *tail = mixing->states + mixer->tail_at;
    for (int64_t row = 0; row < mixing->rows; row++) {
        float *inputs = mixing->inputs + row * mixer->in.outs, *kept = kept_of(mixing, row);
        for (int64_t channel = first; channel < last; channel += LANES) {
            vec x;
            if (mixing->repeats) {
                x = row_part(kept, channel, last);
            } else {
                x = row_part(inputs + mixer->channels_at, channel, last);
                if (is_short)
                    x = mul_f32(x, row_part(inputs, channel, last));
                if (kept)
                    store_row_part(kept, channel, last, x);
            }
            vec sum = mixer->kernel_biases.bytes ? row_part(biases, channel, last) : zeros();
            for (int64_t tap = 0; tap < before; tap++) {
                float *at = tail + tap * channels;
                sum = fma_f32(row_part(at, channel, last), row_part(kernel + tap * channels, channel, last), sum);
                store_row_part(at, channel, last, tap + 1 < before ? row_part(at + channels, channel, last) : x);
            }
            sum = fma_f32(x, row_part(kernel + before * channels, channel, last), sum);
            if (!is_short)
                store_row_part(inputs + mixer->channels_at, channel, last, silu_of(sum));
            else if (!mixing->repeats)
                store_row_part(mixing->outputs + row * channels, channel, last,
                               mul_f32(sum, row_part(inputs + channels, channel, last)));
        }
        for (int64_t tap = 0; mixing->num_copies && tap < before; tap++)
            copy_states(mixing, row, mixer->tail_at + tap * channels + first, last - first);
    }
}

/* log(1 + exp(x)): as 2 artanh(u / (2 + u)) with u = exp(-|x|), relative error about 1e-7. */
INLINE vec softplus_of(vec x)
{
    const vec magnitude = and_i32(x, every_i32(0x7FFFFFFF)), two = every_f32(2.0f);
    vec u = exp_f32(sub_f32(zeros(), magnitude)), s = div_f32(u, add_f32(two, u)), square = mul_f32(s, s);
    vec y = every_f32(1.0f / 15);
    for (int odd = 13; odd > 0; odd -= 2)
        y = fma_f32(y, square, every_f32(1.0f / (float)odd));
    return fma_f32(mul_f32(two, s), y, max_f32(zeros(), x));
}

/* x [size] / sqrt(sum(x²) + 1e-6) * scale */
INLINE void normalize_length(float *x, int64_t size, float scale)
{
    vec squares = zeros();
    for (int64_t i = 0; i < size; i += LANES) {
        vec part = row_part(x, i, size);
        squares = fma_f32(part, part, squares);
    }
    vec inverse = every_f32(scale / __builtin_sqrtf(sum_f32(squares) + 1e-6f));
    for (int64_t i = 0; i < size; i += LANES)
        store_row_part(x, i, size, mul_f32(row_part(x, i, size), inverse));
}

/* The decay of each head's matrix and the factor of what is added to it; in Gated DeltaNet also the lengths of queries and keys. */
static void prepare_row(const Mixing *mixing, int64_t row)
{
    const Recurrent *mixer = mixing->mixer;
    const int64_t heads = mixer->heads;
    const bool is_delta = mixer->kind == LAMINA_DELTA;
    const vec step_scale = every_f32((float)mixer->step_scale);
    const float *rates = mixer->rates.data, *biases = mixer->step_biases.data;
    float *inputs = mixing->inputs + row * mixer->in.outs, *steps = mixing->steps + row * 2 * heads, *kept = kept_of(mixing, row);
    for (int64_t group = 0; is_delta && group < mixer->groups; group++) {
        normalize_length(inputs + mixer->query_at + group * mixer->key_size, mixer->key_size,
                         1.0f / __builtin_sqrtf((float)mixer->key_size));
        normalize_length(inputs + mixer->key_at + group * mixer->key_size, mixer->key_size, 1.0f);
    }
    if (mixing->repeats) {
        memcpy(steps, kept + mixer->channels, (size_t)(2 * heads) * sizeof(float));
        return;
    }
    for (int64_t head = 0; head < heads; head += LANES) {
        vec given = mul_f32(row_part(is_delta ? steps : inputs + mixer->steps_at, head, heads), step_scale);
        vec step = softplus_of(add_f32(given, row_part(biases, head, heads))), factor = step;
        if (is_delta) {
            vec x = row_part(steps + heads, head, heads);
            factor = div_f32(every_f32(1.0f), add_f32(every_f32(1.0f), exp_f32(sub_f32(zeros(), x))));
        }
        store_row_part(steps, head, heads, exp_f32(mul_f32(step, row_part(rates, head, heads))));
        store_row_part(steps + heads, head, heads, factor);
    }
    if (kept)
        memcpy(kept + mixer->channels, steps, (size_t)(2 * heads) * sizeof(float));
}

enum { RECUR_VECTORS = LAMINA_COLUMNS / LANES };

/* The vector that begins at `numbers`. left: how many numbers the row has from there on; whole: at least a vector of them. */
INLINE vec vector_at(const float *numbers, int64_t left, const bool whole)
{
    return whole ? load(numbers) : row_part(numbers, 0, left);
}

/* `vectors` vectors of columns [column, column + width) of a head, from `first` of these on. Without `whole` the last is partial. */
INLINE void recur_vectors(const Mixing *mixing, int64_t head, int64_t column, int64_t width, int64_t first, const int vectors,
                          const bool whole)
{
    const Recurrent *mixer = mixing->mixer;
    const int64_t size = mixer->head_size, keys = mixer->key_size, group = head / (mixer->heads / mixer->groups);
    const int64_t at = mixer->matrix_at + (head * size + column) * keys + first, left = width - first;
    const bool is_delta = mixer->kind == LAMINA_DELTA;
    float *matrix = mixing->states + at;
    for (int64_t row = 0; row < mixing->rows; row++) {
        const float *inputs = mixing->inputs + row * mixer->in.outs;
        const float *query = inputs + mixer->query_at + group * keys, *key = inputs + mixer->key_at + group * keys;
        const float *value = inputs + mixer->value_at + head * size + column + first;
        const float *steps = mixing->steps + row * 2 * mixer->heads;
        float *outputs = mixing->outputs + (row * mixer->heads + head) * size + column + first;
        const vec decay = every_f32(steps[head]), factor = every_f32(steps[mixer->heads + head]);
        vec added[RECUR_VECTORS], sums[RECUR_VECTORS];
        for (int i = 0; i < vectors; i++)
            sums[i] = zeros();
        for (int64_t k = 0; is_delta && k < keys; k++) /* what the matrix has for the key */
            UNROLL for (int i = 0; i < vectors; i++)
                sums[i] = fma_f32(mul_f32(vector_at(matrix + k * width + i * LANES, left, whole), decay), every_f32(key[k]), sums[i]);
        for (int i = 0; i < vectors; i++) {
            vec part = vector_at(value + i * LANES, left, whole);
            added[i] = mul_f32(is_delta ? sub_f32(part, sums[i]) : part, factor);
            sums[i] = zeros();
        }
        for (int64_t k = 0; k < keys; k++)
            UNROLL for (int i = 0; i < vectors; i++) {
                float *numbers = matrix + k * width + i * LANES;
                vec changed = fma_f32(every_f32(key[k]), added[i], mul_f32(vector_at(numbers, left, whole), decay));
                if (whole)
                    store(numbers, changed);
                else
                    store_row_part(numbers, 0, left, changed);
                sums[i] = fma_f32(changed, every_f32(query[k]), sums[i]);
            }
        for (int i = 0; !mixing->repeats && i < vectors; i++) {
            if (mixer->skips.bytes)
                sums[i] = fma_f32(vector_at(value + i * LANES, left, whole), every_f32(((const float *)mixer->skips.data)[head]), sums[i]);
            store_row_part(outputs + i * LANES, 0, left - i * LANES, sums[i]);
        }
        if (whole)
            copy_states(mixing, row, at, keys * width);
        for (int64_t k = 0; !whole && mixing->num_copies && k < keys; k++)
            copy_states(mixing, row, at + k * width, smaller(left, LANES));
    }
}

/* LAMINA_COLUMNS columns of a head's matrix from `column` on, or those that are left. They lie together: [key_size, columns]. */
static void recur(const Mixing *mixing, int64_t head, int64_t column)
{
    const int64_t width = smaller(LAMINA_COLUMNS, mixing->mixer->head_size - column);
    if (width == LAMINA_COLUMNS)
        recur_vectors(mixing, head, column, width, 0, RECUR_VECTORS, true);
    else
        for (int64_t first = 0; first < width; first += LANES)
            recur_vectors(mixing, head, column, width, first, 1, false);
}

INLINE void multiply_by_gate(const float *gate, float scale, int64_t size, float *y)
{
    for (int64_t i = 0; i < size; i += LANES)
        store_row_part(y, i, size, mul_f32(row_part(y, i, size), silu_of(mul_f32(row_part(gate, i, size), every_f32(scale)))));
}

/* The outputs of all heads, normalized and multiplied by their gate. */
static void gate_row(const Mixing *mixing, int64_t row)
{
    const Recurrent *mixer = mixing->mixer;
    const int64_t size = mixer->heads * mixer->head_size, part = size / mixer->norm_parts;
    const float *gate = mixing->inputs + row * mixer->in.outs + mixer->gate_at;
    float *y = mixing->outputs + row * size;
    if (mixer->gate_first)
        multiply_by_gate(gate, (float)mixer->gate_scale, size, y);
    for (int64_t first = 0; mixer->norm.kind && first < size; first += part)
        normalize(&mixer->norm, first, y + first, (float)mixer->eps, part, y + first);
    if (!mixer->gate_first)
        multiply_by_gate(gate, (float)mixer->gate_scale, size, y);
}
