"""The committed stubs, the .proto files and the published form of the contract agree."""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import EnumDescriptor, FileDescriptor
from google.protobuf.message import Message

import januslens.v1
from januslens.v1 import gradient_lens_pb2, service_pb2, trace_pb2

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")

NODE_KINDS = """
    BLOCK_INPUT ATTENTION_INPUT QUERY KEY VALUE HEAD_QUERY HEAD_KEY HEAD_VALUE MEMORY_KEY
    MEMORY_VALUE HEAD_OUTPUT ATTENTION_CONCAT ATTENTION_NEURON ATTENTION_BIAS ATTENTION_SUM
    ATTENTION_OUTPUT RESIDUAL_MID MLP_INPUT MLP_KEY MLP_UP MLP_VALUE MLP_BIAS MLP_SUM MLP_OUTPUT
    BLOCK_OUTPUT FINAL_NORM PREDICTION OTHER MIXER_OUTPUT MIXER_HEAD
"""

Files = dict[str, descriptor_pb2.FileDescriptorProto]


def buf(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([BUF, *arguments], cwd=ROOT, capture_output=True, check=False)


def normalised(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """Remove what only one of the two compilers writes: comments and derived JSON names."""
    file.ClearField("source_code_info")
    file.DiscardUnknownFields()
    for message in messages(file.message_type):
        for field in message.field:
            field.ClearField("json_name")
    return file


def messages(
    declared: Iterable[descriptor_pb2.DescriptorProto],
) -> Iterator[descriptor_pb2.DescriptorProto]:
    for message in declared:
        yield message
        yield from messages(message.nested_type)


@pytest.fixture(scope="module")
def protos() -> Files:
    """Descriptors of the .proto files, by file name."""
    built = buf("build", "--as-file-descriptor-set", "-o", "-")
    assert built.returncode == 0, built.stderr.decode()
    files = descriptor_pb2.FileDescriptorSet.FromString(built.stdout).file
    return {file.name: normalised(file) for file in files}


@pytest.fixture(scope="module")
def stubs() -> Files:
    """Descriptors of the committed stubs, by file name."""
    files = {}
    for module in pkgutil.iter_modules(januslens.v1.__path__):
        if module.name.endswith("_pb2"):
            stub = importlib.import_module(f"januslens.v1.{module.name}")
            descriptor = cast(FileDescriptor, stub.DESCRIPTOR)
            file = descriptor_pb2.FileDescriptorProto.FromString(descriptor.serialized_pb)
            files[descriptor.name] = normalised(file)
    return files


def test_every_proto_has_its_stub_and_no_stub_is_left_over(protos: Files, stubs: Files) -> None:
    assert stubs.keys() == protos.keys()


def test_stub_descriptors_equal_the_protos(protos: Files, stubs: Files) -> None:
    drifted = [name for name, file in protos.items() if stubs[name] != file]
    assert drifted == [], "run `make stubs` and commit the result"


def test_every_message_of_the_stubs_is_typed() -> None:
    generated = Path(januslens.v1.__path__[0])
    modules = {path.stem for path in generated.glob("*_pb2*.py")}
    assert modules == {path.stem for path in generated.glob("*_pb2*.pyi")}


def test_contract_is_commented_and_linted() -> None:
    linted = buf("lint")
    assert linted.returncode == 0, linted.stdout.decode()


def test_lint_rejects_an_element_without_a_comment(tmp_path: Path) -> None:
    """If the lint rules were relaxed, the check above would pass without comments."""
    bare = tmp_path / "protos" / "januslens" / "v1" / "bare.proto"
    bare.parent.mkdir(parents=True)
    bare.write_text(
        'syntax = "proto3";\n\npackage januslens.v1;\n\nmessage Bare {\n  bool field = 1;\n}\n'
    )
    (tmp_path / "buf.yaml").write_text((ROOT / "buf.yaml").read_text())
    linted = buf("lint", str(tmp_path))
    assert linted.returncode != 0
    assert linted.stdout.decode().count("should have a non-empty comment") == 2


def test_contract_is_formatted() -> None:
    formatted = buf("format", "--diff", "--exit-code")
    assert formatted.returncode == 0, formatted.stdout.decode()


def test_service_offers_exactly_the_published_methods() -> None:
    service = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"]
    offered = {
        method.name: (method.input_type.name, method.output_type.name, method.server_streaming)
        for method in service.methods
    }
    assert offered == {
        "ListModels": ("ListModelsRequest", "ListModelsResponse", False),
        "GetModel": ("GetModelRequest", "GetModelResponse", False),
        "GetServerInfo": ("GetServerInfoRequest", "GetServerInfoResponse", False),
        "Tokenize": ("TokenizeRequest", "TokenizeResponse", False),
        "Project": ("ProjectRequest", "ProjectResponse", False),
        "Trace": ("TraceRequest", "TraceResponse", True),
        "GradientLens": ("GradientLensRequest", "GradientLensResponse", True),
        "PreviewEdit": ("PreviewEditRequest", "PreviewEditResponse", False),
        "Activations": ("ActivationsRequest", "ActivationsResponse", True),
        "Generate": ("GenerateRequest", "GenerateResponse", True),
        "Intervene": ("InterveneRequest", "InterveneResponse", True),
        "FindNeurons": ("FindNeuronsRequest", "FindNeuronsResponse", False),
        "EstimateCost": ("EstimateCostRequest", "EstimateCostResponse", False),
    }


@pytest.mark.parametrize(
    ("kinds", "published"),
    [
        (trace_pb2.NodeKind.DESCRIPTOR, NODE_KINDS),
        (trace_pb2.EdgeKind.DESCRIPTOR, "PART NORM PROJECT SPLIT ATTEND RECALL ACTIVATE SCALE GAP"),
        (gradient_lens_pb2.MatrixKind.DESCRIPTOR, "Q K V O FF1 GATE UP FF2 MODULE"),
    ],
    ids=["NodeKind", "EdgeKind", "MatrixKind"],
)
def test_enum_numbers_are_unchanged(kinds: EnumDescriptor, published: str) -> None:
    """Node ids contain the names, and stored traces the numbers."""
    numbers = {value.name.partition("_KIND_")[2]: value.number for value in kinds.values}
    assert numbers == {
        name: number for number, name in enumerate(["UNSPECIFIED", *published.split()])
    }


def test_scalars_with_a_meaningful_zero_are_optional() -> None:
    request: Message = trace_pb2.TraceRequest(top_k=0)
    assert request.HasField("top_k")
    assert not request.HasField("bottom_k")
