"""Fleets in YAML: what members take from their fleet, and what is refused, with its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.spec.errors import SpecError
from knative.spec.fleet_spec import is_fleet, load_fleet
from tests.support.knative.manifests import document, fleet_document, member_document


def written(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "fleet.yaml"
    file.write_text(yaml.safe_dump(fleet_document(**changes)))
    return file


def test_members_are_written_here_in_files_or_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    for name in ("code", "draw"):
        (tmp_path / "pipelines" / f"{name}.yaml").write_text(yaml.safe_dump(member_document(name)))
    _, folder = load_fleet(written(tmp_path, members="pipelines"))
    _, listed = load_fleet(written(tmp_path, members=[member_document("code"), "pipelines/draw.yaml"]))
    assert folder == listed
    assert [each.name for each in listed] == ["code", "draw"]
    assert {(each.image, each.store.endpoint, each.token_secret) for each in listed} == {
        ("registry.example/lamina:1", "http://store.example:9000", "models-pipeline")
    }
    assert is_fleet(written(tmp_path))
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(document()))
    assert not is_fleet(tmp_path / "pipeline.yaml")


def test_members_that_share_devices_give_them_back_soon(tmp_path: Path) -> None:
    own = {"autoscaling": {"window_seconds": 20}}
    members = [member_document("code"), member_document("draw", stage=own)]
    _, (code, draw) = load_fleet(written(tmp_path, members=members, max_devices=8))
    assert (code.stage.autoscaling.scale_down_delay_seconds, code.stage.autoscaling.window_seconds) == (0, 6)
    assert (draw.stage.autoscaling.scale_down_delay_seconds, draw.stage.autoscaling.window_seconds) == (0, 20)
    assert (code.stage.timeout_seconds, code.gateway.timeout_seconds) == (20, 600), "the drain ends sooner"
    stored = member_document("code", kv_store={"secret": "kv"})
    _, (stores,) = load_fleet(written(tmp_path, members=[stored], max_devices=8))
    assert stores.stage.timeout_seconds == 600, "KV is saved after the drain"
    _, (alone,) = load_fleet(written(tmp_path, members=[member_document("code")]))
    assert alone.stage.autoscaling.scale_down_delay_seconds == 30


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"members": []}, r"\$\.members: there is none"),
        ({"members": "nowhere"}, r"\$\.members: .*nowhere is no folder"),
        ({"members": [member_document("a"), member_document("a")]}, r"member a is there twice"),
        ({"members": [member_document("a"), member_document("b", model={"name": "a"})]}, r"model a is there twice"),
        ({"members": [member_document("models")]}, r"\$\.name: models is a member's name, too"),
        ({"members": [member_document("a", image="other")]}, r"members\[0\]: \$\.image: a member has the fleet's"),
        ({"members": [member_document("a", gateway={"page": "off"})]}, r"members\[0\]: \$\.gateway\.page: is the fleet's"),
        (
            {"members": [member_document("a", eventing={"dead_letter_sink": "x"})]},
            r"members\[0\]: \$\.eventing: is the fleet's",
        ),
        ({"name": "m" * 29, "eventing": {"dead_letter_sink": "x"}}, r"\$\.name: .*at most 28 characters"),
        ({"members": [member_document("a", monitoring={})]}, r"\$\.monitoring: a member has the fleet's"),
        ({"members": [member_document("a", cut="0:2", stages=1)]}, r"members\[0\]: \$\.stages, \$\.cut: exactly one"),
        ({"gateway": {"queue_limit": 5}}, r"\$\.gateway\.queue_limit: concerns one pipeline"),
        ({"gateway": {"api_keys_secret": ["a", "b"]}}, r"api_keys_secret: a fleet takes one Secret"),
        ({"max_devices": 2}, r"has 3 stages, more than max_devices, 2"),
        (
            {"max_devices": 8, "members": [member_document("a", stage={"autoscaling": {"min_scale": 1}})]},
            r"\$\.stage\.autoscaling: members that share max_devices scale between 0 and 1",
        ),
        ({"gateways": {}}, r"fleet.yaml: \$.*gateways"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        load_fleet(written(tmp_path, **changes))
