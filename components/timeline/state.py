"""A state as an array of numbers, in place of a map that spells out every feature's name in every row."""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F


def in_usual_order(state: str, features: list[str]) -> tuple[Column, Column]:
    """The values of a map that has all `features` and in their order, else null; and the map where it has not."""
    usual = F.map_keys(state) == names_array(features)
    return F.when(usual, F.map_values(state)), F.when(~usual, F.col(state))


def as_array(values: str, odd: str, features: list[str]) -> Column:
    """The values of both, in the order of `features`, null where there is none of that name.

    No map has a name beside them. Their order is best that of most of the maps.
    """
    if not features:
        return F.lit(None).cast("array<double>")
    in_order = {name: i for i, name in enumerate(sorted(features))}
    places = F.array(*[F.lit(in_order[name]) for name in features])
    # A map is searched name by name: all names of a large map are found faster by sorting it once.
    entries = F.array(F.array_sort(F.map_entries(odd)))
    picked = F.transform(entries, lambda e: F.transform(places, lambda place: F.get(e, place)["value"]))[0]
    keys = F.map_keys(odd)
    # By its place only where each name is there once.
    all_once = (F.size(keys) == len(features)) & (F.size(F.array_distinct(keys)) == len(features))
    return (
        F.when(F.col(values).isNotNull(), F.col(values))
        .when(all_once, picked)
        .when(F.col(odd).isNotNull(), F.transform(names_array(features), lambda name: F.col(odd)[name]))
    )


def names_array(names: list[str]) -> Column:
    return F.array(*[F.lit(name) for name in names]).cast("array<string>")


def has_others(named: Column, names: list[str]) -> Column:
    """Whether a map has a name that is not one of these."""
    keys, known = F.map_keys(named), names_array(names)
    return F.coalesce((keys != known) & (F.size(F.array_except(keys, known)) > 0), F.lit(False))


def columns(values: Column, features: list[str], prefix: str) -> list[Column]:
    """A column for each feature, by name, from an array in their order."""
    places = sorted((name, i) for i, name in enumerate(features))
    return [values[i].alias(prefix + name) for name, i in places]
