"""The same call on cpu and cuda: the same values, dtypes, shapes and layouts, and the same errors for bad input."""

from __future__ import annotations

import re

import numpy as np
import pytest
from test_ops import COMPOSED, EVERYTHING, cases, host, ident, steps

import gpuad
from gpuad import Tensor, nn
from gpuad.autograd import grad
from gpuad.autograd.op import functions, table
from gpuad.ops.samples import S

pytestmark = pytest.mark.cuda
F = nn.functional

TOLERANCE = {np.float64: 1e-12, np.float32: 4e-6, np.float16: 4e-3, gpuad.bfloat16: 3e-2}


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    a, b = host(got), host(expected)
    size = float(np.max(np.abs(b), initial=1.0)) if b.dtype.kind == "f" else 1.0
    np.testing.assert_allclose(a, b, tolerance, tolerance * size)


SETTINGS = [("plain", np.float64), ("plain", np.float32), ("plain", np.float16), ("plain", gpuad.bfloat16),
            ("transposed", np.float64), ("strided", np.float64), ("permuted", np.float64),
            ("mixed", np.float64)]  # fmt: skip


@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_values_dtypes_shapes_and_layouts(op, cuda_device):
    for layout, dtype in SETTINGS:
        for mine, theirs in zip(
            cases(op, gpuad.device("cpu"), dtype, layout), cases(op, cuda_device, dtype, layout), strict=True
        ):
            compare(mine, theirs, dtype)


def compare(mine, theirs, dtype) -> None:
    here, there = mine.leaves(), theirs.leaves()
    results, others = mine(*here), theirs(*there)
    assert len(results) == len(others)
    for y, z in zip(results, others, strict=True):
        assert (y.shape, y.dtype, y.requires_grad, steps(y)) == (z.shape, z.dtype, z.requires_grad, steps(z))
        assert y.is_contiguous() == z.is_contiguous()
        close(z, y, TOLERANCE[dtype])
    wanted = [(y, z) for y, z in zip(results, others, strict=True) if y.requires_grad]
    if not wanted or not mine.values or any(not np.isfinite(host(y)).all() for y, _ in wanted):
        return
    us = mine.like([y for y, _ in wanted])
    moved = [u.to(z.device) for u, (_, z) in zip(us, wanted, strict=True)]
    got = grad([z for _, z in wanted], there, moved, materialize_grads=True)
    for g, h in zip(grad([y for y, _ in wanted], here, us, materialize_grads=True), got, strict=True):
        assert (g.shape, g.dtype, steps(g)) == (h.shape, h.dtype, steps(h))
        close(h, g, 8 * TOLERANCE[dtype])  # a gradient is a few operations, each of which rounds


# Errors ---------------------------------------------------------------------------------------------------------------


def outcome(call, device, other) -> tuple:
    """What a call gives: shapes and dtypes, or the error's type and text, with the devices' names taken out."""
    try:
        result = call()
        gpuad.cuda.synchronize()  # where bad indices are reported
    except Exception as error:
        text = str(error)
        # A kernel that found a bad index adds when it was noticed.
        text = text.split(" An operation on cuda:0 found it")[0]
        text = text.replace(f"'{other}'", "'THERE'").replace(str(device), "HERE").replace(str(other), "THERE")
        text = re.sub(r"on (HERE|THERE) \(a bare ndarray\)", "on cpu (a bare ndarray)", text)
        text = "\n".join(" ".join(line.split()) for line in text.splitlines())
        return type(error), text
    results = result if isinstance(result, (tuple, list)) else (result,)
    return tuple((tuple(r.shape), r.dtype) if isinstance(r, Tensor) else type(r) for r in results)


def on_both(make) -> tuple:
    """The outcomes of make(device, other)() on cpu and on cuda."""
    cpu, cuda = gpuad.device("cpu"), gpuad.device("cuda:0")
    return outcome(make(cpu, cuda), cpu, cuda), outcome(make(cuda, cpu), cuda, cpu)


