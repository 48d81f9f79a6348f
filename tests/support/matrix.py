"""Which combinations of options, shapes and dtypes a test runs.

A run of the suite takes a few cases in which every two values of two dimensions meet at least once:
most bugs need no more than two things to come together. With FUSEFORMER_SANITIZE=full
(`make sanitize`) it takes all combinations.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
#: A value: the name of its dimension, and its place there. Values need not be hashable.
_Value = tuple[str, int]

_MODE = os.environ.get("FUSEFORMER_SANITIZE", "subset")
if _MODE not in ("subset", "full"):
    raise ValueError(f"FUSEFORMER_SANITIZE is {_MODE!r}: want 'full', or 'subset' as without it")
FULL = _MODE == "full"


def cases(
    dimensions: Mapping[str, Sequence[Any]],
    *,
    options: Sequence[str] = (),
    allowed: Callable[[Case], bool] = lambda case: True,
    full: bool = FULL,
) -> list[Case]:
    """Return cases, each with one value of every dimension, always the same and in one order.

    A `full` list has every combination, but of the dimensions named in `options`, whose first value
    stands for "off", no more than two are on at once, or all of them. Otherwise every pair of
    values that an `allowed` case may hold occurs in at least one, whatever the options.
    """
    for name, values in dimensions.items():
        if not values:
            raise ValueError(f"dimension {name!r} has no values")
    for name in options:
        if name not in dimensions:
            raise ValueError(f"option {name!r} is none of the dimensions {list(dimensions)}")
    picked = _combinations(dimensions, options) if full else _covering(dimensions, allowed)
    return [case for case in picked if allowed(case)]


def case_name(case: Case) -> str:
    """Return a name for a case, for pytest's `ids`: its values, dtypes and "off" ones short."""
    words = []
    for name, value in case.items():
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words.append(f"{name}={str(value).removeprefix('torch.')}".replace(" ", ""))
    return "-".join(words)


def _combinations(
    dimensions: Mapping[str, Sequence[Any]], options: Sequence[str]
) -> Iterator[Case]:
    for values in product(*dimensions.values()):
        case = dict(zip(dimensions, values, strict=True))
        on = sum(case[name] is not dimensions[name][0] for name in options)
        if on <= 2 or on == len(options):
            yield case


def _covering(
    dimensions: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool]
) -> Iterator[Case]:
    """Yield a case for the first pair that none has had yet, with as many other new ones as fit."""
    places = {name: [(name, i) for i in range(len(v))] for name, v in dimensions.items()}
    if len(places) == 1:
        yield from ({name: value} for name, values in dimensions.items() for value in values)
    uncovered = {
        pair: None for a, b in combinations(places, 2) for pair in product(places[a], places[b])
    }
    while uncovered:
        pair = next(iter(uncovered))
        found = _complete(dict(pair), places, dimensions, uncovered, allowed)
        if found is None:  # no allowed case holds this pair
            del uncovered[pair]
            continue
        for both in combinations([(name, found[name]) for name in places], 2):
            uncovered.pop(both, None)
        yield _case(found, dimensions)


def _complete(
    chosen: dict[str, int],
    places: Mapping[str, list[_Value]],
    dimensions: Mapping[str, Sequence[Any]],
    uncovered: Mapping[tuple[_Value, _Value], None],
    allowed: Callable[[Case], bool],
) -> dict[str, int] | None:
    """Return an allowed case with the `chosen` places, trying first what covers most."""
    missing = [name for name in places if name not in chosen]
    if not missing:
        return chosen if allowed(_case(chosen, dimensions)) else None

    def gain(value: _Value) -> int:
        pairs = [(value, other) for other in chosen.items()]
        return sum(pair in uncovered or pair[::-1] in uncovered for pair in pairs)

    # The dimension that has most to gain goes first: later ones have to fit it.
    ranked = {name: sorted(places[name], key=gain, reverse=True) for name in missing}
    name = max(missing, key=lambda name: gain(ranked[name][0]))
    for _, place in ranked[name]:
        found = _complete(chosen | {name: place}, places, dimensions, uncovered, allowed)
        if found is not None:
            return found
    return None


def _case(chosen: Mapping[str, int], dimensions: Mapping[str, Sequence[Any]]) -> Case:
    return {name: values[chosen[name]] for name, values in dimensions.items()}
