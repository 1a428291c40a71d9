"""Module and the containers: registration, walking, moving, state, hooks, repr."""

import copy
import gc
import weakref
from collections import OrderedDict

import numpy as np
import pytest

import gpuad
from gpuad import nn


def array(tensor):
    return tensor.detach().cpu().numpy()


class Net(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.first = nn.Linear(3, 4, device=device)
        self.norm = nn.BatchNorm1d(4, device=device)
        self.last = nn.Linear(4, 2, bias=False, device=device)
        self.scale = nn.Parameter(gpuad.ones(2, device=device))
        self.register_buffer("offset", gpuad.zeros(2, device=device))
        self.register_buffer("scratch", gpuad.zeros(2, device=device), persistent=False)
        self.register_parameter("absent", None)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu()) * self.scale + self.offset


PARAMETERS = ["scale", "first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight"]
STATE = ["scale", "offset"] + PARAMETERS[1:5] + ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
STATE += ["last.weight"]


# ---------------------------------------------------------------------- registration


def test_names_are_in_order_of_registration():
    net = Net()
    assert [name for name, _ in net.named_parameters()] == PARAMETERS
    assert [name for name, _ in net.named_buffers(recurse=False)] == ["offset", "scratch"]
    assert [name for name, _ in net.named_children()] == ["first", "norm", "last"]
    assert [name for name, _ in net.named_modules()] == ["", "first", "norm", "last"]
    assert list(net.state_dict()) == STATE
    assert [name for name, _ in net.named_parameters(prefix="net", recurse=False)] == ["net.scale"]


def test_registered_values_are_plain_attributes():
    net = Net()
    assert net.__dict__["scale"] is net.scale is net._parameters["scale"] is net.get_parameter("scale")
    assert net.__dict__["first"] is net.first is net._modules["first"] is net.get_submodule("first")
    assert net.get_buffer("norm.running_mean") is net.norm.running_mean
    assert net.absent is None


def test_assignment_moves_a_name_between_kinds():
    net = Net()
    net.offset = nn.Parameter(gpuad.ones(2))  # was a buffer
    assert "offset" in dict(net.named_parameters()) and "offset" not in dict(net.named_buffers())
    net.first = nn.Identity()
    assert "first.weight" not in dict(net.named_parameters())
    net.plain = 1
    net.plain = nn.Linear(1, 1)
    assert "plain.weight" in dict(net.named_parameters())
    net.scale = None
    assert net.scale is None and "scale" not in dict(net.named_parameters())
    net.scale = nn.Parameter(gpuad.zeros(2))
    assert "scale" in dict(net.named_parameters())
    del net.scale
    assert not hasattr(net, "scale") and "scale" not in dict(net.named_parameters())


def test_writing_to_the_member_dictionaries_changes_the_module():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    for name in model._modules:
        model._modules[name] = nn.Identity()
    x = gpuad.ones(1, 2)
    assert model(x) is x and not list(model.parameters())
    with pytest.raises(KeyError):
        model._parameters["0"]
    del model._modules["0"]
    assert len(model) == 1 and not hasattr(model, "0")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("a.b", KeyError, "contain"),
        ("", KeyError, "empty"),
        (3, TypeError, "string"),
        ("training", KeyError, "exists"),
    ],
)
def test_names_that_cannot_be_registered(name, error, words):
    for register, value in (
        ("register_parameter", nn.Parameter()),
        ("register_buffer", gpuad.ones(1)),
        ("add_module", Net()),
    ):
        with pytest.raises(error, match=words):
            getattr(nn.Module(), register)(name, value)


def test_values_that_do_not_fit():
    net = Net()
    with pytest.raises(TypeError, match="'scale'.*Parameter or None expected"):
        net.scale = gpuad.ones(2)
    with pytest.raises(TypeError, match="'first'.*Module or None expected"):
        net.first = 3
    with pytest.raises(TypeError, match="'offset'.*Tensor or None expected"):
        net.offset = np.ones(2)
    with pytest.raises(TypeError, match="Module or None"):
        net.add_module("other", gpuad.relu)
    with pytest.raises(KeyError, match="already exists"):
        net.register_buffer("first", gpuad.ones(1))
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'nothing'"):
        net.nothing  # noqa: B018
    for get, target in (
        (net.get_submodule, "norm.x"),
        (net.get_parameter, "norm.running_mean"),
        (net.get_buffer, "scale"),
    ):
        with pytest.raises(AttributeError, match=target):
            get(target)


