"""The packed experts: their computation, and their state dict in upstream's names."""

import pytest
import torch
from cases import Case, examples, expert_list
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import FEW_ROWS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.kernels.alignment import ALIGNMENT
from fairseq_moe_ext.kernels.cpu_kernel import VARIABLE
from fairseq_moe_ext.kernels.crossing import most_rows


def make_experts(num_experts=3, model_dim=4, hidden_dim=5, **options):
    torch.manual_seed(0)
    return ResidentExperts(num_experts, model_dim, hidden_dim, **options)


@examples(40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from((torch.relu, torch.tanh)))
def test_each_chunk_goes_through_its_expert(counts, activation):
    experts = make_experts(len(counts), activation=activation).eval()
    rows = torch.randn(sum(counts), 4)
    with torch.no_grad():
        outputs = experts(rows, counts)
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert outputs.shape == rows.shape
    state = experts.state_dict()
    for row, output, owner in zip(rows, outputs, owners, strict=True):
        hidden = activation(state[f"{owner}.fc1.weight"] @ row + state[f"{owner}.fc1.bias"])
        torch.testing.assert_close(output, state[f"{owner}.fc2.weight"] @ hidden + state[f"{owner}.fc2.bias"])


class Operands(TorchDispatchMode):
    """Where the matrices of PyTorch's products begin, modulo the alignment."""

    def __init__(self):
        super().__init__()
        self.begin: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "addmm" in str(func):
            self.begin |= {matrix.data_ptr() % ALIGNMENT for matrix in (*args[1:], (kwargs or {}).get("out", args[1]))}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("choice", ["auto", "off"])
@pytest.mark.parametrize("rows_before", [0, 1, 5])
@pytest.mark.parametrize("num_rows", [3, FEW_ROWS + 3])
@pytest.mark.parametrize("dims", [(6, 5), (9, 7), (33, 17)])
def test_an_experts_outputs_do_not_depend_on_its_place(monkeypatch, dims, num_rows, rows_before, choice):
    """Matrix libraries round by where a matrix begins; with odd dims every place and every row begins elsewhere."""
    monkeypatch.setenv(VARIABLE, choice)
    experts = make_experts(8, *dims).eval()
    with torch.no_grad(), Operands() as operands:
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
        rows, others = torch.randn(num_rows, dims[0]), torch.randn(rows_before, dims[0])
        outputs = [experts(rows, [num_rows, *[0] * 7])]
        for place in range(1, 8):
            counts = [rows_before, *(num_rows * (expert == place) for expert in range(1, 8))]
            outputs.append(experts(torch.cat((others, rows)), counts)[rows_before:])
    for place in range(1, 8):
        assert torch.equal(outputs[0], outputs[place]), place
    assert operands.begin <= {0}
    assert operands.begin or (num_rows <= FEW_ROWS and most_rows(torch.float32, rows.device))


def test_counts_must_sum_to_the_rows():
    with pytest.raises((RuntimeError, ValueError), match="sum (exactly )?to"):
        make_experts()(torch.zeros(5, 4), [1, 1, 1])


def test_activation_dropout_in_training_alone():
    experts = make_experts(activation_dropout=0.5)
    plain = make_experts()
    plain.load_state_dict(experts.state_dict())
    rows = torch.randn(50, 4)
    counts = [20, 0, 30]
    assert torch.equal(experts.eval()(rows, counts), plain.eval()(rows, counts))
    torch.manual_seed(0)
    total = torch.stack([experts.train()(rows, counts) for _ in range(400)])
    assert not torch.equal(total[0], total[1])
    torch.testing.assert_close(total.mean(dim=0), plain(rows, counts), atol=0.15, rtol=0)
    assert torch.equal(plain.train()(rows, counts), plain.eval()(rows, counts))


def test_activation_dropout_does_not_ask_for_gradients():
    """An activation checkpoint's first pass wants none, and must draw what the second does."""
    experts = make_experts(activation_dropout=0.5).train()
    rows, outputs = torch.randn(50, 4), []
    for wanted in (False, True):
        torch.manual_seed(0)
        with torch.set_grad_enabled(wanted):
            outputs.append(experts(rows, [20, 0, 30]))
    torch.testing.assert_close(*outputs)
    with torch.no_grad():
        assert not torch.equal(outputs[0], experts(rows, [20, 0, 30]))


