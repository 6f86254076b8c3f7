import math

import numpy as np
import pytest
import torch
from torch import nn

from trainerkit.tasks.mae import MaskedAutoencoder, MaskedAutoencoderTask, SpectraAugment, masked_mse, masked_sse
from trainerkit.tasks.mae.augment import fractional_shift, tangent_noise
from trainerkit.tasks.mae.baselines import gaussian_conditional, linear_interpolation, mean_fill
from trainerkit.tasks.mae.masking import fixed_visible, hidden_positions, random_visible, visible_from_mask
from trainerkit.tasks.mae.transformer import Transformer

SMALL = {"seq_len": 24, "n_patches": 6, "n_mask": 4, "latent_dim": 3, "d_model": 8, "nhead": 2, "num_layers": 2}


# Losses


def naive_sse(x_recon, x, mask):
    total = 0.0
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            if mask[row, column]:
                total += float(x_recon[row, column].double() - x[row, column].double()) ** 2
    return total


def example(rows=5, columns=12):
    return torch.randn(rows, columns), torch.randn(rows, columns), torch.rand(rows, columns) < 0.6


@pytest.mark.parametrize("reduction", ["mean", "sum", "batch_mean"])
@pytest.mark.parametrize("loss", [masked_mse, masked_sse])
def test_losses_equal_a_float64_loop(loss, reduction):
    x_recon, x, mask = example()
    expected = naive_sse(x_recon, x, mask) / {"mean": int(mask.sum()), "sum": 1, "batch_mean": 5}[reduction]
    assert loss(x_recon, x, mask, reduction=reduction).item() == pytest.approx(expected, rel=1e-6)


def test_the_default_reductions_are_the_documented_ones():
    x_recon, x, mask = example()
    assert masked_mse(x_recon, x, mask) == masked_mse(x_recon, x, mask, reduction="mean")
    assert masked_sse(x_recon, x, mask) == masked_sse(x_recon, x, mask, reduction="batch_mean")


def test_losses_are_invariant_under_permutation_and_quadratic_in_scale():
    x_recon, x, mask = example()
    order = torch.randperm(5)
    value = masked_mse(x_recon, x, mask)
    torch.testing.assert_close(masked_mse(x_recon[order], x[order], mask[order]), value)
    torch.testing.assert_close(masked_mse(3 * x_recon, 3 * x, mask), 9 * value)
    torch.testing.assert_close(
        masked_sse(x_recon, x, mask, reduction="sum"),
        sum(masked_sse(x_recon[i : i + 2], x[i : i + 2], mask[i : i + 2], reduction="sum") for i in (0, 2, 4)),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "batch_mean"])
def test_an_empty_mask_gives_zero_that_can_go_backward(reduction):
    x_recon = torch.randn(2, 4, requires_grad=True)
    loss = masked_mse(x_recon, torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.bool), reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x_recon.grad, torch.zeros(2, 4))


def test_nan_where_nothing_counts_leaves_value_and_gradients_finite():
    x_recon, x, mask = example()
    expected = masked_mse(x_recon, x, mask)
    x = torch.where(mask, x, math.nan)
    x_recon.requires_grad_()
    loss = masked_mse(x_recon, x, mask)
    loss.backward()
    assert loss == expected
    assert x_recon.grad.isfinite().all()
    with pytest.raises(ValueError, match="reduction=median: must be one of mean, sum, batch_mean"):
        masked_mse(x_recon, x, mask, reduction="median")


# Masks


def test_random_patches_are_as_many_as_asked_and_uniform():
    torch.manual_seed(0)
    visible = random_visible(20000, 5, 2, device=torch.device("cpu"))
    assert all(len(set(row)) == 2 for row in visible[:50].tolist())
    share = torch.bincount(visible.flatten(), minlength=5) / 20000
    torch.testing.assert_close(share, torch.full((5,), 0.4), atol=0.02, rtol=0)


