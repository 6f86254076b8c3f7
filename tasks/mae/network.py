"""A masked autoencoder for one-dimensional signals.

An encoder sees some patches of a signal, a decoder fills in the rest (He et al., 'Masked autoencoders are scalable
vision learners', CVPR 2022, arXiv:2111.06377). Two decoders:

- `latent`: an MLP from the class token's projection to the whole signal, as in ChemoMAE. All that is known of the
  signal passes through `latent_dim` numbers.
- `tokens`: a small transformer over the encoded visible patches, the latent and learned mask tokens, as in the
  original.

Shapes: B batch, L length of a signal, P patches, S = L/P length of a patch, V visible patches, D width, Z latent.
"""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.nn.weights import load_weights
from trainerkit.tasks.mae.masking import hidden_positions, random_visible
from trainerkit.tasks.mae.transformer import Transformer


class MaskedAutoencoder(nn.Module):
    """Encoder over visible patches, and a decoder for the whole signal.

    Args:
        seq_len: length L of a signal; a multiple of `n_patches`.
        n_patches: number of patches P, all of one length, one token each.
        n_mask: patches hidden in training, from 0 to P − 1.
        latent_dim: size Z of the latent.
        d_model: width D of the encoder.
        nhead: attention heads; must divide `d_model`, and `decoder_dim` where there is one.
        num_layers: encoder blocks.
        dim_feedforward: width inside the encoder's feed-forward layers; None for 4·D. The `tokens` decoder takes the
            same ratio to its own width.
        dropout: probability in the transformers.
        latent_normalize: scale the latent to unit length.
        decoder: 'latent' or 'tokens'.
        decoder_num_layers: linear layers of the `latent` decoder, or blocks of the `tokens` decoder.
        decoder_dim: width of the `tokens` decoder; None for D. The `latent` decoder's hidden width is L.
        weights: a file to start from: .safetensors or .pt, of this network or of the package chemomae.

    Raises:
        ValueError: for sizes that do not fit together; the message begins with the argument.
        trainerkit.errors.UserError: for a weights file that does not fit.
    """

    def __init__(
        self,
        seq_len: int = 256,
        n_patches: int = 16,
        n_mask: int = 12,
        latent_dim: int = 64,
        d_model: int = 256,
        nhead: int = 4,
        num_layers: int = 4,
        dim_feedforward: int | None = None,
        dropout: float = 0.0,
        latent_normalize: bool = True,
        decoder: Literal["latent", "tokens"] = "latent",
        decoder_num_layers: int = 2,
        decoder_dim: int | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"seq_len": seq_len, "n_patches": n_patches, "latent_dim": latent_dim, "d_model": d_model}
        sizes |= {"nhead": nhead, "num_layers": num_layers, "decoder_num_layers": decoder_num_layers}
        sizes |= {"dim_feedforward": dim_feedforward or 1, "decoder_dim": decoder_dim or 1}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size}: must be 1 or more")
        if seq_len % n_patches:
            raise ValueError(f"n_patches={n_patches}: {_about_patches(seq_len, n_patches)}")
        if not 0 <= n_mask < n_patches:
            raise ValueError(
                f"n_mask={n_mask}: must be from 0 to {n_patches - 1}, since one of n_patches={n_patches} stays visible"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be from 0 to below 1")
        _check_heads("d_model", d_model, nhead)
        self.seq_len = seq_len
        self.n_patches = n_patches
        self.n_mask = n_mask
        self.encoder = Encoder(
            seq_len // n_patches, n_patches, latent_dim, d_model, nhead, num_layers, dim_feedforward, dropout,
            latent_normalize,
        )  # fmt: skip
        self.decoder: LatentDecoder | TokenDecoder
        if decoder == "latent":
            self.decoder = LatentDecoder(seq_len, latent_dim, decoder_num_layers)
        elif decoder == "tokens":
            _check_heads("decoder_dim", decoder_dim or d_model, nhead)
            self.decoder = TokenDecoder(
                seq_len // n_patches, n_patches, latent_dim, d_model, decoder_dim or d_model, nhead,
                decoder_num_layers, (decoder_dim or d_model) * (dim_feedforward or 4 * d_model) // d_model, dropout,
            )  # fmt: skip
        else:
            raise ValueError(f"decoder={decoder}: must be one of latent, tokens")
        if weights is not None:
            load_weights(self, weights)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct signals of which only some patches are seen.

        Args:
            x: signals, (B, L).
            visible: indices of the patches that are seen, (B, V); None draws P − `n_mask` of each signal at random.

        Returns:
            x_recon: the whole signal, (B, L).
            z: the latent, (B, Z).
            visible_mask: True where a position was seen, (B, L) bool.

        Raises:
            ValueError: if `x` is not (B, L).
        """
        if visible is None:
            visible = random_visible(len(x), self.n_patches, self.n_patches - self.n_mask, device=x.device)
        tokens, z = self.encoder(self._patches(x), visible, first=self.decoder.reads)
        visible_mask = ~hidden_positions(visible, self.n_patches, self.seq_len // self.n_patches)
        return self.decoder(tokens, z, visible), z, visible_mask

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, Z) of signals (B, L) that are seen whole."""
        everything = torch.arange(self.n_patches, device=x.device).expand(len(x), -1)
        z: Tensor = self.encoder(self._patches(x), everything, first=1)[1]
        return z

    def _patches(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.seq_len:
            raise ValueError(f"x: has shape {tuple(x.shape)}; needed is (batch, seq_len={self.seq_len})")
        return x.reshape(len(x), self.n_patches, -1)


class Encoder(nn.Module):
    """Embed the visible patches, add positions and a class token, run the transformer, project the class token."""

    def __init__(
        self,
        patch_size: int,
        n_patches: int,
        latent_dim: int,
        d_model: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int | None,
        dropout: float,
        latent_normalize: bool,
    ) -> None:
        super().__init__()
        self.latent_normalize = latent_normalize
        self.patch_proj = nn.Linear(patch_size, d_model)
        self.cls_token = nn.Parameter(torch.empty(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + n_patches, d_model))
        self.encoder = Transformer(num_layers, d_model, nhead, dim_feedforward or 4 * d_model, dropout)
        self.to_latent = nn.Linear(d_model, latent_dim)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, patches: Tensor, visible: Tensor, first: int | None = None) -> tuple[Tensor, Tensor]:
        """Patches (B, P, S) and visible indices (B, V) to tokens (B, 1+V, D), class token first, and latents (B, Z).

        With `first`, only so many tokens are given: 1 is enough where just the latent is wanted.
        """
        seen = patches.gather(1, visible[:, :, None].expand(-1, -1, patches.shape[2]))
        tokens = self.patch_proj(seen) + self.pos_embed[0, 1:][visible]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = self.encoder(torch.cat([cls.to(tokens.dtype), tokens], dim=1), first)
        z = self.to_latent(tokens[:, 0])
        return tokens, F.normalize(z, dim=1) if self.latent_normalize else z


class LatentDecoder(nn.Module):
    """An MLP from the latent to the whole signal; hidden layers are as wide as the signal is long."""

    reads = 1  # of the encoder's tokens: only the class token, through the latent

    def __init__(self, seq_len: int, latent_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [latent_dim] + [seq_len] * num_layers
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        # A single layer is not wrapped, as in the published weights.
        self.net = nn.Sequential(*layers[:-1]) if num_layers > 1 else layers[0]

    def forward(self, tokens: Tensor, z: Tensor, visible: Tensor) -> Tensor:
        """Latents (B, Z) to signals (B, L); the tokens are not looked at."""
        x_recon: Tensor = self.net(z)
        return x_recon


class TokenDecoder(nn.Module):
    """A transformer over the encoded patches in their places, mask tokens in the others, and the latent in front."""

    reads = None  # all of the encoder's tokens

    def __init__(
        self,
        patch_size: int,
        n_patches: int,
        latent_dim: int,
        d_model: int,
        decoder_dim: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.n_patches = n_patches
        self.norm_in = nn.LayerNorm(d_model)
        self.from_tokens = nn.Linear(d_model, decoder_dim)
        self.from_latent = nn.Linear(latent_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + n_patches, decoder_dim))
        self.decoder = Transformer(num_layers, decoder_dim, nhead, dim_feedforward, dropout)
        self.norm_out = nn.LayerNorm(decoder_dim)
        self.to_patch = nn.Linear(decoder_dim, patch_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, tokens: Tensor, z: Tensor, visible: Tensor) -> Tensor:
        """Tokens (B, 1+V, D), latents (B, Z) and visible indices (B, V) to signals (B, L)."""
        seen = self.from_tokens(self.norm_in(tokens[:, 1:]))
        places = visible[:, :, None].expand(-1, -1, seen.shape[2])
        filled = self.mask_token.to(seen.dtype).expand(len(seen), self.n_patches, -1).scatter(1, places, seen)
        latent = self.from_latent(z)[:, None]
        decoded = self.decoder(torch.cat([latent, filled], dim=1) + self.pos_embed)
        patches: Tensor = self.to_patch(self.norm_out(decoded[:, 1:]))
        return patches.flatten(1)


def _check_heads(name: str, width: int, nhead: int) -> None:
    if width % nhead:
        raise ValueError(f"{name}={width}: must be a multiple of nhead={nhead}")


def _about_patches(seq_len: int, n_patches: int) -> str:
    divisors = [n for n in range(2, seq_len) if seq_len % n == 0]
    nearest = sorted(sorted(divisors, key=lambda n: abs(n - n_patches))[:4])
    fitting = f"take one of {', '.join(map(str, nearest))}, or " if nearest else ""
    down = seq_len // n_patches * n_patches
    crop = f" or crop to {down} (data.seq_len={down} data.fit_length=crop)" if down else ""
    up = down + n_patches
    return (
        f"must divide seq_len={seq_len}; {fitting}pad the signals to {up} (data.seq_len={up} data.fit_length=pad){crop}"
    )