def test_the_state_dict_is_one_of_linear_layers():
    """Upstream's experts are a list of modules with fc1 and fc2: theirs and ours load each other."""
    def linear_expert():
        return nn.ModuleDict({"fc1": nn.Linear(4, 5), "fc2": nn.Linear(5, 4)})

    upstream = nn.ModuleList([linear_expert() for _ in range(3)])
    experts = make_experts()
    experts.load_state_dict(upstream.state_dict())
    rows = torch.randn(6, 4)
    outputs = experts.eval()(rows, [1, 2, 3])
    for row, output, owner in zip(rows, outputs, (0, 1, 1, 2, 2, 2), strict=True):
        expert = upstream[owner]
        torch.testing.assert_close(output, expert["fc2"](expert["fc1"](row).relu()))
    other = nn.ModuleList([linear_expert() for _ in range(3)])
    other.load_state_dict(experts.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), upstream.parameters(), strict=True))
    assert sorted(experts.state_dict()) == sorted(upstream.state_dict())


def test_round_trip_within_a_layer():
    layer, other = Case(seed=1).layer(), Case(seed=2).layer()
    x, _ = Case(seed=3).batch()
    assert not torch.allclose(layer(x), other(x))
    result = other.load_state_dict(layer.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(layer(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(expert_list(layer)[4].__dict__.values(),
                                                 expert_list(other)[4].__dict__.values(), strict=True))


def test_loading_copies_and_the_state_dict_shares():
    experts = make_experts()
    state = {key: value.clone() for key, value in experts.state_dict().items()}
    experts.load_state_dict(state)
    state["1.fc1.weight"].zero_()
    assert experts.fc1_weight[1].any()
    experts.state_dict()["1.fc1.bias"].fill_(3.0)
    assert (experts.fc1_bias[1] == 3).all()
    assert not experts.state_dict()["0.fc1.weight"].requires_grad
    assert experts.state_dict(keep_vars=True)["0.fc1.weight"].requires_grad


def test_loading_takes_the_layers_dtype():
    state = make_experts().state_dict()
    experts = make_experts().half()
    experts.load_state_dict(state)
    assert experts.fc1_weight.dtype == torch.float16
    assert torch.equal(experts.fc2_weight[2], state["2.fc2.weight"].half())


@pytest.mark.parametrize("change, words", [
    ({"experts.1.fc2.bias": None}, r'Missing key\(s\) in state_dict: "experts\.1\.fc2\.bias"'),
    ({"experts.5.fc1.weight": torch.zeros(5, 6)}, r'Unexpected key\(s\) in state_dict: "experts\.5\.fc1\.weight"'),
    ({"experts.0.fc3.weight": torch.zeros(5, 6)}, r'Unexpected key\(s\) in state_dict: "experts\.0\.fc3\.weight"'),
    ({"experts.fc1_weight": torch.zeros(5, 6)}, r'Unexpected key\(s\) in state_dict: "experts\.fc1_weight"'),
    ({"experts.3.fc1.weight": torch.zeros(7, 6)}, r"experts\.3\.fc1\.weight: expected shape \(5, 6\), got \(7, 6\)"),
    ({"experts.3.fc1.bias": torch.zeros(1)}, r"experts\.3\.fc1\.bias: expected shape \(5,\), got \(1,\)"),
])
def test_bad_keys_are_named(change, words):
    layer = Case().layer()
    state = dict(layer.state_dict())
    for key, value in change.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict(state)
    if "expected shape" not in words:
        result = layer.load_state_dict(state, strict=False)
        assert [*result.missing_keys, *result.unexpected_keys] == list(change)


def test_fresh_experts_differ_and_are_bounded():
    """torch.nn.Linear's initialisation: uniform within one over the square root of the inputs."""
    experts = make_experts(4, 16, 9)
    for weight, bound in ((experts.fc1_weight, 16**-0.5), (experts.fc1_bias, 16**-0.5),
                          (experts.fc2_weight, 9**-0.5), (experts.fc2_bias, 9**-0.5)):
        assert 0.7 * bound < weight.abs().max().item() <= bound
    assert not torch.equal(experts.fc1_weight[0], experts.fc1_weight[1])