def test_fixed_patches_are_a_function_of_the_row_alone_and_uniform():
    rows = torch.randperm(20000)
    state = torch.get_rng_state()
    whole = fixed_visible(rows, 5, 2)
    parts = torch.cat([fixed_visible(part, 5, 2) for part in rows.split(77)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole, parts)
    share = torch.bincount(whole.flatten(), minlength=5) / 20000
    torch.testing.assert_close(share, torch.full((5,), 0.4), atol=0.02, rtol=0)
    assert not torch.equal(whole, fixed_visible(rows, 5, 2, seed=1))


def test_positions_and_indices_are_inverse():
    visible = random_visible(7, 6, 2, device=torch.device("cpu"))
    hidden = hidden_positions(visible, 6, 4)
    assert hidden.shape == (7, 24)
    assert torch.equal(hidden.sum(1), torch.full((7,), 16))
    assert torch.equal(visible_from_mask(~hidden, 6), visible.sort(1).values)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 25, dtype=torch.bool), "25 positions, not a multiple of n_patches=6"),
        (torch.arange(48).view(2, 24) % 3 > 0, "visible or hidden as a whole"),
        (torch.tensor([[True] * 24, [True] * 12 + [False] * 12]), "the same number of patches, got"),
    ],
)
def test_masks_that_fit_no_patches_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        visible_from_mask(mask, 6)


# Network


