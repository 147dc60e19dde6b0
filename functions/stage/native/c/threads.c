/* The pool of threads, and the sharing of work (`threads.h`).

   A pass has seats. Sleeping helpers are woken and take one each. The caller computes meanwhile, and removes the free seats when
   the work is done, so it never waits for a thread that has not started. A forked process, which has no helpers, creates new
   ones. Between passes helpers stay awake for a few microseconds only: three stages may share two cores, and a guest's scheduler
   takes a halted core for one that is away (docs/log.md, "Native layers"). */

#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    NEXT_TURNS = 200,   /* turns of a loop that waits for the next pass, some microseconds: most passes come far later */
    LEAVE_TURNS = 2000, /* turns of a loop that waits for the last helper to leave */
    PHASE_TURNS = 256,  /* turns until a thread that waits for others yields its core: some microseconds */
};

static inline void pause_thread(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

struct Pool {
    pid_t process;
    pthread_mutex_t mutex;
    pthread_cond_t seats_free, all_left;
    pthread_t helpers[LAMINA_MOST_THREADS];
    int64_t num_helpers;
    bool ends;
    _Atomic int64_t seats;
    _Atomic int64_t inside;
    int64_t next_number;
    void (*work)(void *argument, int64_t number);
    void *argument;
};

static void *help(void *argument)
{
    Pool *pool = argument;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        if (!pool->seats && !pool->ends) {
            pthread_mutex_unlock(&pool->mutex);
            for (int turns = 0; turns < NEXT_TURNS && !atomic_load_explicit(&pool->seats, memory_order_relaxed); turns++)
                pause_thread();
            pthread_mutex_lock(&pool->mutex);
        }
        while (!pool->seats && !pool->ends)
            pthread_cond_wait(&pool->seats_free, &pool->mutex);
        if (pool->ends)
            break;
        pool->seats--;
        pool->inside++;
        int64_t number = pool->next_number++;
        pthread_mutex_unlock(&pool->mutex);
        pool->work(pool->argument, number);
        pthread_mutex_lock(&pool->mutex);
        if (!--pool->inside)
            pthread_cond_signal(&pool->all_left);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

/* Creates as many helpers as possible, with signals blocked: they go to the program's own threads. */
static void hire(Pool *pool, int64_t wanted)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->num_helpers < wanted && !pthread_create(&pool->helpers[pool->num_helpers], NULL, help, pool))
        pool->num_helpers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static bool begin(Pool *pool)
{
    *pool = (Pool){.process = getpid()};
    return !pthread_mutex_init(&pool->mutex, NULL) && !pthread_cond_init(&pool->seats_free, NULL) &&
           !pthread_cond_init(&pool->all_left, NULL);
}

void pool_run(Pool *pool, int64_t threads, void (*work)(void *argument, int64_t number), void *argument)
{
    if (threads == 1 || (pool->process != getpid() && !begin(pool))) {
        work(argument, 0);
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->work = work;
    pool->argument = argument;
    pool->next_number = 1;
    pool->seats = threads - 1;
    if (pool->num_helpers < threads - 1)
        hire(pool, threads - 1);
    pthread_cond_broadcast(&pool->seats_free);
    pthread_mutex_unlock(&pool->mutex);
    work(argument, 0);
    pthread_mutex_lock(&pool->mutex);
    pool->seats = 0;
    pthread_mutex_unlock(&pool->mutex);
    for (int turns = 0; turns < LEAVE_TURNS && atomic_load_explicit(&pool->inside, memory_order_acquire); turns++)
        pause_thread();
    pthread_mutex_lock(&pool->mutex);
    while (pool->inside)
        pthread_cond_wait(&pool->all_left, &pool->mutex);
    pthread_mutex_unlock(&pool->mutex);
}

Pool *lamina_new_pool(void)
{
    Pool *pool = malloc(sizeof *pool);
    if (pool && !begin(pool)) {
        free(pool);
        return NULL;
    }
    return pool;
}

void lamina_free_pool(Pool *pool)
{
    if (pool->process != getpid()) {
        free(pool);
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->ends = true;
    pthread_cond_broadcast(&pool->seats_free);
    pthread_mutex_unlock(&pool->mutex);
    for (int64_t number = 0; number < pool->num_helpers; number++)
        pthread_join(pool->helpers[number], NULL);
    pthread_cond_destroy(&pool->all_left);
    pthread_cond_destroy(&pool->seats_free);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}

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
        if (turns < PHASE_TURNS)
            pause_thread();
        else
            sched_yield();
}
