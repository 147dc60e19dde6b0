/* The layers of a group on a CPU: the contract between Python (`records.py` mirrors it) and C.

   Every pointer comes with its number of bytes, and a comment gives the shape of its memory. The functions check all pointers
   and numbers before they touch any memory, and return a status. They keep nothing: the caller owns all memory. Within one
   level of CPU (`level.h`) a sequence's bits do not depend on its chunks, on other rows or on threads. */

#ifndef LAMINA_NATIVE_H
#define LAMINA_NATIVE_H

#include <stdint.h>

#define LAMINA_API __attribute__((visibility("default")))

enum {
    LAMINA_TILE_OUTS = 4,     /* rows of weights in one tile of a product */
    LAMINA_TILE_ROWS = 4,     /* most rows of activations in one tile */
    LAMINA_STEP = 32,         /* rows of weights are padded with zeros to a multiple of it */
    LAMINA_GROUP_OUTS = 16,   /* outputs of a q4 or block matrix that are stored together; no piece of work divides them */
    LAMINA_BLOCK = 32,        /* weights of a row of a block matrix that share a scale, or two */
    LAMINA_PARTS = 3,         /* formats of a block matrix, at most */
    LAMINA_LOW_PARTS = 4,     /* parts of a matrix to which an adapter adds by itself, at most */
    LAMINA_Q4_BLOCK = 32,     /* weights of a q4 row that share a scale and a minimum */
    LAMINA_Q4_BYTES = 320,    /* one block of a group: weights of four bits, then 16 scales and 16 minima in float16 */
    LAMINA_Q4_ENDS = 256,     /* where the scales begin in it */
    LAMINA_BLOCK_TOKENS = 16, /* tokens of a sequence whose keys are interleaved */
    LAMINA_PAGE_TOKENS = 64,  /* tokens of a sequence in one page of the KV arena */
    LAMINA_SCALE_BYTES = 4,   /* the scale of a key or value in int8, a float32 */
    LAMINA_SPLIT_TOKENS = 2048, /* tokens in a piece of attention; pieces are counted from the beginning of the sequence */
    LAMINA_PIECE_PAGES = LAMINA_SPLIT_TOKENS / LAMINA_PAGE_TOKENS + 8, /* most addresses of a piece, and what follows, in whole lines */
    LAMINA_ATTENDED_EXTRA = 16, /* floats after a query's result of a piece: its greatest score and the sum of its powers */
    LAMINA_COLUMNS = 64,      /* of a recurrent matrix in a piece of work */
    LAMINA_QUERIES = 8,       /* most queries that read keys and values together */
    LAMINA_MOST_HEAD = 1024,  /* largest head_dim */
    LAMINA_MOST_EXPERTS = 1024, /* of a layer */
    LAMINA_MOST_STREAMS = 8,
    LAMINA_MOST_THREADS = 64,
    LAMINA_LINE_BYTES = 64,   /* a cache line; a workspace is aligned to it */
};

typedef struct {
    void *data;
    int64_t bytes; /* 0: absent */
} Memory;

/* A matrix has any dtype; keys and values are bf16, int8 or float32. */
typedef enum { LAMINA_BF16, LAMINA_INT8, LAMINA_F32, LAMINA_Q4, LAMINA_BLOCKS, LAMINA_FLOAT_BLOCKS } Dtype;

/* Formats of block matrices: FORMATS of storage/models/blocks.py, in its order. */
#define LAMINA_BLOCK_FORMATS(X)                                                                                     \
    X(Q4_0, 0) X(Q4_1, 1) X(Q5_0, 2) X(Q5_1, 3) X(Q8_0, 4) X(Q2_K, 5) X(Q3_K, 6) X(Q4_K, 7) X(Q5_K, 8) X(Q6_K, 9)  \
    X(IQ4_NL, 10) X(IQ4_XS, 11) X(MXFP4, 12)                                                                        \
    X(INT4_32, 13) X(INT4_64, 14) X(INT4_128, 15) X(INT8_32, 16) X(INT8_128, 17)
