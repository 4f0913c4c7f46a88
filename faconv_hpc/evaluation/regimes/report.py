"""report.md: what the regimes are, for somebody who has not seen the program."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from sklearn.metrics import adjusted_rand_score

from ...files import write_durably
from ..words import duration_in_words, latitude_in_words, longitude_in_words, plain, table, with_units
from .facts import RegimeFacts, facts_of
from .figures import shown_variables
from .files import JSON, NETCDF
from .find import Judged, Regimes
from .partitions import CHANCE_PERCENT, LEAST_TIMES, METHODS, SCORES, STARTS, SURROGATES, dims_of
from .spaces import Metrics

REPORT = "report.md"
ALIKE = 0.02  # silhouettes and Rand indices that differ by less are given without a verdict
MONTH_TELLS = "month tells (the largest alone)"
A_CALENDAR, MOSTLY = 0.9, 0.7  # seasonal share of an embedding; gain by months of pure seasons, cut within months
CAPTIONS = {
    "numbers.png": "How many regimes: how far clusters are from noise, and whether seeds and halves find them again",
    "plane.png": "All times in two dimensions. Clouds that lie apart by date alone are stretches of the record: look "
    "for what changed there in how the fields were made, such as another analysis or other stations",
    "calendar.png": "When regimes come",
    "composites.png": "Mean fields of each regime less those of all times; lines go around what is beyond half of "
    "the scale",
    "composites_beyond_season.png": "The same less the means of the calendar months in which its times lie: what a "
    "regime is beyond its season",
}
COMPOSITES = "composites.png", "composites_beyond_season.png"
HEADS = {
    "silhouette": "silhouette ↑",
    "silhouette_cosine": "silhouette, cosine ↑",
    "davies_bouldin": "Davies-Bouldin ↓",
    "calinski_harabasz": "Calinski-Harabasz ↑",
    "rmse": "RMSE ↓",
    "variance": "variance ↓",
    "inter_cluster_distance": "inter-cluster distance ↑",
}


def write_report(regimes: Regimes, figures: Sequence[Path], path: Path, seeds: int) -> None:
    """The file appears whole; figures lie beside it."""
    write_durably(path, "\n\n".join(_parts(regimes, figures, seeds)) + "\n")


def _parts(regimes: Regimes, figures: Sequence[Path], seeds: int) -> Iterable[str]:
    axis, facts = regimes.embeddings.axis, facts_of(regimes)
    yield f"# Regimes of {axis.label(0)} to {axis.label(len(axis) - 1)}"
    yield _what(regimes)
    yield "## In short"
    yield "\n".join(f"- {sentence}" for sentence in _in_short(regimes))
    yield "## The regimes"
    yield table(_regime_heads(facts), (_regime_row(one) for one in facts))
    yield (
        "A regime's months are those in which it is the commonest. How long it lasts is the mean number of times in a "
        "row. The strongest departure is that of its mean field from the mean of all times, in the cell where it is "
        "largest; in brackets the root of its mean square over the globe."
        if regimes.composites is not None
        else "A regime's months are those in which it is the commonest. How long it lasts is the mean number of times "
        "in a row. Call the command with --data for the fields of each regime."
    )
    for figure in figures:
        yield f"![{CAPTIONS[figure.name]}]({figure.name})\n\n{CAPTIONS[figure.name]}.{_left_out(regimes, figure)}"
    if regimes.has_seasons and regimes.composites is not None and regimes.composites.are_seasons_alone:
        yield "Less the means of their calendar months nothing is left of any regime: each has all times of its months."
    yield "## How many there are"
    yield regimes.suggestion.reason
    yield table(_number_heads(regimes), (_number_row(regimes, one) for one in regimes.candidates))
    yield (
        f"Seeds and halves: adjusted Rand index, 1 where the same is found again, 0 where only by chance; halves of "
        f"the record are clustered one by one, and each then labels all times. Noise: the {SCORES[regimes.method]} "
        f"below which {CHANCE_PERCENT} % of {SURROGATES} random series stay that have the spectrum and correlations of "
        f"the embedding, and no clusters."
    )
    yield "## Beside EOFs, and clusters of the fields themselves" if regimes.data is not None else "## Metrics"
    yield from _metrics(regimes)
    yield "## How it was made"
    yield "\n".join(f"- {sentence}" for sentence in _how(regimes, seeds))


def _left_out(regimes: Regimes, figure: Path) -> str:
    """That some variables are not drawn; empty where all are."""
    if regimes.record is None or figure.name not in COMPOSITES:
        return ""
    every, shown = regimes.record.variables, shown_variables(regimes.record)
    left = ", ".join(one.name for one in every[len(shown) :])
    return f" The first {len(shown)} of {len(every)} variables are drawn; {left} is in `{NETCDF}` too." if left else ""


def _what(regimes: Regimes) -> str:
    axis, z_TE = regimes.embeddings.axis, regimes.embeddings.z_TE
    made_of = "; ".join(f"{option}: {one['told']}" for option, one in sorted(regimes.embeddings.made_of.items()))
    return (
        f"A neural network has summed up the globe at each of {len(axis)} times by {z_TE.shape[1]} numbers, its "
        f"embedding. Times with like embeddings make a regime. ({made_of})"
    )


def _in_short(regimes: Regimes) -> Iterable[str]:
    judged = regimes.one("embedding")
    count = judged.partition.clusters
    told = f"{count} regimes." if regimes.suggestion.steady else f"No regimes beyond doubt; {count} clusters are shown."
    yield f"**{told}** {regimes.suggestion.reason}"
    yield from _of_seasons(regimes, judged)
    if judged.data is not None:
        yield _compared(regimes)
    for method in (method for method in METHODS if method != regimes.method):
        agreement = _agreement(judged, regimes.one("embedding", method))
        few = method == "gmm" and len(regimes.embeddings.z_TE) < LEAST_TIMES
        takes = f"of {LEAST_TIMES} times or more `--method gmm` takes" if few else f"`--method {method}` takes"
        yield (
            f"As many clusters by {METHODS[method]} agree with them to {agreement:.2f} (adjusted Rand index); {takes} "
            f"those."
        )


def told_of_calendar(regimes: Regimes) -> str:
    """That there is little beyond the season; empty where there is more."""
    share = regimes.seasonal_shares["embedding"]
    if not regimes.has_seasons or regimes.harmonics or share <= A_CALENDAR:
        return ""
    return f"The embedding is little more than a calendar: {share:.1%} of its variance lies between calendar months"


def _of_seasons(regimes: Regimes, judged: Judged) -> Iterable[str]:
    if not regimes.has_seasons:
        yield "The times are of a part of the year only, so nothing is said of seasons."
        return
    share = regimes.seasonal_shares["embedding"]
    if calendar := told_of_calendar(regimes):
        yield (
            f"**{calendar}**{_of_fields(regimes)}. What is found here are times of the year. Call the command with "
            f"--harmonics (6 where data are monthly) to see what there is beyond them, or train with "
            f"model.seasonal_encoding: false, so that the embedding is not told the day of the year."
        )
    else:
        before = "Before its annual cycle was taken away, " if regimes.harmonics else ""
        yield f"{before}{share:.1%} of the embedding's variance lies between calendar months{_of_fields(regimes)}."
    told, what = judged.told_by_month, "regimes" if regimes.suggestion.steady else "clusters"
    others = "more than seasons" if regimes.suggestion.steady else "no seasons"
    yield (
        f"The {what} are {'seasons' if told.gain >= MOSTLY else others}: the calendar month tells the "
        f"regime of {told.share:.0%} of all times, and {told.largest:.0%} are of the largest regime anyway. Of what "
        f"that leaves to tell, months tell {told.gain:.0%}."
    )


def _of_fields(regimes: Regimes) -> str:
    share = regimes.seasonal_shares.get("fields")
    return "" if share is None else f", of the fields' own {share:.1%}"


def _agreement(one: Judged, other: Judged) -> float:
    return float(adjusted_rand_score(one.partition.labels_T, other.partition.labels_T))


def _compared(regimes: Regimes) -> str:
    network, eofs, fields = regimes.one("embedding"), regimes.one("eof"), regimes.one("fields", "kmeans")
    assert network.data is not None and eofs.data is not None and fields.data is not None, "there are fields"
    mine, others = network.data.silhouette, eofs.data.silhouette
    apart = _verdict(mine, others, "farther apart than", "not as far apart as", "about as far apart as")
    again = network.partition.halves_agreement, eofs.partition.halves_agreement
    steadier = _verdict(*again, "found again better than", "found again less well than", "found again about as well as")
    return (
        f"In the fields, the network's clusters are {apart} those of {_eofs(regimes)[0]} (silhouette in data space "
        f"{mine:.3f} and {others:.3f}; clusters of the fields themselves {fields.data.silhouette:.3f}), and are "
        f"{steadier} theirs in the other half of the record ({_number(again[0], 2)} and {_number(again[1], 2)})."
    )


def _eofs(regimes: Regimes) -> tuple[str, str]:
    """How many there are, for people; and why."""
    assert regimes.data is not None, "there are fields"
    there, wanted = regimes.data.eofs_TE.shape[1], regimes.embeddings.z_TE.shape[1]
    if there == wanted:
        return "as many EOFs", f"{there} of them, as many as the embedding has components"
    return f"{there} EOFs", f"{there} of them, all that there are, where the embedding has {wanted} components"


def _verdict(mine: float, others: float, more: str, less: str, alike: str) -> str:
    if math.isnan(mine - others):
        return "not to be compared with"
    return alike if abs(mine - others) < ALIKE else more if mine > others else less


def _regime_heads(facts: Sequence[RegimeFacts]) -> list[str]:
    variables = [with_units(one.variable, plain(one.units)) for one in facts[0].extremes]
    return ["regime", "times", "share", "months", "lasts", *(f"strongest departure of {one}" for one in variables)]


def _regime_row(one: RegimeFacts) -> list[str]:
    extremes = [
        f"{extreme.anomaly:+.3g} at {_place(extreme.latitude_deg, extreme.longitude_deg)} ({extreme.spread:.2g})"
        for extreme in one.extremes
    ]
    lasts = f"{one.run_times:.1f} times ({duration_in_words(one.run_hours, one.run_hours / one.run_times)})"
    return [str(one.number), str(one.times), f"{one.share:.0%}", one.months or "none", lasts, *extremes]


def _place(latitude_deg: float, longitude_deg: float) -> str:
    return f"{latitude_in_words(latitude_deg)} {longitude_in_words(longitude_deg)}"


def _number_heads(regimes: Regimes) -> list[str]:
    heads = ["K", SCORES[regimes.method], "in noise", "seeds", "halves", MONTH_TELLS]
    return [*heads, "silhouette in data space"] if regimes.data is not None else heads


def _number_row(regimes: Regimes, one: Judged) -> list[str]:
    partition = one.partition
    chosen = partition.clusters == regimes.suggestion.clusters
    texts = [
        f"**{partition.clusters}**" if chosen else str(partition.clusters),
        _number(regimes.standings[partition.clusters].score),
        _number(regimes.standings[partition.clusters].chance),
        _number(partition.seeds_agreement, 2),
        _number(partition.halves_agreement, 2),
        _told(one),
    ]
    return [*texts, _number(one.data.silhouette)] if one.data is not None else texts


def _metrics(regimes: Regimes) -> Iterable[str]:
    """At the suggested number of clusters, in each space; all numbers are in the JSON file."""
    count = regimes.suggestion.clusters
    rows = [
        (source, method, regimes.one(source.key, method)) for source in regimes.sources for method in source.methods
    ]
    if regimes.data is not None:
        yield (
            f"All at K = {count}, **in data space**: each time is the vector of all cells of all variables, each from "
            f"0 to 1 between its least and greatest value, all cells alike. Whatever labels times is comparable here; "
            f"k-means of the fields themselves minimises RMSE in this space, so no other can be better in RMSE or "
            f"Calinski-Harabasz but by luck."
        )
        yield table(
            ["clusters of", "method", MONTH_TELLS, "seeds", "halves", *HEADS.values()],
            (
                [source.name, METHODS[method], _told(one), *_found_again(one), *_values(one.data)]
                for source, method, one in rows
                if one.data is not None
            ),
        )
    yield (
        f"At K = {count}, **each in the space that it was found in**. Numbers of different spaces cannot be compared: "
        f"a space of fewer dims has higher silhouettes."
    )
    yield table(
        ["clusters of", "method", "space", *HEADS.values()],
        ([source.name, METHODS[method], source.space.name, *_values(one.own)] for source, method, one in rows),
    )
    yield (
        "↑ higher is better, ↓ lower. RMSE: root of the mean squared distance to the cluster's mean. Variance: of all "
        "values of a cluster, weighted by its size. Inter-cluster distance: mean over clusters of the smallest "
        "distance to a point of another, or the own diameter where that is smaller."
    )


def _told(one: Judged) -> str:
    return f"{one.told_by_month.share:.0%} ({one.told_by_month.largest:.0%})"


def _found_again(one: Judged) -> list[str]:
    return [_number(one.partition.seeds_agreement, 2), _number(one.partition.halves_agreement, 2)]


def _values(metrics: Metrics) -> list[str]:
    return [_number(value, 4) for value in metrics.as_dict().values()]


def _how(regimes: Regimes, seeds: int) -> Iterable[str]:
    clusters, points_TE = [one.partition.clusters for one in regimes.candidates], regimes.sources[0].points_TE
    dims, most = dims_of("gmm", points_TE), points_TE.shape[1]
    yield (
        f"k-means (Euclidean, in all dims) and Gaussian mixtures (whose components have one covariance in common, "
        f"along {dims} axes of most variance of {most}), {STARTS} starts for each of {seeds} seeds, the best kept, K "
        f"from {clusters[0]} to {clusters[-1]}. The regimes are those by {METHODS[regimes.method]}."
    )
    if regimes.harmonics:
        yield f"An annual cycle of {regimes.harmonics} harmonics was taken away first, of embeddings and of every cell."
    if regimes.every > 1:
        yield f"All times are labelled; one in {regimes.every} is judged, and has fields, since all would not fit."
    data, record = regimes.data, regimes.record
    if data is None or record is None:
        yield "Without fields: --data was not given."
    else:
        names = ", ".join(one.name for one in record.variables)
        thinned = (
            f", every {_th(data.stride)} row and column, as all would not fit in memory" if data.stride > 1 else ""
        )
        missing = f"; {data.left_out} cells are missing at some time and left out" if data.left_out else ""
        yield f"Fields: {names} of {record.asked.told}, {data.cells} cells{thinned}{missing}."
        if record.asked.value != regimes.embeddings.made_of.get("--data", {}).get("value"):
            yield "These are other data than those that were embedded; the times are the same."
        yield (
            f"EOFs: principal components of the same fields weighted by area, {_eofs(regimes)[1]}; "
            f"{data.explained:.0%} of the variance. They see one time, an embedding a window of "
            f"{regimes.embeddings.window}."
        )
    composites = ", and the mean fields of each regime" * (regimes.composites is not None)
    yield f"`{NETCDF}` has the labels of all times, methods and K{composites}; `{JSON}` all numbers."


def _th(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10 if number // 10 % 10 != 1 else 0, 'th') }"


def _number(value: float, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "none"
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.1f}"
