"""What the scheduler counts."""

import random

from functions.gateway.scheduling.stats import StageStats


def test_what_a_step_takes_is_told_from_what_it_waits() -> None:
    dice = random.Random(3)
    stage = StageStats()
    for _ in range(500):
        stage.step(0.02 + dice.choice([0.0, 0.02, 0.06]), decode_tokens=1)
    assert 0.02 <= stage.service_seconds < 0.03
    for _ in range(500):
        stage.step(0.05 + dice.choice([0.0, 0.02, 0.06]), decode_tokens=1)
    assert 0.05 <= stage.service_seconds < 0.06
