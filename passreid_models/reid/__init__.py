"""Re-identification: fine-tuning with identity labels, and by clusters without (USL, UDA).

supervised      finetune: run and trainer
unsupervised    cluster: run and trainer; pseudo_labels: Jaccard distances and DBSCAN
model           backbone, neck and classifier
losses          batch-hard triplets, cluster memory
samplers        which images make a batch; batches: loading
trainer, run    what both tasks share; config: settings
"""

from passreid_models.reid.config import ClusterConfig, FinetuneConfig
from passreid_models.reid.losses import ClusterMemory, batch_hard_triplet
from passreid_models.reid.model import ReIDModel
from passreid_models.reid.pseudo_labels import cluster_features, jaccard_distances
from passreid_models.reid.supervised import finetune
from passreid_models.reid.unsupervised import cluster

__all__ = [
    "ClusterConfig",
    "ClusterMemory",
    "FinetuneConfig",
    "ReIDModel",
    "batch_hard_triplet",
    "cluster",
    "cluster_features",
    "finetune",
    "jaccard_distances",
]
