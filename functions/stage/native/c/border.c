/* The functions that Python calls. They check all arguments before any memory is touched. */

#include "forward.h"

enum { MOST = 1 << 20 }; /* largest size: products of three sizes stay far below 2^63 */
static const int64_t MOST_TOKENS = 1 << 30, MOST_STATES = 1LL << 36, MOST_PAGE = 1LL << 32;

static bool within(int64_t number, int64_t least, int64_t most)
{
    return number >= least && number <= most;
}

/* Memory has at least so many bytes, and its address is a multiple of `alignment`. */
static Status check_memory(const Memory *memory, int64_t bytes, int64_t alignment)
{
    if (!memory->data || memory->bytes < bytes)
        return LAMINA_SHORT_MEMORY;
    return (uintptr_t)memory->data % (uintptr_t)alignment ? LAMINA_UNALIGNED : LAMINA_OK;
}

static Status check_optional(const Memory *memory, int64_t bytes, int64_t alignment)
{
    return memory->bytes ? check_memory(memory, bytes, alignment) : LAMINA_OK;
}

#define CHECK(condition)                \
    do {                                \
        Status found = (condition);     \
        if (found != LAMINA_OK)         \
            return found;               \
    } while (0)

/* Parts of a block matrix follow each other and have whole groups, but for the last, and whole supers. */
static Status check_parts(const Matrix *matrix)
{
    int64_t first = 0;
    for (int part = 0; part < LAMINA_PARTS; part++) {
        const int64_t end = matrix->ends[part];
        if (!within(matrix->formats[part], 0, NUM_BLOCK_FORMATS - 1))
            return LAMINA_BAD_DTYPE;
        if (end > first && BLOCK_FORMATS[matrix->formats[part]].floats != (matrix->dtype == LAMINA_FLOAT_BLOCKS))
            return LAMINA_BAD_DTYPE;
        if (!within(end, first, matrix->outs) || (end % LAMINA_GROUP_OUTS && end < matrix->outs))
            return LAMINA_BAD_SIZE;
        if (end > first && matrix->width % (LAMINA_BLOCK * BLOCK_FORMATS[matrix->formats[part]].blocks))
            return LAMINA_BAD_SIZE;
        first = end;
    }
    return first == matrix->outs ? LAMINA_OK : LAMINA_BAD_SIZE;
}

static Status check_matrix(const Matrix *matrix)
{
    if (!within(matrix->dtype, LAMINA_BF16, LAMINA_FLOAT_BLOCKS))
        return LAMINA_BAD_DTYPE;
    if (!within(matrix->outs, 1, MOST) || !within(matrix->width, 1, MOST))
        return LAMINA_BAD_SIZE;
    if (in_blocks(matrix->dtype))
        CHECK(check_parts(matrix));
    int64_t alignment = matrix->dtype == LAMINA_Q4 || in_blocks(matrix->dtype) ? 2 : bytes_of(matrix->dtype);
    CHECK(check_memory(&matrix->weights, weight_bytes(matrix, matrix->outs), alignment));
    if (matrix->dtype == LAMINA_INT8)
        CHECK(check_memory(&matrix->scales, matrix->outs * 4, 4));
    CHECK(check_optional(&matrix->order, matrix->width * 4, 4));
    return check_optional(&matrix->biases, matrix->outs * 4, 4);
}

static Status check_shape(const Matrix *matrix, int64_t outs, int64_t width)
{
    return matrix->outs == outs && matrix->width == width ? check_matrix(matrix) : LAMINA_BAD_MATRIX;
}

