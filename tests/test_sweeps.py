"""sweeps.sh: its runs are the plan's, and they finish: through failures, Ctrl-C, kills and second invocations."""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from runs import patiently

import bmpc

SCRIPTS = ["bmpc", "bmpc_multihead", "bmpc_dual_policy", "tdmpc2"]

# The plan once more, written down apart from the folders: sweep -> script and the values of its flags.
HEADS = {"planner_num_dynamics_heads": [2], "ensemble_lr_scaling": [True]}
DUAL = HEADS | {"local_td_bootstrap": [True], "dual_policy_enabled": [True], "planner_value_std_coef_train": [1]}
BONUS = HEADS | {"planner_value_std_coef_train": [0, 0.3, 1], "local_td_bootstrap": [True, False]}
EXPERT = {"reanalyze_use_chosen_action": [True, False], "initial_expert_from_behavior": [True, False]}
EMA = {"td_target_use_ema_policy": [True], "policy_ema_tau": [0.003, 0.01, 0.03]}
PLAN = {
    "1_test": ("bmpc", {}),
    "2a_utd": ("bmpc", {"utd_ratio": [2, 4]}),
    "2b_multihead": ("bmpc_multihead", BONUS),
    "2c_expert_source": ("bmpc", EXPERT),
    "2d_num_rollouts": ("bmpc", {"num_rollouts": [4]}),
    "2e_imagine_source": ("bmpc", {"imagine_initial_source": ["replay_true"]}),
    "2f_encoder_cons": ("bmpc", {"encoder_consistency_coef": [0.1, 1]}),
    "2g_trust_region": ("bmpc", EMA | {"policy_trust_region_coef": [0.1, 1]}),
    "2h_exploration": ("bmpc_dual_policy", DUAL),
}
SMALL = ["--", "--steps", "20"]


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if not re.match("SWEEPS_|SLURM|SBATCH|OMP_|CUDA_|FAKE_", k)}
    return clean | {"PYTHON": sys.executable} | {k: str(v) for k, v in more.items()}


