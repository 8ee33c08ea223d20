"""A run's folder: the model and tokenizer a recipe starts from, the log, and the model folder at the end.

runs/NAME/log.jsonl          one line every `log_every` steps, one every evaluation
runs/NAME/tokenizer/         the tokenizer
runs/NAME/checkpoints/       see checkpoint.py
runs/NAME/model/             the finished model
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from finback import __version__, weights
from finback.errors import UserError
from finback.model import Model
from finback.paths import atomic_file
from finback.text import Tokenizer
from finback.train import checkpoint
from finback.train.checkpoint import Checkpoint
from finback.train.data import Conversations, text_of
from finback.train.recipe import Recipe, changed_keys

# Keys that change what is reported and kept, never the weights.
_FREE = ("greedy", "checkpoint_every", "log_every", "eval_every", "eval_n")


def open_folder(folder: Path, recipe: Recipe, resume: bool) -> Checkpoint | None:
    """Prepare the folder; returns where to go on, None for a fresh start.

    Raises UserError when a fresh run would overwrite one, when there is none to resume, and when the recipe changed.
    """
    checkpoints = folder / "checkpoints"
    if not resume and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {folder}: holds a run already; continue it with --resume or choose another folder")
    if resume and not folder.is_dir():
        raise UserError(f"--resume: there is no run at {folder}; leave --resume out or correct --out")
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, checkpoints):
        checkpoint.sweep(place)
    found = checkpoint.latest(checkpoints) if resume else None
    if found is not None:
        _check_unchanged(found, recipe)
    trim_log(folder / "log.jsonl", found.step if found else 0)
    return found


def make_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """The recipe's tokenizer; kept in the run's folder, from where a resumed run takes it."""
    place = folder / "tokenizer"
    if (place / "tokenizer_config.json").is_file():  # written last
        return Tokenizer.load(place)
    source = recipe.model_source or recipe.tokenizer.source
    if source is not None:
        tokenizer = weights.load_tokenizer(source)
    else:
        stage = recipe.stages[0].model_copy(update={"name": "tokenizer"})
        conversations = Conversations(stage, recipe.seed)
        texts = (text_of(conversations[i][0]) for i in range(recipe.tokenizer.texts))
        tokenizer = Tokenizer.train(texts, recipe.tokenizer.vocab_size)
    tokenizer.save(place)
    return tokenizer


def make_model(recipe: Recipe, tokenizer: Tokenizer) -> Model:
    """The model before the first step, float32, in training mode."""
    loaded = weights.load(recipe.model_source, dtype="float32") if recipe.model_source is not None else None
    try:
        config = loaded.config if loaded else recipe.config(tokenizer.vocab_size)
        for stage in recipe.stages:
            stage.check_model(config)
    except ValueError as error:
        raise UserError(f"recipe: {error}") from None
    if loaded is not None:
        return loaded.train()
    model = Model(config)
    model.init_weights(recipe.seed)
    return model.train()


def save_model(recipe: Recipe, model: Model, tokenizer: Tokenizer, folder: Path, numbers: dict[str, Any]) -> Path:
    """Write the finished model and its card to `folder`/model."""
    for parameter in model.parameters():  # and not the correction bias, a buffer, which stays in float32
        parameter.data = parameter.data.to(getattr(torch, recipe.save_dtype))
    target = folder / "model"
    weights.save(model, tokenizer, target, greedy=recipe.greedy)
    with atomic_file(target / "MODEL_CARD.md") as path:
        path.write_text(_card(recipe, model, folder.name, numbers), encoding="utf-8")
    return target


def write_log(path: Path, record: dict[str, Any]) -> None:
    """Add one line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def trim_log(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: the resumed run writes them again. A line that is damaged is an error."""
    if not path.is_file():
        return
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            if number < len(lines):  # the last line may be half of one, of a killed process
                raise UserError(f"{path}:{number}: not a line of this log; mend or remove it, then --resume") from None
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _check_unchanged(found: Checkpoint, recipe: Recipe) -> None:
    """A run goes on by the recipe it began with; further stages at its end are welcome."""
    old, new = found.state["recipe"], recipe.canonical()
    new["stage"] = new["stage"][: len(old["stage"])]
    changed = [change for change in changed_keys(old, new) if change.split(" ")[0].rpartition(".")[2] not in _FREE]
    if changed:
        raise UserError(
            f"--resume: the recipe changed since {found.folder}: {'; '.join(changed)}; give the recipe and --set "
            "values of the first start, or begin a new run with another --out"
        )


def _card(recipe: Recipe, model: Model, name: str, numbers: dict[str, Any]) -> str:
    canonical = json.dumps(recipe.canonical(), sort_keys=True)
    lines = [
        f"# {name}",
        "",
        f"Trained by Finback {__version__} on text that Finback generates (`finback tasks list`).",
        "",
        f"- parameters: {sum(p.numel() for p in model.parameters()):,}, saved as {recipe.save_dtype}",
        f"- steps: {numbers['step']:,}; tokens read: {numbers['tokens']:,}; seconds: {numbers['seconds']:,.0f}",
        f"- seed: {recipe.seed}",
        f"- recipe: sha256 {hashlib.sha256(canonical.encode()).hexdigest()}",
        f"- made with: torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        "",
        "```json",
        recipe.model_dump_json(by_alias=True, exclude_unset=True, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)
