"""Onnxruntime-training's own loop: parameters, accumulated gradients and SGD stay inside the runtime.

The local trainer does not need it: through `ort_training.OrtTrainingSession` it drives this runtime like any
other. It is for those who want plain SGD with nothing but onnxruntime's own parts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.runtimes.base import Batch, EvalResult
from edgetrain.edge_client.runtimes.onnxruntime import session_options
from edgetrain.edge_client.runtimes.ort_training import OrtTrainingRuntime
from edgetrain.edge_client.runtimes.session import first_line
from edgetrain.edge_client.runtimes.staging import Staging, check_vector
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.ort_training import CHECKPOINT_FILE, OPTIMIZER_FILE
from edgetrain.protocol.vectors import Vector


class NativeTrainer:
    """Plain SGD by onnxruntime-training's `Module` and `Optimizer`.

    Args:
        bundle: with a program for `ort-training`.
        parameters: float32 [num_parameters], where to start.
        threads: threads of one step; 0 lets onnxruntime choose.

    Raises:
        SessionError: the training build is not here, or does not load the program.
        BundleError: no program for `ort-training`, or a corrupt file.
    """

    def __init__(self, bundle: Bundle, parameters: Vector, *, threads: int = 1) -> None:
        self.manifest = bundle.manifest
        reason = OrtTrainingRuntime().available()
        if reason is not None:
            raise SessionError(reason)
        check_vector(parameters, self.manifest.num_parameters)
        import onnxruntime
        from onnxruntime.capi import _pybind_state as native

        self._native, self._ort_value = native, onnxruntime.OrtValue
        self._staging = Staging(self.manifest)
        self._weight_sum = 0.0
        step = self.manifest.program(OrtTrainingRuntime.name).graphs["step"]
        options = session_options(threads)
        cpu = native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)
        # It reads files by name, and the bundle may be an archive.
        with tempfile.TemporaryDirectory(prefix="edgetrain-") as temporary:
            folder = Path(temporary)
            for entry in (step.file, *step.extra_files):
                (folder / PurePosixPath(entry.file).name).write_bytes(bundle.read(entry))
            try:
                self._state = native.load_checkpoint(str(folder / CHECKPOINT_FILE))
                model = str(folder / PurePosixPath(step.file.file).name)
                self._module = native.Module(model, self._state, None, cpu, options)
                # The checkpoint has names and shapes only, and the optimizer crashes without values.
                given = self._ort_value.ortvalue_from_numpy(parameters)
                self._module.copy_buffer_to_parameters(given._ortvalue, False)  # noqa: SLF001
                self._sgd = native.Optimizer(str(folder / OPTIMIZER_FILE), self._state, cpu, options)
            except Exception as error:  # onnxruntime's exceptions share no base of their own
                raise SessionError(
                    f"{bundle.path}: onnxruntime-training cannot load {step.file.file}: {first_line(error)}"
                ) from error

    def accumulate(self, batch: Batch, weights: npt.NDArray[np.float32] | None = None) -> EvalResult:
        """Adds the gradients of one micro-batch; arguments and errors as in `Session.step`."""
        self._staging.fill(batch, weights)
        inputs = [self._staging.arrays[name] for name in self._module.input_names(True)]
        fetched = self._native.OrtValueVector()
        self._module.train_step(inputs, fetched)
        loss_sum, weight_sum, *metrics = (value.numpy() for value in fetched)
        self._weight_sum += float(weight_sum)
        named = dict(zip(self.manifest.metrics, metrics, strict=True))
        return EvalResult(float(loss_sum), float(weight_sum), named)

    def apply(self, learning_rate: float) -> None:
        """One SGD step by the mean gradient of what was accumulated since the last.

        Raises:
            DataError: nothing was.
        """
        if self._weight_sum == 0:
            raise DataError("nothing was accumulated: call accumulate() with weights above 0 first")
        # The runtime has added up weighted sums, so the mean is taken here.
        self._sgd.set_learning_rate(learning_rate / self._weight_sum)
        self._sgd.optimizer_step()
        self._module.lazy_reset_grad()
        self._weight_sum = 0.0

    def parameters(self) -> Vector:
        """The present parameters, float32 [num_parameters], copied."""
        vector = np.zeros(self.manifest.num_parameters, np.float32)
        target = self._ort_value.ortvalue_from_numpy(vector)
        self._module.copy_parameters_to_buffer(target._ortvalue, False)  # noqa: SLF001
        # `numpy()` shows memory that goes away with `target`.
        copied: Vector = target.numpy().copy()
        return copied