def test_forgotten_super_init_says_so():
    class Forgetful(nn.Module):
        def __init__(self):
            self.layer = nn.Linear(1, 1)

    with pytest.raises(AttributeError, match=r"super\(\).__init__\(\)"):
        Forgetful()

    class Silent(nn.Module):
        def __init__(self):
            self.size = 3

    with pytest.raises(AttributeError, match=r"super\(\).__init__\(\)"):
        Silent().layer  # noqa: B018


def test_forward_is_required():
    with pytest.raises(NotImplementedError, match=r'Module \[Module\] is missing the required "forward" function'):
        nn.Module()(1)


# ---------------------------------------------------------------------- parameters


def test_parameter_shares_the_tensor(device):
    data = gpuad.zeros(3, device=device)
    parameter = nn.Parameter(data)
    assert isinstance(parameter, gpuad.Tensor) and parameter.requires_grad and parameter.is_leaf
    assert parameter.device == device and not data.requires_grad
    data.fill_(2.0)
    assert array(parameter).tolist() == [2, 2, 2]
    assert not nn.Parameter(data, requires_grad=False).requires_grad
    assert nn.Parameter().shape == (0,)
    assert type(parameter + 1) is gpuad.Tensor
    assert repr(parameter).startswith("Parameter containing:\n")


def test_parameter_of_a_recorded_tensor_is_a_leaf():
    x = gpuad.ones(2, requires_grad=True)
    parameter = nn.Parameter(x * 2)
    (parameter * 3).sum().backward()
    assert parameter.is_leaf and array(parameter.grad).tolist() == [3, 3] and x.grad is None


def test_parameter_takes_tensors_only():
    with pytest.raises(TypeError, match="takes a Tensor, got ndarray"):
        nn.Parameter(np.ones(2))


def test_deepcopy_is_independent_and_keeps_sharing():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    other = copy.deepcopy(net)
    assert other[0].weight is other[2].weight is not net[0].weight
    assert isinstance(other[0].weight, nn.Parameter)
    with gpuad.no_grad():
        other[0].weight.fill_(7.0)
    x = gpuad.ones(1, 2)
    assert not np.array_equal(array(net(x)), array(other(x)))
    assert other._layers[0] is other[0]


def test_shared_parameters_and_modules_come_once():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert len(list(model.parameters())) == 2
    assert len(list(model.modules())) == 3 and len(list(model.children())) == 2
    assert len(list(model.named_parameters(remove_duplicate=False))) == 4
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_module_goes_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(Net(), nn.ModuleList([nn.Linear(1, 1)]))
        model.register_forward_hook(lambda module, args, output: None).remove()
        model.state_dict()
        gone = weakref.ref(model), weakref.ref(model[0]), weakref.ref(model[0].scale)
        del model
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


# ---------------------------------------------------------------------- modes, gradients


def test_train_eval_apply_and_freeze():
    net = Net()
    assert net.eval() is net and not any(module.training for module in net.modules())
    assert net.train() is net and all(module.training for module in net.modules())
    with pytest.raises(ValueError, match="boolean"):
        net.train("yes")
    visited = []
    assert net.apply(visited.append) is net
    assert visited == [net.first, net.norm, net.last, net]
    net.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_zero_grad(device):
    net = nn.Linear(2, 1, device=device)
    net(gpuad.ones(3, 2, device=device)).sum().backward()
    assert array(net.weight.grad).tolist() == [[3, 3]]
    net.zero_grad(set_to_none=False)
    assert array(net.weight.grad).tolist() == [[0, 0]]
    net(gpuad.ones(3, 2, device=device)).sum().backward()
    assert array(net.weight.grad).tolist() == [[3, 3]]
    net.zero_grad()
    assert net.weight.grad is None and net.bias.grad is None
    net(gpuad.ones(1, 2, device=device)).sum().backward()
    assert array(net.weight.grad).tolist() == [[1, 1]]


# ---------------------------------------------------------------------- device and dtype


