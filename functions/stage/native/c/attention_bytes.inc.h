/* Attention over keys and values in 8 bits (`native.h`), with exact sums: an integer of 14 bits, a number of a query or the weight of
   a token, is multiplied as two digits of 7 bits, whose products with bytes every level adds up without overflow. So only the scaling
   of sums is rounded.

   Weights of tokens have a scale for each page: a great one takes bits from its own page only. */

enum {
    BYTE_MOST = 127,        /* largest number of a key or value */
    KEY_OFFSET = 128,       /* added to a key's number, because one factor must not be negative */
    DIGIT = 128,
    QUERY_MOST = 8127,      /* 128 * 63 + 63: digits are -64 to 63 */
    WEIGHT_MOST = 16383,    /* digits are 0 to 127 */
};

/* Multiplies a query or key x [head_dim] by a matrix of 1 and -1 (Hadamard's, over its vectors): some numbers of keys are many times
   as great as the others, and would cost these their bits. Returns what products of two such heads are greater by. */
INLINE float spread(const Layer *layer, const float *x, float *out)
{
    const int64_t padded = padded_head(layer->head_dim);
    int64_t half = LANES;
    for (int64_t i = 0; i < padded; i += LANES)
        store(out + i, row_part(x, i, layer->head_dim));
    for (; padded % (2 * half) == 0; half *= 2)
        for (int64_t first = 0; first < padded; first += 2 * half)
            for (int64_t i = first; i < first + half; i += LANES) {
                const vec a = load(out + i), b = load(out + i + half);
                store(out + i, add_f32(a, b));
                store(out + i + half, sub_f32(a, b));
            }
    return (float)(half / LANES);
}

/* Rounds x [size] to bytes [size] and returns their scale: NaN if a number is not finite. */
INLINE float bytes_of_row(const float *x, int64_t size, int32_t offset, uint8_t *bytes)
{
    const float largest = largest_of(x, size), steps = (float)BYTE_MOST / largest;
    for (int64_t i = 0; i < size; i += LANES)
        store_bytes(bytes + i, add_i32(i32_of_f32(round_f32(mul_f32(row_part(x, i, size), every_f32(steps)))), every_i32(offset)));
    return largest < __builtin_inff() ? largest / (float)BYTE_MOST : __builtin_nanf("");
}

static void write_kv_in_bytes(const Group *group, const Layer *layer, Pages pages, int64_t kv_head, int64_t position,
                              const float *key, const float *value)
{
    const int64_t size = layer->head_dim, padded = padded_head(layer->head_dim), token = position % PAGE, place = token % BLOCK;
    const int64_t block = token / BLOCK * BLOCK * (padded + LAMINA_SCALE_BYTES);
    uint8_t *keys = head_in_page(group, layer, pages, position, 0, kv_head) + block;
    uint8_t *values = head_in_page(group, layer, pages, position, 1, kv_head) + block;
    _Alignas(64) uint8_t bytes[LAMINA_MOST_HEAD];
    float spread_key[LAMINA_MOST_HEAD];
    spread(layer, key, spread_key);
    float key_scale = bytes_of_row(spread_key, padded, KEY_OFFSET, bytes);
    write_key((const uint32_t *)bytes, padded / 4, place, (uint32_t *)keys);
    float value_scale = bytes_of_row(value, size, 0, bytes);
    for (int64_t i = 0; i < size; i++)
        values[place / 4 * 4 * padded + 4 * i + place % 4] = bytes[i];
    if (key_scale != key_scale || value_scale != value_scale) { /* as in write_kv_as */
        key_scale = __builtin_nanf("");
        value_scale = 0;
    }
    ((float *)(keys + BLOCK * padded))[place] = key_scale;
    ((float *)(values + BLOCK * padded))[place] = value_scale;
}

/* A row of integers: high digits [size], low digits [size], then this. */
typedef struct {
    float scale;
    uint32_t offset; /* what KEY_OFFSET adds to its product with a key, negated; 0 for weights */
} RowEnd;

/* Packs a query x [head_dim]. */
INLINE void pack_query(const Layer *layer, const float *x, uint8_t *packed)
{
    const int64_t padded = padded_head(layer->head_dim);
    float head[LAMINA_MOST_HEAD];
    const float gain = spread(layer, x, head), largest = largest_of(head, padded);
    vec sum = zeros();
    for (int64_t i = 0; i < padded; i += LANES) {
        vec number = i32_of_f32(round_f32(mul_f32(load(head + i), every_f32((float)QUERY_MOST / largest))));
        vec raised = add_i32(number, every_i32(DIGIT / 2 + DIGIT * DIGIT / 2)); /* positive, for the shift */
        sum = add_i32(sum, number);
        store_bytes(packed + i, add_i32(shift_right_i32(raised, 7), every_i32(-DIGIT / 2)));
        store_bytes(packed + padded + i, add_i32(and_i32(raised, every_i32(DIGIT - 1)), every_i32(-DIGIT / 2)));
    }
    uint32_t lanes[LANES], total = 0;
    store(lanes, sum);
    for (int i = 0; i < LANES; i++)
        total += lanes[i];
    const RowEnd end = {largest / ((float)QUERY_MOST * gain), 0u - KEY_OFFSET * total};
    memcpy(packed + 2 * padded, &end, sizeof end);
}

