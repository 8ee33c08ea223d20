"""The same blocks in native calls, on weights that lie in panels: all layers in one, or two calls a block.

They take the residual stream in bfloat16 and add to it in place: nothing between the matrices is seen by Python.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finback.kernels import native, panels
from finback.model.attention import Context, LatentAttention, Pages
from finback.model.block import Block
from finback.model.decoder import Decoder, Model
from finback.model.linear import MLP, RMSNorm
from finback.model.moe import MoE, Routing
from finback.model.weight import DenseWeight, PackedWeight, PanelWeight, Weight

_LARGEST = 1024  # numbers of a head, or of a latent's roped key, that kernels have room for


def lay_out(model: nn.Module) -> bool:
    """Put every bfloat16 or packed matrix of a model on the CPU into panels, one at a time; fuse its blocks.

    Does nothing, and says False, where there are no native kernels. Such a model cannot be trained.
    """
    if native.kernels() is None:
        return False
    _into_panels(model, _fits)
    if laid := any(isinstance(module, PanelWeight) for module in model.modules()):
        model.requires_grad_(False)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.fused = Fused.of(block)
    for decoder in (module for module in model.modules() if isinstance(module, Decoder)):
        decoder.fused = FusedLayers.of(decoder)
    return laid


def make_room(model: Model) -> None:
    """Give a model on the meta device, to be read in bfloat16, empty panels: then `lay_out` finds them filled.

    A tied head that is not packed waits for `lay_out`: a checkpoint has its numbers as the embedding alone.
    """
    if native.kernels() is not None:
        table = model.decoder.embed_tokens.weight
        weights = {weight for weight in model.modules() if isinstance(weight, Weight)}
        shared = {weight for weight in weights if weight.form is None and weight.dense() is table}
        _into_panels(model, (weights - shared).__contains__)


def _into_panels(model: nn.Module, fits: Callable[[nn.Module], bool]) -> None:
    for mlp in [module for module in model.modules() if isinstance(module, MLP)]:
        _by_turns(mlp, fits)
    owners = [(owner, name) for owner in model.modules() for name, weight in owner.named_children() if fits(weight)]
    for owner, name in owners:
        setattr(owner, name, PanelWeight(getattr(owner, name)))


def _by_turns(mlp: Any, fits: Callable[[nn.Module], bool]) -> None:
    """Gate and up projection share memory, a panel of each by turns: one pass has a number of both together."""
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    if fits(gate) and fits(up) and gate.form is up.form:
        rows, size = PanelWeight.area(gate)
        both = native.memory(2 * rows, size)
        mlp.gate_proj.weight, mlp.up_proj.weight = PanelWeight(gate, both[::2]), PanelWeight(up, both[1::2])


def _fits(weight: nn.Module) -> bool:
    if isinstance(weight, DenseWeight):
        value = weight.value
        return value.dtype == torch.bfloat16 and value.device.type == "cpu" and not value.is_meta
    return isinstance(weight, PackedWeight) and weight.codes.device.type == "cpu" and weight.dtype == torch.bfloat16


class Fused:
    """A block's attention and its feed-forward."""

    def __init__(self, block: Any) -> None:
        self.block = block
        kind = FusedLatent if isinstance(block.self_attn, LatentAttention) else FusedGrouped
        self.attention = kind(native.kernels(), block.input_layernorm, block.self_attn)
        self.feed_forward = FusedFeedForward(block.post_attention_layernorm, block.mlp)

    @classmethod
    def of(cls, block: Block) -> "Fused | None":
        """None where a matrix of the block is not in panels, their forms differ, or a head has an odd size."""
        weights = [module for module in block.modules() if isinstance(module, Weight)]
        alike = len({(type(weight), weight.form) for weight in weights}) == 1
        config = block.self_attn.config
        sizes = [config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank, config.query_dim]
        even = all(size is None or size % 2 == 0 for size in sizes) and config.query_dim <= _LARGEST
        return cls(block) if alike and even and isinstance(weights[0], PanelWeight) else None

    def takes(self, x_BTD: Tensor) -> bool:
        """Whether the calls below do what is asked."""
        return x_BTD.dtype == torch.bfloat16 and not torch.is_grad_enabled() and not self.block.training

    def __call__(self, x_BTD: Tensor, context: Context, routing: Routing | None) -> Tensor:
        """As the block's own forward."""
        block = self.block
        pages = None if context.cache is None else context.cache.pages(block.self_attn.layer)
        if pages is None:
            x_BTD = x_BTD + block.self_attn(block.input_layernorm(x_BTD), context)
        else:
            x_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
            self.attention(x_BTD, context.turn, pages)
        self.feed_forward(x_BTD, block.self_attn.layer, routing)
        return x_BTD


