/* The experts of a layer: a router chooses some for each row, and each expert computes all of its rows together.

   What a row's experts give is added up in the order of their numbers, so that its bits do not depend on other rows. Rows of an
   expert are packed next to each other, from a multiple of 16 places on. */

static const Expert *expert_of(const Layer *layer, int64_t number)
{
    return (const Expert *)((const Experts *)layer->experts.data)->experts.data + number;
}

static const Matrix *first_matrix(const Expert *expert)
{
    return expert->gate.weights.bytes ? &expert->gate : &expert->up;
}

/* A norm of the experts' own, or else the one before the layer's feed-forward. */
static const Norm *norm_before(const Layer *layer, const Norm *own)
{
    return own->kind ? own : &layer->before_mlp;
}

static int64_t number_of(const Forward *forward, const Layer *layer)
{
    return layer - (const Layer *)forward->group->layers.data;
}

static void choose_for_rows(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Experts *experts = layer->experts.data;
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase, forward->rows, 1)) >= 0; done++)
        forward->level->choose(experts, forward->at.logits + row * experts->router.outs,
                               forward->at.chosen + row * experts->chosen, forward->at.weights + row * experts->chosen);
    finish_phase(worker, phase, done, forward->rows);
}

static int64_t bytes_of_expert(const Expert *expert)
{
    return expert->gate.weights.bytes + expert->up.weights.bytes + expert->down.weights.bytes;
}

/* Drops the whole pages of an expert's weights. What reads them later reads the file. */
static void drop_expert(const Expert *expert)
{
#ifdef __linux__
    const Memory *weights[] = {&expert->gate.weights, &expert->up.weights, &expert->down.weights};
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < 3; i++) {
        const uintptr_t first = ((uintptr_t)weights[i]->data + page - 1) / page * page;
        const uintptr_t last = ((uintptr_t)weights[i]->data + (uintptr_t)weights[i]->bytes) / page * page;
        if (weights[i]->bytes && first < last)
            madvise((void *)first, last - first, MADV_DONTNEED);
    }
#endif
}

/* Drops the expert of the group that was used the longest ago, before time `now`. False: there is none. */
static bool drop_oldest(const Group *group, int64_t now)
{
    const Layer *layers = group->layers.data;
    Budget *budget = group->budget.data;
    int64_t *oldest = NULL;
    const Expert *expert = NULL;
    for (int64_t i = 0; i < group->num_layers; i++) {
        const Experts *experts = layers[i].experts.bytes ? layers[i].experts.data : NULL;
        for (int64_t number = 0; experts && experts->used_at.bytes && number < experts->num_experts; number++) {
            int64_t *used_at = (int64_t *)experts->used_at.data + number;
            if (*used_at && *used_at < now && (!oldest || *used_at < *oldest)) {
                oldest = used_at;
                expert = expert_of(&layers[i], number);
            }
        }
    }
    if (!oldest)
        return false;
    *oldest = 0;
    budget->bytes -= bytes_of_expert(expert);
    drop_expert(expert);
    return true;
}

/* Counts the experts that the layer uses now, and drops others until all fit the budget. */
static void hold_experts(const Group *group, const Layer *layer, const Route *routes, int64_t active)
{
    Budget *budget = group->budget.data;
    int64_t *used_at = ((const Experts *)layer->experts.data)->used_at.data;
    const int64_t now = ++budget->clock;
    for (int64_t i = 0; i < active; i++) {
        if (used_at[routes[i].expert])
            budget->found++;
        else {
            budget->read++;
            budget->bytes += bytes_of_expert(expert_of(layer, routes[i].expert));
        }
        used_at[routes[i].expert] = now;
    }
    while (budget->bytes > budget->most_bytes && drop_oldest(group, now))
        ;
}

/* Sorts the choices of all rows by expert: one piece. Later phases of the layer know from `routing` how many pieces they have, also
   in threads that come too late for any of them. */
