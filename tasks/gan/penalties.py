"""Penalties on the slope of the discriminator, in float32 also under mixed precision.

- gradient_penalty: I. Gulrajani et al., 'Improved training of Wasserstein GANs', NeurIPS 2017, arXiv:1704.00028.
- r1_penalty: L. Mescheder et al., 'Which training methods for GANs do actually converge?', ICML 2018, arXiv:1801.04406.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_penalty(score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """E(‖∇D(x̂)‖ − 1)² at points x̂ = share·real + (1 − share)·fake.

    Args:
        score: D, from pictures (B, …) to (B,).
        real: real pictures, (B, …).
        fake: made pictures, (B, …).
        share: of the real picture in each pair, (B,), drawn from [0, 1).

    Returns:
        A scalar that has gradients for D's parameters.
    """
    share = share.view(-1, *[1] * (real.ndim - 1))
    slopes = _slopes(score, share * real + (1 - share) * fake)
    # A norm of zeros has no gradient; D may be flat where its units are all off.
    return ((slopes.square().sum(1) + 1e-12).sqrt() - 1).square().mean()


def r1_penalty(score: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """½·E‖∇D(x)‖² at real pictures; arguments and result as of `gradient_penalty`."""
    return _slopes(score, real).square().sum(1).mean() / 2


def _slopes(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇D at each of the points x (B, …), as (B, N)."""
    with torch.autocast(x.device.type, enabled=False):
        points = x.detach().to(x.dtype if x.dtype == torch.float64 else torch.float32).requires_grad_()
        (slopes,) = torch.autograd.grad(score(points).sum(), points, create_graph=True)
        return slopes.flatten(1)
