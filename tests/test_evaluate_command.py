"""``rdm-rl evaluate`` and ``rdm-rl compare``, from saved students to pages."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_rl.cli.embedded import named_model, spare_threads
from rdm_rl.cli.evaluate import _load_teacher
from rdm_rl.cli.main import main
from rdm_rl.evaluation.results import read_results
from rdm_rl.student import rewards_of
from tests.helpers import ROOT, WITHOUT_RDM, quick_trainer, randomize, tiny_sd
from tests.tiny_pipelines import tiny_zimage
from tests.tiny_rewards import save_clip, save_transformer

SIZES = {"narrow": 400, "wide": 1400}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two students of it, networks for features, and prompts."""
    folder = tmp_path_factory.mktemp("work")
    tiny_sd(folder / "source").save_pretrained(folder / "base")
    save_clip(folder / "clip")
    save_transformer(folder / "dino")
    for name, rewards, seed in (("faithful", ["rdm"], 0), ("bright", ["tests/tiny_rewards.py:brightness"], 1)):
        options = WITHOUT_RDM if name == "bright" else {"warm_start": "none", "fake_score_warmup_steps": 0}
        trainer = quick_trainer(str(folder / "base"), folder / name, rewards, **options)
        randomize(trainer.networks, seed=seed)
        trainer.save_model()
    (folder / "prompts.txt").write_text("\n".join(f"the digit {number}" for number in range(8)))
    return folder


def words(work: Path, *more: str) -> list[str]:
    """A whole evaluation on tiny models."""
    texts = ["evaluate", "faithful", "bright", "--model", "base", "--prompts", "prompts.txt", "--teacher_steps", "3"]
    texts += ["--features", "dino", "clip", "--rewards", "jpeg_compressibility", "--seeds", "0", "1"]
    return [str(work / text) if (work / text).exists() else text for text in texts] + list(more)


@pytest.fixture(scope="module")
def written(work: Path) -> Path:
    """The folder of one evaluation."""
    assert main(words(work, "--output_dir", str(work / "evaluation"))) == 0
    return work / "evaluation"


