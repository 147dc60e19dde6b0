/* Matrices in blocks of float8 (E4M3), in the layout of storage/models/blocks.py: a group is 16 outputs, one for each lane.

   Weights become bf16, exactly, and activations are bf16 (`pack_for_float_blocks`). Each block is summed up in float32, multiplied
   by its scale, and added to the sums from the first block to the last, whatever else is multiplied. */

/* The bits of a bf16 for an E4M3 byte: those of the upper byte without the sign, and of the lower byte. If the exponent is not 0,
   they are those of the byte, shifted, and the exponent plus 120. Subnormal numbers, m/8 * 2^-6, are normal in bf16. */
#ifdef WITH_BF16
#define EVERY(n, m) n, n, n, n, n, n, n, n, m, m, m, m, m, m, m, m
static const _Alignas(64) uint8_t E4M3_UPPER[128] = {
    0,  59, 59, 59, 60, 60, 60, 60, EVERY(60, 61), EVERY(61, 62), EVERY(62, 63), EVERY(63, 64), EVERY(64, 65), EVERY(65, 66), EVERY(66, 67),
    67, 67, 67, 67, 67, 67, 67, 67};
#undef EVERY
#define EVERY 0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240
static const _Alignas(64) uint8_t E4M3_LOWER[128] = {
    0, 0, 128, 192, 0, 32, 64, 96, 128, 144, 160, 176, 192, 208, 224, 240, EVERY, EVERY, EVERY, EVERY, EVERY, EVERY, EVERY};
#undef EVERY

INLINE void bytes_of_e4m3(vec codes, vec *upper, vec *lower)
{
    *upper = looked_up_in_128(E4M3_UPPER, codes);
    *lower = looked_up_in_128(E4M3_LOWER, codes);
}
#else
/* By the three upper bits of the exponent, and if these are 0, by the four bits below. */
static const uint8_t E4M3_UPPER[16] = {0, 61, 62, 63, 64, 65, 66, 67, 0, 61, 62, 63, 64, 65, 66, 67};
static const uint8_t E4M3_IS_LOW[16] = {255, 0, 0, 0, 0, 0, 0, 0, 255};
static const uint8_t LOW_UPPER[16] = {0, 59, 59, 59, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60};
static const uint8_t LOW_LOWER[16] = {0, 0, 128, 192, 0, 32, 64, 96, 128, 144, 160, 176, 192, 208, 224, 240};

INLINE void bytes_of_e4m3(vec codes, vec *upper, vec *lower)
{
    const vec halves = every_i32(0x0F0F0F0F);
    vec exponent = and_i32(shift_right_i32(codes, 4), halves), rest = and_i32(codes, halves);
    vec low = looked_up(E4M3_IS_LOW, exponent);
    *upper = if_bits(low, looked_up(LOW_UPPER, rest), looked_up(E4M3_UPPER, exponent));
    *lower = if_bits(low, looked_up(LOW_LOWER, rest), shift_left_i32(rest, 4));
}
#endif

/* Of four weights of each lane, the pairs 0, 2 and 1, 3 as bf16. */
INLINE void pairs_of_e4m3(vec codes, vec *first, vec *second)
{
    const vec even = every_i32(0x00FF00FF);
    vec upper, lower;
    bytes_of_e4m3(codes, &upper, &lower);
    upper = if_bits(every_i32(0x7F7F7F7F), upper, codes); /* the sign */
    *first = if_bits(even, lower, shift_left_i32(upper, 8));
    *second = if_bits(even, shift_right_i32(lower, 8), upper);
}

/* A block of a group, unpacked. */
typedef struct {
    vec pairs[2 * BLOCK_PARTS];
    vec scale;
} FloatBlock;

INLINE FloatBlock float_block(const int format, const uint8_t *super, int64_t number)
{
    const BlockFormat form = BLOCK_FORMATS[format];
    const uint8_t *block = super + number * block_bytes(form);
    FloatBlock found = {.scale = scales_of(form, super + form.blocks * block_bytes(form))};
    UNROLL
    for (int part = 0; part < BLOCK_PARTS; part++)
        pairs_of_e4m3(load(block + 64 * part), &found.pairs[2 * part], &found.pairs[2 * part + 1]);
    return found;
}

enum { FLOAT_BLOCK_BYTES = 2 * LAMINA_BLOCK /* of a row of activations */ };

/* The hot loop: adds a block's products with `rows` rows to their sums. */
INLINE void add_float_block(const int rows, const FloatBlock *block, const uint8_t *x, int64_t row_bytes, vec sums[])
{
    UNROLL
    for (int row = 0; row < rows; row++) {
        const uint8_t *pairs = x + row * row_bytes;
        vec even = zeros(), odd = zeros();
        UNROLL
        for (int pair = 0; pair < 2 * BLOCK_PARTS; pair += 2) {
            even = dot_bf16(even, block->pairs[pair], every_4_bytes(pairs + 4 * pair));
            odd = dot_bf16(odd, block->pairs[pair + 1], every_4_bytes(pairs + 4 * pair + 4));
        }
        sums[row] = fma_f32(add_f32(even, odd), block->scale, sums[row]);
    }
}

