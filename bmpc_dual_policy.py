"""BMPC with two policies: an optimistic one explores what the model's heads disagree on, a pessimistic one exploits.

BMPC: Bootstrapped Model Predictive Control (Wang et al., ICLR 2025, https://arxiv.org/abs/2503.18871). As multihead,
  [V1] flags
  [V2] the dynamics is a stack of H independent networks, rolled out side by side from one encoding
  [V3] a plan reports how much the heads disagree on its elites, and what came of it; logged where H > 1
  [V4] a candidate's score is the mean of its H x Q return estimates, plus a coefficient times their standard deviation;
       acting (a separate first plan included), reanalyze and evaluation have a coefficient each
  [V5] in value targets all heads share the first action; from the second on each head draws its own
  [V6] the value heads share a target, or each bootstraps from its own target network
  [V7] how far apart the heads' rollouts end; logged where H > 1
  [V8] learning rates that grow with the size of the ensembles
and, with --dual-policy-enabled:
  [V9] flags, and what they may be
  [V10] a second, optimistic policy with independent weights and an EMA copy and KL scale of its own
  [V11] a row holds an expert for each policy: the first, pessimistic one's, then the optimistic one's
  [V12] the optimistic policy proposes when acting, and its expert is planned with the acting coefficient; the
        pessimistic one's expert is a plan of its own, at collection and in reanalyze, and only it evaluates and gives
        value targets
  [V13] each policy imitates its own experts; one loss, the sum, one optimizer, one clip

A planner (MPPI in the latent space of a learned world model, as in TD-MPC2, https://arxiv.org/abs/2310.16828) acts and
is the expert; the policy imitates it; the value heads are those of the policy; policy and value guide the planner.

    python bmpc_dual_policy.py --dual-policy-enabled --planner-num-dynamics-heads 2 --planner-value-std-coef-train 1
    python bmpc_dual_policy.py --dual-policy-enabled --planner-value-std-coef-train 1 --policy-value-std-coef -1
    python bmpc_dual_policy.py --evaluate runs/dog-run__bmpc_dual_policy__1  # what a trained agent is worth

The same command again continues a run that was stopped. Everything a run writes is in runs/<task>__<exp_name>__<seed>/.

Sections: Args - environment - math - networks - replay - planner - learning - evaluation - the run: its directory, log
and checkpoint - the loop. Where this departs from the official and the JAX implementation, each with its flag: README.
"""

import contextlib
import copy
import ctypes.util
import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.profiler import record_function
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SIZES = ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q")
MODEL_SIZES = {  # that TD-MPC2's users know, in millions of parameters
    1: (256, 384, 128, 2, 2),
    5: (256, 512, 512, 2, 5),
    19: (1024, 1024, 768, 3, 5),
    48: (1792, 1792, 768, 4, 5),
    317: (4096, 4096, 1376, 5, 8),
}
PRESETS = {
    "full": {},
    "small": dict(
        total_timesteps=12_500, eval_freq=2_500, eval_episodes=5, model_size=1, num_q=2, enc_dim=128, mlp_dim=128,
        latent_dim=128, num_samples=128, num_elites=16, num_pi_trajs=8, batch_size=128, reanalyze_batch_size=10,
    ),
}  # fmt: skip
SCRIPT = Path(__file__).name + ", format 2"  # of checkpoints; those of another are not read
TRY_AGAIN = 75  # exit code of a run that was asked to stop: the same command continues it


class Range(NamedTuple):
    """What a number may be; stands in the type of its field."""

    text: str
    holds: Callable


