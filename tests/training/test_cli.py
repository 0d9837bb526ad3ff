"""The command line: from raw logs to scores, and one clear line for every error of the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from dien_kernels import cli
from dien_kernels.data import FORMATS, Prepared, synthetic
from dien_kernels.data.samples import SAMPLE_FORMATS
from dien_kernels.training import load, open_run

TINY = [
    "model.options.embedding.size=4",
    "model.options.head.units=[8]",
    "training.epochs=1",
    "data.batch_size=256",
    "output.tensorboard=false",
]


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on raw logs with columns of other names, started from the command line."""
    folder = tmp_path_factory.mktemp("cli")
    table = pq.read_table(prepared.path.parent / "logs.parquet")
    renamed = table.rename_columns({"user": "who", "item": "what", "category": "kind", "timestamp": "time"})
    pq.write_table(renamed, folder / "logs.parquet")
    before = torch.get_num_threads()
    words = ["train", "--data", str(folder / "logs.parquet"), "--user", "who", "--item", "what"]
    words += ["--item-fields", "kind", "--targets", "every", "--threads", "1", "--seed", "3", "--quiet"]
    assert cli.main([*words, "--out", str(folder / "run"), *TINY, "output.report=false"]) == 0
    torch.set_num_threads(before)
    return folder / "run"


@pytest.mark.slow
def test_train_takes_raw_logs_options_and_words(run: Path) -> None:
    config = load(run / "config.yaml")
    assert (config.training.seed, config.training.threads) == (3, 1)
    assert config.data.prepare == {
        "targets": "every",
        "columns": {"user": "who", "item": "what", "item_fields": ["kind"]},
    }
    assert config.model.options == {"embedding": {"size": 4}, "head": {"units": [8]}}
    assert list(Prepared.open(run / "prepared").schema.items) == ["item", "kind"]


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), "--split", "valid", "training.backend=reference"]) == 0
    assert capsys.readouterr().out.startswith("valid: AUC 0.")


