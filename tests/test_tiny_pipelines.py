"""The tiny pipelines of the tests are real ones: they draw, and what is saved draws the same."""

import time

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from tests.tiny_pipelines import TINY, align_weights, draw


@pytest.mark.parametrize("name", TINY)
def test_draws_saves_and_loads_without_a_hub(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    state = torch.random.get_rng_state()
    pipeline = TINY[name](tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    start = time.perf_counter()
    image = draw(pipeline)
    assert time.perf_counter() - start < 5  # under 0.3 s on an idle core; a busy machine gets room
    size = {"unconditional": 8, "sana": 32}.get(name, 16)
    assert image.shape == (1, size, size, 3)
    assert image.std() > 0.01
    assert not np.array_equal(image, draw(pipeline, seed=1))

    pipeline.save_pretrained(tmp_path / "saved")
    without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3_without_t5" else {}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", **without)
    assert type(loaded) is type(pipeline)
    align_weights(loaded)
    np.testing.assert_array_equal(draw(loaded), image)


@pytest.mark.parametrize("name", TINY)
def test_no_parameter_is_constant_and_all_are_the_same_again(name, tmp_path) -> None:
    first, second = TINY[name](tmp_path), TINY[name](tmp_path)
    count = 0
    for component, module in first.components.items():
        if not isinstance(module, nn.Module):
            continue
        again = second.components[component].state_dict()
        for key, parameter in module.named_parameters():
            if name != "sd":  # tests.helpers.tiny_sd keeps diffusers' own initial values
                assert parameter.numel() == 1 or parameter.std() > 0, f"{component}.{key}"
            assert torch.equal(parameter, again[key]), f"{component}.{key}"
            count += parameter.numel()
    assert 10_000 < count < 2_000_000


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("unconditional", "dit")])
def test_the_prompt_matters(name, tmp_path) -> None:
    pipeline = TINY[name](tmp_path)
    assert not np.array_equal(draw(pipeline, prompt="a red cat"), draw(pipeline, prompt="a blue dog"))


def test_the_class_matters(tmp_path) -> None:
    pipeline = TINY["dit"](tmp_path)
    assert not np.array_equal(draw(pipeline, class_labels=[1]), draw(pipeline, class_labels=[2]))
    assert pipeline.get_label_ids(["three"]) == [3]
