"""sweep_list/report.py: the numbers it prints are the runs' numbers, and it says no more than they support."""

import base64
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("sweep_report", ROOT / "sweep_list" / "report.py")
report = importlib.util.module_from_spec(spec)
sys.modules["sweep_report"] = report
spec.loader.exec_module(report)

STEPS = [0, 100, 200, 300, 400]


class Lab:
    """Runs as the scripts leave them, in a directory of their own."""

    def __init__(self, folder):
        self.folder = folder
        self.lines = []

    def run(self, sweep, configuration, seed, curve=None, policy=None, speed=(50, 70, 60), done=True, task="dog-run", more=()):
        directory = self.folder / "runs" / f"{task}__bmpc__{seed}__{sweep}__{configuration}"
        baseline = re.sub(r"2[a-h]_\w+$", "1_test", sweep)
        self.lines.append(f"{directory}\t400\t{sweep}\t{baseline}\t{configuration}\t{seed}\tIs it better?\tpython bmpc.py\n")
        if curve is None:
            return self
        directory.mkdir(parents=True)
        rows = [(step, report.PLANNER, value) for step, value in zip(STEPS, curve)]
        rows += [(step, report.POLICY, value) for step, value in zip(STEPS, policy or curve)]
        rows += [(100 * i, report.SPEED, value) for i, value in enumerate((900, 900, *speed))]
        rows += [(step, tag, value) for tag, values in more for step, value in zip(STEPS, values)]
        text = "".join(f"{step},{2 * step},{tag},{value}\n" for step, tag, value in rows)
        (directory / "metrics.csv").write_text("global_step,env_steps,tag,value\n" + text)
        (directory / "args.json").write_text(
            json.dumps({"env_id": task, "action_repeat": 2, "model_size": 5, "learning_starts": 100})
        )
        if done:
            (directory / "finished.json").write_text(json.dumps({"global_step": 400, "total_timesteps": 400}, indent=2))
        return self

    def seeds(self, sweep, configuration, *finals, **more):
        """A run for each final return, on a straight line to its three last evaluations."""
        for seed, final in enumerate(finals, 1):
            self.run(sweep, configuration, seed, [0, final / 2, final, final, final], **more)
        return self

    @property
    def runs(self):
        return report.read_runs(self.lines)

    def groups(self, sweep):
        return report.group_runs(self.runs)[sweep]

    def answer(self, sweep):
        return report.answer(self.groups(sweep))

    def page(self, *arguments):
        command = [sys.executable, ROOT / "sweep_list" / "report.py", "--out", self.folder / "page", *arguments]
        return subprocess.run(command, input="".join(self.lines), text=True, capture_output=True, timeout=120)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_measures_of_a_curve():
    curve = np.array([[0, 0], [100, 10], [400, 40], [500, 20], [600, 30]], dtype=float)
    assert report.final_return(curve) == pytest.approx(30)
    assert report.area_under_curve(curve) == pytest.approx((500 + 7500 + 3000 + 2500) / 600)
    assert report.largest_drop(curve) == 20
    assert report.area_under_curve(curve[:1]) == 0 == report.largest_drop(curve[:1])


