"""Draws docs/figures/*.svg: `python docs/figures.py`. Colours are readable on light and dark pages alike."""

from __future__ import annotations

from pathlib import Path

from sae_kernels import FrameLayout

FOLDER = Path(__file__).parent / "figures"
CELL, GAP, LEFT, TOP, BETWEEN = 22, 2, 34, 56, 66
TEXT = "#6e7781"
COLORS = {"clean": "#4184e4", "past": "#e0823d", "own": "#57ab5a"}
PANELS = (
    ("one frame after the other", FrameLayout(4, 1)),
    ("frames_per_block=2", FrameLayout(4, 1, frames_per_block=2)),
    ("window=1, sink=1", FrameLayout(4, 1, window=1, sink=1)),
)
LEGEND = (
    ("clean", "clean sees clean, up to itself"),
    ("past", "noisy sees the clean past"),
    ("own", "and itself"),
)
TITLE = "Clean frames see clean frames up to themselves; noisy frames see the clean frames before them, and themselves."


def mask_svg() -> str:
    """Who sees whom in a clip of 4 frames and its noisy copy: rows are the frames that look, columns those seen."""
    side = 8 * (CELL + GAP)
    width, height = LEFT + len(PANELS) * (side + BETWEEN) - BETWEEN + 8, TOP + side + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12" role="img">',
        f"<title>{TITLE}</title>",
    ]
    for i, (name, layout) in enumerate(PANELS):
        lines += _panel(LEFT + i * (side + BETWEEN), name, layout)
    x = LEFT
    for key, text in LEGEND:
        lines.append(f'<rect x="{x}" y="{height - 20}" width="12" height="12" rx="2" fill="{COLORS[key]}"/>')
        lines.append(_text(x + 18, height - 10, text, "start"))
        x += 18 + 7.3 * len(text) + 24
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(left: int, name: str, layout: FrameLayout) -> list[str]:
    mask, T, step = layout.dense_mask(), layout.frames, CELL + GAP
    lines = [_text(left + 4 * step, TOP - 40, name, "middle")]
    for stream, label in enumerate(("clean", "noisy")):
        lines.append(_text(left + (2 + 4 * stream) * step, TOP - 22, label, "middle"))
    for i in range(2 * T):
        number = str(i % T + 1)
        lines.append(_text(left + i * step + CELL / 2, TOP - 6, number, "middle"))
        lines.append(_text(left - 6, TOP + i * step + CELL / 2 + 4, ("c" if i < T else "n") + number, "end"))
        for j in range(2 * T):
            fill = f'{TEXT}" fill-opacity="0.2'
            if mask[i, j]:
                fill = COLORS["clean" if i < T else "past" if j < T else "own"]
            place = f'x="{left + j * step}" y="{TOP + i * step}" width="{CELL}" height="{CELL}" rx="3"'
            lines.append(f'<rect {place} fill="{fill}"/>')
    return lines


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{TEXT}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "mask.svg").write_text(mask_svg(), encoding="utf-8")
