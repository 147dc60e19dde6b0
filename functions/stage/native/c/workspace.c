#include "forward.h"

/* Takes the next `bytes` of a workspace, on cache lines of their own. */
static void *taken(Workspace *workspace, uint8_t *memory, int64_t bytes)
{
    void *at = memory ? memory + workspace->bytes : NULL;
    workspace->bytes += rounded_up(bytes, LAMINA_LINE_BYTES);
    return at;
}

int64_t matrix_scratch_bytes(int64_t width, int64_t row_bytes)
{
    return FEW_ROWS * LAMINA_TILE_OUTS * 4 + (LAMINA_TILE_ROWS + 1) * rounded_up(width, LAMINA_STEP) * 4 + FEW_ROWS * row_bytes;
}

/* Memory for rows that all threads pack together. */
static void take_packed(Workspace *workspace, uint8_t *memory, int64_t rows, int64_t row_bytes)
{
    rows = rows <= FEW_ROWS ? 0 : rounded_up(rows, 16);
    workspace->scales = taken(workspace, memory, rows * LAMINA_TILE_OUTS * 4);
    workspace->packed = taken(workspace, memory, rows * row_bytes);
}

MatrixScratch matrix_scratch(const Matrix *matrix, uint8_t *scratch)
{
    MatrixScratch parts = {.scales = (float *)scratch};
    parts.normalized = parts.scales + FEW_ROWS * LAMINA_TILE_OUTS;
    parts.ordered = parts.normalized + LAMINA_TILE_ROWS * rounded_up(matrix->width, LAMINA_STEP);
    parts.packed = (uint8_t *)(parts.ordered + rounded_up(matrix->width, LAMINA_STEP));
    return parts;
}

/* Addresses of pages, packed queries, their results of one piece and of all, and their scores (`attention.inc.h`). */
static int64_t attention_scratch_bytes(const Group *group, int64_t most_tokens)
{
    int64_t tokens = smaller(LAMINA_SPLIT_TOKENS, rounded_up(most_tokens, LAMINA_BLOCK_TOKENS));
    return LAMINA_PIECE_PAGES * (int64_t)sizeof(void *) +
           LAMINA_QUERIES * 4 * (rounded_up(group->head_dim, LAMINA_STEP) + 2 * attended_floats(group->head_dim) + tokens);
}

int64_t most_pieces(int64_t rows, int64_t most_tokens, int64_t threads)
{
    return rows > FEW_ROWS || threads == 1 ? 1 : (most_tokens + LAMINA_SPLIT_TOKENS - 1) / LAMINA_SPLIT_TOKENS;
}

/* Memory for rows that experts compute. */
static void take_routed(Workspace *workspace, const Group *group, int64_t rows, uint8_t *memory)
{
    const int64_t choices = rows * group->most_chosen, places = choices + 15 * smaller(choices, group->most_experts);
    workspace->routed_bytes = packed_row_bytes(LAMINA_F32, larger(group->hidden_size, group->expert_size));
    workspace->logits = taken(workspace, memory, rows * (group->most_experts + 1) * 4);
    workspace->chosen = taken(workspace, memory, choices * 4);
    workspace->weights = taken(workspace, memory, choices * 4);
    workspace->routing = taken(workspace, memory, group->num_layers * (int64_t)sizeof(Routing));
    workspace->routes = taken(workspace, memory, group->most_experts * (int64_t)sizeof(Route));
    workspace->routed_rows = taken(workspace, memory, choices * 4);
    workspace->routed_weights = taken(workspace, memory, choices * 4);
    workspace->routed_scales = taken(workspace, memory, places * LAMINA_TILE_OUTS * 4);
    workspace->routed_packed = taken(workspace, memory, places * workspace->routed_bytes);
    workspace->routed_inner = taken(workspace, memory, choices * group->expert_size * 4);
    workspace->routed_times = taken(workspace, memory, choices * group->expert_size * 4);
    workspace->expert_out = taken(workspace, memory, rows * group->hidden_size * 4);
    workspace->mixed = taken(workspace, memory, rows * group->hidden_size * 4);
}

