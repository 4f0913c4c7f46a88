"""The look of figures: what is drawn where, and that a print in grey can be read."""

import re

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Path as Outline

from faconv_hpc.coastlines import coastlines
from faconv_hpc.look import (
    LINE_COLOURS,
    LINE_DASHES,
    LINE_MARKERS,
    Colours,
    colour_bar,
    draw_map,
    fill_colour,
    line_style,
    new_figure,
    save_figure,
)

LATITUDE, LONGITUDE = np.linspace(87.5, -87.5, 36), np.arange(0, 360, 5.0)


def waves():
    """(36, 72): positive east of Greenwich, negative west of it."""
    return np.cos(np.deg2rad(LATITUDE))[:, None] * np.sin(np.deg2rad(LONGITUDE))


def drawn(field, colours, latitude=LATITUDE, longitude=LONGITUDE):
    figure, ((axes,),) = new_figure(1, 1, "a map", maps=True)
    image = draw_map(axes, latitude, longitude, field, colours)
    return figure, axes, image


@pytest.mark.parametrize(
    ("place", "on_land"),
    {"Sahara": (5, 22, 1), "Amazon": (-60, -5, 1), "Antarctica, east": (90, -80, 1), "Siberia": (100, 65, 1),
     "Australia": (135, -25, 1), "Atlantic": (-40, 30, 0), "Indian Ocean": (80, -30, 0), "North Pole": (0, 89, 0),
     "Pacific": (170, -20, 0)}.items(),
)  # fmt: skip
def test_coastlines_lie_around_land(place, on_land):
    longitude, latitude, land = on_land
    polygons = [line[~np.isnan(line[:, 0])] for line in coastlines()]
    around = [line for line in polygons if len(line) > 60 and Outline(line).contains_point((longitude, latitude))]
    assert bool(around) == bool(land), place


def test_no_coast_is_drawn_along_a_cut():
    """Where the map ends in the Bering Strait and at the south pole there is none."""
    for resolution in ("c", "l"):
        lines = np.concatenate([np.append(line, [[np.nan, np.nan]], axis=0) for line in coastlines(resolution)])
        assert np.nanmin(lines[:, 0]) >= -180 and np.nanmax(lines[:, 0]) <= 180
        steps = np.abs(np.diff(lines, axis=0))
        assert np.nanmax(steps[:, 0]) < 30, "a line goes across the map"
        along = (lines[1:, 0] == lines[:-1, 0]) & np.isin(lines[1:, 0], (-180, 0, 180))
        assert not along.any()


def test_a_map_has_longitude_0_in_the_middle_and_its_signs_can_be_told_in_grey():
    field = waves()
    _, axes, image = drawn(field, Colours.of_changes(field))
    np.testing.assert_array_equal(image.get_array()[:, :-1], np.roll(field, 36, axis=1))
    np.testing.assert_array_equal(image.get_array()[:, -1], field[:, 36])  # reaches across 180 degrees
    assert axes.get_xlim() == (-180, 180) and axes.get_ylim() == (-90, 90)
    sides = {}
    for lines in (one for one in axes.collections if hasattr(one, "levels")):
        sides[lines.get_linestyle()[0][1] is None] = lines.get_paths()[0].vertices[:, 0].mean()
    assert sides[True] == pytest.approx(90, abs=3), "what is above half the scale has solid lines"
    assert sides[False] == pytest.approx(-90, abs=3), "below: dashed ones"


@pytest.mark.parametrize(
    ("west", "east", "centre"), [(150, 210, 180), (-210, -150, 180), (100, 340, -140), (20, 60, 40), (-30, 30, 0)]
)
def test_a_map_of_a_region_is_cut_where_it_has_no_cells(west, east, centre):
    """Across 180 degrees as well: no cell is stretched around the world, and coasts lie where they belong."""
    longitude, latitude = np.arange(west, east + 1, 2.0), np.arange(-50, 1, 2.0)
    field = np.broadcast_to(np.cos(np.deg2rad(longitude - centre)), (latitude.size, longitude.size))
    figure, axes, image = drawn(field, Colours.of_values(field), latitude, longitude % 360)
    edges, (first, last) = image.get_coordinates()[0, :, 0], axes.get_xlim()
    np.testing.assert_allclose(np.diff(edges), 2.0)
    assert last - first == pytest.approx(east - west + 2)
    assert (first + last) / 2 % 360 == pytest.approx(centre % 360)
    np.testing.assert_allclose(image.get_array(), field)
    (coast,) = (one for one in axes.collections if isinstance(one, LineCollection))
    points = np.concatenate(coast.get_segments())
    shown = points[(points[:, 0] > first) & (points[:, 0] < last) & (points[:, 1] > -50) & (points[:, 1] < 0)]
    world = np.concatenate(coastlines("l" if east - west <= 120 else "c"))
    there = ((world[:, 0] - first) % 360 < last - first) & (world[:, 1] > -50) & (world[:, 1] < 0)
    assert len(shown) == there.sum() > 20
    figure.draw_without_rendering()
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert "180°" in labels or centre != 180
    assert all(re.fullmatch(r"(0|180|[\d.]+°[EW])°?", text) for text in labels), labels
    assert axes.get_xlim() == (first, last), "ticks lie within the map"


