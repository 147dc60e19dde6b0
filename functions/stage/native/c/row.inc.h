/* Rows of numbers: norms, activations, and packing for a matrix. */

/* Up to LANES numbers of a row from i on, padded with zeros. */
INLINE vec row_part(const float *row, int64_t i, int64_t size)
{
    int64_t left = size - i;
    return left >= LANES ? load(row + i) : left > 0 ? load_part(row + i, left) : zeros();
}

INLINE void store_row_part(float *row, int64_t i, int64_t size, vec numbers)
{
    if (size - i >= LANES)
        store(row + i, numbers);
    else
        store_part(row + i, numbers, size - i);
}

static void subtract_mean(const float *x, int64_t size, float *out)
{
    vec sum = zeros();
    for (int64_t i = 0; i < size; i += LANES)
        sum = add_f32(sum, row_part(x, i, size));
    vec mean = every_f32(sum_f32(sum) / (float)size);
    for (int64_t i = 0; i < size; i += LANES)
        store_row_part(out, i, size, sub_f32(row_part(x, i, size), mean));
}

static void normalize(const Norm *norm, int64_t first, const float *x, float eps, int64_t size, float *out)
{
    const float *gain = (const float *)norm->gain.data + first;
    if (norm->kind == LAMINA_LAYER_NORM) {
        subtract_mean(x, size, out);
        x = out;
    }
    vec squares = zeros();
    for (int64_t i = 0; i < size; i += LANES) {
        vec part = row_part(x, i, size);
        squares = fma_f32(part, part, squares);
    }
    vec inverse = every_f32(1.0f / __builtin_sqrtf(sum_f32(squares) / (float)size + eps));
    for (int64_t i = 0; i < size; i += LANES)
        store_row_part(out, i, size, mul_f32(mul_f32(row_part(x, i, size), inverse), row_part(gain, i, size)));
    if (norm->biases.bytes) {
        const float *biases = (const float *)norm->biases.data + first;
        for (int64_t i = 0; i < size; i += LANES)
            store_row_part(out, i, size, add_f32(row_part(out, i, size), row_part(biases, i, size)));
    }
}

/* 2^n times a polynomial (Cephes' expf), relative error about 2e-7. Gives 0 below -87 and for -infinity, e^88 above 88, and NaN
   for NaN and infinity. */
INLINE vec exp_f32(vec x)
{
    const vec lowest = every_f32(-87.0f);
    vec limited = min_f32(max_f32(x, lowest), every_f32(88.0f));
    vec n = round_f32(mul_f32(limited, every_f32(1.44269504f)));
    vec r = fma_f32(n, every_f32(-0.693359375f), limited);
    r = fma_f32(n, every_f32(2.12194440e-4f), r);
    vec y = every_f32(1.9875691500e-4f);
    y = fma_f32(y, r, every_f32(1.3981999507e-3f));
    y = fma_f32(y, r, every_f32(8.3334519073e-3f));
    y = fma_f32(y, r, every_f32(4.1665795894e-2f));
    y = fma_f32(y, r, every_f32(1.6666665459e-1f));
    y = fma_f32(y, r, every_f32(5.0000001201e-1f));
    y = add_f32(fma_f32(y, mul_f32(r, r), r), every_f32(1.0f));
    vec power = shift_left_i32(add_i32(i32_of_f32(n), every_i32(127)), 23);
    vec zero_or_nan = sub_f32(x, x);
    return if_less_f32(x, lowest, zeros(), add_f32(mul_f32(y, power), zero_or_nan));
}

/* x / (1 + exp(-x)) */
INLINE vec silu_of(vec x) { return div_f32(x, add_f32(every_f32(1.0f), exp_f32(sub_f32(zeros(), x)))); }

INLINE vec sigmoid_of(vec x) { return div_f32(every_f32(1.0f), add_f32(every_f32(1.0f), exp_f32(sub_f32(zeros(), x)))); }

