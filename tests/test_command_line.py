"""The command line: defaults, names, docstrings, tasks, and bad input refused in one line before anything is made."""

import ast
import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, flags, small_args

import bmpc

DEFAULTS = dict(  # the numbers of the algorithm's description, written down a second time
    exp_name="bmpc", run_name="", seed=1, device="auto", torch_deterministic=True, track=False, wandb_project_name="bmpc",
    wandb_entity=None, capture_video=False, eval_freq=10_000, eval_episodes=10, log_freq=1_000, checkpoint_freq=10_000,
    resume="auto", evaluate="",
    env_id="dog-run", num_envs=4, action_repeat=None, episodic=False, discount=None, discount_denom=5.0, discount_min=0.95,
    discount_max=0.995,
    total_timesteps=200_000, learning_starts=2_500, utd_ratio=1.0, batch_size=256, buffer_size=1_000_000, lr=3e-4,
    enc_lr_scale=1.0, grad_clip_norm=20.0, tau=0.01, rho=0.5, normalize_rho_weights=True, td_horizon=1,
    consistency_coef=10.0, reward_coef=0.1, value_coef=0.1, termination_coef=1.0, entropy_coef=0.0, kl_reduction="mean",
    model_size=5, enc_dim=None, mlp_dim=None, latent_dim=None, num_enc_layers=None, simnorm_dim=8, num_q=None,
    num_bins=101, vmin=-10.0, vmax=10.0, dropout=0.01, log_std_min=-5.0, log_std_max=1.0,
    horizon=3, iterations=6, extra_iterations=2, num_samples=512, num_elites=64, num_pi_trajs=24, min_std=0.1, max_std=2.0,
    temperature=0.5, eval_sample_elite=False,
    reanalyze_interval=10, reanalyze_batch_size=20, reanalyze_horizon=None, reanalyze_log_std_min=None,
    reanalyze_log_std_max=None, expert_std_scale=1.5, expert_std_min=0.1,
    compile=True, cudagraphs=True, matmul_precision="high",
    reanalyze_use_chosen_action=True, chosen_action_noise=True, initial_expert_from_behavior=True, num_rollouts=1,
    imagine_initial_source="replay_rollout", td_target_initial_source="replay_true", encoder_consistency_coef=0.0,
    td_target_use_ema_policy=False, policy_ema_tau=0.01, policy_trust_region_coef=0.0,
)  # fmt: skip
SIZES = {  # model_size: enc_dim, mlp_dim, latent_dim, num_enc_layers, num_q
    1: (256, 384, 128, 2, 2),
    5: (256, 512, 512, 2, 5),
    19: (1024, 1024, 768, 3, 5),
    48: (1792, 1792, 768, 4, 5),
    317: (4096, 4096, 1376, 5, 8),
}
SIZE_FLAGS = ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q")


# --- flags


def test_the_defaults_are_the_descriptions_and_no_flag_is_missing_or_unknown():
    assert dataclasses.asdict(bmpc.Args()) == DEFAULTS
    assert dataclasses.asdict(bmpc.parse_args([])) == DEFAULTS


def test_args_is_flat_and_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        bmpc.Args().horizon = 5
    assert not any(dataclasses.is_dataclass(value) for value in dataclasses.asdict(bmpc.Args()).values())