class Page(HTMLParser):
    """What a page loads, its text, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.resources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.resources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_results_and_pages_hold_what_was_asked(written: Path, work: Path) -> None:
    results = read_results(written)
    assert [row.name for row in results.rows] == ["teacher", "faithful", "bright"]
    assert results.reference == "teacher"
    teacher, faithful, bright = results.rows
    assert [row.num_inference_steps for row in results.rows] == [3, 2, 1]
    assert teacher.network_evaluations == 3, "the students' record says that guidance was 1"
    assert (faithful.trained_on, bright.trained_on) == (["rdm"], ["brightness"])
    expected = {
        f"{network}/{metric}/teacher" for network in ("dino", "clip") for metric in ("frechet", "kernel", "recall")
    }
    expected |= {"dino/paired", "clip/diversity", "pixels/paired", "reward/jpeg_compressibility"}
    assert expected <= set(faithful.values)
    assert faithful.differences["reward/jpeg_compressibility"].half_width >= 0

    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.resources
    assert all(source.startswith("data:image/") for source in page.resources)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert "nan" not in page.text.lower().split()
    for what in ("Cost and rewards", "The whole set against teacher, in features of clip", "the digit 7", "Versions"):
        assert what in page.text
    markdown = (written / "report.md").read_text(encoding="utf-8")
    assert "](samples.png)" in markdown
    assert (written / "samples.png").is_file()
    command = re.search(r"^\$ (rdm-rl evaluate .*)$", markdown, re.MULTILINE)
    assert command is not None
    assert shlex.split(command[1])[2] == str(work / "faithful")


def test_rewards_that_were_trained_on_are_marked_and_do_not_compete(work: Path, tmp_path: Path) -> None:
    more = ["--rewards", f"{ROOT / 'tests' / 'tiny_rewards.py'}:brightness", "--features", "--num_prompts", "4"]
    cached = ["--cache_dir", str(work / "evaluation" / "images"), "--output_dir", str(tmp_path)]
    assert main([*words(work), *more, *cached]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| bright .*†.*$", text, re.MULTILINE)
    assert len(rows) == 2, "rewards, and how much they are above the teacher's"
    assert "**" not in rows[0].rpartition("†")[0].rpartition("|")[2], "the best is among the others"
    assert "† marks" in text


def test_two_evaluations_are_compared_prompt_by_prompt(
    written: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = ["--num_prompts", "6", "--output_dir", str(tmp_path / "fewer"), "--features"]
    assert main([*words(work), *fewer, "--cache_dir", str(written / "images")]) == 0
    capsys.readouterr()
    assert (
        main(["compare", f"all={written}", f"fewer={tmp_path / 'fewer'}", "--output_dir", str(tmp_path / "out")]) == 0
    )
    assert "all: faithful" in capsys.readouterr().out
    results = read_results(tmp_path / "out")
    assert [row.name for row in results.rows] == ["all: teacher", "all: faithful", "all: bright"], (
        "the others are alike"
    )
    assert (len(results.prompts), results.reference) == (6, "all: teacher")
    assert not any("/frechet/" in name for row in results.rows for name in row.values), "of other sets"
    alone = read_results(tmp_path / "fewer").rows[1].differences["reward/jpeg_compressibility"]
    assert results.rows[1].differences["reward/jpeg_compressibility"] == alone
    assert Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).open == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere", "--prompt", "a"], "is no folder"),
        (["evaluate", "{work}/dino", "--prompt", "a", "--teacher", "none"], "holds no images"),
        (["evaluate", "{work}/faithful", "--prompt", "a"], "give its --model"),
        (["evaluate", "{work}/base", "--prompt", "a"], "give its --teacher"),
        (["evaluate", "{work}/base", "--teacher", "none"], "give --prompts"),
        (["sample", "--student", "{work}/dino", "--prompt", "a"], "holds no student"),
        (["sample", "--student", "nowhere", "--prompt", "a"], "does not exist"),
        (["compare", "{work}"], "has no results.json"),
        (["compare", "a={work}/evaluation"], "at least two"),
        (["compare", "a={work}/evaluation", "b={work}/evaluation", "--baseline", "c"], "none of a: teacher"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, written: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output_dir", str(tmp_path)] if arguments[0] == "evaluate" else []
    assert main([word.format(work=work) for word in arguments] + output) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample --student x --prompt a --num_images 0", "0 is not at least 1"),
        ("evaluate x --prompt a --teacher_steps -1", "-1 is not at least 1"),
        ("sample --student x --prompt a --device nowhere", "'nowhere' cannot be used here"),
    ],
)
def test_numbers_and_devices_are_checked_as_they_are_read(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "compare", "demo"])
def test_help_loads_no_library_of_models(command: str) -> None:
    code = (
        "import sys; from rdm_rl.cli.main import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_a_student_says_what_it_was_trained_on(tmp_path: Path) -> None:
    facts = {"rewards": "rdm (weight 1), ink (weight 0.3)"}
    (tmp_path / "training.json").write_text(json.dumps(facts))
    assert rewards_of(tmp_path) == ("rdm", "ink")
    (tmp_path / "training.json").write_text(json.dumps({"rewards": "rdm, ink, combined by MyWeighting"}))
    assert rewards_of(tmp_path) == ("rdm", "ink")
    assert rewards_of(tmp_path / "nowhere") == ()


def test_the_commands_of_the_page_run(
    written: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = {"runs/fast": "faithful", "runs/bright": "bright", "prompts.txt": "prompts.txt", "base": "base"}
    here |= {"path/to/dinov2": "dino"}
    for name, source in here.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(work / source)
    (tmp_path / "photos").mkdir()
    shutil.copy(written / "samples.png", tmp_path / "photos")
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ rdm-rl (.+)$", page, re.MULTILINE)
    assert len(commands) == 5
    quick = {"clip_score": "jpeg_compressibility", "cuda": "cpu", "bfloat16": "float32"}
    for command in commands:
        parts = [quick.get(word, word) for word in shlex.split(command)]
        if parts[0] == "evaluate":
            features = [] if "--features" in parts else ["--features", "path/to/dinov2"]
            parts += [*features, "--num_prompts", "4", "--cache_dir", str(work / "evaluation" / "images")]
            parts += ["--teacher_steps", "3"]
        assert main(parts) == 0, command
    assert (tmp_path / "comparison" / "report.html").is_file()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_in_both_schemes(width: int, scheme: str, written: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        f"--screenshot={picture}",
        f"--window-size={width},1600",
    ]
    options += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    subprocess.run([str(CHROMIUM), *options, (written / "report.html").as_uri()], check=True, timeout=120)
    with Image.open(picture) as image:
        pixels = torch.from_numpy(np.array(image.convert("L"))).double()
    background, ink = pixels.median(), pixels.max() if scheme == "dark" else pixels.min()
    assert (background < 64) == (scheme == "dark")
    assert abs(float(ink - background)) > 120, "text stands out"
    # Nothing reaches over the right edge: the last columns are background but for pictures and tables that scroll.
    edge = pixels[:, -8:]
    assert float((edge - background).abs().gt(24).double().mean()) < 0.02


def test_a_teacher_is_guided_as_its_pipeline_counts(tmp_path: Path) -> None:
    """Z-Image's adds its number of times what the prompt changes, which is one less than elsewhere."""
    tiny_zimage().save_pretrained(tmp_path / "base")
    options = Namespace(model_config=None, dtype="float32", teacher_guidance_scale=3.0, teacher_steps=2)
    assert _load_teacher(str(tmp_path / "base"), None, options).call["guidance_scale"] == 2.0


@pytest.mark.parametrize(
    ("model", "own", "spared"), [("scenes", None, True), ("scenes", "4", False), ("a", None, False)]
)
def test_embedded_networks_get_one_thread(
    model: str, own: str | None, spared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    spare_threads(named_model(model))
    assert asked == [1] * spared
