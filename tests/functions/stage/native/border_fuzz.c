/* Calls the border with random groups, passes and products in memory of exactly the bytes that they say, right and wrong ones,
   on every level: what the library accepts must stay inside its memory, which the sanitizers see. Numbers are any bits.

   argv: seed and rounds. Prints how many calls were accepted and refused. A third number is a level: then every call is right and
   of plain numbers, all are on this level, and the length of each result is printed. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "level.h"

static uint64_t state;
static int only_right;

static uint64_t next(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static int64_t any(int64_t least, int64_t most)
{
    return least + (int64_t)(next() % (uint64_t)(most - least + 1));
}

static void *taken[4096];
static int num_taken;

/* Memory of random bits, NaN and infinity among them; sometimes of plain numbers only. */
static Memory memory_of(int64_t bytes)
{
    uint8_t *data = malloc((size_t)bytes); /* ends exactly at its last byte */
    taken[num_taken++] = data;
    int plain = any(0, 3) > 0 || only_right;
    for (int64_t i = 0; i < bytes; i++)
        data[i] = plain ? (uint8_t)(next() & (only_right ? 191 : 63)) : (uint8_t)next(); /* exponents without their highest bit */
    return (Memory){data, bytes};
}

static int64_t padded(int64_t number, int64_t multiple)
{
    return (number + multiple - 1) / multiple * multiple;
}

/* Blocks need rows of whole blocks; other rows are in four bits. */
static Matrix matrix_of(int64_t dtype, int64_t outs, int64_t width)
{
    dtype = in_blocks(dtype) && width % LAMINA_BLOCK ? LAMINA_Q4 : dtype;
    int64_t number = dtype == LAMINA_INT8 ? 1 : dtype == LAMINA_BF16 ? 2 : 4;
    Matrix matrix = {.dtype = dtype, .outs = outs, .width = width};
    if (dtype == LAMINA_Q4)
        matrix.weights = memory_of(padded(outs, 16) / 16 * (padded(width, 32) / 32) * LAMINA_Q4_BYTES);
    else if (in_blocks(dtype)) {
        for (int part = 0; part < LAMINA_PARTS; part++) {
            do
                matrix.formats[part] = any(0, NUM_BLOCK_FORMATS - 1);
            while (width % (LAMINA_BLOCK * BLOCK_FORMATS[matrix.formats[part]].blocks) ||
                   BLOCK_FORMATS[matrix.formats[part]].floats != (dtype == LAMINA_FLOAT_BLOCKS));
            matrix.ends[part] = part || outs <= 16 ? outs : 16;
        }
        matrix.weights = memory_of(bytes_of_blocks(&matrix, outs));
    } else
        matrix.weights = memory_of(outs * padded(width, LAMINA_STEP) * number);
    if (dtype == LAMINA_INT8)
        matrix.scales = memory_of(outs * 4);
    if (any(0, 1))
        matrix.biases = memory_of(outs * 4);
    if (!any(0, 3)) {
        matrix.order = memory_of(width * 4);
        for (int64_t i = 0; i < width; i += any(1, 3)) /* others are beyond the width */
            ((int32_t *)matrix.order.data)[i] = (int32_t)any(0, width - 1);
    }
    return matrix;
}

/* Sometimes of whole blocks, or of a whole super of them. */
static int64_t width(void)
{
    return any(0, 1) ? any(1, 70) : any(0, 2) ? LAMINA_BLOCK * any(1, 2) : 8 * LAMINA_BLOCK;
}

static Norm norm_of(int64_t size, int64_t least)
{
    Norm norm = {.kind = any(least, LAMINA_LAYER_NORM)};
    if (norm.kind)
        norm.gain = memory_of(size * 4);
    if (norm.kind && any(0, 1))
        norm.biases = memory_of(size * 4);
    return norm;
}

static int is_address(int64_t number)
{
    for (int i = 0; i < num_taken; i++)
        if ((int64_t)(intptr_t)taken[i] == number)
            return 1;
    return 0;
}

