"""Helpers of the tests: small sizes, models with random weights, and environments without simulators."""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that the tests start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # is read once, at the first product on a GPU
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import runs  # noqa: E402
import torch  # noqa: E402

import bmpc  # noqa: E402

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job, whose processes would inherit this
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
    """Make a script's Args as resolve_args returns them, with sizes that are small enough for the slow oracle."""
    values = SMALL | changes
    for name in ("horizon", "log_std_min", "log_std_max"):
        values.setdefault(f"reanalyze_{name}", values.get(name, getattr(bmpc.Args, name)))
    known = script.Args.__dataclass_fields__.keys() | changes.keys()  # tdmpc2.py has no flags of reanalyze
    return script.Args(**{name: value for name, value in values.items() if name in known})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generator_factory(seed=0):
    """Make a function that makes a generator for a purpose, as Run.make_generator does at one step of a run."""
    return lambda purpose: bmpc.seeded_generator(seed, purpose, device=CPU)


def make_model(args, task=TASK, seed=0, std=0.3, script=bmpc):
    """Make a script's world model with large random weights.

    Heads and biases that are initialized with zeros, and the target and EMA networks, get random weights too. If there
    is a termination head, it predicts the end of half of the episodes at each step.
    """
    model = script.WorldModel(task, args, generator(seed))
    rng = generator(seed + 1)
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
    """Make a batch of random numbers. With two policies, their experts are side by side."""
    rng = generator(seed)
    T, B, A = args.horizon, args.batch_size, task.action_dim
    num_policies = 2 if getattr(args, "dual_policy_enabled", False) else 1
    normal = lambda *shape: torch.randn(shape, generator=rng)
    means, stds = [], []
    for _ in range(num_policies):
        means.append(normal(T, B, A).clamp(-1, 1))
        stds.append(0.05 + torch.rand(T, B, A, generator=rng))
    obs = normal(T + 1, B, task.obs_dim)
    fields = dict(
        obs=obs[:T],
        next_obs=obs[1:],
        action=normal(T, B, A).clamp(-1, 1),
        reward=3 * normal(T, B),
        terminated=(torch.rand(T, B, generator=rng) < 0.3).to(obs.dtype),
        expert=bmpc.Expert(torch.cat(means, -1), torch.cat(stds, -1)),
        index=torch.arange(T * B).view(T, B),
    )
    return script.Batch(**{name: fields[name] for name in script.Batch._fields})  # tdmpc2.py has no expert


def stack_expert(expert):
    """Stack mean and std of the expert, or of each policy's expert: (..., 2 x policies, A)."""
    means, stds = (part.split(TASK.action_dim, -1) for part in expert)
    return torch.stack([x for mean_and_std in zip(means, stds) for x in mean_and_std], -2)


def pytest_collection_modifyitems(items):
    """Start the longest test first, so that the others are not finished long before it."""
    items.sort(key=lambda item: "test_compiled_functions_match_eager[cpu]" not in item.name)


@pytest.fixture
def double():
    """Use double precision, so that results can be compared with the oracle's to many digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class FakeEnvs:
    """A replacement for bmpc.Envs without processes. Episodes of environment i have lengths[i] decisions.

    An observation is (environment, step of the episode, seed of the episode / 2^32, 1), which identifies it. A reward
    is environment + step / 8. Episodes of the environments in `terminal` end by termination, the others by truncation.
    """

    def __init__(self, lengths, terminal=(), events=None, seed=1):
        self.num_envs = len(lengths)
        self.lengths = lengths
        self.terminal = terminal
        self.run_seed = seed
        self.step = np.zeros(len(lengths), int)  # of the current episode of each environment
        self.seed = np.zeros(len(lengths))  # of the current episode of each environment
        self.sent = []  # the actions of every step
        self.episode_starts = []  # environment and seed of every episode
        self.events = [] if events is None else events
        self.call = lambda name: [np.zeros((8, 8, 3), np.uint8)] * self.num_envs

    def obs(self):
        columns = [np.arange(self.num_envs), self.step, self.seed / 2**32, np.ones(self.num_envs)]
        return np.stack(columns, 1).astype(np.float32)

    def start_episodes(self, mask, episode_keys, obs):
        seeds = [bmpc.derive_seed(self.run_seed, *key) for key in episode_keys]
        for i in np.flatnonzero(mask):
            self.step[i] = 0
            self.seed[i] = seeds[i]
            self.episode_starts.append((int(i), seeds[i]))
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
    """A replacement for `plan` that records its arguments and results.

    The plan of the n-th state, counted over all calls, consists of n plus a fraction that identifies the field.
    """

    def __init__(self, script=bmpc):
        self.script = script
        self.obs, self.prev_means, self.policies, self.args, self.std_coefs = [], [], [], [], []  # arguments
        self.plans = []  # results
        self.num_states = 0

    def __call__(self, model, policy, obs, prev_mean, noise, args, *std_coef):
        S, T, A = prev_mean.shape
        self.obs.append(obs.clone())
        self.prev_means.append(prev_mean.clone())
        self.policies.append(policy)
        self.args.append(args)
        self.std_coefs += std_coef
        n = self.num_states + torch.arange(float(S))[:, None].expand(-1, A)
        self.num_states += S
        mean = n[:, None] + 0.4 + torch.arange(T)[:, None] / 100
        ensemble_fields = [torch.zeros(S)] * 3 if std_coef else []
        self.plans.append(self.script.Plan(n + 0.1, n + 0.2, n + 0.3, mean, n + 0.5, n[:, 0], *ensemble_fields))
        return self.plans[-1]


def start(args, envs, functions=None, script=bmpc):
    """Make a run on fake environments, before its first decision."""
    run = script.Run(args, TASK, CPU)
    run.functions = functions or script.Functions()
    script.start_run_episodes(run, envs)
    return run


def train(run, envs, directory, eval_envs=None, script=bmpc):
    """Train until the run ends, with its output in the directory."""
    directory.mkdir(exist_ok=True)
    log = script.MetricsLogger(directory, run.args, run.global_step)
    assert script.train(run, envs, script.RunController(run, eval_envs, log, [], directory)) == 0
    log.flush()


def run_loop(args, envs, directory, functions=None, script=bmpc):
    """Make a run on fake environments and train until it ends. Returns the run."""
    run = start(args, envs, functions, script)
    train(run, envs, directory, script=script)
    return run


def record_generators(script, monkeypatch):
    """Return a list to which each generator that a run makes will add its purpose and the counters at that time."""
    keys = []
    make_generator = script.Run.make_generator

    def recorded_make_generator(run, purpose):
        keys.append((purpose, run.global_step, run.pretraining_updates, run.updates))
        return make_generator(run, purpose)

    monkeypatch.setattr(script.Run, "make_generator", recorded_make_generator)
    return keys


def same(a, b):
    """Tell whether two trees of tensors are equal bit for bit."""
    return runs.differences(a, b) == []
