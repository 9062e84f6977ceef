"""What the runs of the sweeps say: a status table, or a page of figures, tables and answers.

    bash sweeps.sh all --status                      the table
    bash sweeps.sh all --report                      runs/report/report.md
    bash sweeps.sh all --report --export DIR         what is worth keeping of the finished runs: a CSV of returns for
                                                     each, commands and versions in runs.json, and the page made of them
    python sweep_list/report.py --replot DIR         that page once more, from the CSVs alone

The list of runs comes from sweeps.sh on standard input, one a line, its fields separated by tabs. The numbers come from
each run's metrics.csv.
"""

import argparse
import csv
import json
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy  # scipy.stats loads when it is used

PLANNER, POLICY = "eval/episodic_return", "eval/policy_episodic_return"
TRAINING, SPEED = "charts/episodic_return", "charts/SPS"
BASELINE_AGAIN = "chosen_action_on__from_behavior_on"  # sweep 2c's configuration that sets the baseline's values
ABOUT = ("steps", "sweep", "baseline", "configuration", "seed", "question", "command")
RETURNS = {"planner_return": PLANNER, "policy_return": POLICY}
SIZES = ("model_size", "enc_dim", "mlp_dim", "latent_dim", "num_q")

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
    args: dict
    done: bool
    metrics: dict[str, np.ndarray]  # tag -> (n, 2), global_step and value

    @property
    def task(self) -> str:
        return self.directory.name.split("__")[0]

    @property
    def log(self) -> Path:
        return self.directory.parent / "logs" / f"{self.directory.name}.log"

    def curve(self, tag: str = PLANNER) -> np.ndarray:  # (n, 2)
        return self.metrics.get(tag, np.empty((0, 2)))


def read_run(line: str) -> Run:
    name, steps, *names, seed, question, command = line.rstrip("\n").split("\t")
    folder = Path(name)
    args, metrics = read_json(folder / "args.json"), read_metrics(folder / "metrics.csv")
    done = read_json(folder / "finished.json").get("total_timesteps", -1) >= int(steps)
    return Run(folder, int(steps), *names, int(seed), question, command, args, done, metrics)


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not there yet, or being written
        return {}


def read_metrics(file: Path) -> dict[str, np.ndarray]:
    """Reads metrics.csv as it stands; a last line that is still being written has no line end and is left out."""
    text = file.read_text() if file.exists() else ""
    points: dict[str, list] = {}
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        points.setdefault(row["tag"], []).append((float(row["global_step"]), float(row["value"])))
    return {tag: np.array(values) for tag, values in points.items()}


# --- kept runs: the returns and the origin of finished ones, small enough to commit ----------------------------------


