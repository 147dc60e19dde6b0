/* The phases of a layer with several streams of hidden states (`Streams` in `native.h`). In between, the layer computes with the first
   one, as a layer without streams does. Part of `forward.c`. */

static const Streams *streams_of(const Layer *layer)
{
    return layer->streams.data;
}

static float *streams_of_row(const Forward *forward, int64_t row)
{
    return forward->streams + row * forward->group->streams * forward->group->hidden_size;
}

/* Coefficients of streams, in the thread's own memory and then in `to`: matrix tanh(router norm(x)). */
static void compute_coefficients(const Forward *forward, const Streams *streams, const Matrix *matrix, const float *x, float *to,
                                 const Worker *worker)
{
    float routed[LAMINA_MOST_STREAMS];
    multiply_alone(forward, &streams->router, x, &streams->norm, routed, worker);
    forward->level->tanh(forward->group->streams, routed);
    multiply_alone(forward, matrix, routed, NULL, to, worker);
}

/* Adds to each stream of all rows what the coefficients give it of the streams, and takes the first one. */
static void predict_streams(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Streams *streams = streams_of(layer);
    const int64_t size = forward->group->hidden_size, count = forward->group->streams;
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase, forward->rows, 1)) >= 0; done++) {
        float coefficients[LAMINA_MOST_STREAMS * LAMINA_MOST_STREAMS];
        float *own = streams_of_row(forward, row), *before = (float *)worker->scratch; /* has 21 rows */
        compute_coefficients(forward, streams, &streams->predict, own, coefficients, worker);
        memcpy(before, own, (size_t)(count * size) * sizeof *own);
        for (int64_t to = 0; to < count; to++)
            for (int64_t from = 0; from < count; from++)
                forward->level->add_scaled(size, coefficients[to * count + from], before + from * size, own + to * size);
        memcpy(forward->hidden + row * size, own, (size_t)size * sizeof *own);
    }
    finish_phase(worker, phase, done, forward->rows);
}

/* Computes what is added beside attention. */
static void project_beside(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Streams *streams = streams_of(layer);
    multiply(forward, &streams->narrow, forward->hidden, &layer->before_attention, forward->at.inner, SET, worker, phase + PACK_NARROWED);
    multiply(forward, &streams->widen, forward->at.inner, NULL, forward->at.beside, SET, worker, phase + PACK_WIDENED);
}

static void add_beside(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const int64_t size = forward->group->hidden_size;
    const float eps = (float)forward->group->eps, share = 0.70710678f;
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase, forward->rows, 1)) >= 0; done++) {
        float *hidden = forward->hidden + row * size, *beside = forward->at.beside + row * size, *normed = (float *)worker->scratch;
        forward->level->normalize(&layer->before_attention, 0, streams_of_row(forward, row), eps, size, normed);
        forward->level->normalize(&streams_of(layer)->after, 0, beside, eps, size, beside);
        for (int64_t i = 0; i < size; i++)
            hidden[i] = (hidden[i] + (normed[i] + beside[i])) * share;
    }
    finish_phase(worker, phase, done, forward->rows);
}

/* Changes all streams by what the layer made of the first one, which then is scaled for the layer's input. */
static void correct_streams(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Streams *streams = streams_of(layer);
    const int64_t size = forward->group->hidden_size;
    const float *scale = streams->scale.data;
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase, forward->rows, 1)) >= 0; done++) {
        float coefficients[LAMINA_MOST_STREAMS];
        float *hidden = forward->hidden + row * size, *own = streams_of_row(forward, row);
        compute_coefficients(forward, streams, &streams->correct, hidden, coefficients, worker);
        forward->level->add_scaled(size, -1, own, hidden);
        for (int64_t to = 0; to < forward->group->streams; to++)
            forward->level->add_scaled(size, 1 + coefficients[to], hidden, own + to * size);
        for (int64_t i = 0; i < size; i++)
            hidden[i] = own[i] * scale[i];
    }
    finish_phase(worker, phase, done, forward->rows);
}

/* Adds the layer's input to all streams but the first: norm(added). */
static void add_to_streams(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Group *group = forward->group;
    const int64_t size = group->hidden_size;
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase, forward->rows, 1)) >= 0; done++) {
        float *own = streams_of_row(forward, row), *added = forward->at.added + row * size;
        forward->level->normalize(&layer->after_input, 0, added, (float)group->eps, size, added);
        for (int64_t to = 1; to < group->streams; to++)
            forward->level->add_scaled(size, 1, added, own + to * size);
        if (group->rounds)
            round_to_bf16(own, 1, group->streams * size, 0, group->streams * size);
    }
    finish_phase(worker, phase, done, forward->rows);
}
