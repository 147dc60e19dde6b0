/* Chooses the level of this CPU once, by cpuid or by what the kernel says of it. */

#include <stdatomic.h>

#include "level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(__x86_64__)
static const Level *const LEVELS[] = {&lamina_portable, &lamina_avx2, &lamina_avx512_vnni, &lamina_avx512_bf16,
                                      &lamina_avx512_amx};

/* The operating system saves these registers: bits of XCR0. */
static bool keeps(uint32_t wanted)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & wanted) == wanted;
}

/* Linux allocates the memory in which tiles are saved only on request. Forked processes inherit it. */
static bool may_use_tiles(void)
{
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA);
#else
    return false;
#endif
}

static int64_t find_best(void)
{
    enum { FMA = 1 << 12, F16C = 1 << 29, OSXSAVE = 1 << 27, AVX2 = 1 << 5, BF16 = 1 << 5, VBMI = 1 << 1, YMM = 0x06, ZMM = 0xE6, TILES = 0x60000 };
    const uint32_t avx512 = 1u << 16 /* F */ | 1u << 17 /* DQ */ | 1u << 30 /* BW */ | 1u << 31 /* VL */, vnni = 1u << 11;
    const uint32_t amx = 1u << 22 /* BF16 */ | 1u << 24 /* TILE */ | 1u << 25 /* INT8 */;
    uint32_t a, b, c, d, extended_b, extended_c;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE) || !(c & FMA) || !(c & F16C) || !keeps(YMM))
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &extended_b, &extended_c, &d) || !(extended_b & AVX2))
        return 0;
    if ((extended_b & avx512) != avx512 || !(extended_c & vnni) || !keeps(ZMM))
        return 1;
    uint32_t of_7_d = d;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & BF16) || !(extended_c & VBMI))
        return 2;
    return (of_7_d & amx) == amx && keeps(TILES) && may_use_tiles() ? 4 : 3;
}
#elif defined(__aarch64__)
static const Level *const LEVELS[] = {&lamina_portable, &lamina_neon_dotprod, &lamina_neon_i8mm};

static int64_t find_best(void)
{
#if defined(__linux__)
    if (!(getauxval(AT_HWCAP) & HWCAP_ASIMDDP))
        return 0;
    return getauxval(AT_HWCAP2) & HWCAP2_I8MM ? 2 : 1;
#else
    return 0;
#endif
}
#else
static const Level *const LEVELS[] = {&lamina_portable};

static int64_t find_best(void)
{
    return 0;
}
#endif

enum { NUM_LEVELS = sizeof LEVELS / sizeof *LEVELS };

static _Atomic int64_t chosen = -1;

int64_t lamina_best_level(void)
{
    return find_best();
}

int64_t lamina_level(void)
{
    if (chosen < 0)
        chosen = find_best();
    return chosen;
}

const Level *lamina_chosen_level(void)
{
    return LEVELS[lamina_level()];
}

const char *lamina_level_name(int64_t level)
{
    return level >= 0 && level < NUM_LEVELS ? LEVELS[level]->name : NULL;
}

int lamina_use_level(int64_t level)
{
    if (level < 0 || level > find_best())
        return LAMINA_BAD_SIZE;
    chosen = level;
    return LAMINA_OK;
}
