"""The manifest lists the authors' weights, tags are searched in order, and the cache holds whole files only."""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg, list_models

import passreid_models
from passreid_models import cli
from passreid_models.architectures import ARCHITECTURES, STATISTICS
from passreid_models.checkpoints import download, drive, zoo
from passreid_models.checkpoints.hub import download_hub
from passreid_models.checkpoints.load import load_report
from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.checkpoints.read import CheckpointError
from passreid_models.checkpoints.zoo import (
    Weight,
    WeightsUnavailableError,
    get_weight,
    list_weights,
    pull,
    resolve,
    verify,
)
from passreid_models.data.findings import PUBLISHED
from passreid_models.runtime import sha256
from tests import GOLDEN
from tests.drive_server import DriveServer

# name, Drive id, height of the images (all are 128 wide), fusion, neck, descriptor, statistics, interpolation,
# the authors' mAP and Rank-1
OFFICIAL = """
pass_vit_small_patch16.lup 1q7oxT0vWvt0Ia0NMmdVlA3oUs0UCQq3C 256 cat - tokens imagenet bicubic - -
pass_vit_base_patch16.lup 1sZUrabY6Lke-BJoxOEviX5ALJ017x4Ft 256 cat - tokens imagenet bicubic - -
pass_vit_small_patch16.lup_market1501 1e7QVo-0lJ9EUcRgJNIQ2gci2Pj1_ZE9M 256 cat multi before 0.5 bilinear 92.2 96.3
pass_vit_small_patch16.lup_market1501_384 1201j4ix92953te-o3FrrXh5sqxtTO7TE 384 cat multi before 0.5 bilinear 92.6 96.8
pass_vit_base_patch16.lup_market1501 104I1LStAfu52hlCMlx3eCIENIA_KMJUR 256 cat multi before 0.5 bilinear 93.0 96.8
pass_vit_base_patch16.lup_market1501_384 1dYQjK4ycpXRfOJFoucbizQlKdytoKmpl 384 cat multi before 0.5 bilinear 93.3 96.9
pass_vit_small_patch16.lup_msmt17 1or1Lj7Xvd_gmQIMEX_TvzcZsqOgNWoDk 256 cat multi before 0.5 bilinear 69.1 86.5
pass_vit_small_patch16.lup_msmt17_384 1EV4r3W_oCFn0JrhgwWX1j3X1jJR-BlcN 384 cat multi before 0.5 bilinear 71.7 87.9
pass_vit_base_patch16.lup_msmt17 1W18HEwF5P7qN8MqyacFXOHW0W5gwVUs4 256 cat multi before 0.5 bilinear 71.8 88.2
pass_vit_base_patch16.lup_msmt17_384 1T-EVjOtw1fJ4Mk7k-fU7ZeAGjUtSrNbh 384 cat multi before 0.5 bilinear 74.3 89.7
pass_vit_small_patch16.lup_uda_msmt17_to_market1501 1m1x-HFxOCXYT8S4kZVU-sTroFapStjuC 256 cat multi each 0.5 bicubic 90.2 95.8
pass_vit_small_patch16.lup_uda_market1501_to_msmt17 1dxKXUwN-qgHXDbdRtqwbGWx8mMpXFuJc 256 mean multi each 0.5 bicubic 49.1 72.7
pass_vit_small_patch16.lup_usl_market1501 1r8MYGeqS50e6C5Zjk-tazlpSJpz85mMt 256 cat single after 0.5 bicubic 88.7 95.0
pass_vit_small_patch16.lup_usl_msmt17 1ooQ0spMoHlW6wMAPM14T9lQvzu-CinhG 256 mean single after 0.5 bicubic 41.0 67.0
transreid_vit_small_patch16.lup_dino 1ODxA7mJv17UfzwfXtY9dTWNsYghoNWGB 256 cls - tokens imagenet bicubic - -
transreid_vit_small_ics_patch16.lup_dino 18FL9JaJNlo15-UksalcJRXX-0dgo4Mz4 256 cls - tokens imagenet bicubic - -
transreid_vit_base_ics_patch16.lup_dino 1ZFMCBZ-lNFMeBD5K8PtJYJfYEk5D9isd 256 cls - tokens imagenet bicubic - -
pass_vit_small_patch16.lup_msmt17_uda_source 1rXr-uV5I5osgu6lhW_UfeguOvAW0nXgx 256 cat multi before 0.5 bilinear - -
pass_vit_small_patch16.lup_market1501_uda_source 1QQXU8x4EuxCMJ4hPi-NkAvNeenNz7AJy 256 mean multi before 0.5 bilinear - -
"""  # noqa: E501
ROWS = [line.split() for line in OFFICIAL.strip().splitlines()]
NAMES = [row[0] for row in ROWS]
FEATURES = {  # where the descriptor is taken, and whether it is normalised once more
    "tokens": ("tokens", True),
    "before": ("before neck", True),
    "after": ("after neck", True),
    "each": ("after neck", False),
}
BUNDLED = [weight for weight in list_weights() if weight.bundled_file]
UNTAGGED = {weight.architecture: weight.name for weight in reversed(BUNDLED)}  # the first in the manifest
TINY = dict(embed_dim=64, depth=1, num_heads=2)
LUP, MARKET = "pass_vit_small_patch16.lup", "pass_vit_small_patch16.lup_market1501"
UDA = "pass_vit_small_patch16.lup_uda_market1501_to_msmt17"


# --------------------------------------------------------------------------------------------------------- manifest


