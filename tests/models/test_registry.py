import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from edgetrain.models import MODELS, ModelError, get_model
from support.learning import call

SMALL = {"batch_size": 2}


def test_unknown_name_lists_the_names():
    with pytest.raises(ModelError, match=r"no model 'resnet-9'.*digits-cnn"):
        get_model("resnet-9")


def test_unknown_option_lists_the_options():
    with pytest.raises(ModelError, match=r"does not take depth; it takes seed, batch_size"):
        get_model("digits-cnn", depth=3)


@pytest.mark.parametrize("batch_size", [0, 100_000])
def test_impossible_batch_size_is_refused(batch_size):
    with pytest.raises(ModelError, match="batch_size is"):
        get_model("digits-cnn", batch_size=batch_size)


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_weights_and_the_callers_random_state_is_kept(name):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = get_model(name, **SMALL).module.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    second = get_model(name, **SMALL).module.state_dict()
    other = get_model(name, seed=1, **SMALL).module.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
def test_example_batch_runs_and_every_parameter_gets_a_gradient(name):
    torch.set_num_threads(1)
    module, loss, (inputs, targets) = get_model(name, **SMALL)
    losses = loss(call(module, inputs), targets)
    assert losses.shape == targets.shape
    assert losses.dtype == torch.float32
    assert bool(torch.isfinite(losses).all())
    losses.sum().backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(torch.isfinite(parameter.grad).all()), parameter_name
        assert bool(parameter.grad.any()) or parameter_name.endswith("bias"), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_docstring_states_the_number_of_parameters(name):
    doc = importlib.import_module(MODELS[name].partition(":")[0]).__doc__
    stated = int(re.search(r"\| parameters \| ([\d,]+)", doc)[1].replace(",", ""))
    assert sum(p.numel() for p in get_model(name, **SMALL).module.parameters()) == stated


@pytest.mark.parametrize("imported", ["edgetrain.models", "edgetrain.models.data"])
def test_imports_no_torch_and_no_scikit_learn(imported):
    program = (
        f"import sys, {imported}, edgetrain.models.data as data; data.digits()\n"
        "print(sorted({'torch', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_example_batch_is_a_copy_in_torch():
    _, _, (inputs, targets) = get_model("digits-cnn", **SMALL)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    np.testing.assert_array_equal(get_model("digits-cnn", **SMALL).example_batch[0], inputs)
