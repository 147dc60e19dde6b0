"""Which exceptions are answers to the person at the terminal: their message says what was seen and what to do."""

from eventing.problems import Problem
from knative.cluster.errors import ClusterError
from knative.commands.terminal.asking import AskFailed
from knative.commands.terminal.start_watch import PodsFailed
from knative.local.autoscaler.revision_settings import SettingsError
from knative.local.errors import LocalError
from knative.render.rendering import RenderFailed
from knative.spec.errors import SpecError, TooManyStages, UnknownShape
from storage.errors import StorageError

_EXPECTED = (
    AskFailed,
    ClusterError,
    LocalError,
    PodsFailed,
    Problem,
    RenderFailed,
    SettingsError,
    SpecError,
    StorageError,
    TooManyStages,
    UnknownShape,
)


def one_line(error: Exception) -> str | None:
    """The message to print; None for what is a fault of Lamina's own and wants its traceback."""
    if isinstance(error, _EXPECTED):
        return str(error)
    if isinstance(error, OSError) and error.strerror:  # a full disk, a missing right: about the machine, not about Lamina
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return None
