"""The three scripts are one: they differ in tagged seams alone; without the variant's flags they compute the same bits.

`python tests/test_siblings.py` prints the table SEAMS as the files are now.
"""

import ast
import difflib
import importlib
import io
import re
import subprocess
import sys
import tokenize
import zlib
from pathlib import Path

import pytest
from conftest import FakeEnvs, small_args, start, train
from runs import differences, numbers

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [("bmpc.py", "bmpc_multihead.py"), ("bmpc_multihead.py", "bmpc_dual_policy.py")]
SCRIPTS = ["bmpc.py", "bmpc_multihead.py", "bmpc_dual_policy.py"]
TAG = re.compile(r"\[V(\d+)\]")

# For each seam: the lines of the older script that it replaces (their number and checksum) and the number of its own. A
# change of these lines in one script alone is a fix that did not reach the others.
SEAMS = {
    "bmpc_multihead.py": {
        1: (0, 0, 15),
        2: (2, 2868121289, 4),
        3: (2, 1816671605, 13),
        4: (14, 2022947812, 22),
        5: (2, 3984167134, 6),
        6: (1, 2556081624, 4),
        7: (0, 0, 2),
        8: (0, 0, 3),
    },
    "bmpc_dual_policy.py": {
        9: (0, 0, 14),
        10: (1, 1481454297, 10),
        11: (3, 3505078628, 5),
        12: (4, 3622773218, 16),
        13: (5, 1417058285, 21),
    },
}


# --- the files


def load(script: str):
    """A script as a module."""
    return importlib.import_module(script.removesuffix(".py"))


def code(script: str) -> tuple[list[str], int]:
    """A script's lines below its docstring, and where they begin."""
    source = (ROOT / script).read_text()
    skip = ast.parse(source).body[0].end_lineno
    return source.splitlines(keepends=True)[skip:], skip


def hunks(older: str, sibling: str):
    """The hunks of `diff -U0` below the docstrings: seam, line, what the older script has and the sibling instead."""
    (a, _), (b, skip) = code(older), code(sibling)
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":  # a line that the dual policy changes again has both its tags
            yield max(map(int, TAG.findall("".join(b[k:m]))), default=None), skip + k + 1, a[i:j], b[k:m]


def seam_table(older: str, sibling: str) -> dict[int, tuple[int, int, int]]:
    """For each seam: lines replaced, their checksum, own lines."""
    table = {}
    for seam, _, old, new in hunks(older, sibling):
        replaced, crc, own = table.get(seam, (0, 0, 0))
        table[seam] = (replaced + len(old), zlib.crc32("".join(old).encode(), crc), own + len(new))
    return table


def listed(sibling: str) -> list[int]:
    """The seams that a script's docstring lists, in its order."""
    return [int(n) for n in re.findall(r"^\s+\[V(\d+)\] ", load(sibling).__doc__, re.M)]


@pytest.mark.parametrize("older, sibling", PAIRS)
def test_every_difference_is_in_a_tagged_seam_and_the_lines_under_it_did_not_drift(older, sibling):
    now, then = seam_table(older, sibling), SEAMS[sibling]
    drifted = [hunk for hunk in hunks(older, sibling) if now[hunk[0]] != then.get(hunk[0])]
    told = "See that the change is in both scripts, then write the new table, which this file prints."
    assert now == then, (told, drifted)


def test_the_headers_list_the_seams_in_order():
    first, second = (list(seam_table(*pair)) for pair in PAIRS)
    assert first == listed("bmpc_multihead.py") and first + second == listed("bmpc_dual_policy.py")
    assert first + second == list(range(1, len(first + second) + 1))
    assert not TAG.search((ROOT / "bmpc.py").read_text())


@pytest.mark.parametrize("older, sibling, most", [(*PAIRS[0], 130), (*PAIRS[1], 110)])
def test_the_diff_stays_small(older, sibling, most):
    a, b = ((ROOT / name).read_text().splitlines() for name in (older, sibling))
    count = sum(line[0] in "+-" for line in list(difflib.unified_diff(a, b, n=0))[2:])
    assert count <= most, f"diff -U0 {older} {sibling} has {count} lines"


