"""The screening of the departures: its design is orthogonal, its analysis finds planted effects and no others."""

import importlib.util
import itertools
import re
import subprocess
import sys

import numpy as np
from conftest import ROOT

FOLDER = ROOT / "sweep_list" / "0_cpu" / "0_screening"
spec = importlib.util.spec_from_file_location("effects", FOLDER / "effects.py")
effects = importlib.util.module_from_spec(spec)
spec.loader.exec_module(effects)


def design():
    """By configuration, which letters are at their default, and the flags that set the others."""
    command = ["bash", ROOT / "sweeps.sh", "0_screening", "--dry-run"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [re.search(r"__(\w+) --task cheetah-run ?(.*)", line) for line in lines]
    return {row[1]: ({x for x in effects.LETTERS if x in row[1]}, row[2]) for row in found if row}


def test_any_two_departures_meet_in_each_combination_three_times():
    levels = np.array([[letter in on for letter in effects.LETTERS] for on, _ in design().values()])
    assert levels.shape == (12, 11)
    for a, b in itertools.combinations(range(11), 2):
        assert np.bincount(2 * levels[:, a] + levels[:, b]).tolist() == [3, 3, 3, 3]


def test_a_letter_stands_for_its_flags():
    """The official numbers are those of 0_parity, and a letter at its default takes its own away and no others."""
    rows, flags = design(), {}
    for (on, given), letter in itertools.product(rows.values(), effects.LETTERS):
        if letter not in on:
            flags.setdefault(letter, []).append({flag.strip() for flag in given.split("--") if flag})
    flags = {letter: set.intersection(*sets) for letter, sets in flags.items()}
    assert all(flags[x] for x in "ABCDEFGHIJ") and not flags["K"]
    parity = (FOLDER.parent / "0_parity" / "sweep.sh").read_text()
    official = {flag.removeprefix("--") for flag in re.findall(r"--\S+(?: -?\d[\d.e-]*)?", parity)}
    found = set().union(*flags.values())
    assert found < official and {flag.split()[0] for flag in official - found} == {"steps", "task"}


def test_planted_effects_come_back_and_noise_is_noise():
    rng, rows = np.random.default_rng(0), design()
    planted = dict(zip(effects.LETTERS, rng.normal(size=11), strict=True))
    values = {name: 50 + sum(planted[letter] for letter in on) for name, (on, _) in rows.items()}
    np.testing.assert_allclose(effects.effects(values), list(planted.values()))
    beyond = []
    for _ in range(2000):
        found = effects.effects({name: rng.normal() for name in rows})
        beyond.append([np.abs(found) > margin for margin in effects.margins(found)])
    one, together = np.array(beyond).mean((0, 2))[0], np.array(beyond)[:, 1].any(1).mean()
    assert 0.02 < one < 0.05 and 0.01 < together < 0.05  # of noise alone


def test_readme_and_the_kept_table_have_the_effects_of_the_kept_runs():
    command = [sys.executable, FOLDER / "effects.py", ROOT / "results" / "screening"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table == (ROOT / "results" / "screening" / "effects.md").read_text()
    area = [line.split(" | ")[1] for line in table.splitlines()[2:]]
    departures = (ROOT / "README.md").read_text().split("## Departures")[1].split("## Speed")[0]
    assert sorted(re.findall(r" ([+-]\d+\.\d)(?: \(both\))? \|\n", departures)) == sorted(
        area[:1] + area[2:10]
    )  # without the small sweep's own, B
    assert f"Chance alone makes {area[11]}:" in departures
