"""`SlimEmbedding`: an embedding that gives the first entries of its vectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastslim import errors
from fastslim.nn.slim import SlimLayer
from fastslim.ops.segments import cut


class SlimEmbedding(SlimLayer, nn.Embedding):
    """Drop-in for :class:`torch.nn.Embedding`; the vectors are slim, their number stays."""

    _plain = nn.Embedding

    @classmethod
    def _refuse(cls, layer: nn.Module) -> None:
        if layer.max_norm is not None:
            raise errors.FastslimValueError(
                f"an embedding with max_norm={layer.max_norm} rescales whole vectors in place, which has no meaning "
                "for a part of them; exclude the layer or do without max_norm"
            )

    def _full_out(self) -> int:
        return self.embedding_dim

    def _input_channels(self, segments: Any, asked: int | None) -> int:
        return 0  # indices come in, not channels

    def forward(self, x: Tensor) -> Tensor:
        """Looks up ``(*)`` indices: ``(*, active_out)``."""
        settings = (self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse)
        if self.sparse:  # a sparse gradient cannot be put into a slice: whole vectors are looked up
            return cut(F.embedding(x, self.weight, *settings), -1, self.out_segments, self.active_out)
        return F.embedding(x, cut(self.weight, 1, self.out_segments, self.active_out), *settings)

    def _at_width(self, channels: int) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
        weight = cut(self.weight, 1, self.out_segments, self.active_out)
        return dict(embedding_dim=self.active_out), dict(weight=weight)
