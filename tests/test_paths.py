"""Where things live, writes that happen whole or not at all, and the progress bar."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finback import paths
from finback.errors import UserError
from finback.progress import bar


def make_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_home_is_an_environment_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("FINBACK_HOME", str(tmp_path))
    assert paths.home() == tmp_path
    monkeypatch.setenv("FINBACK_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.home() == tmp_path / ".finback"
    monkeypatch.setenv("FINBACK_HOME", "~/models")
    assert paths.home() == tmp_path / "models"


def test_a_model_is_a_path_or_a_name(monkeypatch, tmp_path):
    monkeypatch.setenv("FINBACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "package")
    pulled = make_model(tmp_path / "home" / "models" / "minke")
    packaged = make_model(tmp_path / "package" / "models" / "calf")
    elsewhere = make_model(tmp_path / "elsewhere" / "run")
    assert paths.model_path("minke") == pulled
    assert paths.model_path("calf") == packaged
    assert paths.model_path(str(elsewhere)) == elsewhere
    mine = make_model(tmp_path / "home" / "models" / "calf")
    assert paths.model_path("calf") == mine, "a user's model comes before the packaged one of the same name"


def test_an_unknown_model_names_those_that_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("FINBACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "package")
    with pytest.raises(UserError, match="known models: none"):
        paths.model_path("orca")
    make_model(tmp_path / "home" / "models" / "minke")
    make_model(tmp_path / "package" / "models" / "calf")
    (tmp_path / "home" / "models" / "half").mkdir()
    with pytest.raises(UserError, match=r"--model 'orca'.*known models: calf, minke$"):
        paths.model_path("orca")


def test_a_name_may_have_an_organisation_and_stays_inside(monkeypatch, tmp_path):
    monkeypatch.setenv("FINBACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "package")
    nested = make_model(tmp_path / "home" / "models" / "whales" / "minke")
    make_model(tmp_path / "home" / "secret")
    assert paths.model_path("whales/minke") == nested
    for name in ("../secret", "whales/../../secret"):
        with pytest.raises(UserError, match=r"known models: whales/minke$"):
            paths.model_path(name)


def test_installed_models_are_those_that_names_mean(monkeypatch, tmp_path):
    models, packaged = tmp_path / "home" / "models", tmp_path / "package" / "models"
    monkeypatch.setenv("FINBACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "package")
    assert paths.installed() == []
    for name in (
        "minke",
        "minke/vision",
        "whales/sei",
        ".pull/whales--sei--5eaf",
        "whales/.sei.x.tmp",
        ".x.tmp",
        "a/b/c",
    ):
        make_model(models / name)
    for name in ("calf", "minke"):
        make_model(packaged / name)
    (models / "whales" / "gguf").mkdir()
    (models / "whales" / "gguf" / paths.MANIFEST).touch()
    (models / "whales" / "empty").mkdir()
    expected = [("calf", packaged / "calf"), ("minke", models / "minke")]
    expected += [("whales/gguf", models / "whales" / "gguf"), ("whales/sei", models / "whales" / "sei")]
    assert paths.installed() == expected


def test_a_removed_folder_is_gone_and_links_in_it_are_not_followed(tmp_path):
    outside = make_model(tmp_path / "outside")
    folder = make_model(tmp_path / "models" / "minke")
    (folder / "link").symlink_to(outside)
    paths.remove_folder(folder)
    assert os.listdir(tmp_path / "models") == [] and os.listdir(outside) == ["config.json"]


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "file.json"
    with paths.atomic_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["file.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), paths.atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_folder_appears_whole_and_replaces_the_old(tmp_path):
    target = tmp_path / "model"
    for content in ("first", "second"):
        with paths.atomic_folder(target) as temporary:
            (temporary / content).write_text(content)
            assert not (target / content).exists()
        assert os.listdir(target) == [content]
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(KeyboardInterrupt), paths.atomic_folder(target) as temporary:
        (temporary / "half").touch()
        raise KeyboardInterrupt
    assert os.listdir(target) == ["old"] and os.listdir(tmp_path) == ["model"]


def test_a_bar_is_silent_without_a_terminal(capfd):
    with bar(2, "work") as progress:
        progress.advance(loss=1.5)
        progress.advance()
    assert capfd.readouterr() == ("", "")


def test_a_bar_without_a_terminal_does_not_import_rich():
    code = "import sys, finback.progress as p\nwith p.bar(1, 'x') as b: b.advance()\nprint('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def terminal(monkeypatch):
    """Makes stderr a terminal; returns what gives the last line there."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    shown = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
    return lambda: [line for line in shown.sub("", stream.getvalue()).splitlines() if line.strip()][-1]


def test_a_bar_on_a_terminal_shows_count_and_fields(monkeypatch, capsys):
    last_line = terminal(monkeypatch)
    with bar(4, "pretrain [calf]", done=1) as progress:
        progress.advance(loss=1.23456, tokens_per_s=8123.4)
        progress.advance(2, loss=0.5, step=1200)
    for part in ("pretrain [calf]", "4/4", "loss 0.5", "tokens/s 8,123", "step 1,200"):
        assert part in last_line()
    assert capsys.readouterr().out == ""


def test_a_bar_of_bytes_shows_sizes_and_goes_back(monkeypatch):
    last_line = terminal(monkeypatch)
    with bar(4 * 2**20, "whales/minke", done=2**20, in_bytes=True) as progress:
        progress.advance(2 * 2**20)
        progress.advance(-(2**20))
    assert "2.0/4.0 MiB" in last_line() and "/s" in last_line()


def test_a_folder_that_cannot_be_replaced_is_there_again(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    rename = Path.rename

    def refuse(self, target):
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        paths.replace_folder(tmp_path / "new", tmp_path / "model")
    assert (tmp_path / "model" / "old").exists()
