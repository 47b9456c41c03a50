"""Downloads against a server that breaks: what arrives is the file, and nothing is fetched twice."""

from __future__ import annotations

import hashlib
import random
import socket
from pathlib import Path

import pytest
from http_file_server import FileServer, ServedFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.errors import DownloadError
from edge_runtime.model_store.download import Limits, download, key_of
from edge_runtime.model_store.source import parse_source

BODY = b"GGUF" + random.Random(5).randbytes(600_000)
OTHER_BODY = b"GGUF" + random.Random(6).randbytes(500_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
QUICK = Limits(timeout_seconds=5, attempts=3, fruitful_bytes=1, first_pause_seconds=0.01)


def fetch(url: str, folder: Path, limits: Limits = QUICK, sha256: str | None = None) -> bytes:
    found = download(parse_source(url), folder, limits=limits, sha256=sha256)
    content = found.path.read_bytes()
    assert found.size == len(content)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    return content


def kept(url: str, folder: Path) -> int:
    """Bytes that wait for the next call."""
    path = folder / f"{key_of(parse_source(url))}.partial"
    return path.stat().st_size if path.exists() else 0


def starts(server: FileServer) -> list[int]:
    return [request.start for request in server.received]


def test_whole_file_arrives_in_one_request(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY))
    assert fetch(url, tmp_path) == BODY
    assert starts(file_server) == [0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]


def test_progress_ends_at_the_size(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY))
    steps: list[tuple[int, int | None]] = []
    download(parse_source(url), tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (len(BODY), len(BODY))
    assert steps == sorted(steps)


def test_broken_connections_fetch_only_the_rest(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, cuts=[100_000, 200_000, 50_000]))
    assert fetch(url, tmp_path) == BODY
    assert starts(file_server) == [0, 100_000, 300_000, 350_000]
    assert all(request.headers["if-range"] == '"v1"' for request in file_server.received[1:])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(0, len(BODY)), max_size=6),
    ranges=st.booleans(),
    etag=st.sampled_from([None, '"v1"', 'W/"v1"']),
    chunked=st.booleans(),
)
def test_any_schedule_of_breaks_gives_the_same_bytes(
    file_server: FileServer,
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    ranges: bool,
    etag: str | None,
    chunked: bool,
) -> None:
    file = ServedFile(BODY, cuts=cuts, ranges=ranges, etag=etag, chunked=chunked)
    url = file_server.serve("/m.gguf", file)
    limits = Limits(attempts=20, first_pause_seconds=0.0)
    assert fetch(url, tmp_path_factory.mktemp("any"), limits) == BODY


def test_a_later_call_goes_on_where_the_first_gave_up(file_server: FileServer, tmp_path: Path) -> None:
    file = ServedFile(BODY, cuts=[400_000, 0, 0, 0])
    url = file_server.serve("/m.gguf", file)
    with pytest.raises(DownloadError, match=r"0\.4 MB are kept: run the same command"):
        fetch(url, tmp_path)
    assert kept(url, tmp_path) == 400_000
    file_server.received.clear()
    file.cuts.clear()
    assert fetch(url, tmp_path) == BODY
    assert starts(file_server) == [400_000]


def test_bytes_that_no_record_vouches_for_are_fetched_again(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY))
    (tmp_path / f"{key_of(parse_source(url))}.partial").write_bytes(b"GGUF" + bytes(300_000))
    assert fetch(url, tmp_path) == BODY
    assert starts(file_server) == [0]


def test_bytes_that_came_after_the_last_record_are_fetched_again(
    file_server: FileServer, tmp_path: Path
) -> None:
    """After a power cut a file may have its length but hold zeros."""
    url = file_server.serve("/m.gguf", ServedFile(BODY, cuts=[400_000, 0, 0, 0]))
    with pytest.raises(DownloadError):
        fetch(url, tmp_path)
    with (tmp_path / f"{key_of(parse_source(url))}.partial").open("ab") as file:
        file.write(bytes(50_000))
    file_server.received.clear()
    file_server.files["/m.gguf"].cuts.clear()
    assert fetch(url, tmp_path) == BODY
    assert starts(file_server) == [400_000]


