"""The figures and the report of the MNIST reference, on made-up numbers that can be told apart in a drawing."""

import base64
import re
from itertools import combinations
from statistics import fmean, stdev

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.image import imread
from matplotlib.patches import Patch

from reference.mnist import charts, insides
from reference.mnist.figures import draw
from reference.mnist.report import sections, write_report
from reference.mnist.scores import summarize
from reference.mnist.study import STRENGTHS
from reference.mnist.suite import SIGMAS, Task
from reference.style import LOOKS, look

GRADIENT = [step / 10 for step in range(-10, 31)]
OVERALL = {"layer_mean": (0.5, 0.7), "low_rank": (0.93, 0.97), "gradient": (0.9, 0.92)}


def scores(overall, retained=1.0, acquired=0.5):
    return {"overall": overall, "retained": retained, "acquired": acquired, "acquired_by_digit": {"9": acquired}}


def run(seed):
    """What one seed of the self experiment returns, with a method that retains 1.0 and 1.3."""
    curve = {
        "layer_mean": [{"c": c, **scores(0.5 + seed / 10)} for c in STRENGTHS],
        "gradient": [{"c": c, **scores(0.5)} for c in GRADIENT],
    }
    return {
        "unsteered": scores(0.875),
        "ceiling": scores(0.96875),
        "methods": {name: scores(pair[seed], retained=1 + 0.3 * seed) for name, pair in OVERALL.items()},
        "curves": curve,
        "portrait": {
            "method": "gradient",
            "layer means": {"unsteered": [0.5, 1.0, 0.25, 1.25], "steered": [0.75, 0.5, 0.5, -0.5]},
            "example": {
                "digit": 9,
                "image": np.eye(28).tolist(),
                "logits": {"unsteered": list(np.eye(10)[3]), "steered": list(np.eye(10)[9])},
            },
            "histograms": {"2": {"edges": [0, 1, 2], "unsteered": [0.5, 0.5], "steered": [0.25, 0.75]}},
            "logits of v": [float(digit * (seed + 1)) for digit in range(10)],
        },
        "cosines": {"concepts": ["eight", "nine"], "plain_sum": [[1.0, -0.5], [-0.5, 1.0]]},
    }


def summary(runs):
    methods = {name: summarize([one["methods"][name] for one in runs]) for name in OVERALL}
    whole = {name: summarize([one[name] for one in runs]) for name in ("unsteered", "ceiling")}
    return {"seeds": list(range(len(runs))), "data": "bundled", "versions": {}, "methods": methods, **whole}


RUNS = [run(0), run(1)]
DOCUMENT = {"experiment": "self", "dependence": {"mean": 0.5}, **summary(RUNS)}
NOISE = {**DOCUMENT, "experiment": "noise", "sigma": {str(sigma): summary(RUNS) for sigma in SIGMAS}}
PLOTS = {
    "methods": lambda: charts.methods(DOCUMENT),
    "curves": lambda: charts.curves([one["curves"] for one in RUNS]),
    "noise": lambda: charts.noise(NOISE),
    "radar": lambda: insides.radar(RUNS[0]["portrait"]),
    "example": lambda: insides.example(RUNS[0]["portrait"]["example"]),
    "histograms": lambda: insides.histograms(RUNS[0]["portrait"]["histograms"]),
    "readout": lambda: insides.readout([one["portrait"]["logits of v"] for one in RUNS], new=["9"]),
}


def errors(axes, label):
    """The ends of the error bars of the bars with this label, in data coordinates."""
    (bars,) = (container for container in axes.containers if container.get_label() == label)
    along = 0 if bars.orientation == "horizontal" else 1
    (segments,) = bars.errorbar.lines[2]
    return [(segment[0, along], segment[1, along]) for segment in segments.get_segments()]


# --- scores ----------------------------------------------------------------------------------------------------------
def test_methods_are_sorted_by_their_overall_mean_the_best_on_top():
    axes = charts.methods(DOCUMENT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer_mean", "gradient", "low_rank"]
    overall = [bar.get_width() for bar in axes.containers[-1]]
    assert overall == sorted(overall) == [fmean(OVERALL[name]) for name in ("layer_mean", "gradient", "low_rank")]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]


def test_the_axis_of_the_methods_holds_every_bar_with_its_error():
    axes = charts.methods(DOCUMENT).axes[0]
    ends = [end for key in ("acquired", "retained", "overall") for pair in errors(axes, key) for end in pair]
    low, high = axes.get_xlim()
    assert max(ends) == pytest.approx(1.15 + stdev([1, 1.3])) and low <= min(ends) and max(ends) <= high
    below = charts.holding([{"mean": 0.05, "std": 0.25}])
    assert below[0] <= -0.2 and below[1] >= 1


