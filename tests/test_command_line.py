"""The command line: defaults, names and docstrings of flags, tasks, and errors that are reported in one line."""

import ast
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import runs
from conftest import small_args

import bmpc

DEFAULTS = dict(  # those of the specification, written down a second time
    exp_name="bmpc", run_name="", seed=1, device="auto", torch_deterministic=True,
    track=False, wandb_project_name="bmpc", wandb_entity=None, capture_video=False, profile=False, eval_freq=10_000,
    eval_episodes=10, log_freq=1_000, checkpoint_freq=10_000, keep_replay=True, resume="", evaluate="", preset="full",
    env_id="dog-run", env_kwargs="{}",
    num_envs=4, action_repeat=None, episodic=None, discount=None, discount_denom=5.0, discount_min=0.95,
    discount_max=0.995, total_timesteps=200_000, learning_starts=2_500, utd_ratio=1.0, batch_size=256,
    buffer_size=1_000_000, lr=3e-4, enc_lr_scale=1.0, grad_clip_norm=20.0, tau=0.01, rho=0.5,
    normalize_rho_weights=True, td_horizon=1, consistency_coef=10.0, reward_coef=0.1, value_coef=0.1,
    termination_coef=1.0, entropy_coef=0.0, kl_reduction="mean", model_size=5, enc_dim=None, mlp_dim=None,
    latent_dim=None, num_enc_layers=None, simnorm_dim=8, num_q=None, num_bins=101, vmin=-10.0, vmax=10.0, dropout=0.01,
    log_std_min=-5.0, log_std_max=1.0, horizon=3, iterations=6, extra_iterations=2, num_samples=512, num_elites=64,
    num_pi_trajs=24, min_std=0.1, max_std=2.0, temperature=0.5, eval_sample_elite=False, reanalyze_interval=10,
    reanalyze_batch_size=20, reanalyze_horizon=None, reanalyze_log_std_min=None, reanalyze_log_std_max=None,
    expert_std_scale=1.5, expert_std_min=0.1, compile=True, cudagraphs=True, matmul_precision="high",
    reanalyze_use_chosen_action=True, chosen_action_noise=True, initial_expert_from_behavior=True,
    num_rollouts=1, imagine_initial_source="replay_rollout", td_target_initial_source="replay_true",
    encoder_consistency_coef=0.0, td_target_use_ema_policy=False, policy_ema_tau=0.01, policy_trust_region_coef=0.0,
)  # fmt: skip
SIZES = {  # model_size: enc_dim, mlp_dim, latent_dim, num_enc_layers, num_q
    1: (256, 384, 128, 2, 2),
    5: (256, 512, 512, 2, 5),
    19: (1024, 1024, 768, 3, 5),
    48: (1792, 1792, 768, 4, 5),
    317: (4096, 4096, 1376, 5, 8),
}

# --- flags


def test_defaults_match_the_specification():
    assert dataclasses.asdict(bmpc.Args()) == dataclasses.asdict(bmpc.parse_args([])) == DEFAULTS
    with pytest.raises(dataclasses.FrozenInstanceError):
        bmpc.Args().horizon = 5