def test_interval_of_the_mean():
    """Against the table of Student's t: 12.706 for 2 seeds, 4.303 for 3."""
    assert report.half_width(np.array([10.0, 14.0])) == pytest.approx(12.706 * 2, rel=1e-4)
    assert report.half_width(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(report.half_width(np.array([5.0])))
    curves = np.array([[1.0, 4.0], [3.0, 4.0]])  # over seeds, evaluation by evaluation
    assert report.half_width(curves) == pytest.approx([12.706, 0], rel=1e-4)


def test_difference_of_two_pairs():
    found = report.difference(np.array([20.0, 24.0]), np.array([10.0, 12.0]))
    assert (found.mean, found.low, found.high) == (11, 8, 14)  # the extreme draws, 1/16 each, lie beyond 2.5 %
    assert found.clear and found.p == pytest.approx(1 / 3)
    assert not report.difference(np.array([20.0, 24.0]), np.array([22.0, 23.0])).clear


def test_difference_of_many_seeds():
    generator = np.random.default_rng(1)
    one, two = generator.normal(5, 2, 200), generator.normal(3, 2, 200)
    found = report.difference(one, two)
    error = math.sqrt(one.var(ddof=1) / 200 + two.var(ddof=1) / 200)
    assert [found.low, found.high] == pytest.approx([found.mean - 1.96 * error, found.mean + 1.96 * error], abs=0.04)


def test_holm():
    assert report.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert report.holm([0.5, 0.9]) == [1, 1]


def test_metrics_are_read_as_they_stand(tmp_path):
    file = tmp_path / "metrics.csv"
    assert report.read_metrics(file) == {}
    file.write_text("global_step,env_steps,tag,value\n0,0,a,1.5\n10,20,a,2\n10,20,b,nan\n20,40,a,33")  # 337.2 is on its way
    metrics = report.read_metrics(file)
    assert metrics["a"].tolist() == [[0, 1.5], [10, 2]] and math.isnan(metrics["b"][0, 1])


# --- answers ---------------------------------------------------------------------------------------------------------


def test_not_enough_data(lab):
    lab.seeds("1_test", "baseline", 10, 12).seeds("2a_utd", "utd_ratio_2", 20, 24)
    lab.run("2a_utd", "utd_ratio_4", 1, [0, 1, 2, 3, 4], done=False).run("2a_utd", "utd_ratio_4", 2)
    assert lab.answer("2a_utd") == "**not enough data**: 2 of 4 runs, baseline 2 of 2"
    assert "ends at" in lab.answer("1_test")


def test_not_enough_data_without_the_baseline(lab):
    lab.run("1_test", "baseline", 1).run("1_test", "baseline", 2).seeds("2a_utd", "utd_ratio_2", 20, 24)
    assert lab.answer("2a_utd") == "**not enough data**: 2 of 2 runs, baseline 0 of 2"
    assert lab.answer("1_test") == "**not enough data**: 0 of 2 runs"


def test_one_seed_is_not_enough(lab):
    lab.seeds("1_test", "baseline", 10).seeds("2a_utd", "utd_ratio_2", 20)
    assert "not enough data" in lab.answer("2a_utd")


def test_no_difference(lab):
    lab.seeds("1_test", "baseline", 100, 120).seeds("2a_utd", "utd_ratio_2", 110, 111).seeds("2a_utd", "utd_ratio_4", 99, 130)
    assert lab.answer("2a_utd").startswith("**No difference seen** in final return, area under the curve, largest drop")


def test_the_final_return_comes_first(lab):
    lab.seeds("1_test", "baseline", 100, 120)
    for seed in (1, 2):  # a drop in the middle, the same end
        lab.run("2a_utd", "utd_ratio_2", seed, [0, 300, 110, 110, 110 + seed])
    text = lab.answer("2a_utd")
    assert text.startswith("**No difference seen** in final return: ") and "**Largest drop: undecided.**" in text


def test_two_seeds_apart_are_undecided(lab):
    lab.seeds("1_test", "baseline", 100, 120).seeds("2a_utd", "utd_ratio_2", 500, 510).seeds("2a_utd", "utd_ratio_4", 99, 130)
    text = lab.answer("2a_utd")
    assert text.startswith("**Final return: undecided.** `utd_ratio_2` +395.0 [+380.0, +410.0]: ") and "p up to 0.67" in text
    assert "utd_ratio_4" not in text


def test_four_seeds_apart_differ(lab):
    lab.seeds("1_test", "baseline", 100, 120, 110, 90).seeds("2a_utd", "utd_ratio_2", 50, 60, 40, 45)
    text = lab.answer("2a_utd")
    assert text.startswith("**Final return: differs from the baseline.** `utd_ratio_2` -56.2 [") and "p at most 0.029" in text


def test_the_baseline_is_not_held_against_itself(lab):
    """2c's on/on has the baseline's numbers; it must not weigh on the correction for the other configurations."""
    lab.seeds("1_test", "baseline", 100, 120, 110, 90)
    lab.seeds("2c_expert_source", report.BASELINE_AGAIN, 100, 120, 110, 90).seeds("2c_expert_source", "other", 50, 60, 40, 45)
    assert "p at most 0.029" in lab.answer("2c_expert_source") and report.BASELINE_AGAIN not in lab.answer("2c_expert_source")


def test_tasks_are_not_mixed(lab):
    for task, height in (("dog-run", 100), ("walker-walk", 900)):
        lab.seeds("1_test", "baseline", height, height + 20, task=task)
        lab.seeds("2a_utd", "utd_ratio_2", height + 5, height + 10, task=task)
    groups = lab.groups("2a_utd")
    assert [{run.task for run in group.baseline} for group in groups] == [{"dog-run"}, {"walker-walk"}]
    text = lab.answer("2a_utd")
    assert text.count("No difference seen") == 2 and "dog-run: " in text and "walker-walk: " in text


def test_sweeps_at_another_size_have_their_own_baseline(lab):
    lab.seeds("1_test", "baseline", 500, 510).seeds("0_ablations__1_test", "baseline", 100, 120)
    lab.seeds("0_ablations__2a_utd", "utd_ratio_2", 105, 110)
    assert lab.answer("0_ablations__2a_utd").startswith("**No difference seen**")


@pytest.mark.parametrize(
    "curve, words",
    [
        ([0, 50, 100, 100, 100], "coincide bit for bit at all 5 evaluations"),
        ([0, 50, 100, 100.25, 100], "**the curves differ**, by 0.25 at most, at decision 300"),
        ([0, 50, 100], "coincide bit for bit at the 3 evaluations both have"),
        (None, "nothing to compare yet"),
    ],
)
def test_coincidence(lab, curve, words):
    lab.seeds("1_test", "baseline", 100)
    lab.run("2c_expert_source", report.BASELINE_AGAIN, 1, curve)
    (line,) = report.coincidence(lab.groups("2c_expert_source")[0])
    assert words in line and "is the baseline once more" in line


def test_the_name_of_the_baseline_once_more_is_the_sweeps():
    listed = subprocess.run(["bash", ROOT / "sweeps.sh", "2c", "--dry-run"], capture_output=True, text=True).stdout
    (line, _) = [line for line in listed.splitlines() if f"__{report.BASELINE_AGAIN} " in line]
    assert "--reanalyze-use-chosen-action --initial-expert-from-behavior" in line


# --- figures ---------------------------------------------------------------------------------------------------------


def axes_of(group, reference=(), configuration=None):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    report.draw_panel(axis, group, configuration or next(iter(group.configurations)), "title", list(reference))
    return axis


def line_of(axis, label):
    (line,) = [line for line in axis.get_lines() if line.get_label() == label]
    return line


def test_curves_are_means_over_seeds_as_far_as_all_have_come(lab):
    lab.seeds("1_test", "baseline", 100, 200, 600)
    lab.run("2a_utd", "utd_ratio_2", 1, [0, 1, 2, 3, 4]).run("2a_utd", "utd_ratio_2", 2, [0, 3, 4], done=False)
    axis = axes_of(lab.groups("2a_utd")[0])
    own, baseline = line_of(axis, "configuration"), line_of(axis, "baseline")
    assert own.get_xdata().tolist() == [0, 100, 200] and own.get_ydata().tolist() == [0, 2, 3]
    assert baseline.get_color() == "black" and baseline.get_ydata().tolist() == [0, 150, 300, 300, 300]
    (band,) = axis.collections[:1]
    edges = band.get_paths()[0].vertices
    at_end = edges[edges[:, 0] == 400][:, 1]
    half = 4.3027 * np.std([100, 200, 600], ddof=1) / math.sqrt(3)
    assert [at_end.min(), at_end.max()] == pytest.approx([300 - half, 300 + half], rel=1e-3)


def test_env_steps_on_a_second_axis(lab):
    axis = axes_of(lab.seeds("1_test", "baseline", 1, 2).groups("1_test")[0])
    (second,) = axis.child_axes
    axis.figure.draw_without_rendering()
    assert second.get_xlabel() == "env steps" and axis.get_xlabel() == "decisions"
    assert np.allclose(second.get_xlim(), 2 * np.array(axis.get_xlim()))
    assert {"planner", "policy alone"} <= {line.get_label() for line in axis.get_lines()}


def test_reference_curves(lab):
    rows = [
        {"algo": algo, "task": task, "env_steps": str(x), "return_mean": str(y), "return_lcb": "0", "return_ucb": "900"}
        for algo, task, points in (
            ("theirs", "cup-catch", [(0, 0), (400, 40), (1000, 100)]),
            ("other", "cup-catch", [(0, 5), (1000, 5)]),
            ("theirs", "dog-run", [(0, 0), (1000, 1)]),
        )
        for x, y in points
    ]
    group = lab.seeds("1_test", "baseline", 1, 2, task="ball_in_cup-catch").groups("1_test")[0]
    axis = axes_of(group, rows)
    line = line_of(axis, "theirs")  # at 400 decisions, 800 env steps, the run ends and so does the line
    assert line.get_xdata().tolist() == [0, 200, 400] and line.get_ydata().tolist() == [0, 40, 80]
    assert line_of(axis, "other").get_ydata().tolist() == [5, 5]


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page(lab):
    lab.seeds("1_test", "baseline", 100, 120, speed=(50, 70, 60))
    lab.seeds("2a_utd", "utd_ratio_2", 500, 510, speed=(20, 40, 30), more=[("losses/own", [0, 0, 0, 8, 10])])
    lab.run("2b_multihead", "std_coef_0", 1).run("2b_multihead", "std_coef_0", 2)
    done = lab.page()
    assert done.returncode == 0, done.stderr
    text, page = ((lab.folder / "page" / name).read_text() for name in ("report.md", "report.html"))
    sections = dict(re.findall(r"^## (.*)\n\n(.*)$", text, re.M))
    assert [*sections][:3] == [f"Is it better? ({sweep})" for sweep in ("1_test", "2a_utd", "2b_multihead")]
    assert sections["Is it better? (2a_utd)"] == lab.answer("2a_utd")
    assert sections["Is it better? (2b_multihead)"] == "**not enough data**: 0 of 2 runs, baseline 2 of 2"
    row = re.search(r"^\| `utd_ratio_2` \| 2 of 2 .*", text, re.M)[0]
    assert "| 505.0 ± 63.5 | +395.0 [+380.0, +410.0] |" in row and row.endswith("| 30.0 ± 0.0 |")
    assert re.search(r"\| configuration \| losses/own \|\n.*\n\| `utd_ratio_2` \| 9 ± 0 \|", text), "mean of the last quarter"
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(p) for p in pictures] == [
        (lab.folder / "page" / "figures" / f"{sweep}.png").read_bytes() for sweep in ("1_test", "2a_utd")
    ]
    assert not re.search(r'(src|href)="(?!data:)', page), "one file, nothing beside it"
    assert "<b>Final return: undecided.</b>" in page and "<code>utd_ratio_2</code>" in page and "**" not in page


