"""LongRoPE through gateway and stages: answers that end before the original context, cross it, or begin beyond it."""

from typing import Any, Final

import pytest

from functions.stage.models.build import build_layer_group
from functions.stage.models.layer_group import LayerGroup
from tests.support.functions.borders import raw
from tests.support.functions.gateway import scheduling, submit, tokens_of
from tests.support.functions.stage_server import StageServer, running
from tests.support.storage import tiny_models

ORIGINAL: Final = 40
CHANGES: Final[dict[str, Any]] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 5.0, 9.0],
    },
    "original_max_position_embeddings": ORIGINAL,
}
CUT: Final = ((0, 2), (2, 6))


def stage(index: int) -> StageServer:
    first, last = CUT[index]
    tensors = tiny_models.checkpoint_tensors(tiny_models.whole_model("phi3", **CHANGES))

    def build() -> LayerGroup:
        config, own = tiny_models.tiny_config("phi3", **CHANGES), raw(tiny_models.stage_tensors(tensors, first, last))
        return build_layer_group("auto", config, own, first, last, "float32", "cpu", 2**22)

    return StageServer(index, CUT, build)


@pytest.mark.parametrize("draft_tokens", [0, 5])
def test_answers_are_those_of_generate_on_both_sides_of_the_original_context_and_across(draft_tokens: int) -> None:
    model = tiny_models.whole_model("phi3", **CHANGES)
    # Prompt and answer: within; up to the bound; across, twice; a prompt of several chunks beyond it.
    wanted = [(10, 20), (20, 20), (20, 21), (30, 30), (70, 10)]
    prompts = [[5 + (7 * place + number) % 100 for place in range(length)] for number, (length, _) in enumerate(wanted)]
    expected = [tiny_models.greedy(model, prompt, new_tokens) for prompt, (_, new_tokens) in zip(prompts, wanted, strict=True)]
    with (
        running(stage, len(CUT)) as stages,
        scheduling(stages, chunk_tokens=16, micro_batch_sequences=4, draft_tokens=draft_tokens) as scheduler,
    ):
        streams = [
            # Every fifth predicted token is wrong.
            submit(
                scheduler,
                prompt,
                new_tokens,
                predicted_ids=[token if place % 5 else 3 for place, token in enumerate(answer)] if draft_tokens else [],
            )
            for prompt, answer, (_, new_tokens) in zip(prompts, expected, wanted, strict=True)
        ]
        assert [tokens_of(stream) for stream in streams] == expected
