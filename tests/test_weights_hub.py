"""`finback pull` as a whole: what is chosen, verified and installed, against a hub that lists and sends anything."""

import hashlib
import json
import os
import shutil
import threading

import pytest
from hostile_hub import COMMIT, OTHER_COMMIT, cut, entry, instead, serve, status
from pulling import BIG, TAKEN, WEIGHTS, Waits, bring, contents, refused, served

from finback.errors import UserError
from finback.weights.hub import pull

pytestmark = pytest.mark.usefixtures("home")


def test_a_model_arrives_whole_with_its_manifest(home, hub):
    folder = bring(hub, revision="refs/pr/3")
    assert folder == home / "models" / "whales" / "minke"
    assert contents(folder) == served(hub)
    manifest = json.loads((folder / "finback.json").read_text())
    files = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in served(hub).items()
    }
    assert manifest == {
        "repo": "whales/minke",
        "revision": "refs/pr/3",
        "commit": COMMIT,
        "endpoint": hub.url,
        "files": files,
    }
    assert [path.name for path in (home / "models" / ".pull").iterdir()] == ["whales--minke.lock"]


def test_a_second_pull_only_lists(hub, capsys):
    folder = bring(hub)
    before = len(hub.asked)
    assert bring(hub) == folder
    assert [name for name, _headers in hub.asked[before:]] == ["listing"]
    assert "whales/minke is already here" in capsys.readouterr().err


def test_a_file_that_lost_bytes_is_fetched_again(hub):
    folder = bring(hub)
    (folder / BIG).write_bytes(b"short")
    before = len(hub.asked)
    assert contents(bring(hub)) == served(hub)
    assert sorted(name for name, _ in hub.asked[before:] if name.endswith(".safetensors")) == [BIG]


def test_patterns_choose_and_add_up(hub):
    folder = bring(hub, files=["*.json"])
    assert contents(folder).keys() == {"config.json", "tokenizer.json"}
    bring(hub, files=["LICENSE", "model-00002*"])
    assert contents(folder).keys() == {"config.json", "tokenizer.json", "LICENSE", "model-00002-of-00002.safetensors"}
    with pytest.raises(UserError, match=r"no file matches --file \*\.py; there are: .*config\.json"):
        bring(hub, files=["*.py"])


def test_gguf_may_be_in_one_subfolder_and_is_chosen(home, hub):
    hub.files = {"README.md": b"#", "Q4/a.gguf": b"four", "Q8/a.gguf": b"eight", "x/Q2/a.gguf": b"two"}
    refused(home, hub, "its weights are in Q4, Q8: choose some with --file")
    assert contents(bring(hub, files=["Q4/*"])) == {"Q4/a.gguf": b"four"}


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize("name", [BIG, "tokenizer.json"])
def test_wrong_bytes_once_are_fetched_anew(hub, name):
    hub.faults[name] = [instead(flipped)]
    assert contents(bring(hub)) == served(hub)
    assert [headers.get("range") for headers in hub.requests_for(name)] == [None, None]


@pytest.mark.parametrize("name", [BIG, "tokenizer.json"])
def test_wrong_bytes_always_are_refused_naming_both_hashes(home, hub, name):
    listed = entry(name, hub.files[name])
    wrong = entry(name, flipped(hub.files[name]))
    right, other = [(e["lfs"]["sha256"] if "lfs" in e else e["blobId"]) for e in (listed, wrong)]
    hub.faults[name] = [instead(flipped)] * 9
    refused(home, hub, f"{name}: twice .* of hash {other}, not {right}")
    assert len(hub.requests_for(name)) == 2


def test_a_part_that_was_tampered_with_is_not_installed(home, hub):
    hub.faults[BIG] = [cut(1000), *[cut(0)] * 20]
    refused(home, hub, "tried 6 times")
    [part] = (home / "models" / ".pull").rglob("*.part")
    part.write_bytes(b"x" * 1000)
    hub.faults.clear()
    assert contents(bring(hub)) == served(hub)


