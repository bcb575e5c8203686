"""Exports give the Embedder's descriptors to a host that knows no more than the metadata, in batches of any size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from passreid_models import Embedder, SyntheticPersons, cli, export, export_model, save_pretrained
from passreid_models.architectures import ARCHITECTURES
from passreid_models.export import FORMATS, Parity
from tests.checkpoints.test_local_dir import create

pytestmark = [
    pytest.mark.usefixtures("no_network"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STATISTICS = dict(mean=(0.5, 0.4, 0.3), std=(0.3, 0.25, 0.2), interpolation="bilinear")
POOLS = ("cat", "mean", "parts", "token")


def distinct(name: str = "test_pass_vit", **kwargs: Any) -> nn.Module:
    """A model of random weights, neck and running statistics included, whose descriptors of persons differ."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for key, tensor in model.state_dict().items():
        if "running_" in key or key.startswith("fc_norm.bn.weight"):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif key.startswith("patch_embed.proj") and tensor.ndim > 1:
            tensor.mul_(5)
    model.pretrained_cfg.update(STATISTICS)
    return model.eval()


def small(neck: str = "", **kwargs: Any) -> nn.Module:
    return distinct(**{"depth": 1, "neck": neck, **kwargs})


@pytest.fixture(scope="module")
def persons() -> list[Image.Image]:
    data = SyntheticPersons(5, 1, 1, seed=4, size=(120, 56))
    return [data[i][0] for i in range(len(data))]


def metadata_of(file: Path) -> dict[str, Any]:
    return json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))


def host_images(images: list[Image.Image], metadata: dict[str, Any]) -> np.ndarray:
    """What a host without this package makes of images, by the metadata."""
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[metadata["interpolation"]]
    shape = metadata["input_shape"]
    height, width = shape[1:3] if metadata["input"] == "uint8" else shape[2:]
    pixels = np.stack([np.asarray(image.resize((width, height), resample)) for image in images])
    if metadata["input"] == "uint8":
        return pixels
    x = (pixels / 255 - np.array(metadata["mean"])) / np.array(metadata["std"])
    return x.transpose(0, 3, 1, 2).astype(metadata["input_dtype"])


def load(file: Path) -> Callable[[np.ndarray], Tensor]:
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x})[0])
    module = torch.jit.load(str(file)) if file.suffix == ".pt" else torch.export.load(file).module()
    return lambda x: module(torch.from_numpy(x)).detach()


def assert_host_gets_the_descriptors(file: Path, embed: Embedder, images: list[Image.Image], atol: float) -> None:
    run, expected, x = load(file), embed(images), host_images(images, metadata_of(file))
    assert expected.std(dim=0).max() > 3e-3
    for batch in (1, 3, 5):
        assert run(x[:batch]).dtype == torch.float32
        torch.testing.assert_close(run(x[:batch]), expected[:batch], rtol=0, atol=atol)


needs_onnx = pytest.mark.skipif(torch.__version__ < "2.8", reason="ONNX needs torch 2.8")
CASES = {
    "onnx": ("onnx", "normalized", False, dict(neck="single")),
    "onnx, ImageNet's statistics": ("onnx", "imagenet", False, dict(neck="multi", img_size=(96, 32))),
    "onnx, bytes, float16": ("onnx", "uint8", True, {}),
    "pt2, bytes": ("pt2", "uint8", False, dict(neck="multi")),
    "torchscript": ("torchscript", "normalized", False, dict(neck="multi")),
    "torchscript, ImageNet's statistics, float16": ("torchscript", "imagenet", True, dict(global_pool="parts")),
    "torchscript, bytes": ("torchscript", "uint8", False, dict(num_parts=0)),
    "torchscript, a classifier": ("torchscript", "normalized", False, dict(num_classes=3)),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=needs_onnx if c.startswith("onnx") else ()) for c in CASES])
