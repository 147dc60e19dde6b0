/* Vectors for any CPU: the 64-byte vectors of gcc and clang, which compile to the CPU's instructions. */

#include <string.h>

enum { BLOCK_ROWS = 4 /* multiplied by a block together: registers hold their sums and products */ };

typedef int32_t vec __attribute__((vector_size(64)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));

#define F32(v) ((f32x16)(v))
#define BITS(v) ((vec)(v))

INLINE vec load(const void *at)
{
    vec a;
    memcpy(&a, at, sizeof a);
    return a;
}
INLINE void store(void *at, vec a) { memcpy(at, &a, sizeof a); }
INLINE vec load_part(const float *at, int64_t count)
{
    vec a = {0};
    memcpy(&a, at, (size_t)count * sizeof *at);
    return a;
}
INLINE void store_part(float *at, vec a, int64_t count) { memcpy(at, &a, (size_t)count * sizeof *at); }

INLINE vec zeros(void) { return (vec){0}; }
INLINE vec every_f32(float x) { return BITS(x - (f32x16){0}); }
INLINE vec every_i32(int32_t x) { return x - (vec){0}; }
INLINE vec every_4_f32(const float *at)
{
    float lanes[16];
    for (int i = 0; i < 16; i++)
        lanes[i] = at[i % 4];
    return load(lanes);
}

INLINE vec add_f32(vec a, vec b) { return BITS(F32(a) + F32(b)); }
INLINE vec sub_f32(vec a, vec b) { return BITS(F32(a) - F32(b)); }
INLINE vec mul_f32(vec a, vec b) { return BITS(F32(a) * F32(b)); }
INLINE vec div_f32(vec a, vec b) { return BITS(F32(a) / F32(b)); }
/* Rounds twice: on a CPU without fused multiply-add, a fused one would be a function call. */
INLINE vec fma_f32(vec a, vec b, vec c) { return BITS(F32(a) * F32(b) + F32(c)); }
INLINE vec if_less_f32(vec a, vec b, vec yes, vec no)
{
    vec less = F32(a) < F32(b);
    return (less & yes) | (~less & no);
}
INLINE vec max_f32(vec a, vec b) { return if_less_f32(b, a, a, b); }
INLINE vec min_f32(vec a, vec b) { return if_less_f32(a, b, a, b); }

/* Rounds numbers below 2^22 to integers, ties to even: a float of the added size has no bits for fractions. */
INLINE vec round_f32(vec a)
{
    vec large = every_f32(12582912.0f);
    return sub_f32(add_f32(a, large), large);
}
/* Converts integers; numbers that are not finite or too large become 0. */
INLINE vec i32_of_f32(vec a)
{
    vec fits = (F32(a) > -2147483648.0f) & (F32(a) < 2147483648.0f);
    return __builtin_convertvector(F32(a & fits), vec);
}
INLINE vec f32_of_i32(vec a) { return BITS(__builtin_convertvector(a, f32x16)); }
/* Wraps around, as the CPU's instructions do. */
INLINE vec add_i32(vec a, vec b)
{
    typedef uint32_t u32x16 __attribute__((vector_size(64)));
    return (vec)((u32x16)a + (u32x16)b);
}
INLINE vec max_i32(vec a, vec b)
{
    vec greater = a > b;
    return (greater & a) | (~greater & b);
}
INLINE vec and_i32(vec a, vec b) { return a & b; }
/* Bits of `yes` where the mask has ones, else of `no`. */
INLINE vec if_bits(vec mask, vec yes, vec no) { return (mask & yes) | (~mask & no); }
INLINE vec shift_left_i32(vec a, int by)
{
    typedef uint32_t u32x16 __attribute__((vector_size(64)));
    return (vec)((u32x16)a << by);
}

INLINE vec shift_right_i32(vec a, int by)
{
    typedef uint32_t u32x16 __attribute__((vector_size(64)));
    return (vec)((u32x16)a >> by);
}

INLINE int32_t largest_i32(vec a)
{
    int32_t most = a[0];
    for (int i = 1; i < 16; i++)
        most = a[i] > most ? a[i] : most;
    return most;
}

/* Subnormal numbers are corrected by a subtraction, which is exact. */
INLINE vec f32_of_f16(const void *at)
{
    int32_t lanes[16];
    const uint8_t *bytes = at;
    for (int i = 0; i < 16; i++)
        lanes[i] = bytes[2 * i] | bytes[2 * i + 1] << 8;
    vec half = load(lanes), sign = shift_left_i32(half & 0x8000, 16), exponent = half & 0x7C00;
    vec magnitude = shift_left_i32(half & 0x7FFF, 13), least = every_i32(113 << 23);
    vec normal = magnitude + ((127 - 15) << 23), infinite = normal + ((128 - 16) << 23);
    vec small = sub_f32(magnitude + least, least);
    vec is_small = exponent == 0, is_infinite = exponent == 0x7C00;
    return sign | (is_small & small) | (is_infinite & infinite) | (~is_small & ~is_infinite & normal);
}
/* Stores the lowest byte of each lane. */
INLINE void store_bytes(void *at, vec a)
{
    uint8_t *bytes = at;
    for (int i = 0; i < 16; i++)
        bytes[i] = (uint8_t)a[i];
}
INLINE vec every_4_bytes(const void *at)
{
    int32_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return every_i32(bytes);
}