static Status check_sizes(const Group *group)
{
    if (!within(group->num_layers, 1, MOST) || !within(group->hidden_size, 1, MOST) || !within(group->inner_size, 1, MOST))
        return LAMINA_BAD_SIZE;
    if (!within(group->expert_size, 0, MOST) || !within(group->most_experts, 0, LAMINA_MOST_EXPERTS) ||
        !within(group->most_chosen, 0, group->most_experts))
        return LAMINA_BAD_SIZE;
    if (!within(group->heads, 1, MOST) || !within(group->page_bytes, 1, MOST_PAGE) || group->page_bytes % 4)
        return LAMINA_BAD_SIZE;
    if (!within(group->head_dim, 2, LAMINA_MOST_HEAD) || group->head_dim % 2)
        return LAMINA_BAD_SIZE;
    if (!within(group->row_numbers, 1, MOST) || !within(group->heads * group->head_dim, 1, MOST))
        return LAMINA_BAD_SIZE;
    if (!within(group->latent_outs, 0, MOST) || !within(group->query_size, 0, MOST) || !within(group->value_size, 0, MOST))
        return LAMINA_BAD_SIZE;
    if (!within(group->heads * larger(group->query_size, group->value_size), 0, MOST))
        return LAMINA_BAD_SIZE;
    if (!within(group->num_pages, 1, INT32_MAX) || !within(group->rotations, 0, 16))
        return LAMINA_BAD_SIZE;
    if (!(group->eps >= 0 && group->eps < 1))
        return LAMINA_BAD_SIZE;
    if (!within(group->rounds, 0, 1) || !within(group->bidirectional, 0, 1) || !within(group->low_floats, 0, MOST))
        return LAMINA_BAD_SIZE;
    if (!within(group->kv_rows, 0, MOST) || !within(group->input_size, 0, group->inner_size))
        return LAMINA_BAD_SIZE;
    if (!within(group->streams, 0, LAMINA_MOST_STREAMS) || !within(group->hidden_size * larger(1, group->streams), 1, MOST))
        return LAMINA_BAD_SIZE;
    if (!within(group->recurrent_inputs, 0, MOST) || !within(group->recurrent_outputs, 0, MOST) || !within(group->recurrent_heads, 0, MOST))
        return LAMINA_BAD_SIZE;
    if (!within(group->state_values, 0, MOST_STATES) || !within(group->kept_values, 0, MOST_STATES))
        return LAMINA_BAD_SIZE;
    return within(group->kv_dtype, LAMINA_BF16, LAMINA_F32) ? LAMINA_OK : LAMINA_BAD_DTYPE;
}

static Status check_norm(const Norm *norm, int64_t size)
{
    if (!within(norm->kind, LAMINA_NO_NORM, LAMINA_LAYER_NORM))
        return LAMINA_BAD_SIZE;
    if (norm->kind == LAMINA_NO_NORM)
        return LAMINA_OK;
    CHECK(check_memory(&norm->gain, size * 4, 4));
    return check_optional(&norm->biases, size * 4, 4);
}

static bool is_finite(double number)
{
    return number - number == 0;
}

static Status check_numbers(const Group *group, const Layer *layer)
{
    if (!within(layer->window, 0, INT64_MAX) || !within(layer->ring, 0, MOST) || !within(layer->parallel, 0, 1) ||
        !within(layer->gates, 0, 1))
        return LAMINA_BAD_SIZE;
    if (!within(layer->query_rotation, 0, group->rotations) || !within(layer->key_rotation, 0, group->rotations))
        return LAMINA_BAD_SIZE;
    if (!within(layer->qk_as_one, 0, layer->qk.kind != LAMINA_NO_NORM) || !within(layer->qk_rotated, 0, !layer->qk_as_one))
        return LAMINA_BAD_SIZE;
    if (!within(layer->activation, LAMINA_SILU, LAMINA_SWIGLU) || !is_finite(layer->score_cap))
        return LAMINA_BAD_SIZE;
    if (!within(layer->sparse, 0, 1) || !is_finite(layer->cutoff))
        return LAMINA_BAD_SIZE;
    if (layer->sparse && (layer->activation == LAMINA_SWIGLU || !layer->gate.weights.bytes || layer->gate_scale != 1))
        return LAMINA_BAD_SIZE;
    if (!is_finite(layer->attention_scale) || !is_finite(layer->mlp_scale) || !is_finite(layer->gate_scale) ||
        !is_finite(layer->output_scale))
        return LAMINA_BAD_SIZE;
    return is_finite(layer->score_scale) ? LAMINA_OK : LAMINA_BAD_SIZE;
}

/* activation(gate x) * (up x), or activation(up x) without a gate, and down, of rows of `size` and at most `most` inner numbers. */
static Status check_feed_forward(int64_t size, const Layer *layer, const Matrix *gate, const Matrix *up, const Matrix *down, int64_t most)
{
    if (!within(up->outs, 1, most))
        return LAMINA_BAD_SIZE;
    if (gate->weights.bytes)
        CHECK(check_shape(gate, up->outs, size));
    CHECK(check_shape(up, up->outs, size));
    CHECK(check_shape(down, size, up->outs));
    if (layer->activation == LAMINA_SWIGLU && !gate->weights.bytes)
        return LAMINA_BAD_SIZE;
    return !gate->weights.bytes || gate->dtype == up->dtype ? LAMINA_OK : LAMINA_BAD_DTYPE;
}

