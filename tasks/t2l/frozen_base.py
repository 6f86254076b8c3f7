"""A base model with generated adapters in it, without a change to the model: W + scaling·B·A by `torch.func`.

Shapes: B tasks, S examples of each, r the rank, A (r, in) and B (out, r) of each layer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainerkit.adapter_layout import AdapterLayout, Factors
from trainerkit.errors import either, nearest


class FrozenBase:
    """A frozen model that answers with the adapters it is given, one for each task of a batch.

    The model is called with one tensor and gives one; wrap what takes or gives more. Not a module, so that whoever
    holds it owns none of its weights: they are in no optimizer, average or checkpoint. It is put into eval mode and
    goes to the device of what it is asked. The weights W + scaling·B·A of a batch exist at one time, B·out·in numbers a
    layer.

    Args:
        model: any module; called with one tensor (S, …).
        layout: the layers that adapters change.

    Raises:
        ValueError: if the model lacks one of the layers as an `nn.Linear` of that shape.
    """

    def __init__(self, model: nn.Module, layout: AdapterLayout) -> None:
        _check_layers(model, layout)
        self.layout = layout
        self._model = model.requires_grad_(False).eval()

    def __call__(self, factors: Factors, inputs: Tensor) -> Tensor:
        """Each task's answers to its own examples; gradients reach the factors.

        Args:
            factors: of B adapters, (B, n, r, in) and (B, n, out, r) of each type.
            inputs: (B, S, …).

        Returns:
            (B, S, …).
        """
        self._follow(inputs.device)
        # By every name that a tied weight has; the adapted one is changed alone.
        own: dict[str, Tensor] = dict(self._model.named_parameters(remove_duplicate=False))
        own |= dict(self._model.named_buffers(remove_duplicate=False))
        dtype = next((weight.dtype for weight in own.values() if weight.is_floating_point()), inputs.dtype)
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs

        def of_one_task(factors: Factors, inputs: Tensor) -> Any:
            changed = {
                f"{name}.weight": own[f"{name}.weight"] + self.layout.scaling * (b.to(dtype) @ a.to(dtype))
                for name, (a, b) in self.layout.unpack(factors).items()
            }
            return functional_call(self._model, own | changed, (inputs,), tie_weights=False)

        factors = {key: factors[key] for key in self.layout.keys}
        answers: Tensor = torch.func.vmap(of_one_task)(factors, inputs)
        return answers

    def _follow(self, device: torch.device) -> None:
        weight = next(self._model.parameters(), None)
        if weight is not None and weight.device != device:
            self._model.to(device)


def _check_layers(model: nn.Module, layout: AdapterLayout) -> None:
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for name, width_in, width_out in layout.layers:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            near = nearest(name, linear) or linear[:3]
            what = "is no linear layer" if module is not None else "is not there"
            hint = f"the nearest are {either(near)}" if near else "it has none"
            raise ValueError(f"base={type(model).__name__}: the adapted layer {name} {what}; {hint}")
        if (module.in_features, module.out_features) != (width_in, width_out):
            found, wanted = f"{module.in_features} to {module.out_features}", f"{width_in} to {width_out}"
            raise ValueError(f"base={type(model).__name__}: {name} goes from {found}, the adapters' from {wanted}")
