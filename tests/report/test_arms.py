"""What is compared with what: never different images, models or lengths, and no seed twice."""

from dataclasses import fields

import pytest
import yaml

from vitkd.models import ViTConfig
from vitkd.report.arms import VIT, VIT_DEFAULTS, usual_value
from vitkd.report.comparison import compare
from vitkd.report.experiments import Experiment, find_experiments
from vitkd.report.missing import missing_runs
from vitkd.report.notes import notes_on
from vitkd.report.runs import find_runs
from vitkd.report.verdicts import Outcome


def experiments(runs) -> list[Experiment]:
    return find_experiments(find_runs([runs.outputs]))


def labels(experiment: Experiment) -> list[str]:
    return [arm.label for arm in experiment.rows]


def test_arms_differ_in_more_than_the_seed(runs):
    runs.arm({0: 0.90, 1: 0.91}, method="none")
    runs.arm({0: 0.92, 1: 0.93}, alpha=0.5, granularity="block", loss="kl")
    runs.arm({0: 0.94}, alpha=0.1, granularity="block", loss="kl")
    runs.arm({0: 0.95}, alpha=0.5, granularity="head", loss="mse")

    (experiment,) = experiments(runs)

    assert labels(experiment) == [
        *("student alone", "head mse, alpha 0.5", "block kl, alpha 0.1", "block kl, alpha 0.5"),
    ]
    assert [[*arm.runs] for arm in experiment.rows] == [[0, 1], [0], [0], [0, 1]]
    assert experiment.title == "digits"
    assert experiment.notes == []


def test_what_is_watched_or_where_it_lies_makes_no_other_arm(runs):
    runs.add(seed=0, trainer__accelerator="cpu", paths__outputs="/a", log_every_n_steps=1)
    runs.add(seed=1, trainer__accelerator="gpu", paths__outputs="/b", name="b")

    (experiment,) = experiments(runs)

    assert [[*arm.runs] for arm in experiment.rows] == [[0, 1]]


WSLD = {"weighting___target_": "vitkd.methods.weighting.WSLD"}
STUDENT_CORRECT = {"weighting___target_": "vitkd.methods.weighting.StudentCorrect"}
CONSTANT = {"weighting___target_": "vitkd.methods.weighting.Constant"}


def test_weightings_are_arms_of_their_own(runs):
    runs.arm({0: 0.90, 1: 0.91}, method="none")
    runs.arm({0: 0.92}, alpha=0.5)
    runs.arm({1: 0.92}, alpha=0.5, **CONSTANT)
    runs.arm({0: 0.93, 1: 0.95}, alpha=0.5, **WSLD)
    for factor in (0.25, 0.5):
        runs.arm({0: 0.94}, alpha=0.5, **STUDENT_CORRECT, weighting__factor=factor)
    runs.arm({0: 0.94}, alpha=0.5, weighting___target_="plugin.weights.WSLD")

    (experiment,) = experiments(runs)

    assert {arm.label: [*arm.runs] for arm in experiment.rows} == {
        "student alone": [0, 1],
        "block kl, alpha 0.5": [0, 1],
        "block kl, alpha 0.5, weighting=plugin.weights.WSLD": [0],
        "block kl, alpha 0.5, weighting=student_correct, weighting.factor=0.25": [0],
        "block kl, alpha 0.5, weighting=student_correct, weighting.factor=0.5": [0],
        "block kl, alpha 0.5, weighting=wsld": [0, 1],
    }
    gains = {row.arm.label: row.gain.difference.mean for row in compare(experiment).rows[1:]}
    assert gains["block kl, alpha 0.5, weighting=wsld"] == pytest.approx(3.5)


def test_a_weighting_is_named_though_most_arms_have_it(runs):
    runs.add(alpha=0.5, **CONSTANT)
    for alpha in (0.1, 0.2, 0.3):
        runs.add(alpha=alpha, **WSLD)

    (experiment,) = experiments(runs)

    assert {arm.label: arm.weighting for arm in experiment.arms} == {
        "block kl, alpha 0.5": "constant",
        **{f"block kl, alpha {alpha}, weighting=wsld": "wsld" for alpha in (0.1, 0.2, 0.3)},
    }


