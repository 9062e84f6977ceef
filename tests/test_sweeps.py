"""sweeps.sh: its runs are those of the plan, and they finish despite failures, signals and concurrent invocations."""

import dataclasses
import fcntl
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
import termios
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from runs import patiently

import bmpc

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

# The plan, written down independently of the folders: sweep -> script and the values of its flags.
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
SHORT = ["--", "--steps", "20"]
TIMEOUT = 300  # seconds after which a command counts as hanging


def environment(**changes):
    """This process's environment without variables that change what sweeps.sh does; None removes a variable."""
    clean = {k: v for k, v in os.environ.items() if not re.match("SLURM|SBATCH|OMP_|CUDA_|FAKE_", k)}
    changed = clean | {"PYTHON": sys.executable} | changes
    return {name: str(value) for name, value in changed.items() if value is not None}


def write_executable(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@dataclasses.dataclass
class Lab:
    """A project with sweeps, and the current directory of the commands."""

    project: Path = ROOT
    cwd: Path = ROOT

    def start(self, *arguments, how=subprocess.Popen, streams=subprocess.PIPE, preexec_fn=None, **variables):
        """Starts sweeps.sh, as the leader of a session."""
        command = ["bash", self.project / "sweeps.sh", *map(str, arguments)]
        options = {"stdout": streams, "stderr": streams, "text": True, "start_new_session": True}
        return how(command, cwd=self.cwd, env=environment(**variables), preexec_fn=preexec_fn, **options)

    def run(self, *arguments, **variables):
        return self.start(*arguments, how=functools.partial(subprocess.run, timeout=TIMEOUT), **variables)

    def dry_run(self, *arguments, **variables):
        done = self.run("--dry-run", *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def add_sweep(self, text, name="3a_combined", group="7_bmpc_equivalence"):
        folder = self.project / "sweep_list" / group / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sweep.sh").write_text(text)
        return folder

    def stub_slurm(self):
        """Commands of SLURM that write their arguments to `sbatch.args` and `scontrol.args`; every task is running."""
        for name in ("sbatch", "scontrol"):
            write_executable(self.cwd / "bin" / name, f'printf "%s\\n" "$@" >{name}.args')
        write_executable(self.cwd / "bin" / "squeue", "echo RUNNING")
        return f"{self.cwd / 'bin'}:{os.environ['PATH']}"

    @property
    def runs(self):
        return sorted((self.cwd / "runs").glob("*__*"))

    def wait_at_gate(self, number):
        """Waits until this many runs have reached FAKE_GATE. Returns their directories."""
        files = lambda: sorted(self.cwd.glob("runs/*/checkpoint.pt"))
        halfway = lambda: [file.parent for file in files() if '"tenth": 5' in file.read_text()]
        patiently(lambda: len(halfway()) == number, self)
        return halfway()

    def end_stopped(self, process, run_dirs):
        """Opens FAKE_STOP_GATE once each run has received a signal and nobody has another one to pass on."""
        senders = [process.pid, *(starts(run)[-1]["parent"] for run in run_dirs)]
        patiently(lambda: all((run / "signals").exists() for run in run_dirs) and all(map(is_idle, senders)), self)
        (self.cwd / "stop_gate").touch()


def is_idle(pid):
    """Tells whether a process sleeps and has handled all its signals."""
    status = Path(f"/proc/{pid}/status").read_text()
    return "State:\tS" in status and not re.search("(SigPnd|ShdPnd):\t0*[1-9a-f]", status)


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
def parse_flags(script, *flags):
    return importlib.import_module(script).parse_args(flags)


def parse(line):
    """The Args that a script makes of a command line. Parsing is slow and cached, so the seed is set afterwards."""
    _python, script, *flags = shlex.split(line)
    k = flags.index("--seed")
    args = parse_flags(Path(script).stem, *flags[:k], *flags[k + 2 :])
    return dataclasses.replace(args, seed=int(flags[k + 1]))


def expected_runs(names, seeds=(1, 2)):
    """The Args of the plan's runs with the sweep as run_name; what the plan does not name has its default."""
    runs = Counter()
    for name, seed in itertools.product(names, seeds):
        script, flags = PLAN[name]
        common = {"env_id": "dog-run", "total_timesteps": 200_000, "seed": seed, "run_name": name}
        for values in itertools.product(*flags.values()):
            runs[importlib.import_module(script).Args(**common, **dict(zip(flags, values)))] += 1
    return runs


def parsed_runs(lines):
    """The same for the lines that sweeps.sh prints."""
    return Counter(dataclasses.replace(args, run_name=args.run_name.split("__")[0]) for args in map(parse, lines))


# --- Which runs


def test_dry_run_prints_the_plan():
    lines = Lab().dry_run("all")
    assert len(lines) == 46 and parsed_runs(lines) == expected_runs(PLAN.keys() - {"1_test"})
    short_names = (sweep.split("_")[0] for sweep in PLAN)
    assert parsed_runs(Lab().dry_run(*short_names, "all", "2a_utd")) == expected_runs(PLAN)


def test_seeds():
    """They replace those of the settings and of a sweep that has its own, and apply to included sweeps."""
    lines = Lab().dry_run("2c", "1_test", "--seeds", "1,2,3,4,5")
    assert parsed_runs(lines) == expected_runs(["1_test", "2c_expert_source"], (1, 2, 3, 4, 5))
    seed_of = lambda line: int(re.search(r" --seed (\d+) ", line)[1])
    numbers = {"0_dog_run": 1, "0_baseline": 5, "0_ablations": 24, "0_rehearsal": 24, "0_3a_combined": 2}
    numbers |= {"0_tdmpc2": 10, "0_dog_run_25k": 2, "0_dog_run_25k_utd": 2, "0_dog_run_25k_dual": 2}
    for sweep, number in numbers.items():
        lines = Lab().dry_run(sweep, "--seeds", "7,9")
        assert Counter(seed_of(line) for line in lines) == {7: number, 9: number}
    seeds = Counter(seed_of(line) for line in Lab().dry_run("0_ablations"))
    assert seeds == dict.fromkeys(range(1, 9), 24) | dict.fromkeys(range(9, 31), 1)  # more seeds of the baseline
    status = Lab(cwd=Path("/")).run("2d", "--status", "--seeds=3,4,5")
    assert re.findall(r"waiting.*__bmpc__(\d)__2d", status.stdout) == ["3", "4", "5"] and status.returncode == 75


@pytest.mark.parametrize(
    "sweeps, counts",
    [
        (["0_3a_combined"], ["10 runs, baseline 0 of 10"]),
        (["0_dog_run_25k_dual"], ["8 runs, baseline 0 of 8", "8 runs"]),  # the section of the baseline follows
        (["0_dog_run_25k", "1_test"], ["8 runs, baseline 0 of 8", "2 runs"]),  # not the plan's 1_test
    ],
    ids=str,
)
def test_a_sweep_is_compared_with_the_baseline_that_it_names_or_has(tmp_path, sweeps, counts):
    assert Lab(cwd=tmp_path).run(*sweeps, "--report").returncode == 0
    page = (tmp_path / "runs/report/report.md").read_text()
    assert re.findall(r"enough data\*\*: 0 of (.*)", page)[: len(counts)] == counts


def test_td_mpc2_runs_beside_the_runs_of_the_small_baseline():
    """25 runs of each script; BMPC's are those of 0_baseline, with two more seeds."""
    lines = Lab().dry_run("0_tdmpc2")
    assert Counter(Path(shlex.split(line)[1]).name for line in lines) == {"tdmpc2.py": 25, "bmpc.py": 25}
    assert set(Lab().dry_run("0_baseline")) < set(lines)


@pytest.mark.parametrize(
    "flags",  # with each spelling that the scripts accept
    [
        "--task cup-catch --steps 300_000",
        "--task=finger-turn-easy --steps=400",
        "--env-id pointmass-easy --total-timesteps 300_000",
        "--env_id dm_control/walker-walk-v0 --total_timesteps 400",
        "--env-id=gymnasium:Pendulum-v1 --total-timesteps=2_000",
        "--env_id=a_module:ML1-train --total_timesteps=400",
    ],
)
def test_run_directories_and_lengths_are_those_of_the_scripts(flags):
    arguments = ["2d", "2h", "--", *flags.split()]
    runs = list(map(parse, Lab().dry_run(*arguments)))
    resolved = [dataclasses.replace(run, env_id=bmpc.resolve_env_id(run.env_id)) for run in runs]
    expected = [(str(run.total_timesteps), bmpc.run_directory(run).name) for run in resolved]
    status = Lab(cwd=Path("/")).run("--status", *arguments).stdout
    assert len(runs) == 4 and re.findall(r"waiting +0/(\d+) .* (\S+__\S+)", status) == expected


def test_the_document_agrees_with_the_folders():
    plan = ROOT / "sweep_list" / "7_bmpc_equivalence"
    text = (plan / "ABLATION_SWEEPS.md").read_text()
    rows = re.findall(r"^\| (2[a-h]\w*) \|.*\| (\d+) \| (\d+) \|", text, re.M)
    sizes = {sweep: len(expected_runs([sweep])) for sweep in PLAN if sweep != "1_test"}
    assert {name: (int(a), int(b)) for name, a, b in rows} == {name: (n // 2, n) for name, n in sizes.items()}
    for file in plan.glob("*/sweep.sh"):
        question = re.search(r'^question "(.*)"', file.read_text(), re.M)[1]
        assert file.parent.name in text and question in text, file


def test_a_new_folder_is_a_new_sweep(lab):
    lab.add_sweep((ROOT / "sweep_list" / "template.sh").read_text())
    runs = [parse(line) for line in lab.dry_run("3a")]
    assert len(lab.dry_run("all")) == 54 and all(args.planner_num_dynamics_heads == 2 for args in runs)
    varied = {(args.planner_value_std_coef_train, args.td_target_use_ema_policy, args.seed) for args in runs}
    assert varied == set(itertools.product([0.3, 1], [True, False], [1, 2]))
    assert len(lab.dry_run("0_ablations")) == len(Lab().dry_run("0_ablations"))  # a registered sweep stays as it is


def test_a_complete_name_is_preferred_to_the_beginning_of_another(lab):
    lab.add_sweep("run bmpc.py best", name="2a")
    lines = lab.dry_run("2a", "2a_utd", "--seeds", "1")
    assert [re.search("--run-name (2a.*?)__", line)[1] for line in lines] == ["2a", "2a_utd", "2a_utd"]


def test_all_includes_each_sweep_of_the_plan_s_group_but_its_baseline(lab):
    lab.add_sweep("run bmpc.py mine", "10_mine")
    assert sum("10_mine" in line for line in lab.dry_run("all")) == 2 and len(lab.dry_run("all")) == 48


def test_patterns_and_variables_of_a_sweep(lab):
    """An unquoted pattern is not lost; a variable that sweeps.sh itself needs is refused."""
    lab.add_sweep("include 7_bmpc_equivalence 2d*")
    assert [re.search("--run-name (3a_combined__2d)", line) is None for line in lab.dry_run("3a")] == [False] * 2
    lab.add_sweep("for mode in mean sum; do run bmpc.py $mode --kl-reduction $mode; done")
    done = lab.run("3a", "--dry-run")
    assert done.returncode != 0 and "mode: readonly variable" in done.stderr and done.stdout == ""


def test_flags_after_two_dashes_override_those_of_the_sweeps():
    flags = ["--task", "walker-walk", "--steps", "10", "--utd-ratio", "8"]
    lines = Lab().dry_run("2a", "1_test", "--seeds", "4", "--", *flags)
    values = [(args.env_id, args.total_timesteps, args.utd_ratio, args.seed) for args in map(parse, lines)]
    assert values == [("walker-walk", 10, 8, 4)] * 3
    assert "--seeds 1,2,3" in Lab().run("--help").stdout


def test_commas_and_white_space_of_any_kind_separate_seeds():
    assert Lab().dry_run("2a", "--seeds", " 3\n4,\t5 ") == Lab().dry_run("2a", "--seeds", "3,4,5")


# --- Messages: each is one line, and what it advises works


DRY_RUN = ["2a", "--dry-run"]
ARGUMENT_MESSAGES = {  # arguments that are wrong -> the message ("...": anything), arguments that follow its advice
    "": (
        "no sweep is named; bash sweeps.sh all runs the plan, bash sweeps.sh --help lists the options",
        [["all", "--dry-run"], ["--help"]],
    ),
    "2a --job 2": (
        "unknown option --job; bash sweeps.sh --help lists the options, and flags of the runs come after --",
        [["--help"], [*DRY_RUN, "--", "--job", "2"]],
    ),
    "2a --seeds": ("--seeds needs a value", [[*DRY_RUN, "--seeds", "1"]]),
    "2a --jobs 0": ("--jobs must be a whole number above 0, not '0'", [[*DRY_RUN, "--jobs", "1"]]),
    "2a --gpus 0,": ("--gpus must be a list such as 0,1, not '0,'", [[*DRY_RUN, "--gpus", "0,1"]]),
    "2a --gpus 0,,1": ("--gpus must be a list such as 0,1, not '0,,1'", [[*DRY_RUN, "--gpus", "0,1"]]),
    "2a --seeds 1,two": ("--seeds must be a list such as 1,2,3, not '1,two'", [[*DRY_RUN, "--seeds", "1,2,3"]]),
    "2a --seeds 08,09": ("--seeds must be a list such as 1,2,3, not '08,09'", [[*DRY_RUN, "--seeds", "8,9"]]),
    "2a --slurm --gpus 0": (
        '--gpus is for this machine; with --slurm use --sbatch "--gres=gpu:1"',
        [["2a", "--slurm", "--sbatch", "--gres=gpu:1"]],
    ),
    "2a --axis hours --report": (
        "--axis must be decisions, updates or seconds, not 'hours'",
        [["2a", "--report", "--axis", axis] for axis in ("decisions", "updates", "seconds")],
    ),
    "2a --axis updates": ("--axis needs --report", [["2a", "--axis", "updates", "--report"]]),
    "2a --export kept": ("--export needs --report", [["2a", "--export", "kept", "--report"]]),
    "2a -- --seed 3": (
        "the sweeps set --seed, --run-name and --exp-name; for other seeds use --seeds 1,2,3 before --",
        [[*DRY_RUN, "--seeds", "1,2,3", "--"]],
    ),
    "2a -- --run_name=x": ("the sweeps set --seed, --run-name and --exp-name; ...", []),
    "2a -- --steps many": ("2a_utd: each run needs --task and --steps, a whole number", [[*DRY_RUN, *SHORT]]),
}
SWEEP_MESSAGES = {  # a sweep.sh that is wrong -> the message, a sweep.sh that follows its advice
    "": (
        "3a: no runs; add a line 'run SCRIPT CONFIGURATION FLAG...' to the sweep.sh",
        "run bmpc.py one --horizon 2",
    ),
    "seeds\nrun bmpc.py one": (
        "3a_combined has no seeds; add the line 'seeds 1 2' to its sweep.sh, or use --seeds 1,2",
        "seeds 1 2\nrun bmpc.py one",
    ),
    "run bmpc.py one --horizon 2\nrun bmpc.py one --horizon 3": (
        "two configurations of 3a_combined have the name one; give them different names",
        "run bmpc.py one --horizon 2\nrun bmpc.py two --horizon 3",
    ),
    "run bmpc.py one\nrun tdmpc2.py one": (
        "two configurations of 3a_combined have the name one; give them different names",
        "run bmpc.py one\nrun tdmpc2.py two",
    ),
    "include 7_bmpc_equivalence 2z": (
        "3a_combined includes 7_bmpc_equivalence 2z, which is not in ...; name a GROUP or a GROUP and a SWEEP of it",
        "include 7_bmpc_equivalence 2a_utd\ninclude 0_cpu 0_dog_run",
    ),
}
ADVICE = "activate the virtual environment, or set PYTHON to its interpreter"
OTHER_MESSAGES = {
    "unknown": "there is no sweep '2z'; the sweeps are: all ...",
    "ambiguous": "'0' is the beginning of several names; give one or more of: ...",
    "duplicate": "several sweeps are named '2a_utd'; rename all but one of: ...",
    "python": f"there is no Python interpreter 'python'; {ADVICE}",
    "packages": f"... cannot import all of numpy scipy torch; {ADVICE}",
    "sbatch": "there is no sbatch here, which --slurm needs; without --slurm the runs start here",
}


def check_message(done, message):
    """Invalid input: exit code 2, and one line on standard error alone."""
    assert done.returncode == 2 and done.stdout == "", done
    pattern = ".*".join(map(re.escape, f"sweeps.sh: {message}\n".split("...")))
    assert re.fullmatch(pattern, done.stderr), done.stderr


@pytest.mark.parametrize("wrong", ARGUMENT_MESSAGES)
def test_wrong_arguments_are_refused_with_advice_that_works(lab, wrong):
    message, fixes = ARGUMENT_MESSAGES[wrong]
    (lab.project / "sweep_list" / "report.py").write_text(STUB_REPORT)
    path = lab.stub_slurm()
    check_message(lab.run(*wrong.split(), PATH=path), message)
    assert not (lab.cwd / "runs").exists(), "nothing is created before"
    for arguments in fixes:
        done = lab.run(*arguments, PATH=path)
        assert done.returncode == 0 and done.stderr == "", arguments


STUB_REPORT = """\
import sys
assert sys.flags.utf8_mode, "report.py would start itself again"
print("arguments:", *sys.argv[1:])
sys.stdout.writelines(sys.stdin)
"""


@pytest.mark.parametrize("wrong", SWEEP_MESSAGES)
def test_a_wrong_sweep_is_refused_with_advice_that_works(lab, wrong):
    message, fixed = SWEEP_MESSAGES[wrong]
    lab.add_sweep(wrong)
    check_message(lab.run("3a"), message)
    lab.add_sweep(fixed)
    assert len(lab.dry_run("3a")) > 1


def test_names_that_a_message_offers_are_sweeps(lab):
    for name, message in (("2z", "unknown"), ("0", "ambiguous")):
        done = lab.run(name)
        check_message(done, OTHER_MESSAGES[message])
        offered = done.stderr.split(": ")[-1].split()
        assert len(offered) >= 7 and len(lab.dry_run(*offered, "--seeds", "1")) >= 7
    folder = lab.add_sweep("run bmpc.py one", name="2a_utd", group="9_mine")
    done = lab.run("2a_utd")
    check_message(done, OTHER_MESSAGES["duplicate"])
    assert str(folder) in done.stderr
    folder.rename(folder.with_name("1_first"))
    assert len(lab.dry_run("2a_utd")) == 4
    first = ["1_first", "--seeds", "1", "--", "--task", "dog-run", "--steps", "20"]  # this group has no settings.sh
    assert len(lab.dry_run(*first)) == 1
    assert [lab.run(*mode, *first).returncode for mode in (["--status"], [])] == [75, 0]


def test_every_message_is_followed():
    """The tables above have each message of `die`."""
    messages = [message for message, _ in [*ARGUMENT_MESSAGES.values(), *SWEEP_MESSAGES.values()]]
    messages += OTHER_MESSAGES.values()
    source = (ROOT / "sweeps.sh").read_text().replace("$advice", ADVICE)
    calls = re.findall(r"""\bdie (["'])(.*?)\1""", source)
    assert len(calls) == len(re.findall(r"\bdie (?!\()", source)) > 15
    for _quote, text in calls:
        pattern = ".*".join(map(re.escape, re.split(r"\$\{[^}]*\}|\$\w+", text)))
        assert any(re.fullmatch(pattern, message) for message in messages), text


# --- The interpreter


def test_the_interpreter(lab):
    """`python`, else `python3`; without one, or with one that lacks the packages, the message says what helps."""
    tools = lab.cwd / "tools"
    tools.mkdir()
    for name in "bash basename dirname grep mkdir nproc sed sleep tail wc".split():
        (tools / name).symlink_to(shutil.which(name))
    bare = {"PYTHON": None, "PATH": tools}
    check_message(lab.run("2d", *SHORT, **bare), OTHER_MESSAGES["python"])
    assert lab.dry_run("2d", *SHORT, **bare)[0].startswith("python ")  # runs nothing, so it needs none
    write_executable(tools / "python3", f'exec {shlex.quote(sys.executable)} -S "$@"')  # -S: without site-packages
    check_message(lab.run("2d", *SHORT, **bare), OTHER_MESSAGES["packages"])
    check_message(lab.run("2d", "--slurm", *SHORT, **bare), OTHER_MESSAGES["sbatch"])
    assert not lab.runs
    write_executable(tools / "python3", f'exec {shlex.quote(sys.executable)} "$@"')
    assert lab.dry_run("2d", *SHORT, **bare)[0].startswith("python3 ")
    assert lab.run("2d", "--jobs", "2", *SHORT, **bare).returncode == 0  # also what the message about sbatch advises
    assert lab.run("2d", "--seeds", "3", *SHORT, PATH=tools).returncode == 0  # PYTHON is set


def test_shellcheck():
    files = [ROOT / "sweeps.sh", ROOT / "tests" / "slurm.sh", *(ROOT / "sweep_list").rglob("*.sh")]
    files += (ROOT / "results").glob("*.sh")
    assert len(files) > 12
    subprocess.run([Path(sys.executable).with_name("shellcheck"), "-x", *files], check=True)


# --- Execution


def test_done_runs_are_skipped_and_longer_ones_are_resumed(lab):
    first = lab.run("2a", "2h", "--jobs", "3", *SHORT)
    assert first.returncode == 0 and "6 runs: 6 done" in first.stdout and len(lab.runs) == 6
    again = lab.run("2a", "2h", "2d", "--jobs", "2", *SHORT)
    assert again.returncode == 0 and again.stdout.count("start ") == 2
    assert [len(starts(run)) for run in lab.runs] == [1] * 8
    assert lab.run("2a", "--report", "--export", "kept", "--seeds", "1,2,3", *SHORT).returncode == 0
    assert "4 of 6 runs, baseline 0 of 3" in (lab.cwd / "kept" / "report.md").read_text()
    assert len(list(lab.cwd.glob("kept/*2a*.csv"))) == 4
    assert lab.run("2h", "--jobs", "2", "--", "--steps", "40").returncode == 0
    assert [len(starts(run)) for run in lab.runs if "2h" in run.name] == [2, 2]
    line = lab.dry_run("2d", "--", "--steps", "60")[0]  # a printed command can be run
    subprocess.run(["bash", "-c", line], cwd=lab.cwd, env=environment(), check=True)
    assert [len(starts(run)) for run in lab.runs if "2d" in run.name] == [2, 1]


def test_a_finished_run_that_is_damaged_is_not_done(lab):
    lab.run("2h", "--seeds", "1", *SHORT)
    with open(lab.runs[0] / "metrics.csv", "a") as file:
        file.write("junk\n")
    again = lab.run("2h", "--seeds", "1", *SHORT)
    assert again.returncode == 1 and "1 runs: 0 done, 0 running, 0 failed, 0 waiting, 1 damaged" in again.stdout
    assert "damaged (finished; delete its directory to run it again): runs/dog-run__" in again.stderr


def test_options_of_the_report(lab):
    (lab.project / "sweep_list" / "report.py").write_text(STUB_REPORT)
    asked = lambda *arguments: lab.run("2a", *arguments).stdout.splitlines()[0]
    assert asked("--report") == "arguments: --axis decisions" and asked("--status") == "arguments: --status"
    both = asked("--report", "--axis", "seconds", "--export", "kept here")
    assert both == "arguments: --export kept here --axis seconds"


@pytest.mark.parametrize("code", [2, 137])  # 137: killed
def test_a_failed_run_is_reported_and_the_others_continue(lab, code):
    done = lab.run("2a", "--jobs", "2", *SHORT, FAKE_FAIL="1__2a_utd__utd_ratio_4", FAKE_CODE=code)
    assert done.returncode == 1 and done.stdout.endswith("4 runs: 3 done, 0 running, 1 failed, 0 waiting\n")
    line = re.search("FAILED .*", done.stdout)[0]
    assert f"exit code {code}" in line and "a loss is not finite" in line
    log = lab.cwd / re.search(r"runs/logs/\S+\.log", line)[0]
    assert "a loss is not finite" in log.read_text() and "--utd-ratio 4" in log.read_text()
    status = lab.run("2a", "--status", *SHORT)
    assert status.returncode == 1 and f"{log.relative_to(lab.cwd)}\n" in status.stdout
    assert lab.run("2a", *SHORT).returncode == 0  # retried, from its checkpoint
    assert [start["tenth"] for run in lab.runs for start in starts(run) if len(starts(run)) > 1] == [0, 5]


# A terminal sends the signal of Ctrl-C to the whole foreground process group
@pytest.mark.parametrize("send, number, jobs", [(os.killpg, signal.SIGINT, 2), (os.kill, signal.SIGTERM, 4)])
def test_a_signal_stops_each_run_once_and_loses_nothing(lab, send, number, jobs):
    process = lab.start("2a", "--jobs", jobs, *SHORT, FAKE_GATE=lab.cwd / "gate", FAKE_STOP_GATE=lab.cwd / "stop_gate")
    stopped = lab.wait_at_gate(jobs)
    send(process.pid, number)
    lab.end_stopped(process, stopped)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75
    assert out.count("stopped ") == jobs and out.endswith("4 runs: 0 done, 0 running, 0 failed, 4 waiting\n")
    assert lab.runs == stopped, "no further run was started"
    assert [(run / "signals").read_text() for run in stopped] == ["SIGTERM\n"] * jobs
    assert lab.run("2a", "--status", *SHORT).stdout.count(" 10/20 ") == jobs
    assert lab.run("2a", "--jobs", "4", *SHORT).returncode == 0
    assert [len(starts(run)) for run in lab.runs] == [2 if run in stopped else 1 for run in lab.runs]
    assert [starts(run)[-1]["tenth"] for run in stopped] == [5] * jobs


@pytest.mark.parametrize("event", ["the terminal closes", "Ctrl-C ends the reader of the output, too"])
def test_runs_are_stopped_when_the_output_is_closed(lab, event):
    options = ["2d", "--jobs", "2", *SHORT]
    gates = {"FAKE_GATE": lab.cwd / "gate", "FAKE_STOP_GATE": lab.cwd / "stop_gate"}
    if event == "the terminal closes":
        terminal, terminal_end = os.openpty()

        def attach():
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if the tests run under nohup
            fcntl.ioctl(terminal_end, termios.TIOCSCTTY, 0)

        process = lab.start(*options, streams=terminal_end, preexec_fn=attach, **gates)
        os.close(terminal_end)
        stopped = lab.wait_at_gate(2)
        os.close(terminal)  # the kernel sends SIGHUP
    else:
        process = lab.start(*options, **gates)
        stopped = lab.wait_at_gate(2)
        process.stdout.close()
        process.stderr.close()
        os.killpg(process.pid, signal.SIGINT)
    lab.end_stopped(process, stopped)
    assert process.wait(timeout=TIMEOUT) == 75
    assert [(run / "signals").read_text() for run in stopped] == ["SIGTERM\n"] * 2
    logs = [log.read_text() for log in lab.cwd.glob("runs/logs/*.log")]
    assert len(logs) == 2 and all(log.endswith("== exit code 75\n") for log in logs)


def test_nohup_runs_survive_the_terminal(lab):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = lab.start("2d", "--jobs", "2", *SHORT, preexec_fn=ignore, FAKE_GATE=lab.cwd / "gate")
    lab.wait_at_gate(2)
    os.killpg(process.pid, signal.SIGHUP)
    for run in lab.runs:
        os.kill(starts(run)[0]["pid"], signal.SIGHUP)
    (lab.cwd / "gate").touch()
    assert process.communicate(timeout=TIMEOUT)[0].endswith("2 runs: 2 done, 0 running, 0 failed, 0 waiting\n")
    assert process.returncode == 0


def test_a_run_stopped_before_its_signal_handlers_exist_is_not_failed(lab):
    (lab.project / "bmpc.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    process = lab.start("2d", *SHORT)
    patiently(lambda: any("begun" in log.read_text() for log in lab.cwd.glob("runs/logs/*.log")), lab)
    process.terminate()
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75 and "2 runs: 0 done, 0 running, 0 failed, 2 waiting" in out


def test_two_invocations_share_the_runs(lab):
    first = lab.start("2a", "--jobs", "2", *SHORT, FAKE_GATE=lab.cwd / "gate")
    lab.wait_at_gate(2)
    status = lab.run("2a", "--status", "--", "--steps", "3759").stdout  # 3749 decisions at 0.5 a second: 124.97 minutes
    assert re.search(r"running +10/3759 +\S+ +2 h 04 m", status) and "2 running, 0 failed, 2 waiting" in status
    second = lab.run("2a", "--jobs", "2", *SHORT)  # without a gate for its own two
    assert second.returncode == 75 and second.stdout.count("in use ") == 2
    assert second.stdout.endswith("4 runs: 2 done, 2 running, 0 failed, 0 waiting\n")
    (lab.cwd / "gate").touch()
    out, _ = first.communicate(timeout=TIMEOUT)
    assert first.returncode == 0 and out.count("done ") == 4 and [len(starts(run)) for run in lab.runs] == [1] * 4
    messages = ("} is in use by another process", "} holds a finished run of {", "; {advice}")
    messages += ('advice = f"continue it with more --steps',)  # by which sweeps.sh recognises them
    assert all(message in (ROOT / f"{script}.py").read_text() for message in messages for script in SCRIPTS)


@pytest.mark.parametrize("options, cores, number, threads", [([], 6, 2, "3"), (["--jobs", "4"], 3, 4, "1")])
def test_jobs_share_gpus_and_threads(lab, options, cores, number, threads):
    """By default there are as many jobs at a time as GPUs."""
    write_executable(lab.cwd / "bin" / "nproc", f"echo {cores}")
    variables = {"PATH": f"{lab.cwd / 'bin'}:{os.environ['PATH']}", "FAKE_GATE": lab.cwd / "gate"}
    process = lab.start("2a", "--gpus", "3,\n7", *options, *SHORT, **variables)
    begun = [starts(run)[0] for run in lab.wait_at_gate(number)]
    assert Counter(start["CUDA_VISIBLE_DEVICES"] for start in begun) == {"3": number // 2, "7": number // 2}
    assert [start["OMP_NUM_THREADS"] for start in begun] == [threads] * number
    commands = [json.loads((run / "versions.json").read_text())[0]["command"] for run in lab.runs]
    assert [command[-2:] for command in commands] == [["--device", "cuda"]] * number  # not the CPU without a word
    process.terminate()
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75


# --- SLURM


def test_submission_to_slurm(lab):
    """The arguments of sbatch, and that its tasks execute the runs on a node where PATH has no `python`."""
    assert lab.run("2d", "--jobs", "2", *SHORT, OMP_NUM_THREADS=5).returncode == 0
    write_executable(lab.cwd / "base" / "python3.x", f'exec {shlex.quote(sys.executable)} "$@"')
    environment_bin = lab.cwd / "my venv" / "bin"
    environment_bin.mkdir(parents=True)
    (environment_bin / "python").symlink_to(lab.cwd / "base" / "python3.x")
    activated = {"PYTHON": None, "PATH": f"my venv/bin:{lab.stub_slurm()}"}
    options = ["--jobs", "3", "--sbatch", "--partition=gpu\n\t--time=1:00", "--seeds", "1,2,3", *SHORT]
    assert lab.run("2d", "2a", "--slurm", *options, **activated).returncode == 0
    *words, wrap = (lab.cwd / "sbatch.args").read_text().splitlines()
    assert {"--array=0-6%3", "--requeue", "--signal=B:USR1@120", "--partition=gpu", "--time=1:00"} <= set(words)
    (record_file,) = lab.cwd.glob("runs/logs/slurm_*.runs")
    commands = [line.split("\t")[-1] for line in record_file.read_text().splitlines()]
    assert {shlex.split(command)[0] for command in commands} == {str(environment_bin / "python")}  # not its target
    assert {line.split()[0] for line in lab.dry_run("2d", "2a", *options, **activated)} == {"python"}
    for index in range(7):  # two of the three runs of 2d are done; one and the six of 2a are left
        task = {"SLURM_ARRAY_JOB_ID": 1, "SLURM_ARRAY_TASK_ID": index, "SLURM_CPUS_PER_TASK": 3}
        variables = environment(PYTHON=None, PATH="/usr/bin:/bin", **task)
        done = subprocess.run(["sh", "-c", wrap.removeprefix("--wrap=")], cwd=lab.cwd, env=variables)
        assert done.returncode == 0
    threads = [start["OMP_NUM_THREADS"] for run in lab.runs for start in starts(run)]
    assert Counter(threads) == {"5": 2, "3": 7}, "one start a run, with the threads given or those of its task"
    assert {start["CUDA_VISIBLE_DEVICES"] for run in lab.runs for start in starts(run)} == {None}
    assert not any("--device" in (run / "versions.json").read_text() for run in lab.runs)
    assert "9 runs: 9 done" in lab.run("2d", "2a", "--slurm", *options, **activated).stdout


@pytest.mark.parametrize(
    "code, message, requeued",
    [
        (2, "RUN_DIR is in use by another process", True),
        (1, "RUN_DIR/lock: No locks available", False),
        (1, "RUN_DIR is in use by another process", False),
        (2, "RUN_DIR_2 is in use by another process", False),
        (2, "cuda:0 is in use by another process", False),
        (2, "RUN_DIR is in use by another process\ndecisions: 50%", True),  # a line of the other process
    ],
)
def test_only_a_run_that_is_in_use_is_requeued(lab, code, message, requeued):
    path = lab.stub_slurm()
    (lab.cwd / "runs" / "logs").mkdir(parents=True)
    record = (
        f"runs/a__bmpc__1__2a__x\t{shlex.quote(sys.executable)} ../a\\ project/bmpc.py --task a --steps 20 --seed 1"
    )
    (lab.cwd / "records").write_text(f"{record} --run-name 2a__x\n")
    task = {"SLURM_ARRAY_JOB_ID": 1, "SLURM_ARRAY_TASK_ID": 0, "FAKE_CODE": code, "FAKE_ERROR": message}
    done = lab.run("--slurm-task", "records", PATH=path, **task)
    assert done.returncode == (75 if requeued else code)
    assert ("in use  " in done.stdout, "FAILED" in done.stdout) == (requeued, not requeued)
    assert (lab.cwd / "scontrol.args").exists() == requeued


def test_a_finished_run_that_cannot_be_continued_is_not_taken_for_done(lab):
    message = "RUN_DIR holds a finished run of 10 decisions; it was finished with --no-keep-replay, so it cannot be"
    done = lab.run("2d", "--jobs", "2", *SHORT, FAKE_CODE=2, FAKE_ERROR=message)
    assert done.returncode == 1 and done.stdout.count("FAILED") == 2 and "0 done, 0 running, 2 failed" in done.stdout


@pytest.mark.skipif(not shutil.which("sbatch") or os.geteuid() != 0, reason="a real SLURM needs root and slurm-wlm")
def test_a_real_slurm(tmp_path):
    cluster = subprocess.Popen(["bash", ROOT / "tests" / "slurm.sh", tmp_path], env=environment())
    try:
        assert cluster.wait(timeout=TIMEOUT) == 0
    finally:
        cluster.terminate()  # so that it stops the daemons of SLURM, even after the timeout
        cluster.wait(timeout=TIMEOUT)
