"""Train the bundled weights from nothing, phase by phase: draw 3-D persons, train three times, evaluate, pack.

    python examples/train_bundled.py tiny --work ~/bundled       # after a kill, the same command continues
    python examples/train_bundled.py small --work ~/bundled      # with the same data

pass         self-supervised pre-training; it learns what distinguishes an image from the others
labels       fine-tuning from there, since generated persons have labels for free
variation    the run of labels goes on, its classifier kept, with images that vary as those of other cameras do

The settings of each phase are in bundled/PHASE.yaml, for one GPU; --settings takes a folder of other ones. Needs the
extra [synth3d], or --data and --held-out with sets that are drawn already. If the package is not installed, set
PYTHONPATH=.

WORK/street/      8,000 persons of seed 3 before 96 cameras, for training
WORK/held-out/    300 persons of seed 0 before 4 cameras, in patterns and prints that no training garment has
WORK/SIZE-1-pass/, SIZE-2-labels/, SIZE-3-variation/    the runs
WORK/pass_vit_SIZE_patch16.synth/, .synth_labels/, .synth_reid/    their weights in float16, config.json, the log of the
                  run (metrics.jsonl), and figures.json: mAP and Rank-1 on the held-out persons at 256x128 after each
                  phase; with --split the weights are in pieces below 16 MiB, to be joined by:
                  cat model.safetensors.* > model.safetensors
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import yaml
from PIL import Image
from safetensors import SafetensorError

import passreid_models  # noqa: F401  registers the models
from passreid_models import cli
from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.data.datasets import open_dataset
from passreid_models.data.layouts import MARKER_3D
from passreid_models.evaluation.evaluate import evaluate_model
from passreid_models.pretrain.config import PRESETS, PretrainConfig
from passreid_models.pretrain.run import train
from passreid_models.reid.config import PRESETS as REID_PRESETS
from passreid_models.reid.config import FinetuneConfig
from passreid_models.reid.supervised import finetune
from passreid_models.runtime import atomic_file, atomic_folder
from passreid_models.training import command
from passreid_models.training.folder import RunFolder
from passreid_synth3d.dataset import write_market1501

SETTINGS = Path(__file__).parent / "bundled"
HELD_OUT = {"cameras": 4, "train_ids": 0, "seed": 0, "patterns": "held-out"}
PIECE = 15 * 2**20
WEBP_QUALITY = 72
CONTINUES = "the same command continues"


class Phase(NamedTuple):
    config: type[PretrainConfig] | type[FinetuneConfig]
    presets: dict[str, dict[str, Any]]
    train: Callable[[Any], Path]
    program: str
    tag: str
    description: str


PASS = (PretrainConfig, PRESETS, train, "passreid-train")
REID = (FinetuneConfig, REID_PRESETS["finetune"], finetune, "passreid finetune")
SYNTH = "self-supervised pre-training on generated 3-D persons"
PHASES = {
    "pass": Phase(*PASS, "synth", SYNTH),
    "labels": Phase(*REID, "synth_labels", f"{SYNTH}, then fine-tuning with their labels"),
    "variation": Phase(*REID, "synth_reid", f"{SYNTH}, then fine-tuning with their labels, at last with variation"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("size", choices=("tiny", "small", "base"))
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs, outside the repository")
    parser.add_argument("--ids", type=positive, default=8000, help="persons for training, 8 images each")
    parser.add_argument("--test-ids", type=positive, default=300, help="held-out persons, 8 images each")
    parser.add_argument("--data", type=Path, help="training set to use instead of WORK/street")
    parser.add_argument("--held-out", type=Path, help="set to evaluate on instead of WORK/held-out")
    parser.add_argument(
        "--settings", type=Path, default=SETTINGS, help="folder of pass.yaml, labels.yaml, variation.yaml"
    )
    parser.add_argument("--until", choices=PHASES, default="variation", help="last phase")
    limits = "time of each phase; the next one then begins from where it is; 0: no limit"
    parser.add_argument("--minutes", type=minutes, nargs=3, default=(0, 0, 0), metavar=("A", "B", "C"), help=limits)
    parser.add_argument("--split", action="store_true", help="split the weights into pieces below 16 MiB")
    parser.add_argument("--webp", type=Path, metavar="DIR", help="train nothing: copy both sets to DIR as WebP")
    args = parser.parse_args(argv)
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


def minutes(word):
    if not 0 <= float(word) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {word}")
    return float(word)


def make(args):
    model, names = f"pass_vit_{args.size}_patch16", list(PHASES)[: list(PHASES).index(args.until) + 1]
    data, held_out = args.data or args.work / "street", args.held_out or args.work / "held-out"
    runs = [args.work / f"{args.size}-{i}-{name}" for i, name in enumerate(PHASES, 1)]
    configs = []
    for i, name in enumerate(names):
        words = [data, "--model", model, "--out", runs[i], "--resume", "auto", "--save-minutes", 2]
        words += ["--max-minutes", args.minutes[i], "--probe" if name == "pass" else "--eval-data", held_out]
        configs.append(read_settings(name, args.settings, *words, *(["--init", runs[i - 1]] if i else [])))
    if not args.held_out:
        write_market1501(held_out, args.test_ids, 8, **HELD_OUT)
    if not args.data:
        write_market1501(data, args.ids, 8, train_ids=args.ids, sites=12, seed=3)
    if args.webp:
        copy_as_webp(data, args.webp / "street-webp")
        copy_as_webp(held_out, args.webp / "held-out-webp")
        return
    figures = {"held-out": describe(held_out)}
    for name, config, run, later in zip(names, configs, runs, [*runs[1:], None], strict=False):
        if later and RunFolder(later).latest():
            check_settings(config, run)
        else:
            train_by(PHASES[name], config)
        figures = pack(args, run, args.work / f"{model}.{PHASES[name].tag}", name, figures, held_out)


def read_settings(name, folder, *words):
    """Read the settings of a phase as its command does."""
    phase = PHASES[name]
    words = [*words, "--config", folder / f"{name}.yaml"]
    return command.read_config([str(word) for word in words], phase.config, phase.presets, phase.program, "", "data")


def copy_as_webp(source, target):
    """Copy the images of a drawn set as WebP, or what is missing, and its marker, which then states the quality."""
    copies = {path.relative_to(source).with_suffix(".webp"): path for path in source.glob("[!.]*/[!.]*.jpg")}
    present = {path.relative_to(target) for path in target.glob("[!.]*/[!.]*")}
    if not copies:
        raise ValueError(f"--webp: {source} has no folders of JPEG files")
    if present - copies.keys():
        raise ValueError(f"--webp: {target} holds other images than {source}: name another folder")
    for copy in copies.keys() - present:
        with Image.open(copies[copy]) as image, atomic_file(target / copy) as temporary:
            image.save(temporary, quality=WEBP_QUALITY)
    if (source / MARKER_3D).exists():
        marker = json.loads((source / MARKER_3D).read_text(encoding="utf-8")) | {"webp_quality": WEBP_QUALITY}
        (target / MARKER_3D).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    print(f"{len(copies):,} images -> {target}")


def describe(data):
    """Describe a set for figures.json: its size and generator, and what else a drawn set differs by."""
    marker = json.loads((data / MARKER_3D).read_text(encoding="utf-8")) if (data / MARKER_3D).exists() else {}
    keys = marker.keys() & {"patterns", "webp_quality"}
    return {"data": open_dataset(data).description, **{key: marker[key] for key in sorted(keys)}}


def check_settings(config, run):
    """Refuse other settings for a run that a later phase has begun from, and which therefore stays as it is."""
    trained = config.changed(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    for name, (value, was) in trained.items():
        if value not in (None, ""):  # left to its default, which the run has
            raise ValueError(f"{name}: {value!r} is asked for, and {run} was trained with {was!r}: give another --work")


def train_by(phase, config):
    """Train to the end or the time limit; exit with the command's code if it fails or is interrupted."""
    if code := cli.run(phase.program, lambda: print(phase.train(config)) or 0):
        if code > 128:
            print(CONTINUES, file=sys.stderr)
        raise SystemExit(code)


