"""The cache of shards: whole or not there, never above its limit, and shared between processes."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_runtime.cluster.shard_cache import ShardCache, default_folder
from edge_runtime.errors import DownloadError

SIZE = 300_000
ONE, TWO, THREE, FOUR = (random.Random(seed).randbytes(SIZE) for seed in range(4))
GO_ON = threading.Event()  # never set

# What programs of other processes begin with.
PREAMBLE = f"""
import hashlib, random, sys, threading
from pathlib import Path
from edge_runtime.cluster.shard_cache import ShardCache
contents = [random.Random(seed).randbytes({SIZE}) for seed in range(4)]
names = [hashlib.sha256(content).digest() for content in contents]
cache = ShardCache(Path(sys.argv[1]), {3 * SIZE})
"""


def name_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def sizes_of(*contents: bytes) -> dict[bytes, int]:
    return {name_of(content): len(content) for content in contents}


def put(cache: ShardCache, *contents: bytes) -> None:
    """Bring shards into the cache, and claim them no longer."""
    with cache.claim(sizes_of(*contents)):
        for content in contents:
            arriving = cache.arrive(name_of(content), len(content), GO_ON)
            assert arriving is not None
            with arriving:
                arriving.write(content[arriving.size :])
                assert arriving.finish()


def here(cache: ShardCache) -> list[int]:
    """Which of the four shards are in the cache."""
    contents = (ONE, TWO, THREE, FOUR)
    return [number for number, content in enumerate(contents, 1) if cache.has(name_of(content), len(content))]


def file_of(cache: ShardCache, content: bytes) -> Path:
    (path,) = cache.folder.glob(f"*/*/{name_of(content).hex()}")
    return path


def use_at(cache: ShardCache, content: bytes, second: int) -> None:
    os.utime(file_of(cache, content), (second, second))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ShardCache]:
    with ShardCache(tmp_path / "cache", limit_bytes=3 * SIZE) as cache:
        yield cache


@contextmanager
def another_process(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Python that has ``cache`` and the four shards' contents, and prints a line once it is ready."""
    command = [sys.executable, "-c", PREAMBLE + program, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_default_folder_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    assert default_folder().parent == tmp_path


def test_shard_is_there_once_it_is_whole(cache: ShardCache) -> None:
    digest = name_of(ONE)
    with cache.claim({digest: SIZE}):
        arriving = cache.arrive(digest, SIZE, GO_ON)
        assert arriving is not None
        with arriving:
            arriving.write(ONE)
            assert not cache.has(digest, SIZE)
            assert cache.read(digest, SIZE) is None
            assert arriving.finish()
    assert cache.has(digest, SIZE)
    assert cache.read(digest, SIZE) == ONE
    assert cache.arrive(digest, SIZE, GO_ON) is None
    assert cache.used_bytes() == SIZE
    assert list((cache.folder / "arriving").iterdir()) == []


def test_wrong_bytes_get_no_name(cache: ShardCache) -> None:
    digest = name_of(ONE)
    arriving = cache.arrive(digest, SIZE, GO_ON)
    assert arriving is not None
    with arriving:
        arriving.write(TWO)
        assert not arriving.finish()
        assert (arriving.size, arriving.resumed) == (0, 0)
        assert not cache.has(digest, SIZE)
        arriving.write(ONE)
        assert arriving.finish()
    assert cache.read(digest, SIZE) == ONE


def test_shard_does_not_grow_beyond_its_size(cache: ShardCache) -> None:
    arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
    assert arriving is not None
    with arriving, pytest.raises(DownloadError, match="more were sent"):
        arriving.write(ONE + b"x")
    assert cache.used_bytes() == 0


def test_part_is_kept_for_the_next_process(cache: ShardCache) -> None:
    arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
    assert arriving is not None
    with arriving:
        arriving.write(ONE[:100_000])
    with ShardCache(cache.folder) as later:
        arriving = later.arrive(name_of(ONE), SIZE, GO_ON)
        assert arriving is not None
        with arriving:
            assert (arriving.size, arriving.resumed) == (100_000, 100_000)
            arriving.write(ONE[100_000:])
            assert arriving.finish()
        assert later.read(name_of(ONE), SIZE) == ONE


def test_part_that_is_longer_than_the_shard_is_dropped(cache: ShardCache) -> None:
    (cache.folder / "arriving" / name_of(ONE).hex()).write_bytes(bytes(SIZE + 1))
    arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
    assert arriving is not None
    with arriving:
        assert arriving.size == 0


def test_damage_on_the_disk_is_noticed_at_the_first_use_after_a_start(cache: ShardCache) -> None:
    put(cache, ONE, TWO)
    for content in (ONE, TWO):
        with file_of(cache, content).open("r+b") as file:
            file.seek(5000)
            file.write(b"worn")
    with ShardCache(cache.folder) as later:
        assert later.read(name_of(ONE), SIZE) is None
        assert later.open(name_of(TWO)) is None
        assert here(later) == []
        put(later, ONE)
        assert later.read(name_of(ONE), SIZE) == ONE


def test_truncated_shard_is_not_there(cache: ShardCache) -> None:
    put(cache, ONE)
    os.truncate(file_of(cache, ONE), 1000)
    assert not cache.has(name_of(ONE), SIZE)
    assert cache.read(name_of(ONE), SIZE) is None
    put(cache, ONE)
    assert cache.read(name_of(ONE), SIZE) == ONE


def test_size_that_a_manifest_invents_harms_no_shard(cache: ShardCache) -> None:
    put(cache, ONE)
    assert not cache.has(name_of(ONE), 10)
    assert cache.read(name_of(ONE), 10) is None
    with cache.claim({name_of(ONE): 10}):
        pass
    assert cache.read(name_of(ONE), SIZE) == ONE


# --- room -------------------------------------------------------------------------------------------


def test_least_recently_used_shard_goes_first(cache: ShardCache) -> None:
    put(cache, ONE, TWO, THREE)
    for second, content in ((1, TWO), (2, ONE), (3, THREE)):
        use_at(cache, content, second)
    assert cache.read(name_of(TWO), SIZE) == TWO  # used now, and so the last to go
    put(cache, FOUR)
    assert here(cache) == [2, 3, 4]


def test_serving_a_shard_is_using_it(cache: ShardCache) -> None:
    put(cache, ONE, TWO, THREE)
    for second, content in ((1, ONE), (2, TWO), (3, THREE)):
        use_at(cache, content, second)
    opened = cache.open(name_of(ONE))
    assert opened is not None
    opened[1].close()
    put(cache, FOUR)
    assert here(cache) == [1, 3, 4]


def test_only_as_much_goes_as_is_needed(cache: ShardCache) -> None:
    put(cache, ONE, TWO)
    put(cache, THREE)
    assert here(cache) == [1, 2, 3]


def test_claimed_shards_stay(cache: ShardCache) -> None:
    put(cache, ONE, TWO, THREE)
    use_at(cache, ONE, 1)
    with cache.claim(sizes_of(ONE)), cache.claim(sizes_of(ONE, THREE)) as second:
        put(cache, FOUR)
        assert here(cache) == [1, 3, 4]
        second.close()
        second.close()
        use_at(cache, THREE, 1)
        put(cache, TWO)
        assert here(cache) == [1, 2, 4]
    use_at(cache, ONE, 1)
    put(cache, THREE)
    assert here(cache) == [2, 3, 4]


def test_shard_being_read_stays_readable_when_it_goes(cache: ShardCache) -> None:
    put(cache, ONE)
    opened = cache.open(name_of(ONE))
    assert opened is not None
    put(cache, TWO, THREE, FOUR)
    assert here(cache) == [2, 3, 4]
    with opened[1] as file:
        assert file.read() == ONE


def test_claims_beyond_the_limit_are_refused_and_nothing_is_removed(cache: ShardCache) -> None:
    put(cache, ONE, TWO, THREE)
    with pytest.raises(DownloadError, match="raise its limit"):
        cache.claim(sizes_of(ONE, TWO, THREE, FOUR))
    assert here(cache) == [1, 2, 3]
    with cache.claim(sizes_of(ONE, FOUR)):  # FOUR has not arrived; its room is taken all the same
        with pytest.raises(
            DownloadError, match=r"shards of 0\.6 MB are wanted and 0\.6 MB of others are in use"
        ):
            cache.claim(sizes_of(TWO, THREE))
        cache.claim(sizes_of(TWO)).close()


def test_full_disk_is_noticed_before_anything_is_fetched(tmp_path: Path) -> None:
    with ShardCache(tmp_path, limit_bytes=1 << 62) as cache:
        put(cache, ONE)
        with pytest.raises(DownloadError, match="EDGERT_HOME"):
            cache.claim({name_of(TWO): 1 << 60})
        assert here(cache) == [1]


def test_parts_that_nobody_wants_any_more_go(cache: ShardCache) -> None:
    arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
    assert arriving is not None
    with arriving:
        arriving.write(ONE[:-1])
    part = cache.folder / "arriving" / name_of(ONE).hex()
    os.utime(part, (1, 1))
    put(cache, TWO, THREE)
    assert part.exists()
    put(cache, FOUR)
    assert not part.exists()
    assert here(cache) == [2, 3, 4]


def test_part_of_a_claimed_shard_stays(cache: ShardCache) -> None:
    arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
    assert arriving is not None
    with arriving:
        arriving.write(ONE[:-1])
    part = cache.folder / "arriving" / name_of(ONE).hex()
    os.utime(part, (1, 1))
    with cache.claim(sizes_of(ONE)):
        put(cache, TWO, THREE)
        put(cache, FOUR)
        assert len(here(cache)) == 2
        assert part.exists()


def test_nothing_arrived_leaves_nothing(cache: ShardCache) -> None:
    arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
    assert arriving is not None
    arriving.close()
    assert list((cache.folder / "arriving").iterdir()) == []


def test_disk_that_takes_no_more_is_a_clear_error(tmp_path: Path) -> None:
    program = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))\n"
        "print('ready', flush=True)\n"
        f"with cache.arrive(names[0], {SIZE}, threading.Event()) as arriving:\n"
        "    try:\n"
        "        arriving.write(contents[0])\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error, flush=True)\n"
    )
    with another_process(program, tmp_path) as process:
        assert process.stdout is not None
        output = process.stdout.read()
    assert output.startswith("DownloadError cannot write")
    assert "free space" in output


