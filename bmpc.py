"""BMPC: Bootstrapped Model Predictive Control (Wang et al., ICLR 2025, https://arxiv.org/abs/2503.18871), one file.

A planner (MPPI in the latent space of a learned world model, as in TD-MPC2, https://arxiv.org/abs/2310.16828) acts and is
the expert; the policy imitates it; the value heads are those of the policy; policy and value in turn guide the planner.

    python bmpc.py                                            # dog-run, 200k decisions, on the GPU if there is one
    python bmpc.py --task cheetah-run --seed 2 --utd-ratio 4  # another task, seed and ablation flag
    python bmpc.py --evaluate runs/dog-run__bmpc__1           # what a trained agent is worth; --capture-video shows it

The same command again continues a run that was stopped. Everything a run writes is in runs/<task>__<exp_name>__<seed>/.

Sections: Args - environment - math - networks - replay - planner - learning - evaluation - run directory - checkpoint -
the loop. Where this file departs from the official and the JAX implementation, each with its flag: README, "Departures".
"""

import copy
import ctypes.util
import dataclasses
import difflib
import fcntl
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import defaultdict
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Callable, Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import Tensor
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

KNOWN_GOOD = {"dm_control": "1.0.50", "mujoco": "3.17.0"}  # dm_control 1.0.50 fails with mujoco 4.0.0 (flex_vertedge)
MODEL_SIZES = {  # the sizes that TD-MPC2's users know, in millions of parameters
    1: dict(enc_dim=256, mlp_dim=384, latent_dim=128, num_enc_layers=2, num_q=2),
    5: dict(enc_dim=256, mlp_dim=512, latent_dim=512, num_enc_layers=2, num_q=5),
    19: dict(enc_dim=1024, mlp_dim=1024, latent_dim=768, num_enc_layers=3, num_q=5),
    48: dict(enc_dim=1792, mlp_dim=1792, latent_dim=768, num_enc_layers=4, num_q=5),
    317: dict(enc_dim=4096, mlp_dim=4096, latent_dim=1376, num_enc_layers=5, num_q=8),
}
TRY_AGAIN = 75  # exit code of a run that was asked to stop and wrote a checkpoint
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # that ask a run to stop


@dataclasses.dataclass(frozen=True)
class Args:
    """BMPC: a planner over a learned world model, and a policy bootstrapped from it."""

    # --- experiment
    exp_name: str = os.path.basename(__file__).removesuffix(".py")
    """name of the experiment, part of the run directory's name"""
    run_name: str = ""
    """a further part of the run directory's name, to keep runs with other flags apart"""
    seed: int = 1
    """seed of the experiment; every random number of a run follows from it"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N"""
    torch_deterministic: bool = True
    """ask torch for deterministic kernels, so that a seed gives the same numbers twice on one machine"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "bmpc"
    """the Weights & Biases project"""
    wandb_entity: Optional[str] = None
    """the Weights & Biases entity (team or user)"""
    capture_video: bool = False
    """write an mp4 of evaluation episode 0 at every evaluation (needs EGL or OSMesa on a machine without display)"""
    eval_freq: int = 10_000
    """decisions between evaluations; 0: none"""
    eval_episodes: int = 10
    """episodes of an evaluation, with the planner and again with the policy alone"""
    log_freq: int = 1_000
    """decisions between two lines of losses and speeds; 0: none"""
    checkpoint_freq: int = 10_000
    """decisions between checkpoints; 0: only at the end and when asked to stop"""
    resume: str = "auto"
    """auto: continue the run directory if it holds an unfinished run; never: refuse instead; RUN_DIR: continue that
    run, its args.json standing in for the flags that are not given"""
    evaluate: str = ""
    """RUN_DIR: evaluate its checkpoint, print both returns and train nothing"""

    # --- environment
    env_id: Annotated[str, tyro.conf.arg(aliases=["--task"])] = "dog-run"
    """a dm_control task (dog-run, cup-catch, dm_control/dog-run-v0) or any Gymnasium id with a bounded Box action space"""
    num_envs: int = 4
    """environments stepped at once, each in its own process (official: 1; JAX: 4)"""
    action_repeat: Optional[int] = None
    """simulator steps per decision, rewards summed; None: 2 for dm_control, 1 elsewhere"""
    episodic: bool = False
    """learn when episodes terminate; needed where the environment ends episodes other than by a time limit"""
    discount: Optional[float] = None
    """gamma per decision; None: clip((n/denom - 1)/(n/denom), min, max) for episodes of n decisions (TD-MPC2); 0.99 for 500"""
    discount_denom: float = 5.0
    """denom of the discount's formula"""
    discount_min: float = 0.95
    """lower bound of the discount's formula"""
    discount_max: float = 0.995
    """upper bound of the discount's formula"""

    # --- learning
    total_timesteps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 200_000
    """decisions of the whole run, summed over environments (env_steps = decisions x action_repeat)"""
    learning_starts: int = 2_500
    """decisions with random actions first, and then as many pretraining updates of the world model (JAX: 10 000)"""
    utd_ratio: float = 1.0
    """updates per decision, read as an exact decimal: 0.5 is one every second decision. Sweep 2a: do more updates per
    decision learn faster?"""
    batch_size: int = 256
    """windows of a batch"""
    buffer_size: int = 1_000_000
    """rows the replay holds at the most; it takes what the run needs"""
    sample_unfinished: bool = True
    """learn from episodes that are under way; off: only from finished ones (official)"""
    lr: float = 3e-4
    """learning rate of both Adams"""
    enc_lr_scale: float = 1.0
    """the encoder's learning rate is lr times this (official, TD-MPC2: 0.3)"""
    grad_clip_norm: float = 20.0
    """bound of the gradient's norm, over the world model and over the policy"""
    tau: float = 0.01
    """step of the target value heads towards the online ones, per update"""
    rho: float = 0.5
    """a step t of the rollout weighs rho^t in all losses"""
    normalize_rho_weights: bool = True
    """divide these weights by their sum; off: by the horizon (official)"""
    td_horizon: int = 1
    """imagined steps before the value target bootstraps"""
    consistency_coef: float = 10.0
    """weight of the latent consistency loss (official: 20, without normalized weights)"""
    reward_coef: float = 0.1
    """weight of the reward loss"""
    value_coef: float = 0.1
    """weight of the value loss"""
    termination_coef: float = 1.0
    """weight of the termination loss (with --episodic)"""
    entropy_coef: float = 0.0
    """weight of the policy's entropy bonus (official: 1e-4)"""
    kl_reduction: Literal["mean", "sum"] = "mean"
    """the KL over action dimensions (JAX: sum)"""

    # --- model
    model_size: Literal[1, 5, 19, 48, 317] = 5
    """millions of parameters, TD-MPC2's sizes; fills the sizes below that are None"""
    enc_dim: Optional[int] = None
    """width of the encoder's hidden layers"""
    mlp_dim: Optional[int] = None
    """width of all other hidden layers"""
    latent_dim: Optional[int] = None
    """size of the latent state"""
    num_enc_layers: Optional[int] = None
    """layers of the encoder, the last one included"""
    simnorm_dim: int = 8
    """size of a SimNorm group (TD-MPC2)"""
    num_q: Optional[int] = None
    """value heads (official: 2)"""
    num_bins: int = 101
    """bins of the two-hot distributions of rewards and values"""
    vmin: float = -10.0
    """first bin, in symlog units"""
    vmax: float = 10.0
    """last bin, in symlog units"""
    dropout: float = 0.01
    """dropout of the value heads' first layer, in the value loss only"""
    log_std_min: float = -5.0
    """lower end of the policy's log std (official: -3)"""
    log_std_max: float = 1.0
    """upper end of the policy's log std"""
    value_init: Literal["normal", "uniform"] = "normal"
    """first weights of the value heads: normal with std 0.02 as everywhere, or torch's uniform ones, biases too (official)"""

    # --- planning
    horizon: int = 3
    """T: steps of a plan, and of the windows the model is trained on"""
    iterations: int = 6
    """iterations of MPPI"""
    extra_iterations: int = 2
    """further iterations where the action has 20 dimensions or more"""
    num_samples: int = 512
    """N: candidates of an iteration, the policy's included"""
    num_elites: int = 64
    """candidates the next mean and std are made from"""
    num_pi_trajs: int = 24
    """P: candidates that the policy proposes"""
    min_std: float = 0.1
    """lower bound of the plan's std (official: 0.05; JAX: 0)"""
    max_std: float = 2.0
    """first std of the plan, and its upper bound"""
    temperature: float = 0.5
    """an elite's weight is softmax(temperature x return)"""
    eval_sample_elite: bool = False
    """evaluation plays a drawn elite instead of the best one (official)"""

    # --- expert
    reanalyze_interval: int = 10
    """updates between two reanalyses; 0: never"""
    reanalyze_batch_size: int = 20
    """windows of the batch whose states are planned anew"""
    reanalyze_horizon: Optional[int] = None
    """horizon of these plans; None: horizon"""
    reanalyze_log_std_min: Optional[float] = None
    """the policy's range when it proposes in reanalyze; None: log_std_min (official: -2)"""
    reanalyze_log_std_max: Optional[float] = None
    """None: log_std_max (official: 1)"""
    expert_std_scale: float = 1.5
    """the expert's std is multiplied by this in the policy loss (official: 1)"""
    expert_std_min: float = 0.1
    """and is at least this (official: 0)"""

    # --- speed
    compile: bool = True
    """compile planning and learning with torch.compile (a warning and eager mode where there is no compiler)"""
    cudagraphs: bool = True
    """replay the compiled functions as CUDA graphs (CUDA only, with --compile)"""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """float32 matrix products on CUDA: high is TF32"""

    # --- ablations
    reanalyze_use_chosen_action: bool = True
    """the expert's mean is the chosen action; off: the plan's mean (JAX). Sweep 2c: which target should the policy imitate?"""
    chosen_action_noise: bool = True
    """the chosen action at collection is the executed one, exploration noise included; off: the drawn elite (official).
    Goes with sweep 2c"""
    initial_expert_from_behavior: bool = True
    """a row's first expert is the plan that chose its action; off: a separate plan beside it. Sweep 2c: does the
    warm-started acting plan make a better first target?"""
    num_rollouts: int = 1
    """imagined trajectories per state in the value target. Sweep 2d: does their mean reduce variance?"""
    imagine_initial_source: Literal["replay_rollout", "replay_true"] = "replay_rollout"
    """states at which values are predicted: the model's rollout, or true encodings. Sweep 2e: which states teach better?"""
    td_target_initial_source: Literal["replay_true", "same"] = "replay_true"
    """states at which the imagination behind value targets starts: true encodings (BMPC), or those of
    imagine_initial_source. Goes with sweep 2e"""
    encoder_consistency_coef: float = 0.0
    """weight of the consistency loss with its gradient into the encoder. Sweep 2f: does it improve the representation?"""
    td_target_use_ema_policy: bool = False
    """an exponential moving average of the policy acts in value targets. Sweep 2g: do steadier targets help?"""
    policy_ema_tau: float = 0.01
    """step of that average towards the policy, per policy update. Sweep 2g: how fast should it follow?"""
    policy_trust_region_coef: float = 0.0
    """weight of KL(ema || policy) in the policy loss, relative to the expert's KL. Sweep 2g: does holding the policy
    back stabilize learning?"""


# What a resumed run may change without becoming another run, and what not even `--resume RUN_DIR` may change.
FREE_ARGS = set(
    "device torch_deterministic track wandb_project_name wandb_entity capture_video eval_freq eval_episodes log_freq "
    "checkpoint_freq resume evaluate total_timesteps compile cudagraphs matmul_precision".split()
)
SHAPING_ARGS = set(
    "exp_name run_name seed env_id num_envs action_repeat episodic learning_starts utd_ratio buffer_size model_size enc_dim "
    "mlp_dim latent_dim num_enc_layers simnorm_dim num_q num_bins vmin vmax horizon td_target_use_ema_policy "
    "policy_trust_region_coef".split()
)


