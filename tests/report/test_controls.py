"""Attention against its controls: compared directly, not by their gains over the student alone."""

import json

import pytest
from scipy import stats

from vitkd.report.comparison import Comparison, compare, control_name
from vitkd.report.experiments import find_experiments
from vitkd.report.notes import CONTROLS_HEADING
from vitkd.report.runs import find_runs
from vitkd.report.verdicts import Outcome

ALONE = [90.0, 91.0, 89.5, 90.5, 92.0]
WILD = [3.0, -2.0, 2.5, -1.5, 2.0]
JITTER = [0.1, -0.1, 0.0, 0.1, -0.1]


def plant(runs, attention: list[float], control: list[float]) -> Comparison:
    """Both arms as gains over the student alone, in percentage points, one a seed."""
    for gains, settings in (
        (None, {"method": "none"}),
        (attention, {"alpha": 0.5}),
        (control, {"alpha": 0.5, "method__control": "shuffled"}),
    ):
        shares = [(alone + gain) / 100 for alone, gain in zip(ALONE, gains or [0.0] * 5, strict=True)]
        runs.arm(dict(enumerate(shares)), **settings)
    return comparison(runs)


def comparison(runs) -> Comparison:
    (experiment,) = find_experiments(find_runs([runs.outputs]))
    return compare(experiment)


def pairs(result: Comparison) -> list[tuple[str, str]]:
    return [(each.arm.label, control_name(each.control, each.arm)) for each in result.contrasts]


def test_one_real_gain_and_one_without_evidence_make_no_difference(runs):
    result = plant(runs, [1 + jitter for jitter in JITTER], WILD)

    assert [row.verdict.outcome for row in result.rows] == [
        Outcome.BASELINE,
        Outcome.REAL,
        Outcome.NO_EVIDENCE,
    ]
    (contrast,) = result.contrasts
    assert contrast.verdict.outcome == Outcome.NO_EVIDENCE
    assert "this gap needs" in contrast.verdict.text
    assert contrast.needed > 5


def test_two_arms_without_evidence_may_differ(runs):
    attention = [wild + 0.5 + jitter for wild, jitter in zip(WILD, JITTER, strict=True)]

    result = plant(runs, attention, [wild - 0.5 for wild in WILD])

    assert [row.verdict.outcome for row in result.rows] == [
        Outcome.BASELINE,
        Outcome.NO_EVIDENCE,
        Outcome.NO_EVIDENCE,
    ]
    (contrast,) = result.contrasts
    # Differences 1.1, 0.9, 1, 1.1, 0.9: standard deviation 0.1, over √5, times t(4) = 2.776445.
    assert contrast.verdict == (Outcome.REAL, "real gain")
    ends = 1 - 2.776445 * 0.1 / 5**0.5, 1 + 2.776445 * 0.1 / 5**0.5
    assert contrast.gain.difference.interval == pytest.approx(ends)
    assert contrast.gain.p == pytest.approx(stats.ttest_1samp([1.1, 0.9, 1.0, 1.1, 0.9], 0).pvalue)


def test_a_control_that_does_better_is_called_so(runs):
    (contrast,) = plant(
        runs, WILD, [wild + 1 + jitter for wild, jitter in zip(WILD, JITTER, strict=True)]
    ).contrasts

    assert contrast.verdict == (Outcome.HURTS, "hurts")
    assert contrast.gain.difference.mean == pytest.approx(-1)


def test_contrasts_are_corrected_among_themselves(runs):
    before = plant(runs, [1 + jitter for jitter in JITTER], WILD)
    runs.arm({seed: (alone - 5) / 100 for seed, alone in enumerate(ALONE)}, alpha=0.5, method="logit")
    for alpha in (0.1, 0.2, 0.3):
        runs.arm({seed: 0.9 + 0.01 * seed for seed in range(5)}, alpha=alpha)

    after = comparison(runs)

    assert before.contrasts[0].p_holm == before.contrasts[0].gain.p
    assert len(after.contrasts) == 2
    smallest = min(contrast.gain.p for contrast in after.contrasts)
    assert min(contrast.p_holm for contrast in after.contrasts) == pytest.approx(2 * smallest)


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_seeds_are_never_a_winner(runs, seeds):
    runs.arm(dict.fromkeys(range(5), 0.5), alpha=0.5, method__control="uniform")
    runs.arm({seed: 0.9 + 0.0001 * seed for seed in range(seeds)}, alpha=0.5)

    (contrast,) = comparison(runs).contrasts

    assert contrast.verdict.outcome == Outcome.TOO_FEW
    assert contrast.gain.difference.n == seeds


