"""Does it work, end to end? mAP and Rank-1 of each way to train, on generated persons.

Zero-shot (the bundled weights as they are), supervised, USL, and UDA from a second domain: another seed's persons under
other cameras, in warm light and in other colours of clothes. 100 persons train and 100 others test, 12 images each
under six cameras; the bundled weights saw 3-D persons of another generator. One documented command each, printed
before it runs and free to be run by hand; the last model of a run counts, not the best. For UDA also the source model
as it comes to the target, which is what adaptation has to beat.

    python benchmarks/reid.py --out RUNS        40 minutes on one core with bfloat16; a second call continues
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import common

MODEL, SIZE = "pass_vit_tiny_patch16", "128x64"
DATA = "synthetic:ids={ids},images=12,cameras=6,seed={seed},size=128x64,place={place}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs, not that it learns")
    parser.add_argument("--out", type=Path, help="keep the runs here, and continue them; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(args.out or Path(temporary), args.quick)
    rows = [(", ".join(name.rsplit("_", 1)).replace("_", " "), f"{value:.1f}") for name, value in figures.items()]
    common.report(f"{MODEL} at {SIZE}; {common.machine()}", rows, figures)


def measure(out: Path, quick: bool) -> dict[str, float]:
    """mAP and Rank-1 of each way, in percent."""
    ids, folder = 40 if quick else 200, shlex.quote(str(out))
    target, source = (DATA.format(ids=ids, seed=seed, place=place) for seed, place in ((11, "studio"), (12, "summer")))
    options = f"--init synth_reid --model {MODEL} --size {SIZE} --preset laptop --resume auto"
    if quick:
        options += " --epochs 1"
    passreid(f"finetune {target} {options} --out {folder}/supervised")
    passreid(f"cluster {target} {options} --out {folder}/usl")
    passreid(f"cluster {target} --source {source} --source-config laptop {options} --out {folder}/uda")
    models = {
        "zero_shot": MODEL,
        "supervised": f"{folder}/supervised/export",
        "usl": f"{folder}/usl/export",
        "source_only": f"{folder}/uda/source/export",
        "uda": f"{folder}/uda/export",
    }
    figures = {}
    for name, model in models.items():
        passreid(f"eval {target} --model {model} --size {SIZE} --json {folder}/{name}.json")
        scores = json.loads((out / f"{name}.json").read_text())
        figures |= {f"{name}_mAP": scores["mAP"], f"{name}_rank1": scores["rank1"]}
    return figures


def passreid(words: str) -> None:
    print(f"passreid {words}", flush=True)
    subprocess.run([sys.executable, "-m", "passreid_models.cli", *shlex.split(words)], check=True)


if __name__ == "__main__":
    main()
