"""Upstream's own layers, as recorded: the recordings of tests/goldens, and all of ../shared/goldens if there.

Experts and slots must be the recorded ones exactly. A gate with the identity for its matrix is fed the recorded
logits, so that no rounding of the gate's product stands between.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer, Top1Gate, Top2Gate
from fairseq_moe_ext.gating.plan import plan_by_expert
from fairseq_moe_ext.gating.slots import StaticOptions, dispatcher_for
from fairseq_moe_ext.gating.static import assign_slots, dense_combine_weights, static_combine, static_dispatch
from fairseq_moe_ext.kernels.combine import weighted_sum

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@dataclass(frozen=True)
class Rules:
    """How a recorded layer routes."""

    top1: bool = False
    normalize_before: bool = False
    prioritized: bool = False
    masks_padding: bool = False
    output_masking: float = 0.0
    activation: object = F.gelu

    def gate(self, model_dim, num_experts):
        if self.top1:
            return Top1Gate(model_dim, num_experts, use_fp32=True)
        return Top2Gate(model_dim, num_experts, True, "all", self.normalize_before)


def load(path):
    with np.load(path) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def route(rules, logits, mask, capacity):
    """Recorded logits -> (routing after the capacity, slots, weights)."""
    gate = rules.gate(logits.size(1), logits.size(1))
    with torch.no_grad():
        gate.wg.weight.copy_(torch.eye(logits.size(1)))
        routing = gate(logits, mask if rules.masks_padding else None)
        slots = assign_slots(routing, rules.prioritized)
        routing = routing.keep_only(slots < capacity)
        return routing, slots, gate.combine_weights(routing).to(torch.float32)


def check_routing(rules, logits, mask, capacity, cw_idx, cw_val):
    """Every recorded combine weight stands where it was recorded, and nothing else anywhere."""
    routing, slots, weights = route(rules, logits, mask, capacity)
    rows = {}
    for token, choice in routing.kept.nonzero().tolist():
        key = (token, routing.expert_ids[token, choice].item(), slots[token, choice].item())
        rows[key] = weights[token, choice].item()
    recorded = dict(zip(map(tuple, cw_idx.tolist()), cw_val.tolist(), strict=True))
    assert set(rows) == set(recorded)
    for key, value in recorded.items():
        assert rows[key] == pytest.approx(value, rel=1e-5), key

    dense = dense_combine_weights(routing, slots, weights, capacity)
    assert dense.nonzero().tolist() == sorted(map(list, recorded))
    return routing, slots, weights, dense


SMALL = {
    "lm_top1": Rules(top1=True),
    "mt_plain": Rules(normalize_before=True, masks_padding=True, activation=F.relu),
    "mt_nllb": Rules(masks_padding=True),
}


@pytest.mark.parametrize("name", SMALL)
def test_routing_as_upstream_recorded_it(name):
    golden = load(GOLDENS / f"{name}.npz")
    check_routing(
        SMALL[name],
        golden["gate_logits"],
        golden.get("mask"),
        golden["capacity"].item(),
        golden["cw_idx"],
        golden["cw_val"],
    )


@pytest.mark.parametrize("name", SMALL)
def test_the_small_recordings_tell_rules_apart(name):
    """Another rule fails on them: order of arrival, the time of normalisation, the mask, the capacity."""
    golden, rules = load(GOLDENS / f"{name}.npz"), SMALL[name]
    arguments = [golden["gate_logits"], golden.get("mask"), golden["capacity"].item(), golden["cw_idx"],
                 golden["cw_val"]]
    others = [Rules(**{**rules.__dict__, "prioritized": True})]
    if not rules.top1:
        others.append(Rules(**{**rules.__dict__, "normalize_before": not rules.normalize_before}))
        others.append(Rules(**{**rules.__dict__, "masks_padding": False}))
    for other in others:
        with pytest.raises(AssertionError):
            check_routing(other, *arguments)
    arguments[2] += 1
    with pytest.raises(AssertionError):
        check_routing(rules, *arguments)


@pytest.mark.parametrize("name", ["lm_top1", "mt_plain"])
def test_outputs_as_upstream_recorded_them(name):
    """Some tokens, with the experts they went to; of the outputs the first features, as kept."""
    golden, rules = load(GOLDENS / f"{name}.npz"), SMALL[name]
    tokens, inputs, expected = golden["tokens"], golden["in"], golden["out"]
    num_experts, model_dim = golden["wg"].shape
    features = expected.size(1)
    torch.testing.assert_close(F.linear(inputs, golden["wg"]), golden["gate_logits"][tokens], **CLOSE)

    experts = ResidentExperts(num_experts, model_dim, golden["fc1_weight"].size(1), rules.activation).eval()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.zero_()
        kept = golden["experts"]
        experts.fc1_weight[kept], experts.fc1_bias[kept] = golden["fc1_weight"], golden["fc1_bias"]
        experts.fc2_weight[kept, :features] = golden["fc2_weight"]
        experts.fc2_bias[kept, :features] = golden["fc2_bias"]
        capacity = golden["capacity"].item()
        routing, slots, weights = route(rules, golden["gate_logits"], golden.get("mask"), capacity)

        # static: these tokens' rows of the dense mask
        dense = dense_combine_weights(routing, slots, weights, capacity)[tokens]
        outputs = experts(static_dispatch(inputs, dense), [capacity] * num_experts)
        torch.testing.assert_close(static_combine(outputs, dense)[:, :features], expected, **CLOSE)

        # dynamic's dispatch and combine, given the same assignments
        part = type(routing)(
            routing.expert_ids[tokens], routing.kept[tokens], weights[tokens], routing.probabilities[tokens]
        )
        plan = plan_by_expert(part, weights[tokens])
        assert 0 < sum(plan.load) < part.kept.numel()
        rows = experts.run(inputs[plan.token_ids], plan.offsets)
        torch.testing.assert_close(weighted_sum(rows, plan.row_ids, plan.weights)[:, :features], expected, **CLOSE)


# folder, recording, fraction, rules; every recording that holds layers
LM, MT = Rules(), Rules(masks_padding=True, activation=F.relu)
RECORDINGS = [
    ("tiny_lm_top1", "eval_b8_cap0.1", 0.1, Rules(top1=True)),
    ("tiny_lm_top2", "eval_b8_cap0.25", 0.25, LM),
    ("tiny_mt", "tf_en-de_cap0.2_b8_padmask", 0.2, Rules(**{**MT.__dict__, "normalize_before": True})),
    ("tiny_nllb", "tf_en-de_cap0.2_b8_padmask", 0.2, Rules(**{**MT.__dict__, "output_masking": 0.2})),
    ("lm_top1", "eval_b8_cap-1.0", -1.0, Rules(top1=True)),
    ("lm_top1", "eval_b8_cap0.05", 0.05, Rules(top1=True)),
    ("lm_top2", "eval_b8_cap-1.0", -1.0, LM),
    ("lm_top2", "eval_b8_cap0.05", 0.05, LM),
    ("lm_top2", "eval_b8_cap0.05_bpr", 0.05, Rules(prioritized=True)),
    ("lm_top2", "eval_b8_cap0.05_normbefore", 0.05, Rules(normalize_before=True)),
    ("lm_top2", "eval_eos_b16_cap0.05", 0.05, LM),
    ("lm_top2_ws2", "eval_ws1_b8_cap-1.0", -1.0, LM),
    ("mt_nllb_ws2", "tf_en-de_cap0.1_b8_padmask_moe", 0.1, Rules(**{**MT.__dict__, "output_masking": 0.2})),
    ("mt_nllb_ws2", "tf_en-de_cap1.0_b8_nopadmask_moe", 1.0, Rules(output_masking=0.2, activation=F.relu)),
    ("mt_plain", "tf_en-de_cap0.1_b8_padmask_moe", 0.1, Rules(**{**MT.__dict__, "normalize_before": True})),
    ("mt_plain", "tf_en-de_cap1.0_b8_padmask_moe", 1.0, Rules(**{**MT.__dict__, "normalize_before": True})),
]
every_recording = pytest.mark.parametrize(
    "folder, recording, fraction, rules", RECORDINGS, ids=[f"{folder} {name}" for folder, name, *_ in RECORDINGS]
)


@pytest.fixture(scope="module")
def read_model(golden_folder):
    """Folder -> the model's state, read once."""
    states = {}

    def read(folder):
        if folder not in states:
            states[folder] = read_checkpoint(str(golden_folder(folder) / "checkpoint_last.pt"))["model"]
        return states[folder]

    return read


