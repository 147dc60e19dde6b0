"""A stranger guesses a PIN in another client's prompt, from what the gateway tells of reused keys and values.

A PIN's digits lie in different blocks of a prompt that is known otherwise, so each of them can be guessed alone.
`cached_tokens` says exactly what response times say with noise.
"""

import json
import random
from itertools import chain

import pytest

from eventing.wire.prefix_chain import BLOCK_TOKENS
from tests.pipeline.test_keys import ask
from tests.support.functions.functions import FunctionProcess, running_gateway, wait_until
from tests.support.storage.published import Published

PINS = ("2718", "3141")
WHOLE = len(PINS[0]) * BLOCK_TOKENS  # tokens of a form that can be reused
SALT = "c2FsdHNhbHRzYWx0c2FsdHNhbHQ"


def prompt(form: int, pin: str) -> list[int]:
    """Token ids of a form that begins with the digits of `pin`. One more token follows, since the last one is never reused."""
    blocks = ([5 + 10 * form + number] * (BLOCK_TOKENS - 1) + [50 + int(digit)] for number, digit in enumerate(pin))
    return [*chain.from_iterable(blocks), 3]


def cached(gateway: FunctionProcess, form: int, pin: str, salt: str | None = None) -> int:
    """Tokens of the prompt that were reused."""
    body = {"model": "tiny", "prompt": prompt(form, pin), "max_tokens": 1, "cache_salt": salt}
    status, reply = ask(gateway, "/v1/completions", body)
    assert status == 200, reply
    found: int = json.loads(reply)["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def guessed(gateway: FunctionProcess, form: int) -> tuple[str, set[int]]:
    """The PIN that a stranger finds with ten requests for each digit, and by how many reused tokens those ten differed."""
    pin, differences = "", set()
    for _ in PINS[0]:
        found = {digit: cached(gateway, form, pin + digit) for digit in random.sample("0123456789", 10)}
        differences.add(max(found.values()) - min(found.values()))
        pin += max(found, key=lambda digit: found[digit])
    return pin, differences


@pytest.mark.parametrize("salt", [None, SALT])
def test_without_keys_a_stranger_learns_nothing(published: Published, stages: list[FunctionProcess], salt: str | None) -> None:
    with running_gateway(published, stages) as gateway:
        for form, pin in enumerate(PINS):
            assert cached(gateway, form, pin, salt) == 0
            wait_until(lambda: cached(gateway, form, pin, salt) == (0 if salt is None else WHOLE))  # noqa: B023
            assert guessed(gateway, form)[1] == {0}
            assert cached(gateway, form, pin, SALT[::-1]) == 0


def test_if_all_share_a_stranger_finds_the_pin_in_forty_requests(published: Published, stages: list[FunctionProcess]) -> None:
    with running_gateway(published, stages, LAMINA_PREFIX_SHARING="pipeline") as gateway:
        for form, pin in enumerate(PINS):
            wait_until(lambda: cached(gateway, form, pin) == WHOLE)  # noqa: B023
            assert guessed(gateway, form) == (pin, {BLOCK_TOKENS})