def test_every_field_of_args_has_a_docstring():
    """Docstrings are read from the source, as tyro does: a string on its own right below the field."""
    tree = ast.parse(Path(bmpc.__file__).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body[1:]
    assert [field.target.id for field in body[::2]] == list(DEFAULTS)  # also in this order
    assert all(isinstance(docstring.value.value, str) and len(docstring.value.value) > 8 for docstring in body[1::2])


def test_every_field_can_be_set_from_the_command_line():
    given = {name: not value if isinstance(value, bool) else 7 for name, value in DEFAULTS.items()}
    given |= dict(preset="small", episodic=True, kl_reduction="sum", model_size=19, matmul_precision="medium")
    given |= dict(imagine_initial_source="replay_true", td_target_initial_source="same", resume="", evaluate="")
    args = dataclasses.asdict(bmpc.parse_args(runs.words(given)))
    assert [name for name, value in given.items() if args[name] not in (value, str(value))] == []


SMALL = "--steps 12500 --eval-freq 2500 --eval-episodes 5 --model-size 1 --enc-dim 128 --mlp-dim 128 --latent-dim 128"
SMALL += " --num-q 2 --num-samples 128 --num-elites 16 --num-pi-trajs 8 --batch-size 128 --reanalyze-batch-size 10"


def test_preset_sets_flags_and_flags_override_it():
    assert bmpc.parse_args(["--preset", "small"]) == bmpc.parse_args([*SMALL.split(), "--preset", "small"])
    expected = dataclasses.replace(bmpc.parse_args(SMALL.split()), preset="small", num_q=5)
    assert bmpc.parse_args(["--num-q", "5", "--preset", "small"]) == expected


def test_episodic_takes_the_values_that_help_lists():
    for words in ("--episodic", "--episodic True", "--episodic=True"):
        assert bmpc.parse_args(words.split()).episodic is True
    for words in ("--no-episodic", "--episodic False"):
        assert bmpc.parse_args(words.split()).episodic is False
    assert bmpc.parse_args(["--episodic", "None"]).episodic is None


# --- tasks

TASKS = {
    "dog-run": "dm_control/dog-run-v0",
    "dm_control/dog-run-v0": "dm_control/dog-run-v0",
    "humanoid_CMU-run": "dm_control/humanoid_CMU-run-v0",
    "finger-turn-easy": "dm_control/finger-turn_easy-v0",
    "cup-catch": "dm_control/ball_in_cup-catch-v0",
    "pointmass-easy": "dm_control/point_mass-easy-v0",
    "Pendulum-v1": "Pendulum-v1",
    "toy:Toy-v0": "toy:Toy-v0",
}


def test_short_task_names():
    assert {task: bmpc.resolve_env_id(task) for task in TASKS} == TASKS


def test_unknown_task_suggests_a_similar_one():
    with pytest.raises(bmpc.UsageError, match="dog-rum.* cannot be made: .*`dog-run`"):
        bmpc.resolve_args(small_args(env_id="dog-rum"))


def test_run_directory_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = lambda **changes: str(bmpc.open_run_directory(bmpc.Args(**changes))[0])
    assert name(env_id="dm_control/dog-run-v0") == "runs/dog-run__bmpc__1"
    assert name(env_id="toy:Dog/Run-v0", seed=3, exp_name="mine", run_name="utd4") == "runs/Dog_Run-v0__mine__3__utd4"


class CustomEnv(gym.Env):
    """An environment with given spaces. It records its actions, and truncates its only episode after `ends` steps.

    `limit` is the time limit inside a dm_control environment.
    """

    def __init__(self, observation=None, action=None, limit=math.inf, ends=5):
        self.observation_space = observation or gym.spaces.Box(-1, 1, (3,))
        self.action_space = action or gym.spaces.Box(-1, 1, (2,))
        self._env = SimpleNamespace(_step_limit=limit)
        self.ends = ends
        self.actions = []

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        self.actions.append(np.asarray(action).tolist())
        n = len(self.actions)
        return self.observation_space.sample(), 10.0**n, False, n == self.ends, {}


@pytest.fixture
def register_env():
    """Register Custom-v0, whose constructor does not accept render_mode, until the end of the test."""

    def register(max_episode_steps=None, **kwargs):
        make = lambda more=None: CustomEnv(**kwargs, **(more or {}))
        gym.register("Custom-v0", entry_point=make, max_episode_steps=max_episode_steps)
        return "Custom-v0"

    yield register
    gym.registry.pop("Custom-v0", None)


EPISODES = [  # a task, or arguments of register_env; action repeat; decisions per episode; discount
    (dict(max_episode_steps=1000), 2, 500, 0.99),
    (dict(max_episode_steps=1000), None, 1000, 0.995),
    (dict(max_episode_steps=60), 7, 9, 0.95),
    (dict(max_episode_steps=300), None, 300, 1 - 1 / 60),
    (dict(limit=1000), 4, 250, 0.98),
    (dict(), None, None, 0.97),  # without a time limit, --discount is required
    ("cartpole-swingup", None, 500, 0.99),
    ("Pendulum-v1", None, 200, 0.975),
]


@pytest.mark.parametrize("task, repeat, n, discount", EPISODES)
def test_discount_from_episode_length(register_env, task, repeat, n, discount):
    """It is clip((n/5 - 1)/(n/5), 0.95, 0.995)."""
    env_id = task if isinstance(task, str) else register_env(**task)
    args, task = bmpc.resolve_args(small_args(env_id=env_id, action_repeat=repeat, discount=None if n else discount))
    assert task.episode_length == n and args.discount == pytest.approx(discount)


DISCOUNTS = [  # flags, discount for episodes of 100 decisions
    (dict(discount_denom=10.0, discount_min=0.1), 0.9),
    (dict(discount_denom=10.0, discount_min=0.93), 0.93),
    (dict(discount_min=0.1, discount_max=0.94), 0.94),
]


@pytest.mark.parametrize("flags, discount", DISCOUNTS)
def test_flags_of_the_discount(register_env, flags, discount):
    args = small_args(env_id=register_env(max_episode_steps=100), discount=None, **flags)
    assert bmpc.resolve_args(args)[0].discount == pytest.approx(discount)


def test_action_repeat_sums_rewards_until_the_episode_ends():
    env = bmpc.ActionRepeat(CustomEnv(), 3)
    assert [env.step(0)[1:4] for _ in range(2)] == [(1110.0, False, False), (110000.0, False, True)]


def test_actions_are_vectors_and_rescaled(register_env):
    space = gym.spaces.Box(np.float32([[-2, 0], [0, 0]]), np.float32([[2, 10], [1, 4]]))
    args = small_args(env_id=register_env(9, action=space))
    assert bmpc.inspect_task(args).action_dim == 4
    env = bmpc.make_env(args)
    env.reset(seed=0)
    env.step(np.float32([-1, 0, 1, 0.5]))
    np.testing.assert_allclose(env.unwrapped.actions, [[[-2, 5], [1, 3]]], atol=1e-6)


def test_nested_observations_are_flattened(register_env):
    inner = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2, 2), np.float64), b=gym.spaces.Discrete(3))
    space = gym.spaces.Dict(outer=inner, c=gym.spaces.Box(-1, 1, (2,)))
    args = small_args(env_id=register_env(9, observation=space))
    assert bmpc.inspect_task(args).obs_dim == 4 + 3 + 2
    obs, _ = bmpc.make_env(args).reset(seed=0)
    assert obs.shape == (9,) and obs.dtype == np.float32


