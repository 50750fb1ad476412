"""From a data set of prompts to batches whose order is a function of the seed and the position alone."""

from collections.abc import Sequence
from typing import Any

import torch

from rdm_rl.randomness import seeded_generator


class PromptSource:
    """Prompts in a shuffled order without end: each epoch is its own permutation.

    A position in that order is a number, so a resumed run or another split into processes and micro-batches sees the
    same prompts.

    Args:
        dataset: Rows with a ``prompt``: a ``datasets.Dataset``, or a list of dictionaries.
        seed: Seed of the permutations.
        name: What an error calls the data set.

    Raises:
        ValueError: If the data set is empty or has no ``prompt`` column, or a prompt is no text.

    Example:
        >>> source = PromptSource([{"prompt": "a"}, {"prompt": "b"}], seed=0)
        >>> sorted(row["prompt"] for row in source.rows(2, 2))
        ['a', 'b']
    """

    def __init__(self, dataset: Any, seed: int, name: str = "train_dataset") -> None:
        """Check the data set."""
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"{name} is a {type(dataset).__name__}, which has no length. Use a datasets.Dataset (not a "
                "streaming one) or a list of dictionaries."
            )
        if len(dataset) == 0:
            raise ValueError(f"{name} is empty. Give it at least one row with a 'prompt'.")
        first = dataset[0]
        if not isinstance(first, dict) or "prompt" not in first:
            columns = list(first) if isinstance(first, dict) else type(first).__name__
            raise ValueError(f"{name} has no 'prompt' column; its rows hold {columns}. Rename the text column.")
        texts = [row["prompt"] for row in dataset] if isinstance(dataset, list) else dataset["prompt"]
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"Row {index} of the 'prompt' column of {name} holds {kind}, not text.")
        self._dataset, self._seed = dataset, seed
        self._epoch, self._order = -1, [0]

    def __len__(self) -> int:
        """Number of prompts in one epoch."""
        return len(self._dataset)

    def rows(self, start: int, count: int) -> list[dict[str, Any]]:
        """The rows at positions ``start`` to ``start + count - 1`` of the endless order."""
        return [self._row(position) for position in range(start, start + count)]

    def _row(self, position: int) -> dict[str, Any]:
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch:
            generator = seeded_generator(self._seed, "data", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator).tolist()
        row: dict[str, Any] = self._dataset[self._order[index]]
        return row


def other_columns(rows: Sequence[dict[str, Any]], repeat: int) -> dict[str, list[Any]]:
    """The columns beside ``prompt``, each entry repeated for the samples of its group.

    Args:
        rows: P rows.
        repeat: Samples G of each.

    Returns:
        Lists of length P * G by column name.

    Example:
        >>> other_columns([{"prompt": "a", "digit": 1}], 2)
        {'digit': [1, 1]}
    """
    names = [name for name in rows[0] if name != "prompt"]
    return {name: [row[name] for row in rows for _ in range(repeat)] for name in names}
