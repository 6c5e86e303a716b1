"""Loggers that show a run elsewhere: TensorBoard and Weights & Biases. Nothing that fails there ends the run."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoard
from lightning.pytorch.utilities import rank_zero_only

from pdlightning.config import ConfigError, flatten
from pdlightning.metrics.evaluation import Page
from pdlightning.naming import named
from pdlightning.resume import SUMMARY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("summary.json", "environment.json", "code.diff", "metrics.csv", "report.html", "decomposition")
"""What of a run folder a tracker keeps: enough to load the run again. The config is in `decomposition/metadata.json`;
under `config.yaml` Weights & Biases has its own."""

LONGEST_TAG = 64
"""Letters that Weights & Biases takes."""


class Tracker(Logger):
    """A logger that is told what the run is, shown its figures, and given its files at the end."""

    def begin(self, config: Mapping[str, Any]) -> None:
        """Before the training, with the resolved config."""

    def log_figure(self, name: str, figure: Figure | Page, step: int) -> None:
        """A figure or page of an evaluation."""

    def end(self, folder: Path, summary: Mapping[str, Any] | None) -> None:
        """After the run: its folder, and the content of summary.json, None where it did not come to its end."""


@contextmanager
def tracked(loggers: Iterable[Logger], folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """A run inside is told to the trackers among the loggers, from its config to its files, however it ends."""
    trackers = [logger for logger in loggers if isinstance(logger, Tracker)]
    for tracker in trackers:
        tracker.begin(config)
    try:
        yield
    finally:
        summary = json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).is_file() else None
        for tracker in trackers:
            tracker.end(folder, summary)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`loss/faithfulness/coeff` -> value: every setting has a name of its own to filter and group by.

    Slashes, because both trackers read a dot as a path.
    """
    return {name.replace(".", "/"): value for name, value in flatten(config).items()}


def section(name: str) -> str:
    """A name under which a tracker that sorts charts by the part before the first slash has a section per metric.

    `eval/ci_l0/total` -> `eval_ci_l0/total`; `loss/total` and `eval/mmcs` stay.
    """
    return name.replace("eval/", "eval_", 1) if name.startswith("eval/") and name.count("/") > 1 else name


def outlived(method: Callable[..., None]) -> Callable[..., None]:
    """On the first rank: when the method fails, that is said once, and the tracker is not asked again."""

    @rank_zero_only
    @functools.wraps(method)
    def call(self: WandB, *arguments: Any, **named: Any) -> None:
        try:
            method(self, *arguments, **named)
        except Exception as error:  # whatever it is: the run and its folder are worth more
            broken, self.experiment = self.experiment, None
            rank_zero_warn(
                f"Weights & Biases failed in {method.__name__} ({type(error).__name__}: {error}); the run goes on"
                " without it. Its numbers and files are in its folder."
            )
            with suppress(Exception):
                broken.finish(exit_code=1)

    return call


