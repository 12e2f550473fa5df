"""Train the tiny models of this folder with upstream's own code, and record what upstream's own code says of them.

Each becomes an archive, NAME.tar.xz: the checkpoint's files and the data as upstream wrote them, and the recordings.

    python tests/goldens/make_tiny_models.py BRANCH CHECKOUT [--record-only] [--models NAME ...]

BRANCH is `moe` (fairseq ebea0072: tiny_lm_top2, tiny_lm_top1, tiny_mt) or `nllb` (fairseq ec0ae71a: tiny_nllb) and
CHECKOUT a checkout of it, whose extensions are built in place. Runs in upstream's environment: Python 3.9, PyTorch
1.12.1, sacrebleu 1.5.1, omegaconf 2.0.6 and hydra-core 1.0.7 for `moe`, 2.2.2 and 1.2.0 for `nllb`, on a CPU in
float32. This plugin is not imported. `--record-only` keeps the checkpoints and the data that are here and records anew;
training elsewhere gives other weights.

Nothing of upstream's is changed but two things that fail: torch.histc, which its gates call for what they log, gets
floats, as PyTorch has no histogram of integers on a CPU; SequenceScorer passes over an option that branch `moe`'s
tasks hand to it and it lacks. Upstream's commands (preprocess, train, eval_lm, generate) do the work; hooks on the
modules and on SequenceScorer.generate take down what passes. As upstream's generate reads the experts of one process
from one file only, it is given both files of a model merged, by upstream's own loader.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
HISTOGRAMS = """
import torch
histc = torch.histc
torch.histc = lambda tensor, **options: histc(tensor.float(), **options)
"""
WORDS = 24
TRAINING = (
    "--optimizer adam --adam-betas (0.9,0.98) --lr 0.01 --lr-scheduler inverse_sqrt --warmup-updates 40 --seed 1 "
    "--batch-size-valid 16 --num-workers 0 --cpu --no-epoch-checkpoints --no-save-optimizer-state --log-format simple "
    "--log-interval 100 --disable-validation --ddp-backend legacy_ddp --distributed-world-size 1 "
    "--distributed-backend gloo --distributed-init-method env:// --distributed-no-spawn"
).split()
MOE = (
    "--moe-freq 2 --moe-expert-count 4 --moe-gating-use-fp32 --moe-second-expert-policy all "
    "--moe-normalize-expert-grad sqrt_world_size --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum"
).split()
LM = (
    "--task language_modeling --arch transformer_lm_gpt --tokens-per-sample 16 --decoder-layers 2 "
    "--decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --dropout 0.0 "
    "--attention-dropout 0.0 --criterion moe_cross_entropy --moe-eval-capacity-token-fraction -1.0 --max-update 200 "
    "--batch-size 16"
).split()
MT = (
    "--arch transformer --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 24 --decoder-ffn-embed-dim 24 --encoder-attention-heads 2 --decoder-attention-heads 2 "
    "--max-source-positions 32 --max-target-positions 32 --dropout 0.0 --use-moe-pad-mask "
    "--moe-eval-capacity-token-fraction 1.0 --max-update 300 --max-tokens 256 "
    "--criterion moe_cross_entropy"
).split()
PAIR = ["--task", "translation", "-s", "en", "-t", "de"]
BEFORE = ["--moe-normalize-gate-prob-before-dropping"]
NLLB_TASK = (
    "--task translation_multi_simple_epoch --langs en,de,fr --lang-pairs en-de,en-fr --encoder-langtok src "
    "--decoder-langtok"
).split()
NLLB = (
    "--share-all-embeddings --encoder-normalize-before --decoder-normalize-before --moe-eom 0.2 "
    "--sampling-method temperature --sampling-temperature 1.0"
).split()
TRAINED = {
    "moe": {
        "tiny_lm_top2": [*LM, *MOE, *TRAINING],
        "tiny_lm_top1": [*LM, *MOE, *TRAINING, "--moe-top1-expert"],
        "tiny_mt": [*PAIR, *MT, *MOE, *TRAINING, *BEFORE],
    },
    "nllb": {"tiny_nllb": [*NLLB_TASK, *MT, *NLLB, *MOE, *TRAINING]},
}
EOS = ["--sample-break-mode", "eos"]
PADDED = {"use_moe_pad_mask": True}
# model -> recording -> (rows of a batch, fraction, overrides, flags)
EVALUATED = {
    "tiny_lm_top2": {
        "eval_b8_cap1.0": (8, 1.0, {}, []),
        "eval_b8_cap-1.0": (8, -1.0, {}, []),
        "eval_b8_cap0.25": (8, 0.25, {}, []),
        "eval_b8_cap0.25_bpr": (8, 0.25, {"moe_batch_prioritized_routing": True}, []),
        "eval_b8_cap0.25_normbefore": (8, 0.25, {"moe_normalize_gate_prob_before_dropping": True}, []),
        "eval_eos_b8_cap0.25": (8, 0.25, {}, EOS),
        "eval_eos_b8_cap0.25_padmask": (8, 0.25, PADDED, EOS),
    },
    "tiny_lm_top1": {
        "eval_b8_cap1.0": (8, 1.0, {}, []),
        "eval_b8_cap-1.0": (8, -1.0, {}, []),
        "eval_b8_cap0.1": (8, 0.1, {}, []),
    },
}
# model -> recording -> (rows of a batch, fraction, overrides)
SCORED = {
    "tiny_mt": {"tf_en-de_cap1.0_b8_padmask": (8, 1.0, PADDED), "tf_en-de_cap0.2_b8_padmask": (8, 0.2, PADDED)},
    "tiny_nllb": {
        "tf_en-de_cap1.0_b8_nopadmask": (8, 1.0, {"use_moe_pad_mask": False}),
        "tf_en-de_cap0.2_b8_padmask": (8, 0.2, PADDED),
        "tf_en-fr_cap1.0_b8_nopadmask": (8, 1.0, {"use_moe_pad_mask": False}),
    },
}
WITH_LAYERS = {"eval_b8_cap0.25", "eval_b8_cap0.1", "tf_en-de_cap0.2_b8_padmask"}  # of the first batch
SEARCH = ["--beam", "4", "--nbest", "2", "--scoring", "sacrebleu"]
KEPT = ("S-", "T-", "H-", "D-", "P-", "Generate test")
GENERATED = {"tiny_mt": ["de"], "tiny_nllb": ["de", "fr"]}


def write_text(folder: Path, languages: list[str], split: str, number: int) -> None:
    """A topic of five words per sentence, walked at random; another language says the words' twins backwards."""
    draw = random.Random(f"{split} of {languages}")
    lines = []
    for _ in range(number):
        topic, word, line = draw.randrange(0, WORDS, 4), 0, []
        for _ in range(draw.randint(3, 11)):
            word = (word + draw.choice((1, 1, 1, 2))) % 5
            line.append((topic + word) % WORDS)
        lines.append(line)
    for side, language in enumerate(languages or [""]):
        name = f"{split}.{'-'.join(languages)}.{language}" if languages else split
        with open(folder / name, "w") as file:
            for line in lines:
                words = reversed(line) if side else line
                file.write(" ".join(f"{(language or 'w')[0]}{word}" for word in words) + "\n")