/* x times the share of a normal distribution below x. The error function is Abramowitz and Stegun's 7.1.26, error 1.5e-7. */
INLINE vec gelu_of(vec x)
{
    const vec magnitude = and_i32(x, every_i32(0x7FFFFFFF)), one = every_f32(1.0f);
    vec t = div_f32(one, fma_f32(magnitude, every_f32(0.3275911f * 0.70710678f), one));
    vec y = every_f32(1.061405429f);
    y = fma_f32(y, t, every_f32(-1.453152027f));
    y = fma_f32(y, t, every_f32(1.421413741f));
    y = fma_f32(y, t, every_f32(-0.284496736f));
    y = mul_f32(fma_f32(y, t, every_f32(0.254829592f)), t);
    vec beyond = mul_f32(y, exp_f32(mul_f32(mul_f32(x, x), every_f32(-0.5f))));
    return sub_f32(max_f32(zeros(), x), mul_f32(mul_f32(magnitude, every_f32(0.5f)), beyond));
}

/* x / (1 + exp(-2 u)) with u = sqrt(2 / π) (x + 0.044715 x³): the tanh form of GELU. */
INLINE vec gelu_tanh_of(vec x)
{
    vec cubic = fma_f32(mul_f32(mul_f32(x, x), x), every_f32(0.044715f), x);
    vec power = min_f32(every_f32(88.0f), mul_f32(cubic, every_f32(-2 * 0.7978845608f)));
    return div_f32(x, add_f32(every_f32(1.0f), exp_f32(power)));
}

INLINE vec relu2_of(vec x)
{
    vec positive = max_f32(zeros(), x);
    return mul_f32(positive, positive);
}

/* https://arxiv.org/abs/2411.13010 */
INLINE vec xielu_of(const double numbers[4], vec x)
{
    vec above = mul_f32(mul_f32(every_f32((float)numbers[0]), x), x);
    vec power = exp_f32(min_f32(every_f32((float)numbers[3]), x));
    vec below = mul_f32(sub_f32(sub_f32(power, every_f32(1.0f)), x), every_f32((float)numbers[1]));
    return fma_f32(every_f32((float)numbers[2]), x, if_less_f32(zeros(), x, above, below));
}

#define ACTIVATE(x_activated)                                                                    \
    for (int64_t i = 0; i < count; i += LANES) {                                                 \
        vec x = row_part(y, i, count), activated = x_activated;                                  \
        store_row_part(y, i, count, times ? mul_f32(activated, row_part(times, i, count)) : activated); \
    }                                                                                            \
    break

/* y = (times + 1) * y * sigmoid(alpha * y), of clamped numbers. */
static void swiglu(const double numbers[2], int64_t count, const float *times, float *y)
{
    const vec alpha = every_f32((float)numbers[0]), limit = every_f32((float)numbers[1]), lowest = every_f32((float)-numbers[1]);
    for (int64_t i = 0; i < count; i += LANES) {
        const vec gate = min_f32(limit, row_part(y, i, count)), up = max_f32(lowest, min_f32(limit, row_part(times, i, count)));
        store_row_part(y, i, count, mul_f32(add_f32(up, every_f32(1.0f)), mul_f32(gate, sigmoid_of(mul_f32(gate, alpha)))));
    }
}

static void activate(const Layer *layer, int64_t count, const float *times, float *y)
{
    switch ((Activation)layer->activation) {
    case LAMINA_SWIGLU: swiglu(layer->swiglu, count, times, y); break;
    case LAMINA_SILU: ACTIVATE(silu_of(x));
    case LAMINA_GELU: ACTIVATE(gelu_of(x));
    case LAMINA_GELU_TANH: ACTIVATE(gelu_tanh_of(x));
    case LAMINA_RELU: ACTIVATE(max_f32(zeros(), x));
    case LAMINA_RELU2: ACTIVATE(relu2_of(x));
    case LAMINA_XIELU: ACTIVATE(xielu_of(layer->xielu, x));
    }
}
#undef ACTIVATE

