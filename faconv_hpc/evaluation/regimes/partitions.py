"""Partitions of times into clusters over a range of K, how steady they are, and which K to take."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, pairwise_distances, silhouette_score
from sklearn.mixture import GaussianMixture

from ...errors import InputError
from .spaces import Metrics

Method = Literal["kmeans", "gmm"]
METHODS: dict[Method, str] = {"kmeans": "k-means", "gmm": "Gaussian mixture"}
KMEANS_STARTS, MIXTURE_STARTS = 10, 3  # of each seed, of which the best is kept
NARROWEST = 1e-6  # of a component's variance, in units of the mean variance: one point alone has none
SURROGATES, CHANCE_PERCENT = 20, 95
SEEDS_AGREE, HALVES_AGREE = 0.9, 0.6  # adjusted Rand indices from which clusters are called steady


@dataclass(frozen=True, eq=False)
class Partition:
    """Of times into clusters.

    Attributes:
        labels_T: from 0, the largest cluster first; some may be missing where a mixture has left them empty.
        seeds_agreement: mean adjusted Rand index of two seeds: 1 where all find the same, 0 where only by chance.
        halves_agreement: adjusted Rand index of what is fitted to the first half of the record and to the second, both
            asked about all times; NaN where a half has fewer times than clusters.
        bic: of a mixture: Bayes' information criterion, lower is better; else NaN.
    """

    method: Method
    clusters: int
    labels_T: NDArray[np.int64]
    seeds_agreement: float
    halves_agreement: float
    bic: float = float("nan")

    @property
    def is_steady(self) -> bool:
        """Whether other seeds and halves of the record find the same, see `SEEDS_AGREE`."""
        return self.seeds_agreement >= SEEDS_AGREE and self.halves_agreement >= HALVES_AGREE


def check_clusters(clusters: Sequence[int], points_TE: NDArray[np.floating], where: str) -> None:
    """Raises InputError unless there are more different points than clusters."""
    different = len(np.unique(points_TE, axis=0))
    if clusters[-1] >= different:
        raise InputError(
            f"{clusters[-1]} clusters need more than {clusters[-1]} different times, {where} has {different}"
            f"{f' among {len(points_TE)}' if different < len(points_TE) else ''}. Ask for fewer with --clusters."
        )


def partitions_of(
    points_TE: NDArray[np.floating],
    method: Method,
    clusters: Sequence[int],
    seeds: int,
    done: Callable[[], None] = lambda: None,
) -> list[Partition]:
    """One for each number of clusters.

    Args:
        seeds: fits from different random starts, of which the best is taken.
        done: is called after each.
    """
    points = np.asarray(points_TE, dtype=np.float64)
    if method == "gmm":  # whose components are ellipsoids along axes: those of all points together
        points = PCA(random_state=0).fit_transform(points)
    found = []
    for count in clusters:
        found.append(_partition(points, method, count, seeds))
        done()
    return found


def _partition(points_TE: NDArray[np.float64], method: Method, clusters: int, seeds: int) -> Partition:
    fits = [_Fit.of(points_TE, method, clusters, seed) for seed in range(seeds)]
    labels = [fit.predict(points_TE) for fit in fits]
    best = int(np.argmax([fit.quality for fit in fits]))
    pairs = [adjusted_rand_score(one, other) for one, other in combinations(labels, 2)]
    half = len(points_TE) // 2
    halves = float("nan")
    if half >= clusters:
        parts = (_Fit.of(part, method, clusters, 0).predict(points_TE) for part in (points_TE[:half], points_TE[half:]))
        halves = float(adjusted_rand_score(*parts))
    agreement = float(np.mean(pairs)) if pairs else 1.0
    return Partition(method, clusters, by_size(labels[best]), agreement, halves, fits[best].bic(points_TE))


@dataclass(frozen=True)
class _Fit:
    """Of one seed; of higher quality is better."""

    model: KMeans | GaussianMixture
    quality: float

    @classmethod
    def of(cls, points_TE: NDArray[np.float64], method: Method, clusters: int, seed: int) -> "_Fit":
        """Fitted."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of seeds that disagree is told
            if method == "kmeans":
                kmeans = KMeans(clusters, n_init=KMEANS_STARTS, random_state=seed).fit(points_TE)
                return cls(kmeans, -float(kmeans.inertia_))
            narrowest = NARROWEST * float(points_TE.var(0).mean())
            mixture = GaussianMixture(
                clusters, covariance_type="diag", n_init=MIXTURE_STARTS, reg_covar=narrowest, random_state=seed
            ).fit(points_TE)
            return cls(mixture, float(mixture.lower_bound_))

    def predict(self, points_TE: NDArray[np.float64]) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = np.asarray(self.model.predict(points_TE), dtype=np.int64)
        return labels

    def bic(self, points_TE: NDArray[np.float64]) -> float:
        return float(self.model.bic(points_TE)) if isinstance(self.model, GaussianMixture) else float("nan")


