"""mAP and Rank-1 of each kind of training on generated persons, against the bundled weights without training.

    python benchmarks/reid.py --out RUNS        40 to 60 minutes on one core with bfloat16; a second call continues

The keys of the JSON on the last line are NAME_mAP and NAME_rank1, in percent, of the last model of a run:

    zero_shot       the bundled weights as they are, trained on 3-D persons of another generator
    supervised      fine-tuned with labels
    usl             adapted without labels
    source_only     fine-tuned on a second domain, without adaptation: the baseline of uda
    uda             fine-tuned on the second domain, then adapted without labels

The second domain has other persons under other cameras, in warm light and other colours of clothes. 100 persons train
and 100 others test, 12 images each under six cameras. Each run is one documented command, printed before it starts.
"""

import argparse
import json
import shlex
import subprocess
import tempfile
from pathlib import Path

import common

MODEL, SIZE = "pass_vit_tiny_patch16", "128x64"
DATA = "synthetic:ids={ids},images=12,cameras=6,seed={seed},size=128x64,place={place}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps only, to test the script; the scores mean nothing"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the runs, which a second call continues; default: a temporary one"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(args.out or Path(temporary), args.quick)
    rows = [(", ".join(name.rsplit("_", 1)).replace("_", " "), f"{value:.1f}") for name, value in figures.items()]
    common.report(f"{MODEL} at {SIZE}; {common.machine()}", rows, figures)


def measure(out: Path, quick: bool) -> dict[str, float]:
    """Train and evaluate; return mAP and Rank-1 of each model, in percent."""
    ids, folder = 40 if quick else 200, shlex.quote(str(out))
    target, source = (DATA.format(ids=ids, seed=seed, place=place) for seed, place in ((11, "studio"), (12, "summer")))
    options = f"--init pass_vit_tiny_patch16.synth_reid --model {MODEL} --size {SIZE} --preset laptop --resume auto"
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
        scores = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        figures |= {f"{name}_mAP": scores["mAP"], f"{name}_rank1": scores["rank1"]}
    return figures


def passreid(words: str) -> None:
    print(f"passreid {words}", flush=True)
    subprocess.run([*common.PASSREID, *shlex.split(words)], check=True)


if __name__ == "__main__":
    main()
