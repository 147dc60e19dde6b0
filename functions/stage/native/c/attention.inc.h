/* Attention over the KV arena, and the writing of keys and values.

   A score is added up pair by pair in a lane of its own, and values are added up token pair by token pair from the beginning of a
   block, whether one query reads them or eight do. So bits do not depend on chunks and on other rows. Keys and values are stored
   in the order in which they are read (`native.h`). */

enum {
    BLOCK = LAMINA_BLOCK_TOKENS,
    QUERIES = LAMINA_QUERIES,
#ifdef WITH_TILES
    FROM_BLOCK = 32, /* tokens: reading begins at a multiple of it */
#else
    FROM_BLOCK = BLOCK,
#endif
    MOST_PARTS = 4, /* vectors of columns in one tile for up to four queries; half as many for more */
};

/* Normalizes and rotates a head in place. rotation [size / 2, 2] or NULL, gain [size] or NULL. */
INLINE void prepare_head(float *head, int64_t size, const float *gain, float eps, const float *rotation)
{
    if (gain)
        normalize(head, gain, eps, size, head);
    if (rotation)
        for (int64_t i = 0; i < size; i += 2) {
            float real = head[i], imaginary = head[i + 1], cosine = rotation[i], sine = rotation[i + 1];
            head[i] = real * cosine - imaginary * sine;
            head[i + 1] = real * sine + imaginary * cosine;
        }
}

/* False if a packed number has an exponent of ones only. */
INLINE bool all_finite(const int dtype, const uint8_t *packed, int64_t count)
{
    int32_t found = 0;
    for (int64_t i = 0; i < count; i++)
        if (dtype == LAMINA_BF16)
            found |= (((const uint16_t *)packed)[i] & 0x7F80) == 0x7F80;
        else
            found |= (((const int32_t *)packed)[i] & 0x7F800000) == 0x7F800000;
    return !found;
}

INLINE void write_key(const uint32_t *pairs, int64_t count, int64_t place, uint32_t *block)
{
    for (int64_t pair = 0; pair < count; pair++)
        block[pair * BLOCK + place] = pairs[pair];
}

INLINE void write_kv_as(const int dtype, const Group *group, const Layer *layer, int64_t kv_head, int64_t slot, bool is_last,
                        const float *key, const float *value)
{
    const int64_t size = group->head_dim, padded = padded_head(group), number = bytes_of(dtype);
    _Alignas(64) uint8_t packed_key[4 * LAMINA_MOST_HEAD], packed_value[4 * LAMINA_MOST_HEAD];
    pack((Dtype)dtype, key, size, packed_key);
    pack((Dtype)dtype, value, size, packed_value);
    if (!all_finite(dtype, packed_key, size) || !all_finite(dtype, packed_value, size)) {
        /* A key of NaN makes NaN the scores of queries that attend to the token, and of no others. A value of NaN would reach others
           too, by a weight of 0. */
        memset(packed_key, 0xFF, (size_t)(size * number));
        memset(packed_value, 0, (size_t)(size * number));
    }
    uint8_t *keys = (uint8_t *)layer->keys.data + kv_head * group->capacity_tokens * padded * number;
    uint8_t *values = (uint8_t *)layer->values.data + kv_head * group->capacity_tokens * padded * number;
    write_key((const uint32_t *)packed_key, size * number / 4, slot % BLOCK,
              (uint32_t *)(keys + slot / BLOCK * BLOCK * padded * number));
    if (dtype == LAMINA_F32) {
        memcpy(values + slot * padded * 4, packed_value, (size_t)size * 4);
        return;
    }
    uint16_t *pair = (uint16_t *)values + slot / 2 * 2 * padded;
    for (int64_t i = 0; i < size; i++)
        pair[2 * i + slot % 2] = ((const uint16_t *)packed_value)[i];
    if (is_last && slot % 2 == 0) /* old data may be NaN, which a weight of 0 does not remove */
        for (int64_t i = 0; i < size; i++)
            pair[2 * i + 1] = 0;
}

static void write_kv(const Group *group, const Layer *layer, int64_t kv_head, int64_t slot, bool is_last,
                     const float *rotation, float *heads)
{
    const int64_t size = group->head_dim, shared = group->heads / group->kv_heads;
    const float *gains = layer->qk_gain.bytes ? layer->qk_gain.data : NULL, *turn = layer->rotary ? rotation : NULL;
    const float eps = (float)group->eps;
    for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; head++)
        prepare_head(heads + head * size, size, gains ? gains + head * size : NULL, eps, turn);
    int64_t key = group->heads + kv_head, value = key + group->kv_heads;
    prepare_head(heads + key * size, size, gains ? gains + key * size : NULL, eps, turn);
    if (group->kv_dtype == LAMINA_BF16)
        write_kv_as(LAMINA_BF16, group, layer, kv_head, slot, is_last, heads + key * size, heads + value * size);
    else
        write_kv_as(LAMINA_F32, group, layer, kv_head, slot, is_last, heads + key * size, heads + value * size);
}