UNSAFE = ["../x.json", "/etc/x.json", "a\\b.json", "a/../../b.gguf", "./x.json", "a//b.gguf", "C:x.json", "..\\x.json"]
UNSAFE += ["a\0.json", "a\n.json", "a\x1b[2J.json", "a\u202enosj.json", "a" * 300 + ".json"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_are_refused(home, hub, name):
    hub.listed = [entry("config.json", b"{}"), entry(name, b"{}")]
    refused(home, hub, "unsafe name")
    refused(home, hub, "unsafe name", files=["config.json"])
    assert not home.exists()


@pytest.mark.parametrize("names", [("a.json", "A.json"), ("a.json", "a.json")])
def test_names_that_fall_together_are_refused(home, hub, names):
    hub.listed = [entry(name, b"{}") for name in names]
    refused(home, hub, "of another case")
    assert not home.exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "JSON"),
        (b'{"siblings": []}', "sha"),
        (json.dumps({"sha": "../../x", "siblings": []}).encode(), "sha"),
        (json.dumps({"sha": COMMIT, "siblings": [entry("a.json", b"") | {"size": -1}]}).encode(), "size"),
        (json.dumps({"sha": COMMIT, "siblings": [entry("a.json", b"") | {"blobId": None}]}).encode(), "blobId"),
        (json.dumps({"sha": COMMIT, "siblings": [entry("a.gguf", b"") | {"lfs": {"sha256": "0"}}]}).encode(), "lfs"),
        (json.dumps({"sha": COMMIT, "siblings": [{"rfilename": "a.json"}]}).encode(), "size"),
    ],
)
def test_what_is_no_listing_is_refused(home, hub, body, words):
    hub.faults["listing"] = [lambda handler, _content: handler.answer(200, body)]
    refused(home, hub, f"does not answer as a model hub does .*{words}")


def test_a_giant_listing_is_not_read(home, hub, monkeypatch):
    monkeypatch.setattr("finback.weights.hub.LISTING_LIMIT", 1000)
    refused(home, hub, "longer than 1,000 bytes")


def test_pickles_are_refused_naming_the_door(home, hub):
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    refused(home, hub, "pickles, which can run code.*finback convert FOLDER OUT")


def test_offline_means_offline(home, hub, monkeypatch):
    for value in ("1", "true", "YES", "on"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        refused(home, hub, "HF_HUB_OFFLINE")
    assert hub.asked == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    bring(hub)


def test_the_endpoint_may_be_a_variable(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    assert contents(pull("whales/minke")) == served(hub)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repo": "minke"}, "ORG/NAME"),
        *(({"repo": repo}, "ORG/NAME") for repo in ("../minke", "a/..", "a/b/c", "a/.b", "a--b/c", "a/b\n", "a/b?x")),
        *(({"revision": revision}, "--revision") for revision in ("", "../x", "a//b", "a?b", "/a", "a\n", "a/..")),
        *(
            ({"endpoint": url}, "--endpoint")
            for url in ("ftp://x", "x", "http://", "http://u:p@x", "http://x?y", "http://x#y")
        ),
    ],
)
def test_what_names_nothing_is_refused(home, options, words):
    with pytest.raises(UserError, match=words):
        pull(**({"repo": "whales/minke", "endpoint": "http://127.0.0.1:1", "wait": Waits()} | options))
    assert not home.exists()


def test_a_new_commit_replaces_the_old_and_reuses_what_is_equal(home, hub):
    folder = bring(hub)
    inode = (folder / BIG).stat().st_ino
    hub.commit = OTHER_COMMIT
    hub.files |= {"model-00002-of-00002.safetensors": WEIGHTS[:69_000], "added.txt": b"new"}
    del hub.files["README.md"]
    before = len(hub.asked)
    assert contents(bring(hub)) == served(hub, TAKEN - {"README.md"} | {"added.txt"})
    assert (folder / BIG).stat().st_ino == inode
    again = {name for name, _ in hub.asked[before:]}
    assert BIG not in again and "model-00002-of-00002.safetensors" in again
    assert json.loads((folder / "finback.json").read_text())["commit"] == OTHER_COMMIT
    assert {path.name for path in (home / "models" / "whales").iterdir()} == {"minke"}


def test_what_was_changed_here_is_not_reused(hub):
    folder = bring(hub)
    (folder / BIG).write_bytes(flipped(WEIGHTS))
    hub.commit = OTHER_COMMIT
    assert contents(bring(hub)) == served(hub)


