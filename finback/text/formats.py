"""The chat formats of all families as data, and which of them a tokenizer has.

Which it is follows from the marks that exist and from what the chat_template mentions; the template is never executed.
Sources: the chat_template of DeepSeek-V2, V2.5, R1, V3.1, R1-Distill, Qwen2.5 and Llama 3 / 3.1 as public test suites
keep them (llama.cpp, huggingface.js); for Moonlight that of Kimi-VL, of the same makers, and the default system message
that ms-swift has for Moonlight. Not seen in the original: the templates of Moonlight and V3 (V2.5's is taken).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from finback.text.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

Pair = tuple[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """What stands before and after each message, marks spelled out: its text stands between the two of the role's pair.

    assistant: of an earlier turn; what follows a newline at its end is not the reply's. prompt: opens the reply. lead:
    text between it and the reply. think: opens a reply that thinks (None: this format cannot), which is then reasoning,
    between[0], `</think>`, between[1], answer. gathered: all system messages stand first, joined by an empty line; else
    they stay where they are. default_system: what the template puts in if the first message is no system message.
    preamble: before the first system text. trim: texts lose the spaces around them. bos: whether BOS comes first.
    """

    user: Pair
    assistant: Pair
    prompt: str
    system: Pair = ("", "")
    lead: str = ""
    think: str | None = None
    between: Pair = ("", "")
    gathered: bool = False
    default_system: str | None = None
    preamble: str = ""
    trim: bool = False
    bos: bool = True


V3 = ChatFormat(user=(USER, ""), assistant=(ASSISTANT, EOS), prompt=ASSISTANT, gathered=True)
R1 = replace(V3, prompt=ASSISTANT + END_THINK, think=ASSISTANT + THINK + "\n", between=("\n", "\n\n"))
V3_1 = replace(R1, assistant=(ASSISTANT + END_THINK, EOS), think=ASSISTANT + THINK, between=("", ""))
V2 = ChatFormat(
    user=("User: ", "\n\n"), assistant=("Assistant: ", EOS), prompt="Assistant:", lead=" ", system=("", "\n\n")
)
CHATML = ChatFormat(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    prompt="<|im_start|>assistant\n",
    bos=False,
)
MOONLIGHT = ChatFormat(
    system=("<|im_system|>system<|im_middle|>", "<|im_end|>"),
    user=("<|im_user|>user<|im_middle|>", "<|im_end|>"),
    assistant=("<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
    prompt="<|im_assistant|>assistant<|im_middle|>",
    bos=False,
)
LLAMA3 = ChatFormat(
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    trim=True,
)
# Llama 3.1 to 3.3 open with these dates where nobody gives another.
_LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

MARK = re.compile(r"(<\|[^|]+\|>|<｜[^｜]+｜>|</?think>)")
_DEFAULT_SYSTEM = re.compile(r"(?:<\|im_start\|>system(?:\\n|\n)|system<\|im_middle\|>)([^'\"+<]+)<\|im_end\|>")


def find_format(marks: Collection[str], template: str | None) -> ChatFormat | None:
    """The format of a tokenizer with these marks and this chat_template; None if it is none of ours."""

    def fits(form: ChatFormat) -> bool:
        needed = set(MARK.findall("".join((*form.system, *form.user, *form.assistant))))
        shown = V2.user[0] if form is V2 else MARK.findall(form.user[0])[0]
        return needed <= set(marks) and shown in (template or shown)

    if fits(V3):
        return _deepseek(marks, template)
    if fits(V2) and (template is not None or set(marks) == {BOS, EOS}):
        return V2
    if fits(LLAMA3):
        dated = template is not None and "Cutting Knowledge Date" in template
        return replace(LLAMA3, default_system="", preamble=_LLAMA_DATES) if dated else LLAMA3
    form = next((form for form in (MOONLIGHT, CHATML) if fits(form)), None)
    default = _DEFAULT_SYSTEM.search(template or "")
    return replace(form, default_system=default[1].replace("\\\\", "\\")) if form and default else form


def _deepseek(marks: Collection[str], template: str | None) -> ChatFormat:
    """V3, R1 or V3.1. R1's first template takes thinking away but does not open it; it is R1 all the same."""
    if not {THINK, END_THINK} <= set(marks) or (template is not None and END_THINK not in template):
        return V3
    text = template or THINK + "\n"
    return V3_1 if THINK in text and THINK + "\n" not in text and THINK + "\\n" not in text else R1
