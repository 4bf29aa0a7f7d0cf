"""Models that nobody here wrote: families of `transformers` from small random configurations."""

import json

import pytest
import torch

from edgetrain.export import SourceError, export_bundle, load_source
from support.bundles import manifest_of
from support.steps import Step

pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 40, "max_position_embeddings": 24,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
FAMILIES = {
    "bert": (TEXT, "classification", "all"),
    "roberta": (TEXT, "masked-lm", "all"),
    "electra": (TEXT | {"embedding_size": 8}, "classification", "all"),
    "albert": (TEXT | {"embedding_size": 8, "num_hidden_layers": 2}, "masked-lm", "all"),
    "distilbert": (
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 40,
         "max_position_embeddings": 24},
        "classification", "all"),
    "gpt2": (
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 24},
        "causal-lm", "all"),
    "llama": (TEXT | {"num_key_value_heads": 1}, "causal-lm", "all"),
    "vit": (VISION, "image-classification", "all"),
    # Two models for one task, and a configuration that names neither.
    "deit": (VISION, "image-classification", "head"),
    # A configuration without a padding token.
    "codegen": (
        {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40, "n_positions": 24, "rotary_dim": 4},
        "causal-lm", "all"),
    "resnet": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "image-classification", "all"),
    "convnext": (
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16},
        "image-classification", "all"),
    "mobilenet_v2": ({"depth_multiplier": 0.1, "image_size": 32}, "image-classification", "last:5"),
    "swin": (
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 16, "patch_size": 2,
         "window_size": 4}, "image-classification", "last:6"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_family(family, tmp_path):
    fields, task, selection = FAMILIES[family]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(fields | {"model_type": family}))
    source = load_source(f"hf:{config}", task=task, options={"batch_size": 2, "sequence_length": 6})
    Step(*source, selection).assert_matches_eager()


def test_a_whole_bundle_from_a_directory_with_weights(tmp_path):
    """Saved weights are used; the task comes from the configuration; the head alone learns."""
    module = load_source("hf:bert,hidden_size=16,num_hidden_layers=1,num_attention_heads=2,vocab_size=40",
                         task="classification", options={"seed": 3}).module  # fmt: skip
    module.config.architectures = ["BertForSequenceClassification"]
    module.save_pretrained(tmp_path / "saved")
    source = load_source(f"hf:{tmp_path / 'saved'}", options={"batch_size": 2, "sequence_length": 6})
    assert torch.equal(
        source.module.bert.embeddings.word_embeddings.weight, module.bert.embeddings.word_embeddings.weight
    )
    path = export_bundle(*source, trainable="head", out=tmp_path / "b")
    manifest = manifest_of(path)
    assert [entry.name for entry in manifest.parameters] == ["classifier.weight", "classifier.bias"]
    assert [leaf.name for leaf in manifest.batch.inputs.leaves] == [
        "inputs.input_ids",
        "inputs.attention_mask",
    ]
    assert [spec.name for spec in manifest.programs[0].graphs["infer"].outputs] == ["logits"]


def test_lora_on_the_transposed_linear_layers_of_gpt2():
    source = load_source("hf:gpt2,n_embd=16,n_layer=1,n_head=2,vocab_size=40,n_positions=24",
                         task="causal-lm", options={"batch_size": 2, "sequence_length": 6})  # fmt: skip
    step = Step(*source, "lora:r=2,target=c_attn|c_proj")
    assert len(step.names) == 6
    assert all(name.endswith(("lora_A", "lora_B")) for name in step.names)
    assert step.run()["weight_sum"] > 0


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("hf:nothing/here", "causal-lm", "no such file.*Nothing is downloaded"),
        ("hf:bert", None, "give --task"),
        ("hf:bert", "translation", "unknown task 'translation'; there are: classification"),
        ("hf:bert,width=3", "masked-lm", "'width=3' is no KEY=VALUE"),
    ],
)
def test_wrong_sources(source, task, message):
    with pytest.raises(SourceError, match=message):
        load_source(source, task=task)


def test_a_broken_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="not JSON"):
        load_source(f"hf:{tmp_path}", task="masked-lm")
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(SourceError, match="'nobody' is unknown"):
        load_source(f"hf:{tmp_path}", task="masked-lm")
