"""What an evaluation measured: a record for each row of its tables, and the file that programs read.

A measured value has one of these names; ``FEATURES`` is the name of a network, ``AGAINST`` that of what a set of images
is compared with:

=================================  ====================================================================================
name                               value
=================================  ====================================================================================
``reward/NAME``                    the mean of a reward
``FEATURES/frechet/AGAINST``       Fréchet distance between the two sets, and so on for ``kernel``, ``precision``,
                                   ``recall``, ``density`` and ``coverage``
``pixels/paired``                  root of the mean squared difference to the reference's image of the same noise
``FEATURES/paired``                one minus the cosine to it
``FEATURES/diversity``             the mean of one minus the cosine over the pairs of images of one prompt
=================================  ====================================================================================
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path
from typing import Any, Literal

from rdm_rl.evaluation.intervals import Estimate
from rdm_rl.evaluation.page import plain
from rdm_rl.files import read_json

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
Kind = Literal["reference", "student"]
ByImage = Sequence[Sequence[float]]  # A value for each prompt and each seed; NaN where there is none.


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one model or folder.

    Args:
        name: What it is called.
        kind: Whether it is what the others are compared with, ``reference``. Its own distances are those between two
            draws of it: the floor.
        num_images: How many images were looked at.
        num_inference_steps: Steps for each image, or None.
        network_evaluations: Samples through the denoising network for each image; NaN if unknown.
        seconds_per_image: Wall-clock time for each image; NaN if unknown.
        trained_on: Names of the rewards it was trained on.
        values: What was measured, by the names above.
        differences: How much higher each reward is than the reference's, paired by prompt and noise.
        by_image: The rewards and paired distances of each image, by name.
    """

    name: str
    kind: Kind
    num_images: int
    num_inference_steps: int | None = None
    network_evaluations: float = nan
    seconds_per_image: float = nan
    trained_on: Sequence[str] = ()
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    by_image: Mapping[str, ByImage] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole evaluation.

    Args:
        rows: What was measured, in the order of the tables.
        prompts: The prompts.
        seeds: The seeds of each prompt's images.
        reference: Name of the row that others are compared with; None if there is none.
        settings: What the evaluation was made with.
        versions: Of the libraries.
        seconds: How long it took; finished images were not drawn again.
    """

    rows: Sequence[Result]
    prompts: Sequence[str]
    seeds: Sequence[int]
    reference: str | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float

    def to_json(self) -> str:
        """All of it as strict JSON: what is not finite becomes null."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_results(path: str | Path) -> Results:
    """The results in a file, or in ``results.json`` of a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is of another version of the format.
    """
    file = Path(path) / RESULTS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r} has no {RESULTS_FILE}: give a folder that `rdm-rl evaluate` wrote.")
    content: dict[str, Any] = read_json(file)
    version = content.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{str(file)!r} has schema_version {version!r}, and this version of rdm_rl reads {SCHEMA_VERSION}. "
            "Evaluate again: images that were drawn are not drawn again."
        )
    return Results(**{**content, "rows": [_result(row) for row in content["rows"]]})


def _result(row: dict[str, Any]) -> Result:
    """A row as it was written: null becomes NaN."""
    estimates = {
        part: {name: Estimate(*map(_number, entry.values())) for name, entry in row[part].items()}
        for part in ("values", "differences")
    }
    by_image = {name: [[_number(value) for value in line] for line in lines] for name, lines in row["by_image"].items()}
    costs = {name: _number(row[name]) for name in ("network_evaluations", "seconds_per_image")}
    return Result(**{**row, **costs, **estimates, "by_image": by_image})


def _number(value: float | None) -> float:
    return nan if value is None else value
