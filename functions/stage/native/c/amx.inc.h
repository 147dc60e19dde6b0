/* Matrices in bf16 and int8 by the tiles of AMX. One row of activations takes the same way as many, so all get the same bits.

   A tile of weights is 16 outputs by 64 bytes of their rows, as they are stored. Activations are transposed: `arrange` makes lines of
   64 bytes out of a group of 16 rows, with four bytes of every row. A single row need not be arranged, its lines have 4 bytes. The
   result is [outputs, rows]. For an int8 matrix the two bytes of each 16-bit activation are multiplied apart, 256 * high + low, so
   that its sums are exact.

   TDPBF16PS adds up even and odd numbers of a step of 32 apart, then both, then that to the sum: an order that no other level has. */

enum {
    STRIP = 16,      /* outputs, or rows, of a tile */
    TILE_BYTES = 64, /* of a line */
    STRIPS = 2,      /* strips of outputs that are multiplied together */
};

/* What a thread tells the CPU about its tiles before it uses them. */
typedef struct {
    uint8_t palette, first_line, none[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} TileConfig;

/* Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 activations. */
INLINE void configure_tiles(int64_t columns)
{
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.lines[tile] = STRIP;
        config.line_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? TILE_BYTES : 4 * columns);
    }
    _tile_loadconfig(&config);
}

/* In place: line k of a step of 64 bytes becomes four bytes of each row. There is memory for 16 rows. */
static void arrange(Dtype dtype, int64_t rows, int64_t row_bytes, uint8_t *packed)
{
    if (dtype != LAMINA_BF16 && dtype != LAMINA_INT8)
        return;
    for (int64_t step = 0; step < row_bytes; step += TILE_BYTES) {
        vec lines[STRIP];
        for (int64_t row = 0; row < STRIP; row++)
            lines[row] = row < rows ? load(packed + row * row_bytes + step) : zeros();
        transpose(lines);
        for (int64_t row = 0; row < STRIP; row++)
            store(packed + row * row_bytes + step, lines[row]);
    }
}

/* High bytes of 64 numbers, then their low bytes, and so on. */
static float pack_for_tiles_of_int8(const float *x, int64_t size, uint8_t *packed)
{
    float largest = largest_of(x, size);
    vec scale = every_f32(32767 / largest);
    for (int64_t i = 0; i < size; i += TILE_BYTES)
        for (int64_t part = 0; part < TILE_BYTES; part += LANES) {
            vec numbers = i32_of_f32(round_f32(mul_f32(row_part(x, i + part, size), scale)));
            store_bytes(packed + 2 * i + part, shift_right_i32(numbers, 8));
            store_bytes(packed + 2 * i + TILE_BYTES + part, numbers);
        }
    return largest / 32767;
}

static float pack_for_tiles(Dtype dtype, const float *x, int64_t size, uint8_t *packed)
{
    return dtype == LAMINA_INT8 ? pack_for_tiles_of_int8(x, size, packed) : pack(dtype, x, size, packed);
}

/* 16 outputs of a matrix, or fewer at its end. */
typedef struct {
    const uint8_t *weights;
    int64_t row_bytes;
    int64_t outs;
    int64_t to_next; /* bytes to the strip that follows these */
} Strip;

INLINE Strip strip_of(const Matrix *matrix, int64_t out, int64_t outs_to_next)
{
    int64_t row_bytes = rounded_up(matrix->width, LAMINA_STEP) * bytes_of(matrix->dtype);
    return (Strip){(const uint8_t *)matrix->weights.data + out * row_bytes, row_bytes, smaller(STRIP, matrix->outs - out),
                   outs_to_next * row_bytes};
}

/* Rows of activations that are multiplied together: two tiles, or for int8 the high and the low bytes of one. */
typedef struct {
    const uint8_t *first, *second;
    bool two;           /* false: only the first */
    int64_t stride;     /* of lines */
    int64_t step_bytes;
} TileColumns;

INLINE TileColumns columns_of(const int dtype, const Rows *x, int64_t row)
{
    const uint8_t *first = x->data + row * x->row_bytes;
    int64_t stride = x->arranged ? x->row_bytes : 4;
    if (dtype == LAMINA_INT8)
        return (TileColumns){first, first + TILE_BYTES, true, stride, 2 * TILE_BYTES};
    const bool two = row + STRIP < x->rows;
    return (TileColumns){first, two ? first + STRIP * x->row_bytes : first, two, stride, TILE_BYTES};
}

