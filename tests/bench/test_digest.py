"""The benchmark of digests: what it says from given loads, and that each contender checks all that is loaded, as it claims."""

import pytest

from bench.digest.contenders import CONTENDERS, checking_by
from bench.digest.report import Load, cost, in_turn, table
from storage.errors import ChecksumMismatch
from storage.loading.weight_loader import load_layers
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from tests.support.storage.published import Published

LOADS = {
    "unchecked": [Load(1.0, 0.5), Load(4.0, 0.5), Load(1.0, 0.5)],
    "xxh3 only": [Load(1.0, 0.5), Load(4.0, 0.5), Load(1.0, 0.5)],
    "BLAKE3, as stages do": [Load(1.1, 0.6), Load(4.4, 0.6), Load(9.0, 0.6)],
}


def test_the_cost_is_the_median_of_the_rounds_ratios() -> None:
    assert cost(LOADS) == pytest.approx(0.1)
    assert "| BLAKE3, as stages do | 1.100 | 4.400 | 0.600 | 0.600 | +10.0% | +10.0% |" in table(LOADS)


def test_everybody_is_everywhere_in_the_order() -> None:
    names = ["a", "b", "c"]
    orders = [in_turn(names, number) for number in range(6)]
    assert all(sorted(order) == names for order in orders)
    assert [{order[place] for order in orders} for place in range(3)] == [set(names)] * 3


@pytest.mark.parametrize("name", CONTENDERS)
def test_who_says_blake3_checks_and_the_others_do_not(name: str, published: Published) -> None:
    manifest = published.manifest
    layer = manifest.objects["layer-00000"]
    store = ObjectStore(published.store)
    whole = store.get(layer.key)
    try:
        store.put(layer.key, whole[:-1] + bytes([whole[-1] ^ 1]))
        with ObjectReader(published.store) as reader, checking_by(CONTENDERS[name]):
            if name.startswith("BLAKE3"):
                with pytest.raises(ChecksumMismatch):
                    load_layers(reader, manifest, 0, 1)
            else:
                load_layers(reader, manifest, 0, 1)
    finally:
        store.put(layer.key, whole)
