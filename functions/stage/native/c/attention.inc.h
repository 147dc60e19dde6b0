/* Attention over the KV arena, and the writing of keys and values.

   A score is added up pair by pair in a lane of its own, and values are added up token pair by token pair from the beginning of a
   page, whether one query reads them or eight do. Each piece of LAMINA_SPLIT_TOKENS tokens has a softmax of its own, and results of
   pieces are merged in their order, by one thread or by several. So bits do not depend on chunks, on other rows and on threads.
   Keys and values are stored in the order in which they are read (`native.h`). */

enum {
    BLOCK = LAMINA_BLOCK_TOKENS,
    PAGE = LAMINA_PAGE_TOKENS,
    SPLIT = LAMINA_SPLIT_TOKENS,
    QUERIES = LAMINA_QUERIES,
    MOST_PARTS = 4, /* vectors of columns in one tile for up to four queries; half as many for more */
};

/* Normalizes and rotates a head in place. number: of the head among queries and keys. rotation: [size / 2, 2] or NULL. */
INLINE void prepare_head(const Layer *layer, float *head, int64_t number, int64_t size, float eps, const float *rotation)
{
    const bool normalizes = layer->qk.kind && !layer->qk_as_one;
    if (normalizes && !layer->qk_rotated)
        normalize(&layer->qk, number * size, head, eps, size, head);
    if (rotation)
        for (int64_t i = 0; i < size; i += 2) {
            float real = head[i], imaginary = head[i + 1], cosine = rotation[i], sine = rotation[i + 1];
            head[i] = real * cosine - imaginary * sine;
            head[i + 1] = real * sine + imaginary * cosine;
        }
    if (normalizes && layer->qk_rotated)
        normalize(&layer->qk, number * size, head, eps, size, head);
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

INLINE void write_kv_as(const int dtype, const Group *group, const Layer *layer, Pages pages, int64_t kv_head,
                        int64_t position, bool is_last, const float *key, const float *value)
{
    const int64_t size = layer->head_dim, padded = padded_head(layer->head_dim), number = bytes_of(dtype);
    _Alignas(64) uint8_t packed_key[4 * LAMINA_MOST_HEAD], packed_value[4 * LAMINA_MOST_HEAD];
    pack((Dtype)dtype, key, size, packed_key);
    pack((Dtype)dtype, value, size, packed_value);
    if (!all_finite(dtype, packed_key, size) || !all_finite(dtype, packed_value, size)) {
        /* A key of NaN makes NaN the scores of queries that attend to the token, and of no others. A value of NaN would reach others
           too, by a weight of 0. */
        memset(packed_key, 0xFF, (size_t)(size * number));
        memset(packed_value, 0, (size_t)(size * number));
    }
    uint8_t *keys = head_in_page(group, layer, pages, position, 0, kv_head);
    uint8_t *values = head_in_page(group, layer, pages, position, 1, kv_head);
    const int64_t token = position % PAGE;
    write_key((const uint32_t *)packed_key, size * number / 4, token % BLOCK,
              (uint32_t *)(keys + token / BLOCK * BLOCK * padded * number));
    if (dtype == LAMINA_F32) {
        memcpy(values + token * padded * 4, packed_value, (size_t)size * 4);
        return;
    }
    uint16_t *pair = (uint16_t *)values + token / 2 * 2 * padded;
    for (int64_t i = 0; i < size; i++)
        pair[2 * i + token % 2] = ((const uint16_t *)packed_value)[i];
    if (is_last && token % 2 == 0) /* old data may be NaN, which a weight of 0 does not remove */
        for (int64_t i = 0; i < size; i++)
            pair[2 * i + 1] = 0;
}

static void write_kv_in_bytes(const Group *group, const Layer *layer, Pages pages, int64_t kv_head, int64_t position,
                              const float *key, const float *value);

static void write_kv(const Group *group, const Layer *layer, Pages pages, int64_t kv_head, int64_t position, bool is_last,
                     const float *const rotations[2], float *heads)
{
    const int64_t size = layer->head_dim, shared = group->heads / layer->kv_heads;
    const float eps = (float)group->eps;
    for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; head++)
        prepare_head(layer, heads + head * size, head, size, eps, rotations[0]);
    if (layer->reads_kv)
        return;
    int64_t key = group->heads + kv_head, value = key + layer->kv_heads;
    prepare_head(layer, heads + key * size, key, size, eps, rotations[1]);
    if (layer->value.kind)
        normalize(&layer->value, 0, heads + value * size, eps, size, heads + value * size);
    if (group->kv_dtype == LAMINA_BF16)
        write_kv_as(LAMINA_BF16, group, layer, pages, kv_head, position, is_last, heads + key * size, heads + value * size);
    else if (group->kv_dtype == LAMINA_INT8)
        write_kv_in_bytes(group, layer, pages, kv_head, position, heads + key * size, heads + value * size);
    else
        write_kv_as(LAMINA_F32, group, layer, pages, kv_head, position, is_last, heads + key * size, heads + value * size);
}