def keep(runs: list[Run], folder: Path) -> None:
    """Writes NAME.csv with the returns of each finished run, and runs.json with its origin, beside what is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    about = read_json(folder / "runs.json")
    for run in (run for run in runs if run.done):
        returns = [dict(run.curve(tag)) for tag in RETURNS.values()]
        lines = [",".join(["global_step", "env_steps", *RETURNS])]
        for step in sorted(set().union(*returns)):
            values = [f"{curve[step]:.6g}" if step in curve else "" for curve in returns]
            lines.append(",".join([f"{step:.0f}", f"{step * run.args['action_repeat']:.0f}", *values]))
        (folder / f"{run.directory.name}.csv").write_text("\n".join(lines) + "\n")
        last_start = json.loads((run.directory / "versions.json").read_text())[-1]
        about[run.directory.name] = {key: getattr(run, key) for key in ABOUT} | {
            "command": re.sub(r"^\S+ (\S*/)?", "python ", run.command),  # no interpreter's and no script's folder
            "args": {key: run.args[key] for key in ("action_repeat", *SIZES) if key in run.args},
            "decisions_a_second": [round(float(speed), 1) for speed in speeds([run])],
            "versions": {key: value for key, value in last_start.items() if key != "command"},
        }
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(about.items())]  # a line for each
    (folder / "runs.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def kept(folder: Path) -> list[Run]:
    """The runs that `keep` wrote, with their returns and speed as their only metrics."""
    runs = []
    for name, about in json.loads((folder / "runs.json").read_text()).items():
        rows = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
        metrics = {SPEED: np.array([(about["steps"], speed) for speed in about["decisions_a_second"]]).reshape(-1, 2)}
        for key, tag in RETURNS.items():
            metrics[tag] = np.array([(float(row["global_step"]), float(row[key])) for row in rows if row[key]])
        runs.append(Run(folder / name, *(about[key] for key in ABOUT), about["args"], True, metrics))
    return sorted(runs, key=lambda run: (run.sweep, run.configuration, run.task, run.seed))


# --- status ----------------------------------------------------------------------------------------------------------


def state_of(run: Run) -> str:
    if run.done:
        return "done"
    try:
        with open(run.directory / "lock", "rb") as lock:
            os.lockf(lock.fileno(), os.F_TEST, 0)
    except FileNotFoundError:
        pass
    except OSError:  # another process holds it
        return "running"
    log = run.log.read_text(errors="replace") if run.log.exists() else ""
    return "failed" if re.search(r"^== exit code (?!0$|75$)\d+\n\Z", log, re.M) else "waiting"  # sweeps.sh notes it


def print_status(runs: list[Run]) -> int:
    """Returns the exit code: 0 all done, 1 a run failed, 75 some are unfinished."""
    print(f"{'state':8} {'steps':>15} {'return':>8} {'ETA':>9}  run")
    states = [state_of(run) for run in runs]
    for run, state in zip(runs, states, strict=True):
        returns, speed = run.curve() if len(run.curve()) else run.curve(TRAINING), run.curve(SPEED)
        step = int(max((points[-1, 0] for points in run.metrics.values()), default=0))
        last_return = f"{returns[-1, 1]:.1f}" if len(returns) else "-"
        eta = "-"
        if state == "running" and len(speed) and speed[-1, 1] > 0:
            eta = "{} h {:02d} m".format(*divmod(int((run.steps - step) / speed[-1, 1] / 60), 60))
        name = run.log if state == "failed" else run.directory.name
        print(f"{state:8} {f'{step}/{run.steps}':>15} {last_return:>8} {eta:>9}  {name}")
    counts = {state: states.count(state) for state in ("done", "running", "failed", "waiting")}
    print(f"{len(runs)} runs: " + ", ".join(f"{number} {state}" for state, number in counts.items()))
    return 1 if counts["failed"] else 0 if counts["done"] == len(runs) else 75


# --- statistics ------------------------------------------------------------------------------------------------------


def final_return(curve: np.ndarray) -> float:
    return float(curve[-3:, 1].mean())


def area_under_curve(curve: np.ndarray) -> float:
    """The mean height of the curve: its area by trapezoids over its length in steps."""
    if len(curve) < 2:
        return float(curve[-1, 1])
    return float(np.trapezoid(curve[:, 1], curve[:, 0]) / (curve[-1, 0] - curve[0, 0]))


MEASURES = {
    "area under the planner's curve": (area_under_curve, PLANNER),
    "final return": (final_return, PLANNER),
    "area under the policy's curve": (area_under_curve, POLICY),
}
PRIMARY, *_ = MEASURES  # it decides; the others stand beside it


@dataclass
class Difference:
    """A configuration less its baseline in one measure; seed by seed where both have the same seeds."""

    apart: np.ndarray  # (seeds,), less the baseline's run of the same seed, or less its mean
    base: float  # the baseline's mean
    paired: bool
    deviation: float  # between pairs, or between the seeds of a side
    variance_ratio: float  # of a paired difference to an unpaired one, from the seeds that both have
    low: float  # the 95 % interval; nan with fewer than three seeds a side
    high: float
    p: float  # of a permutation test; `group_runs` corrects it
    smallest: float  # p that so many seeds can have, before the correction
    tests: int = 1  # how many configurations p is corrected for

    def percent(self, value: float | np.ndarray):
        return 100 * value / (abs(self.base) or math.nan)

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return "undecided"
        if self.p <= 0.05 and (self.low > 0 or self.high < 0):
            return "better" if self.low > 0 else "worse"
        return f"no difference larger than {self.far:.0f} %"

    @property
    def far(self) -> float:
        return np.ceil(self.percent(max(abs(self.low), abs(self.high))))

    @property
    def seeds(self) -> str:
        """Seeds a side with which a difference of this size has a corrected p of 0.05 at most, with power 0.8.

        Student's t of n pairs is noncentral by d sqrt(n), that of n seeds a side by d sqrt(n / 2), where d is the
        difference over the standard deviation: Cohen, Statistical Power Analysis for the Behavioral Sciences, ch. 2.
        """
        n, sides, alpha = np.arange(2, 1001), 2 - self.paired, 0.05 / self.tests
        shift = np.sqrt(n / sides) * min(abs(self.apart.mean()) / (self.deviation or 1e-9), 20)
        limit = scipy.stats.t.isf(alpha / 2, sides * (n - 1))
        power = sum(scipy.stats.nct.sf(limit, sides * (n - 1), side * shift) for side in (1, -1))
        enough = n[(power >= 0.8) & (smallest_p(n, n, self.paired) <= alpha)]
        return str(enough[0]) if len(enough) else "over 1000"

    def __str__(self) -> str:
        return with_interval(self.apart.mean(), self.low, self.high)


def with_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if low <= high else "")


def smallest_p(n, other_n, paired: bool):
    """Two of all the ways to deal the runs to the two sides: pairs one to each, else in any manner."""
    return 2.0 ** (1 - n) if paired else 2 / scipy.special.comb(n + other_n, n)


def difference(own: dict[int, float], baseline: dict[int, float]) -> Difference:  # by seed, two seeds at least
    """The bootstrap draws seeds anew, pairs or each side its own; the permutation test deals them to the sides anew."""
    paired = own.keys() == baseline.keys()
    x, y = (np.array([side[seed] for seed in sorted(own.keys() & baseline.keys())]) for side in (own, baseline))
    ratio = (x - y).var() / ((x.var() + y.var()) or math.nan) if len(x) > 1 else math.nan
    if not paired:
        x, y = (np.array(list(side.values())) for side in (own, baseline))
    apart, base = x - (y if paired else y.mean()), y.mean()
    deviation = apart.std(ddof=1) if paired else math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    how = lambda: dict(vectorized=True, n_resamples=10_000, rng=np.random.default_rng(0))
    statistic, deal = lambda x, y, axis: x.mean(axis) - y.mean(axis), "samples" if paired else "independent"
    p = scipy.stats.permutation_test((x, y), statistic, permutation_type=deal, **how()).pvalue
    low = high = math.nan
    with warnings.catch_warnings(action="ignore"):  # BCa is nan, and says so, where seeds are too much alike
        for method in ("percentile", "BCa") if min(len(x), len(y)) > 2 else ():
            found = scipy.stats.bootstrap((x, y), statistic, paired=paired, method=method, **how()).confidence_interval
            low, high = found if np.isfinite(found).all() else (low, high)
    return Difference(apart, base, paired, deviation, ratio, low, high, p, smallest_p(len(x), len(y), paired))


def holm(ps: list[float]) -> list[float]:
    """Holm's correction: several configurations are several chances to be lucky."""
    order = np.argsort(ps)
    raised = np.maximum.accumulate(np.minimum(1, np.arange(len(ps), 0, -1) * np.array(ps)[order]))
    return raised[np.argsort(order)].tolist()


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The runs of one sweep on one task, by configuration, beside those of its baseline, if it is not the baseline."""

    task: str
    configurations: dict[str, list[Run]]
    baseline: list[Run]
    differences: dict[str, dict[str, Difference]]  # measure -> configuration, of two seeds at least -> to the baseline

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.configurations.values() for run in runs]


def by_seed(runs: list[Run], function, tag: str = PLANNER) -> dict[int, float]:  # of the finished runs
    return {run.seed: function(run.curve(tag)) for run in runs if run.done and len(run.curve(tag))}


def measured(runs: list[Run], function, tag: str = PLANNER) -> np.ndarray:  # (finished seeds,)
    return np.array(list(by_seed(runs, function, tag).values()))


def group_runs(runs: list[Run]) -> dict[str, list[Group]]:  # sweep -> one group a task
    """Each configuration is compared with its baseline; p of a measure is corrected for all of them together."""
    sweeps: dict[str, dict[str, Group]] = {}
    for run in runs:
        baseline = [b for b in runs if b.sweep == run.baseline != run.sweep and b.task == run.task]
        group = sweeps.setdefault(run.sweep, {}).setdefault(run.task, Group(run.task, {}, baseline, {}))
        group.configurations.setdefault(run.configuration, []).append(run)
    groups = [group for tasks in sweeps.values() for group in tasks.values()]
    for name, measure in MEASURES.items():
        for group in groups:
            sides = {c: by_seed(runs, *measure) for c, runs in group.configurations.items()}
            base = by_seed(group.baseline, *measure)
            group.differences[name] = {c: difference(x, base) for c, x in sides.items() if min(len(x), len(base)) > 1}
        found = [one for group in groups for one in group.differences[name].values()]
        for one, p in zip(found, holm([one.p for one in found]), strict=True):
            one.p, one.tests = p, len(found)
    return {sweep: list(tasks.values()) for sweep, tasks in sweeps.items()}


def unfinished(group: Group) -> list[str]:
    """That runs are missing, if some are."""
    done = [sum(run.done for run in runs) for runs in (group.runs, group.baseline)]
    if done == [len(group.runs), len(group.baseline)]:
        return []
    beside = f", baseline {done[1]} of {len(group.baseline)}" if group.baseline else ""
    return [f"**not enough data**: {done[0]} of {len(group.runs)} runs{beside}"]


def answer(group: Group) -> list[str]:
    """The lines under a question: what the finished runs support, and no more."""
    if missing := unfinished(group):
        return missing
    if group.baseline:
        text = "- `{}`: **{}**, {}; seeds a side that would tell a difference of this size: {}"
        lines = [text.format(c, one.verdict, one, one.seeds) for c, one in group.differences[PRIMARY].items()]
        return ["\n".join(lines) or "**not enough data**: one seed gives no interval."]
    text, tags = "`{}` ends at {} with the planner and at {} with the policy alone.", (PLANNER, POLICY)
    ends = {c: [measured(runs, final_return, tag) for tag in tags] for c, runs in group.configurations.items()}
    return [text.format(c, *map(spread, values)) for c, values in ends.items()]


def overview(groups: list[Group]) -> str:
    """Whether so few seeds can tell so many configurations apart, and what pairing gave."""
    found = [(c, one) for group in groups for c, one in group.differences[PRIMARY].items()]
    smallest = min(1, len(found) * min(one.smallest for _, one in found))
    tests = f"{len(found)} configuration{'s' * (len(found) != 1)}"
    text = f"p, corrected for {tests}, cannot be below {smallest:.2g} with these seeds."
    ratios = [one.variance_ratio for c, one in found if c != BASELINE_AGAIN and one.variance_ratio >= 0]
    if not ratios:
        return text
    text += f" Pairing by seed reduces the variance of {sum(r < 1 for r in ratios)} of {len(ratios)} differences"
    return f"{text} (paired over unpaired: median {np.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f})."


def summary(groups: list[Group]) -> str:
    """A row a question: what its configurations are told to be, and the one with the highest estimate."""
    lines = [["question", "answer", "highest estimate", "difference, %", "seeds", "speed"], ["---"] * 6]
    for group in groups:
        found, told = group.differences[PRIMARY], {}
        for c, one in found.items():
            told.setdefault(one.verdict.partition(" larger")[0], []).append(c)
        far = [found[c].far for c in told.pop("no difference", [])]
        words = [f"{verdict}: {', '.join(f'`{c}`' for c in names)}" for verdict, names in told.items()]
        words += [f"no difference larger than {max(far):.0f} %" + " elsewhere" * bool(told)] if far else []
        best = max(found, key=lambda c: found[c].apart.mean())
        one, runs = found[best], group.configurations[best]
        seeds = f"{sum(run.done for run in runs)}, baseline {sum(run.done for run in group.baseline)}"
        estimate = with_interval(*map(one.percent, (one.apart.mean(), one.low, one.high)))
        question, text = f"{group.runs[0].question} ({group.task})", "; ".join(unfinished(group) or words)
        lines.append([question, text, f"`{best}`", estimate, seeds, cost(runs, group.baseline)])
    return rows_of(lines)


def coincidence(group: Group) -> list[str]:
    """Sweep 2c holds the baseline once more. The same seed must give the same curve to the last bit."""
    lines = []
    for run in group.configurations.get(BASELINE_AGAIN, []):
        twins = [dict(other.curve()) for other in group.baseline if other.seed == run.seed]
        mine, twin = dict(run.curve()), twins[0] if twins else {}
        shared = sorted(mine.keys() & twin.keys())
        apart = [step for step in shared if mine[step] != twin[step]]
        text = f"the curves coincide bit for bit at {len(shared)} of {len(mine)} evaluations"
        if apart:
            text = f"**the curves differ**, first at decision {apart[0]:.0f}: {mine[apart[0]]}, not {twin[apart[0]]}"
        lines.append(f"`{BASELINE_AGAIN}` is the baseline once more. Seed {run.seed}: {text}.")
    return lines


# --- figures ---------------------------------------------------------------------------------------------------------


def draw_panel(axis, group: Group, configuration: str) -> None:
    """The mean over seeds as far as all of them have come, the seeds as thin lines."""
    from matplotlib.ticker import EngFormatter

    own, base = group.configurations[configuration], group.baseline
    lines = [("policy alone", "#0072B2", own, POLICY), ("planner", "black", own, PLANNER)]
    if base:  # in Okabe and Ito's colours, safe for the colour-blind
        lines = [("baseline", "black", base, PLANNER), ("configuration", "#D55E00", own, PLANNER)]
    for label, colour, runs, tag in lines:
        if curves := [dict(run.curve(tag)) for run in runs if len(run.curve(tag))]:
            steps = sorted(set.intersection(*map(set, curves)))
            values = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, evaluations)
            axis.plot(steps, values.mean(0), label=label, color=colour, linewidth=2, zorder=4)
            axis.plot(steps, values.T, color=colour, linewidth=0.6, alpha=0.5, zorder=3)
    axis.set_title(f"{group.task}\n{configuration.replace('__', ', ')}", fontsize=10)
    repeat = next((run.args["action_repeat"] for run in own + base if run.args), 1)
    axis.set_xlabel("decisions" + (f", each {repeat} env steps" if repeat > 1 else ""))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.locator_params(axis="x", nbins=5)
    axis.spines[["right", "top", "bottom"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.axhline(0, color="black", linewidth=0.8)


def draw_sweep(groups: list[Group], file: Path) -> None:
    """A panel for each configuration, against the baseline."""
    from matplotlib.figure import Figure

    panels = [(group, configuration) for group in groups for configuration in group.configurations]
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows) if columns > 1 else (6.8, 4.2))
    for i, panel in enumerate(panels, 1):
        alike = figure.axes[0] if figure.axes and len(groups) == 1 else None
        draw_panel(figure.add_subplot(rows, columns, i, sharey=alike), *panel)
    figure.supylabel("evaluation return", fontsize=10)
    figure.tight_layout()
    keys = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(keys.values(), keys, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)
    figure.savefig(file, dpi=120, bbox_inches="tight")


def draw_forest(groups: list[Group], file: Path) -> None:
    """Every configuration against its baseline in the first measure, under its question; each seed is a dot."""
    from matplotlib.figure import Figure

    rows = []
    for group in groups:
        rows.append((f"{group.runs[0].question} ({group.task})", group, None))
        rows += [(c, group, one) for c, one in group.differences[PRIMARY].items()]
    axis = Figure(figsize=(6, 1 + 0.25 * len(rows))).subplots()
    axis.set_yticks(range(len(rows)), [row[0].replace("__", ", ") for row in rows], fontsize=8.5)
    write = dict(transform=axis.get_yaxis_transform(), va="center", fontsize=8, family="monospace")
    columns = "{:24}{:>6}{:>8}  {}"
    axis.text(1.02, -1, columns.format("difference [95 %]", "p", "speed", "answer"), **write)
    for y, (name, group, one) in enumerate(rows):
        if one:
            colour = {"better": "#0072B2", "worse": "#D55E00"}.get(one.verdict, "black")
            axis.plot(one.percent(one.apart), [y] * len(one.apart), "o", color=colour, alpha=0.3, markersize=3)
            axis.plot([one.percent(one.low), one.percent(one.high)], [y, y], color=colour, linewidth=1.5)
            axis.plot(one.percent(one.apart.mean()), y, "D", color=colour, markersize=5)
            cells = str(one), f"{one.p:.2g}", cost(group.configurations[name], group.baseline), one.verdict
            axis.text(1.02, y, columns.format(*cells), color=colour, **write)
        else:
            axis.get_yticklabels()[y].set_weight("bold")
    axis.axvline(0, color="black", linewidth=0.8, zorder=1)
    axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"{PRIMARY}, difference in % of the baseline's")
    axis.tick_params("y", length=0)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["left", "right", "top"]].set_visible(False)
    axis.figure.savefig(file, dpi=120, bbox_inches="tight")


# --- the page --------------------------------------------------------------------------------------------------------


def spread(values: np.ndarray) -> str:
    """The mean over seeds and half of its 95 % t-interval."""
    if not len(values):
        return "-"
    interval = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values) if len(values) > 1 else math.nan
    return f"{values.mean():.1f}" + (f" ± {interval:.1f}" if len(values) > 1 else "")


def speeds(runs: list[Run]) -> np.ndarray:  # (finished seeds,), medians of decisions a second after the quick warm-up
    curves = [(run.curve(SPEED), run.args.get("learning_starts", 0)) for run in runs if run.done]
    learning = [curve[curve[:, 0] > start, 1] for curve, start in curves]
    return np.array([np.median(values) for values in learning if len(values)])


def cost(runs: list[Run], baseline: list[Run]) -> str:
    own, base = speeds(runs), speeds(baseline)
    return f"× {own.mean() / base.mean():.2f}" if len(own) and len(base) else "-"


def table(group: Group) -> str:
    lines = [["configuration", "seeds", *MEASURES, "decisions a second"], ["---"] * 6]
    shown = ({"baseline": group.baseline} if group.baseline else {}) | group.configurations
    for configuration, runs in shown.items():
        cells = [f"`{configuration}`", f"{sum(run.done for run in runs)} of {len(runs)}"]
        for name, measure in MEASURES.items():
            one = group.differences[name].get(configuration)
            cells.append(spread(measured(runs, *measure)) + (f"; {one}, p {one.p:.2g}" if one else ""))
        speed = spread(speeds(runs)) + (f", {cost(runs, group.baseline)}" if group.baseline else "")
        lines.append([*cells, speed])
    return rows_of(lines)


def rows_of(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(runs: list[Run], out: Path) -> str:
    about = set()
    for run in runs:
        sizes = ", ".join(f"{name} {run.args[name]}" for name in SIZES if name in run.args)
        about.add(f"{run.task}, {run.steps:,} decisions" + (f" ({sizes})" if sizes else ""))
    done = f"{sum(run.done for run in runs)} of {len(runs)} runs are done. Runs: {'; '.join(sorted(about))}."
    parts = ["# Sweep report", f"{done} The answers hold for these tasks, sizes and lengths."]
    sweeps = group_runs(runs)
    compared = [group for groups in sweeps.values() for group in groups if group.differences[PRIMARY]]
    if compared:
        draw_forest(compared, out / "figures" / "forest.png")
        parts += ["## All configurations", overview(compared), summary(compared), "![Forest plot](figures/forest.png)"]
    for sweep, groups in sweeps.items():
        parts.append(f"## {groups[0].runs[0].question} ({sweep})")
        for group in groups:
            parts += [f"**{group.task}**"] * (len(groups) > 1) + answer(group) + coincidence(group) + [table(group)]
        if any(len(run.curve()) for group in groups for run in group.runs):
            draw_sweep(groups, out / "figures" / f"{sweep}.png")
            parts.append(f"![Learning curves of {sweep}](figures/{sweep}.png)")
    return "\n\n".join([*parts, NOTES])


NOTES = """\
## How to read this

