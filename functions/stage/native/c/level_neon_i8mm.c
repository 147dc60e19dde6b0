/* 64-bit ARM CPUs with the instructions for matrices of bytes (most since ARMv8.6). */

#if defined(__aarch64__)

#include "compiler.h"
#include "level.h"

BEGIN_TARGET("arch=armv8.2-a+dotprod+i8mm")

#define WITH_I8MM
#include "vectors_neon.h"

#define LEVEL lamina_neon_i8mm
#define LEVEL_NAME "neon_i8mm"
#include "level.inc.h"

END_TARGET

#endif
