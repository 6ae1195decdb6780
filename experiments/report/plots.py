"""The figures and the sortable tables of a page, in Bokeh.

Colours of text, axes and grid are CSS variables, so that a page follows the reader's light or dark theme. The colours
of methods have a contrast of at least 3 on both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metamom.experiments.families.family import Metric
from metamom.experiments.report.summary import Estimate, Pairs

COLOURS = ("#0077BB", "#D55E00", "#009E73", "#B8558F", "#A67C00", "#7B68C8")
DASHES = ("solid", "dashed", "dotdash", "dotted")
HEIGHT = 340
ROW = 28  # pixels of a table's row
LONG = 45  # characters of a legend's entry that narrow screens break into two lines

Series = dict[str, list[tuple[int, Estimate]]]
TABLE_STYLE = """
:host { --t: var(--text, #1b1b1f); color: var(--t); font: 14px system-ui, sans-serif; }
.slick-header-column, .slick-header.ui-state-default, .slick-headerrow { background: var(--soft, #eee) !important;
  color: var(--t) !important; border-color: var(--line, #ccc) !important; }
.slick-header-column { font-weight: 600; }
.slick-header-column:focus-visible { outline: 2px solid var(--accent, #0059b3); outline-offset: -2px; }
.slick-cell { background: var(--page, #fff) !important; color: var(--t) !important;
  border-color: var(--line, #ccc) !important; }
.bk-data-table { background: var(--page, #fff); border: 1px solid var(--line, #ccc); }
"""
BOX_STYLE = """
:host { color: var(--text, #1b1b1f); font: 15px system-ui, sans-serif; }
.bk-input-group { display: flex; flex-flow: row wrap; gap: 4px 16px; }
.bk-input-group.bk-inline > label:nth-child(n) { margin: 0; white-space: normal; overflow-wrap: anywhere; }
select.bk-input { background-color: var(--page, #fff); color: var(--text, #1b1b1f); border-color: var(--line, #999); }
"""
LEGEND_STYLE = """
.bk-label { color: var(--text) !important; white-space: normal; max-width: min(70ch, calc(100vw - 150px)); }
"""

# The checkboxes switch what is drawn, and what the legend switches shows in the checkboxes.
SWITCH = "found.forEach((renderers, i) => renderers.forEach((each) => { each.visible = cb_obj.active.includes(i) }))"
SWITCHED = """
const others = boxes.active.filter((i) => i != number)
boxes.active = cb_obj.visible ? [...others, number].sort((a, b) => a - b) : others
"""
# Headings cannot be reached from the keyboard in Bokeh's table (SlickGrid): a list of the columns can.
SORT = """
const columns = Object.entries(listed.data)
const order = [...columns[0][1].keys()]
const keys = cb_obj.value ? listed.data[cb_obj.value] : order
order.sort((a, b) => keys[a] > keys[b] ? 1 : keys[a] < keys[b] ? -1 : a - b)
source.data = Object.fromEntries(columns.map(([name, values]) => [name, order.map((i) => values[i])]))
table.change.emit()
"""


class Column(NamedTuple):
    """A column of a sortable table.

    Attributes:
        title: the heading.
        keys: what rows are sorted by: numbers, infinite where there is none, or texts.
        cells: what they show.
    """

    title: str
    keys: Sequence[Any]
    cells: Sequence[str]

    @property
    def numeric(self) -> bool:
        """Whether the keys are numbers, which stand on the right."""
        return not any(isinstance(key, str) for key in self.keys)


def curves(
    series: Series,
    order: Sequence[str],
    *,
    ylabel: str,
    metric: Metric,
    target: float | None = None,
    reached: Mapping[str, Sequence[int]] | None = None,
) -> Any:
    """A line for each method with the band of its 95 % intervals, against iterations.

    Args:
        series: the points of each method's line.
        order: of the methods' colours.
        ylabel: of the vertical axis, without a unit.
        metric: of the values.
        target: drawn as a dashed line.
        reached: the iterations at which a method's seeds reached it, drawn as dots on that line.
    """
    from bokeh.models import ColumnDataSource, HoverTool

    log = _logarithmic(series, metric)
    figure = _figure("iterations", f"{ylabel}{metric.unit and f' ({metric.unit.strip()})'}", log=log)
    for label, points in series.items():
        columns = _columns(points, metric)
        if log:  # an interval that reaches zero ends below all means
            floor = min(each.mean for every in series.values() for _, each in every) * metric.factor / 2
            columns["low"] = [max(low, floor) for low in columns["low"]]
        source = ColumnDataSource(columns)
        colour, dash = _look(label, order)
        style = {"source": source, "color": colour}
        line = figure.line("x", "y", line_width=2.5, line_dash=dash, legend_label=label, name=label, **style)
        if len(points) == 1:
            _follow(line, figure.scatter("x", "y", size=8, **style))
        if any(estimate.half for _, estimate in points):
            _follow(line, figure.varea("x", "low", "high", source=source, fill_color=colour, fill_alpha=0.18))
        if target is not None and (arrivals := (reached or {}).get(label)):
            where = ColumnDataSource({"x": list(arrivals), "y": [target * metric.factor] * len(arrivals)})
            _follow(line, figure.scatter("x", "y", source=where, color=colour, size=8, fill_alpha=0.5))
        figure.add_tools(
            HoverTool(
                renderers=[line],
                tooltips=[("method", label), ("iteration", "@x{0,0}"), (ylabel, "@shown")],
                mode="vline",
                description=f"values of {label}",
                visible=False,
            )
        )
    if target is not None:
        _target(figure, target * metric.factor, metric.exactly(target))
    return _finished(figure)


def adaptation(series: Series, order: Sequence[str], *, ylabel: str, metric: Metric) -> Any:
    """A line for each method with whiskers, against the number of adaptation steps."""
    from bokeh.models import ColumnDataSource, HoverTool, Whisker

    figure = _figure("adaptation steps", f"{ylabel}{metric.unit and f' ({metric.unit.strip()})'}")
    steps = sorted({at for points in series.values() for at, _ in points})
    figure.xaxis.ticker = steps
    ends = [metric.factor * end for points in series.values() for _, e in points for end in e.within(metric)]
    margin = 0.06 * (max(ends) - min(ends)) or 0.5
    figure.y_range.start, figure.y_range.end = min(ends) - margin, max(ends) + margin  # the range of dots is too small
    apart = 0.012 * (steps[-1] - steps[0])  # so that whiskers do not cover each other
    for number, (label, points) in enumerate(series.items()):
        columns = _columns(points, metric)
        columns |= {"steps": columns["x"], "x": [x + apart * (number - (len(series) - 1) / 2) for x in columns["x"]]}
        source = ColumnDataSource(columns)
        colour, dash = _look(label, order)
        line = figure.line("x", "y", source=source, color=colour, line_width=2, line_dash=dash)
        dots = figure.scatter("x", "y", source=source, color=colour, size=9, legend_label=label, name=label)
        bars = Whisker(base="x", lower="low", upper="high", source=source, line_color=colour, line_width=2)
        for head in (bars.lower_head, bars.upper_head):
            head.size, head.line_color = 8, colour
        figure.add_layout(bars)
        _follow(dots, line, bars)
        tips = [("method", label), ("steps", "@steps"), (ylabel, "@shown")]
        figure.add_tools(HoverTool(renderers=[dots], tooltips=tips, visible=False))
    return _finished(figure)


def pairs(found: Sequence[Pairs], order: Sequence[str], *, xlabel: str, metric: Metric) -> Any:
    """A dot for each seed's difference from the baseline, and each method's mean with its interval."""
    from bokeh.models import ColumnDataSource, HoverTool, Span, Whisker

    figure = _figure(f"{xlabel}{metric.unit and f' ({metric.unit.strip()})'}", "", rows=[p.label for p in found][::-1])
    figure.yaxis.visible = False  # the legend has the names: narrow screens have no room beside the plot
    ends = [0.0, *(metric.factor * v for p in found for v in (p.estimate.low, p.estimate.high))]
    ends += [metric.factor * gap for p in found for _, gap in p.by_seed]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    figure.x_range.start, figure.x_range.end = min(ends) - margin, max(ends) + margin
    figure.add_layout(Span(location=0, dimension="height", line_color="#808080", line_width=1.5))
    for each in found:
        colour, _ = _look(each.label, order)
        values = [metric.factor * gap for _, gap in each.by_seed]
        dots = figure.scatter(
            "x", "y", size=9, fill_alpha=0.35, color=colour, name=each.label,
            source=ColumnDataSource({"x": values, "y": [each.label] * len(values),
                                     "seed": [str(seed) for seed, _ in each.by_seed],
                                     "shown": [_signed(metric, gap) for _, gap in each.by_seed]}),
        )  # fmt: skip
        tips = [("method", "@y"), ("seed", "@seed"), ("difference", "@shown")]
        figure.add_tools(HoverTool(renderers=[dots], tooltips=tips, visible=False))
        low, mean, high = (metric.factor * v for v in (each.estimate.low, each.estimate.mean, each.estimate.high))
        source = ColumnDataSource(
            {"y": [each.label], "x": [mean], "low": [low], "high": [high], "shown": [shown(metric, each.estimate)]}
        )
        mark = figure.scatter(
            "x", "y", source=source, marker="diamond", size=16, color=colour, name=each.label, legend_label=each.label
        )  # fmt: skip
        tips = [("method", "@y"), ("mean difference", "@shown")]
        figure.add_tools(HoverTool(renderers=[mark], tooltips=tips, visible=False))
        bars = Whisker(
            base="y", lower="low", upper="high", dimension="width", source=source, line_color=colour, line_width=3
        )
        bars.lower_head.line_color = bars.upper_head.line_color = colour
        bars.level = "overlay"
        figure.add_layout(bars)
        _follow(mark, dots, bars)
    return _finished(figure, 110 + 40 * len(found))


def switches(labels: Sequence[str], figures: Sequence[Any]) -> Any:
    """A checkbox for each method, which shows or hides it in all figures; the legends' entries do the same."""
    from bokeh.models import CheckboxGroup, CustomJS, InlineStyleSheet

    found = [[each for figure in figures for each in figure.renderers if each.name == label] for label in labels]
    boxes = CheckboxGroup(
        labels=list(labels), active=list(range(len(labels))), inline=True, sizing_mode="stretch_width"
    )
    boxes.stylesheets = [InlineStyleSheet(css=BOX_STYLE)]
    boxes.js_on_change("active", CustomJS(args={"found": found}, code=SWITCH))
    for number, renderers in enumerate(found):
        for each in renderers:
            each.js_on_change("visible", CustomJS(args={"boxes": boxes, "number": number}, code=SWITCHED))
    return boxes


def _look(label: str, order: Sequence[str]) -> tuple[str, str]:
    """The colour and dashes of a method, the same in all figures of a section."""
    number = list(order).index(label)
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def _follow(lead: Any, *others: Any) -> None:
    """Show and hide the rest of a method with the part that the legend and the checkbox switch."""
    for each in others:
        lead.js_link("visible", each, "visible")


def table(columns: Sequence[Column]) -> Any:
    """A table that a click on a column's heading sorts, and a list of the columns that does it from the keyboard."""
    from bokeh.layouts import column as stacked
    from bokeh.models import (
        ColumnDataSource,
        CustomJS,
        DataTable,
        HTMLTemplateFormatter,
        InlineStyleSheet,
        Select,
        TableColumn,
    )

    data: dict[str, list[Any]] = {}
    shown = []
    for number, column in enumerate(columns):
        data[f"key{number}"], data[f"cell{number}"] = list(column.keys), list(column.cells)
        side = "right" if column.numeric else "left"
        template = f'<div style="text-align: {side}"><%- cell{number} %></div>'
        widest = max(len(column.title) + 3, *map(len, column.cells))
        shown.append(
            TableColumn(
                field=f"key{number}", title=column.title, formatter=HTMLTemplateFormatter(template=template),
                width=max(64, min(250, round(7.5 * widest))),
            )
        )  # fmt: skip
    source = ColumnDataSource(data)
    grid = DataTable(
        source=source, columns=shown, index_position=None, row_height=ROW, selectable=False,
        height=ROW * min(len(columns[0].keys), 14) + 46, sizing_mode="stretch_width", autosize_mode="none",
        reorderable=False, stylesheets=[InlineStyleSheet(css=TABLE_STYLE)],
    )  # fmt: skip
    options = [(f"key{number}", column.title) for number, column in enumerate(columns)]
    choice = Select(title="Sort by", value="", options=[("", "as listed"), *options], width=220)
    choice.stylesheets = [InlineStyleSheet(css=BOX_STYLE)]
    choice.js_on_change(
        "value", CustomJS(args={"source": source, "listed": ColumnDataSource(data), "table": grid}, code=SORT)
    )
    return stacked(choice, grid, sizing_mode="stretch_width")


def _figure(xlabel: str, ylabel: str, *, log: bool = False, rows: Sequence[str] | None = None) -> Any:
    from bokeh.plotting import figure

    options: dict[str, Any] = {"y_axis_type": "log" if log else "linear"} if rows is None else {"y_range": list(rows)}
    made = figure(
        height=HEIGHT, sizing_mode="stretch_width", x_axis_label=xlabel, y_axis_label=ylabel or None,
        tools="pan,box_zoom,wheel_zoom,zoom_in,zoom_out,reset,save", active_drag="box_zoom", active_scroll=None,
        background_fill_alpha=0.0, border_fill_alpha=0.0, outline_line_color=None, toolbar_location="above", **options,
    )  # fmt: skip
    made.toolbar.logo = None
    made.axis.axis_label_text_font_style = "normal"
    made.axis.axis_label_text_font_size = made.axis.major_label_text_font_size = "13px"
    return made


def _finished(figure: Any, height: int = HEIGHT) -> Any:
    """The legend below the plot: beside it, narrow screens have no room."""
    from bokeh.models import InlineStyleSheet

    if figure.legend:
        legend = figure.legend[0]
        legend.click_policy = "hide"
        legend.background_fill_alpha = 0.0
        legend.border_line_color = None
        legend.ncols, legend.location, legend.margin, legend.padding = 1, "left", 0, 4
        legend.label_text_font_size = "13px"
        legend.stylesheets = [InlineStyleSheet(css=LEGEND_STYLE)]
        figure.add_layout(legend, "below")
        figure.height = height + sum(24 if len(item.label.value) <= LONG else 34 for item in legend.items)
    return figure


def _target(figure: Any, value: float, shown: str) -> None:
    from bokeh.models import Label, Span

    figure.add_layout(Span(location=value, dimension="width", line_color="#808080", line_dash="dashed"))
    figure.add_layout(
        Label(
            x=6, y=value, x_units="screen", y_offset=3, text=f"target {shown}", text_font_size="12px",
            text_color="#808080",
        )
    )  # fmt: skip


def _columns(points: Sequence[tuple[int, Estimate]], metric: Metric) -> dict[str, list[Any]]:
    factor = metric.factor
    ends = [estimate.within(metric) for _, estimate in points]
    return {
        "x": [at for at, _ in points],
        "y": [_rounded(factor * e.mean) for _, e in points],
        "low": [_rounded(factor * low) for low, _ in ends],
        "high": [_rounded(factor * high) for _, high in ends],
        "shown": [shown(metric, e) for _, e in points],
    }


def shown(metric: Metric, estimate: Estimate | None) -> str:
    """An estimate in words: ``90.6 ± 1.1 %``; a dash for none."""
    if estimate is None or not math.isfinite(estimate.mean):
        return "–"
    if estimate.half is None:
        return f"{metric.show(estimate.mean)}{metric.unit}"
    return metric.with_interval(estimate.mean, estimate.half)


def _signed(metric: Metric, gap: float) -> str:
    return f"{'+' if gap >= 0 else ''}{metric.show(gap)}{metric.unit}"


def _rounded(value: float) -> float:
    """Seven digits, which no figure shows more of: the file stays small."""
    return float(f"{value:.7g}")


def _logarithmic(series: Series, metric: Metric) -> bool:
    """Whether a logarithmic axis fits: of an error that is positive, with its interval unless it is cut off at zero."""
    found = [estimate for points in series.values() for _, estimate in points]
    positive = all(each.mean > 0 and (metric.least == 0 or each.low > 0) for each in found)
    return not metric.higher_is_better and positive
