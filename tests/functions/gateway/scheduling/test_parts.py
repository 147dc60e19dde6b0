"""The parts of the scheduler by themselves: capacity, the queue, what to send next, equal micro-batches, reservations."""

import math
import random
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.gateway.scheduling.admission import FairQueue, micro_batches_allowed, micro_batches_wanted
from functions.gateway.scheduling.job import Job
from functions.gateway.scheduling.micro_batch import MicroBatch, level, prompt_pieces
from functions.gateway.scheduling.progress import Piece, Progress
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.stats import StageStats
from functions.gateway.stages.routes import Instance, Route


@pytest.mark.parametrize(
    ("ready", "seconds", "allowed"),
    [
        ([0, 0, 0], [0.0, 0.0, 0.0], 6),
        ([0, 0, 0], [0.02, 0.02, 0.0], 6),
        ([2, 1, 2], [0.0, 0.0, 0.0], 6),
        ([1, 1, 1], [0.02, 0.02, 0.02], 6),
        ([1, 1, 1], [0.04, 0.12, 0.04], 4),
        ([1, 2, 1], [0.04, 0.12, 0.04], 7),
        ([1, 11, 1], [0.04, 0.12, 0.04], 10),
        ([4, 11, 4], [0.04, 0.12, 0.04], 37),
        ([1], [0.1], 2),
        ([1, 1, 1, 1, 1], [0.001, 1.0, 0.001, 0.001, 0.001], 5),
    ],
)
def test_capacity_is_two_micro_batches_at_each_instance_of_the_narrowest_stage(
    ready: list[int], seconds: list[float], allowed: int
) -> None:
    assert micro_batches_allowed(ready, seconds) == allowed


def test_a_backlog_makes_the_pipeline_grow_where_it_is_narrow() -> None:
    """Admission and an autoscaler (target 1.4, a scale-down delay of five decisions) from one instance of each stage."""
    service = [0.04, 0.12, 0.04]
    decisions = [[1, 1, 1]]
    for _ in range(15):
        instances = [max(of_stage) for of_stage in zip(*decisions[-5:], strict=True)]
        concurrency, rate = _closed_network(service, instances, micro_batches_allowed(instances, service))
        decisions.append([min(12, math.ceil(busy / 1.4)) for busy in concurrency])
    assert instances[1] == 12
    assert max(instances[0], instances[2]) < 12
    assert rate >= 0.7 * 12 / 0.12


def _closed_network(service: list[float], instances: list[int], in_flight: int) -> tuple[list[float], float]:
    """Concurrency per stage and steps per second with so many in flight: mean value analysis."""
    queue = [0.0] * len(service)
    rate = 0.0
    for population in range(1, in_flight + 1):
        seconds = [each * max(1.0, (1 + waiting) / n) for each, waiting, n in zip(service, queue, instances, strict=True)]
        rate = population / sum(seconds)
        queue = [rate * each for each in seconds]
    return queue, rate


def test_what_a_step_takes_is_told_from_what_it_waits() -> None:
    dice = random.Random(3)
    stage = StageStats()
    for _ in range(500):
        stage.step(0.02 + dice.choice([0.0, 0.02, 0.06]), decode=True)
    assert 0.02 <= stage.service_seconds < 0.03
    for _ in range(500):
        stage.step(0.05 + dice.choice([0.0, 0.02, 0.06]), decode=True)
    assert 0.05 <= stage.service_seconds < 0.06


@pytest.mark.parametrize(
    ("sequences", "wanted"), [(0, 0), (1, 1), (2, 2), (3, 3), (16, 3), (24, 3), (25, 4), (48, 6), (49, 6), (500, 6)]
)
def test_sequences_are_divided_over_the_stages_before_micro_batches_are_filled(sequences: int, wanted: int) -> None:
    assert micro_batches_wanted(sequences, stages_at_once=3, most_sequences=8, allowed=6) == wanted


@dataclass(frozen=True)
class Waiting:
    client_id: str
    number: int


def test_the_queue_goes_round_the_clients() -> None:
    queue: FairQueue[Waiting] = FairQueue()
    for number, client in enumerate("aaaabbc"):
        queue.push(Waiting(client, number))
    returned = Waiting("a", 9)
    assert queue.remove(Waiting("a", 1))
    assert not queue.remove(Waiting("a", 1))
    queue.push_returned(returned)
    assert len(queue) == len(list(queue)) == 7
    assert queue.peek() == returned
    assert [queue.pop().number for _ in range(7)] == [9, 0, 4, 6, 2, 5, 3]
    assert queue.peek() is None
    with pytest.raises(IndexError, match="nobody waits"):
        queue.pop()