T = TypeVar("T")
FREE = "a run that is continued may change it"
Free = Annotated[T, FREE]
Count = Annotated[int, Range("at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Range("at least 0", lambda x: x >= 0)]
NonNegative = Annotated[float, Range("at least 0", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Range("above 0", lambda x: 0 < x < math.inf)]
Unit = Annotated[float, Range("in (0, 1]", lambda x: 0 < x <= 1)]
Name = Annotated[str, Range("without a slash", lambda x: "/" not in x)]
Number = Annotated[float, Range("finite", math.isfinite)]
Device = Annotated[str, Range("auto, cpu, cuda or cuda:N", re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch)]


@dataclasses.dataclass(frozen=True)
class Args:
    """BMPC: a planner over a learned world model, and a policy bootstrapped from it."""

    # --- experiment
    exp_name: Name = Path(__file__).stem
    """name of the experiment, part of the run directory's name"""
    run_name: Name = ""
    """a further part of the run directory's name, to keep runs with other flags apart"""
    seed: Annotated[int, Range("in [0, 2^32)", lambda x: 0 <= x < 2**32)] = 1
    """seed of the experiment; every random number of a run follows from it"""
    device: Free[Device] = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N"""
    torch_deterministic: Free[bool] = True
    """ask torch for deterministic kernels, so that a seed gives the same numbers twice on one machine"""
    track: Free[bool] = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project_name: Free[str] = "bmpc"
    """the Weights & Biases project"""
    wandb_entity: Free[str | None] = None
    """the Weights & Biases entity (team or user)"""
    capture_video: Free[bool] = False
    """write an mp4 of evaluation episode 0 at every evaluation (needs EGL or OSMesa on a machine without display)"""
    profile: Free[bool] = False
    """write trace.json, what the run's time went into, for Perfetto; for a run of a few hundred decisions"""
    eval_freq: Free[Natural] = 10_000
    """decisions between evaluations; 0: none"""
    eval_episodes: Free[Count] = 10
    """episodes of an evaluation, with the planner and again with the policy alone"""
    log_freq: Free[Natural] = 1_000
    """decisions between two lines of losses and speed; 0: none"""
    checkpoint_freq: Free[Natural] = 10_000
    """decisions between checkpoints; 0: only at the end and when asked to stop"""
    resume: Free[str] = ""
    """RUN_DIR: continue that run, its arguments standing in for the flags that are not given"""
    evaluate: Free[str] = ""
    """RUN_DIR: evaluate its checkpoint, print both returns and train nothing"""
    preset: Literal["full", "small"] = "full"
    """small: other defaults, with which two CPU cores learn a small task in a quarter of an hour"""

    # --- environment
    env_id: Annotated[str, tyro.conf.arg(aliases=["--task"])] = "dog-run"
    """a dm_control task (dog-run, cup-catch, dm_control/dog-run-v0) or a Gymnasium id with a bounded Box of actions"""
    env_kwargs: str = "{}"
    """further keywords of gymnasium.make, as JSON: '{"env_name": "reach-v3"}'"""
    num_envs: Count = 4
    """environments stepped at once, each in its own process (official: 1; JAX: 4)"""
    action_repeat: Count | None = None
    """simulator steps per decision, rewards summed; None: 2 for dm_control, 1 elsewhere"""
    episodic: bool = False
    """learn when episodes terminate; needed where the environment ends episodes other than by a time limit"""
    discount: Unit | None = None
    """gamma per decision; None: clip((n/denom - 1)/(n/denom), min, max) for episodes of n decisions (TD-MPC2)"""
    discount_denom: Positive = 5.0
    """denom of the discount's formula"""
    discount_min: Unit = 0.95
    """lower bound of the discount's formula"""
    discount_max: Unit = 0.995
    """upper bound of the discount's formula"""

    # --- learning
    total_timesteps: Free[Annotated[Count, tyro.conf.arg(aliases=["--steps"])]] = 200_000
    """decisions of the whole run, summed over environments (env_steps = decisions x action_repeat)"""
    learning_starts: Count = 2_500
    """decisions with random actions first, and then as many pretraining updates of the world model (JAX: 10 000)"""
    utd_ratio: Positive = 1.0
    """updates per decision, read as an exact decimal: 0.5 is one every second decision. Sweep 2a: do more updates per
    decision learn faster?"""
    batch_size: Count = 256
    """windows of a batch"""
    buffer_size: Count = 1_000_000
    """rows of the replay buffer; it is no larger than the run needs"""
    lr: Positive = 3e-4
    """learning rate of both Adams"""
    enc_lr_scale: Positive = 1.0
    """the encoder's learning rate is lr times this (official, TD-MPC2: 0.3)"""
    grad_clip_norm: Positive = 20.0
    """bound of the gradient's norm, over the world model and over the policy"""
    tau: Unit = 0.01
    """step of the target value heads towards the online ones, per update"""
    rho: Positive = 0.5
    """a step t of the rollout weighs rho^t in all losses"""
    normalize_rho_weights: bool = True
    """divide these weights by their sum; off: by the horizon (official)"""
    td_horizon: Count = 1
    """imagined steps before the value target bootstraps"""
    consistency_coef: NonNegative = 10.0
    """weight of the latent consistency loss (official: 20, without normalized weights)"""
    reward_coef: NonNegative = 0.1
    """weight of the reward loss"""
    value_coef: NonNegative = 0.1
    """weight of the value loss"""
    termination_coef: NonNegative = 1.0
    """weight of the termination loss (with --episodic)"""
    entropy_coef: NonNegative = 0.0
    """weight of the policy's entropy bonus (official: 1e-4)"""
    kl_reduction: Literal["mean", "sum"] = "mean"
    """the KL over action dimensions (JAX: sum)"""

    # --- model
    model_size: Literal[1, 5, 19, 48, 317] = 5
    """millions of parameters, TD-MPC2's sizes; fills the sizes below that are None"""
    enc_dim: Count | None = None
    """width of the encoder's hidden layers"""
    mlp_dim: Count | None = None
    """width of all other hidden layers"""
    latent_dim: Count | None = None
    """size of the latent state"""
    num_enc_layers: Count | None = None
    """layers of the encoder, the last one included"""
    simnorm_dim: Count = 8
    """size of a SimNorm group (TD-MPC2)"""
    num_q: Count | None = None
    """value heads (official: 2)"""
    num_bins: Count = 101
    """bins of the two-hot distributions of rewards and values"""
    vmin: Number = -10.0
    """first bin, in symlog units"""
    vmax: Number = 10.0
    """last bin, in symlog units"""
    dropout: Annotated[float, Range("in [0, 1)", lambda x: 0 <= x < 1)] = 0.01
    """dropout of the value heads' first layer, in the value loss only"""
    log_std_min: Number = -5.0
    """lower end of the policy's log std (official: -3)"""
    log_std_max: Number = 1.0
    """upper end of the policy's log std"""

    # --- planning
    horizon: Count = 3
    """T: steps of a plan, and of the windows the model is trained on"""
    iterations: Count = 6
    """iterations of MPPI"""
    extra_iterations: Natural = 2
    """further iterations where the action has 20 dimensions or more"""
    num_samples: Count = 512
    """N: candidates of an iteration, the policy's included"""
    num_elites: Count = 64
    """candidates the next mean and std are made from"""
    num_pi_trajs: Natural = 24
    """P: candidates that the policy proposes"""
    min_std: Positive = 0.1
    """lower bound of the plan's std (official: 0.05; JAX: 0)"""
    max_std: Positive = 2.0
    """first std of the plan, and its upper bound"""
    temperature: Positive = 0.5
    """an elite's weight is softmax(temperature x return)"""
    eval_sample_elite: bool = False
    """evaluation plays a drawn elite instead of the best one (official)"""

    # --- expert
    reanalyze_interval: Natural = 10
    """updates between two reanalyses; 0: never"""
    reanalyze_batch_size: Count = 20
    """windows of the batch whose states are planned anew"""
    reanalyze_horizon: Count | None = None
    """horizon of these plans; None: horizon"""
    reanalyze_log_std_min: Number | None = None
    """the policy's range when it proposes in reanalyze; None: log_std_min (official: -2)"""
    reanalyze_log_std_max: Number | None = None
    """None: log_std_max (official: 1)"""
    expert_std_scale: Positive = 1.5
    """the expert's std is multiplied by this in the policy loss (official: 1)"""
    expert_std_min: NonNegative = 0.1
    """and is at least this (official: 0)"""

    # --- speed
    compile: Free[bool] = True
    """compile planning and learning with torch.compile (a warning and eager mode where there is no compiler)"""
    cudagraphs: Free[bool] = True
    """replay the compiled functions as CUDA graphs (CUDA only, with --compile)"""
    matmul_precision: Free[Literal["highest", "high", "medium"]] = "high"
    """float32 matrix products on CUDA: high is TF32"""

    # --- ablations
    reanalyze_use_chosen_action: bool = True
    """the expert's mean is the chosen action; off: the plan's mean (JAX). Sweep 2c: which target should the policy
    imitate?"""
    chosen_action_noise: bool = True
    """the chosen action at collection is the executed one, exploration noise included; off: the drawn elite (official).
    Goes with sweep 2c"""
    initial_expert_from_behavior: bool = True
    """a row's first expert is the plan that chose its action; off: a separate plan beside it. Sweep 2c: does the
    warm-started acting plan make a better first target?"""
    num_rollouts: Count = 1
    """imagined trajectories per state in the value target. Sweep 2d: does their mean reduce variance?"""
    imagine_initial_source: Literal["replay_rollout", "replay_true"] = "replay_rollout"
    """states at which values are predicted: the model's rollout, or true encodings. Sweep 2e: which teach better?"""
    td_target_initial_source: Literal["replay_true", "same"] = "replay_true"
    """states at which the imagination behind value targets starts: true encodings (BMPC), or those of
    imagine_initial_source. Goes with sweep 2e"""
    encoder_consistency_coef: NonNegative = 0.0
    """weight of the consistency loss with its gradient into the encoder. Sweep 2f: does it help representation?"""
    td_target_use_ema_policy: bool = False
    """an exponential moving average of the policy acts in value targets. Sweep 2g: do steadier targets help?"""
    policy_ema_tau: Unit = 0.01
    """step of that average towards the policy, per policy update. Sweep 2g: how fast should it follow?"""
    policy_trust_region_coef: NonNegative = 0.0
    """weight of KL(ema || policy) in the policy loss, relative to the expert's KL. Sweep 2g: does holding the policy
    back stabilize learning?"""
    # [V1] sweep 2b
    planner_num_dynamics_heads: Count = 1
    """H: dynamics networks with independent weights. Sweep 2b: does an ensemble make a better planner?"""
    planner_value_std_coef_train: Number = 0.0
    """weight of the std of a candidate's H x Q return estimates in its score when acting: above 0 explores what the
    heads disagree on, below 0 avoids it. Sweep 2b: does seeking disagreement explore better?"""
    planner_value_std_coef_eval: Number = 0.0
    """the same in evaluation"""
    reanalyze_value_std_coef: Number = 0.0
    """the same in reanalyze, whose plans the policy imitates"""
    local_td_bootstrap: bool = False
    """each value head's target is made by its own target network; off: all share the mean. Sweep 2b: do independent
    targets keep the value heads diverse?"""
    ensemble_lr_scaling: bool = False
    """learning rate of the dynamics heads times H, of the value heads times Q / 5: each loss is a mean over heads"""
    # [V9] sweep 2h
    dual_policy_enabled: bool = False
    """a second, optimistic policy proposes when acting, the first, pessimistic one in evaluation and value targets.
    Sweep 2h: does optimism that stays out of the values explore better?"""
    policy_value_std_coef: Number = 0.0
    """with two policies, weight of the std in the scores of the plans that the pessimistic policy imitates"""


class Refused(Exception):
    """Asked for the impossible: one line for the user, exit code 2."""


class Failed(Exception):
    """What ends a run early: one line for the user, exit code 1."""


# --- Environment ------------------------------------------------------------------------------------------------------


class TaskInfo(NamedTuple):
    """What the agent must know of a task: sizes of observation and action, decisions of an episode (None: no limit)."""

    obs_dim: int
    action_dim: int
    episode_length: int | None


def first_line(e):
    """An exception on one line."""
    return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"


def resolve_env_id(task):
    """The Gymnasium id of a task: `dog-run`, `cup-catch` as TD-MPC2 spells them; with a module or version it stands."""
    if re.search(r":|^(?!dm_control/).*-v\d+$", task):  # `module:Id-v0` imports the module that registers the id
        return task
    try:
        import shimmy  # noqa: F401 dm_control's tasks
    except Exception as e:  # besides ImportError what the renderer that MUJOCO_GL names may raise
        raise Refused(f"dm_control cannot be imported: {first_line(e)}") from e
    domain, dash, name = task.removeprefix("dm_control/").removesuffix("-v0").partition("-")
    domain = {"cup": "ball_in_cup", "pointmass": "point_mass"}.get(domain, domain)
    return f"dm_control/{domain}{dash}{name.replace('-', '_')}-v0"


class Worker(gym.Wrapper):
    """What an environment's process adds: action repeat and pictures."""

    def __init__(self, env, repeat):
        super().__init__(env)
        self.repeat = repeat

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed)[0], {}

    def step(self, action):
        """`repeat` steps or until the episode ends; rewards are summed, without discount (TD-MPC2)."""
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, _ = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, {}

    def picture(self):
        """The scene (height, width, 3); None where this environment is not filmed or cannot be."""
        try:
            return self.env.render() if self.env.render_mode else None
        except Exception as e:  # whatever a graphics driver may raise: a video is not worth a run
            print(f"warning: rendering failed: {first_line(e)}", file=sys.stderr, flush=True)
            self.picture = lambda: None  # a second try may end the process


def make_env(args, render=False):
    """One environment: flat float32 observations, actions in [-1, 1], `action_repeat` simulator steps a decision.

    Raises Refused for what this agent cannot play: images, actions that are not a bounded Box.
    """
    make = functools.partial(gym.make, args.env_id, disable_env_checker=True, **json.loads(args.env_kwargs))
    try:
        env = make(render_mode="rgb_array") if render else make()
    except TypeError:  # not every constructor knows render_mode
        env = make()
    obs, action = env.observation_space, env.action_space
    if len(obs.shape or ()) > 2 or not isinstance(gym.spaces.flatten_space(obs), gym.spaces.Box):
        raise Refused(f"{args.env_id} has observations {obs}; only vectors are supported, not images")
    is_box = isinstance(action, gym.spaces.Box) and action.dtype.kind == "f"
    if not is_box or np.abs([action.low, action.high]).max() >= 1e6:
        raise Refused(f"{args.env_id} has the action space {action}; a bounded Box of floats is needed")
    env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
    env = gym.wrappers.TransformAction(env, lambda a: a.reshape(action.shape), gym.spaces.flatten_space(action))
    return Worker(gym.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0)), args.action_repeat)


def inspect_task(args):
    """What the task is. Raises Refused if it cannot be made or played."""
    try:
        env = make_env(args)
    except Exception as e:  # whatever a constructor may raise
        raise e if isinstance(e, Refused) else Refused(f"{args.env_id} cannot be made: {first_line(e)}") from e
    own = getattr(env.unwrapped, "_env", None)  # dm_control keeps its limit to itself, in simulator steps
    limit = env.spec.max_episode_steps or getattr(own, "_step_limit", math.inf)
    length = math.ceil(limit / args.action_repeat) if math.isfinite(limit) else None
    return TaskInfo(env.observation_space.shape[0], env.action_space.shape[0], length)


def make_seed(seed, *name):
    """A seed made from (seed, *name): of an episode (environment, episode), or of a generator."""
    words = " ".join(map(str, (seed, *name)))
    return int(np.random.SeedSequence(list(words.encode())).generate_state(1)[0])


@contextlib.contextmanager
def simulating():
    """Whatever goes wrong in a simulator, as Failed."""
    try:
        yield
    except (EOFError, ConnectionError) as e:  # the other end of the pipe is gone
        traceback.clear_frames(e.__traceback__)  # of the message half sent, at which Python 3.12's collector crashes
        raise Failed(f"the process of an environment died: {first_line(e)}") from e
    except Exception as e:  # raised inside an environment and passed on by gymnasium
        raise Failed(f"an environment failed: {first_line(e)}") from e


class Envs(AsyncVectorEnv):
    """Environments in worker processes, each episode reset with a seed of its own.

    Without autoreset: an episode's true last observation is seen before the next begins. Raises Failed when an
    environment fails, its process dies, or what it returns is not finite.
    """

    @simulating()
    def __init__(self, args, num_envs, film=False):
        self.seed, makers = args.seed, [functools.partial(make_env, args, film and i == 0) for i in range(num_envs)]
        super().__init__(makers, context="fork", autoreset_mode=AutoresetMode.DISABLED)

    def reset(self, mask, episodes, obs=0.0):
        """Begins `episodes`, known by their names, where `mask` (E,) says so: obs (E, O) with their first ones."""
        if not mask.any():
            return obs
        seeds = [make_seed(self.seed, *name) for name in episodes]
        with simulating():
            first, _ = super().reset(seed=seeds, options={"reset_mask": mask})
        return np.where(mask[:, None], self.finite(first), obs)

    call = simulating()(AsyncVectorEnv.call)
    step_async = simulating()(AsyncVectorEnv.step_async)  # the simulators run while the caller does something else

    def step_wait(self):
        """obs (E, O) float32, reward (E,) float64, terminated (E,), truncated (E,)."""
        with simulating():
            obs, reward, terminated, truncated, _ = super().step_wait()
        return self.finite(obs), self.finite(reward, "a reward"), terminated, truncated

    def finite(self, values, what="an observation"):
        bad = ~np.isfinite(values).reshape(self.num_envs, -1).all(1)
        if bad.any():
            raise Failed(f"environment {bad.argmax()} returned {what} that is not finite")
        return values

    def close_extras(self, **options):  # the workers do not listen to requests to end, and dead ones cannot
        for process in self.processes:
            process.kill()


