"""Comparisons of configurations with their baseline: axes, measures of a curve, tests and intervals."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction

import numpy as np
import scipy  # scipy.stats is imported on first use, so that --status stays fast
from run_files import AXES, PLANNER, POLICY, UPDATE_FIELDS, Run, speeds

REPEATED_BASELINE = "chosen_action_on__from_behavior_on"  # sweep 2c's configuration that has the baseline's flags

# --- Axes: returns over decisions, updates or seconds ----------------------------------------------------------------


def derived_updates(run: Run, steps: np.ndarray) -> np.ndarray:
    """Return the updates made by `steps` decisions, for logs without charts/updates; pretraining updates included."""
    learning_starts, utd_ratio, num_envs = (run.setting(name) for name in UPDATE_FIELDS)
    first = math.ceil(learning_starts / num_envs) * num_envs
    made = [math.floor(int(step - first) * Fraction(str(utd_ratio))) for step in steps]  # exact, as in the scripts
    return np.where(steps < first, 0, learning_starts + np.array(made))


def to_axis(run: Run, curve: np.ndarray, axis: str) -> np.ndarray:  # (n, 2) -> (m, 2)
    """Replace global_step by the axis. Of several points at one value the last stays; without values none does."""
    steps, logged = curve[:, 0], run.curve(AXES[axis])
    if axis == "decisions" or not len(curve):
        return curve
    if len(logged):
        x = np.interp(steps, *logged.T)
    elif axis == "updates":
        x = derived_updates(run, steps)
    else:
        return curve[:0]
    return np.column_stack([x, curve[:, 1]])[np.append(np.diff(x) > 0, True)]


def family(run: Run, sweeps: set[str]) -> tuple[str, str]:
    """Return what runs that are compared with each other share: the baseline's sweep, or their own, and the task."""
    return (run.baseline if run.baseline in sweeps else run.sweep), run.task


def over_axis(runs: list[Run], axis: str) -> tuple[list[Run], list[str]]:
    """Put the returns on an axis, each family cut to the range that all its finished runs cover.

    Over updates and seconds evaluations lie elsewhere in each run: curves are interpolated linearly at as many evenly
    spaced points as the run with the most evaluations has in this range. Returns the runs and notes for the page.
    """
    sweeps, families, result, notes = {run.sweep for run in runs}, {}, [], []
    for run in runs:
        curves = {tag: to_axis(run, run.curve(tag), axis) for tag in (PLANNER, POLICY)}
        moved = dataclasses.replace(run, metrics=run.metrics | curves)
        families.setdefault(family(run, sweeps), []).append(moved)
        result.append(moved)
    for (sweep, task), members in families.items():
        finished = [run.curve() for run in members if run.done and len(run.curve())]
        if not finished:
            continue
        low, high = max(curve[0, 0] for curve in finished), min(curve[-1, 0] for curve in finished)
        inside = max(int(np.sum((curve[:, 0] >= low) & (curve[:, 0] <= high))) for curve in finished)
        grid = None if axis == "decisions" else np.unique(np.linspace(low, high, max(inside, 2)))
        cut = any(curve[0, 0] < low or curve[-1, 0] > high for curve in finished)
        if low > high:
            notes.append(
                f"**{sweep} and what is compared with it, {task}: the runs have no range of {axis} in common.**"
            )
        elif cut or axis != "decisions":
            notes.append(f"{sweep}, {task}: compared from {low:,.0f} to {high:,.0f} {axis}.")
        for run in members:
            run.metrics |= {tag: restrict(run.curve(tag), low, high, grid) for tag in (PLANNER, POLICY)}
    if axis != "decisions":
        notes.append("In these curves, evaluations are points that were interpolated, evenly spaced over this range.")
    if axis == "updates":
        notes.append("Updates include those of pretraining; for a log without `charts/updates` the flags give them.")
    if axis == "seconds":
        notes.append("Seconds compare only runs that had the same machine, and the same share of it.")
        if lacking := sum(run.done and not len(run.curve(AXES[axis])) for run in runs):
            notes.append(f"**{lacking} finished runs are left out: their log has no `charts/training_seconds`.**")
    return result, notes


def restrict(curve: np.ndarray, low: float, high: float, grid: np.ndarray | None) -> np.ndarray:
    """Cut a curve to [low, high], with interpolated ends, or interpolate it on the grid as far as it goes."""
    if low > high or not len(curve) or curve[-1, 0] < low:
        return curve[:0]
    if grid is None:
        x = curve[:, 0]
        grid = np.unique([*x[(x >= low) & (x <= high)], low, high])
    grid = grid[(grid >= curve[0, 0]) & (grid <= curve[-1, 0])]
    return np.column_stack([grid, np.interp(grid, *curve.T)])


