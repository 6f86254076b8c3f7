"""Augmentations of spectra that keep each one's mean and norm.

After standard normal variate every spectrum lies on a sphere; so do these copies. With c the spectrum minus its mean:
a shift moves c by a fraction of a band and brings it back to zero mean and to its norm; noise turns c by an angle θ
towards a random direction u that is tangent to the sphere and has zero mean, c·cos θ + ‖c‖·u·sin θ.
"""

import math

import torch
from torch import Tensor, nn


class SpectraAugment(nn.Module):
    """Fractional shift and tangent Gaussian noise, each on a random part of the batch; in training mode only.

    Args:
        shift_prob: probability that a spectrum is shifted.
        shift_range: shift in bands, drawn uniformly between the two.
        noise_prob: probability that a spectrum gets noise.
        noise_degrees: angle of the noise in degrees, drawn uniformly between the two, within 0 to 180.

    Raises:
        ValueError: for a probability outside [0, 1] or a range that is none.
    """

    def __init__(
        self,
        shift_prob: float = 0.5,
        shift_range: tuple[float, float] = (-2.0, 2.0),
        noise_prob: float = 0.5,
        noise_degrees: tuple[float, float] = (0.5, 3.0),
    ) -> None:
        super().__init__()
        for name, probability in {"shift_prob": shift_prob, "noise_prob": noise_prob}.items():
            if not 0 <= probability <= 1:
                raise ValueError(f"{name}={probability}: must be from 0 to 1")
        for name, span in {"shift_range": shift_range, "noise_degrees": noise_degrees}.items():
            if len(span) != 2 or not span[0] <= span[1] or not all(map(math.isfinite, span)):
                raise ValueError(f"{name}={list(span)}: must be two numbers, the lower first")
        if not 0 <= noise_degrees[0] <= noise_degrees[1] <= 180:
            raise ValueError(f"noise_degrees={list(noise_degrees)}: must lie within 0 to 180")
        self.shift_prob = shift_prob
        self.shift_range = tuple(shift_range)
        self.noise_prob = noise_prob
        self.noise_degrees = tuple(noise_degrees)

    def forward(self, x: Tensor) -> Tensor:
        """Spectra (B, L) to spectra (B, L)."""
        if not self.training:
            return x
        if self.shift_prob > 0:
            shift = _uniform(len(x), self.shift_range, x)
            x = torch.where(_chosen(len(x), self.shift_prob, x), fractional_shift(x, shift), x)
        if self.noise_prob > 0:
            angle = _uniform(len(x), self.noise_degrees, x).deg2rad()
            noisy = tangent_noise(x, torch.randn_like(x), angle)
            x = torch.where(_chosen(len(x), self.noise_prob, x), noisy, x)
        return x


def fractional_shift(x: Tensor, shift: Tensor) -> Tensor:
    """Move spectra (B, L) to the right by `shift` (B,) bands, keeping mean and norm about the mean.

    Between bands by linear interpolation, beyond the ends by the end's value.
    """
    length = x.shape[1]
    place = (torch.arange(length, device=x.device) - shift[:, None]).clamp(0, length - 1)
    left = place.floor().long()
    right = (left + 1).clamp_max(length - 1)
    weight = place - left
    return _like(torch.lerp(x.gather(1, left), x.gather(1, right), weight), x)


def tangent_noise(x: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
    """Turn spectra (B, L), about their mean, by `angle` (B,) radians towards `noise` (B, L).

    A constant spectrum has no direction and stays what it is.
    """
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    norm = centred.norm(dim=1, keepdim=True)
    unit = centred / norm.clamp_min(torch.finfo(x.dtype).tiny)
    tangent = noise - noise.mean(1, keepdim=True)
    tangent = tangent - (tangent * unit).sum(1, keepdim=True) * unit
    tangent = torch.nn.functional.normalize(tangent, dim=1)
    angle = angle[:, None]
    turned: Tensor = mean + centred * angle.cos() + norm * tangent * angle.sin()
    return turned


def _like(x: Tensor, reference: Tensor) -> Tensor:
    """`x` with the mean of `reference` and its norm about the mean."""
    mean = reference.mean(1, keepdim=True)
    centred = x - x.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    scaled: Tensor = mean + centred * ((reference - mean).norm(dim=1, keepdim=True) / norm)
    return scaled


def _uniform(size: int, span: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.rand(size, device=like.device, dtype=like.dtype) * (span[1] - span[0]) + span[0]


def _chosen(size: int, probability: float, like: Tensor) -> Tensor:
    return torch.rand(size, 1, device=like.device) < probability
