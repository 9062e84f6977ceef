"""sweeps.sh: its runs are the plan's, and they finish: through failures, Ctrl-C, kills and second invocations."""

import dataclasses
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
import time
from collections import Counter
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["bmpc.py", "bmpc_multihead.py", "bmpc_dual_policy.py"]
HEADS = {"planner_num_dynamics_heads": 2, "ensemble_lr_scaling": True}

# The plan once more, written down apart from the folders: sweep -> script and each configuration's fields.
PLAN = {
    "1_test": ("bmpc.py", [{}]),
    "2a_utd": ("bmpc.py", [{"utd_ratio": 2}, {"utd_ratio": 4}]),
    "2b_multihead": (
        "bmpc_multihead.py",
        [
            HEADS | {"planner_value_std_coef_train": coef, "local_td_bootstrap": local}
            for coef, local in itertools.product([0, 0.3, 1], [False, True])
        ],
    ),
    "2c_expert_source": (
        "bmpc.py",
        [
            {"reanalyze_use_chosen_action": chosen, "initial_expert_from_behavior": behavior}
            for chosen, behavior in itertools.product([True, False], [True, False])
        ],
    ),
    "2d_num_rollouts": ("bmpc.py", [{"num_rollouts": 4}]),
    "2e_imagine_source": ("bmpc.py", [{"imagine_initial_source": "replay_true"}]),
    "2f_encoder_cons": ("bmpc.py", [{"encoder_consistency_coef": 0.1}, {"encoder_consistency_coef": 1}]),
    "2g_trust_region": (
        "bmpc.py",
        [
            {"td_target_use_ema_policy": True, "policy_trust_region_coef": coef, "policy_ema_tau": tau}
            for coef, tau in itertools.product([0.1, 1], [0.003, 0.01, 0.03])
        ],
    ),
    "2h_exploration": (
        "bmpc_dual_policy.py",
        [HEADS | {"planner_value_std_coef_train": 1, "local_td_bootstrap": True, "dual_policy_enabled": True}],
    ),
}


# --- helpers ---------------------------------------------------------------------------------------------------------


def args_of(script):
    """The script's own Args."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(Path(script).stem).Args
    finally:
        sys.path.remove(str(ROOT))


def parse(line):  # -> (script, fields)
    """A dry-run line's script, and the fields that the script's Args have after parsing it."""
    _python, script, *flags = shlex.split(line)
    args = tyro.cli(args_of(Path(script).name), args=flags)
    return Path(script).name, dataclasses.asdict(args)


def defaults(script):
    return dataclasses.asdict(tyro.cli(args_of(script), args=[]))


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if not re.match("SWEEPS_|SLURM|SBATCH|OMP_|MKL_|CUDA_|FAKE_", k)}
    return clean | {"PYTHON": sys.executable} | {k: str(v) for k, v in more.items()}


def sweeps(*arguments, cwd=ROOT, project=ROOT, **more):
    command = ["bash", str(Path(project) / "sweeps.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=120)


def dry_run(*arguments, **more):
    done = sweeps(*arguments[:1], "--dry-run", *arguments[1:], **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@dataclasses.dataclass
class Lab:
    """A copy of the sweeps with stand-ins for the scripts, and a directory to run them in. Both have a space in them."""

    project: Path
    cwd: Path

    def run(self, *arguments, **more):
        return sweeps(*arguments, cwd=self.cwd, project=self.project, **more)

    def start(self, *arguments, **more):
        command = ["bash", str(self.project / "sweeps.sh"), *arguments]
        return subprocess.Popen(
            command, cwd=self.cwd, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    @property
    def runs(self):
        return sorted(p for p in (self.cwd / "runs").glob("*__*"))

    def starts(self, run_dir):
        file = run_dir / "starts"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def at_gate(self):
        return [run for run in self.runs if '"tenth": 5' in (run / "checkpoint.pt").read_text()] if self.runs else []

    def wait_for(self, condition):
        for _ in range(3000):
            try:
                if condition():
                    return
            except FileNotFoundError:
                pass
            time.sleep(0.01)
        raise AssertionError("it never came to this")


@pytest.fixture
def lab(tmp_path):
    project, cwd = tmp_path / "a project", tmp_path / "my runs"
    cwd.mkdir()
    shutil.copytree(ROOT / "sweep_list", project / "sweep_list")
    shutil.copy(ROOT / "sweeps.sh", project)
    for script in SCRIPTS:
        shutil.copy(ROOT / "tests" / "fake_bmpc.py", project / script)
    return Lab(project, cwd)


# --- the runs are the plan's -----------------------------------------------------------------------------------------


def described(names):
    """The table's runs as comparable items: script, sweep, seed and the fields that are set."""
    return Counter(
        (script, sweep, seed, tuple(sorted(fields.items())))
        for sweep, (script, configurations) in PLAN.items()
        for fields in configurations
        for seed in (1, 2)
        if sweep in names
    )


