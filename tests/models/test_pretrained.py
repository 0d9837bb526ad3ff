"""Tables that start from given vectors: frozen or trained, of their own width or of another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dien_kernels.batch import Schema
from dien_kernels.models import build
from dien_kernels.training.optimizer import make_optimizer
from dien_kernels.training.step import training_step
from tests.models.common import RICH, SCHEMA, model_of, random_batch, rich_batch
from tests.models.test_reset import scramble, start_over
from tests.models.test_transcription import check_against_transcription

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = torch.randn(13, 18, generator=torch.Generator().manual_seed(1))
ZERO = torch.cat([torch.zeros(1, 18), VECTORS[1:]])


def model(**options: Any) -> Any:
    torch.manual_seed(2)
    return build("dien", SCHEMA, {"embedding": {"pretrained": {"item": VECTORS}, **options}})


def test_a_table_starts_as_given_and_id_0_as_zero() -> None:
    made = model()
    table = made.embeddings.items["item"].weight
    assert torch.equal(table, ZERO)
    assert table.requires_grad
    assert not hasattr(made.embeddings, "projections")
    assert torch.equal(VECTORS[0], torch.randn(13, 18, generator=torch.Generator().manual_seed(1))[0])
    for init in ("torch", "glorot"):
        again = build("dien", SCHEMA, {"embedding": {"pretrained": {"item": VECTORS}}, "init": init})
        scramble(again)
        start_over(again, "apply")
        assert torch.equal(again.embeddings.items["item"].weight, ZERO)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_tables_stay_and_others_are_trained(frozen: bool, sparse: bool) -> None:
    made = model(frozen=frozen, sparse=sparse, size={"item": 4, "cat": 3, "user": 2})
    table, matrix = made.embeddings.items["item"].weight, made.embeddings.projections["item"].weight
    before = matrix.detach().clone()
    optimizer = make_optimizer(made, lr=1e-2)
    for seed in range(3):
        training_step(made, random_batch([3, 0, 2], seed=seed), optimizer, clip_norm=5.0)
    assert torch.equal(table, ZERO) == frozen
    assert table.requires_grad != frozen
    assert not torch.equal(matrix, before)
    if frozen:
        assert table.grad is None


def test_vectors_may_lie_in_a_file(tmp_path: Path) -> None:
    torch.save(VECTORS, tmp_path / "vectors.pt")
    for path in (tmp_path / "vectors.pt", str(tmp_path / "vectors.pt")):
        made = build("din", SCHEMA, {"embedding": {"pretrained": {"item": path}, "frozen": True}})
        assert torch.equal(made.embeddings.items["item"].weight, ZERO)
        scramble(made)
        start_over(made, "modules")
        assert torch.equal(made.embeddings.items["item"].weight, ZERO)
    with torch.device("meta"):
        far = build("din", SCHEMA, {"embedding": {"pretrained": {"item": str(tmp_path / "vectors.pt")}}})
    far.to_empty(device="cpu")
    start_over(far, "modules")
    assert torch.equal(far.embeddings.items["item"].weight, ZERO)
    assert torch.equal(copy.deepcopy(made).embeddings.items["item"].weight, ZERO)


def test_projected_tables_are_what_the_page_says() -> None:
    """Of a plain field, of one with several values and of a user; a matrix for equal widths where it is asked for."""
    tags, users = torch.randn(9, 6), torch.randn(7, 4)
    options = {"embedding.pretrained": {"item": VECTORS, "tag": tags, "user": users}, "embedding.l2": 0.0}
    made = model_of("dien", options, schema=RICH)
    assert set(made.embeddings.projections) == {"item", "tag"}
    batch = rich_batch([3, 0, 2])
    check_against_transcription("dien", {**options, "embedding.sparse": True}, batch, schema=RICH)
    made = model(project=True)
    assert tuple(made.embeddings.projections["item"].weight.shape) == (18, 18)


def test_l2_is_of_the_numbers_that_stand_in_the_tables() -> None:
    schema = Schema({"item": 13, "cat": 5}, {"user": 7}, ("price",))
    options = {"embedding": {"pretrained": {"item": VECTORS}, "size": 3, "l2": 0.1}}
    made = build("average", schema, options)
    batch = random_batch([3, 0, 2])
    p = dict(made.embeddings.named_parameters())
    exact = sum(
        p[f"items.{name}.weight"][ids].square().sum() for d in (batch.history, batch.target) for name, ids in d.items()
    )
    exact = exact + p["users.user.weight"][batch.users["user"]].square().sum()
    torch.testing.assert_close(made(batch).squares, exact, rtol=1e-5, atol=0)


def bad(value: Any, **more: Any) -> Any:
    return {"pretrained": {"item": value}, **more}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (bad([1.0]), TypeError, r"embedding.pretrained\['item'\] must be a tensor or the path of one, got list"),
    (bad(VECTORS[1:]), ValueError, r"a row for each of the 13 ids, \[13, width\], got torch.float32 \(12, 18\)"),
    (bad(VECTORS.long()), ValueError, r"must be a float tensor .* got torch.int64 \(13, 18\)"),
    (bad(VECTORS[0]), ValueError, r"got torch.float32 \(18,\)"),
    (bad(VECTORS / 0), ValueError, "must be finite, got NaN or infinite values"),
    (bad("nowhere.pt"), FileNotFoundError, r"there is no file nowhere.pt \(embedding.pretrained\['item'\]\)"),
    (bad(__file__), ValueError, "must be a file of torch.save, .* is none"),
    ({"pretrained": {"itm": VECTORS}}, ValueError, "unknown field embedding.pretrained.itm: did you mean item"),
    (bad(VECTORS, project=False, size=4), ValueError, r"embedding.size\['item'\] must be 18, .* got 4"),
    (bad(VECTORS, frozen="yes"), ValueError, "embedding.frozen must be true or false, got 'yes'"),
    ({"several": "max"}, ValueError, "embedding.several must be one of 'mean', 'sum', got 'max'"),
]


@pytest.mark.parametrize("options, error, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build("dien", SCHEMA, {"embedding": options})
