"""The sweeps' report: its numbers are the runs' numbers, its statistics are the textbook's, its words claim no more.

And results/: the kept curves are those of the commands beside them, both READMEs' figures are computed from them.
"""

import contextlib
import csv
import dataclasses
import errno
import functools
import importlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from test_sweeps import Lab, environment, parse

import bmpc

sys.path.append(str(ROOT / "sweep_list"))
comparison, figures, report, run_files = map(importlib.import_module, ("comparison", "figures", "report", "run_files"))
PRIMARY, PLANNER, POLICY = comparison.PRIMARY, run_files.PLANNER, run_files.POLICY
STEPS = [0, 100, 200, 300, 400]
HEADER = "global_step,env_steps,tag,value\n"


class Runs:
    """Runs as the scripts leave them, in a directory of their own."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []

    def run(
        self,
        sweep,
        configuration,
        seed,
        curve=(),
        done=True,
        task="dog-run",
        steps=STEPS,
        length=400,
        tags=None,
        **args,
    ):
        """`length`: decisions; `tags`: further tags of the log and their values; `args`: more entries of args.json."""
        directory = self.folder / "runs" / f"{task}__bmpc__{seed}__{sweep}__{configuration}"
        baseline, command = re.sub(r"2[a-h]_\w+$", "1_test", sweep), f"/bin/python {ROOT}/bmpc.py --x 2"
        fields = [directory, length, sweep, baseline, configuration, seed, "Is it better?", command]
        self.lines.append("\t".join(map(str, fields)) + "\n")
        if not len(curve):
            return directory
        directory.mkdir(parents=True)
        curves = {PLANNER: curve, POLICY: curve, run_files.SPEED: (900, 900, 50, 70, 60)} | (tags or {})
        rows = [f"{s},{2 * s},{tag},{y}\n" for tag, values in curves.items() for s, y in zip(steps, values)]
        (directory / "metrics.csv").write_text("".join([HEADER, *rows]))
        written = {"args": {"action_repeat": 2, "model_size": 1, "learning_starts": 100, "num_envs": 4} | args}
        written["versions"] = [{"torch": "1"}, {"command": ["bmpc.py"], "torch": "2", "git_commit": "abc"}]
        written["finished"] = {"global_step": length, "total_timesteps": length if done else length // 4}
        for name, value in written.items():
            (directory / f"{name}.json").write_text(json.dumps(value))
        return directory

    def seeds(self, sweep, configuration, *finals, **more):
        """A run for each final return, on a straight line to its three last evaluations."""
        for seed, final in enumerate(finals, 1):
            self.run(sweep, configuration, seed, [0, final / 2, final, final, final], **more)
        return self

    def read(self):
        return [run_files.read_run(line) for line in self.lines]

    def groups(self, sweep):
        return comparison.group_runs(self.read())[sweep]

    def answer(self, sweep):
        return [line for group in self.groups(sweep) for line in report.answer(group)]

    def page(self, *arguments, **environ):
        """Call report.py, in a process of its own if environment variables are given."""
        if environ:
            command = [sys.executable, ROOT / "sweep_list" / "report.py", *arguments]
            given = dict(capture_output=True, timeout=120, env=environment(**environ))
            return subprocess.run(command, cwd=self.folder, input="".join(self.lines).encode(), **given)
        out, err = io.StringIO(), io.StringIO()
        words = ["report.py", *map(str, arguments)]
        streams = mock.patch.multiple(sys, argv=words, stdin=io.StringIO("".join(self.lines)), stdout=out, stderr=err)
        with contextlib.chdir(self.folder), streams:
            try:
                code = report.main()
            except SystemExit as e:  # a message
                code = 1
                err.write(f"{e}\n")
        return subprocess.CompletedProcess(words, code, out.getvalue().encode(), err.getvalue().encode())


@pytest.fixture
def lab(tmp_path):
    return Runs(tmp_path)


# --- Statistics


def test_measures_of_a_curve_and_intervals_of_means():
    curve = np.array([[0, 5], [100, 10], [400, 40], [500, 20], [600, 30]], dtype=float)
    area = (750 + 7500 + 3000 + 2500) / 600
    assert comparison.final_return(curve) == pytest.approx(30)
    assert comparison.area_under_curve(curve) == pytest.approx(area)
    assert comparison.learned(curve) == pytest.approx(area - 5)
    assert comparison.area_under_curve(curve[:1]) == 5
    # Student's t is 12.706 for two seeds, 4.303 for three
    spreads = [report.spread(np.array(x)) for x in ([], [1], [1, 3], [10, 20, 30])]
    assert spreads == ["-", "1.0", "2.0 ± 12.7", "20.0 ± 24.8"]


def test_welch_by_hand():
    """Means 6 and 3, squared standard errors 4/3 and 10/4: t = 3 / sqrt(23/6), Welch-Satterthwaite's degrees."""
    own, base = np.array([4.0, 6, 8]), np.array([0.0, 2, 3, 7])
    a, b = own.var(ddof=1) / 3, base.var(ddof=1) / 4
    error, degrees = math.sqrt(a + b), (a + b) ** 2 / (a**2 / 2 + b**2 / 3)
    assert a == pytest.approx(4 / 3)
    one = comparison.welch(own, base)
    half = scipy.stats.t.ppf(0.975, degrees) * error
    assert one.interval == pytest.approx((3, 3 - half, 3 + half))
    assert one.p == pytest.approx(2 * scipy.stats.t.sf(3 / error, degrees))


def test_seeds_without_spread():
    zeros, tens = np.zeros(3), np.full(3, 10.0)
    same = comparison.welch(zeros, zeros)
    assert (str(same), same.p, same.verdict, same.of_area) == ("+0.0 [+0.0, +0.0]", 1, "not resolved", "-")
    assert (str(comparison.welch(tens, zeros)), comparison.welch(tens, zeros).p) == ("+10.0 [+10.0, +10.0]", 0)
    comparison.add_simultaneous_intervals([same])
    assert math.isnan(same.simultaneous[0])


def test_holm_by_hand():
    assert comparison.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert comparison.holm([0.9, 0.8]) == [1, 1] and comparison.holm([]) == []


def test_the_simultaneous_interval_of_one_configuration_is_student_s():
    """Dunnett's for a single comparison is the pooled t-interval; for more it is wider."""
    rng = np.random.default_rng(0)
    base, *samples = (rng.normal(size=n) for n in (12, 6, 6, 6))
    (lone, *others) = (comparison.welch(sample, base) for sample in samples)
    comparison.add_simultaneous_intervals([lone])
    student = scipy.stats.ttest_ind(lone.values, base).confidence_interval(0.95)
    assert lone.simultaneous == pytest.approx((student.low, student.high), abs=0.01)
    width = np.ptp(lone.simultaneous)
    comparison.add_simultaneous_intervals([lone, *others])
    assert np.ptp(lone.simultaneous) > 1.1 * width


