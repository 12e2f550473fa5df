"""This plugin's `moe_translation`, batches as fairseq-generate hands them to the task. Served by serve.py."""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data import LanguagePairDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from serve import Prepared, serve

PACKAGE = Path(__file__).resolve().parents[3] / "fairseq_moe_ext"
sys.path.insert(0, str(PACKAGE.parent))


def prepare(wanted: dict) -> Prepared:
    """wanted: folder, sources (ids), batch, beam, tokens (of every hypothesis, `</s>` not counted)."""
    cfg = configuration(wanted)
    utils.import_user_module(cfg.common)
    task = tasks.setup_task(cfg.task)
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([cfg.common_eval.path], task=task)
    for model in models:
        model.eval()
        model.prepare_for_inference_(cfg)
    generator = task.build_generator(models, cfg.generation)
    sources = [torch.tensor(source) for source in wanted["sources"]]
    data = LanguagePairDataset(sources, [len(source) for source in sources], task.source_dictionary)
    numbers = range(0, len(sources), wanted["batch"])
    batches = [data.collater([data[each] for each in range(first, first + wanted["batch"])]) for first in numbers]

    def translate() -> list[list[int]]:
        found = {}
        for batch in batches:
            hypotheses = task.inference_step(generator, models, batch)
            found |= {
                number: sentence[0]["tokens"].tolist()
                for number, sentence in zip(batch["id"].tolist(), hypotheses, strict=True)
            }
        return [found[number] for number in range(len(sources))]

    return Prepared({"translate": translate}, facts={"hypotheses": translate()})


def configuration(wanted: dict) -> Namespace:
    """What fairseq-generate makes of its arguments."""
    folder, tokens = wanted["folder"], str(wanted["tokens"])
    arguments = [folder, "--task", "moe_translation", "-s", "en", "-t", "de", "--path", f"{folder}/model.pt", "--cpu"]
    arguments += ["--beam", str(wanted["beam"]), "--min-len", tokens, "--max-len-b", tokens, "--max-len-a", "0"]
    parser = options.get_generation_parser()
    parser.add_argument("--arch", "-a", default="wav2vec2")  # as fairseq_cli.generate has it
    arguments += ["--user-dir", str(PACKAGE)]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))


if __name__ == "__main__":
    serve(prepare)
