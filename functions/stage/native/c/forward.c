/* A forward pass: the layers of a group, from top to bottom as the model has them, run by several threads together.

   A layer is a few phases, whose pieces the threads share (`threads.h`). Norms before a matrix and packing are done by the thread
   that takes a piece, so that they are no phases of their own. */

#ifdef __linux__
#define _GNU_SOURCE /* madvise */
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "forward.h"

#include <stddef.h>

enum {
    UNIT_BYTES = 98304, /* weights in a piece of work: some microseconds */
    ENOUGH_PIECES = 4,  /* of attention, for each thread: then none waits long for the last one */
};

static const size_t NOT_ADAPTED = SIZE_MAX;

/* y = x Wᵀ + b, or += it, or activation(y), or activation(y) * (x Upᵀ + b): one product of a pass. */
typedef struct {
    const Level *level;
    const Matrix *matrix;
    const Matrix *up;   /* or NULL */
    const Layer *layer; /* its activation; NULL: there is none */
    const float *x;     /* [rows, width] */
    const int32_t *places; /* of the rows in x; NULL: they follow each other */
    int64_t x_stride;   /* from one row of x to the next; 0: width */
    const Norm *norm;   /* that x goes through first, or NULL */
    float eps;
    int64_t rows;
    int add;            /* SET, ADD or ADD_AND_ROUND */
    float *y;           /* [rows, outs] */
    float *times;       /* [rows, outs] temporary, with `up` */
    const float *given; /* [rows, outs] what activation(y) is multiplied by instead of a product with `up`; or NULL */
    const AdapterLayer *adapters; /* of this layer; those of the next adapter are `num_layers` further on; NULL: no row has one */
    int64_t num_layers;
    const AdaptedRows *adapted;
    size_t low, up_low; /* places in an AdapterLayer of what is added to the products with `matrix` and `up` */
    float *sums;        /* [rows, low_floats] */
    int64_t low_floats;
} Task;

/* How a product is cut into pieces: blocks of rows, and units of outputs in each block. */
typedef struct {
    int64_t blocks, block_rows;
    int64_t units, unit_outs;
} Pieces;

/* Thread `number` of `threads`, with its part of a workspace. */
static Worker worker_of(const Workspace *at, int64_t threads, int64_t number)
{
    return (Worker){number, threads, at->counters, at->scratch + number * at->scratch_bytes};
}

static Pieces pieces_of(int64_t rows, const Matrix *matrix, int64_t matrices)
{
    Pieces pieces;
    int64_t most_rows = larger(64, BLOCK_BYTES / packed_row_bytes(matrix->dtype, matrix->width) / 16 * 16);
    pieces.blocks = (rows + most_rows - 1) / most_rows;
    pieces.block_rows = rounded_up((rows + pieces.blocks - 1) / pieces.blocks, 16);
    pieces.unit_outs = larger(1, UNIT_BYTES / (weight_bytes(matrix, LAMINA_GROUP_OUTS) * matrices)) * LAMINA_GROUP_OUTS;
    pieces.units = (matrix->outs + pieces.unit_outs - 1) / pieces.unit_outs;
    return pieces;
}

/* Puts the numbers of x in the order of the matrix's columns. Places that x does not have count as zero. */
static void put_in_order(const Matrix *matrix, const float *x, float *ordered)
{
    const int32_t *order = matrix->order.data;
    for (int64_t i = 0; i < matrix->width; i++)
        ordered[i] = (uint32_t)order[i] < (uint64_t)matrix->width ? x[order[i]] : 0.0f;
}

