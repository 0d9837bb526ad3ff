"""What ``prepare`` tells in plain words: whatever makes a result meaningless, with the option that mends it.

Room card. Lives here: ``warnings_of``. May import: ``batch``, ``log``. Must not be here: counting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dien_kernels.batch import Schema
from dien_kernels.data._options import Options
from dien_kernels.data.log import Log

_LEAK = 0.1  # the AUC that the rule "the target is in its history" has beyond 0.5, from which on it is told
_ENOUGH = 50  # positive targets
_LONGEST = 0.05  # the share of one user in all behaviours
_LEFT_OUT = 0.5


def warnings_of(
    report: Mapping[str, int], counts: Mapping[str, Any], schema: Schema, options: Options, log: Log
) -> list[str]:
    """Sentences about what would mislead, from the counts of the report."""
    return [*_leaks(report, options), *_silent_fields(report, schema, log), *_odd_users(report, counts, options)]


def _leaks(report: Mapping[str, int], options: Options) -> list[str]:
    told = []
    copies, rows = report.get("duplicate_rows", 0), report["rows"]
    if copies and options.duplicates == "keep":
        told.append(
            f"{copies:,} of {rows:,} rows ({copies / rows:.1%}) are duplicates of an earlier row, with its user, item "
            "and time: the copy of a target stands in its history. duplicates='drop' (--duplicates drop) mends it."
        )
    positive = _share(report, "positives")
    negative = _share(report, "negatives") if options.labels == "given" else 0.0
    if report.get("positives", 0) >= _ENOUGH and abs(positive - negative) / 2 >= _LEAK:
        told.append(
            f"{positive:.0%} of the positive targets repeat an item of their own history, and {negative:.0%} of the "
            f"negatives do: the rule 'it is in the history' alone has an AUC of {0.5 + (positive - negative) / 2:.2f}. "
            + (
                "Leave repeats out of the samples with repeats='drop' (data.repeats), or allow negatives from the "
                "history with exclude='none' (data.exclude)."
                if options.labels == "next"
                else "Leave repeats out of the samples with repeats='drop' (data.repeats)."
            )
        )
    return told


def _share(report: Mapping[str, int], name: str) -> float:
    return report.get(f"{name}_in_history", 0) / max(report.get(name, 0), 1)


def _silent_fields(report: Mapping[str, int], schema: Schema, log: Log) -> list[str]:
    told = []
    empty = [name for name in (*schema.dense, *schema.behaviour_dense) if not log.known.get(name, 1)]
    for name, size in {**schema.items, **schema.users, **schema.behaviours, **dict.fromkeys(empty, 1)}.items():
        if size == 1 and name != "item":
            told.append(
                f"the field {name!r} is unknown in every row, so it says nothing: name another column for it, or leave "
                "it out."
            )
        conflicts = report.get(f"conflicts:{name}", 0)
        if conflicts > report["rows"] / 10:
            told.append(
                f"{conflicts:,} of {report['rows']:,} rows give an item another value of {name!r} than its first row "
                "does, and the first one counts: if it belongs to the behaviour, name it among behaviour_fields."
            )
    return told


def _odd_users(report: Mapping[str, int], counts: Mapping[str, Any], options: Options) -> list[str]:
    told = []
    longest, behaviours, users = report["longest_user"], counts["behaviours"], counts["users"]
    if users >= 20 and longest > max(_LONGEST * behaviours, 20 * behaviours / users):
        told.append(
            f"one user has {longest:,} of the {behaviours:,} behaviours ({longest / behaviours:.0%}): is it a word for "
            "strangers? missing= (--missing) names the words that stand for no user."
        )
    single = report.get("one_event_users", 0)
    if single > _LEFT_OUT * users:
        told.append(f"{single:,} of {users:,} users have one behaviour only and give no sample.")
    back = report.get("out_of_order", 0)
    if back > report["rows"] / 4:
        told.append(
            f"{back:,} of {report['rows']:,} rows stand behind a later one of the same user: they were sorted by time; "
            "look whether the times were read as they are meant."
        )
    return told