def test_alpha_1_is_the_student_alone_with_constant_weighting_only(runs):
    """With a schedule alpha is 1 in some epochs only."""
    runs.add(alpha=1.0, **CONSTANT)
    runs.add(alpha=1.0, weighting___target_="vitkd.methods.weighting.Linear")
    runs.add(seed=1, method="none", **WSLD)

    (experiment,) = experiments(runs)

    assert [(arm.label, [*arm.runs]) for arm in experiment.rows] == [
        ("student alone", [0, 1]),
        ("block kl, alpha 1, weighting=linear", [0]),
    ]


def test_ce_and_kl_are_called_one_result(runs):
    """With a frozen teacher their gradients are equal."""
    runs.add(alpha=0.5, loss="kl")
    runs.add(alpha=0.1, loss="CE")
    assert not any("ce and kl" in note for note in notes_on(compare(*experiments(runs))))

    runs.add(alpha=0.1, loss="kl")

    assert any("block: ce and kl have the same gradient" in n for n in notes_on(compare(*experiments(runs))))


def test_experiments_are_never_mixed(runs):
    runs.arm({0: 0.9, 1: 0.9, 2: 0.9}, method="none")
    runs.arm({0: 0.9}, method="none", trainer__max_epochs=7)
    runs.arm({0: 0.9}, method="none", dataset__name="mnist")
    runs.arm({0: 0.95}, alpha=0.5, trainer__max_epochs=7, optimizer__lr=0.5)

    separate = experiments(runs)

    assert [e.title for e in separate] == [
        "digits, trainer.max_epochs=1, optimizer.lr=0.001",
        "digits, trainer.max_epochs=7, optimizer.lr=0.001",
        "digits, trainer.max_epochs=7, optimizer.lr=0.5",
        "mnist",
    ]
    assert [len(e.rows) for e in separate] == [1, 1, 1, 1]
    assert compare(separate[2]).rows[0].verdict.outcome == Outcome.NOT_COMPARABLE


def test_the_student_alone_is_one_arm_however_it_was_asked_for(runs):
    runs.arm({0: 0.90, 1: 0.91}, method="none")
    runs.arm({1: 0.91, 2: 0.92}, alpha=1.0, granularity="head")
    runs.arm({0: 0.90}, alpha=1, granularity="block", loss="mse")
    runs.arm({2: 0.92}, alpha=1, method="logit")

    (experiment,) = experiments(runs)

    assert labels(experiment) == ["student alone"]
    assert [*experiment.baseline.runs] == [0, 1, 2]
    assert experiment.notes == [
        "3 repeated runs of the student alone left out: alpha=1 and method=none are the same training, and"
        " only the newest run of each seed is used"
    ]
    assert len(experiment.alone) == 6


def test_students_alone_that_should_be_equal_and_are_not(runs):
    runs.arm({0: 0.90, 3: 0.91}, method="none")
    runs.arm({0: 0.90, 3: 0.92}, alpha=1.0)

    (experiment,) = experiments(runs)

    assert any("with the same seed differ (seed 3)" in note for note in experiment.notes)


def test_of_repeats_the_newest_done_one_counts(runs):
    runs.add("run-2", acc=0.5, seed=0)
    runs.add("run", acc=0.6, seed=0)
    runs.add("run-3", acc=0.7, seed=0, state="failed")

    (experiment,) = experiments(runs)

    assert experiment.arms[0].metric("acc_last") == {0: 60.0}
    assert experiment.notes == ["1 older run left out: only the newest of each arm and seed is used"]


def test_controls_are_rows_with_a_label_of_what_differs(runs):
    runs.arm({0: 0.90}, method="none")
    runs.arm({0: 0.91}, alpha=0.5, teacher__trained=True)
    runs.arm({0: 0.92}, alpha=0.5, teacher__trained=True, teacher__control="shuffled")
    runs.arm({0: 0.93}, alpha=0.5, teacher__trained=True, teacher__control="uniform")
    runs.arm({0: 0.93}, alpha=0.5, teacher__trained=False)
    runs.arm({0: 0.94}, alpha=0.5, teacher__trained=True, method="LogitDistillation")

    (experiment,) = experiments(runs)

    assert labels(experiment) == [
        *("student alone", "block kl, alpha 0.5", "block kl, alpha 0.5, teacher.control=shuffled"),
        *("block kl, alpha 0.5, teacher.control=uniform", "block kl, alpha 0.5, teacher.trained=false"),
        "logit, alpha 0.5",
    ]