/* Columns that rows are multiplied with: for every pair some vectors (parts), with a column in each lane. */
typedef struct {
    const uint8_t *const *pages; /* where the pairs of each page begin, and at the end of all what is read next, or NULL */
    int64_t page_pairs;          /* in each page but the last, a multiple of 16 */
    int64_t pairs;               /* in all */
    int64_t pair_bytes;
    int64_t part_bytes;
    int64_t first_part;          /* parts before it are left out */
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
    const uint8_t *const *page = columns->pages;
    for (int64_t pair = 0, end; pair < columns->pairs;) {
        const int64_t first = columns->first_part * columns->part_bytes;
        const uint8_t *at = *page++ + first, *next = *page ? *page + first : at;
        const int64_t ahead = next - at;
        for (end = smaller(columns->pairs, pair + columns->page_pairs); pair < end; pair++, at += columns->pair_bytes) {
            vec column[MOST_PARTS];
            UNROLL
            for (int part = 0; part < parts; part++) {
                column[part] = load(at + part * columns->part_bytes);
                __builtin_prefetch(at + part * columns->part_bytes + ahead);
            }
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
        multiply_columns_by_tiles(parts, columns, x, row_bytes, out, out_stride);
        return;
    }
#endif
    const int64_t most = rows > QUERIES / 2 ? MOST_PARTS / 2 : MOST_PARTS;
    Columns those = *columns;
    for (int64_t part = 0; part < parts;) {
        int64_t together = parts - part >= most ? most : parts - part >= 2 ? 2 : 1;
        those.first_part = part;
        if (dtype == LAMINA_BF16)
            columns_tile_of_bf16(rows, together, &those, x, row_bytes, out + part * LANES, out_stride);
        else
            columns_tile_of_f32(rows, together, &those, x, row_bytes, out + part * LANES, out_stride);
        part += together;
    }
}

/* What queries get from one piece of the tokens, or from several: `size` values, and the greatest score with the sum of all powers. */
typedef struct {
    float *values; /* [padded head_dim] */
    float *most;
    float *total; /* 0: from no token */
} Attended;

INLINE Attended attended_at(const Layer *layer, float *memory, int64_t query)
{
    const int64_t padded = padded_head(layer->head_dim);
    float *own = memory + query * attended_floats(layer->head_dim);
    return (Attended){own, own + padded, own + padded + 1};
}

/* Merges the result of a later piece into `all`. A function of its own, so that it gives the same bits wherever it is used. */
NOINLINE void merge(int64_t padded, const Attended *all, const Attended *later)
{
    if (*later->total == 0)
        return;
    if (*all->total == 0) {
        memcpy(all->values, later->values, (size_t)padded * 4);
        *all->most = *later->most;
        *all->total = *later->total;
        return;
    }
    const float most = *all->most > *later->most ? *all->most : *later->most;
    float powers[2][LANES];
    store(powers[0], exp_f32(every_f32(*all->most - most)));
    store(powers[1], exp_f32(every_f32(*later->most - most)));
    const float first = *all->total * powers[0][0], second = *later->total * powers[1][0], total = first + second;
    for (int64_t i = 0; i < padded; i += LANES) {
        vec share = mul_f32(load(later->values + i), every_f32(second / total));
        store(all->values + i, fma_f32(load(all->values + i), every_f32(first / total), share));
    }
    *all->most = most;
    *all->total = total;
}

/* Scores become cap * tanh(score / cap). */
INLINE void cap_scores(float *scores, int64_t tokens, float cap)
{
    for (int64_t token = 0; token < tokens; token += LANES) {
        vec power = exp_f32(mul_f32(load(scores + token), every_f32(2.0f / cap)));
        vec beyond = div_f32(every_f32(2.0f), add_f32(power, every_f32(1.0f)));
        store(scores + token, mul_f32(sub_f32(every_f32(1.0f), beyond), every_f32(cap)));
    }
}

/* Replaces scores [first, last) by their powers, exp(score - greatest); the other ones of scores [tokens] become 0. Sums run over
   whole vectors from the beginning of a page. Sets most and total of `result`. */
INLINE void raise(float *scores, int64_t first, int64_t last, int64_t tokens, const Attended *result)
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
    *result->most = most;
    *result->total = sum_f32(total);
}