def size(script: str) -> dict[str, int]:
    """Lines, statements but for docstrings, tokens that are no layout, functions and classes, the longest function.

    An f-string is one token, as Python 3.11 reads it; 3.12 reads its parts.
    """
    source = (ROOT / script).read_text()
    nodes = list(ast.walk(ast.parse(source)))
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    tokens, depth = 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
        tokens += depth == 0 and (token.type in kinds or name == "FSTRING_END")
    is_text = lambda n: isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    return {
        "lines": len(source.splitlines()),
        "statements": sum(isinstance(n, ast.stmt) and not is_text(n) for n in nodes),
        "tokens": tokens,
        "functions and classes": len(functions) + sum(isinstance(n, ast.ClassDef) for n in nodes),
        "longest function": max(n.end_lineno - n.lineno + 1 for n in functions),
    }


BUDGETS = {"lines": 1658, "statements": 1015, "tokens": 13343, "functions and classes": 117, "longest function": 58}


def test_the_base_stays_small():
    """A reader should hold BMPC in one sitting. What grows here has to be worth more than what could go."""
    over = {name: (n, BUDGETS[name]) for name, n in size("bmpc.py").items() if n > BUDGETS[name]}
    assert not over


@pytest.mark.parametrize("arguments", [["format", "--check", "--diff"], ["check"]], ids=lambda words: words[0])
def test_ruff_has_nothing_to_say(arguments):
    files = [*SCRIPTS, "tests", "sweep_list/report.py"]
    ran = subprocess.run([sys.executable, "-m", "ruff", *arguments, *files], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def fields(script: str):
    """A script's flags, by name."""
    return load(script).Args.__dataclass_fields__


# --- small runs, in this process and on this CPU


def whole(script, directory, **flags):
    """A whole run with evaluations: the Run, the numbers it logged but for speeds, the actions of evaluations."""
    sizes = dict(learning_starts=20, total_timesteps=80, utd_ratio=0.5, eval_freq=40, log_freq=20, reanalyze_interval=5)
    args = small_args(script, **sizes | flags)
    envs, eval_envs = FakeEnvs([9, 7], terminal=(1,) if args.episodic else ()), FakeEnvs([5, 6])
    run = start(args, envs, script=script)
    train(run, envs, directory, eval_envs, script=script)
    return run, numbers(directory), [action.tolist() for action in eval_envs.sent]


FLAGS = {
    "defaults": {},
    "all at once": dict(
        utd_ratio=0.5, td_horizon=3, num_rollouts=2, imagine_initial_source="replay_true", encoder_consistency_coef=0.5,
        td_target_use_ema_policy=True, policy_trust_region_coef=0.3, initial_expert_from_behavior=False, episodic=True,
        reanalyze_use_chosen_action=False, entropy_coef=1e-3, reanalyze_horizon=2, reanalyze_log_std_min=-2.0,
        td_target_initial_source="same", eval_sample_elite=True, dropout=0.1, num_pi_trajs=0, kl_reduction="sum",
        chosen_action_noise=False, normalize_rho_weights=False, enc_lr_scale=0.3, num_q=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
def test_without_the_variants_flags_the_scripts_compute_the_same_bits(flags, tmp_path):
    """60 decisions after warm-up, 20 pretraining updates and 30 more, 6 reanalyses, evaluations."""
    (run, *told), *others = [whole(load(name), tmp_path / name, **FLAGS[flags]) for name in SCRIPTS]
    assert (run.global_step, run.updates, run.pretrained) == (80, 30, 20)
    assert [step for step, _, tag, _ in told[0] if tag == "eval/episodic_return"] == [40, 80]
    expert = run.buffer.columns(run.buffer.rows).expert[:10]
    assert (expert[:, :, 0] != 0).any()  # of warm-up rows, N(0, 1) until reanalyze
    for name, (other, *others_told) in zip(SCRIPTS[1:], others, strict=True):
        mine, theirs = (x.state_dict() | {"script": "", "args": {}} for x in (run, other))
        assert differences(mine, theirs) == [] and told == others_told, name


if __name__ == "__main__":
    for older, sibling in PAIRS:
        print(f'    "{sibling}": {{')
        for seam, row in seam_table(older, sibling).items():
            print(f"        {seam}: {row},")
        print("    },")
    sys.exit()
