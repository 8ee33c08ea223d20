"""The commands about models on disk: pull, ls, rm."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hostile_hub import COMMIT, Hub
from tiny_model import tiny
from typer.testing import CliRunner

from finback.cli import app

FILES = {"config.json": json.dumps(tiny().to_dict()).encode(), "model.safetensors": b"weights", "x.py": b"import os"}


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home with the model whales/minke and one whose config is damaged."""
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("FINBACK_HOME", str(tmp_path))
    for name, config in (("whales/minke", json.dumps(tiny().to_dict())), ("odd", '{"hidden_size": []}')):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config)
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
    return tmp_path


def finback(*arguments: object, stdin: str = ""):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_pull_prints_the_folder_and_what_came(home):
    with Hub(FILES) as hub:
        folder = home / "models" / "whales" / "minke"
        refused = finback("pull", "whales/minke", "--endpoint", hub.url)
        assert refused.exit_code == 2 and "move it away" in refused.stderr
        shutil.rmtree(folder)
        plain = finback("pull", "whales/minke", "--endpoint", hub.url, "--jobs", 2)
        assert (plain.exit_code, plain.stdout) == (0, f"{folder}\n")
        again = finback("pull", "whales/minke", "--endpoint", hub.url, "--file", "*.json", "--json")
        assert json.loads(again.stdout) == {
            "path": str(folder),
            "commit": COMMIT,
            "files": ["config.json", "model.safetensors"],
            "bytes": len(FILES["config.json"]) + 7,
        }
        assert "already here" in again.stderr
        hub.shutdown()
    assert json.loads(finback("show", "whales/minke", "--json").stdout)["layers"] == tiny().num_hidden_layers


def test_pull_refuses_in_one_line(home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = finback("pull", "whales/minke")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "HF_HUB_OFFLINE" in result.stderr


def test_ls_shows_every_model_and_what_is_wrong_with_it(home):
    rows = {row["name"]: row for row in json.loads(finback("ls", "--json").stdout)}
    assert list(rows) == ["calf", "odd", "whales/minke"]
    minke, odd = rows["whales/minke"], rows["odd"]
    assert (minke["architecture"], minke["error"]) == ("DeepseekV3ForCausalLM", None)
    config = len((home / "models" / "whales" / "minke" / "config.json").read_bytes())
    assert minke["bytes"] == 1000 + config and minke["folder"] == str(home / "models" / "whales" / "minke")
    shown = json.loads(finback("show", "whales/minke", "--json").stdout)
    assert minke["parameters_total"] == shown["parameters_total"]
    assert odd["architecture"] is odd["parameters_total"] is None
    assert "model_type" in odd["error"]
    lines = finback("ls").stdout.splitlines()
    assert lines[0].split("\t") == ["name", "architecture", "parameters", "size", "where"]
    assert lines[2].startswith("odd\t") and "model_type" in lines[2]


@pytest.mark.parametrize("text", ["{", '{"architectures": 5}', '{"architectures": [], "quantization_config": [1]}', ""])
def test_ls_survives_any_config(home, text):
    (home / "models" / "odd" / "config.json").write_text(text)
    rows = {row["name"]: row for row in json.loads(finback("ls", "--json").stdout)}
    assert rows["odd"]["error"] and rows["whales/minke"]["error"] is None


def test_doctor_names_nested_models(home):
    assert json.loads(finback("doctor", "--json").stdout)["models"] == ["calf", "odd", "whales/minke"]


def test_rm_deletes_the_model_and_its_empty_folder(home):
    assert finback("rm", "whales/minke", "--yes").exit_code == 0
    assert {path.name for path in (home / "models").iterdir()} == {"odd"}
    assert finback("rm", "odd", "--yes").exit_code == 0
    assert list((home / "models").iterdir()) == []


def test_rm_asks_first(home, monkeypatch):
    result = finback("rm", "odd")
    assert result.exit_code == 2 and "--yes" in result.stderr

    monkeypatch.setattr("finback.cli_models.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    for answer, code in (("n\n", 1), ("y\n", 0)):
        assert (home / "models" / "odd").exists()
        result = finback("rm", "odd", stdin=answer)
        assert result.exit_code == code and str(home / "models" / "odd") in result.stderr
    assert not (home / "models" / "odd").exists()


@pytest.mark.parametrize("name", ["calf", "nowhere", "..", ".", "whales", "../outside", "whales/../odd", "", ".pull"])
def test_rm_deletes_models_of_the_home_alone(home, name):
    before = sorted(home.rglob("*"))
    for given in (name, home / "models" / name):
        result = finback("rm", given, "--yes")
        assert result.exit_code == 2 and "not a model under" in result.stderr
    assert sorted(home.rglob("*")) == before


def test_rm_does_not_follow_links(home, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    shutil.copytree(home / "models" / "odd", outside / "minke")
    (home / "models" / "linked").symlink_to(outside / "minke")
    (home / "models" / "org").symlink_to(outside)
    for name in ("linked", "org/minke"):
        result = finback("rm", name, "--yes")
        assert result.exit_code == 2 and "link" in result.stderr
    assert len(list((outside / "minke").iterdir())) == 2


def test_rm_erases_the_prefix_cache_and_no_model(home):
    from finback.engine.disk_cache import DiskCache

    cache = DiskCache(home / "prefix", "calf", 3 << 20, 1 << 30)
    cache.put(bytes(32), torch.zeros(3 << 20, dtype=torch.uint8))
    cache.close()
    (home / "prefix" / "mine").write_text("mine")
    for wrong in (("rm",), ("rm", "odd", "--prefix-cache", "--yes")):
        result = finback(*wrong)
        assert result.exit_code == 2 and "name a model or --prefix-cache" in result.stderr
    refused = finback("rm", "--prefix-cache")
    assert refused.exit_code == 2 and "--yes deletes" in refused.stderr and bytes(32) in cache
    result = finback("rm", "--prefix-cache", "--yes")
    assert result.exit_code == 0 and "3.0 MiB" in result.stderr
    assert [path.name for path in (home / "prefix").iterdir()] == ["mine"]
    assert (home / "models" / "odd").is_dir() and finback("rm", "--prefix-cache", "--yes").exit_code == 0


@pytest.mark.parametrize("command", ["pull", "ls", "show", "rm"])
def test_every_command_has_an_example(command):
    result = finback(command, "--help")
    assert result.exit_code == 0 and f"Example: finback {command}" in result.stdout