@pytest.mark.parametrize("text", [None, "algo,task\na,b\n", "algo,task,env_steps,return_mean,return_lcb,return_ucb\n"])
def test_a_bad_reference_is_one_line(lab, text):
    lab.seeds("1_test", "baseline", 100, 120)
    file = lab.folder / "reference.csv"
    if text is not None:
        file.write_text(text)
    done = lab.page("--reference", file)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "reference.csv" in done.stderr


def test_kept_runs(lab):
    """A CSV of returns for each finished run, its command and versions; the page made of them is the runs' own page."""
    lab.seeds("1_test", "baseline", 100, 120, 130).seeds("2a_utd", "utd_ratio_2", 500, 510, 505)
    lab.run("2a_utd", "utd_ratio_4", 1, [0, 1, 2, 3, 4], done=False)
    lab.lines = [line.replace("python bmpc.py", f"/some/where/python {ROOT}/bmpc.py --utd-ratio 2") for line in lab.lines]
    for directory in (lab.folder / "runs").iterdir():
        (directory / "versions.json").write_text(
            json.dumps([{"torch": "1"}, {"command": ["bmpc.py"], "torch": "2", "git_commit": "abc"}])
        )
    folder = lab.folder / "results"
    assert lab.page("--export", folder).returncode == 0
    names = {directory.name for directory in (lab.folder / "runs").iterdir() if (directory / "finished.json").exists()}
    assert {file.stem for file in folder.glob("*.csv")} == names and len(names) == 6
    assert (folder / "dog-run__bmpc__2__2a_utd__utd_ratio_2.csv").read_text() == (
        "global_step,env_steps,planner_return,policy_return\n"
        "0,0,0,0\n100,200,255,255\n200,400,510,510\n300,600,510,510\n400,800,510,510\n"
    )
    text = (folder / "runs.json").read_text()
    about = json.loads(text)["dog-run__bmpc__2__2a_utd__utd_ratio_2"]
    assert about["command"] == "python bmpc.py --utd-ratio 2" and about["versions"] == {"torch": "2", "git_commit": "abc"}
    assert str(ROOT) not in text and str(lab.folder) not in text

    first = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    page = first[Path("report.md")].decode()
    assert "6 of 6 runs are done" in page and "| 505.0 ± 12.4 |" in page and "| 60.0 ± 0.0 |" in page
    for file in [folder / "report.md", *folder.glob("figures/*")]:
        file.unlink()
    for directory in (lab.folder / "runs").glob("*utd_ratio*"):
        shutil.rmtree(directory)
    assert lab.page("--export", folder).returncode == 0, "what is kept of runs that are gone stays"
    shutil.rmtree(lab.folder / "runs")
    (folder / "report.md").unlink()
    assert lab.page("--replot", folder).returncode == 0
    assert {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()} == first
    assert lab.page("--replot", lab.folder / "nowhere").returncode == 2