static Status check_router(const Group *group, const Experts *experts)
{
    if (!within(experts->num_experts, 1, group->most_experts) || !within(experts->chosen, 1, group->most_chosen))
        return LAMINA_BAD_SIZE;
    if (!within(experts->scores, LAMINA_SOFTMAX, LAMINA_SPARSE_MIX) || !within(experts->two_of_group, 0, 1) ||
        !within(experts->normalized, 0, 1) || !within(experts->shared_gate, 0, 1))
        return LAMINA_BAD_SIZE;
    if (!within(experts->groups, 1, experts->num_experts) || experts->num_experts % experts->groups ||
        !within(experts->chosen_groups, 1, experts->groups))
        return LAMINA_BAD_SIZE;
    const int64_t in_group = experts->num_experts / experts->groups;
    if (experts->chosen > in_group * experts->chosen_groups || in_group < 1 + experts->two_of_group)
        return LAMINA_BAD_SIZE;
    if (!is_finite(experts->normal_eps) || !is_finite(experts->scale) || !(experts->threshold >= 0))
        return LAMINA_BAD_SIZE;
    if (experts->scores == LAMINA_SPARSE_MIX && experts->chosen != 2)
        return LAMINA_BAD_SIZE;
    CHECK(check_shape(&experts->router, experts->num_experts + experts->shared_gate, group->hidden_size));
    CHECK(check_optional(&experts->correction, experts->num_experts * 4, 4));
    CHECK(check_optional(&experts->scales, experts->num_experts * 4, 4));
    CHECK(check_norm(&experts->before, group->hidden_size));
    CHECK(check_norm(&experts->before_router, group->hidden_size));
    CHECK(check_norm(&experts->after, group->hidden_size));
    CHECK(check_norm(&experts->after_shared, group->hidden_size));
    CHECK(check_memory(&experts->used, experts->num_experts * 8, 8));
    return experts->router.dtype == LAMINA_F32 ? LAMINA_OK : LAMINA_BAD_DTYPE;
}

static Status check_experts(const Group *group, const Layer *layer)
{
    if (!group->expert_size || layer->parallel)
        return LAMINA_BAD_SIZE;
    CHECK(check_memory(&layer->experts, sizeof(Experts), _Alignof(Experts)));
    const Experts *experts = layer->experts.data;
    CHECK(check_router(group, experts));
    int64_t size = group->hidden_size;
    if (experts->narrow.weights.bytes) {
        size = experts->narrow.outs;
        if (size > group->hidden_size)
            return LAMINA_BAD_SIZE;
        CHECK(check_shape(&experts->narrow, size, group->hidden_size));
        CHECK(check_shape(&experts->widen, group->hidden_size, size));
    }
    if (experts->used_at.bytes) {
        CHECK(check_memory(&group->budget, sizeof(Budget), _Alignof(Budget)));
        CHECK(check_memory(&experts->used_at, experts->num_experts * 8, 8));
    }
    CHECK(check_memory(&experts->experts, experts->num_experts * (int64_t)sizeof(Expert), _Alignof(Expert)));
    const Expert *all = experts->experts.data;
    for (int64_t i = 0; i < experts->num_experts; i++) {
        if (all[i].up.outs != all->up.outs || !all[i].gate.weights.bytes != !all->gate.weights.bytes)
            return LAMINA_BAD_MATRIX;
        CHECK(check_feed_forward(size, layer, &all[i].gate, &all[i].up, &all[i].down, group->expert_size));
    }
    return LAMINA_OK;
}

static Status check_matrices_of_heads(const Group *group, const Memory *matrices, int64_t outs, int64_t width)
{
    CHECK(check_memory(matrices, group->heads * (int64_t)sizeof(Matrix), _Alignof(Matrix)));
    for (int64_t head = 0; head < group->heads; head++)
        CHECK(check_shape((const Matrix *)matrices->data + head, outs, width));
    return LAMINA_OK;
}

static Status check_latent(const Group *group, const Layer *layer)
{
    CHECK(check_memory(&layer->latent, sizeof(Latent), _Alignof(Latent)));
    const Latent *latent = layer->latent.data;
    const bool from_latent = latent->queries.weights.bytes;
    if (!within(latent->rank, 1, MOST) || !within(latent->rope, 0, MOST) || !within(latent->nope, 1, MOST))
        return LAMINA_BAD_SIZE;
    if (layer->kv_heads != 1 || layer->head_dim != group->head_dim || layer->reads_kv || group->head_dim != latent->rank + latent->rope || group->query_size != latent->nope + latent->rope ||
        group->value_size != latent->value_size || layer->gates || layer->qk.kind || !(latent->eps >= 0 && latent->eps < 1))
        return LAMINA_BAD_SIZE;
    const int64_t queries = from_latent ? latent->queries.width : group->heads * group->query_size;
    if (!within(queries, 1, MOST) || queries + group->head_dim > group->latent_outs)
        return LAMINA_BAD_SIZE;
    CHECK(check_shape(&latent->down, queries + group->head_dim, group->hidden_size));
    if (from_latent) {
        CHECK(check_norm(&latent->query_norm, queries));
        CHECK(check_shape(&latent->queries, group->heads * group->query_size, queries));
    }
    CHECK(check_norm(&latent->norm, latent->rank));
    CHECK(check_matrices_of_heads(group, &latent->absorb, latent->rank, latent->nope));
    return check_matrices_of_heads(group, &latent->expand, latent->value_size, latent->rank);
}

