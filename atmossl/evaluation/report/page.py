"""One HTML page that holds everything, pictures included, and reads well on a phone."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from atmossl.evaluation.report.cards import RatioColours, colours_of, region_card, score_cards
from atmossl.evaluation.report.content import Example, Provenance, TaskReport
from atmossl.evaluation.report.figures import encoded, pixels_of, readable, svg_bytes
from atmossl.evaluation.report.maps import DrawnCase, case_title, panel_map
from atmossl.evaluation.report.members import (
    ensembles,
    member_panels,
    most_varied,
    spread_rows,
    spread_table,
    what_members_are,
)
from atmossl.evaluation.report.panels import (
    lead_curve,
    pick,
    plume_panel,
    rank_panel,
    ratio_panel,
    reliability_panel,
    spectrum_panel,
    spread_panel,
)
from atmossl.evaluation.report.verdicts import CALIBRATED, calibration_table, verdicts
from atmossl.evaluation.verify import RATIO_PREFIX, WHOLE_YEAR, rows_of_prefix, rows_where

_CURVES = {n: n for n in ("rmse", "crps", "acc")} | {"spread_skill": "spread over skill"}
_SPECTRA = {
    "zonal_spectrum": ("Zonal spectra", "zonal wavenumber"),
    "spherical_spectrum": ("Spherical spectra", "total wavenumber"),
}
_ABOUT = {
    "Rank": "Flat (dashed) if members and truth are alike; high ends: too little spread.",
    "Reliability": "On the diagonal if the event is as frequent as forecast; larger points were "
    "forecast more often.",
    "Zonal": "Variance by wavenumber on latitude circles over the truth's: below 1 is too smooth, "
    "above 1 too rough.",
    "Spherical": "Variance by total wavenumber of spherical harmonics over the truth's.",
}
_MAP_DPI = 110


@dataclass(frozen=True)
class Picture:
    """A picture as text for an `img`, and what it shows for those who cannot see it."""

    source: str
    alt: str


def svg_picture(figure: Figure, alt: str) -> Picture:
    """A figure as SVG inside the page; `alt` is its text for readers who do not see it."""
    return Picture(_data_url(svg_bytes(figure), "image/svg+xml"), alt)


def map_picture(figure: Figure, alt: str) -> Picture:
    """A map as a WebP picture inside the page; `alt` is its text for readers who do not see it."""
    return Picture(_data_url(encoded(pixels_of(figure, _MAP_DPI), "webp"), "image/webp"), alt)


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def template_of(package: str) -> jinja2.Template:
    """The template `page.html.jinja` that lies in a package."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html.jinja")


def html_page(
    reports: Sequence[TaskReport],
    provenance: Provenance,
    drawn: Mapping[tuple[str, str], DrawnCase],
) -> str:
    """The whole report as one file without any reference to another.

    drawn: the maps of every example, by task and variable.
    """
    page = template_of("atmossl.evaluation.report")
    colours = colours_of(reports)
    sections = [_section(report, colours, drawn) for report in reports]
    first = next((example for section in sections for example in section["examples"]), None)
    return page.render(
        provenance=provenance,
        verdicts=verdicts(reports).to_dict("records"),
        first=first,
        legend=colours.legend(),
        sections=sections,
    )


def _section(
    report: TaskReport, colours: RatioColours, drawn: Mapping[tuple[str, str], DrawnCase]
) -> dict[str, Any]:
    calibration = _calibration_rows(report.table)
    return {
        "task": report.task,
        "title": readable(report.task),
        "model": report.model_name,
        "about": report.about,
        "period": report.period,
        "num_times": report.num_cases,
        "has_intervals": bool(report.table["low"].notna().any()),
        "overall": rows_where(report.overall, score="rmse_ratio").to_dict("records"),
        "cards": score_cards(report, colours),
        "regions": region_card(report, colours),
        "curves": list(_curves(report)),
        "ratios": list(_ratio_panels(report)),
        "faults": [row for row in calibration if row["verdict"] != CALIBRATED],
        "calibrated": [row for row in calibration if row["verdict"] == CALIBRATED],
        "members": _members(report),
        "groups": _diagnostic_groups(report),
        "examples": [
            _example(report, example, drawn[report.task, example.variable])
            for example in report.examples
        ],
    }


def _curves(report: TaskReport) -> Iterator[dict[str, Any]]:
    """Scores against lead time by variable, if there is more than one lead time."""
    rows = rows_where(report.table, season=WHOLE_YEAR)
    if rows["lead_hours"].nunique() < 2:
        return
    for example in report.examples:
        name, level = example.variable, example.level
        variable_rows = rows_where(rows, variable=name)
        pictures = []
        for score, words in _CURVES.items():
            if (variable_rows["score"] == score).any():
                figure = lead_curve(variable_rows, variable=name, level=level, score=score)
                pictures.append(svg_picture(figure, f"{words} of {name} against lead time"))
        yield {"title": _heading(example), "pictures": pictures}