static void cut_below(int64_t count, float cutoff, float *y)
{
    subtract_mean(y, count, y);
    vec squares = zeros();
    for (int64_t i = 0; i < count; i += LANES) {
        vec part = row_part(y, i, count);
        squares = fma_f32(part, part, squares);
    }
    const vec below = every_f32(cutoff * __builtin_sqrtf(sum_f32(squares) / (float)count));
    for (int64_t i = 0; i < count; i += LANES)
        store_row_part(y, i, count, max_f32(zeros(), sub_f32(row_part(y, i, count), below)));
}

/* As in `cap_scores`. */
static void tanh_of_row(int64_t count, float *y)
{
    const vec one = every_f32(1.0f), two = every_f32(2.0f);
    for (int64_t i = 0; i < count; i += LANES) {
        vec power = exp_f32(mul_f32(row_part(y, i, count), two));
        store_row_part(y, i, count, sub_f32(one, div_f32(two, add_f32(power, one))));
    }
}

static void add_scaled(int64_t count, float factor, const float *x, float *y)
{
    const vec every = every_f32(factor);
    for (int64_t i = 0; i < count; i += LANES)
        store_row_part(y, i, count, fma_f32(every, row_part(x, i, count), row_part(y, i, count)));
}

/* The integer that a row's largest number becomes. A lane's sum of products with up to 127 must fit an int32. */
INLINE float largest_integer(int64_t size)
{
    int64_t products = (size + LANES - 1) / LANES;
    return (float)smaller(32767, INT32_MAX / (127 * products));
}

/* The largest magnitude of a row, at least 1e-30, or NaN if there is one. */
INLINE float largest_of(const float *x, int64_t size)
{
    /* Positive floats are ordered as their bits are, NaN largest. */
    vec largest_bits = every_f32(1e-30f);
    for (int64_t i = 0; i < size; i += LANES)
        largest_bits = max_i32(largest_bits, and_i32(row_part(x, i, size), every_i32(0x7FFFFFFF)));
    int32_t most = largest_i32(largest_bits);
    float largest;
    memcpy(&largest, &most, sizeof largest);
    return largest;
}

INLINE float pack_for_int8(const float *x, int64_t size, uint8_t *packed)
{
    float largest = largest_of(x, size), steps = largest_integer(size);
    vec scale = every_f32(steps / largest);
    for (int64_t i = 0; i < size; i += 2 * LANES) {
        vec first = mul_f32(row_part(x, i, size), scale), second = mul_f32(row_part(x, i + LANES, size), scale);
        store(packed + 2 * i, i16_of_f32(first, second));
    }
    return largest / steps;
}

enum { LARGEST_OF_12_BITS = 2047 };

/* As `largest_of`, for 32 numbers. */
INLINE float largest_of_block(vec first, vec second)
{
    const vec magnitude = every_i32(0x7FFFFFFF);
    int32_t bits = largest_i32(max_i32(max_i32(and_i32(first, magnitude), and_i32(second, magnitude)), every_f32(1e-30f)));
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    return largest;
}

/* A number is (16 * high + low) times its block's scale. A block has 32 bytes of high parts, -128 to 127, then 32 bytes of low
   parts, 0 to 15. After all blocks come their scales, then their sums, one float32 for each block. */
INLINE void pack_for_q4(const float *x, int64_t size, uint8_t *packed)
{
    const int64_t blocks = rounded_up(size, LAMINA_Q4_BLOCK) / LAMINA_Q4_BLOCK;
    float *scales = (float *)(packed + blocks * LAMINA_Q4_BLOCK * 2), *sums = scales + blocks;
    for (int64_t block = 0; block < blocks; block++, packed += 2 * LAMINA_Q4_BLOCK) {
        vec first = row_part(x, block * LAMINA_Q4_BLOCK, size), second = row_part(x, block * LAMINA_Q4_BLOCK + LANES, size);
        float largest = largest_of_block(first, second);
        vec steps = every_f32(LARGEST_OF_12_BITS / largest);
        first = i32_of_f32(round_f32(mul_f32(first, steps)));
        second = i32_of_f32(round_f32(mul_f32(second, steps)));
        store_bytes(packed, shift_right_i32(first, 4));
        store_bytes(packed + LANES, shift_right_i32(second, 4));
        store_bytes(packed + 2 * LANES, and_i32(first, every_i32(15)));
        store_bytes(packed + 3 * LANES, and_i32(second, every_i32(15)));
        scales[block] = largest / LARGEST_OF_12_BITS;
        sums[block] = scales[block] * sum_f32(f32_of_i32(add_i32(first, second)));
    }
}

