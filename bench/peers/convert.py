"""Runs llama.cpp's converter, in a process of its own since it brings another `gguf`: SOURCES FOLDER FILE.

Every folder of `bench.peers` has SmolLM2's tokenizer, which the classes of other models would not recognize.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any


def with_smollm_vocabulary(model: Any) -> None:
    model.get_vocab_base_pre = lambda tokenizer: "smollm"
    model._set_vocab_gpt2()


if __name__ == "__main__":
    sources, folder, target = sys.argv[1:]
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    import gguf
    from conversion import get_model_class  # type: ignore[import-not-found]

    config = json.loads((Path(folder) / "config.json").read_text())
    converter = get_model_class(config["architectures"][0])
    for each in (converter, *filter(inspect.isclass, vars(converter).values())):
        each.set_vocab = with_smollm_vocabulary
    converter.no_mtp = True  # these folders have no layers that predict further tokens
    hparams = converter.load_hparams(Path(folder), False)
    if config["model_type"] == "granitemoehybrid":  # transformers renames what published checkpoints have
        hparams["layer_types"] = ["attention" if kind == "full_attention" else "mamba" for kind in hparams["layer_types"]]
    if config["model_type"] == "gemma3_text":  # its converter cuts off the embeddings that the tokenizer has no tokens for
        own, common = converter.modify_tensors, converter.__mro__[1].modify_tensors
        converter.modify_tensors = lambda self, tensor, name, layer: (common if "embed_tokens" in name else own)(
            self, tensor, name, layer
        )
    converter(Path(folder), gguf.LlamaFileType.MOSTLY_F16, Path(target), hparams=hparams).write()
