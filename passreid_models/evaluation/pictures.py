"""Pictures of an evaluation: ranked galleries, CMC, ROC, and the similarities of right and wrong pairs."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from passreid_models.data.images import open_image
from passreid_models.figure import new_figure, shorten
from passreid_models.runtime import atomic_buffer

if TYPE_CHECKING:
    from passreid_models.data.datasets import ReIDDataset
    from passreid_models.evaluation.report import Evaluation, Retrieved

WIDTH, HEIGHT, GAP, LABEL = 64, 128, 4, 26  # of a ranked image, in pixels; two lines of text
Cell = tuple[Image.Image, bool, Sequence[str]]  # of a ranking: thumbnail, whether it is right, lines of text


def draw_evaluation(evaluation: "Evaluation", folder: str | Path, queries: int = 10, topk: int = 10) -> list[Path]:
    """Draw ``ranking.png``, ``cmc.png``, ``roc.png`` and ``similarities.png``.

    Args:
        evaluation: Result of ``evaluate_dataset``.
        folder: Folder of the pictures; made if it does not exist.
        queries: Rows of the ranking, spread evenly over the queries that count.
        topk: Hits in a row, without images that the protocol leaves out.

    Returns:
        The four files.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    figures: dict[str, Any] = {name: new_figure(5, 4, "pictures") for name in ("cmc", "roc", "similarities")}
    _draw_cmc(figures["cmc"], evaluation)
    _draw_roc(figures["roc"], evaluation)
    _draw_similarities(figures["similarities"], evaluation)
    counted = np.flatnonzero(np.asarray(evaluation.metrics.first_match) > 0)
    rows = counted[np.unique(np.linspace(0, len(counted) - 1, queries).round().astype(int))]
    files = [Path(folder) / "ranking.png"]
    with atomic_buffer(files[0]) as buffer:
        draw_ranking(evaluation.retrieved, evaluation.dataset, rows, topk).save(buffer)
    for name, figure in figures.items():
        files.append(Path(folder) / f"{name}.png")
        with atomic_buffer(files[-1]) as buffer:
            figure.savefig(buffer, format="png", dpi=110)
    return files


def best_hits(retrieved: "Retrieved", query: int, topk: int) -> np.ndarray:
    """Rows of the gallery, best first, without those that the protocol leaves out for this query."""
    from passreid_models.retrieval import rank

    left_out = np.zeros(len(retrieved.gallery), dtype=bool)
    if retrieved.own[query] >= 0:
        left_out[retrieved.own[query]] = True
    if retrieved.has_cameras:
        same = retrieved.gallery.pids == retrieved.query.pids[query]
        left_out |= same & (retrieved.gallery.camids == retrieved.query.camids[query])
    depth = topk + int(left_out.sum())
    ranking = rank(retrieved.query_features[query], retrieved.gallery_features, depth, retrieved.metric)
    hits = ranking.indices[0].cpu().numpy()
    return hits[~left_out[hits]][:topk]


def draw_ranking(retrieved: "Retrieved", dataset: "ReIDDataset", queries: np.ndarray, topk: int) -> Image.Image:
    """Draw a row for each query, with identity and camera below each image as the data name them."""

    def cells(query: int) -> Iterator[Cell]:
        hits = best_hits(retrieved, query, topk).tolist()
        for split, i in [(retrieved.query, query), *((retrieved.gallery, i) for i in hits)]:
            pid = dataset.pid_names.get(int(split.pids[i]), str(split.pids[i]))
            camera = dataset.camera_names.get(int(split.camids[i]), "")
            lines = (f"id {pid}" if split.pids[i] else "distractor", f"cam {camera}" if camera else "")
            yield thumbnail(split.paths[i]), split.pids[i] == retrieved.query.pids[query], lines

    return ranking_sheet(map(cells, queries.tolist()), len(queries), topk)


def ranking_sheet(rows: Iterable[Iterable[Cell]], count: int, topk: int, label: int = LABEL) -> Image.Image:
    """Draw rows of a query and its hits: the query framed black, hits green if they are right, red if they are wrong.

    Args:
        rows: For each query itself and its hits, best first: the thumbnail, whether its identity is the query's, and
            lines of text, which are shortened to its width.
        count: Number of rows.
        topk: Hits for which a row has room.
        label: Height of the text, in pixels.
    """
    cell_width, cell_height = WIDTH + 2 * GAP, HEIGHT + 2 * GAP + label
    sheet = Image.new("RGB", ((1 + topk) * cell_width + 2 * GAP, count * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, cells in enumerate(rows):
        for column, (image, is_right, lines) in enumerate(cells):
            x = column * cell_width + GAP + (2 * GAP if column else 0)
            y = row * cell_height + GAP
            frame = (x - GAP + 1, y - GAP + 1, x + WIDTH + GAP - 2, y + HEIGHT + GAP - 2)
            draw.rectangle(frame, fill="black" if not column else "green" if is_right else "red")
            sheet.paste(image, (x, y))
            if lines:
                text = "\n".join(shorten(draw, line, WIDTH + GAP) for line in lines)
                draw.text((x, y + HEIGHT + GAP), text, fill="black", spacing=2)
    return sheet


def thumbnail(path: Path) -> Image.Image:
    """Image of 64x128 pixels (width x height)."""
    return open_image(path).resize((WIDTH, HEIGHT))


def _draw_cmc(figure: Any, evaluation: "Evaluation") -> None:
    axes = figure.subplots()
    for name, metrics in (("as ranked", evaluation.metrics), ("re-ranked", evaluation.rerank)):
        if metrics is not None:
            share = 100 * np.asarray(metrics.cmc)
            axes.plot(np.arange(1, len(share) + 1), share, label=f"{name}, mAP {100 * metrics.mAP:.1f}")
    axes.set(title="CMC", xlabel="rank", ylabel="queries with a match up to this rank, %", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_roc(figure: Any, evaluation: "Evaluation") -> None:
    axes, roc = figure.subplots(), evaluation.roc
    axes.plot(roc.fpr, 100 * roc.tpr, label="pairs of query and gallery")
    axes.plot([roc.eer], [100 * (1 - roc.eer)], "o", label=f"EER {100 * roc.eer:.1f} %")
    axes.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate, %", ylim=(0, 101), xscale="log")
    axes.set_xlim(1 / roc.num_negatives, 1)  # from the rate of one pair on
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_similarities(figure: Any, evaluation: "Evaluation") -> None:
    axes, roc = figure.subplots(), evaluation.roc
    edges, bins = roc.histogram_edges, np.flatnonzero(roc.positive_histogram + roc.negative_histogram)
    first, last = bins[0], bins[-1]
    for name, counts in (("right pairs", roc.positive_histogram), ("wrong pairs", roc.negative_histogram)):
        shares = 100 * counts[first : last + 1] / counts.sum()
        axes.stairs(shares, edges[first : last + 2], fill=True, alpha=0.5, label=name)
    axes.axvline(roc.eer_threshold, color="black", linewidth=1, label=f"EER, at {roc.eer_threshold:.3f}")
    kind = "cosine" if evaluation.retrieved.metric == "cosine" else "negative squared distance"
    axes.set(title="similarities", xlabel=kind, ylabel="of the pairs, %")
    axes.legend()
