"""What tests keep of h5netcdf is what it would look up."""

import h5netcdf
import numpy as np

from handles import keep_handles


def test_a_handle_is_kept_until_its_dataset_has_another_place_or_its_file_is_closed(tmp_path, monkeypatch):
    keep_handles(monkeypatch)
    with h5netcdf.File(tmp_path / "some.nc", "w") as nc:
        nc.dimensions = {"x": 3}
        scale = nc.dimensions["x"]._h5ds
        assert nc.dimensions["x"]._h5ds is scale
        nc.create_variable("x", ("x",), float, data=np.arange(3.0))  # in the place of what was the dimension alone
        assert nc.dimensions["x"]._h5ds != scale and nc.dimensions["x"]._h5ds[2] == 2
    with h5netcdf.File(tmp_path / "some.nc") as nc:
        kept = nc["x"]._h5ds
        assert nc["x"]._h5ds is kept and nc["x"][1] == 1
    assert not kept
