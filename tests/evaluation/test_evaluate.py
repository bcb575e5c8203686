"""Evaluation of a model: the metrics are those of its descriptors, by the right protocol, with and without cache."""

import json
import logging
import os
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torchvision import transforms as T

import passreid_models
from passreid_models.data.datasets import ReIDDataset, open_dataset
from passreid_models.device import process_group
from passreid_models.embed import Embedder
from passreid_models.evaluation import evaluate as evaluate_module
from passreid_models.evaluation.evaluate import Evaluation, evaluate_dataset, evaluate_model, score
from passreid_models.evaluation.feature_cache import _checksum, weights_key
from passreid_models.retrieval import evaluate, evaluate_distances, open_set, rerank, roc, unknown_identities
from tests.reid_data import jpeg, make_model, write, write_csv, write_flat, write_persons
from tests.tiny_runs import world


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> ReIDDataset:
    return open_dataset(write_persons(tmp_path_factory.mktemp("market") / "persons"))


@pytest.fixture(scope="module")
def embed() -> Embedder:
    return Embedder(make_model(), "cpu", workers=2)


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """Names of the images that go through a model."""
    names: list[str] = []
    load = Embedder._load

    def spy(self: Embedder, item: Any, bgr: bool) -> Any:
        names.append(Path(item).name)
        return load(self, item, bgr)

    monkeypatch.setattr(Embedder, "_load", spy)
    return names


def run(dataset: ReIDDataset, embed: Embedder, **options: Any) -> Evaluation:
    evaluation = evaluate_dataset(dataset, embed, **{"cache": False, **options})
    assert evaluation is not None
    return evaluation


# ------------------------------------------------------------------------------------------------------- the numbers


def test_the_scores_are_those_of_the_descriptors_in_percent(market, embed):
    query, gallery = embed(market.query.paths), embed(market.gallery.paths)
    labels = (market.query.pids, market.gallery.pids, market.query.camids, market.gallery.camids)
    expected, curve = evaluate(query, gallery, *labels), roc(query, gallery, *labels)
    scores = run(market, embed).to_dict()
    assert (scores["mAP"], scores["mINP"]) == pytest.approx((100 * expected.mAP, 100 * expected.mINP), abs=1e-4)
    ranks = [100 * expected.rank(k) for k in (1, 5, 10)]
    assert [scores[f"rank{k}"] for k in (1, 5, 10)] == pytest.approx(ranks, abs=1e-4)
    assert scores["cmc"] == pytest.approx((100 * expected.cmc).tolist())
    assert scores["eer"] == pytest.approx(100 * curve.eer)
    assert scores["eer_threshold"] == pytest.approx(curve.eer_threshold)
    assert scores["verification"] == [{"fpr": fpr, "tpr": None, "threshold": None} for fpr in (1e-3, 1e-4)]  # too few
    assert scores["metric"] == "cosine"
    assert scores["queries"] == {"total": 16, "counted": 16, "without_match": 0}
    assert 5 < scores["mAP"] < 95  # neither nothing nor everything is right


def test_a_verification_has_a_threshold_where_its_rate_can_be_measured(market, embed):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    curve = roc(x, x + 0.5 * x.flip(1), np.arange(1, 65), np.arange(1, 65))  # 4,032 pairs of two identities
    evaluation = replace(run(market, embed), roc=curve)
    frequent, rare = evaluation.to_dict()["verification"]
    assert frequent == {"fpr": 1e-3, "tpr": 100 * curve.tpr_at(1e-3), "threshold": curve.threshold(1e-3)}
    assert rare == {"fpr": 1e-4, "tpr": None, "threshold": None}
    rows = [line.split() for line in str(evaluation).splitlines() if line.startswith("FPR")]
    assert rows == [
        ["FPR", "0.001", f"{frequent['tpr']:.1f}", f"{frequent['threshold']:.4f}"],
        ["FPR", "0.0001", "-", "-"],
    ]


def test_a_model_without_a_tag_is_reported_with_that_of_the_bundled_weights(market, embed, monkeypatch):
    bundled = Embedder(embed.model, "cpu")
    bundled.model.pretrained_cfg["tag"] = "bundled"
    monkeypatch.setattr("passreid_models.evaluation.evaluate.Embedder", lambda model, device, **options: bundled)
    for name, expected in (("test_pass_vit", "test_pass_vit.bundled"), ("runs/mine", "runs/mine")):
        evaluation = evaluate_model(market.root, name, cache=False)
        assert evaluation is not None
        assert evaluation.model["name"] == expected


