"""What the byte-level BPE tokenizers of all families share: the table of bytes, how text is split, a tokenizer.json.

`SPLITS` holds the ways to split text under llama.cpp's names (`tokenizer.ggml.pre`): expressions applied one after the
other, each cutting out its matches. Sources: llama.cpp src/llama-vocab.cpp, the tokenizer.json of the checkpoints,
tokenization_kimi.py of the Kimi models. deepseek-llm's own file is not at hand: its expressions are llama.cpp's.
"""

from typing import Any

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# GPT-2's table: byte-level BPE writes each byte as one printable character.
BYTE_OF = {chr(byte): bytes([byte]) for byte in _PRINTABLE} | {chr(256 + n): bytes([b]) for n, b in enumerate(_OTHERS)}
CHAR_OF = {byte[0]: char for char, byte in BYTE_OF.items()}

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _CJK = r"\p{N}", "[一-龥ࠀ-一가-\ud7ff]+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
_CASED = (  # the letters that have case, as deepseek-llm lists them
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ"
    "-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = "|".join(
    [r"[\p{Han}]+"]
    + [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{up}{_LOWER}{low}{_CONTRACTIONS}?" for up, low in ("*+", "+*")]
    + [r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", _SPACES]
)
SPLITS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_CASED}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "kimi-k2": (_KIMI,),
    "gpt-2": (GPT2,),
    "smollm": (_DIGIT, GPT2),  # the one `Tokenizer.train` makes
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]"),
}


def bpe_spec(vocab: dict[str, int], merges: list[list[str]], added: list[dict[str, Any]], pre: str) -> dict[str, Any]:
    """The content of a tokenizer.json that splits text as `pre` says. The post-processor is left to who writes it."""
    splits = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in SPLITS[pre]]
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if SPLITS[pre] == (_QWEN2,) else None,  # as in Qwen's files; llama.cpp has none
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytewise]},
        "post_processor": None,
        "decoder": bytewise,
        # Llama 3's file, llama.cpp and tiktoken look a whole word up before any merge.
        "model": {
            "type": "BPE",
            "ignore_merges": SPLITS[pre] in ((_LLAMA3,), (_KIMI,)),
            "vocab": vocab,
            "merges": merges,
        },
    }


def added_token(token_id: int, content: str, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens` that matches its exact text and no spaces around it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **plain, "special": special}


def split_name(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits text; None if it has none."""
    if pre_tokenizer is None:
        return None
    found: list[str] = []
    for part in pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]:
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
            found += [part["pattern"].get("Regex", "")]
        elif part["type"] == "Digits":
            found += [_DIGIT if part["individual_digits"] else r"\p{N}+"]
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            found += [GPT2] * part.get("use_regex", True)
        else:
            return None
    escaped = [regex.replace("\r", r"\r").replace("\n", r"\n").replace(r"\"", '"') for regex in found]
    return next((name for name, splits in SPLITS.items() if list(splits) == escaped), None)
