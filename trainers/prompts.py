"""From a data set of prompts to batches whose order is a function of the seed and the position alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from xxhash import xxh3_128

from rdm_rl.families.encoding import CutPrompts
from rdm_rl.randomness import seeded_generator, seeded_generators
from rdm_rl.trainers.prompt_files import PromptRows, read_prompts, text_fault

if TYPE_CHECKING:
    from rdm_rl.trainers.rdm_config import RDMConfig

_INSTEAD = "Use a datasets.Dataset (not a streaming one) or a list of dictionaries."


class PromptSource:
    """Prompts in a shuffled order without end: each epoch is its own permutation.

    A position in that order is a number, so a resumed run or another split into processes and micro-batches sees the
    same prompts. Every row has the same columns: None where the data set has none for it.

    Args:
        dataset: Rows with a ``prompt``: a ``datasets.Dataset``, a list of dictionaries, or anything else with a length
            whose entries are such; or the name of what :func:`~rdm_rl.trainers.prompt_files.read_prompts` reads.
        seed: Seed of the permutations.
        name: What an error calls the data set.
        columns: Columns that the rows have besides their own.

    Raises:
        ValueError: If the data set is empty, has no length or no rows, or a row has no ``prompt`` that is text.

    Example:
        >>> source = PromptSource([{"prompt": "a"}, {"prompt": "b", "digit": 1}], seed=0)
        >>> sorted(row["prompt"] for row in source.rows(2, 2))
        ['a', 'b']
        >>> source[0]
        {'prompt': 'a', 'digit': None}
    """

    def __init__(
        self, dataset: Any, seed: int, name: str = "train_dataset", columns: Sequence[str] = ("prompt",)
    ) -> None:
        """Check the data set."""
        if isinstance(dataset, str | Path):
            dataset = read_prompts(dataset)
        _check_kind(dataset, name)
        self._dataset, self._seed, self._name = dataset, seed, name
        self._epoch, self._order = -1, [0]
        names = dict.fromkeys(columns)
        if hasattr(dataset, "column_names"):
            names |= dict.fromkeys(dataset.column_names)
            _check_columns(dataset.column_names, name)
        else:
            for index in range(len(dataset)):
                row = self._stored_row(index)
                _check_columns(row, f"Row {index} of {name}")
                names |= dict.fromkeys(row)
        self.columns = list(names)
        for index, text in enumerate(self.texts()):
            fault = text_fault(text)
            if fault is not None:
                raise ValueError(f"Row {index} of the 'prompt' column of {name} {fault}.")

    def __len__(self) -> int:
        """Number of prompts in one epoch."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row of the data set, in its own order."""
        return {**dict.fromkeys(self.columns), **self._stored_row(index)}

    def _stored_row(self, index: int) -> Mapping[str, Any]:
        try:
            row = self._dataset[index]
        except (LookupError, TypeError) as error:  # What is no sequence of rows, a table of pandas, say.
            raise ValueError(
                f"{self._name}[{index}] of this {type(self._dataset).__name__} ends with {error!r}. {_INSTEAD}"
            ) from None
        if not isinstance(row, Mapping):
            raise ValueError(f"{self._name} has no 'prompt' column; its rows hold {type(row).__name__}. {_INSTEAD}")
        return row

    def texts(self) -> Iterator[str]:
        """The prompts, in the data set's order."""
        if hasattr(self._dataset, "column_names"):
            return iter(self._dataset["prompt"])
        return (self._dataset[index]["prompt"] for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """How many prompts there are, and a short name for their texts in their order."""
        digest = xxh3_128()
        for text in self.texts():
            digest.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))
        return f"{len(self)}, {digest.hexdigest()[:16]}"

    def rows(self, start: int, count: int) -> list[dict[str, Any]]:
        """The rows at positions ``start`` to ``start + count - 1`` of the endless order."""
        return [self._row(position) for position in range(start, start + count)]

    def _row(self, position: int) -> dict[str, Any]:
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch:
            generator = seeded_generator(self._seed, "data", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator).tolist()
        return self[self._order[index]]

    def describe(self, cuts: Iterable[CutPrompts] = ()) -> str:
        """What was read, in one line.

        Args:
            cuts: The prompts that are too long for the pipeline.

        Returns:
            The number of prompts, and of those that are unusual.

        Example:
            >>> source = PromptSource([{"prompt": text} for text in ("a", "", "a")], seed=0)
            >>> source.describe([CutPrompts(("tokenizer",), limit=77, count=1, longest=90)])
            '3 prompts (1 empty, 1 repeated); 1 is cut to the 77 tokens of tokenizer (the longest has 90)'
        """
        texts = [text for text in self.texts() if text.strip()]
        numbers = {
            "blank left out": self._dataset.blank if isinstance(self._dataset, PromptRows) else 0,
            "empty": len(self) - len(texts),
            "repeated": len(texts) - len({*texts}),
        }
        unusual = ", ".join(f"{number:,} {what}" for what, number in numbers.items() if number)
        line = f"{len(self):,} prompt{'s' * (len(self) != 1)}{f' ({unusual})' if unusual else ''}"
        for cut in cuts:
            line += f"; {cut.count:,} {'is' if cut.count == 1 else 'are'} cut to the {cut.limit} tokens of "
            line += f"{' and '.join(cut.tokenizers)} (the longest has {cut.longest:,})"
        return line


