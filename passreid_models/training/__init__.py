"""What all trainers share.

config      base of the configurations; command: flags, YAML and presets
run         the loop around a step: data, checkpoints, log, signals
trainer     the state of a run and what a step needs; optim: parameter groups
folder      checkpoints, log and export on the disk; log, plot: what they tell
warm_start  the weights that a run begins with
"""

from passreid_models.training.config import RunConfig
from passreid_models.training.folder import RunFolder
from passreid_models.training.plot import plot_run
from passreid_models.training.run import Run, Stopped
from passreid_models.training.trainer import BaseTrainer, NonFiniteLossError

__all__ = ["BaseTrainer", "NonFiniteLossError", "Run", "RunConfig", "RunFolder", "Stopped", "plot_run"]
