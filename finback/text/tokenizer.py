"""Byte-level BPE of the DeepSeek family and its relatives, in which text can never become a special token.

The two are kept apart by construction: text is encoded by a tokenizer from which every mark, the post-processor,
truncation and padding were removed; special ids are put in by `chat.py`, as ids. So `encode` never adds a BOS either.

A mark is an added token, special or not, save for one kind: deepseek-llm and deepseek-coder add 13 letters (those whose
code is no byte of UTF-8: À, Á, õ to ÿ) as tokens that are not special. They are text, encoded as their files say.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from finback.errors import UserError
from finback.paths import atomic_file, read_json
from finback.text.bpe import BYTE_OF

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
# Ends of turn in the other families, the likeliest EOS first; whatever is there of them stops a reply.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "[EOT]", "<|end_of_text|>", "<|endoftext|>", "[EOS]")
FIM = tuple(f"<｜fim▁{part}｜>" for part in ("hole", "begin", "end"))
TOOL = tuple(
    [f"<｜tool▁{unit}▁{edge}｜>" for unit in ("calls", "call", "outputs", "output") for edge in ("begin", "end")]
    + ["<｜tool▁sep｜>"]
)
# The order gives the ids of a tokenizer trained here: BOS 0, EOS 1, PAD 2, as in DeepSeek's.
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, *FIM, *TOOL)
# Not "special" to other programs (as in DeepSeek's files): their parsers look for these in the decoded text.
MARKUP = (THINK, END_THINK, *TOOL)
_MOST_TOKENS = 10**7
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)

# The chat format of chat.py for programs that read it as a template; a test holds the two together.
CHAT_TEMPLATE = (
    "{% set ns = namespace(system='', first=true) %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = ns.system + ('' if ns.first else '\\n\\n') + m['content'] %}{% set ns.first = false %}"
    "{% endif %}{% endfor %}"
    "{{ bos_token + ns.system }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' }}"
    "{% if '</think>' in m['content'] %}"
    "{% set answer = m['content'].split('</think>')[-1] %}"
    "{{ answer[2:] if answer[:2] == '\\n\\n' else (answer[1:] if answer[:1] == '\\n' else answer) }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}"
    "{{ '</think>' if thinking is defined and not thinking else '<think>\\n' }}{% endif %}"
)


class Tokenizer:
    """Text to ids and back. Ids of special tokens are looked up by name; one the model lacks is None (PAD: the EOS).

    marks: the ids of all special tokens by name. bos_id, eos_id: as tokenizer_config.json names them (config.json is
    wrong in some R1-Distill models), else the family's. eos_ids: any of these ends a reply. start_ids: what plain text
    begins with: the BOS, or nothing where there is none (Qwen2) or the file says so (`add_bos_token`).
    """

    def __init__(self, spec: dict[str, Any], config: dict[str, Any]) -> None:
        """`spec` is the content of a tokenizer.json, `config` of a tokenizer_config.json. Raises UserError."""
        self._spec, self._config = spec, config
        added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
        ids = [*added.values(), *spec["model"]["vocab"].values()]
        if wrong := [i for i in ids if type(i) is not int or not 0 <= i < _MOST_TOKENS]:
            raise UserError(f"tokenizer.json: a token has the id {wrong[0]!r}; ids are 0 to {_MOST_TOKENS - 1:,}")
        letters = [token for token in spec.get("added_tokens") or [] if _is_letter(token)]
        self.marks: dict[str, int] = {name: added[name] for name in added.keys() - {t["content"] for t in letters}}
        self._encoder = _text_encoder(spec, self.marks, letters)
        self._bytes = _token_bytes(spec["model"]["vocab"], added)
        self._special = frozenset(self.marks.values())
        self.vocab_size: int = max(self._bytes) + 1
        eos_id = _named(config, "eos_token", self.marks, (EOS, *TURN_ENDS))
        if eos_id is None:
            raise UserError("tokenizer.json: no known end-of-text token; tokenizer_config.json must name its eos_token")
        self.eos_id: int = eos_id
        self.eos_ids = frozenset({eos_id, *(self.marks[name] for name in TURN_ENDS if name in self.marks)})
        self.bos_id: int | None = _named(config, "bos_token", self.marks, (BOS, "<|begin_of_text|>"))
        self.start_ids = [self.bos_id] if self.bos_id is not None and config.get("add_bos_token") is not False else []
        self.pad_id: int = self.marks.get(_name(config.get("pad_token", PAD)), eos_id)
        self.user_id: int | None = self.marks.get(USER)
        self.assistant_id: int | None = self.marks.get(ASSISTANT)
        self.think_id: int | None = self.marks.get(THINK)
        self.end_think_id: int | None = self.marks.get(END_THINK)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read tokenizer.json and, if there is one, tokenizer_config.json. Raises UserError for files it cannot use.

        Without a tokenizer.json, tiktoken.model with its tokenizer_config.json (Moonlight) is taken.
        """
        path = Path(folder) / "tokenizer.json"
        config_path, ranks_path = path.with_name("tokenizer_config.json"), path.with_name("tiktoken.model")
        config = read_json(config_path) if config_path.is_file() else None
        template = path.with_name("chat_template.jinja")  # where newer files keep it
        if config is not None and not config.get("chat_template") and template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
        if not path.is_file() and ranks_path.is_file() and config is not None:
            from finback.text.tiktoken import read_tiktoken

            path, (spec, config) = ranks_path, read_tiktoken(ranks_path, config)
        elif not path.is_file():
            raise UserError(f"{path}: no such file; a model folder needs the tokenizer.json that came with the model")
        else:
            spec = read_json(path)
        try:
            if config is None:
                config = _default_config() if any(t["content"] == BOS for t in spec["added_tokens"]) else {}
            return cls(spec, config)
        except UserError as error:
            raise UserError(f"{path.parent}: {error}") from error
        except Exception as error:  # the tokenizers library raises bare Exception for a bad file
            raise UserError(
                f"{path}: not a usable tokenizer ({error!r}); copy the model's tokenizer.json again"
            ) from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn the merges from `texts`; the vocabulary has at most `vocab_size` entries, fewer if the texts are small.

        Every digit is a token of its own, so that numbers are written as one writes them.
        """
        if vocab_size < MIN_VOCAB:
            raise UserError(f"vocab_size {vocab_size}: the bytes and special tokens alone need {MIN_VOCAB}; raise it")
        bpe = tokenizers.Tokenizer(models.BPE())
        digit = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([digit, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        # For other programs, which expect DeepSeek's tokenizer to begin plain text with BOS.
        bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        spec = json.loads(bpe.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["content"] not in MARKUP
        return cls(spec, _default_config())

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as they were read where the tokenizer was loaded."""
        for name, content in (("tokenizer.json", self._spec), ("tokenizer_config.json", self._config)):
            with atomic_file(Path(folder) / name) as path:
                path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    @property
    def chat_template(self) -> str | None:
        """The template of tokenizer_config.json, as text: it is looked at, never run."""
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        return template if isinstance(template, str) else None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: no BOS, and never a special token, whatever the text says.

        Raises UserError for text that is not Unicode (a lone surrogate).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        for text in texts:
            _check_unicode(text)
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(list(texts))]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary are nothing.

        With `skip_special`, every mark is left out, `<think>` and the tool marks included.
        """
        return b"".join(self._token(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which need not be whole characters; of a mark its name, of an unknown id nothing."""
        return self._bytes.get(token_id, b"")

    def stream(self, skip_special: bool = True) -> "TextStream":
        """A decoder that takes one id at a time."""
        return TextStream(self, skip_special)

    def _token(self, token_id: int, skip_special: bool) -> bytes:
        """The bytes of one token."""
        return b"" if skip_special and token_id in self._special else self.token_bytes(token_id)