# --- Math -------------------------------------------------------------------------------------------------------------


def symlog(x):
    """sign(x) log(1 + |x|) (DreamerV3)."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x):
    """The inverse of symlog."""
    return torch.sign(x) * torch.expm1(x.abs())


def two_hot(x, args):
    """Scalars (...) as distributions (..., K): symlog(x), clipped to the bins, shared by the two bins beside it."""
    position = (symlog(x).clamp(args.vmin, args.vmax) - args.vmin) * ((args.num_bins - 1) / (args.vmax - args.vmin))
    bins = torch.arange(args.num_bins, device=x.device, dtype=x.dtype)
    return (1 - (position.unsqueeze(-1) - bins).abs()).clamp(min=0)  # (..., K)


def two_hot_inv(logits, args):
    """The scalar (...) whose symlog is the mean of the distribution softmax(logits) (..., K)."""
    bins = torch.linspace(args.vmin, args.vmax, args.num_bins, device=logits.device, dtype=logits.dtype)
    return symexp((logits.softmax(-1) * bins).sum(-1))


def soft_cross_entropy(logits, target):
    """-sum_k target_k log softmax(logits)_k: (..., K), (..., K) -> (...)."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def gaussian_kl(mean_p, std_p, mean_q, std_q):
    """KL(p || q) of diagonal Gaussians, per dimension: (..., A) -> (..., A)."""
    return torch.log(std_q / std_p) + (std_p.square() + (mean_p - mean_q).square()) / (2 * std_q.square()) - 0.5


def rho_weights(args, like):
    """lambda_t = rho^t / sum rho^t, or rho^t / T (official), as a tensor (T,)."""
    weights = args.rho ** torch.arange(args.horizon, device=like.device, dtype=like.dtype)
    return weights / (weights.sum() if args.normalize_rho_weights else args.horizon)


def mish(x):
    """x tanh(softplus(x)). Compiled, its algebraic form is one fused pass; eager, F.mish is one kernel."""
    if not torch.compiler.is_compiling():
        return F.mish(x)
    e = torch.exp(x.clamp(max=20.0))
    n = e * (e + 2)
    return x * n / (n + 2)


def simnorm(x, group):
    """Softmax over groups of `group` neighbours (TD-MPC2): (..., L) -> (..., L)."""
    return x.unflatten(-1, (-1, group)).softmax(-1).flatten(-2)


# --- Networks ---------------------------------------------------------------------------------------------------------
#
# Every network is a stack of `heads` independent networks with the same input and output sizes; most are a stack of
# one, which takes inputs with any leading dimensions. Otherwise the first dimension is the head's: (heads, ..., in), or
# (1, ..., in) for an input that all heads share.


def stacked_product(x, weight):
    """x (heads or 1, ..., in), weight (heads, in, out) -> (heads, ..., out), in one product."""
    if len(weight) == 1:
        return x @ weight[0]
    return torch.bmm(x.flatten(1, -2).expand(len(weight), -1, -1), weight).unflatten(1, x.shape[1:-1])


class Layer(nn.Module):
    """A stack of layers: linear, (dropout), and where there is an activation LayerNorm before it.

    Truncated normal weights of std 0.02, biases 0.
    """

    def __init__(self, heads, inputs, outputs, generator, activation):
        super().__init__()
        weight = torch.empty(heads, inputs, outputs)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, std=0.02, generator=generator))
        self.bias = nn.Parameter(torch.zeros(heads, outputs))
        self.activation = activation
        if activation:
            self.scale = nn.Parameter(torch.ones(heads, outputs))
            self.shift = nn.Parameter(torch.zeros(heads, outputs))

    def forward(self, x, a, keep, heads):
        """The layer on x, or on the concatenation [x, a]; `keep`: the dropout mask over the probability to keep.

        The leading dimensions of x and a need only broadcast. Where they differ the product with [x, a] is the sum of
        two: what many rows share (the latent state of all candidates at t = 0) is multiplied once.
        """
        if a is not None and a.shape[:-1] == x.shape[:-1]:
            x, a = torch.cat([x, a], -1), None
        weight, split = self.weight[heads], x.shape[-1]
        x = stacked_product(x, weight[:, :split])
        if a is not None:
            x = x + stacked_product(a, weight[:, split:])
        per_head = lambda parameter: parameter[heads].view(len(weight), *[1] * (x.dim() - 2), -1)
        x = x + per_head(self.bias)
        if keep is not None:
            x = x * keep
        if not self.activation:
            return x
        return self.activation(F.layer_norm(x, x.shape[-1:]) * per_head(self.scale) + per_head(self.shift))


class MLP(nn.Module):
    """A stack of networks: layers with LayerNorm and Mish, then a linear one, or one with the activation `last`."""

    def __init__(self, sizes, generator, heads=1, last=None):
        super().__init__()
        *hidden, (inputs, outputs) = zip(sizes, sizes[1:], strict=False)
        layers = [Layer(heads, i, o, generator, mish) for i, o in hidden]
        self.layers = nn.ModuleList([*layers, Layer(heads, inputs, outputs, generator, last)])

    def forward(self, x, a=None, keep=None, heads=None):
        """Those heads of the stack, or all: at once, or on a CPU one by one, as what each computes stays in its cache.

        The action enters, and dropout acts, on the first layer.
        """
        all_heads = len(self.layers[0].weight)
        if heads is None and all_heads > 1 and x.device.type == "cpu":
            of = lambda x, head: x if x is None or x.shape[0] == 1 else x[head]
            each = [slice(h, h + 1) for h in range(all_heads)]
            return torch.cat([self(of(x, head), of(a, head), of(keep, head), head) for head in each])
        for layer in self.layers:
            x, a, keep = layer(x, a, keep, heads or slice(None)), None, None
        return x


class WorldModel(nn.Module):
    """Encoder, latent dynamics, reward, value heads (and their target), policy; termination and EMA policy if asked.

    With leading dimensions `...`: encoder (..., O) -> (..., L); dynamics (H, ..., L), (1, ..., A) -> (H, ..., L);
    reward (..., L), (..., A) -> (..., K) logits; value (1, ..., L) -> (Q, ..., K) logits; policy (..., L) -> (..., 2A).
    """

    def __init__(self, task, args, init):
        super().__init__()
        obs, action, latent, bins = task.obs_dim, task.action_dim, args.latent_dim, args.num_bins
        hidden = [args.mlp_dim] * 2
        encoder = [obs] + [args.enc_dim] * (args.num_enc_layers - 1) + [latent]
        to_latent = functools.partial(simnorm, group=args.simnorm_dim)
        self.encoder = MLP(encoder, init, last=to_latent)
        heads = args.planner_num_dynamics_heads  # [V2]
        self.dynamics = MLP([latent + action, *hidden, latent], init, heads=heads, last=to_latent)
        self.reward = MLP([latent + action, *hidden, bins], init)
        self.value = MLP([latent, *hidden, bins], init, heads=args.num_q)
        for network in (self.reward, self.value):
            nn.init.zeros_(network.layers[-1].weight)
        self.policy = MLP([latent, *hidden, 2 * action], init)
        self.termination = MLP([latent, *hidden, 1], init) if args.episodic else None
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)  # moving averages follow the originals
        uses_ema = args.td_target_use_ema_policy or args.policy_trust_region_coef > 0
        self.ema_policy = copy.deepcopy(self.policy).requires_grad_(False) if uses_ema else None
        self.optimistic_policy = self.optimistic_ema_policy = None  # [V10]
        if args.dual_policy_enabled:
            variant = make_generator(args.seed, "variant policy", "cpu")
            self.optimistic_policy = MLP([latent, *hidden, 2 * action], variant)
            self.optimistic_ema_policy = (
                copy.deepcopy(self.optimistic_policy).requires_grad_(False) if uses_ema else None
            )
        self.register_buffer("kl_scale", torch.ones(2 if args.dual_policy_enabled else ()))  # S, of each policy


def policy_gaussian(policy, z, args):
    """The policy's mean, squashed, and std at z: (..., L) -> (..., A), (..., A)."""
    (mean, log_std), low, high = policy(z).chunk(2, -1), args.log_std_min, args.log_std_max
    return torch.tanh(mean), torch.exp(low + 0.5 * (high - low) * (torch.tanh(log_std) + 1))


def sample_action(policy, z, eps, args):
    """Actions drawn from the policy at z (..., L) by eps (..., A), normal: (..., A)."""
    mean, std = policy_gaussian(policy, z, args)
    return (mean + std * eps).clamp(-1, 1)


def imagine(model, z, act, steps, value, args):
    """What the model expects of `steps` steps from z (H or 1, ..., L), the action of step t being act(t, z).

    Returns the discounted rewards (H, ...) and discounted value at the end (Q, H, ...). Once the termination head is
    more than half sure that the episode ended, nothing counts.
    """
    rewards, alive, discount = 0.0, 1.0, 1.0
    for t in range(steps):
        a = act(t, z)
        rewards = rewards + discount * alive * two_hot_inv(model.reward(z, a), args)
        z = model.dynamics(z, a)  # (H, ..., L)
        if args.episodic:
            alive = alive * (model.termination(z).squeeze(-1) <= 0)
        discount *= args.discount
    return rewards, discount * alive * two_hot_inv(value(z[None]), args)


# --- Replay -----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B windows of T rows of one episode; `place` is where they are in the buffer."""

    obs: Tensor  # (T, B, O)
    action: Tensor  # (T, B, A)
    expert: Tensor  # (T, B, 2, A) mean and std; with two policies (T, B, 4, A) [V11]
    reward: Tensor  # (T, B)
    terminated: Tensor  # (T, B)
    next_obs: Tensor  # (T, B, O)
    place: Tensor  # (T, B) int64, step % C * E + environment


