"""Whole runs: what is written, what resuming gives, and what happens when something goes wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_recipe
import torch
from safetensors.torch import load_file

import finback
from finback.errors import UserError
from finback.train import checkpoint, run, train
from finback.train.loop import Trainer

ROOT = Path(__file__).parent.parent
TIMES = ("seconds", "tokens_per_s")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums depend on the number of threads, and threads that wait for each other are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread) -> Path:
    """A run without interruption: 5 steps of pre-training, 4 of fine-tuning."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_recipe.write(folder), out=folder / "run")
    return folder / "run"


def log(folder: Path) -> list[dict]:
    """The log without what a clock says."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_runs(got: Path, expected: Path) -> None:
    assert log(got) == log(expected)
    ours, theirs = weights(got / "model"), weights(expected / "model")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


class Stop(Exception):
    """What ends a run from outside."""


def stop_after(monkeypatch, step: int) -> None:
    """The process disappears after `step`, before it can write anything more."""
    real = Trainer._step

    def checked(self, *arguments):
        if self.totals.step == step:
            raise Stop
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", checked)


def test_a_run_leaves_a_log_checkpoints_and_a_model(whole):
    records = log(whole)
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["stage"] for record in records] == ["read"] * 5 + ["reply"] * 4
    for record in records:
        assert {"loss", "mtp", "balance", "grad_norm", "lr", "tokens", "load"} <= record.keys()
    assert [record["tokens"] for record in records[:5]] == [4 * 48 * n for n in range(1, 6)]
    assert records[0]["lr"] == pytest.approx(1e-3) and records[4]["lr"] == pytest.approx(2e-4)
    assert [record["lr"] for record in records[5:]] == pytest.approx([7.75e-4, 5.5e-4, 3.25e-4, 1e-4])


def test_the_last_two_checkpoints_and_the_ends_of_stages_are_kept(whole):
    assert steps(whole) == [5, 8, 9]


def test_the_finished_model_loads_with_its_tokenizer_and_card(whole):
    model = finback.load(whole / "model")
    master = weights(whole / "checkpoints" / "step-9")
    assert torch.equal(model.decoder.embed_tokens.weight, master["decoder.embed_tokens.weight"])
    assert any(router.e_score_correction_bias.any() for _, router in model.routers())
    generation = json.loads((whole / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1
    card = (whole / "model" / "MODEL_CARD.md").read_text()
    assert "seed: 3" in card and "steps: 9" in card and "sha256" in card


def test_a_model_saved_as_bfloat16_routes_alike_in_every_reader(tmp_path):
    """The router's file form is bf16, as in DeepSeek's files: a reader that casts it there changes nothing."""
    path = tiny_recipe.write(tmp_path, 'save_dtype = "float32"', 'save_dtype = "bfloat16"')
    folder = train(path, ["stage.0.steps=3", "stage.1.steps=1", "stage.0.log_every=3"], out=tmp_path / "run")
    model = finback.load(folder)
    assert model.decoder.embed_tokens.weight.dtype == torch.bfloat16
    for _, router in model.routers():
        assert router.weight.dtype == torch.float32
        assert torch.equal(router.weight, router.weight.bfloat16().float())
        assert router.e_score_correction_bias.dtype == torch.float32
    assert [record["step"] for record in log(tmp_path / "run")] == [3, 4]


@pytest.mark.parametrize("step", [1, 3, 5, 7, 8])
def test_steps_then_resume_equal_the_uninterrupted_run(whole, tmp_path, monkeypatch, step):
    """Bit for bit: weights and log; the steps after the last checkpoint are done again."""
    path = tiny_recipe.write(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, step)
        train(path, out=tmp_path / "run")
    torch.manual_seed(99)
    train(path, out=tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", whole)
    assert steps(tmp_path / "run") == steps(whole)


def test_bfloat16_resumes_exactly_too(tmp_path, monkeypatch):
    path, changes = tiny_recipe.write(tmp_path), ["stage.0.dtype=bfloat16", "stage.1.steps=1"]
    train(path, changes, out=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 3)
        train(path, changes, out=tmp_path / "run")
    train(path, changes, out=tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_under_the_log_is_one_clear_error(whole, tmp_path, monkeypatch):
    path, real = tiny_recipe.write(tmp_path), run.write_log

    def fails(file, record):
        if record["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, record)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device") as caught:
        patch.setattr(run, "write_log", fails)
        train(path, out=tmp_path / "run")
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)
    train(path, out=tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", whole)


def test_half_a_last_line_of_the_log_is_dropped(tmp_path):
    """What a killed process leaves; the lines of steps after the checkpoint go too."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    run.trim_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("damage", [b'{"st', b"\xff\xfe", b"[1]", b'{"loss": 1.0}', b'{"step": "2"}'])
