"""Models and exports in other libraries; a test is skipped, with the reason, where its library is not installed.

The examples of docs/neighbours.md run here as they stand, each after the first one; their figures have to be ours.
"""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from passreid_models import Embedder, SyntheticPersons, evaluate, export_model, save_pretrained
from passreid_models.evaluation import evaluate_model
from tests import ROOT
from tests.checkpoints.test_local_dir import create
from tests.test_package import fences_of

pytestmark = pytest.mark.usefixtures("no_network")
HEIGHT, WIDTH = 64, 32


def tiny(**kwargs):
    """A model of random weights whose descriptors differ, with statistics that are not ImageNet's."""
    model = create("test_pass_vit", **kwargs)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.patch_embed.proj.weight, std=0.05)
    torch.nn.init.normal_(model.pos_embed)
    model.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear")
    return model


@pytest.fixture(scope="module")
def persons() -> list[Image.Image]:
    data = SyntheticPersons(3, 1, 1, seed=8, size=(HEIGHT, WIDTH))
    return [data[i][0] for i in range(len(data))]


def test_roboflow_evaluates_to_our_figures_and_embeds_to_our_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).name != "benchmarks"])  # has a reid.py
    monkeypatch.delitem(sys.modules, "reid", raising=False)
    reid = pytest.importorskip("reid", reason="Roboflow's reid is not installed: pip install reid==0.1.0rc1")
    data = SyntheticPersons(8, 4, 2, seed=3, size=(96, 40)).write_market1501(tmp_path / "data", train_ids=2)
    model = tiny()
    export_model(model, tmp_path / "model", "roboflow-reid")
    loaded = reid.ReIDModel.from_pretrained(str(tmp_path / "model"), device="cpu")
    query, gallery = reid.load_market1501(data)
    embeddings = torch.from_numpy(loaded.extract_embeddings_from_paths(query.image_paths))
    expected = Embedder(model, "cpu")(query.image_paths)
    torch.testing.assert_close(F.normalize(embeddings), expected, rtol=0, atol=1e-6)

    result = loaded.evaluate(query, gallery, verbose=False).metrics
    save_pretrained(model, tmp_path / "saved")
    metrics = evaluate_model(data, str(tmp_path / "saved"), device="cpu", cache=False).metrics
    assert 0 < result["map"] < 100
    assert result["map"] == pytest.approx(100 * metrics.mAP, abs=1e-3)
    assert result["rank1"] == pytest.approx(100 * float(metrics.cmc[0]), abs=1e-3)


