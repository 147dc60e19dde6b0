"""Patches, applied as RFC 7396 says, make the new document of the old one."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from functions.gateway.page.pipeline_events import merge_patch

VALUES = st.recursive(
    st.integers() | st.text(max_size=2) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def applied(patch: Any, document: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(document) if isinstance(document, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = applied(value, result.get(name))
    return result


@given(DOCUMENTS, DOCUMENTS)
def test_a_patch_leads_to_the_new_document_and_is_empty_where_nothing_changed(old: Any, new: Any) -> None:
    patch = merge_patch(old, new)
    assert applied(patch, old) == new
    assert bool(patch) == (old != new)


def test_a_patch_has_only_what_changed() -> None:
    old = {"stages": {"0": {"replicas": {"1": {"routes": 1, "state": "ready"}}}}, "queue": {"waiting": 0}}
    new = {"stages": {"0": {"replicas": {"1": {"routes": 2, "state": "ready"}}}}, "queue": {"waiting": 0}}
    assert merge_patch(old, new) == {"stages": {"0": {"replicas": {"1": {"routes": 2}}}}}
