"""All models once more, from the equations alone: loops over rows and steps, in plain torch.

``docs/models.md`` has the equations. Nothing here comes from the package: ``p`` holds a model's weights under
their ``state_dict`` names, ``o`` every option by name, a batch is plain lists (``tests/models/common.py``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.forms_by_hand import BY_HAND

Weights = dict[str, Tensor]
Options = dict[str, Any]


Item = dict[str, Any]  # field to its id, or to the list of its ids


class History(NamedTuple):
    """Histories of one sequence and the rows that read them; a history counts once in the auxiliary loss."""

    histories: list[list[Item]]  # of each history the behaviours, oldest first
    negatives: list[list[list[Item]]] | None  # of each behaviour its K negatives
    u: list[int]  # the history of each row, by number
    behaviours: list[list[dict[str, int]]]  # of each behaviour its own fields
    numbers: list[list[list[float]]]


class Plain(NamedTuple):
    """Rows and the histories they read."""

    steps: History
    further: dict[str, History]
    targets: list[Item]
    users: list[dict[str, int]]
    dense: list[list[float]]
    labels: list[float]


class Answer(NamedTuple):
    logits: Tensor
    total: Tensor
    click: Tensor
    auxiliary: Tensor | None


def embed(p: Weights, item: Item, o: Options) -> Tensor:
    found = []
    for name, i in item.items():
        table, matrix = p[f"embeddings.items.{name}.weight"], p.get(f"embeddings.projections.{name}.weight")
        values = [table[k] for k in ([k for k in i if k != 0] if isinstance(i, list) else [i])]
        values = [value if matrix is None else matrix @ value for value in values]
        e = sum(values, torch.zeros(len(table[0] if matrix is None else matrix), dtype=table.dtype))
        found.append(e / len(values) if len(values) > 1 and o["embedding.several"] == "mean" else e)
    return torch.cat(found)


def scale(p: Weights, names: list[str], row: list[float], o: Options, statistics: dict[str, Any]) -> Tensor:
    """The numbers of a row or of a behaviour, as the head or the extractor reads them."""
    scaled, flags, vectors = [], [], []
    for name, x in zip(names, row, strict=True):
        entry, missing = statistics.get(name), not math.isfinite(x)
        word = o["dense.scaling"] if isinstance(o["dense.scaling"], str) else o["dense.scaling"].get(name, "standard")
        if word == "quantiles":
            table = next(w for key, w in p.items() if key.endswith(f"dense.quantiles.{name}.table.weight"))
            vectors.append(table[-1] if missing else table[sum(bound <= x for bound in entry["quantiles"])])
            continue
        z = 0.0 if missing else x
        if word == "log" or (word == "standard" and entry is not None and entry["log"]):
            z = math.copysign(math.log(1 + abs(z)), z)
        if word == "standard" and entry is not None:
            z = 0.0 if missing else (z - entry["mean"]) / entry["std"]
        scaled.append(z)
        if o["dense.indicator"] or (o["dense.indicator"] is None and entry is not None and entry["missing"] > 0):
            flags.append(float(missing))
    return torch.cat([torch.tensor([*scaled, *flags], dtype=p["mlp.last.weight"].dtype), *vectors])


def embed_behaviours(
    p: Weights, steps: History, o: Options, names: list[str], statistics: dict[str, Any]
) -> list[list[Tensor]]:
    """Of each history the behaviours: the item, their own fields, their numbers."""
    found = []
    for items, own, numbers in zip(steps.histories, steps.behaviours, steps.numbers, strict=True):
        rows = []
        for item, fields, row in zip(items, own, numbers, strict=True):
            tables = [p[f"embeddings.behaviours.{name}.weight"][i] for name, i in fields.items()]
            rows.append(torch.cat([embed(p, item, o), *tables, scale(p, names, row, o, statistics)]))
        found.append(rows)
    return found


def act(kind: str | None, z: Tensor, slope: Tensor | None) -> Tensor:
    if kind == "sigmoid":
        return 1 / (1 + torch.exp(-z))
    if kind == "relu":
        return z * (z > 0)
    if kind == "prelu":
        return torch.where(z > 0, z, slope * z)
    return z


def gru(
    p: Weights, name: str, xs: list[Tensor], a: list[Tensor] | None, kind: str, o: Options, which: str
) -> list[Tensor]:
    """Every state of one history: equations (1) to (9) of docs/math.md."""
    weight, recurrent = p[f"{name}.weight_ih"], p[f"{name}.weight_hh"]
    size = recurrent.shape[1]
    zero = torch.zeros(3 * size, dtype=weight.dtype)
    bias = o[f"{which}.bias"]
    b = zero if bias is False else p[f"{name}.bias_ih"]
    c = {True: p.get(f"{name}.bias_hh", zero), "tied": b, "single": zero, False: zero}[bias]
    by_hand = BY_HAND[o["evolution.form"] if kind == "augru" else kind]
    side = o[f"{which}.update"] or by_hand.update
    h, states = torch.zeros(size, dtype=weight.dtype), []
    for t, x in enumerate(xs):
        at = a[t] if a is not None else None
        if kind == "aigru":
            x = at * x
        wx, uh = weight @ x + b, recurrent @ h + c
        r = 1 / (1 + torch.exp(-(wx[:size] + uh[:size])))
        z = 1 / (1 + torch.exp(-(wx[size : 2 * size] + uh[size : 2 * size])))
        if o[f"{which}.reset"] == "after":
            n = torch.tanh(wx[2 * size :] + r * uh[2 * size :])
        else:
            n = torch.tanh(wx[2 * size :] + recurrent[2 * size :] @ (r * h) + c[2 * size :])
        u = z if side == "candidate" else 1 - z
        g = by_hand.g(at, u)
        h = (1 - g) * h + g * n
        states.append(h)
    return states


def attention(p: Weights, keys: list[Tensor], target: Tensor, o: Options) -> list[Tensor]:
    query = target
    if o["attention.query"] == "prelu":
        query = p["attention.query.0.weight"] @ target + p["attention.query.0.bias"]
        query = act("prelu", query, p["attention.query.1.weight"])
    scores = []
    for k in keys:
        if o["attention.kind"] == "bilinear":
            e = k @ p["attention.scores.weight"] @ query
        else:
            z = torch.cat([query, k, query - k, query * k])
            count = len(o["attention.units"])
            for i in range(count + 1):
                z = p[f"attention.scores.linears.{i}.weight"] @ z + p[f"attention.scores.linears.{i}.bias"]
                if i < count:
                    slope = p.get(f"attention.scores.activations.{i}.weight")
                    z = act(o["attention.activation"], z, slope)
            e = z[0]
        scores.append(e * (1 if o["attention.scale"] is None else o["attention.scale"]))
    if o["attention.normalize"] == "sigmoid":
        return [1 / (1 + torch.exp(-e)) for e in scores]
    if o["attention.normalize"] is None or not scores:
        return scores
    total = sum(torch.exp(e) for e in scores)
    return [torch.exp(e) / total for e in scores]


def minus_log(x: Tensor, eps: float | str) -> Tensor:
    """-log(sigmoid(x) + eps), or the exact logarithm clamped at 100."""
    if eps == "clamp":
        return torch.log1p(torch.exp(-x)).clamp(max=100)
    return -torch.log(1 / (1 + torch.exp(-x)) + eps)


def pair_logit(p: Weights, h: Tensor, e: Tensor, o: Options) -> Tensor:
    if o["auxiliary.kind"] == "inner":
        return h @ e
    z = torch.cat([h, e])
    if o["auxiliary.norm"] == "fixed":
        z = p["auxiliary.norm.weight"] * z / math.sqrt(1 + 1e-3) + p["auxiliary.norm.bias"]
    count = len(o["auxiliary.units"])
    for i in range(count + 1):
        z = p[f"auxiliary.linears.{i}.weight"] @ z + p[f"auxiliary.linears.{i}.bias"]
        if i < count:
            z = act(o["auxiliary.activation"], z, p.get(f"auxiliary.slopes.{i}.weight"))
    return z[0] if o["auxiliary.outputs"] == 1 else z[0] - z[1]


def auxiliary(p: Weights, states: list[list[Tensor]], plain: History, o: Options) -> Tensor:
    assert plain.negatives is not None
    zero = sum(w.sum() for w in p.values()) * 0
    positive, negative, rows, eps = [], [], [], o["auxiliary.eps"]
    for hs, history, drawn in zip(states, plain.histories, plain.negatives, strict=True):
        mine = []
        for t in range(len(history) - 1):
            pos = minus_log(pair_logit(p, hs[t], embed(p, history[t + 1], o), o), eps)
            neg = [minus_log(-pair_logit(p, hs[t], embed(p, k, o), o), eps) for k in drawn[t + 1]]
            positive.append(pos)
            negative += neg
            mine += [pos, *neg]
        rows.append(sum(mine) / len(mine) if mine else zero)
    if not positive:
        return zero
    total = sum(positive) + sum(negative)
    longest = max(len(history) for history in plain.histories)
    return {
        "joint": total / len(positive + negative),
        "separate": sum(positive) / len(positive) + sum(negative) / len(negative),
        "row": sum(rows) / len(rows),
        "padded": total / (len(rows) * (longest - 1)),
        "history": total / len(rows),
    }[o["auxiliary.normalizer"]]


def dice(x: Tensor, alpha: Tensor, name: str, p: Weights, o: Options, training: bool) -> Tensor:
    mean, var = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    if o["head.dice_statistics"] == "batch":
        away = (x - mean) / (torch.sqrt(var + 1e-9) + 1e-9)
    else:
        if not training or x.shape[0] < 2:
            mean, var = p[f"{name}.bn.running_mean"], p[f"{name}.bn.running_var"]
        away = (x - mean) / torch.sqrt(var + 1e-8)
    share = 1 / (1 + torch.exp(-away))
    return share * x + (1 - share) * alpha * x


def head(p: Weights, x: Tensor, o: Options, training: bool) -> Tensor:
    """[B, inputs] to [B]."""
    if o["head.norm"] == "fixed":
        x = p["mlp.norm.weight"] * x / math.sqrt(1 + 1e-3) + p["mlp.norm.bias"]
    elif o["head.norm"] is not None:
        mean, var = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
        if x.shape[0] < 2 or (o["head.norm"] == "moving" and not training):
            mean, var = p["mlp.norm.running_mean"], p["mlp.norm.running_var"]
        x = p["mlp.norm.weight"] * (x - mean) / torch.sqrt(var + 1e-5) + p["mlp.norm.bias"]
    for i in range(len(o["head.units"])):
        x = x @ p[f"mlp.linears.{i}.weight"].T + p[f"mlp.linears.{i}.bias"]
        name = f"mlp.activations.{i}"
        if o["head.activation"] == "dice":
            x = dice(x, p[f"{name}.alpha"], name, p, o, training)
        else:
            x = act(o["head.activation"], x, p.get(f"{name}.weight"))
    out = x @ p["mlp.last.weight"].T + p["mlp.last.bias"]
    return out[:, 0] if o["head.outputs"] == 1 else out[:, 0] - out[:, 1]


def interest(
    model: str, p: Weights, es: list[Tensor], states: list[Tensor], target: Tensor, o: Options, wide: int
) -> list[Tensor]:
    """What a model reads of one row's history, in front of the head: nothing or one vector. A behaviour has ``wide``
    features, of which the first are those of its item."""
    if model == "average":
        return []
    nothing = torch.zeros(wide, dtype=target.dtype)
    if model == "din":
        item = o["attention.kind"] == "din" and o["attention.query"] == "raw"
        scores = attention(p, [e[: target.shape[0]] for e in es] if item else es, target, o)
        return [sum((a * e for a, e in zip(scores, es, strict=True)), nothing)]
    hidden = torch.zeros(p["extractor.weight_hh"].shape[1], dtype=target.dtype)
    if model == "gru":
        return [states[-1] if states else hidden]
    if o["evolution.kind"] != "gru":
        scores = attention(p, states, target, o)
        evolved = gru(p, "evolution", states, scores, o["evolution.kind"], o, "evolution")
        return [evolved[-1] if evolved else hidden]
    evolved = gru(p, "evolution", states, None, "gru", o, "evolution")
    if o["evolution.readout"] == "last":
        return [evolved[-1] if evolved else hidden]
    scores = attention(p, evolved, target, o)
    return [sum((a * h for a, h in zip(scores, evolved, strict=True)), hidden)]


def transcribe(
    model: str,
    weights: Weights,
    o: Options,
    plain: Plain,
    training: bool = True,
    *,
    dense: tuple[str, ...] = ("price",),
    behaviour_dense: tuple[str, ...] = (),
    statistics: dict[str, Any] | None = None,
) -> Answer:
    """The whole model. ``model`` is a key of ``MODELS``; the others name the numbers and say how they are spread."""
    p = {name.replace("_l0", ""): w for name, w in weights.items()}
    dtype, known = p["mlp.last.weight"].dtype, statistics or {}
    paths = []  # of each sequence its weights under the names of the first one's, behaviours, states, the readers
    for name, steps in {"": plain.steps, **plain.further}.items():
        own = f"further.{name}." if name else ""
        q = p | {key.removeprefix(own): w for key, w in p.items() if key.startswith(own)}
        if model == "din" and name:  # its further sequences have nothing but an attention
            q |= {f"attention.{key.removeprefix(own)}": w for key, w in p.items() if key.startswith(own)}
        if model == "gru" and name:
            q |= {f"extractor.{key.removeprefix(own)}": w for key, w in p.items() if key.startswith(own)}
        es = embed_behaviours(p, steps, o, list(behaviour_dense), known)
        states: list[list[Tensor]] = [[] for _ in es]
        if "extractor.weight_hh" in q:
            states = [gru(q, "extractor", history, None, "gru", o, "extractor") for history in es]
        paths.append((q, es, states, steps))
    wide = len(embed(p, plain.targets[0], o)) + len(
        scale(p, list(behaviour_dense), [0.0] * len(behaviour_dense), o, known)
    )
    wide += sum(w.shape[1] for key, w in p.items() if key.startswith("embeddings.behaviours."))
    rows = []
    for b, target in enumerate(plain.targets):
        e = embed(p, target, o)
        x = [p[f"embeddings.users.{name}.weight"][i] for name, i in plain.users[b].items()]
        x += [scale(p, list(dense), plain.dense[b], o, known), e]
        read: list[Tensor] = []
        for q, es, states, steps in paths:
            history = es[steps.u[b]]
            if o["pooling"] is not None:
                pooled = sum(history, torch.zeros(wide, dtype=dtype))
                if o["pooling"] == "mean" and history:
                    pooled = pooled / len(history)
                x.append(pooled)
                if o["product"]:
                    x.append(e * pooled[: len(e)])
            read += interest(model, q, history, states[steps.u[b]], e, o, wide)
        rows.append(torch.cat(x + read))
    logits = head(p, torch.stack(rows), o, training)
    y = torch.tensor(plain.labels, dtype=dtype)
    terms = y * minus_log(logits, o["click.eps"]) + (1 - y) * minus_log(-logits, o["click.eps"])
    click = terms.mean() if o["click.reduction"] == "mean" else terms.sum()
    total, aux = o["click.weight"] * click, None
    if o.get("auxiliary.kind") is not None:
        losses = [auxiliary(q, states, steps, o) for q, _, states, steps in paths if steps.negatives is not None]
        aux = sum(losses, sum(w.sum() for w in p.values()) * 0)
        total = total + o["auxiliary.weight"] * aux
    return Answer(logits, total, click, aux)
