"""What a callback must keep to be dropped into any Lightning project.

`examine_callback` looks at one property after the other in real training runs of a small module, on the CPU, in a few
seconds, and says what it found; `check_callback` raises if it found anything. Any Lightning callback can be examined:
`docs/callbacks/comparison.md` has what is found in Lightning's own.
"""

import inspect
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from trainerkit.testing.bench import BATCHES, NAMESPACES, Bench, Failure, MakeCallback, Run, quiet, weights_of
from trainerkit.testing.processes import in_two_ranks, sharded_in_two_ranks
from trainerkit.testing.syncs import SyncCounter

Property = Callable[[Bench], str | None]


def check_callback(
    make_callback: MakeCallback, folder: Path, *, idle: MakeCallback | None = None, skip: Collection[str] = ()
) -> None:
    """Train with a callback in many ways and check what every callback must keep; `PROPERTIES` lists it.

    Args:
        make_callback: makes a new callback, always the same.
        folder: an empty folder.
        idle: makes one that is told to begin after the end of the run, if there is such an argument: a run with it must
            be as one without.
        skip: names of properties that are not looked at.

    Raises:
        AssertionError: if one does not hold; it says which ones and what happened.
        ValueError: for a name in `skip` that is no property.
    """
    examined = examine_callback(make_callback, folder, idle=idle, skip=skip)
    found = {name: finding for name, finding in examined.items() if finding}
    assert not found, "\n".join(f"{name}: {finding}" for name, finding in found.items())


def examine_callback(
    make_callback: MakeCallback, folder: Path, *, idle: MakeCallback | None = None, skip: Collection[str] = ()
) -> dict[str, str | None]:
    """What was found for each property; None where it holds.

    Args:
        make_callback: makes a new callback, always the same.
        folder: an empty folder.
        idle: makes one that is told to begin after the end of the run, if there is such an argument: a run with it must
            be as one without.
        skip: names of properties that are not looked at.

    Raises:
        ValueError: for a name in `skip` that is no property.
    """
    unknown = set(skip) - set(PROPERTIES)
    if unknown:
        raise ValueError(f"skip={sorted(unknown)}: must be among {list(PROPERTIES)}")
    with quiet():
        logger = _needs_logger(make_callback, folder / "logger")
    found: dict[str, str | None] = {}
    for name, holds in PROPERTIES.items():
        if name in skip or (name == IDLE and idle is None):
            continue
        make = idle if name == IDLE and idle is not None else make_callback
        with quiet():
            try:
                found[name] = holds(Bench([make], folder / name.replace(" ", "_"), logger))
            except Exception as error:
                found[name] = f"raises {type(error).__name__}: {_first_line(error)}"
    return found


def check_together(makers: Sequence[MakeCallback], folder: Path) -> None:
    """Check that callbacks get along, in one run of two epochs.

    - Stopped and resumed, in the first epoch and in the second, it equals the uninterrupted run.
    - It gives the same with the callbacks in reverse order.

    Args:
        makers: make the callbacks, in the order in which they stand.
        folder: an empty folder.

    Raises:
        AssertionError: if they do not.
    """
    with quiet():
        finding = _resumes(Bench(makers, folder / "resumed"), saves=(2, BATCHES + 1))
        one, other = (Bench(order, folder / "orders").fit() for order in (makers, makers[::-1]))
        finding = finding or _differ(one, other, "with the callbacks in one order and in the other")
    assert finding is None, finding


# The properties


def _runs_in_both_namespaces(bench: Bench) -> str | None:
    one, other = (bench.fit(name) for name in NAMESPACES)
    return _differ(one, other, "under {} and {}".format(*NAMESPACES))


def _resumes_at_every_batch(bench: Bench) -> str | None:
    return _resumes(bench, saves=range(1, 2 * BATCHES))


def _resumes_with_manual_optimization(bench: Bench) -> str | None:
    return _resumes(bench, saves=(2, BATCHES + 1), module={"manual": True})


def _resumes_while_accumulating(bench: Bench) -> str | None:
    return _resumes(bench, saves=(2, BATCHES + 2), accumulate_grad_batches=2)


