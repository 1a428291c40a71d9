"""f(x, y) = (x + y)(x − y), differentiated forwards and backwards, one step at a time.

    python examples/forward_and_reverse.py
    python examples/forward_and_reverse.py --x 1.5 --y -2 --device cuda:0

The exact derivatives are ∂f/∂x = 2x and ∂f/∂y = −2y.
"""

import argparse

import gpuad

# f as a program of single operations: result, formula, operation, operands.
STEPS = [
    ("a", "x + y", gpuad.add, ("x", "y")),
    ("b", "x − y", gpuad.sub, ("x", "y")),
    ("f", "a · b", gpuad.mul, ("a", "b")),
]


def f(x, y):
    """The same function, as one would write it."""
    return (x + y) * (x - y)


def draw(node, leaves, indent="", branch=""):
    """Print the graph below a node of the tape as a tree: an operation, then what it was applied to, down to leaves."""
    if id(node) in leaves:
        print(f"  {indent}{branch}{leaves[id(node)]}")
        return
    print(f"  {indent}{branch}{node.name()}")
    indent += {"": "", "├── ": "│   ", "└── ": "    "}[branch]
    *others, last = node.parents
    for parent in others:
        draw(parent, leaves, indent, "├── ")
    draw(last, leaves, indent, "└── ")


def walk_forwards(x, y, direction):
    """Carry value and tangent from the inputs to f. Returns the tangent of f: its derivative along `direction`."""
    values = {"x": x, "y": y}
    tangents = {"x": direction[0], "y": direction[1]}
    for name in values:
        print(f"  {name:12} value {values[name].item():8g}   tangent {tangents[name].item():8g}")
    for name, formula, operation, operands in STEPS:
        values[name], tangents[name] = gpuad.func.jvp(
            operation, tuple(values[o] for o in operands), tuple(tangents[o] for o in operands)
        )
        print(f"  {name} = {formula:8} value {values[name].item():8g}   tangent {tangents[name].item():8g}")
    return tangents["f"]


def walk_backwards(x, y):
    """Carry the derivative of f from f to the inputs. Returns ∂f/∂x and ∂f/∂y, which one walk finds together."""
    values = {"x": x, "y": y}
    for name, _, operation, operands in STEPS:
        values[name] = operation(*(values[o] for o in operands))
    cotangents = dict.fromkeys(values, gpuad.zeros_like(x))
    cotangents["f"] = gpuad.ones_like(x)
    for name, formula, _, operands in reversed(STEPS):
        passed = gpuad.autograd.grad(values[name], [values[o] for o in operands], cotangents[name])
        sent = "   ".join(f"{amount.item():+g} to {o}" for o, amount in zip(operands, passed, strict=True))
        print(f"  ∂f/∂{name} = {cotangents[name].item():<6g} through {name} = {formula}:   {sent}")
        for operand, amount in zip(operands, passed, strict=True):
            cotangents[operand] = cotangents[operand] + amount
    for name in ("x", "y"):
        print(f"  ∂f/∂{name} = {cotangents[name].item():g}, the sum of what arrived")
    return cotangents["x"], cotangents["y"]


def main():
    """Draw the graph, walk it both ways, and compare with the exact derivatives."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--x", type=float, default=3.0)
    parser.add_argument("--y", type=float, default=2.0)
    parser.add_argument("--device", default="cuda:0" if gpuad.cuda.is_available() else "cpu")
    options = parser.parse_args()
    x = gpuad.tensor(options.x, device=options.device, requires_grad=True)
    y = gpuad.tensor(options.y, device=options.device, requires_grad=True)
    one, zero = gpuad.ones_like(x), gpuad.zeros_like(x)

    print(f"f(x, y) = (x + y)(x − y) at x = {options.x:g}, y = {options.y:g} on {x.device}")
    print("\nThe graph, as the tape recorded it")
    result = f(x, y)
    draw(result.grad_fn, {id(x): "x", id(y): "y"})

    print("\nForwards along x: each value with its derivative by x")
    along_x = walk_forwards(x.detach(), y.detach(), (one, zero))
    print("\nForwards along y: another walk for another input")
    along_y = walk_forwards(x.detach(), y.detach(), (zero, one))
    print("\nBackwards: from f to every input in one walk")
    by_hand = walk_backwards(x, y)

    result.backward()  # the same walk as one call
    exact = (2 * options.x, -2 * options.y)
    print("\n          forwards  backwards  backward()     exact")
    for name, *derivatives in zip("xy", (along_x, along_y), by_hand, (x.grad, y.grad), strict=True):
        numbers = [derivative.item() for derivative in derivatives] + [exact["xy".index(name)]]
        print(f"  ∂f/∂{name}" + "".join(f"{number:11g}" for number in numbers))
        if max(numbers) - min(numbers) > 1e-5 * max(1.0, abs(numbers[-1])):
            raise SystemExit(f"the derivatives by {name} differ")
    print("All agree.")


if __name__ == "__main__":
    main()