def test_no_two_arms_of_an_experiment_share_a_label(runs):
    runs.arm({0: 0.91}, alpha=0.5, loss__temperature=1.0)
    runs.arm({0: 0.92}, alpha=0.5, loss__temperature=2.0)
    runs.arm({0: 0.92}, alpha=0.5, method__resize="bilinear")
    runs.arm({0: 0.92}, alpha=0.5, teacher__seed=4)
    runs.arm({0: 0.92}, alpha=0.5, teacher__checkpoint="/long/way/to/a/run")
    runs.arm({0: 0.92}, method="LogitDistillation", granularity="head", alpha=0.5)
    runs.arm({0: 0.92}, method="LogitDistillation", granularity="block", alpha=0.5)

    (experiment,) = experiments(runs)

    assert len({*labels(experiment)}) == 7
    assert any("teacher.checkpoint=a/run" in label for label in labels(experiment))


@pytest.mark.parametrize(
    ("values", "usual"),
    [
        ([0, 0, 1], "0"),
        ([0, 1], None),
        ([1, 1, None], "null"),
        ([True, False, True], "true"),
        (["none", "row", "row"], '"none"'),
        (["none", None, "row", "row", "row"], '"row"'),
    ],
)
def test_what_goes_without_saying(values, usual):
    assert usual_value(values) == usual


def test_null_counts_as_absent(runs):
    runs.add(seed=0, name="old")
    runs.add(seed=1, name="new", teacher__control=None, dataset__new=None)

    (experiment,) = experiments(runs)

    assert [[*arm.runs] for arm in experiment.rows] == [[0, 1]]


def test_a_teacher_for_every_seed_is_one_arm(runs):
    for seed in range(3):
        runs.add(seed=seed, teacher__seed=seed, alpha=0.5, metrics={"teacher/weights": f"w{seed}"})

    (experiment,) = experiments(runs)

    assert labels(experiment) == ["block kl, alpha 0.5"]
    assert [*experiment.arms[0].runs] == [0, 1, 2]
    assert experiment.notes == []


def test_a_teacher_for_every_seed_is_named_where_others_have_one_for_all(runs):
    for seed in range(3):
        runs.add(seed=seed, alpha=0.1)
        runs.add(seed=seed, alpha=0.5)
        runs.add(seed=seed, alpha=0.5, teacher__seed=seed, teacher__trained=False)

    (experiment,) = experiments(runs)

    assert labels(experiment) == [
        *("block kl, alpha 0.1", "block kl, alpha 0.5"),
        "block kl, alpha 0.5, teacher.seed=${seed}, teacher.trained=false",
    ]


def test_every_teacher_for_every_seed_is_an_arm_a_teacher(runs):
    for teacher in range(2):
        for seed in range(2):
            runs.add(seed=seed, teacher__seed=teacher, alpha=0.5)

    (experiment,) = experiments(runs)

    assert labels(experiment) == [
        "block kl, alpha 0.5, teacher.seed=0",
        "block kl, alpha 0.5, teacher.seed=1",
    ]


def test_an_arm_whose_teacher_changed_says_so(runs):
    runs.add(seed=0, metrics={"teacher/weights": "a"})
    runs.add(seed=1, metrics={"teacher/weights": "b"})

    (experiment,) = experiments(runs)

    assert experiment.notes == ["block kl, alpha 0.5: its runs have 2 different teachers"]


def test_runs_on_other_images_are_neither_pooled_nor_paired(runs, report):
    """Two seeds and their student alone before photos were deleted, two after."""
    for seed, contents in ((0, "a"), (1, "a"), (2, "b"), (3, "b")):
        runs.add(seed=seed, inputs={"contents": contents}, dataset__name="photos")
        runs.add(seed=seed, method="none", inputs={"contents": contents}, dataset__name="photos")

    found = experiments(runs)

    assert [experiment.title for experiment in found] == [
        "photos, dataset.contents=a",
        "photos, dataset.contents=b",
    ]
    assert [sorted(arm.runs) for experiment in found for arm in experiment.rows] == [[0, 1]] * 2 + [
        [2, 3]
    ] * 2
    line = (
        "photos: runs on 2 different sets of images (dataset.contents: a, b) are not compared with each other"
    )
    assert line in report(runs.outputs)