/* One number of a record becomes another: of its bytes, or of its bits. */
static void spoil(void *record, size_t bytes)
{
    if (only_right)
        return;
    int64_t *numbers = record;
    int64_t *chosen = &numbers[any(0, (int64_t)(bytes / 8) - 1)];
    static const int64_t odd[] = {0, -1, 1, INT64_MAX, INT64_MIN, 1 << 20, 1ll << 40};
    /* An address becomes NULL, or moves by one byte: no check can recognize an address that is not allocated. */
    if (is_address(*chosen)) {
        if (any(0, 1))
            *chosen = 0;
        else
            chosen[0]++, chosen[1]--;
    } else {
        *chosen = any(0, 1) ? odd[any(0, 6)] : *chosen - any(-3, 3);
    }
}

/* Bytes may say less than there is, never more: a caller's lie about its own memory is beyond any check. */
static int says_more(const Memory *memories, const Memory *before, int count)
{
    for (int i = 0; i < count; i++)
        if (memories[i].bytes > before[i].bytes)
            return 1;
    return 0;
}

/* Experts in memory of their own, with one inner size. */
static Memory experts_of(const Group *group, int64_t dtype)
{
    const int64_t count = any(1, group->most_experts), inner = any(1, group->expert_size);
    const int gated = any(0, 3) > 0;
    Experts experts = {
        .experts = memory_of(count * (int64_t)sizeof(Expert)), .used = memory_of(count * 8), .num_experts = count,
        .scores = any(LAMINA_SOFTMAX, LAMINA_SPARSE_MIX), .threshold = 0.2, .groups = count % 2 ? 1 : any(1, 2), .normalized = any(0, 1),
        .shared_gate = any(0, 1), .normal_eps = 1e-20, .scale = 1.5, .before = norm_of(group->hidden_size, 0),
        .before_router = norm_of(group->hidden_size, 0), .after = norm_of(group->hidden_size, 0),
        .after_shared = norm_of(group->hidden_size, 0), .scales = any(0, 1) ? memory_of(count * 4) : (Memory){0},
    };
    experts.chosen_groups = any(1, experts.groups);
    experts.two_of_group = count / experts.groups > 1;
    experts.chosen = any(1, count / experts.groups * experts.chosen_groups);
    if (experts.chosen > group->most_chosen)
        experts.chosen = group->most_chosen;
    if (experts.scores == LAMINA_SPARSE_MIX && (count < 2 || group->most_chosen < 2))
        experts.scores = LAMINA_SOFTMAX;
    if (experts.scores == LAMINA_SPARSE_MIX)
        experts.groups = experts.chosen_groups = 1, experts.two_of_group = 0, experts.chosen = 2;
    const int is_narrow = any(0, 1);
    const int64_t size = is_narrow ? any(1, group->hidden_size) : group->hidden_size;
    if (is_narrow)
        experts.narrow = matrix_of(LAMINA_BF16, size, group->hidden_size), experts.widen = matrix_of(LAMINA_BF16, group->hidden_size, size);
    experts.router = matrix_of(LAMINA_F32, count + experts.shared_gate, group->hidden_size);
    if (any(0, 1))
        experts.correction = memory_of(count * 4);
    for (int64_t i = 0; i < count; i++)
        ((Expert *)experts.experts.data)[i] = (Expert){
            .gate = gated ? matrix_of(dtype, inner, size) : (Matrix){0},
            .up = matrix_of(dtype, inner, size), .down = matrix_of(dtype, size, inner)};
    Memory memory = memory_of(sizeof experts);
    memcpy(memory.data, &experts, sizeof experts);
    return memory;
}

/* Spoils one of a layer's experts, or what they have together. Nothing may claim more memory than there is. */
static int spoil_experts(Memory memory)
{
    Experts *experts = memory.data, before = *experts;
    Expert *one = experts->experts.data;
    Expert sound = *one;
    if (any(0, 1))
        spoil(experts, sizeof *experts);
    else
        spoil(one, sizeof *one);
    if (says_more(&experts->experts, &before.experts, 1) || says_more(&experts->router.weights, &before.router.weights, 3) ||
        says_more(&experts->narrow.weights, &before.narrow.weights, 3) || says_more(&experts->widen.weights, &before.widen.weights, 3) ||
        says_more(&experts->correction, &before.correction, 3) || experts->num_experts > before.num_experts)
        return 0;
    if (says_more(&experts->scales, &before.scales, 1) || says_more(&experts->before.gain, &before.before.gain, 2) ||
        says_more(&experts->before_router.gain, &before.before_router.gain, 2) ||
        says_more(&experts->after.gain, &before.after.gain, 2) || says_more(&experts->after_shared.gain, &before.after_shared.gain, 2))
        return 0;
    return !says_more(&one->gate.weights, &sound.gate.weights, 3) && !says_more(&one->up.weights, &sound.up.weights, 3) &&
           !says_more(&one->down.weights, &sound.down.weights, 3);
}

