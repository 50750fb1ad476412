"""Matches with the teacher's images: against values computed by hand, with tiny random models of the architectures."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModel,
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    RegNetConfig,
    RegNetModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from rdm_rl.records import Conditioning, PromptBatch
from rdm_rl.rewards.calling import PlainReward, RewardOutput, check_columns
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.preprocessing import resize
from rdm_rl.rewards.teacher_match import (
    TeacherCLIP,
    TeacherDINO,
    TeacherHistogram,
    TeacherMSE,
    TeacherPerceptual,
    histogram,
)
from tests.helpers import QUICK, WITHOUT_RDM, changed, declare, one_rollout, quick_trainer, trained_weights
from tests.tiny_rewards import MEAN, STD, TRANSFORMERS, save_clip, save_settings, save_transformer

PROMPTS = ["a red fox", "two cats", "a dog", ""]
NETWORKS = ["clip", "dino", "dino class", "perceptual"]
NAMES = [*NETWORKS, "mse", "histogram"]
BEST = {"clip": 1.0, "dino": 1.0, "dino class": 1.0, "perceptual": 0.0, "mse": 0.0, "histogram": 0.0}
CONVOLUTIONS = {
    "resnet": (ResNetForImageClassification, ResNetConfig, {"embedding_size": 16, "layer_type": "bottleneck"}),
    "regnet": (RegNetModel, RegNetConfig, {"embedding_size": 16, "groups_width": 8}),
    "convnext": (ConvNextModel, ConvNextConfig, {"num_stages": 3, "patch_size": 2}),
    "convnextv2": (ConvNextV2Model, ConvNextV2Config, {"num_stages": 3, "patch_size": 2}),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pairs(count: int = 4, height: int = 28, width: int = 28, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Images of the student and of the teacher that have something in common, far from 0 and 1."""
    teacher = 0.3 + 0.4 * draw(count, 3, height, width, seed=1)
    return (teacher + 0.2 * (draw(count, 3, height, width, seed=2) - 0.5)).to(dtype), teacher.to(dtype)


def save_convolutions(folder: Path, kind: str = "resnet") -> Path:
    """A tiny saved convolutional network of three stages, with statistics of its batch norms as after training."""
    model, config, options = CONVOLUTIONS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = model(config(hidden_sizes=[16, 24, 32], depths=[1, 2, 1], **options))
        for _ in range(20):
            network(torch.randn(8, 3, 32, 32))
        network.save_pretrained(folder)
    save_settings(folder, {"shortest_edge": 24}, crop_size={"height": 20, "width": 20})  # Neither is to act.
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "clip": save_clip(root / "clip")[0],
        "dino": save_transformer(root / "dino"),
        "perceptual": save_convolutions(root / "resnet"),
    }


