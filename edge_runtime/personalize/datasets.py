"""Facts to be edited, in the files that research on editing shares, and how the editor does on them.

CounterFact [2202.05262] is read as its authors published it and as later collections flattened it, zsRE
[1706.04115] as MEND [2110.11309] did. All are JSON lists of objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edge_runtime.engine.engine import Engine
from edge_runtime.errors import EdgeRuntimeError, RequestError
from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize.editor import Editor
from edge_runtime.personalize.request import find_name
from edge_runtime.personalize.statistics import EditStatistics
from edge_runtime.personalize.store import AdapterStore
from edge_runtime.personalize.workspace import Workspace

_MAX_BYTES = 1 << 28
_ANSWER_TOKENS = 16
_MAX_PROMPTS = 8  # of one kind, of one item


@dataclass(frozen=True, slots=True)
class Item:
    """A fact to be edited, and what is asked afterwards.

    Attributes:
        paraphrases: prompts that the target continues too; the editor is not told of them.
        others: prompts about others, whose answers are to stay.
    """

    prompt: str
    subject: str
    target: str
    paraphrases: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item.

    Attributes:
        error: why no edit was made; empty otherwise, and all figures are of made ones.
        passed: whether the edit passed its own checks; the figures are with it in any case.
        success, paraphrases: (before, after) share of answers that begin with the target.
        others: share of answers that stayed.
        steps, rows, seconds: that it took.
    """

    error: str = ""
    passed: bool = False
    success: tuple[float, float] = (0.0, 0.0)
    paraphrases: tuple[float, float] | None = None
    others: float | None = None
    steps: int = 0
    rows: float = 0.0
    seconds: float = 0.0


# --- reading ------------------------------------------------------------------------------------


