"""results/: the kept curves are those of the commands beside them, and README's table of them is computed from them.

    PYTHONPATH=tests python tests/test_results.py    prints that table
"""

import csv
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tyro
from conftest import ROOT
from test_report import report

FOLDERS = sorted(path.parent for path in (ROOT / "results").glob("*/runs.json"))
RUNS = [(folder, name, about) for folder in FOLDERS for name, about in json.loads((folder / "runs.json").read_text()).items()]


def returns_table() -> list[str]:
    """Mean of the last three evaluations, over seeds with 95 % t-intervals: planner, policy alone, and their difference."""
    lines = []
    for folder in ("baseline", "dog_run"):
        (groups,) = report.group_runs(report.kept(ROOT / "results" / folder)).values()
        for group in groups:
            (runs,) = group.configurations.values()
            planner, policy = (report.measured(runs, report.final_return, tag) for tag in (report.PLANNER, report.POLICY))
            cells = [report.spread(planner), report.spread(policy), report.spread(planner - policy)]
            lines.append(f"| {group.task} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def test_there_are_kept_runs():
    assert FOLDERS and {file.stem for folder in FOLDERS for file in folder.glob("*.csv")} == {name for _, name, _ in RUNS}


@pytest.mark.parametrize("folder, name, about", RUNS, ids=[f"{folder.name}/{name}" for folder, name, _ in RUNS])
def test_a_kept_run_is_whole(folder, name, about):
    """The command names the run and its length; the curve starts at 0, ends there and is evenly spaced."""
    _python, script, *flags = shlex.split(about["command"])
    args = tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)
    assert name == f"{args.env_id}__{script.removesuffix('.py')}__{args.seed}__{args.run_name}"
    assert args.seed == about["seed"] and args.total_timesteps == about["steps"]
    assert {"git_commit", "torch", "mujoco", "dm_control"} <= set(about["versions"])
    rows = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
    steps = np.array([int(row["global_step"]) for row in rows])
    assert steps[0] == 0 and steps[-1] == about["steps"] and len(set(np.diff(steps))) == 1
    assert steps[1] == args.eval_freq and [int(row["env_steps"]) for row in rows] == list(2 * steps)
    assert np.isfinite([[float(row["planner_return"]), float(row["policy_return"])] for row in rows]).all()


def test_the_sweeps_still_say_the_kept_commands():
    sweeps = sorted({about["sweep"].split("__")[0] for _, _, about in RUNS})
    command = ["bash", str(ROOT / "sweeps.sh"), *sweeps, "--dry-run"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    said = {re.sub(r"^\S+ (\S*/)?", "python ", line) for line in lines}
    assert {about["command"] for _, _, about in RUNS} <= said


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_replotted_from_the_csvs_alone(folder, tmp_path):
    for file in [*folder.glob("*.csv"), folder / "runs.json"]:
        shutil.copy(file, tmp_path)
    subprocess.run([sys.executable, ROOT / "sweep_list" / "report.py", "--replot", tmp_path], check=True)
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()
    assert {f.name for f in tmp_path.glob("figures/*")} == {f.name for f in folder.glob("figures/*")}


def test_readme_has_the_table():
    readme = (ROOT / "README.md").read_text()
    for line in returns_table():
        assert line in readme, line


if __name__ == "__main__":
    print("\n".join(returns_table()))
