"""BMPC: Bootstrapped Model Predictive Control (Wang et al., ICLR 2025, https://arxiv.org/abs/2503.18871).

BMPC extends TD-MPC2 (Hansen et al., ICLR 2024, https://arxiv.org/abs/2310.16828). A world model predicts rewards and
latent states. A planner (MPPI) optimizes action sequences in latent space and selects every training action after a
warm-up with random actions. A policy and a value function guide the planner: the value function predicts the return of
the policy, and the policy imitates the planner. The target of the policy, called the expert, is a Gaussian over
actions, stored in the replay buffer with each transition. By default, the mean of a transition's first expert is the
executed action, and its std is that of the plan. The reanalyze step plans again for some stored states and replaces
their experts; the mean of a new one is the first action of the elite that the planner sampled.

    python bmpc.py                                            # dog-run, 200 000 decisions, on a GPU if there is one
    python bmpc.py --task cheetah-run --seed 2 --utd-ratio 4  # another task, another seed, an ablation flag
    python bmpc.py --preset small --task cartpole-swingup     # small networks and a small task, for a CPU
    python bmpc.py --evaluate runs/dog-run__bmpc__1           # evaluate a trained agent; --capture-video records it

The same command resumes a run that was stopped. A run writes only to runs/<task>__<exp_name>__<seed>[__<run_name>]/,
apart from the cache of torch's compiler.

Dimensions in docstrings and shape comments; "..." stands for any leading dimensions:

    B  windows in a batch             O  observation
    T  horizon                        A  action
    E  parallel environments          L  latent state
    S  states planned for at once     K  bins of a two-hot distribution
    N  candidate action sequences     Q  value heads
    P  of them from the policy        H  dynamics heads (always 1 here)
    R  imagined rollouts per state    C  capacity of the replay buffer, in vector steps

A decision is one action in one environment, the unit of --steps and global_step; a vector step is one decision in each
of the E environments. In the flags' help texts, "official" is the authors' code and "JAX" is a port of it;
results/README.md lists the differences from both. The sweeps that the help names are the ablations in
sweep_list/7_bmpc_equivalence/.
"""

import contextlib
import copy
import ctypes.util
import dataclasses
import errno
import fcntl
import functools
import importlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TextIO, TypeVar, get_args, get_type_hints

if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin while they wait slow down a busy CPU drastically
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # must be set before torch is imported

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

MODEL_SIZE_FIELDS = ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q")
MODEL_SIZES = {  # TD-MPC2's model sizes, named after their number of parameters in millions
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


# --- Arguments --------------------------------------------------------------------------------------------------------


class Constraint(NamedTuple):
    """A condition on the value of an argument, attached to the type of its field."""

    description: str
    is_satisfied: Callable[[Any], Any]


Value = TypeVar("Value")
RESUMABLE = "may change when a run is resumed"  # marks these arguments; all others must keep their values
Resumable = Annotated[Value, RESUMABLE]
PositiveInt = Annotated[int, Constraint("at least 1", lambda x: x >= 1)]
NonNegativeInt = Annotated[int, Constraint("at least 0", lambda x: x >= 0)]
NonNegativeFloat = Annotated[float, Constraint("at least 0", lambda x: 0 <= x < math.inf)]
PositiveFloat = Annotated[float, Constraint("above 0", lambda x: 0 < x < math.inf)]
FiniteFloat = Annotated[float, Constraint("finite", math.isfinite)]
UnitFloat = Annotated[float, Constraint("in (0, 1]", lambda x: 0 < x <= 1)]
NamePart = Annotated[str, Constraint("without a slash", lambda x: "/" not in x)]
DeviceName = Annotated[str, Constraint("auto, cpu, cuda or cuda:N", re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch)]


@dataclasses.dataclass(frozen=True)
class Args:
    """BMPC, whose policy imitates the planner. Below, "official" is the authors' code, and "JAX" is a port of it."""

    # --- experiment
    exp_name: NamePart = Path(__file__).stem
    """name of the experiment; part of the name of the run directory"""
    run_name: NamePart = ""
    """suffix of the name of the run directory, to keep runs with different flags apart"""
    seed: Annotated[int, Constraint("in [0, 2^32)", lambda x: 0 <= x < 2**32)] = 1
    """seed of the experiment; every random number of a run is derived from it"""
    device: Resumable[DeviceName] = "auto"
    """auto (CUDA if available), cpu, cuda or cuda:N"""
    torch_deterministic: Resumable[bool] = True
    """use deterministic torch kernels, so that runs can be reproduced on the same machine"""
    track: Resumable[bool] = False
    """also log to Weights & Biases (requires `pip install wandb`)"""
    wandb_project_name: Resumable[str] = "bmpc"
    """the Weights & Biases project"""
    wandb_entity: Resumable[str | None] = None
    """the Weights & Biases entity (team or user)"""
    capture_video: Resumable[bool] = False
    """record episode 0 of every evaluation as an mp4 file (without a display, this requires EGL or OSMesa). Meanwhile
    its frames take some 500 MB of memory"""
    profile: Resumable[bool] = False
    """write a profile to trace-STEP.json (STEP: where it starts), for Perfetto; meant for a few hundred decisions, with
    a small --learning-starts"""
    eval_freq: Resumable[NonNegativeInt] = 10_000
    """decisions (agent steps) between two evaluations; 0: never evaluate"""
    eval_episodes: Resumable[PositiveInt] = 10
    """episodes per evaluation with the planner, and as many with the policy alone"""
    log_freq: Resumable[NonNegativeInt] = 1_000
    """decisions between two log entries of losses and speed, in addition to one after pretraining; 0: never log them"""
    checkpoint_freq: Resumable[NonNegativeInt] = 10_000
    """decisions between two checkpoints; 0: only when the run starts, ends or is stopped"""
    keep_replay: Resumable[bool] = True
    """keep the replay buffer in the checkpoint of a finished run (some 450 MB for dog-run); off: delete it when the run
    finishes; the run can then be evaluated but not continued"""
    resume: Resumable[str] = ""
    """RUN_DIR: resume the run in this directory, with its arguments as defaults"""
    evaluate: Resumable[str] = ""
    """RUN_DIR: evaluate the agent of this run, print mean and range of its returns, and exit"""
    preset: Literal["full", "small"] = "full"
    """small: smaller networks and a shorter run, which learns an easy task on a CPU in 10 to 60 minutes. It sets the
    widths of all layers and the number of value heads, whatever --model-size is (--help shows the defaults of full)"""

    # --- environment
    env_id: Annotated[str, tyro.conf.arg(aliases=["--task"])] = "dog-run"
    """a dm_control task (dog-run, cup-catch, dm_control/dog-run-v0), or the id of a Gymnasium environment with bounded
    float actions"""
    env_kwargs: str = "{}"
    """additional keyword arguments for gymnasium.make, as JSON: '{"env_name": "reach-v3"}'"""
    num_envs: PositiveInt = 4
    """parallel environments, each in its own process (official: 1; JAX: 4)"""
    action_repeat: PositiveInt | None = None
    """simulator steps per decision; their rewards are summed. None: 2 for dm_control, 1 otherwise"""
    episodic: bool | None = None
    """learn to predict terminations; required if episodes can end other than by a time limit. None: off for dm_control,
    on otherwise. --episodic and --no-episodic set it"""
    discount: UnitFloat | None = None
    """discount per decision; None: 1 - denom/n, clipped to [min, max], for episodes of n decisions (TD-MPC2)"""
    discount_denom: PositiveFloat = 5.0
    """denom in the formula of the discount; like min and max, it has no effect with --discount"""
    discount_min: UnitFloat = 0.95
    """min in the formula of the discount"""
    discount_max: UnitFloat = 0.995
    """max in the formula of the discount"""

    # --- learning
    total_timesteps: Resumable[Annotated[PositiveInt, tyro.conf.arg(aliases=["--steps"])]] = 200_000
    """decisions of the whole run, summed over environments (env_steps = decisions x action_repeat). A run that is
    extended becomes what it would be with this length from the start; an evaluation at its old end is kept if
    --eval-freq asks for it"""
    learning_starts: PositiveInt = 2_500
    """decisions of the warm-up, with random actions (JAX: 10 000). The same number of pretraining updates of
    world model and value heads follows"""
    utd_ratio: PositiveFloat = 1.0
    """updates per decision; 0.5 is one update every two decisions. Sweep 2a: do more updates per decision speed up
    learning?"""
    batch_size: PositiveInt = 256
    """windows (sequences of --horizon transitions) in a batch"""
    buffer_size: PositiveInt = 1_000_000
    """maximum number of transitions in the replay buffer; it never allocates more than the run needs"""
    lr: PositiveFloat = 3e-4
    """learning rate of the world model, the value heads and the policy"""
    enc_lr_scale: PositiveFloat = 1.0
    """factor on the learning rate of the encoder (official, TD-MPC2: 0.3)"""
    grad_clip_norm: PositiveFloat = 20.0
    """maximum norm of the gradient: of world model and value heads together, and of the policy"""
    tau: UnitFloat = 0.01
    """step size of the target value heads, which are an exponential moving average (EMA) of the value heads"""
    rho: PositiveFloat = 0.5
    """the weight of step t of a rollout is proportional to rho^t in every loss"""
    normalize_rho_weights: bool = True
    """scale the weights rho^t to a sum of 1; off: divide them by the number of steps (official)"""
    td_horizon: PositiveInt = 1
    """imagined steps before the value target bootstraps"""
    consistency_coef: NonNegativeFloat = 10.0
    """weight of the latent consistency loss (official: 20, with --no-normalize-rho-weights)"""
    reward_coef: NonNegativeFloat = 0.1
    """weight of the reward loss"""
    value_coef: NonNegativeFloat = 0.1
    """weight of the value loss"""
    termination_coef: NonNegativeFloat = 1.0
    """weight of the termination loss (with --episodic)"""
    entropy_coef: NonNegativeFloat = 0.0
    """weight of the entropy bonus of the policy (official: 1e-4)"""
    kl_reduction: Literal["mean", "sum"] = "mean"
    """reduction of the KL divergence over the dimensions of the action (JAX: sum)"""

    # --- model
    model_size: Literal[1, 5, 19, 48, 317] = 5
    """millions of parameters (TD-MPC2's sizes); sets each of the following sizes that is None"""
    enc_dim: PositiveInt | None = None
    """width of the hidden layers of the encoder"""
    mlp_dim: PositiveInt | None = None
    """width of all other hidden layers"""
    latent_dim: PositiveInt | None = None
    """size of the latent state"""
    num_enc_layers: PositiveInt | None = None
    """layers of the encoder, including the last"""
    simnorm_dim: PositiveInt = 8
    """size of a SimNorm group (TD-MPC2)"""
    num_q: PositiveInt | None = None
    """number of value heads (official, JAX: 2)"""
    num_bins: PositiveInt = 101
    """bins of the two-hot distributions of rewards and values"""
    vmin: FiniteFloat = -10.0
    """position of the first bin, in symlog units"""
    vmax: FiniteFloat = 10.0
    """position of the last bin, in symlog units"""
    dropout: Annotated[float, Constraint("in [0, 1)", lambda x: 0 <= x < 1)] = 0.01
    """dropout in the first layer of the value heads, only in the value loss"""
    log_std_min: FiniteFloat = -5.0
    """minimum log std of the policy (official: -3)"""
    log_std_max: FiniteFloat = 1.0
    """maximum log std of the policy"""

    # --- planning
    horizon: PositiveInt = 3
    """T: steps of a plan, and of the windows that the model is trained on"""
    iterations: PositiveInt = 6
    """iterations of MPPI"""
    extra_iterations: NonNegativeInt = 2
    """additional iterations if the action has 20 dimensions or more"""
    num_samples: PositiveInt = 512
    """N: candidate action sequences per iteration, including those of the policy"""
    num_elites: PositiveInt = 64
    """best candidates, from which the next mean and std are computed"""
    num_pi_trajs: NonNegativeInt = 24
    """P: candidate sequences sampled from the policy"""
    min_std: PositiveFloat = 0.1
    """minimum std of a plan (official: 0.05; JAX: in effect 0.001)"""
    max_std: PositiveFloat = 2.0
    """initial and maximum std of a plan"""
    temperature: PositiveFloat = 0.5
    """inverse temperature: the weights of the elites are softmax(temperature x score)"""
    eval_sample_elite: bool = False
    """in evaluation, execute a sampled elite (official) instead of the best one"""

    # --- expert
    reanalyze_interval: NonNegativeInt = 10
    """reanalyze once in this many updates after pretraining; 0: never; transitions of the warm-up then keep their
    placeholder expert, N(0, 1)"""
    reanalyze_batch_size: PositiveInt = 20
    """windows per call of reanalyze; it plans again for all T states of each"""
    reanalyze_horizon: PositiveInt | None = None
    """horizon of the plans of reanalyze; None: horizon"""
    reanalyze_log_std_min: FiniteFloat | None = None
    """minimum log std of the policy's candidates in reanalyze; None: log_std_min (official: -2)"""
    reanalyze_log_std_max: FiniteFloat | None = None
    """maximum log std of the policy's candidates in reanalyze; None: log_std_max (official: 1)"""
    expert_std_scale: PositiveFloat = 1.5
    """factor on the std of the expert in the policy loss (official: 1)"""
    expert_std_min: NonNegativeFloat = 0.1
    """minimum std of the expert in the policy loss, after scaling (official: 0). At the defaults it has no effect: the
    std is at least min_std x expert_std_scale = 0.15"""

    # --- speed
    compile: Resumable[bool] = True
    """compile planning and losses with torch.compile; without a working compiler, warn and use eager mode"""
    cudagraphs: Resumable[bool] = True
    """run the compiled functions as CUDA graphs (CUDA only, with --compile)"""
    matmul_precision: Resumable[Literal["highest", "high", "medium"]] = "high"
    """precision of float32 matrix products on CUDA; high is TF32"""

    # --- ablations
    reanalyze_use_chosen_action: bool = True
    """mean of every expert, when acting as well as in reanalyze. On: the chosen action, which is the first action of
    the elite that the planner sampled (when acting, with noise: see chosen_action_noise); off: the mean of the plan
    (JAX). Sweep 2c: which target should the policy imitate?"""
    chosen_action_noise: bool = True
    """on: in the initial expert, which is stored when acting, the chosen action includes the exploration noise, so it
    is the executed action; off: it does not (official). Experts of reanalyze never include noise; actions executed
    in training always do. Ignored with --no-initial-expert-from-behavior or --no-reanalyze-use-chosen-action. Part of
    sweep 2c"""
    initial_expert_from_behavior: bool = True
    """on: the initial expert comes from the plan whose action is executed; off: from a separate plan for the same
    observation, whose mean starts from zeros instead of the previous plan. Sweep 2c: which is the better initial
    target?"""
    num_rollouts: PositiveInt = 1
    """R: imagined rollouts per value target; the value loss is the mean of their losses. Sweep 2d: does this reduce its
    variance?"""
    imagine_initial_source: Literal["replay_rollout", "replay_true"] = "replay_rollout"
    """where the value heads are trained. replay_rollout: at the latent states that the model predicts along a window;
    replay_true: at encoded observations. Despite its name, it does not by itself set where imagination starts (see
    td_target_initial_source). Sweep 2e: which is better?"""
    td_target_initial_source: Literal["replay_true", "same"] = "replay_true"
    """where the imagined rollouts of the value targets start. replay_true: at encoded observations (BMPC); same: at the
    states that imagine_initial_source selects. Part of sweep 2e"""
    encoder_consistency_coef: NonNegativeFloat = 0.0
    """weight of a second consistency loss, which moves the encoded observations toward the predicted states; in the
    first, they are fixed targets. Sweep 2f: does it improve the encoder?"""
    td_target_use_ema_policy: bool = False
    """value targets use an exponential moving average (EMA) of the policy. Sweep 2g: do slower targets help?"""
    policy_ema_tau: UnitFloat = 0.01
    """step size of the EMA policy, per policy update. Without an EMA policy it has no effect. Sweep 2g: how fast should
    it follow the policy?"""
    policy_trust_region_coef: NonNegativeFloat = 0.0
    """weight of KL(EMA policy || policy) in the policy loss, relative to the KL to the expert. Sweep 2g: does a trust
    region stabilize learning?"""


# The next two functions are the parts of resolve_args and check_args (in the plumbing) that depend on the algorithm


def resolve_algorithm_args(args: Args) -> Args:
    """Replace each None by the value that other arguments determine."""
    defaults = dict(zip(MODEL_SIZE_FIELDS, MODEL_SIZES[args.model_size], strict=True)) | {
        "reanalyze_horizon": args.horizon,
        "reanalyze_log_std_min": args.log_std_min,
        "reanalyze_log_std_max": args.log_std_max,
    }
    return dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})


