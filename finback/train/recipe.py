"""The recipe of a run: a TOML file, checked so that every mistake is one line before anything starts."""

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from finback.errors import UserError
from finback.model.config import Config
from finback.tasks import TASKS

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the recipe: its keys and no others, in their types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class _From(Section):
    source: str | None = Field(default=None, alias="from")


# [model]: the fields of the original config.json for a new model, or `from` for one that exists.
_model_fields: dict[str, Any] = {
    field.name: (dict[str, Any] | None if field.name == "rope_scaling" else field.type, field.default)
    for field in fields(Config)
}
if TYPE_CHECKING:
    ModelSection = _From
else:
    ModelSection = create_model("ModelSection", __base__=_From, **_model_fields)


class TokenizerSection(_From):
    """A tokenizer trained on `texts` examples of the stages' tasks, or that of the model `from`."""

    vocab_size: Positive = 2048
    texts: Positive = 20_000

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source is not None and (given := self.model_fields_set - {"source"}):
            raise ValueError(f"{min(given)} is for a tokenizer trained here; one taken by `from` is used as it is")
        return self


class Optimizer(Section):
    """AdamW for all, or Muon for the hidden matrices and AdamW for the rest; the learning rate's course.

    The rate rises linearly over `warmup` steps, stays, and over the last `decay_share` of the stage falls to
    `final` x `lr`. Muon's update is scaled to AdamW's size, so that one `lr` serves both; `adamw_lr` splits them.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: Rate
    adamw_lr: Rate | None = None
    warmup: Count = 0
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    decay_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    final: Share = 0.1
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Rate = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    weight_decay: Weight = 0.1
    clip: Weight = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "adamw" and self.adamw_lr is not None:
            raise ValueError(f"adamw_lr = {self.adamw_lr} splits Muon from AdamW; with kind = 'adamw' give lr alone")
        return self


class Stage(Section):
    """One stage: what it reads, for how many steps, and how it learns.

    A step sees `batch` rows of `sequence` tokens, in `accumulation` parts that share one update. `tasks` are mixture
    weights. `no_think` is the share of examples that answer at once, `multi_turn` that of conversations of two or three
    problems, `easier` that of problems below the default difficulty. `mtp_lambda`, `balance_alpha` and `bias_gamma`
    are the constants of V3 TR 4.2. `checkpoint_every`, `log_every`, `eval_every` (0: never) count steps.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    kind: Literal["pretrain", "sft"]
    steps: Positive
    batch: Positive
    sequence: Positive
    accumulation: Positive = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    tasks: dict[str, Weight]
    no_think: Share = 0.0
    multi_turn: Share = 0.0
    easier: Share = 0.0
    mtp_lambda: Weight = 0.0
    balance_alpha: Weight = 0.0001
    bias_gamma: Weight = 0.001
    optimizer: Optimizer
    checkpoint_every: Positive = 500
    log_every: Positive = 10
    eval_every: Count = 0
    eval_n: Positive = 20

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch % self.accumulation:
            raise ValueError(f"batch = {self.batch} does not divide into accumulation = {self.accumulation} parts")
        if self.optimizer.warmup >= self.steps:
            raise ValueError(f"optimizer.warmup = {self.optimizer.warmup} must be less than steps = {self.steps}")
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown:
            raise ValueError(f"tasks.{unknown[0]} is no task; allowed: {', '.join(TASKS)}")
        if not sum(self.tasks.values()) > 0:
            raise ValueError("tasks has no weight above 0; give one, as in tasks = { arithmetic = 1.0 }")
        return self

    def check_model(self, config: Config) -> None:
        """Raise ValueError where the model cannot do what the stage asks."""
        if self.mtp_lambda > 0 and not config.num_nextn_predict_layers:
            raise ValueError(
                f"mtp_lambda = {self.mtp_lambda} needs model.num_nextn_predict_layers >= 1; "
                "add the layer or set mtp_lambda = 0"
            )
        if self.sequence > config.max_position_embeddings:
            raise ValueError(
                f"sequence = {self.sequence} is longer than model.max_position_embeddings = "
                f"{config.max_position_embeddings}"
            )