class FusedLayers:
    """All blocks of a decoder, over cached sequences."""

    def __init__(self, blocks: list[Any]) -> None:
        module = native.kernels()
        assert module is not None
        self.blocks, self.call = blocks, module.Layers()
        for block in blocks:
            self.call.add(block.fused.attention.call, block.fused.feed_forward.call)
        mixtures = [block for block in blocks if isinstance(block.mlp, MoE)]
        self.mixtures = [block.self_attn.layer for block in mixtures]
        self.chosen = mixtures[0].mlp.gate.config.num_experts_per_tok if mixtures else 0

    @classmethod
    def of(cls, decoder: Decoder) -> "FusedLayers | None":
        """None where a block has no native calls."""
        blocks: list[Any] = list(decoder.layers.values())
        return cls(blocks) if blocks and all(block.fused is not None for block in blocks) else None

    def __call__(self, x_BTD: Tensor, context: Context, routing: Routing | None) -> Tensor | None:
        """The residual stream after all layers; None where they must run one by one."""
        if context.cache is None or routing or not self.blocks[0].fused.takes(x_BTD):
            return None
        all_pages = [context.cache.pages(block.self_attn.layer) for block in self.blocks]
        if (pages := all_pages[0]) is None:
            return None
        caches = [each.entries_SC.data_ptr() for each in all_pages if each is not None]
        x_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
        rows = x_BTD.numel() // x_BTD.shape[-1]
        experts = 0
        if routing is not None and self.mixtures:
            choices = torch.empty(len(self.mixtures), rows, self.chosen, dtype=torch.int64)
            experts = choices.data_ptr()
            routing.update(zip(self.mixtures, choices, strict=True))
        where = addresses(context.turn, pages)
        self.call(x_BTD.data_ptr(), rows, where[0], caches, *where[1:], experts, torch.get_num_threads())
        return x_BTD


def addresses(turn: Tensor, pages: Pages) -> tuple[int, ...]:
    """What a call must know of rotation and pages besides the entries."""
    assert turn.dtype == torch.complex64 and turn.is_contiguous() and pages.entries_SC.dtype == torch.bfloat16
    where = (each.data_ptr() for each in pages[1:5])
    kinds = (pages.single_n.data_ptr(), len(pages.single_n), pages.spans_s4.data_ptr(), len(pages.spans_s4))
    return (turn.data_ptr(), *where, *kinds)


