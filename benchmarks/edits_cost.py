"""What an edit costs on a model of TinyLlama-1.1B's shape, as whole processes.

Random weights do not converge, so each side computes a fixed number of steps: ours as many as the demo
world's median edit needs, with all that belongs to an edit (survey, search, solution, the checks before and
after); ROME by back-propagation in float32 torch 25, on the same contexts, and nothing else.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.edits_profile import median_profile
from benchmarks.engine import tiny_llama
from benchmarks.report import Report
from edge_runtime.daemon.allocator import give_memory_back
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.personalize.asking import ANSWER_TOKENS
from edge_runtime.personalize.contexts import Context
from edge_runtime.personalize.estimators import SpreadSigns
from edge_runtime.personalize.joint import Part, solve_together
from edge_runtime.personalize.objective import Objective
from edge_runtime.personalize.probes import Probes
from edge_runtime.personalize.search import State, line_search
from edge_runtime.personalize.solve import KeyCovariance, readouts
from edge_runtime.personalize.workspace import Workspace

_THREADS = 2
_LAYER = 0
_KEYS = 768
_ROME_STEPS = 25
_PROMPT_TOKENS = 256
_PLAIN_TOKENS = 64
_AT_ONCE = 512  # cells of what is generated at once, as `Workspace.generate` has it
_EDITS = 11  # of which the median is taken


def measure_cost(report: Report, rounds: int) -> None:
    """All sides in turn, each in a process of its own."""
    profile = median_profile(_EDITS).facts()
    found: dict[str, list[dict[str, float]]] = {side: [] for side in _SIDES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps(profile))
        for number in range(rounds):
            order = list(_SIDES) if number % 2 == 0 else list(_SIDES)[::-1]
            for side in order:
                found[side].append(_process(side, path))
                report.note(f"{side}: {found[side][-1]}")

    def median(side: str, name: str) -> float:
        return float(np.median([made[name] for made in found[side]]))

    report.details["cost"] = {
        "profile": {"steps": profile["steps"], "contexts": len(profile["contexts"])},
        **{side: {name: round(median(side, name), 2) for name in made[0]} for side, made in found.items()},
    }
    peak = {side: median(side, "peak MB") for side in _SIDES}
    report.at_most("peak memory, as a share of ROME's", peak["ours"] / peak["ROME"], 1 / 6)
    report.at_most(
        "wall time of the process, as a share of ROME's",
        median("ours", "seconds") / median("ROME", "seconds"),
        1.0,
    )
    report.at_most("memory beyond plain inference, as a share", peak["ours"] / peak["inference"] - 1, 0.15)


def _process(side: str, profile: Path) -> dict[str, float]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.edits_cost", side, str(profile)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    made: dict[str, float] = json.loads(output.splitlines()[-1])
    return {**made, "seconds": time.perf_counter() - started}


def _contexts(profile: dict[str, Any], n_vocab: int) -> list[Context]:
    """Random tokens in the profile's shapes."""
    generator = np.random.default_rng(0)
    return [
        Context(tuple(int(t) for t in generator.integers(3, n_vocab, length)), n_prompt, end, goal)
        for goal, length, n_prompt, end in profile["contexts"]
    ]


def _ours(profile: dict[str, Any]) -> dict[str, float]:
    with Engine.load(tiny_llama("Q4_0"), EngineOptions(threads=_THREADS)) as engine:
        _answer(engine)
        started = time.perf_counter()
        with Workspace(engine) as workspace:
            for lengths in profile["read"]:
                workspace.surprise([_tokens(length, workspace) for length in lengths])
            asked = profile["asked"]
            for call in asked[:-1]:
                _ask(workspace, call)
            searching = time.perf_counter()
            before = workspace.rows_computed
            contexts = _contexts(profile, engine.hyperparameters.n_vocab)
            probes = Probes(workspace, _LAYER, contexts)
            keys = probes.keys[[context.goal == "say" for context in contexts]]
            samples = _samples(keys.shape[1])
            covariance = KeyCovariance(samples)
            probes.read_out(readouts(covariance, keys, np.ones((len(keys), 1)))[0])
            objective = Objective(probes)
            state, estimator = State.at(objective), SpreadSigns(0)
            for step in range(profile["steps"]):
                gradient = estimator.gradient(objective, state.point, step)
                state = line_search(objective, state, gradient)
            searched = time.perf_counter() - searching
            search_rows = workspace.rows_computed - before
            part = Part("x", keys, state.point.delta.astype(np.float32))
            workspace.apply({"edit": solve_together(covariance, _LAYER, {1: [part]})[1]})
            _ask(workspace, asked[-1])
            rows = workspace.rows_computed
        return {
            "peak MB": _peak(),
            "edit seconds": time.perf_counter() - started,
            "search seconds": searched,
            "rows": rows,
            "search rows": search_rows,
        }


