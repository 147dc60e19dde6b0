/* CPUs with AVX2. */

#if defined(__x86_64__)

#include "compiler.h"
#include "level.h"

BEGIN_TARGET("avx2,fma,f16c")

#include "vectors_avx2.h"

#define LEVEL lamina_avx2
#define LEVEL_NAME "avx2"
#include "level.inc.h"

END_TARGET

#endif