def test_to_moves_in_place(device):
    net = Net()
    net(gpuad.ones(5, 3)).sum().backward()
    before = dict(net.named_parameters())
    values = {name: array(parameter) for name, parameter in before.items()}
    grads = {name: array(parameter.grad) for name, parameter in before.items()}
    assert net.to(device) is net
    for name, parameter in net.named_parameters():
        assert parameter is before[name] and parameter.device == device and parameter.grad.device == device
        assert parameter.is_leaf and parameter.requires_grad
        assert np.array_equal(array(parameter), values[name]) and np.array_equal(array(parameter.grad), grads[name])
    assert all(buffer.device == device for buffer in net.buffers())
    net(gpuad.ones(5, 3, device=device)).sum().backward()
    assert net.cpu().scale.device.type == "cpu"


def test_to_converts_floating_values_only():
    net = Net()
    weight = net.first.weight
    halves = ((net.half, gpuad.float16), (net.bfloat16, gpuad.bfloat16))
    for convert, dtype in ((net.double, gpuad.float64), *halves, (net.float, gpuad.float32)):
        assert convert() is net
        assert net.first.weight is weight and weight.dtype == dtype and net.norm.running_mean.dtype == dtype
        assert net.norm.num_batches_tracked.dtype == gpuad.int64
    assert net.to("cpu", gpuad.float64).scale.dtype == gpuad.float64
    assert net.to(gpuad.ones(1, dtype=gpuad.float32)).scale.dtype == gpuad.float32
    with pytest.raises(TypeError, match="floating point"):
        net.to(gpuad.int64)
    with pytest.raises(TypeError, match="'colour'"):
        net.to(colour="red")


def test_to_leaves_the_tensors_of_others_alone(device):
    weight = gpuad.ones(3)
    loss = nn.CrossEntropyLoss(weight=weight)
    model = nn.ModuleList([loss, nn.NLLLoss(weight=weight)])
    model.to(device).double()
    assert weight.dtype == gpuad.float32 and weight.device.type == "cpu"
    assert model[0].weight is model[1].weight and model[0].weight.device == device


# ---------------------------------------------------------------------- state_dict


def test_state_dict_round_trip(device):
    source, target = Net(device), Net()
    source(gpuad.randn(8, 3, device=device))
    state = source.state_dict()
    assert not any(value.requires_grad for value in state.values())
    assert source.state_dict(keep_vars=True)["scale"] is source.scale
    assert list(source.state_dict(prefix="net."))[0] == "net.scale"
    parameters = list(target.parameters())
    result = target.load_state_dict(state)
    assert str(result) == "<All keys matched successfully>" and result.missing_keys == []
    assert all(a is b for a, b in zip(parameters, target.parameters()))
    for key, value in target.state_dict().items():
        assert value.device.type == "cpu" and np.array_equal(array(value), array(state[key])), key


def test_state_dict_shares_memory_and_arrays_load():
    net = nn.Linear(2, 2)
    state = net.state_dict()
    net.load_state_dict({"weight": np.full((2, 2), 3.0), "bias": np.zeros(2, dtype=np.float32)})
    assert array(state["weight"]).tolist() == [[3, 3], [3, 3]] and net.weight.dtype == gpuad.float32


def test_load_state_dict_checks_everything_before_it_copies():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: array(value).copy() for key, value in net.state_dict().items()}
    state = {key: gpuad.full(value.shape, 9.0) for key, value in net.state_dict().items()}
    state["1.weight"] = gpuad.ones(1, 4)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"(?s)Sequential.*size mismatch for 1\.weight.*\(1, 4\).*\(1, 3\)"):
            net.load_state_dict(state, strict=strict)
    del state["1.bias"], state["1.weight"]
    state["2.bias"] = gpuad.ones(1)
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "1.weight", "1.bias".' in str(caught.value)
    assert 'Unexpected key(s) in state_dict: "2.bias".' in str(caught.value)
    state["0.bias"] = object()
    with pytest.raises(RuntimeError, match=r"0\.bias: expected a tensor or an array, got object"):
        net.load_state_dict(state, strict=False)
    for key, value in net.state_dict().items():
        assert np.array_equal(array(value), before[key])
    with pytest.raises(TypeError, match="dict-like, got list"):
        net.load_state_dict([])


