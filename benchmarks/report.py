"""From the stored rows to docs/benchmarks.md and to the README's section on speed: ``python -m benchmarks report``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.registry import BASES, DIENS, MODELS, OURS, OWN, STEP_BATCHES, TITLES, WRONG_GRADIENT
from benchmarks.store import Row, interval

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
NEAREST = 12  # rows of the table of the peers that come nearest
OPS = {
    "gru": "GRU",
    "augru": "AUGRU",
    "attention_bilinear": "bilinear attention scores",
    "attention_din": "DIN attention scores",
    "auxiliary_inner": "auxiliary loss, inner product",
    "auxiliary_mlp": "auxiliary loss, MLP",
    **dict.fromkeys(MODELS, "DIEN"),
}
MODES = {
    "fwd": "forward",
    "fwd+bwd": "forward + backward",
    "call": "forward",
    "step": "training step",
    "request": "request",
}
# The peers of the recurrences as the tables have them, a line each: the op, the title, and the providers.
RECURRENT = (
    ("gru", TITLES["torch_gru_padded"], ("torch_gru_padded",)),
    ("gru", TITLES["torch_gru_packed"], ("torch_gru_packed",)),
    ("gru", TITLES["compiled_loop"], ("compiled_loop",)),
    ("gru", TITLES["onednn"], ("onednn",)),
    ("gru", TITLES["openvino"], ("openvino",)),
    ("augru", TITLES["eager_loop"], ("eager_loop",)),
    ("augru", TITLES["compiled_loop"], ("compiled_loop",)),
    ("augru", TITLES["onednn"], ("onednn",)),
    ("augru", TITLES["openvino"], ("openvino",)),
    ("augru", "DeepCTR-Torch, RecBole, FuxiCTR", ("deepctr_augru", "recbole_augru", "fuxictr_augru")),
    ("augru", TITLES["rechub_augru"], ("rechub_augru",)),
)


def title(provider: str) -> str:
    return TITLES.get(provider, provider)


def one_line(row: Row) -> str:
    """A row as a run prints it."""
    if not row.get("p50_us"):
        return f"{row['provider']}: {row['note']}"
    ratio = f", {_exact(row)}" if row.get("ratio") and row["provider"] not in BASES else ""
    memory = f", peak {row['peak_mem_mb']} MB" if row.get("peak_mem_mb") else ""
    wrong = ", wrong gradient" if row["note"].startswith(WRONG_GRADIENT) else ""
    return f"{row['provider']}: {duration(float(row['p50_us']))}{ratio}{memory}{wrong}"


def duration(us: float) -> str:
    return f"{us:.1f} µs" if us < 1e3 else f"{us / 1e3:.1f} ms" if us < 1e4 else f"{us / 1e3:.0f} ms"


def times(ratio: float) -> str:
    """Three digits at most: 0.51×, 5.7×, 12×."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:.0f}×"


def _exact(row: Row) -> str:
    low, high = interval(row)
    return f"{times(float(row['ratio']))} ({times(low)[:-1]}–{times(high)[:-1]})"


def _range(rows: Iterable[Row]) -> str:
    """The lowest and the highest ratio."""
    ratios = sorted(float(row["ratio"]) for row in rows if row["ratio"])
    if not ratios:
        return ""
    low, high = times(ratios[0]), times(ratios[-1])
    return low if low == high else f"{low[:-1]}–{high}"


def select(rows: Iterable[Row], **columns: object) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == str(value) for name, value in columns.items())]


def _one(rows: Iterable[Row], show: Callable[[Row], str], **columns: object) -> str:
    """What ``show`` makes of the row that has these values; a dash without a row or a number."""
    found = [row for row in select(rows, **columns) if row["p50_us"]]
    return show(found[0]) if found else "–"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def environment(rows: Sequence[Row]) -> str:
    """Machine, versions and commits of the rows, in a line."""

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))

    threads = " and ".join(_threads(rows))
    threads += f" thread{'s' * (threads != '1')}"
    return (
        f"{values('machine')}, {values('cores')} cores, {values('isa')}, {threads}, {values('dtype')}; "
        f"torch {values('torch')}, Python {values('python')}; dien_kernels at {values('git_sha')}."
    )


# docs/benchmarks.md


def page(rows: Sequence[Row], repeats: str = "", root: str = "../") -> str:
    """The whole page. ``root`` is the way from it to the repository's root, ``repeats`` a sentence on repeat runs."""
    sections = [
        _section("A training step of DIEN", STEP_WORDS, _steps(rows)),
        _section("A scoring request", REQUEST_WORDS, _requests(rows)),
        _section("Recurrences, forward and backward", RECURRENCE_WORDS, _recurrences(rows, "fwd+bwd")),
        _section("Recurrences, forward only", "As above, in inference mode.", _recurrences(rows, "fwd")),
        _section("Attention scores and auxiliary loss", UNIT_WORDS, _units(rows)),
        _section("Where others come nearest", _nearest_words(rows), _nearest(rows)),
    ]
    intro = INTRO.format(root=root, environment=environment(rows), repeats=repeats)
    return "\n\n".join([intro.replace("\n\n\n", "\n\n"), *filter(None, sections), NOT_MEASURED.format(root=root)])


