#ifndef LAMINA_POOL_H
#define LAMINA_POOL_H

#include "native.h"

/* Calls work(argument, number) on up to `threads` threads, numbers from 0 on, this one among them with 0. A helper that has not
   come when this thread is done stays out: so work must be what one thread can do alone. */
void pool_run(Pool *pool, int64_t threads, void (*work)(void *argument, int64_t number), void *argument);

#endif
