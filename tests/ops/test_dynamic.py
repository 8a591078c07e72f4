"""A rule in the place of the scale of a product's input: the same as finding the scale first, for all operators."""

import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.ops import DynamicScale, inf_as_nan, scaled_input

E4M3 = torch.float8_e4m3fn
IN, OUT = 64, 24
GEOMETRY = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def rule(group=-1, rounding="pow2", target="cpu", hp_dtype=torch.bfloat16):
    return DynamicScale(group, 224.0, rounding, "E4M3", target, hp_dtype)


def codes(*shape):
    return torch.randn(shape).to(E4M3)


def linear(x, scale):
    return ops.linear(x, codes(OUT, IN), torch.rand(OUT, 1), scale, torch.ones(OUT), full_scale=448.0)


def conv(x, scale):
    image = x.reshape(2, 4, 6, -1)
    return ops.conv(image, codes(8, 4, 3, 3), torch.rand(8, 1, 1, 1), scale, None, **GEOMETRY, full_scale=448.0)


def grouped(x, scale):
    experts, scales = torch.arange(len(x)) % 3, torch.rand(3, OUT, 1)
    return ops.grouped_linear(x, experts, codes(3, OUT, IN), scales, scale, full_scale=448.0)


def experts(x, scale):
    table, weights = torch.arange(2 * len(x)).reshape(-1, 2) % 3, torch.rand(len(x), 2)
    gate_up, down = codes(3, 32, IN), codes(3, IN, 16)
    return ops.experts(x, table, weights, gate_up, down, torch.rand(3, 32, 1), torch.rand(3, IN, 1), scale, None,
                       full_scale=448.0)  # fmt: skip


OPERATORS = {"linear": (linear, (0, -1, 32)), "conv": (conv, (0,)), "grouped": (grouped, (0, -1, 32)),
             "experts": (experts, (0, -1))}  # fmt: skip
CASES = [(name, group) for name, (_, groups) in OPERATORS.items() for group in groups]


def input_of_all_kinds():
    x = torch.randn(12, IN)
    x[1, 3], x[2, 4], x[3, 5], x[4] = torch.inf, -torch.inf, torch.nan, 0
    return x.bfloat16()


def two_steps(x, way):
    scale = ops.dynamic_scale(x, **way._asdict())
    return inf_as_nan(x), scale


@over(case=CASES, backend=["reference", ops.cpu.backends()[0]])
def test_it_is_the_scale_and_then_the_product(case, backend):
    operator, (name, group) = OPERATORS[case[0]][0], case
    x, way = input_of_all_kinds(), rule(group)
    by_scale = two_steps(x.reshape(2, 4, 6, -1) if name == "conv" else x, way)
    with ops.backend(backend):
        torch.manual_seed(0)
        expected = operator(*by_scale)
        torch.manual_seed(0)
        found = operator(x, way)
    assert found.isnan().any() and not found.isnan().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_given_as_it_is_stays():
    x = torch.randn(3, IN)
    for scale in (None, torch.ones(1)):
        assert scaled_input(x, scale) == (x, scale)


@over(case=CASES)
def test_gradients_are_those_of_the_two_steps(case):
    operator, way, found = OPERATORS[case[0]][0], rule(case[1]), []
    for is_rule in (True, False):
        torch.manual_seed(1)
        x = torch.randn(12, IN, requires_grad=True)
        torch.manual_seed(0)
        seen = x.reshape(2, 4, 6, -1) if case[0] == "conv" else x
        operator(*((seen, way) if is_rule else two_steps(seen, way))).sum().backward()
        found.append(x.grad)
    assert found[0].count_nonzero() and torch.equal(*found)


def operators_of(graph):
    found = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return [name.removeprefix("optimum_fp8.").removesuffix(".default") for name in found if "optimum_fp8" in name]


def compiled(function, *args):
    """Its result, and the operators that a compiler sees."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)(*args), operators_of(graphs[0])


@over(group=[0, -1, 32])
def test_compiled_it_is_one_operator_and_where_there_is_a_gradient_its_steps(group):
    weight, scale, x = codes(OUT, IN), torch.rand(OUT, 1), input_of_all_kinds()

    def product(x):
        return ops.linear(x, weight, scale, rule(group), None, full_scale=448.0)

    found, seen = compiled(product, x)
    assert seen == ["dynamic_linear"]
    torch.testing.assert_close(found, product(x), rtol=0, atol=0, equal_nan=True)
    steps = ["dynamic_scale", "linear"]
    assert compiled(product, x.clone().requires_grad_())[1] == steps


def test_exported_programs_have_the_steps():
    class Product(torch.nn.Module):
        def forward(self, x):
            return ops.linear(x, self.codes, self.scale, rule(), None, full_scale=448.0)

    module, x = Product(), torch.randn(5, IN)
    module.codes, module.scale = codes(OUT, IN), torch.rand(OUT, 1)
    program = torch.export.export(module, (x,))
    assert operators_of(program.graph) == ["dynamic_scale", "linear"]
    assert torch.equal(program.module()(x), module(x))


def test_the_one_operator_has_the_gradient_of_its_steps_and_counts_for_the_module():
    weight, scale, x = codes(OUT, IN), torch.rand(OUT, 1), torch.randn(5, IN)
    record = ops.CallRecord()
    record.watch(weight)
    found = []
    for call in (
        lambda x: torch.ops.optimum_fp8.dynamic_linear(x, weight, scale, None, *rule(), 448.0, "fused"),
        lambda x: ops.linear(x, weight, scale, rule(), None, full_scale=448.0),
    ):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        found += [(y.detach(), leaf.grad)]
        with torch.no_grad():
            assert torch.equal(call(x), y)
    assert all(map(torch.equal, *found)) and found[0][1].count_nonzero()
    assert record.kernels["linear", ops.cpu.backends()[0]] >= 3
