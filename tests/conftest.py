"""What the tests share: small sizes, a model whose every weight matters, and environments without simulators."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes the tests start
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import runs  # noqa: E402
import torch  # noqa: E402

import bmpc  # noqa: E402

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background: what the tests start must hear Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)

CPU = torch.device("cpu")
TASK = bmpc.TaskInfo(obs_dim=4, action_dim=2, episode_length=None)
SMALL = dict(
    device="cpu", compile=False, episodic=False, action_repeat=1, discount=0.9, num_envs=2, total_timesteps=40,
    learning_starts=12, eval_freq=0, log_freq=0, checkpoint_freq=0, eval_episodes=3, batch_size=12, buffer_size=1000,
    reanalyze_batch_size=3, enc_dim=16, mlp_dim=12, latent_dim=16, num_enc_layers=2, num_q=3, simnorm_dim=4,
    num_samples=20, num_elites=6, num_pi_trajs=4, iterations=3,
)  # fmt: skip


def small_args(script=bmpc, **changes):
    """A script's Args as resolve_args leaves them, nothing None that must not be, at sizes a slow oracle can follow."""
    given = SMALL | changes
    for name in ("horizon", "log_std_min", "log_std_max"):
        given.setdefault(f"reanalyze_{name}", given.get(name, getattr(bmpc.Args, name)))
    known = script.Args.__dataclass_fields__.keys() | changes.keys()  # tdmpc2.py has nothing to reanalyze
    return script.Args(**{name: value for name, value in given.items() if name in known})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def named(seed=0):
    """Generators by purpose, as Run.make_generator makes them at one point of a run."""
    return lambda purpose: bmpc.seeded_generator(seed, purpose, device=CPU)


def make_model(args, task=TASK, seed=0, std=0.3, script=bmpc):
    """A script's world model with large random weights everywhere, zero heads, biases, targets and EMA included.

    Where it knows of terminations, it ends half of the episodes at each step.
    """
    model, rng = script.WorldModel(task, args, generator(seed)), generator(seed + 1)
    normal = lambda *shape: torch.randn(shape, generator=rng)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * normal(*p.shape))
        if model.termination:
            z = model.encoder(normal(1, 64, task.obs_dim))
            logits = model.termination(model.dynamics(z, normal(1, 64, task.action_dim).clamp(-1, 1)))
            model.termination.layers[-1].bias -= logits.median()
    return model


def make_batch(args, task=TASK, seed=0, script=bmpc):
    """A batch of noise. With two policies, their experts are side by side."""
    rng, T, B, A = generator(seed), args.horizon, args.batch_size, task.action_dim
    normal = lambda *shape: torch.randn(shape, generator=rng)
    means, stds = [], []
    for _ in range(1 + getattr(args, "dual_policy_enabled", False)):
        means.append(normal(T, B, A).clamp(-1, 1))
        stds.append(0.05 + torch.rand(T, B, A, generator=rng))
    obs = normal(T + 1, B, task.obs_dim)
    fields = dict(
        obs=obs[:T],
        next_obs=obs[1:],
        action=normal(T, B, A).clamp(-1, 1),
        reward=3 * normal(T, B),
        terminated=(torch.rand(T, B, generator=rng) < 0.3) * 1.0,
        expert=bmpc.Expert(torch.cat(means, -1), torch.cat(stds, -1)),
        index=torch.arange(T * B).view(T, B),
    )
    return script.Batch(**{name: fields[name] for name in script.Batch._fields})  # tdmpc2.py has no expert


def stack_expert(expert):
    """The mean and std of each policy's expert as one tensor, (..., 2 x policies, A)."""
    parts = [part.split(TASK.action_dim, -1) for part in expert]  # means, stds
    return torch.stack([x for policy in zip(*parts) for x in policy], -2)


@pytest.fixture
def double():
    """Double precision, so that an oracle can be held against the code to many digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class FakeEnvs:
    """bmpc.Envs without processes: environment i's episodes last lengths[i] decisions; an observation names itself.

    An observation is (environment, step within the episode, the seed's fraction of 2^32, 1), a reward the environment
    plus an eighth of the step. Episodes of environments in `terminal` end by termination, the others by truncation.
    """

    def __init__(self, lengths, terminal=(), events=None, seed=1):
        self.num_envs, self.lengths, self.terminal, self.own = len(lengths), lengths, terminal, seed
        self.step, self.seed = np.zeros(len(lengths), int), np.zeros(len(lengths))
        self.sent, self.begun = [], []  # actions, and (environment, seed) of every episode
        self.events = [] if events is None else events
        self.call = lambda name: [np.zeros((8, 8, 3), np.uint8)] * self.num_envs

    def obs(self):
        columns = [np.arange(self.num_envs), self.step, self.seed / 2**32, np.ones(self.num_envs)]
        return np.stack(columns, 1).astype(np.float32)

    def start_episodes(self, mask, episodes, obs):
        seeds = [bmpc.derive_seed(self.own, *name) for name in episodes]
        for i in np.flatnonzero(mask):
            self.step[i], self.seed[i] = 0, seeds[i]
            self.begun.append((int(i), seeds[i]))
        return np.where(mask[:, None], self.obs(), obs)

    def step_async(self, action):
        self.events.append("step_async")
        self.sent.append(np.array(action))

    def step_wait(self):
        self.events.append("step_wait")
        self.step += 1
        ended = self.step == self.lengths
        terminal = np.isin(np.arange(self.num_envs), self.terminal)
        reward = np.arange(self.num_envs) + 0.125 * self.step
        return self.obs(), reward, ended & terminal, ended & ~terminal, [None] * self.num_envs


class FakePlanner:
    """Stands for `plan` and keeps what it was asked. State n's answer is n and a fraction that names the part."""

    def __init__(self, script=bmpc):
        self.script, self.obs, self.previous, self.policies, self.args, self.coefs = script, [], [], [], [], []
        self.answers, self.states = [], 0

    def __call__(self, model, policy, obs, mean, noise, args, *coef):
        S, T, A = mean.shape
        self.obs.append(obs.clone())
        self.previous.append(mean.clone())
        self.policies.append(policy)
        self.args.append(args)
        self.coefs += coef
        n = self.states + torch.arange(float(S))[:, None].expand(-1, A)
        self.states += S
        new, report = n[:, None] + 0.4 + torch.arange(T)[:, None] / 100, [torch.zeros(S)] * (3 * len(coef))
        self.answers.append(self.script.Plan(n + 0.1, n + 0.2, n + 0.3, new, n + 0.5, n[:, 0], *report))
        return self.answers[-1]


def start(args, envs, functions=None, script=bmpc):
    """A run on fake environments, before its first decision."""
    run = script.Run(args, TASK, CPU)
    run.functions = functions or script.Functions()
    script.start_run_episodes(run, envs)
    return run


def train(run, envs, directory, eval_envs=None, script=bmpc):
    """The whole of this run; what it writes is in the directory."""
    directory.mkdir(exist_ok=True)
    log = script.MetricsLogger(directory, run.args, run.global_step)
    assert script.train(run, envs, script.RunController(run, eval_envs, log, [], directory)) == 0
    log.flush()


def run_loop(args, envs, directory, functions=None, script=bmpc):
    """A whole run of train on fake environments, at its end."""
    run = start(args, envs, functions, script)
    train(run, envs, directory, script=script)
    return run


def same(a, b):
    """Whether two trees of tensors are equal bit for bit."""
    return runs.differences(a, b) == []
