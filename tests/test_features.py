"""Features of images are those of the networks, whatever the batch and the size."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, CLIPVisionModel

from rdm_rl.evaluation.features import load_features
from rdm_rl.rewards.preprocessing import Preprocessing
from tests.tiny_rewards import TRANSFORMERS, save_clip, save_settings, save_transformer

IMAGES = torch.rand(3, 3, 40, 33, generator=torch.Generator().manual_seed(0))


def test_those_of_clip_are_its_embedding(tmp_path: Path) -> None:
    folder, model, *_ = save_clip(tmp_path / "a clip")
    features = load_features(folder)
    assert features.name == "a clip"
    with torch.no_grad():
        output = model.get_image_features(pixel_values=Preprocessing.from_pretrained(folder)(IMAGES))
    expected = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert features(IMAGES).shape == (3, 20)
    assert torch.equal(features(IMAGES), expected)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_those_of_a_vision_transformer_are_its_class_token(kind: str, tmp_path: Path) -> None:
    folder = save_transformer(tmp_path, kind)
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(folder)(Preprocessing.from_pretrained(folder)(IMAGES)).last_hidden_state
    features = load_features(folder)
    assert torch.equal(features(IMAGES), tokens[:, 0])
    assert torch.allclose(features(IMAGES[1:2]), features(IMAGES)[1:2], atol=1e-5), "neighbours do not count"
    assert features(IMAGES).std(0).mean() > 0.01, "images differ"
    half = load_features(folder, dtype=torch.bfloat16)(IMAGES)
    assert half.dtype == torch.float32
    assert half == pytest.approx(features(IMAGES), abs=0.2)


def test_an_image_tower_alone_will_do_and_a_model_of_text_will_not(tmp_path: Path) -> None:
    model = save_clip(tmp_path / "clip")[1]
    tower = CLIPVisionModel(model.config.vision_config)
    tower.save_pretrained(tmp_path / "tower")
    save_settings(tmp_path / "tower", 28, crop_size=28)
    assert load_features(tmp_path / "tower")(IMAGES).shape == (3, 24)
    text = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    text.save_pretrained(tmp_path / "text")
    save_settings(tmp_path / "text", 28)
    with pytest.raises(ValueError, match="reads no images"):
        load_features(tmp_path / "text")
    with pytest.raises(OSError, match="features"):
        load_features(tmp_path / "nothing")
