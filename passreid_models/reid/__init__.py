"""Re-identification: fine-tuning with identity labels, and clustering without (USL, UDA).

supervised      finetune: run and trainer
unsupervised    cluster: run and trainer; pseudo_labels: Jaccard distances and DBSCAN
model           backbone, neck and classifier
losses          batch-hard triplet loss, cluster memory
samplers        images of each batch; batches: transform and loading
trainer, run    base of both tasks; config: settings
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