@pytest.mark.parametrize(
    "p, simultaneous, verdict",
    [
        (0.051, (1, 9), "not resolved"),
        (0.05, (-1, 9), "depends on the test"),
        (0.05, (1, 9), "better"),
        (math.nan, (1, 9), "not resolved"),
        (0.01, (math.nan, math.nan), "better"),
    ],
)
def test_the_words(p, simultaneous, verdict):
    one = comparison.Difference(np.array([4.0, 6]), np.array([0.0, 2]), 1, 7, p, simultaneous=simultaneous)
    assert one.verdict == verdict
    low, high = simultaneous
    mirrored = comparison.Difference(one.base, one.values, -7, -1, p, simultaneous=(-high, -low))
    assert mirrored.verdict == verdict.replace("better", "worse")


def test_a_difference_in_percent_of_the_area_and_of_what_is_learned():
    one = comparison.Difference(np.array([110.0, 130]), np.array([90.0, 110]), 5, 35, 0.01, base_learned=40)
    assert (one.of_area, one.of_learned) == ("+20.0 [+5.0, +35.0]", "+50.0 [+12.5, +87.5]")
    assert dataclasses.replace(one, base_learned=-1).of_learned == "-"


def test_interquartile_mean_and_probability_of_improvement_by_hand():
    """Of eight scores the middle four count; of a task's pairs of seeds those that the configuration wins."""
    own, base = [np.array([1.0, 2, 3]), np.array([4.0, 5, 6, 20, 80])], [np.array([0.0, 2]), np.array([5.0])]
    assert comparison.interquartile_mean(own) == pytest.approx((3 + 4 + 5 + 6) / 4)
    first, second = (1 + 1.5 + 2) / 6, (0 + 0.5 + 1 + 1 + 1) / 5
    assert comparison.probability_of_improvement(own, base) == pytest.approx((first + second) / 2)
    assert comparison.probability_of_improvement(base, own) == pytest.approx(1 - (first + second) / 2)


def test_the_bootstrap_resamples_seeds_within_their_task():
    """Between tasks nothing varies: where seeds agree the interval has no width, however far apart the tasks are."""
    apart = [np.full(4, 0.1), np.full(4, 0.9)]
    assert comparison.stratified_bootstrap(comparison.interquartile_mean, apart) == pytest.approx((0.5, 0.5))
    normal = [np.random.default_rng(0).normal(size=200)]
    low, high = comparison.stratified_bootstrap(lambda scores: scores[0].mean(), normal)
    assert (high - low) / 2 == pytest.approx(1.96 * normal[0].std() / math.sqrt(200), rel=0.1)


# --- Comparisons and answers


def test_not_enough_data(lab):
    lab.seeds("1_test", "baseline", 10, 12).seeds("2a_utd", "utd_ratio_2", 20, 24)
    lab.run("2a_utd", "utd_ratio_4", 1, STEPS, done=False), lab.run("2a_utd", "utd_ratio_4", 2)
    assert lab.answer("2a_utd") == ["**not enough data**: 2 of 4 runs, baseline 2 of 2"]
    assert lab.answer("1_test")[0].startswith("`baseline` ends at 11.0 ± 12.7 with the planner and at 11.0")
    lab.seeds("0__1_test", "baseline", 10).seeds("0__2a_utd", "utd_ratio_2", 20)
    assert lab.answer("0__2a_utd") == [
        "**not enough data**: an interval needs two seeds a side with values on this axis."
    ]


def test_answers_are_corrected_for_every_configuration_of_the_report(lab):
    """A p of 0.0264 resolves a difference alone, not beside another configuration, wherever it is in the report."""
    base = np.array([100, 120, 110, 90, 105, 95])
    lab.seeds("1_test", "baseline", *base).seeds("2a_utd", "utd_ratio_2", *base + 16)
    (group,) = lab.groups("2a_utd")
    alone = group.differences[PRIMARY]["utd_ratio_2"].p
    assert 0.025 < alone < 0.05 and lab.answer("2a_utd")[0].startswith("- `utd_ratio_2`: **better**, +12.0 [")
    lab.seeds("2d_num_rollouts", "num_rollouts_4", *base - 1)
    (group,) = lab.groups("2a_utd")
    assert [found["utd_ratio_2"].p for found in group.differences.values()] == pytest.approx([2 * alone] * 3)
    assert lab.answer("2a_utd")[0].startswith("- `utd_ratio_2`: **not resolved**, +12.0 [")


def test_a_row_for_each_question(lab):
    """All words, and the highest estimate with its interval in % of the baseline's area, three quarters of 100."""
    base = np.arange(95.0, 106)
    lab.seeds("1_test", "baseline", *base)
    for name, far in (("a", 40), ("b", -40), ("c", 0), ("d", -50), ("e", 50)):
        lab.seeds("2a_utd", name, *base + far)
    lab.seeds("2d_num_rollouts", "f", *base, 100)
    lab.seeds("2e_imagine_source", "g", 1, 2), lab.run("2e_imagine_source", "g", 3)
    groups = [group for sweep in ("2a_utd", "2d_num_rollouts", "2e_imagine_source") for group in lab.groups(sweep)]
    first, second, third = report.summary(groups).splitlines()[2:]
    words = "better: `a`, `e`; worse: `b`, `d`; not resolved: the others"
    assert re.match(
        rf"\| Is it better\? \(dog-run\) \| {words} \| `e` \| \+50.0 \[\+4[67]\.\d, \+5[23]\.\d\] \|", first
    )
    assert first.endswith(" | 11, baseline 11 |") and first.count("+50.0 [") == 2  # all of its area is learned
    assert re.search(r"\| not resolved \| `f` \| \+0.0 \[-[23]\.\d, \+[23]\.\d\] \|.*\| 12, baseline 11 \|", second)
    assert third.split(" | ")[1:3] == ["**not enough data**: 2 of 3 runs, baseline 11 of 11", "`g`"]


def test_tasks_and_sizes_are_not_mixed(lab):
    """On a straight line to its three last evaluations a curve has three quarters of their height as its area."""
    for task, size, height in (("dog-run", "", 100), ("walker-walk", "", 900), ("dog-run", "0_small__", 10)):
        lab.seeds(f"{size}1_test", "baseline", height, height + 5, height, height + 5, task=task)
        lab.seeds(f"{size}2a_utd", "utd_ratio_2", *[0] * 3, height, task=task)
    lines = lab.answer("2a_utd") + lab.answer("0_small__2a_utd")
    assert [re.search(r"[+-]\d+\.\d", line)[0] for line in lines] == ["-58.1", "-508.1", "-7.5"]