def check_algorithm_args(args: Args) -> Iterable[tuple[bool, str]]:
    """Yield a pair (is it satisfied, message if not) for each condition on several resolved arguments."""
    low, high = args.reanalyze_log_std_min, args.reanalyze_log_std_max
    yield low <= high, f"--reanalyze-log-std-min is {low}, above --reanalyze-log-std-max {high}"
    yield (
        args.reanalyze_interval == 0 or args.reanalyze_batch_size <= args.batch_size,
        f"--reanalyze-batch-size is {args.reanalyze_batch_size}, above --batch-size {args.batch_size}",
    )


# --- Math -------------------------------------------------------------------------------------------------------------


def symlog(x: Tensor) -> Tensor:
    """Compute sign(x) log(1 + |x|) (DreamerV3)."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """Invert symlog."""
    return torch.sign(x) * torch.expm1(x.abs())


def two_hot(x: Tensor, args: Args) -> Tensor:
    """Encode scalars (...) as distributions (..., K) over bins.

    symlog(x) is clipped to the range of the bins; a probability of 1 is split linearly between the two nearest bins.
    """
    bins_per_unit = (args.num_bins - 1) / (args.vmax - args.vmin)
    index = (symlog(x).clamp(args.vmin, args.vmax) - args.vmin) * bins_per_unit  # of a bin, with a fractional part
    bin_indices = torch.arange(args.num_bins, device=x.device, dtype=x.dtype)
    return (1 - (index.unsqueeze(-1) - bin_indices).abs()).clamp(min=0)  # (..., K)


def two_hot_inv(logits: Tensor, args: Args) -> Tensor:
    """Decode logits (..., K) to scalars (...): symexp of the expected bin position."""
    positions = torch.linspace(args.vmin, args.vmax, args.num_bins, device=logits.device, dtype=logits.dtype)
    return symexp((logits.softmax(-1) * positions).sum(-1))


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy between target distributions (..., K) and logits (..., K): (...)."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """Compute KL(p || q) of diagonal Gaussians for each dimension: (..., A)."""
    return torch.log(std_q / std_p) + (std_p.square() + (mean_p - mean_q).square()) / (2 * std_q.square()) - 0.5


def rho_weights(like: Tensor, args: Args) -> Tensor:
    """Compute loss weights (n,) for the n steps of `like` (n, ...): rho^t / sum rho^t, or rho^t / n (official)."""
    weights = args.rho ** torch.arange(len(like), device=like.device, dtype=like.dtype)
    return weights / (weights.sum() if args.normalize_rho_weights else len(like))


def mish(x: Tensor) -> Tensor:
    """Compute x tanh(softplus(x)).

    With e = exp(x), tanh(log(1 + e)) = n / (n + 2), where n = e (e + 2). When compiled, this form is one pass over
    memory and takes half the time of F.mish on a CPU. In eager mode, F.mish is faster. They agree up to rounding.
    """
    if not torch.compiler.is_compiling():
        return F.mish(x)
    e = torch.exp(x.clamp(max=20.0))
    n = e * (e + 2)
    return x * n / (n + 2)


def simnorm(x: Tensor, group_size: int) -> Tensor:
    """Apply a softmax to each group of neighboring elements (TD-MPC2): (..., L) -> (..., L)."""
    return x.unflatten(-1, (-1, group_size)).softmax(-1).flatten(-2)


# --- Networks ---------------------------------------------------------------------------------------------------------
#
# Every network is an ensemble of num_heads independent networks of the same shape; most have a single one. An input has
# the shape (heads, ..., in), or (1, ..., in) if all heads share it. With one head it may have any leading dimensions.


def stacked_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (heads or 1, ..., in) by weight (heads, in, out) in one product: (heads, ..., out)."""
    if len(weight) == 1:
        return x @ weight[0]
    rows = x.flatten(1, -2).expand(len(weight), -1, -1)  # (heads, rows, in)
    return torch.bmm(rows, weight).unflatten(1, x.shape[1:-1])


class Linear(nn.Module):
    """An ensemble of linear layers. Weights are initialized from a truncated normal with std 0.02, biases with 0."""

    def __init__(self, num_heads: int, in_dim: int, out_dim: int, generator: torch.Generator):
        super().__init__()
        weight = torch.empty(num_heads, in_dim, out_dim)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, std=0.02, generator=generator))
        self.bias = nn.Parameter(torch.zeros(num_heads, out_dim))

    def forward(self, x: Tensor, a: Tensor | None = None, heads: slice | Tensor = slice(None)) -> Tensor:
        """Apply the layer to x, or to the concatenation [x, a].

        The leading dimensions of x and a need only be broadcastable. If they differ, the two parts of [x, a] are
        multiplied separately, so that a latent state that all candidates share is multiplied only once.
        """
        if a is not None and a.shape[:-1] == x.shape[:-1]:
            x = torch.cat([x, a], -1)
            a = None
        weight = self.weight[heads]
        y = stacked_matmul(x, weight[:, : x.shape[-1]])
        if a is not None:
            y = y + stacked_matmul(a, weight[:, x.shape[-1] :])
        return y + broadcast_heads(self.bias[heads], y)


def broadcast_heads(parameter: Tensor, x: Tensor) -> Tensor:
    """Reshape parameter (heads, out) so that it broadcasts with x (heads, ..., out)."""
    return parameter.view(len(parameter), *[1] * (x.dim() - 2), -1)


class NormedLinear(Linear):
    """An ensemble of linear layers with dropout (optional), LayerNorm and an activation (TD-MPC2)."""

    def __init__(
        self,
        num_heads: int,
        in_dim: int,
        out_dim: int,
        generator: torch.Generator,
        activation: Callable[[Tensor], Tensor],
    ):
        super().__init__(num_heads, in_dim, out_dim, generator)
        self.activation = activation
        self.ln_weight = nn.Parameter(torch.ones(num_heads, out_dim))
        self.ln_bias = nn.Parameter(torch.zeros(num_heads, out_dim))

    def forward(
        self,
        x: Tensor,
        a: Tensor | None = None,
        heads: slice | Tensor = slice(None),
        dropout_mask: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer to x, or to [x, a]. dropout_mask: (heads, ..., out), 0 or 1 / (1 - dropout)."""
        y = super().forward(x, a, heads)
        if dropout_mask is not None:
            y = y * dropout_mask
        y = F.layer_norm(y, y.shape[-1:])
        return self.activation(y * broadcast_heads(self.ln_weight[heads], y) + broadcast_heads(self.ln_bias[heads], y))


class MLP(nn.Module):
    """An ensemble of MLPs: NormedLinear layers with Mish, then Linear, or NormedLinear with output_activation."""

    def __init__(
        self,
        dims: list[int],
        generator: torch.Generator,
        num_heads: int = 1,
        output_activation: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        *hidden_shapes, (last_in, last_out) = itertools.pairwise(dims)
        self.layers = nn.ModuleList(NormedLinear(num_heads, i, o, generator, mish) for i, o in hidden_shapes)
        if output_activation is None:
            self.layers.append(Linear(num_heads, last_in, last_out, generator))
        else:
            self.layers.append(NormedLinear(num_heads, last_in, last_out, generator, output_activation))

    def forward(self, x: Tensor, a: Tensor | None = None, dropout_mask: Tensor | None = None) -> Tensor:
        """Apply all heads to x, or to [x, a]: (heads, ..., out). Dropout acts on the first layer.

        On a CPU the heads are computed one after the other, so that the activations of a head stay in the cache.
        """
        num_heads = len(self.layers[0].weight)
        if num_heads == 1 or x.device.type != "cpu":
            return self.forward_heads(x, a, slice(None), dropout_mask)
        select = lambda y, head: y if y is None or len(y) == 1 else y[head]  # of length 1: shared by all heads
        outputs = []
        for h in range(num_heads):
            head = slice(h, h + 1)
            outputs.append(self.forward_heads(select(x, head), select(a, head), head, select(dropout_mask, head)))
        return torch.cat(outputs)

    def forward_heads(
        self, x: Tensor, a: Tensor | None, heads: slice | Tensor, dropout_mask: Tensor | None = None
    ) -> Tensor:
        """Apply some of the heads at once, given by a slice or (in tdmpc2.py) by their indices."""
        first, *others = self.layers
        x = first(x, a, heads, dropout_mask)
        for layer in others:
            x = layer(x, heads=heads)
        return x


class WorldModel(nn.Module):
    """All networks: encoder, latent dynamics, reward, value heads, policy, and moving averages (EMA) of the last two.

    The termination network and the moving average of the policy exist only if a flag needs them.

    encoder (..., O) -> (..., L)                      dynamics (H or 1, ..., L), (H or 1, ..., A) -> (H, ..., L)
    reward (..., L), (..., A) -> (..., K) logits      value (1, ..., L) -> (Q, ..., K) logits
    policy (..., L) -> (..., 2A)                      termination (..., L) -> (..., 1) logit, only with --episodic
    """

    def __init__(self, task: "TaskInfo", args: Args, generator: torch.Generator):
        super().__init__()
        hidden = [args.mlp_dim] * 2
        encoder_dims = [task.obs_dim] + [args.enc_dim] * (args.num_enc_layers - 1) + [args.latent_dim]
        state_action_dim = args.latent_dim + task.action_dim
        latent_activation = functools.partial(simnorm, group_size=args.simnorm_dim)
        self.encoder = MLP(encoder_dims, generator, output_activation=latent_activation)
        self.dynamics = MLP(
            [state_action_dim, *hidden, args.latent_dim],
            generator,
            output_activation=latent_activation,
        )
        self.reward = MLP([state_action_dim, *hidden, args.num_bins], generator)
        self.value = MLP([args.latent_dim, *hidden, args.num_bins], generator, num_heads=args.num_q)
        for network in (self.reward, self.value):
            nn.init.zeros_(network.layers[-1].weight)
        self.policy = MLP([args.latent_dim, *hidden, 2 * task.action_dim], generator)
        self.termination = MLP([args.latent_dim, *hidden, 1], generator) if args.episodic else None
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)
        needs_ema_policy = args.td_target_use_ema_policy or args.policy_trust_region_coef > 0
        self.ema_policy = copy.deepcopy(self.policy).requires_grad_(False) if needs_ema_policy else None
        self.register_buffer("kl_scale", torch.ones(()))  # running scale of the KL, see update_scale


def policy_gaussian(policy: nn.Module, z: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Compute mean and std of the policy at z (..., L): (..., A), (..., A).

    tanh squashes the mean, not the samples, so that the KL to the expert has a closed form. Samples are clipped.
    """
    mean, log_std = policy(z).chunk(2, -1)
    low, high = args.log_std_min, args.log_std_max
    log_std = low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)
    return torch.tanh(mean), torch.exp(log_std)


def sample_action(policy: nn.Module, z: Tensor, eps: Tensor, args: Args) -> Tensor:
    """Sample actions (..., A) from the policy at z (..., L), given standard normal noise eps (..., A)."""
    mean, std = policy_gaussian(policy, z, args)
    return (mean + std * eps).clamp(-1, 1)


def rollout_return(
    model: WorldModel,
    z: Tensor,
    select_action: Callable[[int, Tensor], Tensor],
    steps: int,
    value: nn.Module,
    args: Args,
) -> tuple[Tensor, Tensor]:
    """Roll the model out from z and predict the return, in two parts. Both the planner and the TD target use it.

    z: (H or 1, ..., L); select_action(t, z): the action of step t in state z, (H or 1, ..., A); value: the value heads.
    Returns the discounted sum of rewards (H, ...) and the discounted value of the last state (Q, H, ...). After one
    step from a z that all heads share, the rewards are (1, ...). With --episodic, terms after a predicted termination
    (probability above 0.5) are 0.
    """
    rewards = 0.0
    alive = 1.0
    discount = 1.0
    for t in range(steps):
        a = select_action(t, z)
        rewards = rewards + discount * alive * two_hot_inv(model.reward(z, a), args)
        z = model.dynamics(z, a)  # (H, ..., L)
        if args.episodic:
            alive = alive * (model.termination(z).squeeze(-1) <= 0)
        discount *= args.discount
    return rewards, discount * alive * two_hot_inv(value(z[None]), args)


# --- Planner: MPPI in latent space ------------------------------------------------------------------------------------


class PlanNoise(NamedTuple):
    """All random numbers of S plans. They are inputs of `plan`, so that its compiled and eager versions agree."""

    policy: Tensor  # (S, P, T, A) standard normal
    samples: Tensor  # (S, iterations, N-P, T, A) standard normal
    elite: Tensor  # (S, num_elites) uniform
    action: Tensor  # (S, A) standard normal


class Plan(NamedTuple):
    """The result of S plans."""

    action: Tensor  # (S, A) first action of the sampled elite, with exploration noise
    elite_action: Tensor  # (S, A) first action of the sampled elite
    best_action: Tensor  # (S, A) first action of the best elite
    mean: Tensor  # (S, T, A) mean of the action sequence
    std: Tensor  # (S, A) std of the first action
    value: Tensor  # (S,) predicted return of the sampled elite


def sample_plan_noise(
    num_states: int, horizon: int, action_dim: int, args: Args, generator: torch.Generator
) -> PlanNoise:
    """Sample the random numbers of `num_states` plans."""
    iterations = args.iterations + (args.extra_iterations if action_dim >= 20 else 0)
    num_sampled = args.num_samples - args.num_pi_trajs
    normal = lambda *shape: torch.randn(num_states, *shape, generator=generator, device=generator.device)
    policy = normal(args.num_pi_trajs, horizon, action_dim)
    samples = normal(iterations, num_sampled, horizon, action_dim)
    elite = torch.rand(num_states, args.num_elites, generator=generator, device=generator.device)
    return PlanNoise(policy, samples, elite, normal(action_dim))


def candidate_scores(rewards: Tensor, values: Tensor) -> Tensor:
    """Average predicted returns over heads: (H, S, n), (Q, H, S, n) -> (S, n). Non-finite scores: -1e9."""
    scores = rewards.mean(0) + values.mean((0, 1))
    return scores.nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9)