/* Normalizes and packs up to 16 rows from `row` on. */
static void pack_rows(const Task *task, int64_t row, int64_t rows, const MatrixScratch *scratch, float *scales, uint8_t *packed)
{
    const Matrix *matrix = task->matrix;
    const int64_t row_bytes = packed_row_bytes(matrix->dtype, matrix->width);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t place = task->places ? task->places[row + i] : row + i;
        const float *numbers = task->x + place * (task->x_stride ? task->x_stride : matrix->width);
        if (task->norm && task->norm->kind) {
            task->level->normalize(task->norm, 0, numbers, task->eps, matrix->width, scratch->normalized);
            numbers = scratch->normalized;
        }
        if (matrix->order.bytes) {
            put_in_order(matrix, numbers, scratch->ordered);
            numbers = scratch->ordered;
        }
        float scale = task->level->pack((Dtype)matrix->dtype, numbers, matrix->width, packed + i * row_bytes);
        for (int out = 0; out < LAMINA_TILE_OUTS; out++)
            scales[i * LAMINA_TILE_OUTS + out] = scale;
    }
    /* Tiles multiply the places of all rows: what an earlier phase left there may be subnormal, which takes many times as long. */
    for (int64_t i = rows * LAMINA_TILE_OUTS; i < rounded_up(rows, LAMINA_TILE_ROWS) * LAMINA_TILE_OUTS; i++)
        scales[i] = 0;
    if (task->level->arrange && task->rows > 1)
        task->level->arrange((Dtype)matrix->dtype, rows, row_bytes, packed);
}

/* Packs a few rows into the thread's own memory. */
static Rows pack_alone(const Task *task, const Worker *worker)
{
    MatrixScratch scratch = matrix_scratch(task->matrix, worker->scratch);
    pack_rows(task, 0, task->rows, &scratch, scratch.scales, scratch.packed);
    return (Rows){scratch.packed, scratch.scales, task->rows, packed_row_bytes(task->matrix->dtype, task->matrix->width),
                  task->rows > 1};
}

/* Packs many rows in one phase, which the threads share. */
static Rows pack_together(const Task *task, const Workspace *at, const Worker *worker, int64_t phase)
{
    const int64_t row_bytes = packed_row_bytes(task->matrix->dtype, task->matrix->width), pieces = (task->rows + 15) / 16;
    MatrixScratch scratch = matrix_scratch(task->matrix, worker->scratch);
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, pieces, 1)) >= 0; done++)
        pack_rows(task, piece * 16, smaller(16, task->rows - piece * 16), &scratch,
                  at->scales + piece * 16 * LAMINA_TILE_OUTS, at->packed + piece * 16 * row_bytes);
    finish_phase(worker, phase, done, pieces);
    return (Rows){at->packed, at->scales, task->rows, row_bytes, true};
}

/* Rounds y [rows, outs] in columns [first, last) to bf16: to the nearest, ties to even. Numbers that are not finite stay so. */
static void round_to_bf16(float *y, int64_t rows, int64_t outs, int64_t first, int64_t last)
{
    for (int64_t row = 0; row < rows; row++)
        for (int64_t out = first; out < last; out++) {
            uint32_t bits;
            memcpy(&bits, y + row * outs + out, sizeof bits);
            bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
            bits = (is_nan ? bits | 0x00400000 : bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
            memcpy(y + row * outs + out, &bits, sizeof bits);
        }
}

/* What an adapter adds to a product of the task. */
static const LowRank *low_rank_of(const Task *task, const AdaptedRows *adapted, size_t place)
{
    const AdapterLayer *share = task->adapters + (adapted->adapter - 1) * task->num_layers;
    return (const LowRank *)((const uint8_t *)share + place);
}

/* One phase: the sums of A x of all rows that have an adapter. */
static void project_rows(const Task *task, const Worker *worker, int64_t phase)
{
    const Matrix *matrix = task->matrix;
    const int64_t width = matrix->width, pieces = rounded_up(task->rows, 16);
    float *normalized = matrix_scratch(matrix, worker->scratch).normalized;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, pieces, 1)) >= 0; done++) {
        const AdaptedRows *adapted = task->adapted + piece;
        if (!adapted->adapter)
            continue;
        const LowRank *by = low_rank_of(task, adapted, task->low), *by_up = task->up ? low_rank_of(task, adapted, task->up_low) : NULL;
        if (!by->a.bytes && !(by_up && by_up->a.bytes))
            continue;
        const float *x[LAMINA_TILE_ROWS];
        float *low[LAMINA_TILE_ROWS], *low_of_up[LAMINA_TILE_ROWS];
        for (int64_t i = 0; i < adapted->count; i++) {
            x[i] = task->x + adapted->rows[i] * width;
            if (task->norm && task->norm->kind) {
                task->level->normalize(task->norm, 0, x[i], task->eps, width, normalized + i * width);
                x[i] = normalized + i * width;
            }
            low[i] = task->sums + adapted->rows[i] * task->low_floats;
            low_of_up[i] = low[i] + low_rank_floats(by);
        }
        if (by->a.bytes)
            task->level->project(by, width, adapted->count, x, low);
        if (by_up && by_up->a.bytes)
            task->level->project(by_up, width, adapted->count, x, low_of_up);
    }
    finish_phase(worker, phase, done, pieces);
}