def _ratio_panels(report: TaskReport) -> Iterator[Picture]:
    """Ratios of RMSE with intervals at the shortest and the longest lead time, or the only one."""
    rows = rows_of_prefix(report.table, RATIO_PREFIX)
    rows = rows_where(rows, region="global", season=WHOLE_YEAR)
    for example in report.examples:
        example_rows = rows_where(rows, variable=example.variable, level=example.level)
        last = example_rows["lead_hours"].max()
        if np.isfinite(last):
            example_rows = rows_where(example_rows, lead_hours=last)
        if not example_rows.empty:
            title = _heading(example) + (f", {last:g} h" if np.isfinite(last) else "")
            yield svg_picture(
                ratio_panel(example_rows, title),
                f"RMSE ratio to each baseline of {example.variable}",
            )


def _heading(example: Example) -> str:
    name = readable(example.variable)
    return name if example.level is None else f"{name}, {example.level:g} hPa"


def _members(report: TaskReport) -> dict[str, Any] | None:
    """Maps of single members, plumes of box means and their spread over error; None without
    members."""
    examples = ensembles(report)
    if not examples:
        return None
    shown = most_varied(examples)
    title = case_title(report.task, shown)
    spreads = spread_table(report)
    has_leads = len(np.unique(spreads["lead_hours"].dropna())) > 1
    curve = spread_panel(spreads) if has_leads else None
    return {
        "about": what_members_are(shown),
        "title": title,
        "maps": [
            map_picture(panel_map(panel), f"{panel.title}: {title}")
            for panel in member_panels(shown)
        ],
        "plumes": list(_plumes(examples)),
        "spreads": spread_rows(spreads) if len(spreads) else None,
        "curves": [] if curve is None else [svg_picture(curve, "spread over error by lead time")],
    }


def _plumes(examples: Sequence[Example]) -> Iterator[Picture]:
    for example in examples:
        if example.plume is not None:
            title = f"{_heading(example)}\n{example.plume.place}"
            figure = plume_panel(example.plume, title, str(example.truth.attrs.get("units", "")))
            yield svg_picture(figure, f"means over boxes of members and truth, {_heading(example)}")


def _diagnostic_groups(report: TaskReport) -> list[dict[str, Any]]:
    """Rank histograms, reliability and spectra, a picture per variable."""
    drawn: dict[str, list[Picture]] = {}
    levels = {example.variable: example for example in report.examples}
    for (diagnostic, variable), dataset in report.diagnosed.items():
        if variable not in levels:
            continue
        example = levels[variable]
        chosen, title = pick(dataset, example.level), _heading(example)
        if not any(values.notnull().any() for values in chosen.data_vars.values()):
            continue  # such as means of boxes, of a task that hides single cells
        if diagnostic.startswith("rank_histogram"):
            of = diagnostic.removeprefix("rank_histogram").replace("_", " ")
            of = re.sub(r"mean (\d+)x(\d+)$", r"means over \1 x \2 cells", of)
            group = f"Rank histograms{f' of{of}'.removesuffix('s') + 's' if of else ''}"
            figure = rank_panel(chosen, title)
        elif diagnostic.startswith("reliability"):
            event = diagnostic.removeprefix("reliability_above_p")
            group = f"Reliability of exceeding the {event}th percentile of the training record"
            figure = reliability_panel(chosen, title)
        else:
            group, axis = _SPECTRA[diagnostic]
            figure = spectrum_panel(chosen, title, report.model_name, axis)
        drawn.setdefault(group, []).append(svg_picture(figure, f"{group}, {title}"))
    return [
        {"title": title, "pictures": pictures, "about": _explained(title)}
        for title, pictures in drawn.items()
    ]


def _explained(group: str) -> str:
    return next(text for start, text in _ABOUT.items() if group.startswith(start))


def _calibration_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    calibration = calibration_table(table)
    rows = []
    for row in calibration.to_dict("records"):
        level = "" if np.isnan(row["level"]) else f" {row['level']:g} hPa"
        rows.append(
            {
                "source": str(row["source"]),
                "variable": readable(str(row["variable"])) + level,
                "lead": "" if np.isnan(row["lead_hours"]) else f"{row['lead_hours']:g} h",
                "spread": _interval(row, "spread_skill"),
                "outliers": _interval(row, "outlier_ratio"),
                "inflation": f"{row['inflation']:.2f}",
                "verdict": str(row["verdict"]),
            }
        )
    return rows


def _interval(row: dict, score: str) -> str:
    low, high = row[f"{score}_low"], row[f"{score}_high"]
    text = f"{row[score]:.2f}"
    return text if np.isnan(low) or np.isnan(high) else f"{text} [{low:.2f}, {high:.2f}]"


def _example(report: TaskReport, example: Example, drawn: DrawnCase) -> dict[str, Any]:
    """Maps of one case; those of its input, truth, prediction and error are the `main` ones."""
    baseline = report.baseline_of(example)
    heading = f"{readable(report.task)}, {_heading(example)}"
    pictures = {
        title: Picture(_data_url(content, "image/webp"), f"{title}: {heading}")
        for title, content in drawn.panels.items()
    }
    error = next(title for title in pictures if title.startswith("error of the prediction"))
    main = [*list(pictures)[: 2 if example.given is None else 3], error]
    return {
        "title": case_title(report.task, example),
        "given": None if example.given is None else example.given.title,
        "baseline": baseline,
        "pictures": list(pictures.values()),
        "main": [pictures[title] for title in main],
        "beside": next((title for title in pictures if title.startswith("baseline")), None),
    }
