"""Lines on stdin to the pieces of a SentencePiece model on stdout, as fairseq-preprocess wants them.

    python examples/nllb/encode.py sentencepiece.bpe.model < devtest.eng_Latn > test.eng_Latn
"""

import sys

from sentencepiece import SentencePieceProcessor

if __name__ == "__main__":
    model = SentencePieceProcessor(model_file=sys.argv[1])
    for line in sys.stdin:
        print(" ".join(model.encode(line.rstrip("\n"), out_type=str)))