class Failure(Exception):
    """What ends a run: one line for the user and the exit code (2: asked for the impossible, 1: failed)."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


class Interrupted(Exception):
    """Raised between two decisions of an evaluation when the run is asked to stop."""


# ---------------------------------------------------------------------------------------------------------------------
# Environment


class TaskInfo(NamedTuple):
    """What the agent must know of a task: sizes of observation and action, decisions of an episode (None: no limit)."""

    obs_dim: int
    action_dim: int
    episode_length: Optional[int]


def quietly(call: Callable):
    """call(), without the warnings of simulators: no display, spaces without bounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def resolve_env_id(task: str) -> str:
    """The Gymnasium id of a task: `dog-run` and `cup-catch` as TD-MPC2 spells them, or an id as it stands.

    `module:Id-v0` imports the module that registers the id first, as in gymnasium.make.
    """
    module, colon, task = task.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise Failure(f"the module {module!r} of the task cannot be imported: {e}") from e
    if task not in gym.registry:
        try:
            gym.register_envs(quietly(lambda: importlib.import_module("shimmy")))  # registers dm_control's tasks
        except Exception as e:  # besides ImportError what the renderer that MUJOCO_GL names may raise
            reason = str(e).partition("\n")[0]
            raise Failure(f"dm_control cannot be imported ({reason}); known to work together: {KNOWN_GOOD}") from e
    if task in gym.registry:
        return module + colon + task  # gymnasium imports the module again where there is need
    domain, _, name = task.removeprefix("dm_control/").removesuffix("-v0").partition("-")
    domain = {"cup": "ball_in_cup", "pointmass": "point_mass"}.get(domain, domain)
    env_id = f"dm_control/{domain}-{name.replace('-', '_')}-v0"
    if env_id in gym.registry:
        return env_id
    known = {short_name(known_id): known_id for known_id in gym.registry}
    near = difflib.get_close_matches(task, known, n=3) or difflib.get_close_matches(task.lower(), known, n=3, cutoff=0.4)
    raise Failure(f"unknown task {task!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def short_name(env_id: str) -> str:
    """`dog-run` for `dm_control/dog-run-v0`; other ids without their module, slashes as underscores."""
    env_id = env_id.rpartition(":")[2]
    if env_id.startswith("dm_control/"):
        env_id = env_id.removeprefix("dm_control/").removesuffix("-v0")
    return env_id.replace("/", "_")


class ActionRepeat(gym.Wrapper):
    """Repeats an action `repeat` times or until the episode ends; rewards are summed, without discount (TD-MPC2)."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class Worker(gym.Wrapper):
    """What an environment's process adds: replaying an unfinished episode, filming one, and a quiet life.

    `reset(options={"replay": [actions, ...]})` plays environment `index`'s actions and returns the observation that
    follows, with a digest of everything seen on the way; `reset(options={"video": path})` films the episode.
    """

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        self.index, self.frames, self.video, self.films = index, [], "", env.render_mode is not None
        if multiprocessing.parent_process() is not None:
            for number in SIGNALS:  # the main process alone decides when to stop
                signal.signal(number, signal.SIG_IGN)

    def reset(self, *, seed=None, options=None):
        options = options or {}
        obs, _ = self.env.reset(seed=seed)
        seen = digest(obs)
        for action in options.get("replay", {}).get(self.index, ()):
            obs, reward, terminated, truncated, _ = self.env.step(action)
            seen = digest(obs, reward, seen)
            if terminated or truncated:
                seen = -1  # an unfinished episode does not end: this one is another
                break
        self.video, self.frames = options.get("video", "") if self.films else "", []
        self.film()
        return obs, {"digest": seen}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.film()
        if self.video and (terminated or truncated):
            self.write_video()
        return obs, reward, terminated, truncated, {}

    def film(self):
        if self.video:
            try:
                self.frames.append(self.env.render())
            except Exception as e:  # whatever a graphics driver may raise: a video is not worth a run
                self.video, self.films = "", False  # a second try may end the process
                print(f"warning: no video, rendering failed: {e!r}", file=sys.stderr, flush=True)

    def write_video(self):
        try:
            import imageio.v2 as imageio

            os.makedirs(os.path.dirname(self.video), exist_ok=True)
            seconds = getattr(self.env.unwrapped, "dt", 1 / 30) * self.env.get_wrapper_attr("repeat")
            imageio.mimwrite(self.video, self.frames, fps=1 / seconds, macro_block_size=2)
        except Exception as e:
            print(f"warning: no video, writing {self.video} failed: {e!r}", file=sys.stderr, flush=True)
        self.video, self.frames = "", []


def digest(obs: np.ndarray, reward: float = 0.0, seen: int = 0) -> int:
    """A running checksum of an episode's observations and rewards: equal exactly when all their bits were."""
    return zlib.crc32(np.float64(reward).tobytes(), zlib.crc32(np.ascontiguousarray(obs).tobytes(), seen))


def make_env(env_id: str, action_repeat: int, index: int = 0, render: bool = False) -> gym.Env:
    """One environment: flat float32 observations, actions in [-1, 1], `action_repeat` simulator steps a decision."""
    env = quietly(lambda: gym.make(env_id, render_mode="rgb_array" if render else None, disable_env_checker=True))
    space = env.observation_space
    infinity = np.full(gym.spaces.flatdim(space), np.inf, np.float32)
    flat = gym.spaces.Box(-infinity, infinity, dtype=np.float32)
    env = gym.wrappers.TransformObservation(env, lambda obs: gym.spaces.flatten(space, obs).astype(np.float32), flat)
    shape = env.action_space.shape
    flat_actions = gym.spaces.flatten_space(env.action_space)
    env = gym.wrappers.TransformAction(ActionRepeat(env, action_repeat), lambda action: action.reshape(shape), flat_actions)
    env = gym.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))
    return Worker(env, index)


def probe(env_id: str, action_repeat: Optional[int]) -> tuple[int, TaskInfo]:
    """The action repeat (2 for dm_control, 1 elsewhere, unless given) and the task's sizes.

    Raises Failure for what this agent cannot play: images, actions that are not a bounded Box.
    """
    if action_repeat is None:
        action_repeat = 2 if env_id.startswith("dm_control/") else 1
    try:
        env = quietly(lambda: gym.make(env_id, disable_env_checker=True))
    except Exception as e:
        versions = {name: importlib.metadata.version(name) for name in KNOWN_GOOD}
        hint = "" if versions == KNOWN_GOOD else f"; installed {versions}, known to work together: {KNOWN_GOOD}"
        raise Failure(f"{env_id} cannot be made: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}{hint}") from e
    spaces = env.observation_space.spaces.values() if isinstance(env.observation_space, gym.spaces.Dict) else [env.observation_space]
    if any(not isinstance(s, gym.spaces.Box) or len(s.shape) > 1 for s in spaces):
        raise Failure(f"{env_id} has observations {env.observation_space}; only vectors are supported, not images")
    action = env.action_space
    if not isinstance(action, gym.spaces.Box) or action.dtype.kind != "f":
        raise Failure(f"{env_id} has the action space {action}; a bounded Box of floats is needed")
    if not (np.abs(action.low) < 1e6).all() or not (np.abs(action.high) < 1e6).all():
        raise Failure(f"{env_id} has unbounded actions {action}; a bounded Box is needed")
    limit = env.spec.max_episode_steps
    if limit is None:  # dm_control keeps its own limit, in simulator steps
        limit = getattr(getattr(env.unwrapped, "_env", None), "_step_limit", None)
        limit = int(limit) if limit is not None and math.isfinite(limit) else None
    obs_dim = sum(int(np.prod(s.shape)) for s in spaces)
    env.close()
    length = None if limit is None else math.ceil(limit / action_repeat)
    return action_repeat, TaskInfo(obs_dim, int(np.prod(action.shape)), length)


def episode_seed(seed: int, *name) -> int:
    """The seed of an episode, made from (seed, environment, episode) or (seed, "eval", episode) alone."""
    words = [seed] + [zlib.crc32(str(part).encode()) for part in name]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


class Envs:
    """A vector of environments in worker processes, each episode reset with a seed of its own.

    gymnasium's AsyncVectorEnv without autoreset: an episode's true last observation is seen before the next begins.
    Raises Failure (code 1) when a worker dies or an observation or reward is not finite.
    """

    def __init__(self, env_id: str, action_repeat: int, num_envs: int, film: bool = False):
        fns = [lambda i=i: make_env(env_id, action_repeat, i, render=film and i == 0) for i in range(num_envs)]
        self.num_envs, older = num_envs, multiprocessing.active_children()
        try:
            make = lambda: AsyncVectorEnv(fns, context="fork", autoreset_mode=AutoresetMode.DISABLED)
            self.vector = quietly(make)
        except Exception as e:  # a worker could not make its environment; the others wait for ever
            for process in set(multiprocessing.active_children()) - set(older):
                process.kill()
            raise Failure(f"{env_id} cannot be made in a process of its own: {type(e).__name__}: {e}", code=1) from e

    def reset(self, mask: np.ndarray, seeds: list[int], **options) -> tuple[np.ndarray, np.ndarray]:
        """Begins episodes where `mask` says so. Returns obs (E, O) and the digests (E,) of those that began."""
        obs, info = self.guard(lambda: self.vector.reset(seed=seeds, options=dict(options, reset_mask=mask.copy())))
        self.check("an observation", obs, mask)
        return obs, info["digest"].astype(np.int64)

    def step_async(self, action: np.ndarray):
        """Sends the actions (E, A); the simulators run while the caller does something else."""
        self.guard(lambda: self.vector.step_async(action))

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """obs (E, O) float32, reward (E,) float64, terminated (E,), truncated (E,)."""
        obs, reward, terminated, truncated, _ = self.guard(self.vector.step_wait)
        self.check("an observation", obs)
        self.check("a reward", reward)
        return obs, reward, terminated, truncated

    def guard(self, call: Callable):
        try:
            return call()
        except (EOFError, OSError) as e:  # the worker's end of the pipe is gone
            multiprocessing.connection.wait([p.sentinel for p in self.vector.processes], timeout=5)
            dead = [f"{i} (exit code {p.exitcode})" for i, p in enumerate(self.vector.processes) if not p.is_alive()]
            raise Failure(f"environment worker {', '.join(dead) or '?'} died: {type(e).__name__}", code=1) from e
        except Exception as e:  # raised inside an environment and passed on by gymnasium
            raise Failure(f"an environment failed: {type(e).__name__}: {e}", code=1) from e

    def check(self, what: str, values: np.ndarray, mask: Optional[np.ndarray] = None):
        bad = ~np.isfinite(values).reshape(self.num_envs, -1).all(1) & (True if mask is None else mask)
        if bad.any():
            raise Failure(f"environment {int(bad.argmax())} returned {what} that is not finite", code=1)

    def kill(self):
        """Ends the workers at once; they ignore SIGTERM, and a dead one could not answer a polite request."""
        for process in self.vector.processes:
            process.kill()
        for process in self.vector.processes:
            process.join(5)
        self.vector.closed = True  # nothing is left for gymnasium to close


# ---------------------------------------------------------------------------------------------------------------------
# Math


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|) (DreamerV3)."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return torch.sign(x) * torch.expm1(x.abs())


def two_hot(x: Tensor, args: Args) -> Tensor:
    """Scalars (...) as distributions (..., K): symlog(x), clipped to the bins, shared by the two bins beside it."""
    position = (symlog(x).clamp(args.vmin, args.vmax) - args.vmin) * ((args.num_bins - 1) / (args.vmax - args.vmin))
    bins = torch.arange(args.num_bins, device=x.device, dtype=x.dtype)
    return (1 - (position.unsqueeze(-1) - bins).abs()).clamp(min=0)  # (..., K)


def two_hot_inv(logits: Tensor, args: Args) -> Tensor:
    """The scalar (...) whose symlog is the mean of the distribution softmax(logits) (..., K)."""
    bins = torch.linspace(args.vmin, args.vmax, args.num_bins, device=logits.device, dtype=logits.dtype)
    return symexp((logits.softmax(-1) * bins).sum(-1))


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_k target_k log softmax(logits)_k: (..., K), (..., K) -> (...)."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(p || q) of diagonal Gaussians, per dimension: (..., A) -> (..., A)."""
    return torch.log(std_q / std_p) + (std_p.square() + (mean_p - mean_q).square()) / (2 * std_q.square()) - 0.5