#define LAMINA_FLOAT_BLOCK_FORMATS(X) X(E4M3_32, 18) X(E4M3_128, 19)

/* y = x Wᵀ + b. `stride` is width rounded up to LAMINA_STEP. Activations become bf16 for a bf16 matrix, 16-bit integers scaled by
   the row's largest number for int8, 12-bit integers scaled in blocks of 32 for q4, 8-bit integers scaled in blocks of 32 for a
   block matrix (bf16 if its blocks are of floats), and stay float32 for float32. A block matrix has whole blocks. Parts of it may
   have different formats: those of the matrices that it was stacked from. */
typedef struct {
    int64_t dtype;
    int64_t outs;
    int64_t width;
    Memory weights; /* [outs, stride] of dtype; q4: [outs / group, stride / block, LAMINA_Q4_BYTES], both rounded up
                       (storage/models/q4.py); blocks: part after part, as in storage/models/blocks.py */
    Memory scales;  /* float32 [outs], with int8 */
    Memory biases;  /* float32 [outs], or absent */
    Memory order;   /* int32 [width], or absent: which number of x each column of the weights is multiplied by */
    int64_t formats[LAMINA_PARTS]; /* of block matrices, of each part */
    int64_t ends[LAMINA_PARTS];    /* outputs before the end of each part: whole groups, but for the last; then `outs` */
} Matrix;

typedef enum {
    LAMINA_NO_NORM,    /* numbers stay as they are */
    LAMINA_RMS_NORM,   /* x / sqrt(mean(x²) + eps) * gain + biases */
    LAMINA_LAYER_NORM, /* the same of x - mean(x) */
} NormKind;

typedef struct {
    int64_t kind;
    Memory gain;   /* float32 [size], unless there is no norm */
    Memory biases; /* float32 [size], or absent */
} Norm;

typedef enum { LAMINA_SILU, LAMINA_GELU, LAMINA_GELU_TANH, LAMINA_RELU, LAMINA_RELU2, LAMINA_XIELU,
               LAMINA_SWIGLU /* (up + 1) * gate * sigmoid(alpha * gate); gate is at most `limit`, up between it and its negative */
} Activation;

/* What turns a router's numbers for a row into scores. */
typedef enum {
    LAMINA_SOFTMAX,           /* the weights of the chosen experts are their scores */
    LAMINA_SOFTMAX_OF_CHOSEN, /* experts are chosen by the numbers, and their weights are the softmax of these */
    LAMINA_SIGMOID,
    LAMINA_SPARSE_MIX,        /* two experts, one after the other: the one with the greatest number of those that are left; its weight is
                                 its share in a softmax of those that are not far below (`threshold`) */
} RouterScores;

typedef struct {
    Matrix gate; /* [inner, hidden_size or latent size], or absent */
    Matrix up;   /* [inner, the same] */
    Matrix down; /* [the same, inner] */
} Expert;

/* The experts of a layer. A router chooses some for each row, whose outputs are added up, each times its weight. */
typedef struct {
    Memory experts;    /* Expert [num_experts], all of one inner size */
    Matrix router;     /* float32 [num_experts, hidden_size], and with `shared_gate` one output more */
    Matrix narrow;     /* [latent size, hidden_size]: experts get what it makes of hidden states; or absent */
    Matrix widen;      /* [hidden_size, latent size], of the sum of their outputs; present with `narrow` */
    Memory correction; /* float32 [num_experts]: added to the scores for the choice alone; or absent */
    Memory used;       /* int64 [num_experts]: a pass adds the rows of each expert */
    Memory used_at;    /* int64 [num_experts]: the time on the budget's clock when a pass last used each expert; 0: it is not in memory.
                          Absent: experts stay in memory. Present only if their weights are private mappings of files, not written to:
                          their pages are dropped, and read again when they are used */
    Memory scales;     /* float32 [num_experts]: the weight of each expert is multiplied by its own; or absent */
    Norm before;       /* [hidden_size], of what experts multiply; none: the layer's before_mlp */
    Norm before_router; /* the same of the router */
    Norm after;        /* [hidden_size], of the sum of the experts */
    Norm after_shared; /* [hidden_size], of the output of the layer's gate, up and down */
    int64_t num_experts;
    int64_t chosen;        /* of a row */
    int64_t scores;
    int64_t groups;        /* of successive experts, of which */
    int64_t chosen_groups; /* so many are considered: those with the greatest score, or sum of two */
    int64_t two_of_group;
    int64_t normalized;    /* 1: weights are divided by their sum plus normal_eps */
    int64_t shared_gate;   /* 1: the output of the layer's gate, up and down is multiplied by sigmoid of the router's last number */
    double normal_eps;
    double scale;          /* of weights */
    double threshold;      /* of LAMINA_SPARSE_MIX: numbers that are further below the greatest have no share, as a part of the greater of
                              that one and their own magnitude */
} Experts;