def _resumes(bench: Bench, saves: Sequence[int], **options: Any) -> str | None:
    whole = bench.fit(saves=saves, **options)
    for batch in saves:
        path = bench.folder / f"{batch}.ckpt"
        if not path.exists():  # the run was stopped before
            continue
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            return f"its checkpoint does not load with weights_only=True: {_first_line(error)}"
        try:
            resumed = bench.fit(resume=path, **options)
        except Exception as error:
            return f"cannot be resumed after batch {batch}: {type(error).__name__}: {_first_line(error)}"
        finding = _differ(whole, resumed, f"of the uninterrupted run and of one resumed after batch {batch}")
        if finding:
            return finding
    return None


def _new_arguments_win(bench: Bench) -> str | None:
    # The state of one whose arguments were others, given to a new one: its own have to stay.
    (other,) = bench.fit().callbacks
    new = bench.makers[0]()
    arguments = [
        name for name in inspect.signature(type(new)).parameters if isinstance(_own(new, name), (int, float, str))
    ]
    given = {name: _own(new, name) for name in arguments}
    for name in arguments:
        setattr(other, name, _another(given[name]))
    new.load_state_dict(other.state_dict())
    changed = [name for name in arguments if _own(new, name) != given[name]]
    return f"a checkpoint's {', '.join(changed)} takes the place of the one that was given" if changed else None


def _never_waits_for_the_device(bench: Bench) -> str | None:
    def count(makers: Sequence[MakeCallback]) -> int:
        counter = SyncCounter()
        made = [make() for make in makers]
        with counter:
            bench.fit(callbacks=made, first=[counter.opening()], max_epochs=3)
        return counter.count

    extra = count(bench.makers) - count([])
    steps = 3 * BATCHES - 1  # all but the first
    allowed = steps if getattr(bench.makers[0](), "syncs_every_step", False) else 0
    return f"{extra} copies to the host in {steps} steps that log nothing" if extra > allowed else None


def _two_ranks_give_what_one_gives(bench: Bench) -> str | None:
    one = bench.fit()
    ranks = in_two_ranks(bench)
    if isinstance(ranks, str):
        return ranks
    if not _equal(ranks[0]["weights"], ranks[1]["weights"]):
        return "two ranks end with different weights"
    expected = {"weights": one.weights, "validated": one.witness.validated}
    return None if _close(ranks[0], expected) else "two ranks give other numbers than one process"


def _sharded_parameters_work_or_are_refused(bench: Bench) -> str | None:
    one = bench.fit()
    ranks = sharded_in_two_ranks(bench)
    if isinstance(ranks, str):
        refused = ranks.startswith("ValueError") and "shard" in ranks
        return None if refused else ranks
    expected = {"weights": one.weights, "validated": one.witness.validated}
    return None if _close(ranks[0], expected) else "sharded parameters give other numbers than one process"


def _any_number_of_loggers(bench: Bench) -> str | None:
    none = bench.fit(logger=False)
    two = [CSVLogger(bench.folder / "logs", name=name) for name in ("a", "b")]
    run = bench.fit(logger=two, log_every_n_steps=1)
    files = [sorted(path.read_text() for path in (bench.folder / "logs" / name).rglob("*.csv")) for name in ("a", "b")]
    if files[0] != files[1]:
        return "two loggers do not get the same"
    return _differ(none, run, "with no logger and with two")


def _exceptions_leave_the_trained_weights(bench: Bench) -> str | None:
    for fails, expect in (("training", Failure), ("validation", Failure), ("interrupt", BaseException)):
        run = bench.fit(module={"fails": fails}, expect=expect)
        if not _equal(run.weights, run.witness.live):
            return f"after an exception in {fails} the module does not have its trained weights"
        if _hooks(run):
            return f"after an exception in {fails} its hooks stay on {_hooks(run)}"
    return None


def _gradients_are_the_mean_of_their_window(bench: Bench) -> str | None:
    watch = _Window()
    bench.fit(first=[watch], max_epochs=4)
    return watch.finding


