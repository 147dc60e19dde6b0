/* A level of CPU: the functions that are compiled for its vector instructions. Internal to the library.

   Each level is a table of functions, and one table is chosen once. All levels compile the same source (`level.inc.h`) over
   another kind of vector (`vectors_*.h`). The order of a sum is the level's own, and depends on lengths and positions alone. The
   level with AMX multiplies by tiles instead (`amx.inc.h`). */

#ifndef LAMINA_LEVEL_H
#define LAMINA_LEVEL_H

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

/* Rows of activations, packed for a matrix. */
typedef struct {
    const uint8_t *data;  /* [rows, stride] of bf16, of 16-bit integers, or of float32; for q4 and blocks see their `.inc.h` */
    const float *scales;  /* [rows, LAMINA_TILE_OUTS], each row's number repeated: the factor of an int8 matrix's sums */
    int64_t rows;
    int64_t row_bytes;
    bool arranged;        /* by `arrange`; false for a single row */
} Rows;

/* Pages of a sequence in one layer. */
typedef struct {
    const int32_t *numbers; /* [kv_pages, stride] */
    int64_t stride;
} Pages;

/* Some rows of one sequence, in the query heads that share a key head. */
typedef struct {
    Pages pages;
    int64_t first_position;
    int64_t end;            /* of the sequence's tokens, if its rows attend to later ones; otherwise 0 */
    int64_t rows;           /* at most LAMINA_QUERIES */
    int64_t kv_head;
    const float *heads;     /* [rows, row_heads of the layer, head_dim] */
    float *attended;        /* [rows, heads * head_dim] */
    int64_t piece;          /* number of the piece of tokens that is attended to, from 1 on; 0: all, and `attended` gets the results */
    float *pieces;          /* [heads / kv_heads * rows, padded head_dim + LAMINA_ATTENDED_EXTRA] results of that piece */
} Queries;

/* Rows of one sequence in a recurrent mixer. */
typedef struct {
    const Recurrent *mixer;
    int64_t rows;
    int64_t position;        /* of the first row */
    float *inputs;           /* [rows, outputs of `in`] */
    float *steps;            /* [rows, 2, heads] decays and factors */
    float *outputs;          /* [rows, width of `out`] */
    float *states;           /* of the sequence, in all layers; [state_values] */
    int64_t state_values;
    float *copies;           /* as in Segment */
    const int64_t *copied_at;
    int64_t num_copies;
    float *kept;             /* as in Segment, or NULL */
    int64_t kept_values;
    int64_t kept_from;
    bool repeats;            /* as in Pass */
} Mixing;