static int all_gated(const Layer *layer)
{
    const Experts *experts = layer->experts.data;
    return (layer->gate.weights.bytes || !layer->up.weights.bytes) && (!experts || ((Expert *)experts->experts.data)->gate.weights.bytes);
}

/* Takes its places in states and kept inputs from the group, which it makes larger. */
static Recurrent recurrent_of(Group *group)
{
    Recurrent mixer = {.kind = any(LAMINA_CONVOLUTION, LAMINA_MAMBA), .taps = any(1, 4), .channels = group->hidden_size, .eps = 1e-5,
                       .gate_scale = any(0, 2) ? 1 : 0.5, .step_scale = 0.5, .out_scale = any(0, 2) ? 1 : 0.5};
    int64_t inputs = 3 * group->hidden_size, inner = group->hidden_size;
    if (mixer.kind == LAMINA_CONVOLUTION) {
        mixer.channels_at = 2 * group->hidden_size;
    } else {
        mixer.groups = any(1, 2), mixer.heads = mixer.groups * any(1, 10), mixer.key_size = any(1, 20), mixer.head_size = any(1, 70);
        const int64_t keys = mixer.groups * mixer.key_size;
        inner = mixer.heads * mixer.head_size;
        mixer.channels = inner + 2 * keys;
        mixer.key_at = keys, mixer.value_at = 2 * keys, mixer.gate_at = mixer.channels, mixer.steps_at = mixer.channels + inner;
        inputs = mixer.channels + inner + mixer.heads;
        mixer.norm_parts = any(0, 1) ? mixer.heads : 1, mixer.gate_first = any(0, 1);
        if (mixer.kind == LAMINA_DELTA)
            mixer.steps = matrix_of(any(LAMINA_BF16, LAMINA_BLOCKS), 2 * mixer.heads, group->hidden_size);
        mixer.rates = memory_of(mixer.heads * 4), mixer.step_biases = memory_of(mixer.heads * 4);
        if (any(0, 1))
            mixer.skips = memory_of(mixer.heads * 4);
        mixer.norm = norm_of(inner, 0);
    }
    mixer.in = matrix_of(any(LAMINA_BF16, LAMINA_BLOCKS), inputs, group->hidden_size);
    mixer.out = matrix_of(any(LAMINA_BF16, LAMINA_BLOCKS), group->hidden_size, inner);
    mixer.kernel = memory_of(mixer.taps * mixer.channels * 4);
    if (any(0, 1))
        mixer.kernel_biases = memory_of(mixer.channels * 4);
    mixer.tail_at = group->state_values;
    mixer.matrix_at = mixer.tail_at + (mixer.taps - 1) * mixer.channels;
    mixer.kept_at = group->kept_values;
    group->state_values = mixer.matrix_at + mixer.heads * mixer.head_size * mixer.key_size;
    group->kept_values += mixer.channels + 2 * mixer.heads;
    group->recurrent_inputs = group->recurrent_inputs > inputs ? group->recurrent_inputs : inputs;
    group->recurrent_outputs = group->recurrent_outputs > inner ? group->recurrent_outputs : inner;
    group->recurrent_heads = group->recurrent_heads > mixer.heads ? group->recurrent_heads : mixer.heads;
    return mixer;
}

/* Latent attention of a group that has one key head. */
static Memory latent_of(const Group *group, int64_t dtype, int64_t rope, int64_t queries, int from_latent)
{
    const int64_t rank = group->head_dim - rope, nope = group->query_size - rope;
    Memory memory = memory_of(sizeof(Latent)), absorb = memory_of(group->heads * (int64_t)sizeof(Matrix));
    Memory expand = memory_of(group->heads * (int64_t)sizeof(Matrix));
    for (int64_t head = 0; head < group->heads; head++) {
        ((Matrix *)absorb.data)[head] = matrix_of(dtype, rank, nope);
        ((Matrix *)expand.data)[head] = matrix_of(dtype, group->value_size, rank);
    }
    *(Latent *)memory.data = (Latent){
        .down = matrix_of(dtype, queries + group->head_dim, group->hidden_size),
        .query_norm = norm_of(queries, 0),
        .queries = from_latent ? matrix_of(dtype, group->heads * group->query_size, queries) : (Matrix){0},
        .norm = norm_of(rank, 1),
        .absorb = absorb, .expand = expand,
        .rank = rank, .nope = nope, .rope = rope, .value_size = group->value_size, .eps = 1e-6,
    };
    return memory;
}