def boxmot_frame(persons: list[Image.Image], step: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A frame ``[H, W, 3]`` with the persons in a row, moved by ``step`` pixels, and their boxes."""
    frame = np.full((100, 240, 3), 90, np.uint8)
    boxes = np.array([[10 + 70 * i + step, 20, 10 + 70 * i + step + WIDTH, 20 + HEIGHT] for i in range(len(persons))])
    for person, (x1, y1, x2, y2) in zip(persons, boxes, strict=True):
        frame[y1:y2, x1:x2] = np.asarray(person)
    return frame, boxes


def test_the_encoder_of_boxmot_gives_our_descriptors_and_its_tracker_keeps_the_persons_apart(
    tmp_path, monkeypatch, persons
):
    pytest.importorskip("boxmot", reason="BoxMOT is not installed: pip install boxmot")
    from boxmot.reid import create_reid_encoder
    from boxmot.reid.config import resolve_reid_spec
    from boxmot.structures import Boxes, Detections, Frame
    from boxmot.utils.checks import RequirementsChecker
    from track_boxmot import track

    # it would install the version of onnxruntime that it pins
    monkeypatch.setattr(RequirementsChecker, "check_packages", lambda *args, **options: None)

    model, file = tiny(depth=1), tmp_path / "person.onnx"
    export_model(model, file, input="imagenet")
    pixels, boxes = boxmot_frame(persons)
    frame = Frame(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), sample_id="a")
    found = Detections(Boxes(torch.from_numpy(boxes).float()), torch.ones(3), torch.zeros(3, dtype=torch.int64), "a")
    (descriptors,) = create_reid_encoder(resolve_reid_spec(file)[0]).encode([frame], [found])
    cosines = F.cosine_similarity(descriptors, Embedder(model, "cpu").crops(pixels, boxes))
    assert cosines.min() > 0.9999

    files, rows = [tmp_path / f"{i}.png" for i in range(6)], []
    for i, path in enumerate(files):
        pixels, boxes = boxmot_frame(persons, 3 * i)
        Image.fromarray(pixels).save(path)
        rows += [[i + 1, -1, x1, y1, x2 - x1, y2 - y1, 0.9] for x1, y1, x2, y2 in boxes]
    tracks = track(file, files, np.array(rows), "botsort")
    assert len(tracks) >= 3 * 5
    by_person = {number: tracks[tracks[:, 1] == number] for number in np.unique(tracks[:, 1])}
    assert len(by_person) == 3
    for track_rows in by_person.values():  # each moves by three pixels a frame, and never to another's place
        assert np.ptp(track_rows[:, 2] - 3 * track_rows[:, 0]) < 6


# ---- Examples of docs/neighbours.md

LIBRARIES = {
    "faiss": "faiss",
    "torchreid": "torchreid",
    "pytorch-metric-learning": "pytorch_metric_learning",
    "open-metric-learning": "oml.datasets",
    "lightly": "lightly",
}


def sections() -> dict[str, str]:
    """Python of each section of the page, by its heading."""
    heading, *others = re.split(r"^## ", (ROOT / "docs" / "neighbours.md").read_text(encoding="utf-8"), flags=re.M)
    texts = {"": heading, **{text.splitlines()[0]: text for text in others}}
    return {name: "\n".join(fence.code for fence in fences_of(text)) for name, text in texts.items()}


@pytest.fixture(scope="module")
def first_example() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "neighbours"}
    exec(compile(sections()[""], "docs/neighbours.md", "exec"), namespace)
    x, pids, query, ours = (namespace[key] for key in ("x", "pids", "query", "ours"))
    without_cameras = evaluate(x[query], x[~query], pids[query], pids[~query])
    assert ours.mAP < without_cameras.mAP < 1  # figures that tell one protocol from another
    assert ours.rank1 < without_cameras.rank1
    return namespace


@pytest.fixture
def example(first_example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> dict[str, Any]:
        namespace = dict(first_example)
        exec(compile(sections()[name], f"docs/neighbours.md, {name}", "exec"), namespace)
        return namespace

    return run


def require(name: str) -> None:
    pytest.importorskip(LIBRARIES[name], reason=f"{name} is not installed: see docs/neighbours.md")


def assert_trained(model: torch.nn.Module, loss: torch.Tensor, embed: Embedder) -> None:
    """Every parameter has a gradient, and weights from the first layer to the last have moved."""
    assert loss.item() > 0
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    before = timm.create_model(embed.name, pretrained=True).state_dict()
    moved = {key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}
    assert moved >= {"patch_embed.proj.weight", "reg_token", "blocks.0.attn.qkv.weight", "norm.weight"}


def test_each_example_of_the_page_has_a_test():
    assert sections().keys() - {""} == LIBRARIES.keys()


def test_faiss_finds_what_rank_finds(example):
    require("faiss")
    result = example("faiss")
    np.testing.assert_array_equal(result["indices"], result["hits"].indices)
    np.testing.assert_allclose(result["similarities"], result["hits"].similarities, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Cython evaluation")
def test_torchreid_evaluates_to_our_figures(example):
    require("torchreid")
    result = example("torchreid")
    assert result["mAP"] == pytest.approx(result["ours"].mAP, abs=1e-9)
    np.testing.assert_allclose(result["cmc"], result["ours"].cmc[:10], atol=1e-6)


def test_pytorch_metric_learning_trains_the_model_and_evaluates_to_our_figures(example):
    require("pytorch-metric-learning")
    result = example("pytorch-metric-learning")
    assert_trained(result["trunk"], result["loss"], result["embed"])
    for theirs, ours in (("accuracy", "figures"), ("accuracy_of_all", "figures_of_all")):
        accuracy, metrics = result[theirs], result[ours]
        assert 0 < metrics.mAP < 0.99
        assert accuracy["mean_average_precision"] == pytest.approx(metrics.mAP, abs=1e-6)
        assert accuracy["precision_at_1"] == pytest.approx(metrics.rank1, abs=1e-6)
    assert result["tuned"](result["persons"][:1]).shape == (1, 384)


def test_open_metric_learning_extracts_our_descriptors_and_evaluates_to_our_figures(example):
    require("open-metric-learning")
    result = example("open-metric-learning")
    torch.testing.assert_close(result["embeddings"], result["x"], rtol=0, atol=1e-5)
    figures, ours, size = result["figures"], result["ours"], len(result["val"])
    assert float(figures["map"][size]) == pytest.approx(ours.mAP, abs=1e-6)
    assert [float(figures["cmc"][k]) for k in (1, 5)] == pytest.approx([ours.rank(1), ours.rank(5)], abs=1e-6)
    assert result["PASSExtractor"](result["name"]).feat_dim == result["embeddings"].shape[1]


def test_lightly_trains_the_model_as_a_backbone(example):
    require("lightly")
    result = example("lightly")
    assert result["first_views"].shape == (8, 3, 256, 128)
    assert_trained(result["backbone"], result["loss"], result["embed"])
    x, learned = result["x"][:2], result["learned"](result["persons"][:2])
    assert not torch.equal(learned, x)
    assert F.cosine_similarity(learned, x).min() > 0.9  # a step, not another model
