"""What is measured: the cases, the suites they belong to, and the providers of each. ``check.py`` has the targets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

# The ops of the package and the names their variants have here and in the results.
OPS = {
    "recurrence": ("gru", "augru", "augru_shared"),
    "attention": ("attention_bilinear", "attention_din"),
    "auxiliary_loss": ("auxiliary_inner", "auxiliary_mlp"),
}
# Whole models, by their auxiliary loss, and the loader by its worker processes.
MODELS = ("dien_mlp", "dien_inner")
LOADERS = ("loader_0", "loader_2")
NAMES = (*sum(OPS.values(), ()), *MODELS, *LOADERS)
MODES = ("fwd", "fwd+bwd", "call", "step", "load", "request")
OURS = "dien_kernels"
BASES = (OURS, "gates_keep")  # ratios are relative to these
COMPUTES_PADDING = "computes the padding; compared on valid steps"  # note of a peer without lengths, on ragged rows
WRONG_GRADIENT = "wrong-gradient"  # begins the note of a peer that is timed although its gradients are wrong
# The package with its defaults and with other settings; every other provider is a peer.
OWN = (
    *(OURS, "gates_keep", "gates_recompute"),
    *("step_sparse", "step_reference", "step_compiled", "score_compiled"),
    *("step_mlp", "step_inner"),
    *("history_repeated", "no_projection"),
)
DIFFERENT_WORK = ("no_projection", "rechub_dien", "fuxictr_dien")  # they compute less than the case
LENGTH_DISTRIBUTIONS = ("full", "ragged")
THREADS = (1, 2)  # the numbers of threads that have targets

# (B, T, I, H)
SPEED_SIZES = ((128, 100, 36, 36), (1024, 50, 64, 64), (1024, 100, 128, 128), (256, 200, 64, 64))
COMPILED_SIZES = SPEED_SIZES[:2]  # a compiled loop takes longer to compile than all the others to run
SHORT_STEPS = (1, 7, 20)
CALLABLE_STEPS = (1, 7)  # the lengths at which every peer that Python can call takes part
SHORT_WIDTHS = (36, 64)
CALL_WIDTHS = (36, 64, 128)
SERVE_STEPS, SERVE_WIDTHS = 100, (36, 64)  # for a single history
UNIT_SIZES = SPEED_SIZES[:2]

STEP_BATCHES = (128, 1024)
MODEL_SIZE = (100, 36, 36)  # T, I, H
CANDIDATES = (1, 100, 1000)
SHARED_SIZE = (1000, 100, 36, 36)  # candidates for one history

# The hidden widths of the papers' networks.
DIN_WIDTHS = (80, 40)
AUXILIARY_WIDTHS = (100, 50)
MLP_WIDTHS = (200, 80)
# Rows of the embedding tables of the whole models. An item's embedding is a row of each of the first two, concatenated.
ITEM_FIELDS = {"item": 50_000, "category": 1_000}
USER_FIELDS = {"user": 10_000}

RECURRENT_PEERS = {"gru": ("torch_gru_padded", "torch_gru_packed"), "augru": ("eager_loop",)}
# The AUGRUs of libraries that have a whole DIEN.
LOOPS = ("deepctr_augru", "recbole_augru", "rechub_augru", "fuxictr_augru")
# Libraries in C++; the second has no backward.
LIBRARIES = ("onednn", "openvino")
DIENS = ("deepctr_dien", "recbole_dien", "rechub_dien", "fuxictr_dien")
# How pages call the providers.
TITLES = {
    "dien_kernels": "dien_kernels",
    "torch_gru_padded": "torch.nn.GRU, padded",
    "torch_gru_packed": "torch.nn.GRU, packed",
    "torch_gru_packed_unpacked": "torch.nn.GRU, packed and padded again",
    "eager_loop": "loop in PyTorch",
    "compiled_loop": "loop under torch.compile",
    "eager_attention": "plain PyTorch",
    "eager_auxiliary": "plain PyTorch",
    "onednn": "oneDNN",
    "openvino": "OpenVINO",
    "deepctr_augru": "DeepCTR-Torch",
    "recbole_augru": "RecBole",
    "rechub_augru": "torch-rechub",
    "fuxictr_augru": "FuxiCTR",
    "deepctr_dien": "DeepCTR-Torch",
    "recbole_dien": "RecBole",
    "rechub_dien": "torch-rechub",
    "fuxictr_dien": "FuxiCTR",
}
# Peers that some of the cases have in addition.
MORE_PEERS = {("gru", "ragged"): ("torch_gru_packed_unpacked",)}


class Case(NamedTuple):
    """One problem and the providers that are timed on it in turns; ratios are relative to the first of them."""

    suite: str
    op: str
    # "fwd"; "fwd+bwd"; "call": a forward whose cost is the calling, not the arithmetic; "step": fwd+bwd with the
    # optimiser's step; "load": the next batch; "request": a forward whose slow calls matter too
    mode: str
    batch: int
    steps: int
    inputs: int
    hidden: int
    # "full": every row has T steps; "ragged": between 1 and T, T/4 on average; "log": as in the log of the suite
    length_distribution: str
    dtype: str
    providers: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.batch, self.steps, self.inputs, self.hidden

    @property
    def trains(self) -> bool:
        return self.mode in ("fwd+bwd", "step")

    @property
    def infers(self) -> bool:
        return self.mode in ("fwd", "call", "request")

    def __str__(self) -> str:
        size = ",".join(map(str, self.size))
        return f"{self.suite}: {self.op} {self.mode} {self.length_distribution} B,T,I,H={size}"


def _speed() -> Iterator[Case]:
    for size, lengths, op, mode in product(SPEED_SIZES, LENGTH_DISTRIBUTIONS, ("gru", "augru"), ("fwd", "fwd+bwd")):
        providers = (OURS, *RECURRENT_PEERS[op], *MORE_PEERS.get((op, lengths), ()))
        yield Case("speed", op, mode, *size, lengths, "float32", providers)


def _peers() -> Iterator[Case]:
    """The cases of ``speed`` against the peers that must be installed, or take long to compile."""
    loops = {"gru": (), "augru": LOOPS}
    for size, lengths, op, mode in product(SPEED_SIZES, LENGTH_DISTRIBUTIONS, ("gru", "augru"), ("fwd", "fwd+bwd")):
        compiled = ("compiled_loop",) if size in COMPILED_SIZES else ()
        providers = (OURS, *loops[op], *compiled, *LIBRARIES[: 2 if mode == "fwd" else 1])
        yield Case("peers", op, mode, *size, lengths, "float32", providers)


def _short() -> Iterator[Case]:
    ops = {"gru": RECURRENT_PEERS["gru"], "augru": ("eager_loop", *LOOPS)}
    for width, steps, lengths, op, mode in product(
        SHORT_WIDTHS, SHORT_STEPS, LENGTH_DISTRIBUTIONS, ops, ("fwd", "fwd+bwd")
    ):
        if (steps > 1 or lengths == "full") and (steps in CALLABLE_STEPS or op == "gru"):
            more = ("openvino",) if mode == "fwd" and steps in CALLABLE_STEPS else ()
            more += (
                ("compiled_loop",) if width == SHORT_WIDTHS[0] and lengths == "full" and steps in CALLABLE_STEPS else ()
            )
            yield Case("short", op, mode, 128, steps, width, width, lengths, "float32", (OURS, *ops[op], *more))


def _latency() -> Iterator[Case]:
    for op, width in product(("gru", "augru"), CALL_WIDTHS):
        providers = (OURS, RECURRENT_PEERS[op][0])
        yield Case("latency", op, "call", 1, 1, width, width, "full", "float32", providers)
        yield Case("latency", op, "fwd+bwd", 1, 1, width, width, "full", "float32", providers)
    for op, width in product(("gru", "augru"), SERVE_WIDTHS):
        providers = (OURS, RECURRENT_PEERS[op][0], *LIBRARIES)
        yield Case("latency", op, "fwd", 1, SERVE_STEPS, width, width, "full", "float32", providers)


def _gates() -> Iterator[Case]:
    for size, lengths, op in product(SPEED_SIZES, LENGTH_DISTRIBUTIONS, ("gru", "augru")):
        yield Case("gates", op, "fwd+bwd", *size, lengths, "float32", ("gates_keep", "gates_recompute"))


def _units() -> Iterator[Case]:
    peers = {"attention": "eager_attention", "auxiliary_loss": "eager_auxiliary"}
    for size, lengths, group in product(UNIT_SIZES, LENGTH_DISTRIBUTIONS, peers):
        for op, mode in product(OPS[group], ("fwd", "fwd+bwd")):
            yield Case("units", op, mode, *size, lengths, "float32", (OURS, peers[group]))


def _shared() -> Iterator[Case]:
    providers = (OURS, "no_projection", "history_repeated")
    yield Case("shared", "augru_shared", "fwd", *SHARED_SIZE, "full", "float32", providers)


def _step() -> Iterator[Case]:
    for batch, lengths, op in product(STEP_BATCHES, LENGTH_DISTRIBUTIONS, MODELS):
        models = DIENS if op == "dien_mlp" or lengths == "ragged" else ()
        providers = (OURS, "step_sparse", "step_compiled", "step_reference", *models)
        yield Case("step", op, "step", batch, *MODEL_SIZE, lengths, "float32", providers)


def _loader() -> Iterator[Case]:
    for batch, op in product(STEP_BATCHES, LOADERS):
        yield Case("loader", op, "load", batch, *MODEL_SIZE, "log", "float32", (OURS, "step_mlp", "step_inner"))


def _score() -> Iterator[Case]:
    for count in CANDIDATES:
        providers = (OURS, "score_compiled", "deepctr_dien", "recbole_dien", "fuxictr_dien")
        yield Case("score", "dien_mlp", "request", count, *MODEL_SIZE, "full", "float32", providers)


_SUITES = {
    "speed": _speed,
    "peers": _peers,
    "short": _short,
    "latency": _latency,
    "gates": _gates,
    "units": _units,
    "shared": _shared,
    "step": _step,
    "loader": _loader,
    "score": _score,
}
SUITES = tuple(_SUITES)
# The cases of the suites in one group are measured alternately, as many as fit into memory together.
ROTATIONS = (("speed",), ("peers",), ("step", "score", "loader"), ("short", "latency", "gates", "units", "shared"))
MEMORY_SUITES = ("speed", "gates", "units", "step")  # peak memory is measured as well, in a process of its own


def cases(suite: str) -> list[Case]:
    """The cases of one suite, or of ``"all"``."""
    return [case for name in SUITES if suite in (name, "all") for case in _SUITES[name]()]


def tiny(case: Case) -> Case:
    """The case at a size that takes no time, for tests."""
    width = 6 if case.op in MODELS else 5  # the fields of an item are as wide as one another
    return case._replace(batch=min(case.batch, 4), steps=min(case.steps, 6), inputs=width, hidden=width)


def case_for(case: Case, provider: str) -> Case:
    """The case that the provider computes: a peer's DIEN has one auxiliary loss, whichever of ours it is beside."""
    return case._replace(op="dien_mlp") if provider in DIENS else case
