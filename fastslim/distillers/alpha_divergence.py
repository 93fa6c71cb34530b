"""AlphaNet's loss: the larger of two alpha-divergences, whose importance weights are clipped."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastslim import errors
from fastslim.distillers.loss_checks import at_least_float32, check_logits, check_one_of, reduced
from fastslim.registry import MODELS


@MODELS.register_module()
class AdaptiveLossSoft(nn.Module):
    r"""``max(D_alpha_min, D_alpha_max)`` of teacher and student, sample by sample.

    Source: Wang et al., AlphaNet: Improved Training of Supernets with Alpha-Divergence (ICML 2021,
    arXiv:2102.07954), equations 3, 6 and 8. With the teacher's p, the student's q and ``w_c = p_c / q_c``::

        D_alpha(p || q) = sum_c q_c (w_c^alpha - 1) / (alpha (alpha - 1))
        D_1 = sum_c p_c log w_c = KL(p || q),     D_0 = -sum_c q_c log w_c = KL(q || p)
        dD_alpha = -sum_c q_c (w_c^alpha / alpha) d log q_c

    ``w^alpha`` is at most `iw_clip`, in the value and in the gradient, which treats it as a constant (at ``alpha = 0``
    w itself is clipped; at 1 nothing is, as KL's gradient needs no weights). A negative alpha punishes a student
    that is too sure, a positive one a student that misses what the teacher sees: the larger one counts.

    The value is the divergence. The authors' code has the same gradient, but returns the surrogate that yields it.

    Args:
        alpha_min: the smaller alpha.
        alpha_max: the larger alpha.
        iw_clip: upper bound of ``w^alpha``.
        reduction: ``"mean"`` over the samples, ``"sum"`` or ``"none"``.
        loss_weight: factor.

    Raises:
        FastslimValueError: `iw_clip` is not positive, or an unknown reduction.
    """

    def __init__(
        self,
        alpha_min: float = -1.0,
        alpha_max: float = 1.0,
        iw_clip: float = 5.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_one_of("reduction", reduction, ("mean", "sum", "none"))
        if not iw_clip > 0:
            raise errors.FastslimValueError(f"iw_clip={iw_clip!r} should be positive, such as the paper's 5.0")
        self.alpha_min, self.alpha_max, self.iw_clip = alpha_min, alpha_max, iw_clip
        self.reduction, self.loss_weight = reduction, loss_weight

    def forward(
        self, preds_S: Tensor, preds_T: Tensor, alpha_min: float | None = None, alpha_max: float | None = None
    ) -> Tensor:
        """The loss of logits ``(N, C)``; the teacher is detached.

        Args:
            preds_S: the student's.
            preds_T: the teacher's.
            alpha_min: for this call.
            alpha_max: for this call.
        """
        check_logits(preds_S, preds_T)
        log_q = at_least_float32(preds_S).log_softmax(1)
        log_p = at_least_float32(preds_T.detach()).log_softmax(1)
        left, by_left = self._divergence(log_q.detach(), log_p, self.alpha_min if alpha_min is None else alpha_min)
        right, by_right = self._divergence(log_q.detach(), log_p, self.alpha_max if alpha_max is None else alpha_max)
        value = torch.maximum(left, right)
        surrogate = -(torch.where((left > right)[:, None], by_left, by_right) * log_q).sum(1)
        # The divergence's value with the surrogate's gradient.
        return self.loss_weight * reduced(value + (surrogate - surrogate.detach()), self.reduction)

    def _divergence(self, log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """The divergence ``(N,)``, and the factors ``(N, C)`` of ``-d log q`` in its gradient."""
        q, log_w, log_clip = log_q.exp(), log_p - log_q, math.log(self.iw_clip)
        if abs(alpha) < 1e-3:
            log_w = log_w.clamp(max=log_clip)
            return -(q * log_w).sum(1), q * log_w
        if abs(alpha - 1) < 1e-3:
            p = log_p.exp()
            return (p * log_w).sum(1), p
        power = (alpha * log_w).clamp(max=log_clip).exp()  # clipped before exp, which would overflow
        return (q * (power - 1)).sum(1) / (alpha * (alpha - 1)), q * power / alpha
