"""``edgert doctor`` on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from program import Program

from edge_runtime.cli.doctor.software import _FEATURES, _cpu_features, _cpu_flags


def test_every_finding_has_its_advice(edgert: Program, demo_model: Path) -> None:
    done = edgert("doctor", "--json")
    findings = {finding["subject"]: finding for finding in done.json["findings"]}
    assert {
        "CPU",
        "memory",
        "disk",
        "versions",
        "llama-cpp-python",
        "CPU features used",
        "kernels",
        "trial",
    } <= set(findings)
    for finding in findings.values():
        assert finding["found"]
        assert bool(finding["advice"]) == (finding["level"] != "ok")
    assert done.json["ok"] == all(finding["level"] != "fault" for finding in findings.values())
    assert done.code == (0 if done.json["ok"] else 1)
    assert findings["trial"]["level"] == "ok"
    assert "tokens/s" in findings["trial"]["found"]


def test_table_ends_with_the_counts(edgert: Program) -> None:
    done = edgert("doctor")
    assert done.err == ""
    assert done.out.splitlines()[-1].endswith(("notes", "note"))
    assert max(map(len, done.out.splitlines())) <= 110


def test_place_that_cannot_be_written_is_a_fault(edgert: Program) -> None:
    done = edgert("doctor", "--json", environment={"EDGERT_HOME": "/proc/nowhere"})
    (disk,) = (finding for finding in done.json["findings"] if finding["subject"] == "disk")
    assert disk["level"] == "fault"
    assert "EDGERT_HOME" in disk["advice"]
    assert done.code == 1


def test_kernels_for_another_cpu_are_a_fault() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux says what a CPU can do")
    flags = _cpu_flags()
    assert flags
    everything = {name: flag in flags for name, (flag, _) in _FEATURES.items()}
    assert _cpu_features(everything, "1").level == "ok"
    needed = next(name for name, (flag, matters) in _FEATURES.items() if matters and flag in flags)
    without = _cpu_features({**everything, needed: False}, "1")
    assert (without.level, needed in without.found) == ("fault", True)
    absent = next(name for name, there in everything.items() if not there)
    crashing = _cpu_features({**everything, absent: True}, "1")
    assert crashing.level == "fault"
    assert "would crash" in crashing.found


def test_doctor_leaves_the_store_alone(edgert: Program, tmp_path: Path) -> None:
    edgert("doctor")
    assert not edgert.home.exists()
