"""What one decision of the local autoscaler costs: `python -m bench.local.autoscaler`.

Prints microseconds for each second recorded and for each decision, by averaging algorithm and window, on this machine.
"""

import random
import timeit

from knative.local.autoscaler.kpa import Autoscaler, DeciderSpec

SECONDS = 20_000


def measure(algorithm: str, window_seconds: int, delay_seconds: int) -> tuple[float, float]:
    """(microseconds to record a second, microseconds to decide) over a random load; the best of five rounds."""
    spec = DeciderSpec(
        target_value=1.4,
        total_value=2,
        stable_window_seconds=window_seconds,
        panic_window_seconds=max(1, window_seconds // 10),
        scale_down_delay_seconds=delay_seconds,
    )
    loads = [random.Random(second).uniform(0, 40) for second in range(SECONDS)]
    rounds = [_round(Autoscaler(spec, algorithm, ready=1, now=0.0), loads) for _ in range(5)]
    return min(record for record, _ in rounds), min(decide for _, decide in rounds)


def _round(autoscaler: Autoscaler, loads: list[float]) -> tuple[float, float]:
    record = decide = 0.0
    for now, load in enumerate(loads):
        started = timeit.default_timer()
        autoscaler.record(now, load)
        recorded = timeit.default_timer()
        autoscaler.decide(now, 5)
        decide += timeit.default_timer() - recorded
        record += recorded - started
    return record / SECONDS * 1e6, decide / SECONDS * 1e6


def main() -> None:
    print(f"{'average':<22}{'window':>8}{'delay':>8}{'record':>12}{'decide':>12}")
    for algorithm in ("linear", "weighted-exponential"):
        for window, delay in ((10, 30), (60, 0), (3600, 0)):
            record, decide = measure(algorithm, window, delay)
            print(f"{algorithm:<22}{window:>6} s{delay:>6} s{record:>9.1f} µs{decide:>9.1f} µs")


if __name__ == "__main__":
    main()
