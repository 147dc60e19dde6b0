"""Lists of API keys: a key or its hash, a name for people, and a quota.

    sha256:<64 hexadecimal digits> name=alice requests_per_minute=60 concurrent=4

Keys stand on lines of their own, or are separated by commas; a line that begins with # is a comment. Error messages number the
keys and words and never quote them, because any word may be a key.
"""

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from typing import Final, Self

HASHED: Final = "sha256:"  # before a key's hexadecimal SHA-256, if it is written in place of the key
_HASH: Final = re.compile("[0-9a-f]{64}")
_NAME: Final = re.compile(r"[\w.@-]{1,100}")
_ID_DIGITS: Final = 12
_MOST: Final = 10**12


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one client. A limit of None is not set; a limit of 0 is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # in prompts and answers
    concurrent: int | None = None  # answers at once
    max_tokens: int | None = None  # of one answer
    priority: int | None = None  # a client with a higher one is served first in most turns; unset: 0
    tokens_per_day: int | None = None  # in prompts and answers, of a calendar day in UTC
    tokens_per_month: int | None = None

    @property
    def has_budget(self) -> bool:
        return bool(self.tokens_per_day or self.tokens_per_month)

    def over(self, other: Self) -> Self:
        """Returns this quota, with its unset limits taken from `other`."""
        said = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(other, **said)


LIMITS: Final = tuple(field.name for field in dataclasses.fields(Quota))


@dataclass(frozen=True, slots=True)
class ApiKey:
    hashed: str  # 64 hexadecimal digits
    name: str = ""
    quota: Quota = Quota()
    in_clear_text: bool = False  # it was written as the key, not as its hash

    @property
    def id(self) -> str:
        """The first digits of the key's hash, which name the key in logs and lists. They are no secret."""
        return self.hashed[:_ID_DIGITS]

    def written(self) -> str:
        """Returns the key as a line of a list, with its hash in place of the key itself."""
        said = {name: getattr(self.quota, name) for name in LIMITS}
        words = [f"{name}={value}" for name, value in (("name", self.name or None), *said.items()) if value is not None]
        return " ".join([HASHED + self.hashed, *words])


def sha256_of(key: str) -> str:
    """Returns the key's SHA-256 as 64 hexadecimal digits.

    A key has 256 random bits and cannot be guessed, so a fast hash is enough.
    """
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """Returns the keys of a list. Raises ValueError for an entry that is wrong, repeated, or empty between two commas."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    entries = [entry.split() for line in lines for entry in line.split(",")]
    found = [_key(number, words) for number, words in enumerate(entries, 1)]
    numbers: dict[str, int] = {}
    for number, key in enumerate(found, 1):
        first = numbers.setdefault(key.hashed, number)
        if first != number:
            raise ValueError(f"key {number} is key {first} again")
    return tuple(found)


def limit(name: str, value: str) -> int:
    """Parses the value of one limit of a quota. Raises ValueError for an unknown name or a value out of range."""
    least = -_MOST if name == "priority" else 0
    if name not in LIMITS or not re.fullmatch("-?[0-9]{1,13}", value) or not least <= int(value) <= _MOST:
        raise ValueError(f"a limit is NAME=NUMBER, NAME one of {', '.join(LIMITS)}")
    return int(value)


def _key(number: int, words: list[str]) -> ApiKey:
    if not words:
        raise ValueError(f"key {number} is empty; keys are separated by commas, or one is on each line")
    secret = words[0].removeprefix(HASHED)
    clear = secret == words[0]
    if not clear and not _HASH.fullmatch(secret):
        raise ValueError(f"key {number} is not {HASHED} and the 64 hexadecimal digits of its hash")
    said: dict[str, str] = {}
    for place, word in enumerate(words[1:], 2):
        name, _, value = word.partition("=")
        try:
            if name in said or not (_NAME.fullmatch(value) if name == "name" else limit(name, value) is not None):
                raise ValueError
        except ValueError as error:
            known = ", ".join(("name", *LIMITS))
            raise ValueError(f"word {place} of key {number} is none of NAME=VALUE, NAME one of {known}, once each") from error
        said[name] = value
    name = said.pop("name", "")
    quota = Quota(**{each: int(value) for each, value in said.items()})
    return ApiKey(sha256_of(secret) if clear else secret, name, quota, clear)
