"""CLIPScore, PickScore, HPSv2 and the aesthetic score, with tiny random models of the true architecture."""

from shutil import copytree

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTModel,
)

from rdm_rl.rewards.aesthetic import AestheticScore, load_predictor
from rdm_rl.rewards.clip import CLIPScore, HPSv2, HPSv21, PickScore
from rdm_rl.rewards.open_clip import convert_open_clip, load_open_clip, open_clip_config
from tests.helpers import tiny_tokenizer
from tests.tiny_rewards import save_clip

PROMPTS = ["a red fox", "two cats & a dog", "A very long prompt of which the text encoder reads the first part only"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))[0]


def open_clip_weights():
    """Random weights in OpenCLIP's layout: heads of 80 and 64 as in ViT-H/14, two layers, images of 28 pixels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=0.1):
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": draw(16, 128),
        "text_projection": draw(128, 20),
        "token_embedding.weight": draw(190, 128),
        "visual.class_embedding": draw(160),
        "visual.conv1.weight": draw(160, 3, 14, 14),
        "visual.positional_embedding": draw(5, 160),
        "visual.proj": draw(160, 20),
    }
    for name, width in [("visual.ln_pre", 160), ("visual.ln_post", 160), ("ln_final", 128)]:
        weights |= {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}
    for side, width in [("visual.", 160), ("", 128)]:
        for layer in range(2):
            prefix = f"{side}transformer.resblocks.{layer}"
            shapes = {"attn.out_proj": (width, width), "mlp.c_fc": (96, width), "mlp.c_proj": (width, 96)}
            for name, shape in shapes.items():
                weights |= {f"{prefix}.{name}.weight": draw(*shape), f"{prefix}.{name}.bias": draw(shape[0])}
            weights[f"{prefix}.attn.in_proj_weight"] = draw(3 * width, width)
            weights[f"{prefix}.attn.in_proj_bias"] = draw(3 * width)
            for name in ("ln_1", "ln_2"):
                weights |= {f"{prefix}.{name}.weight": 1 + draw(width), f"{prefix}.{name}.bias": draw(width)}
    return weights


def open_clip_forward(weights, pixels, tokens):
    """OpenCLIP's embeddings, by its layout and torch's own attention: what the conversion must reproduce."""

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x, name):
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def transformer(x, side, heads, mask=None):
        for layer in range(2):
            prefix = f"{side}transformer.resblocks.{layer}"
            attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
            part = f"{prefix}.attn."
            attention.load_state_dict(
                {key[len(part) :]: value for key, value in weights.items() if key.startswith(part)}
            )
            inner = norm(x, f"{prefix}.ln_1")
            x = x + attention(inner, inner, inner, need_weights=False, attn_mask=mask)[0]
            hidden = functional.gelu(linear(norm(x, f"{prefix}.ln_2"), f"{prefix}.mlp.c_fc"))
            x = x + linear(hidden, f"{prefix}.mlp.c_proj")
        return x

    x = functional.conv2d(pixels, weights["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = (
        torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
        + weights["visual.positional_embedding"]
    )
    x = transformer(norm(x, "visual.ln_pre"), "visual.", 2)
    pictures = norm(x[:, 0], "visual.ln_post") @ weights["visual.proj"]
    length = tokens.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][:length]
    x = norm(transformer(x, "", 2, mask), "ln_final")
    return pictures, x[torch.arange(len(x)), tokens.argmax(-1)] @ weights["text_projection"]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_value_is_the_model_s_own_cosine(kind, tmp_path):
    folder, model, tokenizer, processor = save_clip(tmp_path, kind)
    array = torch.randint(256, (3, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = processor([Image.fromarray(one.numpy()) for one in array], return_tensors="pt")["pixel_values"]
    length = model.config.text_config.max_position_embeddings
    padding = "max_length" if kind == "siglip" else True
    tokens = tokenizer(PROMPTS, padding=padding, truncation=True, max_length=length, return_tensors="pt")
    mask = {} if kind == "siglip" else {"attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        logits = model(input_ids=tokens["input_ids"], pixel_values=pixels, **mask).logits_per_image.diag()
        bias = model.logit_bias if kind == "siglip" else 0
        expected = (logits - bias) / model.logit_scale.exp()
    values = CLIPScore(folder)(array.permute(0, 3, 1, 2) / 255, PROMPTS)
    assert values.std() > 0.01
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


def test_prompts_are_cut_to_what_the_encoder_reads(clip_folder):
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))[:1].expand(3, -1, -1, -1)
    values = CLIPScore(clip_folder)(images, ["abcdefghijklmn" + tail for tail in ("", " opqr", " st" * 50)])
    assert values[0] == values[1] == values[2]  # 16 places: 14 letters between the marks of start and end


@pytest.fixture(scope="module")
def weights_on_disk(tmp_path_factory, clip_folder):
    """What each reward reads."""
    root = tmp_path_factory.mktemp("rewards")
    save_clip(root / "siglip", "siglip")
    torch.save({"state_dict": open_clip_weights()}, root / "HPS_v2_compressed.pt")
    torch.save({"state_dict": open_clip_weights()}, root / "HPS_v2.1_compressed.pt")
    torch.save(predictor_weights(20), root / "predictor.pth")
    return {
        "clip_score": (CLIPScore, clip_folder, {}),
        "siglip": (CLIPScore, root / "siglip", {}),
        "pickscore": (PickScore, clip_folder, {}),
        "hpsv2": (HPSv2, root / "HPS_v2_compressed.pt", {"processor": clip_folder}),
        "hpsv2.1": (HPSv21, root, {"processor": clip_folder}),
        "aesthetic": (AestheticScore, root / "predictor.pth", {"encoder": clip_folder}),
    }


@pytest.fixture
def make(request, weights_on_disk):
    """Makes the reward of the test's name."""
    kind, model, settings = weights_on_disk[request.getfixturevalue("name")]
    return lambda **options: kind(model, **settings, **options)