def test_the_manifest_is_the_authors_list():
    def number(text: str) -> float | None:
        return None if text == "-" else float(text)

    def row_of(w: Weight) -> tuple:
        accuracy = w.accuracy or {"mAP": None, "rank1": None}
        where = (w.feature, w.l2_normalize)
        figures = (accuracy["mAP"], accuracy["rank1"])
        return (w.source["drive_id"], w.input_size, w.fusion, w.neck, where, w.mean_std, w.interpolation, figures)

    expected = {}
    for name, drive_id, height, fusion, neck, feature, mean_std, interpolation, m_ap, rank1 in ROWS:
        fusion = {"cls": "token"}.get(fusion, fusion)
        figures = (number(m_ap), number(rank1))
        neck = neck.replace("-", "")
        expected[name] = (
            drive_id,
            (int(height), 128),
            fusion,
            neck,
            FEATURES[feature],
            mean_std,
            interpolation,
            figures,
        )
    assert {w.name: row_of(w) for w in list_weights() if not w.bundled_file} == expected
    assert list(expected) == [w.name for w in list_weights() if not w.bundled_file]


def test_every_row_is_of_a_registered_architecture_and_states_task_data_and_licence():
    for w in list_weights():
        assert w.architecture in ARCHITECTURES
        assert w.task
        assert w.data
        assert w.license
        assert w.license_note
        if w.accuracy:
            assert w.accuracy["measured_by"]
            assert w.accuracy["measured_on"] == w.data.split(", ")[-1] or w.bundled_file


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_the_settings_of_a_tag_reach_timm(row):
    name, drive_id, height, _, _, _, mean_std, interpolation, _, _ = row
    cfg = get_pretrained_cfg(name, allow_unregistered=False)
    assert cfg.url == f"https://drive.google.com/file/d/{drive_id}/view"
    assert cfg.input_size == (3, int(height), 128)
    half = (0.5, 0.5, 0.5)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg.mean, cfg.std) == {"0.5": (half, half), "imagenet": imagenet}[mean_std]
    assert (cfg.interpolation, cfg.crop_mode, cfg.crop_pct, cfg.license) == (interpolation, "squash", 1.0, "other")
    assert (cfg.file, cfg.hf_hub_id, cfg.num_classes) == (None, None, 0)


def test_timm_lists_every_tag():
    assert set(list_models(["pass_vit_*", "transreid_vit_*"], pretrained=True)) == {w.name for w in list_weights()}
    assert {name for name in NAMES if name.startswith("pass_vit")} <= set(list_models("pass_*", pretrained=True))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_fusion_and_neck_follow_the_tag(row):
    name, _, _, fusion, neck, feature, *_ = row
    model = timm.create_model(name, **TINY)
    assert model.global_pool == {"cls": "token"}.get(fusion, fusion)
    assert model.neck == (neck if feature in ("after", "each") else "")
    assert model.head_hidden_size == {"cls": 64, "mean": 64, "cat": 128}[fusion]


def test_the_callers_fusion_and_neck_win_over_the_tags():
    model = timm.create_model(UDA, **TINY, global_pool="cat", neck="")
    assert (model.global_pool, model.neck) == ("cat", "")


@pytest.mark.parametrize("pretrained", [False, True])
def test_an_unknown_tag_is_refused_with_the_known_ones(pretrained):
    with pytest.raises(ValueError, match=r"there are no weights 'pass_vit_base_patch16\.lupp'") as caught:
        timm.create_model("pass_vit_base_patch16.lupp", pretrained=pretrained, **TINY)
    assert all(w.name in str(caught.value) for w in list_weights("pass_vit_base_patch16"))


# ------------------------------------------------------------------------------------------------ the default (D3)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in {w.architecture for w in BUNDLED}])
def test_without_a_bundled_file_there_is_no_default_and_the_error_lists_the_tags(architecture, no_network):
    with pytest.raises(ValueError, match=f"{architecture} has no bundled weights, so pretrained=True needs a tag") as e:
        timm.create_model(architecture, pretrained=True)
    listed = [name for name in NAMES if name.startswith(architecture + ".")]
    assert str(e.value).endswith(", ".join(listed) if listed else "and none were published for it")
    assert timm.create_model(architecture, **TINY).pretrained_cfg.get("url") is None  # it carries no tag's settings


@pytest.mark.parametrize("weight", BUNDLED, ids=lambda w: w.name)
def test_a_bundled_file_is_the_one_the_manifest_states_and_the_first_of_an_architecture_the_default(weight, no_network):
    assert weight.bundled_file.stat().st_size == weight.source["bytes"]
    assert sha256(weight.bundled_file) == weight.source["sha256"]
    assert verify(weight.name) == [(weight.name, "ok")]
    assert weight.license in ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0")
    stored = safetensors.torch.load_file(weight.bundled_file)
    untagged = [weight.architecture] if UNTAGGED[weight.architecture] == weight.name else []
    for name in (*untagged, weight.name, f"local-dir:{weight.bundled_file.parent}"):
        model = timm.create_model(name, pretrained=True)
        assert model.state_dict().keys() == stored.keys()
        assert all(torch.equal(t, stored[k].to(t.dtype)) for k, t in model.state_dict().items())
        assert (model.global_pool, model.neck) == (weight.fusion, weight.model_neck)
        cfg = model.pretrained_cfg
        assert tuple(cfg["input_size"]) == (3, *weight.input_size)
        assert (tuple(cfg["mean"]), tuple(cfg["std"])) == STATISTICS[weight.mean_std]
        assert cfg["interpolation"] == weight.interpolation


