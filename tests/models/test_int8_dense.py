"""A served model whose dense layers are in int8: which are, that none is bypassed, and what they compute."""

import copy

import commands
import pytest
import sacrebleu
import torch
from buffer_makers import buffered
from fairseq.modules import MultiheadAttention
from measured import measured
from model_makers import language_model, sentences
from served_models import EVERY_MODEL, Loader, logits
from torch import nn

from fairseq_moe_ext.kernels.block import LinearBlock
from fairseq_moe_ext.models.int8_dense import (
    Int8Embedding,
    Int8Linear,
    Int8Weight,
    built_in_int8,
    bytes_in_int8,
    put_in_int8,
)
from fairseq_moe_ext.tasks.flags import check_flags

LARGE = {"decoder_layers": 4, "decoder_embed_dim": 1024, "decoder_ffn_embed_dim": 2048, "allocate_experts": False}

ALL = ("--moe-weights", "int8", "--moe-weights-scope", "all")


@pytest.fixture(scope="module")
def loader(shared_goldens):
    return Loader(shared_goldens)


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_all_but_gates_norms_and_positions_are_in_int8(loader, model):
    floats, found = loader.load(model, {}), loader.load(model, {}, *ALL)
    modules = dict(found.named_modules())
    wanted = {name: module for name, module in floats.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    assert len(wanted) > 10
    for name, module in wanted.items():
        if ".gate." in name:
            assert type(modules[name]) is nn.Linear
            continue
        kind = Int8Linear if type(module) is nn.Linear else Int8Embedding
        assert type(modules[name]) is kind
        (weight, bias), exact = modules[name].int8.block.widen(modules[name].int8.bytes), module.weight.detach()
        steps = exact.abs().amax(1, keepdim=True) / 127
        assert ((weight[0] - exact).abs() <= 0.51 * steps).all()
        assert torch.equal(bias[0], torch.zeros_like(bias[0]) if getattr(module, "bias", None) is None else module.bias)
    dense = {name for name, _ in floats.named_parameters() if ".experts." not in name}
    replaced = {name for name in wanted if ".gate." not in name}
    assert {name for name, _ in found.named_parameters()} == {
        name for name in dense if name.rpartition(".")[0] not in replaced
    }
    blocks = {module for module in found.modules() if isinstance(module, Int8Weight)}
    kept = {module.weight for name, module in wanted.items() if ".gate." not in name}
    assert len(blocks) == len(kept)  # what is tied is tied
    assert bytes_in_int8(found) == sum(LinearBlock(8, *weight.shape).nbytes for weight in kept)


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_no_layer_is_bypassed(loader, model):
    """fairseq's attention hands its weights to PyTorch where it decodes nothing."""
    found = loader.load(model, {}, *ALL)
    called = set()
    for name, module in found.named_modules():
        if isinstance(module, (Int8Linear, Int8Embedding)):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    logits(found)
    assert called == {name for name, each in found.named_modules() if isinstance(each, (Int8Linear, Int8Embedding))}
    assert all(each.skip_embed_dim_check for each in found.modules() if isinstance(each, MultiheadAttention))


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_it_says_nearly_what_the_floats_say(loader, model):
    exact, found = loader.logits(model, {}), loader.logits(model, {}, *ALL)
    experts_alone = loader.logits(model, {}, *ALL[:2])
    assert not torch.equal(found, exact) and not torch.equal(found, experts_alone)
    assert (found - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_and_buffers(loader, dtype):
    half = ("--moe-dtype", dtype)
    found = loader.logits("mt_plain", {}, *ALL, *half)
    assert torch.equal(found, loader.logits("mt_plain", {}, *ALL, *half, *buffered(2)))
    exact = loader.logits("mt_plain", {}, *half)
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_the_reference_mode_widens_dense_layers_too(loader):
    model = loader.load("lm_top2", {}, *ALL, "--moe-kernel", "loop")
    x = torch.randn(3, 64)
    layer = model.decoder.layers[0].fc1
    (weight, bias), found = layer.int8.block.widen(layer.int8.bytes), layer(x)
    assert torch.equal(found, nn.functional.linear(x, weight[0], bias[0]))


def test_it_has_no_gradient_and_is_not_saved(loader):
    model = loader.load("lm_top2", {}, *ALL)
    layer = model.decoder.layers[0].fc1
    with pytest.raises(RuntimeError, match="linear layers in int8 have no gradients"):
        layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    with pytest.raises(RuntimeError, match="linear layers in int8 are not saved as floats"):
        layer.state_dict()


@pytest.mark.parametrize("change, words", [
    (lambda state, key: state.pop(key), "missing, and a layer in int8 has no values of its own"),
    (lambda state, key: state.update({key: state[key][:-1]}), r"expected shape \(96, 64\), got \(95, 64\)"),
    (lambda state, key: state.update({key: state[key] * float("nan")}), "weights must be finite numbers"),
], ids=["missing", "shape", "NaN"])
def test_a_tensor_that_cannot_be_loaded_is_named(loader, change, words):
    model = loader.load("mt_plain", {}, *ALL)
    state = commands.read_state(loader.goldens / "mt_plain" / "checkpoint_merged.pt")["model"]
    layer, prefix = model.encoder.layers[0].fc1, "encoder.layers.0.fc1."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    whole = dict(own)
    layer.load_state_dict(own)
    change(own, "weight")
    with pytest.raises((RuntimeError, ValueError), match=f"weight: {words}"):
        layer.load_state_dict(own, strict=False)
    with pytest.raises(RuntimeError, match="Unexpected key.*other"):
        layer.load_state_dict({**whole, "other": torch.zeros(1)})


@pytest.mark.parametrize("scope", ["all", "experts"])
@pytest.mark.parametrize("flags", [(), ("--moe-weights", "float")])
def test_a_scope_without_a_format_is_refused(flags, scope):
    arguments = ("data", "--path", "x.pt", *commands.LM, *flags, "--moe-weights-scope", scope)
    task = commands.parse("eval_lm", *arguments).task
    with pytest.raises(ValueError, match=f"^--moe-weights-scope {scope} needs --moe-weights int8 or int4, got float"):
        check_flags(task)


@pytest.mark.slow
@pytest.mark.parametrize("name, perplexity, bleu", [("int8", 0.001, 0.2), ("int4", 0.005, 0.5)])
def test_quality_on_upstreams_models(shared_goldens, name, perplexity, bleu):
    flags = ("--moe-weights", name, "--moe-weights-scope", "all")
    golden = shared_goldens / "lm_top2"
    arguments = (golden / "data-bin", "--path", golden / "checkpoint_last.pt", *commands.LM)
    losses = [commands.eval_lm(*arguments, *more).loss for more in ((), flags)]
    assert 2 ** (losses[1] - losses[0]) < 1 + perplexity
    golden = shared_goldens / "mt_plain"
    arguments = (golden / "data-bin", "--path", golden / "checkpoint_merged.pt", *commands.MT, "--beam", "4")
    scores = [bleu_of(commands.generate(*arguments, *more)) for more in ((), flags)]
    assert scores[0] > 20 and scores[1] > scores[0] - bleu


def bleu_of(generation):
    texts = {kind: [fields[-1] for _, fields in sorted(generation.of_kind(kind))] for kind in "HT"}
    return sacrebleu.corpus_bleu(texts["H"], [texts["T"]]).score


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"moe_cmr": True}, {"share_decoder_input_output_embed": False}], ids=str)
def test_models_of_other_kinds(fields):
    """Conditional routing has dense layers beside the experts and a gate of its own, which stays as it is."""
    model = language_model(**fields).eval()
    state, tokens = model.state_dict(), sentences()
    exact = model(src_tokens=tokens)[0]
    put_in_int8(model)
    model.load_state_dict(state)
    found = model.eval()(src_tokens=tokens)[0]
    left = [name for name, each in model.named_modules() if type(each) is nn.Linear]
    assert left and all(name.endswith(".gate.wg") for name in left)
    assert len(left) == (4 if "moe_cmr" in fields else 2)
    assert 0 < (found - exact).norm() < 0.03 * exact.norm()