INTRO = """# Benchmarks

How long other software takes for the work of dien_kernels: 12× means twelve times as long; below 1 the other one is
faster. A ratio is the median over rounds in which all take turns; in brackets, the lowest and the highest median of a
session (ten sessions a run). "Ragged" histories have between 1 and T behaviours, T/4 on average; "full" ones have T.
{repeats}

{environment}

Everything else that was measured, with times, quantiles, peak memory and notes on each peer, is in
[results/cpu.csv]({root}benchmarks/results/cpu.csv). How it was measured, and what each peer computes, is in
[benchmarks/README.md]({root}benchmarks/README.md)."""
STEP_WORDS = """\
Forward, both losses, backward and Adam with dense gradients; T = 100, 36 numbers a behaviour, the auxiliary
loss with an MLP. DeepCTR-Torch and RecBole compute the function of our model. torch-rechub trains a smaller model and
FuxiCTR leaves out the auxiliary loss, so both do less work. The last column is our own model under `torch.compile`."""
REQUEST_WORDS = """\
One user with 100 behaviours, and some candidates to score. The other libraries repeat the history for
every candidate; FuxiCTR cannot score a single one. The last column is our own model under `torch.compile`."""
RECURRENCE_WORDS = """\
Each cell has the lowest and the highest ratio with 1 and 2 threads; the last column those of all
four sizes. On ragged histories oneDNN, OpenVINO, the padded `torch.nn.GRU`, torch-rechub and the loops compute the
padding as well; the others pack."""
UNIT_WORDS = "Against the same computation in plain PyTorch, with 1 and 2 threads."
NOT_MEASURED = """## What is not measured

- **GPUs.** The CUDA and Triton kernels have never run on one.
- **Other CPUs.** All rows come from one virtual machine that shares its caches with others. It has AVX2; the AVX-512
  kernels are tested but not timed.
- **More than two threads**, several processes at a time, and energy.
- **Other types.** Only float32 is timed.
- **Real logs.** Ids are uniform, which is the worst for caches and for sparse gradients, and lengths are drawn.
- **TensorFlow**, and so the authors' code and DeepCTR.

In the CSV but not on this page: short histories (T = 1, 7, 20), single calls, gates recomputed instead of kept, one
history shared by 1,000 rows, the data loader, sparse tables, DIEN with the inner-product auxiliary loss, and memory."""


def _section(heading: str, words: str, found: tuple[list[str], list[list[str]]]) -> str:
    head, lines = found
    return f"## {heading}\n\n{words}\n\n{table(head, lines)}" if lines else ""


def _threads(rows: Iterable[Row]) -> list[str]:
    return sorted({row["threads"] for row in rows}, key=int)