Workspace pass_workspace(const Group *group, int64_t rows, int64_t most_tokens, int64_t threads, uint8_t *memory)
{
    Workspace workspace = {0};
    int64_t widest = larger(larger(group->hidden_size, larger(group->inner_size, group->expert_size)), group->heads * group->head_dim);
    widest = larger(widest, group->recurrent_outputs);
    const bool has_latents = group->latent_outs;
    widest = larger(larger(widest, group->latent_outs), group->heads * larger(group->query_size, group->value_size));
    workspace.heads = taken(&workspace, memory, rows * group->row_numbers * 4);
    workspace.attended = taken(&workspace, memory, rows * group->heads * group->head_dim * 4);
    workspace.down = taken(&workspace, memory, rows * group->latent_outs * 4);
    workspace.queries = taken(&workspace, memory, has_latents ? rows * group->heads * group->query_size * 4 : 0);
    workspace.values = taken(&workspace, memory, has_latents ? rows * group->heads * group->value_size * 4 : 0);
    workspace.inner = taken(&workspace, memory, rows * group->inner_size * 4);
    workspace.times = taken(&workspace, memory, rows * group->inner_size * 4);
    workspace.recurrent_inputs = taken(&workspace, memory, rows * group->recurrent_inputs * 4);
    workspace.recurrent_outputs = taken(&workspace, memory, rows * group->recurrent_outputs * 4);
    workspace.steps = taken(&workspace, memory, rows * 2 * group->recurrent_heads * 4);
    workspace.first_rows = taken(&workspace, memory, rows * (int64_t)sizeof(int64_t));
    workspace.first = taken(&workspace, memory, group->streams ? rows * group->hidden_size * 4 : 0);
    workspace.beside = taken(&workspace, memory, group->streams ? rows * group->hidden_size * 4 : 0);
    workspace.added = taken(&workspace, memory, rows * group->hidden_size * 4);
    take_packed(&workspace, memory, rows, packed_row_bytes(LAMINA_F32, widest));
    workspace.places = taken(&workspace, memory, rows * (int64_t)sizeof(Place));
    const int64_t pieces = most_pieces(rows, most_tokens, threads);
    workspace.bundles = taken(&workspace, memory, rows * pieces * (int64_t)sizeof(Bundle));
    workspace.pieces = taken(&workspace, memory, pieces == 1 ? 0 : rows * pieces * group->heads * attended_floats(group->head_dim) * 4);
    if (group->expert_size)
        take_routed(&workspace, group, rows, memory);
    workspace.adapted = taken(&workspace, memory, group->low_floats ? rounded_up(rows, 16) * (int64_t)sizeof(AdaptedRows) : 0);
    workspace.low = taken(&workspace, memory, rows * group->low_floats * 4);
    workspace.counters_bytes = group->num_layers * PHASES * (threads + 1) * (int64_t)sizeof(Counter);
    workspace.counters = taken(&workspace, memory, workspace.counters_bytes);
    workspace.scratch_bytes = rounded_up(
        larger(matrix_scratch_bytes(widest, packed_row_bytes(LAMINA_F32, widest)) +
                   (has_latents ? FEW_ROWS * 4 * larger(group->head_dim, group->value_size) : 0), /* of one head's product */
               attention_scratch_bytes(group, most_tokens)),
        LAMINA_LINE_BYTES);
    workspace.scratch = taken(&workspace, memory, threads * workspace.scratch_bytes);
    return workspace;
}

Workspace product_workspace(const Matrix *matrix, int64_t rows, int64_t threads, uint8_t *memory)
{
    Workspace workspace = {0};
    take_packed(&workspace, memory, rows, packed_row_bytes(matrix->dtype, matrix->width));
    workspace.counters_bytes = PHASES * (threads + 1) * (int64_t)sizeof(Counter);
    workspace.counters = taken(&workspace, memory, workspace.counters_bytes);
    workspace.scratch_bytes =
        rounded_up(matrix_scratch_bytes(matrix->width, packed_row_bytes(matrix->dtype, matrix->width)), LAMINA_LINE_BYTES);
    workspace.scratch = taken(&workspace, memory, threads * workspace.scratch_bytes);
    return workspace;
}

Workspace draw_workspace(int64_t vocabulary, int64_t threads, uint8_t *memory)
{
    Workspace workspace = {0};
    workspace.counters_bytes = (threads + 1) * (int64_t)sizeof(Counter);
    workspace.counters = taken(&workspace, memory, workspace.counters_bytes);
    /* For each token a key of 8 bytes, a score, a weight and a token id (`sampler.inc.h`). */
    workspace.scratch_bytes = rounded_up(20 * rounded_up(vocabulary, 16), LAMINA_LINE_BYTES);
    workspace.scratch = taken(&workspace, memory, threads * workspace.scratch_bytes);
    return workspace;
}
