/* Low-rank products of adapters: y += B (A x), for up to LAMINA_TILE_ROWS rows of one adapter together. Each sum's order depends on
   the width, or on the rank, alone. */

enum { LOW_AHEAD_BYTES = 1024 }; /* matrices are read once in a pass, in short pieces: the CPU's own prefetcher comes too late */

/* The two numbers of each lane's pair of bf16, as float32. */
INLINE vec first_of_pair(vec pairs) { return shift_left_i32(pairs, 16); }
INLINE vec second_of_pair(vec pairs) { return and_i32(pairs, every_i32((int32_t)0xFFFF0000)); }

/* low [rows, LANES] = scale * A x for one group of LANES ranks. a: [width, LANES], or in bf16 [width / 2, LANES, 2]. */
INLINE void project_group(const bool pairs, const int rows, const uint8_t *a, const float *const *x, int64_t width, float scale,
                          float *const *low)
{
    vec even[LAMINA_TILE_ROWS], odd[LAMINA_TILE_ROWS];
    UNROLL
    for (int row = 0; row < rows; row++)
        even[row] = odd[row] = zeros();
    for (int64_t i = 0; i + 1 < width; i += 2) {
        const uint8_t *at = a + i * LANES * (pairs ? 2 : 4);
        __builtin_prefetch(at + LOW_AHEAD_BYTES);
        const vec both = load(at);
        const vec first = pairs ? first_of_pair(both) : both;
        const vec second = pairs ? second_of_pair(both) : load(at + LANES * 4);
        UNROLL
        for (int row = 0; row < rows; row++) {
            even[row] = fma_f32(every_f32(x[row][i]), first, even[row]);
            odd[row] = fma_f32(every_f32(x[row][i + 1]), second, odd[row]);
        }
    }
    if (width % 2) {
        const vec last = load(a + (width - 1) * LANES * (pairs ? 2 : 4));
        UNROLL
        for (int row = 0; row < rows; row++)
            even[row] = fma_f32(every_f32(x[row][width - 1]), pairs ? first_of_pair(last) : last, even[row]);
    }
    UNROLL
    for (int row = 0; row < rows; row++)
        store(low[row], mul_f32(add_f32(even[row], odd[row]), every_f32(scale)));
}

/* y [rows, outs] += low B in outputs [first, last), which begin a group. b: for each group [rank, LANES], or in bf16
   [rank / 2, LANES, 2], rounded up. */
INLINE void add_part(const bool pairs, const int rows, const uint8_t *b, int64_t rank, int64_t first, int64_t last,
                     const float *const *low, float *const *y)
{
    for (int64_t out = first; out < last; out += LANES) {
        vec sums[LAMINA_TILE_ROWS];
        UNROLL
        for (int row = 0; row < rows; row++)
            sums[row] = zeros();
        for (int64_t k = 0; k < rank; k += pairs ? 2 : 1, b += LANES * 4) {
            __builtin_prefetch(b + LOW_AHEAD_BYTES);
            const vec numbers = load(b), first_numbers = pairs ? first_of_pair(numbers) : numbers;
            UNROLL
            for (int row = 0; row < rows; row++) {
                sums[row] = fma_f32(every_f32(low[row][k]), first_numbers, sums[row]);
                if (pairs && k + 1 < rank)
                    sums[row] = fma_f32(every_f32(low[row][k + 1]), second_of_pair(numbers), sums[row]);
            }
        }
        UNROLL
        for (int row = 0; row < rows; row++) {
            float *to = y[row] + out;
            store_row_part(to, 0, last - out, add_f32(row_part(to, 0, last - out), sums[row]));
        }
    }
}

#define BY_ROWS(function, ...)                                       \
    switch (rows) {                                                  \
    case 1: function(pairs, 1, __VA_ARGS__); break;                  \
    case 2: function(pairs, 2, __VA_ARGS__); break;                  \
    case 3: function(pairs, 3, __VA_ARGS__); break;                  \
    default: function(pairs, LAMINA_TILE_ROWS, __VA_ARGS__);         \
    }

NOINLINE void project_pairs(int64_t rows, const uint8_t *a, const float *const *x, int64_t width, float scale, float *const *low)
{
    const bool pairs = true;
    BY_ROWS(project_group, a, x, width, scale, low)
}

NOINLINE void project_floats(int64_t rows, const uint8_t *a, const float *const *x, int64_t width, float scale, float *const *low)
{
    const bool pairs = false;
    BY_ROWS(project_group, a, x, width, scale, low)
}

NOINLINE void add_pairs(int64_t rows, const uint8_t *b, int64_t rank, int64_t first, int64_t last,
                        const float *const *low, float *const *y)
{
    const bool pairs = true;
    BY_ROWS(add_part, b, rank, first, last, low, y)
}

NOINLINE void add_floats(int64_t rows, const uint8_t *b, int64_t rank, int64_t first, int64_t last,
                         const float *const *low, float *const *y)
{
    const bool pairs = false;
    BY_ROWS(add_part, b, rank, first, last, low, y)
}
#undef BY_ROWS

static void project(const LowRank *by, int64_t width, int64_t rows, const float *const *x, float *const *low)
{
    const uint8_t *a = by->a.data;
    const int64_t group_bytes = low_rank_group_bytes(by->dtype, width);
    float *at[LAMINA_TILE_ROWS];
    int64_t group = 0;
    for (int part = 0; part < LAMINA_LOW_PARTS; part++)
        for (int64_t end = group + low_rank_groups(by->ranks[part]); group < end; group++) {
            for (int64_t row = 0; row < rows; row++)
                at[row] = low[row] + group * LANES;
            if (by->dtype == LAMINA_BF16)
                project_pairs(rows, a + group * group_bytes, x, width, (float)by->scales[part], at);
            else
                project_floats(rows, a + group * group_bytes, x, width, (float)by->scales[part], at);
        }
}

static void add_low_rank(const LowRank *by, int64_t first, int64_t last, int64_t rows, const float *const *low, float *const *y)
{
    const uint8_t *b = by->b.data;
    const float *from[LAMINA_TILE_ROWS];
    int64_t group = 0, begin = 0;
    for (int part = 0; part < LAMINA_LOW_PARTS; begin = by->ends[part++]) {
        const int64_t rank = by->ranks[part], first_group = begin / LANES * LANES, end = rounded_up(by->ends[part], LANES);
        const int64_t low_end = larger(first, first_group), high_end = smaller(last, end);
        for (int64_t row = 0; row < rows; row++)
            from[row] = low[row] + group * LANES;
        if (rank && low_end < high_end) {
            const uint8_t *at = b + low_rank_part_bytes(by->dtype, rank, first_group, low_end);
            if (by->dtype == LAMINA_BF16)
                add_pairs(rows, at, rank, low_end, high_end, from, y);
            else
                add_floats(rows, at, rank, low_end, high_end, from, y);
        }
        b += low_rank_part_bytes(by->dtype, rank, begin, by->ends[part]);
        group += low_rank_groups(rank);
    }
}