def test_a_host_gets_the_descriptors_of_the_embedder_in_batches_of_any_size(tmp_path, persons, case):
    format, input, half, kwargs = CASES[case]
    model, file = small(**kwargs), tmp_path / f"model{FORMATS[format]}"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parity = export_model(model, file, input=input, half=half)
    assert_host_gets_the_descriptors(file, Embedder(model, "cpu"), persons, 5e-3 if half else 1e-5)
    assert parity.min_cosine > (0.9999 if half else 0.999999)
    assert 0 <= parity.mean_difference <= parity.max_difference < (5e-3 if half else 1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, f"{file.name}.json"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("neck", ["", "single", "multi"])
@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_and_neck_can_be_exported(tmp_path, persons, pool, neck):
    model = small(neck, global_pool=pool)
    export_model(model, tmp_path / "model.pt")
    assert_host_gets_the_descriptors(tmp_path / "model.pt", Embedder(model, "cpu"), persons, 1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_exported(tmp_path, persons, name):
    model = distinct(name, depth=1, img_size=(384, 128))
    export_model(model, tmp_path / "model.pt", input="uint8")
    assert_host_gets_the_descriptors(tmp_path / "model.pt", Embedder(model, "cpu"), persons, 1e-5)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [*((name, (256, 128)) for name in ARCHITECTURES), ("pass_vit_small_patch16", (384, 128))]
)
def test_onnx_of_every_architecture_holds_the_limit(tmp_path, name, size):
    torch.manual_seed(0)
    parity = export_model(timm.create_model(name, img_size=size), tmp_path / "model.onnx", input="imagenet")
    print(f"{name} {size}: {parity}")
    assert parity.max_difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("format", [pytest.param("onnx", marks=needs_onnx), "pt2"])
@pytest.mark.parametrize("neck", ["", "single", "multi"])
@pytest.mark.parametrize("pool", POOLS)
def test_onnx_and_pt2_of_every_pool_and_neck_hold_the_limit(tmp_path, persons, pool, neck, format):
    model, file = small(neck, global_pool=pool), tmp_path / f"model{FORMATS[format]}"
    export_model(model, file)
    assert_host_gets_the_descriptors(file, Embedder(model, "cpu"), persons, 1e-5)


@needs_onnx
def test_an_onnx_file_stands_alone_and_tells_what_the_host_has_to_do(tmp_path):
    model = small()
    save_pretrained(model, tmp_path / "model")
    file = tmp_path / "out" / "model.onnx"
    export_model(str(tmp_path / "model"), file, input="imagenet")
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.onnx", "model.onnx.json"]
    network, metadata = onnx.load(file), metadata_of(file)
    onnx.checker.check_model(network)
    assert all(not tensor.external_data for tensor in network.graph.initializer)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (images,), (descriptors,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape, images.type) == ("images", ["batch", 3, 64, 32], "tensor(float)")
    assert (descriptors.name, descriptors.shape, descriptors.type) == ("descriptors", ["batch", 128], "tensor(float)")
    props = session.get_modelmeta().custom_metadata_map
    for name, value in metadata.items():
        if name not in ("format", "sha256", "parity"):
            assert props[name] == (value if isinstance(value, str) else json.dumps(value))
    assert metadata["sha256"] == export.sha256(file)
    assert metadata["weights_sha256"] == Embedder(model, "cpu").fingerprint["weights"]
    assert metadata["parity"].keys() == {"max_difference", "mean_difference", "min_cosine"}
    expected = {
        "model": "test_pass_vit",
        "license": "other",
        "mean": [0.485, 0.456, 0.406],
        "interpolation": "bilinear",
        "fusion": "cat",
        "neck": "",
        "l2_normalize": True,
        "precision": "float32",
        "input_shape": ["batch", 3, 64, 32],
        "output_shape": ["batch", 128],
    }
    assert {name: metadata[name] for name in expected} == expected


def test_pt2_and_torchscript_carry_the_metadata_too(tmp_path):
    model = small()
    for format in ("pt2", "torchscript"):
        file = tmp_path / f"model{FORMATS[format]}"
        export_model(model, file)
        extra = {"passreid.json": ""}
        torch.export.load(file, extra_files=extra) if format == "pt2" else torch.jit.load(file, _extra_files=extra)
        content, beside = json.loads(extra["passreid.json"]), metadata_of(file)
        assert {name: beside[name] for name in content} == content
        assert beside["format"] == format


def test_tag_and_licence_are_those_of_the_weights_or_none(tmp_path):
    export_model("pass_vit_tiny_patch16.synth", tmp_path / "bundled.pt")
    export_model(timm.create_model("pass_vit_tiny_patch16"), tmp_path / "random.pt")
    bundled, random = metadata_of(tmp_path / "bundled.pt"), metadata_of(tmp_path / "random.pt")
    assert (bundled["model"], bundled["license"]) == ("pass_vit_tiny_patch16.synth", "apache-2.0")
    assert (random["model"], random["license"]) == ("pass_vit_tiny_patch16", "other")
    assert bundled["weights_sha256"] != random["weights_sha256"]
    trained = timm.create_model("pass_vit_tiny_patch16.synth", pretrained=True)
    trained.norm.bias.data += 1e-3
    export_model(trained, tmp_path / "trained.pt")
    assert [metadata_of(tmp_path / "trained.pt")[k] for k in ("model", "license")] == ["pass_vit_tiny_patch16", "other"]


@pytest.mark.parametrize(
    ("neck", "l2", "is_unit"), [("", None, 1), ("", False, 0), ("multi", None, 0), ("multi", True, 1)]
)
def test_normalisation_follows_the_weights_unless_it_is_given(tmp_path, persons, neck, l2, is_unit):
    model, file = small(neck), tmp_path / "model.pt"
    export_model(model, file, l2=l2)
    descriptors = load(file)(host_images(persons, metadata_of(file)))
    is_one = torch.allclose(descriptors.norm(dim=1), torch.ones(len(persons)), atol=1e-5)
    assert is_one == metadata_of(file)["l2_normalize"] == is_unit
    torch.testing.assert_close(F.normalize(descriptors), F.normalize(Embedder(model, "cpu")(persons)))


def test_an_embedder_brings_its_fusion(tmp_path):
    export_model(Embedder(small(), "cpu", fusion="token"), tmp_path / "model.pt")
    assert metadata_of(tmp_path / "model.pt")["output_shape"] == ["batch", 64]
    with pytest.raises(ValueError, match="without flip"):
        export_model(Embedder(small(), "cpu", flip=True), tmp_path / "model.pt")


@pytest.mark.parametrize("half", [False, True])
def test_an_export_that_differs_is_refused_and_an_older_file_stays(tmp_path, monkeypatch, half):
    file, load = tmp_path / "model.pt", export.LOADERS["torchscript"]
    file.write_bytes(b"older")

    def wrong(path: Path, error: float) -> Callable[[Tensor], Tensor]:
        run = load(path)
        return lambda x: run(x) + error

    for error in (torch.nan, 0.1 if half else 2e-4):
        monkeypatch.setitem(export.LOADERS, "torchscript", lambda path, error=error: wrong(path, error))
        with pytest.raises(ValueError, match="nothing is written: the export differs by more than a"):
            export_model(small(), file, half=half)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]


