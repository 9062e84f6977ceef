"""sweep_list/report.py: the numbers it prints are the runs' numbers, and it says no more than they support.

And results/: the kept curves are those of the commands beside them, README's table of them is computed from them.
"""

import csv
import dataclasses
import importlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from conftest import ROOT
from test_sweeps import Lab, parse

sys.path.append(str(ROOT / "sweep_list"))
report = importlib.import_module("report")
STEPS = [0, 100, 200, 300, 400]


class Runs:
    """Runs as the scripts leave them, in a directory of their own."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []

    def run(self, sweep, configuration, seed, curve=(), done=True, task="dog-run"):
        directory = self.folder / "runs" / f"{task}__bmpc__{seed}__{sweep}__{configuration}"
        baseline, command = re.sub(r"2[a-h]_\w+$", "1_test", sweep), f"/bin/python {ROOT}/bmpc.py --x 2"
        fields = [directory, 400, sweep, baseline, configuration, seed, "Is it better?", command]
        self.lines.append("\t".join(map(str, fields)) + "\n")
        if not len(curve):
            return self
        directory.mkdir(parents=True)
        curves = {report.PLANNER: curve, report.POLICY: curve, report.SPEED: (900, 900, 50, 70, 60)}
        rows = [f"{s},{2 * s},{tag},{y}\n" for tag, values in curves.items() for s, y in zip(STEPS, values)]
        (directory / "metrics.csv").write_text("".join(["global_step,env_steps,tag,value\n", *rows]))
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
        subprocess.run(command, cwd=self.folder, input="".join(self.lines), text=True, check=True, timeout=120)


@pytest.fixture
def lab(tmp_path):
    return Runs(tmp_path)


def by_seed(values, first=1):
    return dict(enumerate(map(float, values), first))


def test_measures_of_a_curve_and_intervals_of_means():
    curve = np.array([[0, 0], [100, 10], [400, 40], [500, 20], [600, 30]], dtype=float)
    assert report.final_return(curve) == pytest.approx(30)
    assert report.area_under_curve(curve) == pytest.approx((500 + 7500 + 3000 + 2500) / 600)
    assert report.area_under_curve(curve[:1]) == 0
    # Student's t is 12.706 for two seeds, 4.303 for three
    spreads = [report.spread(np.array(x)) for x in ([], [1], [1, 3], [10, 20, 30])]
    assert spreads == ["-", "1.0", "2.0 ± 12.7", "20.0 ± 24.8"]


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("gap", [0, 3, 30])
def test_p_is_that_of_every_way_to_deal_the_seeds(paired, gap):
    """Pairs: every choice of signs. Else: every choice of five of the ten. Twice the smaller tail."""
    draw = np.random.default_rng(gap)
    own, base = draw.normal(100 + gap, 5, 5), draw.normal(100, 5, 5)
    one = report.difference(by_seed(own), by_seed(base, 1 if paired else 2))
    seen, everyone = own.mean() - base.mean(), [*own, *base]
    if paired:
        dealt = [np.mean(signs * (own - base)) for signs in itertools.product((1, -1), repeat=5)]
    else:
        sides = itertools.combinations(range(10), 5)
        dealt = [2 * np.mean([everyone[i] for i in side]) - 2 * np.mean(everyone) for side in sides]
    tails = np.mean(np.array(dealt) >= seen - 1e-9), np.mean(np.array(dealt) <= seen + 1e-9)
    assert one.p == pytest.approx(min(1, 2 * min(tails))) and one.apart.mean() == pytest.approx(seen)
    assert (one.paired, one.smallest) == (paired, 2 / len(dealt)) and (one.p == one.smallest or gap < 30)


def test_pairs_share_their_luck():
    """Where seeds are lucky on both sides pairs tell a difference that unpaired seeds do not; order means nothing."""
    luck = np.array([0, 50, 10, 90, 30, 70, 20])
    own, base = luck + [5, 6, 7, 5, 6, 7, 6], luck + 100
    one = report.difference(dict(reversed(by_seed(own + 100).items())), by_seed(base))
    assert str(one).startswith("+6.0 [+5.") and one.p == 2 / 2**7 and one.verdict == "better"
    assert report.difference(by_seed(base), by_seed(own + 100)).verdict == "worse"
    assert one.variance_ratio == pytest.approx(np.var(own - base) / (np.var(own) + np.var(base)))
    apart = report.difference(by_seed(own + 100), by_seed([*base, 150]))
    assert not apart.paired and apart.variance_ratio == one.variance_ratio and apart.low < -10 and apart.high > 10
    far_end = max(-apart.low, apart.high) / apart.base
    assert apart.verdict == f"no difference larger than {math.ceil(100 * far_end)} %"


def test_intervals_cover():
    """Of 95 % intervals about so many hold the truth; those of ten seeds a few less."""
    draw, held = np.random.default_rng(0), [0, 0]
    for paired in [True, False] * 50:
        base = draw.normal(size=10)
        one = report.difference(by_seed(draw.normal(3 + base * paired)), by_seed(base, 1 if paired else 2))
        held[paired] += one.low <= 3 <= one.high
    assert 42 <= min(held) and max(held) <= 49


def test_an_interval_needs_three_seeds_and_may_have_no_width():
    two = report.difference(by_seed([20, 24]), by_seed([10, 12]))
    assert (str(two), two.verdict, two.p) == ("+11.0", "undecided", 0.5)
    same = report.difference(by_seed([20, 24, 30]), by_seed([20, 24, 30]))
    assert (str(same), same.verdict, same.p) == ("+0.0 [+0.0, +0.0]", "no difference larger than 0 %", 1)
    assert report.difference(by_seed([1, 2, 3]), by_seed([0, 0, 0])).verdict == "no difference larger than nan %"


TOLD = [(0, "over 1000", "over 1000"), (99, 6, 4), (0.2, 199, 394), (0.5, 34, 64), (0.8, 15, 26)]


@pytest.mark.parametrize("d, pairs, a_side", TOLD)
def test_seeds_to_tell(d, pairs, a_side):
    """Against Cohen's table 2.4.1 for a two-sided 5 % and power 0.8, each side, and G*Power's numbers of pairs.

    With six pairs or four a side a permutation test can give p of 0.05 at all."""
    side = np.array([-10.0, 0.0, 10.0])  # of standard deviation 10
    for needed, base in ((pairs, by_seed(side * 0)), (a_side, by_seed(side, 2))):
        one = report.difference(by_seed(side - 10 * d), base)
        assert one.seeds == str(needed) == report.difference(by_seed(side + 10 * d), base).seeds
        one.tests = 23
        assert d == 0 or int(one.seeds) > int(needed)


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


def test_answers_are_corrected_for_every_configuration_of_the_report(lab):
    """Of six pairs p is 1/32 at best: one configuration may be told, not two, wherever they are in the report."""
    assert report.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06]) and report.holm([0.9, 0.8]) == [1, 1]
    base = np.array([100, 120, 110, 90, 105, 95])
    lab.seeds("1_test", "baseline", *base).seeds("2a_utd", "utd_ratio_2", *base + 40 + np.arange(6))
    (text,) = lab.answer("2a_utd")
    assert text.startswith("- `utd_ratio_2`: **better**, +31.9 [") and text.endswith("of this size: 6")
    lab.seeds("2d_num_rollouts", "num_rollouts_4", *base - 40 - np.arange(6))
    (text,) = lab.answer("2a_utd")
    assert text.startswith("- `utd_ratio_2`: **no difference larger than") and text.endswith("of this size: 7")
    (group,) = lab.groups("2a_utd")
    assert [found["utd_ratio_2"].p for found in group.differences.values()] == [1 / 16] * 3
    text = report.overview([group, *lab.groups("2d_num_rollouts")])
    assert "for 2 configurations, cannot be below 0.062" in text and "variance of 2 of 2 differences" in text


def test_a_row_for_each_question(lab):
    """All verdicts, and the highest estimate with its interval in % of the baseline's area, three quarters of 100."""
    base = np.arange(95.0, 106)
    lab.seeds("1_test", "baseline", *base)
    for name, far in (("a", 40), ("b", -40), ("c", 0), ("d", -50), ("e", 50)):
        lab.seeds("2a_utd", name, *base + far)
    lab.seeds("2d_num_rollouts", "f", *base, 100)
    lab.seeds("2e_imagine_source", "g", 1, 2).run("2e_imagine_source", "g", 3)
    groups = [group for sweep in ("2a_utd", "2d_num_rollouts", "2e_imagine_source") for group in lab.groups(sweep)]
    first, second, third = report.summary(groups).splitlines()[2:]
    told = "better: `a`, `e`; worse: `b`, `d`; no difference larger than 0 % elsewhere"
    assert first == f"| Is it better? (dog-run) | {told} | `e` | +50.0 [+50.0, +50.0] | 11, baseline 11 | × 1.00 |"
    assert re.search(r"no difference larger than [34] % \| `f` \| \+0.0 \[-[23]\.\d, \+[23]\.\d\] \| 12, base", second)
    assert third.split(" | ")[1:3] == ["**not enough data**: 2 of 3 runs, baseline 11 of 11", "`g`"]
    assert third.split(" | ")[3] == "-98.5"  # two seeds give no interval