def by_size(labels_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same clusters, numbered from 0 with the largest first; of equal ones the one that comes first in time."""
    _, first, where, counts = np.unique(labels_T, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    number = np.empty_like(order)
    number[order] = np.arange(order.size)
    return np.asarray(number[where], dtype=np.int64)


@dataclass(frozen=True)
class Suggestion:
    """How many clusters to take.

    Attributes:
        steady: whether any number was, see `Partition.is_steady`.
        reason: a sentence.
    """

    clusters: int
    steady: bool
    reason: str


def silhouettes_of_chance(
    points_TE: NDArray[np.float64], clusters: Sequence[int], progress: Callable[[int, int], None]
) -> dict[int, float]:
    """Silhouettes that k-means finds in noise, by the number of clusters: those that 95 % of `SURROGATES` stay below.

    The noise has the spectrum of the points, their annual cycle included, and their correlations, but no clusters: in
    the Fourier transform along time all components get the same random phases (Prichard and Theiler, 1994). Times count
    as evenly spaced.
    """
    random = np.random.default_rng(0)
    found: dict[int, list[float]] = {count: [] for count in clusters}
    for number in range(SURROGATES):
        noise_TE = _surrogate(points_TE, random)
        distances_TT = pairwise_distances(noise_TE)
        for count in clusters:
            labels_T = _Fit.of(noise_TE, "kmeans", count, number).predict(noise_TE)
            found[count].append(float(silhouette_score(distances_TT, labels_T, metric="precomputed")))
        progress(number + 1, SURROGATES)
    return {count: float(np.percentile(values, CHANCE_PERCENT)) for count, values in found.items()}


def _surrogate(points_TE: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    waves_FE = np.fft.rfft(points_TE, axis=0)
    phases_F = random.uniform(0, 2 * np.pi, len(waves_FE))
    phases_F[0] = 0.0  # the mean stays
    if len(points_TE) % 2 == 0:
        phases_F[-1] = 0.0  # as its wave is real
    return np.fft.irfft(waves_FE * np.exp(1j * phases_F)[:, None], n=len(points_TE), axis=0)


def suggest(partitions: Sequence[Partition], metrics: Mapping[int, Metrics], chance: Mapping[int, float]) -> Suggestion:
    """Of the numbers of clusters that other seeds and halves of the record find again, and that are farther apart
    (silhouette) than those of noise, the one whose clusters are farthest apart. Where there is none, the one that
    halves find again best.

    Args:
        partitions: of one method.
        metrics: in the space that they were found in, by their numbers of clusters.
        chance: see `silhouettes_of_chance`.
    """
    steady = [one for one in partitions if one.is_steady and metrics[one.clusters].silhouette > chance[one.clusters]]
    bounds = (
        f"seeds agree to at least {SEEDS_AGREE:g}, halves of the record to {HALVES_AGREE:g}, and the silhouette is "
        f"higher than in noise"
    )
    if steady:
        best = max(steady, key=lambda one: metrics[one.clusters].silhouette)
        among = ", ".join(str(one.clusters) for one in steady)
        more = " It is the largest number that was tried: try more." if best is partitions[-1] else ""
        return Suggestion(
            best.clusters, True,
            f"Of the numbers whose clusters are found again ({bounds}: K = {among}), {best.clusters} has the highest "
            f"silhouette, {metrics[best.clusters].silhouette:.3f}.{more}",
        )  # fmt: skip
    best = max(partitions, key=lambda one: (np.nan_to_num(one.halves_agreement, nan=-1), one.seeds_agreement))
    return Suggestion(
        best.clusters, False,
        f"No number of clusters meets all of it ({bounds}): these are no regimes beyond doubt, but parts of a cloud. "
        f"K = {best.clusters} is found again best: seeds agree to {best.seeds_agreement:.2f}, halves to "
        f"{best.halves_agreement:.2f}, and its silhouette is {metrics[best.clusters].silhouette:.3f}, in noise "
        f"{chance[best.clusters]:.3f}.",
    )  # fmt: skip
