"""The files of runs: what the scripts write, the smaller copies that are exported and committed, published curves."""

import csv
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PLANNER, POLICY = "eval/episodic_return", "eval/policy_episodic_return"
TRAINING, SPEED = "charts/episodic_return", "charts/SPS"
AXES = {"decisions": "", "updates": "charts/updates", "seconds": "charts/training_seconds"}  # tag of the x axis
COLUMNS = {  # of an exported CSV -> tag
    "planner_return": PLANNER,
    "policy_return": POLICY,
    "updates": AXES["updates"],
    "training_seconds": AXES["seconds"],
}
RUN_FIELDS = ("steps", "sweep", "baseline", "configuration", "seed", "question", "command")  # exported to runs.json
SIZE_FIELDS = ("model_size", "enc_dim", "mlp_dim", "latent_dim", "num_q")
FULL_SIZE = dict(zip(SIZE_FIELDS, (5, 256, 512, 512, 5), strict=True))
UPDATE_FIELDS = {"learning_starts": 2500, "utd_ratio": 1, "num_envs": 4}  # the scripts' defaults
PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "published" / "dmc.csv"
EXPORTED_ARGS = ("action_repeat", "preset", *UPDATE_FIELDS, *SIZE_FIELDS)

# --- Runs and their metrics ------------------------------------------------------------------------------------------


@dataclass
class Run:
    directory: Path
    steps: int  # decisions requested
    sweep: str
    baseline: str  # name of the sweep it is compared with
    configuration: str
    seed: int
    question: str
    command: str
    args: dict
    versions: dict  # time of the first start, git commits of all starts, package versions of the last one
    finished: bool
    damage: str  # path of the first damaged file and what is wrong with it; empty if there is none
    metrics: dict[str, np.ndarray]  # tag -> (n, 2): global_step and value

    @property
    def done(self) -> bool:
        return self.finished and not self.damage

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def task(self) -> str:
        return self.name.split("__")[0]

    @property
    def log(self) -> Path:
        return self.directory.parent / "logs" / f"{self.directory.name}.log"

    @property
    def full_size(self) -> bool:
        sizes = "model_size" in self.args and all(self.args.get(name, size) == size for name, size in FULL_SIZE.items())
        return sizes and self.args.get("preset", "full") == "full" and not re.search("--preset[= ]small", self.command)

    def curve(self, tag: str = PLANNER) -> np.ndarray:  # (n, 2)
        return self.metrics.get(tag, np.empty((0, 2)))

    def setting(self, name: str) -> float:
        """Return one of UPDATE_FIELDS: from args.json, else from the command line, else the scripts' default."""
        flags = re.findall(rf"--{name.replace('_', '[-_]')}[= ](\S+)", self.command)
        return float(self.args.get(name, flags[-1] if flags else UPDATE_FIELDS[name]))


def speeds(runs: list[Run]) -> np.ndarray:  # (finished seeds,): median decisions a second after the random warm-up
    curves = [(run.curve(SPEED), run.args.get("learning_starts", 0)) for run in runs if run.done]
    learning = [curve[curve[:, 0] > start, 1] for curve, start in curves]
    return np.array([np.median(values) for values in learning if len(values)])


def read_run(line: str) -> Run:
    """Read a run's files, up to the first damaged one. Files that do not exist yet are not damage."""
    name, steps, sweep, baseline, configuration, seed, question, command = line.rstrip("\n").split("\t")
    folder, damage = Path(name), ""
    finished, args, starts, metrics = False, {}, [], {}
    try:
        finished = (read_json(folder / "finished.json", {}).get("total_timesteps") or -1) >= int(steps)
        args, starts = read_json(folder / "args.json", {}), read_json(folder / "versions.json", [])
        metrics = read_metrics(folder / "metrics.csv", finished)
        for file in (folder / "args.json", folder / "metrics.csv"):
            if finished and not file.exists():
                raise ValueError(f"{file}: missing")
    except (OSError, ValueError) as error:
        damage = str(error)
    if "num_envs" in args:
        # The last vector step of a run may exceed `steps` by num_envs - 1 decisions. Entries of later steps belong to a
        # run that was extended: it counts as finished, even while it has no finished.json, and they are left out
        last = int(steps) + args["num_envs"] - 1
        finished |= any(points[-1, 0] > last for points in metrics.values())
        metrics = {tag: points[points[:, 0] <= last] for tag, points in metrics.items()}
    return Run(
        directory=folder,
        steps=int(steps),
        sweep=sweep,
        baseline=baseline,
        configuration=configuration,
        seed=int(seed),
        question=question,
        command=command,
        args=args,
        versions=merge_starts(starts),
        finished=finished,
        damage=damage,
        metrics=metrics,
    )


def merge_starts(starts: list[dict]) -> dict:
    """Return time of the first start, git commits of all starts, and the rest of the last one."""
    starts = [start for start in starts if isinstance(start, dict)]
    versions = dict(starts[-1]) if starts else {}
    if "time" in versions:
        versions["time"] = starts[0].get("time", versions["time"])
    if commits := list(dict.fromkeys(start["git_commit"] for start in starts if start.get("git_commit"))):
        versions["git_commit"] = ", ".join(commits)
    return versions


