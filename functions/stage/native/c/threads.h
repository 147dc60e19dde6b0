/* The threads of a forward pass: a pool of them, and how they share the work.

   Each phase of a pass is cut into pieces. A thread takes the pieces of its own share first, because it finds in its cache what
   it has read before, and then pieces that other threads have not begun. If a thread loses its core, it delays the others by
   one piece at most; at a barrier all would wait for it. The result of a piece depends on the piece alone, so it does not
   matter which thread takes it. */

#ifndef LAMINA_THREADS_H
#define LAMINA_THREADS_H

#include <stdatomic.h>
#include <stdint.h>

#include "native.h"

/* On a cache line of its own, so that threads do not evict it from each other's caches more than necessary. */
typedef struct {
    _Alignas(LAMINA_LINE_BYTES) _Atomic int64_t count;
} Counter;

typedef struct {
    int64_t number;
    int64_t threads;
    Counter *counters; /* [phases of the pass, threads + 1], zeros: pieces taken of each thread's share, and pieces done by all */
    uint8_t *scratch;  /* of this thread */
} Worker;

/* Calls work(argument, number) on up to `threads` threads, the caller among them with number 0. A helper that has not started
   when the caller is done stays out: one thread must be able to do all the work. */
void pool_run(Pool *pool, int64_t threads, void (*work)(void *argument, int64_t number), void *argument);

/* The number of the next piece, `thing * parts + part`, or -1. A share consists of whole things until threads help each other. */
int64_t take_piece(const Worker *worker, int64_t phase, int64_t things, int64_t parts);

/* Reports how many pieces this thread has done. Returns when all are done and their results are visible. */
void finish_phase(const Worker *worker, int64_t phase, int64_t done, int64_t pieces);

#endif
