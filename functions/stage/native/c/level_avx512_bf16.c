/* CPUs with AVX-512 with VNNI, BF16 and VBMI. */

#if defined(__x86_64__)

#include "compiler.h"
#include "level.h"

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx2,fma")

#define WITH_BF16
#include "vectors_avx512.h"

#define LEVEL lamina_avx512_bf16
#define LEVEL_NAME "avx512_bf16"
#include "level.inc.h"

END_TARGET

#endif