def test_the_bundled_files_stay_small_and_the_default_ranks_best():
    sizes = [weight.source["bytes"] for weight in BUNDLED]
    assert max(sizes) < 50e6
    assert sum(sizes) < 70e6
    assert UNTAGGED["pass_vit_small_patch16"] == "pass_vit_small_patch16.synth_reid"
    assert UNTAGGED["pass_vit_tiny_patch16"] == "pass_vit_tiny_patch16.synth_reid"
    mAP = {weight.tag: weight.accuracy["mAP"] for weight in list_weights("pass_vit_tiny_patch16")}  # on the same set
    assert max(mAP, key=mAP.__getitem__) == "synth_reid"


def stand_in(root: Path, rows: list[dict], wheel: bool = False) -> Path:
    """The package with another manifest, to be imported from ``root``, laid out as a checkout or as a wheel."""
    package = root / "passreid_models"
    package.mkdir(parents=True)
    for entry in Path(passreid_models.__file__).parent.iterdir():
        if entry.name not in ("__pycache__", "_weights"):
            (package / entry.name).symlink_to(entry)
    folder = package / "_weights" if wheel else root / "weights"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder


def import_path(root: Path) -> str:
    """PYTHONPATH with ``root`` before what was there."""
    return os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])


def manifest_row(name: str, **source: object) -> dict:
    """A row for ``test_pass_vit``, otherwise that of the official file."""
    row = {**dataclasses.asdict(get_weight(LUP)), "name": name, "input_size": [64, 32]}
    empty = dict.fromkeys(("drive_id", "drive_id_log", "hub_id", "sha256", "bytes"))
    return {**row, "source": {**empty, **source}}


DEFAULTS = """
import json, pathlib, timm, torch, passreid_models
from passreid_models.checkpoints import zoo
def same(model):
    return all(torch.equal(t, stored[k]) for k, t in model.state_dict().items())
def error(name):
    try:
        timm.create_model(name, pretrained=True)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
stored = torch.load("stored.pt")
result = {"file": passreid_models.__file__, "listed": timm.list_models("test_pass_vit*", pretrained=True)}
result["verify"] = zoo.verify()
result["named"] = same(timm.create_model("test_pass_vit.synth", pretrained=True))
print(json.dumps(result), flush=True)
import sys; print("-- untagged", file=sys.stderr, flush=True)
result = {"untagged": [same(timm.create_model("test_pass_vit", pretrained=True)) for _ in range(3)]}
print("-- others", file=sys.stderr, flush=True)
result["published"] = error("test_pass_vit.published")
result["other"] = error("pass_vit_small_patch16")
folder = zoo.weights_dir() / "test_pass_vit.synth"
file = folder / "model.safetensors"
data = bytearray(file.read_bytes()); data[-1] ^= 1; file.write_bytes(data)
result["flipped"] = zoo.verify("test_pass_vit.synth")
file.unlink()
result["missing"] = zoo.verify("test_pass_vit.synth")
result["untagged, missing"] = error("test_pass_vit")
print(json.dumps(result))
"""


def test_the_default_is_the_bundled_file_and_a_named_tag_never_becomes_it(tmp_path):
    model = timm.create_model("test_pass_vit")
    save_pretrained(model, tmp_path / "synth")
    file = tmp_path / "synth" / "model.safetensors"
    stated = {"bundled": True, "sha256": sha256(file), "bytes": file.stat().st_size}
    rows = [manifest_row("test_pass_vit.published", drive_id="ID"), manifest_row("test_pass_vit.synth", **stated)]
    folder = stand_in(tmp_path / "site", [*rows, manifest_row(LUP, drive_id="ID")], wheel=True)
    (tmp_path / "synth").rename(folder / "test_pass_vit.synth")
    torch.save(model.state_dict(), tmp_path / "stored.pt")
    env = {
        **os.environ,
        "PYTHONPATH": import_path(tmp_path / "site"),
        "HF_HUB_OFFLINE": "1",
        "PASSREID_CACHE": str(tmp_path),
    }
    command = [sys.executable, "-c", DEFAULTS]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = {k: v for line in done.stdout.splitlines() for k, v in json.loads(line).items()}
    assert result["file"] == str(tmp_path / "site" / "passreid_models" / "__init__.py")  # the wheel's layout was read
    assert result["listed"] == ["test_pass_vit.published", "test_pass_vit.synth"]
    assert dict(result["verify"])["test_pass_vit.synth"] == "ok"
    assert result["named"] is True
    assert result["untagged"] == [True, True, True]
    before, notice, after = (
        part.strip() for part in done.stderr.replace("-- others", "-- untagged").split("-- untagged")
    )
    assert (before, after) == ("", "")  # a tag that was asked for needs no notice
    assert len(notice.splitlines()) == 1  # once, though loaded three times
    assert "test_pass_vit.synth" in notice
    assert notice.endswith("other tags: published")
    assert result["published"].startswith("WeightsUnavailableError: test_pass_vit.published: HF_HUB_OFFLINE is set")
    assert result["other"].startswith("ValueError: pass_vit_small_patch16 has no bundled weights")
    assert result["flipped"] == [["test_pass_vit.synth", "damaged"]]
    assert result["missing"] == [["test_pass_vit.synth", "missing"]]
    assert "is missing: install the package again" in result["untagged, missing"]


# -------------------------------------------------------------------------------------------------- pull, in small


