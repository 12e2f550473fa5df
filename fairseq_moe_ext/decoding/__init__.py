"""The generation loop: search, continuous batching, decoder rows."""