def preprocess(scratch: Path, target: Path, languages: list[str], *flags: str) -> None:
    """Binarize train and test by upstream's preprocess; only the tests' part is kept here."""
    text, binary = scratch / "text", scratch / "data-bin"
    text.mkdir(exist_ok=True)
    for split, number in (("train", 600), ("test", 40)):
        write_text(text, languages, split, number)
    pair = f".{'-'.join(languages)}" if languages else ""
    command = ["--trainpref", text / f"train{pair}", "--destdir", binary, *flags]
    command += ["--validpref", text / f"test{pair}", "--testpref", text / f"test{pair}"]
    if languages:
        command += ["-s", languages[0], "-t", languages[1]]
    run("preprocess", *command, cwd=scratch)
    (target / "data-bin").mkdir(parents=True, exist_ok=True)
    for file in [*binary.glob("dict.*"), *binary.glob("test*")]:
        shutil.copy(file, target / "data-bin")


def run(command: str, *arguments: object, cwd: Path) -> None:
    """One of upstream's commands, in a process of its own."""
    print("fairseq", command, *arguments, flush=True)
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    one_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    program = f"{HISTOGRAMS}from fairseq_cli.{command} import cli_main; cli_main()"
    arguments = [str(each) for each in arguments]
    environment = {**os.environ, **one_rank} if command == "train" else os.environ
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=cwd, env=environment, check=True)


