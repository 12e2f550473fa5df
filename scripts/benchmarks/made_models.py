"""Models of the published shapes with random weights, scaled down in width and depth, and data for them.

The number of experts, how often they stand, the ratio of hidden to model dim and the capacity fraction are those
published. The vocabulary shrinks with width and depth, so that the output layer keeps its share of the arithmetic.

Legend: E = experts, K = choices, D = model dim, F = hidden dim, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary, indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig, OmegaConf

from fairseq_moe_ext.atomic_file import new_file
from fairseq_moe_ext.models import moe_transformer, moe_transformer_lm  # noqa: F401
from fairseq_moe_ext.tasks import moe_language_modeling, moe_translation  # noqa: F401

K = 2
BLOCK = 128  # tokens of a language model's row
SOURCE_LENGTHS = (8, 32)  # tokens of a translation's source, from and to, evenly drawn


@dataclass(frozen=True)
class Shape:
    """A published model: its named architecture here, and what is scaled down."""

    name: str
    translates: bool
    arch: str
    layers: int
    model_dim: int
    vocabulary: int
    capacity_fraction: float


SHAPES = {
    "lm": Shape("LM-52B", False, "moe_transformer_lm_52b", 24, 1024, 51200, 0.05),
    "mt": Shape("NLLB-54B", True, "moe_transformer_nllb_54b", 24, 2048, 256206, 1.0),
}


def scaled_vocabulary(shape: Shape, model_dim: int, layers: int) -> int:
    """V in proportion to width and depth, and no less than 64."""
    return max(shape.vocabulary * model_dim * layers // (shape.model_dim * shape.layers), 64)


def dictionary(vocabulary: int) -> Dictionary:
    words = Dictionary()
    for number in range(vocabulary - len(words)):
        words.add_symbol(f"w{number}")
    return words


def write_data(
    folder: Path,
    shape: Shape,
    vocabulary: int,
    rows: dict[str, int],
    seed: int = 1,
    source_lengths: tuple[int, int] = SOURCE_LENGTHS,
) -> Path:
    """Splits of so many sentences (a language model's are blocks) of random words, in fairseq's binary format."""
    folder.mkdir(parents=True)
    words = dictionary(vocabulary)
    generator = torch.Generator().manual_seed(seed)
    low, high = source_lengths if shape.translates else (BLOCK, BLOCK)
    for split, number in rows.items():
        lengths = torch.randint(low, high + 1, (number,), generator=generator).tolist()
        for language in ("en", "de") if shape.translates else (None,):
            with new_file(folder / (f"dict.{language}.txt" if language else "dict.txt"), text=True) as opened:
                words.save(opened)
            prefix = folder / (f"{split}.en-de.{language}" if language else split)
            builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", vocabulary)
            for length in lengths:
                line = torch.randint(words.nspecial, vocabulary, (length,), generator=generator)
                line[-1] = words.eos()
                builder.add_item(line.int())
            builder.finalize(f"{prefix}.idx")
    return folder


def configuration(data: Path, shape: Shape, *flags: str) -> DictConfig:
    """Of a checkpoint of the shape, as fairseq's trainer has it; flags: of the trainer."""
    arguments = [str(data), "--cpu", "--arch", shape.arch, "--dropout", "0", *flags]
    if shape.translates:
        arguments += ["--task", "moe_translation", "-s", "en", "-t", "de"]
    else:
        arguments += ["--task", "moe_language_modeling", "--tokens-per-sample", str(BLOCK)]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), arguments))


def write_checkpoint(
    file: Path, data: Path, shape: Shape, model_dim: int, layers: int, dtype: str, dense: bool = False, seed: int = 1
) -> Path:
    """The shape at this width and depth; `dense`: a feed-forward of hidden dim K * F stands in place of the experts."""
    hidden_dim, heads = 4 * model_dim, max(model_dim // 64, 1)
    scaled = []
    for side in ("encoder", "decoder") if shape.translates else ("decoder",):
        scaled += [f"--{side}-layers", str(layers), f"--{side}-attention-heads", str(heads)]
        scaled += [f"--{side}-embed-dim", str(model_dim), f"--{side}-ffn-embed-dim", str(hidden_dim)]
        if dense:
            name = "alternate" if side == "encoder" else "alternate-decoder"
            scaled += [f"--{name}-ffn-embed-dim", str(K * hidden_dim)]
    cfg = configuration(data, shape, *scaled)
    torch.manual_seed(seed)
    model = tasks.setup_task(cfg.task).build_model(cfg.model).to(getattr(torch, dtype))
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}],
        "task_state": {},
        "extra_state": {},
    }
    with new_file(file) as opened:
        torch.save(state, opened)
    return file
