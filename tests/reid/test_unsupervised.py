"""Training without labels: output of a run, resuming, too few clusters, domain adaptation, processes, mistakes."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml

from passreid_models import Embedder, load_report, save_pretrained
from passreid_models.data.datasets import open_dataset
from passreid_models.device import process_group
from passreid_models.evaluation.evaluate import score
from passreid_models.evaluation.report import NonFiniteError
from passreid_models.reid import unsupervised
from passreid_models.reid.config import ClusterConfig, FinetuneConfig
from passreid_models.reid.model import without_drop_path
from passreid_models.reid.pseudo_labels import cluster_features
from passreid_models.reid.unsupervised import ClusterRun, ClusterTrainer, cluster, compare_with_labels
from passreid_models.training.trainer import NonFiniteLossError
from passreid_models.training.warm_start import find_weights
from tests.tiny_reid import assert_same, cluster_config, finetune_config, numbers, steps
from tests.tiny_runs import files, metrics, world

KEYS = ClusterTrainer.state_keys
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run with a checkpoint at every step."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    cluster(cluster_config(data, out, save_minutes=0, keep=99))
    return out


def state_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


# ---- Output of a run


def test_the_export_is_the_descriptor_after_the_neck(whole, data):
    model = timm.create_model(f"local-dir:{whole}/export", pretrained=True).eval()
    assert load_report(model).missing == []
    assert (model.neck, model.global_pool, model.blocks[-1].training) == ("single", "cat", False)
    state = state_of(steps(whole)[-1])["model"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    cfg = model.pretrained_cfg
    assert (list(cfg["mean"]), list(cfg["std"]), cfg["interpolation"]) == ([0.5] * 3, [0.5] * 3, "bicubic")
    scored = [r for r in metrics(whole) if "mAP" in r]
    assert [r["epoch"] for r in scored] == [0, 1, 2]
    assert score(model, open_dataset(data), CPU) == {k: scored[-1][k] for k in ("mAP", "rank1")}


def test_config_json_says_how_the_weights_were_made(whole):
    provenance = json.loads((whole / "export" / "config.json").read_text())["provenance"]
    assert (provenance["method"], provenance["step"], provenance["config"]["eps"]) == ("cluster contrast", 6, 0.7)


def test_the_start_is_evaluated_after_its_fresh_neck(whole, data):
    torch.manual_seed(0)
    trainer = ClusterTrainer(cluster_config(data, whole), 36, CPU)
    (before,) = (r for r in metrics(whole) if "mAP" in r and r["step"] == 0)
    assert score(without_drop_path(trainer.backbone), open_dataset(data), CPU)["mAP"] == before["mAP"]
    assert " before, " in (whole / "log.txt").read_text()


def test_each_epoch_reports_its_clusters_and_how_they_agree_with_the_labels(whole):
    reports = [r for r in metrics(whole) if "clusters" in r]
    assert [r["epoch"] for r in reports] == [0, 1]
    for report, checkpoint in zip(reports, (steps(whole)[0], steps(whole)[3]), strict=True):
        labels = state_of(checkpoint)["labels"].numpy()
        assert report["clusters"] == labels.max() + 1 >= 2
        assert report["outliers"] == pytest.approx((labels < 0).mean())
        assert 0 < report["purity"] <= 1
        assert -1 <= report["ari"] <= 1


def test_the_clusters_of_an_epoch_are_those_of_the_descriptors_before_it(whole, data, tmp_path):
    state = state_of(steps(whole)[2])  # the end of epoch 0
    model = timm.create_model("test_pass_vit", neck="single", img_size=(64, 32)).eval()
    model.load_state_dict(state["model"])
    cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    features = F.normalize(Embedder(model, CPU)(open_dataset(data).train.paths), dim=1)
    labels = cluster_features(features, eps=0.7, min_samples=2, k1=6, k2=3)
    after = state_of(steps(whole)[3])
    assert np.array_equal(after["labels"].numpy(), labels)
    assert len(after["centroids"]) == labels.max() + 1
    torch.testing.assert_close(after["centroids"].norm(dim=1), torch.ones(len(after["centroids"])))


def test_a_kill_after_the_clustering_of_an_epoch_leaves_its_row_once(data, tmp_path, monkeypatch):
    draw = ClusterRun.draw
    monkeypatch.setattr(ClusterRun, "draw", lambda self, epoch: 1 / 0 if epoch else draw(self, epoch))
    with pytest.raises(ZeroDivisionError):
        cluster(cluster_config(data, tmp_path / "run"))
    monkeypatch.undo()
    cluster(cluster_config(data, tmp_path / "run", resume="auto"))
    assert [row["epoch"] for row in metrics(tmp_path / "run") if "clusters" in row] == [0, 1]


def test_workers_that_live_through_the_clusterings_change_no_bit_and_none_is_left(whole, data, tmp_path):
    cluster(cluster_config(data, tmp_path / "run", save_minutes=0, keep=99, workers=2))
    assert not multiprocessing.active_children()
    assert_same(numbers(tmp_path / "run", KEYS), numbers(whole, KEYS))


def test_multi_neck_descriptors_are_clustered_as_they_come(data, tmp_path, monkeypatch):
    inputs = []

    def spy(features, *args):
        inputs.append((features.clone(), args[-1]))
        return cluster_features(features, *args)

    monkeypatch.setattr("passreid_models.reid.unsupervised.cluster_features", spy)
    cluster(cluster_config(data, tmp_path / "run", neck="multi", epochs=1, eps=0.5))
    ((features, metric),) = inputs
    assert metric == "euclidean"
    assert (features.norm(dim=1) - 1).abs().max() > 0.01
    assert (features.norm(dim=1) < 2**0.5 + 1e-4).all()  # two vectors of length 1 at most


def test_the_memory_begins_with_the_normalised_means_of_the_clusters(data, tmp_path):
    trainer = ClusterTrainer(cluster_config(data, tmp_path), 5, CPU)
    features = F.normalize(torch.randn(5, 128), dim=1)
    trainer.begin_epoch(torch.tensor([1, 0, -1, 1, 0]), features)
    expected = torch.stack([features[[1, 4]].mean(0), features[[0, 3]].mean(0)])
    torch.testing.assert_close(trainer.memory.centroids, F.normalize(expected, dim=1))


def test_the_learning_rate_falls_every_lr_step_epochs(data, tmp_path):
    trainer = ClusterTrainer(cluster_config(data, tmp_path, epochs=5, lr=1.0, lr_step=2, lr_gamma=0.1), 5, CPU)
    assert [trainer.lr(e, 1.0) for e in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_the_checkpoint_holds_its_image_statistics(whole):
    model = find_weights(str(steps(whole)[-1]), "test_pass_vit").create("test_pass_vit", img_size=(64, 32), neck="")
    cfg = model.pretrained_cfg
    assert (list(cfg["mean"]), list(cfg["std"]), cfg["interpolation"]) == ([0.5] * 3, [0.5] * 3, "bicubic")


def test_the_images_of_batches_with_fewer_clusters_than_wanted_are_counted(data, tmp_path):
    images = []
    take_step = ClusterTrainer.training_step

    def count(self, batches):
        images.append(self.world_size * len(batches[0].images))
        return take_step(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusterTrainer, "training_step", count)
        config = cluster_config(data, tmp_path / "run", clusters_per_batch=30, save_minutes=0, keep=99)
        cluster(config)
    assert max(images) < config.batch_size
    assert [state_of(path)["images_seen"] for path in steps(tmp_path / "run")] == np.cumsum(images).tolist()
    for path in steps(tmp_path / "run")[4:]:
        path.unlink()
    cluster(replace(config, resume="auto"))
    provenance = json.loads((tmp_path / "run" / "export" / "config.json").read_text())["provenance"]
    assert provenance["images_seen"] == sum(images)


def test_a_checkpoint_that_does_not_count_images_resumes_as_of_whole_batches(whole, data, tmp_path):
    state = state_of(steps(whole)[2])
    assert state.pop("images_seen") == 3 * 2 * 4
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / steps(whole)[2].name)
    cluster(cluster_config(data, tmp_path, resume="auto"))
    assert state_of(steps(tmp_path)[-1])["images_seen"] == 6 * 2 * 4


# ---- Resuming


@pytest.mark.parametrize("at", [0, 2, 3])  # within an epoch, at its end, at the beginning of the next
def test_a_run_resumes_bit_for_bit_from_any_step(whole, data, tmp_path, at):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(steps(whole)[at], tmp_path / "run" / "checkpoints")
    cluster(cluster_config(data, tmp_path / "run", resume="auto"))
    expected, resumed = numbers(whole, KEYS), numbers(tmp_path / "run", KEYS)
    if at == 3:  # the best model may be that of epoch 1, which is not in the copy
        expected, resumed = ({k: v for k, v in x.items() if not k.startswith("/best")} for x in (expected, resumed))
    assert_same(resumed, expected)


# ---- Too few clusters, no labels, unreadable images


def test_all_outliers_end_the_first_epoch_with_advice(data, tmp_path):
    with pytest.raises(ValueError, match=r"eps: 0 clusters of 36 images, 100% .* a larger --eps \(it is 0\.01\)"):
        cluster(cluster_config(data, tmp_path / "run", eps=0.01, min_samples=9))


def test_a_single_cluster_ends_the_first_epoch_with_advice(data, tmp_path):
    with pytest.raises(ValueError, match=r"eps: 1 cluster of 36 images, .* a smaller --eps \(it is 0\.999\) or --k1"):
        cluster(cluster_config(data, tmp_path / "run", eps=0.999, k1=36))


@pytest.mark.parametrize("count", [0, 1])
def test_in_later_epochs_the_clusters_of_the_epoch_before_are_kept(data, tmp_path, monkeypatch, count):
    real, calls = unsupervised.cluster_features, []

    def find(features, *args):
        calls.append(1)
        return real(features, *args) if len(calls) == 1 else np.full(len(features), count - 1, dtype=np.int64)

    monkeypatch.setattr(unsupervised, "cluster_features", find)
    cluster(cluster_config(data, tmp_path / "run", save_minutes=0, keep=99))
    assert len(calls) == 2
    assert f"epoch 1: {count} cluster" in (tmp_path / "run" / "log.txt").read_text()
    assert [r["clusters"] for r in metrics(tmp_path / "run") if "clusters" in r][1] == count
    labels = [state_of(p)["labels"] for p in steps(tmp_path / "run")]
    assert len(labels) == 6
    assert all(torch.equal(x, labels[0]) for x in labels)


def test_fewer_images_than_k1_end_with_advice(data, tmp_path):  # each is a neighbour of all
    message = r"eps: 1 cluster of 36 images, .* --k1 \(500\), near the number of images of a person"
    with pytest.raises(ValueError, match=message):
        cluster(cluster_config(data, tmp_path / "run", k1=500))
    assert "k1" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(("camids", "are_used"), [([0, 1, 2, 3, 0, 1], True), ([0, 1, 2, 3, 0, -1], False)])
def test_cameras_are_used_if_every_training_image_has_one(data, tmp_path, monkeypatch, camids, are_used):
    run = ClusterRun(cluster_config(data, tmp_path / "run", steps=50), CPU)
    run.train_split = replace(run.train_split, camids=np.tile(camids, 6))
    monkeypatch.setattr(ClusterRun, "labels", np.repeat(np.arange(6), 6))
    groups = run.train_split.camids[np.concatenate(run.draw(0))]  # [clusters, images]
    shared = (groups[:, 1:] == groups[:, :1]).any(axis=1)
    assert shared.any() == (not are_used)


def test_fewer_clusters_than_processes_are_refused(data, tmp_path, monkeypatch):
    run = ClusterRun(cluster_config(data, tmp_path / "run", clusters_per_batch=4), CPU)
    monkeypatch.setattr(ClusterRun, "labels", np.repeat(np.arange(3), 12))
    run.trainer.world_size = 4
    with pytest.raises(ValueError, match="3 clusters are too few for 4 processes: resume with as many as the run had"):
        run.draw(0)


def test_a_folder_without_labels_trains_and_reports_clusters_alone(data, tmp_path):
    folder = tmp_path / "crops"
    folder.mkdir()
    for i, path in enumerate(sorted((data / "bounding_box_train").iterdir())):
        shutil.copy(path, folder / f"{i}.jpg")
    cluster(cluster_config(folder, tmp_path / "run", epochs=1))
    (report,) = (r for r in metrics(tmp_path / "run") if "clusters" in r)
    assert report.keys() == {"step", "epoch", "clusters", "outliers"}
    assert not any("mAP" in r for r in metrics(tmp_path / "run"))
    cluster(cluster_config(folder, tmp_path / "other", epochs=1, eval_data=str(data)))
    assert any("mAP" in r for r in metrics(tmp_path / "other"))


def test_an_unreadable_image_is_in_no_cluster(data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "market")
    first = min((broken / "bounding_box_train").iterdir())
    first.write_bytes(b"no image")
    cluster(cluster_config(broken, tmp_path / "run", epochs=1, max_unreadable=0.1))
    assert state_of(steps(tmp_path / "run")[-1])["labels"][0] == -1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("left out: ") == log.count(first.name + ": ") == 1
    with pytest.raises(ValueError, match=r"max_unreadable: 1 of 36 images cannot be read, more than 1\.00%"):
        cluster(cluster_config(broken, tmp_path / "strict", epochs=1))


def test_folders_of_unlabelled_images_are_no_identities_to_evaluate_on(data, tmp_path):
    for i, path in enumerate((data / "bounding_box_train").iterdir()):
        folder = tmp_path / "crops" / f"p{path.name[6]}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{i}.jpg")
    cluster(cluster_config(tmp_path / "crops", tmp_path / "run", epochs=1))
    assert not any("mAP" in r for r in metrics(tmp_path / "run"))
    assert "folders are taken for identities in purity and ARI" in (tmp_path / "run" / "log.txt").read_text()


def test_purity_and_ari_worked_out_by_hand():
    clusters, pids = np.array([0, 0, 0, 1, 1, -1, 1]), np.array([5, 5, 7, 7, 7, 7, -1])
    agreement = compare_with_labels(clusters, pids)
    assert agreement["purity"] == pytest.approx(4 / 5)  # 2 of 3, 2 of 2
    # pairs together in both 1 + 1, in clusters 3 + 1, in identities 1 + 3, of 10: (2 - 1.6) / (4 - 1.6)
    assert agreement["ari"] == pytest.approx(0.4 / 2.4)
    assert compare_with_labels(clusters, np.full(7, -1)) == {}


# ---- Domain adaptation


def test_a_source_is_fine_tuned_on_first_and_its_backbone_adapted(data, tmp_path):
    (tmp_path / "source.yaml").write_text(
        yaml.safe_dump({"epochs": 1, "warmup_epochs": 0, "ids_per_batch": 3, "images_per_id": 2})
    )
    config = cluster_config(
        data, tmp_path / "run", source=str(data), source_config=str(tmp_path / "source.yaml"), lr=0.0, epochs=1
    )
    cluster(config)
    source = timm.create_model(f"local-dir:{tmp_path}/run/source/export", pretrained=True)
    adapted = timm.create_model(f"local-dir:{tmp_path}/run/export", pretrained=True)
    assert all(torch.equal(v, adapted.state_dict()[k]) for k, v in source.state_dict().items())
    provenance = json.loads((tmp_path / "run" / "export" / "config.json").read_text())["provenance"]
    assert provenance["init_provenance"]["method"] == "supervised re-ID"
    assert "36 training images" in provenance["init_provenance"]["data"]
    assert provenance["init_provenance"]["config"]["ids_per_batch"] == 3
    saved = ClusterConfig.from_dict(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert (saved.source, saved.init) == ("", f"{tmp_path}/run/source/export")  # it repeats the adaptation alone
    before = files(tmp_path / "run")
    cluster(ClusterConfig(**{**vars(config), "resume": "auto"}))
    assert files(tmp_path / "run") == before
    for checkpoint in steps(tmp_path / "run" / "source"):  # to save space, as of any finished run
        checkpoint.unlink()
    cluster(replace(config, resume="auto"))
    assert files(tmp_path / "run") == before - {f for f in before if "source/checkpoints/step" in str(f)}
    shutil.rmtree(tmp_path / "run" / "source")  # the checkpoint of the adaptation holds all weights
    cluster(replace(config, resume="auto", source="nowhere", init=""))
    assert not (tmp_path / "run" / "source").exists()


def test_a_source_that_is_fine_tuned_is_taken_up_if_it_began_with_the_same_weights(data, model, tmp_path):
    (tmp_path / "source.yaml").write_text("{epochs: 1, warmup_epochs: 0, ids_per_batch: 2, images_per_id: 2}")
    config = cluster_config(
        data, tmp_path / "run", source=str(data), source_config=str(tmp_path / "source.yaml"), k1=500, epochs=1
    )
    with pytest.raises(ValueError, match="too few clusters to train on"):
        cluster(config)
    with pytest.raises(ValueError, match=r"init: .*source began with random and not with .*model: name another --out"):
        cluster(replace(config, init=str(model)))
    before = (tmp_path / "run" / "source" / "metrics.jsonl").read_bytes()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    cluster(replace(config, k1=6, out=str(moved)))
    assert (moved / "source" / "metrics.jsonl").read_bytes() == before
    cluster(replace(config, k1=6, out=str((moved).rename(tmp_path / "run")), resume="auto"))
    assert "is not used" not in (tmp_path / "run" / "log.txt").read_text()


def test_invalid_settings_of_the_source_are_reported_before_training(data, tmp_path):
    (tmp_path / "source.yaml").write_text("epoch: 3\n")
    config = cluster_config(data, tmp_path / "run", source=str(data), source_config=str(tmp_path / "source.yaml"))
    with pytest.raises(
        ValueError, match=r"source_config: .*source\.yaml: Option 'epoch' is not accepted; did you mean epochs\?"
    ):
        cluster(config)
    (tmp_path / "source.yaml").write_text("- 3\n")
    with pytest.raises(ValueError, match=r"source\.yaml: Unexpected config: - 3"):
        cluster(config)
    (tmp_path / "source.yaml").write_text("ids_per_batch: 9\nepochs: 2\n")
    with pytest.raises(ValueError, match=r"source .*market: ids_per_batch: 9 is more than the 6 .*--source-config"):
        cluster(config)
    (tmp_path / "source.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"source\.yaml: Problems parsing config: while parsing"):
        cluster(config)
    with pytest.raises(
        ValueError, match=r"source_config: expected a YAML file or one or more of .*laptop, domain, got 'none"
    ):
        cluster(replace(config, source_config="none.yaml"))
    with pytest.raises(ValueError, match="source_config: expected a source to go with it"):
        cluster_config(data, tmp_path / "run", source_config="x.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "nowhere: no such file or folder"),
        ({"eval_data": "nowhere"}, "nowhere: no such file or folder"),
        ({"init": ""}, "init: expected weights to begin with"),
    ],
)
def test_errors_in_the_target_are_reported_before_training_on_the_source(data, tmp_path, options, message):
    config = cluster_config(options.pop("data", data), tmp_path / "run", source=str(data), **options)
    with pytest.raises((ValueError, OSError), match=message):
        cluster(config)
    assert files(tmp_path) == set()


def test_another_run_in_the_folder_is_reported_before_training_on_the_source(whole, data):
    before = files(whole)
    with pytest.raises(ValueError, match="holds a run"):
        cluster(cluster_config(data, whole, source=str(data)))
    assert files(whole) == before


# ---- Processes and mistakes


def _cluster(config: ClusterConfig) -> int:
    cluster(config)
    return 0


def test_two_processes_have_the_same_clusters_and_memory(data, tmp_path):
    config = cluster_config(data, tmp_path / "run", epochs=2, save_minutes=0, keep=99)
    children = world(_cluster, config, folder=tmp_path / "printed")
    assert [child.wait() for child in children] == [0, 0], children[0].output
    reports = [r for r in metrics(tmp_path / "run") if "clusters" in r]
    assert len(reports) == 2
    alone = tmp_path / "alone"
    cluster(cluster_config(data, alone, epochs=1, save_minutes=0, keep=99))
    first, of_one = (state_of(steps(run)[0]) for run in (tmp_path / "run", alone))
    assert torch.equal(first["labels"], of_one["labels"])
    scored = [r["mAP"] for r in metrics(tmp_path / "run") if "mAP" in r]
    model = timm.create_model(f"local-dir:{tmp_path}/run/export", pretrained=True)
    assert score(model, open_dataset(data), CPU)["mAP"] == pytest.approx(
        scored[-1], abs=1e-4
    )  # of one set of statistics


def _write_memory(out: str) -> int:
    """Write the memory after a step on this process's share of eight images."""
    with process_group("cpu"):
        trainer = ClusterTrainer(cluster_config("unused", Path(out)), 8, CPU)
        generator = torch.Generator().manual_seed(0)
        features, outputs = (torch.randn(8, 128, generator=generator) for _ in range(2))
        labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
        trainer.begin_epoch(labels, features)
        share = slice(trainer.rank * 8 // trainer.world_size, (trainer.rank + 1) * 8 // trainer.world_size)
        trainer.after_step(outputs[share], labels[share])
        torch.save(trainer.memory.centroids, f"{out}_{trainer.rank}.pt")
    return 0


def test_the_memory_is_updated_by_the_images_of_all_processes(tmp_path):
    _write_memory(str(tmp_path / "one"))
    children = world(_write_memory, str(tmp_path / "two"), folder=tmp_path / "printed")
    assert [child.wait() for child in children] == [0, 0], children[0].output
    one = torch.load(tmp_path / "one_0.pt", weights_only=True)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"two_{rank}.pt", weights_only=True), one)


