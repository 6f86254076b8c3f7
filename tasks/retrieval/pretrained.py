"""Backbones that others have trained: `transformers`, `timm` and `sentence-transformers`, and adapters on them.

Texts are token ids of the same folder's tokenizer, which is the data's (`data.tokenizer=FOLDER`). Pictures come in 0..1
in any size; each backbone brings them to its own size, channels and scale.

What a folder holds is not trusted: of weights only safetensors are read, and none of its code is run, unless
trust_remote_code=true says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainerkit.errors import UserError, first_lines
from trainerkit.extras import require
from trainerkit.tasks.retrieval.hub import Adapters, attended, load_transformers, train_only, without_pooler
from trainerkit.tasks.retrieval.pooling import last_token_pool
from trainerkit.tasks.retrieval.preparation import Prepare, prepare_like


class PretrainedText(nn.Module):
    """A text model of `transformers`: its last hidden states (B, T, F), which `Encoder` pools.

    Args:
        name_or_path: folder of `save_pretrained`, or a name on the Hugging Face hub.
        lora: adapters that are trained instead of the model, see `trainerkit.nn.lora.Lora`; without `targets` on all
            linear layers. None trains the model.
        frozen: train nothing of it.
        trust_remote_code: run code that the folder brings, and read pickled weights.

    Attributes:
        out_features: F.

    Raises:
        ValueError: for adapters that are not possible.
        trainerkit.errors.UserError: if a package is not installed, or the folder cannot be read or lacks weights.
    """

    def __init__(
        self, name_or_path: str, lora: Adapters = None, frozen: bool = False, trust_remote_code: bool = False
    ) -> None:
        super().__init__()
        network = load_transformers("AutoModel", name_or_path, trust_remote_code)
        self.network: nn.Module = network
        self.out_features = int(network.config.hidden_size)
        train_only(self.network, lora, frozen)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, T) and their mask (B, T) to (B, T, F)."""
        hidden: Tensor = self.network(input_ids=text, attention_mask=attended(mask)).last_hidden_state
        return hidden


