"""Throughput of exports against PyTorch on the CPU, at 256x128: ONNX Runtime, torch.export and torchscript.

    python benchmarks/export.py

vs_torch_onnx, vs_torch_onnx_half, vs_torch_pt2, vs_torch_torchscript
                    images per second of the export over those of the model in PyTorch, the median of the rounds
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import timm
import torch

from passreid_models.export import FORMATS, LOADERS, export_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds of the tiny model instead of 11 of small")
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: %(default)s)")
    args = parser.parse_args()
    rounds, name = (2, "pass_vit_tiny_patch16") if args.quick else (11, "pass_vit_small_patch16")
    model = timm.create_model(name).eval()
    x = torch.randn(args.batch_size, model.in_chans, *model.patch_embed.img_size)
    runs: dict[str, Callable[[], object]] = {"torch": partial(model, x)}
    rows, figures = [], dict[str, float | None]()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for label, format, half in [(f, f, False) for f in LOADERS] + [("onnx_half", "onnx", True)]:
            file = Path(folder) / f"{label}{FORMATS[format]}"
            export_model(model, file, format, half=half)
            runs[label] = partial(LOADERS[format](file), x.half() if half else x)
        seconds = common.in_turn(runs, rounds)
    for label, times in seconds.items():
        rows.append((label, f"{args.batch_size / statistics.median(times):.1f} images/s"))
        if label != "torch":
            figures[f"vs_torch_{label}"] = common.median_ratio(seconds["torch"], times)
    rows += [(label, f"{value:.3f}") for label, value in figures.items()]
    title = f"{name}, batch {args.batch_size}, medians of {rounds} rounds; {common.machine()}"
    common.report(title, rows, figures)


if __name__ == "__main__":
    main()
