"""Runs llama.cpp's converter, in a process of its own since it brings another `gguf`: SOURCES FOLDER… → FOLDER.gguf.

Vocabularies are left out: tests/storage/checkpoints/test_gguf_tokenizers.py has them.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

CHANGES = "changes.json"
"""A file in a folder: keys of config.json that the converter reads instead, or not at all if they are null."""


def without_vocabulary(model: Any) -> None:
    model.gguf_writer.add_tokenizer_model("none")
    if not any(key.endswith(".vocab_size") for key in model.gguf_writer.kv_data[0]):
        model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


if __name__ == "__main__":
    sources, *folders = sys.argv[1:]
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    import gguf
    from conversion import get_model_class  # type: ignore[import-not-found]

    for folder in map(Path, folders):
        (folder / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": dict.fromkeys(map(str, range(128)), 0)}, "added_tokens": []})
        )
        config = json.loads((folder / "config.json").read_text())
        converter = get_model_class(config["architectures"][0])
        for each in (converter, *filter(inspect.isclass, vars(converter).values())):
            each.set_vocab = without_vocabulary
        converter.no_mtp = True  # tiny models have no layers for further tokens
        changes = json.loads((folder / CHANGES).read_text())
        found = {**converter.load_hparams(folder, False), **changes}
        parameters = {key: value for key, value in found.items() if value is not None}
        converter(
            folder, gguf.LlamaFileType.ALL_F32, folder.with_suffix(".gguf"), hparams=parameters, fuse_qkv="fuse_qkv" in changes
        ).write()
