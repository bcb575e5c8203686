"""Pictures; matplotlib is imported when one is drawn."""

from passreid_models.viz.evaluation import draw_evaluation
from passreid_models.viz.figure import require_matplotlib
from passreid_models.viz.training import PANELS, plot_run

__all__ = ["PANELS", "draw_evaluation", "plot_run", "require_matplotlib"]
