"""Report on the runs of the sweeps: a status table, or a page with statistics, tables and figures.

    bash sweeps.sh all --status                      print the state of each run
    bash sweeps.sh all --report                      write runs/report/report.md
    bash sweeps.sh all --report --axis updates       compare over updates (or seconds) instead of decisions
    bash sweeps.sh all --report --export DIR         keep the finished runs in DIR, a CSV of returns for each and the
                                                     commands of all runs in runs.json, and write the page from these
    python sweep_list/report.py --replot DIR         write that page again, from the CSVs alone

sweeps.sh passes the list of runs on standard input: one line for each run, fields separated by tabs. The numbers come
from each run's metrics.csv.
"""

import argparse
import errno
import os
import re
import sys
from pathlib import Path

import numpy as np
from comparison import (
    MEASURES,
    PRIMARY,
    REPEATED_BASELINE,
    Group,
    final_return,
    group_runs,
    half_interval,
    interquartile_mean,
    measured,
    over_axis,
    probability_of_improvement,
    relative_speed,
    stratified_bootstrap,
)
from run_files import (
    AXES,
    PLANNER,
    POLICY,
    SIZE_FIELDS,
    SPEED,
    TRAINING,
    Run,
    export_runs,
    load_exported,
    published_curves,
    read_run,
    speeds,
)

# --- Status ----------------------------------------------------------------------------------------------------------


def is_locked(file: Path) -> bool:
    """Whether another process holds the lock. A file system without locks is not a lock that is held."""
    try:
        lock = open(file, "rb")
    except OSError:
        return False
    with lock:
        try:
            os.lockf(lock.fileno(), os.F_TEST, 0)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return True
            print(f"report.py: {file} cannot be tested: {error.strerror}", file=sys.stderr)
    return False


def state_of(run: Run) -> str:
    if run.damage:
        return "damaged"
    if run.done:
        return "done"
    if is_locked(run.directory / "lock"):
        return "running"
    log = run.log.read_text(errors="replace") if run.log.exists() else ""
    failed = re.search(r"^== exit code (?!0$|75$)\d+\n\Z", log, re.M)  # the line that sweeps.sh writes at the end
    return "failed" if failed else "waiting"


def print_status(runs: list[Run]) -> int:
    """Print a line for each run. Returns the exit code: 0 all done, 1 a run failed or is damaged, 75 unfinished."""
    print(f"{'state':8} {'steps':>15} {'return':>8} {'ETA':>9}  run")
    states = [state_of(run) for run in runs]
    for run, state in zip(runs, states, strict=True):
        returns, speed = run.curve() if len(run.curve()) else run.curve(TRAINING), run.curve(SPEED)
        step = int(max((points[-1, 0] for points in run.metrics.values() if len(points)), default=0))
        last_return = f"{returns[-1, 1]:.1f}" if len(returns) else "-"
        eta = "-"
        if state == "running" and len(speed) and speed[-1, 1] > 0:
            eta = "{} h {:02d} m".format(*divmod(int((run.steps - step) / speed[-1, 1] / 60), 60))
        name = {"failed": run.log, "damaged": run.damage}.get(state, run.name)
        print(f"{state:8} {f'{step}/{run.steps}':>15} {last_return:>8} {eta:>9}  {name}")
    counts = {state: states.count(state) for state in ("done", "running", "failed", "waiting", "damaged")}
    shown = [f"{count} {state}" for state, count in counts.items() if count or state != "damaged"]
    print(f"{len(runs)} runs: " + ", ".join(shown))
    return 1 if counts["failed"] or counts["damaged"] else 0 if counts["done"] == len(runs) else 75


def print_due(runs: list[Run], lines: list[str]) -> None:
    """Print the lines of the runs to start: all that are not finished.

    If a damaged run is not finished, its script resumes or refuses it.
    """
    print(f"{sum(run.done for run in runs)} of {len(runs)} runs are done and skipped", file=sys.stderr)
    for run, line in zip(runs, lines, strict=True):
        if run.damage:
            action = "finished; delete its directory to run it again" if run.finished else "started again"
            print(f"damaged ({action}): {run.damage}", file=sys.stderr)
        if not run.finished:
            sys.stdout.write(line)