/* The heads of a layer, and its rows of the tables of pages, whose pages they fit. */
static Status check_heads_of_layer(const Group *group, const Layer *layer)
{
    if (!within(layer->kv_heads, 1, group->heads) || group->heads % layer->kv_heads || !within(layer->reads_kv, 0, 1))
        return LAMINA_BAD_SIZE;
    if (!within(layer->head_dim, 2, group->head_dim) || layer->head_dim % 2)
        return LAMINA_BAD_SIZE;
    if (!within(row_heads(group, layer) * layer->head_dim, 1, group->row_numbers))
        return LAMINA_BAD_SIZE;
    if (!within(layer->kv_pages, 1, 2 * layer->kv_heads) || 2 * layer->kv_heads % layer->kv_pages ||
        2 * layer->kv_heads / layer->kv_pages * bytes_in_page(group, layer) > group->page_bytes)
        return LAMINA_BAD_SIZE;
    return within(layer->kv_row, 0, group->kv_rows - layer->kv_pages) ? LAMINA_OK : LAMINA_BAD_SIZE;
}

static Status check_attention(const Group *group, const Layer *layer)
{
    CHECK(check_heads_of_layer(group, layer));
    int64_t attended = group->heads * (layer->latent.bytes ? group->value_size : layer->head_dim);
    if (layer->ring && (group->bidirectional || !within(layer->window, 1, layer->ring * LAMINA_PAGE_TOKENS)))
        return LAMINA_BAD_SIZE;
    if (layer->latent.bytes)
        CHECK(check_latent(group, layer));
    else
        CHECK(check_shape(&layer->qkv, row_heads(group, layer) * layer->head_dim, group->hidden_size));
    CHECK(check_norm(&layer->qk, (group->heads + (layer->reads_kv ? 0 : layer->kv_heads)) * layer->head_dim));
    CHECK(check_norm(&layer->value, layer->head_dim));
    CHECK(check_optional(&layer->sinks, group->heads * 4, 4));
    return check_shape(&layer->out, group->hidden_size, attended);
}

/* Memory [size] from `at` on lies within [0, all). */
static bool lies_within(int64_t at, int64_t size, int64_t all)
{
    return within(at, 0, all) && size <= all - at;
}

static Status check_heads(const Group *group, const Recurrent *mixer)
{
    if (!within(mixer->groups, 1, MOST) || !within(mixer->heads, mixer->groups, group->recurrent_heads) || mixer->heads % mixer->groups)
        return LAMINA_BAD_SIZE;
    if (!within(mixer->key_size, 1, LAMINA_MOST_HEAD) || !within(mixer->head_size, 1, LAMINA_MOST_HEAD))
        return LAMINA_BAD_SIZE;
    const int64_t inner = mixer->heads * mixer->head_size, keys = mixer->groups * mixer->key_size;
    if (mixer->channels != inner + 2 * keys || !within(mixer->norm_parts, 1, inner) || inner % mixer->norm_parts)
        return LAMINA_BAD_SIZE;
    const int64_t row = mixer->in.outs;
    if (!lies_within(mixer->query_at, keys, row) || !lies_within(mixer->key_at, keys, row) || !lies_within(mixer->value_at, inner, row) ||
        !lies_within(mixer->gate_at, inner, row) || !within(mixer->gate_first, 0, 1) || !(mixer->eps >= 0 && mixer->eps < 1))
        return LAMINA_BAD_SIZE;
    if (!lies_within(mixer->matrix_at, inner * mixer->key_size, group->state_values))
        return LAMINA_BAD_SIZE;
    if (mixer->kind == LAMINA_DELTA)
        CHECK(check_shape(&mixer->steps, 2 * mixer->heads, group->hidden_size));
    else if (mixer->steps.weights.bytes || !lies_within(mixer->steps_at, mixer->heads, row))
        return LAMINA_BAD_SIZE;
    CHECK(check_memory(&mixer->rates, mixer->heads * 4, 4));
    CHECK(check_memory(&mixer->step_biases, mixer->heads * 4, 4));
    CHECK(check_optional(&mixer->skips, mixer->heads * 4, 4));
    CHECK(check_norm(&mixer->norm, inner));
    return check_shape(&mixer->out, group->hidden_size, inner);
}

