"""Cut the small recordings in this folder out of the large ones in ../shared/goldens: copies, nothing recomputed.

    python tests/goldens/make_goldens.py [folder of recordings] [folder to write to]

Source: fairseq's own branches `moe` (ebea0072) and `nllb` (ec0ae71a), trained and scored on a CPU in float32; each
recording is of one MoE layer on the first test batch. What is kept of each:

    lm_top1   decoder layer 3, top-1, 8 rows of 128 tokens at fraction 0.05: the first 512 tokens' gate logits and
              combine weights. (First choices queue in order of arrival, so the later tokens have no say in them.)
    mt_plain  encoder layer 1, top-2, normalised before dropping, 8 padded rows at fraction 0.1, padding masked: every
              token's gate logits and combine weights.
    mt_nllb   decoder layer 1 of mt_nllb_ws2, top-2, normalised after dropping, the same otherwise: likewise.

lm_top1 and mt_plain also hold some tokens' inputs and outputs, with the gate and with those experts that these tokens
went to; of the experts' second matrix and of the outputs, the first 8 features alone, for size.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
FEATURES = 8  # of the outputs that are kept
TOKENS = 10  # whose inputs and outputs are kept


@dataclass(frozen=True)
class Source:
    """A recording; `tokens` None keeps all tokens' routing, `experts` 0 keeps no inputs, outputs and weights."""

    folder: str
    recording: str
    module: str
    tokens: int | None
    experts: int


SOURCES = {
    "lm_top1": Source("lm_top1", "eval_b8_cap0.05", "decoder.layers.3.moe_layer", 512, 1),
    "mt_plain": Source("mt_plain", "tf_en-de_cap0.1_b8_padmask_moe", "encoder.layers.1.moe_layer", None, 2),
    "mt_nllb": Source("mt_nllb_ws2", "tf_en-de_cap0.1_b8_padmask_moe", "decoder.layers.1.moe_layer", None, 0),
}


def extract(recordings: Path, source: Source) -> dict[str, np.ndarray]:
    """The arrays of one small recording."""
    with np.load(recordings / source.folder / "golden" / f"{source.recording}.npz") as file:
        prefix = f"moe/{source.module}/"
        layer = {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}
    number = source.tokens or len(layer["gate_logits"])
    chosen = layer["cw_idx"][:, 0] < number
    arrays = {
        "gate_logits": layer["gate_logits"][:number],
        "capacity": layer["cw_shape"][2],
        "cw_idx": layer["cw_idx"][chosen].astype(np.int16),
        "cw_val": layer["cw_val"][chosen],
    }
    if "mask" in layer:
        arrays["mask"] = layer["mask"][:number]
    if source.experts:
        experts, tokens = pick(arrays["cw_idx"], number, layer["gate_logits"].shape[1], source.experts)
        arrays["tokens"], arrays["experts"] = tokens, experts
        arrays["in"] = layer["in"].reshape(-1, layer["in"].shape[-1])[tokens]
        arrays["out"] = layer["out"].reshape(-1, layer["out"].shape[-1])[tokens][:, :FEATURES]
        arrays.update(read_weights(recordings / source.folder, source.module, experts))
    return arrays


def pick(cw_idx: np.ndarray, number: int, num_experts: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The `size` experts that keep most tokens to themselves; some of these tokens, and one that was dropped."""
    visited: list[set[int]] = [set() for _ in range(number)]
    for token, expert, _ in cw_idx.tolist():
        visited[token].add(expert)
    experts = max(combinations(range(num_experts), size), key=lambda group: visited.count(set(group)))
    tokens = [token for token in range(number) if visited[token] == set(experts)][: TOKENS - 3]
    tokens += [token for token in range(number) if len(visited[token]) == 1 and visited[token] < set(experts)][:2]
    tokens.append(visited.index(set()))
    return np.array(experts), np.array(sorted(tokens))


def read_weights(folder: Path, module: str, experts: np.ndarray) -> dict[str, np.ndarray]:
    """The gate's and these experts' weights, (X, F, D), (X, F), (X, 8, F), (X, 8)."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        shared = torch.load(folder / "checkpoint_last-shared.pt", map_location="cpu", weights_only=True)["model"]
        rank = torch.load(folder / "checkpoint_last-rank-0.pt", map_location="cpu", weights_only=True)["model"]

    def stack(name: str) -> np.ndarray:
        return np.stack([rank[f"{module}.experts.{expert}.{name}"].numpy() for expert in experts])

    return {
        "wg": shared[f"{module}.gate.wg.weight"].numpy(),
        "fc1_weight": stack("fc1.weight"),
        "fc1_bias": stack("fc1.bias"),
        "fc2_weight": stack("fc2.weight")[:, :FEATURES],
        "fc2_bias": stack("fc2.bias")[:, :FEATURES],
    }


def main() -> None:
    recordings = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[2] / "shared" / "goldens"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE
    for name, source in SOURCES.items():
        np.savez_compressed(target / f"{name}.npz", **extract(recordings, source))
        print(f"{target / name}.npz: {(target / name).with_suffix('.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
