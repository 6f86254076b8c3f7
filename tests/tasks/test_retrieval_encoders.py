import math

import pytest
import torch
from torch import nn

from trainerkit.muon import Muon
from trainerkit.optim import decays, make_optimizer
from trainerkit.tasks.retrieval.encoder import Encoder
from trainerkit.tasks.retrieval.pictures import ImageCNN, ImageViT
from trainerkit.tasks.retrieval.pooling import POOLINGS, masked
from trainerkit.tasks.retrieval.texts import TextBag, TextTransformer, counted_tokens

ROWS, LENGTH, WIDTH, VOCABULARY = 5, 6, 8, 11
IMAGES = {
    "cnn": lambda **o: ImageCNN(image_size=16, widths=(8, 16), grid=2, **o),
    "cnn in cells": lambda **o: ImageCNN(image_size=16, widths=(8, 16), grid=2, flatten=False, **o),
    "vit": lambda **o: ImageViT(image_size=16, patch_size=8, dim=WIDTH, layers=2, heads=2, **o),
    "vit with a class token": lambda **o: ImageViT(
        image_size=16, patch_size=8, dim=WIDTH, layers=2, heads=2, class_token=True, **o
    ),
}
TEXTS = {
    "bag": lambda **o: TextBag(VOCABULARY, dim=WIDTH, **o),
    "bag of logarithms": lambda **o: TextBag(VOCABULARY, dim=WIDTH, log_counts=True, **o),
    "transformer": lambda **o: TextTransformer(VOCABULARY, max_length=12, dim=WIDTH, layers=2, heads=2, **o),
}
BAGS = [kind for kind in TEXTS if kind.startswith("bag")]


def lengths_mask(lengths=(6, 3, 1, 0, 4), length=LENGTH):
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def batch(rows=ROWS, dtype=torch.float32, seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=generator)
    mask = lengths_mask()[:rows]
    images = torch.rand(rows, 1, size, size, generator=generator, dtype=dtype)
    return {"image": images, "text": text * mask, "text_mask": mask}


def make_encoder(image="cnn", text="bag", seed=0, **options):
    torch.manual_seed(seed)
    return Encoder(IMAGES[image](), TEXTS[text](), dim=7, **options)


def moved_right(values, mask):
    """The same tokens with the padding on the left, and what was there in the padding's place."""
    order = torch.arange(mask.shape[1]).expand_as(mask)
    order = torch.stack([row.roll(int((~there).sum())) for row, there in zip(order, mask, strict=True)])
    index = order if values.ndim == 2 else order[..., None].expand_as(values)
    return values.gather(1, index), mask.gather(1, order)


# Pooling


def naive_pool(kind, row):
    """Of a list of vectors."""
    if not row:
        return [0.0] * WIDTH
    if kind == "cls":
        return row[0]
    if kind == "last":
        return row[-1]
    return [max(column) if kind == "max" else sum(column) / len(column) for column in zip(*row, strict=True)]


MASKS = {
    "right": lengths_mask(),
    "left": lengths_mask().flip(1),
    "holes": torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1], [0] * 6, [1] * 6, [0, 0, 1, 0, 0, 0]]).bool(),
}


