"""Backbones that others have trained, tiny ones, written to disk by their own library and loaded from there."""

import json
import sys

import pytest
import torch
from torch import nn

from trainerkit.errors import UserError
from trainerkit.nn.lora import Lora
from trainerkit.tasks.retrieval.encoder import Encoder
from trainerkit.tasks.retrieval.preparation import Prepare
from trainerkit.tasks.retrieval.pretrained import (
    PretrainedCLIP,
    PretrainedImage,
    PretrainedText,
    SentenceTransformerText,
    TimmImage,
)

VOCABULARY, WIDTH, SIZE = 30, 16, 8
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def batch(channels=3, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY - 1, (4, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    text[torch.arange(4), mask.sum(1) - 1] = VOCABULARY - 1  # end of text
    return {
        "image": torch.rand(4, channels, size, size, generator=generator),
        "text": text * mask,
        "text_mask": mask,
    }


def scaled(images):
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def only_text(inputs):
    return {name: value for name, value in inputs.items() if name.startswith("text")}


def write_processor(folder):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def saved(network, folder):
    network.save_pretrained(folder)
    write_processor(folder)
    return network.eval(), str(folder)


@pytest.fixture(scope="module")
def bert(transformers, tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=12, **SMALL)
    return saved(transformers.BertModel(config), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def vit(transformers, tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=SIZE, patch_size=4, **SMALL)
    return saved(transformers.ViTModel(config), tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def clip(transformers, tmp_path_factory):
    torch.manual_seed(0)
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 12, "eos_token_id": VOCABULARY - 1} | SMALL
    vision = {"image_size": SIZE, "patch_size": 4} | SMALL
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    return saved(transformers.CLIPModel(config), tmp_path_factory.mktemp("clip"))


# Embeddings are those of the library itself


def test_a_text_model_gives_what_transformers_gives(bert):
    theirs, folder = bert
    backbone, inputs = PretrainedText(folder), batch()
    assert backbone.training
    assert backbone.out_features == WIDTH
    expected = theirs(input_ids=inputs["text"], attention_mask=inputs["text_mask"].long()).last_hidden_state
    mask = inputs["text_mask"]
    torch.testing.assert_close(backbone.eval()(inputs["text"], mask)[mask], expected[mask])
    encoder = Encoder(text=backbone, pooling="mean", projection=None)
    mean = torch.stack([row[there].mean(0) for row, there in zip(expected, mask, strict=True)])
    torch.testing.assert_close(encoder(only_text(inputs)), mean)


def test_a_row_of_nothing_but_padding_is_zeros(bert):
    encoder, inputs = Encoder(text=PretrainedText(bert[1]), projection=None).eval(), batch()
    inputs["text_mask"] = inputs["text_mask"].clone()
    inputs["text_mask"][2] = False
    found = encoder(only_text(inputs))
    assert found.isfinite().all()
    assert not found[2].any()


def test_a_vision_model_gives_what_transformers_gives(vit):
    theirs, folder = vit
    backbone, images = PretrainedImage(folder), batch()["image"]
    assert backbone.training
    expected = theirs(pixel_values=scaled(images)).last_hidden_state
    torch.testing.assert_close(backbone.eval()(images), expected)
    encoder = Encoder(backbone, pooling="cls", projection=None)
    torch.testing.assert_close(encoder({"image": images}), expected[:, 0])


def test_clip_gives_what_transformers_gives(clip):
    theirs, folder = clip
    encoder, inputs = PretrainedCLIP(folder).eval(), batch()
    assert encoder.embedding_dim == 10
    image = theirs.get_image_features(pixel_values=scaled(inputs["image"])).pooler_output
    text = theirs.get_text_features(input_ids=inputs["text"], attention_mask=inputs["text_mask"].long()).pooler_output
    torch.testing.assert_close(encoder({"image": inputs["image"]}), image)
    torch.testing.assert_close(encoder(only_text(inputs)), text)
    both = nn.functional.normalize(image, dim=-1) + nn.functional.normalize(text, dim=-1)
    torch.testing.assert_close(encoder(inputs), both)


def test_clip_s_text_is_that_of_its_last_token_where_the_end_of_text_was_cut_off(clip):
    """transformers takes the first token there, which in a causal model has seen nothing: all would be equal."""
    encoder, inputs = PretrainedCLIP(clip[1]).eval(), batch()
    first = inputs["text"][:1].clone()
    first[0, -1] = 4
    other = first.clone()
    other[0, 1:5] = 7
    found = [encoder({"text": t, "text_mask": inputs["text_mask"][:1]}) for t in (first, other)]
    assert (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("modality", ["image", "text"])
def test_clip_leaves_out_the_tower_that_is_not_asked_for(clip, modality):
    encoder, inputs = PretrainedCLIP(clip[1], modalities=[modality]), batch()
    encoder({name: value for name, value in inputs.items() if name.startswith(modality)}).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    with pytest.raises(ValueError, match=f"inputs: have image, text, text_mask; .* a tower for {modality}$"):
        encoder(inputs)


@pytest.mark.parametrize("kind", ["bert", "vit", "clip"])
def test_gradients_reach_every_parameter(kind, request):
    folder, inputs = request.getfixturevalue(kind)[1], batch()
    if kind == "clip":
        encoder = PretrainedCLIP(folder)
    elif kind == "bert":
        encoder, inputs = Encoder(text=PretrainedText(folder)), only_text(inputs)
    else:
        encoder = Encoder(PretrainedImage(folder))
        inputs = {"image": inputs["image"]}
    encoder(inputs).square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


# Adapters


@pytest.mark.parametrize("kind", ["bert", "vit", "clip"])
def test_with_lora_only_the_adapters_are_trained_and_at_first_nothing_changes(kind, request):
    pytest.importorskip("peft")
    folder, inputs = request.getfixturevalue(kind)[1], batch()
    lora = {"r": 2, "alpha": 4}
    make = {
        "bert": lambda **o: Encoder(text=PretrainedText(folder, **o), projection=None),
        "vit": lambda **o: Encoder(PretrainedImage(folder, **o), projection=None),
        "clip": lambda **o: PretrainedCLIP(folder, **o),
    }[kind]
    if kind != "clip":
        inputs = only_text(inputs) if kind == "bert" else {"image": inputs["image"]}
    encoder = make(lora=lora)
    assert torch.allclose(encoder.eval()(inputs), make().eval()(inputs), atol=1e-6)
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in encoder.named_parameters() if ".lora_" in name}
    assert trained
    encoder(inputs).square().sum().backward()
    assert all((parameter.grad is not None) == (name in trained) for name, parameter in encoder.named_parameters())


def test_lora_goes_where_it_is_told_and_frozen_trains_nothing(bert):
    pytest.importorskip("peft")
    adapted = PretrainedText(bert[1], lora=Lora(r=2, targets=["*.query", "*.value"]))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2  # layers, targets, A and B
    assert all(".query." in name or ".value." in name for name in trained)
    assert not any(parameter.requires_grad for parameter in PretrainedText(bert[1], frozen=True).parameters())
    with pytest.raises(ValueError, match="lora.targets=.*: matches no linear layer; the nearest are"):
        PretrainedText(bert[1], lora={"targets": "*.quary"})
    with pytest.raises(ValueError, match="frozen=True: cannot be given together with lora"):
        PretrainedText(bert[1], lora={"r": 2}, frozen=True)
    with pytest.raises(ValueError, match="lora=5: must be null or have the keys"):
        PretrainedText(bert[1], lora=5)


# What is not trusted, and what is refused


def test_pickled_weights_are_read_only_if_trusted(bert, tmp_path):
    theirs, _ = bert
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"name_or_path={tmp_path}: .*safetensors"):
        PretrainedText(str(tmp_path))
    inputs = batch()
    ours = PretrainedText(str(tmp_path), trust_remote_code=True).eval()(inputs["text"], inputs["text_mask"])
    expected = theirs(input_ids=inputs["text"], attention_mask=inputs["text_mask"].long()).last_hidden_state
    torch.testing.assert_close(ours, expected)


def test_code_in_the_folder_runs_only_if_trusted(transformers, bert, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "folder"
    bert[0].save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "code.Own", "AutoModel": "code.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        PretrainedText(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_some_of_the_weights_is_refused(bert, tmp_path):
    from safetensors.torch import load_file, save_file

    bert[0].save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has no weights for encoder.layer.1.output.dense.weight; 1 in all"):
        PretrainedText(str(tmp_path))


def test_a_folder_that_is_not_there_is_refused(transformers, tmp_path):
    with pytest.raises(UserError, match=f"name_or_path={tmp_path}/nothing: "):
        PretrainedText(f"{tmp_path}/nothing")
    with pytest.raises(ValueError, match=r"modalities=\['sound'\]: must be a list of image and text"):
        PretrainedCLIP(f"{tmp_path}/nothing", modalities=["sound"])


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda: PretrainedText("x"), "transformers"),
        (lambda: TimmImage("x"), "timm"),
        (lambda: SentenceTransformerText("x"), "sentence_transformers"),
    ],
    ids=["transformers", "timm", "sentence_transformers"],
)
def test_a_package_that_is_missing_is_named_with_its_extra(make, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    extra = "timm" if package == "timm" else "pretrained"
    with pytest.raises(UserError, match=rf"=x\)? needs the package {package}.*\n  pip install.*\[{extra}\]"):
        make()


# Pictures as the model wants them


def test_pictures_of_another_size_and_of_one_channel_are_brought_to_the_model_s(vit):
    theirs, folder = vit
    images = batch(channels=1, size=20)["image"]
    small = nn.functional.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    expected = theirs(pixel_values=scaled(small.expand(-1, 3, -1, -1))).last_hidden_state
    torch.testing.assert_close(PretrainedImage(folder).eval()(images), expected)
    with pytest.raises(ValueError, match="images: have 2 channels; this model wants 3, or 1 to repeat"):
        PretrainedImage(folder)(torch.rand(2, 2, SIZE, SIZE))


def test_mean_and_deviation_are_the_folder_s_or_given_and_never_guessed(vit, tmp_path):
    vit[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no preprocessor_config.json with image_mean and image_std; give mean="):
        PretrainedImage(str(tmp_path))
    given, images = PretrainedImage(str(tmp_path), mean=MEAN, std=STD).eval(), batch()["image"]
    torch.testing.assert_close(given(images), PretrainedImage(vit[1]).eval()(images))
    nested = {"image_processor": {"image_mean": MEAN, "image_std": STD}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    torch.testing.assert_close(PretrainedImage(str(tmp_path)).eval()(images), given(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\]: must be one number, or one for each of 3 channels"),
        ({"std": [0.5, 0.0, 0.5]}, r"std=\[0.5, 0.0, 0.5\]: must be above 0"),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Prepare(**{"size": None, "channels": 3, "mean": [0.5], "std": [0.5]} | options)


# timm and sentence-transformers


@pytest.fixture(scope="module")
def timm():
    """Needs torchvision, of which a build for another torch breaks at its import."""
    return pytest.importorskip("timm", exc_type=ImportError)


TINY = {"img_size": SIZE, "patch_size": 4, "depth": 1, "embed_dim": WIDTH, "num_heads": 2}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_timm_gives_what_timm_gives_with_weights_from_a_file(timm, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    backbone = TimmImage(
        "vit_tiny_patch16_224", pretrained=True, weights=str(tmp_path / "weights.safetensors"), options=TINY
    )
    images, config = batch()["image"], theirs.pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    expected = theirs.forward_head(theirs.forward_features((images - mean) / std), pre_logits=True)
    torch.testing.assert_close(backbone.eval()(images), expected)
    encoder = Encoder(backbone.train(), dim=5)
    encoder({"image": images}).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_timm_takes_pictures_of_one_channel_and_of_another_size(timm):
    backbone = TimmImage("vit_tiny_patch16_224", channels=1, frozen=True, options=TINY)
    assert backbone(torch.rand(2, 1, 20, 20)).shape == (2, WIDTH)
    assert backbone.network.patch_embed.proj.weight.shape[1] == 1
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_timm_s_models_and_weights_that_are_not_possible_are_refused(timm):
    with pytest.raises(UserError, match="name=vit_of_nobody: "):
        TimmImage("vit_of_nobody")
    with pytest.raises(ValueError, match="weights=w.pth: must be a safetensors file, together with pretrained=true"):
        TimmImage("vit_tiny_patch16_224", pretrained=True, weights="w.pth")


@pytest.fixture(scope="module")
def sentences(bert, tmp_path_factory):
    package = pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sentences")
    ids = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(source)
    bert[0].save_pretrained(source)
    network = package.SentenceTransformer(str(source), device="cpu")
    network.save(str(folder))
    return network.eval(), str(folder)


def test_a_sentence_transformer_gives_what_it_gives_for_the_same_words(sentences):
    theirs, folder = sentences
    backbone, inputs = SentenceTransformerText(folder), batch()
    assert backbone.out_features == WIDTH
    assert backbone.training
    lines = [" ".join(f"w{int(t)}" for t, there in zip(text, mask, strict=True) if there)
             for text, mask in zip(inputs["text"], inputs["text_mask"], strict=True)]  # fmt: skip
    expected = theirs.encode(lines, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(backbone.eval()(inputs["text"], inputs["text_mask"]), expected)
    encoder = Encoder(text=backbone.train(), dim=5)
    encoder(only_text(inputs)).square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_a_sentence_transformer_takes_adapters(sentences):
    pytest.importorskip("peft")
    backbone = SentenceTransformerText(sentences[1], lora={"r": 2})
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