typedef struct {
    const char *name;

    /* out [size] = norm of x [size], which may be the same memory. first: of the norm's gain and biases that are used. */
    void (*normalize)(const Norm *norm, int64_t first, const float *x, float eps, int64_t size, float *out);

    /* Packs x [size] for a matrix of dtype into packed_row_bytes, padded with zeros. Returns the factor of the row's sums. */
    float (*pack)(Dtype dtype, const float *x, int64_t size, uint8_t *packed);

    /* Reorders up to 16 packed rows for `multiply`. NULL: it reads them as they are. */
    void (*arrange)(Dtype dtype, int64_t rows, int64_t row_bytes, uint8_t *packed);

    /* Computes outputs [first, last) of y [rows, outs] = x Wᵀ + b, or adds them to y. `first` begins a group of outputs. */
    void (*multiply)(const Matrix *matrix, const Rows *x, int64_t first, int64_t last, bool add, float *y);

    /* Computes outputs [first, last) of y [rows, outs] = silu(gate x) * (up x). */
    void (*multiply_gated)(const Matrix *gate, const Matrix *up, const Rows *x, int64_t first, int64_t last, float *y);

    /* low = scale * A x of rows of one adapter, at most LAMINA_TILE_ROWS. low: of each row, low_rank_floats. */
    void (*project)(const LowRank *by, int64_t width, int64_t rows, const float *const *x, float *const *low);

    /* y += B low in outputs [first, last) of these rows. y: of each row, all outputs of the matrix. */
    void (*add_low_rank)(const LowRank *by, int64_t first, int64_t last, int64_t rows, const float *const *low, float *const *y);

    /* y [count] = activation(y), times `times` [count] if that is not NULL. */
    void (*activate)(const Layer *layer, int64_t count, const float *times, float *y);

    /* y [count] = max(0, y - mean - cutoff * deviation), with both of y. */
    void (*cut)(int64_t count, float cutoff, float *y);

    /* y [count] = tanh(y) */
    void (*tanh)(int64_t count, float *y);

    /* y [count] += factor * x */
    void (*add_scaled)(int64_t count, float factor, const float *x, float *y);

    /* Chooses the experts of a row: their numbers [chosen], ascending, and weights. logits: of the router, which are overwritten. */
    void (*choose)(const Experts *experts, float *logits, int32_t *numbers, float *weights);

    /* Normalizes and rotates, in place, the heads of a row [row_heads, head_dim] that share a key head, and writes key and value to
       the arena, unless the layer reads those of another one. is_last: no later token of its sequence is in the pass.
       rotations: of queries and of keys, [head_dim / 2, 2] each, or NULL. */
    void (*write_kv)(const Group *group, const Layer *layer, Pages pages, int64_t kv_head, int64_t position, bool is_last,
                     const float *const rotations[2], float *heads);

    /* The same on every level. */
    int64_t (*draw)(const Draw *draw, uint8_t *scratch); /* scratch: of `draw_workspace` (`forward.h`) */
    int (*softmax)(Softmax *softmax);

    /* scratch: attention_scratch_bytes (`workspace.h`) */
    void (*attend)(const Group *group, const Layer *layer, const Queries *queries, uint8_t *scratch);

    /* A recurrent mixer, in this order: channels [first, last) of the convolution, which replace its inputs; decays and factors of a
       row; a head's columns; norm and gate of a row. A short convolution is the first alone, and makes the outputs. */
    void (*convolve)(const Mixing *mixing, int64_t first, int64_t last);
    void (*prepare_row)(const Mixing *mixing, int64_t row);
    void (*recur)(const Mixing *mixing, int64_t head, int64_t column);
    void (*gate_row)(const Mixing *mixing, int64_t row);

    /* Merges the results of `pieces` pieces for the same queries, which are `stride` floats apart, into `attended`. */
    void (*merge_pieces)(const Group *group, const Layer *layer, const Queries *queries, int64_t pieces, int64_t stride);
} Level;

extern const Level lamina_portable;
#if defined(__x86_64__)
extern const Level lamina_avx2, lamina_avx512_vnni, lamina_avx512_bf16, lamina_avx512_amx;
#elif defined(__aarch64__)
extern const Level lamina_neon_dotprod, lamina_neon_i8mm;
#endif

const Level *lamina_chosen_level(void);

static inline int64_t rounded_up(int64_t number, int64_t multiple)
{
    return (number + multiple - 1) / multiple * multiple;
}

static inline int64_t bytes_of(int64_t dtype)
{
    return dtype == LAMINA_INT8 ? 1 : dtype == LAMINA_BF16 ? 2 : 4;
}

/* A format of block matrices: see BlockFormat of storage/models/blocks.py. */
typedef struct {
    int low, high;
    int offset;           /* 2^offset is subtracted from a code; 0: nothing is */
    const uint8_t *table; /* replaces a code by a value, to which 2^offset was added */
    bool minimum;
    bool zero;            /* an integer for each scale is subtracted from the codes */
    bool floats;          /* codes are float8 (E4M3) */
    int blocks, factors;
    int scale_bytes;
} BlockFormat;

