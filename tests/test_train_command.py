"""The parser of ``rdm-rl train`` and of the examples, and what its arguments become."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import TrainingArguments

from rdm_rl import RDMConfig, ReDiFConfig
from rdm_rl.cli import main as cli
from rdm_rl.cli.help import train_help
from rdm_rl.cli.parser import FIRST_GROUP, OWN_GROUP, SettingsParser
from rdm_rl.cli.train import TrainArguments, load_eval_prompts, load_prompts, make_rewards, train_parser
from rdm_rl.digits.data import TEACHER_FOLDER
from rdm_rl.settings import groups, help_of
from rdm_rl.trainers.inherited import HONOURED, INHERITED, UNUSED
from tests.helpers import ROOT

DIGITS = "--model_name_or_path digits --dataset digits --use_cpu".split()


def parser(*kinds: type, **options: Any) -> SettingsParser:
    return SettingsParser(kinds or (TrainArguments, RDMConfig), "A run.\n\nMore of it.", **options)


def help_text(one: SettingsParser, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        one.parse(["--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


# ----- the help text -----


def test_the_stored_help_of_train_is_what_its_parser_shows(capsys: pytest.CaptureFixture[str]) -> None:
    if f"transformers=={transformers.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("Defaults that a run inherits differ between versions of transformers.")
    # `python -m rdm_rl.cli.reference docs/reference.md` writes it anew.
    assert train_help() == help_text(train_parser(), capsys)


def test_help_and_methods_load_no_model_library() -> None:
    code = (
        "import sys; from rdm_rl.cli.main import main; main(['train', '--help']); main(['methods']);"
        "sys.exit(', '.join({'torch', 'transformers', 'diffusers', 'peft', 'trl', 'numpy'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--first_step_anchor" in done.stdout


def test_every_setting_is_under_one_heading() -> None:
    shown = [action.dest for _, actions in parser().groups() for action in actions]
    ours = {one.name for kind in (TrainArguments, RDMConfig) for one in fields(kind)}
    refused = {one.name for one in fields(TrainingArguments)} - HONOURED
    assert sorted(shown) == sorted((ours - refused - {*INHERITED[UNUSED]}) | {"help", "config", "method"})
    assert OWN_GROUP not in dict(parser().groups())  # A field is declared in a settings class, or inherited.


def test_every_setting_says_what_it_does() -> None:
    said = {one.name: help_of(kind, one.name) for kind in (TrainArguments, RDMConfig) for one in fields(kind)}
    said |= {name: text for group in INHERITED.values() for name, text in group.items()}
    declared = {name for kind in (TrainArguments, RDMConfig) for group in groups(kind).values() for name in group}
    assert declared.isdisjoint(HONOURED)
    assert not [name for name in declared | HONOURED if not said[name].endswith((".", "..."))]
    assert help_of(ReDiFConfig, "sampler") == said["sampler"]  # Another default is no other setting.


@dataclass
class Own(TrainArguments):
    pages: int = field(default=3, metadata={"help": "How many pages; 100 % of them."})


def test_settings_of_a_script_have_a_heading_of_their_own() -> None:
    groups = dict(parser(Own, RDMConfig).groups())
    assert [action.dest for action in groups[OWN_GROUP]] == ["pages"]
    assert list(groups)[:2] == [FIRST_GROUP, OWN_GROUP]


@pytest.mark.parametrize("columns", [70, 100, 300])
def test_the_help_can_be_read(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text(parser(Own, RDMConfig, prog="rdm-rl train"), capsys)
    assert text.startswith("usage: rdm-rl train [--config FILE.yaml] [--setting VALUE ...]\n\nA run.\n\nIn brackets: ")
    assert "More of it" not in text
    for title, _ in parser().groups():
        assert f"\n{title[0].lower()}{title[1:]}:\n" in text
    flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(flags) == len({*flags}) > 100
    assert {"--num_inference_steps", "--teacher_adapter", "--max_steps", "--pages"} <= {*flags}
    assert "--fsdp" not in flags
    assert not re.search(r"SUPPRESS|==|:\w+:`|`|, --\w+-\w+|<class|None|%%", text)
    assert "100 % of them" in " ".join(text.split())
    long = [line for line in text.splitlines() if len(line) > min(columns, 112)]
    assert not [line for line in long if not line.strip().startswith("--")]  # A flag and its choices are one word.
    assert max(map(len, text.splitlines())) <= 112


def test_the_help_shows_the_values_that_a_run_would_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: gndm\nlearning_rate: 3e-6\nreward_weights: [1, 0.5]\nbf16: true\n", encoding="utf-8")
    text = " ".join(help_text(parser(config=file), capsys).split())
    for shown in (
        "--learning_rate X Learning rate of the policy. The fake score has its own. [3e-6]",
        "[gndm]",
        "without rdm. [1 0.5]",
        "[4]",
        "[true]",
    ):
        assert shown in text
    assert "run.yaml beside the script" in text
    assert "digits and scenes are the embedded teachers. [needed]" in text


# ----- where settings come from -----


def test_flags_win_over_the_file_which_wins_over_the_method(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: ddpo\nguidance_scale: 3\nmax_steps: 7\nlearning_rate: 1e-4\n", encoding="utf-8")
    _, args = parser(defaults={"max_steps": 5, "seed": 3}).parse([*DIGITS, "--config", str(file), "--max_steps", "9"])
    assert (args.sampler, args.eta) == ("ddim", 1.0)  # The method's.
    assert (args.guidance_scale, args.learning_rate) == (3.0, 1e-4)
    assert (args.max_steps, args.seed) == (9, 3)
    _, args = parser().parse([*DIGITS, f"--config={file}", "--method=dmd"])
    assert (args.sampler, args.dm_normalization, args.guidance_scale) == ("renoise", "sample", 3.0)


def test_a_file_of_its_own_is_read_unless_another_is_named(tmp_path: Path) -> None:
    own, other = tmp_path / "own.yaml", tmp_path / "other.yaml"
    own.write_text("max_steps: 1\nnum_inference_steps: 3\n", encoding="utf-8")
    other.write_text("max_steps: 2\n", encoding="utf-8")
    _, args = parser(config=own).parse(DIGITS)
    assert (args.max_steps, args.num_inference_steps) == (1, 3)
    _, args = parser(config=own).parse([*DIGITS, "--config", str(other)])
    assert (args.max_steps, args.num_inference_steps) == (2, 4)


def test_a_newer_name_reaches_an_older_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdm_rl.cli.parser.OLD_NAMES", {"newer": "lora_r", "max_steps": "seed"})
    for words in (["--newer", "5"], ["--newer=5"]):
        arguments, args = parser().parse([*DIGITS, *words, "--max_steps", "7"])
        assert (arguments.lora_r, args.max_steps, args.seed) == (5, 7, 42)  # One that exists stays as it is.
    file = tmp_path / "run.yaml"
    file.write_text("newer: 6\n", encoding="utf-8")
    assert parser(config=file).parse(DIGITS)[0].lora_r == 6


def test_the_process_s_own_words_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train", *DIGITS, "--lora_r", "5"])
    assert parser().parse()[0].lora_r == 5


def test_a_file_s_data_set_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside").mkdir()
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "beside" / "run.yaml"
    settings = "dataset: prompts.txt\neval_dataset: prompts.txt\nmodel_name_or_path: digits\nuse_cpu: true\n"
    file.write_text(settings, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "prompts.txt").write_text("a fox\n", encoding="utf-8")
    arguments, _ = parser().parse(["--config", "../beside/run.yaml"])
    assert load_prompts(arguments) == [{"prompt": "a fox"}]  # Nothing beside it: as with a flag.
    (tmp_path / "beside" / "prompts.txt").write_text("an owl\n", encoding="utf-8")
    arguments, _ = parser().parse(["--config", "../beside/run.yaml"])
    assert load_prompts(arguments) == load_eval_prompts(arguments) == [{"prompt": "an owl"}]
    arguments, _ = parser().parse(["--config", "../beside/run.yaml", "--dataset", "prompts.txt"])
    assert load_prompts(arguments) == [{"prompt": "a fox"}]


def test_environment_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDM_RL_TEST", "before")
    file = tmp_path / "run.yaml"
    file.write_text("env: {RDM_RL_TEST: 7}\nmax_steps: 3\n", encoding="utf-8")
    assert parser().parse([*DIGITS, "--config", str(file)])[1].max_steps == 3
    assert os.environ["RDM_RL_TEST"] == "7"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_step", "3"], "sets max_step, which is no setting. Did you mean max_steps?"),
        (["--learning-rat=3"], "sets learning-rat, which is no setting. Did you mean learning_rate?"),
        (["--train_batch_size=3"], "Did you mean per_device_train_batch_size?"),
        (["--use_peft"], "use_peft, which is no setting. --help lists them all."),
        (["--zzz"], "zzz, which is no setting. --help lists them all."),
        (["--max_steps", "1", "seven"], "'seven' on the command line belongs to no flag."),
        (["--method", "gndn"], "method 'gndn' is unknown. Did you mean 'gndm'?"),
        (["--config", "nowhere.yaml"], "--config 'nowhere.yaml' does not exist."),
        (["--fp16_full_eval"], "RDMTrainer does not act on it"),
    ],
)
def test_mistakes_are_explained(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        parser().parse([*DIGITS, *words])


def test_mistakes_in_a_file_are_explained(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_step: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run.yaml sets max_step, which is no setting. Did you mean max_steps\?"):
        parser().parse([*DIGITS, "--config", str(file)])
    file.write_text("- max_steps\n", encoding="utf-8")
    with pytest.raises((ValueError, TypeError), match="mapping"):
        parser().parse([*DIGITS, "--config", str(file)])
    file.write_text("learning_rate: [a\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run.yaml' is no YAML: [^\n]*line 1[^\n]*$"):
        parser().parse([*DIGITS, "--config", str(file)])


def test_a_file_s_options_of_rewards_that_the_command_line_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("reward_funcs: [rdm, clip_score]\nreward_options: {clip_score: {model: a}, hpsv2: {model: b}}\n")

    def rewards(*words: str) -> list[Any]:
        arguments, _ = parser().parse([*DIGITS, "--config", str(file), *words])
        return make_rewards(arguments.reward_funcs, arguments.reward_options)

    _, preference = rewards("--reward_funcs", "rdm", "hpsv2")
    assert preference.model == "b"
    assert capsys.readouterr().out == f"{file} has reward_options for clip_score, which --reward_funcs leaves out.\n"
    with pytest.raises(ValueError, match="options for hpsv2, but reward_funcs is"):
        rewards()  # In the file itself it is a mistake,
    with pytest.raises(ValueError, match="options for clip_score, but reward_funcs is"):
        rewards("--reward_funcs", "rdm", "--reward_options", '{"clip_score": {}}')  # and on the command line itself.


def test_a_class_with_defaults_of_its_own_offers_no_method() -> None:
    with pytest.raises(ValueError, match="method, which is no setting"):
        parser(TrainArguments, ReDiFConfig).parse([*DIGITS, "--method", "gndm"])
    _, args = parser(TrainArguments, ReDiFConfig).parse(DIGITS)
    assert args.sampler == "ddim"


# ----- prompts -----


def prompts_of(dataset: Path | str, **options: Any) -> list[str]:
    return list(load_prompts(TrainArguments(model_name_or_path="digits", dataset=str(dataset), **options))["prompt"])


def test_prompts_from_data_sets(tmp_path: Path) -> None:
    """What a hub name leads to: a data set with splits, read by name; and what ``save_to_disk`` writes."""
    rows = Dataset.from_dict({"caption": ["a fox", "an owl"], "digit": [1, 2]})
    hub = tmp_path / "owner" / "captions"
    hub.mkdir(parents=True)
    rows.to_parquet(hub / "train-00000.parquet")
    Dataset.from_dict({"caption": ["an eel"], "digit": [3]}).to_parquet(hub / "test-00000.parquet")
    assert prompts_of(hub, prompt_column="caption") == ["a fox", "an owl"]
    assert prompts_of(hub, prompt_column="caption", dataset_split="test") == ["an eel"]
    data = load_prompts(TrainArguments("digits", str(hub), prompt_column="caption"))
    assert data[1] == {"prompt": "an owl", "digit": 2}  # The other columns are for rewards.

    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows, "few": rows.select([0])}).save_to_disk(tmp_path / "splits")
    assert prompts_of(tmp_path / "saved", prompt_column="caption") == ["a fox", "an owl"]
    assert prompts_of(tmp_path / "splits", prompt_column="caption", dataset_split="few") == ["a fox"]
    arguments = TrainArguments("digits", "digits", prompt_column="caption", eval_dataset_split="few")
    assert load_eval_prompts(arguments) is None
    arguments.eval_dataset = str(tmp_path / "splits")
    assert list(load_eval_prompts(arguments)["prompt"]) == ["a fox"]
    with pytest.raises(ValueError, match=r"has the columns \['caption', 'digit'\], not 'prompt': set prompt_column"):
        prompts_of(tmp_path / "saved")
    with pytest.raises(OSError, match=r"dataset='owner/prompts' cannot be loaded: .*HF_HUB_OFFLINE is set"):
        prompts_of("owner/prompts")


# ----- the trainer -----


class Recorder:
    """A trainer that only notes what it is given."""

    def __init__(self, *given: Any, **options: Any) -> None:
        type(self).given, type(self).options = given, options
        self.accelerator = self

    def train(self) -> None:
        """Nothing."""

    save_model = train
    print = print


@pytest.mark.parametrize(
    ("words", "model", "rewards", "expected", "ranks"),
    [
        (
            "base --teacher big --teacher_adapter owner/style/a.safetensors --policy_init lcm --warm_start none "
            "--lora_r 8 --reward_funcs rdm ink",
            "base",
            ["rdm", "ink"],
            {"teacher": "big", "teacher_adapter": "owner/style/a.safetensors", "policy_init": "lcm"},
            (8, 8),
        ),
        (
            "digits --full",
            str(TEACHER_FOLDER),
            ["rdm"],
            dict.fromkeys(("teacher", "teacher_adapter", "policy_init")),
            None,
        ),
    ],
)
def test_the_arguments_reach_the_trainer(
    words: str, model: str, rewards: list[str], expected: dict[str, Any], ranks: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("rdm_rl.cli.train.RDMTrainer", Recorder)
    given = f"--model_name_or_path {words} --dataset digits --use_cpu --output_dir {tmp_path}".split()
    assert cli.main(["train", *given]) == 0
    assert Recorder.given[:2] == (model, rewards)
    assert Recorder.given[2].output_dir == str(tmp_path)
    assert Recorder.given[3][0]["prompt"]
    adapters = Recorder.options.pop("peft_config")
    assert (adapters and (adapters.r, adapters.lora_alpha)) == ranks
    assert Recorder.options == expected


def test_the_command_trains(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    (tmp_path / "prompts.txt").write_text(f"a fox\n\nan owl\n{'hoo ' * 40}\n", encoding="utf-8")
    settings = {
        **{"model_name_or_path": str(base), "dataset": "prompts.txt", "output_dir": str(tmp_path / "run")},
        **{"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1, "lora_r": 2, "method": "gndm"},
        **{"per_device_train_batch_size": 2, "num_generations": 2, "num_inference_steps": 1, "learning_rate": 1e-2},
        **{"lr_scheduler_type": "constant", "fake_score_updates_per_policy_update": 1, "warm_start": "none"},
    }
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert cli.main(["train", "--config", str(file)]) == 0
    said = capsys.readouterr().out
    assert "Training on 3 prompts (1 blank left out); 1 is cut to the 16 tokens of tokenizer" in said
    assert f"The student is in {tmp_path / 'run'}" in said
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    assert cli.main(["train", "--config", str(file), "--max_step", "3"]) == 2
    assert "Did you mean max_steps?" in capsys.readouterr().err
