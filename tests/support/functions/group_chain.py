"""Several sequences through a chain of layer groups, as the engine drives them but without one."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from functions.stage.models.layer_group import LayerGroup, Segment
from tests.support.functions.borders import logits_of, tensor
from tests.support.storage import tiny_models

Rows = Mapping[str, tuple[int, Sequence[int]]]
"""Id → position and tokens."""
Step = Callable[[Rows], Mapping[str, torch.Tensor]]


class GroupChain:
    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        self.groups = groups
        self.handles: dict[str, list[int]] = {}
        self.known: dict[str, int] = {}  # tokens of the whole sequence
        self.adapters: dict[str, int] = {}  # their numbers; those without have none

    def reserve(self, *ids: str, tokens: int = 60) -> None:
        for id in ids:
            self.known[id] = tokens
            self.handles[id] = [group.kv.reserve(tokens) for group in self.groups]

    def release(self, id: str) -> None:
        for group, handle in zip(self.groups, self.handles.pop(id), strict=True):
            group.kv.release(handle)

    def states(self, rows: Rows) -> dict[str, torch.Tensor]:
        """One pass; what the last group makes of each sequence. KV is truncated to the position first."""
        hidden = np.array([token for _, tokens in rows.values() for token in tokens], np.int64)
        for stage, group in enumerate(self.groups):
            short = group.short_context
            segments = [
                Segment(
                    self.handles[id][stage],
                    position,
                    len(tokens),
                    short is not None and self.known[id] > short,
                    adapter=self.adapters.get(id, 0),
                    token_ids=np.array(tokens, np.int64),
                )
                for id, (position, tokens) in rows.items()
            ]
            for segment in segments:
                group.kv.truncate(segment.handle, segment.position)
            hidden = group.forward(hidden, segments)
        return dict(zip(rows, tensor(hidden, self.groups[-1]).split([len(tokens) for _, tokens in rows.values()]), strict=True))

    def logits(self, rows: Rows) -> dict[str, torch.Tensor]:
        """One pass."""
        states = self.states(rows)
        logits = logits_of(self.groups[-1], torch.cat(list(states.values())))
        return dict(zip(rows, logits.split([len(part) for part in states.values()]), strict=True))

    def greedy(self, id: str, prompt: Sequence[int], new_tokens: int) -> list[int]:
        tokens = list(prompt)
        given = 0
        for _ in range(new_tokens):
            logits = self.logits({id: (given, tokens[given:])})[id]
            given = len(tokens)
            tokens.append(int(logits[-1].argmax()))
        return tokens[len(prompt) :]


def by_plan(step: Step, texts: Mapping[str, Sequence[int]], plan: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """What `step`, `states` or `logits` of a chain, gives for each text. plan: how many of its tokens go in, pass by pass."""
    given = dict.fromkeys(texts, 0)
    results: dict[str, list[torch.Tensor]] = {id: [] for id in texts}
    for lengths in zip(*(plan[id] for id in texts), strict=True):
        parts = {id: texts[id][given[id] : given[id] + length] for id, length in zip(texts, lengths, strict=True) if length}
        rows = {id: (given[id], tokens) for id, tokens in parts.items()}
        for id, part in (step(rows) if rows else {}).items():
            given[id] += len(part)
            results[id].append(part)
    assert given == {id: len(text) for id, text in texts.items()}
    return {id: torch.cat(parts) for id, parts in results.items()}


def logits_by_plan(
    groups: Sequence[LayerGroup],
    texts: Mapping[str, Sequence[int]],
    plan: Mapping[str, Sequence[int]],
    adapters: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """Logits of all texts, one text after the other. adapters: the number of a text's adapter."""
    chain = GroupChain(groups)
    chain.adapters = dict(adapters or {})
    chain.reserve(*texts, tokens=max(map(len, texts.values())))
    return torch.cat(list(by_plan(chain.logits, texts, plan).values()))


def tokens_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(tiny_models.VOCAB_SIZE, (length,), generator=generator).tolist()
    return tokens
