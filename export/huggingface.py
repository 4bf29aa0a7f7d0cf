"""Models of `transformers`, by configuration or from a local directory. Nothing is downloaded.

`hf:SOURCE[,KEY=VALUE…]`, where SOURCE is a configuration (JSON file), a directory with `config.json` and
perhaps weights, or a model type such as `bert`; keys overwrite fields of the configuration. Without weights
on disk the model is initialised at random from a fixed seed.

A batch is `({"input_ids", "attention_mask"}, targets)` for text and `({"pixel_values"}, targets)` for images.
Targets are classes [B], or tokens [B, T] where -100 is ignored: for `causal-lm` the *next* token at each
position, for `masked-lm` the token behind each mask.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.export.batch import ExampleBatch, Loss
from edgetrain.export.errors import SourceError
from edgetrain.export.quiet import quiet
from edgetrain.export.user_code import user_code

TASKS = {
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
}
_ARCHITECTURES = {
    "ForSequenceClassification": "classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForImageClassification": "image-classification",
}
IGNORED = -100


class LogitsCrossEntropy:
    """Cross-entropy of `outputs.logits`: per sample for logits [B, C], per token for [B, T, C]."""

    ignore_index = IGNORED

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """Losses in the shape of the targets; 0 where the target is -100."""
        logits = outputs.logits
        losses = F.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=self.ignore_index
        )
        return losses.view(targets.shape)


def load_hf(
    source: str,
    task: str | None,
    *,
    batch_size: int = 4,
    sequence_length: int = 32,
    image_size: int | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Loss, ExampleBatch]:
    """Builds a model of `transformers`.

    Args:
        source: see the head of this file, without `hf:`.
        task: one of `TASKS`; None if the configuration names its architecture.
        batch_size: samples in the example batch.
        sequence_length: tokens per sample.
        image_size: height and width, where the configuration does not say (else 32).
        seed: of the random weights and of the example batch.

    Raises:
        SourceError: `transformers` is missing, or the source, the task or a field does not exist.
    """
    if importlib.util.find_spec("transformers") is None:
        raise SourceError("hf: models need transformers: pip install 'edgetrain[hf]'")
    path, *overrides = source.split(",")
    with quiet():
        with user_code(f"reading the configuration of hf:{source}"):
            config = _config(path)
            _override(config, source, overrides)
        task = task or _guess_task(config, source)
        if task not in TASKS:
            raise SourceError(f"unknown task {task!r}; there are: {', '.join(TASKS)}")
        if hasattr(config, "use_cache"):
            config.use_cache = False
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0
        if getattr(config, "architectures", None) is None:
            # Families with several models for a task look there, and expect a list.
            config.architectures = []
        with user_code(f"making hf:{source} for {task}"):
            module = _model(path, config, task, seed)
    generator = torch.Generator().manual_seed(seed)
    if task == "image-classification":
        batch = _images(config, batch_size, image_size, generator)
    else:
        batch = _texts(config, task, batch_size, sequence_length, generator)
    return module, LogitsCrossEntropy(), batch


def _config(path: str) -> Any:
    import transformers  # noqa: PLC0415  # optional and slow to import

    types = transformers.CONFIG_MAPPING
    place = Path(path)
    file = place / "config.json" if place.is_dir() else place
    if file.is_file():
        try:
            fields = json.loads(file.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise SourceError(f"{file} is not JSON: {error}") from error
        kind = fields.get("model_type") if isinstance(fields, dict) else None
        if kind not in types:
            raise SourceError(f"{file}: model_type {kind!r} is unknown to transformers {transformers.__version__}")
        return types[kind].from_dict(fields)
    if path in types:
        return types[path]()
    raise SourceError(
        f"hf:{path}: no such file or directory, and no model type of transformers {transformers.__version__} "
        "(bert, gpt2, vit, …). Nothing is downloaded: save the model to a directory first"
    )


def _override(config: Any, source: str, overrides: list[str]) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not hasattr(config, key):
            raise SourceError(
                f"hf:{source}: {override!r} is no KEY=VALUE with a field of {type(config).__name__}: "
                f"{', '.join(sorted(k for k in config.to_dict() if not k.startswith('_')))}"
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        setattr(config, key, value)


def _guess_task(config: Any, source: str) -> str:
    for architecture in getattr(config, "architectures", None) or ():
        for suffix, task in _ARCHITECTURES.items():
            if architecture.endswith(suffix):
                return task
    raise SourceError(f"hf:{source} does not say what it is for; give --task, one of: {', '.join(TASKS)}")


def _model(path: str, config: Any, task: str, seed: int) -> nn.Module:
    import transformers  # noqa: PLC0415  # optional and slow to import

    auto = getattr(transformers, TASKS[task])
    # The other implementations of attention build their masks with control flow on values.
    options = {"attn_implementation": "eager"}
    folder = Path(path)
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        module = auto.from_pretrained(folder, config=config, local_files_only=True, **options)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = auto.from_config(config, **options)
    assert isinstance(module, nn.Module)
    return module


def _texts(config: Any, task: str, B: int, T: int, generator: torch.Generator) -> ExampleBatch:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = text.vocab_size
    # The lowest ids are padding and other special tokens.
    low = min(8, vocabulary - 1)
    ids = torch.randint(low, vocabulary, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.int64)
    padding = getattr(text, "pad_token_id", 0) or 0
    for row in range(B):
        # Rows of different length, so that the mask matters.
        length = T - (row * T) // (2 * B)
        ids[row, length:] = padding
        mask[row, length:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "classification":
        return inputs, torch.randint(config.num_labels, (B,), generator=generator)
    targets = torch.where(mask.bool(), torch.randint(low, vocabulary, (B, T), generator=generator), IGNORED)
    if task == "masked-lm":
        targets = torch.where(torch.rand(B, T, generator=generator) < 0.5, targets, IGNORED)
    return inputs, targets


def _images(config: Any, B: int, size: int | None, generator: torch.Generator) -> ExampleBatch:
    found = size or getattr(config, "image_size", None) or 32
    height, width = found if isinstance(found, list | tuple) else (found, found)
    channels = getattr(config, "num_channels", None) or 3
    pixels = torch.randn(B, channels, height, width, generator=generator)
    return {"pixel_values": pixels}, torch.randint(config.num_labels, (B,), generator=generator)
