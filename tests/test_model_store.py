"""The store: names, records, files that are whole or absent, and pulls that end in it."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from http_file_server import FileServer, ServedFile

from edge_runtime.errors import (
    DownloadError,
    ModelFileError,
    ModelNotFoundError,
    RequestError,
    UnsupportedModelError,
)
from edge_runtime.model_store import paths
from edge_runtime.model_store.download import Limits, key_of
from edge_runtime.model_store.files import exclusive, read_json, sha256_of, write_json
from edge_runtime.model_store.pull import PullOptions, pull
from edge_runtime.model_store.source import check_address, parse_source
from edge_runtime.model_store.store import ModelStore, check_name, name_of
from edge_runtime.model_store.summary import summarize

QUICK = Limits(timeout_seconds=5, attempts=2, first_pause_seconds=0.01)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "home")


def names(store: ModelStore) -> list[str]:
    return [model.name for model in store if model.name != paths.DEMO_NAME]


def leftovers(store: ModelStore) -> list[str]:
    """What lies in the store beside models, records and locks."""
    files = [path for path in store.home.rglob("*") if path.is_file()]
    return [
        path.name for path in files if path.suffix not in (".lock", ".gguf") and path.parent != store.models
    ]


# --- sources ----------------------------------------------------------------------------------------


def test_hub_source_names_the_file_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HUB", "https://hub.example/")
    source = parse_source("hf:owner/repo/sub dir/m.gguf@refs/pr/1")
    assert source.url == "https://hub.example/owner/repo/resolve/refs%2Fpr%2F1/sub%20dir/m.gguf"
    assert source.file_name == "m.gguf"
    assert parse_source("hf:o/r/m.GGUF").url == "https://hub.example/o/r/resolve/main/m.GGUF"


def test_address_is_shown_without_its_query() -> None:
    source = parse_source("https://host.example/a/m%20x.gguf?signature=secret#part")
    assert source.url == "https://host.example/a/m%20x.gguf?signature=secret"
    assert (source.text, source.file_name) == ("https://host.example/a/m%20x.gguf", "m x.gguf")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model.gguf", "no model source"),
        ("hf:owner/m.gguf", "no hub source"),
        ("hf:owner/repo/../m.gguf", "no hub source"),
        ("hf:owner/repo//m.gguf", "no hub source"),
        ("hf:owner/repo/m.gguf@../x", "no hub source"),
        ("hf:own er/repo/m.gguf", "no hub source"),
        ("hf:owner/repo/m.safetensors", r"does not end in \.gguf"),
        ("https://host.example/", r"does not end in \.gguf"),
        ("hf:owner/repo/m-00001-of-00003.gguf", "part of a split model"),
        ("http://host.example/m.gguf", "not encrypted"),
        ("http://127.0.0.1.example/m.gguf", "not encrypted"),
        ("ftp://host.example/m.gguf", "no https address"),
        ("https:///m.gguf", "no https address"),
        ("https://user:pass@host.example/m.gguf", "user name or a password"),
        ("https://[bad/m.gguf", "no web address"),
        ("https://host.example:port/m.gguf", "no web address"),
    ],
)
def test_wrong_source_is_refused_with_its_reason(text: str, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        parse_source(text)


def test_password_is_not_repeated_in_the_message() -> None:
    with pytest.raises(RequestError) as caught:
        parse_source("https://user:hunter2@host.example/m.gguf")
    assert "hunter2" not in str(caught.value)


def test_hub_without_encryption_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HUB", "http://hub.example")
    with pytest.raises(RequestError, match="EDGERT_HUB"):
        parse_source("hf:o/r/m.gguf")


def test_redirect_from_https_to_http_is_refused_even_to_this_machine() -> None:
    with pytest.raises(DownloadError, match="from https to http"):
        check_address("http://127.0.0.1/m.gguf", origin="https://host.example/m.gguf")


# --- names and files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "-x", ".x", "a b", "a\n", "x" * 129, "ü", "demo"]
)
def test_names_that_are_no_plain_file_names_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="name"):
        check_name(name)


@pytest.mark.parametrize("file_name", ["a.gguf", "A B (1).GGUF", "ü.gguf", ".gguf", "--x.gguf", "x" * 300])
def test_name_of_any_file_is_valid(file_name: str) -> None:
    check_name(name_of(file_name))


def test_home_is_chosen_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "x"))
    assert ModelStore().models == tmp_path / "x" / "models"
    monkeypatch.delenv("EDGERT_HOME")
    assert ModelStore().home.name == "edgert"


def test_json_file_that_is_damaged_counts_as_absent(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    for text in ("{", "[1]", "\xff"):
        path.write_text(text, encoding="latin-1")
        assert read_json(path) == {}


def test_lock_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with exclusive(path, wait=False), pytest.raises(BlockingIOError), exclusive(path, wait=False):
        pass
    with exclusive(path, wait=False):
        pass


# --- import, list, remove ---------------------------------------------------------------------------


def test_imported_model_takes_no_further_space(store: ModelStore, tiny_model: Path, tmp_path: Path) -> None:
    original = Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))
    model = store.add_file("mine", original)
    assert model.path.samefile(original)
    assert model.sha256 == sha256_of(tiny_model)
    original.unlink()
    assert summarize(store.get("mine").path).architecture == "llama"
    assert leftovers(store) == []


def test_copied_model_is_independent(store: ModelStore, tiny_model: Path) -> None:
    model = store.add_file("mine", tiny_model, copy=True)
    assert not model.path.samefile(tiny_model)
    assert sha256_of(model.path) == sha256_of(tiny_model) == model.sha256


def test_model_that_is_damaged_is_not_imported(store: ModelStore, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_model.read_bytes()[:-1000])
    with pytest.raises(ModelFileError):
        store.add_file("mine", broken)
    assert names(store) == []
    assert leftovers(store) == []


def test_model_whose_vocabulary_the_engine_lacks_is_not_imported(
    store: ModelStore, tiny_model: Path, tmp_path: Path
) -> None:
    kind = b"tokenizer.ggml.model" + struct.pack("<IQ", 8, 5)
    content = tiny_model.read_bytes()
    assert kind + b"llama" in content
    other = tmp_path / "other.gguf"
    other.write_bytes(content.replace(kind + b"llama", kind + b"runes"))
    with pytest.raises(UnsupportedModelError, match="runes"):
        store.add_file("mine", other)
    assert names(store) == []


def test_name_in_use_is_kept_unless_replaced(store: ModelStore, tiny_model: Path) -> None:
    store.add_file("mine", tiny_model)
    with pytest.raises(RequestError, match="already"):
        store.add_file("mine", tiny_model)
    # The second time it is the same file by another name, which a rename leaves alone.
    store.add_file("mine", tiny_model, replace=True)
    store.add_file("mine", tiny_model, copy=True, replace=True)
    assert names(store) == ["mine"]
    assert leftovers(store) == []


def test_models_are_listed_by_name_also_without_a_record(store: ModelStore, tiny_model: Path) -> None:
    store.add_file("b", tiny_model)
    shutil.copy(tiny_model, store.models / "a.gguf")
    shutil.copy(tiny_model, store.models / "not a name.gguf")
    assert names(store) == ["a", "b"]
    assert store.get("a").source == ""


def test_removed_model_is_gone_with_what_is_known_of_it(store: ModelStore, tiny_model: Path) -> None:
    store.add_file("mine", tiny_model)
    (store.models / "mine.calibration.npz").write_bytes(b"of this model")
    store.remove("mine")
    assert list(store.models.iterdir()) == []
    with pytest.raises(ModelNotFoundError):
        store.remove("mine")
    with pytest.raises(RequestError, match="part of the program"):
        store.remove("demo")


def test_model_is_found_by_name_and_by_path(store: ModelStore, tiny_model: Path, tmp_path: Path) -> None:
    store.add_file("mine", tiny_model)
    assert store.resolve("mine").path == store.models / "mine.gguf"
    assert store.resolve(str(tiny_model)).path == tiny_model
    with pytest.raises(ModelNotFoundError, match="did you mean 'mine'"):
        store.resolve("mime")
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        store.resolve(str(tmp_path / "absent.gguf"))
    with pytest.raises(ModelNotFoundError, match="is a folder"):
        store.resolve(f"{tmp_path}/")


def test_demo_model_is_always_there(store: ModelStore, demo_model: Path) -> None:
    assert paths.demo_model_path() == demo_model
    assert [model.name for model in store] == ["demo"]
    assert store.resolve("demo").path == demo_model


# --- summaries --------------------------------------------------------------------------------------


def test_summary_counts_parameters_and_types(shared_data: Path) -> None:
    summary = summarize(shared_data / "models" / "stories260K.gguf")
    assert (summary.architecture, summary.layers, summary.embedding) == ("llama", 5, 64)
    assert (summary.context, summary.vocabulary, summary.tokenizer) == (512, 512, "llama")
    assert summary.parameters == 260_032
    assert summary.quantization == {"F32": 1.0}
    assert not summary.chat_template
    assert summary.licence == "mit"


# --- pull -------------------------------------------------------------------------------------------


def test_pulled_model_is_in_the_store(store: ModelStore, tiny_model: Path, file_server: FileServer) -> None:
    body = tiny_model.read_bytes()
    url = file_server.serve("/My Model.gguf".replace(" ", "%20"), ServedFile(body, cuts=[len(body) // 2]))
    model, fetched = pull(store, url, PullOptions(limits=QUICK))
    assert fetched
    assert model.name == "My-Model"
    assert model.path.read_bytes() == body
    assert (model.source, model.sha256) == (url, sha256_of(tiny_model))
    assert leftovers(store) == []


def test_second_pull_fetches_nothing(store: ModelStore, tiny_model: Path, file_server: FileServer) -> None:
    url = file_server.serve("/m.gguf", ServedFile(tiny_model.read_bytes()))
    first, _ = pull(store, url, PullOptions(limits=QUICK))
    file_server.received.clear()
    assert pull(store, url, PullOptions(limits=QUICK)) == (first, False)
    assert pull(store, url, PullOptions(offline=True)) == (first, False)
    assert file_server.received == []
    again, fetched = pull(store, url, PullOptions(limits=QUICK, replace=True))
    assert fetched and again.sha256 == first.sha256


def test_offline_pull_of_something_new_is_refused(store: ModelStore, file_server: FileServer) -> None:
    with pytest.raises(DownloadError, match="offline"):
        pull(store, f"{file_server.address}/m.gguf", PullOptions(offline=True))
    assert file_server.received == []


def test_name_in_use_is_noticed_before_the_download(
    store: ModelStore, tiny_model: Path, file_server: FileServer
) -> None:
    store.add_file("m", tiny_model)
    with pytest.raises(RequestError, match="already"):
        pull(store, f"{file_server.address}/m.gguf", PullOptions())
    assert file_server.received == []


@pytest.mark.parametrize("damage", ["truncated", "empty header"])
def test_file_that_is_no_sound_model_does_not_stay(
    store: ModelStore, tiny_model: Path, file_server: FileServer, damage: str
) -> None:
    body = tiny_model.read_bytes()
    body = body[:-5000] if damage == "truncated" else b"GGUF\x03\0\0\0" + bytes(16)
    url = file_server.serve("/m.gguf", ServedFile(body))
    with pytest.raises(ModelFileError, match="no model to keep"):
        pull(store, url, PullOptions(limits=QUICK))
    assert names(store) == []
    assert leftovers(store) == []


def test_two_pulls_of_one_file_do_not_meet(
    store: ModelStore, tiny_model: Path, file_server: FileServer
) -> None:
    url = file_server.serve("/m.gguf", ServedFile(tiny_model.read_bytes()))
    lock = store.downloads / f"{key_of(parse_source(url))}.lock"
    with exclusive(lock, wait=False), pytest.raises(DownloadError, match="another process"):
        pull(store, url, PullOptions(limits=QUICK))
    assert pull(store, url, PullOptions(limits=QUICK))[1]


def test_hash_that_is_none_is_refused() -> None:
    with pytest.raises(RequestError, match="64 hexadecimal digits"):
        PullOptions(sha256="abc")
