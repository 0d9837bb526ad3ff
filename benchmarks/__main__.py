"""``python -m benchmarks run | report | check``: measure into a CSV, turn it into pages, hold it to the targets."""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import check, registry, repeats, report, store

if TYPE_CHECKING:
    from benchmarks.measurement import Measurement

ROOT = Path(__file__).resolve().parents[1]
README, PAGE, PICTURE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "speed.svg"
MOST_ROWS, MOST_THREADS = 2**31 - 1, 1024  # larger numbers are typing errors, which torch meets with a traceback


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments or ["run"])
    try:
        options.action(options)
        sys.stdout.flush()
    except store.BadFile as reason:
        sys.exit(str(reason))
    except BrokenPipeError:  # whoever reads the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail again when it ends
        sys.exit(128 + signal.SIGPIPE)


def _count(text: str, most: int, least: int = 1) -> int:
    # float(), as int() has an error of its own for thousands of digits.
    if not text.isdecimal() or not least <= float(text) <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text!r}")
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

    run = commands.add_parser("run", help="measure; rows are appended when a group of cases has ended")
    run.set_defaults(action=_run)
    run.add_argument("--suite", nargs="+", choices=(*registry.SUITES, "all"), default=["all"])
    run.add_argument("--op", nargs="+", choices=registry.NAMES, help="only these")
    run.add_argument("--mode", nargs="+", choices=registry.MODES, help="only these")
    lengths = (*registry.LENGTH_DISTRIBUTIONS, "log")
    run.add_argument("--length-distribution", nargs="+", choices=lengths, help="only these")
    run.add_argument("--batch", nargs="+", type=partial(_count, most=MOST_ROWS), help="only these B")
    threads = partial(_count, most=MOST_THREADS)
    run.add_argument("--threads", nargs="+", type=threads, default=list(registry.THREADS))
    run.add_argument("--budget", type=_seconds, default=6.0, metavar="S", help="seconds of timing a case, at least (6)")
    run.add_argument("--out", type=Path, default=store.DEFAULT)
    run.add_argument("--resume", action="store_true", help="skip what the file already has from this commit")
    run.add_argument("--allocator", choices=("keep", "default"), default="keep")
    run.add_argument("--no-memory", action="store_true", help="do not measure peak memory of fwd+bwd and step")
    run.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs; needs another --out")

    page = commands.add_parser("report", help="the tables of docs/benchmarks.md, from the CSV alone")
    page.set_defaults(action=_report)
    page.add_argument("--write", action="store_true", help="write docs/benchmarks.md, its picture and README's section")

    targets = commands.add_parser(
        "check",
        help="print every target with its figure",
        description="Prints every speed and memory target with its figure. The exit status is 0 if at most --allow of "
        "them are missed or not measured, and 1 otherwise.",
    )
    targets.set_defaults(action=_check)
    allowed = partial(_count, least=0, most=10_000)
    targets.add_argument("--allow", type=allowed, default=0, metavar="N", help="the number of failures allowed (0)")
    for command in (page, targets):
        command.add_argument("--results", type=Path, default=store.DEFAULT)
        command.add_argument("--allocator", choices=("keep", "default"), default="keep")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.tiny and any(options.out.resolve() == path.resolve() for path in (store.DEFAULT, *repeats.PATHS)):
        sys.exit("--tiny needs another --out: its rows do not belong among the results")
    work = [
        case
        for name in registry.SUITES
        if name in options.suite or "all" in options.suite
        for case in registry.cases(name)
        if (options.op is None or case.op in options.op)
        and (options.mode is None or case.mode in options.mode)
        and (options.length_distribution is None or case.length_distribution in options.length_distribution)
        and (options.batch is None or case.batch in options.batch)
    ]
    if not work:
        sys.exit("no case has all of the --suite, --op, --mode, --length-distribution and --batch given")
    before = _rows_before(options.out)
    # A fresh cache: graphs that torch.compile has kept from another version expect other layouts of our ops, and fail.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        _measure(work, options, before)


def _is_default(path: Path) -> bool:
    return path.resolve() == store.DEFAULT.resolve()


def _rows_before(out: Path) -> list[store.Row]:
    """The rows of ``--out``. Whether it can be written is tried now, as new rows come after hours of measuring."""
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
    from benchmarks.environment import environment, set_allocator

    set_allocator(options.allocator)  # before anything large is allocated

    common = environment(options.allocator)
    done = {store.key(row) for row in before if row["git_sha"] == common["git_sha"] and _is_complete(row)}
    for suites, threads in product(registry.ROTATIONS, options.threads):
        cases = [registry.tiny(case) if options.tiny else case for case in work if case.suite in suites]
        if options.resume:
            cases = [case for case in cases if not _keys(case, threads, common) <= done]
        if cases:
            _measure_group(cases, threads, options, common)