def test_the_ceiling_and_the_unsteered_model_are_lines_with_their_numbers():
    def lines(document):
        return {line.get_label(): line.get_xdata()[0] for line in charts.methods(document).axes[0].lines}

    unsteered = {"unsteered, overall: 0.875": 0.875}
    assert lines(DOCUMENT).items() >= (unsteered | {"trained on all ten digits, overall: 0.969": 0.96875}).items()
    without = lines({name: value for name, value in DOCUMENT.items() if name != "ceiling"})
    assert without.items() >= unsteered.items() and not [label for label in without if "all ten" in label]


def test_there_is_one_standard_deviation_that_with_n_minus_1():
    methods, readout = charts.methods(DOCUMENT).axes[0], PLOTS["readout"]().axes[0]
    assert [high - low for low, high in errors(methods, "overall")] == pytest.approx(
        [2 * stdev(OVERALL[name]) for name in ("layer_mean", "gradient", "low_rank")]
    )
    ((low, high),) = errors(readout, "new digit")
    assert high - low == pytest.approx(2 * stdev([9.0, 18.0]))
    band = PLOTS["curves"]().axes[0].collections[2].get_paths()[0].vertices[:, 1]
    assert np.ptp(band) == pytest.approx(2 * stdev([0.5, 0.6]))
    assert np.ptp(charts.curves([RUNS[0]["curves"]]).axes[0].collections[2].get_paths()[0].vertices[:, 1]) == 0


def test_the_noise_has_a_panel_for_each_method_with_every_sigma_and_no_empty_one():
    panels = [axes for axes in PLOTS["noise"]().axes if axes.axison]
    assert [axes.get_title() for axes in panels] == ["low_rank", "gradient", "layer_mean"]
    for axes in panels:
        assert [container.get_label() for container in axes.containers] == ["acquired", "retained", "overall"]
        assert all(list(container.lines[0].get_xdata()) == list(SIGMAS) for container in axes.containers)
        assert axes.get_ylim()[1] > 1.15 + stdev([1, 1.3])


@pytest.mark.parametrize(("panel", "strengths"), [(0, STRENGTHS), (1, GRADIENT)], ids=["powers", "steps"])
def test_every_strength_is_marked_where_it_was_measured_and_can_be_told_from_its_neighbours(panel, strengths):
    figure = PLOTS["curves"]()
    figure.draw_without_rendering()
    axes = figure.axes[panel]
    assert axes.get_xscale() == "symlog"
    for line in axes.lines:
        assert list(line.get_xdata()) == strengths and line.get_marker() == "o"
        points = axes.transData.transform(np.column_stack([strengths, np.zeros(len(strengths))]))[:, 0]
        assert np.diff(points).min() * 72 / figure.dpi > line.get_markersize()
    assert set(axes.get_xticks()) == ({-1, 0, 1, 3} if panel else {*STRENGTHS[::102], -100, -10, -1, 0, 1, 10, 100})


# --- one model -------------------------------------------------------------------------------------------------------
def test_the_radar_has_its_centre_at_zero_and_says_its_scale():
    web, _ = PLOTS["radar"]().axes
    low, rim = web.get_ylim()
    assert low == 0 and web.get_rorigin() == 0 and rim >= 1.25
    assert f"centre 0, rim {rim:g}" in web.get_title()
    assert [list(line.get_ydata()) for line in web.lines] == [[0.5, 1, 0.25, 1.25, 0.5], [0.75, 0.5, 0.5, 0, 0.75]]


def test_a_mean_below_zero_is_said_on_the_radar_and_shown_by_its_bar():
    web, bars = PLOTS["radar"]().axes
    assert "below 0" in web.get_title()
    assert [bar.get_height() for bar in bars.containers[1]] == [0.75, 0.5, 0.5, -0.5]
    assert {"−0.50", "1.25", "0.25"} <= {text.get_text() for text in bars.texts} and len(bars.texts) == 8
    above = {"method": "gradient", "layer means": {"unsteered": [1, 1, 1, 1], "steered": [2, 2, 2, 2]}}
    assert "below" not in insides.radar(above).axes[0].get_title()


def test_the_example_says_what_was_read_before_and_after():
    assert PLOTS["example"]().axes[0].get_title() == "a 9, read as 3 → 9"


# --- colours ---------------------------------------------------------------------------------------------------------
def color_of(handle):
    """Of a line, or of the line of an error bar."""
    return (handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle).get_color()