def test_env_kwargs_without_render_mode(register_env):
    kwargs = '{"more": {"ends": 2}, "max_episode_steps": 7}'
    env = bmpc.make_env(small_args(env_id=register_env(9), env_kwargs=kwargs), render=True)
    assert env.unwrapped.ends == 2 and env.spec.max_episode_steps == 7
    assert env.get_wrapper_attr("render_frame")() is None


def test_model_size_sets_missing_sizes(register_env):
    sizes = dict.fromkeys(bmpc.MODEL_SIZE_FIELDS) | dict(num_q=3, latent_dim=64)
    args, _ = bmpc.resolve_args(small_args(env_id=register_env(100), model_size=48, **sizes))
    assert [getattr(args, name) for name in bmpc.MODEL_SIZE_FIELDS] == [1792, 1792, 64, 4, 3]
    assert bmpc.MODEL_SIZES == SIZES


def test_without_reanalyze_its_batch_size_does_not_matter(register_env):
    too_large = dict(env_id=register_env(100), reanalyze_batch_size=13, batch_size=12)
    with pytest.raises(bmpc.UsageError, match="--reanalyze-batch-size is 13, above --batch-size 12"):
        bmpc.resolve_args(small_args(**too_large))
    bmpc.resolve_args(small_args(**too_large, reanalyze_interval=0))


# --- unsupported tasks (test_fuzz.py tests other errors)

UNSUPPORTED = {  # arguments of register_env, a part of the error message
    "image": (dict(max_episode_steps=9, observation=gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)), "not images"),
    "sequence": (dict(max_episode_steps=9, observation=gym.spaces.Sequence(gym.spaces.Box(-1, 1))), "vectors"),
    "unbounded": (dict(max_episode_steps=9, action=gym.spaces.Box(-np.inf, np.inf, (2,))), "bounded Box"),
    "discrete": (dict(max_episode_steps=9, action=gym.spaces.MultiDiscrete([3, 3])), "bounded Box"),
    "integers": (dict(max_episode_steps=9, action=gym.spaces.Box(0, 3, (2,), np.int64)), "bounded Box"),
    "no limit": (dict(), "--discount"),
    "short episodes": (dict(max_episode_steps=1), "horizon"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_tasks_are_rejected(tmp_path, monkeypatch, capsys, register_env, name):
    env_args, message = UNSUPPORTED[name]
    monkeypatch.chdir(tmp_path)
    assert bmpc.main([*runs.TINY, "--task", register_env(**env_args)]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1
    assert output.out == "" and not list(tmp_path.iterdir())