# --- Measures of a curve ---------------------------------------------------------------------------------------------


def final_return(curve: np.ndarray) -> float:
    return float(curve[-3:, 1].mean())


def area_under_curve(curve: np.ndarray) -> float:
    """Return the mean height of the curve: its area by trapezoids, divided by its length."""
    if len(curve) < 2:
        return float(curve[-1, 1])
    return float(np.trapezoid(curve[:, 1], curve[:, 0]) / (curve[-1, 0] - curve[0, 0]))


def learned(curve: np.ndarray) -> float:
    """Return the part of the area above the first evaluation."""
    return area_under_curve(curve) - float(curve[0, 1])


MEASURES = {
    "area under the planner's curve": (area_under_curve, PLANNER),
    "final return": (final_return, PLANNER),
    "area under the policy's curve": (area_under_curve, POLICY),
}
PRIMARY, *_ = MEASURES  # the one that decides


def measured(runs: list[Run], function: Callable, tag: str = PLANNER) -> np.ndarray:  # (finished seeds,)
    return np.array([function(run.curve(tag)) for run in runs if run.done and len(run.curve(tag))])


def half_interval(values: np.ndarray) -> np.ndarray:
    """Return half of the 95 % t-interval of the mean over the first dimension, of at least two seeds."""
    return scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)


def relative_speed(runs: list[Run], baseline: list[Run]) -> str:
    """Return the speed relative to runs of the baseline started within an hour; other hours do not compare."""
    hours = lambda run: datetime.fromisoformat(run.versions["time"]).timestamp() / 3600
    timed = [[run for run in side if "time" in run.versions and len(speeds([run]))] for side in (runs, baseline)]
    ratios = []
    for run in timed[0]:
        nearby = [other for other in timed[1] if abs(hours(other) - hours(run)) <= 1]
        if nearby:
            ratios.append(speeds([run])[0] / speeds(nearby).mean())
    return f", roughly × {np.mean(ratios):.1f} ({len(ratios)} of the same hour)" if ratios else ""


# --- One configuration and its baseline ------------------------------------------------------------------------------


@dataclass
class Difference:
    """A configuration minus its baseline in one measure."""

    values: np.ndarray  # (seeds,) of the configuration
    base: np.ndarray  # (seeds,) of the baseline
    low: float  # Welch's 95 % confidence interval
    high: float
    p: float  # Welch's t-test; `group_runs` applies Holm's correction
    base_learned: float = math.nan  # mean area of the baseline above its first evaluation
    simultaneous: tuple[float, float] = (math.nan, math.nan)  # Dunnett's interval: 95 % for all configurations at once

    @property
    def estimate(self) -> float:
        return float(self.values.mean() - self.base.mean())

    @property
    def interval(self) -> tuple[float, float, float]:  # estimate, low, high
        return self.estimate, self.low, self.high

    def percent(self, value: float | np.ndarray) -> float | np.ndarray:
        """Return a value in % of the baseline's mean; nan if that is 0."""
        return 100 * value / (abs(self.base.mean()) or math.nan)

    @property
    def of_area(self) -> str:
        return with_interval(*map(self.percent, self.interval))

    @property
    def of_learned(self) -> str:
        """Return the difference in % of the baseline's area above its first evaluation."""
        unit = self.base_learned / 100 if self.base_learned > 0 else math.nan
        return with_interval(*(value / unit for value in self.interval))

    @property
    def verdict(self) -> str:
        """Return the answer by p; Dunnett's interval can only weaken it."""
        if not self.p <= 0.05:
            return "not resolved"
        if self.simultaneous[0] <= 0 <= self.simultaneous[1]:
            return "depends on the test"
        return "better" if self.estimate > 0 else "worse"

    def __str__(self) -> str:
        return with_interval(*self.interval)


def with_interval(mean: float, low: float, high: float) -> str:
    return "-" if math.isnan(mean) else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def welch(values: np.ndarray, base: np.ndarray) -> Difference:
    """Compare two samples of at least two seeds each, whose spreads may differ."""
    apart = float(values.mean() - base.mean())
    if np.ptp(values) == np.ptp(base) == 0:  # no spread at all, as where no seed earns anything
        return Difference(values, base, apart, apart, float(apart == 0))
    with warnings.catch_warnings(action="ignore"):  # of precision, where seeds are nearly equal
        test = scipy.stats.ttest_ind(values, base, equal_var=False)
    return Difference(values, base, *map(float, test.confidence_interval(0.95)), float(test.pvalue))