/* Columns that rows are multiplied with: for every pair some vectors (parts), with a column in each lane. */
typedef struct {
    const uint8_t *data;
    int64_t pairs;
    int64_t pair_bytes;
    int64_t part_bytes;
} Columns;

/* The hot loop of attention: out [rows, parts, LANES] = products of rows with columns, pair by pair in every lane. */
INLINE void columns_tile(const int dtype, const int rows, const int parts, const Columns *columns, const uint8_t *x,
                         int64_t row_bytes, float *out, int64_t out_stride)
{
    vec sums[QUERIES][MOST_PARTS];
    UNROLL
    for (int row = 0; row < rows; row++)
        UNROLL
        for (int part = 0; part < parts; part++)
            sums[row][part] = zeros();
    const uint8_t *at = columns->data;
    for (int64_t pair = 0; pair < columns->pairs; pair++, at += columns->pair_bytes) {
        vec column[MOST_PARTS];
        UNROLL
        for (int part = 0; part < parts; part++)
            column[part] = load(at + part * columns->part_bytes);
        UNROLL
        for (int row = 0; row < rows; row++) {
            int32_t numbers;
            memcpy(&numbers, x + row * row_bytes + pair * 4, 4);
            vec everywhere = every_i32(numbers);
            UNROLL
            for (int part = 0; part < parts; part++)
                sums[row][part] = multiply_add(dtype, sums[row][part], column[part], everywhere);
        }
    }
    UNROLL
    for (int row = 0; row < rows; row++)
        UNROLL
        for (int part = 0; part < parts; part++)
            store(out + row * out_stride + part * LANES, sums[row][part]);
}

#define TILE(rows, parts)                                                         \
    case 8 * parts + rows - 1:                                                    \
        columns_tile(dtype, rows, parts, columns, x, row_bytes, out, out_stride); \
        break;
#define TILES(parts) TILE(1, parts) TILE(2, parts) TILE(3, parts) TILE(4, parts)
#define MORE_TILES(parts) TILE(5, parts) TILE(6, parts) TILE(7, parts) TILE(8, parts)
#define COLUMNS_TILES_OF(name, kind)                                                                             \
    NOINLINE void name(int64_t rows, int64_t parts, const Columns *columns, const uint8_t *x, int64_t row_bytes, \
                       float *out, int64_t out_stride)                                                           \
    {                                                                                                            \
        const int dtype = kind;                                                                                  \
        switch (8 * parts + rows - 1) {                                                                          \
            TILES(1) MORE_TILES(1) TILES(2) MORE_TILES(2) TILES(4)                                               \
        }                                                                                                        \
    }
COLUMNS_TILES_OF(columns_tile_of_bf16, LAMINA_BF16)
COLUMNS_TILES_OF(columns_tile_of_f32, LAMINA_F32)
#undef TILE
#undef TILES
#undef MORE_TILES
#undef COLUMNS_TILES_OF

#ifdef WITH_TILES
#include "attention_tiles.inc.h"
#endif

/* Multiplies with any number of parts, a few at a time. */
INLINE void multiply_columns(const int dtype, int64_t rows, int64_t parts, const Columns *columns, const uint8_t *x,
                             int64_t row_bytes, float *out, int64_t out_stride)
{
#ifdef WITH_TILES
    if (dtype == LAMINA_BF16) {
        multiply_columns_by_tiles(rows, parts, columns, x, row_bytes, out, out_stride);
        return;
    }
#endif
    const int64_t most = rows > QUERIES / 2 ? MOST_PARTS / 2 : MOST_PARTS;
    for (int64_t part = 0; part < parts;) {
        int64_t together = parts - part >= most ? most : parts - part >= 2 ? 2 : 1;
        Columns those = {columns->data + part * columns->part_bytes, columns->pairs, columns->pair_bytes, columns->part_bytes};
        if (dtype == LAMINA_BF16)
            columns_tile_of_bf16(rows, together, &those, x, row_bytes, out + part * LANES, out_stride);
        else
            columns_tile_of_f32(rows, together, &those, x, row_bytes, out + part * LANES, out_stride);
        part += together;
    }
}

/* Softmax of scores [first, last) in place; the other ones of scores [tokens] become 0. Sums run over whole vectors from the
   beginning of a block. */