def read_file(file: Path) -> str | None:
    """Return the file's text, or None if there is no file. Raises ValueError, or OSError if it cannot be read."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8") from error


def read_json(file: Path, default: Any) -> Any:
    """Return the file's JSON value, which must have the type of `default`; without a file, return `default`."""
    text = read_file(file)
    if text is None:
        return default
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if type(value) is not type(default):
        raise ValueError(f"{file}: not a {type(default).__name__}")
    return value


def read_metrics(file: Path, finished: bool) -> dict[str, np.ndarray]:
    """Read metrics.csv. Of an unfinished run, the last line is left out if it is incomplete: it is being written."""
    *lines, rest = (read_file(file) or "").split("\n")
    if finished and rest:
        raise ValueError(f"{file}: the last line is incomplete")
    points: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            step, _env_steps, tag, value = line.split(",")
            if not tag.isprintable():  # NULs, for example
                raise ValueError(tag)
            if number > 1:
                points.setdefault(tag, []).append((float(step), float(value)))
        except ValueError as error:
            raise ValueError(f"{file}: line {number} is not global_step,env_steps,tag,value") from error
    return {tag: np.array(values) for tag, values in points.items()}


# --- Export: the returns and the origin of runs, small enough to commit ----------------------------------------------


def export_runs(runs: list[Run], folder: Path) -> None:
    """Write NAME.csv with the returns of each finished run, and add its command and versions to runs.json.

    Unfinished runs are listed there too, until the next export, so that the page says what is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = read_json(folder / "runs.json", {})
    entries = {name: entry for name, entry in entries.items() if entry.get("finished", True)}
    words = [shlex.split(run.command) for run in runs]
    commands = [shlex.join(["python", Path(script).name, *flags]) for _python, script, *flags in words]
    for run, command in zip(runs, commands, strict=True):
        kept = entries.get(run.name, {}).get("command", command)
        if kept != command:
            message = f"{folder} holds a finished run of another command, {kept}; export to another folder"
            sys.exit(f"report.py: {message}")
    for run, command in zip(runs, commands, strict=True):
        entry = {key: getattr(run, key) for key in RUN_FIELDS} | {"command": command}
        if not run.done:
            entries.setdefault(run.name, entry | {"finished": False})
            continue
        columns = {name: dict(run.curve(tag)) for name, tag in COLUMNS.items()}
        with open(folder / f"{run.name}.csv", "w") as file:
            print("global_step", "env_steps", *columns, sep=",", file=file)
            for step in sorted(columns["planner_return"].keys() | columns["policy_return"].keys()):
                values = [step, step * run.args["action_repeat"], *(curve.get(step) for curve in columns.values())]
                print(*("" if value is None else f"{value:.10g}" for value in values), sep=",", file=file)
        entries[run.name] = entry | {
            "args": {key: run.args[key] for key in EXPORTED_ARGS if key in run.args},
            "decisions_a_second": [round(float(speed), 1) for speed in speeds([run])],
            "versions": {key: value for key, value in run.versions.items() if key != "command"},
        }
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items())]  # one a run
    (folder / "runs.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def load_exported(folder: Path) -> list[Run]:
    """Return the runs that `export_runs` listed. A finished one has the metrics of its CSV, and its speed."""
    runs = []
    for name, entry in json.loads((folder / "runs.json").read_text()).items():
        finished = entry.get("finished", True)
        file = folder / f"{name}.csv"
        rows = list(csv.DictReader(file.read_text().splitlines())) if finished else []
        speed = [(entry["steps"], speed) for speed in entry.get("decisions_a_second", [])]
        metrics = {SPEED: np.array(speed).reshape(-1, 2)}
        for column, tag in COLUMNS.items():
            points = [(float(row["global_step"]), float(row[column])) for row in rows if row.get(column)]
            metrics[tag] = np.array(points).reshape(-1, 2)
        fields = {key: entry[key] for key in RUN_FIELDS} | {key: entry.get(key, {}) for key in ("args", "versions")}
        runs.append(Run(folder / name, **fields, finished=finished, damage="", metrics=metrics))
    return sorted(runs, key=lambda run: (run.sweep, run.configuration, run.task, run.seed))


# --- Published curves ------------------------------------------------------------------------------------------------


def published_curves(task: str) -> dict[str, np.ndarray]:  # algorithm -> (n, 4): env_steps, mean, low, high
    if not PUBLISHED.exists():
        return {}
    curves: dict[str, list[list[float]]] = {}
    for row in csv.DictReader(PUBLISHED.read_text().splitlines()):
        if row["task"] == task:
            point = [float(row[column]) for column in ("env_steps", "mean", "low", "high")]
            curves.setdefault(row["algorithm"], []).append(point)
    return {algorithm: np.array(points) for algorithm, points in curves.items()}
