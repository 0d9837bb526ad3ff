"""Where the time of a training step goes, part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch

from dien_kernels.data import Prepared
from dien_kernels.ops import use_backend
from dien_kernels.training import setup
from dien_kernels.training.config import Config
from dien_kernels.training.optimizer import make_optimizer
from dien_kernels.training.step import training_step

PARTS = (
    "data",
    "embedding",
    "extractor",
    "auxiliary",
    "attention",
    "evolution",
    "mlp",
    "loss",
    "optimiser",
    "other",
)


class _Clock:
    """Adds the time since the last mark to the part that was running."""

    def __init__(self, device: torch.device) -> None:
        self.forward: dict[str, float] = {}
        self.backward: dict[str, float] = {}
        self._device = device
        self._into, self._part = self.forward, "other"
        self._last = time.perf_counter()

    def mark(self, part: str, into: dict[str, float] | None = None) -> None:
        """From now on the time is ``part``'s (and goes into ``into``, if given)."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._into[self._part] = self._into.get(self._part, 0.0) + now - self._last
        self._last, self._part = now, part
        self._into = self._into if into is None else into


class _Parts:
    """The model's ``part`` hook: times the forward and remembers which autograd nodes each part created."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._leaf = torch.zeros((), requires_grad=True)
        self.spans: list[tuple[int, int, str]] = []

    def number(self) -> int:
        """The number of the next autograd node: nodes are numbered in the order in which they are created."""
        node: Any = (self._leaf + 0).grad_fn
        return int(node._sequence_nr())

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer = self._clock._part
        start = self.number()
        self._clock.mark(name)
        yield
        self._clock.mark(outer)
        self.spans.append((start, self.number(), name))

    def of(self, number: int) -> str:
        """The innermost part during which the node with this number was created."""
        inside = [(end - start, name) for start, end, name in self.spans if start <= number < end]
        return min(inside)[1] if inside else "loss"


def _nodes(root: Any) -> Iterator[Any]:
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [below for below, _ in node.next_functions]


def _hook_backward(loss: torch.Tensor, parts: _Parts, clock: _Clock) -> None:
    """Let the clock change to a node's part before each node of the backward pass runs."""

    def hook(name: str) -> Callable[[Any], None]:
        return lambda gradients: clock.mark(name)

    for node in _nodes(loss.grad_fn):
        # Nodes that add to a parameter's gradient have no place in the order; their time goes to the node
        # before them.
        if node.name() != "torch::autograd::AccumulateGrad":
            node.register_prehook(hook(parts.of(node._sequence_nr())))


def time_parts(config: Config, prepared: Prepared, *, steps: int = 20, warm: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds a training step spends in each part: {"forward": {part: ms}, "backward": {part: ms}}.

    A fresh model of the config takes ``warm`` + ``steps`` steps on training batches. The forward is timed by
    the model's ``part`` hooks. In the backward each autograd node belongs to the part whose forward made it,
    and the clock is read before every node. "data" is the wait for batches, "loss" what comes after the last
    part, "other" the rest of the forward; "data" and "optimiser" (clipping included) stand under "forward".
    Reading the clock costs a little; on CUDA it also waits for the device, so that the sum is above the time
    of an undisturbed step.
    """
    device = setup.device_of(config)
    model: Any = setup.model_for(config, prepared)
    options, chosen = config.training, config.optimizer
    optimizer = make_optimizer(model, chosen.name, lr=chosen.lr, table_lr=chosen.table_lr, **chosen.options)
    loader = setup.open_loader(config, prepared, "train")
    clock = _Clock(device)
    scaler = setup.make_scaler(config)
    done = 0

    def watch(part: str, loss: torch.Tensor | None) -> None:
        if part == "forward":
            model.part = _Parts(clock)
            clock.mark("other", clock.forward)
        elif part == "loss":
            clock.mark("loss")
        elif part == "backward":
            _hook_backward(cast(torch.Tensor, loss), model.part, clock)
            clock.mark("loss", clock.backward)
        elif part == "optimizer":
            clock.mark("optimiser", clock.forward)
        else:
            clock.mark("data")

    with use_backend(options.backend):
        while done < warm + steps:
            batches = setup.batches(config, loader, 0)
            while done < warm + steps and (group := list(islice(batches, options.accumulate))):
                if done == warm:
                    clock.mark("data")
                    clock.forward.clear()
                    clock.backward.clear()
                setup.seed_step(options.seed, 0, done)
                training_step(
                    model,
                    group,
                    optimizer,
                    device=device,
                    scaler=scaler,
                    clip_norm=options.clip_norm,
                    autocast=lambda: setup.autocast(config),
                    watch=watch,
                )
                done += 1
    order = {name: i for i, name in enumerate(PARTS)}
    return {
        side: {k: 1e3 * v / steps for k, v in sorted(times.items(), key=lambda kv: order.get(kv[0], len(PARTS)))}
        for side, times in (("forward", clock.forward), ("backward", clock.backward))
    }