static Status check_recurrent(const Group *group, const Recurrent *mixer)
{
    const bool is_short = mixer->kind == LAMINA_CONVOLUTION;
    if (!within(mixer->kind, LAMINA_CONVOLUTION, LAMINA_MAMBA) || !within(mixer->taps, 1, 64) || !within(mixer->channels, 1, MOST))
        return LAMINA_BAD_SIZE;
    if (!within(mixer->in.outs, 1, group->recurrent_inputs) || !within(mixer->out.width, 1, group->recurrent_outputs))
        return LAMINA_BAD_SIZE;
    if (!lies_within(mixer->channels_at, mixer->channels, mixer->in.outs) || !within(mixer->heads, 0, MOST))
        return LAMINA_BAD_SIZE;
    if (!is_finite(mixer->gate_scale) || !is_finite(mixer->step_scale) || !is_finite(mixer->out_scale))
        return LAMINA_BAD_SIZE;
    if (!lies_within(mixer->tail_at, (mixer->taps - 1) * mixer->channels, group->state_values) ||
        !lies_within(mixer->kept_at, mixer->channels + 2 * mixer->heads, group->kept_values))
        return LAMINA_BAD_SIZE;
    CHECK(check_shape(&mixer->in, mixer->in.outs, group->hidden_size));
    CHECK(check_memory(&mixer->kernel, mixer->taps * mixer->channels * 4, 4));
    CHECK(check_optional(&mixer->kernel_biases, mixer->channels * 4, 4));
    if (!is_short)
        return check_heads(group, mixer);
    if (mixer->channels != group->hidden_size || mixer->in.outs != 3 * group->hidden_size || mixer->heads || mixer->steps.weights.bytes)
        return LAMINA_BAD_SIZE;
    return check_shape(&mixer->out, group->hidden_size, group->hidden_size);
}

static Status check_streams(const Group *group, const Layer *layer)
{
    const int64_t count = group->streams, size = group->hidden_size;
    if (!layer->before_attention.kind || !layer->after_input.kind || !has_attention(layer) || layer->recurrent.kind || layer->experts.bytes || layer->parallel || !layer->up.weights.bytes ||
        !layer->input_gate.weights.bytes || layer->output_scale != 1)
        return LAMINA_BAD_SIZE;
    CHECK(check_memory(&layer->streams, sizeof(Streams), _Alignof(Streams)));
    const Streams *streams = layer->streams.data;
    if (!streams->after.kind)
        return LAMINA_BAD_SIZE;
    CHECK(check_shape(&streams->router, count, size));
    CHECK(check_norm(&streams->norm, size));
    CHECK(check_shape(&streams->predict, count * count, count));
    CHECK(check_shape(&streams->correct, count, count));
    if (streams->router.dtype != LAMINA_F32 || streams->predict.dtype != LAMINA_F32 || streams->correct.dtype != LAMINA_F32)
        return LAMINA_BAD_DTYPE;
    CHECK(check_memory(&streams->scale, size * 4, 4));
    if (!within(streams->narrow.outs, 1, group->inner_size))
        return LAMINA_BAD_SIZE;
    CHECK(check_shape(&streams->narrow, streams->narrow.outs, size));
    CHECK(check_shape(&streams->widen, size, streams->narrow.outs));
    return check_norm(&streams->after, size);
}

static Status check_layer(const Group *group, const Layer *layer)
{
    CHECK(check_numbers(group, layer));
    CHECK(check_norm(&layer->before_attention, group->hidden_size));
    CHECK(check_norm(&layer->after_attention, group->hidden_size));
    CHECK(check_norm(&layer->before_mlp, group->hidden_size));
    CHECK(check_norm(&layer->after_mlp, group->hidden_size));
    if (has_attention(layer))
        CHECK(check_attention(group, layer));
    if (layer->recurrent.kind)
        CHECK(check_recurrent(group, &layer->recurrent));
    if (layer->experts.bytes)
        CHECK(check_experts(group, layer));
    if (layer->input_gate.weights.bytes) {
        CHECK(check_shape(&layer->input_gate, group->input_size, group->hidden_size));
        CHECK(check_shape(&layer->input_out, group->hidden_size, group->input_size));
        CHECK(check_norm(&layer->after_input, group->hidden_size));
        if (layer->activation == LAMINA_SWIGLU)
            return LAMINA_BAD_SIZE;
    }
    if (group->streams)
        CHECK(check_streams(group, layer));
    if (!layer->up.weights.bytes) { /* a layer without any part was not placed */
        const bool has_another = has_attention(layer) || layer->recurrent.kind || layer->experts.bytes;
        return has_another && !layer->gate.weights.bytes && !layer->down.weights.bytes ? LAMINA_OK : LAMINA_SHORT_MEMORY;
    }
    return check_feed_forward(group->hidden_size, layer, &layer->gate, &layer->up, &layer->down, group->inner_size);
}

