"""Thoughts are separated from content, however the text is cut into pieces."""

import pytest

from functions.gateway.text.reasoning import Reasoning

CASES = [
    (False, "<think>\nOne.\n\nTwo.\n</think>\n\nSaid.\n", "One.\n\nTwo.", "Said.\n"),
    (False, "\n<think>One</think>Said", "One", "Said"),
    (True, "One</think>\nSaid", "One", "Said"),
    (True, "\nOne < two </thin or </think", "One < two </thin or </think", ""),
    (True, "cut off\n", "cut off\n", ""),
    (False, "Said <think>at once</think>.", "", "Said <think>at once</think>."),
    (False, "<thi", "", "<thi"),
    (False, "<think>\n\n</think>\n\nSaid", "", "Said"),
    (False, "<think>a</think>b</think>c", "a", "b</think>c"),
    (False, "", "", ""),
]


@pytest.mark.parametrize(("inside", "text", "thought", "said"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thoughts_and_content_are_separated(inside: bool, text: str, thought: str, said: str, size: int) -> None:
    reasoning = Reasoning(inside=inside)
    parts = [part for begin in range(0, len(text), size) for part in reasoning.push(text[begin : begin + size])]
    parts += reasoning.finish()
    assert all(part.text for part in parts)
    assert "".join(part.text for part in parts if part.kind == "reasoning") == thought
    assert "".join(part.text for part in parts if part.kind == "content") == said
    kinds = [part.kind for part in parts]
    assert kinds == sorted(kinds, reverse=True), "thoughts come first"