def _check_kind(dataset: Any, name: str) -> None:
    """Refuse what is no sequence of rows, or has none."""
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"{name} is a {kind} of {', '.join(map(repr, dataset))}. If these are splits, pass one of them: "
            f"{name}[{next(iter(dataset), 'train')!r}]; if they are columns, datasets.Dataset.from_dict makes rows."
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"{name} is a {kind}, which has no length. {_INSTEAD}")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty. Give it at least one row with a 'prompt'.")


def _check_columns(columns: Iterable[str], name: str) -> None:
    if "prompt" not in columns:
        raise ValueError(f"{name} has no 'prompt' column; its rows hold {list(columns)}. Rename the text column.")


def other_columns(rows: Sequence[dict[str, Any]], repeat: int) -> dict[str, list[Any]]:
    """The columns beside ``prompt``, each entry repeated for the samples of its group.

    Args:
        rows: P rows with the same columns, as :class:`PromptSource` gives them.
        repeat: Samples G of each.

    Returns:
        Lists of length P * G by column name.

    Example:
        >>> other_columns([{"prompt": "a", "digit": 1}], 2)
        {'digit': [1, 1]}
    """
    names = [name for name in rows[0] if name != "prompt"]
    return {name: [row[name] for row in rows for _ in range(repeat)] for name in names}


def eval_rows(dataset: Any, prompts: PromptSource, count: int) -> list[dict[str, Any]]:
    """The rows that an evaluation measures: all of a data set's, or, of None, the first that are trained on.

    Args:
        dataset: The data set for evaluations, or None.
        prompts: The training prompts, whose columns the rows have, too.
        count: How many of those there are at most.

    Raises:
        ValueError: As in :class:`PromptSource`.
    """
    if dataset is None:
        return [prompts[index] for index in range(min(count, len(prompts)))]
    source = PromptSource(dataset, 0, "eval_dataset", prompts.columns)
    return [source[index] for index in range(len(source))]


def noise_seeds(
    args: "RDMConfig", prompts: Sequence[str], sample_ids: Sequence[int], stream: str, update: int
) -> list[int] | None:
    """The seeds of the initial noises, where these are shared, drawn from a pool, or paired with kept images.

    Args:
        args: The settings.
        prompts: The prompt of each sample, length N.
        sample_ids: Its number over all processes.
        stream: What the samples are for.
        update: Number of their rollout.

    Returns:
        A seed for each sample; None where each draws its noise from generators of its own.
    """
    if args.group_noise == "own" and args.noise_pool is None and args.teacher_cache_dir is None:
        return None
    size = args.num_generations if args.group_noise == "shared" else 1
    generators = seeded_generators(args.seed, f"{stream}/noise_seed", update, (sample // size for sample in sample_ids))
    if args.noise_pool is None:
        return [int(torch.randint(2**62, (1,), generator=generator)) for generator in generators]
    # A pool belongs to its prompt and not to the run, so that another run finds the same teacher images.
    drawn = [int(torch.randint(args.noise_pool, (1,), generator=generator)) for generator in generators]
    return [crc32(prompt.encode()) << 24 | number for prompt, number in zip(prompts, drawn, strict=True)]
