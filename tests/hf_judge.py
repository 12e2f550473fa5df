"""What transformers says of model folders: log-probabilities, the experts that ran, beam search. A process of its own.

    python hf_judge.py

Reads lines [FOLDER, QUESTIONS.json, ANSWERS.json], and prints `answered` after each.

With `source_ids` in QUESTIONS only beam search is asked, of sentences as rows of the embeddings, without a language.

QUESTIONS: source, target (texts), source_language, target_language, beam, max_len (tokens after `</s>`, the language
token counted, the closing one not). It runs where transformers 4.57.6 is, and knows nothing of the plugin.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, NllbTokenizer

PAD, EOS = 1, 2


def experts_that_ran(model, ran):
    """Hooks that append, per call of a router, each token's experts to `ran`, by the layer's name."""
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(
                lambda _module, _args, output, name=name: ran.setdefault(name, []).extend(
                    row.nonzero().flatten().tolist() for row in output[1]
                )
            )


def translate(model, inputs, asked, allowed):
    return model.generate(
        **inputs,
        num_beams=asked["beam"],
        max_length=asked["max_len"] + 2,
        early_stopping=True,
        length_penalty=1.0,
        prefix_allowed_tokens_fn=allowed,
        decoder_start_token_id=EOS,
    )[0].tolist()


def translate_ids(folder, asked):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    everything = [row for row in range(model.config.vocab_size) if row != PAD]

    def allowed(_batch, ids):
        # fairseq's shortest translation has a token, its longest is closed by force
        if len(ids) == 1:
            return [row for row in everything if row != EOS]
        return [EOS] if len(ids) == asked["max_len"] + 1 else everything

    sources = [torch.tensor([ids]) for ids in asked["source_ids"]]
    inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sources]
    return [translate(model, each, asked, allowed) for each in inputs]


def main(folder, questions, answers):
    asked = json.loads(Path(questions).read_text())
    if "source_ids" in asked:
        Path(answers).write_text(json.dumps(translate_ids(folder, asked)))
        return
    languages = {"src_lang": asked["source_language"], "tgt_lang": asked["target_language"]}
    tokenizer = NllbTokenizer.from_pretrained(folder, **languages)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    language = tokenizer.convert_tokens_to_ids(asked["target_language"])
    ran = {}
    experts_that_ran(model, ran)
    answered = []
    everything = [row for row in range(model.config.vocab_size) if row != tokenizer.pad_token_id]
    for source, target in zip(asked["source"], asked["target"], strict=True):
        ran.clear()
        inputs = tokenizer(source, return_tensors="pt")
        labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
        eos = torch.tensor([[tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=torch.cat((eos, labels[:, :-1]), dim=1)).logits
        scores = logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).flatten().tolist()
        experts = {name: list(tokens) for name, tokens in ran.items()}

        def allowed(_batch, ids, last=asked["max_len"] + 1):
            # as fairseq forces them: their scores count
            return [language] if len(ids) == 1 else [tokenizer.eos_token_id] if len(ids) == last else everything

        beam = translate(model, inputs, asked, allowed)
        answered.append({"scores": scores, "experts": experts, "beam": beam, "ids": inputs["input_ids"][0].tolist()})
    Path(answers).write_text(json.dumps(answered))


if __name__ == "__main__":
    for line in sys.stdin:
        main(*json.loads(line))
        print("answered", flush=True)
