"""GNDMR on the embedded digits: distribution matching, one more reward, and adaptive weights, for a one-step student.

    python examples/digits_gndmr.py --output_dir runs/gndmr                            # more recognisable digits
    python examples/digits_gndmr.py --output_dir runs/ink --reward ink --weight 3      # a reward that is gamed
    python examples/digits_gndmr.py --output_dir runs/gndm --weight 0                  # the control: no reward

The reward ``digit_logprob`` asks a recogniser, ``ink`` wants bright pictures and ``symmetry`` symmetrical ones. Those
that are not trained have the weight 0: they are watched in the log. The settings are those of
``rdm_rl/digits/students.py``, with 20 updates of distribution matching alone first. It writes ``report.html`` (table,
samples, curves) with its parts, ``log.json``, and the student as plain diffusers. About three minutes on one CPU core.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import ProgressCallback

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.demo.report import Report, write_report
from rdm_rl.digits.data import TEACHER_FOLDER
from rdm_rl.digits.students import DigitsEvaluation, training_prompts
from rdm_rl.evaluation.sampler_metrics import format_rows
from rdm_rl.rewards import get_reward
from rdm_rl.rewards.calling import read_answer
from rdm_rl.trainers.callbacks import QuietProgressCallback

REWARDS = ("digit_logprob", "ink", "symmetry")


def settings(options: argparse.Namespace) -> RDMConfig:
    """The settings of the run."""
    weights = [1.0, *(options.weight if name == options.reward else 0.0 for name in REWARDS)]
    return RDMConfig.from_method(
        options.method,
        output_dir=str(options.output_dir),
        seed=options.seed,
        use_cpu=True,
        disable_tqdm=False,
        save_strategy="no",
        num_inference_steps=1,
        num_generations=8,
        per_device_train_batch_size=64,
        max_steps=options.max_steps,
        logging_steps=2,
        learning_rate=3e-4,
        adam_beta1=0.0,
        teacher_guidance_scale=1.0,
        # Not the defaults: the figures of the tutorials were measured with these.
        dm_normalization="group" if options.method == "gndmr" else "sample",
        fake_score_updates_per_policy_update=5,
        dm_scale_floor=0.1,
        fake_score_learning_rate=1e-3,
        fake_score_warmup_steps=options.fake_score_warmup_steps,
        warm_start_learning_rate=2e-3,
        warm_start_steps=options.warm_start_steps,
        warm_start_num_states=options.warm_start_num_states,
        reward_weights=weights,
        reward_start_step=options.reward_start_step,
        reward_conflict=options.reward_conflict,
        decode_batch_size=64,
        **({"reward_weighting": options.reward_weighting} if options.reward_weighting else {}),
    )


@torch.no_grad()
def mean_rewards(images: Tensor, prompts: list[str]) -> dict[str, float]:
    """The mean of each reward over the images that it applies to."""
    values = {name: read_answer(get_reward(name)(images, prompts), len(images)) for name in REWARDS}
    return {name: value.nanmean().item() for name, value in values.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Train, judge and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gndmr"), help="where everything goes")
    parser.add_argument("--reward", choices=REWARDS, default="digit_logprob", help="the reward that is trained")
    parser.add_argument("--weight", type=float, default=0.3, help="its weight; that of distribution matching is 1")
    parser.add_argument("--method", choices=("gndmr", "dmdr"), default="gndmr", help="adaptive or constant weights")
    parser.add_argument("--reward_weighting", choices=("adaptive", "fixed", "budget"), help="default: the method's")
    parser.add_argument("--reward_conflict", choices=("keep", "project"), default="keep", help="see docs/reference.md")
    parser.add_argument("--reward_start_step", type=int, default=20, help="updates with distribution matching alone")
    parser.add_argument("--max_steps", type=int, default=80, help="policy updates, those included")
    parser.add_argument("--warm_start_steps", type=int, default=150, help="updates of the warm start")
    parser.add_argument("--warm_start_num_states", type=int, default=1000, help="what it learns from")
    parser.add_argument("--fake_score_warmup_steps", type=int, default=80, help="updates of the fake score before")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and of the judged images")
    options = parser.parse_args(words)

    evaluation = DigitsEvaluation(options.seed)
    draws = evaluation.draw_teacher([])
    args = settings(options)
    trainer = RDMTrainer(
        TEACHER_FOLDER,
        ["rdm", *REWARDS],
        args,
        training_prompts(),
        peft_config=LoraConfig(r=16, lora_alpha=16),
    )
    trainer.remove_callback(ProgressCallback)  # It prints every number of the log; they are in log.json anyway.
    trainer.add_callback(QuietProgressCallback)
    trainer.train()
    trainer.save_model(options.output_dir / "student")
    (options.output_dir / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    draws["student, 1 step"] = evaluation.collect(lambda texts, noise: trainer.generate(texts, generator=noise), 1)

    rows = evaluation.judge(draws)
    pictures, captions = evaluation.picture(draws)
    report = Report(
        rows=rows,
        pictures=pictures,
        picture_labels=captions,
        histories={options.reward: trainer.state.log_history},
        settings={"method": options.method, "weights": trainer.reward_weights},
        seeds={"training": options.seed},
        title=f"Digits in one step, with the reward {options.reward}",
    )
    file = write_report(options.output_dir, report)
    print(format_rows(rows))
    for name, draw in draws.items():
        means = mean_rewards(draw.images, evaluation.prompts)
        print(f"{name}: {', '.join(f'{reward} {mean:.3f}' for reward, mean in means.items())}")
    print(f"Open {file}")


if __name__ == "__main__":
    main()
