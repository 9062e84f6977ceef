"""Python 3.13 and newer get an empty labmaze; .ci/empty_labmaze/pyproject.toml explains it."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires

from conftest import ROOT
from packaging.requirements import Requirement

LINES = (ROOT / "requirements.txt").read_text().splitlines()
((FOLDER, MARKER),) = [re.fullmatch(r"(\./\S+); (.+)", line).groups() for line in LINES if line.startswith("./")]


def test_the_empty_package_is_what_dm_control_requires():
    project = tomllib.loads((ROOT / FOLDER / "pyproject.toml").read_text())["project"]
    (wanted,) = [r for r in map(Requirement, requires("dm_control")) if r.name == project["name"]]
    assert wanted.specifier.contains(project["version"])
    installs_on = lambda version: Requirement(f"labmaze; {MARKER}").marker.evaluate({"python_version": version})
    assert [version for version in ("3.11", "3.12", "3.13", "3.14") if installs_on(version)] == ["3.13", "3.14"]


def test_a_task_of_dm_control_runs_without_labmaze():
    source = """if True:
        import sys
        sys.modules["labmaze"] = None  # an import of it raises ImportError
        import gymnasium, shimmy
        env = gymnasium.make("dm_control/cartpole-swingup-v0")
        env.reset()
        env.step(env.action_space.sample())
    """
    subprocess.run([sys.executable, "-c", source], check=True)
