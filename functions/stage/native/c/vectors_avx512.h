/* Vectors of AVX-512 with VNNI: `vec` is 64 bytes, and a function's name says what they hold. */

#include <immintrin.h>

enum { BLOCK_ROWS = 8 /* multiplied by a block together: registers hold their sums and products */ };

typedef __m512i vec;

#define F32(v) _mm512_castsi512_ps(v)
#define BITS(v) _mm512_castps_si512(v)

INLINE vec load(const void *at) { return _mm512_loadu_si512(at); }
INLINE void store(void *at, vec a) { _mm512_storeu_si512(at, a); }
INLINE __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << count) - 1); }
INLINE vec load_part(const float *at, int64_t count) { return BITS(_mm512_maskz_loadu_ps(first_lanes(count), at)); }
INLINE void store_part(float *at, vec a, int64_t count) { _mm512_mask_storeu_ps(at, first_lanes(count), F32(a)); }

INLINE vec zeros(void) { return _mm512_setzero_si512(); }
INLINE vec every_f32(float x) { return BITS(_mm512_set1_ps(x)); }
INLINE vec every_i32(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vec every_4_f32(const float *at) { return BITS(_mm512_broadcast_f32x4(_mm_loadu_ps(at))); }

INLINE vec add_f32(vec a, vec b) { return BITS(_mm512_add_ps(F32(a), F32(b))); }
INLINE vec sub_f32(vec a, vec b) { return BITS(_mm512_sub_ps(F32(a), F32(b))); }
INLINE vec mul_f32(vec a, vec b) { return BITS(_mm512_mul_ps(F32(a), F32(b))); }
INLINE vec div_f32(vec a, vec b) { return BITS(_mm512_div_ps(F32(a), F32(b))); }
INLINE vec fma_f32(vec a, vec b, vec c) { return BITS(_mm512_fmadd_ps(F32(a), F32(b), F32(c))); }
INLINE vec max_f32(vec a, vec b) { return BITS(_mm512_max_ps(F32(a), F32(b))); }
INLINE vec min_f32(vec a, vec b) { return BITS(_mm512_min_ps(F32(a), F32(b))); }
INLINE vec if_less_f32(vec a, vec b, vec yes, vec no)
{
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(F32(a), F32(b), _CMP_LT_OQ), no, yes);
}
INLINE vec round_f32(vec a) { return BITS(_mm512_roundscale_ps(F32(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

INLINE vec i32_of_f32(vec a) { return _mm512_cvtps_epi32(F32(a)); }
INLINE vec f32_of_i32(vec a) { return BITS(_mm512_cvtepi32_ps(a)); }
INLINE vec add_i32(vec a, vec b) { return _mm512_add_epi32(a, b); }
INLINE vec max_i32(vec a, vec b) { return _mm512_max_epi32(a, b); }
INLINE vec and_i32(vec a, vec b) { return _mm512_and_si512(a, b); }
/* Bits of `yes` where the mask has ones, else of `no`. */
INLINE vec if_bits(vec mask, vec yes, vec no) { return _mm512_ternarylogic_epi32(mask, yes, no, 0xCA); }
INLINE vec shift_left_i32(vec a, int by) { return _mm512_slli_epi32(a, (unsigned)by); }
INLINE vec shift_right_i32(vec a, int by) { return _mm512_srli_epi32(a, (unsigned)by); }

INLINE vec i16_of_i8(const void *at) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(at)); }
INLINE vec dot_i16(vec sum, vec a, vec b) { return _mm512_dpwssd_epi32(sum, a, b); }

/* 32 numbers of two vectors, the first one's first. */
INLINE vec i16_of_f32(vec first, vec second)
{
    __m256i low = _mm512_cvtsepi32_epi16(i32_of_f32(first)), high = _mm512_cvtsepi32_epi16(i32_of_f32(second));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

INLINE int32_t largest_i32(vec a) { return _mm512_reduce_max_epi32(a); }
INLINE vec f32_of_f16(const void *at) { return BITS(_mm512_cvtph_ps(_mm256_loadu_si256(at))); }
/* Stores the lowest byte of each lane. */
INLINE void store_bytes(void *at, vec a) { _mm_storeu_si128(at, _mm512_cvtepi32_epi8(a)); }
INLINE vec every_4_bytes(const void *at)
{
    int32_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return every_i32(bytes);
}

/* Adds products of unsigned bytes, a, with signed ones, four to each lane. |a * b| must not exceed 16383: AVX2 adds two in 16 bits. */
INLINE vec dot_bytes(vec sum, vec a, vec b) { return _mm512_dpbusd_epi32(sum, a, b); }

/* Adds products of four bits, a, with signed bytes: at most eight times, then `whole_q4` makes 16 * high + low of 32 bits. */
INLINE vec dot_q4(vec sum, vec a, vec b) { return _mm512_dpbusd_epi32(sum, a, b); }
INLINE vec whole_q4(vec high, vec low) { return add_i32(shift_left_i32(high, 4), low); }

/* Adds products of unsigned bytes, a, with signed bytes. */
enum { WIDE_CODES_HAVE_OFFSET = 1 };
INLINE vec dot_u7(vec sum, vec a, vec b) { return _mm512_dpbusd_epi32(sum, a, b); }
INLINE vec dot_wide(vec sum, vec a, vec b) { return _mm512_dpbusd_epi32(sum, a, b); }
/* The byte of a table of 16 for each byte 0 … 15. */
INLINE vec looked_up(const uint8_t *table, vec a)
{
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), a);
}
INLINE vec i32_of_i8(const void *at) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(at)); }