INLINE void softmax(float *scores, int64_t first, int64_t last, int64_t tokens)
{
    const float unseen = -__builtin_inff();
    for (int64_t token = 0; token < first; token++)
        scores[token] = unseen;
    for (int64_t token = last; token < tokens; token++)
        scores[token] = unseen;
    vec largest = every_f32(unseen);
    for (int64_t token = 0; token < tokens; token += LANES)
        largest = max_f32(load(scores + token), largest);
    float lanes[LANES], most = unseen;
    store(lanes, largest);
    for (int i = 0; i < LANES; i++)
        most = lanes[i] > most ? lanes[i] : most;
    vec total = zeros();
    for (int64_t token = 0; token < tokens; token += LANES) {
        vec power = exp_f32(sub_f32(load(scores + token), every_f32(most)));
        store(scores + token, power);
        total = add_f32(total, power);
    }
    vec share = every_f32(1.0f / sum_f32(total));
    for (int64_t token = 0; token < tokens; token += LANES)
        store(scores + token, mul_f32(load(scores + token), share));
}

/* Attention of queries [first, first + count), numbered by head and row, which read keys and values together. */
INLINE void attend_together(const int dtype, const Group *group, const Layer *layer, const Queries *queries, int64_t first,
                            int64_t count, uint8_t *scratch)
{
    const int64_t size = group->head_dim, padded = padded_head(group), number = bytes_of(dtype), rows = queries->rows;
    const int64_t shared = group->heads / group->kv_heads, all_heads = group->heads + 2 * group->kv_heads;
    const bool one_head = first / rows == (first + count - 1) / rows;
    const int64_t first_row = one_head ? first % rows : 0, last_row = one_head ? (first + count - 1) % rows : rows - 1;
    const int64_t begin = first_attended(layer, queries->first_position + first_row) / FROM_BLOCK * FROM_BLOCK;
    const int64_t tokens = rounded_up(queries->first_position + last_row + 1 - begin, BLOCK);
    const int64_t row_bytes = 4 * rounded_up(size, LAMINA_STEP);
    uint8_t *packed = scratch;
    float *results = (float *)(packed + QUERIES * row_bytes), *scores = results + QUERIES * padded;
    float scaled[LAMINA_MOST_HEAD];
    const float scale = 1.0f / __builtin_sqrtf((float)size);
    for (int64_t query = 0; query < count; query++) {
        int64_t head = queries->kv_head * shared + (first + query) / rows, row = (first + query) % rows;
        const float *numbers = queries->heads + (row * all_heads + head) * size;
        for (int64_t i = 0; i < size; i++)
            scaled[i] = numbers[i] * scale;
        pack((Dtype)dtype, scaled, size, packed + query * row_bytes);
    }
    const int64_t slot = queries->segment->first_slot + begin;
    const int64_t place = (queries->kv_head * group->capacity_tokens + slot) * padded * number;
    const Columns keys = {(const uint8_t *)layer->keys.data + place, size * number / 4, 64, BLOCK * padded * number};
    multiply_columns(dtype, count, tokens / BLOCK, &keys, packed, row_bytes, scores, tokens);
    int64_t most_seen = 0;
    for (int64_t query = 0; query < count; query++) {
        int64_t position = queries->first_position + (first + query) % rows;
        int64_t from = first_attended(layer, position) - begin, to = position + 1 - begin;
        most_seen = larger(most_seen, to);
        softmax(scores + query * tokens, from, to, rounded_up(to, BLOCK));
        for (int64_t token = rounded_up(to, BLOCK); token < tokens; token++)
            scores[query * tokens + token] = 0;
        if (dtype == LAMINA_BF16) /* in place: packed scores take less memory */
            for (int64_t token = 0; token < tokens; token += 2 * LANES)
                store((uint8_t *)(scores + query * tokens) + 2 * token,
                      bf16_of_f32(row_part(scores + query * tokens, token, tokens),
                                  row_part(scores + query * tokens, token + LANES, tokens)));
    }
    const int64_t pairs = dtype == LAMINA_BF16 ? (most_seen + 1) / 2 : most_seen;
    const Columns values = {(const uint8_t *)layer->values.data + place, pairs, 4 * padded, 64};
    multiply_columns(dtype, count, padded / LANES, &values, (const uint8_t *)scores, 4 * tokens, results, padded);
    for (int64_t query = 0; query < count; query++) {
        int64_t head = queries->kv_head * shared + (first + query) / rows, row = (first + query) % rows;
        memcpy(queries->attended + (row * group->heads + head) * size, results + query * padded, (size_t)size * 4);
    }
}

static void attend(const Group *group, const Layer *layer, const Queries *queries, uint8_t *scratch)
{
    const int64_t all = group->heads / group->kv_heads * queries->rows;
    const int64_t groups = (all + QUERIES - 1) / QUERIES, together = (all + groups - 1) / groups;
    for (int64_t first = 0; first < all; first += together) {
        int64_t count = smaller(together, all - first);
        if (group->kv_dtype == LAMINA_BF16)
            attend_together(LAMINA_BF16, group, layer, queries, first, count, scratch);
        else
            attend_together(LAMINA_F32, group, layer, queries, first, count, scratch);
    }
}
