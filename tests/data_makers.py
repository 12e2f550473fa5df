"""Tiny data folders in fairseq's binary format, and untrained checkpoints of any model for them."""

from __future__ import annotations

from pathlib import Path

import torch
from fairseq import options, tasks
from fairseq.data import indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from model_makers import dictionary
from omegaconf import OmegaConf

LM_TRAINING = ("--task", "moe_language_modeling", "--arch", "moe_transformer_lm_tiny", "--tokens-per-sample", "16")
MT_TRAINING = ("--task", "moe_translation", "--arch", "moe_transformer_tiny", "-s", "en", "-t", "de")
SPLITS = {"train": 200, "valid": 20, "test": 20}


def write_data(folder: Path, languages: tuple[str, ...] = (), words: int = 40, splits: dict[str, int] = SPLITS) -> Path:
    """`languages`: none for a language model's data, else two; the second says the first's words backwards."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = dictionary(words)
    for language in languages or ("",):
        vocabulary.save(str(folder / f"dict.{language}.txt".replace("..", ".")))
    generator = torch.Generator().manual_seed(0)
    for split, number in splits.items():
        lengths = torch.randint(3, 12, (number,), generator=generator)
        # a narrow choice per sentence: something to learn
        firsts = torch.randint(vocabulary.nspecial, words - 5, (number,), generator=generator)
        lines = [
            first + torch.randint(0, 5, (int(length),), generator=generator)
            for first, length in zip(firsts, lengths, strict=True)
        ]
        for side, language in enumerate(languages or ("",)):
            name = f"{split}.{'-'.join(languages)}.{language}" if languages else split
            builder = indexed_dataset.make_builder(str(folder / f"{name}.bin"), "mmap", words)
            for line in lines:
                line = line.flip(0) if side else line
                builder.add_item(torch.cat((line, torch.tensor([vocabulary.eos()]))).int())
            builder.finalize(str(folder / f"{name}.idx"))
    return folder


def training_configuration(data: Path, *arguments: str):
    """What fairseq-train makes of its arguments."""
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [str(data), "--cpu", *map(str, arguments)])
    return convert_namespace_to_omegaconf(args)


def untrained_checkpoint(file: Path, data: Path, *arguments: str, seed: int = 0):
    """Save the model that fairseq-train would begin with, as fairseq's trainer saves it; returns the model."""
    cfg = training_configuration(data, *arguments)
    torch.manual_seed(seed)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0 and norms at 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "x", "optimizer_name": "x", "lr_scheduler_state": {}, "num_updates": 7}
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}},
        "last_optimizer_state": {"state": torch.ones(3)},
    }
    torch.save(state, file)
    return model.eval()
