"""The page in a real browser: every control does what it says, without a complaint or a request."""

import re
import shutil
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

from tests.explain.test_page import page_of, png_of, with_a_teacher_without_maps, without_teacher
from vitkd.explain.gallery.contents import Table
from vitkd.explain.gallery.figures import upsample
from vitkd.explain.gallery.render import region_colours, render

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page's test drives a browser by playwright"
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")

VIRIDIS = matplotlib.colormaps["viridis"]
WIDTHS = {"phone": {"width": 390, "height": 844}, "desk": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def tab():
    """One for all tests: to start another takes longer than most of them."""
    with playwright.sync_playwright() as driver:
        # A container's root has no user namespaces to make a sandbox of.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(5000)
        yield tab
        browser.close()


@pytest.fixture
def show(tab, tmp_path):
    """Opens a page from a file; at the test's end there must have been no complaint and no request."""
    complaints = []
    listeners = {
        "console": lambda said: complaints.append(f"{said.type}: {said.text}"),
        "pageerror": lambda error: complaints.append(str(error)),
        "request": lambda request: complaints.extend(outside(request.url)),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)

    def open_page(page, width="desk", scheme="light"):
        file = tmp_path / "gallery.html"
        file.write_text(render(page), encoding="utf-8")
        tab.set_viewport_size(WIDTHS[width])
        tab.emulate_media(color_scheme=scheme)
        tab.goto(file.as_uri())
        tab.locator(".card").first.scroll_into_view_if_needed()
        tab.locator(".card .answer").first.wait_for(state="attached")
        return tab

    yield open_page
    # What the page says in its last frame is still to be heard.
    tab.evaluate("new Promise(requestAnimationFrame)")
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert complaints == []


def outside(url):
    return [] if url.startswith(("file:", "data:", "blob:")) else [f"asks for {url}"]


def shown(tab):
    """The numbers of the images whose cards can be seen."""
    return [
        int(index)
        for index in tab.locator(".card:visible").evaluate_all("all => all.map(c => c.dataset.index)")
    ]


def expected(page, keep):
    return [index for i, index in enumerate(page.numbers) if keep(i)]


def pixels(tab, index, subject, within=".card"):
    """What is painted on a subject's map of a card, [h, w, 3]."""
    where = f'.card[data-index="{index}"]' if within == ".card" else within
    tab.locator(where).scroll_into_view_if_needed()
    # Cards are painted with the next frame.
    tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return painted(tab.locator(f'{where} canvas[data-subject="{subject}"]'))


def painted(canvas):
    """A canvas's pixels, [h, w, 3]."""
    height, width, values = canvas.evaluate(
        "c => [c.height, c.width, c.getContext('2d').getImageData(0, 0, c.width, c.height).data.join(' ')]"
    )
    return np.array(values.split(), int).reshape(height, width, 4)[..., :3]


def coloured(maps, low, high):
    return VIRIDIS((np.asarray(maps) - low) / (high - low))[..., :3] * 255


def choose(tab, **choices):
    for name, value in choices.items():
        tab.select_option(f"#{name}", value)


def style(element, name):
    return element.evaluate("(element, name) => getComputedStyle(element)[name]", name)


def assert_close(painted, wanted, tolerance=3):
    assert painted.shape == wanted.shape
    assert np.abs(painted - wanted).max() <= tolerance


def test_every_filter(show):
    page = page_of(24)
    tab = show(page)
    assert shown(tab) == page.numbers
    assert tab.text_content("#count") == "24 of 24 images"

    for cell in ("both right", "student wrong", "teacher wrong", "both wrong"):
        tab.click(f'button[data-cell="{cell}"]')
        wanted = expected(page, lambda i, cell=cell: page.cells[i] == cell)
        assert shown(tab) == wanted
        assert tab.text_content("#count") == f"{len(wanted)} of 24 images"
        assert tab.get_attribute(f'button[data-cell="{cell}"]', "aria-pressed") == "true"
        assert tab.input_value("#cell") == cell
    tab.click('button[data-cell="both wrong"]')
    assert shown(tab) == page.numbers

    choose(tab, **{"cell": "student wrong", "class": "1"})
    assert shown(tab) == expected(page, lambda i: page.cells[i] == "student wrong" and page.labels[i] == 1)
    choose(tab, cell="")
    assert shown(tab) == expected(page, lambda i: page.labels[i] == 1)
    choose(tab, **{"class": ""})

    for typed in ("1", "#17", "171"):
        tab.fill("#search", typed)
        assert shown(tab) == expected(
            page, lambda i, typed=typed: str(page.numbers[i]).startswith(typed.strip("#"))
        )


def test_nothing_matches_and_the_page_says_so(show):
    page = page_of(cells=["both right"] * 8)
    tab = show(page)
    tab.click('button[data-cell="both wrong"]')
    tab.fill("#search", "77")
    assert shown(tab) == []
    assert tab.text_content("#why") == (
        "Nothing matches: of the 8 images in this gallery none is in the cell “both wrong”, with a number "
        "that begins with “77”. The whole test set has 5 images in that cell."
    )
    tab.click("#clear")
    assert shown(tab) == page.numbers
    assert not tab.is_visible("#nothing")


def test_maps_are_painted_in_the_colours_of_their_values(show):
    page = page_of(40)
    teacher, student = (subject.maps["attention"] for subject in page.subjects)
    tab = show(page)
    tab.uncheck("#smooth")
    # At first: the last block of the teacher, the student's block 0, heads averaged, one scale an image.
    maps = [teacher[1, 2].mean(0), student[1, 0].mean(0)]
    for subject in range(2):
        assert_close(pixels(tab, 17, subject), coloured(maps[subject], 0, max(each.max() for each in maps)))

    tab.select_option('[data-block="0"]', "1")
    tab.select_option('[data-head="0"]', "1")
    tab.select_option('[data-block="1"]', "1")
    for head, of_heads in {
        "2": lambda maps: maps[2],
        "max": lambda maps: maps.max(0),
        "min": lambda maps: maps.min(0),
    }.items():
        tab.select_option('[data-head="1"]', head)
        maps = [teacher[1, 1, 1], of_heads(student[1, 1])]
        for subject in range(2):
            assert_close(
                pixels(tab, 17, subject), coloured(maps[subject], 0, max(each.max() for each in maps))
            )

    choose(tab, scale="page")
    # Over all images, and cut where one patch in two hundred exceeds it.
    every = np.concatenate([teacher[:, 1, 1].ravel(), student[:, 1].min(1).ravel()])
    highest = np.quantile(every, 0.995, method="higher")
    assert_close(pixels(tab, 17, 0), coloured(maps[0], 0, highest))
    assert_close(pixels(tab, 17, 1), coloured(maps[1], 0, highest))
    assert tab.locator('.card[data-index="17"] .bar').inner_text().split("≥")[1].strip() == f"{highest:.2g}"
    choose(tab, scale="map")
    assert_close(pixels(tab, 17, 1), coloured(maps[1], 0, maps[1].max()))
    assert tab.locator('.card[data-index="17"] .bar').count() == 2


def test_every_method(show):
    page = page_of()
    tab = show(page)
    tab.uncheck("#smooth")
    choose(tab, method="relevance")
    maps = [subject.maps["relevance"][2] for subject in page.subjects]
    assert_close(pixels(tab, 24, 1), coloured(maps[1], 0, max(each.max() for each in maps)))
    assert "relevance, arbitrary units" in tab.text_content("#shown")
    assert tab.locator('.card[data-index="24"] .unit').text_content() == "relevance, arbitrary units"
    assert not tab.is_visible('[data-block="0"]')

    # Below zero a scale begins at the lowest value, and the student, who has no such map, says so.
    choose(tab, method="signed_thing")
    signed = page.subjects[0].maps["signed_thing"][2]
    assert_close(pixels(tab, 24, 0), coloured(signed, signed.min(), signed.max()))
    assert tab.locator('.card[data-index="24"] .none').text_content() == "has no such map"
    assert tab.locator('.card[data-index="24"] .bar span').first.text_content().startswith("−")

    choose(tab, method="regions")
    colours = 255 * np.array(region_colours(3))
    assert_close(pixels(tab, 24, 0), colours[page.subjects[0].maps["regions"][2]], 1)
    assert_close(pixels(tab, 24, 1), colours[page.subjects[1].maps["regions"][2]], 1)
    assert tab.is_disabled("#smooth")


def test_smooth_maps_are_interpolated_as_in_the_figures(show):
    page = page_of()
    tab = show(page)
    maps = [
        page.subjects[0].maps["attention"][0, 2].mean(0),
        page.subjects[1].maps["attention"][0, 0].mean(0),
    ]
    highest = max(each.max() for each in maps)
    for subject, each in enumerate(maps):
        painted = pixels(tab, 10, subject)
        smooth = upsample(torch.from_numpy(each)[None], len(painted))[0].numpy()
        assert_close(painted, coloured(smooth, 0, highest))


def test_the_slider_goes_from_the_image_to_the_map(show):
    tab = show(page_of())
    card = tab.locator(".card").first
    for percent, opacity, grey in [(0, "0", "0"), (25, "0.25", "0.5"), (100, "1", "1")]:
        tab.locator("#overlay").fill(str(percent))
        assert style(card.locator("canvas").first, "opacity") == opacity
        assert style(card.locator(".ramp i").first, "opacity") == opacity
        assert style(card.locator(".under").first, "filter").startswith(f"grayscale({grey})")
        assert tab.text_content("#percent") == f"overlay {percent} %"
        assert tab.locator("dialog input.overlay").input_value() == str(percent)


def test_answers_are_marked_by_more_than_colour(show):
    page = page_of()
    tab = show(page)
    # Image 1: the teacher is right, the student is wrong.
    answers = tab.locator('.card[data-index="17"] .answer:not(.truth)')
    teacher, student = page.subjects
    assert answers.all_inner_texts() == [
        f"✓ seal\n{100 * teacher.confidence[1]:.0f} %",
        f"✗ oak_tree\n{100 * student.confidence[1]:.0f} %",
    ]
    assert [style(each, "color") for each in answers.all()] == ["rgb(26, 127, 55)", "rgb(198, 40, 40)"]


def test_a_card_enlarges_and_the_keyboard_moves_on(show):
    page = page_of()
    tab = show(page)
    choose(tab, **{"class": "1"})
    found = expected(page, lambda i: page.labels[i] == 1)
    opener = tab.get_by_role("button", name=f"Enlarge image {found[0]}, seal")
    opener.focus()
    tab.keyboard.press("Enter")
    title = tab.locator("#large-title")
    assert f"seal · #{found[0]}" in title.text_content()
    assert tab.is_disabled("#previous")
    tab.keyboard.press("ArrowRight")
    assert f"#{found[1]}" in title.text_content()
    tab.click("#next")
    assert tab.is_disabled("#next")
    tab.keyboard.press("ArrowRight")
    assert f"#{found[2]}" in title.text_content()
    tab.keyboard.press("ArrowLeft")
    assert f"#{found[1]}" in title.text_content()
    tab.keyboard.press("Escape")
    assert not tab.is_visible("dialog")
    assert opener.evaluate("b => b === document.activeElement")


def test_every_head_can_be_chosen_by_its_picture(show):
    page = page_of()
    teacher = page.subjects[0].maps["attention"]
    tab = show(page)
    tab.uncheck("#smooth")
    tab.click('.card[data-index="10"] .open')
    assert tab.locator("#heads button").count() == 3 * 2 + 2 * 3
    head = tab.get_by_role("button", name="teacher: block 1, head 0")
    head.click()
    assert head.get_attribute("aria-pressed") == "true"
    assert head.evaluate("b => b === document.activeElement")
    assert (tab.input_value('[data-block="0"]'), tab.input_value('[data-head="0"]')) == ("1", "0")
    highest = max(teacher[0, 1, 0].max(), page.subjects[1].maps["attention"][0, 0].mean(0).max())
    assert_close(pixels(tab, 10, 0, "#large-tiles"), coloured(teacher[0, 1, 0], 0, highest))

    # The value under the pointer: of the teacher's patch in the lower left corner.
    tab.locator('#large-tiles canvas[data-subject="0"]').scroll_into_view_if_needed()
    box = tab.locator('#large-tiles canvas[data-subject="0"]').bounding_box()
    tab.mouse.move(box["x"] + 0.01 * box["width"], box["y"] + 0.99 * box["height"])
    said = re.search(
        r"teacher (\S+) \(patch 3, 0\) · student \S+ \(patch 1, 0\)", tab.text_content("#readout")
    )
    assert float(said[1]) == pytest.approx(teacher[0, 1, 0, 3, 0], rel=0.01)
    head.click()
    assert tab.input_value('[data-head="0"]') == "mean"
    tab.click("#close")
    assert not tab.is_visible("dialog")


def test_every_method_can_be_seen_at_once_and_chosen_by_its_picture(show):
    page = page_of()
    teacher, student = page.subjects
    tab = show(page)
    tab.uncheck("#smooth")
    tab.click('.card[data-index="17"] .open')
    # The student has no such map as the teacher's third.
    assert tab.locator("#methods th[scope=row]").all_inner_texts() == [
        *("attention", "class relevance (Chefer)", "signed thing", "attention regions")
    ]
    assert tab.locator("#methods button").count() == 4 + 3
    small = tab.get_by_role("button", name="student: class relevance (Chefer)")
    relevance = student.maps["relevance"][1]
    assert_close(painted(small.locator("canvas")), coloured(relevance, 0, relevance.max()))

    small.click()

    assert tab.input_value("#method") == "relevance"
    assert small.get_attribute("aria-pressed") == "true"
    assert small.evaluate("b => b === document.activeElement")
    highest = max(relevance.max(), teacher.maps["relevance"][1].max())
    assert_close(pixels(tab, 17, 1, "#large-tiles"), coloured(relevance, 0, highest))
    regions = tab.locator('#methods [data-method="0,regions"] canvas')
    assert (style(regions, "imageRendering"), regions.evaluate("c => c.width")) == ("pixelated", 4)


def test_one_method_needs_no_choice(show):
    page = page_of()
    subjects = [replace(each, maps={"attention": each.maps["attention"]}) for each in page.subjects]
    tab = show(replace(page, subjects=subjects))
    tab.locator(".open").first.click()
    assert tab.locator("#methods button").count() == 0


def test_a_patch_can_be_asked_what_it_attends_to(show):
    page = page_of()
    teacher, student = page.subjects
    tab = show(page)
    tab.uncheck("#smooth")
    tab.click('.card[data-index="17"] .open')
    assert tab.locator("#query option").count() == 1 + 16
    assert tab.input_value("#query") == ""

    # Row 2, column 1 of the teacher's 4×4 patches; of the student's 2×2 that is row 1, column 0.
    tab.select_option("#query", "2,1")
    maps = [teacher.patches[1, 2, :, 9].mean(0), student.patches[1, 0, 0, 2]]
    highest = max(each.max() for each in maps)
    for subject, each in enumerate(maps):
        assert_close(pixels(tab, 17, subject, "#large-tiles"), coloured(each, 0, highest))
    assert tab.locator("#large-tiles .unit").text_content() == "attention weight given by that patch"
    assert tab.text_content("#readout") == (
        "Colours: attention weight given by the patch in row 2, column 1; heads averaged (student)."
    )
    frame = tab.locator("#large-tiles .frame").first.bounding_box()
    mark = tab.locator("#large-tiles .here").first.bounding_box()
    assert mark["x"] - frame["x"] == pytest.approx(frame["width"] / 4, abs=1)
    assert mark["y"] - frame["y"] == pytest.approx(frame["height"] / 2, abs=1)
    assert mark["width"] == pytest.approx(frame["width"] / 4, abs=1)
    # On the student's tile it is the student's patch.
    map_box = tab.locator('#large-tiles canvas[data-subject="1"]').bounding_box()
    mark = tab.locator("#large-tiles .here").last.bounding_box()
    assert mark["width"] == pytest.approx(map_box["width"] / 2, abs=1)
    assert mark["y"] - map_box["y"] == pytest.approx(map_box["height"] / 2, abs=1)
    # The card behind shows what the classifier reads, as ever.
    assert tab.locator('.card[data-index="17"] .here').first.is_hidden()

    tab.get_by_role("button", name="teacher: block 0, head 1").click()
    tab.get_by_role("button", name="student: block 1, mean of heads").click()
    maps = [teacher.patches[1, 0, 1, 9], student.patches[1, 1, 0, 2]]
    highest = max(each.max() for each in maps)
    for subject, each in enumerate(maps):
        assert_close(pixels(tab, 17, subject, "#large-tiles"), coloured(each, 0, highest))

    # Of the student's heads there is the mean alone, and one scale for all images would be another thing's.
    tab.click("#close")
    tab.select_option('[data-head="1"]', "2")
    choose(tab, scale="page")
    tab.click('.card[data-index="17"] .open')
    tab.select_option("#query", "2,1")
    for subject, each in enumerate(maps):
        assert_close(pixels(tab, 17, subject, "#large-tiles"), coloured(each, 0, highest))


def test_the_arrows_choose_a_patch_and_no_other_image(show):
    page = page_of()
    tab = show(page)
    tab.click('.card[data-index="10"] .open')
    tab.focus("#query")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    assert tab.input_value("#query") != ""
    assert "#10" in tab.text_content("#large-title")


def test_maps_that_share_most_of_their_value_show_where_they_differ(show):
    page = page_of()
    relevance = [1 + subject.maps["relevance"] / 1000 for subject in page.subjects]
    tab = show(
        replace(
            page,
            subjects=[
                replace(subject, maps={**subject.maps, "relevance": maps})
                for subject, maps in zip(page.subjects, relevance, strict=True)
            ],
        )
    )
    tab.uncheck("#smooth")
    choose(tab, method="relevance", scale="map")

    maps = relevance[1][2]
    assert_close(pixels(tab, 24, 1), coloured(maps, maps.min(), maps.max()))
    first, last = tab.locator('.card[data-index="24"] .bar').last.locator("span:not(.ramp)").all_inner_texts()
    assert float(first) < float(last)


def test_blocks_with_fewer_heads_offer_those_alone(show):
    """As Swin's stages have: the mean is over a block's own heads, and no other can be chosen."""
    page = page_of()
    teacher, student = page.subjects
    attention = student.maps["attention"].copy()
    attention[:, 0, 1:] = 0
    counts = [1, attention.shape[2]]
    fewer = replace(student, maps={**student.maps, "attention": attention}, heads=counts, patches=None)
    tab = show(replace(page, subjects=[teacher, fewer]))
    tab.uncheck("#smooth")
    tab.select_option('[data-block="1"]', "1")
    tab.select_option('[data-head="1"]', "1")
    tab.select_option('[data-block="1"]', "0")
    choose(tab, scale="map")

    assert tab.input_value('[data-head="1"]') == "mean"
    offered = tab.locator('[data-head="1"] option:not([disabled])').all_inner_texts()
    assert offered == ["mean", "highest", "lowest", "0"]
    only = attention[2, 0, 0]
    assert_close(pixels(tab, 24, 1), coloured(only, 0, only.max()))
    tab.click('.card[data-index="24"] .open')
    rows = tab.locator("#heads table").nth(1).locator("tbody tr")
    assert [rows.nth(block).locator("button").count() for block in range(2)] == counts


def test_who_cannot_be_asked_shows_nothing_else_instead(show):
    page = page_of()
    teacher, student = page.subjects
    tab = show(replace(page, subjects=[teacher, replace(student, patches=None)]))
    tab.click('.card[data-index="10"] .open')
    assert tab.locator("#heads table").count() == 2
    tab.select_option("#query", "0,0")
    assert tab.locator("#large-tiles .none").all_inner_texts() == ["its patches’ attention is not kept here"]
    assert tab.locator("#heads caption").all_inner_texts()[0].startswith("teacher:")
    assert tab.locator("#heads table").count() == 1


def test_a_patch_is_chosen_by_pointing_at_the_image(show):
    page = page_of()
    teacher = page.subjects[0]
    tab = show(page)
    tab.uncheck("#smooth")
    tab.click('.card[data-index="10"] .open')
    image = tab.locator("#large-tiles .frame").first
    box = image.bounding_box()
    corner = {"x": 0.99 * box["width"], "y": 0.01 * box["height"]}
    image.click(position=corner)
    assert tab.input_value("#query") == "0,3"
    map_box = tab.locator('#large-tiles canvas[data-subject="0"]').bounding_box()
    tab.mouse.move(map_box["x"] + 0.2 * map_box["width"], map_box["y"] + 0.2 * map_box["height"])
    said = re.search(r"teacher (\S+) \(patch 0, 0\)", tab.text_content("#readout"))
    assert float(said[1]) == pytest.approx(teacher.patches[0, 2, :, 3, 0, 0].mean(), rel=0.01)
    image.click(position=corner)
    assert tab.input_value("#query") == ""

    # Other methods have no such rows, and a closed image leaves no choice behind.
    tab.select_option("#query", "1,1")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Escape")
    tab.click('.card[data-index="10"] .open')
    assert tab.input_value("#query") == ""
    tab.click("#close")
    choose(tab, method="relevance")
    tab.click('.card[data-index="10"] .open')
    assert tab.is_hidden("#query")
    tab.locator("#large-tiles .frame").first.click()
    assert tab.locator("#large-tiles .unit").text_content() == "relevance, arbitrary units"


def test_only_cards_near_the_window_are_drawn(show):
    tab = show(page_of(200))
    assert len(shown(tab)) == 30
    assert tab.text_content("#count") == "200 of 200 images, the first 30 below"
    tab.click("#more-some")
    assert len(shown(tab)) == 60
    tab.click("#more-all")
    assert len(shown(tab)) == 200
    tab.locator("canvas").first.wait_for()
    assert 0 < tab.locator(".card canvas").count() < 200
    last = tab.locator(".card").last
    last.scroll_into_view_if_needed()
    last.locator("canvas").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(show, width, scheme):
    long = "a_class_with_a_name_that_will_not_end_" * 2
    columns = [f"a column with number {i}" for i in range(20)]
    page = page_of(
        class_names=[long, "seal", "bed"],
        tables=[Table(long, long, columns, [[0.5] * 20])],
        figure_1=png_of(3000, 100),
        source=long,
    )
    third = replace(page.subjects[1], name=f"student {long}")
    tab = show(replace(page, subjects=[*page.subjects, third]), width, scheme)
    assert overflow(tab) <= 0
    tab.locator(".open").first.click()
    assert overflow(tab) <= 0
    assert tab.locator("dialog").evaluate("d => d.scrollWidth - d.clientWidth") <= 0
    assert style(tab.locator("body"), "backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)"
    )


def overflow(tab):
    return tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_every_control_has_a_name(show):
    tab = show(page_of())
    tab.locator(".open").first.click()
    nameless = tab.locator("button, select, input").evaluate_all(
        """all => all.filter((control) => {
            const text = control.matches("button") ? control.textContent : control.labels[0]?.textContent;
            return !(control.ariaLabel || text?.trim());
        }).map((control) => control.outerHTML)"""
    )
    assert nameless == []


def test_a_student_without_a_teacher(show):
    page = without_teacher(page_of())
    tab = show(page)
    predicted = page.subjects[0].predicted
    choose(tab, answer="right")
    assert shown(tab) == expected(page, lambda i: predicted[i] == page.labels[i])
    choose(tab, answer="wrong")
    assert shown(tab) == expected(page, lambda i: predicted[i] != page.labels[i])


def test_a_teacher_without_maps_answers_beside_its_students_maps(show):
    page = with_a_teacher_without_maps(page_of())
    tab = show(page)

    card = tab.locator(f'.card[data-index="{page.numbers[0]}"]')
    assert card.locator(".none").all_inner_texts() == ["has no such map"]
    assert card.locator("canvas").count() == 1
    for subject, said in zip(
        page.subjects, card.locator(".answer:not(.truth)").all_inner_texts(), strict=True
    ):
        assert page.class_names[subject.predicted[0]] in said
    tab.locator('[data-cell="teacher wrong"]').click()
    assert shown(tab) == expected(page, lambda i: page.cells[i] == "teacher wrong")
    choose(tab, method="relevance")
    tab.locator(".open:visible").first.click()
    assert tab.locator("#large-tiles canvas").count() == 1


def test_an_image_of_unknown_class_gets_no_mark(show):
    tab = show(replace(without_teacher(page_of(1)), labels=[-1]))
    answer = tab.locator(".card .answer:not(.truth)").inner_text()
    assert not set("✓✗") & set(answer)
    assert tab.locator(".card .open").inner_text().startswith("unknown")


def test_names_are_text_whatever_they_say(show):
    evil = "</script><img src=x onerror=alert(1)>"
    page = page_of(class_names=[evil, evil, evil])
    tab = show(replace(page, subjects=[replace(page.subjects[0], name=evil)]))
    assert evil in tab.locator(".card .open").first.inner_text()
    tab.locator(".open").first.click()
    assert evil in tab.text_content("#large-title")
