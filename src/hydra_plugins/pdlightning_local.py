"""`launcher=local`: Hydra takes launchers from the namespace package hydra_plugins alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

if TYPE_CHECKING:
    from pdlightning.launching.jobs import Job
    from pdlightning.launching.local import Pool


CONF = {"_target_": "hydra_plugins.pdlightning_local.LocalLauncher", "jobs": None}
ConfigStore.instance().store(group="hydra/launcher", name="pdlightning_local", node=CONF)


class LocalLauncher(Launcher):
    """Jobs side by side in processes of this machine.

    Args:
        jobs: how many at a time; None: as many as there are cores for their ranks.
    """

    def __init__(self, *, jobs: int | None):
        self.jobs = jobs
        self.pool: Pool | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from pdlightning.launching.jobs import told
        from pdlightning.launching.local import Pool
        from pdlightning.launching.processes import cores

        setup_globals()
        if self.pool is None:  # a search launches again and again
            self.pool = Pool(jobs=self.jobs or max(1, cores() // self.config.runtime.devices))
        jobs = [self.job(number, list(words)) for number, words in enumerate(job_overrides, initial_job_idx)]
        values = self.pool.run(jobs)
        return [
            JobReturn(
                overrides=list(words), working_dir=str(job.folder), task_name="pdlightning",
                status=JobStatus.COMPLETED, _return_value=told(job, value),
            )
            for words, job, value in zip(job_overrides, jobs, values, strict=True)
        ]  # fmt: skip

    def job(self, number: int, words: list[str]) -> Job:
        from pdlightning.launching.jobs import job_of

        config = self.context.config_loader.load_sweep_config(self.config, words)
        before = HydraConfig.instance().cfg
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
            config.hydra.runtime.output_dir = str(folder.absolute())
        try:
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            return job_of(own, config.hydra)
        finally:
            HydraConfig.instance().cfg = before
