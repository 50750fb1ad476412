"""Curves of training runs, and points of students, as figures.

Everything is drawn on objects of its own (no pyplot), so that a picture made during training touches no global state
and needs no display. ``histories`` is a trainer's log history (records with the key ``step`` and the metrics logged at
that step), or several by the name of the run, drawn over each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from rdm_rl.evaluation.pictures import LIGHT, Theme

History = Sequence[Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of a training run and how to read it.

    Args:
        title: What is plotted.
        metrics: For each metric of the log, or pattern with ``*``, what its line is called in this panel.
        reading: What a healthy curve looks like, and what an unhealthy one means.
        primary: Whether it belongs to the first look at a run.
        smooth: Whether the running mean is drawn over what was logged.
        log_scale: Whether positive values that span more than a factor of 15 get a logarithmic axis.
        from_zero: Whether a linear axis includes 0, so that small wiggles do not look like events.
    """

    title: str
    metrics: Mapping[str, str]
    reading: str
    primary: bool = True
    smooth: bool = True
    log_scale: bool = False
    from_zero: bool = True


PANELS = (
    Panel(
        title="Warm start: loss",
        metrics={"warm_start/loss": "loss"},
        reading="Before distribution matching, the student imitates the teacher's denoising trajectories. The error "
        "should fall steeply and then flatten; without this phase, distribution matching can stall early.",
        log_scale=True,
    ),
    Panel(
        title="Fake score, warm-up: loss",
        metrics={"fake_score_warmup/loss": "loss"},
        reading="The fake score learns the distribution of the warm student before it is trusted. The curve should "
        "have flattened by the end of this phase.",
        log_scale=True,
    ),
    Panel(
        title="Gap between teacher and fake score",
        metrics={"rewards/rdm/gap": "gap"},
        reading="How differently the teacher and the fake score would denoise the student's images, relative to the "
        "error of the teacher's own guess. It stays above zero, because both networks err, and after a warm start it "
        "may hardly move while the student still gets better: the distances decide. A gap that climbs is a warning: "
        "the student drifts, or the fake score is behind.",
    ),
    Panel(
        title="Reward R_dm",
        metrics={"rewards/rdm/mean": "mean"},
        reading="The distribution-matching reward as one number: minus the mean squared difference of the two "
        "networks' predictions, at most 0. It depends on the noise levels drawn, so single points scatter, and a short "
        "run after a warm start may show no clear rise.",
    ),
    Panel(
        title="Size of the direction",
        metrics={"rewards/rdm/direction_rms": "root mean square"},
        reading="How far distribution matching wants to move the student's images in one update, after normalisation. "
        "Steady or slowly falling is healthy. Growth is the first sign of a fake score that lags behind.",
    ),
    Panel(
        title="Fake score: loss",
        metrics={"fake_score/loss": "in training", "fake_score/fresh_loss": "on fresh samples"},
        reading="The denoising error of the network that tracks the student. It never reaches 0, since noise cannot be "
        "guessed; what matters is that the loss on the student's newest samples stays close to the loss in training.",
    ),
    Panel(
        title="Fake score: lag",
        metrics={"fake_score/lag": "lag"},
        reading="How much worse the fake score denoises the newest samples than those it was last trained on. Near "
        "zero is healthy. A growing lag makes updates push on in an outdated direction: give the fake score more "
        "updates or the policy a lower learning rate.",
    ),
    Panel(
        title="Gradient norms",
        metrics={"policy/grad_norm": "policy", "fake_score/grad_norm": "fake score"},
        reading="Before clipping. Single spikes are normal, steady growth is not.",
        log_scale=True,
    ),
    Panel(
        title="Other rewards",
        metrics={"rewards/*/mean": "{}"},
        reading="The mean of each further reward. It should rise and then level off; single points scatter with the "
        "prompts. A reward that rises while the distances in the table get worse is being exploited.",
        from_zero=False,
    ),
    Panel(
        title="Evaluations: distance to the teacher",
        metrics={"eval_*/paired": "{}"},
        reading="How far the student's image is from the teacher's of the same prompt and noise, on the evaluation "
        "prompts. It falls at first and levels off above zero; a steady rise: the student leaves the teacher.",
        smooth=False,
    ),
    Panel(
        title="Evaluations: rewards",
        metrics={"eval_rewards/*/mean": "{}"},
        reading="The mean of each reward on the evaluation prompts, with the same noises every time. One that stays "
        "level while it rises in training has been learnt for the training's prompts or noise alone.",
        smooth=False,
        from_zero=False,
    ),
    Panel(
        title="Agreement of rewards with R_dm",
        metrics={"rewards/*/cosine_to_rdm": "{}"},
        reading="The cosine between the direction of each reward and that of distribution matching. Near 0 they do not "
        "disturb each other. When it becomes clearly negative, distribution matching is undoing what the reward does: "
        "the student has left the teacher's images, and more weight will buy reward with fidelity.",
    ),
    Panel(
        title="Policy: loss",
        metrics={"policy/loss": "loss"},
        reading="Half the mean square of the combined direction. It is a device to carry the gradient and no error: it "
        "need not fall.",
        primary=False,
        log_scale=True,
    ),
    Panel(
        title="Policy: learning rate",
        metrics={"policy/learning_rate": "learning rate"},
        reading="The schedule as it was applied.",
        primary=False,
        smooth=False,
    ),
    Panel(
        title="Speed",
        metrics={"samples_per_second": "samples per second", "images_per_second": "images per second"},
        reading="Throughput of training. A slow decline suggests that something accumulates.",
        primary=False,
    ),
    Panel(
        title="Memory, GiB",
        metrics={"memory_gib": "GiB"},
        reading="Peak memory. It should be flat after the first updates.",
        primary=False,
        smooth=False,
    ),
)


