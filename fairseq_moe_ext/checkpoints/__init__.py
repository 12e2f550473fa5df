"""fairseq's checkpoint files, in any layout: find, read, check, convert, write."""
