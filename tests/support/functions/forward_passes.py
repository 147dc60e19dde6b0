"""Forward passes of a layer group without an engine."""

from functions.stage.engine.constraints import Constraints
from functions.stage.engine.forward_pass import ForwardPass
from functions.stage.engine.sequences import SequenceTable
from functions.stage.models.layer_group import LayerGroup
from functions.stage.models.vector_head import VectorHead


def passes_of(group: LayerGroup) -> ForwardPass:
    """No sequence expires, and rows name no adapter."""
    return ForwardPass(
        group,
        SequenceTable(group.kv, 600, lambda: 0.0),
        Constraints(None),
        group.hidden_dtype,
        VectorHead({}),
        lambda adapter: 0,
    )