def _samples(width: int) -> NDArray[np.float16]:
    """Keys of ordinary text, drawn a few at a time: all of them in double precision would count as ours."""
    generator = np.random.default_rng(1)
    samples = np.empty((_KEYS, width), np.float16)
    for row in samples:
        row[:] = generator.standard_normal(width)
    return samples


def _tokens(length: int, workspace: Workspace) -> list[int]:
    generator = np.random.default_rng(length)
    return [int(token) for token in generator.integers(3, workspace.hyperparameters.n_vocab, length)]


def _ask(workspace: Workspace, call: list[tuple[int, int]]) -> None:
    """Prompts and answers of these lengths; a random model does not end by itself."""
    pending = sorted(call, key=lambda lengths: -lengths[1])
    while pending:
        taken = cells = 0
        while taken < len(pending) and (not taken or cells + pending[taken][0] + ANSWER_TOKENS <= _AT_ONCE):
            cells += pending[taken][0] + ANSWER_TOKENS
            taken += 1
        part, pending = pending[:taken], pending[taken:]
        workspace.clear()
        start = 0
        while start < len(part):
            stop, rows = start, 0
            while stop < len(part) and (stop == start or rows + part[stop][0] <= workspace.rows):
                rows += part[stop][0]
                stop += 1
            lengths = [length for length, _ in part[start:stop]]
            workspace.forward(
                Batch(
                    np.concatenate([_tokens(length, workspace) for length in lengths]),
                    np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
                    np.repeat(np.arange(start, stop, dtype=np.int32), lengths),
                    np.cumsum(lengths, dtype=np.int32) - 1,
                )
            )
            start = stop
        for step in range(part[0][1] - 1):
            live = [(number, length) for number, (length, answer) in enumerate(part) if answer > step + 1]
            if live:
                numbers = np.array([number for number, _ in live], np.int32)
                positions = np.array([length + step for _, length in live], np.int32)
                workspace.forward(Batch(np.full(len(live), 300, np.int32), positions, numbers))
    workspace.clear()


def _rome(profile: dict[str, Any]) -> dict[str, float]:
    import torch

    from benchmarks.torch_llama import TorchLlama
    from edge_runtime.engine.architecture import read_hyperparameters
    from edge_runtime.engine.gguf import GGUFFile

    torch.set_num_threads(_THREADS)
    with GGUFFile(tiny_llama("Q4_0")) as gguf:
        hyperparameters = read_hyperparameters(gguf)
        model = TorchLlama(gguf, hyperparameters)
    started = time.perf_counter()
    contexts = _contexts(profile, hyperparameters.n_vocab)
    longest = max(len(context.tokens) for context in contexts) - 1
    tokens = torch.zeros(len(contexts), longest, dtype=torch.long)
    places: list[tuple[int, int]] = []
    targets: list[int] = []
    for number, context in enumerate(contexts):
        tokens[number, : len(context.tokens) - 1] = torch.tensor(context.tokens[:-1])
        places += [(number, column) for column in range(context.n_prompt - 1, len(context.tokens) - 1)]
        targets += context.targets
    rows, columns = torch.tensor(places).T
    ends = torch.tensor([context.subject_end for context in contexts])
    with torch.no_grad():  # everything up to the edited matrix is the same in every step
        x = model.embedded(tokens)
        for layer in range(_LAYER + 1):
            x, _ = model.layer(layer, x)
    delta = torch.zeros(hyperparameters.n_embd, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=0.5)
    for _ in range(_ROME_STEPS):
        optimizer.zero_grad()
        y = x.clone()
        y[torch.arange(len(contexts)), ends] += delta
        for layer in range(_LAYER + 1, hyperparameters.n_layers):
            y, _ = model.layer(layer, y)
        loss = torch.nn.functional.cross_entropy(model.logits(y[rows, columns]), torch.tensor(targets))
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimizer.step()
    return {"peak MB": _peak(), "edit seconds": time.perf_counter() - started}


def _inference(profile: dict[str, Any]) -> dict[str, float]:
    with Engine.load(tiny_llama("Q4_0"), EngineOptions(threads=_THREADS)) as engine:
        _answer(engine)
        return {"peak MB": _peak()}


def _answer(engine: Engine) -> None:
    """Plain inference as the daemon's: a prompt of some length, and an answer."""
    give_memory_back()
    prompt = np.random.default_rng(2).integers(3, engine.hyperparameters.n_vocab, _PROMPT_TOKENS)
    list(engine.generate([int(token) for token in prompt], max_tokens=_PLAIN_TOKENS))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


_SIDES: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "inference": _inference,
    "ours": _ours,
    "ROME": _rome,
}

if __name__ == "__main__":
    print(json.dumps(_SIDES[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
