"""``Earlier``: a prepared folder as it looks to a model that was trained before its vocabularies grew.

Room card. Lives here: the view of a folder with fewer ids. May import: numpy, ``prepared``. Must not be here: files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dien_kernels.data._arrow import Array
from dien_kernels.data._unit import Unit
from dien_kernels.data.prepared import Prepared
from dien_kernels.data.vocabulary import Vocabulary


class Earlier(Prepared):
    """A prepared folder with only the first ids of every field; the others are 0, "unknown".

    Vocabularies grow at their ends, so that the first ids mean what they meant before. Histories, targets and
    negatives have no other id than a model with tables of ``sizes`` rows knows. Of an item field with several values,
    unknown values are no values.

    Args:
        whole: the folder as it is.
        sizes: field to the number of its ids, for every item, user and behaviour field.

    Raises ``ValueError`` for fields that are not those of the folder, or more ids than it has.
    """

    def __init__(self, whole: Prepared, sizes: Mapping[str, int]) -> None:
        super().__init__(whole.path, whole.meta)
        full = {**whole.schema.items, **whole.schema.users, **whole.schema.behaviours}
        if set(sizes) != set(full):
            raise ValueError(f"sizes must name the fields {sorted(full)}, got {sorted(sizes)}")
        for name, size in sizes.items():
            if not 1 <= size <= full[name]:
                raise ValueError(f"sizes[{name!r}] must lie between 1 and {full[name]}, got {size}")
        self.whole, self.sizes = whole, dict(sizes)
        schema = whole.schema
        self.schema = replace(
            schema,
            items={name: sizes[name] for name in schema.items},
            users={name: sizes[name] for name in schema.users},
            behaviours={name: sizes[name] for name in schema.behaviours},
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle the path and the sizes: a worker process reads the same files."""
        return _reopen, (self.whole, self.sizes)

    def unabridged(self) -> Prepared:
        return self.whole

    def read_unit(self, number: int, times: bool = True) -> Unit:
        unit = self.whole.read_unit(number, times)
        item = next(iter(self.schema.items))
        for steps in (unit.behaviours, *unit.sequences.values()):
            steps.item = self._known(item, steps.item)
            steps.fields = {name: self._known(name, ids) for name, ids in steps.fields.items()}
        unit.schema, unit.item = self.schema, unit.behaviours.item
        unit.row_item = self._known(item, unit.row_item)
        unit.row_users = {name: self._known(name, ids) for name, ids in unit.row_users.items()}
        return unit

    def _known(self, field: str, ids: Array) -> Array:
        return np.where(ids < self.sizes[field], ids, 0).astype(ids.dtype)

    @cached_property
    def _items(self) -> dict[str, Array]:
        item, *others = self.schema.items
        size, whole = self.sizes[item], self.whole._items
        count = whole["count"][:size].copy()
        count[0] += whole["count"][size:].sum()
        return {"count": count, **{name: self._known(name, whole[name][:size]) for name in others}}

    def vocabulary(self, field: str) -> Vocabulary:
        if field not in self.sizes or field not in self._vocabularies:
            whole = self.whole.vocabulary(field)  # raises for a field that there is not
            size = self.sizes[field]
            counts = whole.counts[:size].copy()
            counts[0] += whole.counts[size:].sum()
            self._vocabularies[field] = Vocabulary(whole.values[: size - 1], counts)
        return self._vocabularies[field]


def _reopen(whole: Prepared, sizes: dict[str, int]) -> Earlier:
    return Earlier(whole, sizes)


def descends(prepared: Prepared, fingerprint: str) -> bool:
    """Whether a folder is the one with this fingerprint, or has grown from it by ``append``."""
    return fingerprint in (prepared.fingerprint, *prepared.meta.get("ancestors", ()))


def is_prepared(path: object) -> bool:
    """Whether a path is that of a prepared folder, rather than of raw logs."""
    return isinstance(path, (str, Path)) and (Path(path) / "meta.json").is_file()
