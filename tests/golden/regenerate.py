"""Twenty steps of every granularity and loss; `python -m tests.golden.regenerate` records their losses."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from vitkd.cli.console import start_logging
from vitkd.config.run import CONF_DIR, Config, parse
from vitkd.models import ViT
from vitkd.runs.seeding import DROPOUT, WEIGHTS, seed_generators
from vitkd.train.build import build_module, facts_of
from vitkd.train.student import load_data

FILE = Path(__file__).with_name("losses.json")
TERMS = ("class", "transfer", "total")
GRANULARITIES = ("head", "block", "encoder")
LOSSES = ("mse", "ce", "kl", "reverse_kl", "js")
STEPS = 20

# Warm-up and cosine span the 20 steps; smaller batches than the default tell as much in a third of the time.
SETTINGS = [
    "trainer=cpu",
    "trainer.max_epochs=1",
    f"trainer.limit_train_batches={STEPS}",
    "dataset.batch_size=16",
]
# What each run chooses besides. The default student has no dropout; one run has it added.
RUNS: dict[str, dict[str, Any]] = {
    "alone": {"method": "none"},
    **{f"{g} {loss}": {"granularity": g, "loss": loss} for g, loss in product(GRANULARITIES, LOSSES)},
    "dropout": {"student.dropout": 0.1, "student.emb_dropout": 0.1},
}

Losses = dict[str, list[float]]


def configure(run: str) -> Config:
    """The run's configuration; composing each by Hydra would take as long as training it."""
    composed = compose().copy()
    for key, choice in RUNS[run].items():
        option = CONF_DIR / key / f"{choice}.yaml"
        OmegaConf.update(composed, key, OmegaConf.load(option) if option.exists() else choice, merge=False)
    return parse(composed)


@cache
def compose() -> DictConfig:
    """`python -m vitkd.train` with SETTINGS."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose("train", SETTINGS)


def train(config: Config) -> Losses:
    """The losses of each step, trained as `vitkd.train` does, beside a teacher that knows nothing."""
    data = load_data(config)
    teacher = untrained_teacher(config) if config.method.needs_teacher else None
    seed_generators(config.seed, WEIGHTS, config.student)
    student = config.student.build()
    module = build_module(config, student, teacher, facts_of(data))
    losses: Losses = {}

    def recorded(batch: Any) -> Any:
        computed = type(module).losses(module, batch)
        terms = {"class": computed.class_loss, "total": computed.total}
        if computed.transfer is not None:
            terms["transfer"] = computed.transfer.loss
        for name in TERMS:
            if name in terms:
                losses.setdefault(name, []).append(terms[name].item())
        return computed

    module.losses = recorded
    silent = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    trainer = L.Trainer(**config.trainer | {"limit_val_batches": 0}, logger=False, **silent)
    seed_generators(config.seed, DROPOUT, config.student)
    trainer.fit(module, data)
    return losses


def untrained_teacher(config: Config) -> ViT:
    """The configuration's teacher as its training would start."""
    seed_generators(config.teacher.seed, WEIGHTS, config.teacher.model)
    return config.teacher.model.build()


def main() -> None:
    """Train every run and write what the tests compare with."""
    torch.set_num_threads(1)
    start_logging()
    FILE.write_text(as_json({run: train(configure(run)) for run in RUNS}), encoding="utf-8")


def as_json(records: dict[str, Losses]) -> str:
    """JSON with a line a term, in as many digits as float32 has."""
    lines = {
        run: [f'    "{term}": {[float(f"{x:.7g}") for x in values]}' for term, values in losses.items()]
        for run, losses in records.items()
    }
    runs = [f'  "{run}": {{\n' + ",\n".join(terms) + "\n  }" for run, terms in lines.items()]
    return "{\n" + ",\n".join(runs) + "\n}\n"


if __name__ == "__main__":
    main()
