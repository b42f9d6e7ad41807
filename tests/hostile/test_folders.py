"""Folders that would run code, read files or use up memory are FAILED before they can do so."""

from __future__ import annotations

import base64
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from januslens.v1 import models_pb2, service_pb2_grpc, trace_pb2
from januslens_server.demo import model_path
from januslens_server.errors import InvalidRequest
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.registry import Registry
from januslens_server.models.tokenizer import TokenizerFailed
from januslens_server.models.tokenizer_files import read_vocabulary
from januslens_server.pipelines.inputs import read_prompt
from januslens_server.pipelines.self_check import checked
from januslens_server.results import ModelState, ModelStatus
from tests.architectures.cases import Case
from tests.loading.folders import saved
from tests.support.calls import prompt
from tests.support.model_folders import WEIGHTS, healthy, with_configuration
from tests.support.server import running_server

# Address space that a load may use, in addition to the resident memory.
MEMORY = 4 * 2**30
SECONDS = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return healthy(tmp_path / "model")


def status_of(folder: Path) -> ModelStatus:
    """Return the status of a model after the server has loaded this folder."""
    registry = Registry([ModelSource("hostile", str(folder))], checked, lambda _: None)
    registry.load_all()
    (status,) = registry.statuses()
    return status


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the memory that loads may use, and check their time."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, kept[1]))
    began = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)
    assert time.monotonic() - began < SECONDS


def refusal(folder: Path) -> str:
    """Return the one line with which a folder is FAILED, in bounded time and memory."""
    with bounded():
        status = status_of(folder)
    assert status.state is ModelState.FAILED
    assert status.reason.isprintable()
    assert len(status.reason) < 1500
    return status.reason


def describe(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


HUB = "someone/kernels"


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": HUB},
        {"_attn_implementation": f"paged|{HUB}"},
        {"_attn_implementation_internal": "flash_attention_4"},
        {"attn_implementation": {"": "sdpa", "text_config": HUB}},
        {"text_config": {"_attn_implementation": HUB}},
        {"deep": [{"er": {"experts_implementation": HUB}}]},
        {"experts_implementation": "deepgemm"},
    ],
    ids=str,
)
def test_implementations_come_from_an_allow_list(folder: Path, changes: dict[str, Any]) -> None:
    describe(folder, **changes)
    assert "_implementation" in (reason := refusal(folder))
    assert ": expected " in reason


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"text_config": {"quantization_config": {"quant_method": "aqlm"}}}, "quantised by aqlm"),
        ({"configuration_files": ["../other.json"]}, "configuration_files selects"),
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights selects"),
        ({"vision_config": {"backbone": HUB}}, "backbone selects another model"),
        ({"fusion_config": {"fused": True}}, "fusion_config selects"),
        ({"distributed_config": {"tp_size": 2}}, "distributed_config selects"),
    ],
)
def test_keys_that_choose_code_or_files_are_refused(
    folder: Path, changes: dict[str, Any], found: str
) -> None:
    describe(folder, **changes)
    assert found in refusal(folder)


def test_generation_settings_cannot_choose_code(folder: Path) -> None:
    describe(folder, "generation_config.json", custom_generate="custom_generate/generate.py")
    assert "custom_generate selects code for generation" in refusal(folder)


def test_code_beside_a_known_architecture_is_never_run(folder: Path) -> None:
    """Every file that may name classes names some, and each class would leave a file."""
    ran = folder / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Novel: pass\n"
    (folder / "custom_generate").mkdir()
    for name in ("code.py", "custom_generate/generate.py", "__init__.py", "tokenizer.py"):
        (folder / name).write_text(code)
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    for name in ("config", "generation_config", "processor_config", "tokenizer_config"):
        describe(folder, f"{name}.json", auto_map=dict.fromkeys(classes, "code.Novel"))
    status = status_of(folder)
    assert (status.state, status.reason) == (ModelState.READY, "")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_of_other_packages_is_computed_by_torch(folder: Path, name: str) -> None:
    """Models are published with the name of the implementation used for training."""
    describe(folder, _attn_implementation=name)
    status = status_of(folder)
    assert (status.state, status.reason) == (ModelState.READY, "")
    assert status.provenance is not None
    assert status.provenance.attention == "sdpa"


def test_a_tokenizer_file_elsewhere_is_refused(folder: Path) -> None:
    describe(folder, "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"])
    assert "fast_tokenizer_files selects another tokenizer file" in refusal(folder)