def test_colours_fit_the_quantity():
    field = np.linspace(-1, 3, 401)
    changes, magnitudes, values = (
        make(field) for make in (Colours.of_changes, Colours.of_magnitudes, Colours.of_values)
    )
    assert changes.signed and changes.low == -changes.high == pytest.approx(-2.96, abs=0.01)
    assert (magnitudes.low, magnitudes.signed) == (0.0, False) and magnitudes.high == pytest.approx(2.96, abs=0.01)
    assert (values.low, values.high) == pytest.approx((-0.98, 2.98), abs=0.01)
    nothing = np.full(3, np.nan)
    assert (Colours.of_changes(nothing).high, Colours.of_values(np.zeros(3)).high) == (1.0, 2.0)


def test_a_bar_says_that_there_is_more_beyond_it():
    field = waves()
    for scale, extend in {0.5: "both", 2.0: "neither"}.items():
        _, axes, image = drawn(field, Colours("coolwarm", -scale, scale, signed=True))
        assert colour_bar(image, axes, "change [K]").extend == extend


def test_lines_are_told_apart_without_colour():
    styles = [line_style(number) for number in range(len(LINE_COLOURS))]
    assert len({str(one["linestyle"]) for one in styles}) == len(set(LINE_MARKERS)) == len(LINE_DASHES) == len(styles)
    lightness = [np.dot(to_rgb(one["color"]), (0.2126, 0.7152, 0.0722)) for one in styles]
    assert min(abs(np.diff(lightness))) > 0.05


def test_lines_beyond_the_eighth_are_other_lines():
    styles = [line_style(number) for number in range(2 * len(LINE_COLOURS))]
    for what in ("linestyle", "marker"):
        assert len({(one["color"], str(one[what])) for one in styles}) == len(styles)
    assert {one.get("markerfacecolor") for one in styles[len(LINE_COLOURS) :]} == {"white"}
    assert not any("markerfacecolor" in one for one in styles[: len(LINE_COLOURS)])


def test_areas_beyond_the_eighth_are_paler():
    colours = [to_rgb(fill_colour(number)) for number in range(2 * len(LINE_COLOURS))]
    assert len(set(colours)) == len(colours) and colours[: len(LINE_COLOURS)] == [to_rgb(one) for one in LINE_COLOURS]
    assert (np.array(colours[len(LINE_COLOURS) :]) > np.array(colours[: len(LINE_COLOURS)]) - 1e-9).all()


def test_a_figure_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    figure, _, _ = drawn(waves(), Colours.of_changes(waves()))
    path = save_figure(figure, tmp_path / "new" / "map.png")
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG") and "plate carrée" in figure.get_supxlabel()

    def full(beside, **_):
        beside.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        save_figure(figure, path)
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == ["map.png"]


def test_a_bar_of_several_panels_has_the_ends_of_all_of_them():
    """The last panel alone would say that no field leaves the scale."""
    _, ((first, second),) = new_figure(1, 2, "Changes")
    latitude, longitude, colours = np.array([10.0, 0.0, -10.0]), np.arange(4) * 90.0, Colours("coolwarm", -1.0, 1.0)
    draw_map(first, latitude, longitude, np.full((3, 4), 3.0), colours, coasts=False)
    image = draw_map(second, latitude, longitude, np.zeros((3, 4)), colours, coasts=False)
    assert (
        colour_bar(image, [first, second], "K").extend == "max" and colour_bar(image, second, "K").extend == "neither"
    )


def test_a_long_title_stays_within_its_figure(tmp_path):
    figure, _ = new_figure(1, 1, "Mean fields of each regime less those of its calendar months, " * 3, width=4.0)
    save_figure(figure, tmp_path / "title.png")
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width
