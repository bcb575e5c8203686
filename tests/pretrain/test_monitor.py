"""Signs of collapse on constructed extremes, the labelled folder of the probe, and the probe."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from passreid_models.evaluation.probe import probe, read_labelled
from passreid_models.pretrain.loss import PASSLoss
from passreid_models.pretrain.monitor import collapse_indicators
from passreid_models.pretrain.network import Projections
from passreid_models.pretrain.run import train
from tests.tiny_runs import metrics, tiny, write_images

K, B, D = 8, 8, 6

pytestmark = pytest.mark.usefixtures("one_thread")


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
    found = indicators(torch.full((B, K), 0.3))
    assert found["teacher_entropy"] == pytest.approx(math.log(K), rel=1e-6)
    assert found["marginal_entropy"] == pytest.approx(math.log(K), rel=1e-6)


def test_one_prototype_for_all_images_gives_entropies_of_zero():
    found = indicators(torch.eye(K)[[2] * B])
    assert found["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert found["marginal_entropy"] == pytest.approx(0, abs=1e-6)


def test_a_prototype_for_each_image_is_sharp_alone_and_spread_together():
    found = indicators(torch.eye(K))
    assert found["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert found["marginal_entropy"] == pytest.approx(math.log(K), rel=1e-6)
    assert indicators(torch.eye(K)[[0, 0, 0, 0, 1, 1, 1, 1]])["marginal_entropy"] == pytest.approx(math.log(2))


def test_logits_far_apart_do_not_make_the_entropies_nan():
    found = indicators(torch.eye(K) * 1e4)
    assert all(map(math.isfinite, found.values()))


def test_the_centers_are_taken_off_before_the_temperature():
    criterion = PASSLoss(K, 0)
    criterion.centers[0] = torch.linspace(0, 3, K)
    target = criterion.centers.expand(B, -1).clone()
    teacher, tokens = projections(target, 0), torch.randn(B, 1, D)
    found = collapse_indicators(criterion, projections(target, 0), teacher, 0.04, tokens)
    assert found["teacher_entropy"] == pytest.approx(math.log(K), rel=1e-5)
    assert found["center_norm"] == pytest.approx(torch.linspace(0, 3, K).norm().item(), rel=1e-6)


# ---- Student against teacher


def test_kl_worked_out_by_hand():
    # teacher at temperature 1/2: logits log(3) / 2 and 0 become 3/4 and 1/4; student at 0.1: equal logits become 1/2
    # each. KL = 3/4 log(3/2) + 1/4 log(1/2); the entropy of the teacher is -3/4 log(3/4) - 1/4 log(1/4).
    found = indicators(torch.tensor([[math.log(3) / 2, 0.0]] * B), torch.zeros(B, 2), temp=0.5)
    assert found["kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    assert found["teacher_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-5)


def test_kl_compares_the_teachers_first_view_with_the_students_second():
    a, b = torch.tensor([[0.3, 0.0, 0.1]] * B), torch.tensor([[0.0, 0.2, 0.1]] * B)
    teacher = torch.stack([a, b]) * 0.05
    agreeing = torch.stack([b, a, b, b]) * 0.1  # two global views, two local views
    criterion, tokens = PASSLoss(3, 0), torch.randn(B, 1, D)
    for student, expected in ((agreeing, 0.0), (agreeing.flip(0), None)):
        found = collapse_indicators(criterion, projections(student, 0), projections(teacher, 0), 0.05, tokens)
        q, p = (F.softmax(x, dim=-1) for x in (a[0], student[1, 0] / 0.1))
        assert found["kl"] == pytest.approx((q * (q / p).log()).sum().item(), abs=1e-6)
        assert expected is None or found["kl"] == pytest.approx(expected, abs=1e-6)


# ---- Features


def test_equal_features_have_no_spread_and_opposite_ones_all_of_it():
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
        found = indicators(torch.zeros(512, 2), tokens=tokens, parts=parts)
        assert found["feature_std"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_cosine_between_parts_is_one_when_equal_and_zero_when_orthogonal(parts):
    cls = torch.randn(B, 1, D)
    equal = torch.cat([cls, torch.randn(B, 1, D).expand(-1, parts, -1)], dim=1)
    scaled = equal * torch.arange(1, parts + 2)[:, None]
    orthogonal = torch.cat([cls, torch.eye(D)[:parts].expand(B, -1, -1)], dim=1)
    for tokens, cosine in ((equal, 1), (scaled, 1), (orthogonal, 0)):
        found = indicators(torch.eye(K), tokens=tokens, parts=parts)
        assert found["part_cosine"] == pytest.approx(cosine, abs=1e-6)


def test_the_cosine_is_the_mean_over_pairs_of_different_parts():
    parts = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]])
    tokens = torch.cat([torch.ones(1, D), parts]).expand(B, -1, -1)
    assert indicators(torch.eye(K), tokens=tokens)["part_cosine"] == pytest.approx(0.5**0.5 / 3, rel=1e-6)


@pytest.mark.parametrize("parts", [0, 1])
def test_without_two_parts_there_is_no_cosine_and_all_else_is_there(parts):
    found = indicators(torch.eye(K), parts=parts)
    assert set(found) == {"teacher_entropy", "marginal_entropy", "kl", "center_norm", "feature_std"}
    assert all(type(value) is float for value in found.values())


# ---- The labelled folder


def write(root: Path, names: list[str]) -> Path:
    """A picture for each name, of the colour of its identity with a little noise."""
    rng = np.random.default_rng(0)
    for name in names:
        identity = name.replace("/", "_").split("_")[0]
        colour = np.random.default_rng(abs(hash_of(identity))).integers(20, 235, (4, 1, 3)).repeat(16, 0)
        pixels = (colour + rng.integers(-3, 4, (64, 32, 3))).astype(np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    return root


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "little") % (1 << 32)


MARKET = ["0002_c1s1_000451_03.jpg", "0002_c2s1_000451_03.jpg", "0007_c3s3_077419_03.jpg", "0007_c6s1_000001_01.jpg"]
FOLDERS = ["anna/1.png", "anna/2.png", "bob/1.png", "bob/x/3.png", "carl/1.png"]


def test_identities_and_cameras_come_from_market_1501_names(tmp_path):
    paths, pids, camids = read_labelled(write(tmp_path, MARKET))
    assert [p.name for p in paths] == MARKET
    assert (pids.tolist(), camids.tolist()) == ([2, 2, 7, 7], [1, 2, 3, 6])


def test_junk_and_distractors_are_left_out_and_subfolders_are_looked_into(tmp_path):
    others = ["-1_c1s1_000001_00.jpg", "0000_c2s1_000001_00.jpg", "0002_c1s1_000452_00.jpg"]
    paths, pids, camids = read_labelled(write(tmp_path, [f"query/{n}" for n in MARKET[:1]] + MARKET[1:] + others))
    assert [p.name for p in paths] == [others[2], *MARKET[1:], MARKET[0]]
    assert (pids.tolist(), camids.tolist()) == ([2, 2, 7, 7, 2], [1, 2, 3, 6, 1])


def test_without_such_names_a_folder_is_an_identity_and_each_image_a_camera(tmp_path):
    paths, pids, camids = read_labelled(write(tmp_path, FOLDERS))
    of = {p.relative_to(tmp_path).as_posix(): pid for p, pid in zip(paths, pids.tolist(), strict=True)}
    assert of["anna/1.png"] == of["anna/2.png"] != of["bob/1.png"]
    assert len(set(of.values())) == 4  # bob/x is a folder of its own
    assert len(set(camids.tolist())) == len(paths) == 5


@pytest.mark.parametrize(
    "names",
    [
        ["0002_c1s1_000451_03.jpg", "0002_c1s1_000452_03.jpg", "0007_c1s1_000453_03.jpg"],  # a single camera
        ["0002_c1s1_000451_03.jpg", "0002_c2s1_000452_03.jpg"],  # a single identity
        ["-1_c1s1_000451_03.jpg", "0000_c2s1_000452_03.jpg"],  # junk and distractors only
        ["1.jpg", "2.jpg", "3.jpg"],  # neither names nor folders
        ["anna/1.png", "bob/1.png"],  # no second image
    ],
)
def test_a_folder_that_cannot_be_ranked_is_refused_by_the_fields_name(tmp_path, names):
    with pytest.raises(ValueError, match=r"^probe: .* has no two identities with images under two cameras: expected"):
        read_labelled(write(tmp_path, names))


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_folder_without_images_is_refused_by_the_fields_name(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"^probe: no images"):
        read_labelled(tmp_path / name)


# ---- The probe


@pytest.mark.parametrize("names", [MARKET, [*FOLDERS[:3], "bob/2.png"]], ids=["names", "folders"])
def test_persons_told_apart_by_their_colours_are_ranked_without_an_error(tmp_path, names):
    torch.manual_seed(0)
    backbone = timm.create_model("test_pass_vit").train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    found = probe(backbone, read_labelled(write(tmp_path, names)), torch.device("cpu"))
    assert found == {"probe_mAP": 100.0, "probe_rank1": 100.0}
    assert backbone.training  # the teacher trains on
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_the_scores_of_a_probe_worked_out_by_hand(monkeypatch):
    # Degrees on a circle: person 1 at 0 and 30, person 2 at 12 and 20, and a second image of person 1 under camera 1.
    # Person 1 from camera 1 finds person 2 twice before itself, AP 1/3 for both images; from camera 2 it finds itself
    # at ranks 3 and 4, AP (1/3 + 2/4) / 2 = 5/12. Person 2 finds itself first, AP 1, twice.
    angles = torch.tensor([0.0, 1, 30, 12, 20]).deg2rad()
    descriptors = torch.stack([angles.cos(), angles.sin()], dim=1)
    monkeypatch.setattr("passreid_models.evaluation.probe.Embedder", lambda *_: lambda paths, errors: descriptors)
    paths = [Path(f"{i}.jpg") for i in range(5)]
    labelled = paths, np.array([1, 1, 1, 2, 2]), np.array([1, 1, 2, 1, 2])
    found = probe(timm.create_model("test_pass_vit"), labelled, torch.device("cpu"))
    assert found["probe_rank1"] == pytest.approx(40)
    assert found["probe_mAP"] == pytest.approx(100 * (1 / 3 + 1 / 3 + 5 / 12 + 1 + 1) / 5)


@pytest.mark.parametrize("broken", [FOLDERS[4:], FOLDERS])
def test_a_probe_with_unreadable_images_warns_and_never_ends_the_run(tmp_path, monkeypatch, one_thread, broken):
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    labelled, run = write(tmp_path / "labelled", FOLDERS), tmp_path / "run"
    for name in broken:
        (labelled / name).write_bytes(b"no image")
    train(tiny(write_images(tmp_path / "images", 4), run, epochs=1, probe=str(labelled)))
    log = (run / "log.txt").read_text()
    assert f"probe: {len(broken)} images cannot be read, the first: {labelled / broken[0]}: " in log
    assert ["probe_mAP" in record for record in metrics(run)] == ([False, True] if broken != FOLDERS else [False])
    assert log.count(" probe: ") == (1 if broken != FOLDERS else 2)  # the reason why there are no scores
    assert (run / "export" / "model.safetensors").is_file()
    assert log.rstrip().endswith(f"done: {run}/export")
