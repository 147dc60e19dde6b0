/* Matrices in GGUF's block formats, in the layout of storage/models/blocks.py: a group is 16 outputs, one for each lane.

   Activations are integers of 8 bits in blocks of 32 (`pack_for_blocks`), whatever the format. The products of a block with one
   scale are added up as integers, so they are exact, and then as floats from the first block to the last, whatever else is
   multiplied. Codes are multiplied as unsigned bytes: what their offset adds is known from the sum of the activations. */

enum { BLOCK_PARTS = 8 /* of 4 weights */ };

/* A block of a group, unpacked: codes as bytes, and scales and minima of the block or of its two halves. */
typedef struct {
    vec codes[BLOCK_PARTS];
    vec scales[2], minima[2];
} BlockCodes;

/* Bits [shift, shift + bits) of part `part` of a block's codes, from their planes. */
INLINE vec codes_of_part(const uint8_t *planes, const int bits, const int part)
{
    const int each = 8 / bits;
    vec plane = load(planes + 64 * (part / each));
    if (bits == 8)
        return plane;
    return and_i32(shift_right_i32(plane, bits * (part % each)), every_i32(0x01010101 * ((1 << bits) - 1)));
}

/* 2^(exponent - 128), as two factors: it may be less than the least normal number. */
INLINE vec power_of_two(vec exponent)
{
    vec half = shift_right_i32(exponent, 1), rest = shift_right_i32(add_i32(exponent, every_i32(1)), 1);
    return mul_f32(shift_left_i32(add_i32(half, every_i32(64)), 23), shift_left_i32(add_i32(rest, every_i32(62)), 23));
}

/* Scales of a super's rows, whose bytes are at `ends`. */
INLINE vec scales_of(const BlockFormat form, const uint8_t *ends)
{
    return form.scale_bytes == 4   ? load(ends)
           : form.scale_bytes == 2 ? f32_of_f16(ends)
                                   : power_of_two(and_i32(i32_of_i8(ends), every_i32(255)));
}

/* Minima of a super's rows, or what zero points at `ends` add to each weight beyond the format's offset. */
INLINE vec minima_of(const BlockFormat form, vec scale, const uint8_t *ends)
{
    if (!form.zero)
        return form.minimum ? f32_of_f16(ends) : zeros();
    vec zero = f32_of_i32(and_i32(i32_of_i8(ends), every_i32(255)));
    return mul_f32(scale, sub_f32(every_f32(form.offset ? (float)(1 << form.offset) : 0.0f), zero));
}

/* Block `number` of a super. */
INLINE BlockCodes block_codes(const int format, const uint8_t *super, int64_t number)
{
    const BlockFormat form = BLOCK_FORMATS[format];
    const uint8_t *block = super + number * block_bytes(form), *factors = block + 64 * (form.low + form.high);
    const uint8_t *ends = super + form.blocks * block_bytes(form);
    BlockCodes found;
    UNROLL
    for (int part = 0; part < BLOCK_PARTS; part++) {
        vec codes = codes_of_part(block, form.low, part);
        if (form.high)
            codes = add_i32(codes, shift_left_i32(codes_of_part(block + 64 * form.low, form.high, part), form.low));
        found.codes[part] = form.table ? looked_up(form.table, codes) : codes;
    }
    const vec scale = scales_of(form, ends), minimum = minima_of(form, scale, ends + LANES * form.scale_bytes);
    UNROLL
    for (int half = 0; half < 2; half++) {
        found.scales[half] = scale;
        found.minima[half] = minimum;
        if (half < form.factors) {
            vec factor = i32_of_i8(factors + LANES * half), other = i32_of_i8(factors + LANES * (half + 1));
            if (form.minimum && form.factors == 2) {
                other = and_i32(shift_right_i32(factor, 4), every_i32(15));
                factor = and_i32(factor, every_i32(15));
            }
            found.scales[half] = mul_f32(scale, f32_of_i32(factor));
            if (form.minimum)
                found.minima[half] = mul_f32(minimum, f32_of_i32(other));
        }
    }
    return found;
}

/* How the blocks of a format are multiplied. */
typedef struct {
    int halves;    /* with scales of their own: 1 or 2 */
    bool minimum;
    bool wide;     /* codes have 8 bits, not 7 */
    int offset;    /* what codes are too large by is 2^offset; 0: nothing */
} Kind;

