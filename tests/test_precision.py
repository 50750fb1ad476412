"""Half precision is a model's own: what it keeps in float32 stays there, and what overflows all the same is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdm_rl.families import Family, load_family
from rdm_rl.families.encoding import PromptCache
from rdm_rl.families.precision import to_precision
from tests.helpers import tiny_sd
from tests.tiny_pipelines import tiny_flux, tiny_pixart, tiny_sana, tiny_sd3, tiny_t5

OF_T5: dict[str, tuple[Callable[[Path], Any], str]] = {
    "sd3": (tiny_sd3, "text_encoder_3"),
    "flux": (tiny_flux, "text_encoder_2"),
    "pixart": (tiny_pixart, "text_encoder"),
}


def overflowing(t5: nn.Module) -> None:
    """Make the sums in ``wo`` larger than float16 holds, as those of the published weights are."""
    with torch.no_grad():
        for name, parameter in t5.named_parameters():
            if name.endswith("wo.weight"):
                parameter.mul_(3e5)


def encoded(family: Family, prompt: str = "the digit 3") -> Tensor:
    return family.encode([prompt]).tensors["encoder_hidden_states"].float()


@pytest.mark.parametrize("name", OF_T5)
def test_t5_encodes_in_half_precision_as_in_float32(name: str, tmp_path: Path) -> None:
    make, encoder = OF_T5[name]
    pipeline = make(tmp_path / "source")
    overflowing(getattr(pipeline, encoder))
    pipeline.save_pretrained(tmp_path / "model")
    exact = encoded(load_family(pipeline))
    halved = load_family(pipeline)
    halved.set_precision(torch.float16)
    for family in (halved, load_family(tmp_path / "model", dtype=torch.float16)):
        t5 = getattr(family.pipeline, encoder)
        dtypes = {weight: value.dtype for weight, value in t5.named_parameters()}
        assert {dtypes.pop(weight) for weight in list(dtypes) if ".wo." in weight} == {torch.float32}
        assert set(dtypes.values()) == {torch.float16}
        assert (encoded(family) - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_what_is_kept_for_float16_alone(dtype: torch.dtype, expected: torch.dtype) -> None:
    t5 = tiny_t5(16)
    t5._keep_in_fp32_modules_strict = {"final_layer_norm"}
    to_precision(t5, dtype)
    dtypes = {name: value.dtype for name, value in t5.named_parameters()}
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == expected
    assert dtypes["encoder.final_layer_norm.weight"] == torch.float32
    assert dtypes["encoder.block.0.layer.0.SelfAttention.q.weight"] == dtype


def test_gemma_is_never_in_float16(tmp_path: Path) -> None:
    tiny_sana().save_pretrained(tmp_path / "model")
    family = load_family(tmp_path / "model", dtype=torch.float16)
    family.set_precision(torch.float16)
    assert family.pipeline.transformer.dtype == torch.float16
    assert {value.dtype for value in family.pipeline.text_encoder.parameters()} == {torch.bfloat16}


def test_an_encoding_that_is_not_finite_is_no_encoding(tmp_path: Path) -> None:
    family = load_family(tiny_sd(tmp_path))
    with torch.no_grad():
        family.pipeline.text_encoder.get_input_embeddings().weight[family.pipeline.tokenizer("3").input_ids[1]] = 1e38
    assert encoded(family, "a cat").isfinite().all()
    message = r"prompt 'digit 3' is encoded with values that are not finite .*CLIPTextModel in torch.float32"
    for cache in (None, PromptCache(tmp_path, "key")):
        family.prompt_cache = cache
        with pytest.raises(ValueError, match=message):
            family.encode(["a cat", "digit 3"])
    assert family.prompt_cache is not None
    assert family.prompt_cache.missing(["a cat", "digit 3"]) == ["digit 3"]