def test_clusters_that_the_processes_cannot_share_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(unsupervised, "world", lambda: (0, 3))
    for options in ({}, {"source": str(data)}):
        with pytest.raises(ValueError, match="clusters_per_batch: 2 is not divisible by 3 processes"):
            cluster(cluster_config(data, tmp_path / "run", **options))
    assert files(tmp_path) == set()


def test_descriptors_that_are_not_finite_are_in_no_cluster_and_too_many_end_the_run(data, tmp_path, monkeypatch):
    bad, load = min((data / "bounding_box_train").iterdir()), Embedder._load
    monkeypatch.setattr(
        Embedder, "_load", lambda self, item, bgr: load(self, item, bgr) * (torch.nan if item == bad else 1)
    )
    cluster(cluster_config(data, tmp_path / "run", epochs=1, max_unreadable=0.1))
    assert state_of(steps(tmp_path / "run")[-1])["labels"][0] == -1
    assert f"left out: {bad}: the descriptor is not finite" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(
        NonFiniteError, match=r"^1 of 36 descriptors are not finite and cannot be clustered: .* --lr \(it"
    ):
        cluster(cluster_config(data, tmp_path / "strict", epochs=1))


def test_a_dtype_that_overflows_in_training_is_named_with_the_remedy(data, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_pass_vit", img_size=(64, 32))
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.weight.mul_(1e8)
    save_pretrained(model, tmp_path / "model")
    message = (
        r"the loss of step 1 is not finite: float16 overflows; compute in bfloat16 or float32 \(--dtype\); the last"
    )
    with pytest.raises(NonFiniteLossError, match=message):
        cluster(cluster_config(data, tmp_path / "run", init=str(tmp_path / "model"), dtype="float16", eval_epochs=0))


def test_an_outlier_that_replaces_an_unreadable_image_is_ignored(data, tmp_path):
    trainer = ClusterTrainer(cluster_config(data, tmp_path), 4, CPU)
    features, outputs = torch.randn(2, 4, 128)
    trainer.begin_epoch(torch.tensor([0, 0, 1, 1]), features)
    expected, _ = trainer.compute_loss(outputs[:3], torch.tensor([0, 0, 1]))
    loss, _ = trainer.compute_loss(outputs, torch.tensor([0, 0, 1, -1]))
    assert torch.equal(loss, expected)
    trainer.after_step(outputs, torch.tensor([0, 0, -1, -1]))
    assert torch.equal(trainer.memory.centroids[1], torch.nn.functional.normalize(features[2:].mean(0), dim=0))


def test_two_processes_adapt_from_a_source_without_an_evaluation_between(data, tmp_path):
    (tmp_path / "source.yaml").write_text("{epochs: 1, ids_per_batch: 2, images_per_id: 2, eval_epochs: 0}")
    config = cluster_config(
        data, tmp_path / "run", source=str(data), source_config=str(tmp_path / "source.yaml"), epochs=1
    )
    children = world(_cluster, config, folder=tmp_path / "printed")
    assert [child.wait() for child in children] == [0, 0], children[0].output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, "data: expected a dataset"),
        ({"init": ""}, "init: expected weights to begin with"),
        ({"data": "nowhere"}, "nowhere: no such file or folder"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_written(data, tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        cluster(cluster_config(options.pop("data", data), tmp_path / "run", **options))
    assert files(tmp_path) == set()


def test_the_fine_tuning_on_the_source_has_the_shared_settings(data, tmp_path):
    config = cluster_config(data, tmp_path / "run", source="market/", seed=5, fusion="mean")
    source = unsupervised._source_config(config)
    assert (source.data, source.out, source.resume) == ("market/", f"{tmp_path}/run/source", "auto")
    assert (source.seed, source.fusion, source.neck, source.size) == (5, "mean", "multi", (64, 32))
    assert source.epochs == 120
    assert unsupervised._source_config(replace(config, source_config="laptop")).epochs == 24
    assert unsupervised._source_config(replace(config, source_config="laptop")).model == config.model
    tiny = replace(config, source_config="laptop", model="", init="random")
    assert unsupervised._source_config(tiny).model == "pass_vit_tiny_patch16"
    both = unsupervised._source_config(replace(config, source_config="laptop, domain"))
    assert (both.epochs, both.jitter_prob) == (24, 0.8)
    (tmp_path / "as_config.yaml").write_text("preset: domain\nlr: 3e-2\n")  # whatever --config takes
    source = unsupervised._source_config(replace(config, source_config=str(tmp_path / "as_config.yaml")))
    assert (source.lr, source.jitter_prob) == (0.03, 0.8)
    assert finetune_config(data, tmp_path).epochs == 3


def test_settings_of_the_run_hold_for_the_source_and_a_file_that_contradicts_them_is_refused(data, tmp_path):
    file, given = tmp_path / "early.yaml", {"init": "b", "size": (128, 64), "seed": 7, "device": "cpu", "workers": 2}
    config = cluster_config(data, tmp_path / "run", source="S", source_config=str(file), fusion="mean", **given)
    early = FinetuneConfig(epochs=9, size=(128, 64), fusion="mean", log_steps=5, model="test_pass_vit")
    early.save(file)  # whole, with the defaults of all others
    source = unsupervised._source_config(replace(config, log_steps=50, model=""))
    assert {k: getattr(source, k) for k in given} == given
    assert (source.data, source.epochs, source.fusion) == ("S", 9, "mean")
    assert (source.log_steps, source.model) == (5, "test_pass_vit")  # set in the file alone
    replace(early, init="a", fusion="cat", size=(256, 128), data="x", out="y", lr=1.0).save(file)
    with pytest.raises(
        ValueError,
        match=r"source_config: both trainings share some settings, and .*early\.yaml differs: ",
    ) as e:
        unsupervised._source_config(replace(config, log_steps=50))
    assert str(e.value).endswith(": fusion: 'cat' there, 'mean' here; size: (256, 128) there, (128, 64) here")
    with pytest.raises(ValueError, match=r"pass-vit-s-384 differs: size: \(384, 128\) there, \(128, 64\) here$"):
        unsupervised._source_config(replace(config, source_config="pass-vit-s-384"))
