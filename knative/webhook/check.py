"""Tells whether a cluster would accept a Knative Service: rules of API server, Knative's webhook and Kubernetes, in this order.

Nothing here talks to a cluster. The rules are those of Knative Serving, by default with its default feature flags. Tests
compare them with a real cluster's verdicts over recorded manifests. `knative.webhook.warnings` finds mistakes that a cluster
accepts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from knative.webhook.annotations import service_annotations, template_annotations
from knative.webhook.autoscaling_annotations import AutoscalerConfig
from knative.webhook.dry_run import pod
from knative.webhook.feature_flags import FeatureFlags
from knative.webhook.podspec import revision_spec
from knative.webhook.schema import as_decoded, unknown_fields, wrong_types
from knative.webhook.values import is_dns_1035_label, is_label_value, is_qualified_name
from knative.webhook.violation import Violation, Violations, disallowed, in_one_line, invalid, missing, out_of_bounds
from knative.webhook.warnings import warnings

__all__ = ["API_VERSION", "Violation", "in_one_line", "is_knative_service", "missing_flags", "validate", "warnings"]

API_VERSION: Final = "serving.knative.dev/v1"
_TEMPLATE: Final = "spec.template"
_DEFAULTS: Final = AutoscalerConfig()
_DEFAULT_FEATURES: Final = FeatureFlags()


def is_knative_service(document: object) -> bool:
    """Whether a parsed manifest is a Service of Knative, in any version. Kubernetes has a kind of the same name."""
    if not isinstance(document, Mapping):
        return False
    return document.get("kind") == "Service" and str(document.get("apiVersion", "")).startswith("serving.knative.dev/")


def validate(
    service: dict[str, Any], config: AutoscalerConfig = _DEFAULTS, features: FeatureFlags = _DEFAULT_FEATURES
) -> list[Violation]:
    """Why a cluster would refuse the Service; empty if it would accept it.

    As on a cluster, a group of rules is checked only if all groups before it are kept: unknown fields, types, Knative's
    webhook, the pod. config, features: the cluster's settings.
    """
    decoded = as_decoded(service)
    rules: tuple[Callable[[], Violations], ...] = (
        lambda: _kind(service),
        lambda: unknown_fields(service),
        lambda: wrong_types(decoded),
        lambda: _webhook(decoded, config, features),
        lambda: (
            Violation(each.field, f"dry run of the pod failed: {each.reason}")
            for each in pod(decoded["spec"]["template"]["spec"], "spec")
        ),
    )
    for rule in rules:
        if found := list(dict.fromkeys(rule())):
            return found
    return []


def missing_flags(service: dict[str, Any], features: FeatureFlags = _DEFAULT_FEATURES) -> dict[str, str]:
    """The flags of config-features that the Service needs and that are off, each with a field that needs it."""
    return {each.flag: each.field for each in reversed(validate(service, features=features)) if each.flag is not None}


def _kind(service: dict[str, Any]) -> Violations:
    if service.get("kind") != "Service":
        yield Violation("kind", f"a Service is wanted, not {service.get('kind')!r}")
    if service.get("apiVersion") != API_VERSION:
        yield Violation("apiVersion", f"{API_VERSION} is wanted, not {service.get('apiVersion')!r}")


def _webhook(service: dict[str, Any], config: AutoscalerConfig, features: FeatureFlags) -> Violations:
    metadata, spec = service.get("metadata", {}), service.get("spec", {})
    template = spec.get("template", {})
    yield from _metadata(metadata)
    yield from service_annotations(metadata.get("annotations", {}), "metadata.annotations")
    yield from revision_spec(template.get("spec", {}), f"{_TEMPLATE}.spec", features)
    annotations = template.get("metadata", {}).get("annotations", {})
    yield from template_annotations(annotations, config, f"{_TEMPLATE}.metadata.annotations")
    yield from _revision_name(template.get("metadata", {}), metadata)
    yield from _traffic(spec.get("traffic", []), "spec.traffic")


def _metadata(metadata: dict[str, Any]) -> Violations:
    name, prefix = metadata.get("name", ""), metadata.get("generateName", "")
    if prefix and not is_dns_1035_label(prefix, is_prefix=True):
        yield Violation("metadata.generateName", f'not a DNS 1035 label prefix: "{prefix}"')
    if name and not is_dns_1035_label(name):
        yield Violation("metadata.name", f'not a DNS 1035 label: "{name}"')
    if not name and not prefix:
        yield Violation("metadata.name", "name or generateName is required")
    for field in ("annotations", "labels"):
        for key, value in metadata.get(field, {}).items():
            if not is_qualified_name(key):
                yield Violation(f"metadata.{field}", f'invalid key name "{key}"')
            elif field == "labels" and not is_label_value(value):
                yield invalid(f"metadata.labels.{key}", value, "not a label value")


def _revision_name(template: dict[str, Any], service: dict[str, Any]) -> Violations:
    """Checks the name that a template gives its revision; it must begin with the Service's name."""
    at, name, prefix = f"{_TEMPLATE}.metadata", template.get("name", ""), template.get("generateName", "")
    if prefix and not is_dns_1035_label(prefix, is_prefix=True):
        yield invalid(f"{at}.generateName", prefix, "not a DNS 1035 label prefix")
    if not name:
        return
    if not is_dns_1035_label(name):
        yield invalid(f"{at}.name", name, "not a DNS 1035 label")
    elif not service.get("name"):
        yield missing("metadata.name")
    elif not name.startswith(f"{service['name']}-"):
        yield invalid(f"{at}.name", f'"{name}" must have prefix "{service["name"]}-"')


def _traffic(targets: Sequence[dict[str, Any]], at: str) -> Violations:
    """Checks the traffic split (pkg/apis/serving/v1/route_validation.go). Without targets the latest revision gets all."""
    tags: dict[str, int] = {}
    for index, target in enumerate(targets):
        field, tag, percent = f"{at}[{index}]", target.get("tag", ""), target.get("percent", 0)
        revision = target.get("revisionName", "")
        latest = target.get("latestRevision", not revision)
        if latest == bool(revision):
            word = str(latest).lower()
            yield Violation(f"{field}.latestRevision", f'may not set revisionName "{revision}" when latestRevision is {word}')
        if target.get("configurationName"):
            yield disallowed(f"{field}.configurationName")
        elif revision and not is_qualified_name(revision):
            yield Violation(f"{field}.revisionName", f'invalid key name "{revision}"')
        if not 0 <= percent <= 100:
            yield out_of_bounds(f"{field}.percent", percent, 0, 100)
        if target.get("url"):
            yield disallowed(f"{field}.url")
        if tag and not is_dns_1035_label(tag):
            yield invalid(f"{field}.tag", tag, "not a DNS 1035 label")
        if tag and tag in tags:
            for other in (tags[tag], index):
                yield Violation(f"{at}[{other}].tag", f'Multiple definitions for "{tag}"')
        tags.setdefault(tag, index)
    total = sum(target.get("percent", 0) for target in targets)
    if targets and total != 100:
        yield Violation(at, f"Traffic targets sum to {total}, want 100")