INLINE Kind kind_of(const int format)
{
    const BlockFormat form = BLOCK_FORMATS[format];
    return (Kind){form.factors == 2 ? 2 : 1, form.minimum || form.zero, form.offset == 7, form.offset};
}

enum { UNPACKED_AT_ONCE = 16 };

/* The hot loop: adds a block's products with `rows` rows to their sums. Each part is multiplied by all rows in turn, so that no
   product waits for the one before. */
INLINE void add_block(const Kind kind, const int rows, const BlockCodes *block, const uint8_t *x, int64_t row_bytes, vec sums[])
{
    const int parts = BLOCK_PARTS / kind.halves;
    const bool starts_at_zero = !kind.offset || (kind.wide && !WIDE_CODES_HAVE_OFFSET);
    UNROLL
    for (int half = 0; half < kind.halves; half++) {
        const int sum = kind.halves == 1 ? 0 : half + 1;
        vec products[BLOCK_ROWS];
        UNROLL
        for (int row = 0; row < rows; row++) {
            const RowBlock *of_row = (const RowBlock *)(x + row * row_bytes);
            products[row] = starts_at_zero ? zeros() : shift_left_i32(every_i32(of_row->minus_sums[sum]), kind.offset);
        }
        UNROLL
        for (int part = half * parts; part < (half + 1) * parts; part++)
            UNROLL
            for (int row = 0; row < rows; row++) {
                const vec numbers = every_4_bytes(((const RowBlock *)(x + row * row_bytes))->numbers + 4 * part);
                products[row] = kind.wide ? dot_wide(products[row], block->codes[part], numbers)
                                          : dot_u7(products[row], block->codes[part], numbers);
            }
        UNROLL
        for (int row = 0; row < rows; row++) {
            const RowBlock *of_row = (const RowBlock *)(x + row * row_bytes);
            sums[row] = fma_f32(mul_f32(f32_of_i32(products[row]), every_f32(of_row->scale)), block->scales[half], sums[row]);
            if (kind.minimum)
                sums[row] = fma_f32(every_f32(of_row->scaled_sums[sum]), block->minima[half], sums[row]);
        }
    }
}

/* Prefetches what is as far ahead as block `number` of a super is in it. */
INLINE void fetch_block(const int format, const uint8_t *super, int64_t number)
{
    const BlockFormat form = BLOCK_FORMATS[format];
    const int64_t bytes = super_bytes(form) / form.blocks;
    UNROLL
    for (int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(super + AHEAD_BYTES + number * bytes + line, 0, FETCHED);
}

/* A group's sums of one row. */
INLINE vec sum_of_row(const int format, const uint8_t *group, const uint8_t *x, int64_t supers)
{
    const BlockFormat form = BLOCK_FORMATS[format];
    const int64_t bytes = super_bytes(form);
    vec sum = zeros();
    for (int64_t super = 0; super < supers; super++, group += bytes)
        for (int64_t number = 0; number < form.blocks; number++, x += sizeof(RowBlock)) {
            fetch_block(format, group, number);
            const BlockCodes block = block_codes(format, group, number);
            add_block(kind_of(format), 1, &block, x, 0, &sum);
        }
    return sum;
}

/* Unpacks blocks [first, first + count) of a group. */
INLINE void unpack_blocks(const int format, const uint8_t *group, int64_t first, int64_t count, BlockCodes *to)
{
    const BlockFormat form = BLOCK_FORMATS[format];
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *super = group + (first + i) / form.blocks * super_bytes(form);
        fetch_block(format, super, (first + i) % form.blocks);
        to[i] = block_codes(format, super, (first + i) % form.blocks);
    }
}

#define BLOCK_FORMAT_FUNCTIONS(name, number)                                                                     \
    NOINLINE vec sum_of_row_##name(const uint8_t *group, const uint8_t *x, int64_t supers)                        \
    {                                                                                                            \
        return sum_of_row(number, group, x, supers);                                                             \
    }                                                                                                            \
    NOINLINE void unpack_##name(const uint8_t *group, int64_t first, int64_t count, BlockCodes *to)               \
    {                                                                                                            \
        unpack_blocks(number, group, first, count, to);                                                          \
    }
LAMINA_BLOCK_FORMATS(BLOCK_FORMAT_FUNCTIONS)
#undef BLOCK_FORMAT_FUNCTIONS

typedef struct {
    vec (*sum_of_row)(const uint8_t *group, const uint8_t *x, int64_t supers);
    void (*unpack)(const uint8_t *group, int64_t first, int64_t count, BlockCodes *to);
} BlockFunctions;

