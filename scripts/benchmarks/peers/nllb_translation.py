"""NllbMoe of transformers, beam search over batches padded as its own collators pad. Served by serve.py."""

import torch
from serve import Prepared, serve
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, LogitsProcessor, LogitsProcessorList

PAD, EOS = 1, 2


class SameLength(LogitsProcessor):
    """`</s>` after exactly so many tokens, its own score counted, and never padding: as fairseq has it."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.size(1) == self.tokens + 1:
            only = torch.full_like(scores, float("-inf"))
            only[:, EOS] = scores[:, EOS]
            return only
        scores[:, [PAD, EOS]] = float("-inf")
        return scores


def prepare(wanted: dict) -> Prepared:
    """wanted: folder, sources (ids), batch, beam, tokens (of every hypothesis, `</s>` not counted)."""
    model = AutoModelForSeq2SeqLM.from_pretrained(f"{wanted['folder']}/hf", dtype=torch.float32).eval()
    sources = [torch.tensor(source) for source in wanted["sources"]]
    batches = [
        torch.nn.utils.rnn.pad_sequence(sources[first : first + wanted["batch"]], batch_first=True, padding_value=PAD)
        for first in range(0, len(sources), wanted["batch"])
    ]

    def translate() -> list[list[int]]:
        found = []
        for ids in batches:
            found += model.generate(
                input_ids=ids,
                attention_mask=ids.ne(PAD).long(),
                num_beams=wanted["beam"],
                max_length=wanted["tokens"] + 2,
                early_stopping=True,
                length_penalty=1.0,
                logits_processor=LogitsProcessorList([SameLength(wanted["tokens"])]),
                decoder_start_token_id=EOS,
            ).tolist()
        return [hypothesis[1:] for hypothesis in found]

    return Prepared({"translate": translate}, facts={"hypotheses": translate()})


if __name__ == "__main__":
    serve(prepare)