/* Latent attention: keys and values of all heads follow from one latent of a token, which is what the arena keeps. Its group has one key
   head, of rope + rank numbers. */
typedef struct {
    Matrix down;       /* [query_rank or heads * (nope + rope), and then rank + rope; hidden_size]: latents of queries, or queries; the
                          latent; the part of the key that is rotated, and that all heads share */
    Norm query_norm;   /* [query_rank] */
    Matrix queries;    /* [heads * (nope + rope), query_rank], or absent: `down` has them */
    Norm norm;         /* [rank] */
    Memory absorb;     /* Matrix [heads] of [rank, nope], by which the part of a query that is not rotated meets latents */
    Memory expand;     /* Matrix [heads] of [value_size, rank] */
    int64_t rank;
    int64_t nope;      /* numbers of a query that are not rotated, the first ones */
    int64_t rope;      /* numbers that are rotated */
    int64_t value_size;
    double eps;        /* of its norms */
} Latent;

typedef enum { LAMINA_NOT_RECURRENT, LAMINA_CONVOLUTION, LAMINA_DELTA, LAMINA_MAMBA } RecurrentKind;

/* A mixer with a state of fixed size (`Recurrent` of storage/checkpoints/decoder.py): the tail of a convolution [taps - 1, channels]
   and a matrix [key_size, head_size] of each head. A row of `in`'s outputs has the convolution's inputs from `channels_at` on. For
   LAMINA_CONVOLUTION it is input gates, output gates and inputs, [3, hidden_size]; otherwise channels are queries and keys
   [groups, key_size] and values [heads, head_size] in any order, and the row also has gates [heads, head_size]. */
typedef struct {
    int64_t kind;
    int64_t taps;        /* tokens that the convolution covers */
    int64_t channels;
    int64_t groups;      /* of queries and keys: each is for heads / groups heads in a row */
    int64_t key_size;
    int64_t heads;
    int64_t head_size;
    int64_t norm_parts;  /* of the output, which are normalized apart */
    int64_t gate_first;  /* 1: the output is multiplied by its gate before the norm */
    int64_t channels_at; /* in a row of `in`'s outputs, and so the next five */
    int64_t query_at;
    int64_t key_at;
    int64_t value_at;
    int64_t gate_at;
    int64_t steps_at;    /* [heads], for LAMINA_MAMBA */
    int64_t tail_at;     /* in the states of a sequence */
    int64_t matrix_at;   /* in the states of a sequence: for each head and LAMINA_COLUMNS of its columns [key_size, columns] */
    int64_t kept_at;     /* [channels + 2 * heads] in what is kept of a draft token */
    Matrix in;           /* [..., hidden_size] */
    Matrix steps;        /* [2 * heads, hidden_size] steps, and then shares of the change; for LAMINA_DELTA */
    Matrix out;          /* [hidden_size, heads * head_size or, for LAMINA_CONVOLUTION, hidden_size] */
    Memory kernel;       /* float32 [taps, channels] */
    Memory kernel_biases; /* float32 [channels], or absent */
    Memory rates;        /* float32 [heads]: the matrix decays by exp(rate * step) */
    Memory step_biases;  /* float32 [heads] */
    Memory skips;        /* float32 [heads]: the output has so many times the value, too; or absent */
    Norm norm;           /* [heads * head_size] */
    double eps;          /* of that norm */
    double gate_scale;   /* of gates and */
    double step_scale;   /* of steps, before anything else */
    double out_scale;    /* of what is added to the hidden states */
} Recurrent;