/* Queries that read keys and values together, numbered by head and row, and a thread's memory for them. */
typedef struct {
    int64_t first, count;
    const uint8_t **pages; /* [LAMINA_PIECE_PAGES] */
    uint8_t *packed;       /* [QUERIES, row_bytes] */
    int64_t row_bytes;
    float *results;        /* [QUERIES] of one piece, see attended_at */
    float *scores;         /* [QUERIES, tokens of a piece] */
} Together;

/* Replaces a query's scores of tokens [begin, end) by powers, 0 for those that it does not attend to. Returns the number of tokens
   up to the last one that it does. */
INLINE int64_t raise_powers(const Layer *layer, const Queries *queries, const Together *at, int64_t query, int64_t begin, int64_t end,
                            int64_t tokens, const Attended *result)
{
    float *scores = at->scores + query * tokens;
    const int64_t position = queries->first_position + (at->first + query) % queries->rows;
    const int64_t from = larger(0, first_attended(layer, position) - begin);
    const int64_t to = smaller(end_attended(layer, queries->end, position), end) - begin;
    const int64_t seen = from < to ? to : 0;
    *result->total = 0;
    if (layer->score_cap > 0)
        cap_scores(scores, tokens, (float)layer->score_cap);
    if (seen)
        raise(scores, from, to, rounded_up(to, BLOCK), result);
    for (int64_t token = rounded_up(seen, BLOCK); token < tokens; token++)
        scores[token] = 0;
    return seen;
}

#include "attention_bytes.inc.h"