def test_tasks_and_sizes_are_not_mixed(lab):
    """On a straight line to its three last evaluations a curve has three quarters of their height as its area."""
    for task, size, height in (("dog-run", "", 100), ("walker-walk", "", 900), ("dog-run", "0_small__", 10)):
        lab.seeds(f"{size}1_test", "baseline", height, height + 5, height, height + 5, task=task)
        lab.seeds(f"{size}2a_utd", "utd_ratio_2", *[0] * 3, height, task=task)
    lines = lab.answer("2a_utd") + lab.answer("0_small__2a_utd")
    assert [re.search(r"[+-]\d+\.\d", line)[0] for line in lines] == ["-58.1", "-508.1", "-7.5"]


def test_coincidence(lab):
    lab.seeds("1_test", "baseline", 100)
    lab.run("2c_expert_source", report.BASELINE_AGAIN, 1, [0, 50, 100, 100, 100])
    (line,) = report.coincidence(lab.groups("2c_expert_source")[0])
    assert line.endswith("is the baseline once more. Seed 1: the curves coincide bit for bit at 5 of 5 evaluations.")
    lab.run("0__2c_expert_source", report.BASELINE_AGAIN, 1, [0, 50, 100, 99, 100]).seeds("0__1_test", "baseline", 100)
    (line,) = report.coincidence(lab.groups("0__2c_expert_source")[0])
    assert line.endswith("Seed 1: **the curves differ**, first at decision 300: 99.0, not 100.0.")


