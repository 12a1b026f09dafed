"""What a person reads while a run goes on: what was chosen, one line an epoch, and a table at the end."""

import logging
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from vitkd.models import ViTConfig
from vitkd.runs.folder import RunFolder

log = logging.getLogger("vitkd")

EPOCH_COLUMNS = {
    "train/total_loss": "loss {:.4f}",
    "train/transfer_loss": "transfer {:.4f}",
    "train/acc": "train acc {:.1%}",
    "val/acc": "val acc {:.1%}",
    "val/teacher_agreement": "agrees with teacher {:.1%}",
    "train/images_per_second": "{:,.0f} images/s",
}


KNOWN_AND_MEANT = (
    # The data lies on the device already; loader workers would only slow it down.
    ".*does not have many workers.*",
    # The teacher stays in eval mode.
    r".*module\(s\) in eval mode at the start of training.*",
    # metrics.csv lies beside the run's other files.
    ".*Experiment logs directory .* exists and is not empty.*",
    # Lightning 2.6 under a newer PyTorch.
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",
)


class EpochLines(L.Callback):
    """One plain line an epoch, to the console and the log file."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        parts = [text.format(metrics[name].item()) for name, text in EPOCH_COLUMNS.items() if name in metrics]
        log.info("epoch %d/%s  %s", trainer.current_epoch + 1, trainer.max_epochs, "  ".join(parts))


def start_logging() -> None:
    """Send the log's lines to the console, and quieten what Lightning says about itself."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in KNOWN_AND_MEANT:
        warnings.filterwarnings("ignore", message=message)


def is_terminal() -> bool:
    """Whether a person watches, so that a progress bar makes sense."""
    return sys.stdout.isatty()


def describe_model(config: ViTConfig) -> str:
    """A model's shape in a few words."""
    return (
        f"{config.depth} blocks × {config.num_heads} heads, width {config.embed_dim}, MLP {config.mlp_dim}, "
        f"{config.grid}×{config.grid} patches + CLS"
    )


def percent(value: float | None) -> str:
    """A share as a percentage with two decimals; a dash for None."""
    return "–" if value is None else f"{value:.2%}"


def print_results(metrics: Mapping[str, Any], folder: RunFolder) -> None:
    """The closing table: every model's accuracy, then where everything lies."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "parameters", "val acc", "test acc", "agrees with teacher"):
        table.add_column(column, justify="right" if column else "left")
    if metrics["teacher/parameters"]:
        table.add_row(
            "teacher", f"{metrics['teacher/parameters']:,}", "", percent(metrics["teacher/test_acc"]), ""
        )
    rows = {"last": f"student, last epoch ({metrics['epochs']})"}
    rows["best"] = f"student, best on validation ({metrics['best_epoch']})"
    for key, name in rows.items():
        agreement = metrics.get(
            {"last": "test/teacher_agreement", "best": "test/teacher_agreement_best"}[key]
        )
        table.add_row(
            name,
            f"{metrics['student/parameters']:,}",
            percent(metrics[f"val/acc_{key}"]),
            percent(metrics[f"test/acc_{key}"]),
            percent(agreement) if metrics["teacher/parameters"] else "",
        )
    console = Console(highlight=False)
    console.print("\n", table, "\n", sep="")
    console.print(f"run          {folder.path}", soft_wrap=True)
    if folder.pictures.exists():
        console.print(f"pictures     {folder.pictures}", soft_wrap=True)
    console.print(f"model        {folder.student}", soft_wrap=True)
    console.print("curves       tensorboard --logdir outputs", soft_wrap=True)


def print_comparison(reported: Mapping[str, Any], measured: Mapping[str, float]) -> None:
    """The figures measured again, each beside the reported one."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "measured now", "reported by the run", ""):
        table.add_column(column, justify="right" if column else "left")
    for name, value in measured.items():
        verdict = "equal" if value == reported.get(name) else "differs"
        table.add_row(name, repr(value), repr(reported.get(name)), verdict)
    Console(highlight=False).print(table)
