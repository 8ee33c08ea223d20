"""The inside of a step: one pass of the model over the planned work, and the tokens that come of it."""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from finback.engine.batch import flat, tile, tiles
from finback.engine.cache import PagedCache
from finback.engine.request import Request
from finback.engine.sampling import choose_rows
from finback.engine.scheduler import Work
from finback.errors import UserError
from finback.kernels import dispatch
from finback.model import Model, Routing


@dataclass
class Line:
    """A request whose next token is due: rows first .. first + count - 1 of the pass's logits follow its last tokens.

    before: how many ids it had.
    """

    request: Request
    first: int
    count: int
    before: int


class Runner:
    """Runs passes of `model` on `cache`. invariant: a block of one request at a time, in one order of sums."""

    def __init__(self, model: Model, cache: PagedCache, eos_ids: Set[int | None], invariant: bool) -> None:
        self.model, self.cache, self.eos_ids, self.invariant = model, cache, eos_ids, invariant

    def hidden(self, works: Sequence[Work]) -> dict[Request, Tensor]:
        """Final hidden states [count, D] of every work; the cache has the entries afterwards."""
        parts = [part for work in works for part in tiles(work)] if self.invariant else []
        batches = [tile(self.cache, part) for part in parts] if self.invariant else [flat(self.cache, works)]
        found: dict[Request, list[Tensor]] = {}
        for batch in batches:
            routing: Routing | None = {} if any(w.request.routing is not None for w in batch.works) else None
            with _evaluating(self.model), dispatch.fixed_order(self.invariant):
                hidden_1ND = self.model.decoder(
                    batch.ids_1N, positions=batch.positions_1N, cache=batch.view, routing=routing
                )
            for work, span in zip(batch.works, batch.spans, strict=True):
                found.setdefault(work.request, []).append(hidden_1ND[0, span])
                work.request.record(routing or {}, span, work.start)
        return {request: rows[0] if len(rows) == 1 else torch.cat(rows) for request, rows in found.items()}

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores [N, V], float32."""
        with dispatch.fixed_order(self.invariant):
            if self.invariant:
                # Copies: where a row lies in memory changes the last bits of its products.
                return torch.cat([self.model.decoder.logits(row_1D.clone()) for row_1D in hidden_ND.split(1)])
            return self.model.decoder.logits(hidden_ND)

    def choose(self, lines: Sequence[Line], logits_NV: Tensor) -> None:
        """Draw tokens for every line, as long as the draft that the next row was computed from is the token drawn."""
        vocab_size = self.model.config.vocab_size
        turn, number = list(lines), 0
        while turn:
            rows, asked = [], []
            for line in turn:
                with _failing_alone(line.request):
                    rows.append(line.request.row(vocab_size))
                    asked.append(line)
            picked = logits_NV[[line.first + number for line in asked]]
            turn = []
            for line, choice in zip(asked, choose_rows(picked, rows), strict=True):
                request = line.request
                if isinstance(choice, UserError):
                    request.finish("error", str(choice))
                    continue
                with _failing_alone(request):
                    request.accept(choice, self.eos_ids)
                    if not request.done and number + 1 < line.count and request.drafts[number] == choice.token:
                        turn.append(line)
            number += 1

    def observe_prompt(self, work: Work, hidden_ND: Tensor) -> None:
        """Log-probabilities and embedding of a prompt, if the request asks for them."""
        request, last = work.request, work.request.prompt_tokens - 1
        inside = max(0, min(work.start + work.count, last) - work.start)
        if request.prompt_logprobs is not None and inside:
            logprobs_NV = self.logits(hidden_ND[:inside]).double().log_softmax(-1)
            ids = torch.tensor(request.ids[work.start + 1 : work.start + 1 + inside], device=hidden_ND.device)
            # Put in its place, not appended: a step that was cut off is made again.
            request.prompt_logprobs[work.start :] = logprobs_NV.gather(1, ids[:, None])[:, 0].tolist()
        if request.wishes.embedding and work.start <= last < work.start + work.count:
            request.embedding = hidden_ND[last - work.start].float().clone()


@contextmanager
def _failing_alone(request: Request) -> Iterator[None]:
    """What goes wrong with one request's tokens ends that request, and no other."""
    try:
        yield
    except Exception as error:
        request.finish("error", f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error))


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """The model in eval mode for a while: in training mode routers would count these tokens."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
