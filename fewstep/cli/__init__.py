"""The command line, `fewstep <verb>`. One verb per file; each imports what it runs when it runs."""