/* y [rows from `row` on, outs] += B A x in outputs [first, last) of rows that have an adapter. of_up: of the product with `up`. */
static void add_low_ranks(const Task *task, bool of_up, int64_t row, int64_t rows, int64_t first, int64_t last, float *y)
{
    for (int64_t window = row; window < row + rows; window += 16)
        for (const AdaptedRows *adapted = task->adapted + window; adapted < task->adapted + window + 16 && adapted->adapter; adapted++) {
            const LowRank *by = low_rank_of(task, adapted, of_up ? task->up_low : task->low);
            if (!by->a.bytes)
                continue;
            const int64_t skipped = of_up ? low_rank_floats(low_rank_of(task, adapted, task->low)) : 0;
            const float *low[LAMINA_TILE_ROWS];
            float *to[LAMINA_TILE_ROWS];
            for (int64_t i = 0; i < adapted->count; i++) {
                low[i] = task->sums + adapted->rows[i] * task->low_floats + skipped;
                to[i] = y + (adapted->rows[i] - row) * task->matrix->outs;
            }
            task->level->add_low_rank(by, first, last, adapted->count, low, to);
        }
}

/* y [rows, outs] = activation(matrix x) * (up x) in outputs [first, last), or without `up`. row: number of the first row. */
static void multiply_activated(const Task *task, const Rows *x, int64_t row, int64_t first, int64_t last, float *times, float *y)
{
    const int64_t outs = task->matrix->outs;
    const float scale = (float)task->layer->gate_scale;
    if (task->up && task->layer->activation == LAMINA_SILU && scale == 1 && !task->adapters) { /* the same bits as below, in one go */
        task->level->multiply_gated(task->matrix, task->up, x, first, last, y);
        return;
    }
    task->level->multiply(task->matrix, x, first, last, false, y);
    if (task->up)
        task->level->multiply(task->up, x, first, last, false, times);
    if (task->adapters) {
        add_low_ranks(task, false, row, x->rows, first, last, y);
        if (task->up)
            add_low_ranks(task, true, row, x->rows, first, last, times);
    }
    const float *by = task->given ? task->given + row * outs : task->up ? times : NULL;
    for (int64_t at = first; at < first + x->rows * outs; at += outs) {
        for (int64_t out = 0; scale != 1 && out < last - first; out++)
            y[at + out] *= scale;
        task->level->activate(task->layer, last - first, by ? by + at : NULL, y + at);
    }
}

/* Two phases: packs all rows, then computes y. With adapters one more before them. */
static void run_product(const Task *task, const Workspace *at, const Worker *worker, int64_t phase)
{
    const Matrix *matrix = task->matrix;
    const Pieces pieces = pieces_of(task->rows, matrix, task->up ? 2 : 1);
    /* With several blocks of rows, a thread keeps to its own, which are in its cache. */
    const int64_t things = pieces.blocks == 1 ? pieces.units : pieces.blocks, parts = pieces.blocks == 1 ? 1 : pieces.units;
    const bool few = task->rows <= FEW_ROWS;
    Rows all = {0};
    if (task->adapters)
        project_rows(task, worker, phase - 1);
    if (!few)
        all = pack_together(task, at, worker, phase);
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase + 1, things, parts)) >= 0; done++) {
        /* Only with a piece in hand: a thread that comes too late for one would read x while the next phases write it. */
        if (few && !done)
            all = pack_alone(task, worker);
        int64_t row = piece / pieces.units * pieces.block_rows, first = piece % pieces.units * pieces.unit_outs;
        int64_t last = smaller(matrix->outs, first + pieces.unit_outs);
        const Rows x = {all.data + row * all.row_bytes, all.scales + row * LAMINA_TILE_OUTS,
                        smaller(pieces.block_rows, all.rows - row), all.row_bytes, all.arranged};
        if (task->layer)
            multiply_activated(task, &x, row, first, last, task->times + row * matrix->outs, task->y + row * matrix->outs);
        else {
            task->level->multiply(matrix, &x, first, last, task->add != SET, task->y + row * matrix->outs);
            if (task->adapters)
                add_low_ranks(task, false, row, x.rows, first, last, task->y + row * matrix->outs);
        }
        if (task->add == ADD_AND_ROUND)
            round_to_bf16(task->y + row * matrix->outs, x.rows, matrix->outs, first, last);
    }
    finish_phase(worker, phase + 1, done, pieces.blocks * pieces.units);
}

