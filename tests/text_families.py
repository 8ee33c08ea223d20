"""Small tokenizers laid out as those of the families, with the chat templates of their checkpoints.

The templates are the checkpoints' own, as public test suites keep them, without the parts for tools. Not seen in the
original: Moonlight's (this is Kimi-VL's, whose default system message is the same) and V3's (V2.5's is used).
"""

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from text_samples import TEXTS
from tokenizers import models, pre_tokenizers, trainers

from finback.text import Tokenizer
from finback.text.bpe import added_token, bpe_spec

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TURNS = ("<｜User｜>", "<｜Assistant｜>")
THINK = ("<think>", "</think>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MOON = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|start_header_id|>", "<|end_header_id|>")
MOON += ("[EOT]", "<|im_system|>", "<|im_middle|>")

V2 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
V2_5 = (
    "{% set ns = namespace(is_tool=false, system_prompt='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}"
    "{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
)
R1_FIRST = V2_5.replace(
    "{{'<｜Assistant｜>' + message['content']",
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content",
)
R1 = R1_FIRST.replace("{{'<｜Assistant｜>'}}{% endif %}", "{{'<｜Assistant｜><think>\\n'}}{% endif %}")
V3_1 = """{%- set ns = namespace(is_tool=false, system_prompt='', is_first_sp=true, is_last_user=false) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- if ns.is_first_sp -%}
      {%- set ns.system_prompt = ns.system_prompt + message['content'] -%}
      {%- set ns.is_first_sp = false -%}
      {%- else -%}
      {%- set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- set ns.is_last_user = true -%}{{'<｜User｜>' + message['content']}}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {%- if ns.is_last_user -%}{{'<｜Assistant｜>'}}
      {%- if message['prefix'] is defined and message['prefix'] and thinking -%}{{'<think>'}}
        {%- else -%}{{'</think>'}}
      {%- endif -%}
    {%- endif -%}
    {%- set ns.is_last_user = false -%}
      {%- set content = message['content'] -%}
      {%- if '</think>' in content -%}
        {%- set content = content.split('</think>', 1)[1] -%}
      {%- endif -%}{{content + '<｜end▁of▁sentence｜>'}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.is_last_user and not ns.is_tool -%}{{'<｜Assistant｜>'}}
  {%- if not thinking -%}{{'</think>'}}
    {%- else -%}{{'<think>'}}
  {%- endif -%}
{%- endif %}"""
QWEN2_5 = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MOONLIGHT = """{%- for message in messages -%}
  {%- if loop.first and messages[0]['role'] != 'system' -%}
    {{'<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>'}}
  {%- endif -%}
  {%- if message['role'] == 'system' -%}
    {{'<|im_system|>'}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{'<|im_user|>'}}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{'<|im_assistant|>'}}
  {%- endif -%}
  {{- message['role'] -}}
  {{'<|im_middle|>'}}
  {{- message['content'] + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{'<|im_assistant|>assistant<|im_middle|>'}}
{%- endif -%}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_1 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class Family:
    """A tokenizer in small. eos: what must end its replies; systems: how many system messages its template can take."""

    pre: str
    marks: tuple[str, ...]
    template: str
    bos: str | None
    eos: tuple[str, ...]
    letters: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    def spec(self) -> dict[str, Any]:
        vocab, merges = words(self.pre)
        # Files with such letters lack them as bytes: no UTF-8 has these bytes.
        vocab = {token: n for n, token in enumerate(token for token in vocab if token not in self.letters)}
        added = [added_token(len(vocab) + n, mark, "think" not in mark) for n, mark in enumerate(self.marks)]
        above = len(vocab) + len(added)
        added += [{**added_token(above + n, char, False), "normalized": True} for n, char in enumerate(self.letters)]
        return bpe_spec(vocab, [list(pair) for pair in merges], added, self.pre)

    def tokenizer(self) -> Tokenizer:
        config = {"bos_token": self.bos, "eos_token": {"content": self.eos[0]}, "chat_template": self.template}
        return Tokenizer(self.spec(), config | self.config)


@functools.cache
def words(pre: str) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """A vocabulary and its merges, trained on text that is split as `pre` says."""
    split = json.dumps(bpe_spec({}, [], [], pre))
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = tokenizers.Tokenizer.from_str(split).pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*TEXTS, "User: Hi\n\nAssistant: Hi\n\nsystem user assistant You are a\n\n" * 20], trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], tuple(map(tuple, model["merges"]))


FAMILIES = {
    "deepseek-llm": Family("deepseek-llm", (BOS, EOS), V2, BOS, (EOS,), letters=tuple("øöúÿ")),
    "V2.5": Family("deepseek-llm", (BOS, EOS, *TURNS), V2_5, BOS, (EOS,), letters=("ö",)),
    "V3": Family("deepseek-v3", (BOS, EOS, *TURNS), V2_5, BOS, (EOS,)),
    "V3 with think tokens": Family("deepseek-v3", (BOS, EOS, *TURNS, *THINK), V2_5, BOS, (EOS,)),
    "R1": Family("deepseek-v3", (BOS, EOS, *TURNS, *THINK), R1, BOS, (EOS,)),
    "R1, first template": Family("deepseek-v3", (BOS, EOS, *TURNS, *THINK), R1_FIRST, BOS, (EOS,)),
    "V3.1": Family("deepseek-v3", (BOS, EOS, *TURNS, *THINK), V3_1, BOS, (EOS,)),
    "R1-Distill-Qwen": Family("qwen2", (EOS, *TURNS, BOS, *THINK), R1, BOS, (EOS,)),
    "R1-Distill-Llama": Family("llama-bpe", (BOS, EOS, *LLAMA[2:], *TURNS, *THINK), R1, BOS, (EOS, "<|eot_id|>")),
    "Qwen2": Family("qwen2", QWEN, QWEN2, None, ("<|im_end|>", "<|endoftext|>"), config={"add_bos_token": False}),
    "Qwen2.5": Family("qwen2", QWEN, QWEN2_5, None, ("<|im_end|>", "<|endoftext|>"), config={"add_bos_token": False}),
    "Llama 3": Family("llama-bpe", LLAMA, LLAMA3, LLAMA[0], ("<|eot_id|>", "<|end_of_text|>")),
    "Llama 3.1": Family("llama-bpe", LLAMA, LLAMA3_1, LLAMA[0], ("<|eot_id|>", "<|end_of_text|>")),
    "Moonlight": Family(
        "kimi-k2", MOON, MOONLIGHT, "[BOS]", ("[EOS]", "<|im_end|>", "[EOT]"), config={"add_bos_token": False}
    ),
}
