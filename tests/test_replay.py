"""The replay buffer against plain lists: what is stored, which windows exist, and how they are drawn."""

import random
from collections import Counter

import pytest
import torch
from conftest import CPU, TASK, FakeEnvs, run_loop, same, small_args

import bmpc


class Lists:
    """The same buffer as lists: every decision ever stored, by environment, with the episode it belongs to."""

    def __init__(self, num_envs, capacity, horizon):
        self.capacity, self.horizon = capacity, horizon
        self.rows = [[] for _ in range(num_envs)]

    def windows(self):
        """(environment, number of the first row) of every T consecutive rows of one episode that are all there."""
        found = []
        for i, rows in enumerate(self.rows):
            for first in range(max(0, len(rows) - self.capacity), len(rows) - self.horizon + 1):
                if rows[first]["episode"] == rows[first + self.horizon - 1]["episode"]:
                    found.append((i, first))
        return found


class Both:
    """A ReplayBuffer and its list model fed with the same rows, every number of which is unique."""

    def __init__(self, lengths, capacity, horizon, seed=0):
        self.E, self.random, self.lengths, self.count = len(lengths), random.Random(seed), lengths, 0
        self.args = small_args(num_envs=self.E, buffer_size=capacity * self.E + self.E - 1, horizon=horizon)
        self.buffer, self.lists = bmpc.ReplayBuffer(self.args, TASK, CPU), Lists(self.E, capacity, horizon)
        self.episode, self.left, self.obs = [-1] * self.E, [0] * self.E, [None] * self.E
        for i in range(self.E):
            self.begin(i)

    def numbers(self, n):
        self.count += 1
        return [float(self.count)] * n

    def begin(self, i):
        self.episode[i] += 1
        self.left[i], self.obs[i] = self.random.choice(self.lengths[i]), self.numbers(TASK.obs_dim)

    def step(self):
        rows, A = [], TASK.action_dim
        for i in range(self.E):
            self.left[i] -= 1
            row = {"obs": self.obs[i], "action": self.numbers(A), "expert": [self.numbers(A), self.numbers(A)]}
            row |= {"reward": self.numbers(1)[0], "terminated": float(self.random.random() < 0.5)}
            row |= {"next_obs": self.numbers(TASK.obs_dim), "ended": self.left[i] == 0}
            rows.append(row)
            self.lists.rows[i].append(row | {"episode": self.episode[i]})
            self.obs[i] = row["next_obs"]
            if row["ended"]:
                self.begin(i)
        self.buffer.add(**{name: torch.tensor([row[name] for row in rows]) for name in rows[0]})

    def every_window(self):
        """One batch holding each window that the buffer can draw, in the order of u."""
        n = len(self.lists.windows())
        return self.buffer.sample((torch.arange(n, dtype=torch.float64) + 0.5) / max(n, 1))

    def check(self):
        if not self.lists.windows():
            return
        batch, T, found = self.every_window(), self.lists.horizon, []
        for b in range(batch.rows.shape[1]):
            place = batch.rows[:, b].tolist()
            i = place[0] % self.E
            rows = self.lists.rows[i]
            (first,) = [k for k, row in enumerate(rows) if row["obs"] == batch.obs[0, b].tolist()]
            found.append((i, first))
            window = rows[first : first + T]
            assert batch.obs[1:, b].tolist() == [row["next_obs"] for row in window]
            for name in ("action", "reward", "terminated", "expert", "obs"):
                assert getattr(batch, name)[:T, b].tolist() == [row[name] for row in window]
            assert place == [(first + t) % self.lists.capacity * self.E + i for t in range(T)]
        assert sorted(found) == self.lists.windows()  # each once, none else


RINGS = [
    ([[7]], 30),
    ([[1, 2, 5, 9]], 16),  # some episodes are shorter than a window
    ([[4], [5], [11], [3]], 17),
    ([[1, 6], [2, 9], [30], [3, 4]], 13),  # and one is longer than the ring
]


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("lengths, capacity", RINGS)
def test_windows_are_those_of_the_list_model_before_and_after_wrapping(lengths, capacity, horizon):
    both = Both(lengths, capacity, horizon)
    for _ in range(3 * capacity + 5):
        both.step()
        both.check()