INLINE void add_tiles(const int dtype, const bool two_strips, const bool two_columns)
{
    if (dtype == LAMINA_INT8) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (two_strips) {
            _tile_dpbssd(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        return;
    }
    _tile_dpbf16ps(0, 4, 6);
    if (two_columns)
        _tile_dpbf16ps(1, 4, 7);
    if (two_strips)
        _tile_dpbf16ps(2, 5, 6);
    if (two_strips && two_columns)
        _tile_dpbf16ps(3, 5, 7);
}

/* Copies an incomplete tile of weights, padded with zeros. */
INLINE void copy_tile(const Strip *strip, int64_t step, uint8_t *tile)
{
    memset(tile, 0, STRIP * TILE_BYTES);
    for (int64_t out = 0; out < strip->outs; out++)
        memcpy(tile + out * TILE_BYTES, strip->weights + out * strip->row_bytes + step,
               (size_t)smaller(TILE_BYTES, strip->row_bytes - step));
}

/* The hot loop of AMX: sums [outputs, rows] of one or two strips and columns. Prefetches the strips that follow. */
INLINE void tile_products(const int dtype, const bool two_strips, const bool two_columns, bool fetch, const Strip *strips,
                          const TileColumns *columns)
{
    const int64_t row_bytes = strips[0].row_bytes, stride = columns->stride;
    const bool whole = strips[0].outs == STRIP && (!two_strips || strips[1].outs == STRIP);
    const int64_t whole_bytes = whole ? row_bytes / TILE_BYTES * TILE_BYTES : 0;
    const uint8_t *first = columns->first, *second = columns->second;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int64_t at = 0;
    for (; at < whole_bytes; at += TILE_BYTES, first += columns->step_bytes, second += columns->step_bytes) {
        if (fetch)
            for (int strip = 0; strip < (two_strips ? 2 : 1); strip++)
                UNROLL
                for (int line = 0; line < STRIP; line++)
                    __builtin_prefetch(strips[strip].weights + strips[strip].to_next + at * STRIP + line * TILE_BYTES, 0, FETCHED);
        _tile_loadd(4, strips[0].weights + at, (size_t)row_bytes);
        if (two_strips)
            _tile_loadd(5, strips[1].weights + at, (size_t)row_bytes);
        _tile_loadd(6, first, (size_t)stride);
        if (two_columns)
            _tile_loadd(7, second, (size_t)stride);
        add_tiles(dtype, two_strips, two_columns);
    }
    for (; at < row_bytes; at += TILE_BYTES, first += columns->step_bytes, second += columns->step_bytes) {
        _Alignas(64) uint8_t tile[STRIP * TILE_BYTES];
        copy_tile(&strips[0], at, tile);
        _tile_loadd(4, tile, TILE_BYTES);
        if (two_strips) {
            copy_tile(&strips[1], at, tile);
            _tile_loadd(5, tile, TILE_BYTES);
        }
        _tile_loadd(6, first, (size_t)stride);
        if (two_columns)
            _tile_loadd(7, second, (size_t)stride);
        add_tiles(dtype, two_strips, two_columns);
    }
}

NOINLINE void tile_products_of_bf16(bool two_strips, bool fetch, const Strip *strips, const TileColumns *columns)
{
    if (two_strips && columns->two)
        tile_products(LAMINA_BF16, true, true, fetch, strips, columns);
    else if (two_strips)
        tile_products(LAMINA_BF16, true, false, fetch, strips, columns);
    else if (columns->two)
        tile_products(LAMINA_BF16, false, true, fetch, strips, columns);
    else
        tile_products(LAMINA_BF16, false, false, fetch, strips, columns);
}

NOINLINE void tile_products_of_int8(bool two_strips, bool fetch, const Strip *strips, const TileColumns *columns)
{
    if (two_strips)
        tile_products(LAMINA_INT8, true, true, fetch, strips, columns);
    else
        tile_products(LAMINA_INT8, false, true, fetch, strips, columns);
}

/* Sums [strip, row, output]. */
typedef struct {
    _Alignas(64) float of[STRIPS][2 * STRIP][STRIP];
} TileSums;

/* 256 * high + low: both int32 sums are exact, and are rounded to a float once. */
INLINE vec sum_of_bytes(const void *high, const void *low)
{
    return fma_f32(f32_of_i32(load(high)), every_f32(256.0f), f32_of_i32(load(low)));
}

/* Transposes a tile [outputs, rows], two of them for int8, to [rows, outputs]. */
INLINE void turn_sums(const int dtype, bool arranged, const float *tile, const float *low, float *sums)
{
    vec lines[STRIP];
    for (int line = 0; line < (arranged ? STRIP : 1); line++)
        lines[line] = dtype == LAMINA_INT8 ? sum_of_bytes(tile + line * STRIP, low + line * STRIP) : load(tile + line * STRIP);
    if (arranged)
        transpose(lines);
    for (int line = 0; line < (arranged ? STRIP : 1); line++)
        store(sums + line * STRIP, lines[line]);
}

/* Sums of one or two strips for up to 32 rows from `row` on, up to 16 for int8. */
INLINE void sum_strips(const int dtype, const Strip *strips, bool two_strips, const Rows *x, int64_t row, TileSums *sums)
{
    const TileColumns columns = columns_of(dtype, x, row);
    const size_t line = x->arranged ? TILE_BYTES : 4;
    if (dtype == LAMINA_INT8)
        tile_products_of_int8(two_strips, row == 0, strips, &columns);
    else
        tile_products_of_bf16(two_strips, row == 0, strips, &columns);
    _Alignas(64) float tiles[4][STRIP * STRIP];
    _tile_stored(0, tiles[0], line);
    _tile_stored(1, tiles[1], line);
    _tile_stored(2, tiles[2], line);
    _tile_stored(3, tiles[3], line);
    for (int strip = 0; strip < (two_strips ? 2 : 1); strip++) {
        turn_sums(dtype, x->arranged, tiles[2 * strip], tiles[2 * strip + 1], sums->of[strip][0]);
        if (dtype == LAMINA_BF16 && columns.two)
            turn_sums(dtype, x->arranged, tiles[2 * strip + 1], NULL, sums->of[strip][STRIP]);
    }
}

/* A strip's factors and biases. */
typedef struct {
    vec scales, biases;
} Ends;

INLINE Ends ends_of(const int dtype, const Matrix *matrix, int64_t out)
{
    return (Ends){dtype == LAMINA_INT8 ? row_part(matrix->scales.data, out, matrix->outs) : zeros(),
                  matrix->biases.bytes ? row_part(matrix->biases.data, out, matrix->outs) : zeros()};
}

INLINE vec finished(const int dtype, const float *sums, const Rows *x, int64_t row, const Ends *ends)
{
    if (dtype == LAMINA_BF16)
        return add_f32(load(sums), ends->biases);
    return fma_f32(mul_f32(load(sums), every_f32(x->scales[row * OUTS])), ends->scales, ends->biases);
}

INLINE void multiply_by_tiles(const int dtype, const Matrix *matrix, const Rows *x, int64_t first, int64_t last, bool add, float *y)
{
    const int64_t together = dtype == LAMINA_INT8 ? STRIP : 2 * STRIP;
    configure_tiles(x->arranged ? STRIP : 1);
    for (int64_t out = first; out < last; out += STRIPS * STRIP) {
        const bool two = out + STRIP < last;
        const Strip strips[STRIPS] = {strip_of(matrix, out, STRIPS * STRIP),
                                      two ? strip_of(matrix, out + STRIP, STRIPS * STRIP) : (Strip){0}};
        for (int64_t row = 0; row < x->rows; row += together) {
            TileSums sums;
            sum_strips(dtype, strips, two, x, row, &sums);
            for (int strip = 0; strip < (two ? 2 : 1); strip++) {
                const int64_t of_strip = out + strip * STRIP;
                const Ends ends = ends_of(dtype, matrix, of_strip);
                for (int64_t i = 0; i < smaller(together, x->rows - row); i++) {
                    float *to = y + (row + i) * matrix->outs;
                    vec found = finished(dtype, sums.of[strip][i], x, row + i, &ends);
                    store_row_part(to, of_strip, matrix->outs, add ? add_f32(row_part(to, of_strip, matrix->outs), found) : found);
                }
            }
        }
    }
    _tile_release();
}

INLINE void multiply_gated_by_tiles(const int dtype, const Matrix *gate, const Matrix *up, const Rows *x, int64_t first, int64_t last,
                                    float *y)
{
    const int64_t together = dtype == LAMINA_INT8 ? STRIP : 2 * STRIP;
    configure_tiles(x->arranged ? STRIP : 1);
    for (int64_t out = first; out < last; out += STRIP) {
        const Strip strips[STRIPS] = {strip_of(gate, out, STRIP), strip_of(up, out, STRIP)};
        const Ends of_gate = ends_of(dtype, gate, out), of_up = ends_of(dtype, up, out);
        for (int64_t row = 0; row < x->rows; row += together) {
            TileSums sums;
            sum_strips(dtype, strips, true, x, row, &sums);
            for (int64_t i = 0; i < smaller(together, x->rows - row); i++) {
                vec gates = finished(dtype, sums.of[0][i], x, row + i, &of_gate);
                vec ups = finished(dtype, sums.of[1][i], x, row + i, &of_up);
                store_row_part(y + (row + i) * gate->outs, out, gate->outs, gated(gates, ups));
            }
        }
    }
    _tile_release();
}
