"""Takes the router and the experts of a layer out of a model's tensors, in the form that `c/native.h` needs."""

from dataclasses import replace

import numpy as np

from functions.stage.models.native.layer_weights import take_feed_forward, take_norm
from functions.stage.models.native.weights import NativeWeights, converted, stacked
from functions.stage.native.layers import ExpertsArrays, NormArrays
from functions.stage.native.records import Dtype, NormKind, RouterScores
from storage.checkpoints.decoder import Decoder, Experts


def take_experts(model: Decoder, experts: Experts, weights: NativeWeights) -> ExpertsArrays:
    """Removes the router and the experts of a layer from `weights`, and returns them. Raises MissingTensors."""
    names, router, norms, scales = model.names, experts.router, {}, None
    if experts.own_norms:
        norms = {
            "before": take_norm(names.before_experts, model.final_norm, weights),
            "after": take_norm(names.after_experts, model.final_norm, weights),
            "after_shared": take_norm(names.after_shared, model.final_norm, weights),
            "before_router": NormArrays(NormKind.RMS, weights.vector(names.router_scale) * np.float32(model.hidden_size**-0.5)),
        }
        scales = weights.vector(names.expert_scales)
    matrix = converted(weights.matrix(names.router, router.biased), Dtype.F32)
    if experts.shared_gate:
        gate = converted(weights.matrix(names.shared_gate), Dtype.F32)
        if router.biased:
            gate = replace(gate, biases=np.zeros(1, np.float32))
        matrix = stacked([matrix, gate])
    return ExpertsArrays(
        router=matrix,
        correction=weights.vector(names.correction) if router.corrected else None,
        experts=[
            take_feed_forward(
                experts.each, (gate.format(expert=number), up.format(expert=number), down.format(expert=number)), weights
            )
            for number in range(router.num_experts)
            for gate, up, down in (names.experts,)
        ],
        numbers={
            "chosen": router.chosen,
            "scores": RouterScores[router.scores.upper()],
            "groups": router.groups,
            "chosen_groups": router.chosen_groups,
            "two_of_group": router.group_score == "two_greatest" and router.groups > 1,
            "normalized": router.normalized,
            "shared_gate": experts.shared_gate,
            "normal_eps": router.normal_eps,
            "scale": router.scale,
            "threshold": router.threshold,
        },
        used=np.zeros(router.num_experts, np.int64),
        scales=scales,
        norms=norms,
        latent=None
        if experts.latent is None
        else (weights.matrix(names.narrow, experts.latent.biased), weights.matrix(names.widen, experts.latent.biased)),
    )
