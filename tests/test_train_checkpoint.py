"""Checkpoints appear whole or not at all, and a full disk costs nothing but the newest one."""

import errno

import pytest
import torch
from safetensors import SafetensorError
from tiny_model import tiny, tiny_model

from finback.errors import UserError
from finback.train import checkpoint, memory


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("_flush", OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
)
def test_a_full_disk_is_one_clear_error_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch, target, error):
    model = tiny_model(tiny())
    checkpoint.save(tmp_path, 1, model, {}, {"a": 1})

    def fails(*_arguments):
        raise error

    monkeypatch.setattr(checkpoint, target, fails)
    with pytest.raises(UserError) as caught:
        checkpoint.save(tmp_path, 2, model, {}, {"a": 2})
    message = str(caught.value)
    assert "\n" not in message and "step-2" in message and "--resume" in message
    assert "space" in message or "quota" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.state == {"a": 1}


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_gives_back_model_optimizer_state_and_generator(tmp_path, tied):
    model = tiny_model(tiny(num_nextn_predict_layers=1, tie_word_embeddings=tied))
    optimizer = {"a/exp_avg": torch.randn(3), "a/step": torch.tensor(7.0)}
    torch.manual_seed(5)
    checkpoint.save(tmp_path, 3, model, optimizer, {"tokens": 12})
    expected = torch.rand(4)
    other = tiny_model(tiny(num_nextn_predict_layers=1, tie_word_embeddings=tied), seed=9)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 3 and found.state == {"tokens": 12}
    found.restore_model(other)
    assert torch.equal(torch.rand(4), expected)
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    restored = found.optimizer_tensors()
    assert restored.keys() == optimizer.keys()
    assert all(torch.equal(restored[name], value) for name, value in optimizer.items())


def test_the_latest_is_by_number_and_only_of_complete_folders(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    model = tiny_model(tiny())
    for step in (9, 10):
        checkpoint.save(tmp_path, step, model, {}, {})
    (tmp_path / "step-11").mkdir()
    (tmp_path / ".step-12.abc.tmp").mkdir()
    (tmp_path / "step-x").mkdir()
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 10


def test_pruning_keeps_the_last_two_and_the_ends_of_stages(tmp_path):
    model = tiny_model(tiny())
    for step in (2, 4, 5, 7, 9):
        checkpoint.save(tmp_path, step, model, {}, {})
    checkpoint.prune(tmp_path, [5, 9])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-5", "step-7", "step-9"]


def test_sweeping_removes_what_a_killed_process_left_and_nothing_else(tmp_path):
    (tmp_path / ".step-4.x.tmp").mkdir()
    (tmp_path / ".step-4.x.tmp" / "model.safetensors").write_text("half")
    (tmp_path / ".log.jsonl.y.tmp").write_text("half")
    (tmp_path / "step-2").mkdir()
    (tmp_path / "notes.tmp").write_text("mine")
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.tmp", "step-2"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    model = tiny_model(tiny())
    folder = checkpoint.save(tmp_path, 1, model, {}, {})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    found = checkpoint.latest(tmp_path)
    assert found is not None
    with pytest.raises(UserError, match="damaged"):
        found.restore_model(model)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, tiny_model(tiny()), {}, {})
    found = checkpoint.latest(tmp_path)
    assert found is not None
    with pytest.raises(UserError, match="other tensors"):
        found.restore_model(tiny_model(tiny(num_nextn_predict_layers=1)))


def test_memory_is_kept_on_linux_and_nothing_breaks_elsewhere(monkeypatch):
    assert memory.keep_freed_memory() in (True, False)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False
