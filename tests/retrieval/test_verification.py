"""Error rates by threshold: cases worked out by hand, scikit-learn's values, and what must hold for any descriptors."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from passreid_models.retrieval import ROC, roc
from passreid_models.retrieval.verification import BINS

WIDTH = (2 + 2**-18) / BINS  # of a bin of cosines
NAN = float("nan")


def at(cosines: list[float]) -> Tensor:
    """Unit vectors of the plane with these cosines to (1, 0)."""
    x = torch.tensor(cosines, dtype=torch.float64)
    return torch.stack([x, (1 - x * x).sqrt()], dim=1).float()


def by_hand(positives: list[float], negatives: list[float]) -> ROC:
    pids = [1] * len(positives) + [2] * len(negatives)
    return roc(at([1.0]), at(positives + negatives), [1], pids)


def noisy(seed: int, count: int = 400, width: int = 16) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Queries and gallery of 20 persons, and their identities."""
    rng = np.random.default_rng(seed)
    pids = rng.integers(1, 21, count)
    x = rng.standard_normal((21, width))[pids] + rng.standard_normal((count, width))
    x = torch.from_numpy(x).float()
    return x[:100], x[100:], pids[:100], pids[100:]


# ---- By hand


def test_rates_of_pairs_counted_by_hand():
    result = by_hand([0.9, 0.7, 0.3], [0.8, 0.2, 0.1, 0.0])
    assert (result.num_positives, result.num_negatives) == (3, 4)
    assert result.rates(0.95) == (0, 0)
    assert result.rates(0.85) == (0, 1 / 3)
    assert result.rates(0.75) == (1 / 4, 1 / 3)
    assert result.rates(0.5) == (1 / 4, 2 / 3)
    assert result.rates(0.25) == (1 / 4, 1)
    assert result.rates(-1) == (1, 1)
    assert result.rates(2) == (0, 0)


def test_the_threshold_for_a_rate_is_just_above_the_first_negative_too_many():
    result = by_hand([0.9, 0.7, 0.3], [0.8, 0.2, 0.1, 0.0])
    assert result.threshold(0) == pytest.approx(0.8, abs=1.1 * WIDTH)
    assert result.threshold(0.25) == pytest.approx(0.2, abs=1.1 * WIDTH)
    assert result.threshold(0.49) == result.threshold(0.25)
    assert result.threshold(1) == -1
    for fpr in (0, 0.25, 0.5, 0.75):
        assert result.rates(result.threshold(fpr))[0] == fpr
        assert result.rates(result.threshold(fpr) - WIDTH)[0] > fpr


def test_a_rate_below_one_negative_has_no_true_positive_rate():
    result = by_hand([0.9, 0.7, 0.3], [0.8, 0.2, 0.1, 0.0])
    assert result.tpr_at(0.25) == 1
    assert math.isnan(result.tpr_at(0.24))
    assert by_hand([0.9, 0.3], [0.8] * 10).tpr_at(0.1) == 0.5


def test_rates_are_equal_where_the_curves_of_both_errors_cross():
    # at a threshold between 0.3 and 0.8 one of 3 positives fails and one of 3 negatives passes
    result = by_hand([0.9, 0.8, 0.3], [0.8001, 0.2, 0.1])
    assert result.eer == pytest.approx(1 / 3)
    assert result.eer_threshold == pytest.approx(0.55, abs=2 * WIDTH)


def test_a_crossing_between_two_thresholds_is_interpolated():
    # false negatives 0 -> 1/2 and false positives 1/3 stays, across the positive at 0.5: they meet at 1/3
    result = by_hand([0.9, 0.5], [0.7, 0.2, 0.1])
    assert result.eer == pytest.approx(1 / 3)
    assert result.eer_threshold == pytest.approx(0.5, abs=2 * WIDTH)


def test_pairs_that_can_be_told_apart_have_no_error_and_a_threshold_in_the_middle():
    result = by_hand([0.9, 0.8], [0.4, 0.1])
    assert result.eer == 0
    assert result.eer_threshold == pytest.approx(0.6, abs=2 * WIDTH)
    assert result.tpr_at(0.5) == 1


def test_what_the_evaluation_leaves_out_is_no_pair():
    # left out: row 0 the own image, row 1 the same person and camera, row 2 junk; row 5 is a distractor
    gallery, pids, cams = at([1.0, 0.9, 0.8, 0.7, 0.6, 0.5]), [1, 1, -1, 1, 2, 0], [1, 0, 1, 1, 0, 1]
    result = roc(at([1.0, 1.0]), gallery, [1, -1], pids, [0, 0], cams, own=[0, -1])
    assert (result.num_positives, result.num_negatives) == (1, 2)
    assert result.rates(0.65) == (0, 1)
    assert result.rates(0.55) == (0.5, 1)


def test_pairs_of_images_whose_descriptor_is_not_finite_are_left_out_and_the_images_counted():
    unreadable = torch.full((2, 2), NAN)
    query, gallery = torch.cat([unreadable[:1], at([1.0])]), torch.cat([at([0.9, -0.99]), unreadable])
    result = roc(query, gallery, [1, 1], [1, 2, 1, 2])
    assert (result.num_positives, result.num_negatives, result.num_not_finite) == (1, 1, 3)
    assert result.rates(0) == (0, 1)
    assert result.rates(-0.995) == (1, 1)