def policy_candidates(
    model: WorldModel, policy: nn.Module, z: Tensor, eps: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """Sample action sequences from the policy and score them: z (S, L), standard normal eps (S, P, T, A).

    The same sequences compete in every iteration, so they are scored only once, before the first. Returns actions
    (S, P, T, A) and scores (S, P).
    """
    actions = []

    def follow_policy(t: int, z: Tensor) -> Tensor:
        actions.append(sample_action(policy, z[0], eps[:, :, t], args))  # (S, P, A), from dynamics head 0
        return actions[t][None]

    start = z[None, :, None].expand(-1, -1, eps.shape[1], -1)  # (1, S, P, L)
    rewards, values = rollout_return(model, start, follow_policy, eps.shape[2], model.value, args)
    return torch.stack(actions, 2), candidate_scores(rewards, values)


def mppi_iteration(
    model: WorldModel,
    z: Tensor,
    mean: Tensor,
    std: Tensor,
    policy_actions: Tensor,
    policy_scores: Tensor,
    eps: Tensor,
    args: Args,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sample candidates, score them and refit mean and std to the elites.

    z: (S, L); mean, std: (S, T, A); policy_actions: (S, P, T, A); policy_scores: (S, P); eps: (S, N-P, T, A).
    Returns mean and std (S, T, A), elites (S, num_elites, T, A), best first, their scores and weights (S, num_elites).
    """
    # Sample action sequences and predict their returns
    samples = (mean[:, None] + std[:, None] * eps).clamp(-1, 1)  # (S, N-P, T, A)
    step_actions = samples.movedim(2, 0).contiguous()  # (T, S, N-P, A): the actions of a step are contiguous
    select_action = lambda t, _: step_actions[None, t]  # (1, S, N-P, A)
    shared_z = z[None, :, None]  # (1, S, 1, L): all candidates start from the same state
    rewards, values = rollout_return(model, shared_z, select_action, len(step_actions), model.value, args)
    sample_scores = candidate_scores(rewards, values)  # (S, N-P)
    scores = torch.cat([policy_scores, sample_scores], 1)  # (S, N)
    actions = torch.cat([policy_actions, samples], 1)  # (S, N, T, A)

    # Select the elites and weight them by their scores
    elite_scores, elite_index = scores.topk(args.num_elites, dim=1)
    elites = actions.take_along_dim(elite_index[:, :, None, None], 1)  # (S, num_elites, T, A)
    weights = torch.softmax(args.temperature * elite_scores, 1)

    # Refit mean and std to the weighted elites
    w = weights[:, :, None, None]
    mean = (w * elites).sum(1)
    std = (w * (elites - mean[:, None]).square()).sum(1).sqrt().clamp(args.min_std, args.max_std)
    return mean, std, elites, elite_scores, weights


@torch.no_grad()
def plan(
    model: WorldModel,
    policy: nn.Module,
    obs: Tensor,
    prev_mean: Tensor,
    noise: PlanNoise,
    args: Args,
    propose: Callable = policy_candidates,
    iterate: Callable = mppi_iteration,
) -> Plan:
    """Plan for S states at once with MPPI (TD-MPC2), where the policy proposes some of the candidates.

    Acting, evaluation and reanalyze all use this function.
    policy: model.policy, or in bmpc_dual_policy.py one of two. obs: (S, O).
    prev_mean: (S, T, A), the mean of the previous plan, shifted by one step, or zeros.
    propose, iterate: policy_candidates and mppi_iteration; compile_functions passes compiled ones.
    """
    z = model.encoder(obs)  # (S, L)
    policy_actions, policy_scores = propose(model, policy, z, noise.policy, args)
    mean = prev_mean
    std = torch.full_like(mean, args.max_std)
    for eps in noise.samples.unbind(1):
        mean, std, elites, elite_scores, weights = iterate(
            model, z, mean, std, policy_actions, policy_scores, eps, args
        )

    # Sample an elite by its weight (Gumbel-max trick) and add exploration noise to its first action
    gumbel = -torch.log(-torch.log(noise.elite))
    sampled = (weights.log() + gumbel).argmax(1)  # (S,)
    state_index = torch.arange(len(z), device=z.device)
    elite_action = elites[state_index, sampled, 0]  # (S, A)
    action = (elite_action + std[:, 0] * noise.action).clamp(-1, 1)
    value = elite_scores[state_index, sampled]  # (S,)
    return Plan(action, elite_action, elites[:, 0, 0], mean, std[:, 0], value)


def run_planner(
    plan_fn: Callable[..., Plan],
    model: WorldModel,
    policy: nn.Module,
    obs: Tensor,
    prev_mean: Tensor,
    generator: torch.Generator,
    args: Args,
) -> Plan:
    """Sample the noise and plan for S states: obs (S, O), prev_mean (S, T, A). plan_fn is `plan`, compiled or not."""
    S, T, A = prev_mean.shape
    noise = sample_plan_noise(S, T, A, args, generator)
    return plan_fn(model, policy, obs, prev_mean, noise, args)


def planner_rollouts_per_state(args: Args) -> int:
    """Return an upper bound on the rollouts per state in one MPPI iteration.

    On a CPU, chunk_size derives from it how many states to plan for at once: as many as fit in the cache.
    """
    return args.num_samples


def shift_plan(mean: Tensor) -> Tensor:
    """Shift the mean of a plan (S, T, A) by one step, to start the next plan from it. The last step becomes zero."""
    return F.pad(mean[:, 1:], (0, 0, 0, 1))


class Expert(NamedTuple):
    """Diagonal Gaussians over actions: the targets of the policy."""

    mean: Tensor  # (..., A)
    std: Tensor  # (..., A)


def make_expert(planned: Plan, chosen_action: Tensor, args: Args) -> Expert:
    """Make the experts (S, A) of S plans.

    Their mean is chosen_action (S, A), or with --no-reanalyze-use-chosen-action the first step of the plan's mean.
    Their std is that of the plan.
    """
    mean = chosen_action if args.reanalyze_use_chosen_action else planned.mean[:, 0]
    return Expert(mean, planned.std)


# --- Losses and the update --------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B windows, each of T consecutive transitions of one episode."""

    obs: Tensor  # (T, B, O)
    action: Tensor  # (T, B, A)
    expert: Expert  # (T, B, A) each
    reward: Tensor  # (T, B)
    terminated: Tensor  # (T, B)
    next_obs: Tensor  # (T, B, O)
    index: Tensor  # (T, B) int64, row of the replay buffer


class UpdateNoise(NamedTuple):
    """All random numbers of an update, except those of reanalyze. They are passed in, like those of a plan."""

    td: Tensor  # (R, td_horizon, T, B, A) standard normal, for the policy in the value targets
    dropout_keep: Tensor  # (Q, T, B, mlp_dim) 0 where an element is dropped, else 1


def sample_update_noise(args: Args, action_dim: int, make_generator: Callable[[str], torch.Generator]) -> UpdateNoise:
    """Sample the random numbers of one update."""
    generator = make_generator("update")
    T, B = args.horizon, args.batch_size
    shape = (args.num_rollouts, args.td_horizon, T, B, action_dim)
    td = torch.randn(shape, generator=generator, device=generator.device)
    dropout_keep = torch.empty(args.num_q, T, B, args.mlp_dim, device=generator.device)
    dropout_keep.bernoulli_(1 - args.dropout, generator=generator)
    return UpdateNoise(td, dropout_keep)


@torch.no_grad()
def td_target(model: WorldModel, policy: nn.Module, z: Tensor, eps: Tensor, args: Args) -> Tensor:
    """Compute value targets in imagination with the policy (BMPC: model-based TD-learning).

    y = sum over k < td_horizon of gamma^k r_k, plus gamma^td_horizon times the mean of the target value heads.
    With --episodic, terms after a predicted termination are 0.
    z: (T, B, L); eps: (R, td_horizon, T, B, A). Returns (1, R, T, B): one target for all value heads.
    """
    select_action = lambda k, z: sample_action(policy, z, eps[:, k], args)  # (H = 1, R, T, B, A)
    rewards, values = rollout_return(model, z[None, None], select_action, args.td_horizon, model.target_value, args)
    # (H, R, T, B) and (Q, H, R, T, B) -> (1, R, T, B): the mean over value heads, then over dynamics heads
    return (rewards + values.mean(0)).mean(0, keepdim=True)


def rollout_dynamics(model: WorldModel, z_0: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Roll out the dynamics from z_0 (B, L) with actions (T, B, A). Returns states and next states (T, H, B, L)."""
    zs = [z_0[None]]  # (1, B, L), then (H, B, L)
    for a in actions:
        zs.append(model.dynamics(zs[-1], a[None]))
    next_zs = torch.stack(zs[1:])
    return torch.stack([z.expand_as(zs[1]) for z in zs[:-1]]), next_zs


def world_model_loss(
    model: WorldModel, batch: Batch, noise: UpdateNoise, args: Args
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compute the losses of the world model and the value heads along a rollout (TD-MPC2, equation 3).

    Returns the total loss, the states of the rollout without gradient (T, B, L), and metrics.
    """
    weights = rho_weights(batch.reward, args)  # (T,)

    # Encode all T+1 observations. The rollout starts at encoding 0; encodings 1 to T are its targets. By default, value
    # targets are imagined from encodings 0 to T-1
    z_0 = model.encoder(batch.obs[0])  # (B, L)
    true_z_needs_grad = args.encoder_consistency_coef > 0 or args.imagine_initial_source == "replay_true"
    with torch.set_grad_enabled(true_z_needs_grad):
        true_z = torch.cat([z_0[None], model.encoder(batch.next_obs)])  # (T+1, B, L)

    # Latent consistency and reward
    zs, next_zs = rollout_dynamics(model, z_0, batch.action)  # (T, H, B, L)
    consistency_loss = (next_zs - true_z[1:, None].detach()).square().mean((1, 2, 3))  # (T,)
    reward_logits = model.reward(zs, batch.action[:, None])  # (T, H, B, K)
    reward_loss = soft_cross_entropy(reward_logits, two_hot(batch.reward, args)[:, None]).mean((1, 2))  # (T,)

    # Value. Averaging the two-hot targets of R rollouts averages their losses: cross-entropy is linear in its target
    rollout_z = zs[:, 0]  # (T, B, L), of dynamics head 0
    value_z = rollout_z if args.imagine_initial_source == "replay_rollout" else true_z[:-1]
    target_z = true_z[:-1] if args.td_target_initial_source == "replay_true" else value_z
    policy = model.ema_policy if args.td_target_use_ema_policy else model.policy
    y = td_target(model, policy, target_z.detach(), noise.td, args)  # (1, R, T, B)
    target = two_hot(y, args).mean(1)  # (1, T, B, K)
    value_logits = model.value(value_z[None], dropout_mask=noise.dropout_keep / (1 - args.dropout))  # (Q, T, B, K)
    value_loss = soft_cross_entropy(value_logits, target).mean((0, 2))  # (T,)

    losses = {"consistency": consistency_loss, "reward": reward_loss, "value": value_loss}  # (T,) each
    if args.episodic:
        logits = model.termination(next_zs).squeeze(-1)  # (T, H, B)
        terminated = batch.terminated[:, None].expand_as(logits)
        termination_loss = F.binary_cross_entropy_with_logits(logits, terminated, reduction="none")
        losses["termination"] = termination_loss.mean((1, 2))
    if args.encoder_consistency_coef > 0:
        losses["encoder_consistency"] = (next_zs.detach() - true_z[1:, None]).square().mean((1, 2, 3))

    # Total
    losses = {name: (weights * loss).sum() for name, loss in losses.items()}
    total = (
        args.consistency_coef * losses["consistency"]
        + args.reward_coef * losses["reward"]
        + args.value_coef * losses["value"]
    )
    if args.episodic:
        total = total + args.termination_coef * losses["termination"]
    if args.encoder_consistency_coef > 0:
        total = total + args.encoder_consistency_coef * losses["encoder_consistency"]

    metrics = {f"losses/{name}": loss.detach() for name, loss in losses.items()}
    metrics |= {"losses/total": total.detach(), "losses/td_target": y.mean()}
    if args.num_rollouts > 1:
        metrics["losses/td_target_std_over_rollouts"] = y.std(1).mean()
    return total, rollout_z.detach(), metrics


def update_scale(scale: Tensor, x: Tensor) -> Tensor:
    """Compute the new running scale of the policy loss (TD-MPC2).

    x (B,): the KL, or in tdmpc2.py Q-values, at the first step of each window. The scale is an exponential moving
    average of the range of x from its 5th to its 95th percentile. Ranges below 1 count as 1. The step size is 0.01;
    TD-MPC2's code uses that of the target value heads.
    """
    x = x.detach().sort().values

    def percentile(p: float) -> Tensor:  # torch.quantile cannot be compiled by every version of torch
        position = p * (len(x) - 1)
        return torch.lerp(x[math.floor(position)], x[math.ceil(position)], position % 1)

    return torch.lerp(scale, (percentile(0.95) - percentile(0.05)).clamp(min=1.0), 0.01)


def policy_loss(model: WorldModel, z: Tensor, expert: Expert, args: Args) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compute the loss of the policy: KL(policy || expert), divided by its running scale (BMPC: expert imitation).

    Optional terms: an entropy bonus, and a trust region around the EMA policy.
    z: (T, B, L), states of the rollout; expert: (T, B, A). Returns the loss, the new scale and metrics.
    """
    weights = rho_weights(z, args)  # (T,)
    reduce = torch.mean if args.kl_reduction == "mean" else torch.sum
    mean, std = policy_gaussian(model.policy, z, args)  # (T, B, A)
    expert_std = (expert.std * args.expert_std_scale).clamp(min=args.expert_std_min)
    kl = reduce(gaussian_kl(mean, std, expert.mean, expert_std), -1)  # (T, B)
    scale = update_scale(model.kl_scale, kl[0])
    loss = (weights * kl.mean(1)).sum() / scale

    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean(1)  # (T,)
    if args.entropy_coef > 0:  # as in TD-MPC2, the entropy is multiplied by A
        loss = loss - args.entropy_coef * mean.shape[-1] * (weights * entropy).sum()
    metrics = {"losses/kl": kl.detach().mean(), "losses/kl_scale": scale, "losses/entropy": entropy.detach().mean()}

    if args.policy_trust_region_coef > 0:
        ema_mean, ema_std = policy_gaussian(model.ema_policy, z, args)
        ema_kl = reduce(gaussian_kl(ema_mean, ema_std, mean, std), -1)  # (T, B)
        trust_region = (weights * ema_kl.mean(1)).sum() / scale
        loss = loss + args.policy_trust_region_coef * trust_region
        metrics["losses/trust_region"] = trust_region.detach()
    return loss, scale, metrics | {"losses/policy": loss.detach()}


def make_optimizers(model: WorldModel, args: Args) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """Make one Adam for the world model and the value heads, and one for the policy."""
    learning_rates = {model.encoder: args.lr * args.enc_lr_scale}
    for network in (model.dynamics, model.reward, model.value, model.termination):
        if network is not None:
            learning_rates[network] = args.lr
    params_by_lr: dict[float, list[nn.Parameter]] = {}  # one group per learning rate: each costs a kernel launch
    for network, lr in learning_rates.items():
        params_by_lr.setdefault(lr, []).extend(network.parameters())
    groups = [dict(params=params, lr=lr) for lr, params in params_by_lr.items()]
    device_type = model.kl_scale.device.type
    options = dict(fused=device_type in ("cpu", "cuda"), capturable=device_type == "cuda")
    world_optimizer = torch.optim.Adam(groups, **options)
    policy_optimizer = torch.optim.Adam(model.policy.parameters(), lr=args.lr, eps=1e-5, **options)
    return world_optimizer, policy_optimizer


def optimizer_step(loss: Tensor, optimizer: torch.optim.Adam, args: Args) -> Tensor:
    """Backpropagate the loss, clip the gradient and take one optimizer step. Returns its norm before clipping."""
    loss.backward()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm(grads)
    torch._foreach_div_(grads, (norm / args.grad_clip_norm).clamp(min=1.0))  # clip_grad_norm_ in two launches less
    optimizer.step()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Move the exponential moving average: target += tau (online - target)."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class Functions(NamedTuple):
    """The functions that take most of the time. With --compile, `make_functions` compiles them."""

    plan: Callable[..., Plan] = plan
    world_model_loss: Callable[..., tuple] = world_model_loss
    policy_loss: Callable[..., tuple] = policy_loss


def update(
    functions: Functions,
    model: WorldModel,
    optimizers: tuple[torch.optim.Adam, torch.optim.Adam],
    batch: Batch,
    noise: UpdateNoise,
    args: Args,
    pretraining: bool,
) -> dict[str, Tensor]:
    """Update the world model, the value heads, the policy (except in pretraining) and the moving averages.

    Follows algorithm 1 of BMPC. Returns metrics.
    """
    world_optimizer, policy_optimizer = optimizers
    loss, z, metrics = functions.world_model_loss(model, batch, noise, args)
    metrics["losses/grad_norm"] = optimizer_step(loss, world_optimizer, args)
    if not pretraining:
        loss, scale, policy_metrics = functions.policy_loss(model, z, batch.expert, args)
        metrics |= policy_metrics
        metrics["losses/policy_grad_norm"] = optimizer_step(loss, policy_optimizer, args)
        model.kl_scale.copy_(scale)
        if model.ema_policy is not None:
            ema_update(model.ema_policy, model.policy, args.policy_ema_tau)
    ema_update(model.target_value, model.value, args.tau)
    return metrics


# --- Replay buffer ----------------------------------------------------------------------------------------------------


class ReplayBuffer:
    """A ring buffer of C vector steps on the device. A vector step has E rows, one transition of each environment.

    Host arrays record where windows start. A window is T consecutive transitions of one episode, which may still be
    running.
    """

    def __init__(self, args: Args, task: "TaskInfo", device: torch.device):
        E, A = args.num_envs, task.action_dim
        self.horizon = args.horizon
        self.capacity = min(args.buffer_size // E, math.ceil(args.total_timesteps / E))  # no more than the run needs
        # Columns of a row: obs, action, mean and std of the expert, reward, terminated, next_obs
        self.widths = [task.obs_dim, A, A, A, 1, 1, task.obs_dim]
        zeros = np.zeros((self.capacity, E, sum(self.widths)), np.float32)  # on a CPU, pages are allocated when written
        self.rows = torch.from_numpy(zeros).to(device)  # (C, E, sum of widths)
        self.valid_start = np.zeros((self.capacity, E), bool)  # whether a window starts at a row
        self.start_indices = np.zeros(0, np.int64)  # the rows where a window starts
        self.episode_step = np.zeros(E, np.int64)  # decisions so far in the current episodes
        self.step = 0  # vector steps added so far

    def split_rows(self, rows: Tensor, index: Tensor | None = None) -> Batch:
        """View rows (..., sum(widths)) as the fields of a Batch."""
        obs, action, *expert, reward, terminated, next_obs = rows.split(self.widths, -1)
        return Batch(obs, action, Expert(*expert), reward.squeeze(-1), terminated.squeeze(-1), next_obs, index)

    def add(
        self,
        obs: Tensor,
        action: Tensor,
        expert: Expert,
        reward: Tensor,
        terminated: Tensor,
        next_obs: Tensor,
        ended: np.ndarray,
        failed: np.ndarray,
    ) -> None:
        """Add a vector step.

        obs and next_obs: (E, O); action: (E, A); expert: (E, A); reward and terminated: (E,);
        ended, failed: arrays (E,) on the host. ended: the episode ended, by termination or truncation; failed: the
        simulator failed at this step, so the episode ended, and no window contains the row.
        """
        row = [obs, action, *expert, reward[:, None], terminated[:, None], next_obs]
        torch.cat(row, 1, out=self.rows[self.step % self.capacity])
        self.valid_start[self.step % self.capacity] = False  # the window that starts here is not complete yet
        self.episode_step += 1
        self.step += 1
        # This vector step completes the windows that start horizon - 1 vector steps earlier
        is_valid = (self.episode_step >= self.horizon) & ~failed
        self.valid_start[(self.step - self.horizon) % self.capacity] = is_valid
        self.start_indices = np.flatnonzero(self.valid_start)
        self.episode_step[ended] = 0

    def sample(self, uniform: np.ndarray) -> Batch:
        """Sample B windows uniformly from all windows, given uniform random numbers (B,) in [0, 1).

        Raises UsageError if there is no window.
        """
        T, C, E = self.horizon, self.capacity, len(self.episode_step)
        if not len(self.start_indices):
            raise UsageError(
                f"no episode in the replay buffer is as long as a window ({T} decisions); "
                "start a new run with a smaller --horizon and with --run-name NAME"
            )
        start = self.start_indices[(uniform * len(self.start_indices)).astype(np.int64)]  # (B,)
        index = (start + E * np.arange(T)[:, None]) % (C * E)  # (T, B); an environment's next row is E rows later
        index = to_device(index, self.rows.device)
        return self.split_rows(self.rows.flatten(0, 1)[index], index)

    def replace_experts(self, index: Tensor, expert: Expert) -> None:
        """Replace the experts of the rows at index (n,). If a row occurs several times, its last expert is kept.

        With --no-torch-deterministic, such a row may get numbers from several of them.
        """
        # Whole rows are written: on CUDA, deterministic index_put_ would first copy the columns of the whole buffer
        all_rows = self.rows.flatten(0, 1)
        rows = all_rows[index]
        for column, new in zip(self.split_rows(rows).expert, expert, strict=True):
            column.copy_(new)
        all_rows[index] = rows

    def state_dict(self) -> dict[str, Any]:
        """Return all rows written so far and the state of the ring."""
        return {
            "rows": self.rows[: self.step].to("cpu", copy=True),
            "valid_start": torch.from_numpy(self.valid_start[: self.step].copy()),
            "episode_step": torch.from_numpy(self.episode_step.copy()),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state into an empty buffer.

        Its capacity may be larger than that of the saved buffer, but only if no saved row had been overwritten.
        """
        self.step = state["step"]
        self.rows[: self.step].copy_(state["rows"])
        self.valid_start[: self.step] = state["valid_start"]
        self.episode_step[:] = state["episode_step"]
        self.start_indices = np.flatnonzero(self.valid_start)


# --- Acting and reanalyze ---------------------------------------------------------------------------------------------


def random_action(args: Args, action_dim: int, generator: torch.Generator) -> tuple[Tensor, Expert]:
    """Sample uniform actions (E, A) for the warm-up. Their expert is N(0, 1), until reanalyze replaces it."""
    action = torch.rand(args.num_envs, action_dim, generator=generator, device=generator.device) * 2 - 1
    expert = Expert(torch.zeros_like(action), torch.ones_like(action))
    return action, expert


@torch.no_grad()
def act(
    plan_fn: Callable[..., Plan],
    model: WorldModel,
    obs: Tensor,
    prev_mean: Tensor,
    args: Args,
    make_generator: Callable[[str], torch.Generator],
) -> tuple[Tensor, Expert, Tensor, dict[str, Tensor]]:
    """Plan the next action in each environment: obs (E, O), prev_mean (E, T, A).

    Returns actions (E, A), their initial experts (E, A), the means of the plans (E, T, A), and metrics.
    """
    behavior = run_planner(plan_fn, model, model.policy, obs, prev_mean, make_generator("act"), args)
    if args.initial_expert_from_behavior:
        chosen_action = behavior.action if args.chosen_action_noise else behavior.elite_action
        expert = make_expert(behavior, chosen_action, args)
    else:
        zero_mean = torch.zeros_like(prev_mean)
        generator = make_generator("expert")
        separate = run_planner(plan_fn, model, model.policy, obs, zero_mean, generator, args)
        expert = make_expert(separate, separate.elite_action, args)
    metrics = {"planner/plan_std": behavior.std.mean(), "planner/value": behavior.value.mean()}
    return behavior.action, expert, behavior.mean, metrics


@torch.no_grad()
def eval_action(
    plan_fn: Callable[..., Plan],
    model: WorldModel,
    obs: Tensor,
    prev_mean: Tensor,
    args: Args,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Plan evaluation actions, without exploration noise: obs (S, O), prev_mean (S, T, A).

    Returns the actions (S, A) and the means of the plans (S, T, A).
    """
    planned = run_planner(plan_fn, model, model.policy, obs, prev_mean, generator, args)
    action = planned.elite_action if args.eval_sample_elite else planned.best_action
    return action, planned.mean


@torch.no_grad()
def policy_action(model: WorldModel, obs: Tensor, args: Args) -> Tensor:
    """Compute the mean action of the policy: (S, O) -> (S, A)."""
    return policy_gaussian(model.policy, model.encoder(obs), args)[0]


@torch.no_grad()
def reanalyze(
    plan_fn: Callable[..., Plan],
    model: WorldModel,
    buffer: ReplayBuffer,
    batch: Batch,
    args: Args,
    make_generator: Callable[[str], torch.Generator],
) -> None:
    """Plan again for the states of the first W = reanalyze_batch_size windows (BMPC: lazy reanalyze).

    The new experts replace the old ones in the replay buffer and in the batch.
    """
    W = args.reanalyze_batch_size
    obs = batch.obs[:, :W].flatten(0, 1)  # (T * W, O)
    index = batch.index[:, :W].flatten()  # (T * W,)
    zero_mean = obs.new_zeros(len(obs), args.reanalyze_horizon, batch.action.shape[-1])
    reanalyze_args = dataclasses.replace(  # policy_gaussian reads these bounds
        args, log_std_min=args.reanalyze_log_std_min, log_std_max=args.reanalyze_log_std_max
    )
    generator = make_generator("reanalyze")
    planned = run_planner(plan_fn, model, model.policy, obs, zero_mean, generator, reanalyze_args)
    new_expert = make_expert(planned, planned.elite_action, args)

    # Read the experts back, so that a row that occurs in several of these windows has the same expert in all of them,
    # and in the buffer. The other windows keep the experts that they were sampled with
    buffer.replace_experts(index, new_expert)
    stored_rows = buffer.rows.flatten(0, 1)[batch.index[:, :W]]
    for used, stored in zip(batch.expert, buffer.split_rows(stored_rows).expert, strict=True):
        used[:, :W] = stored


# --- Training loop ----------------------------------------------------------------------------------------------------


class Run:
    """The complete state of a run. `checkpoint_contents` lists the parts that a checkpoint holds."""

    def __init__(self, args: Args, task: "TaskInfo", device: torch.device):
        E, A = args.num_envs, task.action_dim
        self.args = args
        self.action_dim = A
        self.functions = make_functions(args, device)
        self.model = WorldModel(task, args, seeded_generator(args.seed, "init", device="cpu")).to(device)
        self.optimizers = make_optimizers(self.model, args)
        self.buffer = ReplayBuffer(args, task, device)
        self.metrics: dict[tuple[str, ...], tuple[Tensor, int]] = {}  # names -> (sums on the device, number of terms)

        # Counters
        self.global_step = 0  # decisions, summed over environments
        self.pretraining_updates = 0
        self.updates = 0  # after pretraining
        self.training_seconds = 0.0  # acting and learning; without evaluations, checkpoints and compilation

        # Current episodes, in E environments
        self.obs = torch.zeros(E, task.obs_dim, device=device)  # the next actions are planned from it
        self.prev_mean = torch.zeros(E, args.horizon, A, device=device)  # the next plans start from it
        self.episode = torch.zeros(E, dtype=torch.int64)  # number of the episode
        self.episode_return = torch.zeros(E, dtype=torch.float64)
        self.finished_episodes: list[FinishedEpisode] = []  # those that ended with the last step
        self.env_errors = 0  # episodes that were truncated because the simulator failed
        self.env_errors_in_a_row = 0  # such episodes in a row, up to the most recent episode

    def make_generator(self, purpose: str) -> torch.Generator:
        """Make a generator, seeded from the seed of the run, the purpose and the counters.

        A checkpoint therefore needs no generator states, and the same counters give the same random numbers.
        """
        key = f"{purpose} {self.global_step} {self.pretraining_updates} {self.updates}"
        return seeded_generator(self.args.seed, key, device=self.obs.device)

    def accumulate_metrics(self, values: dict[str, Tensor]) -> None:
        """Add scalars to sums on the device. Scalars of one call are added, and later copied, in one operation."""
        names = tuple(values)
        total, count = self.metrics.get(names) or (torch.zeros(len(names), device=self.obs.device), 0)
        torch._foreach_add_(total.unbind(), list(values.values()))
        self.metrics[names] = total, count + 1

    def mean_metrics(self) -> dict[str, float]:
        """Average the metrics accumulated so far. Raises RunError if one is not finite."""
        means = {}
        for names, (total, count) in self.metrics.items():
            for name, mean in zip(names, (to_host(total) / count).tolist(), strict=True):
                if not math.isfinite(mean):
                    raise RunError(f"{name} is not finite; the last checkpoint was written before this happened")
                means[name] = mean
        return means


def updates_due(args: Args, step: int) -> int:
    """Return the total number of updates, without pretraining, that are to be done by the time global_step is `step`.

    It is floor(utd_ratio x decisions after the warm-up). The product is exact: in floats, 0.29 x 100 is 28.999..., and
    the 29th update would come a decision late.
    """
    warm_up = math.ceil(args.learning_starts / args.num_envs) * args.num_envs
    return math.floor(max(0, step - warm_up) * Fraction(str(args.utd_ratio)))


def train_step(run: Run, pretraining: bool) -> None:
    """Sample a batch, reanalyze part of it if due, and update the networks."""
    args = run.args
    noise = sample_update_noise(args, run.action_dim, run.make_generator)
    # The buffer looks windows up on the host
    window_rng = np.random.default_rng([args.seed, run.pretraining_updates, run.updates])
    batch = run.buffer.sample(window_rng.random(args.batch_size))
    if pretraining:
        run.pretraining_updates += 1
    else:
        run.updates += 1
        if args.reanalyze_interval and run.updates % args.reanalyze_interval == 0:
            with record_function("reanalyze"):
                reanalyze(run.functions.plan, run.model, run.buffer, batch, args, run.make_generator)
    with record_function("update"):
        metrics = update(run.functions, run.model, run.optimizers, batch, noise, args, pretraining)
        run.accumulate_metrics(metrics)


def pretrain(run: Run, controller: "RunController") -> None:
    """Update the world model and the value heads learning_starts times. Stops early if a stop is requested."""
    with ProgressBar("pretraining", run.args.learning_starts, run.pretraining_updates) as progress:
        while run.pretraining_updates < run.args.learning_starts and not controller.stop_requested:
            train_step(run, pretraining=True)
            progress.update()
    controller.reset_sps()  # no decisions were made during pretraining


def store_step(run: Run, envs: "Envs", action: Tensor, expert: Expert, plan_mean: Tensor) -> None:
    """Wait for the step that step_async started, store its transitions and go on to the next observations.

    plan_mean: (E, T, A), the means of the current plans. Shifted by one step, they start the next plans, except in new
    episodes.
    """
    step = finish_step(run, envs)  # advances global_step and resets the environments whose episode ended
    run.buffer.add(run.obs, action, expert, step.reward, step.terminated, step.next_obs, step.ended, step.failed)
    run.obs = step.obs
    run.prev_mean = shift_plan(plan_mean) * step.continues[:, None, None]


def train(run: Run, envs: "Envs", controller: "RunController") -> int:
    """Train until the run is done or asked to stop. Returns the exit code."""
    args = run.args
    while True:
        # Pretrain once, after the warm-up
        if run.global_step >= args.learning_starts and run.pretraining_updates < args.learning_starts:
            pretrain(run, controller)

        # Write checkpoints, evaluate and log when due. None of it changes what is learned
        exit_code = controller.between_steps()
        if exit_code is not None:
            return exit_code

        # Act: random actions in the warm-up, then the planner
        with record_function("act"):
            if run.global_step < args.learning_starts:
                action, expert = random_action(args, run.action_dim, run.make_generator("act"))
                plan_mean = run.prev_mean  # zeros
            else:
                action, expert, plan_mean, metrics = act(
                    run.functions.plan, run.model, run.obs, run.prev_mean, args, run.make_generator
                )
                run.accumulate_metrics(metrics)
            envs.step_async(to_host(action))

        # While the simulators run, do the updates of this step, on the transitions stored so far
        while run.updates < updates_due(args, run.global_step + args.num_envs):
            train_step(run, pretraining=False)

        store_step(run, envs, action, expert, plan_mean)


# ======== Plumbing: the machinery of a run. How the agent plans and learns is all above. ========


class UsageError(Exception):
    """A mistake in the command line or its context: one line for the user, exit code 2."""


class RunError(Exception):
    """A failure of the run: one line for the user, exit code 1."""


def describe(error: BaseException) -> str:
    """Describe an exception in one line: its type and the first line of its message."""
    message = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {message}"


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a line above the progress bars."""
    tqdm.write(text, file)


class OutputStream:
    """Wraps stdout or stderr. Output that nobody reads any more, for example after `| tee` was killed, is discarded.

    While the disk of a log file is full, some lines are lost.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, or discard it."""
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self.attempt(self.stream.flush)

    def attempt(self, function: Callable, *args: Any) -> None:
        """Call a function of the stream. If it fails, and not because the disk is full, later output is discarded."""
        try:
            function(*args)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


# --- Environments -----------------------------------------------------------------------------------------------------


class TaskInfo(NamedTuple):
    """The properties of a task that the agent depends on."""

    obs_dim: int
    action_dim: int
    episode_length: int | None  # in decisions; None: episodes have no time limit


def resolve_env_id(task: str) -> str:
    """Return the Gymnasium id of a task. TD-MPC2's names, such as dog-run or cup-catch, become ids of dm_control.

    Ids with a version, such as Hopper-v5, and `module:Id`, whose module registers the environment, are returned
    unchanged.
    """
    if ":" in task or (re.search(r"-v\d+$", task) and not task.startswith("dm_control/")):
        return task
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # shimmy prints which environments it cannot import
            import shimmy  # noqa: F401 registers the tasks of dm_control
    except Exception as e:  # the renderer named by MUJOCO_GL can raise anything
        raise UsageError(f"dm_control cannot be imported: {describe(e)}") from e
    domain, dash, name = task.removeprefix("dm_control/").removesuffix("-v0").partition("-")
    domain = {"cup": "ball_in_cup", "pointmass": "point_mass"}.get(domain, domain)
    return f"dm_control/{domain}{dash}{name.replace('-', '_')}-v0"


class ActionRepeat(gym.Wrapper):
    """Repeat each action and sum the rewards, without discount (TD-MPC2). Also renders frames."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat
        self.rendering_failed = False

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        obs, _ = self.env.reset(seed=seed)
        return obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take up to `repeat` steps, fewer if the episode ends."""
        total_reward = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, _ = self.env.step(action)
            total_reward += np.asarray(reward, np.float64).item()  # some environments return arrays of one element
            terminated, truncated = np.asarray(terminated).item(), np.asarray(truncated).item()
            if terminated or truncated:
                break
        return obs, total_reward, bool(terminated), bool(truncated), {}

    def render_frame(self) -> np.ndarray | None:
        """Render a frame (height, width, 3). Returns None if the environment has no render mode or rendering fails."""
        if not self.env.render_mode or self.rendering_failed:  # after a failure, a second call may crash the process
            return None
        try:
            load_renderer()
            return self.env.render()
        except Exception as e:  # graphics drivers can raise anything; a run does not depend on its video
            print(f"warning: rendering failed: {describe(e)}", file=sys.stderr, flush=True)
            self.rendering_failed = True
            return None


@functools.cache
def load_renderer() -> None:
    """Let dm_control load its renderer, in a worker: EGL that was initialized before a fork does not work after it."""
    if "dm_control._render" in sys.modules:
        importlib.reload(sys.modules["dm_control._render"])


def render_options(env_id: str) -> dict[str, Any]:
    """Return the arguments of gymnasium.make for videos: in dm_control the tracking camera that TD-MPC2 uses."""
    options = {"render_mode": "rgb_array"}
    if env_id.startswith("dm_control/"):
        camera_id = 2 if env_id.startswith("dm_control/quadruped") else 0
        options["render_kwargs"] = {"camera_id": camera_id, "height": 480, "width": 640}
    return options


MAX_ENV_ERRORS = 10  # this many failed episodes in a row stop the run


class TruncateOnError(gym.Wrapper):
    """Truncate an episode if the simulator raises an exception or returns numbers that are not finite.

    Since resuming is exact, a run whose simulator diverges would otherwise stop at the same step at every start.
    """

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode. If that fails, try again with other seeds, which are derived from this one."""
        info = {}
        for attempt in range(MAX_ENV_ERRORS):
            try:
                self.last_obs, _ = self.env.reset(seed=derive_seed(seed, attempt) if attempt else seed)
                if not np.isfinite(self.last_obs).all():
                    raise ValueError("the first observation is not finite")
                return self.last_obs, info
            except Exception as e:  # a simulator can raise anything
                info = {"env_error": describe(e)}
        # As text, as in `step`: an exception of the simulator may be one that cannot be sent to the main process
        raise RuntimeError(f"{MAX_ENV_ERRORS} resets in a row failed, the last with {info['env_error']}")

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take a step. One that fails is not part of the episode: the observation before it is returned again."""
        try:
            obs, reward, terminated, truncated, _ = self.env.step(action)
            if not np.isfinite(obs).all():
                raise ValueError("an observation is not finite")
            if not np.isfinite(reward):
                raise ValueError("a reward is not finite")
        except Exception as e:  # a simulator can raise anything
            return self.last_obs, 0.0, False, True, {"env_error": describe(e)}
        self.last_obs = obs
        return obs, reward, terminated, truncated, {}


UNBOUNDED = 1e6  # action bounds of this size or more count as unbounded


def make_env(args: Args, render: bool = False) -> gym.Env:
    """Make an environment with flat float32 observations and actions in [-1, 1].

    Raises UsageError if its observations are images, or its action space is not a bounded Box of floats.
    """
    make = functools.partial(gym.make, args.env_id, disable_env_checker=True, **json.loads(args.env_kwargs))
    try:
        env = make(**render_options(args.env_id)) if render else make()
    except TypeError:  # some constructors do not accept render_mode
        env = make()
    obs_space = env.observation_space
    action_space = env.action_space
    if len(obs_space.shape or ()) > 2 or not isinstance(gym.spaces.flatten_space(obs_space), gym.spaces.Box):
        raise UsageError(f"{args.env_id} has observations {obs_space}; only vectors are supported, not images")
    is_float_box = isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"
    if not is_float_box or np.abs([action_space.low, action_space.high]).max() >= UNBOUNDED:
        raise UsageError(f"{args.env_id} has the action space {action_space}; a bounded Box of floats is required")
    env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
    low, high = action_space.low.ravel(), action_space.high.ravel()

    def to_env_action(action: np.ndarray) -> np.ndarray:
        action = np.where(low == high, low, action)  # RescaleAction returns NaN where the range is empty
        return action.reshape(action_space.shape)

    env = gym.wrappers.TransformAction(env, to_env_action, gym.spaces.flatten_space(action_space))
    env = gym.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))
    return TruncateOnError(ActionRepeat(env, args.action_repeat))


def inspect_task(args: Args) -> TaskInfo:
    """Make the environment once to read its sizes. Raises UsageError if it cannot be made or is not supported."""
    try:
        env = make_env(args)
    except UsageError:
        raise
    except Exception as e:  # constructors can raise anything
        raise UsageError(f"{args.env_id} cannot be made: {describe(e)}") from e
    dm_env = getattr(env.unwrapped, "_env", None)  # dm_control's own time limit, in simulator steps
    limit = env.spec.max_episode_steps or getattr(dm_env, "_step_limit", math.inf)
    episode_length = math.ceil(limit / args.action_repeat) if math.isfinite(limit) else None
    env.close()
    return TaskInfo(env.observation_space.shape[0], env.action_space.shape[0], episode_length)


@contextlib.contextmanager
def env_errors_as_run_errors() -> Iterator[None]:
    """Raise whatever goes wrong in an environment as RunError."""
    try:
        yield
    except RunError:
        raise
    except (EOFError, ConnectionError) as e:  # the worker closed its end of the pipe
        # These frames hold a half-sent message; collecting them later as garbage crashes Python 3.12
        traceback.clear_frames(e.__traceback__)
        raise RunError(f"the process of an environment died: {describe(e)}") from e
    except Exception as e:  # raised in the environment and passed on by gymnasium
        raise RunError(f"an environment failed: {describe(e)}") from e


CLOSE_SECONDS = 5.0  # time for an environment to close itself


class Envs(AsyncVectorEnv):
    """Environments in worker processes, where every episode has a seed of its own.

    There is no automatic reset, so the last observation of an episode is returned. All methods raise RunError if an
    environment cannot be made or reset, or if its process dies.
    """

    @env_errors_as_run_errors()
    def __init__(self, args: Args, num_envs: int, render_first: bool = False):
        self.seed = args.seed
        env_fns = [functools.partial(make_env, args, render_first and i == 0) for i in range(num_envs)]
        try:
            super().__init__(env_fns, context="fork", autoreset_mode=AutoresetMode.DISABLED)
        except ConnectionError:
            raise
        except OSError as e:
            raise RunError(
                f"cannot start the processes of the environments: {describe(e)}; /dev/shm may be full"
            ) from e

    def __enter__(self) -> "Envs":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: Any) -> None:
        if exc_type is not KeyboardInterrupt:  # a second Ctrl-C does not wait
            self.close()

    def start_episodes(self, mask: np.ndarray, episode_keys: Iterable[tuple], obs: np.ndarray) -> np.ndarray:
        """Start new episodes where mask (E,) is set. Each is seeded from its key, such as (environment, episode).

        Returns obs (E, O), with the first observations of the new episodes.
        """
        if not mask.any():
            return obs
        seeds = [derive_seed(self.seed, *key) for key in episode_keys]
        with env_errors_as_run_errors():
            first_obs, infos = self.reset(seed=seeds, options={"reset_mask": mask})
        for i, error in enumerate(infos.get("env_error", [])):
            if error:
                message = f"environment {i} starts its episode with another seed, because its reset failed ({error})"
                print_line(f"warning: {message}", sys.stderr)
        return np.where(mask[:, None], first_obs, obs)

    call = env_errors_as_run_errors()(AsyncVectorEnv.call)
    # Starts a step; the simulators run in the background
    step_async = env_errors_as_run_errors()(AsyncVectorEnv.step_async)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str | None]]:
        """Wait for the step.

        Returns obs (E, O) float32, reward (E,) float64, terminated (E,), truncated (E,), and for each environment the
        error that truncated its episode, or None.
        """
        with env_errors_as_run_errors():
            obs, reward, terminated, truncated, infos = super().step_wait()
        errors = infos.get("env_error", [None] * self.num_envs)
        return obs, reward, terminated, truncated, list(errors)

    def close_extras(self, **options: Any) -> None:
        """Let the workers close their environments. Kill those that take longer than CLOSE_SECONDS."""
        for pipe in filter(None, self.parent_pipes):  # gymnasium sets that of a worker with an error to None
            with contextlib.suppress(OSError):  # the worker has ended
                pipe.send(("close", None))
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()