/* What a layer does with several streams of hidden states: `Streams` of storage/checkpoints/decoder.py. It computes with the first one. */
typedef struct {
    Matrix router;  /* float32 [streams, hidden_size] */
    Norm norm;      /* [hidden_size], of what the router gets */
    Matrix predict; /* float32 [streams * streams, streams]: the coefficients of all streams in the first, then in the second … */
    Matrix correct; /* float32 [streams, streams] */
    Memory scale;   /* float32 [hidden_size], of the first stream as input_gate gets it */
    Matrix narrow;  /* [rank, hidden_size]: beside attention, hidden = (hidden + h + norm(widen narrow h)) / sqrt(2) with h, what qkv gets */
    Matrix widen;   /* [hidden_size, rank] */
    Norm after;     /* [hidden_size], of what `widen` makes */
} Streams;

/* A layer: mixers, then feed-forward, each between two norms, and added to the hidden states. Each of the parts may be absent. */
typedef struct {
    Norm before_attention; /* [hidden_size], of all mixers */
    Matrix qkv;            /* [(heads + 2 * kv_heads) * head_dim, hidden_size], with reads_kv [heads * head_dim, …], and with `gates` those of `heads` more heads after it;
                              or absent: there is no attention. The halves of a rotated pair are adjacent */
    Memory latent;         /* Latent, instead of qkv; or absent */
    Norm qk;               /* [heads + kv_heads, head_dim], of each query and key; with reads_kv of queries alone */
    Norm value;            /* [head_dim], of each value */
    Memory sinks;          /* float32 [heads]: one more score of each head's softmax, which has no value; or absent */
    Matrix out;            /* [hidden_size, heads * head_dim], or with a latent [hidden_size, heads * value_size] */
    Norm after_attention;  /* [hidden_size] */
    Norm before_mlp;       /* [hidden_size] */
    Matrix gate;           /* [inner_size, hidden_size], or absent: down(activation(up x)), not down(activation(gate x) * (up x)) */
    Matrix up;             /* [inner_size, hidden_size]; with experts these three are the one that all rows go through; or absent */
    Matrix down;           /* [hidden_size, inner_size] */
    Memory experts;        /* Experts, or absent */
    Norm after_mlp;        /* [hidden_size] */
    Matrix input_gate;     /* [input_size, hidden_size]: hidden += norm(out(activation(gate hidden) * input)), last; or absent */
    Matrix input_out;      /* [hidden_size, input_size] */
    Norm after_input;      /* [hidden_size] */
    Memory streams;        /* Streams, if the group has them */
    int64_t qk_as_one;     /* 1: the queries of all heads are one row of the norm, and the keys another */
    int64_t qk_rotated;    /* 1: the norm comes after the rotation */
    int64_t gates;         /* 1: what a query attends to is multiplied by sigmoid(gate), number by number */
    int64_t activation;
    int64_t sparse;        /* 1: the gate's numbers become max(0, x - mean - cutoff * deviation) before the activation */
    int64_t parallel;      /* 1: attention and feed-forward are computed from the same hidden states */
    int64_t window;        /* tokens that a token attends to on one side, itself included; 0: all */
    int64_t ring;          /* pages that the layer keeps of a sequence: page n is in place n modulo ring; 0: it keeps all */
    int64_t query_rotation; /* number of a rotation of the pass, from 1 on; 0: queries are not rotated */
    int64_t key_rotation;
    double score_scale;
    double score_cap;      /* scores become cap * tanh(score / cap); 0: they do not */
    double attention_scale; /* of what attention adds to the hidden states */
    double mlp_scale;       /* of what the feed-forward adds */
    double gate_scale;      /* of what goes into the activation */
    double output_scale;   /* the hidden states are multiplied by it in the end */
    double swiglu[2];      /* alpha and limit */
    double xielu[4];       /* factors of x² above 0 and of exp(x) - 1 - x below, of x, and the largest x of exp */
    double cutoff;         /* of `sparse` */
    int64_t kv_heads;
    int64_t head_dim;
    int64_t reads_kv;      /* 1: it attends to the keys and values of an earlier layer with the same heads, and has none of its own */
    int64_t kv_row;        /* of the tables of pages: its first one, or that of the layer whose keys and values it reads */
    int64_t kv_pages;      /* rows that it has: they divide the heads of keys and values */
    Recurrent recurrent;   /* beside the attention or instead of it */
} Layer;

