"""GGUF files in tests/data/gguf, which llama.cpp's converter wrote of tiny models, for tests without llama.cpp.

make .llama.cpp && .venv/bin/python -m tests.support.storage.files_of_llama_cpp      writes them anew
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from tests.support.paths import ROOT
from tests.support.storage import convert_to_gguf, tiny_models

FOLDER: Final = ROOT / "tests" / "data" / "gguf"
# Tiny models, and changes to them.
CASES: Final[dict[str, dict[str, Any]]] = {
    "llama_rope_llama3": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2},
    "gemma3_text": {},
    "lfm2": {},
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "intermediate_size": [64, 48, 64],
        "activation_sparsity_pattern": [0.9, 0.0, 0.3],
        "altup_num_inputs": 4,
        "vocab_size_per_layer_input": tiny_models.VOCAB_SIZE,
    },
    "gemma4_text_experts": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
    },
}
_CONVERTER_READS: Final[dict[str, dict[str, Any]]] = {"gpt2": {"n_ctx": 256}}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in CASES]
        for name, target in zip(CASES, folders, strict=True):
            tiny_models.whole_model(name, **CASES[name]).save_pretrained(target)
            (target / convert_to_gguf.CHANGES).write_text(json.dumps(_CONVERTER_READS.get(name, {})))
        subprocess.run([sys.executable, convert_to_gguf.__file__, ROOT / ".llama.cpp", *folders], check=True)
        FOLDER.mkdir(exist_ok=True)
        for target in folders:
            target.with_suffix(".gguf").rename(FOLDER / f"{target.name}.gguf")
