"""A fleet's rendered objects: valid for Knative, and read by the function's own configuration."""

from eventing.wire.events import EventType
from functions.configuration.config import FleetConfig, GatewayConfig, StageConfig, member_config, read_config
from knative.render.fleet import door_files, fleet_gateway, member_files
from knative.render.services import stage_service
from knative.spec.kubernetes_object import KubernetesObject
from knative.webhook.check import validate, warnings
from tests.support.knative.manifests import container_of, environment_of, fleet_members, fleet_of


def test_functions_accept_every_rendered_environment() -> None:
    fleet = fleet_of(gateway={"api_keys_secret": "keys", "page": "off", "resources": {"memory": "1Gi"}}, max_devices=8)
    files = door_files(fleet)
    (gateway,), (lease,) = files["gateway.yaml"], files["grants.yaml"]
    environ = environment_of(gateway)
    config = read_config(environ)
    assert isinstance(config, FleetConfig)
    assert (config.fleet, config.page, config.memory_bytes) == ("models", "off", int(0.75 * 2**30))
    assert (config.max_devices, config.lease) == (8, lease["metadata"]["name"])
    role = next(each for each in files["access.yaml"] if each["kind"] == "Role")
    (rule,) = [each for each in role["rules"] if each["resources"] == ["leases"]]
    assert (rule["resourceNames"], rule["verbs"]) == ([config.lease], ["get", "update"])
    mounts = {mount["mountPath"]: mount["name"] for mount in container_of(gateway)["volumeMounts"]}
    volumes = {each["name"]: each for each in gateway["spec"]["template"]["spec"]["volumes"]}
    assert config.keys_folder is not None
    assert volumes[mounts[config.keys_folder]]["secret"] == {"secretName": "keys"}, "whole: new members need no new pod"
    assert validate(gateway) == []
    assert list(warnings(gateway)) == []
    for member in fleet_members("code", "draw"):
        *stages, config_map = _all(member_files(member))
        part = member_config(environ, config_map["data"])
        assert isinstance(part, GatewayConfig)
        assert (part.pipeline, part.model) == (member.fingerprint, member.spec.model.name)
        assert part.stage_services == tuple(each["metadata"]["name"] for each in stages)
        assert part.pipeline_token == "secret"
        assert part.page == "off"
        for stage in stages:
            assert validate(stage) == []
            assert isinstance(read_config(environment_of(stage)), StageConfig)


def test_no_secret_is_in_a_config_map() -> None:
    (member,) = fleet_members("code")
    config_map = _all(member_files(member))[-1]
    assert config_map["kind"] == "ConfigMap"
    assert not [name for name in config_map["data"] if "TOKEN" in name or "SECRET" in name or "KEY" in name]


def test_one_policy_and_one_role_serve_all_members() -> None:
    """A member has only its stages and one ConfigMap, so that hundreds of them are cheap."""
    files = door_files(fleet_of())
    assert list(files) == ["access.yaml", "network.yaml", "gateway.yaml"]
    role = next(each for each in files["access.yaml"] if each["kind"] == "Role")
    assert [each["resources"] for each in role["rules"]] == [["endpointslices"], ["configmaps"]]
    stage_policy = files["network.yaml"][0]
    selected = stage_policy["spec"]["podSelector"]["matchLabels"].items()
    (member,) = fleet_members("code")
    *stages, config_map = _all(member_files(member))
    assert [each["kind"] for each in stages] == ["Service"] * 3
    for stage in stages:
        assert selected <= stage["spec"]["template"]["metadata"]["labels"].items()
    assert config_map["metadata"]["labels"]["lamina.dev/fleet"] == "models"


def test_one_broker_and_one_gateway_take_the_events_of_all_members() -> None:
    fleet = fleet_of(
        gateway={"api_keys_secret": "keys"}, eventing={"dead_letter_sink": "dead-letters", "reply_sink": "answers"}
    )
    files = door_files(fleet)
    (gateway,) = files["gateway-events.yaml"]
    name = gateway["metadata"]["name"]
    assert (validate(gateway), list(warnings(gateway))) == ([], [])
    config = read_config(environment_of(gateway) | {"K_SINK": "http://broker.example"})
    assert isinstance(config, FleetConfig)
    assert (config.keys_folder, config.page) == (None, "off"), "Eventing sends no key"
    assert config.own_url == f"http://{name}.default.svc.cluster.local"
    public = read_config(environment_of(files["gateway.yaml"][0]))
    assert isinstance(public, FleetConfig)
    assert public.own_url == "http://models.default.svc.cluster.local"
    (member,) = fleet_members("code")
    part = member_config(environment_of(gateway), member_files(member)["code.yaml"][0]["data"])
    assert part.own_url == config.own_url, "a batch keeps the gateway alive that works on it"

    kinds = [each["kind"] for each in files["eventing.yaml"]]
    assert kinds == ["Broker", *["Trigger"] * 7, "SinkBinding"], "and no Sequence"
    triggers = [each["spec"] for each in files["eventing.yaml"] if each["kind"] == "Trigger"]
    asked = {each["filter"]["attributes"]["type"] for each in triggers if each["subscriber"]["ref"]["name"] == name}
    requests = EventType.GENERATE_REQUEST, EventType.EMBED_REQUEST, EventType.SCORE_REQUEST, EventType.BATCH_REQUEST
    assert asked == set(requests)
    assert "knative-eventing" in str(files["network.yaml"])


def test_a_fleets_monitoring_covers_its_members() -> None:
    monitor, rules = door_files(fleet_of(monitoring={"labels": {"release": "prometheus"}}))["monitoring.yaml"]
    selected = monitor["spec"]["selector"]["matchLabels"].items()
    (member,) = fleet_members("code")
    for service in (fleet_gateway(fleet_of()), stage_service(member, 0)):
        assert selected <= service["spec"]["template"]["metadata"]["labels"].items()
    relabelings = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]
    assert "fleet" in {each["targetLabel"] for each in relabelings}
    expressions = [rule["expr"] for rule in rules["spec"]["groups"][0]["rules"]]
    assert all('namespace="default",fleet="models"' in each for each in expressions)


def _all(files: dict[str, list[KubernetesObject]]) -> list[KubernetesObject]:
    return [each for objects in files.values() for each in objects]
