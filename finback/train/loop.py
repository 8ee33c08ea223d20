"""The training loop: stages of steps, from a recipe to a model folder."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finback import progress
from finback.engine import Engine
from finback.errors import UserError
from finback.evaluate import evaluate
from finback.train import checkpoint, losses, run
from finback.train.checkpoint import Checkpoint
from finback.train.data import Batch, Conversations, Examples, Stream
from finback.train.guard import first_bad_tensor
from finback.train.optim import Optimizers, learning_rate
from finback.train.pretrain import PretrainStream
from finback.train.recipe import Recipe, Stage
from finback.train.sft import SftStream


@dataclass
class Totals:
    """What has been done so far, over all stages."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """One run in `folder`. After each step everything needed to go on is in the model, the optimisers and `totals`."""

    def __init__(self, recipe: Recipe, folder: Path, resume: bool) -> None:
        self.recipe, self.folder = recipe, folder
        self.start: Checkpoint | None = run.open_folder(folder, recipe, resume)
        self.tokenizer = run.make_tokenizer(recipe, folder)
        self.model = run.make_model(recipe, self.tokenizer)
        self.totals = Totals()
        self.stopping = False
        if self.start is not None:
            self.start.restore_model(self.model)
            state = self.start.state
            self.totals = Totals(self.start.step, state["tokens"], state["seconds"])

    def run(self) -> Path:
        """Train all stages that are not behind us; returns the folder of the finished model.

        Ctrl-C finishes the step, writes a checkpoint and raises SystemExit(130).
        """
        with self._interrupts():
            end = 0
            for stage in self.recipe.stages:
                first, end = end, end + stage.steps
                if self.totals.step < end:
                    self._stage(stage, first, end)
        numbers = vars(self.totals)
        return run.save_model(self.recipe, self.model, self.tokenizer, self.folder, numbers)

    def _stage(self, stage: Stage, first: int, end: int) -> None:
        optimizers = Optimizers(self.model, stage.optimizer)
        state: dict[str, Any] = {}
        if self.start is not None and self.totals.step > first:
            optimizers.load(self.start.optimizer_tensors())
            state = self.start.state["data"]
        stream = self._stream(stage, state)
        began, since, read = time.perf_counter(), time.perf_counter(), self.totals.tokens
        before = self.totals.seconds
        with progress.bar(stage.steps, stage.name, done=self.totals.step - first) as bar:
            while self.totals.step < end:
                record = self._step(stage, optimizers, stream.batch(), self.totals.step - first)
                now = time.perf_counter()
                self.totals.seconds = before + now - began
                step = self.totals.step
                if step % stage.log_every == 0 or step == end:
                    record |= {"tokens_per_s": (self.totals.tokens - read) / (now - since), **vars(self.totals)}
                    self._log(stage, record, stream.state)
                    since, read = now, self.totals.tokens
                    shown = ("loss", "lr", "load", "tokens_per_s")
                    bar.advance(0, **{name: record[name] for name in shown})
                bar.advance()
                if stage.eval_every and step % stage.eval_every == 0:
                    self._evaluate(stage)
                if self.stopping or step == end or step % stage.checkpoint_every == 0:
                    self._save(optimizers, stream, step == end)
                if self.stopping:
                    self._leave()

    def _stream(self, stage: Stage, state: dict[str, Any]) -> Stream:
        examples = Examples(Conversations(stage, self.recipe.seed), self.tokenizer)
        ahead = 1 + self.model.config.num_nextn_predict_layers
        if stage.kind == "pretrain":
            return PretrainStream(examples, stage.batch, stage.sequence, ahead, state)
        return SftStream(examples, stage.batch, stage.sequence, ahead, self.tokenizer.pad_id, state)

    def _step(self, stage: Stage, optimizers: Optimizers, batch: Batch, local: int) -> dict[str, Any]:
        """One update; returns what the log says about it."""
        counts = losses.denominators(batch, self.model.config.num_nextn_predict_layers)
        sums = torch.zeros(3)
        for part in batch.parts(stage.accumulation):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=stage.dtype == "bfloat16"):
                terms = losses.compute(self.model, part, counts, stage.accumulation, stage)
            terms.total.backward()
            sums += torch.stack((terms.next_token, terms.mtp, terms.balance))
        loss, mtp, balance = sums.tolist()
        norm = float(optimizers.clip())
        if not math.isfinite(norm + loss + mtp + balance):
            raise self._not_finite(stage, batch)
        share = learning_rate(stage.optimizer, local, stage.steps)
        optimizers.step(share)
        load = losses.update_biases(self.model, stage.bias_gamma)
        self.totals.step += 1
        self.totals.tokens += batch.tokens()
        return {
            "loss": loss,
            "mtp": mtp,
            "balance": balance,
            "grad_norm": norm,
            "lr": stage.optimizer.lr * share,
            "load": load,
        }

    def _log(self, stage: Stage, record: dict[str, Any], data: dict[str, Any]) -> None:
        dropped = {"dropped": data["dropped"]} if data.get("dropped") else {}
        line = {"step": self.totals.step, "stage": stage.name, **record, **dropped}
        run.write_log(self.folder / "log.jsonl", line)

    def _evaluate(self, stage: Stage) -> None:
        """Greedy pass@1 on a few held-out problems of the stage's tasks, into the log."""
        engine = Engine(self.model.eval(), self.tokenizer)
        longest = max(stage.sequence for stage in self.recipe.stages)  # a model may not have learned to stop
        names = [name for name, weight in stage.tasks.items() if weight > 0]
        scores = evaluate(engine, names, stage.eval_n, self.recipe.seed, max_tokens=longest)["tasks"]
        self.model.train()
        line = {"step": self.totals.step, "stage": stage.name, "eval": {k: v["pass@1"] for k, v in scores.items()}}
        run.write_log(self.folder / "log.jsonl", line)

    def _save(self, optimizers: Optimizers, stream: Stream, stage_end: bool) -> None:
        """Write a checkpoint; a finished stage leaves no optimiser or data position to its successor."""
        state = {
            "tokens": self.totals.tokens,
            "seconds": self.totals.seconds,
            "data": {} if stage_end else stream.state,
            "recipe": self.recipe.canonical(),
        }
        root = self.folder / "checkpoints"
        checkpoint.save(root, self.totals.step, self.model, {} if stage_end else optimizers.tensors(), state)
        ends = [sum(s.steps for s in self.recipe.stages[: n + 1]) for n in range(len(self.recipe.stages))]
        checkpoint.prune(root, ends)

    def _not_finite(self, stage: Stage, batch: Batch) -> UserError:
        examples = batch.examples()
        return UserError(
            f"stage {stage.name}, step {self.totals.step + 1}: {first_bad_tensor(self.model, batch)} is not finite, "
            f"with examples {examples[0]}..{examples[-1]} of the stage; the weights were not updated. "
            "Lower optimizer.lr or raise optimizer.warmup; earlier checkpoints are intact"
        )

    def _leave(self) -> None:
        where = f"{self.folder / 'checkpoints'}/step-{self.totals.step}"
        print(f"Stopped after step {self.totals.step}; {where} is written. Add --resume to go on.", file=sys.stderr)
        raise SystemExit(130)

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C asks for a stop after the step; the second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(_signal: int, _frame: object) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            print("Finishing this step and writing a checkpoint; Ctrl-C again to stop at once.", file=sys.stderr)

        old = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)
