"""``faconv regimes``: planted ones are found, noise is not taken for some; metrics by their definitions; refused."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from sklearn import metrics as library
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from typer.testing import CliRunner

import forecasts
from faconv_hpc.cli.app import app
from faconv_hpc.data.statistics import row_weights
from faconv_hpc.data.times import TimeAxis
from faconv_hpc.errors import InputError
from faconv_hpc.evaluation.regimes import figures, find, partitions
from faconv_hpc.evaluation.regimes.embedding_file import read_embeddings
from faconv_hpc.evaluation.regimes.facts import _runs
from faconv_hpc.evaluation.regimes.figures import draw_all, draw_numbers, draw_plane
from faconv_hpc.evaluation.regimes.files import as_dict, write_netcdf
from faconv_hpc.evaluation.regimes.find import find_regimes
from faconv_hpc.evaluation.regimes.partitions import by_size, partitions_of, standings_of
from faconv_hpc.evaluation.regimes.records import Record, data_space_of
from faconv_hpc.evaluation.regimes.report import _compared, told_of_calendar, write_report
from faconv_hpc.evaluation.regimes.spaces import Metrics, Space
from faconv_hpc.evaluation.seasons import Season, seasonal_share_of, told_by_month
from faconv_hpc.evaluation.words import Leads, duration_in_words, latitude_in_words, longitude_in_words, months_in_words
from faconv_hpc.forecasting.embeddings import EmbeddingLayout, EmbeddingWriter
from faconv_hpc.locks import OUTPUT_LOCK, locked_directory

FRAMES, DAYS, NLAT, NLON, COMPONENTS = 108, 10, 11, 14, 8
QUIET = {"seeds": 2, "clusters": range(2, 6)}


def planted():
    """(FRAMES,) regimes that last for a while and come in any season, the commonest 0; and the patterns of each."""
    random = np.random.default_rng(1)
    runs = np.repeat([0, 1, 2] * 9, random.multinomial(FRAMES - 27, np.full(27, 1 / 27)) + 1)
    labels = by_size(np.asarray(runs[:FRAMES], dtype=np.int64))
    return labels, random.normal(size=(3, 2, NLAT, NLON))


def fields():
    """Two variables of patterns and noise, of which ice misses cells; and their annual cycle."""
    labels, patterns = planted()
    random = np.random.default_rng(2)
    values = 3 * patterns[labels] + random.normal(size=(FRAMES, 2, NLAT, NLON))
    values[:, 1, 3:5, 2:6] = np.nan
    values[5, 1, 0, 0] = np.nan  # once only
    dims = ("time", "latitude", "longitude")
    coordinates = {
        "time": ("time", np.arange(FRAMES) * DAYS * 24.0, {"units": "hours since 2003-01-01"}),
        "latitude": np.linspace(80, -80, NLAT),
        "longitude": np.arange(NLON) * 360 / NLON,
    }
    return xr.Dataset(
        {
            "heat": (dims, (280 + values[:, 0]).astype(np.float32), {"units": "K"}),
            "ice": (dims, (5 + 0.5 * values[:, 1]).astype(np.float32), {"units": "m"}),
        },
        coordinates,
    )


@pytest.fixture(scope="module", autouse=True)
def _little_noise():
    """Is enough for what lies far from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "SURROGATES", 8)
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A store of planted regimes, and a contract of it."""
    directory = tmp_path_factory.mktemp("regimes")
    store = forecasts.make_store(directory, fields())
    _, workspace = forecasts.draw_model(directory, store, {"forcings": ["insolation"], "periods": {}, "window": 3})
    return directory, workspace.contract


def season(times):
    """(T, COMPONENTS) of a year."""
    angle = 2 * np.pi * np.arange(times) * DAYS / 365.25
    return np.stack([np.cos(angle), np.sin(angle), *[np.zeros(times)] * (COMPONENTS - 2)], axis=1)


def clouds(labels, noise=0.3):
    """(T, COMPONENTS) about a centre for each label."""
    random = np.random.default_rng(3)
    return 2 * random.normal(size=(labels.max() + 1, COMPONENTS))[labels] + noise * random.normal(
        size=(len(labels), COMPONENTS)
    )


def written(path, contract, z_TE, first=0):
    """As `faconv embed` leaves it."""
    begin = int(np.datetime64("2003-01-01", "s").astype(np.int64)) + first * DAYS * 86400
    layout = EmbeddingLayout(contract, TimeAxis(begin + np.arange(len(z_TE)) * DAYS * 86400, "standard"), 3)
    said = {"--data": {"value": "x", "told": "the store s"}, "MODEL": {"value": "y", "told": "step 5 of r"}}
    parts = path.parent / f"{path.name}.parts"
    parts.mkdir(parents=True, exist_ok=True)
    writer = EmbeddingWriter(parts, layout, {"faconv_embed": json.dumps(said), "title": "Embeddings by step 5 of r"})
    for number, part in enumerate(layout.parts):
        writer.write(number, z_TE[part.start : part.stop].astype(np.float32))
    list(writer.finish(path))
    return path


@pytest.fixture(scope="module")
def embedded(site):
    """A file of embeddings in which the planted regimes lie apart, around a season."""
    labels, _ = planted()
    z_TE = clouds(labels) + 9 * season(FRAMES)
    return written(site[0] / "z.nc", site[1], z_TE)


def record_of(site, embeddings, memory_gib=1.0):
    return Record.of(embeddings.contract, embeddings.axis, [site[0] / "store"], None, memory_gib)


@pytest.fixture(scope="module")
def found(site, embedded):
    embeddings = read_embeddings(embedded)
    return find_regimes(embeddings, record_of(site, embeddings), harmonics=2, **QUIET)


# What is found


def test_planted_regimes_are_found_beneath_a_season(found):
    labels, _ = planted()
    assert np.bincount(labels).tolist() == sorted(np.bincount(labels), reverse=True)
    assert (found.suggestion.clusters, found.suggestion.steady) == (3, True)
    for method in ("kmeans", "gmm"):
        np.testing.assert_array_equal(found.one("embedding", method).partition.labels_T, labels)
        np.testing.assert_array_equal(found.one("eof", method).partition.labels_T, labels)
    assert found.one("embedding").partition.halves_agreement == found.one("embedding").partition.seeds_agreement == 1
    assert found.standings[3].score == pytest.approx(found.one("embedding").own.silhouette)
    assert found.standings[3].score > 2 * found.standings[3].chance
    assert 0.6 < found.seasonal_shares["embedding"] < 0.95 and found.seasonal_shares["fields"] < 0.3


def test_with_its_season_and_without_fields_the_embedding_is_cut_by_the_season(embedded, tmp_path):
    with_season = find_regimes(read_embeddings(embedded), None, **QUIET)
    assert library.adjusted_rand_score(with_season.one("embedding", clusters=3).partition.labels_T, planted()[0]) < 0.5
    assert with_season.one("embedding", clusters=4).told_by_month.gain > 0.6
    assert as_dict(with_season)["data"] is None and {one.source for one in with_season.judged} == {"embedding"}
    write_report(with_season, [draw_numbers(with_season, tmp_path / "numbers.png")], tmp_path / "report.md", 2)
    report = (tmp_path / "report.md").read_text()
    assert "Call the command with --data" in report and "](numbers.png)" in report
    assert (tmp_path / "numbers.png").stat().st_size > 10_000


def test_noise_is_not_taken_for_regimes(site, tmp_path):
    random = np.random.default_rng(8)
    steps = random.normal(size=(120, COMPONENTS)) * np.linspace(2, 0.3, COMPONENTS)
    noise = [steps[0]]
    for step in steps[1:]:
        noise.append(0.7 * noise[-1] + step)  # red, as weather is
    found = find_regimes(read_embeddings(written(tmp_path / "z.nc", site[1], np.stack(noise))), None, **QUIET)
    assert not found.suggestion.steady
    assert re.search(r"No number of clusters meets all of it .* in noise 0\.\d+", found.suggestion.reason)


def test_composites_are_the_means_of_regimes(site, found):
    labels, months = planted()[0], found.embeddings.axis.months
    data, composites = fields(), found.composites
    for channel, name in enumerate(("heat", "ice")):
        values = np.ma.masked_invalid(data[name].values.astype(np.float64))
        usual = np.ma.stack([values[months == month].mean(0) for month in months])
        usual = np.ma.masked_where(np.ma.getmaskarray(values), usual)  # of times that are known, as the mean is
        for label in range(3):
            own = values[labels == label]
            wanted = (own.mean(0) - values.mean(0)).filled(np.nan)
            np.testing.assert_allclose(composites.anomaly_KCYX[label, channel], wanted, atol=1e-5)
            beyond = (own.mean(0) - usual[labels == label].mean(0)).filled(np.nan)
            np.testing.assert_allclose(composites.beyond_season_KCYX[label, channel], beyond, atol=1e-5)
    assert np.isnan(composites.anomaly_KCYX[:, 1, 3:5, 2:6]).all()
    assert np.isfinite(composites.anomaly_KCYX[:, 0]).all()


def test_times_are_shown_by_their_dates(found, monkeypatch, tmp_path):
    """As years, and where they are of less than one, or of several sequences, as such."""
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figure)
    panels = draw_plane(found, tmp_path / "plane.png").axes
    assert [one.get_title() for one in panels[2:6:3]] == ["Embedding, by year", "EOFs of the fields, by year"]
    assert all(one.get_aspect() == 1 for one in panels[:6]), "distances are what clusters are made by"
    days = np.arange(FRAMES) * DAYS
    for panel in panels[2:6:3]:
        np.testing.assert_allclose(panel.collections[0].get_array(), 2003 + days / 365.25, atol=0.01)
    seconds = found.embeddings.axis.seconds
    values, unit = figures._when(TimeAxis(seconds[:30], "standard"))
    assert (values[7], unit) == (70, "days since 2003-01-01 00:00:00")
    values, unit = figures._when(TimeAxis(np.tile(seconds[:40], 2), "standard", (0, 40), ("a", "b")))
    assert (values[[0, 39, 40]].tolist(), unit) == ([0, 0, 1], "sequence")


def test_a_record_of_less_than_a_year_has_no_months(site, found, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figure)
    short = find_regimes(read_embeddings(written(tmp_path / "z.nc", site[1], clouds(planted()[0][:30]))), None, [2], 2)
    titles = [[one.get_title() for one in figures.draw_calendar(one, tmp_path).axes] for one in (found, short)]
    assert titles == [["Share of each month's times", "Regime of each time", "", ""], ["Regime of each time", ""]]
    line = figures.draw_calendar(short, tmp_path).axes[0]
    assert (line.get_xlabel(), line.get_ylabel(), len(line.get_yticks())) == ("days since 2003-01-01 00:00:00", "", 0)


def test_the_numbers_are_drawn_for_a_page(found, monkeypatch, tmp_path):
    """Side by side they would be shown small, and their text with them."""
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figure)
    both = draw_numbers(found, tmp_path), draw_numbers(replace(found, data=None), tmp_path)
    assert all(one.get_figwidth() < 9 for one in both)
    assert [[axes.axison for axes in one.axes] for one in both] == [[True] * 4, [True, False, True, True]]


def test_a_report_of_few_times_says_what_there_is(site, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "SHOWN", 1)
    embeddings = read_embeddings(written(tmp_path / "z.nc", site[1], clouds(planted()[0])[:7]))

    def reported(record):
        found = find_regimes(embeddings, record, [4], 2)
        write_report(found, draw_all(found, tmp_path), tmp_path / "report.md", 2)
        return (tmp_path / "report.md").read_text()

    report = reported(record_of(site, embeddings))
    assert "those of 6 EOFs (silhouette" in report and "as many EOFs" not in report
    assert "6 of them, all that there are, where the embedding has 8 components; 100% of the variance" in report
    assert "seeds agree to 1.00, halves have fewer times than clusters, and its silhouette" in report
    assert "nan" not in report and "of 100 times or more `--method gmm` takes those" in report
    assert report.count("The first 1 of 2 variables are drawn; ice is in `regimes.nc` too.") == 1
    assert "methods and K, and the mean fields of each regime; `regimes.json`" in report
    report = reported(None)
    assert "methods and K; `regimes.json` all numbers" in report and "omposites" not in report


@pytest.mark.parametrize(
    ("clusters", "variables", "across"), [(7, 2, 2), (3, 2, 1), (10, 1, 3), (2, 4, 1), (10, 4, 1), (4, 1, 2)]
)
def test_composites_fill_a_page(clusters, variables, across):
    """So that they are not shown small; and none is forgotten or left alone in a column."""
    assert figures._across(clusters, variables) == across


def test_every_regime_has_its_map(found, monkeypatch, tmp_path):
    """Three in two columns: the place that is left is empty, and above it longitudes are told."""
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figure)
    monkeypatch.setattr(figures, "_across", lambda clusters, variables: 2)
    drawn = figures.draw_composites(found, tmp_path / "composites.png", beyond_season=False).axes[:8]
    titles = [re.sub(r" \(.*\)", "", one.get_title()) for one in drawn if one.axison]
    assert titles == [
        "regime 1: heat",
        "regime 2: heat",
        "regime 1: ice",
        "regime 2: ice",
        "regime 3: heat",
        "regime 3: ice",
    ]
    told = [one.xaxis.get_tick_params()["labelbottom"] for one in drawn if one.axison]
    assert told == [False, True, False, True, True, True]
    for panel, channel, label in ((drawn[4], 0, 2), (drawn[3], 1, 1)):
        field = found.composites.anomaly_KCYX[label, channel]
        np.testing.assert_array_equal(np.sort(panel.collections[0].get_array()[:, :-1]), np.sort(field))


def test_an_embedding_that_is_a_calendar_is_called_one(found, tmp_path):
    shares = found.seasonal_shares
    season = replace(found, harmonics=0, seasonal_shares=shares | {"embedding": 0.953})
    assert told_of_calendar(season).endswith("than a calendar: 95.3% of its variance lies between calendar months")
    write_report(season, [], tmp_path / "report.md", 5)
    told = f"**{told_of_calendar(season)}**, of the fields' own {shares['fields']:.1%}."
    assert told in (tmp_path / "report.md").read_text()
    for other in (found, replace(season, harmonics=6), replace(season, seasonal_shares=shares | {"embedding": 0.9})):
        assert told_of_calendar(other) == ""


def test_regimes_of_whole_months_have_no_maps_beyond_their_season(found, tmp_path):
    """Where a month is of one regime alone there is nothing but rounding to draw."""
    assert not found.composites.are_seasons_alone
    rounding = 1e-6 * found.composites.anomaly_KCYX
    alone = replace(found, composites=replace(found.composites, beyond_season_KCYX=rounding))
    figures = draw_all(alone, tmp_path)
    assert [one.name for one in figures] == ["numbers.png", "plane.png", "calendar.png", "composites.png"]
    write_report(alone, figures, tmp_path / "report.md", 2)
    assert "nothing is left of any regime" in (tmp_path / "report.md").read_text()


# The spaces


def data_by_hand(season_of=None, every=slice(None)):
    """(T, N) of all cells that are always there, each variable from 0 to 1; and their areas."""
    data, columns, areas = fields(), [], []
    rows = np.repeat(row_weights(data.latitude.values, data.longitude.values), NLON)
    for name in ("heat", "ice"):
        values = data[name].values.astype(np.float64).reshape(FRAMES, -1)[every]
        known = np.isfinite(values).all(0)
        values = values[:, known]
        columns.append((values - values.min()) / (values.max() - values.min()))
        areas.append(rows[known])
    x_TN = np.concatenate(columns, axis=1)
    return (x_TN if season_of is None else season_of.removed_from(x_TN)), np.concatenate(areas)


@pytest.mark.parametrize("harmonics", [0, 2])
def test_data_space_is_that_of_the_fields(site, embedded, harmonics):
    embeddings = read_embeddings(embedded)
    cycle = Season.of(embeddings.axis, harmonics)
    found = data_space_of(
        record_of(site, embeddings), range(FRAMES), COMPONENTS, cycle, embeddings.months, lambda done, total: None
    )
    x_TN, areas_N = data_by_hand(cycle if harmonics else None)
    assert (found.cells, found.left_out, found.stride) == (x_TN.shape[1], 2 * 4 + 1, 1)
    labels = KMeans(4, n_init=3, random_state=0).fit(x_TN).labels_
    np.testing.assert_array_equal(labels, KMeans(4, n_init=3, random_state=0).fit(found.space.points_TE).labels_)
    told, values = Metrics.of(found.space, labels), Metrics.of(Space.of("", x_TN), labels)
    np.testing.assert_allclose(list(told.as_dict().values()), list(values.as_dict().values()), rtol=1e-6)
    pca = PCA(COMPONENTS, random_state=0, svd_solver="full")
    eofs = pca.fit_transform(x_TN * np.sqrt(areas_N))
    np.testing.assert_allclose(np.abs(found.eofs_TE), np.abs(eofs), atol=1e-7)
    assert found.explained == pytest.approx(pca.explained_variance_ratio_.sum())
    wanted = 0.0 if harmonics else seasonal_share_of(x_TN, embeddings.months)
    assert harmonics or found.seasonal_share == pytest.approx(wanted)


def test_metrics_are_what_they_are_called():
    random = np.random.default_rng(5)
    x_TE, labels = random.normal(size=(41, 5)) + np.arange(5), random.integers(0, 4, 41)
    told = Metrics.of(Space.of("", x_TE), labels)
    assert told.silhouette == pytest.approx(library.silhouette_score(x_TE, labels))
    assert told.silhouette_cosine == pytest.approx(library.silhouette_score(x_TE, labels, metric="cosine"))
    assert told.davies_bouldin == pytest.approx(library.davies_bouldin_score(x_TE, labels))
    assert told.calinski_harabasz == pytest.approx(library.calinski_harabasz_score(x_TE, labels))
    clusters = [x_TE[labels == label] for label in range(4)]
    assert told.rmse == pytest.approx(np.sqrt(sum(len(c) * c.var(0).sum() for c in clusters) / 41))
    assert told.variance == pytest.approx(sum(len(c) * np.var(c) for c in clusters) / 41)

    def apart(one, other):
        return np.linalg.norm(one[:, None] - other[None], axis=2)

    nearest = [
        min([apart(one, one).max(), *(apart(one, other).min() for other in clusters if other is not one)])
        for one in clusters
    ]
    assert told.inter_cluster_distance == pytest.approx(np.mean(nearest))
    total, n, k = ((x_TE - x_TE.mean(0)) ** 2).sum(), 41, 4
    assert told.calinski_harabasz == pytest.approx((total / (n * told.rmse**2) - 1) * (n - k) / (k - 1))
    single = np.array([0] * 40 + [1])
    assert Metrics.of(Space.of("", x_TE), single).inter_cluster_distance == pytest.approx(
        min(apart(x_TE[:40], x_TE[40:]).min(), apart(x_TE[:40], x_TE[:40]).max()) / 2
    )  # a cluster of one has no diameter
    assert np.isnan(list(Metrics.of(Space.of("", x_TE), np.zeros(41, dtype=int)).as_dict().values())).all()


def test_agreement_is_of_seeds_and_halves():
    random = np.random.default_rng(6)
    labels = np.repeat([0, 1, 2, 1, 0], 24)
    points = clouds(labels)
    one = partitions_of(points, "kmeans", [3], 3)[0]
    assert one.seeds_agreement == one.halves_agreement == 1.0 and one.is_steady
    np.testing.assert_array_equal(one.labels_T, labels)
    moved = np.concatenate([points[:60], random.normal(size=(60, COMPONENTS))])
    assert partitions_of(moved, "kmeans", [3], 3)[0].halves_agreement < 0.5
    assert np.isnan(partitions_of(points[:7], "kmeans", [4], 2)[0].halves_agreement)
    cloud = random.normal(size=(200, COMPONENTS))
    assert partitions_of(cloud, "gmm", [6], 3)[0].seeds_agreement < 0.8
    mixtures = partitions_of(points, "gmm", [2, 3, 4], 2)
    assert min(mixtures, key=lambda each: each.bic).clusters == 3


def weather(times, labels=None, seed=12):
    """(times, COMPONENTS) red noise, ten times as large along some axes as along others, about centres that lie apart
    where there is little of it; seen askew, as a network may have it."""
    random = np.random.default_rng(seed)
    size = np.array([3.0] * 5 + [0.3] * 3)
    state, z_TE = np.zeros(COMPONENTS), np.empty((times, COMPONENTS))
    for row in z_TE:
        state = 0.6 * state + 0.8 * size * random.normal(size=COMPONENTS)
        row[:] = state
    if labels is not None:
        z_TE[:, 5:] += 1.5 * np.concatenate([np.zeros((1, 3)), np.eye(3)])[labels]
    return z_TE @ np.linalg.qr(random.normal(size=(COMPONENTS, COMPONENTS)))[0]


@pytest.fixture(scope="module")
def hidden():
    """(regimes of 400 times, points in which all that varies most tells nothing of them)."""
    labels = by_size(np.repeat(np.random.default_rng(13).integers(4, size=50), 8))
    return labels, weather(len(labels), labels)


def test_a_mixture_finds_what_varies_little_and_k_means_does_not(hidden):
    labels, points = hidden
    (near,), (found,) = (partitions_of(points, method, [4], 3) for method in ("kmeans", "gmm"))
    assert library.adjusted_rand_score(near.labels_T, labels) < 0.1
    assert library.adjusted_rand_score(found.labels_T, labels) > 0.9 and found.is_steady


@pytest.mark.parametrize("most", [1, 30, 1000])
def test_a_mixture_does_not_hang_on_the_scale_of_an_embedding(hidden, most):
    """Nor does it on what axes that tell nothing are multiplied by: a network's vary 60 times as much along some."""
    labels, points = hidden
    matrix = np.random.default_rng(14).normal(size=(COMPONENTS, COMPONENTS))
    along = np.linalg.svd(points - points.mean(0), full_matrices=False)[2]
    large = along.T @ np.diag([most] * 5 + [1] * 3) @ along
    one, other = (partitions_of(each, "gmm", [4], 3)[0] for each in (points, points @ large @ matrix))
    np.testing.assert_array_equal(one.labels_T, other.labels_T)
    assert other.is_steady and library.adjusted_rand_score(other.labels_T, labels) > 0.9
    size = np.linalg.slogdet(large @ matrix)[1]
    assert other.likelihood == pytest.approx(one.likelihood - size, rel=1e-4)
    assert other.bic == pytest.approx(one.bic + 2 * len(points) * size, rel=1e-4)


