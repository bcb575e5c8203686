"""Time of the host in pre-training: a step and colours of views so small that hardly anything else is measured.

    python benchmarks/overhead.py

overhead_vs_plain    seconds of a step of ``test_pass_vit`` over those of the plain implementation, the median of the
                     rounds: batch 1, 11 views, K = 64, one thread, float32
colours_vs_plain     the same for the colours of the views of 128 images in one batch, against torchvision on PIL images
"""

import argparse
import statistics

import common
import numpy as np
import plain
import torch
from step import Ours, Plain
from torchvision.transforms.v2.functional import to_pil_image

from passreid_models.pretrain.photometric import Photometric
from passreid_models.pretrain.views import MultiCrop, Views

IMAGES, SIZE, LOCAL_SIZE, PROTOTYPES = 128, (64, 32), (32, 16), 64
HEAD = {"hidden_dim": 32, "bottleneck_dim": 16, "num_prototypes": PROTOTYPES}


def steps() -> tuple[Plain, Ours]:
    views = torch.randn(2, 1, 3, *SIZE), torch.randn(9, 1, 3, *LOCAL_SIZE)
    shape = {"dim": 64, "depth": 3, "heads": 2, "size": SIZE, "hidden": 32, "bottleneck": 16, "prototypes": PROTOTYPES}
    ours = Ours("float32", *views, model="test_pass_vit", size=SIZE, local_size=LOCAL_SIZE, **HEAD)
    return Plain(None, *views, **shape), ours


class Colours:
    """Colours of the same views by torchvision (``plain``) and by ours (``ours``)."""

    def __init__(self) -> None:
        rng, crop = np.random.default_rng(0), MultiCrop(size=SIZE, local_size=LOCAL_SIZE)
        params = torch.from_numpy(np.stack([crop.draw_params(rng) for _ in range(IMAGES)]))
        pixels = [torch.randint(256, (IMAGES, v, 3, *s), dtype=torch.uint8) for v, s in ((2, SIZE), (9, LOCAL_SIZE))]
        self.views, self.photometric = Views(*pixels, params), Photometric()
        views = plain.PlainViews(SIZE)
        transforms = [*views.global_transforms, *[views.local_transform] * 9]
        self.steps = [t.transforms[2:] for t in transforms]  # after crop and flip
        self.pictures = [[to_pil_image(v) for image in pixels for v in image[i]] for i in range(IMAGES)]

    def ours(self) -> None:
        self.photometric.batch(self.views)

    def plain(self) -> None:
        for pictures in self.pictures:
            for x, steps in zip(pictures, self.steps, strict=True):
                for step in steps:
                    x = step(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    rounds = 3 if parser.parse_args().quick else 15
    torch.set_num_threads(1)

    plain_step, our_step = steps()
    colours = Colours()
    runs = {"plain step": plain_step, "our step": our_step}
    seconds = common.in_turn(runs, rounds)
    seconds |= common.in_turn({"plain colours": colours.plain, "our colours": colours.ours}, max(2, rounds // 3))
    figures = {
        "overhead_vs_plain": common.median_ratio(seconds["our step"], seconds["plain step"]),
        "colours_vs_plain": common.median_ratio(seconds["our colours"], seconds["plain colours"]),
    }
    rows = [(name, f"{1000 * statistics.median(times):.1f} ms") for name, times in seconds.items()]
    rows += [(name, f"{value:.3f}") for name, value in figures.items()]
    common.report(f"host time of pre-training, medians of {rounds} rounds; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
