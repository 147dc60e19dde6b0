"""LangChain and LlamaIndex get the vectors that transformers computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.clients.conftest import Run, needs
from tests.support.functions.functions import FunctionProcess
from tests.support.storage.published import Published

TEXTS = ["The capital of France is Paris.", "no", "the the the"]
SCRIPT = Path(__file__).with_name("embeddings_clients.py")


@needs("llama-index-instrumentation")
@pytest.mark.parametrize("client", ["langchain", "llama-index"])
def test_vectors_of_clients_are_those_of_transformers(
    gateway: FunctionProcess, published: Published, run_client: Run, client: str
) -> None:
    found = json.loads(run_client("python", str(SCRIPT), json.dumps(TEXTS), LAMINA_URL=gateway.url).stdout)[client]
    for text, vector in zip(TEXTS, found["documents"], strict=True):
        ids = torch.tensor([published.tokenizer.encode(text).ids])
        with torch.inference_mode():
            state = published.model.model(ids, use_cache=False).last_hidden_state[0, -1].double().numpy()
        assert np.abs(np.array(vector) - state / np.linalg.norm(state)).max() < 1e-5
    assert found["query"] == pytest.approx(found["documents"][0], abs=1e-6)