def train(name: str, arguments: list[str], scratch: Path, target: Path) -> None:
    if "lm" in name:
        preprocess(scratch, target, [], "--only-source")
    elif name == "tiny_mt":
        preprocess(scratch, target, ["en", "de"])
    else:
        preprocess_joined(scratch, target)
    run("train", "data-bin", *arguments, "--save-dir", "checkpoints", cwd=scratch)
    for part in ("shared", "rank-0"):
        shutil.copy(scratch / "checkpoints" / f"checkpoint_last-{part}.pt", target)


def preprocess_joined(scratch: Path, target: Path) -> None:
    """Two pairs of languages with one dictionary of all words, as NLLB has it."""
    dictionary = scratch / "all.txt"
    dictionary.write_text("".join(f"{language}{word} 1\n" for language in "edf" for word in range(WORDS)))
    for language in ("de", "fr"):
        flags = ["--srcdict", str(dictionary), "--tgtdict", str(dictionary)]
        preprocess(scratch, target, ["en", language], *flags)


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


class Recorder:
    """Hooks on a model's MoE layers and on the scorer: arrays of the first batch's layers, of every batch's scores."""

    def __init__(self, with_layers: bool):
        self.arrays, self.batches, self.with_layers = {}, 0, with_layers

    def score(self, generate):
        """SequenceScorer.generate, with its samples and results recorded."""

        def recorded(scorer, models, sample, **options):
            hooks = []
            if self.with_layers and not self.batches:
                for name, module in models[0].named_modules():
                    if type(module).__name__ == "MOELayer":
                        hooks += self.watch(f"moe/{name}", module)
            found = generate(scorer, models, sample, **options)
            for hook in hooks:
                hook.remove()
            self.keep(sample, found)
            return found

        return recorded

    def watch(self, name, layer):
        def of_layer(module, inputs, outputs):
            self.arrays[f"{name}/in"], self.arrays[f"{name}/out"] = inputs[0].numpy(), outputs[0].numpy()

        def of_gate(module, inputs, outputs):
            weights = outputs[1]
            self.arrays[f"{name}/cw_shape"] = np.array(weights.shape)
            self.arrays[f"{name}/cw_idx"] = weights.nonzero().numpy().astype(np.int32)
            self.arrays[f"{name}/cw_val"] = weights[weights.nonzero(as_tuple=True)].numpy()
            if len(inputs) > 1 and inputs[1] is not None:
                self.arrays[f"{name}/mask"] = inputs[1].numpy()

        def of_logits(module, inputs, outputs):
            self.arrays[f"{name}/gate_logits"] = outputs.numpy()

        return [
            layer.register_forward_hook(of_layer),
            layer.gate.register_forward_hook(of_gate),
            layer.gate.wg.register_forward_hook(of_logits),
        ]

    def keep(self, sample, found):
        number, self.batches = f"b{self.batches}", self.batches + 1
        target = sample["target"].numpy()
        scores = np.full(target.shape, np.nan, dtype=np.float32)
        for row, hypotheses in enumerate(found):
            scores[row][target[row] != 1] = hypotheses[0]["positional_scores"].numpy()
        self.arrays[f"{number}/id"] = sample["id"].numpy()
        for name, tensor in sample["net_input"].items():
            if torch.is_tensor(tensor):
                self.arrays[f"{number}/{name}"] = tensor.numpy().astype(np.int32)
        self.arrays.update({f"{number}/target": target.astype(np.int32), f"{number}/scores": scores})

    def save(self, path: Path, **more):
        np.savez(path, **self.arrays, n_batches=self.batches, **more)
        print(path.name, path.stat().st_size, "bytes", more, flush=True)


@contextlib.contextmanager
def recording(recorder: Recorder):
    from fairseq.sequence_scorer import SequenceScorer

    before = SequenceScorer.__init__, SequenceScorer.generate

    def begin(scorer, *arguments, compute_vocab_dist=False, **options):  # which branch `moe`'s own tasks hand to it
        before[0](scorer, *arguments, **options)

    SequenceScorer.__init__, SequenceScorer.generate = begin, torch.no_grad()(recorder.score(before[1]))
    yield
    SequenceScorer.__init__, SequenceScorer.generate = before


