"""Pictures and videos: GIF, MP4, PNG, comparison strips. Files appear whole or not at all.

Frames are uint8 (T, Y, X, 3), or (T, Y, X, 1), shown in grey; floats (latents) with any number of channels are shown as
the mean of their channels in grey, black at the video's lowest value and white at its highest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from .checks import Count, check_value
from .disk import atomic_path

BACKGROUND = 24
LARGEST = 8190  # height and width that all encoders below accept
SCREEN = (2160, 3840)  # height and width of the largest video
CONTEXT_BORDER = (110, 110, 110)
GENERATED_BORDER = (255, 150, 0)


def to_rgb(frames: Any, name: str = "frames") -> np.ndarray:
    """uint8 (T, Y, X, 3), by the rules at the top of this file; else a ValueError or TypeError that names `name`."""
    x = np.asarray(frames)
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"{name}: must be (T, Y, X, C), all at least 1, got {x.dtype} {x.shape}")
    if x.dtype.kind == "f":
        x = x.astype(np.float32).mean(-1, keepdims=True)
        if not np.isfinite(x).all():
            raise ValueError(f"{name}: latents must be finite, got NaN or infinity")
        low, high = x.min(), x.max()
        x = ((x - low) / (high - low) * 255 if high > low else np.full_like(x, 128)).round().astype(np.uint8)
    if x.dtype != np.uint8:
        raise TypeError(f"{name}: must be uint8, or floats for latents, got {x.dtype}")
    if x.shape[-1] == 1:
        x = np.repeat(x, 3, axis=-1)
    if x.shape[-1] != 3:
        raise ValueError(f"{name}: uint8 frames must have 1 or 3 channels, got {x.shape}")
    return x


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """(..., Y, X, C) enlarged by an integer, nearest neighbour."""
    check_value("scale", scale, Count)
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _check_fps(fps: float) -> None:
    if not 0 < fps <= 1000:
        raise ValueError(f"fps: must be in (0, 1000], got {fps!r}")


def write_png(path: str | os.PathLike[str], image: Any) -> None:
    """`image` (Y, X, 3) or (Y, X, 1) uint8, or floats."""
    from PIL import Image

    picture = Image.fromarray(to_rgb(np.asarray(image)[None], "image")[0])
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def write_gif(path: str | os.PathLike[str], frames: Any, fps: float = 25, scale: int = 1) -> None:
    """A GIF that loops for ever. GIF times are multiples of 1/100 s, so 60 fps holds on average only."""
    from PIL import Image

    _check_fps(fps)
    video = enlarge(to_rgb(frames), scale)
    ticks = np.round(np.arange(len(video) + 1) * 100 / fps).astype(int)
    # a palette of 256 colours for each frame, and no dither, which would flicker
    images = [Image.fromarray(f).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for f in video]
    with atomic_path(path) as temporary:
        images[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=[int(d) * 10 for d in np.diff(ticks)],
            loop=0,
        )


def _encoder() -> str:
    import av

    for name in ("libx264", "libopenh264", "mpeg4"):
        try:
            av.codec.Codec(name, "w")
        except ValueError:  # PyAV's UnknownCodecError
            continue
        return name
    raise RuntimeError("write_mp4: PyAV must have one of the encoders libx264, libopenh264, mpeg4, got none")


def write_mp4(path: str | os.PathLike[str], frames: Any, fps: float = 25, scale: int = 1) -> None:
    """H.264 if PyAV has an encoder for it, else MPEG-4 part 2. For odd sizes the last row or column is repeated."""
    try:
        import av
    except ImportError as error:
        raise ImportError("write_mp4 needs the package av: pip install av") from error
    _check_fps(fps)
    video = enlarge(to_rgb(frames), scale)
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    codec = _encoder()
    if max(video.shape[1:3]) > LARGEST:
        raise ValueError(f"frames: must be at most {LARGEST} pixels high and wide, got {video.shape[1:3]}")
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "18"}
        else:
            stream.bit_rate = max(1_000_000, int(video[0].size * fps))
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _text_size(text: str) -> tuple[int, int]:
    from PIL import Image, ImageDraw

    left, _, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), text)
    return int(np.ceil(right - left)), int(np.ceil(bottom))


def _write_text(image: np.ndarray, text: str, y: int, x: int) -> None:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    ImageDraw.Draw(picture).text((x, y), text, fill=(235, 235, 235))
    image[:] = np.asarray(picture)


def strip(
    rows: Sequence[tuple[str, Any]],
    scale: int = 1,
    gap: int = 2,
    max_frames: int | None = None,
    context: int = 0,
) -> np.ndarray:
    """Rows of frames side by side, with labels on the left -> uint8 (Y, X, 3).

    rows: (label, frames (T, Y, X, C)), which may differ in length (missing frames are left empty). If there are more
    than `max_frames` frames, that many are shown, evenly spaced. With `context` = n an orange line separates the first
    n frames from the rest.
    """
    if not rows:
        raise ValueError("rows: must hold at least one, got none")
    if gap < 0 or context < 0 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"gap, context, max_frames: must be >= 0, >= 0 and >= 1, got {gap}, {context}, {max_frames}")
    videos = [enlarge(to_rgb(frames, f"rows[{i}] ({label})"), scale) for i, (label, frames) in enumerate(rows)]
    length = max(len(video) for video in videos)
    shown = np.arange(length)
    if max_frames is not None and length > max_frames:
        shown = np.round(np.linspace(0, length - 1, max_frames)).astype(int)
    border = int((shown < context).sum()) if context else 0
    line = max(2, scale) if 0 < border < len(shown) else 0
    widest = max(video.shape[2] for video in videos)
    labels = [_text_size(label) for label, _ in rows]
    left = max(width for width, _ in labels) + 8 if any(label for label, _ in rows) else gap
    heights = [max(video.shape[1], size[1]) for video, size in zip(videos, labels, strict=True)]
    image = np.full(
        (sum(heights) + gap * (len(rows) + 1), left + len(shown) * (widest + gap) + (line + gap if line else 0), 3),
        BACKGROUND,
        np.uint8,
    )
    y = gap
    for (label, _), video, height, size in zip(rows, videos, heights, labels, strict=True):
        _write_text(image, label, y + (height - size[1]) // 2, 4)
        for column, index in enumerate(shown):
            x = left + column * (widest + gap) + (line + gap if line and column >= border else 0)
            if index < len(video):
                image[y : y + video.shape[1], x : x + video.shape[2]] = video[index]
        y += height + gap
    if line:
        x = left + border * (widest + gap)
        image[:, x : x + line] = GENERATED_BORDER
    return image


def fit_grid(videos: int, size: tuple[int, int], rows: Sequence[str], scale: int) -> tuple[int, int]:
    """(columns, scale) with which so many videos of `size` (Y, X) fit a screen, one labelled line for each of `rows`.

    `scale` is reduced as far as necessary.

    Raises:
        ValueError: they do not fit even at scale 1.
    """
    for smaller in range(scale, 0, -1):
        width = height = 0
        for label in rows:
            text = _text_size(label)
            width, height = max(width, size[1] * smaller + 8, text[0] + 4), height + size[0] * smaller + 12 + text[1]
        columns = min(videos, SCREEN[1] // width)
        if columns and -(-videos // columns) * height <= SCREEN[0]:
            return columns, smaller
    raise ValueError(
        f"videos: must fit into a picture of {SCREEN[0]}x{SCREEN[1]} pixels, got {videos} of {size[0]}x{size[1]}"
    )


def side_by_side(videos: Sequence[tuple[str, Any]], scale: int = 1, gap: int = 4, context: int = 0) -> np.ndarray:
    """(label, frames) of equal height, labels above -> uint8 (T, Y, X, 3) for `write_gif` or `write_mp4`.

    A video that ends early keeps its last frame. With `context` = n the border is grey for the first n frames and
    orange afterwards.
    """
    if not videos:
        raise ValueError("videos: must hold at least one, got none")
    if gap < 0 or context < 0:
        raise ValueError(f"gap, context: must be >= 0, got {gap}, {context}")
    enlarged = [enlarge(to_rgb(frames, f"videos[{i}] ({label})"), scale) for i, (label, frames) in enumerate(videos)]
    if len({video.shape[1] for video in enlarged}) > 1:
        raise ValueError(f"videos: must have the same height, got {[video.shape[1:3] for video in enlarged]}")
    texts = [_text_size(label) for label, _ in videos]
    top = max(size[1] for size in texts) + 4 if any(label for label, _ in videos) else 0
    widths = [max(video.shape[2] + 2 * gap, size[0] + 4) for video, size in zip(enlarged, texts, strict=True)]
    length, height = max(len(video) for video in enlarged), enlarged[0].shape[1]
    out = np.full((length, top + height + 2 * gap, sum(widths), 3), BACKGROUND, np.uint8)
    x = 0
    for (label, _), video, width in zip(videos, enlarged, widths, strict=True):
        panel = np.full((out.shape[1], width, 3), BACKGROUND, np.uint8)
        _write_text(panel, label, 1, 2)
        out[:, :, x : x + width] = panel
        box = out[:, top:, x : x + video.shape[2] + 2 * gap]
        if context:
            box[:context], box[context:] = CONTEXT_BORDER, GENERATED_BORDER
        box[:, gap : gap + height, gap : gap + video.shape[2]] = video[np.minimum(np.arange(length), len(video) - 1)]
        x += width
    return out
