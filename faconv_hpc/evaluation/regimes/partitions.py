"""Partitions of times into clusters over a range of K, how steady they are, and which K to take."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

Method = Literal["kmeans", "gmm"]
METHODS: dict[Method, str] = {"kmeans": "k-means", "gmm": "Gaussian mixture"}
SCORES: dict[Method, str] = {"kmeans": "silhouette", "gmm": "log-likelihood over that of noise"}
"""What tells clusters from noise: the mean over times, higher is better."""
STARTS = 10  # of each seed, of which the best is kept
NARROWEST = 1e-6  # of a mixture's variance along any axis, in units of the points'
ROUNDING = 1e-9  # of the largest deviation along an axis: what varies less does not count as varying
LEAST_TIMES = 100  # of which a mixture's clusters are regimes
TIMES_PER_DIM = 10  # a mixture knows that many for each dim of its points, or takes fewer dims
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
        likelihood, bic: of a mixture: the mean log-likelihood of a time, higher is better, and Bayes' information
            criterion, lower is better; else NaN.
    """

    method: Method
    clusters: int
    labels_T: NDArray[np.int64]
    seeds_agreement: float
    halves_agreement: float
    likelihood: float = float("nan")
    bic: float = float("nan")

    @property
    def is_steady(self) -> bool:
        """Whether other seeds and halves of the record find the same, see `SEEDS_AGREE`."""
        return self.seeds_agreement >= SEEDS_AGREE and self.halves_agreement >= HALVES_AGREE


def check_clusters(clusters: Sequence[int], points_TE: NDArray[np.floating], where: str) -> None:
    """Raises InputError unless there is a different point for each cluster, and some cluster has several."""
    times, different, most = len(points_TE), len(np.unique(points_TE, axis=0)), clusters[-1]
    if most > different:
        told = f"{different} among {times}" if different < times else str(times)
        raise InputError(
            f"{most} clusters need {most} different times at least, {where} has {told}. Ask for fewer with --clusters."
        )
    if most >= times:
        raise InputError(
            f"{most} clusters need more than {most} times, or each is a cluster of its own: {where} has {times}. Ask "
            f"for fewer with --clusters."
        )


def check_mixture(times: int, where: str) -> None:
    """Raises InputError for so few times that a mixture would find clusters in noise, and find them again."""
    if times < LEAST_TIMES:
        raise InputError(
            f"regimes by a mixture (--method gmm) need at least {LEAST_TIMES} times, {where} has {times}. Take those "
            f"of k-means, or embed more times."
        )