def make(name: str, folders: dict[str, Path], **options: Any) -> Any:
    if name == "mse":
        return TeacherMSE()
    if name == "histogram":
        return TeacherHistogram(**options)
    kind = {"clip": TeacherCLIP, "perceptual": TeacherPerceptual}.get(name, TeacherDINO)
    tokens = {"tokens": "class"} if name == "dino class" else {}
    return kind(folders[name.split()[0]], **tokens, **options)


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ----- the values, computed otherwise -----


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_clip_is_the_cosine_of_the_models_own_embeddings(kind: str, tmp_path: Path) -> None:
    folder, model, _, processor = save_clip(tmp_path, kind)
    images, teacher = pairs()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        both = [model.get_image_features(pixel_values=(one - mean) / std) for one in (images, teacher)]
    first, second = (one if isinstance(one, Tensor) else one.pooler_output for one in both)
    reward = TeacherCLIP(folder)
    values = reward(images, PROMPTS, teacher_images=teacher)
    torch.testing.assert_close(values, functional.cosine_similarity(first, second))
    assert values.shape == (4,)
    assert values.dtype == torch.float32
    assert values.std() > 1e-3
    # The text encoder would be most of the memory.
    assert not any(name.startswith("text_model") for name, _ in reward._network.named_parameters())


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("tokens", ["patch", "class"])
def test_dino_compares_patches_or_the_class_token_and_no_registers(kind: str, tokens: str, tmp_path: Path) -> None:
    folder = save_transformer(tmp_path, kind)
    images, teacher = pairs(height=32, width=32)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        first, second = (
            model(pixel_values=normalised(one[..., 2:30, 2:30])).last_hidden_state for one in (images, teacher)
        )
    where = slice(-16, None) if tokens == "patch" else slice(0, 1)
    assert first.shape[1] == 17 + {"dinov2_with_registers": 4}.get(
        kind, getattr(model.config, "num_register_tokens", 0)
    )
    expected = functional.cosine_similarity(first[:, where], second[:, where], dim=-1).mean(1)
    values = TeacherDINO(folder, tokens=tokens)(images, PROMPTS, teacher_images=teacher)
    torch.testing.assert_close(values, expected)
    assert values.std() > 1e-4


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_perceptual_is_the_distance_of_unit_features(kind: str, tmp_path: Path) -> None:
    folder = save_convolutions(tmp_path, kind)
    images, teacher = pairs(height=24, width=40)
    model = CONVOLUTIONS[kind][0].from_pretrained(folder).eval()
    base = getattr(model, "resnet", model)
    seen: list[Tensor] = []
    for module in (getattr(base, "embedder", None) or base.embeddings, *base.encoder.stages):
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    with torch.no_grad():
        model(normalised(images))
        model(normalised(teacher))
    assert len(seen) == 8
    distances = []
    for first, second in zip(seen[:4], seen[4:], strict=True):
        length = {id(one): (one.double().square().sum(1) + 1e-8).sqrt() for one in (first, second)}
        difference = first / length[id(first)][:, None] - second / length[id(second)][:, None]
        distances.append(difference.square().sum(1).mean((1, 2)))
    values = TeacherPerceptual(folder)(images, PROMPTS, teacher_images=teacher)
    torch.testing.assert_close(values, -torch.stack(distances).mean(0).float(), rtol=1e-4, atol=1e-6)
    assert values.max() < -0.01


def test_perceptual_at_another_size_is_that_of_resized_images(folders: dict[str, Path]) -> None:
    images, teacher = pairs(height=24, width=40)
    small = TeacherPerceptual(folders["perceptual"], size=16)(images, PROMPTS, teacher_images=teacher)
    own = TeacherPerceptual(folders["perceptual"])
    torch.testing.assert_close(small, own(resize(images, 16), PROMPTS, teacher_images=resize(teacher, 16)))
    assert not torch.allclose(small, own(images, PROMPTS, teacher_images=teacher))


def test_perceptual_where_no_feature_is_active(folders: dict[str, Path], tmp_path: Path) -> None:
    model = ResNetForImageClassification.from_pretrained(folders["perceptual"])
    torch.nn.init.constant_(model.resnet.embedder.embedder.normalization.bias, -1000.0)
    model.save_pretrained(tmp_path)
    save_settings(tmp_path, 224)
    images, teacher = pairs()
    images.requires_grad_()
    values = TeacherPerceptual(tmp_path)(images, PROMPTS, teacher_images=teacher)
    assert torch.equal(values, torch.zeros(4))
    assert torch.autograd.grad(values.sum(), images)[0].isfinite().all()


def test_mse_is_the_mean_square() -> None:
    images, teacher = pairs(2, 5, 7)
    values = TeacherMSE()(images, PROMPTS[:2], teacher)
    numbers = [
        [(a - b) ** 2 for a, b in zip(one.tolist(), other.tolist(), strict=True)]
        for one, other in zip(images.flatten(1), teacher.flatten(1), strict=True)
    ]
    torch.testing.assert_close(values, torch.tensor([-sum(row) / 105 for row in numbers]))


