/* A forward pass, its phases, and the memory that it works in. */

#ifndef LAMINA_FORWARD_H
#define LAMINA_FORWARD_H

#include "level.h"
#include "threads.h"

enum {
    BLOCK_BYTES = 768 << 10, /* packed rows that go through a matrix together: they stay in the second-level cache */
    FEW_ROWS = 16,           /* up to so many rows, each thread packs all for itself instead of waiting for other threads */
};

/* The phases of a layer, in order; in a parallel layer GATED comes before OUT. The pieces of a phase are computed in any order.
   LOW phases come before their product, and only if a row of the pass has an adapter. */
enum {
    PREDICT, PACK_NARROWED, NARROWED, PACK_WIDENED, WIDENED,
    LOW_QKV, PACK_QKV, QKV, PACK_QUERIES, QUERIES, ABSORB, NORMALIZE_QK, WRITE_KV, ATTEND, MERGE, EXPAND,
    PACK_INPUTS, INPUTS, PACK_STEPS, STEPS, CONVOLVE, PREPARE, RECUR, GATE,
    LOW_OUT, PACK_OUT, OUT, ADD_OUT, PACK_OUTPUTS, OUTPUTS, ADD_OUTPUTS, ADD_BESIDE,
    LOW_GATED, PACK_GATED, GATED, LOW_UP, PACK_UP, UP, CUT, LOW_DOWN, PACK_DOWN, DOWN, ADD_DOWN,
    PACK_ROUTER, ROUTER, CHOOSE, GROUP_ROWS, PACK_NARROW, NARROW, PACK_EXPERTS, GATE_EXPERTS, PACK_INNER, MIX_EXPERTS,
    PACK_WIDEN, WIDEN, ADD_EXPERTS,
    CORRECT, PACK_INPUT, INPUT, PACK_INPUT_OUT, INPUT_OUT, ADD_INPUT, PHASES,
};

/* The place of a row's token in its sequence. */
typedef struct {
    int64_t segment;
    int64_t position;
    int64_t is_last; /* of its segment */
} Place;

/* Rows of one segment whose attention is computed together: at most LAMINA_QUERIES. If there are few rows and many tokens, there is
   a bundle for each piece of LAMINA_SPLIT_TOKENS tokens. */
typedef struct {
    int64_t segment;
    int64_t first_row;
    int64_t rows;
    int64_t piece;  /* as in Queries */
    int64_t pieces; /* of these rows; in the first bundle of them only */
} Bundle;

/* The rows of an expert in a pass. */
typedef struct {
    int64_t expert;
    int64_t first; /* of its places in `routed_rows` */
    int64_t rows;
    int64_t first_packed;
} Route;

/* How many experts of a layer have rows, and their blocks of 16 packed rows. */
typedef struct {
    int64_t active;
    int64_t packed_blocks;
} Routing;

/* Rows of one adapter within 16 rows of the pass that begin at a multiple of 16. */
typedef struct {
    int64_t adapter; /* from 1 on; 0: there are no further ones within these 16 rows */
    int64_t count;
    int64_t rows[LAMINA_TILE_ROWS];
} AdaptedRows;

/* A thread's memory while it packs rows. */
typedef struct {
    float *scales;     /* [FEW_ROWS, LAMINA_TILE_OUTS] of packed rows */
    float *normalized; /* [LAMINA_TILE_ROWS, width] rows */
    float *ordered;    /* [width] one of them in the order of a matrix's columns */
    uint8_t *packed;   /* [FEW_ROWS, packed_row_bytes] */
} MatrixScratch;