class Stages:
    """What stages hold of one sequence, by the position rule; they may forget and events may get lost."""

    def __init__(self, num_stages: int, dice: random.Random, trouble: float) -> None:
        self.held: list[list[int]] = [[] for _ in range(num_stages)]
        self.dice = dice
        self.trouble = trouble

    def compute(self, stage: int, position: int, tokens: list[int]) -> int | None:
        """None: computed. Else what is held, less than `position`."""
        held = self.held[stage]
        if self.dice.random() < self.trouble:
            del held[self.dice.randrange(len(held) + 1) :]
        if len(held) < position:
            return len(held)
        held[position:] = tokens
        return None


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 9), st.integers(), st.sampled_from([0.0, 0.1, 0.3]))
def test_whatever_stages_forget_every_token_is_computed_from_all_before_it(
    num_stages: int, prompt_tokens: int, chunk: int, seed: int, trouble: float
) -> None:
    """Pieces overlap in flight as trips do; a stage sees pieces in the order in which they were sent."""
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
        first_free = all(stage > 0 for stage, _ in flying)
        piece = progress.next_piece(len(tokens), chunk) if first_free and len(flying) < num_stages else None
        if piece is not None and (not flying or dice.random() < 0.7):
            progress.send(piece)
            flying.append((0, piece))
            continue
        index = dice.choice([i for i, (stage, _) in enumerate(flying) if i == 0 or flying[i - 1][0] > stage + 1 or i == 0])
        stage, piece = flying[index]  # type: ignore[assignment]
        assert piece is not None
        missing = stages.compute(stage, piece.position, tokens[piece.position : piece.end])
        if missing is not None:
            progress.missed(stage, missing)
            progress.settle()
            flying.pop(index)
            continue
        progress.computed(stage, piece)
        if stage < piece.depth:
            flying[index] = (stage + 1, piece)
            continue
        flying.pop(index)
        progress.settle()
        if stage == num_stages - 1 and piece.end == len(tokens):
            assert stages.held[stage] == tokens
            tokens.append(len(tokens))


def job(number: int, prompt_tokens: int = 10, *, decoding: bool = False, strikes: int = 0) -> Job:
    sequence = Sequence("request", [1] * prompt_tokens, 5)
    made = Job(sequence, f"id-{number}", Progress(1), prompt_tokens + 5, number, reserved=True, strikes=strikes)
    if decoding:
        piece = made.progress.next_piece(prompt_tokens, prompt_tokens)
        assert piece is not None
        made.progress.send(piece)
        made.progress.computed(0, piece)
        made.progress.settle()
        sequence.put(1)
    return made


def batches(*sizes: int) -> list[MicroBatch]:
    route = Route([Instance(0, "http://a")])
    made = []
    for size in sizes:
        made.append(MicroBatch(Route(route.instances)))
        for number in range(size):
            made[-1].join(job(number, decoding=True))
    return made


@pytest.mark.parametrize(("sizes", "after"), [((5, 1, 1), (3, 2, 2)), ((3, 2, 2), (3, 2, 2)), ((1, 5, 5), (1, 5, 5))])
def test_a_micro_batch_gives_sequences_to_smaller_ones_on_its_route(sizes: tuple[int, ...], after: tuple[int, ...]) -> None:
    own, *others = batches(*sizes)
    level(own, [own, *others], too_many=False, most_sequences=8)
    assert (len(own.jobs), *(len(other.jobs) for other in others)) == after
    assert all(each.micro_batch is batch for batch in (own, *others) for each in batch.jobs)


def test_a_micro_batch_too_many_dissolves() -> None:
    own, *others = batches(2, 3, 4)
    level(own, [own, *others], too_many=True, most_sequences=8)
    assert [len(batch.jobs) for batch in (own, *others)] == [0, 5, 4]


def test_sequences_do_not_change_routes() -> None:
    own, other = batches(5, 1)
    other.route = Route([Instance(0, "http://b")])
    level(own, [own, other], too_many=True, most_sequences=8)
    assert (len(own.jobs), len(other.jobs)) == (5, 1)


def test_an_event_is_filled_with_chunks_of_several_prompts() -> None:
    jobs = [job(0, 10), job(1, 100), job(2, 100)]
    assert [(one.number, piece.length) for one, piece in prompt_pieces(jobs, 64)] == [(0, 10), (1, 54)]


def test_a_suspect_travels_alone() -> None:
    assert [one.number for one, _ in prompt_pieces([job(0), job(1, strikes=1), job(2)], 64)] == [0, 2]
    assert [one.number for one, _ in prompt_pieces([job(1, strikes=1), job(2)], 64)] == [1]


def test_strikes_count_breaks_at_one_place_and_accidents_are_forgiven() -> None:
    accident, poison = job(0), job(1)
    for stage, position in ((0, 0), (1, 0), (1, 64), (0, 64), (2, 64), (1, 0)):
        accident.strike_at(stage, Piece(position, 64, 2))
        assert accident.strikes == 1
    for position in (0, 32, 60):
        poison.strike_at(1, Piece(position, 64, 2))
    assert poison.strikes == 3
    assert poison.exhausted
    assert not accident.exhausted
    for stage in (0, 1, 0):
        accident.strike_at(stage, Piece(0, 64, 2))
    assert accident.exhausted, "nothing is tried for ever"
    accident.came_further()
    assert not accident.exhausted


def test_each_replay_comes_later() -> None:
    suspect = job(0)
    pauses = []
    for _ in range(3):
        suspect.strike_at(1, Piece(0, 64, 2))
        pauses.append(suspect.replay_at - time.monotonic())
    assert pauses == sorted(pauses)
    assert pauses[0] > 0