def test_reranking_is_that_of_the_descriptors_without_junk(tmp_path, embed):
    dataset = open_dataset(write_persons(tmp_path / "persons"))
    query, gallery = embed(dataset.query.paths), embed(dataset.gallery.paths)
    labels = (dataset.query.pids, dataset.gallery.pids, dataset.query.camids, dataset.gallery.camids)
    expected = evaluate_distances(rerank(query, gallery), *labels)
    for k in range(5):
        (dataset.root / f"bounding_box_test/-1_c1s1_{k:06}_00.jpg").write_bytes(jpeg(4, 0, k))
    with_junk = open_dataset(dataset.root)
    assert (with_junk.gallery.pids == -1).sum() == 5
    scores = run(with_junk, embed, rerank=True).to_dict()
    assert scores["reranked"]["mAP"] == pytest.approx(100 * expected.mAP, abs=1e-4)
    assert scores["reranked"]["mAP"] != pytest.approx(scores["mAP"], abs=0.01)
    assert scores["gallery"] == len(dataset.gallery)


def test_reranking_counts_an_image_that_is_query_and_gallery_once(tmp_path, embed):
    dataset = open_dataset(write_flat(tmp_path / "own", ids=6))
    x, pids, own = embed(dataset.gallery.paths), dataset.gallery.pids, np.arange(len(dataset.gallery))
    once, twice = (evaluate_distances(d, pids, pids, own=own) for d in (rerank(x, x, own=own), rerank(x, x)))
    scores = run(dataset, embed, rerank=True).to_dict()
    assert scores["reranked"]["mAP"] == pytest.approx(100 * once.mAP, abs=1e-4)
    assert scores["reranked"]["mAP"] != pytest.approx(100 * twice.mAP, abs=0.01)


def test_scores_of_a_camera_are_the_means_over_its_queries_and_average_to_the_whole(market, embed):
    assert [row["camera"] for row in run(market, embed, per_camera=True).to_dict()["cameras"]] == ["1", "2", "3", "4"]
    evaluation = run(replace(market, camera_names={i: f"door {i}" for i in range(4)}), embed, per_camera=True)
    scores = evaluation.to_dict()
    assert [row["camera"] for row in scores["cameras"]] == ["door 0", "door 1", "door 2", "door 3"]
    assert "camera door 0" in str(evaluation)
    for camid, row in enumerate(scores["cameras"]):
        mine = market.query.camids == camid
        own = evaluate(
            embed([p for p, m in zip(market.query.paths, mine, strict=True) if m]), embed(market.gallery.paths),
            market.query.pids[mine], market.gallery.pids, market.query.camids[mine], market.gallery.camids,
        )  # fmt: skip
        assert (row["mAP"], row["rank1"]) == pytest.approx((100 * own.mAP, 100 * own.rank1), abs=1e-4)
    total = sum(row["queries"] * row["mAP"] for row in scores["cameras"]) / 16
    assert total == pytest.approx(scores["mAP"], abs=1e-3)
    assert "cameras" not in run(market, embed).to_dict()


def test_without_cameras_each_image_is_a_query_against_all_others(tmp_path, embed):
    dataset = open_dataset(write_flat(tmp_path / "own"))
    x = embed(dataset.gallery.paths)
    similarities = (x @ x.T).fill_diagonal_(-2)
    pids = torch.from_numpy(dataset.gallery.pids)
    first = pids[similarities.argmax(1)] == pids
    evaluation = run(dataset, embed)
    assert evaluation.to_dict()["rank1"] == pytest.approx(100 * float(first.float().mean()), abs=1e-4)
    assert evaluation.protocol == "no cameras: the query itself and junk are left out"
    assert evaluation.retrieved.images == 12  # once each


def test_a_single_camera_is_evaluated_with_its_own_protocol(tmp_path, embed):
    files = [f"{pid}/000{pid}_c1_{k}.jpg" for pid in (1, 2) for k in range(3)]
    evaluation = run(open_dataset(write(tmp_path, files)), embed)
    assert evaluation.protocol.startswith("one camera: the query itself")
    assert evaluation.metrics.num_queries == 6


@pytest.mark.parametrize(
    ("line", "protocol"),
    [
        ("3.jpg,2,-1,gallery", "some cameras unknown: the query itself and junk are left out"),
        ("3.jpg,-1,-1,gallery", "Market-1501: matches under the query's own camera and junk are left out"),
    ],
)
def test_the_protocol_names_unknown_cameras_of_all_but_junk(tmp_path, embed, line, protocol):
    lines = ["path,pid,camid,split", "0.jpg,1,1,query", "1.jpg,1,2,gallery", "2.jpg,2,1,gallery", line]
    write(tmp_path, [f"{i}.jpg" for i in range(4)])
    assert run(open_dataset(write_csv(tmp_path / "own.csv", lines)), embed).protocol == protocol


def test_descriptors_that_are_compared_as_they_come_are_compared_by_distance(market):
    model = make_model(neck="multi")
    with torch.no_grad():  # lengths that tell
        for parameter in model.fc_norm.parameters():
            parameter.copy_(torch.rand_like(parameter) * 3)
    scores = run(market, Embedder(model, "cpu")).to_dict()
    assert scores["metric"] == "euclidean"
    x = [Embedder(model, "cpu")(split.paths) for split in (market.query, market.gallery)]
    labels = (market.query.pids, market.gallery.pids, market.query.camids, market.gallery.camids)
    assert scores["mAP"] == pytest.approx(100 * evaluate(*x, *labels, metric="euclidean").mAP, abs=1e-4)
    assert scores["model"]["neck"] == "multi"


