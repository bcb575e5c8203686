"""Make the bundled synth weights from nothing: train on generated persons to a time budget, evaluate, pack.

    python examples/train_bundled.py tiny --minutes 120 --work ~/bundled       # killed: run it again, it continues
    python examples/train_bundled.py small --minutes 60 --work ~/bundled --widen      # begins as tiny, twice as wide

On a GPU give --settings a copy of bundled.yaml with a larger batch_size. Without an installed package set PYTHONPATH=.

WORK/tiny.json      the plan: persons of each phase, as many as fit into the minutes by a trial of one minute
WORK/tiny-coarse/   the run of passreid-train at 128x64, for most of the time
WORK/tiny-fine/     its continuation at 256x128
WORK/pass_vit_tiny_patch16.synth/   float16 weights, config.json, figures.json; with --split in pieces below 16 MiB, to
                                    be joined by: cat model.safetensors.* > model.safetensors

The persons are drawn while training, each image once, and in a studio: what two views of an image share, and other
images do not, is what self-distillation learns first, and on a street that is the background and the camera.
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import median

import timm
import torch
import yaml
from torch import Tensor

import passreid_models  # noqa: F401  registers the models
from passreid_models.demo import held_out_scores
from passreid_models.local_dir import save_pretrained
from passreid_models.runtime import atomic_file
from passreid_models.ssl.config import TrainConfig
from passreid_models.ssl.loop import train
from passreid_models.training.folder import RunFolder
from passreid_models.training.loop import Stopped

IMAGES_PER_ID = 8
DATA = "synthetic:ids={},images={},cameras=8,seed=1,size={}x{},place=studio"  # held-out persons are of another seed
SIZES = {"coarse": (128, 64), "fine": (256, 128)}
PIECE = 15 * 2**20


def config_of(args, phase, ids, out, init, **others):
    values = yaml.safe_load(args.settings.read_text())
    if init:
        values |= {"init": str(init), "lr": values["lr"] / 8}
    if not torch.cuda.is_available():
        values["workers"] = 0
    data = DATA.format(ids, IMAGES_PER_ID, *SIZES[phase])
    model = f"pass_vit_{args.size}_patch16"
    values |= {"data": data, "model": model, "size": SIZES[phase], "out": str(out), "save_minutes": 2}
    return TrainConfig.from_dict(values | others)


def make_plan(args, init):
    """Persons of each phase, kept for when the script runs again."""
    path, shares = args.work / f"{args.size}.json", {"coarse": 1 - args.fine_share, "fine": args.fine_share}
    if not path.exists():
        plan = {}
        for phase, share in shares.items():
            if share:
                trial = args.work / f"{args.size}-{phase}-trial"
                shutil.rmtree(trial, ignore_errors=True)
                try:
                    train(config_of(args, phase, 10**6, trial, init, max_minutes=1, log_steps=1))
                except Stopped as e:
                    if e.signum:  # not the minute's end
                        raise
                speeds = [json.loads(x)["images_per_s"] for x in (trial / "metrics.jsonl").read_text().splitlines()]
                shutil.rmtree(trial)
                plan[phase] = max(100, round(60 * args.minutes * share * median(speeds) / IMAGES_PER_ID))
        path.write_text(json.dumps(plan))
    plan = json.loads(path.read_text())
    print(f"persons, of {IMAGES_PER_ID} images each: {plan} ({path})", flush=True)
    return plan


def widen(run, file):
    """Write a start for a network of twice the width and heads that computes what the run's does (arXiv 1511.05641).

    Every channel stands twice. A weight is shared out at random between the two copies of its input, since equal copies
    would stay equal in training.
    """
    saved = RunFolder(run).load_latest()[1]
    generator = torch.Generator().manual_seed(0)
    wide = {name: twice(name, value, generator) for name, value in saved["teacher"].items()}
    with atomic_file(file) as temporary:
        torch.save({"student": wide, "teacher": wide, "statistics": saved["statistics"]}, temporary)


def twice(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if name.startswith("heads."):  # of a projection head only the input grows
        return split(value, generator) if name.endswith("mlp.0.weight") else value
    if ".qkv." in name:  # queries, keys and values, each of all heads
        value = value.unflatten(0, (3, -1))
        value = torch.cat([value, value], dim=1).flatten(0, 1)
        return split(value, generator) if value.ndim == 2 else value
    if name.endswith("patch_embed.proj.weight"):
        return torch.cat([value, value])
    if value.ndim == 2:
        return split(torch.cat([value, value]), generator)
    return torch.cat([value, value], dim=-1)  # biases, norms, tokens, positions


def split(weight: Tensor, generator: torch.Generator) -> Tensor:
    share = 0.5 + 0.25 * torch.randn(weight.shape, generator=generator)
    return torch.cat([weight * share, weight * (1 - share)], dim=1)


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    init, phases = None, []
    if args.widen:
        narrow = args.work / "pass_vit_tiny_patch16.synth" / "config.json"
        if not narrow.is_file():
            raise SystemExit(f"--widen: {narrow} is not there: make tiny in the same --work first")
        phases = json.loads(narrow.read_text())["provenance"]["phases"]
        init = args.work / "small-start.pt"
        if not init.exists():
            last = list(json.loads((args.work / "tiny.json").read_text()))[-1]
            widen(args.work / f"tiny-{last}", init)
    for phase, ids in make_plan(args, init).items():
        run = args.work / f"{args.size}-{phase}"
        export = train(config_of(args, phase, ids, run, init, resume="auto"))
        phases.append(json.loads((export / "config.json").read_text())["provenance"])
        init = run
    pack(args, export, phases)


def pack(args, export, phases):
    model = timm.create_model(f"local-dir:{export}", pretrained=True, img_size=(256, 128))
    scores = {place: held_out_scores(model, place=place) for place in ("street", "studio")}
    folder = args.work / f"pass_vit_{args.size}_patch16.synth"
    provenance = {"images_seen": sum(p["images_seen"] for p in phases), "phases": phases}
    save_pretrained(model, folder, info={"provenance": provenance}, half=True, overwrite=True)
    claim_tag(folder / "config.json")
    (folder / "figures.json").write_text(json.dumps(scores, indent=2) + "\n")
    for place, found in scores.items():
        for name, metrics in found.items():
            print(f"{place:<8}{name:<24}mAP {metrics['mAP']:5.1f}  Rank-1 {metrics['rank1']:5.1f}")
    if args.split:
        data = (folder / "model.safetensors").read_bytes()
        for i in range(0, len(data), PIECE):
            (folder / f"model.safetensors.{i // PIECE:02d}").write_bytes(data[i : i + PIECE])
        (folder / "model.safetensors").unlink()
    print(folder)


def claim_tag(file):
    """Say whose licence and tag the weights have: save_pretrained does not know that they become the bundled ones."""
    config = json.loads(file.read_text())
    description = "self-supervised pre-training, generated persons"
    config["pretrained_cfg"].update(tag="synth", license="apache-2.0", description=description)
    file.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("size", choices=("tiny", "small", "base"))
    parser.add_argument("--minutes", type=float, default=120, help="of training; once there is a plan, that counts")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs, outside the repository")
    parser.add_argument("--fine-share", type=float, default=0.15, help="of the time, at 256x128")
    parser.add_argument("--widen", action="store_true", help="small begins as the tiny of WORK, each channel twice")
    parser.add_argument("--settings", type=Path, default=Path(__file__).parent / "bundled.yaml")
    parser.add_argument("--split", action="store_true", help="weights in pieces below 16 MiB")
    args = parser.parse_args()
    if not 0 <= args.fine_share <= 1:
        parser.error(f"--fine-share: expected 0 to 1, got {args.fine_share}")
    if args.widen and args.size != "small":
        parser.error("--widen: only small is twice as wide as tiny")
    try:
        main(args)
    except (Stopped, ValueError, OSError) as e:
        raise SystemExit(str(e)) from None
