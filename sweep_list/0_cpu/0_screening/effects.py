"""What each departure of the defaults from the official numbers costs: the effects of the screening's kept runs.

    python sweep_list/0_cpu/0_screening/effects.py results/screening

An effect is the mean of the six runs with the default less that of the six with the official number, in percent of the
mean of all twelve; of both tasks, the mean of their two. Eleven effects use up twelve runs, so nothing is left for an
error of its own: Lenth's method (Technometrics 31, 1989) takes it from the effects themselves, few of which are real.
Chance alone exceeds the first margin in at most one of twenty effects, the second in at most one of twenty such tables.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import report  # noqa: E402

LETTERS = {
    "A": "four environments",
    "B": "half as many windows reanalyzed",
    "C": "consistency 10 and weights that sum to 1",
    "D": "encoder learns at the full rate",
    "E": "log std from -5, in reanalyze too",
    "F": "min_std 0.1",
    "G": "expert's std x 1.5, at least 0.1",
    "H": "executed action as the expert's mean",
    "I": "no entropy bonus",
    "J": "best elite evaluates",
    "K": "nothing: the noise",
}


def effects(values):
    """Of a number for each configuration, named by the letters at their default: the effect of each letter."""
    on = {letter: [letter in name for name in values] for letter in LETTERS}
    results = np.array(list(values.values()))
    return np.array([results[mask].mean() - results[~mask].mean() for mask in map(np.array, on.values())])


def margins(found):
    """Lenth's margins of error of the effects: of each for itself, and of all together."""
    sizes = np.abs(found)
    error = 1.5 * np.median(sizes[sizes < 2.5 * 1.5 * np.median(sizes)])
    each, all_ = 0.975, (1 + 0.95 ** (1 / len(sizes))) / 2
    return tuple(stats.t.ppf(share, len(sizes) / 3) * error for share in (each, all_))


def main():
    runs = report.kept(Path(sys.argv[1]))
    measures = {
        "area": (report.area_under_curve, report.PLANNER),
        "final": (report.final_return, report.PLANNER),
        "policy's area": (report.area_under_curve, report.POLICY),
    }
    columns, tasks = {}, sorted({run.task for run in runs})
    for name, (measure, tag) in measures.items():
        found = []
        for task in tasks:
            values = {run.configuration: measure(run.curve(tag)) for run in runs if run.task == task}
            assert len(values) == len(LETTERS) + 1, f"{task}: {len(values)} of {len(LETTERS) + 1} runs are kept"
            found.append(100 * effects(values) / np.mean(list(values.values())))
        columns[f"{name}, both tasks"] = np.mean(found, 0)
        columns |= {f"{name}, {task}": column for task, column in zip(tasks, found, strict=True)}
    print(f"| default, % | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for row, what in enumerate(LETTERS.values()):
        print(f"| {what} | {' | '.join(f'{column[row]:+.1f}' for column in columns.values())} |")
    for which, what in enumerate(("margin of one effect", "margin of all together")):
        print(f"| {what} | {' | '.join(f'± {margins(column)[which]:.1f}' for column in columns.values())} |")


if __name__ == "__main__":
    main()