NAMES = ["clip_score", "siglip", "pickscore", "hpsv2", "hpsv2.1", "aesthetic"]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_images_and_not_the_weights(name, make):
    reward = make()
    images = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0), requires_grad=True)
    values = reward(images, PROMPTS)
    assert values.shape == (3,) and values.dtype == torch.float32 and reward.differentiable
    # Each value depends on its own image only, and almost everywhere: where the resize overshoots, the clamp stops it.
    (gradient,) = torch.autograd.grad(values[1], images)
    assert (gradient[[0, 2]] == 0).all() and (gradient[1] != 0).float().mean() > 0.9
    assert not any(weight.requires_grad for weight in reward._network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_finite_difference(name, make):
    reward = make()
    # Far from 0 and 1, so that the clamp after the resize does not act.
    images = 0.3 + 0.4 * torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    step = 1e-4 * gradient / gradient.abs().max()
    with torch.no_grad():
        change = reward(images + step, PROMPTS).sum() - reward(images - step, PROMPTS).sum()
    torch.testing.assert_close(change / 2, (gradient * step).sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_values_in_a_batch_are_those_of_single_images(name, make):
    reward = make()
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    values = reward(images, PROMPTS)
    singles = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert values.std() > 1e-3
    torch.testing.assert_close(values, singles, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name, make):
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    exact, reward = make()(images, PROMPTS), make(dtype="bfloat16")
    values = reward(images, PROMPTS)
    assert {weight.dtype for weight in reward._network.parameters()} == {torch.bfloat16}
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())
    scale = getattr(reward, "scale", 1.0)
    torch.testing.assert_close(values, exact, atol=0.05 * scale, rtol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_release_moves_the_network_only_if_it_is_offloaded(name, make, monkeypatch):
    # Without a second device only the request can be seen; test_offload_on_cuda sees the move.
    asked = []
    images = torch.rand(3, 3, 40, 40)
    for offload in (False, True):
        asked.clear()
        reward = make(offload=offload)
        values = reward(images, PROMPTS)
        move = reward._network.to
        monkeypatch.setattr(reward._network, "to", lambda device, move=move: asked.append(device) or move(device))
        reward.release()
        assert asked == (["cpu"] if offload else [])
        assert torch.equal(reward(images, PROMPTS), values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_offload_on_cuda(name, make):
    reward = make(offload=True, dtype="bfloat16")
    images = torch.rand(3, 3, 40, 40, device="cuda", requires_grad=True)
    values = reward(images, PROMPTS)
    assert values.device == images.device and torch.autograd.grad(values.sum(), images)[0].any()
    assert {weight.device.type for weight in reward._network.parameters()} == {"cuda"}
    reward.release()
    assert {weight.device.type for weight in reward._network.parameters()} == {"cpu"}
    torch.testing.assert_close(reward(images, PROMPTS), values)


def test_numbers_of_images_and_prompts_must_agree(clip_folder):
    with pytest.raises(ValueError, match="2 images were given with 1 prompts"):
        CLIPScore(clip_folder)(torch.rand(2, 3, 40, 40), ["a fox"])


def test_a_model_without_text_is_refused(tmp_path):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a ViTModel. Use a CLIP or SigLIP model"):
        CLIPScore(tmp_path)(torch.rand(1, 3, 16, 16), ["a fox"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pickscore_is_the_cosine_times_the_models_scale(tmp_path, dtype):
    folder, model, *_ = save_clip(tmp_path)
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    cosines = CLIPScore(folder, dtype=dtype)(images, PROMPTS)
    # The scale is not rounded with the weights: exp(2.6592) is 14.28, and in bfloat16 14.17.
    torch.testing.assert_close(
        PickScore(folder, dtype=dtype)(images, PROMPTS), cosines * model.logit_scale.exp().detach()
    )


def test_pickscore_takes_another_processor_if_the_model_has_none(tmp_path):
    folder, *_ = save_clip(tmp_path / "bare", processor=False)
    complete, *_ = save_clip(tmp_path / "complete")
    assert PickScore(folder).processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert PickScore(complete).processor == str(complete)
    images = torch.rand(1, 3, 40, 40)
    values = PickScore(folder, processor=complete)(images, ["a fox"])
    assert torch.equal(values, PickScore(complete)(images, ["a fox"]))


def test_hps_files_and_converted_folder_agree(tmp_path, clip_folder):
    torch.save({"state_dict": open_clip_weights(), "epoch": 1}, tmp_path / "HPS_v2_compressed.pt")
    copytree(clip_folder, tmp_path / "converted")  # The tokenizer and the image settings; the weights follow.
    load_open_clip(tmp_path / "HPS_v2_compressed.pt").save_pretrained(tmp_path / "converted")
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    expected = HPSv2(tmp_path / "HPS_v2_compressed.pt", processor=clip_folder)(images, PROMPTS)
    assert torch.equal(HPSv2(tmp_path, processor=clip_folder)(images, PROMPTS), expected)
    assert torch.equal(HPSv2(tmp_path / "converted")(images, PROMPTS), expected)
    assert list((tmp_path / "converted").glob("*.safetensors"))
    assert CLIPScore(tmp_path / "converted")(images, PROMPTS).isfinite().all()


def test_hps_versions_read_their_own_file(tmp_path, clip_folder):
    for name, seed in [("HPS_v2_compressed.pt", 1.0), ("HPS_v2.1_compressed.pt", -1.0)]:
        weights = open_clip_weights()
        torch.save({"state_dict": weights | {"visual.proj": seed * weights["visual.proj"]}}, tmp_path / name)
    images = torch.rand(3, 3, 40, 40)
    values = [kind(tmp_path, processor=clip_folder)(images, PROMPTS) for kind in (HPSv2, HPSv21)]
    torch.testing.assert_close(values[0], -values[1])


def test_hps_sees_the_whole_image_between_black_bars(tmp_path, clip_folder):
    torch.save(open_clip_weights(), tmp_path / "HPS_v2_compressed.pt")
    reward = HPSv2(tmp_path, processor=clip_folder)
    wide = torch.rand(3, 3, 14, 28, generator=torch.Generator().manual_seed(0))
    square = torch.zeros(3, 3, 28, 28)
    square[:, :, 7:21] = wide
    torch.testing.assert_close(reward(wide, PROMPTS), reward(square, PROMPTS), atol=1e-6, rtol=1e-6)
    edge = wide.clone()
    edge[..., 0] = 1 - edge[..., 0]  # a crop of the centre would not see it
    assert (reward(edge, PROMPTS) != reward(wide, PROMPTS)).all()


def test_converted_model_gives_open_clip_s_embeddings(tmp_path):
    weights = open_clip_weights()
    torch.save({"state_dict": {key: value.half() for key, value in weights.items()}}, tmp_path / "half.pt")
    half = {key: value.half().float() for key, value in weights.items()}
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    tokens = tiny_tokenizer(tmp_path)(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    for model, reference in [
        (convert_open_clip(weights, open_clip_config(weights)), weights),
        (load_open_clip(tmp_path / "half.pt"), half),
    ]:
        with torch.no_grad():
            pictures, texts = open_clip_forward(reference, pixels, tokens)
            outputs = model.eval().get_image_features(pixel_values=pixels), model.get_text_features(input_ids=tokens)
        ours = [getattr(output, "pooler_output", output) for output in outputs]
        assert pictures.std(0).min() > 0.01 and texts.std(0).min() > 0.01
        torch.testing.assert_close(ours[0], pictures, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[1], texts, atol=1e-5, rtol=1e-5)
        assert model.dtype == torch.float32 and float(model.logit_scale.detach()) == float(reference["logit_scale"])


def test_weights_that_do_not_make_the_model_are_named():
    weights = open_clip_weights()
    config = open_clip_config(weights)
    short = {key: value for key, value in weights.items() if key != "visual.transformer.resblocks.1.ln_2.bias"}
    with pytest.raises(ValueError, match=r"Missing here: \['vision_model.encoder.layers.1.layer_norm2.bias'\]"):
        convert_open_clip(short, config)
    for name in ("score_predictor.weight", "transformer.resblocks.1.ls_1.gamma", "transformer.resblocks.1.ls_1.weight"):
        with pytest.raises(ValueError, match=rf"Unknown there: \['{name}'\]"):
            convert_open_clip(weights | {name: torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"Unknown there: \['vision_model.encoder.layers.7.layer_norm1.bias'\]"):
        convert_open_clip(weights | {"visual.transformer.resblocks.7.ln_1.bias": torch.zeros(160)}, config)
    with pytest.raises(ValueError, match=r"text_projection.weight has the shape \(19, 128\) in the checkpoint"):
        convert_open_clip(weights | {"text_projection": torch.zeros(128, 19)}, config)
    with pytest.raises(ValueError, match=r"'visual.conv1.weight' is missing"):
        open_clip_config({"weight": torch.zeros(1)})


def predictor_weights(width, sizes=(24, 12, 8, 4, 1), numbers=(0, 2, 4, 6, 7)):
    """Random weights of the aesthetic predictor, by the authors' names."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for number, (before, after) in zip(numbers, zip((width, *sizes[:-1]), sizes, strict=True), strict=True):
        weights[f"layers.{number}.weight"] = torch.randn(after, before, generator=generator) / before**0.5
        weights[f"layers.{number}.bias"] = torch.randn(after, generator=generator)
    return weights


def test_aesthetic_score_is_the_authors_network_on_the_normalised_embedding(tmp_path):
    folder, model, _, processor = save_clip(tmp_path / "clip")
    weights = predictor_weights(20)
    # The authors' module, with its dropout, which is off outside training.
    layers = [nn.Linear(20, 24), nn.Dropout(0.2), nn.Linear(24, 12), nn.Dropout(0.2), nn.Linear(12, 8), nn.Dropout(0.1)]
    authors = nn.ModuleDict({"layers": nn.Sequential(*layers, nn.Linear(8, 4), nn.Linear(4, 1))}).eval()
    authors.load_state_dict(weights)
    array = torch.randint(256, (3, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = processor([Image.fromarray(one.numpy()) for one in array], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model.get_image_features(pixel_values=pixels)
        features = getattr(output, "pooler_output", output)
        expected = authors["layers"](features / features.norm(dim=-1, keepdim=True)).squeeze(-1)
    (tmp_path / "folder").mkdir()
    torch.save(weights, tmp_path / "predictor.pth")
    torch.save(weights, tmp_path / "folder" / "sac+logos+ava1-l14-linearMSE.pth")
    save_file(weights, tmp_path / "predictor.safetensors")
    assert expected.std() > 0.01
    for name in ("predictor.pth", "folder", "predictor.safetensors"):
        values = AestheticScore(tmp_path / name, encoder=folder)(array.permute(0, 3, 1, 2) / 255, PROMPTS)
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


def test_predictors_that_do_not_fit_are_refused(tmp_path, clip_folder):
    relu = predictor_weights(20, numbers=(0, 3, 6, 9, 11))  # the variant with activations, which needs another module
    torch.save(relu, tmp_path / "relu.pth")
    with pytest.raises(ValueError, match=r"missing or unknown are \['layers.11.bias'"):
        load_predictor(tmp_path / "relu.pth")
    torch.save(predictor_weights(21), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"reads embeddings of 21 numbers, and encoder=.* gives 20"):
        AestheticScore(tmp_path / "wide.pth", encoder=clip_folder)(torch.rand(1, 3, 40, 40), [""])
    with pytest.raises(FileNotFoundError, match=r"holds no predictor. Put one there named model.safetensors or"):
        AestheticScore(clip_folder / "source", encoder=clip_folder)(torch.rand(1, 3, 40, 40), [""])


def test_memory_that_the_facts_state(tmp_path):
    with torch.device("meta"):
        wide = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "projection_dim": 1024}
        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        large |= {"projection_dim": 768}
        small = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
        huge = CLIPModel(CLIPConfig(text_config=text, vision_config=wide | {"patch_size": 14}, projection_dim=1024))
        base = CLIPModel(CLIPConfig(text_config=small, vision_config=large | {"patch_size": 14}, projection_dim=768))
        sizes = (768, 1024, 128, 64, 16, 1)
        head = nn.ModuleList(nn.Linear(sizes[i], sizes[i + 1]) for i in range(5))
    for reward, parts in [
        (CLIPScore, [base]),
        (HPSv2, [huge]),
        (PickScore, [huge]),
        (AestheticScore, [base.vision_model, base.visual_projection, head]),
    ]:
        count = sum(weight.numel() for part in parts for weight in part.parameters())
        assert f"{count / 1e6:.0f} M parameters" in reward.info.memory
        assert f"{count * 4 / 1e9:.1f} GB in float32" in reward.info.memory