def recorded_layers(path):
    """Module -> its recorded arrays."""
    layers = {}
    for name, array in load(path).items():
        if name.startswith("moe/"):
            module, key = name.removeprefix("moe/").rsplit("/", 1)
            layers.setdefault(module, {})[key] = array
    return layers


def build(rules, model, module, gating, fraction):
    """The served layer with the checkpoint's weights."""
    state = {key.removeprefix(f"{module}."): value for key, value in model.items() if key.startswith(f"{module}.")}
    num_experts, model_dim = state["gate.wg.weight"].shape
    hidden_dim = state["experts.0.fc1.weight"].size(0)
    experts = ResidentExperts(num_experts, model_dim, hidden_dim, rules.activation)
    options = StaticOptions(fraction, rules.prioritized, not rules.masks_padding, batch_size=3, batch_size_valid=3)
    layer = MOELayer(
        rules.gate(model_dim, num_experts), experts, dispatcher_for(gating, options), rules.output_masking
    ).eval()
    layer.load_state_dict(state)
    return layer


@every_recording
def test_static_gating_is_upstreams(folder, recording, fraction, rules, golden_folder, read_model):
    layers = recorded_layers(golden_folder(folder) / "golden" / f"{recording}.npz")
    assert len(layers) == (1 if folder.startswith("tiny_lm") else 2)
    outputs_checked = 0
    for module, golden in layers.items():
        logits, mask, capacity = golden["gate_logits"], golden.get("mask"), golden["cw_shape"][2].item()
        check_routing(rules, logits, mask, capacity, golden["cw_idx"], golden["cw_val"])
        if "in" not in golden:
            continue
        x, calls = golden["in"], []
        layer = build(rules, read_model(folder), module, "static", fraction)
        torch.testing.assert_close(F.linear(x.flatten(0, 1), layer.gate.wg.weight.detach()), logits, **CLOSE)
        if "l_aux" in golden:
            options = StaticOptions(fraction, rules.prioritized, not rules.masks_padding)
            # statistics are of batches that are not served; theirs had no rows added
            layer.use(dispatcher=dispatcher_for("static", options))
            with torch.no_grad():
                layer(x, None if mask is None else mask.view(x.shape[:2]))
            assert layer.gate_loss().item() == pytest.approx(golden["l_aux"].item(), rel=1e-4)
        layer.prepare_for_serving(seed=1, observer=calls.append)
        with torch.no_grad():
            output = layer(x, None if mask is None else mask.view(x.shape[:2]))
        torch.testing.assert_close(output, golden["out"], **CLOSE)
        load = torch.bincount(golden["cw_idx"][:, 1], minlength=logits.size(1)).tolist()
        assert calls[0].load == load
        outputs_checked += 1
    assert outputs_checked


