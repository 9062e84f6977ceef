"""README tells the truth: its commands parse and run, its map names what exists, its tags and flags exist."""

import importlib
import re
import shlex
import subprocess

import pytest
import runs
import tyro
from conftest import ROOT
from test_siblings import SCRIPTS, fields

import bmpc

TEXT = (ROOT / "README.md").read_text()
BLOCKS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
INLINE = [code for code in re.findall(r"`([^`\n]+)`", TEXT) if re.match(r"(python|bash|pip|diff) ", code)]
COMMANDS = [part.strip() for line in BLOCKS + INLINE for part in line.split("#")[0].split("&&") if part.strip()]
TINY = [*runs.TINY, *"--steps 40 --eval-freq 0 --iterations 1 --extra-iterations 0 --no-track".split()]


def commands(start: str) -> list[str]:
    found = sorted({c for c in COMMANDS if c.startswith(start)})
    assert found, f"README has no command that starts with {start!r}"
    return found


def test_every_command_is_of_a_kind_that_is_tested():
    kinds = ("python bmpc", "python tests/", "python -m pytest tests", "bash sweeps.sh", "pip install", "diff ")
    assert [c for c in COMMANDS if not c.startswith(kinds)] == []


@pytest.mark.parametrize("command", commands("python bmpc"))
def test_a_command_of_a_script_parses_and_runs_at_a_tiny_size(command, tmp_path):
    script, *flags = shlex.split(command)[1:]
    if flags == ["--help"]:
        return
    module = importlib.import_module(script.removesuffix(".py"))
    args = tyro.cli(module.Args, args=flags)
    assert args != module.Args() or not flags, "its flags change nothing"
    if not args.evaluate and not args.resume and ":" not in args.env_id:  # not every package is installed
        run = runs.Run(tmp_path, [*flags, *TINY], script=script.removesuffix(".py")).wait()
        assert run.code == 0, run


@pytest.mark.parametrize("command", commands("bash sweeps.sh"))
def test_a_command_of_the_sweeps_is_accepted(command, tmp_path):
    words = [w for w in shlex.split(command) if w not in ("--slurm", "--status", "--report")]
    cut = words.index("--") if "--" in words else len(words)
    given = ["bash", str(ROOT / "sweeps.sh"), *words[2:cut], "--dry-run", *words[cut:]]
    ran = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.count("\n") >= 2, ran.stderr


def test_a_benchmark_knows_the_flags_it_is_given():
    for command in commands("python tests/"):
        source = (ROOT / shlex.split(command)[1]).read_text()
        assert all(f'add_argument("{flag}"' in source for flag in re.findall(r"--[a-z-]+", command))


def test_files_that_are_named_exist():
    linked = re.findall(r"\]\(([^)#:]+)(?:#L\d+)?\)", TEXT)
    named = re.findall(r"`((?:tests|sweep_list|results|\.ci)/[\w./]+|\w+\.py|\w+\.sh)`", TEXT)
    assert linked and named and all((ROOT / name).exists() for name in linked + named)


def test_the_map_names_functions_that_exist():
    (table,) = re.findall(r"## From the paper to the code\n(.*?)\n## ", TEXT, re.S)
    names = re.findall(r"`(\w+)`", table)
    assert len(names) >= 10 and all(hasattr(bmpc, name) for name in names)


def test_flags_that_are_named_exist():
    known = {name.replace("_", "-") for name in fields(SCRIPTS[-1])}  # which has those of the others
    known |= set("task steps help dry-run status report slurm jobs gpus seeds sbatch export replot".split())
    known |= set("compare only modes runs partition gres time dist".split())  # also those of sbatch and pytest-xdist
    named = {flag.removeprefix("no-") for flag in re.findall(r"--([a-z]+(?:-[a-z]+)*)(?![\w-])", TEXT)}
    assert named - known == set()


def test_tags_that_are_named_are_logged():
    source = "".join((ROOT / script).read_text() for script in SCRIPTS)
    for tag in re.findall(r"`((?:charts|eval|losses|planner|time)/\w+)`", TEXT):
        name = tag.split("/")[1]
        assert tag in source or f'"{name}"' in source or f'losses["{name}"]' in source, tag


def test_the_official_commands_numbers_are_those_of_the_departures():
    command = next(c for c in commands("python bmpc.py") if "--no-normalize-rho-weights" in c)
    args = tyro.cli(bmpc.Args, args=shlex.split(command)[2:])
    official = dict(
        num_envs=1, num_q=2, log_std_min=-3.0, log_std_max=1.0, reanalyze_log_std_min=-2.0, reanalyze_log_std_max=1.0,
        consistency_coef=20.0, normalize_rho_weights=False, enc_lr_scale=0.3, min_std=0.05, eval_sample_elite=True,
        chosen_action_noise=False, reanalyze_use_chosen_action=True, expert_std_scale=1.0, expert_std_min=0.0,
        entropy_coef=1e-4, kl_reduction="mean",
    )  # fmt: skip
    assert {name: getattr(args, name) for name in official} == official