def test_a_mixture_of_few_times_takes_few_dims(hidden):
    """44 times tell 4 dims, where the points have 8: their covariance would be made of chance."""
    apart = clouds(np.repeat([0, 1, 2, 1], 11))
    cut = PCA(4, random_state=0).fit_transform(apart)
    by_library = GaussianMixture(3, covariance_type="tied", n_init=10, random_state=0, reg_covar=1e-6).fit(cut)
    one = partitions_of(apart, "gmm", [3], 2)[0]
    assert one.likelihood == pytest.approx(by_library.score(cut), rel=1e-4) and one.seeds_agreement == 1
    flat = np.repeat(hidden[1][:9, :1], COMPONENTS, axis=1)  # one time for less than a dim, and all along a line
    assert np.isfinite(partitions_of(flat, "gmm", [2], 2)[0].likelihood)
    still = np.repeat(clouds(np.array([0, 1, 2])), [40, 20, 20], axis=0)  # half of the record does not vary at all
    assert np.isfinite(partitions_of(still, "gmm", [2], 2)[0].halves_agreement)


def test_regimes_by_a_mixture_are_as_many_as_stand_out_of_noise(site, hidden, tmp_path):
    labels, points = hidden
    path = written(tmp_path / "z.nc", site[1], points)
    found = find_regimes(read_embeddings(path), None, range(3, 6), 2, method="gmm")
    assert (found.suggestion.clusters, found.suggestion.steady) == (4, True)
    assert library.adjusted_rand_score(found.labels_T, labels) > 0.9
    assert library.adjusted_rand_score(find_regimes(read_embeddings(path), None, [4], 2).labels_T, labels) < 0.1
    write_report(found, [draw_numbers(found, tmp_path / "numbers.png")], tmp_path / "report.md", 2)
    report = (tmp_path / "report.md").read_text()
    assert (
        "| K | log-likelihood over that of noise | in noise |" in report and "`--method kmeans` takes those" in report
    )
    assert "log-likelihood over that of noise, " in found.suggestion.reason and "**4 regimes.**" in report


