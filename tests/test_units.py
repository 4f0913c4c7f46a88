"""Units are the same however they are written."""

import pytest

from faconv_hpc.data.units import hint, same_units

SAME = [
    ("m/s", "m s-1", "m s**-1", "m s^-1", "m*s**-1", "m.s-1", "m·s⁻¹", "s-1 m"),
    ("kg m-2 s-1", "kg/m2/s", "kg m**-2/s", "kg/m^2/s"),
    ("m2 s-2", "m**2 s**-2", "m m/s/s"),
    ("kg kg-1", "1", "kg/kg"),
    ("1/s", "s-1", "s**-1"),
    ("%",),
    ("K",),
    ("(0 - 1)", "(0-1)"),
    ("",),
    ("ms-2",),
    ("ms-1", "1/ms", "ms**-1", "ms^-1"),
]


@pytest.mark.parametrize("number", range(len(SAME)), ids=[one[0] or "none" for one in SAME])
def test_units_are_the_same_however_they_are_written(number):
    """And none of another row."""
    for one in SAME[number]:
        assert all(same_units(one, other) and same_units(other, one) for other in SAME[number])
        for others in SAME[:number] + SAME[number + 1 :]:
            assert not any(same_units(one, other) for other in others), one


def test_powers_count():
    assert not same_units("m s-1", "m s-2") and not same_units("m/s", "m s") and not same_units("kg/m2 s", "kg/m2/s")


def test_a_blank_that_makes_other_units_is_told_of():
    assert "A blank alone tells them apart: if both mean the same, correct" in hint("ms-1", "m s-1")
    assert hint("ms-1", "m s**-1") == hint("m s-1", "ms^-1") != ""
    assert hint("m s-1", "m s**-1") == hint("ms-1", "1/ms") == hint("m s-1", "km s-1") == ""
