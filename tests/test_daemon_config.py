"""The daemon's settings: what a file, the environment and flags may say, and how mistakes are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.daemon import config_file
from edge_runtime.daemon.config import Config, LogConfig, ModelConfig, SchedulingConfig, ServerConfig
from edge_runtime.daemon.config_file import explain, load_config, read_settings, render_commented
from edge_runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_file, "SYSTEM_FILE", tmp_path / "etc" / "edgert.toml")
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "home"))


def written(folder: Path, text: str) -> Path:
    path = folder / "edgert.toml"
    path.write_text(text)
    return path


def problems(path: Path | None, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environment or {}, {})
    return str(caught.value)


def test_nothing_said_gives_the_defaults() -> None:
    assert load_config(None, {}, {}) == Config()


def test_flags_stand_above_the_environment_and_that_above_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[model]\nthreads = 1\ncontext = 100\nsequences = 7\n")
    environment = {"EDGERT_MODEL_THREADS": "2", "EDGERT_MODEL_CONTEXT": "200"}
    loaded = read_settings(path, environment, {"model.threads": 3, "model.context": None})
    assert (loaded.config.model.threads, loaded.config.model.context) == (3, 200)
    assert loaded.config.model.sequences == 7
    assert loaded.sources["model.threads"] == "command line"
    assert loaded.sources["model.context"] == "EDGERT_MODEL_CONTEXT"
    assert loaded.sources["model.sequences"] == str(path)
    assert loaded.sources["model.weights"] == "default"


def test_the_short_variables_yield_to_the_long_ones() -> None:
    short = {"EDGERT_MODEL": "small", "EDGERT_THREADS": "2"}
    assert load_config(None, short, {}).model == ModelConfig(default="small", threads=2)
    both = short | {"EDGERT_MODEL_DEFAULT": "large", "EDGERT_MODEL_THREADS": "4"}
    assert load_config(None, both, {}).model == ModelConfig(default="large", threads=4)


def test_the_home_folder_is_looked_at_before_the_system(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    written(tmp_path / "etc", "[model]\ndefault = 'of-the-system'\n")
    home = {"EDGERT_HOME": str(tmp_path / "home")}
    assert load_config(None, home, {}).model.default == "of-the-system"
    (tmp_path / "home").mkdir()
    written(tmp_path / "home", "[model]\ndefault = 'own'\n")
    assert load_config(None, home, {}).model.default == "own"


def test_every_problem_is_told_at_once_with_the_file_and_the_nearest_name(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "threads = 3\n[model]\nthread = 3\npreload = 'yes'\n[servr]\n[scheduling]\nqueue = 0\n",
    )
    told = problems(path, {"EDGERT_SERVER_HTP": "x", "EDGERT_LOG_LEVEL": "loud"})
    assert told.count(str(path)) == 5
    assert "unknown key 'threads'; the nearest is 'model.threads'" in told
    assert "unknown key 'model.thread'; the nearest is 'model.threads'" in told
    assert "unknown section 'servr'; the nearest is 'server'" in told
    assert "model.preload = 'yes'; needed is true or false" in told
    assert "scheduling.queue = 0; needed is a whole number from 1 to 10,000" in told
    assert "unknown variable 'EDGERT_SERVER_HTP'; the nearest is 'EDGERT_SERVER_HTTP'" in told
    assert "EDGERT_LOG_LEVEL: log.level = 'loud'; needed is one of 'debug'" in told


@pytest.mark.parametrize(
    "text",
    [
        "[model]\nthreads = true",
        "[model]\nthreads = 2.0",
        "[model]\nthreads = '2'",
        "[model]\nthreads = 513",
        "[model]\ncontext = -1",
        "[model]\ndefault = ''",
        "[model]\ndefault = 3",
        "[model]\npreload = 1",
        "[model]\nweights = 'fast'",
        "[scheduling]\nrequest_seconds = nan",
        "[scheduling]\nrequest_seconds = inf",
        "[scheduling]\nrequest_seconds = 0",
        "[scheduling]\nready_seconds = 99999999999999999999999",
        "[server]\nshutdown_seconds = '20'",
        "[server]\nhttp = '8420'",
        "[server]\nhttp = 'http://127.0.0.1:8420'",
        "[server]\nhttp = '::1:8420'",
        "[server]\nhttp = '127.0.0.1:65536'",
        "[server]\nhttp = 'host name:80'",
        "[server]\nhttp = ''\ngrpc = ''",
        "[server]\nhttp = '127.0.0.1:1'\ngrpc = '127.0.0.1:1'",
        "[server]\ntls_key = 'server.key'",
        '[log]\nfile = "a\\u001bb"',
        "server = 3",
        "[[server]]\nhttp = ''",
        "[model",
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    told = problems(path)
    assert str(path) in told or "server." in told
    assert "Traceback" not in told


def test_values_at_the_edge_are_taken(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "[server]\nhttp = '[::1]:0'\ngrpc = ''\nshutdown_seconds = 0\n[scheduling]\nrequest_seconds = 0.1\n",
    )
    config = load_config(path, {}, {})
    assert config.server == ServerConfig(http="[::1]:0", grpc="", shutdown_seconds=0.0)
    assert isinstance(config.server.shutdown_seconds, float)
    assert config.scheduling == SchedulingConfig(request_seconds=0.1)


def test_paths_of_a_file_are_seen_from_its_folder(tmp_path: Path) -> None:
    path = written(tmp_path, "[log]\nfile = 'log/edgert.log'\n")
    assert load_config(path, {}, {}).log.file == str(tmp_path / "log" / "edgert.log")


@pytest.mark.parametrize(("text", "value"), [("true", True), ("0", False), ("No", False), ("on", True)])
def test_truths_of_the_environment(text: str, value: bool) -> None:
    assert load_config(None, {"EDGERT_MODEL_PRELOAD": text}, {}).model.preload is value


def test_an_empty_variable_counts_where_empty_is_a_value() -> None:
    config = load_config(None, {"EDGERT_SERVER_GRPC": "", "EDGERT_MODEL_THREADS": "", "EDGERT_MODEL": ""}, {})
    assert config.server.grpc == ""
    assert config.model == ModelConfig()


def test_other_variables_of_the_program_are_left_alone() -> None:
    environment = {"EDGERT_HOME": "/nowhere", "EDGERT_DEBUG": "1", "EDGERT_HUB": "x", "EDGERT_LOGBOOK": "1"}
    assert load_config(None, environment, {}) == Config()


def test_a_file_that_is_named_has_to_be_there(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "absent.toml")
    assert "directory" in problems(tmp_path)


def test_what_is_no_settings_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edgert.toml"
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in problems(path)
    path.write_bytes(b"#" * (2 << 20))
    assert "no settings file" in problems(path)
    path.write_text("a = " + "[" * 100_000)
    assert "not TOML" in problems(path)


def test_a_complaint_stays_on_one_line_and_cannot_command_the_terminal(tmp_path: Path) -> None:
    path = written(
        tmp_path, '"a\\u001b[2J\\n" = 1\n[model]\ndefault = "\\u0007"\nweights = "' + "x" * 5000 + '"'
    )
    told = problems(path)
    assert len(told.splitlines()) == 4
    assert all(character.isprintable() or character == "\n" for character in told)
    assert len(told) < 2000


def test_explain_has_every_key_with_its_source(tmp_path: Path) -> None:
    path = written(tmp_path, "[log]\nlevel = 'debug'\n")
    loaded = read_settings(path, {}, {})
    rows = {row.key: row for row in explain(loaded.config, loaded.sources)}
    assert len(rows) == 8 + 8 + 4 + 10 + 3 - 1
    assert rows["log.level"].value == "debug"
    assert rows["log.level"].default == "info"
    assert rows["log.level"].source == str(path)
    assert all(len(row.explanation) > 10 for row in rows.values())


def test_every_number_has_its_limits_and_the_default_is_within() -> None:
    for setting in config_file.SETTINGS.values():
        if setting.type in (int, float):
            assert setting.least is not None
            assert setting.most is not None
            assert setting.least <= setting.default <= setting.most, setting.key


texts = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs",)), min_size=1).filter(str.strip)
paths = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs",), exclude_characters="~")).map(
    "/".__add__
)


@given(
    default=texts,
    file=paths,
    threads=st.integers(0, 512),
    seconds=st.floats(0.1, 86_400),
    preload=st.booleans(),
    weights=st.sampled_from(["repack", "mmap"]),
)
def test_what_is_rendered_reads_the_same(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    config = replace(
        Config(),
        model=ModelConfig(
            default=values["default"],
            threads=values["threads"],
            preload=values["preload"],
            weights=values["weights"],
        ),
        scheduling=SchedulingConfig(request_seconds=values["seconds"]),
        log=LogConfig(file=str(Path(values["file"]))),
    )
    path = written(tmp_path_factory.mktemp("rendered"), render_commented(config))
    assert load_config(path, {}, {}) == config


def test_characters_that_nobody_sees_are_written_by_their_numbers(tmp_path: Path) -> None:
    config = replace(Config(), model=ModelConfig(default='a\x7f\u202e\U000e0001"\\'))
    text = render_commented(config)
    assert "\\U0000007f\\U0000202e" in text
    assert load_config(written(tmp_path, text), {}, {}) == config


def test_sources_are_told_in_comments(tmp_path: Path) -> None:
    loaded = read_settings(None, {"EDGERT_LOG_LEVEL": "debug"}, {})
    text = render_commented(loaded.config, loaded.sources)
    assert '# from EDGERT_LOG_LEVEL; default "info"\nlevel = "debug"' in text
    assert load_config(written(tmp_path, text), {}, {}) == loaded.config
