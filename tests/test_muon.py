import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tests.support import toy_trainer, two_processes
from trainerkit.loop import FastTrainingEpochLoop
from trainerkit.muon import Muon, newton_schulz, orthogonalized
from trainerkit.optim import make_optimizer, make_scheduler, warmup_stable_decay
from trainerkit.task import Task
from trainerkit.trainer import Trainer


class Net(nn.Module):
    """An embedding, hidden matrices both wide and tall, a norm, a projection tied to nothing, a head."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.token_embedding = nn.Embedding(9, 8)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 8))
        self.output = nn.Linear(8, 9, bias=False)
        self.to(dtype)

    def forward(self, tokens):
        return self.output(self.layers(self.token_embedding(tokens)))


def backward(net, step=0):
    tokens = torch.arange(9).roll(step)
    nn.functional.cross_entropy(net(tokens), tokens.flip(0)).backward()


def train(net, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


def naive_step(p, gradient, state, t, *, muon, lr, weight_decay, momentum, nesterov, ns_steps, original):
    """One update of one parameter, word for word."""
    p = p * (1 - lr * weight_decay)
    if not muon:
        first, second = state or (torch.zeros_like(p), torch.zeros_like(p))
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        step = (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        return p - lr * step, (first, second)
    buffer = momentum * (state[0] if state else torch.zeros_like(p)) + (1 - momentum) * gradient
    u = (1 - momentum) * gradient + momentum * buffer if nesterov else buffer
    x = u / math.sqrt(float((u * u).sum()))
    for _ in range(ns_steps):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    rows, columns = p.shape
    ratio = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
    return p - lr * ratio * x, (buffer,)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_ten_steps_are_those_of_the_naive_update(nesterov, adjust):
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 4}
    net, twin = Net(), Net()
    found = train(net, make_optimizer(partial(Muon, adjust_lr_fn=adjust, **options), net), 10)
    values, states = [p.detach().clone() for p in twin.parameters()], [None] * len(found)
    names = [name for name, _ in twin.named_parameters()]
    for step in range(10):
        twin.zero_grad()
        backward(twin, step)
        for place, p in enumerate(twin.parameters()):
            matrix = names[place] in ("layers.0.weight", "layers.2.weight", "layers.3.weight")
            decay = 0.1 if matrix or names[place] == "output.weight" else 0.0
            values[place], states[place] = naive_step(
                values[place], p.grad, states[place], step + 1, muon=matrix, original=adjust == "original",
                **(options | {"weight_decay": decay}),
            )  # fmt: skip
            p.data.copy_(values[place])
    for one, other in zip(found, values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_updated_as_the_matrix_of_its_output_channels(layout):
    """One without groups; the kernels of one with groups are no such matrix, and AdamW's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)).double().to(memory_format=layout)
    optimizer = make_optimizer(partial(Muon, lr=0.02, weight_decay=0.1), net)
    assert [p is net[0].weight for p in optimizer.param_groups[0]["params"]] == [True]
    value, state = net[0].weight.detach().flatten(1).clone(), None
    for step in range(5):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 9, 9, dtype=torch.float64)).square().mean().backward()
        value, state = naive_step(
            value, net[0].weight.grad.flatten(1), state, step + 1, muon=True, lr=0.02, weight_decay=0.1, momentum=0.95,
            nesterov=True, ns_steps=5, original=False,
        )  # fmt: skip
        optimizer.step()
    torch.testing.assert_close(net[0].weight.detach().flatten(1), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_ten_steps_are_those_of_torchs_muon_and_adamw(adjust):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    ours, theirs = Net(torch.float32), Net(torch.float32)
    exact = Net()
    make = partial(Muon, lr=0.01, adjust_lr_fn=adjust)
    start = [p.detach().clone() for p in ours.parameters()]
    found, true = train(ours, make_optimizer(make, ours), 10), train(exact, make_optimizer(make, exact), 10)
    matrix, others = make_optimizer(Muon, theirs).param_groups[0], make_optimizer(Muon, theirs).param_groups[1:]
    pair = [
        torch.optim.Muon(matrix["params"], lr=0.01, adjust_lr_fn=adjust),
        torch.optim.AdamW(
            [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in others],
            lr=0.01,
            betas=(0.9, 0.95),
        ),
    ]
    for step in range(10):
        theirs.zero_grad()
        backward(theirs, step)
        for optimizer in pair:
            optimizer.step()
    for first, one, other, target in zip(start, found, theirs.parameters(), true, strict=True):
        moved = target - first
        mine, his = (float((end.detach() - target).norm() / moved.norm()) for end in (one, other))
        # Ten steps whose iterations have bfloat16's eight bits: neither is nearer to float64.
        assert max(mine, his) < 0.1
        assert mine < 2 * his + 0.01


def test_singular_values_come_near_one():
    torch.manual_seed(2)
    for rows, columns in ((12, 12), (5, 30), (40, 8)):
        u, _, v = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
        matrix = 100 * u @ torch.diag(torch.linspace(0.1, 1, len(v), dtype=torch.float64)) @ v
        (found,) = orthogonalized([matrix])
        values = torch.linalg.svdvals(found)
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.25
        torch.testing.assert_close(found @ v.T @ u.T, (found @ v.T @ u.T).T)  # with the same singular vectors


def test_the_scale_of_the_gradient_does_not_matter():
    def moved(scale):
        net = Net()
        groups = [{"params": [net.layers[0].weight], "muon": True, "weight_decay": 0.0}]
        optimizer = Muon(groups, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            backward(net)
            net.layers[0].weight.grad *= scale
            optimizer.step()
        return net.layers[0].weight.detach()

    torch.testing.assert_close(moved(1e-3), moved(1e3), rtol=1e-6, atol=1e-6)


def test_turning_or_reflecting_the_gradient_turns_and_reflects_the_update():
    matrix = torch.randn(6, 9, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (6, 9))
    (plain,) = orthogonalized([matrix])
    (turned,) = orthogonalized([left @ matrix @ right])
    (transposed,) = orthogonalized([matrix.T])
    torch.testing.assert_close(turned, left @ plain @ right)
    torch.testing.assert_close(transposed, plain.T)


def test_a_batch_gives_each_matrix_what_it_gets_alone():
    shapes = [(4, 7), (7, 4), (3, 3), (4, 7), (5, 1)]
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    matrices[3] = torch.zeros(4, 7, dtype=torch.float64)
    for matrix, found in zip(matrices, orthogonalized(matrices), strict=True):
        assert found.shape == matrix.shape
        torch.testing.assert_close(found, orthogonalized([matrix])[0])
    assert not orthogonalized(matrices)[3].any()


def test_half_precision_errs_by_its_eight_bits_and_float32_by_less():
    x = torch.randn(2, 20, 30)
    exact = newton_schulz(x.double(), 5, torch.float64)
    half, single = (newton_schulz(x, 5, kind) for kind in (torch.bfloat16, torch.float32))
    assert half.dtype == single.dtype == torch.float32
    assert 1e-3 < float((half - exact).norm() / exact.norm()) < 0.03
    assert float((single - exact).norm() / exact.norm()) < 1e-4


def test_match_rms_makes_an_update_as_large_as_adamws():
    """About 0.2 a number, whatever the shape (Liu et al. 2025); AdamW's are from 0.2 to 0.4."""
    for shape in ((16, 64), (64, 16), (32, 32)):
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        weight.grad = torch.randn(shape, dtype=torch.float64)
        Muon([{"params": [weight], "muon": True}], lr=1.0, weight_decay=0.0).step()
        assert 0.15 < float(weight.detach().square().mean().sqrt()) < 0.25


def test_hidden_matrices_are_muons_and_all_else_adamws():
    net = Net()
    net.lm_head = nn.Linear(8, 9)
    net.head = nn.Sequential(nn.Linear(8, 9))
    net.conv = nn.Conv1d(8, 8, 3)
    net.heads_of_attention = nn.MultiheadAttention(8, 2)
    net.frozen = nn.Linear(8, 8).requires_grad_(False)
    net.position = nn.Embedding(4, 8)
    names = {id(p): name for name, p in net.named_parameters()}
    first, *others = make_optimizer(partial(Muon, weight_decay=0.3), net).param_groups
    assert {names[id(p)] for p in first["params"]} == {
        "layers.0.weight", "layers.2.weight", "layers.3.weight", "conv.weight", "heads_of_attention.in_proj_weight",
        "heads_of_attention.out_proj.weight",
    }  # fmt: skip
    assert (first["muon"], first["weight_decay"]) == (True, 0.3)
    assert [(group["muon"], group["weight_decay"]) for group in others] == [(False, 0.3), (False, 0.0)]
    assert {names[id(p)] for p in others[0]["params"]} == {
        "output.weight", "lm_head.weight", "head.0.weight",
    }  # fmt: skip
    grouped = [id(p) for group in (first, *others) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_a_head_that_is_tied_to_the_embedding_is_adamws():
    net = Net()
    net.output.weight = net.token_embedding.weight
    first, *others = make_optimizer(Muon, net).param_groups
    assert all(p is not net.output.weight for p in first["params"])
    assert any(p is net.output.weight for group in others for p in group["params"])


def test_a_schedule_scales_both_rates():
    net = Net()
    optimizer = make_optimizer(partial(Muon, lr=0.02, adamw_lr=0.003), net)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.003, 0.003]
    train(net, optimizer, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.0015, 0.0015])
    again = make_scheduler(warmup_stable_decay, optimizer, total_steps=20, steps_per_epoch=5)
    assert again.get_last_lr() == pytest.approx([0.004, 0.0006, 0.0006])


@pytest.mark.parametrize("fused", [False, True])
def test_its_state_goes_through_a_safe_file_and_on_from_there(fused, tmp_path):
    net, twin = Net(), Net()
    optimizer = make_optimizer(partial(Muon, fused=fused), net)
    train(net, optimizer, 3)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    other = make_optimizer(partial(Muon, fused=fused), twin)
    twin.load_state_dict(state["net"])
    other.load_state_dict(state["optimizer"])
    for one, two in zip(train(net, optimizer, 3), train(twin, other, 3), strict=True):
        assert torch.equal(one, two)


def batches(number):
    return DataLoader([torch.arange(9).roll(step) for step in range(number)], batch_size=None)


class Model(Task):
    def __init__(self, **options):
        super().__init__(**options)
        self.net = Net(torch.float32)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch), (batch + 1) % 9)
        self.track("train/loss", loss)
        return loss

    def train_dataloader(self):
        return batches(6)


