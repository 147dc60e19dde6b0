"""Rows with a grammar draw only allowed tokens, whatever chunks, draft tokens and other rows. Unknown grammars are a miss."""

import json
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from eventing.wire.events import Grammar, Row, Sampling, Status, Want, grammar_digest
from functions.grammars.compiler import GrammarCompiler
from functions.stage.engine import constraints
from functions.stage.engine.engine import Engine
from functions.stage.models.build import build_layer_group
from tests.support.functions.borders import raw
from tests.support.functions.grammar_sources import of_choices, of_schema
from tests.support.functions.stage_pipeline import batch, drawn, engines
from tests.support.storage import tiny_models
from tests.support.storage.published import END_IDS, byte_tokenizer

VOCAB = 300  # of the model: larger than the tokenizer's, as heads often are published
TOKENIZER = byte_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"enum": ["the", "that", 7]}, "c": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
PROMPT = TOKENIZER.encode("what is it?").ids
MOST = 90


def grammar(source: str) -> Grammar:
    return Grammar(grammar_digest(source), END_IDS, source)


def sampling(source: str, seed: int, **more: float) -> Sampling:
    return Sampling(temperature=1.0, seed=seed, prompt_tokens=len(PROMPT), grammar=grammar(source), **more)


def brief(sampled: Sampling) -> Sampling:
    """With the digest alone, as later rows have it."""
    assert sampled.grammar is not None
    return msgspec.structs.replace(sampled, grammar=msgspec.structs.replace(sampled.grammar, source=""))


@pytest.fixture(scope="module")
def weights() -> dict[str, object]:
    return tiny_models.checkpoint_tensors(tiny_models.whole_model("llama", vocab_size=VOCAB))


@pytest.fixture
def engine(weights: dict[str, object]) -> Iterator[Engine]:
    config = tiny_models.tiny_config("llama", vocab_size=VOCAB)
    group = build_layer_group("llama", config, raw(dict(weights)), 0, 6, "float32", "cpu", 2**22)
    with engines([group], grammars=GrammarCompiler(TOKENIZER.to_str)) as (started,):
        yield started


def ask(
    engine: Engine, id_: str, position: int, tokens: Sequence[int], sampled: Sampling | None, draft_tokens: Sequence[int] = ()
) -> Row:
    length = len(tokens) + len(draft_tokens)
    want = Want.TOKEN if sampled else Want.NONE
    reserve = len(PROMPT) + MOST + 20 if position == 0 else None
    row = Row(id_, 0, position, length, want, sampled, reserve, len(draft_tokens))
    (answer,) = engine.handle(batch([row], [*tokens, *draft_tokens]), source="gateway").rows
    return answer


def generate(engine: Engine, id_: str, sampled: Sampling, begun: Sequence[int] = ()) -> list[int]:
    """The answer up to its end, one token a step; `begun` of it goes in with the prompt."""
    tokens = [*PROMPT, *begun]
    position = 0
    while tokens[-1] not in END_IDS and len(tokens) < len(PROMPT) + MOST:
        now = sampled if position == 0 else brief(sampled)
        (token,) = drawn(ask(engine, id_, position, tokens[position:], now))
        position = len(tokens)
        tokens.append(token)
    return tokens[len(PROMPT) :]