/* What an adapter adds to a matrix fits it. */
static Status check_low_rank(const LowRank *by, const Matrix *matrix)
{
    if (!by->a.bytes)
        return LAMINA_OK;
    if (by->dtype != LAMINA_BF16 && by->dtype != LAMINA_F32)
        return LAMINA_BAD_DTYPE;
    int64_t begin = 0, b_bytes = 0;
    for (int part = 0; part < LAMINA_LOW_PARTS; begin = by->ends[part++]) {
        if (!within(by->ranks[part], 0, MOST) || !within(by->ends[part], begin, matrix->outs) || !is_finite(by->scales[part]))
            return LAMINA_BAD_ADAPTER;
        b_bytes += low_rank_part_bytes(by->dtype, by->ranks[part], begin, by->ends[part]);
    }
    if (begin != matrix->outs)
        return LAMINA_BAD_ADAPTER;
    CHECK(check_memory(&by->a, low_rank_floats(by) / LAMINA_GROUP_OUTS * low_rank_group_bytes(by->dtype, matrix->width), 4));
    return check_memory(&by->b, b_bytes, 4);
}

static Status check_adapter(const Group *group, int64_t number)
{
    const int64_t bytes = group->num_layers * (int64_t)sizeof(AdapterLayer);
    if (!within(number, 1, group->adapters.bytes / bytes))
        return LAMINA_BAD_ADAPTER;
    CHECK(check_memory(&group->adapters, bytes, _Alignof(AdapterLayer)));
    const AdapterLayer *shares = (const AdapterLayer *)group->adapters.data + (number - 1) * group->num_layers;
    for (int64_t i = 0; i < group->num_layers; i++) {
        const Layer *layer = (const Layer *)group->layers.data + i;
        const AdapterLayer *share = shares + i;
        CHECK(check_low_rank(&share->qkv, &layer->qkv));
        CHECK(check_low_rank(&share->out, &layer->out));
        CHECK(check_low_rank(&share->gate, &layer->gate));
        CHECK(check_low_rank(&share->up, &layer->up));
        CHECK(check_low_rank(&share->down, &layer->down));
        const int64_t inner = low_rank_floats(&share->gate) + low_rank_floats(&share->up);
        if (larger(larger(low_rank_floats(&share->qkv), low_rank_floats(&share->out)), larger(inner, low_rank_floats(&share->down))) >
            group->low_floats)
            return LAMINA_BAD_ADAPTER;
    }
    return LAMINA_OK;
}

static Status check_group(const Group *group)
{
    CHECK(check_sizes(group));
    CHECK(check_memory(&group->layers, group->num_layers * (int64_t)sizeof(Layer), _Alignof(Layer)));
    CHECK(check_memory(&group->arena, group->num_pages * group->page_bytes, 4));
    const Layer *layers = group->layers.data;
    for (int64_t layer = 0; layer < group->num_layers; layer++)
        CHECK(check_layer(group, &layers[layer]));
    return LAMINA_OK;
}

/* The pages that a segment reads and writes are in the arena. A ring overwrites nothing that the segment's tokens attend to. */
static Status check_pages(const Group *group, const Segment *segment)
{
    const int64_t row_bytes = group->kv_rows * (int64_t)sizeof(int32_t), end = segment->position + segment->length;
    if (!group->kv_rows)
        return LAMINA_OK;
    CHECK(check_memory(&segment->pages, row_bytes, _Alignof(int32_t)));
    const int64_t pages = segment->pages.bytes / row_bytes;
    if (segment->pages.bytes % row_bytes || end > pages * LAMINA_PAGE_TOKENS)
        return LAMINA_BAD_SEGMENT;
    const Layer *layers = group->layers.data;
    for (int64_t layer = 0; layer < group->num_layers; layer++) {
        const int32_t *rows = (const int32_t *)segment->pages.data + layers[layer].kv_row * pages;
        const int64_t ring = layers[layer].ring;
        if (!has_attention(&layers[layer]))
            continue;
        if (ring && end > ring * LAMINA_PAGE_TOKENS && layers[layer].window + segment->length > ring * LAMINA_PAGE_TOKENS)
            return LAMINA_BAD_SEGMENT;
        for (int64_t number = 0; number < layers[layer].kv_pages; number++)
            for (int64_t page = 0; page < (ring ? smaller(ring, pages) : pages); page++)
                if (!within(rows[number * pages + page], 0, group->num_pages - 1))
                    return LAMINA_BAD_SEGMENT;
    }
    return LAMINA_OK;
}

static Status check_states(const Group *group, const Segment *segment, bool repeats)
{
    const int64_t copies = segment->copied_at.bytes / (int64_t)sizeof(int64_t);
    const int64_t kept = segment->kept.bytes / 4 / larger(1, group->kept_values), end = segment->position + segment->length;
    if (!group->kept_values)
        return LAMINA_OK;
    if (group->state_values) /* a convolution that covers one token has none */
        CHECK(check_memory(&segment->states, group->state_values * 4, 4));
    CHECK(check_optional(&segment->copied_at, 8, 8));
    if (copies)
        CHECK(check_memory(&segment->copies, copies * group->state_values * 4, 4));
    CHECK(check_optional(&segment->kept, 4, 4));
    if (!segment->kept.bytes)
        return repeats ? LAMINA_SHORT_MEMORY : LAMINA_OK;
    if (!within(segment->kept_from, 0, repeats ? segment->position : MOST_TOKENS))
        return LAMINA_BAD_SEGMENT;
    return end - segment->kept_from <= kept ? LAMINA_OK : LAMINA_SHORT_MEMORY;
}