def test_an_adapter_beside_whole_weights_is_ignored_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its configuration could send `peft` to another folder or repository."""
    plain = load(ModelSource("plain", str(folder))).network.state_dict()
    describe(folder, "adapter_config.json", base_model_name_or_path="../other", peft_type="LORA")
    save_file({"lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    served = load(ModelSource("demo", str(folder))).network.state_dict()
    assert all(torch.equal(served[name], plain[name]) for name in plain)
    assert "adapter_config.json: the folder also has the whole weights" in caplog.text


def test_an_adapter_alone_is_refused(folder: Path) -> None:
    describe(folder, "adapter_config.json", base_model_name_or_path="someone/base")
    (folder / WEIGHTS).unlink()
    assert "adapter_config.json describes an adapter: merge it" in refusal(folder)


KERNELS = """
import sys
def get_kernel(repository, *_, **__):
    print("asked for", repository, file=sys.stderr)
    raise ValueError(repository)
class Anything:
    def __init__(self, *_, **__): pass
def decorator(*_, **__): return lambda decorated: decorated
use_kernel_forward_from_hub = use_kernelized_func = decorator
def __getattr__(_name): return Anything
"""


def test_no_kernel_is_fetched_where_the_package_is_installed(tmp_path: Path) -> None:
    """A stand-in for `kernels`, with a version that transformers accepts, reports every request."""
    from transformers.utils import import_utils

    release = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    site, described = tmp_path / "site", tmp_path / "site" / f"kernels-{release}.dist-info"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(KERNELS)
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {release}")
    program = (
        "from januslens_server.models.loader import ModelSource, load\n"
        f"load(ModelSource('demo', {str(model_path())!r}))\n"
        "import transformers\n"
        "print('available:', transformers.utils.is_kernels_available())\n"
    )
    paths = os.pathsep.join([str(site), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "available: False\n"
    assert "asked for" not in ran.stderr


def layers(count: int) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        describe(folder, n_layer=count)
        return "n_layer is too large" if count > 16_384 else "the weights hold only 52 tensors"

    return bomb


def labels(folder: Path) -> str:
    describe(folder, num_labels=10**9)
    return "num_labels is too large"


def nested_counts(folder: Path) -> str:
    describe(folder, attention_types=[[["global"], 10**9]])
    return "attention_types is too large"


def named_labels(folder: Path) -> str:
    describe(folder, id2label={str(i): "x" * 20 for i in range(200_000)})
    return "'config.json' is too large: expected at most"


def wide(folder: Path) -> str:
    describe(folder, n_embd=2**16, n_head=1)
    return "the configuration describes"


def long_contexts(folder: Path) -> str:
    describe(folder, n_positions=10**12)
    return "the configuration describes"


def nested(folder: Path) -> str:
    (folder / "config.json").write_text('{"a":' * 100_000)
    return "config.json is not a valid JSON file"


def no_object(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "config.json holds a list: expected an object"


def no_positions(folder: Path) -> str:
    describe(folder, n_positions=0)
    weights = load_file(folder / WEIGHTS)
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:0].clone()
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return "the configuration gives a context of 0 positions"


def unprintable(folder: Path) -> str:
    describe(folder, model_type="\ud800\x1b[31m" + "x" * 100_000)
    return "`\\ud800\\x1b[31mxxx"


def no_layers(folder: Path) -> str:
    describe(folder, n_layer=0)
    return "describes a model without layers: expected at least one"


def header(folder: Path, size: int, text: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + text)


def header_of_gigabytes(folder: Path) -> str:
    header(folder, 4 * 2**30, b"{}")
    return "it has 10 bytes, but a header of 4294967296 bytes"


def tensors(**entries: list[int]) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        described = {
            name: {
                "dtype": "F32",
                "shape": [max(0, end - start) // 4],
                "data_offsets": [start, end],
            }
            for name, (start, end) in entries.items()
        }
        text = json.dumps(described).encode()
        header(folder, len(text), text + bytes(64))
        return "is not a valid safetensors file"

    return bomb


def one_tensor_too_large(folder: Path) -> str:
    """Write a sparse file whose only tensor takes 1 GiB when it is read."""
    name, end = "transformer.wte.weight", 2**30
    text = json.dumps({name: {"dtype": "F32", "shape": [end // 4], "data_offsets": [0, end]}})
    header(folder, len(text), text.encode())
    os.truncate(folder / WEIGHTS, 8 + len(text) + end)
    return f"the tensor {name!r} alone holds {end // 4}"


def fifo(name: str) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        return f"{name!r} is not a regular file" if name != "config.json" else "config.json"

    return bomb


def device(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    return "'tokenizer.json' links to /dev/zero, outside the folder"


def link(name: str) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        outside = folder.parent / name
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)
        return f"{name!r} links to "

    return bomb


def merges_of_a_gigabyte(folder: Path) -> str:
    os.truncate(folder / "tokenizer.json", 2**30)
    return "'tokenizer.json' is too large: expected at most"


def index(name: object) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        shutil.move(folder / WEIGHTS, folder.parent / WEIGHTS)  # beside it no index is read
        text = json.dumps({"weight_map": {"a": name}})
        (folder / "model.safetensors.index.json").write_text(text)
        return "model.safetensors.index.json"

    return bomb


def sparse(name: str) -> Callable[[Path], str]:
    """Write a file of a gigabyte that takes no space on disk."""

    def bomb(folder: Path) -> str:
        (folder / name).touch()
        os.truncate(folder / name, 2**30)
        return f"{name!r} is too large: expected at most"

    return bomb


def content(name: str, text: str, expected: str, times: int = 1) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        (folder / name).write_text(text * times)
        return expected

    return bomb


def many_added_tokens(folder: Path) -> str:
    described = json.loads((folder / "tokenizer.json").read_text())
    token = described["added_tokens"][0]
    described["added_tokens"] = [token | {"id": i, "content": f"<{i}>"} for i in range(60_000)]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return "tokenizer.json has too many added tokens: expected at most 50000, got 60000"


def step(expected: str, **changes: Any) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        describe(folder, "tokenizer.json", **changes)
        return expected

    return bomb


def gpt2_tokenizer(vocab: str, merges: str, expected: str, times: int = 1) -> Callable[[Path], str]:
    """A folder whose tokenizer is described by `vocab.json` and `merges.txt`."""

    def bomb(folder: Path) -> str:
        (folder / "tokenizer.json").unlink()
        describe(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
        (folder / "vocab.json").write_text(vocab * times)
        (folder / "merges.txt").write_text(merges * times)
        return expected

    return bomb


NAMED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
VOCAB, MERGES = '{"a": 0, "b": 1, "ab": 2}', "#version: 0.2\na b\n"
TOO_MANY = " has too many entries: expected at most"
LONGER = " makes texts more than 16 times longer"
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
INSERTING = {"type": "Replace", "pattern": {"Regex": "(?=a)"}, "content": "a"}
A = {"Sequence": {"id": "A", "type_id": 0}}
CHARACTERS = base64.b64encode(bytes(4) + b"x" * 1000).decode()
TOKENIZER_BOMBS = {
    **{f"gigabyte of {name}": sparse(name) for name in NAMED_FILES},
    "wrong type of added tokens": content("added_tokens.json", '{"a": [1]}', "invalid list of"),
    "added tokens without texts": content(
        "tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}', "invalid list of added"
    ),
    "list for special tokens": content("special_tokens_map.json", "[]", "holds a list"),
    "nested special tokens": content(
        "special_tokens_map.json", '{"a":' * 100_000, "is not a valid JSON file"
    ),
    "10^6 lists": content("tokenizer_config.json", "[],", TOO_MANY, 10**6),
    "60,000 added tokens": many_added_tokens,
    "endless text of an added token": content(
        "tokenizer_config.json",
        json.dumps({"added_tokens_decoder": {"7": {"content": "x" * (3 * 2**20)}}}),
        "the texts of added tokens are too long",
    ),
    "10^7 entries in tokenizer.json": content("tokenizer.json", "0,", TOO_MANY, 10**7),
    "nested tokenizer.json": content("tokenizer.json", '{"a":' * 10**5, "not a valid JSON file"),
    "repeated keys": content(
        "tokenizer.json", '{"normalizer": null, "normalizer": null}', "repeats a key"
    ),
    "tokenizer.json without a model": content("tokenizer.json", "{}", "odel"),
    "words of any length": step(
        "max_input_chars_per_word is too large", model={"max_input_chars_per_word": 10**9}
    ),
    "normalizer of a megabyte": step(
        "normalizer is too long",
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "x" * 2**20},
    ),
    "normalizer that doubles": step(
        "normalizer" + LONGER, normalizer={"type": "Sequence", "normalizers": [DOUBLING] * 24}
    ),
    "normalizer that inserts": step(
        "normalizer" + LONGER, normalizer={"type": "Sequence", "normalizers": [INSERTING] * 24}
    ),
    "normalizer that prepends": step(
        "normalizer" + LONGER, normalizer={"type": "Prepend", "prepend": "x" * 1000}
    ),
    "normalizer with a table": step(
        "normalizer" + LONGER,
        normalizer={"type": "Precompiled", "precompiled_charsmap": CHARACTERS},
    ),
    "template that repeats the text": step(
        "post_processor" + LONGER,
        post_processor={
            "type": "TemplateProcessing",
            "single": [A] * 100,
            "pair": [A],
            "special_tokens": {},
        },
    ),
    "decoder that doubles": step(
        "decoder" + LONGER, decoder={"type": "Sequence", "decoders": [DOUBLING] * 24}
    ),
    "10^7 entries in vocab.json": gpt2_tokenizer('"":1,', "", f"vocab.json{TOO_MANY}", 10**7),
    "nested vocab.json": gpt2_tokenizer('{"a":' * 10**5, MERGES, "recursion limit exceeded"),
    "wrong types in vocab.json": gpt2_tokenizer('{"a": "b"}', MERGES, "out of vocabulary"),
    "10^7 merges": gpt2_tokenizer("", "a b\n", f"merges.txt{TOO_MANY}", 10**7),
    "wrong merges": gpt2_tokenizer(VOCAB, "a b c d\n", "invalid at line 1"),
}


BOMBS = {
    "10^4 layers": layers(10**4),
    "10^5 layers": layers(10**5),
    "10^9 layers": layers(10**9),
    "10^9 labels": labels,
    "counts in lists": nested_counts,
    "200,000 names of labels": named_labels,
    "wide": wide,
    "10^12 positions": long_contexts,
    "nested JSON": nested,
    "no object": no_object,
    "no layers": no_layers,
    "no positions": no_positions,
    "unprintable and endless text": unprintable,
    "a header of gigabytes": header_of_gigabytes,
    "overlapping offsets": tensors(a=[0, 32], b=[16, 64]),
    "offsets out of range": tensors(a=[0, 2**40]),
    "offsets backwards": tensors(a=[64, 0]),
    "one tensor of 1 GiB": one_tensor_too_large,
    "FIFO for config.json": fifo("config.json"),
    "FIFO for weights": fifo(WEIGHTS),
    "FIFO beside the weights": fifo("other.safetensors"),
    "device": device,
    "link to a tokenizer elsewhere": link("tokenizer.json"),
    "link to weights elsewhere": link(WEIGHTS),
    "merges of a gigabyte": merges_of_a_gigabyte,
    "index with a path": index(f"../{WEIGHTS}"),
    "index with an absolute path": index("/etc/passwd"),
    "index of a pickle": index("pytorch_model.bin"),
    "index with no name": index(7),
    **{f"FIFO for {name}": fifo(name) for name in NAMED_FILES},
    **TOKENIZER_BOMBS,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=list(BOMBS))
def test_folders_with_impossible_sizes_are_refused(
    folder: Path, bomb: Callable[[Path], str]
) -> None:
    expected = bomb(folder)
    assert expected in refusal(folder)


def test_a_pattern_that_backtracks_without_end_fails_only_its_requests(folder: Path) -> None:
    """The library panics, with an exception that would end the thread."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    describe(folder, "tokenizer.json", pre_tokenizer=split | {"invert": False})
    vocabulary = read_vocabulary(folder)
    assert vocabulary.encode_prompt("Japan")
    with pytest.raises(TokenizerFailed, match="retry-limit"):
        vocabulary.encode_prompt("a" * 50 + "b")
    with pytest.raises(TokenizerFailed, match="retry-limit"):
        vocabulary.encode_continuation("a" * 50 + "b")
    model = load(ModelSource("hostile", str(folder)))
    with pytest.raises(InvalidRequest, match="tokenizer failed"):
        read_prompt(model, "a" * 50 + "b")


