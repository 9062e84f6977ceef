"""A toy environment, `--task toy:Toy-v0`, and others that fail in one way each."""

import multiprocessing
import os
import time

import gymnasium as gym
import numpy as np


class Toy(gym.Env):
    """A point on a line is pushed; the reward is larger near the middle. `after` steps in all, `happen` happens."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-2.0, 3.0, (2,), np.float32)

    def __init__(self, happen="", after=0, render_mode=None):
        if happen == "unmade" and multiprocessing.current_process().name.endswith("-0"):  # the first worker
            raise RuntimeError("this simulator cannot be made")
        self.happen, self.after, self.steps, self.render_mode = happen, after, 0, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.speed, self.t = self.np_random.normal(), 0.0, 0
        self.length = int(self.np_random.integers(2, 12))
        return self.observation(), {}

    def observation(self):
        noise = time.perf_counter() if self.happen == "noise" else 0.0
        return np.array([self.x, self.speed, noise])

    def render(self):
        if self.happen == "render":
            os._exit(3)
        raise NotImplementedError("this simulator has no pictures")

    def step(self, action):
        self.steps, self.t = self.steps + 1, self.t + 1
        self.speed = 0.9 * self.speed + 0.1 * float(action[0] - action[1])
        self.x += 0.1 * self.speed
        obs, reward = self.observation(), float(np.exp(-(self.x**2)))
        if self.steps == self.after:
            if self.happen == "reward":
                reward = np.nan
            elif self.happen == "observation":
                obs[1] = np.inf
            elif self.happen == "error":
                raise RuntimeError("this simulator fails")
            elif self.happen == "exit":
                os._exit(3)
        terminated = self.happen == "terminates" and self.t >= self.length
        truncated = self.happen == "short" and self.t >= self.length
        return obs, reward, terminated, truncated, {}


def register(name, limit=10, **kwargs):
    gym.register(f"{name}-v0", entry_point=Toy, max_episode_steps=limit, kwargs=kwargs)


register("Toy")
register("ToyLong", limit=100)
register("ToyTerminates", happen="terminates")
register("ToyShort", happen="short")
register("ToyNoise", happen="noise")
for what in ("reward", "observation", "error", "exit"):
    register(f"Toy{what.capitalize()}", happen=what, after=25)
for what in ("unmade", "render"):
    register(f"Toy{what.capitalize()}", happen=what)
