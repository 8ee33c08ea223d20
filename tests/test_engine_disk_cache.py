"""Blocks on disk: they survive a restart, stay within the bound, and what is wrong with a file or disk is a miss."""

import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finback.engine import disk_cache
from finback.engine.disk_cache import DiskCache, erase
from finback.errors import UserError

BLOCK, LARGE = 64, 1 << 30


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def block(number: int, size: int = BLOCK) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


@pytest.fixture
def opened(tmp_path):
    """Opens caches on one folder; all are closed at the end."""
    caches = []

    def open_one(fingerprint: str = "calf", limit: int = LARGE, size: int = BLOCK) -> DiskCache:
        caches.append(DiskCache(tmp_path / "prefix", fingerprint, size, limit))
        caches[-1].flush()
        return caches[-1]

    yield open_one
    for cache in caches:
        cache.close()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def size_of_one(opened) -> int:
    cache = opened()
    cache.put(key(0), block(0))
    cache.flush()
    return files(cache.folder)[0].stat().st_size


def fill(cache: DiskCache, *numbers: int) -> None:
    for number in numbers:
        cache.put(key(number), block(number, cache.block_bytes))
        cache.flush()


def test_blocks_survive_a_restart_and_belong_to_their_model(opened):
    first = opened()
    payload = block(1)
    with first._disk:  # the writer waits
        first.put(key(1), payload)
        payload.zero_()  # the engine goes on writing into its own memory
        assert key(1) in first and torch.equal(first.get(key(1)), block(1))  # before it is written, and after
    first.flush()
    assert torch.equal(first.get(key(1)), block(1))
    first.close()
    again, other = opened(), opened("another model")
    assert key(1) in again and torch.equal(again.get(key(1)), block(1))
    assert key(1) not in other and other.get(key(1)) is None
    assert again.get(key(2)) is None
    counters = again.counters
    assert (counters.hits, counters.misses, counters.damaged) == (1, 1, 0)
    assert counters.bytes == sum(file.stat().st_size for file in files(again.folder))
    fill(again, 1)
    assert again.counters.written == 0  # it is there already


def test_what_is_read_may_be_changed(opened):
    cache = opened()
    with cache._disk:  # the writer waits
        cache.put(key(1), block(1))
        cache.get(key(1)).zero_()
    cache.flush()
    cache.get(key(1)).zero_()
    assert torch.equal(cache.get(key(1)), block(1))


def test_nobody_else_reads_them(opened):
    old = os.umask(0)
    try:
        cache = opened()
        fill(cache, 1)
    finally:
        os.umask(old)
    (file,) = files(cache.folder)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (file.parent, cache.folder)] == [0o700, 0o700]


USES = st.lists(
    st.tuples(st.sampled_from(["put", "put", "get", "restart", "erase"]), st.integers(0, 1), st.integers(0, 9))
)


@given(uses=USES, limit=st.floats(2, 8.9))
def test_the_bound_holds_and_the_least_recently_used_goes_first(tmp_path_factory, uses, limit):
    """Two models in one folder under random use, against a list in order of use."""
    folder = tmp_path_factory.mktemp("prefix")
    one = disk_cache._HEAD + BLOCK
    bound = int(limit * one)
    caches = [DiskCache(folder, name, BLOCK, bound) for name in ("calf", "minke")]
    model: list[tuple[int, int]] = []
    for action, who, number in uses:
        cache, name = caches[who], (who, number)
        if action == "put":
            fill(cache, number)
            if name not in model:
                if (len(model) + 1) * one > bound:
                    while (len(model) + 1) * one > bound - bound // 16:
                        model.pop(0)
                model.append(name)
        elif action == "get":
            payload = cache.get(key(number))
            assert (payload is not None) == (name in model)
            assert payload is None or torch.equal(payload, block(number))
        elif action == "restart":
            cache.close()
            caches[who] = DiskCache(folder, ("calf", "minke")[who], BLOCK, bound)
        else:
            cache.erase()
            model.clear()
        if action in ("put", "get") and name in model:
            model.append(model.pop(model.index(name)))
        here = {(who, n) for who in (0, 1) for n in range(10) if key(n) in caches[who]}
        assert here == set(model)
        assert sum(file.stat().st_size for file in files(folder)) == len(model) * one <= bound
    for cache in caches:
        cache.close()


def test_a_lower_limit_and_an_old_model_make_room(opened):
    one = size_of_one(opened)
    fill(opened("old"), *range(1, 9))
    cache = opened("new", limit=4 * one)
    assert cache.counters.bytes <= 4 * one
    fill(cache, *range(4))
    assert all(key(number) in cache for number in range(1, 4))
    assert {file.parent for file in files(cache.folder)} == {cache._own}
    assert [path for path in cache.folder.iterdir() if path != cache._own] == []  # the old models' folders went too
    with pytest.raises(UserError, match=r"a limit of 100 bytes holds no block; give 197 or more"):
        opened(limit=100)
    opened(limit=197)