/* Attention over tokens [begin, end) of the sequence, which begin with a page and are at most SPLIT. Computes `results`. */
INLINE void attend_piece(const int dtype, const Group *group, const Layer *layer, const Queries *queries, const Together *at,
                         int64_t begin, int64_t end)
{
    if (dtype == LAMINA_INT8) {
        attend_piece_in_bytes(group, layer, queries, at, begin, end);
        return;
    }
    const int64_t padded = padded_head(layer->head_dim), number = bytes_of(dtype), tokens = rounded_up(end - begin, BLOCK);
    const int64_t key_pairs = layer->head_dim * number / 4;
    const int64_t pages = (tokens + PAGE - 1) / PAGE;
    for (int64_t page = 0; page < pages; page++)
        at->pages[page] = head_in_page(group, layer, queries->pages, begin + page * PAGE, 0, queries->kv_head);
    at->pages[pages] = head_in_page(group, layer, queries->pages, begin, 1, queries->kv_head);
#ifdef WITH_TILES
    if (dtype == LAMINA_BF16)
        configure_columns(at->count, key_pairs % STEP_PAIRS);
#endif
    for (int64_t token = 0; token < tokens; token += PAGE) {
        const Columns keys = {at->pages + token / PAGE, INT32_MAX, key_pairs, 64, BLOCK * padded * number, 0};
        multiply_columns(dtype, at->count, smaller(PAGE, tokens - token) / BLOCK, &keys, at->packed, at->row_bytes,
                         at->scores + token, tokens);
    }
    int64_t most_seen = 0;
    for (int64_t query = 0; query < at->count; query++) {
        float *scores = at->scores + query * tokens;
        const Attended result = attended_at(layer, at->results, query);
        most_seen = larger(most_seen, raise_powers(layer, queries, at, query, begin, end, tokens, &result));
        const vec share = every_f32(*result.total == 0 ? 0 : 1.0f / *result.total);
        for (int64_t token = 0; token < tokens; token += LANES)
            store(scores + token, mul_f32(load(scores + token), share));
        if (dtype == LAMINA_BF16) /* in place: packed scores take less memory */
            for (int64_t token = 0; token < tokens; token += 2 * LANES)
                store((uint8_t *)scores + 2 * token,
                      bf16_of_f32(row_part(scores, token, tokens), row_part(scores, token + LANES, tokens)));
    }
    const int64_t page_pairs = dtype == LAMINA_BF16 ? PAGE / 2 : PAGE;
    const int64_t pairs = dtype == LAMINA_BF16 ? (most_seen + 1) / 2 : most_seen;
    for (int64_t page = 0; page < pages; page++)
        at->pages[page] = head_in_page(group, layer, queries->pages, begin + page * PAGE, 1, queries->kv_head);
    at->pages[pages] = NULL;
    const Columns values = {at->pages, page_pairs, pairs, 4 * padded, 64, 0};
#ifdef WITH_TILES
    if (dtype == LAMINA_BF16)
        configure_columns(at->count, pairs % STEP_PAIRS);
#endif
    multiply_columns(dtype, at->count, padded / LANES, &values, (const uint8_t *)at->scores, 4 * tokens, at->results,
                     attended_floats(layer->head_dim));
#ifdef WITH_TILES
    if (dtype == LAMINA_BF16)
        _tile_release();
#endif
}

/* Writes the result of a query over all tokens, after its head's sink took a share of the weights, and its gate. A function of its own, as
   `merge`. */
NOINLINE void write_result(const Group *group, const Layer *layer, const Queries *queries, int64_t query, const Attended *all)
{
    const int64_t size = layer->head_dim, row = query % queries->rows;
    const int64_t head = queries->kv_head * (group->heads / layer->kv_heads) + query / queries->rows;
    if (layer->sinks.bytes) {
        const float sink = ((const float *)layer->sinks.data)[head], most = *all->most > sink ? *all->most : sink;
        float powers[2][LANES];
        store(powers[0], exp_f32(every_f32(*all->most - most)));
        store(powers[1], exp_f32(every_f32(sink - most)));
        const float total = *all->total * powers[0][0], share = total / (total + powers[1][0]);
        for (int64_t i = 0; i < size; i += LANES)
            store(all->values + i, mul_f32(load(all->values + i), every_f32(share)));
    }
    if (layer->gates) {
        const float *gate = queries->heads + ((row + 1) * row_heads(group, layer) - group->heads + head) * size;
        for (int64_t i = 0; i < size; i += LANES)
            store(all->values + i, mul_f32(load(all->values + i), sigmoid_of(row_part(gate, i, size))));
    }
    memcpy(queries->attended + (row * group->heads + head) * size, all->values, (size_t)size * 4);
}