@pytest.mark.parametrize(
    "folder, recording, rules",
    [(folder, name, rules) for folder, name, fraction, rules in RECORDINGS if fraction == 1.0],
    ids=[f"{folder} {name}" for folder, name, fraction, _ in RECORDINGS if fraction == 1.0],
)
def test_dynamic_gating_is_upstreams_at_fraction_one(folder, recording, rules, golden_folder, read_model):
    for module, golden in recorded_layers(golden_folder(folder) / "golden" / f"{recording}.npz").items():
        layer, calls = build(rules, read_model(folder), module, "dynamic", 0.01), []
        layer.prepare_for_serving(seed=1, observer=calls.append)
        x, mask = golden["in"], golden["mask"].view(golden["in"].shape[:2])
        with torch.no_grad():
            output = layer(x, mask)
        torch.testing.assert_close(output, golden["out"], **CLOSE)
        assert calls[0].load == torch.bincount(golden["cw_idx"][:, 1], minlength=8).tolist()


@pytest.mark.parametrize("tiny", [True, False])
def test_every_recorded_layer_is_tested(tiny, request):
    """No recording of layers beside those listed."""
    found = set()
    for path in sorted(request.getfixturevalue("tiny_goldens" if tiny else "shared_goldens").glob("*/golden/*.npz")):
        with np.load(path) as file:
            if any(name.startswith("moe/") for name in file.files):
                found.add((path.parents[1].name, path.stem))
    assert found == {(folder, name) for folder, name, *_ in RECORDINGS if folder.startswith("tiny_") == tiny}


def test_the_small_recordings_are_copies(shared_goldens, tmp_path):
    script = GOLDENS / "make_goldens.py"
    done = processes.run([sys.executable, script, shared_goldens, tmp_path])
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in GOLDENS.glob("*.npz")} == {path.stem for path in tmp_path.iterdir()} == set(SMALL)
    for name in SMALL:
        with np.load(GOLDENS / f"{name}.npz") as file, np.load(tmp_path / f"{name}.npz") as made:
            assert file.files == made.files
            for key in file.files:
                np.testing.assert_array_equal(file[key], made[key], strict=True)
