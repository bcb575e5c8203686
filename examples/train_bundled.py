"""Reproduce the bundled weights from scratch: draw 3-D persons, pre-train, fine-tune, evaluate, pack.

    python examples/train_bundled.py tiny --work ~/bundled             # after a kill, the same command continues
    python examples/train_bundled.py small --work ~/bundled --widen    # starts from the tiny there, twice as wide

The settings are those of bundled.yaml and bundled_reid.yaml beside this file; with --widen, 2 epochs at half the
learning rate, since the start is trained already. On a GPU, give --settings a file of your own with a larger batch_size
and more epochs; nothing is then changed in it. Needs the extra [synth3d]. If the package is not installed, set
PYTHONPATH=.

WORK/studio/, WORK/street/    training data of passreid synth, before 96 cameras each
WORK/held-out-studio/, ...    other persons before other cameras, in patterns and prints that no training garment has
WORK/tiny/         the run of passreid-train, in studios: self-distillation first learns what distinguishes an image
                   from the others, which on a street is the background
WORK/small-start.pt           with --widen: the initial weights of small
WORK/tiny-reid/    the run of passreid finetune that starts from it, on streets: generated persons have labels for free
WORK/pass_vit_tiny_patch16.synth/, .synth_reid/    float16 weights, config.json, figures.json, and the log of the run,
                   metrics.jsonl; with --split the weights are in pieces below 16 MiB, to be joined by:
                   cat model.safetensors.* > model.safetensors
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

import passreid_models  # noqa: F401  registers the models
from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.evaluation.evaluate import evaluate_model
from passreid_models.pretrain.config import PRESETS, PretrainConfig
from passreid_models.pretrain.run import train
from passreid_models.reid.config import PRESETS as REID_PRESETS
from passreid_models.reid.config import FinetuneConfig
from passreid_models.reid.supervised import finetune
from passreid_models.runtime import atomic_file, atomic_folder
from passreid_models.training import command
from passreid_models.training.folder import RunFolder
from passreid_models.training.warm_start import provenance_of
from passreid_synth3d.dataset import write_training_and_test
from passreid_synth3d.place import PLACES

HERE = Path(__file__).parent
SETTINGS, REID_SETTINGS = HERE / "bundled.yaml", HERE / "bundled_reid.yaml"
WIDENED = {"epochs": 2, "lr": 4e-3}
START = "small-start.pt"
TASKS = {
    "synth": "self-supervised pre-training on generated 3-D persons",
    "synth_reid": "self-supervised pre-training on generated 3-D persons, then fine-tuning with their labels",
}
PIECE = 15 * 2**20
CONTINUES = "the same command continues"


def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("size", choices=("tiny", "small", "base"))
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs, outside the repository")
    parser.add_argument("--ids", type=positive, default=1500, help="persons for training, 10 images each")
    parser.add_argument("--test-ids", type=positive, default=200, help="persons for evaluation, 8 images each")
    parser.add_argument(
        "--widen", action="store_true", help="start small from the tiny in WORK, with every channel doubled"
    )
    parser.add_argument("--settings", type=Path, help="settings of passreid-train instead of bundled.yaml")
    parser.add_argument("--reid-settings", type=Path, default=REID_SETTINGS, help="settings of passreid finetune")
    parser.add_argument("--split", action="store_true", help="split the weights into pieces below 16 MiB")
    args = parser.parse_args(argv)
    if args.widen and args.size != "small":
        parser.error("--widen: only small is twice as wide as tiny")
    try:
        make(args)
    except (ValueError, OSError, SafetensorError) as e:
        raise SystemExit(str(e)) from None
    except KeyboardInterrupt:
        print(CONTINUES, file=sys.stderr)
        raise SystemExit(130) from None


def positive(word):
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {word}")
    return int(word)


def make(args):
    work, model = args.work, f"pass_vit_{args.size}_patch16"
    run, tuned = work / args.size, work / f"{args.size}-reid"
    common = ["--model", model, "--resume", "auto", "--save-minutes", 2, "--max-minutes", 0]
    words = [work / "studio", "--config", args.settings or SETTINGS, *common, "--out", run]
    words += ["--probe", work / "held-out-studio"]
    if args.widen:
        words += ["--init", work / START]
        if not args.settings:
            words += [word for name, value in WIDENED.items() for word in (f"--{name}", value)]
    pretraining = read_settings(words, PretrainConfig, PRESETS, "passreid-train")
    words = [work / "street", "--config", args.reid_settings, *common, "--out", tuned]
    words += ["--eval-data", work / "held-out-street", "--init", run / "export"]
    tuning = read_settings(words, FinetuneConfig, REID_PRESETS["finetune"], "passreid finetune")
    if args.widen and RunFolder(run).latest() is None:  # else the run has its initial weights already
        if not (work / "pass_vit_tiny_patch16.synth" / "figures.json").exists():
            raise SystemExit(f"--widen: {work} holds no pass_vit_tiny_patch16.synth: make tiny there first, to its end")
        widen(work / "tiny", work / START)
    write_training_and_test(work, args.ids, args.test_ids)
    train_by(train, pretraining, "passreid-train")
    pack(args, run, f"{model}.synth")
    train_by(finetune, tuning, "passreid finetune")
    pack(args, tuned, f"{model}.synth_reid")


def read_settings(words, config, presets, program):
    """Read the settings of a run as its command does."""
    return command.read_config([str(word) for word in words], config, presets, program, "", "data")


def train_by(function, config, program):
    """Train to the end; exit with the command's code if it fails or is interrupted."""
    if code := command.run(program, function, lambda: config):
        if code > 128:
            print(CONTINUES, file=sys.stderr)
        raise SystemExit(code)


