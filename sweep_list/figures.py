"""Figures of a report: learning curves, with published ones beside full-size runs, and a forest plot."""

import math
from pathlib import Path

import numpy as np
from comparison import PRIMARY, Difference, Group, half_interval
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from run_files import PLANNER, POLICY, published_curves


def draw_published(panel, task: str, repeat: int, end: float) -> None:
    """Draw the published means with their bounds up to `end` decisions."""
    colours = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for colour, (algorithm, curve) in zip(colours, published_curves(task).items(), strict=False):
        x, shown = curve[:, 0] / repeat, curve[:, 0] / repeat <= end
        label = f"{algorithm}, published"
        panel.plot(x[shown], curve[shown, 1], label=label, color=colour, linewidth=1.5, linestyle="--")
        panel.fill_between(x[shown], curve[shown, 2], curve[shown, 3], color=colour, alpha=0.12, linewidth=0)


def draw_panel(panel, group: Group, configuration: str, axis: str, label: str = "configuration") -> None:
    """Draw the mean over the finished seeds, with its interval; of few seeds, or unfinished ones, each as a thin line.

    label: the configuration's name in the legend.
    """
    own, base = group.configurations[configuration], group.baseline
    lines = [("policy alone", "#0072B2", own, POLICY), ("planner", "black", own, PLANNER)]
    if base:  # Okabe and Ito's colours, which the colour-blind can tell apart
        lines = [("baseline", "black", base, PLANNER), (label, "#D55E00", own, PLANNER)]
    for name, colour, runs, tag in lines:
        drawn = [run for run in runs if len(run.curve(tag)) and not run.damage]
        finished = [run for run in drawn if run.done]
        for run in drawn if len(finished) <= 5 else [run for run in drawn if not run.done]:
            panel.plot(*run.curve(tag).T, color=colour, linewidth=0.6, alpha=0.5, zorder=3)
        if drawn:
            curves = [dict(run.curve(tag)) for run in finished or drawn]
            steps = sorted(set.intersection(*map(set, curves)))
            values = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, evaluations)
            panel.plot(steps, values.mean(0), label=name, color=colour, linewidth=2, zorder=4)
            if len(finished) > 5:
                low, high = values.mean(0) - half_interval(values), values.mean(0) + half_interval(values)
                panel.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    repeat = next((run.args["action_repeat"] for run in own + base if "action_repeat" in run.args), 1)
    if axis == "decisions" and any(run.full_size for run in own):
        ends = [run.curve()[-1, 0] for run in own if len(run.curve())]
        draw_published(panel, group.task, repeat, max(ends, default=0))
    panel.set_title(f"{group.task}\n{configuration.replace('__', ', ')}", fontsize=10)
    panel.set_xlabel(axis + (f", each {repeat} env steps" if axis == "decisions" and repeat > 1 else ""))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.locator_params(axis="x", nbins=5)
    panel.spines[["right", "top", "bottom"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.axhline(0, color="black", linewidth=0.8)


def sweep_panels(groups: list[Group]) -> list[tuple[Group, str]]:
    """Return the groups and configurations that have an evaluation to draw."""
    drawn = lambda runs: any(len(run.curve()) and not run.damage for run in runs)
    return [(group, name) for group in groups for name, runs in group.configurations.items() if drawn(runs)]


def draw_sweep(panels: list[tuple[Group, str]], axis: str, file: Path) -> None:
    """Draw each configuration, with its baseline, in a panel. The panels of one task share their y axis."""
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows) if columns > 1 else (6.8, 4.2))
    for number, panel in enumerate(panels, 1):
        shared = figure.axes[0] if figure.axes and len({group.task for group, _ in panels}) == 1 else None
        named = {} if len(panels) > 1 else {"label": panel[1].replace("__", ", ")}
        draw_panel(figure.add_subplot(rows, columns, number, sharey=shared), *panel, axis, **named)
    figure.supylabel("evaluation return", fontsize=10)
    figure.tight_layout()
    keys = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        keys.values(), keys, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(3, len(keys)), frameon=False
    )
    figure.savefig(file, dpi=120, bbox_inches="tight")


def draw_forest(groups: list[Group], file: Path) -> None:
    """Draw each configuration's difference to its baseline in the primary measure, grouped by question."""
    rows: list[tuple[str, Difference | None, str]] = []
    for group in groups:
        rows.append((f"{group.question} ({group.task})", None, ""))
        for name, one in group.differences[PRIMARY].items():
            rows.append((name, one, one.verdict if group.done else "unfinished"))
    panel = Figure(figsize=(6, 1 + 0.25 * len(rows))).subplots()
    panel.set_yticks(range(len(rows)), [name.replace("__", ", ") for name, *_ in rows], fontsize=8.5)
    style = dict(transform=panel.get_yaxis_transform(), va="center", fontsize=8, family="monospace")
    layout = "{:22}{:>7}  {}"
    panel.text(1.02, -1, layout.format("% [95 %, Welch]", "p", "answer"), **style)
    for y, (_name, one, verdict) in enumerate(rows):
        if one is None:
            panel.get_yticklabels()[y].set_weight("bold")
            continue
        colour = {"better": "#0072B2", "worse": "#D55E00"}.get(verdict, "black")
        estimate, low, high = map(one.percent, one.interval)
        seeds = one.percent(one.values - one.base.mean())
        panel.plot(seeds, [y] * len(seeds), "o", color=colour, alpha=0.3, markersize=3)
        panel.plot([low, high], [y, y], color=colour, linewidth=1.5)
        panel.plot(estimate, y, "D", color=colour, markersize=5)
        panel.text(1.02, y, layout.format(one.of_area, f"{one.p:.2g}", verdict), color=colour, **style)
    panel.axvline(0, color="black", linewidth=0.8, zorder=1)
    panel.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"{PRIMARY}, difference in % of the baseline's")
    panel.tick_params("y", length=0)
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["left", "right", "top"]].set_visible(False)
    panel.figure.savefig(file, dpi=120, bbox_inches="tight")
