"""``python -m benchmarks run | report | reproduce``: measure into a CSV, turn it into tables, compare several."""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import registry, report, store

if TYPE_CHECKING:
    from benchmarks.timing import Measurement

ROOT = Path(__file__).resolve().parents[1]
README, PAGE, PICTURE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "speed.svg"
MOST_ROWS, MOST_THREADS = 2**31 - 1, 1024  # more is a slip of the hand, at which torch may end in a traceback
TITLE = """# Benchmarks: every row

Made by `python -m benchmarks report --write`; how it was measured: [benchmarks/README.md](../benchmarks/README.md)."""


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments or ["run"])
    try:
        options.action(options)
    except store.BadFile as reason:
        sys.exit(str(reason))


def _count(text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= float(text) <= most:  # int() has an error of its own for thousands of digits
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {most}, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, got {text!r}")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="measure; rows are appended when the cases that take turns have ended")
    run.set_defaults(action=_run)
    run.add_argument("--suite", nargs="+", choices=(*registry.SUITES, "all"), default=["all"])
    run.add_argument("--op", nargs="+", choices=registry.NAMES, help="only these")
    run.add_argument("--mode", nargs="+", choices=registry.MODES, help="only these")
    run.add_argument("--law", nargs="+", choices=(*registry.LAWS, "log"), help="only these lengths")
    run.add_argument("--batch", nargs="+", type=partial(_count, most=MOST_ROWS), help="only these B")
    threads = partial(_count, most=MOST_THREADS)
    run.add_argument("--threads", nargs="+", type=threads, default=list(registry.THREADS))
    run.add_argument("--budget", type=_seconds, default=6.0, metavar="S", help="seconds of timing a case, at least (6)")
    run.add_argument("--out", type=Path, default=store.DEFAULT)
    run.add_argument("--resume", action="store_true", help="skip what the file has from this very commit")
    run.add_argument("--allocator", choices=("keep", "default"), default="keep")
    run.add_argument("--no-memory", action="store_true", help="do not measure peak memory of fwd+bwd and step")
    run.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs; needs another --out")

    table = commands.add_parser("report", help="tables from the CSV alone")
    table.set_defaults(action=_report)
    table.add_argument("--results", type=Path, default=store.DEFAULT)
    table.add_argument("--write", action="store_true", help="docs/benchmarks.md, its picture and the README's summary")
    table.add_argument("--allocator", choices=("keep", "default"), default="keep")

    again = commands.add_parser("reproduce", help="are another run's ratios within the stated spreads?")
    again.set_defaults(action=_reproduce)
    again.add_argument("again", type=Path, nargs="?", default=store.AGAIN, help="the other run's --out")
    again.add_argument(
        "--first",
        type=Path,
        action="append",
        metavar="CSV",
        help="a run that states the spreads, once for each of them (the repository's two); medians are the first one's",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.tiny and any(options.out.resolve() == path.resolve() for path in (*store.REPORTED, store.AGAIN)):
        sys.exit("--tiny needs another --out: its rows do not belong among the results")
    work = [
        case
        for name in registry.SUITES
        if name in options.suite or "all" in options.suite
        for case in registry.cases(name)
        if (options.op is None or case.op in options.op)
        and (options.mode is None or case.mode in options.mode)
        and (options.law is None or case.law in options.law)
        and (options.batch is None or case.batch in options.batch)
    ]
    if not work:
        sys.exit("no case has all of the --suite, --op, --mode, --law and --batch given")
    before = _rows_before(options.out)
    # What torch.compile has kept of another version knows other layouts of our ops, and would fail.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        _measure(work, options, before)


def _is_default(path: Path) -> bool:
    return path.resolve() == store.DEFAULT.resolve()


def _rows_before(out: Path) -> list[store.Row]:
    """What ``--out`` has. It is tried now whether it takes more, as the rows come after hours of measuring."""
    try:
        before, is_new = store.read(out), not os.path.lexists(out)
        if not out.parent.exists():
            out.parent.mkdir(parents=True)
        out.open("a").close()
        if is_new:
            out.unlink()
    except OSError as reason:
        sys.exit(f"--out: {out} cannot be appended to: {reason.strerror}")
    return before


def _measure(work: list[registry.Case], options: argparse.Namespace, before: list[store.Row]) -> None:
    from benchmarks.facts import facts, set_allocator

    set_allocator(options.allocator)  # before anything large is allocated

    common = facts(options.allocator)
    done = {store.key(row) for row in before if row["git_sha"] == common["git_sha"] and _is_complete(row)}
    for suites, threads in product(registry.ROTATIONS, options.threads):
        cases = [registry.tiny(case) if options.tiny else case for case in work if case.suite in suites]
        if options.resume:
            cases = [case for case in cases if not _keys(case, threads, common) <= done]
        if cases:
            _sit(cases, threads, options, common)


def _is_complete(row: store.Row) -> bool:
    """Whether the run that wrote it had come to its end, or had nothing to time."""
    from benchmarks.timing import SITTINGS

    return row["sittings"] == str(SITTINGS) or not row["p50_us"]


def _keys(case: registry.Case, threads: int, common: store.Row) -> set[tuple[str, ...]]:
    shared = _columns(case, threads) | common
    return {store.key(shared | {"provider": provider}) for provider in case.providers}


def _sit(cases: list[registry.Case], threads: int, options: argparse.Namespace, common: store.Row) -> None:
    """The cases take turns, sitting by sitting, so that each is measured all along. Rows are written in the end, or
    when the run is interrupted."""
    from benchmarks.memory import hand_back
    from benchmarks.timing import LEAST_SITTINGS, SITTINGS, Measurement

    gc.collect()  # the programs that took turns before
    measurements = []
    for number, case in enumerate(cases):
        print(f"[{number + 1}/{len(cases)}] {case}, threads={threads}", flush=True)
        weighed = case.trains and case.suite in registry.WEIGHED and not options.no_memory
        measurements.append(Measurement(case, threads, weighed))
        hand_back()  # what the checks took, or pieces of it would add up between what stays
    gc.collect()
    gc.freeze()  # what stays is not looked through again before every sitting of a case
    try:
        for number in range(SITTINGS):
            print(f"sitting {number + 1} of {SITTINGS}", flush=True)
            for measurement in measurements:
                measurement.sit(options.budget)
    finally:
        gc.unfreeze()
        for measurement in measurements:
            if measurement.finished or measurement.turns.sat >= LEAST_SITTINGS:
                _write_rows(measurement, options.out, common)


def _write_rows(measurement: Measurement, out: Path, common: store.Row) -> None:
    case, threads = measurement.case, measurement.threads
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = _columns(case, threads) | common | {"date": date}
    full = [about | {name: str(value) for name, value in row.items()} for row in measurement.rows()]
    store.append(out, full)
    print(f"{case}, threads={threads}")
    for row in full:
        print("    " + report.one_line(row), flush=True)


def _columns(case: registry.Case, threads: int) -> dict[str, str]:
    names: dict[str, Any] = {"suite": case.suite, "op": case.op, "mode": case.mode, "law": case.law}
    names |= dict(zip("BTIH", case.size, strict=True)) | {"dtype": case.dtype, "threads": threads}
    return {name: str(value) for name, value in names.items()}


def _report(options: argparse.Namespace) -> None:
    is_default = _is_default(options.results)
    if options.write and not is_default:
        sys.exit("--write makes the repository's pages of its own results: leave --results out")
    rows = _rows("--results", *(store.REPORTED if is_default else (options.results,)))
    rows = [row for row in rows if row["allocator"].startswith(options.allocator)]
    if not rows:
        sys.exit(f"--results: {options.results} has no rows measured with --allocator {options.allocator}")
    last = max(rows, key=lambda row: row["date"])  # one machine, set one way, a report: as it was last used
    rows = [row for row in rows if all(row[name] == last[name] for name in ("machine", "allocator"))]
    again = store.read_runs([store.AGAIN]) if is_default else []
    if options.write:
        _write(rows, again)
    else:
        print(report.markdown(rows, again=again))


def _reproduce(options: argparse.Namespace) -> None:
    first = options.first or store.REPORTED
    if any(options.again.resolve() == path.resolve() for path in first):
        sys.exit(f"again: {options.again} is one of the runs that state the spreads")
    pairs = report.pairs_of(_rows("--first", *first), _rows("again", options.again))
    if not pairs:
        sys.exit(f"{options.again} has no ratio of a case, machine and allocator that {first[0]} has")
    print(report.reproduced(pairs))


def _rows(argument: str, *paths: Path) -> list[store.Row]:
    for path in paths:
        if not path.exists():
            sys.exit(f"{argument}: there is no file {path}")
    return store.read_runs(paths)


def _write(rows: list[store.Row], again: list[store.Row]) -> None:
    from benchmarks import plot, summary

    plot.draw(rows, PICTURE)  # first, as it needs a package that may be missing
    PAGE.write_text(f"{TITLE}\n\n{report.markdown(rows, '../', again)}\n")
    summary.write_between_marks(README, summary.text(rows, "docs/benchmarks.md", "docs/speed.svg", again))


if __name__ == "__main__":
    main(sys.argv[1:])