@dataclasses.dataclass
class Lab:
    """A project with sweeps, and a directory to run them in."""

    project: Path = ROOT
    cwd: Path = ROOT

    def start(self, *arguments, how=subprocess.Popen, **more):
        command = ["bash", self.project / "sweeps.sh", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return how(command, cwd=self.cwd, env=environment(**more), start_new_session=True, **pipes)

    def run(self, *arguments, **more):
        return self.start(*arguments, how=functools.partial(subprocess.run, timeout=120), **more)

    def dry_run(self, *arguments, **more):
        done = self.run("--dry-run", *arguments, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    @property
    def runs(self):
        return sorted((self.cwd / "runs").glob("*__*"))

    def at_gate(self, number):
        """Waits until so many runs are midway, and returns them."""
        files = lambda: sorted(self.cwd.glob("runs/*/checkpoint.pt"))
        midway = lambda: [file.parent for file in files() if '"tenth": 5' in file.read_text()]
        patiently(lambda: len(midway()) == number, self)
        return midway()


def starts(run_dir):
    return [json.loads(line) for line in (run_dir / "starts").read_text().splitlines()]


@pytest.fixture
def lab(tmp_path):
    """A copy of the sweeps with stand-ins for the scripts. Both directories have a space in their names."""
    project, cwd = tmp_path / "a project", tmp_path / "my runs"
    cwd.mkdir()
    shutil.copytree(ROOT / "sweep_list", project / "sweep_list")
    shutil.copy(ROOT / "sweeps.sh", project)
    for script in SCRIPTS:
        shutil.copy(ROOT / "tests" / "fake_bmpc.py", project / f"{script}.py")
    return Lab(project, cwd)


@functools.cache
def arguments(script, *flags):
    return importlib.import_module(script).parse_args(flags)


def parse(line):
    """What a script makes of a command line. Seeds are put in afterwards: to read the flags takes long."""
    _python, script, *flags = shlex.split(line)
    k = flags.index("--seed")
    args = arguments(Path(script).stem, *flags[:k], *flags[k + 2 :])
    return dataclasses.replace(args, seed=int(flags[k + 1]))


def planned(names, seeds=(1, 2)):
    """The arguments of the plan's runs, each named by its sweep; what the plan does not name is at its default."""
    runs = Counter()
    for name, seed in itertools.product(names, seeds):
        script, flags = PLAN[name]
        own = {"env_id": "dog-run", "total_timesteps": 200_000, "seed": seed, "run_name": name}
        for values in itertools.product(*flags.values()):
            runs[importlib.import_module(script).Args(**own, **dict(zip(flags, values)))] += 1
    return runs


def found(lines):
    """The same of the lines that sweeps.sh prints."""
    return Counter(dataclasses.replace(one, run_name=one.run_name.split("__")[0]) for one in map(parse, lines))


def test_dry_run_prints_the_plan():
    lines = Lab().dry_run("all")
    assert len(lines) == 46 and found(lines) == planned(PLAN.keys() - {"1_test"})
    assert found(Lab().dry_run(*(sweep.split("_")[0] for sweep in PLAN), "all", "2a_utd")) == planned(PLAN)


def test_seeds():
    """They replace those of the settings and of a sweep that has its own, and reach what is included."""
    lines = Lab().dry_run("2c", "1_test", "--seeds", "1,2,3,4,5")
    assert found(lines) == planned(["1_test", "2c_expert_source"], (1, 2, 3, 4, 5))
    numbers = {
        "0_dog_run": 1,
        "0_baseline": 5,
        "0_ablations": 24,
        "0_rehearsal": 24,
        "0_3a_combined": 2,
        "0_tdmpc2": 10,
    }
    for sweep, number in numbers.items():
        lines = Lab().dry_run(sweep, SWEEPS_SEEDS="7,9")
        assert Counter(parse(line).seed for line in lines) == {7: number, 9: number}
    seeds = Counter(parse(line).seed for line in Lab().dry_run("0_ablations"))
    assert seeds == dict.fromkeys(range(1, 9), 24) | dict.fromkeys(range(9, 31), 1)  # more of the baseline
    status = Lab(cwd=Path("/")).run("2d", "--status", "--seeds=3,4,5")
    assert re.findall(r"waiting.*__bmpc__(\d)__2d", status.stdout) == ["3", "4", "5"] and status.returncode == 75


def test_a_sweep_that_names_its_baseline_is_compared_with_it(tmp_path):
    assert Lab(cwd=tmp_path).run("0_3a_combined", "--report").returncode == 0
    page = (tmp_path / "runs/report/report.md").read_text()
    assert "0 of 10 runs, baseline 0 of 10\n" in page
    lines = Lab().dry_run("0_tdmpc2")
    assert len(lines) == 50 and Counter(line.split()[1] for line in lines) == {"tdmpc2.py": 25, "bmpc.py": 25}
    assert set(Lab().dry_run("0_baseline")) < set(lines)  # BMPC's runs are those of 0_baseline, with two more seeds


TASKS = "cup-catch finger-turn-easy pointmass-easy dm_control/walker-walk-v0 gymnasium:Pendulum-v1".split()


@pytest.mark.parametrize("task", TASKS)
def test_run_directories_are_the_scripts_own(task):
    asked = ["2d", "2h", "--", "--task", task]
    own = [dataclasses.replace(args, env_id=bmpc.resolve_env_id(task)) for args in map(parse, Lab().dry_run(*asked))]
    shown = Lab(cwd=Path("/")).run("--status", *asked).stdout
    assert re.findall(r"waiting.* (\S+__\S+)", shown) == [bmpc.run_directory(args).name for args in own]


def test_the_document_agrees_with_the_folders():
    plan = ROOT / "sweep_list" / "7_bmpc_equivalence"
    text = (plan / "ABLATION_SWEEPS.md").read_text()
    rows = re.findall(r"^\| (2[a-h]\w*) \|.*\| (\d+) \| (\d+) \|", text, re.M)
    sizes = {sweep: len(planned([sweep])) for sweep in PLAN if sweep != "1_test"}
    assert {name: (int(a), int(b)) for name, a, b in rows} == {name: (n // 2, n) for name, n in sizes.items()}
    for file in plan.glob("*/sweep.sh"):
        question = re.search(r'^question "(.*)"', file.read_text(), re.M)[1]
        assert file.parent.name in text and question in text, file


def test_a_new_folder_is_a_new_sweep(lab):
    folder = lab.project / "sweep_list" / "7_bmpc_equivalence" / "3a_combined"
    folder.mkdir()
    shutil.copy(ROOT / "sweep_list" / "template.sh", folder / "sweep.sh")
    runs = [parse(line) for line in lab.dry_run("3a")]
    assert len(lab.dry_run("all")) == 54 and all(args.planner_num_dynamics_heads == 2 for args in runs)
    varied = {(args.planner_value_std_coef_train, args.td_target_use_ema_policy, args.seed) for args in runs}
    assert varied == set(itertools.product([0.3, 1], [True, False], [1, 2]))
    with open(folder / "sweep.sh", "a") as file:
        file.write("for gamma in 1 2; do run bmpc.py same_name --gamma $gamma; done\n")
    assert "share runs/dog-run__bmpc__1__3a_combined__same_name" in lab.run("3a").stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "which sweep"),
        (["2z"], "names 0 of: all 0_cpu/0_3a_combined/"),
        (["0"], "names 8 of"),
        (["2a", "--jobs", "0"], "--jobs"),
        (["2a", "--jobs"], "--jobs"),
        (["2a", "--gpus", "0,"], "--gpus"),
        (["2a", "--seeds", "1,two"], "--seeds"),
        (["2a", "--job", "2"], "--job"),
        (["2a", "--", "--seed", "3"], "--seed"),
        (["2a", "--", "--run_name=x"], "--run-name"),
        (["2a", "--", "--steps", "many"], "--steps"),
        (["2a", "--slurm", "--gpus", "0"], "--gres"),
    ],
)
def test_bad_input_is_one_line_and_code_2(lab, arguments, words):
    done = lab.run(*arguments)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert not lab.runs


def test_environment_variables_say_the_same():
    flags = ["--task", "walker-walk", "--steps", "10", "--utd-ratio", "8"]
    asked = Lab().dry_run("2a", "1_test", "--seeds", "4", "--", *flags)
    variables = {"NAMES": "2a 1_test", "MODE": "dry-run", "SEEDS": "4", "FLAGS": " ".join(flags)}
    said = Lab().run(**{f"SWEEPS_{name}": value for name, value in variables.items()})
    assert len(asked) == 3 and said.stdout.splitlines() == asked
    told = [(args.env_id, args.total_timesteps, args.utd_ratio, args.seed) for args in map(parse, asked)]
    assert told == [("walker-walk", 10, 8, 4)] * 3, "flags after -- win"
    assert "--jobs" in Lab().run("2a", SWEEPS_JOBS="none").stderr and "--seeds 1,2,3" in Lab().run("--help").stdout


def test_shellcheck():
    files = [ROOT / "sweeps.sh", ROOT / "tests" / "slurm.sh", *(ROOT / "sweep_list").rglob("*.sh")]
    assert len(files) > 12
    subprocess.run([Path(sys.executable).with_name("shellcheck"), "-x", *files], check=True)


def test_done_runs_are_skipped_and_longer_ones_go_on(lab):
    first = lab.run("2a", "2h", "--jobs", "3", *SMALL)
    assert first.returncode == 0 and "6 runs: 6 done" in first.stdout and len(lab.runs) == 6
    again = lab.run("2a", "2h", "2d", *SMALL)
    assert again.returncode == 0 and again.stdout.count("start ") == 2
    assert [len(starts(run)) for run in lab.runs] == [1] * 8
    assert lab.run("2a", "--report", "--seeds", "1,2,3", *SMALL).returncode == 0
    assert "4 of 6 runs, baseline 0 of 3" in (lab.cwd / "runs" / "report" / "report.md").read_text()
    lab.run("2h", "--report", "--export", "kept", *SMALL)
    assert len(list(lab.cwd.glob("kept/*2h*.csv"))) == 2
    assert lab.run("2h", "--", "--steps", "40").returncode == 0
    assert [len(starts(run)) for run in lab.runs if "2h" in run.name] == [2, 2]
    line = lab.dry_run("2d", "--", "--steps", "60")[0]  # a line runs as it stands
    subprocess.run(["bash", "-c", line], cwd=lab.cwd, env=environment(), check=True)
    assert [len(starts(run)) for run in lab.runs if "2d" in run.name] == [2, 1]


@pytest.mark.parametrize("code", [2, 137])  # 137: killed
def test_a_failed_run_is_told_and_the_others_go_on(lab, code):
    done = lab.run("2a", "--jobs", "2", *SMALL, FAKE_FAIL="1__2a_utd__utd_ratio_4", FAKE_CODE=code)
    assert done.returncode == 1 and done.stdout.endswith("4 runs: 3 done, 0 running, 1 failed, 0 waiting\n")
    line = re.search("FAILED .*", done.stdout)[0]
    assert f"exit code {code}" in line and "a loss is not finite" in line
    log = lab.cwd / re.search(r"runs/logs/\S+\.log", line)[0]
    assert "a loss is not finite" in log.read_text() and "--utd-ratio 4" in log.read_text()
    status = lab.run("2a", "--status", *SMALL)
    assert status.returncode == 1 and f"{log.relative_to(lab.cwd)}\n" in status.stdout
    assert lab.run("2a", *SMALL).returncode == 0  # tried again, from its checkpoint
    assert [start["tenth"] for run in lab.runs for start in starts(run) if len(starts(run)) > 1] == [0, 5]


# A terminal's Ctrl-C goes to the whole foreground process group
@pytest.mark.parametrize("send, number, jobs", [(os.killpg, signal.SIGINT, 2), (os.kill, signal.SIGTERM, 4)])
def test_a_signal_stops_the_runs_once_and_keeps_what_they_have(lab, send, number, jobs):
    process = lab.start("2a", "--jobs", jobs, *SMALL, FAKE_GATE=lab.cwd / "gate")
    stopped = lab.at_gate(jobs)
    send(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out.count("stopped ") == jobs and out.endswith("4 runs: 0 done, 0 running, 0 failed, 4 waiting\n")
    assert lab.runs == stopped, "no further run was begun"
    assert [(run / "signals").read_text() for run in stopped] == ["SIGTERM\n"] * jobs
    assert lab.run("2a", "--status", *SMALL).stdout.count(" 10/20 ") == jobs
    assert lab.run("2a", *SMALL).returncode == 0
    assert [len(starts(run)) for run in lab.runs] == [2 if run in stopped else 1 for run in lab.runs]
    assert [starts(run)[-1]["tenth"] for run in stopped] == [5] * jobs


def test_a_run_stopped_before_it_listens_is_not_failed(lab):
    (lab.project / "bmpc.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    process = lab.start("2d", *SMALL)
    patiently(lambda: any("begun" in log.read_text() for log in lab.cwd.glob("runs/logs/*.log")), lab)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "2 runs: 0 done, 0 running, 0 failed, 2 waiting" in out


def test_two_invocations_share_the_runs(lab):
    first = lab.start("2a", "--jobs", "2", *SMALL, FAKE_GATE=lab.cwd / "gate")
    lab.at_gate(2)
    status = lab.run("2a", "--status", *SMALL).stdout
    assert re.search(r"running +10/20 +\S+ +0 h 00 m", status) and "2 running, 0 failed, 2 waiting" in status
    second = lab.run("2a", "--jobs", "2", *SMALL)  # its own two have no gate
    assert second.returncode == 75 and second.stdout.count("elsewhere") == 2
    assert second.stdout.endswith("4 runs: 2 done, 2 running, 0 failed, 0 waiting\n")
    (lab.cwd / "gate").touch()
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and out.count("done ") == 4 and [len(starts(run)) for run in lab.runs] == [1] * 4
    told = ("} is in use by another process", "} holds a finished run")  # by which sweeps.sh knows them from failures
    assert all(words in (ROOT / f"{script}.py").read_text() for words in told for script in SCRIPTS)


def test_jobs_share_gpus_and_threads(lab):
    process = lab.start("2a", "--gpus", "3,7", *SMALL, FAKE_GATE=lab.cwd / "gate")
    begun = [starts(run)[0] for run in lab.at_gate(2)]  # as many at a time as there are GPUs
    assert {start["CUDA_VISIBLE_DEVICES"] for start in begun} == {"3", "7"}
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [start["OMP_NUM_THREADS"] for start in begun] == [threads] * 2
    (lab.cwd / "gate").touch()
    process.communicate(timeout=60)
    assert lab.run("2d", "--jobs", "2", *SMALL, OMP_NUM_THREADS=5).returncode == 0
    begun = [starts(run)[0] for run in lab.cwd.glob("runs/*2d*")]
    assert [(start["OMP_NUM_THREADS"], start["CUDA_VISIBLE_DEVICES"]) for start in begun] == [("5", None)] * 2


def test_submission_to_slurm(lab):
    """What sbatch is given, and that the tasks run the runs. Requeues need the real SLURM below."""
    assert lab.run("2d", *SMALL).returncode == 0
    (lab.cwd / "sbatch").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >words\n')
    (lab.cwd / "sbatch").chmod(0o755)
    options = ["--slurm", "--jobs", "3", "--sbatch", "--partition=gpu --time=1:00", "--seeds", "1,2,3", *SMALL]
    sent = {"PATH": f"{lab.cwd}:{os.environ['PATH']}"}
    assert lab.run("2d", "2a", *options, **sent).returncode == 0
    *words, wrap = (lab.cwd / "words").read_text().splitlines()
    assert {"--array=0-6%3", "--requeue", "--signal=B:USR1@120", "--partition=gpu", "--time=1:00"} <= set(words)
    for index in range(7):  # two runs of 2d are done; one and the six of 2a are due
        command, task = (
            ["sh", "-c", wrap.removeprefix("--wrap=")],
            environment(SLURM_ARRAY_JOB_ID="1", SLURM_ARRAY_TASK_ID=index),
        )
        assert subprocess.run(command, cwd=lab.cwd, env=task).returncode == 0
    assert [len(starts(run)) for run in lab.runs] == [1] * 9
    assert "nothing to do" in lab.run("2d", "2a", *options, **sent).stdout


@pytest.mark.skipif(not shutil.which("sbatch") or os.geteuid() != 0, reason="a real SLURM needs root and slurm-wlm")
def test_a_real_slurm(tmp_path):
    subprocess.run(["bash", ROOT / "tests" / "slurm.sh", tmp_path], env=environment(), check=True, timeout=300)