/* Columns of bytes: quads of four bytes, each a vector of columns. Quads follow each other in a block of them. */
typedef struct {
    const uint8_t *at;
    const uint8_t *ahead;      /* a later page, which is fetched meanwhile: pages are too small for the CPU to do it */
    int64_t blocks, block_bytes;
    int64_t quads, quad_bytes; /* of each block */
    int64_t part_bytes;        /* from a vector of columns to the next */
    int64_t scales;            /* bytes from a part of keys, or a block of values, to its scales */
} ByteColumns;

/* The hot loop. For keys it sets out [rows, parts, LANES], for values it adds to it. */
INLINE void bytes_tile(const bool keys, const int rows, const int parts, const ByteColumns *columns, const uint8_t *x,
                       int64_t row_bytes, int64_t size, float *out, int64_t out_stride)
{
    vec high[4][MOST_PARTS], low[4][MOST_PARTS];
    UNROLL
    for (int row = 0; row < rows; row++)
        UNROLL
        for (int part = 0; part < parts; part++)
            high[row][part] = low[row][part] = zeros();
    const uint8_t *digits = x;
    for (int64_t block = 0; block < columns->blocks; block++) {
        const uint8_t *at = columns->at + block * columns->block_bytes;
        const int64_t ahead = columns->ahead - columns->at;
        if (!keys)
            __builtin_prefetch(at + ahead + columns->scales);
        for (int64_t quad = 0; quad < columns->quads; quad++, at += columns->quad_bytes, digits += 4) {
            vec column[MOST_PARTS];
            UNROLL
            for (int part = 0; part < parts; part++) {
                column[part] = load(at + part * columns->part_bytes);
                __builtin_prefetch(at + ahead + part * columns->part_bytes);
            }
            UNROLL
            for (int row = 0; row < rows; row++) {
                const vec highs = every_4_bytes(digits + row * row_bytes), lows = every_4_bytes(digits + row * row_bytes + size);
                UNROLL
                for (int part = 0; part < parts; part++) {
                    high[row][part] = keys ? dot_bytes(high[row][part], column[part], highs) : dot_bytes(high[row][part], highs, column[part]);
                    low[row][part] = keys ? dot_bytes(low[row][part], column[part], lows) : dot_bytes(low[row][part], lows, column[part]);
                }
            }
        }
    }
    UNROLL
    for (int row = 0; row < rows; row++) {
        RowEnd end;
        memcpy(&end, x + row * row_bytes + 2 * size, sizeof end);
        UNROLL
        for (int part = 0; part < parts; part++) {
            float *to = out + row * out_stride + part * LANES;
            vec sum = add_i32(shift_left_i32(high[row][part], 7), low[row][part]);
            if (keys) {
                __builtin_prefetch(columns->ahead + part * columns->part_bytes + columns->scales);
                vec scale = mul_f32(load(columns->at + part * columns->part_bytes + columns->scales), every_f32(end.scale));
                store(to, mul_f32(f32_of_i32(add_i32(sum, every_i32((int32_t)end.offset))), scale));
            } else {
                store(to, fma_f32(f32_of_i32(sum), every_f32(end.scale), load(to)));
            }
        }
    }
}

#define TILE(rows, parts)                                                                                          \
    case 8 * parts + rows - 1:                                                                                     \
        bytes_tile(keys, rows, parts, &those, x + row * row_bytes, row_bytes, size, to + part * LANES, out_stride); \
        break;
/* A few rows and parts at a time: their sums stay in registers. */
#define MULTIPLY_BYTES(name, are_keys)                                                                                     \
    NOINLINE void name(int64_t all_rows, int64_t all_parts, const ByteColumns *columns, const uint8_t *x, int64_t row_bytes, \
                       int64_t size, float *out, int64_t out_stride)                                                       \
    {                                                                                                                      \
        const bool keys = are_keys;                                                                                        \
        for (int64_t row = 0, rows; row < all_rows; row += rows) {                                                         \
            rows = all_rows - row > 4 ? (all_rows - row + 1) / 2 : all_rows - row;                                         \
            float *to = out + row * out_stride;                                                                            \
            const int64_t most = rows <= 3 ? 4 : 2;                                                                        \
            ByteColumns those = *columns;                                                                                  \
            for (int64_t part = 0, parts; part < all_parts; part += parts) {                                               \
                parts = all_parts - part >= most ? most : 1;                                                               \
                those.at = columns->at + part * columns->part_bytes;                                                       \
                those.ahead = columns->ahead + part * columns->part_bytes;                                                 \
                switch (8 * parts + rows - 1) {                                                                            \
                    TILE(1, 4) TILE(2, 4) TILE(3, 4) TILE(4, 2) TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1)                \
                }                                                                                                          \
            }                                                                                                              \
        }                                                                                                                  \
    }