# --- Answers and tables ----------------------------------------------------------------------------------------------


def spread(values: np.ndarray) -> str:
    """Return the mean over seeds and half of its 95 % t-interval."""
    if not len(values):
        return "-"
    return f"{values.mean():.1f}" + (f" ± {half_interval(values):.1f}" if len(values) > 1 else "")


def markdown_table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def unfinished(group: Group) -> list[str]:
    """Say how many runs are missing, if any."""
    if group.done:
        return []
    done = [sum(run.done for run in runs) for runs in (group.runs, group.baseline)]
    beside = f", baseline {done[1]} of {len(group.baseline)}" if group.baseline else ""
    return [f"**not enough data**: {done[0]} of {len(group.runs)} runs{beside}"]


def answer(group: Group) -> list[str]:
    """Return the lines under a question: what the finished runs support."""
    if missing := unfinished(group):
        return missing
    if not group.baseline:
        lines = []
        for configuration, runs in group.configurations.items():
            planner, policy = (spread(measured(runs, final_return, tag)) for tag in (PLANNER, POLICY))
            lines.append(f"`{configuration}` ends at {planner} with the planner and at {policy} with the policy alone.")
        return lines
    lines = []
    for configuration, difference in group.differences[PRIMARY].items():
        lines.append(
            f"- `{configuration}`: **{difference.verdict}**, {difference}, p {difference.p:.2g}; in % of the baseline's"
            f" area {difference.of_area}, of its area above its first evaluation {difference.of_learned};"
            " simultaneous interval [{:+.1f}, {:+.1f}]".format(*difference.simultaneous)
        )
    return ["\n".join(lines) or "**not enough data**: an interval needs two seeds a side with values on this axis."]


def repetition_check(group: Group) -> list[str]:
    """Sweep 2c contains the baseline's own flags. The same seed must give the same curve to the last bit."""
    equal, different = [], []
    for run in group.repeated:
        twins = [twin for twin in group.baseline if twin.seed == run.seed and twin.done and run.done]
        for twin in twins:
            (equal if np.array_equal(run.curve(), twin.curve()) else different).append(str(run.seed))
    if not equal and not different:
        return []
    text = f"Check: `{REPEATED_BASELINE}` has the baseline's flags and is compared with nothing. "
    if different:
        reason = "as expected only on a GPU, or between machines or commits"
        return [text + f"**The curves of seeds {', '.join(different)} differ, {reason}.**"]
    return [text + f"The curves of seeds {', '.join(equal)} are equal to the baseline's bit for bit."]


def summary(groups: list[Group]) -> str:
    """Return a table with a row for each question: the answers, and the configuration with the highest estimate."""
    header = [
        "question",
        "answer",
        "highest estimate",
        "difference, % of area",
        "% of area above first evaluation",
        "seeds",
    ]
    rows = [header, ["---"] * len(header)]
    for group in groups:
        differences = group.differences[PRIMARY]
        verdicts: dict[str, list[str]] = {}
        for configuration, difference in differences.items():
            verdicts.setdefault(difference.verdict, []).append(f"`{configuration}`")
        unresolved = verdicts.pop("not resolved", [])
        words = [f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items()]
        words += ["not resolved" + (": the others" if words else "")] if unresolved else []
        name, best = max(differences.items(), key=lambda item: item[1].estimate)
        text = "; ".join(unfinished(group) or words)
        seeds = f"{len(best.values)}, baseline {len(best.base)}"
        rows.append([f"{group.question} ({group.task})", text, f"`{name}`", best.of_area, best.of_learned, seeds])
    return markdown_table(rows)


def table(group: Group) -> str:
    rows = [["configuration", "seeds", *MEASURES, "decisions a second, rough"], ["---"] * (3 + len(MEASURES))]
    shown = ({"baseline": group.baseline} if group.baseline else {}) | group.configurations
    for configuration, runs in shown.items():
        cells = [f"`{configuration}`", f"{sum(run.done for run in runs)} of {len(runs)}"]
        for name, measure in MEASURES.items():
            difference = group.differences[name].get(configuration)
            compared = f"; {difference}, p {difference.p:.2g}" if difference else ""
            cells.append(spread(measured(runs, *measure)) + compared)
        speed = relative_speed(runs, group.baseline) if runs is not group.baseline else ""
        rows.append([*cells, spread(speeds(runs)) + speed])
    return markdown_table(rows)