class FinishedEpisode(NamedTuple):
    """A training episode that ended with the last step."""

    env_id: int
    episode: int
    episode_return: float
    length: int  # in decisions
    error: str | None  # of the simulator, if it truncated the episode


class EnvStep(NamedTuple):
    """One step of all environments, on the device except for `ended` and `failed`."""

    next_obs: Tensor  # (E, O) observation after the step, also where it ended the episode
    reward: Tensor  # (E,)
    terminated: Tensor  # (E,) 1 or 0
    ended: np.ndarray  # (E,) bool, on the host: terminated or truncated
    failed: np.ndarray  # (E,) bool, on the host: truncated by a simulator error; the step does not count
    obs: Tensor  # (E, O) observation to act on next: next_obs, or the first observation of a new episode
    continues: Tensor  # (E,) not ended, as 1 or 0


def finish_step(run: Run, envs: Envs) -> EnvStep:
    """Wait for the step under way, update the episode counters and reset the environments whose episode ended."""
    with record_function("environment"):
        next_obs, reward, terminated, truncated, errors = envs.step_wait()
    if terminated.any() and not run.args.episodic:
        advice = "start a new run with --episodic and --run-name NAME"
        raise UsageError(f"{run.args.env_id} ended an episode by termination; {advice}")
    run.global_step += envs.num_envs
    run.episode_return += torch.from_numpy(reward)
    ended = terminated | truncated
    failed = np.array([error is not None for error in errors])
    lengths = run.buffer.episode_step + ~failed  # the buffer does not count this step yet; a failed one does not count
    run.finished_episodes = []
    for i in np.flatnonzero(ended).tolist():
        episode = FinishedEpisode(i, int(run.episode[i]), float(run.episode_return[i]), int(lengths[i]), errors[i])
        run.finished_episodes.append(episode)
    count_env_errors(run)
    run.episode += torch.from_numpy(ended)
    run.episode_return[ended] = 0.0
    obs = envs.start_episodes(ended, enumerate(run.episode.tolist()), next_obs)

    # Copy everything to the device at once
    parts = [x.ravel() for x in (obs, next_obs, reward, terminated, ~ended)]
    joined = to_device(np.concatenate(parts, dtype=np.float32), run.obs.device)
    obs, next_obs, reward, terminated, continues = joined.split([x.size for x in parts])
    return EnvStep(next_obs.view_as(run.obs), reward, terminated, ended, failed, obs.view_as(run.obs), continues)


