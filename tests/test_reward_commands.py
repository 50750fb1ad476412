"""``rdm-rl rewards``: listing, trying a reward on image files, and the page that is generated from the registry."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_rl.cli.main import main
from rdm_rl.cli.rewards import reward_info, rewards_as_markdown
from rdm_rl.cli.train import make_rewards
from rdm_rl.pixels import read_image
from rdm_rl.rewards.registry import list_rewards, register_reward, unregister_reward

PAGE = Path(__file__).parent.parent / "docs" / "rewards.md"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "image.png"
    Image.fromarray(np.full((8, 8, 3), 51, dtype=np.uint8)).save(file)
    return file


def test_the_page_is_what_the_registry_says() -> None:
    """Regenerate with `rdm-rl rewards list --markdown`, below the page's introduction."""
    assert PAGE.read_text(encoding="utf-8").endswith(rewards_as_markdown())


def test_every_reward_says_what_it_is() -> None:
    for name in list_rewards():
        info, kind = reward_info(name)
        assert info.description.endswith("."), name
        assert len(info.description) < 120, name
        assert kind in ("direction", "gradient", "black box")
        assert info.units, name
        assert info.expected_range, name
        if info.weights:
            assert info.license, name
            assert info.memory, name
            assert info.paper, name


def test_rewards_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert main(["rewards", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_rewards()


@pytest.mark.parametrize(
    ("words", "listed"), [([], "list the rewards, or try one"), (["rewards"], "print what a reward says")]
)
def test_a_command_alone_lists_what_there_is(words: list[str], listed: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert listed in capsys.readouterr().out


def test_an_image_is_read_as_floats(image: Path) -> None:
    assert torch.equal(read_image(image), torch.full((3, 8, 8), 0.2))


def test_a_reward_is_tried_on_images(image: Path, capsys: pytest.CaptureFixture) -> None:
    @register_reward("shade", differentiable=True)
    def shade(images: torch.Tensor, prompts: list[str], target: list[float]) -> list[torch.Tensor | None]:
        return [
            None if prompt == "skip" else one.mean() * want
            for one, prompt, want in zip(images, prompts, target, strict=True)
        ]

    try:
        files = ["--image", str(image), "--image", str(image)]
        assert (
            main(["rewards", "test", "shade", *files, "--prompt", "a", "--prompt", "skip", "--column", "target=2"]) == 0
        )
        first, second = capsys.readouterr().out.splitlines()
        assert "'a': 0.4 " in first
        assert f"gradient rms {2 / 192:.3g}" in first
        assert "'skip': not applicable" in second
        assert main(["rewards", "test", "shade", "--image", str(image), "--prompt", "a"]) == 2
        assert "reads target: give it as --column" in capsys.readouterr().err
    finally:
        unregister_reward("shade")


def test_mistakes_are_explained_in_a_line(image: Path, capsys: pytest.CaptureFixture) -> None:
    for words, message in (
        ("rdm --prompt a", "compares networks of a run"),
        ("inc --prompt a", "Did you mean 'ink'"),
        ("ink --prompt a --prompt b", "1 images but 2 prompts"),
        ("ink --prompt a --option device=cpu", "is a function and takes no options"),
        ("clip_score --prompt a --option divice=cpu", "Its options are: model"),
        ("ink --prompt a --option device", "is not of the form key=value"),
        ("no_such_module:reward --prompt a", "there is no module 'no_such_module'"),
        ("nowhere.py:reward --prompt a", "'nowhere.py' does not exist"),
        ("rdm_rl.digits.rewards:inc --prompt a", "has no 'inc'. Did you mean 'ink'"),
    ):
        name, *rest = words.split()
        assert main(["rewards", "test", name, "--image", str(image), *rest]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1, error


def test_a_reward_from_a_file(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def half(images, prompts):\n    return [0.5] * len(prompts)\n")
    assert main(["rewards", "test", f"{file}:half", "--image", str(image), "--prompt", "a"]) == 0
    assert "'a': 0.5 " in capsys.readouterr().out


def test_options_make_objects() -> None:
    made = make_rewards(["rdm", "clip_score", "ink"], '{"clip_score": {"model": "folder", "dtype": "bfloat16"}}')
    assert made[0] == "rdm"
    assert made[2] == "ink"
    assert (made[1].model, made[1].dtype, made[1].name) == ("folder", torch.bfloat16, "clip_score")
    assert make_rewards(["clip_score"], {"clip_score": {"model": "folder"}})[0].model == "folder"
    with pytest.raises(ValueError, match="is no JSON"):
        make_rewards(["ink"], "{ink}")
    with pytest.raises(ValueError, match="must be options by reward"):
        make_rewards(["ink"], '{"ink": 3}')
    with pytest.raises(ValueError, match="has options for clip_score, but reward_funcs is"):
        make_rewards(["ink"], '{"clip_score": {}}')


def test_faults_of_a_reward_that_is_tried(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "faulty.py"
    file.write_text(
        "async def later(images, prompts):\n    return [0.25]\n\n"
        "def nothing(images, prompts):\n    return [float('nan')]\n\n"
        "def wide(images, prompts):\n    return images\n\n"
        "def compare(images, prompts, teacher_images):\n    return [0.0]\n\ncompare.wants_teacher_images = True\n"
    )
    assert main(["rewards", "test", "ink", "--image", "nowhere.png", "--prompt", "a"]) == 2
    assert "--image 'nowhere.png' does not exist" in capsys.readouterr().err
    for name, status, text in (
        ("later", 0, "'a': 0.25 "),
        ("nothing", 2, "its value is NaN or infinite"),
        ("wide", 2, "returned a tensor of shape (1, 3, 8, 8) for 1 samples, not (1,). Mend the reward. (--debug"),
        ("compare", 2, "teacher's images, which an image file has not"),
    ):
        assert main(["rewards", "test", f"{file}:{name}", "--image", str(image), "--prompt", "a"]) == status
        assert text in "".join(capsys.readouterr())
