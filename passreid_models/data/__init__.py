"""Images and labels of folders, lists, tar files and datasets.

images      image files: walk of folders, opener, reason why one cannot be read
listing     list of the images below a folder or in tar files, cached
sources     images without labels, for pre-training
layouts     reader of the labels of each dataset layout; tables: of CSV files
labels      identities and cameras as numbers
datasets    train, query and gallery of a labelled dataset
check       errors and remarks on a dataset; findings: the rules
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
