"""Makes an edit: from what was asked for to low-rank changes that have passed their checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.engine import Engine
from edge_runtime.errors import RequestError
from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize.asking import Asker
from edge_runtime.personalize.checks import Check, Examination
from edge_runtime.personalize.contexts import choose_contexts
from edge_runtime.personalize.estimators import Estimator, SpreadSigns
from edge_runtime.personalize.forget import survey_forget
from edge_runtime.personalize.joint import Part, parts_of, solution_of, solve_together, subjects_of
from edge_runtime.personalize.objective import Objective
from edge_runtime.personalize.probes import Probes
from edge_runtime.personalize.progress import Progress, Report
from edge_runtime.personalize.records import Applied, Record
from edge_runtime.personalize.request import EditRequest
from edge_runtime.personalize.resume import Kept, Spent, from_bytes, to_bytes
from edge_runtime.personalize.search import Budget, Rule, State, line_search, search
from edge_runtime.personalize.solve import KeyCovariance, readouts
from edge_runtime.personalize.statistics import EditStatistics
from edge_runtime.personalize.store import AdapterStore
from edge_runtime.personalize.survey import Survey, survey_edit
from edge_runtime.personalize.workspace import Workspace

_MAY_RETURN = ("rejected", "reverted")
_KEEP_SECONDS = 2.0  # between two writes of a search's state

NewEstimator = Callable[[int], Estimator]


@dataclass(frozen=True, slots=True)
class Method:
    """How an edit's change is found; the default is what is best.

    Attributes:
        estimator: makes an estimator for a seed.
    """

    estimator: NewEstimator = SpreadSigns
    rule: Rule = line_search
    budget: Budget = field(default_factory=Budget)


class Editor:
    """Makes, undoes and checks the edits of one loaded model.

    Args:
        store: where edits are kept; they are read from it and written to it.
        statistics: of the model.
        turn: held during each forward pass, so that answers can be computed in between.

    Attributes:
        identity: of the model's file.
        covariance: of the statistics' keys.
    """

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        statistics: EditStatistics,
        *,
        turn: Callable[[], AbstractContextManager[object]] = nullcontext,
        method: Method | None = None,
    ) -> None:
        self.engine = engine
        self.store = store
        self.statistics = statistics
        self._turn = turn
        self.method = method or Method()
        self.identity = model_identity(engine.gguf)
        self.covariance = KeyCovariance(statistics.keys)

    def run(self, record_id: int, progress: Report = lambda progress: None) -> Record:
        """Make a queued edit, or go on with one that was interrupted; it is applied or rejected then.

        What `progress` raises ends it between two steps, and `run` can go on with it later.

        Raises:
            AdapterNotFoundError: there is none.
            RequestError: it has ended, is of another model, or asks for something impossible, such as what
                the model says already.
            ContextOverflowError: a prompt is too long.
        """
        record = self.store.get(str(record_id))
        if record.identity != self.identity:
            raise RequestError(f"{record.name} is of the model {record.model!r}, another one is loaded")
        if record.state != "running":
            self.store.begin(record_id)
        with Workspace(self.engine, turn=self._turn) as workspace:
            return _Edit(self, workspace, record, progress).run()

    def revert(self, record_id: int) -> Record:
        """Undo an applied edit, and solve those that stand without it.

        Raises:
            AdapterNotFoundError, RequestError: there is none, or it is not applied.
        """
        while True:
            applied = self.store.applied(self.identity, solutions=True)
            standing = {number: s for number, s in applied.solutions.items() if number != record_id}
            solved = self.solved(replace(applied, solutions=standing), {})
            if self.store.revert(record_id, solved, applied.revision):
                return self.store.get(str(record_id))

    def reapply(self, record_id: int) -> Record:
        """Apply a rejected or reverted edit as it was found, solved with those that stand.

        Raises:
            AdapterNotFoundError: there is none.
            RequestError: it is of another model or in another state, or one of the same subject was applied
                since, which was found without it.
        """
        record = self.store.get(str(record_id))
        solution = self.store.solution(record_id)
        if record.identity != self.identity or solution is None or record.state not in _MAY_RETURN:
            raise RequestError(
                f"{record.name} is {record.state}; only what was rejected or undone of the model that is "
                "loaded can be applied; ask for it anew"
            )
        while True:
            applied = self.store.applied(self.identity, solutions=True)
            _check_since(record, applied.records)
            solved = {record_id: self.store.changes(record_id)}
            if solution.layer == self.statistics.layer:
                solved = self.solved(applied, {record_id: parts_of(record, solution)})
            if self.store.finish(record_id, "applied", record.report, solution, solved, applied.revision):
                return self.store.get(str(record_id))

    def evaluate(self, record_id: int) -> list[Check]:
        """The checks of an applied edit once more, against the model without it.

        Raises:
            AdapterNotFoundError: there is none. RequestError: it is not applied.
        """
        record = self.store.get(str(record_id))
        if record.state != "applied" or record.kind == "lora":
            raise RequestError(
                f"{record.name} is {record.state}; only an edit that is applied can be checked"
            )
        with Workspace(self.engine, turn=self._turn) as workspace:
            return _Edit(self, workspace, record, lambda progress: None).examine_again()

    def solved(self, applied: Applied, new: Mapping[int, Sequence[Part]]) -> dict[int, tuple[LowRank, ...]]:
        """Changes of all standing edits in the edit layer, together with new ones: id -> changes."""
        by_id = {record.id: record for record in applied.records}
        edits: dict[int, Sequence[Part]] = {
            number: parts_of(by_id[number], solution)
            for number, solution in applied.solutions.items()
            if solution.layer == self.statistics.layer
        }
        return solve_together(self.covariance, self.statistics.layer, {**edits, **new})


def _check_since(record: Record, standing: Sequence[Record]) -> None:
    """Whether none that stands was applied to one of its subjects since it was rejected or undone.

    Raises:
        RequestError: one was.
    """
    subjects = set(subjects_of(record.request))
    for other in standing:
        shared = subjects.intersection(subjects_of(other.request)) if other.kind != "lora" else ()
        for subject in shared:
            if other.changed > record.changed:
                raise RequestError(
                    f"{other.name} was applied since, and is about {subject!r} too: revert that one first"
                )


class _Edit:
    """One edit on its way."""

    def __init__(self, editor: Editor, workspace: Workspace, record: Record, progress: Report) -> None:
        statistics = editor.statistics
        self._editor = editor
        self._method = editor.method
        self._store = editor.store
        self._workspace = workspace
        self._record = record
        self._layer = statistics.layer
        self._report = progress
        self._started = time.monotonic()
        self._last_kept = 0.0
        self._before_search = self._searched = Spent()
        self._contexts = {"say": 0, "keep": 0}  # that were computed in each step
        self._asker = Asker(workspace, statistics.templates, statistics.usual, editor.engine.chat_template)
        self._applied = self._store.applied(editor.identity, solutions=True)
        kept = self._store.progress(record.id)
        self._kept = from_bytes(kept) if kept is not None else Kept()

    def run(self) -> Record:
        self._tell("preparing")
        self._workspace.apply({r.name: self._applied.changes[r.name] for r in self._applied.records})
        surveys = self._surveys()
        examination = Examination(self._asker, surveys, self._generator(1))
        parts, states = [], []
        self._before_search = self._now()
        for number, survey in enumerate(surveys):
            part, state = self._search(number, survey)
            parts.append(part)
            states.append(state)
        self._searched = self._searching()
        return self._finish(parts, states, examination)

    def examine_again(self) -> list[Check]:
        everything = {r.name: self._applied.changes[r.name] for r in self._applied.records}
        without = {name: changes for name, changes in everything.items() if name != self._record.name}
        self._workspace.apply(without)
        examination = Examination(self._asker, self._surveys(), self._generator(1))
        self._workspace.apply(everything)
        return examination.checks()

    def _generator(self, use: int) -> np.random.Generator:
        """Random numbers that are the same when the edit goes on after a restart."""
        return np.random.Generator(np.random.Philox(key=self._record.id, counter=[0, 0, 3, use]))

    def _now(self) -> Spent:
        """What this run has spent."""
        return Spent(time.monotonic() - self._started, self._workspace.rows_computed)

    def _spent(self) -> Spent:
        """By this run and those that were interrupted."""
        return self._kept.spent + self._now()

    def _searching(self) -> Spent:
        """Of that, since the searches began."""
        return self._kept.searching + self._now() - self._before_search

    def _tell(self, stage: Any, **values: Any) -> None:
        spent = self._spent()
        self._report(Progress(stage, rows=spent.rows, seconds=spent.seconds, **values))

    def _surveys(self) -> list[Survey]:
        request = self._record.request
        if self._record.kind == "forget":
            return survey_forget(self._asker, request, self._generator(2))
        wanted = EditRequest(
            request["prompt"], request["subject"], request["target"], tuple(request.get("paraphrases", ()))
        )
        return [survey_edit(self._asker, wanted)]

    # --- searching ----------------------------------------------------------------------------

    def _search(self, number: int, survey: Survey) -> tuple[Part, State]:
        """Find what one subject needs."""
        statistics = self._editor.statistics
        contexts = choose_contexts(self._asker, survey, statistics.sentences, self._generator(10 + number))
        for context in contexts:
            self._contexts[context.goal] += 1
        probes = Probes(self._workspace, self._layer, contexts)
        keys = probes.keys[[context.goal == "say" for context in contexts]]
        probes.read_out(readouts(self._editor.covariance, keys, np.ones((len(keys), 1)))[0])
        objective = Objective(probes)
        state = self._kept.state_of(number, objective)
        budget = self._budget()

        def after_step(state: State) -> None:
            self._keep(number, state)
            likelihood = state.point.values[objective.says][0]
            try:
                self._tell(
                    "searching",
                    step=state.step,
                    steps=budget.steps,
                    loss=state.point.loss,
                    probability=float(np.exp(-likelihood)),
                )
            except BaseException:  # whoever stops an edit in order loses nothing of it
                self._keep(number, state, at_once=True)
                raise

        state = search(
            objective,
            self._method.estimator(self._record.id),
            budget,
            rule=self._method.rule,
            state=state,
            after_step=after_step,
        )
        self._keep(number, state, at_once=True)
        return Part(survey.subject, keys, state.point.delta.astype(np.float32)), state

    def _budget(self) -> Budget:
        """What is left of it: the steps are each search's, the time is for all of them."""
        request, budget = self._record.request, self._method.budget
        steps, seconds = (request.get("steps") or budget.steps), (request.get("seconds") or budget.seconds)
        return replace(budget, steps=steps, seconds=seconds - self._searching().seconds)

    def _keep(self, number: int, state: State, *, at_once: bool = False) -> None:
        """Write the search's state down now and then, so that a restart loses little."""
        self._kept = self._kept.with_state(number, state)
        now = time.monotonic()
        if at_once or now - self._last_kept >= _KEEP_SECONDS:
            self._last_kept = now
            kept = replace(self._kept, spent=self._spent(), searching=self._searching())
            self._store.keep_progress(self._record.id, state.step, to_bytes(kept))

    # --- finishing ----------------------------------------------------------------------------

    def _finish(self, parts: list[Part], states: list[State], examination: Examination) -> Record:
        """Solve with all that stands, check, and keep; again where what stands has changed meanwhile."""
        record = self._record
        solution = solution_of(self._layer, parts)
        while True:
            self._tell("solving")
            applied = self._store.applied(self._editor.identity, solutions=True)
            solved = self._editor.solved(applied, {record.id: parts})
            names = {other.id: other.name for other in (*applied.records, record)}
            everything = {**applied.changes, **{names[number]: changes for number, changes in solved.items()}}
            self._workspace.apply(everything)
            self._tell("checking")
            checks = examination.checks()
            reasons = [check.reason for check in checks if not check.passed]
            passed = not reasons or bool(record.request.get("force"))
            report = self._facts(checks, reasons, states)
            if passed:
                done = self._store.finish(record.id, "applied", report, solution, solved, applied.revision)
            else:
                own = {record.id: solved[record.id]}
                done = self._store.finish(record.id, "rejected", report, solution, own)
            if done:
                return self._store.get(str(record.id))

    def _facts(self, checks: list[Check], reasons: list[str], states: list[State]) -> dict[str, Any]:
        return {
            "checks": [check.facts() for check in checks],
            "reasons": reasons,
            "steps": sum(state.step for state in states),
            "loss": float(np.mean([state.point.loss for state in states])),
            "rows": self._spent().rows,
            "search_rows": self._searched.rows,
            "seconds": self._spent().seconds,
            "layer": self._layer,
            "contexts": self._contexts,
            "memory_bytes": self._workspace.nbytes,
        }