def test_every_field_of_args_has_a_docstring():
    """Read from the source, as tyro does: a string on its own right below the field."""
    tree = ast.parse((ROOT / "bmpc.py").read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    fields = [k for k, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert [body[k].target.id for k in fields] == list(DEFAULTS)  # in the described groups' order, too
    for k in fields:
        below = body[k + 1] if k + 1 < len(body) else None
        documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
        assert documented and len(below.value.value) > 8, body[k].target.id


def test_every_field_can_be_set_from_the_command_line():
    for name, value in DEFAULTS.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            assert getattr(bmpc.parse_args([option]), name) is True
            assert getattr(bmpc.parse_args([option.replace("--", "--no-")]), name) is False
        elif name not in ("resume", "evaluate"):  # those read a directory
            new = {"model_size": "19", "kl_reduction": "sum", "matmul_precision": "medium"}.get(name)
            new = new or {"imagine_initial_source": "replay_true", "td_target_initial_source": "same"}.get(name, "7")
            assert str(getattr(bmpc.parse_args([option, new]), name)) in (new, new + ".0"), name


def test_the_names_td_mpc2s_users_type_mean_the_same():
    args = bmpc.parse_args(["--task", "cup-catch", "--steps", "77"])
    assert (args.env_id, args.total_timesteps) == ("cup-catch", 77)
    assert args == bmpc.parse_args(["--env-id", "cup-catch", "--total-timesteps", "77"])


# --- tasks


@pytest.mark.parametrize(
    "task, env_id",
    [
        ("dog-run", "dm_control/dog-run-v0"),
        ("dm_control/dog-run-v0", "dm_control/dog-run-v0"),
        ("finger-turn-easy", "dm_control/finger-turn_easy-v0"),
        ("finger-turn_easy", "dm_control/finger-turn_easy-v0"),
        ("cup-catch", "dm_control/ball_in_cup-catch-v0"),
        ("ball_in_cup-catch", "dm_control/ball_in_cup-catch-v0"),
        ("pointmass-easy", "dm_control/point_mass-easy-v0"),
        ("cartpole-balance-sparse", "dm_control/cartpole-balance_sparse-v0"),
        ("Pendulum-v1", "Pendulum-v1"),
        ("HalfCheetah-v5", "HalfCheetah-v5"),
    ],
)
def test_tasks_by_their_short_names(task, env_id):
    assert bmpc.resolve_env_id(task) == env_id


NEAR = [("dog-rum", "dog-run"), ("Pendulum-v11", "Pendulum-v1"), ("finger-turn", "finger-turn_easy")]


@pytest.mark.parametrize("task, near", NEAR)
def test_an_unknown_task_is_answered_with_near_ones(task, near):
    with pytest.raises(bmpc.Failure, match=near) as failure:
        bmpc.resolve_env_id(task)
    assert failure.value.code == 2 and repr(task) in str(failure.value)


def test_the_run_directory_is_named_after_task_experiment_seed_and_run():
    name = lambda **changes: str(bmpc.run_directory(dataclasses.replace(bmpc.Args(), **changes)))
    assert name(env_id="dm_control/dog-run-v0") == "runs/dog-run__bmpc__1"
    assert name(env_id="dm_control/dog-run-v0", seed=3, exp_name="mine", run_name="utd4") == "runs/dog-run__mine__3__utd4"
    assert name(env_id="ALE/Thing-v5") == "runs/ALE_Thing-v5__bmpc__1"


class Body(gym.Env):
    """An environment of these spaces; `limit` is dm_control's own step limit, if it has one."""

    def __init__(self, observation=None, action=None, limit=None):
        self.observation_space = observation or gym.spaces.Box(-1, 1, (3,))
        self.action_space = action or gym.spaces.Box(-1, 1, (2,))
        self._env = SimpleNamespace(_step_limit=limit)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, False, False, {}


@pytest.fixture
def body():
    """Registers Body-v0 with the given spaces for the length of a test."""

    def register(max_episode_steps=None, **kwargs):
        gym.register("Body-v0", entry_point=lambda render_mode=None: Body(**kwargs), max_episode_steps=max_episode_steps)
        return "Body-v0"

    yield register
    gym.registry.pop("Body-v0", None)


@pytest.mark.parametrize(
    "steps, repeat, n, discount",
    [(1000, 2, 500, 0.99), (1000, None, 1000, 0.995), (60, None, 60, 1 - 1 / 12), (60, 7, 9, 0.95), (300, None, 300, 1 - 1 / 60)],
)
def test_the_discount_follows_from_the_episodes_length_in_decisions(body, steps, repeat, n, discount):
    """clip((n/5 - 1)/(n/5), 0.95, 0.995)."""
    args, task = bmpc.fill_in(small_args(env_id=body(steps), action_repeat=repeat, discount=None))
    assert task.episode_length == n and args.discount == pytest.approx(max(0.95, discount))


def test_dm_controls_own_limit_counts_where_gymnasium_has_none(body):
    args, task = bmpc.fill_in(small_args(env_id=body(limit=1000), action_repeat=4, discount=None))
    assert task.episode_length == 250 and args.discount == pytest.approx(0.98)


def test_dm_control_repeats_actions_twice_and_others_once(body):
    args, task = bmpc.fill_in(small_args(env_id="cartpole-swingup", action_repeat=None, discount=None))
    assert (args.action_repeat, task.episode_length, args.discount, task.obs_dim) == (2, 500, 0.99, 5)
    args, task = bmpc.fill_in(small_args(env_id="Pendulum-v1", action_repeat=None, discount=None))
    assert (args.action_repeat, task.episode_length, args.discount) == (1, 200, pytest.approx(0.975))


def test_an_action_repeat_sums_rewards_and_stops_where_the_episode_ends(body):
    class Counting(Body):
        def __init__(self):
            super().__init__()
            self.t = 0

        def step(self, action):
            self.t += 1
            return np.zeros(3, np.float32), 10.0**self.t, False, self.t == 5, {}

    env = bmpc.ActionRepeat(Counting(), 3)
    assert [env.step(None)[1:4] for _ in range(2)] == [(1110.0, False, False), (110000.0, False, True)]


def test_actions_are_rescaled_to_the_environments(body):
    seen = []

    class Wide(Body):
        def step(self, action):
            seen.append(action.tolist())
            return super().step(action)

    space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    gym.register("Wide-v0", lambda render_mode: Wide(action=space), max_episode_steps=9)
    try:
        env = bmpc.make_env("Wide-v0", 1)
        env.reset(seed=0)
        for action in ([-1, -1], [1, 1], [0, 0.5]):
            env.step(np.float32(action))
    finally:
        gym.registry.pop("Wide-v0")
    np.testing.assert_allclose(seen, [[-2, 0], [2, 10], [0, 7.5]], atol=1e-6)


def test_actions_that_are_a_matrix_are_decided_as_a_vector(body):
    seen = []

    class Matrix(Body):
        def step(self, action):
            seen.append(action.tolist())
            return super().step(action)

    space = gym.spaces.Box(np.float32([[-2, 0], [0, 0]]), np.float32([[2, 10], [1, 4]]))
    gym.register("Matrix-v0", lambda render_mode=None: Matrix(action=space), max_episode_steps=9)
    try:
        assert bmpc.probe("Matrix-v0", 1)[1].action_dim == 4
        env = bmpc.make_env("Matrix-v0", 1)
        env.reset(seed=0)
        env.step(np.float32([-1, 0, 1, 0.5]))
    finally:
        gym.registry.pop("Matrix-v0")
    np.testing.assert_allclose(seen, [[[-2, 5], [1, 3]]], atol=1e-6)


# --- sizes


@pytest.mark.parametrize("size", list(SIZES))
def test_model_sizes_fill_in_what_is_not_given(body, size):
    unset = dict.fromkeys(SIZE_FLAGS)
    args, _ = bmpc.fill_in(small_args(env_id=body(100), model_size=size, **unset))
    assert tuple(getattr(args, name) for name in SIZE_FLAGS) == SIZES[size]
    args, _ = bmpc.fill_in(small_args(env_id="Body-v0", model_size=size, **(unset | {"num_q": 2, "latent_dim": 64})))
    assert args.num_q == 2 and args.latent_dim == 64 and args.mlp_dim == SIZES[size][1]


# --- bad input


def refused(words, directory, monkeypatch):
    """The message with which main refuses this command line, having written nothing."""
    monkeypatch.chdir(directory)
    with pytest.raises(bmpc.Failure) as failure:
        bmpc.main(words)
    assert failure.value.code == 2 and "\n" not in str(failure.value)
    assert os.listdir(directory) == []
    return str(failure.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(task="dog-rum"), "dog-run"),
        (dict(task="dm_control/lqr-lqr_2_1-v0", discount=0.99), "unbounded"),
        (dict(task="CartPole-v1"), "bounded Box"),
        (dict(num_elites=21), "21 elites of 20 samples"),
        (dict(num_pi_trajs=20), "20 policy proposals of 20 samples"),
        (dict(latent_dim=18), "latent_dim 18"),
        (dict(reanalyze_batch_size=13), "13 windows of a batch of 12"),
        (dict(learning_starts=5), "learning_starts 5"),
        (dict(buffer_size=9), "buffer_size 9"),
        (dict(device="cuda:99"), "cuda:99"),
        (dict(device="tpu"), "tpu"),
        (dict(device="mps"), "mps"),
        (dict(reanalyze_use_chosen_action=False, chosen_action_noise=False), "chosen-action-noise"),
        (dict(run_name="a/b"), "run-name"),
        (dict(lr=0), "--lr"),
        (dict(lr="nan"), "--lr"),
        (dict(lr="inf"), "--lr"),
        (dict(tau=0), "--tau"),
        (dict(tau=1.1), "--tau"),
        (dict(policy_ema_tau=-0.1), "--policy-ema-tau"),
        (dict(discount=1.5), "--discount"),
        (dict(discount=0), "--discount"),
        (dict(discount_min=0.99, discount_max=0.9), "--discount-min"),
        (dict(dropout=1), "--dropout"),
        (dict(horizon=0), "--horizon"),
        (dict(td_horizon=0), "--td-horizon"),
        (dict(num_rollouts=0), "--num-rollouts"),
        (dict(num_envs=0), "--num-envs"),
        (dict(num_envs=-4), "--num-envs"),
        (dict(total_timesteps=0), "--total-timesteps"),
        (dict(utd_ratio=-1), "--utd-ratio"),
        (dict(utd_ratio="nan"), "--utd-ratio"),
        (dict(seed=-1), "--seed"),
        (dict(seed=2**32), "--seed"),
        (dict(rho=0), "--rho"),
        (dict(min_std=3), "--min-std"),
        (dict(min_std=0), "--min-std"),
        (dict(vmin=10, vmax=-10), "--vmin"),
        (dict(vmin=10, vmax=10), "bins"),
        (dict(num_bins=1), "bins"),
        (dict(log_std_min=2), "--log-std-min"),
        (dict(reanalyze_log_std_min=2), "--reanalyze-log-std-min"),
        (dict(reanalyze_log_std_max="nan"), "--reanalyze-log-std-m"),
        (dict(iterations=0), "--iterations"),
        (dict(temperature=0), "--temperature"),
        (dict(eval_episodes=0), "--eval-episodes"),
        (dict(eval_freq=-1), "--eval-freq"),
        (dict(action_repeat=0), "--action-repeat"),
        (dict(reward_coef=-1), "--reward-coef"),
        (dict(encoder_consistency_coef="inf"), "--encoder-consistency-coef"),
        (dict(policy_trust_region_coef=-0.1), "--policy-trust-region-coef"),
        (dict(evaluate="nowhere"), "nowhere"),
        (dict(resume="nowhere"), "nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_bad_input_is_refused_before_anything_is_made(tmp_path, monkeypatch, changes, says):
    words = flags(**({"task": "Pendulum-v1"} | changes))
    assert says in refused(words, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(max_episode_steps=9, observation=gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)), "images"),
        (dict(max_episode_steps=9, observation=gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2, 2)))), "vectors"),
        (dict(max_episode_steps=9, observation=gym.spaces.Discrete(4)), "vectors"),
        (dict(max_episode_steps=9, action=gym.spaces.Box(-np.inf, np.inf, (2,))), "unbounded"),
        (dict(max_episode_steps=9, action=gym.spaces.MultiDiscrete([3, 3])), "bounded Box"),
        (dict(), "--discount"),  # no step limit to take it from
        (dict(max_episode_steps=2), "horizon"),  # no episode holds a window of 3 decisions
    ],
    ids=["image", "matrix in a dict", "discrete observation", "unbounded", "discrete action", "no limit", "short episodes"],
)
def test_what_this_agent_cannot_play_is_refused(tmp_path, monkeypatch, body, kwargs, says):
    assert says in refused(flags(task=body(**kwargs)), tmp_path, monkeypatch)