def found(lines):
    """The same of the lines that sweeps.sh prints, read from their words alone."""
    items = []
    for line in lines:
        _python, script, *words = shlex.split(line)
        fields = {}
        while words:
            flag = words.pop(0).removeprefix("--")
            if words and not words[0].startswith("--"):
                value = words.pop(0)
                fields[flag] = float(value) if re.fullmatch(r"[\d.]+", value) else value
            else:
                fields[flag.removeprefix("no-")] = not flag.startswith("no-")
        assert fields.pop("task") == "dog-run" and fields.pop("steps") == 200_000
        sweep, seed = fields.pop("run-name").split("__")[0], fields.pop("seed")
        items.append((script, sweep, int(seed), tuple(sorted((k.replace("-", "_"), v) for k, v in fields.items()))))
    return Counter(items)


def test_dry_run_prints_the_plan():
    lines = dry_run("all")
    assert len(lines) == 46
    assert found(lines) == described(PLAN.keys() - {"1_test"})
    assert len({re.sub("--seed . ", "", line) for line in lines}) == 23


@pytest.mark.parametrize("sweep", PLAN)
def test_each_sweep_by_name_and_by_short_name(sweep):
    assert found(dry_run(sweep)) == described([sweep])
    assert dry_run(sweep.split("_")[0]) == dry_run(sweep)


def test_several_names_give_each_run_once():
    assert found(dry_run("all", "1_test", "2c", "2a")) == described(PLAN)


def test_run_names_are_stable_and_tell_the_runs_apart():
    names = [re.search(r"--run-name (\S+)", line)[1] for line in dry_run("all", "1_test")]
    assert Counter(names).most_common()[-1][1] == Counter(names).most_common()[0][1] == 2
    assert len(set(names)) == 24
    assert all(re.fullmatch(r"(1_test|2[a-h]_[a-z_]+)__[A-Za-z0-9_.-]+", name) for name in names)
    assert "2a_utd__utd_ratio_2" in names


def test_each_line_parses_to_the_fields_of_the_plan():
    """Through the script's own Args, and with all other fields at their defaults."""
    got = Counter()
    for line in dry_run("all", "1_test"):
        script, fields = parse(line)
        sweep = fields["run_name"].split("__")[0]
        base = defaults(script)
        named = {key for configuration in PLAN[sweep][1] for key in configuration}
        others = {k for k, v in fields.items() if v != base[k]} - named - {"seed", "run_name", "env_id", "total_timesteps"}
        assert not others, line
        assert (fields["env_id"], fields["total_timesteps"]) == ("dog-run", 200_000)
        got[script, sweep, fields["seed"], tuple(sorted((k, fields[k]) for k in named))] += 1
    assert got == described(PLAN)


TASKS = ["dog-run", "cup-catch", "finger-turn-easy", "ball_in_cup-catch", "pointmass-easy", "dm_control/walker-walk-v0",
         "cartpole-balance-sparse", "Pendulum-v1", "HalfCheetah-v5", "gymnasium:Pendulum-v1"]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_directories_are_the_scripts_own(script):
    sweep = {"bmpc.py": "2d", "bmpc_multihead.py": "2b", "bmpc_dual_policy.py": "2h"}[script]
    module = sys.modules[args_of(script).__module__]
    for task in TASKS if script == "bmpc.py" else TASKS[:1]:
        extra = ["--", "--task", task]
        parsed = [tyro.cli(module.Args, args=shlex.split(line)[2:]) for line in dry_run(sweep, *extra)]
        own = [module.run_directory(dataclasses.replace(a, env_id=module.resolve_env_id(a.env_id))).name for a in parsed]
        shown = sweeps(sweep, "--status", *extra, cwd="/").stdout
        assert re.findall(r"waiting.* (\S+__\S+)", shown) == own, task