def fit(folder, kind=Trainer, **options):
    torch.manual_seed(0)
    task = Model(optimizer=partial(Muon, lr=0.05), scheduler=warmup_stable_decay)
    trainer = toy_trainer(folder, kind=kind, max_epochs=4, gradient_clip_val=1.0, **options)
    trainer.fit(task)
    return trainer, task


def test_a_task_trains_with_it_in_the_fast_loop_as_in_lightnings(tmp_path):
    trainer, task = fit(tmp_path)
    assert isinstance(trainer.fit_loop.epoch_loop, FastTrainingEpochLoop)
    assert float(trainer.callback_metrics["train/loss"]) < 1.5 < math.log(9)
    _, other = fit(tmp_path, kind=pl.Trainer)
    for one, two in zip(task.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_it_trains_in_mixed_precision_with_accumulation(tmp_path):
    trainer, _ = fit(tmp_path, precision="bf16-mixed", accumulate_grad_batches=2)
    assert float(trainer.callback_metrics["train/loss"]) < 2.0 < math.log(9)


def sharded_steps(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    net = fully_shard(Net(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = make_optimizer(Muon, net)
    train(net, optimizer, 3)
    buffer = optimizer.state[net.layers[0].weight]["momentum_buffer"]
    assert isinstance(buffer, DTensor)
    assert buffer.to_local().shape == (8, 8)
    whole = [parameter.full_tensor().tolist() for parameter in net.parameters()]
    torch.distributed.destroy_process_group()
    return whole


def test_two_processes_with_shards_do_what_one_does(tmp_path):
    net = Net()
    expected = train(net, make_optimizer(Muon, net), 3)
    for outcome in two_processes(lambda rank: sharded_steps(rank, tmp_path), tmp_path / "ranks"):
        assert "error" not in outcome, outcome
        for one, other in zip(outcome["result"], expected, strict=True):
            torch.testing.assert_close(torch.tensor(one, dtype=torch.float64), other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0: must be 0 or more"),
        ({"adamw_lr": -1.0}, "adamw_lr=-1.0: must be 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must be 0 or more"),
        ({"momentum": 1.0}, "momentum=1.0: must be from 0 to below 1"),
        ({"betas": (0.9, 1.5)}, r"betas=\[0.9, 1.5\]: must be two numbers from 0 to below 1"),
        ({"ns_steps": 0}, "ns_steps=0: must be from 1 to 99"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn=none: must be one of match_rms_adamw, original"),
    ],
)
def test_impossible_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(partial(Muon, **options), Net())


def test_what_has_no_matrices_is_refused():
    with pytest.raises(ValueError, match="no trainable hidden matrix for Muon; take another optimizer"):
        make_optimizer(Muon, nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="no group is of matrices"):
        Muon(Net().parameters())
    with pytest.raises(ValueError, match=r"shape \(8,\) is no matrix"):
        Muon([{"params": nn.Conv1d(8, 8, 3).bias, "muon": True}])


def test_a_module_of_lightnings_can_use_it_too(tmp_path):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net(torch.float32)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch), (batch + 1) % 9)

        def train_dataloader(self):
            return batches(4)

        def configure_optimizers(self):
            return make_optimizer(Muon, self)

    module = Plain()
    before = module.net.layers[0].weight.detach().clone()
    toy_trainer(tmp_path, kind=pl.Trainer, max_epochs=1).fit(module)
    assert not torch.equal(before, module.net.layers[0].weight)
