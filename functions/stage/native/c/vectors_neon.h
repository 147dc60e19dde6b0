/* Vectors of NEON with dot products of bytes: four parts of 16 bytes. WITH_I8MM: dot products of unsigned with signed bytes, too. */

#include <arm_neon.h>

enum { BLOCK_ROWS = 4 /* multiplied by a block together: registers hold their sums and products */ };

typedef struct {
    int32x4_t part[4];
} vec;

#define F32(v) vreinterpretq_f32_s32(v)
#define BITS(v) vreinterpretq_s32_f32(v)
#define U32(v) vreinterpretq_u32_s32(v)
#define I32(v) vreinterpretq_s32_u32(v)
#define BYTES(v) vreinterpretq_s8_s32(v)
#define WORDS(v) vreinterpretq_s16_s32(v)

/* Defines a function whose part `i` is an expression of the parts of its arguments. */
#define BY_PARTS(name, arguments, expression)                                                                 \
    INLINE vec name arguments                                                                                 \
    {                                                                                                         \
        vec made;                                                                                             \
        UNROLL                                                                                                \
        for (int i = 0; i < 4; i++)                                                                           \
            made.part[i] = (expression);                                                                      \
        return made;                                                                                          \
    }

BY_PARTS(load, (const void *at), vld1q_s32((const int32_t *)at + 4 * i))
INLINE void store(void *at, vec a)
{
    UNROLL
    for (int i = 0; i < 4; i++)
        vst1q_s32((int32_t *)at + 4 * i, a.part[i]);
}
#include "vectors_part.h"

BY_PARTS(every_i32, (int32_t x), (vdupq_n_s32(x)))
BY_PARTS(every_f32, (float x), BITS(vdupq_n_f32(x)))
BY_PARTS(every_4_f32, (const float *at), BITS(vld1q_f32(at)))
INLINE vec zeros(void) { return every_i32(0); }

BY_PARTS(add_f32, (vec a, vec b), BITS(vaddq_f32(F32(a.part[i]), F32(b.part[i]))))
BY_PARTS(sub_f32, (vec a, vec b), BITS(vsubq_f32(F32(a.part[i]), F32(b.part[i]))))
BY_PARTS(mul_f32, (vec a, vec b), BITS(vmulq_f32(F32(a.part[i]), F32(b.part[i]))))
BY_PARTS(div_f32, (vec a, vec b), BITS(vdivq_f32(F32(a.part[i]), F32(b.part[i]))))
BY_PARTS(fma_f32, (vec a, vec b, vec c), BITS(vfmaq_f32(F32(c.part[i]), F32(a.part[i]), F32(b.part[i]))))
BY_PARTS(if_less_f32, (vec a, vec b, vec yes, vec no),
         vbslq_s32(vcltq_f32(F32(a.part[i]), F32(b.part[i])), yes.part[i], no.part[i]))
/* The second number if one is not a number, as on other levels. */
INLINE vec max_f32(vec a, vec b) { return if_less_f32(b, a, a, b); }
INLINE vec min_f32(vec a, vec b) { return if_less_f32(a, b, a, b); }
BY_PARTS(round_f32, (vec a), BITS(vrndnq_f32(F32(a.part[i]))))
BY_PARTS(i32_of_f32, (vec a), vcvtnq_s32_f32(F32(a.part[i])))
BY_PARTS(f32_of_i32, (vec a), BITS(vcvtq_f32_s32(a.part[i])))

BY_PARTS(add_i32, (vec a, vec b), vaddq_s32(a.part[i], b.part[i]))
BY_PARTS(max_i32, (vec a, vec b), vmaxq_s32(a.part[i], b.part[i]))
BY_PARTS(and_i32, (vec a, vec b), vandq_s32(a.part[i], b.part[i]))
/* Bits of `yes` where the mask has ones, else of `no`. */
BY_PARTS(if_bits, (vec mask, vec yes, vec no), vbslq_s32(U32(mask.part[i]), yes.part[i], no.part[i]))
BY_PARTS(shift_left_i32, (vec a, int by), vshlq_s32(a.part[i], vdupq_n_s32(by)))
BY_PARTS(shift_right_i32, (vec a, int by), I32(vshlq_u32(U32(a.part[i]), vdupq_n_s32(-by))))

INLINE int32_t largest_i32(vec a)
{
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.part[0], a.part[1]), vmaxq_s32(a.part[2], a.part[3])));
}
BY_PARTS(f32_of_f16, (const void *at), BITS(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)at + 4 * i)))))
/* Stores the lowest byte of each lane. */
INLINE void store_bytes(void *at, vec a)
{
    int16x8_t first = vcombine_s16(vmovn_s32(a.part[0]), vmovn_s32(a.part[1]));
    int16x8_t second = vcombine_s16(vmovn_s32(a.part[2]), vmovn_s32(a.part[3]));
    vst1q_s8(at, vcombine_s8(vmovn_s16(first), vmovn_s16(second)));
}
INLINE vec every_4_bytes(const void *at)
{
    int32_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return every_i32(bytes);
}