@pytest.mark.parametrize("most_times", [4000, 200], ids=["all are judged", "one in two"])
def test_noise_is_no_mixture_however_steady_it_is(site, tmp_path, monkeypatch, most_times):
    """By likelihoods of as many times, found from as many starts: those of one cluster are the same. One series in
    twenty passes for clusters by chance, such as that of seed 12; this one does not."""
    monkeypatch.setattr(partitions, "SURROGATES", 20)
    monkeypatch.setattr(partitions, "HALVES_AGREE", -1)
    monkeypatch.setattr(partitions, "SEEDS_AGREE", -1)
    monkeypatch.setattr(find, "MOST_TIMES", most_times)
    points = weather(400, seed=15)
    found = find_regimes(read_embeddings(written(tmp_path / "z.nc", site[1], points)), None, [2, 4], 2, method="gmm")
    assert not found.suggestion.steady
    assert re.search(r"its log-likelihood over that of noise is -?\d\.\d+, in noise \d\.\d+", found.suggestion.reason)
    alone = standings_of(points[:: found.every], "gmm", [1], lambda done, total: None)[1]
    assert abs(alone.score) < 1e-6 and abs(alone.chance) < 1e-6 and found.every == 400 // min(most_times, 400)


def test_noise_has_the_spectrum_of_the_points():
    """A wave alone is the same in noise but for its phase; clusters in time's random order are not."""
    angle = 2 * np.pi * np.arange(96) / 12
    wave = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    chance = standings_of(wave, "kmeans", [3], lambda done, total: None)[3].chance
    labels = KMeans(3, n_init=10, random_state=0).fit(wave).labels_
    assert chance == pytest.approx(library.silhouette_score(wave, labels), rel=1e-3)


