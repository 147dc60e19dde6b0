"""Lists the decoder-only text families of the installed transformers, and how stages run each."""

from dataclasses import dataclass
from typing import Literal

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from storage.checkpoints.decoder_families import DECODER_FAMILIES
from storage.checkpoints.families import NO_TEXT_DECODERS, REFUSED


@dataclass(frozen=True, slots=True)
class KnownFamily:
    """A family of transformers, and how stages run it."""

    model_type: str
    runs: Literal["native", "generic", "refused"]
    why: str | None = None  # the reason for a refusal


def known_families() -> list[KnownFamily]:
    """Returns every decoder-only text family of the installed transformers, sorted by name.

    A `native` family runs in C, or with transformers' modules if the table of families does not describe its config. A
    `generic` family runs with transformers' modules. A model that also takes images or sound is listed as its text part.
    """
    logging.set_verbosity_error()  # some classes' defaults do not please their own checks
    return [_known(model_type) for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if _is_text_decoder(model_type)]


def _is_text_decoder(model_type: str) -> bool:
    if model_type in NO_TEXT_DECODERS:
        return False
    config = CONFIG_MAPPING[model_type]()
    return not config.is_encoder_decoder and config.get_text_config(decoder=True) is config


def _known(model_type: str) -> KnownFamily:
    if model_type in DECODER_FAMILIES:
        return KnownFamily(model_type, "native")
    if model_type in REFUSED:
        return KnownFamily(model_type, "refused", REFUSED[model_type])
    return KnownFamily(model_type, "generic")
