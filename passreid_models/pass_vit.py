"""The [PART]-token ViT of PASS as timm models: the class, its loading of weights, and the timm entrypoints.

A PASS network is timm's ``VisionTransformer`` with a class token, P register tokens (the part tokens) and position
embeddings on the patches alone. Tokens come out as ``[CLS, PART_1 .. PART_P, patches]``.

Shapes: B batch, P parts, T = 1 + P prefix tokens, N patches, D embedding width.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._hub import download_cached_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from passreid_models.architectures import ARCHITECTURES, IMAGENET
from passreid_models.checkpoints import zoo
from passreid_models.checkpoints.convert import Converted, convert_file, convert_state_dict, published_descriptor
from passreid_models.checkpoints.fields import check_config
from passreid_models.checkpoints.hub import check_cached, download_hub
from passreid_models.checkpoints.load import Origin, load_report, pretrained_filter_fn
from passreid_models.checkpoints.local_dir import CLAIMS, is_ours, read_config, stated_size
from passreid_models.checkpoints.read import CheckpointError
from passreid_models.layers import (
    ConvStem,
    MultiNeck,
    SingleNeck,
    fuse_tokens,
    fused_width,
    is_hooked,
    is_per_token,
    prefix_block,
    resample_positions,
)

__all__ = ["PassVisionTransformer"]

_logger = logging.getLogger(__name__)

POOLS = ("cat", "mean", "parts", "token", "")
NECKS = ("", "single", "multi")
TOKEN_STD = 0.02  # of CLS, a part token and a part position; a folded part token is the sum of two


class PassVisionTransformer(VisionTransformer):
    """Vision Transformer with a class token and ``num_parts`` part tokens (PASS, arXiv 2203.03931).

    ``model(x)`` of images ``[B, 3, H, W]`` is the descriptor ``[B, head_hidden_size]`` (or the logits when
    ``num_classes`` > 0). Positions of CLS and parts are folded into their tokens. ``model.origin`` (``Origin``) of a
    registered model is for ``save_pretrained`` and ``load_report``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = (256, 128),
        *,
        num_parts: int = 3,
        global_pool: str | None = None,
        neck: str = "",
        num_classes: int = 0,
        weight_init: str = "",
        **kwargs: Any,
    ) -> None:
        """
        Args:
            img_size: Height and width in pixels.
            num_parts: Number of part tokens, P; 0 gives a plain CLS-token ViT.
            global_pool: Fusion of the prefix tokens: ``cat``, ``mean``, ``parts``, ``token`` or ``''`` (all tokens,
                unpooled); ``cat`` by default, ``token`` without parts.
            neck: ``''``, ``single`` or ``multi``: the normalisation at the end of the published USL and UDA features;
                an unpooled model does not use it.
            num_classes: Width of the classifier; 0 for descriptors.
            weight_init: Mode of initialisation, as in timm.
            **kwargs: Arguments of ``timm.models.vision_transformer.VisionTransformer``.

        Raises:
            ValueError: If ``global_pool`` or ``neck`` has an unknown value or asks for parts that do not exist.
        """
        if "fc_norm" in kwargs:
            raise ValueError("fc_norm is the place of the neck here: use neck='', 'single' or 'multi'")
        if num_parts < 0:
            raise ValueError(f"num_parts must be 0 or more, got {num_parts}")
        global_pool = ("cat" if num_parts else "token") if global_pool is None else global_pool
        _check_pool(global_pool, num_parts)
        if neck not in NECKS:
            raise ValueError(f"neck must be one of {NECKS}, got {neck!r}")
        super().__init__(
            img_size=img_size,
            num_classes=0,
            global_pool="token",
            class_token=True,
            reg_tokens=num_parts,
            no_embed_class=True,
            weight_init="skip",
            **kwargs,
        )
        self.pos_embed: nn.Parameter  # made by the parent
        self.origin = Origin()
        self.num_parts = num_parts
        self.neck = neck
        self.fc_norm = self._build_neck(global_pool)
        self.reset_classifier(num_classes, global_pool)
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _dd(self) -> dict[str, Any]:
        parameter = next(self.parameters())
        return {"device": parameter.device, "dtype": parameter.dtype}

    def _build_neck(self, global_pool: str) -> nn.Module:
        if self.neck == "" or global_pool == "":
            return nn.Identity()
        if self.neck == "single":
            return SingleNeck(fused_width(global_pool, self.embed_dim, self.num_parts), global_pool, **self._dd())
        return MultiNeck(self.num_prefix_tokens, self.embed_dim, global_pool, **self._dd())

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise all weights; tokens as PASS does (a folded part token is the sum of two of std 0.02)."""
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=TOKEN_STD)
        if self.reg_token is not None:
            trunc_normal_(self.reg_token, std=TOKEN_STD * 2**0.5)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier and, optionally, the fusion.

        Raises:
            ValueError: If the new fusion is not that of a single neck.
        """
        if global_pool is not None:
            _check_pool(global_pool, self.num_parts)
            if isinstance(self.fc_norm, SingleNeck) and global_pool not in ("", self.fc_norm.fusion):
                raise ValueError(_of_other_fusion(self.fc_norm.fusion, global_pool))
            if isinstance(self.fc_norm, MultiNeck):
                self.fc_norm.fusion = global_pool
            if global_pool == "":
                self.fc_norm = nn.Identity()
            elif isinstance(self.fc_norm, nn.Identity):  # pooled again: the neck comes back, untrained
                self.fc_norm = self._build_neck(global_pool).train(self.training)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head_hidden_size = fused_width(self.global_pool, self.embed_dim, self.num_parts)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **self._dd()) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Set the input size as in timm; also resample positions if the patch count stays (timm < 1.0.31 did not)."""
        old, old_grid = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        grid = self.patch_embed.grid_size
        if self.pos_embed is old and grid != old_grid:
            resampled = resample_abs_pos_embed(old, list(grid), list(old_grid), num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(resampled, requires_grad=old.requires_grad)

    def pool(self, x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
        """Descriptor of output tokens ``[B, T + N, D]``; the prefix tokens for a multi neck, which does the fusion."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == "":
            return x
        tokens = x[:, : self.num_prefix_tokens]
        if self.neck == "multi":
            return tokens
        return fuse_tokens(tokens, pool_type)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Descriptors or logits of images; the last block computes the prefix tokens alone where no other is read."""
        if not torch.jit.is_scripting():  # noqa: SIM102  torchscript skips what is inside
            # fx: the nodes of all tokens, for extractors of features
            if attn_mask is None and not is_causal and not isinstance(x, torch.fx.Proxy):
                return self.forward_head(self.forward_tokens(x))
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Output tokens that ``forward_head`` reads: those of ``forward_features``, for less work.

        Returns:
            Prefix tokens ``[B, T, D]``; all tokens ``[B, T + N, D]`` if the model is unpooled, or its
            ``forward_features``, ``forward_head`` or ``pool`` is not that of this class.
        """
        methods, cls = ("forward_features", "forward_head", "pool"), PassVisionTransformer
        is_own = any(m in self.__dict__ or getattr(type(self), m) is not getattr(cls, m) for m in methods)
        if is_own or not self.global_pool:
            return self.forward_features(x)
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return self._prefix_outputs(tokens, self.num_prefix_tokens)

    def forward_parts(self, x: Tensor) -> dict[str, Tensor]:
        """Output tokens by name: ``cls`` ``[B, D]``, ``parts`` ``[B, P, D]``, ``patches`` ``[B, N, D]``."""
        tokens = self.forward_features(x)
        return {
            "cls": tokens[:, 0],
            "parts": tokens[:, 1 : 1 + self.num_parts],
            "patches": tokens[:, 1 + self.num_parts :],
        }

    def forward_views(self, x: Tensor, part_index: Tensor | None = None, pos_resampling: str = "antialiased") -> Tensor:
        """Prefix tokens of a batch of views of any size that is divisible by the patch size.

        A global view carries CLS and all parts, a local view CLS and the part token of the area it was cut from; local
        views of all areas go through in one call. Position embeddings are resampled to the views' grid.

        Args:
            x: Views ``[B, 3, H, W]``.
            part_index: Area of each local view, 0-based, int64 ``[B]``; None for global views.
            pos_resampling: See ``layers.resample_positions``.

        Returns:
            ``[B, 1 + P, D]`` for global views, ``[B, 2, D]`` (CLS, PART) for local ones.

        Raises:
            ValueError: If the views are not divisible by the patch size, ``part_index`` does not fit batch or model, or
                there is one and the model drops patches.
        """
        patch_h, patch_w = self.patch_embed.patch_size
        if x.shape[-2] % patch_h or x.shape[-1] % patch_w:
            raise ValueError(
                f"views of {x.shape[-2]}x{x.shape[-1]} pixels are not divisible by {patch_h}x{patch_w} patches"
            )
        if part_index is not None and not isinstance(self.patch_drop, nn.Identity):
            raise ValueError("patch_drop_rate drops patches beside CLS and all parts, which local views do not have")
        if part_index is not None and (self.reg_token is None or part_index.shape != (len(x),)):
            raise ValueError(
                f"part_index must hold one part per view: got shape {tuple(part_index.shape)} for {len(x)} views of a "
                f"model with {self.num_parts} parts"
            )
        patches = self.patch_embed.proj(x)  # [B, D, h, w]
        grid = (patches.shape[-2], patches.shape[-1])
        patches = self.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        patches = patches + resample_positions(self.pos_embed, self.patch_embed.grid_size, grid, pos_resampling)
        prefix = [self.cls_token.expand(len(x), -1, -1)]
        if self.reg_token is not None:
            parts = self.reg_token.expand(len(x), -1, -1)
            prefix.append(parts if part_index is None else self.reg_token[0, part_index].unsqueeze(1))
        tokens = torch.cat([*prefix, patches], dim=1)
        tokens = self.norm_pre(self.patch_drop(self.pos_drop(tokens)))
        return self._prefix_outputs(tokens, sum(p.shape[1] for p in prefix))

    def _prefix_outputs(self, tokens: Tensor, num_prefix: int) -> Tensor:
        """Output prefix tokens ``[B, num_prefix, D]`` of embedded tokens: all blocks and the final norm."""
        is_plain = type(self.blocks) is nn.Sequential and not is_hooked(self.blocks)
        if not is_plain and not self.grad_checkpointing:  # which calls the blocks one by one, in timm too
            return self.norm(self.blocks(tokens))[:, :num_prefix]
        steps: list[Any] = list(self.blocks)
        if steps and is_per_token(self.norm):
            steps[-1] = partial(prefix_block, steps[-1], num_prefix=num_prefix)
        if self.grad_checkpointing:
            tokens = checkpoint_seq(steps, tokens)
        else:
            for step in steps:
                tokens = step(tokens)
        return self.norm(tokens)[:, :num_prefix]