def test_2c_on_on_is_the_baseline():
    lines = [line for line in dry_run("2c") if "chosen_action_on__from_behavior_on" in line]
    own = [parse(line)[1] | {"run_name": ""} for line in lines]
    baseline = [parse(line)[1] | {"run_name": ""} for line in dry_run("1_test")]
    assert len(own) == 2 and own == baseline


def test_extra_flags_reach_every_run_and_win():
    for line in dry_run("all", "1_test", "--", "--task", "cartpole-swingup", "--total-timesteps=6_000", "--no-compile"):
        _script, fields = parse(line)
        assert (fields["env_id"], fields["total_timesteps"], fields["compile"]) == ("cartpole-swingup", 6000, False)


def test_small_ablations_are_the_plan_at_the_small_size():
    """Each of the plan's 48 runs, with the small settings and nothing else changed."""
    said = [(ROOT / "sweep_list/0_cpu" / file).read_text() for file in ("settings.sh", "0_ablations/sweep.sh")]
    words = shlex.split(" ".join(re.findall(r"^flags ([^#\n]*)", "\n".join(said), re.M)))
    got, expected = [], []
    for line in dry_run("0_ablations"):
        script, fields = parse(line)
        got.append((script, fields | {"run_name": fields["run_name"].removeprefix("0_ablations__")}))
    for line in dry_run("all", "1_test"):
        expected.append(parse(f"{line} {shlex.join(words)}"))
    assert {"--steps", "--task", "--mlp-dim"} <= set(words)
    order = str
    assert sorted(got, key=order) == sorted(expected, key=order)


def test_small_baseline():
    runs = [parse(line)[1] for line in dry_run("0_baseline")]
    tasks = ["cartpole-swingup", "walker-walk", "reacher-easy", "finger-spin", "cheetah-run"]
    assert {(run["env_id"], run["seed"]) for run in runs} == set(itertools.product(tasks, [1, 2, 3])) and len(runs) == 15


def test_the_document_agrees_with_the_folders():
    plan = ROOT / "sweep_list" / "7_bmpc_equivalence"
    text = (plan / "ABLATION_SWEEPS.md").read_text()
    rows = re.findall(r"^\| (2[a-h]\w*) \|.*\| (\d+) \| (\d+) \|", text, re.M)
    assert {name: (int(configurations), int(runs)) for name, configurations, runs in rows} == {
        sweep: (len(configurations), 2 * len(configurations))
        for sweep, (_, configurations) in PLAN.items()
        if sweep != "1_test"
    }
    for folder in (path.parent for path in plan.glob("*/sweep.sh")):
        question = re.search(r'^question "(.*)"', (folder / "sweep.sh").read_text(), re.M)[1]
        assert folder.name in text and question in text, folder


def test_a_new_folder_is_a_new_sweep(lab):
    folder = lab.project / "sweep_list" / "7_bmpc_equivalence" / "3a_combined"
    folder.mkdir()
    shutil.copy(ROOT / "sweep_list" / "template.sh", folder / "sweep.sh")
    lines = dry_run("3a", cwd=lab.project, project=lab.project)
    assert len(lines) == 8 and len(dry_run("all", cwd=lab.project, project=lab.project)) == 54
    fields = [parse(line)[1] for line in lines]
    assert {(f["planner_value_std_coef_train"], f["td_target_use_ema_policy"]) for f in fields} == set(
        itertools.product([0.3, 1], [True, False])
    )


# --- the command line ------------------------------------------------------------------------------------------------


def test_lines_run_as_they_stand(lab):
    (line, _) = lab.run("2d", "--dry-run").stdout.splitlines()
    subprocess.run(["bash", "-c", line], cwd=lab.cwd, env=environment(), check=True)
    assert [run.name for run in lab.runs] == ["dog-run__bmpc__1__2d_num_rollouts__num_rollouts_4"]
    (line, _) = sweeps("2d", "--dry-run", cwd=lab.project, project=lab.project).stdout.splitlines()
    assert shlex.split(line)[1] == "bmpc.py"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "which sweep"),
        (["2z"], "0_ablations 0_baseline 0_dog_run 1_test 2a_utd 2b_multihead"),
        (["0"], "3 sweeps"),
        (["2a", "--jobs", "0"], "--jobs"),
        (["2a", "--jobs"], "--jobs"),
        (["2a", "--gpus", "0,"], "--gpus"),
        (["2a", "--job", "2"], "--job"),
        (["2a", "--", "--seed", "3"], "--seed"),
        (["2a", "--", "--run_name=x"], "--run-name"),
        (["2a", "--", "--steps", "many"], "--steps"),
        (["2a", "--slurm", "--gpus", "0"], "--gres"),
    ],
)
def test_bad_input_is_one_line_and_code_2(lab, arguments, words):
    done = lab.run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert not lab.runs


