"""The formats of an exported classifier: how a file is made, and how it is run.

Shapes: B images, C channels, H × W pixels, K classes.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitkd.errors import from_extra
from vitkd.export.classifier import Classifier, Classify


@dataclass(frozen=True)
class Format:
    """One format of files."""

    suffix: str
    runtime: str
    """what runs a file"""
    module: str
    """of which that is a part"""
    extra_modules: tuple[str, ...]
    """of the extra vitkd[onnx], which it takes to make a file and to check it"""
    to_bytes: Callable[[Classifier, Mapping[str, str]], bytes]
    """a file's content, with texts about the classifier by their names"""
    open: Callable[[Path], Classify]
    """what a file computes"""

    def check_installed(self) -> None:
        """ConfigError if a module that it needs is absent."""
        for module in self.extra_modules:
            from_extra(module, "onnx")


def to_onnx(classifier: Classifier, about: Mapping[str, str]) -> bytes:
    """An ONNX model with the input "images", the output "logits" and `about` as its metadata."""
    program = torch.onnx.export(
        classifier,
        (_example(classifier),),
        dynamo=True,
        dynamic_shapes={"images": {0: "batch"}},
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    # They name files on this machine, in more bytes than a small student's weights take.
    for part in (model.graph, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")
    from_extra("onnx.helper", "onnx").set_model_props(model, {**about})
    return model.SerializeToString()


def run_onnx(file: Path) -> Classify:
    """An ONNX file in ONNX Runtime, on the CPU with as many threads as PyTorch has."""
    onnxruntime = from_extra("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def to_torch_export(classifier: Classifier, about: Mapping[str, str]) -> bytes:
    """A program of `torch.export`, with `about` as its extra files."""
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        classifier, (_example(classifier),), dynamic_shapes={"images": batch}, strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files on this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={**about})
    return buffer.getvalue()


def run_torch_export(file: Path) -> Classify:
    """A program of `torch.export` in PyTorch."""
    with file.open("rb") as content:
        return torch.export.load(content).module()


def _example(classifier: Classifier) -> Tensor:
    """Images [2, C, H, W]: of one alone, a tracer would take the batch for a constant."""
    return torch.zeros(2, *classifier.size)


FORMATS = {
    "onnx": Format(
        suffix=".onnx",
        runtime="ONNX Runtime",
        module="onnxruntime",
        extra_modules=("onnx", "onnxscript", "onnxruntime"),
        to_bytes=to_onnx,
        open=run_onnx,
    ),
    "torch_export": Format(
        suffix=".pt2",
        runtime="torch.export",
        module="torch",
        extra_modules=(),
        to_bytes=to_torch_export,
        open=run_torch_export,
    ),
}
