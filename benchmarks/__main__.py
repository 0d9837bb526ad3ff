"""``python -m benchmarks run | report``: measure into a CSV, and turn the CSV into tables."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import registry, report, store


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments or ["run"])
    options.action(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="measure; rows are appended after every case")
    run.set_defaults(action=_run)
    run.add_argument("--suite", nargs="+", choices=(*registry.SUITES, "all"), default=["all"])
    run.add_argument("--op", nargs="+", choices=registry.NAMES, help="only these")
    run.add_argument("--mode", nargs="+", choices=registry.MODES, help="only these")
    run.add_argument("--threads", nargs="+", type=int, default=list(registry.THREADS))
    run.add_argument("--budget", type=float, default=6.0, metavar="S", help="seconds of timing a case (6)")
    run.add_argument("--out", type=Path, default=store.DEFAULT)
    run.add_argument("--resume", action="store_true", help="skip what the file has from this very commit")
    run.add_argument("--allocator", choices=("keep", "default"), default="keep")
    run.add_argument("--no-memory", action="store_true", help="do not measure peak memory of fwd+bwd and step")
    run.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs; needs another --out")

    table = commands.add_parser("report", help="tables from the CSV alone")
    table.set_defaults(action=_report)
    table.add_argument("--results", type=Path, default=store.DEFAULT)
    table.add_argument("--readme", type=Path, help="put the tables between this file's speed marks")
    table.add_argument("--plot", type=Path, help="draw the ratios into this file (needs matplotlib)")
    table.add_argument("--allocator", choices=("keep", "default"), default="keep")
    return parser


def _run(options: argparse.Namespace) -> None:
    from benchmarks.facts import facts, set_allocator

    if options.tiny and options.out == store.DEFAULT:
        sys.exit("--tiny needs --out: its rows do not belong among the results")
    set_allocator(options.allocator)  # before anything large is allocated
    from benchmarks.timing import measure

    common = facts(options.allocator)
    done = {store.key(row) for row in store.read(options.out) if row["git_sha"] == common["git_sha"]}
    work = [
        case
        for name in registry.SUITES
        if name in options.suite or "all" in options.suite
        for case in registry.cases(name)
        if (options.op is None or case.op in options.op) and (options.mode is None or case.mode in options.mode)
    ]
    for number, case in enumerate(registry.tiny(case) if options.tiny else case for case in work):
        for threads in options.threads:
            shared = _columns(case, threads) | common
            wanted = {store.key(shared | {"provider": provider}) for provider in case.providers}
            if options.resume and wanted <= done:
                continue
            print(f"[{number + 1}/{len(work)}] {case}, threads={threads}", flush=True)
            rows = measure(case, threads, options.budget, case.trains and not options.no_memory)
            date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            full = [shared | {"date": date} | {k: str(v) for k, v in row.items()} for row in rows]
            store.append(options.out, full)
            for row in full:
                print("    " + report.one_line(row), flush=True)


def _columns(case: registry.Case, threads: int) -> dict[str, str]:
    names: dict[str, Any] = {"suite": case.suite, "op": case.op, "mode": case.mode, "law": case.law}
    names |= dict(zip("BTIH", case.size, strict=True)) | {"dtype": case.dtype, "threads": threads}
    return {name: str(value) for name, value in names.items()}


def _report(options: argparse.Namespace) -> None:
    rows = store.newest(store.read(options.results))
    rows = [row for row in rows if row["allocator"].startswith(options.allocator)]
    if not rows:
        sys.exit(f"{options.results} has no rows measured with --allocator {options.allocator}")
    rows = [row for row in rows if row["machine"] == rows[-1]["machine"]]  # one machine a report: the last used
    text = report.markdown(rows)
    if options.readme is None:
        print(text)
    else:
        report.write_between_marks(options.readme, text)
    if options.plot is not None:
        from benchmarks.plot import draw

        draw(rows, options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
