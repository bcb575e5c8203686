"""Exports in the libraries they are for; a test is skipped, with the reason, where its library is not installed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from passreid_models import Embedder, SyntheticPersons, export_model, save_pretrained
from passreid_models.evaluation import evaluate_model
from tests.checkpoints.test_local_dir import create

pytestmark = pytest.mark.usefixtures("no_network", "one_thread")
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
