/* Any CPU. */

#include "compiler.h"
#include "level.h"
#include "vectors_portable.h"

#define LEVEL lamina_portable
#define LEVEL_NAME "portable"
#include "level.inc.h"
