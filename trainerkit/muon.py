"""Muon for hidden matrices, AdamW for everything else, as one optimizer: `optimizer=muon`.

Muon takes the momentum with all its singular values near 1. With G the gradient, B the momentum, μ its factor:

    B ← μB + (1−μ)G,    U = G + μ(B − G),    W ← (1 − ηλ)W − η·r·NS(U)

NS is Newton and Schulz's iteration on X = U/‖U‖, five times: X ← aX + (bA + cA²)X with A = XXᵀ. It takes singular
values to between 0.7 and 1.2, not to 1. r is 0.2·√max(m, n) for a matrix of m × n, which makes the update as large as
AdamW's, so that one learning rate serves both; or √max(1, m/n), the author's own.

A convolution's kernel counts as the matrix of its output channels by everything else, as the author takes it.

All matrices of one shape are one batch, computed in bfloat16 as torch.optim.Muon (torch 2.9 and later) computes one
after the other, but in float32 on a CPU that bfloat16 would slow down: `python -m tests.benchmarks.muon`.

Sources: K. Jordan, 'Muon: an optimizer for hidden layers', https://kellerjordan.github.io/posts/muon, 2024; J. Liu et
al., 'Muon is scalable for LLM training', 2025 (arXiv:2502.16982).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from trainerkit.optim import decays, parameter_groups

Group = dict[str, Any]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_HEADS = {"head", "output", "classifier"}  # words in the name of an output layer
_ADJUST = ("match_rms_adamw", "original")


class Muon(Optimizer):
    """One optimizer whose groups marked `muon` are updated by Muon and whose others by AdamW.

    `trainerkit.optim.make_optimizer` (so every Task) marks them. Learning-rate schedules, clipping, averages and
    checkpoints see an ordinary optimizer. Where parameters are sharded (FSDP2), every process gathers the matrices and
    computes them all.

    Args:
        params: groups; at least one with `"muon": True`, of parameters with 2 dimensions or more; all but the first
            count as one.
        lr: learning rate η of the matrices.
        weight_decay: λ, decoupled; a group's own wins.
        momentum: μ, from 0 to below 1.
        nesterov: False takes U = B.
        ns_steps: iterations of Newton and Schulz, from 1 to 99.
        adjust_lr_fn: r, 'match_rms_adamw' or 'original'.
        adamw_lr: learning rate of everything else; None: `lr`.
        betas: AdamW's.
        eps: AdamW's.
        fused: whether AdamW's part uses the fused kernel; None: no, but `make_optimizer` chooses.

    Raises:
        ValueError: for a value outside its range, groups without matrices, or a marked parameter that is none.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("adamw_lr", adamw_lr or 0.0), ("eps", eps)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: must be 0 or more")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: must be from 0 to below 1")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={list(betas)}: must be two numbers from 0 to below 1")
        if not 1 <= ns_steps < 100:
            raise ValueError(f"ns_steps={ns_steps}: must be from 1 to 99")
        if adjust_lr_fn not in _ADJUST:
            raise ValueError(f"adjust_lr_fn={adjust_lr_fn}: must be one of {', '.join(_ADJUST)}")
        defaults: Group = {"lr": lr, "weight_decay": weight_decay, "muon": False, "fused": bool(fused)}
        defaults |= {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        defaults |= {"betas": tuple(betas), "eps": eps}
        groups: list[Group] = [dict(group) if isinstance(group, dict) else {"params": [group]} for group in params]
        if not any(group.get("muon") for group in groups):
            raise ValueError("params: no group is of matrices (muon=True); trainerkit.optim.make_optimizer marks them")
        for group in groups:
            if not group.get("muon") and adamw_lr is not None:
                group.setdefault("lr", adamw_lr)
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; a group marked `muon` may hold parameters of 2 dimensions or more only."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        shapes = [tuple(parameter.shape) for parameter in group["params"] if parameter.ndim < 2]
        if group["muon"] and shapes:
            self.param_groups.pop()
            raise ValueError(f"params: a parameter of shape {shapes[0]} is no matrix; leave muon=True off its group")

    @staticmethod
    def parameter_groups(module: nn.Module, weight_decay: float) -> list[Group]:
        """Divide a module's trainable parameters: matrices for Muon; for AdamW what decays, and what does not.

        A matrix is a 2-dimensional parameter that decays (`trainerkit.optim.decays`: no embedding, bias, norm or
        token), or the kernel of a convolution without groups. Neither is one that is tied to an embedding or of an
        output layer: a module with 'head', 'output' or 'classifier' in its name, words being divided by underscores
        (`lm_head`).

        Raises:
            ValueError: if there is none.
        """
        matrices = [
            parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and _is_hidden_matrix(name, parameter, module)
        ]
        if not matrices:
            raise ValueError(
                "module: has no trainable hidden matrix for Muon; take another optimizer, such as optimizer=adamw"
            )
        chosen = {id(parameter) for parameter in matrices}
        others = [
            group | {"params": rest}
            for group in parameter_groups(module, weight_decay)
            if (rest := [parameter for parameter in group["params"] if id(parameter) not in chosen])
        ]
        return [{"params": matrices, "weight_decay": weight_decay, "muon": True}, *others]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._muon if group["muon"] else self._adamw)(group, parameters)
        return loss

    def _muon(self, group: Group, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = _gradients(parameters)
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            buffers = list(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        matrices = [buffer.flatten(1) for buffer in buffers]
        for parameter, update in zip(parameters, orthogonalized(matrices, group["ns_steps"]), strict=True):
            m, n = update.shape
            ratio = 0.2 * math.sqrt(max(m, n))
            if group["adjust_lr_fn"] == "original":
                ratio = math.sqrt(max(1, m / n))
            parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * ratio)

    def _adamw(self, group: Group, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                device = parameter.device if group["fused"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            _gradients(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def orthogonalized(matrices: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Each matrix with its singular values taken to near 1 by Newton and Schulz's iteration.

    Args:
        matrices: (m, n) of any shapes; those of one shape, or of one shape turned round, are computed as one batch.
            In bfloat16; float64 in float64; float32 on a CPU without instructions for bfloat16.
        steps: of the iteration.

    Returns:
        In the order and the types given; sharded matrices (DTensor) are gathered, and cut as they were. A matrix of
        zeros stays one.
    """
    batches: dict[tuple[torch.Size, torch.device, torch.dtype], list[int]] = {}
    wide = []
    for place, matrix in enumerate(matrices):
        whole = _gathered(matrix)
        whole = whole.mT if whole.shape[0] > whole.shape[1] else whole  # XXᵀ is the smaller product
        wide.append(whole)
        batches.setdefault((whole.shape, whole.device, whole.dtype), []).append(place)
    found: dict[int, Tensor] = {}
    for places in batches.values():
        batch = newton_schulz(torch.stack([wide[place] for place in places]), steps, _kind(wide[places[0]]))
        found |= zip(places, batch, strict=True)
    return [_as_was(found[place], matrix) for place, matrix in enumerate(matrices)]


def newton_schulz(x: Tensor, steps: int, kind: torch.dtype) -> Tensor:
    """The iteration, a quintic whose factors make it fast rather than exact (Jordan 2024).

    Args:
        x: (B, m, n) with m ≤ n, or it takes longer.
        steps: of the iteration.
        kind: the type to compute in.

    Returns:
        (B, m, n), in the type of `x`.
    """
    a, b, c = _COEFFICIENTS
    y: Tensor = (x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(_EPS)).to(kind)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.to(x.dtype)


def _kind(x: Tensor) -> torch.dtype:
    """The fastest type that is exact enough for x, and float64 for float64."""
    if x.dtype == torch.float64:
        return x.dtype
    slow = x.device.type == "cpu" and not (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.float32 if slow else torch.bfloat16


def _is_hidden_matrix(name: str, parameter: nn.Parameter, module: nn.Module) -> bool:
    path = name.rpartition(".")[0]
    owner = module.get_submodule(path)
    is_matrix = owner.groups == 1 if isinstance(owner, _ConvNd) else parameter.ndim == 2
    if not is_matrix or not decays(name, parameter, owner):
        return False
    words = [word for word in path.split(".") if not word.isdigit()]  # an index within a Sequential
    return not (words and _HEADS & set(words[-1].split("_")))


def _gathered(matrix: Tensor) -> Tensor:
    gather: Callable[[], Tensor] | None = getattr(matrix, "full_tensor", None)  # a DTensor's
    return matrix if gather is None else gather()


def _as_was(found: Tensor, matrix: Tensor) -> Tensor:
    """Turned as `matrix` is, and sharded as it is."""
    found = found.mT if matrix.shape[0] > matrix.shape[1] else found
    if not hasattr(matrix, "full_tensor"):
        return found
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(matrix, DTensor)
    everywhere = [Replicate()] * matrix.device_mesh.ndim
    whole = DTensor.from_local(found, matrix.device_mesh, everywhere, run_check=False)
    return whole.redistribute(placements=matrix.placements)
