"""Reports: the Markdown report of a comparison, and the HTML page of any runs.

``contents.py``   what a page shows, as plain records
``summary.py``    means, intervals, paired differences, iterations to a target
``reading.py``    a page of run directories, comparisons and evaluations
``logged.py``     one run; ``runs.py`` runs of any kind, ``comparisons.py`` those of ``metamom compare``
``evaluations.py`` files of ``metamom evaluate``
``views.py``      the parts of a page, with captions and text alternatives
``plots.py``      figures and tables, in Bokeh
``html.py``       the file
``markdown.py``   ``report.md`` of a comparison
"""

from metamom.experiments.report.contents import Method, Page, Section, SeedRun
from metamom.experiments.report.html import can_write_page, write_page
from metamom.experiments.report.markdown import best_learners, write_report

__all__ = [
    "Method",
    "Page",
    "Section",
    "SeedRun",
    "best_learners",
    "can_write_page",
    "write_page",
    "write_report",
]