def test_a_damaged_line_within_the_log_is_one_clear_error(damage: bytes, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(before := b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:2: .*mend or remove it"):
        run.trim_log(path, 2)
    assert path.read_bytes() == before


def test_resuming_a_finished_run_writes_the_model_again(whole, tmp_path):
    path = tiny_recipe.write(tmp_path)
    train(path, out=tmp_path / "run")
    expected = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    train(path, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == expected
    assert_equal_runs(tmp_path / "run", whole)


def test_a_finished_run_takes_further_stages(whole, tmp_path):
    """The stages one by one equal the whole recipe at once."""
    path = tiny_recipe.write(tmp_path)
    path.write_text(tiny_recipe.TOML[: tiny_recipe.TOML.rindex("[[stage]]")])
    train(path, out=tmp_path / "run")
    train(tiny_recipe.write(tmp_path), out=tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", whole)


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(whole, tmp_path, monkeypatch, capsys):
    path = tiny_recipe.write(tmp_path)
    real = Trainer._step

    def interrupted(self, *arguments):
        if self.totals.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(Trainer, "_step", interrupted)
        train(path, out=tmp_path / "run")
    assert caught.value.code == 130
    assert steps(tmp_path / "run")[-1] == 3
    message = capsys.readouterr().err
    assert "step-3" in message and "--resume" in message
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(path, out=tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", whole)


def test_ctrl_c_twice_stops_at_once(tmp_path, monkeypatch):
    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe.write(tmp_path), out=tmp_path / "run")


def test_a_changed_recipe_is_named_on_resume_and_nothing_is_lost(whole, tmp_path, monkeypatch):
    path = tiny_recipe.write(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 4)
        train(path, out=tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(path, ["stage.0.steps=50", "stage.1.optimizer.lr=2e-3"], out=tmp_path / "run", resume=True)
    message = str(caught.value)
    assert "stage.0.steps (was 5, is 50)" in message and "stage.1.optimizer.lr (was 0.001, is 0.002)" in message
    # What changes no weight may change.
    train(path, ["stage.0.checkpoint_every=100", "stage.1.eval_n=3"], out=tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", whole)


def test_a_run_is_not_overwritten_and_not_invented(whole, tmp_path):
    path = tiny_recipe.write(tmp_path)
    before = log(whole)
    with pytest.raises(UserError, match="--resume"):
        train(path, out=whole)
    assert log(whole) == before
    with pytest.raises(UserError, match="no run at"):
        train(path, out=tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("weight", "weight decoder.layers.1.mlp.experts.down.value"),
        ("output", "output of decoder.layers.0.self_attn.kv_a_layernorm"),
        ("gradient", "gradient of decoder.layers.0.self_attn.o_proj.weight.value"),
    ],
)
def test_what_is_not_finite_is_named_and_no_weight_changes(tmp_path, monkeypatch, where, named):
    real = Trainer._step
    seen = {}

    def poisoned(self, stage, optimizers, batch, local):
        if self.totals.step == 2:
            parameters = dict(self.model.named_parameters())
            if where == "weight":
                parameters[named.removeprefix("weight ")].data[1, 0, 0] = float("inf")
            elif where == "output":
                module = self.model.get_submodule(named.removeprefix("output of "))
                module.register_forward_hook(lambda m, i, output: output / 0)
            else:
                parameter = parameters[named.removeprefix("gradient of ")]
                parameter.register_hook(lambda gradient: gradient * float("nan"))
            seen["trainer"], seen["batch"] = self, batch
            seen["before"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return real(self, stage, optimizers, batch, local)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    with pytest.raises(UserError) as caught:
        train(tiny_recipe.write(tmp_path), out=tmp_path / "run")
    message = str(caught.value)
    first, last = seen["batch"].examples()[0], seen["batch"].examples()[-1]
    assert "\n" not in message and "stage read, step 3" in message
    assert named in message and f"examples {first}..{last}" in message
    for name, value in seen["trainer"].model.state_dict().items():
        torch.testing.assert_close(value, seen["before"][name], rtol=0, atol=0)
    assert steps(tmp_path / "run") == [2]


def test_an_evaluation_on_the_way_is_logged_and_changes_nothing(whole, tmp_path):
    train(tiny_recipe.write(tmp_path), ["stage.1.eval_every=4", "stage.1.eval_n=1"], out=tmp_path / "run")
    records = log(tmp_path / "run")
    [found] = [record for record in records if "eval" in record]
    assert found["step"] == 8 and found["stage"] == "reply"
    assert found["eval"].keys() == {"sorting"} and 0 <= found["eval"]["sorting"] <= 1
    records.remove(found)
    assert records == log(whole)


def test_bfloat16_trains_with_float32_weights(tmp_path):
    overrides = ["stage.0.dtype=bfloat16", "stage.1.dtype=bfloat16", "stage.1.steps=1"]
    train(tiny_recipe.write(tmp_path), overrides, out=tmp_path / "run")
    records = log(tmp_path / "run")
    assert all(0 < record["loss"] < 10 for record in records)
    master = weights(tmp_path / "run" / "checkpoints" / "step-6")
    assert all(value.dtype == torch.float32 for value in master.values())
    assert any((value.bfloat16().float() != value).any() for value in master.values())


def test_learning_happens(tmp_path):
    """Twenty steps on one easy family bring the loss well below that of guessing."""
    changes = ["stage.0.steps=25", "stage.0.tasks={sorting=1.0}", "stage.0.optimizer.lr=1e-2", "stage.1.steps=1"]
    train(tiny_recipe.write(tmp_path), changes, out=tmp_path / "run")
    losses = [record["loss"] for record in log(tmp_path / "run") if record["stage"] == "read"]
    assert losses[0] > 5 and losses[-1] < losses[0] - 1.5


def child(tmp_path: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, after `code`."""
    script = (
        "import os, signal, sys, resource\n"
        "from pathlib import Path\n"
        "from finback.errors import UserError\n"
        "from finback.train import checkpoint, train\n"
        f"{code}\n"
        "try:\n"
        "    train(sys.argv[1], out=sys.argv[2])\n"
        "except UserError as error:\n"
        "    sys.exit(f'error: {error}')\n"
    )
    command = [sys.executable, "-c", script, str(tiny_recipe.write(tmp_path)), str(tmp_path / "run"), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def test_a_process_killed_while_it_writes_a_checkpoint_loses_nothing(whole, tmp_path):
    code = (
        "real = checkpoint._flush\n"
        "def flush(file):\n"
        "    if 'step-4' in str(file): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(file)\n"
        "checkpoint._flush = flush"
    )
    done = child(tmp_path, code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    root = tmp_path / "run" / "checkpoints"
    leftovers = [path for path in root.iterdir() if path.name.startswith(".")]
    assert len(leftovers) == 1
    found = checkpoint.latest(root)
    assert found is not None and found.step == 2
    train(tiny_recipe.write(tmp_path), out=tmp_path / "run", resume=True)
    assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert_equal_runs(tmp_path / "run", whole)


def test_a_file_that_does_not_fit_is_one_clear_error_and_resuming_goes_on(whole, tmp_path):
    code = (
        "real = checkpoint.save\n"
        "def save(root, step, *rest):\n"
        "    if step == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "    return real(root, step, *rest)\n"
        "checkpoint.save = save"
    )
    done = child(tmp_path, code)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and "step-4" in error and "--resume" in error, done.stderr
    assert "Traceback" not in done.stderr
    assert steps(tmp_path / "run") == [2]
    train(tiny_recipe.write(tmp_path), out=tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", whole)
