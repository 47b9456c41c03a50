"""Reading the settings: ``edgert.toml``, above it the environment, above that the command line.

Every problem is reported, not only the first: who edits a file on a small computer far away wants to
repair it once.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edge_runtime.addresses import split_address
from edge_runtime.daemon.config import Config
from edge_runtime.errors import ConfigError
from edge_runtime.model_store.paths import home

FILE_NAME = "edgert.toml"
SYSTEM_FILE = Path("/etc/edgert") / FILE_NAME
DEFAULT = "default"
PREFIX = "EDGERT_"
_ALIASES = {"EDGERT_MODEL": "model.default", "EDGERT_THREADS": "model.threads"}
_LARGEST_FILE = 1 << 20  # bytes; a settings file has two thousand
_TRUTHS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One key: where it stands, what it may be, and what it means.

    Attributes:
        key: ``section.name``.
        type: bool, int, float or str.
        choices: the only texts possible; empty where there is no such list.
    """

    section: str
    name: str
    type: type
    default: Any
    explanation: str
    least: float | None
    most: float | None
    kind: str
    empty: bool
    choices: tuple[str, ...]

    @property
    def key(self) -> str:
        """``section.name``."""
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """The environment variable of this key."""
        return f"{PREFIX}{self.section}_{self.name}".upper()

    @property
    def needed(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        if self.type is bool:
            return "true or false"
        if self.kind == "address":
            return "HOST:PORT, such as 127.0.0.1:8420 or [::1]:8420"
        if self.type is str:
            return "a text" if self.empty else "a text that is not empty"
        number = "a whole number" if self.type is int else "a number"
        return f"{number} from {self.least:,.10g} to {self.most:,.10g}"

    @property
    def limits(self) -> str:
        """What a value may be, in brackets; empty where the explanation or the type says it."""
        if self.choices:
            return f" [{', '.join(self.choices)}]"
        return f" [{self.least:,.10g} to {self.most:,.10g}]" if self.least is not None else ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings and where they came from.

    Attributes:
        file: the file read; None where there was none.
        sources: key -> ``default``, the file's path, the variable's name or ``command line``.
    """

    config: Config
    file: Path | None
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of ``edgert config show --explain``."""

    key: str
    value: Any
    default: Any
    source: str
    explanation: str


def load_config(path: Path | None, environment: Mapping[str, str], overrides: Mapping[str, Any]) -> Config:
    """The settings that hold.

    Args:
        path: the file; None takes ``edgert.toml`` of the home folder, else ``/etc/edgert/edgert.toml``, else
            none.
        environment: ``EDGERT_SECTION_KEY`` variables count; an empty one does where that is a value.
        overrides: ``section.key`` -> value from the command line; None means not given.

    Raises:
        ConfigError: every unknown key, wrong type and value out of range, in one message.
    """
    return read_settings(path, environment, overrides).config


def read_settings(path: Path | None, environment: Mapping[str, str], overrides: Mapping[str, Any]) -> Loaded:
    """As :func:`load_config`, with the source of every value."""
    file = path if path is not None else default_file(environment)
    problems: list[str] = []
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(known: Setting, value: Any, source: str, *, folder: Path | None = None) -> None:
        try:
            values[known.key] = _checked(known, value, folder)
            sources[known.key] = source
        except ValueError as error:
            problems.append(f"{source}: {known.key} = {_shown(value)}; {error}")

    if file is not None:
        folder = file.absolute().parent
        for known, value in _of_table(_parse(file), file, problems):
            take(known, value, str(file), folder=folder)
    for known, variable, text in _of_environment(environment, problems):
        take(known, _from_text(known, text), variable)
    for key, value in overrides.items():
        if value is not None:
            take(SETTINGS[key], value, "command line")
    config = _assembled(values)
    if not problems:
        problems += _contradictions(config)
    if problems:
        raise ConfigError(_report(problems))
    return Loaded(config, file, {key: sources.get(key, DEFAULT) for key in SETTINGS})


def explain(config: Config, sources: Mapping[str, str]) -> list[Row]:
    """Every key with its value, its default, where the value came from, and what it means."""
    return [
        Row(
            known.key,
            getattr(getattr(config, known.section), known.name),
            known.default,
            sources.get(known.key, DEFAULT),
            known.explanation,
        )
        for known in SETTINGS.values()
    ]


def render_commented(config: Config, sources: Mapping[str, str] | None = None) -> str:
    """The settings as TOML with every key and its explanation; reading it gives the same settings.

    Args:
        sources: of :class:`Loaded`, to be told beside the explanations.
    """
    lines = ["# Settings of the edge runtime's daemon."]
    section = ""
    for row in explain(config, sources or {}):
        known = SETTINGS[row.key]
        if known.section != section:
            section = known.section
            lines += ["", f"# {_section_explanation(section)}", f"[{section}]"]
        lines.append(f"# {known.explanation}{known.limits}")
        if sources is not None and row.source != DEFAULT:
            origin = "".join(c if c.isprintable() else "?" for c in row.source)
            lines.append(f"# from {origin}; default {toml_value(row.default)}")
        lines.append(f"{known.name} = {toml_value(row.value)}")
    return "\n".join(lines) + "\n"


def default_file(environment: Mapping[str, str]) -> Path | None:
    """The settings file that is read when none is named; None where there is none.

    Raises:
        ConfigError: there is one that this user may not look at.
    """
    chosen = environment.get("EDGERT_HOME")
    own = (Path(chosen).expanduser().absolute() if chosen else home()) / FILE_NAME
    for file in (own, SYSTEM_FILE):
        try:
            if file.exists():
                return file
        except OSError as error:
            raise ConfigError(
                f"{file}: {error.strerror}; make it readable for this user, or name another with --config"
            ) from error
    return None


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{"".join(map(_toml_character, value))}"'
    return repr(value)


def _toml_character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def _settings() -> dict[str, Setting]:
    found = {}
    for section in fields(Config):
        factory: Any = section.default_factory
        types = get_type_hints(factory)
        for one in fields(factory):
            setting = _setting(section.name, one, types[one.name])
            found[setting.key] = setting
    return found


def _setting(section: str, one: Field[Any], hint: Any) -> Setting:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    about = dict(one.metadata)
    return Setting(section, one.name, str if choices else hint, one.default, choices=choices, **about)


SETTINGS = _settings()
"""Every setting: key -> :class:`Setting`, in the order of the file."""


def _section_explanation(section: str) -> str:
    factory: Any = next(one.default_factory for one in fields(Config) if one.name == section)
    return str(factory.__doc__).splitlines()[0]


def _parse(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            raw = opened.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}; `edgert config path` says which files are read"
        ) from error
    if len(raw) > _LARGEST_FILE:
        raise ConfigError(f"{file}: more than {_LARGEST_FILE} bytes; this is no settings file")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start})") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not TOML: {error or 'nested too deep'}") from error