void multiply(const Forward *forward, const Matrix *matrix, const float *x, const Norm *norm, float *y, int add,
              const Worker *worker, int64_t phase)
{
    const Task task = {.level = forward->level, .matrix = matrix, .x = x, .norm = norm, .eps = (float)forward->group->eps,
                       .rows = forward->rows, .add = add, .y = y};
    run_product(&task, &forward->at, worker, phase);
}

/* Gives a task what the adapters of its rows add to its products, by the places of both in an AdapterLayer. */
static Task with_adapters(const Forward *forward, const Layer *layer, size_t low, size_t up_low, Task task)
{
    if (forward->adapts && low != NOT_ADAPTED) {
        const Group *group = forward->group;
        task.adapters = (const AdapterLayer *)group->adapters.data + (layer - (const Layer *)group->layers.data);
        task.num_layers = group->num_layers;
        task.adapted = forward->at.adapted;
        task.low = low;
        task.up_low = up_low;
        task.sums = forward->at.low;
        task.low_floats = group->low_floats;
    }
    return task;
}

/* The same with adapters. low: place in an AdapterLayer, or NOT_ADAPTED. */
static void multiply_adapted(const Forward *forward, const Layer *layer, const Matrix *matrix, size_t low, const float *x,
                             const Norm *norm, float *y, int add, const Worker *worker, int64_t phase)
{
    const Task task = with_adapters(forward, layer, low, 0,
                                    (Task){.level = forward->level, .matrix = matrix, .x = x, .norm = norm,
                                           .eps = (float)forward->group->eps, .rows = forward->rows, .add = add, .y = y});
    run_product(&task, &forward->at, worker, phase);
}

/* y [outs] = norm(x) Wᵀ of one row, by one thread. norm: NULL for none. */
static void multiply_alone(const Forward *forward, const Matrix *matrix, const float *x, const Norm *norm, float *y, const Worker *worker)
{
    const Task task = {.level = forward->level, .matrix = matrix, .x = x, .norm = norm, .eps = (float)forward->group->eps, .rows = 1};
    const Rows packed = pack_alone(&task, worker);
    forward->level->multiply(matrix, &packed, 0, matrix->outs, false, y);
}

/* The feed-forward before `down`, if it is sparse: what becomes of a gate's number depends on all of its row. */
static void feed_forward_sparsely(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    float *inner = forward->at.inner, *times = forward->at.times;
    const int64_t size = layer->up.outs;
    multiply_adapted(forward, layer, &layer->gate, offsetof(AdapterLayer, gate), forward->hidden, &layer->before_mlp, inner, SET, worker,
                     phase + PACK_GATED);
    multiply_adapted(forward, layer, &layer->up, offsetof(AdapterLayer, up), forward->hidden, &layer->before_mlp, times, SET, worker,
                     phase + PACK_UP);
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase + CUT, forward->rows, 1)) >= 0; done++) {
        forward->level->cut(size, (float)layer->cutoff, inner + row * size);
        forward->level->activate(layer, size, times + row * size, inner + row * size);
    }
    finish_phase(worker, phase + CUT, done, forward->rows);
}

/* phase: the layer's first. */
static void feed_forward(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    if (layer->sparse) {
        feed_forward_sparsely(forward, layer, worker, phase);
        return;
    }
    const bool is_gated = layer->gate.weights.bytes;
    const size_t up = offsetof(AdapterLayer, up);
    const Task task = with_adapters(
        forward, layer, is_gated ? offsetof(AdapterLayer, gate) : up, up,
        (Task){.level = forward->level, .matrix = is_gated ? &layer->gate : &layer->up, .up = is_gated ? &layer->up : NULL,
               .layer = layer, .x = forward->hidden, .norm = &layer->before_mlp, .eps = (float)forward->group->eps,
               .rows = forward->rows, .y = forward->at.inner, .times = forward->at.times});
    run_product(&task, &forward->at, worker, phase + PACK_GATED);
}

