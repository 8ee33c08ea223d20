"""What a configuration costs before any of it exists: parameters, cache numbers, arithmetic. All analytic."""

from dataclasses import dataclass

from finback.model.config import Config


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of one configuration, norms included and correction biases (buffers) left out.

    `active` counts what one token passes through: the chosen experts instead of all. The MTP modules are counted apart,
    as in DeepSeek's own figures; their embedding and head are the main model's.
    """

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    router: int
    routed_experts: int
    shared_experts: int
    norms: int
    mtp: int
    active_without_embedding: int

    @property
    def total(self) -> int:
        """The main model, without MTP: 671,026,404,352 for V3."""
        blocks = self.attention + self.dense_mlp + self.router + self.routed_experts + self.shared_experts
        return self.embedding + self.head + blocks + self.norms

    @property
    def active(self) -> int:
        """Parameters a token uses, the whole embedding table counted: 37.55 B for V3."""
        return self.active_without_embedding + self.embedding


def sizes(config: Config) -> Sizes:
    """Count the parameters of `config` without building it."""
    moe_layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    dense_layers = config.num_hidden_layers - moe_layers
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = moe_layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
    table = config.vocab_size * config.hidden_size
    # A tied table is counted once, as the embedding, though the head multiplies by it.
    head = 0 if config.tie_word_embeddings else table
    counts = {
        "attention": config.num_hidden_layers * attention_parameters(config),
        "dense_mlp": dense_layers * 3 * config.hidden_size * config.intermediate_size,
        "router": moe_layers * config.n_routed_experts * config.hidden_size,
        "routed_experts": moe_layers * config.n_routed_experts * expert,
        "shared_experts": moe_layers * config.n_shared_experts * expert,
        "norms": config.num_hidden_layers * _norms(config) + config.hidden_size,
    }
    active = sum(counts.values()) - idle + head
    mtp = sum(_mtp(config, config.num_hidden_layers + k) for k in range(config.num_nextn_predict_layers))
    return Sizes(embedding=table, head=head, mtp=mtp, active_without_embedding=active, **counts)


def attention_parameters(config: Config) -> int:
    """The projections of one layer's attention, biases included and norms not: 187,105,280 for V3."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    query = heads * config.query_dim
    if config.kv_lora_rank is None:
        outputs = query + 2 * config.kv_heads * config.query_dim
        return hidden * (outputs + query) + (outputs if config.family.qkv_bias else 0)
    rank = config.q_lora_rank
    queries = hidden * query if rank is None else hidden * rank + rank * query
    keys_values = hidden * config.cache_width + config.kv_lora_rank * heads * (
        config.qk_nope_head_dim + config.v_head_dim
    )
    return queries + keys_values + heads * config.v_head_dim * hidden


def cache_numbers(config: Config, mtp: bool = False) -> int:
    """Numbers cached per token: `config.cache_width` x layers, 35,136 for V3; `mtp` adds its layers."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return config.cache_width * layers


@dataclass(frozen=True)
class Memory:
    """Bytes to run a model: its weights, the cache of one context, and room for activations and the program."""

    weights: int
    cache: int
    margin: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.margin


# Bytes of a number in a packed matrix, scales included (kernels/quantise.py).
_PACKED = {"fp8": 1 + 4 / 128**2, "int8": 1 + 4 / 1024, "int4": 0.5 + 2 / 32}


def memory(
    config: Config,
    dtype_bytes: int,
    form: str | None,
    context: int,
    expert_memory: int | None = None,
    laid_out: bool = False,
) -> Memory:
    """What a model takes in memory, all its MTP modules included, with matrices in `form` ("fp8", "int8", "int4").

    `expert_memory`: the most bytes that routed experts take, the others on disk. `laid_out`: in panels for native
    kernels, where a tied head has numbers of its own. The margin is 0.3 GiB and 5 % of the weights.
    """
    count = sizes(config)
    matrices = count.attention + count.dense_mlp + count.routed_experts + count.shared_experts + count.mtp
    packed, head = _bytes_of(dtype_bytes, form)
    if config.tie_word_embeddings and form in (None, "fp8") and not laid_out:
        head = 0
    weights = matrices * packed + (count.embedding + count.norms) * dtype_bytes + count.router * 4
    weights += count.embedding * head
    if expert_memory is not None:
        experts = (count.routed_experts + _mtp_experts(config)) * packed
        weights -= max(experts - expert_memory, 0)
    cache = cache_numbers(config, mtp=True) * min(context, config.max_position_embeddings) * dtype_bytes
    return Memory(int(weights), cache, int(0.3 * 2**30 + 0.05 * weights))


def bytes_read(config: Config, rows: int, dtype_bytes: int, form: str | None = None) -> float:
    """Bytes of weights that one pass over `rows` tokens must read at least, in `form` as in `memory`; MTP left out.

    Every token chooses K of E experts, any as likely as another: E (1 - (1 - K/E)^rows) distinct ones a layer are
    expected. Of the embedding only the rows' own lines are read.
    """
    count = sizes(config)
    packed, head_bytes = _bytes_of(dtype_bytes, form)
    chosen = config.num_experts_per_tok / config.n_routed_experts if count.routed_experts else 0.0
    routed = count.routed_experts * (1 - (1 - chosen) ** rows)
    matrices = count.attention + count.dense_mlp + count.shared_experts + routed
    plain = count.norms + rows * config.hidden_size
    return matrices * packed + plain * dtype_bytes + count.router * 4 + count.embedding * head_bytes


def flops_per_token(config: Config, context: int) -> int:
    """Floating-point operations of one forward token that attends to `context` tokens, itself included.

    Two per multiplied weight (head included, norms and the embedding's gather not), plus the naive form's scores and
    mixing. A training step costs about three times this. MTP left out.
    """
    counts = sizes(config)
    head = config.vocab_size * config.hidden_size
    weights = counts.active_without_embedding - counts.norms - counts.head + head
    value = config.query_dim if config.kv_lora_rank is None else config.v_head_dim
    per_pair = config.num_attention_heads * (config.query_dim + value)
    return 2 * weights + 2 * config.num_hidden_layers * per_pair * context


def _bytes_of(dtype_bytes: int, form: str | None) -> tuple[float, float]:
    """Bytes of a number in the layers' matrices and in the head, which is as large as the embedding."""
    return _PACKED.get(form or "", dtype_bytes), dtype_bytes if form in (None, "fp8") else _PACKED["int8"]


def _norms(config: Config) -> int:
    """Norm weights of one layer: before attention, before the feed-forward, and on the latents."""
    return 2 * config.hidden_size + (config.kv_lora_rank or 0) + (config.q_lora_rank or 0)


def _mtp_experts(config: Config) -> int:
    """Parameters of the MTP modules' routed experts."""
    layers = sum(config.is_moe(config.num_hidden_layers + k) for k in range(config.num_nextn_predict_layers))
    return layers * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size


def _mtp(config: Config, layer: int) -> int:
    hidden = config.hidden_size
    if config.is_moe(layer):
        experts = config.n_routed_experts + config.n_shared_experts
        feed_forward = experts * 3 * hidden * config.moe_intermediate_size + config.n_routed_experts * hidden
    else:
        feed_forward = 3 * hidden * config.intermediate_size
    return 2 * hidden * hidden + 3 * hidden + attention_parameters(config) + _norms(config) + feed_forward
