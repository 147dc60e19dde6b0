/* CPUs with AVX-512 with VNNI. */

#if defined(__x86_64__)

#include "compiler.h"
#include "level.h"

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")

#include "vectors_avx512.h"

#define LEVEL lamina_avx512_vnni
#define LEVEL_NAME "avx512_vnni"
#include "level.inc.h"

END_TARGET

#endif
