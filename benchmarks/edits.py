"""Edits of the demo world by forward passes alone, beside back-propagation and MobiEdit's estimator.

``python -m benchmarks.edits [--quick] [--model TYPE] [PART ...]``; parts are single, together and cost. Every
method has the same contexts, loss, layer and joint solution; only the way to the change differs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.edits_judging import Judge, WorldEdit, draw_edits
from benchmarks.edits_models import demo_models
from benchmarks.edits_together import measure_together
from benchmarks.report import Report
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize.editor import Editor, Method
from edge_runtime.personalize.estimators import CentralDifferences, SpreadSigns
from edge_runtime.personalize.search import Budget, PlainDescent
from edge_runtime.personalize.statistics import load_statistics
from edge_runtime.personalize.store import AdapterStore
from edge_runtime.personalize.workspace import Workspace
from models.demo.facts import load_facts

_BARS = {"success": 0.95, "paraphrases": 0.85, "unrelated": 0.97, "same subject": 0.90}
_ROME_STEPS = 60
_MOBIEDIT_STEPS = 400
_FEWER = 15  # edits of every side but ours


@dataclass(frozen=True, slots=True)
class Side:
    """One way to find an edit's change."""

    name: str
    method: Callable[[Engine], Method]
    edits: int
    forward_only: bool = True


def _rome(engine: Engine) -> Method:
    from benchmarks.back_propagation import Adam, BackPropagation

    gradient = BackPropagation(engine)
    return Method(lambda seed: gradient, Adam(), Budget(_ROME_STEPS))


def _mobiedit(engine: Engine) -> Method:
    return Method(
        CentralDifferences,
        PlainDescent(rate=0.01),
        Budget(_MOBIEDIT_STEPS, patience=_MOBIEDIT_STEPS),
    )


def sides(count: int) -> list[Side]:
    """The methods that are compared, with how many edits each makes."""
    return [
        Side("ours", lambda engine: Method(), count),
        Side("ROME, back-propagation in F32", _rome, min(count, _FEWER), forward_only=False),
        Side("MobiEdit's estimator", _mobiedit, min(count, _FEWER)),
        Side("ours, antithetic", _with(antithetic=True), min(count, _FEWER)),
        Side("ours, guided by the logit lens", _with(guided=True), min(count, _FEWER)),
    ]


def _with(**options: bool) -> Callable[[Engine], Method]:
    return lambda engine: Method(partial(SpreadSigns, **options))


def measure_single(report: Report, label: str, path: Path, count: int) -> None:
    """Each edit alone on the fresh model, the sides in turn."""
    facts = load_facts()
    edits = draw_edits(facts, count)
    found: dict[str, list[dict[str, float]]] = {"no edit": []}
    with Engine.load(path, EngineOptions(threads=1)) as engine, Workspace(engine) as workspace:
        judge = Judge(facts, workspace)
        methods = [(side, side.method(engine)) for side in sides(count)]
        for number, edit in enumerate(edits):
            found["no edit"].append(judge.figures(edit, number))
            for side, method in methods:
                if number < side.edits:
                    made = _edited(engine, method, edit, judge, workspace, number)
                    if not side.forward_only:  # the rows that were counted are those of its loss alone
                        del made["rows"], made["search rows"]
                    found.setdefault(side.name, []).append(made)
            ours = found["ours"][-1]
            report.note(f"{label} {number + 1}/{count}: {edit.fact.relation} " + str(ours))
    figures = {name: _means(made) for name, made in found.items()}
    theirs = found["MobiEdit's estimator"]
    same = found["ours"][: len(theirs)]
    report.details[f"single, {label}"] = {**figures, "ours, the edits of the other sides": _means(same)}
    for name, bar in _BARS.items():
        report.at_least(f"{label}: {name}", figures["ours"][name], bar)
    rows = [statistics.mean(made["search rows"] for made in side) for side in (same, theirs)]
    report.at_most(f"{label}: search rows, as a share of MobiEdit's estimator's", rows[0] / rows[1], 1 / 3)


def _edited(
    engine: Engine, method: Method, edit: WorldEdit, judge: Judge, workspace: Workspace, number: int
) -> dict[str, float]:
    """One edit in a store of its own, and the figures of the model with it."""
    request = edit.request
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder) / "adapters.db")
        record = store.add(
            "edit",
            "demo",
            model_identity(engine.gguf),
            {"prompt": request.prompt, "subject": request.subject, "target": request.target, "force": True},
        )
        record = Editor(engine, store, load_statistics(engine.gguf), method=method).run(record.id)
        workspace.apply({record.name: store.changes(record.id)})
        figures = judge.figures(edit, number)
        workspace.apply({})
    accepted = float(not record.report["reasons"])
    costs = {
        "search rows": record.report["search_rows"],
        "rows": record.report["rows"],
        "steps": float(record.report["steps"]),
        "seconds": record.report["seconds"],
    }
    return {**figures, **costs, "passed its checks": accepted}


def _means(made: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for figures in made for name in figures)
    means = {
        name: round(float(np.mean([figures[name] for figures in made if name in figures])), 4)
        for name in names
    }
    medians = {
        f"{name}, median": round(float(np.median([figures[name] for figures in made])), 2)
        for name in ("steps", "search rows", "seconds")
        if name in names
    }
    return {**means, **medians, "edits": float(len(made))}


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer edits")
    parser.add_argument("--model", choices=["Q8_0", "Q4_0"], help="instead of both")
    parser.add_argument("parts", nargs="*", choices=["single", "together", "cost", []], default=[])
    arguments = parser.parse_args()
    parts = arguments.parts or ["single", "together", "cost"]
    count = 12 if arguments.quick else 100
    report = Report("edits")
    for label, path in demo_models().items():
        if arguments.model not in (None, label):
            continue
        if "single" in parts:
            measure_single(report, label, path, count)
        if "together" in parts:
            measure_together(report, label, path, 20 if arguments.quick else 100)
    if "cost" in parts:
        from benchmarks.edits_cost import measure_cost

        measure_cost(report, 1 if arguments.quick else 3)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