def count_env_errors(run: Run) -> None:
    """Count the finished episodes that an error truncated. Raises RunError if MAX_ENV_ERRORS of them come in a row."""
    for episode in run.finished_episodes:
        run.env_errors += episode.error is not None
        run.env_errors_in_a_row = run.env_errors_in_a_row + 1 if episode.error else 0
        check_env_errors(run.env_errors_in_a_row, episode.error)


def check_env_errors(errors_in_a_row: int, error: str | None) -> None:
    """Raise RunError if too many episodes in a row failed."""
    if errors_in_a_row >= MAX_ENV_ERRORS:
        raise RunError(f"{errors_in_a_row} episodes in a row failed, the last one with {error}")


def start_run_episodes(run: Run, envs: Envs) -> None:
    """Start the first episodes of a run, or return to the unfinished episodes of a resumed run."""
    episode_keys = list(enumerate(run.episode.tolist()))
    obs = np.zeros(run.obs.shape, np.float32)
    if run.global_step == 0:
        obs = envs.start_episodes(np.ones(envs.num_envs, bool), episode_keys, obs)
    else:
        obs = replay_unfinished_episodes(run, envs, obs)
        # The observations must be those of the checkpoint, bit for bit; otherwise, the next episode starts
        diverged = (obs.view(np.int32) != to_host(run.obs).view(np.int32)).any(1)
        if diverged.any():
            env_ids = np.flatnonzero(diverged).tolist()
            message = f"the unfinished episodes of environments {env_ids} cannot be continued (the simulator does not"
            message += " reproduce them, or the replay buffer no longer holds them); new episodes start"
            print_line(f"warning: {message}", sys.stderr)
            run.episode += torch.from_numpy(diverged)
            obs = envs.start_episodes(diverged, enumerate(run.episode.tolist()), obs)
            run.episode_return[diverged] = 0
            run.prev_mean[diverged] = 0
            run.buffer.episode_step[diverged] = 0
    run.obs = to_device(obs, run.obs.device)


