"""Single tokens as text and bytes, which may be no whole characters."""

import re
from typing import Final

from tokenizers import Tokenizer

_REPLACEMENT: Final = "\ufffd"
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")
"""As SentencePiece's byte fallback writes one."""


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Special tokens by their names; what is no whole character by the replacement character."""
    text: str = tokenizer.decode([token_id], skip_special_tokens=False)
    return text


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes | None:
    """None where they cannot be known."""
    text = token_text(tokenizer, token_id)
    if _REPLACEMENT not in text:
        return text.encode()
    name: str = tokenizer.id_to_token(token_id) or ""
    if found := _BYTE.fullmatch(name):
        return bytes([int(found[1], 16)])
    try:
        return bytes(_BYTE_OF[character] for character in name)
    except KeyError:
        return None


def _byte_characters() -> dict[str, int]:
    """Character → byte, as byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`): those that can be printed as themselves,
    the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF: Final = _byte_characters()