/* Adds products of bytes 0 … 127, a, with signed bytes, four to each lane. */
BY_PARTS(dot_u7, (vec sum, vec a, vec b), vdotq_s32(sum.part[i], BYTES(a.part[i]), BYTES(b.part[i])))
/* Adds products of bytes 0 … 255, a, less 128, with signed bytes. */
enum { WIDE_CODES_HAVE_OFFSET = 0 };
BY_PARTS(dot_wide, (vec sum, vec a, vec b),
         vdotq_s32(sum.part[i], veorq_s8(BYTES(a.part[i]), vdupq_n_s8(-128)), BYTES(b.part[i])))
/* Adds products of unsigned bytes, a, with signed ones. */
#ifdef WITH_I8MM
BY_PARTS(dot_bytes, (vec sum, vec a, vec b),
         vusdotq_s32(sum.part[i], vreinterpretq_u8_s32(a.part[i]), BYTES(b.part[i])))
#else
/* What a lacks of 128 comes back as twice 64. */
INLINE vec dot_bytes(vec sum, vec a, vec b)
{
    vec half = every_i32(0x40404040);
    return dot_u7(dot_u7(dot_wide(sum, a, b), half, b), half, b);
}
#endif

/* Adds products of four bits, a, with signed bytes: at most eight times, then `whole_q4` makes 16 * high + low of 32 bits. */
INLINE vec dot_q4(vec sum, vec a, vec b) { return dot_u7(sum, a, b); }
INLINE vec whole_q4(vec high, vec low) { return add_i32(shift_left_i32(high, 4), low); }

/* The byte of a table of 16 for each byte 0 … 15. */
BY_PARTS(looked_up, (const uint8_t *table, vec a),
         vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(table), vreinterpretq_u8_s32(a.part[i]))))

INLINE vec i32_of_i8(const void *at)
{
    int8x16_t bytes = vld1q_s8(at);
    int16x8_t first = vmovl_s8(vget_low_s8(bytes)), second = vmovl_s8(vget_high_s8(bytes));
    return (vec){{vmovl_s16(vget_low_s16(first)), vmovl_s16(vget_high_s16(first)), vmovl_s16(vget_low_s16(second)),
                  vmovl_s16(vget_high_s16(second))}};
}
BY_PARTS(i16_of_i8, (const void *at), vreinterpretq_s32_s16(vmovl_s8(vld1_s8((const int8_t *)at + 8 * i))))
INLINE int32x4_t dot_8_words(int16x8_t a, int16x8_t b)
{
    return vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
}
BY_PARTS(dot_i16, (vec sum, vec a, vec b), vaddq_s32(sum.part[i], dot_8_words(WORDS(a.part[i]), WORDS(b.part[i]))))

/* 32 numbers of two vectors, the first one's first. */
INLINE vec i16_of_f32(vec first, vec second)
{
    const vec both[2] = {i32_of_f32(first), i32_of_f32(second)};
    vec made;
    UNROLL
    for (int i = 0; i < 4; i++) {
        const int32x4_t *pair = &both[i / 2].part[i % 2 * 2];
        made.part[i] = vreinterpretq_s32_s16(vcombine_s16(vqmovn_s32(pair[0]), vqmovn_s32(pair[1])));
    }
    return made;
}

/* The upper half of a float32 is a bf16. */
INLINE vec dot_bf16(vec sum, vec a, vec b)
{
    const vec upper = every_i32((int32_t)0xFFFF0000u);
    sum = fma_f32(shift_left_i32(a, 16), shift_left_i32(b, 16), sum);
    return fma_f32(and_i32(a, upper), and_i32(b, upper), sum);
}

/* Rounds to the nearest, ties to even. Numbers that are not finite stay so. */
INLINE uint16x4_t upper_halves(int32x4_t a)
{
    uint32x4_t bits = U32(a), even = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(even, vdupq_n_u32(0x7FFF)));
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(F32(a), F32(a)), rounded, quiet), 16);
}
INLINE vec bf16_of_f32(vec first, vec second)
{
    const vec both[2] = {first, second};
    vec made;
    UNROLL
    for (int i = 0; i < 4; i++) {
        const int32x4_t *pair = &both[i / 2].part[i % 2 * 2];
        made.part[i] = vreinterpretq_s32_u16(vcombine_u16(upper_halves(pair[0]), upper_halves(pair[1])));
    }
    return made;
}

INLINE float32x4_t joined(vec a)
{
    return vaddq_f32(vaddq_f32(F32(a.part[0]), F32(a.part[1])), vaddq_f32(F32(a.part[2]), F32(a.part[3])));
}
INLINE float sum_f32(vec a) { return vaddvq_f32(joined(a)); }

/* [row * 4 + out] = the sum of sums[row][out], zeros for the rows beyond `rows`. */
INLINE vec sum_tile(const int rows, vec sums[4][4])
{
    vec made = zeros();
    UNROLL
    for (int row = 0; row < rows; row++) {
        const vec *of = sums[row];
        float32x4_t first = vpaddq_f32(joined(of[0]), joined(of[1])), second = vpaddq_f32(joined(of[2]), joined(of[3]));
        made.part[row] = BITS(vpaddq_f32(first, second));
    }
    return made;
}

#undef F32
#undef BITS
#undef U32
#undef I32
#undef BYTES
#undef WORDS
#undef BY_PARTS
