"""Configs: YAML, overrides, and errors that say what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dien_kernels.training import Config, DataConfig, TrainingConfig, dump, load
from dien_kernels.training import config as config_module
from dien_kernels.training.config import SECTIONS, differences


def test_yaml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {name: din}\noptimizer:\n  lr: 1e-3\ntraining:\n  epochs: 3\noutput:\n")
    config = load(path, ["training.epochs=4", "model.options.head.units=[8, 4]", "training.clip_norm=null"])
    assert (config.model.name, config.model.options) == ("din", {"head": {"units": [8, 4]}})
    assert (config.optimizer.lr, config.training.epochs, config.training.clip_norm) == (1e-3, 4, None)
    assert config.data == DataConfig()
    # YAML 1.1 takes numbers without a dot for text; options of models have no type that would tell.
    words = ["model.options.auxiliary.eps=1e-8", "model.options.attention.scale=-2E+1", "model.options.name=1e"]
    options = {"auxiliary": {"eps": 1e-8}, "attention": {"scale": -20.0}, "name": "1e"}
    assert load(None, words).model.options == options
    path.write_text("model: {options: {auxiliary: {eps: 1e-8}}}")
    assert load(path).model.options == {"auxiliary": {"eps": 1e-8}}


def test_the_page_is_a_config(tmp_path: Path) -> None:
    """Every YAML block of docs/training.md is read, and the first one shows every section."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "page.yaml").write_text(block)
        load(tmp_path / "page.yaml")
    assert all(f"\n{section}:" in f"\n{blocks[0]}" for section in SECTIONS)
    example = load(Path(__file__).resolve().parents[2] / "examples" / "amazon.yaml")
    assert (example.optimizer.lr, example.schedule.options) == (2e-3, {"gamma": 0.7})


def test_dump_is_read_back(tmp_path: Path) -> None:
    config = load(None, ["data.prepare.columns.user=u", "data.path=a b.parquet", "training.amp=bfloat16"])
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    "word, message",
    [
        ("training.epoch=3", "unknown key training.epoch: did you mean epochs"),
        ("trainig.epochs=3", "unknown section trainig: did you mean training"),
        ("training.zzz=3", "known are epochs, accumulate"),
        ("training.epochs=many", "training.epochs must be an integer, got 'many'"),
        ("training.epochs=true", "training.epochs must be an integer, got True"),
        ("training.epochs=0", "training.epochs must be at least 1, got 0"),
        ("training.seed=18446744073709551616", "training.seed must be below 2^64"),
        ("optimizer.lr=fast", "optimizer.lr must be a number, got 'fast'"),
        ("training.clip_norm=0", "training.clip_norm must be above 0, got 0"),
        ("optimizer.lr=[1", "the value in 'optimizer.lr=[1' is not YAML"),
        ("optimizer.lr=.nan", "optimizer.lr must be above 0, got nan"),
        ("training.threads=two", "training.threads must be an integer or null, got 'two'"),
        ("training.amp=float8", "must be one of 'float16', 'bfloat16' or null, got 'float8'"),
        ("training.backend=gpu", "must be one of 'auto', 'cpu'"),
        ("output.report=maybe", "output.report must be true or false, got 'maybe'"),
        ("model.options=3", "model.options must be a mapping from names to values, got 3"),
        ("model=3", "section.key=value"),
        ("training.epochs", "section.key=value"),
        ("training.epochs.deep=3", "training.epochs is a single value"),
        ("training.lr=1", "the key training.lr is now optimizer.lr"),
        ("training.embedding_lr=1", "the key training.embedding_lr is now optimizer.table_lr"),
        ("training.weight_decay=1", "the key training.weight_decay is now optimizer.options.weight_decay"),
        ("training.lr_decay=0.5", "the key training.lr_decay is now schedule, as in {name: ExponentialLR"),
        ("training.metric=acu", "unknown metric acu: did you mean auc"),
        ("training.accumulate=0", "training.accumulate must be at least 1, got 0"),
        ("optimizer.table_lr=0", "optimizer.table_lr must be above 0, got 0"),
        ("optimizer.name=AdmaW", "unknown optimizer AdmaW: did you mean AdamW"),
        (
            "optimizer.options.wieght_decay=1",
            "unknown option optimizer.options.wieght_decay: did you mean weight_decay",
        ),
        ("optimizer.options.lr=1", "unknown option optimizer.options.lr"),
        ("schedule.name=StepLr", "unknown schedule StepLr: did you mean StepLR"),
        ("schedule.name=StepLR", "schedule.options must have 'step_size' for StepLR"),
        ("schedule.name=LambdaLR", "must be a schedule without functions"),
        ("schedule.every=step", "schedule.name must be set where schedule.every is, got null"),
        ("schedule.options.gamma=0.5", "schedule.name must be set where schedule.options is, got null"),
        ("schedule.every=batch", "schedule.every must be one of 'epoch', 'step', got 'batch'"),
    ],
)
def test_bad_words(word: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(None, [word])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("training: 3", "training must be a section with keys, epochs, accumulate"),
        ("trainings: {}", "unknown section trainings: did you mean training"),
        ("training: {lerning_rate: 1}", "unknown key training.lerning_rate"),
        ("[1, 2]", "must hold sections, data, model, optimizer, schedule, training, output, got list"),
        ("a: [", "is not YAML"),
        (b"PAR1\xe9\x00", "is not YAML"),
        ("model: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_every_value_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of one section does not check the others again."""
    config = Config()
    seen: list[str] = []
    real = config_module.check_fields
    monkeypatch.setattr(config_module, "check_fields", lambda group, where: (seen.append(where), real(group, where)))
    config = config.with_("training", epochs=3)
    assert seen == ["training"]
    config.with_("output", folder="b").with_("data", workers=1)
    assert seen == ["training", "output", "data"]


def test_versions(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump(Config()))
    assert path.read_text().startswith("version: 2\n")
    assert load(path) == Config()
    path.write_text("version: 3\n")
    with pytest.raises(ValueError, match=r"run.yaml: version must be 2, got 3"):
        load(path)


def test_python_configs_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"training\.epochs must be an integer"):
        TrainingConfig(epochs="3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training must be a TrainingConfig, got dict"):
        Config(training={"epochs": 3})  # type: ignore[arg-type]


def test_differences_name_what_may_not_change() -> None:
    old = Config().to_dict()
    free = load(None, ["data.workers=2", "training.epochs=9", "output.folder=else", "data.path=moved"])
    assert differences(old, free.to_dict()) == []
    changed = load(None, ["optimizer.lr=1", "model.options.head.units=[1]"]).to_dict()
    assert differences(old, changed) == [
        "model.options.head.units was None, is [1]",
        "optimizer.lr was 0.001, is 1.0",
    ]


@pytest.mark.parametrize("key", ["data.path", "output.folder"])
def test_a_path_may_begin_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """In a file, in an override, in Python: where no shell has seen it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    section, name = key.split(".")
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: ~/runs/a}}")
    changed = Config().with_(section, **{name: "~/runs/a"})
    for config in (load("~/run.yaml"), load(None, [f"{key}=~/runs/a"]), changed):
        assert getattr(getattr(config, section), name) == str(tmp_path / "runs" / "a")
    assert getattr(getattr(load(None, [f"{key}=./~"]), section), name) == "./~"
    with pytest.raises(ValueError, match="~nobodyhere/a: "):
        load(None, [f"{key}=~nobodyhere/a"])
