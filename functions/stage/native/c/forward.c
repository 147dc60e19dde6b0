/* A pass: the layers of a group, from top to bottom as the model has them, run by several threads together.

   A layer is a few phases, in each of which the threads share the work piece by piece (`sharing.h`). Small operators (norms,
   packing) are done by each thread for the pieces that it takes, so that nobody waits for them. */

#include "forward.h"

#include "pool.h"
#include "workspace.h"

/* Of weights in a piece of work: some microseconds. */
enum { UNIT_BYTES = 98304 };

enum { SET, ADD };

/* What the threads of a pass have in common. */
typedef struct {
    const Level *level;
    const Group *group;
    const Segment *segments;
    const float *rotations;
    float *hidden;
    int64_t rows;
    int64_t threads;
    int64_t num_bundles;
    Workspace at;
} Run;

/* How a product is cut into pieces: blocks of rows and, of each, units of outputs. */
typedef struct {
    int64_t blocks, block_rows;
    int64_t units, unit_outs;
} Pieces;

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

/* A thread keeps to its blocks where there are several, which are in its cache then. */
static int64_t take_of_product(const Worker *worker, int64_t phase, const Pieces *pieces)
{
    return pieces->blocks == 1 ? take_piece(worker, phase, pieces->units, 1)
                               : take_piece(worker, phase, pieces->blocks, pieces->units);
}

typedef struct {
    const Level *level;
    const Matrix *matrix;
    const Matrix *up;   /* NULL, or what silu of the matrix's product is multiplied with */
    const float *x;     /* [rows, width] */
    const Memory *gain; /* of the norm that x goes through, or NULL */
    float eps;
    int64_t rows;
    int add;
    float *y; /* [rows, outs] */
} Task;

/* Rows from `row` on, 16 of them or fewer, through the norm where there is one, as the matrix wants them. */
static void pack_rows(const Task *task, int64_t row, int64_t rows, float *normalized, float *scales, uint8_t *packed)
{
    const Matrix *matrix = task->matrix;
    const int64_t row_bytes = packed_row_bytes(matrix->dtype, matrix->width);
    for (int64_t i = 0; i < rows; i++) {
        const float *numbers = task->x + (row + i) * matrix->width;
        if (task->gain) {
            task->level->normalize(numbers, task->gain->data, task->eps, matrix->width, normalized);
            numbers = normalized;
        }
        float scale = task->level->pack((Dtype)matrix->dtype, numbers, matrix->width, packed + i * row_bytes);
        for (int out = 0; out < LAMINA_TILE_OUTS; out++)
            scales[i * LAMINA_TILE_OUTS + out] = scale;
    }
    if (task->level->arrange && task->rows > 1)
        task->level->arrange((Dtype)matrix->dtype, rows, row_bytes, packed);
}

static Rows packed_alone(const Task *task, const Worker *worker)
{
    MatrixScratch scratch = matrix_scratch(task->matrix, worker->scratch);
    pack_rows(task, 0, task->rows, scratch.normalized, scratch.scales, scratch.packed);
    return (Rows){scratch.packed, scratch.scales, task->rows, packed_row_bytes(task->matrix->dtype, task->matrix->width),
                  task->rows > 1};
}

/* A whole phase, whose pieces are 16 rows each. */
static Rows packed_together(const Task *task, const Workspace *at, const Worker *worker, int64_t phase)
{
    const int64_t row_bytes = packed_row_bytes(task->matrix->dtype, task->matrix->width), pieces = (task->rows + 15) / 16;
    float *normalized = matrix_scratch(task->matrix, worker->scratch).normalized;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, pieces, 1)) >= 0; done++)
        pack_rows(task, piece * 16, smaller(16, task->rows - piece * 16), normalized, at->scales + piece * 16 * LAMINA_TILE_OUTS,
                  at->packed + piece * 16 * row_bytes);
    finish_phase(worker, phase, done, pieces);
    return (Rows){at->packed, at->scales, task->rows, row_bytes, true};
}

/* Two phases: y = x Wᵀ + b of all rows. */
static void run_product(const Task *task, const Workspace *at, const Worker *worker, int64_t phase)
{
    const Matrix *matrix = task->matrix;
    const Pieces pieces = pieces_of(task->rows, matrix, task->up ? 2 : 1);
    const Rows all = task->rows <= FEW_ROWS ? packed_alone(task, worker) : packed_together(task, at, worker, phase);
    int64_t done = 0, piece;
    for (; (piece = take_of_product(worker, phase + 1, &pieces)) >= 0; done++) {
        int64_t row = piece / pieces.units * pieces.block_rows, first = piece % pieces.units * pieces.unit_outs;
        int64_t last = smaller(matrix->outs, first + pieces.unit_outs);
        const Rows x = {all.data + row * all.row_bytes, all.scales + row * LAMINA_TILE_OUTS,
                        smaller(pieces.block_rows, all.rows - row), all.row_bytes, all.arranged};
        if (task->up)
            task->level->multiply_gated(matrix, task->up, &x, first, last, task->y + row * matrix->outs);
        else
            task->level->multiply(matrix, &x, first, last, task->add, task->y + row * matrix->outs);
    }
    finish_phase(worker, phase + 1, done, pieces.blocks * pieces.units);
}

static void multiply(const Run *run, const Matrix *matrix, const float *x, const Memory *gain, float *y, int add,
                     const Worker *worker, int64_t phase)
{
    Task task = {run->level, matrix, NULL, x, gain, (float)run->group->eps, run->rows, add, y};
    run_product(&task, &run->at, worker, phase);
}