def _of_other_fusion(own: str, given: str) -> str:
    return f"the single neck is of the fusion {own!r}, and not of {given!r}: keep that fusion, or use neck=''"


def _check_pool(global_pool: str, num_parts: int) -> None:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be one of {POOLS}, got {global_pool!r}")
    if not num_parts and global_pool not in ("token", ""):
        raise ValueError(f"global_pool={global_pool!r} needs part tokens and num_parts is 0: use 'token' or ''")


def _cfg(architecture: str, entry: zoo.Weight | None = None) -> dict[str, Any]:
    """timm's pretrained cfg of an architecture, or of one of its weights."""
    arch = ARCHITECTURES[architecture]
    stem = "patch_embed.proj.conv.0" if arch.conv_stem else "patch_embed.proj"
    cfg: dict[str, Any] = dict(
        input_size=(3, *arch.img_size),
        fixed_input_size=True,
        crop_pct=1.0,
        crop_mode="squash",
        interpolation="bicubic",
        pool_size=None,
        num_classes=0,
        first_conv=stem,
        classifier="head",
        license="apache-2.0",
        paper_ids="arXiv:2203.03931",
        paper_name="PASS: Part-Aware Self-Supervised Pre-Training for Person Re-Identification",
    )
    if entry is not None:
        cfg.update(
            url=entry.url,
            file=str(entry.bundled_file) if entry.bundled_file else None,
            input_size=(3, *entry.input_size),
            **entry.statistics,
            license=entry.license,
            description=f"{entry.task}, {entry.data}",
        )
        if entry.url:  # weights of the authors
            cfg["origin_url"] = "https://github.com/CASIA-IVA-Lab/PASS-reID"
    return cfg


