"""NLLB models in Hugging Face's layout, made on the spot: random weights, a trained SentencePiece model, real files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary, indexed_dataset
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.nllb.config import NllbConfig
from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.nllb.names import named_tensors
from scripts.benchmarks.peers import environments

LANGUAGES = ("eng_Latn", "deu_Latn", "fra_Latn")
PIECES = 60
TEXT = (
    "the quick brown fox jumps over the lazy dog",
    "der schnelle braune fuchs springt ueber den faulen hund",
    "le vif renard brun saute par dessus le chien paresseux",
    "we sell four swiss francs and ten days of september",
)
TINY = {
    "model_type": "nllb-moe",
    "d_model": 16,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 8,
    "max_position_embeddings": 64,
    "moe_token_dropout": 0.2,
    "router_dtype": "float32",
    "second_expert_policy": "all",
    "expert_capacity": 64,
    "moe_eval_capacity_token_fraction": 1.0,
    "normalize_router_prob_before_dropping": False,
    "scale_embedding": True,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
}
DENSE = {**{key: value for key, value in TINY.items() if "sparse" not in key}, "model_type": "m2m_100"}

# as facebook/nllb-moe-54b says it, its sizes cut
NLLB_54B = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["NllbMoeForConditionalGeneration"],
    "attention_dropout": 0.1,
    "batch_prioritized_routing": False,
    "bos_token_id": 0,
    "d_model": 16,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "decoder_layerdrop": 0,
    "decoder_layers": 4,
    "decoder_sparse_step": 4,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "encoder_layerdrop": 0,
    "encoder_layers": 4,
    "encoder_sparse_step": 4,
    "eos_token_id": 2,
    "expert_capacity": 64,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_length": 200,
    "max_position_embeddings": 1024,
    "model_type": "nllb-moe",
    "moe_eval_capacity_token_fraction": 1.0,
    "moe_token_dropout": 0.2,
    "normalize_router_prob_before_dropping": True,
    "num_experts": 4,
    "num_hidden_layers": 4,
    "output_router_logits": False,
    "pad_token_id": 1,
    "router_aux_loss_coef": 0.001,
    "router_bias": False,
    "router_dtype": "float32",
    "router_ignore_padding_tokens": False,
    "router_z_loss_coef": 0.001,
    "scale_embedding": True,
    "second_expert_policy": "all",
    "tokenizer_class": "NllbTokenizer",
    "torch_dtype": "float32",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 67,
}


def write_tokenizer(folder: Path, pieces: int = PIECES, languages: tuple[str, ...] = LANGUAGES) -> int:
    """A SentencePiece model of `pieces` pieces with NLLB's special tokens; returns the number of named rows."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 5), model_writer=model, vocab_size=pieces, model_type="bpe", minloglevel=2
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    tokens = {"additional_special_tokens": list(languages), "mask_token": "<mask>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    rows = dict(enumerate(("<s>", "<pad>", "</s>", "<unk>"))) | dict(enumerate((*languages, "<mask>"), pieces + 1))
    added = {row: {"content": token, "special": True} for row, token in rows.items()}
    config = {"tokenizer_class": "NllbTokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return pieces + 1 + len(languages) + 1


def pieces_of(folder: Path) -> list[str]:
    """The SentencePiece model's pieces without its three specials."""
    model = SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    return [model.id_to_piece(number) for number in range(3, len(model))]


def random_tensors(config: dict, seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by its name; the gates prefer some experts, so that routing is uneven."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in named_tensors(NllbConfig.from_hf(config, "config")):
        values = torch.randn(tensor.shape, generator=generator)
        if "layer_norm" in tensor.hf[0]:
            values = 1 + 0.1 * values if tensor.hf[0].endswith("weight") else 0.1 * values
        elif "router" in tensor.hf[0]:
            values = values * torch.linspace(0.2, 1.5, len(values)).unsqueeze(1)
        elif len(tensor.shape) == 2:
            values = values / tensor.shape[1] ** 0.5
        if tensor.rows:
            end = values[2]
        elif tensor.hf[0] == "model.decoder.layer_norm.bias":
            values += 3 * end  # so that some sentences end by themselves
        yield tensor.hf[0], values


def write_model(
    folder: Path, config: dict = TINY, shards: int = 3, kind: str = "safetensors", seed: int = 0, **changes
) -> dict[str, torch.Tensor]:
    """The whole folder as a download leaves it; returns its tensors. changes: of the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    named = write_tokenizer(folder)
    config = {"vocab_size": named + 2, **config, **changes}  # NLLB-200: three tags, the first where <mask> is
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(random_tensors(config, seed))
    keys = list(tensors)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        part = {key: tensors[key] for key in keys[number::shards]}
        save_file(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def write_hollow_model(folder: Path, config: dict) -> None:
    """A model of any size whose weights are all zeros in one file without blocks."""
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for tensor in named_tensors(NllbConfig.from_hf(config, "config")):
        end = offset + 4 * math.prod(tensor.shape)
        header[tensor.hf[0]] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_dictionary(file: Path, words: list[str]) -> Path:
    """A fairseq dict.txt."""
    file.write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")
    return file


def write_sentences(folder: Path, spm: Path, dictionary: Path, texts: dict[str, list[str]]) -> Path:
    """A data folder's test set as fairseq-preprocess leaves it: texts by language, encoded by the pieces of `spm`."""
    folder.mkdir(parents=True, exist_ok=True)
    model, words = SentencePieceProcessor(model_file=str(spm)), Dictionary.load(str(dictionary))
    pair = "-".join(texts)
    for language, lines in texts.items():
        builder = indexed_dataset.make_builder(str(folder / f"test.{pair}.{language}.bin"), "mmap", len(words))
        for line in lines:
            pieces = " ".join(model.encode(line, out_type=str))
            builder.add_item(words.encode_line(pieces, add_if_not_exist=False))
        builder.finalize(str(folder / f"test.{pair}.{language}.idx"))
    return folder


def transformers_environment(folder: Path) -> dict[str, str]:
    """The environment of processes that have transformers 4.57.6, which is put into `folder`; skips without it."""
    try:
        return environments.transformers_environment(environments.TRANSFORMERS_NLLB, folder=folder)
    except environments.EnvironmentMissing as error:
        pytest.skip(str(error))


def converted(folder: Path, target: Path, *arguments, **options) -> dict[str, torch.Tensor]:
    """What the converter makes of the folder, key -> tensor, read back from `target`."""
    done = convert_nllb(str(folder), str(target), *arguments, **options)
    state = read_checkpoint(str(done.files[0]))
    return {key: tensor.read() for key, tensor in state["model"].items()}
