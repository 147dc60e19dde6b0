"""A decoder-only model as data: what each layer computes, and which tensors it has. Stages run this description.

`decoder_config` makes the description from a config.json. The config.json of a published model contains it under `DECODER_KEY`,
so that a stage needs no table of families. A description with a field that this version does not know is refused, because the
field may change results.
"""

from typing import Any, Final, Literal

import msgspec

DECODER_KEY: Final = "lamina_decoder"
EMBEDDER_KEY: Final = "lamina_embedder"  # of a model that makes vectors of texts; see storage/models/embedder.py

Shapes = dict[str, tuple[int, ...]]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu", "swiglu"]


class _Data(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    pass


class Norm(_Data, frozen=True, kw_only=True):
    """A normalization of rows: `rms` divides a row by the root of its mean square, `layer` subtracts the mean first."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float
    gain_plus_one: bool = False  # the gain is the published weight plus 1
    biased: bool = False


class QKNorm(_Data, frozen=True, kw_only=True):
    """The normalization of queries and keys."""

    norm: Norm
    # What is normalized, with which gain: each head with one gain for all heads or with its own, or all heads as one row.
    over: Literal["head", "head_of_its_own", "all_heads"] = "head"
    after_rope: bool = False


class Latent(_Data, frozen=True, kw_only=True):
    """Latent attention (MLA): for each token, KV contains one latent vector and one rotated part of the key.

    The keys and values of all heads are computed from these two. In KV they count as one key head of rank + rope_size numbers.
    """

    rank: int
    nope_size: int  # numbers of a head's query and key that are not rotated, the first ones
    rope_size: int
    value_size: int
    query_rank: int | None  # of the latent from which all queries follow; None: they follow from hidden states
    norm: Norm  # of latents


class Attention(_Data, frozen=True, kw_only=True):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of scores
    soft_cap: float | None = None  # scores become soft_cap * tanh(score / soft_cap)
    window: int | None = None  # how many tokens, its own included, a token attends to; None: all
    rope: str | None = None  # key of Decoder.ropes; None: queries and keys are not rotated
    qk_norm: QKNorm | None = None
    sinks: bool = False  # each head's softmax has one more score, which is learned and has no value
    latent: Latent | None = None
    output_gate: bool = False  # outputs are multiplied by sigmoid(gate); a head's gate is stored after its query
    values_are_keys: bool = False  # as they are before norm and rotation: values have no matrix
    value_norm: Norm | None = None  # of each head's value; it has no gain
    # Number of an earlier layer with the same heads, whose keys and values it attends to; None: it has its own.
    kv_layer: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    out_scale: float = 1.0  # of the output


NO_ATTENTION: Final = Attention(num_heads=1, num_kv_heads=1, head_dim=2, scale=1.0)
"""Placeholder sizes for a model without attention."""


class Recurrent(_Data, frozen=True, kw_only=True):
    """A mixer that keeps a state of fixed size for a sequence.

    Every state contains the last inputs of a causal convolution. In `delta` and `mamba` it also contains a matrix [key_size,
    head_size] for each head.

    `convolution` is LFM2's short convolution: gate * convolution(gate * x). `delta` (Gated DeltaNet) and `mamba` (Mamba-2) get
    queries, keys and values from the convolution. At each token they decay a head's matrix and add an outer product of the key
    to it. In `mamba` the other factor is the value times the step. In `delta` it is derived from the difference between the
    value and what the matrix returns for the key. The head's output is the query times the matrix.
    """

    kind: Literal["convolution", "delta", "mamba"]
    kernel: int  # tokens that the convolution covers
    kernel_bias: bool = False
    biased: bool = False  # the projections into the mixer and out of it
    num_heads: int = 0
    head_size: int = 0  # numbers of a value
    num_groups: int = 0  # of queries and keys: each is for num_heads / num_groups heads in a row
    key_size: int = 0
    norm: Norm | None = None  # of the output; in `delta` all heads have one gain
    norm_parts: int = 1  # of the output, that are normalized apart
    gate_first: bool = False  # the output is multiplied by its gate before the norm, not after it
    # Of gates, values, keys, queries and steps, as they come out of the projection into a `mamba`.
    in_scales: tuple[float, float, float, float, float] = (1.0,) * 5
    out_scale: float = 1.0  # of the output

    @property
    def channels(self) -> int:
        """How many numbers of a row go through the convolution. 0 for the kind `convolution`, which uses the hidden size."""
        return self.inner_size + 2 * self.num_groups * self.key_size

    @property
    def inner_size(self) -> int:
        """How many numbers of a row all heads output together."""
        return self.num_heads * self.head_size

    def state_values(self, hidden_size: int) -> int:
        """How many float32 numbers the layer keeps of a sequence, if layers in C run it."""
        return (self.kernel - 1) * (self.channels or hidden_size) + self.inner_size * self.key_size


class FeedForward(_Data, frozen=True, kw_only=True):
    """A feed-forward: down(activation(gate x) * (up x)) if it is gated, and down(activation(up x)) if not."""

    inner_size: int
    activation: Activation = "silu"
    # Numbers of swiglu, (up + 1) * gate * sigmoid(alpha * gate): alpha, and the limit to which gate and up are clamped.
    swiglu: tuple[float, float] | None = None
    # Share of the gate's numbers that become 0 if they are normally distributed: their mean plus quantile(sparsity) times their
    # deviation is subtracted from them, and what is negative then becomes 0, before the activation.
    sparsity: float = 0.0
    gated: bool = True
    biased: bool = False
    gate_scale: float = 1.0  # of what goes into the activation
    out_scale: float = 1.0  # of the output


class Router(_Data, frozen=True, kw_only=True):
    """Chooses the experts of a token by scores, which it computes in float32. The scores are also the experts' weights."""

    num_experts: int
    chosen: int  # experts of a token
    # What turns logits into scores. softmax_of_chosen: experts are chosen by their logits, whose softmax are the weights.
    # sparse_mix: two experts are chosen one after the other, each with its share in a softmax of the logits that are left and
    # are not further than `threshold` below the greatest.
    scores: Literal["softmax", "softmax_of_chosen", "sigmoid", "sparse_mix"] = "softmax"
    threshold: float = 0.0
    biased: bool = False
    corrected: bool = False  # a bias of each expert is added to its score for the choice alone
    groups: int = 1  # of successive experts
    chosen_groups: int = 1  # a token's experts are in so many groups, those with the best
    group_score: Literal["greatest", "two_greatest"] = "two_greatest"  # of a group: its best score, or the sum of two
    normalized: bool = False  # weights are divided by their sum plus `normal_eps`
    normal_eps: float = 0.0
    scale: float = 1.0  # of weights


class ExpertsLatent(_Data, frozen=True, kw_only=True):
    """The projections around experts that compute with narrower rows than the rest of the layer.

    The experts get a projection of the hidden states. The sum of their outputs is projected back.
    """

    size: int
    biased: bool = False


class Experts(_Data, frozen=True, kw_only=True):
    """The experts of a layer: feed-forwards of one shape, and the router that chooses among them.

    The outputs of the chosen experts are added up, each multiplied by its weight.
    """

    router: Router
    each: FeedForward
    shared_gate: bool = False  # the output of the layer's `feed_forward` is multiplied by sigmoid(gate x)
    # They have norms of their own, before the experts, the router and after both the experts and `feed_forward`. The router's
    # has a learned scale, divided by the root of the hidden size, as gain. Each expert's weight has a learned factor.
    own_norms: bool = False
    latent: ExpertsLatent | None = None


class LayerInput(_Data, frozen=True, kw_only=True):
    """A second input of every layer, besides hidden states: numbers that depend on the token's id alone.

    For a token they are (norm(W e) + t) / sqrt(2). Here e is the token's scaled embedding, W is a matrix divided by the root of
    the hidden size, and t is a second embedding multiplied by the root of `size`. W has rows, and t has columns, for each
    layer. As its last step, a layer adds norm(out(activation(gate x) * input)) to its hidden states x.
    """

    size: int
    norm: Norm
    vocab_size: int | None = None  # rows of the second embedding; later tokens take its first; None: the model's


class Streams(_Data, frozen=True, kw_only=True):
    """Several parallel streams of hidden states (alternating updates, https://arxiv.org/abs/2301.13310).

    Before the layers, the first stream is the embedding e. Each other stream is W e, with a matrix W of its own, scaled to the
    root mean square of e. Layers compute with the first stream. A layer does the following:

    1. It adds to each stream a sum of all streams, with coefficients A tanh(R norm(x)) for the first stream x.
    2. It computes its output y from x. To each stream it adds y - x, times 1 + C tanh(R norm(y)).
    3. It computes its `LayerInput` with the first stream, multiplied by a learned vector if `scaled` is set. It adds the
       result to the other streams.

    After the layers, each other stream is multiplied by a matrix and scaled again. The result is the mean of all streams.

    Besides attention, a layer has a path of low rank (Laurel). After the output of attention has been added to the hidden
    states, h + norm(B A h) is added to them, for the normalized input h of attention. The sum is divided by the root of 2.
    """

    count: int
    norm: Norm
    rank: int  # of Laurel
    scaled: bool


class Layer(_Data, frozen=True, kw_only=True):
    """A layer of the model: mixers, then a feed-forward. Each adds its output to the residual stream.

    Each has a norm before it and one after it; either may be absent. A layer has attention, a recurrent mixer, both side by
    side, or none. A parallel layer computes mixers and feed-forward from the same hidden states.
    """

    attention: Attention | None = None
    recurrent: Recurrent | None = None
    feed_forward: FeedForward | None = None  # with experts: the shared one, which every token goes through
    experts: Experts | None = None
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_feed_forward: Norm | None = None
    after_feed_forward: Norm | None = None
    parallel: bool = False
    residual_scale: float = 1.0  # of what is added, beside the scales of outputs
    output_scale: bool = False  # hidden states are multiplied by a learned number in the end


class Rotation(_Data, frozen=True, kw_only=True):
    """A rotation of queries and keys by position (RoPE)."""

    parameters: dict[str, Any]  # rope_type, rope_theta and what the type needs
    rotated: int  # how many numbers of a head are rotated, the first ones
    adjacent: bool = False  # the two numbers of a rotated pair are neighbours; otherwise they are rotated / 2 apart
    # Queries are multiplied by 1 + beta * log(1 + floor(position / context)); None: they are not.
    query_growth: tuple[float, int] | None = None


class TensorNames(_Data, frozen=True, kw_only=True):
    """Names of modules in a checkpoint. The full name of a layer's module begins with `layers` and the layer's number.

    Several matrices with one name are stored as one, row after row: queries, keys and values in `qkv`, or gate and up.
    """

    base: str = "model"  # prefix of all names but the head's, which some checkpoints leave out
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str = ""  # learned position embeddings
    final_norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_by_head: bool = False  # the one matrix of qkv has the query, key and value of a head together
    query_norm: str = "self_attn.q_norm"  # {head} is a head's number
    key_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    query_down: str = "self_attn.q_a_proj"
    query_down_norm: str = "self_attn.q_a_layernorm"
    query_up: str = "self_attn.q_b_proj"
    kv_down: str = "self_attn.kv_a_proj_with_mqa"
    kv_down_norm: str = "self_attn.kv_a_layernorm"
    kv_up: str = "self_attn.kv_b_proj"  # of each head, keys and then values
    out: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    correction: str = "mlp.gate.e_score_correction_bias"
    # Gate, up and down of experts, {expert} is a number, and of the shared one.
    experts: tuple[str, str, str] = (
        "mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj", "mlp.experts.{expert}.down_proj",
    )  # fmt: skip
    shared: tuple[str, str, str] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
    shared_gate: str = "mlp.shared_expert_gate"
    narrow: str = ""  # the projections of hidden states to the latents of experts, and back
    widen: str = ""
    # With `own_norms`: gains before experts, after them and after the feed-forward beside them, and vectors of the router.
    before_experts: str = "pre_feedforward_layernorm_2"
    after_experts: str = "post_feedforward_layernorm_2"
    after_shared: str = "post_feedforward_layernorm_1"
    router_scale: str = "router.scale"
    expert_scales: str = "router.per_expert_scale"
    output_scale: str = "layer_scalar"
    layer_embedding: str = "model.embed_tokens_per_layer"  # of `LayerInput`: t
    layer_projection: str = "model.per_layer_model_projection"  # W
    layer_projection_norm: str = "model.per_layer_projection_norm"
    input_gate: str = "per_layer_input_gate"
    input_out: str = "per_layer_projection"
    after_input: str = "post_per_layer_input_norm"
    split: str = "model.altup_projections.{stream}"  # of `Streams`: W, for each stream but the first
    join: str = "model.altup_unembed_projections.{stream}"
    stream_router: str = "altup.modality_router"  # R
    stream_norm: str = "altup.router_norm"
    predict: str = "altup.prediction_coefs"  # A
    correct: str = "altup.correction_coefs"  # C
    stream_scale: str = "altup.correct_output_scale"
    narrow_beside: str = "laurel.linear_left"
    widen_beside: str = "laurel.linear_right"
    after_beside: str = "laurel.post_laurel_norm"
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_feed_forward: str = "post_attention_layernorm"
    after_feed_forward: str = ""
    recurrent: str = ""  # the module of a recurrent mixer
    # In that module. `delta` has channels, gates, shares and steps in four matrices, or in two by groups: what belongs to a
    # query and a key together, first channels with gates, then shares with steps.
    recurrent_in: tuple[str, ...] = ("in_proj",)
    recurrent_kernel: str = "conv1d"
    activation: str = ""  # parameters of the activation
    transposed: bool = False  # matrices of layers are [in, out]


class Decoder(_Data, frozen=True, kw_only=True):
    """A whole model. All layers have the same number of query heads."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    tied: bool  # the head's matrix is the embedding's
    kinds: tuple[Layer, ...]  # the different layers
    order: tuple[int, ...]  # the kind of each layer
    ropes: dict[str, Rotation]
    final_norm: Norm
    layer_input: LayerInput | None = None
    streams: Streams | None = None  # layers with them have attention, a feed-forward and a `layer_input`
    embedding_scale: float = 1.0
    position_offset: int | None = None  # row of position 0 in the learned position embeddings; None: there are none
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    head_bias: bool = False
    causal: bool = True  # a token attends to none after it; otherwise to all of its text, or `window` - 1 on either side
    has_head: bool = True  # it makes logits; a model of vectors does not
    names: TensorNames = TensorNames()

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(self.kinds[kind] for kind in self.order)

    @property
    def attention(self) -> Attention:
        """The attention with the largest heads in the model, of several the first. NO_ATTENTION if no layer has attention."""
        found = (layer.attention for layer in self.kinds if layer.attention is not None)
        return max(found, key=lambda attention: attention.head_dim, default=NO_ATTENTION)

    @property
    def inner_size(self) -> int:
        """The largest inner size of a feed-forward that is no expert; 1 if all feed-forwards are experts."""
        return max([1, *(layer.feed_forward.inner_size for layer in self.kinds if layer.feed_forward is not None)])

    @property
    def row_size(self) -> int:
        """How many numbers of a token pass from one layer to the next."""
        return self.hidden_size * (1 if self.streams is None else self.streams.count)

    @property
    def experts(self) -> tuple[Experts, ...]:
        """The experts of each kind of layer that has experts."""
        return tuple(layer.experts for layer in self.kinds if layer.experts is not None)

    def obstacle_to_cut(self, first: int) -> str | None:
        """The reason why no stage can begin with layer `first`, as part of a sentence. None if a stage can."""
        for number, layer in enumerate(self.layers[first:], first):
            if layer.attention is not None and layer.attention.kv_layer is not None and layer.attention.kv_layer < first:
                return f"layer {number} attends to the keys and values of layer {layer.attention.kv_layer}"
        return None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The attention window of each layer, in tokens. None for a layer without a window or without attention."""
        return tuple(None if layer.attention is None else layer.attention.window for layer in self.layers)


def full_name(model: Decoder, name: str) -> str:
    """The full name of a tensor: `name`, with the prefix `names.base` added if the checkpoint leaves it out."""
    return name if name.startswith((f"{model.names.base}.", f"{model.names.head}.")) else f"{model.names.base}.{name}"


def layer_shapes(model: Decoder, layer: Layer) -> Shapes:
    """Shapes of the tensors of one layer, by their names in a checkpoint without the layer's prefix."""
    names, hidden = model.names, model.hidden_size
    attention, recurrent, feed_forward, experts = layer.attention, layer.recurrent, layer.feed_forward, layer.experts
    shapes: Shapes = {}

    def add_matrix(name: str, outs: int, width: int, biased: bool) -> None:
        before = shapes.get(f"{name}.weight", (0, 0))[0]  # rows that are stored with these
        shapes[f"{name}.weight"] = (before + outs, width)
        if biased:
            shapes[f"{name}.bias"] = (before + outs,)

    for norm, name in (
        (layer.before_attention, names.before_attention),
        (layer.after_attention, names.after_attention),
        (layer.before_feed_forward, names.before_feed_forward),
        (layer.after_feed_forward, names.after_feed_forward),
    ):
        if norm is not None:
            shapes |= _vector_shapes(name, hidden, norm.biased)
    if attention is not None and (qk_norm := attention.qk_norm) is not None:
        of_keys = [] if attention.kv_layer is not None else [(names.key_norm, attention.num_kv_heads)]
        for name, heads in ((names.query_norm, attention.num_heads), *of_keys):
            if qk_norm.over == "all_heads":
                shapes |= _vector_shapes(name, heads * attention.head_dim, qk_norm.norm.biased)
            elif qk_norm.over == "head":
                shapes |= _vector_shapes(name, attention.head_dim, qk_norm.norm.biased)
            elif "{head}" in name:
                for head in range(heads):
                    shapes |= _vector_shapes(name.format(head=head), attention.head_dim, qk_norm.norm.biased)
            else:
                shapes[f"{name}.weight"] = (heads, attention.head_dim)
    if attention is not None:
        queries, keys = (heads * attention.head_dim for heads in (attention.num_heads, attention.num_kv_heads))
        if attention.sinks:
            shapes[names.sinks] = (attention.num_heads,)
        if (latent := attention.latent) is not None:
            head_size, attended = latent.nope_size + latent.rope_size, attention.num_heads * latent.value_size
            if latent.query_rank is None:
                add_matrix(names.qkv[0], attention.num_heads * head_size, hidden, biased=False)
            else:
                add_matrix(names.query_down, latent.query_rank, hidden, attention.qkv_bias)
                shapes |= _vector_shapes(names.query_down_norm, latent.query_rank, latent.norm.biased)
                add_matrix(names.query_up, attention.num_heads * head_size, latent.query_rank, biased=False)
            add_matrix(names.kv_down, attention.head_dim, hidden, attention.qkv_bias)
            shapes |= _vector_shapes(names.kv_down_norm, latent.rank, latent.norm.biased)
            add_matrix(names.kv_up, attention.num_heads * (latent.nope_size + latent.value_size), latent.rank, biased=False)
        else:
            attended, with_gates = queries, 2 * queries if attention.output_gate else queries
            sizes = (with_gates, keys, keys) if len(names.qkv) == 3 else (queries + 2 * keys,)
            own = 1 if attention.kv_layer is not None else 2 if attention.values_are_keys else 3
            for name, outs in list(zip(names.qkv, sizes, strict=True))[:own]:
                add_matrix(name, outs, hidden, attention.qkv_bias)
        add_matrix(names.out, hidden, attended, attention.out_bias)
    if recurrent is not None:
        shapes |= _recurrent_shapes(names, recurrent, hidden)

    def add_feed_forward(one: FeedForward, size: int, gate: str, up: str, down: str) -> None:
        if one.gated:
            add_matrix(gate, one.inner_size, size, one.biased)
        add_matrix(up, one.inner_size, size, one.biased)
        add_matrix(down, size, one.inner_size, one.biased)

    if feed_forward is not None:
        add_feed_forward(feed_forward, hidden, *names_of_feed_forward(names, experts))
    if experts is not None:
        router = experts.router
        add_matrix(names.router, router.num_experts, hidden, router.biased)
        if router.corrected:
            shapes[names.correction] = (router.num_experts,)
        if experts.shared_gate:
            add_matrix(names.shared_gate, 1, hidden, False)
        if experts.own_norms:
            for name in (names.before_experts, names.after_experts, names.after_shared):
                shapes |= _vector_shapes(name, hidden, biased=False)
            shapes |= {names.router_scale: (hidden,), names.expert_scales: (router.num_experts,)}
        of_experts = hidden
        if (narrow := experts.latent) is not None:
            of_experts = narrow.size
            add_matrix(names.narrow, of_experts, hidden, narrow.biased)
            add_matrix(names.widen, hidden, of_experts, narrow.biased)
        for expert in range(router.num_experts):
            add_feed_forward(experts.each, of_experts, *(name.format(expert=expert) for name in names.experts))
    if (layer_input := model.layer_input) is not None:
        add_matrix(names.input_gate, layer_input.size, hidden, biased=False)
        add_matrix(names.input_out, hidden, layer_input.size, biased=False)
        shapes |= _vector_shapes(names.after_input, hidden, layer_input.norm.biased)
    if (streams := model.streams) is not None:
        add_matrix(names.stream_router, streams.count, hidden, biased=False)
        add_matrix(names.predict, streams.count**2, streams.count, biased=False)
        add_matrix(names.correct, streams.count, streams.count, biased=False)
        add_matrix(names.narrow_beside, streams.rank, hidden, biased=False)
        add_matrix(names.widen_beside, hidden, streams.rank, biased=False)
        for name in (names.stream_norm, names.after_beside):
            shapes |= _vector_shapes(name, hidden, streams.norm.biased)
        shapes[names.stream_scale] = (hidden,)
    if layer.output_scale:
        shapes[names.output_scale] = (1,)
    if names.transposed:
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    if feed_forward is not None and feed_forward.activation == "xielu":
        shapes |= {f"{names.activation}.{number}": (1,) for number in ("alpha_p", "alpha_n")}
        shapes |= {f"{names.activation}.{number}": () for number in ("beta", "eps")}
    return shapes


def names_of_feed_forward(names: TensorNames, experts: Experts | None) -> tuple[str, str, str]:
    """Names of the matrices gate, up and down of a layer's `feed_forward`."""
    return names.shared if experts is not None and not experts.own_norms else (names.gate, names.up, names.down)


def adaptable(model: Decoder, layer: Layer) -> frozenset[str]:
    """Names of the matrices of a layer that adapters may change.

    Adapters may not change recurrent mixers, latent attention, routers and routed experts.
    """
    names, shapes = model.names, layer_shapes(model, layer)
    found = set(names_of_feed_forward(names, layer.experts))
    if layer.attention is not None and layer.attention.latent is None:
        found |= {*names.qkv, names.out}
    return frozenset(name for name in found if f"{name}.weight" in shapes)


def float32_names(model: Decoder) -> frozenset[str]:
    """Names of the layers' tensors that every published model has in float32, without the layer's prefix.

    They are small tensors of recurrent mixers, which decide how long a state lasts.
    """
    vectors = ("A_log", "D", "dt_bias", f"{model.names.recurrent_kernel}.weight", f"{model.names.recurrent_kernel}.bias")
    return frozenset(f"{model.names.recurrent}.{name}" for name in vectors) if model.names.recurrent else frozenset()


def _recurrent_shapes(names: TensorNames, recurrent: Recurrent, hidden: int) -> Shapes:
    heads, inner = recurrent.num_heads, recurrent.inner_size or hidden
    channels = recurrent.channels or hidden
    outs = {
        "convolution": (3 * hidden,),
        "delta": (channels, inner, heads, heads) if len(names.recurrent_in) == 4 else (channels + inner, 2 * heads),
        "mamba": (channels + inner + heads,),
    }[recurrent.kind]
    shapes: Shapes = {f"{names.recurrent_kernel}.weight": (channels, 1, recurrent.kernel), "out_proj.weight": (hidden, inner)}
    shapes |= {f"{name}.weight": (count, hidden) for name, count in zip(names.recurrent_in, outs, strict=True)}
    if recurrent.biased:
        shapes |= {f"{name}.bias": (count,) for name, count in zip(names.recurrent_in, outs, strict=True)}
        shapes["out_proj.bias"] = (hidden,)
    if recurrent.kernel_bias:
        shapes[f"{names.recurrent_kernel}.bias"] = (channels,)
    if recurrent.kind != "convolution":
        shapes |= {"A_log": (heads,), "dt_bias": (heads,)}
    if recurrent.kind == "mamba":
        shapes["D"] = (heads,)
    if recurrent.norm is not None:
        shapes["norm.weight"] = (recurrent.head_size if recurrent.kind == "delta" else inner,)
    return {f"{names.recurrent}.{name}": shape for name, shape in shapes.items()}


def outer_shapes(model: Decoder) -> Shapes:
    """Shapes of the tensors outside the layers, by their full names.

    The head's weight is included although a tied model may lack it.
    """
    matrix, names = (model.vocab_size, model.hidden_size), model.names
    shapes: Shapes = {f"{names.embedding}.weight": matrix}
    if model.has_head:
        shapes[f"{names.head}.weight"] = matrix
    if model.position_offset is not None:
        shapes[f"{names.positions}.weight"] = (model.max_positions + model.position_offset, model.hidden_size)
    if model.head_bias:
        shapes[f"{names.head}.bias"] = (model.vocab_size,)
    if (layer_input := model.layer_input) is not None:
        of_layers = model.num_layers * layer_input.size
        shapes[f"{names.layer_embedding}.weight"] = (layer_input.vocab_size or model.vocab_size, of_layers)
        shapes[f"{names.layer_projection}.weight"] = (of_layers, model.hidden_size)
        shapes |= _vector_shapes(names.layer_projection_norm, layer_input.size, layer_input.norm.biased)
    for stream in range(0 if model.streams is None else model.streams.count - 1):
        square = (model.hidden_size, model.hidden_size)
        shapes |= {f"{name.format(stream=stream)}.weight": square for name in (names.split, names.join)}
    return shapes | _vector_shapes(names.final_norm, model.hidden_size, model.final_norm.biased)


def all_shapes(model: Decoder) -> Shapes:
    """Shapes of all tensors of a published model, by their full names."""
    names, of_kinds = model.names, [layer_shapes(model, layer) for layer in model.kinds]
    shapes = {name: shape for name, shape in outer_shapes(model).items() if not (model.tied and name == f"{names.head}.weight")}
    for number, kind in enumerate(model.order):
        shapes |= {f"{names.layers}.{number}.{name}": shape for name, shape in of_kinds[kind].items()}
    return shapes


def _vector_shapes(name: str, size: int, biased: bool) -> Shapes:
    return {f"{name}.{part}": (size,) for part in (("weight", "bias") if biased else ("weight",))}