# --- several threads and processes ------------------------------------------------------------------


def test_second_thread_waits_for_the_first(cache: ShardCache) -> None:
    arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
    assert arriving is not None
    outcomes: list[object] = []
    thread = threading.Thread(target=lambda: outcomes.append(cache.arrive(name_of(ONE), SIZE, GO_ON)))
    thread.start()
    thread.join(0.2)
    assert outcomes == []
    with arriving:
        arriving.write(ONE)
        assert arriving.finish()
    thread.join(60)
    assert outcomes == [None]
    assert list((cache.folder / "arriving").iterdir()) == []


def test_second_thread_goes_on_where_the_first_gave_up(cache: ShardCache) -> None:
    first = cache.arrive(name_of(ONE), SIZE, GO_ON)
    assert first is not None
    offsets: list[int] = []

    def second() -> None:
        arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
        assert arriving is not None
        with arriving:
            offsets.append(arriving.size)

    thread = threading.Thread(target=second)
    thread.start()
    with first:
        first.write(ONE[:1234])
    thread.join(60)
    assert offsets == [1234]


def test_waiting_can_be_stopped(cache: ShardCache) -> None:
    stop = threading.Event()
    arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
    assert arriving is not None
    outcomes: list[object] = []
    with arriving:
        thread = threading.Thread(target=lambda: outcomes.append(cache.arrive(name_of(ONE), SIZE, stop)))
        thread.start()
        stop.set()
        thread.join(60)
    assert outcomes == [None]