static const BlockFunctions BLOCK_FUNCTIONS[] = {
#define BLOCK_FORMAT_ROW(name, number) [number] = {sum_of_row_##name, unpack_##name},
    LAMINA_BLOCK_FORMATS(BLOCK_FORMAT_ROW)
#undef BLOCK_FORMAT_ROW
};

INLINE void add_blocks_to_rows(const Kind kind, const int rows, const BlockCodes *blocks, int64_t count, const uint8_t *x,
                               int64_t row_bytes, float (*sums)[LAMINA_GROUP_OUTS])
{
    vec of_rows[BLOCK_ROWS];
    UNROLL
    for (int row = 0; row < rows; row++)
        of_rows[row] = load(sums[row]);
    for (int64_t i = 0; i < count; i++)
        add_block(kind, rows, &blocks[i], x + i * (int64_t)sizeof(RowBlock), row_bytes, of_rows);
    UNROLL
    for (int row = 0; row < rows; row++)
        store(sums[row], of_rows[row]);
}

/* Adds unpacked blocks to the sums of `rows` rows. */
INLINE void add_blocks_of_kind(const Kind kind, int64_t rows, const BlockCodes *blocks, int64_t count, const uint8_t *x,
                               int64_t row_bytes, float (*sums)[LAMINA_GROUP_OUTS])
{
    for (; rows >= BLOCK_ROWS; rows -= BLOCK_ROWS, x += BLOCK_ROWS * row_bytes, sums += BLOCK_ROWS)
        add_blocks_to_rows(kind, BLOCK_ROWS, blocks, count, x, row_bytes, sums);
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * row_bytes, sums += ROWS)
        add_blocks_to_rows(kind, ROWS, blocks, count, x, row_bytes, sums);
    for (; rows > 0; rows--, x += row_bytes, sums++)
        add_blocks_to_rows(kind, 1, blocks, count, x, row_bytes, sums);
}

/* The kinds of all formats, as constants: a shift by a variable takes longer. */
#define BLOCK_KINDS(each)    \
    each(1, true, true, 7)   \
    each(1, false, true, 7)  \
    each(1, true, false, 0)  \
    each(1, false, false, 3) \
    each(1, false, false, 4) \
    each(2, true, false, 0)  \
    each(2, false, false, 2) \
    each(2, false, false, 5)

INLINE bool is_same_kind(Kind a, Kind b)
{
    return a.halves == b.halves && a.minimum == b.minimum && a.wide == b.wide && a.offset == b.offset;
}

NOINLINE void add_unpacked(const Kind kind, int64_t rows, const BlockCodes *blocks, int64_t count, const uint8_t *x,
                           int64_t row_bytes, float (*sums)[LAMINA_GROUP_OUTS])
{
#define ADD_IF_KIND(...)                                                                          \
    if (is_same_kind(kind, (Kind){__VA_ARGS__})) {                                                \
        add_blocks_of_kind((Kind){__VA_ARGS__}, rows, blocks, count, x, row_bytes, sums);         \
        return;                                                                                   \
    }
    BLOCK_KINDS(ADD_IF_KIND)
#undef ADD_IF_KIND
    __builtin_trap(); /* a format whose kind is missing in BLOCK_KINDS */
}

/* Sums of the group that begins with output `out`, for rows [first, first + rows). */
static void sum_blocks(const Matrix *matrix, const Rows *x, int64_t first, int64_t rows, int64_t out, GroupSums *sums)
{
    const uint8_t *group = group_of(matrix, out), *from = x->data + first * x->row_bytes;
    const int format = format_of(matrix, out);
    const int64_t blocks = matrix->width / LAMINA_BLOCK;
    if (rows == 1) {
        store(sums->of[0], BLOCK_FUNCTIONS[format].sum_of_row(group, from, blocks / BLOCK_FORMATS[format].blocks));
        return;
    }
    BlockCodes unpacked[UNPACKED_AT_ONCE];
    memset(sums->of, 0, (size_t)(rows * LAMINA_GROUP_OUTS * 4));
    for (int64_t number = 0; number < blocks; number += UNPACKED_AT_ONCE) {
        const int64_t count = smaller(UNPACKED_AT_ONCE, blocks - number);
        BLOCK_FUNCTIONS[format].unpack(group, number, count, unpacked);
        add_unpacked(kind_of(format), rows, unpacked, count, from + number * (int64_t)sizeof(RowBlock), x->row_bytes, sums->of);
    }
}
