"""Takes the router and the experts of a layer out of a publication's tensors, as `c/native.h` wants them."""

from dataclasses import replace

import numpy as np

from functions.stage.models.native.layer_weights import take_feed_forward
from functions.stage.models.native.weights import NativeWeights, converted, stacked
from functions.stage.native.layers import ExpertsArrays
from functions.stage.native.records import Dtype, RouterScores
from storage.checkpoints.decoder import Experts, TensorNames


def take_experts(names: TensorNames, experts: Experts, weights: NativeWeights) -> ExpertsArrays:
    """Removes the router and the experts of a layer from `weights` and returns them. Raises MissingTensors."""
    router = experts.router
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
        },
        used=np.zeros(router.num_experts, np.int64),
    )
