"""Record gymnasium environments: seeded, parallel, resumable; the bytes do not depend on how often it was resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import Checked, Count, Natural, check_value
from ..disk import write_json
from ..lock import RunLock
from .format import (
    FORMAT,
    FRAMES_PER_CHUNK,
    VERSION,
    Shard,
    pack_shard,
    read_description,
    resize_frames,
    shard_path,
    staged_path,
    write_episode,
)

Policy = Callable[[Any, Any, np.random.Generator], Any]  # (observation, action_space, rng) -> action
Progress = Callable[[int, int, int], None]  # (episodes done, episodes requested, frames so far)


def hold_random(observation: Any, action_space: Any, rng: np.random.Generator) -> Any:
    """A uniformly random action; `collect` seeds the space and holds the action for `hold` steps."""
    return action_space.sample()


@dataclass(frozen=True)
class Collected:
    """What is on disk after `collect`; `recorded` counts the episodes that this call added."""

    path: Path
    episodes: int
    frames: int
    recorded: int


def episode_seeds(seed: int, episode: int) -> tuple[int, int]:
    """(environment's seed, action generator's seed) of one episode: a function of `seed` and `episode` only."""
    first, second = np.random.SeedSequence([seed, episode]).generate_state(2)
    return int(first) & 0x7FFFFFFF, int(second) & 0x7FFFFFFF


def make_env(env_id: str, env_kwargs: dict[str, Any] | None = None) -> Any:
    """`gymnasium.make` with rgb_array rendering and no display; an ImportError names a missing package."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("collecting needs the package gymnasium: pip install 'gymnasium[box2d]'") from error
    try:
        import ale_py
    except ImportError:
        if env_id.startswith("ALE/"):
            raise ImportError(f"{env_id} needs the package ale_py: pip install ale-py") from None
    else:
        gymnasium.register_envs(ale_py)
    try:
        return gymnasium.make(env_id, render_mode="rgb_array", **(env_kwargs or {}))
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"{env_id} needs a package that is not installed: {error}") from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise ValueError(f"env_id: gymnasium cannot make {env_id!r}: {error}") from error


def _render(env: Any, env_id: str) -> np.ndarray:
    frame = env.render()
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"env_id: {env_id} must render uint8 (Y, X, 3) with render_mode='rgb_array', got {got}")
    return frame