def as_runs(histories: Mapping[str, History] | History) -> Mapping[str, History]:
    """One or several log histories by the name of the run; a single one is called "run".

    Example:
        >>> list(as_runs([{"step": 1, "rewards/rdm/gap": 0.5}]))
        ['run']
    """
    return histories if isinstance(histories, Mapping) else {"run": histories}


def curve(history: History, metric: str) -> tuple[list[float], list[float]]:
    """The steps and values at which a metric was logged with a finite value.

    The phases before training proper count their own ``phase_step``, which is used where it is present.

    Example:
        >>> curve([{"step": 1, "loss": 0.5}, {"step": 2}, {"step": 3, "loss": float("nan")}], "loss")
        ([1.0], [0.5])
    """
    present = [record for record in history if "step" in record and metric in record]
    points = [(float(record.get("phase_step", record["step"])), float(record[metric])) for record in present]
    points = [(step, value) for step, value in points if isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean over a window around each value, cut off at both ends; an even window is one wider.

    Example:
        >>> running_mean([0.0, 3.0, 6.0, 0.0], 3)
        [1.5, 3.0, 3.0, 3.0]
    """
    half = window // 2
    parts = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def present_panels(histories: Mapping[str, History] | History) -> list[Panel]:
    """The panels for which a run has logged something, with metrics in place of patterns.

    Example:
        >>> [panel.title for panel in present_panels([{"step": 1, "rewards/rdm/gap": 0.5, "rewards/hps/mean": 0.2}])]
        ['Gap between teacher and fake score', 'Other rewards']
    """
    logged = {key for history in as_runs(histories).values() for record in history for key in record}
    metrics = sorted(key for key in logged if any(curve(run, key)[0] for run in as_runs(histories).values()))
    claimed = {key for panel in PANELS for key in panel.metrics}
    panels = []
    for panel in PANELS:
        present: dict[str, str] = {}
        for pattern, label in panel.metrics.items():
            # A metric with a panel of its own does not appear under a pattern as well.
            matches = [key for key in metrics if key == pattern or (key not in claimed and fnmatchcase(key, pattern))]
            present |= {key: label.format(_short(key)) for key in matches}
        if present:
            panels.append(replace(panel, metrics=present))
    return panels


def _short(metric: str) -> str:
    """A metric's name without what a panel's title says."""
    for prefix, suffix in (("eval_", "/paired"), ("rewards/", "/mean")):
        metric = metric.removeprefix(prefix).removesuffix(suffix)
    return metric


def _draw_panel(axes: Axes, panel: Panel, runs: Mapping[str, History], theme: Theme) -> None:
    """Draw one panel: a colour for each run, a line style for each metric."""
    everything: list[float] = []
    for number, (run, history) in enumerate(runs.items()):
        for index, (metric, label) in enumerate(panel.metrics.items()):
            steps, values = curve(history, metric)
            if not values:
                continue
            everything += values
            # With one run the metrics get the colours; with several the runs do, and metrics differ by their dashes.
            color = theme.lines[(number if len(runs) > 1 else index) % len(theme.lines)]
            style = "-" if len(runs) == 1 else ("-", "--", ":", "-.")[index % 4]
            names = [run] * (len(runs) > 1) + [label] * (len(panel.metrics) > 1)
            smooth = panel.smooth and len(values) >= 30
            if smooth:
                axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
            axes.plot(
                steps,
                running_mean(values, max(3, len(values) // 15)) if smooth else values,
                color=color,
                linestyle=style,
                linewidth=1.7,
                marker="o" if len(values) < 10 else None,
                markersize=3,
                label=", ".join(names) or None,
            )
    _scale_axis(axes, panel, everything)
    axes.set_title(panel.title, fontsize=10, color=theme.ink, loc="left", fontweight="bold")
    axes.set_xlabel("step", fontsize=8, color=theme.ink)
    _plain_axes(axes, theme)
    lines = len(axes.get_legend_handles_labels()[1])
    # Two lines leave room for a legend among them, more do not.
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": _legend_columns(runs)}
    place = {"loc": "best"} if lines < 3 else below
    if lines:
        axes.legend(
            **{"fontsize": 7.5, "labelcolor": theme.ink, "handlelength": 2.8, "edgecolor": "none"},
            **{"facecolor": theme.background, "framealpha": 0.75, **place},
        )


def _legend_columns(runs: Iterable[str]) -> int:
    """How many names of runs have room side by side."""
    return 2 if max(map(len, runs)) < 16 else 1


def _plain_axes(axes: Axes, theme: Theme) -> None:
    """Axes without a frame, on a grid, in the colours of the theme."""
    axes.set_facecolor(theme.background)
    axes.grid(True, color=theme.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.ink, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)


def _scale_axis(axes: Axes, panel: Panel, values: Sequence[float]) -> None:
    """Choose the scale of the vertical axis, with plain numbers on it."""
    ratio = max(values) / min(values) if min(values) > 0 else 1.0
    if panel.log_scale and ratio > 15:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 1000 else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel.from_zero:
        axes.axhline(0, color="none")  # enters the automatic limits, whichever sign the values have


def curves_figure(
    panels: Sequence[Panel], histories: Mapping[str, History] | History, *, columns: int = 3, theme: Theme = LIGHT
) -> Figure:
    """A figure of the given panels, on a canvas of its own; thin lines are the log, thick ones its running mean.

    Args:
        panels: What to draw, see :func:`present_panels`.
        histories: The log history, or several by the name of the run.
        columns: How many panels stand side by side.
        theme: The colours.

    Raises:
        ValueError: If there is no panel.

    Example:
        >>> log = [{"step": step, "rewards/rdm/gap": 1 / step} for step in range(1, 5)]
        >>> len(curves_figure(present_panels(log), log).axes)
        1
    """
    if not panels:
        raise ValueError("There is nothing to draw: the log holds no metric that a panel knows.")
    columns = min(columns, len(panels))
    lines, runs = -(-len(panels) // columns), as_runs(histories)
    entries = len(runs) * max((len(panel.metrics) for panel in panels), default=0)
    legend = 0.16 * (entries // _legend_columns(runs)) if entries > 2 else 0.0
    figure = Figure(figsize=(4.1 * columns, (2.7 + legend) * lines), layout="constrained", facecolor=theme.background)
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(lines, columns, index + 1), panel, runs, theme)
    return figure


def training_curves(histories: Mapping[str, History] | History, path: Path | str) -> Path | None:
    """The picture of all that runs have logged, as a PNG file; None if the log holds nothing to draw.

    Args:
        histories: The log history, or several by the name of the run, such as ``{"4 steps": log_4, "1 step": log_1}``.
        path: The file to write.

    Example:
        >>> from tempfile import mkdtemp
        >>> training_curves([{"step": 1, "rewards/rdm/gap": 0.5}], Path(mkdtemp()) / "curves.png").name
        'curves.png'
    """
    panels = present_panels(histories)
    if not panels:
        return None
    curves_figure(panels, histories).savefig(path, format="png", dpi=110)
    return Path(path)


# --- Two numbers against each other -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in a plot of two numbers.

    Args:
        name: What the legend calls it.
        x: Horizontal place, a distance: at least 0.
        y: Vertical place.
        x_error: Half the interval of ``x``; NaN for none.
        y_error: Half the interval of ``y``; NaN for none.
        hollow: Whether the dot is drawn as a ring.
    """

    name: str
    x: float
    y: float
    x_error: float
    y_error: float
    hollow: bool = False


def points_figure(points: Sequence[Point], *, x_label: str, y_label: str, theme: Theme = LIGHT) -> Figure:
    """A figure of some models by two numbers, with their intervals.

    Args:
        points: The models.
        x_label: What is to the right.
        y_label: What is up.
        theme: The colours.
    """
    figure = Figure(figsize=(4.1, 2.9 + 0.2 * len(points)), layout="constrained", facecolor=theme.background)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, point in enumerate(points):
        color = theme.lines[number % len(theme.lines)]
        errors = [None if not isfinite(error) else [error] for error in (point.x_error, point.y_error)]
        # Intervals lie under all dots, and are pale: those of similar models cover each other.
        axes.errorbar([point.x], [point.y], xerr=errors[0], yerr=errors[1], fmt="none", ecolor=color, alpha=0.45)
        face = theme.background if point.hollow else color
        axes.plot([point.x], [point.y], "o", color=color, markerfacecolor=face, zorder=3, label=point.name)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -0.04 * high), high)  # An interval may end below 0, and no distance does.
    # Beside the dots, names would cover each other.
    figure.legend(loc="outside lower left", fontsize=8.5, labelcolor=theme.ink, frameon=False, handletextpad=0.2)
    axes.set_xlabel(x_label, fontsize=9, color=theme.ink)
    axes.set_ylabel(y_label, fontsize=9, color=theme.ink)
    _plain_axes(axes, theme)
    return figure
