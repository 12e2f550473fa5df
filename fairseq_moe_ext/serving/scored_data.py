"""Texts to be scored as the data set that fairseq's commands would read them from.

A translation is scored as by `fairseq-generate --score-reference`, a language model's text by itself, as by
`fairseq-eval-lm --sample-break-mode eos`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from fairseq.data import LanguagePairDataset, ListDataset, MonolingualDataset, TokenBlockDataset
from torch import Tensor


def pairs(task: Any, sources: list[Tensor], targets: list[Tensor]) -> LanguagePairDataset:
    """Of one of the translation tasks; sources, targets: tokens with their ends."""
    data = [ListDataset(tokens, np.array([len(each) for each in tokens])) for tokens in (sources, targets)]
    manager, flags = getattr(task, "data_manager", None), getattr(task, "args", None)
    languages = specs = ()
    if manager is not None:
        languages, specs = (flags.source_lang, flags.target_lang), flags.langtoks["main"]
        # where language tokens replace the ends, these leave the data as they are
        data[0] = manager.src_dataset_tranform_func(*languages, data[0], specs[0])
        data[1] = manager.tgt_dataset_tranform_func(*languages, data[1], specs[1])
    source, target = data
    dictionaries = task.source_dictionary, task.target_dictionary
    dataset = LanguagePairDataset(
        source,
        source.sizes,
        dictionaries[0],
        target,
        target.sizes,
        dictionaries[1],
        shuffle=manager is not None,  # as fairseq's two tasks order a test set before they sort it by length
    )
    if manager is None or not flags.lang_tok_replacing_bos_eos:
        return dataset
    source_end, target_end = (dictionary.eos() for dictionary in dictionaries)
    return manager.alter_dataset_langtok(dataset, source_end, languages[0], target_end, languages[1], *specs)


def blocks(task: Any, texts: list[Tensor]) -> MonolingualDataset:
    """Of the language modeling task: every text a block."""
    sizes = np.array([len(each) for each in texts])
    dictionary = task.source_dictionary
    each_text = TokenBlockDataset(
        ListDataset(texts, sizes),
        sizes,
        block_size=None,
        pad=dictionary.pad(),
        eos=dictionary.eos(),
        break_mode="eos",
        include_targets=True,
    )
    return MonolingualDataset(
        each_text,
        each_text.sizes,
        dictionary,
        task.target_dictionary,
        add_eos_for_other_targets=True,
        shuffle=True,
        targets=task.targets,
        add_bos_token=task.args.add_bos_token,
        # as upstream's evaluation, where the padding of a block counts
        fixed_pad_length=task.args.tokens_per_sample if task.static_serving else None,
    )