def shrink() -> None:
    """The official rows at the size of ``test_pass_vit``."""
    ARCHITECTURES["pass_vit_small_patch16"] = ARCHITECTURES["test_pass_vit"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "pass_vit_small_patch16", ARCHITECTURES["test_pass_vit"])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "PASSREID_HUB_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def official_file(
    path: Path, seed: int = 0, prefix: str = "", identities: int = 751, **wrong: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Write a file in the authors' layout, supervised with ``base.`` and unsupervised with ``module.`` before the keys.

    Returns:
        State dict that the converted model must have: timm's keys, positions added to tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.1

    expected = {k: draw(*t.shape) for k, t in timm.create_model("test_pass_vit").state_dict().items()}
    theirs = {k: t for k, t in expected.items() if k not in ("cls_token", "reg_token")}
    names = [("cls_token", "cls_pos")] + [(f"part_token{k}", f"part{k}_pos") for k in (1, 2, 3)]
    for token, position in names:
        theirs |= {token: draw(1, 1, 64), position: draw(1, 1, 64)}
    expected["cls_token"] = theirs["cls_token"] + theirs["cls_pos"]
    expected["reg_token"] = torch.cat([theirs[token] + theirs[position] for token, position in names[1:]], dim=1)
    state = {prefix + k: t for k, t in {**theirs, **wrong}.items()}
    if prefix:
        necks = {"base.": "bottleneck bottleneck_1 bottleneck_2 bottleneck_3", "module.": "bottleneck bottleneck_pt1"}
        lead = "" if prefix == "base." else prefix
        for neck in (necks[prefix] + ("" if lead == "" else " bottleneck_pt2 bottleneck_pt3")).split():
            state |= {f"{lead}{neck}.{k}": draw(64) for k in ("weight", "bias", "running_mean", "running_var")}
            state[f"{lead}{neck}.num_batches_tracked"] = torch.tensor(5)
    if prefix == "base.":
        state["classifier.weight"] = draw(identities, 128)
    torch.save({"state_dict": state, "epoch": 3} if prefix == "module." else state, path)
    return expected


@pytest.fixture
def server(monkeypatch) -> Iterator[DriveServer]:
    """A Drive that has what ``serve`` gives it."""
    sleep = time.sleep
    monkeypatch.setattr(download.time, "sleep", lambda seconds: sleep(seconds / 100))
    with DriveServer(b"", kind="file") as server:
        monkeypatch.setattr(drive, "_ENDPOINT", server.endpoint)
        yield server


