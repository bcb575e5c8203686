"""Throughput of Embedder on JPEG files, against the bare model on prepared tensors of the same batches.

    python benchmarks/embed.py

vs_bare_model       images per second from files over images per second from tensors, the median of the rounds
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import common
import timm
import torch

from passreid_models import Embedder, SyntheticPersons
from passreid_models.device import pick_device

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 images and 2 rounds instead of 1,000 and 3")
    parser.add_argument("--device", help="default: CUDA if there is one, else the CPU")
    args = parser.parse_args()
    device, count, rounds = pick_device(args.device), 128 if args.quick else 1000, 2 if args.quick else 3
    embed = Embedder(timm.create_model("pass_vit_small_patch16"), device=device, batch_size=BATCH)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        persons = SyntheticPersons(-(-count // 8), images_per_id=8, cameras=4)
        paths = common.write_images(Path(folder), (persons[i][0] for i in range(count)))
        images = torch.stack([image for batch in embed._batches(list(paths), False) for image in batch])
        batches = [batch.to(device) for batch in images.split(BATCH)]

        def bare() -> None:
            for batch in batches:
                embed.model(batch)
            common.synchronize(device)

        seconds = common.in_turn({"Embedder on files": lambda: embed(paths), "bare model on tensors": bare}, rounds)
    rows = [(name, f"{count / statistics.median(times):.1f} images/s") for name, times in seconds.items()]
    files, tensors = seconds.values()
    figures: dict[str, float | None] = {"vs_bare_model": common.median_ratio(tensors, files)}
    rows.append(("ratio", f"{figures['vs_bare_model']:.3f}"))
    title = f"pass_vit_small_patch16, {count:,} JPEG files, medians of {rounds} rounds; {common.machine(device)}"
    common.report(title, rows, figures)


if __name__ == "__main__":
    main()
