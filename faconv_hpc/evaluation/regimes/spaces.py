"""Times as points of a space, and the metrics by which the paper's authors judge clusters of them.

Distances and inner products of points are all that the metrics need, so a space of many features may be given by
coordinates of fewer dims in which these are the same, see `Space.of_products`.
"""

from dataclasses import asdict, dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    calinski_harabasz_score,
    davies_bouldin_score,
    pairwise_distances,
    silhouette_samples,
    silhouette_score,
)

NO_VARIANCE = 1e-12  # of the largest eigenvalue: below it is rounding


@dataclass(frozen=True, eq=False)
class Space:
    """Points, one for each time.

    Attributes:
        name: for people.
        points_TE: float64.
        features: how many values a point stands for.
        sums_T: of the values of each.
    """

    name: str
    points_TE: NDArray[np.float64]
    features: int
    sums_T: NDArray[np.float64]

    @classmethod
    def of(cls, name: str, points_TE: NDArray[np.floating]) -> "Space":
        """Whose values are the coordinates."""
        points = np.asarray(points_TE, dtype=np.float64)
        return cls(name, points, points.shape[1], points.sum(1))

    @classmethod
    def of_products(
        cls, name: str, products_TT: NDArray[np.float64], features: int, sums_T: NDArray[np.float64]
    ) -> "Space":
        """Points with such inner products: their coordinates along the axes in which they differ most, at most as many
        as there are points, however many features they have. Distances, angles and means are those of the features."""
        return cls(name, coordinates_of(products_TT), features, sums_T)

    def at(self, times: slice) -> "Space":
        """Of some times."""
        return Space(self.name, self.points_TE[times], self.features, self.sums_T[times])

    @cached_property
    def distances_TT(self) -> NDArray[np.float64]:
        """Euclidean."""
        return self._distances("euclidean")

    @cached_property
    def cosine_distances_TT(self) -> NDArray[np.float64]:
        """1 minus the cosine of the angle, seen from the point whose values are all 0."""
        return self._distances("cosine")

    def _distances(self, metric: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = pairwise_distances(self.points_TE, metric=metric)
        np.fill_diagonal(found, 0.0)
        return found

    def silhouettes(self, labels_T: NDArray[np.integer]) -> NDArray[np.float64]:
        """(time,) how much nearer each is to its cluster than to the next, from -1 to 1."""
        found: NDArray[np.float64] = silhouette_samples(self.distances_TT, labels_T, metric="precomputed")
        return found


def coordinates_of(products_TT: NDArray[np.float64], most: int | None = None) -> NDArray[np.float64]:
    """(T, E) points with such inner products, along the axes of most variance first; ``most`` of them, or all that are
    not rounding. The largest value along each axis is positive."""
    values_E, axes_TE = np.linalg.eigh((products_TT + products_TT.T) / 2)
    values_E, axes_TE = values_E[::-1], axes_TE[:, ::-1]
    kept = values_E > NO_VARIANCE * max(values_E[0], np.finfo(np.float64).tiny)
    points = axes_TE[:, kept][:, :most] * np.sqrt(values_E[kept][:most])
    largest = np.take_along_axis(points, np.abs(points).argmax(0)[None], axis=0)
    turned: NDArray[np.float64] = points * np.where(largest < 0, -1.0, 1.0)
    return turned


@dataclass(frozen=True)
class Metrics:
    """How far apart clusters are; NaN where there are fewer than two.

    Attributes:
        silhouette, silhouette_cosine: mean over times, of Euclidean and cosine distances; higher is better.
        davies_bouldin: lower is better.
        calinski_harabasz: higher is better. It is (T / (N RMSE^2) - 1) (N - K) / (K - 1), T the total sum of squares.
        rmse: root of the mean squared distance to the cluster's mean; lower is better.
        variance: of all values of a cluster, weighted by its size; lower is better.
        inter_cluster_distance: mean over clusters of the smallest distance to a point of another one, or of the
            cluster's own diameter where that is smaller; higher is better.
    """

    silhouette: float
    silhouette_cosine: float
    davies_bouldin: float
    calinski_harabasz: float
    rmse: float
    variance: float
    inter_cluster_distance: float

    @classmethod
    def of(cls, space: Space, labels_T: NDArray[np.integer]) -> "Metrics":
        """Of a space's times."""
        if np.unique(labels_T).size < 2:
            return cls(*[float("nan")] * len(fields(cls)))
        points = space.points_TE
        return cls(
            float(silhouette_score(space.distances_TT, labels_T, metric="precomputed")),
            float(silhouette_score(space.cosine_distances_TT, labels_T, metric="precomputed")),
            float(davies_bouldin_score(points, labels_T)),
            float(calinski_harabasz_score(points, labels_T)),
            rmse_of(points, labels_T),
            variance_of(space, labels_T),
            inter_cluster_distance_of(space.distances_TT, labels_T),
        )

    def as_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


def rmse_of(points_TE: NDArray[np.float64], labels_T: NDArray[np.integer]) -> float:
    """Root of the mean squared distance of points to the mean of their cluster."""
    clusters = (points_TE[labels_T == label] for label in np.unique(labels_T))
    return float(np.sqrt(sum(((one - one.mean(0)) ** 2).sum() for one in clusters) / len(labels_T)))


def variance_of(space: Space, labels_T: NDArray[np.integer]) -> float:
    """Of all values of a cluster about their common mean, weighted by the clusters' sizes."""
    squares_T, total = (space.points_TE**2).sum(1), 0.0
    for label in np.unique(labels_T):
        own = labels_T == label
        values = own.sum() * space.features
        total += own.sum() * (squares_T[own].sum() / values - (space.sums_T[own].sum() / values) ** 2)
    return float(total / len(labels_T))


def inter_cluster_distance_of(distances_TT: NDArray[np.float64], labels_T: NDArray[np.integer]) -> float:
    """See `Metrics`."""
    smallest = []
    for label in np.unique(labels_T):
        own = labels_T == label
        others, diameter = distances_TT[np.ix_(own, ~own)], distances_TT[np.ix_(own, own)].max()
        smallest.append(min(others.min(), diameter))
    return float(np.mean(smallest))