class FusedFeedForward:
    """x + mlp(norm(x)) of one block, dense or a mixture."""

    def __init__(self, norm: RMSNorm, mlp: Any) -> None:  # Any: its weights are known to be in panels
        module = native.kernels()
        assert module is not None
        self.call = call = module.FeedForward()
        self._kept: list[Tensor] = []
        call.hidden, call.eps, call.norm = norm.weight.numel(), norm.eps, self._floats(norm.weight)
        shared = mlp if isinstance(mlp, MLP) else mlp.shared_experts
        if shared is not None:
            gate: Any = shared.gate_proj.weight
            down: Any = shared.down_proj.weight
            call.shared_width = gate.rows
            call.shared_gate_up = self._both(gate.panels, gate)
            call.shared_down = down.matrix()
        if isinstance(mlp, MoE):
            self._mixture(mlp)

    def _mixture(self, mlp: Any) -> None:
        call, config, experts = self.call, mlp.gate.config, mlp.experts
        call.experts, call.chosen = config.n_routed_experts, config.num_experts_per_tok
        call.width = config.moe_intermediate_size
        call.gate_up = self._both(experts.gate_up.panels[0, ::2], experts.gate_up)
        call.down = experts.down.matrix((0, 0))
        call.gate_up_bytes, call.down_bytes = experts.gate_up.panels[0].numel(), experts.down.panels[0].numel()
        call.router = self._floats(mlp.gate.weight)
        bias = mlp.gate.e_score_correction_bias
        call.bias = 0 if bias is None else self._floats(bias)
        call.softmax, call.normalise = config.scoring_func != "sigmoid", config.norm_topk_prob
        limited = config.n_group > 1 and config.topk_method != "greedy"
        call.groups, call.kept_groups = (config.n_group, config.topk_group) if limited else (1, 1)
        call.group_best, call.factor = 1 if bias is None else 2, config.routed_scaling_factor

    @staticmethod
    def _both(gate_PB: Tensor, weight: PanelWeight) -> Any:
        """Gate and up panels by turns, as one matrix: the gate's panels are every other one."""
        together = gate_PB.as_strided((2 * len(gate_PB), gate_PB.shape[1]), (gate_PB.shape[1], 1))
        assert gate_PB.stride(0) == 2 * gate_PB.shape[1]
        return native.matrix(weight.name, len(together) * panels.PANEL, weight.cols, together)

    def _floats(self, values: Tensor) -> int:
        self._kept.append(values.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def __call__(self, x_BTD: Tensor, layer: int, routing: Routing | None) -> None:
        """Adds to x, in place; the choice of experts is recorded in `routing`, or replayed from it."""
        rows = x_BTD.numel() // x_BTD.shape[-1]
        experts, replay = None, False
        if routing is not None and self.call.experts:
            replay = layer in routing
            experts = routing[layer].contiguous() if replay else torch.empty(rows, self.call.chosen, dtype=torch.int64)
            routing[layer] = experts
        address = 0 if experts is None else experts.data_ptr()
        self.call(x_BTD.data_ptr(), rows, address, replay, torch.get_num_threads())


class FusedAttention:
    """x + attention(norm(x)) over cached sequences, single tokens and long spans of the same pass."""

    def __init__(self, call: Any, norm: RMSNorm, attention: Any) -> None:
        self.call = call
        self._kept: list[Any] = []
        call.hidden, call.heads = attention.config.hidden_size, attention.config.num_attention_heads
        call.eps, call.scale, call.norm = norm.eps, attention.scale, self._floats(norm.weight)
        call.output = attention.o_proj.weight.matrix()

    def _floats(self, values: Tensor | None) -> int:
        if values is None:
            return 0
        self._kept.append(values.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def __call__(self, x_BTD: Tensor, turn: Tensor, pages: Pages) -> None:
        """Adds to x, in place, after writing the tokens' entries into the cache."""
        rows, where = x_BTD.numel() // x_BTD.shape[-1], addresses(turn, pages)
        entries = pages.entries_SC.data_ptr()
        self.call(x_BTD.data_ptr(), rows, where[0], entries, *where[1:], torch.get_num_threads())


class FusedLatent(FusedAttention):
    """Latent attention: single tokens in the absorbed form, long spans in the naive one."""

    def __init__(self, module: Any, norm: RMSNorm, attention: Any) -> None:
        super().__init__(module.Latent(), norm, attention)
        call, config = self.call, attention.config
        call.nope, call.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        call.value, call.rank = config.v_head_dim, attention.rank
        call.latent_eps = attention.kv_a_layernorm.eps
        call.kv_norm = self._floats(attention.kv_a_layernorm.weight)
        if config.q_lora_rank is None:
            call.q_b = attention.q_proj.weight.matrix()
        else:
            call.q_a, call.q_b = attention.q_a_proj.weight.matrix(), attention.q_b_proj.weight.matrix()
            call.q_norm = self._floats(attention.q_a_layernorm.weight)
        call.kv_a = attention.kv_a_proj_with_mqa.weight.matrix()
        weight_HXL = attention.kv_b_proj.weight.dense().bfloat16().unflatten(0, (call.heads, -1))
        call.key_up, call.key_up_bytes = self._heads(weight_HXL[:, : call.nope].transpose(1, 2))
        call.key_rows, call.key_rows_bytes = self._heads(weight_HXL[:, : call.nope])
        call.value_up, call.value_up_bytes = self._heads(weight_HXL[:, call.nope :])

    def _heads(self, weight_HRC: Tensor) -> tuple[Any, int]:
        heads, rows, cols = weight_HRC.shape
        held = native.memory(heads, -(-rows // panels.PANEL), panels.panel_bytes(None, cols))
        for matrix_RC, place in zip(weight_HRC, held, strict=True):
            native.lay(None, matrix_RC.contiguous(), None, cols, place)
        self._kept.append(held)
        return native.matrix(None, rows, cols, held[0]), held[0].numel()


class FusedGrouped(FusedAttention):
    """Attention whose heads share keys and values in groups."""

    def __init__(self, module: Any, norm: RMSNorm, attention: Any) -> None:
        super().__init__(module.Grouped(), norm, attention)
        call, config = self.call, attention.config
        call.kv_heads, call.head_dim = config.kv_heads, config.query_dim
        call.query, call.query_bias = attention.q_proj.weight.matrix(), self._floats(attention.q_proj.bias)
        call.key, call.key_bias = attention.k_proj.weight.matrix(), self._floats(attention.k_proj.bias)
        call.value, call.value_bias = attention.v_proj.weight.matrix(), self._floats(attention.v_proj.bias)