def rho_weights(args: Args, like: Tensor) -> Tensor:
    """lambda_t = rho^t / sum rho^t, or rho^t / T (official), as a tensor (T,)."""
    weights = [args.rho**t for t in range(args.horizon)]
    total = sum(weights) if args.normalize_rho_weights else args.horizon
    return torch.stack([torch.full((), w / total, device=like.device, dtype=like.dtype) for w in weights])


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)). Compiled, its algebraic form is one fused pass; eager, F.mish is one kernel."""
    if not torch.compiler.is_compiling():
        return F.mish(x)
    e = torch.exp(x.clamp(max=20.0))
    n = e * (e + 2)
    return x * n / (n + 2)


def simnorm(x: Tensor, group: int) -> Tensor:
    """Softmax over groups of `group` neighbours (TD-MPC2): (..., L) -> (..., L)."""
    return x.unflatten(-1, (-1, group)).softmax(-1).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
#
# Every network is a stack of `heads` independent networks with the same input and output sizes; most are a stack of one.
# A stack of one takes inputs with any leading dimensions. Otherwise the first dimension is the head's: (heads, ..., in),
# or (1, ..., in) for an input that all heads share.

ALL = slice(None)  # heads


def stacked_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """x (heads or 1, ..., in), weight (heads, in, out), bias (heads, 1, out) -> (heads, ..., out), one batched product."""
    heads = weight.shape[0]
    if heads == 1:
        rows, lead = x.reshape(1, -1, x.shape[-1]), x.shape[:-1]
    else:
        rows, lead = x.reshape(x.shape[0], -1, x.shape[-1]).expand(heads, -1, -1), (heads, *x.shape[1:-1])
    product = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
    return product.view(*lead, weight.shape[-1])


class Linear(nn.Module):
    """A stack of linear layers; truncated normal weights of std 0.02 (or zero), biases 0."""

    def __init__(self, heads: int, inputs: int, outputs: int, generator: torch.Generator, zero: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(heads, 1, outputs))
        if not zero:
            nn.init.trunc_normal_(self.weight, std=0.02, generator=generator)

    def forward(self, x: Tensor, a: Optional[Tensor] = None, heads: slice = ALL) -> Tensor:
        """The layer on x, or on the concatenation [x, a].

        The product with [x, a] is the sum of two, so what many rows share (the latent state of all candidates at t = 0)
        is multiplied once: the leading dimensions of x and a need only broadcast.
        """
        weight, bias, split = self.weight[heads], self.bias[heads], x.shape[-1]
        if a is None:
            return stacked_linear(x, weight, bias)
        return stacked_linear(x, weight[:, :split], bias) + stacked_linear(a, weight[:, split:])


class NormedLinear(nn.Module):
    """Linear, (dropout), LayerNorm, activation: Mish, or SimNorm over groups of `simnorm_dim`."""

    def __init__(self, heads: int, inputs: int, outputs: int, generator: torch.Generator, simnorm_dim: int = 0):
        super().__init__()
        self.linear = Linear(heads, inputs, outputs, generator)
        self.scale = nn.Parameter(torch.ones(heads, outputs))
        self.shift = nn.Parameter(torch.zeros(heads, outputs))
        self.simnorm_dim = simnorm_dim

    def forward(self, x: Tensor, a: Optional[Tensor] = None, keep: Optional[Tensor] = None, heads: slice = ALL) -> Tensor:
        """`keep` (heads, ..., out): the dropout mask, already divided by the probability to keep."""
        x = self.linear(x, a, heads)
        if keep is not None:
            x = x * keep
        scale, shift = self.scale[heads], self.shift[heads]
        per_head = (scale.shape[0], *[1] * (x.dim() - 2), -1)
        x = F.layer_norm(x, x.shape[-1:]) * scale.view(per_head) + shift.view(per_head)
        return simnorm(x, self.simnorm_dim) if self.simnorm_dim else mish(x)


class MLP(nn.Module):
    """A stack of networks of NormedLinear layers with a plain linear last layer, or LayerNorm and SimNorm on it."""

    def __init__(
        self,
        sizes: list[int],
        generator: torch.Generator,
        heads: int = 1,
        zero_last: bool = False,
        simnorm_dim: int = 0,
    ):
        super().__init__()
        *hidden, (inputs, outputs) = zip(sizes, sizes[1:])
        self.hidden = nn.ModuleList(NormedLinear(heads, i, o, generator) for i, o in hidden)
        if simnorm_dim:
            self.last = NormedLinear(heads, inputs, outputs, generator, simnorm_dim)
        else:
            self.last = Linear(heads, inputs, outputs, generator, zero=zero_last)

    def forward(self, x: Tensor, a: Optional[Tensor] = None, keep: Optional[Tensor] = None) -> Tensor:
        """The whole stack at once; on a CPU one head after the other, since what a head computes then stays in the cache."""
        heads = next(self.parameters()).shape[0]
        if heads == 1 or x.device.type != "cpu":
            return self.run(ALL, x, a, keep)
        of = lambda x, head: x if x is None or x.shape[0] == 1 else x[head]
        each = [slice(h, h + 1) for h in range(heads)]
        return torch.cat([self.run(head, of(x, head), of(a, head), of(keep, head)) for head in each])

    def run(self, heads: slice, x: Tensor, a: Optional[Tensor], keep: Optional[Tensor]) -> Tensor:
        """Those heads of the stack."""
        for layer in self.hidden:
            x, a, keep = layer(x, a, keep, heads), None, None  # the action enters, and dropout acts, on the first layer
        return self.last(x, a, heads=heads)


class WorldModel(nn.Module):
    """Encoder, latent dynamics, reward, value heads (and their target), policy; termination and EMA policy if asked.

    Shapes, with leading dimensions `...`: encoder (..., O) -> (..., L); dynamics (H, ..., L), (1, ..., A) -> (H, ..., L);
    reward (..., L), (..., A) -> (..., K) logits; value (1, ..., L) -> (Q, ..., K) logits; policy (..., L) -> (..., 2A).
    """

    def __init__(self, task: TaskInfo, args: Args, init: torch.Generator):
        super().__init__()
        obs, action, latent, bins = task.obs_dim, task.action_dim, args.latent_dim, args.num_bins
        hidden = [args.mlp_dim] * 2
        encoder = [obs] + [args.enc_dim] * (args.num_enc_layers - 1) + [latent]
        self.encoder = MLP(encoder, init, simnorm_dim=args.simnorm_dim)
        self.dynamics = MLP([latent + action, *hidden, latent], init, heads=1, simnorm_dim=args.simnorm_dim)
        self.reward = MLP([latent + action, *hidden, bins], init, zero_last=True)
        self.value = MLP([latent, *hidden, bins], init, heads=args.num_q, zero_last=True)
        if args.value_init == "uniform":
            init_uniform(self.value, init)
        self.policy = MLP([latent, *hidden, 2 * action], init)
        self.termination = MLP([latent, *hidden, 1], init) if args.episodic else None
        self.target_value = copy_of(self.value)
        uses_ema = args.td_target_use_ema_policy or args.policy_trust_region_coef > 0
        self.ema_policy = copy_of(self.policy) if uses_ema else None
        self.register_buffer("kl_scale", torch.ones(()))  # S, the running spread of the KL


@torch.no_grad()
def init_uniform(network: MLP, generator: torch.Generator):
    """torch's own first weights of linear layers, uniform within 1 / sqrt(inputs), biases included; a last layer of zeros stays."""
    for layer in [hidden.linear for hidden in network.hidden] + [network.last]:
        bound = 1 / math.sqrt(layer.weight.shape[1])
        if layer is not network.last:
            layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)


def copy_of(network: nn.Module) -> nn.Module:
    """A copy that no gradient reaches and only a moving average changes."""
    return copy.deepcopy(network).requires_grad_(False)


def policy_gaussian(policy: MLP, z: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The policy's mean and std at z: (..., L) -> (..., A), (..., A); the mean is squashed, log std lies in [low, high]."""
    mean, log_std = policy(z).chunk(2, -1)
    return torch.tanh(mean), torch.exp(low + 0.5 * (high - low) * (torch.tanh(log_std) + 1))


def terminates(model: WorldModel, z: Tensor) -> Tensor:
    """Where the termination head is more than half sure that the episode ended on arriving at z: (..., L) -> (...)."""
    return model.termination(z).squeeze(-1) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Replay


class Batch(NamedTuple):
    """B windows of T + 1 observations with the T rows between them; `rows` are their places in the buffer."""

    obs: Tensor  # (T+1, B, O)
    action: Tensor  # (T, B, A)
    reward: Tensor  # (T, B)
    terminated: Tensor  # (T, B)
    expert: Tensor  # (T, B, 2, A) mean and std
    rows: Tensor  # (T, B) int64


class ReplayBuffer:
    """Rows (observation, action, reward, terminated, expert) on the device, a ring of `capacity` rows per environment.

    An episode of n decisions takes n + 1 rows, its last observation included. `window` lists, again as a ring per
    environment, the first row of every window that exists: T + 1 consecutive rows of one episode, finished or not. A
    window enters when its last observation does and leaves when its first row is overwritten. All bookkeeping is done in
    tensors on the device, so that nothing waits for it.
    """

    def __init__(self, num_envs, capacity: int, task: TaskInfo, horizon: int, device: torch.device, unfinished: bool = True):
        self.num_envs, self.capacity, self.horizon, self.unfinished = num_envs, capacity, horizon, unfinished
        rows, E = num_envs * capacity, num_envs
        self.obs = torch.zeros(rows, task.obs_dim, device=device)
        self.action = torch.zeros(rows, task.action_dim, device=device)
        self.reward = torch.zeros(rows, device=device)
        self.terminated = torch.zeros(rows, device=device)
        self.expert = torch.zeros(rows, 2, task.action_dim, device=device)
        self.window = torch.zeros(rows, dtype=torch.int64, device=device)
        self.base = torch.arange(E, device=device) * capacity  # an environment's first row
        self.row = torch.full((E,), -1, device=device)  # rows opened so far, less one; its place is row % capacity
        self.length = torch.zeros(E, dtype=torch.int64, device=device)  # decisions of the episode under way
        self.head = torch.zeros(E, dtype=torch.int64, device=device)  # windows that left
        self.tail = torch.zeros(E, dtype=torch.int64, device=device)  # windows that entered
        self.end = torch.zeros(E, dtype=torch.int64, device=device)  # windows that may be drawn

    ROWS = ("obs", "action", "reward", "terminated", "expert", "window")
    COUNTERS = ("row", "length", "head", "tail", "end")

    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.ROWS)

    def place(self, row: Tensor) -> Tensor:
        """Where the rows numbered `row` (E,), one of each environment, stand in the storage."""
        return self.base + row % self.capacity

    def current_obs(self) -> Tensor:
        """The observations that wait for an action: (E, O)."""
        return self.obs[self.place(self.row)]

    def open_row(self, mask: Tensor, obs: Tensor):
        """Where `mask` (E,), begins a new row with `obs` (E, O); the window that began on the row it replaces leaves."""
        self.row = self.row + mask
        place = self.place(self.row)
        oldest = self.window[self.place(self.head)]
        leaves = mask & (self.head < self.tail) & (oldest + self.capacity == self.row)
        self.head = self.head + leaves
        self.obs[place] = torch.where(mask[:, None], obs, self.obs[place])

    def begin(self, mask: Tensor, obs: Tensor):
        """Where `mask` (E,), an episode begins with `obs` (E, O)."""
        self.open_row(mask, obs)
        self.length = torch.where(mask, 0, self.length)
        self.end = torch.where(mask, self.tail, self.end)

    def add(self, action: Tensor, expert: Tensor, reward: Tensor, terminated: Tensor, next_obs: Tensor):
        """Completes every environment's row: (E, A), (E, 2, A), (E,), (E,) and the observation that followed, (E, O)."""
        place = self.place(self.row)
        self.action[place], self.expert[place], self.reward[place] = action, expert, reward
        self.terminated[place] = terminated
        self.open_row(torch.ones_like(self.row, dtype=torch.bool), next_obs)
        self.length = self.length + 1
        complete = self.length >= self.horizon
        slot = self.place(self.tail)
        self.window[slot] = torch.where(complete, self.row - self.horizon, self.window[slot])
        self.tail = self.tail + complete
        if self.unfinished:
            self.end = self.tail

    def sample(self, u: Tensor) -> Batch:
        """Windows drawn uniformly from all that exist, by uniform numbers u (B,) in [0, 1), float64."""
        held = (self.end - self.head).clamp(min=0)
        ends = held.cumsum(0)  # (E,)
        k = (u * ends[-1]).long()  # (B,) the k-th window of all
        env = torch.searchsorted(ends, k, right=True)
        nth = k - (ends - held)[env] + self.head[env]
        first = self.window[self.base[env] + nth % self.capacity]
        steps = torch.arange(self.horizon + 1, device=u.device)
        rows = self.base[env] + (first + steps[:, None]) % self.capacity  # (T+1, B)
        t = rows[:-1]
        return Batch(self.obs[rows], self.action[t], self.reward[t], self.terminated[t], self.expert[t], t)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, on the host, of all that was ever written: the first rows of each environment's ring, and counters."""
        used = min(int(self.row.max()) + 1, self.capacity)
        state = {
            name: getattr(self, name).unflatten(0, (self.num_envs, -1))[:, :used].to("cpu", copy=True) for name in self.ROWS
        }
        return state | {name: getattr(self, name).to("cpu", copy=True) for name in self.COUNTERS}

    def load_state_dict(self, state: dict[str, Tensor]):
        """Restores a state into a ring of the same or a larger capacity."""
        used, wrapped = state["obs"].shape[1], int(state["row"].max()) >= state["obs"].shape[1]
        if used > self.capacity:
            raise Failure(f"the checkpoint's {used} rows an environment are more than the {self.capacity} of these arguments")
        for name in self.ROWS:
            theirs, mine = state[name], getattr(self, name).unflatten(0, (self.num_envs, -1))
            if not wrapped or used == self.capacity:
                mine[:, :used] = theirs.to(mine.device)
                continue
            entered = state["tail"] if name == "window" else state["row"] + 1  # a larger ring: by the numbers of what it holds
            for env, last in enumerate(entered.tolist()):
                number = torch.arange(max(0, last - used), max(last, used))
                mine[env, (number % self.capacity).to(mine.device)] = theirs[env, number % used].to(mine.device)
        for name in self.COUNTERS:
            setattr(self, name, state[name].to(self.base.device))


# ---------------------------------------------------------------------------------------------------------------------
# Planner: MPPI in latent space


class PlanDraws(NamedTuple):
    """Every random number of S plans, drawn beforehand so that a plan is a pure function."""

    proposals: Tensor  # (S, P, T, A) normal
    samples: Tensor  # (S, iterations, N-P, T, A) normal
    elite: Tensor  # (S, num_elites) uniform
    noise: Tensor  # (S, A) normal


class Plan(NamedTuple):
    """S plans."""

    action: Tensor  # (S, A) the action to execute
    elite: Tensor  # (S, A) the first action of the drawn elite
    best: Tensor  # (S, A) the first action of the best elite
    mean: Tensor  # (S, T, A)
    std: Tensor  # (S, A) of the first action
    value: Tensor  # (S,) the drawn elite's return


