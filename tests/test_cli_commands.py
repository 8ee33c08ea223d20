"""The commands, run as a user runs them, on a tiny random model."""

import json

import pytest
from text_samples import trained
from tiny_model import tiny, tiny_model
from typer.testing import CliRunner

from finback.cli import app
from finback.kernels import native
from finback.tasks import TASKS, is_held_out, sample
from finback.weights import save

COMMANDS = [
    ["ask"],
    ["chat"],
    ["train"],
    ["eval"],
    ["show"],
    ["verify"],
    ["convert"],
    ["doctor"],
    ["bench"],
    ["bench", "machine"],
    ["tasks", "list"],
    ["tasks", "sample"],
]
ASK_KEYS = [
    *("answer", "reasoning", "finish_reason", "prompt_tokens", "completion_tokens"),
    *("reasoning_tokens", "cached_tokens"),
]


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """A home with the model "rand", which samples by its generation_config.json, and "greedy", which does not."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = trained()
    model = tiny_model(tiny(vocab_size=tokenizer.vocab_size, max_position_embeddings=512))
    for name, settings in (
        ("rand", {"do_sample": True, "temperature": 1.0, "top_p": 1.0}),
        ("greedy", {"do_sample": False}),
    ):
        save(model, tokenizer, home / "models" / name)
        (home / "models" / name / "generation_config.json").write_text(json.dumps(settings))
    return home


@pytest.fixture
def finback(homes, monkeypatch):
    """Run a command; its result has .stdout, .stderr and .exit_code."""
    monkeypatch.setenv("FINBACK_HOME", str(homes))

    def run(*arguments: object, stdin: str = ""):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def asked(finback, *arguments: object, stdin: str = "") -> dict:
    result = finback("ask", *arguments, "--max-tokens", 30, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_prompts_are_kept_on_disk_only_where_that_is_asked_for(finback, homes):
    question = "Which is larger, 9.9 or 9.11?"
    assert [asked(finback, question)["cached_tokens"] for _ in range(2)] == [0, 0]
    assert not (homes / "prefix").exists()
    told = [asked(finback, question, "--prefix-cache") for _ in range(2)]
    assert [reply["cached_tokens"] for reply in told] == [0, 16]
    assert told[0]["answer"] == told[1]["answer"]
    assert finback("rm", "--prefix-cache", "--yes").exit_code == 0
    assert asked(finback, question, "--prefix-cache")["cached_tokens"] == 0


def test_guessing_ahead_is_counted_and_changes_no_answer(finback):
    question = "Which is larger, 9.9 or 9.11?"
    plain, guessed = asked(finback, question), asked(finback, question, "--speculate", "mtp")
    assert "drafted" not in plain and 0 < guessed["accepted"] <= guessed["drafted"]
    assert guessed["answer"] == plain["answer"]


def test_a_thinking_budget_is_kept(finback):
    assert asked(finback, "Which is larger, 9.9 or 9.11?", "--thinking-tokens", 5)["reasoning_tokens"] == 6
    refused = finback("ask", "hm", "--thinking-tokens", -1)
    assert refused.exit_code == 2 and "thinking_tokens is -1" in refused.stderr


def test_ask_prints_the_answer_on_stdout_and_the_thinking_on_stderr(finback):
    for seed in range(8):
        expected = asked(finback, "Why?", "--model", "rand", "--seed", seed, "--no-think" if seed % 2 else "--think")
        flags = ["--seed", seed, "--max-tokens", 30, "--no-think" if seed % 2 else "--think"]
        plain = finback("ask", "Why?", "--model", "rand", *flags)
        assert plain.exit_code == 0
        assert plain.stdout == (expected["answer"] + "\n" if expected["answer"] else "")
        assert plain.stderr.startswith(expected["reasoning"])
        assert ("cut off" in plain.stderr) == (expected["finish_reason"] == "length")


def test_ask_json_is_one_object_with_these_keys(finback):
    answer = asked(finback, "What is 1 + 1?", "--model", "rand")
    assert list(answer) == ASK_KEYS
    # BOS, <User>, the question, <Assistant>, <think> and a newline.
    assert answer["prompt_tokens"] == len(trained().encode("What is 1 + 1?")) + len(trained().encode("\n")) + 4
    assert (answer["finish_reason"], answer["completion_tokens"]) in [("length", 30)] + [
        ("stop", n) for n in range(1, 31)
    ]


def test_ask_dash_reads_the_question_from_stdin(finback):
    assert asked(finback, "-", "--model", "rand", stdin="Why?\n") == asked(finback, "Why?", "--model", "rand")


def test_ask_samples_as_the_model_says_unless_told_otherwise(finback):
    def answers(*arguments):
        return {json.dumps(asked(finback, "Why?", *arguments, "--seed", seed)) for seed in (1, 2, 3)}

    assert len(answers("--model", "greedy")) == 1
    assert len(answers("--model", "rand")) == 3
    assert answers("--model", "rand", "--temperature", 0) == answers("--model", "greedy")
    assert asked(finback, "Why?", "--model", "rand") == asked(finback, "Why?", "--model", "rand", "--seed", 0)


def test_a_model_may_be_a_path_and_may_lack_sampling_settings(finback, homes, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in (homes / "models" / "greedy").iterdir():
        if file.name != "generation_config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    assert asked(finback, "Why?", "--model", folder) == asked(finback, "Why?", "--model", "greedy")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["ask", "Why?", "--model", "nowhere"], "nowhere"),
        (["ask", " ", "--model", "rand"], "question is empty"),
        (["ask", "-", "--model", "rand"], "question is empty"),
        (["ask", "Why?", "--model", "rand", "--max-tokens", "600"], "max_tokens is 600"),
        (["ask", "Why?", "--model", "rand", "--temperature", "-1"], "temperature is -1.0"),
        (["show", "nowhere"], "nowhere"),
        (["tasks", "sample", "nothing"], "nothing"),
        (["tasks", "sample", "letters", "--difficulty", "99"], "99"),
        (["eval", "--model", "rand", "--task", "nothing"], "nothing"),
        (["eval", "--model", "nowhere"], "nowhere"),
        (["train", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(finback, arguments, words):
    result = finback(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_damaged_generation_config_is_named(finback, homes):
    path = homes / "models" / "odd"
    path.mkdir(exist_ok=True)
    for file in (homes / "models" / "greedy").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "generation_config.json").write_text('{"do_sample": true, "temperature": "warm"}')
    result = finback("ask", "Why?", "--model", "odd")
    assert result.exit_code == 2 and "temperature is 'warm'" in result.stderr


def test_chat_takes_piped_lines_as_turns(finback):
    result = finback(
        "chat", "--model", "rand", "--max-tokens", 9, "--no-think", stdin="one\n\n/think\ntwo\n/exit\nthree\n"
    )
    assert result.exit_code == 0
    assert "Thinking is on." in result.stderr
    first = asked_with_limit(finback, "one", 9)
    assert result.stdout.startswith(first["answer"])
    assert "three" not in result.stdout + result.stderr


def asked_with_limit(finback, question: str, limit: int) -> dict:
    result = finback("ask", question, "--model", "rand", "--no-think", "--max-tokens", limit, "--json")
    return json.loads(result.stdout)


def test_tasks_list_names_every_task_with_an_example(finback):
    entries = json.loads(finback("tasks", "list", "--json").stdout)
    assert [entry["name"] for entry in entries] == list(TASKS)
    assert all(entry["description"] and entry["example"] for entry in entries)
    lines = finback("tasks", "list").stdout.splitlines()
    assert lines[0] == "task\tdescription\texample"
    assert [line.split("\t")[0] for line in lines[1:]] == list(TASKS)


@pytest.mark.parametrize("split", ["held_out", "train"])
def test_tasks_sample_prints_the_problems_of_the_split(finback, split):
    arguments = ["tasks", "sample", "equations", "--seed", 5, "--n", 4, "--split", split, "--difficulty", 2]
    problems = json.loads(finback(*arguments, "--json").stdout)
    expected = list(sample("equations", 5, 4, split=split, difficulty=2))
    assert [(p["question"], p["answer"], p["difficulty"]) for p in problems] == [
        (p.question, p.answer, 2) for p in expected
    ]
    assert all(is_held_out(p) == (split == "held_out") for p in expected)
    text = finback(*arguments).stdout
    assert all(p.question in text and p.reasoning in text and f"Answer: {p.answer}" in text for p in expected)


def test_eval_prints_the_scores_as_json_and_writes_the_records(finback, tmp_path):
    arguments = ["eval", "--model", "greedy", "--task", "letters", "--task", "open", "--n", 3, "--seed", 4]
    arguments += ["--max-tokens", 12, "--batch", 4, "--out", tmp_path / "out" / "records.jsonl"]
    result = json.loads(finback(*arguments, "--json").stdout)
    assert (list(result), result["model"], result["seed"]) == (["model", "seed", "tasks"], "greedy", 4)
    assert list(result["tasks"]) == ["letters", "open"]
    assert all(list(score) == ["n", "pass@1", "low", "high"] for score in result["tasks"].values())
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [record["question"] for record in records[:3]] == [p.question for p in sample("letters", 4, 3)]
    assert [record["task"] for record in records] == ["letters"] * 3 + ["open"] * 3
    lines = finback(*arguments).stdout.splitlines()
    assert lines[0].split("\t") == ["task", "n", "pass@1", "low", "high"]
    assert [line.split("\t")[:2] for line in lines[1:]] == [["letters", "3"], ["open", "3"]]


def test_show_counts_deepseek_v3(finback, tmp_path):
    """The figures of the V3 report and of V2's table 1, from a config.json alone."""
    from finback.model import Config

    config = Config(num_nextn_predict_layers=1, max_position_embeddings=163840)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"torch_dtype": "bfloat16"}))
    facts = json.loads(finback("show", tmp_path, "--json").stdout)
    assert facts["parameters_total"] == 671_026_404_352
    assert round(facts["parameters_active"] / 1e9, 2) == 37.55
    assert facts["cache_bytes_per_token"] == 70_272
    assert facts["multi_head_cache_bytes_per_token"] == 2 * (2 * 128 * 128 * 61)
    assert (facts["vocabulary"], facts["context"], facts["precision"]) == (129280, 163840, "bfloat16")
    assert "671,026,404,352" in finback("show", tmp_path).stdout


