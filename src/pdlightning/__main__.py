"""`python -m pdlightning experiment=tms_5-2`: the command line. Heavy imports wait until a run begins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pdlightning.config import ConfigError

HERE = Path(__file__).parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parents[1] / "conf"
"""Inside the wheel, or at the top of a checkout."""


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def command(config: DictConfig) -> float:
    now = HydraConfig.get()
    if now.mode == RunMode.MULTIRUN:
        from pdlightning.launching.jobs import job_from_hydra

        return job_from_hydra(config, now)
    from pdlightning.commands import run_from_hydra

    return run_from_hydra(config, Path(now.runtime.output_dir))


def main() -> None:
    """Hydra's command and ours to resume, with refusals explained in a sentence on stderr and exit code 1."""
    from pdlightning.resume import folder_to_resume

    # Hydra reads 32 as a number, and the name of a choice must be a word.
    arguments = ["precision='32'" if a == "precision=32" else a for a in sys.argv[1:]]
    # Else Hydra prints its refusal itself, and leaves nothing to explain.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        sys.argv[1:] = arguments = with_sweep(arguments)
        wanted = folder_to_resume(arguments)
        if wanted is None:
            command()
        else:
            from pdlightning.commands import resume_run

            resume_run(*wanted)
    except (HydraException, OmegaConfBaseException) as error:
        from pdlightning.launching.overrides import explain_refusal

        sys.exit(explain_refusal(error, arguments, CONF))
    except ConfigError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def with_sweep(arguments: list[str]) -> list[str]:
    """The words that go on with a sweep, where these ask for it."""
    if not any(word.startswith("resume=") for word in arguments):
        return arguments
    from pdlightning.launching.sweeps import go_on_with_sweep

    return go_on_with_sweep(arguments)


if __name__ == "__main__":
    main()
