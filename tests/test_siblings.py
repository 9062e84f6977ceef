"""The scripts differ only in tagged seams, and compute the same bits without the flags of the variants.

tdmpc2.py differs from bmpc.py in tagged seams too, but is another algorithm: other tests say what it computes.

`python tests/test_siblings.py` prints the table SEAMS of the current files.
"""

import ast
import difflib
import importlib
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from conftest import FakeEnvs, small_args, start, train
from runs import differences, numbers

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [("bmpc.py", "bmpc_multihead.py"), ("bmpc_multihead.py", "bmpc_dual_policy.py"), ("bmpc.py", "tdmpc2.py")]
VARIANTS = ["bmpc.py", "bmpc_multihead.py", "bmpc_dual_policy.py"]
SCRIPTS = [*VARIANTS, "tdmpc2.py"]
TAG = re.compile(r"\[[VT](\d+)\]")  # V: what a variant adds to BMPC; T: what is TD-MPC2 where bmpc.py is BMPC

PLUMBING = "# ======== Plumbing"
MAX_FUNCTION_LINES = 60

# For each seam: the number and checksum of the lines that it replaces, and the number of lines that it has instead. If
# the checksum changes, the lines were changed in the older script; the sibling may need the same change.
SEAMS = {
    "bmpc_multihead.py": {
        1: (0, 0, 16),
        2: (1, 2517657584, 2),
        3: (4, 2914576732, 23),
        4: (16, 3085470174, 33),
        5: (2, 3743418053, 7),
        6: (5, 1066923361, 8),
        7: (0, 0, 2),
        8: (0, 0, 3),
    },
    "bmpc_dual_policy.py": {
        9: (9, 1492101722, 28),
        10: (2, 275615991, 13),
        11: (5, 3161831565, 20),
        12: (6, 1509784363, 34),
        13: (4, 57616880, 20),
    },
    "tdmpc2.py": {
        1: (79, 671300790, 22),
        2: (46, 2304512499, 33),
        3: (27, 2474035065, 34),
        4: (7, 3632767467, 14),
        5: (98, 2823665802, 33),
        6: (27, 2258188885, 23),
    },
}


# --- the files


def load(script: str):
    """Import a script."""
    return importlib.import_module(script.removesuffix(".py"))


def code(script: str) -> tuple[list[str], int]:
    """Return the lines of a script below its docstring, and the number of lines before them."""
    source = (ROOT / script).read_text()
    skip = ast.parse(source).body[0].end_lineno
    return source.splitlines(keepends=True)[skip:], skip


def hunks(older: str, sibling: str):
    """Yield the differences below the docstrings: seam, line number, lines of the older script and of the sibling."""
    (a, _), (b, skip) = code(older), code(sibling)
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":  # a line that both siblings change has two tags, and the later one counts
            yield max(map(int, TAG.findall("".join(b[k:m]))), default=None), skip + k + 1, a[i:j], b[k:m]


def seam_table(older: str, sibling: str) -> dict[int, tuple[int, int, int]]:
    """Return for each seam the number and checksum of the lines replaced, and the number of lines instead."""
    table = {}
    for seam, _, old, new in hunks(older, sibling):
        num_old, checksum, num_new = table.get(seam, (0, 0, 0))
        table[seam] = (num_old + len(old), zlib.crc32("".join(old).encode(), checksum), num_new + len(new))
    return table


def listed(sibling: str) -> list[int]:
    """Return the seams listed in the docstring of a script, in order."""
    return [int(n) for n in re.findall(rf"^\s+{TAG.pattern} ", load(sibling).__doc__, re.M)]


@pytest.mark.parametrize("older, sibling", PAIRS)
def test_scripts_differ_only_in_known_seams(older, sibling):
    actual = seam_table(older, sibling)
    expected = SEAMS[sibling]
    changed = [hunk for hunk in hunks(older, sibling) if actual[hunk[0]] != expected.get(hunk[0])]
    message = "Check that the change is in both scripts, then copy the new table, which this file prints when executed."
    assert actual == expected, (message, changed)


def test_the_headers_list_the_seams_in_order():
    first, second, of_tdmpc2 = (list(seam_table(*pair)) for pair in PAIRS)
    assert first == listed("bmpc_multihead.py") and first + second == listed("bmpc_dual_policy.py")
    assert of_tdmpc2 == listed("tdmpc2.py")
    for seams in (first + second, of_tdmpc2):
        assert seams == list(range(1, len(seams) + 1))
    assert not TAG.search((ROOT / "bmpc.py").read_text())