def serve(server: DriveServer, folder: Path, kind: str = "file") -> dict[str, torch.Tensor]:
    """Put an official file on the Drive, for every id; return the state dict that the converted model must have."""
    expected = official_file(folder / "theirs.pth")
    server.content, server.kind = (folder / "theirs.pth").read_bytes(), kind
    return expected


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def holds(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether the backbone in a folder is the expected one, bit for bit."""
    tensors = {k: t for k, t in stored(folder).items() if not k.startswith("fc_norm.")}
    return tensors.keys() == expected.keys() and all(torch.equal(t, expected[k]) for k, t in tensors.items())


def litter(cache: Path, name: str = LUP) -> list[str]:
    """Names in the cache besides the record, its folder and the lock."""
    record = zoo.read_record(name)
    expected = {f"{name}.json", f".{name}.lock", *([record["folder"]] if record else [])}
    return [p.name for p in cache.iterdir() if p.name not in expected]


def test_pull_converts_a_file_given_by_hand_and_records_it(tmp_path, cache, small, no_network):
    expected = official_file(tmp_path / "transformer_120.pth", prefix="base.")
    folder = pull(MARKET, tmp_path / "transformer_120.pth")
    assert folder.parent == cache
    assert holds(folder, expected)
    record = json.loads((cache / f"{MARKET}.json").read_text())
    assert record.pop("date")[:2] == "20"
    assert record == {
        "name": MARKET,
        "folder": folder.name,
        "source": get_weight(MARKET).url,
        "source_sha256": sha256(tmp_path / "transformer_120.pth"),
        "source_bytes": (tmp_path / "transformer_120.pth").stat().st_size,
        "sha256": sha256(folder / "model.safetensors"),
    }
    extras = safetensors.torch.load_file(folder / "extras.safetensors")
    assert extras["classifier.weight"].shape == (751, 128)
    assert extras["fc_norm.bn.running_mean"].shape == (4 * 64,)
    config = json.loads((folder / "config.json").read_text())
    assert (config["fusion"], config["neck"], config["l2_normalize"]) == ("cat", "", True)
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3
    assert config["pretrained_cfg"]["interpolation"] == "bilinear"
    assert config["provenance"]["source_sha256"] == record["source_sha256"]
    assert litter(cache, MARKET) == []


def test_pull_takes_fusion_and_neck_from_the_manifest_where_tensors_do_not_show_them(tmp_path, cache, small):
    official_file(tmp_path / "model_best.pth.tar", prefix="module.")
    folder = pull(UDA, tmp_path / "model_best.pth.tar")
    config = json.loads((folder / "config.json").read_text())
    assert (config["fusion"], config["neck"], config["l2_normalize"]) == ("mean", "multi", False)
    assert stored(folder)["fc_norm.bn.weight"].shape == (4 * 64,)
    assert not (folder / "extras.safetensors").exists()


@pytest.mark.parametrize("prefix", ["", "base.", "module."])
def test_a_pulled_tag_loads_offline_and_as_a_folder(tmp_path, cache, small, no_network, monkeypatch, prefix):
    name = {"": LUP, "base.": MARKET, "module.": UDA}[prefix]
    expected = official_file(tmp_path / "file.pth", prefix=prefix)
    folder = pull(name, tmp_path / "file.pth")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = timm.create_model(name, pretrained=True, img_size=(64, 32)).eval()
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in expected.items())
    assert load_report(model).source == str(folder / "model.safetensors")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 32)
    assert torch.equal(model(x), again(x))
    for cfg in (model.pretrained_cfg, again.pretrained_cfg):
        assert tuple(cfg["mean"]) == tuple(get_pretrained_cfg(name).mean)
        assert cfg["interpolation"] == get_pretrained_cfg(name).interpolation


def test_a_tag_in_an_overlay_gives_its_weights_with_their_statistics():
    named = timm.create_model("pass_vit_tiny_patch16.synth", pretrained=True)
    overlaid = timm.create_model("pass_vit_tiny_patch16", pretrained=True, pretrained_cfg_overlay={"tag": "synth"})
    assert all(torch.equal(v, overlaid.state_dict()[k]) for k, v in named.state_dict().items())
    assert overlaid.pretrained_cfg["mean"] == named.pretrained_cfg["mean"] != (0.5, 0.5, 0.5)


def test_a_tag_given_as_timms_cfg_loads_what_its_name_loads(tmp_path, cache, small, no_network):
    official_file(tmp_path / "file.pth", prefix="module.")
    pull(UDA, tmp_path / "file.pth")
    architecture, tag = UDA.split(".")
    models = [
        timm.create_model(architecture, pretrained=True, pretrained_cfg=cfg, img_size=(64, 32)).eval()
        for cfg in (tag, get_pretrained_cfg(UDA))
    ]
    x = torch.rand(2, 3, 64, 32)
    assert torch.equal(models[0](x), models[1](x))
    assert load_report(models[0]).source == load_report(models[1]).source


def test_the_cache_comes_before_the_hub_and_the_drive(tmp_path, cache, small, monkeypatch):
    official_file(tmp_path / "file.pth")
    folder = pull(LUP, tmp_path / "file.pth")
    monkeypatch.setenv("PASSREID_HUB_NAMESPACE", "org")
    requests = []
    monkeypatch.setattr(zoo, "download_hub", lambda *args: requests.append(args))
    monkeypatch.setattr(zoo, "_download_drive", lambda *args: requests.append(args))
    assert resolve(*LUP.split(".")) == folder / "model.safetensors"
    assert pull(LUP) == folder
    assert requests == []


def test_a_file_of_another_sha256_is_refused_and_the_right_one_taken(tmp_path, cache, small, monkeypatch):
    expected = official_file(tmp_path / "right.pth", seed=1)
    official_file(tmp_path / "wrong.pth", seed=2)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    weight = dataclasses.replace(get_weight(LUP), source={"drive_id": "ID", "sha256": sha256(tmp_path / "right.pth")})
    monkeypatch.setitem(zoo._manifest(), LUP, weight)
    with pytest.raises(CheckpointError, match=r"wrong\.pth is not pass_vit_small_patch16\.lup: its SHA-256 is "):
        pull(LUP, tmp_path / "wrong.pth")
    assert zoo.cached_folder(LUP) is None
    assert holds(pull(LUP, tmp_path / "right.pth"), expected)
    for wrong in ("wrong.pth", "page.pth"):  # refused before anything is read
        with pytest.raises(CheckpointError, match="SHA-256"):
            pull(LUP, tmp_path / wrong)
    assert holds(zoo.cached_folder(LUP), expected)
    assert litter(cache) == []


WRONG_FILES: dict[str, tuple[Callable[[Path], object], type, str]] = {
    "no file": (lambda path: None, FileNotFoundError, "no file at"),
    "a folder": (lambda path: path.mkdir(), FileNotFoundError, "no file at"),
    "empty": (lambda path: path.touch(), CheckpointError, "is not a PyTorch checkpoint"),
    "a page": (lambda path: path.write_text("<!DOCTYPE html>"), CheckpointError, "is not a PyTorch checkpoint"),
    "cut short": (
        lambda path: (official_file(path), path.write_bytes(path.read_bytes()[:-5000])),
        CheckpointError,
        "is cut short or damaged",
    ),
    "another depth": (
        lambda path: official_file(path, **{"blocks.3.norm1.weight": torch.zeros(64)}),
        CheckpointError,
        r"there is no blocks\.3\.attn\.qkv\.weight",
    ),
    "not finite": (
        lambda path: official_file(path, **{"norm.bias": torch.full((64,), torch.nan)}),
        CheckpointError,
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_wrong_file_leaves_the_old_weights(tmp_path, cache, small, wrong):
    write, error, message = WRONG_FILES[wrong]
    write(tmp_path / "wrong.pth")
    for _ in range(2):  # with nothing in the cache, and with weights
        with pytest.raises(error, match=message) as caught:
            pull(LUP, tmp_path / "wrong.pth")
        assert str(tmp_path / "wrong.pth") in str(caught.value)
        assert litter(cache) == []
        expected = official_file(tmp_path / "right.pth")
        folder = zoo.cached_folder(LUP) or pull(LUP, tmp_path / "right.pth")
        assert holds(folder, expected)
        assert verify(LUP) == [(LUP, "ok")]


def test_a_disk_that_fills_up_at_the_record_leaves_the_old_weights(tmp_path, cache, small, monkeypatch):
    expected = official_file(tmp_path / "old.pth", seed=1)
    official_file(tmp_path / "new.pth", seed=2)
    pull(LUP, tmp_path / "old.pth")
    write = Path.write_text

    def disk_full(path: Path, text: str, **options: Any) -> None:
        if path.name == f"{LUP}.json":
            write(path, text[: len(text) // 2])
            raise OSError("No space left on device")
        write(path, text)

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", disk_full)
        with pytest.raises(OSError, match="No space left"):
            pull(LUP, tmp_path / "new.pth")
    assert holds(zoo.cached_folder(LUP), expected)
    assert verify(LUP) == [(LUP, "ok")]
    pull(LUP, tmp_path / "old.pth")
    assert litter(cache) == []


def test_another_file_replaces_the_old_one(tmp_path, cache, small):
    official_file(tmp_path / "old.pth", seed=1)
    expected = official_file(tmp_path / "new.pth", seed=2)
    old = pull(LUP, tmp_path / "old.pth")
    new = pull(LUP, tmp_path / "new.pth")
    assert holds(new, expected)
    assert zoo.cached_folder(LUP) == new
    assert not old.exists()
    assert litter(cache) == []


def test_the_same_file_again_heals_a_damaged_folder(tmp_path, cache, small):
    expected = official_file(tmp_path / "file.pth")
    folder = pull(LUP, tmp_path / "file.pth")
    flip(folder / "model.safetensors")
    (folder / "config.json").unlink()
    assert verify(LUP) == [(LUP, "damaged")]
    healed = pull(LUP, tmp_path / "file.pth")
    assert verify(LUP) == [(LUP, "ok")]
    assert holds(healed, expected)
    assert (healed / "config.json").is_file()
    assert litter(cache) == []


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_verify_finds_a_flipped_byte_and_the_command_exits_1(tmp_path, cache, small, capsys):
    assert verify(LUP) == [(LUP, "not pulled")]
    assert cli.main(["weights", "verify", LUP]) == 0
    official_file(tmp_path / "file.pth")
    folder = pull(LUP, tmp_path / "file.pth")
    assert verify(LUP) == [(LUP, "ok")]
    flip(folder / "model.safetensors")
    assert verify(LUP) == [(LUP, "damaged")]
    assert dict(verify())[LUP] == "damaged"
    capsys.readouterr()
    assert cli.main(["weights", "verify"]) == 1
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines[LUP] == "damaged"
    assert lines[MARKET] == "not pulled"
    (folder / "model.safetensors").unlink()
    assert verify(LUP) == [(LUP, "missing")]


def test_the_commands_print_where_the_weights_are(tmp_path, cache, small, capsys):
    official_file(tmp_path / "file.pth")
    for command in (["pull", LUP, "--from", str(tmp_path / "file.pth")], ["pull", LUP]):
        assert cli.main(["weights", *command]) == 0
        digest = sha256(tmp_path / "file.pth")
        assert capsys.readouterr().out == f"{zoo.cached_folder(LUP)}\nSHA-256 of the source file: {digest}\n"
    assert cli.main(["weights", "pull", BUNDLED[0].name]) == 0
    assert capsys.readouterr().out == f"{BUNDLED[0].bundled_file.parent}\n"
    assert cli.main(["weights", "list", "pass_vit_small_patch16"]) == 0
    here = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert {name: here[name] for name in (LUP, MARKET)} == {LUP: "cached", MARKET: "-"}
    assert cli.main(["weights", "list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [w.name for w in list_weights()]
    for mistake in (["pull", "pass_vit_small_patch16.nope"], ["pull", LUP, "--from", "nope.pth"], ["list", "nope"]):
        assert cli.main(["weights", *mistake]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("passreid: ")
        assert "nope" in err


def test_the_cache_is_beside_the_hubs_unless_named(tmp_path, monkeypatch):
    monkeypatch.delenv("PASSREID_CACHE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    assert zoo.cache_dir() == tmp_path / "hf" / "passreid"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PASSREID_CACHE", "~/mine")
    assert zoo.cache_dir() == tmp_path / "mine"


# --------------------------------------------------------------------------------------------- kills and parallelism


def in_child(function: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    """A process forked from a server that has imported the package and done nothing with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["passreid_models", "pytest"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def _pull_and_die(step: int, cache: Path, file: Path) -> None:
    """In a child: kill -9 just before the file-system operation of this number, from 0."""
    shrink()
    torch.set_num_threads(1)
    os.environ["PASSREID_CACHE"] = str(cache)
    steps = itertools.count()

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")) and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    pull(LUP, file)
    os._exit(0)


def killed_pulls(tmp_path: Path, monkeypatch, file: Path, start: Path | None) -> Iterator[tuple[Path | None, int]]:
    """Pull ``file`` in children, each killed one operation later, until one is done; yields what the cache then has."""
    for step in itertools.count():
        cache = tmp_path / f"cache{step}"
        if start:
            shutil.copytree(start, cache)
        else:
            cache.mkdir()
        process = in_child(_pull_and_die, step, cache, file)
        process.join(600)
        monkeypatch.setenv("PASSREID_CACHE", str(cache))
        yield zoo.cached_folder(LUP), process.exitcode
        pull(LUP, file)  # the lock is free, and what the kill left is cleared away
        assert verify(LUP) == [(LUP, "ok")]
        assert litter(cache) == [], f"after a kill at step {step}"
        if process.exitcode == 0:
            assert step > 5  # the kills did hit the pull
            return
        assert process.exitcode == -signal.SIGKILL
        assert step < 200


def test_a_pull_killed_at_any_step_leaves_whole_weights_or_none(tmp_path, small, monkeypatch):
    expected = official_file(tmp_path / "file.pth")
    seen = []
    for folder, _ in killed_pulls(tmp_path, monkeypatch, tmp_path / "file.pth", None):
        assert folder is None or (holds(folder, expected) and verify(LUP) == [(LUP, "ok")])
        seen.append(folder is not None)
    assert seen == sorted(seen)  # none until the record is there, then whole
    assert (seen[0], seen[-1]) == (False, True)


@pytest.mark.parametrize("renewed", ["another file", "the same file"])
def test_a_pull_killed_at_any_step_leaves_the_old_weights_or_the_new(tmp_path, small, monkeypatch, renewed):
    old = official_file(tmp_path / "old.pth", seed=1)
    if renewed == "another file":
        new = official_file(tmp_path / "new.pth", seed=2)
    else:  # byte for byte: the archive in a file of torch.save holds its name
        new = old
        shutil.copy(tmp_path / "old.pth", tmp_path / "new.pth")
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "start"))
    pull(LUP, tmp_path / "old.pth")
    which = []
    for folder, _ in killed_pulls(tmp_path, monkeypatch, tmp_path / "new.pth", tmp_path / "start"):
        assert verify(LUP) == [(LUP, "ok")]
        assert (folder / "config.json").is_file()
        assert holds(folder, old) or holds(folder, new)
        which.append(holds(folder, new))
    assert which == sorted(which)
    assert which[-1] is True


