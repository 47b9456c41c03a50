"""A real daemon from its start to its end, and the verbs that find it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from program import REPOSITORY, Outcome, Program, Terminal, wait_until

from edge_runtime.client import Client
from edge_runtime.daemon.runtime_file import RunningDaemon, read

FREE_PORTS = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
GREEDY = ("--temperature", "0", "--max-tokens", "12")
QUESTION = "Where does Paul Colton live?"


@dataclass(frozen=True, slots=True)
class Daemon:
    """A process of ``edgert serve`` that listens."""

    process: subprocess.Popen[bytes]
    running: RunningDaemon
    err: Path

    def ended(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(30)


@contextmanager
def serving(
    edgert: Program, *options: str | Path, variables: Mapping[str, str] | None = None
) -> Iterator[Daemon]:
    edgert.home.mkdir(parents=True, exist_ok=True)
    err = edgert.home.parent / "serve.err"
    with err.open("wb") as file:
        process = subprocess.Popen(
            edgert.command("serve", *FREE_PORTS, *options),
            stdin=subprocess.DEVNULL,
            stderr=file,
            env=edgert.environment(variables),
            cwd=REPOSITORY,
        )
    try:

        def listens() -> bool:
            assert process.poll() is None, err.read_text()
            return read(edgert.home) is not None

        wait_until(listens)
        running = read(edgert.home)
        assert running is not None
        yield Daemon(process, running, err)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def edgert_shared(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Program:
    return Program(tmp_path_factory.mktemp("served") / "home")


@pytest.fixture(scope="module")
def daemon(edgert_shared: Program) -> Iterator[Daemon]:
    with serving(edgert_shared) as found:
        yield found


def test_the_start_message_says_what_answers_where_and_how_to_try_it(daemon: Daemon) -> None:
    text = daemon.err.read_text()
    for word in ("demo", daemon.running.http, daemon.running.grpc, "edgert stop", f"{daemon.running.url}/v1"):
        assert word in text
    assert all(line[:2] in ("20", "  ", "ed") for line in text.splitlines())


def test_the_line_to_try_works(daemon: Daemon) -> None:
    (line,) = [line for line in daemon.err.read_text().splitlines() if line.startswith("  try")]
    done = subprocess.run(
        ["bash", "-c", line.split(maxsplit=1)[1]], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.startswith("data: {")
    assert done.stdout.rstrip().endswith("data: [DONE]")


def test_ps_shows_the_model_and_no_requests(edgert_shared: Program, daemon: Daemon) -> None:
    done = edgert_shared("ps")
    assert done.code == 0, done.err
    assert f"process {daemon.process.pid}" in done.out
    assert "demo (default)" in done.out
    assert "ready" in done.out
    assert "no requests" in done.out
    found = edgert_shared("ps", "--json").json
    assert found["pid"] == daemon.process.pid
    assert found["http"] == daemon.running.http
    assert found["models"][0]["name"] == "demo"
    assert found["memory_bytes"] > 1e7


def test_ps_shows_running_requests(edgert_shared: Program, daemon: Daemon) -> None:
    ended = threading.Event()

    def load() -> None:
        with Client(daemon.running.grpc) as client:
            while not ended.is_set():
                client.generate("One rainy morning", max_tokens=400, seed=1).text()

    thread = threading.Thread(target=load)
    thread.start()
    try:
        wait_until(lambda: "decode" in edgert_shared("ps", "--json").out)
        wait_until(lambda: "writes" in edgert_shared("ps").out)
    finally:
        ended.set()
        thread.join()


def test_ps_watches_until_it_is_interrupted(edgert_shared: Program, daemon: Daemon) -> None:
    with Terminal(edgert_shared.command("ps", "--watch"), edgert_shared.environment()) as terminal:
        terminal.until("no requests")
        terminal.until("\x1b[H\x1b[2J")
        terminal.until("no requests")
        terminal.interrupt_until("interrupted")


def test_run_asks_the_daemon_and_gives_what_the_engine_gives(edgert_shared: Program, daemon: Daemon) -> None:
    through = edgert_shared("run", "--verbose", *GREEDY, QUESTION)
    assert through.code == 0, through.err
    assert "answered by the daemon" in through.err
    here = edgert_shared("run", "--verbose", "--local", *GREEDY, QUESTION)
    assert "daemon" not in here.err
    assert through.out == here.out


def test_json_has_the_same_shape_either_way(edgert_shared: Program, daemon: Daemon) -> None:
    through = edgert_shared("run", "--json", *GREEDY, "--seed", "3", QUESTION).json
    here = edgert_shared("run", "--json", "--local", *GREEDY, "--seed", "3", QUESTION).json
    assert list(through) == list(here)
    same = ("model", "text", "finish_reason", "seed", "prompt_tokens", "generated_tokens")
    assert [through[key] for key in same] == [here[key] for key in same]
    assert through["prefill_seconds"] > 0
    assert through["decode_tokens_per_second"] > 0


@pytest.mark.parametrize("options", [("--raw",), ("--system", "Be brief.")])
def test_run_passes_its_options_on(edgert_shared: Program, daemon: Daemon, options: tuple[str, ...]) -> None:
    words = ("run", "--verbose", "--seed", "5", "--max-tokens", "20", "--top-k", "5", *options, QUESTION)
    through, here = edgert_shared(*words), edgert_shared(*words, "--local")
    assert "answered by the daemon" in through.err
    assert through.out == here.out


@pytest.mark.parametrize("option", [("--threads", "1"), ("--context", "200"), ("--weights", "mmap")])
def test_options_of_loading_load_here(
    edgert_shared: Program, daemon: Daemon, option: tuple[str, str]
) -> None:
    done = edgert_shared("run", "--verbose", *GREEDY, *option, QUESTION)
    assert done.code == 0, done.err
    assert "daemon" not in done.err


def test_a_models_path_is_loaded_here(edgert_shared: Program, daemon: Daemon, tiny_model: Path) -> None:
    done = edgert_shared("run", "--verbose", "--model", tiny_model, *GREEDY, QUESTION)
    assert done.code == 0, done.err
    assert "daemon" not in done.err


def test_a_model_that_nobody_has_is_an_error(edgert_shared: Program, daemon: Daemon) -> None:
    assert edgert_shared("run", "--model", "absent", QUESTION).code == 4


def test_errors_of_the_daemon_are_told_as_the_engines(edgert_shared: Program, daemon: Daemon) -> None:
    words = ("run", "--json", "word " * 2000)
    through, here = edgert_shared(*words), edgert_shared(*words, "--local")
    assert through.code == here.code == 2
    assert through.json["error"]["code"] == here.json["error"]["code"] == "context_overflow"


def test_chat_talks_with_the_daemon(edgert_shared: Program, daemon: Daemon) -> None:
    lines = f"{QUESTION}\nWhere was Paul Colton born?\n"
    through = edgert_shared("chat", "--verbose", *GREEDY, stdin=lines)
    assert through.code == 0, through.err
    assert through.err.count("answered by the daemon") == 2
    assert through.out == edgert_shared("chat", "--local", *GREEDY, stdin=lines).out


def test_chat_with_the_daemon_forgets_the_oldest_turns(edgert_shared: Program, daemon: Daemon) -> None:
    done = edgert_shared("chat", "--temperature", "0", "--max-tokens", "100", stdin=f"{QUESTION}\n" * 40)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 40
    assert "messages are forgotten" in done.err


def test_interrupting_run_frees_the_daemon(edgert_shared: Program, daemon: Daemon) -> None:
    words = ("run", "--raw", "--temperature", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0", "Once")
    for _ in range(5):
        with Terminal(edgert_shared.command(*words), edgert_shared.environment()) as terminal:
            terminal.until(" ")
            terminal.process.send_signal(signal.SIGINT)
            terminal.rest()
    wait_until(lambda: edgert_shared("ps", "--json").json["requests"] == [], 10)


def test_a_second_daemon_is_refused(edgert_shared: Program, daemon: Daemon) -> None:
    done = edgert_shared("serve", *FREE_PORTS)
    assert done.code == 2
    assert f"process {daemon.process.pid}" in done.err
    assert daemon.process.poll() is None


def test_logs_of_a_daemon_that_writes_to_its_terminal(edgert_shared: Program, daemon: Daemon) -> None:
    done = edgert_shared("logs")
    assert done.code == 10
    assert "--log-file" in done.err


def test_stop_ends_it_and_says_so(edgert: Program, demo_model: Path) -> None:
    with serving(edgert) as daemon:
        done = edgert("stop")
        assert (done.code, done.err) == (0, f"stopped (process {daemon.process.pid})\n")
        assert daemon.ended() == 0
        assert not (edgert.home / "daemon.json").exists()
    nobody = edgert("stop")
    assert nobody.code == 10
    assert "edgert serve" in nobody.err


def test_sigterm_lets_running_requests_finish(edgert: Program, demo_model: Path) -> None:
    with serving(edgert) as daemon:
        started = threading.Barrier(5)
        counts = []

        def ask(seed: int) -> None:
            with Client(daemon.running.grpc) as client:
                stream = client.generate("Once", max_tokens=450, seed=seed, stop=["\0"], temperature=2)
                next(stream)
                started.wait(30)
                for _ in stream:
                    pass
                assert stream.usage is not None
                counts.append(stream.usage.generated_tokens)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        started.wait(30)
        daemon.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert len(counts) == 4
        assert daemon.ended() == 0


def test_stop_waits_no_longer_than_it_is_told_and_kill_ends_it(edgert: Program, demo_model: Path) -> None:
    with serving(edgert) as daemon:
        daemon.process.send_signal(signal.SIGSTOP)  # a daemon that hangs
        done = edgert("stop", "--timeout", "0.2")
        assert done.code == 9
        assert "--kill" in done.err
        done = edgert("stop", "--timeout", "0", "--kill")
        assert (done.code, done.err) == (0, f"killed (process {daemon.process.pid})\n")
        assert daemon.ended() == -signal.SIGKILL


def test_what_a_killed_daemon_left_is_ignored(edgert: Program, demo_model: Path) -> None:
    with serving(edgert) as daemon:
        daemon.process.kill()
        daemon.ended()
    assert (edgert.home / "daemon.json").exists()
    assert edgert("ps").code == 10
    done = edgert("run", "--verbose", *GREEDY, QUESTION)
    assert done.code == 0
    assert "daemon" not in done.err
    with serving(edgert) as again:
        assert "answered by the daemon" in edgert("run", "--verbose", *GREEDY, QUESTION).err
        assert again.process.poll() is None


def test_a_log_file_is_written_and_shown(edgert: Program, demo_model: Path) -> None:
    path = edgert.home / "log" / "edgert.log"
    with serving(edgert, "--log-file", path, "--log-format", "json") as daemon:
        shown: Outcome = edgert("logs")
        assert shown.code == 0, shown.err
        assert "serving" in [json.loads(line)["event"] for line in shown.out.splitlines()]
        assert len(edgert("logs", "-n", "1").out.splitlines()) == 1
        assert str(path) in daemon.err.read_text()
        with Terminal(edgert.command("logs", "-f", "-n", "1"), edgert.environment()) as terminal:
            terminal.until("serving")
            daemon.process.send_signal(signal.SIGHUP)
            terminal.until("reloaded")
            terminal.interrupt_until("interrupted")
    done = edgert("logs", environment={"EDGERT_LOG_FILE": str(path)})  # after its end the settings say where
    assert "reloaded" in done.out


def test_json_lines_are_not_disturbed_by_the_start_message(edgert: Program, demo_model: Path) -> None:
    with serving(edgert, "--log-format", "json") as daemon:
        edgert("stop")
        daemon.ended()
        events = [json.loads(line)["event"] for line in daemon.err.read_text().splitlines()]
    assert "serving" in events
    assert "stopped" in events


def test_prompts_are_not_in_the_log(edgert: Program, demo_model: Path) -> None:
    secret = "xylophone-marmalade"
    path = edgert.home / "edgert.log"
    with serving(edgert, "--log-file", path, variables={"EDGERT_LOG_LEVEL": "debug"}) as daemon:
        assert edgert("run", *GREEDY, secret).code == 0
        body = json.dumps({"messages": [{"role": "user", "content": secret}], "max_tokens": 3, "stop": 3})
        request = urllib.request.Request(f"{daemon.running.url}/v1/chat/completions", data=body.encode())
        request.add_header("content-type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        caught.value.close()
    assert "serving" in path.read_text()
    assert secret not in path.read_text()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--http", "0.0.0.0:0"), "edgert init"),
        (("--http", "8420"), "HOST:PORT"),
        (("--http", "", "--grpc", ""), "nothing would listen"),
        (("--threads", "-1"), "model.threads"),
        (("--config", "/nowhere/edgert.toml"), "No such file"),
    ],
)
def test_faulty_settings_are_refused(edgert: Program, options: tuple[str, ...], complaint: str) -> None:
    done = edgert("serve", *options)
    assert done.code == 2
    assert complaint in done.err


def test_a_model_that_is_not_there_ends_the_start(edgert: Program) -> None:
    done = edgert("serve", *FREE_PORTS, "--model", "absent")
    assert done.code == 4
    assert read(edgert.home) is None


def test_a_port_in_use_is_told(edgert: Program, daemon: Daemon) -> None:
    done = edgert("serve", "--http", daemon.running.http, "--grpc", "")
    assert done.code != 0
    assert daemon.running.http in done.err
    assert "Traceback" not in done.err


def test_without_http_the_verbs_use_grpc(edgert: Program, demo_model: Path) -> None:
    with serving(edgert, "--http", "") as daemon:
        found = edgert("ps", "--json").json
        assert (found["http"], found["grpc"], found["pid"]) == ("", daemon.running.grpc, daemon.process.pid)
        assert "gRPC" in edgert("ps").out
        assert "answered by the daemon" in edgert("run", "--verbose", *GREEDY, QUESTION).err


def test_without_grpc_run_loads_the_model_itself(edgert: Program, demo_model: Path) -> None:
    with serving(edgert, "--grpc", ""):
        done = edgert("run", "--verbose", *GREEDY, QUESTION)
        assert done.code == 0, done.err
        assert "daemon" not in done.err


def test_beyond_loopback_the_verbs_use_tls_and_the_users_token(edgert: Program, demo_model: Path) -> None:
    made = edgert("init")
    assert made.code == 0, made.err
    with serving(edgert, "--http", "0.0.0.0:0", "--grpc", "0.0.0.0:0") as daemon:
        assert daemon.running.tls
        assert edgert("ps", "--json").json["pid"] == daemon.process.pid
        assert "answered by the daemon" in edgert("run", "--verbose", *GREEDY, QUESTION).err
        text = daemon.err.read_text()
        (line,) = [line for line in text.splitlines() if line.startswith("  try")]
        done = subprocess.run(
            ["bash", "-c", line.split(maxsplit=1)[1]], capture_output=True, text=True, check=False, timeout=30
        )
        assert done.stdout.rstrip().endswith("data: [DONE]"), done.stderr
        token = edgert.home / "token"
        secret = token.read_text().strip()
        assert secret not in text
        token.unlink()
        refused = edgert("ps")
        assert refused.code == 11
        assert "token" in refused.err
        assert edgert("run", QUESTION).code == 11
        assert edgert("run", "--local", *GREEDY, QUESTION).code == 0


def test_systemd_is_told_how_it_goes(edgert: Program, demo_model: Path, tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(30)

        def told(text: str) -> None:
            while text not in manager.recv(4096).decode():
                pass

        variables = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "400000"}
        with serving(edgert, variables=variables) as daemon:
            told("READY=1")
            told("WATCHDOG=1")
            told("WATCHDOG=1")
            daemon.process.send_signal(signal.SIGHUP)
            told("RELOADING=1")
            told("READY=1")
            daemon.process.send_signal(signal.SIGTERM)
            told("STOPPING=1")
            assert daemon.ended() == 0