NUMERIC = {"integers", "bools", "float64", "float16"}
# Ways to spoil one operand: (label, the operand and the devices -> what is given in its place).
SPOILT = {
    "a last length of 7": lambda x, device, other: gpuad.ones(*x.shape[:-1], 7, device=device),
    "a dimension more": lambda x, device, other: gpuad.ones(7, *x.shape, device=device),
    "a dimension less": lambda x, device, other: gpuad.ones(x.shape[1:], device=device),
    "integers": lambda x, device, other: x.detach().to(gpuad.int64),
    "bools": lambda x, device, other: x.detach() > 0,
    "float64": lambda x, device, other: x.detach().double(),
    "float16": lambda x, device, other: x.detach().half(),
    "the other device": lambda x, device, other: x.detach().to(other),
    "a string": lambda x, device, other: "three",
    "a list": lambda x, device, other: [1.0, 2.0],
    "a bare NumPy array": lambda x, device, other: np.ones(3, np.float32),
    "nothing": lambda x, device, other: None,
}


# The table's ops that users call by name; others get their operands from functions that have checked them.
PUBLIC = [op for op in table.values() if functions.get(op.name) is op]


@pytest.mark.parametrize("op", [*PUBLIC, *COMPOSED], ids=ident)
def test_spoilt_operands_end_alike(op, cuda_device):
    sample = next((s for s in op.samples if isinstance(s[0], S) and len(s[0].shape) == 2 and 0 not in s[0].shape),
                  op.samples[0])  # fmt: skip
    entries = sample[:-1] if isinstance(sample[-1], dict) else sample
    for place in (i for i, entry in enumerate(entries) if isinstance(entry, S)):
        for label, way in SPOILT.items():
            if label == "a dimension less" and not entries[place].shape:
                continue
            if label in NUMERIC and entries[place].kind != "float":
                continue

            def make(device, other, place=place, way=way):
                (case,) = cases(_One(op, sample), device, np.float32)
                given = list(case.entries)
                given[place] = way(given[place], device, other)
                return lambda: op(*given, **case.params)

            here, there = on_both(make)
            assert here == there, f"operand {place}: {label}"


class _One:
    """An op with one of its samples."""

    def __init__(self, op, sample) -> None:
        self.name, self.samples = op.name, [sample]