# Seasons and what is said


def test_a_season_is_taken_away_by_least_squares():
    axis = TimeAxis(np.arange(80, dtype=np.int64) * 5 * 86400, "noleap")
    cycle = 2 + np.cos(2 * np.pi * axis.year_fraction)[:, None] * [1.0, -2.0]
    rest = np.random.default_rng(7).normal(size=(80, 2))
    season = Season.of(axis, 1)
    np.testing.assert_allclose(season.removed_from(cycle), 0, atol=1e-12)
    left = season.removed_from(cycle + rest)
    np.testing.assert_allclose(left, season.removed_from(rest), atol=1e-12)
    both = cycle + rest
    np.testing.assert_allclose(season.removed_from_products(both @ both.T), left @ left.T, atol=1e-9)
    monthly = TimeAxis(((np.arange(48) + 0.5) * 730.5 * 3600).astype(np.int64), "standard")
    of_months = np.random.default_rng(8).normal(size=12)[monthly.months - 1][:, None]
    assert np.abs(Season.of(monthly, 6).removed_from(of_months)).max() < 0.2 * of_months.std()
    assert seasonal_share_of(of_months, monthly.months) == pytest.approx(1)
    with pytest.raises(InputError, match=r"of 6 harmonics needs at least 39 times, there are 38. .* --harmonics"):
        Season.of(TimeAxis(monthly.seconds[:38], "standard"), 6)


