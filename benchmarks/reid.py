"""Does it work, end to end? mAP and Rank-1 of each way to train, on generated persons.

Zero-shot (the bundled weights as they are), supervised, USL, and UDA from a second domain: another seed's persons under
other cameras, in warm light and in other colours of clothes. 100 persons train and 100 others test, 12 images each
under six cameras; the bundled weights saw persons and cameras of another seed. One documented command each, printed
before it runs and free to be run by hand; the last model of a run counts, not the best. For UDA also the source model
as it comes to the target, which is what adaptation has to beat.

    python benchmarks/reid.py --out RUNS        about 25 minutes on two cores; a second call continues
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
FINETUNE = "--epochs {epochs} --warmup-epochs 2 --lr 0.003 --log-steps 100 --eval-epochs {epochs}"
CLUSTER = ("--epochs {rounds} --steps 40 --clusters-per-batch 8 --k1 10 --k2 4 --eps 0.5 --lr 0.003 --lr-step {step} "
           "--drop-path 0.1 --log-steps 100 --eval-epochs {rounds}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs, not that it learns")
    parser.add_argument("--out", type=Path, help="keep the runs here, and continue them; default: a temporary folder")
    args = parser.parse_args()
    sizes = (
        {"ids": 20, "epochs": 2, "rounds": 1, "step": 1}
        if args.quick
        else {"ids": 200, "epochs": 24, "rounds": 8, "step": 6}
    )
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(args.out or Path(temporary), sizes)
    rows = [(name.replace("_", ", "), f"{value:.1f}") for name, value in figures.items()]
    common.report(f"{MODEL} at {SIZE}; {common.machine()}", rows, figures)


def measure(out: Path, sizes: dict[str, int]) -> dict[str, float]:
    """mAP and Rank-1 of each way, in percent."""
    target, source = (DATA.format(seed=seed, place=place, **sizes) for seed, place in ((11, "studio"), (12, "summer")))
    init = f"--init synth --model {MODEL} --size {SIZE} --resume auto"
    finetune, cluster = FINETUNE.format(**sizes), CLUSTER.format(**sizes)
    passreid(f"finetune {target} {init} {finetune} --out {out}/supervised")
    passreid(f"finetune {source} {init} {finetune} --out {out}/source")
    passreid(f"cluster {target} {init} {cluster} --out {out}/usl")
    adapt = init.replace("--init synth", f"--init {out}/source/export")
    passreid(f"cluster {target} {adapt} {cluster} --out {out}/uda")
    models = {
        "zero_shot": MODEL,
        "supervised": f"{out}/supervised/export",
        "usl": f"{out}/usl/export",
        "source_only": f"{out}/source/export",
        "uda": f"{out}/uda/export",
    }
    figures = {}
    for name, model in models.items():
        passreid(f"eval {target} --model {model} --size {SIZE} --json {out}/{name}.json")
        scores = json.loads((out / f"{name}.json").read_text())
        figures |= {f"{name}_mAP": scores["mAP"], f"{name}_rank1": scores["rank1"]}
    return figures


def passreid(words: str) -> None:
    print(f"passreid {words}", flush=True)
    subprocess.run([sys.executable, "-m", "passreid_models.cli", *shlex.split(words)], check=True)


if __name__ == "__main__":
    main()
