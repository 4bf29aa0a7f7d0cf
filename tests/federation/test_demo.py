"""The demo: interrupted in every phase, and once to its end."""

from __future__ import annotations

import json

import pytest

from support.federation import ENVIRONMENT
from support.processes import wait_for

pytest.importorskip("sklearn")
pytest.importorskip("torch")


def start(processes, tmp_path, *more):
    return processes.edgetrain(
        "demo", "--clients", "2", "--rounds", "6", "--out", tmp_path / "demo", *more, env=ENVIRONMENT,
        log=tmp_path / f"demo-{len(list(tmp_path.iterdir()))}.log",
    )  # fmt: skip


def check_interrupted(demo):
    demo.note_family()
    demo.interrupt()
    assert demo.wait(20) == 130, demo.output
    assert "Traceback" not in demo.output, demo.output
    assert demo.output.count("interrupted\n") == 1
    wait_for(lambda: not demo.orphans(), "its children to end", seconds=5)


def test_interrupted_in_every_phase_and_then_run_to_its_end(processes, tmp_path):
    run = tmp_path / "demo" / "run"

    def commands(demo):
        demo.note_family()
        return [" ".join(child.cmdline()) for child in demo.family.values() if child.is_running()]

    demo = start(processes, tmp_path)
    wait_for(lambda: any("export" in command for command in commands(demo)), "the export")
    check_interrupted(demo)
    assert not list((tmp_path / "demo").glob("*.edge")), "no half-written bundle"

    demo = start(processes, tmp_path)
    wait_for(lambda: (run / "rounds.jsonl").exists() and (run / "rounds.jsonl").stat().st_size, "a round")
    assert sum(" client " in command for command in commands(demo)) == 2
    assert any("mosquitto" in command for command in commands(demo))
    check_interrupted(demo)
    assert json.loads((run / "summary.json").read_bytes())["status"] == "interrupted"

    demo = start(processes, tmp_path, "--broker", "embedded")
    assert demo.wait() == 0, demo.output
    summary = json.loads((tmp_path / "demo/summary.json").read_bytes())
    assert (summary["status"], summary["rounds"], summary["clients"]) == ("completed", 6, 2)
    assert summary["final_accuracy"] > 0.5
    assert (tmp_path / "demo/plot.png").read_bytes().startswith(b"\x89PNG")
    assert "test accuracy" in demo.output
