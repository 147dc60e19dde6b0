"""Names of adapters in metrics: clients and publishers decide on them, so their number is bounded."""

import pytest
from prometheus_client import generate_latest

from eventing.problems import ModelNotFound
from eventing.wire.generation import GenerateRequest
from functions.gateway.answers.adapters import ServedModels
from functions.gateway.answers.metrics import GatewayMetrics, GenAIOperation

ADAPTERS = 300


@pytest.mark.parametrize("version", ["", "@1f3c"])
def test_metrics_have_labels_for_so_many_adapters(version: str) -> None:
    models, metrics = ServedModels("tiny", None), GatewayMetrics()
    for number in range(ADAPTERS):
        operation = GenAIOperation.of(GenerateRequest(prompt="x"), "tiny", models.label(f"tiny:adapter-{number}{version}"))
        metrics.adapter_tokens.labels(operation.adapter).inc()
        metrics.gen_ai.observe(operation, None, 1.0, 0.5, 3)
    own = GenAIOperation.of(GenerateRequest(prompt="x"), "tiny", models.label("tiny"))
    assert (own.model, own.adapter) == ("tiny", "")
    page = generate_latest(metrics.registry).decode()
    assert page.count("lamina_gateway_adapter_tokens_total{") == 101
    assert f'lamina_gateway_adapter_tokens_total{{adapter="other"}} {ADAPTERS - 100}.0' in page
    assert page.count("gen_ai_server_request_duration_seconds_count{") == 101


@pytest.mark.parametrize(("named", "hint"), [("tiny:style", "keeps no adapters: set `adapters`"), ("other:style", "")])
def test_a_pipeline_without_adapters_says_how_to_have_some(named: str, hint: str) -> None:
    with pytest.raises(ModelNotFound) as refused:
        ServedModels("tiny", None).check(named)
    assert f"The model '{named}' is not served here; this gateway serves 'tiny'" in str(refused.value)
    assert ("adapters" in str(refused.value)) == bool(hint)
    assert hint in str(refused.value)
