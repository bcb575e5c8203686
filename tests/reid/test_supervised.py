"""Fine-tuning with labels: output of a run, resuming, the training step, processes, and a user's mistakes."""

import json
import math
import multiprocessing
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard

from passreid_models import load_report, save_pretrained
from passreid_models.checkpoints.publish import files_to_publish
from passreid_models.data.datasets import Split, open_dataset
from passreid_models.device import process_group
from passreid_models.evaluation.evaluate import score
from passreid_models.layers import ConvStem
from passreid_models.reid import run as reid_run
from passreid_models.reid.batches import ImageBatch, KeySampler, TrainImages, load, make_loader, train_transform
from passreid_models.reid.config import PRESETS, FinetuneConfig
from passreid_models.reid.model import ReIDModel
from passreid_models.reid.run import complete
from passreid_models.reid.samplers import identity_batches
from passreid_models.reid.supervised import SupervisedRun, SupervisedTrainer, finetune, freeze
from passreid_models.reid.unsupervised import cluster
from passreid_models.runtime import gather_rows
from passreid_models.training import trainer as trainer_module
from passreid_models.training.trainer import NonFiniteLossError
from tests.tiny_reid import assert_same, cluster_config, finetune_config, numbers, steps
from tests.tiny_runs import files, metrics, world

KEYS = SupervisedTrainer.state_keys
CPU = torch.device("cpu")
STATISTICS_OF_FINE_TUNING = dict(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run with a checkpoint at every step."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finetune(finetune_config(data, out, save_minutes=0, keep=99))
    return out


# ---- Output of a run


def test_the_export_is_the_descriptor_before_the_neck_and_holds_neck_and_classifier(whole):
    model = timm.create_model(f"local-dir:{whole}/export", pretrained=True).eval()
    assert load_report(model).missing == []
    trained = ReIDModel.load(whole / "export")
    assert (trained.num_ids, trained.neck, trained.fusion) == (6, "multi", "cat")
    x = torch.randn(3, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained(x).before, rtol=1e-5, atol=1e-6)
    state = torch.load(steps(whole)[-1], weights_only=True)["model"]
    assert all(torch.equal(v, state[k]) for k, v in trained.state_dict().items())
    cfg = model.pretrained_cfg
    assert (list(cfg["mean"]), list(cfg["std"]), cfg["interpolation"]) == ([0.5] * 3, [0.5] * 3, "bilinear")


def test_config_json_says_how_the_weights_were_made(whole):
    config = json.loads((whole / "export" / "config.json").read_text())
    provenance = config["provenance"]
    assert (provenance["method"], provenance["step"]) == ("supervised re-ID", len(steps(whole)))
    assert "36 training images of 6 identities" in provenance["data"]
    assert "out" not in provenance["config"]
    assert config["l2_normalize"] is True


def test_the_best_export_is_the_epoch_of_the_highest_map(whole, data):
    scored = [r for r in metrics(whole) if "mAP" in r]
    assert [r["epoch"] for r in scored] == [0, 2, 3]  # before the first step, every second epoch, and the last
    best = max(scored[1:], key=lambda r: (r["mAP"], -r["step"]))
    provenance = json.loads((whole / "best" / "config.json").read_text())["provenance"]
    assert (provenance["mAP"], provenance["step"]) == (best["mAP"], best["step"])
    model = timm.create_model(f"local-dir:{whole}/best", pretrained=True)
    assert score(model, open_dataset(data), CPU) == {k: best[k] for k in ("mAP", "rank1")}


def test_metrics_have_losses_learning_rate_and_accuracy_of_every_step(whole):
    records = [r for r in metrics(whole) if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, len(steps(whole)) + 1))
    for r in records:
        assert r["loss"] == pytest.approx(r["loss_id"] + r["loss_triplet"], rel=1e-5)
        assert 0 <= r["accuracy"] <= 1
    assert {round(r["lr"], 8) for r in records} == {0.0001, 0.00750500, 0.00251500}


def test_training_on_a_few_images_lowers_the_loss(data, tmp_path):
    out = tmp_path / "run"
    plain = {"erase_prob": 0, "flip_prob": 0, "pad": 0}
    finetune(finetune_config(data, out, epochs=20, warmup_epochs=2, lr=0.005, eval_epochs=0, **plain))
    losses = [r["loss"] for r in metrics(out) if "loss" in r]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    assert not (out / "best").exists()


# ---- Resuming


