"""Regimes for programs: regimes.nc with labels and composites, regimes.json with all numbers."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ...data.times import EPOCH_UNITS
from ...files import json_ready, write_durably
from ...forecasting.layout import attributes_of
from ..asked import ASKED
from ..netcdf import grid_coordinates, save_dataset
from .facts import facts_of
from .find import Judged, Regimes
from .partitions import METHODS

NETCDF, JSON = "regimes.nc", "regimes.json"
NO_LABEL = 0


def write_netcdf(regimes: Regimes, path: Path) -> None:
    """Labels from 1, 0 where a time has none; the file appears whole."""
    dataset = _dataset(regimes)
    save_dataset(dataset, path, encoding={name: {"zlib": True} for name in dataset.data_vars})


def _dataset(regimes: Regimes) -> xr.Dataset:
    axis, every = regimes.embeddings.axis, regimes.every
    clusters = [one.partition.clusters for one in regimes.candidates]
    times = {"standard_name": "time", "units": EPOCH_UNITS, "calendar": axis.calendar}
    coordinates: dict[str, Any] = {"time": ("time", axis.seconds, times), "clusters": ("clusters", clusters)}
    labels = {"long_name": "regime, from 1: the commonest first", "flag_meaning_0": "no regime"}
    silhouettes_T = np.full(len(axis), np.nan)
    silhouettes_T[::every] = regimes.sources[0].space.silhouettes(regimes.labels_T[::every])
    variables: dict[str, Any] = {
        "regime": ("time", (regimes.labels_T + 1).astype(np.int16), labels),
        "silhouette": ("time", silhouettes_T, {"long_name": "of the regime, in embedding space"}),
    }
    for source in regimes.sources:
        for method in source.methods:
            values = np.full((len(clusters), len(axis)), NO_LABEL, dtype=np.int16)
            for place, one in enumerate(regimes.of(source.key, method)):
                values[place, :: every // source.every] = one.partition.labels_T + 1
            told = labels | {"long_name": f"clusters of {METHODS[method]} of the {source.name}"}
            variables[f"regime_{source.key}_{method}"] = (("clusters", "time"), values, told)
    if axis.names:
        variables["sequence"] = ("time", np.array(axis.names)[axis.numbers], {"long_name": "of the record"})
    if regimes.composites is not None and regimes.record is not None:
        found = regimes.composites
        dims = ("regime_number", "latitude", "longitude")
        coordinates["regime_number"] = ("regime_number", np.arange(1, len(found.anomaly_KCYX) + 1))
        coordinates |= grid_coordinates(found.latitude_deg, found.longitude_deg)
        kinds = {
            "anomaly": (found.anomaly_KCYX, "mean of the regime less that of all times"),
            "beyond_season": (found.beyond_season_KCYX, "mean of the regime less those of its times' calendar months"),
        }
        for kind, (values_KCYX, told_of) in kinds.items():
            for channel, variable in enumerate(regimes.record.variables):
                said = {"units": variable.units, "long_name": f"{variable.long_name or variable.name}: {told_of}"}
                variables[f"{variable.name}_{kind}"] = (dims, values_KCYX[:, channel].astype(np.float32), said)
    return xr.Dataset(variables, coordinates, attributes_of(title_of(regimes)))


def title_of(regimes: Regimes) -> str:
    """Of all files."""
    return f"Regimes of: {regimes.embeddings.title}"


def as_dict(regimes: Regimes) -> dict[str, Any]:
    """All numbers."""
    data = regimes.data
    return {
        "title": title_of(regimes),
        "embeddings": str(regimes.embeddings.path),
        "made_of": regimes.embeddings.made_of,
        "times": len(regimes.embeddings.axis),
        "first": regimes.embeddings.axis.label(0),
        "last": regimes.embeddings.axis.label(len(regimes.embeddings.axis) - 1),
        "harmonics_removed": regimes.harmonics,
        "seasonal_shares": regimes.seasonal_shares,
        "one_time_judged_in": regimes.every,
        "method": regimes.method,
        "suggestion": asdict(regimes.suggestion),
        "standings": {clusters: asdict(one) for clusters, one in regimes.standings.items()},
        "regimes": [asdict(one) for one in facts_of(regimes)],
        "partitions": [_row(one) for one in regimes.judged],
        "data": None
        if data is None or regimes.record is None
        else {
            "name": regimes.record.asked.told,
            "identity": regimes.record.asked.value,
            "variables": [one.name for one in regimes.record.variables],
            "row_and_column_taken_in": data.stride,
            "cells": data.cells,
            "cells_left_out": data.left_out,
            "variance_explained_by_eofs": data.explained,
        },
    }


def _row(judged: Judged) -> dict[str, Any]:
    one = judged.partition
    return {
        "source": judged.source,
        "method": one.method,
        "clusters": one.clusters,
        "seeds_agreement": one.seeds_agreement,
        "halves_agreement": one.halves_agreement,
        "likelihood": one.likelihood,
        "bic": one.bic,
        "told_by_month": judged.told_by_month.share,
        "largest_cluster": judged.told_by_month.largest,
        "gained_by_month": judged.told_by_month.gain,
        "own_space": judged.own.as_dict(),
        "data_space": None if judged.data is None else judged.data.as_dict(),
    }


def json_of(regimes: Regimes, request: Mapping[str, str]) -> str:
    """What is NaN is null.

    Args:
        request: what was asked for, by argument or option, see `check_is_free`.
    """
    return json.dumps(json_ready(as_dict(regimes) | {ASKED: request}), indent=2) + "\n"


def write_json(regimes: Regimes, path: Path, request: Mapping[str, str]) -> None:
    """The file appears whole."""
    write_durably(path, json_of(regimes, request))
