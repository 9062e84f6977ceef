"""sweep_list/report.py: the numbers it prints are the runs' numbers, and it says no more than they support."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("sweep_report", ROOT / "sweep_list" / "report.py")
report = importlib.util.module_from_spec(spec)
sys.modules["sweep_report"] = report
spec.loader.exec_module(report)

STEPS = [0, 100, 200, 300, 400]


class Lab:
    """Runs as the scripts leave them, in a directory of their own."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []

    def run(self, sweep, configuration, seed, curve=(), done=True, task="dog-run"):
        directory = self.folder / "runs" / f"{task}__bmpc__{seed}__{sweep}__{configuration}"
        baseline = re.sub(r"2[a-h]_\w+$", "1_test", sweep)
        fields = [
            directory,
            400,
            sweep,
            baseline,
            configuration,
            seed,
            "Is it better?",
            f"/bin/python {ROOT}/bmpc.py --x 2",
        ]
        self.lines.append("\t".join(map(str, fields)) + "\n")
        if not len(curve):
            return self
        directory.mkdir(parents=True)
        rows = [(s, tag, y) for tag in (report.PLANNER, report.POLICY) for s, y in zip(STEPS, curve, strict=False)]
        rows += [(100 * i, report.SPEED, speed) for i, speed in enumerate((900, 900, 50, 70, 60))]
        text = "".join(f"{step},{2 * step},{tag},{value}\n" for step, tag, value in rows)
        (directory / "metrics.csv").write_text("global_step,env_steps,tag,value\n" + text)
        written = {"args": {"action_repeat": 2, "model_size": 5, "learning_starts": 100}}
        written["versions"] = [{"torch": "1"}, {"command": ["bmpc.py"], "torch": "2", "git_commit": "abc"}]
        written["finished"] = {"global_step": 400, "total_timesteps": 400 if done else 100}
        for name, value in written.items():
            (directory / f"{name}.json").write_text(json.dumps(value))
        return self

    def seeds(self, sweep, configuration, *finals, **more):
        """A run for each final return, on a straight line to its three last evaluations."""
        for seed, final in enumerate(finals, 1):
            self.run(sweep, configuration, seed, [0, final / 2, final, final, final], **more)
        return self

    def groups(self, sweep):
        return report.group_runs([report.read_run(line) for line in self.lines])[sweep]

    def answer(self, sweep):
        return [line for group in self.groups(sweep) for line in report.answer(group)]

    def page(self, *arguments):
        command = [sys.executable, ROOT / "sweep_list" / "report.py", *arguments]
        lines = "".join(self.lines)
        done = subprocess.run(command, cwd=self.folder, input=lines, text=True, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def test_measures_of_a_curve_and_intervals_of_means():
    curve = np.array([[0, 0], [100, 10], [400, 40], [500, 20], [600, 30]], dtype=float)
    assert report.final_return(curve) == pytest.approx(30)
    assert report.area_under_curve(curve) == pytest.approx((500 + 7500 + 3000 + 2500) / 600)
    assert report.largest_drop(curve) == 20
    assert report.area_under_curve(curve[:1]) == 0 == report.largest_drop(curve[:1])
    # Student's t is 12.706 for 2 seeds, 4.303 for 3
    assert report.half_width(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    curves = np.array([[1.0, 4.0], [3.0, 4.0]])  # over seeds, evaluation by evaluation
    assert report.half_width(curves) == pytest.approx([12.706, 0], rel=1e-4)


def test_difference_of_two_pairs():
    found = report.difference(np.array([20.0, 24.0]), np.array([10.0, 12.0]))
    assert (found.mean, found.low, found.high) == (11, 8, 14)  # the extreme draws, 1/16 each, lie beyond 2.5 %
    assert found.p == pytest.approx(1 / 3) and str(found) == "+11.0 [+8.0, +14.0]"


@pytest.mark.parametrize("d, seeds", [(0.2, 394), (0.5, 64), (0.8, 26), (1.0, 17), (1.2, 12), (0, math.inf), (99, 2)])
def test_seeds_to_tell(d, seeds):
    """Against Cohen's table 2.4.1 for a two-sided 5 % and power 0.8, in which these d take so many on each side."""
    side = np.array([-1.0, 0.0, 1.0])  # of standard deviation 1
    assert report.seeds_to_tell(10 * side - 10 * d, 10 * side) == report.seeds_to_tell(side + d, side) == seeds


def test_holm():
    assert report.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_metrics_are_read_as_they_stand(tmp_path):
    file = tmp_path / "metrics.csv"
    assert report.read_metrics(file) == {}
    file.write_text("global_step,env_steps,tag,value\n0,0,a,1.5\n10,20,a,2\n10,20,b,nan\n20,40,a,33")  # 337.2 is coming
    metrics = report.read_metrics(file)
    assert metrics["a"].tolist() == [[0, 1.5], [10, 2]] and math.isnan(metrics["b"][0, 1])


def test_not_enough_data(lab):
    lab.seeds("1_test", "baseline", 10, 12).seeds("2a_utd", "utd_ratio_2", 20, 24)
    lab.run("2a_utd", "utd_ratio_4", 1, STEPS, done=False).run("2a_utd", "utd_ratio_4", 2)
    assert lab.answer("2a_utd") == ["**not enough data**: 2 of 4 runs, baseline 2 of 2"]
    assert lab.answer("1_test")[0].startswith("`baseline` ends at 11.0 ± 12.7 with the planner and at 11.0")
    lab.seeds("0__1_test", "baseline", 10).seeds("0__2a_utd", "utd_ratio_2", 20)
    assert lab.answer("0__2a_utd") == ["**not enough data**: one seed gives no interval."]


def test_no_difference_and_the_seeds_that_would_tell_it(lab):
    lab.seeds("1_test", "baseline", 100, 120).seeds("2a_utd", "utd_ratio_2", 110, 130).seeds("2a_utd", "same", 100, 120)
    final, _area, drop = lab.answer("2a_utd")
    assert final == (  # d is 10 over the root of 200
        "**Final return: no difference seen.** Every interval holds 0. "
        "Seeds a side that would tell it: `utd_ratio_2` 33, `same` over 1000."
    )
    assert drop.startswith("**Largest drop: no difference seen.**")


def test_two_seeds_apart_are_undecided(lab):
    lab.seeds("1_test", "baseline", 100, 120).seeds("2a_utd", "utd_ratio_2", 500, 510).seeds("2a_utd", "other", 99, 130)
    text = lab.answer("2a_utd")[0]
    assert text.startswith("**Final return: undecided.** `utd_ratio_2` +395.0 [+380.0, +410.0]: an interval without 0")
    assert "p up to 0.67" in text and text.endswith("that would tell it: `utd_ratio_2` 2, `other` 265.")


def test_four_seeds_apart_differ(lab):
    """2c's on/on has the baseline's numbers; it must not weigh on the correction for the other configurations."""
    lab.seeds("1_test", "baseline", 100, 120, 110, 90).seeds("2c_expert_source", "other", 50, 60, 40, 45)
    lab.seeds("2c_expert_source", report.BASELINE_AGAIN, 100, 120, 110, 90)
    text = lab.answer("2c_expert_source")[0]
    assert text.startswith("**Final return: differs from the baseline.** `other` -56.2 [") and "p at most 0.029" in text
    assert report.BASELINE_AGAIN not in text and "would tell it" not in text


def test_tasks_and_sizes_are_not_mixed(lab):
    for task, size, height in (("dog-run", "", 100), ("walker-walk", "", 900), ("dog-run", "0_small__", 10)):
        lab.seeds(f"{size}1_test", "baseline", height, height + 5, task=task)
        lab.seeds(f"{size}2a_utd", "utd_ratio_2", height + 2, height + 4, task=task)
    final_returns = [lab.answer("2a_utd")[0], lab.answer("2a_utd")[3], lab.answer("0_small__2a_utd")[0]]
    assert all("no difference seen" in line for line in final_returns)


@pytest.mark.parametrize(
    "at_300, words",
    [
        (100, "coincide bit for bit at 5 of 5 evaluations"),
        (99, "**the curves differ**, first at decision 300: 99.0, not 100.0"),
    ],
)
def test_coincidence(lab, at_300, words):
    lab.seeds("1_test", "baseline", 100)
    lab.run("2c_expert_source", report.BASELINE_AGAIN, 1, [0, 50, 100, at_300, 100])
    (line,) = report.coincidence(lab.groups("2c_expert_source")[0])
    assert words in line and "is the baseline once more" in line


def test_the_page_and_what_is_kept(lab):
    """A CSV of returns for each finished run, its command and versions; the page made of them is the runs' own page."""
    lab.seeds("1_test", "baseline", 100, 120).seeds("2a_utd", "utd_ratio_2", 500, 510)
    lab.run("2a_utd", "utd_ratio_4", 1, STEPS, done=False).run("2b_multihead", "std_coef_0", 1)
    lab.page()
    text = (lab.folder / "runs" / "report" / "report.md").read_text()
    sections = dict(re.findall(r"^## Is it better\? \((.*)\)\n\n(.*)$", text, re.M))
    assert [*sections] == ["1_test", "2a_utd", "2b_multihead"] and "4 of 6 runs are done" in text
    assert sections["2a_utd"] == "**not enough data**: 2 of 3 runs, baseline 2 of 2"
    assert re.search(r"`utd_ratio_2` \| 2 of 2 \| 505.0 ± 63.5 \| \+395.0 \[\+380.0, \+410.0\] .* 60.0 ± 0.0 \|", text)

    folder = lab.folder / "results"
    lab.page("--export", folder)
    assert len(list(folder.glob("*.csv"))) == 4 and "4 of 4 runs are done" in (folder / "report.md").read_text()
    assert (folder / "dog-run__bmpc__2__2a_utd__utd_ratio_2.csv").read_text() == (
        "global_step,env_steps,planner_return,policy_return\n"
        "0,0,0,0\n100,200,255,255\n200,400,510,510\n300,600,510,510\n400,800,510,510\n"
    )
    about = json.loads((folder / "runs.json").read_text())["dog-run__bmpc__2__2a_utd__utd_ratio_2"]
    assert about["command"] == "python bmpc.py --x 2" and about["versions"] == {"torch": "2", "git_commit": "abc"}
    assert str(lab.folder) not in (folder / "runs.json").read_text()
    first = {file: file.read_bytes() for file in folder.rglob("*.*")}
    shutil.rmtree(folder / "figures")
    for directory in (lab.folder / "runs").glob("*utd_ratio*"):
        shutil.rmtree(directory)
    lab.page("--export", folder)  # what is kept of runs that are gone stays
    shutil.rmtree(lab.folder / "runs")
    (folder / "report.md").unlink()
    lab.page("--replot", folder)
    assert {file: file.read_bytes() for file in folder.rglob("*.*")} == first
