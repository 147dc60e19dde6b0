"""The peer of a pipeline's cold start: one Flask function that serves the whole model with transformers.

It starts as such functions do, one thing after the other: imports, download of the checkpoint with boto3, from_pretrained,
listen. `POST /` with a question as text answers with the first token. Environment: PORT, LAMINA_STORE_ENDPOINT,
LAMINA_STORE_BUCKET, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY. Run by bench.coldstart.
"""

import os
import tempfile
import time
from typing import Any, Final

from storage.loading.weight_loader import iterate_layers
from storage.models.model_repository import ModelManifest
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore

_PREFIX: Final = "monolith/"
_WEIGHTS: Final = "model.safetensors"


def publish_monolith(store: ObjectStore, manifest: ModelManifest) -> None:
    """Stores the published model as one checkpoint for `from_pretrained`, if it is not stored yet."""
    if any(item.key == _PREFIX + _WEIGHTS for item in store.list(_PREFIX)):
        return
    import torch
    from safetensors.torch import save

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    with ObjectReader(store.settings) as reader:
        loaded = iterate_layers(reader, manifest, 0, manifest.num_layers)
        raw = {name: each for part in loaded for name, each in part.tensors.items()}
        files = {name: reader.get(stored.key) for name, stored in manifest.files.items()}
    tensors = {name: torch.frombuffer(each.data, dtype=dtypes[each.dtype]).view(each.shape) for name, each in raw.items()}
    for name, content in (files | {_WEIGHTS: save(tensors, {"format": "pt"})}).items():
        store.put(_PREFIX + name, content)


def serve() -> None:
    phases, began = {}, time.monotonic()
    import boto3
    import torch
    from botocore.config import Config
    from flask import Flask, jsonify, request
    from transformers import AutoModelForCausalLM, AutoTokenizer

    phases["import"] = time.monotonic() - began
    client = boto3.client(
        "s3",
        endpoint_url=os.environ["LAMINA_STORE_ENDPOINT"],
        region_name="us-east-1",
        config=Config(signature_version="s3v4", response_checksum_validation="when_required"),
    )
    bucket = os.environ["LAMINA_STORE_BUCKET"]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for item in client.list_objects_v2(Bucket=bucket, Prefix=_PREFIX)["Contents"]:
            client.download_file(bucket, item["Key"], f"{folder}/{item['Key'].removeprefix(_PREFIX)}")
        phases["download"] = time.monotonic() - began
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    phases["load"] = time.monotonic() - began

    app = Flask(__name__)

    @app.post("/")
    def first_token() -> Any:
        messages = [{"role": "user", "content": request.get_data(as_text=True)}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return jsonify(token=tokenizer.decode(output[0, -1:]), phases=phases)

    app.run("0.0.0.0", int(os.environ["PORT"]), threaded=True)


if __name__ == "__main__":
    serve()
