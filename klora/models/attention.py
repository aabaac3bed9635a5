"""FLUX.1's attention as diffusers computes it, to the bit, with another's rotation. Knows no pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

Rotated = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries or keys [N, T, H, D], cos and sin, float32 [T, D]) -> them, turned by their places"""


class FluxAttention:
    """A processor of diffusers' FLUX.1 attention."""

    def __init__(self, rotated: Rotated) -> None:
        self._rotated = rotated

    def __call__(
        self,
        attn: Any,  # diffusers' module, whose parts have no types
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [N, T, D]; with those of a prompt, encoder_hidden_states [N, S, D], which come first, the same
        of either. image_rotary_emb: cos and sin, float32 [S + T, D / heads]."""
        norms = attn.norm_q, attn.norm_k
        heads = _projected(hidden_states, (attn.to_q, attn.to_k, attn.to_v), norms, attn.head_dim)
        if encoder_hidden_states is not None:
            linears, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
            text = _projected(encoder_hidden_states, linears, norms, attn.head_dim)
            heads = [torch.cat(both, dim=1) for both in zip(text, heads, strict=True)]
        query, key, value = heads
        if image_rotary_emb is not None:
            query, key = (self._rotated(part, *image_rotary_emb) for part in (query, key))
        mixed = dispatch_attention_fn(query, key, value, attn_mask=attention_mask).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return mixed
        text, image = mixed.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


def _projected(x: Tensor, linears: Sequence[nn.Module], norms: Sequence[nn.Module], width: int) -> list[Tensor]:
    """Queries, keys and values [N, T, H, width] of x, the first two normalised."""
    query, key, value = (linear(x).unflatten(-1, (-1, width)) for linear in linears)
    return [norms[0](query), norms[1](key), value]
