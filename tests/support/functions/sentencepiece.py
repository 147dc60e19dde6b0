"""Small tokenizers of the kind of Llama-2 and Mistral: the space before a word is the first character of its piece."""

from typing import Final

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL: Final = ("<unk>", "<s>", "</s>")
BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))
PIECES: Final = ("▁", "▁The", "▁capital", "▁of", "▁France", "▁is", "▁Paris", "Par", "is", ".", ",", "a", "b", "é", "▁▁")
CONTINUED: Final = "The capital of France is"  # its continuation begins with a word


def llama_2() -> Tokenizer:
    """Encoding prepends a space and writes spaces as ▁; decoding removes the first space."""
    tokenizer = _unigram()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """The same by the library's Metaspace pre-tokenizer and decoder."""
    tokenizer = _unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)])
    return tokenizer


def _unigram() -> Tokenizer:
    """Text without a piece becomes bytes. Longer pieces win."""
    scores = [(token, 0.0) for token in SPECIAL] + [(byte, -20.0) for byte in BYTES]
    scores += [(piece, -10.0 + len(piece)) for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids
    return ids
