"""A whole model trained through native kernels: plain torch's loss curve and gradients, with every kernel in it."""

import pytest
import torch
from native_paths import native_paths
from tiny_model import tiny, tokens
from torch import Tensor

from finback.kernels import dispatch, native
from finback.model import Model

PATHS = pytest.mark.parametrize("path", native_paths())
STEPS, RATE = 12, 3e-3
KERNELS = ("_NativeNorm", "_NativeRotate", "_KeysValues", "_Compiled", "_NativeExpertFFN", "_Swiglu", "_Scores")


@pytest.fixture(autouse=True)
def _best_path_again():
    yield
    native.use(None)


def make() -> tuple[Model, Tensor]:
    model = Model(tiny(num_nextn_predict_layers=0, initializer_range=0.1))
    model.init_weights(0)
    return model.train(), tokens(4, 24, seed=5)


def loss_of(model: Model, ids: Tensor, routing: dict | None = None, narrow: bool = True) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
        hidden = model.decoder(ids[:, :-1], routing=routing).flatten(0, 1)
        head = model.decoder.lm_head.weight.dense()
        return dispatch.cross_entropy(hidden, head, ids[:, 1:].flatten()) / ids[:, 1:].numel()


def curve(path: str, choices: list[dict]) -> list[float]:
    """Losses, with each step's choice of experts recorded in `choices` or replayed from them: a flip is no difference
    between kernels."""
    native.use(path)
    model, ids = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for routing in choices:
        loss = loss_of(model, ids, routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def names(node, seen: set) -> set[str]:
    """The names of all functions that a loss came by."""
    found, ahead = set(), [node]
    while ahead:
        here = ahead.pop()
        if here is not None and here not in seen:
            seen.add(here)
            found.add(type(here).__name__)
            ahead += [function for function, _ in here.next_functions]
    return found


@PATHS
def test_the_loss_curve_is_plain_torchs(path):
    choices: list[dict] = [{} for _ in range(STEPS)]
    theirs, ours = curve("torch", choices), curve(path, choices)
    assert theirs[-1] < 0.7 * theirs[0]  # it learns something
    for mine, plain in zip(ours, theirs, strict=True):
        assert abs(mine - plain) <= 2**-8 * plain  # as far as bfloat16 rounds a number


@PATHS
def test_gradients_of_a_whole_model(path):
    """Every parameter's, of the same choice of experts, beside float32: about as near to it as plain torch's are."""
    grads: dict[str, Tensor] = {}
    routing: dict = {}
    for way in ("float32", "torch", path):
        native.use("torch" if way == "float32" else way)
        model, ids = make()
        loss = loss_of(model, ids, routing, narrow=way != "float32")  # the first records, the others replay
        if way == path:
            used = names(loss.grad_fn, set())
            for kernel in KERNELS:
                assert any(kernel in name for name in used), (kernel, used)
        loss.backward()
        grads[way] = torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])
    ours, theirs = ((grads[way] - grads["float32"]).norm() / grads["float32"].norm() for way in (path, "torch"))
    assert ours <= 1.5 * theirs and theirs < 0.1