class ReplayBuffer:
    """A ring of C steps on the device. A row is a decision of one environment, a step the rows of all E.

    The host knows at which rows a window begins: T consecutive rows of one episode, finished or not.
    """

    def __init__(self, args, task, device):
        E, A = args.num_envs, task.action_dim
        C = min(args.buffer_size // E, math.ceil(args.total_timesteps / E))  # what the run needs
        self.horizon, self.capacity = args.horizon, C
        experts = 1 + args.dual_policy_enabled  # [V11]
        self.widths = [task.obs_dim, A, 2 * A * experts, 1, 1, task.obs_dim]  # [V11] in the order of Batch
        self.rows = torch.from_numpy(np.zeros((C, E, sum(self.widths)), np.float32)).to(device)  # lazily on a CPU
        self.begins = np.zeros((C, E), bool)  # whether a window does, at each row
        self.windows = np.zeros(0, np.int64)  # the rows at which one does
        self.age = np.zeros(E, np.int64)  # decisions of the episodes under way
        self.step = 0  # steps stored so far

    def columns(self, rows, place=None):
        """Rows (..., D) as a Batch."""
        obs, action, expert, reward, terminated, next_obs = rows.split(self.widths, -1)
        expert = expert.unflatten(-1, (-1, action.shape[-1]))
        return Batch(obs, action, expert, reward.squeeze(-1), terminated.squeeze(-1), next_obs, place)

    def add(self, obs, action, expert, reward, terminated, next_obs, ended):
        """Stores a step: (E, O), (E, A), (E, 2, A), (E,), (E,), the true next obs (E, O), on the host (E,)."""
        row = [obs, action, expert.flatten(1), reward[:, None], terminated[:, None], next_obs]
        torch.cat(row, 1, out=self.rows[self.step % self.capacity])
        self.begins[self.step % self.capacity] = False
        self.age += 1
        self.step += 1
        self.begins[(self.step - self.horizon) % self.capacity] = self.age >= self.horizon
        self.windows = np.flatnonzero(self.begins)  # here, as several updates follow a step
        self.age[ended] = 0

    def sample(self, u):
        """Windows drawn uniformly from all that exist, by uniform numbers u (B,) in [0, 1), on the host."""
        T, C, E = self.horizon, self.capacity, len(self.age)
        if not len(self.windows):
            raise Refused(f"the replay holds no {T} decisions of one episode; raise --learning-starts or --buffer-size")
        first = self.windows[(u * len(self.windows)).astype(np.int64)]  # (B,)
        place = to_device((first + E * np.arange(T)[:, None]) % (C * E), self.rows.device)  # (T, B)
        return self.columns(self.rows.flatten(0, 1)[place], place)

    def state_dict(self):
        """All that was ever written to."""
        host = {"begins": torch.from_numpy(self.begins[: self.step].copy()), "age": torch.from_numpy(self.age.copy())}
        return host | {"step": self.step, "rows": self.rows[: self.step].to("cpu", copy=True)}

    def load_state_dict(self, state):
        self.step = state["step"]
        self.rows[: self.step].copy_(state["rows"])
        self.begins[: self.step], self.age[:] = state["begins"], state["age"]
        self.windows = np.flatnonzero(self.begins)


# --- Planner: MPPI in latent space ------------------------------------------------------------------------------------


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
    report: Tensor  # (S, 3) [V3] of the elites: the heads' std, the bonus's share of the scores, the policy's proposals


def draw_plan(args, states, action_dim, horizon, generator):
    """The random numbers of `states` plans."""
    iterations, P = args.iterations + (args.extra_iterations if action_dim >= 20 else 0), args.num_pi_trajs
    normal = lambda *shape: torch.randn(states, *shape, generator=generator, device=generator.device)
    proposals, samples = normal(P, horizon, action_dim), normal(iterations, args.num_samples - P, horizon, action_dim)
    uniform = torch.rand(states, args.num_elites, generator=generator, device=generator.device)
    return PlanDraws(proposals, samples, uniform, normal(action_dim))


def score(rewards, values, std_coef):
    """[V4] Scores of candidates, -1e9 where not finite, and the heads' spread: (H, S, N), (Q, H, S, N) -> (2, S, N)."""
    returns = rewards.mean(0) + values.mean((0, 1))
    estimates = rewards + values  # (Q, H, S, N) [V4] one for each pair of a dynamics and a value head
    spread = (estimates - estimates.mean((0, 1))).square().mean((0, 1)).sqrt()  # (S, N) their population's std
    if std_coef != 0:
        returns = returns + std_coef * spread
    return torch.stack([returns.nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9), spread.nan_to_num(0.0, 0.0, 0.0)])


@torch.compiler.nested_compile_region  # compiled once, not once per iteration
def refine(model, z, mean, std, proposals, proposal_scores, noise, args, std_coef):  # [V4]
    """One iteration of MPPI: z (S, L), mean and std (S, T, A), proposals (S, P, T, A), scores, noise (S, N-P, T, A).

    Returns the new mean and std, the elites (S, num_elites, T, A), best first, their scores and weights.
    """
    # Sample action sequences and score them
    samples = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)  # (S, N-P, T, A)
    steps = samples.movedim(2, 0).contiguous()  # (T, S, N-P, A)
    chosen = lambda t, z: steps[None, t]  # (1, S, N-P, A)
    expected = imagine(model, z[None, :, None], chosen, len(steps), model.value, args)  # at t = 0 all share z
    scores, spread = torch.cat([proposal_scores, score(*expected, std_coef)], 2)  # (S, N) [V4]
    actions = torch.cat([proposals, samples], 1)  # (S, N, T, A)

    # Elites and their weights
    elite_scores, elite = scores.topk(args.num_elites, dim=1)
    elites = actions.take_along_dim(elite[:, :, None, None], 1)  # (S, num_elites, T, A)
    weights = torch.softmax(args.temperature * (elite_scores - elite_scores[:, :1]), 1)

    # Mean and std of the weighted elites
    w = weights[:, :, None, None]
    mean = (w * elites).sum(1)
    std = (w * (elites - mean[:, None]).square()).sum(1).sqrt().clamp(args.min_std, args.max_std)

    # [V3] The elites' spread over the heads, the bonus's share of their scores, the policy's proposals among them
    elite_spread = spread.gather(1, elite)  # (S, num_elites)
    bonus = std_coef * elite_spread
    share = bonus.abs() / (bonus.abs() + (elite_scores - bonus).abs()).clamp(min=1e-8)
    report = torch.stack([elite_spread, share, (elite < proposals.shape[1]).float()], 2).mean(1)  # (S, 3)
    return mean, std, elites, elite_scores, weights, report


@torch.no_grad()
def plan(model, policy, obs, mean, draws, args, std_coef):  # [V4] who plans says what disagreement is worth
    """Plans for S observations at once (MPPI with policy proposals, as in TD-MPC2).

    obs (S, O); mean (S, T, A): the previous plan's, shifted, or zero. The same function acts, evaluates and reanalyzes.
    """
    # Policy proposals: candidates of every iteration, scored once
    z, std, proposed = model.encoder(obs), torch.full_like(mean, args.max_std), []  # (S, L), (S, T, A)

    def follow_policy(t, z):
        proposed.append(sample_action(policy, z[0], draws.proposals[:, :, t], args))  # (S, P, A)
        return proposed[t][None]

    expected = imagine(model, z[None, :, None], follow_policy, mean.shape[1], model.value, args)
    proposals = torch.stack(proposed, 2)  # (S, P, T, A)
    proposal_scores = score(*expected, std_coef)  # (2, S, P) [V4]

    for noise in draws.samples.unbind(1):
        found = refine(model, z, mean, std, proposals, proposal_scores, noise, args, std_coef)  # [V3] [V4]
        mean, std, elites, elite_scores, weights, report = found

    # Draw an elite by its weight (Gumbel trick); training adds noise to its first action
    gumbel = -torch.log(-torch.log(draws.elite))
    chosen = (weights.log() + gumbel).argmax(1)  # (S,)
    first = elites[torch.arange(len(z), device=z.device), chosen, 0]  # (S, A)
    action = (first + std[:, 0] * draws.noise).clamp(-1, 1)
    value = elite_scores.gather(1, chosen[:, None])[:, 0]
    return Plan(action, first, elites[:, 0, 0], mean, std[:, 0], value, report)  # [V3]