class TextStream:
    """Decodes ids as they come. The pieces joined are `decode` of all ids; no piece ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; may be empty."""
        return self._utf8.decode(self._tokenizer._token(token_id, self._skip_special))

    def flush(self) -> str:
        """What remains at the end: U+FFFD for a character that was cut off, else nothing. The stream starts anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _is_letter(token: dict[str, Any]) -> bool:
    return len(token["content"]) == 1 and not token.get("special")


def _name(token: Any) -> str:
    """The name of a token in tokenizer_config.json, which is a string or an object; "" for none."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def _named(config: dict[str, Any], key: str, marks: dict[str, int], known: Sequence[str]) -> int | None:
    """The id of the token that tokenizer_config.json names, where it says nothing of the first known one."""
    if key not in config:
        return next((marks[name] for name in known if name in marks), None)
    name = _name(config[key])
    if name and name not in marks:
        raise UserError(f"tokenizer_config.json: {key} {name!r} is none of the added tokens of tokenizer.json")
    return marks.get(name)


def _text_encoder(spec: dict[str, Any], marks: dict[str, int], kept: list[dict[str, Any]]) -> tokenizers.Tokenizer:
    """The tokenizer for text alone. Marks leave the vocabulary too, so that no merge can arrive at one."""
    kinds = [part.get("type") for part in _parts(spec.get("decoder"), "decoders")]
    if spec["model"].get("type") != "BPE" or "ByteLevel" not in kinds:
        raise UserError("tokenizer.json: not a byte-level BPE; only such tokenizers can be used")
    model = dict(spec["model"])
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in marks}
    model["vocab"] |= {token["content"]: token["id"] for token in kept}  # where it is missing they get other ids
    model["merges"] = [merge for merge in model["merges"] if marks.keys().isdisjoint(_merge_tokens(merge))]
    bare = {**spec, "model": model, "added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(bare))


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A component of a tokenizer.json as the list of its parts."""
    if component is None:
        return []
    return component[key] if component.get("type") == "Sequence" else [component]


def _merge_tokens(merge: str | list[str]) -> set[str]:
    """The tokens that a merge joins and makes; older files write the pair as one string with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}


def _token_bytes(vocab: dict[str, int], added: dict[str, int]) -> dict[int, bytes]:
    """The bytes of every token."""
    text = {i: b"".join(BYTE_OF.get(char) or char.encode() for char in token) for token, i in vocab.items()}
    return text | {i: token.encode() for token, i in added.items()}


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise UserError(f"text: {found} is a lone surrogate, half of a character; send whole Unicode text") from error


def _default_config() -> dict[str, Any]:
    """A tokenizer_config.json by which transformers, vLLM and SGLang use a tokenizer of ours as we do."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
