"""Data sets whose rows are samples: what becomes of histories, labels and splits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dien_kernels.data import Loader, Prepared, prepare, verify
from dien_kernels.models import build
from dien_kernels.training import calibrate, load, train, write_report
from tests.data.folders import samples_of, users_of

AMAZON = "label,user_id,item_id,cate_id,item_history,cate_history\n"
TAOBAO = (
    "clk,btag_his,cate_his,brand_his,userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,"
    "shopping_level,occupation,new_user_class_level,adgroup_id,cate_id,campaign_id,customer,brand,price,pid,btag\n"
)
KUAI = "timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items\n"


def folder_of(tmp_path: Path, form: str) -> Path:
    tmp_path.mkdir(exist_ok=True)
    if form == "authors":
        pair = "1\tu1\tc\tX\ta\x02b\tX\x02Y\n0\tu1\td\tY\ta\x02b\tX\x02Y\n"
        (tmp_path / "local_train_splitByUser").write_text(pair)
        (tmp_path / "local_test_splitByUser").write_text(pair.replace("u1", "u2"))
    elif form == "amazon_x1":
        train = "1,7,2,5,1,4\n0,7,3,4,1,4\n1,7,3,4,1^2,4^5\n0,8,1,4,,\n0,7,1,4,9,4\n"
        (tmp_path / "train.csv").write_text(AMAZON + train)
        (tmp_path / "test.csv").write_text(AMAZON + "1,7,1,4,1^2^3,4^5^4\n0,7,2,5,1^2^3,4^5^4\n")
    elif form == "taobaoad_x1":
        row = "{},1^2,10^11,20^21,{},1,2,1,3,0,3,0,0,500,10,60,70,21,9.5,430539_1007,1\n"
        (tmp_path / "train.csv").write_text(TAOBAO + row.format(1, 5) + row.format(0, 5))
        (tmp_path / "test.csv").write_text(TAOBAO + row.format(0, 5) + row.format(1, 6))
    else:
        train = "0,1,30,1,0,0,10,20\n1,1,31,0,0,0,10^11,20^21\n"
        (tmp_path / "train.csv").write_text(KUAI + train)
        (tmp_path / "test.csv").write_text(KUAI + "2,1,10,1,0,0,10^11^30,20^21^31\n")
    return tmp_path


def made(tmp_path: Path, form: str) -> Prepared:
    return prepare(folder_of(tmp_path / "raw", form), tmp_path / "p", format=form, progress=False)


def test_authors(tmp_path: Path) -> None:
    made(tmp_path, "authors")
    assert samples_of(tmp_path / "p", "train") == [("u1", 2, "c", 1), ("u1", 2, "d", 0)]
    assert samples_of(tmp_path / "p", "test") == [("u2", 2, "c", 1), ("u2", 2, "d", 0)]


def test_prefixes_are_one_row_and_other_histories_their_own(tmp_path: Path) -> None:
    made(tmp_path, "amazon_x1")
    users = users_of(tmp_path / "p")
    assert {user: row["item"] for user, row in users.items()} == {"7": ["1", "2", "3"], "8": [], "7\x1f2": ["9"]}
    assert samples_of(tmp_path / "p", "train") == [
        ("7", 1, "2", 1), ("7", 1, "3", 0), ("7", 2, "3", 1), ("7\x1f2", 1, "1", 0), ("8", 0, "1", 0),
    ]  # fmt: skip
    assert samples_of(tmp_path / "p", "test") == [("7", 3, "1", 1), ("7", 3, "2", 0)]
    assert users["7"]["user.user_id"][0] == users["7\x1f2"]["user.user_id"][0]  # the same user for metrics


def test_pairs_of_category_and_brand_are_items(tmp_path: Path) -> None:
    prepared = made(tmp_path, "taobaoad_x1")
    assert users_of(tmp_path / "p")["5"]["item"] == ["10^20", "11^21"]
    assert users_of(tmp_path / "p")["5"]["dense.price"] == [9.5] * 3
    assert list(prepared.schema.behaviours) == ["btag"]


def test_the_further_sequence_is_read_up_to_the_targets_time(tmp_path: Path) -> None:
    made(tmp_path, "kuaivideo_x1")
    row = users_of(tmp_path / "p")["1"]
    assert (row["item"], row["neg_items.item"]) == (["10", "11", "30"], ["20", "21", "31"])
    assert (row["end"], row["target_time"], row["neg_items.time"]) == ([1, 2, 3], [1, 2, 3], [0, 1, 2])


@pytest.mark.parametrize("form", ["authors", "amazon_x1", "taobaoad_x1", "kuaivideo_x1"])
def test_folders_are_as_the_format_says(tmp_path: Path, form: str) -> None:
    assert verify(made(tmp_path, form)) == []


def test_targets_in_their_own_history_are_counted(tmp_path: Path) -> None:
    raw = folder_of(tmp_path / "raw", "amazon_x1")
    with (raw / "train.csv").open("a") as file:
        file.write("1,9,5,5,5^6,5^5\n0,9,6,5,5^6,5^5\n1,9,7,5,5^6,5^5\n")
    prepared = prepare(raw, tmp_path / "p", format="amazon_x1", progress=False)
    found = {"positives": 0, "negatives": 0}
    for split in ("train", "test"):
        for user, end, target, label in samples_of(tmp_path / "p", split):
            past = users_of(tmp_path / "p")[user]["item"][:end]
            found["positives" if label else "negatives"] += target in past
    assert {name: prepared.meta["report"][f"{name}_in_history"] for name in found} == found
    assert min(found.values()) > 0
    said = prepared.summary()
    assert said.startswith("4 histories, 6 behaviours\n")
    assert "split by file" in said


def test_bad_lines_are_told(tmp_path: Path) -> None:
    raw = folder_of(tmp_path / "raw", "amazon_x1")
    with (raw / "train.csv").open("a") as file:
        file.write("2,7,2,5,1,4\n1,7,2,5,1^2,4\n")
    first = prepare(raw, tmp_path / "p", format="amazon_x1", progress=False).meta["first_bad_lines"]
    assert first[0] == "train.csv:7: label (column 'label') '2' is no label; labels are 0 and 1"
    assert first[1] == "train.csv:8: column 'cate_history' has 1 values and 'item_history' has 2; they must be as many"


def test_files_without_a_split_and_own_splits_are_refused(tmp_path: Path) -> None:
    raw = folder_of(tmp_path / "raw", "amazon_x1")
    with pytest.raises(ValueError, match="has its own splits"):
        prepare(raw, tmp_path / "p", format="amazon_x1", split="time", progress=False)
    (raw / "more.csv").write_text(AMAZON)
    with pytest.raises(ValueError, match=r"more\.csv: the name 'more.csv' tells no split"):
        prepare(raw, tmp_path / "p", format="amazon_x1", progress=False)


@pytest.mark.parametrize("form", ["authors", "amazon_x1", "taobaoad_x1", "kuaivideo_x1"])
def test_two_steps_of_training(tmp_path: Path, form: str) -> None:
    prepared = made(tmp_path, form)
    model = build("dien", prepared.schema, {"embedding": {"size": 4}, "auxiliary": None})
    for epoch in range(2):
        batch = Loader(prepared, "train", batch_size=2).batch(epoch, 0)
        loss = model.loss(model(batch), batch.label).total
        loss.backward()
        assert torch.isfinite(loss)


def test_metrics_group_by_the_user_of_the_files(tmp_path: Path) -> None:
    prepared = made(tmp_path, "amazon_x1")
    groups = [int(g) for batch in Loader(prepared, "train", batch_size=2).epoch(0) for g in batch.group]
    assert sorted(groups.count(group) for group in set(groups)) == [1, 4]


@pytest.mark.parametrize("form", ["authors", "amazon_x1", "taobaoad_x1", "kuaivideo_x1"])
def test_the_configs_train_to_the_end(tmp_path: Path, form: str) -> None:
    """They validate on the test split, as there is no validation file."""
    path = Path(__file__).parents[2] / "examples" / "configs" / f"{form}.yaml"
    words = {"data.path": folder_of(tmp_path / "raw", form), "output.folder": tmp_path / "run", "training.epochs": 1}
    words |= dict.fromkeys(("output.progress", "output.report", "output.tensorboard"), "false")
    config = load(path, [f"{name}={value}" for name, value in words.items()])
    assert config.data.prepare["format"] == form
    result = train(config)
    assert result["test"] == result["valid"]
    written = write_report(tmp_path / "run", steps=1).read_text()
    assert "on the test split is step" in written
    assert "so its metrics are optimistic" in written
    assert "test, as validation" in written
    assert result["test"]["rows"] == len(samples_of(tmp_path / "run" / "prepared", "test"))
    with pytest.raises(ValueError, match="method must be 'sampling': .* has no valid split, got 'validation'"):
        calibrate(tmp_path / "run", "validation")
    other = config.with_("data", validate_on="valid").with_("output", folder=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"the valid split is empty: .* \(data.validate_on=test validates on the test"):
        train(other)


@pytest.mark.parametrize("form", ["taobao", "movielens"])
def test_the_configs_of_logs_train_to_the_end(tmp_path: Path, form: str) -> None:
    raw = tmp_path / ("UserBehavior.csv" if form == "taobao" else "ratings.dat")
    (tmp_path / "movies.dat").write_text("".join(f"{item}::Film {item}::Genre{item % 5}\n" for item in range(40)))
    with raw.open("w") as file:
        for user in range(30):
            for step in range(12):
                item, time = (7 * user + 5 * step * (user % 3 + 1)) % 40, 1_511_600_000 + 3600 * (step + 2 * user)
                rest = f"{item % 5},pv,{time}" if form == "taobao" else f"4::{time}"
                file.write(f"{user},{item},{rest}\n" if form == "taobao" else f"{user}::{item}::{rest}\n")
    path = Path(__file__).parents[2] / "examples" / "configs" / f"{form}.yaml"
    words = {"data.path": raw if form == "taobao" else tmp_path, "output.folder": tmp_path / "run"}
    words |= {"training.epochs": 1} | dict.fromkeys(("output.progress", "output.report", "output.tensorboard"), "false")
    config = load(path, [f"{name}={value}" for name, value in words.items()])
    assert config.data.prepare["format"] == form
    result = train(config)
    assert result["test"]["rows"] == 2 * Prepared.open(tmp_path / "run" / "prepared").split_size("test") > 0
