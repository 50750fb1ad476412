"""What all tests share: no network, and tiny pipelines saved once."""

import gc
import os

# Before anything imports huggingface_hub, which reads them once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_finish() -> None:
    """Make tiny networks quick: together this halves the time of the tests."""
    import torch

    # oneDNN sets up each convolution anew, which takes longer than a tiny one itself.
    torch.backends.mkldnn.enabled = False
    # And the garbage collector would walk all of torch and diffusers again and again.
    gc.collect()
    gc.freeze()


@pytest.fixture
def onednn() -> Iterator[None]:
    """For networks that are not tiny, for memory, and for what must equal a process of its own bit for bit."""
    from tests.helpers import with_onednn

    with with_onednn():
        yield


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a tiny saved pipeline: ``bases("v_prediction", rescale_betas_zero_snr=True)``."""
    from tests.helpers import tiny_sd

    @cache
    def make(prediction_type: str = "epsilon", seed: int = 0, **scheduler: Any) -> Path:
        folder = tmp_path_factory.mktemp("base")
        tiny_sd(folder / "sources", prediction_type, seed, **scheduler).save_pretrained(folder / "pipeline")
        return folder / "pipeline"

    return make


@pytest.fixture(scope="session")
def base(bases: Callable[..., Path]) -> Path:
    """The folder of a tiny saved pipeline that predicts epsilon."""
    return bases()
