#ifndef LAMINA_FORWARD_H
#define LAMINA_FORWARD_H

#include "native.h"

/* Both take what `border.c` has checked. most_tokens: that any row attends to. */
void run_pass(Pool *pool, const Group *group, const Pass *pass, int64_t most_tokens);
void run_matrix(Pool *pool, const Product *product);

#endif
