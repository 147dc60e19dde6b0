"""What a spec gives to the pods of each stage, and to the gateway's, beside what they need."""

from collections.abc import Iterator, Sequence

from rich.console import Console

from knative.commands.terminal.console import show_table, size
from knative.spec.pipeline_spec import Autoscaling, GatewaySpec, PodSpec, Resources, StageSpec, quantity
from knative.spec.sizing import StagePlan, needed_bytes

_COLUMNS = ("pods of", "cpu", "memory", "needs", "kv_cache", "tokens", "gpu", "device", "scale", "target", "besides")


def show_pods(console: Console, plans: Sequence[StagePlan], stages: Sequence[StageSpec], gateway: GatewaySpec) -> None:
    rows = [_stage_row(plan, stage) for plan, stage in zip(plans, stages, strict=True)]
    of_gateway = ("", "", "", "", "cpu", *_scale(gateway.autoscaling), " ".join(_besides(gateway.pod)))
    rows.append(("gateway", *_resources(gateway.resources), *of_gateway))
    show_table(console, "what the spec gives", _COLUMNS, rows)


def _stage_row(plan: StagePlan, stage: StageSpec) -> tuple[str, ...]:
    needs = "" if stage.resources.gpu else size(int(needed_bytes(stage, plan.weight_bytes)))
    tokens = int(quantity(stage.kv_cache)) // plan.kv_bytes_per_token
    gpu = str(stage.resources.gpu or "")
    own_way = [stage.dtype or "", stage.layer_group if stage.layer_group != "auto" else ""]
    besides = [*filter(None, own_way), *_besides(stage.pod)]
    own = (needs, stage.kv_cache, str(tokens), gpu, stage.device, *_scale(stage.autoscaling), " ".join(besides))
    return (f"stage {plan.index}", *_resources(stage.resources), *own)


def _resources(resources: Resources) -> tuple[str, str]:
    return resources.cpu, resources.memory


def _scale(scaling: Autoscaling) -> tuple[str, str]:
    hpa = scaling.autoscaler_class == "hpa"
    target = scaling.target or (70 if hpa else scaling.default_target)
    return f"{scaling.min_scale}-{scaling.max_scale}", f"{target:g} % CPU" if hpa else f"{target:g}"


def _besides(pod: PodSpec) -> Iterator[str]:
    """Where they may run, and as what."""
    yield from (f"{name}={value}" for name, value in pod.node_selector.items())
    yield from (str(value) for value in (pod.runtime_class, pod.priority_class) if value)
