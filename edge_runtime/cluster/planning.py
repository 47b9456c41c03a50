"""From measured devices to a plan for one model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.calibration_file import Calibration
from edge_runtime.cluster.settings import Mode
from scheduler.errors import SchedulingError
from scheduler.plan import Plan, make_plan, plan_seconds
from scheduler.profiles import DeviceProfile, ModelProfile, Worker


@dataclass(frozen=True, slots=True)
class Planner:
    """What the plans of one model have in common.

    Attributes:
        model: its sizes.
        calibration: None where it was never calibrated.
        mode, quality: that plans are made for.
    """

    model: ModelProfile
    calibration: Calibration | None
    mode: Mode
    quality: float

    def plan(
        self, number: int, own: DeviceProfile, workers: Sequence[Worker], unfit: Collection[str] = ()
    ) -> Plan:
        """The best plan; workers of these names get nothing.

        Where the devices together do not hold the model, the coordinator works alone, and computes what has
        no room from the file.
        """
        able = [
            replace(worker, device=replace(worker.device, memory_bytes=0))
            if worker.device.name in unfit
            else worker
            for worker in workers
        ]
        response = self.calibration.response if self.calibration is not None else None
        try:
            return make_plan(
                self.model,
                own,
                able,
                self._importance(),
                mode=self.mode,
                response=response,
                quality=self.quality,
                number=number,
            )
        except SchedulingError as error:
            return self._from_the_file(number, own, workers, str(error))

    def seconds(self, plan: Plan, own: DeviceProfile, workers: Sequence[Worker]) -> float:
        """What a token takes under a plan with these profiles."""
        return plan_seconds(plan, self.model, own, workers, self.mode)

    def _from_the_file(self, number: int, own: DeviceProfile, workers: Sequence[Worker], why: str) -> Plan:
        roomy = replace(own, memory_bytes=self.model.total_bytes)
        plan = make_plan(self.model, roomy, (), self._importance(), number=number)
        nothing = ((),) * len(workers)
        return replace(
            plan,
            names=(own.name, *(worker.device.name for worker in workers)),
            groups=tuple((*nodes, *nothing) for nodes in plan.groups),
            head_slices=(*plan.head_slices, *nothing),
            copies=(1,) * len(workers),
            alone_seconds=None,
            bytes_held=(min(own.memory_bytes, plan.bytes_held[0]), *(0 for _ in workers)),
            reason=f"from the file, as there is not enough memory: {why}",
        )

    def _importance(self) -> NDArray[np.floating]:
        if self.calibration is None:
            return np.ones((self.model.n_layers, self.model.n_groups))
        return self.calibration.importance


def is_from_the_file(plan: Plan) -> bool:
    """Whether a plan is for a coordinator alone that has no memory for the model."""
    return plan.alone_seconds is None and plan.nodes_used == (0,)