@given(data=st.data())
def test_a_damaged_file_is_a_miss_and_removed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("prefix")
    cache = DiskCache(folder, "calf", BLOCK, LARGE)
    fill(cache, 1, 2)
    path = cache._own / key(1).hex()
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "noise"]))
    if kind == "flip":
        at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        changed = bytes((*whole[:at], whole[at] ^ 1 << bit, *whole[at + 1 :]))
    elif kind == "cut":
        changed = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "grow":
        changed = whole + data.draw(st.binary(min_size=1, max_size=9))
    else:
        changed = data.draw(st.binary(min_size=len(whole), max_size=len(whole)))
    path.write_bytes(changed)
    assert cache.get(key(1)) is None and not path.exists()
    assert torch.equal(cache.get(key(2)), block(2))
    counters = cache.counters
    assert (counters.damaged, counters.misses, counters.hits) == (1, 1, 1)
    fill(cache, 1)
    assert torch.equal(cache.get(key(1)), block(1))
    cache.close()


def test_a_whole_block_under_another_name_or_model_is_foreign(opened):
    cache, other = opened(), opened("another model")
    fill(cache, 1)
    fill(other, 3)
    whole = (cache._own / key(1).hex()).read_bytes()
    for place in (cache._own / key(2).hex(), other._own / key(1).hex()):
        place.write_bytes(whole)
    assert cache.get(key(2)) is None and other.get(key(1)) is None
    assert cache.counters.damaged == other.counters.damaged == 1
    assert torch.equal(cache.get(key(1)), block(1))


def test_links_are_not_followed(opened, tmp_path):
    cache = opened()
    fill(cache, 1, 2)
    precious = tmp_path / "precious"
    (cache._own / key(1).hex()).rename(precious)  # even a whole block
    (cache._own / key(1).hex()).symlink_to(precious)
    before = precious.stat().st_mtime_ns
    fill(cache, 1)  # is there, in a way
    assert precious.stat().st_mtime_ns == before
    assert cache.get(key(1)) is None and cache.counters.damaged == 1 and precious.exists()
    elsewhere = tmp_path / "elsewhere"
    cache._own.rename(elsewhere)
    cache._own.symlink_to(elsewhere)
    assert cache.get(key(2)) is None
    with pytest.warns(UserWarning, match="prefix cache on disk"):
        fill(cache, 5)
    assert cache.counters.dropped == 1
    cache.erase()
    assert [file.name for file in elsewhere.iterdir()] == [key(2).hex()]


def test_odd_things_under_the_name_of_a_block_are_misses(opened, monkeypatch):
    cache = opened()
    fill(cache, 0)
    os.mkfifo(cache._own / key(1).hex())
    (cache._own / key(2).hex()).mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(cache._own)  # a socket's path is short
        server.bind(key(3).hex())
    monkeypatch.undo()
    free = os.dup(0)
    os.close(free)
    assert [cache.get(key(n)) for n in (1, 2, 3)] == [None] * 3
    assert cache.counters.damaged == 3
    assert os.dup(0) == free  # every descriptor is closed again
    os.close(free)
    assert torch.equal(cache.get(key(0)), block(0))


def test_a_folder_that_others_may_write_to_is_not_trusted(opened):
    cache = opened()
    fill(cache, 1)
    cache._own.chmod(0o777)
    assert cache.get(key(1)) is None
    with pytest.warns(UserWarning, match="others may write"):
        fill(cache, 2)
    assert cache.counters.dropped == 1
    cache._own.chmod(0o700)
    assert cache.get(key(1)) is not None


