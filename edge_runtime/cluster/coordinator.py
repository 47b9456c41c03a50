"""The coordinator: runs a model of which other devices compute neuron groups.

Attention, KV cache and embeddings are here. Layer by layer the FFN's input is sent out, the own share is
computed meanwhile, and the others' contributions are added to the residual stream as they arrive. At sync
boundaries everything outstanding is waited for. What does not come is asked for again and, where a request
must be exact, computed here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.contributions import Contributions
from edge_runtime.cluster.exchange import Link
from edge_runtime.cluster.fills import Fills
from edge_runtime.cluster.outstanding import Outstanding, Record
from edge_runtime.cluster.pending import Pending
from edge_runtime.cluster.plan_shares import PlanShares
from edge_runtime.cluster.prefill import Prefill
from edge_runtime.cluster.prepared_adapters import PreparedAdapters, TokenAdapters
from edge_runtime.cluster.step_times import StepTimes
from edge_runtime.cluster.worker_health import WorkerHealth
from edge_runtime.engine.activations import encode, kernel_form
from edge_runtime.engine.batch import Batch, Result
from edge_runtime.engine.layer_steps import LayerSteps
from edge_runtime.engine.model import Model
from edge_runtime.engine.shares import ShareComputer
from scheduler.deadlines import Tails
from scheduler.drift import MeasuredWorker
from scheduler.patience import Meter, Response

Floats = NDArray[np.float32]

# More rows than this make a batch a part of a prompt, which travels over streams or stays here.
MAX_DATAGRAM_ROWS = 8
# Every so many tokens one contribution of each worker, to the layers and the head in turn, is computed here
# too and compared.
_CHECK_EVERY = 16


class Coordinator:
    """Stands in for `Model.forward`, under one plan. Used from the engine's thread.

    Args:
        computer: computes the shares, with the model's own thread pool.
        shares: of the plan.
        link: to the plan's workers, numbered as in the plan.
        tails: of the exchanges with them.
        prefill: computes prompts; None has them computed here alone.
        response: the model's calibration; None runs everything exactly.
        quality: that the plan was made for.
        fills: what stands for contributions until they come; None for nothing.
        health: of the nodes, by number, where the same links served another plan before.
        measured: profiles of the workers to be kept up to date; None for none.
        adapters: prepared for this plan; None for none.
        step: that the links have reached already.
    """

    def __init__(
        self,
        model: Model,
        computer: ShareComputer,
        shares: PlanShares,
        link: Link,
        tails: Tails,
        *,
        prefill: Prefill | None = None,
        response: Response | None = None,
        quality: float = 1.0,
        fills: Fills | None = None,
        health: Sequence[WorkerHealth] | None = None,
        measured: Sequence[MeasuredWorker] | None = None,
        adapters: PreparedAdapters | None = None,
        step: int = 0,
    ) -> None:
        self._model = model
        self._steps = LayerSteps(model)
        self._shares = shares
        self._link = link
        self._tails = tails
        self._prefill = prefill
        self._response = response
        self._plan_quality = quality
        self._fills = fills
        self.step = step
        self._syncs_of: dict[float, frozenset[int]] = {}
        self._forms = [kernel_form(gate) for gate, _, _ in computer.shape.types]
        self._head_form = kernel_form(computer.shape.head_type)
        n_nodes = len(shares.plan.groups[0])
        self.health = list(
            health or (WorkerHealth() for _ in range(n_nodes))
        )  # by node; that of 0 is not used
        self._working = set(shares.head_workers).union(*shares.workers)
        self._asked: set[int] = set()  # the workers that take part in this token
        self._checked: set[int] = set()  # those of them that just came or came back: all they say is compared
        for one in self.health:
            one.verified = False  # of other groups than the plan before had
        self.times = StepTimes(computer.shape.n_layers)
        self._outstanding = Outstanding(link, tails, self.health, self.times, shares.plan.names, measured)
        self.adapters: PreparedAdapters | None = None
        self._new_adapters = False  # no batch has used them
        self._token = TokenAdapters(None, {})
        self.use(adapters)

    def use(self, adapters: PreparedAdapters | None) -> None:
        """Compute with this version from the next batch on; the one before is freed."""
        before, self.adapters = self.adapters, adapters
        self._shares.sides = adapters.sides if adapters is not None else {}
        if before is not adapters:
            self._new_adapters = True
            if before is not None:
                before.close()

    @property
    def plan_shares(self) -> PlanShares:
        """Of the plan in force."""
        return self._shares

    def record(self, record: Record | None) -> None:
        """Have every contribution's fate told to somebody; None ends it."""
        self._outstanding.record = record

    @property
    def totals(self) -> Contributions:
        """What became of all contributions under this plan."""
        return self._outstanding.totals

    # --- one forward pass ---------------------------------------------------------------------

    def forward(self, batch: Batch, requests: Sequence[Contributions] = ()) -> Result:
        """Run a batch; `requests` are those that its rows belong to.

        Raises:
            RequestError, ContextOverflowError: as `Model.forward`.
            RequestError: an adapter that was not prepared.
        """
        if batch.layers or batch.groups or batch.fill or batch.add or batch.capture or batch.tokens is None:
            return self._model.forward(batch)  # measurements; from the mapped file
        self._look_after_workers()
        started = time.perf_counter()
        x = self._steps.begin(batch)
        self._token = TokenAdapters(self.adapters, self._steps.strengths)
        if self._token.version and self._new_adapters:
            self._new_adapters = False
            for one in self.health:
                one.verified = False  # of what they compute from now on
        self._asked = self._asked_workers()
        self._checked = {worker for worker in self._asked & self._working if not self.health[worker].verified}
        exact, syncs = self._patience(requests)
        self.step += 1  # one count for both links: they are of the same sessions
        n_rows = len(x)
        if n_rows > MAX_DATAGRAM_ROWS and self._prefill is not None:
            self._compute_prompt(x)
        else:
            self._outstanding.begin(self.step, self._shares, requests, exact=exact, syncs=sorted(syncs))
            self._layers(x, exact, syncs)
            self.times.end_token(time.perf_counter() - started)
        logits = self._logits(x)
        for worker in self._checked & self._outstanding.compared & self._asked_workers():
            self.health[worker].verified = True
        for request in requests:
            request.end_token()
        return Result(logits, {})

    def _compute_prompt(self, x: Floats) -> None:
        assert self._prefill is not None
        outcome = self._prefill.run(
            self.step, self._steps, self._shares, x, self._asked, self._checked, self._token
        )
        for worker in outcome.failed:
            self._outstanding.fail(worker)
        for worker, reason in outcome.wrong.items():
            self._outstanding.expel(worker, reason)

    def _layers(self, x: Floats, exact: bool, syncs: frozenset[int]) -> None:
        shares, outstanding, clock = self._shares, self._outstanding, time.perf_counter
        n_layers = len(shares.own)
        asked = self._asked if len(x) <= MAX_DATAGRAM_ROWS else set()
        for layer in range(n_layers):
            started = clock()
            residual, ffn_input = self._steps.attention(layer, x)
            np.copyto(x, residual)
            workers = shares.workers[layer]
            values = self._token.values(layer, ffn_input)
            self._ask(layer, [w for w in workers if w in asked], x, ffn_input, values, exact)
            shares.compute_own(layer, ffn_input, x, values)
            for worker in workers:
                if worker not in asked:
                    x += shares.compute(layer, worker, ffn_input, values)
                    self._outstanding.count_recomputed(1.0)
            computed = clock()
            outstanding.collect(layer + 1)
            if layer + 1 in syncs:
                outstanding.wait(layer + 1, final=layer + 1 == n_layers)
                asked = asked & self._asked_workers()
            self.times.layer(layer, computed - started, clock() - computed)
        outstanding.give_up()

    def _logits(self, x: Floats) -> Floats:
        """Logits (n_wanted, n_vocab), of which workers compute what the plan gives them."""
        shares, outstanding = self._shares, self._outstanding
        inputs = self._steps.head_input(x)
        logits = np.empty((len(inputs), shares.shape.n_vocab), np.float32)
        asked = self._asked & self._asked_workers() if len(inputs) <= MAX_DATAGRAM_ROWS else set()
        parts: dict[int, Floats] = {}
        head = shares.shape.n_layers
        values = self._token.values(head, inputs, self._steps.wanted) if len(inputs) else None
        if shares.head_workers and len(inputs):
            outstanding.begin_head(self.step, shares)
            content = self._token.content(encode(self._head_form, inputs), values)
            now = time.perf_counter()
            for worker in shares.head_workers:
                if worker not in asked:
                    continue
                target = np.zeros(len(inputs) * len(shares.head_rows(worker)), np.float32)
                parts[worker] = target.reshape(len(inputs), -1)
                resend = now + outstanding.resend_after(worker)
                compare = worker in self._checked or self._is_spot(head)
                outstanding.ask(
                    Pending(head, worker, target, inputs, now, resend, 0.0, checked=compare, values=values),
                    content,
                )
        logits[:, shares.head_rows(0)] = shares.own_logits(inputs, values)
        for worker in shares.head_workers:
            if worker not in parts:
                parts[worker] = shares.compute(head, worker, inputs, values)
        if shares.head_workers:
            outstanding.wait(shares.shape.n_layers + 1, final=True)
        for worker, part in parts.items():
            logits[:, shares.head_rows(worker)] = part
        return logits

    def _ask(
        self,
        layer: int,
        workers: list[int],
        x: Floats,
        inputs: Floats,
        values: Floats | None,
        exact: bool,
    ) -> None:
        if not workers:
            return
        content = self._token.content(encode(self._forms[layer], inputs), values)
        kept, target = inputs.copy(), x.reshape(-1)
        spot, now = self._is_spot(layer), time.perf_counter()
        for worker in workers:
            fill = None
            if self._fills is not None and not exact:
                fill = self._fills.of(self._shares.plan, layer, worker, len(x))
            pending = Pending(
                layer,
                worker,
                target,
                kept,
                now,
                now + self._outstanding.resend_after(worker),
                self._shares.share_of(layer, worker),
                fill,
                checked=worker in self._checked or spot,
                values=values,
            )
            self._outstanding.ask(pending, content)

    def _is_spot(self, layer: int) -> bool:
        """Whether this token's contributions to a layer (to the head, by its number) are all compared."""
        return self.step % (_CHECK_EVERY * (len(self._shares.own) + 1)) == layer * _CHECK_EVERY

    # --- patience -----------------------------------------------------------------------------

    def _patience(self, requests: Sequence[Contributions]) -> tuple[bool, frozenset[int]]:
        """Whether a token must be exact, and at which boundaries it waits."""
        everywhere = frozenset(range(1, len(self._shares.own) + 1))
        exact = not requests or any(request.exact for request in requests)
        # A worker's first answers are compared with ones computed here, which takes time.
        if self._response is None or exact or self._checked:
            return True, everywhere
        quality = max(request.quality for request in requests)
        shares = self._shares
        remote = [
            sum(shares.share_of(layer, worker) for worker in workers)
            for layer, workers in enumerate(shares.workers)
        ]
        syncs = self._syncs_of.get(quality)
        if syncs is None and quality <= self._plan_quality < 1:
            syncs = self._syncs_of[quality] = frozenset(shares.plan.syncs)
        if syncs is None:
            syncs = frozenset(self._response.syncs_for(max(remote), 0.0, quality))
            if len(self._syncs_of) > 16:
                self._syncs_of.clear()
            self._syncs_of[quality] = syncs
        for request in requests:
            if request.meter is None:
                request.meter = Meter(self._response, request.quality, tuple(sorted(syncs)), remote)
        return False, syncs

    # --- workers and plans --------------------------------------------------------------------

    def _asked_workers(self) -> set[int]:
        now = time.perf_counter()
        nodes = range(1, len(self.health))
        asked = [node for node in nodes if self.health[node].is_asked(now, self._link.last_seen(node))]
        return self._token.able(asked)

    def _look_after_workers(self) -> None:
        """Look for signs of life of those that are left alone."""
        now = time.perf_counter()
        for worker in range(1, len(self.health)):
            if self.health[worker].wants_ping(now):
                self._link.ping(worker)
        if any(health.is_paused for health in self.health):
            while self._link.receive(0.0) is not None:
                pass

    def close(self, after: Coordinator | None = None) -> None:
        """Free what is its own, and not used by the one after it; model and link stay. Safe to call twice."""
        self.use(None)
        self._shares.close(after._shares if after is not None else None)
        self._steps.close()
