"""PASS pre-training (arXiv 2203.03931) in about 100 lines, with the building blocks of the package.

    python examples/pretrain_minimal.py my_crops/ --out weights

Views: two global views of the whole image, three local views of each of three overlapping areas. Tokens: CLS is
compared between all views, PART k between the global views and the local views of area k. The student learns by
gradient descent, the teacher is its moving average. `passreid-train` does the same on several processes, and resumes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from passreid_models.checkpoints.local_dir import check_free, save_pretrained
from passreid_models.data.sources import open_source
from passreid_models.device import pick_dtype
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.loss import PASSLoss
from passreid_models.pretrain.network import PASSNetwork, random_backbone
from passreid_models.pretrain.optim import clip_gradients, make_optimizer, update_teacher
from passreid_models.pretrain.photometric import Photometric
from passreid_models.pretrain.views import MultiCrop
from passreid_models.schedules import cosine, warmup_cosine
from passreid_models.training.optim import set_hyperparameters


class ViewDataset(Dataset):
    """Views of each image in uint8, and the parameters of their photometric augmentation."""

    def __init__(self, data, size):
        self.source, self.crop = open_source(data), MultiCrop(size, (size[0] // 2, size[1] // 2))

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.crop(self.source.load(i), np.random.default_rng())


def main(args):
    check_free(Path(args.out))  # each epoch replaces the folder
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = pick_dtype("auto", torch.device(device))  # bfloat16 if the device computes in it
    student, teacher = (
        PASSNetwork(random_backbone(PretrainConfig(model=args.model, size=args.size), rate), args.prototypes).to(device)
        for rate in (0.1, 0.0)
    )
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    criterion = PASSLoss(args.prototypes, student.backbone.num_parts).to(device)
    photometric = Photometric().to(device)
    optimizer = make_optimizer(student)  # AdamW; no weight decay for biases, but for tokens

    data = ViewDataset(args.data, args.size)
    loader = DataLoader(data, args.batch, shuffle=True, drop_last=True, num_workers=args.workers)
    if not len(loader):
        raise SystemExit(f"{len(data)} images are fewer than a batch of {args.batch}: give a smaller --batch")
    total, step = args.epochs * len(loader), 0
    for epoch in range(args.epochs):
        for views in loader:
            lr = warmup_cosine(step, total, total // 10, args.lr * args.batch / 256, 1e-6)
            set_hyperparameters(optimizer, lr, weight_decay=cosine(step, total, 0.04, 0.4))

            views = views._replace(global_views=views.global_views.to(device), local_views=views.local_views.to(device))
            global_views, local_views = photometric.batch(views)  # [2, B, 3, H, W], [9, B, 3, H / 2, W / 2]

            with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):  # float16 overflows
                with torch.no_grad():
                    targets = teacher(global_views).logits()
                outputs = student(global_views, local_views).logits()
            loss = criterion(outputs, targets, args.teacher_temp)
            loss.backward()

            clip_gradients(student, 3.0)
            if epoch == 0:  # the last layers are frozen in the first epoch
                for head in student.heads:
                    head.last_layer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            criterion.update_centers(targets)  # before the teacher changes
            update_teacher(teacher.parameters(), student.parameters(), cosine(step, total, args.momentum, 1.0))
            step += 1
            if step % 50 == 0 or step == total:
                print(f"epoch {epoch + 1}/{args.epochs}  step {step}/{total}  loss {loss.item():.3f}", flush=True)
        save_pretrained(teacher.backbone, args.out, overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", help="folder of person crops, text list, tar file, or synthetic:ids=1000")
    parser.add_argument("--out", required=True, help="folder for the weights")
    parser.add_argument("--model", default="pass_vit_small_patch16")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128), metavar=("H", "W"), help="of global views")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate for a batch of 256")
    parser.add_argument("--momentum", type=float, default=0.996, help="initial momentum of the teacher")
    parser.add_argument("--teacher-temp", type=float, default=0.04)
    parser.add_argument("--workers", type=int, default=2)
    main(parser.parse_args())
