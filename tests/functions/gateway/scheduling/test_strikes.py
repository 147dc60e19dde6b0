"""What counts against a sequence, and what is forgiven."""

import time

from functions.gateway.scheduling.progress import Piece
from functions.gateway.scheduling.strikes import Strikes


def test_strikes_count_breaks_at_one_place_and_accidents_are_forgiven() -> None:
    accident, poison = Strikes(), Strikes()
    for stage, position in ((0, 0), (1, 0), (1, 64), (0, 64), (2, 64), (1, 0)):
        accident.strike_at(stage, Piece(position, 64, 2))
        assert accident.count == 1
    for position in (0, 32, 60):
        poison.strike_at(1, Piece(position, 64, 2))
    assert poison.count == 3
    assert poison.exhausted
    assert not accident.exhausted
    for stage in (0, 1, 0):
        accident.strike_at(stage, Piece(0, 64, 2))
    assert accident.exhausted, "nothing is tried for ever"
    accident.came_further()
    assert not accident.exhausted


def test_each_replay_comes_later() -> None:
    suspect = Strikes()
    pauses = []
    for _ in range(3):
        suspect.strike_at(1, Piece(0, 64, 2))
        pauses.append(suspect.replay_at - time.monotonic())
    assert pauses == sorted(pauses)
    assert pauses[0] > 0