@pytest.mark.parametrize("at", [1, 5, -1])
def test_a_run_resumes_bit_for_bit_from_any_step(whole, data, tmp_path, at):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(steps(whole)[at], tmp_path / "run" / "checkpoints")
    finetune(finetune_config(data, tmp_path / "run", resume="auto"))
    expected = numbers(whole, KEYS)
    if at == -1:  # the best model of an earlier epoch is not in the copy
        resumed = numbers(tmp_path / "run", KEYS)
        expected = {k: v for k, v in expected.items() if not k.startswith("/best")}
        assert_same({k: v for k, v in resumed.items() if not k.startswith("/best")}, expected)
        assert [r["step"] for r in metrics(tmp_path / "run") if "mAP" in r] == [len(steps(whole))]
    else:
        assert_same(numbers(tmp_path / "run", KEYS), expected)


def test_workers_and_the_cache_change_no_bit_and_no_worker_is_left(whole, data, tmp_path):
    for out, options in (("cached", {"workers": 2}), ("read", {"workers": 1, "cache_images": "none"})):
        finetune(finetune_config(data, tmp_path / out, save_minutes=0, keep=99, **options))
        assert not multiprocessing.active_children()
        assert_same(numbers(tmp_path / out, KEYS), numbers(whole, KEYS))
        log = (tmp_path / out / "log.txt").read_text()
        assert ("images: for the training steps decoded once and kept in memory, 0.00 GiB" in log) == (out == "cached")


def test_images_that_do_not_fit_are_read_in_each_epoch(data, tmp_path, monkeypatch):
    monkeypatch.setattr(reid_run, "cache_limit", lambda: 36 * 64 * 32 * 3 - 1)
    finetune(finetune_config(data, tmp_path / "run", epochs=1, eval_epochs=0))
    assert "images: read in each epoch, since 0.0 GiB are more" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_varied_run_resumes_bit_for_bit_with_workers_or_without(data, tmp_path, optimizer):
    varied = {**PRESETS["finetune"]["domain"], "optimizer": optimizer, "layer_decay": 0.8}
    options = {**varied, "epochs": 1, "save_minutes": 0, "keep": 99}
    finetune(finetune_config(data, tmp_path / "whole", **options))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(steps(tmp_path / "whole")[2], tmp_path / "run" / "checkpoints")
    finetune(finetune_config(data, tmp_path / "run", resume="auto", workers=1, **options))
    assert_same(numbers(tmp_path / "run", KEYS), numbers(tmp_path / "whole", KEYS))
    plain = finetune_config(data, tmp_path / "plain", epochs=1)
    finetune(plain)
    ours, without = (metrics(tmp_path / name)[-2]["loss"] for name in ("run", "plain"))
    assert ours != without


def test_resuming_a_finished_run_changes_nothing(whole, data):
    before, lines = numbers(whole, KEYS), metrics(whole)
    finetune(finetune_config(data, whole, resume="auto", save_minutes=0, keep=99))
    assert_same(numbers(whole, KEYS), before)
    assert metrics(whole) == lines


def test_a_run_with_other_settings_or_data_is_not_resumed(whole, data, tmp_path):
    with pytest.raises(ValueError, match=r"other settings \(lr: 0\.5, in the run 0\.01\)"):
        finetune(finetune_config(data, whole, resume="auto", lr=0.5))
    with pytest.raises(ValueError, match="holds a run"):
        finetune(finetune_config(data, whole))
    other = shutil.copytree(data, tmp_path / "other")
    next((other / "bounding_box_train").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"the run to resume has 36 images, and .* now holds 35"):
        finetune(finetune_config(other, whole, resume="auto"))


# ---- Beginning with a run


def begin(init: Path, data: Path, out: Path, **options) -> tuple[dict[str, torch.Tensor], str]:
    """Network of a run that begins with another and does not move, and the log line of its classifier."""
    options = {"model": "", "epochs": 1, "lr": 0, "eval_epochs": 0, "drop_path": 0, **options}
    finetune(finetune_config(data, out, init=str(init), **options))
    (line,) = re.findall(r"classifier: .*", (out / "log.txt").read_text())
    return torch.load(steps(out)[-1], weights_only=True)["model"], line


def trained(run: Path) -> dict[str, torch.Tensor]:
    """Network of the newest checkpoint, without the statistics of BatchNorms, which always move."""
    return without_statistics(torch.load(steps(run)[-1], weights_only=True)["model"])


def without_statistics(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.items() if "running" not in k and "num_batches" not in k}


def differing(model: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in other.items() if not torch.equal(v, model[k])}


@pytest.mark.parametrize("start", ["run", "checkpoint"])
def test_a_run_that_begins_with_a_run_of_the_same_identities_keeps_its_network(whole, data, tmp_path, start):
    init = whole if start == "run" else steps(whole)[-1]
    model, line = begin(init, data, tmp_path / "run", jitter_prob=0.8, ids_per_batch=4)
    assert line == f"classifier: kept, with the neck, since the 6 identities have the names of {init}"
    assert differing(without_statistics(model), trained(whole)) == set()


