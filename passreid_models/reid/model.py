"""Backbone with neck and identity classifier, as in supervised fine-tuning and in the authors' files.

Shapes: B batch, T = 1 + P prefix tokens, D embedding width, C descriptor width, K identities of the training set.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn

from passreid_models.architectures import HALF
from passreid_models.checkpoints.convert import convert_file, convert_state_dict
from passreid_models.checkpoints.local_dir import model_of, read_config, stated_size
from passreid_models.checkpoints.names import NamedModel
from passreid_models.checkpoints.read import CheckpointError, read_checkpoint
from passreid_models.layers import MultiNeck, SingleNeck, fuse_tokens
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.training.warm_start import find_weights, load_start

__all__ = ["ReIDOutput", "ReIDModel"]


class ReIDOutput(NamedTuple):
    """Descriptors and logits of a batch."""

    before: Tensor  # [B, C], fused tokens before the neck: triplet loss and test, after L2 normalisation
    after: Tensor  # [B, C], after the neck: input of the classifier
    logits: Tensor  # [B, K]


class ReIDModel(nn.Module):
    """PASS with a BatchNorm neck and a classifier without bias (arXiv 2203.03931, section 3.3; TransReID's protocol).

    The neck is that of the backbone (``fc_norm``): ``single``, one BatchNorm of the fused vector, or ``multi``, one of
    each token before the fusion. Its bias is not trained.
    """

    def __init__(self, backbone: PassVisionTransformer, num_ids: int) -> None:
        """
        Args:
            backbone: Made with ``neck="single"`` or ``"multi"`` and a fusion (``global_pool``).
            num_ids: Number of identities of the training set, K.

        Raises:
            ValueError: If the backbone has no neck, or there are fewer than 2 identities.
        """
        super().__init__()
        if not isinstance(backbone.fc_norm, SingleNeck | MultiNeck):
            raise ValueError("a ReIDModel needs a backbone with neck='single' or 'multi'")
        if num_ids < 2:
            raise ValueError(f"num_ids must be 2 or more, got {num_ids}")
        self.backbone = backbone
        self.num_ids = num_ids
        self.classifier = nn.Linear(backbone.head_hidden_size, num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    @property
    def fusion(self) -> str:
        """Fusion of the tokens, as timm's ``global_pool``."""
        return self.backbone.global_pool

    @property
    def neck(self) -> str:
        """Kind of the neck, ``single`` or ``multi``."""
        return self.backbone.neck

    def forward(self, x: Tensor) -> ReIDOutput:
        """Descriptors and logits of images.

        Args:
            x: Images ``[B, 3, H, W]``, normalised by mean and standard deviation 0.5.
        """
        tokens = self.backbone.forward_views(x)  # [B, T, D]: those of forward_features, without the patches
        before = fuse_tokens(tokens, self.fusion)
        bn: Any = self.backbone.fc_norm.bn
        if self.neck == "multi":
            after = fuse_tokens(bn(tokens.flatten(1)).reshape(tokens.shape), self.fusion)
        else:
            after = bn(before)
        return ReIDOutput(before, after, self.classifier(after))

    def descriptor_model(self) -> tuple[PassVisionTransformer, dict[str, Tensor]]:
        """Model of the descriptor, and the tensors of neck and classifier, for ``save_pretrained``.

        The descriptor is the fused vector *before* the neck, as published, so this model has no neck.
        """
        state = self.backbone.state_dict()
        extras = {k: v for k, v in state.items() if k.startswith("fc_norm.")}
        extras["classifier.weight"] = self.classifier.weight.detach()
        return without_drop_path(self.backbone, neck=""), extras

    @classmethod
    def load(cls, source: str | Path, name: str | None = None, num_heads: int | None = None) -> "ReIDModel":
        """Load a fine-tuned model with its neck and classifier, in evaluation mode.

        Args:
            source: A published supervised file (``transformer_120.pth``), or a folder of ``passreid finetune`` or
                ``passreid convert``.
            name: Registered architecture of a file; by default the one that the tensors fit.
            num_heads: Attention heads of a file, if no registered architecture fits it.

        Raises:
            CheckpointError: If neck or classifier is missing, or tensors do not fit.
        """
        source = Path(source)
        args: dict[str, Any] = {}
        if source.is_dir():
            size = stated_size(read_config(source))
            files = [source / "model.safetensors", source / "extras.safetensors"]
            parts = [read_checkpoint(file) for file in files if file == files[0] or file.is_file()]
            converted = convert_state_dict({k: v for part in parts for k, v in part.items()}, file=source, size=size)
            name = f"local-dir:{source}"
        else:
            converted = convert_file(source)
            name, args = model_of(converted.architecture, name, num_heads, source)
            args |= {"img_size": converted.architecture.img_size, "global_pool": converted.fusion or "cat"}
        necks, architecture = {**converted.backbone, **converted.neck}, converted.architecture
        if "fc_norm.bn.weight" not in necks or not converted.classifier:
            raise CheckpointError(f"{source} holds no neck and classifier: it is no supervised re-ID model")
        is_multi = len(necks["fc_norm.bn.weight"]) == (1 + architecture.num_parts) * architecture.embed_dim
        args |= {"neck": "multi" if is_multi else "single", "num_classes": 0}
        cfg = {"state_dict": converted, "file": str(source)}
        backbone = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, **args)
        classifier = converted.classifier["classifier.weight"]
        if classifier.shape[1] != backbone.head_hidden_size:
            widths = f"the classifier is {classifier.shape[1]} wide, and the descriptor {backbone.head_hidden_size}"
            raise CheckpointError(f"{source}: {widths}")
        model = cls(backbone, len(classifier))
        model.classifier.load_state_dict({"weight": classifier})
        return model.eval()


