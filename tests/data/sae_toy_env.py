"""A deterministic environment whose frame shows how many steps it took and which action it received last."""

from typing import ClassVar

import gymnasium
import numpy as np

SIZE = (12, 10)


class ToyEnv(gymnasium.Env):
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, render_mode=None, space="discrete", length=None, render="good", start=0):
        self.action_space = {
            "discrete": gymnasium.spaces.Discrete(5, start=start),
            "continuous": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
            "several": gymnasium.spaces.MultiBinary(3),
        }[space]
        self.observation_space = gymnasium.spaces.Box(0, 1e6, (1,), np.float32)
        self.start, self.length, self.kind = start, length, render

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.shown = 0, np.zeros(3, np.uint8)
        self.noise = self.np_random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        self.ends = self.length or int(self.np_random.integers(9, 60))
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        if np.ndim(action):
            self.shown = np.array([*np.round((action + 1) * 100), 0]).astype(np.uint8)
        else:
            self.shown = np.full(3, action - self.start + 1, np.uint8)
        self.noise = np.roll(self.noise, 1, axis=1)
        return np.full(1, self.steps, np.float32), 1.0, self.steps >= self.ends, False, {}

    def render(self):
        frame = self.noise.copy()
        frame[0, 0], frame[0, 1] = self.steps, self.shown
        return {"good": frame, "float": frame / 255.0, "grey": frame[..., 0], "none": None}[self.kind]


def alternate(observation, action_space, rng):
    """Policy: 4 while the step count is a multiple of 8, else 2."""
    return 4 if int(observation[0]) % 8 == 0 else 2


gymnasium.register("SaeToy-v0", entry_point=ToyEnv)