def _pull(cache: Path, source: Path | None = None, endpoint: str = "", log: Path | None = None) -> None:
    """In a child: pull from a file or a Drive, and write down the folder."""
    shrink()
    torch.set_num_threads(1)
    os.environ["PASSREID_CACHE"] = str(cache)
    drive._ENDPOINT = endpoint
    folder = pull(LUP, source)
    if log:
        with log.open("a") as lines:
            lines.write(f"{folder}\n")


def test_parallel_pulls_download_once_and_agree(tmp_path, cache, small, server):
    expected = serve(server, tmp_path, "slow")
    log = tmp_path / "log"
    processes = [in_child(_pull, cache, None, server.endpoint, log) for _ in range(3)]
    for process in processes:
        process.join(600)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    folder = zoo.cached_folder(LUP)
    assert log.read_text().splitlines() == 3 * [str(folder)]
    assert server.requests == [(get_weight(LUP).source["drive_id"], None)]
    assert holds(folder, expected)
    assert litter(cache) == []


def test_a_pull_killed_during_the_download_leaves_the_next_one_a_free_way(tmp_path, cache, small, server):
    expected = serve(server, tmp_path, "slow")
    process = in_child(_pull, cache, None, server.endpoint)
    while not any(file.stat().st_size for file in cache.glob(".*/*.pth")):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join(600)
    assert zoo.cached_folder(LUP) is None
    assert litter(cache) != []
    assert holds(pull(LUP), expected)
    assert litter(cache) == []


