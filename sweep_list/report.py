"""What the runs of the sweeps say: a status table, or a page of figures, tables and answers.

    bash sweeps.sh all --status                      the table
    bash sweeps.sh all --report                      runs/report/report.md
    bash sweeps.sh all --report --export DIR         what is worth keeping of the finished runs: a CSV of returns for
                                                     each, commands and versions in runs.json, and the page made of them
    python sweep_list/report.py --replot DIR         that page once more, from the CSVs alone

The list of runs comes from sweeps.sh on standard input, one a line, its fields separated by tabs. The numbers come from
each run's metrics.csv. Sections: runs and their metrics, kept runs, status, statistics, answers, figures, the page.
"""

import argparse
import csv
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
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
        last_start.pop("command", None)
        about[run.directory.name] = {key: getattr(run, key) for key in ABOUT} | {
            "command": re.sub(r"^\S+ (\S*/)?", "python ", run.command),  # no interpreter's and no script's folder
            "args": {key: run.args[key] for key in ("action_repeat", *SIZES) if key in run.args},
            "decisions_a_second": [round(float(speed), 1) for speed in speeds([run])],
            "versions": last_start,
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
            minutes = int((run.steps - step) / speed[-1, 1] / 60)
            eta = f"{minutes // 60} h {minutes % 60:02d} m"
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


def largest_drop(curve: np.ndarray) -> float:
    """How far an evaluation fell below the best one before it, at worst. Small is stable."""
    return float((np.maximum.accumulate(curve[:, 1]) - curve[:, 1]).max())


MEASURES = {"final return": final_return, "area under the curve": area_under_curve, "largest drop": largest_drop}


def half_width(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % t-interval of the mean over the first axis, two seeds or more."""
    n = len(values)
    return scipy.stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / math.sqrt(n)


@dataclass
class Difference:
    """Mean over seeds less the baseline's, its 95 % bootstrap interval, how often chance alone separates as much."""

    mean: float
    low: float
    high: float
    p: float
    seeds: float  # a side, that would tell it

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(values: np.ndarray, baseline: np.ndarray) -> Difference:
    """The bootstrap draws seeds anew on both sides. p is the exact permutation test's, which two seeds cannot fool."""
    generator = np.random.default_rng(0)
    sides = (values, baseline)
    means = [side[generator.integers(len(side), size=(10_000, len(side)))].mean(1) for side in sides]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    apart = lambda x, y, axis: x.mean(axis) - y.mean(axis)
    p = scipy.stats.permutation_test(sides, apart, vectorized=True, n_resamples=10_000, rng=generator).pvalue
    return Difference(values.mean() - baseline.mean(), low, high, p, seeds_to_tell(values, baseline))


def seeds_to_tell(values: np.ndarray, baseline: np.ndarray) -> float:
    """Seeds a side with which a two-sided t-test at 5 % finds a difference of the size seen with power 0.8.

    With n seeds a side and Cohen's d (the difference over the pooled standard deviation), Student's t follows the
    noncentral t distribution with 2 (n - 1) degrees of freedom and noncentrality d sqrt(n / 2): Cohen, Statistical
    Power Analysis for the Behavioral Sciences, chapter 2. The smallest such n; infinity if it is above 1 000.
    """
    gap = abs(values.mean() - baseline.mean())
    deviation = math.sqrt((values.var(ddof=1) + baseline.var(ddof=1)) / 2)
    n = np.arange(2, 1001)
    d = min(gap / deviation, 20) if deviation else 20 * (gap > 0)  # two seeds tell 20, whatever is beyond it
    limit = scipy.stats.t.ppf(0.975, 2 * (n - 1))
    power = sum(scipy.stats.nct.sf(limit, 2 * (n - 1), side * d * np.sqrt(n / 2)) for side in (1, -1))
    return int(n[power >= 0.8][0]) if (power >= 0.8).any() else math.inf


def holm(ps: list[float]) -> list[float]:
    """Holm's correction: several configurations are several chances to be lucky."""
    order = np.argsort(ps)
    raised = np.maximum.accumulate([min(1.0, (len(ps) - i) * ps[j]) for i, j in enumerate(order)])
    return [float(raised[list(order).index(j)]) for j in range(len(ps))]


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The runs of one sweep on one task, by configuration, beside those of its baseline, if it is not the baseline."""

    task: str
    configurations: dict[str, list[Run]]
    baseline: list[Run]

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.configurations.values() for run in runs]

    @cached_property
    def differences(self) -> dict[str, dict[str, Difference]]:  # measure -> configuration, of two seeds at least -> ...
        found: dict[str, dict[str, Difference]] = {name: {} for name in MEASURES}
        for name, function in MEASURES.items():
            baseline = measured(self.baseline, function)
            for configuration, runs in self.configurations.items():
                values = measured(runs, function)
                if min(len(values), len(baseline)) > 1:
                    found[name][configuration] = difference(values, baseline)
        return found


def measured(runs: list[Run], function, tag: str = PLANNER) -> np.ndarray:  # (finished seeds,)
    return np.array([function(run.curve(tag)) for run in runs if run.done and len(run.curve(tag))])


def group_runs(runs: list[Run]) -> dict[str, list[Group]]:  # sweep -> one group a task
    sweeps: dict[str, dict[str, Group]] = {}
    for run in runs:
        baseline = [b for b in runs if b.sweep == run.baseline != run.sweep and b.task == run.task]
        group = sweeps.setdefault(run.sweep, {}).setdefault(run.task, Group(run.task, {}, baseline))
        group.configurations.setdefault(run.configuration, []).append(run)
    return {sweep: list(groups.values()) for sweep, groups in sweeps.items()}


def answer(group: Group) -> list[str]:
    """The lines under a question: what the finished runs support, and no more."""
    done = [sum(run.done for run in runs) for runs in (group.runs, group.baseline)]
    if done != [len(group.runs), len(group.baseline)]:
        beside = f", baseline {done[1]} of {len(group.baseline)}" if group.baseline else ""
        return [f"**not enough data**: {done[0]} of {len(group.runs)} runs{beside}"]
    if group.baseline:
        if min(len(runs) for runs in [*group.configurations.values(), group.baseline]) < 2:
            return ["**not enough data**: one seed gives no interval."]
        return [f"**{name.capitalize()}: {verdict(differences)}" for name, differences in group.differences.items()]
    lines = []
    for configuration, runs in group.configurations.items():
        planner, policy = (spread(measured(runs, final_return, tag)) for tag in (PLANNER, POLICY))
        lines.append(f"`{configuration}` ends at {planner} with the planner and at {policy} with the policy alone.")
    return lines


def verdict(differences: dict[str, Difference]) -> str:
    """A few seeds part by chance, so an interval without 0 is not enough: the permutation test has to agree."""
    others = {c: d for c, d in differences.items() if c != BASELINE_AGAIN}
    chances = dict(zip(others, holm([d.p for d in others.values()]), strict=True))
    clear = [c for c, d in others.items() if d.low > 0 or d.high < 0]
    sure = [c for c in clear if chances[c] <= 0.05]
    listed = "; ".join(f"`{c}` {others[c]}" for c in sure or clear)
    p = max((chances[c] for c in sure or clear), default=1)
    if sure:
        text = f"differs from the baseline.** {listed} (p at most {p:.2g})."
    elif clear:
        text = f"undecided.** {listed}: an interval without 0, but so few seeds part by chance (p up to {p:.2g})."
    else:
        text = "no difference seen.** Every interval holds 0."
    needed = {c: d.seeds for c, d in others.items() if c not in sure}
    numbers = ", ".join(f"`{c}` {n if n < math.inf else 'over 1000'}" for c, n in needed.items())
    return text + (f" Seeds a side that would tell it: {numbers}." if needed else "")


def coincidence(group: Group) -> list[str]:
    """Sweep 2c holds the baseline once more. The same seed must give the same curve to the last bit."""
    lines = []
    for run in group.configurations.get(BASELINE_AGAIN, []):
        mine = dict(run.curve())
        twin = next((dict(other.curve()) for other in group.baseline if other.seed == run.seed), {})
        shared = sorted(mine.keys() & twin.keys())
        apart = [step for step in shared if mine[step] != twin[step]]
        text = f"the curves coincide bit for bit at {len(shared)} of {len(mine)} evaluations"
        if apart:
            text = f"**the curves differ**, first at decision {apart[0]:.0f}: {mine[apart[0]]}, not {twin[apart[0]]}"
        lines.append(f"`{BASELINE_AGAIN}` is the baseline once more. Seed {run.seed}: {text}.")
    return lines


# --- figures ---------------------------------------------------------------------------------------------------------


def draw_curve(axis, runs: list[Run], label: str, colour: str, bar_at: float, tag: str = PLANNER) -> None:
    """The mean over seeds as far as all of them have come, the seeds as thin lines, 95 % t-intervals of the mean."""
    curves = [dict(run.curve(tag)) for run in runs if len(run.curve(tag))]
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, evaluations)
    axis.plot(steps, values.mean(0), label=label, color=colour, linewidth=2, zorder=4)
    axis.plot(steps, values.T, color=colour, linewidth=0.6, alpha=0.5, zorder=3)
    if len(curves) > 2:  # with two the band is 12.7 standard errors wide, and pinched wherever they happen to meet
        low, high = values.mean(0) - half_width(values), values.mean(0) + half_width(values)
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
    finals = measured(runs, final_return, tag)
    if len(finals) > 1:
        look = dict(color=colour, linewidth=1.5, capsize=2.5, marker="o", markersize=3)
        axis.errorbar(bar_at, finals.mean(), half_width(finals), **look)


def draw_panel(axis, group: Group, configuration: str) -> None:
    from matplotlib.ticker import EngFormatter

    own = group.configurations[configuration]
    last_step = max((run.curve()[-1, 0] for run in own + group.baseline if len(run.curve())), default=0) or 1
    repeat = next((run.args["action_repeat"] for run in own + group.baseline if run.args), 1)
    if group.baseline:  # in Okabe and Ito's colours, safe for the colour-blind
        draw_curve(axis, group.baseline, "baseline", "black", 1.03 * last_step)
        draw_curve(axis, own, "configuration", "#D55E00", 1.07 * last_step)
    else:
        draw_curve(axis, own, "policy alone", "#0072B2", 1.03 * last_step, POLICY)
        draw_curve(axis, own, "planner", "black", 1.07 * last_step)
    named = group.baseline or len(group.configurations) > 1
    axis.set_title(group.task + ("\n" + configuration.replace("__", ", ") if named else ""), fontsize=10)
    axis.set_xlabel("decisions")
    axis.set_xlim(0, 1.1 * last_step)
    axis.spines["right"].set_visible(False)
    axis.grid(alpha=0.25)
    env_steps = axis.secondary_xaxis("top", functions=(lambda x: x * repeat, lambda x: x / repeat))
    env_steps.set_xlabel("env steps", fontsize=9)
    for scale in (axis, env_steps):
        scale.xaxis.set_major_formatter(EngFormatter(sep=""))
        scale.locator_params(axis="x", nbins=5)


def draw_sweep(groups: list[Group], file: Path) -> None:
    """A panel for each configuration, against the baseline. Its height follows the lines; a wide band is cut off."""
    from matplotlib.figure import Figure

    panels = sum(len(group.configurations) for group in groups)
    columns = min(panels, 2 if panels in (2, 4) else 3)
    rows = math.ceil(panels / columns)
    size = (4.2 * columns, 3.6 * rows) if columns > 1 else (6.8, 4.2)
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, columns, squeeze=False)
    free = iter(axes.flat)
    for group in groups:
        own = {configuration: next(free) for configuration in group.configurations}
        for configuration, axis in own.items():
            draw_panel(axis, group, configuration)
        lines = [line.get_ydata() for axis in own.values() for line in axis.get_lines()]
        top = max((max(line) for line in lines if len(line) > 1), default=1)  # a line of one point is a bar's end
        for axis in own.values():
            axis.set_ylim(0, 1.08 * top or 1)
    for axis in free:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("evaluation return")
    keys = dict(key for axis in axes.flat for key in zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.tight_layout()
    figure.legend(keys.values(), keys.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=6, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, bbox_inches="tight")


# --- the page --------------------------------------------------------------------------------------------------------


def spread(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    return f"{values.mean():.1f}" + (f" ± {half_width(values):.1f}" if len(values) > 1 else "")


def speeds(runs: list[Run]) -> np.ndarray:  # (finished seeds,), medians of decisions a second after the quick warm-up
    curves = [(run.curve(SPEED), run.args.get("learning_starts", 0)) for run in runs if run.done]
    learning = [curve[curve[:, 0] > start, 1] for curve, start in curves]
    return np.array([np.median(values) for values in learning if len(values)])


def table(group: Group) -> str:
    header = ["configuration", "seeds", "final return", "difference", "area under the curve", "difference"]
    lines = [[*header, "largest drop", "policy alone", "decisions a second"], ["---"] * 9]
    shown = ({"baseline": group.baseline} if group.baseline else {}) | group.configurations
    for configuration, runs in shown.items():
        final, area, drop = (spread(measured(runs, function)) for function in MEASURES.values())
        apart = [str(differences.get(configuration, "-")) for differences in group.differences.values()]
        others = [drop, spread(measured(runs, final_return, POLICY)), spread(speeds(runs))]
        seeds = f"{sum(run.done for run in runs)} of {len(runs)}"
        lines.append([f"`{configuration}`", seeds, final, apart[0], area, apart[1], *others])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(runs: list[Run], out: Path) -> str:
    about = set()
    for run in runs:
        sizes = ", ".join(f"{name} {run.args[name]}" for name in SIZES if name in run.args)
        about.add(f"{run.task}, {run.steps:,} decisions" + (f" ({sizes})" if sizes else ""))
    done = f"{sum(run.done for run in runs)} of {len(runs)} runs are done. Runs: {'; '.join(sorted(about))}."
    parts = ["# Sweep report", f"{done} The answers hold for these tasks, sizes and lengths."]
    for sweep, groups in group_runs(runs).items():
        parts.append(f"## {groups[0].runs[0].question} ({sweep})")
        for group in groups:
            where = f"{group.task}: " if len(groups) > 1 else ""
            parts += [where + line for line in answer(group) + coincidence(group)]
        if any(len(run.curve()) for group in groups for run in group.runs):
            draw_sweep(groups, out / "figures" / f"{sweep}.png")
            parts.append(f"![Learning curves of {sweep}](figures/{sweep}.png)")
        for group in groups:
            parts += [f"**{group.task}**"] * (len(groups) > 1) + [table(group)]
    return "\n\n".join([*parts, NOTES])


NOTES = """\
## How to read this

Curves: evaluations with the planner, the mean over seeds in bold, the seeds as thin lines. The bars at the right are
95 % t-intervals of the mean final return; from three seeds on each evaluation has its interval as a band. With two
seeds the t-interval reaches 12.7 standard errors to either side; the figure cuts it off.

Final return: mean of the last three evaluations. Area under the curve: divided by the steps, so it is a mean return.
Largest drop: the furthest an evaluation fell below an earlier one. ± is half a 95 % t-interval over seeds.

Difference: to the baseline, with a 95 % bootstrap interval over seeds. With two seeds a side this interval is narrow:
chance alone parts two pairs completely in one case of three. A difference counts as seen only if an exact permutation
test, corrected for the number of configurations (Holm), gives p of 0.05 or less, which takes at least four seeds a
side. Seeds a side that would tell it: the difference seen, by a two-sided t-test at 5 % with power 0.8, for one
configuration, were the spread the one seen. From two or three seeds both are rough.

Decisions a second: the median of charts/SPS after the warm-up. It depends on the machine and on what else ran there.
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
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(page(runs, out))
    print(out / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
