"""`SlimMultiheadAttention`: attention with a choice of its heads, and of its inputs' and output's channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.nn.attention_masks import added_mask
from fastslim.nn.attention_plain import plain_attention
from fastslim.nn.slim import SlimLayer, as_segments
from fastslim.ops.segments import Segments, check_segments, cut, cut_optional, merged, total


class SlimMultiheadAttention(SlimLayer, nn.MultiheadAttention):
    """Drop-in for :class:`torch.nn.MultiheadAttention`: whole heads are active, the first of the layer's.

    A head keeps its size. The inputs say how many channels they have; `out_proj` stays a child of
    which only the weight is used. A 3-D mask may be for all heads or for the active ones.

    Attributes:
        active_heads: heads in use.
        active_out: channels of the output, `out_segments` if they are not the first.
        segments: channels of the query, `key_segments` and `value_segments` those of key and value,
            where they are not the first ones.
    """

    _plain = nn.MultiheadAttention
    _width_state = (
        *SlimLayer._width_state, "active_heads", "key_segments", "value_segments", "_qkv_same_embed_dim"
    )  # fmt: skip
    active_heads: int
    key_segments: Segments | None
    value_segments: Segments | None

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False to whoever asks: torch's encoder layers would else read the full weights behind our back."""
        under_construction = "active_heads" not in self.__dict__  # torch's constructor needs the truth
        return under_construction and self.__dict__["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    @classmethod
    def _refuse(cls, layer: nn.Module) -> None:
        if layer.bias_k is not None or layer.add_zero_attn:
            option = "add_zero_attn" if layer.add_zero_attn else "add_bias_kv"
            raise errors.FastslimValueError(f"multi-head attention with {option}=True has no slim form; exclude it")

    def _full_out(self) -> int:
        return self.embed_dim

    def _set_full_width(self) -> None:
        super()._set_full_width()
        self.active_heads, self.key_segments, self.value_segments = self.num_heads, None, None

    def set_width(
        self,
        out: int | None = None,
        segments: Segments | None = None,
        out_segments: Segments | None = None,
        *,
        heads: int | None = None,
        key_segments: Segments | None = None,
        value_segments: Segments | None = None,
    ) -> None:
        """Chooses heads and channels; what is left out is full, as in :meth:`SlimLayer.set_width`.

        Args:
            out: channels of the output.
            segments: channels of the query.
            out_segments: channels of the output.
            heads: heads to compute, the first of the layer's.
            key_segments: channels of the key.
            value_segments: channels of the value.

        Raises:
            FastslimValueError: more heads or channels than the layer has, or none.
        """
        heads = self.num_heads if heads is None else heads
        if isinstance(heads, bool) or not isinstance(heads, int) or not 0 < heads <= self.num_heads:
            raise errors.FastslimValueError(
                f"heads={heads!r} does not fit an attention of {self.num_heads} heads; choose 1 to {self.num_heads}"
            )
        super().set_width(out, segments, out_segments)
        self.active_heads = heads
        self.key_segments, self.value_segments = as_segments(key_segments), as_segments(value_segments)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Torch's arguments and results; at full width torch's own forward."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise errors.FastslimTypeError(
                "SlimMultiheadAttention takes padded tensors, not nested ones; a torch.nn.TransformerEncoder makes "
                "them in evaluation: set its use_nested_tensor to False"
            )
        if self._is_full(query, key, value) and not torch.compiler.is_compiling():
            return nn.MultiheadAttention.forward(
                self._as_torch(), query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal,
            )  # fmt: skip
        self._check_inputs(query, key, value, attn_mask, is_causal)
        alone, turned = query.dim() == 2, query.dim() == 3 and not self.batch_first
        q, k, v = self._project(query, key, value)
        if alone:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif turned:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = (t.unflatten(-1, (self.active_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else added_mask(attn_mask, key_padding_mask, q, k, self.num_heads)
        y, weights = self._attend(q, k, v, mask, need_weights, causal)
        y = y.transpose(1, 2).flatten(2)
        y = y.squeeze(0) if alone else y.transpose(0, 1) if turned else y
        y = F.linear(y, *self._output_projection())
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if alone else weights
        return y, weights

    def _is_full(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        chosen = (self.segments, self.key_segments, self.value_segments, self.out_segments)
        return (
            (self.active_heads, self.active_out, *chosen) == (self.num_heads, self.embed_dim, None, None, None, None)
            and (query.shape[-1], key.shape[-1], value.shape[-1]) == (self.embed_dim, self.kdim, self.vdim)
        )  # fmt: skip

    def _as_torch(self) -> nn.MultiheadAttention:
        """This very layer in torch's class, so that torch sees the true `_qkv_same_embed_dim`."""
        layer = object.__new__(nn.MultiheadAttention)
        layer.__dict__ = self.__dict__
        return layer

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, is_causal: bool) -> None:
        shapes = [tuple(t.shape) for t in (query, key, value)]
        if query.dim() not in (2, 3) or {key.dim(), value.dim()} != {query.dim()} or shapes[1][:-1] != shapes[2][:-1]:
            raise errors.FastslimValueError(
                f"SlimMultiheadAttention: query, key and value of shapes {shapes}; all must be (L, E) or (N, L, E), "
                "key and value of the same length"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            raise errors.FastslimValueError(
                f"SlimMultiheadAttention: {query.shape[batch]} queries but {key.shape[batch]} keys in the batch "
                f"(batch_first={self.batch_first})"
            )
        chosen = [merged(s) for s in (self.segments, self.key_segments, self.value_segments)]
        if (query is key and chosen[0] != chosen[1]) or (key is value and chosen[1] != chosen[2]):
            raise errors.FastslimValueError(
                f"SlimMultiheadAttention: one tensor is given in two roles, but the channels of query, key and value "
                f"differ ({chosen}); set segments, key_segments and value_segments alike"
            )
        if is_causal and attn_mask is None:
            raise errors.FastslimValueError("SlimMultiheadAttention: is_causal is a hint on attn_mask; give that, too")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, biases = self._input_projections(*(t.shape[-1] for t in (query, key, value)))
        if query is key and key is value:
            bias = None if biases[0] is None else torch.cat(biases)
            q, k, v = F.linear(query, torch.cat(weights), bias).chunk(3, -1)
            return q, k, v
        q, k, v = (F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _input_projections(self, *channels: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Active weights ``(heads * head_dim, channels)`` and biases of query, key and value."""
        inner = self.active_heads * self.head_dim
        if self.__dict__["_qkv_same_embed_dim"]:
            full = self.in_proj_weight.chunk(3)
        else:
            full = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = []
        for name, weight, segments, count in zip(
            ("query", "key", "value"), full, (self.segments, self.key_segments, self.value_segments), channels,
            strict=True,
        ):  # fmt: skip
            checked = check_segments(f"SlimMultiheadAttention ({name})", segments, count, weight.shape[1])
            weights.append(cut(cut(weight, 0, None, inner), 1, checked, count))
        if self.in_proj_bias is None:
            return weights, [None, None, None]
        return weights, [bias[:inner] for bias in self.in_proj_bias.chunk(3)]

    def _output_projection(self) -> tuple[Tensor, Tensor | None]:
        weight = cut(self.out_proj.weight, 0, self.out_segments, self.active_out)
        bias = cut_optional(self.out_proj.bias, 0, self.out_segments, self.active_out)
        return cut(weight, 1, None, self.active_heads * self.head_dim), bias

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``(N, heads, L, head_dim)`` to ``(N, heads, S, head_dim)``, and its weights if needed."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, -1)
        if dropout:
            weights = F.dropout(weights, dropout)
        return weights @ v, weights

    def to_torch(
        self, in_channels: int | None = None, *, key_channels: int | None = None, value_channels: int | None = None
    ) -> nn.Module:
        """A plain layer of the current width, see :class:`SlimLayer`.

        It is a :class:`torch.nn.MultiheadAttention` wherever that class can say it: the query has
        as many channels as the heads together. Otherwise it is a :class:`torch.fx.GraphModule` of
        two plain layers, `q_proj` and `attention`, that is called in the same way, gives the same
        results and can stand in :class:`torch.nn.TransformerEncoderLayer`.

        Args:
            in_channels: channels of the query where `segments` does not say them; all by default.
            key_channels: channels of the key; by default the query's where query, key and value
                were alike in the full layer, else all.
            value_channels: channels of the value, in the same way.
        """
        query = self._input_channels(self.segments, in_channels)
        alike = self.__dict__["_qkv_same_embed_dim"]
        counts = [query]
        for segments, asked, full in (
            (self.key_segments, key_channels, self.kdim),
            (self.value_segments, value_channels, self.vdim),
        ):
            usual = total(segments) if segments is not None else query if alike else full
            counts.append(usual if asked is None else asked)
        return plain_attention(self, *self._input_projections(*counts), *self._output_projection())

    def extra_repr(self) -> str:
        """The width, where it is not full."""
        heads = "" if self.active_heads == self.num_heads else f", active_heads={self.active_heads}"
        return (super().extra_repr() + heads).removeprefix(", ")
