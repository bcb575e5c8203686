"""Weights: read, convert, load into a model, find and publish.

read        checkpoint file to flat tensors, without running code from it
convert     any published layout to timm's keys
load        converted tensors into a model, with a report of every tensor
local_dir   exported folders, for ``local-dir:`` and the Hub
zoo         manifest of the known weights, and the search for a tag's file
download    transfers that are resumed and limited
hub, drive  files of the Hugging Face Hub, verified, and of Google Drive
names       model of a name, a folder, a run or a file
publish     exported folder to the Hugging Face Hub
"""

from passreid_models.checkpoints.convert import Converted, convert_state_dict
from passreid_models.checkpoints.load import LoadReport, load_report
from passreid_models.checkpoints.local_dir import convert_checkpoint, save_pretrained
from passreid_models.checkpoints.names import find_model
from passreid_models.checkpoints.read import CheckpointError, read_checkpoint
from passreid_models.checkpoints.zoo import Weight, WeightsUnavailableError, get_weight, list_weights, pull, verify

__all__ = [
    "CheckpointError",
    "Converted",
    "LoadReport",
    "Weight",
    "WeightsUnavailableError",
    "convert_checkpoint",
    "convert_state_dict",
    "find_model",
    "get_weight",
    "list_weights",
    "load_report",
    "pull",
    "read_checkpoint",
    "save_pretrained",
    "verify",
]