@pytest.mark.parametrize("content", ["", "[", "[1]", '{"contents": {"a": 1}}', '{"contents": null}'])
def test_images_that_are_not_recorded_are_those_that_the_settings_name(content, runs, report):
    for seed, is_recorded in ((0, False), (1, True)):
        path = runs.add(seed=seed)
        if is_recorded:
            (path / "inputs.json").write_text(content)

    (experiment,) = experiments(runs)

    assert len(experiment.arms[0].runs) == 2
    assert "sets of images" not in report(runs.outputs)


def test_gains_are_corrected_over_the_whole_experiment(runs):
    alone = {seed: 0.90 + 0.001 * seed for seed in range(5)}
    runs.arm(alone, method="none")
    better = {seed: acc + 0.03 + 0.001 * (seed % 2) for seed, acc in alone.items()}
    runs.arm(better, alpha=0.5)
    for n, alpha in enumerate((0.1, 0.2, 0.3)):
        noise = {seed: acc + 0.002 * ((seed + n) % 3 - 1) for seed, acc in alone.items()}
        runs.arm(noise, alpha=alpha)

    (experiment,) = experiments(runs)
    rows = {row.arm.label: row for row in compare(experiment).rows}
    best = rows["block kl, alpha 0.5"]

    assert best.p_holm == 4 * best.gain.p
    assert [row.verdict.outcome for row in rows.values()] == [
        *(Outcome.BASELINE, Outcome.NO_EVIDENCE, Outcome.NO_EVIDENCE, Outcome.NO_EVIDENCE, Outcome.REAL),
    ]
    assert (
        compare(experiment).headline == "4 arms against the student alone: 1 real gain, 3 without evidence."
    )


def test_a_winner_before_correction_is_none_after_it(runs):
    runs.arm(dict.fromkeys(range(4), 0.90), method="none")
    runs.arm({0: 0.91, 1: 0.92, 2: 0.93, 3: 0.92}, alpha=0.5)
    for alpha in (0.1, 0.2, 0.3, 0.4):
        runs.arm({0: 0.91, 1: 0.89, 2: 0.905, 3: 0.895}, alpha=alpha)

    row = compare(experiments(runs)[0]).rows[-1]

    # Differences 1, 2, 3, 2 points: mean 2, deviation √(2/3), t = 4.90, p = 0.016; times 5, 0.081.
    assert row.gain.p == pytest.approx(0.0163, abs=1e-4)
    assert row.p_holm == pytest.approx(5 * row.gain.p)
    assert row.verdict.outcome == Outcome.NO_EVIDENCE


def test_one_seed_borrows_the_spread_of_other_arms(runs):
    runs.arm({0: 0.90, 1: 0.90, 2: 0.90}, method="none")
    runs.arm({0: 0.91, 1: 0.90, 2: 0.92}, alpha=0.5)
    runs.arm({0: 0.905}, alpha=0.1)

    rows = compare(experiments(runs)[0]).rows

    # Differences +1, 0, +2 points: standard deviation 1. Half of that takes 34 seeds.
    assert rows[1].spread.source == "other arms"
    assert rows[1].needed == 34
    assert "needs 34 seeds" in rows[1].verdict.text


def test_one_seed_everywhere_cannot_even_say_how_many(runs):
    runs.add(method="none", acc=0.90)
    runs.add(alpha=0.5, acc=0.99)

    row = compare(experiments(runs)[0]).rows[1]

    assert (row.verdict.outcome, row.needed, row.spread) == (Outcome.TOO_FEW, None, None)


def test_default_settings_are_those_of_the_models():
    defaults = {field.name: field.default for field in fields(ViTConfig) if field.name in VIT_DEFAULTS}

    assert defaults == VIT_DEFAULTS
    assert f"{ViTConfig.__module__.rpartition('.')[0]}.ViTConfig" == VIT


