"""What was logged in an epoch so far, which Lightning leaves out of its checkpoints."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

State = dict[str, Any]


def metrics_so_far(trainer: Any, module: nn.Module) -> State:
    """The last value of each metric, the sums that `self.log` reduces over the epoch, the states of torchmetrics."""
    results = trainer.fit_loop.epoch_loop._results
    reduced = {key: metric for key, metric in results.items() if metric.is_tensor and metric.meta.on_epoch}
    return {
        "last": {name: _copy(value) for name, value in trainer._logger_connector._callback_metrics.items()},
        "sums": {key: _sums(metric) for key, metric in reduced.items() if not metric.has_reset},
        "metrics": {
            name: {"count": metric._update_count} | {key: _copy(getattr(metric, key)) for key in metric._defaults}
            for name, metric in _metrics(module).items()
            if metric._update_count
        },
    }


def restore_last(trainer: Any, state: State) -> None:
    """Put back the last value of each metric."""
    trainer._logger_connector._callback_metrics.update(state["last"])


def restore_metrics(module: nn.Module, state: State) -> None:
    """Put back the states of torchmetrics, in the middle of an epoch."""
    metrics = _metrics(module)
    for name, saved in state["metrics"].items():
        metric = metrics.get(name)
        if metric is not None:
            for key in metric._defaults:
                setattr(metric, key, _to(saved[key], metric.device))
            metric._update_count = saved["count"]


def add_sums(trainer: Any, sums: State) -> None:
    """Add the sums of the batches before to those of the first batch after a resume, which makes a place for them."""
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        if key in sums and metric.is_tensor:
            saved = {name: value.to(metric.value.device) for name, value in sums[key].items()}
            if metric.meta.is_max_reduction or metric.meta.is_min_reduction:
                metric.value = metric.meta.reduce_fx(saved["value"], metric.value)
            else:
                for name, value in saved.items():
                    setattr(metric, name, value + getattr(metric, name))
            metric._computed = None


def _sums(metric: Any) -> State:
    names = ("value", "cumulated_batch_size") if metric.meta.is_mean_reduction else ("value",)
    return {name: _copy(getattr(metric, name)) for name in names}


def _metrics(module: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in module.named_modules() if isinstance(part, Metric)}


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(part) for part in value]
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, list):
        return [_to(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value
