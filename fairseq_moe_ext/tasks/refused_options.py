"""Options of fairseq's commands that cannot take effect in one of them: each is refused by name, with the reason.

docs/options.md lists every option; tests/tasks/test_options_table.py holds it and this table together.
"""

from __future__ import annotations

from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fairseq_moe_ext.tasks.flag import flags_of
from fairseq_moe_ext.tasks.flags import MoEFlags

GENERATE, INTERACTIVE, EVAL_LM, VALIDATE, TRAIN = "generate", "interactive", "eval_lm", "validate", "train"
LM, MT, MULTI = "moe_language_modeling", "moe_translation", "moe_translation_multi_simple_epoch"
SERVING = (GENERATE, INTERACTIVE, EVAL_LM, VALIDATE)
TASKS = (LM, MT, MULTI)


@dataclass(frozen=True)
class Refusal:
    """`options` (their destinations) are refused by `commands` under `tasks`; `why` follows the option's name."""

    why: str
    options: tuple[str, ...]
    commands: tuple[str, ...] = SERVING
    tasks: tuple[str, ...] = TASKS


def _refuse(why: str, options: str, commands=SERVING, tasks=TASKS) -> Refusal:
    return Refusal(why, tuple(options.split()), commands, tasks)


REFUSALS = (
    _refuse(
        "is for training alone",
        "fp16_no_flatten_grads fp16_init_scale fp16_scale_window fp16_scale_tolerance on_cpu_convert_precision "
        "min_loss_scale threshold_loss_scale amp_batch_retries amp_init_scale amp_scale_window empty_cache_freq "
        "profile reset_logging suppress_crashes optimizer lr_scheduler force_anneal lr_shrink warmup_updates "
        "train_subset combine_valid_subsets ignore_unused_valid_subsets validate_interval validate_interval_updates "
        "validate_after_updates fixed_validation_seed disable_validation max_tokens_valid batch_size_valid "
        "max_valid_steps curriculum grouped_shuffling update_epoch_batch_itr update_ordered_indices_seed "
        "ddp_backend ddp_comm_hook bucket_cap_mb fix_batches_to_gpus find_unused_parameters gradient_as_bucket_view "
        "fast_stat_sync heartbeat_timeout broadcast_buffers slowmo_momentum slowmo_base_algorithm localsgd_frequency "
        "nprocs_per_node zero_sharding no_reshard_after_forward fp32_reduce_scatter cpu_offload use_sharded_state "
        "not_fsdp_flatten_parameters save_dir restore_file continue_once finetune_from_model reset_dataloader "
        "reset_lr_scheduler reset_meters reset_optimizer optimizer_overrides save_interval save_interval_updates "
        "keep_interval_updates keep_interval_updates_pattern keep_last_epochs keep_best_checkpoints no_save "
        "no_epoch_checkpoints no_last_checkpoints no_save_optimizer_state best_checkpoint_metric "
        "maximize_best_checkpoint_metric patience load_checkpoint_on_all_dp_ranks write_checkpoints_asynchronously",
    ),
    _refuse("is for training alone", "upsample_primary", tasks=(MT,)),
    _refuse("is for training alone, --fp16 and --moe-dtype serve in half precision", "amp"),
    _refuse(
        "is written in training alone",
        "log_file aim_repo aim_run_hash tensorboard_logdir wandb_project azureml_logging",
    ),
    _refuse("needs a store that fairseq-train alone starts", "use_plasma_view plasma_path"),
    _refuse("cannot be, the plugin serves on CPUs and GPUs", "tpu"),
    _refuse("is not the plugin's way to several GPUs, which is --distributed-world-size", "model_parallel_size"),
    _refuse("is for training alone, which quantises by it", "quantization_config_path"),
    _refuse(
        "is for models that are cut into pipelines, which the plugin's are not",
        "pipeline_model_parallel pipeline_balance pipeline_devices pipeline_chunks pipeline_encoder_balance "
        "pipeline_encoder_devices pipeline_decoder_balance pipeline_decoder_devices pipeline_checkpoint",
    ),
    _refuse("is torchrun's to say, by the environment", "distributed_rank"),
    _refuse("is read in evaluation alone, CUDA_VISIBLE_DEVICES chooses a GPU", "device_id", SERVING[:2]),
    _refuse("is for training and fairseq-validate", "criterion", SERVING[:3]),
    # generation
    _refuse("is for models of speech that decode twice", "beam_mt max_len_a_mt max_len_b_mt lenpen_mt"),
    _refuse("is for models of speech", "eos_token"),
    _refuse("is read by nothing in fairseq any more", "no_early_stop no_beamable_mm"),
    _refuse("is set by fairseq itself, from --seed", "no_seed_provided"),
    _refuse(
        "is for models that refine a whole translation, which the plugin has none of",
        "print_step iter_decode_eos_penalty iter_decode_max_iter iter_decode_force_max_iter iter_decode_with_beam "
        "iter_decode_with_external_reranker retain_iter_history decoding_format",
    ),
    _refuse("is for fairseq-interactive, whose lines have constraints", "constraints", (GENERATE,)),
    _refuse("is for moe_translation", "constraints", (INTERACTIVE,), (LM, MULTI)),
    _refuse("needs a source, which a language model has none of", "print_alignment replace_unk", SERVING[:2], (LM,)),
    _refuse("needs a source without language tokens", "replace_unk", (GENERATE,), (MULTI,)),
    _refuse("needs references", "score_reference prefix_size", (INTERACTIVE,)),
    _refuse("is the dictionary's to say", "pad eos unk"),
    _refuse("is not needed, a checkpoint's files are found without it", "checkpoint_shard_count", SERVING[:2]),
    _refuse("is the model's to say", "max_target_positions", SERVING, (LM,)),
    _refuse("is for references, lines come from --input", "max_target_positions", (INTERACTIVE,), (MT, MULTI)),
    _refuse("is for models that read the languages' ids, which a transformer does not", "enable_lang_ids"),
    _refuse("is for training alone, whose batches it fills up", "pad_to_fixed_bsz"),
    _refuse("leaves no room for language tokens", "truncate_source", SERVING, (MULTI,)),
    _refuse("is for fairseq-generate, which fuses models", "lm_path lm_weight", (INTERACTIVE,)),
    _refuse("is for fairseq-generate, which writes a file", "results_path", SERVING[1:]),
    _refuse("is for fairseq-generate, which can leave its lines out", "quiet", SERVING[1:]),
    _refuse("is for commands that make text", "bpe tokenizer scoring", SERVING[2:]),
    _refuse("is for commands that make text", "post_process keep_inference_langtok", (VALIDATE,)),
    # data
    _refuse("is for data sets, lines come from --input", "gen_subset num_shards shard_id dataset_impl", (INTERACTIVE,)),
    _refuse("is not how its data are named, which is --valid-subset", "gen_subset", (VALIDATE,)),
    _refuse("is for fairseq-generate and fairseq-eval-lm, which serve parts", "num_shards shard_id", (VALIDATE,)),
    _refuse("is for fairseq-train and fairseq-validate", "valid_subset", SERVING[:3]),
    _refuse("is for data sets in batches of a multiple", "required_batch_size_multiple", (INTERACTIVE, EVAL_LM)),
    _refuse("is for data sets of moe_translation", "required_seq_len_multiple", SERVING, (LM, MULTI)),
    _refuse("is for data sets of moe_translation", "required_seq_len_multiple", (INTERACTIVE,), (MT,)),
    _refuse(
        "is for data sets, lines come from --input",
        "sample_break_mode tokens_per_sample shorten_method shorten_data_split_list pad_to_fixed_length",
        (INTERACTIVE,),
        (LM,),
    ),
    _refuse("is for models that look both ways, a transformer predicts what comes next", "self_target past_target"),
    _refuse(
        "is for data sets, lines come from --input",
        "left_pad_source left_pad_target truncate_source num_batch_buckets",
        (INTERACTIVE,),
        (MT, MULTI),
    ),
    _refuse("is for criterions that learn alignments", "load_alignments", SERVING, (MT, MULTI)),
    _refuse(
        "is for validation, --scoring scores translations",
        "eval_bleu eval_bleu_args eval_bleu_detok eval_bleu_detok_args eval_tokenized_bleu eval_bleu_remove_bpe "
        "eval_bleu_print_samples",
        SERVING[:2],
        (MT,),
    ),
    # the plugin's flags
    _refuse("is for fairseq-generate", "continuous_batching", (INTERACTIVE, VALIDATE), (MT, MULTI)),
    _refuse("is for generation, which has other passes", "moe_capacity_phases", (EVAL_LM, VALIDATE)),
    _refuse(
        "is for serving",
        " ".join(item.name for item, rules in flags_of(MoEFlags) if not rules.training),
        (TRAIN,),
    ),
)


