"""What prepare, append, the loader and the vocabularies cost, by the size of the log: rows of results/data.csv.

    python -m benchmarks.data                       # logs of 10^6, 10^7 and 5 * 10^7 events; needs 4 GB of disk
    python -m benchmarks.data --events 1000000 --out mine.csv

Each part runs in a process of its own. CPU seconds are of that process and its threads. Memory is the growth of its
anonymous memory (``RssAnon`` of Linux, looked at every 20 ms) over that after the imports.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import ROOT, environment

OUT = Path(__file__).resolve().parent / "results" / "data.csv"
COLUMNS = (
    *("part", "events", "users", "items", "value", "unit", "note"),
    *("machine", "cores", "python", "torch", "polars", "pyarrow", "dien_kernels", "git_sha", "date"),
)
EVENTS = (1_000_000, 10_000_000, 50_000_000)
EACH = 25  # events of a user, on average
PIECE = 1_000_000  # events that are made at a time
VALUES = 10_000_000  # of the vocabulary
BATCHES = 200
Found = list[tuple[str, float, str, str]]  # part, value, unit, note


def make_log(path: Path, events: int, seed: int = 0) -> None:
    """A synthetic log of ``events`` events, in pieces of users of their own over the same items, by time in each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dien_kernels.data import synthetic

    users = PIECE // EACH
    writer: Any = None
    for piece in range(max(events // PIECE, 1)):
        size = min(events, PIECE)
        table = synthetic(
            users=min(users, size // EACH), items=items_of(events), categories=1000, events=size, seed=seed + piece
        )
        user = pa.array(table["user"].to_numpy().astype(np.int64) + piece * users)
        category = pa.array(table["item"].to_numpy() % 1000)  # the same in all pieces
        table = table.set_column(0, "user", user).set_column(2, "category", category)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def items_of(events: int) -> int:
    return max(min(events // 10, 2_000_000), 1000)


@contextmanager
def watched() -> Iterator[Callable[[], tuple[float, float]]]:
    """Yields a function that tells CPU seconds and MB of anonymous memory since the start."""
    stop, peak, base = threading.Event(), [0.0], _anonymous_mb()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], _anonymous_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin = time.process_time()
    try:
        yield lambda: (time.process_time() - begin, max(peak[0], _anonymous_mb()) - base)
    finally:
        stop.set()
        watcher.join()


def _anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon")


def prepare_part(log: str, folder: str) -> Found:
    import importlib

    module = importlib.import_module("dien_kernels.data.prepare")
    seconds: dict[str, float] = {}

    def timed(holder: Any, name: str, part: str) -> None:
        inner = getattr(holder, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            result = inner(*args, **kwargs)
            seconds[part] = seconds.get(part, 0.0) + time.process_time() - begin
            return result

        setattr(holder, name, outer)

    timed(module, "deal", "deal")
    timed(module, "give_ids", "vocabularies")
    timed(module, "make_rule", "splits")
    timed(module.ShardWriter, "write", "sort")
    with watched() as so_far:
        prepared = module.prepare(log, folder, targets="every", progress=False)
        total, peak = so_far()
    rows = prepared.meta["report"]["rows"]
    found = [(f"prepare: {part}", second / rows * 1e6, "CPU-us an event", "") for part, second in seconds.items()]
    both = (seconds["deal"] + seconds["splits"] + seconds["sort"]) / rows * 1e6
    return [
        *found,
        ("prepare: deal and sort", both, "CPU-us an event", "deal, splits and sort; reading the log is in it"),
        ("prepare", total / rows * 1e6, "CPU-us an event", "targets every, one item field"),
        ("prepare: memory", peak, "MB", ""),
    ]


def loader_part(_: str, folder: str) -> Found:
    import torch

    from dien_kernels.data import Loader, Prepared

    torch.set_num_threads(1)
    with watched() as so_far:
        prepared = Prepared.open(folder)
        loader = Loader(prepared, "train", batch_size=1024)
        begin = time.process_time()
        loader._plan_of(0)
        plan = time.process_time() - begin
        loader.batch(0, 0)
        begin, rows, steps, histories = time.process_time(), 0, 0, 0
        for number in range(1, min(BATCHES, len(loader))):
            batch = loader.batch(0, number)
            rows += batch.rows
            steps += int(batch.offsets[-1])
            histories += batch.offsets.shape[0] - 1
        spent = time.process_time() - begin
        _, peak = so_far()
    note = f"batch 1024, 1 negative and 1 of the auxiliary loss, {steps / histories:.0f} behaviours a history"
    return [
        ("loader", rows / spent, "rows a CPU-second", note),
        ("loader: plan of an epoch", plan, "CPU-s", ""),
        ("loader: memory", peak, "MB", ""),
    ]


def append_part(log: str, folder: str) -> Found:
    """The events of a new day, 1 % as many, of users of whom four in five are known."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dien_kernels.data.append import append

    rows = pq.ParquetFile(log).metadata.num_rows
    random, count = np.random.default_rng(1), rows // 100
    day = Path(folder).with_name("day.parquet")
    item = random.integers(0, items_of(rows), count)
    table = {
        "user": random.integers(0, int(1.25 * rows / EACH), count),
        "item": item.astype(np.int32),
        "category": item % 1000,
        "timestamp": np.full(count, 2_000_000_000),
    }
    first = pq.ParquetFile(log).schema_arrow
    pq.write_table(pa.table({name: pa.array(column, first.field(name).type) for name, column in table.items()}), day)
    with watched() as so_far:
        append(day, folder, progress=False)
        total, peak = so_far()
    return [("append of 1 %", total, "CPU-s", ""), ("append of 1 %: memory", peak, "MB", "")]


def encode_part(_: str, __: str) -> Found:
    import pyarrow as pa

    from dien_kernels.data import Vocabulary

    found: Found = []
    random = np.random.default_rng(0)
    numbers = random.permutation(4 * VALUES)[:VALUES].astype(np.int64) * 1_000_003
    kinds = {"integers": pa.array(numbers), "text of 10 bytes": pa.array([f"B{n:09d}" for n in range(VALUES)])}
    for kind, values in kinds.items():
        vocabulary = Vocabulary(values, np.zeros(VALUES + 1, np.int64))
        asked = values.take(pa.array(random.integers(0, VALUES, 200)))
        begin = time.process_time()
        vocabulary.encode(asked)
        first, times = time.process_time() - begin, []
        for _ in range(200):
            begin = time.perf_counter()
            vocabulary.encode(asked)
            times.append(time.perf_counter() - begin)
        found.append((f"encode: 200 {kind}", float(np.median(times)) * 1e6, "us", "median of 200 calls"))
        found.append((f"encode: first call, {kind}", first, "CPU-s", "it makes the index"))
    return found


PARTS = {"prepare": prepare_part, "loader": loader_part, "append": append_part}


def _in_process(part: str, log: Path, folder: Path) -> Found:
    command = [sys.executable, "-m", "benchmarks.data", "--part", part, str(log), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{part}: {done.stderr.strip()[-2000:]}")
    found: Found = [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]  # type: ignore[misc]
    return found


def measure(sizes: list[int], out: Path, work: Path) -> None:
    import polars
    import pyarrow

    facts = environment("default")
    common = {name: facts[name] for name in ("machine", "cores", "python", "torch", "dien_kernels", "git_sha")}
    common |= {"polars": polars.__version__, "pyarrow": pyarrow.__version__}
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if fresh:
            writer.writeheader()

        def store(rows: Found, **sizes_of: int) -> None:
            date = datetime.now(timezone.utc).isoformat(timespec="seconds")
            for part, value, unit, note in rows:
                row = {"part": part, "value": f"{value:.4g}", "unit": unit, "note": note, "date": date}
                writer.writerow(row | common | sizes_of)
                print(*sizes_of.values(), part, f"{value:.4g}", unit, flush=True)
            file.flush()

        for events in sizes:
            log, folder = work / "log.parquet", work / "prepared"
            make_log(log, events)
            for part in PARTS:
                found = _in_process(part, log, folder)
                store(found, events=events, users=events // EACH, items=items_of(events))
            shutil.rmtree(folder)
        store(_in_process("encode", Path("-"), Path("-")), items=VALUES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=list(EVENTS), help="sizes of the logs")
    parser.add_argument("--out", type=Path, default=OUT, help="the CSV to which rows are added")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, log, folder = options.part
        print(json.dumps((PARTS | {"encode": encode_part})[part](log, folder)))
        return
    with tempfile.TemporaryDirectory() as work:
        measure(options.events, options.out, Path(work))


if __name__ == "__main__":
    main()
