"""Lists of API keys with names and quotas. Errors never show what was written."""

import pytest

from functions.configuration.api_keys import ApiKey, Quota, parse_keys, sha256_of

HASH = sha256_of("one")


def test_a_list_may_have_commas_lines_and_comments() -> None:
    written = (
        f"# of the team\n\n  sha256:{HASH} name=alice  concurrent=4 \nsecond, third name=bob priority=-1,sha256:{'0' * 64}\n"
    )
    alice, second, bob, zeros = parse_keys(written)
    assert alice == ApiKey(HASH, "alice", Quota(concurrent=4))
    assert second == ApiKey(sha256_of("second"), in_clear_text=True)
    assert (bob.name, bob.quota) == ("bob", Quota(priority=-1))
    assert zeros.id == "0" * 12
    assert parse_keys(" \n# nothing\n") == ()


def test_a_written_key_can_be_parsed() -> None:
    quota = Quota(60, 100_000, 4, 0, 10)
    key = ApiKey(HASH, "alice@example.com", quota)
    limits = "requests_per_minute=60 tokens_per_minute=100000 concurrent=4 max_tokens=0 priority=10"
    text = f"sha256:{HASH} name=alice@example.com {limits}"
    assert key.written() == text
    assert parse_keys(text) == (key,)
    assert parse_keys(parse_keys("by-hand")[0].written())[0].id == sha256_of("by-hand")[:12]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("good,,good2", "key 2 is empty"),
        ("good, ", "key 2 is empty"),
        (f"a\nsha256:{HASH[:-1]}", "key 2 is not sha256: and the 64"),
        ("a s3cret", "word 2 of key 1 is none of NAME=VALUE"),
        ("a s3cret==", "word 2 of key 1"),
        ("a requests_per_minute=s3cret", "word 2 of key 1"),
        ("a concurrent=1 concurrent=2", "word 3 of key 1"),
        ("a concurrent=-1", "word 2 of key 1"),
        ("a max_tokens=99999999999999", "word 2 of key 1"),
        ("a name=", "word 2 of key 1"),
        ("a,b,a concurrent=1", "key 3 is key 1 again"),
        (f"one,sha256:{HASH}", "key 2 is key 1 again"),
    ],
)
def test_an_error_gives_the_number_of_key_and_word(written: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_keys(written)
    assert "s3cret" not in str(caught.value)


def test_a_keys_quota_overrides_the_default() -> None:
    of_all = Quota(60, 1000, 4)
    assert Quota(concurrent=0, priority=2).over(of_all) == Quota(60, 1000, 0, None, 2)
