"""What a stacked student drops depends on its own stream alone."""

import torch

from vitkd.models.dropout import Dropout, DropPath, drop_by
from vitkd.train.stacked.dropout import GeneratorStreams, KeyedStreams

P = 0.3


def test_on_the_cpu_each_student_drops_what_it_drops_alone():
    x = torch.randn(3, 5, 7)
    together = Dropout(P)
    drop_by(GeneratorStreams([4, 5, 6]).drop, [together])

    first, second = together(x), together(x)

    for student, seed in enumerate([4, 5, 6]):
        torch.manual_seed(seed)
        alone = Dropout(P)
        assert torch.equal(alone(x[student]), first[student])
        assert torch.equal(alone(x[student]), second[student])


def test_on_the_cpu_each_student_leaves_out_the_branches_that_it_leaves_out_alone():
    together = DropPath(P)
    drop_by(GeneratorStreams([4, 5, 6]).drop, [together])

    drawn = together.draw(torch.ones(3, 9))

    for student, seed in enumerate([4, 5, 6]):
        torch.manual_seed(seed)
        assert torch.equal(DropPath(P).draw(torch.ones(9)), drawn[:, student])


def test_streams_go_on_where_they_were_saved():
    streams, x = GeneratorStreams([4, 5]), torch.ones(2, 50)
    streams.drop(x, P)
    state = streams.state_dict()
    expected = streams.drop(x, P)

    resumed = GeneratorStreams([0, 0])
    resumed.load_state_dict(state)

    assert torch.equal(resumed.drop(x, P), expected)


def test_streams_go_on_from_the_step_of_another_device():
    on_cpu, on_gpu = GeneratorStreams([4, 5]), KeyedStreams([4, 5], torch.device("cpu"))
    for _ in range(3):
        on_cpu.next_step()
    on_gpu.load_state_dict(on_cpu.state_dict())
    on_gpu.next_step()

    back = GeneratorStreams([4, 5])
    back.load_state_dict(on_gpu.state_dict())

    assert (int(on_gpu.step), back.step) == (4, 4)
    assert torch.equal(back.drop(torch.ones(2, 50), P), on_cpu.drop(torch.ones(2, 50), P)), "from their seeds"