def meanings(page):
    """Every (label, colour) of every legend, with what a label says beside its name left out."""
    found = set()
    with look(page):
        for plot in PLOTS.values():
            figure = plot()
            for legend in figure.legends:
                for handle, text in zip(legend.legend_handles, legend.texts, strict=True):
                    color = handle.get_facecolor() if isinstance(handle, Patch) else color_of(handle)
                    name = re.sub(r"^model A, |, overall.*| by .*", "", text.get_text())
                    found.add((name, to_hex(color)))
    return found


@pytest.mark.parametrize("page", LOOKS)
def test_a_colour_means_one_thing_in_all_figures(page):
    found = meanings(page)
    names, colors = [name for name, _ in found], [color for _, color in found]
    assert len(names) == len(set(names)) and {"unsteered", "steered", "acquired", "retained", "overall"} <= set(names)
    shared = [{a[0], b[0]} for a, b in combinations(found, 2) if a[1] == b[1]]
    assert sorted(map(sorted, shared)) == [["acquired", "new digit"], ["digits it was trained on", "retained"]]
    cycle = LOOKS[page]["axes.prop_cycle"].by_key()["color"]
    assert dict(found)["unsteered"] == cycle[0] and dict(found)["steered"] == cycle[1]
    assert set(colors) <= {*cycle, LOOKS[page]["text.color"]}


@pytest.mark.parametrize("page", LOOKS)
def test_text_and_colours_stand_out_from_their_page(page):
    def luminance(color):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return float(np.dot(parts, [0.2126, 0.7152, 0.0722]))

    def contrast(a, b):
        low, high = sorted([luminance(a), luminance(b)])
        return (high + 0.05) / (low + 0.05)

    parameters = LOOKS[page]
    assert contrast(parameters["text.color"], parameters["figure.facecolor"]) > 7
    assert all(contrast(c, parameters["figure.facecolor"]) > 2 for c in parameters["axes.prop_cycle"].by_key()["color"])


# --- files and the report --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    results = {"self": DOCUMENT}
    figures = draw(results, {Task("self", seed): RUNS[seed] for seed in (0, 1)}, out)
    return out, figures, results


def test_every_figure_is_there_for_a_light_and_for_a_dark_page(report):
    out, figures, _ = report
    assert len(figures["self"]) == 7
    for drawn in figures["self"]:
        name = drawn.paths["light"].stem
        assert drawn.paths == {"light": out / f"{name}.png", "dark": out / f"{name}-dark.png"}
        for page, path in drawn.paths.items():
            assert to_hex(imread(path)[0, 0]) == LOOKS[page]["figure.facecolor"]
        assert "standard deviation" not in drawn.caption or "(n - 1)" in drawn.caption


def test_the_report_shows_the_figure_that_the_reader_s_page_asks_for(report, monkeypatch):
    out, figures, results = report
    monkeypatch.setattr("reference.mnist.report.readings", lambda results: {"all": "", "self": ""})
    text = write_report(results, figures, out).read_text()
    image = 'data:image/png;base64,([^"]*)"'
    pattern = rf'<source media="\(prefers-color-scheme: dark\)" srcset="{image}>\s*<img src="{image}'
    shown = [tuple(base64.b64decode(part) for part in pair) for pair in re.findall(pattern, text)]
    assert shown == [tuple(drawn.paths[page].read_bytes() for page in ("dark", "light")) for drawn in figures["self"]]
    dark = text[text.index("@media (prefers-color-scheme: dark)") :]
    assert "color-scheme: light dark" in text and LOOKS["dark"]["figure.facecolor"] in dark[:200]
    assert all(f"<b>{name}</b>" in text for name in ("overall", "retained", "acquired", "low_rank", "ceiling"))


def test_a_table_ends_with_the_ceiling_and_has_a_line_for_every_name_in_it():
    (section,) = sections({"self": DOCUMENT})
    names = [row[0] for row in section["rows"]]
    assert names == ["unsteered", *OVERALL, "ceiling"] == list(section["lines"])
    assert all(line.endswith(".") and len(line) < 160 for line in section["lines"].values())


def test_cross_model_steering_says_what_the_published_b_is():
    (section,) = sections({"cross": {**DOCUMENT, "experiment": "cross"}})
    assert re.search("autoencoder.*784 outputs.*9 alone.*mean squared error", section["lines"]["the published B"])


def test_the_noise_table_has_a_line_for_every_method_and_for_sigma():
    (section,) = sections({"noise": NOISE})
    assert list(section["lines"]) == ["unsteered", *OVERALL, "sigma"]
