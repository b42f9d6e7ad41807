"""The places where transformers lets a folder's data choose files, code or downloads.

They are found in its source. If a release adds one, a test fails until someone has reviewed it, and
either `models/vetting.py` refuses the key or the list below marks it as harmless.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest
import transformers

from januslens_server.models.vetting import ALLOWED_IMPLEMENTATIONS, DESCRIPTIONS, REFUSED_KEYS
from tests.support.forked import printed
from tests.support.model_folders import healthy

ROOT = Path(transformers.__file__).parent
# The modules that load a model from a folder. All others belong to one family or are not called.
LOADERS = (
    "backbone_utils.py",
    "configuration_utils.py",
    "core_model_loading.py",
    "conversion_mapping.py",
    "distributed/checkpoint.py",
    "dynamic_module_utils.py",
    "fusion_mapping.py",
    "generation/configuration_utils.py",
    "generation/utils.py",
    "integrations/hub_kernels.py",
    "integrations/peft.py",
    "modeling_flash_attention_utils.py",
    "modeling_utils.py",
    "models/auto/auto_factory.py",
    "models/auto/configuration_auto.py",
    "models/auto/tokenization_auto.py",
    "quantizers/auto.py",
    "tokenization_utils_base.py",
    "tokenization_utils_tokenizers.py",
    "utils/hub.py",
    "utils/peft_utils.py",
)
# Functions that import, fetch, open or unpickle what their arguments name.
DANGEROUS = {
    "cached_file",
    "cached_files",
    "eval",
    "exec",
    "get_cached_module_file",
    "get_class_from_dynamic_module",
    "get_config_dict",
    "get_kernel",
    "get_kernel_hub",
    "hf_hub_download",
    "import_module",
    "lazy_load_kernel",
    "load_and_register_attn_kernel",
    "repo_exists",
    "snapshot_download",
    "torch.load",
}
# Keys that choose sizes, numbers or tokens, or that transformers writes itself.
HARMLESS_KEYS = frozenset(
    """
    _commit_hash _eos_token_tensor _from_model_config _mask_length _name_or_path add_bos_token
    add_eos_token added_tokens_decoder additional_special_tokens architectures attention_dropout
    backbone_config chat_control_tokens chat_template compile_config dequantize device_map dtype
    extra_special_tokens files_loaded first_k_dense_replace fix_mistral_regex
    gradient_checkpointing head_dim inference_mode init_std initializer_factor initializer_range
    is_local layer_types local_files_only max_position_embeddings mlp_layer_types model_name
    model_specific_special_tokens model_type mtp_layer_types mtp_mlp_layer_types
    mtp_per_layer_config name_or_path num_attention_heads num_key_value_heads num_mtp_layers
    out_features output_hidden_states
    processor_class qk_head_dim response_template sep_token_id sliding_window
    slow_tokenizer_class special_tokens_map_file stage_names
    tie_word_embeddings tokenizer_class tokenizer_file
    vision_config vocab_size
    """.split()
)
# Blocked in another way: code needs `trust_remote_code`, which is never on, and files of adapters
# are refused by name.
SHUT_KEYS = frozenset({"auto_map", "base_model_name_or_path", "peft_type"})
DICTIONARIES = {"adapter_config", "config_dict", "init_kwargs", "tokenizer_config"}


def keys_read(tree: ast.AST) -> Iterator[str]:
    """Return the keys that a source reads from a configuration, as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > 0:
            name, arguments = ast.unparse(node.func), node.args
            owner, _, method = name.rpartition(".")
            if name in {"getattr", "hasattr"} and ast.unparse(arguments[0]).endswith("config"):
                yield from texts(arguments[1:2])
            elif method in {"get", "pop", "setdefault"} and owner in DICTIONARIES:
                yield from texts(arguments[:1])
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            if ast.unparse(node.comparators[0]) in DICTIONARIES:
                yield from texts([node.left])
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in DICTIONARIES:
            yield from texts([node.slice])