def test_claims_of_another_process_hold_until_it_ends(cache: ShardCache) -> None:
    put(cache, ONE, TWO, THREE)
    program = (
        f"claim = cache.claim({{names[0]: {SIZE}, names[2]: {SIZE}}})\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with another_process(program, cache.folder):
        use_at(cache, ONE, 1)
        put(cache, FOUR)
        assert here(cache) == [1, 3, 4]
        with pytest.raises(DownloadError, match="in use"):
            cache.claim(sizes_of(TWO, FOUR))
    # It was killed; nobody tidied up after it.
    with cache.claim(sizes_of(TWO, FOUR)):
        assert here(cache) == [3, 4]
    assert len(list((cache.folder / "claims").iterdir())) == 1


def test_shard_that_another_process_was_fetching_when_it_was_killed_goes_on_here(cache: ShardCache) -> None:
    program = (
        f"arriving = cache.arrive(names[0], {SIZE}, threading.Event())\n"
        "arriving.write(contents[0][:777])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    offsets: list[int] = []

    def fetch() -> None:
        arriving = cache.arrive(name_of(ONE), SIZE, GO_ON)
        assert arriving is not None
        with arriving:
            offsets.append(arriving.size)

    thread = threading.Thread(target=fetch)
    with another_process(program, cache.folder):
        thread.start()
        thread.join(0.3)
        assert offsets == []
    thread.join(60)
    assert offsets == [777]


CHURN = """
generator = random.Random(int(sys.stdin.readline()))
print("ready", flush=True)
while True:
    number = generator.randrange(4)
    with cache.claim({names[number]: len(contents[number])}):
        if cache.read(names[number], len(contents[number])) is not None:
            continue
        arriving = cache.arrive(names[number], len(contents[number]), threading.Event())
        if arriving is None:
            continue
        with arriving:
            while arriving.size < len(contents[number]):
                arriving.write(contents[number][arriving.size : arriving.size + 20_000])
            if not arriving.finish():
                print("damaged", flush=True)
"""


def churning(folder: Path, seed: int) -> subprocess.Popen[str]:
    """A process that fetches shards into a cache too small for all of them, for ever."""
    command = [sys.executable, "-c", PREAMBLE + CHURN, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(f"{seed}\n")
    process.stdin.flush()
    return process


def test_processes_killed_at_any_moment_leave_nothing_that_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    generator = random.Random(7)
    resumed = 0
    for round_ in range(12):
        processes = [churning(folder, 2 * round_ + number) for number in range(2)]
        outputs = []
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        threading.Event().wait(generator.uniform(0.0, 0.1))
        for process in processes:
            process.kill()
            assert process.stdout is not None
            outputs.append(process.stdout.read())
            process.communicate()
        assert outputs == ["", ""], "a part was continued wrongly"
        with ShardCache(folder, 3 * SIZE) as cache:
            for content in (ONE, TWO, THREE, FOUR):
                if cache.has(name_of(content), SIZE):
                    assert cache.read(name_of(content), SIZE) == content
            resumed += len(list((folder / "arriving").iterdir()))
            put_missing(cache, TWO, FOUR)
            assert cache.used_bytes() <= cache.limit_bytes
            assert [path.suffix for path in (folder / "claims").iterdir()] == [".claim"]
    assert resumed, "no process was killed while a shard arrived: the test has shown nothing"


def put_missing(cache: ShardCache, *contents: bytes) -> None:
    put(cache, *(content for content in contents if not cache.has(name_of(content), len(content))))
