"""GRIB: every message becomes a field, or the file is refused. Written with ecCodes, read back through a store."""

from collections.abc import Iterable
from pathlib import Path

import eccodes
import numpy as np
import pytest

from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from sources import whole

NLAT, NLON = 7, 8
HOURS = (0, 6, 12, 18)
Message = tuple[str, str, int, int]  # name, kind of level, level, hour


def field_of(message: Message) -> np.ndarray:
    seed = abs(hash(message[1:])) % 1000 + sum(map(ord, message[0]))
    return np.random.default_rng(seed).normal(size=(NLAT, NLON))


def write(path: Path, messages: Iterable[Message], **keys: object) -> Path:
    with path.open("ab") as file:
        for name, kind, level, hour in messages:
            grib = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib2")
            wanted = {
                "Ni": NLON, "Nj": NLAT, "latitudeOfFirstGridPointInDegrees": 90.0,
                "latitudeOfLastGridPointInDegrees": -90.0, "longitudeOfFirstGridPointInDegrees": 0.0,
                "longitudeOfLastGridPointInDegrees": 315.0, "iDirectionIncrementInDegrees": 45.0,
                "jDirectionIncrementInDegrees": 30.0, "dataDate": 20200101, "dataTime": hour * 100,
                "typeOfLevel": kind, "level": level, "shortName": name, "bitsPerValue": 24, **keys,
            }  # fmt: skip
            for key, value in wanted.items():
                eccodes.codes_set(grib, key, value)
            eccodes.codes_set_values(grib, field_of((name, kind, level, hour)).ravel())
            eccodes.codes_write(grib, file)
            eccodes.codes_release(grib)
    return path


def at_all_hours(*fields: tuple[str, str, int]) -> list[Message]:
    return [(*one, hour) for hour in HOURS for one in fields]


def assert_is(store: Path, channel: str, field: tuple[str, str, int]) -> None:
    got, _, _ = whole(store, channel)
    want = np.stack([field_of((*field, hour)) for hour in HOURS])
    np.testing.assert_allclose(got[:, 0], want, atol=1e-6)


WINDS = [
    ("u", "isobaricInhPa", 850),
    ("u", "isobaricInhPa", 500),
    ("v", "isobaricInhPa", 850),
    ("v", "isobaricInhPa", 500),
]
SURFACE = [("2t", "heightAboveGround", 2), ("10u", "heightAboveGround", 10), ("10v", "heightAboveGround", 10)]


def test_all_messages_of_two_winds_become_fields(tmp_path: Path) -> None:
    source = write(tmp_path / "winds.grib", at_all_hours(*WINDS))
    made = prepare([source], tmp_path / "o")
    assert set(made.channels) == {"u850", "u500", "v850", "v500"} and made.frames == 4 and not made.has_missing
    for name, kind, level in WINDS:
        assert_is(tmp_path / "o", f"{name}{level}", (name, kind, level))


def test_fields_at_different_heights_are_all_taken(tmp_path: Path) -> None:
    """Of which cfgrib on its own keeps one height, and says so in a log."""
    source = write(tmp_path / "surface.grib", at_all_hours(*SURFACE, *WINDS))
    made = prepare([source], tmp_path / "o")
    assert set(made.channels) == {"t2m", "u10", "v10", "u850", "u500", "v850", "v500"} and made.frames == 4
    for channel, field in zip(("t2m", "u10", "v10"), SURFACE, strict=True):
        assert_is(tmp_path / "o", channel, field)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    raw = write(tmp_path / "winds.grib", at_all_hours(*WINDS)).read_bytes()
    for share in (0.6, 0.999):
        (tmp_path / "cut.grib").write_bytes(raw[: int(len(raw) * share)])
        with pytest.raises(
            InputError, match=r"cut\.grib is GRIB that cannot be read \(PrematureEndOfFile.*Fetch it again"
        ):
            prepare([tmp_path / "cut.grib"], tmp_path / "o")


def test_a_message_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    raw = bytearray(write(tmp_path / "winds.grib", at_all_hours(*WINDS)).read_bytes())
    second = raw.index(b"GRIB", 4)
    raw[second + 16 : second + 60] = b"\xff" * 44  # its headers
    (tmp_path / "bad.grib").write_bytes(raw)
    with pytest.raises(InputError, match=r"bad\.grib (is GRIB that cannot be read|has GRIB messages)"):
        prepare([tmp_path / "bad.grib"], tmp_path / "o")


def test_a_field_without_a_message_is_told(tmp_path: Path) -> None:
    source = write(tmp_path / "holes.grib", at_all_hours(*WINDS)[:-1])
    made = prepare([source], tmp_path / "o")
    assert made.has_missing and any("no message for 1 of 8 of v" in note for note in made.notes)


def test_messages_that_differ_in_nothing_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "twice.grib", at_all_hours(*WINDS, WINDS[0]))
    with pytest.raises(
        InputError,
        match=r"twice\.grib has GRIB messages that differ in nothing but .*, 4 in all, the first .*u at isob.*850",
    ):
        prepare([source], tmp_path / "o")


