"""Models from a hub: chosen, fetched, verified, put in place whole. Nothing of them is executed."""

import fcntl
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import BaseModel, Field, ValidationError

from finback.errors import UserError
from finback.paths import MANIFEST, atomic_file, home, replace_folder
from finback.progress import Bar, bar
from finback.weights import packs
from finback.weights.fetch import Fetcher

ENDPOINT = "https://huggingface.co"
LISTING_LIMIT = 16 * 2**20
_WEIGHTS, _PICKLES = (".safetensors", ".gguf"), (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TAKEN = re.compile(r".+\.(safetensors|json|txt|md|model|tiktoken|gguf|jinja)|LICENSE[A-Za-z0-9_-]*", re.DOTALL)
_NAME = r"(?!.*(\.\.|--))[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"  # so that ORG--NAME means one
_REVISION = r"(?!.*\.\.)[A-Za-z0-9_-][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,95}){0,3}"
_Sha1 = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Large(BaseModel):
    sha256: _Sha256


class _File(BaseModel):
    """A file of a listing, known by git's blob hash, or by its SHA-256 where it is in large file storage."""

    rfilename: str
    size: Annotated[int, Field(ge=0)]
    blobId: _Sha1
    lfs: _Large | None = None

    def hashes(self, path: Path) -> tuple[str, str, str]:
        """The SHA-256 of the file at `path`, its hash of the listing's kind, and what the listing says that is."""
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                sha256.update(chunk)
                if self.lfs is None:
                    blob.update(chunk)
        whole = sha256.hexdigest()
        return (whole, blob.hexdigest(), self.blobId) if self.lfs is None else (whole, whole, self.lfs.sha256)

    def found_at(self, path: Path) -> str | None:
        """The SHA-256 of the file at `path` if it is this file, whole."""
        whole, found, listed = self.hashes(path) if _size(path) == self.size else ("", "", "-")
        return whole if found == listed else None


class _Listing(BaseModel):
    sha: _Sha1
    siblings: list[_File]


class Entry(BaseModel):
    size: int
    sha256: _Sha256


class Manifest(BaseModel):
    """`finback.json` of a pulled folder."""

    repo: str
    revision: str
    commit: _Sha1
    endpoint: str
    files: dict[str, Entry]


def pull(
    repo: str,
    revision: str = "main",
    *,
    endpoint: str | None = None,
    files: Sequence[str] = (),
    jobs: int = 4,
    wait: Callable[[float], object] | None = None,
) -> Path:
    """Fetch the model `repo` ("ORG/NAME") at `revision` into `home()/models/ORG/NAME`; returns that folder.

    `files`: patterns that choose among what is taken at all (weights without code, and texts; GGUF files also from one
    subfolder). `endpoint`: else `$HF_ENDPOINT`, else the public hub; `$HF_TOKEN` is sent to it alone. `jobs` files come
    at once; `wait(seconds)` is called between tries. Every file is verified by its hash, and the folder appears whole
    or not at all; what was interrupted, the next call resumes. Raises UserError for whatever goes wrong.
    """
    if not re.fullmatch(f"{_NAME}/{_NAME}", repo):
        raise UserError(f"{repo!r}: a repository is ORG/NAME, each of letters, digits, '-', '_' and '.'")
    if not re.fullmatch(_REVISION, revision):
        raise UserError(f"--revision {revision!r}: must be a branch, a tag, a commit or refs/pr/N")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UserError("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it to pull")
    base = (endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    fetcher = Fetcher(base, os.environ.get("HF_TOKEN", "").strip(), wait)
    final, staging = home() / "models" / repo, home() / "models" / ".pull" / repo.replace("/", "--")
    try:
        with fetcher.client:
            listing = _listing(fetcher, base, repo, revision)
            allowed = _allowed(repo, listing.siblings)
            names = _chosen(repo, listing.siblings, allowed, files)
            with _alone(staging):
                old = _pulled(final)
                if old is not None and old.commit == listing.sha:
                    names |= old.files.keys() & allowed.keys()  # what was chosen before stays
                    if all(_size(final / name) == allowed[name].size for name in names):
                        print(f"{repo} is already here, at commit {listing.sha[:12]}", file=sys.stderr)
                        return final
                manifest = Manifest(repo=repo, revision=revision, commit=listing.sha, endpoint=base, files={})
                _bring(fetcher, manifest, [allowed[name] for name in sorted(names)], staging, jobs)
    except OSError as error:
        raise UserError(f"{repo}: cannot be written ({error}); once that is mended the same command resumes") from None
    return final


def _listing(fetcher: Fetcher, base: str, repo: str, revision: str) -> _Listing:
    """The commit and the files of a revision."""
    url = f"{base}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    what = f"{repo} at revision {revision}"
    try:
        return _Listing.model_validate_json(fetcher.read(url, what, LISTING_LIMIT))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        raise UserError(f"{what}: {base} does not answer as a model hub does ({place}: {first['msg']})") from None


def _allowed(repo: str, listed: list[_File]) -> dict[str, _File]:
    """The files that may be taken, by name. Raises UserError for names that would harm some disk."""
    allowed: dict[str, _File] = {}
    seen: set[str] = set()
    for name, file in ((file.rfilename, file) for file in listed):
        *folders, last = name.split("/")
        if not _TAKEN.fullmatch(last):
            continue
        bad = any(part in ("", ".", "..") for part in (*folders, last)) or "\\" in name or ":" in name
        if bad or not name.isprintable() or len(name.encode()) > 200:
            raise UserError(f"{repo}: lists a file with the unsafe name {name[:200]!r}; nothing was downloaded")
        hidden = any(part.startswith(".") for part in (*folders, last)) or name.casefold() == MANIFEST
        if not hidden and len(folders) <= last.endswith(".gguf"):
            if name.casefold() in seen:
                raise UserError(f"{repo}: lists {name!r} twice, or in letters of another case: one file on some disks")
            seen.add(name.casefold())
            allowed[name] = file
    return allowed


def _chosen(repo: str, listed: list[_File], allowed: dict[str, _File], patterns: Sequence[str]) -> set[str]:
    """The names of the files to fetch: those that match a pattern, or without patterns those at the top."""
    weights = [name for name in allowed if name.endswith(_WEIGHTS)]
    if not weights and any(file.rfilename.endswith(_PICKLES) for file in listed):
        raise UserError(
            f"{repo}: its weights are pickles, which can run code, so they are not downloaded; `finback convert FOLDER "
            "OUT` reads weights-only files that you fetched yourself"
        )
    if not patterns and weights and all("/" in name for name in weights):
        folders = ", ".join(sorted({name.split("/")[0] for name in weights}))
        raise UserError(f"{repo}: its weights are in {folders}: choose some with --file, as in --file 'FOLDER/*'")
    if patterns:
        names = {name for name in allowed if any(fnmatchcase(name, pattern) for pattern in patterns)}
    else:
        names = {name for name in allowed if "/" not in name}
    if not names:
        there = ", ".join([*allowed][:20]) or "none that is taken"
        raise UserError(f"{repo}: no file matches --file {', '.join(patterns) or '*'}; there are: {there}")
    return names


@contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """Hold the lock of a repository. Raises UserError when another process has it."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{staging}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{staging.name}: another finback pull of it runs; wait for it, or stop it") from None
        yield


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a pulled folder. Raises OSError or ValueError where there is none."""
    return Manifest.model_validate_json((folder / MANIFEST).read_bytes())


def _pulled(folder: Path) -> Manifest | None:
    """The manifest of a folder that an earlier pull made. Raises UserError if other files are there too."""
    if not os.path.lexists(folder):
        return None
    with suppress(OSError, ValidationError):
        manifest = manifest_of(folder)
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        there = {name for name in there if not name.startswith(f"{packs.FOLDER}/")}
        if there <= {*manifest.files, MANIFEST} and not folder.is_symlink():
            return manifest
    raise UserError(f"{folder}: holds other files than finback pull put there; move it away first")


def _bring(fetcher: Fetcher, manifest: Manifest, files: list[_File], staging: Path, jobs: int) -> None:
    """Fetch `files`, several at once, into a staging folder of this commit, which then becomes the model's."""
    folder, final = staging.with_name(f"{staging.name}--{manifest.commit[:12]}"), home() / "models" / manifest.repo
    for stale in set(staging.parent.glob(f"{staging.name}--*")) - {folder}:
        shutil.rmtree(stale)
    folder.mkdir(exist_ok=True)
    total = sum(file.size for file in files)
    done = sum(_held(file, folder / file.rfilename, final / file.rfilename) for file in files)
    free = shutil.disk_usage(folder).free
    if total - done > free:
        raise UserError(
            f"{manifest.repo}: {total - done:,} of {total:,} bytes are still to come, and {home()} has {free:,} free: "
            f"make room for {total - done - free:,} more, or set FINBACK_HOME to another disk"
        )
    with bar(total, manifest.repo, done, in_bytes=True) as progress, ThreadPoolExecutor(jobs) as pool:
        work = {pool.submit(_bring_one, fetcher, manifest, file, folder, final, progress): file for file in files}
        try:
            hashes = {work[future].rfilename: future.result() for future in as_completed(work)}
        except BaseException:  # Ctrl-C as well: the others stop too, and what came stays
            fetcher.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    manifest.files = {file.rfilename: Entry(size=file.size, sha256=hashes[file.rfilename]) for file in files}
    for path in [path for path in folder.rglob("*") if not path.is_dir()]:
        if path.relative_to(folder).as_posix() not in hashes:
            path.unlink()  # begun by an earlier call with other patterns
    with atomic_file(folder / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    replace_folder(folder, final)


def _bring_one(fetcher: Fetcher, manifest: Manifest, file: _File, folder: Path, final: Path, progress: Bar) -> str:
    """Have `file` verified in the staging folder, from the disk or the hub; returns its SHA-256."""
    name, target, old = file.rfilename, folder / file.rfilename, final / file.rfilename
    part, held = _part(target), _held(file, target, old)
    for source in (target, old):
        if sha256 := file.found_at(source):
            if source is old:
                _link(old, target)
            progress.advance(file.size - held)
            return sha256
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if (_size(part) or 0) > file.size:
        part.unlink()
    progress.advance((_size(part) or 0) - held)
    what = f"{manifest.repo}: {name}"
    url = f"{manifest.endpoint}/{manifest.repo}/resolve/{manifest.commit}/{quote(name)}"
    found = listed = ""
    for _ in range(2):
        fetcher.download(url, part, file.size, what, progress.advance)
        sha256, found, listed = file.hashes(part)
        if found == listed:
            with open(part, "rb") as whole:
                os.fsync(whole.fileno())
            part.replace(target)
            return sha256
        part.unlink()
        progress.advance(-file.size)
    raise UserError(f"{what}: twice other bytes than listed came, of hash {found}, not {listed}; nothing was installed")


def _held(file: _File, target: Path, old: Path) -> int:
    """The bytes of a file that are on the disk already, as their sizes say."""
    part = _size(_part(target)) or 0
    return file.size if file.size in (_size(target), _size(old)) else part if part <= file.size else 0


def _link(old: Path, target: Path) -> None:
    """`target` becomes the same file as `old`, or a copy where a disk has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    _part(target).unlink(missing_ok=True)
    try:
        os.link(old, target)
    except OSError:
        shutil.copyfile(old, target)


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
