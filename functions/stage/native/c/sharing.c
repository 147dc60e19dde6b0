#include "sharing.h"

#include <sched.h>

/* Of waiting for the others, before the core is offered to whoever wants it: some microseconds. */
enum { TURNS_AWAKE = 256 };

static Counter *counter(const Worker *worker, int64_t phase, int64_t which)
{
    return worker->counters + phase * (worker->threads + 1) + which;
}

int64_t take_piece(const Worker *worker, int64_t phase, int64_t things, int64_t parts)
{
    for (int64_t other = 0; other < worker->threads; other++) {
        int64_t owner = (worker->number + other) % worker->threads;
        int64_t begin = things * owner / worker->threads * parts, end = things * (owner + 1) / worker->threads * parts;
        Counter *taken = counter(worker, phase, owner);
        if (atomic_load_explicit(&taken->count, memory_order_relaxed) < end - begin) {
            int64_t piece = begin + atomic_fetch_add_explicit(&taken->count, 1, memory_order_relaxed);
            if (piece < end)
                return piece;
        }
    }
    return -1;
}

void finish_phase(const Worker *worker, int64_t phase, int64_t done, int64_t pieces)
{
    Counter *all = counter(worker, phase, worker->threads);
    atomic_fetch_add_explicit(&all->count, done, memory_order_acq_rel);
    for (int turns = 0; atomic_load_explicit(&all->count, memory_order_acquire) < pieces; turns++)
        if (turns < TURNS_AWAKE)
            pause_thread();
        else
            sched_yield();
}
