"""What a run tells: report, trace files, observer, and how it ends."""
