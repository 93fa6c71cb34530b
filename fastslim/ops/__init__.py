"""The ops: schema, fake, autograd, reference and dispatch of each in a file of its own."""

from fastslim.ops.sandwich_loss import kl_div_loss, sandwich_loss

__all__ = ["kl_div_loss", "sandwich_loss"]
