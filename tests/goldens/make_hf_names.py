"""Names and shapes of all tensors of NLLB models, and their config.json, as transformers itself writes them.

    PYTHONPATH=build/transformers-4.57.6 python tests/goldens/make_hf_names.py [hf_nllb.json]

build/transformers-4.57.6 is what the tests of the converter against transformers install (tests/hf_makers.py). Tiny
models with random weights are saved by `save_pretrained` and read again: model type -> config, tensors (name -> shape).
"""

import json
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbMoeModel,
)

SIZES = {"vocab_size": 67, "d_model": 16, "max_position_embeddings": 64}
SIZES |= {"encoder_layers": 3, "encoder_ffn_dim": 24, "encoder_attention_heads": 2}
SIZES |= {"decoder_layers": 4, "decoder_ffn_dim": 20, "decoder_attention_heads": 4}
EXPERTS = {"num_experts": 3, "encoder_sparse_step": 3, "decoder_sparse_step": 2}


def written(model) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            tensors = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        return {"config": json.loads((Path(folder) / "config.json").read_text()), "tensors": tensors}


def main(target: str) -> None:
    moe = NllbMoeConfig(**SIZES, **EXPERTS)
    goldens = {
        "nllb-moe": written(NllbMoeForConditionalGeneration(moe)),
        "nllb-moe without its head": written(NllbMoeModel(moe)),
        "m2m_100": written(M2M100ForConditionalGeneration(M2M100Config(**SIZES))),
    }
    Path(target).write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(Path(__file__).with_name("hf_nllb.json"))]))
