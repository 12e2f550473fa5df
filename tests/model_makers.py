"""Small models for the tests, built as the plugin's tasks build them."""

from __future__ import annotations

from argparse import Namespace

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture

from fairseq_moe_ext.models.moe_transformer import MoETransformerModel
from fairseq_moe_ext.models.moe_transformer_lm import MoETransformerLanguageModel

WORDS = 37
SMALL = {"embed_dim": 16, "ffn_embed_dim": 24, "layers": 4, "attention_heads": 2}
MOE = {"moe_freq": 2, "moe_expert_count": 4, "moe_second_expert_policy": "all"}
WITHOUT_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def dictionary(size: int = WORDS) -> Dictionary:
    words = Dictionary()
    for number in range(size - len(words)):
        words.add_symbol(f"w{number}")
    return words


class Vocabulary:
    """What a model asks of its task."""

    def __init__(self, size: int = WORDS):
        self.source_dictionary = self.target_dictionary = dictionary(size)


def arguments(arch: str, **fields) -> Namespace:
    """A model's arguments as fairseq-train makes them of `--arch`."""
    args = Namespace(**fields)
    ARCH_CONFIG_REGISTRY[arch](args)
    return args


def _sides(sides: tuple[str, ...], fields: dict) -> dict:
    small = {f"{side}_{name}": value for side in sides for name, value in SMALL.items()}
    return {**small, **WITHOUT_DROPOUT, **MOE, **fields}


def language_model(seed: int = 0, **fields) -> MoETransformerLanguageModel:
    torch.manual_seed(seed)
    args = arguments("moe_transformer_lm_tiny", **_sides(("decoder",), {"max_target_positions": 32, **fields}))
    return MoETransformerLanguageModel.build_model(args, Vocabulary())


def translation_model(seed: int = 0, **fields) -> MoETransformerModel:
    torch.manual_seed(seed)
    positions = {"max_source_positions": 32, "max_target_positions": 32}
    args = arguments("moe_transformer", **_sides(("encoder", "decoder"), {**positions, **fields}))
    return MoETransformerModel.build_model(args, Vocabulary())


def dense_twin(model, **fields):
    """fairseq's own dense model with the weights of `model`, whose experts are made copies of the first in each layer.

    With two experts per token the weights sum to 1, so that the two models must compute the same.
    """
    state = model.state_dict()
    for key in list(state):
        prefix, found, rest = key.partition(".moe_layer.experts.")
        if found:
            number, _, name = rest.partition(".")
            first = state[f"{prefix}{found}0.{name}"]
            state[key].copy_(first)  # shares the model's storage
            if number == "0":
                state[f"{prefix}.{name}"] = first
    state = {key: tensor for key, tensor in state.items() if ".moe_layer." not in key}
    if isinstance(model, MoETransformerLanguageModel):
        args = Namespace(**_sides(("decoder",), {"max_target_positions": 32, **fields}))
        args.share_decoder_input_output_embed = True
        base_lm_architecture(args)
        twin = TransformerLanguageModel.build_model(args, Vocabulary())
    else:
        positions = {"max_source_positions": 32, "max_target_positions": 32}
        args = arguments("transformer", **_sides(("encoder", "decoder"), {**positions, **fields}))
        twin = TransformerModel.build_model(args, Vocabulary())
    twin.load_state_dict(state, strict=True)
    return twin.eval()


def sentences(rows: int = 5, length: int = 9, left_pad: bool = False, seed: int = 1) -> torch.Tensor:
    """(rows, length) tokens; all rows but the first are padded, each by another number of places."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, WORDS, (rows, length), generator=generator)
    for row in range(1, rows):
        pads = row % (length - 1)
        if left_pad:
            tokens[row, :pads] = 1
        else:
            tokens[row, length - pads :] = 1
    return tokens


def translation_input(left_pad: bool = True) -> dict[str, torch.Tensor]:
    """net_input of fairseq's translation task: a padded source and the target so far."""
    source = sentences(left_pad=left_pad)
    return {
        "src_tokens": source,
        "src_lengths": source.ne(1).sum(dim=1),
        "prev_output_tokens": sentences(length=7, seed=2),
    }
