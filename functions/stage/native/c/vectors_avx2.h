/* Vectors of AVX2: two halves of 32 bytes. */

#include <immintrin.h>

enum { BLOCK_ROWS = 4 /* multiplied by a block together: registers hold their sums and products */ };

typedef struct {
    __m256i low, high;
} vec;

#define F32(v) _mm256_castsi256_ps(v)
#define BITS(v) _mm256_castps_si256(v)

INLINE vec load(const void *at) { return (vec){_mm256_loadu_si256(at), _mm256_loadu_si256((const __m256i *)at + 1)}; }
INLINE void store(void *at, vec a)
{
    _mm256_storeu_si256(at, a.low);
    _mm256_storeu_si256((__m256i *)at + 1, a.high);
}
#include "vectors_part.h"

#define SAME(bits) ((vec){(bits), (bits)})
INLINE vec zeros(void) { return SAME(_mm256_setzero_si256()); }
INLINE vec every_f32(float x) { return SAME(BITS(_mm256_set1_ps(x))); }
INLINE vec every_i32(int32_t x) { return SAME(_mm256_set1_epi32(x)); }
INLINE vec every_4_f32(const float *at) { return SAME(BITS(_mm256_broadcast_ps((const __m128 *)at))); }
#undef SAME

#define BY_HALVES(name, operation) \
    INLINE vec name(vec a, vec b) { return (vec){operation(a.low, b.low), operation(a.high, b.high)}; }
#define F32_BY_HALVES(name, operation)                                                                          \
    INLINE vec name(vec a, vec b)                                                                               \
    {                                                                                                           \
        return (vec){BITS(operation(F32(a.low), F32(b.low))), BITS(operation(F32(a.high), F32(b.high)))};       \
    }
F32_BY_HALVES(add_f32, _mm256_add_ps)
F32_BY_HALVES(sub_f32, _mm256_sub_ps)
F32_BY_HALVES(mul_f32, _mm256_mul_ps)
F32_BY_HALVES(div_f32, _mm256_div_ps)
F32_BY_HALVES(max_f32, _mm256_max_ps)
F32_BY_HALVES(min_f32, _mm256_min_ps)
BY_HALVES(add_i32, _mm256_add_epi32)
BY_HALVES(max_i32, _mm256_max_epi32)
BY_HALVES(and_i32, _mm256_and_si256)

INLINE __m256i chosen_bits(__m256i mask, __m256i yes, __m256i no)
{
    return _mm256_or_si256(_mm256_and_si256(mask, yes), _mm256_andnot_si256(mask, no));
}
/* Bits of `yes` where the mask has ones, else of `no`. */
INLINE vec if_bits(vec mask, vec yes, vec no)
{
    return (vec){chosen_bits(mask.low, yes.low, no.low), chosen_bits(mask.high, yes.high, no.high)};
}

INLINE vec fma_f32(vec a, vec b, vec c)
{
    return (vec){BITS(_mm256_fmadd_ps(F32(a.low), F32(b.low), F32(c.low))),
                 BITS(_mm256_fmadd_ps(F32(a.high), F32(b.high), F32(c.high)))};
}

INLINE __m256i chosen_half(__m256i a, __m256i b, __m256i yes, __m256i no)
{
    return _mm256_blendv_epi8(no, yes, BITS(_mm256_cmp_ps(F32(a), F32(b), _CMP_LT_OQ)));
}
INLINE vec if_less_f32(vec a, vec b, vec yes, vec no)
{
    return (vec){chosen_half(a.low, b.low, yes.low, no.low), chosen_half(a.high, b.high, yes.high, no.high)};
}

#define NEAREST(half) BITS(_mm256_round_ps(F32(half), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
INLINE vec round_f32(vec a) { return (vec){NEAREST(a.low), NEAREST(a.high)}; }
#undef NEAREST
INLINE vec i32_of_f32(vec a) { return (vec){_mm256_cvtps_epi32(F32(a.low)), _mm256_cvtps_epi32(F32(a.high))}; }
INLINE vec f32_of_i32(vec a) { return (vec){BITS(_mm256_cvtepi32_ps(a.low)), BITS(_mm256_cvtepi32_ps(a.high))}; }
INLINE vec shift_left_i32(vec a, int by) { return (vec){_mm256_slli_epi32(a.low, by), _mm256_slli_epi32(a.high, by)}; }

INLINE vec shift_right_i32(vec a, int by) { return (vec){_mm256_srli_epi32(a.low, by), _mm256_srli_epi32(a.high, by)}; }

INLINE int32_t largest_i32(vec a)
{
    __m256i half = _mm256_max_epi32(a.low, a.high);
    __m128i quarter = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0xB1)));
}
INLINE vec f32_of_f16(const void *at)
{
    const __m128i *halves = at;
    return (vec){BITS(_mm256_cvtph_ps(_mm_loadu_si128(halves))), BITS(_mm256_cvtph_ps(_mm_loadu_si128(halves + 1)))};
}
/* Stores the lowest byte of each lane. */
INLINE void store_bytes(void *at, vec a)
{
    const __m256i lowest = _mm256_set1_epi32(255);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.low, lowest), _mm256_and_si256(a.high, lowest));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    _mm_storeu_si128(at, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE vec every_4_bytes(const void *at)
{
    int32_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return every_i32(bytes);
}

/* Adds products of unsigned bytes, a, with signed ones, four to each lane. |a * b| must not exceed 16383: two are added in 16 bits. */
INLINE vec dot_bytes(vec sum, vec a, vec b)
{
    const __m256i ones = _mm256_set1_epi16(1);
    return (vec){_mm256_add_epi32(sum.low, _mm256_madd_epi16(_mm256_maddubs_epi16(a.low, b.low), ones)),
                 _mm256_add_epi32(sum.high, _mm256_madd_epi16(_mm256_maddubs_epi16(a.high, b.high), ones))};
}

/* Adds products of four bits, a, with signed bytes, at most eight times: 16 bits hold the sums (15 * 128 * 2 * 8 = 30720). Then
   `whole_q4` makes 16 * high + low of 32 bits. */
INLINE vec dot_q4(vec sum, vec a, vec b)
{
    return (vec){_mm256_add_epi16(sum.low, _mm256_maddubs_epi16(a.low, b.low)),
                 _mm256_add_epi16(sum.high, _mm256_maddubs_epi16(a.high, b.high))};
}
INLINE __m256i whole_half(__m256i high, __m256i low)
{
    return _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(16)), _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
}
INLINE vec whole_q4(vec high, vec low) { return (vec){whole_half(high.low, low.low), whole_half(high.high, low.high)}; }

