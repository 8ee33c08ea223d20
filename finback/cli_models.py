"""The commands about models on disk; `finback.cli` holds the others."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from finback import terminal
from finback.errors import UserError
from finback.paths import home, installed, prefix_folder, remove_folder

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def pull(
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A repository of the hub.")],
    revision: Annotated[str, typer.Option(help="A branch, a tag or a commit.")] = "main",
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="The hub. [default: $HF_ENDPOINT, or https://huggingface.co]")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Files to take; may be repeated. [default: those at the top]"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=32, help="Files at once.")] = 4,
    json: Json = False,
) -> None:
    """Download a model, verified; the one command that goes online. Run again, it resumes.

    Weights without code, and texts: pickles and programs are never taken. $HF_TOKEN is for gated models.

    Example: finback pull deepseek-ai/DeepSeek-V2-Lite-Chat
    """
    from finback.weights.hub import manifest_of
    from finback.weights.hub import pull as fetch

    folder = fetch(repo, revision, endpoint=endpoint, files=file or [], jobs=jobs)
    if not json:
        print(folder)
        return
    manifest = manifest_of(folder)
    size = sum(entry.size for entry in manifest.files.values())
    terminal.print_json(
        {"path": str(folder), "commit": manifest.commit, "files": sorted(manifest.files), "bytes": size}
    )


def ls(json: Json = False) -> None:
    """The models on this machine.

    Example: finback ls
    """
    rows = [_row(name, folder) for name, folder in installed()]
    if json:
        terminal.print_json(rows)
        return
    terminal.table(
        ("name", "architecture", "parameters", "size", "where"),
        [
            (
                row["name"],
                row["error"] or row["architecture"],
                terminal.plain(row["parameters_total"]),
                terminal.size(row["bytes"]),
                row["folder"],
            )
            for row in rows
        ],
    )


def show(
    model: Annotated[str, typer.Argument(help="A model's name, its folder, or a GGUF file.")], json: Json = False
) -> None:
    """What a model is: architecture, parameters, cache, vocabulary, context. Its weights are not read.

    Example: finback show calf
    """
    from finback.about import describe

    facts = describe(model)
    if json:
        terminal.print_json(facts)
    else:
        sizes = {key for key in facts if key.startswith("memory") or key == "weights_bytes"}
        shown = {key: terminal.size(value) if key in sizes else terminal.plain(value) for key, value in facts.items()}
        terminal.table(("what", "value"), [(key.replace("_", " "), value) for key, value in shown.items()])


def rm(
    name: Annotated[str | None, typer.Argument(help="A model of `finback ls`, one that was pulled or trained.")] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option("--prefix-cache", help="What the prefix cache keeps on disk of conversations, of all models."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a model from $FINBACK_HOME/models, or the prefix cache in $FINBACK_HOME/prefix.

    Example: finback rm deepseek-ai/DeepSeek-V2-Lite-Chat --yes
    """
    if prefix_cache == (name is not None):
        raise UserError("finback rm: name a model or --prefix-cache, one of them")
    if name is None:
        from finback.engine.disk_cache import erase

        _ask("the prefix cache", prefix_folder(), yes)
        terminal.note(f"The prefix cache is erased ({terminal.size(erase(prefix_folder()))}).")
        return
    root = home() / "models"
    own = {known: folder for known, folder in installed() if folder.is_relative_to(root)}
    if name not in own:
        raise UserError(f"{name!r}: not a model under {root}; there are: {', '.join(own) or 'none'}")
    folder = own[name]
    if folder.resolve() != root.resolve() / name:
        raise UserError(f"{folder}: a link to {folder.resolve()}; remove the link, or what it leads to, yourself")
    _ask(name, folder, yes)
    remove_folder(folder)
    if folder.parent != root and not any(folder.parent.iterdir()):
        folder.parent.rmdir()
    terminal.note(f"{name} is deleted.")


def verify(
    model: Annotated[str, typer.Argument(help="A model's name, its folder, or a GGUF file.")], json: Json = False
) -> None:
    """Read all of a model: files as they were pulled, headers, names and shapes of tensors, every number.

    Each problem is a line on stdout; with one the exit code is 2.

    Example: finback verify calf
    """
    from finback.weights.convert import verify as examine

    found = examine(model)
    if json:
        terminal.print_json(found)
    else:
        for problem in found["problems"]:
            print(problem)
        if not found["problems"]:
            words = "and its tokenizer" if found["tokenizer"] else "without a tokenizer"
            print(f"{model} is whole: {found['tensors']:,} tensors {words}")
    if found["problems"]:
        raise typer.Exit(2)


def convert(
    model: Annotated[str, typer.Argument(help="A model's name, its folder, or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="A folder, or a file that ends in .gguf.")],
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[
        str | None, typer.Option(help="fp8 for a folder; bf16 (the default), q8_0 or f32 for GGUF.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Load even what memory seems too small for.")] = False,
) -> None:
    """Write a model in another form: its family's own layout, FP8 blocks, or GGUF. Pickles are read here alone.

    Example: finback convert calf calf.gguf
    """
    from finback.weights.convert import convert as run

    for remark in run(model, out, dtype, quantize, force):
        terminal.note(remark)
    print(out)


COMMANDS: tuple[Callable[..., None], ...] = (pull, ls, show, verify, convert, rm)


def _row(name: str, folder: Path) -> dict[str, Any]:
    """What `ls` tells of a model; where its config cannot be read, why."""
    from finback.about import describe

    row = {"name": name, "architecture": None, "parameters_total": None, "bytes": _bytes(folder), "folder": str(folder)}
    try:
        facts = describe(str(folder))
    except Exception as error:  # a config is what anyone wrote; one that is odd must not hide the other models
        return row | {"error": str(error) or type(error).__name__}
    return row | {key: facts[key] for key in ("architecture", "parameters_total")} | {"error": None}


def _ask(what: str, folder: Path, yes: bool) -> None:
    """Go on only if the user agrees that a folder be deleted."""
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"{what}: nobody can be asked here; --yes deletes {folder}")
        typer.confirm(f"Delete {folder} ({terminal.size(_bytes(folder))})?", abort=True, err=True)


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