def dims_of(method: Method, points_TE: NDArray[np.floating]) -> int:
    """Along how many axes points are clustered: those of most variance, of a mixture as many as times tell."""
    most = int(points_TE.shape[1])
    return most if method == "kmeans" else min(max(len(points_TE) // TIMES_PER_DIM, 1), most)


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
    points, found = axes_for(method, points_TE)(points_TE), []
    for count in clusters:
        found.append(_partition(points, method, count, seeds))
        done()
    return found


def axes_for(method: Method, points_TE: NDArray[np.floating]) -> Callable[[NDArray[np.floating]], NDArray[np.float64]]:
    """What gives points as the method takes them that is fitted to these: a mixture about their mean, along the axes of
    most variance, fewer where times are few."""
    if method == "kmeans":
        return partial(np.asarray, dtype=np.float64)
    pca = PCA(dims_of(method, points_TE), random_state=0).fit(points_TE)
    fitted: Callable[[NDArray[np.floating]], NDArray[np.float64]] = pca.transform
    return fitted


def _partition(points_TE: NDArray[np.float64], method: Method, clusters: int, seeds: int) -> Partition:
    fits = [Fit.of(points_TE, method, clusters, seed) for seed in range(seeds)]
    labels = [fit.predict(points_TE) for fit in fits]
    best = max(range(seeds), key=lambda seed: fits[seed].quality)
    pairs = [adjusted_rand_score(one, other) for one, other in combinations(labels, 2)]
    half = len(points_TE) // 2
    halves = float("nan")
    if half >= clusters:
        parts = (Fit.best(part, method, clusters, seeds) for part in (points_TE[:half], points_TE[half:]))
        halves = float(adjusted_rand_score(*(part.predict(points_TE) for part in parts)))
    agreement = float(np.mean(pairs)) if pairs else 1.0
    return Partition(method, clusters, by_size(labels[best]), agreement, halves, *fits[best].told(points_TE))


@dataclass(frozen=True, eq=False)
class _Mixture:
    """Of components that have one covariance in common, fitted where points vary alike along all axes.

    Attributes:
        model: of points less ``centre_E``, over ``scale_E``.
    """

    model: GaussianMixture
    centre_E: NDArray[np.float64]
    scale_E: NDArray[np.float64]

    @classmethod
    def fit(cls, points_TE: NDArray[np.float64], clusters: int, seed: int) -> "_Mixture":
        """The likeliest of several starts: k-means of axes from as they are to all alike, as clusters may lie apart
        along those that vary most, or little."""
        spread_E = points_TE.std(0)
        scale_E = np.maximum(spread_E, ROUNDING * spread_E.max()) if spread_E.any() else np.ones_like(spread_E)
        centre_E = points_TE.mean(0)
        alike_TE, fits = (points_TE - centre_E) / scale_E, []
        for start in range(STARTS):
            stretch_E = (scale_E / scale_E.max()) ** (1 - start / (STARTS - 1))
            near = KMeans(clusters, n_init=1, random_state=seed * STARTS + start).fit(alike_TE * stretch_E)
            means_KE = near.cluster_centers_ / stretch_E
            rest_TE = alike_TE - means_KE[near.labels_]
            within_EE = rest_TE.T @ rest_TE / len(rest_TE) + NARROWEST * np.eye(len(scale_E))
            counts_K = np.bincount(near.labels_, minlength=clusters) + NARROWEST
            mixture = GaussianMixture(
                clusters, covariance_type="tied", reg_covar=NARROWEST, means_init=means_KE,
                precisions_init=np.linalg.inv(within_EE), weights_init=counts_K / counts_K.sum(),
            )  # fmt: skip
            fits.append(mixture.fit(alike_TE))
        return cls(max(fits, key=lambda one: one.lower_bound_), centre_E, scale_E)

    def alike(self, points_TE: NDArray[np.float64]) -> NDArray[np.float64]:
        """As the model takes them."""
        moved: NDArray[np.float64] = (points_TE - self.centre_E) / self.scale_E
        return moved

    def predict(self, points_TE: NDArray[np.float64]) -> NDArray[np.int64]:
        """Their components."""
        labels: NDArray[np.int64] = self.model.predict(self.alike(points_TE))
        return labels

    def likelihood(self, points_TE: NDArray[np.float64]) -> float:
        """Mean log-likelihood, of points as they are given."""
        return float(self.model.score(self.alike(points_TE)) - np.log(self.scale_E).sum())

    def bic(self, points_TE: NDArray[np.float64]) -> float:
        """Bayes' information criterion."""
        return float(self.model.bic(self.alike(points_TE)) + 2 * len(points_TE) * np.log(self.scale_E).sum())


@dataclass(frozen=True)
class Fit:
    """Of one seed; of higher quality is better."""

    model: KMeans | _Mixture
    quality: float

    @classmethod
    def of(cls, points_TE: NDArray[np.float64], method: Method, clusters: int, seed: int) -> "Fit":
        """Fitted."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of seeds that disagree is told
            if method == "kmeans":
                kmeans = KMeans(clusters, n_init=STARTS, random_state=seed).fit(points_TE)
                return cls(kmeans, -float(kmeans.inertia_))
            mixture = _Mixture.fit(points_TE, clusters, seed)
            return cls(mixture, float(mixture.model.lower_bound_))

    @classmethod
    def best(cls, points_TE: NDArray[np.float64], method: Method, clusters: int, seeds: int) -> "Fit":
        """Of several seeds."""
        return max((cls.of(points_TE, method, clusters, seed) for seed in range(seeds)), key=lambda fit: fit.quality)

    def predict(self, points_TE: NDArray[np.float64]) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = np.asarray(self.model.predict(points_TE), dtype=np.int64)
        return labels

    def told(self, points_TE: NDArray[np.float64]) -> tuple[float, float]:
        """Likelihood and criterion, see `Partition`."""
        if isinstance(self.model, KMeans):
            return float("nan"), float("nan")
        return self.model.likelihood(points_TE), self.model.bic(points_TE)


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


@dataclass(frozen=True)
class Standing:
    """How far clusters of a number stand out of noise.

    Attributes:
        score: see `SCORES`.
        chance: the score that 95 % of noise stays below.
        alike: where it is the highest, the fewest clusters are taken whose score is lower by no more.
    """

    score: float
    chance: float
    alike: float = 0.0

    @classmethod
    def of(cls, method: Method, own: float, noise_S: NDArray[np.float64]) -> "Standing":
        """Of a silhouette; or of a likelihood, which rises with every cluster, in noise as well: what counts is how
        much more it has risen (after the gap statistic of Tibshirani, Walther and Hastie, 2001)."""
        high = float(np.percentile(noise_S, CHANCE_PERCENT, method="higher"))
        if method == "kmeans":
            return cls(own, high)
        usual = float(noise_S.mean())
        return cls(own - usual, high - usual, alike=high - usual)


def standings_of(
    points_TE: NDArray[np.float64], method: Method, clusters: Sequence[int], progress: Callable[[int, int], None]
) -> dict[int, Standing]:
    """Clusters of points beside those of `SURROGATES`, found in the same way, by their number.

    The noise has the spectrum of the points, their annual cycle included, and their correlations, but no clusters: in
    the Fourier transform along time all components get the same random phases (Prichard and Theiler, 1994). Times count
    as evenly spaced. Its values are spread as Gaussian ones are: a cloud that is skewed or curved is likelier as a
    mixture than noise is, too, whatever clusters it has.
    """
    random, points = np.random.default_rng(0), axes_for(method, points_TE)(points_TE)
    found: dict[int, list[float]] = {count: [] for count in clusters}
    for number in range(1 + SURROGATES):
        series_TE = _surrogate(points, random) if number else points
        for count, score in zip(clusters, _scores(series_TE, method, clusters), strict=True):
            found[count].append(score)
        progress(number, SURROGATES)
    return {count: Standing.of(method, own, np.array(noise)) for count, (own, *noise) in found.items()}


def _scores(points_TE: NDArray[np.float64], method: Method, clusters: Sequence[int]) -> list[float]:
    """Silhouettes of k-means, likelihoods of mixtures."""
    fits = [Fit.of(points_TE, method, count, 0) for count in clusters]
    if method == "gmm":
        return [fit.told(points_TE)[0] for fit in fits]
    distances_TT = pairwise_distances(points_TE)
    return [float(silhouette_score(distances_TT, fit.predict(points_TE), metric="precomputed")) for fit in fits]


def _surrogate(points_TE: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    waves_FE = np.fft.rfft(points_TE, axis=0)
    phases_F = random.uniform(0, 2 * np.pi, len(waves_FE))
    phases_F[0] = 0.0  # the mean stays
    if len(points_TE) % 2 == 0:
        phases_F[-1] = 0.0  # as its wave is real
    return np.fft.irfft(waves_FE * np.exp(1j * phases_F)[:, None], n=len(points_TE), axis=0)


def suggest(partitions: Sequence[Partition], standings: Mapping[int, Standing]) -> Suggestion:
    """Of the numbers of clusters that other seeds and halves of the record find again, and that have a higher score
    than those of noise, the one of the highest; or of fewer clusters, if by chance it might have it. Where there is
    none, the one that halves find again best.

    Args:
        partitions: of one method.
        standings: by their numbers of clusters.
    """
    steady = [
        one for one in partitions if one.is_steady and standings[one.clusters].score > standings[one.clusters].chance
    ]
    what = SCORES[partitions[0].method]
    bounds = (
        f"seeds agree to at least {SEEDS_AGREE:g}, halves of the record to {HALVES_AGREE:g}, and the {what} is higher "
        f"than {CHANCE_PERCENT} % of noise has it"
    )
    if steady:
        highest = max(steady, key=lambda one: standings[one.clusters].score)
        top = standings[highest.clusters]
        best = next(one for one in steady if standings[one.clusters].score >= top.score - top.alike)
        among, more = ", ".join(str(one.clusters) for one in steady), ""
        if highest is partitions[-1]:
            last = "It is" if best is highest else f"{highest.clusters} has {top.score:.3f} and is"
            more = f" {last} the largest number that was tried: try more."
        return Suggestion(
            best.clusters, True,
            f"Of the numbers whose clusters are found again ({bounds}: K = {among}), {best.clusters} "
            f"{'has the highest' if best is highest else 'is the first that has about the highest'} "
            f"{what}, {standings[best.clusters].score:.3f}.{more}",
        )  # fmt: skip
    best = max(partitions, key=lambda one: (np.nan_to_num(one.halves_agreement, nan=-1), one.seeds_agreement))
    halves = f"halves to {best.halves_agreement:.2f}"
    if np.isnan(best.halves_agreement):
        halves = "halves have fewer times than clusters"
    return Suggestion(
        best.clusters, False,
        f"No number of clusters meets all of it ({bounds}): these are no regimes beyond doubt, but parts of a cloud. "
        f"K = {best.clusters} is found again best: seeds agree to {best.seeds_agreement:.2f}, {halves}, and its "
        f"{what} is {standings[best.clusters].score:.3f}, in noise {standings[best.clusters].chance:.3f}.",
    )  # fmt: skip