static void group_rows(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Experts *experts = layer->experts.data;
    const Workspace *at = &forward->at;
    int64_t done = 0, places[LAMINA_MOST_EXPERTS], counts[LAMINA_MOST_EXPERTS] = {0};
    for (; take_piece(worker, phase, 1, 1) >= 0; done++) {
        Routing *routing = &at->routing[number_of(forward, layer)];
        int64_t first = 0, packed = 0, active = 0;
        for (int64_t i = 0; i < forward->rows * experts->chosen; i++)
            counts[at->chosen[i]]++;
        for (int64_t expert = 0; expert < experts->num_experts; expert++) {
            places[expert] = first;
            if (!counts[expert])
                continue;
            at->routes[active++] = (Route){expert, first, counts[expert], packed};
            ((int64_t *)experts->used.data)[expert] += counts[expert];
            first += counts[expert];
            packed += rounded_up(counts[expert], 16);
        }
        for (int64_t i = 0; i < forward->rows * experts->chosen; i++) {
            const int64_t place = places[at->chosen[i]]++;
            at->routed_rows[place] = (int32_t)(i / experts->chosen);
            at->routed_weights[place] = at->weights[i];
        }
        if (experts->used_at.bytes)
            hold_experts(forward->group, layer, at->routes, active);
        *routing = (Routing){active, packed / 16};
    }
    finish_phase(worker, phase, done, 1);
}

/* The packed rows of an expert, from `row` on. */
static Rows rows_of_route(const Forward *forward, const Route *route, const Matrix *matrix, int64_t row, int64_t rows)
{
    const int64_t row_bytes = packed_row_bytes(matrix->dtype, matrix->width);
    return (Rows){forward->at.routed_packed + route->first_packed * forward->at.routed_bytes + row * row_bytes,
                  forward->at.routed_scales + (route->first_packed + row) * LAMINA_TILE_OUTS, rows, row_bytes, route->rows > 1};
}

/* Packs what the first matrices of the experts multiply, or the last one of each. */
static void pack_for_experts(const Forward *forward, const Layer *layer, bool inner, const Worker *worker, int64_t phase)
{
    const Workspace *at = &forward->at;
    const Routing routing = at->routing[number_of(forward, layer)];
    const bool is_narrow = ((const Experts *)layer->experts.data)->narrow.weights.bytes;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, routing.packed_blocks, 1)) >= 0; done++) {
        const Route *route = at->routes;
        while (route->first_packed + route->rows <= piece * 16)
            route++;
        const Expert *expert = expert_of(layer, route->expert);
        const Matrix *matrix = inner ? &expert->down : first_matrix(expert);
        const int64_t row = piece * 16 - route->first_packed;
        const Task task = {.level = forward->level, .matrix = matrix, .eps = (float)forward->group->eps, .rows = route->rows,
                           .x = inner ? at->routed_inner + route->first * matrix->width : is_narrow ? at->expert_out : forward->hidden,
                           .places = inner ? NULL : at->routed_rows + route->first,
                           .norm = inner || is_narrow ? NULL : norm_before(layer, &((const Experts *)layer->experts.data)->before)};
        const Rows to = rows_of_route(forward, route, matrix, row, smaller(16, route->rows - row));
        const MatrixScratch scratch = matrix_scratch(matrix, worker->scratch);
        pack_rows(&task, row, to.rows, &scratch, (float *)to.scales, (uint8_t *)to.data);
    }
    finish_phase(worker, phase, done, routing.packed_blocks);
}

static void gate_experts(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Workspace *at = &forward->at;
    const Matrix *any = first_matrix(expert_of(layer, 0));
    const Pieces pieces = pieces_of(forward->rows, any, expert_of(layer, 0)->gate.weights.bytes ? 2 : 1);
    const int64_t active = at->routing[number_of(forward, layer)].active;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, active, pieces.units)) >= 0; done++) {
        const Route *route = &at->routes[piece / pieces.units];
        const Expert *expert = expert_of(layer, route->expert);
        const Matrix *matrix = first_matrix(expert);
        const Task task = {.level = forward->level, .matrix = matrix, .up = matrix == &expert->gate ? &expert->up : NULL, .layer = layer};
        const int64_t first = piece % pieces.units * pieces.unit_outs, last = smaller(matrix->outs, first + pieces.unit_outs);
        for (int64_t row = 0; row < route->rows; row += pieces.block_rows) {
            const Rows x = rows_of_route(forward, route, matrix, row, smaller(pieces.block_rows, route->rows - row));
            const int64_t place = (route->first + row) * matrix->outs;
            multiply_activated(&task, &x, 0, first, last, at->routed_times + place, at->routed_inner + place);
        }
    }
    finish_phase(worker, phase, done, active * pieces.units);
}