/* Attention of queries [first, first + count), numbered by head and row, which read keys and values together. */
INLINE void attend_together(const int dtype, const Group *group, const Layer *layer, const Queries *queries, int64_t first,
                            int64_t count, uint8_t *scratch)
{
    const int64_t size = layer->head_dim, rows = queries->rows, stride = attended_floats(size);
    const int64_t shared = group->heads / layer->kv_heads;
    const bool one_head = first / rows == (first + count - 1) / rows;
    const int64_t first_row = one_head ? first % rows : 0, last_row = one_head ? (first + count - 1) % rows : rows - 1;
    Together at = {.first = first, .count = count, .pages = (const uint8_t **)scratch, .row_bytes = 4 * rounded_up(size, LAMINA_STEP)};
    float *all = (float *)(scratch + LAMINA_PIECE_PAGES * sizeof *at.pages);
    at.results = all + QUERIES * stride;
    at.packed = (uint8_t *)(at.results + QUERIES * stride);
    at.scores = (float *)(at.packed + QUERIES * at.row_bytes);
    float scaled[LAMINA_MOST_HEAD];
    const float scale = (float)layer->score_scale;
    for (int64_t query = 0; query < count; query++) {
        int64_t head = queries->kv_head * shared + (first + query) / rows, row = (first + query) % rows;
        const float *numbers = queries->heads + row * row_heads(group, layer) * size + head * size;
        for (int64_t i = 0; i < size; i++)
            scaled[i] = numbers[i] * scale;
        if (dtype == LAMINA_INT8)
            pack_query(layer, scaled, at.packed + query * at.row_bytes);
        else
            pack((Dtype)dtype, scaled, size, at.packed + query * at.row_bytes);
        *attended_at(layer, all, query).total = 0;
    }
    int64_t begin = first_attended(layer, queries->first_position + first_row) / PAGE * PAGE;
    int64_t end = end_attended(layer, queries->end, queries->first_position + last_row);
    if (queries->piece) { /* the results of one piece, which `merge_pieces` merges */
        begin = larger(begin, (queries->piece - 1) * SPLIT);
        end = smaller(end, queries->piece * SPLIT);
        all = queries->pieces + first * stride;
        for (int64_t query = 0; query < count; query++)
            *attended_at(layer, all, query).total = 0;
    }
    for (int64_t next; begin < end; begin = next) {
        next = smaller(end, begin / SPLIT * SPLIT + SPLIT);
        attend_piece(dtype, group, layer, queries, &at, begin, next);
        for (int64_t query = 0; query < count; query++) {
            const Attended sum = attended_at(layer, all, query), result = attended_at(layer, at.results, query);
            merge(padded_head(layer->head_dim), &sum, &result);
        }
    }
    if (!queries->piece)
        for (int64_t query = 0; query < count; query++) {
            const Attended result = attended_at(layer, all, query);
            write_result(group, layer, queries, first + query, &result);
        }
}

static void attend(const Group *group, const Layer *layer, const Queries *queries, uint8_t *scratch)
{
    const int64_t all = group->heads / layer->kv_heads * queries->rows;
    const int64_t groups = (all + QUERIES - 1) / QUERIES, together = (all + groups - 1) / groups;
    for (int64_t first = 0; first < all; first += together) {
        int64_t count = smaller(together, all - first);
        if (group->kv_dtype == LAMINA_BF16)
            attend_together(LAMINA_BF16, group, layer, queries, first, count, scratch);
        else if (group->kv_dtype == LAMINA_INT8)
            attend_together(LAMINA_INT8, group, layer, queries, first, count, scratch);
        else
            attend_together(LAMINA_F32, group, layer, queries, first, count, scratch);
    }
}

/* Merges the results of `pieces` pieces of the same queries, `stride` floats apart. */
static void merge_pieces(const Group *group, const Layer *layer, const Queries *queries, int64_t pieces, int64_t stride)
{
    const int64_t queries_in_all = group->heads / layer->kv_heads * queries->rows;
    for (int64_t query = 0; query < queries_in_all; query++) {
        const Attended all = attended_at(layer, queries->pieces, query);
        for (int64_t piece = 1; piece < pieces; piece++) {
            const Attended later = attended_at(layer, queries->pieces + piece * stride, query);
            merge(padded_head(layer->head_dim), &all, &later);
        }
        write_result(group, layer, queries, query, &all);
    }
}
