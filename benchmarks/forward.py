"""Throughput of pass_vit_small_patch16 against timm's vit_small_patch16_224, both at 256x128 in one process.

    python benchmarks/forward.py

vs_timm_fp32, vs_timm_bf16      descriptors: our images per second over timm's, the median of the rounds; vs_timm_bf16
                                is null if the device does not compute in bfloat16
vs_timm_tokens_fp32             the same of all output tokens (forward_features), ours with three more
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import common
import timm
import torch

import passreid_models  # noqa: F401  registers the models
from passreid_models.device import pick_device

SIZE, BATCH = (256, 128), 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds instead of 15")
    parser.add_argument("--device", help="default: CUDA if there is one, else the CPU")
    args = parser.parse_args()
    device, rounds = pick_device(args.device), 2 if args.quick else 15
    batches = 20 if device.type == "cuda" else 1  # per round

    rows, figures = [], dict[str, float | None]()
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if dtype == torch.bfloat16 and not common.has_bfloat16(device):
            figures["vs_timm_bf16"] = None
            continue
        models = {
            "pass_vit_small_patch16": timm.create_model("pass_vit_small_patch16", num_classes=0),
            "vit_small_patch16_224": timm.create_model("vit_small_patch16_224", img_size=SIZE, num_classes=0),
        }
        x = torch.randn(BATCH, 3, *SIZE).to(device, dtype)

        def repeat(forward: Callable[[torch.Tensor], object], x: torch.Tensor = x) -> None:
            for _ in range(batches):
                forward(x)
            common.synchronize(device)

        with torch.inference_mode():
            models = {name: model.eval().to(device, dtype) for name, model in models.items()}
            forwards = {f"{name} {label}": model for name, model in models.items()}
            if dtype == torch.float32:
                forwards |= {f"{name} tokens {label}": model.forward_features for name, model in models.items()}
            seconds = common.in_turn({name: partial(repeat, forward) for name, forward in forwards.items()}, rounds)
        for name, times in seconds.items():
            rows.append((name, f"{BATCH * batches / statistics.median(times):.1f} images/s"))
        ours, timms, *tokens = seconds.values()
        figures[f"vs_timm_{label}"] = common.median_ratio(timms, ours)
        if tokens:
            figures[f"vs_timm_tokens_{label}"] = common.median_ratio(tokens[1], tokens[0])
    rows += [(name, "-" if value is None else f"{value:.3f}") for name, value in figures.items()]
    title = f"forward at 256x128, batch {BATCH}, medians of {rounds} rounds; {common.machine(device)}"
    common.report(title, rows, figures)


if __name__ == "__main__":
    main()
