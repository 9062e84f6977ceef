"""The replay buffer against plain lists: what is stored, which windows exist, and how they are drawn."""

import random
from collections import Counter

import pytest
import torch
from conftest import TASK, FakeEnvs, run_loop, small_args

import bmpc

CPU = torch.device("cpu")


class Lists:
    """The same buffer as lists: every row ever opened, by environment, with the episode it belongs to."""

    def __init__(self, num_envs, capacity, horizon):
        self.capacity, self.horizon = capacity, horizon
        self.rows = [[] for _ in range(num_envs)]  # dicts; a row without an action waits for one or ended its episode
        self.episode = [-1] * num_envs

    def begin(self, i, obs):
        self.episode[i] += 1
        self.rows[i].append({"episode": self.episode[i], "obs": obs})

    def add(self, i, next_obs, **row):
        self.rows[i][-1] |= row
        self.rows[i].append({"episode": self.episode[i], "obs": next_obs})

    def windows(self):
        """(environment, number of the first row) of every T + 1 consecutive rows of one episode that are all there."""
        found = set()
        for i, rows in enumerate(self.rows):
            oldest = max(0, len(rows) - self.capacity)
            for first in range(oldest, len(rows) - self.horizon):
                if rows[first]["episode"] == rows[first + self.horizon]["episode"]:
                    found.add((i, first))
        return found


class Both:
    """A ReplayBuffer and its list model fed with the same rows, every number of which is unique."""

    def __init__(self, lengths, capacity, horizon, seed=0):
        self.E, self.random = len(lengths), random.Random(seed)
        self.buffer = bmpc.ReplayBuffer(self.E, capacity, TASK, horizon, CPU)
        self.lists = Lists(self.E, capacity, horizon)
        self.lengths, self.left, self.count = lengths, [0] * self.E, 0
        self.begin([True] * self.E)

    def number(self):
        self.count += 1
        return float(self.count)

    def begin(self, mask):
        obs = [[self.number()] * TASK.obs_dim for _ in range(self.E)]
        for i in range(self.E):
            if mask[i]:
                self.lists.begin(i, obs[i])
                self.left[i] = self.random.choice(self.lengths[i])
        self.buffer.begin(torch.tensor(mask), torch.tensor(obs))

    def step(self):
        rows = []
        for i in range(self.E):
            self.left[i] -= 1
            action, next_obs = [self.number()] * TASK.action_dim, [self.number()] * TASK.obs_dim
            expert = [[self.number()] * TASK.action_dim, [self.number()] * TASK.action_dim]
            rows.append((action, expert, self.number(), float(self.left[i] == 0), next_obs))
            self.lists.add(i, next_obs, action=action, expert=expert, reward=rows[-1][2], terminated=rows[-1][3])
        self.buffer.add(*map(torch.tensor, zip(*rows)))
        self.begin([left == 0 for left in self.left])

    def every_window(self):
        """One batch holding each window that the buffer can draw."""
        n = int((self.buffer.tail - self.buffer.head).sum())
        return self.buffer.sample((torch.arange(n, dtype=torch.float64) + 0.5) / max(n, 1))

    def check(self):
        batch, T, found = self.every_window(), self.buffer.horizon, []
        for b in range(batch.rows.shape[1]):
            place = batch.rows[:, b].tolist()
            i = place[0] // self.buffer.capacity
            rows = self.lists.rows[i]
            numbers = [k for k, row in enumerate(rows) if row["obs"] == batch.obs[0, b].tolist()]
            assert len(numbers) == 1  # the first observation names the row
            first = numbers[0]
            found.append((i, first))
            window = rows[first : first + T + 1]
            assert batch.obs[:, b].tolist() == [row["obs"] for row in window]
            for name in ("action", "reward", "terminated", "expert"):
                assert getattr(batch, name)[:, b].tolist() == [row[name] for row in window[:-1]]
            assert place == [i * self.buffer.capacity + (first + t) % self.buffer.capacity for t in range(T)]
        assert sorted(found) == sorted(self.lists.windows())  # each once, none else


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize(
    "lengths, capacity",
    [
        ([[7]], 30),
        ([[1, 2, 5, 9]], 16),  # some episodes are shorter than a window
        ([[4], [5], [11], [3]], 17),
        ([[1, 6], [2, 9], [30], [3, 4]], 13),  # and one is longer than the ring
    ],
)
def test_windows_are_those_of_the_list_model_before_and_after_wrapping(lengths, capacity, horizon):
    both = Both(lengths, capacity, horizon)
    for _ in range(4 * capacity):
        both.step()
        both.check()
    assert min(len(rows) for rows in both.lists.rows) > 3 * capacity  # it wrapped


