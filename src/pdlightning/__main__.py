"""`python -m pdlightning experiment=tms_5-2`: the command line. Heavy imports wait until a run begins."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

HERE = Path(__file__).parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parents[1] / "conf"
"""Inside the wheel, or at the top of a checkout."""


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def command(config: DictConfig) -> float:
    from pdlightning.commands import run_from_hydra

    return run_from_hydra(config, Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Hydra's command, with its refusals explained: the nearest name beside an unknown one."""
    from pdlightning.resume import resume_arguments

    arguments = sys.argv[1:]
    sys.argv[1:] = resume_arguments(arguments)
    try:
        command()
    except SystemExit as end:
        if end.code not in (None, 0):
            from pdlightning.config import explain_override_error

            if (more := explain_override_error(arguments, CONF)) is not None:
                print(more, file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