static const uint8_t LAMINA_IQ4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
static const uint8_t LAMINA_MXFP4[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

static const BlockFormat BLOCK_FORMATS[] = { /* by number */
    {.low = 4, .offset = 3, .blocks = 1, .scale_bytes = 2},                                  /* Q4_0 */
    {.low = 4, .minimum = true, .blocks = 1, .scale_bytes = 2},                              /* Q4_1 */
    {.low = 4, .high = 1, .offset = 4, .blocks = 1, .scale_bytes = 2},                       /* Q5_0 */
    {.low = 4, .high = 1, .minimum = true, .blocks = 1, .scale_bytes = 2},                   /* Q5_1 */
    {.low = 8, .offset = 7, .blocks = 1, .scale_bytes = 2},                                  /* Q8_0 */
    {.low = 2, .minimum = true, .blocks = 8, .factors = 2, .scale_bytes = 2},                /* Q2_K */
    {.low = 2, .high = 1, .offset = 2, .blocks = 8, .factors = 2, .scale_bytes = 2},         /* Q3_K */
    {.low = 4, .minimum = true, .blocks = 8, .factors = 1, .scale_bytes = 2},                /* Q4_K */
    {.low = 4, .high = 1, .minimum = true, .blocks = 8, .factors = 1, .scale_bytes = 2},     /* Q5_K */
    {.low = 4, .high = 2, .offset = 5, .blocks = 8, .factors = 2, .scale_bytes = 2},         /* Q6_K */
    {.low = 4, .offset = 7, .table = LAMINA_IQ4, .blocks = 1, .scale_bytes = 2},             /* IQ4_NL */
    {.low = 4, .offset = 7, .table = LAMINA_IQ4, .blocks = 8, .factors = 1, .scale_bytes = 2}, /* IQ4_XS */
    {.low = 4, .offset = 4, .table = LAMINA_MXFP4, .blocks = 1, .scale_bytes = 1},           /* MXFP4 */
    {.low = 4, .zero = true, .blocks = 1, .scale_bytes = 4},                                 /* INT4_32 */
    {.low = 4, .zero = true, .blocks = 2, .scale_bytes = 4},                                 /* INT4_64 */
    {.low = 4, .zero = true, .blocks = 4, .scale_bytes = 4},                                 /* INT4_128 */
    {.low = 8, .offset = 7, .zero = true, .blocks = 1, .scale_bytes = 4},                    /* INT8_32 */
    {.low = 8, .offset = 7, .zero = true, .blocks = 4, .scale_bytes = 4},                    /* INT8_128 */
    {.low = 8, .floats = true, .blocks = 1, .scale_bytes = 4},                               /* E4M3_32 */
    {.low = 8, .floats = true, .blocks = 4, .scale_bytes = 4},                               /* E4M3_128 */
};
enum { NUM_BLOCK_FORMATS = sizeof BLOCK_FORMATS / sizeof *BLOCK_FORMATS };

/* Bytes of a block of 16 outputs, without what it shares with others. */
static inline int64_t block_bytes(BlockFormat form)
{
    return 64 * (form.low + form.high) + LAMINA_GROUP_OUTS * (form.factors && form.minimum ? 2 : form.factors);
}

/* Bytes of the blocks of 16 outputs that share a scale, with this scale. */
static inline int64_t super_bytes(BlockFormat form)
{
    return form.blocks * block_bytes(form) + LAMINA_GROUP_OUTS * (form.scale_bytes + (form.minimum ? 2 : form.zero ? 1 : 0));
}

/* Bytes of the first `outs` outputs of a block matrix: of whole groups. */
static inline int64_t bytes_of_blocks(const Matrix *matrix, int64_t outs)
{
    int64_t bytes = 0, first = 0;
    for (int part = 0; part < LAMINA_PARTS && first < outs; first = matrix->ends[part++]) {
        const BlockFormat form = BLOCK_FORMATS[matrix->formats[part]];
        const int64_t count = (matrix->ends[part] < outs ? matrix->ends[part] : outs) - first;
        bytes += (count + LAMINA_GROUP_OUTS - 1) / LAMINA_GROUP_OUTS * (matrix->width / LAMINA_BLOCK / form.blocks) * super_bytes(form);
    }
    return bytes;
}

/* Format of the group of a block matrix that begins with output `out`. */
static inline int format_of(const Matrix *matrix, int64_t out)
{
    int part = 0;
    while (matrix->ends[part] <= out)
        part++;
    return (int)matrix->formats[part];
}

static inline bool in_blocks(int64_t dtype)
{
    return dtype == LAMINA_BLOCKS || dtype == LAMINA_FLOAT_BLOCKS;
}

/* Bytes of a packed row of activations. */
static inline int64_t packed_row_bytes(int64_t dtype, int64_t width)
{
    int64_t stride = rounded_up(width, LAMINA_STEP);
    if (dtype == LAMINA_Q4)
        return rounded_up(stride * 2 + stride / LAMINA_Q4_BLOCK * 8, LAMINA_LINE_BYTES);
    if (dtype == LAMINA_BLOCKS)
        return stride / LAMINA_BLOCK * LAMINA_LINE_BYTES;
    if (dtype == LAMINA_INT8) /* AMX reads 64 numbers of 8 bits at a time */
        return rounded_up(width, 64) * 2;
    return stride * (dtype == LAMINA_F32 ? 4 : 2);
}

/* Bytes of the first `outs` rows of weights; of whole groups for q4 and blocks. */
static inline int64_t weight_bytes(const Matrix *matrix, int64_t outs)
{
    int64_t stride = rounded_up(matrix->width, LAMINA_STEP);
    if (matrix->dtype == LAMINA_Q4)
        return rounded_up(outs, LAMINA_GROUP_OUTS) / LAMINA_GROUP_OUTS * (stride / LAMINA_Q4_BLOCK) * LAMINA_Q4_BYTES;
    if (in_blocks(matrix->dtype))
        return bytes_of_blocks(matrix, outs);
    return outs * stride * bytes_of(matrix->dtype);
}

static inline int64_t low_rank_groups(int64_t rank)
{
    return rounded_up(rank, LAMINA_GROUP_OUTS) / LAMINA_GROUP_OUTS;
}

/* Sums of A x of one row. */
static inline int64_t low_rank_floats(const LowRank *by)
{
    int64_t groups = 0;
    for (int part = 0; by->a.bytes && part < LAMINA_LOW_PARTS; part++)
        groups += low_rank_groups(by->ranks[part]);
    return groups * LAMINA_GROUP_OUTS;
}

/* Bytes of A for one group of ranks. */
static inline int64_t low_rank_group_bytes(int64_t dtype, int64_t width)
{
    return rounded_up(width, 2) * LAMINA_GROUP_OUTS * bytes_of(dtype);
}

/* Bytes of B for the groups of outputs that have some of [begin, end). */
static inline int64_t low_rank_part_bytes(int64_t dtype, int64_t rank, int64_t begin, int64_t end)
{
    const int64_t outs = rounded_up(end, LAMINA_GROUP_OUTS) - begin / LAMINA_GROUP_OUTS * LAMINA_GROUP_OUTS;
    return (dtype == LAMINA_BF16 ? rounded_up(rank, 2) : rank) * outs * bytes_of(dtype);
}

static inline int64_t padded_head(int64_t head_dim)
{
    return rounded_up(head_dim, 16);
}

static inline bool has_attention(const Layer *layer)
{
    return layer->qkv.weights.bytes || layer->latent.bytes;
}

/* Heads of a row of qkv: those of queries, keys and values unless the layer reads another's, and gates if there are any. */
static inline int64_t row_heads(const Group *group, const Layer *layer)
{
    return group->heads * (layer->gates ? 2 : 1) + (layer->reads_kv ? 0 : 2 * layer->kv_heads);
}

static inline int64_t attended_floats(int64_t head_dim)
{
    return padded_head(head_dim) + LAMINA_ATTENDED_EXTRA;
}

/* The keys, or values, of one head and LAMINA_PAGE_TOKENS tokens. */
static inline int64_t bytes_in_page(const Group *group, const Layer *layer)
{
    const int64_t scale = group->kv_dtype == LAMINA_INT8 ? LAMINA_SCALE_BYTES : 0;
    return LAMINA_PAGE_TOKENS * (padded_head(layer->head_dim) * bytes_of(group->kv_dtype) + scale);
}

/* Keys (which: 0) or values (1) of a head in the page that holds the token at `position`. */
static inline uint8_t *head_in_page(const Group *group, const Layer *layer, Pages pages, int64_t position, int64_t which, int64_t kv_head)
{
    int64_t page = position / LAMINA_PAGE_TOKENS, place = which * layer->kv_heads + kv_head;
    page = layer->ring ? page % layer->ring : page;
    if (layer->kv_pages > 1) {
        const int64_t of_page = 2 * layer->kv_heads / layer->kv_pages;
        page += place / of_page * pages.stride;
        place %= of_page;
    }
    return (uint8_t *)group->arena.data + pages.numbers[page] * group->page_bytes + place * bytes_in_page(group, layer);
}

static inline int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* The first token that the token at `position` attends to. */
static inline int64_t first_attended(const Layer *layer, int64_t position)
{
    return layer->window ? larger(0, position - layer->window + 1) : 0;
}

/* The end of the tokens that the token at `position` attends to. end: see Queries. */
static inline int64_t end_attended(const Layer *layer, int64_t end, int64_t position)
{
    if (!end)
        return position + 1;
    return layer->window ? position + smaller(end - position, layer->window) : end;
}

#endif
