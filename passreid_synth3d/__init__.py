"""Synthetic pedestrians in 3-D: clothed persons who walk through places, as surveillance cameras see them.

Needs the extra ``[synth3d]``: anny, a parametric body model, and warp, which casts the rays on the CPU.

    fabrics, prints, wardrobe    identities: phenotype, clothes, hair and bags, by (seed, pid)
    body, pose                   anny's body model; its poses
    layers, accessories, figure  clothes as layers on the body; bags, hats and buns; the dressed person as triangles
    scene, things, walls, surroundings, light, place
                                 cameras and their surroundings, by (seed, camid)
    mesh, surfaces, kernel       triangles and materials; reflectance and cut-outs; ray casting and shading
    render, sensor, picture      radiance; from radiance to a JPEG file; one image, by (seed, pid, camid, k)
    dataset, workers             a dataset in the Market-1501 layout, drawn on all cores
"""

from typing import Any

__all__ = ["draw", "write_market1501"]


def __getattr__(name: str) -> Any:  # so that anny and warp are imported only to draw an image
    if name == "draw":
        from passreid_synth3d.picture import draw

        return draw
    if name == "write_market1501":
        from passreid_synth3d.dataset import write_market1501

        return write_market1501
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
