"""README and results/README.md: the commands of scripts and sweeps are accepted, and what the pages name exists."""

import csv
import dataclasses
import importlib
import inspect
import re
import shlex

import pytest
import runs
import torch
import tyro
from conftest import ROOT
from test_run import TAGS
from test_siblings import SCRIPTS, VARIANTS, defaults
from test_sweeps import Lab

import bmpc

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {ROOT / "README.md": TEXT, ROOT / "results/README.md": (ROOT / "results/README.md").read_text(encoding="utf-8")}
BOTH = "\n".join(PAGES.values())
SOURCE = "".join((ROOT / script).read_text() for script in SCRIPTS)
BLOCKS = [line for block in re.findall(r"```bash\n(.*?)```", BOTH, re.S) for line in block.splitlines()]
# A command may continue on the next line
INLINE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", BOTH, flags=re.S))]
COMMANDS = [code for code in INLINE if re.match(r"(python3?|bash|pip|diff|tensorboard|apt-get) .*[^ ]", code)]
COMMANDS += [f"python bmpc.py {code}" for code in INLINE if re.match(r"--task .", code)]
COMMANDS = [part.strip() for line in BLOCKS + COMMANDS for part in line.split("#")[0].split("&&") if part.strip()]


def commands(start: str) -> list[str]:
    found = sorted({c for c in COMMANDS if c.startswith(start)})
    assert found, f"no command starts with {start!r}"
    return found


def section(heading: str) -> str:
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M)
    return text


# --- commands


def test_every_command_is_of_a_kind_that_is_tested():
    kinds = ("python bmpc", "python tests/", "python -m pytest tests", "bash sweeps.sh", "pip install", "diff ")
    kinds += ("python3 -m venv", ". .venv/bin/activate", "tensorboard ", "apt-get install ")
    kinds += ("python sweep_list/", "bash results/film.sh")
    assert [c for c in COMMANDS if not c.startswith(kinds)] == []


@pytest.mark.parametrize("command", [c for c in commands("python bmpc") if not c.endswith(" --help")])
def test_a_command_of_a_script_is_valid(command):
    script, *flags = shlex.split(command)[1:]
    module = importlib.import_module(script.removesuffix(".py"))
    args = tyro.cli(module.Args, args=flags)
    assert args != module.Args() or not flags, "its flags change nothing"
    if not args.evaluate and not args.resume and ":" not in args.env_id:  # not every package is installed
        module.resolve_args(module.parse_args(flags))


@pytest.mark.parametrize("command", commands("bash sweeps.sh"))
def test_a_command_of_the_sweeps_is_accepted(command):
    command = re.sub(r" --(slurm|status|report|export \S+|axis (decisions|updates|seconds))(?= |$)", "", command)
    assert len(Lab().dry_run(*shlex.split(command)[2:])) >= 2


@pytest.mark.parametrize("command", commands("diff "))
def test_scripts_that_are_compared_are_siblings(command):
    assert set(command.split()[1:]) <= set(SCRIPTS)


def test_the_install_command_installs_what_other_commands_use():
    installs = ["python3 -m venv .venv", ". .venv/bin/activate", "pip install -r requirements.txt"]
    assert " && ".join(installs) in BLOCKS
    requirements = (ROOT / "requirements.txt").read_text()
    assert all(f"\n{package}==" in requirements for package in ("tensorboard", "pytest", "pytest-xdist"))
    ours = re.findall(r"dm_control (\S+) needs mujoco ([\d.]+):", TEXT)
    assert ours == [tuple(re.search(rf"^{name}==(.*)$", requirements, re.M)[1] for name in ("dm_control", "mujoco"))]


# --- names


def test_files_that_are_named_exist():
    folders = r"(?<![\w/.])(?:tests|sweep_list|results|\.ci)/[\w./]+"
    named = re.findall(folders + r"|(?<![\w/.])\w+\.(?:py|sh)\b", BOTH)
    assert named and all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    anchor = lambda heading: re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, heading = link.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), link
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M) if heading else []
        assert not heading or heading in map(anchor, headings), link


def test_the_map_names_functions_that_exist():
    names = re.findall(r"`(\w+)`", section("Reading guide").split("|---|---|")[1])
    assert len(names) >= 10 and all(hasattr(bmpc, name) for name in names)
    algorithm, _ = (ROOT / "bmpc.py").read_text().split("# ======== Plumbing")
    assert all(re.search(rf"^(def|class) {name}\b", algorithm, re.M) for name in names)