def test_configurations_of_one_name_are_refused(lab):
    with open(lab.project / "sweep_list" / "7_bmpc_equivalence" / "2a_utd" / "sweep.sh", "a") as file:
        file.write("run bmpc.py utd_ratio_2 --utd-ratio 8\n")
    done = lab.run("2a")
    assert done.returncode == 2 and "share runs/dog-run__bmpc__1__2a_utd__utd_ratio_2" in done.stderr


def test_environment_variables_say_the_same():
    flags = ["--task", "walker-walk", "--steps", "10"]
    asked = sweeps("2a", "1_test", "--dry-run", "--", *flags).stdout
    assert asked and sweeps(SWEEPS_NAMES="2a 1_test", SWEEPS_MODE="dry-run", SWEEPS_FLAGS=" ".join(flags)).stdout == asked
    assert "--jobs" in sweeps("2a", SWEEPS_JOBS="none").stderr
    assert "--gpus" in sweeps("2a", SWEEPS_GPUS=",").stderr


def test_help():
    text = sweeps("--help").stdout
    options = ["--dry-run", "--status", "--report", "--slurm", "--sbatch", "--jobs", "--gpus", "--reference", "--export"]
    assert all(option in text for option in options) and "set -euo" not in text


def test_shellcheck():
    files = [ROOT / "sweeps.sh", ROOT / "tests" / "slurm.sh", *(ROOT / "sweep_list").rglob("*.sh")]
    assert len(files) > 12
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- the runs finish -------------------------------------------------------------------------------------------------

SMALL = ["--", "--steps", "20"]


def test_done_runs_are_skipped_and_longer_ones_go_on(lab):
    first = lab.run("2a", "2h", "--jobs", "3", *SMALL)
    assert first.returncode == 0 and "6 runs: 6 done" in first.stdout
    assert len(lab.runs) == 6 and all((run / "finished.json").exists() for run in lab.runs)
    again = lab.run("2a", "2h", *SMALL)
    assert again.returncode == 0 and again.stdout.count("skip ") == 6
    assert all(len(lab.starts(run)) == 1 for run in lab.runs)
    longer = lab.run("2h", "--", "--steps", "40")
    assert longer.returncode == 0
    assert [len(lab.starts(run)) for run in lab.runs if "2h" in run.name] == [2, 2]


@pytest.mark.parametrize("code", [1, 2, 255])
def test_a_failed_run_is_told_and_the_others_go_on(lab, code):
    done = lab.run("2g", *SMALL, FAKE_FAIL="1__2g_trust_region__coef_0.1__tau_0.01", FAKE_CODE=code)
    assert done.returncode == 1 and "12 runs: 11 done, 1 failed, 0 unfinished" in done.stdout
    line = re.search("FAILED .*", done.stdout)[0]
    assert f"exit code {code}" in line and "a loss is not finite" in line
    log = lab.cwd / re.search(r"runs/logs/\S+\.log", line)[0]
    assert "a loss is not finite" in log.read_text() and "--policy-ema-tau 0.01" in log.read_text()
    status = lab.run("2g", "--status", *SMALL).stdout
    assert status.endswith("12 runs: 11 done, 0 running, 1 failed, 0 waiting\n") and f"exit code {code}" in status
    again = lab.run("2g", *SMALL)  # tried again from its checkpoint
    assert again.returncode == 0
    (failed,) = [run for run in lab.runs if len(lab.starts(run)) == 2]
    assert lab.starts(failed)[1]["tenth"] == 5 and failed.name in line


def test_a_run_that_ends_well_without_finishing_is_failed(lab):
    (lab.project / "bmpc.py").write_text("print('nothing to do')\n")
    done = lab.run("2d", *SMALL)
    assert done.returncode == 1 and "2 runs: 0 done, 2 failed" in done.stdout and done.stdout.count("FAILED ") == 2


