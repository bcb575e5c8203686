"""Does it learn? Zero-shot retrieval of random weights, of plain DINO and of PASS after the same number of images.

A table and, in the JSON line, random_mAP, dino_mAP, pass_mAP and *_rank1, in percent: 200 generated persons under four
cameras, in the studio of the training data and, as street_*, with backgrounds and exposures that no training image
had; persons and cameras are of another seed than those trained on. Pooled pixels and chance for comparison.

DINO is the same trainer with --parts 0: one token, whose output is the descriptor (192 wide; that of PASS, CLS and the
mean of its parts, is 384 wide), and as many local views, of the whole image instead of its areas: their scale is
relative to that, so that they show twice as much. The settings, examples/bundled.yaml, were chosen by looking at PASS.

Each run computes on all cores in turn. Two at once, to be found by --out OUT, with DATA for
synthetic:ids=5000,images=8,cameras=8,seed=1,size=128x64,place=studio:

    passreid-train DATA --config examples/bundled.yaml --model pass_vit_tiny_patch16 --out OUT/pass-0
    passreid-train DATA --config examples/bundled.yaml --model pass_vit_tiny_patch16 --out OUT/dino-0 --parts 0
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
PLACES = {"studio": "", "street": "street_"}  # and what their figures' names begin with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs, not that it learns")
    parser.add_argument("--ids", type=int, default=5000, help="persons to train on, 8 images each")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method")
    parser.add_argument("--out", type=Path, help="keep the runs here, and continue them; default: a temporary folder")
    args = parser.parse_args()
    ids, persons = (20, 10) if args.quick else (args.ids, 200)
    values = {**yaml.safe_load(SETTINGS.read_text()), "model": MODEL, "resume": "auto"}
    data = f"synthetic:ids={ids},images=8,cameras=8,seed=1,size=128x64,place=studio"
    config = TrainConfig.from_dict({**values, "data": data})

    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        torch.manual_seed(0)
        models = {"random": [timm.create_model(MODEL, img_size=config.size)]}
        for method, parts in (("dino", 0), ("pass", 3)):
            runs = [replace(config, parts=parts, seed=s, out=str(out / f"{method}-{s}")) for s in range(args.seeds)]
            models[method] = [timm.create_model(f"local-dir:{train(run)}", pretrained=True) for run in runs]

    rows, figures = [], {}
    for place, prefix in PLACES.items():
        scores = {method: [held_out_scores(m, persons, place) for m in found] for method, found in models.items()}
        found = {method: [s["model"] for s in of_seeds] for method, of_seeds in scores.items()}
        found |= {name: [scores["random"][0][name]] for name in ("pixels, pooled to 16x8", "chance")}
        for method, metrics in found.items():
            for key in ("mAP", "rank1"):
                x = torch.tensor([m[key] for m in metrics])
                spread = f" ± {x.std():.2f}" if len(x) > 1 else ""
                rows.append((f"{place}: {method}, {key}", f"{x.mean():.2f}{spread}"))
                if method in models:
                    figures[f"{prefix}{method}_{key}"] = float(x.mean())
    seen = 8 * ids // config.batch_size * config.batch_size
    title = f"{MODEL} at {config.size[0]}x{config.size[1]}, {seen} images seen, {args.seeds} seeds; {common.machine()}"
    common.report(title, rows, figures)


if __name__ == "__main__":
    main()