static Memory streams_of(const Group *group, int64_t dtype)
{
    const int64_t count = group->streams, size = group->hidden_size, rank = any(1, group->inner_size);
    Memory memory = memory_of(sizeof(Streams));
    *(Streams *)memory.data = (Streams){
        .router = matrix_of(LAMINA_F32, count, size), .norm = norm_of(size, 0),
        .predict = matrix_of(LAMINA_F32, count * count, count), .correct = matrix_of(LAMINA_F32, count, count),
        .scale = memory_of(size * 4), .narrow = matrix_of(dtype, rank, size), .widen = matrix_of(dtype, size, rank),
        .after = norm_of(size, 1),
    };
    return memory;
}

/* is_long: has pages for sequences whose attention is split. */
static Group group_of(int is_long)
{
    Group group = {
        .num_layers = any(1, 2), .hidden_size = width(), .inner_size = width(),
        .head_dim = 2 * any(1, is_long ? 4 : 20), .kv_dtype = any(LAMINA_BF16, LAMINA_F32), .eps = 1e-5,
        .rotations = any(0, 2),
    };
    if (any(0, 1))
        group.expert_size = any(1, 40), group.most_experts = any(1, 6), group.most_chosen = any(1, group.most_experts);
    const int64_t kv_heads = any(1, is_long ? 1 : 3), numbers = padded(group.head_dim, 16);
    const int64_t head_bytes = group.kv_dtype == LAMINA_INT8 ? numbers + 4 : numbers * (group.kv_dtype == LAMINA_BF16 ? 2 : 4);
    /* Layers have several pages each, of some heads' keys or values; or pages are larger than the layers need. */
    const int64_t kv_pages = is_long || any(0, 1) ? 1 : any(0, 1) ? 2 : 2 * kv_heads;
    group.page_bytes = LAMINA_PAGE_TOKENS * (2 * kv_heads / kv_pages * head_bytes + 4 * any(0, 1));
    group.num_pages = group.num_layers * (is_long ? any(33, 70) : any(1, 5)) * kv_pages;
    group.arena = memory_of(group.num_pages * group.page_bytes);
    if (only_right && group.kv_dtype == LAMINA_INT8) /* AVX2 takes no product of any two bytes, only of those that are written */
        memset(group.arena.data, 0, (size_t)group.arena.bytes);
    group.heads = kv_heads * any(1, 5);
    group.layers = memory_of(group.num_layers * (int64_t)sizeof(Layer));
    int64_t attended = group.heads * group.head_dim, all_heads = group.heads + 2 * kv_heads;
    group.row_numbers = (all_heads + group.heads) * group.head_dim;
    group.input_size = any(0, 1) ? any(1, group.inner_size) : 0;
    group.streams = group.input_size && any(0, 2) == 0 ? any(1, 4) : 0;
    const int latent = kv_heads == 1 && any(0, 1), from_latent = any(0, 1);
    const int64_t rope = 2 * any(0, group.head_dim / 2 - 1);
    if (latent) {
        group.query_size = rope + any(1, 20);
        group.value_size = any(1, 40);
        attended = group.heads * group.value_size;
    }
    const int64_t queries = from_latent ? any(1, 40) : group.heads * group.query_size;
    group.latent_outs = latent ? queries + group.head_dim : 0;
    Layer *layers = group.layers.data;
    for (int64_t i = 0; i < group.num_layers; i++) {
        int64_t dtype = any(LAMINA_BF16, LAMINA_FLOAT_BLOCKS), of_mlp = any(LAMINA_BF16, LAMINA_FLOAT_BLOCKS), gates = latent ? 0 : any(0, 1);
        /* The second layer sometimes reads the first one's keys and values, or has smaller heads. */
        const int64_t head_dim = latent || !i || any(0, 1) ? group.head_dim : 2 * any(1, group.head_dim / 2);
        const int64_t reads = i && !latent && head_dim == group.head_dim && layers[0].qkv.weights.bytes ? any(0, 1) : 0;
        const int64_t own_heads = (reads ? group.heads : all_heads) + gates * group.heads;
        attended = latent ? attended : group.heads * head_dim;
        layers[i] = (Layer){
            .before_attention = norm_of(group.hidden_size, group.streams > 0),
            .latent = latent ? latent_of(&group, dtype, rope, queries, from_latent) : (Memory){0},
            .qkv = latent ? (Matrix){0} : matrix_of(dtype, own_heads * head_dim, group.hidden_size),
            .kv_heads = kv_heads, .head_dim = head_dim, .reads_kv = reads, .kv_pages = kv_pages,
            .qk = latent ? (Norm){0} : norm_of((group.heads + (reads ? 0 : kv_heads)) * head_dim, 0),
            .value = norm_of(head_dim, 0),
            .input_gate = group.input_size ? matrix_of(dtype, group.input_size, group.hidden_size) : (Matrix){0},
            .input_out = group.input_size ? matrix_of(dtype, group.hidden_size, group.input_size) : (Matrix){0},
            .after_input = norm_of(group.hidden_size, group.streams > 0),
            .streams = group.streams ? streams_of(&group, dtype) : (Memory){0},
            .output_scale = group.streams || any(0, 1) ? 1 : 0.5,
            .sinks = any(0, 1) ? memory_of(group.heads * 4) : (Memory){0},
            .out = matrix_of(dtype, group.hidden_size, attended),
            .after_attention = norm_of(group.hidden_size, 0),
            .before_mlp = norm_of(group.hidden_size, 0),
            .gate = any(0, 2) ? matrix_of(of_mlp, group.inner_size, group.hidden_size) : (Matrix){0},
            .up = matrix_of(of_mlp, group.inner_size, group.hidden_size),
            .down = matrix_of(dtype, group.hidden_size, group.inner_size),
            .after_mlp = norm_of(group.hidden_size, 0),
            .activation = any(LAMINA_SILU, LAMINA_SWIGLU),
            .gates = gates,
            .parallel = group.streams ? 0 : any(0, 1),
            .window = any(0, 2) ? 0 : any(1, 40),
            .query_rotation = any(0, group.rotations),
            .key_rotation = any(0, group.rotations),
            .score_scale = 0.5,
            .score_cap = any(0, 1) ? 0 : 30,
            .attention_scale = any(0, 2) ? 1 : 0.5,
            .mlp_scale = any(0, 2) ? 1 : 0.5,
            .gate_scale = any(0, 2) ? 1 : 0.5,
            .swiglu = {1.7, 7.0},
            .xielu = {0.8, 0.8, 0.5, -1e-6},
        };
        switch (group.streams ? 5 : any(0, 5)) { /* a layer has attention, a recurrent mixer or both, and a feed-forward or none */
        case 0:
            layers[i].qkv = layers[i].out = (Matrix){0};
            layers[i].latent = (Memory){0};
            /* fall through */
        case 1:
            layers[i].recurrent = recurrent_of(&group);
            break;
        case 2:
            layers[i].up = layers[i].gate = layers[i].down = (Matrix){0};
        }
        if (layers[i].qkv.weights.bytes || layers[i].latent.bytes)
            if (!reads)
                layers[i].kv_row = group.kv_rows, group.kv_rows += kv_pages;
        layers[i].qk_as_one = layers[i].qk.kind ? any(0, 1) : 0;
        layers[i].qk_rotated = layers[i].qk_as_one ? 0 : any(0, 1);
        if (group.expert_size && !group.streams && any(0, 1)) {
            layers[i].experts = experts_of(&group, of_mlp);
            layers[i].parallel = 0;
            if (any(0, 1))
                layers[i].gate = layers[i].up = layers[i].down = (Matrix){0};
        }
        if (layers[i].activation == LAMINA_SWIGLU && (group.input_size || !all_gated(&layers[i])))
            layers[i].activation = LAMINA_SILU;
        if (layers[i].gate.weights.bytes && layers[i].activation != LAMINA_SWIGLU && layers[i].gate_scale == 1)
            layers[i].sparse = any(0, 1), layers[i].cutoff = 0.5;
        if (layers[i].window && any(0, 1))
            layers[i].ring = any(1, 3);
    }
    return group;
}