def test_the_open_set_is_that_of_the_descriptors_without_half_of_the_persons(market, embed):
    query, gallery = embed(market.query.paths), embed(market.gallery.paths)
    removed = unknown_identities(market.query.pids)
    kept = ~np.isin(market.gallery.pids, removed)
    expected = open_set(
        query, gallery[torch.from_numpy(kept)], market.query.pids, market.gallery.pids[kept],
        market.query.camids, market.gallery.camids[kept],
    )  # fmt: skip
    evaluation = run(market, embed, open_set=True)
    scores = evaluation.to_dict()["open_set"]
    assert scores == {
        "gallery": kept.sum(), "known_queries": 8, "unknown_queries": 8, "removed_identities": 2,
        "identification": [
            {"fpir": 0.01, "dir": None, "threshold": None},  # less than one of 8
            {"fpir": 0.1, "dir": None, "threshold": None},
        ],
    }  # fmt: skip
    result = evaluation.open_set
    assert result is not None
    assert np.array_equal(result.unknown, expected.unknown)
    assert np.array_equal(result.known, expected.known)
    lines = str(evaluation).splitlines()
    assert [line.split() for line in lines[-5:-3]] == [["FPIR", "1", "%", "-", "-"], ["FPIR", "10", "%", "-", "-"]]
    assert lines[-3] == "-: 8 queries of unknown persons are too few to measure it"
    assert lines[-2].startswith("8 queries of known and 8 queries of unknown persons, ")
    assert lines[-1].startswith("the gallery holds all persons: 2 of them, by seed 0, were taken out")
    json.dumps(evaluation.to_dict(), allow_nan=False)
    assert "open_set" not in run(market, embed).to_dict()


def test_unknown_persons_of_the_dataset_are_those_of_the_open_set_and_rates_have_thresholds(tmp_path, embed):
    names = [f"query/{pid:04}_c1_{k}.jpg" for pid in range(1, 5) for k in range(5)]
    names += [f"bounding_box_test/{pid:04}_c2_{k}.jpg" for pid in (1, 2) for k in range(3)]
    evaluation = run(open_dataset(write(tmp_path, names)), embed, open_set=True)
    scores, result = evaluation.to_dict()["open_set"], evaluation.open_set
    assert result is not None
    assert (scores["gallery"], scores["known_queries"], scores["unknown_queries"]) == (6, 10, 10)
    assert scores["removed_identities"] == 0
    rare, frequent = scores["identification"]
    assert rare == {"fpir": 0.01, "dir": None, "threshold": None}
    assert frequent == {"fpir": 0.1, "dir": 100 * result.dir_at(0.1), "threshold": result.threshold(0.1)}
    row = next(line for line in str(evaluation).splitlines() if line.startswith("FPIR 10 %"))
    assert row.split()[3:] == [f"{frequent['dir']:.1f}", f"{frequent['threshold']:.4f}"]
    assert "were taken out" not in str(evaluation)


def test_the_open_set_of_images_that_are_query_and_gallery_leaves_out_the_query_itself(tmp_path, embed):
    dataset = open_dataset(write_flat(tmp_path / "own"))
    evaluation = run(dataset, embed, open_set=True)
    x, removed = embed(dataset.gallery.paths), evaluation.retrieved.removed
    similarities = (x @ x.T).fill_diagonal_(-2)
    similarities[:, torch.from_numpy(np.isin(dataset.gallery.pids, removed))] = -2
    best = similarities.amax(1)[torch.from_numpy(np.isin(dataset.query.pids, removed))]
    assert evaluation.open_set is not None
    assert evaluation.open_set.unknown == pytest.approx(best.sort().values.numpy(), abs=1e-6)
    assert (len(evaluation.open_set.known), evaluation.open_set.num_gallery) == (6, 6)


# -------------------------------------------------------------------------------------------------------- the report
@pytest.mark.parametrize("where", ["gallery", "query"])
def test_images_that_cannot_be_read_make_nobody_unknown_and_change_no_drawn_person(tmp_path, embed, where):
    dataset = open_dataset(write_persons(tmp_path / "persons"))
    removed = unknown_identities(dataset.query.pids)
    lost = np.setdiff1d(dataset.query.pids, removed)[0]
    for path in np.array(dataset.gallery.paths if where == "gallery" else dataset.query.paths)[
        (dataset.gallery if where == "gallery" else dataset.query).pids == lost
    ]:
        path.write_bytes(b"no image")
    evaluation = run(dataset, embed, open_set=True)
    scores = evaluation.to_dict()["open_set"]
    assert np.array_equal(evaluation.retrieved.removed, removed)
    assert (scores["known_queries"], scores["unknown_queries"], scores["removed_identities"]) == (4, 8, 2)


# -------------------------------------------------------------------------------------------------------- the report


