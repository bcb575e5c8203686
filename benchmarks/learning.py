"""Does it learn? Zero-shot retrieval of random weights, of plain DINO and of PASS after the same number of images.

A table and, in the JSON line, random_mAP, dino_mAP, pass_mAP and *_rank1, in percent, on 200 generated persons under
four cameras, of another seed than those trained on (other persons, other cameras). DINO is the same trainer with
--parts 0: nine local views of the whole image, one token. Pooled pixels and chance for comparison.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import common
import timm
import torch
import yaml

import passreid_models  # noqa: F401  registers the models
from passreid_models.demo import held_out_scores
from passreid_models.ssl.config import TrainConfig
from passreid_models.ssl.loop import train

SETTINGS = Path(__file__).parent.parent / "examples" / "bundled.yaml"
MODEL = "pass_vit_tiny_patch16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs, not that it learns")
    parser.add_argument("--ids", type=int, default=3000, help="persons to train on, 5 images each")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method")
    parser.add_argument("--out", type=Path, help="keep the runs here, and continue them; default: a temporary folder")
    args = parser.parse_args()
    ids, epochs, persons = (20, 1, 10) if args.quick else (args.ids, args.epochs, 200)
    values = {**yaml.safe_load(SETTINGS.read_text()), "model": MODEL, "epochs": epochs, "resume": "auto"}
    config = TrainConfig.from_dict({**values, "data": f"synthetic:ids={ids},images=5,cameras=32,seed=1"})

    with tempfile.TemporaryDirectory() as temporary:
        out, scores = args.out or Path(temporary), {}
        torch.manual_seed(0)
        scores["random"] = [held_out_scores(timm.create_model(MODEL, img_size=config.size), persons)]
        for method, parts in (("dino", 0), ("pass", 3)):
            runs = [replace(config, parts=parts, seed=s, out=str(out / f"{method}-{s}")) for s in range(args.seeds)]
            scores[method] = [
                held_out_scores(timm.create_model(f"local-dir:{train(run)}", pretrained=True), persons) for run in runs
            ]
    rows, figures = [], {}
    for method, found in scores.items():
        for key in ("mAP", "rank1"):
            values = torch.tensor([s["model"][key] for s in found])
            figures[f"{method}_{key}"] = float(values.mean())
            spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
            rows.append((f"{method}, {key}", f"{values.mean():.2f}{spread}"))
    for name in ("pixels, pooled to 16x8", "chance"):
        rows += [(f"{name}, {key}", f"{value:.2f}") for key, value in scores["random"][0][name].items()]
    seen = 5 * ids // config.batch_size * config.batch_size * epochs
    title = f"{MODEL} at {config.size[0]}x{config.size[1]}, {seen} images seen, {args.seeds} seeds; {common.machine()}"
    common.report(title, rows, figures)


if __name__ == "__main__":
    main()
