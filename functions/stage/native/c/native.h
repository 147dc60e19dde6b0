/* The layers of a Llama-shaped group on a CPU: the contract between Python (`records.py` mirrors it) and C.

   Every pointer comes with the bytes behind it, and its comment says what lies there. The functions check all of them, and
   that numbers are in range, before any memory is touched; what is wrong comes back as a code. They keep nothing: memory is
   the caller's. Within one level of CPU (`level.h`) a sequence gets the same bits whatever its chunks, company and threads. */

#ifndef LAMINA_NATIVE_H
#define LAMINA_NATIVE_H

#include <stdint.h>

#define LAMINA_API __attribute__((visibility("default")))

enum {
    LAMINA_TILE_OUTS = 4,      /* rows of weights, and */
    LAMINA_TILE_ROWS = 4,      /* most rows of activations, that are multiplied together */
    LAMINA_STEP = 32,          /* rows of weights are padded with zeros to a multiple of so many */
    LAMINA_GROUP_OUTS = 16,    /* outputs of a matrix in four bits that lie together, and that no piece of work cuts */
    LAMINA_Q4_BLOCK = 32,      /* weights of a row in four bits that share a scale and a minimum, */
    LAMINA_Q4_BYTES = 320,     /* and the bytes of such a block of a group: */
    LAMINA_Q4_ENDS = 256,      /* numbers of four bits, then, from here on, 16 scales and 16 minima, float16 */
    LAMINA_BLOCK_TOKENS = 16,  /* tokens of a sequence whose keys lie side by side: a sequence begins with a block */
    LAMINA_QUERIES = 8,        /* most queries that read keys and values together */
    LAMINA_MOST_HEAD = 1024,   /* numbers of a head */
    LAMINA_MOST_THREADS = 64,
    LAMINA_LINE_BYTES = 64,    /* of the cache: what workspace is aligned to */
};

typedef struct {
    void *data;
    int64_t bytes; /* 0: there is none */
} Memory;

/* What numbers are. A matrix is of any; keys and values are bf16 or float32. */
typedef enum { LAMINA_BF16, LAMINA_INT8, LAMINA_F32, LAMINA_Q4 } Dtype;

/* y = x Wᵀ + b. `stride` stands for width rounded up to LAMINA_STEP. Rows are multiplied as bf16 with bf16, as 16-bit integers
   that a row's own largest number scales with int8, as 12-bit ones of blocks of 32 with q4, and as float32 with float32. */
typedef struct {
    int64_t dtype;
    int64_t outs;
    int64_t width;
    Memory weights; /* [outs, stride] of dtype; q4: [outs / group, stride / block, LAMINA_Q4_BYTES], both rounded up
                       (storage/models/q4.py) */
    Memory scales;  /* float32 [outs], of an int8 matrix only */
    Memory biases;  /* float32 [outs], or none */
} Matrix;

/* Tokens lie in blocks of LAMINA_BLOCK_TOKENS, and a pair is two bf16 or one float32: what one lane of a vector multiplies at
   a time. `padded` is head_dim rounded up to 16. */
typedef struct {
    Memory input_gain; /* float32 [hidden_size] */
    Matrix qkv;        /* [(heads + 2 * kv_heads) * head_dim, hidden_size]; halves of a rotated pair side by side */
    Memory qk_gain;    /* float32 [heads + kv_heads, head_dim], or none */
    Matrix out;        /* [hidden_size, heads * head_dim] */
    Memory mlp_gain;   /* float32 [hidden_size] */
    Matrix gate;       /* [inner_size, hidden_size] */
    Matrix up;         /* [inner_size, hidden_size] */
    Matrix down;       /* [hidden_size, inner_size] */
    Memory keys;       /* [kv_heads, capacity_tokens / block, pairs of padded, block] pairs of a key's numbers */
    Memory values;     /* bf16 [kv_heads, capacity_tokens / 2, padded, 2], float32 [kv_heads, capacity_tokens, padded] */
    int64_t window;    /* how many tokens, its own included, a token attends to; 0: all */
    int64_t rotary;    /* whether queries and keys are rotated */
} Layer;

