"""What the runs of the sweeps say: a status table, or a page of figures, tables and answers.

    bash sweeps.sh all --status                      the table
    bash sweeps.sh all --report                      runs/report/report.md and report.html
    bash sweeps.sh all --report --reference CSV      with published curves behind (columns algo, task, env_steps,
                                                     return_mean, return_lcb, return_ucb)
    bash sweeps.sh all --report --export DIR         what is worth keeping of the finished runs: a CSV of returns for each,
                                                     commands and versions in runs.json, and the page made of them
    python sweep_list/report.py --replot DIR         that page once more, from the CSVs alone

The list of runs comes from sweeps.sh on standard input, one a line, its fields separated by tabs. The numbers come from
each run's metrics.csv. Sections: runs and their metrics, kept runs, status, statistics, answers, figures, the page.
"""

import argparse
import base64
import csv
import fcntl
import html
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

PLANNER, POLICY, TRAINING, SPEED = "eval/episodic_return", "eval/policy_episodic_return", "charts/episodic_return", "charts/SPS"
BASELINE_AGAIN = "chosen_action_on__from_behavior_on"  # sweep 2c's configuration that sets every flag as the baseline has it


# --- runs and their metrics ------------------------------------------------------------------------------------------


@dataclass
class Run:
    directory: Path
    steps: int  # decisions asked for
    sweep: str
    baseline: str  # the sweep it is compared with
    configuration: str
    seed: int
    question: str
    command: str

    @property
    def task(self) -> str:
        return self.directory.name.split("__")[0]

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:  # tag -> (n, 2), global_step and value
        return read_metrics(self.directory / "metrics.csv")

    @cached_property
    def args(self) -> dict:
        return read_json(self.directory / "args.json")

    @property
    def step(self) -> int:
        return int(max((points[-1, 0] for points in self.metrics.values()), default=0))

    @cached_property
    def done(self) -> bool:
        return read_json(self.directory / "finished.json").get("total_timesteps", -1) >= self.steps

    @cached_property
    def state(self) -> str:
        if self.done:
            return "done"
        if is_locked(self.directory / "lock", os.lockf, os.F_TEST, 0) or is_locked(
            self.log(".lock"), fcntl.flock, fcntl.LOCK_SH | fcntl.LOCK_NB
        ):
            return "running"
        return "failed" if self.exit_code not in ("", "0", "75") else "waiting"

    @property
    def exit_code(self) -> str:
        file = self.log(".exit")
        return file.read_text().strip() if file.exists() else ""

    def log(self, suffix: str) -> Path:
        return self.directory.parent / "logs" / (self.directory.name + suffix)

    def curve(self, tag: str = PLANNER) -> np.ndarray:  # (n, 2)
        return self.metrics.get(tag, np.empty((0, 2)))


def read_runs(lines) -> list[Run]:
    runs = []
    for line in lines:
        directory, steps, sweep, baseline, configuration, seed, question, command = line.rstrip("\n").split("\t")
        runs.append(Run(Path(directory), int(steps), sweep, baseline, configuration, int(seed), question, command))
    return runs


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not there yet, or being written
        return {}


def read_metrics(file: Path) -> dict[str, np.ndarray]:
    """Reads metrics.csv as it stands; a last line that is still being written has no line end and is left out."""
    text = file.read_text() if file.exists() else ""
    points: dict[str, list] = {}
    for row in csv.reader(text[: text.rfind("\n") + 1].splitlines()[1:]):
        if len(row) == 4:
            points.setdefault(row[2], []).append((float(row[0]), float(row[3])))
    return {tag: np.array(values) for tag, values in points.items()}


def is_locked(file: Path, function, *how) -> bool:
    """Asks whether another process holds the file's lock: the script's own is POSIX's, that of sweeps.sh is flock's."""
    try:
        with open(file, "rb") as handle:
            function(handle.fileno(), *how)
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


# --- kept runs: the returns and the origin of finished ones, small enough to commit ----------------------------------

