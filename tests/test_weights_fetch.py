"""The bytes of `finback pull`: cuts, ranges, retries, redirects and refusals of servers, proxies and attackers."""

import json
import socket

import pytest
from hostile_hub import COMMIT, Hub, cut, entry, redirect, status, unframed, whole
from pulling import BIG, FILES, Waits, bring, contents, refused, served

from finback.errors import UserError
from finback.weights import fetch
from finback.weights.hub import pull

pytestmark = pytest.mark.usefixtures("home")


def test_cuts_are_resumed_by_range(hub):
    hub.faults[BIG] = [cut(100_000), cut(1), cut(0), cut(50_000)]
    assert contents(bring(hub)) == served(hub)
    ranges = [headers.get("range") for headers in hub.requests_for(BIG)]
    assert ranges == [None, "bytes=100000-", "bytes=100001-", "bytes=100001-", "bytes=150001-"]
    listing = len(json.dumps({"sha": COMMIT, "siblings": [entry(*item) for item in hub.files.items()]}))
    assert hub.sent == listing + sum(map(len, served(hub).values())), "no byte came twice"


def test_waits_grow_while_nothing_comes_and_start_anew_when_something_does(hub):
    waits = Waits()
    hub.faults[BIG] = [cut(0), cut(0), cut(0), cut(10), cut(0), status(503)]
    bring(hub, waits)
    assert waits == [1, 2, 4, 1, 2, 4]


def test_a_hub_that_always_cuts_is_given_up_and_the_next_call_goes_on(home, hub):
    waits = Waits()
    hub.faults[BIG] = [cut(100_000), *[cut(0)] * 20]
    refused(home, hub, f"{BIG}: .*tried 6 times. The same command resumes", waits=waits)
    assert waits == [1, 2, 4, 8, 16]
    before = len(hub.asked)
    hub.faults.clear()
    assert contents(bring(hub)) == served(hub)
    again = [headers.get("range") for name, headers in hub.asked[before:] if name == BIG]
    assert again == ["bytes=100000-"]


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("name", [BIG, "listing"])
def test_a_busy_hub_is_asked_again(hub, code, name):
    waits = Waits()
    hub.faults[name] = [status(code), status(code)]
    assert contents(bring(hub, waits)) == served(hub)
    assert waits == [1, 2]


def test_retry_after_is_honoured_up_to_a_minute(hub):
    waits = Waits()
    hub.faults[BIG] = [status(429, retry_after=a) for a in (7, 86400, "Wed, 21 Oct 2026 07:28:00 GMT", "-5")]
    bring(hub, waits)
    assert waits == [7, 60, 4, 8]


def test_a_hub_that_stays_busy_is_given_up(home, hub):
    hub.faults["listing"] = [status(503)] * 9
    refused(home, hub, "whales/minke at revision main: HTTP 503; tried 6 times")


def test_no_connection_is_one_line(home):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        waits = Waits()
        with pytest.raises(UserError, match=r"(refused|failed); tried 6 times"):
            pull("whales/minke", endpoint=f"http://127.0.0.1:{free.getsockname()[1]}", wait=waits)
    assert not (home / "models").exists()


def test_a_part_that_is_too_long_is_begun_anew(home, hub):
    hub.faults[BIG] = [cut(1000), *[cut(0)] * 20]
    refused(home, hub, "tried 6 times")
    [part] = (home / "models" / ".pull").rglob("*.part")
    part.write_bytes(b"x" * 300_001)
    hub.faults.clear()
    assert contents(bring(hub)) == served(hub)


def test_more_bytes_than_listed_stop_at_once(home, hub):
    hub.faults[BIG] = [unframed(lambda content: content + b"more")]
    refused(home, hub, f"{BIG}: the server sends more than the 300,000 bytes")
    assert len(hub.requests_for(BIG)) == 1


def test_fewer_bytes_are_followed_by_the_rest(hub):
    hub.faults[BIG] = [unframed(lambda content: content[:-1]), lambda h, c: h.answer(206, c[-1:-1])]
    hub.faults["tokenizer.json"] = [lambda h, c: h.answer(200, c, content_length=1)]
    assert contents(bring(hub)) == served(hub)


def test_a_length_above_the_body_is_a_cut(hub):
    hub.faults["tokenizer.json"] = [lambda h, c: h.answer(200, c[:1], content_length=9)]
    assert contents(bring(hub)) == served(hub)


def test_a_server_without_ranges_sends_all_again(hub):
    hub.faults[BIG] = [cut(100_000), whole]
    assert contents(bring(hub)) == served(hub)
    assert len(hub.requests_for(BIG)) == 2


def test_a_server_without_ranges_that_cuts_is_given_up(home, hub):
    def all_but_the_end(handler, content):
        handler.answer(200, content[:200_000], content_length=len(content))

    hub.faults[BIG] = [all_but_the_end] * 50
    refused(home, hub, "tried 6 times")


