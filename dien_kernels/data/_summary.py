"""A prepared folder in a few lines of plain words, for the terminal.

Room card. Lives here: ``summary_of``. May import: the standard library. Must not be here: counting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_BAD_LINES = 3  # so many are shown
# What each part of the report means; those that are not here have a line of their own, or are of no use in words.
_LEFT_OUT = {
    "bad_lines": "unreadable",
    "late_rows": "from before the last behaviour known of their user",
}
_USERS = {
    "one_event_users": "with one behaviour, which give no sample",
    "users_owning_every_item": "with every item, which give no sample",
}


def summary_of(meta: Mapping[str, Any]) -> str:
    """The counts of the prepared data, and of what was irregular in the log. ``meta`` is what ``meta.json`` holds;
    what another program left out of it has no line."""
    lines = [*_contents(meta), *_rows(meta), *_fields(meta), *_history(meta["report"], _when(meta)), *_users(meta)]
    lines += _appended(meta)
    last = meta.get("appended", [{}])[-1]
    lines += [f"warning: {warning}" for warning in dict.fromkeys([*meta["warnings"], *last.get("warnings", [])])]
    bad = last.get("first_bad_lines", []) if meta.get("appended") else meta["first_bad_lines"]
    lines += [f"bad line: {line}" for line in bad[:_BAD_LINES]]
    if len(bad) > _BAD_LINES:
        lines.append("more of them: first_bad_lines in meta.json")
    return "\n".join(lines)


def _contents(meta: Mapping[str, Any]) -> Iterator[str]:
    counts, schema, options = meta["counts"], meta["schema"], meta["options"]
    of_samples = "grouped_by" in meta
    users = "histories" if of_samples else "users"
    yield f"{counts['users']:,} {users}, {counts['behaviours']:,} behaviours{'' if of_samples else _times(meta)}"
    sizes = {**schema["items"], **schema.get("users", {}), **schema.get("behaviours", {})}
    yield "ids: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()) + ' (id 0, "unknown", included)'
    words = [f"{name} {options[name]}" for name in ("labels", "targets") if name in options]
    words = words[:1] if options["labels"] == "given" else words
    words += ["split by file"] if of_samples else [f"split by {options['split']}"] if "split" in options else []
    samples = ", ".join(f"{name} {size:,}" for name, size in counts["samples"].items())
    yield f"samples: {samples} ({', '.join(words)})"


def _times(meta: Mapping[str, Any]) -> str:
    """From when to when, and what the log had as times."""
    seen = [meta.get("seen"), *(entry.get("seen") for entry in meta.get("appended", []) if entry["users"])]
    times = [(kind, entry) for found in seen if found for kind, entry in found["times"].items()]
    if not times:
        return ""
    low, high = min(entry["low"] for _, entry in times), max(entry["high"] for _, entry in times)
    zone = " UTC" if meta["time_unit"] == "us" else ""
    return f", from {low} to {high}{zone} (times are {' and '.join(dict.fromkeys(kind for kind, _ in times))})"


def _when(meta: Mapping[str, Any]) -> str:
    """What follows a count of the first log, where there are later ones."""
    return " by the first prepare" if meta.get("appended") else ""


def _rows(meta: Mapping[str, Any]) -> Iterator[str]:
    report = meta["report"]
    rows = report.get("rows", 0)
    if not rows:
        return
    out = [f"{report[name]:,} {words}" for name, words in _LEFT_OUT.items() if report.get(name)]
    of_no_sequence = meta.get("seen", {}).get("left_out", 0)
    out += [f"{of_no_sequence:,} of no sequence"] if of_no_sequence else []
    every = rows + report.get("bad_lines", 0) + of_no_sequence
    when = _when(meta)
    yield f"rows: {every:,} read{when}" + ("; left out: " + ", ".join(out) if out else ", none left out")
    copies = report.get("duplicate_rows", 0)
    if copies:
        yield (
            f"duplicates: {copies:,} rows ({copies / rows:.1%}) say the same as an earlier one, and were "
            + ("left out" if meta["options"].get("duplicates") == "drop" else "kept")
        )
    if report.get("out_of_order"):
        yield f"order: {report['out_of_order']:,} rows stood behind a later one of their user, and were sorted by time"


def _fields(meta: Mapping[str, Any]) -> Iterator[str]:
    report, schema = meta["report"], meta["schema"]
    unknown = meta.get("seen", {}).get("unknown", {})
    nowhere = meta.get("seen", {}).get("unknown_everywhere", [])
    rows = report.get("rows", 0)
    some = [
        f"{name} in {count:,} rows ({count / rows:.1%})"
        for name, count in unknown.items()
        if count and rows and name not in nowhere
    ]
    if report.get("rare_items"):
        some.append(f"{report['rare_items']:,} items that are too rare for an id")
    if some:
        yield "unknown: " + ", ".join(some)
    if nowhere:
        yield f"unknown in every row: {', '.join(nowhere)}"
    for name, count in meta.get("seen", {}).get("infinite", {}).items():
        yield f"{name}: {count:,} values are infinite or too large for float32, and count as missing"
    for name in schema["items"]:
        other, cut = report.get(f"conflicts:{name}", 0), report.get(f"cut_values:{name}", 0)
        if other:
            yield f"{name}: {other:,} rows differ from the first value of their item, which counts"
        if cut:
            yield f"{name}: {cut:,} values were left out, of items that have too many"


def _history(report: Mapping[str, int], when: str) -> Iterator[str]:
    shares = [
        f"{report[f'{name}_in_history'] / report[name]:.1%} of the {word}"
        for name, word in (("positives", "positive targets"), ("negatives", "negative ones"))
        if report.get(name) and f"{name}_in_history" in report
    ]
    if shares:
        yield "in the user's own history already: " + " and ".join(shares) + when
    if report.get("empty_histories"):
        yield f"histories: {report['empty_histories']:,} samples have an empty one{when}"


def _users(meta: Mapping[str, Any]) -> Iterator[str]:
    report, behaviours = meta["report"], meta["counts"]["behaviours"]
    words = [f"{report[name]:,} {text}" for name, text in _USERS.items() if report.get(name)]
    if report.get("longest_user") and behaviours:
        longest = report["longest_user"]
        share = "" if meta.get("appended") else f" ({longest / behaviours:.1%} of all)"
        words.append(f"the longest has {longest:,} behaviours{share}")
    if words:
        yield "users: " + ", ".join(words)


def _appended(meta: Mapping[str, Any]) -> Iterator[str]:
    """The latest of the appended days; the counts of the first lines are those of all."""
    appended = meta.get("appended", [])
    if not appended:
        return
    last = appended[-1]
    out = [f"{last[name]:,} {words}" for name, words in _LEFT_OUT.items() if last.get(name)]
    yield (
        f"appended {len(appended)} time{'s' * (len(appended) > 1)} (a user counts again each time, with their latest "
        f"behaviours), at last {last['rows']:,} rows of {last['users']:,} users, {last['new_items']:,} new items"
        + ("; left out: " + ", ".join(out) if out else "")
    )
    copies, dropped = last.get("duplicate_rows", 0), meta["options"].get("duplicates") == "drop"
    if copies:
        share = copies / last["rows"]
        yield (
            f"duplicates: {copies:,} of {last['rows']:,} rows of the last day ({share:.1%}) say the same as one that "
            f"is known, and were {'left out' if dropped else 'kept'}"
        )
    yield from _history(last, " of the last day")