/* hidden += scale * norm(added), for one row. is_last: of the layer. */
static void add_row(const Forward *forward, const Layer *layer, const Norm *norm, double scale, bool is_last, float *added, float *hidden)
{
    const int64_t size = forward->group->hidden_size;
    const float output_scale = (float)layer->output_scale;
    if (norm->kind)
        forward->level->normalize(norm, 0, added, (float)forward->group->eps, size, added);
    for (int64_t i = 0; i < size; i++)
        hidden[i] += (float)scale * added[i];
    for (int64_t i = 0; is_last && output_scale != 1 && i < size; i++)
        hidden[i] *= output_scale;
    if (is_last && forward->group->rounds)
        round_to_bf16(hidden, 1, size, 0, size);
}

/* hidden += scale * norm(x Wᵀ + b): two phases, and one more unless that is a plain sum. is_last: of the layer. */
static void add_product(const Forward *forward, const Layer *layer, const Matrix *matrix, size_t low, const float *x, const Norm *norm,
                        double scale, bool is_last, const Worker *worker, int64_t phase)
{
    const bool rounds = is_last && forward->group->rounds;
    const int64_t size = forward->group->hidden_size;
    if (!norm->kind && scale == 1 && (!is_last || layer->output_scale == 1)) {
        multiply_adapted(forward, layer, matrix, low, x, NULL, forward->hidden, rounds ? ADD_AND_ROUND : ADD, worker, phase);
        return;
    }
    multiply_adapted(forward, layer, matrix, low, x, NULL, forward->at.added, SET, worker, phase);
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase + 2, forward->rows, 1)) >= 0; done++)
        add_row(forward, layer, norm, scale, is_last, forward->at.added + row * size, forward->hidden + row * size);
    finish_phase(worker, phase + 2, done, forward->rows);
}

#include "experts.inc.h"
#include "latent.inc.h"
#include "streams.inc.h"

/* Normalizes the queries of all heads together, and the keys. */
static void normalize_qk(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Group *group = forward->group;
    const int64_t queries = group->heads * layer->head_dim, keys = layer->kv_heads * layer->head_dim;
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase, forward->rows, 1)) >= 0; done++) {
        float *heads = forward->at.heads + row * row_heads(group, layer) * layer->head_dim;
        forward->level->normalize(&layer->qk, 0, heads, (float)group->eps, queries, heads);
        if (!layer->reads_kv)
            forward->level->normalize(&layer->qk, queries, heads + queries, (float)group->eps, keys, heads + queries);
    }
    finish_phase(worker, phase, done, forward->rows);
}

/* All segments are single tokens: their keys and values are written by the piece that attends to them. */
static bool only_decodes(const Forward *forward)
{
    return forward->num_bundles == forward->rows && forward->pieces == 1;
}

/* The sequence's pages in this layer. */
static Pages pages_of(const Forward *forward, const Layer *layer, int64_t segment)
{
    const Memory *pages = &forward->segments[segment].pages;
    const int64_t stride = pages->bytes / (int64_t)sizeof(int32_t) / forward->group->kv_rows;
    return (Pages){(const int32_t *)pages->data + layer->kv_row * stride, stride};
}

/* The row's cosines and sines of a rotation by number; NULL for 0. */
static const float *rotation_of(const Forward *forward, int64_t number, int64_t row)
{
    return number ? forward->rotations + ((number - 1) * forward->rows + row) * forward->group->head_dim : NULL;
}

static void write_kv_of_row(const Forward *forward, const Layer *layer, int64_t row, int64_t kv_head)
{
    const Group *group = forward->group;
    const Place *place = &forward->at.places[row];
    float *heads = forward->at.heads + row * row_heads(group, layer) * layer->head_dim;
    const float *const rotations[] = {rotation_of(forward, layer->query_rotation, row), rotation_of(forward, layer->key_rotation, row)};
    forward->level->write_kv(group, layer, pages_of(forward, layer, place->segment), kv_head, place->position, place->is_last,
                             rotations, heads);
}