def test_show_reads_what_save_wrote(finback, homes):
    facts = json.loads(finback("show", "rand", "--json").stdout)
    assert facts["parameters_total"] == sum(
        p.numel() for p in tiny_model(tiny(vocab_size=trained().vocab_size)).parameters()
    )
    assert facts["weights_bytes"] == (homes / "models" / "rand" / "model.safetensors").stat().st_size
    assert facts["cache_bytes_per_token"] == 4 * 3 * (14 + 8)


@pytest.mark.parametrize("path", native.supported())
def test_models_run_as_they_are_but_small_ones_without_native_kernels_in_float32(path, tmp_path):
    from finback.about import default_dtype
    from finback.model import Config

    native.use(path)
    small = "float32" if path == "torch" else "auto"
    for config, dtype in ((tiny(), small), (Config(num_hidden_layers=4), "auto")):
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"torch_dtype": "bfloat16"}))
        assert default_dtype(str(tmp_path)) == dtype
    native.use(None)


def test_dtype_chooses_the_precision(finback):
    answers = [
        asked(finback, "Why?", "--model", "greedy", *flags)
        for flags in ([], ["--dtype", "auto"], ["--dtype", "bfloat16"])
    ]
    assert answers[0] == answers[1] != answers[2]
    result = finback("ask", "Why?", "--model", "greedy", "--dtype", "int3")
    assert result.exit_code == 2 and "int3" in result.stderr


