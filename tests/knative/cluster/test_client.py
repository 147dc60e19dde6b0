"""The client of the Kubernetes API: kubeconfigs, servers that are none, logs."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from knative.cluster.client import Cluster
from knative.cluster.errors import ClusterUnreachable
from tests.support.knative.site import Site
from tests.support.storage.storage import answering_every_get_with


def test_an_unreachable_cluster_is_one_clear_message(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterUnreachable, match="--kubeconfig"):
        Cluster.connect(str(tmp_path / "absent"))
    kubeconfig = tmp_path / "kubeconfig"
    with pytest.raises(ClusterUnreachable, match="nowhere"):
        Cluster.connect(str(kubeconfig), "nowhere")
    site.api.close()
    with pytest.raises(ClusterUnreachable, match="does not answer"):
        Cluster.connect(str(kubeconfig))


@pytest.mark.parametrize("text", [": : :\n- [", "hello", "", "apiVersion: v1\nkind: Config\n", "\udcff"])
def test_a_file_that_is_not_a_kubeconfig_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    path = tmp_path / "broken"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ClusterUnreachable, match="broken"):
        Cluster.connect(str(path))


def test_a_server_that_is_not_a_kubernetes_api_is_named(site: Site, tmp_path: Path) -> None:
    with answering_every_get_with(b"<html>hello</html>") as url:
        kubeconfig = tmp_path / "kubeconfig"
        own = urlsplit(yaml.safe_load(site.api.kubeconfig())["clusters"][0]["cluster"]["server"]).netloc
        kubeconfig.write_text(site.api.kubeconfig().replace(own, urlsplit(url).netloc))
        with pytest.raises(ClusterUnreachable, match="answers, but not as a Kubernetes API does"):
            Cluster.connect(str(kubeconfig))


def test_logs_are_read_and_followed(serving: Site) -> None:
    serving.api.logs["chat-00001-pod"] = "one\ntwo\n"
    assert serving.cluster.log_tail("default", "chat-00001-pod", "user-container", 10) == ["one", "two"]
    assert list(serving.cluster.follow_log("default", "chat-00001-pod", "user-container", 10)) == ["one", "two"]
    assert serving.cluster.log_tail("default", "unknown", "user-container", 10) == []