def test_a_server_that_loses_and_wins_is_given_up(home, hub):
    """Without ranges, and cut sooner and later in turn: every second try brings more, and none brings news."""

    def cut_at(keep):
        return lambda handler, content: handler.answer(200, content[:keep], content_length=len(content))

    hub.faults[BIG] = [cut_at(keep) for keep in (200_000, 100_000) * 20]
    refused(home, hub, "tried 6 times")
    assert len(hub.requests_for(BIG)) == 6


@pytest.mark.parametrize(
    "given", ["bytes 0-299999/300000", "bytes 100000-299999/300001", "bytes 99999-299999/300000", "lines 1-2", None]
)
def test_another_range_than_asked_for_is_not_used(hub, given):
    def wrong(handler, content):
        handler.answer(206, content[100_000:], **({"content_range": given} if given else {}))

    hub.faults[BIG] = [cut(100_000), wrong]
    assert contents(bring(hub)) == served(hub)
    assert [headers.get("range") for headers in hub.requests_for(BIG)] == [None, "bytes=100000-", None]


def test_a_range_of_unknown_total_is_used(hub):
    def unknown(handler, content):
        handler.answer(206, content[100_000:], content_range="bytes 100000-299999/*")

    hub.faults[BIG] = [cut(100_000), unknown]
    assert contents(bring(hub)) == served(hub)
    assert len(hub.requests_for(BIG)) == 2


def test_a_range_that_cannot_be_met_begins_anew(home, hub):
    hub.faults[BIG] = [cut(100_000), status(416)]
    assert contents(bring(hub)) == served(hub)
    assert [headers.get("range") for headers in hub.requests_for(BIG)] == [None, "bytes=100000-", None]


def test_a_range_that_was_not_asked_for_is_refused(home, hub):
    hub.faults[BIG] = [status(416)] * 9
    refused(home, hub, "HTTP 416")
    assert len(hub.requests_for(BIG)) == 1


def test_the_token_goes_to_the_hub_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " secret\n")
    with Hub(dict(FILES)) as mirror:
        hub.faults[BIG] = [redirect(f"{mirror.url}/elsewhere/{BIG}"), redirect(f"/elsewhere/{BIG}")]
        mirror.faults[BIG] = [cut(1000)]
        assert contents(bring(hub)) == served(hub)
        mirror.shutdown()
    assert {headers["authorization"] for _, headers in hub.asked} == {"Bearer secret"}
    assert len(mirror.asked) == 1 and all("authorization" not in headers for _, headers in mirror.asked)


def test_without_a_token_none_is_sent(hub):
    bring(hub)
    assert all("authorization" not in headers for _, headers in hub.asked)


def test_redirects_end(home, hub):
    hub.faults["listing"] = [redirect("/api/models/whales/minke/revision/main?blobs=true")] * 50
    refused(home, hub, "redirects more than 5 times")
    assert len(hub.asked) == 6


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://127.0.0.1:x/", "data:,x"])
def test_redirects_lead_to_http_alone(home, hub, target):
    hub.faults[BIG] = [redirect(target)] * 9
    refused(home, hub, "redirects (from|to what is no address)|Invalid URL in location header")


def test_https_is_not_left(monkeypatch):
    import httpx

    asked = []

    def answer(request):
        asked.append(str(request.url))
        return httpx.Response(302, headers={"location": "http://hub.example/x"})

    fetcher = fetch.Fetcher("https://hub.example", "secret", Waits())
    fetcher.client = httpx.Client(transport=httpx.MockTransport(answer))
    with pytest.raises(UserError, match="redirects from https to 'http'"):
        fetcher.read("https://hub.example/x", "x", 10)
    assert asked == ["https://hub.example/x"]


@pytest.mark.parametrize(("code", "words"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "--revision"), (400, "400")])
@pytest.mark.parametrize("name", [BIG, "listing"])
def test_no_is_an_answer(home, hub, code, words, name):
    hub.faults[name] = [status(code)] * 9
    refused(home, hub, words)
    assert len(hub.requests_for(name)) == 1


def test_a_no_in_the_middle_keeps_what_came(home, hub):
    hub.faults[BIG] = [cut(100_000), status(400)]
    refused(home, hub, "HTTP 400")
    assert contents(bring(hub)) == served(hub)
    assert [headers.get("range") for headers in hub.requests_for(BIG)] == [None, "bytes=100000-", "bytes=100000-"]


def test_a_token_that_is_none_is_not_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sec\nret")
    with pytest.raises(UserError, match="HF_TOKEN") as failure:
        bring(hub)
    assert "ret" not in str(failure.value).replace("characters that no token", "")