def test_reached_from_sweeps(tmp_path):
    """At another task and size, in a directory with a space; the baseline comes in by itself."""
    project, work = tmp_path / "a project", tmp_path / "my runs"
    work.mkdir()
    shutil.copytree(ROOT / "sweep_list", project / "sweep_list")
    shutil.copy(ROOT / "sweeps.sh", project)
    shutil.copy(ROOT / "tests" / "fake_bmpc.py", project / "bmpc.py")
    (work / "curves.csv").write_text("algo,task,env_steps,return_mean,return_lcb,return_ucb\nx,cartpole-swingup,0,1,0,2\n")

    def sweeps(*words):
        command = ["bash", project / "sweeps.sh", *words, "--", "--task", "cartpole-swingup", "--steps", "20"]
        environment = os.environ | {"PYTHON": sys.executable}
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=120)

    assert sweeps("2a", "1_test", "--jobs", "2").returncode == 0
    done = sweeps("2a", "2d", "--report", "--reference", "curves.csv")
    assert done.returncode == 0, done.stderr
    text = (work / "runs" / "report" / "report.md").read_text()
    sections = dict(re.findall(r"^## (.*)\n\n(.*)$", text, re.M))
    assert "6 of 8 runs are done" in text and "cartpole-swingup, 20 decisions" in text
    assert sections["What does the baseline reach? (1_test)"].startswith("It ends at")
    assert sections["Does more training per step help? (2a_utd)"].startswith("**No difference seen**")
    assert sections["Do several rollouts reduce variance? (2d_num_rollouts)"].startswith("**not enough data**: 0 of 2 runs")