def _default_cfgs() -> dict[str, dict[str, Any]]:
    """One cfg for each weight; the default (``*``) is the first bundled one, never a published one."""
    cfgs = {}
    for architecture in ARCHITECTURES:
        entries = zoo.list_weights(architecture)
        for entry in entries:
            cfgs[entry.name + ("*" if entry.bundled_file else "")] = _cfg(architecture, entry)
        if not any(entry.bundled_file for entry in entries):
            cfgs[f"{architecture}.*"] = _cfg(architecture)  # last, or timm makes the first tag with weights the default
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


UNNAMED = "the given state dict"
FOLDERS = ("local-dir", "hf-hub")
UNCLAIMED = {**dict.fromkeys(CLAIMS), "license": "other"}
_NOT_OVERRIDES = ("cache_dir", "device", "dtype", "features_only", "num_classes", "pretrained_model_args")


def _create_pass_vit(
    variant: str, pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any
) -> PassVisionTransformer:
    """Build a registered model; the ``config.json`` of a folder or Hub repository is checked before it is believed."""
    if not isinstance(pretrained_cfg, dict) or pretrained_cfg.get("source") not in FOLDERS:
        return _build(variant, pretrained, pretrained_cfg, **kwargs)
    where = f"config.json of {pretrained_cfg.get('file') or pretrained_cfg.get('hf_hub_id')}"
    check_config({"architecture": variant, "pretrained_cfg": pretrained_cfg, "model_args": kwargs}, where)
    try:
        return _build(variant, pretrained, pretrained_cfg, **kwargs)
    except (CheckpointError, OSError):
        raise
    except Exception as e:  # of timm, by values of any kind
        kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
        raise ValueError(f"{where}: no model can be made from it ({kind}{' '.join(str(e).split())[:200]})") from None