def test_a_killed_run_is_told_and_the_others_go_on(lab):
    gate = lab.cwd / "gate"
    process = lab.start("2a", *SMALL, FAKE_GATE=gate)
    lab.wait_for(lambda: len(lab.at_gate()) == 1)
    first = lab.at_gate()[0]
    (pid,) = holders(first)
    os.kill(pid, signal.SIGKILL)
    gate.touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "4 runs: 3 done, 1 failed" in out and "exit code 137" in out
    subprocess.run(["flock", lab.cwd / "runs" / "logs" / f"{first.name}.lock", "true"])  # until its worker has gone too
    assert lab.run("2a", *SMALL).returncode == 0
    assert [start["tenth"] for start in lab.starts(first)] == [0, 5]


def holders(run_dir):
    """The processes that hold the run's lock, as the system lists them."""
    inode = (run_dir / "lock").stat().st_ino
    return [int(pid) for pid in re.findall(rf"POSIX\s+ADVISORY\s+WRITE (\d+) \S+:{inode} ", Path("/proc/locks").read_text())]


@pytest.mark.parametrize("how, code", [("SIGINT", 130), ("SIGTERM", 143), ("terminal", 130)])
def test_a_signal_stops_the_runs_once_and_keeps_what_they_have(lab, how, code):
    process = lab.start("2a", "--jobs", "2", *SMALL, FAKE_GATE=lab.cwd / "gate")
    lab.wait_for(lambda: len(lab.at_gate()) == 2)
    if how == "terminal":  # Ctrl-C goes to the whole foreground process group
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.Signals[how])
    assert process.wait(timeout=60) == code
    assert not any(map(holders, lab.runs)), "it waits for its runs"
    out, _ = process.communicate()
    assert "4 runs: 0 done, 0 failed, 4 unfinished" in out
    assert len(lab.runs) == 2, "no further run was begun"
    for run in lab.runs:
        assert (run / "signals").read_text() == "SIGTERM\n"
    status = lab.run("2a", "--status", *SMALL).stdout
    assert status.endswith("4 runs: 0 done, 0 running, 0 failed, 4 waiting\n") and status.count(" 10/20 ") == 2
    assert lab.run("2a", *SMALL).returncode == 0
    assert sorted(tuple(start["tenth"] for start in lab.starts(run)) for run in lab.runs) == [(0,), (0,), (0, 5), (0, 5)]


def test_a_run_stopped_before_it_listens_is_not_failed(lab):
    (lab.project / "bmpc.py").write_text("import time\nopen('begun', 'w').close()\ntime.sleep(60)\n")
    process = lab.start("2d", *SMALL)
    lab.wait_for((lab.cwd / "begun").exists)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "2 runs: 0 done, 0 failed, 2 unfinished" in out


def test_two_invocations_share_the_runs(lab):
    gate = lab.cwd / "gate"
    first = lab.start("2a", "--jobs", "2", *SMALL, FAKE_GATE=gate)
    lab.wait_for(lambda: len(lab.at_gate()) == 2)
    status = lab.run("2a", "--status", *SMALL).stdout
    assert status.endswith("4 runs: 0 done, 2 running, 0 failed, 2 waiting\n")
    second = lab.run("2a", "--jobs", "2", *SMALL)  # its own two have no gate
    assert (
        second.returncode == 75 and second.stdout.count("elsewhere") == 2 and "2 done, 0 failed, 2 unfinished" in second.stdout
    )
    gate.touch()
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and out.count("skip ") == 2
    assert [len(lab.starts(run)) for run in lab.runs] == [1] * 4


def test_a_run_started_by_hand_is_running(lab):
    line = lab.run("2d", "--dry-run", *SMALL).stdout.splitlines()[0]
    gate = lab.cwd / "gate"
    process = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=lab.cwd, env=environment(FAKE_GATE=gate))
    lab.wait_for(lambda: len(lab.at_gate()) == 1)
    status = lab.run("2d", "--status", *SMALL).stdout
    assert "1 running" in status and re.search(r"running +10/20 +\S+ +0 h 00 m", status)
    gate.touch()
    assert process.wait(timeout=60) == 0
    assert "1 done" in lab.run("2d", "--status", *SMALL).stdout