def test_differences_are_those_of_all_rows_of_all_batches():
    images, expected = torch.zeros(7, 1), 4 * torch.eye(7)
    offset = torch.zeros(7, 7)
    offset[6, 6] = 2e-4  # seen in the batch of 7 alone
    parity = export._compare(lambda x: (expected + offset)[: len(x)], images, expected, half=False)
    assert parity == Parity(pytest.approx(5e-5, rel=1e-2), pytest.approx(5e-5 / 70, rel=1e-2), pytest.approx(1))
    assert "difference 5.0e-05 at most, 7.1e-07 on average; cosine 1.0000000" in str(parity)


BAD = {
    "an unknown suffix": (
        dict(path="model.bin"),
        r"give a format \(onnx, pt2, torchscript, roboflow-reid\) or a suffix \(\.onnx, \.pt2, \.pt\)",
    ),
    "an unknown format": (dict(path="model.onnx", format="tflite"), "give a format"),
    "another suffix": (dict(path="model.onnx", format="pt2"), r"a file of pt2 ends in \.pt2"),
    "an unknown input": (dict(path="model.pt", input="bgr"), "input must be one of normalized, imagenet, uint8"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_refused(tmp_path, case):
    arguments, message = BAD[case]
    path = tmp_path / arguments.pop("path") if "path" in arguments else tmp_path
    with pytest.raises(ValueError, match=message):
        export_model(small(), path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_models_that_give_no_descriptors_or_no_colours_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unpooled"):
        export_model(small(global_pool=""), tmp_path / "model.pt")
    gray = create(depth=1, in_chans=1)
    with pytest.raises(ValueError, match="images have 1 channels here"):
        export_model(gray, tmp_path / "model.pt", input="uint8")
    export_model(gray, tmp_path / "model.pt")
    assert metadata_of(tmp_path / "model.pt")["input_shape"] == ["batch", 1, 64, 32]


def test_a_model_that_crops_its_images_is_refused(tmp_path):
    for crop in (dict(crop_mode="center"), dict(crop_pct=0.875)):
        model = small()
        model.pretrained_cfg.update(crop)
        with pytest.raises(ValueError, match="hosts resize images to the whole, and this model crops them"):
            export_model(model, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_an_embedder_has_rounded_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has rounded its weights to torch\.bfloat16: make it in float32"):
        export_model(Embedder(small(), "cpu", torch.bfloat16), tmp_path / "model.pt")


@pytest.mark.parametrize("folder", ["model.pt", "model.pt.json"])
def test_a_folder_in_the_place_of_a_file_is_named_and_nothing_is_written(tmp_path, folder):
    (tmp_path / folder).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{folder} is a folder: name a file"):
        export_model("no_such_model", tmp_path / "model.pt")
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_missing_libraries_are_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name.startswith("onnxr") else name)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    needed = r'ONNX needs onnxruntime, torch 2\.8 or newer: pip install "\.\[export\]"'
    with pytest.raises(ValueError, match=needed):
        export_model("no_such_model", tmp_path / "model.onnx")
    export_model(small(), tmp_path / "model.pt")


def test_the_command_exports_at_another_size_and_prints_the_parity(tmp_path, capsys):
    save_pretrained(small(), tmp_path / "model")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "model.pt"), "--size", "96x32", "--fusion", "mean"]
    assert cli.main([*words, "--no-l2", "--input", "uint8"]) == 0
    assert "parity with PyTorch, batches of 1, 2 and 7: difference " in capsys.readouterr().out
    metadata = metadata_of(tmp_path / "model.pt")
    assert (metadata["input_shape"], metadata["output_shape"]) == (["batch", 96, 32, 3], ["batch", 64])
    assert metadata["l2_normalize"] is False
    assert cli.main(["export", "no_such_model", str(tmp_path / "model.xyz")]) == 2  # the output is checked first
    assert "give a format" in capsys.readouterr().err


def test_the_choices_of_the_command_are_those_of_the_function():
    commands = next(action for action in cli._parser()._actions if action.choices).choices
    choices = {action.dest: action.choices for action in commands["export"]._actions}
    assert (tuple(choices["format"]), tuple(choices["input"])) == (tuple(FORMATS), export.INPUTS)


# ---- roboflow-reid


def test_the_folder_of_roboflow_holds_the_model_and_its_preprocessing(tmp_path):
    model = create("test_pass_vit")
    model.pretrained_cfg.update(STATISTICS)
    export_model(model, tmp_path / "reid", "roboflow-reid")
    config = json.loads((tmp_path / "reid" / "reid_config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "timm:test_pass_vit"
    assert config["preprocessing"] == {
        "input_size": [64, 32],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.3, 0.25, 0.2],
        "interpolation": "bilinear",
        "to_rgb": True,
        "resize_mode": "stretch",
    }
    assert config["passreid"]["parity"]["max_difference"] < 1e-5
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_model(model, tmp_path / "reid", "roboflow-reid")


def test_a_tag_whose_name_gives_fusion_neck_and_size_is_named(tmp_path):
    model = timm.create_model("pass_vit_small_patch16.lup_usl_msmt17").eval()
    assert (model.global_pool, model.neck) == ("mean", "single")
    export_model(model, tmp_path / "reid", "roboflow-reid")
    config = json.loads((tmp_path / "reid" / "reid_config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "timm:pass_vit_small_patch16.lup_usl_msmt17"


ROBOFLOW_REFUSES = {
    "fusion": (dict(global_pool="mean"), {}, "no name of test_pass_vit gives this one: fusion mean"),
    "depth": (dict(depth=1), {}, "64x32 pixels, 1 blocks"),
    "heads": (dict(num_heads=1), {}, "makes models by name alone"),
    "size": (dict(img_size=(96, 32)), {}, "96x32 pixels"),
    "no normalisation": (dict(neck="multi"), {}, "compares by cosine"),
    "gray": (dict(in_chans=1), {}, "this model has 1 channels"),
    "half": ({}, dict(half=True), "without half"),
    "input": ({}, dict(input="uint8"), "normalises images itself"),
}


@pytest.mark.parametrize("case", ROBOFLOW_REFUSES)
def test_what_the_config_of_roboflow_cannot_say_is_refused(tmp_path, case):
    model_args, arguments, message = ROBOFLOW_REFUSES[case]
    with pytest.raises(ValueError, match=message):
        export_model(create("test_pass_vit", **model_args), tmp_path / "reid", "roboflow-reid", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_interpolation_that_roboflow_lacks_is_refused(tmp_path):
    model = create("test_pass_vit")
    model.pretrained_cfg["interpolation"] = "lanczos"
    with pytest.raises(ValueError, match="nearest interpolation alone; this model has 3 channels and lanczos"):
        export_model(model, tmp_path / "reid", "roboflow-reid")