RETURNS = {"planner_return": PLANNER, "policy_return": POLICY}
ABOUT = ("steps", "sweep", "baseline", "configuration", "seed", "question")
SHOWN_ARGS = ("action_repeat", "model_size", "enc_dim", "mlp_dim", "latent_dim", "num_q")


def keep(runs: list[Run], folder: Path) -> None:
    """Writes NAME.csv (global_step, env_steps and returns) for each finished run, and runs.json with what it came from.

    What the folder holds of other runs stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "runs.json"
    about = json.loads(index.read_text()) if index.exists() else {}
    for run in (run for run in runs if run.done):
        returns = [dict(run.curve(tag)) for tag in RETURNS.values()]
        with open(folder / f"{run.directory.name}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["global_step", "env_steps", *RETURNS])
            for step in sorted(set().union(*returns)):
                row = [f"{curve[step]:.6g}" if step in curve else "" for curve in returns]
                writer.writerow([f"{step:.0f}", f"{step * run.args['action_repeat']:.0f}", *row])
        starts = json.loads((run.directory / "versions.json").read_text())
        last = {key: value for key, value in starts[-1].items() if key != "command"}
        about[run.directory.name] = {
            **{key: getattr(run, key) for key in ABOUT},
            "command": re.sub(r"^\S+ (\S*/)?", "python ", run.command),  # no interpreter's and no script's folder
            "args": {key: run.args[key] for key in SHOWN_ARGS if key in run.args},
            "decisions_a_second": [round(float(speed), 1) for speed in speeds([run])],
            "versions": last,
        }
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(about.items())]  # a line for each run
    index.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def kept(folder: Path) -> list[Run]:
    """The runs that `keep` wrote, with their returns as their only metrics."""
    runs = []
    for name, about in json.loads((folder / "runs.json").read_text()).items():
        run = Run(folder / name, *(about[key] for key in ABOUT), about["command"])
        rows = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
        points = {tag: [(float(r["global_step"]), float(r[key])) for r in rows if r[key]] for key, tag in RETURNS.items()}
        points[SPEED] = [(run.steps, speed) for speed in about["decisions_a_second"]]
        run.metrics = {tag: np.array(values) for tag, values in points.items() if values}
        run.args, run.done = about["args"], True
        runs.append(run)
    return sorted(runs, key=lambda run: (run.sweep, run.configuration, run.task, run.seed))


# --- status ----------------------------------------------------------------------------------------------------------


def print_status(runs: list[Run]) -> None:
    print(f"{'state':8} {'steps':>15} {'return':>8} {'ETA':>9}  run")
    for run in runs:
        returns = run.curve() if len(run.curve()) else run.curve(TRAINING)
        last_return = f"{returns[-1, 1]:.1f}" if len(returns) else "-"
        eta = "-"
        if run.state == "running" and len(run.curve(SPEED)) and run.curve(SPEED)[-1, 1] > 0:
            minutes = (run.steps - run.step) / run.curve(SPEED)[-1, 1] / 60
            eta = f"{int(minutes // 60)} h {int(minutes % 60):02d} m"
        print(f"{run.state:8} {f'{run.step}/{run.steps}':>15} {last_return:>8} {eta:>9}  {run.directory.name}")
    for run in runs:
        if run.state == "failed":
            print(f"failed with exit code {run.exit_code}: {run.log('.log')}")
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "running", "failed", "waiting"))
    print(f"{len(runs)} runs: {counts}")


# --- statistics ------------------------------------------------------------------------------------------------------


def final_return(curve: np.ndarray) -> float:
    return float(curve[-3:, 1].mean())


def area_under_curve(curve: np.ndarray) -> float:
    """The mean height of the curve: its area by trapezoids over its length in steps."""
    if len(curve) < 2:
        return float(curve[-1, 1])
    return float(np.trapezoid(curve[:, 1], curve[:, 0]) / (curve[-1, 0] - curve[0, 0]))


def largest_drop(curve: np.ndarray) -> float:
    """How far an evaluation fell below the best one before it, at worst. Small is stable."""
    return float((np.maximum.accumulate(curve[:, 1]) - curve[:, 1]).max())


MEASURES = {"final return": final_return, "area under the curve": area_under_curve, "largest drop": largest_drop}


def half_width(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Half of the 95 % t-interval of the mean."""
    from scipy import stats

    n = values.shape[axis]
    if n < 2:
        return np.full(np.delete(values.shape, axis), np.nan)
    return stats.t.ppf(0.975, n - 1) * values.std(axis, ddof=1) / math.sqrt(n)


