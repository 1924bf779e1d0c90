"""How the shipped nano models were made: ``make nano``, that is ``python -m tools.train_nano``."""
