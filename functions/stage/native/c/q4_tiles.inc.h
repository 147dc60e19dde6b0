/* Matrices in four bits by the tiles of AMX, for more than a few rows.

   16 rows of a block of 32 numbers, high parts and low parts, are a tile as they are stored. The weights of a group become a tile:
   16 times each weight, then each weight. One instruction makes the exact products of the block, which are added to the sums as
   vectors add them (`with_block`): the same bits for one row and for many. Weights are unpacked once for all rows. */

enum {
    MANY_ROWS = 5,
    UNPACKED_BLOCKS = 64,
    UNPACKED_BYTES = 1024, /* of a block */
};

static void begin_tiles(void) { configure_tiles(STRIP); }
static void end_tiles(void) { _tile_release(); }

INLINE void unpack_block(const uint8_t *block, uint8_t *tile)
{
    const vec lower = every_i32(0x0F0F0F0F), upper = every_i32((int32_t)0xF0F0F0F0u);
    UNROLL
    for (int part = 0; part < PARTS; part++) {
        vec both = load(block + 64 * part);
        store(tile + 128 * part, and_i32(shift_left_i32(both, 4), upper));
        store(tile + 128 * part + 64, and_i32(both, upper));
        store(tile + 512 + 128 * part, and_i32(both, lower));
        store(tile + 512 + 128 * part + 64, and_i32(shift_right_i32(both, 4), lower));
    }
}

/* Adds blocks [number, number + count) to the sums of 16 rows. */
INLINE void add_blocks(const uint8_t *blocks_of_group, const uint8_t *tiles, int64_t number, int64_t count, const uint8_t *x,
                       int64_t row_bytes, int64_t blocks, float (*sums)[LAMINA_GROUP_OUTS])
{
    vec of_rows[STRIP];
    const float *scales = block_scales(x, blocks) + number;
    const int64_t floats = row_bytes / 4;
    UNROLL
    for (int row = 0; row < STRIP; row++)
        of_rows[row] = load(sums[row]);
    for (int64_t i = 0; i < count; i++) {
        _Alignas(64) int32_t products[STRIP][LANES];
        const uint8_t *block = blocks_of_group + (number + i) * LAMINA_Q4_BYTES;
        _tile_zero(0);
        _tile_loadd(4, x + (number + i) * 64, (size_t)row_bytes);
        _tile_loadd(6, tiles + i * UNPACKED_BYTES, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_stored(0, products, 64);
        UNROLL
        for (int row = 0; row < STRIP; row++)
            of_rows[row] = with_block(of_rows[row], load(products[row]), block, scales[row * floats + i],
                                      scales[row * floats + blocks + i]);
    }
    UNROLL
    for (int row = 0; row < STRIP; row++)
        store(sums[row], of_rows[row]);
}

static void sum_group(const Matrix *matrix, const Rows *x, int64_t first, int64_t rows, int64_t out, GroupSums *sums)
{
    const int64_t blocks = rounded_up(matrix->width, LAMINA_Q4_BLOCK) / LAMINA_Q4_BLOCK;
    const uint8_t *group = group_of(matrix, out);
    _Alignas(64) uint8_t tiles[UNPACKED_BLOCKS * UNPACKED_BYTES];
    if (rows < MANY_ROWS) {
        sum_group_by_vectors(matrix, x, first, rows, out, sums);
        return;
    }
    memset(sums->of, 0, (size_t)(rounded_up(rows, STRIP) * LAMINA_GROUP_OUTS * 4));
    for (int64_t number = 0; number < blocks; number += UNPACKED_BLOCKS) {
        const int64_t count = smaller(UNPACKED_BLOCKS, blocks - number);
        for (int64_t i = 0; i < count; i++)
            unpack_block(group + (number + i) * LAMINA_Q4_BYTES, tiles + i * UNPACKED_BYTES);
        for (int64_t row = 0; row < rows; row += STRIP)
            add_blocks(group, tiles, number, count, x->data + (first + row) * x->row_bytes, x->row_bytes, blocks, sums->of + row);
    }
}
