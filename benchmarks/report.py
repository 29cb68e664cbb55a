"""Tables and plots of result files: for the terminal, for docs and README (between markers), and PNG."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import measure, registry

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NO_GPU = "**Not yet measured on a GPU.**"
DIRECTIONS = {"fwd": ", forward", "fwd+bwd": ", forward and backward"}
HEADER = (
    "case", "direction", "contender", "time per unit", "quartiles", "× ours", "TFLOP/s", "of matmul", "GB/s", "of copy",
    "peak memory", "launches",
)  # fmt: skip


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Result files, with their names under "file".

    Raises:
        ValueError: a file is not a result file of this schema.
    """
    found = []
    for path in paths:
        result = json.loads(Path(path).read_text())
        if not isinstance(result, dict) or result.get("schema") != 1 or "cases" not in result:
            raise ValueError(f"{path}: is not a benchmark result of schema 1")
        found.append(result | {"file": Path(path).name})
    return found


def ours(record: Mapping[str, Any], direction: str) -> dict[str, Any] | None:
    """Our default's result of a case; None if it has none."""
    found = [r for r in record["results"] if r["kind"] == "ours" and r["direction"] == direction]
    return found[0] if found else None


def per_unit(result: Mapping[str, Any]) -> float:
    return result["median_s"] / result["units"]


