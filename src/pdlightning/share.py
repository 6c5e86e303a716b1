"""`python -m pdlightning.share RUN user/name`: put a finished run on the Hugging Face hub (`--to`: look first)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pdlightning.share",
        description="Put a finished run on the Hugging Face hub: decomposition/ (safetensors and JSON), config.yaml, "
        "summary.json, report.html if there is one, and a model card. Log in first with `hf auth login`.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run that has ended, or its decomposition/")
    parser.add_argument("repo", metavar="user/name", nargs="?", help="the model repository, made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository a private one")
    parser.add_argument("--to", metavar="FOLDER", type=Path, help="write what would be uploaded there; upload nothing")
    given = parser.parse_args()
    if given.repo is None and given.to is None:
        parser.error("give a repository (user/name), or --to FOLDER to see what would be uploaded")
    from pdlightning.sharing.places import hub_repo
    from pdlightning.sharing.publish import push_run, write_shared
    from pdlightning.storage import StorageError

    try:
        if given.repo is not None:
            hub_repo(given.repo)
        if given.to is not None:
            write_shared(given.run, given.to, repo_id=given.repo)
            print(f"What would be uploaded is in {given.to.absolute()}. Read its README.md.")
        elif given.repo is not None:
            print(f"Uploaded: {push_run(given.run, given.repo, private=given.private)}")
            print(f'To load it: load_run("{given.repo}")')
    except StorageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
