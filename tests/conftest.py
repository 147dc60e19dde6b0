"""Settings for the whole suite, and fixtures that many tests use.

A fixture imports its libraries itself: most tests need neither torch nor a store.
"""

import asyncio
import inspect
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.support.functions.functions import FunctionProcess
    from tests.support.storage.published import Published
    from tests.support.storage.storage import FaultProxy

# Tests run torch in this process and in stage processes: with one thread each they do not spin against one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("sample", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("wide", settings.get_profile("sample"), max_examples=300)


def pytest_addoption(parser: pytest.Parser) -> None:
    left_out = "leave out tests that are marked slow, and files that need torch or a package that is not installed"
    parser.addoption("--fast", action="store_true", help=left_out)
    parser.addoption("--wide", action="store_true", help="run all of what make test runs a sample of (make test-wide)")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("wide" if config.getoption("--wide") else "sample")
    if config.getoption("--fast"):
        from tests.support.house.without import HEAVY, refusal

        exec(refusal(HEAVY))  # a test that imports torch only when it runs fails here as it would without torch


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """None: other rules decide."""
    if not config.getoption("--fast"):
        return None
    if collection_path in (TESTS / "pipeline", TESTS / "clients"):
        return True  # real processes from end to end
    if collection_path.suffix != ".py":
        return None
    from tests.support.house.imports import files_reached, imports
    from tests.support.house.without import HEAVY

    reached = files_reached(collection_path, in_functions=False)
    names = {name for path in reached for name in imports(path, in_functions=False, for_types=False)}
    packages = {name.split(".")[0] for name in names}
    return any(package in HEAVY or find_spec(package) is None for package in packages) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest files first: at the end no worker waits for another one's long file.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.parent != TESTS / "pipeline", item.path not in slow))
    left_out: set[pytest.Item] = set()
    if config.getoption("--fast"):
        left_out = {item for item in items if item.get_closest_marker("slow")}
    if not config.getoption("--wide"):
        left_out |= {item for item in items if item.get_closest_marker("wide")}
        cases_of = defaultdict[Any, list[pytest.Item]](list)
        for item in items:
            if item.get_closest_marker("sampled"):
                cases_of[getattr(item, "function", item)].append(item)
        left_out.update(*map(beyond_the_sample, cases_of.values()))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def beyond_the_sample(cases: list[pytest.Item]) -> set[pytest.Item]:
    """Cases of one test that its sample leaves out: in it each value of each parameter occurs, or it is every nth case."""
    marker = cases[0].get_closest_marker("sampled")
    if marker is not None and "every" in marker.kwargs:
        return {*cases} - {*cases[:: marker.kwargs["every"]]}
    values = {
        case: [(name, repr(value)) for name, value in case.callspec.params.items()]
        for case in cases
        if isinstance(case, pytest.Function)
    }
    occurs: Counter[tuple[str, str]] = Counter()
    wanted = {value for case in values.values() for value in case}
    while missing := wanted - occurs.keys():
        # The case with most new values; of those, the one whose others were used least.
        best = max(
            values, key=lambda case: (len(missing.intersection(values[case])), -sum(occurs[each] for each in values[case]))
        )
        occurs.update(values.pop(best))
    return set(values)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that is an `async def` in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    failed = [report.nodeid for kind in ("failed", "error") for report in terminalreporter.getreports(kind)]
    if failed:
        terminalreporter.section("to repeat one of them")
        for nodeid in dict.fromkeys(failed):
            terminalreporter.write_line(f".venv/bin/python -m pytest {shlex.quote(nodeid)}")


@pytest.fixture(scope="session")
def wide(request: pytest.FixtureRequest) -> bool:
    """Whether to run at full length (make test-wide)."""
    return bool(request.config.getoption("--wide"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Published]":
    """The tiny chat model in a store that runs."""
    from tests.support.storage.published import published_model

    with published_model(tmp_path_factory.mktemp("published")) as model:
        yield model


@pytest.fixture(scope="module")
def stages(published: "Published") -> "Iterator[list[FunctionProcess]]":
    """The three stage processes of `published`."""
    from tests.support.functions.functions import running_stages

    with running_stages(published) as stages:
        yield stages


@pytest.fixture(scope="module")
def gateway(published: "Published", stages: "list[FunctionProcess]") -> "Iterator[FunctionProcess]":
    """A gateway process before `stages`."""
    from tests.support.functions.functions import running_gateway

    with running_gateway(published, stages) as gateway:
        yield gateway


@pytest.fixture
def proxy(published: "Published") -> "Iterator[FaultProxy]":
    """In front of the store of `published`."""
    from tests.support.storage.storage import fault_proxy

    with fault_proxy(published.store) as proxy:
        yield proxy
