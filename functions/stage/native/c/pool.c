/* Threads that help with a pass.

   A pass has seats. Helpers that sleep are woken and take one each; whoever called computes meanwhile, and takes away the seats
   that are still free when the work is done. So nobody waits for a thread that has not come. A forked process, in which the
   helpers are not, begins with new ones. Between passes helpers stay awake for some microseconds only: three stages may share two
   cores, and a guest's scheduler takes a halted core for one that is away (docs/log.md, "Native layers"). */

#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "sharing.h"

/* Of looking for the next pass, or for the last helper to leave. */
enum { TURNS_AWAKE = 2000 };

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
            for (int turns = 0; turns < TURNS_AWAKE && !atomic_load_explicit(&pool->seats, memory_order_relaxed); turns++)
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

/* As many helpers as there can be; signals go to the threads of the program. */
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
    for (int turns = 0; turns < TURNS_AWAKE && atomic_load_explicit(&pool->inside, memory_order_acquire); turns++)
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
