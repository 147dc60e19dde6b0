/* The choice of a row's experts, from the numbers that its router gives. It depends on these alone. */

static float greatest_of(const float *numbers, int64_t count)
{
    float greatest = numbers[0];
    for (int64_t i = 1; i < count; i++)
        greatest = numbers[i] > greatest ? numbers[i] : greatest;
    return greatest;
}

static void softmax_of(float *numbers, int64_t count)
{
    const vec greatest = every_f32(greatest_of(numbers, count));
    float sum = 0;
    for (int64_t i = 0; i < count; i += LANES)
        store_row_part(numbers, i, count, exp_f32(sub_f32(row_part(numbers, i, count), greatest)));
    for (int64_t i = 0; i < count; i++)
        sum += numbers[i];
    for (int64_t i = 0; i < count; i++)
        numbers[i] /= sum;
}

static void sigmoids_of(float *numbers, int64_t count)
{
    for (int64_t i = 0; i < count; i += LANES)
        store_row_part(numbers, i, count, sigmoid_of(row_part(numbers, i, count)));
}

/* Marks the `most` greatest of numbers [count], of equal ones the first. Those that are out already are never marked. */
static void mark_greatest(const float *numbers, int64_t count, int64_t most, const bool *out, bool *marked)
{
    memset(marked, 0, (size_t)count);
    for (int64_t taken = 0; taken < most; taken++) {
        int64_t best = -1;
        for (int64_t i = 0; i < count; i++)
            if (!marked[i] && !out[i] && (best < 0 || numbers[i] > numbers[best]))
                best = i;
        marked[best] = true;
    }
}

/* Marks the experts that are in no chosen group. */
static void leave_groups(const Experts *experts, const float *scores, bool *out)
{
    static const bool none[LAMINA_MOST_EXPERTS];
    const int64_t size = experts->num_experts / experts->groups;
    float of_groups[LAMINA_MOST_EXPERTS];
    bool marked[LAMINA_MOST_EXPERTS];
    for (int64_t group = 0; group < experts->groups; group++) {
        const float *own = scores + group * size;
        mark_greatest(own, size, experts->two_of_group ? 2 : 1, none, marked);
        of_groups[group] = 0;
        for (int64_t i = 0; i < size; i++)
            of_groups[group] += marked[i] ? own[i] : 0;
    }
    mark_greatest(of_groups, experts->groups, experts->chosen_groups, none, marked);
    for (int64_t i = 0; i < experts->num_experts; i++)
        out[i] = !marked[i / size];
}

/* Two experts, as `sparsemixer` of transformers (models/phimoe/modeling_phimoe.py) chooses them. */
static void mix_two(const Experts *experts, const float *logits, int32_t *numbers, float *weights)
{
    const int64_t count = experts->num_experts;
    float shares[LAMINA_MOST_EXPERTS];
    bool none[LAMINA_MOST_EXPERTS] = {0}, taken[LAMINA_MOST_EXPERTS] = {0}, marked[LAMINA_MOST_EXPERTS];
    for (int64_t turn = 0; turn < 2; turn++) {
        int64_t best = 0, in = 0;
        mark_greatest(logits, count, 1, turn ? taken : none, marked);
        while (!marked[best])
            best++;
        for (int64_t i = 0; i < count; i++) {
            const float magnitude = logits[i] < 0 ? -logits[i] : logits[i], below = logits[best] - logits[i];
            if (!taken[i] && !(below / (magnitude > logits[best] ? magnitude : logits[best]) > (float)experts->threshold))
                shares[in++] = logits[i];
        }
        softmax_of(shares, in);
        numbers[turn] = (int32_t)best;
        weights[turn] = greatest_of(shares, in);
        taken[best] = true;
    }
    if (numbers[0] > numbers[1]) { /* what experts give is added in the order of their numbers */
        const int32_t number = numbers[0];
        const float weight = weights[0];
        numbers[0] = numbers[1], weights[0] = weights[1];
        numbers[1] = number, weights[1] = weight;
    }
}

static void choose_experts(const Experts *experts, float *logits, int32_t *numbers, float *weights)
{
    const int64_t count = experts->num_experts;
    float choice[LAMINA_MOST_EXPERTS], sum = 0;
    bool out[LAMINA_MOST_EXPERTS] = {0}, marked[LAMINA_MOST_EXPERTS];
    if (experts->shared_gate)
        sigmoids_of(logits + count, 1);
    if (experts->scores == LAMINA_SPARSE_MIX) {
        mix_two(experts, logits, numbers, weights);
        return;
    }
    if (experts->scores == LAMINA_SOFTMAX)
        softmax_of(logits, count);
    else if (experts->scores == LAMINA_SIGMOID)
        sigmoids_of(logits, count);
    for (int64_t i = 0; i < count; i++)
        choice[i] = logits[i] + (experts->correction.bytes ? ((const float *)experts->correction.data)[i] : 0.0f);
    if (experts->groups > experts->chosen_groups)
        leave_groups(experts, choice, out);
    mark_greatest(choice, count, experts->chosen, out, marked);
    for (int64_t i = 0, taken = 0; i < count; i++)
        if (marked[i]) {
            numbers[taken] = (int32_t)i;
            weights[taken++] = logits[i];
        }
    if (experts->scores == LAMINA_SOFTMAX_OF_CHOSEN)
        softmax_of(weights, experts->chosen);
    for (int64_t i = 0; i < experts->chosen; i++)
        sum += weights[i];
    for (int64_t i = 0; i < experts->chosen; i++)
        weights[i] = (experts->normalized ? weights[i] / (sum + (float)experts->normal_eps) : weights[i]) * (float)experts->scale;
    for (int64_t i = 0; experts->scales.bytes && i < experts->chosen; i++)
        weights[i] *= ((const float *)experts->scales.data)[numbers[i]];
}