def test_load_state_dict_not_strict_reports():
    net = nn.Linear(2, 2)
    result = net.load_state_dict({"weight": gpuad.ones(2, 2), "other": gpuad.ones(1)}, strict=False)
    assert result.missing_keys == ["bias"] and result.unexpected_keys == ["other"]
    assert array(net.weight).tolist() == [[1, 1], [1, 1]]
    missing, unexpected = result
    assert (missing, unexpected) == (["bias"], ["other"])


def test_load_state_dict_assign_takes_the_tensors():
    net = nn.BatchNorm1d(2)
    state = {key: value.clone() for key, value in net.double().state_dict().items()}
    net.float().weight.requires_grad_(False)
    net.load_state_dict(state, assign=True)
    assert net.weight.dtype == gpuad.float64 and isinstance(net.weight, nn.Parameter) and not net.weight.requires_grad
    assert net.bias.requires_grad and net.running_mean is state["running_mean"]


# ---------------------------------------------------------------------- hooks


def test_hooks_change_inputs_and_outputs_until_removed():
    layer = nn.Identity()
    calls = []
    pre = layer.register_forward_pre_hook(lambda module, args: calls.append("pre") or (args[0] + 1,))
    layer.register_forward_pre_hook(lambda module, args: calls.append("first"), prepend=True)
    post = layer.register_forward_hook(lambda module, args, output: calls.append("post") or output * 10)
    assert layer(1) == 20 and calls == ["first", "pre", "post"]
    pre.remove()
    pre.remove()
    assert layer(1) == 10
    with post:
        pass
    assert layer(1) == 1


def test_hooks_with_keyword_arguments():
    class Scale(nn.Module):
        def forward(self, x, by=1):
            return x * by

    layer = Scale()
    seen = []
    layer.register_forward_pre_hook(lambda module, args, kwargs: (args, {"by": kwargs["by"] + 1}), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True)
    assert layer(2, by=3) == 8 and seen == [((2,), {"by": 4})]
    layer.register_forward_pre_hook(lambda module, args, kwargs: 5, with_kwargs=True)
    with pytest.raises(RuntimeError, match="new args, new kwargs"):
        layer(2, by=3)


# ---------------------------------------------------------------------- repr


def test_repr_is_a_tree_with_sizes():
    model = nn.Sequential(
        OrderedDict(
            body=nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU()),
            heads=nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1), nn.Dropout(0.1)]),
            named=nn.ModuleDict({"a": nn.Identity()}),
            free=nn.ParameterList([gpuad.ones(2, 3)]),
        )
    )
    assert repr(model).split("\n") == [
        "Sequential(",
        "  (body): Sequential(",
        "    (0): Linear(in_features=2, out_features=3, bias=False)",
        "    (1): ReLU()",
        "  )",
        "  (heads): ModuleList(",
        "    (0-1): 2 x Linear(in_features=3, out_features=1, bias=True)",
        "    (2): Dropout(p=0.1, inplace=False)",
        "  )",
        "  (named): ModuleDict(",
        "    (a): Identity()",
        "  )",
        "  (free): ParameterList(",
        f"    (0): Parameter containing: [{gpuad.float32} of size 2x3]",
        "  )",
        ")",
    ]


# ---------------------------------------------------------------------- containers


def test_sequential_edits():
    a, b, c = nn.Linear(1, 1), nn.Tanh(), nn.ReLU()
    model = nn.Sequential(a, b)
    assert model.append(c) is model and list(model) == [a, b, c] and len(model) == 3
    assert model[-1] is c and type(model[1:]) is nn.Sequential and list(model[1:]) == [b, c]
    assert list(model[1:]._modules) == ["1", "2"]
    del model[0]
    assert list(model) == [b, c] and list(model._modules) == ["0", "1"]
    model.insert(0, a)
    assert list(model) == [a, b, c]
    model[1] = nn.Identity()
    assert isinstance(model[1], nn.Identity)
    assert list(model + nn.Sequential(b)) == [a, model[1], c, b]
    assert len(model * 2) == 6 and (model * 2)[3] is a
    model += nn.Sequential(b)
    assert model.pop(-1) is b and len(model) == 3
    del model[::2]
    assert len(model) == 1 and isinstance(model[0], nn.Identity)
    for index in (1, -2):
        with pytest.raises(IndexError, match="out of range"):
            model[index]
    setattr(model, "0", c)
    assert array(model(gpuad.tensor([-1.0, 2.0]))).tolist() == [0, 2]
    assert nn.Sequential()(5) == 5


