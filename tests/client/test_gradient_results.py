"""Test the queries of a gradient against results computed by hand (see messages.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from januslens import End, Gradient, Matrix, MatrixKind, Side, read_gradient
from januslens.assemblers import GradientAssembler
from januslens.cli.gradient import verification_line
from januslens.v1 import gradient_lens_pb2
from tests.client import messages
from tests.client.messages import gradient_stream


def assembled(responses: list[gradient_lens_pb2.GradientLensResponse]) -> Gradient:
    assembler = GradientAssembler()
    for response in responses:
        assembler.feed(response)
    return assembler.result()


def with_matrix(message: gradient_lens_pb2.GradientMatrix) -> Matrix:
    stream = gradient_stream(messages.gradient_header(), message, messages.gradient_summary())
    return assembled(stream).matrices[0]


@pytest.fixture
def gradient() -> Gradient:
    return assembled(gradient_stream())


def test_the_promoted_end_is_named_on_the_matrix_and_used_by_its_components(
    gradient: Gradient,
) -> None:
    matrix = gradient.matrix(1, "ff2")
    assert matrix.promoted_end is End.BOTTOM
    assert matrix.projected_side is Side.VJP
    component = matrix.components[0]
    assert [token.text for token in component.promoted] == [" c", "a"]
    assert [token.text for token in component.suppressed] == [" d", "\n"]


def test_an_input_is_imprinted_not_promoted(gradient: Gradient) -> None:
    component = gradient.matrix(1, MatrixKind.FF1).components[0]
    assert (component.promoted, component.suppressed) == ((), ())
    assert component.projection is not None
    assert component.projection.top_tokens[0].text == " d"


def test_a_component_that_is_promoted_at_the_top() -> None:
    message = messages.matrix()
    message.promoted_end = gradient_lens_pb2.RANKING_END_TOP
    component = with_matrix(message).components[0]
    assert [token.text for token in component.promoted] == [" d", "\n"]


def test_the_dense_gradient_is_the_sum_of_the_outer_products(gradient: Gradient) -> None:
    matrix = gradient.matrix(1, "FF2")
    expected = np.array([[0.0, 6.0, 0.0], [2.0, 8.0, 0.0]])
    np.testing.assert_array_equal(matrix.gradient(), expected)
    np.testing.assert_array_equal(matrix.components[0].outer(), [[0, 6, 0], [0, 8, 0]])
    assert matrix.gradient().dtype == np.float32


def test_a_dense_gradient_from_some_components_is_refused() -> None:
    with pytest.raises(ValueError, match="components=0"):
        with_matrix(messages.matrix([1])).gradient()


def test_unrequested_factors_raise_a_clear_error() -> None:
    matrix = with_matrix(messages.matrix(factors=False))
    with pytest.raises(ValueError, match="factors=True"):
        matrix.gradient()
    with pytest.raises(ValueError, match="factors=True"):
        matrix.components[0].outer()


def test_a_gradient_of_zero_is_a_matrix_of_zeros() -> None:
    message = messages.matrix([])
    message.component_count = 0
    np.testing.assert_array_equal(with_matrix(message).gradient(), np.zeros((2, 3)))


def test_requested_extras_are_in_the_result(gradient: Gradient) -> None:
    matrix = gradient.matrix(1, "FF1")
    assert matrix.verification is not None
    assert matrix.verification.relative_error == pytest.approx(2e-7)
    assert matrix.spectrum[0].explained == pytest.approx(0.96)
    assert matrix.neurons[0].after is not None
    assert str(matrix.neurons[0].after) == "␣d"
    assert gradient.segments[0].segment == "last_token"
    assert gradient.segments[0].kind is MatrixKind.FF2
    assert gradient.header.skipped == (MatrixKind.GATE,)
    assert gradient.matrix(1, "FF2").verification is None


def test_matrices_by_kind_and_by_name(gradient: Gradient) -> None:
    assert [matrix.name for matrix in gradient.of_kind("FF2")] == ["L1.FF2"]
    assert with_matrix(_of_expert(3)).name == "L1.e3.FF2"
    with pytest.raises(KeyError, match=r"no matrix L0\.Q; expected one of L1\.FF2, L1\.FF1"):
        gradient.matrix(0, "Q")


def test_ff1_of_a_gated_mlp_is_gate_and_up() -> None:
    gate, up = messages.matrix(), messages.matrix()
    gate.kind = gradient_lens_pb2.MATRIX_KIND_GATE
    up.kind = gradient_lens_pb2.MATRIX_KIND_UP
    header, summary = messages.gradient_header(), messages.gradient_summary()
    gradient = assembled(gradient_stream(header, gate, up, summary))
    assert gradient.of_kind("FF1") == list(gradient.matrices)
    assert [matrix.name for matrix in gradient.of_kind("UP")] == ["L1.UP"]
    from_last = 1 - gradient.header.sizes.n_layers
    for layer in (1, from_last):
        assert gradient.of_kind("FF1", layer) == list(gradient.matrices)
    assert gradient.of_kind("FF1", layer=0) == []
    with pytest.raises(KeyError, match=r"FF1 is two matrices: of_kind\('FF1', 1\)"):
        gradient.matrix(1, "FF1")


def _of_expert(expert: int) -> gradient_lens_pb2.GradientMatrix:
    message = messages.matrix()
    message.expert = expert
    return message


def test_the_frame(gradient: Gradient) -> None:
    frame = gradient.to_pandas()
    assert len(frame) == 4
    row = frame.iloc[0]
    assert (row["layer"], row["kind"], row["position"], row["token"]) == (1, "FF2", 1, " b")
    assert row["size"] == 10.0
    assert (row["input_norm"], row["vjp_norm"]) == (5.0, 2.0)
    assert row["promoted"] == [" c", "a"]
    assert row["target_rank"] == 4
    assert frame["expert"].isna().all()
    assert gradient.matrices[0].to_pandas()["token"].isna().all()


def test_factors_are_saved_with_their_coordinates(gradient: Gradient, tmp_path: Path) -> None:
    file = tmp_path / "factors.safetensors"
    gradient.save_factors(file)
    arrays = load_file(file)
    assert set(arrays) == {
        f"L1.{kind}.{part}" for kind in ("FF1", "FF2") for part in ("input", "vjp", "position")
    }
    dense = arrays["L1.FF2.input"].T @ arrays["L1.FF2.vjp"]
    np.testing.assert_array_equal(dense, gradient.matrix(1, "FF2").gradient())
    assert arrays["L1.FF2.position"].tolist() == [1, 0]
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert metadata.items() >= {"model": "tiny", "token_ids": "0 1", "loss": "1.25"}.items()


def test_one_matrix_is_saved(gradient: Gradient, tmp_path: Path) -> None:
    gradient.matrices[0].save_factors(tmp_path / "one.safetensors")
    assert len(load_file(tmp_path / "one.safetensors")) == 3


def test_the_stream_is_kept_as_json_and_read_back(gradient: Gradient) -> None:
    assert read_gradient(gradient.to_json_lines()) == gradient


@pytest.mark.parametrize(
    ("error", "verdict"), [(1e-6, "passed"), (1e-5, "passed"), (1e-3, "FAILED")]
)
def test_a_comparison_with_autograd_passes_within_its_tolerance(error: float, verdict: str) -> None:
    message = messages.matrix()
    message.verification.relative_error = error
    message.verification.tolerance = 1e-5
    line = verification_line([with_matrix(message)])
    assert line.plain.endswith(f"(tolerance 1e-05, {verdict})")
    assert ("red" in str(line.style)) == (verdict == "FAILED")
