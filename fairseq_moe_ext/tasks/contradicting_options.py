"""Options of fairseq's commands that cannot take effect beside, or without, another one; refused by name."""

from __future__ import annotations

from argparse import Action, Namespace
from pathlib import Path
from typing import Any

from fairseq import utils
from fairseq.data.data_utils import infer_language_pair

from fairseq_moe_ext.decoding import option_rules
from fairseq_moe_ext.decoding.requests import NOT_OF_ONE_SENTENCE
from fairseq_moe_ext.option_names import as_option
from fairseq_moe_ext.tasks.dense_flags import check_dtype_flags
from fairseq_moe_ext.tasks.flags import check_static_capacity
from fairseq_moe_ext.tasks.refused_options import EVAL_LM, GENERATE, INTERACTIVE, MT, MULTI, flag_of

# an option -> the option without which it does nothing
NEEDS = {
    **option_rules.NEEDS,
    "lm_weight": "lm_path",
    "shorten_data_split_list": "shorten_method",
    "shard_id": "num_shards",
    "eval_bleu_args": "eval_bleu",
    "eval_bleu_detok": "eval_bleu",
    "eval_bleu_detok_args": "eval_bleu",
    "eval_tokenized_bleu": "eval_bleu",
    "eval_bleu_remove_bpe": "eval_bleu",
    "eval_bleu_print_samples": "eval_bleu",
}
# nothing is searched for where references are scored
_OF_SEARCH = (
    *option_rules.SEARCHES,
    *("nbest", "max_len_a", "max_len_b", "min_len", "unnormalized", "lenpen", "unkpen", "temperature"),
    *("prefix_size", "no_repeat_ngram_size", "lm_path", "replace_unk", "continuous_batching", "keep_inference_langtok"),
)
# two options of which one leaves the other without effect
EXCLUDES = (
    *option_rules.EXCLUDES,
    *((option, "score_reference") for option in _OF_SEARCH),
    ("replace_unk", "post_process"),  # words are aligned as the dictionary has them
    ("replace_unk", "constraints"),  # as print_alignment
    *((option, "continuous_batching") for option in (*NOT_OF_ONE_SENTENCE, "replace_unk")),
)


EVAL_LMS_BPE = "@@ "  # what fairseq-eval-lm can take away; by the name subword_nmt it takes nothing


def check_contradictions(command: str, task: str, given: dict[str, Action], args: Namespace) -> None:
    """ValueError naming the options, the rule and the values."""
    values = {option: getattr(args, option) for option in given}

    def name(option: str) -> str:
        return flag_of(given[option]) if option in given else as_option(option)

    option_rules.check_values(values, name)
    option_rules.check_pairs(values, name, NEEDS, EXCLUDES)
    if command in (GENERATE, INTERACTIVE):
        option_rules.check_beams(args, name)
    _check_values(args)
    if command == INTERACTIVE and getattr(args, "print_alignment", None) == "soft":
        raise ValueError("--print-alignment must be hard in fairseq-interactive, got soft")
    if task == MULTI and getattr(args, "dataset_impl", None) == "raw":
        raise ValueError(f"--dataset-impl must not be raw with {MULTI}, which counts the files of binary data")
    if command == EVAL_LM and args.post_process not in (None, "subword_nmt", EVAL_LMS_BPE):
        raise ValueError(f"--post-process must be subword_nmt in fairseq-eval-lm, got {args.post_process}")
    check_dtype_flags(args)
    check_static_capacity(args)
    if command == GENERATE and task in (MT, MULTI):
        for option in ("prefix_size", "score_reference"):
            if option in given:
                _check_references(flag_of(given[option]), getattr(args, option), args)


def _check_values(args: Any) -> None:
    shards, shard = getattr(args, "num_shards", 1), getattr(args, "shard_id", 0)
    if not 0 <= shard < shards:
        raise ValueError(f"--shard-id must be at least 0 and below --num-shards, got {shard} and {shards}")
    suffix = getattr(args, "checkpoint_suffix", None)
    for path in utils.split_paths(getattr(args, "path", None) or "") if suffix else ():
        if ".pt" not in path:
            raise ValueError(f"--checkpoint-suffix needs a checkpoint X.pt, got {suffix} with --path {path}")
    window, tokens = getattr(args, "context_window", 0), getattr(args, "tokens_per_sample", None)
    if window > 0 and tokens is not None and window >= tokens:
        raise ValueError(f"--context-window must be below --tokens-per-sample, got {window} and {tokens}")
    buckets, sentences = getattr(args, "num_batch_buckets", 0), getattr(args, "batch_size", None)
    if buckets > 0 and sentences is not None and args.max_tokens is None:
        raise ValueError(
            f"--num-batch-buckets needs --max-tokens beside --batch-size, got {buckets} without it: the batches of a "
            "bucket are as long as it"
        )
    pairs = getattr(args, "lang_pairs", None)
    for pair in pairs.split(",") if isinstance(pairs, str) else pairs or ():
        if not all(pair.partition("-")[::2]):
            raise ValueError(f"--lang-pairs must be pairs as en-de, or an existing file that has them, got {pairs!r}")


def _check_references(flag: str, value: Any, args: Any) -> None:
    """fairseq reads a split without references, too, and dies in its first batch of what asks for them."""
    folder = (utils.split_paths(args.data) or [""])[0]
    source, target = getattr(args, "source_lang", None), getattr(args, "target_lang", None)
    if (source is None or target is None) and Path(folder).is_dir():
        source, target = infer_language_pair(folder)
    for pair in (f"{source}-{target}", f"{target}-{source}"):
        start = f"{args.gen_subset}.{pair}"
        if any(Path(folder).glob(f"{start}.{source}*")) and not any(Path(folder).glob(f"{start}.{target}*")):
            raise ValueError(
                f"{flag} needs references, got {value} with --gen-subset {args.gen_subset}, of which {folder} has no "
                f"{start}.{target}"
            )
