"""The report in a real Chromium: quick, quiet, by keyboard, in both schemes, and nothing that a name can do to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from run_folders import HOSTILE, config_of, write_examples, write_run, write_sites

from pdlightning.figures import plot_mean_ci
from pdlightning.report.build import write_report
from pdlightning.report.palette import PALETTE

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a report can show, and hostile names."""
    import torch
    from safetensors.torch import save_file

    config = config_of()
    config["goal"] |= {
        "eval/ce_kl/ce_ci": {"min": 1.0, "max": 3.0}, "eval/ce_kl/ce_target": {"min": 1.0, "max": 3.0},
        "eval/ce_kl/kl_ci": {"max": 0},
        "eval/a_metric_with_a_long_name/of_a_part_whose_name_is_long_too": {"min": 0.999, "max": 1.001},
    }  # fmt: skip
    config["metric"]["slow"]["probe"] = {"_target_": "pdlightning.metrics.figures.SingleFeatureCIFigure"}
    folder = write_run(tmp_path_factory.mktemp("browser") / "run", config)
    summary = json.loads((folder / "summary.json").read_text())
    # The tile with the longest name, and as many as make tiles narrow.
    summary["metrics"] |= {"eval/ce_kl/ce_difference_stochastic": 0.25, "eval/loss/faithfulness": 1e-9}
    (folder / "summary.json").write_text(json.dumps(summary))
    write_sites(folder, {"h.0": 30, HOSTILE: 20})
    write_examples(folder, "needle", "·", "thread", HOSTILE)
    ci = np.eye(4, 6).tolist()
    panels = {"h.0": {"sites": {"h.0": 6}, "order": "identity", "columns": [5, 4, 3, 2, 1, 0], "ci": ci}}
    (folder / "figures" / "probe.json").write_text(json.dumps({"step": 1, "kind": "probe", "panels": panels}))
    order = {"step": 1, "kind": "weights", "order": {"h.0": [5, 4, 3, 2, 1, 0]}}
    (folder / "figures" / "weights.json").write_text(json.dumps(order))
    (folder / "decomposition").mkdir()
    V, U = torch.arange(24.0).reshape(4, 6) * 1e-3, torch.ones(6, 3)
    tensors = {"model.components.h/0.V": V, "model.components.h/0.U": U}
    save_file(tensors, folder / "decomposition" / "tensors.safetensors")
    plot_mean_ci({"h.0": torch.rand(8)}, "log").savefig(folder / "figures" / "mean_ci_log.png")
    write_report(folder)
    return folder


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a file; at the end there was no message of the console, no error, and no request for anything else."""
    contexts, heard = [], []

    def opened(path: Path, **settings: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1400, "height": 900}, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda request: heard.append(request.url) if asks_elsewhere(request.url, path) else None)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert heard == []


def asks_elsewhere(url: str, path: Path) -> bool:
    return not url.startswith("data:") and url.partition("#")[0] != path.as_uri()


def test_the_page_is_ready_at_once_and_asks_for_nothing(run_folder: Path, open_page: Open):
    timing = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
    took = [open_page(run_folder / "report.html").evaluate(timing) for _ in range(3)]
    assert min(took) < 1000, f"ready after {took} ms"


def test_a_name_that_is_markup_does_nothing(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#sites tbody th").all_inner_texts() == ["h.0", HOSTILE]
    page.locator("#spectrum svg").first.hover()
    assert HOSTILE in page.locator("#tip").inner_text()
    assert HOSTILE in page.locator("#example-list").inner_text()
    assert page.evaluate("window.hacked") is None


def test_a_curve_is_used_by_keyboard(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    chart = page.locator("[data-chart=curve-l0]")
    log, svg = chart.get_by_role("button", name="Logarithmic"), chart.locator("svg")
    ticks = svg.locator("text").all_inner_texts
    assert tab_to(page, log) and log.get_attribute("aria-pressed") == "true"
    before = ticks()
    page.keyboard.press("Enter")
    assert log.get_attribute("aria-pressed") == "false" and ticks() != before
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").inner_text().startswith("step 10")
    assert "training, now" in page.locator("#live").inner_text()
    page.keyboard.press("+")
    losses = page.locator("[data-chart=curve-loss]")
    assert losses.get_by_role("button", name="Reset zoom").is_visible(), "charts of steps zoom together"
    page.keyboard.press("Escape")
    assert not losses.get_by_role("button", name="Reset zoom").is_visible()
    curves = svg.locator("g path").count()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert chart.locator(".legend [aria-pressed=false]").count() == 1 and svg.locator("g path").count() == curves - 1


def tab_to(page: Any, control: Any) -> bool:
    for _ in range(60):
        page.keyboard.press("Tab")
        if control.evaluate("element => element === document.activeElement"):
            return True
    return False


def test_zooming_out_by_keyboard_leads_back_from_the_end_of_a_curve(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    chart = page.locator("[data-chart=curve-loss]")
    chart.locator("svg").focus()
    ticks, reset = chart.locator("text.across"), chart.get_by_role("button", name="Reset zoom")
    whole = ticks.all_text_contents()
    for key in ("End", "+", "+"):
        page.keyboard.press(key)
    assert reset.is_visible() and ticks.all_text_contents() != whole
    for key in ("-", "-"):
        page.keyboard.press(key)
    assert not reset.is_visible() and ticks.all_text_contents() == whole


def test_a_curve_is_seen_between_two_of_its_points(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    chart = page.locator("[data-chart=curve-loss]")
    chart.locator("svg").focus()
    for key in ("ArrowRight", *"++++++"):
        page.keyboard.press(key)
    shown = [float(word) for word in chart.locator("svg text[text-anchor=end]").all_text_contents()[:-1]]
    assert min(shown) > 0.9 and max(shown) < 1.1, "it falls from 1 at step 0 to 0.72 at step 10"


def test_goals_are_named_where_no_curve_runs_through_them(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    chart = page.locator("[data-chart=curve-CEandKL-ce]")
    goals, lines = chart.locator(".goals-of span"), chart.locator("svg line.goal")
    assert goals.all_inner_texts() == ["goal: target, ci ≥ 1 and ≤ 3"] and lines.count() == 2
    assert chart.locator("svg text", has_text="≤").count() == 0
    chart.locator(".legend button", has_text="target").click()
    assert goals.all_inner_texts() == ["goal: ci ≥ 1 and ≤ 3"]
    on_log = page.locator("[data-chart=curve-CEandKL-kl]")
    assert on_log.locator(".goals-of").inner_text() == "goal: ci ≤ 0 (not on a log scale)"
    assert on_log.locator("svg line.goal").count() == 0
    on_log.get_by_role("button", name="Logarithmic").click()
    assert on_log.locator(".goals-of").inner_text() == "goal: ci ≤ 0" and on_log.locator("svg line.goal").count() == 1
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(100)
        box, plot, legend = (chart.locator(part).bounding_box() for part in (".goals-of", "svg", ".legend"))
        assert plot["y"] + plot["height"] <= box["y"] and box["y"] + box["height"] <= legend["y"]
        assert box["x"] + box["width"] <= width


def test_a_spectrum_tells_a_screen_reader_what_is_in_use(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    said = page.locator("[data-chart=spectrum-mean_ci] svg").get_attribute("aria-label")
    assert "mean ci above 0.001: h.0 15 of 30" in said and "Last values" not in said
    assert "Last values: recon" in page.locator("[data-chart=curve-loss] svg").get_attribute("aria-label")


def test_dragging_across_a_curve_looks_closer_and_a_double_click_goes_back(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    svg = page.locator("[data-chart=curve-loss] svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 80, steps=4)
    page.mouse.up()
    reset = page.locator("[data-chart=curve-loss]").get_by_role("button", name="Reset zoom")
    assert reset.is_visible()
    svg.dblclick()
    assert not reset.is_visible()


def test_a_heat_map_says_the_value_under_the_pointer_and_zooms_by_keyboard(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    canvas = page.locator("[data-map=probe-0] > canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 1.5 / 6, box["y"] + box["height"] * 1.5 / 4)
    assert page.locator("#tip").inner_text().split("\n")[0].strip() == "1"
    assert "feature 1, subcomponent 4 (column 1)" in page.locator("#tip").inner_text()
    page.mouse.move(0, 0)
    canvas.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert "feature 1, subcomponent 4 (column 1)" in page.locator("#live").inner_text()
    above = canvas.bounding_box()["y"]
    page.keyboard.press("+")
    assert "shown: features 0 to 1, columns 0 to 2" in page.locator("[data-map=probe-0] .axes").inner_text()
    assert canvas.bounding_box()["y"] == above, "the button that now shows moves nothing"
    page.keyboard.press("ArrowRight")
    assert "feature 1, subcomponent 3 (column 2)" in page.locator("#live").inner_text(), "on from the same cell"
    page.keyboard.press("Escape")
    for key, cell in (("End", "subcomponent 0 (column 5)"), ("Home", "subcomponent 5 (column 0)")):
        page.keyboard.press(key)
        assert f"feature 0, {cell}" in page.locator("#live").inner_text()
    assert "shown" not in page.locator("[data-map=probe-0] .axes").inner_text()
    weights = page.locator("[data-map=weights-0-V] > canvas")
    weights.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#live").inner_text().startswith("0.005"), "the first column is subcomponent 5"


def test_both_schemes_and_the_switch_between_them(run_folder: Path, open_page: Open):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = [rgb(PALETTE["paper"][i]) for i in (0, 1)]
    assert open_page(run_folder / "report.html", color_scheme="light").evaluate(ground) == light
    page = open_page(run_folder / "report.html", color_scheme="dark")
    assert page.evaluate(ground) == dark
    pixel = "document.querySelector('[data-map] > canvas').toDataURL()"
    before = page.evaluate(pixel)
    switch = page.locator("#theme")
    for word, colour in (("light", light), ("dark", dark), ("system", dark)):
        switch.click()
        assert switch.inner_text() == f"Colours: {word}" and page.evaluate(ground) == colour
        assert (page.evaluate(pixel) == before) == (colour == dark), "heat maps follow"
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == light


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def test_tables_sort_settings_filter_and_figures_open_large(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    head = page.get_by_role("columnheader", name="C", exact=True)
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.locator("#sites tbody tr td:nth-child(5)").all_inner_texts() == ["20", "30"]
    page.locator("#config summary").click()
    page.locator("#setting-words").fill("ci_fn hidden")
    assert page.locator("#settings tr:visible").all_inner_texts() == ["pd.ci_fn.hidden\t[16]"]
    page.locator(".picture").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog img").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog img").is_visible()


def test_the_example_browser_finds_a_text_in_all_sites(run_folder: Path, open_page: Open):
    page = open_page(run_folder / "report.html")
    shown = page.locator("#example-list details")
    assert shown.count() == 2 and page.locator("#example-list mark").first.get_attribute("title") == "1.000"
    page.locator("#example-words").fill("NEEDLE")
    assert shown.count() == 1 and "h.0 17" in shown.inner_text()
    for words in ("needle thread", "needle·thread"):  # as it is typed, and as it is copied from the page
        page.locator("#example-words").fill(words)
        assert shown.count() == 1 and "h.0 17" in shown.inner_text()
    page.locator("#example-words").fill("3")
    assert "h.0 3" in shown.inner_text()


NAMELESS = """() => [...document.querySelectorAll(
    'a, button, input, select, summary, svg[tabindex], canvas[tabindex], [role]')]
  .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length)))
  .map(e => e.outerHTML.slice(0, 200))"""
SMALL = """() => [...document.querySelectorAll('img')].filter(e => !e.alt || e.alt.length < 15).map(e => e.alt)"""
TWICE = """() => {
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  return ids.filter((id, i) => ids.indexOf(id) < i);
}"""
UNDER = """() => [...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))"""


OVERHANG = """() => [...document.querySelectorAll('.tiles small, .goals-of span')].filter(e => {
  const own = e.getBoundingClientRect(), around = e.closest('.tiles div, figure').getBoundingClientRect();
  return e.scrollWidth > e.clientWidth + 1 && e.clientWidth || own.right > around.right + 1;
}).map(e => e.textContent)"""


@pytest.mark.parametrize("width", [1400, 1280, 800, 400, 360])
def test_every_control_has_a_name_and_nothing_is_wider_than_the_window(run_folder: Path, open_page: Open, width: int):
    page = open_page(run_folder / "report.html")
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(100)
    assert page.evaluate(NAMELESS) == [] and page.evaluate(SMALL) == [] and page.evaluate(TWICE) == []
    levels = page.evaluate(UNDER)
    assert levels[0] == 1 and levels.count(1) == 1 and set(levels[1:]) == {2}
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERHANG) == []


TICKS = """() => [...document.querySelectorAll('svg[tabindex]')].map(svg => {
  const box = svg.getBoundingClientRect(), shown = [...svg.querySelectorAll('text')];
  const beside = shown.filter(e => e.getAttribute('text-anchor') === 'end' && Number(e.getAttribute('x')) < 200);
  const words = beside.map(e => e.textContent), across = [...svg.querySelectorAll('.across')];
  const boxes = across.map(e => e.getBoundingClientRect());
  const meet = boxes.some((a, i) => boxes.some((b, k) =>
    k < i && a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2));
  const out = shown.filter(e => {
    const own = e.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 3;
  });
  return { twice: words.length - new Set(words).size, meet, out: out.map(e => e.textContent) };
}).filter(found => found.twice || found.meet || found.out.length)"""


@pytest.mark.parametrize("width", [1280, 400, 360])
@pytest.mark.parametrize("first", ["pd.components_optimizer.lr.start", "ci_fn"])
def test_a_search_is_readable_at_every_width(search: Path, first: str, width: int, open_page: Open):
    for config in search.glob("*/config.yaml"):
        stored = yaml.safe_load(config.read_text())
        swept = stored["logging"]["swept"]
        stored["logging"]["swept"] = {first: swept[first]} | swept
        config.write_text(yaml.safe_dump(stored, sort_keys=False))
    page = open_page(write_report(search))
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(100)
    assert page.evaluate(TICKS) == [] and page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#final [data-chart] svg").first.get_attribute("aria-label").split(". ")[0].endswith(first)
    assert all(label.bounding_box()["height"] > 0 for label in page.locator(".legend li").all())
    assert page.evaluate(CUT) == []
    page.locator("[data-chart=jobs-eval-loss-total] svg").hover()
    tips = page.locator("#tip td:last-child").all_inner_texts()
    assert len(tips) == len(set(tips)) == 4, "values that differ look different"


CUT = """() => [...document.querySelectorAll('.legend')]
  .filter(list => list.scrollHeight > list.clientHeight + 2 && !list.nextElementSibling?.checkVisibility())
  .map(list => list.textContent)"""


def test_a_long_legend_says_that_there_is_more_of_it(tmp_path: Path, open_page: Open):
    for i in range(30):
        write_run(tmp_path / f"{i}", config_of(seed=i, logging={"swept": {"a_setting_with_a_name": i + 1000}}))
    page = open_page(write_report(tmp_path))
    page.set_viewport_size({"width": 400, "height": 900})
    page.wait_for_timeout(100)
    assert page.evaluate(CUT) == [] and page.evaluate("document.documentElement.scrollWidth") <= 400
    chart = page.locator("[data-chart=jobs-eval-loss-total]")
    more, legend = chart.get_by_role("button", name="Show all 30 names"), chart.locator(".legend")
    assert more.is_visible() and legend.bounding_box()["height"] < 200
    more.click()
    assert not more.is_visible() and legend.bounding_box()["height"] > 300


def test_names_under_an_axis_take_turns_in_rows(tmp_path: Path, open_page: Open):
    for i in range(6):
        swept = {"ci_fn": f"the_ci_function_{i}"}
        write_run(tmp_path / f"{i}", config_of(logging={"swept": swept}), scale=1.0 + i / 10)
    page = open_page(write_report(tmp_path))
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(100)
        shown = page.locator("#final svg").first.locator("text.across").all_text_contents()
        assert page.evaluate(TICKS) == [] and shown == [f"the_ci_function_{i}" for i in range(6)]


def test_a_sweep_opens_too(tmp_path: Path, open_page: Open):
    for seed in range(3):
        config = config_of(seed=seed, logging={"swept": {"seed": seed}})
        write_run(tmp_path / f"{seed}_seed={seed}", config, scale=1.0 + seed)
    page = open_page(write_report(tmp_path))
    assert page.locator("#jobs tbody tr").count() == 3
    page.locator("#final svg").first.hover()
    assert "job" in page.locator("#tip").inner_text()
    assert page.locator("[data-chart=jobs-loss-total]").count() == 0  # it was not logged by these jobs
    assert page.evaluate(NAMELESS) == [] and page.evaluate(TWICE) == []


def test_a_partial_report_opens_too(tmp_path: Path, open_page: Open):
    folder = write_run(tmp_path / "run", config_of(), evaluated=False, ended=False)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    page = open_page(write_report(folder))
    assert "never evaluated" in page.locator(".notes").inner_text()