def _names_weights(cfg: Mapping[str, Any]) -> bool:
    return any(cfg.get(k) for k in ("state_dict", "file", "hf_hub_id", "url"))


def _build(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pos_embed_resize: str = "auto",
    **kwargs: Any,
) -> PassVisionTransformer:
    """Build a registered model; find, check and convert its weights.

    The weights come from the overlay (``state_dict``, ``file``, ``hf_hub_id``, ``url``), the folder or Hub repository
    that the name points to, or ``zoo.resolve`` for a tag. Fusion and neck follow the tag unless given.
    """
    arch, overlay = ARCHITECTURES[variant], pretrained_cfg_overlay or {}
    is_loose = isinstance(pretrained_cfg, dict) and not (pretrained_cfg.get("source") or pretrained_cfg.get("tag"))
    if is_loose and _names_weights(pretrained_cfg):  # weights of the user's, as in an overlay
        overlay, pretrained_cfg = {**pretrained_cfg, **overlay}, None
    is_overlaid = _names_weights(overlay)
    if pretrained_cfg is None and pretrained and not is_overlaid:
        pretrained_cfg = overlay.get("tag")
    if isinstance(pretrained_cfg, str):
        zoo.get_weight(f"{variant}.{pretrained_cfg}")  # raises for an unknown tag
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    entry = zoo.find_weight(variant, cfg.tag or "")
    source, is_folder = cfg.source, cfg.source in FOLDERS
    saved = _saved_config(cfg, kwargs.get("cache_dir")) if pretrained and is_folder else {}
    if is_folder:  # timm throws the tensors of these layers away, or makes new ones of them
        cfg = replace(cfg, **{k: v for k, v in _cfg(variant).items() if k in ("classifier", "first_conv")})
    if overlay.get("state_dict"):  # not of the file of the default weights
        cfg = replace(cfg, file=overlay.get("file"), hf_hub_id=overlay.get("hf_hub_id"))
    converted = None
    if pretrained:
        cfg, converted = _read_weights(variant, cfg, pretrained_cfg, overlay, kwargs.get("cache_dir"))
    is_untagged = pretrained_cfg is None and is_overlaid
    if is_untagged:  # what the cfg has is of the default weights; a file that does not tell is taken for pre-trained
        mean, std = IMAGENET
        unstated = {**UNCLAIMED, "mean": mean, "std": std, "interpolation": "bicubic"}
        cfg = replace(cfg, **{k: v for k, v in unstated.items() if k not in overlay})
    if saved and not is_ours(saved):  # the weights may have been trained after the tag
        cfg = replace(cfg, **UNCLAIMED)
    file = cfg.file or cfg.hf_hub_id or UNNAMED
    if converted and is_folder:
        _check_dimensions(converted, {**vars(arch), **kwargs}, str(file))
        _check_positions(converted, saved, str(file))

    model_args: dict[str, Any] = dict(
        embed_dim=arch.embed_dim,
        depth=arch.depth,
        num_heads=arch.num_heads,
        num_parts=arch.num_parts,
        embed_layer=ConvStem if arch.conv_stem else PatchEmbed,
    )
    if entry is not None and kwargs.get("num_parts") != 0:
        model_args.update(global_pool=entry.fusion, neck=entry.model_neck)
    if converted and is_untagged and converted.architecture.num_parts == kwargs.get("num_parts", arch.num_parts):
        model_args.update(published_descriptor(converted))  # as far as the layout shows it
    pool, neck = (kwargs.get(name, model_args.get(name)) for name in ("global_pool", "neck"))
    is_unstated = (is_untagged or is_folder) and not neck and kwargs.get("neck") is None
    if converted and is_unstated and "fc_norm.bn.weight" in converted.backbone and not converted.run:
        what = ", which its config.json does not state:"
        if not is_folder:
            what = " and does not state of which fusion: name the folder with its config.json, or hf-hub:ORG/NAME, or"
        raise CheckpointError(f"{file}: it has a neck{what} give neck and global_pool (--neck and --fusion)")
    if converted and pool in POOLS[:-1] and neck == "single":
        own = converted.fusion if is_untagged else model_args.get("global_pool")
        if is_folder:  # of timm's save_for_hf it has no fusion
            own = saved.get("fusion") or saved.get("model_args", {}).get("global_pool")
        if own and own != pool:  # of the same width, perhaps: the tensors would fit
            raise CheckpointError(f"{file}: {_of_other_fusion(own, pool)}")
    try:
        model = build_model_with_cfg(
            PassVisionTransformer,
            variant,
            pretrained,
            pretrained_cfg=cfg,
            pretrained_filter_fn=partial(
                pretrained_filter_fn,
                resize=pos_embed_resize,
                keep=tuple(overlay),
                converted=converted,
                is_assumed=is_untagged,
            ),
            feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
            **dict(model_args, **kwargs),
        )
    except CheckpointError as e:
        raise CheckpointError(f"{file}: {e}") from None
    network = getattr(model, "model", model)  # features_only wraps the model
    for m in (model, network):  # each has its own cfg
        m.pretrained_cfg.pop("state_dict", None)  # needed for loading only
    if source:
        model.pretrained_cfg["source"] = source
    if not hasattr(network, "origin"):  # in a graph, of feature_cls="fx"
        return model
    if pretrained:
        report = load_report(model)
        report.source = str(file)
        unknown = converted and is_untagged and converted.task == "unsupervised" and not converted.fusion
        if unknown and kwargs.get("global_pool") is None:
            report.notes.append("fusion: the tensors do not show it, 'cat' assumed; the MSMT17 models have 'mean'")
    is_own_cfg = converted and not is_overlaid
    network.origin = replace(
        network.origin,
        model_args={k: v for k, v in kwargs.items() if k not in _NOT_OVERRIDES},
        file=os.path.abspath(file) if is_own_cfg else "",
    )
    return model


