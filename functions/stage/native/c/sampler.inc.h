/* Draws a token from logits, and computes log-probabilities. `functions/stage/engine/sampler.py` does the same in numpy, to the bit.

   No result depends on the CPU: a token's weight comes from additions and multiplications of single numbers (`weigh`), weights are
   summed as integers, and logarithms are computed here. Loops over the whole vocabulary do little for each token and have no
   branches that depend on it; all else is done for the few tokens that may be drawn. */

enum {
    DROPPED_BITS = 16,                          /* of a score's distance from the greatest: the others number its bucket, */
    BUCKETS = (0x7F800000 >> DROPPED_BITS) + 1, /* 128 buckets for each power of two; the last has the tokens of score -infinity */
    WEIGHT_BITS = 40,
};

typedef struct {
    const float *scores;
    float *weights; /* exp(score - greatest); 0 for tokens that a filter dropped */
    int64_t size;
    float greatest;
    uint64_t *keys; /* scratch, [size] */
} Scores;

/* Some tokens, by rising token id. */
typedef struct {
    int32_t *ids; /* NULL: all tokens */
    int64_t count;
} Tokens;

INLINE int64_t token_at(const Tokens *tokens, int64_t place)
{
    return tokens->ids ? tokens->ids[place] : place;
}

/* What a filter keeps: tokens with a greater score, and those with the same score up to a token id. */
typedef struct {
    float score;
    int64_t token;
} Bound;

INLINE bool is_kept(const Bound *bound, float score, int64_t token)
{
    return score > bound->score || (score == bound->score && token <= bound->token);
}

/* The weight as a multiple of 2^-WEIGHT_BITS, rounded to the nearest: the last bits of the sum with 2^52. */
INLINE int64_t integer_weight(float weight)
{
    const double sum = (double)weight * (double)((int64_t)1 << WEIGHT_BITS) + 0x1p52;
    int64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    return bits & (((int64_t)1 << 52) - 1);
}

INLINE int64_t bucket_of(const Scores *of, float score)
{
    const float distance = of->greatest - score;
    uint32_t bits;
    memcpy(&bits, &distance, sizeof bits);
    return bits >> DROPPED_BITS;
}

/* Keys are ordered by falling score, then by rising token id. A key is a score's bits, and then the token id. */
INLINE uint64_t key_of(float score, int64_t token)
{
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits = score == 0 ? 0x80000000u : bits & 0x80000000u ? ~bits : bits | 0x80000000u; /* rises with the score */
    return (uint64_t)~bits << 32 | (uint64_t)token;
}

static int compare_keys(const void *a, const void *b)
{
    const uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return left < right ? -1 : left > right;
}

/* Sorts the keys of those tokens that are in buckets first to last. Returns their number. */
static int64_t sort_buckets(const Scores *of, const Tokens *tokens, int64_t first, int64_t last)
{
    int64_t found = 0;
    for (int64_t place = 0; place < tokens->count; place++) {
        const int64_t token = token_at(tokens, place), bucket = bucket_of(of, of->scores[token]);
        if (bucket >= first && bucket <= last)
            of->keys[found++] = key_of(of->scores[token], token);
    }
    qsort(of->keys, (size_t)found, sizeof *of->keys, compare_keys);
    return found;
}

INLINE int64_t token_of(uint64_t key)
{
    return (int64_t)(key & 0xFFFFFFFFu);
}

/* The bucket in which the token number `count` from the top lies, and how many tokens are in the buckets before it. The last
   bucket if so many tokens have no score above -infinity. */
static int64_t bucket_of_rank(const Scores *of, int64_t count, int64_t *before)
{
    int64_t counts[BUCKETS] = {0}, bucket = 0;
    *before = 0;
    for (int64_t token = 0; token < of->size; token++)
        counts[bucket_of(of, of->scores[token])]++;
    while (bucket < BUCKETS - 1 && *before + counts[bucket] < count)
        *before += counts[bucket++];
    return bucket;
}

