"""gpuad.graph as data and as text: the source text's f(x, y) = (x + y)(x − y), layers, and what is hard to trace."""

import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

import gpuad
from gpuad import nn
from gpuad.autograd.op import Interpreters
from gpuad.errors import AutogradError, MissingPackageError, ShapeError

trace, of = gpuad.graph.trace, gpuad.graph.of


def f(x, y):
    a = x + y
    b = x - y
    return a * b


def numbers(device):
    return gpuad.tensor(3.0, device=device), gpuad.tensor(2.0, device=device)


def test_values_tangents_and_gradients_of_the_source_text(device):
    x, y = numbers(device)
    graph = trace(f, x, y, tangents=(gpuad.ones_like(x), gpuad.zeros_like(x)))
    found = {n.name: (n.value.item(), n.tangent.item(), n.gradient.item()) for n in graph.nodes}
    assert found == {"x": (3, 1, 6), "y": (2, 0, -4), "a": (5, 1, 1), "b": (1, 1, 5), "f": (5, 6, 1)}
    assert [n.op for n in graph.nodes] == ["input", "input", "add", "sub", "mul"]
    assert graph.outputs == [4]
    assert graph.backward_order == [4, 3, 2]
    assert {n.device for n in graph.nodes} == {str(device)}
    assert {(n.shape, n.dtype.name) for n in graph.nodes} == {((), "float32")}
    assert x.grad is None and not x.requires_grad


def test_edges_have_local_derivatives_and_what_was_sent():
    graph = trace(f, *numbers("cpu"))
    edges = {
        (graph.nodes[e.source].name, n.name): (e.operand, e.derivative, e.local.item(), e.sent.item())
        for n in graph.nodes
        for e in n.inputs
    }
    assert edges == {
        ("x", "a"): ("input", "1", 1, 1),
        ("y", "a"): ("other", "1", 1, 1),
        ("x", "b"): ("input", "1", 1, 5),
        ("y", "b"): ("other", "−1", -1, -5),
        ("a", "f"): ("input", "b", 1, 1),
        ("b", "f"): ("other", "a", 5, 5),
    }
    assert graph["f"].formula == "a · b"
    assert [n.saved_bytes for n in graph.nodes] == [0, 0, 0, 0, 8]
    assert graph.saved_bytes == 8


def test_an_operand_used_twice_has_two_edges():
    graph = trace(lambda x: x * x, gpuad.tensor(3.0))
    assert [(e.derivative, e.local.item(), e.sent.item()) for e in graph["f"].inputs] == [("x", 3, 3), ("x", 3, 3)]
    assert graph["x"].gradient.item() == 6


def test_the_line_and_the_expression():
    graph = trace(f, *numbers("cpu"))
    file, line = f.__code__.co_filename, f.__code__.co_firstlineno
    assert [graph[name].source for name in "abf"] == [f"{file}:{line + i}" for i in (1, 2, 3)]
    assert graph["a"].place.text == "a = x + y"
    if sys.version_info >= (3, 11):
        assert graph["b"].place.expression == "x - y"
        inner = trace(lambda x, y: (x + y) * (x - y), *numbers("cpu"))
        assert [n.place.expression for n in inner.nodes[2:]] == ["x + y", "x - y", "(x + y) * (x - y)"]


def test_names_where_python_does_not_know_columns(monkeypatch):
    monkeypatch.setattr("gpuad.graph.source._EXACT", False)  # as before Python 3.11
    assert [n.name for n in trace(f, *numbers("cpu")).nodes] == ["x", "y", "a", "b", "f"]

    def g(x, y):
        c = x * y + x
        return c - y

    assert [n.name for n in trace(g, *numbers("cpu")).nodes] == ["x", "y", "v1", "c", "g"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 3)
        self.act = nn.Tanh()
        self.fc2 = nn.Linear(3, 2)

    def forward(self, x):
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden)