def test_json_holds_the_settings_and_no_number_that_json_lacks(market, embed):
    record = json.loads(json.dumps(run(market, embed, name="a name", per_camera=True).to_dict(), allow_nan=False))
    assert record["dataset"]["fingerprint"] == market.fingerprint
    assert record["model"].pop("weights_sha256") == embed.fingerprint["weights"]
    assert record["model"] == {
        "name": "a name", "size": "64x32", "fusion": "cat", "neck": "", "flip": False, "dtype": "float32", "width": 128,
    }  # fmt: skip
    assert str(market.root.parent) not in json.dumps(record)


def test_the_table_shows_what_the_json_holds(market, embed):
    evaluation = run(market, embed, per_camera=True)
    scores, lines = evaluation.to_dict(), str(evaluation).splitlines()
    assert lines[0] == market.description
    ranked = next(line.split() for line in lines if line.startswith("as ranked"))
    expected = [scores[key] for key in ("mAP", "mINP", "rank1", "rank5", "rank10")]
    assert ranked[2:] == ["16", *(f"{value:.1f}" for value in expected)]
    cameras = [line.split() for line in lines if line.startswith("camera ")]
    assert [row[2:] for row in cameras] == [["4", f"{c['mAP']:.1f}", f"{c['rank1']:.1f}"] for c in scores["cameras"]]
    assert f"EER {scores['eer']:.2f} %" in str(evaluation)
    assert "pairs of two identities are too few" in lines[-1]


def test_unreadable_images_are_named_left_out_and_counted(tmp_path, embed):
    dataset = open_dataset(write_persons(tmp_path / "persons"))
    bad = [dataset.query.paths[3], dataset.gallery.paths[5], dataset.gallery.paths[0]]
    bad[0].write_bytes(b"no image")
    bad[1].unlink()
    bad[2].write_bytes(b"")
    evaluation = run(dataset, embed)
    assert sorted(line.split(": ")[0] for line in evaluation.unreadable) == sorted(map(str, bad))
    assert (len(evaluation.retrieved.query), len(evaluation.retrieved.gallery)) == (15, len(dataset.gallery) - 2)
    assert bool(torch.isfinite(evaluation.retrieved.gallery_features).all())
    q, g = ([i for i, path in enumerate(s.paths) if path not in bad] for s in (dataset.query, dataset.gallery))
    expected = evaluate(
        embed([dataset.query.paths[i] for i in q]), embed([dataset.gallery.paths[i] for i in g]),
        dataset.query.pids[q], dataset.gallery.pids[g], dataset.query.camids[q], dataset.gallery.camids[g],
    )  # fmt: skip
    assert evaluation.metrics.mAP == pytest.approx(expected.mAP)
    assert "3 images cannot be read" in str(evaluation)


@pytest.fixture
def overflow(monkeypatch) -> list[Path]:
    """Images whose pixels are not finite."""
    paths: list[Path] = []
    load = Embedder._load
    monkeypatch.setattr(
        Embedder, "_load", lambda self, item, bgr: load(self, item, bgr) * (torch.nan if item in paths else 1)
    )
    return paths


def test_descriptors_that_are_not_finite_are_named_left_out_and_counted(market, embed, overflow):
    overflow += [market.query.paths[3], market.gallery.paths[5]]
    evaluation = run(market, embed)
    scores = evaluation.to_dict()
    assert scores["unreadable"] == []
    assert [line.split(": ")[:2] for line in scores["not_finite"]] == [
        [str(path), "the descriptor is not finite"] for path in overflow
    ]
    assert f"2 of {evaluation.retrieved.images} descriptors are not finite: float32 overflows" in str(evaluation)
    q, g = ([i for i, path in enumerate(s.paths) if path not in overflow] for s in (market.query, market.gallery))
    expected = evaluate(
        embed([market.query.paths[i] for i in q]), embed([market.gallery.paths[i] for i in g]),
        market.query.pids[q], market.gallery.pids[g], market.query.camids[q], market.gallery.camids[g],
    )  # fmt: skip
    assert evaluation.metrics.mAP == pytest.approx(expected.mAP)
    assert evaluation.metrics.num_not_finite == 0


def test_a_dtype_that_overflows_is_refused_with_the_advice_and_caches_nothing(market, cache_folder):
    model = make_model()
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.weight.mul_(1e8)
    total = len(market.query) + len(market.gallery)
    sentence = f"{total} of {total} descriptors are not finite: compute in float32 or bfloat16"
    with pytest.raises(ValueError, match=f"no query image can be ranked: {sentence}"):
        run(market, Embedder(model, "cpu", torch.float16), cache=True)
    assert not list(cache_folder.rglob("*.safetensors"))
    assert run(market, Embedder(model, "cpu"), cache=True).not_finite == []


def test_score_names_what_is_not_finite_and_goes_on(market, overflow, caplog):
    overflow.append(market.gallery.paths[5])
    with caplog.at_level(logging.WARNING):
        scores = score(make_model(), market, "cpu")
    total = len(market.query) + len(market.gallery)
    assert f"1 of {total} descriptors are not finite: " in caplog.text
    assert f"the first: {overflow[0]}" in caplog.text
    assert scores["mAP"] == pytest.approx(run(market, Embedder(make_model(), "cpu")).to_dict()["mAP"])


