"""A toy environment, `--task toy:Toy-v0`, and variants: each has one fault, or pictures."""

import multiprocessing
import os
import time

import gymnasium as gym
import numpy as np


class Toy(gym.Env):
    """Push a point on a line; the reward is larger near the middle. `happen` names a fault, or "Film": it has pictures
    that get brighter from step to step.
    """

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-2.0, 3.0, (2,), np.float32)

    def __init__(self, happen, render_mode=None):
        if happen == "Unmade" and multiprocessing.current_process().name.endswith("-0"):  # the first worker
            raise RuntimeError("this simulator cannot be made")
        self.happen, self.render_mode = happen, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.speed, self.t = self.np_random.normal(), 0.0, 0
        self.length = int(self.np_random.integers(2, 12))
        return self.observation(), {}

    def observation(self):
        noise = time.perf_counter() if self.happen == "Noise" else 0.0
        return np.array([self.x, self.speed, noise])

    def render(self):
        if self.happen == "Render":
            os._exit(3)
        if self.happen == "Film":
            return np.full((64, 64, 3), 20 * self.t, np.uint8)
        raise RuntimeError("this simulator has no pictures")

    def step(self, action):
        assert self.happen != "Terminates" or self.t < self.length  # no step after the end of an episode
        self.t += 1
        self.speed = 0.9 * self.speed + 0.1 * float(action[0] - action[1])
        self.x += 0.1 * self.speed
        obs, reward = self.observation(), float(np.exp(-(self.x**2)))
        if self.happen == "Broken":
            raise RuntimeError("this simulator fails")
        ended = self.happen == "Terminates" and self.t >= self.length
        return obs, reward, ended and self.length % 2 == 0, ended and self.length % 2 == 1, {}


gym.register("ToyLong-v0", Toy, max_episode_steps=100, kwargs={"happen": ""})
for what in ("", "Terminates", "Noise", "Broken", "Unmade", "Render", "Film"):
    gym.register(f"Toy{what}-v0", Toy, max_episode_steps=10, kwargs={"happen": what})
