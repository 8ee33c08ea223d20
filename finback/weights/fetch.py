"""Bytes over HTTP, for `finback pull` alone: redirects that leak nothing, resume by range, tries that end."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finback import __version__
from finback.errors import UserError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
REDIRECTS, TRIES, LONGEST_WAIT_S, TIMEOUT_S = 5, 6, 60.0, 30.0


class _Again(Exception):
    """What another try may mend; `after`: the seconds that the server asks to wait."""

    def __init__(self, what: str, after: float = 0) -> None:
        super().__init__(what)
        self.after = after


class Fetcher:
    """Reads from one endpoint and from where it redirects to; the token goes to the endpoint's origin alone.

    Raises UserError for an endpoint or token that cannot be one. `wait` sleeps between tries; `stop` ends all work.
    """

    def __init__(self, endpoint: str, token: str, wait: Callable[[float], object] | None = None) -> None:
        import httpx

        try:
            home = httpx.URL(endpoint)
        except httpx.InvalidURL:
            home = httpx.URL()
        if home.scheme not in ("http", "https") or not home.host or home.userinfo or home.query or home.fragment:
            raise UserError("--endpoint or HF_ENDPOINT: must be http(s)://HOST[:PORT][/PATH], without a password in it")
        if not (token.isascii() and token.isprintable()):
            raise UserError("HF_TOKEN: holds characters that no token has; set it again")
        self.stop = threading.Event()
        self._wait = self.stop.wait if wait is None else wait
        self._origin, self._token = _origin(home), token
        # Identity: ranges count, and hashes are of, the bytes as they are stored.
        headers = {"User-Agent": f"finback/{__version__}", "Accept-Encoding": "identity"}
        self.client = httpx.Client(headers=headers, timeout=TIMEOUT_S)

    def read(self, url: str, what: str, limit: int) -> bytes:
        """The body at `url`, of at most `limit` bytes. Raises UserError, naming `what`."""

        def act() -> bytes:
            body = bytearray()
            with self._open(url, what, {}) as response:
                _expect(response, 200, what)
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > limit:
                        raise UserError(f"{what}: the answer is longer than {limit:,} bytes; nothing was downloaded")
            return bytes(body)

        return self._persist(act, lambda: 0, what)

    def download(self, url: str, part: Path, size: int, what: str, advance: Callable[[int], None]) -> None:
        """Complete the file `part` to `size` bytes; `advance(n)` hears of bytes won, and lost if n < 0.

        Its content is not verified. Raises UserError, naming `what`, and leaves what came for the next call.
        """
        part.touch()
        self._persist(lambda: self._continue(url, part, size, what, advance), lambda: part.stat().st_size, what)

    def _continue(self, url: str, part: Path, size: int, what: str, advance: Callable[[int], None]) -> None:
        """One request for the bytes that are missing."""
        have = part.stat().st_size
        if have == size:
            return
        with self._open(url, what, {"Range": f"bytes={have}-"} if have else {}) as response:
            given = re.fullmatch(rf"bytes {have}-\d+/({size}|\*)", response.headers.get("content-range", ""))
            if response.status_code != 206 or given is None:  # all of it, or another range than was asked for
                other = have and response.status_code in (206, 416)
                if not other:
                    _expect(response, 200, what)
                with open(part, "wb"):
                    advance(-have)
                have = 0
                if other:
                    raise _Again(f"HTTP {response.status_code} with another range than was asked for")
            with open(part, "ab") as file:
                for chunk in response.iter_raw():
                    if self.stop.is_set():
                        raise CancelledError
                    have += len(chunk)
                    if have > size:
                        raise UserError(f"{what}: the server sends more than the {size:,} bytes that it listed")
                    file.write(chunk)
                    advance(len(chunk))
        if have < size:
            raise _Again(f"the answer ended after {have:,} of {size:,} bytes")

    def _persist(self, act: Callable[[], T], held: Callable[[], int], what: str) -> T:
        """Try until it works; give up after TRIES failures in a row that brought no byte more than ever before."""
        import httpx

        best, failures = held(), 0
        while not self.stop.is_set():
            try:
                return act()
            except (httpx.TransportError, _Again) as error:
                failures = 1 if held() > best else failures + 1
                best = max(best, held())
                if failures == TRIES:
                    why = str(error) or type(error).__name__
                    raise UserError(f"{what}: {why}; tried {TRIES} times. The same command resumes") from None
                self._wait(min(getattr(error, "after", 0) or 2.0 ** (failures - 1), LONGEST_WAIT_S))
        raise CancelledError

    @contextmanager
    def _open(self, url: str, what: str, headers: dict[str, str]) -> "Iterator[httpx.Response]":
        """The answer after redirects, at most REDIRECTS and never from https to http."""
        import httpx

        try:
            target = httpx.URL(url)
            for _ in range(REDIRECTS + 1):
                own = self._token and _origin(target) == self._origin
                sent = headers | ({"Authorization": f"Bearer {self._token}"} if own else {})
                with self.client.stream("GET", target, headers=sent) as response:
                    if not response.has_redirect_location:
                        _refuse(response, what)
                        yield response
                        return
                    before, target = target, target.join(response.headers["location"])
                if target.scheme != "https" and target.scheme != before.scheme:
                    raise UserError(f"{what}: the server redirects from {before.scheme} to {target.scheme!r}; refused")
        except httpx.InvalidURL:
            raise UserError(f"{what}: the server redirects to what is no address") from None
        raise UserError(f"{what}: the server redirects more than {REDIRECTS} times")


def _origin(url: "httpx.URL") -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _expect(response: "httpx.Response", status: int, what: str) -> None:
    if response.status_code != status:
        raise UserError(f"{what}: the server answers HTTP {response.status_code}, where {status} is right")


def _refuse(response: "httpx.Response", what: str) -> None:
    """Raise for an answer that says no: _Again where it may say yes later."""
    status = response.status_code
    if status == 429 or status >= 500:
        after = response.headers.get("retry-after", "")
        raise _Again(f"HTTP {status}", float(after) if re.fullmatch(r"[0-9]{1,9}", after) else 0)
    if status in (401, 403):
        raise UserError(
            f"{what}: HTTP {status}: private, gated or not there; accept its conditions on the hub and set HF_TOKEN"
        )
    if status == 404:
        raise UserError(f"{what}: HTTP 404: not there; check the name and --revision")