def test_a_sweep_may_contain_its_baseline_and_compare_scripts_on_several_tasks(lab):
    """Scores are divided by 1 000; where one configuration wins each pair of seeds its probability is 1."""
    for task, height in (("dog-run", 400), ("walker-walk", 800)):
        lab.seeds("0_scripts", "baseline", height, height + 8, task=task)
        lab.seeds("0_scripts", "tdmpc2", height / 2, height / 2 + 8, task=task)
    lab.seeds("0_scripts", "baseline", -1, -2, task="Pendulum-v1").seeds(
        "0_scripts", "tdmpc2", -3, -4, task="Pendulum-v1"
    )
    groups = lab.groups("0_scripts")
    assert [list(group.configurations) for group in groups] == [["tdmpc2"]] * 3
    (lab.folder / "figures").mkdir()
    page = report.page(lab.read(), lab.folder)
    assert page.count("IQM: interquartile") == page.count("corrected by Holm") == 1
    _, table = report.over_tasks(groups)
    assert "| `tdmpc2` | 2 | 0.228 [0.22" in table and "| 0.453 [0.45" in table and "| 0.000 [0.000, 0.000] |" in table
    assert report.over_tasks(groups[:1]) == []
    lab.run("0_scripts", "tdmpc2", 3, task="walker-walk")  # an unfinished task is left out
    assert report.over_tasks(lab.groups("0_scripts")) == []


def test_of_a_named_sweep_the_configuration_baseline_is_the_baseline(lab, monkeypatch):
    """While the named sweep is unfinished, the forest plot gives no answer."""
    lab.seeds("1_test", "baseline", 100, 108).seeds("1_test", "tdmpc2", 20, 28)
    lab.seeds("2h_dual_policy", "dual_policy", 500, 508)
    (group,) = lab.groups("2h_dual_policy")
    assert [run.configuration for run in group.baseline] == ["baseline"] * 2 and group.done
    assert re.match(r"- `dual_policy`: \*\*better\*\*, \+300.0 ", *lab.answer("2h_dual_policy"))
    lab.run("1_test", "baseline", 3)
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0].texts[-1]))
    figures.draw_forest(lab.groups("2h_dual_policy"), lab.folder)
    lab.lines.pop()
    figures.draw_forest(lab.groups("2h_dual_policy"), lab.folder)
    assert [text.get_text().split()[-1] for text in drawn] == ["unfinished", "better"]


def test_the_repeated_baseline_is_a_check_and_no_comparison(lab):
    again = comparison.REPEATED_BASELINE
    lab.seeds("1_test", "baseline", 100, 110).seeds("2c_expert_source", again, 100, 110)
    lab.seeds("2c_expert_source", "other", 100, 110)
    (group,) = lab.groups("2c_expert_source")
    assert list(group.differences[PRIMARY]) == list(group.configurations) == ["other"]
    (line,) = report.repetition_check(group)
    assert again not in report.table(group) and line.endswith("seeds 1, 2 are equal to the baseline's bit for bit.")
    lab.seeds("0__1_test", "baseline", 100), lab.run("0__2c_expert_source", again, 1, [0, 50, 100, 99, 100])
    (line,) = report.repetition_check(lab.groups("0__2c_expert_source")[0])
    assert line.endswith("**The curves of seeds 1 differ, as expected only on a GPU, or between machines or commits.**")
    lab.seeds("9__1_test", "baseline", 100), lab.run("9__2c_expert_source", again, 1, [0, 50], done=False)
    assert report.repetition_check(lab.groups("9__2c_expert_source")[0]) == []


def test_speeds_of_the_same_hour_alone_are_compared(lab):
    lab.seeds("1_test", "baseline", 1, 2).seeds("2a_utd", "utd_ratio_4", 1, 2)
    first, second, third, fourth = runs = lab.read()
    for run, hour, speed in zip(runs, (10, 15, 10, 20), (100, 50, 30, 10)):
        run.versions["time"] = f"2026-01-01T{hour}:30:00+0000"
        run.metrics[run_files.SPEED] = np.array([[200, speed]])
    assert comparison.relative_speed([third, fourth], [first, second]) == ", roughly × 0.3 (1 of the same hour)"
    assert comparison.relative_speed([fourth], [first, second]) == ""


# --- Axes


def test_updates_without_a_log_of_them_are_those_the_scripts_make():
    settings = dict(learning_starts=10, num_envs=4, utd_ratio=0.29)
    args = dataclasses.replace(bmpc.Args(), **settings)
    command = "python bmpc.py --learning-starts 10 --num-envs=4 --utd_ratio 0.29"
    for given, line in ((settings, "python bmpc.py"), ({}, command)):
        run = run_files.Run(None, 400, "", "", "", 1, "", line, given, {}, True, "", {})
        made = [bmpc.updates_due(args, step) + 10 * (step >= 10) for step in range(0, 400, 4)]
        assert comparison.derived_updates(run, np.arange(0, 400, 4)).tolist() == made
    run = dataclasses.replace(run, command="python bmpc.py")
    assert comparison.derived_updates(run, np.array([2496, 2500, 2600])).tolist() == [0, 2500, 2600]


@pytest.mark.parametrize("axis, tag", [("updates", "charts/updates"), ("seconds", "charts/training_seconds")])
def test_an_axis_ends_at_the_largest_value_that_all_reach(lab, axis, tag):
    """One of each pair makes twice as many updates a decision: half of its curve counts."""
    for seed in (1, 2):
        lab.run("1_test", "baseline", seed, [0, 10, 20, 30, 40], tags={tag: [0, 1000, 2000, 3000, 4000]})
        lab.run("2a_utd", "utd_ratio_2", seed, [0, 10, 20, 30, 40], tags={tag: [0, 2000, 4000, 6000, 8000]})
    lab.run("2a_utd", "utd_ratio_4", 1, [0, 10], done=False, tags={tag: [0, 100]})  # limits nothing
    lab.run("2a_utd", "utd_ratio_4", 2)  # not started
    runs, notes = comparison.over_axis(lab.read(), axis)
    assert notes[0] == f"1_test, dog-run: compared from 0 to 4,000 {axis}."
    curves = {run.configuration: run.curve().tolist() for run in runs}
    grid = [0, 1000, 2000, 3000, 4000]
    assert curves["baseline"] == [[x, x / 100] for x in grid] and curves["utd_ratio_2"] == [[x, x / 200] for x in grid]
    groups = comparison.group_runs(runs)["2a_utd"]
    assert groups[0].differences[PRIMARY]["utd_ratio_2"].estimate == pytest.approx(-10)
    decisions, notes = comparison.over_axis(lab.read(), "decisions")
    assert notes == [] and [run.curve().tolist() for run in decisions] == [run.curve().tolist() for run in lab.read()]


