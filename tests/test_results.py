"""results/: the kept curves are those of the commands beside them, and README's table of them is computed from them."""

import csv
import dataclasses
import importlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tyro
from conftest import ROOT
from test_report import report

FOLDERS = sorted(path.parent for path in (ROOT / "results").glob("*/runs.json"))
KEPT = {folder: json.loads((folder / "runs.json").read_text()) for folder in FOLDERS}
RUNS = [(folder, name, about) for folder, runs in KEPT.items() for name, about in runs.items()]


@pytest.mark.parametrize("folder, name, about", RUNS, ids=[f"{folder.name}/{name}" for folder, name, _ in RUNS])
def test_a_kept_run_is_whole(folder, name, about):
    """The command names the run and its length; the curve ends there and is evenly spaced."""
    _python, script, *flags = shlex.split(about["command"])
    args = tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)
    assert name == f"{args.env_id}__{script.removesuffix('.py')}__{args.seed}__{args.run_name}"
    assert args.seed == about["seed"] and args.total_timesteps == about["steps"]
    assert {"git_commit", "torch", "mujoco", "dm_control"} <= set(about["versions"])
    rows = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
    steps = [int(row["global_step"]) for row in rows]
    assert steps == list(range(steps[0], about["steps"] + 1, args.eval_freq)) and steps[0] in (0, args.eval_freq)
    assert [int(row["env_steps"]) for row in rows] == [2 * step for step in steps]
    assert np.isfinite([[float(row["planner_return"]), float(row["policy_return"])] for row in rows]).all()


def meaning(command):
    """What a command line runs: its script, and the arguments, however they are spelled."""
    _python, script, *flags = shlex.split(command)
    args = importlib.import_module(Path(script).stem).parse_args(flags)
    return Path(script).stem, dataclasses.astuple(dataclasses.replace(args, preset="full"))


def test_the_sweeps_still_say_the_kept_commands():
    sweeps = sorted({about["sweep"].split("__")[0] for _, _, about in RUNS})
    command = ["bash", ROOT / "sweeps.sh", *sweeps, "--dry-run"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    said = {meaning(line) for line in lines}
    assert sweeps and {meaning(about["command"]) for _, _, about in RUNS} <= said


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_replotted_from_the_csvs_alone_it_is_the_same(folder, tmp_path):
    """To the byte, and the figures so where the same matplotlib draws them."""
    shutil.copytree(folder, tmp_path, ignore=shutil.ignore_patterns("figures", "report.md"), dirs_exist_ok=True)
    subprocess.run([sys.executable, ROOT / "sweep_list" / "report.py", "--replot", tmp_path], check=True)
    files = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}
    again = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*.*")}
    drawn_here = f"Matplotlib version{matplotlib.__version__},".encode()
    assert again.keys() == files.keys() and len(list(folder.glob("*.csv"))) == len(KEPT[folder])
    for name, content in files.items():
        assert again[name] == content or (name.suffix == ".png" and drawn_here not in content), name


def test_readme_has_the_table():
    """Mean of the last three evaluations over seeds, with t-intervals: planner, policy alone, and their difference."""
    for folder in ("baseline", "dog_run"):
        (groups,) = report.group_runs(report.kept(ROOT / "results" / folder)).values()
        for group in groups:
            planner, policy = (
                report.measured(group.runs, report.final_return, tag) for tag in (report.PLANNER, report.POLICY)
            )
            cells = [group.task, str(len(planner)), *map(report.spread, (planner, policy, planner - policy))]
            assert f"| {' | '.join(cells)} |" in (ROOT / "README.md").read_text()
