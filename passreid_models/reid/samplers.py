"""Batches of identities or clusters with several images each, as functions of seed and epoch.

Every function returns the batches of one epoch, each an array of image indices ``[groups, images of a group]``; the
images of a group share an identity or cluster. There is no state: a resumed run draws the batches of an uninterrupted
one.
"""

import numpy as np

__all__ = ["camera_batches", "count_identity_batches", "identity_batches", "shuffled_batches"]

Batches = list[np.ndarray]
IDENTITIES, CHUNKS, CLUSTERS, SHUFFLE = 11, 12, 13, 14  # purposes of a seed; pre-training has others
MAX_GONE = 1024  # identities without images left that a draw passes over


def identity_batches(pids: np.ndarray, num_ids: int, num_images: int, seed: int, epoch: int) -> Batches:
    """Batches of P identities with K images each (arXiv 1703.07737), as drawn by TransReID's sampler.

    The shuffled images of an identity are cut into chunks of K, and the rest is dropped; an identity with fewer than K
    images has one chunk, drawn with replacement. The epoch ends when fewer than P identities have chunks left.

    Args:
        pids: Identities ``[N]``.
        num_ids: Identities in a batch, P.
        num_images: Images of each identity, K.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Returns:
        Arrays ``[P, K]`` of image indices.

    Raises:
        ValueError: If there are fewer than P identities.
    """
    by_pid = _images_of(pids)
    rng = np.random.default_rng((seed, epoch, CHUNKS))
    chunks = []
    for images in by_pid:
        order = rng.permutation(images) if len(images) >= num_images else rng.choice(images, num_images)
        chunks.append(order[: len(order) // num_images * num_images].reshape(-1, num_images))
    next_chunk = np.zeros(len(by_pid), dtype=np.int64)
    batches = []
    for identities in _draw_identities(by_pid, num_ids, num_images, seed, epoch):
        batches.append(np.stack([chunks[i][next_chunk[i]] for i in identities]))
        next_chunk[identities] += 1
    return batches


def count_identity_batches(pids: np.ndarray, num_ids: int, num_images: int, seed: int, epochs: int) -> list[int]:
    """Number of batches in each epoch, which depends on the draw."""
    by_pid = _images_of(pids)
    return [len(_draw_identities(by_pid, num_ids, num_images, seed, epoch)) for epoch in range(epochs)]


def _draw_identities(by_pid: list[np.ndarray], num_ids: int, num_images: int, seed: int, epoch: int) -> Batches:
    """Draw the identities of each batch, as indices of ``by_pid``."""
    if len(by_pid) < num_ids:
        raise ValueError(f"ids_per_batch: {num_ids} is more than the {len(by_pid)} identities of the training set")
    rng = np.random.default_rng((seed, epoch, IDENTITIES))
    chunks_left = np.array([max(1, len(images) // num_images) for images in by_pid])
    # available are kept[] without the places in gone, in order: to list them for each batch takes hours for millions
    batches, kept, gone = [], np.arange(len(by_pid)), np.empty(0, dtype=np.int64)
    while (count := len(kept) - len(gone)) >= num_ids:
        places = rng.choice(count, num_ids, replace=False)  # draws as a choice from the available ones does
        places += np.searchsorted(gone - np.arange(len(gone)), places, side="right")
        identities = kept[places]
        batches.append(identities)
        chunks_left[identities] -= 1
        gone = np.sort(np.concatenate([gone, places[chunks_left[identities] == 0]]))
        if len(gone) >= MAX_GONE:
            kept, gone = np.delete(kept, gone), gone[:0]
    return batches


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int) -> Batches:
    """Batches of every image once, in random order; a last batch that is not full is dropped.

    Args:
        count: Number of images, N.
        batch_size: Images in a batch, B.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Returns:
        Arrays ``[B, 1]`` of image indices.

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
    """Batches of clusters, each an anchor and images from other cameras, as drawn by Cluster Contrast's sampler.

    The other images are drawn with replacement if there are fewer than wanted (the published code also does where there
    are exactly as many), and from the anchor's own camera if the cluster has no other one, or cameras are unknown.
    Clusters come in random order, round after round; the rest of a round that fills no batch is dropped. With fewer
    clusters than ``num_clusters``, every batch has all of them.

    Args:
        labels: Clusters ``[N]``; -1 is an outlier, which is in no batch.
        camids: Cameras ``[N]``; all equal if they are unknown.
        num_clusters: Clusters in a batch.
        num_images: Images of each cluster.
        steps: Number of batches.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Returns:
        Arrays ``[clusters, num_images]`` of image indices.

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
    """Draw an anchor and ``count - 1`` other images of a cluster."""
    anchor = rng.choice(images)
    candidates = images[camids[images] != camids[anchor]]
    if not len(candidates):
        candidates = images[images != anchor] if len(images) > 1 else images
    others = rng.choice(candidates, count - 1, replace=len(candidates) < count - 1)
    return np.concatenate([[anchor], others])


def _images_of(labels: np.ndarray) -> Batches:
    """Images of each label from 0 on, in the order of the labels."""
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    return np.split(order, starts[1:]) if len(order) else []