def test_what_is_replaced_never_has_memory_as_floats():
    """Building and quantising take the blocks and one tensor's floats, several times; not those of all."""

    def build():
        model = built_in_int8(lambda: language_model(**LARGE, initialize_experts=False))
        for weight in [module for module in model.modules() if isinstance(module, Int8Weight)]:
            block = weight.block
            weight.fill(torch.ones(block.outputs, block.inputs), None, "")

    with torch.device("meta"):
        model = language_model(**LARGE, initialize_experts=False)
        tensors = {module.weight for module in model.modules() if type(module) in (nn.Linear, nn.Embedding)}
    floats = sum(weight.nbytes for weight in tensors)
    assert floats > 80e6
    taken = measured(build)
    assert taken.error is None and taken.memory < floats / 4 + 50e6 < 0.8 * floats, (taken, floats)


def test_a_layer_that_was_copied_or_moved_reads_its_own_bytes():
    """Where its planes lie is worked out once, not for every call."""
    weights = [torch.randn(5, 70, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    layer, x = Int8Linear(Int8Weight(5, 70), has_bias=False), torch.randn(3, 70)
    layer.int8.fill(weights[0], None, "")
    with torch.no_grad():
        first = layer(x)
        copied = copy.deepcopy(layer)
        copied.int8.fill(weights[1], None, "")
        assert torch.equal(layer(x), first) and not torch.equal(copied(x), first)
        other = copied(x)
        layer._apply(lambda tensor: copied.int8.bytes.clone() if tensor.dtype == torch.uint8 else tensor)
        assert torch.equal(layer(x), other)
