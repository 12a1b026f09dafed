"""The README and the pages in docs/: commands are understood, links lead somewhere, the tree is the tree."""

import re
import shlex
from functools import cache
from inspect import signature
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning import Trainer
from omegaconf import OmegaConf

from vitkd.config.run import CONF_DIR, parse
from vitkd.report.__main__ import parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PROMISES = ROOT / "docs" / "promises.md"
PAGES = [
    README,
    ROOT / "RESULTS.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# Overrides beside which every setting that the pages name exists.
OPTIONS = [
    ("train", []),
    ("train", ["method=token", "granularity=head", "loss=mse", "weighting=step"]),
    ("train", ["method=relation", "weighting=student_correct"]),
    ("train", ["method=dkd"]),
    ("train", ["method=together"]),
    ("train", ["method=crd"]),
    ("train", ["method=locality", "teacher=resnet56"]),
    ("train", ["method=copy", "granularity=encoder", "loss=ce"]),
    ("train", ["method=dearkd", "teacher=resnet56"]),
    ("train", ["method=subspace"]),
    ("train", ["method=regions"]),
    ("train", ["student=merged", "method=none"]),
    ("train", ["weighting=gradient_balance", "logger=[wandb,mlflow]"]),
    ("train", ["method=logit", "teacher=resnet", "dataset=image_folder", "hydra/launcher=stacked"]),
    ("train", ["teacher=timm", "student=timm", "dataset=image_folder"]),
    ("explain", ["run=outputs"]),
    ("evaluate", ["run=outputs"]),
    ("export", ["run=outputs"]),
]


def text_of(page):
    return page.read_text(encoding="utf-8")


def name_of(page):
    return str(page.relative_to(ROOT))


def fences(page, language=""):
    """The contents of a page's fenced blocks, of all languages or one."""
    return [body for found, body in FENCE.findall(text_of(page)) if language in ("", found)]


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(page)))


def lines_of_code(page):
    """Every line of the fenced blocks, continued lines joined, and every piece of inline code."""
    joined = [body.replace("\\\n", " ") for body in fences(page)]
    return [line.strip() for body in joined for line in body.splitlines()] + inline_code(page)


def commands_of(module):
    """Every command of a page that runs a module below `module`, once."""
    pattern = re.compile(rf"(python|torchrun) .*-m {module}\.\w+")
    found = [line for page in PAGES for line in lines_of_code(page) if pattern.search(line)]
    return list(dict.fromkeys(found))


def arguments_of(command, module):
    """The name of the module below `module` that a command runs, and its arguments."""
    words = shlex.split(command, comments=True)
    (place,) = (i for i, word in enumerate(words) if word.startswith(f"{module}."))
    return words[place].removeprefix(f"{module}."), words[place + 1 :]


def settings():
    """Every `key=value` that is a piece of inline code, once; none with a placeholder as its value."""
    pattern = re.compile(r"\+?[a-z_]+([./][a-z_]+)*=[^ …A-Z]+")
    found = [code for page in PAGES for code in inline_code(page) if pattern.fullmatch(code)]
    return list(dict.fromkeys(found))


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """Every link and picture of a page that does not leave the repository: (file or "", anchor or "")."""
    found = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", FENCE.sub("", text_of(page)))
    return list(dict.fromkeys(found))


def first_job(overrides):
    """The overrides of a sweep's first job."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [
        f"{o.input_line.partition('=')[0]}={next(o.sweep_string_iterator())}"
        if o.is_sweep_override()
        else o.input_line
        for o in parsed
    ]


def composed_of(name, overrides, **options):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(name, overrides, **options)


def keys_in(node, above=""):
    """The dotted path of every key of a nested dictionary."""
    for key, value in node.items():
        yield f"{above}{key}"
        if isinstance(value, dict):
            yield from keys_in(value, f"{above}{key}.")


@cache
def known_keys():
    """The settings of every command, and the arguments of Lightning's Trainer."""
    composed = [composed_of(name, overrides, return_hydra_config=True) for name, overrides in OPTIONS]
    ours = {key for each in composed for key in keys_in(OmegaConf.to_container(each))}
    return ours | {f"trainer.{name}" for name in signature(Trainer).parameters}


