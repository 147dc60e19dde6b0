/* How the threads of a pass share its work: each phase is cut into pieces, and whoever is free takes the next.

   A thread takes the pieces of its own share first, so that it finds in its cache what it has read before, and then those that
   others have not come to. A thread that its core was taken from holds up nobody but for the piece in its hands; at a barrier,
   all would wait for it. What a piece computes depends on nothing but the piece, so that it does not matter who takes it. */

#ifndef LAMINA_SHARING_H
#define LAMINA_SHARING_H

#include <stdatomic.h>
#include <stdint.h>

#include "native.h"

/* In a line of its own, so that threads do not take it from each other's caches more than they must. */
typedef struct {
    _Alignas(LAMINA_LINE_BYTES) _Atomic int64_t count;
} Counter;

typedef struct {
    int64_t number;
    int64_t threads;
    Counter *counters; /* [phases of the pass, threads + 1], zeros: pieces taken of each one's share, and pieces done by all */
    uint8_t *scratch;  /* this thread's own */
} Worker;

/* The number of the next piece, `thing * parts + part`, or -1. Shares are of whole things, as far as nobody is behind. */
int64_t take_piece(const Worker *worker, int64_t phase, int64_t things, int64_t parts);

/* This thread has done so many pieces and found no more; returns when all are done, and their results are to be seen. */
void finish_phase(const Worker *worker, int64_t phase, int64_t done, int64_t pieces);

static inline void pause_thread(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