@dataclass
class Difference:
    """Mean over seeds less the baseline's, its 95 % bootstrap interval, and how often chance alone separates as much."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def clear(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(values: np.ndarray, baseline: np.ndarray) -> Difference:
    """The bootstrap draws seeds anew on both sides. p is the exact permutation test's, which two seeds cannot fool."""
    from scipy import stats

    generator = np.random.default_rng(0)
    means = [side[generator.integers(len(side), size=(10_000, len(side)))].mean(1) for side in (values, baseline)]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    p = stats.permutation_test(
        (values, baseline), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True, n_resamples=10_000, rng=generator
    ).pvalue
    return Difference(values.mean() - baseline.mean(), low, high, p)


def holm(ps: list[float]) -> list[float]:
    """Holm's correction: several configurations are several chances to be lucky."""
    order = np.argsort(ps)
    raised = np.maximum.accumulate([min(1.0, (len(ps) - i) * ps[j]) for i, j in enumerate(order)])
    return [float(raised[list(order).index(j)]) for j in range(len(ps))]


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The runs of one sweep on one task, by configuration, beside those of its baseline."""

    task: str
    configurations: dict[str, list[Run]]
    baseline: list[Run]

    @property
    def is_baseline(self) -> bool:
        return not self.baseline

    @cached_property
    def differences(self) -> dict[str, dict[str, Difference]]:  # measure -> configuration, of two seeds at least -> difference
        enough = {c: runs for c, runs in self.configurations.items() if min(count(runs), count(self.baseline)) > 1}
        return {
            name: {c: difference(measured(runs, f), measured(self.baseline, f)) for c, runs in enough.items()}
            for name, f in MEASURES.items()
        }


def measured(runs: list[Run], function, tag: str = PLANNER) -> np.ndarray:  # (finished seeds,)
    return np.array([function(run.curve(tag)) for run in runs if run.done and len(run.curve(tag))])


def count(runs: list[Run]) -> int:
    return len(measured(runs, final_return))


def group_runs(runs: list[Run]) -> dict[str, list[Group]]:  # sweep -> one group a task
    sweeps: dict[str, dict[str, Group]] = {}
    for run in runs:
        baseline = [b for b in runs if b.sweep == run.baseline != run.sweep and b.task == run.task]
        group = sweeps.setdefault(run.sweep, {}).setdefault(run.task, Group(run.task, {}, baseline))
        group.configurations.setdefault(run.configuration, []).append(run)
    return {sweep: list(groups.values()) for sweep, groups in sweeps.items()}


def answer(groups: list[Group]) -> str:
    """The first line under a question: what the finished runs support, and no more."""
    own = [run for group in groups for runs in group.configurations.values() for run in runs]
    baseline = [run for group in groups for run in group.baseline]
    if count(own) < len(own) or count(baseline) < len(baseline):
        beside = f", baseline {count(baseline)} of {len(baseline)}" if baseline else ""
        return f"**not enough data**: {count(own)} of {len(own)} runs{beside}"
    several = len(groups) > 1
    return " ".join((f"{group.task}: " if several else "") + answer_for(group) for group in groups)


def answer_for(group: Group) -> str:
    if group.is_baseline:
        return " ".join(
            f"{f'`{c}` ends' if len(group.configurations) > 1 else 'It ends'} at {spread(measured(runs, final_return))} with the "
            f"planner and at {spread(measured(runs, final_return, POLICY))} with the policy alone ({seeds_of(runs)})."
            for c, runs in group.configurations.items()
        )
    if min(len(runs) for runs in [*group.configurations.values(), group.baseline]) < 2:
        return "**not enough data**: one seed gives no interval."
    found = {name: verdict(differences) for name, differences in group.differences.items()}
    lines = [f"**{name.capitalize()}: {text}" for name, text in found.items() if text]
    same = ", ".join(name for name in found if not found[name])
    if same:  # first if the final return is among them
        none = f"**No difference seen** in {same}: no configuration differs from the baseline by more than its interval."
        lines.insert(len(lines) if found["final return"] else 0, none)
    return " ".join(lines)


def verdict(differences: dict[str, Difference]) -> str:
    """Empty where every interval holds 0. A few seeds part by chance, so the permutation test has to agree."""
    others = {c: d for c, d in differences.items() if c != BASELINE_AGAIN}
    chances = dict(zip(others, holm([d.p for d in others.values()])))
    clear = {c: d for c, d in others.items() if d.clear}
    sure = {c: d for c, d in clear.items() if chances[c] <= 0.05}
    listed = "; ".join(f"`{c}` {d}" for c, d in (sure or clear).items())
    p = max((chances[c] for c in sure or clear), default=1)
    if sure:
        return f"differs from the baseline.** {listed} (p at most {p:.2g})."
    return f"undecided.** {listed}: an interval without 0, but so few seeds part by chance (p up to {p:.2g})." if clear else ""


def coincidence(group: Group) -> list[str]:
    """Sweep 2c holds the baseline once more. The same seed must give the same curve to the last bit."""
    lines = []
    for run in group.configurations.get(BASELINE_AGAIN, []):
        twin = next((b for b in group.baseline if b.seed == run.seed), None)
        who = f"`{BASELINE_AGAIN}` is the baseline once more. Seed {run.seed}:"
        if twin is None or not len(run.curve()) or not len(twin.curve()):
            lines.append(f"{who} nothing to compare yet.")
            continue
        mine, theirs = dict(run.curve()), dict(twin.curve())
        shared = sorted(mine.keys() & theirs.keys())
        apart = max(shared, key=lambda step: abs(mine[step] - theirs[step]), default=None)
        gap = math.inf if apart is None else abs(mine[apart] - theirs[apart])
        if mine == theirs:
            lines.append(f"{who} the curves coincide bit for bit at all {len(shared)} evaluations.")
        elif gap == 0:
            lines.append(f"{who} the curves coincide bit for bit at the {len(shared)} evaluations both have.")
        else:
            lines.append(f"{who} **the curves differ**, by {gap:.4g} at most, at decision {apart or 0:.0f}.")
    return lines


# --- figures ---------------------------------------------------------------------------------------------------------

BLACK, ORANGE, BLUE = "black", "#D55E00", "#0072B2"  # Okabe and Ito's, safe for the colour-blind
DASHES = [(0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 2.5))]


def draw_curve(axis, runs: list[Run], label: str, colour: str, bar_at: float, tag: str = PLANNER) -> None:
    """The mean over seeds as far as all of them have come, the seeds as thin lines, 95 % t-intervals of the mean.

    The interval of the final return is a bar at the right. That of every evaluation is a band, from three seeds on: with
    two it is 12.7 standard errors wide and pinched wherever the two happen to meet.
    """
    curves = [dict(run.curve(tag)) for run in runs if len(run.curve(tag))]
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, evaluations)
    axis.plot(steps, values.mean(0), label=label, color=colour, linewidth=2, zorder=4)
    axis.plot(steps, values.T, color=colour, linewidth=0.6, alpha=0.5, zorder=3)
    if len(curves) > 2:
        low, high = values.mean(0) - half_width(values), values.mean(0) + half_width(values)
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
    finals = measured(runs, final_return, tag)
    if len(finals) > 1:
        axis.errorbar(
            bar_at, finals.mean(), half_width(finals), color=colour, linewidth=1.5, capsize=2.5, marker="o", markersize=3
        )


def plain_name(task: str) -> str:
    """A task's name in whichever spelling: cup-catch for ball_in_cup-catch, finger-turn-easy for finger-turn_easy."""
    return task.replace("_", "-").replace("ball-in-cup", "cup").replace("point-mass", "pointmass")