def test_score_is_model_score(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = Prepared.open(run / "prepared")
    items = [prepared.item_name(i) for i in range(1, 9)]
    requests = pa.table({"history": [items[:4], items[4:6]], "candidates": [items[4:], [-5]]})
    pq.write_table(requests, tmp_path / "requests.parquet")
    assert cli.main(["score", str(run), str(tmp_path / "requests.parquet"), str(tmp_path / "scores.parquet")]) == 0
    assert "2 requests, 5 candidates (1 unknown), 6 behaviours (0 unknown)" in capsys.readouterr().out
    scores = pq.read_table(tmp_path / "scores.parquet")["scores"].to_pylist()
    _, _, model = open_run(run)

    def fields(raw: list[int]) -> dict[str, torch.Tensor]:
        ids = prepared.encode_items(raw)
        return {"item": torch.tensor(ids), "kind": torch.tensor(prepared.item_fields["kind"][ids])}

    for row, found in zip(requests.to_pylist(), scores, strict=True):
        wanted = model.score(fields(row["history"]), fields(row["candidates"])).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_prepare_and_compare(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    table = pq.read_table(run.parent / "logs.parquet")
    pa.csv.write_csv(table.rename_columns(["user_id", "item_id", "category_id", "timestamp"]), tmp_path / "logs.csv")
    assert cli.main(["prepare", str(tmp_path / "logs.csv"), "--out", str(tmp_path / "data"), "--data-seed", "4"]) == 0
    assert Prepared.open(tmp_path / "data").meta["options"]["seed"] == 4
    text = (tmp_path / "logs.csv").read_text().replace(",", ";")
    (tmp_path / "logs.csv").write_text(text)
    words = ["prepare", str(tmp_path / "logs.csv"), "--out", str(tmp_path / "data"), "--delimiter", ";"]
    assert cli.main([*words, "--fractions", "0.6", "0.2", "0.2", "--overwrite"]) == 0
    assert Prepared.open(tmp_path / "data").meta["options"]["fractions"] == [0.6, 0.2, 0.2]
    words = [
        "compare",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "table"),
        "--quiet",
        "--samples",
        "20",
    ]
    # Config words behind an option of several values are not for it.
    assert cli.main([*words, "--models", "average", "dien", "--seeds", "0", *TINY]) == 0
    out = capsys.readouterr().out
    assert "| average" in out
    assert (tmp_path / "table" / "comparison.csv").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["train"], "data.path is not set"),
        (["train", "training.epoch=3"], "unknown key training.epoch: did you mean epochs"),
        (["train", "no.yaml"], "no.yaml"),
        (["train", "{logs}"], "is neither a config (.yaml, .yml) nor section.key=value; logs are named with --data"),
        (["train", "optimizer.lr"], "optimizer.lr is neither a config"),
        (["train", "lr=1e-3/none.yaml"], "No such file or directory: 'lr=1e-3/none.yaml'"),
        (["train", "data.path=none.yaml"], "there is no file or folder none.yaml (data.path)"),
        (["train", "date.path=none.yaml"], "unknown section date: did you mean data"),
        (["train", "optimizer.lr=[1"], "the value in 'optimizer.lr=[1' is not YAML"),
        (["train", "--data", "{prepared}", "model.options.head.units=5"], "head.units must be a list of integers"),
        (["prepare", "{logs}", "--out", "{prepared}", "--user", "who", "--item", "what"], "--overwrite"),
        (
            ["prepare", "{logs}", "--out", "x", "--user", "who", "--item", "what", "--fractions", "1", "1", "1"],
            "fractions must be three shares",
        ),
        (["compare", "--data", "{prepared}", "--models", "dien", "dien"], "models must be different, got dien, dien"),
        (["compare", "--data", "{prepared}", "--samples", "0"], "samples must be at least 1, got 0"),
        (["score", "{run}", "{logs}", "out.parquet", "--chunk", "0"], "chunk must be at least 1, got 0"),
        (["train", "a.yaml", "b.yaml"], "only one config"),
        (["train", "--data", "none.parquet"], "there is no file or folder none.parquet"),
        (["train", "--data", "{logs}"], "has no user column"),
        (["train", "--data", "{logs}", "--user", "who", "--item", "wat"], "has no column 'wat'"),
        (["train", "--data", "{logs}", "data.prepare.target=every"], "unknown key data.prepare.target"),
        (["train", "--data", "{prepared}", "model.name=diem"], "dien"),
        (["train", "--data", "{prepared}", "model.options.auxilary.kind=mlp"], "did you mean auxiliary"),
        (["train", "--data", "{prepared}", "model.options.attention=din"], "is now attention.kind='din'"),
        (["train", "--data", "{prepared}", "model.options.mlp=[8]"], "the option mlp is now head.units"),
        (["train", "--resume", "nowhere"], "nowhere holds no run"),
        (["train", "--resume", "{run}", "optimizer.lr=7"], "optimizer.lr was 0.001, is 7.0"),
        (["train", "--data", "{prepared}", "--out", "{run}"], "holds a run already"),
        (["prepare", "none.csv", "--out", "x"], "none.csv"),
        (["evaluate", "nowhere"], "nowhere holds no run"),
        (["compare", "--data", "{prepared}", "--models", "wide"], "models must be some of"),
        (["score", "{run}", "none.parquet", "out.parquet"], "there is no file none.parquet"),
        (["score", "{run}", "{logs}", "out.parquet"], "no column 'history'"),
        (["score", "{run}", "{logs}", "."], "out must be a file to write, got the folder ."),
        (
            ["prepare", "{logs}", "--out", "x", "--delimiter", ";"],
            "delimiter is for format 'csv', got format 'parquet'",
        ),
        (["prepare", "{logs}", "--out", "x", "--behaviours", "pv"], "behaviours is for format 'taobao', got format"),
        (["prepare", "none  twice", "--out", "x"], "none  twice does not exist"),  # with both blanks
    ],
)
def test_errors_are_one_line(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"logs": run.parent / "logs.parquet", "prepared": run / "prepared", "run": run}
    words = [word.format(**places) if word.startswith("{") else word for word in words]
    assert cli.main([*words, *(["--quiet"] if words[0] in ("train", "compare") else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dien-kernels: error: ")
    assert message in error
    assert error.count("\n") == 1
    with pytest.raises((ValueError, TypeError, OSError)):
        cli.main([*words, "--debug"])


def test_an_error_of_several_lines_is_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\n1\n2\n3,4,5\n")
    words = ["prepare", str(tmp_path / "log.csv"), "--out", str(tmp_path / "x"), "--max-bad-lines", "1"]
    assert cli.main(words) == 2
    said = "the first ones: log.csv:2: 1 columns instead of 3; log.csv:3: 1 columns instead of 3\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize("command", ["prepare", "train", "compare"])
def test_help_names_every_format(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "another", FORMATS["amazon"])
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"one of {', '.join(FORMATS)}; of samples: {', '.join(SAMPLE_FORMATS)} (default" in said


@pytest.mark.parametrize("name", ["lr=1e-3/config.yaml", "runs.2/lr=1e-3/config.yml", "training.lr=1e-3/config.yaml"])
def test_a_config_may_lie_in_a_folder_with_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("training: {epoch: 3}")
    assert cli.main(["train", name, "optimizer.lr=1e-2"]) == 2
    assert f"{name}: unknown key training.epoch" in capsys.readouterr().err


def test_paths_of_the_command_line_may_begin_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind a "=" no shell expands them, nor in quotes."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    pq.write_table(synthetic(users=60, items=40, categories=4, events=600, seed=1), home / "log.parquet")
    quick = ["training.epochs=1", "training.threads=1", "output.report=false", "output.tensorboard=false", "--quiet"]
    assert cli.main(["prepare", "~/log.parquet", "--out=~/prepared"]) == 0
    assert cli.main(["train", "--data=~/prepared", "--out=~/run", *quick]) == 0
    assert cli.main(["evaluate", "~/run"]) == 0
    requests = pa.table({"history": [[0, 1]], "candidates": [[2, 3]]})
    pq.write_table(requests, home / "requests.parquet")
    assert cli.main(["score", "~/run", "~/requests.parquet", "~/scores.parquet"]) == 0
    assert list(here.iterdir()) == []
    assert {path.name for path in home.iterdir()} > {"prepared", "run", "scores.parquet"}
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "~nobodyhere/run"])
    assert "~nobodyhere/run: " in capsys.readouterr().err


def test_a_pattern_names_raw_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = synthetic(users=60, items=40, categories=4, events=600, seed=1)
    for number, part in enumerate((table.slice(0, 300), table.slice(300))):
        pq.write_table(part, tmp_path / f"day-{number}.parquet")
    words = ["training.epochs=1", "training.threads=1", "output.report=false", "output.tensorboard=false", "--quiet"]
    assert cli.main(["train", "--data", str(tmp_path / "day-*"), "--out", str(tmp_path / "run"), *words]) == 0
    assert Prepared.open(tmp_path / "run" / "prepared").meta["report"]["rows"] == table.num_rows
    assert cli.main(["train", "--data", str(tmp_path / "week-*"), "--out", str(tmp_path / "none"), *words]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


def test_options_of_logs_on_the_command_line(tmp_path: Path) -> None:
    rows = "".join(f"{row // 6},{row % 7},{1 + row % 28:02d}.01.2023,a|b,pv\n" for row in range(120))
    (tmp_path / "log.csv").write_text("user,item,time,tags,action\n" + rows)
    common = [str(tmp_path / "log.csv"), "--time-format", "%d.%m.%Y", "--missing", "-"]
    assert cli.main(["prepare", *common, "--out", str(tmp_path / "p")]) == 0
    words = ["prepare", *common, "--out", "p", "--item-fields", "tags", "--delimiters", "tags=|"]
    words += ["--sequence", "action", "--sequences", "clicks=pv", "bought=buy,cart"]
    words += ["--behaviour-fields", "action", "--behaviour-dense", "dwell"]
    given = cli._given_log_options(cli._parser().parse_args(words))
    assert given["columns"] == {
        "item_fields": ["tags"],
        "delimiters": {"tags": "|"},
        "sequence": "action",
        "sequences": {"clicks": ["pv"], "bought": ["buy", "cart"]},
        "behaviour_fields": ["action"],
        "behaviour_dense": ["dwell"],
    }
    assert (given["time_format"], given["missing"]) == ("%d.%m.%Y", ["-"])
    assert cli.main(["prepare", *common, "--out", "p", "--delimiters", "tags"]) == 2


def test_prepare_appends_new_days(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = synthetic(users=60, items=40, categories=4, events=900, seed=1)
    log = log.take(pa.array(np.argsort(log["timestamp"].to_numpy(), kind="stable")))
    for name, part in (("old", log.slice(0, 600)), ("new", log.slice(600))):
        pq.write_table(part.rename_columns(["who", "item", "category", "timestamp"]), tmp_path / f"{name}.parquet")
    out = ["--user", "who", "--out", str(tmp_path / "p")]
    first = ["prepare", str(tmp_path / "old.parquet"), *out, "--duplicates", "drop", "--targets", "every"]
    assert cli.main(first) == 0
    assert Prepared.open(tmp_path / "p").meta["options"]["duplicates"] == "drop"
    new = ["prepare", str(tmp_path / "new.parquet"), *out, "--append"]
    capsys.readouterr()
    for words, message in (
        (["--labels", "next", "--data-seed", "3"], "as the folder has the others, got --labels, --data-seed\n"),
        (["--duplicates", "keep"], "--append takes the options of the log only, as the folder has the others, got --d"),
        (["--tail", "0"], "tail must be an integer of at least 1, got 0"),
    ):
        assert cli.main([*new, *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert cli.main([*first, "--tail", "3"]) == 2
    assert "--tail is for --append, got --tail 3 without it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*new, "--overwrite"])
    capsys.readouterr()
    assert cli.main([*new, "--tail", "3"]) == 0
    printed = capsys.readouterr()
    assert f"at last {log.num_rows - 600:,} rows of " in printed.out
    assert printed.err.count("warning") == 0
    grown = Prepared.open(tmp_path / "p")
    assert [shard.get("generation", 0) for shard in grown.meta["shards"]] == [0, 1]
    latest = grown.unit(len(grown.units) - 1)
    assert latest.info.generation == 1
    assert cli.main(["check", str(tmp_path / "p")]) == 0


def test_argparse_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["trane"], ["info", "more"], ["train", "--epochs", "3"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2


_WITHOUT = """
import sys
for name in ("pyarrow", "polars", "sklearn", "yaml", "tqdm", "matplotlib", "tensorboard"):
    sys.modules[name] = None
from dien_kernels import cli
status = [cli.main(words) for words in (["train", "--data", "x"], ["prepare", "x", "--out", "y"], ["info"])]
try:
    cli.main(["train", "--help"])
except SystemExit as stop:
    assert stop.code == 0
sys.exit(status != [2, 2, 0])
"""


def test_without_the_extras() -> None:
    found = subprocess.run(
        [sys.executable, "-c", _WITHOUT], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert found.returncode == 0, found.stderr
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 2
    assert all(line.endswith("pip install 'dien_kernels[train]'") for line in lines)
    assert "backends" in found.stdout
    assert "--format FORMAT" in found.stdout  # in the help of train