def test_doctor_knows_this_machine_and_its_models(finback):
    import os

    import torch

    facts = json.loads(finback("doctor", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert {"rand", "greedy"} <= set(facts["models"])
    assert 1 <= facts["cpus"] <= os.cpu_count()
    assert facts["disk_free"] > 0
    assert all(isinstance(line, str) for line in facts["advice"])
    plain = finback("doctor")
    assert all(line in plain.stderr for line in facts["advice"])
    assert f"torch\t{torch.__version__}" in plain.stdout


def test_doctor_without_a_model_says_how_to_get_one(finback, monkeypatch, tmp_path):
    monkeypatch.setattr("finback.paths.PACKAGE", tmp_path)
    monkeypatch.setenv("FINBACK_HOME", str(tmp_path))
    facts = json.loads(finback("doctor", "--json").stdout)
    assert facts["models"] == []
    assert any("finback train" in line for line in facts["advice"])


def test_train_hands_its_options_over(finback, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("finback.train.train", lambda *arguments: calls.append(arguments) or tmp_path / "model")
    result = finback("train", "r.toml", "--set", "seed=1", "--set", "stage.0.steps=2", "--out", tmp_path, "--resume")
    assert calls[0][1:] == (["seed=1", "stage.0.steps=2"], tmp_path, True)
    assert str(calls[0][0]) == "r.toml"
    assert result.stdout == f"{tmp_path / 'model'}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example(finback, command):
    result = finback(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: finback {' '.join(command)}" in result.stdout


def test_verify_and_convert(finback, tmp_path):
    assert finback("verify", "rand").stdout.startswith("rand is whole: ")
    assert finback("convert", "rand", tmp_path / "m.gguf").stdout == f"{tmp_path / 'm.gguf'}\n"
    found = finback("verify", tmp_path / "m.gguf", "--json")
    assert json.loads(found.stdout)["problems"] == [] and found.exit_code == 0
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-5000])
    broken = finback("verify", tmp_path / "m.gguf")
    assert broken.exit_code == 2 and "m.gguf" in broken.stdout


def test_what_the_system_refuses_is_one_line(finback, tmp_path):
    for arguments in (["show", "a" * 300], ["convert", "rand", tmp_path / ("b" * 300)], ["ls", "--nonsense"]):
        result = finback(*arguments)
        assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_packing_is_asked_for_by_an_option(finback, homes):
    plain, packed = (
        finback("ask", "Hi", "--model", "greedy", "--json", *more) for more in ([], ["--quantize", "int8"])
    )
    assert packed.exit_code == plain.exit_code == 0
    assert (homes / "models" / "greedy" / "packs" / "int8-float32" / "pack.json").is_file()
