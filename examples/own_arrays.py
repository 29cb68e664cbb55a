"""A world model of your own arrays: save them, train, load, and continue held-out clips.

The game is a square on a small board that an action moves up, down, left or right. frames (N, T, Y, X, C) are uint8;
actions (N, T - 1) integers, row t taken after frame t. Running it again resumes the training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sae_diffusion import (
    Denoiser,
    FrameStats,
    ModelConfig,
    NoiseConfig,
    SamplerConfig,
    TrainConfig,
    Trainer,
    continue_clips,
    load_denoiser,
    open_dataset,
)

SIDE = 16


def play(episodes: int, frames: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Episodes of the game under random actions, each kept for three frames."""
    random = np.random.default_rng(seed)
    moves = np.array([(-2, 0), (2, 0), (0, -2), (0, 2)])
    actions = random.integers(4, size=(episodes, frames // 3 + 1)).repeat(3, axis=1)[:, : frames - 1]
    pictures = np.full((episodes, frames, SIDE, SIDE, 3), 40, np.uint8)
    for n in range(episodes):
        place = random.integers(0, SIDE - 4, 2)
        for t in range(frames):
            y, x = place
            pictures[n, t, y : y + 4, x : x + 4] = (255, 200, 60)
            if t < frames - 1:
                place = np.clip(place + moves[actions[n, t]], 0, SIDE - 4)
    return pictures, actions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/own-arrays"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    frames, actions = play(options.episodes, frames=16)
    np.savez(options.out / "game.npz", frames=frames, actions=actions)
    dataset = open_dataset(options.out / "game.npz", 8, split="train")  # clips of 8 frames; a tenth is held out

    model = Denoiser(
        ModelConfig(
            height=SIDE, width=SIDE, channels=3, model_channels=16, channel_mult=(1, 2), blocks_per_level=1,
            video_attention=(8,), head_dim=32, kernel_frames=2, num_actions=dataset.num_actions, window=7,
        )
    )  # fmt: skip
    config = TrainConfig(
        run_dir=str(options.out), clip_length=8, batch_size=4, noisy_copies=2, steps=options.steps, num_workers=0,
        noise=NoiseConfig(mean=0.5, std=1.2), lr=2e-2, lr_ref_steps=100, lr_ramp_steps=20, device=options.device,
        log_every=20, checkpoint_every=100, snapshot_every=0, tensorboard=False,
    )  # fmt: skip
    result = Trainer(config, model, dataset, FrameStats.estimate(dataset)).train()
    print(f"{model.num_parameters()} parameters, step {result.step}, {result.checkpoint}")

    model, stats, _ = load_denoiser(options.out, ema=0.1)
    heldout = open_dataset(options.out / "game.npz", 12, split="heldout")
    clips = [heldout[i] for i in range(min(4, len(heldout)))]
    sampler = SamplerConfig(sampling_steps=8, sigma_min=0.05, sigma_max=40.0, rho=4.0)
    rollout = continue_clips(model, stats, clips, 8, sampler, context=4)  # 4 frames given, 8 generated
    off = np.abs(rollout.frames[:, 4:].astype(int) - rollout.truth[:, 4:]).mean()
    still = np.abs(rollout.frames[:, 3:4].astype(int) - rollout.truth[:, 4:]).mean()
    print(f"mean absolute error of 8 generated frames: {off:.1f} of 255; of repeating the last given one: {still:.1f}")
    for path in rollout.write(options.out, fps=5, scale=8):
        print(path)


if __name__ == "__main__":
    main()
