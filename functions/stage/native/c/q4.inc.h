/* Matrices in four bits, in the layout of storage/models/q4.py: a group is 16 outputs, one for each lane.

   Activations are integers of 12 bits in blocks (`pack_for_q4`), so that the product of a block of 32 weights is exact. Blocks are
   added up from first to last, whatever else is multiplied. */

enum { PARTS = 4 };

/* The scales of a packed row's blocks. Their sums follow. */
INLINE const float *block_scales(const uint8_t *packed, int64_t blocks)
{
    return (const float *)(packed + blocks * LAMINA_Q4_BLOCK * 2);
}

/* Adds a block to a group's sums. products: integers [LANES]; scale, sum_of_row: of the row's block. */
INLINE vec with_block(vec sum, vec products, const uint8_t *block, float scale, float sum_of_row)
{
    sum = fma_f32(mul_f32(f32_of_i32(products), every_f32(scale)), f32_of_f16(block + LAMINA_Q4_ENDS), sum);
    return fma_f32(every_f32(sum_of_row), f32_of_f16(block + LAMINA_Q4_ENDS + 2 * LANES), sum);
}

/* The hot loop of q4: sums [rows] of a group's outputs. */
INLINE void q4_tile(const int rows, const uint8_t *block, const uint8_t *x, int64_t row_bytes, int64_t blocks, vec sums[ROWS])
{
    const vec lower = every_i32(0x0F0F0F0F);
    UNROLL
    for (int row = 0; row < rows; row++)
        sums[row] = zeros();
    for (int64_t number = 0; number < blocks; number++, block += LAMINA_Q4_BYTES) {
        const uint8_t *numbers = x + number * 2 * LAMINA_Q4_BLOCK;
        vec high[ROWS], low[ROWS];
        UNROLL
        for (int row = 0; row < rows; row++)
            high[row] = low[row] = zeros();
        UNROLL
        for (int64_t line = 0; line < LAMINA_Q4_BYTES; line += 64)
            __builtin_prefetch(block + AHEAD_BYTES + line, 0, FETCHED);
        UNROLL
        for (int part = 0; part < PARTS; part++) {
            vec both = load(block + 64 * part), first = and_i32(both, lower), second = and_i32(shift_right_i32(both, 4), lower);
            UNROLL
            for (int row = 0; row < rows; row++) {
                const uint8_t *at = numbers + row * row_bytes + 8 * part;
                high[row] = dot_q4(dot_q4(high[row], first, every_4_bytes(at)), second, every_4_bytes(at + 4));
                low[row] = dot_q4(dot_q4(low[row], first, every_4_bytes(at + 32)), second, every_4_bytes(at + 36));
            }
        }
        UNROLL
        for (int row = 0; row < rows; row++) {
            const float *scales = block_scales(x + row * row_bytes, blocks);
            sums[row] = with_block(sums[row], whole_q4(high[row], low[row]), block, scales[number], scales[blocks + number]);
        }
    }
}

NOINLINE void q4_tile_of(int64_t rows, const uint8_t *block, const uint8_t *x, int64_t row_bytes, int64_t blocks, vec sums[ROWS])
{
    switch (rows) {
    case 1: q4_tile(1, block, x, row_bytes, blocks, sums); break;
    case 2: q4_tile(2, block, x, row_bytes, blocks, sums); break;
    case 3: q4_tile(3, block, x, row_bytes, blocks, sums); break;
    default: q4_tile(4, block, x, row_bytes, blocks, sums); break;
    }
}

enum { Q4_ROWS = 128 };

/* Sums [row, output] of a group. */
typedef struct {
    _Alignas(64) float of[Q4_ROWS][LAMINA_GROUP_OUTS];
} GroupSums;

INLINE const uint8_t *group_of(const Matrix *matrix, int64_t out)
{
    return (const uint8_t *)matrix->weights.data + weight_bytes(matrix, out);
}

static void sum_group_by_vectors(const Matrix *matrix, const Rows *x, int64_t first, int64_t rows, int64_t out, GroupSums *sums)
{
    const int64_t blocks = rounded_up(matrix->width, LAMINA_Q4_BLOCK) / LAMINA_Q4_BLOCK;
    for (int64_t row = 0; row < rows; row += ROWS) {
        vec of_rows[ROWS];
        q4_tile_of(smaller(ROWS, rows - row), group_of(matrix, out), x->data + (first + row) * x->row_bytes, x->row_bytes, blocks,
                   of_rows);
        for (int64_t i = 0; i < smaller(ROWS, rows - row); i++)
            store(sums->of[row + i], of_rows[i]);
    }
}

#ifdef WITH_TILES
#include "q4_tiles.inc.h"
#else
static void begin_tiles(void) {}
static void end_tiles(void) {}
static void sum_group(const Matrix *matrix, const Rows *x, int64_t first, int64_t rows, int64_t out, GroupSums *sums)
{
    sum_group_by_vectors(matrix, x, first, rows, out, sums);
}
#endif
