"""`python -m pdlightning.slurm WORDS`: the script that `-m launcher=slurm WORDS` would submit; needs no cluster."""

from __future__ import annotations

import sys
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from pdlightning.__main__ import CONF
from pdlightning.config import ConfigError, to_plain
from pdlightning.schema import check_settings


def script(words: list[str]) -> str:
    """The sbatch script of one job; of several values for a setting (`seed=0,1`) the first is taken."""
    try:
        from submitit.slurm.slurm import _make_sbatch_string
    except ImportError as error:
        raise ConfigError("launcher=slurm needs submitit: pip install 'pdlightning[slurm]'.") from error
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=["launcher=slurm", *words], return_hydra_config=True)
    plain = to_plain(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    plain.pop("resume")
    check_settings(plain)
    HydraConfig.instance().set_config(config)
    launcher: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[assignment]
    own = ("_target_", "submitit_folder", "max_num_timeout")
    settings = {key: value for key, value in launcher.items() if key not in own and value is not None}
    shared = {"timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks_per_node", "name": "job_name"}
    parameters = {shared.get(key, key): value for key, value in settings.items()}
    if "mem" in parameters:
        parameters["mem"] = f"{parameters['mem']}GB"
    folder = launcher["submitit_folder"]
    return _make_sbatch_string(
        command=f"{sys.executable} -u -m submitit.core._submit {folder}", folder=folder, **parameters
    )


def main() -> None:
    try:
        print(script(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
