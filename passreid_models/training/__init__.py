"""Training: the loop, the configuration and the run folder that all tasks share.

config      base of the configurations; command: flags, YAML and presets
run         training loop: data, checkpoints, log, signals
trainer     base of the trainers: state, precision, processes; optim: parameter groups
folder      checkpoints, log and export on the disk; log: log lines; plot: curves
warm_start  weights to begin with
"""

from passreid_models.training.config import RunConfig
from passreid_models.training.folder import RunFolder
from passreid_models.training.plot import plot_run
from passreid_models.training.run import Run, Stopped
from passreid_models.training.trainer import BaseTrainer, NonFiniteLossError

__all__ = ["BaseTrainer", "NonFiniteLossError", "Run", "RunConfig", "RunFolder", "Stopped", "plot_run"]
