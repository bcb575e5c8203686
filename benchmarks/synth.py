"""Throughput of passreid synth: 3-D persons at 256x128, 10 images each before 8 cameras, on all cores.

    python benchmarks/synth.py

images_per_s        images per second between the first image and the last
images_per_s_all    images per second of the whole call, with the start of the processes; run it twice on a new machine,
                    since the first call builds anny's model
"""

import argparse
import tempfile
import time
from pathlib import Path

import common

from passreid_models.runtime import num_cores
from passreid_synth3d.dataset import write_market1501

IMAGES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 persons instead of 150")
    args = parser.parse_args()
    ids = 10 if args.quick else 150
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        root = write_market1501(Path(folder) / "persons", ids, IMAGES, train_ids=ids, seed=3, progress=False)
        seconds = time.time() - start
        written = sorted(path.stat().st_mtime for path in root.glob("*/*.jpg"))
    figures: dict[str, float | None] = {
        "images_per_s": (len(written) - 1) / (written[-1] - written[0]),
        "images_per_s_all": len(written) / seconds,
    }
    rows = [(name, f"{value:.1f}") for name, value in figures.items()]
    common.report(f"{len(written):,} images, {num_cores()} cores; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