static void write_kv(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const int64_t kv_heads = layer->kv_heads;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, forward->rows, kv_heads)) >= 0; done++)
        write_kv_of_row(forward, layer, piece / kv_heads, piece % kv_heads);
    finish_phase(worker, phase, done, forward->rows * kv_heads);
}

static Queries queries_of(const Forward *forward, const Layer *layer, const Bundle *bundle, int64_t kv_head)
{
    const Group *group = forward->group;
    const int64_t row = bundle->first_row, shared = group->heads / layer->kv_heads;
    const Segment *segment = &forward->segments[bundle->segment];
    return (Queries){
        .pages = pages_of(forward, layer, bundle->segment),
        .first_position = forward->at.places[row].position,
        .end = group->bidirectional ? segment->position + segment->length : 0,
        .rows = bundle->rows,
        .kv_head = kv_head,
        .heads = forward->at.heads + row * row_heads(group, layer) * layer->head_dim,
        .attended = forward->at.attended + row * group->heads * layer->head_dim,
        .piece = bundle->piece,
        /* Those of the rows before come first, and those of a piece's heads follow each other. */
        .pieces = forward->at.pieces + ((row * forward->pieces + larger(0, bundle->piece - 1) * bundle->rows) * group->heads +
                                        kv_head * shared * bundle->rows) * attended_floats(layer->head_dim),
    };
}

static void attend(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Group *group = forward->group;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, forward->num_bundles, layer->kv_heads)) >= 0; done++) {
        const Bundle *bundle = &forward->at.bundles[piece / layer->kv_heads];
        const int64_t kv_head = piece % layer->kv_heads;
        if (only_decodes(forward))
            write_kv_of_row(forward, layer, bundle->first_row, kv_head);
        const Queries queries = queries_of(forward, layer, bundle, kv_head);
        forward->level->attend(group, layer, &queries, worker->scratch);
    }
    finish_phase(worker, phase, done, forward->num_bundles * layer->kv_heads);
}

static void merge_pieces(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Group *group = forward->group;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, forward->num_bundles, layer->kv_heads)) >= 0; done++) {
        const Bundle *bundle = &forward->at.bundles[piece / layer->kv_heads];
        if (bundle->pieces < 2)
            continue;
        const Queries queries = queries_of(forward, layer, bundle, piece % layer->kv_heads);
        forward->level->merge_pieces(group, layer, &queries, bundle->pieces, bundle->rows * group->heads * attended_floats(layer->head_dim));
    }
    finish_phase(worker, phase, done, forward->num_bundles * layer->kv_heads);
}

static void mix_by_attention(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    if (layer->latent.bytes)
        project_latent(forward, layer, worker, phase);
    else
        multiply_adapted(forward, layer, &layer->qkv, offsetof(AdapterLayer, qkv), forward->hidden, &layer->before_attention,
                         forward->at.heads, SET, worker, phase + PACK_QKV);
    if (layer->qk_as_one)
        normalize_qk(forward, layer, worker, phase + NORMALIZE_QK);
    if (!only_decodes(forward))
        write_kv(forward, layer, worker, phase + WRITE_KV);
    attend(forward, layer, worker, phase + ATTEND);
    if (forward->pieces > 1)
        merge_pieces(forward, layer, worker, phase + MERGE);
    if (layer->latent.bytes)
        expand_values(forward, layer, worker, phase);
}

/* hidden += norm(out(activation(gate hidden) * inputs of the layer)). */
static void add_input(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const int64_t number = layer - (const Layer *)forward->group->layers.data;
    const Task task = {.level = forward->level, .matrix = &layer->input_gate, .layer = layer, .x = forward->hidden, .rows = forward->rows,
                       .given = forward->inputs + number * forward->rows * forward->group->input_size, .y = forward->at.inner};
    run_product(&task, &forward->at, worker, phase + PACK_INPUT);
    if (forward->streams) {
        multiply(forward, &layer->input_out, forward->at.inner, NULL, forward->at.added, SET, worker, phase + PACK_INPUT_OUT);
        add_to_streams(forward, layer, worker, phase + ADD_INPUT);
        return;
    }
    add_product(forward, layer, &layer->input_out, NOT_ADAPTED, forward->at.inner, &layer->after_input, 1, true, worker,
                phase + PACK_INPUT_OUT);
}