def _of_table(table: Mapping[str, Any], file: Path, problems: list[str]) -> list[tuple[Setting, Any]]:
    found = []
    sections = [one.name for one in fields(Config)]
    for section, content in table.items():
        if section not in sections:
            what = "section" if isinstance(content, dict) else "key"
            # A key above the first section is most often one that was meant to be in it.
            names = sections if isinstance(content, dict) else list(SETTINGS)
            problems.append(f"{file}: unknown {what} {_shown(section)}{_nearest(section, names)}")
        elif not isinstance(content, dict):
            problems.append(f"{file}: {section} = {_shown(content)}; needed is a section [{section}]")
        else:
            for name, value in content.items():
                key = f"{section}.{name}"
                if key in SETTINGS:
                    found.append((SETTINGS[key], value))
                else:
                    problems.append(f"{file}: unknown key {_shown(key)}{_nearest(key, list(SETTINGS))}")
    return found


def _of_environment(environment: Mapping[str, str], problems: list[str]) -> list[tuple[Setting, str, str]]:
    by_variable = {known.variable: known for known in SETTINGS.values()}
    sections = tuple(f"{PREFIX}{one.name.upper()}_" for one in fields(Config))
    found = []
    # The aliases first: the full name, which says more exactly what is meant, has the last word.
    for variable in sorted(environment, key=lambda name: (name not in _ALIASES, name)):
        known = SETTINGS[_ALIASES[variable]] if variable in _ALIASES else by_variable.get(variable)
        text = environment[variable]
        if known is not None:
            if text or known.empty:
                found.append((known, variable, text))
        elif variable.startswith(sections):
            near = _nearest(variable, list(by_variable))
            problems.append(f"environment: unknown variable {_shown(variable)}{near}")
    return found


def _from_text(known: Setting, text: str) -> Any:
    """What a variable's text means; the text itself where it is no number or truth, for the complaint."""
    try:
        if known.type is bool:
            return _TRUTHS[text.strip().lower()]
        return known.type(text.strip())
    except (ValueError, KeyError):
        return text


def _checked(known: Setting, value: Any, folder: Path | None) -> Any:
    needed = f"needed is {known.needed}"
    if known.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 53 else float("inf")
    if type(value) is not known.type or (known.choices and value not in known.choices):
        raise ValueError(needed)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if known.least is None or known.most is None or not known.least <= value <= known.most:
            raise ValueError(needed)
        return value
    if isinstance(value, str):
        return _checked_text(known, value, folder)
    return value


def _checked_text(known: Setting, value: str, folder: Path | None) -> str:
    if not value.strip():
        if not known.empty or value:
            raise ValueError(f"needed is {known.needed}")
        return value
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in value):
        raise ValueError("it has control characters, or bytes that are not UTF-8")
    if known.kind == "address":
        split_address(value)
    if known.kind == "path":
        path = Path(value).expanduser()
        return str(folder / path if folder is not None else path.absolute())
    return value


def _assembled(values: Mapping[str, Any]) -> Config:
    sections: dict[str, Any] = {}
    for section in fields(Config):
        factory: Callable[..., Any] = section.default_factory  # type: ignore[assignment]
        prefix = f"{section.name}."
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        sections[section.name] = factory(**own)
    return Config(**sections)


def _contradictions(config: Config) -> list[str]:
    server = config.server
    found = []
    if not server.http and not server.grpc:
        found.append(
            "server.http and server.grpc are both empty, so that nothing would listen; set one of them"
        )
    if server.http and server.http == server.grpc and split_address(server.http)[1] != 0:
        found.append(f"server.http and server.grpc are both {server.http}; give them different ports")
    if bool(server.tls_certificate) != bool(server.tls_key):
        missing = "tls_key" if server.tls_certificate else "tls_certificate"
        found.append(f"server.{missing} is empty; a certificate and its key belong together")
    return found


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not near:
        # `port` has no likeness to `server.http`, but `threads` is the end of `model.threads`.
        ends = [known for known in names if known.endswith(f".{name}")]
        near = ends[:1]
    return f"; the nearest is {near[0]!r}" if near else f"; there are {', '.join(names)}"


def _shown(value: Any) -> str:
    """A value as the complaint quotes it: short, on one line, printable."""
    text = repr(value) if not isinstance(value, dict) else "a section"
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _report(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "\n".join(
        [f"{len(problems)} problems in the settings:", *(f"  {problem}" for problem in problems)]
    )
