"""What discriminator and generator lower, from scores: large for what is taken to be real.

- non_saturating: I. Goodfellow et al., 'Generative adversarial nets', NeurIPS 2014, section 3.
- hinge: J. H. Lim, J. C. Ye, 'Geometric GAN', 2017, arXiv:1705.02894.
- wasserstein: M. Arjovsky et al., 'Wasserstein GAN', ICML 2017, arXiv:1701.07875; needs a penalty.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Kind = Literal["non_saturating", "hinge", "wasserstein"]
KINDS = ("non_saturating", "hinge", "wasserstein")


def discriminator_loss(kind: Kind, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator lowers.

    Args:
        kind: with s(x) = log(1 + eˣ) 'non_saturating' is E s(−real) + E s(fake), 'hinge' is
            E max(0, 1 − real) + E max(0, 1 + fake), 'wasserstein' is E fake − E real.
        real: scores of real pictures, (B,).
        fake: scores of made pictures, (B',).

    Returns:
        A scalar in float32 or wider.

    Raises:
        ValueError: for another kind.
    """
    real, fake = _wide(real), _wide(fake)
    if kind == "non_saturating":
        return softplus(-real).mean() + softplus(fake).mean()
    if kind == "hinge":
        return relu(1 - real).mean() + relu(1 + fake).mean()
    if kind == "wasserstein":
        return fake.mean() - real.mean()
    raise _unknown(kind)


def generator_loss(kind: Kind, fake: Tensor) -> Tensor:
    """What the generator lowers: E s(−fake) for 'non_saturating', −E fake for the others.

    Args:
        kind: as of `discriminator_loss`, whose errors it has too.
        fake: scores of made pictures, (B,).

    Returns:
        A scalar in float32 or wider.
    """
    fake = _wide(fake)
    if kind == "non_saturating":
        return softplus(-fake).mean()
    if kind in ("hinge", "wasserstein"):
        return -fake.mean()
    raise _unknown(kind)


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _unknown(kind: str) -> ValueError:
    return ValueError(f"loss={kind}: must be one of {', '.join(KINDS)}")