/* One thread's share of a pass. */
static void forward_layers(void *argument, int64_t number)
{
    const Forward *forward = argument;
    const Workspace *at = &forward->at;
    const Worker worker = worker_of(at, forward->threads, number);
    int64_t phase = 0; /* the layer's first */
    for (int64_t i = 0; i < forward->group->num_layers; i++, phase += PHASES) {
        const Layer *layer = (const Layer *)forward->group->layers.data + i;
        const Recurrent *recurrent = &layer->recurrent;
        const bool has_mlp = layer->up.weights.bytes, has_input = layer->input_gate.weights.bytes;
        const bool goes_on = has_mlp || layer->experts.bytes || has_input;
        if (forward->repeats) {
            if (recurrent->kind)
                update_states(forward, layer, &worker, phase);
            continue;
        }
        if (forward->streams) {
            predict_streams(forward, layer, &worker, phase + PREDICT);
            project_beside(forward, layer, &worker, phase);
        }
        if (has_attention(layer))
            mix_by_attention(forward, layer, &worker, phase);
        if (recurrent->kind)
            mix_recurrently(forward, layer, &worker, phase);
        if (layer->parallel && has_mlp) /* before the hidden states change */
            feed_forward(forward, layer, &worker, phase);
        if (has_attention(layer))
            add_product(forward, layer, &layer->out, layer->latent.bytes ? NOT_ADAPTED : offsetof(AdapterLayer, out),
                        layer->latent.bytes ? at->values : at->attended, &layer->after_attention, layer->attention_scale,
                        !goes_on && !recurrent->kind, &worker, phase + PACK_OUT);
        if (recurrent->kind)
            add_product(forward, layer, &recurrent->out, NOT_ADAPTED, at->recurrent_outputs, &layer->after_attention, recurrent->out_scale,
                        !goes_on, &worker, phase + PACK_OUTPUTS);
        if (forward->streams)
            add_beside(forward, layer, &worker, phase + ADD_BESIDE);
        if (layer->experts.bytes)
            run_experts(forward, layer, !has_input, &worker, phase);
        else if (has_mlp) {
            if (!layer->parallel)
                feed_forward(forward, layer, &worker, phase);
            add_product(forward, layer, &layer->down, offsetof(AdapterLayer, down), at->inner, &layer->after_mlp, layer->mlp_scale, !has_input,
                        &worker, phase + PACK_DOWN);
        }
        if (forward->streams)
            correct_streams(forward, layer, &worker, phase + CORRECT);
        if (has_input)
            add_input(forward, layer, &worker, phase);
    }
}

/* Pieces in which a row's attention is computed: 1 if there are enough bundles and heads to keep all threads busy. */
static int64_t pieces_of_attention(const Forward *forward, int64_t most_tokens)
{
    const Layer *layers = forward->group->layers.data;
    int64_t bundles = 0, row = 0, kv_heads = forward->group->heads; /* the fewest of a layer */
    for (int64_t i = 0; i < forward->group->num_layers; i++)
        kv_heads = has_attention(&layers[i]) ? smaller(kv_heads, layers[i].kv_heads) : kv_heads;
    for (const Segment *segment = forward->segments; row < forward->rows; row += segment++->length)
        bundles += (segment->length + LAMINA_QUERIES - 1) / LAMINA_QUERIES;
    return bundles * kv_heads >= ENOUGH_PIECES * forward->threads
               ? 1
               : most_pieces(forward->rows, most_tokens, forward->threads);
}

/* Gathers the rows of each adapter within every 16 rows of the pass, up to LAMINA_TILE_ROWS at a time. */
static void gather_adapted(Forward *forward)
{
    const Place *places = forward->at.places;
    for (int64_t window = 0; window < forward->rows; window += 16) {
        AdaptedRows *to = forward->at.adapted + window;
        memset(to, 0, 16 * sizeof *to);
        for (int64_t row = window; row < smaller(forward->rows, window + 16); row++) {
            const int64_t adapter = forward->segments[places[row].segment].adapter;
            if (!adapter)
                continue;
            AdaptedRows *own = to;
            while (own->adapter && (own->adapter != adapter || own->count == LAMINA_TILE_ROWS))
                own++;
            own->adapter = adapter;
            own->rows[own->count++] = row;
        }
    }
}

