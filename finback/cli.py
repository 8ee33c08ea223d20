"""The command line: one function a command. Nothing heavy is imported before a command runs."""

import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from finback import __version__, cli_bench, cli_models, terminal
from finback.cli_models import Json
from finback.cli_options import (
    CacheFormat,
    Dtype,
    ExpertMemory,
    Force,
    MaxTokens,
    Model,
    PrefixCache,
    Quantize,
    Seed,
    Speculate,
    Temperature,
    Think,
    ThinkingTokens,
    expert_bytes,
)
from finback.errors import UserError
from finback.paths import DEFAULT_MODEL, prefix_folder

if TYPE_CHECKING:
    from finback.engine import Engine, Sampling
    from finback.text import Message


class _Commands(TyperGroup):
    """What a user caused is one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, OSError, UnicodeError) as error:  # what the system refuses, the user can mend as well
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error


def _version(wanted: bool) -> None:
    if wanted:
        print(f"finback {__version__}")
        raise typer.Exit


_CONTEXT = 4096  # tokens that a conversation is given room for in memory
_SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    context_settings=_SETTINGS,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
tasks_app = typer.Typer(no_args_is_help=True, context_settings=_SETTINGS, rich_markup_mode=None)
app.add_typer(tasks_app, name="tasks", help="The verifiable problems that models are trained and measured on.")

Difficulty = Annotated[int | None, typer.Option(help="1 is easiest. [default: the task's own]")]


@app.callback()
def _finback(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, run and serve your own DeepSeek.

    Example: finback ask "Which is larger, 9.9 or 9.11?"
    """


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    model: Model = DEFAULT_MODEL,
    think: Think = True,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    quantize: Quantize = None,
    force: Force = False,
    expert_memory: ExpertMemory = None,
    thinking_tokens: ThinkingTokens = None,
    speculate: Speculate = "off",
    cache_format: CacheFormat = None,
    prefix_cache: PrefixCache = False,
    json: Json = False,
) -> None:
    """Ask one question. The answer goes to stdout, the thinking to stderr.

    Example: finback ask "How many r's are in strawberry?"
    """
    text = sys.stdin.read().strip() if question == "-" else question
    if not text.strip():
        raise UserError("the question is empty; give it as text, or as - and send it to standard input")
    options = {"dtype": dtype, "quantize": quantize, "force": force, "expert_memory": expert_memory}
    asked = {"temperature": temperature, "thinking_tokens": thinking_tokens}
    generation = {"speculate": speculate, "cache_format": cache_format}
    engine, sampling = _open(model, max_tokens, seed, asked, options, generation, prefix_cache)
    messages: list[Message] = [{"role": "user", "content": text}]
    stream = engine.stream(messages, sampling, think=think)
    if not json:
        if terminal.speak(stream).finish_reason == "length":
            terminal.note("(cut off: --max-tokens or the model's context is reached)")
        engine.close()
        terminal.note_experts(engine.model.expert_cache)
        return
    *_, last = stream
    engine.close()
    done = last.completion
    assert done is not None, "the last piece of a stream carries its completion"
    result: dict[str, Any] = {
        "answer": done.text,
        "reasoning": done.reasoning,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": len(done.token_ids),
        "reasoning_tokens": done.reasoning_tokens,
        "cached_tokens": done.cached_tokens,
    }
    if done.drafted:
        result |= {"drafted": done.drafted, "accepted": done.accepted}
    if engine.model.expert_cache is not None:
        result["experts"] = engine.model.expert_cache.stats()
    terminal.print_json(result)


@app.command()
def chat(
    model: Model = DEFAULT_MODEL,
    think: Think = True,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    quantize: Quantize = None,
    force: Force = False,
    expert_memory: ExpertMemory = None,
    thinking_tokens: ThinkingTokens = None,
    speculate: Speculate = "off",
    cache_format: CacheFormat = None,
    prefix_cache: PrefixCache = False,
) -> None:
    """Talk with a model. Standard input may be a pipe: each line is one turn.

    Example: finback chat --no-think
    """
    options = {"dtype": dtype, "quantize": quantize, "force": force, "expert_memory": expert_memory}
    asked = {"temperature": temperature, "thinking_tokens": thinking_tokens}
    generation = {"speculate": speculate, "cache_format": cache_format}
    engine, sampling = _open(model, max_tokens, seed, asked, options, generation, prefix_cache)
    if sys.stdin.isatty():
        terminal.note(f"{model}, offline. /help lists the commands; Ctrl-D leaves.")
    terminal.converse(
        lambda messages, thinking: engine.stream(messages, sampling, think=thinking),
        terminal.typed_lines(),
        think,
        engine.context,
    )
    engine.close()
    terminal.note_experts(engine.model.expert_cache)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, TOML.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/NAME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
) -> None:
    """Train a model by a recipe. Ctrl-C leaves a checkpoint.

    Example: finback train recipes/calf.toml --set seed=1 --out runs/calf-1
    """
    from finback.train import train as run

    print(run(recipe, overrides or [], out, resume))