def draw_plan(args: Args, states: int, action_dim: int, horizon: int, generator: torch.Generator, device) -> PlanDraws:
    """The random numbers of `states` plans."""
    iterations = args.iterations + (args.extra_iterations if action_dim >= 20 else 0)
    P = args.num_pi_trajs
    normal = lambda *shape: torch.randn(states, *shape, generator=generator, device=device)
    return PlanDraws(
        proposals=normal(P, horizon, action_dim),
        samples=normal(iterations, args.num_samples - P, horizon, action_dim),
        elite=torch.rand(states, args.num_elites, generator=generator, device=device),
        noise=normal(action_dim),
    )


def propose(model: WorldModel, policy: MLP, z: Tensor, eps: Tensor, low: float, high: float) -> Tensor:
    """Action sequences of the policy, rolled through the model: z (S, L), eps (S, P, T, A) -> (S, P, T, A)."""
    z = z[None, :, None]  # (1, S, 1, L)
    actions = []
    for t in range(eps.shape[2]):
        mean, std = policy_gaussian(policy, z[0], low, high)
        actions.append((mean + std * eps[:, :, t]).clamp(-1, 1))  # (S, P, A)
        if t + 1 < eps.shape[2]:
            z = model.dynamics(z, actions[t][None])  # (H, S, P, L)
    return torch.stack(actions, 2)


def estimate_return(model: WorldModel, z: Tensor, actions: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """What each dynamics head and value head expects of action sequences: z (S, L), actions (S, N, T, A).

    Returns the discounted rewards (H, S, N) and the discounted value at the end (Q, H, S, N).
    """
    z = z[None, :, None]  # (1, S, 1, L): at t = 0 all candidates share it
    rewards, alive, discount = 0.0, 1.0, 1.0
    for t in range(actions.shape[2]):
        a = actions[None, :, :, t]  # (1, S, N, A)
        rewards = rewards + discount * alive * two_hot_inv(model.reward(z, a), args)
        z = model.dynamics(z, a)  # (H, S, N, L)
        if args.episodic:
            alive = alive * ~terminates(model, z)
        discount *= args.discount
    return rewards, discount * alive * two_hot_inv(model.value(z[None]), args)


def score(rewards: Tensor, values: Tensor) -> Tensor:
    """A candidate's return, the mean over heads: (H, S, N), (Q, H, S, N) -> (S, N); -1e9 where it is not finite."""
    returns = rewards.mean(0) + values.mean((0, 1))
    return returns.nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9)


@torch.compiler.nested_compile_region  # compiled once, not once per iteration
def refine(model: WorldModel, z: Tensor, mean: Tensor, std: Tensor, proposals, proposal_scores, noise: Tensor, args: Args):
    """One iteration of MPPI: z (S, L), mean and std (S, T, A), proposals (S, P, T, A) and their scores, noise (S, N-P, T, A).

    Returns the new mean and std, the elites (S, num_elites, T, A), best first, their scores and weights (S, num_elites).
    """
    # Sample action sequences and score them
    samples = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)  # (S, N-P, T, A)
    scores = torch.cat([proposal_scores, score(*estimate_return(model, z, samples, args))], 1)  # (S, N)
    actions = torch.cat([proposals, samples], 1)  # (S, N, T, A)

    # Elites and their weights
    elite_scores, elite = scores.topk(args.num_elites, dim=1)
    elites = actions.gather(1, elite[:, :, None, None].expand(-1, -1, *actions.shape[2:]))
    weights = torch.softmax(args.temperature * (elite_scores - elite_scores[:, :1]), 1)

    # Mean and std of the weighted elites
    w = weights[:, :, None, None]
    mean = (w * elites).sum(1)
    std = (w * (elites - mean[:, None]).square()).sum(1).sqrt().clamp(args.min_std, args.max_std)
    return mean, std, elites, elite_scores, weights


@torch.no_grad()
def plan(
    model: WorldModel,
    policy: MLP,
    z: Tensor,
    mean: Tensor,
    draws: PlanDraws,
    args: Args,
    low: float,
    high: float,
) -> Plan:
    """Plans for S states at once (MPPI with policy proposals, as in TD-MPC2).

    z (S, L); mean (S, T, A): the previous plan's, shifted, or zero; low, high: the policy's range of log std. The same
    function acts, evaluates and reanalyzes, so one compiled graph does.
    """
    S, P, T, A = draws.proposals.shape

    # Policy proposals: candidates of every iteration, scored once
    proposals = propose(model, policy, z, draws.proposals, low, high)
    proposal_scores = score(*estimate_return(model, z, proposals, args))

    std = torch.full((S, T, A), args.max_std, device=z.device, dtype=z.dtype)
    for noise in draws.samples.unbind(1):
        mean, std, elites, elite_scores, weights = refine(model, z, mean, std, proposals, proposal_scores, noise, args)

    # Draw an elite by its weight (Gumbel trick); training adds noise to its first action
    gumbel = -torch.log(-torch.log(draws.elite))
    chosen = (weights.log() + gumbel).argmax(1)  # (S,)
    first = elites[torch.arange(S, device=z.device), chosen, 0]  # (S, A)
    action = (first + std[:, 0] * draws.noise).clamp(-1, 1)
    return Plan(action, first, elites[:, 0, 0], mean, std[:, 0], elite_scores.gather(1, chosen[:, None])[:, 0])


def plan_in_chunks(
    plan: Callable, model, policy, z: Tensor, mean: Tensor, draws: PlanDraws, args: Args, low=None, high=None
) -> Plan:
    """`plan`, on a CPU for a few states at a time: about 2048 rollouts, with what is computed of them, fit its cache."""
    states = len(z) if z.device.type != "cpu" else max(1, 2048 // args.num_samples)
    low, high = args.log_std_min if low is None else low, args.log_std_max if high is None else high
    pieces = zip(*(x.tensor_split(math.ceil(len(z) / states)) for x in (z, mean, *draws)))
    plans = [plan(model, policy, z, mean, PlanDraws(*draws), args, low, high) for z, mean, *draws in pieces]
    return plans[0] if len(plans) == 1 else Plan(*map(torch.cat, zip(*plans)))


def make_expert(plan: Plan, chosen: Tensor, args: Args) -> Tensor:
    """The expert of S rows, mean and std of a Gaussian over the action: (S, 2, A)."""
    return torch.stack([chosen if args.reanalyze_use_chosen_action else plan.mean[:, 0], plan.std], 1)


class Acted(NamedTuple):
    """A decision that is not yet executed."""

    action: Tensor  # (E, A)
    expert: Tensor  # (E, 2, A)
    mean: Tensor  # (E, T, A) warm start of the next plan


def act_randomly(num_envs: int, action_dim: int, args: Args, draws: dict[str, torch.Generator], device) -> Acted:
    """Warm-up: uniform actions; their expert is N(0, 1)."""
    action = torch.rand(num_envs, action_dim, generator=draws["collect"], device=device) * 2 - 1
    expert = torch.stack([torch.zeros_like(action), torch.ones_like(action)], 1)
    return Acted(action, expert, torch.zeros(num_envs, args.horizon, action_dim, device=device))


@torch.no_grad()
def act(plan: Callable, model: WorldModel, buffer: ReplayBuffer, mean: Tensor, args: Args, draws) -> tuple[Acted, dict]:
    """Plans on the current observations, warm-started by the last plan's `mean` (E, T, A) within an episode."""
    z = model.encoder(buffer.current_obs())  # (E, L)
    E, T, A = mean.shape
    shifted = torch.cat([mean[:, 1:], torch.zeros_like(mean[:, :1])], 1)
    shifted = torch.where((buffer.length > 0)[:, None, None], shifted, 0.0)
    noise = draw_plan(args, E, A, T, draws["collect"], z.device)
    acting = plan_in_chunks(plan, model, model.policy, z, shifted, noise, args)
    if args.initial_expert_from_behavior:
        expert = make_expert(acting, acting.action if args.chosen_action_noise else acting.elite, args)
    else:
        noise = draw_plan(args, E, A, T, draws["expert"], z.device)
        separate = plan_in_chunks(plan, model, model.policy, z, torch.zeros_like(mean), noise, args)
        expert = make_expert(separate, separate.elite, args)
    metrics = {"planner/elite_std": acting.std.mean(), "planner/value": acting.value.mean()}
    if not (args.reanalyze_use_chosen_action and args.chosen_action_noise and args.initial_expert_from_behavior):
        metrics["planner/executed_minus_mean"] = (acting.action - acting.mean[:, 0]).abs().mean()
    return Acted(acting.action, expert, acting.mean), metrics


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def dropout_mask(shape: tuple[int, ...], p: float, generator: torch.Generator, device) -> Tensor:
    """Each element independently 0 with probability p > 0, else 1 / (1 - p).

    From one dropped element to the next the gap is geometric, so about n p numbers are drawn and not n. They are more than
    it takes, by ten standard deviations; the gaps that lead beyond the end drop a spare element there.
    """
    n = math.prod(shape)
    most = math.ceil(n * p + 10 * math.sqrt(n * p) + 10)
    u = torch.rand(most, generator=generator, device=device, dtype=torch.float64)
    gaps = 1 + (torch.log1p(-u) / math.log1p(-p)).clamp(max=n).long()  # geometric, by inversion
    dropped = (gaps.cumsum(0) - 1).clamp(max=n)
    return torch.full((n + 1,), 1 / (1 - p), device=device).index_fill_(0, dropped, 0.0)[:n].view(shape)


class UpdateDraws(NamedTuple):
    """Every random number of an update but those of its reanalyze."""

    window: Tensor  # (B,) uniform, float64
    td: Tensor  # (R, td_horizon, T, B, A) normal
    keep: Optional[Tensor]  # (Q, T, B, mlp_dim) dropout mask over the probability to keep


def draw_update(args: Args, action_dim: int, generator: torch.Generator, device) -> UpdateDraws:
    """The random numbers of one update."""
    T, B = args.horizon, args.batch_size
    window = torch.rand(B, generator=generator, device=device, dtype=torch.float64)
    td = torch.randn(args.num_rollouts, args.td_horizon, T, B, action_dim, generator=generator, device=device)
    keep = None
    if args.dropout > 0:
        keep = dropout_mask((args.num_q, T, B, args.mlp_dim), args.dropout, generator, device)
    return UpdateDraws(window, td, keep)


@torch.no_grad()
def td_target(model: WorldModel, policy: MLP, z: Tensor, eps: Tensor, args: Args) -> Tensor:
    """Value targets by imagination with the policy (BMPC: model-based TD-learning): z (T, B, L), eps (R, td_horizon, T, B, A) -> (1, R, T, B).

    y = sum_{k < td_horizon} gamma^k r_k + gamma^td_horizon V_target(z), V_target being the mean over value heads.
    """
    z = z[None, None]  # (1, 1, T, B, L)
    rewards, alive, discount = 0.0, 1.0, 1.0
    for k in range(args.td_horizon):
        mean, std = policy_gaussian(policy, z, args.log_std_min, args.log_std_max)
        a = (mean + std * eps[:, k]).clamp(-1, 1)  # (1, R, T, B, A)
        rewards = rewards + discount * alive * two_hot_inv(model.reward(z, a), args)
        z = model.dynamics(z, a)  # (H, R, T, B, L)
        if args.episodic:
            alive = alive * ~terminates(model, z)
        discount *= args.discount
    values = discount * alive * two_hot_inv(model.target_value(z[None]), args)  # (Q, H, R, T, B)
    return (rewards + values.mean(0)).mean(0, keepdim=True)


def world_model_loss(model: WorldModel, batch: Batch, draws: UpdateDraws, args: Args) -> tuple[Tensor, Tensor, dict]:
    """Consistency, reward, value (and termination) losses along the model's rollout (TD-MPC2: model objective).

    Returns the loss, the rollout's states without gradient (T, B, L) and metrics.
    """
    T, lam = args.horizon, rho_weights(args, batch.reward)
    true_needs_grad = args.encoder_consistency_coef > 0 or args.imagine_initial_source == "replay_true"
    first = model.encoder(batch.obs[0])  # (B, L)
    with torch.set_grad_enabled(true_needs_grad and torch.is_grad_enabled()):
        z_true = torch.cat([first[None], model.encoder(batch.obs[1:])])  # (T+1, B, L)

    # Rollout: z_0 is encoded, the rest predicted
    zs = [first[None]]  # (1, B, L), then (H, B, L)
    for t in range(T):
        zs.append(model.dynamics(zs[t], batch.action[t][None]))
    predicted = torch.stack(zs[1:])  # (T, H, B, L)
    states = torch.stack([z.expand_as(zs[1]) for z in zs[:T]])  # (T, H, B, L)

    consistency = (predicted - z_true[1:, None].detach()).square().mean((1, 2, 3))  # (T,)
    reward_logits = model.reward(states, batch.action[:, None])  # (T, H, B, K)
    reward = soft_cross_entropy(reward_logits, two_hot(batch.reward, args)[:, None]).mean((1, 2))

    # Values of the policy, at the rollout's states, against imagination from the true ones
    rollout = states[:, 0]  # (T, B, L)
    start = rollout if args.imagine_initial_source == "replay_rollout" else z_true[:T]
    origin = z_true[:T] if args.td_target_initial_source == "replay_true" else start
    policy = model.ema_policy if args.td_target_use_ema_policy else model.policy
    y = td_target(model, policy, origin.detach(), draws.td, args)  # (Q or 1, R, T, B)
    target = two_hot(y, args).mean(1)  # (Q or 1, T, B, K); the cross-entropy is linear in it
    value_logits = model.value(start[None], keep=draws.keep)  # (Q, T, B, K)
    value = soft_cross_entropy(value_logits, target).mean((0, 2))  # (T,)

    losses = {"consistency": consistency, "reward": reward, "value": value}
    coefs = {"consistency": args.consistency_coef, "reward": args.reward_coef, "value": args.value_coef}
    if args.episodic:
        logits = model.termination(predicted).squeeze(-1)  # (T, H, B)
        ended = batch.terminated[:, None].expand_as(logits)
        losses["termination"] = F.binary_cross_entropy_with_logits(logits, ended, reduction="none").mean((1, 2))
        coefs["termination"] = args.termination_coef
    if args.encoder_consistency_coef > 0:
        losses["encoder_consistency"] = (predicted.detach() - z_true[1:, None]).square().mean((1, 2, 3))
        coefs["encoder_consistency"] = args.encoder_consistency_coef
    losses = {name: (lam * loss).sum() for name, loss in losses.items()}
    total = sum(coefs[name] * loss for name, loss in losses.items())
    metrics = {f"losses/{name}": loss.detach() for name, loss in losses.items()}
    metrics |= {"losses/total": total.detach(), "losses/td_target": y.mean()}
    if args.num_rollouts > 1:
        metrics["losses/td_target_std_over_rollouts"] = y.std(1).mean()
    return total, rollout.detach(), metrics


def update_kl_scale(scale: Tensor, kl: Tensor) -> Tensor:
    """S + 0.01 (max(p95 - p5, 1) - S) of the KLs (B,) at t = 0 (the spread TD-MPC2 divides its Q-values by)."""
    kl = kl.detach()
    spread = torch.quantile(kl, 0.95) - torch.quantile(kl, 0.05)
    return torch.lerp(scale, spread.clamp(min=1.0), 0.01)


def imitation_loss(
    policy: MLP, ema: Optional[MLP], scale: Tensor, z: Tensor, expert: Tensor, args: Args
) -> tuple[Tensor, Tensor, dict]:
    """KL(policy || expert) / S at z (T, B, L), expert (T, B, 2, A), and its company (BMPC: expert imitation).

    Returns the loss, the new S and metrics.
    """
    lam = rho_weights(args, z)
    reduce = (lambda kl: kl.mean(-1)) if args.kl_reduction == "mean" else (lambda kl: kl.sum(-1))
    mean, std = policy_gaussian(policy, z, args.log_std_min, args.log_std_max)  # (T, B, A)
    expert_std = (expert[:, :, 1] * args.expert_std_scale).clamp(min=args.expert_std_min)
    kl = reduce(gaussian_kl(mean, std, expert[:, :, 0], expert_std))  # (T, B)
    scale = update_kl_scale(scale, kl[0])
    loss = (lam * kl.mean(1)).sum() / scale
    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean(1)  # (T,)
    if args.entropy_coef > 0:
        loss = loss - args.entropy_coef * mean.shape[-1] * (lam * entropy).sum()
    metrics = {"losses/kl": kl.detach().mean(), "losses/kl_scale": scale, "losses/entropy": entropy.detach().mean()}
    if args.policy_trust_region_coef > 0:
        with torch.no_grad():
            ema_mean, ema_std = policy_gaussian(ema, z, args.log_std_min, args.log_std_max)
        trust = (lam * reduce(gaussian_kl(ema_mean, ema_std, mean, std)).mean(1)).sum() / scale
        loss = loss + args.policy_trust_region_coef * trust
        metrics["losses/trust_region"] = trust.detach()
    return loss, scale, metrics


def policy_loss(model: WorldModel, z: Tensor, expert: Tensor, args: Args) -> tuple[Tensor, Tensor, dict]:
    """The policy's loss at the rollout's states z (T, B, L). Returns the loss, the new KL scale and metrics."""
    loss, scale, metrics = imitation_loss(model.policy, model.ema_policy, model.kl_scale, z, expert, args)
    return loss, scale, metrics | {"losses/policy": loss.detach()}


class Adam:
    """torch's Adam over groups of (parameters, learning rate), with the gradient's norm clipped over all of them.

    Its functional form, because `torch.optim.Adam.step` does not compile to one graph.
    """

    def __init__(self, groups: list[tuple[list[Tensor], float]], max_norm: float, eps: float = 1e-8):
        self.groups, self.max_norm, self.eps = groups, max_norm, eps
        self.params = [p for params, _ in groups for p in params]
        self.exp_avg = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        capturable = self.params[0].is_cuda  # capturable steps live on the GPU; elsewhere torch wants them on the host
        self.steps = [torch.zeros((), device=p.device if capturable else "cpu") for p in self.params]

    @torch.no_grad()
    def step(self, grads: list[Tensor]) -> Tensor:
        """One step along -grads (in the order of `params`). Returns the gradient's norm before clipping."""
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        clip = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        grads, first = [g * clip for g in grads], 0
        for params, lr in self.groups:
            part = slice(first, first + len(params))
            state = (self.exp_avg[part], self.exp_avg_sq[part], [], self.steps[part])
            adam(
                params, grads[part], *state, capturable=params[0].is_cuda, amsgrad=False, beta1=0.9, beta2=0.999,
                lr=lr, weight_decay=0.0, eps=self.eps, maximize=False,
            )  # fmt: skip
            first += len(params)
        return norm

    def stay(self):
        """Promises torch.compile that the state stays where it is, as parameters do: else a CUDA graph may not change it."""
        for x in [*self.exp_avg, *self.exp_avg_sq, *self.steps]:
            torch._dynamo.mark_static_address(x)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "steps": self.steps}

    def load_state_dict(self, state: dict[str, list[Tensor]]):
        for name, mine in self.state_dict().items():
            for x, y in zip(mine, state[name], strict=True):
                x.copy_(y)