/* What an adapter adds to the outputs of a matrix: scale * B (A x), for each part of the outputs by itself (queries, keys, values, gates).
   Numbers are bf16 or float32. In bf16, two that follow each other in the width (A) or the rank (B) are one pair, and an odd last
   one has a zero.

   a  part after part, for each group of LAMINA_GROUP_OUTS ranks: [width, ranks of the group], of pairs [width / 2, ranks, 2]
   b  part after part, for each group of LAMINA_GROUP_OUTS outputs of the matrix that has some of the part, with zeros for the others:
      [rank, outputs of the group], of pairs [rank / 2, outputs, 2] */
typedef struct {
    int64_t dtype;
    int64_t ranks[LAMINA_LOW_PARTS]; /* of each part; 0: nothing is added to it */
    int64_t ends[LAMINA_LOW_PARTS];  /* outputs before the end of each part; then those of the matrix */
    double scales[LAMINA_LOW_PARTS];
    Memory a; /* absent: the adapter does not change the matrix */
    Memory b;
} LowRank;

/* An adapter's share of one layer. */
typedef struct {
    LowRank qkv;
    LowRank out;
    LowRank gate;
    LowRank up;
    LowRank down;
} AdapterLayer;

/* The KV arena has pages: the keys and then the values of one layer and LAMINA_PAGE_TOKENS tokens of one sequence, or a `kv_pages`-th
   part of their heads. Layers may have different heads, and pages are of one size. A pair is two bf16 or one float32: what one lane
   of a vector multiplies at a time. `padded` is head_dim rounded up to 16.

   keys    [kv_heads, page / block, pairs of padded, block] pairs of a key's numbers
   values  bf16 [kv_heads, page / 2, padded, 2], float32 [kv_heads, page, padded]

   In int8 each key and value of a token and head has a scale of its own, so that its bits depend on nothing else. A page has
   kv_heads * page / block blocks of keys, then as many of values, and a block has numbers of 8 bits, then float32 [block] scales:

   keys    [padded / 4, block, 4], each number plus 128, of the key times a matrix of 1 and -1 (`spread`)
   values  [block / 4, padded, 4 tokens] */
/* The memory of those experts of a group that need not stay in it. */
typedef struct {
    int64_t most_bytes; /* the experts that a layer uses in a pass may take more */
    int64_t bytes;      /* in memory */
    int64_t clock;
    int64_t found;      /* experts that a layer used in a pass and found in memory */
    int64_t read;       /* experts that were not */
} Budget;

