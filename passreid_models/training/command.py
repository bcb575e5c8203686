"""Command lines of training runs: flags, a YAML file and a preset, all naming the fields of one dataclass."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from passreid_models.checkpoints.zoo import find_weight
from passreid_models.runtime import did_you_mean
from passreid_models.training.config import RunConfig

Config = TypeVar("Config", bound=RunConfig)

MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**20, 10
NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


def read_config(
    argv: Sequence[str],
    config: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    program: str,
    description: str,
    expected: str,
    several: str = "",
) -> Config:
    """Parse a command line: defaults, then the preset, then the YAML file, then the flags; the last value wins.

    Args:
        argv: Words of the command line; the one without dashes is ``data``.
        config: Configuration class.
        presets: Settings by name of the preset.
        program: Name for messages and help.
        description: Purpose of the program, for ``--help``.
        expected: Data that are expected, for the error when none are named.
        several: Advice to add to the error when data are named more than once.

    Raises:
        ValueError: If a value is not valid, or data are named twice or not at all.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from passreid_models import __version__

    parser = ArgumentParser(
        prog=program,
        allow_abbrev=False,
        exit_on_error=False,
        usage=f"{program} DATA [--preset NAME] [--config FILE] [options]",
        description=f"{description} Options take dashes or underscores; a YAML file has the same names.",
    )
    parser.add_argument("--version", action="version", version=f"passreid-models {__version__}")
    parser.add_argument("--config", action="config", help="YAML file, such as that of a run")
    several_of = f"settings to begin with: {', '.join(presets)}; several with commas between, of which the later win"
    parser.add_argument("--preset", type=str, metavar="NAME", help=several_of)
    all_fields = fields(config)
    for title, names in config.topics().items():
        group = parser.add_argument_group(title)
        group.add_class_arguments(config, as_group=False, skip={f.name for f in all_fields} - set(names))
    switches = {f.name for f in all_fields if f.type in (bool, "bool")}
    options = _options(argv, switches, pairs={f.name for f in all_fields if str(f.type).startswith("tuple")})
    texts: dict[str, str] = {}
    for file in [Path(value or "") for name, value in options if name == "--config"]:
        check_yaml(file)
        texts |= _texts_in(file)
    texts |= {name[2:]: value for name, value in options if value is not None}
    if named := [value or "" for name, value in options if name == "--preset"]:
        texts["preset"] = ",".join(named)
    parser.set_defaults(merge_presets(texts.get("preset", ""), presets, texts.get("init", "")))
    options.sort(key=lambda option: option[0] != "--config")  # flags win over the file
    try:
        values = parser.parse_args([name if value is None else f"{name}={value}" for name, value in options]).as_dict()
    except ArgumentError as e:
        types = {f.name: str(getattr(f.type, "__name__", f.type)) for f in all_fields}
        message = _one_line(str(e), types)
        if unknown := re.search(r"unrecognized arguments: (--\w+)|Option '(\w+)' is not", message):
            choices = [f"--{name}" if unknown[1] else name for name in ("config", "preset", *types)]
            message += did_you_mean(unknown[1] or unknown[2], choices).replace("_", "-" if unknown[1] else "_")
        raise ValueError(f"{message}; {program} --help lists the options") from None
    if len(data := [value for name, value in options if name == "--data"]) > 1:
        raise ValueError(f"data: one is expected, got {', '.join(map(str, data))}{several}")
    if not values["data"]:
        raise ValueError(f"data: expected {expected}")
    # texts as they were written: the parser takes a folder called 5e3 for a number
    written = {f.name: texts[f.name] for f in all_fields if f.type in (str, "str") and f.name in texts}
    return config(**{f.name: values[f.name] for f in all_fields} | written)


def _one_line(message: str, types: Mapping[str, str]) -> str:
    """The parser's message in one line, with the type of the option as ``--help`` names it."""
    message = " ".join(message.split())
    message = message.replace('Parser key "config": ', "config: ")
    value = re.search(r'Parser key "(\w+)": .*(?:Got|Given) value: (.*)', message)
    if value is None or value[1] not in types:
        return message
    expected = types[value[1]]
    if expected.startswith("tuple"):
        expected = "two numbers such as 256x128" if value[1].endswith("size") else "two numbers"
    return f"{value[1]}: expected {expected}, got {value[2]}"


def merge_presets(names: str, presets: Mapping[str, Mapping[str, Any]], init: str = "") -> dict[str, Any]:
    """Settings of one preset, or of several with commas between, of which the later win; none of an empty text.

    Args:
        names: Names of presets.
        presets: Settings by name of the preset.
        init: Weights to begin with; unless it is empty, ``random`` or a tag of the presets' model, they decide the
            model.

    Raises:
        ValueError: If there is no such preset.
    """
    settings: dict[str, Any] = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name not in presets:
            nearest = did_you_mean(name, presets)
            raise ValueError(f"preset: expected one or more of {', '.join(presets)}, got {name!r}{nearest}")
        settings |= presets[name]
    if init not in ("", "random") and "model" in settings and not find_weight(settings["model"], init):
        del settings["model"]
    return settings


def check_yaml(file: Path) -> None:
    """Check that a file of settings is one, before it is parsed: a text without aliases, not deeply nested.

    Aliases of aliases grow a small file to any size; other errors in the file are left to the parser.

    Raises:
        ValueError: The message names the file.
    """
    import yaml

    if not file.is_file():
        what = "it is no regular file" if file.exists() else "there is none"
        raise ValueError(f"config: expected a YAML file at {file}: {what}")
    if file.stat().st_size > MAX_YAML_BYTES:
        raise ValueError(f"config: {file} is larger than {MAX_YAML_BYTES:,} bytes")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"config: {file} is no text file, expected YAML") from None
    depth = 0
    with suppress(yaml.YAMLError):
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"config: {file} has an alias, *{event.anchor}; expected plain values")
            if depth > MAX_YAML_DEPTH:
                raise ValueError(f"config: {file} is nested more than {MAX_YAML_DEPTH} deep; expected plain values")


def _texts_in(file: Path) -> dict[str, str]:
    """Return the settings in a YAML file that are texts; errors in the file are left to the parser."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return {}
    return {k: v for k, v in content.items() if isinstance(v, str)} if isinstance(content, dict) else {}


def _options(argv: Sequence[str], switches: set[str], pairs: set[str]) -> list[tuple[str, str | None]]:
    """Split ``DATA --batch-size=64 --size 256x128 --blur-radius 0.1 1 --compile`` into jsonargparse's options."""
    options: list[tuple[str, str | None]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, rest = word.partition("=")
        value: str | None = rest if equals else None
        name = "--quiet" if name == "-q" else name
        if not word.startswith("-"):
            name, value = "--data", word
        elif word in ("-h", "--help", "--version") or word.startswith("--print_config"):
            options.append((word, None))
            continue
        else:
            name = "--" + name.lstrip("-").replace("-", "_")
            if not equals and name[2:] in switches:
                value = words.pop(0) if words and words[0].lower() in ("true", "false") else "true"
            elif not equals and words and not words[0].startswith("--"):
                value = words.pop(0)
                if name[2:] in pairs and NUMBER.fullmatch(value) and words and NUMBER.fullmatch(words[0]):
                    value = f"{value}x{words.pop(0)}"
        if value is not None and name[2:] in pairs and len(pair := re.split("[x,]", value)) == 2:
            value = f"[{','.join(pair)}]" if all(map(NUMBER.fullmatch, pair)) else value
        options.append((name, value))
    return options