def test_flags_that_are_named_exist():
    flags = lambda text: set(re.findall(r"--(?:no-)?([a-z]+(?:-[a-z]+)*)(?![\w-])", text))
    known = {name.replace("_", "-") for name in defaults(VARIANTS[-1])}  # which has those of the others
    unknown = flags(BOTH) - known - flags(Lab().run("--help").stdout)
    assert unknown <= {"help", "dist", "logdir", "replot"}  # of pytest-xdist, TensorBoard and report.py


def test_tags_that_are_named_are_logged():
    named = set(re.findall(r"`((?:charts|eval|losses|planner|time)/\w+)`", BOTH))
    assert named and named <= TAGS | {"charts/env_errors"}


def test_files_of_a_run_that_are_named_are_written(tmp_path):
    """Those of a finished run are there; the others are named in the source."""
    (table,) = re.findall(r"\| file \| content \|\n(.*?)\n\n", section("Runs"), re.S)
    named = {name.strip("/") for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
    run = runs.finish(tmp_path, "--steps", 40, "--eval-freq", 0, task="toy:Toy-v0")
    (folder,) = (tmp_path / "runs").iterdir()
    written = {path.name for path in folder.iterdir()}
    assert run.code == 0 and named - written == {"error.txt", "videos"}
    assert all(f'directory / "{name}"' in SOURCE for name in named - written)
    (header,) = re.findall(r"`metrics.csv` \| `([\w,]+)`", table)
    assert (folder / "metrics.csv").read_text().splitlines()[0] == header
    assert written - named - {"lock"} == {name for name in written if name.startswith("events.out.tfevents.")}


def test_messages_that_are_named_are_printed():
    messages = re.findall(r"^\| `([^`]+)`", section("Troubleshooting"), re.M)
    ours = [message for message in messages if message != "ensurepip is not available"]  # Python's
    assert len(ours) >= 4 and all(message in SOURCE for message in ours)


def test_signals_and_exit_codes():
    signals = set(re.findall(r"SIG[A-Z0-9]+", TEXT)) | {"SIGINT"}  # Ctrl-C
    handled = set(re.findall(r"signal\.(SIG[A-Z0-9]+)", inspect.getsource(bmpc.catch_stop_signals)))
    assert signals == handled
    codes = f"Exit codes: 0 finished, 1 failed, 2 usage error, {bmpc.EXIT_RESUMABLE} stopped and resumable."
    assert codes in " ".join(TEXT.split())


# --- numbers


def test_readme_is_short():
    assert len(TEXT) <= 12_000


def test_what_the_two_commands_reach():
    means = []
    for path in (ROOT / "results").glob("*/cartpole-swingup__bmpc__*__0_baseline__baseline.csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert int(rows[-1]["global_step"]) == bmpc.PRESETS["small"]["total_timesteps"]
        means.append(sum(float(row["planner_return"]) for row in rows[-3:]) / 3)
    reached = f"of {len(means)} runs: {min(means):.0f} to {max(means):.0f} of 1 000"
    assert f"Means of the last three evaluations {reached}" in TEXT
    published = csv.DictReader((ROOT / "results" / "published" / "dmc.csv").read_text().splitlines())
    env_steps = str(2 * bmpc.Args().total_timesteps)
    rows = [row for row in published if (row["task"], row["env_steps"]) == (bmpc.Args().env_id, env_steps)]
    means = {row["algorithm"]: float(row["mean"]) for row in rows}
    ends = f"{means['BMPC']:.0f} after 400 000 env steps (TD-MPC2: {means['TD-MPC2']:.0f})"
    assert f"published curve is at {ends}" in " ".join(TEXT.split())


def test_the_disk_that_a_run_takes():
    """The replay buffer of the default run, from that of a run of a hundredth of its length."""
    args, task = bmpc.resolve_args(bmpc.Args())
    buffer = bmpc.ReplayBuffer(dataclasses.replace(args, total_timesteps=2_000), task, torch.device("cpu"))
    size = buffer.rows.nbytes / 2_000 * args.total_timesteps
    plan = len(Lab().dry_run("all"))
    assert f"some {size / 1e6:.0f} MB for a full-size dog-run, {plan * size / 1e9:.0f} GB for the {plan} runs" in TEXT


def test_what_is_said_of_steps_and_failures():
    assert f"every {'tenth' if bmpc.Args().reanalyze_interval == 10 else '?'} update plans again" in TEXT
    assert f"{'ten' if bmpc.MAX_ENV_ERRORS == 10 else '?'} in a row end the run" in TEXT
    assert "200 000 steps are 400 000 `env_steps`" in TEXT and bmpc.Args().total_timesteps == 200_000
