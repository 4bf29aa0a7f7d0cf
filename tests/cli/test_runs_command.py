"""`edgetrain runs`, on a real run."""

import threading
import time

import pytest
from click.testing import CliRunner

from edgetrain.cli.runs import command
from edgetrain.coordinator import events
from edgetrain.coordinator.config import EvaluationConfig, RoundsConfig, StopConfig
from edgetrain.coordinator.evaluation import Evaluation
from edgetrain.coordinator.run.past_run import PastRun
from edgetrain.edge_client.runtimes import open_session
from edgetrain.edge_client.training.data import Dataset
from edgetrain.edge_client.training.trainer import evaluate
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import EdgetrainError
from edgetrain.protocol.training import TrainingConfig
from support.in_memory import Federation, shards
from support.tiny_bundle import make_data, write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def evaluator(bundle):
    session, data = open_session(Bundle(bundle)), Dataset(*make_data(60, seed=9))

    def call(parameters):
        summary = evaluate(session, parameters, data)
        return Evaluation(summary.loss, float(summary.metrics["accuracy"]))

    return call


def settings(total=4):
    return {
        "rounds": RoundsConfig(total=total, goal=3, deadline_seconds=20),
        "training": TrainingConfig(epochs=2, batch_size=8, learning_rate=0.3),
        "codec": "dense|int8",
        "evaluation": EvaluationConfig(by_clients=False, by_clients_every=2),
        "strategy": {"name": "fedavgm", "momentum": 0.3, "inner": "median"},
        "stop": StopConfig(metric="clients.loss"),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, bundle):
    federation = Federation(tmp_path_factory.mktemp("federation"), bundle, shards([24, 12, 20]))
    coordinator = federation.coordinator(evaluate=evaluator(bundle), **settings())
    federation.start()
    summary = coordinator.run()
    federation.finish()
    return federation.directory / "run", summary


def invoke(*arguments):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(command, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_and_show(run):
    path, summary = run
    assert "fedavgm(median)" in invoke("list", path.parent).replace("\n", "")
    shown = invoke("show", path, "--clients")
    assert "strategy fedavgm(median), completed, 4 of 4 rounds" in shown
    assert f"best by clients.loss: round {summary.best_round}" in shown
    assert "fairness" in shown
    assert "client-2" in shown


def test_evaluations_by_the_clients_are_kept(run):
    path, summary = run
    past = PastRun.open(path)
    assert [evaluation.round for evaluation in past.evaluations] == [2, 4]
    assert [client.client for client in past.evaluations[0].clients] == ["client-0", "client-1", "client-2"]
    losses = {e.round: e.spread["loss"].mean for e in past.evaluations}
    assert past.best_round == summary.best_round == min(losses, key=losses.get)
    kept = path / "parameters" / f"round-{summary.best_round:05d}.safetensors"
    assert (path / "best.safetensors").read_bytes() == kept.read_bytes()


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot(run, tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"plot.{suffix}"
    assert str(out) in invoke("plot", run[0], "-o", out).replace("\n", "")
    assert out.read_bytes().startswith(magic)


def test_errors_say_what_is_wrong(run, tmp_path):
    for arguments, message in (
        (["show", tmp_path], "holds no run"),
        (["list", tmp_path], "holds no run"),
        (["pause", tmp_path / "nowhere"], "holds no run"),
        (["plot", run[0], "-o", tmp_path / "plot.txt"], "ends in .png"),
    ):
        with pytest.raises(EdgetrainError, match=message):
            invoke(*arguments)


def test_pause_resume_stop_and_go_on(tmp_path, bundle):
    federation = Federation(tmp_path, bundle, shards([24, 12, 20]))
    path, paused, closed = tmp_path / "run", threading.Event(), []

    def observe(event):
        if isinstance(event, events.RoundEnded):
            closed.append(event.record.round)
            if event.record.round == 2:
                invoke("pause", path)
            if event.record.round == 4:
                invoke("stop", path)
        if isinstance(event, events.Paused):
            paused.set()

    def resume():
        assert paused.wait(20)
        assert PastRun.open(path).status == "paused"
        time.sleep(0.1)
        assert closed == [1, 2]
        invoke("resume", path)

    helper = threading.Thread(target=resume)
    coordinator = federation.coordinator(observe=observe, **settings(total=6))
    federation.start()
    helper.start()
    summary = coordinator.run()
    helper.join()
    federation.finish()
    assert closed == [1, 2, 3, 4]
    assert summary.status == "stopped"
    assert PastRun.open(path).status == "stopped"
    federation.reopen()
    again = federation.coordinator(**settings(total=6))
    federation.start()
    assert again.run().status == "completed"
    federation.finish()
    assert [record.round for record in PastRun.open(path).records] == [1, 2, 3, 4, 5, 6]
