"""Blocks of the prefix cache on disk, so that they survive a restart: bounded, checksummed, erasable.

One file a block, `FOLDER/<fingerprint>/<key>`, both in hex: a header with a SHA-256 over itself and the payload, then
the payload. A file is written under a temporary name and renamed; there is no fsync, because a file torn by a power cut
fails its checksum and is a miss. Whatever goes wrong with the disk is a miss or a dropped block, never an exception.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Full, Queue
from typing import NamedTuple

import torch
from torch import Tensor

from finback.errors import UserError

_MAGIC, _VERSION = b"FINBACKP", 1
_HEADER = struct.Struct("<8sQ32s32sQ")  # magic, version, fingerprint, key, payload bytes; the SHA-256 follows
_HEAD = _HEADER.size + hashlib.sha256().digest_size
_FOLDER, _FILE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{16}\.tmp)?")
_FOREIGN = {errno.ELOOP, errno.ENXIO, errno.EACCES}  # opening a link, a socket, what another user owns
_CRASHED_S = 60  # a temporary file this old belongs to a process that died
_QUEUED = 64 << 20  # bytes of payloads that may wait for the writer
_SCAN, _STOP = b"scan", b"stop"  # in the queue of keys


@dataclass
class Counters:
    """What happened so far; `bytes`: what all blocks in the folder take, as far as this process knows."""

    hits: int = 0
    misses: int = 0
    written: int = 0
    dropped: int = 0
    damaged: int = 0
    bytes: int = 0


class DiskCache:
    """Payloads of `block_bytes` bytes by keys of 32 bytes, for the model with this fingerprint.

    `limit`: bytes of all files in `folder`, those of other models included; the least recently used go first, down to
    15/16 of the limit, so that the folder is listed once in many writes. Several processes may use one folder: each
    lists it anew after writing a sixteenth of the limit, and may overshoot by that much.

    `get` and `put` are for one thread; another one writes. Files are 0600, folders 0700, and no link inside the folder
    is followed. Raises UserError for a limit below one block.
    """

    def __init__(self, folder: Path, fingerprint: str, block_bytes: int, limit: int) -> None:
        self._size = _HEAD + block_bytes
        if limit - limit // 16 < self._size:
            least = -(-16 * self._size // 15)
            raise UserError(f"prefix cache on disk: a limit of {limit:,} bytes holds no block; give {least:,} or more")
        self.folder, self.block_bytes, self.limit = folder, block_bytes, limit
        self._mark = hashlib.sha256(fingerprint.encode()).digest()
        self._own = folder / self._mark.hex()
        self._counters, self._counting = Counters(), threading.Lock()
        self._waiting: dict[bytes, Tensor] = {}  # put and not yet written; still answers `get`
        self._todo: Queue[bytes] = Queue(max(2, _QUEUED // max(1, block_bytes)))
        self._disk = threading.Lock()  # held while a block is written, and to erase
        self._unlisted = 0  # bytes written since the folder was last listed
        self._warned = self._closed = False
        self._todo.put(_SCAN)
        self._writer = threading.Thread(target=self._write_all, name="prefix-cache", daemon=True)
        self._writer.start()

    @property
    def counters(self) -> Counters:
        """A copy of the counters as they stand."""
        return replace(self._counters)

    def __contains__(self, key: bytes) -> bool:
        """Whether a block is there or on its way; whether it is whole only `get` finds out."""
        return key in self._waiting or os.path.lexists(self._own / key.hex())

    def get(self, key: bytes) -> Tensor | None:
        """The payload, uint8 [block_bytes] in memory of its own, or None. What is damaged or foreign is removed."""
        if (waiting := self._waiting.get(key)) is not None:
            self._counters.hits += 1
            return waiting.clone()
        payload = torch.empty(self.block_bytes, dtype=torch.uint8)
        with contextlib.suppress(OSError), _opened(self._own) as parent:
            if self._read(parent, key, payload):
                self._counters.hits += 1
                return payload
            self._counters.damaged += 1
            os.unlink(key.hex(), dir_fd=parent)
        self._counters.misses += 1
        return None

    def put(self, key: bytes, payload: Tensor) -> bool:
        """Keep a copy of `payload` (uint8 [block_bytes], CPU). Returns at once; False where it was dropped."""
        assert len(key) == 32 and payload.dtype == torch.uint8 and payload.shape == (self.block_bytes,)
        if key in self._waiting or _touch(self._own / key.hex()):
            return True
        self._waiting[key] = payload.clone()
        try:
            if self._closed:
                raise Full
            self._todo.put_nowait(key)
            return True
        except Full:
            self._drop(key)
            return False

    def flush(self) -> None:
        """Wait until all that was put is written or dropped."""
        if not self._closed:
            self._todo.join()

    def close(self) -> None:
        """Write what waits and end the writer. What is put afterwards is dropped; `get` still reads."""
        if not self._closed:
            self._closed = True
            self._todo.put(_STOP)
            self._writer.join()

    def erase(self) -> None:
        """As the function `erase`, what waits to be written included."""
        with self._disk:
            self._waiting.clear()  # the writer passes over keys that are not here
            erase(self.folder)
            self._counters.bytes = self._unlisted = 0

    def _drop(self, key: bytes) -> None:
        with self._counting:  # either thread
            self._counters.dropped += self._waiting.pop(key, None) is not None

    def _head(self, key: bytes, payload: memoryview) -> bytes:
        fields = _HEADER.pack(_MAGIC, _VERSION, self._mark, key, self.block_bytes)
        digest = hashlib.sha256(fields)
        digest.update(payload)
        return fields + digest.digest()

    def _read(self, parent: int, key: bytes, payload: Tensor) -> bool:
        """Fill `payload`; False if the file is not exactly what is written for this key. OSError: it is not there."""
        try:
            file = os.open(key.hex(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except OSError as error:
            if error.errno in _FOREIGN:
                return False
            raise
        try:
            info, head, view = os.fstat(file), bytearray(_HEAD), payload.numpy().data
            if not stat.S_ISREG(info.st_mode) or info.st_size != self._size:
                return False
            if os.readv(file, [head, view]) != self._size or head != self._head(key, view):
                return False
            _touch(file)
            return True
        except OSError:  # a sector that cannot be read
            return False
        finally:
            os.close(file)

    def _write_all(self) -> None:
        while (key := self._todo.get()) != _STOP:
            try:
                with self._disk:
                    if key == _SCAN:
                        self._trim(0)
                    elif (payload := self._waiting.get(key)) is not None:
                        self._write(key, payload)
            except Exception as error:  # without a writer `flush` would wait for ever
                self._drop(key)
                if not self._warned:
                    self._warned = True
                    warnings.warn(f"prefix cache on disk: {error}; blocks that fail are dropped", stacklevel=1)
            finally:
                self._todo.task_done()
        self._todo.task_done()

    def _write(self, key: bytes, payload: Tensor) -> None:
        if self._counters.bytes + self._size > self.limit or self._unlisted + self._size > self.limit // 16:
            self._trim(self._size)
        try:
            self._store(key, payload)
        except FileNotFoundError:  # another process has just removed the folder, by `erase` or because it was empty
            self._store(key, payload)
        self._waiting.pop(key, None)
        self._counters.written += 1
        self._counters.bytes += self._size
        self._unlisted += self._size

    def _store(self, key: bytes, payload: Tensor) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._own, 0o700)
        view = payload.numpy().data
        temporary = f"{key.hex()}.{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with _opened(self._own) as parent:
            try:
                with open(os.open(temporary, flags, 0o600, dir_fd=parent), "wb") as file:
                    file.write(self._head(key, view))
                    file.write(view)
                _touch(self._own / temporary)  # the clock of `get`, finer than the kernel's own
                os.rename(temporary, key.hex(), src_dir_fd=parent, dst_dir_fd=parent)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=parent)
                raise

    def _trim(self, room: int) -> None:
        """List the folder and remove the oldest files until `room` bytes more stay within the bound."""
        files = sorted(_files(self.folder))
        total = sum(file.size for file in files)
        goal = self.limit - self.limit // 16 if total + room > self.limit else self.limit
        now = time.time_ns()
        for file in files:
            temporary = file.path.endswith(".tmp")
            crashed = temporary and abs(now - file.used_ns) > _CRASHED_S * 10**9
            if crashed or (total + room > goal and not temporary):  # a young one is being written
                with contextlib.suppress(OSError):
                    os.unlink(file.path)
                    total -= file.size
        for model in _models(self.folder):
            if model != self._own:
                with contextlib.suppress(OSError):  # not empty
                    model.rmdir()
        self._counters.bytes, self._unlisted = total, 0


def erase(folder: Path) -> int:
    """Remove all blocks of all models under `folder`, and nothing else; returns their bytes.

    A process that still writes there may leave new ones. Raises UserError if something cannot be removed.
    """
    removed = 0
    try:
        for file in _files(folder):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.path)
            removed += file.size
    except OSError as error:
        raise UserError(f"{folder}: cannot be erased ({error}); remove it yourself") from None
    for place in (*_models(folder), folder):
        with contextlib.suppress(OSError):  # not empty: what lies there is not ours
            place.rmdir()
    return removed


class _File(NamedTuple):
    used_ns: int
    path: str
    size: int


def _models(folder: Path) -> list[Path]:
    """The folders of all models, no links."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [folder / e.name for e in entries if _FOLDER.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return []


def _files(folder: Path) -> Iterator[_File]:
    """All blocks and temporary files of all models: whatever bears such a name and is no folder."""
    for model in _models(folder):
        with contextlib.suppress(FileNotFoundError), os.scandir(model) as entries:
            for entry in entries:
                if _FILE.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        yield _File(info.st_mtime_ns, entry.path, info.st_size)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of a folder that is no link and that nobody else writes to. Raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(file)
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "belongs to another user, or others may write to it", str(folder))
        yield file
    finally:
        os.close(file)


def _touch(file: Path | int) -> bool:
    """Mark a file as used now; whether it is there. One that may only be read stays as it is."""
    try:
        os.utime(file, ns=(time.time_ns(),) * 2, follow_symlinks=isinstance(file, int))
    except OSError as error:
        return error.errno in (errno.EPERM, errno.EROFS)
    return True
