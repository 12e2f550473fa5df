"""How long MoE layers take under R real ranks with every capacity: what capacity_aware.py starts by torchrun.

Each rank runs a few batches of its own through the model and keeps what the MoE layers were given. Then, setting by
setting and round after round, all ranks run the layers on it, from one barrier to the last rank's end.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, tasks

from fairseq_moe_ext.atomic_file import write_json
from fairseq_moe_ext.balancing.placement import load_placement
from fairseq_moe_ext.gating.capacity import CapacityRules
from fairseq_moe_ext.gating.rules import Rule
from fairseq_moe_ext.serving.expert_share import CapacitySettings, limit_experts, place_experts
from reproduction.capacity_aware import Setting
from reproduction.models import configuration

BATCHES = 3  # of every rank
ROUNDS = 7


def load(cfg):
    """(model ready to serve, its task)"""
    task = tasks.setup_task(cfg.task)
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([cfg.common_eval.path], task=task)
    models[0].eval()
    models[0].prepare_for_inference_(cfg)
    return models[0], task


def layer_inputs(model, task, cfg, rank: int, ranks: int) -> list[tuple]:
    """(layer, x, padding mask) of every call of a MoE layer in this rank's batches, teacher-forced."""
    task.load_dataset(cfg.dataset.gen_subset)
    dataset, rows = task.dataset(cfg.dataset.gen_subset), cfg.dataset.batch_size
    order, found = dataset.ordered_indices(), []
    for layer in model.moe_layers().values():
        layer.observe(None)
        layer.register_forward_pre_hook(lambda layer, given: found.append((layer, *given)))
    for number in range(BATCHES):
        start = (number * ranks + rank) * rows
        chosen = [order[position % len(order)] for position in range(start, start + rows)]
        model(**dataset.collater([dataset[index] for index in chosen])["net_input"])
    for layer in model.moe_layers().values():
        layer._forward_pre_hooks.clear()
    return found


def rules_of_layers(model, cfg, setting: Setting, rank: int, ranks: int) -> dict[str, Sequence[Rule]]:
    """The capacity's."""
    layers = model.moe_layers()
    if setting.gamma is None:
        return dict.fromkeys(layers, ())
    file = cfg.task.expert_placement
    places = place_experts(model, None if file is None else load_placement(file), ranks)
    rules = CapacityRules(setting.gamma, setting.overflow, setting.metric)
    limit_experts(model, CapacitySettings(rules), places, ranks, rank)
    found = {name: layer.rules for name, layer in layers.items()}
    for layer in layers.values():
        layer.use(rules=())
    return found


@torch.inference_mode()
def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    cfg = configuration(request["arguments"], request["translates"])
    model, task = load(cfg)
    dist.init_process_group("gloo")  # for what is measured, beside the ranks' own
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = layer_inputs(model, task, cfg, rank, ranks)
    settings = [Setting(*parts) for parts in request["settings"]]
    installed = [rules_of_layers(model, cfg, setting, rank, ranks) for setting in settings]
    seconds = torch.zeros(ROUNDS, len(settings), len(inputs), dtype=torch.float64)
    for round_ in seconds:
        for times, of_layers in zip(round_, installed, strict=True):
            for name, layer in model.moe_layers().items():
                layer.use(rules=of_layers[name])
            for number, (layer, *given) in enumerate(inputs):
                dist.barrier()
                start = time.perf_counter()
                layer(*given)
                times[number] = time.perf_counter() - start
    dist.all_reduce(seconds, dist.ReduceOp.MAX)  # a layer's call ends when the last rank has ended it
    if rank == 0:
        medians = [1000 * statistics.median(times) for times in seconds.mean(dim=2).t().tolist()]
        write_json(Path(request["output"]), {str(each): value for each, value in zip(settings, medians, strict=True)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