@pytest.mark.parametrize(
    ("name", "value"), [("tokenizer", "spt"), ("attention", "lsa"), ("distillation_token", True)]
)
def test_other_students_are_other_experiments_and_other_teachers_other_arms(runs, name, value):
    runs.add(seed=0)
    runs.add(seed=0, **{f"student__{name}": value})
    runs.add(seed=0, **{f"teacher__{name}": value})

    plain, other = sorted(experiments(runs), key=lambda experiment: experiment.title)

    typed = "true" if value is True else value
    assert (plain.title, other.title) == ("digits", f"digits, student.{name}={typed}")
    assert labels(plain) == ["block kl, alpha 0.5", f"block kl, alpha 0.5, teacher.{name}={typed}"]


TOKEN = {
    "method": "TokenDistillation",
    "method__targets": "hard",
    "method__temperature": 3.0,
    "method__attention_weight": 0.0,
    "student__distillation_token": True,
}
RESNET = {"_target_": "vitkd.models.ResNetConfig", "image_size": 8, "channels": 1, "num_classes": 10}
RESNET |= {"variant": "resnet18", "stem": "small", "pretrained": False}


def with_resnet(runs, model="teacher", **settings):
    """A run with a residual network in a ViT's place."""
    path = runs.add(**settings)
    config = yaml.safe_load((path / "config.yaml").read_text())
    vit = {field.name for field in fields(ViTConfig)}
    config[model] = {k: v for k, v in config[model].items() if k not in vit} | RESNET
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def test_arms_of_a_distillation_token_say_what_it_learns(runs):
    for weight in (0.0, 1.0):
        for targets in ("hard", "soft"):
            for granularity, loss in (("block", "kl"), ("head", "mse")) if weight else (("block", "kl"),):
                settings = {"method__targets": targets, "method__attention_weight": weight}
                runs.add(**(TOKEN | settings), granularity=granularity, loss=loss)
    with_resnet(runs, **TOKEN)
    runs.add(**(TOKEN | {"method__temperature": 1.0, "method__targets": "soft"}))

    (experiment,) = experiments(runs)

    assert labels(experiment) == [
        "token hard, alpha 0.5",
        "token hard + 1·block kl, alpha 0.5",
        "token hard + 1·head mse, alpha 0.5",
        "token soft, alpha 0.5",
        "token soft + 1·block kl, alpha 0.5",
        "token soft + 1·head mse, alpha 0.5",
        "token soft, alpha 0.5, method.temperature=1",
        "token hard, alpha 0.5, teacher=ResNet",
    ]


def test_several_methods_at_once_are_named_by_their_parts(runs):
    maps = {"method": "Together", "method__parts": ["attention", "logit"], "alpha": 0.5}
    logits = {"method": "Together", "method__parts": ["logit", "dkd"], "alpha": 0.5}
    runs.arm({0: 0.9}, **maps, method__weights=None)
    runs.arm({0: 0.9}, **maps, method__weights=[1.0, 0.5], loss="mse")
    runs.arm({0: 0.9}, **maps, method__weights=[1.0, 0.5], method__logit__temperature=2.0)
    runs.arm({0: 0.9}, **maps, method__weights=[1.0, 0.5], method__logit__temperature=4.0)
    runs.arm({0: 0.9}, **logits, method__weights=[1.0, 0.1])
    runs.arm({0: 0.9}, method="logit", alpha=0.5)
    relation = logits | {"method__parts": ["relation", "logit"]}
    runs.arm({0: 0.9}, **relation, method__weights=None, granularity="head")

    (experiment,) = experiments(runs)

    assert sorted(labels(experiment)) == [
        "1·block kl + 0.5·logit, alpha 0.5, method.logit.temperature=2",
        "1·block kl + 0.5·logit, alpha 0.5, method.logit.temperature=4",
        "1·block kl + 1·logit, alpha 0.5",
        "1·block mse + 0.5·logit, alpha 0.5",
        "1·head relation + 1·logit, alpha 0.5",
        "1·logit + 0.1·dkd, alpha 0.5",
        "logit, alpha 0.5",
    ]


