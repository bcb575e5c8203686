"""Which images make a batch: identities or clusters with several images each, as a function of seed and epoch.

Every function gives the batches of one epoch, each an array of images ``[groups, images of a group]``; images of a
group are of one identity or cluster. No state: a resumed run draws what it would have drawn.
"""

import numpy as np

__all__ = ["camera_batches", "count_identity_batches", "identity_batches", "shuffled_batches"]

Batches = list[np.ndarray]
IDENTITIES, CHUNKS, CLUSTERS, SHUFFLE = 11, 12, 13, 14  # what a seed is for; other than those of the pre-training


def identity_batches(pids: np.ndarray, num_ids: int, num_images: int, seed: int, epoch: int) -> Batches:
    """P identities with K images each (arXiv 1703.07737), the sampler of TransReID.

    The shuffled images of an identity are cut into chunks of K, the rest is dropped; identities with fewer than K are
    drawn with replacement. Identities are drawn until fewer than P have chunks left.

    Args:
        pids: Identities ``[N]``.
        num_ids: Identities in a batch, P.
        num_images: Images of each, K.
        seed: Of the run.
        epoch: Number of the epoch.

    Returns:
        Arrays ``[P, K]`` of image numbers.

    Raises:
        ValueError: If there are fewer than P identities.
    """
    by_pid = _images_of(pids)
    rng = np.random.default_rng((seed, epoch, CHUNKS))
    chunks = []
    for images in by_pid:
        order = rng.permutation(images) if len(images) >= num_images else rng.choice(images, num_images)
        chunks.append(order[: len(order) // num_images * num_images].reshape(-1, num_images))
    taken = np.zeros(len(by_pid), dtype=np.int64)
    batches = []
    for chosen in _draw_identities(by_pid, num_ids, num_images, seed, epoch):
        batches.append(np.stack([chunks[i][taken[i]] for i in chosen]))
        taken[chosen] += 1
    return batches


def count_identity_batches(pids: np.ndarray, num_ids: int, num_images: int, seed: int, epochs: int) -> list[int]:
    """Number of batches of each epoch: it depends on what is drawn."""
    by_pid = _images_of(pids)
    return [len(_draw_identities(by_pid, num_ids, num_images, seed, epoch)) for epoch in range(epochs)]


def _draw_identities(by_pid: list[np.ndarray], num_ids: int, num_images: int, seed: int, epoch: int) -> Batches:
    """Identities of each batch, as numbers into ``by_pid``."""
    if len(by_pid) < num_ids:
        raise ValueError(f"ids_per_batch: {num_ids} is more than the {len(by_pid)} identities of the training set")
    rng = np.random.default_rng((seed, epoch, IDENTITIES))
    left = np.array([max(1, len(images) // num_images) for images in by_pid])  # chunks
    batches, available = [], np.arange(len(by_pid))
    while len(available) >= num_ids:
        chosen = rng.choice(available, num_ids, replace=False)
        batches.append(chosen)
        left[chosen] -= 1
        if not left[chosen].all():
            available = np.flatnonzero(left)
    return batches


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int) -> Batches:
    """Every image once, in random order, without the rest that fills no batch.

    Args:
        count: Images, N.
        batch_size: Images of a batch, B.
        seed: Of the run.
        epoch: Number of the epoch.

    Returns:
        Arrays ``[B, 1]``.

    Raises:
        ValueError: If there are fewer images than a batch takes.
    """
    if count < batch_size:
        raise ValueError(f"a batch takes {batch_size} images, and the training set has {count}")
    order = np.random.default_rng((seed, epoch, SHUFFLE)).permutation(count)
    return list(order[: count // batch_size * batch_size].reshape(-1, batch_size, 1))


def camera_batches(
    labels: np.ndarray, camids: np.ndarray, num_clusters: int, num_images: int, steps: int, seed: int, epoch: int
) -> Batches:
    """Clusters with an anchor each and images of the cluster from other cameras, the sampler of Cluster Contrast.

    The others are drawn with replacement where there are too few, and from the anchor's own camera where there is no
    other, or no camera is known. Clusters come in random order, over and over; the rest of a round that fills no batch
    is dropped. With fewer clusters than a batch takes, a batch has all of them.

    Args:
        labels: Clusters ``[N]``; -1 is an outlier, which is in no batch.
        camids: Cameras ``[N]``; all alike where they are not known.
        num_clusters: Clusters in a batch.
        num_images: Images of each.
        steps: Batches wanted.
        seed: Of the run.
        epoch: Number of the epoch.

    Returns:
        Arrays ``[clusters, num_images]`` of image numbers.

    Raises:
        ValueError: If there is no cluster.
    """
    members = _images_of(labels)
    if not members:
        raise ValueError("all images are outliers: there is no cluster to draw from")
    rng = np.random.default_rng((seed, epoch, CLUSTERS))
    size = min(num_clusters, len(members))
    batches: Batches = []
    while len(batches) < steps:
        order = rng.permutation(len(members))
        for start in range(0, len(order) - size + 1, size):
            groups = [_group(members[k], camids, num_images, rng) for k in order[start : start + size]]
            batches.append(np.stack(groups))
    return batches[:steps]


def _group(images: np.ndarray, camids: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    anchor = rng.choice(images)
    others = images[camids[images] != camids[anchor]]
    if not len(others):
        others = images[images != anchor] if len(images) > 1 else images
    rest = rng.choice(others, count - 1, replace=len(others) < count - 1)
    return np.concatenate([[anchor], rest])


def _images_of(labels: np.ndarray) -> Batches:
    """Images of each label from 0 on, in the order of the labels."""
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    return np.split(order, starts[1:]) if len(order) else []
