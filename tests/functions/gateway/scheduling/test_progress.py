"""Which chunk of a sequence is sent next, whatever the stages have lost."""

import random

from hypothesis import given
from hypothesis import strategies as st

from functions.gateway.scheduling.sequence import Chunk, Progress

BLOCK_TOKENS = 3


class Stages:
    """What stages hold of one sequence. They may lose it, and events may get lost."""

    def __init__(self, num_stages: int, dice: random.Random, trouble: float) -> None:
        self.held: list[list[int]] = [[] for _ in range(num_stages)]
        self.dice = dice
        self.trouble = trouble

    def compute(self, stage: int, position: int, tokens: list[int]) -> int | None:
        """None: computed. Otherwise how many tokens the stage holds, fewer than `position`."""
        held = self.held[stage]
        if self.dice.random() < self.trouble:
            del held[self.dice.randrange(len(held) + 1) :]
        if len(held) < position:
            return len(held)
        held[position:] = tokens
        return None

    def reserve(self, stage: int, tokens: list[int]) -> int:
        """The reply to a reservation: how many of `tokens` the prefix cache of `stage` holds, in whole blocks."""
        found = self.dice.randrange(len(tokens)) // BLOCK_TOKENS * BLOCK_TOKENS
        if found > len(self.held[stage]):
            self.held[stage] = tokens[:found]
        return found


@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_every_token_is_computed_from_all_tokens_before_it(
    num_stages: int, prompt_tokens: int, chunk_tokens: int, seed: int, trouble: float, remembers: float
) -> None:
    """Chunks overlap in flight as trips do. A stage sees them in the order in which they were sent."""
    dice = random.Random(seed)
    stages = Stages(num_stages, dice, trouble)
    progress = Progress(num_stages)
    tokens = list(range(prompt_tokens))
    flying: list[tuple[int, object]] = []
    steps = 0
    while len(tokens) < prompt_tokens + 8:
        steps += 1
        assert steps < 5000
        stages.trouble *= steps < 300
        if not flying and steps < 300 and dice.random() < remembers:
            if dice.random() < 0.3:
                progress.restart()
                stages.held = [[] for _ in range(num_stages)]
            for stage in range(num_stages):
                progress.found(stage, stages.reserve(stage, tokens))
        first_free = all(stage > 0 for stage, _ in flying)
        chunk = progress.next_chunk(len(tokens), chunk_tokens) if first_free and len(flying) < num_stages else None
        if chunk is not None and progress.decodes(len(tokens)):
            right = dice.randrange(4)
            draft_tokens = [*range(len(tokens), len(tokens) + right), *[-1] * dice.randrange(3)]
            chunk = Chunk(chunk.position, 1, chunk.depth, tuple(draft_tokens))
        if chunk is not None and (not flying or dice.random() < 0.7):
            progress.send(chunk)
            flying.append((0, chunk))
            continue
        index = dice.choice([i for i, (stage, _) in enumerate(flying) if i == 0 or flying[i - 1][0] > stage + 1 or i == 0])
        stage, chunk = flying[index]  # type: ignore[assignment]
        missing = stages.compute(stage, chunk.position, [*tokens[chunk.position : chunk.end], *chunk.draft_tokens])
        if missing is not None:
            progress.missed(stage, missing)
            progress.returned()
            flying.pop(index)
            continue
        progress.held[stage] = chunk.end
        if stage < chunk.depth:
            flying[index] = (stage + 1, chunk)
            continue
        flying.pop(index)
        progress.returned()
        if stage == num_stages - 1 and chunk.end == len(tokens):
            right = len([token for token in chunk.draft_tokens if token >= 0])
            tokens += chunk.draft_tokens[:right]
            assert stages.held[stage][: len(tokens)] == tokens
            progress.accepted(right)
            tokens.append(len(tokens))