def test_the_transformer_equals_torchs_own():
    mine = Transformer(3, 16, 4, 32, 0.0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(5, 7, 16)
    torch.testing.assert_close(mine(x), theirs(x), atol=1e-6, rtol=1e-5)


def test_the_first_tokens_alone_are_those_of_all():
    transformer = Transformer(3, 16, 4, 32, 0.0)
    x = torch.randn(5, 7, 16)
    for first in (1, 3, 7):
        torch.testing.assert_close(transformer(x, first), transformer(x)[:, :first], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("decoder", ["latent", "tokens"])
def test_forward_gives_the_documented_shapes(decoder):
    network = MaskedAutoencoder(**SMALL, decoder=decoder)
    x_recon, z, visible_mask = network(torch.randn(4, 24))
    assert x_recon.shape == visible_mask.shape == (4, 24)
    assert z.shape == (4, 3)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    assert visible_mask.view(4, 6, 4).all(2).sum(1).tolist() == [2] * 4


@pytest.mark.parametrize("decoder", ["latent", "tokens"])
def test_hidden_patches_are_not_looked_at_and_the_order_of_visible_ones_does_not_matter(decoder):
    network = MaskedAutoencoder(**SMALL, decoder=decoder).eval()
    x = torch.randn(4, 24)
    visible = random_visible(4, 6, 2, device=x.device)
    x_recon, z, visible_mask = network(x, visible)
    other = torch.where(visible_mask, x, torch.randn_like(x))
    torch.testing.assert_close(network(other, visible)[0], x_recon)
    torch.testing.assert_close(network(x, visible.flip(1))[0], x_recon)
    torch.testing.assert_close(network(x, visible.flip(1))[1], z)


def test_samples_do_not_see_each_other():
    network = MaskedAutoencoder(**SMALL, decoder="tokens").eval()
    x, visible = torch.randn(4, 24), random_visible(4, 6, 2, device=torch.device("cpu"))
    alone = torch.cat([network(x[i : i + 1], visible[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(network(x, visible)[0], alone)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_decoder_depth_and_latents_without_normalization(layers):
    network = MaskedAutoencoder(**SMALL, decoder_num_layers=layers, latent_normalize=False)
    assert network(torch.randn(2, 24))[0].shape == (2, 24)
    assert not torch.allclose(network.encode(torch.randn(2, 24)).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_mask": 99}, "n_mask=99: must be from 0 to 5, since one of n_patches=6 stays visible"),
        ({"n_mask": -1}, "n_mask=-1: must be from 0 to 5"),
        ({"n_patches": 7}, r"n_patches=7: must divide seq_len=24; take one of .*6.*8.*pad the signals to 28"),
        ({"d_model": 9}, "d_model=9: must be a multiple of nhead=2"),
        ({"decoder_dim": 5, "decoder": "tokens"}, "decoder_dim=5: must be a multiple of nhead=2"),
        ({"latent_dim": 0}, "latent_dim=0: must be 1 or more"),
        ({"dropout": 1.0}, "dropout=1.0: must be from 0 to below 1"),
        ({"decoder": "mlp"}, "decoder=mlp: must be one of latent, tokens"),
    ],
)
def test_impossible_sizes_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(**SMALL | options)


def test_a_signal_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"x: has shape \(2, 25\); needed is \(batch, seq_len=24\)"):
        MaskedAutoencoder(**SMALL)(torch.randn(2, 25))


# Weights


def test_weights_load_from_every_kind_of_file_that_a_run_writes(tmp_path):
    from safetensors.torch import save_file

    network = MaskedAutoencoder(**SMALL)
    state = network.state_dict()
    save_file({f"network.{name}": tensor for name, tensor in state.items()}, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"state_dict": {f"network.{name}": tensor for name, tensor in state.items()}}, tmp_path / "c.ckpt")
    torch.save({"artifact": "chemomae.model", "config": {}, "state_dict": state}, tmp_path / "d.pt")
    for path in sorted(tmp_path.iterdir()):
        other = MaskedAutoencoder(**SMALL, weights=str(path))
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items()), path


def test_files_that_do_not_fit_or_run_code_are_refused(tmp_path):
    from trainerkit.errors import UserError

    torch.save(MaskedAutoencoder(**SMALL | {"latent_dim": 2}).state_dict(), tmp_path / "small.pt")
    with pytest.raises(UserError, match=r"encoder.to_latent.weight is \(2, 8\), the network's \(3, 8\)"):
        MaskedAutoencoder(**SMALL, weights=str(tmp_path / "small.pt"))
    with pytest.raises(UserError, match="there is no such file"):
        MaskedAutoencoder(**SMALL, weights=str(tmp_path / "none.pt"))
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        MaskedAutoencoder(**SMALL, weights=str(tmp_path / "broken.safetensors"))

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"encoder": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"holds pickled code, which was not run: _?io\.open"):
        MaskedAutoencoder(**SMALL, weights=str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # from inside chemomae
def test_weights_of_the_published_package_give_the_same_outputs(tmp_path):
    """Runs where chemomae 0.2.4 is installed (pip install chemomae==0.2.4)."""
    chemomae = pytest.importorskip("chemomae.models")
    sizes = {"seq_len": 200, "n_patches": 20, "n_mask": 15, "latent_dim": 16, "d_model": 32, "nhead": 4}
    theirs = chemomae.ChemoMAE(**sizes, num_layers=3, decoder_num_layers=3).eval()
    theirs.save(tmp_path / "artifact.pt")
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    x, visible_mask = torch.randn(8, 200), theirs.make_visible(8)
    for name in ("artifact.pt", "weights.pt"):
        mine = MaskedAutoencoder(**sizes, num_layers=3, decoder_num_layers=3, weights=str(tmp_path / name)).eval()
        with torch.no_grad():
            expected = theirs(x, visible_mask)
            found = mine(x, visible_from_mask(visible_mask, 20))
        for a, b in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert torch.equal(found[2], visible_mask)
        torch.testing.assert_close(mine.encode(x), theirs.encode(x), atol=1e-6, rtol=0)


# Augmentation


def about_mean(x):
    return (x - x.mean(1, keepdim=True)).norm(dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_augmentation_keeps_mean_and_norm(seed):
    torch.manual_seed(seed)
    x = torch.randn(64, 50, dtype=torch.float64).cumsum(1) + 3
    augmented = SpectraAugment(shift_prob=0.8, noise_prob=0.8)(x)
    torch.testing.assert_close(augmented.mean(1), x.mean(1))
    torch.testing.assert_close(about_mean(augmented), about_mean(x))
    assert not torch.allclose(augmented, x)
    assert torch.equal(SpectraAugment().eval()(x), x)


def test_noise_turns_by_exactly_the_angle():
    x, noise = torch.randn(9, 40, dtype=torch.float64), torch.randn(9, 40, dtype=torch.float64)
    angle = torch.linspace(0, math.pi, 9, dtype=torch.float64)
    turned = tangent_noise(x, noise, angle)
    a, b = (v - v.mean(1, keepdim=True) for v in (x, turned))
    cosine = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(cosine, angle.cos())
    constant = torch.full((1, 40), 2.0)
    assert torch.equal(tangent_noise(constant, noise[:1].float(), torch.ones(1)), constant)


def test_shifts_equal_a_loop_and_whole_shifts_move_values():
    x = torch.randn(4, 10, dtype=torch.float64)
    shift = torch.tensor([0.0, 1.0, -2.0, 0.25], dtype=torch.float64)
    found = fractional_shift(x, shift)
    for row in range(4):
        moved = np.interp(np.arange(10) - float(shift[row]), np.arange(10), x[row].numpy())
        moved = moved - moved.mean()
        scale = float(about_mean(x)[row]) / np.linalg.norm(moved)
        np.testing.assert_allclose(found[row].numpy(), float(x[row].mean()) + moved * scale)
    torch.testing.assert_close(found[0], x[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift_prob": 2}, "shift_prob=2: must be from 0 to 1"),
        ({"shift_range": (2, 1)}, r"shift_range=\[2, 1\]: must be two numbers, the lower first"),
        ({"noise_degrees": (-1, 1)}, r"noise_degrees=\[-1, 1\]: must lie within 0 to 180"),
    ],
)
def test_impossible_augmentations_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        SpectraAugment(**options)


# Baselines


def test_the_gaussian_conditional_equals_a_loop_in_float64():
    train = (torch.randn(200, 12) @ torch.randn(12, 12)).double()
    x = (torch.randn(5, 12) @ torch.randn(12, 12)).double()
    visible = random_visible(5, 4, 2, device=x.device)
    found = gaussian_conditional(train, x, visible, 4, ridge=0.0)
    mean, covariance = train.mean(0).numpy(), np.cov(train.numpy().T)
    for row in range(5):
        seen = np.concatenate([np.arange(3 * p, 3 * p + 3) for p in visible[row].tolist()])
        weights = np.linalg.solve(covariance[np.ix_(seen, seen)], x[row].numpy()[seen] - mean[seen])
        np.testing.assert_allclose(found[row].numpy(), mean + covariance[:, seen] @ weights, rtol=1e-6)
        np.testing.assert_allclose(found[row].numpy()[seen], x[row].numpy()[seen], rtol=1e-6)


def test_simple_fills():
    x = torch.tensor([[0.0, 9.0, 2.0, 9.0, 9.0]])
    hidden = torch.tensor([[False, True, False, True, True]])
    assert linear_interpolation(x, hidden).tolist() == [[0.0, 1.0, 2.0, 2.0, 2.0]]
    assert torch.equal(mean_fill(torch.tensor([[1.0] * 5, [3.0] * 5]), x), torch.full((1, 5), 2.0))


# Task


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x, "meta"), lambda x: [x], lambda x: {"x": x, "y": 1}])
def test_every_documented_kind_of_batch_is_taken(make):
    task = MaskedAutoencoderTask(MaskedAutoencoder(**SMALL))
    assert task.training_step(make(torch.randn(4, 24)), 0).isfinite()


@pytest.mark.parametrize("batch", [{"y": torch.ones(2)}, ("text",), 3])
def test_other_batches_are_refused(batch):
    with pytest.raises(ValueError, match="batch: must be a tensor x, a tuple"):
        MaskedAutoencoderTask(MaskedAutoencoder(**SMALL)).training_step(batch, 0)


def test_rows_without_numbers_are_counted():
    task = MaskedAutoencoderTask(MaskedAutoencoder(**SMALL))
    rows = [task._rows(torch.zeros(n, 24), i).tolist() for i, n in enumerate((3, 3, 2))]
    assert rows == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mae"}, "loss=mae: must be one of mse, sse"),
        ({"reduction": "max"}, "reduction=max: must be one of mean, sum, batch_mean"),
        ({"network": MaskedAutoencoder(**SMALL | {"n_mask": 0})}, "network.n_mask=0: nothing is hidden"),
    ],
)
def test_impossible_tasks_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoderTask(**{"network": MaskedAutoencoder(**SMALL)} | options)