/* Whether an earlier segment has the same adapter. */
static bool has_known_adapter(const Segment *segments, int64_t number)
{
    for (int64_t earlier = 0; earlier < number; earlier++)
        if (segments[earlier].adapter == segments[number].adapter)
            return true;
    return false;
}

/* Segments cover all rows and have pages for them. Raises most_tokens to the length of the longest sequence. */
static Status check_segments(const Group *group, const Pass *pass, int64_t *most_tokens)
{
    if (pass->segments.bytes % (int64_t)sizeof(Segment))
        return LAMINA_BAD_SEGMENT;
    CHECK(check_memory(&pass->segments, sizeof(Segment), _Alignof(Segment)));
    const Segment *segments = pass->segments.data;
    int64_t rows = 0;
    for (int64_t number = 0; number < pass->segments.bytes / (int64_t)sizeof(Segment); number++) {
        const Segment *segment = &segments[number];
        if (!within(segment->position, 0, MOST_TOKENS) || !within(segment->length, 1, pass->rows - rows))
            return LAMINA_BAD_SEGMENT;
        if (!pass->repeats)
            CHECK(check_pages(group, segment));
        CHECK(check_states(group, segment, pass->repeats));
        if (segment->adapter && !has_known_adapter(segments, number))
            CHECK(check_adapter(group, segment->adapter));
        rows += segment->length;
        *most_tokens = larger(*most_tokens, segment->position + segment->length);
    }
    return rows == pass->rows ? LAMINA_OK : LAMINA_BAD_SEGMENT;
}

static Status check_pass(const Group *group, const Pass *pass, int64_t *most_tokens)
{
    if (!within(pass->rows, 1, MOST) || !within(pass->threads, 1, LAMINA_MOST_THREADS))
        return LAMINA_BAD_SIZE;
    if (!within(pass->repeats, 0, 1))
        return LAMINA_BAD_SIZE;
    if (!pass->repeats)
        CHECK(check_memory(&pass->hidden, pass->rows * larger(1, group->streams) * group->hidden_size * 4, 4));
    if (group->input_size && !pass->repeats)
        CHECK(check_memory(&pass->inputs, group->num_layers * pass->rows * group->input_size * 4, 4));
    if (group->rotations && !pass->repeats)
        CHECK(check_memory(&pass->rotations, group->rotations * pass->rows * group->head_dim * 4, 4));
    CHECK(check_segments(group, pass, most_tokens));
    int64_t bytes = pass_workspace(group, pass->rows, *most_tokens, pass->threads, NULL).bytes;
    return check_memory(&pass->workspace, bytes, LAMINA_LINE_BYTES);
}

static Status check_product(const Product *product)
{
    CHECK(check_matrix(&product->matrix));
    if (!within(product->rows, 1, MOST) || !within(product->threads, 1, LAMINA_MOST_THREADS))
        return LAMINA_BAD_SIZE;
    CHECK(check_memory(&product->x, product->rows * product->matrix.width * 4, 4));
    CHECK(check_memory(&product->y, product->rows * product->matrix.outs * 4, 4));
    int64_t bytes = product_workspace(&product->matrix, product->rows, product->threads, NULL).bytes;
    return check_memory(&product->workspace, bytes, LAMINA_LINE_BYTES);
}

static const int64_t MOST_VOCABULARY = 1 << 22; /* the sum of so many weights fits 64 bits */

static Status check_draw(const Draw *draw, int64_t vocabulary)
{
    if (draw->logits.bytes != vocabulary * 4)
        return LAMINA_BAD_SIZE;
    CHECK(check_memory(&draw->logits, 4, 4));
    CHECK(check_optional(&draw->allowed, draw->allowed.bytes, 4));
    if (draw->allowed.bytes % 4 || !(draw->temperature >= 0) || !(draw->top_p > 0) || !(draw->min_p >= 0 && draw->min_p <= 1))
        return LAMINA_BAD_SIZE;
    return LAMINA_OK;
}

static Status check_draws(const Draws *draws)
{
    const int64_t count = draws->draws.bytes / (int64_t)sizeof(Draw);
    if (draws->draws.bytes % (int64_t)sizeof(Draw) || !within(count, 1, MOST) || !within(draws->threads, 1, LAMINA_MOST_THREADS))
        return LAMINA_BAD_SIZE;
    CHECK(check_memory(&draws->draws, sizeof(Draw), _Alignof(Draw)));
    const Draw *all = draws->draws.data;
    const int64_t vocabulary = all->logits.bytes / 4;
    if (!within(vocabulary, 1, MOST_VOCABULARY))
        return LAMINA_BAD_SIZE;
    for (int64_t i = 0; i < count; i++)
        CHECK(check_draw(&all[i], vocabulary));
    return check_memory(&draws->workspace, lamina_draw_bytes(vocabulary, draws->threads), LAMINA_LINE_BYTES);
}

