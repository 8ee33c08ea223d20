"""tiktoken.model, the tokenizer file of Moonlight and the Kimi models: one `base64-of-the-token rank` a line.

The merges that a tokenizer.json needs follow from the ranks. tiktoken joins the neighbours whose union has the lowest
rank; within a token's own bytes that happens the same way wherever the token arises, so each token has at most one
pair of parts: what is left of its bytes after all joins of lower rank. (What no join makes is found as a whole word.)
Source: tokenization_kimi.py (pattern, special tokens from `added_tokens_decoder`, no BOS added to text), tiktoken.
"""

import base64
from itertools import pairwise
from pathlib import Path
from typing import Any

from finback.errors import UserError
from finback.text.bpe import CHAR_OF, added_token, bpe_spec

MAX_TOKEN = 1024  # bytes; keeps the work bounded whatever the file holds


def read_tiktoken(path: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of the tokenizer.json and the tokenizer_config.json that say the same. Raises UserError."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        marks = {int(i): token for i, token in config["added_tokens_decoder"].items()}
        added = [added_token(i, str(token["content"]), True) for i, token in sorted(marks.items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not usable with its tokenizer_config.json ({error!r}); copy both again") from error
    ids = [*ranks.values(), *marks]
    if len(set(ids)) != len(ids) or min(ids, default=0) < 0 or max(map(len, ranks), default=0) > MAX_TOKEN:
        raise UserError(f"{path}: two tokens share an id, or one is longer than {MAX_TOKEN} bytes; copy it again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path}: it has no token for byte {missing[0]}; copy it again")
    names = {token: "".join(CHAR_OF[byte] for byte in token) for token in ranks}
    pairs = [parts for token in sorted(ranks, key=ranks.__getitem__) if len(parts := _parts(token, ranks)) == 2]
    spec = bpe_spec(
        {names[token]: rank for token, rank in ranks.items()},
        [[names[a], names[b]] for a, b in pairs],
        added,
        "kimi-k2",
    )
    ours = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    return spec, {key: value for key, value in config.items() if key != "auto_map"} | ours


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What the bytes of `token` are joined to by the ranks below its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    none = ranks[token]
    while len(parts) > 1:
        joined = [ranks.get(left + right, none) for left, right in pairwise(parts)]
        best = min(joined)
        if best >= none:
            break
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