def test_what_is_said_of_regimes():
    assert months_in_words([0, 10, 11, 4]) == "Nov to Jan, May"
    assert (months_in_words(range(12)), months_in_words([])) == ("all year", "")
    told = told_by_month(np.array([0, 0, 1, 1, 1]), np.array([1, 1, 1, 2, 2]))
    assert (told.share, told.largest, told.gain) == pytest.approx((0.8, 0.6, 0.5))
    assert [duration_in_words(hours) for hours in (5, 100, 2000)] == ["5.0 hours", "4.2 days", "2.7 months"]
    assert [duration_in_words(hours, 730) for hours in (730, 1400, 2000)] == ["1.0 months", "1.9 months", "2.7 months"]
    assert Leads(np.array([1.0, 3, 6])).axis[1] == "h" and Leads(np.array([24.0, 72])).axis[1] == "days"
    ahead = Leads(np.array([6.0, 12, 71.5, 72, 240]))
    assert ahead.axis[0].tolist() == [0.25, 0.5, 71.5 / 24, 3, 10] and ahead.span == "6 h to 10 days"
    assert ahead.some(np.array([1, 1, 0, 1, 1], bool)) == "6 to 12 h, 3 to 10 days"
    assert ahead.some(np.array([1, 0, 1, 1, 0], bool)) == "6 h, 71.5 h to 3 days" and not ahead.some(np.zeros(5, bool))
    monthly = Leads(np.array([744.0, 1416, 2160]))  # January to March, of mean months 1.02, 1.94, 2.96
    assert monthly.axis[0].tolist() == [1, 2, 3] and monthly.axis[1] == "months"
    assert (monthly.one(0), monthly.one(2), monthly.span) == ("1 month", "3 months", "1 to 3 months")
    assert Leads(np.array([720.0, 1080])).span == "30 to 45 days", "a month and a half"
    assert Leads(np.arange(1, 5) * 504.0).span == "21 to 84 days", "steps are shorter than a month"
    assert [latitude_in_words(30), latitude_in_words(-2.5), latitude_in_words(0)] == ["30°N", "2.5°S", "0°"]
    assert [longitude_in_words(value) for value in (350, 20, -20, 360)] == ["10°W", "20°E", "20°W", "0°"]
    axis = TimeAxis(np.array([0, 1, 2, 3, 6, 7], dtype=np.int64) * 86400, "standard")
    assert _runs(np.array([True, False, True, True, True, False]), axis) == [1, 2, 1]  # a gap ends one