def test_parallel_pulls_of_different_files_leave_one_of_them_whole(tmp_path, cache, small):
    files = [tmp_path / f"{seed}.pth" for seed in range(3)]
    expected = [official_file(file, seed) for seed, file in enumerate(files)]
    processes = [in_child(_pull, cache, file) for file in files]
    for process in processes:
        process.join(600)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert sum(holds(zoo.cached_folder(LUP), e) for e in expected) == 1
    assert verify(LUP) == [(LUP, "ok")]
    assert litter(cache) == []


# ------------------------------------------------------------------------------------------------------------ Drive


def test_a_download_is_verified_converted_and_recorded(tmp_path, cache, small, server, monkeypatch):
    expected = serve(server, tmp_path, "confirm")
    monkeypatch.setattr(zoo, "download_hub", lambda *args: pytest.fail(f"asked the Hub for {args}"))
    drive_id = get_weight(LUP).source["drive_id"]
    model = timm.create_model(LUP, pretrained=True, img_size=(64, 32))
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in expected.items())
    assert server.requests == 2 * [(drive_id, None)]  # the second confirms
    assert verify(LUP) == [(LUP, "ok")]
    assert litter(cache) == []
    config = json.loads((zoo.cached_folder(LUP) / "config.json").read_text())
    assert config["provenance"]["source"] == f"{drive_id}.pth"  # where it came from can be read off
    assert config["provenance"]["source_sha256"] == hashlib.sha256(server.content).hexdigest()
    timm.create_model(LUP, pretrained=True)
    pull(LUP)
    assert len(server.requests) == 2
    pull(LUP, force=True)
    assert len(server.requests) == 4
    assert verify(LUP) == [(LUP, "ok")]


@pytest.mark.parametrize("kind", ["cut", "whole-again", "busy"])
def test_a_download_that_is_interrupted_goes_on_by_itself(tmp_path, cache, small, server, kind):
    expected = serve(server, tmp_path, kind)
    assert holds(pull(LUP), expected)
    assert litter(cache) == []


DRIVE_FAILURES = {  # how Drive serves the file, and what the error says
    "quota": "the download quota of the file on Google Drive is used up: try again in a day; download https",
    "denied": "Google Drive refuses the download: the file is not public, or was downloaded too often today; download",
    "login": "Google Drive sends a page instead of the file (Sign in - Google Accounts), which may not be public; ",
    "gone": "there is no such file on Google Drive; download",
    "cut-always": "the download from Google Drive failed: ",
    "loop": "the download from Google Drive failed: it asks for a confirmation again and again; download",
    "no network": "the download from Google Drive failed: ConnectError: ",
    "another file": "the file from Google Drive is not a PyTorch checkpoint",
    "cut short": "the file from Google Drive is cut short or damaged",
}


def fail(server: DriveServer, monkeypatch, failure: str) -> None:
    """Let the downloads of an official file fail."""
    server.kind = "file" if failure in ("another file", "cut short") else failure
    if failure == "no network":
        monkeypatch.setattr(drive, "_ENDPOINT", "http://127.0.0.1:9")
    server.content = b"not a checkpoint" if failure == "another file" else server.content[:100_000]