typedef struct {
    Memory layers; /* Layer [num_layers] */
    Memory arena;  /* [num_pages] pages */
    Memory budget; /* Budget; absent: all experts stay in memory */
    Memory adapters; /* AdapterLayer [adapters, num_layers], or absent */
    int64_t num_layers;
    int64_t hidden_size;
    int64_t inner_size;      /* largest of a layer's own feed-forward */
    int64_t expert_size;     /* largest inner size of an expert; 0: no layer has experts */
    int64_t most_experts;    /* of a layer */
    int64_t most_chosen;     /* experts of a row */
    int64_t heads;
    int64_t head_dim;    /* the largest of a layer */
    int64_t row_numbers; /* most outputs of qkv in a layer */
    int64_t latent_outs; /* most outputs of `down`; 0: no layer has a latent */
    int64_t query_size;  /* nope + rope of latents */
    int64_t value_size;  /* of latents */
    int64_t num_pages;
    int64_t page_bytes; /* a multiple of 4 */
    int64_t kv_dtype;
    int64_t rotations; /* that a pass has */
    int64_t kv_rows;   /* of the tables of pages: `kv_pages` for each layer that writes keys and values */
    int64_t input_size; /* numbers that each layer gets of each row besides the hidden states; 0: none */
    int64_t streams;    /* of hidden states; 0: there is one, and layers have no Streams */
    int64_t recurrent_inputs;  /* most outputs of a recurrent mixer's `in` */
    int64_t recurrent_outputs; /* greatest width of its `out` */
    int64_t recurrent_heads;   /* most heads of one */
    int64_t state_values;      /* numbers in the states of a sequence */
    int64_t kept_values;       /* numbers that are kept of a draft token */
    int64_t low_floats; /* most sums of A x that a row has for one matrix, or for gate and up together; each rank counts as whole groups */
    int64_t rounds; /* 1: each layer's output is rounded to bf16, so that the bits do not depend on where a model is cut */
    int64_t bidirectional; /* 1: tokens attend to later ones of their segment, too */
    double eps;     /* of the norms */
} Group;

/* `length` new tokens of a sequence that holds `position` tokens. Each segment of a pass is of another sequence. */
typedef struct {
    Memory pages; /* int32 [kv_rows, pages of the sequence]: numbers of pages in the arena; a ring's row uses its first ones only */
    int64_t position;
    int64_t length;
    /* With recurrent mixers: */
    Memory states;    /* float32 [state_values], which the segment's tokens change */
    Memory copies;    /* float32 [copies, state_values]: written, the states after so many tokens of the sequence: */
    Memory copied_at; /* int64 [copies]; copies that are not after one of the segment's tokens are left alone */
    Memory kept;      /* float32 [tokens from kept_from on, kept_values] what changes states by a draft token: written; or absent */
    int64_t kept_from; /* position of the first draft token */
    int64_t adapter; /* number of an adapter of the group, from 1 on; 0: none */
} Segment;

typedef struct {
    int64_t rows;     /* tokens of all segments, in their order */
    int64_t threads;  /* the caller's included */
    int64_t repeats;  /* 1: only the states are changed, again, by the draft tokens that `kept` of each segment has; for these two
                         memories may be absent: */
    Memory hidden;    /* float32 [rows, streams, hidden_size], read and written */
    Memory inputs;    /* float32 [num_layers, rows, input_size], or absent */
    Memory rotations; /* float32 [rotations, rows, head_dim / 2, 2]: cosines and sines */
    Memory segments;  /* Segment [...] */
    Memory workspace; /* at least lamina_pass_bytes, aligned to 64 */
} Pass;

typedef struct {
    Matrix matrix;
    int64_t rows;
    int64_t threads;
    Memory x;         /* float32 [rows, width] */
    Memory y;         /* float32 [rows, outs] */
    Memory workspace; /* at least lamina_product_bytes, aligned to 64 */
} Product;

/* A token to draw. Filters are applied in this order. A draw depends on logits, the tokens that are allowed, filters, seed and
   position alone. */
typedef struct {
    Memory logits;   /* float32 [vocabulary], after penalties */
    Memory allowed;  /* uint32 [...]: bit n of number m is set if token 32 m + n may be drawn, others may not; or absent: all may */
    double temperature; /* logits are divided by it; 0: the token with the greatest logit, of several the lowest token id */
    int64_t top_k;  /* keeps so many tokens; 0: all */
    double top_p;   /* keeps the most probable tokens that have this share of the probability together */
    double min_p;   /* keeps tokens that are at least so probable, compared with the most probable */
    int64_t seed;
    int64_t position; /* of the token that is drawn */
    int64_t token;  /* written; -LAMINA_NOT_FINITE if the greatest logit, or after division the greatest that is allowed, is not finite */
} Draw;