def test_a_single_evaluation_is_compared_on_every_axis(lab):
    for seed in (1, 2):
        for sweep in ("1_test", "2a_utd"):
            lab.run(sweep, "baseline", seed, [seed], tags={"charts/updates": [700]})
    runs, _ = comparison.over_axis(lab.read(), "updates")
    assert comparison.group_runs(runs)["2a_utd"][0].differences[PRIMARY]["baseline"].estimate == 0


def test_runs_without_a_common_range_are_not_compared(lab):
    for seed in (1, 2):
        seconds = {"1_test": [10, 20, 30, 40, 50], "2a_utd": [60, 70, 80, 90, 100]}
        for sweep, values in seconds.items():
            lab.run(sweep, "baseline", seed, [0, 1, 2, 3, seed], tags={"charts/training_seconds": values})
    runs, notes = comparison.over_axis(lab.read(), "seconds")
    assert notes[0] == "**1_test and what is compared with it, dog-run: the runs have no range of seconds in common.**"
    assert comparison.group_runs(runs)["2a_utd"][0].differences[PRIMARY] == {}


def test_a_curve_is_the_mean_of_finished_seeds(lab):
    """Those that are under way are thin lines; a run that has only begun does not shorten the mean."""
    lab.seeds("1_test", "baseline", 100, 120)
    lab.run("1_test", "baseline", 3, [0, 500], done=False)
    panel = matplotlib.figure.Figure().subplots()
    figures.draw_panel(panel, *lab.groups("1_test"), "baseline", "decisions")
    lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert lines["planner"] == [[0, 0], [100, 55], [200, 110], [300, 110], [400, 110]]
    assert [[0, 0], [100, 500]] in lines.values()


def test_longer_runs_are_cut_where_the_others_end(lab):
    for seed in (1, 2):
        lab.run("1_test", "baseline", seed, [0, 10, 20, 30, 40], steps=[0, 200, 400, 600, 800], length=800)
        lab.run("2a_utd", "short", seed, [0, 10, 20, 30, 40], steps=[0, 100, 200, 300, 500], length=500)
    runs, (note,) = comparison.over_axis(lab.read(), "decisions")
    assert note == "1_test, dog-run: compared from 0 to 500 decisions."
    assert runs[0].curve().tolist() == [[0, 0], [200, 10], [400, 20], [500, 25]] and len(runs[1].curve()) == 5


def test_seconds_that_no_log_has_are_said(lab):
    lab.seeds("1_test", "baseline", 10, 12).seeds("2a_utd", "utd_ratio_2", 20, 24)
    done = lab.page("--axis", "seconds")
    text = (lab.folder / "runs/report/report_seconds.md").read_text()
    assert done.returncode == 0 and "**4 finished runs are left out: their log has no `charts/training_seconds`" in text


# --- Published curves


def test_published_curves_stand_beside_full_size_runs_alone(lab):
    """At 2 x 100 000 env steps; between published points, and up to the last of them."""
    full = {"model_size": 5, "preset": "full", "length": 100_000}
    steps = [0, 25_000, 50_000, 75_000, 100_000]
    lab.seeds("1_test", "baseline", 200, 210, steps=steps, **full)
    _, table = report.beside_published(*lab.groups("1_test"))
    head, _, row = table.splitlines()
    assert head == "| configuration | env steps | here | BMPC | TD-MPC2 | SAC | DreamerV3 |"
    assert row == "| `baseline` | 200,000 | 205.0 ± 63.5 | 175 [152, 198] | 102 [71, 132] | 9 [6, 11] | 7 [6, 8] |"
    groups = lab.groups("1_test")
    panel = matplotlib.figure.Figure().subplots()
    figures.draw_panel(panel, groups[0], "baseline", "decisions")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert drawn["BMPC, published"] == [[0, 4.9], [50_000, 35.1], [100_000, 174.9]]
    for name, small in (("a", {"model_size": 1}), ("b", full | {"preset": "small"}), ("c", full | {"enc_dim": 64})):
        lab.seeds(f"0{name}__1_test", "baseline", 200, 210, steps=steps, **small)
        groups = lab.groups(f"0{name}__1_test")
        panel = matplotlib.figure.Figure().subplots()
        figures.draw_panel(panel, groups[0], "baseline", "decisions")
        assert report.beside_published(*groups) == [] and "BMPC, published" not in [x.get_label() for x in panel.lines]


def test_published_csv_is_whole_and_spelled_as_run_directories_are():
    rows = list(csv.DictReader(run_files.PUBLISHED.read_text(encoding="utf-8").splitlines()))
    counts = {row["algorithm"]: sum(r["algorithm"] == row["algorithm"] for r in rows) for row in rows}
    assert counts == dict.fromkeys(["BMPC", "TD-MPC2", "SAC", "DreamerV3"], 28 * 11)
    for task in {row["task"] for row in rows}:
        name = bmpc.resolve_env_id(task.replace("ball_in_cup", "cup").replace("_", "-"))
        assert name == f"dm_control/{task}-v0"
    assert all(float(row["low"]) <= float(row["mean"]) <= float(row["high"]) for row in rows)
    assert run_files.published_curves("dog-run")["BMPC"][4].tolist() == [400_000, 337.4, 304.2, 370.7]


# --- Files: encodings, damage, locks, export


def test_metrics_are_read_as_they_stand(tmp_path):
    file = tmp_path / "metrics.csv"
    assert run_files.read_metrics(file, False) == {}
    file.write_text(HEADER + "0,0,a,1.5\n10,20,a,2\n10,20,b,nan\n20,40,a,33")  # 337.2 is being written
    metrics = run_files.read_metrics(file, False)
    assert metrics["a"].tolist() == [[0, 1.5], [10, 2]] and math.isnan(metrics["b"][0, 1])


@pytest.mark.parametrize(
    "name, content",
    [
        ("metrics.csv", HEADER.encode() + b"0,0,a,1\n" + b"\0" * 30 + b"\n10,20,a,2\n"),
        ("metrics.csv", HEADER.encode() + b"0,0,a,1\n10,20\n20,40,a,2\n"),
        ("metrics.csv", HEADER.encode() + b"0,0,\0\0,1\n"),
        ("metrics.csv", HEADER.encode() + b"0,0,a,1\n10,20,a,"),
        ("metrics.csv", b"\xff\xfe"),
        ("versions.json", b""),
        ("args.json", b'{"action_repeat": 2, "mod'),
        ("args.json", b"[]"),
        ("finished.json", b"\0\0"),
    ],
)
def test_a_damaged_run_is_told_with_its_path_and_the_others_go_on(lab, capsys, name, content):
    folder = lab.run("1_test", "baseline", 1, STEPS)
    lab.run("1_test", "baseline", 2, STEPS), lab.run("1_test", "baseline", 3)
    (folder / name).write_bytes(content)
    runs = lab.read()
    assert report.print_status(runs) == 1
    table = capsys.readouterr().out.splitlines()
    assert re.match(r"damaged .*" + re.escape(f"  {folder / name}: "), table[1]) and table[2].startswith("done ")
    assert table[-1] == "3 runs: 1 done, 0 running, 0 failed, 1 waiting, 1 damaged"
    report.print_due(runs, lab.lines)
    due = capsys.readouterr()
    assert due.out == "".join(lab.lines[2:] if name != "finished.json" else [lab.lines[0], lab.lines[2]])
    assert f": {folder / name}: " in due.err and "1 of 3 runs are done" in due.err
    (lab.folder / "figures").mkdir()
    page = report.page(runs, lab.folder)
    assert f"- damaged, not counted as done: {folder / name}: " in page and "1 of 3 runs are done" in page
    assert "| `baseline` | 1 of 3 |" in page
    run_files.export_runs(runs, lab.folder / "kept")
    assert [run.seed for run in run_files.load_exported(lab.folder / "kept") if run.done] == [2]