class WandB(Tracker):
    """Weights & Biases: settings by name, charts over one axis `step`, images, pages, and the files of the run.

    Args:
        save_dir: folder of the run; what is not uploaded stands in its wandb/, to be sent by `wandb sync`.
        project, entity: where the run belongs.
        mode: `auto` is online where there is a key and the server answers, else offline.
        name, group, tags: of the run; by default those that the config gives it.
    """

    def __init__(
        self,
        *,
        save_dir: str,
        project: str,
        entity: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ):
        super().__init__()
        if mode not in ("auto", "online", "offline"):
            raise ValueError(f"mode must be auto, online or offline, got {mode!r}.")
        self.folder, self.mode = Path(save_dir), mode
        self.place: dict[str, Any] = {"project": project, "entity": entity}
        self.names = {"name": name, "group": group, "tags": tags}
        self.experiment: Any = None

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return "" if self.experiment is None else self.experiment.id

    @outlived
    def begin(self, config: Mapping[str, Any]) -> None:
        import wandb

        given = {key: value for key, value in self.names.items() if value is not None}
        arguments = {
            **self.place, **names_of(config), **given, "config": settings_of(config),
            "dir": str(self.folder), "id": self.own_id(), "resume": "allow", "reinit": "finish_previous",
        }  # fmt: skip
        settings = wandb.Settings(silent=True, init_timeout=30, console="off")
        if self.online():
            try:
                self.experiment = wandb.init(**arguments, mode="online", settings=settings)
            except wandb.Error as error:
                rank_zero_warn(
                    f"Weights & Biases does not answer ({error}). The run is kept offline in {self.folder / 'wandb'}."
                )
                wandb.teardown()  # which also holds the id of the run that did not come to be
        if self.experiment is None:
            arguments.pop("resume")  # which has no meaning offline
            self.experiment = wandb.init(**arguments, mode="offline", settings=settings)
            rank_zero_info(f"Weights & Biases, offline. To send the run: wandb sync {Path(self.experiment.dir).parent}")
        self.experiment.define_metric("step", hidden=True)
        self.experiment.define_metric("*", step_metric="step")

    def online(self) -> bool:
        import wandb

        if self.mode == "offline" or os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
            return False
        return self.mode == "online" or wandb.login(prompt=False, verify=False)

    def own_id(self) -> str:
        """The same for a run that was stopped and goes on."""
        path = self.folder / "wandb" / "id.txt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(4))
        return path.read_text()

    @outlived
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.experiment is not None:
            self.experiment.log({**{section(name): value for name, value in metrics.items()}, "step": step})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The settings of a run are known from `begin`."""

    @outlived
    def log_figure(self, name: str, figure: Figure | Page, step: int) -> None:
        if self.experiment is None:
            return
        import wandb

        shown = wandb.Html(str(figure), inject=False) if isinstance(figure, Page) else wandb.Image(pixels(figure))
        self.experiment.log({f"figures/{name.removeprefix('eval/')}": shown, "step": step})

    @outlived
    def end(self, folder: Path, summary: Mapping[str, Any] | None) -> None:
        if self.experiment is None:
            return
        if summary is not None:
            self.experiment.summary.update({"solved": summary["solved"], "seconds": summary["seconds"]})
        kept = Path(self.experiment.dir)
        for path in (folder / name for name in FILES):
            if path.is_dir():
                shutil.copytree(path, kept / path.name, dirs_exist_ok=True)
            elif path.is_file():
                shutil.copy2(path, kept)
        for path in kept.rglob("*"):
            if path.is_file():
                self.experiment.save(str(path), base_path=str(kept), policy="now")
        self.experiment.finish(exit_code=0 if summary is not None else 1)
        self.experiment = None


def pixels(figure: Figure) -> Any:
    """The image of a figure, height x width x 4 bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def names_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a tracker shows the run among others: by what was swept, and how its user labels it."""
    known, experiment = named(config), config["name"]
    tags = [tag[:LONGEST_TAG] for tag in (experiment, *known["tags"])]
    return {"name": known["name"], "group": config["logging"]["group"] or experiment, "tags": list(dict.fromkeys(tags))}


class TensorBoard(LightningTensorBoard, Tracker):  # pyright: ignore[reportIncompatibleMethodOverride]
    """TensorBoard event files in `tensorboard/` of the run folder: numbers, images, and settings beside the goals."""

    def __init__(self, *, save_dir: str):
        try:
            super().__init__(save_dir=save_dir, name="tensorboard", version="", default_hp_metric=False)
        except ModuleNotFoundError as error:
            raise ConfigError("TensorBoard is not installed: pip install 'pdlightning[tensorboard]'") from error

    def begin(self, config: Mapping[str, Any]) -> None:
        self.settings = settings_of(config)
        self.judged = [*config["goal"], config["objective"]]
        text = "\n".join(f"    {name}: {value}" for name, value in self.settings.items())
        self.experiment.add_text("config", text)

    def log_figure(self, name: str, figure: Figure | Page, step: int) -> None:
        if not isinstance(figure, Page):
            image = pixels(figure)[..., :3]
            self.experiment.add_image(f"figures/{name.removeprefix('eval/')}", image, step, dataformats="HWC")

    def end(self, folder: Path, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:  # a column of the HPARAMS table for each goal
            metrics = {name: summary["metrics"][name] for name in self.judged if name in summary["metrics"]}
            self.log_hyperparams(self.settings, {f"goal/{name}": value for name, value in metrics.items()})
        self.finalize("success")
