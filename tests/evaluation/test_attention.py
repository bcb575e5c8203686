"""Attention maps: the softmax inside the model itself, rollout by hand, and the picture of both."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import Attention
from torch import nn

from passreid_models.embed import Embedder
from passreid_models.evaluation.attention import AttentionMaps, _sheet, attention_maps, draw_parts
from passreid_models.synthetic import draw
from tests.reid_data import make_model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 3, 64, 32, generator=torch.Generator().manual_seed(0))


def weights_inside(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Attention of each block as timm's unfused path hands it to its dropout, [B, heads, T + N, T + N]."""
    model, recorded = deepcopy(model), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: recorded.append(inputs[0]))
    with torch.inference_mode():
        model.forward_features(x)
    return recorded


@pytest.mark.parametrize("options", [{}, {"num_parts": 0}, {"num_parts": 5, "qk_norm": True}, {"neck": "multi"}])
def test_maps_are_the_attention_inside_the_model(x, options):
    model = make_model(**options)
    inside = weights_inside(model, x)
    maps = attention_maps(Embedder(model, "cpu", batch_size=2), x)
    num_tokens = model.num_prefix_tokens
    last = inside[-1][:, :, :num_tokens, num_tokens:].reshape(3, 2, num_tokens, 4, 2)
    assert torch.allclose(maps.last, last, atol=1e-6)
    expected = torch.eye(num_tokens + 8).repeat(3, 1, 1)
    for weights in inside:
        for b in range(3):
            expected[b] = (0.5 * weights[b].mean(0) + 0.5 * torch.eye(num_tokens + 8)) @ expected[b]
    assert torch.allclose(expected.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(maps.rollout.flatten(2), expected[:, :num_tokens, num_tokens:], atol=1e-6)
    with torch.inference_mode():
        tokens = model.forward_features(x)[:, :num_tokens]
    assert torch.allclose(maps.tokens, F.normalize(tokens, dim=-1), atol=1e-6)


class Adapted(nn.Linear):
    """A qkv with an adapter of rank 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x[..., :1] * torch.linspace(-1, 1, self.out_features)


def test_maps_are_those_of_a_qkv_that_was_replaced(x):
    model = make_model()
    plain = attention_maps(Embedder(model, "cpu"), x)
    for block in model.blocks:
        block.attn.qkv.__class__ = Adapted
    last = weights_inside(model, x)[-1][:, :, :4, 4:].reshape(3, 2, 4, 4, 2)
    adapted = attention_maps(Embedder(model, "cpu"), x).last
    assert torch.allclose(adapted, last, atol=1e-6)
    assert not torch.allclose(adapted, plain.last, atol=1e-3)


def test_patches_have_the_place_of_their_pixels(x):
    """A value that depends on one patch changes there alone: with weights of zero but for a key of the pixels."""
    model = make_model()
    with torch.no_grad():
        model.pos_embed.zero_()
        for block in model.blocks:
            block.ls1, block.ls2 = nn.Identity(), nn.Identity()
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    flat = torch.zeros(1, 3, 64, 32)
    spot = flat.clone()
    spot[:, :, 48:64, 0:16] = 3.0  # row 3, column 0 of 4 x 2
    a, b = attention_maps(Embedder(model, "cpu"), torch.cat([flat, spot])).last[:, 0, 1]
    ratio = b / a
    others = torch.ones(4, 2, dtype=torch.bool)
    others[3, 0] = False
    assert torch.allclose(ratio[others], ratio[0, 0], atol=1e-5)
    assert (ratio[3, 0] - ratio[0, 0]).abs() > 1e-4


def test_the_model_is_left_as_it_is(x):
    model = make_model().train()
    state, before = deepcopy(model.state_dict()), model.eval()(x)
    model.train()
    attention_maps(model, x)
    assert model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    embed = Embedder(model.eval(), "cpu")
    attention_maps(embed, x)
    assert torch.equal(embed.model(x), before)
    assert torch.equal(model(x), before)


def test_images_are_preprocessed_as_for_descriptors(tmp_path):
    embed = Embedder(make_model(), "cpu")
    image = draw(0, 1, 0, 0, (128, 64))
    image.save(tmp_path / "a.png")
    from_file, from_image = attention_maps(embed, tmp_path / "a.png"), attention_maps(embed, [image])
    by_hand = attention_maps(embed, embed.transform(image)[None])
    for maps in (from_file, from_image):
        assert all(torch.equal(a, b) for a, b in zip(maps, by_hand, strict=True))


def test_a_model_with_other_blocks_is_refused(x):
    class Other(Attention):
        """An attention of whose inside nothing is known."""

    for name, layer in (("blocks.0.attn", Other(64, 2)), ("blocks.1", nn.Identity())):
        model = make_model()
        model.set_submodule(name, layer)
        with pytest.raises(ValueError, match="Block with Attention"):
            attention_maps(model, x)


def test_attention_that_is_not_finite_is_refused(x):
    with pytest.raises(ValueError, match="the attention is not finite"):
        attention_maps(make_model(), x * torch.nan)


def test_the_picture_shows_each_map_in_its_place(tmp_path):
    """One hot patch a map: token t of image b at patch 2b + t in the last block, and two further by rollout."""
    last, rollout = torch.full((2, 2, 2, 4, 2), 0.01), torch.full((2, 2, 4, 2), 0.02)
    for b in range(2):
        for t in range(2):
            last[b, :, t].view(2, -1)[:, 2 * b + t] = 0.5
            rollout[b, t].view(-1)[2 * b + t + 2] = 0.7
    tokens = F.normalize(torch.tensor([[[1.0, 0], [0, 1]], [[1, 1], [0, 1]]]), dim=-1)
    sheet = _sheet([Image.new("RGB", (32, 64), "gray")] * 2, ["a", "b"], AttentionMaps(last, rollout, tokens))
    pixels = np.asarray(sheet).astype(int)

    def hottest(x: int, y: int) -> int:
        patches = pixels[y : y + 160, x : x + 80].reshape(4, 40, 2, 40, 3)[:, 20, :, 20].reshape(8, 3)
        return int(patches.sum(1).argmax())

    starts = {"last": 92, "rollout": 92 + 2 * 84 + 8}
    for b, y in enumerate((28, 28 + 178)):
        assert [hottest(starts["last"] + 84 * t, y) for t in range(2)] == [2 * b, 2 * b + 1]
        assert [hottest(starts["rollout"] + 84 * t, y) for t in range(2)] == [2 * b + 2, 2 * b + 3]
    cosines = [
        pixels[206 + 30 * i + 2, 92 + 4 * 84 + 16 + 30 * (j + 1) + 2] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert (cosines[0] == cosines[1]).all()  # 0.71 both
    assert cosines[2].tolist() == [255, 255, 255]
    assert cosines[3].tolist() == [30, 90, 160]


def test_the_picture_is_written_and_mistakes_write_none(tmp_path):
    for i in range(2):
        draw(0, i, 0, 0, (64, 32)).save(tmp_path / f"a name in two\nlines, \udcff, wider than a picture {i}.png")
    files: list[str | Path] = [*sorted(tmp_path.glob("*.png"))]
    draw_parts(make_model(), files, tmp_path / "out" / "parts.jpg", device="cpu")
    with Image.open(tmp_path / "out" / "parts.jpg") as picture:
        assert picture.format == "JPEG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    for images, name, message in (
        (files, "parts", r"parts: name a picture file such as parts.png"),
        (files, "parts.psd", "name a picture file"),
        ([], "parts.png", "1 to 64 images, not 0"),
        (files * 33, "parts.png", "1 to 64 images, not 66"),
        ([*files, tmp_path / "none.png"], "parts.png", "none.png: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_parts(make_model(), images, tmp_path / name, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", *(p.name for p in files)])
