"""`python -m pdlightning.report RUN_OR_SWEEP`: writes its report.html. Heavy imports wait until the words are read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pdlightning.report",
        description="Write one self-contained page to read a run, or a sweep: it needs no network and no server.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN_OR_SWEEP", help="its folder, such as outputs/tms_5-2/...")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: report.html there)")
    arguments = parser.parse_args()
    from pdlightning.report.build import write_report
    from pdlightning.storage import StorageError

    try:
        print(write_report(arguments.folder, arguments.out))
    except StorageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