MULTIPLY_BYTES(multiply_keys, true)
MULTIPLY_BYTES(multiply_values, false)
#undef TILE
#undef MULTIPLY_BYTES

/* Replaces the powers of a query at up to PAGE tokens by integers, in place: powers times the values' scales. */
INLINE void pack_weights(float *powers, int64_t tokens, float share, const uint8_t *values, int64_t padded)
{
    const vec unseen = zeros();
    vec weights[PAGE / BLOCK], largest_bits = every_f32(1e-30f);
    uint8_t *packed = (uint8_t *)powers;
    for (int64_t block = 0; block < tokens / BLOCK; block++) {
        vec power = load(powers + block * BLOCK), scale = load(values + block * BLOCK * (padded + LAMINA_SCALE_BYTES) + BLOCK * padded);
        weights[block] = if_less_f32(unseen, power, mul_f32(power, scale), unseen); /* old data may be anything */
        largest_bits = max_i32(largest_bits, weights[block]);
    }
    const int32_t bits = largest_i32(largest_bits);
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    const vec steps = every_f32((float)WEIGHT_MOST / largest);
    for (int64_t block = 0; block < tokens / BLOCK; block++) {
        vec number = i32_of_f32(round_f32(mul_f32(weights[block], steps)));
        store_bytes(packed + block * BLOCK, shift_right_i32(number, 7));
        store_bytes(packed + tokens + block * BLOCK, and_i32(number, every_i32(DIGIT - 1)));
    }
    const RowEnd end = {largest / (float)WEIGHT_MOST * share, 0};
    memcpy(packed + 2 * tokens, &end, sizeof end);
}

/* As attend_piece. */
static void attend_piece_in_bytes(const Group *group, const Layer *layer, const Queries *queries, const Together *at, int64_t begin,
                                  int64_t end)
{
    enum { AHEAD = 2 };
    const int64_t padded = padded_head(layer->head_dim), tokens = rounded_up(end - begin, BLOCK), num_pages = (tokens + PAGE - 1) / PAGE;
    const int64_t block_bytes = BLOCK * (padded + LAMINA_SCALE_BYTES);
    const uint8_t *pages[2 * SPLIT / PAGE + AHEAD]; /* of keys, then of values, in the order in which they are read */
    for (int64_t page = 0; page < 2 * num_pages + AHEAD; page++) {
        const int64_t number = smaller(page, 2 * num_pages - 1);
        pages[page] = head_in_page(group, layer, queries->pages, begin + number % num_pages * PAGE, number / num_pages, queries->kv_head);
    }
    for (int64_t page = 0; page < num_pages; page++) {
        const int64_t token = page * PAGE, blocks = smaller(PAGE, tokens - token) / BLOCK;
        const ByteColumns keys = {pages[page], pages[page + AHEAD], 1, 0, padded / 4, 4 * BLOCK, block_bytes,
                                  BLOCK * padded};
        multiply_keys(at->count, blocks, &keys, at->packed, at->row_bytes, padded, at->scores + token, tokens);
    }
    int64_t most_seen = 0;
    float shares[QUERIES];
    for (int64_t query = 0; query < at->count; query++) {
        const Attended result = attended_at(layer, at->results, query);
        most_seen = larger(most_seen, raise_powers(layer, queries, at, query, begin, end, tokens, &result));
        shares[query] = *result.total == 0 ? 0 : 1.0f / *result.total;
        memset(result.values, 0, (size_t)padded * 4);
    }
    for (int64_t token = 0; token < most_seen; token += PAGE) {
        const int64_t page = num_pages + token / PAGE, count = smaller(PAGE, tokens - token);
        for (int64_t query = 0; query < at->count; query++)
            pack_weights(at->scores + query * tokens + token, count, shares[query], pages[page], padded);
        const ByteColumns values = {pages[page], pages[page + AHEAD], count / BLOCK, block_bytes, BLOCK / 4, 4 * padded, 4 * LANES,
                                    BLOCK * padded};
        multiply_values(at->count, padded / LANES, &values, (const uint8_t *)(at->scores + token), 4 * tokens, count, at->results,
                        attended_floats(layer->head_dim));
    }
}