def first_batch(split: Split, num_ids: int, config: FinetuneConfig, rank: int = 0, world_size: int = 1) -> ImageBatch:
    """Batch of the first step of a process, of ``num_ids`` identities x 2 images."""
    labels = np.unique(split.pids, return_inverse=True)[1]
    sampler = KeySampler(lambda epoch: identity_batches(labels, num_ids, 2, 0, epoch), [0], rank, world_size, range(1))
    images = TrainImages(split.paths, train_transform(config), 0)
    (batch,) = load(make_loader(images, sampler, 0, False), torch.from_numpy(labels))
    return batch


def test_the_first_loss_is_that_with_which_the_run_ended(whole, data):
    config = complete(finetune_config(data, whole, init=str(whole), drop_path=0))
    state = torch.load(steps(whole)[-1], weights_only=True)
    dataset = open_dataset(data)
    ended, begun = (
        SupervisedTrainer(config, 36, dataset.identities, [4] * 3, CPU, dataset.train_fingerprint, s)
        for s in ({**state, "config": config.to_dict()}, None)
    )
    batch = first_batch(dataset.train, 3, config)
    losses = []
    for trainer in (ended, begun):
        assert differing(trainer.model.state_dict(), state["model"]) == set()
        _, figures = trainer.compute_loss(trainer.model.eval()(batch.images), batch.labels)
        losses.append({k: v.item() for k, v in figures.items()})
    assert losses[0] == losses[1]


def test_the_identities_are_compared_by_name_not_by_image_or_layout(whole, data, tmp_path):
    lines = ["path,pid,camid,split"]
    for path in sorted((data / "bounding_box_train").iterdir())[1:]:
        lines.append(f"{path},{int(path.name[:4])}.0,1,train")
    (tmp_path / "same.csv").write_text("\n".join(lines))
    model, line = begin(whole, tmp_path / "same.csv", tmp_path / "run")
    assert line == (
        f"classifier: kept, with the neck, since the 6 identities have the names of {whole}; its images are others: if "
        "its persons are, too, begin with its export"
    )
    assert differing(without_statistics(model), trained(whole)) == set()


def test_other_identities_get_a_new_classifier(whole, data, tmp_path):
    names = sorted({path.name[:4] for path in (data / "bounding_box_train").iterdir()})
    for k, renamed in enumerate((names[:-1], [*names[:-1], "0777"])):  # one left out, one renamed
        other = tmp_path / f"other{k}"
        (other / "bounding_box_train").mkdir(parents=True)
        for path in (data / "bounding_box_train").iterdir():
            if (place := names.index(path.name[:4])) < len(renamed):
                shutil.copy(path, other / "bounding_box_train" / f"{renamed[place]}{path.name[4:]}")
        for folder in ("query", "bounding_box_test"):
            shutil.copytree(data / folder, other / folder)
        model, line = begin(whole, other, tmp_path / f"run{k}")
        assert line == (
            f"classifier: new, since of the 6 identities of {whole} and the {len(renamed)} here, 5 are the same"
        )
        assert model["classifier.weight"].shape[0] == len(renamed)
        assert model["classifier.weight"].std() < 0.0015  # as initialised
        others = {k: v for k, v in trained(whole).items() if k != "classifier.weight"}
        assert differing(model, others) == {"backbone.fc_norm.bn.weight"}


def test_an_export_begins_with_a_new_classifier(whole, data, tmp_path):
    model, line = begin(whole / "export", data, tmp_path / "run")
    assert line == f"classifier: new, since {whole}/export gives no checkpoint of passreid finetune"
    assert differing(model, trained(whole)) == {"classifier.weight", "backbone.fc_norm.bn.weight"}


def test_a_run_whose_checkpoint_is_damaged_begins_with_its_export(whole, data, tmp_path, capsys):
    damaged = shutil.copytree(whole, tmp_path / "damaged")
    newest = steps(damaged)[-1]
    newest.write_bytes(newest.read_bytes()[:-5000])
    model, line = begin(damaged, data, tmp_path / "run")
    assert line == f"classifier: new, since {damaged} gives no checkpoint of passreid finetune"
    assert differing(model, trained(whole)) == {"classifier.weight", "backbone.fc_norm.bn.weight"}
    (said,) = re.findall(r"init: .*", capsys.readouterr().err)
    assert said.startswith(f"init: {newest} is cut short or damaged ")
    assert said.endswith(f"; {damaged}/export is taken instead")
    shutil.rmtree(damaged / "export")
    with pytest.raises(ValueError, match="is cut short or damaged"):
        begin(damaged, data, tmp_path / "none")