def test_a_module_names_its_parameters_and_calls(device):
    net = Net().to(device)
    x = gpuad.randn(5, 4, device=device)
    graph = trace(net, x)
    parameters = [n.name for n in graph.nodes if n.kind == "parameter"]
    assert sorted(parameters) == sorted(name for name, _ in net.named_parameters())
    calls = [(n.op, n.module, n.module_type, n.shape) for n in graph.nodes if n.kind == "op"]
    assert calls == [("linear", "fc1", "Linear", (5, 3)), ("tanh", "act", "Tanh", (5, 3)),
                     ("linear", "fc2", "Linear", (5, 2))]  # fmt: skip
    y = net(x)
    y.sum().backward()
    for name, parameter in net.named_parameters():
        np.testing.assert_array_equal(graph[name].gradient.cpu().numpy(), parameter.grad.cpu().numpy())
        assert graph[name].module == name.rpartition(".")[0]
    np.testing.assert_array_equal(graph.nodes[graph.outputs[0]].value.cpu().numpy(), y.detach().cpu().numpy())
    assert graph.nodes[0].name == "x"


def test_a_loss_over_a_model_and_every_gradient_that_went_along(device):
    net = Net().to(device)
    x, labels = gpuad.randn(5, 4, device=device), gpuad.tensor([0, 1, 1, 0, 1], device=device)
    graph = trace(lambda x, labels: nn.functional.cross_entropy(net(x), labels), x, labels)
    assert {"net.fc1.weight", "net.fc2.bias"} <= {n.name for n in graph.nodes}
    assert graph["labels"].gradient is None
    for node in graph.nodes:
        sent = [e.sent for user in graph.nodes for e in user.inputs if e.source == node.number and e.sent is not None]
        if node.number not in graph.outputs and node.gradient is not None:
            total = sum(s.cpu().numpy() for s in sent)
            np.testing.assert_allclose(node.gradient.cpu().numpy(), total, rtol=1e-6)
    tanh = next(n for n in graph.nodes if n.op == "tanh")
    assert tanh.formula.startswith("tanh(")
    np.testing.assert_allclose(tanh.inputs[0].local.cpu().numpy(), 1 - tanh.value.cpu().numpy() ** 2, rtol=1e-5)
    linear = next(n for n in graph.nodes if n.op == "linear")
    assert [e.rule for e in linear.inputs[1:]] == ["gᵀ @ x", "the sum of g over the rows"]
    assert linear.saved_bytes >= 5 * 4 * 4


def test_sequential_has_dotted_names():
    graph = trace(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1))), gpuad.ones(1, 2))
    assert {"0.weight", "1.0.bias"} <= {n.name for n in graph.nodes}
    assert [n.module for n in graph.nodes if n.kind == "op"] == ["0", "1.0"]


def test_tangents_are_those_of_jvp(device):
    net, x, t = Net().to(device), gpuad.randn(5, 4, device=device), gpuad.randn(5, 4, device=device)
    graph = trace(net, x, tangents=(t,))
    _, tangent = gpuad.func.jvp(net, (x,), (t,))
    out = graph.nodes[graph.outputs[0]].tangent.cpu().numpy()
    np.testing.assert_allclose(out, tangent.detach().cpu().numpy(), rtol=1e-5, atol=1e-6)
    assert graph["fc1.weight"].tangent is None


def test_in_place_operations_are_nodes_of_their_own():
    def program(x):
        y = x * 2
        y.add_(1.0)
        y[0] = 5.0
        y[1:] = x[:2] * 3
        return y.sum()

    x = gpuad.tensor([1.0, 2.0, 3.0])
    graph = trace(program, x, tangents=(gpuad.ones(3),))
    leaf = x.clone().requires_grad_()
    program(leaf).backward()
    np.testing.assert_array_equal(graph["x"].gradient.numpy(), leaf.grad.numpy())
    assert graph["y"].value.tolist() == [2, 4, 6]  # as it was, not as it became
    assert [n.op for n in graph.nodes if n.kind == "op"].count("index_put") == 2
    assert graph["program"].tangent.item() == 6