/* A group's sums of one row. */
INLINE vec sum_of_float_row(const int format, const uint8_t *group, const uint8_t *x, int64_t supers)
{
    const BlockFormat form = BLOCK_FORMATS[format];
    vec sum = zeros();
    for (int64_t super = 0; super < supers; super++, group += super_bytes(form))
        for (int64_t number = 0; number < form.blocks; number++, x += FLOAT_BLOCK_BYTES) {
            fetch_block(format, group, number);
            const FloatBlock block = float_block(format, group, number);
            add_float_block(1, &block, x, 0, &sum);
        }
    return sum;
}

/* Unpacks blocks [first, first + count) of a group. */
INLINE void unpack_float_blocks(const int format, const uint8_t *group, int64_t first, int64_t count, FloatBlock *to)
{
    const BlockFormat form = BLOCK_FORMATS[format];
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *super = group + (first + i) / form.blocks * super_bytes(form);
        fetch_block(format, super, (first + i) % form.blocks);
        to[i] = float_block(format, super, (first + i) % form.blocks);
    }
}

#define FLOAT_FORMAT_FUNCTIONS(name, number)                                                                     \
    NOINLINE vec sum_of_row_##name(const uint8_t *group, const uint8_t *x, int64_t supers)                        \
    {                                                                                                            \
        return sum_of_float_row(number, group, x, supers);                                                       \
    }                                                                                                            \
    NOINLINE void unpack_##name(const uint8_t *group, int64_t first, int64_t count, FloatBlock *to)               \
    {                                                                                                            \
        unpack_float_blocks(number, group, first, count, to);                                                    \
    }
LAMINA_FLOAT_BLOCK_FORMATS(FLOAT_FORMAT_FUNCTIONS)
#undef FLOAT_FORMAT_FUNCTIONS

typedef struct {
    vec (*sum_of_row)(const uint8_t *group, const uint8_t *x, int64_t supers);
    void (*unpack)(const uint8_t *group, int64_t first, int64_t count, FloatBlock *to);
} FloatFunctions;

static const FloatFunctions FLOAT_FUNCTIONS[] = {
#define FLOAT_FORMAT_ROW(name, number) [number] = {sum_of_row_##name, unpack_##name},
    LAMINA_FLOAT_BLOCK_FORMATS(FLOAT_FORMAT_ROW)
#undef FLOAT_FORMAT_ROW
};

INLINE void add_float_blocks(const int rows, const FloatBlock *blocks, int64_t count, const uint8_t *x, int64_t row_bytes,
                             float (*sums)[LAMINA_GROUP_OUTS])
{
    vec of_rows[BLOCK_ROWS];
    UNROLL
    for (int row = 0; row < rows; row++)
        of_rows[row] = load(sums[row]);
    for (int64_t i = 0; i < count; i++)
        add_float_block(rows, &blocks[i], x + i * FLOAT_BLOCK_BYTES, row_bytes, of_rows);
    UNROLL
    for (int row = 0; row < rows; row++)
        store(sums[row], of_rows[row]);
}

/* Adds unpacked blocks to the sums of `rows` rows. */
NOINLINE void add_unpacked_floats(int64_t rows, const FloatBlock *blocks, int64_t count, const uint8_t *x, int64_t row_bytes,
                                  float (*sums)[LAMINA_GROUP_OUTS])
{
    for (; rows >= BLOCK_ROWS; rows -= BLOCK_ROWS, x += BLOCK_ROWS * row_bytes, sums += BLOCK_ROWS)
        add_float_blocks(BLOCK_ROWS, blocks, count, x, row_bytes, sums);
    for (; rows > 0; rows--, x += row_bytes, sums++)
        add_float_blocks(1, blocks, count, x, row_bytes, sums);
}

/* Sums of the group that begins with output `out`, for rows [first, first + rows). */
static void sum_float_blocks(const Matrix *matrix, const Rows *x, int64_t first, int64_t rows, int64_t out, GroupSums *sums)
{
    const uint8_t *group = group_of(matrix, out), *from = x->data + first * x->row_bytes;
    const int format = format_of(matrix, out);
    const int64_t blocks = matrix->width / LAMINA_BLOCK;
    if (rows == 1) {
        store(sums->of[0], FLOAT_FUNCTIONS[format].sum_of_row(group, from, blocks / BLOCK_FORMATS[format].blocks));
        return;
    }
    FloatBlock unpacked[UNPACKED_AT_ONCE];
    memset(sums->of, 0, (size_t)(rows * LAMINA_GROUP_OUTS * 4));
    for (int64_t number = 0; number < blocks; number += UNPACKED_AT_ONCE) {
        const int64_t count = smaller(UNPACKED_AT_ONCE, blocks - number);
        FLOAT_FUNCTIONS[format].unpack(group, number, count, unpacked);
        add_unpacked_floats(rows, unpacked, count, from + number * FLOAT_BLOCK_BYTES, x->row_bytes, sums->of);
    }
}
