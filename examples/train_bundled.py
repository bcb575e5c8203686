"""Make the bundled weights from nothing: draw 3-D persons, pre-train on them, fine-tune on them, evaluate, pack.

    python examples/train_bundled.py tiny --work ~/bundled             # killed: run it again, it continues
    python examples/train_bundled.py small --work ~/bundled --widen    # begins as the tiny there, twice as wide

The settings are those of bundled.yaml and bundled_reid.yaml beside this file; on a GPU give --settings a copy with a
larger batch_size and more epochs. Needs the extra [synth3d]. Without an installed package set PYTHONPATH=.

WORK/studio/, WORK/street/    what passreid synth draws to train on, before 96 cameras each
WORK/held-out-studio/, ...    other persons before other cameras, in patterns and prints that no training garment has
WORK/tiny/         the run of passreid-train, on the studio: what two views of an image share, and other images do not,
                   is what self-distillation learns first, and on a street that is the background
WORK/tiny-reid/    the run of passreid finetune that begins with it, on the street: labels of drawn persons cost nothing
WORK/pass_vit_tiny_patch16.synth/, .synth_reid/    float16 weights, config.json, figures.json, and the log of the run,
                   metrics.jsonl; with --split the weights are in pieces below 16 MiB, to be joined by:
                   cat model.safetensors.* > model.safetensors
"""

import argparse
import json
import shutil
from pathlib import Path

import timm
import torch
import yaml
from torch import Tensor

import passreid_models  # noqa: F401  registers the models
from passreid_models.local_dir import save_pretrained
from passreid_models.reid.config import FinetuneConfig
from passreid_models.reid.evaluate import evaluate_model
from passreid_models.reid.supervised import finetune
from passreid_models.runtime import atomic_file
from passreid_models.ssl.config import TrainConfig
from passreid_models.ssl.loop import train
from passreid_models.synthetic3d.dataset import write_market1501
from passreid_models.synthetic3d.place import PLACES
from passreid_models.training.folder import RunFolder
from passreid_models.training.loop import Stopped

HERE = Path(__file__).parent
TASKS = {
    "synth": "self-supervised pre-training on generated 3-D persons",
    "synth_reid": "self-supervised pre-training on generated 3-D persons, then fine-tuning with their labels",
}
PIECE = 15 * 2**20


def main(args):
    settings, reid_settings = (yaml.safe_load(file.read_text()) for file in (args.settings, args.reid_settings))
    init = {}
    if args.widen:
        init = {"init": str(args.work / "small-start.pt"), "epochs": 2, "lr": settings["lr"] / 2}  # it has learnt
        if not Path(init["init"]).exists():
            if RunFolder(args.work / "tiny").latest() is None:
                raise SystemExit(f"--widen: {args.work / 'tiny'} holds no run: make tiny in the same --work first")
            widen(args.work / "tiny", Path(init["init"]))
    drawn, others = {}, {}
    for place in PLACES:
        drawn[place], others[place] = str(args.work / place), str(args.work / f"held-out-{place}")
        write_market1501(drawn[place], args.ids, 10, train_ids=args.ids, sites=12, seed=1, place=place)
        test = dict(cameras=4, train_ids=0, seed=0, place=place, patterns="held-out")
        write_market1501(others[place], args.test_ids, 8, **test)
    model, run = f"pass_vit_{args.size}_patch16", str(args.work / args.size)
    common = {"model": model, "resume": "auto", "save_minutes": 2}
    values = {"data": drawn["studio"], "probe": others["studio"], "out": run}
    export = train(TrainConfig.from_dict(settings | common | init | values))
    pack(args, export, f"{model}.synth")
    values = {"data": drawn["street"], "eval_data": others["street"], "init": str(export), "out": f"{run}-reid"}
    export = finetune(FinetuneConfig.from_dict(reid_settings | common | values))
    pack(args, export, f"{model}.synth_reid")


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


def pack(args, export, name):
    """Write the weights as they are bundled, and what they are worth on the persons that were held out."""
    folder = args.work / name
    model = timm.create_model(f"local-dir:{export}", pretrained=True, img_size=(256, 128))
    info = {"provenance": json.loads((export / "config.json").read_text())["provenance"]}
    scores = {place: {} for place in PLACES}
    for precision in ("float32", "float16"):
        save_pretrained(model, folder, info=info, half=precision == "float16", overwrite=True)
        for place in PLACES:
            found = evaluate_model(args.work / f"held-out-{place}", str(folder), cache=False).to_dict()
            scores[place][precision] = {key: found[key] for key in ("mAP", "rank1")}
            print(f"{name} as {precision}, {place}: mAP {found['mAP']:.2f}, Rank-1 {found['rank1']:.2f}", flush=True)
    claim_tag(folder / "config.json", name.partition(".")[2])
    (folder / "figures.json").write_text(json.dumps(scores, indent=2) + "\n")
    shutil.copy(export.parent / "metrics.jsonl", folder)
    if args.split:
        data = (folder / "model.safetensors").read_bytes()
        for i in range(0, len(data), PIECE):
            (folder / f"model.safetensors.{i // PIECE:02d}").write_bytes(data[i : i + PIECE])
        (folder / "model.safetensors").unlink()
    print(folder)


def claim_tag(file, tag):
    """Say whose licence and tag the weights have: save_pretrained does not know that they become the bundled ones."""
    config = json.loads(file.read_text())
    config["pretrained_cfg"].update(tag=tag, license="apache-2.0", description=TASKS[tag])
    file.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("size", choices=("tiny", "small", "base"))
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs, outside the repository")
    parser.add_argument("--ids", type=int, default=1500, help="persons to train on, 10 images each")
    parser.add_argument("--test-ids", type=int, default=200, help="persons to evaluate on, 8 images each")
    parser.add_argument("--widen", action="store_true", help="small begins as the tiny of WORK, each channel twice")
    parser.add_argument("--settings", type=Path, default=HERE / "bundled.yaml", help="of passreid-train")
    parser.add_argument("--reid-settings", type=Path, default=HERE / "bundled_reid.yaml", help="of passreid finetune")
    parser.add_argument("--split", action="store_true", help="weights in pieces below 16 MiB")
    args = parser.parse_args()
    if args.widen and args.size != "small":
        parser.error("--widen: only small is twice as wide as tiny")
    try:
        main(args)
    except (Stopped, ValueError, OSError) as e:
        raise SystemExit(str(e)) from None
