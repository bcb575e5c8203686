"""What ``passreid demo`` does: persons from the generator, their descriptors, a table and a picture of the ranking."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from passreid_models.embed import Embedder
from passreid_models.retrieval import RetrievalMetrics, evaluate, rank
from passreid_models.runtime import atomic_file
from passreid_models.synthetic import SyntheticPersons

DATA_SEED, DEMO_SEED = 1, 0  # identities and cameras are functions of the seed: what is shown was not trained on
SHOWN, TOPK = 6, 8


def make_data(folder: str | Path, num_ids: int) -> str:
    """Write persons in the Market-1501 layout; half of the identities for training.

    Returns:
        A sentence on what was written.
    """
    data = SyntheticPersons(num_ids, images_per_id=10, cameras=8, seed=DATA_SEED)
    data.write_market1501(folder, workers=2)
    return f"{len(data)} images of {num_ids} generated persons under 8 cameras -> {folder}"


def run(model: str, picture: str | Path, num_ids: int) -> str:
    """Rank generated persons by the descriptors of ``model``, and draw the first rankings.

    Returns:
        A table: accuracy of the model beside that of pooled pixels and of chance.
    """
    if Path(picture).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{picture}: name a picture file such as ranking.png")
    if num_ids < 2:
        raise ValueError(f"ranking needs 2 persons or more, got {num_ids}")
    data = SyntheticPersons(num_ids, images_per_id=8, cameras=4, seed=DEMO_SEED)
    images = [data[i][0] for i in range(len(data))]
    pids, camids = np.array(data.pids), np.array(data.camids)
    is_query = np.arange(len(data)) % 8 == 0  # the first image of each person
    embed = Embedder(model)
    descriptors = embed(images)
    pixels = torch.tensor(np.stack([np.asarray(im.resize((8, 16))).ravel() for im in images]), dtype=torch.float32)
    noise = torch.randn(descriptors.shape, generator=torch.Generator().manual_seed(0))

    def score(x: torch.Tensor) -> RetrievalMetrics:
        ids = pids[is_query], pids[~is_query], camids[is_query], camids[~is_query]
        return evaluate(x[is_query], x[~is_query], *ids)

    rows = [(model, score(descriptors)), ("pixels, pooled to 16x8", score(pixels)), ("chance", score(noise))]
    lines = [f"{num_ids} generated persons, {sum(is_query)} queries, {sum(~is_query)} gallery images, 4 cameras", ""]
    lines += [f"{'descriptor':<36}{'width':>6}{'mAP':>8}{'Rank-1':>8}"]
    for (name, metrics), width in zip(rows, (embed.dim, pixels.shape[1], embed.dim), strict=True):
        lines.append(f"{name:<36}{width:>6}{100 * metrics.mAP:>8.1f}{100 * metrics.rank1:>8.1f}")
    gallery = np.flatnonzero(~is_query)
    best = rank(descriptors[is_query][:SHOWN], descriptors[~is_query], TOPK).indices.numpy()
    with atomic_file(picture) as temporary:
        _draw(images, np.flatnonzero(is_query)[:SHOWN], gallery[best], pids).save(temporary)
    return "\n".join([*lines, "", f"the first {len(best)} queries and their best {best.shape[1]} hits: {picture}"])


def _draw(images: list[Image.Image], queries: np.ndarray, hits: np.ndarray, pids: np.ndarray) -> Image.Image:
    """A row a query: the query, then its hits, framed green where the identity is right and red where not."""
    width, height, gap = 64, 128, 4
    columns, rows = 1 + hits.shape[1], len(queries)
    sheet = Image.new("RGB", (columns * (width + 2 * gap) + 2 * gap, rows * (height + 2 * gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (query, found) in enumerate(zip(queries, hits, strict=True)):
        for column, index in enumerate([query, *found]):
            x = column * (width + 2 * gap) + gap + (2 * gap if column else 0)
            y = row * (height + 2 * gap) + gap
            colour = "black" if not column else "green" if pids[index] == pids[query] else "red"
            draw.rectangle((x - gap + 1, y - gap + 1, x + width + gap - 2, y + height + gap - 2), fill=colour)
            sheet.paste(images[index].resize((width, height)), (x, y))
    return sheet
