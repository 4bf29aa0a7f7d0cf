"""Local data from a file: numpy arrays in the structure of the bundle's example batch.

`load_dataset` reads three kinds of source; each is checked whole against the manifest when it is loaded:

- `data.npz`: one array per leaf, named as in the manifest (`inputs`, or `inputs.0`, `inputs.input_ids`, …,
  and `targets`), and optionally `weights`. Arrays saved by `numpy.savez` are memory-mapped, so the data may
  be larger than the memory; those of `numpy.savez_compressed` are loaded.
- `data.csv`, or `data.csv:label` or `data.csv:height,width`: a header, then one row per sample. The columns
  named after the colon, in that order, are the targets (without a colon: the column `targets`); a column
  `weights` holds the samples' weights; all others, in the file's order, are the inputs. Inputs and targets
  must be one array each: a row is its sample, flattened row-major.
- `file.py:function`: called without arguments, returns `(inputs, targets)` or `(inputs, targets, weights)`
  or a `Dataset`.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import re
import struct
import sys
import traceback
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import DataError
from edgetrain.edge_client.host.memory import map_rows
from edgetrain.edge_client.runtimes.leaves import Array, describe, halves, unflatten
from edgetrain.edge_client.training.dataset import Dataset, check_dataset
from edgetrain.protocol.manifest import BatchSpec, Manifest, Structure

__all__ = ["Dataset", "check_dataset", "load_dataset"]


def load_dataset(source: str | os.PathLike[str], manifest: Manifest) -> Dataset:
    """Loads and checks local data; the module docstring says from what.

    Args:
        source: an `.npz`, a `.csv[:targets]`, or a `.py:function`.
        manifest: of the bundle that will train on it.

    Raises:
        DataError: cannot be read, or does not fit the bundle; names the file and the array.
    """
    return load_samples(source, manifest.batch)


def find_source(source: str | os.PathLike[str]) -> tuple[Path, str, str]:
    """The file that holds local data or loads it, its kind ("npz", "csv" or "py"), and what follows the colon.

    Raises:
        DataError: no such file, or of another kind.
    """
    text = os.fspath(source)
    found = re.fullmatch(r"(.+?\.(npz|csv|py))(?::(.*))?", text, re.IGNORECASE)
    if found is None:
        raise DataError(f"{text}: data is a file.npz, a file.csv[:targets] or a file.py:function")
    path = Path(found[1])
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path, found[2].lower(), found[3] or ""


def load_samples(source: str | os.PathLike[str], batch: BatchSpec) -> Dataset:
    """As `load_dataset`, for a batch of that structure."""
    path, kind, rest = find_source(source)
    where = f"{path}: "
    if kind == "npz":
        dataset = _read_npz(path, batch)
    elif kind == "csv":
        dataset = _read_csv(path, rest.split(",") if rest else ["targets"], batch)
    else:
        dataset = _call(path, rest)
    return check_dataset(dataset, batch, where)


def _read_npz(path: Path, batch: BatchSpec) -> Dataset:
    try:
        arrays = _npz_arrays(path)
    except (OSError, ValueError, EOFError, KeyError, struct.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz of plain arrays: {error}") from error
    expected = [leaf.name for _, structure in halves(batch) for leaf in structure.leaves]
    missing = [name for name in expected if name not in arrays]
    unknown = [name for name in arrays if name not in {*expected, "weights"}]
    if missing or unknown:
        raise DataError(
            f"{path}: expected the arrays {', '.join(expected)} and optionally weights; "
            f"found {', '.join(arrays) or 'none'}"
        )
    inputs, targets = (
        unflatten(name, structure, [arrays[leaf.name] for leaf in structure.leaves])
        for name, structure in halves(batch)
    )
    return Dataset(inputs, targets, arrays.get("weights"))


def _npz_arrays(path: Path) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as loaded:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            mapped = _map_member(path, info) if info.compress_type == zipfile.ZIP_STORED else None
            arrays[name] = loaded[name] if mapped is None else mapped
    return arrays


def _map_member(path: Path, info: zipfile.ZipInfo) -> Array | None:
    """A stored `.npy` member as a memory map; None if it must be read."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        # The local header: 30 bytes that end in the lengths of a name and an extra field.
        name_length, extra_length = struct.unpack("<26xHH", file.read(30))
        file.seek(name_length + extra_length, os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            return None
        if dtype.hasobject or math.prod(shape) == 0:
            return None
        return map_rows(path, dtype, file.tell(), shape, "F" if fortran_order else "C")


class _Table(NamedTuple):
    path: Path
    header: list[str]
    # One row per sample.
    values: npt.NDArray[np.float64]


def _read_csv(path: Path, target_columns: list[str], batch: BatchSpec) -> Dataset:
    for name, structure in halves(batch):
        if structure.kind != "array":
            raise DataError(f"{path}: the bundle takes {describe(name, structure)}: use an .npz for it")
    table = _read_table(path)
    for column in target_columns:
        if table.header.count(column) != 1:
            raise DataError(
                f"{path}: column {column!r} for the targets is there {table.header.count(column)} times; the "
                f"columns are {_shorten(table.header)}. Name them as in {path.name}:label"
            )
    special = {*target_columns, "weights"}
    input_columns = [column for column, name in enumerate(table.header) if name not in special]
    return Dataset(
        _columns(table, "inputs", batch.inputs, input_columns),
        _columns(table, "targets", batch.targets, [table.header.index(name) for name in target_columns]),
        table.values[:, table.header.index("weights")] if "weights" in table.header else None,
    )


def _read_table(path: Path) -> _Table:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = [column.strip() for column in next(csv.reader(file), [])]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*input contained no data")
                values = np.loadtxt(file, np.float64, delimiter=",", comments=None, quotechar='"', ndmin=2)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: below the header, {error}") from error
    if values.size == 0:
        raise DataError(f"{path}: there are no samples")
    if values.shape[1] != len(header):
        raise DataError(f"{path}: {len(header)} columns in the header, {values.shape[1]} in the rows")
    return _Table(path, header, values)


def _columns(table: _Table, name: str, structure: Structure, columns: list[int]) -> Array:
    spec = structure.leaves[0]
    shape = spec.shape[1:]
    if len(columns) != math.prod(shape):
        raise DataError(
            f"{table.path}: {len(columns)} columns for {name}, but a sample has shape {list(shape)}, that is "
            f"{math.prod(shape)} values"
        )
    values: Array = table.values[:, columns].reshape(len(table.values), *shape)
    if np.dtype(spec.dtype).kind == "f":
        return values
    with np.errstate(invalid="ignore"):  # infinity has no remainder
        wrong = np.argwhere(np.mod(table.values[:, columns], 1) != 0)
    if len(wrong):
        row, column = wrong[0]
        raise DataError(
            f"{table.path}: column {table.header[columns[column]]!r}, row {row + 1}: "
            f"{table.values[row, columns[column]]:g} is not an integer, but {name} are {spec.dtype}"
        )
    integers = values.astype(np.int64)
    return integers.astype(np.bool_) if spec.dtype == "bool" else integers


def _call(path: Path, function: str) -> Dataset:
    if not function:
        raise DataError(f"{path}: name a function in it, as in {path}:load")
    try:
        spec = importlib.util.spec_from_file_location(f"edgetrain_user_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # The file may import its neighbours.
        folder = path.parent.resolve()
        sys.path.insert(0, str(folder))
        known = set(sys.modules)
        try:
            spec.loader.exec_module(module)
            if not callable(getattr(module, function, None)):
                raise DataError(f"{path}: defines no function {function!r}")
            result = getattr(module, function)()
        finally:
            sys.path.remove(str(folder))
            # Another file's neighbour of the same name is another module.
            for name in set(sys.modules) - known:
                if (origin := getattr(sys.modules[name], "__file__", None)) and Path(origin).is_relative_to(folder):
                    del sys.modules[name]
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path}:{function}: raised while loading the local data:\n{_user_traceback(error, path)}"
        ) from error
    if isinstance(result, Dataset):
        return result
    if not isinstance(result, tuple | list) or len(result) not in {2, 3}:
        raise DataError(
            f"{path}:{function}: must return (inputs, targets) or (inputs, targets, weights), "
            f"got a {type(result).__name__}"
        )
    return Dataset(*result)


def _user_traceback(error: Exception, path: Path) -> str:
    """The traceback from the user's file on: our own frames would only distract."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != str(path):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def _shorten(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 12 else [*names[:6], "…", *names[-3:]])
