"""Train a network a few layers at a time: first the head, then what is below it, each new part with a ramped rate.

What is still frozen needs no gradient, so it costs no backward pass, no reduction between processes and no optimizer
state. A stage joins between two optimizer steps; from then on its learning rate is the scheduler's times
min(1, n/W), with n the steps of its optimizer since, and W = `warmup_steps`.

Source: J. Howard, S. Ruder, 'Universal Language Model Fine-tuning for Text Classification' (gradual unfreezing, from
the last layer, one an epoch), ACL 2018.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainerkit.callbacks._parameters import as_patterns, is_built, match, named_parameters, owners, plain_name
from trainerkit.callbacks._ramp import Ramp
from trainerkit.callbacks._trainer import is_stepping, log_metrics, refuse_sharded, step_number, validates

# Of a module: the names of what this callback left frozen, which a later fit must not take for the user's own freezing.
_MARK = "_frozen_by_unfreezing"


def layer_of(name: str) -> str:
    """The layer of a parameter: its block where a number names one (`encoder.layers.3`), else its module (`head`)."""
    path = name.split(".")
    numbered = next((i for i, part in enumerate(path) if part.isdecimal()), None)
    return ".".join(path[: numbered + 1]) if numbered is not None else name.rpartition(".")[0] or name


def by_depth(names: Sequence[str], order: str, layers_per_stage: int) -> list[list[str]]:
    """Names in the order of definition ('from_input') or its reverse ('from_output'), in stages of so many layers."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    ordered = list(layers.values())[:: -1 if order == "from_output" else 1]
    chunks = [ordered[i : i + layers_per_stage] for i in range(0, len(ordered), layers_per_stage)]
    return [[name for layer in chunk for name in layer] for chunk in chunks]


def plan_stages(
    aliases: Mapping[str, str],
    candidates: Collection[str],
    initial: Sequence[str] | None = None,
    stages: Sequence[Sequence[str]] | None = None,
    order: str = "from_output",
    layers_per_stage: int = 1,
) -> list[list[str]]:
    """Which parameters are trained from the start, and which join at each stage.

    Args:
        aliases: from every name of every parameter, in the order of definition, to its first name.
        candidates: first names of what may be trained at all.
        initial: patterns of what is trained from the start; None for the first stage of `order`, or with `stages` for
            all that these leave.
        stages: patterns of each stage; None for layers by depth.
        order: 'from_output' or 'from_input', without `stages`.
        layers_per_stage: without `stages`.

    Returns:
        First names: those from the start, then those of each stage. Each once, where any of its names comes first.

    Raises:
        ValueError: for a pattern that matches nothing, and for patterns that add nothing.
    """
    taken: set[str] = set()

    def take(names: Sequence[str]) -> list[str]:
        new = dict.fromkeys(aliases[name] for name in names if aliases[name] in candidates)
        added = [name for name in new if name not in taken]
        taken.update(added)
        return added

    def take_matching(patterns: Sequence[str], argument: str) -> list[str]:
        added = take(match(aliases, patterns, argument, "parameter"))
        if not added:
            raise ValueError(
                f"{argument}={','.join(patterns)}: adds nothing to train; what it names is in an earlier stage, was "
                "frozen before fit, or is held by no optimizer (give them all parameters, frozen ones too)"
            )
        return added

    first = [] if initial is None else take_matching(initial, "initial")
    if stages is not None:
        later = [take_matching(patterns, "stages") for patterns in stages]
    else:
        free = [name for name in aliases if aliases[name] in candidates and aliases[name] not in taken]
        later = [added for names in by_depth(free, order, layers_per_stage) if (added := take(names))]
    if initial is None:
        first = take(list(aliases)) if stages is not None else later.pop(0) if later else []
    if not first:
        raise ValueError("initial=None: must be a pattern here; nothing is left to train from the start")
    return [first, *later]


