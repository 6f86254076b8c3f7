"""What was logged in an epoch so far, which Lightning leaves out of its checkpoints."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

State = dict[str, Any]

_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)


def metrics_so_far(trainer: Any, module: nn.Module) -> State:
    """The last value of each metric of an epoch, sums that `self.log` reduces over it, the states of torchmetrics."""
    loop = trainer.fit_loop
    results = loop.epoch_loop._results
    # At the end of an epoch its means are to be had; before, asking for them would compute unfinished ones.
    over = loop.epoch_progress.current.completed < loop.epoch_progress.current.processed
    last = trainer.callback_metrics if over else trainer._logger_connector._callback_metrics
    reduced = {key: metric for key, metric in results.items() if metric.meta.on_epoch and not metric.has_reset}
    # Those of single steps are logged anew; a module that logs them in its on_train_batch_end does so after callbacks
    # have saved, and a checkpoint would hold the values of the log step before.
    of_steps = {metric.meta.forked_name(on_step=True) for metric in results.values() if metric.meta.on_step}
    return {
        "last": {name: _copy(value) for name, value in last.items() if name not in of_steps},
        "sums": {key: _sums(metric) for key, metric in reduced.items()},
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


def register_sums(trainer: Any, module: nn.Module, sums: State) -> None:
    """Put back the sums of an epoch whose last batch was before the checkpoint."""
    results = trainer.fit_loop.epoch_loop._results
    home = importlib.import_module(type(results).__module__)
    for key, saved in sums.items():
        meta = home._Metadata(**saved["meta"], reduce_fx=getattr(torch, saved["reduce"]))
        meta.sync = home._Sync(
            _should=saved["sync"], fn=trainer.strategy.reduce, rank_zero_only=saved["rank_zero_only"]
        )
        attribute = meta.metric_attribute
        metric = results[key] = home._ResultMetric(meta, is_tensor=attribute is None).to(trainer.strategy.root_device)
        for name, value in saved["state"].items():
            setattr(metric, name, value.to(trainer.strategy.root_device))
        if attribute is not None:
            metric.value = module.get_submodule(attribute)
        metric._update_count = 1
        metric.from_checkpoint = True


def forget_sums(trainer: Any) -> None:
    """Drop what `register_sums` made: the next epoch may log with other arguments."""
    results = trainer.fit_loop.epoch_loop._results
    for key in [key for key, metric in results.items() if hasattr(metric, "from_checkpoint")]:
        del results[key]


def add_sums(trainer: Any, sums: State) -> None:
    """Add the sums of the batches before to those of the first batch after a resume, which makes a place for them."""
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        if key in sums and metric.is_tensor and not hasattr(metric, "went_on"):  # by History
            metric.went_on = True
            saved = {name: value.to(metric.value.device) for name, value in sums[key]["state"].items()}
            if metric.meta.is_max_reduction or metric.meta.is_min_reduction:
                metric.value = metric.meta.reduce_fx(saved["value"], metric.value)
            else:
                for name, value in saved.items():
                    setattr(metric, name, value + getattr(metric, name))
            metric._computed = None


def _sums(metric: Any) -> State:
    meta = metric.meta
    names = []
    if metric.is_tensor:  # else a torchmetrics object, which the module holds
        names = ["value", "cumulated_batch_size"] if meta.is_mean_reduction else ["value"]
    return {
        "state": {name: _copy(getattr(metric, name)) for name in names},
        "meta": {name: getattr(meta, name) for name in _META},
        "reduce": meta.reduce_fx.__name__,  # mean, sum, max or min; Lightning allows no other
        "sync": meta.sync.should,
        "rank_zero_only": meta.sync.rank_zero_only,
    }


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
