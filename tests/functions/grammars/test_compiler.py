"""The tokens that a grammar allows depend on the answer alone, and hostile grammars are bounded in cost."""

import random
import time
from typing import Any

import pytest

from eventing.wire.structured_outputs import StructuredOutputs
from functions.grammars.compiler import GrammarCompiler
from functions.grammars.matcher import Allowed, Matcher, is_allowed
from functions.grammars.sources import UnusableGrammar, place_of, source_of
from tests.support.functions.grammar_sources import of_choices, of_schema
from tests.support.storage.published import END_IDS, byte_tokenizer

TOKENIZER = byte_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 9}},
    "required": ["a"],
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER.to_str)


def ids(text: str) -> list[int]:
    tokens: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return tokens


def tokens_of(mask: Allowed) -> list[int]:
    return [token for token in range(TOKENIZER.get_vocab_size() + 40) if is_allowed(mask, token)]


def allowed(matcher: Matcher, text: str) -> set[str]:
    """As tokens of the vocabulary."""
    (mask,) = matcher.allowed(ids(text))
    return {str(TOKENIZER.id_to_token(token)) for token in tokens_of(mask)}


def test_allowed_tokens_depend_on_the_answer_alone(compiler: GrammarCompiler) -> None:
    """However it was walked: forwards, back, to another branch, or anew."""
    source, dice = of_schema(SCHEMA), random.Random(3)
    texts = ['{"a": 1', '{"a": 12}', '{"a": -7, "b": "', '{"a": -7, "b": "xyz"}', "{", "", '{"a": 1, "b": "q']
    walked = compiler.compile(source, END_IDS)
    for _ in range(60):
        text = dice.choice(texts)
        fresh = compiler.compile(source, END_IDS)
        assert allowed(walked, text) == allowed(fresh, text), text


def test_only_end_tokens_are_allowed_after_the_end(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(of_choices(["yes", "no"]), END_IDS)
    assert allowed(matcher, "") == {"y", "n"}
    assert allowed(matcher, "no") == {"</s>", "<|im_end|>"}
    assert allowed(matcher, "ye") == {"s"}


def test_masks_follow_draft_tokens_as_if_they_were_accepted(compiler: GrammarCompiler) -> None:
    """Masks end at the first draft token that is not allowed. Later calls are not affected."""
    matcher = compiler.compile(of_schema(SCHEMA), END_IDS)
    so_far, drafted = ids('{"a": '), [*ids('12, "b": "'), *ids("\n"), *ids("x")]
    masks = matcher.allowed(so_far, drafted)
    assert len(masks) == len(ids('12, "b": "')) + 1, "a line break is not allowed in a string, so nothing behind it counts"
    for place, mask in enumerate(masks):
        (alone,) = compiler.compile(of_schema(SCHEMA), END_IDS).allowed([*so_far, *drafted[:place]])
        assert (mask == alone).all()
    (again,) = matcher.allowed(so_far)
    assert (again == masks[0]).all()


def test_an_impossible_answer_is_reported(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(of_choices(["yes"]), END_IDS)
    with pytest.raises(UnusableGrammar, match="number 1 of the answer, is not allowed"):
        matcher.allowed(ids("yo"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (StructuredOutputs(regex="(a"), "unclosed group"),
        (StructuredOutputs(regex="(?=a)b"), "look-around"),
        (StructuredOutputs(grammar="start: nothing"), "unknown name"),
        (StructuredOutputs(json='{"type": "strin"}'), "Invalid type: strin"),
        (StructuredOutputs(json="{"), "no JSON"),
        (StructuredOutputs(json="[1]"), "no JSON object"),
        (StructuredOutputs(json={"not": {"type": "string"}}), "not"),
        (StructuredOutputs(json={"$ref": "https://example.org/x"}), "not present"),
        (StructuredOutputs(json={"const": 1, "enum": [2]}), "Unsatisfiable|unsatisfiable|[Ee]mpty|no token"),
        # What x-guidance of the request itself says does not loosen that.
        (StructuredOutputs(json={"not": {}, "x-guidance": {"lenient": True}}), "not"),
    ],
)
def test_a_grammar_that_does_not_compile_is_reported(compiler: GrammarCompiler, asked: StructuredOutputs, said: str) -> None:
    with pytest.raises(UnusableGrammar, match=said):
        compiler.compile(source_of(asked), END_IDS)


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


EXPENSIVE = {
    "terminals that double": "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(30)) + '\nA30: "x"\nstart: A0',
    "rules that double": "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x"\nstart: a0',
    "ambiguous": 'start: e\ne: e e | e "+" e | /[a-z]/ | ""',
    "states": "start: /(.*a.{20})|(.*b.{18})/",
    "counts": "start: /.{1,5000}x.{1,5000}y/",
    "many properties": of_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
    "nested": of_schema(_nested(60)),
    "large enum": of_schema({"enum": [f"value {i}" for i in range(4000)]}),
}


@pytest.mark.parametrize("what", EXPENSIVE)
def test_hostile_grammars_are_bounded_in_cost(compiler: GrammarCompiler, what: str) -> None:
    """It is refused, at once or half-way, or each step is quick. Seconds of this process, so that others do not count."""
    dice, tokens, steps = random.Random(1), list[int](), list[float]()
    began = time.thread_time()
    try:
        matcher = compiler.compile(EXPENSIVE[what], END_IDS)
        for _ in range(40):
            step = time.thread_time()
            (mask,) = matcher.allowed(tokens)
            steps.append(time.thread_time() - step)
            choices = [token for token in tokens_of(mask) if token not in END_IDS]
            if not choices:
                break
            tokens.append(dice.choice(choices))
    except UnusableGrammar:
        pass
    assert max(steps, default=0) < 0.5
    assert time.thread_time() - began - sum(steps) < 3


def test_the_place_of_a_word_in_a_schema() -> None:
    schema = {"properties": {"a": {"items": [{"type": "integer"}, {"type": "strin"}]}, "b": {"not": {}}}}
    assert place_of(schema, ["strin"]) == "#/properties/a/items/1/type"
    assert place_of(schema, ["Unimplemented", "keys", "not"]) == "#/properties/b/not"
    assert place_of(schema, ["nowhere"]) is None


def test_json_is_written_in_one_way(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(of_schema(SCHEMA), END_IDS)
    assert allowed(matcher, '{"a":') == {"Ġ"}
    assert "Ġ" not in allowed(matcher, "")
