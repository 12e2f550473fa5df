"""What another run says of every expert, as `fairseq-moe simulate --profile` takes it: of a trace or of a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fairseq_moe_ext.buffering.profile import load_profile
from fairseq_moe_ext.buffering.simulation import layers_of
from fairseq_moe_ext.trace import load_trace


def expert_scores(
    path: Path, languages: Sequence[str] | None, num_experts: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Layer -> (E,) float64 scores: of a trace (.npz) the tokens of each expert, of a profile (.json) its importance.

    languages: of a profile; a layer takes those of them that it had tokens of. None: all. num_experts: layer -> E of
    the run that is simulated. ValueError where the file is neither, or of another model, or the languages do not fit.
    """
    if path.suffix == ".json":
        profile = load_profile(path)
        found = {}
        for name in profile.layers:
            known = profile.languages_of(name)
            wanted = known if languages is None else [each for each in languages if each in known]
            if not wanted:
                raise ValueError(
                    f"--profile-languages must name one that {name} had tokens of, {', '.join(known)}, got "
                    f"{', '.join(languages or ()) or 'none'}"
                )
            found[name] = profile.of_languages(name, wanted)
    elif languages is not None:
        raise ValueError(f"--profile-languages must go with a --profile of fairseq-moe profile (.json), got {path}")
    else:
        found = {layer.name: layer.loads.sum(axis=0, dtype=np.float64) for layer in layers_of(load_trace(path))}
    for name, scores in found.items():
        if len(scores) != num_experts.get(name, len(scores)):
            raise ValueError(f"--profile must be of the trace's model, {name} has {len(scores)} experts there")
    return found


def by_score(scores: np.ndarray) -> list[int]:
    """All E experts, largest score first; equals by id."""
    return np.argsort(-scores, kind="stable").tolist()