def _steps(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    rows = select(rows, suite="step", op="dien_mlp")
    columns = (*DIENS, "step_compiled")
    head = ["batch", "histories", "threads", OURS, *map(title, DIENS), "ours, compiled"]
    lines = []
    for batch, lengths in [(b, d) for b in STEP_BATCHES for d in ("ragged", "full")]:
        for threads in _threads(rows):
            case = {"B": batch, "length_distribution": lengths, "threads": threads}
            ours = _one(rows, lambda row: duration(float(row["p50_us"])), provider=OURS, **case)
            cells = [_one(rows, _exact, provider=name, **case) for name in columns]
            if ours != "–":
                lines.append([f"{batch:,}", lengths, threads, ours, *cells])
    return head, lines


def _requests(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    rows = select(rows, suite="score")
    peers = [name for name in DIENS if select(rows, provider=name)]
    head = ["candidates", "threads", OURS, "its 99th percentile", *map(title, peers), "ours, compiled"]
    lines = []
    for batch in sorted({int(row["B"]) for row in rows}):
        for threads in _threads(rows):
            case = {"B": batch, "threads": threads}
            ours = [
                _one(rows, lambda row, name=name: duration(float(row[name] or "nan")), provider=OURS, **case)  # type: ignore[misc]
                for name in ("p50_us", "p99_us")
            ]
            cells = [_one(rows, _exact, provider=name, **case) for name in (*peers, "score_compiled")]
            lines.append([f"{batch:,}", threads, *ours, *cells])
    return head, lines


def _recurrences(rows: Sequence[Row], mode: str) -> tuple[list[str], list[list[str]]]:
    rows = [row for row in select(rows, mode=mode) if row["suite"] in ("speed", "peers")]
    sizes = list(dict.fromkeys(tuple(row[name] for name in "BTIH") for row in rows))
    heads = [f"B {b}, T {t}, H {h}" for b, t, _, h in sizes]
    lines = []
    for op, name, providers in RECURRENT:
        own = [row for row in select(rows, op=op) if row["provider"] in providers and row["ratio"]]
        full = [row for row in own if row["length_distribution"] == "full"]
        cells = [_range(row for row in full if tuple(row[n] for n in "BTIH") == size) or "–" for size in sizes]
        ragged = _range(select(own, length_distribution="ragged"))
        if own:
            lines.append([OPS[op], name, *cells, ragged or "–"])
    return ["op", "compared with", *(f"full: {head}" for head in heads), "ragged, all sizes"], lines


def _units(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    rows = [row for row in select(rows, suite="units") if row["ratio"] and row["provider"] != OURS]
    kinds = list(dict.fromkeys((row["length_distribution"], *(row[name] for name in "BTH")) for row in rows))
    head = ["op", "", *(f"{kind[0]}: B {kind[1]}, T {kind[2]}, H {kind[3]}" for kind in kinds)]
    lines = []
    for op, mode in dict.fromkeys((row["op"], row["mode"]) for row in rows):
        own = select(rows, op=op, mode=mode)
        cells = [_range(row for row in own if (row["length_distribution"], row["B"]) == kind[:2]) for kind in kinds]
        lines.append([OPS[op], MODES[mode], *cells])
    return head, lines


def _compared(rows: Iterable[Row]) -> list[Row]:
    """The ratios to software that is not ours."""
    return [row for row in rows if row["ratio"] and row["provider"] not in OWN]


def _nearest_words(rows: Sequence[Row]) -> str:
    ratios = [float(row["ratio"]) for row in _compared(rows)]
    faster, close = sum(ratio < 1 for ratio in ratios), sum(1 <= ratio < 1.25 for ratio in ratios)
    return (
        f"The CSV has {len(ratios)} comparisons with other software. In {faster} of them the other one is faster, and "
        f"in {close}\nit takes less than 1.25 times as long. The nearest case of each suite, op, mode and peer:"
    )


def _nearest(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    nearest: dict[tuple[str, ...], Row] = {}
    for row in sorted(_compared(rows), key=lambda row: float(row["ratio"])):
        nearest.setdefault(tuple(row[name] for name in ("suite", "op", "mode", "provider")), row)
    lines = []
    for row in list(nearest.values())[:NEAREST]:
        case = ", ".join(f"{name} {row[name]}" for name in ("B", "T", "H")) + f", {row['length_distribution']}"
        peer = title(row["provider"]) + " (wrong gradient)" * row["note"].startswith(WRONG_GRADIENT)
        lines.append([OPS[row["op"]], MODES[row["mode"]], case, row["threads"], peer, _exact(row)])
    return ["op", "", "case", "threads", "compared with", "ratio"], lines


# The section in README.md

# The lines of its table: words, and what chooses the rows of one thread: suites, op, mode, B, T, length distribution.
README_CASES = (
    ("DIEN training step, batch 128, ragged", ("step",), "dien_mlp", "step", 128, 100, "ragged"),
    ("DIEN training step, batch 128, full", ("step",), "dien_mlp", "step", 128, 100, "full"),
    ("DIEN training step, batch 1,024, ragged", ("step",), "dien_mlp", "step", 1024, 100, "ragged"),
    ("scoring 100 candidates for one user", ("score",), "dien_mlp", "request", 100, 100, "full"),
    ("GRU forward + backward, H = 64, ragged", ("speed", "peers"), "gru", "fwd+bwd", 1024, 50, "ragged"),
    ("GRU forward + backward, H = 64, full", ("speed", "peers"), "gru", "fwd+bwd", 1024, 50, "full"),
)


def readme(rows: Sequence[Row], repeats: str = "") -> str:
    """The section between its two marks."""
    lines, used = [], []
    for words, suites, *values in README_CASES:
        columns = dict(zip(("op", "mode", "B", "T", "length_distribution"), values, strict=True))
        case = [row for row in select(rows, threads=1, **columns) if row["suite"] in suites]
        peers = sorted(_compared(case), key=lambda row: float(row["ratio"]))
        ours = select(case, provider=OURS)
        if peers and ours:
            ends = (f"{title(row['provider'])}: {times(float(row['ratio']))}" for row in (peers[0], peers[-1]))
            lines.append([words, duration(float(ours[0]["p50_us"])), *ends])
            used += [*ours, *peers]
    steps = [float(row["ratio"]) for row in _compared(select(rows, suite="step", op="dien_mlp"))]
    how_long = f"{int(min(steps))} to {int(max(steps))}" if steps else "several"
    return "\n\n".join((
        f"On a CPU, a training step of DIEN takes {how_long} times as long in DeepCTR-Torch, RecBole, torch-rechub "
        "and FuxiCTR\nas in dien_kernels.",
        "![Bars: how long a training step of DIEN and a GRU take in other software](docs/speed.svg)",
        table(("one thread", OURS, "fastest other", "slowest other"), lines),
        "3.0× means three times as long as dien_kernels. Ragged histories have T/4 behaviours on average. torch-rechub "
        "trains a\nsmaller model, and FuxiCTR leaves out the auxiliary loss. "
        f"{repeats}".strip(),
        f"{environment(used)}\n[Details](docs/benchmarks.md), with the cases in which others are as fast or faster.",
    ))  # fmt: skip


def write_between_marks(page: Path, words: str) -> None:
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{words}\n{END}{after}")
