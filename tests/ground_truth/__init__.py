"""Hand-wired models: circuits and heads that are known because every weight was set by hand."""
