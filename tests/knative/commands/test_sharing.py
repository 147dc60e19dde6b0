"""Stages that share the cores of one machine: how many threads and micro-batches `run` gives them."""

import pytest

from functions.gateway.scheduling.batching import micro_batches_wanted
from functions.stage.models.checkpoints import STATES_PER_SEQUENCE, checkpoints_in
from knative.commands.local_pipeline import Sharing, kv_cache_bytes
from knative.spec.sizing import StagePlan


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


def test_recurrent_states_have_room_beside_keys_and_values() -> None:
    """Granite-4.0-H-1B in one stage: 256 MiB would hold one sequence."""
    state_bytes = 58 * 10**6
    plans = [StagePlan(0, 0, 40, 0, 0, 1.0, 8192, 0, state_bytes), StagePlan(1, 40, 41, 0, 0, 0.0, 8192, 0)]
    whole = kv_cache_bytes(plans)
    assert whole - checkpoints_in(whole, state_bytes) * state_bytes >= 8 * STATES_PER_SEQUENCE * state_bytes
    assert kv_cache_bytes(plans[1:]) == 2**28
