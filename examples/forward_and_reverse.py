"""f(x, y) = (x + y)(x − y), differentiated forwards and backwards, one step at a time.

    python examples/forward_and_reverse.py
    python examples/forward_and_reverse.py --x 1.5 --y -2 --device cuda:0
    python examples/forward_and_reverse.py --page f.html     # then open f.html in a browser and walk it yourself

The exact derivatives are ∂f/∂x = 2x and ∂f/∂y = −2y.
"""

import argparse

import gpuad


def f(x, y):
    """The function: three operations."""
    a = x + y
    b = x - y
    return a * b


def exact(x, y):
    """Every value, its derivatives by x and by y, and the derivative of f by it: worked out on paper."""
    return {
        "x": {"value": x, "by x": 1, "by y": 0, "gradient": 2 * x},
        "y": {"value": y, "by x": 0, "by y": 1, "gradient": -2 * y},
        "a": {"value": x + y, "by x": 1, "by y": 1, "gradient": x - y},
        "b": {"value": x - y, "by x": 1, "by y": -1, "gradient": x + y},
        "f": {"value": x * x - y * y, "by x": 2 * x, "by y": -2 * y, "gradient": 1},
    }


def check(what, number, expected):
    """The number as text; the program ends where it is not what is expected."""
    if abs(number - expected) > 1e-5 * max(1.0, abs(expected)):
        raise SystemExit(f"{what} is {number:g}, and should be {expected:g}")
    return f"{number:g}"


def walk_forwards(graph, along, expected):
    """Print each value and its tangent, from the inputs to f. Returns the tangent of f: its derivative."""
    for node in graph.nodes:
        right = expected[node.name]
        value = check(f"{node.name}", node.value.item(), right["value"])
        tangent = check(f"∂{node.name}/∂{along}", node.tangent.item(), right[f"by {along}"])
        terms = " + ".join(f"{edge.local.item():g}·{graph.nodes[edge.source].tangent.item():g}" for edge in node.inputs)
        says = f"{node.name} = {node.formula}" if node.formula else node.name
        print(f"  {says:10}  value {value:>8}   tangent {tangent:>8}" + (f" = {terms}" if terms else ""))
    return graph["f"].tangent.item()


def walk_backwards(graph, expected):
    """Print what each operation sends to its operands, from f to the inputs. Returns ∂f/∂x and ∂f/∂y."""
    for number in graph.backward_order:
        node = graph.nodes[number]
        gradient = check(f"∂f/∂{node.name}", node.gradient.item(), expected[node.name]["gradient"])
        print(f"  ∂f/∂{node.name} = {gradient:<6} through {node.name} = {node.formula}:")
        for edge in node.inputs:
            to = graph.nodes[edge.source].name
            local = f"∂{node.name}/∂{to} = {edge.derivative}"
            print(f"      {gradient} · {edge.local.item():<4g} = {edge.sent.item():+g} to {to:2}   ({local})")
    for name in ("x", "y"):
        gradient = check(f"∂f/∂{name}", graph[name].gradient.item(), expected[name]["gradient"])
        print(f"  ∂f/∂{name} = {gradient}, the sum of what arrived")
    return graph["x"].gradient.item(), graph["y"].gradient.item()


def main():
    """Draw the graph, walk it both ways, and compare with the exact derivatives."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--x", type=float, default=3.0)
    parser.add_argument("--y", type=float, default=2.0)
    parser.add_argument("--device", default="cuda:0" if gpuad.cuda.is_available() else "cpu")
    parser.add_argument("--page", metavar="FILE", help="write the graph as an HTML page on which it is walked")
    options = parser.parse_args()
    x = gpuad.tensor(options.x, device=options.device, requires_grad=True)
    y = gpuad.tensor(options.y, device=options.device, requires_grad=True)
    one, zero = gpuad.ones_like(x), gpuad.zeros_like(x)
    expected = exact(options.x, options.y)

    print(f"f(x, y) = (x + y)(x − y) at x = {options.x:g}, y = {options.y:g} on {x.device}")
    print("\nThe graph, as the tape recorded it")
    result = f(x, y)
    print(gpuad.graph.of(result))

    print("\nForwards along x: each value with its derivative by x")
    graph = gpuad.graph.trace(f, x, y, tangents=(one, zero))
    along_x = walk_forwards(graph, "x", expected)
    print("\nForwards along y: another walk for another input")
    along_y = walk_forwards(gpuad.graph.trace(f, x, y, tangents=(zero, one)), "y", expected)
    print("\nBackwards: from f to every input in one walk")
    step_by_step = walk_backwards(graph, expected)

    result.backward()  # the same walk as one call
    print("\n          forwards  backwards  backward()     exact")
    for i, name in enumerate("xy"):
        right = expected[name]["gradient"]
        numbers = [(along_x, along_y)[i], step_by_step[i], (x, y)[i].grad.item()]
        shown = "".join(f"{check(f'∂f/∂{name}', number, right):>11}" for number in numbers)
        print(f"  ∂f/∂{name}{shown}{right:11g}")
    print("All agree.")
    if options.page:
        graph.to_html(options.page)
        print(f"Written to {options.page}: open it in a browser, and step with the arrow keys.")


if __name__ == "__main__":
    main()
