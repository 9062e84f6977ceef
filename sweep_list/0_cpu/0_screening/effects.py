"""Effects of each departure of the defaults from the authors' hyperparameters, from the exported runs of the screening.

    python sweep_list/0_cpu/0_screening/effects.py results/screening

An effect is the mean of the six runs with the default minus the mean of the six with the official number, in percent of
the mean of all twelve. The effect for both tasks is the mean of the two. Eleven effects use up the twelve runs, so no
run is left to estimate the error. Lenth's method (Technometrics 31, 1989) estimates it from the effects themselves,
assuming that most of them are zero. By chance alone one effect exceeds the first margin in at most 5 % of cases, and
any of the eleven exceeds the second margin in at most 5 % of such tables.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from comparison import area_under_curve, final_return  # noqa: E402
from run_files import PLANNER, POLICY, load_exported  # noqa: E402

LETTERS = {  # factor -> its default
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
MEASURES = {
    "area": (area_under_curve, PLANNER),
    "final": (final_return, PLANNER),
    "policy's area": (area_under_curve, POLICY),
}


def effects(values: dict[str, float]) -> np.ndarray:  # (11,)
    """Return the effect of each letter. A configuration is named by the letters that are at their default."""
    results = np.array(list(values.values()))
    at_default = {letter: np.array([letter in name for name in values]) for letter in LETTERS}
    return np.array([results[mask].mean() - results[~mask].mean() for mask in at_default.values()])


def margins(found: np.ndarray) -> tuple[float, float]:
    """Return Lenth's margins of error: for a single effect, and for all effects simultaneously."""
    sizes = np.abs(found)
    error = 1.5 * np.median(sizes[sizes < 2.5 * 1.5 * np.median(sizes)])
    single, simultaneous = 0.975, (1 + 0.95 ** (1 / len(sizes))) / 2
    return tuple(stats.t.ppf(quantile, len(sizes) / 3) * error for quantile in (single, simultaneous))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python effects.py FOLDER")
    runs = [run for run in load_exported(Path(sys.argv[1])) if run.done]
    columns, tasks = {}, sorted({run.task for run in runs})
    for name, (measure, tag) in MEASURES.items():
        found = []
        for task in tasks:
            values = {run.configuration: measure(run.curve(tag)) for run in runs if run.task == task}
            if len(values) != len(LETTERS) + 1:
                sys.exit(f"effects.py: {task} has {len(values)} of {len(LETTERS) + 1} runs")
            found.append(100 * effects(values) / np.mean(list(values.values())))
        columns[f"{name}, both tasks"] = np.mean(found, 0)
        columns |= {f"{name}, {task}": column for task, column in zip(tasks, found, strict=True)}
    print(f"| default, % | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for row, default in enumerate(LETTERS.values()):
        print(f"| {default} | {' | '.join(f'{column[row]:+.1f}' for column in columns.values())} |")
    for which, label in enumerate(("margin of one effect", "margin of all together")):
        print(f"| {label} | {' | '.join(f'± {margins(column)[which]:.1f}' for column in columns.values())} |")


if __name__ == "__main__":
    main()