def test_a_rare_regime_of_any_month_is_no_season(site, tmp_path):
    """Every month has the same share of it: the larger cluster is the commonest of each."""
    labels = (np.random.default_rng(12).random(FRAMES) < 0.13).astype(int)
    found = find_regimes(read_embeddings(written(tmp_path / "z.nc", site[1], clouds(labels))), None, [2, 3], 2)
    assert found.suggestion.clusters == 2 and 0.8 < found.one("embedding").told_by_month.share < 0.95
    write_report(found, [], tmp_path / "report.md", 2)
    report = (tmp_path / "report.md").read_text()
    largest = (labels == 0).mean()
    assert "The regimes are more than seasons" in report and f"({largest:.0%}) |" in report
    assert f"and {largest:.0%} are of the largest regime anyway" in report
    seasons = np.asarray(found.embeddings.axis.months % 12 // 3)
    pure = find_regimes(read_embeddings(written(tmp_path / "s.nc", site[1], clouds(seasons))), None, [4], 2)
    write_report(pure, [], tmp_path / "report.md", 2)
    assert "The regimes are seasons" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("mine", "told"),
    [(0.331, "about as far apart as"), (0.345, "about as far apart as"), (0.36, "farther apart than"),
     (0.30, "not as far apart as"), (np.nan, "not to be compared with")],
)  # fmt: skip
def test_small_differences_to_eofs_have_no_verdict(found, mine, told):
    def judged(one):
        silhouette = {"embedding": mine, "eof": 0.33}.get(one.source, 0.5)
        agreement = {"embedding": 0.9, "eof": 0.89}.get(one.source, 0.5)
        return replace(
            one,
            data=one.data and replace(one.data, silhouette=silhouette),
            partition=replace(one.partition, halves_agreement=agreement),
        )

    compared = _compared(replace(found, judged=tuple(judged(one) for one in found.judged)))
    assert f"clusters are {told} those of as many EOFs (silhouette in data space {mine:.3f} and 0.330;" in compared
    assert "found again about as well as theirs in the other half of the record (0.90 and 0.89)" in compared


# The command