/* What an adapter adds to a matrix, sometimes nothing. parts: of its outputs. */
static LowRank low_rank_of(const Matrix *matrix, int parts)
{
    LowRank low = {.dtype = any(0, 1) ? LAMINA_BF16 : LAMINA_F32};
    int64_t begin = 0, bytes = 0;
    if (!matrix->weights.bytes || any(0, 2) == 0)
        return low;
    for (int part = 0; part < LAMINA_LOW_PARTS; part++) {
        low.ends[part] = part < parts - 1 ? any(begin, matrix->outs) : matrix->outs;
        low.ranks[part] = part < parts ? any(part > 0 ? 0 : 1, 40) : 0;
        low.scales[part] = 0.5;
        bytes += low_rank_part_bytes(low.dtype, low.ranks[part], begin, low.ends[part]);
        begin = low.ends[part];
    }
    low.a.bytes = 1; /* not absent */
    low.a = memory_of(low_rank_floats(&low) / LAMINA_GROUP_OUTS * low_rank_group_bytes(low.dtype, matrix->width));
    low.b = memory_of(bytes);
    return low;
}

/* Sometimes all add to layers of other groups only. */
static void give_adapters(Group *group, int64_t count)
{
    const Layer *layers = group->layers.data;
    const int64_t bytes = count * group->num_layers * (int64_t)sizeof(AdapterLayer);
    group->adapters = memory_of(bytes);
    AdapterLayer *shares = group->adapters.data;
    if (any(0, 3) == 0) {
        memset(shares, 0, (size_t)bytes);
        return;
    }
    for (int64_t i = 0; i < count * group->num_layers; i++) {
        const Layer *layer = &layers[i % group->num_layers];
        shares[i] = (AdapterLayer){low_rank_of(&layer->qkv, 4), low_rank_of(&layer->out, 1), low_rank_of(&layer->gate, 1),
                                   low_rank_of(&layer->up, 1), low_rank_of(&layer->down, 1)};
    }
    group->low_floats = 4 * 48;
}