def test_another_neck_gets_a_new_classifier(whole, data, tmp_path):
    _, line = begin(whole, data, tmp_path / "run", neck="single", fusion="mean")
    assert line == (f"classifier: new, since neck is single, and multi in {whole}; fusion is mean, and cat in {whole}")


def test_a_checkpoint_without_names_keeps_its_classifier_on_the_same_images(whole, data, tmp_path):
    older = shutil.copytree(whole, tmp_path / "older")
    state = torch.load(steps(older)[-1], weights_only=True)
    del state["identities"]
    torch.save(state, steps(older)[-1])
    assert begin(older, data, tmp_path / "same")[1].startswith("classifier: kept")
    fewer = shutil.copytree(data, tmp_path / "fewer")
    next((fewer / "bounding_box_train").iterdir()).unlink()
    line = begin(older, fewer, tmp_path / "other")[1]
    assert line == f"classifier: new, since {older} does not name its identities, and its images are others"


def test_a_run_of_clustering_has_no_classifier(data, tmp_path):
    cluster(cluster_config(data, tmp_path / "usl", epochs=1))
    for out in ("run", "again"):
        line = begin(tmp_path / "usl", data, tmp_path / out)[1]
        assert line == f"classifier: new, since {tmp_path}/usl gives no checkpoint of passreid finetune"
        shutil.rmtree(tmp_path / "usl" / "export", ignore_errors=True)  # the second run begins with the checkpoint


