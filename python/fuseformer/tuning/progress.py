"""What a command says while it works, on standard error."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")

#: Seconds before a bar shows: what is done sooner needs none.
PATIENCE = 1.0


def progress(total: int | None, title: str, unit: str, **options: Any) -> Any:
    """Return tqdm's bar of `total` units; it shows after `PATIENCE` seconds.

    In a log file, which keeps every line, it is drawn seldom.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,
        **{"delay": PATIENCE, **options},
    )


def followed(items: Sequence[Item] | Iterable[Item], title: str, unit: str) -> Iterator[Item]:
    """Yield `items` while a bar counts them."""
    total = len(items) if isinstance(items, Sequence) else None
    with progress(total, title, unit) as bar:
        for item in items:
            yield item
            bar.update()


def say(text: str) -> None:
    """Write a line to standard error."""
    print(text, file=sys.stderr, flush=True)