class PretrainedImage(nn.Module):
    """A vision transformer of `transformers`: its last hidden states (B, T, F), the class token first.

    Args:
        name_or_path: see `PretrainedText`.
        lora: see `PretrainedText`.
        frozen: train nothing of it.
        trust_remote_code: see `PretrainedText`.
        mean: of each channel, subtracted; None for what the folder's `preprocessor_config.json` says.
        std: of each channel, by which is divided; None as above.

    Attributes:
        out_features: F.

    Raises:
        ValueError: as in `PretrainedText`.
        trainerkit.errors.UserError: as in `PretrainedText`, and if neither folder nor arguments have mean and std.
    """

    def __init__(
        self,
        name_or_path: str,
        lora: Adapters = None,
        frozen: bool = False,
        trust_remote_code: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        network = load_transformers("AutoModel", name_or_path, trust_remote_code)
        self.network: nn.Module = network
        config = network.config
        self.prepare = prepare_like(name_or_path, config.image_size, config.num_channels, mean, std)
        self.out_features = int(config.hidden_size)
        train_only(self.network, lora, frozen)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 to (B, T, F)."""
        hidden: Tensor = self.network(pixel_values=self.prepare(images)).last_hidden_state
        return hidden


class PretrainedCLIP(nn.Module):
    """Both towers of a CLIP model, with its own projections: an encoder by itself, not a backbone of `Encoder`.

    A text's embedding is that of its last token, which for CLIP's own tokenizer is the end of text. A row of a picture
    and a text is the sum of both embeddings, each of length 1.

    Source: A. Radford et al., 'Learning transferable visual models from natural language supervision', ICML 2021,
    arXiv:2103.00020.

    Args:
        name_or_path: see `PretrainedText`.
        lora: see `PretrainedText`.
        frozen: train nothing of it.
        trust_remote_code: see `PretrainedText`.
        mean: see `PretrainedImage`.
        std: see `PretrainedImage`.
        modalities: those that the data have, 'image' and 'text'; the other's tower is left out. None for both.

    Attributes:
        embedding_dim: D, width of the projections.

    Raises:
        ValueError: as in `PretrainedText`, and for unknown modalities.
        trainerkit.errors.UserError: as in `PretrainedImage`.
    """

    def __init__(
        self,
        name_or_path: str,
        lora: Adapters = None,
        frozen: bool = False,
        trust_remote_code: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        modalities: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        modalities = ["image", "text"] if modalities is None else list(modalities)
        if not modalities or not set(modalities) <= {"image", "text"}:
            raise ValueError(f"modalities={modalities}: must be a list of image and text, or None")
        network = load_transformers("CLIPModel", name_or_path, trust_remote_code)
        self.embedding_dim = int(network.config.projection_dim)
        # The parts that are used: the logit scale, for one, would stay without a gradient.
        parts: dict[str, nn.Module] = {}
        self.prepare: nn.Module | None = None
        if "image" in modalities:
            vision = network.config.vision_config
            self.prepare = prepare_like(name_or_path, vision.image_size, vision.num_channels, mean, std)
            parts |= {"image": network.vision_model, "image_projection": network.visual_projection}
        if "text" in modalities:
            parts |= {"text": network.text_model, "text_projection": network.text_projection}
        self.network = nn.ModuleDict(parts)
        train_only(self.network, lora, frozen)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """`image` (B, C, H, W) in 0..1 and/or `text` (B, T) with `text_mask` (B, T), to (B, D).

        Raises:
            ValueError: if there is neither, or one for which there is no tower; it says what there is.
        """
        given = [name for name in ("image", "text") if name in inputs]
        if not given or any(name not in self.network for name in given):
            there = " and ".join(name for name in ("image", "text") if name in self.network)
            raise ValueError(f"inputs: have {', '.join(inputs) or 'nothing'}; this encoder has a tower for {there}")
        parts = [self._image(inputs["image"]) if name == "image" else self._text(inputs) for name in given]
        if len(parts) == 1:
            return parts[0]
        return torch.stack([nn.functional.normalize(part, dim=-1) for part in parts]).sum(0)

    def _image(self, images: Tensor) -> Tensor:
        if self.prepare is not None:
            images = self.prepare(images)
        embedding: Tensor = self.network["image_projection"](self.network["image"](pixel_values=images).pooler_output)
        return embedding

    def _text(self, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs["text_mask"]
        hidden = self.network["text"](input_ids=inputs["text"], attention_mask=attended(mask)).last_hidden_state
        # transformers looks for the first end of text, and takes the first token of a row without one: the same for
        # every text that was cut off.
        embedding: Tensor = self.network["text_projection"](last_token_pool(hidden, mask))
        return embedding


class TimmImage(nn.Module):
    """A picture model of `timm`, pooled as it does itself: (B, F).

    Args:
        name: of the model, such as 'vit_small_patch16_224'.
        pretrained: with trained weights, from the hub or `weights`; else from nothing.
        weights: file of the weights, safetensors; None for the hub.
        channels: C of the pictures.
        frozen: train nothing of it.
        options: further arguments of `timm.create_model`.

    Attributes:
        out_features: F.

    Raises:
        ValueError: for weights without pretrained=true, or of another kind than safetensors.
        trainerkit.errors.UserError: if `timm` is not installed, has no such model, or the weights cannot be read.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        weights: str | None = None,
        channels: int = 3,
        frozen: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if weights is not None and not (pretrained and str(weights).endswith(".safetensors")):
            raise ValueError(f"weights={weights}: must be a safetensors file, together with pretrained=true")
        timm = require("timm", f"TimmImage(name={name})")
        overlay = None if weights is None else {"file": str(weights)}
        try:
            network = timm.create_model(
                name, pretrained, pretrained_cfg_overlay=overlay, num_classes=0, in_chans=channels, **(options or {})
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"name={name}: {first_lines(error)}") from error
        found = network.pretrained_cfg
        grid = getattr(network, "patch_embed", None)
        size = grid.img_size[0] if grid is not None and getattr(grid, "img_size", None) else None
        mean, std = ([sum(found[key]) / 3] if channels == 1 else found[key] for key in ("mean", "std"))
        self.prepare = Prepare(size, channels, mean, std)
        self.network: nn.Module = network
        self.out_features = int(network.num_features)
        train_only(self.network, None, frozen)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 to (B, F)."""
        out: Tensor = self.network(self.prepare(images))
        return out


class SentenceTransformerText(nn.Module):
    """A text model of `sentence-transformers` with all of its modules, pooling included: (B, F).

    Args:
        name_or_path: folder that its `save` wrote, or a name on the Hugging Face hub.
        lora: see `PretrainedText`.
        frozen: train nothing of it.
        trust_remote_code: see `PretrainedText`.

    Attributes:
        out_features: F.

    Raises:
        ValueError: as in `PretrainedText`.
        trainerkit.errors.UserError: as in `PretrainedText`.
    """

    def __init__(
        self, name_or_path: str, lora: Adapters = None, frozen: bool = False, trust_remote_code: bool = False
    ) -> None:
        super().__init__()
        package = require("sentence_transformers", f"SentenceTransformerText(name_or_path={name_or_path})")
        try:
            network = package.SentenceTransformer(
                str(name_or_path),
                device="cpu",  # the trainer moves it
                trust_remote_code=trust_remote_code,
                model_kwargs={"use_safetensors": None if trust_remote_code else True, "dtype": torch.float32},
            )
        except (OSError, ValueError) as error:
            raise UserError(f"name_or_path={name_or_path}: {first_lines(error)}") from error
        self.out_features = int(network.get_embedding_dimension())
        without_pooler(network)
        # A plain container: its own class has methods and settings that Lightning would take for the module's.
        self.network = nn.Sequential(*network.children()).train()
        train_only(self.network, lora, frozen)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, T) and their mask (B, T) to (B, F)."""
        out: Tensor = self.network({"input_ids": text, "attention_mask": attended(mask)})["sentence_embedding"]
        return out
