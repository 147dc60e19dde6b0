/* Prints what the functions of a header of vectors make of the same numbers: a line each, name and 16 lanes in hexadecimal. Names
   with ~ are of functions that may round otherwise.

   VECTORS: the header. TARGET: the CPU's features that it needs. It is linked without a C library, for Linux. */

#include <stdint.h>
#include <string.h>

#include "compiler.h"

#if defined(__aarch64__)
enum { WRITE = 64, EXIT = 93 };

static long system_call(long number, long a, const void *b, long c)
{
    register long x0 __asm__("x0") = a, x2 __asm__("x2") = c, x8 __asm__("x8") = number;
    register const void *x1 __asm__("x1") = b;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x8) : "memory");
    return x0;
}
#define ENTRY
#else
enum { WRITE = 1, EXIT = 60 };

static long system_call(long number, long a, const void *b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
#define ENTRY __attribute__((force_align_arg_pointer))
#endif

__attribute__((no_builtin)) void *memcpy(void *restrict to, const void *restrict from, size_t count)
{
    for (size_t i = 0; i < count; i++)
        ((uint8_t *)to)[i] = ((const uint8_t *)from)[i];
    return to;
}

__attribute__((no_builtin)) void *memset(void *to, int value, size_t count)
{
    for (size_t i = 0; i < count; i++)
        ((uint8_t *)to)[i] = (uint8_t)value;
    return to;
}

#ifdef TARGET
BEGIN_TARGET(TARGET)
#endif
#include VECTORS

static uint32_t state = 1;

static uint32_t next(void)
{
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
}

static void bits(const char *name, vec a)
{
    uint32_t lanes[16];
    char line[256], *end = line;
    store(lanes, a);
    while (*name)
        *end++ = *name++;
    for (int digit = 0; digit < 16 * 8; digit++) {
        if (digit % 8 == 0)
            *end++ = ' ';
        *end++ = "0123456789abcdef"[lanes[digit / 8] >> (28 - digit % 8 * 4) & 15];
    }
    *end++ = '\n';
    system_call(WRITE, 1, line, end - line);
}

/* 16 numbers of [-8, 8), with special ones among them or not. */
static void floats(float *made, int special)
{
    static const float specials[] = {0.0f, -0.0f, 1.5f, 2.5f, -0.5f, 1e-30f, 3.4e38f, -3.4e38f};
    for (int i = 0; i < 16; i++)
        made[i] = special && next() % 4 == 0 ? specials[next() % 8] : (float)(int32_t)next() * 0x1p-28f;
}

ENTRY void _start(void)
{
    for (int round = 0; round < 50; round++) {
        float x[64], y[16], z[16];
        uint8_t any[64], other[64], low[64], nibbles[64], table[16];
        int32_t integers[16];
        int16_t halves[16];
        floats(x, round > 9), floats(y, round > 9), floats(z, 0);
        for (int i = 0; i < 64; i++) {
            any[i] = (uint8_t)next(), other[i] = (uint8_t)next(), low[i] = any[i] & 127, nibbles[i] = any[i] & 15;
            other[i] = other[i] == 128 ? 127 : other[i]; /* -128 is in no packed row */
        }
        for (int i = 0; i < 16; i++) {
            table[i] = (uint8_t)next(), integers[i] = (int32_t)next() >> 8, halves[i] = (int16_t)next();
            halves[i] = (halves[i] & 0x7C00) == 0x7C00 ? 0x3C00 : halves[i];
        }
        const vec a = load(x), b = load(y), c = load(z), i = load(integers), j = load(any), k = load(other);
        bits("add_f32", add_f32(a, b)), bits("sub_f32", sub_f32(a, b)), bits("mul_f32", mul_f32(a, b));
        bits("div_f32", div_f32(c, every_f32(1.7f))), bits("max_f32", max_f32(a, b)), bits("min_f32", min_f32(a, b));
        bits("if_less_f32", if_less_f32(a, b, j, k)), bits("round_f32", add_f32(round_f32(c), zeros()));
        bits("i32_of_f32", i32_of_f32(round_f32(c))), bits("f32_of_i32", f32_of_i32(i)), bits("add_i32", add_i32(i, j));
        bits("max_i32", max_i32(j, k)), bits("and_i32", and_i32(j, k)), bits("if_bits", if_bits(i, j, k));
        bits("shifts", add_i32(shift_left_i32(j, 7), shift_right_i32(k, 9)));
        bits("every", add_i32(every_i32(largest_i32(j)), every_4_bytes(any + 3))), bits("every_4_f32", every_4_f32(x));
        bits("zeros", zeros()), bits("f32_of_f16", f32_of_f16(halves)), bits("i32_of_i8", i32_of_i8(any)), bits("i16_of_i8", i16_of_i8(any));
        bits("i16_of_f32", i16_of_f32(mul_f32(c, every_f32(900)), c)), bits("bf16_of_f32", bf16_of_f32(a, b));
        bits("dot_i16", dot_i16(i, j, k)), bits("dot_u7", dot_u7(i, load(low), k)), bits("looked_up", looked_up(table, load(nibbles)));
        bits("dot_bytes", dot_bytes(i, load(low), k)), bits("whole_q4", whole_q4(dot_q4(zeros(), load(nibbles), j), dot_q4(zeros(), load(nibbles), k)));
        const vec half = every_i32(0x40404040); /* what an offset of 128 adds is added where there is none */
        bits("dot_wide", dot_wide(WIDE_CODES_HAVE_OFFSET ? i : dot_u7(dot_u7(i, half, k), half, k), j, k));
        store_bytes(x + 16, j), store_part(x + 20, b, 1 + round % 12);
        for (int end = 21 + round % 12; end < 32; end++)
            x[end] = 0;
        bits("store_part", load(x + 16)), bits("load_part", load_part(y, 1 + round % 15));
        vec tiles[4][4];
        floats(z, 0);
        bits("~fma_f32", fma_f32(c, load(z), c)), bits("~dot_bf16", dot_bf16(c, bf16_of_f32(c, load(z)), bf16_of_f32(load(z), c)));
        bits("~sum_f32", every_f32(sum_f32(c)));
        for (int part = 0; part < 16; part++)
            tiles[part / 4][part % 4] = mul_f32(c, every_f32((float)part));
        bits("~sum_tile", sum_tile(4, tiles)), bits("~sum_tile_3", sum_tile(3, tiles));
    }
    system_call(EXIT, 0, NULL, 0);
}
#ifdef TARGET
END_TARGET
#endif
