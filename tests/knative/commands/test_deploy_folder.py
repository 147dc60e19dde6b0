"""`deploy FOLDER` of a folder that `render` wrote, possibly edited; other folders are refused."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from knative.__main__ import main
from tests.support.knative.kubernetes_api import EVENTING, KubernetesApi
from tests.support.knative.manifests import rendered_folder

SINKS = {"dead_letter_sink": "http://sink.example", "reply_sink": "http://sink.example"}


def deploy(tmp_path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["deploy", *arguments, "--kubeconfig", str(tmp_path / "kubeconfig")])


@pytest.mark.slow
def test_an_edited_folder_is_deployed_and_differs_from_the_spec_by_the_edit_alone(api: KubernetesApi, tmp_path: Path) -> None:
    out = rendered_folder(tmp_path, "--gitops")
    stage = (out / "stage-1.yaml").read_text()
    (out / "stage-1.yaml").write_text(stage.replace('max-scale: "10"', 'max-scale: "4"'))
    assert (out / "stage-1.yaml").read_text() != stage
    result = deploy(tmp_path, str(out))
    assert (result.exit_code, result.stdout) == (0, "http://chat.default.example\n"), result.output
    assert [name for name in api.applied if name in api.named("services")][-1] == "chat"
    (found,) = (each for each in api.found("services", {}) if each["metadata"]["name"].endswith("-s1"))
    assert found["spec"]["template"]["metadata"]["annotations"]["autoscaling.knative.dev/max-scale"] == "4"
    assert api.named("serviceaccounts") == ["chat-gateway"], "objects for GitOps controllers are not deployed"
    difference = deploy(tmp_path, str(tmp_path / "pipeline.yaml"), "--dry-run", "server").stdout
    assert [line for line in difference.splitlines() if "max-scale" in line] == [
        '-        autoscaling.knative.dev/max-scale: "4"',
        '+        autoscaling.knative.dev/max-scale: "10"',
    ]


@pytest.mark.slow
def test_the_gateway_for_events_is_not_the_main_gateway(api: KubernetesApi, tmp_path: Path) -> None:
    api.kinds |= EVENTING
    assert deploy(tmp_path, str(rendered_folder(tmp_path, eventing=SINKS))).stdout == "http://chat.default.example\n"


def test_a_folder_with_a_changing_kustomization_must_be_built_first(tmp_path: Path) -> None:
    out = rendered_folder(tmp_path)
    with (out / "kustomization.yaml").open("a") as file:
        file.write("nameSuffix: -mine\n")
    result = deploy(tmp_path, str(out))
    assert result.exit_code == 1
    assert "kustomization.yaml: nameSuffix changes what is applied; build it first: kubectl kustomize" in result.output


def test_two_pipelines_in_one_folder_are_refused(tmp_path: Path) -> None:
    out = rendered_folder(tmp_path)
    document = (out / "stage-0.yaml").read_text()
    (out / "stage-9.yaml").write_text(document.replace("lamina.dev/pipeline: ", "lamina.dev/pipeline: f"))
    result = deploy(tmp_path, str(out))
    assert "lamina.dev/pipeline differs among the objects" in result.output


def test_any_other_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = deploy(tmp_path, str(tmp_path / "empty"))
    assert (result.exit_code, result.output) == (
        1,
        f"Error: {tmp_path / 'empty'}: has 0 gateways, and needs one; did `render --output` write this folder?\n",
    )


def test_an_image_needs_a_spec(tmp_path: Path) -> None:
    assert deploy(tmp_path, str(rendered_folder(tmp_path)), "--image", "registry.example/other:1").exit_code == 2