typedef struct {
    float *heads;      /* [rows, row_heads of the layer, head_dim] queries, keys, values and gates */
    float *attended;   /* [rows, heads * head_dim] */
    float *down;       /* [rows, latent_outs] */
    float *queries;    /* [rows, heads * query_size], if there are latents */
    float *values;     /* [rows, heads * value_size], if there are latents */
    float *inner;      /* [rows, inner_size] */
    float *times;      /* [rows, inner_size] what `inner` is multiplied by */
    float *recurrent_inputs;  /* [rows, outputs of the mixer's `in`] */
    float *recurrent_outputs; /* [rows, width of its `out`] */
    float *steps;      /* [rows, 2, heads of the mixer] */
    int64_t *first_rows; /* [segments] */
    float *first;      /* [rows, hidden_size] the first stream, if there are several, and */
    float *beside;     /* [rows, hidden_size] what `widen` makes of it */
    float *added;      /* [rows, hidden_size] what is normalized or scaled before it is added to the hidden states */
    float *scales;     /* [rows, LAMINA_TILE_OUTS] of packed rows, if there are more than FEW_ROWS, and */
    uint8_t *packed;   /* [rows, packed_row_bytes] these rows, rounded up to 16 */
    Place *places;     /* [rows] */
    Bundle *bundles;   /* [rows] at most, times most_pieces for few rows */
    float *pieces;     /* [bundles, heads, LAMINA_QUERIES or fewer rows, padded head_dim + LAMINA_ATTENDED_EXTRA], if attention is split */
    /* If a layer has experts: */
    float *logits;     /* [rows, most_experts + 1] of the router */
    int32_t *chosen;   /* [rows, most_chosen] experts of each row */
    float *weights;    /* [rows, most_chosen] */
    Routing *routing;  /* [num_layers] */
    Route *routes;     /* [most_experts] */
    int32_t *routed_rows;   /* [rows * most_chosen] rows of one expert after the other */
    float *routed_weights;  /* [rows * most_chosen] */
    float *routed_scales;   /* [the same, rounded up to 16 for each expert; LAMINA_TILE_OUTS] of packed rows, and */
    uint8_t *routed_packed; /* [that many, routed_bytes] these rows */
    float *routed_inner;    /* [rows * most_chosen, expert_size] */
    float *routed_times;    /* [rows * most_chosen, expert_size] */
    float *expert_out;      /* [rows, hidden_size] of one expert at a time; before that what `narrow` makes, after it what `widen` does */
    float *mixed;           /* [rows, hidden_size or latent size] of all */
    int64_t routed_bytes;
    AdaptedRows *adapted; /* [rows], rounded up to 16; absent without adapters */
    float *low;        /* [rows, low_floats] sums of A x */
    Counter *counters; /* [num_layers * PHASES, threads + 1] */
    uint8_t *scratch;  /* [threads, scratch_bytes] */
    int64_t scratch_bytes;
    int64_t counters_bytes;
    int64_t bytes; /* of all */
} Workspace;

/* What is done with a product: it replaces what was there, or is added to it, and then the sum may become bf16. */
enum { SET, ADD, ADD_AND_ROUND };

/* What all threads of a pass share. */
typedef struct {
    const Level *level;
    const Group *group;
    const Segment *segments;
    const float *rotations; /* [rotations, rows, head_dim / 2, 2] */
    float *hidden;          /* [rows, hidden_size]; of several streams the first one while a layer computes with it */
    float *streams;         /* [rows, streams, hidden_size], or NULL */
    const float *inputs;    /* as in Pass */
    int64_t rows;
    int64_t threads;
    int64_t num_segments;
    int64_t num_bundles;
    int64_t pieces; /* most in which a row's attention is computed */
    bool repeats;   /* as in Pass */
    bool adapts;    /* a row has an adapter, and one of the group adds something */
    Workspace at;
} Forward;

/* y [rows, outs] = x Wᵀ + b of all rows, normalized first unless `norm` is NULL. Two phases from `phase` on. */
void multiply(const Forward *forward, const Matrix *matrix, const float *x, const Norm *norm, float *y, int add,
              const Worker *worker, int64_t phase);

/* Phases of a layer's recurrent mixer; phase: the layer's first. */
void mix_recurrently(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase);
/* The phases of it that change the states. */
void update_states(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase);

/* Most pieces that the attention of a row is split into; 1: it is not. */
int64_t most_pieces(int64_t rows, int64_t most_tokens, int64_t threads);
/* Lays out a workspace from `memory` on. With NULL it only computes the bytes. */
Workspace pass_workspace(const Group *group, int64_t rows, int64_t most_tokens, int64_t threads, uint8_t *memory);
Workspace product_workspace(const Matrix *matrix, int64_t rows, int64_t threads, uint8_t *memory);
Workspace draw_workspace(int64_t vocabulary, int64_t threads, uint8_t *memory);
/* Bytes of what `matrix_scratch` lays out. */
int64_t matrix_scratch_bytes(int64_t width, int64_t row_bytes);
MatrixScratch matrix_scratch(const Matrix *matrix, uint8_t *scratch);

/* They take what `border.c` has checked. No row attends to more than most_tokens. */
void run_pass(Pool *pool, const Group *group, const Pass *pass, int64_t most_tokens);
void run_matrix(Pool *pool, const Product *product);
void run_draws(Pool *pool, const Draws *draws);

#endif