def test_remarks_on_the_labels_are_in_the_report_and_in_json(tmp_path, embed):
    lines = ["path,pid,camid,split", "0.jpg,Anna,1,query", "0.jpg,Anna,1,gallery", "1.jpg,Anna,2,gallery",
             "2.jpg,anna,2,gallery"]  # fmt: skip
    write(tmp_path, ["0.jpg", "1.jpg", "2.jpg"])
    evaluation = run(open_dataset(write_csv(tmp_path / "own.csv", lines)), embed)
    values = evaluation.to_dict()
    assert values["remarks"] == [
        "two identities each, though their names are nearly equal: Anna = anna",
        "1 query is in the gallery too; each is left out of its own ranking",
    ]
    assert [f"remark: {remark}" for remark in values["remarks"]] == str(evaluation).splitlines()[3:5]
    assert evaluation.metrics.num_queries == 1


def test_own_images_stay_found_when_images_before_them_cannot_be_read(tmp_path, embed):
    dataset = open_dataset(write_flat(tmp_path / "own"))
    dataset.gallery.paths[0].write_bytes(b"")
    retrieved = run(dataset, embed).retrieved
    assert retrieved.own.tolist() == list(range(11))
    assert [retrieved.gallery.paths[row] for row in retrieved.own] == retrieved.query.paths


def test_two_lists_in_one_folder_keep_their_descriptors_beside_one_another(tmp_path, embed, cache_folder):
    for name, pids in (("a", (1, 2)), ("b", (3, 4))):
        write(tmp_path, [f"{name}/{pid}_{k}.jpg" for pid in pids for k in (0, 1)], first=10 * pids[0])
        rows = [f"{name}/{pid}_{k}.jpg,{pid},{split}" for pid in pids for k, split in enumerate(("query", "gallery"))]
        (tmp_path / f"{name}.csv").write_text("\n".join(["path,pid,split", *rows]))
    for name in ("a", "b"):
        assert run(open_dataset(tmp_path / f"{name}.csv"), embed, cache=True).retrieved.cached == 0
    for name in ("a", "b"):
        assert run(open_dataset(tmp_path / f"{name}.csv"), embed, cache=True).retrieved.cached == 4


def test_datasets_that_cannot_be_evaluated_are_refused(tmp_path, embed, monkeypatch):
    with pytest.raises(ValueError, match="no query images in query/ of"):
        run(open_dataset(write(tmp_path / "a", ["bounding_box_train/0001_c1.jpg"])), embed)
    files = ["query/0001_c1.jpg", "bounding_box_test/0001_c1.jpg", "bounding_box_test/0002_c2.jpg"]
    with monkeypatch.context() as m:  # before the work, which may take hours
        m.setattr(evaluate_module, "extract", None)
        with pytest.raises(ValueError, match="no query has a match in the gallery under another camera"):
            run(open_dataset(write(tmp_path / "b", files)), embed)
        one = write(tmp_path / "one", ["query/0001_c1.jpg", "bounding_box_test/0001_c2.jpg"])
        with pytest.raises(ValueError, match="open_set: expected queries of two persons or more"):
            run(open_dataset(one), embed, open_set=True)
    dataset = open_dataset(write_flat(tmp_path / "c"))
    for path in dataset.gallery.paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no query image can be ranked: .* the first: .*/0\.jpg: the file is empty"):
        run(dataset, embed)


# --------------------------------------------------------------------------------------------------------- the cache


def test_a_second_evaluation_computes_nothing_and_gives_the_same(market, embed, seen):
    first = run(market, embed, cache=True)
    assert len(seen) == first.retrieved.images == len(market.query) + len(market.gallery)
    seen.clear()
    second = run(market, embed, cache=True)
    assert seen == []
    assert second.retrieved.cached == second.retrieved.images
    assert torch.equal(first.retrieved.gallery_features, second.retrieved.gallery_features)
    assert torch.equal(first.retrieved.query_features, second.retrieved.query_features)
    assert f"0 of {first.retrieved.images} descriptors came from the cache" in str(first)
    assert f"{second.retrieved.images} of {second.retrieved.images} descriptors came from the cache" in str(second)


def test_only_a_changed_or_a_new_image_is_computed_again(tmp_path, embed, seen):
    dataset = open_dataset(write_persons(tmp_path / "persons"))
    run(dataset, embed, cache=True)
    changed, renamed = dataset.gallery.paths[4], dataset.gallery.paths[6]
    times = changed.stat()
    content = bytearray(changed.read_bytes())
    content[-20] ^= 1  # size and time stay
    changed.write_bytes(content)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    renamed.rename(renamed.with_name(f"{renamed.stem}_again.jpg"))
    new = dataset.root / "bounding_box_test/0000_c1s1_999999_01.jpg"
    new.write_bytes(jpeg(77))
    seen.clear()
    again = run(open_dataset(dataset.root), embed, cache=True)
    assert sorted(seen) == sorted([changed.name, new.name])
    assert again.retrieved.cached == again.retrieved.images - 2
    expected = embed([*again.retrieved.gallery.paths])
    assert torch.allclose(again.retrieved.gallery_features, expected, atol=1e-6)
    seen.clear()
    run(open_dataset(dataset.root), embed, cache=True)
    assert seen == []