/* Adds products of unsigned bytes, a, with signed ones, four to each lane. |a * b| must not exceed 16383: AVX2 adds two in 16 bits. */
INLINE vec dot_bytes(vec sum, vec a, vec b)
{
    for (int shift = 0; shift < 32; shift += 8)
        sum += (a >> shift & 255) * (shift_left_i32(b, 24 - shift) >> 24);
    return sum;
}

/* Adds products of four bits, a, with signed bytes: at most eight times, then `whole_q4` makes 16 * high + low of 32 bits. */
INLINE vec dot_q4(vec sum, vec a, vec b)
{
    for (int shift = 0; shift < 32; shift += 8)
        sum += (a >> shift & 15) * (shift_left_i32(b, 24 - shift) >> 24);
    return sum;
}
INLINE vec whole_q4(vec high, vec low) { return high * 16 + low; }

/* Adds products of unsigned bytes, a, with signed bytes. */
enum { WIDE_CODES_HAVE_OFFSET = 1 };
INLINE vec dot_u7(vec sum, vec a, vec b)
{
    for (int shift = 0; shift < 32; shift += 8)
        sum += (a >> shift & 255) * (shift_left_i32(b, 24 - shift) >> 24);
    return sum;
}
INLINE vec dot_wide(vec sum, vec a, vec b) { return dot_u7(sum, a, b); }
/* The byte of a table of 16 for each byte 0 … 15. */
INLINE vec looked_up(const uint8_t *table, vec a)
{
    uint8_t bytes[64];
    store(bytes, a);
    for (int i = 0; i < 64; i++)
        bytes[i] = table[bytes[i]];
    return load(bytes);
}
INLINE vec i32_of_i8(const void *at)
{
    const int8_t *bytes = at;
    int32_t lanes[16];
    for (int i = 0; i < 16; i++)
        lanes[i] = bytes[i];
    return load(lanes);
}

INLINE vec i16_of_i8(const void *at)
{
    typedef int8_t i8x32 __attribute__((vector_size(32)));
    i8x32 bytes;
    memcpy(&bytes, at, sizeof bytes);
    return (vec)__builtin_convertvector(bytes, i16x32);
}
INLINE vec dot_i16(vec sum, vec a, vec b)
{
    vec even = (shift_left_i32(a, 16) >> 16) * (shift_left_i32(b, 16) >> 16);
    return sum + even + (a >> 16) * (b >> 16);
}
INLINE vec i16_of_f32(vec first, vec second)
{
    vec both[2] = {i32_of_f32(round_f32(first)), i32_of_f32(round_f32(second))};
    int16_t numbers[32];
    for (int i = 0; i < 32; i++)
        numbers[i] = (int16_t)both[i / 16][i % 16];
    return load(numbers);
}

/* The upper half of a float32 is a bf16. */
INLINE vec dot_bf16(vec sum, vec a, vec b)
{
    const vec upper = every_i32((int32_t)0xFFFF0000u);
    sum = fma_f32(shift_left_i32(a, 16), shift_left_i32(b, 16), sum);
    return fma_f32(a & upper, b & upper, sum);
}
/* Rounds to the nearest, ties to even. Numbers that are not finite stay so. */
INLINE vec rounded_to_bf16(vec a)
{
    vec ordered = F32(a) == F32(a);
    vec rounded = add_i32(a, ((a >> 16) & 1) + 0x7FFF);
    return (ordered & rounded) | (~ordered & (a | 0x00400000));
}
INLINE vec bf16_of_f32(vec first, vec second)
{
    vec both[2] = {rounded_to_bf16(first), rounded_to_bf16(second)};
    uint16_t numbers[32];
    for (int i = 0; i < 32; i++)
        numbers[i] = (uint16_t)((uint32_t)both[i / 16][i % 16] >> 16);
    return load(numbers);
}

INLINE float sum_f32(vec a)
{
    f32x16 lanes = F32(a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

/* [row * 4 + out] = the sum of sums[row][out], zeros for the rows beyond `rows`. */
INLINE vec sum_tile(const int rows, vec sums[4][4])
{
    f32x16 all = {0};
    for (int i = 0; i < 4 * rows; i++)
        all[i] = sum_f32(sums[i / 4][i % 4]);
    return BITS(all);
}

#undef F32
#undef BITS
