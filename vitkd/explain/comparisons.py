"""Which maps of each student are compared with which of the teacher, and what to know of that."""

from collections.abc import Mapping

from vitkd.explain.maps.recording import Layout, has_maps, own_layout
from vitkd.explain.maps.subjects import TEACHER
from vitkd.explain.measures.fidelity import MapPair
from vitkd.explain.measures.survey import Comparison
from vitkd.methods.maps.pairing import map_block
from vitkd.models import Model
from vitkd.runs.load import Run


def comparisons(runs: Mapping[str, Run]) -> tuple[dict[str, Comparison], list[str]]:
    """Student → its comparison, where there can be one; and notes on what is compared, or why it is not."""
    teacher = next((run.teacher for run in runs.values() if run.teacher is not None), None)
    if teacher is None or not has_maps(teacher):
        return {}, []
    found, notes = {}, []
    for name, run in runs.items():
        is_possible, remarks = how_compared(name, own_layout(run.student), own_layout(teacher))
        notes += remarks
        if is_possible:
            alone, remarks = _student_alone(name, runs)
            notes += remarks
            patch_size = run.student.config.image_size / own_layout(run.student).grid[0]
            found[name] = Comparison(TEACHER, *_pairs(run, teacher), patch_size, alone)
    return found, notes


def how_compared(name: str, ours: Layout, theirs: Layout) -> tuple[bool, list[str]]:
    """Whether maps of these layouts can be compared, and what `survey.comparable` does for that."""
    if ours.grid == theirs.grid:
        return True, _reductions(name, ours, theirs)
    mine, its = ("×".join(map(str, layout.grid)) for layout in (ours, theirs))
    grids = f"{name} has {mine} patches and the teacher {its}"
    if not theirs.sees_itself:
        # In resized maps a token's weight for itself could not be left out.
        return False, [f"{grids} of locality attention: their maps are shown, not compared."]
    resized = f"{grids}: the teacher's maps are resized to be compared."
    return True, [resized, *_reductions(name, ours, theirs)]


def _reductions(name: str, ours: Layout, theirs: Layout) -> list[str]:
    """What is averaged in, or left out of, maps that differ by design."""
    notes, left_out = [], []
    if ours.prefix == theirs.prefix > 1 and ours.grid == theirs.grid:
        notes.append(f"Class rows of {name} and teacher: the mean of class and distillation token.")
    elif ours.prefix == theirs.prefix > 1:
        left_out.append("distillation tokens, as resized maps keep the class token only")
    for has, lacks, mine, its in ((name, TEACHER, ours, theirs), (TEACHER, name, theirs, ours)):
        if mine.prefix > its.prefix:
            left_out.append(f"the distillation token of {has}, which {lacks} has not")
        if mine.sees_itself and not its.sees_itself:
            left_out.append(f"what tokens of {has} give to themselves, which those of {lacks} may not")
    if left_out:
        notes.append(f"Compared without {' and '.join(left_out)}; the rest of each row is scaled to sum 1.")
    return notes


def _student_alone(name: str, runs: Mapping[str, Run]) -> tuple[str | None, list[str]]:
    """The other run's student, if it learned without a teacher and is the same model: the baseline."""
    run = runs[name]
    alone = next((other for other in runs if other != name and runs[other].is_alone), None)
    if alone is None or run.is_alone:
        return None, []
    if runs[alone].student.config != run.student.config:
        return None, [f"{alone} is another model than {name}, so it is no baseline for its maps."]
    return alone, []


def _pairs(run: Run, teacher: Model) -> tuple[list[MapPair], list[bool]]:
    """Every student map beside the teacher maps that it learned from, or would have by the default order."""
    learnt = {
        (pair["student_block"], head): (pair["teacher_block"], tuple(heads))
        for pair in run.pairs
        for head, heads in zip(pair["student_heads"], pair["teacher_heads"], strict=True)
    }
    ours, theirs = run.student.attention, teacher.attention
    maps = [(block, head) for block, layout in enumerate(ours) for head in range(layout.heads)]
    pairs = []
    for block, head in maps:
        teacher_block = map_block(block, len(ours), len(theirs))
        default = (teacher_block, (head % theirs[teacher_block].heads,))
        pairs.append(MapPair(block, head, *learnt.get((block, head), default)))
    return pairs, [each in learnt for each in maps]