static Memory workspace_of(int64_t bytes)
{
    uint8_t *data = aligned_alloc(64, (size_t)padded(bytes, 64));
    taken[num_taken++] = data;
    memset(data, 0xFF, (size_t)bytes);
    return (Memory){data, bytes};
}

static int group_has_ring(const Group *group)
{
    const Layer *layers = group->layers.data;
    return layers[0].ring || layers[group->num_layers - 1].ring;
}

static void print_length(const char *name, Memory floats)
{
    double squares = 0;
    for (int64_t i = 0; only_right && i < floats.bytes / 4; i++)
        squares += pow(((float *)floats.data)[i], 2);
    if (only_right)
        printf("%s %.9g\n", name, sqrt(squares));
}

static int run_pass(Pool *pool)
{
    const int is_long = any(0, 15) == 0;
    Group group = group_of(is_long);
    const int64_t adapters = any(0, 2);
    if (adapters)
        give_adapters(&group, adapters);
    Segment segments[3];
    const int64_t table_rows = group.num_layers * ((Layer *)group.layers.data)->kv_pages;
    int64_t count = any(1, 3), rows = 0, most = 1, page = 0, used = 0;
    for (; used < count && page + table_rows <= group.num_pages; used++) {
        int64_t left = (group.num_pages - page) / table_rows, pages = is_long ? left : any(1, left);
        int64_t tokens = pages * LAMINA_PAGE_TOKENS, position = any(is_long ? tokens / 2 : 0, tokens - 1), length = tokens - position;
        if (is_long || group_has_ring(&group)) /* a ring of one page has room for so many after a window of 40 */
            length = length < 24 ? length : 24;
        segments[used] = (Segment){.pages = memory_of(table_rows * pages * 4), .position = position, .length = any(1, length)};
        segments[used].adapter = any(0, adapters);
        segments[used].pages.bytes = group.kv_rows * pages * 4;
        const int64_t copies = any(0, 2), drafts = any(0, segments[used].length);
        if (group.state_values) {
            segments[used].states = memory_of(group.state_values * 4);
            segments[used].copies = memory_of(copies * group.state_values * 4);
            segments[used].copied_at = memory_of(copies * 8);
            for (int64_t copy = 0; copy < copies; copy++)
                ((int64_t *)segments[used].copied_at.data)[copy] = position + any(0, length);
            segments[used].kept = memory_of(drafts * group.kept_values * 4);
            segments[used].kept_from = position + segments[used].length - drafts;
        }
        for (int64_t i = 0; i < table_rows * pages; i++)
            ((int32_t *)segments[used].pages.data)[i] = (int32_t)page++;
        int64_t end = position + segments[used].length;
        rows += segments[used].length;
        most = end > most ? end : most;
    }
    int64_t threads = any(1, 3);
    Pass pass = {.rows = rows, .threads = threads, .repeats = any(0, 9) == 0, .hidden = memory_of(rows * larger(1, group.streams) * group.hidden_size * 4),
                 .inputs = memory_of(group.num_layers * rows * group.input_size * 4),
                 .rotations = memory_of(group.rotations * rows * group.head_dim * 4), .segments = memory_of(used * (int64_t)sizeof(Segment)),
                 .workspace = workspace_of(lamina_pass_bytes(&group, rows, most, threads))};
    memcpy(pass.segments.data, segments, (size_t)pass.segments.bytes);
    Layer *layers = group.layers.data;
    Layer before = layers[0];
    AdapterLayer *share = group.adapters.data, share_before = adapters ? share[0] : (AdapterLayer){0};
    Pass whole = pass;
    Group sound = group;
    switch (any(0, 7)) {
    case 6:
        if (adapters)
            spoil(share, sizeof *share);
        break;
    case 0:
        spoil(&group, sizeof group);
        break;
    case 1:
        spoil(&layers[0], sizeof(Layer));
        break;
    case 2:
        spoil(&pass, sizeof pass);
        break;
    case 3:
        spoil(pass.segments.data, (size_t)pass.segments.bytes);
        break;
    case 5:
        if (layers[0].experts.bytes && !spoil_experts(layers[0].experts))
            return -1;
        break;
    case 4: /* another page that exists might be another sequence's */
        if (segments[0].pages.bytes && !only_right)
            ((int32_t *)segments[0].pages.data)[any(0, segments[0].pages.bytes / 4 - 1)] = any(0, 1) ? -1 : (int32_t)group.num_pages;
        break;
    }
    for (int64_t i = 0; i < used; i++)
        if (says_more(&((Segment *)whole.segments.data)[i].pages, &segments[i].pages, 1) ||
            says_more(&((Segment *)whole.segments.data)[i].states, &segments[i].states, 4))
            return -1;
    if (says_more(&group.layers, &sound.layers, 4) || says_more(&pass.hidden, &whole.hidden, 5) ||
        group.rotations > sound.rotations)
        return -1;
    const Norm *norms[] = {&layers[0].before_attention, &layers[0].qk, &layers[0].after_attention, &layers[0].before_mlp,
                           &layers[0].after_mlp, &layers[0].recurrent.norm, &layers[0].value, &layers[0].after_input};
    const Norm *sound_norms[] = {&before.before_attention, &before.qk, &before.after_attention, &before.before_mlp, &before.after_mlp,
                                 &before.recurrent.norm, &before.value, &before.after_input};
    for (int i = 0; i < 8; i++)
        if (says_more(&norms[i]->gain, &sound_norms[i]->gain, 2))
            return -1;
    if (says_more(&layers[0].sinks, &before.sinks, 1) || says_more(&layers[0].latent, &before.latent, 1) ||
        says_more(&layers[0].streams, &before.streams, 1))
        return -1;
    const Matrix *now[] = {&layers[0].qkv, &layers[0].out, &layers[0].gate, &layers[0].up, &layers[0].down,
                           &layers[0].recurrent.in, &layers[0].recurrent.steps, &layers[0].recurrent.out,
                           &layers[0].input_gate, &layers[0].input_out};
    const Matrix *then[] = {&before.qkv, &before.out, &before.gate, &before.up, &before.down,
                            &before.recurrent.in, &before.recurrent.steps, &before.recurrent.out,
                            &before.input_gate, &before.input_out};
    if (says_more(&layers[0].experts, &before.experts, 1) || says_more(&layers[0].recurrent.kernel, &before.recurrent.kernel, 5))
        return -1;
    for (int i = 0; i < 10; i++)
        if (says_more(&now[i]->weights, &then[i]->weights, 3))
            return -1;
    for (int i = 0; adapters && i < 5; i++)
        if (says_more(&(&share->qkv)[i].a, &(&share_before.qkv)[i].a, 2))
            return -1;
    const int status = lamina_run_layers(pool, &group, &pass);
    print_length("pass", pass.hidden);
    return status;
}

