"""Problem documents: the table is complete, and what is written is read back as the same class."""

import inspect
import json
import re
from collections.abc import Iterator

import pytest

from eventing import problems
from eventing.problems import PROBLEMS, Problem, problem_from_document

RETRIED_BY_EVENTING = {404, 408, 409, 429}


def _classes(base: type[Problem] = Problem) -> Iterator[type[Problem]]:
    yield base
    for problem in base.__subclasses__():
        yield from _classes(problem)


def test_the_table_is_complete_and_names_are_unique() -> None:
    assert set(PROBLEMS.values()) == set(_classes())
    assert len({problem.name for problem in _classes()}) == len(list(_classes()))
    assert all(problem.__module__ == problems.__name__ for problem in _classes())


def test_problems_that_a_retry_helps_say_when_to_retry() -> None:
    assert {problem.name for problem in _classes() if problem.retry_after_seconds} == {
        problem.name for problem in _classes() if problem.status in (429, 503)
    }


@pytest.mark.parametrize("problem", list(_classes()))
def test_the_docstring_says_status_and_whether_a_retry_helps(problem: type[Problem]) -> None:
    text = inspect.getdoc(problem) or ""
    if problem is Problem:
        return
    assert text.startswith(f"{problem.status}. ")
    retried = problem.status in RETRIED_BY_EVENTING or problem.status >= 500
    if "retry does not help" in text:
        assert not retried, "Eventing would retry in vain"
    elif re.search(r"retry (may )?helps?", text):
        assert retried, "Eventing would take it as final"


@pytest.mark.parametrize("problem", list(_classes()))
def test_documents_are_read_back(problem: type[Problem]) -> None:
    document = problem("saw 'ä', wanted b").document()
    assert json.loads(document) == {
        "type": f"urn:lamina:problem:{problem.name}",
        "title": problem.title,
        "status": problem.status,
        "detail": "saw 'ä', wanted b",
    }
    back = problem_from_document(document)
    assert type(back) is problem
    assert str(back) == "saw 'ä', wanted b"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"<html>",
        b"{}",
        b'{"type": "about:blank", "detail": "x"}',
        b'{"type": "urn:lamina:problem:unheard-of"}',
        b'{"type": 5}',
        b'{"type": "urn:lamina:problem:not-ready", "detail": {}}',
        b'{"x": ' + b"[" * 100_000,
    ],
)
def test_other_bodies_are_no_problem_of_laminas(body: bytes) -> None:
    assert problem_from_document(body) is None


def test_members_that_others_add_do_no_harm() -> None:
    body = b'{"type": "urn:lamina:problem:not-ready", "detail": "x", "instance": "/a", "extra": [1]}'
    assert isinstance(problem_from_document(body), problems.NotReady)
