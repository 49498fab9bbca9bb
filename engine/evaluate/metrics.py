"""Retrieval scores, what chance gets, and what a perfect reader could get.

Q = queries, N = items of the gallery. Ranks count from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

CUTOFFS = (1, 5, 10)


def cosine_similarity(queries_QD: np.ndarray, gallery_ND: np.ndarray) -> np.ndarray:
    """(Q, N) cosines in float64; the root of the squared norm has 1e-12 under it, as in the released code."""
    return _normalised(queries_QD) @ _normalised(gallery_ND).T


def ranks(similarity_QN: np.ndarray, target_Q: np.ndarray) -> np.ndarray:
    """int64 (Q,): the place, from 1, of each query's true item `target_Q` when the gallery is sorted by similarity.

    Among equals the earlier item comes first: this is the released code's sort, and with the true items spread over the
    gallery a model that says the same of everything scores like chance, neither better nor worse.

    Raises ValueError if a similarity is not a number: it would compare as lower than everything and look like success.
    """
    bad = int(np.isnan(similarity_QN).any(axis=1).sum())
    if bad:
        raise ValueError(f"similarity: {bad} of {len(similarity_QN)} queries have similarities that are NaN")
    target_Q = np.asarray(target_Q)
    own_Q1 = np.take_along_axis(similarity_QN, target_Q[:, None], axis=1)
    earlier_QN = np.arange(similarity_QN.shape[1]) < target_Q[:, None]
    before_QN = (similarity_QN > own_Q1) | ((similarity_QN == own_Q1) & earlier_QN)
    return 1 + before_QN.sum(axis=1, dtype=np.int64)


def retrieval_metrics(ranks_Q: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 (fractions of queries whose true item is that near the top) and the median rank; NaN without queries."""
    if len(ranks_Q) == 0:
        return {**{f"R@{k}": float("nan") for k in CUTOFFS}, "median_rank": float("nan")}
    return {**{f"R@{k}": float(np.mean(ranks_Q <= k)) for k in CUTOFFS}, "median_rank": float(np.median(ranks_Q))}


def chance(gallery: int) -> dict[str, float]:
    """Expected scores of a random order of `gallery` items."""
    if gallery == 0:
        return retrieval_metrics(np.empty(0))
    return {**{f"R@{k}": min(k, gallery) / gallery for k in CUTOFFS}, "median_rank": (gallery + 1) / 2}


def oracle(query_keys: Sequence[Hashable], gallery_keys: Sequence[Hashable]) -> dict[str, float]:
    """Expected scores of a perfect reader that sees keys only, and orders items of equal keys at random.

    A query whose key g items of the gallery share finds its own among the first k with probability min(k, g) / g. The
    median rank is the lower median of the ranks' joint distribution. Raises ValueError for a key no item has.
    """
    sizes = Counter(gallery_keys)
    absent = [key for key in query_keys if key not in sizes]
    if absent:
        raise ValueError(f"oracle: no item of the gallery has the key {absent[0]!r}")
    if not query_keys:
        return retrieval_metrics(np.empty(0))
    shared = np.array([sizes[key] for key in query_keys])
    scores = {f"R@{k}": float(np.mean(np.minimum(k, shared) / shared)) for k in CUTOFFS}
    reached = [float(np.mean(np.minimum(rank, shared) / shared)) for rank in range(1, int(shared.max()) + 1)]
    return {**scores, "median_rank": float(1 + np.argmax(np.array(reached) >= 0.5))}


def _normalised(x_ND: np.ndarray) -> np.ndarray:
    x_ND = np.asarray(x_ND, dtype=np.float64)
    return x_ND / np.sqrt(np.maximum((x_ND**2).sum(axis=1, keepdims=True), 1e-12))
