"""Where a matrix stands in a model: what it does, and in which layer. File formats that mix types go by it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from stillknows.lazy import nn
from stillknows.model.layers import Linear, blocks, linears

Role = Literal[
    "embedding",
    "query",
    "key",
    "value",
    "query_key_value",
    "attention_output",
    "gate",
    "up",
    "down",
    "output",
    "unknown",
]
# Last words of module names; a fused gate and up counts as up.
ROLES: dict[str, Role] = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "qkv_proj": "query_key_value",
    "query_key_value": "query_key_value",
    "attn.c_attn": "query_key_value",
    "o_proj": "attention_output",
    "self_attn.dense": "attention_output",
    "attention.dense": "attention_output",
    "attn.c_proj": "attention_output",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "up",
    "mlp.fc1": "up",
    "mlp.c_fc": "up",
    "mlp.dense_h_to_4h": "up",
    "down_proj": "down",
    "mlp.fc2": "down",
    "mlp.c_proj": "down",
    "mlp.dense_4h_to_h": "down",
}


class MatrixRole(NamedTuple):
    """The place of one matrix.

    role: what it does; "output" for one that is the embedding as well.
    layer: its decoder block, from 0; 0 for embedding and output layer.
    layers: decoder blocks of the model.
    sharing: query heads that share a key head.
    family: model type, as transformers names it.
    experts: of a mixture of experts; 0 in a dense model.
    """

    role: Role
    layer: int
    layers: int
    sharing: int
    family: str
    experts: int


def placed(model: nn.Module) -> Iterator[tuple[Linear, MatrixRole]]:
    """Yield embedding, linear maps and output layer with their places; weights that two of them share once."""
    config = model.config.get_text_config()  # type: ignore[union-attr]
    heads = getattr(config, "num_attention_heads", 1)
    sharing = heads // (getattr(config, "num_key_value_heads", None) or heads)
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    depth = getattr(config, "num_hidden_layers", None) or len(blocks(model))
    general = (depth, sharing, config.model_type, next(filter(None, counts), 0))

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    if embedding.weight is not head.weight:
        yield Linear(names[id(embedding)], embedding, transposed=False), MatrixRole("embedding", 0, *general)
    for layer in linears(model):
        yield layer, MatrixRole(role_of(layer.name), number_of(layer.name), *general)
    yield Linear(names[id(head)], head, transposed=False), MatrixRole("output", 0, *general)


def role_of(name: str) -> Role:
    """Return what a module does, by its name."""
    for words, role in ROLES.items():
        if name.endswith(f".{words}"):
            return role
    return "unknown"


def number_of(name: str) -> int:
    """Return the decoder block, from 0, that a module is in, by its name; 0 where there is none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0
