"""Names in a program for onnxruntime-training, as its `generate_artifacts` gives them, and of the files beside it."""

from __future__ import annotations

# Further inputs of the training graph: whether gradients replace what is in their buffers, and, behind the parameter's
# name, such a buffer.
RESET_INPUT = "lazy_reset_grad"
BUFFER_SUFFIX = "_grad.accumulation.buffer"
# Further files of the step.
CHECKPOINT_FILE, OPTIMIZER_FILE = "checkpoint", "sgd.onnx"