def faconv(*arguments):
    result = CliRunner().invoke(app, ["regimes", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_leaves_all_that_a_reader_needs(site, embedded, found, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "SHOWN", 1)  # of the variables: maps take their time
    out, options = tmp_path / "out", ("--clusters", "2-5", "--seeds", 2, "--harmonics", 2, "--json")
    data = "--data", site[0] / "store"
    told = faconv(embedded, *data, "--output", out, *options)
    assert told.strip() == (out / "regimes.json").read_text().strip()
    report = (out / "report.md").read_text()
    by_mixture = json.loads(faconv(embedded, *data, "--output", tmp_path / "mixture", "--method", "gmm", *options))
    assert (by_mixture["method"], by_mixture["suggestion"]["clusters"]) == ("gmm", 3)
    with xr.open_dataset(tmp_path / "mixture" / "regimes.nc", engine="h5netcdf") as file:
        np.testing.assert_array_equal(file.regime, file.regime_embedding_gmm.sel(clusters=3))
    assert "(Gaussian mixture, K = 3" in figures._title(replace(found, method="gmm"), "")
    assert "**3 regimes.**" in report and "are more than seasons" in report
    drawn = re.findall(r"!\[[^]]+\]\((\S+)\)", report)
    assert len(drawn) == 5 and all((out / name).stat().st_size > 10_000 for name in drawn)
    assert report.count("| network | k-means |") == 2  # in two spaces
    for one in json.loads((out / "regimes.json").read_text())["regimes"]:
        assert f"| {one['number']} | {one['times']} |" in report
    with xr.open_dataset(out / "regimes.nc", engine="h5netcdf") as file:
        labels = planted()[0]
        np.testing.assert_array_equal(file.regime, labels + 1)
        np.testing.assert_array_equal(file.regime_eof_gmm.sel(clusters=3), labels + 1)
        assert file.heat_anomaly.dims == ("regime_number", "latitude", "longitude")
        np.testing.assert_allclose(file.heat_anomaly, found.composites.anomaly_KCYX[:, 0], rtol=1e-5, atol=1e-5)
        assert str(file.time.values[3])[:10] == "2003-01-31" and file.silhouette.min() > 0.3
    said = json.loads((out / "regimes.json").read_text())
    asked = {
        "EMBEDDING": str(embedded), "--data": str(site[0] / "store"), "--clusters": "2-5", "--method": "kmeans",
        "--seeds": "2", "--harmonics": "2", "--sequence": "all", "--memory-gib": "1",
    }  # fmt: skip
    assert said == json.loads(json.dumps(as_dict(found)).replace("NaN", "null")) | {"asked": asked}


def test_earlier_regimes_are_not_replaced_unasked(embedded, tmp_path, monkeypatch):
    """By other options; by the same they are made anew, and what a killed command has left goes."""
    monkeypatch.setattr(partitions, "SURROGATES", 2)
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: path.touch() or path)
    out = tmp_path / "out"
    given = ("--output", out, "--clusters", 2, "--seeds", 2)
    faconv(embedded, *given)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert OUTPUT_LOCK not in before
    for more, told in (
        (
            ("--seeds", 3),
            r"out has regimes with --seeds 2, this command says 3\. Give another --output, or --overwrite",
        ),
        (("--method", "gmm"), r"with --method kmeans, this command says gmm"),
        (("--clusters", "2-3"), r"with --clusters 2-2, this command says 2-3"),
    ):
        with refused(told):
            faconv(embedded, *given, *more)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / ".0123abcd.part").mkdir()
    (out / ".0123abcd.part" / "regimes.nc").touch()
    with (
        locked_directory(out / OUTPUT_LOCK, "--output", InputError),
        refused(r"another clustering writes to \S*out: process \d+ on .*\. Wait, or give another --output"),
    ):
        faconv(embedded, *given)
    assert (out / ".0123abcd.part").exists()
    faconv(embedded, *given)
    assert {path.name for path in out.iterdir()} == before.keys()
    faconv(embedded, *given, "--seeds", 3, "--overwrite")
    assert json.loads((out / "regimes.json").read_text())["asked"]["--seeds"] == "3"


@pytest.fixture(scope="module")
def good(site, tmp_path_factory):
    """The bytes of a file of embeddings of twelve times."""
    return written(tmp_path_factory.mktemp("good") / "z.nc", site[1], clouds(planted()[0])[:12]).read_bytes()


