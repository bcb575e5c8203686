"""Curves of a training run."""

import math
from fnmatch import filter as matching
from pathlib import Path

from passreid_models.figure import new_figure
from passreid_models.runtime import atomic_buffer
from passreid_models.training.folder import RunFolder

PANELS = {  # titles, and names or patterns of the metrics
    "loss": ("loss", "loss_*"),
    "schedules, as shares of their largest value": ("lr", "weight_decay", "momentum", "teacher_temp"),
    "entropy of the teacher, nats": ("teacher_entropy", "marginal_entropy", "kl"),
    "spread of the features": ("feature_std", "part_cosine"),
    "accuracy on the batch": ("accuracy",),
    "clusters": ("clusters",),
    "clusters against identities": ("outliers", "purity", "ari"),
    "retrieval, %": ("probe_mAP", "probe_rank1", "mAP", "rank1"),
    "images a second": ("images_per_s",),
}
COLUMNS = 3
FEW = 40  # points of a curve that are drawn as such


def plot_run(run: str | Path, picture: str | Path | None = None) -> Path:
    """Draw the curves of a training run from its ``metrics.jsonl``.

    Args:
        run: Folder of ``passreid-train``, ``passreid finetune`` or ``passreid cluster``.
        picture: PNG, PDF or SVG file; by default ``curves.png`` in the folder.

    Raises:
        FileNotFoundError: If there are no metrics.
        ValueError: If matplotlib is not installed, or cannot write such a file.
    """
    folder = RunFolder(run)
    metrics = folder.metrics_file
    if not metrics.is_file():
        raise FileNotFoundError(f"{metrics} is not there: {run} is no training run, or has not logged yet")
    records = [record for record in folder.metrics() if math.isfinite(record.get("epoch", math.nan))]
    if not records:
        raise ValueError(f"{metrics} holds no steps yet")
    picture = Path(picture) if picture else Path(run) / "curves.png"
    if not picture.suffix:
        raise ValueError(f"{picture}: name a picture file such as curves.png")
    names = list(dict.fromkeys(key for r in records for key in r))
    curves = {title: [key for p in patterns for key in matching(names, p)] for title, patterns in PANELS.items()}
    panels = {title: keys for title, keys in curves.items() if keys}
    rows = math.ceil(len(panels) / COLUMNS)
    figure = new_figure(12, 4 * rows)
    end = max(r["epoch"] for r in records) or 1
    for position, (title, keys) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, COLUMNS, position)
        for key in keys:
            x, values = zip(*((r["epoch"], r[key]) for r in records if key in r), strict=True)
            y = [v if math.isfinite(v) else math.nan for v in values]  # a gap in the curve
            largest = max((abs(v) for v in y if not math.isnan(v)), default=0) or 1.0
            size = 5 if len(x) <= FEW else 2
            axes.plot(x, [v / largest for v in y] if "shares" in title else y, label=key, marker="o", markersize=size)
        evaluated = [r for r in records if math.isfinite(r.get("mAP", math.nan))] if "mAP" in keys else []
        scores = [(r["epoch"], r["mAP"]) for r in evaluated]
        if len(scores) > 1 and scores[0][0] == 0:
            (_, before), *later = scores
            title += f": mAP {before:.1f} before, {max(y for _, y in later):.1f} at best, {later[-1][1]:.1f} at the end"
            axes.axhline(before, color="gray", linestyle=":", linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        if "shares" in title:
            axes.set_ylim(-0.03, 1.03)
        axes.set_xlim(-0.03 * end, 1.03 * end)  # the same in all panels
        axes.legend(fontsize=7)
    with atomic_buffer(picture) as buffer:
        figure.savefig(buffer, format=picture.suffix[1:], dpi=110)
    return picture