def by_hand(image: Tensor, bins: int) -> list[list[float]]:
    """Histograms pixel by pixel and bin by bin, with the share of the uniform distribution."""
    rows = []
    for channel in image.double():
        near = [[max(0.0, 1 - abs(x * (bins - 1) - j)) for x in channel.flatten().tolist()] for j in range(bins)]
        rows.append([0.999 * sum(one) / len(one) + 0.001 / bins for one in near])
    return rows


@pytest.mark.parametrize("bins", [2, 5, 32])
def test_histogram_is_the_divergence_from_the_teacher(bins: int) -> None:
    images, teacher = draw(2, 3, 6, 7, seed=1) ** 2, draw(2, 3, 6, 7, seed=2)
    images[0, 0, 0, :4] = torch.tensor([0.0, 1.0, 0.5, 1 / 31])
    expected = []
    for one, other in zip(images, teacher, strict=True):
        channels = zip(by_hand(other, bins), by_hand(one, bins), strict=True)
        expected.append(-sum(p * math.log(p / q) for ps, qs in channels for p, q in zip(ps, qs, strict=True)))
    values = TeacherHistogram(bins=bins)(images, PROMPTS[:2], teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor(expected))
    assert values.max() < -1e-3


@pytest.mark.parametrize("bins", [2, 3, 32])
def test_histograms_are_distributions(bins: int) -> None:
    images = torch.cat(
        [draw(4, 3, 9, 9), torch.zeros(1, 3, 9, 9), torch.ones(1, 3, 9, 9), torch.full((1, 3, 9, 9), 0.5)]
    )
    shares = histogram(images, bins)
    assert shares.shape == (7, 3, bins)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(2), torch.ones(7, 3, dtype=torch.float64), rtol=0, atol=1e-13)
    assert (shares[4, :, 0] == 1).all()
    assert (shares[5, :, -1] == 1).all()
    assert torch.equal(
        histogram(torch.tensor([-0.5, 1.5]).view(1, 1, 1, 2), bins)[0, 0, [0, -1]].float(), torch.full((2,), 0.5)
    )


def test_the_histogram_sees_tones_and_not_places() -> None:
    _, teacher = pairs(2, 16, 16)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    shuffled = teacher.flatten(2)[..., order].view_as(teacher)
    values = TeacherHistogram()(shuffled, PROMPTS[:2], teacher)
    torch.testing.assert_close(values, torch.zeros(2), rtol=0, atol=1e-12)
    assert (TeacherMSE()(shuffled, PROMPTS[:2], teacher) < -0.01).all()
    # But each channel has its own.
    tinted = teacher * torch.tensor([1.0, 0.8, 0.6]).view(3, 1, 1)
    assert (TeacherHistogram()(tinted[:, [1, 2, 0]], PROMPTS[:2], tinted) < -0.1).all()


def test_a_missing_tone_costs_more_than_one_too_many() -> None:
    one, two = torch.full((1, 3, 4, 4), 0.25), torch.full((1, 3, 4, 4), 0.25)
    two[..., :2] = 0.75
    missing, extra = TeacherHistogram()(one, [""], two), TeacherHistogram()(two, [""], one)
    # KL(teacher || student): half of the teacher's mass is where the student has 0.001 / 32 (shared by two bins).
    assert missing < 2 * extra
    assert extra < -1


def test_one_broken_image_spoils_its_own_histogram_only() -> None:
    images, teacher = pairs(3)
    expected = TeacherHistogram()(images, PROMPTS[:3], teacher)
    images[1, 0, 3, 3] = torch.nan
    values = TeacherHistogram()(images, PROMPTS[:3], teacher)
    assert values.isnan().tolist() == [False, True, False]
    assert torch.equal(values[[0, 2]], expected[[0, 2]])


# ----- what all of them promise -----