@pytest.mark.parametrize("kind", ["mean", "cls", "last", "max"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_pooling_is_that_of_the_tokens_alone(kind, mask):
    hidden = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64) - 3  # all below 0, where a maximum could err
    rows = [[vector.tolist() for vector, there in zip(h, m, strict=True) if there]
            for h, m in zip(hidden, mask, strict=True)]  # fmt: skip
    expected = torch.tensor([naive_pool(kind, row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(POOLINGS[kind](hidden, mask), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["mean", "cls", "last", "max"])
def test_no_mask_is_a_mask_of_tokens_only(kind):
    hidden = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    everything = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(POOLINGS[kind](hidden, None), POOLINGS[kind](hidden, everything), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", POOLINGS)
def test_what_stands_in_the_padding_counts_for_nothing_and_gets_no_gradient(kind):
    hidden, mask = torch.randn(ROWS, LENGTH, WIDTH), lengths_mask()
    spoilt = hidden.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    pooled = POOLINGS[kind](spoilt, mask)
    assert torch.equal(pooled, POOLINGS[kind](hidden, mask))
    (pooled * torch.randn_like(pooled)).sum().backward()
    assert spoilt.grad.isfinite().all()
    assert not spoilt.grad[~mask].any()
    assert spoilt.grad[mask].any()


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_the_order_of_tokens_counts_for_nothing_in_means_and_maxima(kind):
    hidden, order = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64), torch.randperm(LENGTH)
    ours, mixed = (
        POOLINGS[kind](h, m) for h, m in ((hidden, MASKS["holes"]), (hidden[:, order], MASKS["holes"][:, order]))
    )
    torch.testing.assert_close(mixed, ours, rtol=0, atol=1e-14)


# The backbones


def naive_bag(bag, row):
    """Of a list of ids."""
    vectors, weights = bag.token_vectors.detach().double(), bag.weights.detach().double()
    times = {token: 1 + math.log(row.count(token)) if bag.log_counts else row.count(token) for token in row}
    shares = [times[token] / row.count(token) * math.exp(weights[token]) for token in row]
    total = sum(share * vectors[token] for share, token in zip(shares, row, strict=True))
    return total / sum(shares) if row else torch.zeros(WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("kind", BAGS)
def test_a_bag_is_the_weighted_mean_of_its_tokens_vectors(kind):
    bag, inputs = TEXTS[kind]().double(), batch()
    inputs["text"][:, :2] = 5  # some more than once
    nn.init.normal_(bag.weights)
    rows = [[int(t) for t, m in zip(text, mask, strict=True) if m]
            for text, mask in zip(inputs["text"], inputs["text_mask"], strict=True)]  # fmt: skip
    expected = torch.stack([naive_bag(bag, row) for row in rows])
    torch.testing.assert_close(bag(inputs["text"], inputs["text_mask"]), expected, rtol=0, atol=1e-14)


def test_tokens_are_counted_in_each_row_apart_and_without_padding():
    text = torch.tensor([[7, 3, 7, 7], [3, 0, 9, 9], [5, 5, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]]).bool()
    found = [part.tolist() for part in counted_tokens(text, mask)]
    assert found == [[0, 0, 1, 1, 1], [3, 7, 0, 3, 9], [1, 3, 1, 1, 1]]


def test_cosines_of_a_new_wide_bag_are_those_of_logarithms_of_counts():
    torch.manual_seed(0)
    bag, text = TextBag(VOCABULARY, dim=20_000, log_counts=True, scale=3.0), batch()["text"]
    counts = torch.stack([torch.bincount(row, minlength=VOCABULARY) for row in text]).double()
    amounts = torch.where(counts > 0, 1 + counts.clamp(min=1).log(), 0.0)
    expected = torch.nn.functional.cosine_similarity(amounts[:, None], amounts[None], dim=-1)
    vectors = bag(text, torch.ones_like(text, dtype=torch.bool)).detach().double()
    found = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert (bag.token_vectors.norm(dim=1) - 3).abs().max() < 0.1


def test_weights_so_large_that_their_exponentials_overflow_leave_a_bag_finite():
    bag, inputs = TEXTS["bag of logarithms"](), batch()
    with torch.no_grad():
        bag.weights.fill_(200.0)
    found = bag(inputs["text"], inputs["text_mask"])
    found.sum().backward()
    assert found.isfinite().all()
    assert bag.weights.grad.isfinite().all()


def test_a_new_bag_is_a_plain_mean():
    bag, text = TEXTS["bag"](), batch()["text"]
    everything = torch.ones_like(text, dtype=torch.bool)
    torch.testing.assert_close(bag(text, everything), bag.token_vectors[text].mean(1))


@pytest.mark.parametrize("kind", BAGS)
def test_a_bag_s_gradients_are_the_numerical_ones(kind):
    bag, inputs = TEXTS[kind]().double(), batch()

    def of(vectors, weights):
        return torch.func.functional_call(
            bag, {"token_vectors": vectors, "weights": weights}, (inputs["text"], inputs["text_mask"])
        )

    weights = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (bag.token_vectors.detach().requires_grad_(), weights))


@pytest.mark.parametrize("kind", BAGS)
def test_dropout_leaves_out_tokens_in_training_only(kind):
    bag, text = TEXTS[kind](dropout=0.5), torch.arange(1, 9)[None].expand(2000, -1) % VOCABULARY
    everything, mean = torch.ones_like(text, dtype=torch.bool), bag.token_vectors[text[0]].mean(0)
    assert not torch.equal(bag(text, everything)[0], bag(text, everything)[1])
    torch.testing.assert_close(bag(text, everything).mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(bag.eval()(text, everything)[0], mean)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_padding_changes_no_embedding_on_either_side_and_whatever_its_length_and_ids(kind, pooling):
    encoder, inputs = make_encoder(text=kind, pooling=pooling).double(), batch()
    text, mask = inputs["text"], inputs["text_mask"]
    expected = encoder({"text": text, "text_mask": mask})
    assert expected.isfinite().all()
    left, left_mask = moved_right(text, mask)
    longer, longer_mask = (nn.functional.pad(x, (0, 3)) for x in (text, mask))
    other_ids = torch.where(mask, text, 5)
    for other in ((left, left_mask), (longer, longer_mask), (other_ids, mask)):
        found = encoder(dict(zip(("text", "text_mask"), other, strict=True)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_rows_do_not_see_each_other(name):
    """A batch in chunks, as a gradient cache computes it, and in another order, gives the same rows."""
    torch.manual_seed(0)
    backbone, inputs = (IMAGES | TEXTS)[name]().double(), batch(dtype=torch.float64)
    arguments = [inputs["image"]] if name in IMAGES else [inputs["text"], inputs["text_mask"]]
    whole, order = backbone(*arguments), torch.randperm(ROWS)
    chunks = torch.cat([backbone(*(a[start : start + 2] for a in arguments)) for start in range(0, ROWS, 2)])
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(backbone(*(a[order] for a in arguments)), whole[order], rtol=0, atol=1e-12)


def test_the_order_of_words_counts_for_a_transformer_and_not_for_a_bag():
    text, everything = torch.tensor([[1, 2, 3], [3, 2, 1]]), torch.ones(2, 3, dtype=torch.bool)
    for kind in BAGS:
        bag = TEXTS[kind]()(text, everything)
        torch.testing.assert_close(bag[0], bag[1])
    mean = TEXTS["transformer"]()(text, everything).mean(1)
    assert (mean[0] - mean[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_picture_s_place_counts(name):
    """A dot in one corner or in the other."""
    images = torch.zeros(2, 1, 16, 16)
    images[0, :, 2:4, 2:4] = images[1, :, 10:12, 10:12] = 1.0
    torch.manual_seed(0)
    found = make_encoder(name)({"image": images})
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_widths_are_those_that_are_said():
    images, text = batch()["image"], (batch()["text"], batch()["text_mask"])
    shapes = {"cnn": (64,), "cnn in cells": (4, 16), "vit": (4, 8), "vit with a class token": (5, 8)}
    for name, make in IMAGES.items():
        backbone = make()
        assert backbone(images).shape == (ROWS, *shapes[name])
        assert backbone.out_features == shapes[name][-1]
    assert TEXTS["bag"]()(*text).shape == (ROWS, WIDTH)
    assert TEXTS["transformer"]()(*text).shape == (ROWS, LENGTH, WIDTH)


@pytest.mark.parametrize("grid", [2, 4], ids=["pooled", "as it is"])
def test_pictures_in_parts_give_what_all_at_once_give(grid, monkeypatch):
    """Against the layers one after another, the first with its kernel of 6×6; the second grid is what the stages leave."""
    torch.manual_seed(0)
    network = ImageCNN(image_size=16, widths=(8, 16), grid=grid).double()
    images = torch.rand(7, 1, 16, 16, dtype=torch.float64)
    hidden = images - 0.5
    for stage, (convolution, norm, _) in enumerate(network.stages):
        kernel = convolution.weight if stage else torch.nn.functional.pixel_shuffle(convolution.weight, 2)
        padding = (kernel.shape[-1] - 1) // 2
        hidden = torch.nn.functional.conv2d(hidden, kernel, convolution.bias, 2, padding)
        hidden = norm(hidden).clamp(min=0)
    means = torch.stack([part.mean((2, 3)) for row in hidden.chunk(grid, 2) for part in row.chunk(grid, 3)], 2)
    for at_a_time in (3, 128):
        monkeypatch.setattr("trainerkit.tasks.retrieval.pictures._AT_A_TIME", at_a_time)
        torch.testing.assert_close(network(images), means.flatten(1))
    odd = images[..., :15, :13]
    padded = torch.nn.functional.pad(odd, (0, 1, 0, 1), value=0.5)
    assert torch.equal(network(odd), network(padded))


@pytest.mark.parametrize(
    ("backbone", "number"),
    [(ImageCNN(), 372_288), (ImageViT(), 803_712), (TextBag(1000), 129_000), (TextTransformer(1000), 532_992)],
    ids=lambda x: type(x).__name__,
)
def test_parameters_are_as_many_as_documented(backbone, number):
    assert sum(parameter.numel() for parameter in backbone.parameters()) == number


def test_each_block_begins_with_weights_of_its_own():
    first, second = TEXTS["transformer"]().blocks
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


# The encoder


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max", "none"])
@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize(("image", "text"), [("cnn", "bag"), ("cnn in cells", "transformer"), ("vit", "transformer")])
def test_gradients_reach_every_parameter_of_both_towers(image, text, projection, pooling):
    encoder, inputs = make_encoder(image, text, projection=projection, pooling=pooling), batch()
    both = encoder({"image": inputs["image"]}), encoder({"text": inputs["text"], "text_mask": inputs["text_mask"]})
    sum((part * torch.randn_like(part)).sum() for part in both).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("combine", ["sum", "concat", "gated"])
def test_gradients_reach_what_combines_picture_and_text(combine):
    encoder = make_encoder(combine=combine)
    encoder(batch()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


def test_a_composed_row_is_what_combine_says():
    inputs = batch(dtype=torch.float64)
    for kind in ("sum", "concat", "gated"):
        encoder = make_encoder(combine=kind).double()
        image = encoder({"image": inputs["image"]})
        text = encoder({"text": inputs["text"], "text_mask": inputs["text_mask"]})
        found = encoder(inputs)
        for row in range(ROWS):
            if kind == "sum":
                expected = image[row] + text[row]
            else:
                layer = encoder.combine.layer
                expected = layer.weight @ torch.cat([image[row], text[row]]) + layer.bias
            if kind == "gated":
                share = 1 / (1 + (-expected).exp())
                expected = share * image[row] + (1 - share) * text[row]
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-12)


def test_late_interaction_keeps_every_vector_and_makes_zeros_of_padding():
    encoder, inputs = make_encoder("vit", "transformer", pooling="none"), batch()
    text = encoder({"text": inputs["text"], "text_mask": inputs["text_mask"]})
    assert text.shape == (ROWS, LENGTH, 7)
    assert torch.equal(text.any(-1), inputs["text_mask"])
    image = encoder({"image": inputs["image"]})
    assert image.shape == (ROWS, 4, 7)
    assert torch.equal(encoder(inputs), torch.cat([image, text], dim=1))


def test_a_backbone_that_has_pooled_gives_late_interaction_one_vector():
    encoder, inputs = make_encoder("cnn", "bag", pooling="none"), batch()
    assert encoder({"image": inputs["image"]}).shape == (ROWS, 1, 7)
    assert encoder({"text": inputs["text"], "text_mask": inputs["text_mask"]}).shape == (ROWS, 1, 7)


def test_pictures_and_texts_may_be_pooled_in_different_ways():
    encoder, inputs = make_encoder("vit with a class token", "transformer", image_pooling="cls"), batch()
    expected = encoder.projections["image"](encoder.towers["image"](inputs["image"])[:, 0])
    assert torch.equal(encoder({"image": inputs["image"]}), expected)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_towers_of_what_the_data_have_not_are_left_out(modality):
    inputs, other = batch(), {"image": "text", "text": "image"}[modality]
    encoder = make_encoder(modalities=[modality], combine="concat")
    assert not any(other in name or "combine" in name for name, _ in encoder.named_parameters())
    encoder({key: value for key, value in inputs.items() if key.startswith(modality)}).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    with pytest.raises(
        ValueError, match=f"inputs: have image, text, text_mask; this encoder has a tower for {modality}$"
    ):
        encoder(inputs)


def test_without_a_projection_embeddings_are_the_backbone_s():
    encoder, inputs = Encoder(IMAGES["cnn"](), projection=None), batch()
    assert encoder.embedding_dim == 64
    assert torch.equal(encoder({"image": inputs["image"]}), encoder.towers["image"](inputs["image"]))


@pytest.mark.parametrize(("image", "text"), [("cnn", "bag"), ("vit", "transformer")])
def test_a_seed_makes_the_same_encoder_and_another_seed_another(image, text):
    inputs = batch()
    first, again, other = (make_encoder(image, text, seed=seed)(inputs) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("image", "text"), [("cnn", "bag"), ("vit", "transformer")])
@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
def test_float64_and_compiled_code_give_the_same(image, text, pooling):
    inputs = batch()
    encoder = make_encoder(image, text, pooling=pooling)
    expected = encoder(inputs)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)(inputs)
    torch.testing.assert_close(compiled, expected)
    exact = encoder.double()(inputs | {"image": inputs["image"].double()})
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("image", "text"), [("cnn", "bag"), ("vit", "transformer")])
def test_evaluation_without_gradients_gives_what_training_gives(image, text):
    """torch has faster code for attention there."""
    encoder, inputs = make_encoder(image, text), batch()
    expected = encoder(inputs)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("image", "text"), [("cnn", "bag"), ("vit", "transformer")])
def test_bfloat16_autocast_is_near(image, text):
    encoder, inputs = make_encoder(image, text), batch()
    expected = encoder(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(inputs)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim=0: must be 1 or more"),
        ({"pooling": "sum"}, "pooling=sum: must be one of mean, cls, last, max, none"),
        ({"image_pooling": "x"}, "image_pooling=x: must be one of"),
        ({"image_pooling": "none"}, "image_pooling=none: is none, for late interaction, if and only if pooling is"),
        ({"projection": "big"}, "projection=big: must be one of linear, mlp, None"),
        ({"combine": "add"}, "combine=add: must be one of sum, concat, gated"),
        ({"combine": "gated", "pooling": "none"}, "combine=gated: must be sum with pooling=none"),
        ({"modalities": ["sound"]}, r"modalities=\['sound'\]: must be a list of image and text"),
        ({"modalities": []}, r"modalities=\[\]: there are backbones for image, text only"),
        ({"projection": None}, "projection=None: backbones of widths .*64.*8.* have no common one"),
        ({"image": None, "text": None}, "image=None, text=None: give a backbone"),
        ({"image": None, "modalities": ["image"]}, r"modalities=\['image'\]: there are backbones for text only"),
        ({"image": nn.Flatten()}, "image=Flatten: a backbone must say its width in an attribute out_features"),
    ],
)
def test_an_encoder_refuses_what_is_not_possible(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Encoder(**{"image": IMAGES["cnn"](), "text": TEXTS["bag"]()} | options)


def test_a_batch_without_anything_to_embed_is_refused():
    with pytest.raises(ValueError, match="inputs: have label; this encoder has a tower for image and one for text"):
        make_encoder()({"label": torch.zeros(3)})
    with pytest.raises(ValueError, match="inputs: have nothing"):
        make_encoder()({})
    with pytest.raises(ValueError, match="inputs: have text; text needs its text_mask as well"):
        make_encoder()({"text": batch()["text"]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageCNN(channels=0), "channels=0: must be 1 or more"),
        (lambda: ImageCNN(widths=(64, 12)), r"widths=\[64, 12\]: must be multiples of 8"),
        (lambda: ImageCNN(widths=()), r"widths=\[\]: must be multiples of 8"),
        (lambda: ImageCNN(image_size=28), "image_size=28: must be 32 or more, for 3 stages"),
        (lambda: ImageCNN(dropout=1.0), "dropout=1.0: must be from 0 to below 1"),
        (lambda: ImageViT(image_size=30), "image_size=30: must be a multiple of patch_size=4"),
        (lambda: ImageViT(dim=10), "dim=10: must be a multiple of heads=4"),
        (lambda: ImageViT(layers=0), "layers=0: must be 1 or more"),
        (lambda: TextBag(0), "vocab_size=0: must be 1 or more"),
        (lambda: TextBag(5, dropout=-0.1), "dropout=-0.1: must be from 0 to below 1"),
        (lambda: TextBag(5, scale=0.0), "scale=0.0: must be above 0"),
        (lambda: TextBag(5, scale=math.inf), "scale=inf: must be above 0"),
        (lambda: TextTransformer(5, max_length=0), "max_length=0: must be 1 or more"),
        (lambda: TextTransformer(5, heads=3), "dim=128: must be a multiple of heads=3"),
        (lambda: IMAGES["vit"]()(torch.rand(2, 1, 8, 8)), r"image_size=16: pictures have the shape \(1, 8, 8\)"),
        (
            lambda: TextTransformer(5, 3)(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4).bool()),
            "max_length=3: texts have up to 4 tokens",
        ),
    ],
)
def test_backbones_refuse_what_is_not_possible(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_masked_without_a_mask_is_the_same():
    hidden = torch.randn(2, 3, 4)
    assert masked(hidden) is hidden


def test_tables_of_tokens_and_positions_do_not_decay_and_are_none_of_muon_s_matrices():
    encoder = Encoder(ImageViT(1, 8, patch_size=4, dim=8, layers=1, heads=2), TextTransformer(9, 8, 8, 1, 2), dim=4)
    tables = {"token_vectors", "position_embedding", "class_token"}
    for name, parameter in encoder.named_parameters():
        if name.rpartition(".")[2] in tables:
            assert not decays(name, parameter, encoder.get_submodule(name.rpartition(".")[0]))
    found = make_optimizer(Muon, encoder).param_groups[0]["params"]
    matrices = {name.rpartition(".")[2] for name, p in encoder.named_parameters() if any(p is q for q in found)}
    assert matrices
    assert not matrices & tables
