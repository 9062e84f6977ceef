"""A toy environment, `--task toy:Toy-v0`, and others that fail in one way each."""

import multiprocessing
import os
import time

import gymnasium as gym
import numpy as np


class Toy(gym.Env):
    """A point on a line is pushed; the reward is larger near the middle. What is to `happen` may at the 25th step."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-2.0, 3.0, (2,), np.float32)

    def __init__(self, happen, render_mode=None):
        if happen == "Unmade" and multiprocessing.current_process().name.endswith("-0"):  # the first worker
            raise RuntimeError("this simulator cannot be made")
        self.happen, self.steps, self.render_mode = happen, 0, render_mode

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
        raise RuntimeError("this simulator has no pictures")

    def step(self, action):
        assert self.happen != "Terminates" or self.t < self.length  # nobody plays on
        self.steps, self.t = self.steps + 1, self.t + 1
        self.speed = 0.9 * self.speed + 0.1 * float(action[0] - action[1])
        self.x += 0.1 * self.speed
        obs, reward = self.observation(), float(np.exp(-(self.x**2)))
        if self.happen == "Broken" or (self.happen == "Error" and self.steps == 25):
            raise RuntimeError("this simulator fails")
        if self.happen == "Reward" and self.steps == 25:
            reward = np.nan
        if self.happen == "Observation" and self.steps == 25:
            obs[1] = np.inf
        ended = self.happen == "Terminates" and self.t >= self.length
        return obs, reward, ended and self.length % 2 == 0, ended and self.length % 2 == 1, {}


gym.register("ToyLong-v0", Toy, max_episode_steps=100, kwargs={"happen": ""})
for what in ("", "Terminates", "Noise", "Reward", "Observation", "Error", "Broken", "Unmade", "Render"):
    gym.register(f"Toy{what}-v0", Toy, max_episode_steps=10, kwargs={"happen": what})
