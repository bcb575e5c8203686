"""Weights: files read, converted, loaded into a model, found, kept and published.

read        a checkpoint file to flat tensors, without running code from it
convert     any published layout to timm's keys
load        the converted tensors into a model, every one accounted for
local_dir   the folder that ``local-dir:`` and the Hub use
zoo         which weights exist, and where a tag's file comes from
names       the model that a name, a folder, a run or a file stands for
publish     a folder to the Hugging Face Hub
"""

from passreid_models.checkpoints.convert import Converted, convert_state_dict
from passreid_models.checkpoints.load import LoadReport, load_report
from passreid_models.checkpoints.local_dir import convert_checkpoint, save_pretrained
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
    "get_weight",
    "list_weights",
    "load_report",
    "pull",
    "read_checkpoint",
    "save_pretrained",
    "verify",
]
