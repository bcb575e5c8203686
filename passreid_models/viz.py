"""Pictures; matplotlib is imported when one is drawn."""

import json
import math
from fnmatch import filter as matching
from pathlib import Path

from passreid_models.runtime import atomic_file

PANELS = {  # titles, and names or patterns of the metrics
    "loss": ("loss", "loss_*"),
    "schedules, as shares of their largest value": ("lr", "weight_decay", "momentum", "teacher_temp"),
    "entropy of the teacher, nats": ("teacher_entropy", "marginal_entropy", "kl"),
    "spread of the features": ("feature_std", "part_cosine"),
    "probe, %": ("probe_mAP", "probe_rank1"),
    "images a second": ("images_per_s",),
}


def plot_run(run: str | Path, picture: str | Path | None = None) -> Path:
    """Draw the curves of a training run from its ``metrics.jsonl``.

    Args:
        run: Folder of ``passreid-train``.
        picture: PNG, PDF or SVG file; by default ``curves.png`` in the folder.

    Raises:
        FileNotFoundError: If there are no metrics.
        ValueError: If matplotlib is not installed, or cannot write such a file.
    """
    metrics = Path(run) / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"{metrics} is not there: {run} is no run of passreid-train, or has not logged yet")
    records = [r for line in metrics.read_text().splitlines() if "epoch" in (r := _read(line))]
    if not records:
        raise ValueError(f"{metrics} holds no steps yet")
    picture = Path(picture) if picture else Path(run) / "curves.png"
    if not picture.suffix:
        raise ValueError(f"{picture}: name a picture file such as curves.png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('plot: pip install "passreid-models[viz]"') from None
    names = list(dict.fromkeys(key for r in records for key in r))
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (title, patterns) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for key in (key for pattern in patterns for key in matching(names, pattern)):
            x, values = zip(*((r["epoch"], r[key]) for r in records if key in r), strict=True)
            y = [math.nan if v is None else v for v in values]  # null was not finite: a gap in the curve
            largest = max((abs(v) for v in y if not math.isnan(v)), default=0) or 1.0
            axes.plot(x, [v / largest for v in y] if "shares" in title else y, label=key, marker=".", markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        if axes.lines:
            axes.legend(fontsize=7)
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, dpi=110)
    return picture


def _read(line: str) -> dict[str, float]:
    """A record; none where a kill, or a run that is just writing, left half a line."""
    try:
        return json.loads(line)
    except ValueError:
        return {}