CALLS = {
    "matmul shapes": lambda x, i: x @ x,
    "mm of a vector": lambda x, i: x.mm(x[0]),
    "bmm of matrices": lambda x, i: x.bmm(x),
    "dot of matrices": lambda x, i: x.dot(x),
    "linear width": lambda x, i: F.linear(x, gpuad.ones(5, 3, device=x.device)),
    "linear dtype": lambda x, i: F.linear(x, gpuad.ones(5, 4, device=x.device, dtype=gpuad.float64)),
    "view": lambda x, i: x.view(5, 5),
    "view of a transposed tensor": lambda x, i: x.T.view(12),
    "reshape": lambda x, i: x.reshape(5, -1),
    "reshape twice unknown": lambda x, i: x.reshape(-1, -1),
    "expand": lambda x, i: x.expand(7, 5),
    "permute": lambda x, i: x.permute(0, 0),
    "transpose": lambda x, i: x.transpose(0, 2),
    "squeeze": lambda x, i: x.squeeze(5),
    "cat shapes": lambda x, i: gpuad.cat([x, x.T]),
    "cat of nothing": lambda x, i: gpuad.cat([]),
    "cat dim": lambda x, i: gpuad.cat([x, x], 3),
    "stack shapes": lambda x, i: gpuad.stack([x, x.T]),
    "split sizes": lambda x, i: x.split([1, 1]),
    "narrow": lambda x, i: x.narrow(0, 2, 5),
    "sum dim": lambda x, i: x.sum(2),
    "sum dim twice": lambda x, i: x.sum((0, 0)),
    "mean of integers": lambda x, i: i.mean(),
    "max of nothing": lambda x, i: x[:0].max(),
    "argmax of nothing": lambda x, i: x[:0].argmax(0),
    "softmax dim": lambda x, i: x.softmax(4),
    "topk": lambda x, i: x.topk(9),
    "sort dim": lambda x, i: x.sort(3),
    "layer_norm": lambda x, i: F.layer_norm(x, (3,)),
    "index beyond": lambda x, i: x[7],
    "index below": lambda x, i: x[-4],
    "too many indices": lambda x, i: x[0, 0, 0],
    "list beyond": lambda x, i: x[[0, 7]],
    "tensor beyond": lambda x, i: x[i + 5],
    "tensor below": lambda x, i: x[i - 9],
    "float index": lambda x, i: x[x],
    "string index": lambda x, i: x["a"],
    "bool mask shape": lambda x, i: x[x.T > 0],
    "negative step": lambda x, i: x[::-1],
    "assign shape": lambda x, i: x.__setitem__(0, gpuad.ones(3, device=x.device)),
    "assign beyond": lambda x, i: x.__setitem__(5, 1.0),
    "gather beyond": lambda x, i: x.gather(1, gpuad.full((3, 1), 9, device=x.device)),
    "gather dtype": lambda x, i: x.gather(1, x),
    "gather dims": lambda x, i: x.gather(1, i),
    "scatter beyond": lambda x, i: x.scatter(1, gpuad.full((3, 1), 9, device=x.device), 1.0),
    "index_select beyond": lambda x, i: x.index_select(0, i + 9),
    "embedding beyond": lambda x, i: F.embedding(i + 9, x),
    "embedding dtype": lambda x, i: F.embedding(x, x),
    "cross_entropy label": lambda x, i: F.cross_entropy(x, i + 9),
    "cross_entropy negative label": lambda x, i: F.cross_entropy(x, i - 5),
    "cross_entropy shape": lambda x, i: F.cross_entropy(x, i[:2]),
    "cross_entropy dtype": lambda x, i: F.cross_entropy(x, x.T),
    "nll_loss label": lambda x, i: F.nll_loss(x, i + 9),
    "cross_entropy of integers": lambda x, i: F.cross_entropy(x.long(), i),
    "nll_loss of integers": lambda x, i: F.nll_loss(x.long(), i),
    "mse_loss of integers": lambda x, i: F.mse_loss(i, i),
    "l1_loss of no integers": lambda x, i: F.l1_loss(i[:0], i[:0]),
    "rms_norm of integers": lambda x, i: F.rms_norm(x.long(), (4,)),
    "bce shapes": lambda x, i: F.binary_cross_entropy(x, x.T),
    "reduction": lambda x, i: F.mse_loss(x, x, reduction="median"),
    "in place shape": lambda x, i: x.add_(gpuad.ones(2, 3, 4, device=x.device)),
    "in place dtype": lambda x, i: i.add_(1.5),
    "in place leaf": lambda x, i: x.requires_grad_().add_(1),
    "in place expanded": lambda x, i: x[:1].expand(3, 4).add_(1),
    "integer to a negative power": lambda x, i: i**-1,
    "where condition": lambda x, i: gpuad.where(x, x, x),
    "masked_fill mask": lambda x, i: x.masked_fill(x, 0.0),
    "clamp without bounds": lambda x, i: x.clamp(),
    "item of many": lambda x, i: x.item(),
    "bool of many": lambda x, i: bool(x),
    "float as index": lambda x, i: range(3)[x[0, 0]],
    "len of 0-d": lambda x, i: len(x[0, 0]),
    "grad of integers": lambda x, i: i.requires_grad_(),
    "backward of many": lambda x, i: (x.requires_grad_() * 2).backward(),
    "backward without grad": lambda x, i: x.sum().backward(),
    "backward gradient shape": lambda x, i: (x.requires_grad_() * 2).backward(x.detach().T),
    "grad shape": lambda x, i: setattr(x, "grad", x.T),
    "dtype": lambda x, i: x.to("complex64"),
    "device": lambda x, i: x.to("tpu"),
    "dropout p": lambda x, i: F.dropout(x, 1.5),
    "negative length": lambda x, i: gpuad.zeros(-1, device=x.device),
    "tril of a vector": lambda x, i: x[0].tril(),
    "tensor of ragged lists": lambda x, i: gpuad.tensor([[1.0], [1.0, 2.0]], device=x.device),
    "numpy of a leaf": lambda x, i: x.requires_grad_().numpy(),
}


@pytest.mark.parametrize("call", CALLS)
def test_bad_calls_fail_alike(call, cuda_device):
    def make(device, other):
        x = gpuad.arange(12, device=device).float().reshape(3, 4)
        labels = gpuad.tensor([0, 1, 2], device=device)
        return lambda: CALLS[call](x, labels)

    here, there = on_both(make)
    assert isinstance(here[0], type) and issubclass(here[0], Exception), f"{call} is not refused: {here}"
    assert here == there


@pytest.mark.parametrize("f", [lambda x: x.round(), lambda x: x.floor(), lambda x: x.trunc(), lambda x: x.nan_to_num()],
                         ids=["round", "floor", "trunc", "nan_to_num"])  # fmt: skip
def test_integers_are_whole_already(f, cuda_device):
    for device in ("cpu", cuda_device):
        x = gpuad.arange(4, device=device)
        y = f(x)
        assert y.dtype == gpuad.int64 and y.tolist() == [0, 1, 2, 3] and y.data_ptr() != x.data_ptr()
