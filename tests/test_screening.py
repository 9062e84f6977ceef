"""The screening of the departures: its design is orthogonal, its analysis finds planted effects and no others."""

import importlib
import itertools
import re
import subprocess
import sys

import numpy as np
from conftest import ROOT
from test_sweeps import Lab

FOLDER = ROOT / "sweep_list" / "0_cpu" / "0_screening"
README = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
sys.path.append(str(FOLDER))
effects = importlib.import_module("effects")
flags_of = lambda text: set(re.findall(r"--\S+(?: -?\d[\d.e-]*)?", text))  # each with the number that follows it


def design():
    """By configuration, which letters are at their default, and the flags that set the others."""
    rows = re.findall(r"__(\w+) --task cheetah-run(.*)", "\n".join(Lab().dry_run("0_screening")))
    return {name: ({x for x in effects.LETTERS if x in name}, flags_of(flags)) for name, flags in rows}


def test_any_two_departures_meet_in_each_combination_three_times():
    levels = np.array([[letter in on for letter in effects.LETTERS] for on, _ in design().values()])
    assert levels.shape == (12, 11)
    for a, b in itertools.combinations(range(11), 2):
        assert np.bincount(2 * levels[:, a] + levels[:, b]).tolist() == [3, 3, 3, 3]


def test_a_letter_stands_for_its_flags():
    """The official numbers are 0_parity's and results/README.md's; a letter at its default takes its own away only."""
    rows, flags = design().values(), {}
    for letter in effects.LETTERS:
        flags[letter] = set.intersection(*(given for on, given in rows if letter not in on))
    assert all(flags[x] for x in "ABCDEFGHIJ") and not flags["K"]
    parity, found = flags_of((FOLDER.parent / "0_parity" / "sweep.sh").read_text()), set().union(*flags.values())
    assert found < parity and {flag.split()[0] for flag in parity - found} == {"--steps", "--task"}
    (command,) = re.findall("^python bmpc.py --num-envs.*", README, re.M)
    assert flags_of(command) == found - {"--reanalyze-batch-size 20"} | {"--num-q 2"}  # which the small size has, too


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


def test_results_readme_and_the_kept_table_have_the_effects_of_the_kept_runs():
    command = [sys.executable, FOLDER / "effects.py", ROOT / "results" / "screening"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table == (ROOT / "results" / "screening" / "effects.md").read_text()
    area = [line.split(" | ")[1] for line in table.splitlines()[2:]]
    told = re.findall(r" ([+-]\d+\.\d)(?: \(both\))? \|\n", README.split("\n## Departures")[1].split("\n## ")[0])
    assert sorted(told) == sorted(area[:1] + area[2:10])  # without the small sweep's own, B
    text = re.sub(r"\s+", " ", README)
    assert f"An effect below {area[11].removeprefix('± ')} in size (" in text
    assert f"changes nothing, has {area[10]}, and half as many windows reanalyzed {area[1]}." in text
