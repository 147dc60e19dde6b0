"""Conversations from one instance to another over HTTP: idle ones by content, moving ones to their very last token."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from eventing.http.pod_network import PodNetwork
from eventing.problems import MalformedEvent
from eventing.wire.control import ReserveRow
from eventing.wire.faults import find_fault
from eventing.wire.kv_query import KVQuery
from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.configuration.pass_times import PassTimes
from functions.stage.kv import peer_tier
from functions.stage.kv.peer_tier import PeerClient
from functions.stage.models.build import build_layer_group
from functions.stage.models.kv_bytes import stamp
from functions.stage.models.layer_group import LayerGroup
from tests.support.functions.kv_stages import DTYPES, LAYERS, LOOPBACK, KVStage, chain_of, drawn_without_tiers, kv_stage, text
from tests.support.functions.native_models import native_groups
from tests.support.functions.stage_server import FINGERPRINT, TOKEN, StageServer
from tests.support.storage import tiny_models


@contextmanager
def peer(dtype: str = "float32") -> Iterator[StageServer]:
    """An instance that others can ask."""
    server = StageServer(0, (LAYERS,), lambda: native_groups("llama", dtype, (LAYERS,))[0])
    try:
        yield server
    finally:
        server.kill()


def conversation(server: StageServer, length: int = 180, *, ended: bool, id_: str = "moving") -> list[int]:
    """All its tokens: `server` holds all but the last."""
    there = KVStage(server.engine, None, None, None)  # type: ignore[arg-type]
    tokens = text(length)
    tokens += there.converse(id_, tokens, 9)[1]
    if ended:
        there.end(id_, tokens)
    return tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_migrated_sequence_computes_nothing_again(dtype: str) -> None:
    with peer(dtype) as server, kv_stage(dtype) as stage:
        tokens = conversation(server, ended=False)
        held, drawn = stage.converse("moving", tokens, 6, peers=(server.url,))
        assert held == len(tokens) - 1
    assert drawn == drawn_without_tiers(dtype, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_idle_conversation_is_found_by_its_content(dtype: str) -> None:
    with peer(dtype) as server, kv_stage(dtype) as stage:
        tokens = conversation(server, ended=True)
        follow_up = [*tokens, *text(30, 7)]
        held, drawn = stage.converse("another", follow_up, 6, peers=(server.url,))
        assert held == (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert stage.restores.tokens == {"peer": held}
    assert drawn == drawn_without_tiers(dtype, follow_up)


def test_emulated_keys_and_values_take_as_long_as_on_their_link() -> None:
    token_bytes = 6 * 2 * 2 * 8 * 2  # layers, keys and values, heads, numbers of a head, bytes of bfloat16

    def sleeping() -> LayerGroup:
        config = tiny_models.tiny_config("llama")
        return build_layer_group(
            "sleep", config, {}, *LAYERS, "bfloat16", "cpu", 2**20, PassTimes(), sleep_bytes_per_second=500 * token_bytes
        )

    server = StageServer(0, (LAYERS,), sleeping)
    try:
        with kv_stage(group=sleeping()) as stage:
            tokens = conversation(server, ended=False)
            began = time.monotonic()
            assert stage.reserve("moving", tokens, peers=(server.url,)).held == len(tokens) - 1
            assert time.monotonic() - began >= (len(tokens) - 1) / 500
    finally:
        server.kill()


def test_a_sequence_with_penalties_computes_tokens_after_its_last_block() -> None:
    with peer() as server, kv_stage() as stage:
        tokens = conversation(server, ended=False)
        blocks = (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        known = b"".join(token.to_bytes(4, "little") for token in tokens[:blocks])
        assert stage.reserve("moving", tokens, peers=(server.url,), token_ids=known).held == blocks


def test_peers_are_asked_until_one_holds_the_conversation() -> None:
    with peer() as without_it, peer() as server, kv_stage() as stage:
        tokens = conversation(server, ended=True)
        assert stage.reserve("a", tokens, peers=(without_it.url, server.url)).held == (len(tokens) - 1) // 16 * 16
        assert stage.restores.failed == []


@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_after_a_peer_dies_the_rest_is_computed(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with peer() as server, kv_stage() as stage:
        tokens = conversation(server, ended=True)
        asked: list[int] = []
        hand_over = peer_tier.hand_over

        def dies(*arguments: Any) -> Any:
            asked.append(1)
            if len(asked) > 1:
                server.kill()
                time.sleep(0.1)
            return hand_over(*arguments)

        monkeypatch.setattr(peer_tier, "hand_over", dies)
        if when == "before":
            server.kill()
        held, drawn = stage.converse("second", tokens, 6, peers=(server.url,))
        assert held < (len(tokens) - 1) // 16 * 16
        assert stage.restores.failed == ["peer"]
    assert drawn == drawn_without_tiers("float32", tokens)


@pytest.mark.parametrize("spoiling", ["altered", "truncated", "of another place", "slow", "none"])
def test_wrong_data_of_a_peer_is_computed_instead(spoiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    hand_over = peer_tier.hand_over

    def spoilt(query: KVQuery, holder: Any) -> Any:
        found = hand_over(query, holder)
        if found is None or spoiling == "none":
            return found
        data, held = found
        if spoiling == "altered":
            data[-1] ^= 1
        elif spoiling == "truncated":
            data = data[:-1]
        elif spoiling == "of another place":
            data[56] ^= 16
            stamp(data)
        else:
            released.wait(120)
        return data, held

    with peer() as server, kv_stage() as stage:
        stage.estimate._rate.computed(100, 0.1)
        tokens = conversation(server, ended=True)
        monkeypatch.setattr(peer_tier, "hand_over", spoilt)
        began = time.monotonic()
        held, drawn = stage.converse("second", tokens, 6, peers=(server.url,))
        assert time.monotonic() - began < 60
        released.set()
        assert (held > 0, stage.restores.failed) == ((True, []) if spoiling == "none" else (False, ["peer"]))
    assert drawn == drawn_without_tiers("float32", tokens)


def test_a_peer_that_is_away_delays_many_sequences_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with peer() as server, kv_stage() as stage:
        stage.estimate._rate.computed(100, 0.1)
        tokens = conversation(server, ended=True)
        released = threading.Event()
        monkeypatch.setattr(peer_tier, "hand_over", lambda *_: released.wait(120))
        for number in range(8):
            assert stage.reserve(str(number), tokens, 1, peers=(server.url,)).held == 0
        assert stage.restores.failed == ["peer"]
        released.set()


def test_only_pods_get_the_token() -> None:
    with kv_stage() as stage:
        tokens = text(100)
        for elsewhere in (
            "http://192.0.2.1:80",
            "https://127.0.0.1:1",
            "http://localhost:1",
            "nonsense",
            "http://127.0.0.1@192.0.2.1:1",
        ):
            assert stage.reserve("a", tokens, peers=(elsewhere,)).held == 0
        assert stage.restores.tokens == {}


def test_with_tls_the_token_goes_to_no_pod_by_http() -> None:
    tls_only = PeerClient(PodNetwork(LOOPBACK.networks, 0, secure=True), FINGERPRINT, 0, TOKEN)
    assert not tls_only.admits("http://127.0.0.1:8012")
    assert tls_only.admits("https://127.0.0.1:8112")


def test_the_kv_endpoint_serves_only_its_own_pipeline() -> None:
    def status(target: str, token: str = TOKEN) -> int:
        request = urllib.request.Request(server.url + target, headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    with peer() as server:
        tokens = conversation(server, ended=True)
        digest, lineage = chain_of(tokens)[0].hex(), server.engine.lineage("")
        assert lineage is not None
        assert status(KVQuery(FINGERPRINT, 0, 0, 16, lineage, digest).target) == 200
        assert status(KVQuery(FINGERPRINT, 0, 0, 16, lineage, digest).target, "another") == 401
        assert status(KVQuery("f" * 32, 0, 0, 16, lineage, digest).target) == 421
        assert status(KVQuery(FINGERPRINT, 2, 0, 16, lineage, digest).target) == 421
        assert status(KVQuery(FINGERPRINT, 0, 0, 16, lineage, "0" * 32).target) == 204
        assert status(KVQuery(FINGERPRINT, 0, 0, 16, "0" * 16, digest).target) == 204
        assert status(KVQuery(FINGERPRINT, 0, 0, 16, lineage, chain_of(tokens, "another client")[0].hex()).target) == 204
        assert status("/kv?first=0") == 400
        assert status("/kv") == 400


@pytest.mark.parametrize(
    "query",
    [
        "pipeline=a&layer=0&first=0&end=2000&lineage=" + "0" * 16,
        "pipeline=a&layer=0&first=16&end=16&lineage=" + "0" * 16,
        "pipeline=a&layer=0&first=0&end=15&lineage=0000000000000000&digest=" + "0" * 32,
        "pipeline=a&layer=0&first=0&end=16&lineage=0000000000000000&digest=xyz",
        "pipeline=a&layer=0&first=0&end=16&lineage=xyz",
        "pipeline=a&layer=0&first=0&end=16",
        "pipeline=a&layer=-1&first=0&end=16&lineage=" + "0" * 16,
        "pipeline=a&layer=0&first=0&end=16&more=1&lineage=" + "0" * 16,
        "&".join(f"a{number}=1" for number in range(100)),
    ],
)
def test_a_malformed_query_is_refused(query: str) -> None:
    with pytest.raises(MalformedEvent, match="/kv"):
        KVQuery.read(query)


def test_a_query_survives_a_round_trip() -> None:
    query = KVQuery(FINGERPRINT, 10, 16, 32, "0b" * 8, "0a" * 16, "id &=%", 3, "/gateways/a b")
    assert KVQuery.read(query.target.partition("?")[2]) == query


def test_a_reservation_with_too_many_peers_is_refused() -> None:
    row = {"id": "a", "attempt": 0, "reserve_tokens": 1, "peers": ["http://10.0.0.1:8012"] * 5}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(row, ReserveRow)
    assert find_fault(row, ReserveRow).path == "peers"


def test_a_chain_longer_than_its_reservation_is_refused() -> None:
    with pytest.raises(ValueError, match="a chain of 3 blocks does not fit into 47 reserved tokens"):
        ReserveRow("a", 0, 47, bytes(48))
