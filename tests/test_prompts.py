"""The order of the prompts is a function of the seed and the position."""

from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from pandas import DataFrame

from rdm_rl.families.encoding import CutPrompts
from rdm_rl.trainers.prompts import PromptSource, other_columns

ROWS = [{"prompt": letter, "digit": index} for index, letter in enumerate("abcdefg")]


def texts(source: PromptSource, start: int, count: int) -> str:
    return "".join(row["prompt"] for row in source.rows(start, count))


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    source = PromptSource(ROWS, seed=0)
    epochs = [texts(source, 7 * epoch, 7) for epoch in range(4)]
    assert all(sorted(epoch) == list("abcdefg") for epoch in epochs)
    assert len(set(epochs)) == 4


def test_a_position_is_the_same_however_it_is_reached() -> None:
    whole = texts(PromptSource(ROWS, seed=0), 0, 30)
    source = PromptSource(ROWS, seed=0)
    assert texts(source, 20, 10) + texts(source, 3, 5) == whole[20:30] + whole[3:8]
    assert "".join(texts(source, position, 1) for position in range(30)) == whole


def test_the_seed_matters() -> None:
    assert texts(PromptSource(ROWS, seed=0), 0, 21) != texts(PromptSource(ROWS, seed=1), 0, 21)


def test_a_dataset_and_a_list_agree() -> None:
    assert PromptSource(Dataset.from_list(ROWS), seed=3).rows(2, 9) == PromptSource(ROWS, seed=3).rows(2, 9)


def test_other_columns_follow_their_samples() -> None:
    assert other_columns(ROWS[1:3], 3) == {"digit": [1, 1, 1, 2, 2, 2]}
    assert other_columns([{"prompt": "a"}], 3) == {}


class MapStyle:
    """A data set as torch has them: a length, and rows by number, of which each may have other keys."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index] if index % 2 else {**ROWS[index], "hard": True}


def test_every_row_has_every_column() -> None:
    source = PromptSource(MapStyle(), seed=0, columns=["prompt", "count"])
    assert source.columns == ["prompt", "count", "digit", "hard"]
    assert source[0] == {"prompt": "a", "count": None, "digit": 0, "hard": True}
    assert {(row["digit"] % 2, row["hard"]) for row in source.rows(0, 14)} == {(0, True), (1, None)}
    assert other_columns(source.rows(0, 7), 2).keys() == {"count", "digit", "hard"}


def test_the_prompts_are_described_in_one_line() -> None:
    assert PromptSource(ROWS[:1], seed=0).describe() == "1 prompt"
    source = PromptSource([{"prompt": text} for text in ("a", " ", "a", "b", "")], seed=0)
    cuts = [CutPrompts(("tokenizer", "tokenizer_2"), 77, 1200, 90), CutPrompts(("tokenizer_3",), 256, 1, 300)]
    assert source.describe(cuts) == (
        "5 prompts (2 empty, 1 repeated); 1,200 are cut to the 77 tokens of tokenizer and tokenizer_2 (the longest has "
        "90); 1 is cut to the 256 tokens of tokenizer_3 (the longest has 300)"
    )


def test_unusable_data_are_refused() -> None:
    for dataset, message in (
        ([], "train_dataset is empty"),
        (Dataset.from_list([]), "train_dataset is empty"),
        ([{"text": "a"}], r"no 'prompt' column; its rows hold \['text'\]"),
        (Dataset.from_list([{"text": "a"}]), "no 'prompt' column"),
        (["a", "b"], "its rows hold str"),
        ([{"prompt": 3}], "holds int, not text"),
        ([{"prompt": "a"}, {"prompt": None}], "Row 1 .* holds NoneType, not text"),
        ([{"prompt": "a"}, {"text": "a"}], r"Row 1 of train_dataset has no 'prompt' column; its rows hold \['text'\]"),
        (
            DatasetDict({"few": Dataset.from_list(ROWS)}),
            r"is a DatasetDict of 'few'.* pass one .*train_dataset\['few'\]",
        ),
        ({"prompt": ["a"], "digit": [1]}, r"is a dict of 'prompt', 'digit'.*datasets.Dataset.from_dict"),
        (DataFrame(ROWS), "of this DataFrame ends with KeyError.* Use a datasets.Dataset"),
        (({"prompt": "a"} for _ in range(3)), "is a generator, which has no length"),
        (Dataset.from_list(ROWS).to_iterable_dataset(), "is a IterableDataset, which has no length"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptSource(dataset, seed=0)