def why_refused(command: str, task: str, option: str) -> str | None:
    """Why `command` refuses the option (its destination) under the task; None where it does not."""
    for refusal in REFUSALS:
        if option in refusal.options and command in refusal.commands and task in refusal.tasks:
            return refusal.why
    return None


def is_given(parser: ArgumentParser, action: Action, args: Namespace) -> bool:
    """Whether the option has another value than it has without the user."""
    default = parser.get_default(action.dest)
    if default == SUPPRESS or not hasattr(args, action.dest):
        return False
    if isinstance(default, str):  # argparse reads it as it reads the user's
        default = parser._get_value(action, default)
    value = getattr(args, action.dest)
    return value != default and str(value) != str(default)


def given_options(parser: ArgumentParser, args: Namespace) -> dict[str, Action]:
    """Destination -> option, of all that the user gave a value of their own."""
    return {action.dest: action for action in parser._actions if is_given(parser, action, args)}


def written_options(parser: ArgumentParser, parse: Callable, words: Sequence[str] | None) -> frozenset[str]:
    """Destinations of all options that stand in `words` (None: the process's), be it with their default.

    parse: the parser's own `parse_known_args`, which has read them without an error.
    """
    unset = Namespace(**{action.dest: None for action in parser._actions if action.dest != SUPPRESS})
    found, _ = parse(words, unset)
    return frozenset(name for name, value in vars(found).items() if value is not None)


def flag_of(action: Action) -> str:
    """As the user writes it."""
    return next(name for name in [*action.option_strings, action.dest] if name.startswith("--") or name == action.dest)


def check_refused(command: str, task: str, given: dict[str, Action], args: Any) -> None:
    """ValueError naming the first given option that `command` refuses, the reason and the value."""
    for option, action in given.items():
        why = why_refused(command, task, option)
        if why is not None:
            got = f"{getattr(args, option)} in fairseq-{command.replace('_', '-')}"
            raise ValueError(f"{flag_of(action)} {why}, got {got}")
