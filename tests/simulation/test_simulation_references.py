"""SCAFFOLD, FedNova and FedProx against the papers' algorithms, written out in float64 numpy."""

import numpy as np
import pytest

from edgetrain.coordinator.clients.roster import select_random
from edgetrain.edge_client.runtimes import open_session
from edgetrain.edge_client.training.data import Dataset
from edgetrain.edge_client.training.trainer import batches
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.training import TrainingConfig
from edgetrain.simulation import SimulationConfig, simulate
from support.tiny_bundle import initial_parameters, make_data, reference_step, write_tiny_bundle

SIZES, ROUNDS, RATE = (24, 7, 13, 4), 4, 0.3
SHARDS = [make_data(size, seed=50 + number) for number, size in enumerate(SIZES)]
SEED = 3


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return open_session(Bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")))


def run(session, strategy, training, *, per_round=4, codec="dense|float32", rounds=ROUNDS, **more):
    config = SimulationConfig(
        rounds=rounds,
        clients_per_round=per_round,
        training=training,
        strategy=strategy,
        codec=codec,
        seed=SEED,
        **more,
    )
    shards = [Dataset(*shard) for shard in SHARDS]
    return list(simulate(session, initial_parameters(), shards, Dataset(*make_data(40, seed=9)), config))


def gradient(parameters, client, indices):
    """Mean gradient, float64."""
    x, y = SHARDS[client]
    step = reference_step(parameters, x[indices], y[indices], np.ones(len(indices)))
    return step.gradients / step.weight_sum


def order(client, round_number, training):
    """The batches that the client draws; the seed is the simulation's."""
    return batches(SIZES[client], training, SEED + 1_000_003 * round_number + client)


def chosen_clients(results, session, strategy, training, per_round):
    """Who took part is visible in who was sent to: the same generator as the simulation's."""
    names = [f"client-{number:05d}" for number in range(len(SIZES))]
    return [
        [int(name[-5:]) for name in select_random(names, per_round, seed=SEED, round_number=n, attempt=1)]
        for n in range(1, len(results) + 1)
    ]


@pytest.mark.parametrize("per_round", [4, 2])
def test_scaffold_is_algorithm_1_with_option_2(session, per_round):
    training = TrainingConfig(epochs=2, batch_size=6, learning_rate=RATE)
    strategy = {"name": "scaffold", "num_clients": 4, "learning_rate": 0.8}
    results = run(session, strategy, training, per_round=per_round)
    x = initial_parameters().astype(np.float64)
    c, own = np.zeros_like(x), [np.zeros_like(x) for _ in SIZES]
    for number, chosen in enumerate(chosen_clients(results, session, strategy, training, per_round), 1):
        deltas, changes = [], []
        for i in chosen:
            y, steps = x.copy(), 0
            for indices in order(i, number, training):
                y -= RATE * (gradient(y, i, indices) - own[i] + c)
                steps += 1
            new = own[i] - c + (x - y) / (steps * RATE)
            deltas.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x = x + 0.8 * np.mean(deltas, axis=0)
        c = c + np.sum(changes, axis=0) / 4
        np.testing.assert_allclose(results[number - 1].parameters, x, rtol=2e-4, atol=2e-5)
    assert np.abs(c).max() > 0.01


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_fednova_is_equation_6(session, momentum, mu):
    """With the a_i written out as vectors, which the implementation never does."""
    training = TrainingConfig(epochs=3, batch_size=5, learning_rate=0.1, momentum=momentum, proximal_mu=mu)
    results = run(session, "fednova", training)
    x = initial_parameters().astype(np.float64)
    shares = np.array(SIZES) / sum(SIZES)
    for number in range(1, ROUNDS + 1):
        directions, norms = [], []
        for i in range(len(SIZES)):
            y, velocity, gradients = x.copy(), np.zeros_like(x), []
            coefficients, v = [], []
            for indices in order(i, number, training):
                g = gradient(y, i, indices)
                gradients.append(g)
                # How much each gradient so far is in the velocity and in the distance gone, over the rate.
                gone = np.array([*coefficients, 0.0])
                v = momentum * np.array([*v, 0.0]) - 0.1 * mu * gone
                v[-1] += 1
                coefficients = list(gone + v)
                velocity = momentum * velocity + g + mu * (y - x)
                y = y - 0.1 * velocity
            a = np.array(coefficients)
            np.testing.assert_allclose(y - x, -0.1 * np.array(gradients).T @ a, atol=1e-12)
            if momentum and not mu:
                tau = len(a)
                closed = (1 - momentum ** np.arange(tau, 0, -1)) / (1 - momentum)
                np.testing.assert_allclose(a, closed)
            directions.append(np.array(gradients).T @ a / np.abs(a).sum())
            norms.append(np.abs(a).sum())
        effective = shares @ norms
        x = x - effective * 0.1 * (shares @ directions)
        np.testing.assert_allclose(results[number - 1].parameters, x, rtol=2e-4, atol=2e-5)


def test_fedprox_is_algorithm_2(session):
    training = TrainingConfig(epochs=2, batch_size=5, learning_rate=RATE)
    results = run(session, {"name": "fedprox", "mu": 0.7}, training)
    x = initial_parameters().astype(np.float64)
    for number in range(1, ROUNDS + 1):
        ends = []
        for i in range(len(SIZES)):
            y = x.copy()
            for indices in order(i, number, training):
                y = y - RATE * (gradient(y, i, indices) + 0.7 * (y - x))
            ends.append(y)
        x = np.average(ends, axis=0, weights=SIZES)
        np.testing.assert_allclose(results[number - 1].parameters, x, rtol=2e-4, atol=2e-5)


def test_fedsgd_is_gradient_descent_on_all_data(session):
    results = run(session, "fedsgd", TrainingConfig(epochs=9, batch_size=2, learning_rate=RATE, momentum=0.9))
    x = initial_parameters().astype(np.float64)
    inputs, targets = (np.concatenate(parts) for parts in zip(*SHARDS, strict=True))
    for result in results:
        step = reference_step(x, inputs, targets, np.ones(len(targets)))
        x = x - RATE * step.gradients / step.weight_sum
        np.testing.assert_allclose(result.parameters, x, rtol=2e-4, atol=2e-5)


def test_personal_parts_stay_where_they_were(session):
    results = run(session, "fedavg", TrainingConfig(learning_rate=RATE), personal=("second.*",))
    start, mask = initial_parameters(), np.r_[np.zeros(42, bool), np.ones(24, bool)]
    np.testing.assert_array_equal(results[-1].parameters[mask], start[mask])
    assert (results[-1].parameters[~mask] != start[~mask]).all()


def test_the_same_seed_gives_the_same_bytes(session):
    training = TrainingConfig(epochs=2, batch_size=6, learning_rate=RATE)
    first, again = (run(session, "scaffold", training, codec="topk:0.3|int8:stochastic") for _ in range(2))
    assert first[-1].parameters.tobytes() == again[-1].parameters.tobytes()


def test_refused_updates_return_to_their_clients(session):
    """A client whose updates are refused for a while loses nothing: its residual holds it all."""
    training = TrainingConfig(learning_rate=RATE, batch_size=64)
    strategy = {"name": "norm-bound", "max_norm": 1e-6, "action": "refuse"}
    results = run(session, strategy, training, rounds=2)
    assert all(len(result.refused) == 4 for result in results)
    assert "allowed is 1e-06" in results[0].refused["client-00000"]
    np.testing.assert_array_equal(results[-1].parameters, initial_parameters())