def _another_bias(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.norm.bias[3] += 1e-6
    return model


def test_everything_that_changes_a_descriptor_changes_the_key_of_the_cache(embed):
    statistics = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    variants = [
        Embedder(_another_bias(make_model()), "cpu"),
        Embedder(make_model(neck="multi"), "cpu"),
        Embedder(make_model(img_size=(96, 32)), "cpu"),
        Embedder(make_model(pretrained_cfg_overlay=statistics), "cpu"),
        Embedder(make_model(pretrained_cfg_overlay={"interpolation": "bilinear"}), "cpu"),
        Embedder(make_model(num_heads=1), "cpu"),
        Embedder(make_model(pretrained_cfg_overlay={"mean": (0.48500001,) * 3}), "cpu"),
        Embedder(make_model(pretrained_cfg_overlay={"mean": (0.48500002,) * 3}), "cpu"),
        Embedder(make_model(), "cpu", dtype=torch.bfloat16),
        Embedder(make_model(), "cpu", fusion="mean"),
        Embedder(make_model(), "cpu", flip=True),
    ]
    assert len({weights_key(other) for other in [embed, *variants]}) == 1 + len(variants)
    assert weights_key(Embedder(make_model(), "cpu", batch_size=3, workers=1)) == weights_key(embed)


class Halved(nn.Identity):
    def forward(self, x):
        return x / 2


class OwnEmbedder(Embedder):
    pass


@pytest.mark.parametrize("own", ["nothing", "module", "method", "hook", "embedder", "transform", "torch"])
def test_a_model_with_code_of_its_own_is_not_cached(market, cache_folder, own):
    model: Any = make_model()
    if own == "module":
        model.fc_norm = Halved()
    if own == "method":
        model.pool = lambda x, pool_type=None: x[:, 0].repeat(1, 2)
    if own == "hook":
        model.norm.register_forward_hook(lambda module, inputs, output: output * 2)
    if own == "torch":
        model.fc_norm = nn.LayerNorm(model.head_hidden_size)
    embed = (OwnEmbedder if own == "embedder" else Embedder)(model, "cpu")
    if own == "transform":
        embed.transform.transforms.append(T.Lambda(lambda x: x / 2))
    for _ in range(2):
        evaluation = run(market, embed, cache=True)
    is_cached = own in ("nothing", "torch")
    assert evaluation.retrieved.cached == is_cached * evaluation.retrieved.images
    assert (cache_folder / "features").exists() == is_cached


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "other"])
def test_a_damaged_cache_is_computed_again_with_a_warning(market, embed, seen, cache_folder, caplog, damage):
    expected = run(market, embed, cache=True)
    [file] = (cache_folder / "features").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-300] ^= 4
    if damage == "other":  # of other weights, under this name
        run(market, Embedder(make_model(1), "cpu"), cache=cache_folder / "others")
        [other] = (cache_folder / "others").glob("*.safetensors")
        content = bytearray(other.read_bytes())
    file.write_bytes({"cut": content[:-100], "text": b"x"}.get(damage, content))
    seen.clear()
    with caplog.at_level(logging.WARNING):
        evaluation = run(market, embed, cache=True)
    assert len(seen) == evaluation.retrieved.images
    assert f"{file} is damaged" in caplog.text
    assert torch.equal(evaluation.retrieved.gallery_features, expected.retrieved.gallery_features)
    caplog.clear()
    assert run(market, embed, cache=True).retrieved.cached == evaluation.retrieved.images
    assert not caplog.text


def test_unreadable_images_are_not_cached_and_are_read_again(tmp_path, embed, seen):
    dataset = open_dataset(write_persons(tmp_path / "persons"))
    good = dataset.query.paths[0].read_bytes()
    dataset.query.paths[0].write_bytes(b"no image")
    assert len(run(dataset, embed, cache=True).unreadable) == 1
    seen.clear()
    assert len(run(dataset, embed, cache=True).unreadable) == 1
    dataset.query.paths[0].write_bytes(good)
    assert run(dataset, embed, cache=True).unreadable == []
    assert seen == [dataset.query.paths[0].name] * 2


def test_descriptors_that_are_not_finite_are_not_cached_and_unknown_where_an_older_version_cached_them(
    market, embed, seen, cache_folder
):
    expected = run(market, embed, cache=True)
    [file] = (cache_folder / "features").glob("*.safetensors")
    with safe_open(file, "numpy") as tensors:
        hashes, descriptors = tensors.get_tensor("hashes"), tensors.get_tensor("descriptors")
        metadata = tensors.metadata()
    descriptors = descriptors.copy()
    descriptors[2], descriptors[4, 7] = np.nan, np.inf
    metadata["checksum"] = _checksum(hashes, descriptors)
    save_file({"hashes": hashes, "descriptors": descriptors}, file, metadata)
    seen.clear()
    again = run(market, embed, cache=True)
    assert len(seen) == 2
    assert torch.equal(again.retrieved.gallery_features, expected.retrieved.gallery_features)
    assert run(market, embed, cache=True).retrieved.cached == again.retrieved.images


