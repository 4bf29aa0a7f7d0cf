"""Local data: what loads, and what each refusal says."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain.edge_client.errors import DataError
from edgetrain.edge_client.training.data import Dataset, load_dataset
from edgetrain.protocol.bundle import Bundle
from support.tiny_bundle import make_data, write_tiny_bundle

X, Y = make_data(10)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return Bundle(write_tiny_bundle(tmp_path_factory.mktemp("b") / "tiny")).manifest


@pytest.fixture(scope="module")
def dict_manifest(tmp_path_factory):
    return Bundle(write_tiny_bundle(tmp_path_factory.mktemp("b") / "d", kind="dict", unused_input=True)).manifest


def save(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def same(dataset, weights=None):
    np.testing.assert_allclose(dataset.inputs, X, rtol=1e-6)
    np.testing.assert_array_equal(dataset.targets, Y)
    assert len(dataset) == 10
    if weights is None:
        assert dataset.weights is None
    else:
        np.testing.assert_array_equal(dataset.weights, weights)
    return True


@pytest.mark.parametrize("save_function", [np.savez, np.savez_compressed])
def test_npz(tmp_path, manifest, save_function):
    weights = np.arange(10, dtype=np.float32)
    save_function(tmp_path / "data.npz", inputs=np.asfortranarray(X), targets=Y, weights=weights)
    dataset = load_dataset(tmp_path / "data.npz", manifest)
    assert same(dataset, weights)
    assert isinstance(dataset.inputs, np.memmap) == (save_function is np.savez)
    (x, y), w = dataset.take(np.array([3, 3, 0]))
    np.testing.assert_array_equal(x, X[[3, 3, 0]])
    np.testing.assert_array_equal(y, Y[[3, 3, 0]])
    np.testing.assert_array_equal(w, [3, 3, 0])


def test_npz_of_a_dict(tmp_path, dict_manifest):
    np.savez(tmp_path / "d.npz", **{"inputs.x": X, "inputs.id": np.arange(10), "targets": Y})
    dataset = load_dataset(tmp_path / "d.npz", dict_manifest)
    assert list(dataset.inputs) == ["x", "id"]
    np.testing.assert_array_equal(dataset.subset(np.array([4])).inputs["id"], [4])
    assert len(dataset) == 10


def write_csv(path, header, rows):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_csv(tmp_path, manifest):
    path = write_csv(tmp_path / "a.csv", "a,b,c,d,e,targets", ([*x, y] for x, y in zip(X, Y, strict=True)))
    assert same(load_dataset(path, manifest))


def test_csv_with_named_targets_and_weights(tmp_path, manifest):
    rows = ([y, x[0], x[1], 0.5, *x[2:]] for x, y in zip(X, Y, strict=True))
    path = write_csv(tmp_path / "a.csv", 'label,"a",b,weights,c,d,e', rows)
    assert same(load_dataset(f"{path}:label", manifest), np.full(10, 0.5))


def test_python_function(tmp_path, manifest):
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "helper.py").write_text(f"labels = {Y.tolist()}\n")
    (tmp_path / "mine.py").write_text(
        "import numpy as np, pathlib\nfrom helper import labels\n"
        "def load():\n    return np.load(pathlib.Path(__file__).parent / 'x.npy'), np.array(labels)\n"
    )
    assert same(load_dataset(f"{tmp_path / 'mine.py'}:load", manifest))


def test_two_files_with_neighbours_of_the_same_name_in_one_process(tmp_path, manifest):
    """Each gets its own neighbour, whichever came first."""
    for name, labels in (("one", Y), ("two", Y[::-1])):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", X)
        (tmp_path / name / "its_neighbour.py").write_text(f"labels = {labels.tolist()}\n")
        (tmp_path / name / "mine.py").write_text(
            "import numpy as np, pathlib\n"
            "def load():\n    from its_neighbour import labels\n"
            "    return np.load(pathlib.Path(__file__).parent / 'x.npy'), np.array(labels)\n"
        )
    for _ in range(2):
        assert same(load_dataset(f"{tmp_path / 'one/mine.py'}:load", manifest))
        assert load_dataset(f"{tmp_path / 'two/mine.py'}:load", manifest).targets.tolist() == Y[::-1].tolist()


def test_integers_narrower_than_the_leaf_load(tmp_path, manifest):
    assert same(load_dataset(save(tmp_path, inputs=X, targets=Y.astype(np.uint8)), manifest))


def bad(**changes):
    arrays = {"inputs": X, "targets": Y} | changes
    return {name: array for name, array in arrays.items() if array is not None}


NAN = X.copy()
NAN[7, 2] = np.inf
BAD_NPZ = {
    "missing": (
        bad(targets=None),
        "expected the arrays inputs, targets and optionally weights; found inputs",
    ),
    "unknown": (bad(labels=Y), "found inputs, targets, labels"),
    "shape": (bad(inputs=X[:, :3]), r"inputs: expected shape \[N, 5\], got \[10, 3\]"),
    "dtype": (bad(targets=Y.astype(np.float64)), "targets: expected int64, got float64"),
    "text": (bad(inputs=X.astype(str)), "inputs: expected float32, got <U"),
    "lengths": (bad(targets=Y[:9]), "different numbers of samples: inputs 10, targets 9"),
    "weight length": (bad(weights=np.ones(3)), "inputs 10, targets 10, weights 3"),
    "weights": (bad(weights=-np.ones(10)), "weights: must be at least 0"),
    "weight dtype": (bad(weights=np.array(["a"] * 10)), "weights: expected a float32 array, got <U1"),
    "zero weights": (bad(weights=np.zeros(10)), "weights: .* one of them above 0"),
    "infinite": (bad(inputs=NAN), "inputs: sample 7 holds a value that is NaN or infinite"),
    "overflow": (bad(inputs=X.astype(np.float64) * 1e300), "inputs: sample 0 .* infinite"),
    "empty": (bad(inputs=X[:0], targets=Y[:0]), "there are no samples"),
    "pickle": (bad(inputs=np.array([None] * 10)), "not a readable .npz of plain arrays: Object arrays"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_a_bad_npz_is_named(tmp_path, manifest, case):
    arrays, message = BAD_NPZ[case]
    path = save(tmp_path, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(path, manifest)
    assert str(caught.value).startswith(str(path))


def test_the_sample_is_named_beyond_the_first_chunk(tmp_path, manifest):
    x, y = make_data(9000)
    x[8000, 0] = np.nan
    with pytest.raises(DataError, match="sample 8000 holds"):
        load_dataset(save(tmp_path, inputs=x, targets=y), manifest)


@pytest.mark.parametrize("length", [0, 10, 300, 600])
def test_a_truncated_npz_is_a_data_error(tmp_path, manifest, length):
    path = save(tmp_path, inputs=X, targets=Y)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        load_dataset(path, manifest)


BAD_CSV = {
    "no target": (
        "a,b,c,d,e,f",
        [[1, 2, 3, 4, 5, 0]],
        "column 'targets' .* 0 times; the columns are a, b, c",
    ),
    "twice": ("a,b,c,d,targets,targets", [[1, 2, 3, 4, 5, 0]], "column 'targets' .* 2 times"),
    "too few": ("a,b,c,targets", [[1, 2, 3, 0]], r"3 columns for inputs, .* shape \[5\], that is 5 values"),
    "text": ("a,b,c,d,e,targets", [[1, 2, 3, 4, 5, 0], [1, 2, "x", 4, 5, 0]], "could not convert string 'x'"),
    "gap": ("a,b,c,d,e,targets", [[1, "", 3, 4, 5, 0]], "could not convert string ''"),
    "ragged": ("a,b,c,d,e,targets", [[1, 2, 3, 4, 5, 0], [1, 2]], "number of columns changed"),
    "header": ("a,b,c,d,targets", [[1, 2, 3, 4, 5, 0]], "5 columns in the header, 6 in the rows"),
    "nan": ("a,b,c,d,e,targets", [[1, 2, "nan", 4, 5, 0]], "inputs: sample 0 .* NaN"),
    "fraction": (
        "a,b,c,d,e,targets",
        [[1, 2, 3, 4, 5, 0.5]],
        "column 'targets', row 1: 0.5 is not an integer",
    ),
    "infinite": (
        "a,b,c,d,e,targets",
        [[1, 2, 3, 4, 5, "inf"]],
        "column 'targets', row 1: inf is not an integer",
    ),
    "no rows": ("a,b,c,d,e,targets", [], "there are no samples"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_bad_csv_is_named(tmp_path, manifest, case):
    header, rows, message = BAD_CSV[case]
    path = write_csv(tmp_path / "a.csv", header, rows)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(path, manifest)
    assert str(caught.value).startswith(str(path))


def test_an_empty_csv_and_a_binary_one(tmp_path, manifest):
    path = tmp_path / "a.csv"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no samples"):
        load_dataset(path, manifest)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(DataError, match="utf-8"):
        load_dataset(path, manifest)


def test_a_csv_cannot_fill_a_dict(tmp_path, dict_manifest):
    path = write_csv(tmp_path / "a.csv", "a,targets", [[1, 0]])
    with pytest.raises(DataError, match=r"inputs as a dict of \(x, id\): use an .npz"):
        load_dataset(path, dict_manifest)


BAD_PYTHON = {
    "def load():\n    return 1 / 0\n": r"(?s)raised while loading .*line 2, in load.*ZeroDivisionError",
    "import nowhere_to_be_found\n": "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    "def load(:\n": "SyntaxError",
    "": "defines no function 'load'",
    "load = 3\n": "defines no function 'load'",
    "def load():\n    return [1]\n": "must return .* got a list",
    "def load():\n    return 1, 2\n": "inputs: expected a numpy array, got a int",
}


@pytest.mark.parametrize("code", BAD_PYTHON)
def test_a_bad_python_function_is_named(tmp_path, manifest, code):
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(DataError, match=BAD_PYTHON[code]) as caught:
        load_dataset(f"{path}:load", manifest)
    assert str(caught.value).startswith(str(path))
    assert "data.py" not in str(caught.value)


def test_sources_that_are_none(tmp_path, manifest):
    with pytest.raises(DataError, match="no such file"):
        load_dataset(tmp_path / "nowhere.npz", manifest)
    with pytest.raises(DataError, match=r"data is a file\.npz, a file\.csv"):
        load_dataset("data.parquet", manifest)
    (tmp_path / "a.py").write_text("")
    with pytest.raises(DataError, match="name a function in it"):
        load_dataset(tmp_path / "a.py", manifest)


def test_a_dataset_is_returned_as_it_is(tmp_path, manifest):
    (tmp_path / "a.py").write_text(
        "import numpy as np\nfrom edgetrain.edge_client.training.data import Dataset\n"
        "def load(): return Dataset(np.ones((3, 5)), np.zeros(3, int))\n"
    )
    dataset = load_dataset(f"{tmp_path / 'a.py'}:load", manifest)
    assert isinstance(dataset, Dataset)
    assert len(dataset) == 3
