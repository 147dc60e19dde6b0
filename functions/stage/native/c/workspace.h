/* What lies where in the memory that a pass works in. */

#ifndef LAMINA_WORKSPACE_H
#define LAMINA_WORKSPACE_H

#include "level.h"
#include "sharing.h"

enum {
    /* Rows that go through a matrix together: packed, they stay in the second level of the cache. */
    BLOCK_BYTES = 768 << 10,
    /* So few rows each thread packs for itself, instead of waiting for what others pack. */
    FEW_ROWS = 16,
};

/* The phases of a layer, one after the other; what is in one is computed in any order. */
enum { PACK_QKV, QKV, WRITE_KV, ATTEND, PACK_OUT, OUT, PACK_GATED, GATED, PACK_DOWN, DOWN, PHASES };

/* Where a row of the pass is. */
typedef struct {
    int64_t slot;
    int64_t position;
    int64_t is_last; /* of its segment */
} Place;

/* Rows of one segment whose attention is computed together: at most LAMINA_QUERIES. */
typedef struct {
    int64_t segment;
    int64_t first_row;
    int64_t rows;
} Bundle;

/* A thread's memory, for one thing at a time. */
typedef struct {
    float *scales;     /* [FEW_ROWS, LAMINA_TILE_OUTS] of packed rows */
    float *normalized; /* [widest] a row */
    uint8_t *packed;   /* [FEW_ROWS, packed_row_bytes] */
} MatrixScratch;

typedef struct {
    float *heads;       /* [rows, heads + 2 * kv_heads, head_dim] */
    float *attended;    /* [rows, heads * head_dim] */
    float *inner;       /* [rows, inner_size] */
    float *scales;      /* [rows, LAMINA_TILE_OUTS] of packed rows, and */
    uint8_t *packed;    /* [rows, packed_row_bytes] these, where they are not few: rows to a multiple of 16 */
    Place *places;      /* [rows] */
    Bundle *bundles;    /* [rows] at most */
    Counter *counters;  /* [num_layers * PHASES, threads + 1] */
    uint8_t *scratch;   /* [threads, scratch_bytes] */
    int64_t scratch_bytes;
    int64_t counters_bytes;
    int64_t bytes; /* all of it */
} Workspace;

/* With addresses from `memory` on; with NULL it tells the bytes. */
Workspace pass_workspace(const Group *group, int64_t rows, int64_t most_tokens, int64_t threads, uint8_t *memory);
Workspace product_workspace(const Matrix *matrix, int64_t rows, int64_t threads, uint8_t *memory);
MatrixScratch matrix_scratch(const Matrix *matrix, uint8_t *scratch);

#endif