def test_some_descriptors_that_are_not_finite_are_computed_again_and_never_cached(
    market, embed, overflow, cache_folder
):
    overflow += [market.query.paths[3], market.gallery.paths[5]]
    first = run(market, embed, cache=True)
    [file] = (cache_folder / "features").glob("*.safetensors")
    with safe_open(file, "numpy") as tensors:
        descriptors = tensors.get_tensor("descriptors")
    assert np.isfinite(descriptors).all()
    assert len(descriptors) == first.retrieved.images - 2
    again = run(market, embed, cache=True)
    assert (again.retrieved.cached, again.not_finite) == (len(descriptors), first.not_finite)
    assert again.metrics.mAP == first.metrics.mAP
    overflow.clear()
    assert run(market, embed, cache=True).not_finite == []


def test_the_cache_keeps_the_images_of_a_dataset_once_and_no_others(tmp_path, embed, cache_folder):
    files = ["query/0001_c1.jpg", "query/0002_c1.jpg", "bounding_box_test/0001_c2.jpg", "bounding_box_test/0002_c2.jpg"]
    dataset = open_dataset(write(tmp_path / "data", files))
    run(dataset, embed, cache=True)
    for name in files[1::2]:
        (dataset.root / name).unlink()
    (dataset.root / "bounding_box_test/0003_c1.jpg").write_bytes((dataset.root / files[0]).read_bytes())
    (dataset.root / "bounding_box_test/0004_c1.jpg").write_bytes(jpeg(9))
    run(open_dataset(dataset.root), embed, cache=True)
    [file] = (cache_folder / "features").glob("*.safetensors")
    with safe_open(file, "numpy") as tensors:
        assert tensors.get_tensor("hashes").shape == (3, 32)


def test_a_cache_that_cannot_be_written_is_a_warning_and_loses_no_evaluation(market, embed, tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        evaluation = run(market, embed, cache=tmp_path / "file")
    assert "cannot be written" in caplog.text
    assert evaluation.metrics.mAP == run(market, embed).metrics.mAP


def test_without_a_cache_nothing_is_written(market, embed, cache_folder):
    run(market, embed, cache=False)
    score(make_model(), market, "cpu")
    assert not cache_folder.exists()


# ---------------------------------------------------------------------------------------------------------- training


def test_score_is_the_evaluation_and_leaves_the_model_in_training_as_it_is(market, embed):
    model = make_model(drop_path_rate=0.5).train()
    model.reset_classifier(7)
    before, rng = deepcopy(model.state_dict()), torch.get_rng_state()
    scores = score(model, market, "cpu")
    expected = run(market, embed).to_dict()
    assert scores == pytest.approx({"mAP": expected["mAP"], "rank1": expected["rank1"]}, abs=1e-4)
    assert model.training
    assert model.num_classes == 7
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_score_looks_into_wrappers_of_torch(market):
    assert score(torch.optim.swa_utils.AveragedModel(make_model()), market, "cpu") == score(make_model(), market, "cpu")


# ------------------------------------------------------------------------------------------------------------ models


@pytest.fixture
def saved(tmp_path) -> Path:
    passreid_models.save_pretrained(make_model(), tmp_path / "run" / "export")
    return tmp_path / "run"


def test_a_model_is_found_by_the_name_of_its_folder_or_of_its_run(market, embed, saved):
    expected = embed(market.query.paths)
    for name in (str(saved), str(saved / "export"), f"local-dir:{saved / 'export'}"):
        assert torch.equal(Embedder(name, device="cpu")(market.query.paths), expected)


def test_another_size_resizes_the_positions_as_a_model_of_that_size_does(market, saved):
    resized = Embedder(str(saved), size=(96, 32), fusion="mean", flip=True, batch_size=3, device="cpu")
    assert (resized.input_size, resized.batch_size, resized.flip) == ((3, 96, 32), 3, True)
    state = make_model().state_dict()
    positions = resample_abs_pos_embed(state["pos_embed"], [6, 2], [4, 2], num_prefix_tokens=0)
    by_hand = make_model(img_size=(96, 32))
    by_hand.load_state_dict(state | {"pos_embed": positions})
    expected = Embedder(by_hand, "cpu", fusion="mean", flip=True)(market.query.paths)
    assert torch.allclose(resized(market.query.paths), expected, atol=1e-5)


def test_384x128_resizes_the_positions_as_the_published_fine_tuning_does():
    embed = Embedder("pass_vit_tiny_patch16", size=(384, 128), device="cpu")
    assert passreid_models.load_report(embed.model).resized == {"pos_embed": "16x8 -> 24x8, bilinear"}


def test_evaluate_model_takes_names_and_writes_json_and_pictures(market, saved, tmp_path, monkeypatch):
    folders: list[Path] = []
    monkeypatch.setattr(
        "passreid_models.evaluation.evaluate.draw_evaluation", lambda evaluation, folder: folders.append(folder)
    )
    options: dict[str, Any] = {"fusion": "mean", "size": (96, 32), "batch_size": 5, "dtype": torch.float64}
    where = {"json_file": tmp_path / "new" / "eval.json", "pictures": tmp_path / "pictures"}
    evaluation = evaluate_model(market.root, str(saved), device="cpu", **where, **options)
    assert evaluation is not None
    assert json.loads(where["json_file"].read_text()) == json.loads(json.dumps(evaluation.to_dict()))
    assert evaluation.model | {"weights_sha256": ""} == {
        "name": str(saved), "size": "96x32", "fusion": "mean", "neck": "", "flip": False, "dtype": "float64",
        "width": 64, "weights_sha256": "",
    }  # fmt: skip
    assert folders == [tmp_path / "pictures"]


def test_pictures_without_matplotlib_are_refused_before_the_work(market, saved, tmp_path, monkeypatch, seen):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pictures: pip install "\.\[viz\]"'):
        evaluate_model(market.root, str(saved), pictures=tmp_path / "pictures")
    assert seen == []


def test_what_cannot_be_written_or_computed_is_refused_before_the_work(market, saved, tmp_path, monkeypatch, seen):
    (tmp_path / "file").write_text("")
    for where, message in (
        ({"json_file": tmp_path}, "is a folder: name a file"),
        ({"pictures": tmp_path / "file"}, "is no folder"),
    ):
        with pytest.raises(OSError, match=message):
            evaluate_model(market.root, str(saved), **where)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ValueError, match=r're-ranking and clustering need scipy: pip install "\.\[reid\]"'):
        evaluate_model(market.root, str(saved), rerank=True)
    assert seen == []


