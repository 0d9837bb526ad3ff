"""Which column of a file plays which role: what a user says, and what it means for the columns of one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeAlias

RESERVED = ("user", "item", "timestamp", "label", "sequence")
COUNT = "count"  # a column of ``items.parquet``, which an item field would take the place of
# What begins the names of a shard's columns, or is one.
NO_SEQUENCE = ("user", "dense", "behaviour", "item", "time", "target", "label", "end", "held")
# The usual column names, which are tried in this order where the caller names no column.
ALIASES = {
    "user": ("user", "user_id", "userId", "uid"),
    "item": ("item", "item_id", "itemId", "iid"),
    "timestamp": ("timestamp", "time", "ts"),
    "label": ("label", "click"),
    "category": ("category", "category_id", "categoryId", "cate_id"),
}
Fields: TypeAlias = "Sequence[str] | Mapping[str, str]"


@dataclass(frozen=True)
class Columns:
    """Which column of a Parquet or CSV file plays which role; None: the first usual name that is there.

    Attributes:
        user, item, timestamp: column names; usual names are ``user``, ``user_id``, ... (``ALIASES``).
        label: 0/1 column, read for labels "given" only.
        item_fields: further item-side fields, names of columns or a mapping of field name to column. None:
            ``category`` where a column of that kind is there. A column of lists gives a field of several values.
        user_fields: user-side fields of a row, likewise; None: none. They are categorical.
        dense: columns of numbers of a row, likewise.
        behaviour_fields: categorical fields of a behaviour itself (action, page, device), likewise.
        behaviour_dense: columns of numbers of a behaviour (dwell time, rating), likewise.
        delimiters: for item fields with several values in one text, the text between them: ``{"genres": "|"}``.
        sequence: the column whose values tell to which sequence of its user a row belongs (``action``).
        sequences: the name of each sequence and the value, or values, of that column:
            ``{"clicks": "pv", "purchases": ["buy"]}``. The first is the main sequence. Other rows are left out.

    >>> Columns.of({"item": "movie", "delimiters": {"genres": "|"}, "item_fields": ["genres"]}).item
    'movie'
    """

    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    label: str | None = None
    item_fields: Fields | None = None
    user_fields: Fields = ()
    dense: Fields = ()
    behaviour_fields: Fields = ()
    behaviour_dense: Fields = ()
    delimiters: Mapping[str, str] = field(default_factory=dict)
    sequence: str | None = None
    sequences: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Columns | Mapping[str, object] | None) -> Columns:
        """Columns from a mapping, such as a part of a configuration file."""
        if given is None or isinstance(given, Columns):
            return given or cls()
        if not isinstance(given, Mapping):
            raise TypeError(f"columns must be Columns or a mapping of roles to columns, got {type(given).__name__}")
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"columns must be given for {known}, got {name!r}")
        return cls(**given)  # type: ignore[arg-type]

    def resolve(self, names: Sequence[str], labelled: bool, where: str, further: Sequence[str] = ()) -> Roles:
        """The roles of the columns ``names`` of ``where``. Raises ``ValueError`` naming what is missing.

        ``further`` columns are found by their own names only: those that the folders of a partitioned log give.
        """

        def one(role: str, given: str | None) -> str:
            if given is not None:
                return given
            for alias in ALIASES[role]:
                if alias in names:
                    return alias
            raise ValueError(f"{where} has no {role} column (one of {ALIASES[role]}); it has {list(names)}")

        roles = Roles(one("user", self.user), one("item", self.item), one("timestamp", self.timestamp))
        if len({roles.user, roles.item, roles.timestamp}) < 3:
            given = f"{roles.user!r}, {roles.item!r} and {roles.timestamp!r}"
            raise ValueError(f"user, item and timestamp must be three columns of {where}, got {given}")
        if labelled:
            roles.label = one("label", self.label)
        if self.item_fields is None:
            found = [("category", alias) for alias in ALIASES["category"] if alias in names]
            roles.item_fields = dict(found[:1])
        else:
            roles.item_fields = _named(self.item_fields)
        roles.user_fields, roles.dense = _named(self.user_fields), _named(self.dense)
        roles.behaviour_fields, roles.behaviour_dense = _named(self.behaviour_fields), _named(self.behaviour_dense)
        self._more(roles)
        roles.check_names()
        there = [*names, *further]
        missing = [column for column in roles.standard().values() if column not in there]
        if missing:
            raise ValueError(f"{where} has no column {', '.join(map(repr, missing))}; it has {there}")
        for column in roles.standard().values():
            if list(names).count(column) > 1:
                raise ValueError(f"{where} has several columns {column!r}; it has {list(names)}")
        return roles

    def _more(self, roles: Roles) -> None:
        """The delimiters and sequences of the roles."""
        for name, delimiter in dict(self.delimiters).items():
            if name not in roles.item_fields:
                raise ValueError(f"delimiters must name item fields of {list(roles.item_fields)}, got {name!r}")
            if not isinstance(delimiter, str) or not delimiter:
                raise ValueError(f"delimiters[{name!r}] must be the text between two values, got {delimiter!r}")
        roles.delimiters = dict(self.delimiters)
        if (self.sequence is None) != (not self.sequences):
            raise ValueError(
                "sequence (a column) and sequences (name: values of it) belong together, got "
                f"{self.sequence!r} and {dict(self.sequences)}"
            )
        roles.sequence = self.sequence
        taken: dict[str, str] = {}
        for name, given in self.sequences.items():
            if name in NO_SEQUENCE or "." in str(name):
                raise ValueError(f"sequences must have other names than {NO_SEQUENCE} and no dots, got {name!r}")
            if not isinstance(name, str) or not name or "/" in name or "." in name:
                raise ValueError(f"a sequence must have a name without '.' and '/', got {name!r}")
            values = [given] if isinstance(given, (str, int)) else given
            if not isinstance(values, Sequence) or not values:
                raise ValueError(f"sequences[{name!r}] must be a value of column {self.sequence!r} or several")
            for value in map(str, values):
                if taken.setdefault(value, name) != name:
                    raise ValueError(f"the value {value!r} can name one sequence, got {taken[value]!r} and {name!r}")
            roles.sequences[name] = tuple(map(str, values))


def _named(given: Fields) -> dict[str, str]:
    if isinstance(given, str):
        raise ValueError(f"fields must be a list of columns or a mapping of names to columns, got {given!r}")
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"fields must be a list of columns or a mapping of names to columns, got {given!r}")
    return {name: name for name in given}


@dataclass
class Roles:
    """Which column of a file plays which role: maps roles and field names to column names."""

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    label: str | None = None
    item_fields: dict[str, str] = field(default_factory=dict)
    user_fields: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    behaviour_fields: dict[str, str] = field(default_factory=dict)
    behaviour_dense: dict[str, str] = field(default_factory=dict)
    several: tuple[str, ...] = ()
    delimiters: dict[str, str] = field(default_factory=dict)
    sequence: str | None = None
    sequences: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def standard(self) -> dict[str, str]:
        """All roles and fields in one mapping of standard name to column name."""
        base = {"user": self.user, "item": self.item, "timestamp": self.timestamp}
        if self.label is not None:
            base["label"] = self.label
        if self.sequence is not None:
            base["sequence"] = self.sequence
        fields = self.item_fields | self.user_fields | self.dense
        return base | fields | self.behaviour_fields | self.behaviour_dense

    def check_names(self) -> None:
        """Raise ``ValueError`` for a field that is named twice, or by a name that no file can have."""
        taken = list(RESERVED)
        every = (self.item_fields, self.user_fields, self.dense, self.behaviour_fields, self.behaviour_dense)
        for name in (name for names in every for name in names):
            if name in taken:
                raise ValueError(f"field {name!r} is named twice, or like one of {RESERVED}: map it to another name")
            if name == COUNT and name in self.item_fields:
                raise ValueError(f"item field {name!r} must have another name: map it to one")
            if not name or "/" in name or "\0" in name:
                raise ValueError(f"field {name!r} must have a name that a file can have: map it to another name")
            taken.append(name)
