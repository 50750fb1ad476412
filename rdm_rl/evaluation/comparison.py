"""Several evaluations side by side, paired by prompt and seed."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rdm_rl.evaluation.images import occurrences
from rdm_rl.evaluation.intervals import mean_by_prompt, paired_difference
from rdm_rl.evaluation.results import Result, Results


def compare(runs: Mapping[str, Results], baseline: str | None = None) -> Results:
    """The rows of several evaluations as one, on the prompts and seeds that all of them have.

    Rewards and paired distances are averaged again over what is shared. Distances between sets are kept if all runs
    have the same prompts and seeds, and left out otherwise: they depend on which images are in the set. A row that runs
    have alike, such as that of one teacher, is shown once, with all that any of them measured.

    Args:
        runs: Evaluations by the name that they get in front of their rows.
        baseline: Name of the row that the others are compared with, ``RUN: ROW``; None for the first run's reference,
            or else its first row.

    Raises:
        ValueError: If there are not two runs, nothing is shared, or no row is called so.

    Example:
        >>> row = Result(name="a", kind="student", num_images=1, values={}, by_image={"reward/ink": [[1.0]]})
        >>> run = Results(rows=[row], prompts=["a"], seeds=[0], reference=None, settings={}, versions={}, seconds=1.0)
        >>> other = replace(run, rows=[replace(row, by_image={"reward/ink": [[3.0]]})])
        >>> compare({"x": run, "y": other}).rows[1].differences["reward/ink"].value
        2.0
    """
    if len(runs) < 2:
        raise ValueError("A comparison needs at least two evaluations: give two folders that `rdm-rl evaluate` wrote.")
    first = next(iter(runs.values()))
    numbered = {
        name: {prompt: place for place, prompt in enumerate(occurrences(results.prompts))}
        for name, results in runs.items()
    }
    prompts = [prompt for prompt in occurrences(first.prompts) if all(prompt in known for known in numbered.values())]
    seeds = [seed for seed in first.seeds if all(seed in results.seeds for results in runs.values())]
    if not prompts or not seeds:
        raise ValueError("The evaluations share no prompt and seed, so nothing pairs their images.")
    alike = all(list(results.prompts) == list(first.prompts) for results in runs.values())
    alike = alike and all(list(results.seeds) == list(first.seeds) for results in runs.values())
    rows: dict[str, Result] = {}
    for run, results in runs.items():
        places = [numbered[run][prompt] for prompt in prompts], [results.seeds.index(seed) for seed in seeds]
        for row in results.rows:
            shared = _shared(row, *places, keep_sets=alike)
            alias = next((name for name, other in rows.items() if _same(other, shared)), None)
            if alias is None:
                rows[f"{run}: {row.name}"] = shared
            else:  # One of them may have been measured by more.
                other = rows[alias]
                values, by_image = {**shared.values, **other.values}, {**shared.by_image, **other.by_image}
                rows[alias] = replace(other, values=values, by_image=by_image)
    base = baseline or next((name for name, row in rows.items() if row.kind == "reference"), next(iter(rows)))
    if base not in rows:
        raise ValueError(f"baseline={base!r} is none of {', '.join(rows)}.")
    known = {name: torch.tensor(values) for name, values in rows[base].by_image.items()}
    merged = [
        replace(
            row,
            name=name,
            kind="reference" if name == base else "student",
            differences={}
            if name == base
            else {
                measured: paired_difference(torch.tensor(values), known[measured])
                for measured, values in row.by_image.items()
                if measured.startswith("reward/") and measured in known
            },
        )
        for name, row in rows.items()
    ]
    return replace(
        first,
        rows=merged,
        reference=base,
        prompts=[prompt for prompt, _ in prompts],
        seeds=seeds,
        settings={name: results.settings for name, results in runs.items()},
        seconds=sum(results.seconds for results in runs.values()),
    )


def _shared(row: Result, prompts: list[int], seeds: list[int], *, keep_sets: bool) -> Result:
    """A row on some of its prompts and seeds."""
    tables: dict[str, Tensor] = {name: torch.tensor(values)[prompts][:, seeds] for name, values in row.by_image.items()}
    kept = row.values if keep_sets else {}
    values = {**kept, **{name: mean_by_prompt(table) for name, table in tables.items()}}
    count = len(prompts) * len(seeds) if tables and not keep_sets else row.num_images
    return replace(
        row, values=values, num_images=count, by_image={name: table.tolist() for name, table in tables.items()}
    )


def _same(first: Result, second: Result) -> bool:
    """Whether two rows of one name were measured on the same images: all that was measured of both is equal."""
    names = first.by_image.keys() & second.by_image.keys()
    # Without a value is alike, too.
    pairs = [[torch.tensor(row.by_image[name]).nan_to_num(torch.inf) for row in (first, second)] for name in names]
    return first.name == second.name and bool(names) and all(torch.equal(*pair) for pair in pairs)
