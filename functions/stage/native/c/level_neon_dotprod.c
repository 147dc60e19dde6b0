/* 64-bit ARM CPUs with dot products of bytes (most since ARMv8.2). */

#if defined(__aarch64__)

#include "compiler.h"
#include "level.h"

BEGIN_TARGET("arch=armv8.2-a+dotprod")

#include "vectors_neon.h"

#define LEVEL lamina_neon_dotprod
#define LEVEL_NAME "neon_dotprod"
#include "level.inc.h"

END_TARGET

#endif