def make_optimizers(model: WorldModel, args: Args) -> tuple[Adam, Adam]:
    """The world model's Adam (encoder, dynamics, reward, values, termination) and the policy's."""
    heads = [model.dynamics, model.reward, model.value] + ([model.termination] if args.episodic else [])
    groups = [
        (list(model.encoder.parameters()), args.lr * args.enc_lr_scale),
        ([p for network in heads for p in network.parameters()], args.lr),
    ]
    policy = [(list(model.policy.parameters()), args.lr)]
    return Adam(groups, args.grad_clip_norm), Adam(policy, args.grad_clip_norm, eps=1e-5)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, tau: float):
    """target += tau (online - target)."""
    for x, y in zip(target.parameters(), online.parameters()):
        x.lerp_(y, tau)


def optimize(model: WorldModel, optimizers: tuple[Adam, Adam], grads, policy_grads, scale, args: Args) -> dict:
    """Adam, the target value heads and, unless pretraining, the policy's Adam, KL scale and EMA: one graph."""
    metrics = {"losses/grad_norm": optimizers[0].step(grads)}
    if policy_grads is not None:
        metrics["losses/policy_grad_norm"] = optimizers[1].step(policy_grads)
        model.kl_scale.copy_(scale)
        if model.ema_policy is not None:
            follow(model.ema_policy, model.policy, args.policy_ema_tau)
    follow(model.target_value, model.value, args.tau)
    return metrics


class Functions(NamedTuple):
    """What is worth compiling."""

    plan: Callable = plan
    world_model_loss: Callable = world_model_loss
    policy_loss: Callable = policy_loss
    optimize: Callable = optimize