def test_an_evaluation_that_a_kill_cut_short_is_repeated(whole, data, tmp_path, monkeypatch):
    cut = shutil.copytree(whole, tmp_path / "run")
    for checkpoint in steps(cut)[1:]:
        checkpoint.unlink()
    shutil.rmtree(cut / "best")
    write = SupervisedRun.write

    def killed(self, figures, eta=""):
        if "mAP" in figures:
            raise KeyboardInterrupt
        write(self, figures, eta)

    monkeypatch.setattr(SupervisedRun, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(finetune_config(data, cut, resume="auto", save_minutes=0, keep=99))
    monkeypatch.undo()
    (cut / "log.txt").unlink()
    finetune(finetune_config(data, cut, resume="auto", save_minutes=0, keep=99))
    lines = [line[20:] for line in (cut / "log.txt").read_text().splitlines()]
    assert lines[0].startswith("data: ")
    resumed = next(i for i, line in enumerate(lines) if line.startswith("resumed at step "))
    assert "mAP" in lines[resumed + 1]
    assert_same(numbers(cut, KEYS), numbers(whole, KEYS))
    assert [(r["step"], r["mAP"]) for r in metrics(cut) if "mAP" in r] == [
        (r["step"], r["mAP"]) for r in metrics(whole) if "mAP" in r
    ]


def test_a_run_that_is_killed_with_a_best_model_goes_on(data, tmp_path, monkeypatch):
    config = finetune_config(data, tmp_path / "run", save_epochs=99)
    write = SupervisedRun.write

    def killed(self, figures, eta=""):
        if "mAP" in figures and self.trainer.step:  # after the best model is written
            raise KeyboardInterrupt
        write(self, figures, eta)

    monkeypatch.setattr(SupervisedRun, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    assert (tmp_path / "run" / "best" / "config.json").is_file()
    monkeypatch.undo()
    finetune(replace(config, resume="auto"))
    assert [r["epoch"] for r in metrics(tmp_path / "run") if "mAP" in r] == [0, 2, 3]


def last_lines(run: Path) -> list[str]:
    """Log lines after the last evaluation, without the time."""
    lines = [line[20:] for line in (run / "log.txt").read_text().splitlines()]
    return [line for line in lines if line.startswith(("mAP ", "this run ends"))]


def test_the_start_is_evaluated_as_this_run_would_export_it(data, model, tmp_path):
    finetune(finetune_config(data, tmp_path / "run", init=str(model), epochs=1, lr=0))
    before, last = (r for r in metrics(tmp_path / "run") if "mAP" in r)
    own = timm.create_model(f"local-dir:{model}", pretrained=True, pretrained_cfg_overlay=STATISTICS_OF_FINE_TUNING)
    assert (before["step"], before["epoch"]) == (0, 0)
    assert before["mAP"] == score(own, open_dataset(data), CPU)["mAP"] == last["mAP"]
    value = f"{before['mAP']:.1f}"
    assert last_lines(tmp_path / "run") == [
        f"mAP {value} before, {value} at best ({tmp_path}/run/best), {value} at the end"
    ]


@pytest.mark.parametrize(
    ("scores", "better"),
    [
        ([50, 40, 30], "random, with which it began, ranks better"),
        ([50, 60, 30], "{run}/best ranks better"),
        ([50, 40, 60], None),
    ],
)
def test_a_run_that_ends_below_where_it_began_says_so(data, tmp_path, monkeypatch, scores, better):
    values = iter(scores)
    monkeypatch.setattr(reid_run, "score", lambda *args: dict.fromkeys(("mAP", "rank1"), float(next(values))))
    run, stop = tmp_path / "run", {"eval_epochs": 1, "epochs": 2, "save_minutes": 0}
    finetune(finetune_config(data, run, **stop))
    first, best, last = scores[0], max(scores[1:]), scores[2]
    summary = f"mAP {first:.1f} before, {best:.1f} at best ({run}/best), {last:.1f} at the end"
    sentence = f"this run ends below where it began: {better}" if better else None
    expected = list(filter(None, [summary, sentence and sentence.format(run=run)]))
    assert last_lines(run) == expected
    (run / "log.txt").unlink()
    finetune(finetune_config(data, run, resume="auto", **stop))  # nothing is left to do
    assert last_lines(run) == expected


def test_a_resumed_run_compares_with_its_start_without_evaluating_it_again(whole, data, tmp_path):
    cut = shutil.copytree(whole, tmp_path / "run")
    for checkpoint in steps(cut)[1:]:
        checkpoint.unlink()
    (cut / "log.txt").unlink()
    finetune(finetune_config(data, cut, resume="auto"))
    scored = [r for r in metrics(cut) if "mAP" in r]
    assert [r["epoch"] for r in scored] == [0, 2, 3]
    assert last_lines(cut)[0].startswith(f"mAP {scored[0]['mAP']:.1f} before, ")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_its_metrics_anew(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 0, "epoch": 0.0, "mAP": 99.0}\n')
    finetune(finetune_config(data, out, epochs=1))
    assert [r["mAP"] < 99 for r in metrics(out) if r["step"] == 0] == [True]


def test_the_best_model_on_other_data_does_not_count(whole, data, tmp_path):
    other = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((other / "best" / "config.json").read_text())
    config["provenance"]["mAP"] = 100.0
    (other / "best" / "config.json").write_text(json.dumps(config))
    for checkpoint in steps(other)[-2:]:
        checkpoint.unlink()
    smaller = shutil.copytree(data, tmp_path / "other")
    min((smaller / "query").iterdir()).unlink()
    finetune(finetune_config(data, other, resume="auto", eval_data=str(smaller)))
    best = json.loads((other / "best" / "config.json").read_text())["provenance"]
    assert best["mAP"] < 100
    assert best["evaluated_on"] == open_dataset(smaller).fingerprint
    (other / "log.txt").unlink()
    finetune(finetune_config(data, other, resume="auto"))  # finished, and its best model is that of other data
    assert last_lines(other) == []


# ---- The step


def test_frozen_blocks_do_not_move_and_the_others_do(data, tmp_path):
    run = finetune_config(data, tmp_path / "run", freeze_blocks=2, epochs=1, save_minutes=0, keep=99, lr=0.1)
    finetune(run)
    first, last = (torch.load(steps(tmp_path / "run")[i], weights_only=True)["model"] for i in (0, -1))
    stay = {k for k in first if torch.equal(first[k], last[k])}
    frozen = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "blocks.0.", "blocks.1.")
    expected = {k for k in first if k.startswith(tuple(f"backbone.{f}" for f in frozen))}
    assert stay - {"backbone.fc_norm.bn.bias"} == expected


def test_a_frozen_stem_keeps_its_statistics_and_frozen_blocks_drop_no_path(data, tmp_path):
    backbone: Any = timm.create_model("test_pass_vit", embed_layer=ConvStem, drop_path_rate=0.9)
    freeze(backbone, 2)
    images = torch.randn(4, 3, 64, 32)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    stem = backbone.patch_embed(images)
    assert torch.equal(backbone.patch_embed(images[:1]), stem[:1])  # whatever else is in the batch
    torch.testing.assert_close(backbone.blocks[1](stem), backbone.blocks[1](stem), rtol=0, atol=0)
    backbone(images)
    assert [k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])] == []
    trainer = make_trainer(finetune_config(data, tmp_path, freeze_blocks=2))
    assert [block.training for block in trainer.backbone.blocks] == [False, False, True]
    assert not trainer.backbone.patch_embed.training