def over_tasks(groups: list[Group]) -> list[str]:
    """Return the aggregate table of configurations that are compared with a baseline on several dm_control tasks."""
    rows = [["configuration", "tasks", "IQM", "IQM of the baseline", "probability of improvement"], ["---"] * 5]
    # Of dm_control, where returns reach 1 000; tasks with unfinished runs are left out
    groups = [group for group in groups if group.done and not re.search(r"-v\d+$", group.task)]
    for configuration in dict.fromkeys(name for group in groups for name in group.differences[PRIMARY]):
        found = [group.differences[PRIMARY].get(configuration) for group in groups]
        own, base = ([getattr(one, side) / 1000 for one in found if one] for side in ("values", "base"))
        if len(own) < 2:
            continue
        estimates = [(interquartile_mean, own), (interquartile_mean, base), (probability_of_improvement, own, base)]
        cells = []
        for statistic, *sides in estimates:
            low, high = stratified_bootstrap(statistic, *sides)
            cells.append(f"{statistic(*sides):.3f} [{low:.3f}, {high:.3f}]")
        rows.append([f"`{configuration}`", str(len(own)), *cells])
    return [f"Over tasks, {PRIMARY} / 1000:", markdown_table(rows)] if len(rows) > 2 else []


def beside_published(group: Group) -> list[str]:
    """Return a table of full-size runs and the published returns at the env steps of their last evaluation.

    Between published points, 100 000 env steps apart, both are interpolated linearly.
    """
    curves, rows = published_curves(group.task), []
    for configuration, runs in group.configurations.items():
        runs = [run for run in runs if run.done and run.full_size and len(run.curve())]
        if not runs or not curves:
            continue
        repeat, last = runs[0].args["action_repeat"], min(curve[-1, 0] for curve in curves.values())
        at = min([last, *(run.curve()[-1, 0] * repeat for run in runs)])
        own = np.array([np.interp(at / repeat, *run.curve().T) for run in runs])
        cells = []
        for curve in curves.values():
            mean, low, high = (np.interp(at, curve[:, 0], values) for values in curve[:, 1:].T)
            cells.append(f"{mean:.0f} [{low:.0f}, {high:.0f}]")
        rows.append([f"`{configuration}`", f"{at:,.0f}", spread(own), *cells])
    if not rows:
        return []
    header = ["configuration", "env steps", "here", *curves]
    return ["Published at these env steps, mean and bounds:", markdown_table([header, ["---"] * len(header), *rows])]


# --- The page --------------------------------------------------------------------------------------------------------


def page(runs: list[Run], out: Path, axis: str = "decisions") -> str:
    """Return the report as Markdown and write its figures below `out`."""
    prefix = "" if axis == "decisions" else f"{axis}_"
    about = set()
    for run in [run for run in runs if run.args] or runs:  # runs that have not been started have no args
        sizes = ", ".join(f"{name} {run.args[name]}" for name in SIZE_FIELDS if name in run.args)
        about.add(f"{run.task}, {run.steps:,} decisions" + (f" ({sizes})" if sizes else ""))
    done = f"{sum(run.done for run in runs)} of {len(runs)} runs are done. Runs: {'; '.join(sorted(about))}."
    from figures import draw_forest, draw_sweep, sweep_panels  # matplotlib takes a second

    parts = ["# Sweep report" + f" over {axis}" * bool(prefix)]
    parts += [f"{done} The answers hold for these tasks, sizes and lengths."]
    parts += ["\n".join(f"- damaged, not counted as done: {run.damage}" for run in runs if run.damage)]
    runs, notes = over_axis(runs, axis)
    sweeps = group_runs(runs)
    compared = [group for groups in sweeps.values() for group in groups if group.differences[PRIMARY]]
    parts += notes
    if compared:
        draw_forest(compared, out / "figures" / f"{prefix}forest.png")
        count = sum(len(group.differences[PRIMARY]) for group in compared)
        text = f"p is corrected for {count} configuration{'s' * (count > 1)}."
        parts += ["## All configurations", text, summary(compared), f"![Forest plot](figures/{prefix}forest.png)"]
    explanations = [HOW_TO_READ] + [ABOUT_COMPARISONS] * bool(compared)
    for sweep, groups in sweeps.items():
        parts.append(f"## {groups[0].question} ({sweep})")
        for group in groups:
            parts += [f"**{group.task}**"] * (len(groups) > 1) + answer(group)
            if axis == "decisions":
                parts += [*repetition_check(group), table(group), *beside_published(group)]
            else:
                parts.append(table(group))
        if aggregate := over_tasks(groups):
            parts += aggregate
            explanations.append(ABOUT_SEVERAL_TASKS)
        if panels := sweep_panels(groups):
            draw_sweep(panels, axis, out / "figures" / f"{prefix}{sweep}.png")
            parts.append(f"![Learning curves of {sweep}](figures/{prefix}{sweep}.png)")
    return "\n\n".join([part for part in parts if part] + list(dict.fromkeys(explanations))) + "\n"


