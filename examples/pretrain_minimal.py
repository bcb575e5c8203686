"""PASS pre-training, the whole method on one page (arXiv 2203.03931), on synthetic persons and a CPU.

    python examples/pretrain_minimal.py --images DIR --out OUT       # DIR: any folder of person crops

Views: two global crops of the whole image, L local crops of each of three overlapping areas. Tokens: CLS is compared
between all views, PART k between the global views and the local views of area k.
"""

import argparse
import math
import random
import time
from copy import deepcopy
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from timm.layers import set_fused_attn
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as T

import passreid_models  # noqa: F401  registers the models
from passreid_models.local_dir import save_pretrained

AREAS = ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0))  # rows of the image, as fractions of its height
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Views(Dataset):
    """The 2 + 3L views of an image: ``[2, 3, H, W]`` and ``[3L, 3, H/2, W/2]``, areas in order."""

    def __init__(self, paths, size, local_views):
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
        gray, tensor = T.RandomGrayscale(0.2), [T.ToImage(), T.ToDtype(torch.float32, True), T.Normalize(MEAN, STD)]

        def view(size, scale, blur, solarize=0.0):
            crop = T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC)
            blurs = T.RandomApply(
                [T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))], blur
            )
            return T.Compose(
                [crop, T.RandomHorizontalFlip(), jitter, gray, blurs, T.RandomSolarize(128, solarize), *tensor]
            )

        half = [s // 2 for s in size]
        self.global_views = [view(size, (0.4, 1.0), 1.0), view(size, (0.4, 1.0), 0.1, 0.2)]
        self.local_view, self.paths, self.local_views = view(half, (0.1, 0.8), 0.5), paths, local_views

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = Image.open(self.paths[i]).convert("RGB")
        w, h = image.size
        areas = [image.crop((0, round(top * h), w, round(bottom * h))) for top, bottom in AREAS]
        local = [self.local_view(area) for area in areas for _ in range(self.local_views)]
        return torch.stack([v(image) for v in self.global_views]), torch.stack(local)


class Network(nn.Module):
    """Backbone and one projection head a token kind (CLS, PART 1 .. 3)."""

    def __init__(self, name, hidden, prototypes, **kwargs):
        super().__init__()
        self.backbone = timm.create_model(name, **kwargs)
        self.mlps, self.last_layers = nn.ModuleList(), nn.ModuleList()
        for _ in range(1 + self.backbone.num_parts):
            layers = [nn.Linear(self.backbone.embed_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 256)]
            for layer in layers:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            self.mlps.append(nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2]))
            last = weight_norm(nn.Linear(256, prototypes, bias=False))
            last.parametrizations.weight.original0.data.fill_(1).requires_grad_(False)  # norm_last_layer
            self.last_layers.append(last)

    def head(self, token, x):
        return self.last_layers[token](F.normalize(self.mlps[token](x), dim=-1)).float()

    def forward(self, global_views, local_views=None):
        """One list entry a token kind: logits ``[V, B, K]`` of the views that carry it, the two global ones first."""
        v, b = global_views.shape[:2]
        tokens = self.backbone.forward_views(global_views.flatten(0, 1)).unflatten(0, (v, b))
        views = [tokens[:, :, t] for t in range(tokens.shape[2])]
        if local_views is not None:
            parts, per_part = len(views) - 1, len(local_views) // (len(views) - 1)
            area = torch.arange(parts).repeat_interleave(per_part * b)
            local = self.backbone.forward_views(local_views.flatten(0, 1), area).unflatten(0, (-1, b))  # [3L, B, 2, D]
            views[0] = torch.cat([views[0], local[:, :, 0]])
            for k, of_area in enumerate(local[:, :, 1].split(per_part)):
                views[1 + k] = torch.cat([views[1 + k], of_area])
        return [self.head(t, x) for t, x in enumerate(views)]


def pass_loss(student, teacher, centers, temperature):
    """Mean cross-entropy over all pairs (teacher global view i, student view v), v != i, of all token kinds."""
    total, terms = 0.0, 0
    for z, target, center in zip(student, teacher, centers, strict=True):
        q = F.softmax((target - center) / temperature, dim=-1)
        pairs = -torch.einsum("ibk,vbk->iv", q, F.log_softmax(z / 0.1, dim=-1)) / z.shape[1]
        total = total + pairs.sum() - pairs.diagonal().sum()
        terms += pairs.numel() - len(q)
    return total / terms


