"""Which pipeline a person means: by its name, or by the file of its spec."""

from pathlib import Path

from knative.spec.spec_file import load_spec


def named_pipeline(text: str, namespace: str | None) -> tuple[str, str | None]:
    """Name and namespace; the namespace given goes before the spec's. Raises SpecError."""
    if not text.endswith((".yaml", ".yml")):
        return text, namespace
    spec = load_spec(Path(text))
    return spec.name, namespace or spec.namespace