def test_a_repeated_message_does_not_make_up_for_one_that_is_missing(tmp_path: Path) -> None:
    messages = at_all_hours(*WINDS)
    source = write(tmp_path / "both.grib", [*messages[:-1], messages[-3]])
    with pytest.raises(InputError, match=r"both\.grib has GRIB messages that differ in nothing but .*, 1 in all"):
        prepare([source], tmp_path / "o")


def test_one_name_at_two_kinds_of_levels_is_two_fields(tmp_path: Path) -> None:
    hybrid = [("t", "hybrid", 1), ("t", "hybrid", 2)]
    pressure = [("t", "isobaricInhPa", 850), ("t", "isobaricInhPa", 500)]
    source = write(tmp_path / "levels.grib", at_all_hours(*hybrid, *pressure))
    assert set(prepare([source], tmp_path / "o").channels) == {"t1", "t2", "t850", "t500"}
    for kind, _, level in (*hybrid, *pressure):
        field = next(one for one in (*hybrid, *pressure) if one[2] == level)
        assert_is(tmp_path / "o", f"{kind}{level}", field)


def test_a_version_of_the_data_is_taken(tmp_path: Path) -> None:
    """ERA5 beside its preliminary end; whichever way the version is written."""
    source = tmp_path / "versions.grib"
    for version in ("0001", "0005"):
        write(source, at_all_hours(WINDS[0]), setLocalDefinition=1, localDefinitionNumber=1, expver=version)
    with pytest.raises(InputError, match=r"differ in nothing but their values.*such as expver"):
        prepare([source], tmp_path / "o")
    for place, text in enumerate(("1", "0001")):
        assert prepare([source], tmp_path / str(place), select={"expver": text}).frames == 4


def test_a_variable_without_a_name_is_a_field(tmp_path: Path) -> None:
    source = tmp_path / "local.grib"
    with source.open("wb") as file:
        for hour in HOURS:
            grib = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib2")
            for key, value in {"dataDate": 20200101, "dataTime": hour * 100, "parameterCategory": 200}.items():
                eccodes.codes_set(grib, key, value)
            eccodes.codes_write(grib, file)
            eccodes.codes_release(grib)
    assert prepare([source], tmp_path / "o", accept=["unknown"]).channels == ("unknown",)


def test_what_a_selection_leaves_out_is_told(tmp_path: Path) -> None:
    source = write(tmp_path / "mixed.grib", at_all_hours(*SURFACE, *WINDS))
    notes = prepare([source], tmp_path / "o", select={"typeOfLevel": "isobaricInhPa"}).notes
    assert any("--select leaves out t2m, u10, v10" in note for note in notes)


def test_a_part_of_a_file_is_taken_by_a_key(tmp_path: Path) -> None:
    source = write(tmp_path / "mixed.grib", at_all_hours(*SURFACE, *WINDS))
    made = prepare([source], tmp_path / "o", select={"typeOfLevel": "isobaricInhPa"})
    assert set(made.channels) == {"u500", "u850", "v500", "v850"}
    made = prepare([source], tmp_path / "p", select={"typeOfLevel": "isobaricInhPa", "level": "500"})
    assert set(made.channels) == {"u500", "v500"}
    with pytest.raises(InputError, match=r"--select typeOfLevel=hybrid: no source has such a dim, nor a GRIB"):
        prepare([source], tmp_path / "q", select={"typeOfLevel": "hybrid"})


def test_one_member_of_an_ensemble(tmp_path: Path) -> None:
    source = tmp_path / "ensemble.grib"
    for number in (0, 1, 2):
        write(source, at_all_hours(*WINDS), productDefinitionTemplateNumber=1, number=number)
    with pytest.raises(
        InputError, match=r"no members or lead times\. Take one of 'number', for example with --select number=0"
    ):
        prepare([source], tmp_path / "o")
    assert prepare([source], tmp_path / "o", select={"number": "1"}).frames == 4
    assert_is(tmp_path / "o", "v500", WINDS[3])


def test_what_cfgrib_cannot_lay_out_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors have no ancestor of ours; such as `WrongGridError` for a grid that is none of its own."""
    import cfgrib

    class WrongGridError(Exception):
        pass

    def refuse(*arguments: object, **options: object) -> None:
        raise WrongGridError("no such grid")

    monkeypatch.setattr(cfgrib, "open_datasets", refuse)
    source = write(tmp_path / "winds.grib", at_all_hours(*WINDS))
    with pytest.raises(InputError, match=r"winds\.grib is GRIB that cannot be read \(WrongGridError: no such grid\)"):
        prepare([source], tmp_path / "o")


def test_without_cfgrib_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from faconv_hpc.prepare import grib

    source = write(tmp_path / "winds.grib", at_all_hours(*WINDS))
    monkeypatch.setattr(grib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"is GRIB, which needs the package cfgrib.*pip install cfgrib"):
        prepare([source], tmp_path / "o")