int lamina_draw(Pool *pool, const Draws *draws)
{
    CHECK(check_draws(draws));
    if (!pool && draws->threads > 1)
        return LAMINA_BAD_SIZE;
    run_draws(pool, draws);
    return LAMINA_OK;
}

int lamina_softmax(Softmax *softmax)
{
    if (softmax->scores.bytes % 4 || !within(softmax->scores.bytes / 4, 1, MOST_VOCABULARY))
        return LAMINA_BAD_SIZE;
    CHECK(check_memory(&softmax->scores, 4, 4));
    CHECK(check_memory(&softmax->weights, softmax->scores.bytes, 4));
    CHECK(check_memory(&softmax->keys, softmax->scores.bytes * 2, 8));
    if (softmax->top.bytes % 8 || softmax->top.bytes / 8 > softmax->scores.bytes / 4)
        return LAMINA_BAD_SIZE;
    CHECK(check_optional(&softmax->top, softmax->top.bytes, 8));
    return lamina_chosen_level()->softmax(softmax);
}

int lamina_run_layers(Pool *pool, const Group *group, const Pass *pass)
{
    int64_t most_tokens = 0;
    CHECK(check_group(group));
    CHECK(check_pass(group, pass, &most_tokens));
    run_pass(pool, group, pass, most_tokens);
    return LAMINA_OK;
}

int lamina_multiply(Pool *pool, const Product *product)
{
    CHECK(check_product(product));
    run_matrix(pool, product);
    return LAMINA_OK;
}

int64_t lamina_pass_bytes(const Group *group, int64_t rows, int64_t most_tokens, int64_t threads)
{
    Status sizes = check_sizes(group);
    if (sizes != LAMINA_OK)
        return -(int64_t)sizes;
    if (!within(rows, 1, MOST) || !within(threads, 1, LAMINA_MOST_THREADS) || !within(most_tokens, 1, MOST_TOKENS))
        return -LAMINA_BAD_SIZE;
    return pass_workspace(group, rows, most_tokens, threads, NULL).bytes;
}

int64_t lamina_product_bytes(const Matrix *matrix, int64_t rows, int64_t threads)
{
    if (!within(matrix->width, 1, MOST) || !within(rows, 1, MOST) || !within(threads, 1, LAMINA_MOST_THREADS))
        return -LAMINA_BAD_SIZE;
    return product_workspace(matrix, rows, threads, NULL).bytes;
}

int64_t lamina_draw_bytes(int64_t vocabulary, int64_t threads)
{
    if (!within(vocabulary, 1, MOST_VOCABULARY) || !within(threads, 1, LAMINA_MOST_THREADS))
        return -LAMINA_BAD_SIZE;
    return draw_workspace(vocabulary, threads, NULL).bytes;
}

int64_t lamina_size_of(int64_t record)
{
    static const int64_t sizes[] = {sizeof(Memory), sizeof(Matrix), sizeof(Norm), sizeof(Recurrent), sizeof(Expert), sizeof(Experts), sizeof(Budget),
                                    sizeof(Latent), sizeof(Streams), sizeof(Layer), sizeof(LowRank), sizeof(AdapterLayer), sizeof(Group),
                                    sizeof(Segment), sizeof(Pass), sizeof(Product), sizeof(Draw), sizeof(Draws), sizeof(Softmax)};
    return within(record, 0, sizeof sizes / sizeof *sizes - 1) ? sizes[record] : 0;
}

const char *lamina_message(int status)
{
    switch (status) {
    case LAMINA_OK: return "all is well";
    case LAMINA_BAD_SIZE: return "a number is out of range";
    case LAMINA_BAD_DTYPE: return "a dtype is unknown, or not allowed there";
    case LAMINA_BAD_MATRIX: return "a matrix does not have the shape that the group's sizes require";
    case LAMINA_SHORT_MEMORY: return "memory is absent, or smaller than its shape";
    case LAMINA_UNALIGNED: return "an address is not a multiple of its element's size";
    case LAMINA_BAD_SEGMENT: return "a segment leaves its pages, the arena or a ring, or the segments do not cover all rows";
    case LAMINA_BAD_ADAPTER: return "an adapter is unknown, or does not fit the matrices of a layer";
    case LAMINA_NOT_FINITE: return "a score is a NaN, or the greatest is infinite";
    default: return "an unknown status";
    }
}