# ---- Another implementation, and properties


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("seed", range(3))
def test_rates_are_those_of_scikit_learn(seed, metric):
    curve = pytest.importorskip("sklearn.metrics").roc_curve
    query, gallery, q_pids, g_pids = noisy(seed)
    if metric == "cosine":
        query, gallery = (torch.nn.functional.normalize(x, dim=1) for x in (query, gallery))
    similarities = query @ gallery.T if metric == "cosine" else -torch.cdist(query, gallery).square()
    fpr, tpr, thresholds = curve((q_pids[:, None] == g_pids).ravel(), similarities.flatten().double().numpy())
    result = roc(query, gallery, q_pids, g_pids, metric=metric)
    width = -result._edges[0] / BINS if metric == "euclidean" else WIDTH
    inner = slice(1, None, 37)
    # rounding may move a pair to the next bin: its rate lies between those of thresholds some widths apart
    lower = np.array([result.rates(t - 3 * width) for t in thresholds[inner]])
    upper = np.array([result.rates(t + 3 * width) for t in thresholds[inner]])
    expected = np.stack([fpr, tpr], axis=1)[inner]
    assert (upper <= expected).all()
    assert (expected <= lower).all()
    assert np.abs(lower - upper).max() < 0.003  # 300 positives: hardly more than one of them between
    crossing = np.argmin(np.abs(fpr - (1 - tpr)))
    assert result.eer == pytest.approx((fpr[crossing] + 1 - tpr[crossing]) / 2, abs=0.003)
    assert result.eer_threshold == pytest.approx(thresholds[crossing], abs=0.01 * abs(float(similarities.std())))


@pytest.mark.parametrize("budget_mb", [1e-6, 0.1])
def test_rates_do_not_depend_on_the_budget(budget_mb):
    query, gallery, q_pids, g_pids = noisy(0)
    data = query[:30], gallery, q_pids[:30], g_pids
    whole, parts = roc(*data), roc(*data, budget_mb=budget_mb)
    assert (parts.num_positives, parts.num_negatives) == (whole.num_positives, whole.num_negatives)
    assert parts.eer == pytest.approx(whole.eer, abs=1e-4)
    assert np.abs(parts._positives - whole._positives).max() <= 3  # the last bit of a product may differ
    assert np.abs(parts._negatives - whole._negatives).max() <= 3


def test_rates_do_not_depend_on_the_order_of_the_gallery():
    query, gallery, q_pids, g_pids = noisy(1)
    order = np.random.default_rng(0).permutation(len(g_pids))
    whole, permuted = roc(query, gallery, q_pids, g_pids), roc(query, gallery[order], q_pids, g_pids[order])
    assert permuted.eer == pytest.approx(whole.eer, abs=1e-4)
    assert permuted.threshold(0.01) == pytest.approx(whole.threshold(0.01), abs=1e-4)


def test_the_curve_rises_from_zero_to_one_within_a_plots_size_and_keeps_small_rates():
    result = roc(*noisy(2))
    assert (result.fpr[0], result.tpr[0], result.fpr[-1], result.tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(result.fpr) >= 0).all()
    assert (np.diff(result.tpr) >= 0).all()
    assert (np.diff(result.thresholds) < 0).all()
    assert 100 < len(result.fpr) < 1100
    assert result.fpr[result.fpr > 0].min() == 1 / result.num_negatives
    for fpr, tpr, threshold in list(zip(result.fpr, result.tpr, result.thresholds, strict=True))[1::50]:
        assert result.rates(threshold) == (fpr, tpr)


def test_the_histograms_hold_every_pair_once():
    result = roc(*noisy(2))
    assert result.positive_histogram.sum() == result.num_positives
    assert result.negative_histogram.sum() == result.num_negatives
    assert len(result.histogram_edges) == len(result.positive_histogram) + 1
    centres = (result.histogram_edges[1:] + result.histogram_edges[:-1]) / 2
    mean_positive = (centres * result.positive_histogram).sum() / result.num_positives
    assert mean_positive > (centres * result.negative_histogram).sum() / result.num_negatives + 0.2


# ---- Errors


@pytest.mark.parametrize(("pids", "missing"), [([2, 3], "one identity"), ([1, 1], "two identities")])
def test_pairs_of_one_kind_only_are_refused_with_what_is_missing(pids, missing):
    with pytest.raises(ValueError, match=f"there are none of {missing}"):
        roc(at([1.0]), at([0.5, 0.4]), [1], pids)


@pytest.mark.parametrize("fpr", [-0.1, 1.1, NAN])
def test_rates_outside_0_to_1_are_refused(fpr):
    result = by_hand([0.9], [0.1])
    for method in (result.threshold, result.tpr_at):
        with pytest.raises(ValueError, match=r"fpr must be in 0\.\.1"):
            method(fpr)


def test_no_threshold_up_to_one_leaves_out_equal_images():
    x = torch.eye(2)
    result = roc(x[:1], x[[0, 0, 1]], [1], [1, 2, 2])  # a copy under another identity
    assert result.rates(1 - WIDTH) == (0.5, 1.0)
    assert result.threshold(0) > 1
    assert result.rates(result.threshold(0)) == (0.0, 0.0)