def _odd_modules_train_as_plain_ones(bench: Bench) -> str | None:
    plain = bench.fit()
    for option in ("compiled", "late"):
        run = bench.fit(module={option: True})
        if not _close(_plain(run.weights), _plain(plain.weights)):
            return f"a module with {option} layers ends with other weights"
    run = bench.fit(module={"grows": True})
    if not _close({name: run.weights[name] for name in plain.weights}, plain.weights):
        return "with a parameter that is added at the start of fit the others end with other weights"
    if not torch.equal(run.module.added, torch.ones(3)):
        return "a parameter that is added at the start of fit has changed"
    run = bench.fit(module={"unused": True})
    if not torch.equal(run.module.unused, torch.ones(2)):
        return "a parameter without a gradient has changed"
    if run.module.head.second.weight is not run.module.head.first.weight:
        return "tied weights are no longer tied"
    frozen = weights_of(type(run.module)().frozen)
    return None if _equal(frozen, weights_of(run.module.frozen)) else "frozen parameters have changed"


def _the_module_stays_as_it_was(bench: Bench) -> str | None:
    run = bench.fit(module={"batch_norm": True})
    for name, layer in run.module.named_modules():
        if getattr(layer, "track_running_stats", True) is not True:
            return f"track_running_stats of {name} has changed"
    counted = int(run.module.backbone[1].num_batches_tracked)
    if counted != run.witness.batches:
        return f"a batch norm has counted {counted} batches of {run.witness.batches}"
    if _hooks(run):
        return f"after fit its hooks stay on {_hooks(run)}"
    return None


def _what_needs_a_gradient_is_trained(bench: Bench) -> str | None:
    run = bench.fit(max_epochs=14)
    held = {id(p) for optimizer in run.trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    lost = [name for name, p in run.module.named_parameters() if p.requires_grad and id(p) not in held]
    return f"needs a gradient but is in no optimizer: {', '.join(lost)}" if lost else None


def _fit_ends_with_the_trained_weights(bench: Bench) -> str | None:
    run = bench.fit()
    return None if _equal(run.weights, run.witness.live) else "after fit the module does not have its trained weights"


def _every_path_tells_the_same_number(bench: Bench) -> str | None:
    run = bench.fit(saves=(2 * BATCHES,))
    full, light = (bench.folder / f"{2 * BATCHES}{kind}.ckpt" for kind in ("", "-weights"))
    scored = run.witness.validated[-1]
    found = {"trainer.test after fit": run.trainer.test(run.module, verbose=False)}
    fresh = type(run.module)()
    found["a fresh trainer with ckpt_path"] = bench.trainer(
        [*(make() for make in bench.makers), type(run.witness)(bench.folder)]
    ).test(fresh, ckpt_path=full, verbose=False)
    found["a checkpoint with weights only"] = bench.trainer([]).test(fresh, ckpt_path=light, verbose=False)
    found["trainer.test with ckpt_path after fit"] = run.trainer.test(run.module, ckpt_path=full, verbose=False)
    others = {path: metrics["test/loss"] for path, (metrics,) in found.items()}
    wrong = [f"{path} gives {loss:.4f}" for path, loss in others.items() if abs(loss / scored - 1) > 1e-5]
    return f"the last validation gave {scored:.4f}, but {', '.join(wrong)}" if wrong else None


def _stops_only_when_it_should(bench: Bench) -> str | None:
    # Falls, rises while `min_epochs` forbids to stop, then falls to the end.
    scores = [1.0, 2.0, 3.0, 0.5, 0.4, 0.3, 0.2, 0.1]
    run = bench.fit(module={"scores": scores}, max_epochs=len(scores), min_epochs=4)
    seen = run.witness.validated
    if len(seen) < len(scores) and seen[-1] <= min(seen):
        return f"stopped after epoch {len(seen)} although its value, {seen[-1]}, was the best so far"
    return None


def _fits_twice(bench: Bench) -> str | None:
    first = bench.fit()
    second = bench.fit(callbacks=first.callbacks)
    return _differ(first, second, "of the first and the second fit with one callback")


def _mixed_precision(bench: Bench) -> str | None:
    from lightning.pytorch.plugins import MixedPrecision

    bench.fit(precision="bf16-mixed")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = bench.fit(plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], module={"fails": "overflow"})
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in run.weights.values())
    return None if finite else "weights are not finite after a step that the scaler skipped"


def _changes_nothing_while_idle(bench: Bench) -> str | None:
    return _differ(
        Bench([], bench.folder / "without").fit(), bench.fit(), "without it and with it, told to begin after the end,"
    )