def widen(run, file):
    """Write initial weights of twice the width and heads that compute the same as the run's network (arXiv 1511.05641).

    Every channel is duplicated. Each weight is split at random between the two copies of its input, since equal copies
    would stay equal in training.
    """
    latest = RunFolder(run).load_latest()
    if latest is None:
        raise ValueError(f"--widen: {run} holds no run: make tiny in the same --work first, to its end")
    state, generator = latest[1], torch.Generator().manual_seed(0)
    wide = {name: double(name, value, generator) for name, value in state["teacher"].items()}
    start = {"student": wide, "teacher": wide, "statistics": state["statistics"], "provenance": provenance_of(str(run))}
    with atomic_file(file) as temporary:
        torch.save(start, temporary)


def double(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if name.startswith("heads."):  # only the input of a projection head is doubled
        return split(value, generator) if name.endswith("mlp.0.weight") else value
    if ".qkv." in name:  # [3 x heads x head_dim, ...]: double the heads of queries, keys and values
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


def pack(args, run, name):
    """Write a run's weights in the bundled form, with their scores on the held-out persons."""
    folder, export = args.work / name, run / "export"
    provenance = json.loads((export / "config.json").read_text())["provenance"]
    origin = provenance
    while "init_provenance" in origin:
        origin = origin["init_provenance"]
    if origin["init"] == START:
        origin["init_provenance"] = torch.load(args.work / START, mmap=True)["provenance"]
    if is_packed(folder, provenance, args.split):
        print(f"{folder} is there")
        return
    model = timm.create_model(f"local-dir:{export}", pretrained=True, img_size=(256, 128))
    scores = {place: {} for place in PLACES}
    with atomic_folder(folder, overwrite=True) as new:
        for precision in ("float32", "float16"):
            half = precision == "float16"
            save_pretrained(model, new, info={"provenance": provenance}, half=half, overwrite=True)
            for place in PLACES:
                metrics = evaluate_model(args.work / f"held-out-{place}", str(new), cache=False).to_dict()
                scores[place][precision] = {key: metrics[key] for key in ("mAP", "rank1")}
                mAP, rank1 = scores[place][precision].values()
                print(f"{name} as {precision}, {place}: mAP {mAP:.2f}, Rank-1 {rank1:.2f}", flush=True)
        claim_tag(new / "config.json", name.partition(".")[2])
        (new / "figures.json").write_text(json.dumps(scores, indent=2) + "\n")
        shutil.copy(run / "metrics.jsonl", new)
        if args.split:
            data = (new / "model.safetensors").read_bytes()
            for i in range(0, len(data), PIECE):
                (new / f"model.safetensors.{i // PIECE:02d}").write_bytes(data[i : i + PIECE])
            (new / "model.safetensors").unlink()
    print(folder)


def is_packed(folder, provenance, in_pieces):
    """Whether the folder already holds the weights of this provenance, complete."""
    weights = "model.safetensors.00" if in_pieces else "model.safetensors"
    if not all((folder / name).exists() for name in (weights, "figures.json")):
        return False
    return json.loads((folder / "config.json").read_text())["provenance"] == provenance


def claim_tag(file, tag):
    """Write tag, licence and description to config.json; save_pretrained does not know that the weights are bundled."""
    config = json.loads(file.read_text())
    config["pretrained_cfg"].update(tag=tag, license="apache-2.0", description=TASKS[tag])
    file.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