class ProgressiveUnfreezing(Callback):
    """Train only a part of the parameters at first, and let the others join stage by stage.

    - The optimizers get all parameters in `configure_optimizers` and keep their groups, so any scheduler works; within
      a step, and only there, groups are split so that each part has its own multiple of the scheduler's rate. This
      ramps the update (Adam would not notice a smaller gradient) and decoupled weight decay with it.
    - With DDP the module is wrapped anew at each stage: DDP reduces what needed a gradient when it wrapped, so this
      needs no `find_unused_parameters`, and what joins later is reduced.
    - What needs no gradient before fit stays frozen, and so does what no stage names. After fit everything stays as
      the last stage left it; a further fit with the module starts from the first stage again.
    - A resumed run continues stages and ramps where they were.

    Args:
        initial: pattern or patterns for the names of what is trained from the start. None: the first stage of `order`,
            or with `stages` all that these leave.
        stages: for each stage a pattern or a list of them; what none names is never trained. None: by depth, in
            `order`, until all is trained.
        order: 'from_output' takes layers from the last defined to the first, 'from_input' the other way. A layer is
            a numbered block (`encoder.layers.3`) or else a module that has parameters itself.
        layers_per_stage: with `order`.
        every_n_epochs: epochs between stages; 1 where no other rule is given. At most one rule.
        every_n_steps: optimizer steps between stages.
        on_plateau: a logged metric; the next stage joins when it has not improved `patience` times.
        patience: validations (epochs, where there is none) without improvement, counted anew after each stage.
        min_delta: an improvement must be larger than this.
        mode: 'min' if smaller is better, else 'max'.
        warmup_steps: W, optimizer steps over which the rate of a new stage rises from 0; 0 for none.
        freeze_norm_statistics: keep running statistics of frozen normalization layers as they are.

    Attributes:
        stage: how many stages have joined.
        plan: the names of what is trained from the start, then of what joins at each stage; known from fit on.

    Raises:
        ValueError: for a value that is not possible; in `setup` for sharded parameters, and for patterns that match
            nothing or add nothing; at the start of fit for an optimizer whose rate cannot be ramped.
    """

    def __init__(
        self,
        initial: str | Sequence[str] | None = None,
        stages: Sequence[str | Sequence[str]] | None = None,
        order: Literal["from_output", "from_input"] = "from_output",
        layers_per_stage: int = 1,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        on_plateau: str | None = None,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
        warmup_steps: int = 100,
        freeze_norm_statistics: bool = False,
    ) -> None:
        if order not in ("from_output", "from_input"):
            raise ValueError(f"order={order}: must be from_output or from_input")
        counts = {"layers_per_stage": layers_per_stage, "every_n_epochs": every_n_epochs}
        for name, count in (counts | {"every_n_steps": every_n_steps, "patience": patience}).items():
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}: must be 1 or more")
        rules = {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps, "on_plateau": on_plateau}
        given = [f"{name}={value}" for name, value in rules.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: must be one of them, and null for the others")
        if not min_delta >= 0:
            raise ValueError(f"min_delta={min_delta}: must be 0 or more")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode}: must be min or max")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: must be 0 or more")
        if stages is not None and (isinstance(stages, str) or not stages):
            raise ValueError(f"stages={stages!r}: must be a list with a pattern or a list of patterns for each stage")
        self.initial = None if initial is None else as_patterns(initial, "initial")
        self.stages = None if stages is None else [as_patterns(patterns, "stages") for patterns in stages]
        self.order = order
        self.layers_per_stage = layers_per_stage
        self.every_n_epochs = every_n_epochs or (None if given else 1)
        self.every_n_steps = every_n_steps
        self.on_plateau = on_plateau
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.warmup_steps = warmup_steps
        self.freeze_norm_statistics = freeze_norm_statistics
        self.plan: list[list[str]] = []
        self._candidates: Collection[str] = ()  # names of what is trained some time
        self._start()
        self._restored: dict[str, Any] | None = None
        self._ramps: list[Ramp] = []  # of each optimizer
        self._still: list[nn.Module] = []  # frozen normalization layers
        self._between_steps = True

    def _start(self) -> None:
        self.stage = 0
        self._wanted = 0  # stages that the metric has asked for
        self._best = math.inf if self.mode == "min" else -math.inf
        self._waited = 0

    # State

    def state_dict(self) -> dict[str, Any]:
        """The stage, what joined at which of its optimizer's steps, and what was seen of the metric."""
        counted = {"stage": self.stage, "wanted": self._wanted, "best": self._best, "waited": self._waited}
        return counted | {"optimizers": [{"steps": r.steps, "joined": dict(r.joined)} for r in self._ramps]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it for `on_fit_start`; an evaluation does not need it."""
        self._restored = state_dict

    # The start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work while it is cheap."""
        refuse_sharded(trainer, self)
        self._restored = None
        if stage == "fit" and is_built(pl_module):
            self._plan(pl_module, _trainable(pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what is not to be trained yet; after a resume, go on where the file was."""
        before = self.state_dict()  # of an earlier fit with this trainer
        restored, self._restored = self._restored or (before if trainer.global_step else None), None
        named = named_parameters(pl_module)
        held = owners(trainer.optimizers, named)
        self._plan(pl_module, {name for name in _trainable(pl_module) if name in held})
        self._leave()
        self._ramps = [Ramp(optimizer, named, self.warmup_steps) for optimizer in trainer.optimizers]
        self._start()
        if restored is not None:
            self._restore(restored)
        self._between_steps = True
        self._apply(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how much is trained."""
        self._report(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers and the normalization layers."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers and the normalization layers."""
        self._leave()

    def _plan(self, pl_module: LightningModule, candidates: Collection[str]) -> None:
        first = {id(parameter): name for name, parameter in named_parameters(pl_module).items()}
        every = pl_module.named_parameters(remove_duplicate=False)
        aliases = {plain_name(name): first[id(parameter)] for name, parameter in every}
        self.plan = plan_stages(aliases, candidates, self.initial, self.stages, self.order, self.layers_per_stage)
        self._candidates = candidates

    def _restore(self, state: dict[str, Any]) -> None:
        self.stage = min(state["stage"], len(self.plan) - 1)
        self._wanted, self._best, self._waited = state["wanted"], state["best"], state["waited"]
        if len(state["optimizers"]) == len(self._ramps):  # else it is another program's run
            for one, kept in zip(self._ramps, state["optimizers"], strict=True):
                one.restore(kept["steps"], kept["joined"])
        for one in self._ramps:
            one.join([name for stage in self.plan[1 : self.stage + 1] for name in stage])  # of newly given stages

    def _leave(self) -> None:
        for one in self._ramps:
            one.detach()
        self._release()

    def _release(self) -> None:
        for norm in self._still:
            norm.train()
        self._still = []

    # The stages

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the next stages join if it is their time; never within an accumulation window."""
        if self._between_steps and self.stage < min(self._due(trainer), len(self.plan) - 1):
            self._join(trainer, pl_module)
        for norm in self._still:
            norm.eval()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether the optimizer has stepped."""
        self._between_steps = is_stepping(trainer, pl_module)

    def _due(self, trainer: Trainer) -> int:
        """How many stages should have joined by now."""
        if self.every_n_epochs is not None:
            return trainer.current_epoch // self.every_n_epochs
        if self.every_n_steps is not None:
            return (step_number(trainer) - 1) // self.every_n_steps
        return self._wanted

    def _join(self, trainer: Trainer, pl_module: LightningModule) -> None:
        until = min(self._due(trainer), len(self.plan) - 1)
        names = [name for stage in self.plan[self.stage + 1 : until + 1] for name in stage]
        for one in self._ramps:
            one.join(names)
        self.stage = until
        self._apply(trainer, pl_module)
        self._report(trainer, pl_module)
        layers = ", ".join(dict.fromkeys(layer_of(name) for name in names))
        rank_zero_info(f"Unfreezing, stage {self.stage} of {len(self.plan) - 1}: {layers}.")

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let gradients flow to what has joined, and to nothing else."""
        active = {name for stage in self.plan[: self.stage + 1] for name in stage}
        for one in self._ramps:
            active.update(one.joined)  # also where newly given stages no longer name it
        named = named_parameters(pl_module)
        for name in self._candidates:
            named[name].requires_grad_(name in active)
            if name not in active:
                named[name].grad = None  # an optimizer steps whatever has a gradient
        setattr(pl_module, _MARK, [name for name in self._candidates if name not in active])
        self._release()
        if self.freeze_norm_statistics:
            self._still = still_norms(pl_module)
        _wrap_again(trainer)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        log_metrics(trainer, {"unfreezing/stage": self.stage, "unfreezing/trainable_parameters": trained})

    # The metric

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric after a validation within fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric after the epoch if there is no validation."""
        if not validates(trainer):
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if self.on_plateau is None or self._wanted > self.stage or self.stage == len(self.plan) - 1:
            return
        if self.on_plateau not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"on_plateau={self.on_plateau}: was not logged; logged are: {logged}")
        value = float(trainer.callback_metrics[self.on_plateau])
        gain = self._best - value if self.mode == "min" else value - self._best
        if gain > self.min_delta:
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        # Every rank asks, and all go on if one does: a metric that was logged without a reduction differs between them.
        if trainer.strategy.reduce_boolean_decision(self._waited >= self.patience, all=False):
            self._wanted, self._waited = self.stage + 1, 0


def still_norms(module: nn.Module) -> list[nn.Module]:
    """The layers that update running statistics although their parameters need no gradient.

    One without parameters goes with the layer that was defined before it.
    """
    still: list[nn.Module] = []
    trained = True
    for layer in module.modules():
        own = list(layer.parameters(recurse=False))
        trained = any(p.requires_grad for p in own) if own else trained
        if getattr(layer, "running_mean", None) is not None and layer.training and not trained:
            still.append(layer)
    return still


def _trainable(pl_module: LightningModule) -> list[str]:
    """Names of what is to be trained some time: all that the user did not freeze."""
    ours = set(getattr(pl_module, _MARK, ()))
    return [n for n, p in named_parameters(pl_module).items() if p.requires_grad or n in ours]


def _wrap_again(trainer: Trainer) -> None:
    """Let DDP see which parameters need a gradient now; it looks once, when it wraps."""
    strategy: Any = trainer.strategy
    wrapped = strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        wrapped._remove_autograd_hooks()
        strategy.model = wrapped.module
        del wrapped  # and its buckets, before there are new ones
        strategy.model = strategy._setup_model(strategy.model)
        strategy._register_ddp_hooks()