typedef struct {
    Memory draws;     /* Draw [...], all of one vocabulary */
    int64_t threads;  /* the caller's included */
    Memory workspace; /* at least lamina_draw_bytes, aligned to 64 */
} Draws;

/* The softmax of logits: the logarithm of the probability of a token is its logit minus the greatest one minus `log_sum`. */
typedef struct {
    Memory scores;  /* float32 [vocabulary] */
    Memory weights; /* float32 [vocabulary], temporary */
    Memory keys;    /* uint64 [vocabulary], temporary */
    Memory top;     /* int64 [count]: written, the most probable tokens, of equal ones the lowest token id first; or absent */
    double log_sum; /* written */
} Softmax;

/* Threads that help with passes and sleep between them. */
typedef struct Pool Pool;

typedef enum {
    LAMINA_OK,
    LAMINA_BAD_SIZE,      /* a number is out of range */
    LAMINA_BAD_DTYPE,     /* a dtype is unknown, or not allowed there */
    LAMINA_BAD_MATRIX,    /* a matrix does not have the shape that the group's sizes require */
    LAMINA_SHORT_MEMORY,  /* memory is absent, or smaller than its shape */
    LAMINA_UNALIGNED,     /* an address is not a multiple of its element's size */
    LAMINA_BAD_SEGMENT,   /* a segment leaves its pages, the arena or a ring, or the segments do not cover all rows */
    LAMINA_NOT_FINITE,    /* a score is a NaN, or the greatest is infinite */
    LAMINA_BAD_ADAPTER,   /* an adapter is unknown, or does not fit the matrices of a layer */
} Status;

/* Describes a status; never NULL. */
LAMINA_API const char *lamina_message(int status);

/* Name of a level of this library, by number, the best last; NULL beyond the last. */
LAMINA_API const char *lamina_level_name(int64_t level);
/* The best level that this CPU supports. */
LAMINA_API int64_t lamina_best_level(void);
/* Replaces the best level from now on. LAMINA_BAD_SIZE for one that this CPU lacks. For tests. */
LAMINA_API int lamina_use_level(int64_t level);
LAMINA_API int64_t lamina_level(void);

/* NULL if there is no memory for it. */
LAMINA_API Pool *lamina_new_pool(void);
/* Ends its threads. No pass may be running. */
LAMINA_API void lamina_free_pool(Pool *pool);

/* Runs all layers. A pool serves one pass at a time. */
LAMINA_API int lamina_run_layers(Pool *pool, const Group *group, const Pass *pass);
/* Multiplies by one matrix: y = x Wᵀ + b. */
LAMINA_API int lamina_multiply(Pool *pool, const Product *product);

/* Draws all tokens. pool: NULL for one thread. */
LAMINA_API int lamina_draw(Pool *pool, const Draws *draws);
/* Computes log_sum and top. */
LAMINA_API int lamina_softmax(Softmax *softmax);

/* Bytes of workspace for rows that attend to at most most_tokens, or minus a status for sizes that are not allowed. */
LAMINA_API int64_t lamina_pass_bytes(const Group *group, int64_t rows, int64_t most_tokens, int64_t threads);
LAMINA_API int64_t lamina_product_bytes(const Matrix *matrix, int64_t rows, int64_t threads);
LAMINA_API int64_t lamina_draw_bytes(int64_t vocabulary, int64_t threads);

/* Sizes of Memory, Matrix, Norm, Recurrent, Expert, Experts, Budget, Latent, Streams, Layer, LowRank, AdapterLayer, Group, Segment, Pass, Product, Draw, Draws and Softmax, by number, so that Python can compare its
   records; 0 beyond the last. */
LAMINA_API int64_t lamina_size_of(int64_t record);

#endif