Forest plot: dots are seeds, diamonds estimates, lines intervals. Curves: evaluations with the planner, the mean over
seeds in bold, the seeds as thin lines. Area under a curve: over its length, so it is a mean return. Final return: mean
of the last three evaluations. ± is half a 95 % t-interval.

After the semicolon: the difference to the baseline, of pairs where both have the same seeds, else of the means; its
95 % bootstrap interval (BCa) from three seeds on, too narrow (with 6 pairs it holds the truth in 85 %); p of a
permutation test (pairs: of signs), corrected by Holm for all configurations of the report, each measure by itself. The
area under the planner's curve decides: better or worse with p of at most 0.05 and an interval without 0; else no
difference larger than the interval's far end, in % of the baseline's; undecided with two seeds. Seeds that would tell
it: the same test with power 0.8, were difference and spread those seen; from few seeds it is rough. Decisions a second:
the median of charts/SPS after the warm-up, and over the baseline's; other work on the machine shows in them.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--status", action="store_true", help="print the table of states and stop")
    parser.add_argument("--due", action="store_true", help="print the lines of the runs that are not done and stop")
    parser.add_argument("--export", type=Path, help="keep the finished runs' returns here, and write the page here")
    parser.add_argument("--replot", type=Path, help="write the page of kept runs once more")
    options = parser.parse_args()
    out = options.replot or options.export or Path("runs/report")
    lines = [] if options.replot else list(sys.stdin)
    runs = [read_run(line) for line in lines]
    if options.status:
        return print_status(runs)
    if options.due:
        print(f"{sum(run.done for run in runs)} of {len(runs)} runs are done and skipped", file=sys.stderr)
        sys.stdout.writelines(line for run, line in zip(runs, lines, strict=True) if not run.done)
        return 0
    if options.export:
        keep(runs, out)
    if options.export or options.replot:
        runs = kept(out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(page(runs, out))
    print(out / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
