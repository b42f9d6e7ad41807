"""Models that cannot be served exactly are refused in one line, before their weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from januslens_server.errors import ModelFailed
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.vetting import check_keys, one_line
from tests.architectures.cases import CASES
from tests.architectures.census import recorded
from tests.architectures.tiny_models import plain
from tests.loading.folders import saved

GPT2 = next(case for case in CASES if case.id == "gpt2-plain")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return saved(GPT2, tmp_path / "model")


def refusal(source: ModelSource) -> str:
    with pytest.raises(ModelFailed) as refused:
        load(source)
    reason = str(refused.value)
    assert "\n" not in reason
    return reason


def describe(source: ModelSource, **changes: Any) -> None:
    path = Path(source.location) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_weights(source: ModelSource) -> None:
    """Break the weights so that reading them raises an unexpected error."""
    (Path(source.location) / WEIGHTS).write_bytes(b"no weights")


def test_quantised_weights_without_a_configuration_are_refused(source: ModelSource) -> None:
    path = Path(source.location) / WEIGHTS
    tensors = load_file(path)
    name = "transformer.h.0.mlp.c_fc.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    assert f"tensor {name!r} is stored as F8_E4M3" in refusal(source)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "t5", d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20
    )
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    assert "'t5' is an encoder-decoder" in refusal(ModelSource("t5", str(tmp_path)))


def test_models_made_of_several_models_are_refused(source: ModelSource) -> None:
    describe(source, model_type="blt", architectures=["BltForCausalLM"])
    reason = refusal(source)
    assert "'blt' is made of several models (decoder_config, encoder_config, global_con" in reason
    assert reason.endswith("expected one list of blocks that pass on one residual stream")


@pytest.mark.parametrize(
    ("described", "found"),
    [
        ({"model_type": "vit", "architectures": None}, "'vit'"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "'GPT2ForSequenceClassification'"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'BertForMaskedLM'"),
    ],
)
def test_models_of_other_tasks_are_refused(
    source: ModelSource, described: dict[str, Any], found: str
) -> None:
    describe(source, **described)
    break_weights(source)
    reason = refusal(source)
    assert re.search(f"{found} is not a (type|class) of AutoModelForCausalLM", reason)
    assert reason.endswith("expected a causal language model")


def test_code_of_a_model_is_never_run(source: ModelSource) -> None:
    describe(source, model_type="novel", auto_map={"AutoConfig": "code.NovelConfig"})
    ran = Path(source.location) / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
    (Path(source.location) / "code.py").write_text(code)
    assert "architecture 'novel' needs custom code" in refusal(source)
    assert not ran.exists()


def test_known_families_that_also_bring_code_are_served_without_it(source: ModelSource) -> None:
    describe(source, auto_map={"AutoModelForCausalLM": "code.Novel"})
    assert load(source).provenance.architecture == "GPT2LMHeadModel"


def test_default_configurations_of_served_types_are_within_the_bounds() -> None:
    for family in (found.family for found in recorded() if found.state == "served"):
        described = AutoConfig.for_model(family).to_json_string(use_diff=False)
        check_keys("config.json", json.loads(described))


def test_unknown_model_type_is_refused(source: ModelSource) -> None:
    describe(source, model_type="novel")
    assert "novel" in refusal(source)


def test_folder_without_config_is_refused(source: ModelSource) -> None:
    (Path(source.location) / "config.json").unlink()
    assert "config.json is missing" in refusal(source)


def test_config_that_is_not_json_is_refused(source: ModelSource) -> None:
    (Path(source.location) / "config.json").write_text("{")
    assert "not a valid JSON file" in refusal(source)


def test_folder_with_only_a_gguf_file_says_how_to_serve_it(source: ModelSource) -> None:
    folder = Path(source.location)
    (folder / "config.json").rename(folder / "weights.gguf")
    assert "to serve the GGUF file 'weights.gguf', add its name to the path" in refusal(source)


def without_file(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    return f"file {WEIGHTS!r} is missing: expected weights in safetensors"


def pickled(folder: Path) -> str:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return "'pytorch_model.bin' is a pickle, which is never read"


def pointer(folder: Path) -> str:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return f"{WEIGHTS!r} is not a valid safetensors file: it has 56 bytes"


def cut(folder: Path) -> str:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-8])
    return f"({len(whole) - 8} bytes) is not a valid safetensors file"


def without_shard(folder: Path) -> str:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / WEIGHTS).rename(folder / shards[0])
    weight_map = {"a.weight": shards[0], "b.weight": shards[1]}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return f"file {shards[1]!r} is missing"


def without_weight_map(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text("{}")
    return f"{INDEX} has no weight_map"


def of_other_shape(folder: Path) -> str:
    tensors = load_file(folder / WEIGHTS)
    tensors["transformer.ln_f.weight"] = torch.ones(3)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return "tensor 'transformer.ln_f.weight' has shape [3]: expected [32]"


def lacking_one(folder: Path) -> str:
    tensors = load_file(folder / WEIGHTS)
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return "the checkpoint has no weights for transformer.ln_f.weight"


def with_an_unmerged_adapter(folder: Path) -> str:
    tensors = load_file(folder / WEIGHTS)
    tensors["transformer.h.1.mlp.c_fc.lora_A.weight"] = torch.ones(2, 32)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return "weights that config.json does not describe: transformer.h.1.mlp.c_fc.lora_A"


def with_other_names(folder: Path) -> str:
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {f"module.{key}": t for key, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    return "; it has unknown weights: module.lm_head.weight"


def with_numbered_weights_of_no_layer(folder: Path) -> str:
    """Add a number above those of all layers, in a list that is not the model's."""
    tensors = load_file(folder / WEIGHTS)
    tensors["prompt_encoder.7.weight"] = torch.ones(2, 32)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return "weights that config.json does not describe: prompt_encoder.7.weight"