def test_many_listed_tokens_are_added_in_seconds(folder: Path) -> None:
    """Each time it adds tokens, the library takes time for all tokens added before."""
    size = read_vocabulary(folder)._prompts.get_vocab_size()
    listed = {str(size + i): {"content": f"<added{i}>"} for i in range(20_000)}
    describe(folder, "tokenizer_config.json", added_tokens_decoder=listed)
    began = time.monotonic()
    (token,) = read_vocabulary(folder).encode_prompt("<added19999>", add_special_tokens=False)
    assert token.id == size + 19_999
    assert time.monotonic() - began < SECONDS


def rotations(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | changes}


SIZES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"num_key_value_heads": 2},
    "gptj": {"rotary_dim": 4},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "mpt": {"attn_config": {"clip_qkv": 1.0}},
}
LENGTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "context of 10^13": ("llama", {"max_position_embeddings": 10**13}),
    "negative context": ("llama", {"max_position_embeddings": -1}),
    "table of 10^9 positions": ("gptj", {"n_positions": 10**9}),
    "biases of 10^9 positions": ("mpt", {"max_seq_len": 10**9}),
    "biases of 10^9 heads": ("mpt", {"n_heads": 10**9}),
    "window of none": ("mistral", {"sliding_window": 0}),
    "negative window": ("gemma3_text", {"sliding_window": -1}),
    "100,000 layer types": ("llama", {"layer_types": ["full_attention"] * 100_000}),
    "rotation of a million heads": ("llama", rotations(partial_rotary_factor=1e6)),
    "rotation of NaN heads": ("llama", rotations(partial_rotary_factor=math.nan)),
    "rotation by nothing": ("llama", rotations(rope_type="linear", factor=0.0)),
    "rotation by NaN": ("llama", rotations(rope_type="linear", factor=math.nan)),
    "rotation by a list": ("llama", rotations(rope_type="linear", factor=[1.0] * 100_000)),
    "base of NaN": ("llama", rotations(rope_theta=math.nan)),
    "base beyond floats": ("llama", rotations(rope_theta=10**400)),
    "original context of none": (
        "llama",
        rotations(rope_type="yarn", factor=4.0, original_max_position_embeddings=0),
    ),
    "original context as text": (
        "llama",
        rotations(rope_type="yarn", factor=4.0, original_max_position_embeddings="8"),
    ),
    "100,000 factors": (
        "llama",
        rotations(rope_type="longrope", factor=2.0, original_max_position_embeddings=8)
        | {"short_factor": [1.0] * 100_000, "long_factor": [1.0] * 100_000},
    ),
    "unknown rotation": ("llama", rotations(rope_type="os.system")),
    "heads of nothing": ("llama", {"head_dim": 0}),
    "10^9 heads": ("llama", {"num_attention_heads": 10**9}),
}


