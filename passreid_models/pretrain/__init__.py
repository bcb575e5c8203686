"""Part-wise self-distillation (PASS, arXiv 2203.03931).

views, photometric     crops of an image; their colours
network, heads         student and teacher: backbone and projection heads
loss, chunked          the loss; the same loss in less memory
optim                  parameter groups, clipping, the teacher's moving average
trainer, run           the training step; a whole run
config, batches        configuration; loading
monitor                indicators of collapse
"""

from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.heads import ProjectionHead
from passreid_models.pretrain.loss import PASSLoss
from passreid_models.pretrain.network import PASSNetwork
from passreid_models.pretrain.optim import clip_gradients, make_optimizer, update_teacher
from passreid_models.pretrain.photometric import Photometric
from passreid_models.pretrain.run import train
from passreid_models.pretrain.trainer import PretrainTrainer
from passreid_models.pretrain.views import MultiCrop, Views

__all__ = [
    "MultiCrop",
    "PASSLoss",
    "PASSNetwork",
    "Photometric",
    "PretrainConfig",
    "PretrainTrainer",
    "ProjectionHead",
    "Views",
    "clip_gradients",
    "make_optimizer",
    "train",
    "update_teacher",
]
