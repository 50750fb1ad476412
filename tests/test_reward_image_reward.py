"""ImageReward on small random weights in the published layout, against a forward pass written out here."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import BertTokenizerFast

from rdm_rl.rewards.image_reward import ImageReward, convert, find_weights, network_for
from rdm_rl.rewards.preprocessing import Preprocessing

WORDS = "a red blue cat dog on the table with hat".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
IMAGE, TEXT = "blip.visual_encoder.", "blip.text_encoder."


def published_weights(
    *,
    width: int = 128,
    depth: int = 2,
    side: int = 64,
    text_width: int = 64,
    text_depth: int = 2,
    vocabulary: int = len(VOCABULARY) + 2,
    positions: int = 40,
) -> dict[str, Tensor]:
    """Random weights with the names and shapes of ImageReward.pt, which also holds parts that the score leaves out."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
        weights[name] = torch.empty(shape)
        if not weights[name].is_meta:
            weights[name].normal_(0, fan_in**-0.5, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def norm(name: str, size: int) -> None:
        add(f"{name}.weight", size)
        weights[f"{name}.weight"] += 1
        add(f"{name}.bias", size)

    add(IMAGE + "cls_token", 1, 1, width)
    add(IMAGE + "pos_embed", 1, (side // 16) ** 2 + 1, width)
    add(IMAGE + "patch_embed.proj.weight", width, 3, 16, 16)
    add(IMAGE + "patch_embed.proj.bias", width)
    for block in range(depth):
        name = f"{IMAGE}blocks.{block}"
        norm(f"{name}.norm1", width)
        linear(f"{name}.attn.qkv", width, 3 * width)
        linear(f"{name}.attn.proj", width, width)
        norm(f"{name}.norm2", width)
        linear(f"{name}.mlp.fc1", width, 4 * width)
        linear(f"{name}.mlp.fc2", 4 * width, width)
    norm(IMAGE + "norm", width)
    add(TEXT + "embeddings.word_embeddings.weight", vocabulary, text_width)
    add(TEXT + "embeddings.position_embeddings.weight", positions, text_width)
    weights[TEXT + "embeddings.position_ids"] = torch.arange(positions)[None]
    norm(TEXT + "embeddings.LayerNorm", text_width)
    for layer in range(text_depth):
        name = f"{TEXT}encoder.layer.{layer}"
        for attention, source in (("attention", text_width), ("crossattention", width)):
            linear(f"{name}.{attention}.self.query", text_width, text_width)
            linear(f"{name}.{attention}.self.key", source, text_width)
            linear(f"{name}.{attention}.self.value", source, text_width)
            linear(f"{name}.{attention}.output.dense", text_width, text_width)
            norm(f"{name}.{attention}.output.LayerNorm", text_width)
        linear(f"{name}.intermediate.dense", text_width, 4 * text_width)
        linear(f"{name}.output.dense", 4 * text_width, text_width)
        norm(f"{name}.output.LayerNorm", text_width)
    for index, inputs, outputs in ((0, text_width, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        linear(f"mlp.layers.{index}", inputs, outputs)
    linear("blip.vision_proj", width, 16)
    linear("blip.text_proj", text_width, 16)
    return weights


def reference(weights: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """The raw values, from the weights by their published names: BLIP as its paper describes it."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (query, key, value))
        return ((q @ k.mT / 8 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

    x = functional.conv2d(
        pixels, weights[IMAGE + "patch_embed.proj.weight"], weights[IMAGE + "patch_embed.proj.bias"], stride=16
    )
    x = torch.cat([weights[IMAGE + "cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    x = x + weights[IMAGE + "pos_embed"]
    block = 0
    while f"{IMAGE}blocks.{block}.norm1.weight" in weights:
        name = f"{IMAGE}blocks.{block}"
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{name}.attn.proj", attend(q, k, v))
        hidden = functional.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x, 1e-6)))
        x = x + linear(f"{name}.mlp.fc2", hidden)
        block += 1
    seen = norm(IMAGE + "norm", x, 1e-6)

    length = tokens.shape[1]
    h = weights[TEXT + "embeddings.word_embeddings.weight"][tokens]
    h = norm(TEXT + "embeddings.LayerNorm", h + weights[TEXT + "embeddings.position_embeddings.weight"][:length], 1e-12)
    padding = (1 - mask[:, None, None, :].float()) * -1e4
    layer = 0
    while f"{TEXT}encoder.layer.{layer}.output.dense.weight" in weights:
        name = f"{TEXT}encoder.layer.{layer}"
        for attention, source, bias in (("attention", h, padding), ("crossattention", seen, 0.0)):
            at = f"{name}.{attention}"
            source = h if attention == "attention" else source
            new = attend(
                linear(f"{at}.self.query", h),
                linear(f"{at}.self.key", source),
                linear(f"{at}.self.value", source),
                bias,
            )
            h = norm(f"{at}.output.LayerNorm", h + linear(f"{at}.output.dense", new), 1e-12)
        hidden = functional.gelu(linear(f"{name}.intermediate.dense", h))
        h = norm(f"{name}.output.LayerNorm", h + linear(f"{name}.output.dense", hidden), 1e-12)
        layer += 1
    value = h[:, 0]
    for index in (0, 2, 4, 6, 7):
        value = linear(f"mlp.layers.{index}", value)
    return value[:, 0]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return published_weights()


@pytest.fixture(scope="module")
def folder(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds, and a vocabulary of ten words."""
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path) -> ImageReward:
    return ImageReward(folder, tokenizer=folder)


def some_images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


PROMPTS = ["a red cat", "a blue dog on the table with a red hat", "the hat"]


def test_values_are_those_of_the_published_computation(weights: dict[str, Tensor], reward: ImageReward) -> None:
    images = some_images(3, 3, 64, 64)
    tokens, mask = torch.zeros(3, 35, dtype=torch.long), torch.zeros(3, 35, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        ids = [2, *(VOCABULARY.index(word) for word in prompt.split()), 3]
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    raw = reference(weights, (images - mean) / std, tokens, mask)
    assert raw.std() > 0.05  # Else any constant would do.
    values = reward(images, PROMPTS)
    assert values.shape == (3,)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, (raw - 0.16717362830052426) / 1.0333394966054072, atol=1e-5, rtol=1e-5)


def test_values_and_gradients_agree_in_double_precision(weights: dict[str, Tensor]) -> None:
    """Close enough to tell an epsilon of 1e-5 from one of 1e-6."""
    network = convert(weights).double().eval()
    doubled = {name: weight.double() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64).requires_grad_()
    tokens, mask = torch.tensor([[2, 5, 6, 3], [2, 8, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    values, wanted = network(pixels, tokens, mask), reference(doubled, pixels, tokens, mask)
    torch.testing.assert_close(values, wanted, atol=1e-10, rtol=1e-10)
    (gradient,) = torch.autograd.grad(values.sum(), pixels)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), pixels)
    assert wanted_gradient.abs().amax() > 1e-4
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-10, rtol=1e-8)


def test_the_gradient_reaches_the_images_and_no_weight(reward: ImageReward) -> None:
    images = some_images(2, 3, 96, 80).requires_grad_()
    values = reward(images, PROMPTS[:2])
    values[0].backward()
    assert images.grad is not None
    assert images.grad[0].abs().sum() > 0
    assert images.grad[1].abs().sum() == 0
    assert all(not weight.requires_grad for weight in reward._network.parameters())


def test_image_and_prompt_both_matter(reward: ImageReward) -> None:
    images = some_images(2, 3, 64, 64)
    same = reward(images[:1].expand(2, -1, -1, -1), ["a cat", "a dog"])
    other = reward(images, ["a cat", "a cat"])
    assert (same[0] - same[1]).abs() > 1e-3
    assert (other[0] - other[1]).abs() > 1e-3


def test_a_sample_does_not_depend_on_the_batch(reward: ImageReward) -> None:
    images = some_images(3, 3, 64, 64)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reward(images, PROMPTS), alone, atol=1e-5, rtol=1e-5)


def test_prompts_are_cut_after_35_tokens(reward: ImageReward) -> None:
    image = some_images(1, 3, 64, 64)
    # 33 words and the two tokens around them.
    value = reward(image, ["cat " * 33])
    assert reward(image, ["cat " * 33 + "dog " * 9]) == value
    assert reward(image, ["cat " * 32 + "dog"]) != value


def test_the_middle_square_is_judged(reward: ImageReward) -> None:
    wide = some_images(1, 3, 64, 104)
    torch.testing.assert_close(reward(wide, ["a cat"]), reward(wide[..., 20:84], ["a cat"]))
    large = some_images(1, 3, 130, 100)
    prepared = Preprocessing(size=64, crop=(64, 64), mean=(0.0,) * 3, std=(1.0,) * 3)(large)
    torch.testing.assert_close(reward(large, ["a cat"]), reward(prepared, ["a cat"]))


def test_bfloat16_is_near(folder: Path, reward: ImageReward) -> None:
    images = some_images(3, 3, 64, 64)
    values = ImageReward(folder, tokenizer=folder, dtype="bfloat16")(images, PROMPTS)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, reward(images, PROMPTS), atol=0.1, rtol=0.1)


def test_weights_are_found_in_files_and_folders(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    images = some_images(1, 3, 64, 64)
    values = [
        ImageReward(model, tokenizer=folder)(images, ["a cat"])
        for model in (folder, folder / "ImageReward.pt", tmp_path, tmp_path / "model.safetensors")
    ]
    assert all(torch.equal(value, values[0]) for value in values)
    torch.save({}, tmp_path / "ImageReward.pt")
    assert find_weights(str(tmp_path)) == tmp_path / "model.safetensors"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors, ImageReward\.pt"):
        find_weights(str(tmp_path))


def test_missing_and_unknown_weights_are_named(weights: dict[str, Tensor]) -> None:
    changed = dict(weights)
    changed["blip.visual_encoder.blocks.1.attn.typo.bias"] = changed.pop("blip.visual_encoder.blocks.1.attn.proj.bias")
    changed["queue"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        convert(changed)
    message = str(caught.value)
    assert "['vision.encoder.layers.1.self_attn.projection.bias']" in message
    assert "['blip.visual_encoder.blocks.1.attn.typo.bias', 'queue']" in message


def test_other_checkpoints_are_refused(weights: dict[str, Tensor]) -> None:
    for name in ("blip.visual_encoder.pos_embed", "blip.text_encoder.embeddings.word_embeddings.weight"):
        changed = {key: weight for key, weight in weights.items() if key != name}
        with pytest.raises(ValueError, match=f"no weights of ImageReward: '{name}' is missing"):
            convert(changed)
    with pytest.raises(RuntimeError, match=r"mlp\.0\.weight"):
        convert({**weights, "mlp.layers.0.weight": torch.zeros(1024, 3)})


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"mlp": Evil()}, tmp_path / "ImageReward.pt")
    with pytest.raises(pickle.UnpicklingError):
        ImageReward(tmp_path).load()
    assert not (tmp_path / "ran").exists()


def test_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "bird"]) + "\n")
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows 18 tokens with BLIP's two, but the network reads 17"):
        ImageReward(folder, tokenizer=tmp_path).load()


def test_the_published_architecture_has_the_stated_size() -> None:
    with torch.device("meta"):
        network = network_for(
            published_weights(
                width=1024, depth=24, side=224, text_width=768, text_depth=12, vocabulary=30524, positions=512
            )
        )
    assert network.vision.config.num_attention_heads == 16
    assert network.text.config.num_attention_heads == 12
    count = sum(weight.numel() for weight in network.parameters())
    assert f"{count / 1e6:.1f} M" in ImageReward.info.memory
    assert f"{count * 4 / 1e9:.2f} GB in float32, {count * 2 / 1e9:.2f} GB in bfloat16" in ImageReward.info.memory