static void multiply_gated(const Run *run, const Layer *layer, const float *x, float *inner, const Worker *worker,
                           int64_t phase)
{
    Task task = {run->level, &layer->gate, &layer->up, x, &layer->mlp_gain, (float)run->group->eps, run->rows, SET, inner};
    run_product(&task, &run->at, worker, phase);
}

/* Tokens of one each, whose keys and values are written right where they are attended to. */
static bool only_steps(const Run *run)
{
    return run->num_bundles == run->rows;
}

static void write_kv_of_row(const Run *run, const Layer *layer, int64_t row, int64_t kv_head)
{
    const Group *group = run->group;
    const Place *place = &run->at.places[row];
    float *heads = run->at.heads + row * (group->heads + 2 * group->kv_heads) * group->head_dim;
    run->level->write_kv(group, layer, kv_head, place->slot, place->is_last, run->rotations + row * group->head_dim, heads);
}

static void attend_bundle(const Run *run, const Layer *layer, int64_t number, int64_t kv_head, uint8_t *scratch)
{
    const Group *group = run->group;
    const Bundle *bundle = &run->at.bundles[number];
    if (only_steps(run))
        write_kv_of_row(run, layer, bundle->first_row, kv_head);
    Queries queries = {
        .segment = &run->segments[bundle->segment],
        .first_position = run->at.places[bundle->first_row].position,
        .rows = bundle->rows,
        .kv_head = kv_head,
        .heads = run->at.heads + bundle->first_row * (group->heads + 2 * group->kv_heads) * group->head_dim,
        .attended = run->at.attended + bundle->first_row * group->heads * group->head_dim,
    };
    run->level->attend(group, layer, &queries, scratch);
}

static void write_kv(const Run *run, const Layer *layer, const Worker *worker, int64_t phase)
{
    const int64_t kv_heads = run->group->kv_heads;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, run->rows, kv_heads)) >= 0; done++)
        write_kv_of_row(run, layer, piece / kv_heads, piece % kv_heads);
    finish_phase(worker, phase, done, run->rows * kv_heads);
}

static void attend(const Run *run, const Layer *layer, const Worker *worker, int64_t phase)
{
    const int64_t kv_heads = run->group->kv_heads;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, run->num_bundles, kv_heads)) >= 0; done++)
        attend_bundle(run, layer, piece / kv_heads, piece % kv_heads, worker->scratch);
    finish_phase(worker, phase, done, run->num_bundles * kv_heads);
}

/* phase: the layer's first. */
static void run_layer(const Run *run, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Workspace *at = &run->at;
    multiply(run, &layer->qkv, run->hidden, &layer->input_gain, at->heads, SET, worker, phase + PACK_QKV);
    if (!only_steps(run))
        write_kv(run, layer, worker, phase + WRITE_KV);
    attend(run, layer, worker, phase + ATTEND);
    multiply(run, &layer->out, at->attended, NULL, run->hidden, ADD, worker, phase + PACK_OUT);
    multiply_gated(run, layer, run->hidden, at->inner, worker, phase + PACK_GATED);
    multiply(run, &layer->down, at->inner, NULL, run->hidden, ADD, worker, phase + PACK_DOWN);
}

static Worker worker_of(const Workspace *at, int64_t number, int64_t threads)
{
    return (Worker){number, threads, at->counters, at->scratch + number * at->scratch_bytes};
}

/* What a thread does of a pass. */
static void run_layers(void *argument, int64_t number)
{
    const Run *run = argument;
    const Layer *layers = run->group->layers.data;
    const Worker worker = worker_of(&run->at, number, run->threads);
    for (int64_t layer = 0; layer < run->group->num_layers; layer++)
        run_layer(run, &layers[layer], &worker, layer * PHASES);
}

/* Fills in where each row is, and which rows' attention is computed together. */
static void lay_out(Run *run, int64_t num_segments)
{
    int64_t row = 0;
    for (int64_t number = 0; number < num_segments; number++) {
        const Segment *segment = &run->segments[number];
        for (int64_t token = 0; token < segment->length; token++) {
            int64_t position = segment->position + token;
            run->at.places[row + token] = (Place){segment->first_slot + position, position, token == segment->length - 1};
        }
        for (int64_t token = 0; token < segment->length; token += LAMINA_QUERIES)
            run->at.bundles[run->num_bundles++] =
                (Bundle){number, row + token, smaller(LAMINA_QUERIES, segment->length - token)};
        row += segment->length;
    }
}

void run_pass(Pool *pool, const Group *group, const Pass *pass, int64_t most_tokens)
{
    Run run = {
        .level = lamina_chosen_level(),
        .group = group,
        .segments = pass->segments.data,
        .rotations = pass->rotations.data,
        .hidden = pass->hidden.data,
        .rows = pass->rows,
        .threads = pass->threads,
        .at = pass_workspace(group, pass->rows, most_tokens, pass->threads, pass->workspace.data),
    };
    lay_out(&run, pass->segments.bytes / (int64_t)sizeof(Segment));
    memset(run.at.counters, 0, (size_t)run.at.counters_bytes);
    pool_run(pool, pass->threads, run_layers, &run);
}

typedef struct {
    Task task;
    Workspace at;
    int64_t threads;
} ProductRun;

static void run_share_of_product(void *argument, int64_t number)
{
    const ProductRun *run = argument;
    const Worker worker = worker_of(&run->at, number, run->threads);
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