def draw_reference(axis, rows: list[dict], task: str, repeat: float, last_step: float) -> None:
    rows = [row for row in rows if plain_name(row["task"]) == plain_name(task)]
    for i, algorithm in enumerate(sorted({row["algo"] for row in rows})):
        numbers = ("env_steps", "return_mean", "return_lcb", "return_ucb")
        points = [[float(row[key]) for key in numbers] for row in rows if row["algo"] == algorithm]
        steps, mean, low, high = np.array(sorted(points)).T
        steps = steps / repeat
        shown = np.append(steps[steps < last_step], last_step)
        mean, low, high = (np.interp(shown, steps, y) for y in (mean, low, high))
        axis.plot(shown, mean, color="0.5", linestyle=DASHES[i % 4], linewidth=1.3, label=algorithm, zorder=1)
        axis.fill_between(shown, low, high, color="0.5", alpha=0.1, linewidth=0, zorder=1)


def draw_panel(axis, group: Group, configuration: str, title: str, reference: list[dict]) -> None:
    from matplotlib.ticker import EngFormatter

    own = group.configurations[configuration]
    last_step = max(run.step for run in own + group.baseline) or 1
    repeat = next((run.args["action_repeat"] for run in own + group.baseline if run.args.get("action_repeat")), 1)
    draw_reference(axis, reference, group.task, repeat, last_step)
    if group.is_baseline:
        draw_curve(axis, own, "policy alone", BLUE, 1.03 * last_step, POLICY)
        draw_curve(axis, own, "planner", BLACK, 1.07 * last_step)
    else:
        draw_curve(axis, group.baseline, "baseline", BLACK, 1.03 * last_step)
        draw_curve(axis, own, "configuration", ORANGE, 1.07 * last_step)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("decisions")
    axis.set_xlim(0, 1.1 * last_step)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.locator_params(axis="x", nbins=5)
    axis.spines["right"].set_visible(False)
    axis.grid(alpha=0.25)
    env_steps = axis.secondary_xaxis("top", functions=(lambda x: x * repeat, lambda x: x / repeat))
    env_steps.xaxis.set_major_formatter(EngFormatter(sep=""))
    env_steps.locator_params(axis="x", nbins=5)
    env_steps.set_xlabel("env steps", fontsize=9)