def compiled(args: Args, device: torch.device) -> Functions:
    """The functions compiled, each to one graph per set of shapes; eager ones where nothing can be compiled."""
    if not args.compile:
        return Functions()
    options = {"triton.cudagraphs": args.cudagraphs and device.type == "cuda"}
    make = lambda function: torch.compile(function, fullgraph=True, dynamic=False, options=options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations, once, while its compiler is imported
            torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as e:
        warn(f"no working compiler, going on in eager mode ({type(e).__name__})")
        return Functions()

    torch._dynamo.config.recompile_limit = 64  # plans differ by batch size and options
    functions = Functions(*map(make, Functions()))
    if not options["triton.cudagraphs"]:
        return functions

    def captured_plan(*args, **kwargs):  # the next replay overwrites a CUDA graph's outputs, so they are cloned
        torch.compiler.cudagraph_mark_step_begin()
        return Plan(*(x.clone() for x in functions.plan(*args, **kwargs)))

    def captured_loss(*args, **kwargs):  # what an update's graphs return lives until the next update begins
        torch.compiler.cudagraph_mark_step_begin()
        return functions.world_model_loss(*args, **kwargs)

    return functions._replace(plan=captured_plan, world_model_loss=captured_loss)


@torch.no_grad()
def reanalyze(plan: Callable, model: WorldModel, buffer: ReplayBuffer, batch: Batch, args: Args, generator) -> Batch:
    """Plans the first windows' states anew (BMPC: lazy reanalyze).

    The new experts replace the old ones in the buffer and in the returned batch.
    """
    W, T = args.reanalyze_batch_size, args.horizon
    by_window = lambda x: x[:T, :W].transpose(0, 1).flatten(0, 1)  # (W * T, ...)
    z = model.encoder(by_window(batch.obs))
    horizon = args.reanalyze_horizon or T
    draws = draw_plan(args, W * T, batch.action.shape[-1], horizon, generator, z.device)
    limits = dict(low=args.reanalyze_log_std_min, high=args.reanalyze_log_std_max)
    new = plan_in_chunks(plan, model, model.policy, z, torch.zeros_like(draws.samples[:, 0, 0]), draws, args, **limits)
    expert = make_expert(new, new.elite, args)  # (W * T, 2, A)

    # A row that occurs twice keeps the later window's expert, in whatever order the writes below happen
    rows = by_window(batch.rows)
    order = torch.arange(W * T, device=rows.device)
    last = ((rows[:, None] == rows[None, :]) * order).amax(1)
    expert = expert[last]
    buffer.expert[rows] = expert
    renewed = torch.cat([expert.unflatten(0, (W, T)).transpose(0, 1), batch.expert[:, W:]], 1)
    return batch._replace(expert=renewed)


def update(
    functions: Functions, model: WorldModel, optimizers, batch: Batch, draws: UpdateDraws, args: Args, pretraining: bool
) -> dict:
    """One update of the world model, the policy (unless pretraining) and the target value heads. Returns metrics."""
    loss, z, metrics = functions.world_model_loss(model, batch, draws, args)
    grads, policy_grads, scale = torch.autograd.grad(loss, optimizers[0].params), None, None
    if not pretraining:
        loss, scale, policy_metrics = functions.policy_loss(model, z, batch.expert, args)
        policy_grads = torch.autograd.grad(loss, optimizers[1].params)
        metrics = metrics | policy_metrics
    return metrics | functions.optimize(model, optimizers, grads, policy_grads, scale, args)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """The one way from the host to the device; on CUDA through pinned memory, without waiting."""
    tensor = torch.from_numpy(x)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(x: Tensor) -> np.ndarray:
    """The one way from the device to the host."""
    return x.cpu().numpy()


def make_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator on the device with the seed made from (seed, name)."""
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(episode_seed(seed, name))


@torch.no_grad()
def evaluate(
    plan: Callable, model: WorldModel, envs: Envs, args: Args, step: int, planning: bool, stop=None, video: str = ""
) -> np.ndarray:
    """Returns of `eval_episodes` episodes (float64), with the planner or with the policy's mean alone.

    Episode j begins with the seed made from (seed, "eval", j), the same at every evaluation; `video` films episode 0.
    Raises Interrupted when `stop` is requested.
    """
    device, W, n = model.kl_scale.device, envs.num_envs, args.eval_episodes
    generator = make_generator(args.seed, f"eval {step}", device)
    returns, episode, upcoming = np.zeros(n), np.arange(W), W  # the episode each worker plays, and the next
    seeds = lambda: [episode_seed(args.seed, "eval", int(j)) for j in episode]
    obs, _ = envs.reset(np.ones(W, bool), seeds(), **({"video": video} if video else {}))
    A = model.policy.last.weight.shape[-1] // 2
    mean = torch.zeros(W, args.horizon, A, device=device)
    while (episode < n).any():
        z = model.encoder(to_device(obs, device))
        if planning:
            draws = draw_plan(args, W, A, args.horizon, generator, device)
            acting = plan_in_chunks(plan, model, model.policy, z, mean, draws, args)
            action = acting.elite if args.eval_sample_elite else acting.best
            mean = torch.cat([acting.mean[:, 1:], torch.zeros_like(mean[:, :1])], 1)
        else:
            action, _ = policy_gaussian(model.policy, z, args.log_std_min, args.log_std_max)
        envs.step_async(to_host(action))
        obs, reward, terminated, truncated = envs.step_wait()
        counts, ended = episode < n, terminated | truncated
        returns[episode[counts]] += reward[counts]
        if ended.any():
            for i in np.flatnonzero(ended):
                episode[i], upcoming = upcoming, upcoming + 1
            first, _ = envs.reset(ended, seeds())
            obs = np.where(ended[:, None], first, obs)
            mean = torch.where(to_device(ended, device)[:, None, None], 0.0, mean)
        if stop is not None and stop.requested:
            raise Interrupted
    return returns


# ---------------------------------------------------------------------------------------------------------------------
# The run's directory: arguments, log, measurements


class Metrics:
    """Means of metrics, summed on the device; they cross to the host together, once per log interval."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[tuple, Tensor] = {}  # by the names that come together: (names,) sums, then their count
        self.bad: dict[tuple, Tensor] = {}  # (names,) the first update at which each was not finite, or -1

    def add(self, values: dict[str, Tensor], update: int):
        names, new = tuple(values), torch.stack([v.float() for v in values.values()])
        if names not in self.sums:
            self.sums[names] = torch.zeros(len(names) + 1, device=self.device)
            self.bad[names] = torch.full((len(names),), -1, device=self.device)
        self.sums[names] += torch.cat([new, torch.ones_like(new[:1])])
        bad = self.bad[names]
        self.bad[names] = torch.where(torch.isfinite(new) | (bad >= 0), bad, update)

    def read(self) -> dict[str, float]:
        """The means since the last reading. Raises Failure (code 1) if a value was not finite, naming it and its update."""
        if not self.sums:
            return {}
        totals, counts = defaultdict(float), defaultdict(int)  # pretraining and learning share names
        flat = to_host(torch.cat([x.double() for names in self.sums for x in (self.sums[names], self.bad[names])]))
        for names in self.sums:
            n = len(names)
            sums, count, bad, flat = flat[:n], flat[n], flat[n + 1 : 2 * n + 1], flat[2 * n + 1 :]
            if (bad >= 0).any():
                i = int(np.where(bad >= 0, bad, np.inf).argmin())
                raise Failure(f"{names[i]} was not finite at update {int(bad[i])}; the last checkpoint is before it", code=1)
            for name, value in zip(names, sums.tolist()):
                totals[name] += value
                counts[name] += int(count)
        for group in self.sums.values():
            group.zero_()
        return {name: totals[name] / count for name, count in counts.items() if count}

    def check(self):
        """Raises Failure if a value was not finite since the last reading, without ending the interval."""
        sums = {names: x.clone() for names, x in self.sums.items()}
        self.read()
        self.sums = sums

    def state_dict(self) -> list:
        host = lambda x: x.to("cpu", copy=True)
        return [[list(names), host(self.sums[names]), host(self.bad[names])] for names in self.sums]

    def load_state_dict(self, state: list):
        self.sums = {tuple(names): sums.to(self.device) for names, sums, _ in state}
        self.bad = {tuple(names): bad.to(self.device) for names, _, bad in state}


class Log:
    """metrics.csv (global_step,env_steps,tag,value) and TensorBoard events, which repeat it.

    Lines that cannot be written wait and are tried again; what could never be written is reported at the end. `state` is
    None for a new run, {} for one that was stopped before its first checkpoint.
    """

    HEADER = "global_step,env_steps,tag,value\n"

    def __init__(self, directory: Path, action_repeat: int, state: Optional[dict] = None):
        self.directory, self.path, self.action_repeat = directory, directory / "metrics.csv", action_repeat
        self.warned, self.writer, self.unshown = False, None, []
        self.size, self.pending = (state["size"], list(state["pending"])) if state else (0, [self.HEADER])
        there = self.path.stat().st_size if self.path.exists() else 0
        if there < self.size:
            warn(f"{self.path} is {self.size - there} bytes shorter than when the checkpoint was written")
            self.size = there and self.path.read_bytes().rfind(b"\n") + 1  # whole lines
            self.pending = self.pending if self.size else [self.HEADER, *self.pending]
        # TensorBoard drops what it has from this step on, and gets it again from metrics.csv
        self.again = None if state is None else min([state["step"], *map(step_of, self.pending)]) if state else 0

    def add(self, step: int, values: dict[str, float]):
        """Keeps `values` for the next flush."""
        self.pending += [f"{step},{step * self.action_repeat},{tag},{float(value)!r}\n" for tag, value in values.items()]

    def flush(self):
        try:
            data = "".join(self.pending).encode()
            with open(self.path, "ab") as file:
                file.truncate(self.size)  # what a killed run, or half a write, left behind
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a checkpoint counts on these lines
            self.unshown += [line for line in self.pending if line != self.HEADER]
            self.size, self.pending = self.size + len(data), []
            self.show()
            self.warned = False
        except OSError as e:
            if not self.warned:
                warn(f"the log cannot be written ({e}); its lines are kept and tried again")
            self.warned = True

    def show(self):
        """TensorBoard's events; after a resume or a failed write a file of its own continues them without a seam."""
        try:
            if self.writer is None:
                if self.again is not None:
                    with open(self.path) as file:
                        self.unshown = [line for line in file.readlines()[1:] if step_of(line) >= self.again]
                self.writer = SummaryWriter(str(self.directory), purge_step=self.again)
            for line in self.unshown:
                step, _, tag, value = line.rstrip("\n").split(",")
                self.writer.add_scalar(tag, float(value), int(step))
            self.writer.flush()
            self.unshown, self.again = [], None
        except OSError:
            self.writer = None
            known = [] if self.again is None else [self.again]
            self.again = min([*known, *map(step_of, self.unshown)], default=0)
            raise

    def close(self):
        self.flush()
        if self.pending:
            warn(f"{len(self.pending)} lines of {self.path} are lost: the disk took none of them")
        try:
            if self.writer is not None:
                self.writer.close()
        except OSError as e:
            warn(f"TensorBoard's events are not whole ({e}); metrics.csv is")

    def state_dict(self, step: int) -> dict:
        return {"size": self.size, "pending": list(self.pending), "step": step}


def step_of(line: str) -> float:
    """The step of a line of metrics.csv; infinity for its header."""
    return math.inf if line == Log.HEADER else int(line.split(",", 1)[0])


class Stopwatch:
    """Where the time goes: seconds of each part of the loop, compilation taken out.

    On CUDA a part is timed by events on its stream, so that measuring waits for nothing.
    """

    def __init__(self, device: torch.device, recording: bool = True):
        self.cuda, self.recording = device.type == "cuda", recording
        self.restart(0)

    def restart(self, step: int):
        self.spans, self.excluded, self.start, self.step = [], 0.0, time.perf_counter(), step

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, part: str, exclude: bool = False):
        graphs, begin, start = graphs_compiled(), self.mark(), time.perf_counter()
        yield
        new = graphs_compiled() - graphs
        if new and not exclude:
            say(f"{part}: compiled {new} graph{'s' * (new > 1)} in {time.perf_counter() - start:.1f} s")
        if new or exclude:
            self.excluded += time.perf_counter() - start
        elif self.recording:
            self.spans.append((part, begin, self.mark()))

    def read(self, step: int) -> dict[str, float]:
        """Decisions a second since the last reading, and seconds a decision of each part; begins the next window."""
        decisions, seconds = max(1, step - self.step), time.perf_counter() - self.start - self.excluded
        values = {"charts/SPS": decisions / max(seconds, 1e-9)}
        if self.cuda and self.spans:
            self.spans[-1][2].synchronize()  # the last event: all before it have happened, and can be compared
        for part in ("environment", "acting", "updating", "reanalyzing"):
            spans = [(a, b) for name, a, b in self.spans if name == part]
            total = sum((a.elapsed_time(b) / 1000 if self.cuda else b - a) for a, b in spans)
            values[f"time/{part}"] = total / decisions
        self.restart(step)
        return values


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


def say(message: str):
    """A line for the user, above the progress bar."""
    try:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # standard output is a file on a full disk
        pass


def warn(message: str):
    try:
        tqdm.write(f"warning: {message}", file=sys.stderr)
    except (OSError, RuntimeError):  # or it is being written to while a signal comes
        pass


def run_directory(args: Args) -> Path:
    """runs/<short env>__<exp_name>__<seed>[__<run_name>], or the directory given to --resume."""
    if args.resume not in ("auto", "never"):
        return Path(args.resume)
    name = f"{short_name(args.env_id)}__{args.exp_name}__{args.seed}" + (f"__{args.run_name}" if args.run_name else "")
    return Path("runs") / name.replace("/", "_")


def write_json(path: Path, value):
    """Writes beside, then renames: a reader sees the old file or the new one."""
    beside = path.with_suffix(".tmp")
    try:
        beside.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(beside, path)
    except OSError as e:
        raise Failure(f"{path} cannot be written: {e}", code=1) from e


def load_args(directory: Path) -> dict:
    """The arguments stored in a run's directory. Raises Failure if there are none."""
    try:
        stored = json.loads((directory / "args.json").read_text())
        names = {f.name for f in dataclasses.fields(Args)}
        if not isinstance(stored, dict) or set(stored) != names:
            raise ValueError("not the arguments of this script")
        return stored
    except (OSError, ValueError) as e:
        raise Failure(f"{directory} is not the directory of a run of {os.path.basename(__file__)}: {e}") from e


def versions() -> dict:
    """Package versions, git commit and command line of this start."""
    packages = "torch numpy gymnasium dm_control mujoco shimmy tyro tensorboard".split()
    installed = {}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    git = lambda *words: subprocess.run(
        ["git", "-C", str(Path(__file__).resolve().parent), *words], capture_output=True, text=True
    ).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        commit = ""
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"time": when, "command": sys.argv, "git_commit": commit or None, "python": sys.version.split()[0], **installed}


def lock(directory: Path):
    """Takes the directory's lock until the process ends. Raises Failure if another process has it."""
    file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)  # a number, which nothing closes behind our back
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX locks are not inherited by the worker processes
    except OSError as e:
        raise Failure(f"{directory} is in use by another process") from e


# ---------------------------------------------------------------------------------------------------------------------
# Arguments: what is given, what follows, what cannot be


def parse_args(argv: Optional[list[str]] = None) -> Args:
    """The command line as Args; with --resume RUN_DIR or --evaluate RUN_DIR that run's arguments are the defaults."""
    args = tyro.cli(Args, args=argv)
    source = args.evaluate or args.resume
    if source in ("auto", "never"):
        return args
    stored = load_args(Path(source)) | {"resume": "auto", "evaluate": ""}
    return tyro.cli(Args, args=argv, default=Args(**stored))


def fill_in(args: Args) -> tuple[Args, TaskInfo]:
    """The arguments with every None that follows from others filled in, checked, and what the task is."""
    env_id = resolve_env_id(args.env_id)
    check_numbers(args)
    action_repeat, task = probe(env_id, args.action_repeat)
    discount = args.discount
    if discount is None:
        if task.episode_length is None:
            raise Failure(f"{args.env_id} has no step limit to take the discount from; give --discount")
        n = task.episode_length / args.discount_denom
        discount = min(max((n - 1) / n, args.discount_min), args.discount_max)
    sizes = {k: v if getattr(args, k) is None else getattr(args, k) for k, v in MODEL_SIZES[args.model_size].items()}
    args = dataclasses.replace(args, env_id=env_id, action_repeat=action_repeat, discount=discount, **sizes)
    check_fit(args)
    if task.episode_length is not None and task.episode_length < args.horizon:
        raise Failure(f"an episode of {args.env_id} has {task.episode_length} decisions, less than the horizon of {args.horizon}")
    return args, task