def replay_unfinished_episodes(run: Run, envs: Envs, obs: np.ndarray) -> np.ndarray:
    """Repeat the actions of the unfinished episodes, from their first decision. Returns obs (E, O).

    If the replay buffer no longer holds the whole episode, only its first observation is returned.
    """
    buffer = run.buffer
    episode_keys = list(enumerate(run.episode.tolist()))
    is_complete = buffer.episode_step <= buffer.capacity
    steps = np.where(is_complete, buffer.episode_step, 0)  # (E,) decisions to repeat
    obs = envs.start_episodes(np.ones(envs.num_envs, bool), episode_keys, obs)
    # All replays end together, so shorter ones begin later. Until then, their environments take zero actions; each is
    # reset when its replay begins
    for remaining in range(steps.max(), 0, -1):
        actions = to_host(buffer.split_rows(buffer.rows[(buffer.step - remaining) % buffer.capacity]).action)
        envs.step_async(actions * (steps >= remaining)[:, None])
        obs, _, terminated, truncated, _ = envs.step_wait()
        starts_now = steps == remaining - 1
        obs = envs.start_episodes(starts_now | terminated | truncated, episode_keys, obs)
    return obs


# --- Evaluation -------------------------------------------------------------------------------------------------------


def run_episodes(
    run: Run, envs: Envs, use_planner: bool, stop_signals: list[int]
) -> tuple[np.ndarray, list[np.ndarray | None]] | None:
    """Run eval_episodes episodes with the planner, or with the mean action of the policy.

    Episode j has the same seed in every evaluation. Returns the returns of the episodes (float64) and, with
    --capture-video, the frames of the planner's episode 0. Returns None if a signal asked to stop.
    """
    args, num_envs = run.args, envs.num_envs
    prev_mean = run.prev_mean.new_zeros(num_envs, *run.prev_mean.shape[1:])
    returns = np.zeros(args.eval_episodes)
    frames = []
    # The number of each environment's current episode. Episodes with a number of eval_episodes or more do not count
    episode_ids = np.arange(num_envs)
    next_episode = num_envs
    errors_in_a_row = 0
    generator = seeded_generator(args.seed, f"evaluation {run.global_step}", device=run.obs.device)
    progress = ProgressBar(f"evaluating {'planner' if use_planner else 'policy alone'}, decisions")
    obs = np.zeros((num_envs, run.obs.shape[1]), np.float32)
    ended = np.ones(num_envs, bool)
    while (active := episode_ids < args.eval_episodes).any():
        if stop_signals:
            return None
        obs = envs.start_episodes(ended, [("eval", j) for j in episode_ids], obs)
        if args.capture_video and use_planner and episode_ids[0] == 0:
            frames.append(envs.call("render_frame")[0])
        device_obs = to_device(obs, run.obs.device)
        if use_planner:
            action, mean = eval_action(run.functions.plan, run.model, device_obs, prev_mean, args, generator)
            prev_mean = shift_plan(mean)
        else:
            action = policy_action(run.model, device_obs, args)
        envs.step_async(to_host(action))
        obs, reward, terminated, truncated, errors = envs.step_wait()
        returns[episode_ids[active]] += reward[active]
        progress.update(num_envs)
        ended = terminated | truncated
        for i in np.flatnonzero(ended & active):
            errors_in_a_row = errors_in_a_row + 1 if errors[i] else 0
            if errors[i]:
                message = f"evaluation episode {episode_ids[i]} was truncated, because the simulator failed"
                print_line(f"warning: {message} ({errors[i]})", sys.stderr)
            check_env_errors(errors_in_a_row, errors[i])
        episode_ids[ended] = next_episode + np.arange(ended.sum())
        next_episode += ended.sum()
        prev_mean[ended] = 0.0
    progress.close()
    return returns, frames


def evaluate(run: Run, envs: Envs, stop_signals: list[int], video_path: Path) -> dict[str, float] | None:
    """Evaluate with the planner and with the policy alone. Returns both mean returns; None if asked to stop."""
    planner_result = run_episodes(run, envs, use_planner=True, stop_signals=stop_signals)
    policy_result = planner_result and run_episodes(run, envs, use_planner=False, stop_signals=stop_signals)
    if planner_result is None or policy_result is None:
        return None
    planner_returns, frames = planner_result
    policy_returns, _ = policy_result
    summarize = lambda x: f"{x.mean():.1f} +- {x.std():.1f} ({x.min():.1f} to {x.max():.1f})"
    summary = f"planner {summarize(planner_returns)}, policy alone {summarize(policy_returns)}"
    print_line(f"step {run.global_step}: evaluation: {summary}")
    if frames:
        write_video(video_path, frames, fps=30 / run.args.action_repeat)
    return {"eval/episodic_return": planner_returns.mean(), "eval/policy_episodic_return": policy_returns.mean()}


def write_video(path: Path, frames: list[np.ndarray | None], fps: float) -> None:
    """Write frames as mp4. A failure is only a warning: a run does not depend on its video."""
    try:
        import imageio.v2 as imageio

        path.parent.mkdir(exist_ok=True)
        imageio.mimwrite(path, frames, fps=fps, macro_block_size=2)
    except Exception as e:  # no renderer, no imageio, no ffmpeg
        print_line(f"warning: no video at {path}: {describe(e)}", sys.stderr)


# --- Random numbers, devices, compilation -----------------------------------------------------------------------------


def derive_seed(seed: int, *key: Any) -> int:
    """Derive a seed from the seed of the run and a key that identifies an episode or a generator."""
    text = " ".join(map(str, (seed, *key)))
    return int(np.random.SeedSequence(list(text.encode())).generate_state(1)[0])


def seeded_generator(seed: int, *key: Any, device: torch.device | str) -> torch.Generator:
    """Make a generator on the device, seeded from the seed of the run and a key."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *key))


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device; to CUDA asynchronously. All copies of a training step use this function."""
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def to_host(x: Tensor) -> np.ndarray:
    """Copy a tensor to the host. All copies of a training step use this function."""
    return x.cpu().numpy()


def setup_torch(args: Args) -> torch.device:
    """Configure torch and return its device. Raises UsageError if the device is not available."""
    with warnings.catch_warnings(record=True, action="always") as caught:  # if the driver is too old
        best = "cuda" if torch.cuda.is_available() else "cpu"
    for warning in caught if args.device == "auto" else ():
        print_line(f"warning: no GPU is used: {describe(warning.message)}", sys.stderr)
    try:
        device = torch.zeros(1, device=best if args.device == "auto" else args.device).device  # cuda:0, not cuda
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"--device {args.device}: {describe(e)}") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision(args.matmul_precision)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    elif hasattr(ctypes.CDLL(None), "mallopt"):  # glibc: keep freed memory, since zeroing new pages takes time
        ctypes.CDLL(None).mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every tensor is written before it is read
    return device


CPU_CHUNK_ROLLOUTS = 2048  # the activations of this many rollouts fit in the cache of a CPU


def make_functions(args: Args, device: torch.device) -> Functions:
    """Compile the expensive functions; on a CPU, the plan in two parts. Without a compiler they stay eager."""
    functions = compile_functions(args, device) if args.compile else Functions()
    if device.type == "cuda":
        plan_fn = clone_outputs(functions.plan)
        functions = functions._replace(plan=plan_fn, world_model_loss=start_graph_step(functions.world_model_loss))
    get_chunk_size = functools.partial(chunk_size, args=args, on_cpu=device.type == "cpu")
    return functions._replace(plan=plan_in_chunks(functions.plan, get_chunk_size))


