/* Products with columns of keys and values in bf16 by the tiles of AMX. A tile is 16 columns of 16 pairs, as the arena stores them.

   Steps of 16 pairs begin at the beginning of the sequence, and a shorter last step acts as if padded with zeros. So one query gets
   the same bits as eight, and in any chunks. */

enum { STEP_PAIRS = 16 };

/* Tiles 0 to 3 are results [rows, 16], 4 rows and 6 columns of a whole step, 5 and 7 those of the last step. */
INLINE void configure_columns(int64_t rows, int64_t last_pairs)
{
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        const int64_t pairs = tile == 5 || tile == 7 ? last_pairs : STEP_PAIRS;
        config.lines[tile] = (uint8_t)(tile < 6 ? rows : pairs);
        config.line_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? 4 * pairs : TILE_BYTES);
        if (!pairs)
            config.lines[tile] = config.line_bytes[tile] = 0;
    }
    _tile_loadconfig(&config);
}

/* out [rows, together, LANES] for one to four parts. */
INLINE void tiles_of_columns(const int together, const Columns *columns, const uint8_t *x, int64_t row_bytes, float *out,
                             int64_t out_stride)
{
    const int64_t whole = columns->pairs / STEP_PAIRS, part_bytes = columns->part_bytes;
    const int64_t page_steps = larger(1, columns->page_pairs / STEP_PAIRS);
    const size_t stride = (size_t)columns->pair_bytes, line = (size_t)out_stride * 4;
    const uint8_t *const *page = columns->pages;
    const uint8_t *at = NULL;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#define ADD_COLUMNS(tile, rows_tile, columns_tile)                        \
    if (together > tile) {                                                \
        _tile_loadd(columns_tile, at + tile * part_bytes, stride);        \
        _tile_dpbf16ps(tile, rows_tile, columns_tile);                    \
    }
#define ADD_ALL(rows_tile, columns_tile)            \
    _tile_loadd(rows_tile, x, (size_t)row_bytes);   \
    ADD_COLUMNS(0, rows_tile, columns_tile)         \
    ADD_COLUMNS(1, rows_tile, columns_tile)         \
    ADD_COLUMNS(2, rows_tile, columns_tile)         \
    ADD_COLUMNS(3, rows_tile, columns_tile)
    for (int64_t step = 0; step < whole; step++, x += TILE_BYTES) {
        at = step % page_steps ? at + STEP_PAIRS * columns->pair_bytes : *page++ + columns->first_part * part_bytes;
        ADD_ALL(4, 6)
    }
    if (columns->pairs % STEP_PAIRS) {
        at = whole % page_steps ? at + STEP_PAIRS * columns->pair_bytes : *page + columns->first_part * part_bytes;
        ADD_ALL(5, 7)
    }
#undef ADD_COLUMNS
#undef ADD_ALL
    _tile_stored(0, out, line);
    if (together > 1)
        _tile_stored(1, out + LANES, line);
    if (together > 2)
        _tile_stored(2, out + 2 * LANES, line);
    if (together > 3)
        _tile_stored(3, out + 3 * LANES, line);
}

/* Call configure_columns first. */
static void multiply_columns_by_tiles(int64_t parts, const Columns *columns, const uint8_t *x, int64_t row_bytes, float *out,
                                      int64_t out_stride)
{
    Columns those = *columns;
    for (int64_t part = 0; part < parts; part += 4) {
        float *to = out + part * LANES;
        those.first_part = part;
        switch (parts - part) {
        case 1: tiles_of_columns(1, &those, x, row_bytes, to, out_stride); break;
        case 2: tiles_of_columns(2, &those, x, row_bytes, to, out_stride); break;
        case 3: tiles_of_columns(3, &those, x, row_bytes, to, out_stride); break;
        default: tiles_of_columns(4, &those, x, row_bytes, to, out_stride); break;
        }
    }
}