class Recipe(Section):
    """A whole run. The finished model is written in `save_dtype`; training keeps float32 weights throughout.

    `greedy`: the finished model is decoded without sampling unless a person asks for it.
    """

    seed: Count = 0
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    greedy: bool = False
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    stages: Annotated[list[Stage], Field(alias="stage", min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names {names} must differ from each other")
        if self.model_source is not None:
            if self.tokenizer.model_fields_set - {"source"}:
                raise ValueError("[tokenizer] is for a new model; one loaded by model.from keeps its own: leave it out")
            if extra := self.model.model_fields_set - {"source"}:
                raise ValueError(f"model.{min(extra)}: a model loaded by model.from keeps its configuration")
            return self
        config = self.config(1 if self.tokenizer.source else self.tokenizer.vocab_size)
        for n, stage in enumerate(self.stages):
            try:
                stage.check_model(config)
            except ValueError as error:
                raise ValueError(f"stage.{n}: {error}") from None
        return self

    @property
    def model_source(self) -> str | None:
        """The model to start from; None is a new one."""
        return self.model.source

    def config(self, vocab_size: int) -> Config:
        """The configuration of the new model; its vocabulary is the tokenizer's unless the recipe sets a larger one."""
        given = self.model.model_dump(exclude_unset=True)
        if given.setdefault("vocab_size", vocab_size) < vocab_size:
            raise ValueError(f"model.vocab_size = {given['vocab_size']} is less than the tokenizer's {vocab_size}")
        return Config.from_dict({"model_type": "deepseek_v3", **given})

    def canonical(self) -> dict[str, Any]:
        """Plain JSON of everything, defaults included, for the checkpoint and the card."""
        return json.loads(self.model_dump_json(by_alias=True))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. `overrides` are "dotted.path=TOML value", as in "stage.0.steps=10".

    Raises UserError of one line with the file, the key, its value and what is allowed.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give the path of a recipe such as recipes/calf.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    except UserError as error:  # the model's own configuration check
        raise UserError(f"{path}: [model] {str(error).removeprefix('config.json: ')}") from None


def changed_keys(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """The dotted keys at which two canonical recipes differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from changed_keys(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for n, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from changed_keys(before, after, f"{path}.{n}")
    elif old != new:
        yield f"{path} (was {_short(old)}, is {_short(new)})"


def _override(values: dict[str, Any], override: str) -> None:
    """Set one value in place; what is not TOML is taken as text, so that names need no quotes."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override!r}: write key=value, as in stage.0.steps=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = key.strip().split(".")
    place: Any = values
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else _item(place, part, override)
    if isinstance(place, dict):
        place[last] = value
    else:
        _item(place, last, override)
        place[int(last)] = value


def _item(place: Any, part: str, override: str) -> Any:
    if not isinstance(place, list) or not part.isdecimal() or int(part) >= len(place):
        allowed = f"0..{len(place) - 1}" if isinstance(place, list) else "nothing: there is a single value"
        raise UserError(f"--set {override!r}: there is no {part!r} in the recipe; allowed there: {allowed}")
    return place[int(part)]


def _explain(error: ValidationError) -> str:
    """The first mistake in one line; an unknown key first, as it is often the reason why another is missing."""
    first = min(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    location = [part for part in first["loc"] if part != "constrained-str"]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key} = {_short(first['input'])}; allowed there: {', '.join(_allowed(location))}"
    if first["type"] == "missing":
        return f"{key} is missing; it must be given"
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        return f"{key}: {text}" if key else text
    return f"{key} = {_short(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _allowed(location: Sequence[int | str]) -> list[str]:
    """The keys of the table that holds the last part of `location`."""
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        for name, field in section.model_fields.items():
            if part == (field.alias or name):
                kinds = [field.annotation, *get_args(field.annotation)]
                section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [field.alias or name for name, field in section.model_fields.items()]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
