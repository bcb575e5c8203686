"""The re-ID verbs of the command line: what they print, what they write, and their exit codes."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

from passreid_models import cli, save_pretrained
from tests.tiny_reid import COMMON, FINETUNE, write_persons
from tests.tiny_runs import files

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A dataset and an exported model."""
    folder = tmp_path_factory.mktemp("home")
    write_persons(folder / "market")
    torch.manual_seed(0)
    save_pretrained(timm.create_model("test_pass_vit"), folder / "model")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def broken(home, tmp_path) -> Path:
    """The dataset with an unreadable image in its gallery."""
    folder = shutil.copytree(home / "market", tmp_path / "market")
    min((folder / "bounding_box_test").iterdir()).write_bytes(b"no image")
    return folder


def words(options: dict) -> list[str]:
    return [
        f"--{k.replace('_', '-')}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in options.items()
    ]


# ---- eval


def test_eval_prints_the_scores_and_writes_them(home, tmp_path, capsys):
    file, pictures = tmp_path / "scores.json", tmp_path / "pictures"
    options = ["--rerank", "--per-camera", f"--json={file}", f"--pictures={pictures}"]
    assert cli.main(["eval", f"{home}/market", f"--model={home}/model", "--device=cpu", *options]) == 0
    said, scores = capsys.readouterr().out, json.loads(file.read_text())
    assert f"{scores['mAP']:.1f}" in said
    assert "re-ranked" in said
    assert "camera 3" in said
    assert 0 < scores["mAP"] < 100
    assert {p.suffix for p in pictures.iterdir()} == {".png"}
    again = tmp_path / "again.json"
    assert cli.main(["eval", f"{home}/market", f"--model={home}/model", "--device=cpu", f"--json={again}"]) == 0
    second = json.loads(again.read_text())
    assert (second["mAP"], second["from_cache"]) == (scores["mAP"], scores["images"])


def test_eval_takes_another_size_and_fusion_and_leaves_no_cache_when_told(home, tmp_path, capsys):
    options = ["--size=96x32", "--fusion=mean", "--flip", "--no-cache", "--device=cpu"]
    assert cli.main(["eval", f"{home}/market", f"--model={home}/model", *options]) == 0
    assert "96x32, mean" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "features").exists()


def test_eval_names_unreadable_images_and_ends_with_1(home, broken, capsys):
    assert cli.main(["eval", str(broken), f"--model={home}/model", "--device=cpu"]) == 1
    captured = capsys.readouterr()
    assert "mAP" in captured.out
    name = min(p.name for p in (broken / "bounding_box_test").iterdir())
    assert [name in line for line in captured.err.splitlines()] == [True]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("nowhere", [], "nowhere: no such file or folder"),
        ("market", ["--model=resnet50"], "unknown model 'resnet50'"),
        ("market", ["--device=abacus"], "abacus"),
        ("market/query", [], "no known layout"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(home, capsys, data, options, message):
    model = [] if any(o.startswith("--model") for o in options) else [f"--model={home}/model"]
    assert cli.main(["eval", str(home / data) if data != "nowhere" else data, *model, *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("passreid: ")
    assert message in said
    assert "Traceback" not in said


# ---- data check


def test_data_check_counts_and_ends_with_0_where_nothing_is_wrong(home, tmp_path, capsys):
    file = tmp_path / "check.json"
    assert cli.main(["data", "check", f"{home}/market", f"--json={file}"]) == 0
    assert "36" in capsys.readouterr().out
    assert json.loads(file.read_text())["ok"] is True


def test_data_check_names_what_is_wrong_and_ends_with_1(broken, capsys):
    assert cli.main(["data", "check", str(broken)]) == 1
    said = capsys.readouterr().out
    assert min(p.name for p in (broken / "bounding_box_test").iterdir()) in said
    assert cli.main(["data", "check", str(broken), "--no-verify"]) == 0


def test_data_check_of_nothing_ends_with_2(capsys):
    assert cli.main(["data", "check", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err


# ---- From data to a model, with the commands alone


def test_a_newcomer_comes_from_a_folder_to_a_model_and_its_scores(home, tmp_path, capsys):
    market, run = f"{home}/market", tmp_path / "run"
    assert cli.main(["finetune", market, f"--out={run}", *words({**COMMON, **FINETUNE, "epochs": 1})]) == 0
    said = capsys.readouterr().out
    assert said == f'timm.create_model("local-dir:{run}/export", pretrained=True)\n'
    clusters = {**COMMON, "init": f"{run}/export", "epochs": 1, "steps": 2, "clusters_per_batch": 2, "k1": 6, "k2": 3,
                "eps": 0.7, "min_samples": 2}  # fmt: skip
    assert cli.main(["cluster", market, f"--out={tmp_path}/adapted", *words(clusters)]) == 0
    assert cli.main(["eval", market, f"--model={tmp_path}/adapted", "--device=cpu"]) == 0
    assert {f.split("/")[0] for f in files(tmp_path / "adapted")} >= {"export", "best", "log.txt", "config.yaml"}
    assert cli.main(["plot", str(run)]) == 0
    assert (run / "curves.png").stat().st_size > 1000