void run_pass(Pool *pool, const Group *group, const Pass *pass, int64_t most_tokens)
{
    Forward forward = {
        .level = lamina_chosen_level(),
        .group = group,
        .segments = pass->segments.data,
        .rotations = pass->rotations.data,
        .hidden = pass->hidden.data,
        .inputs = pass->inputs.data,
        .rows = pass->rows,
        .threads = pass->threads,
        .repeats = pass->repeats,
        .at = pass_workspace(group, pass->rows, most_tokens, pass->threads, pass->workspace.data),
    };
    if (group->streams) {
        forward.streams = forward.hidden;
        forward.hidden = forward.at.first;
    }
    forward.pieces = pieces_of_attention(&forward, most_tokens);
    int64_t row = 0;
    for (int64_t number = 0; row < pass->rows; number++) {
        const Segment *segment = &forward.segments[number];
        forward.at.first_rows[forward.num_segments++] = row;
        for (int64_t token = 0; token < segment->length; token++)
            forward.at.places[row + token] = (Place){number, segment->position + token, token == segment->length - 1};
        for (int64_t token = 0; token < segment->length; token += LAMINA_QUERIES) {
            const int64_t rows = smaller(LAMINA_QUERIES, segment->length - token);
            const int64_t end = segment->position + (group->bidirectional ? segment->length : token + rows);
            const int64_t pieces = forward.pieces == 1 ? 1 : (end + LAMINA_SPLIT_TOKENS - 1) / LAMINA_SPLIT_TOKENS;
            for (int64_t piece = 0; piece < pieces; piece++)
                forward.at.bundles[forward.num_bundles++] =
                    (Bundle){number, row + token, rows, pieces == 1 ? 0 : piece + 1, piece ? 0 : pieces};
        }
        row += segment->length;
        forward.adapts |= segment->adapter && group->low_floats; /* else its share of this group is empty */
    }
    if (forward.adapts)
        gather_adapted(&forward);
    memset(forward.at.counters, 0, (size_t)forward.at.counters_bytes);
    pool_run(pool, pass->threads, forward_layers, &forward);
}

/* A product outside the layers. */
typedef struct {
    Task task;
    Workspace at;
    int64_t threads;
} ProductRun;

static void run_share_of_product(void *argument, int64_t number)
{
    const ProductRun *run = argument;
    const Worker worker = worker_of(&run->at, run->threads, number);
    run_product(&run->task, &run->at, &worker, 0);
}

void run_matrix(Pool *pool, const Product *product)
{
    ProductRun run = {
        .task = {.level = lamina_chosen_level(), .matrix = &product->matrix, .x = product->x.data, .rows = product->rows,
                 .y = product->y.data},
        .at = product_workspace(&product->matrix, product->rows, product->threads, product->workspace.data),
        .threads = product->threads,
    };
    memset(run.at.counters, 0, (size_t)run.at.counters_bytes);
    pool_run(pool, product->threads, run_share_of_product, &run);
}

/* Tokens that are drawn together. */
typedef struct {
    Draw *draws;
    int64_t count;
    Workspace at;
    int64_t threads;
} DrawRun;

static void run_share_of_draws(void *argument, int64_t number)
{
    const DrawRun *run = argument;
    const Worker worker = worker_of(&run->at, run->threads, number);
    int64_t done = 0, piece;
    for (; (piece = take_piece(&worker, 0, run->count, 1)) >= 0; done++)
        run->draws[piece].token = lamina_chosen_level()->draw(&run->draws[piece], worker.scratch);
    finish_phase(&worker, 0, done, run->count);
}

void run_draws(Pool *pool, const Draws *draws)
{
    Draw *all = draws->draws.data;
    DrawRun run = {all, draws->draws.bytes / (int64_t)sizeof(Draw),
                   draw_workspace(all->logits.bytes / 4, draws->threads, draws->workspace.data), draws->threads};
    memset(run.at.counters, 0, (size_t)run.at.counters_bytes);
    pool_run(pool, draws->threads, run_share_of_draws, &run);
}