HOW_TO_READ = """\
## How to read this

Curves: evaluations, the mean over finished seeds in bold; shaded its 95 % t-interval, or, of up to five seeds, each as
a thin line, as are unfinished ones. Area under a curve: divided by its length, so it is a mean return. Final return:
mean of the last three evaluations. ± is half a 95 % t-interval. Decisions a second: the median of charts/SPS after the
random warm-up; rough, since other work on the machine changes it."""

ABOUT_COMPARISONS = """\
Forest plot: a dot is a seed, a diamond the estimate, a line its interval. In the tables, after the semicolon: the
difference to the baseline, its 95 % interval and p by Welch's t-test. Where a difference is given in %, the unit is
the observed mean area of the baseline, whose own uncertainty is not included, or the part of this area that lies above
the baseline's first evaluation, which may owe nothing to learning. p is corrected by Holm for all configurations of
this page, each measure by itself. The area under the planner's curve decides: *better* or *worse* if p is at most
0.05, else *not resolved*; the interval says which differences remain possible. The highest of several estimates is too
high on average. The simultaneous interval is Dunnett's: in 95 % of experiments all of those with the same task and
baseline contain their true differences at once, if all configurations have the same spread. Where it contains 0
although p is at most 0.05, the answer *depends on the test*."""

ABOUT_SEVERAL_TASKS = """\
IQM: interquartile mean over tasks and seeds. Probability of improvement: that a seed beats one of the baseline on
the same task. Both as in Agarwal et al. (2021), with 95 % bootstrap intervals, seeds resampled within each task;
with fewer than five seeds these intervals are too narrow."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--status", action="store_true", help="print the state of each run and stop")
    parser.add_argument("--due", action="store_true", help="print the lines of the runs to start and stop")
    parser.add_argument("--axis", choices=AXES, default="decisions", help="what returns are compared over")
    parser.add_argument("--export", type=Path, metavar="DIR", help="keep the finished runs in DIR, and the page there")
    parser.add_argument("--replot", type=Path, metavar="DIR", help="write the page of exported runs again")
    options = parser.parse_args()
    out = options.replot or options.export or Path("runs/report")
    lines = [] if options.replot else list(sys.stdin)
    runs = [read_run(line) for line in lines]
    if options.status:
        return print_status(runs)
    if options.due:
        print_due(runs, lines)
        return 0
    for run in runs:
        if run.damage:
            print(f"damaged: {run.damage}", file=sys.stderr)
    try:
        if options.export:
            export_runs(runs, out)
        if options.export or options.replot:
            runs = load_exported(out)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"report.py: {out} is no complete folder of exported runs: {error}")
    (out / "figures").mkdir(parents=True, exist_ok=True)
    file = out / ("report.md" if options.axis == "decisions" else f"report_{options.axis}.md")
    file.write_text(page(runs, out, options.axis), errors="surrogateescape")
    print(file)
    return 0


if __name__ == "__main__":
    if not sys.flags.utf8_mode:  # files, names and streams are UTF-8, whatever the locale
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.argv])
    sys.exit(main())