def test_a_plain_student_is_no_baseline_of_one_with_a_distillation_token(runs):
    """As `-m method=token,none` makes them."""
    runs.arm({0: 0.9, 1: 0.9}, **TOKEN)
    runs.arm({0: 0.8, 1: 0.8}, method="none")

    plain, with_token = sorted(map(compare, experiments(runs)), key=lambda each: each.experiment.title)

    assert with_token.experiment.title == "digits, student.distillation_token=true"
    assert with_token.rows[0].verdict.outcome == Outcome.NOT_COMPARABLE
    assert with_token.headline == (
        "No run of the student alone (method=none student.distillation_token=true, or alpha=1):"
        " gains cannot be computed."
    )
    assert plain.headline == "Only the student alone: nothing to compare."


MERGED = {"student___target_": "vitkd.models.MergedConfig", "student__runs": ["a", "b"]}


def test_students_merged_are_called_so_and_are_no_baseline(runs):
    """As experiment=method/subspace_merged makes them, and those that learn from a teacher as well."""
    for trains in ("all", "head"):
        runs.arm({0: 0.9, 1: 0.9, 2: 0.9}, **MERGED, student__trains=trains, method="none", alpha=0.5)
    runs.arm({0: 0.91, 1: 0.92, 2: 0.93}, **MERGED, student__trains="all", method="logit", alpha=0.5)
    runs.arm({0: 0.91}, **MERGED, student__trains="all", method="logit", alpha=1.0)
    runs.arm({0: 0.8, 1: 0.8, 2: 0.8}, method="none")

    found = experiments(runs)

    merged = [each for each in found if each.is_merged]
    assert sorted(map(labels, merged)) == [
        ["students merged"],
        ["students merged", "students merged, logit, alpha 0.5", "students merged, logit, alpha 1"],
    ]
    for experiment in merged:
        compared = compare(experiment)
        assert experiment.baseline is None
        assert not experiment.alone
        assert all(row.gain is None for row in compared.rows)
        assert compared.headline.startswith("Students merged: ")
        assert missing_runs(experiment) == {}
    (plain,) = (each for each in found if not each.is_merged)
    assert labels(plain) == ["student alone"]


@pytest.mark.parametrize(
    "alone", [{"method": "none", "student__distillation_token": True}, TOKEN | {"alpha": 1.0}]
)
def test_the_same_student_alone_is_the_baseline(runs, alone):
    runs.arm({0: 0.9, 1: 0.91, 2: 0.92}, **TOKEN)
    runs.arm({0: 0.8, 1: 0.82, 2: 0.81}, **alone)

    (experiment,) = experiments(runs)

    assert labels(experiment) == ["student alone", "token hard, alpha 0.5"]
    # 10, 9 and 11 points.
    assert compare(experiment).rows[1].gain.difference.mean == pytest.approx(10)


def test_teachers_of_another_architecture_are_never_mixed(runs):
    runs.arm({0: 0.9, 1: 0.9}, method="logit", alpha=0.5)
    for seed in (0, 1):
        with_resnet(runs, method="logit", alpha=0.5, seed=seed)
    path = with_resnet(runs, method="logit", alpha=0.5)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["teacher"]["variant"] = "resnet34"
    (path / "config.yaml").write_text(yaml.safe_dump(config))

    (experiment,) = experiments(runs)

    assert [(arm.label, [*arm.runs]) for arm in experiment.rows] == [
        ("logit, alpha 0.5", [0, 1]),
        ("logit, alpha 0.5, teacher=ResNet, teacher.variant=resnet18", [0, 1]),
        ("logit, alpha 0.5, teacher=ResNet, teacher.variant=resnet34", [0]),
    ]


def test_a_title_names_another_students_class_and_not_what_it_lacks(runs):
    runs.add(method="none")
    runs.add(method="none", student__depth=9)
    with_resnet(runs, "student", method="none")

    depth = yaml.safe_load((runs.add("again", method="none") / "config.yaml").read_text())["student"]["depth"]
    assert sorted(experiment.title for experiment in experiments(runs)) == [
        f"digits, student.depth={depth}",
        "digits, student.depth=9",
        "digits, student=ResNet",
    ]


@pytest.mark.parametrize(("method", "label"), [("CopyDistillation", "block copy"), ("Regions", "regions")])
def test_what_labels_teach_beside_a_teacher_is_never_the_student_alone(runs, method, label):
    runs.add(method="none")
    runs.add(method=method, alpha=1.0)

    (experiment,) = experiments(runs)

    assert labels(experiment)[0] == "student alone"
    assert labels(experiment)[1].startswith(label)