@pytest.mark.parametrize("older, sibling", PAIRS)
def test_the_plumbing_is_the_same_text(older, sibling):
    """A failure shows the first line that differs."""
    parts = [(ROOT / name).read_text().partition(PLUMBING) for name in (older, sibling)]
    assert all(marker for _, marker, _ in parts)
    (_, _, a), (_, _, b) = parts
    first_difference = next(((x, y) for x, y in zip(a.splitlines(), b.splitlines()) if x != y), None)
    assert first_difference is None and a == b


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_are_short_and_have_type_hints_and_docstrings(script):
    """Only functions and classes at the top level need docstrings."""
    module = ast.parse((ROOT / script).read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
            parameters = [
                p
                for p in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if p.arg not in ("self", "cls")
            ]
            assert all(p.annotation for p in parameters), node.name
            assert node.returns or node.name == "__init__", node.name
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("arguments", [["format", "--check", "--diff"], ["check"]], ids=lambda arguments: arguments[0])
def test_ruff(arguments):
    files = [*SCRIPTS, "tests", "sweep_list"]
    command = [sys.executable, "-m", "ruff", *arguments, *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# The flags of tdmpc2.py that have a default of their own: those of TD-MPC2's code.
TDMPC2 = dict(
    enc_lr_scale=0.3, normalize_rho_weights=False, consistency_coef=20.0, entropy_coef=1e-4, log_std_min=-10.0,
    log_std_max=2.0, min_std=0.05, eval_sample_elite=True,
)  # fmt: skip
BMPC_ALONE = set(
    "td_horizon kl_reduction reanalyze_interval reanalyze_batch_size reanalyze_horizon reanalyze_log_std_min "
    "reanalyze_log_std_max expert_std_scale expert_std_min reanalyze_use_chosen_action chosen_action_noise "
    "initial_expert_from_behavior num_rollouts imagine_initial_source td_target_initial_source "
    "td_target_use_ema_policy policy_ema_tau policy_trust_region_coef".split()
)


def defaults(script: str) -> dict:
    """Return the flags of a script and their defaults."""
    return {name: field.default for name, field in load(script).Args.__dataclass_fields__.items()}


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_shared_flags_have_the_same_defaults_and_order(script):
    """But for those that are TD-MPC2's own, and the name of the experiment."""
    mine, theirs = defaults("bmpc.py"), defaults(script)
    own = TDMPC2 if script == "tdmpc2.py" else {}
    assert mine.keys() - theirs.keys() == (BMPC_ALONE if own else set())
    changed = {name: theirs[name] for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]}
    assert changed == own | {"exp_name": script.removesuffix(".py")}
    assert not own or not theirs.keys() - mine.keys()
    small = load(script).PRESETS["small"]
    assert small == {k: v for k, v in load("bmpc.py").PRESETS["small"].items() if k in theirs} | dict.fromkeys(
        ["num_q"] * bool(own), 5
    )
    assert [name for name in theirs if name in mine] == [name for name in mine if name in theirs]  # in one order


# --- small runs in this process, on the CPU


def run_with_evaluations(script, directory, **flags):
    """Make a whole run. Returns the Run, the rows it logged except speeds, and the actions of its evaluations."""
    sizes = dict(learning_starts=20, total_timesteps=80, utd_ratio=0.5, eval_freq=40, log_freq=20, reanalyze_interval=5)
    args = small_args(script, **sizes | flags)
    envs = FakeEnvs([9, 7], terminal=(1,) if args.episodic else ())
    eval_envs = FakeEnvs([5, 6])
    run = start(args, envs, script=script)
    train(run, envs, directory, eval_envs, script=script)
    return run, numbers(directory), [action.tolist() for action in eval_envs.sent]


FLAGS = {
    "defaults": {},
    "all flags": dict(
        utd_ratio=0.5, td_horizon=3, num_rollouts=2, imagine_initial_source="replay_true", encoder_consistency_coef=0.5,
        td_target_use_ema_policy=True, policy_trust_region_coef=0.3, initial_expert_from_behavior=False, episodic=True,
        reanalyze_use_chosen_action=False, entropy_coef=1e-3, reanalyze_horizon=2, reanalyze_log_std_min=-2.0,
        td_target_initial_source="same", eval_sample_elite=True, dropout=0.1, num_pi_trajs=0, kl_reduction="sum",
        chosen_action_noise=False, normalize_rho_weights=False, enc_lr_scale=0.3, num_q=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
def test_scripts_compute_the_same_bits(flags, tmp_path):
    """Without the flags of the variants: 60 decisions after warm-up, 20 pretraining updates and 30 later ones, 6 calls
    of reanalyze, 2 evaluations.
    """
    results = [run_with_evaluations(load(name), tmp_path / name, **FLAGS[flags]) for name in VARIANTS]
    (run, rows, actions), *others = results
    assert (run.global_step, run.updates, run.pretraining_updates) == (80, 30, 20)
    assert [step for step, _, tag, _ in rows if tag == "eval/episodic_return"] == [40, 80]
    warm_up_means = run.buffer.split_rows(run.buffer.rows).expert.mean[:10]
    assert (warm_up_means != 0).any()  # they are zero until reanalyze replaces them
    contents = lambda run: load("bmpc.py").checkpoint_contents(run) | {"args": {}, "training_seconds": 0.0}
    for name, (other, other_rows, other_actions) in zip(VARIANTS[1:], others, strict=True):
        assert differences(contents(run), contents(other)) == [], name
        assert rows == other_rows and actions == other_actions, name


if __name__ == "__main__":
    for older, sibling in PAIRS:
        print(f'    "{sibling}": {{')
        for seam, row in seam_table(older, sibling).items():
            print(f"        {seam}: {row},")
        print("    },")
    sys.exit()
