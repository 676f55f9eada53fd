from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from graphcap.passes.add_rms_norm_cases import numeric_cases
from graphcap.passes.kernels.add_rms_norm import add_rms_norm
from graphcap.passes.selftest import NumericCase, compare

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", list(numeric_cases(CPU)), ids=lambda case: case.label)
def test_plain_implementation_is_as_exact_as_the_pattern(case: NumericCase) -> None:
    comparison = compare(case)
    assert comparison.passed, comparison


@pytest.mark.gpu
def test_triton_kernel_is_as_exact_as_the_pattern() -> None:
    failed = [done for case in numeric_cases(torch.device("cuda")) if not (done := compare(case)).passed]
    assert not failed


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [1, 2, 127, 16384])
def test_triton_kernel_at_the_edges_of_its_width(hidden: int) -> None:
    x, residual = (torch.randn(3, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(hidden, device="cuda", dtype=torch.bfloat16)
    on_cuda = add_rms_norm(x, residual, weight, 1e-6, True)
    on_cpu = add_rms_norm(x.cpu(), residual.cpu(), weight.cpu(), 1e-6, True)
    torch.testing.assert_close([tensor.cpu() for tensor in on_cuda], list(on_cpu))


def test_a_wrong_replacement_fails_the_self_test() -> None:
    case = next(iter(numeric_cases(CPU)))

    def wrong(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return add_rms_norm(x, residual, 1 + weight, 1e-5, False)

    wrong_case = NumericCase(case.label, case.inputs, case.pattern, wrong, case.exact)
    assert not compare(wrong_case).passed


@pytest.mark.parametrize("weight_in_fp32", [False, True])
def test_the_op_is_what_it_says_it_is(weight_in_fp32: bool) -> None:
    """Schema, fake implementation and tracing, as torch checks them."""
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    inputs = (x, x, x[0, 0], 1e-6, weight_in_fp32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.graphcap.add_rms_norm.default, inputs, test_utils=tests)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    assert [tensor.shape for tensor in add_rms_norm(x, x, torch.ones(8), 1e-6, True)] == [x.shape, x.shape]


def test_results_are_contiguous_whatever_comes_in() -> None:
    x, residual = torch.randn(8, 4).t(), torch.randn(4, 8)
    results = add_rms_norm(x, residual, torch.ones(8), 1e-6, True)
    assert all(tensor.is_contiguous() for tensor in results)
    torch.testing.assert_close(results[1], x + residual)


@pytest.mark.parametrize(
    ("x", "residual", "weight", "complaint"),
    [
        (torch.ones(2, 8), torch.ones(8), torch.ones(8), r"\(2, 8\), \(8,\) and \(8,\)"),
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(4), r"\(2, 8\) and \(4,\)"),
        (torch.ones(2, 8), torch.ones(2, 8).half(), torch.ones(8), "float32 and torch.float16"),
        (torch.ones(2, 8).long(), torch.ones(2, 8).long(), torch.ones(8), "int64"),
        (torch.ones(2, 8).half(), torch.ones(2, 8).half(), torch.ones(8), "weight must be torch.float16"),
        (torch.tensor(1.0), torch.tensor(1.0), torch.ones(1), r"\(\), \(\)"),
    ],
)
def test_misfits_are_refused(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        add_rms_norm(x, residual, weight, 1e-6, False)


def test_imports_where_triton_is_missing() -> None:
    code = "import sys; sys.modules['triton'] = None; import graphcap.passes; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "imported"
