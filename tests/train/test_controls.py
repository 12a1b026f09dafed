"""Control arms in training: a lone image has no neighbour whose maps it could be taught."""

import pytest

from tests.test_contract import REMARKS, composed, module_of
from vitkd.config.run import parse
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation
from vitkd.train.job import load_data
from vitkd.train.stacked import StackedModule

pytestmark = REMARKS


@pytest.fixture
def shuffled():
    config = composed("method", "attention")
    return AttentionDistillation(control="shuffled"), config


@pytest.mark.parametrize("students", [1, 2])
def test_a_lone_last_image_is_left_out_of_the_comparison(shuffled, monkeypatch, students):
    """Its accuracy counts; of the transfer loss it is no part, where it would be taught its own maps."""
    method, config = shuffled
    monkeypatch.setattr(config, "method", method)
    data = load_data(config)
    module = module_of(config, data)
    if students > 1:
        module = StackedModule([module_of(config, data, seed) for seed in range(students)], [0, 0], [0, 1])
    images, lone = (
        Batch(*parts) for parts in zip(*(t.split([8, 1]) for t in data.first("val", 9)[:3]), strict=True)
    )

    module.eval()
    module.validation_step(images, 0)
    without = module.val_meter.means()
    module.validation_step(lone, 1)
    with_lone = module.val_meter.means()

    assert len(with_lone["transfer_loss"]) == students
    for name in ("transfer_loss", "transfer_values"):
        assert with_lone[name] == without[name]
    assert with_lone["class_loss"] != without["class_loss"]


def test_training_on_one_image_a_step_is_refused(shuffled):
    resolved = shuffled[1].resolved
    changed = resolved | {
        "method": resolved["method"] | {"control": "shuffled"},
        "dataset": resolved["dataset"] | {"batch_size": 1},
    }
    with pytest.raises(ConfigError, match=r"dataset.batch_size=1: method.control=shuffled .* at least 2"):
        parse_plain(changed)


def parse_plain(plain):
    from omegaconf import OmegaConf

    return parse(OmegaConf.create(plain))
