"""The examples: their checked-in manifests are up to date, and Knative accepts them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from functions.configuration.config import GatewayConfig, read_config
from knative.__main__ import main
from knative.local.platform import ROOT
from knative.webhook.check import is_knative_service, validate, warnings
from tests.support.knative.manifests import environment_of

EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/pipeline.yaml"))


def rendered(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.yaml")}


def services(folder: Path) -> list[dict[str, Any]]:
    objects = [each for text in rendered(folder / "rendered").values() for each in yaml.safe_load_all(text)]
    return [each for each in objects if is_knative_service(each)]


def test_there_are_four_examples() -> None:
    assert [path.name for path in EXAMPLES] == ["llama-2-13b", "smollm2-cpu", "smollm2-eventing", "smollm2-hpa"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_rendered_files_are_up_to_date(example: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["render", str(example / "pipeline.yaml"), "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    name = example.relative_to(ROOT)
    again = f"rm -r {name}/rendered; python -m knative render {name}/pipeline.yaml --output {name}/rendered"
    assert rendered(tmp_path) == rendered(example / "rendered"), f"out of date: {again}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_knative_accepts_the_manifests_without_a_warning(example: Path) -> None:
    found = services(example)
    assert len(found) == len(list((example / "rendered").glob("stage-*.yaml"))) + len(
        list((example / "rendered").glob("gateway*.yaml"))
    )
    for service in found:
        assert (validate(service), warnings(service)) == ([], [])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_functions_accept_their_environment(example: Path) -> None:
    for service in services(example):
        config = read_config(environment_of(service))
        if isinstance(config, GatewayConfig):
            assert config.stage_services is not None
            assert all(
                url.startswith(f"http://{name}.") for (_, url), name in zip(config.stages, config.stage_services, strict=True)
            )
