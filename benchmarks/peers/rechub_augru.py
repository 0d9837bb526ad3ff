"""torch-rechub's AUGRU cell on the padded batch, in the loop of its AUGRU.

That layer computes its attention itself, so it cannot be given one: its few lines around the cell are repeated here. It
runs through the padding. Its cell has one bias a gate, none within the reset: it is compared with that function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Program, Tensors
from benchmarks.peers.rechub_dien import VERSION, absent, module
from benchmarks.registry import COMPUTES_PADDING, Case

__all__ = ["absent", "build"]

GATES = "ruh"  # its names of ours


def build(case: Case, inputs: Inputs) -> Program:
    cell = module().AUGRU_Cell(case.hidden)
    own = {name: leaf.detach() for name, leaf in inputs.leaves.items()}
    leaves = {name: own[name].clone().requires_grad_() for name in ("x", "attention")} | dict(cell.named_parameters())
    x, attention = leaves["x"], leaves["attention"]
    with torch.no_grad():
        for gate, w_ih, w_hh, b_ih, b_hh in zip(
            GATES, *(own[name].chunk(3) for name in ("w_ih", "w_hh", "b_ih", "b_hh")), strict=True
        ):
            leaves[f"W{gate}"].copy_(w_ih.t())
            leaves[f"U{gate}"].copy_(w_hh.t())
            leaves[f"b{gate}"].copy_(b_ih if gate == "h" else b_ih + b_hh)

    def forward() -> Tensor:
        scores = attention.unsqueeze(-1)
        h, outs = torch.zeros(x.size(0), case.hidden, device=x.device), []
        for i in range(x.size(1)):
            h = cell(x[:, i], h, scores[:, i])
            outs.append(h.unsqueeze(1))
        return torch.cat(outs, dim=1)

    def as_inputs(found: Tensors) -> Tensors:
        def rows(kind: str, gates: str = GATES) -> Tensor:
            return torch.cat([found[kind + gate].t() for gate in gates])

        b_ih, b_ru = rows("b").squeeze(1), rows("b", "ru").squeeze(1)
        ours = {"x": found["x"], "attention": found["attention"], "w_ih": rows("W"), "w_hh": rows("U"), "b_ih": b_ih}
        return ours | {"b_hh": torch.cat((b_ru, b_ru.new_zeros(case.hidden)))}

    notes = [f"torch-rechub {VERSION}", "one bias a gate"]
    if inputs.lengths is not None:
        notes.append(COMPUTES_PADDING)
    return Program(forward, leaves, "; ".join(notes), as_inputs=as_inputs, variant="one_bias")
