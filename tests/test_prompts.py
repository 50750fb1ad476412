"""The order of the prompts is a function of the seed and the position."""

import pytest
from datasets import Dataset

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


def test_unusable_data_are_refused() -> None:
    for dataset, message in (
        ([], "train_dataset is empty"),
        (Dataset.from_list([]), "train_dataset is empty"),
        ([{"text": "a"}], r"no 'prompt' column; its rows hold \['text'\]"),
        (Dataset.from_list([{"text": "a"}]), "no 'prompt' column"),
        (["a", "b"], "its rows hold str"),
        ([{"prompt": 3}], "holds int, not text"),
        (({"prompt": "a"} for _ in range(3)), "is a generator, which has no length"),
        (Dataset.from_list(ROWS).to_iterable_dataset(), "is a IterableDataset, which has no length"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptSource(dataset, seed=0)
