"""Options of models: groups, their defaults, old names, and errors that say what is allowed."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest

from dien_kernels.models import DIEN, DIN, MODELS, AttentionOptions, GRUOptions, build
from dien_kernels.models.options import RENAMED
from tests.models.common import SCHEMA, nested, resolved


def test_presets_name_existing_options() -> None:
    for name, model in MODELS.items():
        known = set(resolved(name, {"auxiliary.kind": "inner"} if "auxiliary" in model.options() else {}))
        for preset, options in model.PRESETS.items():
            for group, value in options.items():
                names = {f"{group}.{k}" for k in value} if isinstance(value, dict) else {group}
                assert names <= known, (name, preset)


def test_options_are_those_of_the_constructor() -> None:
    options = MODELS["gru_attention"].options()
    assert {"head", "attention", "evolution", "pooling"} <= set(options)
    assert options["auxiliary"] is None
    assert not {"kind", "form"} & set(options["evolution"])
    assert options["evolution"]["readout"] == "attention"
    assert not {"common", "unknown", "schema"} & set(options)
    assert MODELS["average"].options()["pooling"] == "mean"
    assert MODELS["din"].options()["attention"]["kind"] == "din"
    assert MODELS["dien"].options()["head"]["units"] == [200, 80]


def test_the_page_names_every_option() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
    for name in MODELS:
        for path in resolved(name, {"auxiliary.kind": "inner"} if name == "dien" else {}):
            group, _, option = path.partition(".")
            assert f"`{path}`" in page or (f"`{group}." in page and f"`.{option}`" in page), path


def test_groups_may_be_given_as_such_or_as_mappings() -> None:
    one = DIEN(SCHEMA, attention=AttentionOptions(kind="din", units=[7]), extractor=GRUOptions(bias="single"))
    two = DIEN(SCHEMA, attention={"kind": "din", "units": (7,)}, extractor={"bias": "single"})
    assert repr(one) == repr(two)
    three = build("dien", SCHEMA, {"attention": {"units": [7]}}, preset="authors")  # the preset's other options stay
    assert three.attention is not None
    assert repr(three.attention.scores.linears[0]).startswith("Linear(in_features=144, out_features=7")
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttentionOptions().kind = "din"


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_old_names_of_options_are_answered_with_the_new(old: str, new: str) -> None:
    for make in (lambda o: build("dien", SCHEMA, o), lambda o: DIEN(SCHEMA, **o)):
        with pytest.raises(ValueError, match=rf"^the option {old}(='din')? is now {new}(='din')?$"):
            make({old: "din"})


def test_models_say_which_options_they_do_not_have() -> None:
    with pytest.raises(ValueError, match="unknown option evolution"):
        build("average", SCHEMA, {"evolution": {}})
    with pytest.raises(ValueError, match="unknown option heat: did you mean head"):
        DIN(SCHEMA, heat={})


BAD_OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("dien", {"atention.kind": "din"}, "unknown option atention: did you mean attention"),
    ("dien", {"attention.knd": "din"}, "unknown option attention.knd: did you mean kind"),
    ("dien", {"attention": 3}, "attention must be a section with keys, kind, units, .* got 3"),
    ("gru_attention", {"evolution.kind": "augru"}, "evolution.kind must be 'gru'"),
    ("dien", {"attention.kind": "mlp"}, "attention.kind must be one of 'bilinear', 'din', got 'mlp'"),
    ("dien", {"evolution.kind": "gru2"}, "evolution.kind must be one of"),
    ("dien", {"evolution.form": "P"}, "evolution.form must be one of"),
    ("dien", {"extractor.bias": "tied"}, "extractor.bias must be true or false or 'single', got 'tied'"),
    ("dien", {"evolution.reset": "never"}, "evolution.reset must be one of"),
    ("dien", {"evolution.readout": "sum"}, "evolution.readout must be one of"),
    (
        "dien",
        {"evolution.kind": "gru", "evolution.bias": "tied"},
        "bias must be .* with evolution.kind='gru'",
    ),
    ("dien", {"attention.query": "dense"}, "attention.query must be one of"),
    ("dien", {"attention.normalize": "max"}, "attention.normalize must be one of"),
    ("dien", {"extractor.hidden_size": 7}, "extractor.hidden_size must be 36"),
    ("dien", {"extractor.hidden_size": 7, "auxiliary": None, "attention.kind": "din"}, "query must be 'prelu'"),
    ("dien", {"auxiliary.kind": "dot"}, "auxiliary.kind must be one of"),
    ("dien", {"auxiliary.kind": "mlp", "auxiliary.outputs": 3}, "auxiliary.outputs must be 1 or 2, got 3"),
    ("dien", {"auxiliary.kind": "mlp", "auxiliary.norm": "batch"}, "auxiliary.norm must be 'fixed' or null"),
    ("dien", {"auxiliary.normalizer": "mean"}, "auxiliary.normalizer must be one of"),
    ("dien", {"extractor.gate_bias": 1.0, "extractor.bias": False}, "extractor.gate_bias must be None with"),
    ("average", {"pooling": None}, "pooling must be"),
    ("average", {"pooling": "max"}, "pooling must be"),
    ("din", {"product": True}, "product must be False"),
    ("din", {"head.activation": "gelu"}, "head.activation must be one of"),
    ("din", {"head.dice_statistics": "fixed"}, "head.dice_statistics must be one of"),
    ("din", {"head.norm": "layer"}, "head.norm must be one of"),
    ("din", {"head.outputs": 3}, "head.outputs must be 1 or 2, got 3"),
    ("din", {"init": "zeros"}, "init must be one of"),
    ("din", {"head.units": (4, 0)}, r"head.units\[1\] must be at least 1, got 0"),
    ("din", {"embedding.size": 0}, r"embedding.size\['item'\] must be at least 1"),
    ("din", {"embedding.size": {"item": 3}}, "embedding.size must name exactly the fields"),
    ("din", {"embedding.size": {"item": "a"}}, "embedding.size must be an integer or a mapping"),
    ("din", {"click.reduction": "none"}, "click.reduction must be one of"),
    ("din", {"head.units": 5}, "head.units must be a list of integers, got 5"),
    ("din", {"head.units": "abc"}, "head.units must be a list of integers, got 'abc'"),
    ("din", {"head.units": ["a"]}, r"head.units must be a list of integers, got \['a'\]"),
    ("din", {"head.dropout": 1.0}, "head.dropout must be at least 0 and below 1, got 1.0"),
    ("din", {"embedding.dropout": -0.1}, "embedding.dropout must be at least 0 and below 1, got -0.1"),
    ("din", {"embedding.l2": -1}, "embedding.l2 must be finite and at least 0, got -1"),
    ("din", {"embedding.std": "abc"}, "embedding.std must be a number, got 'abc'"),
    ("din", {"embedding.std": -1}, "embedding.std must be finite and at least 0, got -1"),
    ("din", {"embedding.sparse": "maybe"}, "embedding.sparse must be true or false, got 'maybe'"),
    ("din", {"product": 1}, "product must be a bool, got int"),
    ("din", {"prelu_init": "a"}, "prelu_init must be a number, got str"),
    ("din", {"click.weight": None}, "click.weight must be a number, got None"),
    ("din", {"click.eps": -1.0}, "click.eps must be finite and at least 0, got -1.0"),
    ("din", {"attention.units": 5}, "attention.units must be a list of integers, got 5"),
    ("din", {"attention.scale": "a"}, "attention.scale must be a number or null, got 'a'"),
    ("dien", {"extractor.hidden_size": "a"}, "extractor.hidden_size must be an integer or null, got 'a'"),
    ("dien", {"extractor.gate_bias": "a"}, "extractor.gate_bias must be a number or null, got 'a'"),
    ("dien", {"auxiliary.weight": "a"}, "auxiliary.weight must be a number, got 'a'"),
    ("dien", {"auxiliary.units": [0], "auxiliary.kind": "mlp"}, r"auxiliary.units\[0\] must be at least 1, got 0"),
    ("dien", {"auxiliary.eps": "a"}, "auxiliary.eps must be a number or 'clamp', got 'a'"),
    ("dien", {"auxiliary.eps": -1}, "auxiliary.eps must be 0, 'clamp' or a number up to 1, got -1"),
    ("dien", {"auxiliary.eps": None}, "auxiliary.eps must be a number or 'clamp', got None"),
]


@pytest.mark.parametrize("name, options, message", BAD_OPTIONS, ids=str)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build(name, SCHEMA, nested(options))


@pytest.mark.parametrize("module", ["models", "models.dien", "models.request", "training.config"])
def test_examples_of_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"dien_kernels.{module}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("wrong", [5, [1], "head"])
def test_options_must_be_a_mapping(wrong: Any) -> None:
    with pytest.raises(TypeError, match="options must be a mapping from names to values or None, got "):
        build("dien", SCHEMA, wrong)