def _saved_config(cfg: Any, cache_dir: str | None) -> dict[str, Any]:
    """The ``config.json`` of a folder or a Hub repository, which timm has read, before anything is overridden."""
    if cfg.source == "hf-hub":
        file = check_cached(cfg.hf_hub_id, "config.json", cache_dir)
        return read_config((file or download_hub(cfg.hf_hub_id, "config.json", cache_dir)).parent)
    return read_config(Path(cfg.file))


def _check_dimensions(converted: Converted, declared: Mapping[str, Any], file: str) -> None:
    """Raise CheckpointError, before a model is made, if the weights are not as wide or deep as their config says."""
    held = {name: getattr(converted.architecture, name) for name in ("embed_dim", "depth", "num_parts")}
    if wrong := [f"{name} {declared[name]} and not {value}" for name, value in held.items() if declared[name] != value]:
        raise CheckpointError(f"{file}: the model is to have {', '.join(wrong)} as in the weights")


def _check_positions(converted: Converted, saved: Mapping[str, Any], file: str) -> None:
    """Raise CheckpointError if the positions are not those of the size that the folder's config.json states."""
    size, positions = stated_size(saved), converted.backbone.get("pos_embed")
    patch_size = to_2tuple(saved.get("model_args", {}).get("patch_size", 16))
    rows, columns = (s // p for s, p in zip(size, patch_size, strict=True))
    if positions is not None and positions.shape[1] != rows * columns:
        raise CheckpointError(
            f"{file}: it has {positions.shape[1]} patch positions, and its config.json states {size[0]}x{size[1]} "
            f"pixels, which have {rows * columns}: correct img_size of model_args and input_size there"
        )


def _read_weights(
    variant: str, cfg: Any, pretrained_cfg: Any, overlay: dict[str, Any], cache_dir: str | None
) -> tuple[Any, Converted | None]:
    """The cfg with the weights in its ``state_dict``, and the weights as ``Converted``; None if it names none.

    timm's own reader refuses the numpy scalars of the published files, does not compare hashes, and reads after the
    model is made, too late for neck and fusion. The ``state_dict`` of an overlay may already be a ``Converted``.
    """
    if cfg.state_dict:
        converted = cfg.state_dict
        if not isinstance(converted, Converted):
            converted = convert_state_dict(converted, file=cfg.file or cfg.hf_hub_id or UNNAMED)
        return replace(cfg, state_dict=converted.backbone), converted
    entry = zoo.find_weight(variant, cfg.tag or "")
    is_entry = entry is not None and cfg.url == entry.url and not (cfg.file or cfg.hf_hub_id)
    is_tag = isinstance(pretrained_cfg, str | None) or is_entry  # timm's cfg of a tag is like its name
    if cfg.source == "local-dir":
        file = Path(cfg.file) / "model.safetensors"
    elif cfg.source == "hf-hub":
        file = download_hub(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors", cache_dir)
    elif overlay.get("file") or (not is_tag and cfg.file):
        file = cfg.file
    elif is_tag and not (overlay.get("hf_hub_id") or overlay.get("url")):
        file = zoo.resolve(variant, cfg.tag or "")
        if pretrained_cfg is None:
            _announce_default(f"{variant}.{cfg.tag}")
    elif cfg.hf_hub_id:
        file = download_hub(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors", cache_dir)
    elif cfg.url:
        file = download_cached_file(cfg.url, cache_dir=cache_dir)
    else:
        return cfg, None
    converted = convert_file(file, size=tuple(cfg.input_size[1:]) if cfg.source in FOLDERS else None)
    return replace(cfg, source="", file=str(file), state_dict=converted.backbone), converted


@cache
def _announce_default(name: str) -> None:
    architecture, tag = name.split(".")
    tags = ", ".join(w.tag for w in zoo.list_weights(architecture) if w.tag != tag) or "none"
    _logger.warning(f"{architecture}: loading the bundled {name}, trained on synthetic persons; other tags: {tags}")


@register_model
def pass_vit_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> PassVisionTransformer:
    """PASS ViT-Ti/16 at 256x128, 192 wide: this package's own size, for tests and small devices."""
    return _create_pass_vit("pass_vit_tiny_patch16", pretrained, **kwargs)


@register_model
def pass_vit_small_patch16(pretrained: bool = False, **kwargs: Any) -> PassVisionTransformer:
    """PASS ViT-S/16 at 256x128, 384 wide (arXiv 2203.03931)."""
    return _create_pass_vit("pass_vit_small_patch16", pretrained, **kwargs)


@register_model
def pass_vit_base_patch16(pretrained: bool = False, **kwargs: Any) -> PassVisionTransformer:
    """PASS ViT-B/16 at 256x128, 768 wide (arXiv 2203.03931)."""
    return _create_pass_vit("pass_vit_base_patch16", pretrained, **kwargs)


@register_model
def pass_vit_small_ics_patch16(pretrained: bool = False, **kwargs: Any) -> PassVisionTransformer:
    """PASS ViT-S/16 with the conv stem of TransReID-SSL; no weights were published."""
    return _create_pass_vit("pass_vit_small_ics_patch16", pretrained, **kwargs)


@register_model
def pass_vit_base_ics_patch16(pretrained: bool = False, **kwargs: Any) -> PassVisionTransformer:
    """PASS ViT-B/16 with the conv stem of TransReID-SSL; no weights were published."""
    return _create_pass_vit("pass_vit_base_ics_patch16", pretrained, **kwargs)


@register_model
def transreid_vit_small_patch16(pretrained: bool = False, **kwargs: Any) -> PassVisionTransformer:
    """TransReID-SSL ViT-S/16, CLS token only (arXiv 2111.12084): the published baseline of PASS."""
    return _create_pass_vit("transreid_vit_small_patch16", pretrained, **kwargs)


@register_model
def transreid_vit_small_ics_patch16(pretrained: bool = False, **kwargs: Any) -> PassVisionTransformer:
    """TransReID-SSL ViT-S/16 with the conv stem, CLS token only (arXiv 2111.12084)."""
    return _create_pass_vit("transreid_vit_small_ics_patch16", pretrained, **kwargs)


@register_model
def transreid_vit_base_ics_patch16(pretrained: bool = False, **kwargs: Any) -> PassVisionTransformer:
    """TransReID-SSL ViT-B/16 with the conv stem, CLS token only (arXiv 2111.12084)."""
    return _create_pass_vit("transreid_vit_base_ics_patch16", pretrained, **kwargs)


@register_model
def test_pass_vit(pretrained: bool = False, **kwargs: Any) -> PassVisionTransformer:
    """A 64-wide PASS ViT of 3 blocks at 64x32, for tests."""
    return _create_pass_vit("test_pass_vit", pretrained, **kwargs)
