"""Small environments with one fault or peculiarity each, `--task fault_envs:NAME-v0`."""

import os

import gymnasium as gym
import numpy as np


class Base(gym.Env):
    """A random walk with episodes of up to 10 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=3)
        self.fault = int(self.np_random.integers(6))  # of Diverges: depends on the seed of the episode only
        self.t = 0
        return self.x.copy(), {}

    def step(self, action):
        self.t += 1
        self.x[:2] += 0.1 * np.asarray(action).ravel()[:2]
        return self.x.copy(), float(np.exp(-(self.x[0] ** 2))), False, False, {}


class Diverges(Base):
    """In half of the episodes, the fourth step raises an exception, returns NaN or an infinite reward."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.t == 4 and self.fault == 0:
            raise FloatingPointError("the simulation diverged")
        if self.t == 4 and self.fault == 1:
            obs[1] = np.nan
        if self.t == 4 and self.fault == 2:
            reward = np.inf
        return obs, reward, *rest


class Arrays(Base):
    """Rewards and terminations are arrays of one element."""

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, np.array([reward]), np.array([self.t == 7]), truncated, info


class Short(Base):
    """Episodes terminate after two steps."""

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self.t == 2, truncated, info


class Constant(Base):
    """The second dimension of the action has only one value."""

    action_space = gym.spaces.Box(np.float32([-2.0, 0.25]), np.float32([2.0, 0.25]))

    def step(self, action):
        assert action[1] == np.float32(0.25)
        return super().step(action)


class Huge(Base):
    """The bounds of the action cannot be represented in float32."""

    action_space = gym.spaces.Box(-1e300, 1e300, (2,), np.float64)


class Closes(Base):
    """close() appends a line to the file named by CLOSED_FILE."""

    def close(self):
        with open(os.environ["CLOSED_FILE"], "a") as file:
            file.write(f"{os.getpid()}\n")


class Unsendable(Base):
    """Resets fail, with an exception that cannot be pickled."""

    def reset(self, *, seed=None, options=None):
        class Local(Exception):
            pass

        raise Local("no such state")


class Misshaped(Base):
    """The fourth observation of an episode has another size than declared."""

    def step(self, action):
        obs, *rest = super().step(action)
        return np.append(obs, 0.0) if self.t == 4 else obs, *rest


for cls in (Diverges, Arrays, Short, Constant, Huge, Closes, Unsendable, Misshaped):
    gym.register(f"{cls.__name__}-v0", cls, max_episode_steps=10)