def _action_space(env: Any, env_id: str) -> dict[str, Any]:
    from gymnasium.spaces import Box, Discrete

    space = env.action_space
    if isinstance(space, Discrete):
        return {"kind": "discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        return {"kind": "continuous", "dim": int(np.prod(space.shape)), "shape": list(space.shape)}
    raise ValueError(f"env_id: {env_id} must have a Discrete or a floating-point Box action space, got {space}")


def _play(env: Any, description: dict[str, Any], policy: Policy, seeds: tuple[int, int]) -> Generator[Any, None, str]:
    """Yields (action that caused the frame or None, frame at the environment's own size); returns how it ended."""
    observation, _ = env.reset(seed=seeds[0])
    env.action_space.seed(seeds[1])
    rng = np.random.default_rng(seeds[1])
    hold, skip_first = description["policy"]["hold"], description["skip_first"]
    max_frames = description["max_frames"] or float("inf")
    steps, frames, end, action = 0, 1, "", None

    def step() -> str:
        nonlocal observation, action, steps
        if steps % hold == 0:
            action = policy(observation, env.action_space, rng)
            if not env.action_space.contains(action):
                raise ValueError(f"policy: must return a member of {env.action_space}, got {action!r}")
        observation, _, terminated, truncated, _ = env.step(action)
        steps += 1
        return "terminated" if terminated else "truncated" if truncated else ""

    while steps < skip_first and not end:
        end = step()
    yield None, _render(env, description["env_id"])
    while not end and frames < max_frames:
        for _ in range(description["frame_skip"]):
            end = step()
            if end:
                break
        frames += 1
        yield action, _render(env, description["env_id"])
    return end or "max_frames"


def _record(root: Path, description: dict[str, Any], policy: Policy, episode: int) -> int:
    """Record one episode into the staging folder, in a new environment so that no state carries over."""
    space, seeds = description["action_space"], episode_seeds(description["seed"], episode)
    env = make_env(description["env_id"], description["env_kwargs"])
    try:
        with write_episode(staged_path(root, episode), episode) as writer:
            play = _play(env, description, policy, seeds)
            while True:
                try:
                    action, frame = next(play)
                except StopIteration as stop:
                    end = stop.value
                    break
                if action is not None:
                    action = int(action) - space["start"] if space["kind"] == "discrete" else np.ravel(action)
                writer.add(resize_frames(frame[None], tuple(description["size"]))[0], action)
            discrete = space["kind"] == "discrete"
            rows = np.array(writer.actions, np.int64 if discrete else np.float32)
            writer.finish(
                rows if discrete else rows.reshape(-1, space["dim"]),
                {"seed": seeds[0], "action_seed": seeds[1], "end": end},
            )
        return writer.count
    finally:
        env.close()


def _check_resume(root: Path, description: dict[str, Any]) -> None:
    old = read_description(root)
    for field in {**description, **old}:
        if old.get(field) != description.get(field):
            raise ValueError(
                f"out: {root} was recorded with {field}={old.get(field)!r}, got {field}="
                f"{description.get(field)!r}; collect into another folder"
            )


@dataclass(frozen=True)
class Timing(Checked):
    """When frames are recorded and actions are chosen, in steps of the environment.

    Args:
        frame_skip: steps between two frames.
        hold: steps for which an action is kept, a multiple of frame_skip, so that each transition has one action.
        skip_first: steps that are played before recording begins, also a multiple of frame_skip.
        max_frames: an episode is cut after this many frames; None = played to its end.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    frame_skip: Count = 2
    hold: Count = 8
    skip_first: Natural = 0
    max_frames: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hold % self.frame_skip or self.skip_first % self.frame_skip:
            raise ValueError(
                f"hold, skip_first: must be multiples of frame_skip = {self.frame_skip}, so that one action causes "
                f"each frame, got {self.hold} and {self.skip_first}"
            )


def collect(
    env_id: str,
    out: str | os.PathLike[str],
    *,
    episodes: int,
    size: tuple[int, int] = (64, 64),
    seed: int = 0,
    policy: str | Policy = "hold-random",
    timing: Timing | None = None,
    num_workers: int = 1,
    env_kwargs: dict[str, Any] | None = None,
    episodes_per_shard: int = 16,
    progress: Progress | None = None,
) -> Collected:
    """Record `episodes` episodes of any gymnasium environment that renders rgb arrays into the folder `out`.

    Frames are area-averaged to `size` (Y, X); `timing` says when a frame is recorded and when an action is chosen (None
    = `Timing()`); an episode that is terminated or truncated ends with the frame after that step. `policy`:
    "hold-random" or a function (observation, action_space, rng) -> action that can be pickled. ALE environments have a
    frame skip of their own: env_kwargs={"frameskip": 1} turns it off.

    A second call continues where the first one stopped, and a larger `episodes` adds to the folder; the bytes are those
    of a single uninterrupted call, for any num_workers. Each episode ends with `progress(done, episodes, frames)`.
    Raises ValueError for a setting that breaks its rule or is not the folder's, ImportError for a missing package.
    """
    timing = Timing() if timing is None else timing
    counts = {"episodes": episodes, "num_workers": num_workers, "episodes_per_shard": episodes_per_shard}
    for name, value in counts.items():
        check_value(name, value, Count)
    check_value("seed", seed, Natural)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: must be (Y, X) >= 1, got {size!r}")
    if isinstance(policy, str):
        if policy != "hold-random":
            raise ValueError(f"policy: must be 'hold-random' or a function, got {policy!r}")
        play: Policy = hold_random
        policy_name = policy
    else:
        play, policy_name = policy, f"{policy.__module__}.{policy.__qualname__}"

    env = make_env(env_id, env_kwargs)
    try:
        import gymnasium

        env.reset(seed=0)
        _render(env, env_id)
        rate = env.metadata.get("render_fps") or 30
        description: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "env_id": env_id,
            "env_kwargs": env_kwargs or {},
            "seed": seed,
            "size": [int(size[0]), int(size[1])],
            "action_space": _action_space(env, env_id),
            "policy": {"name": policy_name, "hold": timing.hold},
            "frame_skip": timing.frame_skip,
            "skip_first": timing.skip_first,
            "max_frames": timing.max_frames,
            "fps": rate / timing.frame_skip,
            "autoreset": "disabled",  # each episode has its own environment; no reset transition is recorded
            "gymnasium": gymnasium.__version__,
            "episodes_per_shard": episodes_per_shard,
            "frames_per_chunk": FRAMES_PER_CHUNK,
        }
    finally:
        env.close()
    description = json.loads(json.dumps(description))

    root = Path(out)
    with RunLock(root, "collecting into"):
        if (root / "dataset.json").exists():
            _check_resume(root, description)
        elif any(not entry.name.startswith(".") for entry in root.iterdir()):
            raise ValueError(f"out: {root} must be empty or hold dataset.json, got other files")
        else:
            write_json(root / "dataset.json", description)
        return _fill(root, description, play, episodes, num_workers, progress)


def _fill(
    root: Path, description: dict[str, Any], policy: Policy, episodes: int, workers: int, progress: Progress | None
) -> Collected:
    per_shard = description["episodes_per_shard"]
    (root / "staging").mkdir(exist_ok=True)
    for leftover in [*root.glob(".*.tmp"), *root.glob("staging/.*.tmp")]:
        leftover.unlink(missing_ok=True)
    lengths: dict[int, int] = {}  # of the episodes on disk
    for file in [*root.glob("shard-*.npz"), *root.glob("staging/episode-*.npz")]:
        shard = Shard(file)
        lengths.update({number: int(entry["frames"]) for number, entry in shard.episodes.items()})
        shard.close()
    before = len(lengths)
    missing = [episode for episode in range(episodes) if episode not in lengths]

    for shard_number in range(-(-episodes // per_shard)):
        _pack(root, shard_number, per_shard, episodes, lengths)
    for episode, frames in _record_all(root, description, policy, missing, workers):
        lengths[episode] = frames
        _pack(root, episode // per_shard, per_shard, episodes, lengths)
        if progress is not None:
            progress(sum(number < episodes for number in lengths), episodes, sum(lengths.values()))
    with suppress(OSError):  # it may hold episodes beyond those requested now
        (root / "staging").rmdir()
    return Collected(root, len(lengths), sum(lengths.values()), len(lengths) - before)


def _record_all(
    root: Path, description: dict[str, Any], policy: Policy, missing: list[int], workers: int
) -> Iterator[tuple[int, int]]:
    if workers == 1 or len(missing) < 2:
        for episode in missing:
            yield episode, _record(root, description, policy, episode)
        return
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_record, root, description, policy, episode): episode for episode in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pack(root: Path, shard_number: int, per_shard: int, episodes: int, lengths: dict[int, int]) -> None:
    """Write a shard once all its episodes are there, then delete their staged files."""
    wanted = range(shard_number * per_shard, min((shard_number + 1) * per_shard, episodes))
    if any(number not in lengths for number in wanted):
        return
    target = shard_path(root, shard_number)
    packed = Shard(target) if target.exists() else None
    held = set(packed.episodes) if packed else set()
    if not held.issuperset(wanted):
        sources = {n: packed if packed and n in held else Shard(staged_path(root, n)) for n in wanted}
        try:
            pack_shard(target, sources)
        finally:
            for source in sources.values():
                source.close()
    elif packed:
        packed.close()
    for number in wanted:
        staged_path(root, number).unlink(missing_ok=True)
