"""The rules that a GGUF file names in `tokenizer.ggml.pre`: how byte BPE cuts text into words before it merges.

Each rule is a list of regular expressions. The first cuts the text into its matches and what is between them, the next cuts
each of these pieces, and so on. The names and rules are those of llama.cpp (src/llama-vocab.cpp). If llama.cpp writes an
expression differently from the models' own tokenizer.json, the latter is used, since the same library reads it here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One rule: its regular expressions, and what it says about merges and the begin token."""

    words: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole, whatever the merges say
    add_bos: bool = False  # whether the begin token comes first, for files that do not say
    nfc: bool = False  # the models' own tokenizers compose characters first


_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(end)s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(end)s"
)
_DEEPSEEK3: Final = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_KIMI_CASED: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+%(end)s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*%(end)s"
)
_CJK: Final = "[一-龥぀-ゟ゠-ヿ]+"
_THREES_FROM_THE_RIGHT: Final = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_BLOOM: Final = " ?[^(\\s|.,!?…。，、।۔،)]+"


def _like_gpt4(digits: str, punctuation: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*", contractions: str = _CONTRACTIONS + "|") -> str:
    return rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{punctuation}|{_SPACES}"


def _cased(digits: str, end: str = _CONTRACTIONS + "?") -> str:
    return rf"{_CASED % {'end': end}}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_LLAMA3: Final = PreTokenizer((_like_gpt4(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_ONE_DIGIT: Final = _like_gpt4(r"\p{N}")
_QWEN2: Final = PreTokenizer((_ONE_DIGIT,), nfc=True)
_PLAIN_GPT2: Final = PreTokenizer((_GPT2,))
_DIGITS_APART: Final = PreTokenizer((r"\p{N}", _GPT2))
_DEEPSEEK_V3: Final = PreTokenizer((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}[\r\n]*|{_SPACES}"))
_GPT4O: Final = PreTokenizer((_cased(r"\p{N}{1,3}"),))
_BAILING: Final = PreTokenizer(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
)
_COHERE: Final = PreTokenizer((_THREES_FROM_THE_RIGHT, _cased(r"\p{N}{1,3}")))

_BY_NAMES: Final[Mapping[str, PreTokenizer]] = {
    "afmoe": PreTokenizer(
        (
            _THREES_FROM_THE_RIGHT,
            "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
            rf"{_DEEPSEEK3}[\r\n]*|{_SPACES}",
        )
    ),
    "bailingmoe bailingmoe2 llada-moe": _BAILING,
    "bloom gpt3-finnish poro-chat": PreTokenizer((_BLOOM,)),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "chatglm-bpe": PreTokenizer((_like_gpt4(r"\p{N}{1,3}"),)),
    "cohere2moe tiny_aya": _COHERE,
    "codeshell command-r exaone mellum2 minerva-7b refact smollm starcoder": _DIGITS_APART,
    "dbrx smaug-bpe": PreTokenizer((_like_gpt4(r"\p{N}{1,3}"),)),
    # Files without the name of a rule were written before there were names.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ"
            "-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
            "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            "[一-龥ࠀ-一가-퟿]+",
            r"\p{N}+",
        )
    ),
    "deepseek-v3 hunyuan-dense hy_v4 joyai-llm": _DEEPSEEK_V3,
    "deepseek-r1-qwen f2llmv2 kormo megrez qwen2": _QWEN2,
    "exaone-moe": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "falcon-h1 falcon3 jina-v5-nano lfm2 llama-bpe llama-v3 llama3 midm-2.0 pixtral": _LLAMA3,
    "glm4 glm5": PreTokenizer((_like_gpt4(r"\p{N}{1,3}"),), ignore_merges=True),
    (
        "a.x-4.0 exaone4 gigachat gpt-2 granite-docling jais jina-de jina-es jina-v2-de jina-v2-es mellum modern-bert mpt olmo"
        " phi-2 trillion"
    ): _PLAIN_GPT2,
    "gpt-4o kanana2 llama4 minimax-m2 talkie": _GPT4O,
    "granite-embed-multi-97m": PreTokenizer(_GPT4O.words, ignore_merges=True),
    "grok-2 hunyuan solar-open stablelm2": PreTokenizer((_ONE_DIGIT,)),
    "jais-2": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
            r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
            r"|\s{1,2}(?!\S)|\s{1}",
        )
    ),
    "kimi-k2": PreTokenizer(
        (
            rf"[\p{{Han}}]+|{_KIMI_CASED % {'end': _CONTRACTIONS + '?'}}|\p{{N}}{{1,3}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _ONE_DIGIT)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _like_gpt4(r"\p{N}+")), ignore_merges=True),
    "qwen35": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        ),
    ),
    "seed-coder": PreTokenizer((_like_gpt4(r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "spark2_5": PreTokenizer((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "tekken": PreTokenizer((_cased(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    "ufakzeka": PreTokenizer((_like_gpt4(r"\p{N}", contractions=""),)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "youtu": PreTokenizer(
        (
            "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
            _cased(r"\p{N}"),
        ),
        ignore_merges=True,
    ),
}
PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = {name: rule for names, rule in _BY_NAMES.items() for name in names.split()}
