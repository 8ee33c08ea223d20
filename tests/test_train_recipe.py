"""Recipes: what a user can get wrong is one line that names the file, the key, the value and what is allowed."""

from pathlib import Path

import pytest
import tiny_recipe
from hypothesis import given
from hypothesis import strategies as st

from finback.errors import UserError
from finback.tasks import TASKS
from finback.train import recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


def mistake(folder: Path, old: str, new: str) -> str:
    path = tiny_recipe.write(folder, old, new)
    with pytest.raises(UserError) as caught:
        recipe.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1000
    return message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_repository_is_valid(path):
    assert recipe.load(path).stages


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed = 3", "sead = 3", ["sead = 3", "seed"]),
        ("steps = 5", "step = 5", ["stage.0.step = 5", "steps"]),
        ("steps = 5", "", ["stage.0.steps", "missing"]),
        ("steps = 5", 'steps = "5"', ["stage.0.steps", '"5"', "integer"]),
        ("steps = 5", "steps = 0", ["stage.0.steps = 0", "greater than 0"]),
        ("steps = 5", "steps = 5.5", ["stage.0.steps = 5.5", "integer"]),
        ('kind = "pretrain"', 'kind = "rl"', ["stage.0.kind", '"rl"', "'pretrain'", "'sft'"]),
        ('kind = "muon"', 'kind = "sgd"', ["stage.0.optimizer.kind", '"sgd"', "'adamw'", "'muon'"]),
        ("warmup = 2", "warm_up = 2", ["stage.0.optimizer.warm_up = 2", "warmup"]),
        ("warmup = 2", "warmup = 5", ["stage.0", "warmup = 5", "steps = 5"]),
        ("lr = 2e-3", "lr = -1.0", ["stage.0.optimizer.lr = -1.0", "greater than 0"]),
        ("lr = 2e-3", "lr = nan", ["stage.0.optimizer.lr", "finite"]),
        ("accumulation = 2", "accumulation = 3", ["stage.0", "batch = 4", "accumulation = 3"]),
        ("sorting = 1.0, letters", "sorting = 1.0, lettres", ["stage.0", "tasks.lettres", *TASKS]),
        ("{ sorting = 1.0 }", "{ sorting = 0.0 }", ["stage.1", "tasks"]),
        ("{ sorting = 1.0 }", "{ sorting = -1.0 }", ["stage.1.tasks.sorting = -1.0", "0"]),
        ("no_think = 0.3", "no_think = 1.3", ["stage.1.no_think = 1.3", "less than or equal to 1"]),
        ('name = "reply"', 'name = "read"', ["read", "differ"]),
        ('name = "reply"', 'name = "../x"', ["stage.1.name", "../x"]),
        ("num_nextn_predict_layers = 1", "", ["stage.0", "mtp_lambda = 0.3", "num_nextn_predict_layers"]),
        ("hidden_size = 32", "hiden_size = 32", ["model.hiden_size = 32", "hidden_size"]),
        ("hidden_size = 32", "hidden_size = true", ["model.hidden_size = true", "integer"]),
        ("n_group = 1", "n_group = 3", ["model", "n_group = 3"]),
        ("sequence = 640", "sequence = 4097", ["stage.1", "sequence = 4097", "4096"]),
        ("hidden_size = 32", "hidden_size = 32\nvocab_size = 299", ["model.vocab_size = 299", "300"]),
        ("texts = 20", 'texts = 20\nfrom = "calf"', ["tokenizer", "from"]),
        ("[[stage]]", "[[stage", ["TOML"]),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, old, new, words):
    message = mistake(tmp_path, old, new)
    assert all(word in message for word in words), message


def test_a_recipe_without_a_stage_is_refused(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("[model]\n")
    with pytest.raises(UserError, match="stage is missing"):
        recipe.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.toml"):
        recipe.load(tmp_path / "nowhere.toml")


def test_a_loaded_model_keeps_its_configuration_and_its_tokenizer(tmp_path):
    stages = tiny_recipe.TOML[tiny_recipe.TOML.index("[[stage]]") :]
    path = tmp_path / "x.toml"
    path.write_text('[model]\nfrom = "calf"\n' + stages)
    assert recipe.load(path).model_source == "calf"
    with pytest.raises(UserError, match=r"model\.hidden_size"):
        recipe.load(path, ["model.hidden_size=64"])
    with pytest.raises(UserError, match="tokenizer"):
        recipe.load(path, ["tokenizer.texts=64"])


def test_overrides_reach_every_depth_and_type(tmp_path):
    got = tiny_recipe.load(
        tmp_path,
        "seed=9",
        "stage.1.steps=11",
        "stage.0.optimizer.lr=1e-2",
        "stage.0.tasks.countdown=0.5",
        "stage.0.dtype=bfloat16",
        'stage.1.name="other"',
    )
    first, second = got.stages
    assert (got.seed, second.steps, first.optimizer.lr, first.dtype, second.name) == (9, 11, 0.01, "bfloat16", "other")
    assert first.tasks == {"sorting": 1.0, "letters": 2.0, "countdown": 0.5}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", ["'seed'", "key=value"]),
        ("stage.2.steps=1", ["'2'", "0..1"]),
        ("stage.x.steps=1", ["'x'", "0..1"]),
        ("seed.x=1", ["'x'"]),
        ("stage.0.stepps=1", ["stage.0.stepps = 1", "steps"]),
        ("stage.0.steps=many", ["stage.0.steps", '"many"', "integer"]),
    ],
)
def test_a_wrong_override_is_one_clear_line(tmp_path, override, words):
    with pytest.raises(UserError) as caught:
        tiny_recipe.load(tmp_path, override)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_changed_keys_are_named_with_both_values(tmp_path):
    old = tiny_recipe.load(tmp_path).canonical()
    new = tiny_recipe.load(tmp_path, "stage.0.steps=6", "stage.1.tasks.letters=1.0").canonical()
    assert list(recipe.changed_keys(old, old)) == []
    changes = list(recipe.changed_keys(old, new))
    assert changes == ["stage.0.steps (was 5, is 6)", "stage.1.tasks.letters (was null, is 1.0)"]


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON, JSON)
def test_keys_change_exactly_when_the_recipes_differ(old, new):
    different = list(recipe.changed_keys(old, new))
    # A key set to null and a key that is absent mean the same.
    assert bool(different) <= (old != new)
    assert bool(different) >= (_without_none(old) != _without_none(new))


def _without_none(value):
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