def test_a_finished_run_without_its_log_is_damaged(lab):
    folder = lab.run("1_test", "baseline", 1, STEPS)
    (folder / "metrics.csv").unlink()
    (run,) = lab.read()
    assert run.damage == f"{folder / 'metrics.csv'}: missing"


def test_a_run_that_was_continued_beyond_its_steps_is_done(lab):
    """finished.json is gone while it is continued, and after it was stopped."""
    for seed, steps in enumerate((STEPS, [0, 200, 400, 403, 404]), 1):
        (lab.run("1_test", "baseline", seed, STEPS, steps=steps) / "finished.json").unlink()
    assert [run.done for run in lab.read()] == [False, True]  # 4 environments: a run of 400 ends below 404


@pytest.mark.parametrize("code", [errno.EACCES, errno.EAGAIN, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_only_a_held_lock_means_running(lab, monkeypatch, capsys, code):
    folder = lab.run("1_test", "baseline", 1, STEPS, done=False)
    (folder / "lock").touch()
    (run,) = lab.read()
    assert report.state_of(run) == "waiting"
    monkeypatch.setattr(os, "lockf", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    held = code in (errno.EACCES, errno.EAGAIN)
    assert report.state_of(run) == ("running" if held else "waiting")
    assert (os.strerror(code) in capsys.readouterr().err) != held


def test_everything_is_utf_8_whatever_the_locale(lab):
    environ = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    folder = lab.run("1_test", "baseline", 1, STEPS, task="Tänzer-v0")
    lab.lines = [line.replace("better?", "besser für uns?") for line in lab.lines]
    (lab.folder / "runs" / "logs").mkdir()
    status = lab.page("--status", **environ)
    assert status.returncode == 0 and folder.name in status.stdout.decode()
    assert lab.page("--due", **environ).stdout == b""
    assert lab.page("--export", "kept", **environ).returncode == 0
    text = (lab.folder / "kept" / "report.md").read_text(encoding="utf-8")
    assert "## Is it besser für uns? (1_test)" in text and "±" in text
    assert "Tänzer-v0" in text and "\u00c3" not in text and (lab.folder / "kept" / f"{folder.name}.csv").exists()


def test_the_page_and_what_is_exported(lab):
    """A CSV of returns for each finished run, its command and versions, and the page made of them."""
    updates = {"charts/updates": [0, 100, 200, 300, 1_234_567], "charts/training_seconds": [0, 1.5, 3, 4.5, 6.25]}
    lab.seeds("1_test", "baseline", 100, 120).seeds("2a_utd", "utd_ratio_2", 500, 510, tags=updates)
    lab.run("2a_utd", "utd_ratio_4", 1, STEPS, done=False), lab.run("2b_multihead", "std_coef_0", 1)
    assert lab.page().returncode == 0
    text = (lab.folder / "runs" / "report" / "report.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## Is it better\? \((.*)\)\n\n(.*)$", text, re.M))
    assert [*sections] == ["1_test", "2a_utd", "2b_multihead"] and "4 of 6 runs are done" in text
    assert sections["2a_utd"] == "**not enough data**: 2 of 3 runs, baseline 2 of 2"
    assert re.search(
        r"\| `utd_ratio_2` \| 2 of 2 \| 378.8 ± 47.6; \+296.2 \[\+2\d\d\.\d, \+\d+\.\d\], p 0.00\d+ \|", text
    )
    assert text.count("60.0 ± 0.0 |") == 4 and "![Forest plot](figures/forest.png)" in text

    folder = lab.folder / "results"
    lab.page("--export", folder)
    kept = (folder / "report.md").read_text("utf-8")
    assert len(list(folder.glob("*.csv"))) == 4 and "4 of 6 runs are done" in kept
    for unfinished in (sections["2a_utd"], "**not enough data**: 0 of 1 runs, baseline 2 of 2"):
        assert f"\n\n{unfinished}\n\n" in kept  # what is missing is not forgotten
    assert (folder / "dog-run__bmpc__1__1_test__baseline.csv").read_text() == (
        "global_step,env_steps,planner_return,policy_return,updates,training_seconds\n"
        "0,0,0,0,,\n100,200,50,50,,\n200,400,100,100,,\n300,600,100,100,,\n400,800,100,100,,\n"
    )
    assert (folder / "dog-run__bmpc__2__2a_utd__utd_ratio_2.csv").read_text() == (
        "global_step,env_steps,planner_return,policy_return,updates,training_seconds\n"
        "0,0,0,0,0,0\n100,200,255,255,100,1.5\n200,400,510,510,200,3\n300,600,510,510,300,4.5\n"
        "400,800,510,510,1234567,6.25\n"
    )
    about = json.loads((folder / "runs.json").read_text())["dog-run__bmpc__2__2a_utd__utd_ratio_2"]
    assert about["command"] == "python bmpc.py --x 2" and about["versions"] == {"torch": "2", "git_commit": "abc"}
    assert {file.stem for file in folder.glob("figures/*")} == {"forest", "1_test", "2a_utd"}
    first = {file: file.read_bytes() for file in folder.rglob("*.*")}
    shutil.rmtree(folder / "figures")
    for directory in (lab.folder / "runs").glob("*utd_ratio*"):
        shutil.rmtree(directory)
    lab.page("--export", folder)  # what is kept of runs that are gone stays
    assert {file: file.read_bytes() for file in folder.rglob("*.*")} == first
    (folder / "report.md").unlink()
    lab.page("--replot", folder)
    assert {file: file.read_bytes() for file in folder.rglob("*.*")} == first
    lab.lines = [line.replace("--x 2", "--x 3") for line in lab.lines]
    refused = lab.page("--export", folder)  # of runs that are gone, so unfinished with this command
    assert (
        refused.returncode == 1 and b"a finished run of another command, python bmpc.py --x 2; export" in refused.stderr
    )
    assert {file: file.read_bytes() for file in folder.rglob("*.*")} == first
    shutil.rmtree(lab.folder / "runs")
    lab.lines.clear()
    lab.seeds("2a_utd", "utd_ratio_2", 1, 2)
    lab.lines = [line.replace("--x 2", "--x 3") for line in lab.lines]
    refused = lab.page("--export", folder)  # of runs that would overwrite those that are kept
    assert refused.returncode == 1 and b"a finished run of another command" in refused.stderr
    assert {file: file.read_bytes() for file in folder.rglob("*.*")} == first
    (folder / "runs.json").write_text("")
    refused = lab.page("--export", folder)
    assert refused.returncode == 1 and b"runs.json: Expecting value" in refused.stderr
    refused = lab.page("--replot", lab.folder / "elsewhere")
    assert refused.returncode == 1 and refused.stderr.count(b"\n") == 1
    assert b"elsewhere is no complete folder of exported runs: " in refused.stderr


def test_the_origin_of_a_run_that_was_resumed():
    """Time of the first start, commits of all, versions of the last."""
    starts = [{"time": "1", "torch": "1", "git_commit": c} for c in ("a", "a", None)]
    starts.append({"time": "2", "torch": "2", "git_commit": "b"})
    assert run_files.merge_starts(starts) == {"time": "1", "torch": "2", "git_commit": "a, b"}
    assert run_files.merge_starts([]) == run_files.merge_starts([None, "a"]) == {}


# --- results/

README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = sorted(path.parent for path in (ROOT / "results").glob("*/runs.json"))
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@each_folder
def test_kept_runs_are_whole_and_the_sweep_still_says_their_commands(folder):
    """The command names the run and its length; the curve ends there and is evenly spaced."""
    meaning = lambda command: dataclasses.replace(parse(command), preset="full")  # however it is spelled
    said = set(map(meaning, Lab().dry_run(f"0_{folder.name}")))
    for name, about in json.loads((folder / "runs.json").read_text()).items():
        args = meaning(about["command"])
        assert args in said and name == f"{args.env_id}__{args.exp_name}__{args.seed}__{args.run_name}"
        assert args.seed == about["seed"] and args.total_timesteps == about["steps"], name
        if not about.get("finished", True):
            assert not (folder / f"{name}.csv").exists(), name
            continue
        assert {"git_commit", "torch", "mujoco", "dm_control"} <= set(about["versions"]), name
        rows = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
        steps = [int(row["global_step"]) for row in rows]
        assert steps == list(range(steps[0], args.total_timesteps + 1, args.eval_freq)), name
        assert steps[0] in (0, args.eval_freq) and [int(row["env_steps"]) for row in rows] == [2 * s for s in steps]
        assert np.isfinite([[float(row["planner_return"]), float(row["policy_return"])] for row in rows]).all(), name


@each_folder
def test_replotted_from_the_csvs_alone_it_is_the_same(folder, tmp_path):
    """The same text, and the same pixels where the same matplotlib draws them."""
    (tmp_path / "figures").mkdir()
    runs = run_files.load_exported(folder)
    assert report.page(runs, tmp_path) == (folder / "report.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.glob("*.csv")} == {f"{run.name}.csv" for run in runs if run.done}
    is_over_decisions = lambda path: not path.name.startswith(("updates_", "seconds_"))  # README offers these axes, too
    figures = {path.name for path in (folder / "figures").iterdir() if is_over_decisions(path)}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == figures
    for name in figures:
        kept, drawn = folder / "figures" / name, tmp_path / "figures" / name
        if f"Matplotlib version{matplotlib.__version__},".encode() in kept.read_bytes():
            assert np.array_equal(*map(matplotlib.image.imread, (kept, drawn))), name


@functools.cache
def exported(name):
    return run_files.load_exported(ROOT / "results" / name)


def test_a_page_explains_only_what_it_uses():
    explained = lambda folder: (
        (ROOT / "results" / folder / "report.md").read_text(encoding="utf-8").split("## How to")[1]
    )
    assert "Holm" not in explained("baseline")
    assert "Holm" in explained("ablations") and "IQM" not in explained("ablations")


def test_entries_beyond_the_length_of_a_sweep_are_not_compared(lab):
    """A run of 400 decisions was extended to 600; with 4 environments it may end at 403."""
    lab.run("1_test", "baseline", 1, [0, 10, 20, 30, 90, 90], steps=(0, 100, 200, 403, 500, 600))
    (run,) = lab.read()
    assert run.done and run.curve().tolist() == [[0, 0], [100, 10], [200, 20], [403, 30]]


@functools.cache
def answers():
    """By the number of their sweep: the groups of the plan's questions, and that of 3a."""
    sweeps = comparison.group_runs(exported("ablations")) | comparison.group_runs(exported("3a_combined"))
    return {sweep.split("0_")[-1].split("__")[-1].split("_")[0]: groups[0] for sweep, groups in sweeps.items()}


def of(runs, configuration):
    return [run for run in runs if run.configuration == configuration]


def test_readme_answers_each_question_in_a_sentence():
    """Its number, one word in bold that is the report's, the highest estimate's configuration and interval."""
    assert "8 seeds each, baseline 30; 3a: 10 each." in re.sub(r"\s+", " ", README)
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if re.match(r"\| [23][a-h] \|", line)]
    assert [row[0] for row in rows] == ["2a", "2b", "2c", "2d", "2e", "2f", "2g", "2h", "3a"]
    for number, sentence, difference in rows:
        found = answers()[number].differences[PRIMARY]
        name, best = max(found.items(), key=lambda item: item[1].estimate)
        assert [best.verdict] == re.findall(r"\*\*(.+?)\*\*", sentence) and f"`{name}`" in sentence, sentence
        seeds = (10, 10) if number == "3a" else (8, 30)
        assert (len(best.values), len(best.base)) == seeds and difference == best.of_area, sentence
        others = {one.verdict for other, one in found.items() if other != name}
        assert others <= {"not resolved"}  # else the sentence has to say so


def test_a_family_has_22_comparisons_and_the_repetition_of_the_baseline_is_a_check():
    differences = [one for group in answers().values() for one in group.differences[PRIMARY]]
    assert len(differences) == 22 + 1 and comparison.REPEATED_BASELINE not in differences  # 3a's is the other
    (line,) = report.repetition_check(answers()["2c"])
    assert line.endswith("seeds 1, 2, 3, 4, 5, 6, 7, 8 are equal to the baseline's bit for bit.")


def results_readme():
    return re.sub(r"\s+", " ", (ROOT / "results" / "README.md").read_text(encoding="utf-8"))


def test_results_readme_has_the_numbers_of_the_plan_s_questions():
    text, utd, dual = results_readme(), *(answers()[n].differences[PRIMARY] for n in ("2a", "2h"))
    percent = lambda one: one.of_area.replace(" ", " % ", 1)
    one = utd["utd_ratio_4"]
    assert f"{percent(one)} of the baseline's area, p {one.p:.2g}." in text
    first = one.base.mean() - one.base_learned
    words = "of which the first evaluation, before the policy has learned, has"
    assert f"{one.base.mean():.0f} (a mean return), {words} {first:.0f}." in text
    assert f"the difference is {one.of_learned.replace(' ', ' % ', 1)}." in text
    one = dual["dual_policy"]
    low, high = one.simultaneous
    assert f"*depends on the test*: {percent(one)}. Welch's corrected p is {one.p:.2g};" in text
    assert f"contains 0 ({low:+.1f} to {high:+.1f} in return)" in text
    test = scipy.stats.ttest_ind(one.values, one.base, equal_var=False)
    low, high = test.confidence_interval(0.95 ** (1 / 22))
    assert f"(Welch with Šidák's correction) does not ({low:+.1f} to {high:+.1f})" in text
    low, high = utd["utd_ratio_2"].simultaneous
    assert low > 0 and 1.9 < utd["utd_ratio_2"].values.std(ddof=1) / utd["utd_ratio_2"].base.std(ddof=1) < 2.1
    excluding = [one for one in answers()["2b"].differences[PRIMARY].values() if one.low > 0]
    assert len(excluding) == 2 and min(one.p for one in excluding) > 0.05
    assert f"{percent(answers()['3a'].differences[PRIMARY]['combined'])} for ten against ten," in text
    runs = [*exported("ablations"), *exported("3a_combined")]
    for own, base, form in (
        ("combined", "utd_ratio_4", "it is {}, p {:.2f}:"),
        ("dual_policy", "std_coef_1__local_bootstrap_on", "the second policy changes the area by {}, p {:.2f}."),
    ):
        one = comparison.welch(*(comparison.measured(of(runs, c), *comparison.MEASURES[PRIMARY]) for c in (own, base)))
        assert form.format(percent(one), one.p) in text


def test_both_readmes_say_what_equal_compute_gives():
    """After as many updates as the baseline makes, `utd_ratio_4` has made a quarter of its decisions."""
    runs, _ = comparison.over_axis(exported("ablations"), "updates")
    own, base = of(runs, "utd_ratio_4"), of(runs, "baseline")
    assert {run.curve()[-1, 0] for run in own + base} == {10_000}
    at_end = [np.mean([run.curve()[-1, 1] for run in side]) for side in (own, base)]
    one = comparison.welch(*(comparison.measured(side, comparison.area_under_curve) for side in (own, base)))
    low, high = (-one.percent(x) for x in one.interval[1:])
    lower = f"and its area is {-one.percent(one.estimate):.1f} % [{high:.1f}, {low:.1f}] lower"
    returns = "has a return of {:.0f} where the baseline has {:.0f}".format(*at_end)
    for text in (results_readme().replace(" (interpolated between evaluations)", ""), README):
        assert f"{returns}, {lower}" in re.sub(r"\s+", " ", text)
    runs, notes = comparison.over_axis(exported("3a_combined"), "updates")
    combined = comparison.group_runs(runs)["0_3a_combined"][0].differences[PRIMARY]["combined"]
    assert notes[0].endswith("from 1,000 to 10,000 updates.")
    less = (
        f"compared up to 10 000, it has also learned less than the baseline: {combined.of_area.replace(' ', ' % ', 1)}"
    )
    assert less in results_readme()


def test_both_readmes_say_how_wide_parity_is():
    """The authors' three seeds of walker-walk stand in results/README.md; ours are kept."""
    text = results_readme()
    (listed,) = re.findall(r"walker-walk (\d+\.\d) and \d+\.\d, (\d+\.\d) and \d+\.\d, (\d+\.\d) and", text)
    theirs = np.array([float(value) for value in listed])
    of_task = lambda task: [run for run in exported("parity") if run.task == task]
    one = comparison.welch(comparison.measured(of_task("walker-walk"), comparison.final_return), theirs)
    sentence = "{:+.1f} with a 95 % interval of [{:+.1f}, {:+.1f}]".format(*one.interval)
    assert report.spread(one.values) in text and sentence in text
    levels = f"its return on walker-walk is {one.values.mean():.0f} (5 seeds), theirs {one.base.mean():.0f} (3)"
    interval = sentence.replace("with a 95 % interval of ", "")
    assert f"{levels}, a difference of {interval}." in re.sub(r"\s+", " ", README)
    ours = comparison.measured(of_task("cartpole-swingup"), comparison.final_return)
    half = comparison.half_interval(ours) * math.sqrt(len(ours) + 1)  # of a further seed
    assert f"{ours.mean():.1f} ± {half:.1f}" in text and report.spread(ours) in text


def test_results_readme_has_the_returns_of_the_authors_code():
    text, rows = results_readme(), csv.DictReader((ROOT / "results/official_small.csv").open())
    curves = {}
    for row in rows:
        curves.setdefault((row["algorithm"], row["task"], row["agent"]), []).append(float(row["return"]))
    for task in ("walker-walk", "cartpole-swingup", "finger-spin"):
        planner, policy = (np.mean(curves["BMPC", task, agent][-3:]) for agent in ("planner", "policy"))
        assert f"{task} {planner:.1f} and {policy:.1f}" in text
    for algorithm in ("BMPC", "TD-MPC2"):
        values = curves[algorithm, "dog-run", "planner"][1:]
        assert "{}, {}, {} and {} with ".format(*values) + algorithm in text


def test_results_readme_compares_the_newer_runs_of_the_small_baseline():
    text, finals = results_readme(), {"baseline": {}, "tdmpc2": {}}
    for folder, by_task in finals.items():
        for run in of(exported(folder), "baseline"):
            if run.steps == 12_500:
                by_task.setdefault(run.task, {})[run.seed] = comparison.final_return(run.curve())
    old, new = (
        {task: np.array(list(by_task[task].values())) for task in sorted(by_task)} for by_task in finals.values()
    )
    assert old.keys() == new.keys() and {(len(old[task]), len(new[task])) for task in old} == {(3, 5)}
    differences = {task: comparison.welch(new[task], old[task]) for task in old}
    assert sum(one.estimate < 0 for one in differences.values()) == 4
    one = min(differences.values(), key=lambda one: one.p)
    assert one is differences["cartpole-swingup"] and f"{one.p:.2g}, with a difference of {one}." in text
    sides = list(new.values()), list(old.values())
    low, high = comparison.stratified_bootstrap(comparison.probability_of_improvement, *sides)
    assert f"is {comparison.probability_of_improvement(*sides):.3f} [{low:.3f}, {high:.3f}] (not planned;" in text
    spin = old["finger-spin"]
    assert f"final return is {finals['tdmpc2']['finger-spin'][4]:.0f} there" in text
    assert f"seeds 1 to 3 have {spin.min():.0f} to {spin.max():.0f}, it is 239" in text


def test_results_readme_has_the_easy_tasks():
    text, groups = results_readme(), comparison.group_runs(exported("tdmpc2"))["0_tdmpc2"]
    assert len(groups) == 5 and all(group.done for group in groups) and len(exported("tdmpc2")) == 50
    resolved = []
    for group in groups:
        area, final, policy = (group.differences[name]["tdmpc2"] for name in comparison.MEASURES)
        one = comparison.welch(area.values, area.base)
        cells = [report.spread(area.base), report.spread(area.values), f"{one}, p {one.p:.2g}"]
        cells += [report.spread(final.base), report.spread(final.values)]
        assert f"| {group.task} | {' | '.join(cells)} |" in text
        assert area.verdict == "not resolved"
        assert f"{policy} on {group.task} (corrected p {policy.p:.2g})" in text and policy.estimate < 0
        resolved.append(policy.verdict == "worse")
    assert sum(resolved) == 3 and "so it is resolved on three of the five." in text
    smallest, *others = (group.differences[PRIMARY]["tdmpc2"].p for group in groups)
    assert smallest < min(others) and f"is {smallest:.2g} after correction." in text
    row = report.over_tasks(groups)[1].splitlines()[-1].split(" | ")
    assert f"beats one of `bmpc.py` is {row[-1].removesuffix(' |')}:" in text
    low, high = map(float, re.findall(r"\d\.\d+", row[-1])[1:])
    assert low < 0.5 < high


def test_the_identical_repetition_shows_what_other_hours_do_to_speed():
    runs = exported("ablations")
    twin, base = of(runs, comparison.REPEATED_BASELINE), of(runs, "baseline")
    sides = (base, [run for run in base if run.seed <= 8])
    total, same_seeds = (run_files.speeds(twin).mean() / run_files.speeds(side).mean() for side in sides)
    assert f"ran at {total:.2f} of the speed of all {len(base)} seeds" in results_readme()
    assert f"at {same_seeds:.2f} of that of the same eight seeds" in results_readme()
    assert comparison.relative_speed(twin, base) == ""


def test_results_readme_has_the_answer_of_dog_run():
    (group,) = comparison.group_runs(exported("dog_run_25k"))["0_dog_run_25k"]
    baseline, own = group.baseline, group.configurations["tdmpc2"]
    assert len(baseline) == len(own) == 8 and group.done
    means = [np.mean([run.curve()[:4, 1] for run in runs], 0) for runs in (baseline, own)]
    text = "{:.1f}, {:.1f}, {:.1f} and {:.1f} with BMPC, and {:.1f}, {:.1f}, {:.1f} and {:.1f} with TD-MPC2"
    assert text.format(*means[0], *means[1]) in results_readme()
    for label, runs in (("BMPC (`baseline`)", baseline), ("TD-MPC2 (`tdmpc2`)", own)):
        cells = [report.spread(comparison.measured(runs, *measure)) for measure in comparison.MEASURES.values()]
        assert f"| {label} | {' | '.join(cells)} |" in results_readme()
    differences = [found["tdmpc2"] for found in group.differences.values()]
    cells = [f"{difference}, p {difference.p:.2g}" for difference in differences]
    assert f"| `tdmpc2` minus `baseline` | {' | '.join(cells)} |" in results_readme()
    low, estimate, high = sorted(abs(differences[0].percent(value)) for value in differences[0].interval)
    lower = f"{estimate:.1f} % lower than BMPC's, with a 95 % interval of [{low:.1f}, {high:.1f}]"
    assert lower in results_readme() and differences[0].verdict == "worse"
    assert f"is {estimate:.0f} % [{low:.0f}, {high:.0f}] lower" in README
    areas = [comparison.measured(runs, *comparison.MEASURES[comparison.PRIMARY]) for runs in (baseline, own)]
    assert f"{100 * areas[0].std(ddof=1) / areas[0].mean():.1f} % of their mean" in results_readme()
    assert areas[0].min() > areas[1].max()  # "each seed of BMPC has a larger area"
    official = csv.DictReader((ROOT / "results/official_small.csv").open())
    ours = np.array([run.curve()[:4, 1] for run in baseline])  # at 5 000, 10 000, 15 000 and 20 000
    theirs = np.array(
        [
            float(row["return"])
            for row in official
            if (row["algorithm"], row["task"], row["agent"]) == ("BMPC", "dog-run", "planner")
            and row["global_step"] != "0"
        ]
    )
    levels = f"has {theirs[3]:.0f} after 20 000 steps, less than each of our eight (mean {means[0][3]:.0f})."
    assert levels in re.sub(r"\s+", " ", README) and (theirs < ours.min(0)).all()
    mean_return = lambda returns: returns @ [1 / 6, 1 / 3, 1 / 3, 1 / 6]  # the area by trapezoids
    earlier = np.array([run.curve()[1::2, 1] for run in exported("dog_run")])  # two seeds, at the same decisions
    area, areas, earlier_areas = mean_return(theirs), mean_return(ours), mean_return(earlier)

    def p(areas):  # of a further seed
        t = (area - areas.mean()) / areas.std(ddof=1) / math.sqrt(1 + 1 / len(areas))
        return 2 * scipy.stats.t.cdf(t, len(areas) - 1)

    text = f"is {area:.1f}, ours {areas.mean():.1f} (p {p(areas):.1g} for a further seed of ours; not planned)."
    assert text in results_readme()
    with_earlier = p(np.append(areas, earlier_areas))
    text = "have {:.1f} and {:.1f}; with them p is {:.1g}.".format(*earlier_areas, with_earlier)
    assert text in results_readme()
    runs, notes = comparison.over_axis(exported("dog_run_25k"), "seconds")
    assert notes[0].endswith("compared from 1,423 to 2,446 seconds.") and "from 1 423 s to 2 446 s" in results_readme()
    (group,) = comparison.group_runs(runs)["0_dog_run_25k"]
    assert f"is {group.differences[PRIMARY]['tdmpc2']} in return" in results_readme()


def test_results_readme_has_the_table():
    """Mean of the last three evaluations over seeds, with t-intervals: planner, policy alone, and their difference."""
    for folder in ("baseline", "dog_run"):
        (groups,) = comparison.group_runs(exported(folder)).values()
        for group in groups:
            planner = comparison.measured(group.runs, comparison.final_return)
            policy = comparison.measured(group.runs, comparison.final_return, POLICY)
            cells = [group.task, str(len(planner)), *map(report.spread, (planner, policy, planner - policy))]
            row = f"| {' | '.join(cells)} |"
            if folder == "dog_run":  # an interval of two seeds says nothing
                first, second = ("{:.1f} and {:.1f}".format(*values) for values in (planner, policy))
                row = f"Dog-run, two seeds: planner {first}, policy alone {second}."
            assert row in results_readme()
