"""README tells the truth: its commands parse and run, its map names what exists, its tags and flags exist."""

import importlib
import re
import shlex

import pytest
import runs
import tyro
from conftest import ROOT
from test_siblings import SCRIPTS, defaults
from test_sweeps import Lab

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
    kinds += ("python3 -m venv .venv", ". .venv/bin/activate")
    assert [c for c in COMMANDS if not c.startswith(kinds)] == []


@pytest.mark.parametrize("command", [c for c in commands("python bmpc") if not c.endswith(" --help")])
def test_a_command_of_a_script_parses_and_runs_at_a_tiny_size(command, tmp_path):
    script, *flags = shlex.split(command)[1:]
    module = importlib.import_module(script.removesuffix(".py"))
    args = tyro.cli(module.Args, args=flags)
    assert args != module.Args() or not flags, "its flags change nothing"
    if not args.evaluate and not args.resume and ":" not in args.env_id:  # not every package is installed
        run = runs.Run(tmp_path, [*flags, *TINY], script=script.removesuffix(".py")).wait()
        assert run.code == 0, run


@pytest.mark.parametrize("command", commands("bash sweeps.sh"))
def test_a_command_of_the_sweeps_is_accepted(command):
    words = [word for word in shlex.split(command)[2:] if word not in ("--slurm", "--status", "--report")]
    assert len(Lab().dry_run(*words)) >= 2


def test_files_that_are_named_exist():
    named = re.findall(r"(?:tests|sweep_list|results|\.ci)/[\w./]+|\w+\.(?:py|sh)\b", TEXT)
    assert named and all((ROOT / name).exists() for name in named)


def test_the_map_names_functions_that_exist():
    (table,) = re.findall(r"## From the paper to the code\n(.*?)\n## ", TEXT, re.S)
    names = re.findall(r"`(\w+)`", table)
    assert len(names) >= 10 and all(hasattr(bmpc, name) for name in names)


def test_flags_that_are_named_exist():
    flags = lambda text: set(re.findall(r"--(?:no-)?([a-z]+(?:-[a-z]+)*)(?![\w-])", text))
    known = {name.replace("_", "-") for script in SCRIPTS for name in defaults(script)}
    assert flags(TEXT) - known - flags(Lab().run("--help").stdout) <= {"help", "dist"}  # pytest-xdist's


def test_tags_that_are_named_are_logged():
    source = "".join((ROOT / script).read_text() for script in SCRIPTS)
    for tag in re.findall(r"`((?:charts|eval|losses|planner|time)/\w+)`", TEXT):
        name = tag.split("/")[1]
        assert tag in source or f'"{name}"' in source, tag
