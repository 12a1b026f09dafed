"""With compile=true training steps run compiled code, and only they; the rest is as without."""

import shutil
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from tests.train.objectives import compare_maps
from vitkd.data import Batch, Digits, ImageDataModule
from vitkd.errors import ConfigError, RunError
from vitkd.optim import AdamW, Constant
from vitkd.train.build import check_compiler, compile_training
from vitkd.train.module import DistillModule

COMPILE = torch.compile
BATCH = Batch(torch.randn(2, 3, 8, 8), torch.arange(2), torch.arange(2))

# PyTorch's compiler looks at tensors in ways that PyTorch warns of.
from_pytorch = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for torch.compile: notes each call of compiled code, or fails as it may."""

    def compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def compiled(batch: Batch) -> Any:
            compile.calls += 1
            if compile.error:
                raise compile.error
            return function(batch)

        return compiled

    compile.calls, compile.error = 0, None
    monkeypatch.setattr(torch, "compile", compile)
    return compile


@pytest.fixture
def module(tiny, compiler) -> DistillModule:
    """Compiled, at a step that is not logged."""
    module = DistillModule(tiny().build(), AdamW(), Constant())
    module._trainer = SimpleNamespace(global_step=1, log_every_n_steps=20)
    names = [*module.state_dict()]
    compile_training(module)
    assert [*module.state_dict()] == names
    return module


def test_a_training_step_is_compiled(module, compiler):
    module.losses(BATCH)

    assert compiler.calls == 1


def test_validation_is_not(module, compiler):
    module.eval().losses(BATCH)

    assert compiler.calls == 0


def test_a_step_that_is_logged_is_not(module, compiler):
    module._trainer.global_step = 40
    module.losses(BATCH)

    assert compiler.calls == 0


def test_what_the_compiler_fails_at_is_one_line(module, compiler):
    compiler.error = torch._dynamo.exc.TorchDynamoException(
        "\nPython.h: not found\n\nSet TORCHDYNAMO_VERBOSE"
    )

    with pytest.raises(RunError, match=r"^compile=true: Python.h: not found; train with compile=false$"):
        module.losses(BATCH)


def test_a_mistake_of_another_kind_is_not_disguised(module, compiler):
    compiler.error = RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        module.losses(BATCH)


def test_no_compiler_is_found_out_first(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(ConfigError, match="no C\\+\\+ compiler no-such-compiler"):
        check_compiler(torch.device("cpu"))


def test_no_triton_is_found_out_first(monkeypatch):
    monkeypatch.setattr("vitkd.train.build.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match="Triton"):
        check_compiler(torch.device("cuda"))


def test_a_compiler_that_is_there_will_do(monkeypatch):
    monkeypatch.setenv("CXX", "python3")

    check_compiler(torch.device("cpu"))


class Compiled(L.Callback):
    """Notes after each epoch how many graphs have been compiled so far, and each step's loss."""

    def __init__(self, counter: CompileCounterWithBackend) -> None:
        self.counter = counter
        self.graphs: list[int] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: dict[str, Any], *_: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_epoch_end(self, *_: Any) -> None:
        self.graphs.append(self.counter.frame_count)


@pytest.fixture
def fit(tiny, tmp_path, monkeypatch):
    """Three epochs on digits with an average of the weights, by the compiler's front end: no C++ needed."""

    def fit(alpha: float, compiles: bool) -> Compiled:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=counter))
        torch.manual_seed(5)
        student, teacher = (tiny(channels=1, num_classes=10, depth=depth).build() for depth in (1, 2))
        objective = compare_maps(student, teacher)
        module = DistillModule(
            student, AdamW(lr=1e-2), Constant(), teacher=teacher, objective=objective, alpha=alpha
        )
        if compiles:
            compile_training(module)
        facts = {"name": "digits", "num_classes": 10, "channels": 1, "image_size": 8, "patch_size": 4}
        facts |= {"mean": [0.3], "std": [0.4], "batch_size": 200}
        watch, average = Compiled(counter), EMAWeightAveraging(decay=0.5)
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=3, log_every_n_steps=4, default_root_dir=tmp_path,
            callbacks=[watch, average], num_sanity_val_steps=0, **dict.fromkeys(quiet, False),
        )  # fmt: skip
        trainer.fit(module, ImageDataModule(Digits(**facts), tmp_path, seed=3))
        return watch

    yield fit
    torch._dynamo.reset()


@from_pytorch
@pytest.mark.parametrize("alpha", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_takes_the_same_steps_and_compiles_nothing_after_the_first(fit, alpha):
    compiled, eager = fit(alpha, compiles=True), fit(alpha, compiles=False)

    assert len(compiled.losses) == 3 * 6
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)
    assert compiled.graphs[0] == compiled.graphs[-1] > 0
    assert eager.graphs == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@from_pytorch
def test_the_command_trains_as_without(command, tmp_path):
    briefly = [
        "trainer=cpu",
        "trainer.max_epochs=2",
        "teacher.max_epochs=1",
        "trainer.limit_train_batches=3",
        "teacher.trainer.limit_train_batches=3",
    ]
    weights = []
    for name, compiles in (("compiled", "true"), ("eager", "false")):
        ended = command("train", *briefly, f"paths.outputs={tmp_path}", f"name={name}", f"compile={compiles}")
        assert ended.code == 0, ended.err
        weights.append(load_file(tmp_path / "digits" / name / "student.safetensors"))
        torch._dynamo.reset()

    compiled, eager = weights
    assert compiled.keys() == eager.keys()
    for weight in eager:
        torch.testing.assert_close(compiled[weight], eager[weight], rtol=1e-3, atol=1e-3)