def make_backbone(
    config: Any, interpolation: str, state: Mapping[str, Tensor] | None = None, weights: NamedModel | None = None
) -> PassVisionTransformer:
    """Make a backbone with a new neck, to be fine-tuned.

    Args:
        config: Configuration with ``init`` (as for ``find_weights``, or ``random``), ``model``, ``size``, ``fusion``,
            ``neck`` and ``drop_path``.
        interpolation: Interpolation of test images, for the pretrained cfg.
        state: Weights that will be loaded later, instead of ``init``; they show the number of parts.
        weights: Weights of ``init``, if they are already found.

    Raises:
        ValueError: If ``init`` names no weights, or those of another architecture.
        CheckpointError: If the weights do not fit.
    """
    size: dict[str, Any] = {"img_size": config.size}
    start: Any = None
    if state is not None:
        parts = next((v for k, v in state.items() if k.endswith("reg_token")), None)
        if parts is not None and parts.ndim != 3:
            raise CheckpointError(f"reg_token of the run to resume has {parts.ndim} dimensions, and 3 are expected")
        size["num_parts"] = 0 if parts is None else parts.shape[1]
    elif config.init != "random":
        weights = weights or find_weights(config.init, config.model)
        if weights.run:
            size["num_parts"] = weights.converted.architecture.num_parts
        start = weights.create(config.model, num_classes=0, neck="", **size)
        size["num_parts"] = start.num_parts
    backbone = timm.create_model(
        config.model, global_pool=config.fusion, neck=config.neck, drop_path_rate=config.drop_path, **size
    )
    if start is not None:
        load_start(backbone, start, config.init)
    mean, std = HALF  # of every fine-tuned model
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": mean, "std": std, "interpolation": interpolation}
    return backbone


def without_drop_path(backbone: PassVisionTransformer, **overrides: Any) -> PassVisionTransformer:
    """Copy of a backbone for inference: without drop path, in evaluation mode, on the CPU.

    Args:
        backbone: Backbone in training.
        **overrides: Arguments that differ, such as ``neck=""``.
    """
    args = {**backbone.origin.model_args, **overrides, "drop_path_rate": 0.0}
    model = timm.create_model(backbone.pretrained_cfg["architecture"], **args)
    keys = model.state_dict().keys()
    model.load_state_dict({k: v for k, v in backbone.state_dict().items() if k in keys})
    model.pretrained_cfg = {**backbone.pretrained_cfg}
    return model.eval()