@pytest.mark.parametrize("failure", DRIVE_FAILURES)
def test_a_failed_download_is_one_sentence_with_advice_to_download_by_hand(
    tmp_path, cache, small, server, monkeypatch, capsys, failure
):
    serve(server, tmp_path)
    fail(server, monkeypatch, failure)
    by_hand = f"download {get_weight(LUP).url} by hand and run `passreid weights pull {LUP} --from FILE`"
    for attempt in (lambda: pull(LUP), lambda: timm.create_model(LUP, pretrained=True)):
        with pytest.raises((WeightsUnavailableError, CheckpointError)) as caught:
            attempt()
        assert DRIVE_FAILURES[failure] in str(caught.value)
        assert by_hand in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(cache) not in str(caught.value)  # the temporary file is gone, its name helps no one
    assert cli.main(["weights", "pull", LUP]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert zoo.cached_folder(LUP) is None
    assert litter(cache) == []


@pytest.mark.parametrize("failure", DRIVE_FAILURES)
def test_a_failed_download_leaves_the_old_weights(tmp_path, cache, small, server, monkeypatch, failure):
    expected = serve(server, tmp_path)
    pull(LUP)
    fail(server, monkeypatch, failure)
    with pytest.raises((WeightsUnavailableError, CheckpointError)):
        pull(LUP, force=True)
    assert holds(zoo.cached_folder(LUP), expected)
    assert verify(LUP) == [(LUP, "ok")]
    assert litter(cache) == []


def test_an_interrupted_download_leaves_no_half_file(tmp_path, cache, small, server, monkeypatch):
    serve(server, tmp_path, "cut")

    def interrupt(seconds: float) -> None:
        assert [file.stat().st_size for file in cache.glob(".*/*.pth")] == [len(server.content) // 2]
        raise KeyboardInterrupt

    monkeypatch.setattr(download.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pull(LUP)
    assert litter(cache) == []


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_nobody_is_asked_and_the_error_gives_advice(cache, small, no_network, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(WeightsUnavailableError, match=r"HF_HUB_OFFLINE is set .* by hand and run `passreid weights"):
        timm.create_model(LUP, pretrained=True)


@pytest.mark.parametrize(
    ("golden", "shown"),
    [
        ("upstream_pretrain_checkpoint.pth", "task pretrain, not supervised; neck none, not multi"),
        ("upstream_unsupervised_multineck_cat.pth.tar", "task unsupervised, not supervised"),
        ("upstream_supervised_singleneck_cat.pth", "neck single, not multi"),
        ("upstream_supervised_multineck_mean.pth", "fusion mean, not cat"),
    ],
)
def test_a_published_file_of_another_tag_is_refused_by_its_layout(cache, golden, shown):
    with pytest.raises(CheckpointError, match=f"is not pass_vit_small_patch16.lup_market1501: .* shows .*{shown}"):
        pull("pass_vit_small_patch16.lup_market1501", GOLDEN / golden)
    assert zoo.cached_folder("pass_vit_small_patch16.lup_market1501") is None


@pytest.mark.parametrize(
    ("name", "identities", "shown"),
    [
        (MARKET, 1041, r"1,041 identities \(MSMT17\), not 751 \(Market-1501\)"),
        (MARKET, 702, r"702 identities \(DukeMTMC-reID\), not 751 \(Market-1501\)"),
        (MARKET, 500, r"500 identities, not 751 \(Market-1501\)"),
        ("pass_vit_small_patch16.lup_msmt17", 751, r"751 identities \(Market-1501\), not 1,041 \(MSMT17\)"),
        ("pass_vit_small_patch16.lup_msmt17_uda_source", 751, r"751 identities \(Market-1501\), not 1,041 \(MSMT17\)"),
    ],
)
def test_a_classifier_of_other_identities_than_the_tags_is_refused(tmp_path, cache, small, name, identities, shown):
    official_file(tmp_path / "file.pth", prefix="base.", identities=identities)
    with pytest.raises(CheckpointError, match=f"is not {name}: its layout shows a classifier of {shown}$"):
        pull(name, tmp_path / "file.pth")
    assert zoo.cached_folder(name) is None


@pytest.mark.parametrize(("name", "identities"), [(MARKET, 751), ("pass_vit_small_patch16.lup_msmt17", 1041)])
def test_a_classifier_of_the_tags_identities_is_taken(tmp_path, cache, small, name, identities):
    expected = official_file(tmp_path / "file.pth", prefix="base.", identities=identities)
    assert holds(pull(name, tmp_path / "file.pth"), expected)


def test_the_identities_of_a_classifier_are_those_of_the_published_training_sets():
    published = {name: PUBLISHED.get(name, PUBLISHED.get(f"{name} V1"))["train"][1] for name in zoo.TRAIN_IDENTITIES}
    assert published == zoo.TRAIN_IDENTITIES


def test_bundled_weights_take_no_file(tmp_path):
    bundled = next(w for w in list_weights() if w.bundled_file)
    with pytest.raises(ValueError, match="is bundled with the package and takes no file"):
        pull(bundled.name, tmp_path / "other.pth")
    assert pull(bundled.name) == bundled.bundled_file.parent


def test_a_repository_that_is_not_in_the_cache_of_an_offline_hub_names_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "config.json of org/name on the Hub: HF_HUB_OFFLINE is set and it is not in the cache"
    with pytest.raises(WeightsUnavailableError, match=f"^{message}$"):
        download_hub("org/name", "config.json", tmp_path)


@pytest.mark.parametrize(
    "record", ["null", "[]", '{"folder": [], "sha256": ""}', '{"folder": "../x", "sha256": ""}', "[" * 10**5, "{"]
)
def test_a_record_that_this_package_did_not_write_counts_as_none(record, tmp_path, monkeypatch):
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path))
    (tmp_path / f"{LUP}.json").write_text(record)
    assert zoo.read_record(LUP) is None
    assert zoo.verify(LUP) == [(LUP, "not pulled")]