@pytest.mark.parametrize("name", NAMES)
def test_equal_images_get_the_maximum(name: str, folders: dict[str, Path]) -> None:
    _, teacher = pairs()
    reward = make(name, folders)
    values = reward(teacher.clone(), PROMPTS, teacher_images=teacher)
    torch.testing.assert_close(values, torch.full((4,), BEST[name]), rtol=0, atol=1e-6 if BEST[name] else 1e-12)
    # With a graph, the student's side takes another way than the teacher's.
    leaf = teacher.clone().requires_grad_()
    values = reward(leaf, PROMPTS, teacher_images=teacher)
    torch.testing.assert_close(values, torch.full((4,), BEST[name]), rtol=0, atol=1e-6)
    assert torch.autograd.grad(values.sum(), leaf)[0].abs().max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_noisier_a_copy_the_lower_its_value(name: str, folders: dict[str, Path]) -> None:
    _, teacher = pairs()
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(3))
    reward = make(name, folders)
    values = [
        reward((teacher + size * noise).clamp(0, 1), PROMPTS, teacher_images=teacher) for size in (0.005, 0.02, 0.08)
    ]
    assert (values[0] < BEST[name]).all()
    assert (values[0] > values[1]).all()
    assert (values[1] > values[2]).all()


@pytest.mark.parametrize("name", NAMES[:-1])
def test_student_and_teacher_may_change_places(name: str, folders: dict[str, Path]) -> None:
    images, teacher = pairs()
    reward = make(name, folders)
    there = reward(images, PROMPTS, teacher_images=teacher)
    torch.testing.assert_close(there, reward(teacher, PROMPTS, teacher_images=images))


@pytest.mark.parametrize("name", NAMES)
def test_images_are_compared_pair_by_pair(name: str, folders: dict[str, Path]) -> None:
    images, teacher = pairs()
    teacher = teacher ** torch.tensor([0.5, 1, 2, 3]).view(4, 1, 1, 1)  # Different tones.
    images = (teacher + 0.05 * (images - 0.5)).clamp(0, 1)
    reward = make(name, folders)
    values = reward(images, PROMPTS, teacher_images=teacher)
    others = reward(images, PROMPTS, teacher_images=teacher.roll(1, 0))
    assert (values > others + 1e-4).all()
    both = [2, 0, 3, 1]
    torch.testing.assert_close(reward(images[both], PROMPTS, teacher_images=teacher[both]), values[both])