def test_module_list_edits():
    a, b, c = nn.Linear(1, 1), nn.Tanh(), nn.ReLU()
    modules = nn.ModuleList([a])
    modules.append(b).extend([c])
    assert list(modules) == [a, b, c] and modules[-2] is b and list(modules[1:]) == [b, c]
    modules.insert(1, c)
    assert list(modules) == [a, c, b, c] and list(modules._modules) == ["0", "1", "2", "3"]
    assert modules.pop(1) is c and list(modules) == [a, b, c]
    modules[0] = c
    del modules[1]
    assert list(modules) == [c, c] and len(modules + [a]) == 3
    modules += [a]
    assert len(modules) == 3
    with pytest.raises(TypeError, match="iterable"):
        modules.extend(3)
    with pytest.raises(IndexError, match="out of range"):
        modules[3]


def test_module_dict_edits():
    a, b = nn.Linear(1, 1), nn.Tanh()
    modules = nn.ModuleDict([("x", a)])
    modules["y"] = b
    modules.update({"z": b})
    assert list(modules) == list(modules.keys()) == ["x", "y", "z"] and "y" in modules and "q" not in modules
    assert [name for name, _ in modules.named_parameters()] == ["x.weight", "x.bias"]
    assert modules.pop("x") is a and dict(modules.items()) == {"y": b, "z": b}
    modules.clear()
    assert len(modules) == 0
    with pytest.raises(KeyError, match="exists"):
        modules["keys"] = a


def test_parameter_list_and_dict():
    parameters = nn.ParameterList([gpuad.ones(2)])
    parameters.append(nn.Parameter(gpuad.zeros(3)))
    assert all(isinstance(parameter, nn.Parameter) for parameter in parameters)
    assert [name for name, _ in parameters.named_parameters()] == ["0", "1"]
    parameters[0] = gpuad.zeros(5)
    assert parameters[0].shape == (5,) and len(parameters) == 2 and len(parameters[1:]) == 1
    named = nn.ParameterDict({"a": gpuad.ones(1)})
    named["b"] = gpuad.zeros(2)
    assert list(named) == ["a", "b"] and isinstance(named["b"], nn.Parameter) and named.get("c") is None
    named.pop("a")
    assert list(named.state_dict()) == ["b"]


# ---------------------------------------------------------------------- nn.utils


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, float("inf")])
def test_clip_grad_norm(device, order):
    parameters = [nn.Parameter(gpuad.zeros(3, 4, device=device)), nn.Parameter(gpuad.zeros(5, device=device))]
    parameters.append(nn.Parameter(gpuad.zeros(1, device=device)))  # without a gradient
    for parameter in parameters[:2]:
        parameter.grad = gpuad.randn(*parameter.shape, device=device)
    grads = [array(parameter.grad).copy() for parameter in parameters[:2]]
    expected = np.linalg.norm(np.concatenate([grad.ravel() for grad in grads]), order)
    norm = nn.utils.clip_grad_norm_(iter(parameters), 0.5, norm_type=order)
    assert norm.device == device and norm.shape == ()
    np.testing.assert_allclose(array(norm), expected, rtol=1e-5)
    for parameter, grad in zip(parameters, grads):
        np.testing.assert_allclose(array(parameter.grad), grad * (0.5 / expected), rtol=1e-4)
    kept = array(parameters[0].grad).copy()
    nn.utils.clip_grad_norm_(parameters, 100.0, order)
    np.testing.assert_array_equal(array(parameters[0].grad), kept)


def test_clip_grad_norm_of_nothing_and_of_nonfinite():
    parameter = nn.Parameter(gpuad.zeros(2))
    assert nn.utils.clip_grad_norm_([parameter], 1.0).item() == 0.0
    parameter.grad = gpuad.tensor([float("inf"), 1.0])
    with pytest.raises(RuntimeError, match="error_if_nonfinite=False"):
        nn.utils.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)