def without_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "the tokenizer is missing: expected tokenizer.json"


BREAKAGES = (
    without_file,
    pickled,
    pointer,
    cut,
    without_shard,
    without_weight_map,
    of_other_shape,
    lacking_one,
    with_an_unmerged_adapter,
    with_other_names,
    with_numbered_weights_of_no_layer,
    without_tokenizer,
)


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda b: b.__name__)
def test_broken_folders_are_refused(source: ModelSource, breakage: Callable[[Path], str]) -> None:
    expected = breakage(Path(source.location))
    reason = refusal(source)
    assert reason.startswith(source.location)
    assert expected in reason


@pytest.mark.parametrize("location", ["nobody/nothing", "no/such/folder"])
def test_path_that_is_neither_folder_nor_hub_id_is_refused(location: str) -> None:
    reason = refusal(ModelSource("absent", location))
    assert f"{location}: not found: expected a folder or the id of a hub model" in reason


@pytest.mark.parametrize("location", ["./absent", "/absent/folder", "~/nowhere"])
def test_path_without_a_folder_is_refused_without_asking_the_hub(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("januslens_server.models.loader.snapshot_download", asked)
    assert f"{location}: the folder does not exist" in refusal(ModelSource("absent", location))


def test_unavailable_device_is_refused(source: ModelSource) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert "torch finds no usable CUDA device" in refusal(replace(source, device="cuda"))


def test_unneeded_weights_are_accepted(source: ModelSource) -> None:
    path = Path(source.location) / WEIGHTS
    tensors = load_file(path) | {
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.0.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.2.mlp.c_fc.weight": torch.ones(32, 40),  # the model has layers 0 and 1
        "transformer.position_ids": torch.arange(32)[None],
        "mtp.layers.0.mlp.c_fc.weight": torch.ones(32, 40),
    }
    save_file(tensors, path, {"format": "pt"})
    assert load(source).view.facts.n_layers == 2


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj"])
def test_biases_without_a_place_are_refused(tmp_path: Path, name: str) -> None:
    llama = next(case for case in CASES if case.id == "llama-grouped")
    source = saved(llama, tmp_path / "model")
    path = tmp_path / "model" / WEIGHTS
    key = f"model.layers.0.self_attn.{name}.bias"
    save_file(load_file(path) | {key: torch.ones(32)}, path, {"format": "pt"})
    assert f"does not describe: {key}" in refusal(source)


def test_a_single_weights_file_is_preferred_to_an_index_as_in_transformers(
    source: ModelSource,
) -> None:
    folder = Path(source.location)
    revision = load(source).provenance.revision
    other = {key: tensor + 1 for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(other, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    ids = torch.tensor([[5, 7, 9]])
    model = load(source)
    assert model.provenance.revision == revision
    with torch.inference_mode():
        assert torch.allclose(model.network(ids).logits, plain(GPT2)(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("full_attention"), "found no entry 'full_attention'"),
        (TypeError("'NoneType' object is not subscriptable"), "got a value of an unexpected type"),
        (IndexError("list index out of range"), "got a value of an unexpected type"),
        (ValueError("first\nsecond"), "first"),
    ],
)
def test_failed_look_ups_of_transformers_are_explained(error: Exception, line: str) -> None:
    assert one_line(error).startswith(line)


def test_missing_attributes_are_named() -> None:
    with pytest.raises(AttributeError) as missing:
        AutoConfig.for_model("mamba").num_attention_heads  # noqa: B018
    assert (
        one_line(missing.value)
        == "found no usable num_attention_heads in config.json or in a module"
    )


def test_unknown_activation_is_named(source: ModelSource) -> None:
    describe(source, activation_function="swishy")
    assert "transformers cannot build the model from config.json: " in (reason := refusal(source))
    assert "swishy" in reason
    assert "KeyError" not in reason
