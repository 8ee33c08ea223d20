"""Do the files we write run in llama.cpp, with the same greedy tokens? A V3-style model and a Qwen2, random weights.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python
    python benchmarks/llama_cpp.py --python /tmp/llama/bin/python --checkpoint S --out results/llama_cpp

`--checkpoint` is a V3-style folder with a tokenizer; the Qwen2 is made here with the same tokenizer. Both programs read
the same GGUF file; ours computes in float32. llama.cpp does so with a float32 file, which must agree token by token; in
the products of BF16 and Q8_0 it rounds activations too: there the tokens before the first difference are counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from finback import Engine, Sampling, load, load_tokenizer
from finback.model import Config, Model
from finback.weights.gguf_file import write

PROMPT, NEW = list(range(20, 52)), 64
THEIRS = """
import json, sys
from llama_cpp import Llama
prompt, new = json.loads(sys.argv[2]), int(sys.argv[3])
model = Llama(sys.argv[1], n_ctx=256, n_threads=2, verbose=False, logits_all=False)
tokens = []
for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
    tokens.append(int(token))
    if len(tokens) == new:
        break
print(json.dumps(tokens))
"""


def qwen2(vocab_size: int) -> Model:
    """Random, with biases and shared keys; weights on the scale that keeps logits apart."""
    values = {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
    }
    model, generator = Model(Config.from_dict(values)).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scaled = 1 + 0.1 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5
            parameter.copy_(scaled.bfloat16().float())
    return model


def compare(name: str, model: Model, tokenizer, python: str, folder: Path) -> list[dict]:
    sampling = Sampling(max_tokens=NEW, temperature=0, ignore_eos=True)
    rows = []
    for kind in ("f32", "bf16", "q8_0"):
        path = folder / f"{name}-{kind}.gguf"
        write(model, tokenizer, path, kind)
        command = [python, "-c", THEIRS, str(path), json.dumps(PROMPT), str(NEW)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{name} {kind}: llama.cpp failed\n{result.stderr[-2000:]}")
        (done,) = Engine(load(path, dtype="float32"), max_batch=1).generate([PROMPT], sampling)
        theirs = json.loads(result.stdout.splitlines()[-1])
        pairs = enumerate(zip(done.token_ids, theirs, strict=True))
        same = next((i for i, (a, b) in pairs if a != b), NEW)
        rows.append({"model": name, "kind": kind, "same": same, "of": NEW, "ours": done.token_ids, "theirs": theirs})
        print(f"{name} {kind}: the first {same} of {NEW} greedy tokens are equal", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="a Python that has llama-cpp-python")
    parser.add_argument("--checkpoint", required=True, help="a V3-style model folder with its tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.checkpoint)
    model = load(options.checkpoint, dtype="float32")
    version = [options.python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows += compare("V3-style", model, tokenizer, options.python, Path(folder))
        rows += compare("Qwen2", qwen2(model.config.vocab_size), tokenizer, options.python, Path(folder))
    options.out.mkdir(parents=True, exist_ok=True)
    log = {
        "llama_cpp_python": subprocess.check_output(version, text=True).strip(),
        "torch": torch.__version__,
        "rows": rows,
    }
    (options.out / "log.json").write_text(json.dumps(log) + "\n")
    lines = ["| model | file | equal greedy tokens |", "|---|---|---|"]
    lines += [f"| {row['model']} | {row['kind']} | first {row['same']} of {row['of']} |" for row in rows]
    command = "python benchmarks/llama_cpp.py --python PYTHON --checkpoint S --out results/llama_cpp"
    text = f"llama-cpp-python {log['llama_cpp_python']}, ours in float32, `{command}`\n\n" + "\n".join(lines) + "\n"
    (options.out / "report.md").write_text(f"# The files we write, in llama.cpp\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
