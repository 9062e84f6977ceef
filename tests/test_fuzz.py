"""Command lines, replay contents and damaged checkpoints that nobody thought of."""

import math
import shutil
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import runs
import torch
from hypothesis import HealthCheck, given, settings

import bmpc

pytestmark = pytest.mark.filterwarnings("ignore")
CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def fuzz(examples: int):
    """Settings that find the same examples every time, and take the time they need."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

BASE = ["--task", "toy:Toy-v0", *runs.TINY, "--steps", "60", "--eval-freq", "0"]
CHOICES = {  # values that go with each other and with BASE's
    "num_envs": [1, 2, 3],
    "action_repeat": [1, 3],
    "episodic": [False, True],
    "discount": [0.5, 1.0],
    "utd_ratio": [0.25, 1, 3.3],
    "batch_size": [4, 9],
    "buffer_size": [36, 10_000],
    "enc_lr_scale": [0.3, 1],
    "grad_clip_norm": [0.01, 20],
    "rho": [0.1, 1, 2],
    "normalize_rho_weights": [False, True],
    "td_horizon": [1, 3],
    "consistency_coef": [0, 20],
    "entropy_coef": [0, 1e-2],
    "kl_reduction": ["mean", "sum"],
    "model_size": [1, 5],
    "enc_dim": [8, 24],
    "mlp_dim": [8, 24],
    "latent_dim": [8, 24],
    "num_enc_layers": [1, 2, 3],
    "simnorm_dim": [2, 4, 8],
    "num_q": [1, 3],
    "num_bins": [2, 21],
    "dropout": [0, 0.5],
    "horizon": [1, 2, 4],
    "iterations": [1, 3],
    "num_samples": [8, 16],
    "num_elites": [1, 8],
    "num_pi_trajs": [0, 1, 7],
    "temperature": [0.01, 100],
    "eval_sample_elite": [False, True],
    "reanalyze_interval": [0, 1],
    "reanalyze_batch_size": [1, 4],
    "reanalyze_horizon": [1, 5],
    "reanalyze_log_std_min": [-2],
    "expert_std_min": [0, 0.5],
    "reanalyze_use_chosen_action": [True],
    "chosen_action_noise": [False, True],
    "initial_expert_from_behavior": [False, True],
    "num_rollouts": [1, 4],
    "imagine_initial_source": ["replay_rollout", "replay_true"],
    "td_target_initial_source": ["replay_true", "same"],
    "encoder_consistency_coef": [0, 1],
    "td_target_use_ema_policy": [False, True],
    "policy_trust_region_coef": [0, 1],
}


def words(name: str, value) -> list[str]:
    option = name.replace("_", "-")
    return [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}={value}"]


VALID = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in CHOICES.items()})


def filled(t: bmpc.Training, steps: int):
    """Puts random episodes of 7 decisions into the buffer."""
    rng, E = torch.Generator().manual_seed(0), t.buffer.num_envs
    normal = lambda *shape: torch.randn(E, *shape, generator=rng)
    O, A = t.buffer.obs.shape[1], t.buffer.action.shape[1]
    t.buffer.begin(torch.ones(E, dtype=torch.bool), normal(O))
    for step in range(1, steps):
        expert = torch.stack([normal(A).clamp(-1, 1), torch.rand(E, A, generator=rng) + 0.05], 1)
        t.buffer.add(normal(A).clamp(-1, 1), expert, normal(), torch.full((E,), float(step % 7 == 0)), normal(O))
        t.buffer.begin(torch.full((E,), step % 7 == 0), normal(O))


@fuzz(40)
@given(VALID)
def test_every_valid_command_line_acts_and_learns(tmp_path, changes):
    argv = BASE + [word for name, value in changes.items() for word in words(name, value)]
    args, task = bmpc.fill_in(bmpc.parse_args(argv))
    t, p = bmpc.set_up(args, task, torch.device("cpu"))
    filled(t, 20)
    before = [x.clone() for x in t.model.parameters()]
    bmpc.learn(t, p, bmpc.Stopwatch(torch.device("cpu")), pretraining=True)
    bmpc.learn(t, p, bmpc.Stopwatch(torch.device("cpu")), pretraining=False)
    acted, metrics = bmpc.act(t.functions.plan, t.model, t.buffer, p.mean, args, t.draws)
    t.metrics.add(metrics, 2)
    assert acted.action.shape == (args.num_envs, 2) and acted.action.abs().max() <= 1
    assert acted.expert.isfinite().all() and acted.mean.isfinite().all()
    assert all(math.isfinite(value) for value in t.metrics.read().values())
    assert any(not torch.equal(x, y) for x, y in zip(before, t.model.parameters()))


WRONG = {
    "num_envs": [0, -1], "batch_size": [0, 3], "buffer_size": [0, 7], "horizon": [0, 13], "num_elites": [0, 17],
    "num_pi_trajs": [-1, 16], "latent_dim": [0, 31], "simnorm_dim": [0, 5], "learning_starts": [0, 5], "num_bins": [1],
    "lr": [0, -1, "nan", "inf"], "tau": [0, 1.5, "nan"], "discount": [0, 1.01, "nan"], "dropout": [1, -0.1],
    "utd_ratio": [0, -1, "nan", "inf"], "vmin": [10, "nan", "-inf"], "vmax": [-10.5, "inf"], "log_std_min": [2, "nan"],
    "min_std": [0, 3, "nan"], "max_std": ["inf"], "rho": [0, "nan"], "temperature": [0], "total_timesteps": [0, -5],
    "num_samples": [0, 3, 4], "iterations": [0], "td_horizon": [0], "num_rollouts": [0], "grad_clip_norm": [0],
    "eval_freq": [-1], "log_freq": [-1], "checkpoint_freq": [-1], "eval_episodes": [0], "seed": [-1, 2**32],
    "reanalyze_interval": [-1], "reanalyze_batch_size": [0, 17], "reanalyze_horizon": [0], "action_repeat": [0],
    "entropy_coef": [-1, "nan"], "consistency_coef": ["inf"], "policy_ema_tau": [0, 2], "enc_dim": [0], "num_q": [0],
    "reanalyze_log_std_min": ["nan", 2], "reanalyze_log_std_max": ["inf", -6],
    "env_id": ["dog-fly", "Toy-v9", "toy:Toy-v9", "nomodule:Toy-v0", "CartPole-v1", "", "-", "lqr-lqr_2_1"],
    "device": ["tpu", "cuda:99", "meta"], "run_name": ["a/b", ".."],
    "resume": ["nowhere", ""], "evaluate": ["nowhere"],
    # what tyro refuses
    "kl_reduction": ["max"], "model_size": [2, "big"], "seed ": ["one"], "lr ": ["fast"], "no_such_flag": [1],
}  # fmt: skip


def refused(argv, capsys) -> str:
    """What a refused command line prints; it has exit code 2 and creates nothing."""
    here = sorted(Path.cwd().rglob("*"))
    try:
        bmpc.main(argv)
        raise AssertionError(f"taken: {argv}")
    except bmpc.Failure as failure:
        assert failure.code == 2 and str(failure) and "\n" not in str(failure), argv
        said = str(failure)
    except SystemExit as end:
        assert end.code == 2, argv
        said = capsys.readouterr().err
    assert sorted(Path.cwd().rglob("*")) == here, argv
    return said


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_value_is_refused_and_named(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for value in WRONG[name]:
        said = refused([*BASE, f"--{name.strip().replace('_', '-')}={value}"], capsys)
        synonyms = {"num_pi_trajs": "proposals", "horizon": "window", "vmin": "bins", "env_id": "", "no_such_flag": "-flag",
                    "resume": "directory", "evaluate": "directory"}  # fmt: skip
        assert any(word in said for word in [*name.strip().split("_"), synonyms.get(name, name)]), said


ANYTHING = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-3, 40), st.floats(), st.floats(-3, 3), st.text(max_size=5), st.none()
).map(str)
ANY = st.dictionaries(st.sampled_from([f.name for f in bmpc.dataclasses.fields(bmpc.Args)]), ANYTHING, min_size=1, max_size=3)


@fuzz(150)
@given(ANY)
def test_any_other_command_line_is_taken_or_refused_in_one_line(tmp_path, monkeypatch, capsys, changes):
    monkeypatch.chdir(tmp_path)
    try:
        args = bmpc.parse_args(BASE + [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()])
        bmpc.choose_device(bmpc.fill_in(args)[0])
    except bmpc.Failure as failure:
        assert failure.code == 2 and "\n" not in str(failure), changes
    except SystemExit as end:
        assert end.code in (0, 2), changes
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Replay


class ListReplay:
    """What the replay should hold, in plain lists: each environment's rows (number, episode, [values])."""

    def __init__(self, num_envs: int, capacity: int, horizon: int):
        self.capacity, self.horizon = capacity, horizon
        self.rows = [[] for _ in range(num_envs)]
        self.opened, self.episode = [0] * num_envs, [-1] * num_envs

    def open(self, i: int, obs):
        self.rows[i].append((self.opened[i], self.episode[i], [obs]))
        self.opened[i] += 1
        self.rows[i] = self.rows[i][-self.capacity :]

    def begin(self, i: int, obs):
        self.episode[i] += 1
        self.open(i, obs)

    def add(self, i: int, values: list, next_obs):
        self.rows[i][-1][2].extend(values)
        self.open(i, next_obs)

    def windows(self) -> list[tuple]:
        """Every window there is, environment by environment, the oldest first: its observations and its rows' values."""
        found = []
        for rows in self.rows:
            for first in range(len(rows) - self.horizon):
                window = rows[first : first + self.horizon + 1]
                if window[0][1] == window[-1][1]:
                    found.append(([row[2][0] for row in window], [tuple(row[2][1:]) for row in window[:-1]]))
        return found


