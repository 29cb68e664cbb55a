"""A training run's settings as a YAML file: what `sae train --config` reads, and what is written beside the run.

Its keys are the options of `sae train`: those of the training at the top, then `model`, `clips`, `sampler` and `noise`
with theirs below them, and `preset`. Whatever the file does not set is as in the preset.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from .checks import check_choice
from .diffusion.config import SamplerConfig
from .disk import write_text
from .presets import PRESETS, ClipConfig, Preset, PresetName
from .renamed import current_value

CONFIG_FILE = "config.yaml"  # in a run folder: all of its settings
OLD_RUN_FILE = "run.json"  # of older runs: how clips were cut, and the sampler
PARTS = ("model", "clips", "sampler")  # of a preset, each under its name; the training's options are at the top

Config = TypeVar("Config")


def read_config(
    path: Path | str, *, preset: PresetName | None = None, default: PresetName = "tiny"
) -> tuple[PresetName, Preset]:
    """The settings in a YAML file, over those of a preset.

    Args:
        preset: used instead of the one that the file names.
        default: used if neither names one.

    Raises:
        ValueError: not valid YAML, an unknown or repeated key, or a value of the wrong type or against its option's
            rule; the message names file and key.
        OSError: the file cannot be read.
    """
    values = _load(path)
    named = values.pop("preset", default)
    check_choice(f"{path}: preset", named, tuple(PRESETS))
    name = typing.cast(PresetName, preset or named)
    base = PRESETS[name]
    names = [field.name for field in dataclasses.fields(base.train)]
    _check_keys(values, ["preset", *names, *PARTS], f"{path}: ")
    parts = {part: overlay(getattr(base, part), values.pop(part, {}), path, (part,)) for part in PARTS}
    return name, Preset(train=overlay(base.train, values, path, ()), **parts)


def write_config(path: Path, name: PresetName, settings: Preset) -> None:
    """Write all settings as YAML, which `read_config` reads back; the file appears whole or not at all."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def in_one_line(dumper: Any, value: tuple[Any, ...]) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)

    Dumper.add_representer(tuple, in_one_line)
    values = {"preset": name, **dataclasses.asdict(settings.train)}
    values |= {part: dataclasses.asdict(getattr(settings, part)) for part in PARTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def read_run_settings(path: Path) -> tuple[ClipConfig, SamplerConfig] | None:
    """How the clips of a run, named by its folder or a checkpoint in it, were cut, and its sampler; None if unknown."""
    for folder in (path, path.parent):
        if (folder / CONFIG_FILE).exists():
            settings = read_config(folder / CONFIG_FILE)[1]
            return settings.clips, settings.sampler
        if (folder / OLD_RUN_FILE).exists():
            old = json.loads((folder / OLD_RUN_FILE).read_text(encoding="utf-8"))
            sampler = old["sampler"]
            if "steps" in sampler:  # its name until sampling_steps
                sampler["sampling_steps"] = sampler.pop("steps")
            return ClipConfig(**old["clips"]), SamplerConfig(**sampler)
    return None


def read_run_data(path: Path) -> Path | None:
    """What a run, named as above, was trained on; None if unknown."""
    for folder in (path, path.parent):
        if (folder / CONFIG_FILE).exists():
            data = read_config(folder / CONFIG_FILE)[1].train.data
            return Path(data) if data else None
    return None


def _load(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file."""
    import yaml

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        names = [loader.construct_object(key) for key, _ in node.value]
        for name, (key, _) in zip(names, node.value):
            if not isinstance(name, str):
                raise ValueError(f"line {key.start_mark.line + 1}: keys must be names, got {name!r}")
            if names.count(name) > 1:
                raise ValueError(f"line {key.start_mark.line + 1}: {name}: must be given once, got it again")
        return {name: loader.construct_object(value, deep=True) for name, (_, value) in zip(names, node.value)}

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.load(file, Loader)
        except yaml.MarkedYAMLError as error:
            line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            raise ValueError(f"{path}: {line}must be valid YAML: {error.problem}") from error
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict | None):
        raise ValueError(f"{path}: must be a mapping of options to values, got {type(values).__name__}")
    return values or {}


def _check_keys(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            raise ValueError(f"{where}{key}: unknown option{f'; did you mean {near[0]}?' if near else ''}")


def overlay(config: Config, values: Any, path: Path | str, keys: tuple[str, ...] = ()) -> Config:
    """A copy of a configuration with the fields in `values`, as from YAML or JSON, replaced.

    Raises:
        ValueError: an unknown field, or a value that breaks its rule; the message begins with `path` and names both.
    """
    where = ".".join(keys)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {where}: must be a mapping of options to values, got {values!r}")
    kinds = typing.get_type_hints(type(config))
    start = "".join(f"{key}." for key in keys)
    _check_keys(values, list(kinds), f"{path}: {start}")
    new: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(kinds[name]):
            new[name] = overlay(getattr(config, name), value, path, (*keys, name))
        else:
            try:
                new[name] = _value(current_value(name, value), kinds[name])
            except TypeError as error:
                raise ValueError(f"{path}: {start}{name}: must be {error}, got {value!r}") from None
    try:
        return dataclasses.replace(config, **new)  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {start}{error}") from error


def _value(value: Any, kind: Any) -> Any:
    """A value from YAML, converted to the type of its field; a TypeError says what it must be."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(part for part in parts if part is not type(None))
        try:
            return _value(value, kind)
        except TypeError as error:
            raise TypeError(f"{error} or null") from None
    if origin is Literal:
        return value  # checked by its configuration
    if origin is tuple:
        many = "" if parts[-1] is Ellipsis else f"{len(parts)} "
        wanted = f"a list of {many}{'integers' if parts[0] is int else 'numbers'}"
        if not isinstance(value, list) or (many and len(value) != len(parts)):
            raise TypeError(wanted)
        try:
            return tuple(_value(item, parts[0]) for item in value)
        except TypeError:
            raise TypeError(wanted) from None
    if kind is float:
        try:  # YAML reads 1e-2, without a point, as text
            return float("true" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            raise TypeError("a number") from None
    if kind is Path and isinstance(value, str):
        return Path(value)
    names = {int: "an integer", bool: "true or false", str: "text", Path: "a path"}
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(names[kind])
    return value
