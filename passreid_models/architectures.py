"""The registered architectures, and the mean and standard deviation that images are normalised with."""

from dataclasses import dataclass

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {"imagenet": IMAGENET, "0.5": HALF}

DEFAULT_MODEL = "pass_vit_small_patch16"


@dataclass(frozen=True)
class Architecture:
    """Dimensions of a registered model."""

    embed_dim: int
    depth: int
    num_heads: int
    num_parts: int = 3
    conv_stem: bool = False
    img_size: tuple[int, int] = (256, 128)


ARCHITECTURES: dict[str, Architecture] = {
    "pass_vit_tiny_patch16": Architecture(192, 12, 3),
    "pass_vit_small_patch16": Architecture(384, 12, 6),
    "pass_vit_base_patch16": Architecture(768, 12, 12),
    "pass_vit_small_ics_patch16": Architecture(384, 12, 6, conv_stem=True),
    "pass_vit_base_ics_patch16": Architecture(768, 12, 12, conv_stem=True),
    "transreid_vit_small_patch16": Architecture(384, 12, 6, num_parts=0),
    "transreid_vit_small_ics_patch16": Architecture(384, 12, 6, num_parts=0, conv_stem=True),
    "transreid_vit_base_ics_patch16": Architecture(768, 12, 12, num_parts=0, conv_stem=True),
    "test_pass_vit": Architecture(64, 3, 2, img_size=(64, 32)),
}


def architecture_name(architecture: Architecture) -> str | None:
    """Name of the registered model whose tensors have these dimensions; None if there is none."""
    key = (architecture.embed_dim, architecture.depth, architecture.num_parts, architecture.conv_stem)
    for name, a in ARCHITECTURES.items():
        if (a.embed_dim, a.depth, a.num_parts, a.conv_stem) == key:
            return name
    return None