@pytest.mark.parametrize("command", commands_of("vitkd"))
def test_every_command_is_understood(command):
    name, arguments = arguments_of(command, "vitkd")
    if name == "report":
        parser().parse_intermixed_args(arguments)
        return
    composed = composed_of(name, first_job([each for each in arguments if not each.startswith("-")]))

    if name == "train" and composed.dataset.name == "digits":
        parse(composed)


@pytest.mark.parametrize("command", commands_of("benchmarks"))
def test_every_benchmark_and_its_options_exist(command):
    name, arguments = arguments_of(command, "benchmarks")
    source = text_of(ROOT / "benchmarks" / f"{name}.py") + text_of(ROOT / "benchmarks" / "harness.py")
    for argument in arguments:
        if argument.startswith("--"):
            assert f'"{argument}"' in source, argument


@pytest.mark.parametrize("setting", settings())
def test_every_setting_exists(setting):
    """As a key of a command's configuration, as an option in conf/, or in a command that is tested above."""
    key, _, value = setting.removeprefix("+").partition("=")
    in_commands = {word for command in commands_of("vitkd") for word in command.split()}
    assert key in known_keys() or (CONF_DIR / key / f"{value}.yaml").is_file() or setting in in_commands


def test_the_commands_are_many():
    assert len(commands_of("vitkd")) >= 60
    assert len(commands_of("benchmarks")) >= 5
    assert len(settings()) >= 40


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(tests/[^`]+)`", text_of(PROMISES)))))
def test_every_promise_has_its_test(test):
    """As `file`, `file::test` or `file::class::test`."""
    file, *names = test.split("::")
    source = text_of(ROOT / file)
    for name in names:
        assert re.search(rf"^\s*(def|class) {name}\b", source, flags=re.MULTILINE), name


def make_targets():
    found = [line for page in LINKED for line in lines_of_code(page) if line.startswith("make ")]
    return sorted({line.split("#")[0].split()[1] for line in found})


@pytest.mark.parametrize("target", make_targets())
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", text_of(ROOT / "Makefile"), flags=re.MULTILINE)


@pytest.mark.parametrize("extra", ["sweep", "explain", "wandb", "mlflow", "onnx"])
def test_every_extra_exists_and_is_named(extra):
    assert re.search(rf"^{extra} = \[", text_of(ROOT / "pyproject.toml"), flags=re.MULTILINE)
    assert any(f"pip install 'vitkd[{extra}]'" in lines_of_code(page) for page in PAGES)


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= 200


def test_the_table_of_options_names_what_is_there():
    cell = r"(`\w+`(?:, `\w+`)*)"
    rows = re.findall(rf"^\| {cell} \| {cell} \| \[", text_of(README), flags=re.MULTILINE)
    assert len(rows) >= 7
    for groups, options in rows:
        for group in re.findall(r"\w+", groups):
            for option in re.findall(r"\w+", options):
                assert (ROOT / "conf" / group / f"{option}.yaml").is_file(), (group, option)


def tree():
    """The paths of the README's tree, each relative to the repository."""
    (block,) = (body for body in fences(README) if body.startswith("conf/"))
    places, above = [], {0: Path()}
    for line in block.splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        places.append(above[depth] / name)
        above[depth + 2] = places[-1]
    return places


def test_the_tree_names_what_is_there():
    for place in tree():
        assert (ROOT / place).exists(), place


def test_the_tree_names_every_package():
    packages = {file.parent.relative_to(ROOT) for file in (ROOT / "vitkd").glob("*/*.py")}
    assert packages <= {*tree()}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target, anchor in links(page):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), f"{target}#{anchor}"


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / target).resolve() for target, _ in links(README) if target}
    assert {*LINKED} - {README} <= linked


def test_the_snippets_run_on_a_run(command, tmp_path):
    quick = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", f"paths.outputs={tmp_path}", "name=run"]
    assert command("train", "method=none", *quick).code == 0
    run = repr(str(tmp_path / "digits" / "run"))

    names: dict = {}
    for page in PAGES:
        for snippet in fences(page, "python"):
            exec(re.sub(r'"outputs/[^"]+"', run, snippet).replace("10_000", "20"), names)

    assert names["maps"].shape == (2, 4, 4)
    assert names["output"].scores[1].shape == (2, 4, 17, 17)
    assert len(names["bootstrap"]) == len(names["student_t"]) == 20
