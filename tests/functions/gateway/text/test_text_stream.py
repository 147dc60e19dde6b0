"""Text of an answer: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from functions.gateway.text.text_stream import Detokenizer, StopStrings, TextStream
from tests.support.functions.sentencepiece import CONTINUED, PIECES, ids_of, llama_2, metaspace
from tests.support.storage.published import byte_tokenizer

SENTENCEPIECE = (llama_2, metaspace)
PARTS = ("The", "Paris", "is", " ", "  ", ".", "a", "é", "€", "日本", "😀", "x")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text that each token returns, and the rest."""
    detokenizer = Detokenizer(tokenizer, before)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(st.lists(st.integers(5, 263), max_size=40))
def test_pieces_together_are_the_whole_text(ids: list[int]) -> None:
    tokenizer = byte_tokenizer()
    assert "".join(pieces_of(tokenizer, ids)).replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


@given(st.text(max_size=40))
@settings(deadline=None)
def test_valid_text_comes_back_in_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces = pieces_of(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) == text


@pytest.mark.parametrize("make", SENTENCEPIECE)
def test_a_continuation_keeps_the_space_before_its_first_word(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    answer = ids_of(tokenizer, "▁Paris", ".")
    assert pieces_of(tokenizer, answer, tokenizer.encode(CONTINUED).ids) == [" Paris", ".", ""]
    assert pieces_of(tokenizer, answer) == ["Paris", ".", ""], "a text of its own begins with a word"


@pytest.mark.parametrize("make", SENTENCEPIECE)
def test_a_space_within_an_answer_is_kept(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    assert pieces_of(tokenizer, ids_of(tokenizer, "▁Paris", "▁is", "a", "▁of")) == ["Paris", " is", "a", " of", ""]
    bytes_first = ids_of(tokenizer, "<0xE2>", "<0x82>", "<0xAC>", "▁is")
    assert pieces_of(tokenizer, bytes_first) == ["", "", "€", " is", ""]


@pytest.mark.parametrize("before", [(), ("</s>",), ("▁is", "<s>"), ("▁is", "<0xE2>", "<0x82>", "<0xAC>")])
def test_tokens_before_an_answer_may_be_no_text_by_themselves(before: tuple[str, ...]) -> None:
    tokenizer = llama_2()
    shown = pieces_of(tokenizer, ids_of(tokenizer, "▁Paris", "."), ids_of(tokenizer, *before))
    assert shown == [" Paris" if "▁is" in before else "Paris", ".", ""]


@pytest.mark.slow
@pytest.mark.parametrize("make", SENTENCEPIECE)
@given(text=st.lists(st.sampled_from(PARTS), max_size=12), data=st.data())
def test_prompt_and_answer_together_are_the_decoded_text(
    make: Callable[[], Tokenizer], text: list[str], data: st.DataObject
) -> None:
    tokenizer = make()
    ids = tokenizer.encode("The " + "".join(text)).ids
    cut = data.draw(st.integers(1, len(ids)))
    prompt = tokenizer.decode(ids[:cut])
    assume(not prompt.endswith("\ufffd"))
    shown = pieces_of(tokenizer, ids[cut:], ids[:cut])
    assert prompt + "".join(shown) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in shown)


@given(st.lists(st.integers(0, 2 + 256 + len(PIECES)), max_size=40))
def test_bytes_that_are_no_characters_change_no_text_around_them(ids: list[int]) -> None:
    """A run of bytes is decoded as a whole, so one more may turn valid characters into replacement characters."""
    tokenizer = llama_2()
    high = {tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(128, 256)}
    low = {tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(128)}
    ids = [token_id for token_id in ids if token_id not in low]
    prompt = tokenizer.encode(CONTINUED).ids
    shown = CONTINUED + "".join(pieces_of(tokenizer, ids, prompt))
    pieces = [token_id for token_id in ids if token_id not in high]
    assert shown.encode("ascii", "ignore") == tokenizer.decode(prompt + pieces).encode("ascii", "ignore")


def test_a_returned_character_does_not_change_with_further_bytes() -> None:
    tokenizer = llama_2()
    answer = ids_of(tokenizer, "<0xE2>", "<0x82>", "<0xAC>", "<0xE2>", "▁Paris", "▁is")
    assert pieces_of(tokenizer, answer) == ["", "", "€", "", "\ufffd Paris", " is", ""]


def test_bytes_that_never_become_a_character_are_returned_in_the_end(tokenizer: Tokenizer) -> None:
    (continuation,) = (token_id for token, token_id in tokenizer.get_vocab().items() if token == "Ģ")  # byte 0x80 alone
    *pieces, rest = pieces_of(tokenizer, [continuation] * 20)
    assert ("".join(pieces), rest) == ("\ufffd" * 18, "\ufffd" * 2)


@given(st.lists(st.text("abc", max_size=4), max_size=10), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_stop_strings_are_never_returned(pieces: list[str], stops: list[str]) -> None:
    stream = StopStrings(stops)
    whole = "".join(pieces)
    seen = ""
    for piece in pieces:
        seen += stream.push(piece)
        if stream.found:
            break
    seen += stream.finish()
    # The first stop string to be complete ends the text, however many others began before it.
    complete = min((place + len(stop) for stop in stops if (place := whole.find(stop)) >= 0), default=None)
    assert stream.found == (complete is not None)
    assert all(stop not in seen for stop in stops)
    assert whole.startswith(seen)
    if complete is None:
        assert seen == whole


def test_a_stop_string_may_span_tokens(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["\nUser:"])
    ids = tokenizer.encode("Sure.\nUse it.\nUser: more", add_special_tokens=False).ids
    shown = ""
    for token_id in ids:
        shown += stream.push(token_id)
        assert not any(shown.endswith(part) for part in ("\n", "\nUs", "\nUser", "\nUser:"))
        if stream.stopped:
            break
    assert shown + stream.finish() == "Sure.\nUse it."


def test_text_that_only_begins_like_a_stop_string_is_returned(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["###"])
    shown = "".join(stream.push(token_id) for token_id in tokenizer.encode("a##", add_special_tokens=False).ids)
    assert shown == "a"
    assert stream.holds
    assert stream.finish() == "##"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [(("two",), "one two"), (("wo", "two"), "one two"), (("th", "one"), "one"), (("x",), "one two three")],
)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_stop_string_can_be_included_in_the_text(stops: tuple[str, ...], expected: str, size: int) -> None:
    text = "one two three"
    stream = StopStrings(stops, included=True)
    said = [stream.push(text[begin : begin + size]) for begin in range(0, len(text), size) if not stream.found]
    assert "".join(said) + stream.finish() == expected