/* Keeps the `count` greatest scores, and all that equal the least of them. */
static void keep_top_k(const Scores *of, int64_t count)
{
    int64_t before;
    const int64_t bucket = bucket_of_rank(of, count, &before);
    if (bucket == BUCKETS - 1)
        return;
    sort_buckets(of, &(Tokens){.count = of->size}, bucket, bucket);
    const float least = of->scores[token_of(of->keys[count - before - 1])];
    for (int64_t token = 0; token < of->size; token++)
        of->weights[token] = of->scores[token] < least ? 0 : of->weights[token];
}

static int64_t sum_of_weights(const Scores *of)
{
    int64_t sum = 0;
    for (int64_t token = 0; token < of->size; token++)
        sum += integer_weight(of->weights[token]);
    return sum;
}

/* Finds the tokens with a weight of at least `least`, which is positive. */
static void find_tokens(const Scores *of, float least, Tokens *tokens)
{
    enum { TOGETHER = 64 };
    int32_t wanted;
    memcpy(&wanted, &least, sizeof wanted); /* positive floats are ordered as their bits are */
    for (int64_t first = 0; first < of->size; first += TOGETHER) {
        const int64_t end = smaller(of->size, first + TOGETHER);
        int32_t most = 0;
        for (int64_t token = first; token < end; token++) {
            int32_t bits;
            memcpy(&bits, of->weights + token, sizeof bits);
            most = bits > most ? bits : most;
        }
        if (most >= wanted)
            for (int64_t token = first; token < end; token++)
                if (of->weights[token] >= least)
                    tokens->ids[tokens->count++] = (int32_t)token;
    }
}

/* Keeps the fewest tokens, the most probable first, whose share of the probability is at least top_p: those of `tokens`, which it
   finds, within the bound that it returns. */
static Bound keep_top_p(const Scores *of, double top_p, Tokens *tokens)
{
    const int64_t total = sum_of_weights(of);
    const double wanted = top_p * (double)total;
    /* Even all tokens of such a share would be left out. A thousandth less, for what is rounded. */
    const double share = ((double)total - wanted) / (double)of->size * 0.999;
    find_tokens(of, share < 1 ? __FLT_MIN__ : (float)(share * 0x1p-40 * 0.999), tokens);
    int64_t masses[BUCKETS] = {0}, mass = 0, bucket = 0;
    for (int64_t place = 0; place < tokens->count; place++) {
        const int64_t token = tokens->ids[place];
        masses[bucket_of(of, of->scores[token])] += integer_weight(of->weights[token]);
    }
    while (bucket < BUCKETS - 1 && (double)(mass + masses[bucket]) < wanted)
        mass += masses[bucket++];
    const int64_t found = sort_buckets(of, tokens, bucket, bucket);
    Bound kept = {of->greatest, INT64_MAX};
    for (int64_t i = 0; i < found; i++) {
        const int64_t token = token_of(of->keys[i]);
        if ((double)mass >= wanted)
            break;
        kept = (Bound){of->scores[token], token};
        mass += integer_weight(of->weights[token]);
    }
    return kept;
}

/* Natural logarithm of a positive finite double, within some units of the last place (fdlibm's polynomial). */
static double logarithm(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int64_t exponent = (int64_t)(bits >> 52) - 1022; /* x = fraction * 2^exponent, fraction in [1/2, 1) */
    bits = (bits & 0x000FFFFFFFFFFFFFu) | 0x3FE0000000000000u;
    double fraction;
    memcpy(&fraction, &bits, sizeof fraction);
    if (fraction < 0.7071067811865476) {
        fraction = fraction * 2.0;
        exponent--;
    }
    const double f = fraction - 1.0, s = f / (2.0 + f), z = s * s;
    double r = 0.14798198605116586;
    r = r * z + 0.15313837699209373;
    r = r * z + 0.1818357216161805;
    r = r * z + 0.22222198432149784;
    r = r * z + 0.2857142874366239;
    r = r * z + 0.3999999999940942;
    r = r * z + 0.6666666666666735;
    const double low = s * (r * z) + (double)exponent * 1.9082149292705877e-10;
    return (double)exponent * 0.6931471803691238 + (low + 2.0 * s);
}

