"""What a training step costs when S students are trained as one stack.

Every arm takes whole steps on batches of 64 images: teacher scores, student forward, losses, backward, fused
AdamW. `separate` is S steps of S students, each with a teacher forward of its own, as separate runs have.
`stacked` is the one step of the same S students as `hydra/launcher=stacked` trains them. Their cells are
mixed: granularity × loss, in turn, so that as few as possible compare alike. Ratios are to `separate`.

Students of one seed see the same images, so one teacher forward serves all. With `3 seeds` a third of the
students each sees the images in an order of its own, and the teacher is asked about three batches a step.
Rows say where dropout is 0; elsewhere it is the configuration's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice, product

import torch

from benchmarks import subject
from benchmarks.harness import Bar, Row, Settings, divided, interleave, row
from benchmarks.harness import main as run
from benchmarks.step import DRY, GRANULARITIES, LOSSES
from vitkd.config.run import Config
from vitkd.data import Batch, join
from vitkd.models import ViT
from vitkd.optim import grouped
from vitkd.train.callbacks import set_capturable
from vitkd.train.cuda_graph import GraphedStep
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedModule
from vitkd.train.stacked.optimization import stacked_optimizer

Step = Callable[[Batch], object]

EAGER, GRAPHED = "eager", "graphed"
SEPARATE = "separate"
SIZES_ON_CPU = (1, 2, 4, 8, 16)
SIZES_ON_CUDA = (1, 4, 16, 32)
SEEDS = 3
BARS = {
    ("cpu", 8, EAGER, EAGER): Bar(0.55),
    ("cuda", 16, GRAPHED, GRAPHED): Bar(0.15),
    ("cuda", 16, GRAPHED, EAGER): Bar(0.04),
    ("cuda", 32, GRAPHED, GRAPHED): Bar(0.1),
}
"""device, S, how the stack is run, how the separate students are → the ratio to reach"""


def ways(settings: Settings) -> dict[str, Callable[[Step], Step]]:
    """How a step may be run: name → what makes of a step on a batch one that is run so.

    Each way makes arms of its own; its stacks are compared with separate students run so, and run eagerly.
    """
    graphed = {} if settings.on_cpu else {GRAPHED: lambda step: GraphedStep(step).take}
    return {EAGER: lambda step: step, **graphed}


def measure(settings: Settings) -> list[Row]:
    """Time stacks of every size, with the configuration's dropout and with none."""
    rows = []
    for suffix, overrides in {"": (), DRY: ("student.dropout=0", "student.emb_dropout=0")}.items():
        config = subject.configure(settings, *overrides)
        teacher = subject.build_teacher(config, settings.device)
        for count in sizes(settings):
            try:
                rows += compare(config, teacher, count, suffix, settings)
            except torch.OutOfMemoryError:
                break  # larger ones would not fit either
    return rows


def sizes(settings: Settings) -> tuple[int, ...]:
    """The S to measure."""
    if settings.quick:
        return (1, SEEDS)
    return SIZES_ON_CPU if settings.on_cpu else SIZES_ON_CUDA


def compare(config: Config, teacher: ViT, count: int, suffix: str, settings: Settings) -> list[Row]:
    """The rows of one S: separate students, and stacks of them, each in every way."""
    known, arms = ways(settings), dict[tuple[str, str], Callable[[], object]]()
    for way, applied in known.items():
        arms[SEPARATE, way] = separate(config, teacher, count, applied)
        for name, orders in stacks(count).items():
            arms[name, way] = stacked(config, teacher, count, orders, applied)
    samples = interleave(
        {" ".join(arm): call for arm, call in arms.items()},
        settings,
        repeat=1 if settings.on_cpu else 3,
        # As many as a graph needs before it is one.
        warmup=2 if settings.on_cpu else 5,
    )
    times = {arm: samples[" ".join(arm)] for arm in arms}
    rows = [row(f"S={count} {labelled(SEPARATE, way)}{suffix}", times[SEPARATE, way]) for way in known]
    for name, way in product(stacks(count), known):
        for floor in dict.fromkeys((way, EAGER)):
            rows.append(
                row(
                    f"S={count} {labelled(name, way)}{suffix}" + ("" if floor == way else f", to {floor}"),
                    times[name, way],
                    ratio=divided(times[name, way], times[SEPARATE, floor]),
                    # The bars are for students that share one pass of the teacher.
                    bar=BARS.get((settings.device.type, count, way, floor)) if name == "stacked" else None,
                )
            )
    return rows


def stacks(count: int) -> dict[str, int]:
    """The stacks of `count` students: name → data orders."""
    one = {"stacked": 1}
    return one | {f"stacked, {SEEDS} seeds": SEEDS} if count >= SEEDS else one


def labelled(name: str, way: str) -> str:
    """An arm's name; eager goes without saying."""
    return name if way == EAGER else f"{name}, {way}"


def separate(config: Config, teacher: ViT, count: int, way: Callable[[Step], Step]) -> Callable[[], None]:
    """One step of each of `count` students by itself."""
    batch = subject.random_batch(config, device_of(teacher))
    modules = students(config, teacher, count)
    steps = [
        way(partial(train, module, ready(config.optimizer.build(module.model.parameters()), teacher)))
        for module in modules
    ]

    def step_all() -> None:
        for step in steps:
            step(batch)

    return step_all


def stacked(
    config: Config, teacher: ViT, count: int, orders: int, way: Callable[[Step], Step]
) -> Callable[[], object]:
    """One step of the same students as a stack that sees `orders` batches."""
    device = device_of(teacher)
    own_order = [student % orders for student in range(count)]
    module = StackedModule(students(config, teacher, count), own_order, range(count), device)
    module.to(device).train()
    groups = grouped(module.optimizer, module.model.parameters(), module.places)
    optimizer = ready(stacked_optimizer(groups, module.optim_settings), teacher)
    batches = [subject.random_batch(config, device) for _ in range(orders)]
    batch = batches[0] if orders == 1 else join(batches)
    return partial(way(partial(train, module, optimizer)), batch)


def train(module: DistillModule, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One training step."""
    optimizer.zero_grad()
    if isinstance(module, StackedModule):
        module.streams.next_step()
    module.losses(batch).total.sum().backward()
    optimizer.step()


def ready(optimizer: torch.optim.Optimizer, teacher: ViT) -> torch.optim.Optimizer:
    """An optimiser as runs set it up: on a GPU fit for a graph."""
    device = device_of(teacher)
    set_capturable(optimizer, device.type == "cuda", device)
    return optimizer


def students(config: Config, teacher: ViT, count: int) -> list[DistillModule]:
    """`count` students of mixed cells as they train alone, those of equal cells side by side."""
    cells = sorted(islice(cycle(product(LOSSES, GRANULARITIES)), count))
    return [
        DistillModule(
            student := subject.build_student(config, device_of(teacher)),
            config.optimizer,
            config.schedule,
            teacher=teacher,
            objective=subject.objective_of(student, teacher, GRANULARITIES[granularity], LOSSES[loss]),
            alpha=config.alpha,
        ).train()
        for loss, granularity in cells
    ]


def device_of(model: ViT) -> torch.device:
    """Where its weights are."""
    return next(model.parameters()).device


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run("stack", __doc__, measure, argv, rounds=10)


if __name__ == "__main__":
    main()
