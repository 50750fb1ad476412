"""Prompts are encoded once, and kept under the name of the encoders that did it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_rl.families import load_family
from rdm_rl.families.encoding import PromptCache
from tests.helpers import QUICK, quick_trainer, same, tiny_sd, trained_weights
from tests.tiny_pipelines import tiny_flux, tiny_sd3, tiny_sdxl

TEXTS = ["the digit 3", "a cat", "the digit 3"]


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_sd3], ids=["sd", "sdxl", "sd3"])
def test_rows_are_the_encoders(make: object, tmp_path: Path) -> None:
    family = load_family(make(tmp_path / "source"))
    expected = {text: family.encode([text]).tensors for text in TEXTS}
    empty = family.empty_prompt().tensors
    for _ in range(2):  # Encoded, then read.
        family._empty = None
        family.prompt_cache = PromptCache(tmp_path / "cache", family.encoder_fingerprint())
        found = family.encode(TEXTS).tensors
        for name, rows in found.items():
            assert torch.equal(rows, torch.cat([expected[text][name] for text in TEXTS]))
        assert same(dict(family.empty_prompt().tensors), dict(empty))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_prompt_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load_family(tiny_sd(tmp_path / "source"))
    family.prompt_cache = PromptCache(tmp_path / "cache", family.encoder_fingerprint())
    seen: list[str] = []
    encode = family.encode_prompts
    monkeypatch.setattr(family, "encode_prompts", lambda prompts: seen.extend(prompts) or encode(prompts))
    family.fill_prompt_cache(TEXTS, show_progress=False)
    family.encode(TEXTS)
    family.fill_prompt_cache([*TEXTS, "a dog"], show_progress=False)
    assert seen == ["the digit 3", "a cat", "a dog"]


def one_row_of_the_embedding(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[57] += 1e-3  # A learned token.


CHANGES = {
    "a learned token": one_row_of_the_embedding,
    "length of a prompt": lambda pipeline: setattr(pipeline.tokenizer, "model_max_length", 12),
    "another token": lambda pipeline: pipeline.tokenizer.add_tokens(["<mine>"]),
    "precision": lambda pipeline: pipeline.text_encoder.to(torch.bfloat16),
    "a setting of the encoder": lambda pipeline: setattr(pipeline.text_encoder.config, "eos_token_id", 2),
    "a setting of the pipeline": lambda pipeline: pipeline.register_to_config(force_zeros_for_empty_prompt=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_row_changes_its_name(change: Callable[[Any], None], tmp_path: Path) -> None:
    family = load_family(tiny_sdxl(tmp_path / "source"))
    name = family.encoder_fingerprint()
    assert load_family(tiny_sdxl(tmp_path / "again")).encoder_fingerprint() == name
    change(family.pipeline)
    assert family.encoder_fingerprint() != name


def test_flux_dev_and_schnell_share_no_rows(tmp_path: Path) -> None:
    """They may have the same encoders, but prompts of another length."""
    family = load_family(tiny_flux(tmp_path / "dev"))
    name = family.encoder_fingerprint()
    family.network.register_to_config(guidance_embeds=False)
    assert family.encoder_fingerprint() != name


def test_a_run_with_a_cache_is_the_run_without(base: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "num_generations": 1, "per_device_train_batch_size": 1, "max_steps": 2}
    plain = quick_trainer(base, tmp_path / "plain", "rdm", **settings)
    plain.train()
    cached = quick_trainer(base, tmp_path / "cached", "rdm", prompt_cache_dir=str(tmp_path / "cache"), **settings)
    assert cached.family.offloads_text_encoders
    cached.train()
    assert same(trained_weights(plain), trained_weights(cached))
    # All prompts of the run and of the sample grid were there before the first update.
    texts = {row["prompt"] for row in cached.prompts.rows(0, 2)} | {*cached.eval_prompts}
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == len(texts) + 1  # And the empty prompt.


def test_the_encoders_wait_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device nothing can be seen to move, so the orders to move are counted."""
    family = load_family(tiny_sd(tmp_path / "source"))
    family.offloads_text_encoders = True
    moves: list[str] = []
    encoder = family.pipeline.text_encoder
    monkeypatch.setattr(encoder, "to", lambda device: moves.append(str(device)) or encoder)
    family.to(torch.device("cpu"))
    assert moves == []  # The encoder is left where it is.
    monkeypatch.setattr("rdm_rl.families.encoding.device_of", lambda network: torch.device("meta"))
    family.encode(["a cat"])
    assert moves == ["cpu", "cpu"]  # To the network's device, and back.
    family.prompt_cache = PromptCache(tmp_path / "cache", "key")
    family.encode(["a cat", "a dog"])
    assert len(moves) == 4  # Once for both.
    family.encode(["a dog", "a cat"])
    assert len(moves) == 4  # Not at all.


def test_settings_reach_the_family(base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, "rdm", offload=["text_encoders"], **QUICK)
    assert trainer.family.offloads_text_encoders
    assert trainer.family.prompt_cache is None
    assert not quick_trainer(base, tmp_path, "rdm", **QUICK).family.offloads_text_encoders