def text(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode([token for token in tokens if token not in END_IDS])


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_follows_its_grammar_and_ends_with_it(engine: Engine, seed: int) -> None:
    tokens = generate(engine, "s", sampling(of_schema(SCHEMA), seed))
    assert tokens[-1] in END_IDS
    answer = json.loads(text(tokens))
    assert answer["b"] in ("the", "that", 7)
    assert set(answer) <= {"a", "b", "c"}


def test_a_replay_from_any_position_draws_the_same(engine: Engine) -> None:
    """Also where the sequence goes back behind what its matcher has seen, and where another stage knows nothing of it."""
    sampled = sampling(of_schema(SCHEMA), 3)
    whole = generate(engine, "whole", sampled)
    for begin in (len(whole) - 1, len(whole) // 2, 1):
        assert generate(engine, f"from {begin}", sampled, whole[:begin]) == whole
        back = len(PROMPT) + begin
        assert drawn(ask(engine, "whole", back - 1, [(PROMPT + whole)[back - 1]], brief(sampled))) == (whole[begin],)


def test_draft_tokens_change_nothing(engine: Engine) -> None:
    """Correct draft tokens are accepted, with their own masks. A forbidden one ends the draw."""
    sampled = sampling(of_schema(SCHEMA), 5)
    whole = generate(engine, "alone", sampled)
    assert drawn(ask(engine, "right", 0, PROMPT, sampled, whole[:6])) == tuple(whole[:7])
    assert drawn(ask(engine, "wrong", 0, PROMPT, sampled, [*whole[:3], 0, *whole[4:6]])) == tuple(whole[:4])
    assert drawn(ask(engine, "whole", 0, PROMPT, sampled, whole)) == tuple(whole)


def test_an_unknown_grammar_is_a_miss_at_the_rows_position(engine: Engine) -> None:
    """All that it holds it keeps: the same row with the grammar in full is answered."""
    sampled = sampling(of_choices(["yes", "no"]), 1)
    assert ask(engine, "s", 0, PROMPT[:-1], None).status is Status.OK
    missed = ask(engine, "s", len(PROMPT) - 1, PROMPT[-1:], brief(sampled))
    assert (missed.status, missed.held) == (Status.MISS, len(PROMPT) - 1)
    assert text(drawn(ask(engine, "s", len(PROMPT) - 1, PROMPT[-1:], sampled))) in ("y", "n")


def test_recent_grammars_and_those_of_running_sequences_are_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MOST_GRAMMARS", 2)
    first = sampling(of_choices(["yes", "no"]), 1)
    (token,) = drawn(ask(engine, "first", 0, PROMPT, first))
    for number in range(3):
        drawn(ask(engine, f"other {number}", 0, PROMPT, sampling(of_choices([f"a{number}"]), 1)))
    drawn(ask(engine, "first", len(PROMPT), [token], brief(first)))
    ask(engine, "late", 0, PROMPT[:-1], None)
    assert ask(engine, "late", len(PROMPT) - 1, PROMPT[-1:], brief(first)).status is Status.MISS
    drawn(ask(engine, "late", len(PROMPT) - 1, PROMPT[-1:], brief(sampling(of_choices(["a2"]), 1))))


def test_a_row_whose_grammar_cannot_be_used_fails_alone(engine: Engine) -> None:
    good, broken = sampling(of_choices(["yes"]), 1), sampling("start: nothing", 1)
    forged = msgspec.structs.replace(good, grammar=msgspec.structs.replace(broken.grammar, source="start: /x/"))
    rows = [
        Row(name, 0, 0, len(PROMPT), Want.TOKEN, each, 60) for name, each in zip("abc", (good, broken, forged), strict=True)
    ]
    answers = engine.handle(batch(rows, PROMPT * 3), source="gateway").rows
    assert [answer.status for answer in answers] == [Status.OK, Status.INVALID, Status.INVALID]
    assert "unknown name" in (answers[1].reason or "")
    assert "digest" in (answers[2].reason or "")
    plain = Row("d", 0, 0, len(PROMPT), Want.TOKEN, None, 60)
    assert engine.handle(batch([plain], PROMPT), source="gateway").rows[0].status is Status.OK


def test_an_answer_that_left_its_grammar_is_refused(engine: Engine) -> None:
    sampled = sampling(of_choices(["yes"]), 1)
    wrong = ask(engine, "s", 0, [*PROMPT, *TOKENIZER.encode("no", add_special_tokens=False).ids], sampled)
    assert wrong.status is Status.INVALID
    assert "not allowed" in (wrong.reason or "")


def test_a_grammar_overrides_bans_and_penalties(engine: Engine) -> None:
    """The end token is banned for 30 tokens, but comes if nothing else is allowed. Biases choose among allowed tokens."""
    banned = msgspec.structs.replace(sampling(of_choices(["yes", "no"]), 1), banned=END_IDS, banned_until=1000)
    assert text(generate(engine, "banned", banned)) in ("yes", "no")
    y, n = (TOKENIZER.token_to_id(letter) for letter in "yn")
    for liked, disliked, said in ((y, n, "yes"), (n, y, "no")):
        biased = msgspec.structs.replace(sampling(of_choices(["yes", "no"]), 1), logit_bias={liked: 50, disliked: -50, 7: 100})
        assert text(generate(engine, said, biased)) == said


@pytest.mark.parametrize("temperature", [0.0, 0.5, 100.0])
def test_filters_leave_something_of_what_is_allowed(engine: Engine, temperature: float) -> None:
    sampled = sampling(of_choices(["yes", "no"]), 2, top_k=1, top_p=0.01, min_p=0.9, repetition_penalty=1.5)
    sampled = msgspec.structs.replace(sampled, temperature=temperature)
    assert text(generate(engine, "s", sampled)) in ("yes", "no")