def cut(raw):
    return raw[: len(raw) // 2]


def flipped(raw):
    """A bit of an embedding; values have a checksum."""
    z_TE = clouds(planted()[0])[:12].astype(np.float32)
    at = raw.index(z_TE[5:7].tobytes())
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("damaged", "told"),
    [
        (cut, r"truncated file"),
        (flipped, r"filter returned failure"),
        (lambda raw: raw.replace(b'{"--data": ', b'{"--data", '), r"Expecting ':' delimiter"),
        (lambda raw: raw.replace(b'{"variables":', b'{"variabels":'), r"\d+ validation errors? for Contract"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_called_damaged(good, tmp_path, damaged, told):
    """Not a file of others."""
    assert damaged(good) != good
    (tmp_path / "z.nc").write_bytes(damaged(good))
    with refused(rf"z.nc is damaged, or of another version \(.*{told}.*\)\. Copy it again, or embed again with --over"):
        read_embeddings(tmp_path / "z.nc")


def test_times_that_do_not_increase_are_refused(good, tmp_path):
    """Runs, halves and noise are of a record in its order."""
    (tmp_path / "z.nc").write_bytes(good)
    with xr.open_dataset(tmp_path / "z.nc", engine="h5netcdf", decode_times=False) as file:
        data = file.load()
    for times, told in (
        ([0, 1, 2, 2, 3], r"2003-01-21 00:00:00 comes after 2003-01-21 00:00:00\. Embed again with --overwrite"),
        ([0, 1, 3, 2, 4], r"each later than the one before, and in \S*o.nc 2003-01-21 \S+ comes after 2003-01-31"),
    ):
        data.isel(time=times).to_netcdf(tmp_path / "o.nc", engine="h5netcdf")
        with refused(told):
            read_embeddings(tmp_path / "o.nc")
    sequences = {"sequence": ("time", np.repeat([0, 1], 6), {"names": '["r1", "r2"]'})}
    data.isel(time=[*range(6), *range(6)]).assign(sequences).to_netcdf(tmp_path / "o.nc", engine="h5netcdf")
    assert read_embeddings(tmp_path / "o.nc").axis.names == ("r1", "r2")
    data.isel(time=[*range(6), 0, 1, 1, 2, 3, 4]).assign(sequences).to_netcdf(tmp_path / "o.nc", engine="h5netcdf")
    with refused(r"2003-01-11 \S+ of sequence r2 comes after 2003-01-11 \S+ of sequence r2"):
        read_embeddings(tmp_path / "o.nc")
    data.drop_vars("time").to_netcdf(tmp_path / "o.nc", engine="h5netcdf")
    with refused(r"o.nc is no file of embeddings \(it has no 'time'\)"):
        read_embeddings(tmp_path / "o.nc")


def test_a_collapsed_embedding_is_called_one(site, tmp_path):
    still = 3 + 1e-7 * np.random.default_rng(4).normal(size=(20, COMPONENTS))
    with refused(
        r"all 20 embeddings of \S*z.nc are the same but for rounding: the network has collapsed.*effective_rank"
    ):
        read_embeddings(written(tmp_path / "z.nc", site[1], still))


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_as_many_regimes_are_found_as_there_are_different_times(site, tmp_path, method):
    labels = by_size(np.arange(120) // 4 % 3)
    path = written(tmp_path / "z.nc", site[1], clouds(labels, noise=0))
    found = find_regimes(read_embeddings(path), None, [2, 3], 2, method=method)
    assert library.adjusted_rand_score(found.one("embedding", clusters=3).partition.labels_T, labels) == 1
    write_report(found, draw_all(found, tmp_path), tmp_path / "report.md", 2)


@pytest.mark.parametrize("place", ["plain/below", "/proc/below"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_found(embedded, tmp_path, monkeypatch, place):
    (tmp_path / "plain").touch()
    monkeypatch.setattr(find, "find_regimes", None)
    with refused(r"--output \S*below cannot be written: No.* directory\. Give a directory where you may write"):
        faconv(embedded, "--output", tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_what_does_not_fit_in_memory_is_thinned_and_said(site, embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(find, "MOST_TIMES", 40)
    embeddings, labels = read_embeddings(embedded), planted()[0]

    def reported(memory_gib):
        found = find_regimes(embeddings, record_of(site, embeddings, memory_gib), [3], 2, harmonics=2)
        write_report(found, [], tmp_path / "report.md", 2)
        write_netcdf(found, tmp_path / "regimes.nc")
        return (tmp_path / "report.md").read_text()

    report = reported(0.001)
    assert "one in 3 is judged" in report and "row and column" not in report
    with xr.open_dataset(tmp_path / "regimes.nc", engine="h5netcdf") as file:
        np.testing.assert_array_equal(file.regime, labels + 1)
        np.testing.assert_array_equal(file.regime_eof_kmeans[0, ::3], by_size(labels[::3]) + 1)
        assert not file.regime_eof_kmeans[0, 1::3].any() and np.isnan(file.silhouette[1::3]).all()
    report = reported(3e-5)  # 32 kB
    assert re.search(r"82 cells, every 2nd row and column, as all would not fit .*; 2 cells are missing", report)
    with refused(r"36 times of one cell of 2 variables need more than 9.97e-08 GiB. Give more with --memory-gib"):
        reported(1e-7)


@contextmanager
def refused(match):
    with pytest.raises(InputError, match=match):
        yield


def test_bad_input_is_refused(site, embedded, tmp_path):
    directory, contract = site
    z_TE = clouds(planted()[0])
    out = ("--output", tmp_path / "out")
    (tmp_path / "plain.nc").write_text("mine")
    broken = z_TE.copy()
    broken[7, 2] = np.nan
    for given, match in (
        ((tmp_path / "no.nc",), r"no.nc does not exist. Make it with `faconv embed"),
        ((tmp_path / "plain.nc",), r"plain.nc is no file of embeddings \(it starts with b'mine', no NetCDF4 does\)"),
        ((tmp_path,), r"\S+ is a directory, and embeddings are a file\. Give one that `faconv embed` has written"),
        ((directory / "source.nc",), r"source.nc is no file of embeddings \(it has no 'faconv_embed'\)"),
        ((written(tmp_path / "one.nc", contract, z_TE[:1]),), r"holds 1 embedding\(s\) at 1 time\(s\), .* 3 times"),
        ((written(tmp_path / "nan.nc", contract, broken),), r"no finite numbers, 1 of 108, the first of 2003-03-12"),
        (
            (written(tmp_path / "few.nc", contract, z_TE[:9]), "--clusters", "2-9"),
            r"9 clusters need more than 9 times, .* 9\. A",
        ),
        (
            (tmp_path / "few.nc", "--clusters", "2-10"),
            r"10 clusters need 10 different times at least, \S*few.nc has 9\. A",
        ),
        ((written(tmp_path / "same.nc", contract, z_TE[[0, 1] * 9]),), r"10 clusters .* has 2 among 18. Ask for fewer"),
        ((embedded, "--clusters", "1-3"), r"--clusters takes a number from 2 on, or a range such as 2-10, got 1-3"),
        ((embedded, "--clusters", "many"), r"--clusters takes .* got many"),
        ((embedded, "--sequence", "r1"), r"--sequence r1 is of a store, which --data does not name"),
        ((embedded, "--data", tmp_path / "x*.nc"), r"x\*.nc matches no file"),
        (
            (written(tmp_path / "later.nc", contract, z_TE, first=90), "--data", directory / "store"),
            r"no fields of 90 of 108 embeddings, the first of 2005-12-16",
        ),
        ((embedded, "--harmonics", 30), r"30 harmonics needs at least 183 times, there are 108"),
        (
            (written(tmp_path / "month.nc", contract, z_TE[:30]), "--harmonics", 2),
            r"needs the dates of a year, and these span 290 days: .* Leave --harmonics out",
        ),
        (
            (written(tmp_path / "99.nc", contract, z_TE[:99]), "--method", "gmm"),
            r"\(--method gmm\) need at least 100 times, \S*99.nc has 99\. Take those of k-means",
        ),
    ):
        with refused(match):
            faconv(*given, *out)
    with refused(r"plain.nc is a file. Give a directory"):
        faconv(embedded, "--output", tmp_path / "plain.nc")
    with refused(r"is the data, which it would replace"):
        faconv(embedded, "--data", directory / "store", "--output", directory / "store")
    assert not (tmp_path / "out").exists()
