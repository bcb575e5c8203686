"""Re-ID verbs of the command line: their output, files and exit codes."""

import json
import shutil
from pathlib import Path

import pytest

from passreid_models import cli
from tests import ROOT
from tests.tiny_reid import COMMON, FINETUNE
from tests.tiny_runs import files


@pytest.fixture
def broken(data, tmp_path) -> Path:
    """Dataset with an unreadable image in its gallery."""
    folder = shutil.copytree(data, tmp_path / "market")
    min((folder / "bounding_box_test").iterdir()).write_bytes(b"no image")
    return folder


def words(options: dict) -> list[str]:
    """Options as words of a command line."""
    return [
        f"--{k.replace('_', '-')}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in options.items()
    ]


# ---- eval


def test_eval_prints_the_scores_and_writes_them(data, model, tmp_path, capsys):
    file, pictures = tmp_path / "scores.json", tmp_path / "pictures"
    options = ["--rerank", "--per-camera", f"--json={file}", f"--pictures={pictures}"]
    assert cli.main(["eval", str(data), f"--model={model}", "--device=cpu", *options]) == 0
    output, scores = capsys.readouterr().out, json.loads(file.read_text())
    assert f"{scores['mAP']:.1f}" in output
    assert "re-ranked" in output
    assert "camera 3" in output
    assert 0 < scores["mAP"] < 100
    assert {p.suffix for p in pictures.iterdir()} == {".png"}
    again = tmp_path / "again.json"
    assert cli.main(["eval", str(data), f"--model={model}", "--device=cpu", f"--json={again}"]) == 0
    second = json.loads(again.read_text())
    assert (second["mAP"], second["from_cache"]) == (scores["mAP"], scores["images"])


def test_eval_takes_another_size_and_fusion_and_with_no_cache_writes_none(data, model, cache, capsys):
    options = ["--size=96x32", "--fusion=mean", "--flip", "--no-cache", "--device=cpu"]
    assert cli.main(["eval", str(data), f"--model={model}", *options]) == 0
    assert "96x32, mean" in capsys.readouterr().out
    assert not (cache / "features").exists()


def test_eval_names_unreadable_images_and_ends_with_1(model, broken, capsys):
    assert cli.main(["eval", str(broken), f"--model={model}", "--device=cpu"]) == 1
    captured = capsys.readouterr()
    assert "mAP" in captured.out
    name = min(p.name for p in (broken / "bounding_box_test").iterdir())
    assert [name in line for line in captured.err.splitlines()] == [True]


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("nowhere", [], "nowhere: no such file or folder"),
        ("{data}", ["--model=resnet50"], "unknown model 'resnet50'"),
        ("{data}", ["--device=abacus"], "abacus"),
        (str(ROOT / "examples"), [], "no known layout"),
    ],
)
def test_a_mistake_is_reported_in_one_line(data, model, capsys, folder, options, message):
    if not any(option.startswith("--model") for option in options):
        options = [f"--model={model}", *options]
    assert cli.main(["eval", folder.format(data=data), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("passreid: ")
    assert message in error
    assert "Traceback" not in error


# ---- data check


def test_data_check_counts_and_ends_with_0_if_nothing_is_wrong(data, tmp_path, capsys):
    file = tmp_path / "check.json"
    assert cli.main(["data", "check", str(data), f"--json={file}"]) == 0
    assert "36" in capsys.readouterr().out
    assert json.loads(file.read_text())["ok"] is True


def test_data_check_names_what_is_wrong_and_ends_with_1(broken, capsys):
    assert cli.main(["data", "check", str(broken)]) == 1
    output = capsys.readouterr().out
    assert min(p.name for p in (broken / "bounding_box_test").iterdir()) in output
    assert cli.main(["data", "check", str(broken), "--no-verify"]) == 0


def test_data_check_of_a_missing_folder_ends_with_2(capsys):
    assert cli.main(["data", "check", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err


# ---- From data to a model, with the commands alone


def test_commands_alone_lead_from_a_folder_to_a_model_and_its_scores(data, tmp_path, capsys):
    market, run = str(data), tmp_path / "run"
    assert cli.main(["finetune", market, f"--out={run}", *words({**COMMON, **FINETUNE, "epochs": 1})]) == 0
    assert capsys.readouterr().out == f'timm.create_model("local-dir:{run}/export", pretrained=True)\n'
    clusters = {**COMMON, "init": f"{run}/export", "epochs": 1, "steps": 2, "clusters_per_batch": 2, "k1": 6, "k2": 3,
                "eps": 0.7, "min_samples": 2}  # fmt: skip
    assert cli.main(["cluster", market, f"--out={tmp_path}/adapted", *words(clusters)]) == 0
    assert cli.main(["eval", market, f"--model={tmp_path}/adapted", "--device=cpu"]) == 0
    assert {f.split("/")[0] for f in files(tmp_path / "adapted")} >= {"export", "best", "log.txt", "config.yaml"}
    assert cli.main(["plot", str(run)]) == 0
    assert (run / "curves.png").stat().st_size > 1000
