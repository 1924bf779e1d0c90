"""What is not part of the library: how the nano models were made, and lines of code counted."""