def test_a_task_without_a_limit_plays_with_a_discount(body):
    args, task = bmpc.fill_in(small_args(env_id=body(), discount=0.97))
    assert args.discount == 0.97 and task.episode_length is None


def test_flags_that_do_nothing_are_warned_about(body, capsys):
    def warnings(**changes):
        bmpc.check_fit(small_args(**changes))
        return capsys.readouterr().err

    assert warnings() == ""
    assert "policy-ema-tau" in warnings(policy_ema_tau=0.03) and warnings(policy_ema_tau=0.03).count("\n") == 1
    assert warnings(policy_ema_tau=0.03, td_target_use_ema_policy=True) == ""
    assert warnings(policy_ema_tau=0.03, policy_trust_region_coef=0.1) == ""
    assert "td-target-initial-source" in warnings(td_target_initial_source="same", imagine_initial_source="replay_true")
    assert warnings(td_target_initial_source="same") == ""
    assert "chosen-action-noise" in warnings(chosen_action_noise=False, initial_expert_from_behavior=False)


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    """As a process: nothing on stdout, one line on stderr, an empty directory."""
    command = [sys.executable, str(ROOT / "bmpc.py"), *flags(task="Pendulum-v1", num_elites=600)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and os.listdir(tmp_path) == []
    assert done.stderr == "bmpc.py: error: 600 elites of 20 samples\n"


def test_importing_the_script_runs_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bmpc"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, "", "", [])
