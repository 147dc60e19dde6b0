/* What a thread says of its tiles before it uses them. */

enum {
    STRIP = 16,      /* outputs, or rows, of a tile */
    TILE_BYTES = 64, /* of a line */
    STRIPS = 2,      /* outputs are multiplied by so many tiles at a time */
};

typedef struct {
    uint8_t palette, first_line, none[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} TileConfig;

/* 0 to 3 are sums, 4 and 5 weights, 6 and 7 activations. */
INLINE void configure_tiles(int64_t columns)
{
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.lines[tile] = STRIP;
        config.line_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? TILE_BYTES : 4 * columns);
    }
    _tile_loadconfig(&config);
}
