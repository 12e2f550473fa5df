"""A run of every option that works: what it is given, and beside what; the run must differ from the same without it."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq_moe_ext.tasks.refused_options import MULTI

FOLDER = "{folder}"  # of the task's data and model


@dataclass(frozen=True)
class Example:
    """flags: with the option. beside: flags of both runs. task: whose run it is; None: the first that has it."""

    flags: tuple
    beside: tuple = ()
    task: str | None = None
    fails: bool = False  # whether the run without it is an error


def _of(flags: str, beside: str = "", task: str | None = None, fails: bool = False) -> Example:
    return Example(tuple(flags.split()), tuple(beside.split()), task, fails)


_SKIP = "--skip-invalid-size-inputs-valid-test"
_SAMPLING = "--sampling --nbest 2"
_GROUPS = "--nbest 2 --diverse-beam-groups 2"
_STATIC = "--moe-gating static --moe-eval-capacity-token-fraction 0.1"
_SHORT = "--shorten-method truncate --tokens-per-sample 4"
_CAPACITY = "--moe-capacity-factor 0.5"
_BUFFER = "--expert-buffer-size 2"
EXAMPLES = {
    "--path": _of("--path missing.pt"),
    "--task": _of("--task language_modeling"),
    "--seed": Example(("--seed", "5"), ("--model-overrides", "{'moe_second_expert_policy': 'sampling'}")),
    "--fp16": _of("--fp16"),
    "--memory-efficient-fp16": _of("--memory-efficient-fp16"),
    "--bpe": _of(f"--bpe sentencepiece --sentencepiece-model {FOLDER}/pieces.model"),
    "--tokenizer": _of("--tokenizer moses"),  # asks for a package that is not there
    "--scoring": _of("--scoring sacrebleu"),
    # data
    "--skip-invalid-size-inputs-valid-test": _of(_SKIP, "--max-source-positions 8", fails=True),
    "--max-tokens": _of("--max-tokens 12"),
    "--batch-size": _of("--batch-size 2"),
    "--required-batch-size-multiple": _of("--required-batch-size-multiple 4", "--batch-size 5"),
    "--required-seq-len-multiple": _of("--required-seq-len-multiple 16", "--moe-gating static"),
    "--dataset-impl": _of("--dataset-impl cached"),
    "--gen-subset": _of("--gen-subset valid"),
    "--num-shards": _of("--num-shards 2", "--batch-size 2"),
    "--shard-id": _of("--shard-id 1", "--num-shards 2 --batch-size 2"),
    "--max-source-positions": _of("--max-source-positions 3"),
    "--max-target-positions": _of("--max-target-positions 3"),
    "--left-pad-source": _of("--left-pad-source False", task=MULTI),
    "--left-pad-target": _of("--left-pad-target True", "--prefix-size 4 --batch-size 6", MULTI),
    "--truncate-source": _of("--truncate-source --max-source-positions 5"),
    "--num-batch-buckets": _of("--num-batch-buckets 2", f"{_STATIC} --batch-size 2 --max-tokens 99"),
    "--sample-break-mode": _of("--sample-break-mode complete"),
    "--tokens-per-sample": _of("--tokens-per-sample 10", "--sample-break-mode complete"),
    "--output-dictionary-size": _of("--output-dictionary-size 20"),
    "--future-target": _of("--future-target"),
    "--add-bos-token": _of("--add-bos-token"),
    "--shorten-method": _of(_SHORT, "--tokens-per-sample 4"),
    "--shorten-data-split-list": _of("--shorten-data-split-list valid", _SHORT),
    # what is printed
    "--post-process": _of("--post-process sentencepiece"),
    "--quiet": _of("--quiet"),
    "--model-overrides": Example(("--model-overrides", "{'moe_eom': 0.5}")),
    "--results-path": _of(f"--results-path {FOLDER}/results"),
    "--sacrebleu": _of("--sacrebleu"),
    "--keep-inference-langtok": _of("--keep-inference-langtok"),
    # generation
    "--beam": _of("--beam 3"),
    "--nbest": _of("--nbest 2"),
    "--max-len-a": _of("--max-len-a 0.7"),
    "--max-len-b": _of("--max-len-b 9"),
    "--match-source-len": _of("--match-source-len --max-len-b 200"),
    "--unnormalized": _of("--unnormalized"),
    "--lenpen": _of("--lenpen -3"),
    "--unkpen": _of("--unkpen -30"),
    "--replace-unk": _of("--replace-unk", "--unkpen -30 --dataset-impl raw --gen-subset raw"),
    "--score-reference": _of("--score-reference --max-len-b 200"),
    "--prefix-size": _of("--prefix-size 2"),
    "--no-repeat-ngram-size": _of("--no-repeat-ngram-size 2"),
    "--sampling": _of(_SAMPLING),
    "--sampling-topk": _of("--sampling-topk 2", _SAMPLING),
    "--sampling-topp": _of("--sampling-topp 0.3", _SAMPLING),
    "--constraints": _of("--constraints", f"--input {FOLDER}/constrained"),
    "--temperature": _of("--temperature 3"),
    "--diverse-beam-groups": _of("--diverse-beam-groups 2", "--nbest 2"),
    "--diverse-beam-strength": _of("--diverse-beam-strength 9", _GROUPS),
    "--diversity-rate": _of("--diversity-rate 0.7"),
    "--print-alignment": _of("--print-alignment"),
    "--lm-path": _of(f"--lm-path {FOLDER}/LM.pt --lm-weight 0.5"),
    "--lm-weight": _of("--lm-weight 0.5", f"--lm-path {FOLDER}/LM.pt"),
    "--retain-dropout": _of("--retain-dropout"),
    "--retain-dropout-modules": _of("--retain-dropout-modules MoETransformerDecoder", "--retain-dropout"),
    "--checkpoint-suffix": _of("--checkpoint-suffix=-other"),
    # languages
    "--source-lang": _of("-s de"),
    "--target-lang": _of("-t en"),
    "--lang-pairs": _of("--lang-pairs fr"),
    "--langs": _of("--langs en,de,fr"),
    "--lang-dict": _of(f"--lang-dict {FOLDER}/data/langs.txt"),
    "--source-dict": _of(f"--source-dict {FOLDER}/data/other.txt"),
    "--target-dict": _of(f"--target-dict {FOLDER}/data/other.txt"),
    "--fixed-dictionary": _of(f"--fixed-dictionary {FOLDER}/data/other.txt"),
    "--lang-tok-style": _of("--lang-tok-style mbart"),
    "--encoder-langtok": _of("--encoder-langtok tgt"),
    "--lang-tok-replacing-bos-eos": _of("--lang-tok-replacing-bos-eos"),
    "--langtoks-specs": _of("--langtoks-specs main,mined"),
    "--langtoks": Example(("--langtoks", '{"main": ("tgt", "tgt")}')),
    "--extra-data": Example(("--extra-data", '{"mono_dae": "x"}')),
    "--add-data-source-prefix-tags": _of("--add-data-source-prefix-tags"),
    "--add-ssl-task-tokens": Example(
        ("--add-ssl-task-tokens",), ("--finetune-dict-specs", "{'mono_dae': ''}"), None, True
    ),
    "--finetune-dict-specs": Example(("--finetune-dict-specs", "{'mono_dae': ''}")),
    # lines, language models
    "--buffer-size": _of("--buffer-size 1 --batch-size 1"),
    "--input": _of(f"--input {FOLDER}/constrained"),
    "--output-word-probs": _of("--output-word-probs"),
    "--output-word-stats": _of("--output-word-stats"),
    "--context-window": _of("--context-window 4"),
    # the plugin's
    "--expert-buffer-size": _of(_BUFFER),
    "--expert-buffer-scope": _of("--expert-buffer-scope encoder", _BUFFER),
    "--expert-eviction": _of("--expert-eviction lifo", f"{_BUFFER} --batch-size 1"),
    "--expert-order": _of("--expert-order ascending", f"{_BUFFER} --batch-size 1"),
    "--expert-store": _of("--expert-store disk", _BUFFER),
    "--moe-capacity-factor": _of(_CAPACITY),
    "--moe-overflow": _of("--moe-overflow reroute", _CAPACITY),
    "--moe-drop-metric": _of("--moe-drop-metric order", _CAPACITY),
    "--moe-capacity-scope": _of("--moe-capacity-scope rank", f"{_CAPACITY} --moe-virtual-ranks 2"),
    "--moe-capacity-phases": _of("--moe-capacity-phases prefill", _CAPACITY),
    "--moe-renormalize-after-drop": _of("--moe-renormalize-after-drop", _CAPACITY),
    "--moe-virtual-ranks": _of("--moe-virtual-ranks 2", _CAPACITY),
    "--moe-reroute-prefer": _of(
        "--moe-reroute-prefer resident", f"--moe-capacity-factor 1.2 --moe-overflow reroute {_BUFFER}"
    ),
    "--moe-gating": _of("--moe-gating static"),
    "--moe-eval-capacity-token-fraction": _of("--moe-eval-capacity-token-fraction 0.05", "--moe-gating static"),
    "--moe-dtype": _of("--moe-dtype bfloat16"),
    "--moe-weights": _of("--moe-weights int4"),
    "--expert-keep": _of(f"--expert-keep {FOLDER}/experts.json"),
    "--moe-second-choice-threshold": _of("--moe-second-choice-threshold 0.45"),
    "--moe-report-weight-error": _of("--moe-report-weight-error 4", "--moe-weights int4"),
    "--moe-weights-scope": _of("--moe-weights int8 --moe-weights-scope all"),
}
# what a command needs instead
OF_EVAL_LM = {"--post-process": _of("--post-process subword_nmt"), _SKIP: None, "--expert-eviction": None}
OF_INTERACTIVE = {
    "--replace-unk": _of("--replace-unk", "--unkpen -30"),
    _SKIP: _of(_SKIP, "--max-source-positions 4", fails=True),
}
_BLEU = "--eval-bleu --eval-bleu-print-samples"
OF_VALIDATE = {
    "--log-format": _of("--log-format json"),
    "--valid-subset": _of("--valid-subset test"),
    "--fixed-dictionary": _of(f"--fixed-dictionary {FOLDER}/data/langs.txt"),
    "--shorten-data-split-list": _of("--shorten-data-split-list test", _SHORT),
    "--left-pad-source": None,  # changes the last bits of a loss at most, and on some CPUs not these
    "--left-pad-target": None,
    "--criterion": _of("--criterion label_smoothed_cross_entropy"),
    "--eval-bleu": _of("--eval-bleu"),
    "--eval-bleu-args": _of('--eval-bleu-args {"beam":1}', _BLEU),
    "--eval-bleu-detok": _of("--eval-bleu-detok moses", _BLEU),  # asks for a package that is not there
    "--eval-bleu-detok-args": _of("--eval-bleu-detok-args {", _BLEU),
    "--eval-bleu-print-samples": _of("--eval-bleu-print-samples", "--eval-bleu"),
    "--eval-bleu-remove-bpe": _of("--eval-bleu-remove-bpe sentencepiece", _BLEU),
    "--eval-tokenized-bleu": _of("--eval-tokenized-bleu", _BLEU),
}
# an option whose effect other tests hold -> the file that has it
ELSEWHERE = {
    "--left-pad-source": "tests/tasks/test_padding_side.py",
    "--left-pad-target": "tests/tasks/test_padding_side.py",
    _SKIP: "tests/decoding/test_left_out.py",
    "--min-len": "tests/decoding/test_options.py",
    "--expert-eviction": "tests/serving/test_expert_buffer.py",
    "data": "tests/commands.py",
    "--user-dir": "tests/test_options_commands.py",
    "--cpu": "tests/tasks/test_options_table.py",
    "--device-id": "tests/tasks/test_options_table.py",
    "--distributed-world-size": "tests/ranks/test_ranks_commands.py",
    "--decoder-langtok": "tests/tasks/test_options_table.py",
    "--expert-store-dir": "tests/serving/test_buffer_stores.py",
    "--expert-host-memory": "tests/tasks/test_command_check.py",
    "--expert-prefetch": "tests/serving/test_expert_buffer.py",
    "--expert-profile": "tests/serving/test_expert_buffer.py",
    "--moe-kernel": "tests/serving/test_kernels.py",
    "--moe-report": "tests/test_commands.py",
    "--moe-trace": "tests/reporting/test_report.py",
    "--moe-record": "tests/reporting/test_recorder.py",
    "--expert-placement": "tests/ranks/test_ranks_commands.py",
    "--continuous-batching": "tests/decoding/test_continuous_batching.py",
}