static int run_product(Pool *pool)
{
    int64_t rows = any(1, 70), threads = any(1, 3);
    Product product = {.matrix = matrix_of(any(LAMINA_BF16, LAMINA_FLOAT_BLOCKS), any(1, 70), width()), .rows = rows, .threads = threads};
    product.x = memory_of(rows * product.matrix.width * 4);
    product.y = memory_of(rows * product.matrix.outs * 4);
    product.workspace = workspace_of(lamina_product_bytes(&product.matrix, rows, threads));
    Product before = product;
    if (any(0, 1))
        spoil(&product, sizeof product);
    if (says_more(&product.matrix.weights, &before.matrix.weights, 3) || says_more(&product.x, &before.x, 3))
        return -1;
    const int status = lamina_multiply(pool, &product);
    print_length("product", product.y);
    return status;
}

static int run_draws(Pool *pool)
{
    const int64_t size = any(1, 300), count = any(1, 5), threads = any(1, 3);
    Draws draws = {memory_of(count * (int64_t)sizeof(Draw)), threads, workspace_of(lamina_draw_bytes(size, threads))};
    Draws before = draws;
    Draw *all = draws.draws.data;
    for (int64_t i = 0; i < count; i++) {
        all[i] = (Draw){.logits = memory_of(size * 4), .allowed = any(0, 1) ? memory_of(any(1, 12) * 4) : (Memory){0},
                        .temperature = any(0, 3) ? 0.7 : 0.0, .top_k = any(-1, 310), .top_p = any(0, 1) ? 1.0 : 0.9,
                        .min_p = any(0, 1) ? 0.0 : 0.05, .seed = any(0, 1000), .position = any(0, 1000)};
        for (int64_t token = 0; token < size; token++) {
            uint32_t bits = (uint32_t)any(0, 0xFFFFFFFF); /* any float, NaN and infinity rarely */
            ((float *)all[i].logits.data)[token] = any(0, 3) ? (float)any(-50, 50) : 0.0f;
            if (!any(0, 200))
                memcpy((float *)all[i].logits.data + token, &bits, sizeof bits);
        }
    }
    Draw sound = all[0];
    if (any(0, 1))
        spoil(&all[0], sizeof all[0]);
    if (!any(0, 3))
        spoil(&draws, sizeof draws);
    if (says_more(&draws.draws, &before.draws, 1) || says_more(&draws.workspace, &before.workspace, 1) ||
        says_more(&all[0].logits, &sound.logits, 2))
        return -1;
    int status = lamina_draw(pool, &draws);
    for (int64_t i = 0; status == LAMINA_OK && i < draws.draws.bytes / (int64_t)sizeof(Draw); i++)
        if (all[i].token >= size)
            abort();
    return status;
}