def test_jobs_share_gpus_and_threads(lab):
    process = lab.start("2a", "--gpus", "3,7", *SMALL, FAKE_GATE=lab.cwd / "gate")
    lab.wait_for(lambda: len(lab.at_gate()) == 2)  # as many at a time as there are GPUs
    starts = [lab.starts(run)[0] for run in lab.runs]
    assert {start["CUDA_VISIBLE_DEVICES"] for start in starts} == {"3", "7"}
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert all(start["OMP_NUM_THREADS"] == start["MKL_NUM_THREADS"] == threads for start in starts)
    process.terminate()
    process.communicate(timeout=60)
    assert lab.run("2d", "--jobs", "2", *SMALL, OMP_NUM_THREADS=5).returncode == 0
    for run in lab.cwd.glob("runs/*2d*"):
        start = lab.starts(run)[0]
        assert (start["OMP_NUM_THREADS"], start["MKL_NUM_THREADS"], start["CUDA_VISIBLE_DEVICES"]) == ("5", "5", None)


# --- SLURM -----------------------------------------------------------------------------------------------------------


def fake_command(folder, name, says=""):
    """A command that notes how it was called."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" >>'{folder}/{name}.calls'\necho {says}\n")
    (folder / name).chmod(0o755)
    return folder / f"{name}.calls"


def test_submission(lab):
    calls = fake_command(lab.cwd / "bin", "sbatch")
    path = f"{calls.parent}:{os.environ['PATH']}"
    assert lab.run("2d", *SMALL).returncode == 0
    sent = lab.run("2d", "2a", "--slurm", "--jobs", "3", "--sbatch", "--partition=gpu --time=1:00", *SMALL, PATH=path)
    assert sent.returncode == 0
    words = calls.read_text().splitlines()
    wanted = ["--array=0-3%3", "--requeue", "--signal=B:USR1@120", "--open-mode=append", "--partition=gpu", "--time=1:00"]
    assert set(wanted) <= set(words), "the two runs of 2d are done, the four of 2a are due"
    (wrap,) = [word.removeprefix("--wrap=") for word in words if word.startswith("--wrap=")]
    tasks = [lab_task(lab, wrap, index, path) for index in range(4)]
    assert [task.returncode for task in tasks] == [0] * 4
    assert sum("2a_utd" in run.name for run in lab.runs) == 4
    calls.unlink()
    assert "nothing to submit" in lab.run("2d", "2a", "--slurm", *SMALL, PATH=path).stdout and not calls.exists()


def lab_task(lab, wrap, index, path, **more):
    slurm = {"SLURM_ARRAY_TASK_ID": index, "SLURM_JOB_ID": 70 + index, "PATH": path}
    command = ["sh", "-c", wrap]
    return subprocess.run(command, cwd=lab.cwd, env=environment(**slurm, **more), capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "code, restarts, state, requeued",
    [
        (75, 0, "RUNNING", True),
        (75, 50, "RUNNING", True),
        (75, 0, "COMPLETING", False),  # cancelled
        (137, 0, "RUNNING", True),
        (137, 20, "RUNNING", False),  # it keeps dying
        (1, 0, "RUNNING", False),
        (2, 0, "RUNNING", False),
    ],
)
def test_what_is_requeued(lab, code, restarts, state, requeued):
    sbatch, scontrol = fake_command(lab.cwd / "bin", "sbatch"), fake_command(lab.cwd / "bin", "scontrol")
    fake_command(lab.cwd / "bin", "squeue", state)
    path = f"{sbatch.parent}:{os.environ['PATH']}"
    lab.run("2d", "--slurm", *SMALL, PATH=path)
    wrap = sbatch.read_text().split("--wrap=")[1]
    task = lab_task(lab, wrap, 1, path, FAKE_FAIL="2d", FAKE_CODE=code, SLURM_RESTART_COUNT=restarts)
    assert task.returncode == code
    assert (scontrol.read_text().split() if scontrol.exists() else []) == (["requeue", "71"] if requeued else [])


@pytest.mark.skipif(
    shutil.which("sbatch") is None or os.geteuid() != 0, reason="a real SLURM needs root and sbatch (slurm-wlm)"
)
def test_a_real_slurm(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "tests" / "slurm.sh", tmp_path], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
