"""Models with recurrent layers, latents, experts, shared KV or streams through gateway and stages: answers are generate's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from functions.gateway.scheduling.stats import RowCosts
from functions.gateway.stages.routes import Endpoint, Placement
from functions.stage.models.layer_group import LayerGroup
from tests.support.functions.gateway import nothing_left, scheduling, submit, tokens_of, wait_until
from tests.support.functions.kv_stages import peer_tiers
from tests.support.functions.stage_pipeline import build_groups, whole_model
from tests.support.functions.stage_server import Fault, StageServer, on_forwards, running
from tests.support.storage import tiny_models

CUT: Final = ((0, 2), (2, 3), (3, 6))
NAMES: Final = ("lfm2", "qwen3_next", "granitemoehybrid", "falcon_h1", "deepseek_v2", "gemma4_text", "gemma3n_text")
NEW_TOKENS: Final = 24


def stage(name: str, index: int) -> StageServer:
    def build() -> LayerGroup:
        return build_groups(name, CUT[index : index + 1], "auto", kv_budget_bytes=2**22)[0]

    return StageServer(index, CUT, build, tiers=lambda group: peer_tiers(group, CUT[index][0]))


@contextmanager
def pipeline(name: str) -> Iterator[list[StageServer]]:
    with running(lambda index: stage(name, index), len(CUT)) as stages:
        yield stages


def prompts() -> list[list[int]]:
    """Two of them begin alike."""
    dice = random.Random(5)
    texts = [dice.choices(range(3, tiny_models.VOCAB_SIZE), k=length) for length in (70, 33, 12, 5)]
    return [*texts, [*texts[0][:66], 8, 8, 8]]


def answers(name: str, texts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    return [tiny_models.greedy(whole_model(name), text, new_tokens) for text in texts]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trouble", [None, Fault.KILLED_RESTARTED])
def test_company_drafts_and_a_killed_stage_change_no_token(
    name: str, trouble: Fault | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth token that the clients expect is wrong, so that drafts are rejected at each place."""
    measured = RowCosts.step  # as if all steps were equally long, or a busy machine would decide whether to draft
    monkeypatch.setattr(RowCosts, "step", lambda costs, tokens, _seconds: measured(costs, tokens, 0.01))
    expected = answers(name, prompts())
    with (
        pipeline(name) as stages,
        scheduling(stages, chunk_tokens=16, micro_batch_sequences=3, draft_tokens=0 if trouble else 5) as scheduler,
    ):
        if trouble is not None:
            stages[1].inspect = on_forwards(trouble, 4, 17)
        predicted = [[token if place % 5 else 3 for place, token in enumerate(answer)] for answer in expected]
        for _ in range(2):  # again, from the prefix cache
            streams = [
                submit(scheduler, text, NEW_TOKENS, predicted_ids=tokens if trouble is None else ())
                for text, tokens in zip(prompts(), predicted, strict=True)
            ]
            assert [tokens_of(stream) for stream in streams] == expected
        if trouble is None:
            assert streams[0].cached_tokens == 64
            assert all(stream.draft_tokens_accepted for stream in streams)
            assert all(stream.draft_tokens_rejected for stream in streams)
        nothing_left(stages)


def test_a_scored_prompt_goes_on_with_its_answer() -> None:
    """Each chunk has the next token with it, to be scored, and that is taken back."""
    name, (text, *_) = "lfm2", prompts()
    with pipeline(name) as stages, scheduling(stages, chunk_tokens=16, draft_tokens=0) as scheduler:
        stream = submit(scheduler, text, NEW_TOKENS, scored=True)
        assert [tokens_of(stream)] == answers(name, [text])
        nothing_left(stages)
    logits = tiny_models.all_logits(whole_model(name), text).log_softmax(-1)
    scores = [each.logprob for each in stream.prompt_logprobs() if each is not None]
    assert scores == pytest.approx([float(row[token]) for row, token in zip(logits, text[1:], strict=False)], abs=1e-4)


@pytest.mark.parametrize("name", ["qwen3_next", "granitemoehybrid", "deepseek_v2", "gemma4_text", "gemma3n_text"])
def test_a_migration_takes_states_along(name: str) -> None:
    """Nothing is computed again but the newest tokens."""
    expected = answers(name, prompts(), 60)
    with pipeline(name) as stages, running(lambda _: stage(name, 1), 1) as (new,):
        placed = Placement([each.url for each in stages], watched=True)
        with scheduling(stages, placement=placed, chunk_tokens=64, draft_tokens=0) as scheduler:
            for index, each in enumerate(stages):
                scheduler.endpoints_changed(index, [Endpoint(each.url)])
                each.seconds = 0.002
            streams = [submit(scheduler, text, 60) for text in prompts()]
            wait_until(lambda: all(len(stream.token_ids) >= 20 for stream in streams), "tokens of each")
            scheduler.endpoints_changed(1, [Endpoint(stages[1].url, ready=False, terminating=True), Endpoint(new.url)])
            assert [tokens_of(stream) for stream in streams] == expected
            assert new.passes, "the migration"
            assert {length for each in new.passes for _, length in each} == {1}, "only the newest token of each"
            nothing_left([*stages, new])