def draw_sweep(groups: list[Group], file: Path, reference: list[dict]) -> None:
    """A panel for each configuration, against the baseline. Its height follows the lines; a wide band is cut off."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(group, configuration) for group in groups for configuration in group.configurations]
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    size = (4.2 * columns, 3.6 * rows) if columns > 1 else (6.8, 4.2)
    figure, axes = pyplot.subplots(rows, columns, squeeze=False, figsize=size)
    for axis, (group, configuration) in zip(axes.flat, panels):
        alone = len(group.configurations) == 1 and group.is_baseline
        words = [group.task] + ([] if alone else [configuration.replace("__", ", ")])
        draw_panel(axis, group, configuration, "\n".join(words), reference)
        same_task = [a for a, (g, _) in zip(axes.flat, panels) if g.task == group.task]
        lines = [line.get_ydata() for a in same_task for line in a.get_lines()]
        top = max((max(line) for line in lines if len(line) > 1), default=1)  # a line of one point is a bar's end
        for a in same_task:
            a.set_ylim(0, 1.08 * top or 1)
    for axis in axes[:, 0]:
        axis.set_ylabel("evaluation return")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    labels = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.tight_layout()
    figure.legend(labels.values(), labels.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=6, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


# --- the page: a list of blocks, written as Markdown and as HTML -----------------------------------------------------


def spread(values: np.ndarray, form: str = ".1f") -> str:
    if not len(values):
        return "-"
    return f"{values.mean():{form}}" + (f" ± {half_width(values):{form}}" if len(values) > 1 else "")


def seeds_of(runs: list[Run]) -> str:
    return f"{len(runs)} seed{'s' * (len(runs) != 1)}"


def table(group: Group) -> tuple:
    header = ["configuration", "seeds", "final return", "difference", "area under the curve", "difference", "largest drop",
              "policy alone", "decisions a second"]  # fmt: skip
    rows = []
    for configuration, runs in (({"baseline": group.baseline} if group.baseline else {}) | group.configurations).items():
        apart = {name: differences.get(configuration, "-") for name, differences in group.differences.items()}
        rows.append([
            f"`{configuration}`", f"{count(runs)} of {len(runs)}",
            spread(measured(runs, final_return)), str(apart["final return"]),
            spread(measured(runs, area_under_curve)), str(apart["area under the curve"]),
            spread(measured(runs, largest_drop)), spread(measured(runs, final_return, POLICY)), spread(speeds(runs)),
        ])  # fmt: skip
    return "table", header, rows


def diagnostics(group: Group) -> list[tuple]:
    """What these runs log and the baseline does not: a flag's own diagnostics, as the mean of the last quarter."""
    known = {tag for run in group.baseline for tag in run.metrics}
    tags = sorted({tag for runs in group.configurations.values() for run in runs for tag in run.metrics} - known)
    if not known or not tags:
        return []
    rows = [
        [f"`{c}`", *(spread(measured(runs, last_quarter, tag), ".3g") for tag in tags)]
        for c, runs in group.configurations.items()
    ]
    return [("p", "Logged by these runs alone, mean of the last quarter:"), ("table", ["configuration", *tags], rows)]