def test_clip_grad_norm_waits_for_nothing(cuda_device, counts):
    parameter = nn.Parameter(gpuad.zeros(3, 4, device=cuda_device))
    for _ in range(2):
        parameter.grad = gpuad.randn(3, 4, device=cuda_device)
        with counts() as record:
            nn.utils.clip_grad_norm_([parameter], 0.5)
    assert record.syncs == 0 and record.copies("h2d") == record.copies("d2h") == (0, 0)


def test_clip_grad_norm_is_two_launches(cuda_device, counts):
    """Also of more tensors than a table in the kernel's arguments has rows."""
    for number in (3, 200):
        parameters = [nn.Parameter(gpuad.zeros(7, i % 5 + 1, device=cuda_device)) for i in range(number)]
        for p in parameters:
            p.grad = gpuad.randn(p.shape, device=cuda_device)
        before = np.concatenate([array(p.grad).ravel() for p in parameters])
        nn.utils.clip_grad_norm_(parameters, 1e9)
        with counts() as record:
            norm = nn.utils.clip_grad_norm_(parameters, 0.5)
        assert record.kernel_launches == 2 and record.syncs == record.library_calls == 0
        assert not record.stats["copies"]
        np.testing.assert_allclose(array(norm), np.linalg.norm(before), rtol=1e-5)
        after = np.concatenate([array(p.grad).ravel() for p in parameters])
        np.testing.assert_allclose(after, before * (0.5 / np.linalg.norm(before)), rtol=1e-4)


def test_clip_grad_norm_of_several_dtypes_and_layouts(device):
    parameters = [nn.Parameter(gpuad.zeros(4, 3, device=device, dtype=d)) for d in (gpuad.float16, gpuad.float64)]
    parameters.append(nn.Parameter(gpuad.zeros(3, 4, device=device).T))
    parameters.append(nn.Parameter(gpuad.zeros(0, 2, device=device)))
    for p in parameters:
        p.grad = gpuad.full(p.shape, 300.0, dtype=p.dtype, device=device)
    parameters[2].grad = gpuad.full((4, 6), 300.0, device=device)[:, ::2]
    norm = nn.utils.clip_grad_norm_(parameters, 6.0)
    assert norm.dtype == gpuad.float64 and norm.item() == pytest.approx(1800.0)
    for p in parameters[:3]:
        np.testing.assert_allclose(array(p.grad).astype(float), np.ones((4, 3)), rtol=1e-3)
    parameters[0].grad = gpuad.full((4, 3), float("nan"), dtype=gpuad.float16, device=device)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    assert np.isnan(array(parameters[1].grad)).all()
    with pytest.raises(ValueError, match="positive order, or inf; got 0"):
        nn.utils.clip_grad_norm_(parameters, 1.0, 0)


def test_clipping_does_not_reach_another_leafs_gradient(device):
    """x + y hands the same gradient to both; scaling one in place must leave the other."""
    x, y = (nn.Parameter(gpuad.zeros(4, device=device)) for _ in range(2))
    (x + y).sum().backward()
    nn.utils.clip_grad_value_(x, 0.25)
    assert array(x.grad).tolist() == [0.25] * 4 and array(y.grad).tolist() == [1.0] * 4
    nn.utils.clip_grad_norm_(y, 1.0)
    assert array(x.grad).tolist() == [0.25] * 4
    np.testing.assert_allclose(array(y.grad), 0.5, rtol=1e-5)


def test_parameters_as_a_vector(device):
    parameters = list(nn.Linear(3, 2, device=device).parameters())
    vector = nn.utils.parameters_to_vector(parameters)
    assert vector.shape == (8,) and vector.requires_grad
    nn.utils.vector_to_parameters(vector.detach() * 0 + gpuad.arange(8, device=device), parameters)
    assert array(parameters[0]).tolist() == [[0, 1, 2], [3, 4, 5]] and array(parameters[1]).tolist() == [6, 7]
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in parameters)
    with pytest.raises(ValueError, match="3 elements, the parameters have 8"):
        nn.utils.vector_to_parameters(gpuad.ones(3, device=device), parameters)