def test_the_page_and_what_is_kept(lab):
    """A CSV of returns for each finished run, its command and versions, and the page made of them."""
    lab.seeds("1_test", "baseline", 100, 120).seeds("2a_utd", "utd_ratio_2", 500, 510)
    lab.run("2a_utd", "utd_ratio_4", 1, STEPS, done=False).run("2b_multihead", "std_coef_0", 1)
    lab.page()
    text = (lab.folder / "runs" / "report" / "report.md").read_text()
    sections = dict(re.findall(r"^## Is it better\? \((.*)\)\n\n(.*)$", text, re.M))
    assert [*sections] == ["1_test", "2a_utd", "2b_multihead"] and "4 of 6 runs are done" in text
    assert sections["2a_utd"] == "**not enough data**: 2 of 3 runs, baseline 2 of 2"
    assert "| `utd_ratio_2` | 2 of 2 | 378.8 ± 47.6; +296.2, p 0.5 | 505.0 ± 63.5; +395.0, p 0.5 |" in text
    assert text.count("60.0 ± 0.0, × 1.00 |") == 3 and "![Forest plot](figures/forest.png)" in text

    folder = lab.folder / "results"
    lab.page("--export", folder)
    assert len(list(folder.glob("*.csv"))) == 4 and "4 of 4 runs are done" in (folder / "report.md").read_text()
    assert (folder / "dog-run__bmpc__2__2a_utd__utd_ratio_2.csv").read_text() == (
        "global_step,env_steps,planner_return,policy_return\n"
        "0,0,0,0\n100,200,255,255\n200,400,510,510\n300,600,510,510\n400,800,510,510\n"
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


# --- results/

README = (ROOT / "README.md").read_text()
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
        assert {"git_commit", "torch", "mujoco", "dm_control"} <= set(about["versions"]), name
        rows = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
        steps = [int(row["global_step"]) for row in rows]
        assert steps == list(range(steps[0], args.total_timesteps + 1, args.eval_freq)), name
        assert steps[0] in (0, args.eval_freq) and [int(row["env_steps"]) for row in rows] == [2 * s for s in steps]
        assert np.isfinite([[float(row["planner_return"]), float(row["policy_return"])] for row in rows]).all(), name


@each_folder
def test_replotted_from_the_csvs_alone_it_is_the_same(folder, tmp_path):
    """To the byte, and the figures so where the same matplotlib draws them."""
    shutil.copytree(folder, tmp_path, ignore=shutil.ignore_patterns("figures", "report.md"), dirs_exist_ok=True)
    subprocess.run([sys.executable, ROOT / "sweep_list" / "report.py", "--replot", tmp_path], check=True)
    files = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}
    again = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*.*")}
    drawn_here = f"Matplotlib version{matplotlib.__version__},".encode()
    assert again.keys() == files.keys() and len(list(folder.glob("*.csv"))) == len(report.kept(folder))
    for name, content in files.items():
        assert again[name] == content or (name.suffix == ".png" and drawn_here not in content), name


