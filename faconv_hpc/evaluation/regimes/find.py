"""Regimes: clusters of the times of an embedding, judged beside those of EOFs and of the fields themselves."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...data.times import MONTHS, TimeAxis
from ..seasons import Season, Told, counts_of, seasonal_share_of, told_by_month
from .embedding_file import EmbeddingFile
from .partitions import (
    METHODS,
    Method,
    Partition,
    Standing,
    Suggestion,
    check_clusters,
    check_mixture,
    partitions_of,
    standings_of,
    suggest,
)
from .records import Composites, DataSpace, Record, composites_of, data_space_of
from .spaces import Metrics, Space

MOST_TIMES = 4000  # whose distances from each other are kept: 128 MB for each kind of distance and space

Stages = Callable[[str], Callable[[int, int], None]]
"""Called with what is done now; gives what is called with (done, total)."""


@dataclass(frozen=True, eq=False)
class Source:
    """Where clusters are looked for.

    Attributes:
        key, name: for programs, for people.
        space: of the times that are judged.
        points_TE: of all times that are labelled.
        every: of these, one in so many is judged.
        methods: tried on it.
    """

    key: str
    name: str
    space: Space
    points_TE: NDArray[np.float64]
    every: int = 1
    methods: tuple[Method, ...] = tuple(METHODS)


@dataclass(frozen=True, eq=False)
class Judged:
    """A partition, and how it is judged.

    Attributes:
        source: see `Source.key`.
        own: in the space that it was found in.
        data: in data space; None without data.
        told_by_month: how well calendar months tell its clusters.
    """

    source: str
    partition: Partition
    own: Metrics
    data: Metrics | None
    told_by_month: Told


@dataclass(frozen=True, eq=False)
class Regimes:
    """What was found.

    Attributes:
        sources: the embedding first.
        judged: partitions of each source and method.
        method: whose clusters of the embedding are the regimes.
        standings: of these, by the number of clusters.
        harmonics: of the annual cycle that was taken away, from embeddings and fields; 0: none.
        seasonal_shares: of each source's variance, as it was found, that lies between calendar months.
        every: one in so many times is judged, and has fields.
        data: None without fields.
        composites: of the regimes.
    """

    embeddings: EmbeddingFile
    sources: tuple[Source, ...]
    judged: tuple[Judged, ...]
    method: Method
    standings: dict[int, Standing]
    harmonics: int
    seasonal_shares: dict[str, float]
    every: int
    record: Record | None
    data: DataSpace | None
    composites: Composites | None

    def of(self, source: str, method: Method) -> list[Judged]:
        """By their number of clusters."""
        return [one for one in self.judged if (one.source, one.partition.method) == (source, method)]

    def one(self, source: str, method: Method | None = None, clusters: int | None = None) -> Judged:
        """By the method of the regimes, of as many clusters as are suggested, where nothing else is asked for."""
        wanted = self.suggestion.clusters if clusters is None else clusters
        return next(one for one in self.of(source, method or self.method) if one.partition.clusters == wanted)

    @cached_property
    def suggestion(self) -> Suggestion:
        """Which of the candidates are the regimes."""
        return suggest([one.partition for one in self.candidates], self.standings)

    @property
    def candidates(self) -> list[Judged]:
        """What the regimes were chosen from, by their number of clusters."""
        return self.of("embedding", self.method)

    @property
    def labels_T(self) -> NDArray[np.int64]:
        """Of the regimes, from 0."""
        return self.one("embedding").partition.labels_T

    @property
    def has_seasons(self) -> bool:
        """Whether all calendar months are there."""
        return np.unique(self.embeddings.months).size == MONTHS

    @cached_property
    def month_share_KM(self) -> NDArray[np.float64]:
        """Share of each calendar month's times in each regime; NaN for months without times."""
        counts = counts_of(self.labels_T, self.embeddings.months)
        with np.errstate(invalid="ignore"):
            return np.asarray(counts / counts.sum(0), dtype=np.float64)


def find_regimes(
    embeddings: EmbeddingFile,
    record: Record | None,
    clusters: Sequence[int],
    seeds: int,
    harmonics: int = 0,
    method: Method = "kmeans",
    stages: Stages = lambda what: lambda done, total: None,
) -> Regimes:
    """Clusters of times over a range of their number.

    Args:
        record: the fields of the same times; None: embeddings alone are looked at.
        clusters: increasing numbers of them.
        seeds: fits from different random starts.
        harmonics: of an annual cycle that embeddings and fields are freed of first; 0: they are taken as they are.
        method: whose clusters of the embedding are the regimes; the other stands beside it.

    Raises:
        InputError: more clusters than times, too few of them; or fields that cannot be read.
    """
    every = -(-len(embeddings.z_TE) // MOST_TIMES)
    times, months = range(0, len(embeddings.z_TE), every), embeddings.months
    check_clusters(clusters, embeddings.z_TE[::every], str(embeddings.path))
    if method == "gmm":
        check_mixture(len(embeddings.z_TE), str(embeddings.path))
    z_TE = Season.of(embeddings.axis, harmonics).removed_from(embeddings.z_TE)
    sources = [Source("embedding", "network", Space.of("embedding space", z_TE[::every]), z_TE, every)]
    shares, data = {"embedding": seasonal_share_of(embeddings.z_TE, months)}, None
    if record is not None:
        judged_axis = TimeAxis(embeddings.axis.seconds[::every], embeddings.axis.calendar)
        season = Season.of(judged_axis, harmonics)
        data = data_space_of(record, times, z_TE.shape[1], season, months[::every], stages("reading fields"))
        sources.append(Source("eof", "EOFs", Space.of("EOF space", data.eofs_TE), data.eofs_TE))
        sources.append(Source("fields", "fields", data.space, data.space.points_TE, methods=("kmeans",)))
        shares |= {"fields": data.seasonal_share}
    standings = standings_of(z_TE[::every], method, clusters, stages("clustering noise"))
    judged = tuple(_judged(sources, months, every, data, clusters, seeds, stages("clustering")))
    found = embeddings, tuple(sources), judged, method, standings, harmonics, shares, every, record, data
    regimes = Regimes(*found, composites=None)
    if record is None:
        return regimes
    return replace(regimes, composites=composites_of(record, regimes.labels_T, months, stages("averaging fields")))


def _judged(
    sources: Sequence[Source],
    months_T: NDArray[np.int64],
    every: int,
    data: DataSpace | None,
    clusters: Sequence[int],
    seeds: int,
    progress: Callable[[int, int], None],
) -> Iterator[Judged]:
    total, done = sum(len(source.methods) for source in sources) * len(clusters), 0

    def tell() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for source in sources:
        months = months_T[:: every // source.every]
        for method in source.methods:
            for one in partitions_of(source.points_TE, method, clusters, seeds, tell):
                labels_T = one.labels_T[:: source.every]
                of_data = None if data is None else Metrics.of(data.space, labels_T)
                own = Metrics.of(source.space, labels_T)
                yield Judged(source.key, one, own, of_data, told_by_month(one.labels_T, months))