def test_an_unfinished_episode_is_sampled_up_to_its_latest_observation():
    both = Both([[50]], 60, 3)
    for decision in range(1, 8):
        both.step()
        batch = both.every_window() if decision >= 3 else None
        if batch is not None:
            assert batch.rows.shape[1] == decision - 3 + 1  # n - T + 1 windows
            assert batch.obs[-1].max() == both.buffer.current_obs().max()


def test_windows_are_drawn_uniformly_over_environments_of_unequal_fill():
    """Equally spaced numbers of the unit interval: every window gets the same share of them, whoever's it is."""
    both = Both([[3], [4], [25], [5]], 15, 3)
    for _ in range(70):
        both.step()
    n = len(both.lists.windows())
    u = (torch.arange(100 * n, dtype=torch.float64) + 0.5) / (100 * n)
    first = both.buffer.sample(u).rows[0].tolist()
    per_env = Counter(row // both.buffer.capacity for row in first)
    assert len(set(per_env.values())) > 1  # not a draw of the environment first
    assert Counter(Counter(first).values()) == {100: n}


def test_the_ends_of_the_unit_interval_are_windows_too():
    both = Both([[4], [6]], 20, 3)
    for _ in range(30):
        both.step()
    ends = both.buffer.sample(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).rows
    every = both.every_window().rows
    assert torch.equal(ends[:, 0], every[:, 0]) and torch.equal(ends[:, 1], every[:, -1])


def test_the_waiting_observations_are_the_latest():
    both = Both([[3], [7]], 12, 3)
    for _ in range(20):
        both.step()
        assert both.buffer.current_obs().tolist() == [rows[-1]["obs"] for rows in both.lists.rows]


@pytest.mark.parametrize("steps, num_envs, length", [(40, 2, 5), (41, 4, 5), (100, 1, 7), (9, 3, 100), (12, 1, 12)])
def test_the_buffer_a_run_needs_loses_no_row(steps, num_envs, length):
    """The capacity is at least the rows of the run (n + 1 an episode of n decisions) and wastes at most a few."""
    args = small_args(total_timesteps=steps, num_envs=num_envs)
    decisions = -(-steps // num_envs)
    rows = 1  # the first observation; then one for every decision, and one more wherever an episode begins
    for decision in range(1, decisions + 1):
        rows += 1 + (decision % length == 0)
    found = bmpc.capacity(args, bmpc.TaskInfo(4, 2, length))
    assert rows <= found <= rows + 4
    assert bmpc.capacity(args, bmpc.TaskInfo(4, 2, None)) >= 2 * decisions  # episodes of one decision at worst
    assert bmpc.capacity(small_args(total_timesteps=10**9, buffer_size=1000, num_envs=3), TASK) == 333


def test_a_run_stores_true_last_observations_and_only_real_terminations(tmp_path):
    """Environment 0 is truncated, environment 1 terminates; no window holds a transition that never happened."""
    envs = FakeEnvs([5, 4], terminal=(1,))
    args = small_args(episodic=True, total_timesteps=60, learning_starts=60, batch_size=4)
    t, _ = run_loop(args, envs, tmp_path)
    n = int((t.buffer.tail - t.buffer.head).sum())
    batch = t.buffer.sample((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    env, step = batch.obs[..., 0], batch.obs[..., 1]
    assert (env == env[0]).all() and (step == step[0] + torch.arange(4)[:, None]).all()
    assert (batch.obs[..., 2] == batch.obs[0, :, 2]).all()  # one seed, so one episode
    assert step[-1][env[-1] == 0].max() == 5 and step[-1][env[-1] == 1].max() == 4  # the last observations are there
    assert torch.equal(batch.terminated, ((env[1:] == 1) & (step[1:] == 4)) * 1.0)
    torch.testing.assert_close(batch.reward, env[1:] + 0.125 * step[1:])