def pack(args, run, folder, name, earlier, held_out):
    """Write a run's weights in the bundled form; return the figures of this phase and the earlier ones."""
    provenance = json.loads((run / "export" / "config.json").read_text(encoding="utf-8"))["provenance"]
    figures = figures_of(folder, provenance, name, earlier, args.split)
    if figures:
        print(f"{folder} is there")
        return figures
    model = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True, img_size=(256, 128))
    scores = {"images_seen": provenance["images_seen"]}
    with atomic_folder(folder, overwrite=True) as new:
        for precision in ("float32", "float16"):
            info, half = {"provenance": provenance}, precision == "float16"
            save_pretrained(model, new, info=info, half=half, overwrite=True)
            evaluation = evaluate_model(held_out, str(new), cache=False)
            if evaluation.retrieved.not_finite:
                raise ValueError(f"{run}: {evaluation.retrieved.not_finite_text}")
            metrics = evaluation.to_dict()
            scores[precision] = {key: metrics[key] for key in ("mAP", "rank1")}
        figures = {**earlier, name: scores}
        claim_tag(new / "config.json", PHASES[name])
        (new / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        shutil.copy(run / "metrics.jsonl", new)
        if args.split:
            data = (new / "model.safetensors").read_bytes()
            for i in range(0, len(data), PIECE):
                (new / f"model.safetensors.{i // PIECE:02d}").write_bytes(data[i : i + PIECE])
            (new / "model.safetensors").unlink()
    print(folder)
    print_gains(figures)
    return figures


def print_gains(figures):
    """Print mAP and Rank-1 of the float16 weights after each phase."""
    before = None
    for phase in (name for name in PHASES if name in figures):
        scores = figures[phase]["float16"]
        gain = f" ({scores['mAP'] - before['mAP']:+.2f})" if before else ""
        images = f"{figures[phase]['images_seen']:,} images"
        print(f"  {phase}: {images}, mAP {scores['mAP']:.2f}{gain}, Rank-1 {scores['rank1']:.2f}", flush=True)
        before = scores


def figures_of(folder, provenance, name, earlier, in_pieces):
    """Read the figures of a folder that holds the weights of this provenance, complete; else None."""
    weights = "model.safetensors.00" if in_pieces else "model.safetensors"
    if not all((folder / file).exists() for file in (weights, "figures.json")):
        return None
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    is_same = json.loads((folder / "config.json").read_text(encoding="utf-8"))["provenance"] == provenance
    return figures if is_same and figures == {**earlier, name: figures.get(name)} else None


def claim_tag(file, phase):
    """Write tag, licence and description to config.json; save_pretrained does not know that the weights are bundled."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["pretrained_cfg"].update(tag=phase.tag, license="apache-2.0", description=phase.description)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
