"""Small Knative Services for tests."""

from typing import Any


def service(
    spec: dict[str, Any] | None = None,
    container: dict[str, Any] | None = None,
    *,
    annotations: dict[Any, Any] | None = None,
    name: str = "v",
    **metadata: Any,
) -> dict[str, Any]:
    """A minimal Service that Knative accepts, with additions to its revision's spec and its one container."""
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, **metadata},
        "spec": {
            "template": {
                "metadata": {"annotations": annotations or {}},
                "spec": {"containers": [{"image": "registry.example/app:v1", **(container or {})}], **(spec or {})},
            }
        },
    }