def call(main, parser, arguments):
    """A command's main function in this process; what it prints on stdout."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    output = io.StringIO()
    args = options.parse_args_and_arch(parser, [str(each) for each in arguments])
    with contextlib.redirect_stdout(output):
        result = main(convert_namespace_to_omegaconf(args))
    return result, output.getvalue()


def evaluate(folder: Path) -> None:
    from fairseq import options
    from fairseq_cli.eval_lm import main

    for name, (rows, fraction, overrides, flags) in EVALUATED[folder.name].items():
        overrides = {**overrides, "moe_eval_capacity_token_fraction": fraction}
        arguments = [folder / "data-bin", "--path", folder / "checkpoint_last.pt", "--task", "language_modeling"]
        arguments += ["--gen-subset", "test", "--tokens-per-sample", 16, "--batch-size", rows, "--cpu", "--is-moe"]
        arguments += ["--num-workers", 0, "--model-overrides", repr(overrides), *flags]
        recorder = Recorder(name in WITH_LAYERS)
        with recording(recorder):
            results, _ = call(main, options.get_eval_lm_parser(), arguments)
        recorder.save(folder / "golden" / f"{name}.npz", loss_base2=float(results["loss"]))


def translate(folder: Path, scratch: Path) -> None:
    from fairseq import checkpoint_utils, options
    from fairseq_cli.generate import main as generate

    merged = scratch / "merged.pt"
    torch.save(checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint_last-rank-0.pt"), is_moe=True), merged)

    def command(target, rows, fraction, overrides, *flags):
        overrides = {**overrides, "moe_eval_capacity_token_fraction": fraction}
        task = [*NLLB_TASK, "-s", "en", "-t", target] if folder.name == "tiny_nllb" else PAIR
        arguments = [folder / "data-bin", "--path", merged, *task, "--gen-subset", "test", "--cpu"]
        arguments += ["--batch-size", rows, "--num-workers", 0, "--model-overrides", repr(overrides), *flags]
        return arguments

    for name, (rows, fraction, overrides) in SCORED[folder.name].items():
        recorder = Recorder(name in WITH_LAYERS)
        with recording(recorder):
            arguments = command(name[6:8], rows, fraction, overrides, "--score-reference")
            call(generate, options.get_generation_parser(), arguments)
        recorder.save(folder / "golden" / f"{name}.npz")
    for target in GENERATED[folder.name]:
        results = scratch / "results"
        arguments = command(target, 8, 1.0, {"use_moe_pad_mask": False}, *SEARCH, "--results-path", results)
        call(generate, options.get_generation_parser(), arguments)
        kept = folder / "golden" / f"gen_en-{target}_cap1.0_b8.txt"
        lines = (results / "generate-test.txt").read_text().splitlines()
        kept.write_text("".join(f"{line}\n" for line in lines if line.startswith(KEPT)))


def pack(folder: Path) -> None:
    """The folder as an archive here, the same bytes for the same files."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname, member.gname, member.mode = "", "", 0o755 if member.isdir() else 0o644
        return member

    target = HERE / f"{folder.name}.tar.xz"
    with tarfile.open(target, "w:xz", preset=9) as archive:
        archive.add(folder, folder.name, filter=plain)
    print(target.name, target.stat().st_size, "bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("branch", choices=sorted(TRAINED))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--record-only", action="store_true")
    parser.add_argument("--models", nargs="+", metavar="NAME")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout.resolve()))
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    global np, torch
    import numpy as np
    import torch

    exec(HISTOGRAMS, {})
    for name in arguments.models or TRAINED[arguments.branch]:
        flags = TRAINED[arguments.branch][name]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            if arguments.record_only:
                with tarfile.open(HERE / f"{name}.tar.xz") as archive:
                    archive.extractall(scratch)
            else:
                train(name, flags, Path(scratch), folder)
                pack(folder)
            shutil.rmtree(folder / "golden", ignore_errors=True)
            (folder / "golden").mkdir()
            if name in EVALUATED:
                evaluate(folder)
            else:
                translate(folder, Path(scratch))
            pack(folder)


if __name__ == "__main__":
    main()
