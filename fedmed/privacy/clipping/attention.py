"""``torch.nn.MultiheadAttention``, taken apart into projections and attention proper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.linear import linear
from fedmed.privacy.clipping.tape import REMEDY, Tape


def multi_head_attention(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001 - torch's signature
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # noqa: ARG001 - only a hint; attn_mask comes with it
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward``, tensors ``[L, N, E]``."""
    if bias_k is not None or bias_v is not None or static_k is not None or static_v is not None:
        raise IncompatibleModel("MultiheadAttention with bias_kv or static keys", REMEDY)
    if add_zero_attn or query.ndim != 3:
        raise IncompatibleModel("MultiheadAttention with add_zero_attn or without a batch", REMEDY)
    same = key is query and value is query
    by_sample = [t.transpose(0, 1) for t in ((query,) if same else (query, key, value))]
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
    elif same:
        weights = [in_proj_weight]
    else:
        weights = _thirds(tape, in_proj_weight)
    if same and not use_separate_proj_weight:
        projected = linear(tape, by_sample[0], in_proj_weight, in_proj_bias).chunk(3, dim=-1)  # type: ignore[arg-type]
    else:
        biases = _thirds(tape, in_proj_bias) if in_proj_bias is not None else [None] * 3
        inputs = by_sample * 3 if same else by_sample
        projected = tuple(
            linear(tape, x, w, b)  # type: ignore[arg-type]
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in projected)
    n, _, length, head = q.shape
    mask = _mask(attn_mask, key_padding_mask, n, num_heads, length, k.shape[2], q.dtype)
    dropout = dropout_p if training else 0.0
    attention = None
    if need_weights:
        scores = q @ k.transpose(2, 3) / math.sqrt(head)
        attention = (scores if mask is None else scores + mask).softmax(-1)
        attention = F.dropout(attention, dropout) if dropout > 0 else attention
        mixed = attention @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    joined = mixed.transpose(1, 2).reshape(n, length, -1)
    output = linear(tape, joined, out_proj_weight, out_proj_bias).transpose(0, 1)
    if attention is not None and average_attn_weights:
        attention = attention.mean(1)
    return output, attention


def _thirds(tape: Tape, packed: Tensor | None) -> list[Tensor | None]:
    if packed is None:
        raise IncompatibleModel("MultiheadAttention without projections", REMEDY)
    slot = tape.slot(packed)
    parts = packed.chunk(3)
    if slot is not None:
        for part in parts:
            tape.derive(part, [slot])
    return list(parts)


def _mask(
    attention: Tensor | None,
    padding: Tensor | None,
    n: int,
    heads: int,
    queries: int,
    keys: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one to be added to scores ``[n, heads, queries, keys]``."""
    total: Tensor | None = None
    if attention is not None:
        attention = _additive(attention, dtype)
        total = attention.view(n, heads, queries, keys) if attention.ndim == 3 else attention
    if padding is not None:
        by_key = _additive(padding, dtype).view(n, 1, 1, keys)
        total = by_key if total is None else total + by_key
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(mask, -math.inf)


RULES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
}