IDLE = "idle"

PROPERTIES: dict[str, Property] = {
    "both namespaces": _runs_in_both_namespaces,
    "resume at every batch": _resumes_at_every_batch,
    "manual optimization": _resumes_with_manual_optimization,
    "accumulated batches": _resumes_while_accumulating,
    "new arguments win": _new_arguments_win,
    "no waiting for the device": _never_waits_for_the_device,
    "two ranks": _two_ranks_give_what_one_gives,
    "sharded parameters": _sharded_parameters_work_or_are_refused,
    "any loggers": _any_number_of_loggers,
    "exceptions": _exceptions_leave_the_trained_weights,
    "mean of the window": _gradients_are_the_mean_of_their_window,
    "odd modules": _odd_modules_train_as_plain_ones,
    "module as it was": _the_module_stays_as_it_was,
    "trained what needs it": _what_needs_a_gradient_is_trained,
    "weights after fit": _fit_ends_with_the_trained_weights,
    "one number": _every_path_tells_the_same_number,
    "stopping": _stops_only_when_it_should,
    "fit twice": _fits_twice,
    "mixed precision": _mixed_precision,
    IDLE: _changes_nothing_while_idle,
}


# What they are made of


def _needs_logger(make_callback: MakeCallback, folder: Path) -> bool:
    """Whether it runs with a logger only; that is one finding, and not one for every other property too."""
    try:
        Bench([make_callback], folder / "without").fit()
    except Exception:
        try:
            Bench([make_callback], folder / "with", logger=True).fit()
        except Exception:
            return False
        return True
    return False


def _differ(a: Run, b: Run, which: str) -> str | None:
    found = []
    if a.trainer.current_epoch != b.trainer.current_epoch or a.witness.batches != b.witness.batches:
        found.append(f"lengths ({a.witness.batches} and {b.witness.batches} batches)")
    if not _equal(a.weights, b.weights):
        found.append("weights")
    if a.witness.validated != b.witness.validated:
        found.append("validations ({} and {})".format(*(_shown(run.witness.validated) for run in (a, b))))
    states = [[optimizer.state_dict() for optimizer in run.trainer.optimizers] for run in (a, b)]
    if not _equal(*states):
        found.append("states of the optimizer")
    return f"{' and '.join(found)} {which} differ" if found else None


def _shown(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.4f}" for number in numbers)


def _equal(a: Any, b: Any) -> bool:
    """Whether two nests of tensors and numbers are equal to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _close(a: Any, b: Any) -> bool:
    """Whether they are equal up to the order in which float32 numbers were added."""
    try:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    except AssertionError:
        return False
    return True


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}


def _own(callback: Any, name: str) -> Any:
    return vars(callback).get(name)


def _another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value} or another"


def _first_line(error: BaseException) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(error).strip().partition("\n")[0])[:160]


def _hooks(run: Run) -> str:
    """Where hooks are left, of modules and optimizers."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    left = [name or "the module" for name, m in run.module.named_modules() if any(getattr(m, kind) for kind in kinds)]
    if any(o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in run.trainer.optimizers):
        left.append("an optimizer")
    return ", ".join(left)


class _Window(Callback):
    """Compares the gradient of each step with the mean of the gradients of its batches, each taken alone."""

    def __init__(self) -> None:
        self.finding: str | None = None
        self._alone: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        named = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(pl_module.loss(batch), list(named.values()), allow_unused=True)
        self._alone.append({name: g for name, g in zip(named, gradients, strict=True) if g is not None})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        window, self._alone = self._alone, []
        for name, parameter in pl_module.named_parameters():
            gradients = [alone[name] for alone in window if name in alone]
            # Fewer than batches: frozen for some of them.
            if self.finding or parameter.grad is None or len(gradients) < len(window):
                continue
            mean = torch.stack(gradients).mean(0)
            if not _close(parameter.grad, mean):
                ratio = float(parameter.grad.norm() / mean.norm())
                self.finding = (
                    f"the gradient after {len(window)} batches is {ratio:.2f} times their mean "
                    f"(epoch {trainer.current_epoch + 1}, batch {trainer.fit_loop.epoch_loop.batch_idx + 1})"
                )