@pytest.mark.parametrize("etag", [None, 'W/"v1"', "v1"])
def test_version_that_has_no_exact_name_is_not_continued(
    file_server: FileServer, tmp_path: Path, etag: str | None
) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, etag=etag, cuts=[400_000]))
    assert fetch(url, tmp_path) == BODY
    assert ["range" in request.headers for request in file_server.received] == [False, False]


def test_damaged_record_is_not_trusted(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, cuts=[400_000, 0, 0, 0]))
    with pytest.raises(DownloadError):
        fetch(url, tmp_path)
    (tmp_path / f"{key_of(parse_source(url))}.json").write_text('{"url": ')
    file_server.files["/m.gguf"].cuts.clear()
    file_server.received.clear()
    assert fetch(url, tmp_path) == BODY
    assert starts(file_server) == [0]


def test_server_without_ranges_starts_again(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, ranges=False, cuts=[300_000]))
    assert fetch(url, tmp_path) == BODY


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_file_that_changes_between_tries_is_fetched_whole(
    file_server: FileServer, tmp_path: Path, honours_if_range: bool
) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, cuts=[300_000, 0, 0, 0]))
    with pytest.raises(DownloadError):
        fetch(url, tmp_path)
    changed = ServedFile(OTHER_BODY, etag='"v2"', honours_if_range=honours_if_range)
    file_server.serve("/m.gguf", changed)
    assert fetch(url, tmp_path) == OTHER_BODY


def test_same_etag_with_another_length_is_fetched_whole(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, cuts=[300_000, 0, 0, 0]))
    with pytest.raises(DownloadError):
        fetch(url, tmp_path)
    file_server.serve("/m.gguf", ServedFile(OTHER_BODY))
    assert fetch(url, tmp_path) == OTHER_BODY


@pytest.mark.parametrize("length", [200_004, 700_000])
def test_stated_range_that_is_not_satisfiable_is_resolved(
    file_server: FileServer, tmp_path: Path, length: int
) -> None:
    """416: whole already where the lengths agree, else the file has changed."""
    body = BODY[:length]
    url = file_server.serve("/m.gguf", ServedFile(body, stated_length=len(body) + 1))
    with pytest.raises(DownloadError):
        fetch(url, tmp_path)
    file_server.serve("/m.gguf", ServedFile(body))
    assert fetch(url, tmp_path) == body


def test_break_after_the_last_byte_needs_no_byte_again(file_server: FileServer, tmp_path: Path) -> None:
    file = ServedFile(BODY, chunked=True, cuts=[len(BODY)])
    assert fetch(file_server.serve("/m.gguf", file), tmp_path) == BODY
    assert starts(file_server) == [0, len(BODY)]


def test_length_that_promises_too_much_is_an_error(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, ranges=False, stated_length=len(BODY) + 1000))
    with pytest.raises(DownloadError, match=f"broke after {len(BODY)} of {len(BODY) + 1000} bytes"):
        fetch(url, tmp_path)


def test_no_more_is_taken_than_stated(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, stated_length=1000))
    assert fetch(url, tmp_path) == BODY[:1000]


def test_missing_file_fails_at_once(file_server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no such file on the server"):
        fetch(f"{file_server.address}/absent.gguf", tmp_path)
    assert len(file_server.received) == 1
    assert list(tmp_path.iterdir()) == []


def test_refused_access_names_the_token(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, statuses=[403]))
    with pytest.raises(DownloadError, match="HF_TOKEN"):
        fetch(url, tmp_path)


def test_faults_of_the_server_are_waited_out(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, statuses=[500, 503]))
    assert fetch(url, tmp_path) == BODY


def test_lasting_fault_of_the_server_is_an_error(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, statuses=[500] * 9))
    with pytest.raises(DownloadError, match="answered 500"):
        fetch(url, tmp_path)
    assert len(file_server.received) == QUICK.attempts


def test_silent_server_is_given_up(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, stall_after=100_000))
    limits = Limits(timeout_seconds=0.2, attempts=2, fruitful_bytes=1 << 20, first_pause_seconds=0.01)
    with pytest.raises(DownloadError, match=r"no byte arrived for 0\.2 s"):
        fetch(url, tmp_path, limits)
    assert kept(url, tmp_path) >= 100_000


