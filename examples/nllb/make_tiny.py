"""A tiny NLLB in the formats of the real one: a trained SentencePiece model, random weights, sentences as FLORES's.

    python examples/nllb/make_tiny.py FOLDER

FOLDER/hf has config.json, two safetensors shards with their index and the tokenizer's files; FOLDER/flores the files
devtest.eng_Latn and devtest.deu_Latn, one sentence a line. The weights are random, so are the translations; a real
model in their place is translated by the same commands.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_moe_ext.atomic_file import new_file, write_bytes, write_json, write_text  # noqa: E402
from fairseq_moe_ext.nllb.config import NllbConfig  # noqa: E402
from fairseq_moe_ext.nllb.names import named_tensors  # noqa: E402

LANGUAGES = ("eng_Latn", "deu_Latn")
SENTENCES = {
    "eng_Latn": ("The train leaves at ten.", "We need two tickets to Berlin.", "It is raining today.", "Thank you!"),
    "deu_Latn": ("Der Zug fährt um zehn.", "Wir brauchen zwei Karten nach Berlin.", "Es regnet heute.", "Danke!"),
}
PIECES = 80
CONFIG = {
    "model_type": "nllb-moe",
    "vocab_size": PIECES + 1 + len(LANGUAGES) + 3,  # a pad, the languages, three tags
    "d_model": 64,
    **{f"{side}_{name}": value for side in ("encoder", "decoder")
       for name, value in (("layers", 4), ("ffn_dim", 128), ("attention_heads", 4), ("sparse_step", 4))},
    "num_experts": 16,
    "max_position_embeddings": 128,
    "moe_token_dropout": 0.2,
}


def main(folder: Path) -> None:
    hf, flores = folder / "hf", folder / "flores"
    for made in (hf, flores):
        made.mkdir(parents=True, exist_ok=True)
    for language, sentences in SENTENCES.items():
        write_text(flores / f"devtest.{language}", "".join(f"{line}\n" for line in sentences))
    model = io.BytesIO()
    lines = [line for sentences in SENTENCES.values() for line in sentences] * 5
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=PIECES, model_type="bpe", minloglevel=2
    )
    write_bytes(hf / "sentencepiece.bpe.model", model.getvalue())
    write_json(hf / "special_tokens_map.json", {"additional_special_tokens": LANGUAGES})
    write_json(hf / "config.json", CONFIG)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for tensor in named_tensors(NllbConfig.from_hf(CONFIG, "config")):
        scale = tensor.shape[-1] ** -0.5 if len(tensor.shape) == 2 else 0.1
        tensors[tensor.hf[0]] = torch.randn(tensor.shape, generator=generator) * scale
        if tensor.hf[0].endswith("layer_norm.weight"):
            tensors[tensor.hf[0]] += 1
    weight_map = {}
    for number in (0, 1):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        part = dict(list(tensors.items())[number::2])
        with new_file(hf / name) as file:
            save_file(part, file.name)
        weight_map |= dict.fromkeys(part, name)
    write_json(hf / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