/* A packed block of a row of activations. `sums` and `scaled_sums` are those of the block and of its halves. */
typedef struct {
    int8_t numbers[LAMINA_BLOCK];
    float scale;
    int32_t minus_sums[3];
    float scaled_sums[3];
    int32_t unused;
} RowBlock;

enum { LARGEST_OF_8_BITS = 127 };

static void pack_for_blocks(const float *x, int64_t size, uint8_t *packed)
{
    RowBlock *blocks = (RowBlock *)packed;
    for (int64_t block = 0; block < size / LAMINA_BLOCK; block++) {
        const float *from = x + block * LAMINA_BLOCK;
        vec first = load(from), second = load(from + LANES);
        RowBlock *to = &blocks[block];
        float largest = largest_of_block(first, second);
        vec steps = every_f32(LARGEST_OF_8_BITS / largest), most = every_f32(LARGEST_OF_8_BITS);
        first = i32_of_f32(round_f32(min_f32(mul_f32(first, steps), most))); /* NaN becomes `most` */
        second = i32_of_f32(round_f32(min_f32(mul_f32(second, steps), most)));
        store_bytes(to->numbers, first);
        store_bytes(to->numbers + LANES, second);
        to->scale = largest / LARGEST_OF_8_BITS;
        const int32_t halves[2] = {(int32_t)sum_f32(f32_of_i32(first)), (int32_t)sum_f32(f32_of_i32(second))};
        const int32_t sums[3] = {halves[0] + halves[1], halves[0], halves[1]};
        for (int i = 0; i < 3; i++) {
            to->minus_sums[i] = -sums[i];
            to->scaled_sums[i] = to->scale * (float)sums[i];
        }
    }
}

/* The bf16 numbers of each four in the order 0, 2, 1, 3: that in which `pairs_of_e4m3` splits weights. */
static void pack_for_float_blocks(const float *x, int64_t size, uint8_t *packed)
{
    for (int64_t i = 0; i < size; i += 2 * LANES) {
        uint16_t *numbers = (uint16_t *)packed + i;
        store(numbers, bf16_of_f32(load(x + i), load(x + i + LANES)));
        for (int four = 0; four < 2 * LANES; four += 4) {
            const uint16_t second = numbers[four + 1];
            numbers[four + 1] = numbers[four + 2];
            numbers[four + 2] = second;
        }
    }
}

static float pack(Dtype dtype, const float *x, int64_t size, uint8_t *packed)
{
    if (dtype == LAMINA_INT8)
        return pack_for_int8(x, size, packed);
    if (dtype == LAMINA_Q4) {
        pack_for_q4(x, size, packed);
        return 1.0f;
    }
    if (dtype == LAMINA_BLOCKS) {
        pack_for_blocks(x, size, packed);
        return 1.0f;
    }
    if (dtype == LAMINA_FLOAT_BLOCKS) {
        pack_for_float_blocks(x, size, packed);
        return 1.0f;
    }
    for (int64_t i = 0; i < size; i += 2 * LANES) {
        vec first = row_part(x, i, size), second = row_part(x, i + LANES, size);
        if (dtype == LAMINA_BF16) {
            store(packed + 2 * i, bf16_of_f32(first, second));
        } else {
            store(packed + 4 * i, first);
            store(packed + 4 * (i + LANES), second);
        }
    }
    return 1.0f;
}