def test_readme_has_the_answers():
    """The rows of the report's own summary, behind the sweep's number, without task and seeds, which are the same."""
    sweeps = report.group_runs(report.kept(ROOT / "results" / "ablations"))
    sweeps |= report.group_runs(report.kept(ROOT / "results" / "3a_combined"))
    asked = {sweep.split("0_")[-1].split("__")[-1].split("_")[0]: groups for sweep, groups in sweeps.items()}
    del asked["1"]  # the baseline
    rows = report.summary(sum((asked[number] for number in sorted(asked)), [])).splitlines()[2:]
    assert sorted(asked) == ["2a", "2b", "2c", "2d", "2e", "2f", "2g", "2h", "3a"]
    for number, row in zip(sorted(asked), rows, strict=True):
        question, *cells, seeds, speed = row.strip("| ").split(" | ")
        cells = [number, question.removesuffix(" (cartpole-swingup)"), *cells, speed]
        assert f"\n| {' | '.join(cells)} |\n" in README
        assert f"{'3a' if number == '3a' else 'seeds'}: {seeds}" in README


def test_results_readme_tells_whether_more_than_the_updates_helps():
    """3a beside the strongest of its parts, with the report's statistics."""
    runs = [*report.kept(ROOT / "results" / "ablations"), *report.kept(ROOT / "results" / "3a_combined")]
    measure = report.MEASURES[report.PRIMARY]
    both, part = (
        report.by_seed([r for r in runs if r.configuration == c], *measure) for c in ("combined", "utd_ratio_4")
    )
    one = report.difference(both, part)
    estimate, low, high = map(one.percent, (one.apart.mean(), one.low, one.high))
    assert f"{estimate:+.1f} % [{low:+.1f}, {high:+.1f}], p {one.p:.2f}" in (ROOT / "results/README.md").read_text()


def test_readme_has_the_table():
    """Mean of the last three evaluations over seeds, with t-intervals: planner, policy alone, and their difference."""
    for folder in ("baseline", "dog_run"):
        (groups,) = report.group_runs(report.kept(ROOT / "results" / folder)).values()
        for group in groups:
            planner = report.measured(group.runs, report.final_return)
            policy = report.measured(group.runs, report.final_return, report.POLICY)
            cells = [group.task, str(len(planner)), *map(report.spread, (planner, policy, planner - policy))]
            assert f"| {' | '.join(cells)} |" in README