/* Adds products of bytes 0 … 127, a, with signed bytes. */
INLINE __m256i dot_u7_half(__m256i sum, __m256i a, __m256i b)
{
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
INLINE vec dot_u7(vec sum, vec a, vec b) { return (vec){dot_u7_half(sum.low, a.low, b.low), dot_u7_half(sum.high, a.high, b.high)}; }
/* Adds products of bytes 0 … 255, a, less 128, with bytes -127 … 127: two products of bytes up to 255 would not fit 16 bits. */
enum { WIDE_CODES_HAVE_OFFSET = 0 };
INLINE __m256i dot_wide_half(__m256i sum, __m256i a, __m256i b)
{
    __m256i less = _mm256_xor_si256(a, _mm256_set1_epi8(-128));
    return dot_u7_half(sum, _mm256_abs_epi8(less), _mm256_sign_epi8(b, less));
}
INLINE vec dot_wide(vec sum, vec a, vec b)
{
    return (vec){dot_wide_half(sum.low, a.low, b.low), dot_wide_half(sum.high, a.high, b.high)};
}
/* The byte of a table of 16 for each byte 0 … 15. */
INLINE vec looked_up(const uint8_t *table, vec a)
{
    __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (vec){_mm256_shuffle_epi8(bytes, a.low), _mm256_shuffle_epi8(bytes, a.high)};
}
INLINE vec i32_of_i8(const void *at)
{
    return (vec){_mm256_cvtepi8_epi32(_mm_loadl_epi64(at)), _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const uint8_t *)at + 8)))};
}

INLINE vec i16_of_i8(const void *at)
{
    const __m128i *bytes = at;
    return (vec){_mm256_cvtepi8_epi16(_mm_loadu_si128(bytes)), _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes + 1))};
}
INLINE vec dot_i16(vec sum, vec a, vec b)
{
    return (vec){_mm256_add_epi32(sum.low, _mm256_madd_epi16(a.low, b.low)),
                 _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.high, b.high))};
}

/* Packing interleaves lanes of 128 bits: this restores their order. */
INLINE __m256i in_order(__m256i packed) { return _mm256_permute4x64_epi64(packed, 0xD8); }
INLINE vec i16_of_f32(vec first, vec second)
{
    vec a = i32_of_f32(first), b = i32_of_f32(second);
    return (vec){in_order(_mm256_packs_epi32(a.low, a.high)), in_order(_mm256_packs_epi32(b.low, b.high))};
}

/* The upper half of a float32 is a bf16. */
INLINE vec dot_bf16(vec sum, vec a, vec b)
{
    const vec upper = every_i32((int32_t)0xFFFF0000u);
    sum = fma_f32(shift_left_i32(a, 16), shift_left_i32(b, 16), sum);
    return fma_f32(and_i32(a, upper), and_i32(b, upper), sum);
}

/* Rounds to the nearest, ties to even. Numbers that are not finite stay so. */
INLINE __m256i upper_halves(__m256i a)
{
    __m256i even = _mm256_and_si256(_mm256_srli_epi32(a, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(a, _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(a, _mm256_set1_epi32(0x00400000));
    __m256i unordered = BITS(_mm256_cmp_ps(F32(a), F32(a), _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, unordered), 16);
}
INLINE vec bf16_of_f32(vec first, vec second)
{
    return (vec){in_order(_mm256_packus_epi32(upper_halves(first.low), upper_halves(first.high))),
                 in_order(_mm256_packus_epi32(upper_halves(second.low), upper_halves(second.high)))};
}

INLINE __m256 joined(vec a) { return _mm256_add_ps(F32(a.low), F32(a.high)); }

/* The sums of four vectors. */
INLINE __m128 sum_4(const vec sums[4])
{
    __m256 ab = _mm256_hadd_ps(joined(sums[0]), joined(sums[1])), cd = _mm256_hadd_ps(joined(sums[2]), joined(sums[3]));
    __m256 all = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

INLINE float sum_f32(vec a)
{
    const vec sums[4] = {a, zeros(), zeros(), zeros()};
    return _mm_cvtss_f32(sum_4(sums));
}

/* [row * 4 + out] = the sum of sums[row][out], zeros for the rows beyond `rows`. */
INLINE vec sum_tile(const int rows, vec sums[4][4])
{
    __m128 row[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
    UNROLL
    for (int r = 0; r < rows; r++)
        row[r] = sum_4(sums[r]);
    return (vec){BITS(_mm256_set_m128(row[1], row[0])), BITS(_mm256_set_m128(row[3], row[2]))};
}

#undef F32
#undef BITS
#undef BY_HALVES
#undef F32_BY_HALVES
