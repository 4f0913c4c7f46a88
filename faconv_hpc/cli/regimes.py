"""``faconv regimes``: clusters of the times of an embedding, with figures and a report."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import InputError
from ..files import cannot_write, replacing_together
from ..locks import held_output
from .options import AsJson
from .trained import OfSequence, Overwrite, check_directory, paths_in, shown_stages

if TYPE_CHECKING:
    from ..evaluation.regimes.find import Regimes

Embedding = Annotated[Path, typer.Argument(metavar="EMBEDDING", help="A file that `faconv embed` has written.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="What was embedded, for fields and EOFs: a store; or NetCDF, zarr, GRIB, a pattern, may be repeated.",
    ),
]
Output = Annotated[Path, typer.Option(metavar="DIR", help="For report.md, figures, regimes.nc and regimes.json.")]
Clusters = Annotated[
    str | None,
    typer.Option(metavar="K or FIRST-LAST", help="How many clusters to try. Default: 2-10, fewer if times are few."),
]
By = Annotated[
    Literal["kmeans", "gmm"],
    typer.Option("--method", help="Whose clusters are the regimes. gmm: of Gaussian mixtures of one covariance."),
]
Seeds = Annotated[int, typer.Option(min=2, help="Random starts whose clusters are compared.")]
Harmonics = Annotated[
    int,
    typer.Option(
        min=0,
        help="Take an annual cycle of so many harmonics away first, from embeddings and fields. 6 if data are monthly.",
    ),
]
Memory = Annotated[float, typer.Option("--memory-gib", min=0.001, help="For fields; beyond it rows are left out.")]
DEFAULT = (2, 10)


def regimes_command(
    embedding: Embedding,
    output: Output,
    data: Data = None,
    clusters: Clusters = None,
    method: By = "kmeans",
    seeds: Seeds = 5,
    harmonics: Harmonics = 0,
    sequence: OfSequence = None,
    memory_gib: Memory = 1.0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find regimes: times with like embeddings, over a range of their number, and which number to take.

    By k-means and Gaussian mixtures, judged by whether other seeds and halves of the record find them again, by whether
    noise has the like, by the metrics of the paper's authors, and beside EOFs of the same fields. Read report.md first.
    Earlier regimes of other embeddings or options are not touched without --overwrite.

    Example: `faconv regimes embeddings.nc --data data/era5 --output regimes`
    """
    from ..evaluation.asked import check_is_free
    from ..evaluation.regimes.embedding_file import read_embeddings

    embeddings, paths = read_embeddings(embedding), paths_in(data or ())
    check_directory(output, [*paths, embedding])
    numbers = _numbers(clusters, len(embeddings.z_TE))

    from ..evaluation.regimes.files import JSON
    from ..evaluation.regimes.find import find_regimes  # takes seconds: not before what is asked for can be made
    from ..evaluation.regimes.records import Record

    request = {
        "EMBEDDING": str(embedding.absolute()),
        "--data": ", ".join(str(path.absolute()) for path in paths) or "not given",
        "--clusters": f"{numbers[0]}-{numbers[-1]}",
        "--method": method,
        "--seeds": str(seeds),
        "--harmonics": str(harmonics),
        "--sequence": sequence or "all",
        "--memory-gib": f"{memory_gib:g}",
    }
    with held_output(output, "clustering"):
        if not overwrite:
            check_is_free(output / JSON, "regimes", request)
        record = None
        if paths:
            record = Record.of(embeddings.contract, embeddings.axis, paths, sequence, memory_gib)
        elif sequence is not None:
            raise InputError(f"--sequence {sequence} is of a store, which --data does not name. Give --data.")
        with shown_stages() as stages:
            found = find_regimes(embeddings, record, numbers, seeds, harmonics, method, stages)
            _write(found, output, seeds, request)
    _show(found, output, request, as_json)


def _numbers(text: str | None, times: int) -> range:
    if text is None:
        first, last = DEFAULT[0], min(DEFAULT[1], times - 1)
    else:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 2 <= first <= last:
        raise InputError(f"--clusters takes a number from 2 on, or a range such as 2-10, got {text}.")
    return range(first, last + 1)


def _write(found: "Regimes", output: Path, seeds: int, request: Mapping[str, str]) -> None:
    from ..evaluation.regimes.figures import draw_all
    from ..evaluation.regimes.files import JSON, NETCDF, write_json, write_netcdf
    from ..evaluation.regimes.report import CAPTIONS, REPORT, write_report

    try:
        with replacing_together(output, (NETCDF, *CAPTIONS, REPORT, JSON)) as beside:
            figures = draw_all(found, beside)
            write_netcdf(found, beside / NETCDF)
            write_report(found, figures, beside / REPORT, seeds)
            write_json(found, beside / JSON, request)
    except OSError as error:
        raise cannot_write("--output", output, error) from None


def _show(found: "Regimes", output: Path, request: Mapping[str, str], as_json: bool) -> None:
    from ..evaluation.regimes.files import json_of
    from ..evaluation.regimes.report import REPORT, told_of_calendar

    if as_json:
        print(json_of(found, request), end="")
    else:
        times, suggestion = len(found.embeddings.axis), found.suggestion
        told = f"{suggestion.clusters} regimes of" if suggestion.steady else "No regimes beyond doubt in"
        print(f"{told} {times} times. {suggestion.reason}")
        if calendar := told_of_calendar(found):
            print(f"{calendar}. --harmonics shows what there is beyond it.")
        print(f"Read {output / REPORT}")