def _is_complete(row: store.Row) -> bool:
    """Whether the run that wrote the row had ended, or had nothing to time."""
    from benchmarks.clock import SESSIONS

    return row["sessions"] == str(SESSIONS) or not row["p50_us"]


def _keys(case: registry.Case, threads: int, common: store.Row) -> set[tuple[str, ...]]:
    shared = _columns(case, threads) | common
    return {store.key(shared | {"provider": provider}) for provider in case.providers}


def _measure_group(cases: list[registry.Case], threads: int, options: argparse.Namespace, common: store.Row) -> None:
    """Measures the cases alternately, session by session, so that each is measured all along. Rows are written in the
    end, or when the run is interrupted."""
    from benchmarks.clock import MIN_SESSIONS, SESSIONS
    from benchmarks.measurement import Measurement
    from benchmarks.memory import release_freed_memory

    gc.collect()  # the programs of the group before
    measurements = []
    for number, case in enumerate(cases):
        print(f"[{number + 1}/{len(cases)}] {case}, threads={threads}", flush=True)
        with_memory = case.trains and case.suite in registry.MEMORY_SUITES and not options.no_memory
        measurements.append(Measurement(case, threads, with_memory))
        release_freed_memory()  # of the validation, which would otherwise add up between what stays
    gc.collect()
    gc.freeze()  # what stays need not be looked through again before every session of a case
    try:
        for number in range(SESSIONS):
            print(f"session {number + 1} of {SESSIONS}", flush=True)
            for measurement in measurements:
                measurement.run_session(options.budget)
    finally:
        gc.unfreeze()
        measured = [m for m in measurements if m.finished or m.turns.sessions_done >= MIN_SESSIONS]
        for measurement, rows in [(m, _write_rows(m, options.out, common)) for m in measured]:
            print(f"{measurement.case}, threads={threads}")
            for row in rows:  # printed when all are written, as printing fails if nobody reads
                print("    " + report.one_line(row), flush=True)


def _write_rows(measurement: Measurement, out: Path, common: store.Row) -> list[store.Row]:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = _columns(measurement.case, measurement.threads) | common | {"date": date}
    full = [about | {name: str(value) for name, value in row.items()} for row in measurement.rows()]
    store.append(out, full)
    return full


def _columns(case: registry.Case, threads: int) -> dict[str, str]:
    names: dict[str, Any] = {"suite": case.suite, "op": case.op, "mode": case.mode}
    names |= {"length_distribution": case.length_distribution} | dict(zip("BTIH", case.size, strict=True))
    names |= {"dtype": case.dtype, "threads": threads}
    return {name: str(value) for name, value in names.items()}


def _report(options: argparse.Namespace) -> None:
    is_default = _is_default(options.results)
    if options.write and not is_default:
        sys.exit("--write makes the repository's pages of its own results: leave --results out")
    rows = _rows(options)
    paths = repeats.PATHS if is_default else ()
    words, rows = repeats.sentence(rows, paths), repeats.with_common_intervals(rows, paths)
    if options.write:
        _write(rows, words)
    else:
        print(report.page(rows, words), end="")


def _check(options: argparse.Namespace) -> None:
    text, failed = check.report(_rows(options))
    print(text)
    if failed > options.allow:
        sys.exit(f"{failed} targets are missed or not measured, and --allow is {options.allow}")


def _rows(options: argparse.Namespace) -> list[store.Row]:
    """The newest rows of ``--results`` with ``--allocator``, of the machine that was used last."""
    if not options.results.exists():
        sys.exit(f"--results: there is no file {options.results}")
    rows = [row for row in store.read(options.results) if row["allocator"].startswith(options.allocator)]
    if not rows:
        sys.exit(f"--results: {options.results} has no rows measured with --allocator {options.allocator}")
    return store.of_one_machine(rows)


def _write(rows: list[store.Row], words: str) -> None:
    from benchmarks import plot

    plot.draw(rows, PICTURE)  # first, as it needs a package that may be missing
    PAGE.write_text(report.page(rows, words))
    report.write_between_marks(README, report.readme(rows, words))


if __name__ == "__main__":
    main(sys.argv[1:])
