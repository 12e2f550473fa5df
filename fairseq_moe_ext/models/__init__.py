"""The plugin's models; fairseq imports this folder for `--user-dir`."""
