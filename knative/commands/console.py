"""Output for people: rich tables and progress bars on a terminal, plain lines elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from storage.models.publisher import ProgressCallback, PublishProgress, QuantizedCallback, QuantizedSource

_PLAIN_STEPS = 4


def show_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table. The first column has names, the others numbers.

    Without a terminal it has one plain line for the columns and for each row, and no title.
    """
    if console.is_terminal:
        console.print(rich_table(title, columns, rows))
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for name, *numbers in (columns, *rows):
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        console.out("  ".join(cells).rstrip(), highlight=False)


def rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def publish_progress(console: Console, what: str) -> Iterator[ProgressCallback]:
    """Shows the progress of a publication: a bar on a terminal, elsewhere a line per quarter.

    Yields the callback that `publish` calls. what: the text in front.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=None)
            yield lambda seen: progress.update(task, completed=seen.done_bytes, total=seen.total_bytes)
        return
    shown = 0

    def show(seen: PublishProgress) -> None:
        nonlocal shown
        step = seen.done_bytes * _PLAIN_STEPS // max(1, seen.total_bytes)
        if step > shown:
            shown = step
            console.out(f"{what}: {100 * step // _PLAIN_STEPS} % of {size(seen.total_bytes)}", highlight=False)

    yield show


def show_quantized(console: Console, dtype: str) -> QuantizedCallback:
    """Returns the callback for `publish` that says what was made of a quantized checkpoint, and what that loses."""

    def show(source: QuantizedSource) -> None:
        lost = "nothing is lost"
        if source.largest_error:
            lost = f"the largest rounding error is {source.largest_error:.2g}, of weights up to {source.largest_weight:.2g}"
        console.out(f"quantized with {source.method} in {size(source.source_bytes)}; as {dtype} {lost}", highlight=False)

    return show


def size(count: float) -> str:
    """A number of bytes as text, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