def last_quarter(curve: np.ndarray) -> float:
    return float(curve[curve[:, 0] >= 0.75 * curve[-1, 0], 1].mean())


def speeds(runs: list[Run]) -> np.ndarray:  # (finished seeds,), medians of decisions a second, without the quick warm-up
    logged = [run.curve(SPEED) for run in runs if run.done]
    begun = [run.args.get("learning_starts", 0) for run in runs if run.done]
    learning = [curve[curve[:, 0] > start, 1] for curve, start in zip(logged, begun)]
    return np.array([np.median(values) for values in learning if len(values)])


def page(runs: list[Run], out: Path, reference: list[dict]) -> list[tuple]:
    sizes = sorted({f"{run.task}, {run.steps:,} decisions" + model_of(run) for run in runs})
    blocks = [
        ("h1", "Sweep report"),
        ("p", f"{sum(run.done for run in runs)} of {len(runs)} runs are done. Runs: " + "; ".join(sizes) + ". "
              "The answers hold for these tasks, sizes and lengths."),
    ]  # fmt: skip
    for sweep, groups in group_runs(runs).items():
        question = next(iter(groups[0].configurations.values()))[0].question
        blocks += [("h2", f"{question} ({sweep})"), ("p", answer(groups))]
        blocks += [("p", line) for group in groups for line in coincidence(group)]
        if any(len(run.curve()) for group in groups for own in group.configurations.values() for run in own):
            figure = out / "figures" / f"{sweep}.png"
            draw_sweep(groups, figure, reference)
            blocks.append(("figure", f"figures/{sweep}.png", f"Learning curves of {sweep}"))
        for group in groups:
            blocks += [("p", f"**{group.task}**")] * (len(groups) > 1) + [table(group)] + diagnostics(group)
    return blocks + [("h2", "How to read this"), *(("p", line) for line in NOTES.split("\n\n"))]


def model_of(run: Run) -> str:
    sizes = [
        f"{name} {run.args[name]}" for name in ("model_size", "enc_dim", "mlp_dim", "latent_dim", "num_q") if name in run.args
    ]
    return f" ({', '.join(sizes)})" if sizes else ""


