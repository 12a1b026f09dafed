"""What must hold on a CUDA device: the same views, the same scores, a whole run."""

import json

import pytest
import torch

from vitkd.data.hashing import key_of, random_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_images_draw_the_same_bits_on_every_device():
    index = torch.arange(1000)

    on_cpu = random_bits(key_of(3, 5), index, 4)
    on_gpu = random_bits(key_of(3, 5, device="cuda"), index.cuda(), 4)

    assert torch.equal(on_cpu, on_gpu.cpu())


def test_recorded_scores_equal_the_cpus(tiny):
    model = tiny().build().eval()
    images = torch.randn(4, 3, 8, 8)

    on_cpu = model.scores(images, [0, 2])
    on_gpu = model.cuda().scores(images.cuda(), [0, 2])

    for block, scores in on_cpu.items():
        torch.testing.assert_close(on_gpu[block].cpu(), scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_whole_run(command, tmp_path, precision):
    settings = ["trainer.max_epochs=2", "trainer.accelerator=gpu", f"trainer.precision={precision}"]

    outcome = command("train", f"paths.outputs={tmp_path}", "name=run", *settings)

    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "digits" / "run" / "metrics.json").read_text())
    assert metrics["test/acc_last"] > 0.15
    assert metrics["hardware/device"] == torch.cuda.get_device_name()