def main(args):
    torch.manual_seed(0)
    set_fused_attn(False)  # torch's fused attention has a slow backward on a CPU, for sequences as short as these
    student = Network(args.model, args.hidden, args.prototypes, drop_path_rate=0.1)
    teacher = deepcopy(student).requires_grad_(False)
    for block in teacher.backbone.blocks:
        block.drop_path1 = block.drop_path2 = nn.Identity()
    folded = [p for n, p in student.named_parameters() if n.endswith(("cls_token", "reg_token"))]  # token + position
    others = [p for p in student.parameters() if p.requires_grad and all(p is not f for f in folded)]
    groups = [  # parameters, learning rate and weight decay factors
        dict(params=[p for p in others if p.ndim > 1], lr_scale=1.0, wd_scale=1.0),
        dict(params=[p for p in others if p.ndim == 1], lr_scale=1.0, wd_scale=0.0),
        dict(params=folded, lr_scale=2.0, wd_scale=0.5),
    ]
    optimizer = torch.optim.AdamW(groups)
    centers = [torch.zeros(args.prototypes) for _ in student.mlps]
    paths = sorted(p for p in Path(args.images).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    stages = [(tuple(s // 2 for s in args.size), args.coarse_epochs), (args.size, args.epochs)]
    steps = len(paths) // args.batch * sum(epochs for _, epochs in stages)
    warmup, peak, step, start = steps // 10, args.lr * args.batch / 256, 0, time.time()

    for size, epochs in stages:  # coarse to fine: the positions are resampled to the views' grid
        data = Views(paths, size, args.local_views)
        loader = DataLoader(data, args.batch, shuffle=True, drop_last=True, num_workers=args.workers)
        for _ in range(epochs):
            for global_views, local_views in loader:
                cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
                after = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
                lr = peak * step / warmup if step < warmup else 1e-6 + (peak - 1e-6) * after
                for group in optimizer.param_groups:
                    group["lr"], group["weight_decay"] = (
                        lr * group["lr_scale"],
                        (0.4 - 0.36 * cosine) * group["wd_scale"],
                    )
                global_views, local_views = global_views.transpose(0, 1), local_views.transpose(0, 1)  # [V, B, 3, H, W]
                with torch.autocast("cpu", torch.bfloat16):
                    with torch.no_grad():
                        targets = teacher(global_views)
                    outputs = student(global_views, local_views)
                loss = pass_loss(outputs, targets, centers, args.teacher_temp)  # in float32
                if not loss.isfinite():
                    raise SystemExit(f"step {step}: the loss is {loss.item()}")
                optimizer.zero_grad()
                loss.backward()
                for p in (p for p in student.parameters() if p.grad is not None):
                    if p is student.backbone.reg_token:  # upstream's part tokens are clipped one by one
                        p.grad[0] *= (3.0 / (p.grad[0].norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1)
                    else:
                        nn.utils.clip_grad_norm_([p], 3.0)
                if step < len(paths) // args.batch:  # the last layers rest in the first epoch
                    student.last_layers.zero_grad()
                optimizer.step()
                with torch.no_grad():
                    momentum = 1 - (1 - args.momentum) * cosine
                    old, new = list(teacher.parameters()), list(student.parameters())
                    torch._foreach_lerp_(old, new, 1 - momentum)
                    centers = [c * 0.9 + z.mean((0, 1)) * 0.1 for c, z in zip(centers, targets, strict=True)]
                step += 1
                if step % 50 == 0 or step == steps:
                    speed = step * args.batch / (time.time() - start)
                    print(f"step {step}/{steps}  loss {loss.item():.3f}  lr {lr:.2e}  {speed:.1f} images/s", flush=True)
                if step % 100 == 0 or step == steps:
                    save_pretrained(teacher.backbone, args.out, overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of person crops")
    parser.add_argument("--out", required=True, help="folder for the weights")
    parser.add_argument("--model", default="pass_vit_tiny_patch16")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128), metavar=("H", "W"), help="of global views")
    parser.add_argument("--coarse-epochs", type=int, default=8, help="epochs at half the size, first")
    parser.add_argument("--epochs", type=int, default=1, help="epochs at full size")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--local-views", type=int, default=3, help="a part")
    parser.add_argument("--prototypes", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak, for a batch of 256")
    parser.add_argument("--momentum", type=float, default=0.99, help="of the teacher, at the start")
    parser.add_argument("--teacher-temp", type=float, default=0.04, help="published: 0.04; lower learns sooner")
    parser.add_argument("--workers", type=int, default=1)
    main(parser.parse_args())
