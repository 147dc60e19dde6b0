"""Metrics of the functions that run here, read at ports of their own: watching must not keep a pod alive."""

import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final

_SAMPLE: Final = re.compile(r"^(\w+)(?:\{[^}]*\})? ([-+.\deE]+)$", re.MULTILINE)
_TOKENS: Final = ("lamina_stage_tokens_total", "lamina_gateway_tokens_total")
_WAITING: Final = "lamina_gateway_waiting_sequences"


def read_metrics(pod: Mapping[str, Any]) -> defaultdict[str, float]:
    """Name → value, summed over labels; empty where the pod does not answer. `pod` as the platform's status has it."""
    samples: defaultdict[str, float] = defaultdict(float)
    if pod["metrics_port"] is None:
        return samples
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{pod['metrics_port']}/metrics", timeout=2) as reply:
            text = reply.read().decode()
    except OSError:
        return samples
    for name, value in _SAMPLE.findall(text):
        samples[name] += float(value)
    return samples


class RevisionRates:
    """What the pods of a revision did between one status and the next."""

    def __init__(self) -> None:
        self._tokens: dict[str, tuple[float, float]] = {}

    def tokens_per_second(self, revision: Mapping[str, Any], now: float) -> tuple[float | None, int]:
        """(tokens through the revision's pods, None when seen for the first time; requests that wait in its gateway)."""
        rates, waiting = [], 0
        for pod, samples in _samples(revision):
            tokens = sum(samples[name] for name in _TOKENS)
            waiting += int(samples[_WAITING])
            before = self._tokens.get(pod)
            if before is not None and now > before[1]:
                rates.append(max(0.0, tokens - before[0]) / (now - before[1]))
            self._tokens[pod] = (tokens, now)
        return (sum(rates) if rates else None), waiting


def _samples(revision: Mapping[str, Any]) -> Iterator[tuple[str, defaultdict[str, float]]]:
    for pod in revision["pods"]:
        if samples := read_metrics(pod):
            yield pod["name"], samples