def test_an_unfinished_episode_is_sampled_up_to_its_latest_observation():
    both = Both([[50]], 60, 3)
    for decision in range(1, 8):
        both.step()
        if decision >= 3:
            batch = both.every_window()
            assert batch.rows.shape[1] == decision - 3 + 1  # n - T + 1 windows
            assert batch.obs[-1].max() == both.obs[0][0]


def test_windows_are_drawn_uniformly_over_environments_of_unequal_fill():
    """Equally spaced numbers of the unit interval: every window gets the same share of them, whoever's it is."""
    both = Both([[3], [4], [25], [5]], 15, 3)
    for _ in range(70):
        both.step()
    n = len(both.lists.windows())
    u = (torch.arange(100 * n, dtype=torch.float64) + 0.5) / (100 * n)
    first = both.buffer.sample(u).rows[0].tolist()
    assert len(set(Counter(row % both.E for row in first).values())) > 1  # not a draw of the environment first
    assert Counter(Counter(first).values()) == {100: n}
    ends = both.buffer.sample(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).rows
    assert torch.equal(ends, both.every_window().rows[:, [0, -1]])


def test_the_actions_of_unfinished_episodes_are_there_while_the_ring_holds_all_of_them():
    both = Both([[3], [7], [40]], 12, 3)
    for _ in range(30):
        both.step()
        expected = {}
        for i, rows in enumerate(both.lists.rows):
            actions = [row["action"] for row in rows if row["episode"] == both.episode[i]]
            if 0 < len(actions) <= 12:
                expected[i] = actions
        assert {i: x.tolist() for i, x in both.buffer.unfinished_actions().items()} == expected


@pytest.mark.parametrize("steps", [2, 12, 31])
def test_a_buffer_that_was_saved_goes_on_as_if_it_never_was(steps):
    """Also before the ring is full, when a part of it is saved."""
    both = Both([[3], [7]], 12, 3)
    for _ in range(steps):
        both.step()
    state = both.buffer.state_dict()
    assert len(state["obs"]) == min(steps, 12)
    loaded = bmpc.ReplayBuffer(both.args, TASK, CPU)
    loaded.load_state_dict(state)
    saved, both.buffer = both.buffer, loaded
    add = loaded.add
    loaded.add = lambda **row: add(**row) or saved.add(**row)
    for _ in range(15):
        both.step()
        both.check()
    del loaded.add
    assert same(loaded.state_dict(), saved.state_dict())


def test_a_run_stores_true_last_observations_and_only_real_terminations(tmp_path):
    """Environment 0 is truncated, environment 1 terminates; no window holds a transition that never happened."""
    envs = FakeEnvs([5, 4], terminal=(1,))
    args = small_args(episodic=True, total_timesteps=60, learning_starts=60, batch_size=4)
    buffer = run_loop(args, envs, tmp_path).buffer
    n = int(buffer.tail)
    assert n == 6 * 3 + 7 * 2  # of 30 decisions each: 6 episodes of 5; 7 of 4 and an unfinished one of 2
    batch = buffer.sample((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    env, step = batch.obs[..., 0], batch.obs[..., 1]
    assert (env == env[0]).all() and (step == step[0] + torch.arange(4)[:, None]).all()
    assert (batch.obs[..., 2] == batch.obs[0, :, 2]).all()  # one seed, so one episode
    assert step[-1][env[-1] == 0].max() == 5 and step[-1][env[-1] == 1].max() == 4  # the last observations are there
    assert torch.equal(batch.terminated, ((env[1:] == 1) & (step[1:] == 4)) * 1.0)
    torch.testing.assert_close(batch.reward, env[1:] + 0.125 * step[1:])
    sent = torch.tensor([a.tolist() for a in envs.sent])  # (step, E, A): a row's action is the one sent from its obs
    assert torch.equal(batch.action.flatten(0, 1), sent.flatten(0, 1)[batch.rows.flatten()])