static int run_softmax(void)
{
    int64_t size = any(1, 300);
    Softmax softmax = {.scores = memory_of(size * 4), .weights = memory_of(size * 4), .keys = memory_of(size * 8),
                       .top = memory_of(any(1, size) * 8)};
    Softmax sound = softmax;
    for (int64_t token = 0; token < size; token++)
        ((float *)softmax.scores.data)[token] = any(0, 300) ? (float)any(-50, 50) : __builtin_nanf("");
    if (any(0, 1))
        spoil(&softmax, sizeof softmax);
    return says_more(&softmax.scores, &sound.scores, 4) ? -1 : lamina_softmax(&softmax);
}

int main(int argc, char **argv)
{
    state = argc > 1 ? strtoull(argv[1], NULL, 10) * 2654435761u + 1 : 1;
    int rounds = argc > 2 ? atoi(argv[2]) : 100, accepted = 0, refused = 0;
    only_right = argc > 3;
    Pool *pool = lamina_new_pool();
    for (int round = 0; round < rounds; round++) {
        const int64_t level = any(0, lamina_best_level());
        lamina_use_level(only_right ? atoi(argv[3]) : level);
        int64_t kind = any(0, 7);
        int status = kind > 3 ? run_pass(pool) : kind > 1 ? run_product(pool) : kind ? run_draws(pool) : run_softmax();
        accepted += status == LAMINA_OK;
        refused += status > 0;
        while (num_taken)
            free(taken[--num_taken]);
    }
    lamina_free_pool(pool);
    printf("%d accepted, %d refused\n", accepted, refused);
    return 0;
}