def test_unreachable_server_fails_soon(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(DownloadError, match="Connection refused"):
        fetch(f"http://127.0.0.1:{port}/m.gguf", tmp_path)


def test_redirect_is_followed(file_server: FileServer, other_server: FileServer, tmp_path: Path) -> None:
    target = other_server.serve("/there.gguf", ServedFile(BODY, cuts=[200_000]))
    url = file_server.serve("/m.gguf", ServedFile(b"", redirect=target))
    assert fetch(url, tmp_path) == BODY
    assert starts(other_server) == [0, 200_000]


@pytest.mark.parametrize(
    "target", ["http://models.example/m.gguf", "file:///etc/passwd", "ftp://127.0.0.1/m.gguf"]
)
def test_redirect_to_an_unsafe_address_is_refused(
    file_server: FileServer, tmp_path: Path, target: str
) -> None:
    url = file_server.serve("/m.gguf", ServedFile(b"", redirect=target))
    with pytest.raises(DownloadError, match=r"not encrypted|circle or to nowhere|no https"):
        fetch(url, tmp_path)


def test_redirect_in_a_circle_is_an_error(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(b"", redirect="/m.gguf"))
    with pytest.raises(DownloadError, match="circle"):
        fetch(url, tmp_path)
    assert len(file_server.received) < 20


def test_token_goes_to_the_hub_alone(
    file_server: FileServer, other_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_HUB", file_server.address)
    monkeypatch.setenv("HF_TOKEN", "secret")
    target = other_server.serve("/cdn", ServedFile(BODY))
    file_server.serve("/a/b/resolve/main/m.gguf", ServedFile(b"", redirect=target))
    assert fetch("hf:a/b/m.gguf", tmp_path) == BODY
    assert file_server.received[0].headers["authorization"] == "Bearer secret"
    assert "authorization" not in other_server.received[0].headers


@pytest.mark.parametrize("stated", [SHA256, "0" * 64])
def test_hash_that_the_hub_states_is_checked(
    file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str
) -> None:
    monkeypatch.setenv("EDGERT_HUB", file_server.address)
    file_server.serve("/cdn", ServedFile(BODY))
    hop = ServedFile(b"", redirect="/cdn", headers={"X-Linked-Etag": f'"{stated}"'})
    file_server.serve("/a/b/resolve/main/m.gguf", hop)
    if stated == SHA256:
        assert fetch("hf:a/b/m.gguf", tmp_path) == BODY
    else:
        with pytest.raises(DownloadError, match="the hub says"):
            fetch("hf:a/b/m.gguf", tmp_path)
        assert kept("hf:a/b/m.gguf", tmp_path) == 0


def test_wrong_hash_drops_the_file(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY))
    with pytest.raises(DownloadError, match="sha256"):
        fetch(url, tmp_path, sha256="f" * 64)
    assert kept(url, tmp_path) == 0
    assert fetch(url, tmp_path, sha256=SHA256.upper()) == BODY


def test_hash_covers_what_an_earlier_call_left(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, cuts=[400_000, 0, 0, 0]))
    with pytest.raises(DownloadError):
        fetch(url, tmp_path)
    assert fetch(url, tmp_path, sha256=SHA256) == BODY


def test_page_instead_of_a_model_is_noticed_at_its_first_bytes(
    file_server: FileServer, tmp_path: Path
) -> None:
    url = file_server.serve("/m.gguf", ServedFile(b"<!DOCTYPE html>" + bytes(500_000)))
    with pytest.raises(DownloadError, match="not a GGUF file"):
        fetch(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_compressed_answer_is_refused(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, headers={"Content-Encoding": "gzip"}))
    with pytest.raises(DownloadError, match="gzip"):
        fetch(url, tmp_path)


def test_too_large_file_is_refused_before_it_arrives(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, stated_length=1 << 41))
    with pytest.raises(DownloadError, match="at most"):
        fetch(url, tmp_path)


def test_endless_answer_is_cut_off(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(b"GGUF" + bytes(20 << 20), chunked=True))
    with pytest.raises(DownloadError, match="at most"):
        fetch(url, tmp_path, Limits(maximum_bytes=1 << 20))


def test_full_disk_is_noticed_before_the_download(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(BODY, stated_length=1 << 60))
    with pytest.raises(DownloadError, match="EDGERT_HOME"):
        fetch(url, tmp_path, Limits(maximum_bytes=1 << 61))


def test_empty_file_is_an_error(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.serve("/m.gguf", ServedFile(b""))
    with pytest.raises(DownloadError, match="empty"):
        fetch(url, tmp_path)