def holm(ps: list[float]) -> list[float]:
    """Return p-values after Holm's correction for making several tests."""
    order = np.argsort(ps)
    raised = np.maximum.accumulate(np.minimum(1, np.arange(len(ps), 0, -1) * np.array(ps)[order]))
    return raised[np.argsort(order)].tolist()


def add_simultaneous_intervals(differences: list[Difference]) -> None:
    """Add Dunnett's intervals of configurations that share a baseline. They assume one spread for all."""
    if not any(np.ptp(one.values) or np.ptp(one.base) for one in differences):
        return
    samples, rng = [one.values for one in differences], np.random.default_rng(0)
    with warnings.catch_warnings(action="ignore"):
        found = scipy.stats.dunnett(*samples, control=differences[0].base, rng=rng).confidence_interval(0.95)
    for one, low, high in zip(differences, found.low, found.high, strict=True):
        one.simultaneous = float(low), float(high)


# --- Several tasks (Agarwal et al., Deep RL at the Edge of the Statistical Precipice, 2021) --------------------------


def interquartile_mean(scores: list[np.ndarray]) -> float:  # one array of seeds a task
    return float(scipy.stats.trim_mean(np.concatenate(scores), 0.25))


def probability_of_improvement(scores: list[np.ndarray], base: list[np.ndarray]) -> float:
    """Return the probability that a seed beats one of the baseline on the same task, averaged over tasks."""
    pairs = [(own[:, None], other[None]) for own, other in zip(scores, base, strict=True)]
    return float(np.mean([np.mean((own > other) + (own == other) / 2) for own, other in pairs]))


def stratified_bootstrap(statistic: Callable, *sides: list[np.ndarray]) -> tuple[float, float]:
    """Return a 95 % percentile interval of `statistic(*sides)`; seeds are resampled within each task."""
    rng = np.random.default_rng(0)
    draw = lambda scores: [rng.choice(values, len(values)) for values in scores]
    low, high = np.percentile([statistic(*map(draw, sides)) for _ in range(2000)], [2.5, 97.5])
    return float(low), float(high)


# --- All runs of a page ----------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The runs of one sweep on one task by configuration, and the baseline they are compared with, if there is one."""

    task: str
    configurations: dict[str, list[Run]]
    baseline: list[Run]
    repeated: list[Run]  # runs with the baseline's own flags: checked for equality, compared with nothing
    differences: dict[str, dict[str, Difference]]  # measure -> configuration with at least two seeds -> difference

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.configurations.values() for run in runs]

    @property
    def done(self) -> bool:
        return all(run.done for run in self.runs + self.baseline)

    @property
    def question(self) -> str:
        return (self.runs + self.repeated + self.baseline)[0].question


def make_group(members: list[Run], runs: list[Run]) -> Group:
    """Group the runs of one sweep and task by configuration.

    The baseline is the configuration `baseline` of the sweep that they name. Without one it is their own configuration
    `baseline`, if there are others beside it.
    """
    sweep, task, named = members[0].sweep, members[0].task, members[0].baseline
    configurations: dict[str, list[Run]] = {}
    for run in members:
        configurations.setdefault(run.configuration, []).append(run)
    baseline = [run for run in runs if (run.sweep, run.task, run.configuration) == (named, task, "baseline")]
    if named == sweep or not baseline:
        baseline = configurations.pop("baseline", []) if len(configurations) > 1 else []
    repeated = configurations.pop(REPEATED_BASELINE, []) if baseline else []
    return Group(task, configurations, baseline, repeated, {name: {} for name in MEASURES})


def group_runs(runs: list[Run]) -> dict[str, list[Group]]:  # sweep -> one group a task
    """Compare each configuration with its baseline; p of a measure is corrected for all configurations together."""
    members: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        members.setdefault((run.sweep, run.task), []).append(run)
    groups = {key: make_group(value, runs) for key, value in members.items()}
    for name, measure in MEASURES.items():
        families: dict[tuple, list[Difference]] = {}
        for group in groups.values():
            base = measured(group.baseline, *measure)
            for configuration, own in group.configurations.items():
                values = measured(own, *measure)
                if min(len(values), len(base)) > 1:
                    difference = group.differences[name][configuration] = welch(values, base)
                    families.setdefault((group.baseline[0].sweep, group.task), []).append(difference)
                    if name == PRIMARY:
                        difference.base_learned = float(measured(group.baseline, learned).mean())
        found = [difference for differences in families.values() for difference in differences]
        for difference, p in zip(found, holm([difference.p for difference in found]), strict=True):
            difference.p = p
        for differences in families.values() if name == PRIMARY else ():
            add_simultaneous_intervals(differences)
    sweeps: dict[str, list[Group]] = {}
    for (sweep, _task), group in groups.items():
        sweeps.setdefault(sweep, []).append(group)
    return sweeps