typedef struct {
    Memory layers; /* Layer [num_layers] */
    int64_t num_layers;
    int64_t hidden_size;
    int64_t inner_size;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t capacity_tokens; /* of the KV arena, a multiple of LAMINA_BLOCK_TOKENS */
    int64_t kv_dtype;
    double eps; /* of the norms */
} Group;

/* `length` new tokens of a sequence that holds `position`. Its tokens lie from `first_slot` on, a multiple of
   LAMINA_BLOCK_TOKENS. No two segments of a pass are of the same sequence. */
typedef struct {
    int64_t first_slot;
    int64_t position;
    int64_t length;
} Segment;

typedef struct {
    int64_t rows;      /* the tokens of all segments, one behind the other */
    int64_t threads;   /* that compute, the caller's among them */
    Memory hidden;     /* float32 [rows, hidden_size]: read, and written */
    Memory rotations;  /* float32 [rows, head_dim / 2, 2]: cosines and sines */
    Memory segments;   /* Segment [...] */
    Memory workspace;  /* at least lamina_pass_bytes, aligned to 64 */
} Pass;

typedef struct {
    Matrix matrix;
    int64_t rows;
    int64_t threads;
    Memory x;         /* float32 [rows, width] */
    Memory y;         /* float32 [rows, outs] */
    Memory workspace; /* at least lamina_product_bytes, aligned to 64 */
} Product;

/* Threads that help with a pass. They sleep between passes. */
typedef struct Pool Pool;

typedef enum {
    LAMINA_OK,
    LAMINA_BAD_SIZE,      /* a number is out of range */
    LAMINA_BAD_DTYPE,     /* a dtype is unknown, or not possible there */
    LAMINA_BAD_MATRIX,    /* a matrix does not have the shape that the group's sizes ask for */
    LAMINA_SHORT_MEMORY,  /* memory is missing, or smaller than its shape */
    LAMINA_UNALIGNED,     /* an address is no multiple of what lies there */
    LAMINA_BAD_SEGMENT,   /* a segment leaves the arena, begins inside a block, or the segments are not all of the rows */
} Status;

/* What a status means, in words; never NULL. */
LAMINA_API const char *lamina_message(int status);

/* All levels that this library was built with, the best last, by number; NULL behind them. */
LAMINA_API const char *lamina_level_name(int64_t level);
/* The number of the best level that this CPU has all of. */
LAMINA_API int64_t lamina_best_level(void);
/* For what runs from here on, in place of the best; of a level that this CPU lacks, LAMINA_BAD_SIZE. For tests. */
LAMINA_API int lamina_use_level(int64_t level);
LAMINA_API int64_t lamina_level(void);

/* NULL where there is no memory for it. */
LAMINA_API Pool *lamina_new_pool(void);
/* Ends its threads. No pass may be running. */
LAMINA_API void lamina_free_pool(Pool *pool);

/* Runs all layers. A pool serves one pass at a time. */
LAMINA_API int lamina_run_layers(Pool *pool, const Group *group, const Pass *pass);
/* One matrix by itself: y = x Wᵀ + b. */
LAMINA_API int lamina_multiply(Pool *pool, const Product *product);

/* Bytes of workspace, where no row attends to more than most_tokens; minus a status for sizes that no pass may have. */
LAMINA_API int64_t lamina_pass_bytes(const Group *group, int64_t rows, int64_t most_tokens, int64_t threads);
LAMINA_API int64_t lamina_product_bytes(const Matrix *matrix, int64_t rows, int64_t threads);

/* Sizes of Memory, Matrix, Layer, Group, Segment, Pass and Product, by number, so that Python can tell that it means the same;
   0 behind them. */
LAMINA_API int64_t lamina_size_of(int64_t record);

#endif