def ratio(record: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    """Time per unit over ours; for a yardstick with its own amount of arithmetic, time per operation over ours."""
    base = ours(record, result["direction"])
    if base is None:
        return None
    if result["kind"] == "other" and result.get("flops_per_s") and base.get("flops_per_s"):
        return base["flops_per_s"] / result["flops_per_s"]
    return per_unit(result) / per_unit(base)


def rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line for each result of a case, as `HEADER` says."""
    lines = []
    for result in record["results"]:
        factor, unit = ratio(record, result), result["units"]
        spread = f"{duration(result['q25_s'] / unit)} – {duration(result['q75_s'] / unit)}"
        lines.append(
            (
                f"{record['op']}/{record['case']}",
                result["direction"],
                result["contender"] + (" *" if result["kind"] == "other" else ""),
                duration(per_unit(result)),
                spread,
                "" if factor is None else f"{factor:.2f}",
                "" if not result.get("flops_per_s") else f"{result['flops_per_s'] / 1e12:.3g}",
                "" if not result.get("fraction_of_matmul") else f"{result['fraction_of_matmul']:.0%}",
                "" if not result.get("bytes_per_s") else f"{result['bytes_per_s'] / 1e9:.3g}",
                "" if not result.get("fraction_of_copy") else f"{result['fraction_of_copy']:.0%}",
                size(result["peak_bytes"]),
                "" if result["launches"] is None else str(result["launches"]),
            )
        )
    return lines


def remarks(record: Mapping[str, Any]) -> list[str]:
    """What a table of figures does not show: red gates, wrong or missing contenders, set-up costs, yardsticks."""
    if not record["gate"]["ok"]:
        return [f"RED, no figures: {record['gate']['reason']}"]
    found = [f"{w['contender']}, {w['direction']}: WRONG, no figure: {w['reason']}" for w in record["wrong"]]
    for missing in record["missing"]:
        where = "" if missing["direction"] is None else f", {missing['direction']}"
        found.append(f"{missing['contender']}{where}: not there: {missing['reason']}")
    if not record.get("cold", True):
        found.append("warm cache: the input sets fit in it")
    first = {result["contender"]: result for result in reversed(record["results"])}
    for name, result in reversed(first.items()):
        if result["kind"] == "other":
            found.append(f"{name} *: {result['note']}")
        if result["setup"]:
            parts = [
                f"{key.rsplit('_', 1)[0].replace('_', ' ')} {(duration if key.endswith('seconds') else size)(value)}"
                for key, value in result["setup"].items()
            ]
            found.append(f"{name}: set-up not in the time: {', '.join(parts)}")
    return found


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def size(count: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.3g} {unit}"
    return f"{int(count)} B"


def show(record: Mapping[str, Any]) -> None:
    """Print one case: its table if the gate is green, and the remarks."""
    lines = rows(record)
    if lines:
        _print_table(
            [line[1:] for line in lines], HEADER[1:], f"{lines[0][0]} ({record['about']}), per {record['unit']}"
        )
    for remark in remarks(record):
        print(f"{record['op']}/{record['case']}: {remark}")
    print(flush=True)


def _print_table(lines: Sequence[Sequence[str]], header: Sequence[str], title: str) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *lines)]
        print(title)
        for line in (header, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        return
    console = Console()
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, no_wrap=True)
    for line in lines:
        table.add_row(*line)
    # Piped into a file, a table keeps its columns.
    Console(width=console.width if console.is_terminal else 200).print(table)


def markdown(results: Sequence[Mapping[str, Any]], plots: Sequence[str] = ()) -> str:
    """The section of docs/benchmarks.md: a table of ratios for each machine and operation, and what is not there."""
    parts = []
    if not _on_gpu(results):
        parts.append(f"{NO_GPU} The figures below are of a CPU.")
    for result in results:
        parts += _section(result)
    parts += [f"![{Path(name).stem}]({name})" for name in plots]
    return "\n\n".join(parts)


def short(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's section: of each operation the most important case, in its last direction, with all its peers."""
    parts = [] if _on_gpu(results) else [NO_GPU]
    for result in sorted(results, key=lambda r: r["environment"]["device"] != "cuda"):
        env = result["environment"]
        lines = [
            f"| {machine_of(env)}, torch {env['torch']}, {env['date'][:10]} | ours | peer: its time over ours |",
            "|---|---|---|",
        ]
        first = {record["op"]: record for record in reversed(result["cases"])}
        for op in registry.OPS:
            lines += _short_line(first[op]) if op in first else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _short_line(record: Mapping[str, Any]) -> list[str]:
    name = f"{record['op']}, {record['case']}"
    if not record["gate"]["ok"]:
        return [f"| {name} | red gate, no figures | |"]
    directions = [r["direction"] for r in record["results"] if r["kind"] == "ours"]
    base = ours(record, directions[-1]) if directions else None
    if base is None:
        return []
    peers = [r for r in record["results"] if r["kind"] == "peer" and r["direction"] == base["direction"]]
    times = "; ".join(f"{r['contender']} {ratio(record, r):.2f}×" for r in peers)
    return [f"| {name}{DIRECTIONS.get(base['direction'], '')} | {_time_of(record, base)} | {times} |"]


def _time_of(record: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    return duration(per_unit(result)) + ("" if record["unit"] == "call" else f" per {record['unit']}")


def machine_of(env: Mapping[str, Any]) -> str:
    return env.get("gpu") or f"{env['cpu']}, {env['threads']} threads"


def _on_gpu(results: Sequence[Mapping[str, Any]]) -> bool:
    return any(result["environment"]["device"] == "cuda" for result in results)


def _section(result: Mapping[str, Any]) -> list[str]:
    env, limits = result["environment"], result["ceilings"]
    machine = machine_of(env)
    matmul = ", ".join(f"{v / 1e12:.3g} TFLOP/s {k}" for k, v in limits["matmul_flops_per_s"].items())
    versions = f"torch {env['torch']}, triton {env['triton']}"
    if env["device"] == "cuda":
        versions += f", cuDNN {env['cudnn']}, driver {(env.get('clocks') or {}).get('driver_version', 'unknown')}"
    commit = env["commit"][:12] + (" with uncommitted changes" if env["uncommitted_changes"] else "")
    kept = env["device"] == "cpu" and env.get("allocator", "as found") != "as found"
    memory = ", in memory that the process keeps between calls" if kept else ""
    parts = [
        f"### {machine}",
        f"{env['date'][:10]}, commit {commit}, Python {env['python']}, {versions}. Ceilings measured in the same "
        f"run: matmul {matmul}; copy {limits['copy_bytes_per_s'] / 1e9:.3g} GB/s. Medians of interleaved calls on "
        f"random data with a cold cache{memory}; `{result['file']}` has quartiles and all details.",
    ]
    load = max(env["load_average"], env.get("load_average_after", 0) - env["threads"])
    if env["device"] == "cpu" and load > 0.5:
        parts.append(f"Other processes were running (load average before: {env['load_average']:.1f}).")
    by_op: dict[str, list[Mapping[str, Any]]] = {}
    for record in _in_order(result):
        by_op.setdefault(record["op"], []).append(record)
    for op, records in by_op.items():
        lines = [
            "| case | direction | ours | peer: its time over ours | rate | of ceiling |",
            "|---|---|---|---|---|---|",
        ]
        for record in records:
            lines += _ratio_lines(record)
        parts += [f"**{op}**", "\n".join(lines)]
        notes = _notes(records)
        if notes:
            parts.append(f'<details markdown="1"><summary>Notes and what is missing</summary>\n\n{notes}\n\n</details>')
    for skipped in result.get("not_run", []):
        parts.append(f"{skipped['op']}/{skipped['case']} was not run: {skipped['reason']}.")
    return parts


def _in_order(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Cases by op; they were run by importance."""
    return sorted(result["cases"], key=lambda record: registry.OPS.index(record["op"]))


def _notes(records: Sequence[Mapping[str, Any]]) -> str:
    """The remarks of an op's cases, what holds for all of them said once."""
    cases: dict[str, list[str]] = {}
    for record in records:
        for remark in remarks(record):
            cases.setdefault(remark, []).append(record["case"])
    everywhere = [f"- {remark}" for remark, names in cases.items() if len(names) == len(records)]
    somewhere = [f"- {', '.join(names)}: {remark}" for remark, names in cases.items() if len(names) < len(records)]
    return "\n".join(everywhere + somewhere)


def _ratio_lines(record: Mapping[str, Any]) -> list[str]:
    if not record["gate"]["ok"]:
        return [f"| {record['case']} | | red gate, no figures | | | |"]
    lines = []
    for direction in dict.fromkeys(r["direction"] for r in record["results"]):
        base = ours(record, direction)
        if base is None:
            continue
        others = [r for r in record["results"] if r["direction"] == direction and r is not base]
        peers = "; ".join(
            f"{r['contender']}{' *' if r['kind'] == 'other' else ''} **{ratio(record, r):.2f}×**" for r in others
        )
        compute, copy = base.get("fraction_of_matmul"), base.get("fraction_of_copy")
        rate = fraction = ""
        if compute and (not copy or compute >= copy):
            rate, fraction = f"{base['flops_per_s'] / 1e12:.3g} TFLOP/s", f"{compute:.0%} of matmul"
        elif copy:
            rate, fraction = f"{base['bytes_per_s'] / 1e9:.3g} GB/s", f"{copy:.0%} of copy"
        lines.append(f"| {record['case']} | {direction} | {_time_of(record, base)} | {peers} | {rate} | {fraction} |")
    return lines


def write_between(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the markers of a page, and nothing else.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before = path.read_text(encoding="utf-8")
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ValueError(f"{path}: must hold the markers {begin} and {end}, once each and in this order")
    head, rest = before.split(begin)
    _, tail = rest.split(end)
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


# --- plots


def plot(result: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Ratio bars, time against T, and roofline of one result file, as far as it has the figures. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for name, draw in (("ratios", _draw_ratios), ("scaling", _draw_scaling), ("roofline", _draw_roofline)):
        figure = draw(pyplot, result)
        if figure is not None:
            path = folder / f"{stem}-{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight")
            pyplot.close(figure)
            paths.append(path)
    return paths


def _title(result: Mapping[str, Any]) -> str:
    env = result["environment"]
    return f"{machine_of(env)}, torch {env['torch']}, {env['date'][:10]}"


def _draw_ratios(pyplot, result):
    bars = []
    for record in _in_order(result):
        if record["op"] == "scaling":
            continue
        for entry in record["results"]:
            factor = ratio(record, entry)
            if entry["kind"] == "peer" and factor is not None:
                bars.append((f"{record['op']}/{record['case']}, {entry['direction']}: {entry['contender']}", factor))
    if not bars:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 0.6 + 0.24 * len(bars)))
    labels, factors = zip(*reversed(bars))
    colors = ["tab:green" if f >= 1 else "tab:red" for f in factors]
    axis.barh(range(len(bars)), factors, color=colors)
    axis.set_yticks(range(len(bars)), labels, fontsize=7)
    axis.set_ylim(-0.6, len(bars) - 0.4)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    for y, factor in enumerate(factors):
        axis.text(factor, y, f" {factor:.2f}", va="center", fontsize=7)
    axis.set_xlabel("time of the peer over ours (1 = equal, more = ours is faster)")
    axis.set_title(_title(result), fontsize=9)
    return figure


def _draw_scaling(pyplot, result):
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in result["cases"]:
        if record["op"] == "scaling":
            for entry in record["results"]:
                lines.setdefault(entry["contender"], []).append((record["shape"]["T"], per_unit(entry)))
    if not lines:
        return None
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, points in lines.items():
        points.sort()
        axis.plot(*zip(*((t, s * 1e3) for t, s in points)), marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="context length T (frames)", ylabel="ms per training frame")
    axis.set_xticks([t for t, _ in points], [str(t) for t, _ in points])
    axis.minorticks_off()
    axis.set_ylim(bottom=0.5 * min(s * 1e3 for line in lines.values() for _, s in line))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(_title(result), fontsize=9)
    return figure


def _draw_roofline(pyplot, result):
    points = []
    for record in _in_order(result):
        for entry in record["results"]:
            if entry["kind"] == "ours" and entry.get("flops_per_s") and entry.get("bytes_per_s"):
                points.append((f"{record['op']}/{record['case']}, {entry['direction']}", record["dtype"], entry))
    if not points:
        return None
    limits, figure_axis = result["ceilings"], pyplot.subplots(figsize=(9, 5))
    figure, axis = figure_axis
    intensities = [e["flops_per_s"] / e["bytes_per_s"] for _, _, e in points]
    ends = [min(intensities) / 4, max(intensities) * 4]
    copy = limits["copy_bytes_per_s"]
    for dtype in dict.fromkeys(d for _, d, _ in points):
        peak = limits["matmul_flops_per_s"].get(dtype)
        if peak:
            knee = peak / copy
            xs = sorted({ends[0], min(max(knee, ends[0]), ends[1]), ends[1]})
            axis.plot(xs, [min(peak, copy * x) for x in xs], linewidth=1, label=f"measured ceilings, {dtype}")
    for (name, _, entry), x in zip(points, intensities):
        axis.plot(x, entry["flops_per_s"], "o", markersize=4, label=name)
    axis.set(
        xscale="log", yscale="log", xlabel="operations per byte of minimal traffic", ylabel="operations per second"
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_title(_title(result), fontsize=9)
    return figure


def plots_or_reason(result: Mapping[str, Any], folder: Path, stem: str) -> tuple[list[Path], str | None]:
    """The plots, or why there are none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return [], "no plots: matplotlib is not installed"
    return plot(result, folder, stem), None


def main(
    paths: Sequence[Path], page: Path | None, readme: Path | None, folder: Path | None, *, draw: bool = True
) -> str:
    """What `python -m benchmarks report` does: writes `page` and `readme`, if any; returns the Markdown of the page."""
    results = load(paths)
    names: list[Path] = []
    for path, result in zip(paths, results) if draw else ():
        where = folder or Path(path).parent
        drawn, reason = plots_or_reason(result, where, Path(path).stem)
        if reason:
            print(reason)
        names += drawn
    base = (page or measure.ROOT / "docs" / "benchmarks.md").resolve().parent
    text = markdown(results, [Path(os.path.relpath(name.resolve(), base)).as_posix() for name in names])
    if page is not None:
        write_between(page, text)
    if readme is not None:
        write_between(readme, short(results))
    return text