def test_a_full_disk_drops_blocks_with_one_warning(opened):
    cache = opened(size=4096)
    fill(cache, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write then ends in the middle of a block
    try:
        with pytest.warns(UserWarning, match="blocks that fail are dropped") as warned:
            fill(cache, 2, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warned) == 1 and cache.counters.dropped == 2
    assert cache.get(key(2)) is None and len(files(cache.folder)) == 1
    fill(cache, 2)  # there is room again
    assert torch.equal(cache.get(key(2)), block(2, 4096))


def test_a_folder_that_vanishes_is_made_again_and_one_that_cannot_be_is_not_needed(opened, tmp_path):
    cache = opened()
    fill(cache, 1)
    erase(cache.folder)  # as another process would
    assert not cache.folder.exists() and cache.get(key(1)) is None
    fill(cache, 2)
    assert torch.equal(cache.get(key(2)), block(2))
    cache.erase()
    cache.folder.write_text("a file")
    with pytest.warns(UserWarning, match="prefix cache on disk"):
        fill(cache, 3, 4)
    assert cache.get(key(3)) is None and key(3) not in cache and cache.counters.dropped == 2


def test_a_folder_removed_while_a_block_is_written_is_made_again(opened, monkeypatch):
    cache, times = opened(), []

    def removed(parent: Path):
        times.append(parent)
        if len(times) == 1:
            parent.rmdir()
        return really(parent)

    really = disk_cache._opened
    monkeypatch.setattr(disk_cache, "_opened", removed)
    fill(cache, 1)
    assert len(times) == 2 and cache.counters.written == 1 and torch.equal(cache.get(key(1)), block(1))


def test_a_full_queue_drops_and_never_blocks(opened, monkeypatch):
    monkeypatch.setattr(disk_cache, "_QUEUED", 3 * BLOCK)
    cache = opened()

    def put() -> None:
        for number in range(10):
            cache.put(key(number), block(number))
            while number == 0 and cache._todo.qsize():
                time.sleep(0.001)

    with cache._disk:  # the disk hangs: the writer holds one block, three wait
        engine = threading.Thread(target=put, daemon=True)
        engine.start()
        engine.join(20)
        assert not engine.is_alive()
        assert cache.counters.dropped == 6 and key(9) not in cache
        assert torch.equal(cache.get(key(3)), block(3))
    cache.flush()
    assert [key(number) in cache for number in range(10)] == [True] * 4 + [False] * 6
    cache.close()
    cache.put(key(20), block(20))
    assert cache.counters.dropped == 7 and cache.get(key(20)) is None
    cache.close()
    cache.flush()


def test_erase_removes_blocks_and_nothing_else(opened):
    cache, other = opened(), opened("another model")
    fill(cache, 1, 2)
    fill(other, 3)
    mine = cache.folder / "notes.txt"
    mine.write_text("mine")
    cache._disk = threading.RLock()
    with cache._disk:  # the writer waits, and this block with it
        cache.put(key(4), block(4))
        cache.erase()
    cache.flush()
    assert [key(n) in cache for n in (1, 2, 4)] == [False] * 3 and cache.counters.bytes == 0
    assert files(cache.folder) == [mine]
    mine.unlink()
    assert erase(cache.folder) == 0 and erase(cache.folder) == 0


def test_two_caches_on_one_folder_do_not_harm_each_other(opened):
    one = size_of_one(opened)
    caches = [opened(limit=6 * one) for _ in range(3)]
    wrong = []

    def use(cache: DiskCache, seed: int) -> None:
        for step in range(300):
            number = (step * (seed + 7)) % 11
            payload = cache.get(key(number))
            if payload is None:
                cache.put(key(number), block(number))
            elif not torch.equal(payload, block(number)):
                wrong.append(number)
        cache.flush()

    threads = [threading.Thread(target=use, args=(cache, seed)) for seed, cache in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and [cache.counters.damaged for cache in caches] == [0, 0, 0]
    fill(opened(limit=6 * one), 99)
    assert sum(file.stat().st_size for file in files(caches[0].folder)) <= 6 * one


CRASHING = """
import sys, torch
from pathlib import Path
from finback.engine.disk_cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), "calf", 1 << 20, 1 << 30)
for number in range(10_000):
    cache.put((number % 40).to_bytes(32, "big"), torch.full((1 << 20,), number % 40, dtype=torch.uint8))
    if number == 5:
        print("writing", flush=True)
    if number % 40 == 39:
        cache.erase()
"""


def test_a_process_killed_while_it_writes_leaves_whole_blocks_and_no_rest(opened, monkeypatch, tmp_path):
    """A temporary file that a crash leaves is passed over, counted, and removed once it is old."""
    command = [sys.executable, "-c", CRASHING, str(tmp_path / "prefix")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    cache = opened(size=1 << 20)
    cache._own.mkdir(parents=True, mode=0o700, exist_ok=True)
    rest = cache._own / f"{key(50).hex()}.{'0' * 16}.tmp"
    rest.write_bytes(b"half")
    for number in range(40):
        payload = cache.get(key(number))
        assert payload is None or (payload == number).all()
    assert cache.counters.damaged == 0 and cache.get(key(50)) is None
    again = opened(size=1 << 20)
    assert rest.exists() and again.counters.bytes == sum(file.stat().st_size for file in files(cache.folder))
    monkeypatch.setattr(disk_cache, "_CRASHED_S", 0)
    opened(size=1 << 20)
    assert not rest.exists() and [file for file in files(cache.folder) if file.suffix] == []