/* Philox 4x64 with ten rounds: four numbers of 64 bits from a key and a counter, as numpy.random.Philox computes them. */
static void philox(uint64_t seed, uint64_t position, uint64_t block, uint64_t numbers[4])
{
    uint64_t c0 = block + 1, c1 = position, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
    for (int round = 0; round < 10; round++) {
        const unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * c0, b = (unsigned __int128)0xCA5A826395121157u * c2;
        c0 = (uint64_t)(b >> 64) ^ c1 ^ k0;
        c2 = (uint64_t)(a >> 64) ^ c3 ^ k1;
        c1 = (uint64_t)b;
        c3 = (uint64_t)a;
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    numbers[0] = c0, numbers[1] = c1, numbers[2] = c2, numbers[3] = c3;
}

/* In (0, 1), with 53 bits. */
static double uniform_of(uint64_t number)
{
    const double uniform = ((double)(number >> 11) + 0.5) * 0x1p-53;
    return uniform < 1.0 ? uniform : 1.0 - 0x1p-53;
}

/* Draws one of `tokens` within a bound with a probability proportional to its weight: the one whose exponential variate, divided
   by its weight, is the least. `greatest` has the greatest score, and so a weight of 1.

   As 1 - u <= -log(u), most tokens need no logarithm. */
static int64_t race(const Scores *of, const Tokens *tokens, const Bound *bound, int64_t greatest, const Draw *draw)
{
    uint64_t numbers[4];
    float least_weight = draw->min_p > 0 ? (float)draw->min_p : __FLT_MIN__;
    philox((uint64_t)draw->seed, (uint64_t)draw->position, (uint64_t)greatest / 4, numbers);
    int64_t best = greatest, block = greatest / 4;
    double least = -logarithm(uniform_of(numbers[greatest % 4]));
    for (int64_t place = 0; place < tokens->count; place++) {
        const int64_t token = token_at(tokens, place);
        const float weight = of->weights[token];
        if (weight < least_weight || !is_kept(bound, of->scores[token], token))
            continue;
        if (token / 4 != block) {
            block = token / 4;
            philox((uint64_t)draw->seed, (uint64_t)draw->position, (uint64_t)block, numbers);
        }
        const double uniform = uniform_of(numbers[token % 4]);
        if (1.0 - uniform > (double)weight * least * 1.000001)
            continue;
        const double quotient = -logarithm(uniform) / (double)weight;
        if (quotient < least || (quotient == least && token < best)) {
            least = quotient;
            best = token;
        }
    }
    return best;
}

/* weights [size] = exp(score - greatest), relative error about 3e-7, and 0 below e^-87. Nothing is fused: the bits are those of
   every other level, and of numpy in `functions/stage/engine/sampler.py`. */
static void weigh(const float *scores, float greatest, int64_t size, float *weights)
{
    const vec lowest = every_f32(-87.0f);
    for (int64_t i = 0; i < size; i += LANES) {
        vec x = sub_f32(row_part(scores, i, size), every_f32(greatest)), limited = max_f32(x, lowest);
        vec n = round_f32(mul_f32(limited, every_f32(1.44269504f)));
        vec r = sub_f32(sub_f32(limited, mul_f32(n, every_f32(0.693359375f))), mul_f32(n, every_f32(-2.12194440e-4f)));
        vec y = every_f32(1.9875691500e-4f);
        y = add_f32(mul_f32(y, r), every_f32(1.3981999507e-3f));
        y = add_f32(mul_f32(y, r), every_f32(8.3334519073e-3f));
        y = add_f32(mul_f32(y, r), every_f32(4.1665795894e-2f));
        y = add_f32(mul_f32(y, r), every_f32(1.6666665459e-1f));
        y = add_f32(mul_f32(y, r), every_f32(5.0000001201e-1f));
        y = add_f32(add_f32(mul_f32(y, mul_f32(r, r)), r), every_f32(1.0f));
        vec power = shift_left_i32(add_i32(i32_of_f32(n), every_i32(127)), 23);
        store_row_part(weights, i, size, if_less_f32(x, lowest, zeros(), mul_f32(y, power)));
    }
}

/* Finds the greatest score. Returns its token, of several the first; -1 if that is infinite or there is a NaN. */
static int64_t find_greatest(Scores *of)
{
    const int32_t infinity = 0x7F800000;
    int32_t most = INT32_MIN, least = INT32_MAX;
    for (int64_t token = 0; token < of->size; token++) {
        int32_t bits; /* ordered as the scores are, NaN outside the infinities */
        memcpy(&bits, of->scores + token, sizeof bits);
        bits ^= bits >> 31 & 0x7FFFFFFF;
        most = bits > most ? bits : most;
        least = bits < least ? bits : least;
    }
    if (most >= infinity || most <= ~infinity || least < ~infinity)
        return -1;
    most ^= most >> 31 & 0x7FFFFFFF;
    memcpy(&of->greatest, &most, sizeof most);
    int64_t greatest = 0;
    while (of->scores[greatest] != of->greatest)
        greatest++;
    return greatest;
}

/* scores [size] = logits / temperature, or -infinity for tokens that are not allowed. */
static void scale(const Draw *draw, float *scores, int64_t size)
{
    const float *logits = draw->logits.data, divisor = draw->temperature == 0 ? 1.0f : (float)draw->temperature;
    const uint32_t *allowed = draw->allowed.data;
    if (!draw->allowed.bytes) {
        for (int64_t token = 0; token < size; token++)
            scores[token] = logits[token] / divisor;
        return;
    }
    const int64_t words = draw->allowed.bytes / 4;
    for (int64_t first = 0; first < size; first += 32) {
        const uint32_t word = first / 32 < words ? allowed[first / 32] : 0;
        for (int64_t token = first; token < smaller(size, first + 32); token++)
            scores[token] = word >> (token - first) & 1 ? logits[token] / divisor : -__builtin_inff();
    }
}

static int64_t draw_token(const Draw *draw, uint8_t *scratch)
{
    Scores of = {.scores = draw->logits.data, .size = draw->logits.bytes / 4};
    int64_t greatest = find_greatest(&of);
    if (greatest < 0 || (draw->temperature == 0 && !draw->allowed.bytes))
        return greatest < 0 ? -LAMINA_NOT_FINITE : greatest;
    const int64_t floats = rounded_up(of.size, LANES);
    of.keys = (uint64_t *)scratch;
    float *scores = (float *)(of.keys + of.size);
    of.weights = scores + floats;
    Tokens tokens = {(int32_t *)(of.weights + floats), 0};
    scale(draw, scores, of.size);
    of.scores = scores;
    greatest = find_greatest(&of);
    if (greatest < 0 || draw->temperature == 0)
        return greatest < 0 ? -LAMINA_NOT_FINITE : greatest;
    weigh(of.scores, of.greatest, of.size, of.weights);
    if (draw->top_k > 0 && draw->top_k < of.size)
        keep_top_k(&of, draw->top_k);
    Bound bound = {-__builtin_inff(), INT64_MAX};
    if (draw->top_p < 1)
        bound = keep_top_p(&of, draw->top_p, &tokens);
    else
        tokens = (Tokens){NULL, of.size};
    return race(&of, &tokens, &bound, greatest, draw);
}

static int compute_softmax(Softmax *softmax)
{
    Scores scores = {.scores = softmax->scores.data, .weights = softmax->weights.data, .size = softmax->scores.bytes / 4,
                     .keys = softmax->keys.data};
    if (find_greatest(&scores) < 0)
        return LAMINA_NOT_FINITE;
    weigh(scores.scores, scores.greatest, scores.size, scores.weights);
    softmax->log_sum = logarithm((double)sum_of_weights(&scores) / (double)((int64_t)1 << WEIGHT_BITS));
    const int64_t count = softmax->top.bytes / 8;
    if (count) {
        int64_t before;
        sort_buckets(&scores, &(Tokens){.count = scores.size}, 0, bucket_of_rank(&scores, count, &before));
        for (int64_t i = 0; i < count; i++)
            ((int64_t *)softmax->top.data)[i] = token_of(scores.keys[i]);
    }
    return LAMINA_OK;
}