def texts(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def dangerous_calls(tree: ast.AST, inside: str = "") -> Iterator[str]:
    """Return `function: call` for every dangerous call."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            method = called.rpartition(".")[2]
            if called in DANGEROUS or (method in DANGEROUS and method not in {"eval", "exec"}):
                yield f"{inside} calls {called}"
        yield from dangerous_calls(node, getattr(node, "name", "") if named else inside)


# Each needs `trust_remote_code`, the `kernels` package, `peft` or a refused key, or reads a file of
# the folder with a fixed name.
KNOWN_CALLS = """
    backbone_utils.py: consolidate_backbone_kwargs_to_config calls PreTrainedConfig.get_config_dict
    backbone_utils.py: consolidate_backbone_kwargs_to_config calls hf_api().repo_exists
    configuration_utils.py: from_pretrained calls cls.get_config_dict
    models/auto/auto_factory.py: from_pretrained calls hf_api().repo_exists
    models/auto/configuration_auto.py: from_pretrained calls PreTrainedConfig.get_config_dict
    configuration_utils.py: _get_config_dict calls cached_file
    dynamic_module_utils.py: check_imports calls importlib.import_module
    dynamic_module_utils.py: check_python_requirements calls cached_file
    dynamic_module_utils.py: get_cached_module_file calls cached_file
    dynamic_module_utils.py: get_cached_module_file calls get_cached_module_file
    dynamic_module_utils.py: get_class_from_dynamic_module calls get_cached_module_file
    generation/configuration_utils.py: from_pretrained calls cached_file
    generation/utils.py: load_custom_generate calls get_cached_module_file
    integrations/hub_kernels.py: decorator calls importlib.import_module
    integrations/hub_kernels.py: get_kernel calls get_kernel_hub
    integrations/hub_kernels.py: lazy_load_kernel calls get_kernel
    integrations/hub_kernels.py: lazy_load_kernel calls importlib.import_module
    integrations/hub_kernels.py: load_and_register_attn_kernel calls get_kernel
    modeling_flash_attention_utils.py: _lazy_imports calls load_and_register_attn_kernel
    modeling_utils.py: _get_resolved_checkpoint_files calls cached_file
    modeling_utils.py: from_pretrained calls cached_file
    modeling_utils.py: load_state_dict calls torch.load
    models/auto/auto_factory.py: _load_attr_from_module calls importlib.import_module
    models/auto/auto_factory.py: from_config calls get_class_from_dynamic_module
    models/auto/auto_factory.py: from_pretrained calls get_class_from_dynamic_module
    models/auto/auto_factory.py: getattribute_from_module calls importlib.import_module
    models/auto/configuration_auto.py: __getitem__ calls importlib.import_module
    models/auto/configuration_auto.py: _initialize calls importlib.import_module
    models/auto/configuration_auto.py: from_pretrained calls get_class_from_dynamic_module
    models/auto/tokenization_auto.py: from_pretrained calls cached_file
    models/auto/tokenization_auto.py: from_pretrained calls get_class_from_dynamic_module
    models/auto/tokenization_auto.py: get_tokenizer_config calls cached_file
    models/auto/tokenization_auto.py: tokenizer_class_from_name calls importlib.import_module
    tokenization_utils_base.py: from_pretrained calls cached_file
    tokenization_utils_base.py: load_vocab_and_merges calls cached_file
    tokenization_utils_tokenizers.py: __init__ calls cached_file
    tokenization_utils_tokenizers.py: _patch_mistral_regex calls cached_file
    tokenization_utils_tokenizers.py: _tokenizer_json_has_byte_level calls cached_file
    utils/hub.py: cached_file calls cached_files
    utils/hub.py: cached_files calls hf_hub_download
    utils/hub.py: cached_files calls snapshot_download
    utils/hub.py: get_checkpoint_shard_files calls cached_files
    utils/hub.py: list_repo_templates calls hf_api().snapshot_download
    utils/peft_utils.py: find_adapter_config_file calls cached_file
"""


# Files that transformers' code names. Those with a suffix of `DESCRIPTIONS` are checked before any
# file is opened. The others contain code or weights, and no code that a load calls opens them.
KNOWN_FILES = frozenset(
    """
    adapter_config.json adapter_model.bin adapter_model.safetensors added_tokens.json
    audio_tokenizer_config.json bpe.codes byte_maps.json chat_template.jinja
    chat_template.json config.json dict.txt emoji.json
    entity_vocab.json generation_config.json language_model.model merges.txt model.safetensors
    model.safetensors.index.json modelcard.json normalizer.json preprocessor_config.json
    processor_config.json prophetnet.tokenizer pytorch_model.bin pytorch_model.bin.index.json
    requirements.txt
    sentencepiece.bpe.model sentencepiece.model source.spm special_tokens_map.json spiece.model
    spm.model spm_char.model target.spm target_vocab.json tekken.json tiktoken.model tokenizer.json
    tokenizer.model tokenizer_config.json video_preprocessor_config.json vocab-src.json
    vocab-tgt.json vocab.json vocab.txt word_pronunciation.json word_shape.json
    """.split()
)
UNCHECKED = {".bin", ".safetensors"}
FILE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.(bin|bpe|codes|jinja|json|model|safetensors|spm|txt)")


def files_named() -> Iterator[str]:
    """Return the files of tokenizers of all families, and those named in the loading code."""
    for path in ROOT.glob("models/*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES":
                yield from texts([value for value in ast.walk(node.value) if is_file_name(value)])
    for module in (*LOADERS, "utils/__init__.py", "utils/hub.py"):
        tree = ast.parse((ROOT / module).read_text())
        yield from texts([value for value in ast.walk(tree) if is_file_name(value)])


def is_file_name(node: ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and FILE_NAME.fullmatch(str(node.value)) is not None


def test_every_file_that_transformers_names_is_known_and_checked() -> None:
    found = set(files_named())
    assert found <= KNOWN_FILES, (
        f"decide how models/vetting.py checks {sorted(found - KNOWN_FILES)}"
    )
    assert {"tokenizer.json", "spiece.model", "added_tokens.json", "bpe.codes"} <= found
    assert {Path(name).suffix for name in KNOWN_FILES} <= DESCRIPTIONS | UNCHECKED


def test_loading_opens_only_checked_files(tmp_path: Path) -> None:
    """Python reports every file that it opens, including those that transformers opens."""
    folder = healthy(tmp_path / "model")
    for name in KNOWN_FILES:
        if not (folder / name).exists() and not name.endswith(".index.json"):
            (folder / name).write_text("{}")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from januslens_server.models.loader import ModelSource, load\n"
        "opened = set()\n"
        "sys.addaudithook(lambda event, args: event == 'open' and opened.add(str(args[0])))\n"
        f"load(ModelSource('demo', {str(folder)!r}))\n"
        f"print(*(Path(n).name for n in opened if n.startswith({str(folder)!r})))\n"
    )
    opened = set(printed(program).split())
    assert {"config.json", "tokenizer.json", "special_tokens_map.json"} <= opened
    assert {Path(name).suffix for name in opened} <= DESCRIPTIONS | {".safetensors"}


@pytest.mark.parametrize("module", LOADERS)
def test_every_key_that_transformers_reads_is_known(module: str) -> None:
    known = HARMLESS_KEYS | SHUT_KEYS | set(REFUSED_KEYS) | set(ALLOWED_IMPLEMENTATIONS)
    found = set(keys_read(ast.parse((ROOT / module).read_text())))
    assert found <= known, f"decide what models/vetting.py does about {sorted(found - known)}"


@pytest.mark.parametrize("module", LOADERS)
def test_every_call_that_imports_or_fetches_is_known(module: str) -> None:
    known = {line.strip() for line in KNOWN_CALLS.splitlines()}
    calls = dangerous_calls(ast.parse((ROOT / module).read_text()))
    found = {f"{module}: {call}" for call in calls}
    assert found <= known, f"look at what a folder can make of {sorted(found - known)}"


def test_reviewed_lists_match_the_transformers_release() -> None:
    """The scan must find all known places, because an empty scan would pass."""
    sources = {module: ast.parse((ROOT / module).read_text()) for module in LOADERS}
    keys = {key for source in sources.values() for key in keys_read(source)}
    assert {"auto_map", "configuration_files", "fusion_config", "transformers_weights"} <= keys
    calls = {call for source in sources.values() for call in dangerous_calls(source)}
    assert "get_kernel calls get_kernel_hub" in calls