def test_the_names_of_loops_stay_apart():
    def power(x):
        for _ in range(3):
            x = x * x
        return x

    graph = trace(power, gpuad.tensor(1.5))
    names = [n.name for n in graph.nodes]
    assert len(set(names)) == 4 and names[0] == "x"
    assert graph["x"].gradient.item() == pytest.approx(8 * 1.5**7)


def test_custom_functions_and_gradients_inside():
    class Cube(gpuad.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * g

    graph = trace(lambda x: Cube.apply(x) * x, gpuad.tensor(2.0))
    assert [n.op for n in graph.nodes] == ["input", "Cube", "mul"]
    assert graph["x"].gradient.item() == 32
    graph = trace(lambda x: Cube.apply(x) * x, gpuad.tensor(2.0), tangents=(gpuad.tensor(1.0),))
    assert [n.tangent.item() for n in graph.nodes] == [1, 12, 32]
    graph = trace(lambda x: gpuad.func.grad(lambda z: z**3)(x), gpuad.tensor(2.0))
    assert graph.nodes[graph.outputs[0]].value.item() == 12
    assert graph["x"].gradient.item() == 12


def test_several_results_and_cotangents():
    def both(x):
        values, _ = x.max(0)
        return values, x * 2

    x = gpuad.tensor([1.0, 3.0])
    graph = trace(both, x, cotangents=(gpuad.tensor(10.0), gpuad.tensor([1.0, 1.0])))
    assert graph["x"].gradient.tolist() == [2, 12]
    assert len(graph.outputs) == 2
    with pytest.raises(AutogradError, match="2 outputs, got 1"):
        graph.backward(gpuad.tensor(1.0))
    assert trace(both, x).backward()["x"].gradient.tolist() == [2, 3]


def test_a_formula_with_several_outputs():
    @gpuad.fuse
    def two(x, y):
        return x * y, x + y

    def g(x, y):
        p, s = two(x, y)
        return p * s

    graph = trace(g, gpuad.tensor(2.0), gpuad.tensor(3.0))
    assert [n.op for n in graph.nodes if n.kind == "op"] == ["two[0]", "two[1]", "mul"]
    assert graph["x"].gradient.item() == 5 * 3 + 6
    assert graph["y"].gradient.item() == 5 * 2 + 6


def test_hooks_run_in_the_walk_back():
    def program(x):
        y = x * 2
        y.register_hook(lambda g: g * 10)
        return y * 3

    graph = trace(program, gpuad.tensor(1.0))
    assert (graph["y"].gradient.item(), graph["x"].gradient.item()) == (30, 60)


def test_what_is_not_recorded_is_seen_too():
    graph = trace(lambda x: gpuad.where(x > 0, x, 0.0).sum(), gpuad.tensor([-1.0, 2.0]))
    compare = next(n for n in graph.nodes if n.op == "gt")
    assert compare.gradient is None and compare.value.tolist() == [False, True]
    graph = trace(lambda n: n + 1, gpuad.tensor([1, 2]))
    assert graph.backward_order == [] and graph["f"].value.tolist() == [2, 3]


def test_the_tracer_leaves_nothing_behind():
    before = Interpreters.active, Interpreters.apply, Interpreters.write
    with pytest.raises(ZeroDivisionError):
        trace(lambda x: x / (1 // 0), gpuad.tensor(1.0))
    assert (Interpreters.active, Interpreters.apply, Interpreters.write) == before
    trace(f, *numbers("cpu"))
    assert (Interpreters.active, Interpreters.apply, Interpreters.write) == before


def test_other_threads_are_not_traced():
    def program(x):
        other = threading.Thread(target=lambda: results.append((gpuad.ones(3) * 7).sum().item()))
        other.start()
        other.join()
        return x * 2

    results = []
    graph = trace(program, gpuad.tensor(1.0))
    assert results == [21]
    assert len(graph.nodes) == 2


def test_of_knows_what_the_tape_keeps(device):
    net = Net().to(device)
    x = gpuad.randn(5, 4, device=device)
    loss = net(x).square().mean()
    graph = of(loss)
    assert [n.op for n in graph.nodes if n.kind == "op"] == ["linear", "tanh", "linear", "square", "mean"]
    assert {n.name for n in graph.nodes if n.kind == "parameter"} == {name for name, _ in net.named_parameters()}
    assert graph["fc1.weight"].shape == (3, 4) and graph.nodes[graph.outputs[0]].value.item() == loss.item()
    assert graph.nodes[2].gradient is None and not graph.backward_order
    graph.backward()
    hidden = next(n for n in graph.nodes if n.op == "tanh")
    assert hidden.shape == (5, 3) and hidden.dtype == gpuad.float32
    assert net.fc1.weight.grad is None
    loss.backward()  # the tape is as it was
    np.testing.assert_array_equal(graph["fc1.weight"].gradient.cpu().numpy(), net.fc1.weight.grad.cpu().numpy())
    with pytest.raises(AutogradError, match="retain_graph=True"):
        graph.backward()


def test_a_long_chain_needs_no_recursion():
    x = gpuad.tensor(1.0, requires_grad=True)
    y = x
    for _ in range(5000):
        y = y * 1.0
    graph = of(y).backward()
    assert len(graph.nodes) == 5001
    assert graph["x"].gradient.item() == 1
    assert str(graph).count("\n") == 5001  # listed, not drawn as a tree


def test_errors_say_how_to_go_on():
    x, y = numbers("cpu")
    with pytest.raises(TypeError, match="returns Tensors, got float"):
        trace(lambda x: x.item(), x)
    with pytest.raises(ShapeError, match="2 inputs, 1"):
        trace(f, x, y, tangents=(x,))
    with pytest.raises(ShapeError, match="The tangent of x has the shape of its primal"):
        trace(f, x, y, tangents=(gpuad.ones(2), None))
    with pytest.raises(AutogradError, match="requires_grad_"):
        of(x)
    with pytest.raises(TypeError, match="graph.trace"):
        of(f)
    with pytest.raises(KeyError, match="no node 'z'; it has x, y, a, b, f"):
        trace(f, x, y)["z"]
    with pytest.raises(AutogradError, match="uses forward mode itself"):
        trace(lambda x: gpuad.func.jvp(gpuad.sin, (x * 2,), (x,))[1], x, tangents=(y,))


# As text and pictures -------------------------------------------------------------------------------------------------


def test_the_tree():
    x, y = numbers("cpu")
    lines = str(trace(f, x, y, tangents=(x, x - y))).splitlines()
    drawn = [re.match(r"[├│└─ ]*[\w=·+− ]*?(?=   \w|$)", line)[0] for line in lines]
    assert drawn == [
        "f = a · b",
        "├── a = x + y",
        "│   ├── x",
        "│   └── y",
        "└── b = x − y",
        "    ├── x",
        "    └── y",
    ]
    assert re.search(r"value 5   tangent 14   gradient 1   saves 8 B   test_graph.py:\d+$", lines[0])


def test_dot_and_mermaid_have_every_node_and_edge():
    graph = trace(f, *numbers("cpu"))
    dot, mermaid = graph.to_dot(), graph.to_mermaid()
    assert len(re.findall(r"^  n\d+ \[", dot, re.M)) == len(re.findall(r"^  n\d+[\[(]", mermaid, re.M)) == 5
    assert len(re.findall(r"n\d+ -> n\d+", dot)) == len(re.findall(r"n\d+ -->\S* n\d+", mermaid)) == 6
    assert 'label="a = x + y\\nfloat32 () on cpu\\nvalue 5\\ngradient 1"' in dot
    assert mermaid.startswith("flowchart TD\n")
    assert '-->|"−1"| n3' in mermaid


def test_svg_is_drawn_by_graphviz():
    pytest.importorskip("graphviz", reason='pictures need pip install "gpuad[graph]"')
    if shutil.which("dot") is None:
        pytest.skip("pictures need Graphviz's dot: apt-get install graphviz")
    graph = trace(f, *numbers("cpu"))
    svg = graph.to_svg()
    assert "<svg" in svg and svg.count('class="node"') == 5 and svg.count('class="edge"') == 6
    assert graph._repr_svg_() == svg


@pytest.mark.parametrize("missing", ["graphviz", "dot"])
def test_what_graphviz_lacks_is_named(monkeypatch, missing):
    graph = trace(f, *numbers("cpu"))
    if missing == "graphviz":
        monkeypatch.setitem(sys.modules, "graphviz", None)
    else:
        monkeypatch.setitem(sys.modules, "graphviz", subprocess)  # any module: it is not reached
        monkeypatch.setenv("PATH", "")
    command = {"graphviz": r'pip install "gpuad\[graph\]"', "dot": "apt-get install graphviz"}[missing]
    with pytest.raises(MissingPackageError, match=command):
        graph.to_svg()
    assert graph._repr_svg_() is None
    assert "a = x + y" in graph._repr_html_()


def test_programs_are_the_generated_ones():
    graph = trace(f, *numbers("cpu"))
    programs = graph["f"].programs()
    assert list(programs) == ["NumPy, forward", "CUDA, forward", "NumPy, backward", "CUDA, backward"]
    assert "mul(x0, x1)" in programs["NumPy, forward"] and "(u0 * u1)" in programs["CUDA, forward"]
    assert "passed on" in graph["a"].programs()["CUDA, backward"]
    rows = trace(lambda x: gpuad.softmax(x, -1), gpuad.ones(2, 3)).nodes[-1].programs()
    assert "row_logsumexp" in rows["NumPy, forward"] and "gpuad_softmax_vjp" in rows["CUDA, backward"]
    product = trace(lambda a: a @ a, gpuad.ones(2, 2)).nodes[-1].programs()
    assert "def _gemm(" in product["Python, forward"]


def test_the_package_is_imported_on_first_use(tmp_path):
    code = (
        "import gpuad, sys; print('gpuad.graph' in sys.modules, gpuad.graph.of.__name__, 'gpuad.graph' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "of", "True"], run.stderr


def test_a_view_changed_in_place_changes_what_it_is_of():
    def program(x):
        y = x * 2
        y[1:].exp_()
        return (y * x).sum()

    x = gpuad.tensor([1.0, 2.0], dtype="float64")
    graph = trace(program, x)
    assert [n.op for n in graph.nodes if n.kind == "op"] == ["mul", "slice", "exp", "view_put", "mul", "sum"]
    np.testing.assert_allclose(graph["x"].gradient.numpy(), [4.0, 5 * np.exp(4)])
    with pytest.raises(AutogradError, match="cannot carry tangents through view_put"):
        trace(program, x, tangents=(x,))


def test_inside_transforms_nodes_have_all_examples_and_values_without_tangents():
    func = gpuad.func
    x = gpuad.tensor([1.0, 2.0, 3.0], dtype="float64")
    graph = trace(lambda x: func.vmap(lambda x: x.sin().mul_(x))(x), x)
    assert [(n.op, n.shape) for n in graph.nodes] == [("input", (3,)), ("sin", (3,)), ("mul", (3,))]
    graph = trace(lambda x: func.jvp(lambda x: x.sin().mul_(x), (x,), (x,))[1], x)
    np.testing.assert_allclose(graph.nodes[graph.outputs[0]].value.numpy(), (x.sin() * x + x.cos() * x * x).numpy())
    assert "sin" in graph.to_html()
