"""``passreid demo``: descriptors of generated persons, a table of their accuracy and a picture of the ranking."""

from pathlib import Path

import numpy as np
import torch

from passreid_models.embed import Embedder
from passreid_models.evaluation.pictures import HEIGHT, WIDTH, Cell, ranking_sheet
from passreid_models.figure import check_picture
from passreid_models.retrieval import evaluate, rank
from passreid_models.runtime import atomic_buffer
from passreid_models.synthetic import SyntheticPersons

DATA_SEED, DEMO_SEED = 1, 0  # two seeds: the data have no person and no camera of the demo
SHOWN, TOPK = 6, 8


def make_data(folder: str | Path, num_ids: int) -> str:
    """Write generated persons in the Market-1501 layout, half of the identities for training.

    Returns:
        A line that describes the data.
    """
    data = SyntheticPersons(num_ids, images_per_id=10, cameras=8, seed=DATA_SEED)
    data.write_market1501(folder, workers=2)
    return f"{len(data)} images of {num_ids} generated persons under 8 cameras -> {folder}"


def run(model: str, picture: str | Path, num_ids: int) -> str:
    """Rank generated persons by the descriptors of ``model``, and draw the first rankings.

    Returns:
        A table with mAP and Rank-1 of the model, of pooled pixels and of chance.

    Raises:
        ValueError: If ``picture`` is no picture file by its suffix, or ``num_ids`` is less than 2.
    """
    check_picture(picture)
    if num_ids < 2:
        raise ValueError(f"ranking needs 2 persons or more, got {num_ids}")
    data = _DemoData(model, num_ids)
    queries, gallery = np.flatnonzero(data.is_query), np.flatnonzero(~data.is_query)
    lines = [f"{num_ids} generated persons, {len(queries)} queries, {len(gallery)} gallery images, 4 cameras", ""]
    lines += [f"{'descriptor':<36}{'width':>6}{'mAP':>8}{'Rank-1':>8}"]
    names = {"model": model}
    for (name, metrics), x in zip(data.scores().items(), data.descriptors.values(), strict=True):
        lines.append(f"{names.get(name, name):<36}{x.shape[1]:>6}{metrics['mAP']:>8.1f}{metrics['rank1']:>8.1f}")
    descriptors = data.descriptors["model"]
    shown = queries[:SHOWN]
    hits = gallery[rank(descriptors[shown], descriptors[gallery], TOPK, data.metric).indices.numpy()]
    count, topk = hits.shape
    rows = ([data.cell(i, query) for i in (query, *best)] for query, *best in np.c_[shown, hits].tolist())
    with atomic_buffer(picture) as buffer:
        ranking_sheet(rows, count, topk, label=0).save(buffer)
    return "\n".join([*lines, "", f"the first {count} queries and their best {topk} hits: {picture}"])


class _DemoData:
    """Generated persons and three descriptors of each image: the model's, pooled pixels, noise."""

    def __init__(self, model: str, num_ids: int) -> None:
        data = SyntheticPersons(num_ids, images_per_id=8, cameras=4, seed=DEMO_SEED)
        self.images = [data[i][0] for i in range(len(data))]
        self.pids, self.camids = np.array(data.pids), np.array(data.camids)
        self.is_query = np.arange(len(data)) % 8 == 0  # the first image of each person
        pixels = np.stack([np.asarray(im.resize((8, 16))).ravel() for im in self.images])
        embed = Embedder(model)
        x, self.metric = embed(self.images), embed.metric
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        self.descriptors = {"model": x, "pixels, pooled to 16x8": torch.tensor(pixels).float(), "chance": noise}

    def scores(self) -> dict[str, dict[str, float]]:
        """mAP and Rank-1 of each descriptor, in percent."""
        q, g = self.is_query, ~self.is_query
        scores = {}
        for name, x in self.descriptors.items():
            labels = self.pids[q], self.pids[g], self.camids[q], self.camids[g]
            metrics = evaluate(x[q], x[g], *labels, metric=self.metric if name == "model" else "cosine")
            scores[name] = {"mAP": 100 * metrics.mAP, "rank1": 100 * metrics.rank1}
        return scores

    def cell(self, image: int, query: int) -> Cell:
        """Image of a query's row in the picture, without text."""
        return self.images[image].resize((WIDTH, HEIGHT)), self.pids[image] == self.pids[query], ()
