"""DeepSeekMoE: V3's router with auxiliary-loss-free balancing (V3 TR 2.1.2), V2's and the first one's (V2 TR 2.2).

Checkpoint behaviour where paper and files differ.
"""

import torch
from torch import Tensor, nn

from finback.kernels import dispatch
from finback.model.config import Config
from finback.model.linear import MLP, Experts

Routing = dict[int, Tensor]
"""Chosen experts [N, K] of each MoE layer, by absolute layer index: recorded where absent, replayed where present."""


class Router(nn.Module):
    """Affinities in fp32, sigmoid or softmax, and group-limited top-k of them.

    Where the config's `topk_method` is "noaux_tc" a correction bias selects and never weighs; elsewhere it is None.
    After a forward call in training mode, `balance_loss` is the sequence-wise loss of V3 TR eq. 17–20 without its
    alpha, and `load` has grown by the number of tokens each expert received.
    """

    e_score_correction_bias: Tensor | None
    load: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        corrected = config.topk_method == "noaux_tc"
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts) if corrected else None)
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)
        self.balance_loss: Tensor | None = None

    def forward(self, x_BTD: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor]:
        """Returns the chosen experts and their weights, both [N, K] with N = B·T."""
        logits_NE = dispatch.scores(x_BTD.flatten(0, 1), self.weight)
        scores_NE = logits_NE.sigmoid() if self.config.scoring_func == "sigmoid" else logits_NE.softmax(-1)
        if routing is not None and self.layer in routing:
            experts_NK = routing[self.layer]
        else:
            experts_NK = self.select(scores_NE.detach() if scores_NE.requires_grad else scores_NE)
            if routing is not None:
                routing[self.layer] = experts_NK
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self._observe(scores_NE, experts_NK, x_BTD.shape[0])
        # V3 normalises and scales; the older ones scale exactly what they do not normalise.
        if self.config.scoring_func == "softmax" and self.config.norm_topk_prob:
            return experts_NK, weights_NK
        return experts_NK, weights_NK * self.config.routed_scaling_factor

    def select(self, scores_NE: Tensor) -> Tensor:
        """Top-k among the `topk_group` best groups; the rest count as -inf.

        V3: of score + bias, groups by the sum of their two best. V2: of the score, groups by their best.
        """
        bias = self.e_score_correction_bias
        choice_NE = scores_NE if bias is None else scores_NE + bias
        groups = self.config.n_group
        if groups > 1 and self.config.topk_method != "greedy":
            grouped = choice_NE.unflatten(1, (groups, -1))
            group_scores = grouped.topk(1 if bias is None else 2, dim=-1).values.sum(-1)
            kept = group_scores.topk(self.config.topk_group, dim=-1, sorted=False).indices
            dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
            choice_NE = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        return choice_NE.topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices

    def _observe(self, scores_NE: Tensor, experts_NK: Tensor, sequences: int) -> None:
        n_experts, chosen = self.config.n_routed_experts, self.config.num_experts_per_tok
        tokens = len(scores_NE) // sequences
        counts_BE = torch.zeros(sequences, n_experts, device=scores_NE.device)
        picks = experts_NK.reshape(sequences, -1)
        counts_BE.scatter_add_(1, picks, torch.ones_like(picks, dtype=counts_BE.dtype))
        self.load += counts_BE.sum(0)
        share_BE = (scores_NE / scores_NE.sum(-1, keepdim=True)).unflatten(0, (sequences, -1)).mean(1)
        frequency_BE = counts_BE * (n_experts / (chosen * tokens))
        self.balance_loss = (frequency_BE * share_BE).sum(-1).mean()


class MoE(nn.Module):
    """Routed experts plus the shared ones, which see every token and are not scaled."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.gate = Router(config, layer)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, width) if width else None

    def forward(self, x_BTD: Tensor, routing: Routing | None = None) -> Tensor:
        experts_NK, weights_NK = self.gate(x_BTD, routing)
        routed_ND = self.experts(x_BTD.flatten(0, 1), experts_NK, weights_NK)
        routed_BTD = routed_ND.view_as(x_BTD)
        return routed_BTD if self.shared_experts is None else routed_BTD + self.shared_experts(x_BTD)