def test_a_failed_update_leaves_the_old_model(hub):
    folder = bring(hub)
    old = contents(folder)
    hub.commit = OTHER_COMMIT
    hub.files = hub.files | {BIG: WEIGHTS[::-1]}
    hub.faults[BIG] = [status(403)]
    with pytest.raises(UserError, match="403"):
        bring(hub)
    assert contents(folder) == old
    assert json.loads((folder / "finback.json").read_text())["commit"] == COMMIT


def test_a_folder_with_other_files_is_not_replaced(home, hub):
    folder = bring(hub)
    (folder / "mine.safetensors").write_bytes(b"mine")
    hub.commit = OTHER_COMMIT
    with pytest.raises(UserError, match="holds other files"):
        bring(hub)
    assert (folder / "mine.safetensors").read_bytes() == b"mine"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        bring(hub)


def test_parts_of_another_choice_are_not_installed(home, hub):
    hub.faults[BIG] = [cut(1000), *[cut(0)] * 20]
    refused(home, hub, "tried 6 times")
    assert contents(bring(hub, files=["config.json"])) == {"config.json": hub.files["config.json"]}


def test_a_full_disk_is_said_before_anything_comes(home, hub, monkeypatch):
    total = sum(map(len, served(hub).values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 0, total - 1))
    refused(home, hub, f"{total:,} of {total:,} bytes .* {total - 1:,} free: make room for 1 more")
    assert [name for name, _ in hub.asked] == ["listing"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 0, total))
    bring(hub)


def test_a_disk_that_cannot_be_written_is_one_line(home, hub):
    (home / "models").mkdir(parents=True)
    (home / "models" / ".pull").touch()
    refused(home, hub, "cannot be written")


def test_two_pulls_of_one_repository_do_not_meet(hub):
    """The second begins while the first waits for a file."""
    said = []

    def meanwhile(handler, content):
        try:
            bring(hub)
        except UserError as error:
            said.append(str(error))
        serve(handler, content)

    hub.faults[BIG] = [meanwhile]
    assert contents(bring(hub)) == served(hub)
    assert len(said) == 1 and "another finback pull" in said[0]


def test_several_files_come_at_once(hub):
    """Two requests wait for each other: with one at a time neither would end."""
    both = threading.Barrier(2, timeout=20)

    def together(handler, content):
        both.wait()
        serve(handler, content)

    hub.faults |= {BIG: [together], "model-00002-of-00002.safetensors": [together]}
    assert contents(bring(hub, jobs=2)) == served(hub)


def test_one_failure_stops_the_other_files(home, hub):
    """One file is refused; the other, which never ends by itself, is left then."""
    begun = threading.Event()

    def refuse(handler, content):
        begun.wait(20)
        handler.answer(403)

    def trickle(handler, content):
        handler.send_response(200)
        handler.end_headers()
        for at in range(0, len(content), 100):
            handler.wfile.write(content[at : at + 100])
            handler.wfile.flush()
            if at >= 2000:  # 0.2 s after the first bytes: they have been read
                begun.set()
            threading.Event().wait(0.01)

    hub.faults |= {BIG: [trickle], "model-00002-of-00002.safetensors": [refuse]}
    refused(home, hub, "HTTP 403", jobs=2, files=["*.safetensors"])
    [part] = (home / "models" / ".pull").rglob(f"{BIG}.part")
    assert 0 < part.stat().st_size < len(WEIGHTS)


def test_ctrl_c_leaves_what_came_for_the_next_call(home, hub):
    """Ctrl-C, as it comes between two tries: here it is raised where the wait would be."""

    def interrupt(_seconds):
        raise KeyboardInterrupt

    hub.faults[BIG] = [cut(100_000)]
    with pytest.raises(KeyboardInterrupt):
        bring(hub, interrupt, jobs=1)
    assert not (home / "models" / "whales").exists()
    assert contents(bring(hub)) == served(hub)
    assert [headers.get("range") for headers in hub.requests_for(BIG)] == [None, "bytes=100000-"]


def test_nothing_is_executable_or_linked(hub):
    folder = bring(hub)
    assert all(not path.is_symlink() and not os.access(path, os.X_OK) for path in folder.iterdir())