def test_a_folder_in_a_list_of_images_is_left_out(tmp_path, embed):
    write(tmp_path, ["query.jpg", "same.jpg", "other.jpg", "tracklet/a.jpg", "tracklet/b.jpg"])
    long = f"{'x' * 300}.jpg"  # a name that the system does not take
    lines = ["query.jpg,1,1,query", "same.jpg,1,2,gallery", "other.jpg,2,2,gallery", "tracklet,2,2,gallery"]
    lines.append(f"{long},2,2,gallery")
    dataset = open_dataset(write_csv(tmp_path / "own.csv", ["path,pid,camid,split", *lines]))
    for cache in (False, True):
        evaluation = run(dataset, embed, cache=cache)
        folder, name = evaluation.unreadable
        assert folder == f"{tmp_path / 'tracklet'}: a folder, no image"
        assert name.startswith(f"{tmp_path / long}: ")
        assert len(evaluation.retrieved.gallery) == 2


def test_a_name_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'resnet50'; known: .*pass_vit_small_patch16"):
        Embedder("resnet50")
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no model: expected a folder with config.json"):
        Embedder(str(tmp_path))


# --------------------------------------------------------------------------------------------------------- processes


def evaluate_to_json(root: Path, model: Path, out: Path, cache: str) -> int:
    rank, os.environ["PASSREID_CACHE"] = os.environ["RANK"], cache  # the server that forks may have another
    with process_group("cpu"):
        evaluation = evaluate_model(root, str(model), device="cpu", per_camera=True, json_file=out / "eval.json")
        record: dict[str, Any] = {
            "result": evaluation is not None,
            "score": score(make_model(), open_dataset(root), "cpu"),
        }
        try:
            score(make_model(), open_dataset(out / "no match"), "cpu")
        except ValueError as e:
            record["error"] = str(e)
    (out / f"{rank}.json").write_text(json.dumps(record))
    return 1 if evaluation and evaluation.unreadable else 0


def test_two_processes_share_the_images_and_find_the_numbers_of_one(tmp_path, saved):
    root = write_persons(tmp_path / "persons")
    open_dataset(root).gallery.paths[5].write_bytes(b"")
    write(
        tmp_path / "no match", ["query/0001_c1.jpg", "bounding_box_test/0001_c1.jpg", "bounding_box_test/0002_c2.jpg"]
    )
    children = world(evaluate_to_json, root, saved, tmp_path, os.environ["PASSREID_CACHE"], folder=tmp_path / "printed")
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            child.__exit__()
    assert codes == [1, 0], [child.output for child in children]
    alone = evaluate_model(
        root, str(saved), device="cpu", per_camera=True, cache=False, json_file=tmp_path / "one.json"
    )
    assert alone is not None
    shared, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("eval", "one"))
    assert _rounded(shared) == _rounded(expected)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("result"), second.pop("result")) == (True, False)
    assert first == second
    assert first["score"]["mAP"] == pytest.approx(expected["mAP"], abs=1e-3)
    assert "no query has a match" in first["error"]
    again = evaluate_model(root, str(saved), device="cpu")
    assert again is not None
    assert again.retrieved.cached == again.retrieved.images - 1  # the two have filled the cache


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, 3) if isinstance(value, float) else value