@tasks_app.command("list")
def tasks_list(json: Json = False) -> None:
    """The tasks, each with an example.

    Example: finback tasks list --json
    """
    from finback.tasks import TASKS, sample

    entries = [
        {"name": name, "description": task.description, "example": next(sample(name, 0, 1)).question}
        for name, task in TASKS.items()
    ]
    if json:
        terminal.print_json(entries)
    else:
        terminal.table(("task", "description", "example"), [tuple(entry.values()) for entry in entries])


@tasks_app.command("sample")
def tasks_sample(
    name: Annotated[str, typer.Argument(help="A task; `finback tasks list` names them.")],
    seed: Seed = 0,
    n: Annotated[int, typer.Option(min=1, help="How many problems.")] = 3,
    difficulty: Difficulty = None,
    split: Annotated[Literal["train", "held_out"], typer.Option(help="Which half of the problems.")] = "held_out",
    json: Json = False,
) -> None:
    """Problems of a task, with a worked solution and the answer.

    Example: finback tasks sample countdown --seed 7 --n 2
    """
    from dataclasses import asdict

    from finback.tasks import sample

    problems = list(sample(name, seed, n, split=split, difficulty=difficulty))
    if json:
        terminal.print_json([asdict(problem) for problem in problems])
        return
    for problem in problems:
        print(f"Question: {problem.question}\n\n{problem.reasoning}\n\nAnswer: {problem.answer}\n")


@app.command("eval")
def evaluate(
    model: Model = DEFAULT_MODEL,
    task: Annotated[list[str] | None, typer.Option(help="A task; may be repeated. [default: all]")] = None,
    n: Annotated[int, typer.Option(min=1, help="Problems of each task.")] = 500,
    seed: Seed = 0,
    difficulty: Difficulty = None,
    think: Think = True,
    max_tokens: MaxTokens = None,
    batch: Annotated[int, typer.Option(min=1, help="Problems at once.")] = 64,
    dtype: Dtype = None,
    quantize: Quantize = None,
    force: Force = False,
    expert_memory: ExpertMemory = None,
    out: Annotated[Path | None, typer.Option(help="Write every problem and reply there, JSON lines.")] = None,
    json: Json = False,
) -> None:
    """Greedy pass@1 on held-out problems, with Wilson 95 % intervals.

    Example: finback eval --task countdown --task equations --n 100
    """
    from finback.about import default_dtype
    from finback.evaluate import evaluate as measure

    options: dict[str, Any] = {"difficulty": difficulty, "think": think, "max_tokens": max_tokens, "batch": batch}
    options |= {"dtype": dtype or default_dtype(model), "quantize": quantize, "force": force}
    options["expert_memory"] = expert_bytes(expert_memory)
    result = measure(model, task, n, seed, records=out, **options)
    if json:
        terminal.print_json(result)
        return
    columns = ("task", "n", "pass@1", "low", "high")
    scores = result["tasks"].items()
    terminal.table(columns, [(name, s["n"], *(f"{s[key]:.3f}" for key in columns[2:])) for name, s in scores])


for command in cli_models.COMMANDS:
    app.command()(command)
app.add_typer(cli_bench.app, name="bench")


@app.command()
def doctor(json: Json = False) -> None:
    """What this machine has, what is missing, and what to do.

    Example: finback doctor --json
    """
    from finback.doctor import examine

    facts = examine()
    if json:
        terminal.print_json(facts)
        return
    advice = facts.pop("advice")
    sizes = {key for key in facts if key.startswith(("memory", "disk"))}
    shown = {key: terminal.size(value) if key in sizes else terminal.plain(value) for key, value in facts.items()}
    terminal.table(("what", "value"), [(key.replace("_", " "), value) for key, value in shown.items()])
    for line in advice:
        terminal.note(f"• {line}")


def _open(
    model: str,
    max_tokens: int | None,
    seed: int,
    asked: dict[str, Any],
    options: dict[str, Any],
    generation: dict[str, Any],
    prefix_cache: bool,
) -> "tuple[Engine, Sampling]":
    """An engine for one conversation, and how it samples: as `asked`, else as the model's own settings say."""
    from finback.about import default_dtype, sampling_defaults
    from finback.engine import Engine, Options, Sampling
    from finback.weights import load, load_tokenizer

    settings = sampling_defaults(model) | {name: value for name, value in asked.items() if value is not None}
    sampling = Sampling(max_tokens=max_tokens, seed=seed, **settings)
    how = Options(**generation, prefix_folder=prefix_folder() if prefix_cache else None)
    dtype = options.pop("dtype") or default_dtype(model)
    options["expert_memory"] = expert_bytes(options["expert_memory"])
    context = _CONTEXT if max_tokens is None else max_tokens + _CONTEXT // 4
    loaded = load(model, dtype, context=context, **options)
    return Engine(loaded, load_tokenizer(model), max_batch=1, options=how), sampling


def main() -> None:
    """The entry point of `finback`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to stop
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    app()