def held(buffer: bmpc.ReplayBuffer) -> list[tuple]:
    """Every window that `buffer` can draw, in its order."""
    n = int((buffer.tail - buffer.head).sum())
    if n == 0:
        return []
    batch = buffer.sample((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    columns = [batch.action[..., 0], batch.reward, batch.terminated, batch.expert[..., 0, 0], batch.expert[..., 1, 0]]
    values = torch.stack(columns, -1).transpose(0, 1).tolist()
    return [(obs, [tuple(row) for row in rows]) for obs, rows in zip(batch.obs[..., 0].T.tolist(), values)]


@fuzz(60)
@given(st.data())
def test_the_replay_holds_what_a_list_of_episodes_would(data):
    E, T = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    capacity = data.draw(st.integers(T + 2, 30))
    task, device, unique = bmpc.TaskInfo(1, 1, None), torch.device("cpu"), iter(range(1, 10**6))
    number = lambda: float(next(unique))
    buffer, model = bmpc.ReplayBuffer(E, capacity, task, T, device), ListReplay(E, capacity, T)
    obs = [number() for _ in range(E)]
    buffer.begin(torch.ones(E, dtype=torch.bool), torch.tensor(obs)[:, None])
    for i in range(E):
        model.begin(i, obs[i])
    left = [data.draw(st.integers(1, 12)) for _ in range(E)]  # decisions of each environment's episode still to come
    for step in range(data.draw(st.integers(1, 60))):
        values = [[number() for _ in range(5)] for _ in range(E)]
        following, first = [number() for _ in range(E)], [number() for _ in range(E)]
        action, reward, terminated, mean, std = torch.tensor(values).T
        expert = torch.stack([mean, std], 1)[..., None]
        buffer.add(action[:, None], expert, reward, terminated, torch.tensor(following)[:, None])
        left = [n - 1 for n in left]
        ended = [n == 0 for n in left]
        buffer.begin(torch.tensor(ended), torch.tensor(first)[:, None])
        for i in range(E):
            model.add(i, values[i], following[i])
            if ended[i]:
                model.begin(i, first[i])
                left[i] = data.draw(st.integers(1, 12))
        if step % 11 == 10 and data.draw(st.booleans()):  # saved, and loaded into a ring that is larger or not
            capacity += data.draw(st.integers(0, 9))
            larger = bmpc.ReplayBuffer(E, capacity, task, T, device)
            larger.load_state_dict(buffer.state_dict())
            buffer, model.capacity = larger, capacity
        if step % 7 == 6:
            assert held(buffer) == model.windows()
    assert held(buffer) == model.windows()
    current = [rows[-1][2][0] for rows in model.rows]
    assert buffer.current_obs()[:, 0].tolist() == current


@fuzz(30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_every_window_is_drawn_as_often_as_any_other(lengths, seed):
    buffer = bmpc.ReplayBuffer(2, 40, bmpc.TaskInfo(1, 1, None), 2, torch.device("cpu"))
    x = iter(range(10**6))
    fresh = lambda: torch.tensor([[float(next(x))], [float(next(x))]])
    buffer.begin(torch.ones(2, dtype=torch.bool), fresh())
    for n in lengths:
        for _ in range(n):
            buffer.add(fresh(), torch.zeros(2, 2, 1), torch.zeros(2), torch.zeros(2), fresh())
        buffer.begin(torch.tensor([True, False]), fresh())
    n = int((buffer.tail - buffer.head).sum())
    if n == 0:
        return
    u = torch.rand(200 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counts = np.unique(buffer.sample(u).obs[0, :, 0].numpy(), return_counts=True)[1]
    assert len(counts) == n and abs(counts - 200).max() < 6 * math.sqrt(200)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory) -> Path:
    """A run's directory with two checkpoints."""
    path = tmp_path_factory.mktemp("run")
    args, task = bmpc.fill_in(bmpc.parse_args(BASE))
    bmpc.write_json(path / "args.json", bmpc.dataclasses.asdict(args))
    t, p = bmpc.set_up(args, task, torch.device("cpu"))
    for step in (10, 20):
        p.global_step = step
        assert bmpc.write_checkpoint(bmpc.snapshot(t, p, bmpc.Log(path, 1)), path, 0.0)
    return path


@fuzz(60)
@given(st.data())
def test_a_checkpoint_damaged_anywhere_is_never_taken_for_a_good_one(checkpointed, tmp_path, data):
    whole = (checkpointed / "checkpoint.pt").read_bytes()
    good = {name: torch.load(checkpointed / name, weights_only=True) for name in ("checkpoint.pt", "checkpoint.previous.pt")}
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:place]
    else:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    for name in ("args.json", "checkpoint.previous.pt"):
        shutil.copy(checkpointed / name, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(damaged)
    state = bmpc.read_checkpoint(tmp_path)
    assert any(runs.differences(state, other) == [] for other in good.values()), place
