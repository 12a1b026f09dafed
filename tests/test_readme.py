"""The README's commands are understood, its make targets exist, its tree is the tree."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from vitkd.config import CONF_DIR, parse
from vitkd.report.__main__ import parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.splitlines()]
IN_TABLES = re.findall(r"`(?:OMP_NUM_THREADS=1 )?(python -m vitkd\.[^`]*)`", README)
COMMANDS = [line for line in LINES if line.startswith("python -m vitkd.")] + IN_TABLES
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
MAKES = [line.split("#")[0].split()[1] for line in LINES if line.startswith("make ")]


def first_job(settings):
    """The settings of a sweep's first job."""
    parsed = OverridesParser.create().parse_overrides(settings)
    return [
        f"{o.input_line.partition('=')[0]}={next(o.sweep_string_iterator())}"
        if o.is_sweep_override()
        else o.input_line
        for o in parsed
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    _, _, module, *settings = shlex.split(command, comments=True)
    name = module.removeprefix("vitkd.")
    if name == "report":
        parser().parse_intermixed_args(settings)
        return
    settings = first_job([setting for setting in settings if not setting.startswith("-")])

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose(name, settings)

    if name == "train" and composed.dataset.name == "digits":
        parse(composed)


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(tests/[^`]+)`", PROMISES))))
def test_every_promise_has_its_test(test):
    """As `file`, `file::test` or `file::class::test`."""
    file, *names = test.split("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"^\s*(def|class) {name}\b", source, flags=re.MULTILINE), name


def test_there_are_commands_to_test_and_no_figure_is_missing():
    assert len(COMMANDS) >= 8
    assert "MEASURED" not in README


@pytest.mark.parametrize("target", MAKES)
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_tree_names_what_is_there():
    (tree,) = (block for block in BLOCKS if block.startswith("conf/"))
    folder = ROOT
    for line in tree.splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        parent = {0: ROOT, 2: ROOT / "vitkd"}.get(depth, folder)
        assert (parent / name).exists(), name
        folder = parent / name if name.endswith("/") else folder


def test_every_picture_and_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_snippets_run_on_a_run(command, tmp_path):
    quick = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", f"paths.outputs={tmp_path}", "name=run"]
    assert command("train", "method=none", *quick).code == 0
    run = repr(str(tmp_path / "digits" / "run"))

    explained: dict = {}
    recorded: dict = {}
    for snippet, names in zip(SNIPPETS, (explained, recorded), strict=True):
        exec(re.sub(r'"outputs/[^"]+"', run, snippet), names)

    assert explained["maps"].shape == (2, 4, 4)
    assert recorded["output"].scores[1].shape == (2, 4, 17, 17)
