"""`hydra/sweeper=optuna`: where Hydra looks for sweepers, and nothing is imported that takes time.

Optuna 4 and later; the released hydra-optuna-sweeper needs an Optuna below 3. See `trainerkit.study` and
docs/sweeps.md.
"""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Jobs whose parameters Optuna draws.

    Args:
        n_trials: jobs in all; those of an interrupted sweep in the same folder count.
        n_jobs: how many are drawn, and handed to the launcher, at a time.
        sampler: 'tpe' or 'random'.
        startup_trials: jobs drawn at random before 'tpe' learns from them.
        seed: of the draws.
        storage: a file or database URL; None for study.db in the sweep's folder.
    """

    def __init__(
        self,
        n_trials: int = 20,
        n_jobs: int = 1,
        sampler: str = "tpe",
        startup_trials: int = 10,
        seed: int = 0,
        storage: str | None = None,
    ) -> None:
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.drawing: dict[str, Any] = {"sampler": sampler, "startup_trials": startup_trials, "seed": seed}
        self.storage = storage

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `sweep` needs, and build the launcher."""
        self.config = config
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Draw, run and tell, until there are `n_trials` jobs that ended.

        Args:
            arguments: overrides, of which those with several values or a range are the search space.
        """
        from trainerkit.errors import answering
        from trainerkit.study import Study
        from trainerkit.sweep import objective

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        with answering():  # Hydra would print a traceback
            parsed = OverridesParser.create(self.hydra_context.config_loader).parse_overrides(arguments)
            folder = Path(str(self.config.hydra.sweep.dir))
            study = Study(parsed, objective(self.config), folder, self.storage, **self.drawing)
            for batch in study.batches(self.n_trials, self.n_jobs):
                returns = self.launcher.launch([trial.overrides for trial in batch], initial_job_idx=batch[0].number)
                for trial, returned in zip(batch, returns, strict=True):
                    study.tell(trial, returned.return_value)