#ifdef WITH_BF16
/* The byte of a table of 128 for the lower seven bits of each byte. */
INLINE vec looked_up_in_128(const uint8_t *table, vec a) { return _mm512_permutex2var_epi8(load(table), a, load(table + 64)); }
INLINE vec dot_bf16(vec sum, vec a, vec b) { return BITS(_mm512_dpbf16_ps(F32(sum), (__m512bh)a, (__m512bh)b)); }
INLINE vec bf16_of_f32(vec first, vec second) { return (vec)_mm512_cvtne2ps_pbh(F32(second), F32(first)); }
#else
/* The upper half of a float32 is a bf16. */
INLINE vec dot_bf16(vec sum, vec a, vec b)
{
    const vec upper = every_i32((int32_t)0xFFFF0000u);
    sum = fma_f32(shift_left_i32(a, 16), shift_left_i32(b, 16), sum);
    return fma_f32(and_i32(a, upper), and_i32(b, upper), sum);
}

/* Rounds to the nearest, ties to even. Numbers that are not finite stay so. */
INLINE __m256i upper_halves(vec a)
{
    vec even = and_i32(_mm512_srli_epi32(a, 16), every_i32(1));
    vec rounded = add_i32(a, add_i32(even, every_i32(0x7FFF)));
    vec quiet = _mm512_or_si512(a, every_i32(0x00400000));
    __mmask16 unordered = _mm512_cmp_ps_mask(F32(a), F32(a), _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(unordered, rounded, quiet), 16));
}

INLINE vec bf16_of_f32(vec first, vec second)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(upper_halves(first)), upper_halves(second), 1);
}
#endif

INLINE float sum_f32(vec a)
{
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(F32(a)), _mm512_extractf32x8_ps(F32(a), 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

/* Adds up four vectors within lanes of 128 bits: each such lane then holds a part of each sum. */
INLINE __m512 quarters(const vec sums[4])
{
    __m512 a = F32(sums[0]), b = F32(sums[1]), c = F32(sums[2]), d = F32(sums[3]);
    __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}

INLINE __m512 added_lanes(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

/* [row * 4 + out] = the sum of sums[row][out], zeros for the rows beyond `rows`. */
INLINE vec sum_tile(const int rows, vec sums[4][4])
{
    __m512 none = _mm512_setzero_ps(), first = added_lanes(quarters(sums[0]), rows > 1 ? quarters(sums[1]) : none);
    if (rows <= 2)
        return BITS(added_lanes(first, none));
    return BITS(added_lanes(first, added_lanes(quarters(sums[2]), rows > 3 ? quarters(sums[3]) : none)));
}

/* Transposes 16 vectors of 16 lanes: lane i of vector j becomes lane j of vector i. */
INLINE void transpose(vec rows[16])
{
    vec pairs[16], fours[16];
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4)
        UNROLL
        for (int half = 0; half < 2; half++) {
            fours[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + half + 2]);
            fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + half + 2]);
        }
    UNROLL
    for (int i = 0; i < 4; i++) {
        vec even = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88), odd = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xDD);
        vec later_even = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88);
        vec later_odd = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xDD);
        rows[i] = _mm512_shuffle_i32x4(even, later_even, 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(even, later_even, 0xDD);
        rows[i + 4] = _mm512_shuffle_i32x4(odd, later_odd, 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(odd, later_odd, 0xDD);
    }
}

#undef F32
#undef BITS
