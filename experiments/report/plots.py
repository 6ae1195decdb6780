"""The figures and the sortable tables of a page, in Bokeh.

Colours of text, axes and grid are CSS variables, so that a page follows the reader's light or dark theme. The colours
of methods have a contrast of at least 3 on both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from metamom.experiments.families.family import Metric
from metamom.experiments.report.contents import Section
from metamom.experiments.report.summary import Estimate, Pairs

COLOURS = ("#0077BB", "#D55E00", "#009E73", "#B8558F", "#A67C00", "#7B68C8")
DASHES = ("solid", "dashed", "dotdash", "dotted")
HEIGHT = 340
ROW = 28  # pixels of a table's row

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
BOX_STYLE = ":host { color: var(--text, #1b1b1f); font: 15px system-ui, sans-serif; }"


class Column(NamedTuple):
    """A column of a sortable table: its heading, its values, and decimals of numbers; ``None`` for text."""

    title: str
    values: Sequence[Any]
    decimals: int | None = None


def curves(series: Series, *, ylabel: str, metric: Metric, target: float | None = None, log: bool = False) -> Any:
    """A line for each method with the band of its 95 % intervals, against iterations."""
    from bokeh.models import ColumnDataSource, HoverTool

    figure = _figure("iterations", f"{ylabel}{metric.unit and f' ({metric.unit.strip()})'}", log=log)
    for number, (label, points) in enumerate(series.items()):
        source = ColumnDataSource(_columns(points, metric))
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        line = figure.line(
            "x", "y", source=source, color=colour, line_width=2.5, line_dash=dash, legend_label=label, name=label
        )
        if len(points) == 1:
            figure.scatter("x", "y", source=source, color=colour, size=8, legend_label=label, name=label)
        if any(estimate.half for _, estimate in points):
            figure.varea(
                "x", "low", "high", source=source, fill_color=colour, fill_alpha=0.18, legend_label=label, name=label
            )
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


def adaptation(series: Series, *, ylabel: str, metric: Metric) -> Any:
    """A line for each method with whiskers, against the number of adaptation steps."""
    from bokeh.models import ColumnDataSource, HoverTool, Whisker

    figure = _figure("adaptation steps", f"{ylabel}{metric.unit and f' ({metric.unit.strip()})'}")
    figure.xaxis.ticker = sorted({at for points in series.values() for at, _ in points})
    for number, (label, points) in enumerate(series.items()):
        source = ColumnDataSource(_columns(points, metric))
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        figure.line("x", "y", source=source, color=colour, line_width=2, line_dash=dash, legend_label=label, name=label)
        dots = figure.scatter("x", "y", source=source, color=colour, size=9, legend_label=label, name=label)
        bars = Whisker(base="x", lower="low", upper="high", source=source, line_color=colour, line_width=2, name=label)
        for head in (bars.lower_head, bars.upper_head):
            head.size, head.line_color = 8, colour
        figure.add_layout(bars)
        dots.js_link("visible", bars, "visible")
        tips = [("method", label), ("steps", "@x"), (ylabel, "@shown")]
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
        colour = COLOURS[list(order).index(each.label) % len(COLOURS)]
        values = [metric.factor * gap for _, gap in each.by_seed]
        dots = figure.scatter(
            "x", "y", size=9, fill_alpha=0.35, color=colour, name=each.label, legend_label=each.label,
            source=ColumnDataSource({"x": values, "y": [each.label] * len(values),
                                     "seed": [str(seed) for seed, _ in each.by_seed],
                                     "shown": [_signed(metric, gap) for _, gap in each.by_seed]}),
        )  # fmt: skip
        tips = [("method", "@y"), ("seed", "@seed"), ("difference", "@shown")]
        figure.add_tools(HoverTool(renderers=[dots], tooltips=tips, visible=False))
        low, mean, high = (metric.factor * v for v in (each.estimate.low, each.estimate.mean, each.estimate.high))
        source = ColumnDataSource({"y": [each.label], "x": [mean], "low": [low], "high": [high]})
        figure.scatter(
            "x", "y", source=source, marker="diamond", size=16, color=colour, name=each.label, legend_label=each.label
        )
        bars = Whisker(
            base="y", lower="low", upper="high", dimension="width", source=source, line_color=colour, line_width=3
        )
        bars.lower_head.line_color = bars.upper_head.line_color = colour
        bars.level = "overlay"
        figure.add_layout(bars)
        dots.js_link("visible", bars, "visible")
    return _finished(figure, 110 + 40 * len(found))


def switches(labels: Sequence[str], figures: Sequence[Any]) -> Any:
    """A checkbox for each method, which shows or hides it in all figures; the legends' entries do the same."""
    from bokeh.layouts import row
    from bokeh.models import Checkbox, InlineStyleSheet

    boxes = []
    for label in labels:
        box = Checkbox(label=label, active=True, margin=(4, 16, 4, 0))
        box.stylesheets = [InlineStyleSheet(css=BOX_STYLE)]
        for renderer in (each for figure in figures for each in figure.renderers if each.name == label):
            box.js_link("active", renderer, "visible")
            renderer.js_link("visible", box, "active")
        boxes.append(box)
    return row(*boxes, styles={"flex-wrap": "wrap", "display": "flex"}, sizing_mode="stretch_width")


def table(columns: Sequence[Column]) -> Any:
    """A table that a click on a column's heading sorts."""
    from bokeh.models import ColumnDataSource, DataTable, InlineStyleSheet, NumberFormatter, TableColumn

    data, shown = {}, []
    for number, column in enumerate(columns):
        name = f"c{number}"
        data[name] = list(column.values)
        if column.decimals is None:
            widest = max([len(column.title), *(len(str(value)) for value in column.values)])
            shown.append(TableColumn(field=name, title=column.title, width=max(80, min(300, 8 * widest))))
        else:
            style = "0,0" if column.decimals == 0 else f"0,0.{'0' * column.decimals}"
            formatter = NumberFormatter(format=style, nan_format="–", null_format="–", text_align="right")
            width = max(64, 9 * len(column.title))
            shown.append(
                TableColumn(field=name, title=column.title, width=width, formatter=formatter, default_sort="descending")
            )
    rows = len(columns[0].values)
    return DataTable(
        source=ColumnDataSource(data), columns=shown, index_position=None, row_height=ROW, selectable=False,
        height=ROW * min(rows, 14) + 48, sizing_mode="stretch_width", autosize_mode="none", reorderable=False,
        stylesheets=[InlineStyleSheet(css=TABLE_STYLE)],
    )  # fmt: skip


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
    if figure.legend:
        legend = figure.legend[0]
        legend.click_policy = "hide"
        legend.background_fill_alpha = 0.0
        legend.border_line_color = None
        legend.ncols, legend.location, legend.margin, legend.padding = 1, "left", 0, 4
        legend.label_text_font_size = "13px"
        figure.add_layout(legend, "below")
        figure.height = height + 24 * len(legend.items)
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
    return {
        "x": [at for at, _ in points],
        "y": [_rounded(factor * e.mean) for _, e in points],
        "low": [_rounded(factor * e.low) for _, e in points],
        "high": [_rounded(factor * e.high) for _, e in points],
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


def logarithmic(section: Section, series: Series) -> bool:
    """Whether the values of an error span enough, and are positive, for a logarithmic axis."""
    lows = [estimate.low for points in series.values() for _, estimate in points]
    return not section.metric.higher_is_better and bool(lows) and min(lows) > 0
