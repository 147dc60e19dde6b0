"""Stages that share the cores of one machine: how many threads and micro-batches `run` gives them."""

import pytest

from functions.gateway.scheduling.batching import micro_batches_wanted
from knative.commands.local_pipeline import Sharing


@pytest.mark.parametrize(
    ("cores", "stages", "busy_threads", "stages_at_once"),
    [(1, 3, 1, 1), (2, 3, 1, 1), (2, 1, 2, 1), (4, 3, 1, 2), (8, 3, 2, 3), (16, 3, 5, 3), (2, 30, 1, 1)],
)
def test_stages_compute_side_by_side_only_with_two_cores_each(
    cores: int, stages: int, busy_threads: int, stages_at_once: int
) -> None:
    sharing = Sharing(cores, stages)
    assert (sharing.busy_threads, sharing.stages_at_once) == (busy_threads, stages_at_once)


@pytest.mark.parametrize(("sequences", "wanted"), [(1, 1), (16, 1), (17, 2), (64, 4)])
def test_one_stage_at_a_time_gets_full_micro_batches(sequences: int, wanted: int) -> None:
    most = Sharing(cores=2, stages=3).micro_batch_sequences
    assert micro_batches_wanted(sequences, stages_at_once=1, max_sequences=most, allowed=6) == wanted