def read_dataset(path: Path, most: int | None = None) -> list[Item]:
    """The items of a file, in its order; those whose prompt does not name its subject are left out.

    Args:
        most: so many at most.

    Raises:
        RequestError: it is no such file, or has no item that can be edited. OSError: it cannot be read.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise RequestError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_BYTES} are read")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{path} is no JSON ({str(error)[:80]}); needed is a CounterFact or zsRE file"
        ) from error
    if not isinstance(content, list):
        raise RequestError(f"{path} holds no list; needed is a CounterFact or zsRE file")
    found = []
    for number, values in enumerate(content):
        try:
            item = item_of(values)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise RequestError(
                f"item {number} of {path} has neither CounterFact's fields nor zsRE's ({error!r:.60})"
            ) from error
        if find_name(item.prompt, item.subject) is not None:
            found.append(item)
        if len(found) == most:
            break
    if not found:
        raise RequestError(f"{path} has no item whose prompt names its subject; there is nothing to edit")
    return found


def item_of(values: Mapping[str, Any]) -> Item:
    """One object of a file.

    Raises:
        KeyError, TypeError, AttributeError, IndexError: it is none.
    """
    if "requested_rewrite" in values:  # CounterFact, as published
        rewrite = values["requested_rewrite"]
        prompt = rewrite["prompt"].format(rewrite["subject"])
        texts = (prompt, rewrite["subject"], rewrite["target_new"]["str"])
        return _item(texts, values["paraphrase_prompts"], values["neighborhood_prompts"])
    if "target_new" in values:
        texts = (values["prompt"], values["subject"], values["target_new"])
        return _item(texts, [values["rephrase_prompt"]], [values["locality_prompt"]])
    texts = (values["src"], values["subject"], values["alt"])
    return _item(texts, [values["rephrase"]], [values["loc"].removeprefix("nq question: ")])


def _item(texts: tuple[str, str, str], paraphrases: Sequence[str], others: Sequence[str]) -> Item:
    prompt, subject, target = (text.strip() for text in texts)
    return Item(
        prompt,
        subject,
        target,
        tuple(text.strip() for text in paraphrases[:_MAX_PROMPTS]),
        tuple(text.strip() for text in others[:_MAX_PROMPTS]),
    )


def demo_items(path: Path, count: int, seed: int = 0) -> list[Item]:
    """Facts that the demo model knows, each with another object, over all its relations in turn.

    Args:
        path: of ``facts.json``, which comes with the model.
    """
    facts = json.loads(path.read_text("utf-8"))
    people = facts["people"]
    relations = {name: values for name, values in facts["relations"].items() if name in people[0]}
    generator = np.random.Generator(np.random.Philox(key=seed))
    found = []
    for number in range(count):
        name = list(relations)[number % len(relations)]
        wordings, kind = relations[name]["statements"], relations[name]["object_type"]
        chosen, *others = (people[i] for i in generator.choice(len(people), 5, replace=False))
        targets = [one for one in facts["candidates"][kind] if one != chosen[name]]
        found.append(
            Item(
                wordings[0].format(s=chosen["name"]),
                chosen["name"],
                str(generator.choice(targets)),
                tuple(wording.format(s=chosen["name"]) for wording in wordings[1:]),
                tuple(wordings[0].format(s=other["name"]) for other in others),
            )
        )
    return found


# --- evaluating ---------------------------------------------------------------------------------


def evaluate_items(
    engine: Engine,
    statistics: EditStatistics,
    items: Sequence[Item],
    progress: Callable[[int, Outcome], None] = lambda number, outcome: None,
    *,
    turn: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Outcome]:
    """Edit each fact alone, ask, and undo it; the device's own edits are not touched.

    Args:
        progress: called after each item with the number of those done.
    """
    found: list[Outcome] = []
    with TemporaryDirectory(prefix="edgert-") as folder, Workspace(engine, turn=turn) as workspace:
        store = AdapterStore(Path(folder) / "adapters.db")
        editor = Editor(engine, store, statistics, turn=turn)
        for item in items:
            try:
                outcome = _evaluate(editor, store, workspace, item, model_identity(engine.gguf))
            except EdgeRuntimeError as error:
                outcome = Outcome(error=str(error))
            found.append(outcome)
            progress(len(found), outcome)
    return found


def _evaluate(
    editor: Editor, store: AdapterStore, workspace: Workspace, item: Item, identity: str
) -> Outcome:
    asked = {"prompt": item.prompt, "subject": item.subject, "target": item.target, "paraphrases": []}
    record = store.add("edit", "evaluated", identity, {**asked, "force": True})
    workspace.apply({})
    before = _answers(workspace, item)
    made = editor.run(record.id)
    try:
        workspace.apply({made.name: store.changes(made.id)})
        after = _answers(workspace, item)
    finally:
        editor.revert(made.id)
    n_paraphrases = len(item.paraphrases)
    begins = [[_begins(answer, item.target) for answer in answers] for answers in (before, after)]
    paraphrases = [float(np.mean(one[1 : 1 + n_paraphrases])) for one in begins if n_paraphrases]
    stays = [a == b for a, b in zip(before[1 + n_paraphrases :], after[1 + n_paraphrases :], strict=True)]
    report = made.report
    return Outcome(
        passed=not report.get("reasons"),
        success=(float(begins[0][0]), float(begins[1][0])),
        paraphrases=(paraphrases[0], paraphrases[1]) if paraphrases else None,
        others=float(np.mean(stays)) if stays else None,
        steps=int(report["steps"]),
        rows=float(report["rows"]),
        seconds=float(report["seconds"]),
    )


def _answers(workspace: Workspace, item: Item) -> list[str]:
    prompts = (item.prompt, *item.paraphrases, *item.others)
    tokens = [workspace.tokenizer.encode(prompt) for prompt in prompts]
    return [workspace.tokenizer.decode(a).strip() for a in workspace.generate(tokens, _ANSWER_TOKENS)]


def _begins(answer: str, target: str) -> bool:
    """Whether an answer begins with the target, as whole words."""
    rest = answer[len(target) :]
    return answer.startswith(target) and not (rest[:1].isalnum() and target[-1:].isalnum())


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over all items; an item of which no edit was made counts as failed where an edit would count."""
    made = [outcome for outcome in outcomes if not outcome.error]

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if values else None

    paraphrases = [outcome.paraphrases for outcome in made if outcome.paraphrases is not None]
    return {
        "items": len(outcomes),
        "made": len(made),
        "passed": mean([float(one.passed) for one in outcomes]),
        "success_before": mean([one.success[0] for one in made]),
        "success": mean([one.success[1] for one in outcomes]),
        "paraphrases_before": mean([before for before, _ in paraphrases]),
        "paraphrases": mean([after for _, after in paraphrases]),
        "others": mean([one.others for one in made if one.others is not None]),
        "steps": mean([float(one.steps) for one in made]),
        "rows": mean([one.rows for one in made]),
        "seconds": mean([one.seconds for one in made]),
        "errors": [one.error for one in outcomes if one.error],
    }