def chunk_size(num_states: int, args: Args, on_cpu: bool) -> int:
    """Return how many of num_states states to plan at once: on a CPU chunks of equal size, on a GPU all of them.

    Evaluations in fewer environments are padded, so that they share one compiled function with acting.
    """
    num_states = max(num_states, args.num_envs)
    max_states = max(1, CPU_CHUNK_ROLLOUTS // planner_rollouts_per_state(args)) if on_cpu else num_states
    return math.ceil(num_states / math.ceil(num_states / max_states))


def compile_functions(args: Args, device: torch.device) -> Functions:
    """Wrap the functions with torch.compile. It compiles each to one graph, at the first call with a new shape."""
    on_cuda = device.type == "cuda"
    options = {
        "combo_kernels": on_cuda,  # merges independent kernels, since each launch takes time
        "comprehensive_padding": False,  # padded outputs would be copied, each in its own launch
        "cpp_wrapper": not on_cuda,  # all kernels of a graph are compiled together, and called without Python
        # With these two, each process times kernels and chooses
        "dynamic_scale_rblock": not args.torch_deterministic,
        "shape_padding": not args.torch_deterministic,
        "triton.cudagraphs": on_cuda and args.cudagraphs,
    }
    compile_fn = functools.partial(torch.compile, fullgraph=True, dynamic=False, options=options)
    try:
        with warnings.catch_warnings(action="ignore"), announce("looking for a compiler"):  # about torch's internals
            delete_incomplete_libraries()
            compile_fn(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as e:
        print_line(f"warning: no working compiler, continuing in eager mode: {describe(e)}", sys.stderr)
        return Functions()
    torch._dynamo.config.recompile_limit = 64  # for plans of different shapes and arguments
    CompileTimer.install()
    functions = Functions(*map(compile_fn, Functions()))  # Functions() holds the eager ones
    if on_cuda:
        return functions
    # On a CPU, the two parts of a plan compile in a third of the time of the whole; small plans run somewhat slower
    parts = dict(propose=compile_fn(policy_candidates), iterate=compile_fn(mppi_iteration))
    return functions._replace(plan=functools.partial(plan, **parts))


def delete_incomplete_libraries() -> None:
    """Delete libraries that a killed compilation left incomplete in the compiler's cache: torch would load them.

    One that was written to in the last minute may be the work of another process, so wait until it is complete or old.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes a second

    def is_complete(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"  # the linker writes these first bytes last

    for path in Path(cache_dir()).glob("*/*.so"):
        with contextlib.suppress(FileNotFoundError):  # another run has deleted it
            while not is_complete(path):
                if time.time() - path.stat().st_mtime > 60:
                    path.unlink()
                    break
                time.sleep(1)


@contextlib.contextmanager
def announce(activity: str) -> Iterator[None]:
    """Print the activity, then the seconds that it has taken, every ten seconds until it is finished."""
    print_line(f"{activity} ...")
    start = time.perf_counter()
    finished = threading.Event()

    def report() -> None:
        while not finished.wait(10):
            print_line(f"{activity}: {time.perf_counter() - start:.0f} s")

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


class CompileTimer:
    """Reports compilations and measures how long they take."""

    seconds = 0.0
    number = 0

    @classmethod
    def install(cls) -> None:
        """Register with torch's compiler."""
        torch._dynamo.callback.callback_handler.clear()
        torch._dynamo.callback.on_compile_start(cls.on_start)
        torch._dynamo.callback.on_compile_end(cls.on_end)

    @classmethod
    def on_start(cls, _: Any) -> None:
        """Report the start of a compilation."""
        cls.number += 1
        cls.start = time.perf_counter()
        cls.announcement = announce(f"compiling part {cls.number}")
        cls.announcement.__enter__()

    @classmethod
    def on_end(cls, _: Any) -> None:
        """Report the end of a compilation."""
        cls.announcement.__exit__(None, None, None)
        seconds = time.perf_counter() - cls.start
        cls.seconds += seconds
        print_line(f"compiled part {cls.number} in {seconds:.0f} s")


# The program of a second process. Its arguments are the directory and name of this script, and Args and TaskInfo as
# JSON. It names torch, because the cache's keys depend on the first module in which pickle finds torch: that has to be
# the main module in both processes. multiprocessing is not used: if its process is killed, it warns about leaked
# semaphores
COMPILE_AHEAD = """
import ctypes, importlib, json, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: if the main process is killed, so is this one
directory, name, args, task = sys.argv[1:]
sys.path[0] = directory
script = importlib.import_module(name)
torch = script.torch
script.fill_compiler_cache(script.Args(**json.loads(args)), script.TaskInfo(*json.loads(task)))
"""


@contextlib.contextmanager
def compile_ahead(run: Run, task: TaskInfo) -> Iterator[None]:
    """On a CPU with several threads, let a second process compile while this one acts at random and pretrains.

    The first plan waits for the second process, and then loads what it compiled from the compiler's cache on disk. If
    the second process fails, this one compiles everything itself.
    """
    is_compiled = run.functions.policy_loss is not policy_loss
    if not is_compiled or run.obs.device.type != "cpu" or torch.get_num_threads() == 1:
        yield
        return
    script = Path(__file__).resolve()
    argv = [script.parent, script.stem, json.dumps(dataclasses.asdict(run.args)), json.dumps(task)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, "-c", COMPILE_AHEAD, *argv], **streams)
    plan_fn = run.functions.plan

    def wait_and_plan(*args: Any) -> Plan:
        if process.poll() is None:
            start = time.perf_counter()
            with announce("waiting for the planner, which a second process compiles"):
                process.wait()
            CompileTimer.seconds += time.perf_counter() - start
        return plan_fn(*args)

    run.functions = run.functions._replace(plan=wait_and_plan)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def fill_compiler_cache(args: Args, task: TaskInfo) -> None:
    """Compile, in a process of its own, what the main process needs after the world model loss."""
    run = Run(args, task, setup_torch(args))
    act(run.functions.plan, run.model, run.obs, run.prev_mean, args, run.make_generator)
    run.functions = run.functions._replace(world_model_loss=world_model_loss)  # eager: the main process compiles it
    run.buffer.start_indices = np.zeros(1, int)  # as if one window were stored; its values do not matter
    for _ in range(10):  # with default flags, bmpc.py reanalyzes in the tenth update
        train_step(run, pretraining=False)


def plan_in_chunks(plan_fn: Callable[..., Plan], get_chunk_size: Callable[[int], int]) -> Callable[..., Plan]:
    """Wrap a plan function so that it plans for get_chunk_size(S) of S states at once. Padding fills the last chunk."""

    def chunked_plan(
        model: nn.Module, policy: nn.Module, obs: Tensor, prev_mean: Tensor, noise: PlanNoise, *args: Any
    ) -> Plan:
        num_states = len(obs)
        size = get_chunk_size(num_states)
        if size == num_states:
            return plan_fn(model, policy, obs, prev_mean, noise, *args)
        padding = -num_states % size
        inputs = [torch.cat([x, x[-1:].expand(padding, *x.shape[1:])]) for x in (obs, prev_mean, *noise)]
        chunks = zip(*(x.split(size) for x in inputs), strict=True)
        plans = []
        for chunk_obs, chunk_mean, *chunk_noise in chunks:
            plans.append(plan_fn(model, policy, chunk_obs, chunk_mean, PlanNoise(*chunk_noise), *args))
        return Plan(*(torch.cat(parts)[:num_states] for parts in zip(*plans, strict=True)))

    return chunked_plan


def clone_outputs(plan_fn: Callable[..., Plan]) -> Callable[..., Plan]:
    """Wrap a plan function so that it returns copies: the next call of a CUDA graph overwrites its outputs."""

    def plan_and_copy(*args: Any) -> Plan:
        torch.compiler.cudagraph_mark_step_begin()
        return Plan(*(x.clone() for x in plan_fn(*args)))

    return plan_and_copy


def start_graph_step(function: Callable) -> Callable:
    """Wrap the first function of an update: it starts a step, during which the outputs of CUDA graphs stay valid."""

    def function_in_new_step(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(*args)

    return function_in_new_step


# --- Checkpoints, log, run directory ----------------------------------------------------------------------------------
#
# Errors of a simulator truncate an episode; those of a video or W&B are warnings; all others end the run.
# Resuming is exact, so only the work since the last checkpoint is repeated. A checkpoint at step s holds the run
# between two steps, before the evaluation and the log entries of step s. A run that is resumed at s truncates its log
# to the entries before s, and then repeats those of s.

CHECKPOINT_FORMAT = 3
FORMAT_2_COMMIT = "1775172"  # the last commit that reads and writes format 2
EXIT_RESUMABLE = 75  # exit code of a run that was asked to stop; the same command resumes it


def checkpoint_contents(run: Run, keep_replay: bool = True) -> dict[str, Any]:
    """Collect everything that the rest of the run depends on.

    keep_replay: include the replay buffer; without it, the run can be evaluated, but not continued.
    """
    return {
        "format": CHECKPOINT_FORMAT,
        "script_name": Path(__file__).name,
        "args": dataclasses.asdict(run.args),
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "buffer": run.buffer.state_dict() if keep_replay else None,
        "metrics": run.metrics,
        "global_step": run.global_step,
        "pretraining_updates": run.pretraining_updates,
        "updates": run.updates,
        "training_seconds": run.training_seconds,
        "obs": run.obs,
        "prev_mean": run.prev_mean,
        "episode": run.episode,
        "episode_return": run.episode_return,
        "finished_episodes": [tuple(episode) for episode in run.finished_episodes],
        "env_errors": run.env_errors,
        "env_errors_in_a_row": run.env_errors_in_a_row,
    }


def restore_run(run: Run, state: dict[str, Any]) -> None:
    """Restore the contents of a checkpoint into a new run with the same arguments."""
    device = run.obs.device
    load_model(run.model, state["model"])
    for optimizer, optimizer_state in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    run.buffer.load_state_dict(state["buffer"])
    run.metrics = {names: (total.to(device), count) for names, (total, count) in state["metrics"].items()}
    run.global_step = state["global_step"]
    run.pretraining_updates = state["pretraining_updates"]
    run.updates = state["updates"]
    run.training_seconds = state["training_seconds"]
    run.obs = state["obs"].to(device)
    run.prev_mean = state["prev_mean"].to(device)
    run.episode = state["episode"]
    run.episode_return = state["episode_return"]
    run.finished_episodes = [FinishedEpisode(*episode) for episode in state["finished_episodes"]]
    run.env_errors = state["env_errors"]
    run.env_errors_in_a_row = state["env_errors_in_a_row"]


def load_model(model: WorldModel, state: dict[str, Tensor]) -> None:
    """Load weights. Raises UsageError, naming a weight, if they do not fit the model."""
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    saved_shapes = {name: tuple(x.shape) for name, x in state.items()}
    for name in sorted(shapes.keys() | saved_shapes.keys()):
        shape, saved_shape = shapes.get(name, "missing"), saved_shapes.get(name, "missing")
        if shape != saved_shape:
            raise UsageError(f"the checkpoint does not fit the model: {name} is {saved_shape} there and {shape} here")
    model.load_state_dict(state)


def save_checkpoint(run: Run, directory: Path, keep_replay: bool = True) -> None:
    """Write checkpoint.pt. Raises RunError, and writes nothing, if a number is not finite or the disk is full."""
    run.mean_metrics()  # checks that all are finite
    is_finite = torch.stack([x.isfinite().all() for x in run.model.state_dict().values()])
    if not to_host(is_finite).all():
        raise RunError("a weight is not finite; the last checkpoint was written before this happened")
    contents = checkpoint_contents(run, keep_replay)
    try:
        atomic_write(directory / "checkpoint.pt", lambda file: torch.save(contents, file))
    except (OSError, RuntimeError) as e:  # torch.save turns an OSError into a RuntimeError about something else
        cause = e
        while not isinstance(cause, OSError) and cause.__context__:
            cause = cause.__context__
        raise RunError(f"the checkpoint cannot be written: {describe(cause)}") from e
    print_line(f"checkpoint at {run.global_step}")


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """Read the checkpoint of a run directory, without executing any code that it may contain.

    Raises UsageError if there is none, RunError if it cannot be used.
    """
    path = directory / "checkpoint.pt"
    if not path.exists():
        raise UsageError(f"{directory} holds no checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
            if archive.testzip() is not None:
                raise ValueError("its checksums do not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "script" in state:  # a key of format 2
            raise ValueError(f"it has an older format; commit {FORMAT_2_COMMIT} of this project reads it")
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"it has format {state['format']}, and this version reads format {CHECKPOINT_FORMAT}")
        unknown_args = state["args"].keys() - {field.name for field in dataclasses.fields(Args)}
        if unknown_args:
            names = ", ".join(sorted(unknown_args))
            raise ValueError(f"another script or version wrote it, with arguments that this one does not have: {names}")
    except Exception as e:  # a damaged file can raise anything
        raise RunError(f"{path} cannot be used: {describe(e)}") from e
    return state


def atomic_write(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file under a temporary name, flush it to disk and rename it. Readers see the old or the new file."""
    tmp_path = path.with_suffix(".tmp")
    try:
        with open(tmp_path, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, path)
    except BaseException:
        tmp_path.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    atomic_write(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


class MetricsLogger:
    """Writes metrics to metrics.csv and TensorBoard, optionally mirrored to Weights & Biases."""

    def __init__(self, directory: Path, args: Args, step: int):
        """Open the log of a run that starts at, or is resumed at, this step: entries from there on are removed."""
        self.action_repeat = args.action_repeat
        path = directory / "metrics.csv"
        lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)[1:] if path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # drops a last line that is only partly written
        try:
            kept_lines = [line for line in lines if int(line.split(",")[0]) < step]
        except ValueError as e:
            raise RunError(f"{path} is damaged: {describe(e)}; repair or move it, then resume the run") from e
        text = "".join(["global_step,env_steps,tag,value\n", *kept_lines])
        atomic_write(path, lambda file: file.write(text.encode()))
        if args.track:
            self.start_wandb(directory, args)
        self.file = open(path, "a", buffering=1, encoding="utf-8")
        rename_future_event_files(directory)
        self.tensorboard = SummaryWriter(str(directory), purge_step=step)

    def start_wandb(self, directory: Path, args: Args) -> None:
        """Mirror TensorBoard to Weights & Biases. A failure is only a warning."""
        try:
            import wandb

            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                config=dataclasses.asdict(args),
                name=directory.name,
                id=wandb_id(directory),
                dir=str(directory),
                resume="allow",
                sync_tensorboard=True,
            )
        except Exception as e:  # not installed, no network, no account
            print_line(f"warning: continuing without Weights & Biases ({describe(e)})", sys.stderr)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Log values by their tags."""
        for tag, value in values.items():
            self.file.write(f"{step},{step * self.action_repeat},{tag},{float(value)!r}\n")
            self.tensorboard.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Flush the log to disk. Called before a checkpoint is written, so that no entry of an earlier step is lost."""
        os.fsync(self.file.fileno())
        self.tensorboard.flush()


def wandb_id(directory: Path) -> str:
    """Return the Weights & Biases id of the run: a random one, made at its first start and kept in its directory."""
    path = directory / "wandb_id.txt"
    if not path.exists():
        atomic_write(path, lambda file: file.write(uuid.uuid4().hex.encode()))
    return path.read_text("utf-8")


def rename_future_event_files(directory: Path) -> None:
    """Let event files from the future sort before a new one: TensorBoard reads them in the order of their names.

    Their names contain the time. Files from the future exist if the clock of the machine was set back.
    """
    prefix = "events.out.tfevents."
    paths = sorted(directory.glob(f"{prefix}*"))
    for i, path in enumerate(paths):
        timestamp, _, rest = path.name.removeprefix(prefix).partition(".")
        latest = int(time.time()) - len(paths) + i
        if int(timestamp) > latest:
            path.rename(directory / f"{prefix}{latest:010d}.{rest}")


def run_directory(args: Args) -> Path:
    """Return runs/<task>__<exp_name>__<seed>[__<run_name>], or the directory given to --resume."""
    if args.resume:
        return Path(args.resume)
    task = re.sub("^dm_control/(.*)-v0$", r"\1", args.env_id.rpartition(":")[2]).replace("/", "_")
    parts = [task, args.exp_name, str(args.seed)] + ([args.run_name] if args.run_name else [])
    return Path("runs") / "__".join(parts)


def lock_directory(directory: Path) -> None:
    """Lock a run directory until this process ends.

    Raises UsageError if another process has locked it, RunError if the file system has no locks.
    """
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)  # a descriptor that is never closed
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # worker processes do not inherit it
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            raise UsageError(f"{directory} is in use by another process") from e
        raise RunError(f"{directory} cannot be locked: {describe(e)}; use a file system that supports locks") from e


def check_resumable(directory: Path, state: dict[str, Any], args: Args) -> None:
    """Raise UsageError if the run in the directory is finished, or if its script or its arguments are different."""
    script, this_script = state.get("script_name"), Path(__file__)  # older checkpoints have no name
    if script not in (None, this_script.name) and this_script.with_name(script).exists():
        raise UsageError(f"{directory} holds a run of {script}; resume it with that script")
    new_run = f"start a new run {'without --resume and ' if args.resume else ''}with --run-name NAME"
    old_args, new_args = dataclasses.asdict(Args(**state["args"])), dataclasses.asdict(args)
    fixed = [name for name, metadata in field_metadata().items() if RESUMABLE not in metadata]
    changed = [f"{name} {old_args[name]} -> {new_args[name]}" for name in fixed if old_args[name] != new_args[name]]
    if changed:
        raise UsageError(f"{directory} holds a run with different arguments ({'; '.join(changed)}); {new_run}")
    step = state["global_step"]
    finished = f"{directory} holds a finished run of {step} decisions"
    if state["buffer"] is None:
        reason = "it was finished with --no-keep-replay, so it cannot be continued"
        raise UsageError(f"{finished}; {reason}; evaluate it with --evaluate {directory}, or {new_run}")
    is_finished = (directory / "finished.json").exists()
    # Without finished.json, a run less than num_envs decisions past --steps was killed in its last evaluation, and is
    # resumed to repeat it. A run that is further past had more --steps before, so it counts as finished
    if step >= args.total_timesteps + (0 if is_finished else args.num_envs):
        advice = f"continue it with more --steps, evaluate it with --evaluate {directory}, or {new_run}"
        raise UsageError(f"{finished}; {advice}")


def has_log_entries(directory: Path) -> bool:
    """Tell whether metrics.csv has a line below its header."""
    path = directory / "metrics.csv"
    return path.exists() and path.read_bytes().count(b"\n") > 1


def open_run_directory(args: Args) -> tuple[Path, dict[str, Any] | None]:
    """Create or reopen the run directory and lock it. Returns it, and the contents of its checkpoint if there is one.

    Raises UsageError if the directory is in use, or holds a finished run, one with different arguments, or one without
    its checkpoint.
    """
    directory = run_directory(args)
    directory.mkdir(parents=True, exist_ok=True)
    lock_directory(directory)
    state = read_checkpoint(directory) if (directory / "checkpoint.pt").exists() else None
    if state:
        check_resumable(directory, state, args)
    elif has_log_entries(directory):  # a new run would overwrite them
        raise UsageError(f"{directory} holds the log of a run without its checkpoint; move it, or use --run-name NAME")
    (directory / "finished.json").unlink(missing_ok=True)
    write_json(directory / "args.json", dataclasses.asdict(args))
    record_start(directory / "versions.json")
    return directory, state


def record_start(path: Path) -> None:
    """Append time, command line, git commit and the versions of Python and all packages to versions.json."""
    starts = []
    if path.exists():
        try:
            starts = json.loads(path.read_text("utf-8"))
        except ValueError:
            damaged_path = path.with_suffix(f".damaged.{time.time_ns()}")
            path.rename(damaged_path)
            print_line(f"warning: {path} is damaged; it was renamed to {damaged_path.name}", sys.stderr)
    start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv}
    packages = (package.metadata for package in importlib.metadata.distributions())  # each access parses a file
    start |= {metadata["Name"]: metadata["Version"] for metadata in packages}
    start |= {"python": sys.version.split()[0], "git_commit": git_commit(Path(__file__).parent)}
    write_json(path, [*starts, start])


def git_commit(directory: Path) -> str | None:
    """Return the commit of a checkout, with "+changes" if it has uncommitted changes. None: there is no checkout."""
    command = ["git", "-C", str(directory), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        english = os.environ | {"LC_ALL": "C", "LANGUAGE": ""}
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=english)
    except OSError:  # git is not installed
        return None
    if result.returncode == 0:
        return result.stdout.strip()
    if "not a git repository" not in result.stderr:
        reason, *_ = result.stderr.strip().splitlines() or [f"git ended with {result.returncode}"]  # by a signal
        print_line(f"warning: the git commit is unknown: {reason}", sys.stderr)
    return None


# --- Progress ---------------------------------------------------------------------------------------------------------


class ProgressBar(tqdm):
    """A progress bar. Without a terminal, it prints a line about every ten seconds."""

    def __init__(self, desc: str, total: int | None = None, initial: int = 0):
        self.has_terminal = sys.stderr.isatty()
        options = {} if self.has_terminal else {"file": open(os.devnull, "w"), "mininterval": 9, "miniters": 1}
        super().__init__(desc=desc, total=total, initial=initial, leave=False, dynamic_ncols=True, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        super().display(msg, pos)
        if not self.has_terminal and msg is None:
            print(self, file=sys.stderr, flush=True)


def crossed_multiple(interval: int, step: int, stride: int) -> bool:
    """Tell whether the last `stride` decisions before `step` reached or passed a multiple of `interval`."""
    return step > 0 and step // interval > (step - stride) // interval


class RunController:
    """Writes checkpoints, evaluates and logs between two steps, and decides when the run ends."""

    def __init__(
        self, run: Run, eval_envs: Envs | None, logger: MetricsLogger, stop_signals: list[int], directory: Path
    ):
        self.run = run
        self.eval_envs = eval_envs
        self.logger = logger
        self.stop_signals = stop_signals  # signal handlers append to it at any time
        self.directory = directory
        self.progress = ProgressBar("decisions", run.args.total_timesteps, run.global_step)
        self.postfix: dict[str, str] = {}
        self.clock_start = self.read_clock()
        self.speed_start = (run.global_step, run.training_seconds)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked the run to stop."""
        return bool(self.stop_signals)

    @staticmethod
    def read_clock() -> float:
        """Return the seconds on a clock that stands still while functions are compiled."""
        return time.perf_counter() - CompileTimer.seconds

    def add_training_seconds(self) -> None:
        """Add the time since clock_start to the training time of the run."""
        now = self.read_clock()
        self.run.training_seconds += now - self.clock_start
        self.clock_start = now

    def reset_sps(self) -> None:
        """Start a new measurement of decisions per second."""
        self.add_training_seconds()
        self.speed_start = (self.run.global_step, self.run.training_seconds)

    def between_steps(self) -> int | None:
        """Do what is due at this step. Returns the exit code if the run ends here."""
        self.add_training_seconds()
        run, args = self.run, self.run.args
        done = run.global_step >= args.total_timesteps
        is_due = lambda interval: interval > 0 and (done or crossed_multiple(interval, run.global_step, args.num_envs))
        if self.stop_requested:
            return self.stop()
        if done or run.global_step == 0 or is_due(args.checkpoint_freq):
            self.save()
        self.log_episodes()
        if is_due(args.eval_freq):
            video_path = self.directory / "videos" / f"{run.global_step}.mp4"
            returns = evaluate(run, self.eval_envs, self.stop_signals, video_path)
            if returns is None:
                return self.stop()
            self.logger.add(run.global_step, returns)
            self.postfix["evaluation"] = f"{returns['eval/episodic_return']:.1f}"
        just_pretrained = run.global_step - args.num_envs < args.learning_starts <= run.global_step
        if is_due(args.log_freq) or (args.log_freq and just_pretrained):
            self.log_metrics()
        if is_due(args.eval_freq) or is_due(args.log_freq):
            updates = run.pretraining_updates + run.updates
            counters = {"charts/updates": updates, "charts/training_seconds": run.training_seconds}
            self.logger.add(run.global_step, counters)
        if done:
            self.logger.flush()
            write_json(self.directory / "finished.json", {"total_timesteps": args.total_timesteps})
            if not args.keep_replay:
                save_checkpoint(run, self.directory, keep_replay=False)
            return 0
        self.progress.set_postfix(self.postfix, refresh=False)
        self.progress.update(run.global_step - self.progress.n)
        self.clock_start = self.read_clock()  # excludes evaluations and checkpoints
        return None

    def save(self) -> None:
        """Flush the log, then write a checkpoint."""
        self.logger.flush()
        save_checkpoint(self.run, self.directory)

    def stop(self) -> int:
        """Write a checkpoint and return the exit code of a run that was asked to stop."""
        self.save()
        return EXIT_RESUMABLE

    def log_episodes(self) -> None:
        """Log and print the training episodes that ended with the last step."""
        step = self.run.global_step
        for env_id, episode, episode_return, length, error in self.run.finished_episodes:
            name = f"step {step}: environment {env_id}, episode {episode}"
            if error:
                print_line(f"warning: {name}: truncated, because the simulator failed ({error})", sys.stderr)
                self.logger.add(step, {"charts/env_errors": self.run.env_errors})
            self.logger.add(step, {"charts/episodic_return": episode_return, "charts/episodic_length": length})
            print_line(f"{name}: return {episode_return:.1f}, {length} decisions")
            self.postfix["return"] = f"{episode_return:.1f}"

    def log_metrics(self) -> None:
        """Log the means of the metrics, and the decisions per second, since they were last logged."""
        run = self.run
        values = run.mean_metrics()
        start_step, start_seconds = self.speed_start
        if run.global_step > start_step:
            values["charts/SPS"] = (run.global_step - start_step) / (run.training_seconds - start_seconds)
        self.logger.add(run.global_step, values)
        run.metrics.clear()
        self.speed_start = (run.global_step, run.training_seconds)


# --- Arguments and their checks ---------------------------------------------------------------------------------------


def field_metadata() -> dict[str, list[Any]]:
    """Return for each argument the metadata of its type: its Constraint, and RESUMABLE."""
    metadata = {}
    for name, hint in get_type_hints(Args, include_extras=True).items():
        metadata[name] = []
        for type_ in (hint, *get_args(hint)):  # in `PositiveInt | None`, the constraint belongs to a part of the type
            metadata[name] += getattr(type_, "__metadata__", ())
    return metadata


def parse_args(argv: list[str] | None = None) -> Args:
    """Parse the command line. The defaults are those of a preset, or of the run given to --resume or --evaluate."""
    argv = sys.argv[1:] if argv is None else argv
    flags = {"--episodic": "--episodic=True", "--no-episodic": "--episodic=False"}
    values = ("True", "False", "None")  # tyro requires one of them after --episodic, which defaults to None
    pairs = itertools.pairwise([*argv, ""])
    argv = [word if following in values else flags.get(word, word) for word, following in pairs]
    args = tyro.cli(Args, args=argv)  # finds the preset or run that supplies the defaults
    defaults = PRESETS[args.preset]
    if directory := args.evaluate or args.resume:
        defaults = read_checkpoint(checkpoint_directory(directory))["args"] | {"resume": "", "evaluate": ""}
    if defaults:
        args = tyro.cli(Args, args=argv, default=Args(**defaults))
    paths = {name: str(checkpoint_directory(path)) for name in ("resume", "evaluate") if (path := getattr(args, name))}
    return dataclasses.replace(args, **paths)


def checkpoint_directory(path: str) -> Path:
    """Return the run directory given to --resume or --evaluate, as a directory or as its checkpoint.pt."""
    return Path(path).parent if Path(path).name == "checkpoint.pt" else Path(path)


def check_constraints(args: Args) -> None:
    """Raise UsageError if an argument violates the constraint of its field."""
    for name, metadata in field_metadata().items():
        value = getattr(args, name)
        for item in metadata:
            if value is not None and isinstance(item, Constraint) and not item.is_satisfied(value):
                raise UsageError(f"--{name.replace('_', '-')} is {value!r}; it must be {item.description}")


def resolve_args(args: Args) -> tuple[Args, TaskInfo]:
    """Check the arguments, fill in those that are None from the task and other arguments, and inspect the task.

    Raises UsageError if an argument is not valid.
    """
    check_constraints(args)
    env_id = resolve_env_id(args.env_id)
    action_repeat = args.action_repeat or (2 if env_id.startswith("dm_control/") else 1)
    episodic = not env_id.startswith("dm_control/") if args.episodic is None else args.episodic
    args = dataclasses.replace(args, env_id=env_id, action_repeat=action_repeat, episodic=episodic)
    task = inspect_task(args)
    if args.discount is None:
        args = dataclasses.replace(args, discount=default_discount(args, task))
    args = resolve_algorithm_args(args)
    for is_satisfied, message in (*check_args(args, task), *check_algorithm_args(args)):
        if not is_satisfied:
            raise UsageError(message)
    return args, task


def default_discount(args: Args, task: TaskInfo) -> float:
    """Compute the discount from the length of an episode (TD-MPC2). Raises UsageError if it has no time limit."""
    if task.episode_length is None:
        raise UsageError(f"{args.env_id} has no time limit to compute the discount from; give --discount")
    frac = task.episode_length / args.discount_denom
    return min(max((frac - 1) / frac, args.discount_min), args.discount_max)


def check_args(args: Args, task: TaskInfo) -> Iterable[tuple[bool, str]]:
    """Yield a pair (is it satisfied, message if not) for each condition on several arguments, or on the task."""
    T, n = args.horizon, task.episode_length
    yield args.num_bins > 1, f"--num-bins is {args.num_bins}; two-hot distributions need at least 2"
    yield args.vmin < args.vmax, f"--vmin is {args.vmin}, not below --vmax {args.vmax}"
    yield (
        args.log_std_min <= args.log_std_max,
        f"--log-std-min is {args.log_std_min}, above --log-std-max {args.log_std_max}",
    )
    yield args.min_std <= args.max_std, f"--min-std is {args.min_std}, above --max-std {args.max_std}"
    yield (
        args.discount_min <= args.discount_max,
        f"--discount-min is {args.discount_min}, above --discount-max {args.discount_max}",
    )
    yield (
        args.num_elites <= args.num_samples,
        f"--num-elites is {args.num_elites}, above --num-samples {args.num_samples}",
    )
    yield (
        args.num_pi_trajs < args.num_samples,
        f"--num-pi-trajs is {args.num_pi_trajs}, not below --num-samples {args.num_samples}",
    )
    yield (
        args.latent_dim % args.simnorm_dim == 0,
        f"--latent-dim is {args.latent_dim}, not a multiple of --simnorm-dim {args.simnorm_dim}",
    )
    yield (
        args.learning_starts >= args.num_envs * T,
        f"--learning-starts is {args.learning_starts}; the first window (--horizon {T}) needs {args.num_envs * T}",
    )
    yield (
        args.buffer_size // args.num_envs >= T + 2,  # T is the minimum; 2 is an arbitrary margin
        f"--buffer-size is {args.buffer_size}; {args.num_envs} environments need at least {args.num_envs * (T + 2)}",
    )
    yield n is None or n >= T, f"an episode of {args.env_id} has {n} decisions, fewer than --horizon {T}"


# --- Running ----------------------------------------------------------------------------------------------------------


def catch_stop_signals() -> list[int]:
    """Install signal handlers that append to the list returned. After a first signal, Ctrl-C ends the process at once.

    Worker processes inherit them, so that they ignore the signals: the main process alone decides when to stop.
    """
    stop_signals: list[int] = []
    main_process = os.getpid()

    def handle_signal(number: int, frame: Any) -> None:
        if not stop_signals and os.getpid() == main_process:
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping; another Ctrl-C ends the process at once\n")
        stop_signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, handle_signal)
    return stop_signals


def make_eval_envs(args: Args) -> Envs:
    """Make the environments for evaluations: the smallest number that needs no more rounds than num_envs."""
    rounds = math.ceil(args.eval_episodes / args.num_envs)
    return Envs(args, math.ceil(args.eval_episodes / rounds), args.capture_video)


def evaluate_checkpoint(args: Args, task: TaskInfo, stop_signals: list[int]) -> int:
    """Evaluate the model in a run's checkpoint. Returns the exit code."""
    with make_eval_envs(args) as eval_envs:  # worker processes are forked before torch starts threads or CUDA
        device = setup_torch(args)
        directory = Path(args.evaluate)
        state = read_checkpoint(directory)
        run = Run(dataclasses.replace(args, buffer_size=args.num_envs), task, device)  # no replay data is needed
        run.global_step = state["global_step"]
        print_line(f"evaluating {directory} at step {run.global_step}, on {device}")
        load_model(run.model, state["model"])
        video_path = directory / "videos" / f"evaluate-{run.global_step}.mp4"
        returns = evaluate(run, eval_envs, stop_signals, video_path)
        return 0 if returns else EXIT_RESUMABLE


def run_training(args: Args, task: TaskInfo, stop_signals: list[int]) -> int:
    """Start or resume a run. Returns the exit code."""
    with contextlib.ExitStack() as stack:  # worker processes are forked before torch starts threads or CUDA
        envs = stack.enter_context(Envs(args, args.num_envs))
        eval_envs = stack.enter_context(make_eval_envs(args)) if args.eval_freq else None
        device = setup_torch(args)
        if device.type == "cpu" and args.preset == "full":
            print_line("a full-size run takes days on a CPU; --preset small is made for a CPU")
        directory, state = open_run_directory(args)
        run = Run(args, task, device)
        print_line(f"{directory}, on {device}, with a replay buffer of {run.buffer.rows.nbytes / 1e6:.1f} MB")
        if not state:  # a resumed run usually finds everything in the compiler's cache
            stack.enter_context(compile_ahead(run, task))
        try:
            if state:
                restore_run(run, state)
                del state  # it holds a copy of the replay buffer
                print_line(f"resuming at step {run.global_step}")
            if args.profile:
                stack.enter_context(profile(directory / f"trace-{run.global_step}.json"))
            start_run_episodes(run, envs)
            logger = MetricsLogger(directory, args, run.global_step)
            return train(run, envs, RunController(run, eval_envs, logger, stop_signals, directory))
        except Exception as e:
            return raise_with_step(run, e, stop_signals, directory)


def profile(path: Path) -> torch.profiler.profile:
    """Make a profiler that writes its trace to a file."""
    return torch.profiler.profile(on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)))


def raise_with_step(run: Run, error: Exception, stop_signals: list[int], directory: Path) -> int:
    """Raise the error again, with the step it occurred at.

    The traceback of an unexpected error is written to error.txt. After a stop signal, such an error is only a warning,
    and the exit code is returned.
    """
    with contextlib.suppress(RuntimeError):  # after an error of CUDA, nothing can be read from the device
        try:
            run.mean_metrics()
        except RunError as e:  # a loss that is not finite is the cause of whatever failed later
            raise RunError(f"step {run.global_step}: {e}") from error
    if isinstance(error, (UsageError, RunError, OSError)):
        raise type(error)(f"step {run.global_step}: {error}") from error
    if is_out_of_memory(error):
        raise error
    path = directory / "error.txt"
    with contextlib.suppress(OSError):
        path.write_text("".join(traceback.format_exception(error)), "utf-8")
    message = f"step {run.global_step}: {describe_with_place(error)}; the traceback is in {path}"
    if stop_signals:  # for example, the signal also interrupted a compiler process
        print_line(f"warning: {message}", sys.stderr)
        return EXIT_RESUMABLE  # the run resumes from the last checkpoint
    raise RunError(message) from error


def describe_with_place(error: Exception) -> str:
    """Describe an exception and where it was raised, in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{describe(error)} (in {place.name}, {Path(place.filename).name}, line {place.lineno})"


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory is full. On a CPU, in CUDA's libraries and in compilations, torch raises other errors."""
    messages = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_known or any(message in str(error) for message in messages)


def select_renderer() -> str:
    """Return the name of the renderer that MUJOCO_GL gives, or of the first one that works."""
    if "MUJOCO_GL" in os.environ:
        return os.environ["MUJOCO_GL"]
    code = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    for name in (["glfw"] if "DISPLAY" in os.environ else []) + ["egl", "osmesa"]:
        environ = os.environ | {"MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True).returncode == 0:
            return name
    return "disable"


def print_error(error: Exception | str) -> None:
    """Print an error in one line."""
    print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)


def open_standard_descriptors() -> None:
    """Open /dev/null for standard input, output and error if they are closed, also in child processes.

    Otherwise files that are opened later would get these descriptors, and messages would be written into them: into the
    shared memory of the observations, for example.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    open_standard_descriptors()
    streams = [OutputStream(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            return run_command(argv)
        except UsageError as e:
            print_error(e)
            return 2
        except (RunError, OSError) as e:
            print_error(e)
            return 1
        except Exception as e:
            smaller = "a smaller --buffer-size, --num-samples or --batch-size"
            advice = f"out of memory; try {smaller}; if the run has begun, add --run-name NAME to start a new one"
            print_error(advice if is_out_of_memory(e) else describe_with_place(e))
            return 1
        finally:
            for worker in multiprocessing.active_children():
                worker.kill()


def run_command(argv: list[str] | None) -> int:
    """Parse the command line and train or evaluate. Returns the exit code."""
    warnings.simplefilter("ignore")  # simulators and torch's compiler warn about what users cannot change
    args = parse_args(argv)
    with contextlib.suppress(ImportError):  # Triton's LLVM crashes if Mesa's, which MuJoCo loads, is loaded first
        import triton._C.libtriton  # noqa: F401
    renderer = select_renderer() if args.capture_video else "disable"
    os.environ["MUJOCO_GL"] = "disable"  # dm_control would initialize EGL here, see load_renderer
    args, task = resolve_args(args)
    os.environ["MUJOCO_GL"] = renderer
    stop_signals = catch_stop_signals()
    print_line(f"{args.env_id}, observation {task.obs_dim}, action {task.action_dim}: starting the simulators ...")
    if args.evaluate:
        return evaluate_checkpoint(args, task, stop_signals)
    return run_training(args, task, stop_signals)


if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # Log files are read while the run goes on. surrogateescape: names that are not UTF-8 are printed as they are
        stream.reconfigure(encoding="utf-8", errors="surrogateescape", line_buffering=True)
    sys.exit(main())
