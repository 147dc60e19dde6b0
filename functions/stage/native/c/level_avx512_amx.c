/* CPUs with AVX-512 with VNNI, BF16 and VBMI, and AMX. */

#if defined(__x86_64__)

#include "compiler.h"
#include "level.h"

BEGIN_TARGET("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx2,fma")

#define WITH_BF16
#define WITH_TILES
#include "vectors_avx512.h"

#define LEVEL lamina_avx512_amx
#define LEVEL_NAME "avx512_amx"
#include "level.inc.h"

END_TARGET

#endif