NOTES = """\
Curves: evaluations with the planner, the mean over seeds in bold, the seeds as thin lines. The bars at the right are 95 %
t-intervals of the mean final return; from three seeds on each evaluation has its interval as a band. With two seeds the
t-interval reaches 12.7 standard errors to either side; the figure cuts it off.

Final return: mean of the last three evaluations. Area under the curve: divided by the steps, so it is a mean return.
Largest drop: the furthest an evaluation fell below an earlier one. ± is half a 95 % t-interval over seeds.

Difference: to the baseline, with a 95 % bootstrap interval over seeds. With two seeds a side this interval is narrow:
chance alone parts two pairs completely in one case of three. A difference counts as seen only if an exact permutation
test, corrected for the number of configurations (Holm), gives p of 0.05 or less, which takes at least four seeds a side.

Decisions a second: the median of charts/SPS after the warm-up. It depends on the machine and on what else ran there."""


def as_markdown(blocks: list[tuple]) -> str:
    parts = []
    for kind, *content in blocks:
        if kind in ("h1", "h2"):
            parts.append("#" * int(kind[1]) + " " + content[0])
        elif kind == "p":
            parts.append(content[0])
        elif kind == "figure":
            parts.append(f"![{content[1]}]({content[0]})")
        else:
            header, rows = content
            lines = [header, ["---"] * len(header), *rows]
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def as_html(blocks: list[tuple], out: Path) -> str:
    def text(raw: str) -> str:
        return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(raw)))

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"

    parts = []
    for kind, *content in blocks:
        if kind == "figure":
            picture = base64.b64encode((out / content[0]).read_bytes()).decode()
            parts.append(f'<img alt="{text(content[1])}" src="data:image/png;base64,{picture}">')
        elif kind == "table":
            header, rows = content
            parts.append("<table>" + row(header, "th") + "\n".join(row(cells, "td") for cells in rows) + "</table>")
        else:
            parts.append(f"<{kind}>{text(content[0])}</{kind}>")
    return HTML_HEAD + "\n".join(parts) + "\n</body></html>\n"


HTML_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Sweep report</title><style>
body { font-family: sans-serif; line-height: 1.45; max-width: 70em; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; } code { background: #f2f2f2; } table { border-collapse: collapse; font-size: 0.85em; }
th, td { border: 1px solid #ccc; padding: 0.25em 0.6em; text-align: right; } th:first-child, td:first-child { text-align: left; }
</style></head><body>
"""


def read_reference(file: Path | None) -> list[dict]:
    if file is None:
        return []
    wanted = {"algo", "task", "env_steps", "return_mean", "return_lcb", "return_ucb"}
    rows = list(csv.DictReader(file.read_text().splitlines()))
    if not rows or not wanted <= rows[0].keys():
        raise ValueError(f"{file}: a reference has the columns {', '.join(sorted(wanted))}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--status", action="store_true", help="print the table of states and stop")
    parser.add_argument("--reference", type=Path, help="CSV of published curves, drawn behind")
    parser.add_argument("--export", type=Path, help="keep the finished runs' returns here, and write the page here")
    parser.add_argument("--replot", type=Path, help="write the page of kept runs once more")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="where the page is written")
    options = parser.parse_args()
    try:
        runs = kept(options.replot) if options.replot else read_runs(sys.stdin)
        if options.status:
            return print_status(runs)
        reference = read_reference(options.reference)
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)
    options.out = options.replot or options.export or options.out
    if options.export:
        keep(runs, options.export)
        runs = kept(options.export)
    options.out.mkdir(parents=True, exist_ok=True)
    blocks = page(runs, options.out, reference)
    (options.out / "report.md").write_text(as_markdown(blocks))
    print(options.out / "report.md")
    if options.out not in (options.replot, options.export):  # kept runs are read where Markdown is
        (options.out / "report.html").write_text(as_html(blocks, options.out))
        print(options.out / "report.html")


if __name__ == "__main__":
    main()