@pytest.mark.parametrize("name", NAMES)
def test_values_in_a_batch_are_those_of_single_images(name: str, folders: dict[str, Path]) -> None:
    images, teacher = pairs(height=30, width=44)
    reward = make(name, folders)
    values = reward(images, PROMPTS, teacher_images=teacher)
    singles = [reward(images[i : i + 1], PROMPTS[i : i + 1], teacher_images=teacher[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(values, torch.cat(singles), rtol=1e-4, atol=1e-6)
    assert values.std() > 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_of_a_network_is_the_finite_difference(name: str, folders: dict[str, Path]) -> None:
    images, teacher = pairs(height=32, width=32)
    reward = make(name, folders)
    images.requires_grad_()
    values = reward(images, PROMPTS, teacher_images=teacher)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    step = 3e-4 * gradient / gradient.abs().max()
    with torch.no_grad():
        up, down = (reward(images + way * step, PROMPTS, teacher_images=teacher).double().sum() for way in (1, -1))
    torch.testing.assert_close((up - down) / 2, (gradient * step).sum().double(), rtol=0.03, atol=0)
    # Each value depends on its own image only.
    (one,) = torch.autograd.grad(reward(images, PROMPTS, teacher_images=teacher)[1], images)
    assert (one[[0, 2, 3]] == 0).all()
    assert one[1].any()
    assert not any(weight.requires_grad for weight in reward._network.parameters())


@pytest.mark.parametrize("reward", [TeacherMSE(), TeacherHistogram(), TeacherHistogram(bins=3)])
def test_the_gradient_without_a_network_is_exact(reward: Any) -> None:
    images, teacher = pairs(2, 4, 5, torch.float64)
    torch.autograd.gradcheck(lambda leaf: reward(leaf, PROMPTS[:2], teacher), images.requires_grad_(), atol=1e-6)


def test_the_histogram_has_a_gradient_at_black_and_white() -> None:
    images = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        TeacherHistogram(bins=4)(images, [""], torch.full((1, 3, 1, 2), 0.25)).sum(), images
    )
    assert (gradient[..., 0] > 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_teachers_images_get_no_gradient_and_the_type_of_the_students(name: str, folders: dict[str, Path]) -> None:
    images, teacher = pairs()
    reward, rounded = make(name, folders), teacher.bfloat16()
    images.requires_grad_()
    teacher.requires_grad_()
    reward(images, PROMPTS, teacher_images=teacher).sum().backward()
    assert teacher.grad is None
    assert images.grad is not None
    assert images.grad.any()
    values = reward(images.detach(), PROMPTS, teacher_images=rounded)
    assert not values.requires_grad
    assert values.dtype == torch.float32
    assert torch.equal(values, reward(images.detach(), PROMPTS, teacher_images=rounded.float()))


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_close_and_gives_float32(name: str, folders: dict[str, Path]) -> None:
    images, teacher = pairs()
    exact, reward = make(name, folders)(images, PROMPTS, teacher_images=teacher), make(name, folders, dtype="bfloat16")
    values = reward(images, PROMPTS, teacher_images=teacher)
    assert {weight.dtype for weight in reward._network.parameters()} == {torch.bfloat16}
    assert values.dtype == torch.float32
    assert not torch.equal(values, exact)
    assert not torch.equal(values, values.bfloat16().float())
    torch.testing.assert_close(values, exact, rtol=0.1, atol=0.02)
    same = reward(teacher, PROMPTS, teacher_images=teacher)
    torch.testing.assert_close(same, torch.full((4,), BEST[name]), rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_on_cuda(name: str, folders: dict[str, Path]) -> None:
    images, teacher = pairs()
    reward = make(name, folders)
    expected = reward(images, PROMPTS, teacher_images=teacher)
    values = reward(images.cuda(), PROMPTS, teacher_images=teacher)  # The teacher's may come from a cache on the CPU.
    assert values.is_cuda
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-2, atol=1e-3)
    same = reward(images.cuda(), PROMPTS, teacher_images=images)
    torch.testing.assert_close(same.cpu(), torch.full((4,), BEST[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mse", "histogram", "perceptual"])
def test_images_of_any_size(name: str, folders: dict[str, Path]) -> None:
    reward = make(name, folders)
    for size in ((8, 8), (5, 7), (1, 1)):
        images, teacher = pairs(4, *size)
        assert (reward(images, PROMPTS, teacher_images=teacher) < 0).all()
        assert (reward(teacher, PROMPTS, teacher_images=teacher) == 0).all()


# ----- what is refused -----


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_no_pairs_are_refused(name: str, folders: dict[str, Path]) -> None:
    reward, message = (
        make(name, folders),
        r"shape \(4, 3, 28, 28\) and the teacher's \(\d, 3, \d+, \d+\), so they are no",
    )
    for shape in ((4, 3, 14, 14), (3, 3, 28, 28), (1, 3, 28, 28)):
        with pytest.raises(ValueError, match=message):
            reward(pairs()[0], PROMPTS, teacher_images=draw(*shape))


def test_a_network_without_teacher_images_says_so(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="TeacherCLIP compares images with the teacher's: give it teacher_images"):
        make("clip", folders)(pairs()[0], PROMPTS)


@pytest.mark.parametrize(
    ("reward", "model", "message"),
    [
        (TeacherCLIP, "dino", r"is a Dinov2Model. Use a CLIP or SigLIP model"),
        (TeacherDINO, "clip", r"is a CLIPModel. Use a DINO, DINOv2 or DINOv3 vision transformer"),
        (TeacherDINO, "perceptual", r"is a ResNetModel. Use a DINO"),
        (TeacherPerceptual, "dino", r"is a Dinov2Model. Use a ResNet, RegNet, ConvNeXt or ConvNeXt V2"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_training(
    reward: type[RewardModel], model: str, message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        reward(folders[model]).prepare()


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens='all' are none that the model has; use 'patch' or 'class'"):
        TeacherDINO(tokens="all")
    with pytest.raises(ValueError, match="bins=1 is too few"):
        TeacherHistogram(bins=1)
    with pytest.raises(ValueError, match="size=0 is no length in pixels"):
        TeacherPerceptual(size=0)


# ----- in the library -----


def ask(reward: Any, images: Tensor, teacher: Tensor, gradient: bool = True) -> RewardOutput:
    batch = PromptBatch(
        prompts=PROMPTS,
        conditioning=Conditioning(),
        group_ids=torch.arange(4),
        sample_ids=range(4),
        columns={"digit": [1, 2, 3, 4]},
    )
    return PlainReward("match", reward, batch_size=3).start(images, batch, gradient=gradient, teacher_images=teacher)()


@pytest.mark.parametrize("name", NAMES)
def test_the_library_hands_over_pairs_and_takes_the_gradient(name: str, folders: dict[str, Path]) -> None:
    images, teacher = pairs()
    reward = make(name, folders)
    check_columns("match", reward, ["digit"])
    before = teacher.clone()
    output = ask(reward, images, teacher)
    leaf = images.clone().requires_grad_()
    expected = reward(leaf, PROMPTS, teacher_images=teacher)
    torch.testing.assert_close(output.values, expected.detach(), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(output.gradient, gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())
    assert torch.equal(teacher, before)
    # Equal images: every gradient may vanish, and that is no fault.
    assert ask(reward, teacher, teacher).faults == 0


@pytest.mark.parametrize("name", ["mse", "histogram", "perceptual"])
def test_watched_with_distribution_matching(name: str, base: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    reward = declare(make(name, folders), name="match")
    settings = {**QUICK, "teacher_num_inference_steps": 2}
    trainer = quick_trainer(base, tmp_path, ["rdm", reward], reward_weights=[1.0, 0.0], **settings)
    rollout = one_rollout(trainer)
    made = trainer.compute_rewards(rollout, 0)["match"]
    images, teacher = trainer.family.decode(rollout.sample), trainer.rewards["match"].context.teacher_images(rollout)
    torch.testing.assert_close(made.rewards, reward(images, [""] * 4, teacher_images=teacher), rtol=1e-4, atol=1e-7)
    assert (made.rewards < 0).all()
    assert not made.direction.applicable.any()
    trainer.train()
    logged = [row["rewards/match/mean"] for row in trainer.state.log_history if "rewards/match/mean" in row]
    assert len(logged) == 2
    assert all(value < 0 for value in logged)


@pytest.mark.parametrize("name", ["mse", "perceptual"])
def test_training_on_a_match_brings_the_student_nearer_to_the_teacher(
    name: str, base: Path, tmp_path: Path, folders: dict[str, Path]
) -> None:
    reward = declare(make(name, folders), name="match")
    trainer = quick_trainer(
        base, tmp_path, reward, **WITHOUT_RDM, max_steps=8, learning_rate=5e-3, teacher_num_inference_steps=2
    )
    weights = trained_weights(trainer)

    def value() -> Tensor:
        return trainer.compute_rewards(one_rollout(trainer), 0)["match"].rewards

    before = value()
    trainer.train()
    assert changed(weights, trained_weights(trainer))
    assert torch.equal(value(), value())  # The same prompts and noise each time.
    assert value().mean() > before.mean() * 0.9