def check_numbers(args: Args):
    """Raises Failure, one line, where a number cannot be what it is."""
    positive = "num_envs total_timesteps batch_size buffer_size num_bins horizon iterations num_samples num_elites "
    positive += "td_horizon num_rollouts simnorm_dim action_repeat enc_dim mlp_dim latent_dim num_enc_layers num_q "
    positive += "reanalyze_horizon reanalyze_batch_size eval_episodes learning_starts"
    above_zero = "lr grad_clip_norm rho temperature min_std max_std discount_denom expert_std_scale enc_lr_scale utd_ratio"
    at_least_zero = "seed eval_freq log_freq checkpoint_freq num_pi_trajs extra_iterations reanalyze_interval "
    at_least_zero += "consistency_coef reward_coef value_coef termination_coef entropy_coef encoder_consistency_coef "
    at_least_zero += "policy_trust_region_coef expert_std_min"
    unit = "tau policy_ema_tau discount discount_min discount_max"
    for names, wanted, holds in (
        (positive, "at least 1", lambda x: x >= 1),
        (above_zero, "above 0", lambda x: x > 0),
        (at_least_zero, "at least 0", lambda x: x >= 0),
        (unit, "in (0, 1]", lambda x: 0 < x <= 1),
        ("dropout", "in [0, 1)", lambda x: 0 <= x < 1),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise Failure(f"--{name.replace('_', '-')} is {value}; it must be {wanted}")
    pairs = "vmin vmax log_std_min log_std_max min_std max_std discount_min discount_max reanalyze_log_std_min reanalyze_log_std_max"
    for low, high in zip(pairs.split()[::2], pairs.split()[1::2]):
        bounds = [getattr(args, name.removeprefix("reanalyze_" * (getattr(args, name) is None))) for name in (low, high)]
        if not -math.inf < bounds[0] <= bounds[1] < math.inf:
            raise Failure(f"--{low.replace('_', '-')} is {bounds[0]}, above --{high.replace('_', '-')} {bounds[1]}")
    if args.seed >= 2**32:
        raise Failure(f"--seed is {args.seed}; it must be below 2^32")
    if "/" in args.run_name or args.run_name in (".", ".."):
        raise Failure(f"--run-name is {args.run_name!r}; it must not hold a slash")


def check_fit(args: Args):
    """Raises Failure where numbers do not fit each other; warns of flags that do nothing together."""
    T = args.horizon
    for wrong, message in (
        (args.num_elites > args.num_samples, f"{args.num_elites} elites of {args.num_samples} samples"),
        (args.num_pi_trajs >= args.num_samples, f"{args.num_pi_trajs} policy proposals of {args.num_samples} samples"),
        (args.latent_dim % args.simnorm_dim, f"latent_dim {args.latent_dim} is no multiple of simnorm_dim {args.simnorm_dim}"),
        (args.reanalyze_interval and args.reanalyze_batch_size > args.batch_size,
         f"reanalyze takes {args.reanalyze_batch_size} windows of a batch of {args.batch_size}"),
        (args.learning_starts < args.num_envs * T,
         f"learning_starts {args.learning_starts} is shorter than a window of {T} decisions in {args.num_envs} environments"),
        (args.buffer_size // args.num_envs < T + 2, f"buffer_size {args.buffer_size} holds no window per environment"),
        (args.num_bins < 2 or args.vmin >= args.vmax, f"{args.num_bins} bins on [{args.vmin}, {args.vmax}]"),
        (args.chosen_action_noise is False and not args.reanalyze_use_chosen_action,
         "--no-chosen-action-noise does nothing with --no-reanalyze-use-chosen-action: the expert is the plan's mean"),
    ):  # fmt: skip
        if wrong:
            raise Failure(message)
    if args.policy_ema_tau != 0.01 and not (args.td_target_use_ema_policy or args.policy_trust_region_coef > 0):
        warn("--policy-ema-tau does nothing: neither --td-target-use-ema-policy nor --policy-trust-region-coef is given")
    if args.td_target_initial_source == "same" and args.imagine_initial_source == "replay_true":
        warn("--td-target-initial-source same does nothing: with --imagine-initial-source replay_true both are true states")
    if not args.chosen_action_noise and not args.initial_expert_from_behavior:
        warn("--no-chosen-action-noise does nothing with --no-initial-expert-from-behavior: the separate plan has no noise")


def choose_device(args: Args) -> torch.device:
    """The torch device, with precision and determinism set. Raises Failure if it is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only auto, cpu, cuda and cuda:N are supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise Failure(f"--device {args.device}: {str(e).splitlines()[0]}") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision(args.matmul_precision)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    return device


def keep_freed_memory():
    """Lets glibc keep what tensors free for the next ones: returned to the system, every page is mapped and zeroed anew.

    Does nothing where there is another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h; 32 MiB is the most it takes for the second
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**25)


def choose_renderer():
    """MuJoCo's renderer, before it is imported: EGL or OSMesa where there is no display."""
    if "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
        found = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if ctypes.util.find_library(library)]
        if found:
            os.environ["MUJOCO_GL"] = found[0]
        else:
            warn("no display, and neither EGL nor OSMesa is installed: no video")
            os.environ["MUJOCO_GL"] = "disable"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint


@dataclasses.dataclass
class Progress:
    """Where the loop stands."""

    mean: Tensor  # (E, T, A) the last plans' means
    episode: np.ndarray  # (E,) the episode each environment plays
    returns: np.ndarray  # (E,) its return and
    digest: np.ndarray  # (E,) checksum so far
    actions: list[list[np.ndarray]]  # and actions
    global_step: int = 0
    pretrained: int = 0  # pretraining updates made
    updates: int = 0  # updates made after pretraining
    events_done: bool = False  # evaluation, logging and checkpoint of this step
    last_return: float = math.nan
    acted: Optional[Acted] = None  # a decision planned, but not executed when the run was stopped


class Training(NamedTuple):
    """What a run consists of."""

    args: Args
    functions: Functions
    model: WorldModel
    optimizers: tuple[Adam, Adam]
    buffer: ReplayBuffer
    draws: dict[str, torch.Generator]
    metrics: Metrics


def snapshot(t: Training, p: Progress, log: Log) -> dict:
    """Everything that the future of the run depends on, copied to the host: tensors, numbers and strings only."""
    host = lambda tree: torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), tree)
    progress = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
    progress |= {k: torch.from_numpy(progress[k].copy()) for k in ("episode", "returns", "digest")}
    progress["actions"] = [torch.from_numpy(np.array(a, np.float32)) for a in p.actions]
    progress["acted"] = None if p.acted is None else list(p.acted)
    return {
        "format": "bmpc checkpoint 1",
        "script": os.path.basename(__file__),
        "args": dataclasses.asdict(t.args),
        "model": host(t.model.state_dict()),
        "optimizers": host([optimizer.state_dict() for optimizer in t.optimizers]),
        "buffer": t.buffer.state_dict(),
        "draws": {name: generator.get_state() for name, generator in t.draws.items()},
        "metrics": t.metrics.state_dict(),
        "log": log.state_dict(p.global_step),
        "progress": host(progress),
    }


def restore(state: dict, t: Training, p: Progress):
    """The inverse of snapshot, into a run that was just set up."""
    device = t.model.kl_scale.device
    t.model.load_state_dict(state["model"])
    for optimizer, saved in zip(t.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    t.buffer.load_state_dict(state["buffer"])
    for name, generator in t.draws.items():
        if state["draws"][name].shape == generator.get_state().shape:
            generator.set_state(state["draws"][name])
        else:  # another kind of device; the run goes on with other random numbers
            generator.manual_seed(episode_seed(t.args.seed, name, state["progress"]["global_step"]))
    t.metrics.load_state_dict(state["metrics"])
    progress = dict(state["progress"])
    for name in ("episode", "returns", "digest"):
        progress[name] = progress[name].numpy().copy()
    progress["actions"] = [list(a.numpy()) for a in progress["actions"]]
    progress["mean"] = progress["mean"].to(device)
    progress["acted"] = progress["acted"] and Acted(*(x.to(device) for x in progress["acted"]))
    for name, value in progress.items():
        setattr(p, name, value)


def write_checkpoint(state: dict, directory: Path, copied: float) -> bool:
    """Writes beside, flushes, renames; the checkpoint before stays as checkpoint.previous.pt. False if it cannot."""
    start, path, beside = time.perf_counter(), directory / "checkpoint.pt", directory / "checkpoint.tmp"
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, directory / "checkpoint.previous.pt")
        os.replace(beside, path)
        seconds, size = time.perf_counter() - start, path.stat().st_size / 1e6
        say(f"checkpoint at {state['progress']['global_step']}: {size:.1f} MB, copied in {copied:.2f} s, written in {seconds:.2f} s")
        return True
    except (OSError, RuntimeError) as e:  # torch's writer turns a full disk into a RuntimeError
        warn(f"the checkpoint could not be written ({str(e).splitlines()[0]}); the last good one stays")
        beside.unlink(missing_ok=True)
        return False


def read_checkpoint(directory: Path) -> Optional[dict]:
    """The newest whole checkpoint, or None if there never was one. It cannot run code.

    Raises Failure if none of those that are there is good.
    """
    reasons = []
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = directory / name
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums of what it reads
                if archive.testzip() is not None:
                    raise ValueError("its checksums do not match")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or state.get("format") != "bmpc checkpoint 1":
                raise ValueError("it is not a checkpoint of this project")
            if state["script"] != os.path.basename(__file__):
                raise ValueError(f"it was written by {state['script']}")
            stored = load_args(directory)
            other = sorted(name for name in SHAPING_ARGS if state["args"][name] != stored[name])
            if other:
                raise ValueError(f"it belongs to another run, with other {', '.join(other)}")
            return state
        except Exception as e:  # a damaged file can raise anything
            reasons.append(f"{path} is not usable ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})")
            warn(reasons[-1])
    if reasons:
        raise Failure(f"no usable checkpoint in {directory}; remove the damaged files to begin anew", code=1)
    return None


class Checkpointer:
    """Writes checkpoints from a thread of its own, one at a time; training waits only for the copy."""

    def __init__(self, directory: Path):
        self.directory, self.thread, self.written = directory, None, True

    def save(self, t: Training, p: Progress, log: Log):
        """Raises Failure (code 1), writing nothing, if a loss or a weight is not finite."""
        start = time.perf_counter()
        t.metrics.check()
        weights = torch.stack([torch.isfinite(x).all() for x in t.model.state_dict().values()])
        if not to_host(weights).all():
            raise Failure(f"a weight is not finite at update {p.updates}; the last checkpoint stays", code=1)
        log.flush()
        state = snapshot(t, p, log)
        copied = time.perf_counter() - start
        self.wait()
        self.thread = threading.Thread(target=self.write, args=(state, copied))
        self.thread.start()

    def write(self, state: dict, copied: float):
        self.written = write_checkpoint(state, self.directory, copied)

    def wait(self):
        if self.thread is not None:
            self.thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Stop:
    """Set by SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C: finish what is under way, write a checkpoint, exit 75."""

    def __init__(self):
        self.requested = False
        for number in SIGNALS:
            signal.signal(number, self.request)

    def request(self, number, frame):
        self.requested = True
        warn(f"{signal.Signals(number).name}: writing a checkpoint, then stopping")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C waits only for a compilation

    @staticmethod
    def spare_compilers():
        """Has signals wait for the end of a compilation: sent to the process group, they would kill the compiler it runs."""
        hold = lambda how: lambda _: signal.pthread_sigmask(how, SIGNALS)  # a mask is inherited, a handler is not
        torch._dynamo.on_compile_start(hold(signal.SIG_BLOCK))
        torch._dynamo.on_compile_end(hold(signal.SIG_UNBLOCK))


def due(every: int, step: int, stride: int) -> bool:
    """Whether the last iteration of `stride` decisions, ending at `step`, reached or passed a multiple of `every`."""
    return every > 0 and step > 0 and step // every > (step - stride) // every