def test_identities_with_one_image_train_by_the_cross_entropy_alone(data, tmp_path):
    single = shutil.copytree(data, tmp_path / "single")
    pids = set()
    for path in sorted((single / "bounding_box_train").iterdir()):
        if path.name[:4] in pids:
            path.unlink()
        pids.add(path.name[:4])
    with pytest.raises(ValueError, match=r"triplet_weight: every identity .* has one image.*--triplet-weight 0"):
        finetune(finetune_config(single, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    finetune(finetune_config(single, tmp_path / "run", triplet_weight=0, epochs=1, eval_epochs=0))
    assert "images in random order" in (tmp_path / "run" / "log.txt").read_text()
    (record,) = (r for r in metrics(tmp_path / "run") if "loss" in r)
    assert "loss_triplet" not in record
    assert record["loss"] == record["loss_id"]


def test_an_unreadable_image_that_an_epoch_draws_twice_counts_once(data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "broken")
    only, *others = sorted((broken / "bounding_box_train").iterdir())[:6]  # of one identity
    only.write_bytes(b"")
    for path in others:
        path.unlink()
    options = {"ids_per_batch": 6, "epochs": 1, "warmup_epochs": 0, "eval_epochs": 0}
    finetune(finetune_config(broken, tmp_path / "run", max_unreadable=1 / 31, **options))
    assert (tmp_path / "run" / "log.txt").read_text().count(f"left out: {only}: ") == 1


@pytest.mark.parametrize("model", ["", "test_pass_vit"])
def test_a_run_without_its_export_gives_its_size_and_fusion_whether_or_not_a_model_is_named(data, tmp_path, model):
    small = {"size": (32, 32), "fusion": "mean", "epochs": 1, "eval_epochs": 0}
    finetune(finetune_config(data, tmp_path / "run", **small))
    shutil.rmtree(tmp_path / "run" / "export")
    config = complete(FinetuneConfig(data=str(data), init=str(tmp_path / "run"), model=model))
    assert (config.model, config.size, config.fusion) == ("test_pass_vit", (32, 32), "mean")
    with pytest.raises(ValueError, match="run holds test_pass_vit, and model is transreid_vit_small_patch16"):
        complete(replace(config, model="transreid_vit_small_patch16"))


def test_options_without_effect_are_named_in_one_warning(data, tmp_path, capsys):
    options = {"brightness": 0.2, "hue": 0.05, "blur_radius": (1, 2), "downscale": (0.5, 0.6), "margin": 0.3}
    run = {"epochs": 1, "triplet_weight": 0, "quiet": True}
    finetune(finetune_config(data, tmp_path / "run", **options, **run))
    warning = (
        "brightness (needs jitter_prob), blur_radius (needs blur_prob), downscale (needs downscale_prob), margin (needs"
    )
    assert capsys.readouterr().err.count(f"without effect: {warning} triplet_weight)\n") == 1
    switched_on = {"jitter_prob": 0.1, "blur_prob": 0.1, "downscale_prob": 0.1, "triplet_weight": 1}
    finetune(finetune_config(data, tmp_path / "other", **options, **{**run, **switched_on}))
    assert capsys.readouterr().err == ""


def test_label_smoothing_and_the_weights_of_the_losses_take_effect(data, tmp_path):
    records = {}
    for name, options in {"plain": {}, "heavy": {"id_weight": 2.0, "triplet_weight": 3.0}}.items():
        finetune(finetune_config(data, tmp_path / name, epochs=1, eval_epochs=0, **options))
        records[name] = next(r for r in metrics(tmp_path / name) if "loss" in r)
    assert records["heavy"]["loss_id"] == records["plain"]["loss_id"]
    heavy = records["heavy"]
    assert heavy["loss"] == pytest.approx(2 * heavy["loss_id"] + 3 * heavy["loss_triplet"], rel=1e-5)
    trainer = make_trainer(FinetuneConfig(**{**vars(finetune_config(data, tmp_path)), "label_smoothing": 0.3}))
    logits, features, labels = torch.randn(4, 6), torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
    _, figures = trainer.compute_loss((features, features, logits), labels)
    assert torch.equal(figures["loss_id"], F.cross_entropy(logits, labels, label_smoothing=0.3))


def make_trainer(config: FinetuneConfig) -> SupervisedTrainer:
    return SupervisedTrainer(config, 36, "abcdef", [4] * config.epochs, CPU)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_with_one_image_for_each_batchnorm_is_refused(data, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(trainer_module, "world", lambda: (0, processes))
    config = finetune_config(data, tmp_path, ids_per_batch=processes, images_per_id=1, triplet_weight=0)
    with pytest.raises(ValueError, match=f"ids_per_batch: with {processes} images in a batch of {processes} processes"):
        make_trainer(config)


def test_junk_is_not_trained_on_and_the_log_says_so(data, tmp_path):
    lines = ["path,pid,camid,split"]
    for folder, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        for i, path in enumerate(sorted((data / folder).iterdir())):
            pid = -1 if split == "train" and i < 3 else int(path.name[:4])
            lines.append(f"{path},{pid},{path.name[6]},{split}")
    (tmp_path / "own.csv").write_text("\n".join(lines))
    finetune(finetune_config(tmp_path / "own.csv", tmp_path / "run", epochs=1))
    assert "junk: 3 training images with identity -1 are left out" in (tmp_path / "run" / "log.txt").read_text()
    assert ReIDModel.load(tmp_path / "run" / "export").num_ids == 6
    assert torch.load(steps(tmp_path / "run")[-1], weights_only=True)["num_images"] == 33
    lines = [re.sub(r",\d+,(\d),train", r",-1,\1,train", line) for line in lines]
    (tmp_path / "junk.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"data: all training images of .*junk\.csv are junk"):
        finetune(finetune_config(tmp_path / "junk.csv", tmp_path / "other"))


@pytest.mark.parametrize("eval_data", ["", "other/../tree"])
def test_log_and_card_name_an_evaluation_on_the_training_images(data, tmp_path, eval_data):
    (tmp_path / "other").mkdir()
    for path in (data / "bounding_box_train").iterdir():
        (tmp_path / "tree" / path.name[:4]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "tree" / path.name[:4])
    finetune(
        finetune_config(
            tmp_path / "tree", tmp_path / "run", epochs=1, eval_data=eval_data and str(tmp_path / eval_data)
        )
    )
    log = "evaluation: on the training images (36 of 36), so its scores mislead; name other data by --eval-data"
    assert log in (tmp_path / "run" / "log.txt").read_text()
    card = ModelCard(files_to_publish(tmp_path / "run" / "best", "me/mine")["README.md"].decode())
    assert "**Accuracy:** not stated, since the run was evaluated on images that it trained on\n" in card.text
    assert "evaluated_training_images: `36`" in card.text
    assert card.data.eval_results is None


def test_a_training_image_in_the_gallery_of_other_data_is_counted(data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    (other / "gallery.csv").write_text(
        "path,pid,camid,split\n"
        + "".join(f"{p},{p.name[:4]},{p.name[6]},query\n" for p in (other / "query").iterdir())
        + "".join(f"{p},{p.name[:4]},{p.name[6]},gallery\n" for p in (other / "bounding_box_test").iterdir())
        + f"{min((data / 'bounding_box_train').iterdir())},1,1,gallery\n"
    )
    run = finetune(finetune_config(data, tmp_path / "run", epochs=1, eval_data=str(other / "gallery.csv"))).parent
    assert "evaluation: on the training images (1 of 25), so" in (run / "log.txt").read_text()
    assert json.loads((run / "best" / "config.json").read_text())["provenance"]["evaluated_training_images"] == 1


def test_a_link_to_a_training_image_in_the_gallery_is_counted(data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    image = min((data / "bounding_box_train").iterdir())
    (other / "bounding_box_test" / image.name).symlink_to(image)
    run = finetune(finetune_config(data, tmp_path / "run", epochs=1, eval_data=str(other))).parent
    assert re.search(r"evaluation: on the training images \(1 of \d+\), so", (run / "log.txt").read_text())


def test_a_run_of_another_number_of_parts_is_fine_tuned_further(data, tmp_path):
    save_pretrained(timm.create_model("test_pass_vit", num_parts=2, img_size=(64, 32)), tmp_path / "start")
    first = finetune(finetune_config(data, tmp_path / "first", epochs=1, init=str(tmp_path / "start"))).parent
    finetune(finetune_config(data, tmp_path / "second", epochs=1, init=str(first)))
    export = timm.create_model(f"local-dir:{tmp_path}/second/export", pretrained=True)
    assert export.num_parts == 2
    assert "classifier: kept" in (tmp_path / "second" / "log.txt").read_text()


def test_an_evaluation_on_other_images_is_stated_as_accuracy(whole):
    assert "on the training images" not in (whole / "log.txt").read_text()
    card = ModelCard(files_to_publish(whole / "best", "me/mine")["README.md"].decode())
    assert "**Accuracy:** mAP " in card.text
    assert len(card.data.eval_results) == 2


def test_a_step_that_is_not_finite_is_skipped_or_stops_the_run(data, tmp_path):
    bad = ImageBatch(torch.full((4, 3, 64, 32), torch.nan), torch.tensor([0, 0, 1, 1]), [])
    with pytest.raises(NonFiniteLossError, match="the loss of step 1 is not finite"):
        make_trainer(finetune_config(data, tmp_path)).training_step([bad])
    trainer = make_trainer(finetune_config(data, tmp_path, skip_nonfinite=1))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}  # with the statistics of the necks
    record = trainer.training_step([bad])
    assert math.isnan(record["loss"])
    assert (trainer.step, trainer.skipped) == (1, 1)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


# ---- Processes


def _write_gradients(data: str, out: str) -> int:
    """Write the gradients of the triplet loss in the first step, from this process's share and averaged by DDP."""
    config = finetune_config(data, Path(out), id_weight=0.0, sync_bn=False, drop_path=0.0)
    with process_group("cpu"):
        train = open_dataset(data).train
        trainer = SupervisedTrainer(replace(config, ids_per_batch=4, images_per_id=2), 36, "abcdef", [4] * 3, CPU)
        batch = first_batch(train, 4, replace(config, pad=10), trainer.rank, trainer.world_size)
        trainer.backbone.fc_norm.eval()  # in training, its statistics would be those of a share
        loss, figures = trainer.compute_loss(trainer.parallel(batch.images), batch.labels)
        loss.backward()
        rows = gather_rows(batch.labels)
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        torch.save({"grads": gradients, "loss": figures["loss"].detach(), "labels": rows}, f"{out}_{trainer.rank}.pt")
    return 0


def test_two_processes_have_the_triplets_and_the_gradient_of_one(data, tmp_path):
    _write_gradients(str(data), str(tmp_path / "one"))
    one = torch.load(tmp_path / "one_0.pt", weights_only=True)
    children = world(_write_gradients, str(data), str(tmp_path / "two"), folder=tmp_path / "printed")
    assert [child.wait() for child in children] == [0, 0], children[0].output
    for rank in range(2):
        two = torch.load(tmp_path / f"two_{rank}.pt", weights_only=True)
        torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=0)
        assert sorted(two["labels"].tolist()) == sorted(one["labels"].tolist())
        assert two["grads"].keys() == one["grads"].keys()
        for name, gradient in one["grads"].items():
            torch.testing.assert_close(two["grads"][name], gradient, rtol=1e-4, atol=1e-6)


def _finetune(config: FinetuneConfig) -> int:
    finetune(config)
    return 0


def test_a_run_of_two_processes_evaluates_and_exports_once(data, tmp_path):
    config = finetune_config(data, tmp_path / "run", ids_per_batch=4, epochs=2)
    children = world(_finetune, config, folder=tmp_path / "printed")
    assert [child.wait() for child in children] == [0, 0], children[0].output
    scored = [r for r in metrics(tmp_path / "run") if "mAP" in r]
    assert [r["epoch"] for r in scored] == [0, 2]
    model = timm.create_model(f"local-dir:{tmp_path}/run/export", pretrained=True)
    assert score(model, open_dataset(data), CPU)["mAP"] == pytest.approx(scored[-1]["mAP"], abs=1e-4)
    with pytest.raises(ValueError, match="ids_per_batch: 3 is not divisible by 2 processes"):
        _refuse(replace(config, ids_per_batch=3))


def _refuse(config: FinetuneConfig) -> None:
    trainer = object.__new__(SupervisedTrainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("passreid_models.training.trainer.world", lambda: (0, 2))
        trainer.__init__(config, 36, 6, [4] * config.epochs, CPU)


# ---- Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, "data: expected a dataset"),
        ({"init": ""}, "init: expected weights to begin with: .* random for none"),
        ({"init": "nowhere/at/all"}, "init: unknown model 'nowhere/at/all'; known: "),
        ({"ids_per_batch": 7}, "ids_per_batch: 7 is more than the 6 identities"),
        ({"freeze_blocks": 9}, "freeze_blocks: 9 is more than the 3 blocks"),
        ({"triplet_weight": 0, "ids_per_batch": 30}, "a batch takes 60 images, and the training set has 36"),
        ({"eval_data": "nowhere"}, "nowhere: no such file or folder"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_written(data, tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        finetune(finetune_config(options.pop("data", data), tmp_path / "run", **options))
    assert files(tmp_path) == set()


def test_data_without_queries_train_and_the_log_reports_no_evaluation(data, tmp_path):
    train = shutil.copytree(data, tmp_path / "market")
    for folder in ("query", "bounding_box_test"):
        for path in (train / folder).iterdir():
            path.unlink()
    finetune(finetune_config(train, tmp_path / "run", epochs=1))
    assert "evaluation: none, there are no queries and gallery" in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert not any("mAP" in r for r in metrics(tmp_path / "run"))