def test_a_control_is_the_same_training_but_for_what_is_taught(runs):
    runs.add(alpha=0.5)
    runs.add(alpha=0.1)
    runs.add(alpha=0.5, method__control="shuffled")
    runs.add(alpha=0.5, method__control="of a later version")
    runs.add(alpha=0.5, teacher__trained=False)
    runs.add(alpha=0.5, method="logit", granularity="head", loss="mse")
    # Controls of no arm here:
    runs.add(alpha=0.3, method__control="shuffled")
    runs.add(alpha=0.5, method__control="shuffled", loss="mse")
    runs.add(alpha=0.5, method__control="shuffled", loss__temperature=2.0)
    runs.add(alpha=0.5, method__control="shuffled", granularity="head")
    runs.add(alpha=0.5, method__control="shuffled", teacher__seed=7)
    runs.add(alpha=0.5, method__control="shuffled", method__resize="bilinear")
    runs.add(alpha=0.5, method__control="shuffled", seed=1, granularity__head_map="matched")
    runs.add(alpha=0.3, method="logit", granularity="head", loss="mse")
    weighting = {"weighting___target_": "vitkd.methods.weighting.WSLD"}
    runs.add(alpha=0.5, method__control="shuffled", **weighting)
    runs.add(alpha=0.5, method="logit", **weighting)

    control_pairs = pairs(comparison(runs))

    assert {plain for plain, _ in control_pairs} == {"block kl, alpha 0.5"}
    assert sorted(control for _, control in control_pairs) == [
        *("logit", "method.control=of a later version", "method.control=shuffled", "teacher.trained=false"),
    ]


def test_a_distillation_token_that_learns_maps_too_controls_nothing(runs):
    student = {"student__distillation_token": True, "alpha": 0.5}
    token = {"method": "TokenDistillation", "method__targets": "hard"}
    runs.add(**student)
    runs.add(**student, **token, method__attention_weight=0.0)
    runs.add(**student, **token, method__attention_weight=1.0)

    assert pairs(comparison(runs)) == [("block kl, alpha 0.5", "token hard")]


def test_an_untrained_teacher_may_be_another_for_every_seed(runs):
    for seed in range(3):
        runs.add(seed=seed, alpha=0.5, teacher__checkpoint="/a/run", teacher__seed=4)
        runs.add(seed=seed, alpha=0.5, teacher__trained=False, teacher__seed=seed)

    (contrast,) = comparison(runs).contrasts

    assert contrast.gain.seeds == (0, 1, 2)
    assert not contrast.control.first.settings["teacher.trained"]


def test_a_trained_teacher_for_every_seed_is_compared_with_the_same_one(runs):
    for seed in range(3):
        runs.add(seed=seed, alpha=0.5, teacher__seed=seed)
        runs.add(seed=seed, alpha=0.5, teacher__seed=seed, method__control="shuffled")
        runs.add(seed=seed, alpha=0.5, teacher__seed=0, method__control="uniform")

    assert [control for _, control in pairs(comparison(runs))] == ["method.control=shuffled"]


def test_without_a_student_alone_controls_are_compared_all_the_same(runs):
    runs.arm({seed: 0.9 + 0.001 * (seed % 2) for seed in range(4)}, alpha=0.5)
    runs.arm(dict.fromkeys(range(4), 0.85), alpha=0.5, method__control="uniform")

    (contrast,) = comparison(runs).contrasts

    assert contrast.verdict.outcome == Outcome.REAL


def test_the_question_is_answered_in_every_file(runs, report):
    (contrast,) = plant(runs, [1 + jitter for jitter in JITTER], WILD).contrasts

    printed = report(runs.outputs)

    out = runs.outputs / "report"
    page, markdown = ((out / name).read_text("utf-8") for name in ("report.html", "report.md"))
    for text in (printed, markdown, page.replace("&#39;", "'")):
        assert CONTROLS_HEADING in text
        assert contrast.verdict.text in text.replace("\\", "")
    (control,) = json.loads((out / "report.json").read_text("utf-8"))["experiments"][0]["controls"]
    assert control["difference_mean_pp"] == pytest.approx(contrast.gain.difference.mean)
    assert (control["verdict"], control["p"], control["paired_with_seeds"]) == (
        *("no evidence", contrast.gain.p),
        [0, 1, 2, 3, 4],
    )


def test_without_controls_the_question_is_left_out(runs, report):
    runs.arm({0: 0.9, 1: 0.91}, method="none")
    runs.arm({0: 0.9, 1: 0.91}, alpha=0.5)

    printed = report(runs.outputs)

    files = [path.read_text("utf-8") for path in (runs.outputs / "report").iterdir()]
    assert not any(CONTROLS_HEADING in text.replace("&#39;", "'") for text in [printed, *files])
