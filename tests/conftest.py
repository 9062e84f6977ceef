"""What the tests share: small sizes, a model whose every weight matters, and environments without simulators."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes the tests start
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import bmpc  # noqa: E402

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests in the background: what they start must hear Ctrl-C all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)

TASK = bmpc.TaskInfo(obs_dim=4, action_dim=2, episode_length=None)
SMALL = dict(
    device="cpu", compile=False, action_repeat=1, discount=0.9, num_envs=2, total_timesteps=40, learning_starts=12,
    eval_freq=0, log_freq=0, checkpoint_freq=0, eval_episodes=3, batch_size=12, reanalyze_batch_size=3, enc_dim=16,
    mlp_dim=12, latent_dim=16, num_enc_layers=2, num_q=3, simnorm_dim=4, num_samples=20, num_elites=6, num_pi_trajs=4,
    iterations=3,
)  # fmt: skip


def small_args(**changes) -> bmpc.Args:
    """Args as fill_in leaves them, nothing None that must not be, at sizes a slow oracle can follow."""
    return bmpc.Args(**(SMALL | changes))


def flags(**changes) -> list[str]:
    """A command line, as strings, of small sizes and these changes."""
    words = []
    for name, value in ({k: v for k, v in SMALL.items() if k not in ("discount", "action_repeat")} | changes).items():
        option = name.replace("_", "-")
        words += [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return words


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model(args, task: bmpc.TaskInfo = TASK, seed: int = 0, std: float = 0.3, script=bmpc):
    """A script's world model with large random weights everywhere, zero heads, biases, targets and EMA included."""
    model = script.WorldModel(task, args, generator(seed))
    rng = generator(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn(p.shape, generator=rng))
    return model


def make_batch(args: bmpc.Args, task: bmpc.TaskInfo = TASK, seed: int = 0) -> bmpc.Batch:
    """A batch of noise."""
    rng, T, B, A = generator(seed), args.horizon, args.batch_size, task.action_dim
    normal = lambda *shape: torch.randn(shape, generator=rng)
    return bmpc.Batch(
        obs=normal(T + 1, B, task.obs_dim),
        action=normal(T, B, A).clamp(-1, 1),
        reward=3 * normal(T, B),
        terminated=(torch.rand(T, B, generator=rng) < 0.3) * 1.0,
        expert=torch.stack([normal(T, B, A).clamp(-1, 1), 0.05 + torch.rand(T, B, A, generator=rng)], 2),
        rows=torch.arange(T * B).view(T, B),
    )


@pytest.fixture
def double():
    """Double precision, so that an oracle can be held against the code to many digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class FakeEnvs:
    """bmpc.Envs without processes: environment i's episodes last lengths[i] decisions, and an observation names itself.

    An observation is (environment, step within the episode, the seed's fraction of 2^32, 1). Episodes of the environments
    in `terminal` end by termination, the others by truncation.
    """

    def __init__(self, lengths: list[int], terminal: tuple = (), events: list | None = None):
        self.num_envs, self.lengths, self.terminal = len(lengths), lengths, terminal
        self.step, self.seed = np.zeros(len(lengths), int), np.zeros(len(lengths))
        self.sent, self.begun = [], []  # actions, and (environment, seed) of every episode
        self.events = [] if events is None else events

    def obs(self) -> np.ndarray:
        columns = [np.arange(self.num_envs), self.step, self.seed / 2**32, np.ones(self.num_envs)]
        return np.stack(columns, 1).astype(np.float32)

    def reset(self, mask, seeds, **options):
        for i in np.flatnonzero(mask):
            self.step[i], self.seed[i] = 0, seeds[i]
            self.begun.append((int(i), seeds[i]))
        return self.obs(), np.zeros(self.num_envs, np.int64)

    def step_async(self, action):
        self.events.append("step_async")
        self.sent.append(np.array(action))

    def step_wait(self):
        self.events.append("step_wait")
        self.step += 1
        ended = self.step == self.lengths
        terminal = np.isin(np.arange(self.num_envs), self.terminal)
        reward = np.arange(self.num_envs) + 0.125 * self.step
        return self.obs(), reward, ended & terminal, ended & ~terminal


class NeverStop:
    requested = False


def start(args: bmpc.Args, envs: FakeEnvs, functions: bmpc.Functions = bmpc.Functions()):
    """A run on fake environments, before its first decision: (Training, Progress)."""
    t, p = bmpc.set_up(args, TASK, torch.device("cpu"))
    t = t._replace(functions=functions)
    bmpc.begin_episodes(t, p, envs, resuming=False)
    return t, p


def run_loop(args: bmpc.Args, envs: FakeEnvs, directory: Path, functions: bmpc.Functions = bmpc.Functions()):
    """A whole run of bmpc.train on fake environments: (Training, Progress) at its end."""
    directory.mkdir(exist_ok=True)
    t, p = start(args, envs, functions)
    assert bmpc.train(t, p, envs, None, bmpc.Log(directory, 1), NeverStop(), directory) == 0
    return t, p


def same(a, b) -> bool:
    """Whether two trees of tensors are equal bit for bit."""
    a, b = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def copied(module: torch.nn.Module) -> dict:
    return {name: x.clone() for name, x in module.state_dict().items()}


def replace(args: bmpc.Args, **changes) -> bmpc.Args:
    return dataclasses.replace(args, **changes)