/* mixed [rows, size] = what the experts of a row give, times their weights. A piece is some outputs of all experts. */
static void mix_experts(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Workspace *at = &forward->at;
    const int64_t size = expert_of(layer, 0)->down.outs, active = at->routing[number_of(forward, layer)].active;
    const int64_t unit = rounded_up(size / (2 * ENOUGH_PIECES * forward->threads) + 1, LAMINA_GROUP_OUTS), units = (size + unit - 1) / unit;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase, units, 1)) >= 0; done++) {
        const int64_t first = piece * unit, last = smaller(size, first + unit);
        for (int64_t row = 0; row < forward->rows; row++)
            memset(at->mixed + row * size + first, 0, (size_t)(last - first) * 4);
        for (const Route *route = at->routes; route < at->routes + active; route++) {
            const Matrix *matrix = &expert_of(layer, route->expert)->down;
            const int64_t block_rows = pieces_of(forward->rows, matrix, 1).block_rows;
            for (int64_t row = 0; row < route->rows; row += block_rows) {
                const Rows x = rows_of_route(forward, route, matrix, row, smaller(block_rows, route->rows - row));
                forward->level->multiply(matrix, &x, first, last, false, at->expert_out + row * size);
            }
            for (int64_t i = 0; i < route->rows; i++) {
                const float weight = at->routed_weights[route->first + i], *from = at->expert_out + i * size;
                float *to = at->mixed + at->routed_rows[route->first + i] * size;
                for (int64_t out = first; out < last; out++)
                    to[out] += weight * from[out];
            }
        }
    }
    finish_phase(worker, phase, done, units);
}

/* hidden += scale * norm(mixed + gate * added): `added` is the output of the expert that all rows go through. */
static void add_experts(const Forward *forward, const Layer *layer, bool is_last, const Worker *worker, int64_t phase)
{
    const Experts *experts = layer->experts.data;
    const int64_t size = forward->group->hidden_size;
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase, forward->rows, 1)) >= 0; done++) {
        float *mixed = (experts->narrow.weights.bytes ? forward->at.expert_out : forward->at.mixed) + row * size;
        float *added = forward->at.added + row * size, *hidden = forward->hidden + row * size;
        const float gate = experts->shared_gate ? forward->at.logits[row * experts->router.outs + experts->num_experts] : 1;
        if (experts->after.kind)
            forward->level->normalize(&experts->after, 0, mixed, (float)forward->group->eps, size, mixed);
        if (experts->after_shared.kind)
            forward->level->normalize(&experts->after_shared, 0, added, (float)forward->group->eps, size, added);
        for (int64_t i = 0; layer->up.weights.bytes && i < size; i++)
            mixed[i] += gate * added[i];
        add_row(forward, layer, &layer->after_mlp, layer->mlp_scale, is_last, mixed, hidden);
    }
    finish_phase(worker, phase, done, forward->rows);
}

/* hidden += the layer's experts. is_last: of the layer. */
static void run_experts(const Forward *forward, const Layer *layer, bool is_last, const Worker *worker, int64_t phase)
{
    const Workspace *at = &forward->at;
    const Experts *experts = layer->experts.data;
    if (layer->up.weights.bytes) {
        feed_forward(forward, layer, worker, phase);
        multiply_adapted(forward, layer, &layer->down, offsetof(AdapterLayer, down), at->inner, NULL, at->added, SET, worker, phase + PACK_DOWN);
    }
    multiply(forward, &experts->router, forward->hidden, norm_before(layer, &experts->before_router), at->logits, SET, worker, phase + PACK_ROUTER);
    choose_for_rows(forward, layer, worker, phase + CHOOSE);
    group_rows(forward, layer, worker, phase + GROUP_ROWS);
    if (experts->narrow.weights.bytes)
        multiply(forward, &experts->narrow, forward->hidden, &layer->before_mlp, at->expert_out, SET, worker, phase + PACK_NARROW);
    pack_for_experts(forward, layer, false, worker, phase + PACK_EXPERTS);
    gate_experts(forward, layer, worker, phase + GATE_EXPERTS);
    pack_for_experts(forward, layer, true, worker, phase + PACK_INNER);
    mix_experts(forward, layer, worker, phase + MIX_EXPERTS);
    if (experts->narrow.weights.bytes)
        multiply(forward, &experts->widen, at->mixed, NULL, at->expert_out, SET, worker, phase + PACK_WIDEN);
    add_experts(forward, layer, is_last, worker, phase + ADD_EXPERTS);
}