@pytest.mark.parametrize(("family", "changes"), LENGTHS.values(), ids=list(LENGTHS))
def test_impossible_lengths_and_rotations_fail_in_one_line(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    saved(Case(family, "plain", SIZES[family]), folder)
    assert status_of(folder).state is ModelState.READY
    describe(folder, **changes)
    assert str(folder) in refusal(folder) or "self-check" in refusal(folder)


@pytest.mark.parametrize("length", [10**9, 10**30])
def test_windows_longer_than_any_prompt_are_served(tmp_path: Path, length: int) -> None:
    folder = tmp_path / "model"
    saved(Case("mistral", "window", SIZES["mistral"]), folder)
    describe(folder, sliding_window=length)
    assert status_of(folder).state is ModelState.READY


def test_links_within_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    blobs.mkdir(parents=True)
    model = sharded(healthy(tmp_path / "model"))
    for i, path in enumerate(sorted(model.iterdir())):
        shutil.move(path, blobs / str(i))
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert status_of(snapshot).state is ModelState.READY
    (tmp_path / "link").symlink_to(snapshot)  # as operators name a snapshot
    assert status_of(tmp_path / "link").state is ModelState.READY


def sharded(folder: Path) -> Path:
    """Split the weights into two files with an index."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    index: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_a_tokenizer_of_30_megabytes_is_read(folder: Path) -> None:
    """The largest published vocabularies have a quarter of a million entries and this size."""
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described) + " " * (30 * 2**20))
    assert status_of(folder).state is ModelState.READY


def test_weights_of_half_the_size_are_not_allocated(folder: Path) -> None:
    """Up to the factor, the error still names the first wrong shape."""
    path = folder / WEIGHTS
    found = load_file(path)
    found["transformer.ln_f.weight"] = torch.ones(3)
    save_file(found, path, {"format": "pt"})
    assert "has shape [3]: expected [128]" in refusal(folder)


def test_the_other_model_serves_beside_a_hostile_one(tmp_path: Path) -> None:
    hostile = with_configuration(tmp_path / "hostile", n_layer=10**9)
    flags = ["--model", f"hostile={hostile}", "--model", f"healthy={model_path()}"]
    with running_server(*flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        states = {m.name: m.state for m in stub.ListModels(models_pb2.ListModelsRequest()).models}
        assert states == {
            "hostile": models_pb2.Model.STATE_FAILED,
            "healthy": models_pb2.Model.STATE_READY,
        }
        request = trace_pb2.TraceRequest(model="healthy", input=prompt("Japan"), layers=[0])
        assert list(stub.Trace(request))[-1].HasField("summary")
    assert [line for line in server.lines if "hostile FAILED" in line]
    assert "Traceback" not in server.log
