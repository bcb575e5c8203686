"""Signs of collapse on constructed extremes, and the probe."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from passreid_models.data.datasets import open_dataset
from passreid_models.evaluation.evaluate import evaluate_model
from passreid_models.pretrain.loss import PASSLoss
from passreid_models.pretrain.monitor import collapse_indicators
from passreid_models.pretrain.network import Projections
from passreid_models.pretrain.run import open_probe, train
from tests.reid_data import write_msmt17, write_persons
from tests.tiny_runs import metrics, tiny, write_images

K, B, D = 8, 8, 6


def projections(logits: Tensor, parts: int) -> Projections:
    """Two global views of every kind of token, with these logits ``[B, K]`` or ``[V, B, K]``."""
    views = logits if logits.ndim == 3 else logits.expand(2, -1, -1)
    return Projections([views] * (1 + parts), [torch.eye(logits.shape[-1])] * (1 + parts))


def indicators(
    target: Tensor, z: Tensor | None = None, tokens: Tensor | None = None, parts: int = 3, temp: float = 0.05
) -> dict[str, float]:
    criterion = PASSLoss(target.shape[-1], parts)
    tokens = torch.randn(target.shape[-2], 1 + parts, D) if tokens is None else tokens
    student = projections(torch.zeros_like(target) if z is None else z, parts)
    return collapse_indicators(criterion, student, projections(target, parts), temp, tokens)


# ---- Teacher


def test_prototypes_all_alike_give_the_largest_entropies():
    values = indicators(torch.full((B, K), 0.3))
    assert values["teacher_entropy"] == pytest.approx(math.log(K), rel=1e-6)
    assert values["marginal_entropy"] == pytest.approx(math.log(K), rel=1e-6)


def test_one_prototype_for_all_images_gives_entropies_of_zero():
    values = indicators(torch.eye(K)[[2] * B])
    assert values["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert values["marginal_entropy"] == pytest.approx(0, abs=1e-6)


def test_a_prototype_for_each_image_is_sharp_alone_and_spread_together():
    values = indicators(torch.eye(K))
    assert values["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert values["marginal_entropy"] == pytest.approx(math.log(K), rel=1e-6)
    assert indicators(torch.eye(K)[[0, 0, 0, 0, 1, 1, 1, 1]])["marginal_entropy"] == pytest.approx(math.log(2))


def test_logits_far_apart_do_not_make_the_entropies_nan():
    values = indicators(torch.eye(K) * 1e4)
    assert all(map(math.isfinite, values.values()))


def test_the_centers_are_taken_off_before_the_temperature():
    criterion = PASSLoss(K, 0)
    criterion.centers[0] = torch.linspace(0, 3, K)
    target = criterion.centers.expand(B, -1).clone()
    teacher, tokens = projections(target, 0), torch.randn(B, 1, D)
    values = collapse_indicators(criterion, projections(target, 0), teacher, 0.04, tokens)
    assert values["teacher_entropy"] == pytest.approx(math.log(K), rel=1e-5)
    assert values["center_norm"] == pytest.approx(torch.linspace(0, 3, K).norm().item(), rel=1e-6)


# ---- Student against teacher


def test_kl_worked_out_by_hand():
    # teacher at temperature 1/2: logits log(3) / 2 and 0 become 3/4 and 1/4; student at 0.1: equal logits become 1/2
    # each. KL = 3/4 log(3/2) + 1/4 log(1/2); the entropy of the teacher is -3/4 log(3/4) - 1/4 log(1/4).
    values = indicators(torch.tensor([[math.log(3) / 2, 0.0]] * B), torch.zeros(B, 2), temp=0.5)
    assert values["kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    assert values["teacher_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-5)


def test_kl_compares_the_teachers_first_view_with_the_students_second():
    a, b = torch.tensor([[0.3, 0.0, 0.1]] * B), torch.tensor([[0.0, 0.2, 0.1]] * B)
    teacher = torch.stack([a, b]) * 0.05
    agreeing = torch.stack([b, a, b, b]) * 0.1  # two global views, two local views
    criterion, tokens = PASSLoss(3, 0), torch.randn(B, 1, D)
    for student, expected in ((agreeing, 0.0), (agreeing.flip(0), None)):
        values = collapse_indicators(criterion, projections(student, 0), projections(teacher, 0), 0.05, tokens)
        q, p = (F.softmax(x, dim=-1) for x in (a[0], student[1, 0] / 0.1))
        assert values["kl"] == pytest.approx((q * (q / p).log()).sum().item(), abs=1e-6)
        assert expected is None or values["kl"] == pytest.approx(expected, abs=1e-6)


# ---- Features


def test_equal_features_have_a_std_of_zero_and_opposite_ones_of_one():
    one = torch.randn(1, 4, D)
    assert indicators(torch.eye(K), tokens=one.expand(B, -1, -1))["feature_std"] == pytest.approx(0, abs=1e-6)
    both = torch.cat([one, -one]).repeat(B // 2, 1, 1)
    assert indicators(torch.eye(K), tokens=both)["feature_std"] == pytest.approx(1, rel=1e-6)
    assert indicators(torch.eye(K), tokens=both * 50)["feature_std"] == pytest.approx(1, rel=1e-6)  # of any length


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_features_spread_over_the_sphere_have_a_std_near_one_at_any_width(parts):
    generator = torch.Generator().manual_seed(0)
    for width in (4, 256):
        tokens = torch.randn(512, 1 + parts, width, generator=generator)
        values = indicators(torch.zeros(512, 2), tokens=tokens, parts=parts)
        assert values["feature_std"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_cosine_between_parts_is_one_when_equal_and_zero_when_orthogonal(parts):
    cls = torch.randn(B, 1, D)
    equal = torch.cat([cls, torch.randn(B, 1, D).expand(-1, parts, -1)], dim=1)
    scaled = equal * torch.arange(1, parts + 2)[:, None]
    orthogonal = torch.cat([cls, torch.eye(D)[:parts].expand(B, -1, -1)], dim=1)
    for tokens, cosine in ((equal, 1), (scaled, 1), (orthogonal, 0)):
        values = indicators(torch.eye(K), tokens=tokens, parts=parts)
        assert values["part_cosine"] == pytest.approx(cosine, abs=1e-6)


def test_the_cosine_is_the_mean_over_pairs_of_different_parts():
    parts = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]])
    tokens = torch.cat([torch.ones(1, D), parts]).expand(B, -1, -1)
    assert indicators(torch.eye(K), tokens=tokens)["part_cosine"] == pytest.approx(0.5**0.5 / 3, rel=1e-6)


@pytest.mark.parametrize("parts", [0, 1])
def test_without_two_parts_there_is_no_cosine_and_all_else_is_there(parts):
    values = indicators(torch.eye(K), parts=parts)
    assert set(values) == {"teacher_entropy", "marginal_entropy", "kl", "center_norm", "feature_std"}
    assert all(type(value) is float for value in values.values())


# ---- The probe


def write(root: Path, names: Iterable[str]) -> Path:
    """A picture for each name, of the colour of its identity with a little noise."""
    rng = np.random.default_rng(0)
    for name in names:
        identity = name.replace("/", "_").split("_")[0]
        seed = int.from_bytes(identity.encode(), "little") % (1 << 32)
        colour = np.random.default_rng(seed).integers(20, 235, (4, 1, 3)).repeat(16, 0)
        pixels = (colour + rng.integers(-3, 4, (64, 32, 3))).astype(np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    return root


def persons_as_csv(root: Path) -> Path:
    dataset = open_dataset(write_persons(root / "images"))
    lines = ["path,pid,camid,split"]
    for split, images in dataset.splits.items():
        for path, pid, camid in zip(images.paths, images.pids, images.camids, strict=True):
            lines.append(f"{path},{pid},{camid + 1},{split}")
    (root / "persons.csv").write_text("\n".join(lines))
    return root / "persons.csv"


def flattened(root: Path) -> Path:
    """All images of a Market-1501 folder in one."""
    root.mkdir()
    for path in sorted(write_persons(root.with_name("split")).rglob("*.jpg")):
        path.rename(root / path.name)
    return root


def by_identity(root: Path, depth: int, splits: Sequence[str] = ("",)) -> Path:
    """Persons in a folder for each identity, in those of the splits."""
    for i, path in enumerate(sorted(write_persons(root.with_name("split")).rglob("*.jpg"))):
        split = splits[i % len(splits)]
        folder = root / split / path.name[:4]
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / (path.name if depth else f"{i}.jpg"))
    return root


KINDS: dict[str, Callable[[Path], Path]] = {
    "Market-1501": write_persons,
    "a folder for each identity": lambda root: by_identity(root, 0),
    "a folder for each identity, with cameras": lambda root: by_identity(root, 1),
    "split folders": lambda root: by_identity(root, 1, ("train", "query", "gallery")),
    "flat": flattened,
    "CSV": lambda root: [root.mkdir(), persons_as_csv(root)][1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_logs_the_figures_of_eval_for_every_kind_of_folder(tmp_path, kind):
    data, run = KINDS[kind](tmp_path / "data"), tmp_path / "run"
    train(tiny(write_images(tmp_path / "images", 4), run, epochs=1, probe=str(data)))
    evaluation = evaluate_model(data, str(run), device="cpu")
    assert evaluation is not None
    expected = evaluation.to_dict()
    [row] = [row for row in metrics(run) if "probe_mAP" in row]
    assert (row["probe_mAP"], row["probe_rank1"]) == pytest.approx((expected["mAP"], expected["rank1"]), abs=1e-3)
    assert 5 < expected["mAP"] < 95
    assert f" probe: {expected['dataset']['description']}\n" in (run / "log.txt").read_text()


def test_the_generator_can_be_the_probe(tmp_path):
    probe = "synthetic:ids=4,images=4,cameras=2,size=64x32"
    train(tiny(write_images(tmp_path / "images", 4), tmp_path / "run", epochs=1, probe=probe))
    assert any("probe_mAP" in row for row in metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/0002_c1.jpg", "a/0002_c2.jpg", "b/0007_c1.jpg"], None),
        (["query/0002_c1.jpg", "bounding_box_test/0002_c1_2.jpg", "bounding_box_test/0007_c2.jpg"],
         r"no query of .* has a match in the gallery under another camera; passreid data check says more"),
        (["anna/1.png", "bob/1.png"], r"no query of .* has a match in the gallery; passreid data check says more"),
        (["0002_c1.jpg", "0002_c2.jpg"], r"the gallery of .* has one identity, which every query finds"),
        (["-1_c1.jpg", "0000_c2.jpg"], r"no query images in .* \(flat folder\); expected Market-1501 or"),
        (["1.jpg", "2.jpg"], r".* holds 0 folders and 2 files \(1.jpg, 2.jpg\), which is no known layout; expected"),
        (["a/1.jpg", "a/x/2.jpg", "b/1.jpg"], r".*/a/x/2.jpg: an image below the folder of an identity; expected"),
        (["bounding_box_train/0002_c1.jpg"], r"no query images in query/ of .* \(Market-1501\); expected"),
        (["query/0002_c1.jpg", "query/x.jpg"], r".*/query/x.jpg: the name shows no identity and camera; expected"),
        ([], r".* holds 0 folders and 0 files, which is no known layout; expected"),
        (None, r".*: no such file or folder; expected"),
    ],
)  # fmt: skip
def test_a_probe_that_cannot_be_ranked_is_refused_by_the_fields_name(tmp_path, names, message):
    root = tmp_path / "data"
    if names is not None:
        root.mkdir()
        write(root, names)
    if message is None:
        assert open_probe(str(root)).fingerprint == open_dataset(root).fingerprint
        return
    with pytest.raises(ValueError, match=f"^probe: {message}"):
        open_probe(str(root))


def test_a_probe_with_a_missing_list_is_refused_by_the_fields_name(tmp_path):
    (write_msmt17(tmp_path) / "list_val.txt").unlink()
    with pytest.raises(ValueError, match=r"^probe: .*/list_val.txt is not there; expected the lists of MSMT17 V1"):
        open_probe(str(tmp_path))


FOLDERS = ["anna/1.png", "anna/2.png", "bob/1.png", "bob/3.png", "carl/1.png"]


@pytest.mark.parametrize("broken", [FOLDERS[4:], FOLDERS])
def test_a_probe_with_unreadable_images_warns_and_never_ends_the_run(tmp_path, broken):
    labelled, run = write(tmp_path / "labelled", FOLDERS), tmp_path / "run"
    for name in broken:
        (labelled / name).write_bytes(b"no image")
    train(tiny(write_images(tmp_path / "images", 4), run, epochs=1, probe=str(labelled)))
    log = (run / "log.txt").read_text()
    assert f"{len(broken)} images cannot be read, the first: {labelled / broken[0]}: no image that Pillow can" in log
    assert ["probe_mAP" in record for record in metrics(run)] == ([False, True] if broken != FOLDERS else [False])
    assert log.count(" probe: ") == (1 if broken != FOLDERS else 2)  # what is ranked, and why there are no scores
    assert (run / "export" / "model.safetensors").is_file()
    assert log.rstrip().endswith(f"done: {run}/export")
