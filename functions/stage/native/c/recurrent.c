/* The phases of a layer's recurrent mixer. */

#include "forward.h"

enum { CHANNELS = 256 }; /* in a piece of work */

/* The rows of a segment in a layer's mixer. */
static Mixing mixing_of(const Forward *forward, const Layer *layer, int64_t number)
{
    const Segment *segment = &forward->segments[number];
    const Recurrent *mixer = &layer->recurrent;
    const int64_t first = forward->at.first_rows[number];
    return (Mixing){
        .mixer = mixer,
        .rows = segment->length,
        .position = segment->position,
        .inputs = forward->at.recurrent_inputs + first * mixer->in.outs,
        .steps = forward->at.steps + first * 2 * mixer->heads,
        .outputs = forward->at.recurrent_outputs + first * mixer->out.width,
        .states = segment->states.data,
        .state_values = forward->group->state_values,
        .copies = segment->copies.data,
        .copied_at = segment->copied_at.data,
        .num_copies = segment->copied_at.bytes / (int64_t)sizeof(int64_t),
        .kept = segment->kept.bytes ? segment->kept.data : NULL,
        .kept_values = forward->group->kept_values,
        .kept_from = segment->kept_from,
        .repeats = forward->repeats,
    };
}

void update_states(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Recurrent *mixer = &layer->recurrent;
    const int64_t blocks = (mixer->channels + CHANNELS - 1) / CHANNELS;
    int64_t done = 0, piece;
    for (; (piece = take_piece(worker, phase + CONVOLVE, forward->num_segments, blocks)) >= 0; done++) {
        const Mixing mixing = mixing_of(forward, layer, piece / blocks);
        const int64_t first = piece % blocks * CHANNELS;
        forward->level->convolve(&mixing, first, smaller(mixer->channels, first + CHANNELS));
    }
    finish_phase(worker, phase + CONVOLVE, done, forward->num_segments * blocks);
    if (mixer->kind == LAMINA_CONVOLUTION)
        return;
    for (done = 0; (piece = take_piece(worker, phase + PREPARE, forward->rows, 1)) >= 0; done++) {
        const Mixing mixing = mixing_of(forward, layer, forward->at.places[piece].segment);
        forward->level->prepare_row(&mixing, forward->at.places[piece].position - mixing.position);
    }
    finish_phase(worker, phase + PREPARE, done, forward->rows);
    const int64_t parts = (mixer->head_size + LAMINA_COLUMNS - 1) / LAMINA_COLUMNS;
    for (done = 0; (piece = take_piece(worker, phase + RECUR, forward->num_segments * mixer->heads, parts)) >= 0; done++) {
        const Mixing mixing = mixing_of(forward, layer, piece / parts / mixer->heads);
        forward->level->recur(&mixing, piece / parts % mixer->heads, piece % parts * LAMINA_COLUMNS);
    }
    finish_phase(worker, phase + RECUR, done, forward->num_segments * mixer->heads * parts);
}

void mix_recurrently(const Forward *forward, const Layer *layer, const Worker *worker, int64_t phase)
{
    const Recurrent *mixer = &layer->recurrent;
    multiply(forward, &mixer->in, forward->hidden, &layer->before_attention, forward->at.recurrent_inputs, SET, worker,
             phase + PACK_INPUTS);
    if (mixer->steps.weights.bytes)
        multiply(forward, &mixer->steps, forward->hidden, &layer->before_attention, forward->at.steps, SET, worker,
                 phase + PACK_STEPS);
    update_states(forward, layer, worker, phase);
    if (mixer->kind == LAMINA_CONVOLUTION)
        return;
    int64_t done = 0, row;
    for (; (row = take_piece(worker, phase + GATE, forward->rows, 1)) >= 0; done++) {
        const Mixing mixing = mixing_of(forward, layer, forward->at.places[row].segment);
        forward->level->gate_row(&mixing, forward->at.places[row].position - mixing.position);
    }
    finish_phase(worker, phase + GATE, done, forward->rows);
}