def plan_in_chunks(plan, model, policy, obs, mean, generator, args, std_coef):  # [V4]
    """`plan`, compiled or not, with draws of the torch.Generator given.

    On a CPU in chunks: about 2048 rollouts, and what is made of them, fit its cache.
    """
    S, T, A = mean.shape
    rollouts = args.num_samples * args.planner_num_dynamics_heads  # [V2]
    states = S if obs.device.type != "cpu" else max(1, 2048 // rollouts)  # [V2]
    draws = draw_plan(args, S, A, T, generator)
    pieces = [x.tensor_split(math.ceil(S / states)) for x in (obs, mean, *draws)]
    if obs.is_cuda:  # the next replay of a CUDA graph overwrites what this one returns: torch.cat copies it
        torch.compiler.cudagraph_mark_step_begin()
    piece = lambda obs, mean, *draws: plan(model, policy, obs, mean, PlanDraws(*draws), args, std_coef)  # [V4]
    return Plan(*map(torch.cat, zip(*map(piece, *pieces), strict=True)))


def shift(mean):
    """Where the next step's plans start, zero at the end: (S, T, A) -> (S, T, A)."""
    return F.pad(mean[:, 1:], (0, 0, 0, 1))


def make_expert(planned, chosen, args):
    """The expert of S rows, mean and std of a Gaussian over the action: (S, 2, A)."""
    return torch.stack([chosen if args.reanalyze_use_chosen_action else planned.mean[:, 0], planned.std], 1)


def act_randomly(args, action_dim, generator):
    """Warm-up: uniform actions (E, A) and their expert N(0, 1), (E, 2, A)."""
    action = torch.rand(args.num_envs, action_dim, generator=generator, device=generator.device) * 2 - 1
    experts = [torch.zeros_like(action), torch.ones_like(action)] * (1 + args.dual_policy_enabled)  # [V11]
    return action, torch.stack(experts, 1)  # [V11]


@torch.no_grad()
def act(plan, model, obs, mean, args, generator):
    """Plans on obs (E, O), starting from mean (E, T, A). Returns action (E, A), expert (E, 2, A), mean; metrics."""
    coef = args.planner_value_std_coef_train  # [V4]
    policy = model.optimistic_policy if args.dual_policy_enabled else model.policy  # [V12]
    acting = plan_in_chunks(plan, model, policy, obs, mean, generator("act"), args, coef)
    expert = make_expert(acting, acting.action if args.chosen_action_noise else acting.elite, args)
    if not args.initial_expert_from_behavior:
        start = torch.zeros_like(mean)
        separate = plan_in_chunks(plan, model, policy, obs, start, generator("expert"), args, coef)  # [V4] [V12]
        expert = make_expert(separate, separate.elite, args)
    metrics = {"planner/elite_std": acting.std.mean(), "planner/value": acting.value.mean()}
    if args.dual_policy_enabled:  # [V12] the pessimistic policy's expert is always a plan of its own
        start, coef = torch.zeros_like(mean), args.policy_value_std_coef
        own = plan_in_chunks(plan, model, model.policy, obs, start, generator("own expert"), args, coef)
        expert = torch.cat([make_expert(own, own.elite, args), expert], 1)  # (E, 4, A)
        metrics["planner/pessimistic_proposal_share"] = own.report[:, 2].mean()
    if args.planner_num_dynamics_heads > 1 or args.dual_policy_enabled:  # [V3] [V12]
        names = ("planner/return_disagreement", "planner/bonus_share", "planner/proposal_share")
        metrics |= dict(zip(names, acting.report.mean(0), strict=True))
    return (acting.action, expert, acting.mean), metrics


# --- Learning ---------------------------------------------------------------------------------------------------------


class UpdateDraws(NamedTuple):
    """Every random number of an update but those of its reanalyze."""

    td: Tensor  # (H or 1, R, td_horizon, T, B, A) normal [V5]
    dropout: Tensor  # (Q, T, B, mlp_dim) 0 where an element is dropped, else 1


def draw_update(args, action_dim, generator):
    """The random numbers of one update."""
    T, B, draws = args.horizon, args.batch_size, generator("update")
    td = torch.randn(args.num_rollouts, args.td_horizon, T, B, action_dim, generator=draws, device=draws.device)
    dropout = torch.empty(args.num_q, T, B, args.mlp_dim, device=draws.device)
    dropout.bernoulli_(1 - args.dropout, generator=draws)  # compiled, a comparison would cost a CPU more
    td = td[None]
    if args.td_horizon > 1:  # [V5] from the second action on each head has draws of its own
        others = (args.planner_num_dynamics_heads - 1, *td.shape[1:])
        td = torch.cat([td, torch.randn(others, generator=generator("heads"), device=td.device)])
    return UpdateDraws(td, dropout)


@torch.no_grad()
def td_target(model, policy, z, eps, args):
    """Value targets by imagination with the policy (BMPC: model-based TD-learning).

    z (T, B, L), eps (R, td_horizon, T, B, A) -> (1, R, T, B): y = sum_k gamma^k r_k + gamma^td_horizon V(z), k below
    td_horizon, V being the mean over the target value heads. [V6] The mean over dynamics heads; eps (H or 1, R,
    ...). With local_td_bootstrap each value head has its own y, made by its own V: (Q, R, T, B).
    """
    drawn = lambda k, z: sample_action(policy, z, eps[: len(z), :, k], args)  # (1, then H, R, T, B, A) [V5]
    rewards, values = imagine(model, z[None, None], drawn, args.td_horizon, model.target_value, args)
    if args.local_td_bootstrap:  # [V6]
        return (rewards + values).mean(1)
    return (rewards + values.mean(0)).mean(0, keepdim=True)  # from (H, R, T, B), (Q, H, R, T, B)


def world_model_loss(model, batch, draws, args):
    """Consistency, reward, value (and termination) losses along the model's rollout (TD-MPC2: model objective).

    Returns the loss, the rollout's states without gradient (T, B, L) and metrics.
    """
    T, lam = args.horizon, rho_weights(args, batch.reward)
    true_needs_grad = args.encoder_consistency_coef > 0 or args.imagine_initial_source == "replay_true"
    first = model.encoder(batch.obs[0])  # (B, L)
    with torch.set_grad_enabled(true_needs_grad and torch.is_grad_enabled()):
        z_true = torch.cat([first[None], model.encoder(batch.next_obs)])  # (T+1, B, L)

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
    keep = draws.dropout / (1 - args.dropout)
    value_logits = model.value(start[None], keep=keep)  # (Q, T, B, K)
    value = soft_cross_entropy(value_logits, target).mean((0, 2))  # (T,)

    losses = {"consistency": consistency, "reward": reward, "value": value}  # (T,) each
    if args.episodic:
        logits = model.termination(predicted).squeeze(-1)  # (T, H, B)
        ended = batch.terminated[:, None].expand_as(logits)
        losses["termination"] = F.binary_cross_entropy_with_logits(logits, ended, reduction="none").mean((1, 2))
    if args.encoder_consistency_coef > 0:
        losses["encoder_consistency"] = (predicted.detach() - z_true[1:, None]).square().mean((1, 2, 3))
    losses = {name: (lam * loss).sum() for name, loss in losses.items()}
    total = sum(getattr(args, f"{name}_coef") * loss for name, loss in losses.items())
    metrics = {f"losses/{name}": loss.detach() for name, loss in losses.items()}
    metrics |= {"losses/total": total.detach(), "losses/td_target": y.mean()}
    if args.num_rollouts > 1:
        metrics["losses/td_target_std_over_rollouts"] = y.std(1).mean()
    if args.planner_num_dynamics_heads > 1:  # [V7]
        metrics["losses/latent_disagreement"] = predicted[-1].detach().std(0, correction=0).mean()
    return total, rollout.detach(), metrics


def update_kl_scale(scale, kl):
    """S + 0.01 (max(p95 - p5, 1) - S) of the KLs (B,) at t = 0 (the spread TD-MPC2 divides its Q-values by)."""
    kl, last = kl.detach().sort().values, len(kl) - 1  # torch.quantile is not traced by every version of torch
    at = lambda place: torch.lerp(kl[math.floor(place)], kl[math.ceil(place)], place % 1)
    return torch.lerp(scale, (at(0.95 * last) - at(0.05 * last)).clamp(min=1.0), 0.01)


def imitation_loss(policy, ema, scale, z, expert, args):  # [V13]
    """KL(policy || expert) / S at the rollout's states z (T, B, L), expert (T, B, 2, A) (BMPC: expert imitation).

    If asked, with the policy's entropy and its distance from its average. Returns the loss, the new S and metrics.
    """
    lam = rho_weights(args, z)
    reduce = torch.mean if args.kl_reduction == "mean" else torch.sum
    mean, std = policy_gaussian(policy, z, args)  # (T, B, A) [V13]
    expert_std = (expert[:, :, 1] * args.expert_std_scale).clamp(min=args.expert_std_min)
    kl = reduce(gaussian_kl(mean, std, expert[:, :, 0], expert_std), -1)  # (T, B)
    scale = update_kl_scale(scale, kl[0])  # [V13]
    loss = (lam * kl.mean(1)).sum() / scale
    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean(1)  # (T,)
    if args.entropy_coef > 0:
        loss = loss - args.entropy_coef * mean.shape[-1] * (lam * entropy).sum()
    metrics = {"losses/kl": kl.detach().mean(), "losses/kl_scale": scale, "losses/entropy": entropy.detach().mean()}
    if args.policy_trust_region_coef > 0:
        ema_mean, ema_std = policy_gaussian(ema, z, args)  # [V13]
        trust = (lam * reduce(gaussian_kl(ema_mean, ema_std, mean, std), -1).mean(1)).sum() / scale
        loss = loss + args.policy_trust_region_coef * trust
        metrics["losses/trust_region"] = trust.detach()
    return loss, scale, metrics | {"losses/policy": loss.detach()}


def policy_loss(model, z, expert, args):
    """[V13] The sum of both policies' losses: z (T, B, L), expert (T, B, 4, A). Returns it, both S and metrics."""
    if not args.dual_policy_enabled:
        return imitation_loss(model.policy, model.ema_policy, model.kl_scale, z, expert, args)
    (scale, optimistic_scale), (expert, optimistic_expert) = model.kl_scale, expert.chunk(2, 2)
    optimistic, ema = model.optimistic_policy, model.optimistic_ema_policy
    first, scale, metrics = imitation_loss(model.policy, model.ema_policy, scale, z, expert, args)
    second, optimistic_scale, more = imitation_loss(optimistic, ema, optimistic_scale, z, optimistic_expert, args)
    metrics |= {name.replace("/", "/optimistic_"): value for name, value in more.items()}
    with torch.no_grad():
        both = [*policy_gaussian(optimistic, z, args), *policy_gaussian(model.policy, z, args)]
        metrics["losses/kl_between_policies"] = gaussian_kl(*both).mean()  # of the optimistic one
    return first + second, torch.stack([scale, optimistic_scale]), metrics


def make_optimizers(model, args):
    """The world model's Adam (encoder, dynamics, reward, values, termination) and the policy's."""
    others = (model.dynamics, model.reward, model.value, model.termination)
    groups = [(model.encoder, args.lr * args.enc_lr_scale)] + [(network, args.lr) for network in others if network]
    scale = {model.dynamics: args.planner_num_dynamics_heads, model.value: args.num_q / 5}  # [V8]
    if args.ensemble_lr_scaling:  # [V8]
        groups = [(network, lr * scale.get(network, 1)) for network, lr in groups]
    device = model.kl_scale.device.type
    fast = dict(fused=device in ("cpu", "cuda"), capturable=device == "cuda")
    by_lr = {}  # each of Adam's groups is a launch
    for network, lr in groups:
        by_lr.setdefault(lr, []).extend(network.parameters())
    world = torch.optim.Adam([dict(params=parameters, lr=lr) for lr, parameters in by_lr.items()], **fast)
    policies = nn.ModuleList([model.policy] + [model.optimistic_policy] * args.dual_policy_enabled)  # [V13]
    return world, torch.optim.Adam(policies.parameters(), lr=args.lr, eps=1e-5, **fast)  # [V13]


def descend(loss, optimizer, args):
    """One step of Adam along the gradient of the loss, clipped. Returns the gradient's norm before clipping."""
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm(gradients)
    torch._foreach_div_(gradients, (norm / args.grad_clip_norm).clamp(min=1.0))
    optimizer.step()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def follow(target, online, tau):
    """target += tau (online - target)."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class Functions(NamedTuple):
    """What is worth compiling."""

    plan: Callable = plan
    world_model_loss: Callable = world_model_loss
    policy_loss: Callable = policy_loss


def compiled(args, device):
    """The functions compiled, each to one graph per set of shapes; eager ones where nothing can be compiled."""
    if not args.compile:
        return Functions()
    say("is there a compiler? ...")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's own deprecations, while its compiler is imported
            torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as e:
        say(f"warning: no working compiler, going on in eager mode ({type(e).__name__})", sys.stderr)
        return Functions()
    torch._dynamo.config.recompile_limit = 64  # plans differ by batch size and options
    torch._dynamo.callback.callback_handler.clear()
    torch._dynamo.callback.on_compile_start(lambda about: say("compiling ..."))  # at first calls, up to a minute
    torch._dynamo.callback.on_compile_end(lambda about: say("compiled"))
    on_cuda = device.type == "cuda"  # where a launch costs most: independent kernels in one, no copies out of padding
    graphs = on_cuda and args.cudagraphs
    options = {"combo_kernels": on_cuda, "comprehensive_padding": False, "triton.cudagraphs": graphs}
    return Functions(*(torch.compile(f, fullgraph=True, dynamic=False, options=options) for f in Functions()))


@torch.no_grad()
def reanalyze(plan, model, buffer, batch, args, generator):
    """Plans the first windows' states anew (BMPC: lazy reanalyze).

    The new experts replace the old ones in the buffer and in the batch.
    """
    W, T = args.reanalyze_batch_size, args.horizon
    obs, place = batch.obs[:, :W].flatten(0, 1), batch.place[:, :W].flatten()  # (T * W, O), (T * W,)
    start = obs.new_zeros(T * W, args.reanalyze_horizon, batch.action.shape[-1])
    wider = dataclasses.replace(args, log_std_min=args.reanalyze_log_std_min, log_std_max=args.reanalyze_log_std_max)
    coef = args.reanalyze_value_std_coef  # [V4]
    coef = args.policy_value_std_coef if args.dual_policy_enabled else coef  # [V12]
    new = plan_in_chunks(plan, model, model.policy, obs, start, generator("reanalyze"), wider, coef)
    expert = make_expert(new, new.elite, args)  # [V12]
    if args.dual_policy_enabled:  # [V12]
        coef, policy = args.planner_value_std_coef_train, model.optimistic_policy
        new = plan_in_chunks(plan, model, policy, obs, start, generator("optimistic"), wider, coef)
        expert = torch.cat([expert, make_expert(new, new.elite, args)], 1)
    rows = buffer.rows.flatten(0, 1)
    renewed = rows[place]
    buffer.columns(renewed).expert.copy_(expert)  # (T * W, 2 or 4, A) [V12]
    rows[place] = renewed  # of a row that occurs twice one plan remains
    batch.expert[:, :W] = buffer.columns(rows[batch.place[:, :W]]).expert


def update(functions, model, optimizers, batch, draws, args, pretraining):
    """One update of the world model, the policy (unless pretraining) and the target value heads. Returns metrics."""
    if batch.reward.is_cuda:  # what CUDA graphs return lives until the next update
        torch.compiler.cudagraph_mark_step_begin()
    loss, z, metrics = functions.world_model_loss(model, batch, draws, args)
    metrics["losses/grad_norm"] = descend(loss, optimizers[0], args)
    if not pretraining:
        loss, scale, policy_metrics = functions.policy_loss(model, z, batch.expert, args)
        metrics |= policy_metrics | {"losses/policy_grad_norm": descend(loss, optimizers[1], args)}
        model.kl_scale.copy_(scale)
        if model.ema_policy is not None:
            follow(model.ema_policy, model.policy, args.policy_ema_tau)
            if args.dual_policy_enabled:  # [V10]
                follow(model.optimistic_ema_policy, model.optimistic_policy, args.policy_ema_tau)
    follow(model.target_value, model.value, args.tau)
    return metrics


# --- Evaluation -------------------------------------------------------------------------------------------------------


def to_device(x, device):
    """The one way from the host to the device; on CUDA through pinned memory, without waiting."""
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def to_host(x):
    """The one way from the device to the host."""
    return x.cpu().numpy()


def make_generator(seed, name, device):
    """A generator on the device with the seed made from (seed, name)."""
    return torch.Generator(device).manual_seed(make_seed(seed, name))


@torch.no_grad()
def play(run, envs, planning, stop, film):
    """Returns of `eval_episodes` episodes (float64), with the planner or with the policy's mean alone.

    Episode j begins with the seed made from (seed, "eval", j), the same at every evaluation. `film` collects the
    pictures of episode 0. None if asked to stop meanwhile.
    """
    args, model, W = run.args, run.model, envs.num_envs
    mean, returns, episode = torch.zeros_like(run.mean[:W]), np.zeros(args.eval_episodes), np.arange(W)
    generator = make_generator(args.seed, f"evaluation {run.global_step}", mean.device)
    progress = Bar(f"evaluating {'planner' if planning else 'policy alone'}, decisions")
    obs, ended = 0.0, episode >= 0
    while (playing := episode < args.eval_episodes).any():
        if stop:
            return None
        obs = envs.reset(ended, [("eval", j) for j in episode], obs)
        if args.capture_video and planning and episode[0] == 0:
            film.append(envs.call("picture")[0])
        seen = to_device(obs, mean.device)
        if planning:
            coef = args.planner_value_std_coef_eval  # [V4]
            acting = plan_in_chunks(run.functions.plan, model, model.policy, seen, mean, generator, args, coef)
            action, mean = acting.elite if args.eval_sample_elite else acting.best, shift(acting.mean)
        else:
            action, _ = policy_gaussian(model.policy, model.encoder(seen), args)
        envs.step_async(to_host(action))
        obs, reward, terminated, truncated = envs.step_wait()
        returns[episode[playing]] += reward[playing]
        progress.update(W)
        ended = terminated | truncated
        episode[ended] = episode.max() + 1 + np.arange(ended.sum())
        mean[ended] = 0.0
    progress.close()
    return returns


def evaluate(run, envs, stop, video):
    """Plays with the planner and with the policy alone. Returns both means; None if asked to stop meanwhile."""
    film = []
    planner, policy = play(run, envs, True, stop, film), play(run, envs, False, stop, film)
    if planner is None or policy is None:
        return None
    told = [f"{x.mean():.1f} +- {x.std():.1f} ({x.min():.1f} to {x.max():.1f})" for x in (planner, policy)]
    say(f"step {run.global_step}: evaluation: planner {told[0]}, policy alone {told[1]}")
    try:
        if film:
            import imageio.v2 as imageio

            video.parent.mkdir(exist_ok=True)
            imageio.mimwrite(video, film, fps=30 / run.args.action_repeat, macro_block_size=2)
    except Exception as e:  # no renderer, no imageio, no ffmpeg: a video is not worth a run
        say(f"warning: no video at {video}: {first_line(e)}", sys.stderr)
    return {"eval/episodic_return": planner.mean(), "eval/policy_episodic_return": policy.mean()}


# --- The run: its state, log and directory ----------------------------------------------------------------------------
#
# Crash-only: resume is exact, so every fault is handled by stopping. A run ends early by an exception and begins again
# from its last checkpoint. A checkpoint at step s is the run between two iterations, before the observers of s, log and
# evaluation; a run that is continued at s repeats those, having cut its log back to what was written before s.


class Run:
    """What a run consists of. Its numbers, lists and tensors are where the loop stands between two iterations."""

    def __init__(self, args, task, device):
        E, A = args.num_envs, task.action_dim
        self.args, self.functions = args, compiled(args, device)
        self.model = WorldModel(task, args, make_generator(args.seed, "init", "cpu")).to(device)  # as on any device
        self.optimizers, self.buffer = make_optimizers(self.model, args), ReplayBuffer(args, task, device)
        self.metrics = {}  # by the names that come together: (their sums, how often they came)
        self.obs = torch.zeros(E, task.obs_dim, device=device)  # that wait for an action
        self.mean = torch.zeros(E, args.horizon, A, device=device)  # where the next plans start
        self.episode = torch.zeros(E, dtype=torch.int64)  # that each environment plays,
        self.returns = torch.zeros(E, dtype=torch.float64)  # and its return so far; the buffer counts its decisions
        self.ended = []  # (environment, episode, return, length) of those that the last step ended
        self.global_step, self.pretrained, self.updates = 0, 0, 0

    def generator(self, name):
        """The torch.Generator of a purpose, by the seed and by where the run is: there is no state to keep.

        Asked for twice at one place, it gives the same numbers twice.
        """
        where = f"{name} {self.global_step} {self.pretrained} {self.updates}"
        return make_generator(self.args.seed, where, self.obs.device)

    def measure(self, values):
        """Adds to the metrics: sums on the device, which cross to the host together, once per log interval."""
        names = tuple(values)
        total, count = self.metrics.get(names) or (torch.zeros(len(names), device=self.obs.device), 0)
        torch._foreach_add_(total.unbind(), list(values.values()))
        self.metrics[names] = total, count + 1

    def means(self):
        """The means of the metrics. Raises Failed if one is not finite."""
        means = {}
        for names, (total, count) in self.metrics.items():  # of pretraining, then of learning, which overwrites it
            means |= zip(names, (to_host(total) / count).tolist(), strict=True)
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise Failed(f"{name} is not finite; the last checkpoint is from before that")
        return means

    def state_dict(self):
        """Everything that the future of the run depends on."""
        return {
            "script": SCRIPT,
            "args": dataclasses.asdict(self.args),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "buffer": self.buffer.state_dict(),
            "metrics": self.metrics,
            # what __init__ sets to a number, a list or a tensor: from obs to updates
            "progress": {name: x for name, x in vars(self).items() if isinstance(x, (int, list, Tensor))},
        }

    def load_state_dict(self, state):
        """The inverse of state_dict, for a run that was just made."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.buffer.load_state_dict(state["buffer"])
        self.metrics = {names: (x.to(self.obs.device), n) for names, (x, n) in state["metrics"].items()}
        for name, x in state["progress"].items():
            setattr(self, name, x.to(getattr(self, name).device) if isinstance(x, Tensor) else x)


def save_checkpoint(run, directory):
    """Writes checkpoint.pt. Raises Failed, writing nothing, if a weight is not finite, as after a loss that was not."""
    if not to_host(torch.stack([x.isfinite().all() for x in run.model.state_dict().values()])).all():
        raise Failed("a weight is not finite; the last checkpoint is from before that")
    try:
        write_whole(directory / "checkpoint.pt", lambda file: torch.save(run.state_dict(), file))
    except (OSError, RuntimeError) as e:  # torch's writer turns a full disk into a RuntimeError
        raise Failed(f"the checkpoint cannot be written: {first_line(e)}") from e
    say(f"checkpoint at {run.global_step}")


def read_checkpoint(directory):
    """The state in a run's directory. It cannot run code. Raises Refused if there is none, Failed if unusable."""
    path = directory / "checkpoint.pt"
    if not path.exists():
        raise Refused(f"{directory} holds no checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums of what it reads
            if archive.testzip() is not None:
                raise ValueError("its checksums do not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] != SCRIPT:
            raise ValueError(f"it was written by {state['script']}, and this is {SCRIPT}")
        Args(**state["args"])
        return state
    except Exception as e:  # a damaged file can raise anything
        raise Failed(f"{path} is not usable ({first_line(e)}); remove it to begin anew") from e


def write_whole(path, write):
    """Writes beside, flushes and renames: whoever reads sees the old file or the new one, whole."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path, value):
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


class Log:
    """metrics.csv (global_step,env_steps,tag,value) and TensorBoard, cut back to what was logged before `step`."""

    def __init__(self, directory, args, step):
        self.action_repeat, path = args.action_repeat, directory / "metrics.csv"
        lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) < step]
        write_whole(path, lambda file: file.write("".join(["global_step,env_steps,tag,value\n", *kept]).encode()))
        if args.track:  # Weights & Biases, mirroring TensorBoard
            project = dict(project=args.wandb_project_name, entity=args.wandb_entity, config=dataclasses.asdict(args))
            name = dict(name=directory.name, id=directory.name, dir=str(directory), resume="allow")
            try:
                import wandb

                wandb.init(sync_tensorboard=True, **project, **name)
            except Exception as e:  # not installed, no network, no account: a run is worth more than its mirror
                say(f"warning: going on without Weights & Biases ({first_line(e)})", sys.stderr)
        self.file, self.tensorboard = open(path, "a", buffering=1), SummaryWriter(str(directory), purge_step=step)

    def add(self, step, values):
        for tag, value in values.items():
            self.file.write(f"{step},{step * self.action_repeat},{tag},{float(value)!r}\n")
            self.tensorboard.add_scalar(tag, value, step)

    def flush(self):
        """All on the disk: a checkpoint counts on these lines."""
        os.fsync(self.file.fileno())
        self.tensorboard.flush()


def run_directory(args):
    """runs/<short env>__<exp_name>__<seed>[__<run_name>], or the directory given to --resume."""
    env = re.sub("^dm_control/(.*)-v0$", r"\1", args.env_id.rpartition(":")[2]).replace("/", "_")
    name = f"{env}__{args.exp_name}__{args.seed}" + f"__{args.run_name}" * bool(args.run_name)
    return Path(args.resume or f"runs/{name}")


def open_directory(args):
    """Locks the run's directory. Returns it and the state to go on from, if there is one.

    Raises Refused if the directory is in use, or holds a finished run or one with other arguments.
    """
    directory = run_directory(args)
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)  # a number, which nothing closes behind our back
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends; the workers do not inherit it
    except OSError as e:
        raise Refused(f"{directory} is in use by another process") from e
    state = read_checkpoint(directory) if (directory / "checkpoint.pt").exists() else None
    finished, starts = directory / "finished.json", directory / "versions.json"
    if state:
        old, new = dataclasses.asdict(Args(**state["args"])), dataclasses.asdict(args)
        step = state["progress"]["global_step"]
        fixed = [name for name, found in notes().items() if FREE not in found]
        other = [f"{name} {old[name]} -> {new[name]}" for name in fixed if old[name] != new[name]]
        if other:
            raise Refused(f"{directory} holds a run with other arguments ({'; '.join(other)}); give --run-name NAME")
        if step >= args.total_timesteps + (0 if finished.exists() else args.num_envs):
            hints = f"more --steps continue it, --run-name NAME begins another, --evaluate {directory} evaluates it"
            raise Refused(f"{directory} holds a finished run of {step} decisions; {hints}")
    finished.unlink(missing_ok=True)
    write_json(directory / "args.json", dataclasses.asdict(args))

    # Time, command line, git commit and the versions of Python and of every package of this start
    describe = "git describe --always --exclude='*' --abbrev=40 --dirty=+changes 2>/dev/null"
    where = shlex.quote(str(Path(__file__).parent))
    failed, commit = subprocess.getstatusoutput(f"cd {where} && {describe}")  # where there is no git, or no repository
    versions = {package.name: package.version for package in importlib.metadata.distributions()}
    versions |= {"python": sys.version.split()[0], "git_commit": None if failed else commit}
    start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv} | versions
    write_json(starts, (json.loads(starts.read_text()) if starts.exists() else []) + [start])
    return directory, state


class Bar(tqdm):
    """A progress bar; where there is no terminal a plain line, at most one every half minute."""

    def __init__(self, desc, total=None, initial=0):
        self.terminal = sys.stderr.isatty()
        options = {} if self.terminal else {"file": open(os.devnull, "w"), "mininterval": 30, "miniters": 1}
        super().__init__(desc=desc, total=total, initial=initial, leave=False, dynamic_ncols=True, **options)

    def display(self, msg=None, pos=None):
        super().display(msg, pos)
        if not self.terminal and msg is None:
            print(self, file=sys.stderr, flush=True)


say = tqdm.write  # a line for the user, above the progress bars


# --- The loop ---------------------------------------------------------------------------------------------------------


def due(every, step, stride):
    """Whether the last iteration of `stride` decisions, ending at `step`, reached or passed a multiple of `every`."""
    return every > 0 and step > 0 and step // every > (step - stride) // every


def updates_due(args, step):
    """Updates after pretraining that should have been made by `step`: floor(d utd_ratio), d decisions after warm-up."""
    warm_up = -(-args.learning_starts // args.num_envs) * args.num_envs  # the first step at or past learning_starts
    return math.floor(max(0, step - warm_up) * Fraction(str(args.utd_ratio)))


def enter_episodes(run, envs):
    """The first observations; in a run that is continued, the way back to where its unfinished episodes were.

    Their seeds and their actions in the buffer must lead to the observations they were left at, bit for bit.
    """
    buffer, left = run.buffer, to_host(run.obs)
    age = np.where(buffer.age > buffer.capacity, 0, buffer.age)  # of an episode of which the ring holds all
    episodes = list(enumerate(run.episode.tolist()))  # by their names
    obs = envs.reset(age >= 0, episodes)
    for ago in range(age.max(), 0, -1):  # the last actions again; who joins later stands still until then
        actions = to_host(buffer.columns(buffer.rows[(buffer.step - ago) % buffer.capacity]).action)
        envs.step_async(actions * (age >= ago)[:, None])
        obs, _, terminated, truncated = envs.step_wait()
        obs = envs.reset((age == ago - 1) | terminated | truncated, episodes, obs)
    strayed = (obs.view(np.int32) != left.view(np.int32)).any(1) & (run.global_step > 0)
    if strayed.any():
        who = np.flatnonzero(strayed).tolist()
        say(f"warning: environments {who} do not repeat their episodes; they begin new ones", sys.stderr)
        run.episode += torch.from_numpy(strayed)
        obs = envs.reset(strayed, enumerate(run.episode.tolist()), obs)
        for counted in (run.returns, run.mean, buffer.age):
            counted[strayed] = 0
    run.obs = to_device(obs, run.obs.device)


def learn(run, pretraining):
    """One update, with its reanalyze if that is due."""
    args = run.args
    draws = draw_update(args, run.mean.shape[2], run.generator)
    which = np.random.default_rng([args.seed, run.pretrained, run.updates])  # of this update, on the host
    batch = run.buffer.sample(which.random(args.batch_size))
    run.pretrained += pretraining
    run.updates += not pretraining
    if not pretraining and args.reanalyze_interval and run.updates % args.reanalyze_interval == 0:
        with record_function("reanalyze"):
            reanalyze(run.functions.plan, run.model, run.buffer, batch, args, run.generator)
    with record_function("update"):
        run.measure(update(run.functions, run.model, run.optimizers, batch, draws, args, pretraining))


def store(run, envs, action, expert, mean):
    """Waits for the simulators, stores the step, and begins the next episodes of those that ended."""
    with record_function("environment"):
        next_obs, reward, terminated, truncated = envs.step_wait()
    if terminated.any() and not run.args.episodic:
        raise Refused(f"{run.args.env_id} ended an episode by termination; add --episodic")
    run.global_step += envs.num_envs
    run.returns += torch.from_numpy(reward)
    ended = terminated | truncated
    who, lengths = np.flatnonzero(ended).tolist(), run.buffer.age + 1
    run.ended = [(i, int(run.episode[i]), float(run.returns[i]), int(lengths[i])) for i in who]
    run.episode += torch.from_numpy(ended)
    run.returns[ended] = 0.0
    obs = envs.reset(ended, enumerate(run.episode.tolist()), next_obs)
    parts = [x.ravel() for x in (obs, next_obs, reward, terminated, ~ended)]
    whole = to_device(np.concatenate(parts, dtype=np.float32), run.obs.device)  # the one copy of a vector step
    obs, next_obs, reward, terminated, goes_on = whole.split([x.size for x in parts])
    run.buffer.add(run.obs, action, expert, reward, terminated, next_obs.view_as(run.obs), ended)
    run.obs, run.mean = obs.view_as(run.obs), shift(mean) * goes_on[:, None, None]


def tell_hours(run, update):
    """Says what a run takes in which an update takes so many seconds; a plan is tried. Nothing of the run changes."""
    args = run.args
    for _ in range(2):  # the first one compiles
        clock = time.perf_counter()
        act(run.functions.plan, run.model, run.obs, run.mean, args, run.generator)
    planning = (time.perf_counter() - clock) / args.num_envs  # of one state
    renewed = args.horizon * args.reanalyze_batch_size / args.reanalyze_interval if args.reanalyze_interval else 0
    learning = updates_due(args, args.total_timesteps) * (update + renewed * planning)
    seconds = learning + (args.total_timesteps - run.global_step) * planning
    say(f"this run takes about {tqdm.format_interval(seconds)} on this CPU, besides its evaluations")
    if args.preset == "full":
        say("for a machine without a GPU: --preset small --task cartpole-swingup")


def pretrain(run, stop):
    """Updates of the world model alone, as many as decisions of warm-up."""
    updates = run.args.learning_starts
    with Bar("pretraining", updates, run.pretrained) as progress:
        while run.pretrained < updates and not stop:
            clock = time.perf_counter()
            learn(run, pretraining=True)
            progress.update()
            if progress.n - progress.initial == 50 and run.obs.device.type == "cpu":  # the first updates compile
                tell_hours(run, time.perf_counter() - clock)


def train(run, envs, eval_envs, log, stop, directory):
    """BMPC's Algorithm 1. Returns the exit code: 0 when done, 75 when asked to stop.

    `stop` is a list that a signal fills, at any moment; empty, the run goes on.
    """
    args, E = run.args, run.args.num_envs
    progress = Bar("decisions", args.total_timesteps, run.global_step)
    since, clock, told = run.global_step, time.perf_counter(), {}
    while True:
        # Pretraining when warm-up ends; a checkpoint; the end of a run that is asked to stop
        if run.global_step >= args.learning_starts and run.pretrained < args.learning_starts and not stop:
            pretrain(run, stop)
            since, clock = run.global_step, time.perf_counter()
        done, stopping = run.global_step >= args.total_timesteps, bool(stop)  # a signal may come at any moment
        if stopping or done or run.global_step == 0 or due(args.checkpoint_freq, run.global_step, E):
            log.flush()
            save_checkpoint(run, directory)
        if stopping:
            return TRY_AGAIN

        # Observers: they change nothing; a stop abandons an evaluation, so it comes before the losses are told
        for env, episode, total, length in run.ended:
            log.add(run.global_step, {"charts/episodic_return": total, "charts/episodic_length": length})
            say(f"step {run.global_step}: environment {env}, episode {episode}: return {total:.1f}, {length} decisions")
            told["return"] = f"{total:.1f}"
        if eval_envs and (due(args.eval_freq, run.global_step, E) or done):
            before = time.perf_counter()
            returns = evaluate(run, eval_envs, stop, directory / "videos" / f"{run.global_step}.mp4")
            if returns is None:
                continue
            log.add(run.global_step, returns)
            told["evaluation"] = f"{returns['eval/episodic_return']:.1f}"
            clock += time.perf_counter() - before
        if due(args.log_freq, run.global_step, E) or (done and args.log_freq):
            speed = (run.global_step - since) / (time.perf_counter() - clock)
            log.add(run.global_step, run.means() | ({"charts/SPS": speed} if speed else {}))
            run.metrics.clear()
            since, clock = run.global_step, time.perf_counter()
        if done:
            log.flush()
            write_json(directory / "finished.json", {"total_timesteps": args.total_timesteps})
            return 0

        # Act: random actions in warm-up, then the planner
        with record_function("act"):
            if run.global_step < args.learning_starts:
                acted = *act_randomly(args, run.mean.shape[2], run.generator("act")), run.mean
            else:
                acted, metrics = act(run.functions.plan, run.model, run.obs, run.mean, args, run.generator)
                run.measure(metrics)
            envs.step_async(to_host(acted[0]))  # the one copy to the host of a vector step

        # Learn on the steps stored so far, while the simulators run; then store this one
        while run.updates < updates_due(args, run.global_step + E):
            learn(run, pretraining=False)
        store(run, envs, *acted)
        progress.set_postfix(told, refresh=False)
        progress.update(E)


# --- From the command line to a run -----------------------------------------------------------------------------------


def notes():
    """By field of Args, what stands in its type: its Range, that it is Free."""
    found = {}
    for name, hint in get_type_hints(Args, include_extras=True).items():
        parts = [hint, *get_args(hint)]  # in `Count | None` the Range is inside
        found[name] = [note for part in parts for note in getattr(part, "__metadata__", ())]
    return found


def parse_args(argv=None):
    """The command line as Args; a preset's or, with --resume or --evaluate RUN_DIR, that run's are the defaults."""
    args = tyro.cli(Args, args=argv)  # says whose defaults; what is given beside them is read on them below
    defaults, directory = PRESETS[args.preset], args.evaluate or args.resume
    if directory:
        defaults = read_checkpoint(Path(directory))["args"] | {"resume": "", "evaluate": ""}
    return tyro.cli(Args, args=argv, default=Args(**defaults))


def fill_in(args):
    """The arguments, checked, with every None that follows from others filled in, and what the task is."""
    for name, found in notes().items():
        value = getattr(args, name)
        for wanted in found:
            if value is not None and isinstance(wanted, Range) and not wanted.holds(value):
                raise Refused(f"--{name.replace('_', '-')} is {value!r}; it must be {wanted.text}")
    env_id = resolve_env_id(args.env_id)
    repeat = args.action_repeat or (2 if env_id.startswith("dm_control/") else 1)
    args = dataclasses.replace(args, env_id=env_id, action_repeat=repeat)
    task, discount = inspect_task(args), args.discount
    if discount is None:
        if task.episode_length is None:
            raise Refused(f"{args.env_id} has no step limit to take the discount from; give --discount")
        n = task.episode_length / args.discount_denom
        discount = min(max((n - 1) / n, args.discount_min), args.discount_max)
    follows = dict(zip(SIZES, MODEL_SIZES[args.model_size], strict=True)) | {
        "discount": discount,
        "reanalyze_horizon": args.horizon,
        "reanalyze_log_std_min": args.log_std_min,
        "reanalyze_log_std_max": args.log_std_max,
    }
    args = dataclasses.replace(args, **{k: v for k, v in follows.items() if getattr(args, k) is None})

    # What does not fit each other or the task
    T, n = args.horizon, task.episode_length
    low, high = args.reanalyze_log_std_min, args.reanalyze_log_std_max
    for fits, message in (
        (args.vmin < args.vmax and args.num_bins > 1, f"{args.num_bins} bins on [{args.vmin}, {args.vmax}]"),
        (args.log_std_min <= args.log_std_max, f"--log-std-min is {args.log_std_min}, above --log-std-max"),
        (low <= high, f"--reanalyze-log-std-min is {low}, above --reanalyze-log-std-max {high}"),
        (args.min_std <= args.max_std, f"--min-std is {args.min_std}, above --max-std {args.max_std}"),
        (args.discount_min <= args.discount_max, f"--discount-min is {args.discount_min}, above --discount-max"),
        (args.num_elites <= args.num_samples, f"{args.num_elites} elites of {args.num_samples} samples"),
        (args.num_pi_trajs < args.num_samples, f"{args.num_pi_trajs} policy proposals of {args.num_samples} samples"),
        (args.latent_dim % args.simnorm_dim == 0, f"latent_dim {args.latent_dim} is no multiple of {args.simnorm_dim}"),
        (args.reanalyze_batch_size <= args.batch_size, f"reanalyze takes more windows than {args.batch_size}"),
        (args.learning_starts >= args.num_envs * T, f"learning_starts {args.learning_starts} holds no window"),
        (args.buffer_size // args.num_envs > T + 1, f"buffer_size {args.buffer_size} holds no window per environment"),
        (n is None or n >= T, f"an episode of {args.env_id} has {n} decisions, less than the horizon of {T}"),
        (
            args.reanalyze_value_std_coef == 0 or not args.dual_policy_enabled,  # [V9]
            "--reanalyze-value-std-coef is for one policy; with two, give --policy-value-std-coef",
        ),
        (
            args.policy_value_std_coef == 0 or args.dual_policy_enabled,  # [V9]
            "--policy-value-std-coef does nothing without --dual-policy-enabled",
        ),
    ):
        if not fits:
            raise Refused(message)
    return args, task


def choose_device(args):
    """The torch device, with precision and determinism set. Raises Refused if it is not there."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=best if args.device == "auto" else args.device).device  # with its number
    except (RuntimeError, AssertionError) as e:
        raise Refused(f"--device {args.device}: {first_line(e)}") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision(args.matmul_precision)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    elif hasattr(ctypes.CDLL(None), "mallopt"):  # glibc keeps what tensors free: else its pages are zeroed anew
        ctypes.CDLL(None).mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # whatever is made is written before it is read
    return device


def begin_evaluation(args, task, device, envs, stop):
    """Evaluates a run's checkpoint, of which it takes the model alone. Returns the exit code."""
    directory = Path(args.evaluate)
    state = read_checkpoint(directory)
    run = Run(dataclasses.replace(args, buffer_size=1), task, device)
    run.global_step = state["progress"]["global_step"]
    say(f"evaluating {directory} at step {run.global_step}, on {device}")
    try:
        run.model.load_state_dict(state["model"])
    except RuntimeError as e:
        raise Refused(f"the model of {directory} does not fit these arguments") from e
    returns = evaluate(run, envs, stop, directory / "videos" / f"evaluate-{run.global_step}.mp4")
    return 0 if returns else TRY_AGAIN


def begin(args):
    """Trains a run from its beginning or its checkpoint, or evaluates one. Returns the exit code."""
    (args, task), eval_envs, stop = fill_in(args), None, []  # `stop`: the signals that came

    def ask(number, frame):  # also in the workers, where nothing listens: this process alone decides when to stop
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, ask)
    say(f"{args.env_id}, observation {task.obs_dim}, action {task.action_dim}: starting the simulators ...")
    envs = None if args.evaluate else Envs(args, args.num_envs)  # before torch starts its threads, and CUDA
    if args.evaluate or args.eval_freq:
        eval_envs = Envs(args, min(args.eval_episodes, args.num_envs), args.capture_video)
    device = choose_device(args)
    if device.type == "cpu" and torch.get_num_threads() > 1 and os.getloadavg()[0] > 0.5 * os.cpu_count():
        say("this machine is busy: beside others a run is fastest with one thread; set OMP_NUM_THREADS=1")
    if args.evaluate:
        return begin_evaluation(args, task, device, eval_envs, stop)
    directory, state = open_directory(args)
    say(f"{directory}, on {device}")
    run = Run(args, task, device)
    if state:
        run.load_state_dict(state)
        say(f"continuing at step {run.global_step}")
    state = None  # a copy of the buffer
    enter_episodes(run, envs)
    log = Log(directory, args, run.global_step)
    try:
        trace = lambda profiler: profiler.export_chrome_trace(str(directory / "trace.json"))
        with torch.profiler.profile(on_trace_ready=trace) if args.profile else contextlib.nullcontext():
            return train(run, envs, eval_envs, log, stop, directory)
    except Exception as e:
        try:
            run.means()
        except Failed as found:  # a loss was not finite: what failed did so because of it
            raise Failed(f"step {run.global_step}: {found}") from e
        if isinstance(e, (Refused, Failed, OSError)):
            raise type(e)(f"step {run.global_step}: {e}") from e
        if not stop:
            raise
        say(f"warning: {first_line(e)}", sys.stderr)  # the signal reached a compiler too, say
        return TRY_AGAIN  # from the last checkpoint


def main(argv=None):
    """Runs the command line. Returns the exit code, having told in one line what went wrong."""
    warnings.simplefilter("ignore")  # simulators and torch's compiler warn of what no user can change
    try:
        args = parse_args(argv)
        if args.capture_video and not {"MUJOCO_GL", "DISPLAY"} & set(os.environ):  # before MuJoCo is imported
            found = [name for name in ("EGL", "OSMesa") if ctypes.util.find_library(name)]
            os.environ["MUJOCO_GL"] = found[0].lower() if found else "disable"
        return begin(args)
    except (Refused, Failed, OSError, MemoryError, torch.OutOfMemoryError) as e:
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)):
            e = "the memory is full; try a smaller --buffer-size, then --num-samples or --reanalyze-batch-size"
        print(f"{Path(__file__).name}: error: {e}", file=sys.stderr)
        return 2 if isinstance(e, Refused) else 1
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file is read while the run goes on
    sys.exit(main())
