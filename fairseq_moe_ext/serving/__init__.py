"""Everything between fairseq's commands and the layers: checkpoints, the generation loop, what was served."""
