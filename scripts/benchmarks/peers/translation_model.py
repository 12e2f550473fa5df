"""A random model of NLLB's kind in both layouts: FOLDER/model.pt, dictionaries, FOLDER/hf. A process of its own.

    python translation_model.py FOLDER SEED WORDS

8 + 8 layers, every fourth with 64 experts as NLLB-200 has them in every fourth. What is there already stays.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from fairseq_moe_ext.atomic_file import new_file  # noqa: E402
from fairseq_moe_ext.models.moe_transformer import MoETransformerModel  # noqa: E402

SIDE = {"layers": 8, "embed_dim": 256, "ffn_embed_dim": 1024, "attention_heads": 8}
FIELDS = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
FIELDS |= {"moe_expert_count": 64, "moe_freq": 4}
PAIR = ("en", "de")


class Vocabulary:
    """What a model asks of its task."""

    def __init__(self, words: int):
        self.source_dictionary = self.target_dictionary = Dictionary()
        for number in range(words - len(self.source_dictionary)):
            self.source_dictionary.add_symbol(f"w{number}")


def write_model(folder: Path, seed: int, words: int) -> None:
    torch.manual_seed(seed)
    args, vocabulary = Namespace(arch="moe_transformer", task="translation", **FIELDS), Vocabulary(words)
    ARCH_CONFIG_REGISTRY["moe_transformer_nllb_54b"](args)
    model = MoETransformerModel.build_model(args, vocabulary)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("wg.weight"):  # else a random gate hardly tells tokens apart
                values.normal_()
    for language in PAIR:
        with new_file(folder / f"dict.{language}.txt", text=True) as file:
            vocabulary.source_dictionary.save(file)
    history = [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}]
    content = {"args": args, "cfg": None, "criterion": None, "model": model.state_dict(), "optimizer_history": history}
    with new_file(folder / "model.pt") as file:
        torch.save({**content, "task_state": {}, "extra_state": {}}, file)
    command = [sys.executable, str(ROOT / "scripts" / "convert_nllb_moe.py"), str(folder / "model.pt"), "--to-hf"]
    subprocess.run([*command, "--output", str(folder / "hf")], check=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not target.is_dir():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(partial, int(sys.argv[2]), int(sys.argv[3]))
        partial.rename(target)
