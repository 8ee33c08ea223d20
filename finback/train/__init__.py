"""Training: a recipe in, a model folder out."""

from collections.abc import Sequence
from pathlib import Path

from finback.errors import UserError

__all__ = ["train"]


def train(
    recipe_path: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None, resume: bool = False
) -> Path:
    """Run the recipe and return the folder of the finished model, `out`/model (`out` defaults to runs/RECIPE).

    `overrides` are "dotted.path=value" lines such as "stage.0.steps=10". `resume` continues from the latest checkpoint,
    bit for bit as if the run had not stopped (CPU). Raises UserError for a mistake in the recipe, a folder in use, a
    full disk, a loss that is not finite; SystemExit(130) after Ctrl-C, with a checkpoint written.
    """
    from finback.train import memory, recipe
    from finback.train.loop import Trainer

    checked = recipe.load(recipe_path, overrides)
    folder = Path(out) if out is not None else Path("runs") / Path(recipe_path).stem
    memory.keep_freed_memory()
    try:
        return Trainer(checked, folder, resume).run()
    except OSError as error:
        raise UserError(
            f"{folder}: the run cannot be written or read ({error}); checkpoints are intact: mend it, then use --resume"
        ) from error