def updates_due(args: Args, step: int) -> int:
    """Updates after pretraining that should have been made by `step`: floor(d utd_ratio), d decisions after warm-up."""
    warm_up = -(-args.learning_starts // args.num_envs) * args.num_envs  # the first step at or past learning_starts
    return math.floor(max(0, step - warm_up) * Fraction(str(args.utd_ratio)))


def capacity(args: Args, task: TaskInfo) -> int:
    """Rows per environment that the run needs, an episode of n decisions taking n + 1; at most buffer_size in all."""
    decisions = -(-args.total_timesteps // args.num_envs)
    known = task.episode_length is not None and not args.episodic
    episodes = decisions // task.episode_length + 1 if known else decisions
    return min(args.buffer_size // args.num_envs, max(decisions + episodes + 1, args.horizon + 2))


def set_up(args: Args, task: TaskInfo, device: torch.device) -> tuple[Training, Progress]:
    """A run at its beginning."""
    if device.type == "cpu":
        keep_freed_memory()
    init = make_generator(args.seed, "init", torch.device("cpu"))  # the same weights on every device
    model = WorldModel(task, args, init).to(device)
    buffer = ReplayBuffer(args.num_envs, capacity(args, task), task, args.horizon, device, args.sample_unfinished)
    draws = {name: make_generator(args.seed, name, device) for name in ("collect", "expert", "learn", "variant")}
    functions, optimizers = compiled(args, device), make_optimizers(model, args)
    if device.type == "cuda" and args.cudagraphs:
        for optimizer in optimizers:
            optimizer.stay()
    t = Training(args, functions, model, optimizers, buffer, draws, Metrics(device))
    mean = torch.zeros(args.num_envs, args.horizon, task.action_dim, device=device)
    E = args.num_envs
    return t, Progress(mean, np.zeros(E, np.int64), np.zeros(E), np.zeros(E, np.int64), [[] for _ in range(E)])


def begin_episodes(t: Training, p: Progress, envs: Envs, resuming: bool):
    """The first observations; on a resume those that the unfinished episodes' actions lead to again."""
    seeds = [episode_seed(t.args.seed, i, int(k)) for i, k in enumerate(p.episode)]
    everyone = np.ones(t.args.num_envs, bool)
    obs, digests = envs.reset(everyone, seeds, replay=dict(enumerate(p.actions)))
    if resuming:
        strayed = digests != p.digest
        if not strayed.any():
            return
        warn(f"environments {np.flatnonzero(strayed).tolist()} do not repeat their episodes; they begin new ones")
        p.acted = None
        obs, digests = begin_next(t, p, envs, strayed)
        everyone = strayed
    p.digest = np.where(everyone, digests, p.digest)
    t.buffer.begin(to_device(everyone, t.buffer.base.device), to_device(obs, t.buffer.base.device))


def begin_next(t: Training, p: Progress, envs: Envs, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resets the environments `ended` (E,) to their next episodes: observations and digests."""
    p.episode += ended
    p.returns[ended] = 0.0
    for i in np.flatnonzero(ended):
        p.actions[i] = []
    return envs.reset(ended, [episode_seed(t.args.seed, i, int(k)) for i, k in enumerate(p.episode)])


def learn(t: Training, p: Progress, watch: Stopwatch, pretraining: bool):
    """One update, with its reanalyze if that is due."""
    args, device, learn_draws = t.args, t.model.kl_scale.device, t.draws["learn"]
    A = t.buffer.action.shape[1]
    with watch("updating"):
        draws = draw_update(args, A, learn_draws, device)
        batch = t.buffer.sample(draws.window)
    number = 0 if pretraining else p.updates + 1
    if number and args.reanalyze_interval and number % args.reanalyze_interval == 0:
        with watch("reanalyzing"):
            batch = reanalyze(t.functions.plan, t.model, t.buffer, batch, args, learn_draws)
    with watch("updating"):
        metrics = update(t.functions, t.model, t.optimizers, batch, draws, args, pretraining)
        t.metrics.add(metrics, p.pretrained + p.updates + 1)
    if pretraining:
        p.pretrained += 1
    else:
        p.updates += 1


def step_environments(t: Training, p: Progress, envs: Envs, sent: np.ndarray, log: Log, watch: Stopwatch):
    """Waits for the simulators, stores the rows, and begins the next episodes of those that ended."""
    args, device = t.args, t.model.kl_scale.device
    with watch("environment"):
        obs, reward, terminated, truncated = envs.step_wait()
    if terminated.any() and not args.episodic:
        raise Failure(f"{args.env_id} ended an episode by termination; add --episodic")
    p.global_step += args.num_envs
    p.returns += reward
    ended, first = terminated | truncated, obs
    for i in range(args.num_envs):
        p.actions[i].append(sent[i])
        p.digest[i] = digest(obs[i], reward[i], int(p.digest[i]))
    for i in np.flatnonzero(ended):
        p.last_return = float(p.returns[i])
        log.add(p.global_step, {"charts/episodic_return": p.returns[i], "charts/episodic_length": len(p.actions[i])})
        say(f"step {p.global_step}: environment {i}, episode {p.episode[i]}: return {p.returns[i]:.1f}, {len(p.actions[i])} decisions")
    if ended.any():
        with watch("environment"):
            first, digests = begin_next(t, p, envs, ended)
        p.digest = np.where(ended, digests, p.digest)
    columns = [obs, reward[:, None], terminated[:, None], ended[:, None], first]
    rows = to_device(np.concatenate(columns, 1).astype(np.float32), device)  # one copy a vector step
    O = obs.shape[1]
    t.buffer.add(p.acted.action, p.acted.expert, rows[:, O], rows[:, O + 1], rows[:, :O])
    t.buffer.begin(rows[:, O + 2] > 0, rows[:, O + 3 :])
    p.mean, p.acted = p.acted.mean, None


def log_interval(t: Training, p: Progress, log: Log, watch: Stopwatch, bar):
    """The means of the interval and its speeds, to the log and, where there is no progress bar, to a line."""
    speeds, means = watch.read(p.global_step), t.metrics.read()
    log.add(p.global_step, means | speeds)
    log.flush()
    sps, left = speeds["charts/SPS"], t.args.total_timesteps - p.global_step
    bar.set_postfix_str(f"return {p.last_return:.1f}, {sps:.1f} decisions/s", refresh=False)
    if bar.disable:
        eta = time.strftime("%H:%M:%S", time.gmtime(max(0.0, left / sps)))
        say(f"{p.global_step}/{t.args.total_timesteps} decisions, return {p.last_return:.1f}, {sps:.1f} decisions/s, ETA {eta}")


def run_evaluation(t: Training, p: Progress, envs: Envs, log: Log, stop: Stop, directory: Path):
    """Evaluates with the planner and with the policy alone, and logs both."""
    video = str(directory / "videos" / f"{p.global_step}.mp4") if t.args.capture_video else ""
    planner = evaluate(t.functions.plan, t.model, envs, t.args, p.global_step, True, stop, video)
    policy = evaluate(t.functions.plan, t.model, envs, t.args, p.global_step, False, stop)
    say(f"step {p.global_step}: evaluation: planner {planner.mean():.1f} +- {planner.std():.1f}, policy alone {policy.mean():.1f} +- {policy.std():.1f}")
    log.add(p.global_step, {"eval/episodic_return": planner.mean(), "eval/policy_episodic_return": policy.mean()})
    log.flush()


def train(t: Training, p: Progress, envs: Envs, eval_envs: Optional[Envs], log: Log, stop: Stop, directory: Path) -> int:
    """BMPC's Algorithm 1. Returns the exit code: 0 when done, 75 when asked to stop."""
    args, device = t.args, t.model.kl_scale.device
    E, A = args.num_envs, t.buffer.action.shape[1]
    checkpoints, watch = Checkpointer(directory), Stopwatch(device, recording=args.log_freq > 0)
    watch.restart(p.global_step)
    bar = tqdm(total=args.total_timesteps, initial=p.global_step, unit=" decisions", disable=not sys.stderr.isatty())
    try:
        while True:
            # Pretraining: when warm-up ends, the world model catches up with the decisions made so far
            if p.global_step >= args.learning_starts and p.pretrained == 0 and not (t.buffer.end > t.buffer.head).any():
                raise Failure(f"warm-up held no {args.horizon} decisions of one episode; raise --learning-starts", code=2)
            while p.global_step >= args.learning_starts and p.pretrained < args.learning_starts and not stop.requested:
                with watch("pretraining", exclude=True):
                    learn(t, p, Stopwatch(device), pretraining=True)

            # Evaluation, logging, checkpoint
            if not p.events_done and not stop.requested:
                last = p.global_step >= args.total_timesteps
                if eval_envs and (due(args.eval_freq, p.global_step, E) or p.global_step == 0 or last):
                    with watch("evaluation", exclude=True):
                        run_evaluation(t, p, eval_envs, log, stop, directory)
                if due(args.log_freq, p.global_step, E) or (last and args.log_freq):
                    log_interval(t, p, log, watch, bar)
                p.events_done = True
                if due(args.checkpoint_freq, p.global_step, E) or last:
                    checkpoints.save(t, p, log)
            if p.events_done and p.global_step >= args.total_timesteps:
                break
            if stop.requested:
                raise Interrupted

            # Act: random actions in warm-up, then the planner; the simulators run while the agent learns
            if p.acted is None:
                with watch("acting"):
                    if p.global_step < args.learning_starts:
                        p.acted = act_randomly(E, A, args, t.draws, device)
                    else:
                        p.acted, metrics = act(t.functions.plan, t.model, t.buffer, p.mean, args, t.draws)
                        t.metrics.add(metrics, p.pretrained + p.updates)
            with watch("acting"):
                sent = to_host(p.acted.action)  # the one copy to the host of a vector step
            envs.step_async(sent)

            # Learn, on the rows stored so far
            while p.updates < updates_due(args, p.global_step + E):
                learn(t, p, watch, pretraining=False)
                if stop.requested:
                    raise Interrupted
            step_environments(t, p, envs, sent, log, watch)
            p.events_done = False
            bar.update(E)
    except Interrupted:
        checkpoints.save(t, p, log)
        return TRY_AGAIN
    except Failure as e:
        t.metrics.check()  # raises where a loss was not finite: what an environment makes of that is no reason
        raise Failure(f"step {p.global_step}: {e}", e.code) from e
    finally:
        checkpoints.wait()
        bar.close()
    if not checkpoints.written:
        raise Failure("the last checkpoint could not be written; the same command tries again", code=1)
    return 0


def open_directory(args: Args) -> tuple[Path, Optional[dict]]:
    """Locks the run's directory and decides: a new run (None), or the checkpoint to continue from ({}: from its beginning).

    Raises Failure if the directory is in use, holds a finished run, or an unfinished one with other arguments.
    """
    directory = run_directory(args)
    directory.mkdir(parents=True, exist_ok=True)
    lock(directory)
    if not (directory / "args.json").exists():
        return directory, None
    if args.resume == "never":
        raise Failure(f"{directory} holds a run already; --run-name NAME gives this one a directory of its own")
    stored = load_args(directory)
    changed = {name: (old, getattr(args, name)) for name, old in stored.items() if getattr(args, name) != old}
    by_name = args.resume != "auto"
    fixed = SHAPING_ARGS if by_name else set(stored) - FREE_ARGS
    refused = [f"{name} {old} -> {new}" for name, (old, new) in changed.items() if name in fixed]
    if refused:
        hint = "" if by_name else f", or --resume {directory} where the change is harmless"
        raise Failure(f"{directory} holds a run with other arguments ({'; '.join(refused)}); give --run-name NAME{hint}")
    finished = directory / "finished.json"
    if finished.exists():
        steps = json.loads(finished.read_text())["total_timesteps"]
        if args.total_timesteps <= steps:
            raise Failure(f"{directory} holds a finished run of {steps} decisions; more --steps continue it, --run-name NAME "
                          f"begins another, --evaluate {directory} evaluates it")  # fmt: skip
    state = read_checkpoint(directory) or {}
    step = state["progress"]["global_step"] if state else 0
    if "total_timesteps" in changed and args.total_timesteps <= step:
        raise Failure(f"{directory} holds a run that has made {step} decisions already; give more --steps")
    finished.unlink(missing_ok=True)
    for name, (old, new) in changed.items():
        if name not in ("resume", "evaluate"):
            say(f"changed since the run began: {name} {old} -> {new}")
    return directory, state


def describe(t: Training, task: TaskInfo, device: torch.device, directory: Path):
    """The lines a run begins with."""
    args, count = t.args, lambda module: sum(p.numel() for p in module.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say(f"run directory {directory}, device {device} ({name}), {'compiled' if t.functions.plan is not plan else 'eager'}")
    say(f"{args.env_id}: observation {task.obs_dim}, action {task.action_dim}, episode {task.episode_length} decisions, discount {args.discount:.4f}")
    say(f"{count(t.model):,} parameters (targets included), replay {t.buffer.nbytes():,} bytes for {len(t.buffer.obs):,} rows")
    say(f"a step is a decision: {args.num_envs} environments take {args.num_envs} a time, and env_steps = {args.action_repeat} x steps")


def start_tracking(args: Args, directory: Path):
    """Weights & Biases, mirroring TensorBoard; a warning where it is not installed."""
    try:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=directory.name, id=directory.name,
                   resume="allow", config=dataclasses.asdict(args), sync_tensorboard=True, dir=str(directory))  # fmt: skip
    except Exception as e:  # not installed, no network, no account: a run is worth more than its mirror
        warn(f"going on without Weights & Biases ({type(e).__name__}: {e})")


def evaluate_run(args: Args) -> int:
    """--evaluate RUN_DIR: both returns of its checkpoint, with their spread."""
    directory = Path(args.evaluate)
    args, task = fill_in(args)
    device, state = choose_device(args), read_checkpoint(directory)
    if state is None:
        raise Failure(f"{directory} has no checkpoint yet")
    step = state["progress"]["global_step"]
    model = WorldModel(task, args, make_generator(args.seed, "init", torch.device("cpu"))).to(device)
    model.load_state_dict(state["model"])
    functions, envs = compiled(args, device), Envs(args.env_id, args.action_repeat, eval_workers(args, device), args.capture_video)
    try:
        for planning, name in ((True, "with the planner"), (False, "with the policy alone")):
            video = str((directory / "videos" / f"evaluate-{step}.mp4").absolute()) if args.capture_video and planning else ""
            returns = evaluate(functions.plan, model, envs, args, step, planning, video=video)
            say(f"{name}: {returns.mean():.1f} +- {returns.std():.1f} ({len(returns)} episodes, {returns.min():.1f} to {returns.max():.1f})")
    finally:
        envs.kill()
    return 0


def eval_workers(args: Args, device: torch.device) -> int:
    """Environments of an evaluation: on a GPU all episodes at once, on a CPU as many as act, whose plan is compiled."""
    return min(args.eval_episodes, args.num_envs if device.type == "cpu" else 16)


def main(argv: Optional[list[str]] = None) -> int:
    """Runs the command line. Returns the exit code; raises Failure for what the user must know."""
    args = parse_args(argv)
    if args.capture_video:
        choose_renderer()
    if args.evaluate:
        return evaluate_run(args)
    args, task = fill_in(args)
    device = choose_device(args)
    stop = Stop()
    directory, state = open_directory(args)
    write_json(directory / "args.json", dataclasses.asdict(args))
    starts = directory / "versions.json"
    write_json(starts, (json.loads(starts.read_text()) if starts.exists() else []) + [versions()])
    if args.track:
        start_tracking(args, directory)

    every = [Envs(args.env_id, args.action_repeat, args.num_envs)]  # before torch starts its threads
    try:
        if args.eval_freq and args.eval_episodes:
            every.append(Envs(args.env_id, args.action_repeat, eval_workers(args, device), args.capture_video))
        if args.compile:
            stop.spare_compilers()
        t, p = set_up(args, task, device)
        describe(t, task, device, directory)
        if state:
            restore(state, t, p)
            say(f"continuing at step {p.global_step}")
        log = Log(directory, args.action_repeat, state and state["log"])  # None: new; {}: stopped before a checkpoint
        begin_episodes(t, p, every[0], resuming=bool(state))
        code = train(t, p, every[0], every[1] if len(every) > 1 else None, log, stop, directory)
        log.close()
        if code == 0:
            write_json(directory / "finished.json", {"global_step": p.global_step, "total_timesteps": args.total_timesteps})
        return code
    finally:
        for envs in every:
            envs.kill()


def cli() -> int:
    """main, with failures as one line and an exit code."""
    try:
        return main()
    except Failure as e:
        print(f"{os.path.basename(__file__)}: error: {e}", file=sys.stderr)
        return e.code


if __name__ == "__main__":
    sys.exit(cli())
