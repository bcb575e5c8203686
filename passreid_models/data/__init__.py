"""Images and labels: what a folder, list, tar file or dataset holds, and how it is read.

images      which files are images, and how one is opened
listing     the images below a folder or in tar files, found once
sources     images without labels, for pre-training
layouts     the labels of each dataset layout; a new layout goes here
datasets    train, query and gallery of a labelled dataset
check       what is off in a dataset; findings: the rules
loader      batches by worker processes
"""

from passreid_models.data.check import Check, check_dataset
from passreid_models.data.datasets import ReIDDataset, Split, open_dataset
from passreid_models.data.images import ImageError, find_images
from passreid_models.data.sources import Source, open_source

__all__ = [
    "Check",
    "ImageError",
    "ReIDDataset",
    "Source",
    "Split",
    "check_dataset",
    "find_images",
    "open_dataset",
    "open_source",
]
